"""RMSNorm of a sum: the residual stream takes up what was computed beside it, and its norm goes on.

    total  = x (+ delta) (+ positions[s])
    normed = total / sqrt(mean(total^2) + eps) * weight

x, delta, total, normed  [N, S, d]      float32 or bfloat16, contiguous
positions                [>= S, d]      constant: no gradient
weight                   [d]

The sum is formed in float32 and rounded once; the norm is that of the rounded total, which is all that the backward
pass keeps. One program a row forward. Backward, a program takes a run of rows and adds up their part of the weight's
gradient in float32; the parts are summed by torch. The split depends on the number of rows alone, so two runs are
equal bit for bit. Left out: a plain RMSNorm (torch has one), mixed types as under autocast, and rows longer than 8192,
which do not fit a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import library

from .interpreter import round_to

MAX_DIM = 8192
PARTS = 1024  # most programs of the backward kernel, each with its own sum for the weight's gradient


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    delta: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch -> (total, normed); the contract."""
    if delta is not None:
        x = x + delta
    if positions is not None:
        x = x + positions[: x.shape[1]]
    return x, torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


@triton.jit
def _rms_norm_kernel(x, delta, positions, weight, total, normed, S, d, eps, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_D)
    in_d = c < d
    value = tl.load(x + row * d + c, mask=in_d, other=0.0).to(tl.float32)
    if delta is not None:
        value += tl.load(delta + row * d + c, mask=in_d, other=0.0).to(tl.float32)
    if positions is not None:
        value += tl.load(positions + (row % S) * d + c, mask=in_d, other=0.0).to(tl.float32)
    rounded = round_to(value, total.dtype.element_ty)
    tl.store(total + row * d + c, rounded, mask=in_d)
    value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / d + eps)
    w = tl.load(weight + c, mask=in_d, other=0.0).to(tl.float32)
    tl.store(normed + row * d + c, round_to(value * scale * w, normed.dtype.element_ty), mask=in_d)


@triton.jit
def _rms_norm_backward_kernel(
    d_total,
    d_normed,
    total,
    weight,
    d_x,
    parts,
    rows,
    rows_each,
    d,
    eps,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * rows_each
    end = tl.minimum(row + rows_each, rows)
    c = tl.arange(0, BLOCK_D)
    in_d = c < d
    w = tl.load(weight + c, mask=in_d, other=0.0).to(tl.float32)
    d_w = tl.zeros((BLOCK_D,), dtype=tl.float32)
    while row < end:  # not range: the interpreter of Triton 3.6 takes no bounds that are known at run time only
        at = row * d + c
        value = tl.load(total + at, mask=in_d, other=0.0).to(tl.float32)
        d_out = tl.load(d_normed + at, mask=in_d, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=0) / d + eps)
        unit = value * scale
        d_w += d_out * unit
        d_unit = d_out * w
        grad = scale * (d_unit - unit * (tl.sum(d_unit * unit, axis=0) / d))
        if d_total is not None:
            grad += tl.load(d_total + at, mask=in_d, other=0.0).to(tl.float32)
        tl.store(d_x + at, round_to(grad, d_x.dtype.element_ty), mask=in_d)
        row += 1
    tl.store(parts + tl.program_id(0).to(tl.int64) * d + c, d_w, mask=in_d)


def _block(d: int) -> dict[str, int]:
    block = triton.next_power_of_2(d)
    return {"BLOCK_D": block, "num_warps": min(max(block // 256, 1), 16)}


def _forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, delta: torch.Tensor | None, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel; the arguments have been checked."""
    N, S, d = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        _rms_norm_kernel[(N * S,)](x, delta, positions, weight, total, normed, S, d, eps, **_block(d))
    return total, normed


def _backward(
    d_total: torch.Tensor | None, d_normed: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward kernel -> gradients of x (which is also delta's) and of the weight."""
    N, S, d = total.shape
    rows = N * S
    d_x = torch.empty_like(total)
    if d_x.numel() == 0:
        return d_x, torch.zeros_like(weight)
    rows_each = triton.cdiv(rows, PARTS)
    count = triton.cdiv(rows, rows_each)
    parts = torch.empty(count, d, dtype=torch.float32, device=total.device)
    d_total = None if d_total is None else d_total.contiguous()
    _rms_norm_backward_kernel[(count,)](
        d_total, d_normed.contiguous(), total, weight, d_x, parts, rows, rows_each, d, eps, **_block(d)
    )
    return d_x, parts.sum(dim=0).to(weight.dtype)


@library.custom_op("siren::rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, delta: torch.Tensor | None, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, weight, eps, delta, positions)
    return _forward(x, weight, eps, delta, positions)


@_rms_norm.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, eps: float, delta: torch.Tensor | None, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, weight, eps, delta, positions)
    return torch.empty_like(x), torch.empty_like(x)


@library.custom_op("siren::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    d_total: torch.Tensor | None, d_normed: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward(d_total, d_normed, total, weight, eps)


@_rms_norm_backward.register_fake
def _(
    d_total: torch.Tensor | None, d_normed: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(total), torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    _, weight, ctx.eps, delta, _ = inputs
    ctx.save_for_backward(output[0], weight)
    ctx.has_delta = delta is not None
    ctx.set_materialize_grads(False)  # of the last norm the total is not used: no zeros for its gradient


def _differentiate(ctx, d_total: torch.Tensor | None, d_normed: torch.Tensor | None):
    total, weight = ctx.saved_tensors
    if d_normed is None:
        d_x, d_weight = d_total, None
    else:
        d_x, d_weight = _rms_norm_backward(d_total, d_normed, total, weight, ctx.eps)
    return d_x, d_weight, None, d_x if ctx.has_delta else None, None


_rms_norm.register_autograd(_differentiate, setup_context=_setup_context)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    delta: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total, normed), both [N, S, d], of x [N, S, d] plus delta [N, S, d] and positions [>= S, d], or one of them.

    Differentiable once in x, delta and weight. Wrong arguments raise ValueError or TypeError naming the argument.
    """
    if positions is not None and positions.requires_grad:
        raise ValueError("positions must not require a gradient: this operation gives none")
    return _rms_norm(x, weight, eps, delta, positions)


def _check(
    x: torch.Tensor, weight: torch.Tensor, eps: float, delta: torch.Tensor | None, positions: torch.Tensor | None
) -> None:
    if x.ndim != 3 or x.shape[2] > MAX_DIM:
        raise ValueError(f"x must be [N, S, d] with d at most {MAX_DIM}, not {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"x must be float32 or bfloat16, not {x.dtype}")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, not {eps}")
    if delta is None and positions is None:
        raise ValueError("delta or positions must be given; torch.nn.functional.rms_norm needs neither")
    _, S, d = x.shape
    shapes = {"x": (x, x.shape), "weight": (weight, (d,)), "delta": (delta, x.shape)}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
    if positions is not None and (positions.ndim != 2 or positions.shape[0] < S or positions.shape[1] != d):
        raise ValueError(f"positions must be [at least {S}, {d}], not {list(positions.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("delta", delta), ("positions", positions)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} as x is, not {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, not on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not strides {tensor.stride()}")
