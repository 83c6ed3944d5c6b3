"""The tape: all weight matrices as one stream of bytes an SM, in the order in which the persistent CUDA kernel reads.

A fragment is 8 outputs by 32 columns of a matrix, row by row. An SM owns tiles of 8 outputs of each matrix (its share,
see program.py); they lie in blocks of up to four tiles, and in a block step by step: the first 32 columns of its tiles
in turn, then the next 32. So the bytes come in the order in which the matrix units want them, a block's sums stay in
registers, and a stream can be cut anywhere between fragments.

The kernel widens one-byte weights in pairs that are a word's even or odd bytes, so every four columns are stored in the
order 0, 2, 1, 3. In a SwiGLU matrix rows 2i and 2i + 1 are gate i and value i, so that a tile holds whole pairs.
Everything here is plain tensor arithmetic: it runs where the tape is, on a CPU or a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .program_format import BLOCK_TILES, STEP_COLUMNS, TILE_ROWS

if TYPE_CHECKING:
    from .program import Matrix, Program


DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "fp8": 448.0}


def quantise(matrix: Tensor, weights: str) -> tuple[Tensor, Tensor | None]:
    """What the tape holds of a matrix float32 [outputs, columns]: values in the storage dtype and, except for bf16,
    a scale for each output, float32 [outputs]; value * scale is the weight. Scales are absmax / 127 for "int8" and
    absmax / 448 for "fp8" (e4m3); ties round to even. Rows stay in the matrix's own order.
    """
    if weights not in DTYPES:
        raise InputError(f"weights must be one of {', '.join(DTYPES)}, not {weights!r}")
    if weights == "bf16":
        return matrix.to(torch.bfloat16), None
    largest = _LARGEST[weights]
    scales = matrix.abs().amax(dim=1) / largest
    values = matrix / torch.where(scales > 0, scales, 1).unsqueeze(1)
    if weights == "int8":
        values = values.round()
    # A scale that is subnormal is rounded so coarsely that the quotient can leave the range.
    return values.clamp(-largest, largest).to(DTYPES[weights]), scales


def kernel_order(matrix: Matrix, rows: Tensor) -> Tensor:
    """Rows [outputs, ...] of a matrix (or its scales [outputs]) in the order of the kernel's outputs."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) if matrix.swiglu else rows


def tape_bytes(program: Program, weights: str) -> int:
    """The size of a program's tape."""
    return program.tape_fragments * _fragment_bytes(DTYPES[weights])


def pack_matrix(tape: Tensor, program: Program, matrix: Matrix, values: Tensor) -> None:
    """Write a matrix to its places on the tape.

    tape: uint8, contiguous, `tape_bytes` or more; values: [outputs, columns] in a storage dtype, as `quantise` gives
    them, on the tape's device.
    """
    if values.shape != (matrix.outputs, matrix.columns) or values.dtype not in DTYPES.values():
        wanted = f"[{matrix.outputs}, {matrix.columns}] in a storage dtype"
        raise ValueError(f"{matrix}: expected {wanted}, got {list(values.shape)} in {values.dtype}")
    places = _places(program, matrix)
    data = kernel_order(matrix, values.contiguous().view(torch.uint8))
    if values.itemsize == 1:
        data = _swap_middle_columns(data)
    tiles, steps = places.shape
    fragments = data.view(tiles, TILE_ROWS, steps, -1).transpose(1, 2).reshape(tiles * steps, -1)
    slots = _slots(tape, program, values.dtype)
    # Eight bytes at a time: a copy of rows goes element by element.
    slots.view(torch.int64).index_copy_(0, places.flatten().to(tape.device), fragments.view(torch.int64))


def unpack(tape: Tensor, program: Program, weights: str) -> dict[Matrix, Tensor]:
    """What `pack_matrix` wrote: the values of every matrix of a program (before scales), float32 [outputs, columns]
    in the matrix's own row order. Raises ValueError unless the matrices cover each fragment of the tape exactly once.
    """
    slots = _slots(tape, program, DTYPES[weights])
    covered = np.zeros(program.tape_fragments, dtype=np.int64)
    matrices = {}
    for matrix in program.matrices:
        places = _places(program, matrix)
        np.add.at(covered, places.numpy().ravel(), 1)
        tiles, steps = places.shape
        fragments = slots[places.flatten().to(tape.device)].view(tiles, steps, TILE_ROWS, -1)
        data = fragments.transpose(1, 2).reshape(matrix.outputs, -1)
        if DTYPES[weights].itemsize == 1:
            data = _swap_middle_columns(data)
        values = data.view(DTYPES[weights]).float()
        matrices[matrix] = torch.cat((values[0::2], values[1::2])) if matrix.swiglu else values
    wrong = np.flatnonzero(covered != 1)
    if len(wrong):
        raise ValueError(f"fragment {wrong[0]} of the tape belongs to {covered[wrong[0]]} tiles, not one")
    return matrices


def _fragment_bytes(dtype: torch.dtype) -> int:
    return TILE_ROWS * STEP_COLUMNS * dtype.itemsize


def _slots(tape: Tensor, program: Program, dtype: torch.dtype) -> Tensor:
    """The tape as uint8 [fragments, bytes of a fragment]."""
    size = _fragment_bytes(dtype)
    if tape.dtype != torch.uint8 or tape.ndim != 1 or len(tape) < program.tape_fragments * size:
        wanted = f"{program.tape_fragments} fragments of {size} bytes"
        raise ValueError(f"expected a tape of {wanted}, got {list(tape.shape)} {tape.dtype}")
    return tape[: program.tape_fragments * size].view(-1, size)


def _places(program: Program, matrix: Matrix) -> Tensor:
    """The place on the tape, in fragments, of every fragment of a matrix: int64 [tiles, steps], on the CPU.

    Raises ValueError unless the shares cover each tile exactly once.
    """
    tiles, steps = matrix.tiles, matrix.steps
    first_sm, shares = program.matrix_shares(matrix)
    owned = [(program.fragment(matrix, first_sm + i), s.first, s.count) for i, s in enumerate(shares) if s.count]
    start, first, count = (np.array(column, dtype=np.int64) for column in zip(*owned, strict=True))
    local = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)  # the owner's number of a tile
    start, first, count = (np.repeat(column, count) for column in (start, first, count))
    tile, block, inside = first + local, local // BLOCK_TILES, local % BLOCK_TILES
    if not np.array_equal(np.sort(tile), np.arange(tiles)):
        raise ValueError(f"{matrix}: the shares do not cover each of its {tiles} tiles once")
    width = np.minimum(BLOCK_TILES, count - BLOCK_TILES * block)  # tiles of the block
    places = np.empty((tiles, steps), dtype=np.int64)
    places[tile] = (start + BLOCK_TILES * block * steps + inside)[:, None] + width[:, None] * np.arange(steps)
    return torch.from_numpy(places)


def _swap_middle_columns(data: Tensor) -> Tensor:
    """Columns 0, 2, 1, 3 of every four; its own inverse. Whole words, not single bytes, are moved."""
    words = data.contiguous().view(torch.int32)
    ends, second, third = words & ~0x00FFFF00, words & 0x0000FF00, words & 0x00FF0000
    return (ends | second << 8 | third >> 8).view(torch.uint8)
