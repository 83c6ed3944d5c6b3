"""The activation of a SwiGLU, from one matrix product's packed result.

    out = silu(gate) * value

gate_value  [..., 2h]  float32 or bfloat16, contiguous; the first h columns are the gate, the others the value
out         [..., h]

Computed in float32 and rounded once. The backward pass recomputes the sigmoid from gate_value and packs its gradient
in the same way. Left out: the two matrix products around it (cuBLAS) and mixed types as under autocast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import library

from .interpreter import round_to

BLOCK = 1024


def swiglu_reference(gate_value: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch; the contract."""
    gate, value = gate_value.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value


@triton.jit
def _swiglu_kernel(gate_value, out, h, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < h
    gate = tl.load(gate_value + row * 2 * h + c, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(gate_value + row * 2 * h + h + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * h + c, round_to(gate * tl.sigmoid(gate) * value, out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(d_out, gate_value, d_gate_value, h, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < h
    at = row * 2 * h + c
    gate = tl.load(gate_value + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(gate_value + at + h, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(d_out + row * h + c, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = grad * value * sigmoid * (1 + gate * (1 - sigmoid))
    d_value = grad * gate * sigmoid
    tl.store(d_gate_value + at, round_to(d_gate, d_gate_value.dtype.element_ty), mask=inside)
    tl.store(d_gate_value + at + h, round_to(d_value, d_gate_value.dtype.element_ty), mask=inside)


def _forward(gate_value: torch.Tensor) -> torch.Tensor:
    """Launch the forward kernel; the argument has been checked."""
    h = gate_value.shape[-1] // 2
    out = gate_value.new_empty(*gate_value.shape[:-1], h)
    if out.numel():
        block = min(triton.next_power_of_2(h), BLOCK)
        _swiglu_kernel[(out.numel() // h, triton.cdiv(h, block))](gate_value, out, h, BLOCK=block)
    return out


def _backward(d_out: torch.Tensor, gate_value: torch.Tensor) -> torch.Tensor:
    """Launch the backward kernel: the gradient of gate_value."""
    h = gate_value.shape[-1] // 2
    d_gate_value = torch.empty_like(gate_value)
    if d_gate_value.numel():
        block = min(triton.next_power_of_2(h), BLOCK)
        grid = (d_out.numel() // h, triton.cdiv(h, block))
        _swiglu_backward_kernel[grid](d_out.contiguous(), gate_value, d_gate_value, h, BLOCK=block)
    return d_gate_value


@library.custom_op("siren::swiglu", mutates_args=())
def _swiglu(gate_value: torch.Tensor) -> torch.Tensor:
    _check(gate_value)
    return _forward(gate_value)


@_swiglu.register_fake
def _(gate_value: torch.Tensor) -> torch.Tensor:
    _check(gate_value)
    return gate_value.new_empty(*gate_value.shape[:-1], gate_value.shape[-1] // 2)


@library.custom_op("siren::swiglu_backward", mutates_args=())
def _swiglu_backward(d_out: torch.Tensor, gate_value: torch.Tensor) -> torch.Tensor:
    return _backward(d_out, gate_value)


@_swiglu_backward.register_fake
def _(d_out: torch.Tensor, gate_value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate_value)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, d_out: torch.Tensor) -> torch.Tensor:
    return _swiglu_backward(d_out, *ctx.saved_tensors)


_swiglu.register_autograd(_differentiate, setup_context=_setup_context)


def swiglu(gate_value: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value, [..., h], of gate_value [..., 2h] = [gate | value]; differentiable once.

    Raises ValueError or TypeError where gate_value is of another shape, type or layout.
    """
    return _swiglu(gate_value)


def _check(gate_value: torch.Tensor) -> None:
    if gate_value.ndim < 2 or gate_value.shape[-1] % 2:
        raise ValueError(f"gate_value must be [..., 2h], not {list(gate_value.shape)}")
    if gate_value.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"gate_value must be float32 or bfloat16, not {gate_value.dtype}")
    if not gate_value.is_contiguous():
        raise ValueError(f"gate_value must be contiguous, not strides {gate_value.stride()}")
