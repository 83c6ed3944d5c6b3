"""Checkpoint folders in the official stage-1 format: manifest.json, config.json, one safetensors file per expert.

Reading takes the hash of an expert over the very bytes that are handed out. Saving writes a new folder beside the old
one and renames it into place.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import SirenConfig
from .errors import CheckpointError, InputError, SirenError
from .manifest import (
    JSON_LIMIT,
    ExpertEntry,
    Manifest,
    check_generation,
    check_prompt_encoder,
    parse_json,
    previous_version,
    read_manifest,
)

__all__ = [
    "ExpertEntry",
    "Manifest",
    "expected_shapes",
    "iter_tensors",
    "read_manifest",
    "replace_folder",
    "save_checkpoint",
    "sync",
]

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def expected_shapes(config: SirenConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of one expert. All experts of a model have the same."""
    d, kv, hidden = config.dim, config.n_kv_heads * config.head_dim, config.ffn_hidden
    shapes: dict[str, tuple[int, ...]] = {"sos": (1, 1, d), "spatial_norm.weight": (d,)}

    def block(prefix: str, attention: str, norms: tuple[str, ...]) -> None:
        shapes.update({f"{prefix}.{norm}.weight": (d,) for norm in norms})
        shapes[f"{prefix}.{attention}.qkv.weight"] = (d + 2 * kv, d)
        shapes[f"{prefix}.{attention}.output.weight"] = (d, d)
        shapes[f"{prefix}.feed_forward.gate_value.weight"] = (2 * hidden, d)
        shapes[f"{prefix}.feed_forward.down.weight"] = (d, hidden)

    def linear(prefix: str, outputs: int, inputs: int) -> None:
        shapes[f"{prefix}.weight"] = (outputs, inputs)
        shapes[f"{prefix}.bias"] = (outputs,)

    for j in range(config.num_codebooks):
        shapes[f"codebooks.layers.{j}.codebook.weight"] = (config.codebook_size, config.dac_code_dim)
        linear(f"codebooks.layers.{j}.dac_out", config.dac_feature_dim, config.dac_code_dim)
        linear(f"codebooks.layers.{j}.projector", d, config.dac_feature_dim)
    for i in range(config.spatial_layers):
        prefix = f"spatial_blocks.{i}"
        block(prefix, "self_attention", ("cross_norm", "self_norm", "ffn_norm"))
        linear(f"{prefix}.cross_attention.query", d, d)
        linear(f"{prefix}.cross_attention.key_value", 2 * d, config.prompt_dim)
        linear(f"{prefix}.cross_attention.output", d, d)
    if config.factorized_layers:
        for i in range(config.factorized_layers):
            block(f"factorized_blocks.{i}", "attention", ("attention_norm", "ffn_norm"))
        shapes["factorized_norm.weight"] = (d,)
        if config.decoder_start == "learned":
            shapes["start"] = (1, 1, d)
        else:
            linear("prompt_summary", d, config.prompt_dim)
    shapes.update({f"heads.{i}.weight": (config.codebook_size, d) for i in range(config.codes_per_expert)})
    return shapes


def iter_tensors(entry: ExpertEntry, config: SirenConfig | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of one expert in file order, each a private CPU copy, one in memory at a time.

    With `config`, names and shapes are checked before the first tensor and values for NaN and infinity as they come.
    Raises CheckpointError. The hash is known only at the end, so what was yielded may be used only once the iterator
    is exhausted.
    """
    file = f"{entry.path.name} (expert {entry.start_codebook})"
    damaged = f"{file} is damaged or was altered; download or copy {entry.path} again"
    try:
        header, specs = _read_header(entry.path, file)
        if config is not None:
            _check_names({name: spec["shape"] for name, spec in specs.items()}, config, file)
        digest = hashlib.sha256(header)
        for name in sorted(specs, key=lambda name: specs[name]["data_offsets"]):
            # Opened anew for each tensor: pages of one long mapping would stay resident, a second copy of the expert.
            with safe_open(entry.path, framework="pt", device="cpu") as tensors:
                tensor = tensors.get_tensor(name).clone(memory_format=torch.contiguous_format)
            if tensor.dtype != _DTYPES[specs[name]["dtype"]] or list(tensor.shape) != specs[name]["shape"]:
                raise CheckpointError(damaged)
            if config is not None:
                _check_finite(name, tensor, file)
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
            yield name, tensor
            del tensor
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; download or copy {entry.path} again") from error
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{damaged} ({error})") from error
    if digest.hexdigest() != entry.sha256:
        raise CheckpointError(f"{damaged} (its sha256 is not the one in the manifest)")


def _read_header(path: Path, file: str) -> tuple[bytes, dict[str, Any]]:
    """The bytes before the data, and what they say of each tensor.

    The library parses and validates the same bytes; reading them here too ties its answers to what is hashed and
    gives the order of the tensors, which older versions of the library do not tell.
    """
    with path.open("rb") as stream:
        size = stream.read(8)
        header = stream.read(min(int.from_bytes(size, "little"), JSON_LIMIT + 1))
    specs = parse_json(header, f"the header of {file}")
    specs.pop("__metadata__", None)
    for name, spec in specs.items():
        if spec["dtype"] not in _DTYPES:
            raise CheckpointError(f"{file}: {name} has type {spec['dtype']!r}; weights must be {', '.join(_DTYPES)}")
    return size + header, specs


def _check_names(shapes: Mapping[str, Any], config: SirenConfig, where: str) -> None:
    wanted = expected_shapes(config)
    for title, names in (("lacks", wanted.keys() - shapes.keys()), ("has unknown", shapes.keys() - wanted.keys())):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"{where} {title} {some}; it does not fit its config.json")
    for name, shape in shapes.items():
        if tuple(shape) != wanted[name]:
            raise CheckpointError(f"{where}: {name} has shape {list(shape)}, its config.json asks {list(wanted[name])}")


def _check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    low, high = torch.aminmax(tensor)  # NaN wins both; isfinite() of the whole would need several copies
    if not torch.isfinite(low) or not torch.isfinite(high):
        raise CheckpointError(f"{where}: {name} holds NaN or infinity; the model cannot be used")


def save_checkpoint(
    folder: str | Path,
    config: SirenConfig,
    experts: Iterable[tuple[int, Mapping[str, torch.Tensor]]],
    codec_folder: str | Path | None = None,
    prompt_encoder: str | Path | None = None,
    generation: Mapping[str, float] | None = None,
) -> None:
    """Write a checkpoint folder; `experts` gives (start_codebook, state dict) one by one, each copied once.

    A string `prompt_encoder` is a name; a Path or an absolute path is a folder and copied in, as `codec_folder` is.
    `generation` are defaults for sampling this model, some of manifest.GENERATION.
    An existing checkpoint is replaced; any other folder, and one that holds files of yours, is refused. The new folder
    is written and synced under a hidden name beside the target. Then old becomes `.NAME.previous`, new becomes NAME,
    and the old one is deleted. Killed at any point, NAME is the old or the new checkpoint; killed between the two
    renames NAME is missing and `read_manifest` and the next save find `.NAME.previous`. A killed save may leave a
    `.NAME.saving-*` folder, which can be deleted. Raises CheckpointError, having removed what it wrote.
    """
    replace_folder(
        Path(folder),
        "manifest.json",
        _check_replaceable,
        lambda temporary: _write(temporary, config, experts, codec_folder, prompt_encoder, generation or {}),
    )


def replace_folder(target: Path, marker: str, check: Callable[[Path], None], write: Callable[[Path], None]) -> None:
    """Put a folder that `write` fills and syncs in the place of `target`, unless `check(target)` raises.

    See `save_checkpoint` for what a kill leaves. `marker` is a file that every whole folder holds: it goes first when
    the old folder is deleted, so that one half removed is never taken for a whole one. Raises CheckpointError.
    """
    temporary = None
    try:
        target = target.expanduser().resolve()
        previous = previous_version(target)
        if not target.exists() and (previous / marker).is_file():
            previous.rename(target)
        check(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.saving-{secrets.token_hex(4)}")
        temporary.mkdir()
        write(temporary)
        try:
            if target.exists():
                _delete(previous, marker)
                target.rename(previous)
            temporary.rename(target)
        except BaseException:
            if not target.exists() and previous.exists():
                previous.rename(target)
            raise
        sync(target.parent)
        _delete(previous, marker)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        if isinstance(error, SirenError):
            raise
        raise CheckpointError(f"could not save {target}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        manifest = read_manifest(target)
    except SirenError as error:
        raise CheckpointError(f"{target} exists and is not a checkpoint ({error}); choose another folder") from error
    parts = [entry.path for entry in manifest.experts] + [manifest.codec, Path(manifest.prompt_encoder or "")]
    ours = {"manifest.json", "config.json"} | {path.name for path in parts if path is not None}
    others = sorted(path.name for path in target.iterdir() if path.name not in ours)
    if others:
        raise CheckpointError(f"{target} also holds {others[0]!r}; move it out, or choose another folder")


def _write(
    folder: Path,
    config: SirenConfig,
    experts: Iterable[tuple[int, Mapping[str, torch.Tensor]]],
    codec_folder: str | Path | None,
    prompt_encoder: str | Path | None,
    generation: Mapping[str, float],
) -> None:
    config_path = folder / "config.json"
    config.save(config_path)
    entries: list[dict[str, Any]] = []
    for start, state in experts:
        where = f"expert {start}"
        _check_names({name: tensor.shape for name, tensor in state.items()}, config, where)
        copies = {}
        for name, tensor in state.items():
            if tensor.dtype not in _DTYPES.values():
                raise InputError(f"{where}: {name} has type {tensor.dtype}; weights must be floating point")
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
            _check_finite(name, copies[name], where)
        path = folder / f"expert_{start}.safetensors"
        save_file(copies, path)
        path.chmod(config_path.stat().st_mode)  # newer versions of the library write for the owner only
        entries.append({"start_codebook": start, "weights": path.name, "sha256": _sha256_file(path)})
        del state, copies  # before `experts` makes the next
    wanted = list(range(0, config.num_codebooks, config.codes_per_expert))
    given = [entry["start_codebook"] for entry in entries]
    if sorted(given) != wanted:
        raise InputError(f"experts must hold each start_codebook of {wanted} once, not {given}")
    manifest: dict[str, Any] = {"format_version": 1, "config": config_path.name, "experts": entries}
    manifest["config_sha256"] = _sha256(config_path.read_bytes())
    if generation:
        manifest["generation"] = check_generation(dict(generation), "generation")
    if codec_folder is not None:
        manifest["codec"] = "codec"
        _copy(Path(codec_folder), folder / "codec")
    if isinstance(prompt_encoder, Path) or (prompt_encoder is not None and Path(prompt_encoder).is_absolute()):
        manifest["prompt_encoder"] = "prompt_encoder"
        _copy(Path(prompt_encoder), folder / "prompt_encoder")
    elif prompt_encoder is not None:
        manifest["prompt_encoder"] = check_prompt_encoder(folder, folder / "manifest.json", prompt_encoder)
    for path in folder.rglob("*"):
        sync(path)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync(folder / "manifest.json")
    sync(folder)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for path in (target, *target.rglob("*")):
        if path.is_dir():
            path.chmod(path.stat().st_mode | stat.S_IRWXU)  # a read-only source would leave a copy nobody can delete


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(folder: Path, marker: str) -> None:
    (folder / marker).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
