"""Hypothesis strategies for programs of the persistent kernel that are small and awkward."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from siren.config import SirenConfig

SMALL: dict[str, Any] = {
    "dim": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "spatial_layers": 2,
    "factorized_layers": 2,
    "num_codebooks": 4,
    "num_experts": 2,
    "codebook_size": 24,
    "ffn_multiple_of": 32,
}


@st.composite
def configs(take: st.DrawFn) -> SirenConfig:
    """Grouped-query attention or not, 1 to 12 experts of 1 to 12 codes, with and without residual decoders."""
    experts, codes = take(st.sampled_from([(1, 1), (1, 2), (1, 12), (2, 1), (2, 3), (3, 2), (6, 2), (12, 1)]))
    dim, heads, kv_heads = take(
        st.sampled_from([(32, 1, 1), (32, 4, 2), (64, 4, 1), (64, 8, 8), (96, 6, 3), (96, 12, 4)])
    )
    blocks = take(st.integers(0, 3))
    return SirenConfig(
        dim=dim,
        n_heads=heads,
        n_kv_heads=kv_heads,
        spatial_layers=take(st.integers(1, 3)),
        factorized_layers=blocks,
        num_codebooks=experts * codes,
        num_experts=experts,
        codebook_size=take(st.sampled_from([8, 24, 64])),
        ffn_multiple_of=32,
        conditioning=take(st.sampled_from(["none", "residual", "accumulated"])) if blocks else "none",
        decoder_start=take(st.sampled_from(["prompt", "learned"])),
    )


@st.composite
def requests(take: st.DrawFn) -> dict[str, Any]:
    """Arguments of build_program."""
    guided = take(st.booleans())
    return {
        "config": take(configs()),
        "sequences": take(st.sampled_from([1, 2, 3, 5, 16] if guided else [1, 2, 3, 5, 16, 32])),
        "guided": guided,
        "sms": take(st.one_of(st.integers(1, 30), st.sampled_from([132, 200]))),
        "shared_bytes": take(st.sampled_from([49152, 101376, 232448])),
        "residual": take(st.booleans()),
    }
