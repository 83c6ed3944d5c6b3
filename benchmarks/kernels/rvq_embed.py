"""The summed code embeddings against PyTorch's gathers: see case.py."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator

import torch
from case import Case, compiled
from siren.kernels import rvq_embed as module
from siren.kernels.rvq_embed import rvq_embed, rvq_embed_reference
from torch import Tensor

# K experts, J codebooks, V codes, d channels, B sequences, T frames. The second is one sequence of 150 frames.
SIZES = [(6, 12, 1024, 1024, 48, 150), (6, 12, 1024, 1024, 1, 150)]
SMALL = [(2, 3, 5, 17, 2, 3)]


def cases(device: str, small: bool) -> Iterator[Case]:
    """Forward, and forward with backward into the tables."""
    for K, J, V, d, B, T in SMALL if small else SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            tables = torch.randn(K, J, V, d, device=device, dtype=dtype)
            codes = torch.randint(V, (B, J, T), device=device)
            d_sums = torch.randn(K, B, T, d, device=device)
            arguments = (tables, codes, d_sums)
            label = f"{K}x{J}x{V}x{d} {str(dtype).removeprefix('torch.')}, B*T={B * T}"
            rows = sum(len(codes[:, j].unique()) for j in range(J))  # of one expert's tables that are read
            moved = K * rows * d * dtype.itemsize + codes.nbytes + d_sums.nbytes
            check = functools.cache(functools.partial(gate, *arguments))  # both cases have this one
            for name, run in (("forward", forward), ("forward+backward", forward_backward)):
                yield Case(
                    stem="rvq_embed",
                    label=f"{name} {label}",
                    arms={
                        "eager": functools.partial(run, plain, *arguments),
                        "compile": functools.partial(run, compiled(plain), *arguments),
                        "triton": functools.partial(run, rvq_embed, *arguments),
                    },
                    gate=check,
                    # Backward: d_sums and codes are read, d_tables is written whole.
                    bytes=moved if run is forward else moved + d_sums.nbytes + codes.nbytes + tables.nbytes,
                    flops=K * B * T * J * d * (1 if run is forward else 2),
                )


def plain(tables: Tensor, codes: Tensor) -> Tensor:
    """The sums as PyTorch does them best, also in float64. unbind: the gradient of a slice of `tables` would be as
    large as `tables`, once for every codebook."""
    dtype = torch.promote_types(tables.dtype, torch.float32)
    gathered = (table[:, codes[:, j]].to(dtype) for j, table in enumerate(tables.unbind(1)))
    return functools.reduce(operator.add, gathered)


def forward(function: Callable[..., Tensor], tables: Tensor, codes: Tensor, d_sums: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG001
    return (function(tables, codes),)


def forward_backward(
    function: Callable[..., Tensor], tables: Tensor, codes: Tensor, d_sums: Tensor
) -> tuple[Tensor, ...]:
    tables = tables.detach().requires_grad_()
    sums = function(tables, codes)
    return (sums.detach(), *torch.autograd.grad(sums, tables, d_sums.to(sums.dtype)))


def gate(tables: Tensor, codes: Tensor, d_sums: Tensor) -> None:
    """The sums are the reference's bit for bit; the gradient's error against float64 is at most twice PyTorch's."""
    exact = forward_backward(plain, tables.double(), codes, d_sums)[1]
    sums, ours = forward_backward(rvq_embed, tables, codes, d_sums)
    expected, theirs = forward_backward(rvq_embed_reference, tables, codes, d_sums)
    assert torch.equal(sums, expected), "sums differ from the reference"
    error, allowed = ((value.double() - exact).norm() / exact.norm() for value in (ours, theirs))
    floor = torch.finfo(tables.dtype).eps
    assert error <= max(2 * allowed, floor), f"d_tables: error {error:.3g}, PyTorch's {allowed:.3g}"


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.bfloat16, torch.float32):
        for K, J, V, d, B, T in SIZES:
            tables = torch.empty(K, J, V, d, device="meta", dtype=dtype)
            codes = torch.empty(B, J, T, device="meta", dtype=torch.int64)
            d_sums = torch.empty(K, B, T, d, device="meta")
            label = f"{str(dtype).removeprefix('torch.')}, B*T={B * T}"
            yield f"forward {label}", functools.partial(module._forward, tables, codes)
            yield f"backward {label}", functools.partial(module._backward, d_sums, codes, V, dtype)
