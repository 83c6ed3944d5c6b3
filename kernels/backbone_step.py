"""One frame through the backbones of all experts: eight launches a block, each for every expert at once.

    x = x + positions[frame]
    x = x + output(attention to the prompt(query(norm(x))))        cross_query, attend, cross_output
    x = x + output(attention to frames <= frame(qkv(norm(x))))     qkv, attend, self_output
    x = x + down(silu(gate(norm(x))) * value(norm(x)))             gate_value, down
    h = norm(x)                                                    after the last block

K experts, L blocks, R rows (sequences, or twice as many with guidance), d = heads * head_dim, U distinct prompts of P
tokens. Weights are stacked over blocks and experts in the order of `WEIGHTS`; keys and values of earlier frames lie in
a cache that the qkv kernel appends to. The frame's number is read on the device, so a captured CUDA graph of one step
serves every frame. How a matrix product is done is in linear.py; how many keys a program of the attention takes at
once does not depend on the batch, so that no sum does.

Left out: splitting one sequence's attention over several programs, which would pay for few sequences of thousands of
frames.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import library

from .checks import FLOAT, TABLE, WHOLE, check_tensor, check_weights
from .linear import (
    add_product,
    all_registers,
    below,
    product,
    qkv_product,
    store_product,
    swiglu_product,
    tile_sizes,
)

WEIGHTS = {  # kv = kv_heads * head_dim, n = d + 2 kv
    "cross_norm": "L K d",
    "cross_query": "L K d d",
    "cross_query_bias": "L K d",
    "cross_output": "L K d d",
    "cross_output_bias": "L K d",
    "self_norm": "L K d",
    "qkv": "L K n d",  # rows [q | k | v]
    "self_output": "L K d d",
    "ffn_norm": "L K d",
    "gate_value": "L K 2*hidden d",  # rows [gate | value]
    "down": "L K d hidden",
    "final_norm": "K d",
}
MATRICES = ("cross_query", "cross_output", "qkv", "self_output", "gate_value", "down")
BLOCK_T = 128  # keys that a program of the attention takes at once


def backbone_step_reference(
    inputs: torch.Tensor,
    frame: torch.Tensor,
    positions: torch.Tensor,
    prompt_keys: torch.Tensor,
    prompt_values: torch.Tensor,
    prompt_mask: torch.Tensor,
    prompt_index: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    heads: int,
    eps: float,
) -> torch.Tensor:
    """The same in plain PyTorch, in the dtype of `inputs` (float64 for an exact answer); the contract."""
    w = dict(zip(WEIGHTS, weights, strict=True))
    if scales:
        w.update({name: w[name].to(inputs.dtype) * s.unsqueeze(-1) for name, s in zip(MATRICES, scales, strict=True)})
    w = {name: tensor.to(inputs.dtype) for name, tensor in w.items()}
    x, now = inputs, int(frame)
    K, R, d = x.shape
    L, _, _, kv_heads, _, head_dim = keys.shape

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight[:, None]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        k, v = (tensor.to(q.dtype).repeat_interleave(heads // tensor.shape[2], 2) for tensor in (k, v))
        scores = torch.einsum("krhe,krhte->krht", q.view(K, R, heads, head_dim), k) * head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        return torch.einsum("krht,krhte->krhe", scores.softmax(-1), v).reshape(K, R, d)

    for i in range(L):
        x = x + positions[now].to(x.dtype)
        q = norm(x, w["cross_norm"][i]) @ w["cross_query"][i].mT + w["cross_query_bias"][i][:, None]
        row = prompt_index.long()
        mixed = attend(q, prompt_keys[i][:, row], prompt_values[i][:, row], prompt_mask[row])
        x = x + mixed @ w["cross_output"][i].mT + w["cross_output_bias"][i][:, None]
        q, k, v = (norm(x, w["self_norm"][i]) @ w["qkv"][i].mT).split((d, kv_heads * head_dim, kv_heads * head_dim), -1)
        keys[i, :, :, :, now] = k.view(K, R, kv_heads, head_dim).to(keys.dtype)
        values[i, :, :, :, now] = v.view(K, R, kv_heads, head_dim).to(values.dtype)
        mixed = attend(q, keys[i, :, :, :, : now + 1], values[i, :, :, :, : now + 1], None)
        x = x + mixed @ w["self_output"][i].mT
        gate, value = (norm(x, w["ffn_norm"][i]) @ w["gate_value"][i].mT).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * value) @ w["down"][i].mT
    return norm(x, w["final_norm"])


@triton.jit(do_not_specialize=["R"])
def _query_kernel(
    x,
    frame,
    positions,
    norm,
    weight,
    scale,
    bias,
    q,
    R,
    d: tl.constexpr,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q = query(norm(x + positions[frame])) + bias."""
    k = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_n, in_r = below(n, d, BLOCK_N), r < R
    rows = (k * R + r) * d
    shift = positions + (r * 0 + tl.load(frame)) * d
    weight, scale = weight + k * d * d, scale + k * d
    acc = product(
        weight, scale, n, in_n, x + rows, in_r, shift, norm + k * d, d, eps, True, True, BLOCK_N, BLOCK_R, BLOCK_K
    )
    store_product(acc, bias + k * d, n, in_n, in_r, q + rows, True)


@triton.jit(do_not_specialize=["R"])
def _output_kernel(
    x,
    frame,
    positions,
    a,
    weight,
    scale,
    bias,
    R,
    d: tl.constexpr,
    D: tl.constexpr,
    SHIFT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x = x (+ positions[frame]) + W a (+ bias), in place; a [K, R, D]."""
    k = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_n, in_r = below(n, d, BLOCK_N), r < R
    row = k * R + r
    shift = positions + (r * 0 + tl.load(frame)) * d
    weight, scale = weight + k * d * D, scale + k * d
    a += row * D
    acc = product(weight, scale, n, in_n, a, in_r, shift, bias, D, 0.0, False, False, BLOCK_N, BLOCK_R, BLOCK_K)
    x += row * d
    add_product(acc, bias + k * d, n, in_n, in_r, x, shift, x, BIAS, SHIFT)


@triton.jit(do_not_specialize=["R"])
def _qkv_kernel(
    x,
    frame,
    norm,
    weight,
    scale,
    q,
    keys,
    values,
    R,
    d: tl.constexpr,
    kv: tl.constexpr,
    head_dim: tl.constexpr,
    capacity,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q, and this frame's keys and values into their cache [K, R, kv_heads, capacity, head_dim]."""
    k = tl.program_id(2).to(tl.int64)
    N: tl.constexpr = d + 2 * kv
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_n, in_r = below(n, N, BLOCK_N), r < R
    row = k * R + r
    weight, scale = weight + k * N * d, scale + k * N
    x += row * d
    acc = product(weight, scale, n, in_n, x, in_r, x, norm + k * d, d, eps, False, True, BLOCK_N, BLOCK_R, BLOCK_K)
    place = row * kv * capacity + tl.load(frame) * head_dim
    qkv_product(acc, n, in_n, in_r, q + row * d, keys + place, values + place, capacity * head_dim, d, kv, head_dim)


@triton.jit(do_not_specialize=["R"])
def _swiglu_kernel(
    x,
    norm,
    weight,
    scale,
    out,
    R,
    d: tl.constexpr,
    hidden: tl.constexpr,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = silu(gate(norm(x))) * value(norm(x)); out [K, R, hidden]."""
    k = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = k * R + r
    weight, scale = weight + k * 2 * hidden * d, scale + k * 2 * hidden
    first = tl.program_id(1) * BLOCK_N
    x, out = x + row * d, out + row * hidden
    swiglu_product(weight, scale, first, hidden, x, r < R, norm + k * d, out, d, eps, BLOCK_N, BLOCK_R, BLOCK_K)


@triton.jit(do_not_specialize=["R", "rows"])
def _attend_kernel(
    q,  # [K, R, heads * head_dim]
    keys,  # [K, rows, kv_heads, capacity, head_dim]
    values,
    index,  # [R]: a row's place among the rows of the cache, CROSS only
    mask,  # [rows, capacity], CROSS only
    frame,
    out,  # as q
    R,
    rows,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    capacity,
    head_dim: tl.constexpr,
    factor,
    CROSS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One head of one row: softmax(q keys * factor) values, over the prompt's tokens or the frames so far."""
    k = tl.program_id(1).to(tl.int64)
    r, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    e = tl.arange(0, BLOCK_E)
    in_e = e < head_dim
    here = ((k * R + r) * heads + head) * head_dim + e
    query = tl.load(q + here, mask=in_e, other=0.0) * factor
    if CROSS:
        row, length = tl.load(index + r), capacity
    else:
        row, length = r, tl.load(frame).to(tl.int32) + 1
    start = ((k * rows + row) * kv_heads + head // (heads // kv_heads)) * capacity * head_dim

    # A finite start: a tile of padding alone leaves it, its weights and its sums as they were or multiplied by zero.
    top = tl.full((), -1e30, tl.float32)
    norm = tl.zeros((), tl.float32)
    mixed = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, length, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        seen = t < length
        if CROSS:
            seen = seen & tl.load(mask + row * capacity + t, mask=seen, other=False)
        place = start + t[:, None] * head_dim + e[None, :]
        inside = seen[:, None] & in_e[None, :]
        key = tl.load(keys + place, mask=inside, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(key * query[None, :], axis=1), -float("inf"))
        larger = tl.maximum(top, tl.max(score, axis=0))
        weight, old = tl.exp(score - larger), tl.exp(top - larger)
        value = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
        mixed = mixed * old + tl.sum(value * weight[:, None], axis=0)
        norm, top = norm * old + tl.sum(weight, axis=0), larger
    tl.store(out + here, mixed / norm, mask=in_e)


@triton.jit(do_not_specialize=["R"])
def _norm_kernel(x, weight, out, R, d, eps, BLOCK_D: tl.constexpr):
    """out = norm(x), one row a program."""
    k, r = tl.program_id(1).to(tl.int64), tl.program_id(0)
    c = tl.arange(0, BLOCK_D)
    place = (k * R + r) * d + c
    value = tl.load(x + place, mask=c < d, other=0.0)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / d + eps)
    tl.store(out + place, value * scale * tl.load(weight + k * d + c, mask=c < d, other=0.0), mask=c < d)


def launch(
    inputs: torch.Tensor,
    frame: torch.Tensor,
    positions: torch.Tensor,
    prompt_keys: torch.Tensor,
    prompt_values: torch.Tensor,
    prompt_mask: torch.Tensor,
    prompt_index: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    heads: int,
    eps: float,
) -> torch.Tensor:
    """Run the kernels of one step. Arguments as in `backbone_step`, checked there."""
    w = dict(zip(WEIGHTS, weights, strict=True))
    s = dict(zip(MATRICES, scales, strict=True)) if scales else w  # without int8 the kernels read no scale
    K, R, d = inputs.shape
    L, _, _, kv_heads, capacity, head_dim = keys.shape
    U, P = prompt_mask.shape
    kv, hidden = kv_heads * head_dim, w["down"].shape[-1]
    x = inputs.clone()
    q, mixed, h = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    act = x.new_empty(K, R, hidden)
    factor = head_dim**-0.5

    def tiled(rows: int) -> tuple[tuple[int, int, int], dict[str, int]]:
        """The grid over a matrix of so many rows an expert, and the sizes of its tiles."""
        sizes = tile_sizes(w["qkv"], R)
        return (triton.cdiv(R, sizes["BLOCK_R"]), triton.cdiv(rows, sizes["BLOCK_N"]), K), sizes

    heads_grid = (R * heads, K)
    keys_at_once = {"BLOCK_T": BLOCK_T, "BLOCK_E": triton.next_power_of_2(head_dim), "num_warps": 8, **all_registers()}
    for i in range(L):
        grid, sizes = tiled(d)
        _query_kernel[grid](
            x, frame, positions, w["cross_norm"][i], w["cross_query"][i], s["cross_query"][i],
            w["cross_query_bias"][i], q, R, d, eps, **sizes,
        )  # fmt: skip
        _attend_kernel[heads_grid](
            q, prompt_keys[i], prompt_values[i], prompt_index, prompt_mask, frame, mixed,
            R, U, heads, heads, P, head_dim, factor, CROSS=True, **keys_at_once,
        )  # fmt: skip
        _output_kernel[grid](
            x, frame, positions, mixed, w["cross_output"][i], s["cross_output"][i], w["cross_output_bias"][i],
            R, d, d, SHIFT=True, BIAS=True, **sizes,
        )  # fmt: skip
        qkv_grid, qkv_sizes = tiled(d + 2 * kv)
        _qkv_kernel[qkv_grid](
            x, frame, w["self_norm"][i], w["qkv"][i], s["qkv"][i], q, keys[i], values[i],
            R, d, kv, head_dim, capacity, eps, **qkv_sizes,
        )  # fmt: skip
        _attend_kernel[heads_grid](
            q, keys[i], values[i], prompt_index, prompt_mask, frame, mixed,
            R, R, heads, kv_heads, capacity, head_dim, factor, CROSS=False, **keys_at_once,
        )  # fmt: skip
        _output_kernel[grid](
            x, frame, positions, mixed, w["self_output"][i], s["self_output"][i], x,
            R, d, d, SHIFT=False, BIAS=False, **sizes,
        )  # fmt: skip
        ffn_grid, ffn_sizes = tiled(hidden)
        _swiglu_kernel[ffn_grid](
            x, w["ffn_norm"][i], w["gate_value"][i], s["gate_value"][i], act, R, d, hidden, eps, **ffn_sizes
        )
        _output_kernel[grid](
            x, frame, positions, act, w["down"][i], s["down"][i], x, R, d, hidden, SHIFT=False, BIAS=False, **sizes
        )
    _norm_kernel[(R, K)](x, w["final_norm"], h, R, d, eps, BLOCK_D=triton.next_power_of_2(d))
    return h


@library.custom_op("siren::backbone_step", mutates_args=("keys", "values"))
def backbone_step(
    inputs: torch.Tensor,
    frame: torch.Tensor,
    positions: torch.Tensor,
    prompt_keys: torch.Tensor,
    prompt_values: torch.Tensor,
    prompt_mask: torch.Tensor,
    prompt_index: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    heads: int,
    eps: float,
) -> torch.Tensor:
    """Backbone outputs h [K, R, d] of one frame; its keys and values are written into the cache.

    inputs float32 [K, R, d]: embedding sums of the frame before. frame int64, one number: its place in the cache,
    which the caller keeps below `capacity`. positions float32 [>= capacity, d]. prompt_keys, prompt_values
    [L, K, U, heads, P, head_dim]; prompt_mask bool [U, P], True = token; prompt_index int32 [R]: which prompt is a
    row's. keys, values [L, K, R, kv_heads, capacity, head_dim], the cache, in the dtype of the prompt's. weights: see
    WEIGHTS; norms and biases float32; matrices float32, bfloat16 or int8, then with `scales` in the order of MATRICES.

    For inference: it has no gradient. Raises ValueError naming the argument that does not fit.
    """
    sizes: dict[str, int] = {}
    for name, tensor, dims, dtypes in (
        ("inputs", inputs, "K R d", FLOAT),
        ("frame", frame.reshape(-1), "1", WHOLE),
        ("keys", keys, "L K R kv_heads capacity head_dim", TABLE),
        ("values", values, "L K R kv_heads capacity head_dim", (keys.dtype,)),
        ("prompt_mask", prompt_mask, "U P", (torch.bool,)),
        ("prompt_index", prompt_index, "R", (torch.int32,)),
        ("prompt_keys", prompt_keys, "L K U heads P head_dim", (keys.dtype,)),
        ("prompt_values", prompt_values, "L K U heads P head_dim", (keys.dtype,)),
        ("positions", positions, "frames d", FLOAT),
    ):
        check_tensor(sizes, inputs.device, name, tensor, dims, dtypes)
    check_weights(sizes, inputs.device, WEIGHTS, MATRICES, weights, scales)
    width = heads * sizes["head_dim"]
    n = width + 2 * sizes["kv_heads"] * sizes["head_dim"]
    if sizes["heads"] != heads or sizes["d"] != width or heads % sizes["kv_heads"] or sizes["n"] != n:
        raise ValueError(f"{heads} heads do not fit: {sizes}")
    if sizes["frames"] < sizes["capacity"]:
        raise ValueError(f"positions has {sizes['frames']} rows for a cache of {sizes['capacity']} frames")
    return launch(
        inputs, frame, positions, prompt_keys, prompt_values, prompt_mask, prompt_index, keys, values,
        weights, scales, heads, eps,
    )  # fmt: skip


@backbone_step.register_fake
def _(inputs: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(inputs)
