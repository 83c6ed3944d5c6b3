"""Expert.loss_sums, the training step's path, against the plain forward: losses, all gradients, 200 steps."""

from __future__ import annotations

import copy
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import configs, random_experts, random_inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from siren import BackendError, InputError, MissingDependencyError, SirenConfig
from siren import packed as packed_module
from siren import row_operations as rows_module
from siren.checkpoint import iter_tensors, read_manifest
from siren.errors import SirenError
from siren.expert import Expert
from siren.packed import Packing, attend
from siren.row_operations import linear_cross_entropy, short_attention, swiglu, unit_norm

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = {
    "dim": 12, "n_heads": 4, "n_kv_heads": 2, "spatial_layers": 2, "factorized_layers": 2, "prompt_dim": 5,
    "codebook_size": 16, "dac_code_dim": 3, "dac_feature_dim": 7, "ffn_multiple_of": 7, "max_seq_len": 600,
    "max_prompt_len": 6, "dropout": 0.0,
}  # fmt: skip


def plain(expert: Expert, *inputs: Tensor | None) -> Tensor:
    """The loss of the plain forward, as sums."""
    codes, sequence_mask = inputs[0], inputs[3]
    frames = codes.shape[0] * codes.shape[2] if sequence_mask is None else int(sequence_mask.sum())
    return expert.loss(*inputs) * frames


def results(expert: Expert, function: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The losses and every gradient; the codebooks' losses weigh differently, so that none can stand for another."""
    expert.zero_grad()
    losses = function()
    (losses * torch.arange(1, len(losses) + 1, device=losses.device)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in expert.named_parameters() if p.grad is not None}
    expert.zero_grad()
    return {"losses": losses.detach(), **gradients}


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def assert_as_good(ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Each tensor's error against float64 is at most twice the plain forward's at the same precision.

    A small tensor may come out of PyTorch nearly exact by luck: twice its typical error over all is allowed too.
    """
    assert ours.keys() == theirs.keys() == exact.keys()
    allowed = {name: relative_error(theirs[name], exact[name]) for name in exact}
    typical = (sum(error**2 for error in allowed.values()) / len(allowed)) ** 0.5
    for name in exact:
        error = relative_error(ours[name], exact[name])
        assert error <= 2 * max(allowed[name], typical), (name, error, allowed[name], typical)


@pytest.mark.parametrize("expert_index", [0, 5])
def test_golden_batch(golden_folder, golden, expert_index):
    """The official code's losses, and every gradient as near to float64 as the plain forward's."""
    manifest = read_manifest(golden_folder)
    entry = manifest.experts[expert_index]
    expert = Expert(manifest.config, entry.start_codebook)
    expert.load_state_dict(dict(iter_tensors(entry, manifest.config)))
    inputs = [golden[name] for name in ("codes", "prompt", "prompt_mask", "sequence_mask")]
    assert not bool(inputs[3].all())  # there is padding to leave out
    ours, theirs = results(expert, lambda: expert.loss_sums(*inputs)), results(expert, lambda: plain(expert, *inputs))
    loss = ours["losses"] / inputs[3].sum()
    torch.testing.assert_close(loss, golden["loss"][expert_index].float(), rtol=0, atol=1e-4)
    exact = copy.deepcopy(expert).double()
    assert_as_good(ours, theirs, results(exact, lambda: plain(exact, *inputs)))


@settings(max_examples=15)
@given(configs(), st.integers(0, 2**31), st.booleans(), st.sampled_from(["none", "right", "any"]), st.data())
def test_any_model_and_any_mask(config, seed, checkpoint, padding, data):
    """In float64, where rounding hides nothing: grouped heads, every conditioning and start, 1 to 12 codes an expert,
    frames left out anywhere, NaN under the prompt's mask, codes that would be read nowhere."""
    expert = random_experts(config, seed)[data.draw(st.integers(0, config.num_experts - 1))].double().train()
    for module in expert.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        elif isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch, tokens, frames = (data.draw(st.integers(1, most)) for most in (3, 4, 7))
    codes, prompt, prompt_mask = random_inputs(config, seed, batch, tokens, frames)
    prompt = prompt.double().masked_fill(~prompt_mask.unsqueeze(-1), torch.nan)
    generator = torch.Generator().manual_seed(seed)
    sequence_mask = None
    if padding != "none":
        last = torch.randint(frames, (batch, 1), generator=generator)
        sequence_mask = torch.arange(frames) <= last
        if padding == "any":
            sequence_mask &= torch.rand(batch, frames, generator=generator) < 0.5
            sequence_mask[torch.arange(batch), last[:, 0]] = True
    inputs = (codes, prompt, prompt_mask, sequence_mask)
    ours = results(expert, lambda: expert.loss_sums(*inputs, checkpoint_activations=checkpoint))
    theirs = results(expert, lambda: plain(expert, *inputs))
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        assert ours[name].dtype == torch.float64
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12 * largest, msg=name)


def test_training_for_200_steps():
    """Losses and weights of 200 AdamW steps lie as near to a run in float64 as the plain forward's do.

    Two runs in float32 part as any two orders of summation do, so the measure is the plain run's own distance to
    float64; twice that is allowed. (With a learning rate of 3e-3 all three runs part, so sharp is what they learn by
    heart.) Biases of the prompt's keys are left out: a softmax takes no notice of them, so their gradients are nothing
    but rounding, which AdamW makes as large as any other.
    """
    changes = {"spatial_layers": 1, "factorized_layers": 1, "num_codebooks": 4, "num_experts": 2}
    config = SirenConfig.from_dict(TINY | changes)
    start = random_experts(config, 3)[1].train()
    codes, prompt, prompt_mask = random_inputs(config, 3, 2, 3, 6)
    sequence_mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])

    def run(expert: Expert, fast: bool) -> tuple[Tensor, Tensor]:
        optimizer = torch.optim.AdamW([p for p in expert.parameters() if p.requires_grad], lr=5e-4)
        losses = []
        for step in range(200):
            inputs = ((codes + step // 100) % 16, prompt, prompt_mask, sequence_mask)  # other codes now and then
            loss = expert.loss_sums(*inputs) if fast else plain(expert, *inputs)
            optimizer.zero_grad()
            (loss.sum() / sequence_mask.sum()).backward()
            torch.nn.utils.clip_grad_norm_(expert.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach().double().sum())
        weights = [p for name, p in expert.named_parameters() if not name.endswith("key_value.bias")]
        return torch.stack(losses), torch.cat([p.detach().double().flatten() for p in weights])

    exact = run(copy.deepcopy(start).double(), fast=False)
    theirs, ours = run(copy.deepcopy(start), fast=False), run(copy.deepcopy(start), fast=True)
    assert exact[0][-1] < 0.7 * exact[0][0]  # it learns
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert 0 < relative_error(a, c) <= 2 * relative_error(b, c) < 1e-4


@pytest.mark.parametrize("decoder", [True, False])
def test_autocast(decoder):
    """In bfloat16 as near to float64 as autocast brings the plain forward; weights and gradients stay in float32."""
    changes = {} if decoder else {"factorized_layers": 0, "conditioning": "none"}
    expert = random_experts(SirenConfig.from_dict(TINY | changes), 5)[2]
    codes, prompt, prompt_mask = random_inputs(expert.config, 5, 3, 4, 20)
    inputs = (codes, prompt, prompt_mask, torch.arange(20) < torch.tensor([[20], [7], [12]]))
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(expert, lambda: expert.loss_sums(*inputs))
        theirs = results(expert, lambda: plain(expert, *inputs))
    exact = copy.deepcopy(expert).double()
    truth = results(exact, lambda: plain(exact, *inputs))
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert relative_error(ours["sos"], truth["sos"]) > 1e-4  # bfloat16 it was
    assert_as_good(ours, theirs, truth)


def test_a_model_in_bfloat16():
    """Without autocast the products take the weights' type; losses are in float32."""
    expert = random_experts(SirenConfig.from_dict(TINY), 6)[1].bfloat16()
    inputs = (*random_inputs(expert.config, 6, 2, 3, 9), None)
    ours, theirs = results(expert, lambda: expert.loss_sums(*inputs)), results(expert, lambda: plain(expert, *inputs))
    assert ours.pop("losses").dtype == theirs["losses"].dtype == torch.float32
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    exact = copy.deepcopy(expert).double()
    truth = results(exact, lambda: plain(exact, *inputs))
    assert_as_good(ours, {name: theirs[name] for name in ours}, {name: truth[name] for name in ours})


def test_padding_costs_nothing():
    """A batch that is half padding takes the matrix products of its valid frames, and no head sees position 0."""
    config = SirenConfig.from_dict(TINY)
    expert = random_experts(config, 7)[3]
    codes, prompt, prompt_mask = random_inputs(config, 7, 2, 3, 10)

    def flops(frames: int, sequence_mask: Tensor | None) -> int:
        with FlopCounterMode(display=False) as counter:
            expert.loss_sums(codes[:, :, :frames], prompt, prompt_mask, sequence_mask)
        return counter.get_total_flops()

    half = (torch.arange(10) < 5).expand(2, -1)
    assert flops(10, half) == flops(5, None) < 0.6 * flops(10, None)


def test_no_gradients_where_none_are_asked_for():
    expert = random_experts(SirenConfig.from_dict(TINY), 8)[0]
    inputs = random_inputs(expert.config, 8, 2, 3, 5)
    with torch.no_grad(), FlopCounterMode(display=False) as without:
        loss = expert.loss_sums(*inputs, checkpoint_activations=True)
    with FlopCounterMode(display=False) as with_gradients:
        expected = expert.loss_sums(*inputs)
    assert not loss.requires_grad and torch.equal(loss, expected)
    assert (
        without.get_total_flops() < with_gradients.get_total_flops()
    )  # the heads make their gradients beside the loss


def test_dropout():
    """It acts in training only, a seed repeats it, and checkpointing draws the same again."""
    expert = random_experts(SirenConfig.from_dict(TINY | {"dropout": 0.4}), 9)[1]
    inputs = random_inputs(expert.config, 9, 2, 3, 5)
    quiet = expert.loss_sums(*inputs)
    torch.testing.assert_close(quiet, plain(expert, *inputs, None))
    expert.train()

    def drawn(seed: int, **options: bool) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return results(expert, lambda: expert.loss_sums(*inputs, **options))

    first, other = drawn(1), drawn(2)
    assert not torch.equal(first["losses"], quiet) and not torch.equal(first["losses"], other["losses"])
    for name, value in drawn(1, checkpoint_activations=True).items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_dropout_of_short_attention(heads, kv_heads, monkeypatch):
    """Probabilities are dropped one by one, what stays grows by 1 / (1 - dropout), and gradients follow."""
    drawn = []

    def dropout(x: Tensor, p: float) -> Tensor:
        drawn.append(torch.nn.functional.dropout(x, p))
        return drawn[-1]

    monkeypatch.setattr(rows_module, "functional", types.SimpleNamespace(dropout=dropout))
    torch.manual_seed(1)
    qkv = torch.randn(5, 3, (heads + 2 * kv_heads) * 2, dtype=torch.float64, requires_grad=True)
    out = short_attention(qkv, heads, kv_heads, 0.3, False)
    (keep,) = drawn
    assert keep.unique().tolist() == pytest.approx([0, 1 / 0.7])
    q, k, v = qkv.view(5, 3, -1, 2).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) / 2**0.5).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf)
    expected = (scores.softmax(-1) * keep.flatten(3).permute(2, 3, 0, 1)) @ v
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2))
    d_out = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, qkv, d_out)[0] for x in (out, expected.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [1, 3, 63])
def test_row_operations_in_chunks(rows, monkeypatch):
    """Gradients are those of finite differences, however the rows are cut."""
    monkeypatch.setattr(rows_module, "CHUNK", 40)
    monkeypatch.setattr(rows_module, "LOSS_NUMBERS", 20)
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    targets = torch.randint(5, (rows,), generator=generator)
    check = {"fast_mode": True}
    assert torch.autograd.gradcheck(lambda x: unit_norm(x, 1e-5, torch.float64), random(rows, 2, 4), **check)
    assert torch.autograd.gradcheck(lambda x: swiglu(x, False), random(rows, 2, 6), **check)
    assert torch.autograd.gradcheck(lambda x: short_attention(x, 4, 2, 0.0, False), random(rows, 3, 16), **check)
    inputs = random(rows, 3), random(5, 3)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets, False), inputs, **check)
    torch.testing.assert_close(
        linear_cross_entropy(*inputs, targets, False),
        torch.nn.functional.cross_entropy(inputs[0] @ inputs[1].T, targets, reduction="sum"),
    )


def attention_inputs(seed: int) -> tuple[list[Tensor], Packing, Packing]:
    """Grouped heads; frames [3, 6] and tokens [3, 4] with gaps."""
    generator = torch.Generator().manual_seed(seed)
    packings = []
    for length in (6, 4):
        mask = torch.rand(3, length, generator=generator) < 0.6
        mask[:, 1] = True
        packings.append(Packing.of(3, length, mask, torch.device("cpu")))
    frames, tokens = packings
    shapes = (len(frames.time), 4, 5), (len(frames.time), 2, 5), (len(frames.time), 2, 5), (len(tokens.time), 4, 5)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes], frames, tokens


@pytest.mark.parametrize("path", ["one by one", "padded", "flash"])
def test_attention_of_rows(path, monkeypatch):
    """What a CPU, a GPU and flash-attn are given: a stand-in for the latter takes its arguments at their word."""

    def flash(q, k, v, q_ends, k_ends, q_longest, k_longest, dropout_p=0.0, causal=False):
        assert (q_ends.dtype, q_longest, k_longest) == (torch.int32, int(q_ends.diff().max()), int(k_ends.diff().max()))
        out = torch.empty_like(q)
        for sequence in range(len(q_ends) - 1):
            rows, others = (slice(int(ends[sequence]), int(ends[sequence + 1])) for ends in (q_ends, k_ends))
            one = (q[rows].transpose(0, 1), k[others].transpose(0, 1), v[others].transpose(0, 1))
            mixed = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=causal, enable_gqa=True)
            out[rows] = mixed.transpose(0, 1)
        return out

    if path == "flash":
        monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=flash))
    if path == "padded":
        monkeypatch.setattr(packed_module, "_attend_one_by_one", packed_module._attend_padded)
    (q, k, v, other), frames, tokens = attention_inputs(4)
    attention = "flash" if path == "flash" else "sdpa"
    own = attend(q, k, v, frames, frames, True, 0.0, attention)
    cross = attend(q, other, -other, frames, tokens, False, 0.0, attention)
    for row in range(len(q)):
        same = (frames.sequence == frames.sequence[row]) & (frames.time <= frames.time[row])
        there = tokens.sequence == frames.sequence[row]
        for result, keys, values in ((own, k[same], v[same]), (cross, other[there], -other[there])):
            for head in range(4):
                group = head // (4 // keys.shape[1])
                weights = (keys[:, group] @ q[row, head] / 5**0.5).softmax(0)
                torch.testing.assert_close(result[row, head], weights @ values[:, group])


def test_packing():
    mask = torch.tensor([[False, True, True, False], [True, False, False, False], [True, True, False, True]])
    packing = Packing.of(3, 4, mask, mask.device)
    batch = torch.arange(12).view(3, 4)
    rows = packing.take(batch)
    assert rows.tolist() == [1, 2, 4, 8, 9, 11] and packing.ends().tolist() == [0, 2, 3, 6]
    assert packing.pad(rows).tolist() == [[1, 2, 0], [4, 0, 0], [8, 9, 11]]
    assert packing.valid().tolist() == [[True, True, False], [True, False, False], [True] * 3]
    assert torch.equal(packing.unpad(packing.pad(rows)), rows)
    whole = Packing.of(3, 4, None, mask.device)
    assert torch.equal(whole.take(batch), batch.flatten()) and whole.valid() is None
    assert torch.equal(whole.pad(batch.flatten()), batch) and torch.equal(whole.unpad(batch), batch.flatten())


@pytest.mark.parametrize("codes_each", [2, 12])
def test_kernels(codes_each, device):
    """siren.kernels in their place: as near to float64 as the plain forward. On a CPU in Triton's interpreter."""
    pytest.importorskip("triton")
    changes = {"spatial_layers": 1, "factorized_layers": 1, "num_experts": 12 // codes_each, "codebook_size": 5}
    expert = random_experts(SirenConfig.from_dict(TINY | changes), 10)[-1].to(device)
    inputs = [*random_inputs(expert.config, 10, 2, 3, 4), torch.tensor([[True] * 4, [True, False, True, False]])]
    inputs = [value.to(device) for value in inputs]
    ours = results(expert, lambda: expert.loss_sums(*inputs, kernels=True))
    exact = copy.deepcopy(expert).double()
    truth = results(exact, lambda: plain(exact, *inputs))
    assert_as_good(ours, results(expert, lambda: plain(expert, *inputs)), truth)


def test_what_cannot_run_says_so(monkeypatch):
    expert = random_experts(SirenConfig.from_dict(TINY), 11)[0]
    inputs = random_inputs(expert.config, 11, 1, 2, 3)
    with pytest.raises(InputError, match="attention must be one of sdpa, flash, not 'fast'"):
        expert.loss_sums(*inputs, attention="fast")
    with pytest.raises(InputError, match="flash attention needs a GPU and bfloat16 or float16, not cpu and float32"):
        expert.loss_sums(*inputs, attention="flash")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(MissingDependencyError, match=r"flash-attn is not installed .*'siren\[flash\]'"):
        packed_module.check_attention("flash", torch.device("cuda"), torch.bfloat16)
    with pytest.raises(InputError, match="frames; max_seq_len is 600"):
        expert.loss_sums(torch.zeros(1, 12, 601, dtype=torch.int64), *inputs[1:])
    interpreter = types.ModuleType("siren.kernels.interpreter")
    interpreter.INTERPRETED = types.SimpleNamespace(value=False)
    monkeypatch.setitem(sys.modules, "siren.kernels.interpreter", interpreter)
    with pytest.raises(BackendError, match=r"siren\.kernels need a GPU, and the model is on cpu"):
        expert.loss_sums(*inputs, kernels=True)
    interpreter.INTERPRETED.value = True
    with pytest.raises(InputError, match=r"siren\.kernels compute in float32 or bfloat16, not torch\.float64"):
        expert.double().loss_sums(*inputs, kernels=True)
    monkeypatch.setitem(sys.modules, "siren.kernels.interpreter", None)
    with pytest.raises(MissingDependencyError, match=r"triton is not installed .*'siren\[triton\]'"):
        expert.loss_sums(*inputs, kernels=True)


def test_the_naive_arm_is_the_official_step(golden_folder, golden, monkeypatch):
    """benchmarks/naive_train.py computes the official code's losses, and gradients for the same parameters."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from naive_train import NaiveExpert, naive_loss

    manifest = read_manifest(golden_folder)
    batch = (golden["codes"].long(), *(golden[name] for name in ("prompt", "prompt_mask", "sequence_mask")))
    for index in (0, 4):
        entry = manifest.experts[index]
        model, expert = (kind(manifest.config, entry.start_codebook) for kind in (NaiveExpert, Expert))
        model.load_state_dict(dict(iter_tensors(entry, manifest.config)))
        loss = naive_loss(model, entry.start_codebook, batch)
        torch.testing.assert_close(loss, golden["loss"][index].float().mean(), rtol=0, atol=1e-4)
        loss.backward()
        learn = {name for name, p in expert.named_parameters() if p.requires_grad}
        assert {name for name, p in model.named_parameters() if p.grad is not None} == learn


def test_the_benchmark(tmp_path, monkeypatch, capsys):
    """Every arm that a CPU has passes the gate and gets a row; a step that is wrong is not timed."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import train

    out = tmp_path / "train.json"
    options = {"preset": "tiny", "narrow": 1, "batch": 2, "frames": 20, "rounds": 1, "threads": 1, "memory": False}
    options |= {"precision": "fp32", "lengths": "2-6", "arms": "naive,siren,siren-checkpoint", "device": "cpu"}
    train.run(**options, busy=True, out=out, picture=None)
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == options["arms"].split(",")
    assert all(row["frames_per_second"] > 0 and len(row["parts"]) == 4 for row in rows)
    assert capsys.readouterr().out.count("| siren") == 2
    right = Expert.loss_sums
    monkeypatch.setattr(Expert, "loss_sums", lambda *inputs, **named: right(*inputs, **named) * 1.001)
    with pytest.raises(SirenError, match="the gate is red, nothing is timed: siren: errors"):
        train.run(**options, busy=True, out=out, picture=None)
    assert train.narrowed(SirenConfig(), 4).ffn_hidden == SirenConfig().ffn_hidden / 4
    for change, message in (
        ({"narrow": 3}, "cannot be divided by 3"),
        ({"lengths": "7-6"}, "--lengths must be like 2-6 or 6"),
        ({"arms": "fast"}, "--arms must be different ones of naive"),
        ({"threads": 2}, "--busy counts the time of one thread"),
        ({"frames": 33}, "takes at most 32 frames"),
    ):
        with pytest.raises(InputError, match=message):
            train.run(**options | change, busy=True, out=None, picture=None)
