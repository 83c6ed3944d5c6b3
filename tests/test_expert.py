"""The teacher-forced expert: the official code's numbers, what may see what, and what may learn."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import configs, forward, random_experts, random_inputs

from siren import InputError, SirenConfig
from siren.checkpoint import expected_shapes, iter_tensors, read_manifest
from siren.expert import Expert
from siren.layers import sinusoidal_positions

TINY = {
    "dim": 12, "n_heads": 4, "n_kv_heads": 2, "spatial_layers": 2, "factorized_layers": 1, "prompt_dim": 5,
    "codebook_size": 16, "dac_code_dim": 3, "dac_feature_dim": 7, "ffn_multiple_of": 7, "max_seq_len": 9,
    "max_prompt_len": 6, "dropout": 0.5,
}  # fmt: skip


def test_golden_logits_and_losses(golden_folder, golden):
    """What the official code computes from its own checkpoint, within 1e-4."""
    manifest = read_manifest(golden_folder)
    for k, entry in enumerate(manifest.experts):
        expert = Expert(manifest.config, entry.start_codebook)
        expert.load_state_dict(dict(iter_tensors(entry, manifest.config)))
        with torch.no_grad():
            logits = expert(golden["codes"], golden["prompt"], golden["prompt_mask"])
            loss = expert.loss(golden["codes"], golden["prompt"], golden["prompt_mask"], golden["sequence_mask"])
        torch.testing.assert_close(logits, golden["logits"][:, 2 * k : 2 * k + 2], rtol=0, atol=1e-4)
        torch.testing.assert_close(loss, golden["loss"][k].float(), rtol=0, atol=1e-4)


@given(configs())
def test_names_and_shapes_are_those_of_the_format(config):
    with torch.device("meta"):
        expert = Expert(config, (config.num_experts - 1) * config.codes_per_expert)
    shapes = {name: tuple(tensor.shape) for name, tensor in expert.state_dict().items()}
    assert shapes == expected_shapes(config)


@given(configs(), st.integers(0, 2**31))
def test_tables_are_the_folded_embeddings(config, seed):
    """projector(dac_out(codebook[q])) for every codebook and code."""
    expert = random_experts(config, seed)[0]
    codes = torch.arange(config.codebook_size)
    unfolded = [layer.projector(layer.dac_out(layer.codebook(codes))) for layer in expert.codebooks.layers]
    torch.testing.assert_close(expert.tables(), torch.stack(unfolded), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("conditioning", ["none", "residual", "accumulated"])
def test_what_a_code_can_change(count, conditioning):
    """A code of frame t changes all later frames, none before, and of frame t just what the conditioning says."""
    config = SirenConfig.from_dict(TINY | {"num_experts": count, "conditioning": conditioning})
    experts = random_experts(config, 7)
    codes, prompt, mask = random_inputs(config, 1, 1, 4, 6)
    before = forward(experts, codes, prompt, mask)
    per_expert = config.codes_per_expert
    for codebook in range(12):
        changed = codes.clone()
        changed[0, codebook, 3] = (changed[0, codebook, 3] + 1) % config.codebook_size
        differs = (forward(experts, changed, prompt, mask) != before).any(-1)[0]
        assert not differs[:, :3].any()
        assert differs[:, 4:].all()
        same_expert = {j for j in range(codebook + 1, 12) if j // per_expert == (codebook + 1) // per_expert}
        # With "residual" the code reaches the next position, and through attention the later ones of that expert.
        expected = {"none": set(), "residual": same_expert, "accumulated": set(range(codebook + 1, 12))}[conditioning]
        assert set(differs[:, 3].nonzero().flatten().tolist()) == expected, codebook


def test_start_comes_from_the_prompt_or_is_learned():
    for start in ("prompt", "learned"):
        config = SirenConfig.from_dict(TINY | {"decoder_start": start})
        expert = random_experts(config, 1)[0]
        prompt = torch.randn(2, 4, 5)
        mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
        vectors = expert.decoder_start(prompt, mask)
        if start == "learned":
            expected = expert.start.expand(2, 1, -1)
        else:
            expected = torch.stack([expert.prompt_summary(p[m].mean(0)) for p, m in zip(prompt, mask, strict=True)])[
                :, None
            ]
        torch.testing.assert_close(vectors, expected)


def test_padding_of_the_prompt_may_hold_anything():
    """NaN under the mask changes nothing, and a shorter prompt without padding gives the same."""
    config = SirenConfig.from_dict(TINY)
    experts = random_experts(config, 2)
    codes, prompt, _ = random_inputs(config, 2, 2, 6, 5)
    mask = torch.tensor([[True, True, False, False, False, False]] * 2)
    plain = forward(experts, codes, prompt, mask)
    prompt[:, 2:] = torch.nan
    assert torch.equal(forward(experts, codes, prompt, mask), plain)
    torch.testing.assert_close(forward(experts, codes, prompt[:, :2]), plain)


def test_frames_outside_the_sequence_do_not_matter():
    """Codes after the end change nothing before it; a hole is not seen; a late start stays finite."""
    config = SirenConfig.from_dict(TINY)
    experts = random_experts(config, 3)
    codes, prompt, mask = random_inputs(config, 3, 1, 4, 8)
    valid = torch.tensor([[False, True, True, True, False, True, False, False]])
    plain = forward(experts, codes, prompt, mask, valid)
    assert bool(plain.isfinite().all())
    changed = codes.clone()
    changed[:, :, 3] = (changed[:, :, 3] + 1) % 16  # the input of frame 4, which is outside
    differs = (forward(experts, changed, prompt, mask, valid) != plain).any(-1)[0].any(0)
    assert differs.tolist() == [False, False, False, True, True, False, False, False]
    targets = [expert.loss(codes, prompt, mask, valid) for expert in experts]
    logprobs = torch.log_softmax(plain, -1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)[:, :, valid[0]]
    torch.testing.assert_close(torch.cat(targets), -logprobs.mean((0, 2)))


def test_gradients():
    """Every trainable weight gets a gradient, the codec's embeddings get none and stay as they are."""
    for changes in ({}, {"decoder_start": "learned", "conditioning": "residual"}):
        config = SirenConfig.from_dict(TINY | {"dropout": 0.0, "codebook_size": 4} | changes)
        expert = random_experts(config, 4)[2].train()
        codes, prompt, mask = random_inputs(config, 4, 4, 5, 8)
        frozen = {name: p.clone() for name, p in expert.named_parameters() if not p.requires_grad}
        names = {f"codebooks.layers.{j}.{part}" for j in range(12) for part in ("codebook.weight", "dac_out.weight")}
        assert frozen.keys() == names | {f"codebooks.layers.{j}.dac_out.bias" for j in range(12)}
        optimizer = torch.optim.SGD(expert.parameters(), lr=0.1)
        first = expert.loss(codes, prompt, mask).sum()
        first.backward()
        for name, parameter in expert.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or bool(parameter.grad.abs().max() > 0), name
        optimizer.step()
        assert expert.loss(codes, prompt, mask).sum().item() < first.item()
        for name, before in frozen.items():
            assert torch.equal(expert.get_parameter(name), before), name


def test_gradients_are_those_of_the_unfolded_embeddings():
    """Folding changes the cost, not the gradient: against finite differences in float64."""
    config = SirenConfig.from_dict(
        TINY | {"dim": 6, "n_heads": 2, "n_kv_heads": 1, "codebook_size": 3, "spatial_layers": 1}
    )
    expert = random_experts(config, 5)[1].double()
    codes, prompt, mask = random_inputs(config, 5, 2, 3, 3)
    projector = expert.codebooks.layers[2].projector
    loss = expert.loss(codes, prompt.double(), mask).sum()
    loss.backward()
    step = torch.zeros_like(projector.weight)
    step[3, 4] = 1e-6
    shifted = []
    for sign in (1, -1):
        projector.weight.data += sign * step
        shifted.append(expert.loss(codes, prompt.double(), mask).sum().item())
        projector.weight.data -= sign * step
    assert (shifted[0] - shifted[1]) / 2e-6 == pytest.approx(float(projector.weight.grad[3, 4]), rel=1e-4)


def test_dropout_acts_in_training_only():
    config = SirenConfig.from_dict(TINY)
    expert = random_experts(config, 6)[0]
    inputs = random_inputs(config, 6, 2, 3, 4)
    assert torch.equal(expert(*inputs), expert(*inputs))
    expert.train()
    assert not torch.equal(expert(*inputs), expert(*inputs))


def rms(error: torch.Tensor) -> float:
    return float(error.detach().double().square().mean().sqrt())


def test_other_dtypes():
    """A model in another precision takes the same inputs; the error against fp64 grows as its last place does."""
    config = SirenConfig.from_dict(TINY)
    expert = random_experts(config, 8)[1]
    inputs = random_inputs(config, 8, 2, 3, 8)
    truth = copy.deepcopy(expert).double()(*inputs)
    assert truth.dtype == torch.float64
    fp32 = rms(expert(*inputs) - truth)
    bf16 = rms(expert.bfloat16()(*inputs) - truth)
    assert fp32 > 0 and 2**14 < bf16 / fp32 < 2**18  # 24 bits of mantissa and 8: 2^16


def test_autocast():
    """Mixed-precision training: bf16 products at most twice as far from fp64 as a model all in bf16, a loss that
    follows from them, fp32 gradients."""
    config = SirenConfig.from_dict(TINY | {"dropout": 0.0})
    expert = random_experts(config, 8)[1]
    inputs = random_inputs(config, 8, 2, 3, 8)
    exact = copy.deepcopy(expert).double()
    truth = exact(*inputs)
    plain = copy.deepcopy(expert).bfloat16()(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = expert(*inputs), expert.loss(*inputs)
    assert 0 < rms(logits - truth) <= 2 * rms(plain - truth)
    # A cross-entropy moves by at most twice as much as the logits do.
    assert (loss - exact.loss(*inputs)).abs().max() <= 2 * (logits - truth).abs().max()
    loss.sum().backward()
    assert expert.sos.grad.dtype == torch.float32


def test_decode_embeddings_are_taken_over():
    config = SirenConfig.from_dict(TINY)
    expert = Expert(config, 0)
    embeddings = [(torch.randn(16, 3), torch.randn(7, 3), torch.randn(7)) for _ in range(12)]
    expert.set_decode_embeddings(embeddings)
    for layer, (codebook, weight, bias) in zip(expert.codebooks.layers, embeddings, strict=True):
        torch.testing.assert_close(layer.dac_out(layer.codebook(torch.arange(16))), codebook @ weight.T + bias)
        assert not layer.codebook.weight.requires_grad
    with pytest.raises(InputError, match="expected 12 decode embeddings, got 11"):
        expert.set_decode_embeddings(embeddings[:11])
    with pytest.raises(InputError, match=r"decode embedding 3, dac_out\.weight.*\(7, 3\)"):
        expert.set_decode_embeddings(
            [*embeddings[:3], (embeddings[0][0], torch.randn(3, 7), embeddings[0][2]), *embeddings[4:]]
        )
    embeddings[5][2][1] = torch.nan
    with pytest.raises(InputError, match=r"decode embedding 5, dac_out\.bias"):
        expert.set_decode_embeddings(embeddings)


def test_wrong_start_codebook():
    with pytest.raises(InputError, match="start_codebook must be a multiple of 2 below 12, not 3"):
        Expert(SirenConfig.from_dict(TINY), 3)


GOOD = {
    "codes": torch.zeros(2, 12, 4, dtype=torch.int64),
    "prompt": torch.zeros(2, 3, 5),
    "prompt_mask": torch.ones(2, 3, dtype=torch.bool),
    "sequence_mask": torch.ones(2, 4, dtype=torch.bool),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(2, 11, 4, dtype=torch.int64)}, r"codes must have shape \[batch, 12, frames\]"),
        ({"codes": torch.zeros(2, 12, dtype=torch.int64)}, "codes must have shape"),
        ({"codes": torch.zeros(2, 12, 0, dtype=torch.int64)}, "codes must have shape"),
        ({"codes": [[[0]]]}, "codes must be a torch.Tensor, not list"),
        ({"prompt": None}, "prompt must be a torch.Tensor, not NoneType"),
        ({"prompt_mask": [[True]]}, "prompt_mask must be a torch.Tensor, not list"),
        ({"codes": torch.zeros(2, 12, 4)}, "codes must be integers"),
        ({"codes": torch.zeros(2, 12, 4, dtype=torch.bool)}, "codes must be integers"),
        ({"codes": torch.full((2, 12, 4), 16)}, "codes must be from 0 to 15, got 16"),
        ({"codes": torch.full((2, 12, 4), -1)}, "codes must be from 0 to 15, got -1"),
        ({"codes": torch.zeros(2, 12, 10, dtype=torch.int64)}, "10 frames; max_seq_len is 9"),
        ({"codes": torch.zeros(3, 12, 4, dtype=torch.int64)}, "prompt must have shape"),
        ({"prompt": torch.zeros(2, 3, 6)}, r"prompt must have shape \[2, tokens, 5\]"),
        ({"prompt": torch.zeros(2, 0, 5)}, "prompt must have shape"),
        ({"prompt": torch.zeros(2, 7, 5)}, "7 tokens; max_prompt_len is 6"),
        ({"prompt": torch.zeros(2, 3, 5, dtype=torch.int64)}, "prompt must be floating point"),
        ({"prompt": torch.zeros(2, 3, 5, device="meta")}, "prompt is on meta and the model on cpu"),
        ({"prompt_mask": torch.ones(2, 3)}, "prompt_mask must be bool"),
        ({"prompt_mask": torch.ones(2, 4, dtype=torch.bool)}, "prompt_mask must be bool of shape"),
        ({"prompt_mask": torch.tensor([[True] * 3, [False] * 3])}, "prompt_mask of sequence 1 holds no True"),
        ({"sequence_mask": torch.ones(2, 5, dtype=torch.bool)}, "sequence_mask must be bool of shape"),
        ({"sequence_mask": torch.zeros(2, 4, dtype=torch.bool)}, "sequence_mask of sequence 0 holds no True"),
    ],
)
def test_bad_inputs(change, message):
    expert = Expert(SirenConfig.from_dict(TINY), 0)
    with pytest.raises(InputError, match=message):
        expert(**(GOOD | change))
    with pytest.raises(InputError, match=message):
        expert.loss(**(GOOD | change))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_codes(dtype):
    expert = random_experts(SirenConfig.from_dict(TINY), 1)[3]
    codes, prompt, mask = random_inputs(expert.config, 1, 2, 3, 4)
    assert torch.equal(expert(codes.to(dtype), prompt, mask), expert(codes, prompt, mask))
    assert torch.equal(expert.loss(codes.to(dtype), prompt, mask), expert.loss(codes, prompt, mask))


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_positions(dim):
    """Sines in the even columns, cosines in the odd, of wavelengths that grow from 2 pi towards 2 pi * 10000."""
    table = sinusoidal_positions(50, dim)
    for column in range(dim):
        rate = 10000.0 ** (-(column - column % 2) / dim)
        angle = torch.arange(50, dtype=torch.float64) * rate
        expected = angle.cos() if column % 2 else angle.sin()
        torch.testing.assert_close(table[:, column], expected.float(), rtol=0, atol=1e-5)
