"""The Gumbel noise of all draws of one frame, apart from the draws: they wait for one another, it waits for nothing.

What it is made of is in draw.py. In float64, which some GPUs are slow at, it would hold up every draw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import library

from .draw import gumbel


def gumbel_noise_reference(seeds: torch.Tensor, frames: torch.Tensor, codebooks: int, codes: int) -> torch.Tensor:
    """The same in plain PyTorch; the contract."""
    word = 0xFFFFFFFF

    def multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """High and low word of a 64-bit product, by halves: int64 has no room for the sign."""
        low = a * (b & 0xFFFF)
        high = a * (b >> 16) + (low >> 16)
        return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)

    B, quads = len(seeds), -(-codes // 4)
    shape = (B, codebooks, quads)
    key0, key1 = (seeds & word).view(B, 1, 1), ((seeds >> 32) & word).view(B, 1, 1)
    c0 = frames.view(B, 1, 1).expand(shape)
    c1 = torch.arange(codebooks, device=seeds.device).view(1, -1, 1).expand(shape)
    c2 = torch.arange(quads, device=seeds.device).expand(shape)
    c3 = torch.zeros_like(c2)
    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & word, (key1 + 0xBB67AE85) & word
    u = (torch.stack((c0, c1, c2, c3), dim=-1).flatten(2)[..., :codes] >> 8).double().add(0.5) * 2.0**-24
    return -(-u.log()).log().float()


@triton.jit
def _gumbel_kernel(seeds, frames, out, J, V, BLOCK_V: tl.constexpr):
    b, j = tl.program_id(0) // J, tl.program_id(0) % J
    v = tl.arange(0, BLOCK_V)
    noise = gumbel(tl.load(seeds + b), tl.load(frames + b), j, BLOCK_V)
    tl.store(out + (b.to(tl.int64) * J + j) * V + v, noise, mask=v < V)


def launch(seeds: torch.Tensor, frames: torch.Tensor, codebooks: int, codes: int) -> torch.Tensor:
    """Run the noise kernel. Arguments as in `gumbel_noise`, checked there."""
    noise = torch.empty(len(seeds), codebooks, codes, dtype=torch.float32, device=seeds.device)
    block = max(4, triton.next_power_of_2(codes))
    _gumbel_kernel[(len(seeds) * codebooks,)](seeds, frames, noise, codebooks, codes, BLOCK_V=block)
    return noise


@library.custom_op("siren::gumbel_noise", mutates_args=())
def gumbel_noise(seeds: torch.Tensor, frames: torch.Tensor, codebooks: int, codes: int) -> torch.Tensor:
    """Gumbel noise float32 [B, codebooks, codes] of the draws of one frame: see draw.py.

    seeds int64 [B], the bits of the unsigned 64-bit seeds; frames int64 [B], each sequence's frame.
    """
    for name, tensor in (("seeds", seeds), ("frames", frames)):
        if tensor.shape != (len(seeds),) or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64 [{len(seeds)}], not {tensor.dtype} {list(tensor.shape)}")
    return launch(seeds, frames, codebooks, codes)


@gumbel_noise.register_fake
def _(seeds: torch.Tensor, frames: torch.Tensor, codebooks: int, codes: int) -> torch.Tensor:
    return torch.empty(len(seeds), codebooks, codes, dtype=torch.float32, device=seeds.device)
