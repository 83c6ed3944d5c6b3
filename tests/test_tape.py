"""The tape: what quantising loses, and that the kernel finds every weight where its instructions say."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siren import SirenConfig
from siren.errors import InputError
from siren.program import Matrix, Program, build_program
from siren.reference import round_to_int8
from siren.tape import DTYPES, kernel_order, pack_matrix, quantise, tape_bytes, unpack

WEIGHTS = sorted(DTYPES)
AWKWARD_SMS = [1, 5, 7, 13, 132]  # fewer than the experts, no multiple of them, more than the tiles of any matrix


def model(**values: object) -> SirenConfig:
    sizes = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "spatial_layers": 2, "factorized_layers": 2, "prompt_dim": 8,
             "codebook_size": 72, "ffn_multiple_of": 32}  # fmt: skip
    return SirenConfig(**(sizes | values))


@functools.cache
def program_of(config: SirenConfig, sms: int, residual: bool = False, sequences: int = 2) -> Program:
    return build_program(config, sequences, guided=False, sms=sms, residual=residual)


def poisoned_tape(program: Program, weights: str) -> torch.Tensor:
    return torch.full((tape_bytes(program, weights),), 0xFF, dtype=torch.uint8)


def packed(program: Program, weights: str, seed: int = 0) -> tuple[torch.Tensor, dict[Matrix, torch.Tensor]]:
    """A tape of random matrices, and what was put on it."""
    generator = torch.Generator().manual_seed(seed)
    tape, written = poisoned_tape(program, weights), {}
    for matrix in program.matrices:
        values = torch.randn(matrix.outputs, matrix.columns, generator=generator)
        written[matrix] = quantise(values, weights)[0]
        pack_matrix(tape, program, matrix, written[matrix])
    return tape, written


def read_as_the_kernel(tape: torch.Tensor, program: Program, weights: str) -> dict[Matrix, torch.Tensor]:
    """Every matrix, read fragment by fragment along the instructions. Nothing is shared with tape.py."""
    size = 8 * 32 * DTYPES[weights].itemsize
    found = {matrix: torch.full((matrix.outputs, matrix.columns), math.nan) for matrix in program.matrices}
    by_number = {operation.number: operation for operation in program.operations}
    for row in program.instructions.tolist():
        matrix = by_number[row[1]].matrix
        if matrix is None:
            continue
        first, count, columns, at = row[11], row[12], row[13], row[22]
        assert columns == matrix.columns
        for block in range(first, first + count, 4):
            tiles = range(block, min(block + 4, first + count))
            for step in range(columns // 32):
                for tile in tiles:
                    fragment = tape[at * size : (at + 1) * size].view(DTYPES[weights]).view(8, 32)
                    at += 1
                    if weights != "bf16":
                        order = [4 * group + column for group in range(8) for column in (0, 2, 1, 3)]
                        stored = fragment.view(torch.uint8)
                        fragment = torch.empty_like(stored)
                        fragment[:, order] = stored
                        fragment = fragment.view(DTYPES[weights])
                    for i in range(8):
                        output = 8 * tile + i
                        if matrix.swiglu:
                            output = output // 2 + (matrix.outputs // 2 if output % 2 else 0)
                        found[matrix][output, 32 * step : 32 * step + 32] = fragment[i].float()
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("sms", "residual"), [(1, False), (7, False), (13, True)])
def test_the_kernel_finds_every_weight(weights, sms, residual):
    """Reading along the instructions gives back each matrix, its own rows in their own order."""
    program = program_of(model(num_experts=3, num_codebooks=3, spatial_layers=1, factorized_layers=1), sms, residual)
    tape, written = packed(program, weights)
    for matrix, values in read_as_the_kernel(tape, program, weights).items():
        assert torch.equal(values, written[matrix].float()), matrix


@pytest.mark.parametrize("sms", AWKWARD_SMS)
@pytest.mark.parametrize("residual", [False, True])
def test_each_fragment_is_used_once(sms, residual):
    """All of a tape is written, none of it twice, and what an SM reads lies in one piece, in order of first use."""
    program = program_of(model(), sms, residual)
    tape, written = packed(program, "int8")
    for matrix, values in unpack(tape, program, "int8").items():
        assert torch.equal(values, written[matrix].float()), matrix
    spans = []
    for sm in range(sms):
        expected = None
        for matrix in program.matrices:
            first_sm, shares = program.matrix_shares(matrix)
            if not first_sm <= sm < first_sm + len(shares) or not shares[sm - first_sm].count:
                continue
            start, length = program.fragment(matrix, sm), shares[sm - first_sm].count * (matrix.columns // 32)
            assert expected in (None, start), (sm, matrix)
            expected = start + length
            spans.append((start, expected))
    assert sum(end - start for start, end in spans) == program.tape_fragments == max(end for _, end in spans)


@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    dim=st.sampled_from([32, 64, 96]),
    hidden=st.sampled_from([32, 96]),
    experts=st.sampled_from([1, 2, 3, 6, 12]),
    blocks=st.integers(0, 2),
    codes=st.sampled_from([8, 40, 72]),
    sms=st.integers(1, 40),
    weights=st.sampled_from(WEIGHTS),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25)
def test_what_is_packed_comes_back(kv_heads, dim, hidden, experts, blocks, codes, sms, weights, seed):
    """Any sizes the kernel takes, any number of SMs: unpacking gives the values, and no byte keeps its poison."""
    config = model(dim=dim, n_kv_heads=kv_heads, ffn_multiple_of=hidden, num_experts=experts, spatial_layers=1,
                   factorized_layers=blocks, codebook_size=codes,
                   conditioning="accumulated" if blocks else "none")  # fmt: skip
    program = program_of(config, sms)
    tape, written = packed(program, weights, seed)
    unpacked = unpack(tape, program, weights)
    assert list(unpacked) == program.matrices
    for matrix, values in unpacked.items():
        assert torch.equal(values, written[matrix].float()), matrix


def test_the_tape_does_not_depend_on_the_batch():
    config = model()
    alone, batch = (program_of(config, 13, sequences=sequences) for sequences in (1, 16))
    assert alone.matrices == batch.matrices
    assert torch.equal(packed(alone, "bf16")[0], packed(batch, "bf16")[0])


class Moved:
    """A program in which one matrix lies somewhere else on the tape, or has other shares."""

    def __init__(self, program: Program, matrix: Matrix, by: int = 0, drop: int = 0) -> None:
        self.program, self.matrix, self.by, self.drop = program, matrix, by, drop

    def __getattr__(self, name: str) -> object:
        return getattr(self.program, name)

    def fragment(self, matrix: Matrix, sm: int) -> int:
        return self.program.fragment(matrix, sm) + (self.by if matrix == self.matrix else 0)

    def matrix_shares(self, matrix: Matrix):
        first_sm, shares = self.program.matrix_shares(matrix)
        return first_sm, shares[self.drop :] if matrix == self.matrix else shares


def test_a_wrong_layout_is_noticed():
    """Overlaps, holes and tiles that nobody owns; tapes and values that do not fit."""
    program = program_of(model(), 5)
    tape, written = packed(program, "int8")
    matrix = program.matrices[1]
    with pytest.raises(ValueError, match=r"belongs to [02] tiles"):
        unpack(tape, Moved(program, matrix, by=1), "int8")
    everywhere = next(m for m in program.matrices if m.name == "heads")
    with pytest.raises(ValueError, match=r"heads.*do not cover each of its 9 tiles once"):
        unpack(tape, Moved(program, everywhere, drop=1), "int8")
    with pytest.raises(ValueError, match="expected a tape"):
        unpack(tape, program, "bf16")
    with pytest.raises(ValueError, match="expected a tape"):
        pack_matrix(tape[:-1], program, matrix, written[matrix])
    with pytest.raises(ValueError, match=r"expected \[64, 64\] in a storage dtype"):
        pack_matrix(tape, program, matrix, written[matrix][:, 1:])
    with pytest.raises(ValueError, match=r"in a storage dtype, got .* torch\.float32"):
        pack_matrix(tape, program, matrix, written[matrix].float())


# ---- quantising ---------------------------------------------------------------------------------------------------


def awkward_matrix() -> torch.Tensor:
    """Rows of many sizes: ordinary, zero, huge, tiny, subnormal, one large value, exact ties."""
    matrix = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    matrix[1] = 0
    matrix[2] *= 1e38
    matrix[3] *= 1e-38
    matrix[4] = torch.linspace(-1.4e-43, 2.5e-43, 64)  # 178 of the smallest steps: the scale is rounded to one
    matrix[5, 7] = -1e4
    matrix[6] = torch.arange(64) / 2 - 15.5
    matrix[6, 0] = 127.0
    matrix[9] = 1e-45
    matrix[7] = torch.linspace(-1e-45, 8.7e-43, 64)  # the same for fp8
    return matrix.clamp(-3e38, 3e38)


def test_bf16_is_rounded_to_nearest():
    values, scales = quantise(awkward_matrix(), "bf16")
    assert scales is None and torch.equal(values, awkward_matrix().bfloat16())


def test_int8_is_what_the_other_backends_hold():
    matrix = awkward_matrix()
    values, scales = quantise(matrix, "int8")
    ordinary = [0, 1, 2, 3, 5, 6, 8]
    assert torch.equal((values * scales.unsqueeze(1))[ordinary], round_to_int8(matrix)[ordinary])
    assert torch.equal(scales, matrix.abs().amax(1) / 127)
    assert values.abs().amax() == 127, "nothing wraps around"
    assert values[6, :8].tolist() == [127, -15, -14, -14, -14, -13, -12, -12], "ties go to even"


def test_fp8_rounds_to_the_nearest_it_has():
    """No NaN, and no value of e4m3 that is nearer than the one taken."""
    matrix = awkward_matrix()
    values, scales = quantise(matrix, "fp8")
    assert torch.equal(scales, matrix.abs().amax(1) / 448)
    assert values.float().isfinite().all() and values.float().abs().amax() == 448
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().double()
    every = every[every.isfinite()]
    wanted = (matrix / torch.where(scales > 0, scales, 1).unsqueeze(1)).double()
    nearest = (wanted.unsqueeze(-1) - every).abs().amin(-1)
    assert torch.equal((wanted - values.double()).abs(), nearest)


def test_unknown_weights():
    with pytest.raises(InputError, match="bf16, int8, fp8, not 'fp32'"):
        quantise(torch.zeros(8, 32), "fp32")


def test_swiglu_rows_and_scales_are_interleaved():
    matrix = next(m for m in program_of(model(), 5).matrices if m.swiglu)
    order = kernel_order(matrix, torch.arange(matrix.outputs)).tolist()
    half = matrix.outputs // 2
    assert order == [row for i in range(half) for row in (i, half + i)]
    other = next(m for m in program_of(model(), 5).matrices if not m.swiglu)
    assert torch.equal(kernel_order(other, torch.arange(5)), torch.arange(5))
