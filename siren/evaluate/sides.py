"""A list of clips as one embedding model hears it: its parts, and what the figures need of them, part by part."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .clip_lists import ClipList
from .parts import PART, Part

_IN_MEMORY = 256 << 20  # bytes of vectors of one side that stay in memory; more are read again for each use
_OPEN_PARTS = 16  # whose logits stay in memory while pairs are looked up


@dataclass(frozen=True)
class Side:
    """`clips` and their parts, in order. A kept clip has a row, 0 to n - 1, in the order of the list."""

    clips: ClipList
    digest: str
    parts: Sequence[Part]

    @cached_property
    def rows(self) -> list[int]:
        """The place in the list of each row [n]."""
        return [number * PART + place for number, part in enumerate(self.parts) for place in part.kept]

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each part, and n."""
        return [0, *np.cumsum([len(part.kept) for part in self.parts]).tolist()]

    @cached_property
    def skips(self) -> list[tuple[int, str, str]]:
        """Place in the list, reason and detail of each clip that was not kept."""
        return [(n * PART + place, *why) for n, part in enumerate(self.parts) for place, *why in part.skips]  # type: ignore[misc]

    @cached_property
    def rates(self) -> Counter[int]:
        """How many kept files have which rate, in Hz."""
        return Counter(rate for part in self.parts for rate in part.rates)

    @cached_property
    def clipped(self) -> int:
        return sum(sum(part.clipped) for part in self.parts)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """How many vectors each row has [n]."""
        found = [part.tensor("lengths") for part in self.parts]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def blocks(self) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
        """Vectors [m, D] of each part, and the row that each belongs to [m]."""
        for number in range(len(self.parts)):
            rows = np.arange(self.starts[number], self.starts[number + 1])
            if len(rows):
                yield self._vectors(number), np.repeat(rows, self.lengths[rows])

    def _vectors(self, number: int) -> npt.NDArray[np.float32]:
        if self._kept is None:
            return self.parts[number].tensor("vectors")
        if number not in self._kept:
            self._kept[number] = self.parts[number].tensor("vectors")
        return self._kept[number]

    @cached_property
    def _kept(self) -> dict[int, npt.NDArray[np.float32]] | None:
        """Vectors in memory, by part; None if they are too large for that."""
        size = sum(part.path.stat().st_size for part in self.parts)
        return {} if size <= _IN_MEMORY else None

    def tensors(self, name: str) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
        """Rows and values of each part that has some."""
        for number, part in enumerate(self.parts):
            if part.kept:
                yield slice(self.starts[number], self.starts[number + 1]), part.tensor(name)


class Lookup:
    """One tensor's values at any rows of a side, with a few parts in memory. Rows in the list's order are fastest."""

    def __init__(self, side: Side, name: str) -> None:
        self._side, self._name = side, name
        self._open: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()

    def __call__(self, rows: Sequence[int]) -> npt.NDArray[Any]:
        """[len(rows), ...]."""
        return np.stack([self._at(row) for row in rows])

    def _at(self, row: int) -> npt.NDArray[Any]:
        number = int(np.searchsorted(self._side.starts, row, side="right")) - 1
        if number not in self._open:
            self._open[number] = self._side.parts[number].tensor(self._name)
            if len(self._open) > _OPEN_PARTS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number][row - self._side.starts[number]]
