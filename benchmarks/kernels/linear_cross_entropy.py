"""The fused head and cross-entropy against PyTorch's two operations: see case.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from case import Case, compiled
from siren.kernels import linear_logprob
from siren.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from torch import Tensor


def cases(device: str, small: bool) -> Iterator[Case]:
    """Forward, and forward with backward, for one head: N = B * T rows."""
    N, d, V = (65, 33, 35) if small else (7200, 1024, 1024)
    for dtype in (torch.bfloat16, torch.float32) if small else (torch.bfloat16,):
        x = torch.randn(N, d, device=device, dtype=dtype)
        weight = (torch.randn(V, d, device=device) * d**-0.5).to(dtype)
        arguments = (x, weight, torch.randint(V, (N,), device=device))
        d_loss = torch.rand(N, device=device) / N
        label = f"N={N}, d={d}, V={V}, {str(dtype).removeprefix('torch.')}"
        operands = (N + V) * d * dtype.itemsize
        forward_bytes, forward_flops = operands + N * (8 + 4), 2 * N * d * V
        check = functools.cache(functools.partial(gate, arguments, d_loss))  # both cases have this one
        for name, run, moved, flops in (
            ("forward", forward, forward_bytes, forward_flops),
            # d_loss is read and two gradients are written; two more products.
            ("forward+backward", forward_backward, forward_bytes + operands + N * 4, 3 * forward_flops),
        ):
            yield Case(
                stem="linear_cross_entropy",
                label=f"{name} {label}",
                arms={
                    "eager": functools.partial(run, linear_cross_entropy_reference, arguments, d_loss),
                    "compile": functools.partial(run, compiled(linear_cross_entropy_reference), arguments, d_loss),
                    "triton": functools.partial(run, linear_cross_entropy, arguments, d_loss),
                },
                gate=check,
                bytes=moved,
                flops=flops,
            )


def forward(
    function: Callable[..., Tensor],
    arguments: tuple[Tensor, ...],
    d_loss: Tensor,  # noqa: ARG001
) -> dict[str, Tensor]:
    return {"loss": function(*arguments)}


def forward_backward(
    function: Callable[..., Tensor], arguments: tuple[Tensor, ...], d_loss: Tensor
) -> dict[str, Tensor]:
    x, weight = (tensor.detach().requires_grad_() for tensor in arguments[:2])
    loss = function(x, weight, *arguments[2:])
    d_x, d_weight = torch.autograd.grad(loss, (x, weight), d_loss.to(loss.dtype))
    return {"loss": loss.detach(), "d_x": d_x, "d_weight": d_weight}


def gate(arguments: tuple[Tensor, ...], d_loss: Tensor) -> None:
    """Losses and gradients: the error against float64 is at most twice PyTorch's."""
    x, weight, targets = arguments
    exact = forward_backward(linear_cross_entropy_reference, (x.double(), weight.double(), targets), d_loss)
    ours = forward_backward(linear_cross_entropy, arguments, d_loss)
    theirs = forward_backward(linear_cross_entropy_reference, arguments, d_loss)
    for name, values in exact.items():
        error, allowed = ((result[name].double() - values).abs().max().item() for result in (ours, theirs))
        assert error <= 2 * allowed, f"{name}: error {error:.3g}, PyTorch's {allowed:.3g}"


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    N, d, V = 7200, 1024, 1024
    targets = torch.empty(N, device="meta", dtype=torch.int64)
    mask = torch.empty(N, device="meta", dtype=torch.bool)
    norms, d_logprobs = torch.empty(2, N, device="meta"), torch.empty(N, device="meta")
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = (torch.empty(rows, d, device="meta", dtype=dtype) for rows in (N, V))
        for masked in (None, mask):
            label = f"{str(dtype).removeprefix('torch.')}{'' if masked is None else ' masked'}"
            head = (x, weight, targets, masked)
            yield f"forward {label}", functools.partial(linear_logprob.forward, *head, 1.0)
            yield f"backward {label}", functools.partial(linear_logprob.backward, *head, norms, d_logprobs, 1.0)
