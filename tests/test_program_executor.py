"""Whole clips, operation by operation, against the C++ engine and the plain decoder."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from random_models import random_experts, random_inputs, states
from torch import Tensor

from siren import SirenConfig
from siren.engine import CpuDecoder, folded_tensors
from siren.expert import Expert
from siren.layers import sinusoidal_positions
from siren.program import Matrix, Operation, Program, build_program
from siren.program_executor import Executor, State, attend, new_state
from siren.reference import ReferenceDecoder, distinct_prompts
from siren.sampling import SamplingSettings

GREEDY = SamplingSettings(temperature=0.0)
# Between log-probabilities. A float32 sum that is added in another order may round to the next bf16 in a cache. The
# largest difference in 250 clips of models like these was 5.1e-5.
CLOSE = 5e-4

# ---- a model as the executor takes it -------------------------------------------------------------------------------

BACKBONE = {
    "cross_attention.query.weight": "cross_query",
    "cross_attention.output.weight": "cross_output",
    "self_attention.qkv.weight": "qkv",
    "self_attention.output.weight": "self_output",
    "feed_forward.gate_value.weight": "gate_value",
    "feed_forward.down.weight": "down",
    "cross_norm.weight": "cross_norm",
    "self_norm.weight": "self_norm",
    "ffn_norm.weight": "ffn_norm",
    "cross_attention.query.bias": "cross_query_bias",
    "cross_attention.output.bias": "cross_output_bias",
}
DECODER = {
    "attention.qkv.weight": "decoder_qkv",
    "attention.output.weight": "decoder_output",
    "feed_forward.gate_value.weight": "decoder_gate_value",
    "feed_forward.down.weight": "decoder_down",
    "attention_norm.weight": "attention_norm",
    "ffn_norm.weight": "decoder_ffn_norm",
}


def rounded(weight: Tensor) -> Tensor:
    return weight.bfloat16().float()


def place(name: str) -> tuple[str, int] | None:
    """The program's name and block of a checkpoint's tensor; None for what is no matrix and no vector of it."""
    parts = name.split(".")
    known = {"spatial_norm.weight": ("final_norm", 0), "factorized_norm.weight": ("decoder_norm", 0)}
    if parts[0] == "heads":
        return "heads", int(parts[1])
    if parts[0] in ("spatial_blocks", "factorized_blocks"):
        names = BACKBONE if parts[0] == "spatial_blocks" else DECODER
        rest = ".".join(parts[2:])
        return (names[rest], int(parts[1])) if rest in names else None
    return known.get(name)


def executor_of(program: Program, experts: list[Expert], sampling: SamplingSettings) -> Executor:
    """bf16 weights, what the program does not need left out; vectors that nothing sets are NaN."""
    config = program.config
    wanted = {(matrix.name, matrix.expert, matrix.block): matrix for matrix in program.matrices}
    matrices: dict[Matrix, Tensor] = {}
    vectors = torch.full((program.vector_floats,), torch.nan)
    tables = torch.empty(
        config.num_experts, config.num_codebooks, config.codebook_size, config.dim, dtype=torch.bfloat16
    )
    for k, expert in enumerate(experts):
        for name, tensor in folded_tensors(expert.state_dict().items()):
            if name.startswith("codebooks."):
                tables[k, int(name.split(".")[2])] = tensor.bfloat16()
            found = place(name)
            if found is None:
                continue
            key = found[0], k, found[1]
            if key in wanted:
                matrices[wanted[key]] = rounded(tensor)
            elif key in program.vectors:
                offset, length = program.vectors[key]
                assert tensor.shape == (length,)
                vectors[offset : offset + length] = tensor
    assert matrices.keys() == set(program.matrices)
    sos = torch.stack([expert.sos.detach().flatten() for expert in experts])
    positions = sinusoidal_positions(max(config.max_seq_len, config.codes_per_expert + 1), config.dim)
    return Executor(program, matrices, vectors, tables, sos, positions, sampling)


@torch.no_grad()
def prompt_caches(experts: list[Expert], tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values bf16 [K, blocks, U, heads, P, head_dim] of prompts [U, P, prompt_dim]; padding is NaN."""
    caches = []
    for expert in experts:
        for block in expert.spatial_blocks:
            attention = block.cross_attention
            both = tokens @ rounded(attention.key_value.weight).T + attention.key_value.bias
            both = both.masked_fill(~mask.unsqueeze(-1), torch.nan)
            heads = both.view(*tokens.shape[:2], 2, attention.n_heads, attention.head_dim)
            caches.append(heads.permute(2, 0, 3, 1, 4).bfloat16())
    keys, values = torch.stack(caches, dim=1).unflatten(1, (len(experts), -1))
    return keys, values


@torch.no_grad()
def decoder_starts(experts: list[Expert], tokens: Tensor, mask: Tensor) -> Tensor:
    """Starts [K, U, d] of prompts [U, P, prompt_dim]."""
    if experts[0].config.decoder_start == "learned":
        return torch.stack([expert.start.view(1, -1).repeat(len(tokens), 1) for expert in experts])
    means = torch.stack([row[valid].mean(0) for row, valid in zip(tokens, mask, strict=True)])
    summaries = (expert.prompt_summary for expert in experts)
    return torch.stack([means @ rounded(summary.weight).T + summary.bias for summary in summaries])


def compact(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each prompt's tokens first, in their order, so that a length says which they are."""
    order = (~mask).int().sort(dim=1, stable=True).indices
    return tokens.gather(1, order.unsqueeze(-1).expand_as(tokens)), mask.gather(1, order)


@dataclass
class Clip:
    """A model, a batch of prompts and how to draw, as an executor and as decoders see them."""

    config: SirenConfig
    experts: list[Expert]
    prompt: Tensor
    mask: Tensor
    seeds: np.ndarray
    sampling: SamplingSettings
    frames: int
    sms: int = 13

    def program(self) -> Program:
        return build_program(self.config, len(self.seeds), self.sampling.guided, self.sms)

    def state(self, program: Program, frames: int, forced: Tensor | None = None, first_frame: int = 0) -> State:
        """Poisoned, except for what the host writes. forced: [B, J, frames]."""
        tokens, mask, index = distinct_prompts(self.prompt, self.mask, self.sampling.guided)
        tokens, mask = compact(tokens, mask)
        keys, values = prompt_caches(self.experts, tokens, mask)
        state = new_state(
            program, frames, self.seeds, (keys, values, index, mask.sum(1)), capacity=self.frames + 2,
            forced=None if forced is None else forced.permute(2, 1, 0).int().contiguous(),
            noise_frames=np.full(len(self.seeds), first_frame, np.uint32),
        )  # fmt: skip
        if self.config.factorized_layers:
            state.view("start").copy_(decoder_starts(self.experts, tokens, mask)[:, index])
        return state


Order = Callable[[Program], Iterable[Operation]]


def in_list_order(program: Program) -> list[Operation]:
    return program.operations


def execute(clip: Clip, order: Order = in_list_order, forced: Tensor | None = None) -> tuple[Program, State]:
    program = clip.program()
    executor, state = executor_of(program, clip.experts, clip.sampling), clip.state(program, clip.frames, forced)
    for frame in range(clip.frames):
        for operation in order(program):
            executor.run(operation, state, 0, frame)
    return program, state


def results(state: State) -> tuple[Tensor, Tensor]:
    """codes int64 [B, J, frames] and log-probabilities [B, J, frames]."""
    return state.codes_out.permute(2, 1, 0).long(), state.logprobs_out.permute(2, 1, 0)


def engine_of(clip: Clip) -> CpuDecoder:
    """The C++ engine with bf16 weights and float32 activations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIREN_CPU_ISA", "portable")
        return CpuDecoder(clip.config, states(clip.experts), "bf16", threads=1)


def assert_as_the_engine(clip: Clip) -> None:
    """Codes of a whole clip exactly, log-probabilities as near as bf16 caches allow."""
    engine = engine_of(clip).start(clip.prompt, clip.mask, clip.seeds, clip.sampling)
    engine.step(clip.frames)
    codes, logprobs = results(execute(clip)[1])
    assert torch.equal(codes, engine.codes)
    torch.testing.assert_close(logprobs, engine.logprobs, rtol=0, atol=CLOSE)


def clip_of(config: SirenConfig, batch: int, sampling: SamplingSettings, frames: int, seed: int = 0, sms: int = 13):
    experts = random_experts(config, seed)
    _, prompt, mask = random_inputs(config, seed, batch, 5, 1)
    return Clip(config, experts, prompt, mask, np.arange(seed, seed + batch, dtype=np.uint64), sampling, frames, sms)


def small(**values: object) -> SirenConfig:
    sizes = {"dim": 64, "n_heads": 4, "n_kv_heads": 4, "spatial_layers": 2, "factorized_layers": 1, "prompt_dim": 10,
             "num_experts": 3, "num_codebooks": 6, "codebook_size": 40, "dac_feature_dim": 16, "ffn_multiple_of": 32,
             "max_seq_len": 40}  # fmt: skip
    return SirenConfig(**(sizes | values))


# ---- whole clips ----------------------------------------------------------------------------------------------------


CLIPS = {
    "plain": (small(), 2, SamplingSettings()),
    "greedy": (small(), 3, GREEDY),
    "guided": (small(), 2, SamplingSettings(guidance_scale=2.5)),
    "guided greedy": (small(), 1, SamplingSettings(temperature=0, guidance_scale=0.5)),
    "top-k": (small(), 2, SamplingSettings(0.8, top_k=7)),
    "top-p": (small(), 2, SamplingSettings(1.3, top_p=0.8)),
    "all at once": (small(), 2, SamplingSettings(1.1, 20, 0.9, 1.5)),
    "no conditioning": (small(conditioning="none"), 2, SamplingSettings()),
    "residual conditioning": (small(conditioning="residual"), 2, SamplingSettings()),
    "a large eps": (small(norm_eps=0.5), 2, SamplingSettings()),
    "learned start": (small(decoder_start="learned"), 2, SamplingSettings()),
    "grouped queries": (small(n_kv_heads=2), 2, SamplingSettings()),
    "one key head": (small(n_kv_heads=1, n_heads=8), 1, SamplingSettings(guidance_scale=2.0)),
    "deep decoders": (small(factorized_layers=3, num_codebooks=9), 2, SamplingSettings(guidance_scale=2.0)),
    "no decoders": (small(factorized_layers=0, conditioning="none"), 2, SamplingSettings(guidance_scale=2.0)),
    "one codebook an expert": (small(num_codebooks=3, factorized_layers=2), 2, SamplingSettings()),
    "one codebook": (small(num_codebooks=1, num_experts=1), 2, SamplingSettings()),
    "one expert": (small(num_experts=1, num_codebooks=4), 2, SamplingSettings()),
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_the_engines(name):
    """Ten frames from nothing but prompts and poison."""
    config, batch, sampling = CLIPS[name]
    assert_as_the_engine(clip_of(config, batch, sampling, frames=10))


@st.composite
def models(draw: st.DrawFn) -> SirenConfig:
    """Any sizes that the kernel takes, small ones."""
    head_dim, kv_heads = draw(st.sampled_from([(8, 2), (8, 4), (16, 1), (16, 2), (32, 1), (32, 3)]))
    heads = kv_heads * draw(st.sampled_from([n for n in (1, 2, 3, 4) if n * kv_heads * head_dim % 32 == 0]))
    blocks, experts = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    return small(
        dim=heads * head_dim, n_heads=heads, n_kv_heads=kv_heads, spatial_layers=draw(st.integers(1, 3)),
        factorized_layers=blocks, num_experts=experts, num_codebooks=experts * draw(st.integers(1, 3)),
        codebook_size=draw(st.sampled_from([8, 16, 72])), ffn_multiplier=draw(st.sampled_from([None, 0.4])),
        conditioning=draw(st.sampled_from(["none", "residual", "accumulated"])) if blocks else "none",
        decoder_start=draw(st.sampled_from(["prompt", "learned"])),
    )  # fmt: skip


@hypothesis.given(
    config=models(),
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 5),
    sms=st.integers(1, 20),
    guidance=st.sampled_from([1.0, 2.5]),
)
@hypothesis.settings(max_examples=15)
def test_random_models(config, seed, batch, sms, guidance):
    """Given codes, the log-probabilities of all frames are the engine's."""
    clip = clip_of(config, batch, SamplingSettings(guidance_scale=guidance), 4, seed, sms)
    shape = batch, config.num_codebooks, clip.frames
    codes = torch.randint(config.codebook_size, shape, generator=torch.Generator().manual_seed(seed))
    engine = engine_of(clip).start(clip.prompt, clip.mask, clip.seeds, clip.sampling)
    engine.force(codes)
    found, logprobs = results(execute(clip, forced=codes)[1])
    assert torch.equal(found, codes)
    torch.testing.assert_close(logprobs, engine.logprobs, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingSettings(0.9, 300, 0.95, 2.0)], ids=str)
def test_the_golden_model(golden, golden_model, sampling):
    """The official code's small model: the engine's codes, sampled, guided and greedy."""
    clip = Clip(golden_model.config, list(golden_model.experts), golden["prompt"], golden["prompt_mask"],
                np.array([3, 2**64 - 1, 12345678901234567890], np.uint64), sampling, frames=8, sms=132)  # fmt: skip
    assert_as_the_engine(clip)


def test_the_number_of_sms_does_not_matter():
    """Bit-identical results: an operation is the same however it is shared."""
    wanted = results(execute(clip_of(small(), 2, SamplingSettings(), 3, sms=1))[1])
    for sms in (2, 5, 132):
        found = results(execute(clip_of(small(), 2, SamplingSettings(), 3, sms=sms))[1])
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)), sms


def test_forced_codes_are_taken():
    """Their log-probabilities are the engine's, and the next frames follow from them, not from draws."""
    clip = clip_of(small(), 3, SamplingSettings(temperature=0.7), frames=6)
    codes = torch.randint(40, (3, 6, 6), generator=torch.Generator().manual_seed(1))
    engine = engine_of(clip).start(clip.prompt, clip.mask, clip.seeds, clip.sampling)
    engine.force(codes)
    _, state = execute(clip, forced=codes)
    found, logprobs = results(state)
    assert torch.equal(found, codes)
    torch.testing.assert_close(logprobs, engine.logprobs, rtol=0, atol=CLOSE)
    assert state.view("noise").isnan().all(), "nobody needs noise"


def test_a_clip_in_two_launches():
    """The second begins with the first's caches, its last codes and their sums, in an arena of its own."""
    clip = clip_of(small(n_kv_heads=2), 2, SamplingSettings(guidance_scale=2.0), frames=6)
    program, whole = execute(clip)
    executor, parts = executor_of(program, clip.experts, clip.sampling), []
    last: State | None = None
    for first_frame, frames in ((0, 2), (2, 4)):
        state = clip.state(program, frames, first_frame=first_frame)
        if last is not None:
            state.keys.copy_(last.keys)
            state.values.copy_(last.values)
            state.view("codes")[-1] = last.view("codes")[-1]
            parity = clip.config.num_codebooks & 1
            state.view("total")[parity] = last.view("total")[parity]
        for frame in range(frames):
            for operation in program.operations:
                executor.run(operation, state, first_frame, frame)
        parts.append(results(state))
        last = state
    for wanted, found in zip(results(whole), zip(*parts, strict=True), strict=True):
        assert torch.equal(wanted, torch.cat(found, dim=-1))


# ---- the residual-only program --------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("sampling", [SamplingSettings(0.9, 25, 0.95), GREEDY], ids=str)
def test_residual_only(blocks, sampling):
    """Any h and start, frames of their own: the engine's codes, log-probabilities and next inputs; PyTorch's too."""
    config = small(factorized_layers=blocks, n_kv_heads=2, conditioning="accumulated" if blocks else "none")
    experts = random_experts(config, 4)
    h, start = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(2))
    seeds, frames = np.array([0, 2**64 - 1, 5, 6, 7], np.uint64), np.array([0, 1, 400, 4, 2**31 + 5])
    program = build_program(config, 5, guided=False, sms=7, residual=True)
    state = new_state(program, 1, seeds, noise_frames=frames.astype(np.uint32))
    state.view("h").copy_(h)
    if blocks:
        state.view("start").copy_(start)
    executor = executor_of(program, experts, sampling)
    for operation in program.operations:
        executor.run(operation, state, 0, 0)
    clip = Clip(config, experts, h, h, seeds, sampling, 1)
    plain = ReferenceDecoder(config, [(expert.start_codebook, _rounded_matrices(expert)) for expert in experts])
    plain.tables = rounded(plain.tables)
    for decoder in (engine_of(clip), plain):
        codes, logprobs, inputs = decoder.residual(h, start, seeds, frames, sampling)
        assert torch.equal(state.codes_out[0].T.long(), codes)
        torch.testing.assert_close(state.logprobs_out[0].T, logprobs, rtol=0, atol=CLOSE)
        torch.testing.assert_close(state.view("sums"), inputs)


def _rounded_matrices(expert: Expert) -> dict[str, Tensor]:
    """Float32 weights whose matrices are bf16 numbers; embeddings stay as they are."""
    return {
        name: rounded(tensor) if tensor.ndim == 2 and not name.startswith("codebooks.") else tensor
        for name, tensor in expert.state_dict().items()
    }


# ---- the order --------------------------------------------------------------------------------------------------


def owners(operation: Operation) -> range:
    return range(operation.first_sm, operation.first_sm + operation.sms)


def random_order(program: Program, generator: random.Random) -> Iterator[Operation]:
    """One frame in an order that the waits allow: an operation may run once all that its SMs own before it, and all
    that the SMs it waits for own before the value it waits for, has run."""
    operations = program.operations
    waiting: dict[int, set[int]] = {}
    for operation in operations:
        mine, (first, count, value) = set(owners(operation)), operation.wait or (0, 0, 0)
        awaited = set(range(first, first + count))
        waiting[operation.number] = {
            other.number
            for other in operations
            if (other.number < operation.number and mine & set(owners(other)))
            or (other.number < value and awaited & set(owners(other)))
        }
    done: set[int] = set()
    ready = [number for number, before in waiting.items() if not before]
    after: dict[int, list[int]] = {number: [] for number in waiting}
    for number, before in waiting.items():
        for other in before:
            after[other].append(number)
    while ready:
        number = ready.pop(generator.randrange(len(ready)))
        done.add(number)
        yield operations[number]
        for later in after[number]:
            waiting[later].discard(number)
            if not waiting[later]:
                ready.append(later)
    assert len(done) == len(operations), "the rest waits for itself"


@hypothesis.given(seed=st.integers(0, 2**31), sms=st.sampled_from([3, 5, 13]), guided=st.booleans())
@hypothesis.settings(max_examples=6)
def test_any_order_that_the_waits_allow(seed, sms, guided):
    """The experts' backbones run in any interleaving: everything in the state, bit for bit, is as in list order."""
    clip = clip_of(small(), 2, SamplingSettings(guidance_scale=2.0 if guided else 1.0), 2, seed=seed % 1000, sms=sms)
    generator, mixed = random.Random(seed), []  # noqa: S311

    def order(program: Program) -> list[Operation]:
        mixed.append(list(random_order(program, generator)))
        return mixed[-1]

    program, wanted = execute(clip)
    _, found = execute(clip, order)
    assert any(operations != program.operations for operations in mixed)
    for name in ("arena", "keys", "values", "codes_out", "logprobs_out"):
        a, b = (getattr(state, name) for state in (wanted, found))
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


# ---- single operations ------------------------------------------------------------------------------------------


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Flat indices of the elements whose bits differ."""
    kind = torch.int16 if before.dtype == torch.bfloat16 else torch.int32
    return (before.flatten().view(kind) != after.flatten().view(kind)).nonzero().flatten()


@pytest.mark.parametrize("conditioning", ["accumulated", "none"])
def test_only_what_an_operation_writes_changes(conditioning):
    """Over a second frame whose every written element is new: what changes lies in the declared writes, and fills
    them where it is a whole region."""
    clip = clip_of(small(n_kv_heads=2, conditioning=conditioning), 2, SamplingSettings(guidance_scale=2.0), 2)
    program = clip.program()
    executor, state = executor_of(program, clip.experts, clip.sampling), clip.state(program, 2)
    for frame in range(2):
        for operation in program.operations:
            before = copy.deepcopy(state)
            executor.run(operation, state, 0, frame)
            allowed = torch.zeros(program.arena_floats, dtype=torch.bool)
            cached = {"keys": False, "values": False}
            for sm in owners(operation):
                for access in operation.accesses(sm):
                    if access.write and access.buffer in program.regions:
                        offset = program.regions[access.buffer][0]
                        allowed[offset + access.start : offset + access.stop] = True
                    elif access.write and access.buffer in cached:
                        cached[access.buffer] = True
            touched = changed(before.arena, state.arena)
            assert allowed[touched].all(), (operation.name, touched[~allowed[touched]].tolist())
            if operation.kind not in ("draw",):  # a code may be what it was
                assert len(touched) > 0.9 * int(allowed.sum()), operation.name
            for name, written in cached.items():
                now = getattr(state, name)
                touched = changed(getattr(before, name), now)
                place = torch.zeros_like(now, dtype=torch.bool)
                if written:
                    place[operation.fields["expert"], operation.fields["block"], :, :, frame] = True
                assert place.flatten()[touched].all() and len(touched) >= 0.9 * int(place.sum()), operation.name


@pytest.mark.parametrize("forced", [False, True])
def test_a_bad_row_of_logits(forced):
    """NaN, plus infinity or nothing finite: code 0 and a log-probability of NaN; other rows are drawn as ever."""
    clip = clip_of(small(), 4, SamplingSettings(), 1)
    program = clip.program()
    codes = torch.full((4, 6, 1), 9) if forced else None
    executor, state = executor_of(program, clip.experts, clip.sampling), clip.state(program, 1, codes)
    state.view("noise").zero_()
    logits = state.view("logits")
    logits[2] = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    logits[2, 0, 17] = torch.nan
    logits[2, 1, 3] = torch.inf
    logits[2, 2] = -torch.inf
    logits[2, 3, 5] = -torch.inf
    draws = [operation for operation in program.operations if operation.kind == "draw"]
    executor.run(draws[2], state, 0, 0)
    best = 9 if forced else int(logits[2, 3].argmax())
    assert state.codes_out[0, 2].tolist() == state.view("codes")[2].tolist() == [0, 0, 0, best]
    assert state.logprobs_out[0, 2].isnan().tolist() == [True, True, True, False]
    assert state.logprobs_out[0, 2, 3] == logits[2, 3].log_softmax(-1)[best]
    assert state.codes_out[0, 3:].eq(-1).all()


def test_attention_is_pytorchs():
    """Grouped queries, in float64."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, 16, generator=generator).double()
    k, v = torch.randn(2, 2, 9, 16, generator=generator).double()
    wanted = torch.nn.functional.scaled_dot_product_attention(q[None, :, None], k[None], v[None], enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v), wanted[0, :, 0])
