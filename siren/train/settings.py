"""Every switch of a training run in one flat dataclass. Flags that the official trainer has keep their meaning."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..config import SirenConfig
from ..errors import ConfigError, InputError, SirenError
from ..manifest import parse_json
from ..packed import check_attention
from ..row_operations import check_kernels

PRECISIONS = ("fp32", "bf16")
CHECKPOINT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Settings that may change between a stop and a resume: they move work around and leave what is computed as it is.
_FREE = {
    *("data", "val_data", "out", "config", "init_from", "codec", "experts", "epochs", "max_steps"),
    *("val_every", "save_every", "keep", "log_every", "resume", "device", "workers", "compile"),
    *("checkpoint_activations", "fsdp", "attention", "kernels", "tensorboard", "wandb", "prompt_encoder"),
    *("checkpoint_dtype", "allow_random_codebooks", "progress", "accumulate"),
}


@dataclass(frozen=True)
class TrainSettings:
    """What to train, on what, how and where.

    What:
    data: a token set's folder, or an official JSONL of NPZ files. out: the run's folder.
    config: a preset's name, a JSON file or a SirenConfig; it may be left out with init_from.
    experts: "all" one after another; some, by their indices from 0; or "rank": one a process, its index from
    SLURM_ARRAY_TASK_ID, RANK or SLURM_PROCID, the first that is set.
    init_from: a checkpoint folder whose weights training starts from; without it they are random.
    codec: folder or name of the codec whose decode embeddings are frozen into every expert; it travels with the
    checkpoint. By default that of init_from. allow_random_codebooks: do without one (a test of the machinery).
    prompt_encoder: the name that the checkpoint gives its prompt encoder; by default that of the data or init_from.

    How long, in updates of the weights:
    epochs, or max_steps if it is given. val_every, save_every: 0 is only at the end. keep: states kept of each expert.

    How, per update:
    batch_size: clips a process computes at once. accumulate: batches a process adds up before it updates.
    learning_rate, betas, weight_decay (on parameters of two dimensions or more): AdamW. warmup_steps, min_lr_ratio:
    see schedule.py. grad_clip: largest norm of the gradient, 0 is none. precision: fp32, or bf16 autocast.
    crop_seconds: length of the random crops, 0 is as long as the config allows. prompt_dropout: share of prompts
    replaced by the null prompt, for guidance. bucket: updates whose clips are sorted by length together (1: not).
    seed: of weights, order, crops, captions and dropout.

    Validation is on val_data, or else on the val_fraction of the clips that their ids fall into.

    Where: device "auto" is a GPU if there is one; under torchrun every process takes its own. fsdp: shard weights and
    optimiser over the processes (FSDP2) instead of copying them (DDP). checkpoint_activations: compute blocks again in
    the backward pass instead of keeping what they computed. attention: "sdpa", "flash" (flash-attn) or "auto", flash
    where it runs. kernels: those of siren.kernels; None is on a GPU with Triton. compile: torch.compile of the plain
    forward, all batches padded to one shape; it goes without fsdp, checkpoint_activations, flash and kernels.
    workers: batches that are made ahead by a thread. log_every: updates between two looks at a GPU's losses; every
    update is logged. tensorboard: None is if installed.
    resume: go on from the run's last state; without it a folder that holds one is refused.
    checkpoint_dtype: float32 or bfloat16, the weights of the checkpoint that comes out.
    """

    data: str | Path
    out: str | Path
    config: str | Path | SirenConfig | None = None
    experts: str | Sequence[int] = "all"
    init_from: str | Path | None = None
    codec: str | Path | None = None
    allow_random_codebooks: bool = False
    prompt_encoder: str | Path | None = None
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 24
    accumulate: int = 1
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    grad_clip: float = 1.0
    precision: str = "fp32"
    crop_seconds: float = 6.0
    prompt_dropout: float = 0.0
    bucket: int = 1
    seed: int = 0
    val_data: str | Path | None = None
    val_fraction: float = 0.05
    val_every: int = 500
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    resume: bool = True
    device: str = "auto"
    compile: bool = False
    checkpoint_activations: bool = False
    fsdp: bool = False
    attention: str = "auto"
    kernels: bool | None = None
    workers: int = 4
    tensorboard: bool | None = None
    wandb: bool = False
    progress: bool = True
    checkpoint_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, low in (
            *(("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("warmup_steps", 0), ("bucket", 1), ("keep", 1)),
            *(("val_every", 0), ("save_every", 0), ("log_every", 1), ("workers", 0), ("seed", 0)),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 1 << 32:
                raise InputError(f"{name} must be a whole number from {low}, not {value!r}")
        if self.max_steps is not None and (type(self.max_steps) is not int or self.max_steps < 1):
            raise InputError(f"max_steps must be a whole number from 1, not {self.max_steps!r}")
        for name, least, most in (
            *(("learning_rate", 0, 10), ("weight_decay", 0, 10), ("min_lr_ratio", 0, 1), ("grad_clip", 0, 1e9)),
            *(("prompt_dropout", 0, 1), ("val_fraction", 0, 0.9), ("crop_seconds", 0, 3600)),
        ):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not least <= number <= most:
                raise InputError(f"{name} must be a number from {least} to {most}, not {number!r}")
        if not self.learning_rate:
            raise InputError("learning_rate must be above 0")
        if len(self.betas) != 2 or not all(isinstance(beta, float) and 0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be two numbers from 0 to below 1, not {self.betas!r}")
        for name, names in (
            ("precision", PRECISIONS),
            ("attention", ("auto", "sdpa", "flash")),
            ("checkpoint_dtype", tuple(CHECKPOINT_DTYPES)),
        ):
            if getattr(self, name) not in names:
                raise InputError(f"{name} must be one of {', '.join(names)}, not {getattr(self, name)!r}")

    def of_the_result(self) -> dict[str, Any]:
        """The settings that what is learned depends on, as JSON values."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in _FREE}
        return values | {"betas": list(self.betas)}

    def paths(self, device: torch.device) -> tuple[str, bool]:
        """`attention` and `kernels` of `Expert.loss_sums` on a device: "auto" and None are settled here.

        Raises InputError, BackendError or MissingDependencyError where what was asked for cannot run.
        """
        if self.compile:
            for name in ("fsdp", "checkpoint_activations", "kernels"):
                if getattr(self, name):
                    raise InputError(f"compile and {name} do not go together; leave one of them out")
            if self.attention == "flash":
                raise InputError("compile has no flash attention of its own; leave one of them out")
            return "sdpa", False
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        gpu = device.type == "cuda"
        attention, kernels = self.attention, self.kernels
        if attention == "auto":
            attention = "flash" if gpu and dtype == torch.bfloat16 and find_spec("flash_attn") else "sdpa"
        if kernels is None:
            kernels = gpu and find_spec("triton") is not None
        check_attention(attention, device, dtype)
        if kernels:
            check_kernels(device, dtype)
        return attention, kernels

    def crop_frames(self, frame_rate: float, longest: int) -> int:
        """Length of a crop in frames; at most `longest`, the config's max_seq_len."""
        frames = round(self.crop_seconds * frame_rate) or longest
        if frames > longest:
            raise InputError(
                f"crop_seconds {self.crop_seconds} are {frames} frames; the config's max_seq_len is {longest}"
            )
        return frames

    def chosen_experts(self, config: SirenConfig) -> list[int]:
        """The indices of the experts that this process trains."""
        count = config.num_experts
        chosen: Sequence[Any]
        if self.experts == "all":
            chosen = range(count)
        elif self.experts == "rank":
            names = [name for name in ("SLURM_ARRAY_TASK_ID", "RANK", "SLURM_PROCID") if os.environ.get(name)]
            if not names:
                raise InputError(
                    "experts 'rank' takes an index from SLURM_ARRAY_TASK_ID, RANK or SLURM_PROCID; none is set"
                )
            value = os.environ[names[0]]
            if not value.isdecimal() or int(value) >= count:
                raise InputError(f"{names[0]} is {value!r}; it must be an expert's index from 0 to {count - 1}")
            chosen = [int(value)]
        else:
            chosen = self.experts
        valid = not isinstance(chosen, str) and all(type(k) is int and 0 <= k < count for k in chosen)
        if not valid or not chosen or len(set(chosen)) < len(chosen):
            raise InputError(
                f"experts must be 'all', 'rank' or indices from 0 to {count - 1}, each once, not {chosen!r}"
            )
        return list(chosen)


def read_config(source: str | Path | SirenConfig) -> SirenConfig:
    """A SirenConfig from itself, a preset's name or a JSON file. Raises ConfigError."""
    if isinstance(source, SirenConfig):
        return source
    path = Path(source)
    if path.suffix.lower() != ".json":
        return SirenConfig.preset(str(source))
    try:
        return SirenConfig.from_dict(parse_json(path.read_bytes(), str(path)))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror or error}") from error
    except SirenError as error:
        raise ConfigError(f"{path}: {error}") from error


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise InputError naming every setting of the result that is not what it was when `where` was written."""
    changed = [
        f"{name} was {_show(before.get(name))} and is {_show(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise InputError(
            f"{where} was trained with other settings: {'; '.join(changed)}. Use the old ones, or another folder "
            "(init_from takes over weights)"
        )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
