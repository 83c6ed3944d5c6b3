"""Proves that a program is free of races and deadlock, on any schedule, without running it.

The checker goes through three frames in the order of the list and keeps for every SM what it knows to have happened:
for each other SM the progress that it has certainly reached (a vector clock). An SM knows what it has done itself, and
a wait adds what the SM waited for knew when it published what the wait asks for. Two accesses of an element, one of
them a write, by different SMs are in order only if the later one's SM knows that the earlier one's operation is over.

For each element the last write is kept, and a number for the set of its reads since then: the same for all elements
that the same SMs have read, so that an operation's accesses are compared all at once.

Deadlock: every wait must be met by what earlier operations of the list have published, and every SM goes through the
list in its order. So the first operation that is not finished can always go on.

Why three frames are enough: every frame accesses the same elements, so from the second frame on what is known of an
element has come about in the same way, and the clocks, counted from the frame's start, follow from those at the end of
the frame before. When two frames end with the same clocks, all frames after them do. It is an error here if the second
and the third do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .program import Operation, Program, instruction_table
from .program_accesses import Reach
from .program_format import FIELD

_FRAMES = 3
_NEVER, _HOST = -1, -2  # operations that "wrote" what nobody has written yet, and what the host puts there
_LOOKUP = 1 << 20  # pairs are told apart in a table of up to so many entries

Ints = NDArray[np.int32]


class ProgramError(AssertionError):
    """A program that must not run; a mistake in siren/program.py, not of a user."""


def check_program(program: Program) -> None:
    """Raises ProgramError, naming operations, SMs, buffer and elements, at the first race, read of what was never
    written, wait that may never be met, wrong publication, overlap of regions, or instruction that is not its
    operation's."""
    _check_regions(program)
    _check_table(program)
    _Run(program).frames()
    _check_publications(program)


def _check_regions(program: Program) -> None:
    end, before = 0, "the start of the arena"
    for name, (offset, shape) in sorted(program.regions.items(), key=lambda item: (item[1][0], math.prod(item[1][1]))):
        if offset < end:
            raise ProgramError(f"region {name} starts at {offset}, before the end {end} of {before}")
        end, before = offset + math.prod(shape), name
    if end > program.arena_floats:
        raise ProgramError(f"region {before} ends at {end} in an arena of {program.arena_floats}")


def _check_table(program: Program) -> None:
    """Publications apart, the instructions say what the operations say."""
    table, starts = instruction_table(program.operations, program.sms, program.fragments)
    differs = table != program.instructions if table.shape == program.instructions.shape else np.ones((1, 1), bool)
    differs[:, FIELD["publish"] : FIELD["publish"] + 1] = False
    if differs.any() or (starts != program.starts).any():
        raise ProgramError(f"instruction {int(differs.any(axis=1).argmax())} is not what its operation says")


def _check_publications(program: Program) -> None:
    for sm in range(program.sms):
        own = program.instructions[program.starts[sm] : program.starts[sm + 1]]
        number, publish = own[:, FIELD["operation"]], own[:, FIELD["publish"]]
        following = np.append(number[1:], len(program.operations))
        right = np.where(np.append(own[1:, FIELD["wait_count"]] > 0, True), following, -1)
        wrong = np.flatnonzero(publish != right)
        if wrong.size:
            i = wrong[0]
            title = _title(program.operations[number[i]])
            raise ProgramError(f"SM {sm} publishes {publish[i]} after {title}; it must be {right[i]}")


@dataclass
class _Buffer:
    """Of each element: the operation that wrote it last, counted over the frames, on which SM, and who read it since.

    `readers` are rows of _Run.reads.
    """

    operation: Ints
    sm: Ints
    readers: Ints

    @classmethod
    def new(cls, size: int) -> _Buffer:
        return cls(np.full(size, _NEVER, np.int32), np.zeros(size, np.int32), np.zeros(size, np.int32))


@dataclass
class _Part:
    """One reach of an operation. `columns` of a row that anybody touches; `owner`: whose each is, as a number among
    the operation's owners. No owner: all of them touch all columns."""

    reach: Reach
    columns: slice | NDArray[np.int64]
    owner: Ints | None

    def view(self, values: Ints) -> Ints:
        """[rows, row] of a buffer's values, without a copy; index it with [:, columns]."""
        reach, step = self.reach, values.itemsize
        shape, strides = (reach.rows, reach.width), ((reach.stride or reach.width) * step, step)
        return np.lib.stride_tricks.as_strided(values[reach.start :], shape, strides)

    def interval(self, bad: NDArray[np.bool_]) -> str:
        """Where the first bad elements [rows, columns] lie, up to the first good one."""
        row = int(bad.any(axis=1).argmax())
        places = np.arange(self.reach.width)[self.columns][bad[row]] + self.reach.start + row * self.reach.stride
        gaps = np.flatnonzero(np.diff(places) > 1)
        return f"{self.reach.buffer}[{places[0]}:{places[gaps[0] if gaps.size else -1] + 1}]"


class _Run:
    """`clocks[s, t]`: SM s knows that SM t is past all its operations below this number, counted over the frames."""

    def __init__(self, program: Program) -> None:
        self.program, self.count, S = program, len(program.operations), program.sms
        self.clocks = np.zeros((S, S), np.int32)
        self.published = np.zeros((S, S), np.int32)  # the clocks at the latest publication
        self.latest, self.before = np.zeros(S, np.int32), np.full(S, -1, np.int32)  # the two latest publications
        self.history: list[tuple[Ints, Ints, Ints]] = []  # SMs, what they published, their clocks
        # Sets of reads: for each SM its last operation that reads, plus 1. Row 0: nobody.
        self.reads = np.zeros((1024, S), np.int32)
        self.sets = 1
        self.buffers = _buffers(program)
        self.owner_columns: dict[tuple[int, int, int, int], Ints] = {}
        self.parts = [self._parts(operation) for operation in program.operations]
        number, publish = program.instructions[:, FIELD["operation"]], program.instructions[:, FIELD["publish"]]
        order = np.argsort(number, kind="stable")
        ends = np.cumsum([operation.sms for operation in program.operations])
        self.publish = np.split(publish[order], ends[:-1])

    def _parts(self, operation: Operation) -> list[_Part]:
        """Reads before writes: what different owners do in an operation has no order."""
        parts = []
        for reach in sorted(operation.reaches, key=lambda reach: reach.write):
            size = len(self.buffers[reach.buffer].sm)
            end = reach.start + (reach.rows - 1) * reach.stride + reach.width
            if reach.start < 0 or end > size or (reach.rows > 1 and reach.width > reach.stride):
                raise ProgramError(f"{_title(operation)} goes to {reach.buffer}[{end - 1}], which has {size} elements")
            owner = self._owner_columns(operation, reach) if reach.unit else None
            columns: slice | NDArray[np.int64] = slice(0, reach.width)
            if owner is not None and (owner < 0).any():
                columns = np.flatnonzero(owner >= 0)
                owner = owner[columns]
            parts.append(_Part(reach, columns, owner))
        return parts

    def _owner_columns(self, operation: Operation, reach: Reach) -> Ints:
        """For each column of a reach the owner whose share it is in, or -1."""
        key = (id(operation.shares), reach.unit, reach.shift, reach.width)
        if key in self.owner_columns:
            return self.owner_columns[key]
        owner = np.full(reach.width, -1, np.int32)
        for i, share in enumerate(operation.shares):
            low, high = reach.columns(share.first, share.count)
            if low < high:
                if (other := int(owner[low:high].max())) >= 0:
                    first = operation.first_sm
                    raise ProgramError(
                        f"{_title(operation)}: SMs {first + other} and {first + i} share {reach.buffer}[{low}:{high}]"
                    )
                owner[low:high] = i
        self.owner_columns[key] = owner
        return owner

    def frames(self) -> None:
        ends = []
        for frame in range(_FRAMES):
            for operation in self.program.operations:
                owners = np.arange(operation.first_sm, operation.first_sm + operation.sms)
                now = frame * self.count + operation.number
                self._wait(operation, owners, frame)
                self.clocks[owners, owners] = now + 1
                self._access(operation, owners, now)
                self._publish(operation, owners, frame)
            ends.append(self.clocks - (frame + 1) * self.count)
        if (ends[-1] != ends[-2]).any():
            raise ProgramError(f"what SMs know of one another still changes after {_FRAMES} frames")

    def _wait(self, operation: Operation, owners: NDArray[np.int64], frame: int) -> None:
        if operation.wait is None:
            return
        first, count, value = operation.wait
        target = frame * self.count + value
        span = slice(first, first + count)
        late = np.flatnonzero(self.latest[span] < target)
        if late.size or first < 0 or first + count > self.program.sms:
            sm = first + int(late[0]) if late.size else first + count - 1
            raise ProgramError(f"{_title(operation)} waits for progress {value} of SM {sm}, which may never come")
        if (self.before[span] < target).all():
            known = self.published[span].max(axis=0)
        else:
            known = np.maximum.reduce([self._known(sm, target) for sm in range(first, first + count)])
        self.clocks[owners] = np.maximum(self.clocks[owners], known)

    def _known(self, sm: int, target: int) -> Ints:
        """What an SM knew at its first publication of at least this much."""
        known = np.zeros(self.program.sms, np.int32)  # at the start
        if target <= 0:
            return known
        for sms, values, clocks in reversed(self.history):
            i = np.flatnonzero(sms == sm)
            if i.size:
                if values[i[0]] < target:
                    break
                known = clocks[i[0]]
        return known

    def _publish(self, operation: Operation, owners: NDArray[np.int64], frame: int) -> None:
        publish = self.publish[operation.number]
        sms = owners[publish >= 0].astype(np.int32)
        if sms.size:
            values, clocks = frame * self.count + publish[publish >= 0], self.clocks[sms]
            self.history.append((sms, values, clocks))
            self.before[sms], self.latest[sms], self.published[sms] = self.latest[sms], values, clocks

    def _access(self, operation: Operation, owners: NDArray[np.int64], now: int) -> None:
        parts = self.parts[operation.number]
        active = owners[[share.count > 0 for share in operation.shares]]
        if not active.size:
            return
        written = [part.reach for part in parts if part.reach.write]
        for part in parts:
            reach, buffer = part.reach, self.buffers[part.reach.buffer]
            self._after_write(operation, part, owners, active)
            if reach.write:
                assert part.owner is not None
                self._after_reads(operation, part, owners)
                part.view(buffer.operation)[:, part.columns] = now
                part.view(buffer.sm)[:, part.columns] = owners[part.owner]
                part.view(buffer.readers)[:, part.columns] = 0
            elif not reach.unit or replace(reach, write=True) not in written:
                # An owner's own elements that it overwrites right away need not be remembered.
                self._remember(part, owners, active, now)

    def _after_write(
        self, operation: Operation, part: _Part, owners: NDArray[np.int64], active: NDArray[np.int64]
    ) -> None:
        """The accessing SMs must know that the last write is over; for a read, there must be one."""
        buffer = self.buffers[part.reach.buffer]
        writer = part.view(buffer.operation)[:, part.columns]
        sm = part.view(buffer.sm)[:, part.columns]
        if _rows_are_alike(writer) and _rows_are_alike(sm):
            writer, sm = writer[:1], sm[:1]
        if not part.reach.write and (never := writer == _NEVER).any():
            raise ProgramError(f"{_title(operation)} reads {part.interval(never)}, which nobody has written")
        known = self.clocks[active].min(axis=0)[sm] if part.owner is None else self.clocks[owners[part.owner], sm]
        bad = known <= writer
        if bad.any():
            row, column = np.argwhere(bad)[0]
            other = int(sm[row, column])
            mine = active[self.clocks[active, other].argmin()] if part.owner is None else owners[part.owner[column]]
            self._race(
                operation, int(mine), part.interval(bad), int(writer[row, column]), other, part.reach.write, True
            )

    def _after_reads(self, operation: Operation, part: _Part, owners: NDArray[np.int64]) -> None:
        """The writing SMs must know that all reads since the last write are over."""
        readers = part.view(self.buffers[part.reach.buffer].readers)[:, part.columns]
        if _rows_are_alike(readers):
            readers = readers[:1]
        pairs, inverse = _distinct(readers * np.int64(len(owners)) + part.owner)
        sets, writers = np.divmod(pairs, len(owners))
        late = self.clocks[owners[writers]] < self.reads[sets]
        if late.any():
            pair, sm = np.argwhere(late)[0]
            read, mine = int(self.reads[sets[pair], sm]) - 1, int(owners[writers[pair]])
            self._race(operation, mine, part.interval(inverse == pair), read, int(sm), True, False)

    def _race(
        self, operation: Operation, sm: int, where: str, earlier: int, other: int, write: bool, wrote: bool
    ) -> None:
        first = self.program.operations[earlier % self.count]
        raise ProgramError(
            f"{_title(operation)} on SM {sm} {'writes' if write else 'reads'} {where}, not knowing that "
            f"{_title(first)} on SM {other} has {'written' if wrote else 'read'} it"
        )

    def _remember(self, part: _Part, owners: NDArray[np.int64], active: NDArray[np.int64], now: int) -> None:
        """Add these reads to those since the last write."""
        readers = part.view(self.buffers[part.reach.buffer].readers)
        before = readers[:, part.columns]
        if _rows_are_alike(before):
            before = before[:1]
        keys, inverse = _distinct(before if part.owner is None else before * np.int64(len(owners)) + part.owner)
        while self.sets + len(keys) > len(self.reads):
            self.reads = np.concatenate((self.reads, np.zeros_like(self.reads)))
        new = self.reads[self.sets : self.sets + len(keys)]
        if part.owner is None:
            new[:] = self.reads[keys]
            new[:, active] = now + 1
        else:
            sets, reader = np.divmod(keys, len(owners))
            new[:] = self.reads[sets]
            new[np.arange(len(keys)), owners[reader]] = now + 1
        readers[:, part.columns] = self.sets + inverse
        self.sets += len(keys)


def _buffers(program: Program) -> dict[str, _Buffer]:
    """Before the first frame, with what the host has put there."""
    config, B = program.config, program.sequences
    buffers = {name: _Buffer.new(math.prod(shape)) for name, (_, shape) in program.regions.items()}
    buffers["start"].operation[:] = _HOST
    if program.residual:
        buffers["h"].operation[:] = _HOST
        return buffers
    cache = config.num_experts * config.spatial_layers * program.rows * config.n_kv_heads * config.head_dim
    buffers |= {"keys": _Buffer.new(cache), "values": _Buffer.new(cache)}
    J, sums = config.num_codebooks, config.num_experts * B * config.dim
    buffers["codes"].operation[(J - 1) * B :] = _HOST  # of the frame before
    buffers["total"].operation[J % 2 * sums : (J % 2 + 1) * sums] = _HOST
    return buffers


def _rows_are_alike(values: Ints) -> bool:
    return len(values) > 1 and bool((values == values[0]).all())


def _distinct(keys: NDArray[np.int64] | Ints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different keys in ascending order, and each key's place among them; np.unique for keys close together."""
    low = keys.min()
    size = int(keys.max() - low) + 1
    if size == 1:
        return np.array([low], np.int64), np.zeros(keys.shape, np.int64)
    if size > _LOOKUP:
        values, inverse = np.unique(keys, return_inverse=True)
        return values.astype(np.int64), inverse.reshape(keys.shape)
    keys = keys - low
    present = np.zeros(size, bool)
    present[keys] = True
    return np.flatnonzero(present) + low, (np.cumsum(present) - 1)[keys]


def _title(operation: Operation) -> str:
    return f"operation {operation.number} ({operation.name})"
