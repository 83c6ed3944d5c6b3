"""The numbers that csrc/cuda/program.h gives to things, for the Python side: both must say the same."""

from __future__ import annotations

from enum import IntEnum

WARPS = 8  # of a block that compute; one more streams the weights
TILE_ROWS = 8  # outputs of a tile of weights
STEP_COLUMNS = 32  # columns of a fragment of a tile
BLOCK_TILES = 4  # tiles whose sums are kept in registers together
MAX_ROWS = 64  # of activations in a pass over weights
PAD = 32  # columns added to a row of activations in shared memory
INSTRUCTION_NUMBERS = 32

# The fields of an instruction, in their order; the rest of its numbers are reserved.
FIELDS = (
    "kind", "operation", "publish", "wait_first", "wait_count", "wait_value", "expert", "block", "codebook", "position",
    "rows", "first", "count", "columns", "source", "target", "norm", "bias", "scale", "input", "output", "chunk",
    "fragment", "shift",
)  # fmt: skip
FIELD = {name: i for i, name in enumerate(FIELDS)}


class Format(IntEnum):
    bf16 = 0
    int8 = 1
    fp8 = 2


class Conditioning(IntEnum):
    none = 0
    residual = 1
    accumulated = 2


class Kind(IntEnum):
    noise = 0
    enter = 1
    accumulate = 2
    matmul = 3
    attention = 4
    norm = 5
    draw = 6
    sums = 7


class Source(IntEnum):
    rows = 0
    short_attention = 1
    backbone_entry = 2
    decoder_entry = 3


class Target(IntEnum):
    query = 0
    cache = 1
    add = 2
    swiglu = 3
    scratch = 4
    logits = 5


class Keys(IntEnum):
    prompt = 0
    frames = 1


class Shift(IntEnum):
    none = 0
    frame = 1
    position = 2


class Entry(IntEnum):
    backbone = 0
    decoder = 1
