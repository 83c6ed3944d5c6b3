"""One draw: head matrix, guidance, temperature, top-k, top-p, Gumbel-max, log-probability, embedding. One launch.

    logits  = norm(x) @ head.T                          [R, V]
    logits  = uncond + guidance * (cond - uncond)       [B, V], with guidance: R = 2 B, conditional rows first
    code    = argmax over allowed v of logits / temperature + noise
    total  += tables[:, code]                           [K, B, d], every expert's sum of the frame's embeddings
    condition = start + (total or the latest embedding) [K, R, d], what the residual decoders see next (eq. 5)

The head's matrix is spread over many programs. Each counts itself off when its logits are written; the last one
finds all of them there and draws. The count goes back to zero, so a launch leaves nothing to clean up.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import library

from .checks import FLOAT, MATRIX, TABLE, WHOLE, check_tensor
from .draw import draw, embed
from .linear import below, product, tile_sizes

CONDITIONINGS = ("none", "residual", "accumulated")
MOST_CODES = 8192  # a program of the draw holds a whole row


def sample_heads_reference(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    head: torch.Tensor,
    scale: torch.Tensor | None,
    noise: torch.Tensor | None,
    forced: torch.Tensor | None,
    tables: torch.Tensor,
    total: torch.Tensor,
    start: torch.Tensor,
    condition: torch.Tensor,
    conditioning: str,
    temperature: float,
    top_k: int,
    top_p: float,
    guidance: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch, in the dtype of x (float64 for an exact answer); the contract."""
    R, B = len(x), total.shape[1]
    if norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * norm
    weight = head if scale is None else head * scale.unsqueeze(-1)
    logits = x @ weight.to(x.dtype).T
    if R != B:
        logits = logits[B:] + guidance * (logits[:B] - logits[B:])
    scaled = logits / logits.new_tensor(temperature) if temperature else logits  # a float would be inverted first
    bad = ~scaled.amax(-1).isfinite()
    if forced is not None:
        codes = forced.clone()
    else:
        score = scaled
        if noise is not None:
            ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
            kept = torch.arange(scaled.shape[-1], device=x.device).expand_as(order) < (top_k or scaled.shape[-1])
            reached = ((ordered - ordered[:, :1]).double().exp() * kept).cumsum(-1)
            if top_p < 1:
                kept[:, 1:] &= reached[:, :-1] < top_p * reached[:, -1:]
            score = (scaled + noise).masked_fill(~torch.zeros_like(kept).scatter(-1, order, kept), -torch.inf)
        codes = score.argmax(-1).masked_fill(bad, 0)
    logprobs = scaled.log_softmax(-1).gather(-1, codes[:, None])[:, 0].float().masked_fill(bad, torch.nan)
    latest = tables[:, codes].float()
    total += latest
    if conditioning != "none":
        known = total if conditioning == "accumulated" else latest
        condition.copy_(start + known.repeat(1, R // B, 1))
    return codes, logprobs, logits


@triton.jit
def head_tile(
    head,
    scale,
    norm,
    x,  # [BLOCK_R] pointers to the conditional rows
    uncond,  # [BLOCK_R] pointers to the others, GUIDED only
    in_b,
    v,
    V: tl.constexpr,
    logits,  # [BLOCK_R] pointers to rows of V
    d: tl.constexpr,
    eps,
    guidance,
    NORM: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The logits of codes v [BLOCK_V]."""
    in_v = below(v, V, BLOCK_V)
    acc = product(head, scale, v, in_v, x, in_b, x, norm, d, eps, False, NORM, BLOCK_V, BLOCK_R, BLOCK_K)
    if GUIDED:
        free = product(head, scale, v, in_v, uncond, in_b, x, norm, d, eps, False, NORM, BLOCK_V, BLOCK_R, BLOCK_K)
        acc = free + guidance * (acc - free)
    tl.store(logits[None, :] + v[:, None], acc, mask=in_v[:, None] & in_b[None, :])


@triton.jit(do_not_specialize=["B", "R", "top_k", "top_p"])
def _sample_kernel(
    x,
    norm,
    head,
    scale,
    noise,
    noise_stride,
    forced,
    tables,
    expert_stride,
    total,
    start,
    condition,
    codes,
    code_stride,
    logprobs,
    logprob_stride,
    logits,
    logit_stride,
    count,
    K: tl.constexpr,
    B,
    R,
    V: tl.constexpr,
    d: tl.constexpr,
    eps,
    temperature,
    top_k,
    top_p,
    guidance,
    NORM: tl.constexpr,
    GUIDED: tl.constexpr,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    FORCED: tl.constexpr,
    CONDITIONING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # ROWS sequences at a time; the product pads them to the BLOCK_R that the matrix units take.
    i = tl.arange(0, BLOCK_R)
    row = tl.program_id(1).to(tl.int64) * ROWS + i
    inside = (i < ROWS) & (row < B)
    v = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += row * d
    head_tile(
        head, scale, norm, x, x + B * d, inside, v, V, logits + row * logit_stride, d, eps, guidance,
        NORM, GUIDED, BLOCK_N, BLOCK_R, BLOCK_K,
    )  # fmt: skip

    tl.debug_barrier()  # all of this program's logits are written before it counts itself off
    arrived = tl.atomic_add(count + tl.program_id(1), 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        tl.store(count + tl.program_id(1), 0)
        b = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        in_b = b < B
        code, logprob = draw(
            logits + b * logit_stride, in_b, noise + b * noise_stride, forced + b * code_stride, V,
            temperature, top_k, top_p, GREEDY, TOP_K, TOP_P, FORCED, BLOCK_V,
        )  # fmt: skip
        tl.store(codes + b * code_stride, code.to(tl.int64), mask=in_b)
        tl.store(logprobs + b * logprob_stride, logprob, mask=in_b)
        embed(code, b, in_b, tables, expert_stride, total, start, condition, K, B, R, d, CONDITIONING, BLOCK_D)


def float64_bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def launch(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    head: torch.Tensor,
    scale: torch.Tensor | None,
    noise: torch.Tensor | None,
    forced: torch.Tensor | None,
    tables: torch.Tensor,
    total: torch.Tensor,
    start: torch.Tensor,
    condition: torch.Tensor,
    conditioning: str,
    temperature: float,
    top_k: int,
    top_p: float,
    guidance: float,
    eps: float,
    codes: torch.Tensor,
    logprobs: torch.Tensor,
    logits: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """Run the kernel. codes [B] (with `forced` it is `forced`), logprobs [B] and logits [B, V] are written, all of
    any stride between rows; count: at least B zeros, int32. The other arguments as in `sample_heads`."""
    K, B, d = total.shape
    R, V = len(x), len(head)
    block_v = triton.next_power_of_2(V)
    at_once = 2048 if top_p < 1 else 4096  # logits in a program's registers: top-p keeps more beside them
    rows = min(triton.next_power_of_2(B), 16, max(1, at_once // block_v))
    sizes = tile_sizes(head, rows)
    grid = (triton.cdiv(V, sizes["BLOCK_N"]), triton.cdiv(B, rows))
    unused = logits  # a pointer for what the kernel does not read
    _sample_kernel[grid](
        x,
        unused if norm is None else norm,
        head,
        unused if scale is None else scale,
        unused if noise is None else noise,
        0 if noise is None else noise.stride(0),
        codes if forced is None else forced,
        tables,
        tables.stride(0),
        total,
        start,
        condition,
        codes,
        codes.stride(0),
        logprobs,
        logprobs.stride(0),
        logits,
        logits.stride(0),
        count,
        K,
        B,
        R,
        V,
        d,
        eps,
        temperature,
        top_k,
        float64_bits(top_p),
        guidance,
        NORM=norm is not None,
        GUIDED=R != B,
        GREEDY=temperature == 0,
        TOP_K=top_k > 0,
        TOP_P=top_p < 1,
        FORCED=forced is not None,
        CONDITIONING=CONDITIONINGS.index(conditioning),
        ROWS=rows,
        BLOCK_V=block_v,
        BLOCK_D=max(16, 4096 // rows),
        **sizes,
    )


@library.custom_op("siren::sample_heads", mutates_args=("total", "condition"))
def sample_heads(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    head: torch.Tensor,
    scale: torch.Tensor | None,
    noise: torch.Tensor | None,
    forced: torch.Tensor | None,
    tables: torch.Tensor,
    total: torch.Tensor,
    start: torch.Tensor,
    condition: torch.Tensor,
    conditioning: str,
    temperature: float,
    top_k: int,
    top_p: float,
    guidance: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One draw for B sequences: codes int64 [B], log-probabilities float32 [B], logits float32 [B, V].

    x float32 [R, d], R = B, or 2 B with guidance, conditional rows first; norm float32 [d] (None: x is normalised);
    head [V, d], int8 with `scale` [V]. noise float32 [B, V] from `gumbel_noise`, None at temperature 0. forced int64
    [B] takes these codes instead of drawing. tables [K, V, d]: the codebook's embeddings for each expert, any stride
    between experts; total float32 [K, B, d] and condition float32 [K, R, d] are updated, the latter from `start`
    float32 [K, R, d] as conditioning says: "none", "residual" or "accumulated".

    A row of logits with NaN, plus infinity or nothing finite gets code 0 and log-probability NaN. For inference: it
    has no gradient. Raises ValueError naming the argument that does not fit.
    """
    _check(x, norm, head, scale, noise, forced, tables, total, start, condition, conditioning, temperature)
    B, V = total.shape[1], len(head)
    codes = torch.empty(B, dtype=torch.int64, device=x.device) if forced is None else forced.clone()
    logprobs, logits = x.new_empty(B), x.new_empty(B, V)
    count = torch.zeros(B, dtype=torch.int32, device=x.device)
    launch(
        x, norm, head, scale, noise, None if forced is None else codes, tables, total, start, condition,
        conditioning, temperature, top_k, top_p, guidance, eps, codes, logprobs, logits, count,
    )  # fmt: skip
    return codes, logprobs, logits


@sample_heads.register_fake
def _(
    x: torch.Tensor, norm: object, head: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = rest[4]
    B = total.shape[1]  # type: ignore[attr-defined]
    return torch.empty(B, dtype=torch.int64, device=x.device), x.new_empty(B), x.new_empty(B, len(head))


def _check(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    head: torch.Tensor,
    scale: torch.Tensor | None,
    noise: torch.Tensor | None,
    forced: torch.Tensor | None,
    tables: torch.Tensor,
    total: torch.Tensor,
    start: torch.Tensor,
    condition: torch.Tensor,
    conditioning: str,
    temperature: float,
) -> None:
    K, B, d = total.shape
    R, V = len(x), len(head)
    if R not in (B, 2 * B):
        raise ValueError(f"x must have a row for each of {B} sequences, or two with guidance, not {R}")
    if V > MOST_CODES:
        raise ValueError(f"head has {V} rows; a draw holds at most {MOST_CODES} logits")
    if conditioning not in CONDITIONINGS:
        raise ValueError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, not {conditioning!r}")
    if (head.dtype == torch.int8) != (scale is not None):
        raise ValueError("head must come with scale when it is int8, and only then")
    if (noise is None) != (temperature == 0 or forced is not None):
        raise ValueError("noise must be given when codes are drawn at a temperature above 0, and only then")
    sizes = {"K": K, "B": B, "R": R, "V": V, "d": d}
    for name, tensor, dims, dtypes in (
        ("x", x, "R d", FLOAT),
        ("norm", norm, "d", FLOAT),
        ("head", head, "V d", MATRIX),
        ("scale", scale, "V", FLOAT),
        ("noise", noise, "B V", FLOAT),
        ("forced", forced, "B", WHOLE),
        ("tables[0]", tables[0], "V d", TABLE),
        ("total", total, "K B d", FLOAT),
        ("start", start, "K R d", FLOAT),
        ("condition", condition, "K R d", FLOAT),
    ):
        check_tensor(sizes, x.device, name, tensor, dims, dtypes)
    if len(tables) != K:
        raise ValueError(f"tables must be those of {K} experts, not of {len(tables)}")
    if forced is not None and forced.device.type == "cpu" and not bool(((forced >= 0) & (forced < V)).all()):
        raise ValueError(f"forced codes must be from 0 to {V - 1}")
