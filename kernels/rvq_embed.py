"""Summed embeddings of RVQ codes: the backbone input x_t of every expert from the codes of the frame before.

    sums[k, b, t, :] = sum over codebooks j of tables[k, j, codes[b, j, t], :]

tables  [K, J, V, d]  float; expert k's embedding of codebook j, its two linear maps folded in (biases too)
codes   [B, J, T]     int32 or int64, any strides
sums    [K, B, T, d]  float32; J terms added in float32 in the order of j, so equal to the reference bit for bit

One program gathers BLOCK_N frames x BLOCK_D channels of one expert: J reads of a row, one write. Memory bound, nothing
is reused, and a table row is read only where a code asks for it. Left out: the backward pass (training projects the
tables instead) and a fused first norm. It compiles for sm_80 and sm_90 but has run in Triton's interpreter only, not
yet on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def rvq_embed_reference(tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch, one codebook after another; the contract."""
    _check(tables, codes)
    K, J, _, d = tables.shape
    B, _, T = codes.shape
    sums = torch.zeros(K, B, T, d, dtype=torch.float32, device=tables.device)
    for j in range(J):
        sums += tables[:, j, codes[:, j].long()].float()
    return sums


@triton.jit
def _rvq_embed_kernel(
    tables,
    codes,
    sums,
    N,  # frames in all: B * T
    T,
    V,
    d,
    code_stride_b,
    code_stride_j,
    code_stride_t,
    J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # 64 bits throughout: K * J * V * d and K * N * d pass 2^31 for sizes a user may have.
    k = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_n, in_d = n < N, c < d
    code = codes + (n // T) * code_stride_b + (n % T) * code_stride_t

    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for j in range(J):
        q = tl.load(code + j * code_stride_j, mask=in_n, other=0).to(tl.int64)
        inside = (q >= 0) & (q < V)
        row = tables + ((k * J + j) * V + tl.where(inside, q, 0)) * d
        values = tl.load(row[:, None] + c[None, :], mask=(in_n & inside)[:, None] & in_d[None, :], other=0.0)
        total += tl.where(inside[:, None], values.to(tl.float32), float("nan"))

    out = sums + (k * N + n[:, None]) * d + c[None, :]
    tl.store(out, total, mask=in_n[:, None] & in_d[None, :])


def rvq_embed(tables: torch.Tensor, codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sums [K, B, T, d] in float32 of tables [K, J, V, d] at codes [B, J, T]; written to `out` if it is given.

    A code outside 0..V-1 never reads outside the table. On CPU tensors it is a ValueError; on a GPU, where looking at
    the codes would make the host wait, the sums of its frame are NaN. Other wrong arguments raise ValueError or
    TypeError naming the argument and what it should be. No gradient flows through this operation.
    """
    _check(tables, codes)
    K, J, V, d = tables.shape
    B, _, T = codes.shape
    shape = (K, B, T, d)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=tables.device)
    elif out.shape != shape or out.dtype != torch.float32 or out.device != tables.device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous float32 {list(shape)} on {tables.device}, not {out.dtype} {list(out.shape)} "
            f"on {out.device}, strides {out.stride()}"
        )
    N = B * T
    if out.numel() == 0:
        return out
    block_d = min(triton.next_power_of_2(d), 256)
    block_n = min(triton.next_power_of_2(N), 8)  # decoding has N = B, where programs are scarce; more rows only in bulk
    grid = (triton.cdiv(N, block_n), triton.cdiv(d, block_d), K)
    _rvq_embed_kernel[grid](tables, codes, out, N, T, V, d, *codes.stride(), J=J, BLOCK_N=block_n, BLOCK_D=block_d)
    return out


def _check(tables: torch.Tensor, codes: torch.Tensor) -> None:
    if tables.ndim != 4 or not tables.is_floating_point():
        raise ValueError(f"tables must be float [K, J, V, d], not {tables.dtype} {list(tables.shape)}")
    if not tables.is_contiguous():
        raise ValueError(f"tables must be contiguous, not strides {tables.stride()}: call .contiguous() once")
    J, V = tables.shape[1:3]
    if codes.ndim != 3 or codes.shape[1] != J:
        raise ValueError(f"codes must be [B, J={J}, T] as tables are {list(tables.shape)}, not {list(codes.shape)}")
    if codes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"codes must be int32 or int64, not {codes.dtype}")
    if codes.device != tables.device:
        raise ValueError(f"codes must be on {tables.device} as tables are, not on {codes.device}")
    if codes.device.type == "cpu" and codes.numel() and (codes.min() < 0 or codes.max() >= V):
        raise ValueError(f"codes must be 0..{V - 1}, not {int(codes.min())}..{int(codes.max())}")
