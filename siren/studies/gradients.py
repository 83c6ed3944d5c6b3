"""Influence 1: the angles between the gradients that the heads send back to the backbone (section 3, D.1, figure 2b).

For a batch of clips, g_j is the gradient of codebook j's loss with respect to the weights of the backbone's last block.
As the paper has it, the gradient [outputs, inputs] of each matrix is averaged over its outputs, and the angle is that
of the vectors of all matrices behind one another ("averaged"); beside it that of the whole gradients ("whole").

Heads read different batches of numbers, so two things are told apart from conflict:
- same head: the angle between one head's gradients on two batches. Were it 90 degrees, gradients would be noise.
- without noise: cos = E<g_j(a), g_k(b)> / sqrt(E<g_j(a), g_j(b)> E<g_k(a), g_k(b)>) over pairs of batches a, b, whose
  noise is independent and drops out; undefined where a head's own gradients do not agree on average.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..checkpoint import iter_tensors
from ..codec import Codec
from ..data.tokens import check_codec, open_tokens, split
from ..errors import InputError
from ..expert import Expert
from ..manifest import read_manifest
from ..train.batches import Batch, Batches, usable
from .spread import Spread

_BINS = 90
_FRAME_RATE = 50.0  # of the official format, which does not say
KINDS = ("averaged", "whole")

Pair = tuple[int, int]


@dataclass(frozen=True)
class Gradients:
    """What `gradients` found: angles in degrees, each kind of KINDS; codebooks are those of the expert.

    pairs[kind][j, k]: over the batches. same_head[kind][j]: over pairs of batches. without_noise[kind][j, k]: one
    angle, NaN where it is undefined. by_weight[name][kind]: mean over pairs and batches for one matrix alone.
    """

    codebooks: list[int]
    batches: int
    clips: int
    frames: int
    sizes: dict[str, int]
    pairs: dict[str, dict[Pair, Spread]]
    same_head: dict[str, dict[int, Spread]]
    without_noise: dict[str, dict[Pair, float]]
    by_weight: dict[str, dict[str, float]]

    def overall(self, kind: str) -> Spread:
        """All pairs of heads and all batches together."""
        return _together(self.pairs[kind].values())

    def overall_same_head(self, kind: str) -> Spread:
        """All heads, each with itself on another batch."""
        return _together(self.same_head[kind].values())

    def numbers(self) -> dict[str, Any]:
        """For JSON. random_std: deviation from 90 degrees of the angle of two random vectors of that many numbers."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("codebooks", "batches", "clips", "frames")}
        values["bins"] = Spread(0, 180, _BINS).edges()
        for kind in KINDS:
            noiseless = self.without_noise[kind]
            known = [angle for angle in noiseless.values() if np.isfinite(angle)]
            values[kind] = {
                "numbers": self.sizes[kind],
                "random_std": float(np.degrees(self.sizes[kind] ** -0.5)),
                "overall": self.overall(kind).numbers(),
                "same_head_other_batch": self.overall_same_head(kind).numbers(),
                "without_noise": {
                    "mean": float(np.mean(known)) if known else None,
                    "defined": len(known),
                    "pairs": len(noiseless),
                },
                "heads": [
                    {"codebook": j, "other_batch": spread.numbers(False)} for j, spread in self.same_head[kind].items()
                ],
                "pairs": [
                    {"codebooks": pair, **spread.numbers(), "without_noise": noiseless[pair]}
                    for pair, spread in self.pairs[kind].items()
                ],
            }
        values["by_weight"] = self.by_weight
        return values


def study_gradients(
    model: str | Path,
    data: str | Path,
    expert: int = 0,
    batches: int = 32,
    batch_size: int = 8,
    seconds: float = 4.0,
    val_fraction: float = 0.05,
    seed: int = 0,
    progress: bool = False,
) -> Gradients:
    """`gradients` of one expert of a checkpoint on random crops of the clips that training held out (val_fraction).

    expert: its index from 0. Memory: twice the expert's heads times the weights of a block, and the logits of a batch.
    Raises InputError for an expert that is not there or has one head, and for tokens that do not fit the model;
    CheckpointError, DataError for folders that cannot be read.
    """
    manifest = read_manifest(model)
    config = manifest.config
    if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < config.num_experts:
        raise InputError(f"{model} has the experts 0 to {config.num_experts - 1}; there is no expert {expert!r}")
    if config.codes_per_expert < 2:
        raise InputError(f"an expert of {model} has one head; two are needed for an angle")
    if batches < 2 or batch_size < 1 or not 0 < seconds < 1e4:
        raise InputError("batches must be at least 2, batch_size at least 1, and seconds above 0")
    tokens = open_tokens(data)
    for name in ("num_codebooks", "codebook_size", "prompt_dim"):
        if getattr(tokens, name) != getattr(config, name):
            raise InputError(f"{data} has {name} {getattr(tokens, name)}, the model {getattr(config, name)}")
    if manifest.codec is not None:
        check_codec(tokens, Codec.from_pretrained(manifest.codec))
    rate = tokens.sample_rate / tokens.hop_length if tokens.sample_rate and tokens.hop_length else _FRAME_RATE
    crop = min(config.max_seq_len, max(1, round(seconds * rate)))
    _, held_out = split(tokens, val_fraction)
    clips = usable(tokens, held_out, crop)
    if not len(clips):
        raise InputError(f"val_fraction {val_fraction:g} leaves no clip of {data} to measure on; raise it")
    with torch.device("meta"):
        module = Expert(config, manifest.experts[expert].start_codebook)
    weights = {name: tensor.float() for name, tensor in iter_tensors(manifest.experts[expert], config)}
    module.load_state_dict(weights, assign=True)
    source = Batches(tokens, clips, seed, batch_size, 1, crop)
    made = (source.batch(step, 0) for step in range(batches))
    return gradients(module.eval(), tqdm(made, desc="batches", total=batches, disable=not progress))


def gradients(expert: Expert, batches: Any) -> Gradients:
    """The angles for an expert of two heads or more and an iterable of two `Batch`es or more."""
    last = expert.spatial_blocks[-1]
    names = [name for name, parameter in last.named_parameters() if parameter.dim() == 2]
    for parameter in expert.parameters():
        parameter.requires_grad_(False)  # what comes before the block needs no graph
    weights = [last.get_parameter(name).requires_grad_() for name in names]
    count = len(expert.heads)
    heads = list(range(expert.start_codebook, expert.start_codebook + count))
    pairs: dict[str, dict[Pair, Spread]] = {kind: {} for kind in KINDS}
    same: dict[str, dict[int, Spread]] = {kind: {j: Spread(0, 180, _BINS) for j in heads} for kind in KINDS}
    crossed = {kind: np.zeros((count, count)) for kind in KINDS}
    per_weight: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in names}
    above = list(itertools.combinations(range(count), 2))
    before: list[Tensor] = []
    squares: dict[str, NDArray[np.float64]] = {}  # of the lengths of the gradients of the batch before
    made = clips = frames = 0
    for batch in batches:
        now = _head_gradients(expert, weights, batch)  # for each matrix [heads, outputs, inputs]
        for kind in KINDS:
            products = np.zeros((count, count))
            for name, part in zip(names, now, strict=True):
                own = _products(part, part, kind)
                per_weight[name][kind].append(float(np.nanmean([_angles(own)[pair] for pair in above])))
                products += own
            angles = _angles(products)
            for j, k in above:
                pairs[kind].setdefault((heads[j], heads[k]), Spread(0, 180, _BINS)).add(angles[j, k])
            if before:
                cross = np.sum([_products(old, part, kind) for old, part in zip(before, now, strict=True)], axis=0)
                crossed[kind] += cross
                for i, j in enumerate(heads):
                    size = np.sqrt(squares[kind][i] * products[i, i])
                    same[kind][j].add(_degrees(cross[i, i] / size if size else np.nan))
            squares[kind] = np.diag(products)
        before = now
        made += 1
        clips += len(batch.codes)
        frames += (
            batch.codes.shape[0] * batch.codes.shape[2]
            if batch.sequence_mask is None
            else int(batch.sequence_mask.sum())
        )
    if made < 2 or count < 2:
        raise InputError(f"angles need two heads and two batches or more, not {count} and {made}")
    noiseless = {kind: _without_noise(matrix, heads) for kind, matrix in crossed.items()}
    sizes = {"averaged": sum(w.shape[1] for w in weights), "whole": sum(w.numel() for w in weights)}
    means = {
        name: {kind: float(np.mean(values)) for kind, values in parts.items()} for name, parts in per_weight.items()
    }
    return Gradients(heads, made, clips, frames, sizes, pairs, same, noiseless, means)


def _head_gradients(expert: Expert, weights: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    losses = expert.losses(*batch.arguments())
    rows = [torch.autograd.grad(loss, weights, retain_graph=i + 1 < len(losses)) for i, loss in enumerate(losses)]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _products(first: Tensor, second: Tensor, kind: str) -> NDArray[np.float64]:
    """Scalar products of all heads' gradients of one matrix: two [heads, outputs, inputs] -> [heads, heads]."""
    if kind == "averaged":
        first, second = first.mean(1), second.mean(1)
    return (first.flatten(1).double() @ second.flatten(1).double().T).numpy()


def _angles(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angles in degrees between vectors, of their scalar products; NaN where one has length 0."""
    lengths = np.sqrt(np.diag(products))
    lengths[lengths == 0] = np.nan
    return _degrees(products / np.outer(lengths, lengths))


def _degrees(cosines: Any) -> Any:
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


def _without_noise(crossed: NDArray[np.float64], heads: Sequence[int]) -> dict[Pair, float]:
    found = {}
    for i, j in itertools.combinations(range(len(heads)), 2):
        own = crossed[i, i], crossed[j, j]
        cosine = (crossed[i, j] + crossed[j, i]) / 2 / np.sqrt(own[0] * own[1]) if min(own) > 0 else np.nan
        # Where noise is large the estimate can leave -1..1: it is not known then.
        found[heads[i], heads[j]] = float(_degrees(cosine)) if abs(cosine) <= 1 else float("nan")
    return found


def _together(spreads: Any) -> Spread:
    whole = Spread(0, 180, _BINS)
    for spread in spreads:
        whole.merge(spread)
    return whole
