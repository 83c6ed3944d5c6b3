"""Device functions that draw codes: Gumbel noise from Philox, and the argmax of what top-k and top-p allow.

A row's code is the argmax over the allowed v of logit_v / temperature + gumbel_v. The noise is counter-based:
Philox4x32-10, key = the sequence's 64-bit seed, counter = (frame, codebook, v // 4, 0), word v % 4,
u = ((word >> 8) + 0.5) / 2^24, gumbel = -log(-log(u)), in float64 and then rounded: in float32 the largest u would
round to 1. top-k keeps the k largest logits (the lower index wins a tie), top-p then the smallest set of most probable
codes whose probability reaches p.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel(seed, frame, codebook, BLOCK_V: tl.constexpr):
    """[BLOCK_V] float32 for one sequence's draw; BLOCK_V a power of two from 4."""
    quad = tl.arange(0, BLOCK_V // 4).to(tl.uint32)
    zero = quad * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + frame.to(tl.uint32), zero + codebook, quad, zero)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    u = ((word >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-8
    return (-tl.log(-tl.log(u))).to(tl.float32)


@triton.jit
def lowest_kept(key, weight, target, BITS: tl.constexpr):
    """[ROWS] the largest threshold for which the weights of the keys from it up sum to the target; keys below 2^BITS.

    Bit by bit, each a sum over the row, instead of a sort.
    """
    threshold = tl.zeros_like(target).to(tl.int64)
    for i in range(BITS):
        higher = threshold + (tl.full((), 1, tl.int64) << (BITS - 1 - i))
        reached = tl.sum(tl.where(key >= higher[:, None], weight, 0), axis=1)
        threshold = tl.where(reached >= target, higher, threshold)
    return threshold


@triton.jit
def allowed(x, v, in_v, top_k, top_p, TOP_K: tl.constexpr, TOP_P: tl.constexpr):
    """Which codes top-k and top-p leave, bool [ROWS, BLOCK_V]; x holds logits / temperature, no NaN.

    Codes are ranked by one integer that orders as (logit, -index). top_p comes as the bits of a float64: as a float
    it would reach the kernel rounded to float32, and 0.1 of ten equal codes would be two of them.
    """
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 equals 0.0, but its bits do not
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000  # a float's bits, in its order
    key = ordered * 8192 + (8191 - v)[None, :]  # rows of at most 8192 codes
    keep = in_v
    if TOP_K:
        one = keep.to(tl.int32)
        keep = key >= lowest_kept(key, one, tl.sum(one, axis=1) * 0 + top_k, 45)[:, None]
    if TOP_P:
        # float64, as on every backend: they must agree on the boundary.
        weight = tl.where(keep, tl.exp((x - tl.max(x, axis=1)[:, None]).to(tl.float64)), 0.0)
        share = tl.full((1,), top_p, tl.int64).to(tl.float64, bitcast=True)
        keep = key >= lowest_kept(key, weight, share * tl.sum(weight, axis=1), 45)[:, None]
    return keep


@triton.jit
def draw(
    logits,  # [ROWS] pointers to rows of V, and which of them exist
    in_b,
    noise,  # [ROWS] pointers to rows of V; not read when GREEDY or FORCED
    given,  # [ROWS] pointers to the codes to take, FORCED only
    V: tl.constexpr,
    temperature,
    top_k,
    top_p,
    GREEDY: tl.constexpr,  # temperature 0
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    FORCED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Codes int32 [ROWS] and their log-probabilities float32 [ROWS], before top-k and top-p.

    Logits with NaN, plus infinity or nothing finite cannot be drawn from: code 0, log-probability NaN. So
    is a given code that is none.
    """
    v = tl.arange(0, BLOCK_V)
    inside = in_b[:, None] & (v < V)[None, :]
    x = tl.load(logits[:, None] + v[None, :], mask=inside, other=-float("inf"), cache_modifier=".cg")
    if not GREEDY:
        x = tl.div_rn(x, temperature)
    top = tl.max(x, axis=1)
    bad = (tl.sum((x != x).to(tl.int32), axis=1) > 0) | (tl.abs(top) == float("inf"))
    if FORCED:
        code = tl.load(given, mask=in_b, other=0)
        outside = (code < 0) | (code >= V)
        bad = bad | outside
        code = tl.where(outside, 0, code).to(tl.int32)
    else:
        score = x
        if not GREEDY:
            score += tl.load(noise[:, None] + v[None, :], mask=inside, other=0.0)
            if TOP_K or TOP_P:
                keep = allowed(x, v, inside, top_k, top_p, TOP_K, TOP_P)
                score = tl.where(keep, score, -float("inf"))
        code = tl.where(bad, 0, tl.argmax(score, axis=1, tie_break_left=True).to(tl.int32))
    chosen = tl.sum(tl.where(v[None, :] == code[:, None], x, 0.0), axis=1)
    logprob = chosen - top - tl.log(tl.sum(tl.exp(x - top[:, None]), axis=1))
    return code, tl.where(bad, float("nan"), logprob)


@triton.jit
def embed(
    code,  # [ROWS] codes of sequences b
    b,
    in_b,
    tables,  # this codebook's rows in expert 0's table
    expert_stride,  # from there to the next expert's
    total,  # [K, B, d] sums of the frame's embeddings so far
    start,  # [K, R, d] what the residual decoders' conditions are added to
    condition,  # [K, R, d] start plus what is known of the frame
    K: tl.constexpr,
    B,
    R,
    d: tl.constexpr,
    CONDITIONING: tl.constexpr,  # 0 none, 1 the latest code, 2 all codes so far (paper, eq. 5)
    BLOCK: tl.constexpr,
):
    """total += the drawn codes' embeddings, for every expert; condition follows."""
    for first in range(0, K * d, BLOCK):
        i = first + tl.arange(0, BLOCK)
        k, c = (i // d).to(tl.int64), i % d
        inside = in_b[:, None] & (i < K * d)[None, :]
        row = tables + code[:, None].to(tl.int64) * d + (k * expert_stride + c)[None, :]
        latest = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        place = (k * B * d + c)[None, :] + b[:, None] * d
        known = tl.load(total + place, mask=inside, other=0.0, cache_modifier=".cg") + latest
        tl.store(total + place, known, mask=inside)
        if CONDITIONING == 1:
            known = latest
        if CONDITIONING:
            for r in range(0, R, B):
                place = (k * R * d + c)[None, :] + (r + b)[:, None] * d
                tl.store(condition + place, tl.load(start + place, mask=inside, other=0.0) + known, mask=inside)
