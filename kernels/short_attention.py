"""Causal self-attention within sequences of a few positions: the frames of a residual decoder.

    p[s, t] = softmax over t <= s of (q[s] . k[t] / sqrt(head_dim)),   out[s] = sum over t of p[s, t] v[t]

qkv  [N, S, (H + 2 KV) * head_dim]  float32 or bfloat16, contiguous; a row is [q | k | v], heads one after another
out  [N, S, H * head_dim]

N sequences of S <= 16 positions. H query heads share KV key and value heads (grouped-query: head h reads h * KV // H).
One program takes one key head and as many whole frames as fit BLOCK_M rows, and multiplies them all with one another
as one matrix; what lies outside a frame or in its future is masked. Most products are wasted so, but they are few
beside the reads, and every value is read once, straight from the packed rows. Softmax in float32. The backward pass
recomputes p, packs its gradient like qkv, and sums the key and value gradients of a group head after head.

Left out: dropout, masks other than causal, longer sequences (scaled_dot_product_attention is made for them), head_dim
above 128 (at 128, float32 and grouped heads the backward kernel spills registers). Because frames share a matrix
product, a NaN or infinity in one frame can make the frames of its program NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import library

from .interpreter import dot, round_to

MAX_POSITIONS = 16
MAX_HEAD_DIM = 128


def short_attention_reference(qkv: torch.Tensor, n_heads: int, n_kv_heads: int) -> torch.Tensor:
    """The same in plain PyTorch; the contract."""
    N, S, _ = qkv.shape
    heads = qkv.view(N, S, n_heads + 2 * n_kv_heads, -1).transpose(1, 2)
    q, k, v = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=1)
    grouped = n_kv_heads < n_heads
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return mixed.transpose(1, 2).flatten(2)


@triton.jit
def _probabilities(q, k, S, scale, BLOCK_M: tl.constexpr):
    """Softmax of q @ k.T within each frame, causal. Rows beyond the frames see themselves, so no row is empty."""
    r = tl.arange(0, BLOCK_M)
    allowed = (r[:, None] // S == r[None, :] // S) & (r[None, :] <= r[:, None])
    scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)) * scale
    scores = tl.where(allowed, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _short_attention_kernel(
    qkv,
    out,
    rows,  # N * S
    S,
    scale,
    KV,
    GROUP: tl.constexpr,  # query heads a key head
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    taken = BLOCK_M // S * S  # whole frames
    r = tl.arange(0, BLOCK_M)
    row = tl.program_id(0).to(tl.int64) * taken + r
    kv = tl.program_id(1)
    c = tl.arange(0, BLOCK_D)
    inside = ((r < taken) & (row < rows))[:, None] & (c < HEAD_DIM)[None, :]
    H = KV * GROUP
    at = row[:, None] * ((H + 2 * KV) * HEAD_DIM) + c[None, :]
    at_out = row[:, None] * (H * HEAD_DIM) + c[None, :]
    k = tl.load(qkv + at + (H + kv) * HEAD_DIM, mask=inside, other=0.0)
    v = tl.load(qkv + at + (H + KV + kv) * HEAD_DIM, mask=inside, other=0.0)
    for g in range(GROUP):
        head = (kv * GROUP + g) * HEAD_DIM
        q = tl.load(qkv + at + head, mask=inside, other=0.0)
        p = _probabilities(q, k, S, scale, BLOCK_M)
        mixed = dot(round_to(p, v.dtype), v, tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32))
        tl.store(out + at_out + head, round_to(mixed, out.dtype.element_ty), mask=inside)


@triton.jit
def _short_attention_backward_kernel(
    d_out,
    qkv,
    d_qkv,
    rows,
    S,
    scale,
    KV,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    taken = BLOCK_M // S * S
    r = tl.arange(0, BLOCK_M)
    row = tl.program_id(0).to(tl.int64) * taken + r
    kv = tl.program_id(1)
    c = tl.arange(0, BLOCK_D)
    inside = ((r < taken) & (row < rows))[:, None] & (c < HEAD_DIM)[None, :]
    H = KV * GROUP
    at = row[:, None] * ((H + 2 * KV) * HEAD_DIM) + c[None, :]
    at_out = row[:, None] * (H * HEAD_DIM) + c[None, :]
    at_k, at_v = at + (H + kv) * HEAD_DIM, at + (H + KV + kv) * HEAD_DIM
    k = tl.load(qkv + at_k, mask=inside, other=0.0)
    v = tl.load(qkv + at_v, mask=inside, other=0.0)
    d_k = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    d_v = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for g in range(GROUP):
        head = (kv * GROUP + g) * HEAD_DIM
        q = tl.load(qkv + at + head, mask=inside, other=0.0)
        grad = tl.load(d_out + at_out + head, mask=inside, other=0.0)
        p = _probabilities(q, k, S, scale, BLOCK_M)
        d_p = dot(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32))
        d_scores = round_to(p * (d_p - tl.sum(p * d_p, axis=1)[:, None]) * scale, k.dtype)
        d_q = dot(d_scores, k, tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32))
        tl.store(d_qkv + at + head, round_to(d_q, d_qkv.dtype.element_ty), mask=inside)
        d_k = dot(tl.trans(d_scores), q, d_k)
        d_v = dot(tl.trans(round_to(p, grad.dtype)), grad, d_v)
    tl.store(d_qkv + at_k, round_to(d_k, d_qkv.dtype.element_ty), mask=inside)
    tl.store(d_qkv + at_v, round_to(d_v, d_qkv.dtype.element_ty), mask=inside)


def _settings(qkv: torch.Tensor, n_heads: int, n_kv_heads: int) -> tuple[tuple[int, int], tuple, dict[str, int]]:
    """Grid, scalars and constants that both kernels take."""
    N, S, width = qkv.shape
    head_dim = width // (n_heads + 2 * n_kv_heads)
    block_d = max(triton.next_power_of_2(head_dim), 16)  # 16: the least that tl.dot takes
    block_m = 64 if block_d * qkv.itemsize <= 128 else 32
    block_m = block_m if qkv.dtype == torch.bfloat16 else block_m // 2  # float32 is multiplied outside the matrix units
    grid = (triton.cdiv(N, block_m // S), n_kv_heads)
    constants = {"GROUP": n_heads // n_kv_heads, "HEAD_DIM": head_dim, "BLOCK_M": block_m, "BLOCK_D": block_d}
    # With Triton's three stages the next head of a group is loaded ahead, and ptxas spills (sm_90, 16 heads on 4 of 64:
    # bfloat16 72 bytes, float32 9516); with one it does not.
    constants["num_stages"] = 1
    return grid, (N * S, S, head_dim**-0.5, n_kv_heads), constants


def _forward(qkv: torch.Tensor, n_heads: int, n_kv_heads: int) -> torch.Tensor:
    """Launch the forward kernel; the arguments have been checked."""
    grid, scalars, constants = _settings(qkv, n_heads, n_kv_heads)
    out = qkv.new_empty(*qkv.shape[:2], n_heads * constants["HEAD_DIM"])
    if out.numel():
        _short_attention_kernel[grid](qkv, out, *scalars, **constants)
    return out


def _backward(d_out: torch.Tensor, qkv: torch.Tensor, n_heads: int, n_kv_heads: int) -> torch.Tensor:
    """Launch the backward kernel: the gradient of qkv."""
    grid, scalars, constants = _settings(qkv, n_heads, n_kv_heads)
    d_qkv = torch.empty_like(qkv)
    if d_qkv.numel():
        _short_attention_backward_kernel[grid](d_out.contiguous(), qkv, d_qkv, *scalars, **constants)
    return d_qkv


@library.custom_op("siren::short_attention", mutates_args=())
def _short_attention(qkv: torch.Tensor, n_heads: int, n_kv_heads: int) -> torch.Tensor:
    _check(qkv, n_heads, n_kv_heads)
    return _forward(qkv, n_heads, n_kv_heads)


@_short_attention.register_fake
def _(qkv: torch.Tensor, n_heads: int, n_kv_heads: int) -> torch.Tensor:
    _check(qkv, n_heads, n_kv_heads)
    N, S, width = qkv.shape
    return qkv.new_empty(N, S, width // (n_heads + 2 * n_kv_heads) * n_heads)


@library.custom_op("siren::short_attention_backward", mutates_args=())
def _short_attention_backward(d_out: torch.Tensor, qkv: torch.Tensor, n_heads: int, n_kv_heads: int) -> torch.Tensor:
    return _backward(d_out, qkv, n_heads, n_kv_heads)


@_short_attention_backward.register_fake
def _(d_out: torch.Tensor, qkv: torch.Tensor, n_heads: int, n_kv_heads: int) -> torch.Tensor:
    return torch.empty_like(qkv)


def _setup_context(ctx, inputs, output) -> None:
    qkv, ctx.n_heads, ctx.n_kv_heads = inputs
    ctx.save_for_backward(qkv)


def _differentiate(ctx, d_out: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return _short_attention_backward(d_out, *ctx.saved_tensors, ctx.n_heads, ctx.n_kv_heads), None, None


_short_attention.register_autograd(_differentiate, setup_context=_setup_context)


def short_attention(qkv: torch.Tensor, n_heads: int, n_kv_heads: int) -> torch.Tensor:
    """Causal attention out [N, S, n_heads * head_dim] within each of N frames, from packed qkv; differentiable once.

    qkv [N, S, (n_heads + 2 n_kv_heads) * head_dim], contiguous, float32 or bfloat16. Wrong arguments raise ValueError
    or TypeError naming the argument and what it should be.
    """
    return _short_attention(qkv, n_heads, n_kv_heads)


def _check(qkv: torch.Tensor, n_heads: int, n_kv_heads: int) -> None:
    if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"n_heads must be a multiple of n_kv_heads, both at least 1, not {n_heads} and {n_kv_heads}")
    heads = n_heads + 2 * n_kv_heads
    if qkv.ndim != 3 or not 1 <= qkv.shape[1] <= MAX_POSITIONS:
        raise ValueError(f"qkv must be [N, S, width] with S from 1 to {MAX_POSITIONS}, not {list(qkv.shape)}")
    if qkv.shape[2] % heads or not heads <= qkv.shape[2] <= heads * MAX_HEAD_DIM:
        raise ValueError(
            f"qkv must hold {heads} heads of 1 to {MAX_HEAD_DIM} columns in its last dimension, not {qkv.shape[2]}"
        )
    if qkv.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"qkv must be float32 or bfloat16, not {qkv.dtype}")
    if not qkv.is_contiguous():
        raise ValueError(f"qkv must be contiguous, not strides {qkv.stride()}")
