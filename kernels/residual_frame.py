"""Everything of a frame after the backbones: the residual decoders of all experts and their draws.

    for expert k, for code j of its m:
        position 0 is h[k], position 1 + i is start[k] + what is known of the frame before code i  (paper, eq. 4 and 5)
        decoder blocks over the positions so far, final norm, head j, draw, embeddings of the drawn code added

K experts of m codebooks, J = K m, L blocks, V codes a codebook, B sequences, R rows: B, or 2 B with guidance. Weights
are stacked in the order of `WEIGHTS`. There are two ways to run it, of the same device functions (residual_tiles.py,
draw.py): as 4 L + 1 small kernels for each code, or as one persistent kernel (residual_persistent.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import library

from . import residual_persistent, sample_heads
from .checks import FLOAT, WHOLE, check_tensor, check_weights
from .gumbel_noise import gumbel_noise_reference
from .gumbel_noise import launch as launch_noise
from .linear import tile_sizes
from .residual_tiles import down_tile, output_tile, qkv_tile, step_rows, swiglu_tile

WEIGHTS = {  # kv = kv_heads * head_dim, n = d + 2 kv
    "attention_norm": "L K d",
    "qkv": "L K n d",  # rows [q | k | v]
    "output": "L K d d",
    "ffn_norm": "L K d",
    "gate_value": "L K 2*hidden d",  # rows [gate | value]
    "down": "L K d hidden",
    "final_norm": "K d",
    "heads": "J V d",
    "tables": "K J V d",  # each expert's embeddings of all codes
    "positions": "p d",  # p = m + 1
}
MATRICES = ("qkv", "output", "gate_value", "down", "heads")


def residual_frame_reference(
    h: torch.Tensor,
    start: torch.Tensor,
    seeds: torch.Tensor,
    frames: torch.Tensor,
    forced: torch.Tensor | None,
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
    """The same in plain PyTorch, in the dtype of h (float64 for an exact answer); the contract."""
    w = dict(zip(WEIGHTS, weights, strict=True))
    if scales:
        w.update({name: w[name].to(h.dtype) * s.unsqueeze(-1) for name, s in zip(MATRICES, scales, strict=True)})
    w = {name: tensor.to(h.dtype) for name, tensor in w.items()}
    (K, _, d), B, (J, V, _), L = h.shape, len(seeds), w["heads"].shape, len(w["qkv"])
    kv = (w["qkv"].shape[2] - d) // 2 if L else d
    head_dim = d // heads
    noise = None
    if temperature and forced is None:
        noise = gumbel_noise_reference(seeds, frames, J, V)
    total, condition = torch.zeros(K, B, d, device=h.device), start.float().clone()
    codes = torch.empty(B, J, dtype=torch.int64, device=h.device)
    logprobs, logits = torch.empty(B, J, device=h.device), torch.empty(B, J, V, dtype=h.dtype, device=h.device)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    def split_heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    for k in range(K):
        rows = [h[k]]
        for j in range(k * (J // K), (k + 1) * (J // K)):
            rows.append(condition[k].to(h.dtype))
            x = torch.stack(rows, dim=1)  # [R, positions, d]
            for i in range(L):
                x = x + w["positions"][: x.shape[1]]
                qkv = norm(x, w["attention_norm"][i, k]) @ w["qkv"][i, k].T
                q, key, value = (split_heads(part) for part in qkv.split((d, kv, kv), -1))
                mixed = torch.nn.functional.scaled_dot_product_attention(
                    q, key, value, is_causal=True, enable_gqa=kv != d
                )
                x = x + mixed.transpose(1, 2).flatten(2) @ w["output"][i, k].T
                gate, up = (norm(x, w["ffn_norm"][i, k]) @ w["gate_value"][i, k].T).chunk(2, -1)
                x = x + (torch.nn.functional.silu(gate) * up) @ w["down"][i, k].T
            codes[:, j], logprobs[:, j], logits[:, j] = sample_heads.sample_heads_reference(
                x[:, -1] if L else h[k], w["final_norm"][k] if L else None, w["heads"][j], None,
                None if noise is None else noise[:, j], None if forced is None else forced[:, j], w["tables"][:, j],
                total, start, condition, conditioning, temperature, top_k, top_p, guidance, eps,
            )  # fmt: skip
    return codes, logprobs, total, logits


@triton.jit(do_not_specialize=["k", "block", "first", "R", "rows"])
def _qkv_kernel(
    h,
    condition,
    x,
    positions,
    norm,
    weight,
    scale,
    q,
    keys,
    values,
    k,
    block,
    first,
    R,
    rows,
    d: tl.constexpr,
    kv: tl.constexpr,
    head_dim: tl.constexpr,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry, shift = step_rows(h, condition, x, positions, k, block, first, i, R, d)
    qkv_tile(
        entry, shift, i < rows, i, n, norm, weight, scale, q, keys, values, first, R, d, kv, head_dim, eps,
        BLOCK_N, BLOCK_R, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["k", "block", "first", "R", "rows"])
def _output_kernel(
    h,
    condition,
    x,
    positions,
    weight,
    scale,
    q,
    keys,
    values,
    k,
    block,
    first,
    R,
    rows,
    d: tl.constexpr,
    heads: tl.constexpr,
    kv: tl.constexpr,
    head_dim: tl.constexpr,
    factor,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry, shift = step_rows(h, condition, x, positions, k, block, first, i, R, d)
    output_tile(
        entry, shift, i < rows, i, n, weight, scale, q, keys, values, x, first, R, d, heads, kv, head_dim, factor,
        BLOCK_N, BLOCK_R, BLOCK_K, BLOCK_E,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _swiglu_kernel(
    x,
    norm,
    weight,
    scale,
    act,
    rows,
    d: tl.constexpr,
    hidden: tl.constexpr,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_N
    swiglu_tile(x, i < rows, i, column, norm, weight, scale, act, d, hidden, eps, BLOCK_N, BLOCK_R, BLOCK_K)


@triton.jit(do_not_specialize=["rows"])
def _down_kernel(
    x,
    weight,
    scale,
    act,
    rows,
    d: tl.constexpr,
    hidden: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    down_tile(x, i < rows, i, n, weight, scale, act, d, hidden, BLOCK_N, BLOCK_R, BLOCK_K)


def launch(
    h: torch.Tensor,
    start: torch.Tensor,
    seeds: torch.Tensor,
    frames: torch.Tensor,
    forced: torch.Tensor | None,
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
    """Run the small kernels. Arguments as in `residual_frame`, checked there."""
    w = dict(zip(WEIGHTS, weights, strict=True))
    s = dict(zip(MATRICES, scales, strict=True)) if scales else w  # without int8 the kernels read no scale
    (K, R, d), B, L = h.shape, len(seeds), len(w["qkv"])
    J, V, _ = w["heads"].shape
    m, head_dim, hidden = J // K, d // heads, w["down"].shape[-1]
    kv = (w["qkv"].shape[2] - d) // 2
    condition, total = start.clone(), h.new_zeros(K, B, d)
    x, q, act = h.new_empty(2 * R, d), h.new_empty(2 * R, d), h.new_empty(2 * R, hidden)
    keys, values = h.new_empty(2, L, m + 1, R, kv).unbind(0)
    codes = torch.empty(B, J, dtype=torch.int64, device=h.device) if forced is None else forced.clone()
    logprobs, logits = h.new_empty(B, J), h.new_empty(B, J, V)
    count = torch.zeros(B, dtype=torch.int32, device=h.device)
    noise = launch_noise(seeds, frames, J, V) if temperature and forced is None else None

    def tiled(matrix_rows: int, rows: int) -> tuple[tuple[int, int], dict[str, int]]:
        sizes = tile_sizes(w["qkv"], rows)
        return (triton.cdiv(rows, sizes["BLOCK_R"]), triton.cdiv(matrix_rows, sizes["BLOCK_N"])), sizes

    for j in range(J):
        k, code = j // m, j % m
        first, rows = (code + 1, R) if code else (0, 2 * R)
        for i in range(L):
            grid, sizes = tiled(d + 2 * kv, rows)
            _qkv_kernel[grid](
                h, condition, x, w["positions"], w["attention_norm"][i, k], w["qkv"][i, k], s["qkv"][i, k],
                q, keys[i], values[i], k, i, first, R, rows, d, kv, head_dim, eps, **sizes,
            )  # fmt: skip
            grid, sizes = tiled(d, rows)
            _output_kernel[grid](
                h, condition, x, w["positions"], w["output"][i, k], s["output"][i, k], q, keys[i], values[i],
                k, i, first, R, rows, d, heads, kv, head_dim, head_dim**-0.5,
                BLOCK_E=triton.next_power_of_2(head_dim), **sizes,
            )  # fmt: skip
            grid, sizes = tiled(hidden, rows)
            _swiglu_kernel[grid](
                x, w["ffn_norm"][i, k], w["gate_value"][i, k], s["gate_value"][i, k], act, rows, d, hidden, eps,
                **sizes,
            )  # fmt: skip
            grid, sizes = tiled(d, rows)
            _down_kernel[grid](x, w["down"][i, k], s["down"][i, k], act, rows, d, hidden, **sizes)
        sample_heads.launch(
            x[rows - R : rows] if L else h[k], w["final_norm"][k] if L else None, w["heads"][j],
            s["heads"][j] if scales else None, None if noise is None else noise[:, j],
            None if forced is None else codes[:, j], w["tables"][:, j], total, start, condition, conditioning,
            temperature, top_k, top_p, guidance, eps, codes[:, j], logprobs[:, j], logits[:, j], count,
        )  # fmt: skip
    return codes, logprobs, total, logits


@library.custom_op("siren::residual_frame", mutates_args=())
def residual_frame(
    h: torch.Tensor,
    start: torch.Tensor,
    seeds: torch.Tensor,
    frames: torch.Tensor,
    forced: torch.Tensor | None,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    heads: int,
    conditioning: str,
    temperature: float,
    top_k: int,
    top_p: float,
    guidance: float,
    eps: float,
    persistent: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One frame's codes int64 [B, J], log-probabilities float32 [B, J], sums of the codes' embeddings float32
    [K, B, d] (the next frame's backbone inputs) and logits float32 [B, J, V].

    h, start float32 [K, R, d]: backbone outputs and what the conditions are added to; R = B, or 2 B with guidance,
    conditional rows first. seeds int64 [B], the bits of the unsigned seeds; frames int64 [B], which the noise depends
    on. forced int64 [B, J] takes these codes instead of drawing. weights: see WEIGHTS; norms and positions float32,
    matrices float32, bfloat16 or int8, then with `scales` in the order of MATRICES; tables not int8. conditioning:
    "none", "residual" or "accumulated". persistent: in one launch; it draws, it does not take codes.

    A row of logits with NaN, plus infinity or nothing finite gets code 0 and log-probability NaN. For inference: it
    has no gradient. Raises ValueError naming the argument that does not fit.
    """
    sizes = {"B": len(seeds)}
    for name, tensor, dims, dtypes in (
        ("h", h, "K R d", FLOAT),
        ("start", start, "K R d", FLOAT),
        ("seeds", seeds, "B", WHOLE),
        ("frames", frames, "B", WHOLE),
    ):
        check_tensor(sizes, h.device, name, tensor, dims, dtypes)
    check_weights(sizes, h.device, WEIGHTS, MATRICES, weights, scales)
    check_tensor(sizes, h.device, "forced", forced, "B J", WHOLE)
    K, R, d, J, V, L = (sizes[name] for name in ("K", "R", "d", "J", "V", "L"))
    if R not in (len(seeds), 2 * len(seeds)):
        raise ValueError(f"h must have a row for each of {len(seeds)} sequences, or two with guidance, not {R}")
    if J % K or sizes["p"] != J // K + 1 or d % heads:
        raise ValueError(f"{J} codebooks, {K} experts, {sizes['p']} positions, dim {d} and {heads} heads do not fit")
    if L and ((sizes["n"] - d) % (2 * (d // heads)) or heads * (d // heads) % ((sizes["n"] - d) // 2)):
        raise ValueError(f"qkv has {sizes['n']} rows, which {heads} heads of {d // heads} do not fit")
    if max(len(seeds) * J * V, 2 * R * max(2 * sizes["hidden"], sizes["n"])) >= 1 << 31:
        raise ValueError(f"{len(seeds)} sequences are too many for one call")
    if V > sample_heads.MOST_CODES:
        raise ValueError(f"heads have {V} rows; a draw holds at most {sample_heads.MOST_CODES} logits")
    if conditioning not in sample_heads.CONDITIONINGS:
        raise ValueError(f"conditioning must be one of {', '.join(sample_heads.CONDITIONINGS)}, not {conditioning!r}")
    if persistent and forced is not None:
        raise ValueError("forced codes need persistent=False")
    if forced is not None and forced.device.type == "cpu" and not bool(((forced >= 0) & (forced < V)).all()):
        raise ValueError(f"forced codes must be from 0 to {V - 1}")
    arguments = (weights, scales, heads, conditioning, temperature, top_k, top_p, guidance, eps)
    if persistent:
        return residual_persistent.launch(h, start, seeds, frames, *arguments)
    return launch(h, start, seeds, frames, forced, *arguments)


@residual_frame.register_fake
def _(
    h: torch.Tensor, start: torch.Tensor, seeds: torch.Tensor, frames: torch.Tensor, forced: object,
    weights: list[torch.Tensor], *_: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    B, (J, V, d) = len(seeds), weights[list(WEIGHTS).index("heads")].shape
    codes = torch.empty(B, J, dtype=torch.int64, device=h.device)
    return codes, h.new_empty(B, J), h.new_empty(len(h), B, d), h.new_empty(B, J, V)
