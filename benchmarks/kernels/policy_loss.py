"""The fused head and clipped policy objective against PyTorch's operations: see case.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from case import Case, compiled
from siren.kernels import linear_logprob
from siren.kernels.linear_logprob import linear_logprob_reference
from siren.kernels.policy_loss import policy_loss, policy_loss_reference
from torch import Tensor


def cases(device: str, small: bool) -> Iterator[Case]:
    """Forward, and forward with backward, for one head: N = B * T rows, ratios of 0.5 to 2."""
    N, d, V = (65, 33, 35) if small else (7200, 1024, 1024)
    for dtype in (torch.bfloat16, torch.float32) if small else (torch.bfloat16,):
        x = torch.randn(N, d, device=device, dtype=dtype)
        weight = (torch.randn(V, d, device=device) * d**-0.5).to(dtype)
        codes = torch.randint(V, (N,), device=device)
        exact, _ = linear_logprob_reference(x.double(), weight.double(), codes)
        # Away from the clip's bounds, where rounding alone would decide between two gradients.
        ratios = torch.tensor([0.5, 1.0, 2.0], device=device)[torch.arange(N, device=device) % 3]
        arguments = (x, weight, codes, (exact - ratios.log()).float(), torch.randn(N, device=device))
        d_loss = torch.rand(N, device=device) / N
        label = f"N={N}, d={d}, V={V}, {str(dtype).removeprefix('torch.')}"
        operands = (N + V) * d * dtype.itemsize
        forward_bytes, forward_flops = operands + N * (8 + 4 + 4 + 4 + 4), 2 * N * d * V
        check = functools.cache(functools.partial(gate, arguments, d_loss))  # both cases have this one
        for name, run, moved, flops in (
            ("forward", forward, forward_bytes, forward_flops),
            # d_loss is read and two gradients are written; two more products.
            ("forward+backward", forward_backward, forward_bytes + operands + N * 4, 3 * forward_flops),
        ):
            yield Case(
                stem="policy_loss",
                label=f"{name} {label}",
                arms={
                    "eager": functools.partial(run, plain, arguments, d_loss),
                    "compile": functools.partial(run, compiled(plain), arguments, d_loss),
                    "triton": functools.partial(run, policy_loss, arguments, d_loss),
                },
                gate=check,
                bytes=moved,
                flops=flops,
            )


def plain(x: Tensor, weight: Tensor, codes: Tensor, old_logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """What one would write in PyTorch; the reference also gives the logits' norms, which cost it a second pass."""
    logits = torch.nn.functional.linear(x, weight).float()
    logprobs = logits.log_softmax(-1).gather(-1, codes[:, None])[:, 0]
    ratio = (logprobs - old_logprobs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages), logprobs.detach()


def forward(
    function: Callable[..., tuple[Tensor, Tensor]],
    arguments: tuple[Tensor, ...],
    d_loss: Tensor,  # noqa: ARG001
) -> dict[str, Tensor]:
    loss, logprob = function(*arguments)
    return {"loss": loss, "logprob": logprob}


def forward_backward(
    function: Callable[..., tuple[Tensor, Tensor]], arguments: tuple[Tensor, ...], d_loss: Tensor
) -> dict[str, Tensor]:
    x, weight = (tensor.detach().requires_grad_() for tensor in arguments[:2])
    loss, logprob = function(x, weight, *arguments[2:])
    d_x, d_weight = torch.autograd.grad(loss, (x, weight), d_loss.to(loss.dtype))
    return {"loss": loss.detach(), "logprob": logprob, "d_x": d_x, "d_weight": d_weight}


def gate(arguments: tuple[Tensor, ...], d_loss: Tensor) -> None:
    """Losses, log-probabilities and gradients: the error against float64 is at most twice PyTorch's."""
    double = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments)
    exact = forward_backward(policy_loss_reference, double, d_loss)
    ours = forward_backward(policy_loss, arguments, d_loss)
    theirs = forward_backward(policy_loss_reference, arguments, d_loss)
    for name, values in exact.items():
        error, allowed = ((result[name].double() - values).abs().max().item() for result in (ours, theirs))
        assert error <= 2 * allowed, f"{name}: error {error:.3g}, PyTorch's {allowed:.3g}"


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """The forward kernel with the objective in it; the backward one is linear_cross_entropy's."""
    N, d, V = 7200, 1024, 1024
    vector = torch.empty(N, device="meta")
    codes, mask = vector.to(torch.int64), vector.to(torch.bool)
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = (torch.empty(rows, d, device="meta", dtype=dtype) for rows in (N, V))
        for masked in (None, mask):
            label = f"forward {str(dtype).removeprefix('torch.')}{'' if masked is None else ' masked'}"
            policy = (vector, vector, 0.8, 1.28)
            yield label, functools.partial(linear_logprob.forward, x, weight, codes, masked, 1.0, policy)
