"""Summed embeddings of RVQ codes: the backbone input x_t of every expert from the codes of the frame before.

    sums[k, b, t, :]     = sum over codebooks j of tables[k, j, codes[b, j, t], :]
    d_tables[k, j, v, :] = sum over frames (b, t) with codes[b, j, t] = v of d_sums[k, b, t, :]

tables  [K, J, V, d]  float32, bfloat16 or float16; expert k's embedding of codebook j (`project_tables` makes them). A
                      row is contiguous and rows follow one another; tables[:, :j] or tables[k : k + 1] needs no copy
codes   [B, J, T]     int32 or int64, any strides
sums    [K, B, T, d]  float32; J terms added in float32 in the order of j, so equal to the reference bit for bit

Forward: one program gathers BLOCK_N frames x BLOCK_D channels of one expert, J reads of a row and one write. Backward:
the frames of each codebook are sorted by code, and one program sums the rows of one code, so every element of d_tables
is written once, in an order that only the codes decide; no atomics. Programs that run at the same time share one
expert's BLOCK_D channels, which for 7200 frames are 7 MB: d_sums is meant to come from memory once, not J times.

Left out: a fused first norm, and splitting the frames of one code among programs (a code in every frame is summed by
one program a channel block, 16 rows at a time).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import library

from .interpreter import round_to

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rvq_embed_reference(tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch, one codebook after another; the contract. Differentiable in the tables."""
    _check(tables, codes)
    _check_values(tables, codes)
    K, J, _, d = tables.shape
    B, _, T = codes.shape
    sums = torch.zeros(K, B, T, d, dtype=torch.float32, device=tables.device)
    for j in range(J):
        sums = sums + tables[:, j, codes[:, j].long()].float()
    return sums


def project_tables(
    codebooks: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
) -> torch.Tensor:
    """Embeddings of all codes, E_kj(q) = Proj_kj(out_proj_j(Z_j[q])): [K, J, V, d], differentiable in everything.

    codebooks [J, V, c], out_weight [J, f, c] and out_bias [J, f] are the codec's; proj_weight [K, J, d, f] and
    proj_bias [K, J, d] the experts'. Both maps are linear, so they are folded first, and the work is that of V codes
    and not of B * T tokens. Raises ValueError where a shape does not fit.
    """
    if codebooks.ndim != 3:
        raise ValueError(f"codebooks must be [J, V, c], not {list(codebooks.shape)}")
    if proj_weight.ndim != 4:
        raise ValueError(f"proj_weight must be [K, J, d, f], not {list(proj_weight.shape)}")
    J, V, c = codebooks.shape
    K, _, d, f = proj_weight.shape
    shapes = {
        "out_weight": (out_weight, (J, f, c)),
        "out_bias": (out_bias, (J, f)),
        "proj_weight": (proj_weight, (K, J, d, f)),
        "proj_bias": (proj_bias, (K, J, d)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
    weight = proj_weight @ out_weight  # [K, J, d, c]
    bias = (proj_weight @ out_bias.unsqueeze(-1)).squeeze(-1) + proj_bias
    # One product over all K * J pairs that starts from the bias: the tables are written once and come out contiguous.
    codes = codebooks.expand(K, J, V, c).reshape(K * J, V, c)
    tables = torch.baddbmm(bias.reshape(K * J, 1, d), codes, weight.reshape(K * J, d, c).transpose(1, 2))
    return tables.view(K, J, V, d)


@triton.jit
def _rvq_embed_kernel(
    tables,
    codes,
    sums,
    N,  # frames in all: B * T
    T,
    V,
    d,
    table_stride_k,
    table_stride_j,
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
    table = tables + k * table_stride_k

    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for _ in range(J):
        q = tl.load(code, mask=in_n, other=0).to(tl.int64)
        inside = (q >= 0) & (q < V)
        row = table + tl.where(inside, q, 0) * d
        values = tl.load(row[:, None] + c[None, :], mask=(in_n & inside)[:, None] & in_d[None, :], other=0.0)
        total += tl.where(inside[:, None], values.to(tl.float32), float("nan"))
        code += code_stride_j
        table += table_stride_j

    out = sums + (k * N + n[:, None]) * d + c[None, :]
    tl.store(out, total, mask=in_n[:, None] & in_d[None, :])


@triton.jit
def _rvq_embed_backward_kernel(
    d_sums,
    frames,  # [J, N]: the frames of codebook j, by code and then by frame
    begins,  # [J, V + 1]: where the frames of code v begin in frames[j]
    d_tables,
    N,
    V,
    d,
    segments,  # J * V
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    k = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d = c < d
    j = segment // V
    start = tl.load(begins + segment + j)
    end = tl.load(begins + segment + j + 1)

    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    while start < end:  # not range: the interpreter of Triton 3.6 takes no bounds that are known at run time only
        inside = start + n < end
        frame = tl.load(frames + j * N + start + n, mask=inside, other=0)
        row = d_sums + (k * N + frame) * d
        total += tl.load(row[:, None] + c[None, :], mask=inside[:, None] & in_d[None, :], other=0.0)
        start += BLOCK_N

    d_row = round_to(tl.sum(total, axis=0), d_tables.dtype.element_ty)
    tl.store(d_tables + (k * segments + segment) * d + c, d_row, mask=in_d)


def _forward(tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Launch the forward kernel; the arguments have been checked."""
    K, J, V, d = tables.shape
    B, _, T = codes.shape
    N = B * T
    sums = torch.empty(K, B, T, d, dtype=torch.float32, device=tables.device)
    if sums.numel() == 0:
        return sums
    block_d = min(triton.next_power_of_2(d), 256)
    block_n = min(triton.next_power_of_2(N), 8)  # a single frame a sequence makes few programs; more rows only in bulk
    grid = (triton.cdiv(N, block_n), triton.cdiv(d, block_d), K)
    strides = (*tables.stride()[:2], *codes.stride())
    _rvq_embed_kernel[grid](tables, codes, sums, N, T, V, d, *strides, J=J, BLOCK_N=block_n, BLOCK_D=block_d)
    return sums


def _backward(d_sums: torch.Tensor, codes: torch.Tensor, V: int, dtype: torch.dtype) -> torch.Tensor:
    """Sort the codes and launch the backward kernel: d_tables [K, J, V, d] in `dtype`."""
    K, B, T, d = d_sums.shape
    J, N = codes.shape[1], B * T
    d_tables = torch.empty(K, J, V, d, dtype=dtype, device=d_sums.device)
    if d_tables.numel() == 0 or N == 0:
        return d_tables.zero_()
    flat = codes.transpose(0, 1).reshape(J, N).contiguous()  # sort keeps strides, and the kernel knows none
    flat = torch.where((flat >= 0) & (flat < V), flat, V).int()  # codes out of range last, where no program looks
    ordered, frames = torch.sort(flat, dim=1, stable=True)
    values = torch.arange(V + 1, dtype=torch.int32, device=codes.device).repeat(J, 1)
    begins = torch.searchsorted(ordered, values, out_int32=True)
    block_d = min(triton.next_power_of_2(d), 256)
    grid = (J * V, triton.cdiv(d, block_d), K)
    _rvq_embed_backward_kernel[grid](
        d_sums.contiguous(), frames, begins, d_tables, N, V, d, J * V, BLOCK_N=16, BLOCK_D=block_d
    )
    return d_tables


@library.custom_op("siren::rvq_embed", mutates_args=())
def _rvq_embed(tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    _check(tables, codes)
    _check_values(tables, codes)
    return _forward(tables, codes)


@_rvq_embed.register_fake
def _(tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    _check(tables, codes)
    (K, _, _, d), (B, _, T) = tables.shape, codes.shape
    return tables.new_empty(K, B, T, d, dtype=torch.float32)


@library.custom_op("siren::rvq_embed_backward", mutates_args=())
def _rvq_embed_backward(d_sums: torch.Tensor, codes: torch.Tensor, V: int, dtype: torch.dtype) -> torch.Tensor:
    return _backward(d_sums, codes, V, dtype)


@_rvq_embed_backward.register_fake
def _(d_sums: torch.Tensor, codes: torch.Tensor, V: int, dtype: torch.dtype) -> torch.Tensor:
    return d_sums.new_empty(d_sums.shape[0], codes.shape[1], V, d_sums.shape[3], dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    tables, codes = inputs
    ctx.save_for_backward(codes)
    ctx.V, ctx.dtype = tables.shape[2], tables.dtype


def _differentiate(ctx, d_sums: torch.Tensor) -> tuple[torch.Tensor, None]:
    (codes,) = ctx.saved_tensors
    return _rvq_embed_backward(d_sums, codes, ctx.V, ctx.dtype), None


_rvq_embed.register_autograd(_differentiate, setup_context=_setup_context)


def rvq_embed(tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Sums [K, B, T, d] in float32 of tables [K, J, V, d] at codes [B, J, T]; differentiable once in the tables.

    A code outside 0..V-1 never reads outside the table. On CPU tensors it is a ValueError; on a GPU, where looking at
    the codes would make the host wait, the sums of its frame are NaN, and that code adds nothing to the gradient of
    the tables. Other wrong arguments raise ValueError or TypeError naming the argument and what it should be.
    """
    return _rvq_embed(tables, codes)


def _check(tables: torch.Tensor, codes: torch.Tensor) -> None:
    if tables.ndim != 4:
        raise ValueError(f"tables must be [K, J, V, d], not {list(tables.shape)}")
    if tables.dtype not in DTYPES:
        raise TypeError(f"tables must be float32, bfloat16 or float16, not {tables.dtype}")
    J, V, d = tables.shape[1:]
    if (d > 1 and tables.stride(3) != 1) or (V > 1 and tables.stride(2) != d):
        raise ValueError(f"tables must have contiguous rows, one after another, not strides {tables.stride()}")
    if codes.ndim != 3 or codes.shape[1] != J:
        raise ValueError(f"codes must be [B, J={J}, T] as tables are {list(tables.shape)}, not {list(codes.shape)}")
    if codes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"codes must be int32 or int64, not {codes.dtype}")
    if codes.device != tables.device:
        raise ValueError(f"codes must be on {tables.device} as tables are, not on {codes.device}")


def _check_values(tables: torch.Tensor, codes: torch.Tensor) -> None:
    V = tables.shape[2]
    if codes.device.type == "cpu" and codes.numel() and (codes.min() < 0 or codes.max() >= V):
        raise ValueError(f"codes must be 0..{V - 1}, not {int(codes.min())}..{int(codes.max())}")
