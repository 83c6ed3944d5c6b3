"""The noise kernel gives the contract's noise: the uniforms bit for bit, for any seed, frame and size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import library

pytest.importorskip("triton")

from siren.kernels.gumbel_noise import gumbel_noise, gumbel_noise_reference

from siren.sampling import gumbel_noise as contract

SEEDS = np.array([0, 7, 2**32 - 1, 2**32, 2**63, 2**64 - 1], dtype=np.uint64)
FRAMES = np.array([0, 1, 299, 2**31, 2**32 - 1, 5])


@pytest.mark.parametrize(("codebooks", "codes"), [(1, 1), (2, 3), (3, 5), (12, 33), (1, 1024), (1, 1025)])
def test_is_the_contracts(codebooks: int, codes: int, device: str) -> None:
    """Equal to siren.sampling's. On a GPU float64 logarithms may differ in their last place, which float32 hides but
    where it rounds the other way; a wrong uniform is far outside one unit in the last place."""
    seeds, frames = torch.from_numpy(SEEDS.view(np.int64)).to(device), torch.from_numpy(FRAMES).to(device)
    expected = contract(SEEDS, FRAMES, range(codebooks), codes)
    noise = gumbel_noise(seeds, frames, codebooks, codes).cpu()
    assert torch.equal(gumbel_noise_reference(seeds, frames, codebooks, codes).cpu(), expected)
    if device == "cpu":
        assert torch.equal(noise, expected)
    close = (noise.view(torch.int32) - expected.view(torch.int32)).abs()
    assert int(close.max()) <= 1


def test_writes_its_rows_and_no_more(device: str) -> None:
    """Every element of a poisoned output is written, none of its neighbours."""
    from siren.kernels import gumbel_noise as module

    seeds, frames = (torch.arange(3, device=device) for _ in range(2))
    poisoned = torch.full((5, 2, 7), torch.nan, device=device)
    block = 8
    module._gumbel_kernel[(6,)](seeds, frames, poisoned[1:4], 2, 7, BLOCK_V=block)
    assert torch.equal(poisoned[1:4], gumbel_noise(seeds, frames, 2, 7))
    assert poisoned[[0, 4]].isnan().all()


def test_operation(device: str) -> None:
    """opcheck accepts it, it survives torch.compile, and wrong arguments are named."""
    seeds, frames = (torch.arange(3, device=device) for _ in range(2))
    library.opcheck(gumbel_noise, (seeds, frames, 2, 5))
    compiled = torch.compile(lambda seeds, frames: gumbel_noise(seeds, frames, 2, 5) * 2, fullgraph=True)
    assert torch.equal(compiled(seeds, frames), gumbel_noise(seeds, frames, 2, 5) * 2)
    with pytest.raises(ValueError, match=r"seeds must be contiguous int64 \[3\]"):
        gumbel_noise(seeds.int(), frames, 2, 5)
    with pytest.raises(ValueError, match=r"frames must be contiguous int64 \[3\]"):
        gumbel_noise(seeds, frames[:2], 2, 5)
