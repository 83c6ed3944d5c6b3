"""The frame as a list of operations: who does what, after what, where, and the table of it that the kernel reads."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from random_programs import SMALL, requests

from siren import program_format
from siren.config import SirenConfig
from siren.errors import BackendError
from siren.program import Matrix, Operation, Program, build_program
from siren.program_format import FIELD, FIELDS, INSTRUCTION_NUMBERS

HEADER = Path(__file__).parent.parent / "csrc" / "cuda" / "program.h"


def test_header_and_python_number_things_alike() -> None:
    """The enums, the constants and the order of an instruction's fields, as csrc/cuda/program.h has them."""
    text = re.sub(r"//.*", "", HEADER.read_text(encoding="utf-8"))
    enums = {
        name: {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", body)}
        for name, body in re.findall(r"enum class (\w+) : int32_t \{([^}]*)\}", text)
    }
    ours = {
        name: {member.name: member.value for member in value}
        for name, value in vars(program_format).items()
        if isinstance(value, type) and issubclass(value, IntEnum) and value is not IntEnum
    }
    assert enums == ours and len(ours) == 8
    body = re.search(r"struct Instruction \{([^}]*)\}", text)
    assert body is not None
    assert re.findall(r"int32_t (\w+)(?:\[\d+\])?;", body[1]) == [*FIELDS, "reserved"]
    reserved = re.search(r"reserved\[(\d+)\]", body[1])
    assert reserved is not None and len(FIELDS) + int(reserved[1]) == INSTRUCTION_NUMBERS
    for name in ("kWarps", "kTileRows", "kStepColumns", "kBlockTiles", "kMaxRows", "kPad"):
        python = re.sub(r"([A-Z])", r"_\1", name[1:]).upper().lstrip("_")
        found = re.search(rf"constexpr int {name} = (\d+);", text)
        assert found is not None and int(found[1]) == getattr(program_format, python)


def items(program: Program, operation: Operation) -> int:
    """How many items an operation shares out."""
    config, fields = program.config, operation.fields
    kinds = {
        "noise": config.num_codebooks * program.sequences * config.codebook_size // 4,
        "enter": fields["rows"] * config.dim,
        "accumulate": config.num_experts * program.sequences * config.dim,
        "sums": config.num_experts * program.sequences * config.dim,
        "attention": program.rows * config.n_heads,
        "norm": program.rows,
        "draw": program.sequences,
    }
    return operation.matrix.outputs // 8 if operation.matrix else kinds[operation.kind]


def assert_partition(intervals: list[tuple[int, int]], end: int) -> None:
    """Half-open intervals cover 0 .. end - 1, each element once."""
    reached = 0
    for first, stop in sorted((first, stop) for first, stop in intervals if first < stop):
        assert first == reached
        reached = stop
    assert reached == end


def assert_sound(program: Program, shared_bytes: int) -> None:
    """What must hold of every program."""
    config, table, starts = program.config, program.instructions, program.starts
    count = len(program.operations)
    places: dict[Matrix, set[Any]] = defaultdict(set)
    for number, operation in enumerate(program.operations):
        assert operation.number == number and len(operation.shares) == operation.sms
        shares = [(share.first, share.first + share.count) for share in operation.shares]
        assert_partition(shares, items(program, operation))
        sizes = [stop - first for first, stop in shares]
        if operation.kind == "accumulate":  # those that draw meanwhile are left out, unless all do
            drawing = [share.count > 0 for share in program.operations[number - 1].shares]
            assert all(drawing) or not any(size for size, busy in zip(sizes, drawing, strict=True) if busy)
            sizes = [size for size, busy in zip(sizes, drawing, strict=True) if all(drawing) or not busy]
        assert max(sizes) - min(sizes) <= 1
        if operation.matrix:
            places[operation.matrix].add((operation.first_sm, operation.shares))
            rows, chunk, columns = (operation.fields[name] for name in ("rows", "chunk", "columns"))
            assert rows <= 64 and columns == operation.matrix.columns
            assert 4 * rows * (chunk + 32) <= max(shared_bytes // 3, 4 * rows * (64 + 32))
            assert chunk == columns or chunk % 64 == 0
            assert chunk == columns or chunk % 256 == 0 or 4 * rows * (256 + 32) > shared_bytes // 3
            assert 4 * rows * (chunk + 32) <= program.staged_bytes
    assert program.staged_bytes >= max(16384, 4 * config.codebook_size, 4 * (10 * config.head_dim + 64))

    # A matrix has one place, and the places fill the tape: SM after SM, in the order of first use.
    assert list(places) == program.matrices
    fragments, end = [], np.zeros(program.sms, dtype=np.int64)
    for matrix in program.matrices:
        assert places[matrix] == {program.matrix_shares(matrix)}
        first, shares = program.matrix_shares(matrix)
        for sm, share in enumerate(shares, first):
            start = program.fragment(matrix, sm)
            assert start >= end[sm]
            end[sm] = start + share.count * matrix.columns // 32
            fragments.append((start, int(end[sm])))
    assert_partition(fragments, program.tape_fragments)
    assert sum(m.outputs * m.columns for m in program.matrices) == 256 * program.tape_fragments

    # The table says what the operations say.
    assert table.dtype == starts.dtype == np.int32 and starts[0] == 0 and starts[-1] == len(table)
    for sm in range(program.sms):
        own = [operation for operation in program.operations if 0 <= sm - operation.first_sm < operation.sms]
        rows = table[starts[sm] : starts[sm + 1]]
        assert rows[:, FIELD["operation"]].tolist() == [operation.number for operation in own]
        for row, operation, after in zip(rows.tolist(), own, [*own[1:], None], strict=True):
            said = dict(zip(FIELDS, row, strict=False))
            share = operation.shares[sm - operation.first_sm]
            expected = {
                **operation.fields,
                "kind": program_format.Kind[operation.kind],
                "operation": operation.number,
                "publish": count if after is None else after.number if after.wait else -1,
                "first": share.first,
                "count": share.count,
                "fragment": program.fragment(operation.matrix, sm) if operation.matrix else 0,
                **dict(zip(("wait_first", "wait_count", "wait_value"), operation.wait or (0, 0, 0), strict=True)),
            }
            assert said == expected and row[len(FIELDS) :] == [0] * 8

    for places_of, total in (
        ([(start, start + length) for start, length in program.vectors.values()], program.vector_floats),
        ([(start, start + math.prod(shape)) for start, shape in program.regions.values()], program.arena_floats),
    ):
        ordered = sorted(places_of)
        assert all(start % 32 == 0 for start, _ in ordered) and ordered[-1][1] <= total
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ordered))


@settings(max_examples=12)
@given(request=requests())
def test_any_program(request: dict[str, Any]) -> None:
    program = build_program(**request)
    assert_sound(program, request["shared_bytes"])
    assert program.operations[0].wait == (0, program.sms, 0)


@settings(max_examples=12)
@given(request=requests())
def test_matrices_and_vectors_depend_on_the_model_only(request: dict[str, Any]) -> None:
    program = build_program(**request)
    other = build_program(request["config"], 1, False, 7, residual=request["residual"])
    assert program.matrices == other.matrices
    assert (program.vectors, program.vector_floats) == (other.vectors, other.vector_floats)


@settings(max_examples=12)
@given(request=requests())
def test_owners_write_what_an_operation_makes(request: dict[str, Any]) -> None:
    """All SMs together write all of it, each element once."""
    program = build_program(**request)
    config, R, B, d = program.config, program.rows, program.sequences, program.config.dim
    kv = config.n_kv_heads * config.head_dim
    offsets = {name: offset for name, (offset, _) in program.regions.items()}
    for operation in program.operations:
        fields = operation.fields
        written: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for sm in range(program.sms):
            for access in operation.accesses(sm):
                if access.write:
                    written[access.buffer].append((access.start, access.stop))
        sizes = {
            "noise": ("noise", config.num_codebooks * B * config.codebook_size),
            "enter": ("dx" if fields["source"] else "x", fields["rows"] * d),
            "accumulate": ("total", config.num_experts * B * d),
            "sums": ("sums", config.num_experts * B * d),
            "attention": ("a", R * d),
            "norm": ("h", R * d),
            "draw": ("codes", B),
        }
        rows, extra = fields["rows"], {}
        if operation.matrix is None:
            buffer, size = sizes[operation.kind]
        elif operation.matrix.name == "heads":
            buffer, size = "logits", B * config.codebook_size
        elif operation.matrix.swiglu:
            buffer, size = ("dact" if "decoder" in operation.name else "act"), rows * config.ffn_hidden
        elif operation.matrix.name == "decoder_qkv":
            buffer, size = "dq", rows * d
            first = (fields["block"] * (config.codes_per_expert + 1) + fields["position"]) * R
            extra = {"dkv": (first * 2 * kv, rows * 2 * kv)}
        elif operation.matrix.name == "qkv":
            buffer, size = "q", rows * d
            place = (fields["expert"] * config.spatial_layers + fields["block"]) * R * kv, R * kv
            extra = {"keys": place, "values": place}
        elif operation.matrix.name == "cross_query":
            buffer, size = "q", rows * d
        else:
            buffer, size = ("dx" if "decoder" in operation.name else "x"), rows * d
        extra[buffer] = fields["output"] - offsets[buffer], size
        assert written.keys() == extra.keys()
        for name, (start, length) in extra.items():
            assert_partition([(low - start, high - start) for low, high in written[name]], length)


@pytest.mark.parametrize("residual", [False, True], ids=["whole", "residual"])
@pytest.mark.parametrize("preset", ["siren-1.6b", "siren-3.1b"])
def test_presets(preset: str, residual: bool) -> None:
    program = build_program(SirenConfig.preset(preset), 16, True, 132, residual=residual)
    assert_sound(program, 232448)
    lengths = np.zeros(132)
    for matrix in program.matrices:
        first, shares = program.matrix_shares(matrix)
        lengths[first : first + len(shares)] += [share.count * matrix.columns for share in shares]
    assert lengths.max() <= 1.02 * lengths.mean()


@pytest.mark.parametrize("batch", [1, 3])
def test_order_and_waits_of_a_small_frame(batch: int) -> None:
    """Spelled out: 2 experts of 2 codes, 1 backbone block, 1 decoder block, 4 SMs, guided.

    Of few rows every SM works out the first inputs for itself, and `enter` follows; of many it comes first.
    """
    config = SirenConfig(**{**SMALL, "spatial_layers": 1, "factorized_layers": 1})
    program = build_program(config, batch, True, 4)
    rows, few = 2 * batch, batch == 1
    listed = [(operation.name, operation.wait, operation.fields["rows"]) for operation in program.operations]
    expected: list[tuple[str, Any, int]] = [("noise", (0, 4, 0), batch)]
    backbone = (
        "cross_query", "prompt attention", "cross_output", "qkv", "frames attention", "self_output", "gate_value",
        "down",
    )  # fmt: skip
    for k in range(2):
        if not few:
            expected.append((f"expert {k} enter", None, rows))
        for name in backbone:
            wait = None if name == "cross_query" and few else (2 * k, 2, len(expected))
            expected.append((f"expert {k} block 0 {name}", wait, rows))
            if name == "cross_query" and few:
                expected.append((f"expert {k} enter", None, rows))
    expected += [(f"expert {k} norm", (2 * k, 2, 10 + 9 * k), rows) for k in range(2)]
    for j in range(4):
        k, title = j // 2, f"expert {j // 2} codebook {j}"
        first = rows if j % 2 else 2 * rows
        if not few:
            expected.append((f"{title} enter", (0, 4, len(expected)), first))
        expected.append((f"{title} block 0 decoder_qkv", (0, 4, len(expected)), first))
        if few:
            expected.append((f"{title} enter", None, first))
        for name in ("decoder_output", "decoder_gate_value", "decoder_down"):
            expected.append((f"{title} block 0 {name}", (0, 4, len(expected)), rows))
        expected.append((f"{title} heads", (0, 4, len(expected)), rows))
        expected.append((f"{title} draw", (0, 4, len(expected)), batch))
        if j:
            expected.append((f"accumulate before codebook {j}", None, batch))
    assert listed == expected

    by_name = {operation.name: operation.fields for operation in program.operations}
    at, offset = program.regions, {name: place for name, (place, _) in program.regions.items()}
    assert at["dkv"][1] == (1, 3, rows, 32) and at["codes"][1] == (4, batch)
    first_pass, second = by_name["expert 1 codebook 2 block 0 decoder_output"], by_name["expert 1 codebook 3 heads"]
    assert first_pass["position"] == 1 and first_pass["input"] == offset["dq"] + rows * 32
    assert first_pass["output"] == offset["dx"] + rows * 32
    assert second["position"] == 2 and second["input"] == offset["dx"]
    assert second["norm"] == program.vectors["decoder_norm", 1, 0][0]
    assert by_name["expert 1 block 0 cross_query"]["bias"] == program.vectors["cross_query_bias", 1, 0][0]
    assert by_name["expert 1 block 0 down"]["shift"] == 0  # the last block's output gets no position


def test_without_residual_decoders_heads_read_the_backbones() -> None:
    config = SirenConfig(**{**SMALL, "factorized_layers": 0, "conditioning": "none"})
    program = build_program(config, 1, False, 3, residual=True)
    listed = [(operation.name, operation.wait) for operation in program.operations]
    assert listed[:3] == [
        ("noise", (0, 3, 0)),
        ("expert 0 codebook 0 heads", (0, 3, 1)),
        ("expert 0 codebook 0 draw", (0, 3, 2)),
    ]
    assert listed[3:6] == [
        ("expert 0 codebook 1 heads", (0, 3, 3)),
        ("expert 0 codebook 1 draw", (0, 3, 4)),
        ("accumulate before codebook 1", None),
    ]
    assert listed[-1] == ("sums before codebook 4", (0, 3, len(listed) - 1))
    heads = program.operations[3].fields
    assert heads["norm"] == -1 and heads["input"] == program.regions["h"][0]
    assert "x" not in program.regions and "sums" in program.regions


def test_fewer_sms_than_experts_share_them() -> None:
    config = SirenConfig(**{**SMALL, "num_codebooks": 6, "num_experts": 6})
    program = build_program(config, 1, False, 4)
    groups = {operation.fields["expert"]: (operation.first_sm, operation.sms) for operation in program.operations[1:50]}
    assert groups == {0: (0, 1), 1: (0, 1), 2: (1, 1), 3: (2, 1), 4: (2, 1), 5: (3, 1)}


@pytest.mark.parametrize(
    ("change", "sequences", "guided", "message"),
    [
        ({"dim": 48, "n_heads": 6, "n_kv_heads": 6}, 1, False, "dim to be a multiple of 32, not 48"),
        ({"ffn_multiple_of": 1}, 1, False, "ffn_hidden to be a multiple of 32, not 85"),
        ({"n_heads": 8, "n_kv_heads": 8}, 1, False, "head_dim .* a multiple of 8 of at most 256, not 4"),
        ({"dim": 512, "n_heads": 1, "n_kv_heads": 1}, 1, False, "head_dim .* of at most 256, not 512"),
        ({"codebook_size": 20}, 1, False, "codebook_size to be a multiple of 8 of at most 8192, not 20"),
        ({"codebook_size": 8200}, 1, False, "codebook_size .* at most 8192, not 8200"),
        ({}, 33, False, "batches of 1 to 32 sequences, or to 16 with guidance.* 33 rows"),
        ({}, 17, True, "34 rows"),
        ({}, 0, False, "0 rows"),
    ],
)
def test_sizes_that_do_not_work(change: dict[str, Any], sequences: int, guided: bool, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        build_program(SirenConfig(**{**SMALL, **change}), sequences, guided, 4)


def test_impossible_machines() -> None:
    with pytest.raises(BackendError, match="at least 1 SM, not 0"):
        build_program(SirenConfig(**SMALL), 1, False, 0)
    huge = {"dim": 16384, "n_heads": 64, "n_kv_heads": 64, "num_codebooks": 64, "factorized_layers": 256}
    config = SirenConfig(**{**SMALL, **huge, "num_experts": 1, "spatial_layers": 1})
    with pytest.raises(BackendError, match="use fewer sequences"):
        build_program(config, 32, False, 4)
