"""What the operations of a program read and write, worked out from the numbers that the kernel is told.

Writes are exact. Reads may name more than is read, never less. What never changes during a launch (weights, tables,
the prompts' keys and values) and what goes out of it (codes_out, logprobs_out) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .program_format import TILE_ROWS, Entry, Keys, Source, Target
from .program_layout import Layout, Matrix


@dataclass(frozen=True)
class Access:
    """Elements start .. stop - 1 of a buffer: a region of the arena by its name, or "keys" or "values".

    Those two are the caches, flattened, with the frame's position left out: [K][blocks][R][kv_heads][head_dim].
    """

    buffer: str
    start: int
    stop: int
    write: bool


@dataclass(frozen=True)
class Reach:
    """What all owners of an operation touch in a buffer: in each of `rows` rows, `stride` apart from `start` on, all
    of `width` columns, or, with a `unit`, those of the owner's share: `unit` columns an item, the first column being
    number `shift` of them."""

    buffer: str
    start: int
    width: int
    write: bool = False
    rows: int = 1
    stride: int = 0
    unit: int = 0
    shift: int = 0

    def columns(self, first: int, count: int) -> tuple[int, int]:
        """From .. to before, of an owner with this share; empty where the second is not above the first."""
        if not self.unit:
            return 0, self.width if count else 0
        return max(first * self.unit - self.shift, 0), min((first + count) * self.unit - self.shift, self.width)

    def accesses(self, first: int, count: int) -> list[Access]:
        low, high = self.columns(first, count)
        if low >= high:
            return []
        starts = (self.start + row * self.stride for row in range(self.rows))
        return [Access(self.buffer, start + low, start + high, self.write) for start in starts]


def reaches(layout: Layout, kind: str, fields: dict[str, int], matrix: Matrix | None) -> tuple[Reach, ...]:
    """All of an operation's reaches; `fields` as in Operation."""
    return tuple(_REACHES[kind](layout, fields) if matrix is None else _matmul(layout, fields, matrix))


def _noise(layout: Layout, fields: dict[str, int]) -> Iterator[Reach]:
    size = math.prod(layout.regions["noise"][1])
    yield Reach(*layout.locate(fields["output"]), size, write=True, unit=4)


def _enter(layout: Layout, fields: dict[str, int]) -> Iterator[Reach]:
    yield from _entry(layout, fields, Entry(fields["source"]))
    yield Reach(*layout.locate(fields["output"]), fields["rows"] * fields["columns"], write=True, unit=1)


def _entry(layout: Layout, fields: dict[str, int], entry: Entry) -> Iterator[Reach]:
    """What the first rows of a backbone or of a residual decoder are made of."""
    config, B, k = layout.config, layout.sequences, fields["expert"]
    one = layout.rows * config.dim
    j = config.num_codebooks if entry is Entry.backbone else fields["codebook"]
    needs_codes = entry is Entry.backbone or config.conditioning != "none"
    needs_total = entry is Entry.backbone or config.conditioning == "accumulated"
    if entry is Entry.decoder:
        yield Reach("start", k * one, one)
        if fields["position"] == 0:
            yield Reach("h", k * one, one)
    if needs_codes and j >= 1:
        yield Reach("codes", (j - 1) * B, B)
    if needs_total and j >= 2:
        total = B * config.dim
        yield Reach("total", (j % 2 * config.num_experts + k) * total, total)


def _sum(layout: Layout, fields: dict[str, int]) -> Iterator[Reach]:
    """`accumulate` and `sums`: the sums so far, if there are any, and one more code."""
    elements, B, j = (
        layout.config.num_experts * layout.sequences * layout.config.dim,
        layout.sequences,
        fields["codebook"],
    )
    if j >= 2:
        yield Reach(*layout.locate(fields["input"]), elements, unit=1)
    yield Reach("codes", (j - 1) * B, B)
    yield Reach(*layout.locate(fields["output"]), elements, write=True, unit=1)


def _attention(layout: Layout, fields: dict[str, int]) -> Iterator[Reach]:
    config, R = layout.config, layout.rows
    yield Reach(*layout.locate(fields["input"]), R * config.dim, unit=config.head_dim)
    if fields["source"] == Keys.frames:
        one = R * config.n_kv_heads * config.head_dim
        block = fields["expert"] * config.spatial_layers + fields["block"]
        yield Reach("keys", block * one, one)
        yield Reach("values", block * one, one)
    yield Reach(*layout.locate(fields["output"]), R * config.dim, write=True, unit=config.head_dim)


def _norm(layout: Layout, fields: dict[str, int]) -> Iterator[Reach]:
    d = layout.config.dim
    yield Reach(*layout.locate(fields["input"]), layout.rows * d, unit=d)
    yield Reach(*layout.locate(fields["output"]), layout.rows * d, write=True, unit=d)


def _draw(layout: Layout, fields: dict[str, int]) -> Iterator[Reach]:
    B, V, j = layout.sequences, layout.config.codebook_size, fields["codebook"]
    yield Reach(*layout.locate(fields["input"]), B * V, unit=V)
    yield Reach("noise", j * B * V, B * V, unit=V)
    yield Reach(*layout.locate(fields["output"]), B, write=True, unit=1)


def _matmul(layout: Layout, fields: dict[str, int], matrix: Matrix) -> Iterator[Reach]:
    config, R, rows, d = layout.config, layout.rows, fields["rows"], layout.config.dim
    source, target = Source(fields["source"]), Target(fields["target"])
    kv = config.n_kv_heads * config.head_dim
    dkv = fields["block"] * (config.codes_per_expert + 1)  # number of the block's first position
    if source in (Source.backbone_entry, Source.decoder_entry):
        yield from _entry(layout, fields, Entry.backbone if source is Source.backbone_entry else Entry.decoder)
    else:
        yield Reach(*layout.locate(fields["input"]), rows * matrix.columns)
    if source is Source.short_attention:
        yield Reach("dkv", dkv * R * 2 * kv, (fields["position"] * R + rows) * 2 * kv)

    output = layout.locate(fields["output"])
    if target is Target.add:
        yield Reach(*output, d, rows=rows, stride=d, unit=TILE_ROWS)
        yield Reach(*output, d, write=True, rows=rows, stride=d, unit=TILE_ROWS)
    elif target is Target.swiglu:
        hidden = matrix.outputs // 2
        yield Reach(*output, hidden, write=True, rows=rows, stride=hidden, unit=TILE_ROWS // 2)
    elif target is Target.logits:
        V = config.codebook_size
        yield Reach(*output, V, write=True, rows=layout.sequences, stride=V, unit=TILE_ROWS)
    else:  # query, or the queries of queries, keys and values
        yield Reach(*output, d, write=True, rows=rows, stride=d, unit=TILE_ROWS)
    if target is Target.cache:
        start = (fields["expert"] * config.spatial_layers + fields["block"]) * R * kv
        yield Reach("keys", start, kv, write=True, rows=rows, stride=kv, unit=TILE_ROWS, shift=d)
        yield Reach("values", start, kv, write=True, rows=rows, stride=kv, unit=TILE_ROWS, shift=d + kv)
    elif target is Target.scratch:
        start = (dkv + fields["position"]) * R * 2 * kv
        yield Reach("dkv", start, 2 * kv, write=True, rows=rows, stride=2 * kv, unit=TILE_ROWS, shift=d)


_REACHES = {
    "noise": _noise,
    "enter": _enter,
    "accumulate": _sum,
    "attention": _attention,
    "norm": _norm,
    "draw": _draw,
    "sums": _sum,
}
