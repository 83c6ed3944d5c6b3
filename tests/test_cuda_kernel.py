"""The persistent CUDA kernel operation by operation, on its emulator, against the executor's plain PyTorch.

Before each operation everything that it does not say it reads is poisoned: NaN in the arena and the caches, codes that
lead to NaN. The kernel then runs this one operation. What the operation says it writes must be what the executor
computes from the clean state, and every other bit must be as it was. Both go on from the executor's state, so a mistake
shows where it is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("siren._emulator", reason="the emulator of the CUDA kernel is not built")

from random_models import random_experts, states
from random_programs import configs

import siren
from siren import _emulator
from siren.cuda_session import follow, settings_arguments
from siren.cuda_weights import CudaWeights
from siren.errors import BackendError
from siren.program import Operation, Program
from siren.program_executor import Executor, State, new_state
from siren.sampling import SamplingSettings
from siren.tape import unpack

LEAN = {"prompt_dim": 5, "dac_code_dim": 2, "dac_feature_dim": 3, "ffn_multiple_of": 32}
CONFIG = siren.SirenConfig(
    dim=32,
    n_heads=4,
    n_kv_heads=2,
    spatial_layers=2,
    factorized_layers=2,
    num_experts=2,
    num_codebooks=4,
    codebook_size=40,
    max_seq_len=800,
    **LEAN,
)
SAMPLED = SamplingSettings(temperature=0.9, top_k=13, top_p=0.8)
OPERATION = 1  # the place of an operation's number in an instruction


@dataclass
class Case:
    """A program with a model's weights, and a state that it runs on."""

    weights: CudaWeights
    program: Program
    executor: Executor
    settings: SamplingSettings
    tables: torch.Tensor  # with as many rows of NaN after them, where a poisoned code leads
    state: State

    def run_kernel(self, state: State, operation: Operation, frame: int, schedule: int) -> None:
        """The operation alone, on `state`."""
        rows = self.program.instructions[:, OPERATION] == operation.number
        starts = np.concatenate(([0], rows.cumsum()))[self.program.starts].astype(np.int32)
        instructions = np.ascontiguousarray(self.program.instructions[rows])
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        arguments = {
            **self.weights.arguments(self.weights.plan(self.program.sequences, self.settings.guided)),
            **settings_arguments(self.settings),
            "forced": 0,
            **{name: value.data_ptr() for name, value in fields.items() if isinstance(value, torch.Tensor)},
            "tables": self.tables.data_ptr(),
            "instructions": instructions.ctypes.data,
            "starts": starts.ctypes.data,
            "first_operation": operation.number,
            "last_operation": operation.number + 1,
            "frames": 1,
            "first_frame": frame,
            "capacity": state.keys.shape[4],
            "prompts": len(state.prompt_length),
            "prompt_capacity": state.prompt_keys.shape[4],
        }
        follow(_emulator.run(arguments, schedule), 1, lambda _: None)


def build(
    config: siren.SirenConfig,
    weights: str = "bf16",
    sequences: int = 3,
    sms: int = 5,
    settings: SamplingSettings = SAMPLED,
    shared_bytes: int = 232448,
    residual: bool = False,
    seed: int = 3,
    capacity: int = 4,
    prompt_lengths: tuple[int, ...] = (3, 1),
    experts: Iterable[torch.nn.Module] | None = None,
) -> Case:
    """At the beginning of a clip in which the noise's frame numbers soon wrap around."""
    experts = random_experts(config, seed) if experts is None else experts
    made = CudaWeights(config, states(experts), weights, torch.device("cpu"), sms, shared_bytes, residual)
    program = made.plan(sequences, settings.guided).program
    matrices = {}
    for matrix, values in unpack(made.tape, program, weights).items():
        offset, length = program.vectors[f"scale:{matrix.name}", matrix.expert, matrix.block]
        scales = made.vectors[offset : offset + length]
        scales = torch.cat((scales[0::2], scales[1::2])) if matrix.swiglu else scales
        matrices[matrix] = values if weights == "bf16" else values * scales.unsqueeze(1)

    generator = torch.Generator().manual_seed(seed)
    heads = (config.n_heads, max(prompt_lengths), config.head_dim)
    shape = (2, config.num_experts, config.spatial_layers, len(prompt_lengths), *heads)
    keys, values = torch.randn(shape, generator=generator).to(torch.bfloat16)
    for u, length in enumerate(prompt_lengths):
        keys[:, :, u, :, length:] = values[:, :, u, :, length:] = math.nan
    index = torch.arange(program.rows) % len(prompt_lengths)
    state = new_state(
        program,
        1,
        np.array([2**63 + seed + 7 * b for b in range(sequences)], np.uint64),
        None if residual else (keys, values, index, torch.tensor(prompt_lengths)),
        capacity=capacity,
        noise_frames=np.full(sequences, 2**32 - 1, np.uint32),
    )
    for name in ("start", "h") if residual else ("start",):
        state.view(name).copy_(torch.randn(state.view(name).shape, generator=generator))
    executor = Executor(program, matrices, made.vectors, made.tables, made.sos, made.positions, settings)
    flat = made.tables.flatten(0, 2)
    return Case(made, program, executor, settings, torch.cat((flat, torch.full_like(flat, math.nan))), state)


def copy_of(state: State) -> State:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return State(**{name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in fields.items()})


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def marked(case: Case, operation: Operation, frame: int, write: bool) -> dict[str, torch.Tensor]:
    """Masks of the arena and the caches: what the operation's SMs say they read, or write."""
    masks = {name: torch.zeros_like(getattr(case.state, name), dtype=torch.bool) for name in ("keys", "values")}
    masks["arena"] = torch.zeros(case.program.arena_floats, dtype=torch.bool)
    times = slice(frame, frame + 1) if write else slice(0, frame + 1)
    for sm in range(operation.first_sm, operation.first_sm + operation.sms):
        for access in operation.accesses(sm):
            if access.write != write:
                continue
            if access.buffer in ("keys", "values"):
                whole = masks[access.buffer]
                flat = torch.zeros(whole[..., 0, :].numel(), dtype=torch.bool)
                flat[access.start : access.stop] = True
                whole[..., times, :] |= flat.view(*whole.shape[:-2], 1, whole.shape[-1])
            else:
                offset = case.program.regions[access.buffer][0]
                masks["arena"][offset + access.start : offset + access.stop] = True
    return masks


def poisoned(case: Case, reads: dict[str, torch.Tensor]) -> State:
    """The state with NaN in all that is not read, and codes that lead to NaN."""
    result = copy_of(case.state)
    for name, read in reads.items():
        getattr(result, name).masked_fill_(~read, math.nan)
    offset, shape = case.program.regions["codes"]
    read = reads["arena"][offset : offset + math.prod(shape)].view(shape)
    result.view("codes").copy_(torch.where(read, case.state.view("codes"), len(case.tables) // 2))
    return result


def check_operation(case: Case, operation: Operation, frame: int, schedule: int = 0) -> None:
    """One operation, in the kernel on a poisoned state and in the executor, which moves the case's state on."""
    reads, writes = (marked(case, operation, frame, write) for write in (False, True))
    before = poisoned(case, reads)
    after, expected = copy_of(before), case.state
    where = f"{operation.name}, frame {frame}, schedule {schedule}"
    try:
        case.run_kernel(after, operation, frame, schedule)
    except BackendError as error:
        pytest.fail(f"{where}: {error}")
    case.executor.run(operation, expected, frame, 0)

    codebook = operation.fields["codebook"]
    for name in ("codes_out", "logprobs_out"):
        writes[name] = torch.zeros(getattr(expected, name).shape, dtype=torch.bool)
        if operation.kind == "draw":
            writes[name][:, codebook] = True
    for name, written in writes.items():
        same = bits(getattr(after, name)) == bits(getattr(before, name))
        assert (same | written).all(), f"{where} writes to {name} what it does not say"
    if operation.kind == "draw":
        assert torch.equal(after.view("codes")[codebook], expected.view("codes")[codebook]), where
        assert torch.equal(after.codes_out[:, codebook], expected.codes_out[:, codebook]), where
        ours, theirs = after.logprobs_out[:, codebook], expected.logprobs_out[:, codebook]
        largest = expected.view("logits")[codebook].nan_to_num(0, 0, 0).abs().max() / (case.settings.temperature or 1)
        allowed = 2e-6 * float(1 + largest)  # where they are large, so are the roundings of their differences
        torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed, equal_nan=True, msg=where)
        return
    if operation.kind == "noise":
        ours, theirs = after.view("noise"), expected.view("noise")
        assert ((ours == theirs) | (ours == theirs.nextafter(ours))).all(), where
        return
    for name in ("arena", "keys", "values"):
        ours, theirs = (getattr(state, name)[writes[name]].float() for state in (after, expected))
        if len(ours):
            # The kernel's activations are two bf16, 16 bits; the caches, bf16 alone, may round the other way.
            allowed = 2e-5 * theirs.abs().max() + (0 if name == "arena" else 2**-7 * theirs.abs())
            error = (ours - theirs).abs()
            assert (error <= allowed).all(), f"{where}: {name}: {error.max():.3g} off {theirs.abs().max():.3g}"


def check_frames(
    case: Case, frames: Iterable[int], schedule: int = 0, wanted: Callable[[Operation], bool] = lambda _: True
) -> None:
    """The frames' operations; those that are not wanted run in the executor alone."""
    for frame in frames:
        for operation in case.program.operations:
            if wanted(operation):
                check_operation(case, operation, frame, schedule)
            else:
                case.executor.run(operation, case.state, frame, 0)
        case.state.noise_frames += 1


@pytest.mark.parametrize(
    ("weights", "sms", "schedule"), [("bf16", 1, 0), ("bf16", 13, 11), ("int8", 5, 2**32 - 1), ("fp8", 4, 1)]
)
def test_every_operation(weights: str, sms: int, schedule: int) -> None:
    """Two frames of a model with everything in it, in every format, on fewer SMs than experts and on more, the threads
    in turn and in random orders."""
    check_frames(build(CONFIG, weights, sms=sms), range(2), schedule)


@pytest.mark.parametrize("schedule", [0, 5])
def test_official_model(schedule: int, golden_model: siren.Siren) -> None:
    """The fourth frame."""
    case = build(golden_model.config, "int8", 2, 7, experts=golden_model.experts)
    check_frames(case, range(3), wanted=lambda _: False)
    check_frames(case, [3], schedule)


def check_each_sort(case: Case, frame: int, seed: int) -> None:
    """One operation of each kind, matrix, number of rows and source, in one frame."""
    sorts: dict[tuple[object, ...], list[int]] = {}
    for operation in case.program.operations:
        fields = operation.fields
        sort = (operation.kind, operation.matrix and operation.matrix.name, fields["rows"], fields["source"])
        sorts.setdefault(sort, []).append(operation.number)
    generator = np.random.default_rng(seed)
    chosen = {int(generator.choice(numbers)) for numbers in sorts.values()}
    check_frames(case, [frame], seed, lambda operation: operation.number in chosen)


@pytest.mark.parametrize("shared_bytes", [49152, 232448])
def test_largest_batch(shared_bytes: int) -> None:
    """64 rows in a pass over weights, with guidance; with little shared memory they are staged in parts."""
    settings = dataclasses.replace(SAMPLED, guidance_scale=1.5)
    check_each_sort(build(CONFIG, "bf16", 16, 3, settings, shared_bytes), 0, 1)


@hypothesis.settings(max_examples=10)
@hypothesis.given(
    config=configs(),
    weights=st.sampled_from(["bf16", "int8", "fp8"]),
    sequences=st.sampled_from([1, 2, 5, 9, 16]),
    guided=st.booleans(),
    sms=st.integers(1, 9),
    shared_bytes=st.sampled_from([49152, 232448]),
    residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_programs(
    config: siren.SirenConfig,
    weights: str,
    sequences: int,
    guided: bool,
    sms: int,
    shared_bytes: int,
    residual: bool,
    seed: int,
) -> None:
    """Of any shape, the threads in an order that the seed draws."""
    lean = dataclasses.replace(config, max_seq_len=4, **LEAN)
    settings = SamplingSettings(guidance_scale=1.5 if guided and not residual else 1.0)
    case = build(lean, weights, sequences, sms, settings, shared_bytes, residual, seed)
    for frame in range(1 if residual else 2):
        check_each_sort(case, frame, seed)


@pytest.mark.parametrize("head_dim", [8, 24, 64, 256])
def test_attention_to_many(head_dim: int) -> None:
    """700 frames and prompts of up to 100 tokens, with heads of any width."""
    heads = 4 if head_dim < 64 else 1
    config = dataclasses.replace(
        CONFIG, dim=heads * head_dim, n_heads=heads, n_kv_heads=1, spatial_layers=1, factorized_layers=1, num_experts=1
    )
    frame = 699
    case = build(config, capacity=frame + 1, prompt_lengths=(100, 1, 33))
    generator = torch.Generator().manual_seed(head_dim)
    for cache in (case.state.keys, case.state.values):
        cache.copy_(torch.randn(cache.shape, generator=generator))
    check_frames(case, range(1), wanted=lambda _: False)
    check_frames(case, [frame], wanted=lambda operation: operation.kind == "attention")


# ---- draws ----------------------------------------------------------------------------------------------------------


def check_draws(case: Case, logits: torch.Tensor) -> State:
    """The draws of codebook 0 from these logits [sequences, codes]."""
    check_operation(case, case.program.operations[0], 0)  # the noise
    case.state.view("logits")[0] = logits
    (draw,) = (o for o in case.program.operations if o.kind == "draw" and o.fields["codebook"] == 0)
    check_operation(case, draw, 0)
    return case.state


def small(codes: int) -> siren.SirenConfig:
    return dataclasses.replace(CONFIG, codebook_size=codes, spatial_layers=1, factorized_layers=1, num_codebooks=2)


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    codes=st.sampled_from([8, 40, 1024]),
    values=st.sampled_from([2, 5, 1000]),
    temperature=st.sampled_from([1e-3, 0.7, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 8]),
    top_p=st.sampled_from([0.05, 0.6, 0.999, 1.0]),
    seed=st.integers(0, 99),
)
def test_draws(codes: int, values: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Rows of few different values, where top-k and top-p cut through ties, some of them minus infinity."""
    case = build(small(codes), sequences=4, sms=3, settings=SamplingSettings(temperature, top_k, top_p), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(values, (4, codes), generator=generator) / values * 5 - 2
    logits[1, torch.rand(codes, generator=generator) < 0.4] = -math.inf
    logits[1, 3] = 0
    check_draws(case, logits)


def test_draw_of_the_largest_codebook() -> None:
    case = build(small(8192), sequences=2, sms=1, settings=SamplingSettings(top_k=4000, top_p=0.9))
    check_draws(case, 3 * torch.randn(2, 8192, generator=torch.Generator().manual_seed(0)))


def test_greedy_draws() -> None:
    """The lowest index wins a tie; no noise is made or read."""
    case = build(small(40), sequences=2, settings=SamplingSettings(temperature=0.0))
    logits = torch.zeros(2, 40)
    logits[1, [7, 23]] = 1
    (noise,) = (o for o in case.program.operations if o.kind == "noise")
    before = copy_of(case.state)
    case.run_kernel(case.state, noise, 0, 0)
    assert torch.equal(bits(case.state.arena), bits(before.arena))
    case.state.view("logits")[0] = logits
    (draw,) = (o for o in case.program.operations if o.kind == "draw" and o.fields["codebook"] == 0)
    check_operation(case, draw, 0)
    assert case.state.codes_out[0, 0].tolist() == [0, 7]


def test_forced_draws() -> None:
    """Given codes are taken, with their log-probabilities; no noise is made or read."""
    case = build(small(40), sequences=3)
    case.state.forced = torch.tensor([[[4, 39, 0], [1, 2, 3]]], dtype=torch.int32)
    case.state.view("logits").copy_(torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)))
    for operation in case.program.operations:
        if operation.kind == "draw":
            check_operation(case, operation, 0)
    assert torch.equal(case.state.codes_out, case.state.forced)


@pytest.mark.parametrize("forced", [False, True])
def test_undrawable_rows(forced: bool) -> None:
    """NaN, plus infinity or nothing finite: code 0 and NaN for a log-probability; sound rows beside them are drawn."""
    case = build(small(40), sequences=5)
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    logits[0, 39], logits[1, 5], logits[2] = math.nan, math.inf, -math.inf
    logits[3, 1:] = -math.inf
    case.state.view("logits")[0] = logits
    case.state.view("noise").zero_()
    if forced:
        case.state.forced = torch.full((1, 2, 5), 0, dtype=torch.int32)
    (draw,) = (o for o in case.program.operations if o.kind == "draw" and o.fields["codebook"] == 0)
    check_operation(case, draw, 0)
    assert case.state.logprobs_out[0, 0].isnan().tolist() == [True, True, True, False, False]
    assert case.state.codes_out[0, 0, :4].tolist() == [0, 0, 0, 0]
