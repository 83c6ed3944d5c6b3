"""Random small models and inputs for tests, awkward sizes on purpose."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import strategies as st

from siren import SirenConfig
from siren.expert import Expert


@st.composite
def configs(draw: st.DrawFn) -> SirenConfig:
    """Any K, grouped-query attention, odd dims, every conditioning and start, with and without a residual decoder."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    blocks = draw(st.integers(0, 2))
    return SirenConfig(
        dim=heads * draw(st.sampled_from([1, 3, 4, 5, 8])),
        n_heads=heads,
        n_kv_heads=kv_heads,
        spatial_layers=draw(st.integers(1, 3)),
        factorized_layers=blocks,
        prompt_dim=draw(st.integers(1, 9)),
        num_experts=draw(st.sampled_from([1, 2, 3, 4, 6, 12])),
        codebook_size=draw(st.sampled_from([2, 5, 16, 33])),
        dac_code_dim=draw(st.integers(1, 4)),
        dac_feature_dim=draw(st.integers(1, 9)),
        max_seq_len=600,
        ffn_multiple_of=draw(st.sampled_from([1, 7, 16])),
        ffn_multiplier=draw(st.sampled_from([None, 0.7])),
        conditioning=draw(st.sampled_from(["none", "residual", "accumulated"])) if blocks else "none",
        decoder_start=draw(st.sampled_from(["prompt", "learned"])),
    )


def random_experts(config: SirenConfig, seed: int) -> list[Expert]:
    """Experts with weights large enough for every part to show in the logits, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    experts = [Expert(config, k * config.codes_per_expert).eval() for k in range(config.num_experts)]
    for expert in experts:
        for name, parameter in expert.named_parameters():
            scale = 1.0 if parameter.ndim < 2 or name == "sos" else parameter.shape[-1] ** -0.5
            offset = 1.0 if "norm" in name else 0.0
            parameter.data.copy_(offset + 0.5 * scale * torch.randn(parameter.shape, generator=generator))
    return experts


def states(experts: list[Expert]) -> list[tuple[int, Mapping[str, torch.Tensor]]]:
    """What a decoder is built from."""
    return [(expert.start_codebook, expert.state_dict()) for expert in experts]


def random_inputs(
    config: SirenConfig, seed: int, batch: int, tokens: int, frames: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [B, 12, T], prompt [B, P, D] and a prompt mask [B, P] of any pattern, with at least one token each."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(config.codebook_size, (batch, config.num_codebooks, frames), generator=generator)
    prompt = torch.randn(batch, tokens, config.prompt_dim, generator=generator)
    mask = torch.rand(batch, tokens, generator=generator) < 0.6
    mask[torch.arange(batch), torch.randint(tokens, (batch,), generator=generator)] = True
    return codes, prompt, mask


def forward(experts: list[Expert], *inputs: torch.Tensor) -> torch.Tensor:
    """Teacher-forced logits of all experts, [B, 12, T, V]."""
    with torch.no_grad():
        return torch.cat([expert(*inputs) for expert in experts], dim=1)
