"""The operations of a frame, one after another: which SMs own them, what they wait for, and each owner's share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .program_accesses import Access, Reach, reaches
from .program_format import PAD, Entry, Keys, Kind, Shift, Source, Target
from .program_layout import Layout, Matrix

_LEAST_STAGED_BYTES = 16 << 10
_FEW_ROWS = 2  # so few that every SM works out a first input for itself instead of an exchange; a guess, not measured


@dataclass(frozen=True)
class Share:
    """Items first .. first + count - 1: tiles of a matmul, else what csrc/cuda/program.h says of the kind."""

    first: int
    count: int


Owners = tuple[int, int]  # the first SM and how many
Wait = tuple[int, int, int]  # the first SM, how many, and the progress within the frame that they must have


@dataclass(frozen=True)
class Operation:
    """`shares`: one an owner, SMs first_sm .. first_sm + sms - 1. An owner with an empty share touches nothing.

    `fields` has the numbers of an instruction that are the same for all owners.
    """

    number: int
    kind: str
    name: str
    first_sm: int
    sms: int
    wait: Wait | None
    shares: tuple[Share, ...]
    matrix: Matrix | None
    fields: dict[str, int]
    reaches: tuple[Reach, ...]

    def accesses(self, sm: int) -> list[Access]:
        """What this SM reads and writes; see program_accesses.py for what is left out."""
        if not self.first_sm <= sm < self.first_sm + self.sms:
            return []
        share = self.shares[sm - self.first_sm]
        return [access for reach in self.reaches for access in reach.accesses(share.first, share.count)]


class Frame:
    """`operations`: all of a frame. `budget`: bytes of shared memory that staged activations should fit into.

    `places`: each matrix's first owner and shares; `fragments`: where on the tape each of these starts.
    """

    def __init__(self, layout: Layout, sms: int, budget: int) -> None:
        self.layout, self.config, self.sms, self.budget = layout, layout.config, sms, budget
        self.B, self.R, self.d, self.K = layout.sequences, layout.rows, layout.config.dim, layout.config.num_experts
        self.all = (0, sms)
        self.groups = [self._group(k) for k in range(self.K)]
        self.last = [0] * self.K  # the latest operation of an expert's backbone
        self.matrices = {(matrix.name, matrix.expert, matrix.block): matrix for matrix in layout.matrices}
        self.operations: list[Operation] = []
        self.staged_bytes = max(
            _LEAST_STAGED_BYTES, 4 * layout.config.codebook_size, 4 * (10 * layout.config.head_dim + 64)
        )
        self._split: dict[tuple[int, int, int], tuple[Share, ...]] = {}
        self._lay_tape()
        self._frame()

    def _group(self, k: int) -> Owners:
        first = k * self.sms // self.K
        return first, max((k + 1) * self.sms // self.K, first + 1) - first

    def _lay_tape(self) -> None:
        """Shares of every matrix, and where on the tape they are: SM after SM, matrices in order of first use."""
        self.places: dict[Matrix, tuple[int, tuple[Share, ...]]] = {}
        self.fragments: dict[Matrix, NDArray[np.int64]] = {}
        length = np.zeros(self.sms, dtype=np.int64)
        rotations: dict[Owners, int] = {}
        for matrix in self.layout.matrices:
            backbone = matrix.name != "heads" and not matrix.name.startswith("decoder_")
            owners = self.groups[matrix.expert] if backbone else self.all
            rotation = rotations[owners] = rotations.get(owners, -1) + 1
            shares = self._shares(matrix.tiles, owners[1], rotation)
            own = slice(owners[0], owners[0] + owners[1])
            self.places[matrix] = owners[0], shares
            self.fragments[matrix] = length[own].copy()
            length[own] += np.array([share.count for share in shares]) * matrix.steps
        first = np.cumsum(length) - length
        for matrix, (sm, shares) in self.places.items():
            self.fragments[matrix] += first[sm : sm + len(shares)]
        self.tape_fragments = int(length.sum())

    def _shares(self, items: int, owners: int, rotation: int) -> tuple[Share, ...]:
        """Even shares of so many items; the rotation says which owners get one more where it does not come out even."""
        key = items, owners, rotation % owners
        if key not in self._split:
            parts = [(owner + rotation) % owners for owner in range(owners)]
            bounds = [(items * u // owners, items * (u + 1) // owners) for u in parts]
            self._split[key] = tuple(Share(first, end - first) for first, end in bounds)
        return self._split[key]

    def _add(
        self,
        kind: Kind,
        name: str,
        owners: Owners,
        wait: Wait | None,
        shares: int | tuple[Share, ...],
        matrix: Matrix | None = None,
        **fields: int,
    ) -> int:
        """Append an operation and return its number. `shares`: those, or the number of items to share out evenly."""
        number = len(self.operations)
        if isinstance(shares, int):
            shares = self._shares(shares, owners[1], number)
        defaults = {"norm": -1, "bias": -1}
        names = (
            "expert", "block", "codebook", "position", "rows", "columns", "source", "target", "norm", "bias", "scale",
            "input", "output", "chunk", "shift",
        )  # fmt: skip
        fields = {field: int(fields.get(field, defaults.get(field, 0))) for field in names}
        reached = reaches(self.layout, kind.name, fields, matrix)
        operation = Operation(number, kind.name, name, *owners, wait, shares, matrix, fields, reached)
        self.operations.append(operation)
        return number

    def _after_all(self) -> Wait:
        """A wait of all SMs' next operation for everything before it."""
        return (0, self.sms, len(self.operations))

    def _chunk(self, rows: int, columns: int) -> int:
        """Columns of so many rows that are in shared memory at a time: all, or as many as fit."""
        room = self.budget // (4 * rows) - PAD
        if columns <= room:
            chunk = columns
        elif room >= 256:
            chunk = room // 256 * 256
        else:
            chunk = max(room // 64 * 64, 64)
        self.staged_bytes = max(self.staged_bytes, 4 * rows * (chunk + PAD))
        return chunk

    def _matmul(
        self,
        name: str,
        matrix: tuple[str, int, int],
        owners: Owners,
        wait: Wait | None,
        rows: int,
        norm: tuple[str, int, int] | None = None,
        bias: tuple[str, int, int] | None = None,
        **fields: int,
    ) -> int:
        found, vector = self.matrices[matrix], self.layout.vectors
        return self._add(
            Kind.matmul, name, owners, wait, self.places[found][1], found, expert=found.expert, block=found.block,
            rows=rows, columns=found.columns, norm=vector[norm][0] if norm else -1,
            bias=vector[bias][0] if bias else -1,
            scale=vector[f"scale:{found.name}", found.expert, found.block][0], chunk=self._chunk(rows, found.columns),
            **fields,
        )  # fmt: skip

    def _frame(self) -> None:
        config, layout = self.config, self.layout
        codes = config.num_codebooks * self.B * config.codebook_size
        wait = (0, self.sms, 0)
        self._add(
            Kind.noise, "noise", self.all, wait, codes // 4, rows=self.B, columns=config.codebook_size,
            output=layout.at("noise"),
        )  # fmt: skip
        if not layout.residual:
            for block in range(config.spatial_layers):
                for k in range(self.K):
                    self._backbone_block(k, block)
            for k in range(self.K):
                self._add(
                    Kind.norm, f"expert {k} norm", self.groups[k], self._after(k), self.R, expert=k, rows=self.R,
                    columns=self.d, norm=layout.vectors["final_norm", k, 0][0], input=layout.at("x", k),
                    output=layout.at("h", k),
                )  # fmt: skip
        for j in range(config.num_codebooks):
            self._codebook(j)
        if layout.residual:
            items = self.K * self.B * self.d
            self._sum_codes(Kind.sums, config.num_codebooks, layout.at("sums"), self._after_all(), items)

    def _after(self, k: int) -> Wait:
        """A wait of an expert's group for its latest operation."""
        return (*self.groups[k], self.last[k] + 1)

    def _backbone_block(self, k: int, block: int) -> None:
        R, d, group = self.R, self.d, self.groups[k]
        x, q, a, act = (self.layout.at(region, k) for region in ("x", "q", "a", "act"))

        def matmul(matrix: str, wait: Wait | None, **more: int) -> None:
            key = {"cross_query": "cross_norm", "qkv": "self_norm", "gate_value": "ffn_norm"}.get(matrix)
            norm = (key, k, block) if key else None
            bias = (f"{matrix}_bias", k, block) if matrix.startswith("cross_") else None
            name = f"expert {k} block {block} {matrix}"
            self.last[k] = self._matmul(name, (matrix, k, block), group, wait, R, norm, bias, **more)

        def attention(keys: Keys) -> None:
            self.last[k] = self._add(
                Kind.attention, f"expert {k} block {block} {keys.name} attention", group, self._after(k),
                R * self.config.n_heads, expert=k, block=block, rows=R, columns=d, source=keys, input=q, output=a,
            )  # fmt: skip

        def enter() -> None:
            self.last[k] = self._add(
                Kind.enter, f"expert {k} enter", group, None, R * d, expert=k, rows=R, columns=d,
                source=Entry.backbone, output=x,
            )  # fmt: skip

        if block == 0 and R <= _FEW_ROWS:
            # `enter`, for what is added to the input later, follows in the same phase.
            matmul("cross_query", None, source=Source.backbone_entry, target=Target.query, output=q)
            enter()
        else:
            if block == 0:
                enter()
            matmul("cross_query", self._after(k), input=x, target=Target.query, output=q)
        attention(Keys.prompt)
        matmul("cross_output", self._after(k), input=a, target=Target.add, output=x)
        matmul("qkv", self._after(k), input=x, target=Target.cache, output=q)
        attention(Keys.frames)
        matmul("self_output", self._after(k), input=a, target=Target.add, output=x)
        matmul("gate_value", self._after(k), input=x, target=Target.swiglu, output=act)
        last = block + 1 == self.config.spatial_layers
        shift = Shift.none if last else Shift.frame
        matmul("down", self._after(k), input=act, target=Target.add, output=x, shift=shift)

    def _codebook(self, j: int) -> None:
        """The residual decoder's positions that lead to codebook j, its logits and its draw."""
        config, layout, R = self.config, self.layout, self.R
        k, i = divmod(j, config.codes_per_expert)
        blocks = config.factorized_layers
        name = f"expert {k} codebook {j}"
        for block in range(blocks):
            self._decoder_block(name, j, block)
        last = R if blocks and i == 0 else 0  # of the two positions of the first pass the second one
        self._matmul(
            f"{name} heads", ("heads", k, i), self.all, self._after_all(), R,
            ("decoder_norm", k, 0) if blocks else None, codebook=j, position=i + 1 if blocks else 0,
            input=layout.at("dx", last) if blocks else layout.at("h", k), target=Target.logits,
            output=layout.at("logits", j),
        )  # fmt: skip
        draw = self._add(
            Kind.draw, f"{name} draw", self.all, self._after_all(), self.B, expert=k, codebook=j, rows=self.B,
            columns=config.codebook_size, input=layout.at("logits", j), output=layout.at("codes", j),
        )  # fmt: skip
        if j:
            # Of codes drawn before, by SMs that have nothing to draw meanwhile.
            busy = [share.count > 0 for share in self.operations[draw].shares]
            idle = [sm for sm, drawing in enumerate(busy) if not drawing] or list(range(self.sms))
            shares = [Share(0, 0)] * self.sms
            for sm, share in zip(idle, self._shares(self.K * self.B * self.d, len(idle), 0), strict=True):
                shares[sm] = share
            self._sum_codes(Kind.accumulate, j, layout.at("total", (j + 1) % 2), None, tuple(shares))

    def _sum_codes(self, kind: Kind, j: int, output: int, wait: Wait | None, shares: int | tuple[Share, ...]) -> None:
        """Embedding sums of the codes before codebook j, of all experts."""
        self._add(
            kind, f"{kind.name} before codebook {j}", self.all, wait, shares, codebook=j, rows=self.B, columns=self.d,
            input=self.layout.at("total", j % 2), output=output,
        )  # fmt: skip

    def _decoder_block(self, name: str, j: int, block: int) -> None:
        config, R, at = self.config, self.R, self.layout.at
        k, i = divmod(j, config.codes_per_expert)
        rows, position, skipped = (2 * R, 0, 0) if i == 0 else (R, i + 1, 0)
        last = block + 1 == config.factorized_layers

        def matmul(matrix: str, wait: Wait | None, norm: str | None = None, **more: int) -> None:
            key = (norm, k, block) if norm else None
            title = f"{name} block {block} {matrix}"
            self._matmul(
                title, (matrix, k, block), self.all, wait, rows, key, None, codebook=j, position=position, **more
            )  # fmt: skip

        def enter(wait: Wait | None) -> None:
            self._add(
                Kind.enter, f"{name} enter", self.all, wait, rows * self.d, expert=k, codebook=j, position=position,
                rows=rows, columns=self.d, source=Entry.decoder, output=at("dx"),
            )  # fmt: skip

        direct = block == 0 and R <= _FEW_ROWS
        if block == 0 and not direct:
            enter(self._after_all())
        source, read = (Source.decoder_entry, 0) if direct else (Source.rows, at("dx"))
        matmul(
            "decoder_qkv", self._after_all(), "attention_norm", source=source, input=read, target=Target.scratch,
            output=at("dq"),
        )  # fmt: skip
        if direct:
            enter(None)  # for what is added to the input later, in the same phase
        if last and i == 0:  # nothing reads position 0 any more
            rows, position, skipped = R, 1, R
        dx, dq, dact = at("dx", skipped), at("dq", skipped), at("dact", skipped)
        matmul(
            "decoder_output", self._after_all(), source=Source.short_attention, input=dq, target=Target.add, output=dx
        )  # fmt: skip
        matmul("decoder_gate_value", self._after_all(), "decoder_ffn_norm", input=dx, target=Target.swiglu, output=dact)
        shift = Shift.none if last else Shift.position
        matmul("decoder_down", self._after_all(), input=dact, target=Target.add, output=dx, shift=shift)
