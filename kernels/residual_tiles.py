"""Device functions of the residual decoders' phases, shared by the small kernels and the persistent one.

A step of expert k's decoder takes S positions of R rows: two (the backbone's output and the first condition) before
its first draw, then one. Row i of the S * R is position first + i // R of row i % R. Position 0 is the backbone's
output h, the others are the condition as it stands; later blocks read what the block before left in x. A block is
four phases, each over tiles of BLOCK_N matrix rows times BLOCK_R rows of activations:

    qkv_tile      queries; keys and values of the step's positions, kept until the frame is over
    output_tile   attention over at most m + 1 positions, done again by every program instead of in a phase of its own
    swiglu_tile   both halves of the feed-forward's first matrix, and the activation
    down_tile     its second matrix
"""

from __future__ import annotations

import triton
import triton.language as tl

from .interpreter import dot
from .linear import add_product, below, operand, product, qkv_product, rescale, swiglu_product


@triton.jit
def step_rows(h, condition, x, positions, k, block, first, i, R, d):
    """Pointers to the activations that rows i enter the block with, and to their positions' vectors."""
    r, p = i % R, first + i // R
    here = (k * R + r).to(tl.int64) * d
    entry = tl.where(p == 0, h + here, condition + here)
    if block > 0:
        entry = x + i.to(tl.int64) * d
    return entry, positions + p * d


@triton.jit
def qkv_tile(
    entry,  # [BLOCK_R] from step_rows
    shift,
    in_r,
    i,
    n,  # [BLOCK_N] rows of [q | k | v]
    norm,
    weight,
    scale,
    q,  # [S * R, d]
    keys,  # this block's [positions, R, kv]
    values,
    first,
    R,
    d: tl.constexpr,
    kv: tl.constexpr,
    head_dim: tl.constexpr,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    in_n = below(n, d + 2 * kv, BLOCK_N)
    acc = product(weight, scale, n, in_n, entry, in_r, shift, norm, d, eps, True, True, BLOCK_N, BLOCK_R, BLOCK_K)
    place = (first * R + i) * kv  # position first + i // R of row i % R
    qkv_product(acc, n, in_n, in_r, q + i * d, keys + place, values + place, head_dim, d, kv, head_dim)


@triton.jit
def output_tile(
    entry,
    shift,
    in_r,
    i,
    n,
    weight,
    scale,
    q,
    keys,
    values,
    x,  # [S * R, d] result
    first,
    R,
    d: tl.constexpr,
    heads: tl.constexpr,
    kv: tl.constexpr,
    head_dim: tl.constexpr,
    factor,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,  # head_dim or the next power of two
):
    HEADS: tl.constexpr = BLOCK_K // BLOCK_E if BLOCK_K > BLOCK_E else 1  # in a step of the sum
    r, p = i % R, first + i // R
    in_n = below(n, d, BLOCK_N)
    last = tl.max(tl.where(in_r, p, 0), axis=0)
    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for group in range(0, heads, HEADS):
        j = tl.arange(0, HEADS * BLOCK_E)
        head, e = group + j // BLOCK_E, j % BLOCK_E
        whole: tl.constexpr = heads % HEADS == 0 and head_dim == BLOCK_E
        in_c = tl.full((HEADS * BLOCK_E,), True, tl.int1) if whole else (head < heads) & (e < head_dim)
        c, from_kv = head * head_dim + e, head // (heads * head_dim // kv) * head_dim + e
        inside = in_c[:, None] & in_r[None, :]
        query = tl.load(q + i[None, :] * d + c[:, None], mask=inside, other=0.0, cache_modifier=".cg")
        top = tl.full((HEADS, BLOCK_R), -float("inf"), tl.float32)
        norm = tl.zeros((HEADS, BLOCK_R), tl.float32)
        mixed = tl.zeros((HEADS, BLOCK_E, BLOCK_R), tl.float32)
        for other in range(last + 1):
            seen = (other <= p)[None, :]
            place = ((other * R + r) * kv)[None, :] + from_kv[:, None]
            key = tl.load(keys + place, mask=inside & seen, other=0.0, cache_modifier=".cg")
            score = tl.sum(tl.reshape(query * key, (HEADS, BLOCK_E, BLOCK_R)), axis=1) * factor
            score = tl.where(seen, score, -float("inf"))
            larger = tl.maximum(top, score)  # position 0 is seen by all: finite from the start
            old, weight_of = tl.exp(top - larger), tl.exp(score - larger)
            value = tl.load(values + place, mask=inside & seen, other=0.0, cache_modifier=".cg")
            value = tl.reshape(value, (HEADS, BLOCK_E, BLOCK_R))
            mixed = mixed * old[:, None, :] + value * weight_of[:, None, :]
            norm, top = norm * old + weight_of, larger
        a = tl.reshape(mixed / norm[:, None, :], (HEADS * BLOCK_E, BLOCK_R))
        w = tl.load(weight + n[:, None] * d + c[None, :], mask=in_n[:, None] & in_c[None, :], other=0)
        acc = dot(operand(w, weight), operand(a, weight), acc)
    acc = rescale(acc, scale, weight, n, in_n)
    add_product(acc, scale, n, in_n, in_r, entry, shift, x + i * d, False, True)


@triton.jit
def swiglu_tile(
    x,
    in_r,
    i,
    column,  # of the result, where the tile begins
    norm,
    weight,
    scale,
    act,  # [S * R, hidden]
    d: tl.constexpr,
    hidden: tl.constexpr,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    swiglu_product(
        weight, scale, column, hidden, x + i * d, in_r, norm, act + i * hidden, d, eps, BLOCK_N, BLOCK_R, BLOCK_K
    )


@triton.jit
def down_tile(
    x,
    in_r,
    i,
    n,
    weight,
    scale,
    act,
    d: tl.constexpr,
    hidden: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    in_n = below(n, d, BLOCK_N)
    a, x = act + i * hidden, x + i * d
    acc = product(weight, scale, n, in_n, a, in_r, a, scale, hidden, 0.0, False, False, BLOCK_N, BLOCK_R, BLOCK_K)
    add_product(acc, scale, n, in_n, in_r, x, x, x, False, False)
