"""The checker finds nothing in the programs there are, and every mistake that is put into one."""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import SMALL, requests

from siren.config import SirenConfig
from siren.program import Operation, Program, Share, build_program, instruction_table
from siren.program_accesses import reaches
from siren.program_check import ProgramError, check_program
from siren.program_format import FIELD


def small_program(sms: int = 5, residual: bool = False, **change: Any) -> Program:
    """Every SM of a group has a share of every matrix."""
    sizes = {"dim": 64, "n_heads": 4, "n_kv_heads": 4, "spatial_layers": 2, "factorized_layers": 1, **change}
    return build_program(SirenConfig(**{**SMALL, "codebook_size": 40, **sizes}), 2, False, sms, residual=residual)


def mutate(program: Program, number: int, **change: Any) -> Program:
    """The program with another operation in one place, and the instructions that belong to it."""
    operations = list(program.operations)
    operations[number] = dataclasses.replace(operations[number], **change)
    if "fields" in change:
        matrix, kind = operations[number].matrix, operations[number].kind
        reached = reaches(program.layout, kind, change["fields"], matrix)
        operations[number] = dataclasses.replace(operations[number], reaches=reached)
    table, starts = instruction_table(operations, program.sms, program.fragments)
    return dataclasses.replace(program, operations=operations, instructions=table, starts=starts)


def verdict(program: Program) -> str:
    try:
        check_program(program)
    except ProgramError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("residual", [False, True], ids=["whole", "residual"])
@pytest.mark.parametrize("preset", ["siren-1.6b", "siren-3.1b"])
def test_presets(preset: str, residual: bool) -> None:
    check_program(build_program(SirenConfig.preset(preset), 1, False, 132, residual=residual))


@settings(max_examples=20)
@given(request=requests())
def test_any_program(request: dict[str, Any]) -> None:
    check_program(build_program(**request))


def waiting(program: Program) -> list[Operation]:
    return [operation for operation in program.operations if operation.wait]


WHOLE, RESIDUAL = small_program(), small_program(residual=True)
# In the residual decoders' program `sums` and the first two waits stand between the same draws and what follows.
NEEDED = [(WHOLE, operation) for operation in waiting(WHOLE)]
NEEDED += [(RESIDUAL, operation) for operation in waiting(RESIDUAL)[2:]]


def test_every_wait_is_needed() -> None:
    for program, operation in NEEDED:
        message = verdict(mutate(program, operation.number, wait=None))
        assert "not knowing that" in message, (operation.name, message)


def test_no_wait_may_ask_for_less() -> None:
    """Lowered by one, or, where nobody publishes that, to what all the SMs publish before."""
    for program, operation in NEEDED:
        assert operation.wait is not None
        first, count, value = operation.wait
        lower = value
        for sm in range(first, first + count):
            said = program.instructions[program.starts[sm] : program.starts[sm + 1], FIELD["publish"]]
            said = np.concatenate((said[said >= 0] - len(program.operations), said[said >= 0]))
            lower = min(lower, int(said[said < value].max()))
        message = verdict(mutate(program, operation.number, wait=(first, count, lower)))
        assert "not knowing that" in message, (operation.name, message)
        if lower != value - 1:
            assert not verdict(mutate(program, operation.number, wait=(first, count, lower + 1)))


def test_every_wait_is_for_all_that_worked_before() -> None:
    """Leaving out the first or the last SM that has a share of the operation before is a race."""
    for program, operation in NEEDED:
        assert operation.wait is not None
        first, count, value = operation.wait
        before = program.operations[value - 1]
        active = [before.first_sm + i for i, share in enumerate(before.shares) if share.count]
        low, high = active[0] + 1, active[-1]
        fewer = [(low, first + count - low, value), (first, high - first, value)]
        messages = [verdict(mutate(program, operation.number, wait=wait)) for wait in fewer]
        assert any("not knowing that" in message for message in messages), (operation.name, messages)


def test_waits_that_never_end() -> None:
    for operation in waiting(WHOLE)[1:]:
        assert operation.wait is not None
        first, count, _ = operation.wait
        later = mutate(WHOLE, operation.number, wait=(first, count, operation.number + 1))
        assert "may never come" in verdict(later)
    beyond = mutate(WHOLE, 3, wait=(0, WHOLE.sms + 1, 1))
    assert "may never come" in verdict(beyond)


@settings(max_examples=40)
@given(data=st.data())
def test_publications(data: st.DataObject) -> None:
    """One left out, and one too early, in any instruction."""
    program = data.draw(st.sampled_from([WHOLE, RESIDUAL]))
    column = program.instructions[:, FIELD["publish"]]
    row = data.draw(st.sampled_from(np.flatnonzero(column >= 0).tolist()))
    wrong = data.draw(st.sampled_from([-1, int(column[row]) + 1]))
    instructions = program.instructions.copy()
    instructions[row, FIELD["publish"]] = wrong
    message = verdict(dataclasses.replace(program, instructions=instructions))
    assert any(part in message for part in ("not knowing that", "may never come", "it must be")), message


def test_a_publication_too_early_is_a_race() -> None:
    """Found by what the SMs then do, not only by comparing with the right number."""
    instructions = WHOLE.instructions.copy()
    row = int(WHOLE.starts[1]) + 3
    assert instructions[row, FIELD["publish"]] > 0
    instructions[row, FIELD["publish"]] += 1
    assert "not knowing that" in verdict(dataclasses.replace(WHOLE, instructions=instructions))


def test_overlapping_regions() -> None:
    for name in WHOLE.regions:
        regions = dict(WHOLE.regions)
        offset, shape = regions[name]
        regions[name] = (offset - 32, shape)
        layout = dataclasses.replace(WHOLE.layout, regions=regions)
        if name == "x":
            assert "before the end" in verdict(dataclasses.replace(WHOLE, layout=layout))
        else:
            assert f"region {name} starts at" in verdict(dataclasses.replace(WHOLE, layout=layout))
    layout = dataclasses.replace(WHOLE.layout, arena_floats=WHOLE.arena_floats - 64)
    assert "in an arena of" in verdict(dataclasses.replace(WHOLE, layout=layout))


def by_name(program: Program, name: str) -> Operation:
    return next(operation for operation in program.operations if operation.name == name)


@pytest.mark.parametrize(
    ("name", "field", "region"),
    [
        ("expert 0 block 0 prompt attention", "output", "q"),
        ("expert 1 block 0 gate_value", "output", "dact"),
        ("expert 1 norm", "output", "dx"),
        ("expert 0 codebook 1 heads", "output", "noise"),
        ("expert 0 codebook 1 draw", "output", "logits"),
        ("expert 1 codebook 3 block 0 decoder_gate_value", "input", "dact"),
    ],
)
def test_wrong_regions(name: str, field: str, region: str) -> None:
    """An operation that reads or writes what belongs to another."""
    operation = by_name(WHOLE, name)
    fields = {**operation.fields, field: WHOLE.layout.at(region)}
    assert verdict(mutate(WHOLE, operation.number, fields=fields))


@pytest.mark.parametrize("name", ["noise", "expert 1 enter", "expert 0 block 1 qkv", "expert 1 norm"])
def test_wrong_shares(name: str) -> None:
    operation = by_name(WHOLE, name)
    owner = next(i for i, share in enumerate(operation.shares) if share.first > 0 and share.count)
    share = operation.shares[owner]

    def with_share(first: int, count: int) -> str:
        shares = list(operation.shares)
        shares[owner] = Share(first, count)
        return verdict(mutate(WHOLE, operation.number, shares=tuple(shares)))

    assert "share" in with_share(share.first - 1, share.count + 1)
    # Left out: elements that are read and were never written.
    assert "nobody has written" in with_share(share.first, share.count - 1)


def test_instructions_that_are_not_their_operations() -> None:
    instructions = WHOLE.instructions.copy()
    instructions[17, FIELD["count"]] += 1
    assert "instruction 17 is not what its operation says" in verdict(
        dataclasses.replace(WHOLE, instructions=instructions)
    )
    assert "is not what" in verdict(dataclasses.replace(WHOLE, instructions=WHOLE.instructions[:-1]))


def races(program: Program, frames: int) -> bool:
    """The same question, answered by brute force: whether two conflicting accesses are not ordered by any path.

    Every instruction of every frame is a node, and a node's past is a set of nodes, as the bits of a number.
    """
    count, owned, published = len(program.operations), defaultdict(list), defaultdict(list)
    touched: dict[tuple[str, int], list[tuple[int, int, bool]]] = defaultdict(list)
    past: list[int] = []
    table, starts = program.instructions, program.starts
    publish = {
        (int(row[FIELD["operation"]]), sm): int(row[FIELD["publish"]])
        for sm in range(program.sms)
        for row in table[starts[sm] : starts[sm + 1]]
    }
    for frame in range(frames):
        for operation in program.operations:
            for sm in range(operation.first_sm, operation.first_sm + operation.sms):
                before = list(owned[sm][-1:])
                if operation.wait:
                    first, awaited, value = operation.wait
                    target = frame * count + value
                    for other in range(first, first + awaited):
                        at = bisect.bisect_left(published[other], (target, -1))
                        before += [published[other][at][1]] if target > 0 else []
                node, mine = len(past), 0
                for earlier in before:
                    mine |= past[earlier] | 1 << earlier
                past.append(mine)
                owned[sm].append(node)
                for access in operation.accesses(sm):
                    for element in range(access.start, access.stop):
                        touched[access.buffer, element].append((node, sm, access.write))
            for sm in range(operation.first_sm, operation.first_sm + operation.sms):
                if publish[operation.number, sm] >= 0:
                    published[sm].append((frame * count + publish[operation.number, sm], owned[sm][-1]))
    for accesses in {tuple(list_) for list_ in touched.values()}:
        for i, (node, sm, write) in enumerate(accesses):
            for earlier, other, wrote in accesses[:i]:
                if other != sm and (write or wrote) and not past[node] >> earlier & 1:
                    return True
    return False


TINY = {"dim": 32, "n_heads": 2, "n_kv_heads": 2, "spatial_layers": 1, "factorized_layers": 1, "num_codebooks": 2}


@settings(max_examples=40)
@given(data=st.data())
def test_agrees_with_brute_force(data: st.DataObject) -> None:
    """On programs with some waits changed in any way that can still be met."""
    sms, residual = data.draw(st.sampled_from([2, 3, 4])), data.draw(st.booleans())
    program = small_program(sms, residual, **TINY)
    for _ in range(data.draw(st.integers(1, 2))):
        operation = data.draw(st.sampled_from(program.operations[1:]))
        wait = None
        if data.draw(st.booleans()):
            first = data.draw(st.integers(0, sms - 1))
            wait = (first, data.draw(st.integers(1, sms - first)), data.draw(st.integers(0, operation.number)))
        program = mutate(program, operation.number, wait=wait)
    message = verdict(program)
    if "may never come" in message or "still changes" in message:
        return  # brute force knows no such things
    assert bool(message) == races(program, 2), message
