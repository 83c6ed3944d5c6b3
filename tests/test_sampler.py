"""Sampler, Session and ResidualSampler: one contract on every backend, and one clear error for every bad argument."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from random_models import random_experts, random_inputs
from scipy import stats

import siren
from siren import BackendError, InputError, ResidualSampler, Sampler, Siren, SirenConfig
from siren import sampler as module
from siren.engine import extension

CONFIG = SirenConfig(
    dim=12, n_heads=4, n_kv_heads=2, spatial_layers=2, factorized_layers=2, prompt_dim=5, codebook_size=33,
    dac_code_dim=3, dac_feature_dim=7, ffn_multiple_of=7, max_seq_len=40, max_prompt_len=8,
)  # fmt: skip


def random_model(config: SirenConfig, seed: int) -> Siren:
    model = Siren(config).eval()
    for expert, source in zip(model.experts, random_experts(config, seed), strict=True):
        expert.load_state_dict(source.state_dict())
    return model


def cpu_engine() -> bool:
    try:
        extension()
    except BackendError:
        return False
    return True


BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not cpu_engine(), reason="the C++ extension is not built")),
]


@pytest.fixture(scope="module")
def model() -> Siren:
    return random_model(CONFIG, 0)


@pytest.fixture(scope="module", params=BACKENDS)
def sampler(request, model) -> Sampler:
    return Sampler(model, backend=request.param, weights="fp32")


@pytest.fixture(scope="module")
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    _, prompt, mask = random_inputs(CONFIG, 1, 7, 6, 1)
    return prompt, mask


def test_golden_greedy_codes(golden_folder, golden, golden_model):
    """The official model's greedy codes, from a folder and from a model, on every backend."""
    for backend in ("reference", *(["cpu"] if cpu_engine() else [])):
        for sampler in (
            Sampler.from_pretrained(golden_folder, backend=backend, weights="fp32"),
            Sampler(golden_model, backend=backend, weights="fp32"),
        ):
            out = sampler.sample(golden["prompt"], golden["prompt_mask"], frames=24, temperature=0)
            assert torch.equal(out.codes, golden["greedy_codes"].long()), backend


def test_sample(sampler, prompts):
    """Shapes, types, range, and the log-probabilities of the model's own forward pass."""
    out = sampler.sample(*prompts, frames=5, seed=3, temperature=0.9, top_k=20, top_p=0.95)
    assert out.codes.shape == out.logprobs.shape == (7, 12, 5)
    assert (out.codes.dtype, out.logprobs.dtype) == (torch.int64, torch.float32)
    assert int(out.codes.min()) >= 0
    assert int(out.codes.max()) < 33
    assert not out.codes.is_inference()


def test_logprobs_are_those_of_the_forward_pass(sampler, model, prompts):
    out = sampler.sample(*prompts, frames=5, seed=3, temperature=0.9, top_k=20)
    with torch.no_grad():
        logits = model(out.codes, *prompts)
    expected = torch.log_softmax(logits / 0.9, -1).gather(-1, out.codes.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out.logprobs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not cpu_engine(), reason="the C++ extension is not built")
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.8}, {"guidance_scale": 2.5}, {"temperature": 0}],
    ids=str,
)
def test_backends_agree(model, prompts, settings):
    """The same seed gives the same codes in the engine and in the reference."""
    reference, engine = (Sampler(model, backend=backend, weights="fp32") for backend in ("reference", "cpu"))
    a, b = (s.sample(*prompts, frames=12, seed=[5, 2**64 - 1, 0, 1, 2, 3, 4], **settings) for s in (reference, engine))
    assert torch.equal(a.codes, b.codes)
    torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 1.8])
def test_seed_is_all_that_matters(sampler, prompts, guidance):
    """Batch 1, each place of a batch of 7, steps of any size, and after select."""
    prompt, mask = prompts
    whole = sampler.sample(prompt, mask, frames=8, seed=100, guidance_scale=guidance)
    for i in range(7):
        rows = slice(i, i + 1)
        alone = sampler.sample(prompt[rows], mask[rows], frames=8, seed=100 + i, guidance_scale=guidance)
        assert torch.equal(alone.codes[0], whole.codes[i]), f"sequence {i}"
    session = sampler.start(prompt, mask, seed=list(range(100, 107)), guidance_scale=guidance)
    session.step(3)
    session.select([4, 4, 0, 6])
    session.step()
    session.select(torch.tensor([3, 1, 0, 1]))
    session.step(4)
    assert (session.batch, session.frame) == (4, 8)
    assert torch.equal(session.codes, whole.codes[[6, 4, 4, 4]])
    torch.testing.assert_close(session.logprobs, whole.logprobs[[6, 4, 4, 4]], rtol=1e-4, atol=1e-4)


def test_select_with_new_seeds(sampler, prompts):
    session = sampler.start(*prompts, seed=0)
    session.step(2)
    session.select([2, 2, 2], seed=[2, 71, 72])
    session.step(5)
    codes = session.codes
    assert torch.equal(codes[0, :, :2], codes[1, :, :2])
    assert not torch.equal(codes[1], codes[2])
    assert torch.equal(codes[0], sampler.sample(*prompts, frames=7, seed=0).codes[2])
    session.select([1], seed=9)
    assert session.batch == 1


def test_what_is_under_the_mask_does_not_matter(sampler, prompts):
    """NaN in padding, and padding cut off, change nothing; no mask means all tokens."""
    prompt = prompts[0].clone()
    mask = torch.zeros(7, 6, dtype=torch.bool)
    mask[:, :3] = True
    plain = sampler.sample(prompt, mask, frames=4)
    prompt[:, 3:] = math.nan
    assert torch.equal(sampler.sample(prompt, mask, frames=4).codes, plain.codes)
    assert torch.equal(sampler.sample(prompt[:, :3], None, frames=4).codes, plain.codes)
    doubled = sampler.sample(prompt[:, :3].double().requires_grad_(), frames=4)
    assert torch.equal(doubled.codes, plain.codes)


def test_progress_and_stopping(sampler, prompts):
    """on_frame counts every frame; an exception from it stops there, and the session can go on."""
    calls = []
    sampler.sample(*prompts, frames=3, on_frame=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    whole = sampler.sample(*prompts, frames=6, seed=5)
    session = sampler.start(*prompts, seed=5)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.step(6, stop)
    assert session.frame == 2
    session.step(4)
    assert torch.equal(session.codes, whole.codes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_share_a_sampler(model, prompts, backend):
    """Two threads on one sampler, and on two, get the codes of serial calls."""
    samplers = [Sampler(model, backend=backend, weights="fp32") for _ in range(2)]
    prompt, mask = prompts

    def run(job: tuple[int, int]) -> torch.Tensor:
        sampler, i = job
        rows = slice(i % 5, i % 5 + 2)
        return samplers[sampler].sample(prompt[rows], mask[rows], frames=5, seed=i, guidance_scale=1.5).codes

    serial = [run((0, i)) for i in range(8)]
    with ThreadPoolExecutor(2) as pool:
        for jobs in ([(0, i) for i in range(8)], [(i % 2, i) for i in range(8)]):
            for i, codes in enumerate(pool.map(run, jobs)):
                assert torch.equal(codes, serial[i])


@pytest.mark.skipif(not cpu_engine(), reason="the C++ extension is not built")
def test_thread_count_does_not_change_codes(model, prompts):
    one, two = (Sampler(model, backend="cpu", weights="fp32", threads=n) for n in (1, 2))
    assert (one.describe()["threads"], two.describe()["threads"]) == (1, 2)
    assert torch.equal(one.sample(*prompts, frames=6).codes, two.sample(*prompts, frames=6).codes)


def test_sampler_keeps_a_copy(prompts):
    """Training the model afterwards does not change what a sampler draws."""
    model = random_model(CONFIG, 0)
    for backend in ("reference", *(["cpu"] if cpu_engine() else [])):
        sampler = Sampler(model, backend=backend, weights="fp32")
        before = sampler.sample(*prompts, frames=3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        assert torch.equal(sampler.sample(*prompts, frames=3).codes, before.codes)


SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "combined": {"temperature": 1.4, "top_k": 6, "top_p": 0.8},
    "guidance": {"guidance_scale": 2.0},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_frequencies(backend, settings):
    """4,000 first frames of one prompt: codes of the first codebook follow its truncated distribution."""
    config = SirenConfig.from_dict(
        CONFIG.to_dict() | {"codebook_size": 9, "num_codebooks": 2, "num_experts": 1, "spatial_layers": 1}
    )
    model = random_model(config, 3)
    count = 4000
    prompt = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    out = Sampler(model, backend=backend, weights="fp32").sample(prompt.expand(count, -1, -1), frames=1, **settings)
    with torch.no_grad():
        codes = torch.zeros(1, 2, 1, dtype=torch.int64)
        logits, null = model(codes, prompt)[0, 0, 0], model(codes, torch.zeros(1, 1, 5))[0, 0, 0]
    logits = (null + settings.get("guidance_scale", 1.0) * (logits - null)).double() / settings.get("temperature", 1.0)
    ordered, order = logits.sort(descending=True)
    allowed = torch.arange(9) < (settings.get("top_k") or 9)
    weight = ordered.softmax(-1) * allowed
    weight /= weight.sum()
    weight *= (weight.cumsum(-1) - weight) < settings.get("top_p", 1.0)
    expected = torch.zeros(9, dtype=torch.float64).scatter(0, order, weight / weight.sum())
    counts = torch.bincount(out.codes[:, 0, 0], minlength=9)
    assert int(counts[expected == 0].sum()) == 0
    kept = expected > 0
    assert stats.chisquare(counts[kept].numpy(), (expected[kept] * count).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_sampler(model, backend):
    """A frame's codes do not depend on the batch; inputs are the codes' embedding sums; both backends agree."""
    residual = ResidualSampler(model, backend=backend, weights="fp32")
    h, start = torch.randn(2, 6, 3, 12, generator=torch.Generator().manual_seed(1))
    codes, logprobs, inputs = residual(h, start, seed=[4, 5, 2**64 - 1], frame=[0, 17, 2**32 - 1], top_k=30)
    assert (codes.shape, logprobs.shape, inputs.shape) == ((3, 12), (3, 12), (6, 3, 12))
    assert (codes.dtype, logprobs.dtype, inputs.dtype) == (torch.int64, torch.float32, torch.float32)
    assert not any(tensor.is_inference() for tensor in (codes, logprobs, inputs))
    for i, (seed, frame) in enumerate([(4, 0), (5, 17), (2**64 - 1, 2**32 - 1)]):
        alone = residual(h[:, i : i + 1], start[:, i : i + 1], seed=seed, frame=frame, top_k=30)
        assert torch.equal(alone[0][0], codes[i])
    with torch.no_grad():
        expected = torch.stack([sum(e.tables()[j][codes[:, j]] for j in range(12)) for e in model.experts])
    torch.testing.assert_close(inputs, expected)
    other = ResidualSampler(model, backend="reference", weights="fp32")
    wanted = other(h, start, seed=[4, 5, 2**64 - 1], frame=torch.tensor([0, 17, 2**32 - 1]), top_k=30)
    assert torch.equal(codes, wanted[0])
    torch.testing.assert_close(logprobs, wanted[1], rtol=1e-4, atol=1e-4)
    assert residual.describe()["backend"] == backend


def test_auto_says_what_it_picked(model, monkeypatch):
    """The engine where it is built, else the reference with the reason; an explicit backend never falls back."""
    if cpu_engine():
        assert Sampler(model).describe().items() >= {"backend": "cpu", "weights": "bf16", "requested": "auto"}.items()

    def missing() -> None:
        raise BackendError("the C++ extension cannot be imported: gone")

    monkeypatch.setattr(module, "extension", missing)
    monkeypatch.setattr("siren.engine.extension", missing)
    described = Sampler(model, weights="fp32").describe()
    assert described.items() >= {"backend": "reference", "requested": "auto", "weights": "fp32"}.items()
    assert described["reason"] == "the C++ extension cannot be imported: gone"
    with pytest.raises(BackendError, match="gone"):
        Sampler(model, backend="cpu")


def test_weights_that_a_backend_does_not_have(model):
    for backend in ("auto", "cpu", "reference", "triton"):
        with pytest.raises(BackendError, match=f"'fp8' are for backend 'cuda'; '{backend}' has 'fp32', 'bf16' and"):
            Sampler(model, backend=backend, weights="fp8")
    with pytest.raises(BackendError, match="'cuda' has weights 'bf16', 'int8', 'fp8', not 'fp32'"):
        Sampler(model, backend="cuda", weights="fp32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "gpu"}, "backend must be one of auto, reference, cpu, triton, cuda, not 'gpu'"),
        ({"backend": None}, "backend must be one of"),
        ({"weights": "fp4"}, "weights must be one of fp32, bf16, int8, fp8, not 'fp4'"),
        ({"threads": 0}, "threads must be from 1"),
        ({"threads": 2.0}, "threads must be a whole number"),
        ({"threads": True}, "threads must be a whole number"),
        ({"backend": "reference", "threads": 2}, "call torch.set_num_threads"),
    ],
)
def test_bad_constructor_arguments(model, arguments, message):
    for kind in (Sampler, ResidualSampler):
        with pytest.raises(InputError, match=message):
            kind(model, **arguments)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_numbers(value):
    model = random_model(CONFIG, 0)
    model.experts[2].heads[1].weight.data[3, 4] = value
    for backend in ("reference", "auto"):
        with pytest.raises(InputError, match=r"expert 2: heads\.1\.weight holds NaN or infinity"):
            Sampler(model, backend=backend)


def test_unknown_folder(tmp_path):
    with pytest.raises(siren.CheckpointError):
        Sampler.from_pretrained(tmp_path / "missing")


PROMPT, MASK = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": [[1.0]]}, "prompt must be a torch.Tensor, not list"),
        ({"prompt": torch.zeros(3, 5)}, r"prompt must have shape \[any, any, 5\], got \[3, 5\]"),
        ({"prompt": torch.zeros(2, 3, 4)}, "prompt must have shape"),
        ({"prompt": torch.zeros(0, 3, 5)}, "prompt must have shape"),
        ({"prompt": torch.zeros(2, 0, 5)}, "prompt must have shape"),
        ({"prompt": torch.zeros(2, 9, 5)}, "9 tokens; max_prompt_len is 8"),
        ({"prompt": PROMPT.long()}, "prompt must be floating point, not torch.int64"),
        ({"prompt": PROMPT.to(torch.complex64)}, "prompt must be floating point"),
        ({"prompt": PROMPT.to("meta")}, "prompt must be a dense tensor on the CPU"),
        ({"prompt": PROMPT.to_sparse()}, "prompt must be a dense tensor on the CPU"),
        ({"prompt": PROMPT * math.nan}, "prompt holds NaN"),
        ({"prompt": PROMPT.double() + 1e300}, "prompt holds NaN or infinity"),
        ({"prompt_mask": MASK[:, :2]}, r"prompt_mask must have shape \[2, 3\], got \[2, 2\]"),
        ({"prompt_mask": MASK[0]}, "prompt_mask must have shape"),
        ({"prompt_mask": MASK.int()}, "prompt_mask must be torch.bool, not torch.int32"),
        ({"prompt_mask": [True]}, "prompt_mask must be a torch.Tensor"),
        ({"prompt_mask": torch.tensor([[True] * 3, [False] * 3])}, "prompt_mask of sequence 1 holds no True"),
        ({"frames": 0}, "frames must be from 1 to 40, not 0"),
        ({"frames": 41}, "frames must be from 1 to 40, not 41"),
        ({"frames": 2.0}, "frames must be a whole number"),
        ({"frames": True}, "frames must be a whole number"),
        ({"frames": None}, "frames must be a whole number"),
        ({"seed": -1}, "seeds must be from 0"),
        ({"seed": 2**64 - 1}, "seeds must be from 0"),
        ({"seed": [1, 2, 3]}, "seed lists 3 values for 2 sequences"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 34}, "top_k must be from 0 to the 33 codes"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"on_frame": 3}, "on_frame must be callable"),
    ],
)
def test_bad_sample_arguments(sampler, change, message):
    """Refused before any backend sees them."""
    with pytest.raises(InputError, match=message):
        sampler.sample(**({"prompt": PROMPT, "prompt_mask": MASK, "frames": 2} | change))


def test_bad_session_arguments(sampler):
    session = sampler.start(PROMPT, MASK)
    session.step(39)
    for frames, message in ((2, r"39 \+ 2 frames exceed max_seq_len, which is 40"), (0, "frames"), (1.0, "frames")):
        with pytest.raises(InputError, match=message):
            session.step(frames)
    for indices in ([], [2], [-1], [0.0], [True], "0", 0, None, torch.tensor(1), torch.tensor([[0]])):
        with pytest.raises(InputError, match="ind"):
            session.select(indices)
    with pytest.raises(InputError, match="seed"):
        session.select([0, 1], seed=[1])
    assert (session.batch, session.frame) == (2, 39)
    session.step()


H = torch.zeros(6, 2, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(5, 2, 12)}, r"h must have shape \[6, any, 12\], got \[5, 2, 12\]"),
        ({"h": torch.zeros(6, 0, 12)}, "h must have shape"),
        ({"h": H.long()}, "h must be floating point"),
        ({"h": H + math.inf}, "h holds NaN or infinity"),
        ({"start": torch.zeros(6, 3, 12)}, "h and start must have one shape"),
        ({"start": H * math.nan}, "start holds NaN"),
        ({"start": H.to("meta")}, "start must be a dense tensor on the CPU"),
        ({"seed": [1]}, "seed lists 1 values for 2 sequences"),
        ({"frame": -1}, "frame must be from 0"),
        ({"frame": 2**32}, "frame must be from 0"),
        ({"frame": [1]}, "frame lists 1 values for 2 sequences"),
        ({"frame": 1.0}, "frame must be a whole number"),
        ({"frame": np.zeros((2, 1), dtype=int)}, "frame must be a whole number"),
        ({"top_k": 34}, "top_k"),
        ({"temperature": math.inf}, "temperature"),
    ],
)
def test_bad_residual_arguments(model, change, message):
    residual = ResidualSampler(model, backend="reference", weights="fp32")
    with pytest.raises(InputError, match=message):
        residual(**({"h": H, "start": H} | change))
