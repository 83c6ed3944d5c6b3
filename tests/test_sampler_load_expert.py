"""Sampler.load_expert: as if the sampler had been built anew, for every backend; and who waits for whom.

Triton's kernels and the persistent CUDA kernel run on a GPU where there is one, else interpreted and emulated.
"""

from __future__ import annotations

import copy
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import configs, random_experts, random_inputs

from siren import BackendError, InputError, ResidualSampler, SampleOutput, Sampler, Session, Siren, SirenConfig
from siren.expert import Expert

CONFIG = SirenConfig(
    dim=32, n_heads=4, n_kv_heads=2, spatial_layers=1, factorized_layers=1, prompt_dim=5, num_experts=2,
    num_codebooks=4, codebook_size=40, dac_code_dim=2, dac_feature_dim=3, max_seq_len=70, ffn_multiple_of=32,
)  # fmt: skip
KINDS = {
    "reference": ("fp32", "bf16", "int8"),
    "cpu": ("fp32", "bf16", "int8"),
    "triton": ("fp32", "bf16", "int8"),
    "cuda": ("bf16", "int8", "fp8"),
}
ALL = [(backend, weights) for backend, kinds in KINDS.items() for weights in kinds]
PATIENCE = 60  # seconds until a thread that should have ended counts as stuck


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIREN_CUDA_EMULATE", raising=False)
    if not torch.cuda.is_available():
        monkeypatch.setenv("SIREN_CUDA_EMULATE", "1")
        monkeypatch.setenv("SIREN_CUDA_EMULATE_SMS", "3")


def needs(backend: str) -> None:
    """Skip where this backend is not built."""
    parts = {
        "cpu": "siren._cpu",
        "triton": "triton",
        "cuda": "siren._cuda" if torch.cuda.is_available() else "siren._emulator",
    }
    if backend in parts:
        pytest.importorskip(parts[backend], reason=f"{backend} is not built")


def model_of(config: SirenConfig, seed: int) -> Siren:
    model = Siren(config).eval()
    for expert, source in zip(model.experts, random_experts(config, seed), strict=True):
        expert.load_state_dict(source.state_dict())
    return model


def with_expert(model: Siren, index: int, seed: int) -> Siren:
    """A copy whose expert `index` is another one."""
    changed = copy.deepcopy(model)
    changed.experts[index].load_state_dict(random_experts(model.config, seed)[index].state_dict())
    return changed


@pytest.fixture(scope="module")
def model() -> Siren:
    return model_of(CONFIG, 1)


@pytest.fixture(scope="module")
def changed(model: Siren) -> Siren:
    """The model after an update of its expert 1."""
    return with_expert(model, 1, 2)


@pytest.fixture(scope="module")
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    _, prompt, mask = random_inputs(CONFIG, 1, 2, 4, 1)
    return prompt, mask


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    needs(request.param)
    return str(request.param)


def equal(a: SampleOutput | Session, b: SampleOutput | Session) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.logprobs, b.logprobs)


def weights_of(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """All tensors that an object holds, but for programs, which a batch brings. The C++ engine shows none."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    own = vars(value) if hasattr(value, "__dict__") and type(value).__module__.startswith(("siren", "torch.nn")) else {}
    for part in (*parts, *(own[name] for name in own if name != "_plans")):
        yield from weights_of(part, seen)


def same(sampler: Sampler, other: Sampler, prompts: tuple[torch.Tensor, torch.Tensor], frames: int = 1) -> bool:
    """Whether two samplers hold the same bits and draw the same. Triton's interpreter takes seconds for a frame."""
    pairs = zip(weights_of(sampler._decoder, set()), weights_of(other._decoder, set()), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        return False
    if sampler.describe()["backend"] == "triton":
        return True
    return equal(*(each.sample(*prompts, frames=frames, seed=3) for each in (sampler, other)))


# ---- the same as a new sampler --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "weights"), ALL)
def test_equals_a_new_sampler(backend, weights, model, changed, prompts):
    """Weights, codes and log-probabilities, bit for bit, after one load and after another that takes it back."""
    needs(backend)
    sampler = Sampler(model, backend, weights)
    for source, other in ((changed, model), (model, changed)):
        sampler.load_expert(1, source.experts[1])
        assert same(sampler, Sampler(source, backend, weights), prompts, frames=4)
        assert not same(sampler, Sampler(other, backend, weights), prompts, frames=4)


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_in_place(backend, model, changed, prompts):
    """All tensors stay where they are: compiled functions, captured graphs and launches hold their addresses."""
    needs(backend)
    sampler = Sampler(model, backend, "int8")
    before = [tensor.data_ptr() for tensor in weights_of(sampler._decoder, set())]
    sampler.load_expert(1, changed.experts[1])
    assert same(sampler, Sampler(changed, backend, "int8"), prompts)
    assert before and [tensor.data_ptr() for tensor in weights_of(sampler._decoder, set())] == before


@given(config=configs(), seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=5)
def test_models_of_any_shape(config, seed, data):
    """Random shapes, conditionings and starts, any expert, with guidance."""
    needs("cpu")
    index = data.draw(st.integers(0, config.num_experts - 1))
    model = model_of(config, seed)
    changed = with_expert(model, index, seed + 1)
    _, *prompts = random_inputs(config, seed, 2, 3, 1)
    weights = data.draw(st.sampled_from(KINDS["cpu"]))
    for backend in ("reference", "cpu"):
        sampler = Sampler(model, backend, weights)
        sampler.load_expert(index, changed.experts[index])
        wanted = Sampler(changed, backend, weights).sample(*prompts, frames=3, guidance_scale=1.5)
        assert equal(sampler.sample(*prompts, frames=3, guidance_scale=1.5), wanted), backend


@pytest.mark.parametrize(
    ("backend", "weights"), [("reference", "fp32"), ("cpu", "int8"), ("triton", "bf16"), ("cuda", "fp8")]
)
def test_residual_sampler(backend, weights, model, changed):
    needs(backend)
    h, start = torch.randn(2, 2, 2, 32, generator=torch.Generator().manual_seed(1))
    sampler = ResidualSampler(model, backend, weights)
    before = sampler(h, start)
    sampler.load_expert(1, changed.experts[1])
    after, wanted = sampler(h, start), ResidualSampler(changed, backend, weights)(h, start)
    assert all(torch.equal(a, b) for a, b in zip(after, wanted, strict=True))
    assert not torch.equal(after[2], before[2])


@pytest.mark.parametrize("backend", KINDS)
@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_and_autocast(inside, backend, model, changed, prompts):
    """A sampler built in inference mode takes weights out of it, the other way round, and in a training loop."""
    needs(backend)
    weights = KINDS[backend][0]
    with torch.inference_mode(inside):
        sampler = Sampler(model, backend, weights)
    with torch.inference_mode(not inside), torch.autocast("cpu", torch.bfloat16):
        sampler.load_expert(1, changed.experts[1])
    assert same(sampler, Sampler(changed, backend, weights), prompts)


@pytest.mark.parametrize("backend", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_and_strides(dtype, backend, model, changed, prompts):
    """Tensors of another type, that are steps of an autograd graph and not contiguous."""
    needs(backend)
    weights = KINDS[backend][-1]
    state = {
        name: torch.stack((value, value), dim=-1).to(dtype).requires_grad_()[..., 0]
        for name, value in changed.experts[1].state_dict().items()
    }
    sampler, wanted = Sampler(model, backend, weights), copy.deepcopy(model)
    wanted.experts[1].load_state_dict(state)  # into float32
    sampler.load_expert(1, state)
    assert same(sampler, Sampler(wanted, backend, weights), prompts)
    with torch.no_grad():
        state["sos"].zero_()  # a copy was taken
    assert same(sampler, Sampler(wanted, backend, weights), prompts)


# ---- what is refused ------------------------------------------------------------------------------------------------


def changed_state(name: str, value: object) -> Callable[[Siren], dict[str, object]]:
    return lambda model: {**model.experts[1].state_dict(), name: value}


def without(*names: str) -> Callable[[Siren], dict[str, torch.Tensor]]:
    return lambda model: {name: value for name, value in model.experts[1].state_dict().items() if name not in names}


def other_config(**fields: object) -> Callable[[Siren], Expert]:
    return lambda _: random_experts(SirenConfig.from_dict({**CONFIG.to_dict(), **fields}), 1)[1]


TABLE = "codebooks.layers.3"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda model: model, "expert 1 must be a siren.expert.Expert or a mapping of names to tensors, not Siren"),
        (lambda _: None, "expert 1 must be a siren.expert.Expert or a mapping of names to tensors, not NoneType"),
        (lambda model: model.experts[0], "expert 1 starts at codebook 2, and the one given at 0"),
        (other_config(norm_eps=1e-4), "given with norm_eps 0.0001, and this sampler's model has 1e-05"),
        (other_config(conditioning="none"), "given with conditioning 'none', and this sampler's model has 'accumula"),
        (other_config(spatial_layers=2), r"expert 1 has unknown spatial_blocks\.1\.c\S*, \S*, \S* and \d+ more: it"),
        (without("sos"), "expert 1 lacks sos: it is not an expert of this sampler's model"),
        (changed_state("bogus", torch.zeros(1)), "expert 1 has unknown bogus: it is not an expert"),
        (changed_state(3, torch.zeros(1)), "expert 1 has unknown 3: it is not an expert"),
        (changed_state("sos", torch.zeros(32)), r"expert 1: sos must have shape \[1, 1, 32\], not \[32\]"),
        (changed_state("sos", [0.0] * 32), r"expert 1: sos must be a torch\.Tensor, not list"),
        (changed_state("sos", torch.zeros(1, 1, 32, dtype=torch.int8)), "sos must be floating point .* not torch.int8"),
        (changed_state("sos", torch.zeros(1, 1, 32, device="meta")), "sos must be a dense tensor with values"),
        (changed_state("sos", torch.zeros(1, 1, 32).to_sparse()), "sos must be a dense tensor with values"),
        (changed_state("heads.1.weight", torch.full((40, 32), torch.nan)), r"expert 1: heads\.1\.weight holds NaN"),
        (changed_state("sos", torch.full((1, 1, 32), -torch.inf)), "expert 1: sos holds NaN, infinity"),
        (changed_state("sos", torch.full((1, 1, 32), 1e39, dtype=torch.float64)), "beyond the range of float32"),
        (
            lambda model: {
                **model.experts[1].state_dict(),
                f"{TABLE}.codebook.weight": torch.full((40, 2), 3e38),
                f"{TABLE}.dac_out.weight": torch.full((3, 2), 9.0),
            },
            rf"expert 1: {re.escape(TABLE)}\.table holds NaN, infinity",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit(given, message, backend, model, prompts):
    """One line that says what; the sampler draws what it drew, and a session that is under way goes on."""
    sampler = Sampler(model, backend, "fp32")
    before = sampler.sample(*prompts, frames=4)
    session = sampler.start(*prompts)
    session.step(2)
    with pytest.raises(InputError, match=message) as raised:
        sampler.load_expert(1, given(model))
    assert "\n" not in str(raised.value)
    session.step(2)
    assert equal(session, before)
    assert equal(sampler.sample(*prompts, frames=4), before)


def test_values_that_the_weights_cannot_hold(model):
    """3.4e38 is finite in float32 and infinite in bfloat16."""
    needs("cpu")
    state = {**model.experts[1].state_dict(), "heads.0.weight": torch.full((40, 32), 3.4e38)}
    Sampler(model, "cpu", "fp32").load_expert(1, state)
    for weights in ("bf16", "int8"):
        with pytest.raises(InputError, match=r"heads\.0\.weight holds NaN, infinity or a value beyond .* bfloat16"):
            Sampler(model, "cpu", weights).load_expert(1, state)


@pytest.mark.parametrize(
    ("index", "message"),
    [(2, "index must be from 0 to 1, not 2"), (-1, "must be from 0"), (1.0, "a whole number"), (True, "whole number")],
)
def test_index(index, message, backend, model):
    for kind in (Sampler, ResidualSampler):
        with pytest.raises(InputError, match=message):
            kind(model, backend).load_expert(index, model.experts[1])


# ---- sessions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
def test_older_sessions_end(backend, model, changed, prompts):
    """They can be read, not stepped nor selected from, even after the old weights are back; new ones are as new."""
    needs(backend)
    sampler = Sampler(model, backend, KINDS[backend][0])
    session, unused = sampler.start(*prompts), sampler.start(*prompts)
    session.step(1)
    codes, logprobs = session.codes, session.logprobs
    for source in (changed, model):
        sampler.load_expert(1, source.experts[1])
        for old in (session, unused):
            for use in (lambda old=old: old.step(1), lambda old=old: old.select([0])):
                with pytest.raises(InputError, match=r"^expert 1 has new weights since .*: start a new session$"):
                    use()
        assert torch.equal(session.codes, codes) and torch.equal(session.logprobs, logprobs)
        assert (session.frame, session.batch, unused.frame) == (1, 2, 0)
    again = sampler.start(*prompts)
    again.step(1)
    assert torch.equal(again.codes, codes) and torch.equal(again.logprobs, logprobs)


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
def test_a_callback_cannot_load(backend, model, changed, prompts):
    """An error instead of waiting for itself, from a callback in a callback too; the frames go on as they were."""
    needs(backend)
    sampler = Sampler(model, backend, KINDS[backend][0])
    before = sampler.sample(*prompts, frames=2)
    other = sampler.start(*prompts)
    refused = []

    def load(done: int, total: int) -> None:
        with pytest.raises(InputError, match="cannot be called from an on_frame of the same sampler"):
            sampler.load_expert(1, changed.experts[1])
        refused.append(done)

    session = sampler.start(*prompts)
    session.step(1, load)
    session.step(1, lambda *_: other.step(1, load))
    assert equal(session, before)
    assert refused == [1, 1]
    sampler.load_expert(1, changed.experts[1])  # and afterwards it can


def test_a_callback_can_load_another_sampler(backend, model, changed, prompts):
    sampler, other = Sampler(model, backend, "fp32"), Sampler(model, backend, "fp32")
    before = sampler.sample(*prompts, frames=2)
    after = sampler.sample(*prompts, frames=2, on_frame=lambda *_: other.load_expert(1, changed.experts[1]))
    assert equal(after, before)
    assert equal(other.sample(*prompts, frames=2), Sampler(changed, backend, "fp32").sample(*prompts, frames=2))


def spawn(function: Callable[..., object], *arguments: object, **named: object) -> Future[object]:
    """Call it in a thread that does not keep the process alive, so that a deadlock fails and does not hang."""
    future: Future[object] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments, **named))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


# ---- threads --------------------------------------------------------------------------------------------------------


def test_a_load_waits_for_a_step_and_a_start_for_the_load(backend, model, changed, prompts):
    """The step in another thread ends with the weights it began with; who starts while the load waits gets the new."""
    sampler = Sampler(model, backend, "fp32")
    before = sampler.sample(*prompts, frames=3)
    wanted = Sampler(changed, backend, "fp32").sample(*prompts, frames=3)
    session, nested = sampler.start(*prompts), sampler.start(*prompts)
    reached, go_on = threading.Event(), threading.Event()

    def on_frame(done: int, total: int) -> None:
        reached.set()
        assert go_on.wait(PATIENCE)
        nested.step(1)  # while the load waits for this very step

    step = spawn(session.step, 3, on_frame)
    assert reached.wait(PATIENCE)
    load = spawn(sampler.load_expert, 1, changed.experts[1])
    while not sampler._updates._wanted:
        time.sleep(0.001)
    sample = spawn(sampler.sample, *prompts, frames=3)
    assert not load.done() and not sample.done()
    assert session.frame == 1  # reading waits for nobody
    go_on.set()
    step.result(PATIENCE)
    load.result(PATIENCE)
    assert equal(sample.result(PATIENCE), wanted)
    assert equal(session, before) and equal(nested, before)
    with pytest.raises(InputError, match="start a new session"):
        session.step(1)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_every_sample_is_of_one_model(weights, backend, model, changed, prompts):
    """Threads that sample while others go on loading: each draws with the old weights or the new, never with both."""
    sampler = Sampler(model, backend, weights)
    old, new = (Sampler(source, backend, weights).sample(*prompts, frames=6, seed=4) for source in (model, changed))
    rounds, seen = 6, []

    def sample() -> None:
        for _ in range(rounds):
            out = sampler.sample(*prompts, frames=6, seed=4)
            assert equal(out, old) or equal(out, new)
            seen.append(equal(out, new))

    def load() -> None:
        for i in range(rounds):
            sampler.load_expert(1, (changed, model)[i % 2].experts[1])

    for job in [spawn(work) for work in (sample, sample, load, load)]:
        job.result(PATIENCE)
    assert len(seen) == 2 * rounds


def test_two_loads_take_turns(backend, model, prompts):
    """Of two experts, from two threads at once."""
    wanted = with_expert(with_expert(model, 0, 7), 1, 8)
    sampler = Sampler(model, backend, "bf16")
    for job in [spawn(sampler.load_expert, k, wanted.experts[k]) for k in (0, 1) for _ in range(4)]:
        job.result(PATIENCE)
    assert equal(sampler.sample(*prompts, frames=6), Sampler(wanted, backend, "bf16").sample(*prompts, frames=6))


# ---- loads that do not end ------------------------------------------------------------------------------------------


class _Stopped:
    """An engine whose third tensor does not arrive."""

    def __init__(self, engine: object, error: BaseException) -> None:
        self._engine, self._error, self._count = engine, error, 0

    def load(self, *arguments: object) -> None:
        self._count += 1
        if self._count == 3:
            raise self._error
        self._engine.load(*arguments)

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (MemoryError(), BackendError, "not enough memory to convert expert 1: free some, load it again"),
    ],
)
def test_half_an_expert_is_not_used(error, raised, message, model, changed, prompts):
    """What stops a load in the middle: nobody samples from the mixture, and loading again mends it."""
    needs("cpu")
    sampler = Sampler(model, "cpu", "fp32")
    session = sampler.start(*prompts)
    decoder = sampler._decoder
    whole, decoder.engine = decoder.engine, _Stopped(decoder.engine, error)
    with pytest.raises(raised, match=message):
        sampler.load_expert(1, changed.experts[1])
    decoder.engine = whole
    for _ in range(2):
        for use in (lambda: sampler.start(*prompts), lambda: sampler.sample(*prompts, frames=1)):
            with pytest.raises(InputError, match="interrupted and has left expert 1 half new: load expert 1 again"):
                use()
        with pytest.raises(InputError, match="start a new session"):
            session.step(1)
        sampler.load_expert(0, model.experts[0])  # another expert does not mend it
        with pytest.raises(InputError, match="lacks"):
            sampler.load_expert(1, {})
    sampler.load_expert(1, changed.experts[1])
    assert equal(sampler.sample(*prompts, frames=3), Sampler(changed, "cpu", "fp32").sample(*prompts, frames=3))


def test_ctrl_c_while_a_load_waits(backend, model, changed, prompts, monkeypatch):
    """It gives up: nothing has changed, and neither the step that it waited for nor later calls notice."""
    sampler = Sampler(model, backend, "fp32")
    before = sampler.sample(*prompts, frames=2)
    session = sampler.start(*prompts)
    reached, go_on = threading.Event(), threading.Event()

    def on_frame(done: int, total: int) -> None:
        reached.set()
        assert go_on.wait(PATIENCE)

    def interrupted() -> None:
        raise KeyboardInterrupt

    step = spawn(session.step, 1, on_frame)
    assert reached.wait(PATIENCE)
    with monkeypatch.context() as patch:
        patch.setattr(sampler._updates._changed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sampler.load_expert(1, changed.experts[1])
    go_on.set()
    step.result(PATIENCE)
    session.step(1)
    assert equal(session, before)
    sampler.load_expert(1, changed.experts[1])
