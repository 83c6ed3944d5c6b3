"""The manifest of a checkpoint folder: which files make it up, read and checked without loading weights.

Nothing in it is trusted: paths may not leave the folder, JSON is bounded, every expert carries a hash. Four keys are
ours, optional, and ignored by the official reader: `config_sha256` (a changed `n_heads` or `norm_eps` would still
load), `codec` (a folder), `prompt_encoder` (a name or a folder) and `generation` (how the model is best sampled).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import SirenConfig
from .errors import CheckpointError, ConfigError

# Used where neither the caller nor the checkpoint says otherwise.
GENERATION = {"seconds": 6.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0}
MINI = "siren-mini"  # the name of the model that comes with the package
_MINI_FOLDER = Path(__file__).parent / "models" / MINI
JSON_LIMIT = 4 << 20  # bytes; the largest model the config allows needs an eighth of it


@dataclass(frozen=True)
class ExpertEntry:
    """One expert's weights: its first codebook, its safetensors file and the sha256 of that whole file."""

    start_codebook: int
    path: Path
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint folder, read and checked; no weights are loaded yet.

    `experts` are in order of `start_codebook` and cover the config exactly. `codec` is a folder inside the checkpoint.
    `prompt_encoder` is a name for `PromptEncoder.from_pretrained`, or the absolute path of a folder inside the
    checkpoint. `generation` has some of GENERATION's values, for this model.
    """

    root: Path
    config: SirenConfig
    experts: tuple[ExpertEntry, ...]
    codec: Path | None
    prompt_encoder: str | None
    generation: Mapping[str, float] = field(default_factory=dict)


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check a checkpoint folder (or a manifest file) without loading weights.

    "siren-mini" is the model in the package; a Path, or "./siren-mini", is always a folder. Raises CheckpointError or
    ConfigError naming the file and the field. If a save was killed between its two renames, the previous version is
    read instead, with a warning.
    """
    try:
        path = _MINI_FOLDER if folder == MINI else Path(folder).expanduser()
        if folder == MINI and not path.exists():
            raise CheckpointError(
                f"{MINI} is not in this installation: pass a checkpoint folder (--model FOLDER), or make it with "
                "examples/siren-mini/make.sh"
            )
        previous = previous_version(path)
        if not path.exists() and (previous / "manifest.json").is_file():
            warnings.warn(f"{path} is missing after an interrupted save; reading {previous}", stacklevel=2)
            path = previous
        manifest = path if path.is_file() else path / "manifest.json"
        root = manifest.parent.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no such user, or a loop of links
        raise CheckpointError(f"no checkpoint folder {str(folder)!r}: {error}") from error
    values = parse_json(_read_bytes(manifest), str(manifest))
    version = values.get("format_version")
    if isinstance(version, bool) or version != 1:
        raise CheckpointError(f"{manifest}: format_version must be 1, not {_show(version)}; a newer Siren may read it")
    config_path = _inside(root, values.get("config"), f"{manifest}: config", ".json")
    config_bytes = _read_bytes(config_path)
    digest = hashlib.sha256(config_bytes).hexdigest()
    if values.get("config_sha256", digest) != digest:
        raise CheckpointError(f"{config_path} was altered; copy it again, or remove config_sha256 from {manifest.name}")
    try:
        config = SirenConfig.from_dict(parse_json(config_bytes, str(config_path)))
    except (ConfigError, RecursionError) as error:  # a value nested so deep that it cannot be shown
        raise ConfigError(f"{config_path}: {error}") from error
    codec, prompt_encoder = values.get("codec"), values.get("prompt_encoder")
    return Manifest(
        root=root,
        config=config,
        experts=_experts(root, manifest, values.get("experts"), config),
        codec=None if codec is None else _inside(root, codec, f"{manifest}: codec"),
        prompt_encoder=None if prompt_encoder is None else check_prompt_encoder(root, manifest, prompt_encoder),
        generation=check_generation(values.get("generation", {}), f"{manifest}: generation"),
    )


def check_generation(values: Any, where: str) -> dict[str, float]:
    """The settings of GENERATION that a manifest overrides, if all have their names and are numbers."""
    if not isinstance(values, dict) or not values.keys() <= GENERATION.keys():
        raise CheckpointError(f"{where} must be an object with some of {', '.join(GENERATION)}, not {_show(values)}")
    for name, value in values.items():
        kinds = (int,) if name == "top_k" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise CheckpointError(f"{where}: {name} must be a number, not {_show(value)}")
    return dict(values)


def _read_bytes(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a file")
        with path.open("rb") as file:
            return file.read(JSON_LIMIT + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}; is this a checkpoint folder?") from error


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from at most JSON_LIMIT bytes; CheckpointError naming `where` otherwise."""
    if len(data) > JSON_LIMIT:
        raise CheckpointError(f"{where} is larger than {JSON_LIMIT >> 20} MiB; this is not checkpoint JSON")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({type(error).__name__}: {error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} must hold a JSON object")
    return values


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 100
_show = _repr.repr  # never long, whatever a file holds, and never deep


def _inside(root: Path, value: Any, field: str, suffix: str = "") -> Path:
    """The real path of a manifest entry: a file with this suffix, or a folder if there is none."""
    shown = _show(value)
    if not isinstance(value, str) or not value:
        raise CheckpointError(f"{field} must be a relative path, not {shown}")
    path = Path(value)
    wrong_kind = bool(suffix) and path.suffix.lower() != suffix
    if path.is_absolute() or ".." in path.parts or "://" in value or "\\" in value or wrong_kind:
        raise CheckpointError(f"{field} must be a relative {suffix or 'folder'} path inside the folder, not {shown}")
    try:
        real = (root / path).resolve(strict=True)
        kind = real.is_file() if suffix else real.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{field}: {shown} is missing or unreadable; the checkpoint is incomplete") from error
    if not real.is_relative_to(root):
        raise CheckpointError(f"{field}: {shown} is a link that leaves the folder; replace it with the file itself")
    if not kind:
        raise CheckpointError(f"{field}: {shown} is not a {'file' if suffix else 'folder'}")
    return real


def _experts(root: Path, manifest: Path, values: Any, config: SirenConfig) -> tuple[ExpertEntry, ...]:
    if not isinstance(values, list):
        raise CheckpointError(f"{manifest}: experts must be a list")
    wanted = range(0, config.num_codebooks, config.codes_per_expert)
    entries: dict[int, ExpertEntry] = {}
    for i, value in enumerate(values):
        field = f"{manifest}: experts[{i}]"
        if not isinstance(value, dict):
            raise CheckpointError(f"{field} must be an object with start_codebook, weights and sha256")
        start, digest = value.get("start_codebook"), value.get("sha256")
        if isinstance(start, bool) or not isinstance(start, int) or start not in wanted:
            raise CheckpointError(f"{field}.start_codebook must be one of {list(wanted)}, not {_show(start)}")
        if start in entries:
            raise CheckpointError(f"{field}.start_codebook {start} appears twice")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-fA-F]{64}", digest):
            raise CheckpointError(f"{field}.sha256 must be 64 hexadecimal digits, not {_show(digest)}")
        path = _inside(root, value.get("weights"), f"{field}.weights", ".safetensors")
        entries[start] = ExpertEntry(start, path, digest.lower())
    missing = sorted(set(wanted) - set(entries))
    if missing:
        raise CheckpointError(f"{manifest}: experts has no entry for start_codebook {missing}")
    return tuple(entries[start] for start in wanted)


def check_prompt_encoder(root: Path, manifest: Path, value: Any) -> str:
    """The manifest's prompt encoder: the path of a folder inside `root` if there is one of that name, else the name."""
    field = f"{manifest}: prompt_encoder"
    plain = isinstance(value, str) and len(value) <= 200 and re.fullmatch(r"[\w.-]+(/[\w.-]+)*", value)
    if not plain or ".." in value.split("/"):
        raise CheckpointError(f"{field} must be a name or a relative folder, not {_show(value)}")
    return str(_inside(root, value, field)) if (root / value).exists() else value


def previous_version(target: Path) -> Path:
    """Where a save keeps the checkpoint it replaces until the new one is in place."""
    return target.parent / f".{target.name}.previous"
