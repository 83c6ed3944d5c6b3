"""All residual decoders and draws of a frame in one launch: a persistent kernel, one program a multiprocessor.

The phases are those of residual_frame.py. In each, program p takes tiles p, p + P, p + 2 P... of P programs; between
phases all wait for one another at a barrier in device memory, an integer that only grows. There are 4 L + 2 barriers
a code and one at the start, where launching kernels instead would cost each its drain and its ramp. The launch is
cooperative: the driver refuses it unless all programs are resident, so that none waits for one that cannot start.

One barrier a code more than the small kernels have launches: there the last program of the head draws, here every
program may draw rows of its own, which are drawn side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .draw import draw, embed, gumbel
from .interpreter import INTERPRETED
from .linear import tile_sizes
from .residual_tiles import down_tile, output_tile, qkv_tile, step_rows, swiglu_tile
from .sample_heads import CONDITIONINGS, float64_bits, head_tile


@triton.jit
def barrier(arrivals, target):
    """Wait until `target` programs in all have arrived here; what they wrote before is seen after."""
    tl.debug_barrier()
    tl.atomic_add(arrivals, 1, sem="release")
    while tl.atomic_add(arrivals, 0, sem="acquire") < target:  # the compiler makes it an acquiring load
        pass
    tl.debug_barrier()


# As a constant, a batch of 1 lets the compiler compute more ahead than the registers hold.
@triton.jit(do_not_specialize=["B", "R", "top_k", "top_p"])
def _residual_kernel(
    h,
    start,
    seeds,
    frames,
    attention_norm,
    qkv,
    output,
    ffn_norm,
    gate_value,
    down,
    final_norm,
    heads_weight,
    tables,
    positions,
    qkv_scale,
    output_scale,
    gate_value_scale,
    down_scale,
    heads_scale,
    condition,
    total,
    x,
    q,
    keys,
    values,
    act,
    noise,
    codes,
    logprobs,
    logits,
    arrivals,
    K: tl.constexpr,
    B,
    R,
    L: tl.constexpr,
    J: tl.constexpr,
    V: tl.constexpr,
    d: tl.constexpr,
    kv: tl.constexpr,
    hidden: tl.constexpr,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    factor,
    eps,
    temperature,
    top_k,
    top_p,
    guidance,
    GUIDED: tl.constexpr,
    BLOCKS: tl.constexpr,  # whether there are decoder blocks; without them the heads read h
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    CONDITIONING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    target = programs
    m: tl.constexpr = J // K
    n_all: tl.constexpr = d + 2 * kv
    one = tl.full((), 1, tl.int64)  # offsets into stacked weights pass 2^31

    v = tl.arange(0, BLOCK_V)
    if not GREEDY:
        for tile in range(program, B * J, programs):
            b, j = tile // J, tile % J
            tl.store(noise + tile * V + v, gumbel(tl.load(seeds + b), tl.load(frames + b), j, BLOCK_V), mask=v < V)
    c = tl.arange(0, BLOCK_D)
    for first in range(program * BLOCK_D, K * R * d, programs * BLOCK_D):
        here = first + c
        tl.store(condition + here, tl.load(start + here, mask=here < K * R * d), mask=here < K * R * d)
        tl.store(total + here, tl.zeros((BLOCK_D,), tl.float32), mask=here < K * B * d)
    barrier(arrivals, target)

    for j in range(J):
        k, at = j // m * one, j * one
        first, rows = j % m + 1, R
        if j % m == 0:
            first, rows = 0, 2 * R
        tall = tl.cdiv(rows, BLOCK_R)  # tiles over the rows of activations
        for block in range(L):
            layer = block * K + k
            layer_keys, layer_values = keys + block * (m + 1) * R * kv, values + block * (m + 1) * R * kv
            for tile in range(program, tall * tl.cdiv(n_all, BLOCK_N), programs):
                i = tile % tall * BLOCK_R + tl.arange(0, BLOCK_R)
                n = tile // tall * BLOCK_N + tl.arange(0, BLOCK_N)
                entry, shift = step_rows(h, condition, x, positions, k, block, first, i, R, d)
                qkv_tile(
                    entry, shift, i < rows, i, n, attention_norm + layer * d, qkv + layer * n_all * d,
                    qkv_scale + layer * n_all, q, layer_keys, layer_values, first, R, d, kv, head_dim, eps,
                    BLOCK_N, BLOCK_R, BLOCK_K,
                )  # fmt: skip
            target += programs
            barrier(arrivals, target)
            for tile in range(program, tall * tl.cdiv(d, BLOCK_N), programs):
                i = tile % tall * BLOCK_R + tl.arange(0, BLOCK_R)
                n = tile // tall * BLOCK_N + tl.arange(0, BLOCK_N)
                entry, shift = step_rows(h, condition, x, positions, k, block, first, i, R, d)
                output_tile(
                    entry, shift, i < rows, i, n, output + layer * d * d, output_scale + layer * d, q, layer_keys,
                    layer_values, x, first, R, d, heads, kv, head_dim, factor, BLOCK_N, BLOCK_R, BLOCK_K, BLOCK_E,
                )  # fmt: skip
            target += programs
            barrier(arrivals, target)
            for tile in range(program, tall * tl.cdiv(hidden, BLOCK_N), programs):
                i = tile % tall * BLOCK_R + tl.arange(0, BLOCK_R)
                swiglu_tile(
                    x, i < rows, i, tile // tall * BLOCK_N, ffn_norm + layer * d, gate_value + layer * 2 * hidden * d,
                    gate_value_scale + layer * 2 * hidden, act, d, hidden, eps, BLOCK_N, BLOCK_R, BLOCK_K,
                )  # fmt: skip
            target += programs
            barrier(arrivals, target)
            for tile in range(program, tall * tl.cdiv(d, BLOCK_N), programs):
                i = tile % tall * BLOCK_R + tl.arange(0, BLOCK_R)
                n = tile // tall * BLOCK_N + tl.arange(0, BLOCK_N)
                down_tile(
                    x, i < rows, i, n, down + layer * d * hidden, down_scale + layer * d, act, d, hidden,
                    BLOCK_N, BLOCK_R, BLOCK_K,
                )  # fmt: skip
            target += programs
            barrier(arrivals, target)

        latest = x + (rows - R) * d if BLOCKS else h + k * R * d
        wide = tl.cdiv(B, BLOCK_R)
        for tile in range(program, wide * tl.cdiv(V, BLOCK_N), programs):
            b = tile % wide * BLOCK_R + tl.arange(0, BLOCK_R)
            row = latest + b * d
            head_tile(
                heads_weight + at * V * d, heads_scale + at * V, final_norm + k * d, row, row + B * d, b < B,
                tile // wide * BLOCK_N + tl.arange(0, BLOCK_N), V, logits + (b * J + j) * V, d, eps, guidance,
                BLOCKS, GUIDED, BLOCK_N, BLOCK_R, BLOCK_K,
            )  # fmt: skip
        target += programs
        barrier(arrivals, target)
        for tile in range(program, B, programs):
            b = tile + tl.arange(0, 1)
            here = b * J + j
            code, logprob = draw(
                logits + here * V, b < B, noise + here * V, codes + here, V, temperature, top_k, top_p,
                GREEDY, TOP_K, TOP_P, False, BLOCK_V,
            )  # fmt: skip
            tl.store(codes + here, code.to(tl.int64))
            tl.store(logprobs + here, logprob)
            embed(
                code, b.to(tl.int64), b < B, tables + at * V * d, J * V * d, total, start, condition,
                K, B, R, d, CONDITIONING, BLOCK_D,
            )  # fmt: skip
        target += programs
        barrier(arrivals, target)


def launch(
    h: torch.Tensor,
    start: torch.Tensor,
    seeds: torch.Tensor,
    frames: torch.Tensor,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    heads: int,
    conditioning: str,
    temperature: float,
    top_k: int,
    top_p: float,
    guidance: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the kernel. Arguments as in `residual_frame.residual_frame`, checked there."""
    qkv, gate_value, head = weights[1], weights[4], weights[7]
    (K, R, d), B, L = h.shape, len(seeds), len(qkv)
    J, V, _ = head.shape
    kv, hidden, m = (qkv.shape[2] - d) // 2, gate_value.shape[2] // 2, J // K
    noise = h.new_empty(B if temperature else 0, J, V)
    codes = torch.empty(B, J, dtype=torch.int64, device=h.device)
    logprobs, logits, total, condition = (h.new_empty(shape) for shape in ((B, J), (B, J, V), (K, B, d), (K, R, d)))
    x, q, act = h.new_empty(2 * R, d), h.new_empty(2 * R, d), h.new_empty(2 * R, hidden)
    keys, values = h.new_empty(2, L, m + 1, R, kv).unbind(0)
    arrivals = torch.zeros(1, dtype=torch.int32, device=h.device)
    head_dim = d // heads
    # The smallest tiles of activations, and of weights no more than 64 columns: its many addresses fill the registers.
    sizes = {**tile_sizes(qkv, 1), "num_warps": 8, "num_stages": 3}
    sizes["BLOCK_K"] = min(sizes["BLOCK_K"], 64)
    resident = {} if INTERPRETED.value else {"launch_cooperative_grid": True}
    _residual_kernel[(programs(h.device),)](
        h, start, seeds, frames, *weights, *(scales or [h] * 5), condition, total, x, q, keys, values, act, noise,
        codes, logprobs, logits, arrivals,
        K, B, R, L, J, V, d, kv, hidden, heads, head_dim, head_dim**-0.5, eps,
        temperature, top_k, float64_bits(top_p), guidance,
        GUIDED=R != B, BLOCKS=L > 0, GREEDY=temperature == 0, TOP_K=top_k > 0, TOP_P=top_p < 1,
        CONDITIONING=CONDITIONINGS.index(conditioning), BLOCK_E=triton.next_power_of_2(head_dim),
        BLOCK_V=max(4, triton.next_power_of_2(V)), BLOCK_D=1024, **sizes, **resident,
    )  # fmt: skip
    return codes, logprobs, total, logits


def programs(device: torch.device) -> int:
    """One a multiprocessor. The interpreter runs programs one after another, where none can wait for the next."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
