"""The cached decoder computes what the teacher-forced modules compute, and draws as the contract says."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import configs, forward, random_experts, random_inputs, states

from siren import SamplingError, SirenConfig
from siren.checkpoint import read_manifest
from siren.errors import InputError
from siren.reference import ReferenceDecoder, round_to_int8
from siren.sampling import SamplingSettings, expand_seeds

GREEDY = SamplingSettings(temperature=0)
SMALL = SirenConfig(
    dim=12, n_heads=4, n_kv_heads=2, spatial_layers=2, factorized_layers=2, prompt_dim=5, codebook_size=33,
    dac_code_dim=3, dac_feature_dim=7, ffn_multiple_of=7, max_seq_len=64,
)  # fmt: skip


def rms(error: torch.Tensor) -> float:
    return float(error.double().square().mean().sqrt())


def exact_logits(experts, codes, prompt, mask) -> torch.Tensor:
    """The teacher-forced forward in fp64."""
    return forward([copy.deepcopy(expert).double() for expert in experts], codes, prompt.double(), mask)


def assert_as_exact(logits: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """RMS error at most twice that of `plain`. The floor is for sums of so few terms that plain may have them exact."""
    ours, theirs = rms(logits - truth), rms(plain - truth)
    assert ours <= 2 * theirs + 2e-7 * rms(truth), f"rms error {ours:.3g}, of the forward pass {theirs:.3g}"


@pytest.fixture(scope="module")
def small() -> ReferenceDecoder:
    return ReferenceDecoder(SMALL, states(random_experts(SMALL, 0)))


def test_golden_logits_and_greedy_codes(golden_folder, golden):
    """What the official code computes from its own checkpoint: logits within 1e-4, greedy codes exactly."""
    decoder = ReferenceDecoder.from_folder(read_manifest(golden_folder))
    state = decoder.start(golden["prompt"], golden["prompt_mask"], expand_seeds(0, 3), GREEDY)
    logits = state.force(golden["codes"].long())
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=1e-4)
    state = decoder.start(golden["prompt"], golden["prompt_mask"], expand_seeds(0, 3), GREEDY)
    state.step(golden["greedy_codes"].shape[2])
    assert torch.equal(state.codes, golden["greedy_codes"].long())


@given(
    configs(),
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.one_of(st.integers(1, 9), st.sampled_from([64, 127, 128])),
    st.integers(1, 7),
)
def test_equals_teacher_forcing(config, seed, batch, tokens, frames):
    """Forced logits are as exact as those of the forward pass, for any config, prompt length, mask and batch."""
    experts = random_experts(config, seed)
    codes, prompt, mask = random_inputs(config, seed, batch, tokens, frames)
    state = ReferenceDecoder(config, states(experts)).start(prompt, mask, expand_seeds(0, batch), SamplingSettings())
    truth = exact_logits(experts, codes, prompt, mask)
    assert_as_exact(state.force(codes), forward(experts, codes, prompt, mask), truth)
    assert state.frame == frames
    assert torch.equal(state.codes, codes)


def test_equals_teacher_forcing_past_512_frames():
    config = SirenConfig.from_dict(SMALL.to_dict() | {"max_seq_len": 600, "num_experts": 2, "codebook_size": 5})
    experts = random_experts(config, 3)
    codes, prompt, mask = random_inputs(config, 3, 1, 4, 530)
    state = ReferenceDecoder(config, states(experts)).start(prompt, mask, expand_seeds(0, 1), SamplingSettings())
    logits = torch.cat([state.force(codes[:, :, :7]), state.force(codes[:, :, 7:])], dim=2)
    plain, truth = forward(experts, codes, prompt, mask), exact_logits(experts, codes, prompt, mask)
    assert_as_exact(logits, plain, truth)
    assert_as_exact(logits[:, :, 512:], plain[:, :, 512:], truth[:, :, 512:])


@given(configs(), st.integers(0, 2**31), st.sampled_from([0.0, -1.5, 3.0]))
def test_guidance_combines_two_forward_passes(config, seed, scale):
    """uncond + scale * (cond - uncond), the unconditional rows having a prompt of one zero token."""
    experts = random_experts(config, seed)
    codes, prompt, mask = random_inputs(config, seed, 3, 4, 5)
    settings = SamplingSettings(guidance_scale=scale)
    state = ReferenceDecoder(config, states(experts)).start(prompt, mask, expand_seeds(0, 3), settings)

    def guided(run) -> torch.Tensor:
        conditional = run(experts, codes, prompt, mask)
        unconditional = run(experts, codes, torch.zeros(3, 1, config.prompt_dim), torch.ones(3, 1, dtype=torch.bool))
        return unconditional + scale * (conditional - unconditional)

    assert_as_exact(state.force(codes), guided(forward), guided(exact_logits))


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_forcing_drawn_codes_gives_their_logprobs(weights):
    """step and force go through the same arithmetic: log-probabilities of drawn codes come back exactly."""
    decoder = ReferenceDecoder(SMALL, states(random_experts(SMALL, 1)), weights)
    _, prompt, mask = random_inputs(SMALL, 1, 3, 4, 1)
    settings = SamplingSettings(temperature=0.8, top_k=9, top_p=0.9, guidance_scale=1.7)
    drawn = decoder.start(prompt, mask, expand_seeds(5, 3), settings)
    drawn.step(6)
    forced = decoder.start(prompt, mask, expand_seeds(99, 3), settings)
    logits = forced.force(drawn.codes)
    assert torch.equal(forced.logprobs, drawn.logprobs)
    expected = torch.log_softmax(logits / 0.8, dim=-1).gather(-1, drawn.codes.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(drawn.logprobs, expected)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_seed_gives_its_codes_in_any_batch_and_place(small, guidance):
    """Batch 1, any place among 7, other neighbours, and after select."""
    settings = SamplingSettings(guidance_scale=guidance, top_k=20)
    _, prompt, mask = random_inputs(SMALL, 2, 7, 6, 1)
    seeds = np.array([7, 2**64 - 1, 0, 12, 13, 2**33, 5], dtype=np.uint64)
    batch = small.start(prompt, mask, seeds, settings)
    batch.step(8)
    for i in range(7):
        alone = small.start(prompt[i : i + 1], mask[i : i + 1], seeds[i : i + 1], settings)
        alone.step(8)
        assert torch.equal(alone.codes[0], batch.codes[i]), f"sequence {i}"
        torch.testing.assert_close(alone.logprobs[0], batch.logprobs[i], rtol=1e-4, atol=1e-4)
    chosen = small.start(prompt, mask, seeds, settings)
    chosen.step(3)
    chosen.select([6, 1, 1, 4])
    chosen.step(5)
    assert (chosen.batch, chosen.frame) == (4, 8)
    assert torch.equal(chosen.codes, batch.codes[[6, 1, 1, 4]])


def test_select_with_new_seeds_parts_the_copies(small):
    _, prompt, mask = random_inputs(SMALL, 2, 2, 6, 1)
    state = small.start(prompt, mask, expand_seeds(0, 2), SamplingSettings())
    state.step(2)
    state.select([1, 1], expand_seeds([1, 50], 2))
    state.step(4)
    assert torch.equal(state.codes[0, :, :2], state.codes[1, :, :2])
    assert not torch.equal(state.codes[0], state.codes[1])
    state.select([1])
    straight = small.start(prompt[1:], mask[1:], expand_seeds(1, 1), SamplingSettings())
    straight.step(2)
    straight.select([0], expand_seeds(50, 1))
    straight.step(4)
    assert torch.equal(straight.codes, state.codes)


def test_steps_and_interruptions_do_not_matter(small):
    """One step of 9, nine of 1, and a step that a callback broke off give the same codes."""
    _, prompt, mask = random_inputs(SMALL, 4, 2, 3, 1)
    whole, single, broken = (small.start(prompt, mask, expand_seeds(3, 2), SamplingSettings()) for _ in range(3))
    calls = []
    whole.step(9, lambda done, total: calls.append((done, total)))
    assert calls == [(i, 9) for i in range(1, 10)]
    for _ in range(9):
        single.step(1)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.step(9, stop)
    assert broken.frame == 4
    broken.step(5)
    for other in (single, broken):
        assert torch.equal(other.codes, whole.codes)
        assert torch.equal(other.logprobs, whole.logprobs)


def test_residual_is_the_second_half_of_a_frame(small):
    """Backbone outputs fed to `residual` give the codes, log-probabilities and next inputs of the state's own frame."""
    codes, prompt, mask = random_inputs(SMALL, 6, 3, 4, 4)
    settings = SamplingSettings(temperature=1.3)
    state = small.start(prompt, mask, expand_seeds(8, 3), settings)
    state.force(codes)
    hidden = []
    run = small.run_backbone
    small.run_backbone = lambda *args: hidden.append(run(*args)) or hidden[-1]
    try:
        state.step(1)
    finally:
        small.run_backbone = run
    frames = np.full(3, 4)
    drawn, logprobs, inputs = small.residual(
        torch.cat(hidden, 1).transpose(0, 1), state.start, state.seeds, frames, settings
    )
    assert torch.equal(drawn, state.codes[:, :, 4])
    assert torch.equal(logprobs, state.logprobs[:, :, 4])
    assert torch.equal(inputs, state.inputs)
    embedded = torch.stack([sum(table[j][drawn[:, j]] for j in range(12)) for table in small.tables])
    torch.testing.assert_close(inputs, embedded)


def test_equal_prompts_are_prefilled_once(small, monkeypatch):
    """Two distinct prompts and the null prompt among ten rows: three rows reach the projections."""
    _, prompt, mask = random_inputs(SMALL, 2, 2, 6, 1)
    rows = torch.tensor([0, 1, 1, 0, 1])
    seen = []
    attention = small.experts[0].spatial_blocks[0].cross_attention
    compute = attention.keys_values
    monkeypatch.setattr(attention, "keys_values", lambda tokens: seen.append(len(tokens)) or compute(tokens))
    state = small.start(prompt[rows], mask[rows], expand_seeds(4, 5), SamplingSettings(guidance_scale=2))
    assert seen == [3]
    state.step(2)
    alone = small.start(prompt[1:], mask[1:], expand_seeds(8, 1), SamplingSettings(guidance_scale=2))
    alone.step(2)
    assert torch.equal(state.codes[4], alone.codes[0])


def test_bad_logits_are_named(small):
    """The error says which sequence, frame and codebook; frames before it stay."""
    _, prompt, mask = random_inputs(SMALL, 2, 3, 6, 1)
    state = small.start(prompt, mask, expand_seeds(0, 3), SamplingSettings())
    state.step(2)
    state.inputs = state.inputs.clone()
    state.inputs[2, 1] = torch.nan
    with pytest.raises(SamplingError, match="sequence 1, frame 2, codebook 4"):
        state.step(1)
    assert state.frame == 2
    assert state.codes.shape[2] == 2


def test_int8_rounding():
    """One scale per output channel, half a step of error at most, zero rows stay zero, absmax is kept."""
    weight = torch.randn(63, 129) * torch.logspace(-3, 2, 63)[:, None]
    weight[5] = 0
    rounded = round_to_int8(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((rounded - weight).abs() <= step * 0.5001).all())
    assert torch.equal(rounded[5], weight[5])
    levels = (rounded / step)[torch.arange(63) != 5]
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    torch.testing.assert_close(rounded.abs().amax(1), weight.abs().amax(1))


def test_int8_leaves_tables_norms_and_biases():
    experts = random_experts(SMALL, 1)
    plain, rounded = (ReferenceDecoder(SMALL, states(experts), weights) for weights in ("fp32", "int8"))
    assert torch.equal(plain.tables, rounded.tables)
    for (name, a), b in zip(
        plain.experts[0].state_dict().items(), rounded.experts[0].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b) == ("norm" in name or "bias" in name or name == "sos"), name


def test_bf16_is_as_exact_as_the_modules_in_bf16(golden_folder, golden_model, golden):
    """Against fp64: at most twice the error of the forward pass of the same experts in bf16."""
    inputs = golden["codes"].long(), golden["prompt"], golden["prompt_mask"]
    experts = list(golden_model.experts)
    truth = exact_logits(experts, *inputs)
    plain = forward([copy.deepcopy(expert).eval().bfloat16() for expert in experts], *inputs)
    decoder = ReferenceDecoder.from_folder(read_manifest(golden_folder), "bf16")
    logits = decoder.start(*inputs[1:], expand_seeds(0, 3), SamplingSettings()).force(inputs[0])
    assert 0 < rms(logits - truth) <= 2 * rms(plain - truth)


def test_int8_is_the_model_with_rounded_weights(golden_folder, golden_model, golden):
    """Against fp64 with every matrix of blocks, heads and prompt summary rounded: fp32's error, no more."""
    inputs = golden["codes"].long(), golden["prompt"], golden["prompt_mask"]
    experts = [copy.deepcopy(expert).eval() for expert in golden_model.experts]
    unrounded = exact_logits(experts, *inputs)
    for expert in experts:
        for name, module in expert.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.startswith("codebooks."):
                module.weight.data = round_to_int8(module.weight.data)
    decoder = ReferenceDecoder.from_folder(read_manifest(golden_folder), "int8")
    logits = decoder.start(*inputs[1:], expand_seeds(0, 3), SamplingSettings()).force(inputs[0])
    truth = exact_logits(experts, *inputs)
    assert_as_exact(logits, forward(experts, *inputs), truth)
    assert rms(logits - unrounded) > 100 * rms(logits - truth)


def test_states_are_private_copies(small):
    """What is read out may be written to and used in autograd; later frames do not change it."""
    _, prompt, mask = random_inputs(SMALL, 2, 1, 6, 1)
    state = small.start(prompt, mask, expand_seeds(0, 1), SamplingSettings())
    state.step(2)
    codes = state.codes
    kept = codes.clone()
    codes[:] = 0
    assert torch.equal(state.codes, kept)
    assert not state.codes.is_inference()
    assert not state.logprobs.is_inference()


def test_wrong_experts():
    experts = states(random_experts(SMALL, 0))
    with pytest.raises(InputError, match="expected 6 experts, got 5"):
        ReferenceDecoder(SMALL, experts[:5])
    with pytest.raises(InputError, match="expert 0 must start at codebook 0"):
        ReferenceDecoder(SMALL, experts[1:])
    with pytest.raises(InputError, match="weights"):
        ReferenceDecoder(SMALL, experts, "fp8")


@pytest.mark.slow
def test_compiled_equals_eager():
    """The benchmark's torch.compile arm computes the same."""
    config = SirenConfig.from_dict(SMALL.to_dict() | {"num_experts": 1, "spatial_layers": 1, "factorized_layers": 1})
    experts = states(random_experts(config, 0))
    _, prompt, mask = random_inputs(config, 2, 2, 6, 1)
    eager, compiled = (
        decoder.start(prompt, mask, expand_seeds(0, 2), SamplingSettings())
        for decoder in (ReferenceDecoder(config, experts), ReferenceDecoder(config, experts, compiled=True))
    )
    eager.step(6)
    compiled.step(6)
    assert torch.equal(eager.codes, compiled.codes)
    torch.testing.assert_close(eager.logprobs, compiled.logprobs, rtol=1e-4, atol=1e-4)
