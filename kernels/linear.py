"""Device functions of the decode path: rows of a weight matrix times a few rows of activations.

    product           W x                     x may be normalised (RMSNorm) and shifted (positions) on the way in
    store_product     out = W x + bias
    add_product       out = x_in + shift + W a + bias          the residual connection
    swiglu_product    out = silu(gate x) * (value x)           both halves of one matrix
    qkv_product       queries out; keys and values straight into their cache

A decoding step is bound by the bytes of its weights, so a program takes BLOCK_N rows of the matrix, reads them once,
and multiplies all rows of activations (one a sequence, padded to 16 for the matrix units). Activations are float32 and
come from L2; each program normalises them for itself instead of waiting for a kernel that does: the sum of squares is
taken while the products are summed, and the scale applied to the result.

Weights are float32, bfloat16, or int8 with one float32 scale a row. Products are exact in float32 and summed there;
activations are rounded to bfloat16 except for float32 weights. Sums run in the same order at every batch size.
Activations are read past the L1 cache (.cg): in the persistent kernel another program may have just written them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .interpreter import INTERPRETED, dot, round_to


def all_registers() -> dict[str, int]:
    """The launch option that lets a kernel use as many registers as it needs. Without it ptxas aims at a number of
    programs on a multiprocessor, and may spill a few to reach it."""
    return {} if INTERPRETED.value or torch.version.hip else {"maxnreg": 255}


def tile_sizes(weight: torch.Tensor, rows: int) -> dict[str, int]:
    """How a launch over such weights is cut, for `rows` rows of activations.

    Sums must not depend on the batch. So BLOCK_K, the inputs in a step of the sum, depends on the weights' type alone,
    and BLOCK_N stays at 16 (twice that in swiglu_product): from 64 rows on, Hopper has instructions of its own.
    Activations take at least the 16 columns that the matrix units want. In the interpreter a program costs
    milliseconds whatever its size: large ones.
    """
    wide = 16 if rows <= 16 or weight.dtype == torch.float32 else 32
    inputs, stages = {torch.float32: (32, 2), torch.bfloat16: (128, 4), torch.int8: (128, 3)}[weight.dtype]
    if wide > 16:
        stages = 2  # the activations' tiles fill the shared memory
    blocks = {"BLOCK_N": 1024 if INTERPRETED.value else 16, "BLOCK_R": wide, "BLOCK_K": inputs}
    return {**blocks, "num_warps": wide // 4, "num_stages": stages, **all_registers()}


@triton.jit
def below(i, size: tl.constexpr, BLOCK: tl.constexpr):
    """Which of the BLOCK places i, from a multiple of BLOCK on, are below the size: known to be all where it is a
    multiple of BLOCK too, which saves the registers of a mask."""
    return tl.full((BLOCK,), True, tl.int1) if size % BLOCK == 0 else i < size


@triton.jit
def operand(tensor, weight):
    """The tensor as the matrix units take it beside this weight matrix."""
    kind: tl.constexpr = tl.float32 if weight.dtype.element_ty == tl.float32 else tl.bfloat16
    return round_to(tensor.to(tl.float32), kind)  # in one step the interpreter takes int8 for the bits of bfloat16


@triton.jit
def rescale(acc, scale, weight, n, in_n):
    """Int8 weights: the scales of the rows."""
    if weight.dtype.element_ty == tl.int8:
        acc *= tl.load(scale + n, mask=in_n, other=0.0)[:, None]
    return acc


@triton.jit
def product(
    weight,  # [N, D], the matrix
    scale,  # [N], read for int8 only
    n,  # [BLOCK_N] its rows, and which of them exist
    in_n,
    x,  # [BLOCK_R] pointers to rows of D activations, and which of them exist
    in_r,
    shift,  # [BLOCK_R] pointers to rows of D that are added to the activations first
    norm,  # [D], the RMSNorm's weight
    D: tl.constexpr,
    eps,
    SHIFT: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_N, BLOCK_R] float32."""
    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    squares = tl.zeros((BLOCK_R,), dtype=tl.float32)
    row = weight + n[:, None].to(tl.int64) * D
    for first in range(0, D, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        in_c = below(c, D, BLOCK_K)
        inside = in_c[:, None] & in_r[None, :]
        w = tl.load(row + c[None, :], mask=in_n[:, None] & in_c[None, :], other=0)
        a = tl.load(x[None, :] + c[:, None], mask=inside, other=0.0, cache_modifier=".cg")
        if SHIFT:
            a += tl.load(shift[None, :] + c[:, None], mask=inside, other=0.0)
        if NORM:
            squares += tl.sum(a * a, axis=0)
            a *= tl.load(norm + c, mask=in_c, other=0.0)[:, None]
        acc = dot(operand(w, weight), operand(a, weight), acc)
    if NORM:
        acc *= tl.rsqrt(squares / D + eps)[None, :]
    return rescale(acc, scale, weight, n, in_n)


@triton.jit
def store_product(acc, bias, n, in_n, in_r, out, BIAS: tl.constexpr):
    """out[r, n] = acc + bias; out [BLOCK_R] pointers to rows."""
    if BIAS:
        acc += tl.load(bias + n, mask=in_n, other=0.0)[:, None]
    tl.store(out[None, :] + n[:, None], acc, mask=in_n[:, None] & in_r[None, :])


@triton.jit
def add_product(acc, bias, n, in_n, in_r, x, shift, out, BIAS: tl.constexpr, SHIFT: tl.constexpr):
    """out[r, n] = x[r, n] + shift[r, n] + acc + bias; out may be x."""
    inside = in_n[:, None] & in_r[None, :]
    total = tl.load(x[None, :] + n[:, None], mask=inside, other=0.0, cache_modifier=".cg")
    if SHIFT:
        total += tl.load(shift[None, :] + n[:, None], mask=inside, other=0.0)
    store_product(total + acc, bias, n, in_n, in_r, out, BIAS)


@triton.jit
def swiglu_product(
    weight,  # [2 * hidden, D]: gate rows, then value rows
    scale,
    first,  # column of the result where the tile begins
    hidden: tl.constexpr,
    x,
    in_r,
    norm,
    out,  # [BLOCK_R] pointers to rows of hidden
    D: tl.constexpr,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Both halves of a column come from one product, whose rows alternate between them."""
    i = tl.arange(0, 2 * BLOCK_N)
    column = first + i // 2
    pair = column + i % 2 * hidden
    in_pair = tl.full((2 * BLOCK_N,), True, tl.int1) if hidden % BLOCK_N == 0 else column < hidden
    both = product(weight, scale, pair, in_pair, x, in_r, x, norm, D, eps, False, True, 2 * BLOCK_N, BLOCK_R, BLOCK_K)
    gate, value = tl.split(tl.permute(tl.reshape(both, (BLOCK_N, 2, BLOCK_R)), (0, 2, 1)))
    n = first + tl.arange(0, BLOCK_N)
    store_product(gate * tl.sigmoid(gate) * value, scale, n, below(n, hidden, BLOCK_N), in_r, out, False)


@triton.jit
def qkv_product(
    acc,  # [BLOCK_N, BLOCK_R] rows n of [q | k | v]
    n,
    in_n,
    in_r,
    q,  # [BLOCK_R] pointers to rows of d queries
    key,  # [BLOCK_R] pointers to the first head's key of this position
    value,
    head_stride,  # from one head's key to the next
    d: tl.constexpr,
    kv: tl.constexpr,  # width of all keys
    head_dim: tl.constexpr,
):
    tl.store(q[None, :] + n[:, None], acc, mask=(in_n & (n < d))[:, None] & in_r[None, :])
    c = tl.where(n < d + kv, n - d, n - d - kv)  # column among the keys, or the values
    offset = (c // head_dim).to(tl.int64) * head_stride + c % head_dim
    is_key, is_value = (n >= d) & (n < d + kv), in_n & (n >= d + kv)
    acc = round_to(acc, key.dtype.element_ty)
    tl.store(key[None, :] + offset[:, None], acc, mask=is_key[:, None] & in_r[None, :])
    tl.store(value[None, :] + offset[:, None], acc, mask=is_value[:, None] & in_r[None, :])
