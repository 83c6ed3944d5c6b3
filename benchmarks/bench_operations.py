"""Each operation of the engine alone: the check that it is right, then its time, beside PyTorch's for the same work.

    pytest benchmarks/bench_operations.py --benchmark-only
    pytest benchmarks/bench_operations.py --benchmark-only -k "matmul and bf16" --benchmark-json out/operations.json

Sizes are those of the 1.6B model. Arms are those of decode.py: "siren" is the engine, "naive" plain PyTorch, both with
all cores. Weights come from memory, not from caches: products rotate over copies of a matrix; residual decoders and
prefill start with caches that other data has filled. GB/s counts the weights; beside it stands its share of the read
bandwidth, which is measured around and between the calls. Nothing else may run meanwhile: every call is threads that
wait for one another.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import arms
import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional

from siren import SirenConfig
from siren.engine import default_threads, extension
from siren.reference import round_to_int8
from siren.sampling import SamplingSettings, draw, gumbel_noise

THREADS = default_threads()
torch.set_num_threads(THREADS)
ROTATED_BYTES = 128 << 20
FLUSHED_BYTES = 256 << 20
ARMS = ("naive-fp32", "naive-bf16", "siren-fp32", "siren-bf16", "siren-int8")
SHAPES = {  # rows, columns, and whether rows are gates and values of a SwiGLU
    "1024x1024": (1024, 1024, False),
    "3072x1024": (3072, 1024, False),
    "5632x1024 paired": (5632, 1024, True),
    "1024x2816": (1024, 2816, False),
}
# One backbone block, and few inputs to the projectors, which are folded away: quicker to build, the rest is the same.
CONFIG = dataclasses.replace(SirenConfig.preset("siren-1.6b"), spatial_layers=1, dac_feature_dim=64)
TOKENS = 20


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- timing ---------------------------------------------------------------------------------------------------------


@functools.cache
def read_test() -> Any:
    return extension().ReadTest(FLUSHED_BYTES, THREADS)


def read_seconds() -> float:
    """Reads FLUSHED_BYTES, which measures the bandwidth and fills the caches with them."""
    start = time.perf_counter()
    read_test().run()
    return time.perf_counter() - start


class Report:
    """Times one call after another and keeps a line of each for the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def time(
        self,
        benchmark: BenchmarkFixture,
        operation: str,
        arm: str,
        call: Callable[[], Any],
        rounds: int,
        weight_bytes: float = 0,
        flush: bool = False,
    ) -> None:
        """`flush`: read through other memory before each round. Otherwise that is done before and after all of them."""
        benchmark.group = operation
        reads = [read_seconds() for _ in range(5)]
        setup = (lambda: reads.append(read_seconds())) if flush else None
        benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=3)
        if not benchmark.stats:  # --benchmark-disable
            return
        median = benchmark.stats.stats.median
        line = f"{operation:<44} {arm:<12} {1e6 * median:>11.1f} us"
        if weight_bytes:
            reads += [read_seconds() for _ in range(5)]
            share = weight_bytes / median / (read_test().bytes / statistics.median(reads))
            benchmark.extra_info |= {"gb_per_s": weight_bytes / median / 1e9, "share_of_bandwidth": share}
            line += f" {weight_bytes / median / 1e9:>8.1f} GB/s {share:>8.2f} of the read bandwidth"
        self.lines.append(line)


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    found = Report()
    yield found
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", "", "medians", *sorted(found.lines), sep="\n")


# ---- one matrix -----------------------------------------------------------------------------------------------------


def multiply(x: Tensor, weight: Tensor, paired: bool) -> Tensor:
    """What the engine's matrix computes, in PyTorch."""
    y = functional.linear(x, weight)
    if not paired:
        return y
    gate, value = y.chunk(2, dim=-1)
    return functional.silu(gate) * value


@dataclasses.dataclass
class Rotation:
    """Copies of one matrix, too many for the caches. `product(x)` takes the next, float32 [B, cols] to [B, outputs]."""

    arm: str
    shape: str
    weight: Tensor
    product: Callable[[Tensor], Tensor]
    prepare: Callable[[Tensor], Any]
    copies: int
    bytes: int


@pytest.fixture(scope="module", params=list(itertools.product(SHAPES, ARMS)), ids=lambda param: "-".join(param))
def rotation(request: pytest.FixtureRequest) -> Rotation:
    shape, arm = request.param
    rows, cols, paired = SHAPES[shape]
    weight = random(rows, cols) * cols**-0.5
    kind, weights = arm.split("-")
    if kind == "naive":
        dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        size = weight.numel() * arms.BYTES[weights]
        copies = -(-ROTATED_BYTES // size)
        matrices = itertools.cycle([weight.to(dtype, copy=True) for _ in range(copies)])
        return Rotation(
            arm, shape, weight, lambda x: multiply(x, next(matrices), paired), lambda x: x.to(dtype), copies, size
        )
    module = extension()
    first = module.PackedMatrix(weight.numpy(), weights, paired, THREADS)
    copies = -(-ROTATED_BYTES // first.bytes)
    others = (module.PackedMatrix(weight.numpy(), weights, paired, THREADS) for _ in range(copies - 1))
    packed = itertools.cycle([first, *others])
    return Rotation(arm, shape, weight, lambda x: next(packed).matmul(x), lambda x: x.numpy(), copies, first.bytes)


@pytest.mark.parametrize("batch", [1, 4, 8, 16])
def test_matmul(benchmark: BenchmarkFixture, report: Report, rotation: Rotation, batch: int) -> None:
    """The error against fp64 is at most twice PyTorch's with the same weights; the activations are fp32 for both."""
    weight, paired, weights = rotation.weight, SHAPES[rotation.shape][2], rotation.arm.split("-")[1]
    x = random(batch, weight.shape[1], seed=batch)
    exact = multiply(x.double(), weight.double(), paired)
    if weights == "bf16":
        plain = multiply(x.bfloat16(), weight.bfloat16(), paired)
    else:
        plain = multiply(x, round_to_int8(weight) if weights == "int8" else weight, paired)
    given = rotation.prepare(x)
    ours = torch.as_tensor(rotation.product(given))
    assert rms(ours - exact) <= 2 * rms(plain - exact)
    name, rounds = f"matmul {rotation.shape}, batch {batch:>2}", max(2 * rotation.copies, 50)
    report.time(benchmark, name, rotation.arm, lambda: rotation.product(given), rounds, rotation.bytes)


# ---- one draw -------------------------------------------------------------------------------------------------------


DRAWS = {
    "plain": SamplingSettings(temperature=0.9),
    "top-k 50": SamplingSettings(temperature=0.9, top_k=50),
    "top-p 0.9": SamplingSettings(temperature=0.9, top_p=0.9),
}


def engine_draw(logits: Tensor, seeds: list[int], settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    how = (settings.temperature, settings.top_k, settings.top_p)
    codes, logprobs = extension().draw(logits.numpy(), seeds, 7, 3, *how)
    return torch.from_numpy(codes), torch.from_numpy(logprobs)


def plain_draw(logits: Tensor, seeds: list[int], settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    noise = gumbel_noise(np.array(seeds, np.uint64), 7, [3], logits.shape[1])[:, 0]
    return draw(logits, noise, settings)


@pytest.mark.parametrize("arm", ["naive", "siren"])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", DRAWS)
def test_draw(benchmark: BenchmarkFixture, report: Report, kind: str, rows: int, arm: str) -> None:
    """The codes that PyTorch draws, and log-probabilities that err at most twice as much. Noise is part of both."""
    settings, count = DRAWS[kind], 200
    logits = 2 * random(count, CONFIG.codebook_size)
    ours, plain = (call(logits, list(range(count)), settings) for call in (engine_draw, plain_draw))
    exact = (logits.double() / settings.temperature).log_softmax(-1).gather(-1, plain[0][:, None])[:, 0]
    assert torch.equal(ours[0], plain[0])
    assert rms(ours[1] - exact) <= 2 * rms(plain[1] - exact)
    call = engine_draw if arm == "siren" else plain_draw
    given = (logits[:rows], list(range(rows)), settings)
    report.time(benchmark, f"draw {kind}, {rows} rows", arm, lambda: call(*given), rounds=200)


# ---- residual decoders and prefill ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outputs:
    logits: Tensor  # teacher forced
    codes: Tensor  # drawn by residual()


def inputs(batch: int) -> tuple[Tensor, Tensor, Any, Any]:
    """h, start, seeds and frames for residual(); a smaller batch is the beginning of a larger one."""
    h, start = random(2, CONFIG.num_experts, 8, CONFIG.dim)[:, :, :batch].contiguous()
    return h, start, np.arange(batch, dtype=np.uint64), np.full(batch, 5, np.int64)


def outputs(decoder: Any) -> Outputs:
    codes = torch.randint(
        CONFIG.codebook_size, (2, CONFIG.num_codebooks, 3), generator=torch.Generator().manual_seed(2)
    )
    state = decoder.start(*arms.random_prompts(CONFIG, 2, TOKENS), np.zeros(2, np.uint64), SamplingSettings())
    return Outputs(state.force(codes), decoder.residual(*inputs(8), SamplingSettings())[0])


@functools.cache
def plain_outputs(weights: str) -> Outputs:
    return outputs(arms.build(f"naive-{weights}", CONFIG, THREADS, {}))


@pytest.fixture(scope="module", params=ARMS)
def decoder(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """An arm, checked. fp32: the codes that PyTorch draws. Others: at most twice PyTorch's error with these weights."""
    truth, (kind, weights) = plain_outputs("fp32"), request.param.split("-")
    made = arms.build(request.param, CONFIG, THREADS, {})
    if kind == "siren":
        ours = outputs(made)
        if weights == "fp32":
            assert torch.equal(ours.codes, truth.codes)
            assert rms(ours.logits - truth.logits) <= 1e-5 * rms(truth.logits)
        else:
            assert rms(ours.logits - truth.logits) <= 2 * rms(plain_outputs(weights).logits - truth.logits)
    return request.param, made


@pytest.mark.parametrize("batch", [1, 8])
def test_residual(benchmark: BenchmarkFixture, report: Report, decoder: tuple[str, Any], batch: int) -> None:
    """The residual decoders of one frame: six experts, two codes each; a decoder's weights are read for each code."""
    arm, made = decoder
    given = inputs(batch)
    parts = arms.moved_bytes(CONFIG, arm.split("-")[1], batch, 0, 0)
    moved = parts["residual decoders"] + parts["heads"]
    name = f"residual decoders of a frame, batch {batch}"
    report.time(benchmark, name, arm, lambda: made.residual(*given, SamplingSettings()), 10, moved, flush=True)


@pytest.mark.parametrize("batch", [1, 8])
def test_prefill(benchmark: BenchmarkFixture, report: Report, decoder: tuple[str, Any], batch: int) -> None:
    """Distinct prompts: keys and values of one backbone block, and the residual decoders' starts, of six experts."""
    arm, made = decoder
    prompt, mask = arms.random_prompts(CONFIG, batch, TOKENS)
    seeds = np.arange(batch, dtype=np.uint64)
    matrices = CONFIG.num_experts * (2 * CONFIG.spatial_layers + 1) * CONFIG.dim * CONFIG.prompt_dim
    moved = matrices * arms.BYTES[arm.split("-")[1]]
    name = f"prefill of {TOKENS} tokens, batch {batch}"
    report.time(
        benchmark, name, arm, lambda: made.start(prompt, mask, seeds, SamplingSettings()), 10, moved, flush=True
    )
