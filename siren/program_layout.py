"""Which numbers a program of the persistent kernel works on and where they are: matrices, vectors, the arena.

B sequences, R rows (B, or 2 B with guidance: first the prompts, then the null prompts), K experts of m codes each,
J = K m codebooks of V codes, d = dim, kv = kv_heads * head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .config import SirenConfig
from .errors import BackendError
from .program_format import MAX_ROWS, STEP_COLUMNS, TILE_ROWS

_ALIGNMENT = 32  # floats, 128 bytes
_MOST_CODES = 8192  # of a codebook: a draw keeps its logits in shared memory
_MOST_HEAD_DIM = 256
_MOST_FLOATS = 2**31 - 1  # offsets are int32


@dataclass(frozen=True)
class Matrix:
    """Weights [outputs, columns] of a matmul. `block` of a head is its codebook's number within the expert.

    With `swiglu` row 2 i is gate i and row 2 i + 1 value i.
    """

    name: str
    expert: int
    block: int
    outputs: int
    columns: int
    swiglu: bool

    @property
    def tiles(self) -> int:
        return self.outputs // TILE_ROWS

    @property
    def steps(self) -> int:
        """Fragments of a tile."""
        return self.columns // STEP_COLUMNS


Region = tuple[int, tuple[int, ...]]  # offset in the arena and shape


@dataclass(frozen=True)
class Layout:
    """`vectors`: (name, expert, block) -> offset and length in the tensor of norms, biases and scales; the same for
    any batch. `regions`: name -> offset in the arena and shape, all float32 except that `codes` holds int32."""

    config: SirenConfig
    sequences: int
    rows: int
    residual: bool
    matrices: list[Matrix]
    vectors: dict[tuple[str, int, int], tuple[int, int]]
    vector_floats: int
    regions: dict[str, Region]
    arena_floats: int

    def at(self, region: str, *index: int) -> int:
        """The arena's offset of region[index], an index that may leave out the last dimensions."""
        offset, shape = self.regions[region]
        return offset + sum(i * math.prod(shape[axis + 1 :]) for axis, i in enumerate(index))

    def locate(self, offset: int) -> tuple[str, int]:
        """The region that an offset of the arena is in, and the place there."""
        for name, (first, shape) in self.regions.items():
            if first <= offset < first + math.prod(shape):
                return name, offset - first
        raise ValueError(f"no region holds offset {offset}")


def build_layout(config: SirenConfig, sequences: int, guided: bool, residual: bool) -> Layout:
    """Raises BackendError for sizes that the kernel does not take."""
    rows = 2 * sequences if guided else sequences
    check_sizes(config, rows)
    matrices = list(_matrices(config, residual))
    vectors: dict[tuple[str, int, int], tuple[int, int]] = {}
    vector_floats = 0
    for key, length in _vectors(config, residual, matrices):
        vectors[key] = (vector_floats, length)
        vector_floats += _aligned(length)
    regions: dict[str, Region] = {}
    arena_floats = 0
    for name, shape in _regions(config, sequences, rows, residual).items():
        regions[name] = (arena_floats, shape)
        arena_floats += _aligned(math.prod(shape))
    if max(arena_floats, vector_floats) > _MOST_FLOATS:
        raise BackendError(
            f"backend 'cuda' has room for {_MOST_FLOATS} numbers between operations; this model and batch need "
            f"{max(arena_floats, vector_floats)}: use fewer sequences"
        )
    return Layout(config, sequences, rows, residual, matrices, vectors, vector_floats, regions, arena_floats)


def check_sizes(config: SirenConfig, rows: int) -> None:
    """Raise BackendError, naming the number and what works, unless the kernel takes the model and so many rows."""
    for name, value, multiple, most in (
        ("dim", config.dim, STEP_COLUMNS, None),
        ("ffn_hidden", config.ffn_hidden, STEP_COLUMNS, None),
        ("head_dim (dim / n_heads)", config.head_dim, TILE_ROWS, _MOST_HEAD_DIM),
        ("codebook_size", config.codebook_size, TILE_ROWS, _MOST_CODES),
    ):
        if value % multiple or (most is not None and value > most):
            limit = "" if most is None else f" of at most {most}"
            raise BackendError(f"backend 'cuda' needs {name} to be a multiple of {multiple}{limit}, not {value}")
    most = MAX_ROWS // 2  # positions 0 and 1 of a residual decoder go through its weights together
    if not 1 <= rows <= most:
        raise BackendError(
            f"backend 'cuda' takes batches of 1 to {most} sequences, or to {most // 2} with guidance, which doubles "
            f"them; this batch has {rows} rows"
        )


def _matrices(config: SirenConfig, residual: bool) -> Iterator[Matrix]:
    """In the order of first use."""
    d, hidden, qkv = config.dim, config.ffn_hidden, config.dim + 2 * config.n_kv_heads * config.head_dim
    backbone = ("cross_query", d, d), ("cross_output", d, d), ("qkv", qkv, d), ("self_output", d, d)
    decoder = ("decoder_qkv", qkv, d), ("decoder_output", d, d)
    if not residual:
        for block in range(config.spatial_layers):
            for k in range(config.num_experts):
                for name, outputs, columns in backbone:
                    yield Matrix(name, k, block, outputs, columns, False)
                yield Matrix("gate_value", k, block, 2 * hidden, d, True)
                yield Matrix("down", k, block, d, hidden, False)
    for k in range(config.num_experts):
        for block in range(config.factorized_layers):
            for name, outputs, columns in decoder:
                yield Matrix(name, k, block, outputs, columns, False)
            yield Matrix("decoder_gate_value", k, block, 2 * hidden, d, True)
            yield Matrix("decoder_down", k, block, d, hidden, False)
        for i in range(config.codes_per_expert):
            yield Matrix("heads", k, i, config.codebook_size, d, False)


def _vectors(config: SirenConfig, residual: bool, matrices: list[Matrix]) -> Iterator[tuple[tuple[str, int, int], int]]:
    for k in range(config.num_experts):
        if not residual:
            for block in range(config.spatial_layers):
                for name in ("cross_norm", "cross_query_bias", "cross_output_bias", "self_norm", "ffn_norm"):
                    yield (name, k, block), config.dim
            yield ("final_norm", k, 0), config.dim
        for block in range(config.factorized_layers):
            for name in ("attention_norm", "decoder_ffn_norm"):
                yield (name, k, block), config.dim
        if config.factorized_layers:
            yield ("decoder_norm", k, 0), config.dim
    for matrix in matrices:
        yield (f"scale:{matrix.name}", matrix.expert, matrix.block), matrix.outputs


def _regions(config: SirenConfig, B: int, R: int, residual: bool) -> dict[str, tuple[int, ...]]:
    K, J, V, d, hidden = config.num_experts, config.num_codebooks, config.codebook_size, config.dim, config.ffn_hidden
    kv, positions = config.n_kv_heads * config.head_dim, config.codes_per_expert + 1
    shapes: dict[str, tuple[int, ...]] = {}
    if not residual:
        shapes = {"x": (K, R, d), "q": (K, R, d), "a": (K, R, d), "act": (K, R, hidden)}
    shapes |= {
        "h": (K, R, d),
        "start": (K, R, d),
        "total": (2, K, B, d),
        "dx": (2 * R, d),
        "dq": (2 * R, d),
        "dact": (2 * R, hidden),
        "dkv": (config.factorized_layers, positions, R, 2 * kv),
        "logits": (J, B, V),
        "noise": (J, B, V),
        "codes": (J, B),
    }
    if residual:
        shapes["sums"] = (K, B, d)
    return shapes


def _aligned(floats: int) -> int:
    return -(-floats // _ALIGNMENT) * _ALIGNMENT
