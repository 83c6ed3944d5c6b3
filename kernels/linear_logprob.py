"""Log-probabilities of given codes under a linear head, without ever holding the logits: training's and RL's last step.

    logprob[n] = log_softmax(x[n] @ weight.T / temperature)[targets[n]]

x       [N, d]  bfloat16, float16 or float32: one row a code, any strides
weight  [V, d]  the head, x's dtype, any strides
targets [N]     int32 or int64, 0..V-1
mask    [N]     bool or None: False leaves a row out. It may then hold anything, even NaN or a target out of range; its
                log-probability is 0 and nothing of it reaches a gradient
logprob [N]     float32; lse [N] float32 is the logarithm of the softmax's denominator

Forward: a program takes one tile of the logits, [BLOCK_N, BLOCK_V], and leaves of each row its largest logit, the sum
of its exponentials and the target's logit: 3 * N * cdiv(V, BLOCK_V) floats of scratch in place of N * V logits. A
second, small kernel puts the tiles of a row together, always in the same order. Backward: the d_logits of at most CHUNK
rows at a time are computed from the logits made again, rounded to x's dtype as PyTorch would, and go through two of
PyTorch's matrix products. Without atomics two runs agree bit for bit. `policy_loss` uses the same kernels: its loss is
an epilogue of the second one.

float32 products are exact float32, without tensor cores: with float32 operands expect this to save memory, not time.
Left out: skipping tiles in which every row is masked, and one kernel for d_logits and its products.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from .interpreter import dot, round_to
from .linear import all_registers

CHUNK = 8192  # rows whose d_logits exist at a time in the backward pass
_MIN_TEMPERATURE = 1e-6  # the sampler's: below, logits / temperature could overflow float32
_LOWEST = tl.constexpr(-3.4028235e38)  # the least that a maximum is: minus infinity would make NaN of infinite logits
# Arguments on whose value or alignment no speed depends: a kernel is not compiled again for another number of rows.
_ROWS = ["N", "targets", "mask", "partials", "norms", "logprobs", "old_logprobs", "advantages", "losses", "slopes"]


def linear_logprob_reference(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, logits and all; the contract. In float64 it serves as the exact answer."""
    if mask is not None:
        x, targets = x.masked_fill(~mask[:, None], 0), targets.masked_fill(~mask, 0)
    logits = torch.nn.functional.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (temperature or 1)
    logprob = torch.log_softmax(logits, dim=-1).gather(-1, targets.long()[:, None])[:, 0]
    if mask is not None:
        logprob = logprob.masked_fill(~mask, 0)
    return logprob, torch.logsumexp(logits, dim=-1).detach()


@triton.jit
def _rows(block, mask, N, BLOCK_N: tl.constexpr):
    """The rows of a block, which of them exist, and which of these count."""
    n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    live = in_n
    if mask is not None:
        live &= tl.load(mask + n, mask=in_n, other=False)
    return n, in_n, live


@triton.jit
def _target(targets, n, live, V: tl.constexpr):
    """int32 targets, -1 for one out of range."""
    target = tl.load(targets + n, mask=live, other=0)
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)


@triton.jit
def _logits(
    x,
    weight,
    n,
    live,
    v,
    x_stride_n,
    x_stride_d,
    weight_stride_v,
    weight_stride_d,
    temperature,
    V: tl.constexpr,
    d: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """float32 x[n] @ weight[v].T / temperature; 0 in rows that are not live, minus infinity from column V."""
    in_v = v < V
    x_row, weight_row = x + n * x_stride_n, weight + v.to(tl.int64) * weight_stride_v
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        c = (start + tl.arange(0, BLOCK_D)).to(tl.int64)  # d strides can pass 2^31 in a transposed x
        in_d = c < d
        a = tl.load(x_row[:, None] + c[None, :] * x_stride_d, mask=live[:, None] & in_d[None, :], other=0.0)
        b = tl.load(weight_row[None, :] + c[:, None] * weight_stride_d, mask=in_d[:, None] & in_v[None, :], other=0.0)
        acc = dot(a, b, acc)
    return tl.where(in_v[None, :], acc / temperature, float("-inf"))


@triton.jit(do_not_specialize=_ROWS)
def _tile_kernel(
    x,
    weight,
    targets,
    mask,  # or None
    partials,  # [3, cdiv(V, BLOCK_V), N]
    N,
    x_stride_n,
    x_stride_d,
    weight_stride_v,
    weight_stride_d,
    temperature,
    V: tl.constexpr,
    d: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of a row in a tile: the largest logit, the sum of exp(logit - largest), the target's logit or minus infinity."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    tile = tl.program_id(0) % TILES  # programs that follow one another share rows of x
    n, in_n, live = _rows(tl.program_id(0) // TILES, mask, N, BLOCK_N)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = _logits(
        x, weight, n, live, v, x_stride_n, x_stride_d, weight_stride_v, weight_stride_d, temperature,
        V, d, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    is_target = v[None, :] == _target(targets, n, live, V)[:, None]
    chosen = tl.max(tl.where(is_target, logits, float("-inf")), axis=1)
    largest = tl.maximum(tl.max(logits, axis=1), _LOWEST)
    total = tl.sum(tl.exp(logits - largest[:, None]), axis=1)
    partial = partials + tile.to(tl.int64) * N + n
    plane = TILES * N.to(tl.int64)
    tl.store(partial, largest, mask=in_n)
    tl.store(partial + plane, total, mask=in_n)
    tl.store(partial + 2 * plane, chosen, mask=in_n)


@triton.jit(do_not_specialize=_ROWS)
def _combine_kernel(
    targets,
    mask,  # or None
    partials,  # [3, TILES, N]
    logprobs,
    norms,  # [2, N]
    old_logprobs,  # these four are policy_loss's, or None
    advantages,
    losses,
    slopes,
    N,
    low,  # the ratio's bounds
    high,
    V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n, in_n, live = _rows(tl.program_id(0), mask, N, BLOCK_N)
    largest = tl.full((BLOCK_N,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)  # sum of exp(logit - largest)
    chosen = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    partial = partials + n
    plane = TILES * N.to(tl.int64)
    for _ in range(TILES):
        tile_largest = tl.load(partial, mask=in_n, other=0.0)
        tile_total = tl.load(partial + plane, mask=in_n, other=1.0)
        chosen = tl.maximum(chosen, tl.load(partial + 2 * plane, mask=in_n, other=0.0))
        raised = tl.maximum(largest, tile_largest)
        total = total * tl.exp(largest - raised) + tile_total * tl.exp(tile_largest - raised)
        largest = raised
        partial += N

    # Kept apart in `norms`: at large logits their sum, the log-sum-exp, loses digits that the gradient needs.
    spread = tl.where(_target(targets, n, live, V) >= 0, tl.log(total), float("nan"))
    logprob = tl.where(live, (chosen - largest) - spread, 0.0)
    tl.store(logprobs + n, logprob, mask=in_n)
    tl.store(norms + n, largest, mask=in_n)
    tl.store(norms + N + n, spread, mask=in_n)

    if advantages is not None:
        advantage = tl.load(advantages + n, mask=live, other=0.0)
        ratio = tl.exp(logprob - tl.load(old_logprobs + n, mask=live, other=0.0))
        clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))  # a NaN stays
        free, bound = ratio * advantage, clipped * advantage
        # As autograd of torch.clamp (passes at its bounds) and torch.min (halves at a tie).
        share = tl.where(free < bound, 1.0, tl.where(free == bound, tl.where(ratio == clipped, 1.0, 0.5), 0.0))
        tl.store(losses + n, -tl.where(free < bound, free, bound), mask=in_n)
        tl.store(slopes + n, tl.where(free > bound, 0.0, -share * free), mask=in_n)  # 0 too where free is infinite


@triton.jit(do_not_specialize=[*_ROWS, "largest", "spread", "d_logprobs"])
def _d_logits_kernel(
    x,
    weight,
    targets,
    mask,  # or None
    largest,
    spread,
    d_logprobs,
    d_logits,  # [N, V]
    N,
    x_stride_n,
    x_stride_d,
    weight_stride_v,
    weight_stride_d,
    temperature,
    V: tl.constexpr,
    d: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_logits = d_logprob * (one-hot of the target - softmax) / temperature, d_logprob taken for 0 in masked rows."""
    n, in_n, live = _rows(tl.program_id(1), mask, N, BLOCK_N)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = _logits(
        x, weight, n, live, v, x_stride_n, x_stride_d, weight_stride_v, weight_stride_d, temperature,
        V, d, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    target = _target(targets, n, live, V)  # one out of range has a NaN in spread
    shift, scale = tl.load(largest + n, mask=live, other=0.0), tl.load(spread + n, mask=live, other=0.0)
    p = tl.exp((logits - shift[:, None]) - scale[:, None])
    one_hot = tl.where(v[None, :] == target[:, None], 1.0, 0.0)
    gradient = tl.load(d_logprobs + n, mask=live, other=0.0)[:, None] * (one_hot - p) / temperature
    d_logit = round_to(gradient, d_logits.dtype.element_ty)
    tl.store(d_logits + n[:, None] * V + v[None, :], d_logit, mask=in_n[:, None] & (v < V)[None, :])


def _settings(V: int, d: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and warps. float32 products take no tensor cores, so its tiles are what registers hold; the others'
    take at most 96 KiB of shared memory, which every GPU from sm_80 on has."""
    exact = dtype == torch.float32
    rows, columns, depth, warps = (64, 64, 16, 4) if exact else (128, 128, 64, 8)
    return {
        "BLOCK_N": rows,
        "BLOCK_V": max(16, min(columns, triton.next_power_of_2(V))),
        "BLOCK_D": max(16, min(depth, triton.next_power_of_2(d))),
        "num_warps": warps,
        "num_stages": 3,
        **(all_registers() if exact else {}),
    }


def forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    policy: tuple[Tensor, Tensor, float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Launch: logprob [N], norms [2, N], and for policy_loss the losses [N] and their slopes in logprob [N], float32.

    policy: old log-probabilities [N], advantages [N], the ratio's lower and upper bound. norms holds the largest logit
    and the logarithm of the sum of exp(logit - largest).
    """
    (N, d), V = x.shape, weight.shape[0]
    logprobs = x.new_empty(N, dtype=torch.float32)
    norms = x.new_empty((2, N), dtype=torch.float32)
    old_logprobs = advantages = losses = slopes = None
    low = high = 1.0
    if policy is not None:
        old_logprobs, advantages, low, high = policy[0].contiguous(), policy[1].contiguous(), policy[2], policy[3]
        losses, slopes = torch.empty_like(logprobs), torch.empty_like(logprobs)
    if N:
        settings = _settings(V, d, x.dtype)
        BLOCK_N = settings["BLOCK_N"]
        blocks, tiles = triton.cdiv(N, BLOCK_N), triton.cdiv(V, settings["BLOCK_V"])
        targets, mask = targets.contiguous(), None if mask is None else mask.contiguous()
        partials = x.new_empty((3, tiles, N), dtype=torch.float32)
        _tile_kernel[(blocks * tiles,)](
            x, weight, targets, mask, partials, N, *x.stride(), *weight.stride(), temperature or 1.0,
            V=V, d=d, **settings,
        )  # fmt: skip
        _combine_kernel[(blocks,)](
            targets, mask, partials, logprobs, norms, old_logprobs, advantages, losses, slopes, N, low, high,
            V=V, TILES=tiles, BLOCK_N=BLOCK_N,
        )  # fmt: skip
    return logprobs, norms, losses, slopes


def backward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    norms: Tensor,
    d_logprobs: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Launch: d_x [N, d] and d_weight [V, d] in x's dtype, from what `forward` left in norms."""
    (N, d), V = x.shape, weight.shape[0]
    settings = _settings(V, d, x.dtype)
    d_x = x.new_empty(N, d)
    d_weight = weight.new_zeros((V, d), dtype=torch.float32)
    d_logits = x.new_empty(min(N, CHUNK), V)
    targets, d_logprobs = targets.contiguous(), d_logprobs.contiguous()
    for start in range(0, N, CHUNK):
        rows = slice(start, min(start + CHUNK, N))
        count = rows.stop - start
        x_rows, mask_rows = x[rows], None if mask is None else mask[rows].contiguous()
        grid = (triton.cdiv(V, settings["BLOCK_V"]), triton.cdiv(count, settings["BLOCK_N"]))
        _d_logits_kernel[grid](
            x_rows, weight, targets[rows], mask_rows, norms[0, rows], norms[1, rows], d_logprobs[rows], d_logits,
            count, *x.stride(), *weight.stride(), temperature or 1.0, V=V, d=d, **settings,
        )  # fmt: skip
        if mask_rows is not None:
            x_rows = x_rows.masked_fill(~mask_rows[:, None], 0)  # 0 * NaN would be NaN
        torch.mm(d_logits[:count], weight, out=d_x[rows])
        d_weight += d_logits[:count].T @ x_rows
    return d_x, d_weight.to(weight.dtype)


@library.custom_op("siren::linear_logprob", mutates_args=())
def forward_op(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    check_rows(x, weight, targets, mask, "targets")
    check_values(weight, targets, mask, temperature, "targets")
    logprobs, norms, _, _ = forward(x, weight, targets, mask, temperature)
    return logprobs, norms


@forward_op.register_fake
def _fake(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    check_rows(x, weight, targets, mask, "targets")
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty((2, x.shape[0]), dtype=torch.float32)


@library.custom_op("siren::linear_logprob_backward", mutates_args=())
def backward_op(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    norms: Tensor,
    d_logprobs: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """`backward` as an operation: its arguments were checked by the forward one."""
    return backward(x, weight, targets, mask, norms, d_logprobs, temperature)


@backward_op.register_fake
def _backward_fake(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    norms: Tensor,
    d_logprobs: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, targets, mask, ctx.temperature = inputs
    norms = output[1]
    ctx.mark_non_differentiable(norms)
    ctx.save_for_backward(x, weight, targets, mask, norms)


def _autograd(ctx, d_logprobs: Tensor, _d_norms: Tensor | None):
    d_x, d_weight = backward_op(*ctx.saved_tensors, d_logprobs, ctx.temperature)
    return d_x, d_weight, None, None, None


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def linear_logprob(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability and log-sum-exp, float32 [N] each, of targets [N] under softmax(x @ weight.T / temperature).

    x [N, d], weight [V, d], mask [N] bool. What the sampler reports: temperature 0 means the logits themselves. The
    log-probability is differentiable once, in x and weight; the log-sum-exp carries no gradient and means nothing in
    masked rows. float32 products take no tensor cores. Scratch is 3 * N * cdiv(V, BLOCK_V) floats,
    not N * V. A target out of range is a ValueError on CPU tensors; on a GPU, where looking at the targets would make
    the host wait, the row's values and all gradients that it reaches are NaN. An unmasked NaN in x spreads even where
    the incoming gradient is 0. Wrong arguments raise ValueError or TypeError naming the argument and what it should be.
    """
    logprobs, norms = forward_op(x, weight, targets, mask, temperature)
    return logprobs, norms.sum(0)


def check_rows(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, name: str) -> None:
    """Check shapes, dtypes and devices; `name` is what the caller calls its targets."""
    if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x must be bfloat16, float16 or float32 [N, d], not {x.dtype} {list(x.shape)}")
    N, d = x.shape
    if weight.ndim != 2 or weight.shape[1] != d or 0 in weight.shape:
        raise ValueError(
            f"weight must be [V, d={d}], V and d at least 1, as x is {list(x.shape)}, not {list(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype} as x is, not {weight.dtype}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {targets.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, not {mask.dtype}")
    for label, vector in ((name, targets), ("mask", mask)):
        if vector is not None and vector.shape != (N,):
            raise ValueError(f"{label} must be [N={N}] as x is {list(x.shape)}, not {list(vector.shape)}")
    for label, tensor in (("weight", weight), (name, targets), ("mask", mask)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{label} must be on {x.device} as x is, not on {tensor.device}")


def check_values(weight: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, name: str) -> None:
    """Check the temperature, and on a CPU the targets of unmasked rows."""
    if temperature != 0 and not (math.isfinite(temperature) and temperature >= _MIN_TEMPERATURE):
        raise ValueError(f"temperature must be 0 or at least {_MIN_TEMPERATURE}, not {temperature}")
    if targets.device.type != "cpu":
        return
    if mask is not None:
        targets = targets[mask]
    V = weight.shape[0]
    if targets.numel() and (targets.min() < 0 or targets.max() >= V):
        raise ValueError(f"{name} must be 0..{V - 1}, not {int(targets.min())}..{int(targets.max())}")
