"""The C++ engine against the official vectors, the plain PyTorch decoder and the teacher-forced forward.

Every test that takes `path` runs once for each instruction path that this CPU and this build have.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from random_models import configs, forward, random_experts, random_inputs, states

from siren import ResidualSampler, Sampler, SirenConfig
from siren.engine import CpuDecoder, default_threads, instruction_path
from siren.errors import BackendError, CheckpointError, InputError, SamplingError
from siren.reference import ReferenceDecoder
from siren.sampling import SamplingSettings, draw, gumbel_noise

_cpu = pytest.importorskip("siren._cpu", reason="the C++ extension is not built")

GREEDY = SamplingSettings(temperature=0.0)


@contextlib.contextmanager
def on_path(name: str) -> Iterator[None]:
    """SIREN_CPU_ISA is `name` inside, and afterwards what it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIREN_CPU_ISA", name)
        yield


def _available_paths() -> list[str]:
    found = []
    for name in ("portable", "avx2", "avx512", "avx512bf16"):
        with on_path(name):
            try:
                found.append(instruction_path())
            except BackendError:
                print(f"instruction path {name} does not run here")
    return found


PATHS = _available_paths()


@pytest.fixture(params=PATHS)
def path(request) -> Iterator[str]:
    with on_path(request.param):
        yield request.param


def zeros(batch: int) -> np.ndarray:
    return np.zeros(batch, np.uint64)


def rms(error: torch.Tensor) -> float:
    return float(error.double().square().mean().sqrt())


def force(decoder, codes, prompt, mask, sampling=GREEDY) -> torch.Tensor:
    return decoder.start(prompt, mask, zeros(len(codes)), sampling).force(codes)


def exact_logits(experts, codes, prompt, mask) -> torch.Tensor:
    """The teacher-forced forward in fp64."""
    return forward([copy.deepcopy(expert).double() for expert in experts], codes, prompt.double(), mask)


# ---- against the official code ----------------------------------------------------------------------------------


def test_golden_logits_losses_and_greedy_codes(path, golden, golden_model):
    """fp32, official vectors: teacher-forced logits and losses within 1e-4, greedy codes exactly."""
    decoder = CpuDecoder(golden_model.config, states(golden_model.experts), "fp32", threads=2)
    assert decoder.describe()["instructions"] == path
    codes = golden["codes"].long()
    logits = force(decoder, codes, golden["prompt"], golden["prompt_mask"])
    assert (logits - golden["logits"]).abs().max() < 1e-4
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none").view(
        codes.shape
    )
    mask = golden["sequence_mask"][:, None].expand_as(losses)
    # The official loss ran with the sequence mask inside attention too; frames it keeps attend to kept frames only.
    per_codebook = (losses * mask).sum((0, 2)) / mask.sum((0, 2))
    assert (per_codebook.view(6, 2).double() - golden["loss"]).abs().max() < 1e-4

    state = decoder.start(golden["prompt"], golden["prompt_mask"], zeros(3), GREEDY)
    state.step(24)
    assert torch.equal(state.codes, golden["greedy_codes"].long())


def test_from_folder_equals_from_model(golden_folder, golden_model, golden):
    """Streaming from the checkpoint and packing the loaded model give the same bits."""
    direct = Sampler(golden_model, backend="cpu", weights="bf16").sample(
        golden["prompt"], golden["prompt_mask"], frames=9
    )
    streamed = Sampler.from_pretrained(golden_folder, backend="cpu").sample(
        golden["prompt"], golden["prompt_mask"], frames=9
    )
    assert torch.equal(direct.codes, streamed.codes) and torch.equal(direct.logprobs, streamed.logprobs)


# ---- random shapes ----------------------------------------------------------------------------------------------


@given(
    config=configs(),
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 9),
    tokens=st.sampled_from([1, 2, 7, 33, 128]),
    frames=st.integers(1, 9),
    guidance=st.sampled_from([1.0, 2.5]),
    path=st.sampled_from(PATHS),
    threads=st.integers(1, 3),
)
@settings(max_examples=60)
def test_random_models_match(config, seed, batch, tokens, frames, guidance, path, threads):
    """Any configuration, fp32: the engine's error against fp64 is at most twice PyTorch's fp32 error."""
    experts = random_experts(config, seed)
    codes, prompt, mask = random_inputs(config, seed, batch, tokens, frames)
    sampling = SamplingSettings(guidance_scale=guidance)
    plain = force(ReferenceDecoder(config, states(experts), "fp32"), codes, prompt, mask, sampling)
    with on_path(path):
        engine = force(CpuDecoder(config, states(experts), "fp32", threads), codes, prompt, mask, sampling)
    truth = exact_logits(experts, codes, prompt, mask)
    if guidance != 1.0:
        null = exact_logits(
            experts, codes, torch.zeros(batch, 1, config.prompt_dim), torch.ones(batch, 1, dtype=torch.bool)
        )
        truth = null + guidance * (truth - null)
    ours, theirs, floor = rms(engine - truth), rms(plain - truth), 2e-7 * rms(truth)
    note(f"rms error: engine {ours:.3g}, PyTorch {theirs:.3g}")
    assert ours <= 2 * theirs + floor


@functools.cache
def _wide_case(weights: str):
    """A model where rounding shows, its inputs, the exact logits, and plain PyTorch's RMS error with these weights."""
    config = SirenConfig(dim=192, n_heads=4, n_kv_heads=2, spatial_layers=3, factorized_layers=2, prompt_dim=96,
                         dac_feature_dim=64, max_seq_len=40, max_prompt_len=16, ffn_multiple_of=32)  # fmt: skip
    experts = random_experts(config, 5)
    inputs = random_inputs(config, 5, 3, 13, 21)
    truth = exact_logits(experts, *inputs)
    theirs = rms(force(ReferenceDecoder(config, states(experts), weights), *inputs) - truth)
    return config, experts, inputs, truth, theirs


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_error_rule_of_rounded_weights(path, weights):
    """bf16 and int8: error against fp64 at most twice plain PyTorch's at that precision."""
    config, experts, inputs, truth, theirs = _wide_case(weights)
    ours = rms(force(CpuDecoder(config, states(experts), weights, 2), *inputs) - truth)
    print(f"{path} {weights}: rms error {ours:.4g}, PyTorch {theirs:.4g}, logits {rms(truth):.4g}")
    assert 0 < ours <= 2 * theirs


@functools.cache
def _long_case(weights: str):
    """150 frames: a model, its inputs, the exact logits, and plain PyTorch's error with these weights."""
    config = SirenConfig(dim=48, n_heads=4, n_kv_heads=2, spatial_layers=2, factorized_layers=1, prompt_dim=16,
                         num_experts=3, codebook_size=32, dac_feature_dim=16, max_seq_len=150,
                         ffn_multiple_of=16)  # fmt: skip
    experts = random_experts(config, 6)
    inputs = random_inputs(config, 6, 2, 5, 150)
    truth = exact_logits(experts, *inputs)
    theirs = force(ReferenceDecoder(config, states(experts), weights), *inputs) - truth
    return config, experts, inputs, truth, theirs


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_error_rule_far_past_one_page_of_the_cache(path, weights):
    """Over all of 150 frames and in the last 50 alone: error against fp64 at most twice plain PyTorch's."""
    config, experts, inputs, truth, theirs = _long_case(weights)
    ours = force(CpuDecoder(config, states(experts), weights, 2), *inputs) - truth
    for frames in (slice(0, 150), slice(100, 150)):
        mine, limit = rms(ours[:, :, frames]), 2 * rms(theirs[:, :, frames])
        print(f"{path} {weights} {frames}: rms error {mine:.4g}, limit {limit:.4g}")
        assert 0 < mine <= limit


def test_past_512_frames(path):
    """Positions and the paged cache hold far into a clip: over 600 frames, and over the last 88, the error against
    fp64 is at most twice that of PyTorch's teacher-forced forward."""
    config = SirenConfig(dim=24, n_heads=3, n_kv_heads=3, spatial_layers=2, factorized_layers=1, prompt_dim=5,
                         codebook_size=16, dac_feature_dim=8, max_seq_len=600, ffn_multiple_of=8)  # fmt: skip
    experts = random_experts(config, 1)
    codes, prompt, mask = random_inputs(config, 1, 2, 3, 600)
    truth = exact_logits(experts, codes, prompt, mask)
    ours = force(CpuDecoder(config, states(experts), "fp32", 2), codes, prompt, mask) - truth
    theirs = forward(experts, codes, prompt, mask) - truth
    assert rms(ours) <= 2 * rms(theirs)
    assert rms(ours[:, :, 512:]) <= 2 * rms(theirs[:, :, 512:])


def test_to_the_last_frame_of_the_model(path):
    """Exactly max_seq_len frames, more than one page: PyTorch's codes in fp32; not a frame more."""
    config = SirenConfig(dim=24, n_heads=3, n_kv_heads=1, spatial_layers=2, factorized_layers=1, prompt_dim=5,
                         codebook_size=16, dac_feature_dim=8, max_seq_len=131, ffn_multiple_of=8)  # fmt: skip
    model = SimpleNamespace(
        config=config, experts=torch.nn.ModuleList(random_experts(config, 9)), codec_path=None, prompt_encoder_name=None
    )
    _, prompt, mask = random_inputs(config, 9, 2, 3, 1)
    ours, theirs = (Sampler(model, backend=name, weights="fp32").start(prompt, mask) for name in ("cpu", "reference"))
    for session in (ours, theirs):
        session.step(131)
        with pytest.raises(InputError, match="exceed max_seq_len, which is 131"):
            session.step(1)
        assert session.frame == 131
    assert torch.equal(ours.codes, theirs.codes)


@given(rows=st.integers(1, 70), cols=st.sampled_from([1, 3, 63, 64, 65, 200, 1025, 2816]), batch=st.integers(1, 19),
       weights=st.sampled_from(["fp32", "bf16", "int8"]), paired=st.booleans(), seed=st.integers(0, 2**31),
       path=st.sampled_from(PATHS))  # fmt: skip
def test_matmul(rows, cols, batch, weights, paired, seed, path):
    """One packed matrix, awkward sizes: within the rounding of weights and activations of an fp64 product."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(2 * rows if paired else rows, cols, generator=generator)
    x = torch.randn(batch, cols, generator=generator)
    with on_path(path):
        y = torch.from_numpy(_cpu.PackedMatrix(w.numpy(), weights, paired).matmul(x.numpy())).double()
    if weights == "bf16":
        w = w.bfloat16().float()
        if path == "avx512bf16":
            x = x.bfloat16().float()
    if weights == "int8":
        scale = w.abs().amax(1, keepdim=True) / 127
        w = (w / scale).round() * scale
    truth = x.double() @ w.double().T
    error = 2e-6 * (x.double().abs() @ w.double().abs().T)  # fp32 sums, in another order
    if weights == "int8":  # activations are 16-bit fixed point: half a step of the largest, times every weight
        error += 1.01 * x.double().abs().amax(1, keepdim=True) / 65534 * w.double().abs().sum(1)
    if paired:
        gate, value = truth.chunk(2, dim=-1)
        gate_error, value_error = error.chunk(2, dim=-1)
        truth = torch.nn.functional.silu(gate) * value
        slope = 1.1  # of silu, at most
        error = slope * gate_error * (value.abs() + value_error) + value_error * gate.abs() + 1e-6 * truth.abs()
    assert ((y - truth).abs() <= error + 1e-9).all()


@pytest.mark.parametrize("cols", [1, 3, 65, 200, 1025, 2816])
@pytest.mark.parametrize("paired", [False, True])
def test_fp32_products_round_no_worse_than_twice_pytorch(path, cols, paired):
    """RMS error against fp64 at most twice that of torch.nn.functional.linear, long sums included. The floor, half a
    last place of the result, is for sums of so few terms that PyTorch may have them exact."""
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    generator = torch.Generator().manual_seed(cols)
    for batch in (1, 8):
        w = torch.randn(2 * 97 if paired else 97, cols, generator=generator)
        x = torch.randn(batch, cols, generator=generator)
        ours = torch.from_numpy(_cpu.PackedMatrix(w.numpy(), "fp32", paired).matmul(x.numpy()))
        theirs, truth = linear(x, w), linear(x.double(), w.double())
        if paired:
            theirs, truth = (silu(gate) * value for gate, value in (y.chunk(2, dim=-1) for y in (theirs, truth)))
        print(f"{path} {cols} columns, batch {batch}: {rms(ours - truth):.3g}, PyTorch {rms(theirs - truth):.3g}")
        assert rms(ours - truth) <= 2 * rms(theirs - truth) + 2**-24 * rms(truth)


# ---- the same seed, the same codes --------------------------------------------------------------------------------


SETTINGS = [
    SamplingSettings(),
    SamplingSettings(temperature=0.7, top_k=50),
    SamplingSettings(temperature=1.3, top_p=0.8),
    SamplingSettings(guidance_scale=3.0, top_k=200, top_p=0.95),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_engine_draws_what_the_reference_draws(path, golden, golden_model, sampling):
    """fp32: the same seeds give the same codes in both, and log-probabilities within 1e-4."""
    seeds = np.array([3, 2**64 - 1, 12345678901234567890], np.uint64)
    outputs = []
    for decoder in (
        ReferenceDecoder(golden_model.config, states(golden_model.experts), "fp32"),
        CpuDecoder(golden_model.config, states(golden_model.experts), "fp32", 2),
    ):
        state = decoder.start(golden["prompt"], golden["prompt_mask"], seeds, sampling)
        state.step(20)
        outputs.append((state.codes, state.logprobs))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert (outputs[0][1] - outputs[1][1]).abs().max() < 1e-4


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_bits_do_not_depend_on_batch_place_threads_or_select(path, golden, golden_model, weights):
    """Codes and log-probabilities of a sequence are bit-identical alone, anywhere in a batch of 7, with 1 to 3 threads,
    and after dropping, doubling and reordering others."""
    config = golden_model.config
    rng = np.random.default_rng(0)
    prompt = golden["prompt"][rng.integers(0, 3, 7)]
    mask = golden["prompt_mask"][rng.integers(0, 3, 7)]
    prompt = prompt * mask[..., None]
    seeds = np.arange(100, 107, dtype=np.uint64)
    sampling = SamplingSettings(temperature=0.9, top_k=300)
    decoders = [CpuDecoder(config, states(golden_model.experts), weights, threads) for threads in (1, 2, 3)]

    def run(decoder, chosen):
        state = decoder.start(prompt[chosen], mask[chosen], seeds[chosen], sampling)
        state.step(12)
        return state.codes, state.logprobs

    everything = list(range(7))
    codes, logprobs = run(decoders[0], everything)
    for decoder in decoders[1:]:
        again = run(decoder, everything)
        assert torch.equal(again[0], codes) and torch.equal(again[1], logprobs)
    for place in (0, 3, 6):
        alone = run(decoders[1], [place])
        assert torch.equal(alone[0][0], codes[place]) and torch.equal(alone[1][0], logprobs[place])
    state = decoders[1].start(prompt, mask, seeds, sampling)
    state.step(5)
    state.select([6, 2, 2, 0])
    state.step(4)
    state.select([3, 1, 0])
    state.step(3)
    for row, original in enumerate([0, 2, 6]):
        assert torch.equal(state.codes[row], codes[original]) and torch.equal(state.logprobs[row], logprobs[original])


def test_the_largest_batch(path, golden, golden_model):
    """64 guided sequences, 128 rows: each is bit-identical to itself alone."""
    decoder = CpuDecoder(golden_model.config, states(golden_model.experts), "bf16", 2)
    rows = torch.arange(64) % 3
    prompt, mask = golden["prompt"] * golden["prompt_mask"][..., None], golden["prompt_mask"]
    sampling = SamplingSettings(guidance_scale=2.0)
    whole = decoder.start(prompt[rows], mask[rows], np.arange(64, dtype=np.uint64), sampling)
    whole.step(2)
    for row in (0, 31, 63):
        kind = int(rows[row])
        alone = decoder.start(prompt[kind : kind + 1], mask[kind : kind + 1], np.array([row], np.uint64), sampling)
        alone.step(2)
        assert torch.equal(whole.codes[row], alone.codes[0]) and torch.equal(whole.logprobs[row], alone.logprobs[0])


def test_select_across_a_page_of_the_cache():
    """Copies made in the middle of a cache page part ways without touching one another."""
    config = SirenConfig(dim=16, n_heads=2, n_kv_heads=1, spatial_layers=2, factorized_layers=1, prompt_dim=4,
                         codebook_size=32, dac_feature_dim=8, max_seq_len=200, ffn_multiple_of=8)  # fmt: skip
    experts = random_experts(config, 2)
    _, prompt, mask = random_inputs(config, 2, 1, 2, 1)
    decoder = CpuDecoder(config, states(experts), "bf16", 2)

    def alone(seed: int, later: int) -> torch.Tensor:
        state = decoder.start(prompt, mask, np.array([seed], np.uint64), SamplingSettings())
        state.step(70)
        state.select([0], np.array([later], np.uint64))
        state.step(80)
        return state.codes[0]

    state = decoder.start(prompt, mask, np.array([7], np.uint64), SamplingSettings())
    state.step(70)
    before = state.cache_bytes
    state.select([0, 0, 0], np.array([7, 8, 9], np.uint64))
    assert state.cache_bytes == before  # shared until they differ
    state.step(80)
    for row, seed in enumerate((7, 8, 9)):
        assert torch.equal(state.codes[row], alone(7, seed))
    assert not torch.equal(state.codes[0], state.codes[1])


def test_noise_equals_the_reference():
    """Philox and Gumbel in C++ and numpy: the same float32 values, odd codebook sizes included."""
    for seed, frame, codebook, size in ((0, 0, 0, 1024), (2**64 - 1, 1499, 11, 1023), (123456789012345, 7, 3, 5)):
        ours = torch.from_numpy(_cpu.gumbel_noise(seed, frame, codebook, size))
        theirs = gumbel_noise(np.array([seed], np.uint64), frame, [codebook], size)[0, 0]
        assert torch.equal(ours, theirs)


def test_top_p_treats_ties_as_pytorch_does():
    """Equal logits, whose probabilities reach p exactly: C++ and PyTorch allow the same codes, and draw the same."""
    count = 300
    seeds = np.arange(count, dtype=np.uint64)
    noise = gumbel_noise(seeds, 3, [1], 12)[:, 0]
    for level in (0.0, 1.7):
        for size in (10, 12):  # twelve: two codes of lower probability follow the ten
            logits = torch.full((count, size), level)
            logits[:, 10:] -= 2
            for tenths in range(1, 10):
                settings = SamplingSettings(temperature=0.9, top_p=tenths / 10)
                theirs, logprobs = draw(logits, noise[:, :size], settings)
                ours = _cpu.draw(logits.numpy(), seeds.tolist(), 3, 1, 0.9, 0, settings.top_p)
                assert set(ours[0].tolist()) == set(theirs.tolist()), (level, size, tenths)
                assert np.array_equal(ours[0], theirs.numpy())
                assert np.allclose(ours[1], logprobs.numpy(), atol=1e-6)
                if size == 10:
                    assert set(ours[0].tolist()) == set(range(tenths))


def test_residual_sampler_continues_a_session():
    """A frame's backbone outputs through ResidualSampler: what the engine's session draws for that frame."""
    config = SirenConfig.preset("tiny")
    model = SimpleNamespace(config=config, experts=torch.nn.ModuleList(random_experts(config, 4)), codec_path=None,
                            prompt_encoder_name=None)  # fmt: skip
    _, prompt, mask = random_inputs(config, 4, 3, 4, 1)
    session = Sampler(model, backend="cpu", weights="fp32").start(prompt, mask, seed=20)
    session.step(5)
    plain = ReferenceDecoder(config, states(model.experts), "fp32")  # its backbones are open to see
    state = plain.start(prompt, mask, np.arange(20, 23, dtype=np.uint64), SamplingSettings())
    state.force(session.codes[:, :, :4])
    hidden, run = [], plain.run_backbone
    plain.run_backbone = lambda *args: hidden.append(run(*args)) or hidden[-1]
    state.step(1)
    h = torch.cat(hidden, 1).transpose(0, 1)
    sampler = ResidualSampler(model, backend="cpu", weights="fp32")
    codes, logprobs, inputs = sampler(h, state.start, seed=20, frame=4)
    assert torch.equal(codes, session.codes[:, :, 4])
    assert (logprobs - session.logprobs[:, :, 4]).abs().max() < 1e-4
    torch.testing.assert_close(inputs, state.inputs)


def test_residual_sampler_without_residual_decoders(path):
    """factorized_layers 0: the heads read h; the engine's codes are PyTorch's, and `start` is not looked at."""
    config = SirenConfig(dim=40, n_heads=4, n_kv_heads=2, spatial_layers=1, factorized_layers=0, prompt_dim=6,
                         num_experts=4, codebook_size=33, dac_feature_dim=9, ffn_multiple_of=8,
                         conditioning="none")  # fmt: skip
    model = SimpleNamespace(config=config, experts=torch.nn.ModuleList(random_experts(config, 3)), codec_path=None,
                            prompt_encoder_name=None)  # fmt: skip
    h, start = torch.randn(2, 4, 5, 40, generator=torch.Generator().manual_seed(1))
    ours, theirs = (ResidualSampler(model, backend=name, weights="fp32") for name in ("cpu", "reference"))
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.8, 9, 1.0), (1.2, 0, 0.7), (0.0, 0, 1.0)):
        mine, plain, other = (
            sampler(h, at, 5, [0, 1, 4, 4, 9], temperature, top_k, top_p)
            for sampler, at in ((ours, start), (theirs, start), (ours, start + 1))
        )
        assert torch.equal(mine[0], plain[0])
        assert (mine[1] - plain[1]).abs().max() < 1e-4
        torch.testing.assert_close(mine[2], plain[2])
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_residual_equals_the_reference(golden_model):
    """Any h and start, frames of their own: the engine draws what PyTorch draws."""
    decoder = CpuDecoder(golden_model.config, states(golden_model.experts), "fp32", 2)
    plain = ReferenceDecoder(golden_model.config, states(golden_model.experts), "fp32")
    generator = torch.Generator().manual_seed(0)
    h, start = torch.randn(2, 6, 5, 64, generator=generator)
    seeds, frame = np.arange(5, dtype=np.uint64), np.array([0, 1, 4, 4, 9], np.int64)
    for sampling in SETTINGS[:3]:
        ours, theirs = (d.residual(h, start, seeds, frame, sampling) for d in (decoder, plain))
        assert torch.equal(ours[0], theirs[0])
        assert (ours[1] - theirs[1]).abs().max() < 1e-4 and (ours[2] - theirs[2]).abs().max() < 1e-4


# ---- the distribution ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 7, 1.0), (1.0, 0, 0.6), (1.5, 12, 0.7)]
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    """60,000 draws in C++: a chi-square test accepts, forbidden codes never appear, log-probabilities are exact."""
    stats = pytest.importorskip("scipy.stats")
    size, count = 21, 60_000
    logits = torch.randn(size, generator=torch.Generator().manual_seed(4)) * 1.5
    codes, logprobs = _cpu.draw(logits.expand(count, size).contiguous().numpy(), list(range(count)), 3, 1, temperature,
                                top_k, top_p)  # fmt: skip
    probabilities = (logits.double() / temperature).softmax(0)
    assert np.allclose(logprobs, probabilities.log().numpy()[codes], atol=1e-5)
    order = probabilities.argsort(descending=True)
    keep = top_k or size
    kept = probabilities[order[:keep]] / probabilities[order[:keep]].sum()
    keep = int((kept.cumsum(0) < top_p).sum()) + 1 if top_p < 1 else keep
    allowed = torch.zeros(size, dtype=torch.bool)
    allowed[order[:keep]] = True
    observed = np.bincount(codes, minlength=size)
    assert observed[~allowed.numpy()].sum() == 0
    expected = (probabilities * allowed / (probabilities * allowed).sum() * count).numpy()[allowed.numpy()]
    assert stats.chisquare(observed[allowed.numpy()], expected * observed.sum() / expected.sum()).pvalue > 1e-3


# ---- failures -----------------------------------------------------------------------------------------------------


def test_bad_logits_name_sequence_frame_and_codebook(path, golden, golden_model):
    """A head that overflows: the error says where, and the session stays at the frame it had."""
    config = golden_model.config
    broken = []
    for start, state in states(golden_model.experts):
        state = dict(state)
        if start == 4:
            state["heads.1.weight"] = torch.full_like(state["heads.1.weight"], 3e38)
        broken.append((start, state))
    decoder = CpuDecoder(config, broken, "fp32", 2)
    state = decoder.start(golden["prompt"], golden["prompt_mask"], zeros(3), SamplingSettings())
    for _ in range(2):
        with pytest.raises(SamplingError, match="sequence 0, frame 0, codebook 5"):
            state.step(3)
        assert state.frame == 0 and state.codes.shape == (3, 12, 0)


def test_nan_weights_and_missing_tensors_are_named(golden_model):
    config = golden_model.config
    first = dict(states(golden_model.experts)[0][1])
    rest = states(golden_model.experts)[1:]
    poisoned = {
        **first,
        "spatial_blocks.1.self_attention.qkv.weight": first["spatial_blocks.1.self_attention.qkv.weight"] * np.nan,
    }
    with pytest.raises(
        CheckpointError, match=r"expert 0: spatial_blocks\.1\.self_attention\.qkv\.weight holds a value"
    ):
        CpuDecoder(config, [(0, poisoned), *rest])
    partial = {name: value for name, value in first.items() if name != "sos"}
    with pytest.raises(CheckpointError, match="expert 0: sos is missing"):
        CpuDecoder(config, [(0, partial), *rest])
    with pytest.raises(CheckpointError, match="expert 0: bogus is not a tensor of this model"):
        CpuDecoder(config, [(0, {**first, "bogus": torch.zeros(1)}), *rest])
    with pytest.raises(CheckpointError, match="has shape"):
        CpuDecoder(config, [(0, {**first, "sos": torch.zeros(1, 1, 63)}), *rest])


def test_unknown_instruction_path(monkeypatch, golden_model):
    monkeypatch.setenv("SIREN_CPU_ISA", "mmx")
    with pytest.raises(BackendError, match=r"SIREN_CPU_ISA=mmx is not an instruction path; this build has .*portable"):
        CpuDecoder(golden_model.config, states(golden_model.experts))


def test_the_extension_checks_what_it_is_given(golden, golden_model):
    """Straight calls into siren._cpu with wrong shapes, dtypes and values raise; nothing is read out of bounds."""
    engine = CpuDecoder(golden_model.config, states(golden_model.experts), "fp32", 1).engine
    prompt, mask = np.zeros((2, 3, 32), np.float32), np.ones((2, 3), np.uint8)
    good = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": 1.0}
    for bad in (
        lambda: engine.start(prompt[:, :, :31].copy(), mask, [1, 2], **good),
        lambda: engine.start(prompt, mask[:1], [1, 2], **good),
        lambda: engine.start(prompt, mask, [1], **good),
        lambda: engine.start(prompt, mask * 0, [1, 2], **good),
        lambda: engine.start(np.zeros((2, 17, 32), np.float32), np.ones((2, 17), np.uint8), [1, 2], **good),
        lambda: engine.start(prompt, mask, [1, 2], **{**good, "temperature": float("nan")}),
        lambda: engine.load(6, "sos", np.zeros((1, 64), np.float32)),
        lambda: engine.load(0, "sos", np.zeros(64, np.float32)),
        lambda: engine.set_positions(np.zeros((3, 64), np.float32)),
        lambda: engine.residual(np.zeros((6, 2, 64), np.float32), np.zeros((6, 1, 64), np.float32), [1, 2],
                                np.zeros(2, np.int64), 1.0, 0, 1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            bad()
    for bad in (
        lambda: engine.start(prompt.astype(np.float64), mask, [1, 2], **good),
        lambda: engine.start(prompt, mask, [-1, 2], **good),
        lambda: engine.start(prompt.transpose(1, 0, 2), mask, [1, 2], **good),
    ):
        with pytest.raises(TypeError):
            bad()
    session = engine.start(prompt, mask, [1, 2], **good)
    for bad in (
        lambda: session.step(0, None, None),
        lambda: session.step(33, None, None),
        lambda: session.step(1, None, np.full((2, 12, 1), 1024)),
        lambda: session.step(1, None, np.full((2, 12, 1), -1)),
        lambda: session.step(2, None, np.zeros((2, 12, 1), np.int64)),
        lambda: session.select([2], []),
        lambda: session.select([-1], []),
        lambda: session.select([], []),
        lambda: session.select([0], [1, 2]),
    ):
        with pytest.raises(ValueError):
            bad()
    session.step(1, None, None)
    assert session.frame == 1


# ---- threads, signals, forks --------------------------------------------------------------------------------------


def test_threads_sampling_at_once_equal_serial_results(golden, golden_model):
    """Two Python threads on one Sampler, then on two of them, and two threads stepping one session."""
    one, two = (Sampler(golden_model, backend="cpu", weights=w, threads=2) for w in ("bf16", "int8"))

    def run(sampler, seed):
        return sampler.sample(golden["prompt"], golden["prompt_mask"], frames=24, seed=seed).codes

    for samplers in ((one, one), (one, two)):
        serial = [run(sampler, seed) for seed, sampler in enumerate(samplers)]
        results: dict[int, torch.Tensor] = {}
        workers = [
            threading.Thread(target=lambda i=i, s=s, out=results: out.__setitem__(i, run(s, i)))
            for i, s in enumerate(samplers)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(torch.equal(serial[i], results[i]) for i in range(2))

    session = one.start(golden["prompt"], golden["prompt_mask"])
    workers = [threading.Thread(target=session.step, args=(8,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert torch.equal(session.codes, one.sample(golden["prompt"], golden["prompt_mask"], frames=24).codes)


def _raise() -> None:
    raise RuntimeError("enough")


@pytest.mark.parametrize(
    ("stop", "error"),
    [(_raise, RuntimeError), (lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt)],
    ids=["callback", "ctrl-c"],
)
def test_callback_and_ctrl_c_stop_between_frames(golden, golden_model, stop: Callable[[], None], error):
    """An exception from the callback, or SIGINT, ends step() at a whole frame; the session can go on from there."""
    sampler = Sampler(golden_model, backend="cpu", weights="bf16")
    whole = sampler.sample(golden["prompt"], golden["prompt_mask"], frames=24).codes
    session = sampler.start(golden["prompt"], golden["prompt_mask"])
    seen = []

    def on_frame(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 5:
            stop()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(error) as raised:
            session.step(24, on_frame)
    finally:
        signal.signal(signal.SIGINT, before)
    assert raised.type is error
    assert session.frame in (5, 6) and seen[4] == (5, 24)
    session.step(24 - session.frame)
    assert torch.equal(session.codes, whole)


def test_a_session_can_be_read_while_it_steps(golden, golden_model):
    """From the callback and from another thread: codes of whole frames, no deadlock."""
    sampler = Sampler(golden_model, backend="cpu", weights="bf16")
    session = sampler.start(golden["prompt"], golden["prompt_mask"])
    shapes: list[tuple[int, ...]] = []
    reader = threading.Thread(target=lambda: [session.codes for _ in range(200)])
    reader.start()
    session.step(24, lambda done, total: shapes.append(tuple(session.codes.shape)))
    reader.join()
    assert shapes == [(3, 12, frame) for frame in range(1, 25)]


def test_too_large_a_model_is_refused():
    """Before anything is allocated, with what would fit."""
    config = SirenConfig(dim=16384, n_heads=64, n_kv_heads=64, spatial_layers=100)
    with pytest.raises(BackendError, match=r"bf16 weights of this model need [0-9.]+ GB .*; weights='int8' need less"):
        CpuDecoder(config, [], "bf16")


def test_a_forked_child_can_sample(golden, golden_model):
    """Workers do not survive a fork; the child starts its own instead of waiting for them."""
    sampler = Sampler(golden_model, backend="cpu", weights="bf16", threads=2)
    wanted = sampler.sample(golden["prompt"], golden["prompt_mask"], frames=6).codes
    child = os.fork()
    if child == 0:
        same = torch.equal(sampler.sample(golden["prompt"], golden["prompt_mask"], frames=6).codes, wanted)
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 30
    status = None
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status is not None and os.waitstatus_to_exitcode(status) == 0


def test_default_threads_within_affinity():
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
