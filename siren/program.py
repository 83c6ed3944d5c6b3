"""One frame as a list of operations: what the persistent CUDA kernel runs, the executor repeats and the checker proves.

The operations have one order. Each belongs to some SMs, its owners, and each owner has a share of it. An SM runs, in
that order, the operations it owns. Expert k's backbone belongs to a group of about SMs / K; the residual decoders, the
noise and the draws belong to all SMs. An operation that needs what other SMs have done waits for ONE condition: that
certain SMs have published a certain progress. An SM publishes the number of its next operation before each wait of
its own. Every wait is for earlier operations of the one order, so nothing can wait in a circle.

csrc/cuda/program.h says what an instruction is: an operation together with one owner's share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .config import SirenConfig
from .errors import BackendError
from .program_format import (
    FIELD,
    INSTRUCTION_NUMBERS,
    Entry,
    Keys,
    Kind,
    Shift,
    Source,
    Target,
)
from .program_layout import Layout, Matrix, Region, build_layout
from .program_operations import Frame, Operation, Share

__all__ = [
    "Entry",
    "Keys",
    "Kind",
    "Matrix",
    "Operation",
    "Program",
    "Share",
    "Shift",
    "Source",
    "Target",
    "build_program",
]


@dataclass
class Program:
    """`rows`: activations of a frame, with guidance two a sequence. `residual`: the part after the backbones only.

    `matrices` and `vectors` depend on the config and on `residual` only. `instructions` int32 [n, 32], those of SM s
    in rows starts[s] .. starts[s + 1] - 1.
    """

    layout: Layout
    guided: bool
    sms: int
    operations: list[Operation]
    staged_bytes: int
    places: dict[Matrix, tuple[int, tuple[Share, ...]]]
    fragments: dict[Matrix, NDArray[np.int64]]
    tape_fragments: int
    instructions: NDArray[np.int32]
    starts: NDArray[np.int32]

    @property
    def config(self) -> SirenConfig:
        return self.layout.config

    @property
    def sequences(self) -> int:
        return self.layout.sequences

    @property
    def rows(self) -> int:
        return self.layout.rows

    @property
    def residual(self) -> bool:
        return self.layout.residual

    @property
    def matrices(self) -> list[Matrix]:
        return self.layout.matrices

    @property
    def regions(self) -> dict[str, Region]:
        return self.layout.regions

    @property
    def arena_floats(self) -> int:
        return self.layout.arena_floats

    @property
    def vectors(self) -> dict[tuple[str, int, int], tuple[int, int]]:
        return self.layout.vectors

    @property
    def vector_floats(self) -> int:
        return self.layout.vector_floats

    def matrix_shares(self, matrix: Matrix) -> tuple[int, tuple[Share, ...]]:
        """The first SM that has tiles of a matrix, and the tiles of it and the SMs after it."""
        return self.places[matrix]

    def fragment(self, matrix: Matrix, sm: int) -> int:
        """Where on the tape an SM's tiles of a matrix start, in fragments."""
        return int(self.fragments[matrix][sm - self.places[matrix][0]])


def build_program(
    config: SirenConfig,
    sequences: int,
    guided: bool,
    sms: int,
    shared_bytes: int = 232448,
    residual: bool = False,
) -> Program:
    """The program of a frame for a batch of `sequences` on so many SMs with `shared_bytes` of shared memory each.

    Raises BackendError for sizes that the kernel does not take.
    """
    if sms < 1:
        raise BackendError(f"backend 'cuda' needs at least 1 SM, not {sms}")
    frame = Frame(build_layout(config, sequences, guided, residual), sms, shared_bytes // 3)
    instructions, starts = instruction_table(frame.operations, sms, frame.fragments)
    return Program(
        frame.layout, guided, sms, frame.operations, frame.staged_bytes, frame.places, frame.fragments,
        frame.tape_fragments, instructions, starts,
    )  # fmt: skip


def instruction_table(
    operations: list[Operation], sms: int, fragments: dict[Matrix, NDArray[np.int64]]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """All instructions int32 [n, 32], SM by SM and there in order, and where each SM's start, int32 [sms + 1]."""
    tables, owners = [], []
    counts: dict[int, NDArray[np.int64]] = {}  # the shares as an array, by the tuple's identity
    for operation in operations:
        table = np.zeros((operation.sms, INSTRUCTION_NUMBERS), dtype=np.int32)
        table[:, FIELD["kind"]] = Kind[operation.kind]
        table[:, FIELD["operation"]] = operation.number
        if operation.wait:
            table[:, FIELD["wait_first"] : FIELD["wait_value"] + 1] = operation.wait
        for name, value in operation.fields.items():
            table[:, FIELD[name]] = value
        shares = counts.get(id(operation.shares))
        if shares is None:
            shares = np.array([(share.first, share.count) for share in operation.shares])
            counts[id(operation.shares)] = shares
        table[:, FIELD["first"] : FIELD["count"] + 1] = shares
        if operation.matrix:
            table[:, FIELD["fragment"]] = fragments[operation.matrix]
        tables.append(table)
        owners.append(np.arange(operation.first_sm, operation.first_sm + operation.sms))
    sm = np.concatenate(owners)
    order = np.argsort(sm, kind="stable")
    table = np.concatenate(tables)[order]
    starts = np.concatenate(([0], np.cumsum(np.bincount(sm, minlength=sms)))).astype(np.int32)
    # An SM publishes before its own next wait, so that nobody waits for it in vain. A frame's first operation waits.
    following = np.roll(table, -1, axis=0)
    waits, number = following[:, FIELD["wait_count"]] > 0, following[:, FIELD["operation"]]
    table[:, FIELD["publish"]] = np.where(waits, number, -1)
    table[starts[1:] - 1, FIELD["publish"]] = len(operations)
    return table, starts
