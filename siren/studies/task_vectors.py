"""How alike the experts' ways in weight space are: cosines of their task vectors (appendix D.3, figure 7).

A task vector is what training added to a layer's weights: trained minus initial. The paper starts all experts from the
same weights (`make_initial`, then `siren train --init-from`). Experts that start from different weights, as those of an
ordinary run do, have ways that are hardly comparable: the cosine then says little, and `same_start` is False.

AdamW's weight decay shrinks the initial weights by the same factor in every expert; with the same start that much of a
task vector is shared whatever the tasks are.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from ..checkpoint import expected_shapes, iter_tensors, save_checkpoint
from ..codec import Codec
from ..config import SirenConfig
from ..errors import CheckpointError, InputError
from ..expert import Expert
from ..manifest import ExpertEntry, read_manifest
from ..train.assemble import RUN, expert_folder, read_run
from ..train.batches import weight_seed
from ..train.settings import read_config
from ..train.state import latest_state, read_values

MODULES = ("Embedding", "Classifier", "RVQ decoder", "Backbone")
KINDS = ("attention", "cross-attention", "feed-forward", "norm", "other")
_FROZEN = re.compile(r"codebooks\.layers\.\d+\.(codebook|dac_out)\.")

Pair = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """One layer's task vectors: its weight and bias behind one another.

    pairs: the cosine of each two experts, named by their first codebooks; NaN where a layer did not change. early: the
    mean over the experts of the cosine between an early and the last state's. change: mean over the experts of the
    length of the task vector as a share of that of the initial weights.
    """

    name: str
    module: str
    kind: str
    numbers: int
    pairs: dict[Pair, float]
    early: float | None
    change: float

    @property
    def mean(self) -> float:
        """Over the pairs of experts."""
        return _mean(self.pairs.values())


@dataclass(frozen=True)
class TaskVectors:
    """What `task_vectors` found. same_start: whether all experts have the same initial weights."""

    experts: list[int]
    same_start: bool
    steps: list[int] | None
    early_steps: list[int] | None
    layers: list[Layer]

    def of(self, module: str) -> list[Layer]:
        """The layers of one of MODULES."""
        return [layer for layer in self.layers if layer.module == module]

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        values: dict[str, Any] = {
            name: getattr(self, name) for name in ("experts", "same_start", "steps", "early_steps")
        }
        values["modules"] = {}
        for module in MODULES:
            layers = self.of(module)
            means = np.array([layer.mean for layer in layers])
            known = means[np.isfinite(means)]
            early = [layer.early for layer in layers if layer.early is not None]
            values["modules"][module] = {
                "layers": len(layers),
                "mean": _mean(known),
                "quartiles": np.percentile(known, [0, 25, 50, 75, 100]) if len(known) else None,
                "early_with_last": _mean(early) if early else None,
                "by_kind": {
                    kind: _mean([layer.mean for layer in layers if layer.kind == kind])
                    for kind in KINDS
                    if any(layer.kind == kind for layer in layers)
                },
            }
        values["layers"] = [
            {
                **{name: getattr(layer, name) for name in ("name", "module", "kind", "numbers", "mean", "change")},
                "early_with_last": layer.early,
                "random_std": layer.numbers**-0.5,
                "pairs": [{"experts": pair, "cosine": cosine} for pair, cosine in layer.pairs.items()],
            }
            for layer in self.layers
        ]
        return values


def task_vectors(trained: str | Path, initial: str | Path | None = None, progress: bool = False) -> TaskVectors:
    """Compare the experts of a training run or of a checkpoint folder; one tensor of each is in memory at a time.

    initial: the checkpoint folder with the weights that training started from. A run that began with random weights
    needs none: they are drawn again from its seed, and written to a temporary folder. Of a run the latest states are
    taken, and the earliest that it kept as the early ones. Raises InputError for fewer than two experts or initial
    weights that are missing or others than the run's, CheckpointError for what cannot be read.
    """
    trained = Path(trained).expanduser()
    start = None if initial is None else read_manifest(initial)
    early: list[ExpertEntry] | None = None
    steps = early_steps = None
    with tempfile.TemporaryDirectory(prefix="siren-initial-") as temporary:
        if (trained / RUN).is_file():
            settings = read_run(trained)["settings"]
            config = SirenConfig.from_dict(settings["config"])
            entries, steps = _states(trained, config, last=True)
            early, early_steps = _states(trained, config, last=False)
            if early_steps == steps:
                early = early_steps = None
            _check_count(entries, trained)
            if start is None and settings.get("init_from") is not None:
                raise InputError(
                    f"{trained} did not start from random weights: give the folder of init_from as initial"
                )
            if start is None:
                save_checkpoint(temporary, config, _drawn(config, int(settings["seed"])))
                start = read_manifest(temporary)
            elif settings.get("init_from") not in (None, [entry.sha256 for entry in start.experts]):
                raise InputError(f"{trained} started from other weights than those of {initial}")
        else:
            manifest = read_manifest(trained)
            config, entries = manifest.config, list(manifest.experts)
            _check_count(entries, trained)
            if start is None:
                raise InputError(f"{trained} does not say what its training started from: give initial weights")
        if start.config != config:
            raise InputError(f"{trained} and {initial} are models of different sizes; their weights have no difference")
        by_start = {entry.start_codebook: entry for entry in start.experts}
        first = [by_start[entry.start_codebook] for entry in entries]
        layers, same = compare(config, entries, first, early, progress)
    return TaskVectors([entry.start_codebook for entry in entries], same, steps, early_steps, layers)


def compare(
    config: SirenConfig,
    trained: Sequence[ExpertEntry],
    initial: Sequence[ExpertEntry],
    early: Sequence[ExpertEntry] | None = None,
    progress: bool = False,
) -> tuple[list[Layer], bool]:
    """The layers' cosines, and whether all initial weights are the same; lists in the same order of experts."""
    for entry in tqdm([*trained, *initial, *(early or [])], desc="checking", unit="file", disable=not progress):
        for _ in iter_tensors(entry, config):  # its hash, shapes and values
            pass
    count = len(trained)
    same = True
    grams: dict[str, NDArray[np.float64]] = {}
    sizes: dict[str, int] = {}
    lengths: dict[str, NDArray[np.float64]] = {}
    names = [name for name in expected_shapes(config) if not _FROZEN.match(name)]
    for name in tqdm(names, desc="task vectors", unit="tensor", disable=not progress):
        layer = re.sub(r"\.(weight|bias)$", "", name)
        starts = torch.stack([_read(entry, name).flatten() for entry in initial])
        same = same and bool((starts == starts[0]).all())
        vectors = torch.stack([_read(entry, name).flatten() for entry in trained]) - starts
        if early is not None:
            vectors = torch.cat((vectors, torch.stack([_read(entry, name).flatten() for entry in early]) - starts))
        grams[layer] = grams.get(layer, 0) + (vectors.double() @ vectors.double().T).numpy()
        lengths[layer] = lengths.get(layer, 0) + starts.double().square().sum(1).numpy()
        sizes[layer] = sizes.get(layer, 0) + starts.shape[1]
    layers = []
    for layer, gram in grams.items():
        norms = np.sqrt(np.diag(gram))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = gram / np.outer(norms, norms)
            change = norms[:count] / np.sqrt(lengths[layer])
        pairs = {
            (trained[a].start_codebook, trained[b].start_codebook): float(cosines[a, b])
            for a, b in itertools.combinations(range(count), 2)
        }
        with_last = None if early is None else _mean(np.diag(cosines[:count, count:]))
        layers.append(Layer(layer, *module_of(layer), sizes[layer], pairs, with_last, _mean(change)))
    return layers, same


def module_of(layer: str) -> tuple[str, str]:
    """Which of MODULES (figure 7) and KINDS a layer belongs to."""
    if layer == "sos" or layer.startswith("codebooks."):
        return "Embedding", "other"
    if layer.startswith("heads."):
        return "Classifier", "other"
    module = "Backbone" if layer.startswith("spatial_") else "RVQ decoder"
    kinds = (("_norm", "norm"), ("cross_attention", "cross-attention"), ("attention", "attention"))
    for part, kind in (*kinds, ("feed_forward", "feed-forward")):
        if part in layer:
            return module, kind
    return module, "other"


def make_initial(
    folder: str | Path,
    config: str | Path | SirenConfig,
    codec: str | Path,
    seed: int = 0,
    prompt_encoder: str | None = None,
    overwrite: bool = False,
) -> SirenConfig:
    """Write a checkpoint whose experts all have the same random weights, for `siren train --init-from`.

    They are those that expert 0 of a run of this seed starts from. Raises CheckpointError if the folder holds anything
    and `overwrite` is false, InputError for a codec that does not fit the config.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise InputError(f"seed must be a whole number from 0 to 2^32 - 1, not {seed!r}")
    target = Path(folder).expanduser()
    if not overwrite and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists; choose another folder, or overwrite it with --overwrite")
    config = read_config(config)
    sound = Codec.from_pretrained(codec)
    [(_, weights)] = _drawn(config, seed, [0], sound.decode_embeddings())
    starts = range(0, config.num_codebooks, config.codes_per_expert)
    with tempfile.TemporaryDirectory() as temporary:
        sound.save_pretrained(Path(temporary) / "codec")
        save_checkpoint(target, config, ((i, weights) for i in starts), Path(temporary) / "codec", prompt_encoder)
    return config


def _drawn(
    config: SirenConfig, seed: int, experts: Sequence[int] | None = None, embeddings: Sequence[Any] | None = None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The weights that the experts of a run of this seed start from (siren.train.run)."""
    for index in range(config.num_experts) if experts is None else experts:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weight_seed(seed, index))
            expert = Expert(config, index * config.codes_per_expert)
        if embeddings is None:
            embeddings = [  # not part of a task vector, but of a checkpoint
                tuple(tensor.zero_() for tensor in (layer.codebook.weight, layer.dac_out.weight, layer.dac_out.bias))
                for layer in expert.requires_grad_(False).codebooks.layers
            ]
        expert.set_decode_embeddings(embeddings)
        yield expert.start_codebook, expert.state_dict()


def _states(run: Path, config: SirenConfig, last: bool) -> tuple[list[ExpertEntry], list[int]]:
    """The weights in the latest, or the earliest, states of the experts that have one, and their updates."""
    entries, steps = [], []
    for start in range(0, config.num_codebooks, config.codes_per_expert):
        folder = expert_folder(run, start)
        path = latest_state(folder)
        if path is not None and not last:
            kept = [index.parent for index in folder.glob("state-*/state.json") if index.parent.name[6:].isdigit()]
            path = min(kept, key=lambda state: int(state.name[6:]))
        if path is not None:
            values = read_values(path)
            entries.append(ExpertEntry(start, path / "model.safetensors", values["files"]["model.safetensors"]))
            steps.append(int(values["step"]))
    return entries, steps


def _check_count(entries: Sequence[ExpertEntry], where: Path) -> None:
    if len(entries) < 2:
        raise InputError(f"{where} has {len(entries)} trained expert{'s' * (len(entries) != 1)}; a pair needs two")


def _read(entry: ExpertEntry, name: str) -> Tensor:
    with safe_open(entry.path, framework="pt", device="cpu") as tensors:
        tensor: Tensor = tensors.get_tensor(name).float()
    return tensor


def _mean(values: Any) -> float:
    """Of those that are numbers; NaN of none."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
