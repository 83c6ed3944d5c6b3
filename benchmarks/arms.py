"""The decoders that benchmarks/decode.py compares, on the same random weights, and the check that they agree."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siren import SirenConfig
from siren.checkpoint import expected_shapes
from siren.engine import CpuDecoder
from siren.errors import SamplingError
from siren.reference import ReferenceDecoder
from siren.sampling import SamplingSettings

ARMS = ("naive-fp32", "naive-bf16", "compile-fp32", "compile-bf16", "siren-fp32", "siren-bf16", "siren-int8")
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
GATE_FRAMES = 24


def random_experts(config: SirenConfig, seed: int) -> Iterator[tuple[int, Iterator[tuple[str, Tensor]]]]:
    """Experts with normal weights of deviation 1 / sqrt(inputs), so that activations keep their size, and norms of 1.

    Values are slices of one pool of 2^24 random numbers: a 1.6B model is ready in seconds and differs everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(1 << 24, generator=generator)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in expected_shapes(config).items():
            if "norm" in name:
                yield name, torch.ones(shape)
                continue
            count = int(np.prod(shape))
            source = pool if count <= len(pool) else pool.repeat(-(-count // len(pool)))
            first = int(torch.randint(len(source) - count + 1, (), generator=generator))
            scale = 0.1 if name.endswith("bias") or name in ("sos", "start") else shape[-1] ** -0.5
            yield name, (source[first : first + count] * scale).view(shape)

    for k in range(config.num_experts):
        yield k * config.codes_per_expert, tensors()


def build(name: str, config: SirenConfig, threads: int, built: dict[str, Any], seed: int = 0) -> Any:
    """A decoder for one arm. A compiled arm shares the weights of its naive one, found in (or added to) `built`."""
    kind, weights = name.split("-")
    if kind == "siren":
        return CpuDecoder(config, random_experts(config, seed), weights, threads)
    if kind == "naive":
        return ReferenceDecoder(
            config, ((start, dict(tensors)) for start, tensors in random_experts(config, seed)), weights
        )
    naive = built.get(f"naive-{weights}") or built.setdefault(
        f"naive-{weights}", build(f"naive-{weights}", config, threads, built)
    )
    compiled = copy.copy(naive)
    compiled.run_backbone = torch.compile(naive.run_backbone)
    compiled.run_decoder = torch.compile(naive.run_decoder)
    return compiled


def weight_bytes(config: SirenConfig, name: str) -> int:
    """Memory that an arm's weights need; a compiled arm shares its naive one's."""
    kind, weights = name.split("-")
    shapes = expected_shapes(config)
    size = {"naive": {"fp32": 4, "bf16": 2}, "siren": BYTES, "compile": {"fp32": 0, "bf16": 0}}[kind][weights]
    return config.num_experts * sum(int(np.prod(shape)) for shape in shapes.values()) * size


def moved_bytes(config: SirenConfig, weights: str, batch: int, frame: float, tokens: int) -> dict[str, float]:
    """Bytes that must be read for one frame: each weight once, those of the residual decoders once for every code of
    an expert, and the cached keys and values of every sequence."""
    d, kv, hidden = config.dim, config.n_kv_heads * config.head_dim, config.ffn_hidden
    block = (d + 2 * kv) * d + d * d + 3 * hidden * d
    cached = 4 if weights == "fp32" else 2
    k = config.num_experts
    return {
        "backbones": k * config.spatial_layers * (block + 2 * d * d) * BYTES[weights],
        "residual decoders": k * config.codes_per_expert * config.factorized_layers * block * BYTES[weights],
        "heads": config.num_codebooks * config.codebook_size * d * BYTES[weights],
        "self-attention cache": batch * k * config.spatial_layers * 2 * kv * cached * frame,
        "prompt cache": batch * k * config.spatial_layers * 2 * d * cached * tokens,
    }


def random_prompts(config: SirenConfig, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    prompt = torch.randn(batch, tokens, config.prompt_dim, generator=torch.Generator().manual_seed(1))
    return prompt, torch.ones(batch, tokens, dtype=torch.bool)


def check(config: SirenConfig, threads: int, names: list[str]) -> list[str]:
    """The gate: the arms on a model of the same widths but one block of each kind, two sequences.

    Teacher forced, an arm's error against PyTorch in fp32 is at most twice plain PyTorch's at the arm's precision
    (fp32: at most 1e-5 of the logits); plain PyTorch itself is the measure and is not judged. With an arm of the
    engine's, the codes that the engine samples in fp32 are PyTorch's. Returns lines to print; raises SamplingError
    when the gate is red.
    """
    shallow = dataclasses.replace(config, spatial_layers=1, factorized_layers=min(1, config.factorized_layers))
    prompt, mask = random_prompts(shallow, 2, min(9, shallow.max_prompt_len))
    seeds, frames = np.arange(2, dtype=np.uint64), min(GATE_FRAMES, shallow.max_seq_len)
    codes = torch.randint(
        shallow.codebook_size, (2, shallow.num_codebooks, 3), generator=torch.Generator().manual_seed(2)
    )

    def logits(decoder: Any) -> Tensor:
        return decoder.start(prompt, mask, seeds, SamplingSettings()).force(codes).double()

    def sampled(decoder: Any) -> Tensor:
        state = decoder.start(prompt, mask, seeds, SamplingSettings())
        state.step(frames, None)
        return state.codes

    plain = build("naive-fp32", shallow, threads, {})
    truth = logits(plain)
    size = float(truth.square().mean().sqrt())

    @functools.cache
    def error(name: str) -> float:
        return float((logits(build(name, shallow, threads, {})) - truth).square().mean().sqrt()) / size

    lines = []
    for name in names:
        kind, weights = name.split("-")
        if kind == "naive":
            continue
        limit = 1e-5 if weights == "fp32" else 2 * error(f"naive-{weights}")
        lines.append(f"{name}: error {error(name):.2e} of the logits, limit {limit:.2e}")
        if not error(name) <= limit:  # so that NaN is red
            raise SamplingError(f"the gate is red, nothing is timed: {lines[-1]}")
    if any(name.startswith("siren") for name in names):
        different = int((sampled(build("siren-fp32", shallow, threads, {})) != sampled(plain)).sum())
        total = 2 * shallow.num_codebooks * frames
        lines.append(f"fp32 engine: {different} of {total} sampled codes differ from PyTorch's")
        if different:
            raise SamplingError(f"the gate is red, nothing is timed: {lines[-1]}")
    return lines
