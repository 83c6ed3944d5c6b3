"""The residual decoder and its three kernels against PyTorch's: see case.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from case import Case, compiled
from siren.kernels import residual_decoder as decoder
from siren.kernels import rms_norm, short_attention, swiglu
from torch import Tensor

EPS = 1e-5


class Sizes(NamedTuple):
    frames: int  # B * T
    positions: int  # m + 1
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    blocks: int


SIZES = [Sizes(7200, 3, 1024, 16, 16, 2816, 2), Sizes(7200, 13, 1024, 16, 16, 2816, 2)]
SMALL = [Sizes(5, 3, 12, 4, 2, 20, 2)]


class Subject(NamedTuple):
    """What is compared, on inputs that all take a gradient. ours and theirs: (*inputs) -> output."""

    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    forward_flops: int
    backward_flops: int


def cases(device: str, small: bool) -> Iterator[Case]:
    """Forward, and forward with backward, of the whole decoder and of each kernel. At their real size float32 and the
    second of SIZES are only of the whole decoder with backward, which holds all kernels: for want of time."""
    for sizes in SMALL if small else SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            for subject in subjects(sizes, device, dtype):
                few = not small and (sizes != SIZES[0] or dtype == torch.float32)
                if few and subject.name != "decoder":
                    continue
                with torch.no_grad():
                    output = subject.theirs(*subject.inputs)
                d_output = torch.randn_like(output)
                moved = sum(tensor.nbytes for tensor in subject.inputs) + output.nbytes
                fast = compiled(subject.theirs)
                check = functools.cache(functools.partial(gate, subject, d_output))  # both cases have this one
                label = (
                    f"{subject.name} N={sizes.frames}, S={sizes.positions}, d={sizes.dim}, "
                    f"{str(dtype).removeprefix('torch.')}"
                )
                for name, run in (("forward", forward), ("forward+backward", forward_backward)):
                    both = run is forward_backward
                    if few and not both:
                        continue
                    yield Case(
                        stem="residual_decoder",
                        label=f"{name} {label}",
                        arms={
                            "eager": functools.partial(run, subject.theirs, subject.inputs, d_output),
                            "compile": functools.partial(run, fast, subject.inputs, d_output),
                            "triton": functools.partial(run, subject.ours, subject.inputs, d_output),
                        },
                        gate=check,
                        # Backward: inputs and d_output are read, the inputs' gradients are written.
                        bytes=moved if not both else 3 * moved - output.nbytes,
                        flops=subject.forward_flops + (subject.backward_flops if both else 0),
                    )


def subjects(sizes: Sizes, device: str, dtype: torch.dtype) -> list[Subject]:
    N, S, d, H, KV, h, count = sizes
    head_dim, rows = d // H, N * S

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    def norm_weight() -> Tensor:
        return (1 + 0.1 * torch.randn(d, device=device)).to(dtype).requires_grad_()

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        return decoder.residual_decoder(x, blocks(weights), weights[-1], positions, H, KV, EPS)

    def theirs(x: Tensor, *weights: Tensor) -> Tensor:
        fitting = positions.to(x.dtype)
        return decoder.residual_decoder_reference(x, blocks(weights), weights[-1], fitting, H, KV, EPS)

    positions = random(S, d).detach()
    width = (H + 2 * KV) * head_dim
    weights: list[Tensor] = []
    for _ in range(count):
        weights += [norm_weight(), random(width, d, scale=d**-0.5), random(d, d, scale=d**-0.5)]
        weights += [norm_weight(), random(2 * h, d, scale=d**-0.5), random(d, h, scale=h**-0.5)]
    attention = N * H * head_dim * S * (S + 1) // 2  # multiply-adds of q @ k.T, as many of p @ v
    products = 2 * rows * d * (width + d + 3 * h) + 4 * attention
    x, delta = random(N, S, d), random(N, S, d)
    return [
        Subject("decoder", ours, theirs, (x, *weights, norm_weight()), count * products, 2 * count * products),
        Subject(
            "rms_norm",
            lambda x, weight, delta: rms_norm.rms_norm(x, weight, EPS, delta)[1],
            lambda x, weight, delta: rms_norm.rms_norm_reference(x, weight, EPS, delta)[1],
            (x, norm_weight(), delta),
            5 * rows * d,
            10 * rows * d,
        ),
        Subject(
            "short_attention",
            lambda qkv: short_attention.short_attention(qkv, H, KV),
            lambda qkv: short_attention.short_attention_reference(qkv, H, KV),
            (random(N, S, width),),
            4 * attention,
            10 * attention,  # the scores again, and four products
        ),
        Subject("swiglu", swiglu.swiglu, swiglu.swiglu_reference, (random(N, S, 2 * h),), 5 * rows * h, 12 * rows * h),
    ]


def blocks(weights: tuple[Tensor, ...]) -> list[decoder.Block]:
    """All weights but the last, six a block."""
    return [decoder.Block(*weights[i : i + 6]) for i in range(0, len(weights) - 1, 6)]


def forward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], d_output: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG001
    with torch.no_grad():
        return (function(*inputs),)


def forward_backward(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], d_output: Tensor
) -> tuple[Tensor, ...]:
    output = function(*inputs)
    return (output.detach(), *torch.autograd.grad(output, inputs, d_output))


def gate(subject: Subject, d_output: Tensor) -> None:
    """Output and gradients: the error against float64 is at most twice PyTorch's."""
    double = tuple(tensor.detach().double().requires_grad_() for tensor in subject.inputs)
    exact = forward_backward(subject.theirs, double, d_output.double())
    ours = forward_backward(subject.ours, subject.inputs, d_output)
    theirs = forward_backward(subject.theirs, subject.inputs, d_output)
    floor = torch.finfo(d_output.dtype).eps
    for index, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        error, allowed = ((value.double() - c).norm() / c.norm() for value in (a, b))
        name = f"gradient of input {index - 1}" if index else "output"
        assert error <= max(2 * allowed, floor), f"{subject.name}, {name}: {error:.3g}, PyTorch's {allowed:.3g}"


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.bfloat16, torch.float32):
        for N, S, d, H, KV, h, _ in SIZES:
            make = functools.partial(torch.empty, device="meta", dtype=dtype)
            x, weight, positions, hidden = make(N, S, d), make(d), make(S, d), make(N, S, h)
            qkv, gate_value = make(N, S, (H + 2 * KV) * (d // H)), make(N, S, 2 * h)
            label = f"S={S} {str(dtype).removeprefix('torch.')}"
            for delta, table in ((None, positions), (x, positions), (x, None)):
                added = " + ".join(["x"] + ["delta"] * (delta is not None) + ["positions"] * (table is not None))
                yield f"norm of {added}, {label}", functools.partial(rms_norm._forward, x, weight, EPS, delta, table)
            for d_total in (None, x):
                name = "norm backward" if d_total is not None else "last norm backward"
                yield f"{name}, {label}", functools.partial(rms_norm._backward, d_total, x, x, weight, EPS)
            yield f"attention, {label}", functools.partial(short_attention._forward, qkv, H, KV)
            yield f"attention backward, {label}", functools.partial(short_attention._backward, x, qkv, H, KV)
            yield f"swiglu, {label}", functools.partial(swiglu._forward, gate_value)
            yield f"swiglu backward, {label}", functools.partial(swiglu._backward, hidden, gate_value)
