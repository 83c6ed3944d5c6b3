"""What every kernel's benchmark module gives, and which modules there are.

benchmarks/kernels/<stem>.py has `cases(device, small) -> Iterator[Case]`, inputs to check and time, and
`launches() -> Iterator[tuple[str, Callable[[], object]]]`, every kernel launch at its real size on meta tensors,
which compile_report.py compiles.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

STEMS = (
    "rvq_embed",
    "residual_decoder",
    "linear_cross_entropy",
    "policy_loss",
    "sample_heads",
    "backbone_step",
    "residual_frame",
)
DECODE_STEMS = ("sample_heads", "backbone_step", "residual_frame")  # run once a frame: registers must not spill


@dataclass
class Case:
    """One operation on prepared inputs of one size."""

    stem: str
    label: str  # such as "forward 6x12x1024x1024 bf16, B*T=7200"
    # "eager", "compile", "triton": each runs the operation once. Of DECODE_STEMS there is no "compile", and on a GPU
    # "eager" is PyTorch's operations replayed as one CUDA graph, as ours are.
    arms: dict[str, Callable[[], object]]
    gate: Callable[[], None]  # raises AssertionError when the triton arm breaks the error rule
    bytes: int  # fewest bytes that must move: each input read once, each output written once
    flops: int  # fewest floating-point operations


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile with every size a constant; nothing is compiled before the first call."""

    @functools.cache
    def made() -> Callable[..., Any]:
        import torch  # here, as gpu_check.py imports this module where there may be no PyTorch

        return torch.compile(function, dynamic=False)

    return lambda *args, **kwargs: made()(*args, **kwargs)


def load(stem: str) -> ModuleType:
    """The benchmark module of a kernel, which is next to this file."""
    return importlib.import_module(stem)
