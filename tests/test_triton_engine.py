"""backend="triton": the codes of the CPU engine, sessions that stop and go on, and errors that say what is missing.

On a machine without a GPU all of it runs in Triton's interpreter, where a frame of these tiny models takes seconds.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("triton")

from random_models import configs, forward, random_experts, random_inputs, states

import siren
from siren import device_session
from siren.errors import BackendError, InputError, SamplingError
from siren.reference import ReferenceDecoder
from siren.sampling import SamplingSettings
from siren.triton_engine import TritonDecoder

SMALL = siren.SirenConfig(
    dim=12,
    n_heads=2,
    n_kv_heads=1,
    spatial_layers=1,
    factorized_layers=1,
    prompt_dim=5,
    num_experts=2,
    num_codebooks=4,
    codebook_size=9,
    dac_code_dim=2,
    dac_feature_dim=3,
    max_seq_len=200,
    ffn_multiple_of=8,
)


@pytest.fixture(scope="module")
def small() -> siren.Siren:
    model = siren.Siren(SMALL)
    for expert, random in zip(model.experts, random_experts(SMALL, 1), strict=True):
        expert.load_state_dict(random.state_dict())
    return model


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [3, 4, 5] and their mask; the second is the first again."""
    _, prompt, mask = random_inputs(SMALL, 3, 3, 4, 1)
    prompt[1], mask[1] = prompt[0], mask[0]
    return prompt, mask


def test_golden_greedy(golden_model: siren.Siren, golden: dict[str, torch.Tensor]) -> None:
    """The official code's greedy codes, which are the CPU engine's, for all sequences and frames.

    The interpreter takes seconds for a frame, so only a GPU goes on after the tenth.
    """
    frames = 24 if torch.cuda.is_available() else 10
    sampler = siren.Sampler(golden_model, backend="triton", weights="fp32")
    out = sampler.sample(golden["prompt"], golden["prompt_mask"], frames=frames, temperature=0.0)
    assert torch.equal(out.codes, golden["greedy_codes"][:, :, :frames])


@pytest.mark.parametrize("residual", ["kernels", "persistent"])
def test_golden_sampled(
    residual: str, golden_model: siren.Siren, golden: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU engine's codes and log-probabilities with the same seed."""
    pytest.importorskip("siren._cpu", reason="the C++ extension is not built")
    monkeypatch.setenv("SIREN_TRITON_RESIDUAL", residual)
    prompt, mask = golden["prompt"], golden["prompt_mask"]
    settings = {"frames": 2, "seed": 2**64 - 2**20, "temperature": 0.9}
    ours = siren.Sampler(golden_model, backend="triton", weights="fp32")
    assert ours.describe()["residual"] == residual
    out = ours.sample(prompt, mask, **settings)
    expected = siren.Sampler(golden_model, backend="cpu", weights="fp32").sample(prompt, mask, **settings)
    assert torch.equal(out.codes, expected.codes)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)


def shallow(config: siren.SirenConfig) -> siren.SirenConfig:
    """One block of each kind: blocks are alike, and the interpreter slow."""
    return dataclasses.replace(config, spatial_layers=1, factorized_layers=min(1, config.factorized_layers))


@hypothesis.settings(max_examples=4)
@hypothesis.given(
    config=configs().filter(lambda config: config.num_experts <= 3 and config.n_heads <= 4).map(shallow),
    seed=st.integers(0, 99),
    weights=st.sampled_from(["fp32", "bf16", "int8"]),
    guidance=st.sampled_from([1.0, 1.0, 1.5]),
)
def test_random_models(config: siren.SirenConfig, seed: int, weights: str, guidance: float) -> None:
    """Teacher forced, of any shape: at most twice PyTorch's own error at that precision, against float64."""
    experts = random_experts(config, seed)
    codes, prompt, mask = random_inputs(config, seed, 2, 5, 2)
    settings, seeds = SamplingSettings(guidance_scale=guidance), np.arange(2, dtype=np.uint64)
    decoders = (
        TritonDecoder(config, states(experts), weights),
        ReferenceDecoder(config, states(experts), weights),
        ReferenceDecoder(config, states(experts), "fp32"),
    )
    ours, plain, exact = (d.start(prompt, mask, seeds, settings).force(codes).double() for d in decoders)
    if guidance == 1:
        exact = forward([expert.double() for expert in experts], codes, prompt.double(), mask)
    if weights == "int8":  # PyTorch rounds the weights alone, the kernels the activations too
        low = ReferenceDecoder(config, states(experts), "bf16").start(prompt, mask, seeds, settings).force(codes)
        plain = plain + (low.double() - exact)
    # A handful of numbers may come out exact by luck: two units in the last place are free, three times as many where
    # guidance takes differences.
    unit = torch.finfo(torch.float32 if weights == "fp32" else torch.bfloat16).eps
    floor = (2 if guidance == 1 else 6) * unit * exact.norm()
    assert (ours - exact).norm() <= max(2 * (plain - exact).norm(), floor)


def test_sessions_step_and_select(small: siren.Siren, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Whatever the steps, and through doublings of the cache, selections and new seeds: the reference's codes."""
    prompt, mask = inputs
    sessions = []
    for backend in ("triton", "reference"):
        session = siren.Sampler(small, backend, "fp32").start(
            prompt, mask, seed=[5, 6, 7], guidance_scale=1.3, top_k=7, top_p=0.95
        )
        session.step(2)
        session.select([2, 0, 1])
        session.step(1)
        session.select([0, 2], seed=[9, 2**63])
        session.step(2)
        session.select([1, 1, 0])
        session.step(1)
        sessions.append(session)
    ours, theirs = sessions
    assert (ours.frame, ours.batch) == (6, 3)
    assert torch.equal(ours.codes, theirs.codes)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-5, atol=1e-5)


def test_long_sessions(
    small: siren.Siren, inputs: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the cache is full it grows, and keeps what it holds."""
    monkeypatch.setattr(device_session, "_FIRST_CAPACITY", 2)
    prompt, mask = (tensor[:1] for tensor in inputs)
    session, expected = (
        siren.Sampler(small, backend, "fp32").start(prompt, mask) for backend in ("triton", "reference")
    )
    expected.step(7)
    for frames, capacity in ((1, 2), (2, 4), (4, 8)):
        session.step(frames)
        assert session._state.capacity == capacity
    assert torch.equal(session.codes, expected.codes)
    with pytest.raises(InputError, match="7 \\+ 194 frames exceed max_seq_len, which is 200"):
        session.step(194)


def test_batch_and_seed(small: siren.Siren, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A sequence's codes depend on its prompt and seed alone, bit for bit."""
    prompt, mask = inputs
    sampler = siren.Sampler(small, "triton", "bf16")
    together = sampler.sample(prompt, mask, frames=3, seed=[4, 4, 8])
    assert torch.equal(together.codes[0], together.codes[1])
    alone = sampler.sample(prompt[2:], mask[2:], frames=3, seed=8)
    assert torch.equal(alone.codes[0], together.codes[2])
    assert torch.equal(alone.logprobs[0], together.logprobs[2])


class Stop(Exception):
    pass


def test_stopped_between_frames(small: siren.Siren, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A callback sees each frame once it is there; if it raises, the session ends with that frame and goes on from it,
    though later ones were launched."""
    prompt, mask = inputs
    sampler = siren.Sampler(small, "triton", "fp32")
    expected = sampler.sample(prompt, mask, frames=5)
    session, seen = sampler.start(prompt, mask), []

    def stop(done: int, frames: int) -> None:
        seen.append((done, frames, session.frame, session.codes.shape[2]))
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        session.step(5, stop)
    assert seen == [(1, 5, 1, 1), (2, 5, 2, 2)]
    assert session.frame == 2
    session.step(3)
    assert torch.equal(session.codes, expected.codes)
    assert torch.equal(session.logprobs, expected.logprobs)


def test_stopped_with_frames_ahead(small: siren.Siren, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Stopped after its first frame while others are under way, a session may be selected from at once."""
    prompt, mask = inputs
    sampler = siren.Sampler(small, "triton", "fp32")
    expected = sampler.sample(prompt, mask, frames=3)
    session = sampler.start(prompt, mask)

    def stop(done: int, frames: int) -> None:
        assert session._state._frames.tolist() == [9] * 3  # eight more were launched
        raise Stop

    with pytest.raises(Stop):
        session.step(10, stop)
    session.select([2, 0])
    session.step(2)
    assert torch.equal(session.codes, expected.codes[[2, 0]])


def test_callbacks_may_use_autograd(small: siren.Siren, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Out of inference mode, on what the session gives there."""
    prompt, mask = (tensor[:1] for tensor in inputs)
    session, kept = siren.Sampler(small, "triton", "fp32").start(prompt, mask), []

    def train(done: int, frames: int) -> None:
        weight = torch.ones((), requires_grad=True)
        kept.append(session.logprobs)
        (weight * kept[-1]).sum().backward()
        torch.testing.assert_close(weight.grad, kept[-1].sum())

    session.step(2, train)
    weight = torch.ones((), requires_grad=True)
    (weight * kept[-1]).sum().backward()
    assert not session.codes.is_inference()


def test_memory_errors(
    small: siren.Siren, inputs: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback's own comes as it is; the engine's says what to do."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    session = siren.Sampler(small, "triton", "fp32").start(*(tensor[:1] for tensor in inputs))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        session.step(1, full)
    monkeypatch.setattr(session._state, "_advance", full)
    with pytest.raises(InputError, match="not enough memory for 2 more frames of 1 sequences: use fewer"):
        session.step(2)


def test_callbacks_cannot_use_their_session(small: siren.Siren, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """An error instead of waiting for itself; the session goes on."""
    prompt, mask = inputs
    session = siren.Sampler(small, "triton", "fp32").start(prompt, mask)
    for use in (lambda: session.step(1), lambda: session.select([0])):
        with pytest.raises(InputError, match="cannot be stepped or selected from its own on_frame"):
            session.step(1, lambda *_, use=use: use())
    assert (session.frame, session.batch) == (2, 3)
    session.step(1)


def test_threads_take_turns(small: siren.Siren, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Two threads that step one session, and two sessions of one sampler side by side."""
    prompt, mask = (tensor[:1] for tensor in inputs)
    sampler = siren.Sampler(small, "triton", "fp32")
    expected = sampler.sample(prompt, mask, frames=4)
    session = sampler.start(prompt, mask)
    threads = [threading.Thread(target=session.step, args=(2,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert torch.equal(session.codes, expected.codes)


@pytest.mark.parametrize("outside", [True, False])
def test_inference_mode(outside: bool, small: siren.Siren, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A session started in inference mode goes on out of it, and the other way round; what it gives, autograd takes."""
    prompt, mask = (tensor[:1] for tensor in inputs)
    sampler = siren.Sampler(small, "triton", "fp32")
    with torch.inference_mode(outside):
        session = sampler.start(prompt, mask)
    with torch.inference_mode(not outside):
        session.step(1)
        session.select([0, 0])
    session.step(1)
    assert not session.codes.is_inference() and not session.logprobs.is_inference()


def test_stopped_before_the_first_frame(small: siren.Siren, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """An interruption inside the very first frame leaves a session at frame 0 that gives the same codes."""
    prompt, mask = inputs
    sampler = siren.Sampler(small, "triton", "fp32")
    session = sampler.start(prompt, mask)
    launched = session._state.weights.residual_frame

    def interrupted(*arguments: object) -> None:
        launched(*arguments)
        raise KeyboardInterrupt

    session._state.weights.residual_frame = interrupted
    with pytest.raises(KeyboardInterrupt):
        session.step(2)
    del session._state.weights.residual_frame
    assert session.frame == 0
    session.step(2)
    assert torch.equal(session.codes, sampler.sample(prompt, mask, frames=2).codes)


def test_logits_that_cannot_be_drawn_from(small: siren.Siren, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The error names sequence, frame and codebook; the frames before stay, and the error comes again."""
    prompt, mask = inputs
    session = siren.Sampler(small, "triton", "fp32").start(prompt, mask, seed=3)
    session.step(1)
    before = session.codes
    session._state._start = session._state._start.clone()  # out here an ordinary tensor, which may be written
    session._state._start[1, 2] = torch.nan  # the third sequence, from the second expert on: codebook 2
    for _ in range(2):
        with pytest.raises(SamplingError, match="the logits of sequence 2, frame 1, codebook 2 hold NaN"):
            session.step(2)
        assert session.frame == 1
        assert torch.equal(session.codes, before)


def test_residual_sampler(small: siren.Siren) -> None:
    """The reference's codes, from one persistent launch, each sequence at a frame of its own; NaN is named."""
    generator = torch.Generator().manual_seed(0)
    h, start = (torch.randn(2, 3, 12, generator=generator) for _ in range(2))
    ours, theirs = (siren.ResidualSampler(small, backend, "fp32") for backend in ("triton", "reference"))
    assert ours.describe()["residual"] == "persistent"
    frames, seeds = [0, 7, 2**31], [1, 2**40, 3]
    for settings in ({}, {"top_k": 4, "top_p": 0.8, "temperature": 0.6}, {"temperature": 0.0}):
        result, expected = (sampler(h, start, seeds, frames, **settings) for sampler in (ours, theirs))
        assert torch.equal(result[0], expected[0])
        torch.testing.assert_close(result[1], expected[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result[2], expected[2])
    huge = torch.full_like(h, 3e38)  # its square is infinite
    huge[:, :2] = h[:, :2]
    with pytest.raises(SamplingError, match="sequence 2, frame 2147483648, codebook 0 hold NaN"):
        ours(huge, start, seeds, frames)


def test_from_pretrained(golden_folder: Path, golden_model: siren.Siren) -> None:
    """A folder gives the weights that the model gives, whatever their type."""
    for weights in ("fp32", "int8"):
        decoders = [siren.Sampler(golden_model, "triton", weights)._decoder.weights]
        decoders.append(siren.Sampler.from_pretrained(golden_folder, "triton", weights)._decoder.weights)
        for part in ("_backbone", "_decoder"):
            for kind in ("tensors", "scales"):
                one, other = (getattr(getattr(decoder, part), kind) for decoder in decoders)
                assert one.keys() == other.keys()
                for name in one:
                    close = {"rtol": 1e-5, "atol": 1e-6} if name == "tables" else {"rtol": 0, "atol": 0}
                    torch.testing.assert_close(one[name], other[name], **close)


def test_describe(small: siren.Siren) -> None:
    values = siren.Sampler(small, "triton", "int8").describe()
    assert values["backend"] == values["requested"] == "triton"
    assert values["weights"] == "int8"
    assert values["residual"] == "kernels"
    assert values["weight_bytes"] > sum(p.numel() for p in small.experts[0].heads.parameters())


def test_what_cannot_be_asked_for(small: siren.Siren, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="threads are the C\\+\\+ engine's: leave them out with backend 'triton'"):
        siren.Sampler(small, "triton", threads=2)
    large = siren.Siren(siren.SirenConfig(**{**SMALL.to_dict(), "codebook_size": 8193}))
    with pytest.raises(BackendError, match="codebooks of at most 8192 codes, not 8193"):
        siren.Sampler(large, "triton")
    monkeypatch.setenv("SIREN_TRITON_RESIDUAL", "one")
    with pytest.raises(BackendError, match="SIREN_TRITON_RESIDUAL must be 'kernels' or 'persistent', not 'one'"):
        siren.Sampler(small, "triton")


WITHOUT = """
import sys
if {missing}:
    sys.modules["triton"] = None
import torch, siren
from siren.errors import BackendError
model = siren.Siren(siren.SirenConfig.preset("tiny"))
out = siren.Sampler(model, weights="fp32").sample(torch.zeros(1, 2, 32), frames=1)
assert out.codes.shape == (1, 12, 1)
try:
    siren.Sampler(model, backend="triton")
except BackendError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (True, "needs the package triton .*: pip install 'siren\\[triton\\]'"),
        pytest.param(
            False,
            "needs a GPU, and PyTorch sees none: use 'auto' or 'cpu', or set TRITON_INTERPRET=1",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=["without Triton", "without a GPU"],
)
def test_what_is_missing(missing: bool, message: str) -> None:
    """Without Triton, or without a GPU, everything else works, and the backend says what it lacks."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    script = WITHOUT.format(missing=missing)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(message, done.stdout), done.stdout
