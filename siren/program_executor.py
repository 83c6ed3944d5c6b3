"""The persistent CUDA kernel's executable specification: each operation of a program in plain PyTorch, in float32.

An operation runs as a whole, for all the SMs that share it, and writes exactly the elements that the kernel's SMs
write together: a wrong kernel is found by comparing the state after each operation. Where the numbers lie is taken from
the operation, as the kernel does, so a wrong program shows as well. Notation as in program.h: R rows, B sequences,
K experts of m codebooks, J codebooks of V codes, d dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import silu

from .program import Entry, Keys, Kind, Matrix, Operation, Program, Shift, Source, Target
from .sampling import SamplingSettings, draw, guide, gumbel_noise, log_probability


@dataclass
class State:
    """Everything that operations read and write, on the CPU; `regions` are the program's, [name] -> (offset, shape).

    Seeds and noise_frames are unsigned numbers, held as the bits of signed ones.
    """

    regions: Mapping[str, tuple[int, tuple[int, ...]]]
    arena: Tensor  # float32 [arena_floats]; the region `codes` holds the bits of int32
    keys: Tensor  # bf16 [K, backbone_blocks, R, kv_heads, capacity, head_dim]
    values: Tensor
    prompt_keys: Tensor  # bf16 [K, backbone_blocks, prompts, heads, prompt_capacity, head_dim]
    prompt_values: Tensor
    prompt_index: Tensor  # int32 [R]: which prompt is a row's
    prompt_length: Tensor  # int32 [prompts]
    seeds: Tensor  # int64 [B]
    noise_frames: Tensor  # int32 [B]: the number that the launch's first frame has for the noise
    forced: Tensor | None  # int32 [frames, J, B]: codes that are taken instead of drawn
    codes_out: Tensor  # int32 [frames, J, B]
    logprobs_out: Tensor  # float32 [frames, J, B]; NaN: the logits could not be drawn from

    def view(self, region: str) -> Tensor:
        """A region of the arena in its shape; writing to it writes to the arena."""
        offset, shape = self.regions[region]
        flat = self.arena[offset : offset + math.prod(shape)]
        return (flat.view(torch.int32) if region == "codes" else flat).view(shape)


def new_state(
    program: Program,
    frames: int,
    seeds: NDArray[np.uint64],
    prompts: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    capacity: int | None = None,
    noise_frames: NDArray[np.uint32] | None = None,
    forced: Tensor | None = None,
) -> State:
    """A state for a launch of `frames` frames in which nothing has been written: floats are NaN, codes -1.

    prompts: keys, values, index and length as in State, unless the program has no backbones; capacity: frames that
    the caches have room for (default: `frames`); noise_frames: default 0.
    """
    config, codebooks, rows = program.config, program.config.num_codebooks, program.rows
    blocks = 0 if program.residual else config.spatial_layers
    shape = (config.num_experts, blocks, rows, config.n_kv_heads, capacity or frames, config.head_dim)
    if prompts is None:
        nothing = torch.empty((0,) * len(shape), dtype=torch.bfloat16)
        prompts = nothing, nothing, torch.zeros(rows), torch.zeros(0)
    prompt_keys, prompt_values, index, length = prompts
    first = np.zeros(program.sequences, np.uint32) if noise_frames is None else noise_frames
    state = State(
        regions=program.regions,
        arena=torch.full((program.arena_floats,), math.nan),
        keys=torch.full(shape, math.nan, dtype=torch.bfloat16),
        values=torch.full(shape, math.nan, dtype=torch.bfloat16),
        prompt_keys=prompt_keys,
        prompt_values=prompt_values,
        prompt_index=index.to(torch.int32),
        prompt_length=length.to(torch.int32),
        seeds=torch.from_numpy(seeds.astype(np.uint64).view(np.int64)),
        noise_frames=torch.from_numpy(first.astype(np.uint32).view(np.int32)),
        forced=forced,
        codes_out=torch.full((frames, codebooks, program.sequences), -1, dtype=torch.int32),
        logprobs_out=torch.full((frames, codebooks, program.sequences), math.nan),
    )
    state.view("codes").fill_(-1)
    return state


class Executor:
    """Runs operations of one program with one model's weights.

    matrices: float32 [outputs, columns] each, in their own row order, scales applied; vectors: float32, laid out as
    the program says; tables: bf16 [K, J, V, d]; sos: float32 [K, d]; positions: float32 [frames or more, d].
    """

    def __init__(
        self,
        program: Program,
        matrices: Mapping[Matrix, Tensor],
        vectors: Tensor,
        tables: Tensor,
        sos: Tensor,
        positions: Tensor,
        settings: SamplingSettings,
    ) -> None:
        self.program, self.config, self.settings = program, program.config, settings
        self.matrices, self.vectors, self.tables, self.sos, self.positions = matrices, vectors, tables, sos, positions

    @torch.inference_mode()
    def run(self, operation: Operation, state: State, first_frame: int, frame: int) -> None:
        """One operation in frame `frame` of a launch that began at the session's frame `first_frame`."""
        fields, position = operation.fields, first_frame + frame
        match Kind[operation.kind]:
            case Kind.noise:
                self._noise(state, frame)
            case Kind.enter:
                self._enter(fields, state, position)
            case Kind.accumulate | Kind.sums:
                self._add_up(fields, state)
            case Kind.matmul:
                assert operation.matrix is not None
                self._matmul(fields, operation.matrix, state, position)
            case Kind.attention:
                self._attention(fields, state, position)
            case Kind.norm:
                self._norm(fields, state)
            case Kind.draw:
                self._draw(fields, state, frame)

    # ---- one function for each kind of operation --------------------------------------------------------------------

    def _noise(self, state: State, frame: int) -> None:
        """Gumbel noise of the frame's draws."""
        if self.settings.temperature == 0 or state.forced is not None:
            return
        seeds = state.seeds.numpy().view(np.uint64)
        frames = (state.noise_frames.numpy().view(np.uint32) + np.uint64(frame)) % (1 << 32)
        noise = gumbel_noise(seeds, frames, range(self.config.num_codebooks), self.config.codebook_size)
        state.view("noise").copy_(noise.transpose(0, 1))

    def _enter(self, f: Mapping[str, int], state: State, position: int) -> None:
        """What a backbone or a residual decoder reads first."""
        backbone = Entry(f["source"]) is Entry.backbone
        entry = self._backbone_entry(f, state, position) if backbone else self._decoder_entry(f, state)
        _rows(state, f["output"], *entry.shape).copy_(entry)

    def _add_up(self, f: Mapping[str, int], state: State) -> None:
        """The embedding sums of all codes before a codebook, for all experts."""
        sums = self._sum_before(state, f["codebook"]).flatten(0, 1)
        _rows(state, f["output"], *sums.shape).copy_(sums)

    def _matmul(self, f: Mapping[str, int], matrix: Matrix, state: State, position: int) -> None:
        """y = Wx (+ b), with what comes before it (the source, a norm) and after it (the target)."""
        dim, rows = self.config.dim, f["rows"]
        match Source(f["source"]):
            case Source.rows:
                x = _rows(state, f["input"], rows, matrix.columns)
            case Source.short_attention:
                x = self._short_attention(f, state)
            case Source.backbone_entry:
                x = self._backbone_entry(f, state, position)
            case Source.decoder_entry:
                x = self._decoder_entry(f, state)
        if f["norm"] >= 0:
            x = self._rms_norm(x, f["norm"])
        y = x @ self.matrices[matrix].T
        if f["bias"] >= 0:
            y = y + self.vectors[f["bias"] : f["bias"] + matrix.outputs]

        match Target(f["target"]):
            case Target.query:
                _rows(state, f["output"], rows, matrix.outputs).copy_(y)
            case Target.add:
                if Shift(f["shift"]) is Shift.frame:
                    y = y + self.positions[position]
                elif Shift(f["shift"]) is Shift.position:
                    y = y + self._position_of_rows(f)
                _rows(state, f["output"], rows, matrix.outputs).add_(y)
            case Target.swiglu:
                gate, value = y.chunk(2, dim=-1)
                _rows(state, f["output"], rows, matrix.outputs // 2).copy_(silu(gate) * value)
            case Target.cache:
                _rows(state, f["output"], rows, dim).copy_(y[:, :dim])
                keys_values = y[:, dim:].view(rows, 2, self.config.n_kv_heads, self.config.head_dim)
                state.keys[f["expert"], f["block"], :, :, position] = keys_values[:, 0].to(torch.bfloat16)
                state.values[f["expert"], f["block"], :, :, position] = keys_values[:, 1].to(torch.bfloat16)
            case Target.scratch:
                _rows(state, f["output"], rows, dim).copy_(y[:, :dim])
                positions = slice(f["position"], f["position"] + rows // self.program.rows)
                keys_values = state.view("dkv")[f["block"], positions]
                keys_values.copy_(y[:, dim:].view_as(keys_values))
            case Target.logits:
                logits = guide(y, self.settings)
                _rows(state, f["output"], *logits.shape).copy_(logits)

    def _attention(self, f: Mapping[str, int], state: State, position: int) -> None:
        """A backbone's attention to the prompt, or to its frames up to this one."""
        config, rows, place = self.config, f["rows"], (f["expert"], f["block"])
        queries = _rows(state, f["input"], rows, config.dim).view(rows, config.n_heads, config.head_dim)
        mixed = torch.empty_like(queries)
        for row in range(rows):
            if Keys(f["source"]) is Keys.prompt:
                prompt = int(state.prompt_index[row])
                length = int(state.prompt_length[prompt])
                keys, values = state.prompt_keys[place][prompt], state.prompt_values[place][prompt]
            else:
                length = position + 1
                keys, values = state.keys[place][row], state.values[place][row]
            mixed[row] = attend(queries[row], keys[:, :length].float(), values[:, :length].float())
        _rows(state, f["output"], rows, config.dim).copy_(mixed.view(rows, config.dim))

    def _norm(self, f: Mapping[str, int], state: State) -> None:
        """The backbone's outputs."""
        normed = self._rms_norm(_rows(state, f["input"], f["rows"], self.config.dim), f["norm"])
        _rows(state, f["output"], *normed.shape).copy_(normed)

    def _draw(self, f: Mapping[str, int], state: State, frame: int) -> None:
        """The codes of one codebook, or the given ones, and their log-probabilities."""
        codebook = f["codebook"]
        logits = state.view("logits")[codebook]
        scaled = logits / self.settings.temperature if self.settings.temperature else logits
        good = scaled.amax(dim=-1).isfinite()  # the maximum is NaN or infinite wherever the row cannot be drawn from
        logits = torch.where(good.unsqueeze(-1), logits, 0)
        if state.forced is not None:
            codes = state.forced[frame, codebook].long()
            logprobs = log_probability(logits, codes, self.settings)
        else:
            codes, logprobs = draw(logits, state.view("noise")[codebook], self.settings)
        codes, logprobs = torch.where(good, codes, 0).int(), torch.where(good, logprobs, math.nan)
        state.view("codes")[codebook] = codes
        state.codes_out[frame, codebook] = codes
        state.logprobs_out[frame, codebook] = logprobs

    # ---- what they are made of --------------------------------------------------------------------------------------

    def _sum_before(self, state: State, codebook: int) -> Tensor:
        """Embedding sums [K, B, d] of the latest codes of all codebooks before this one, which is not the first."""
        sums = self._embedding(state, codebook - 1)
        return state.view("total")[codebook & 1] + sums if codebook > 1 else sums

    def _embedding(self, state: State, codebook: int) -> Tensor:
        """What the latest codes of a codebook are to each expert: [K, B, d]."""
        return self.tables[:, codebook, state.view("codes")[codebook].long()].float()

    def _backbone_entry(self, f: Mapping[str, int], state: State, position: int) -> Tensor:
        """What a backbone reads first: [R, d]."""
        if position == 0:
            x = self.sos[f["expert"]].expand(f["rows"], -1)
        else:
            sums = self._sum_before(state, self.config.num_codebooks)[f["expert"]]
            x = sums.repeat(f["rows"] // self.program.sequences, 1)
        return x + self.positions[position]

    def _decoder_entry(self, f: Mapping[str, int], state: State) -> Tensor:
        """What a residual decoder reads first: [2 R, d], positions 0 and 1, or [R, d], one later position."""
        expert, codebook, conditioning = f["expert"], f["codebook"], self.config.conditioning
        x = state.view("start")[expert]
        if codebook > 0 and conditioning != "none":
            accumulated = conditioning == "accumulated"
            known = self._sum_before(state, codebook) if accumulated else self._embedding(state, codebook - 1)
            x = x + known[expert].repeat(self.program.rows // self.program.sequences, 1)
        if f["position"] == 0:
            x = torch.cat((state.view("h")[expert], x))
        return x + self._position_of_rows(f)

    def _position_of_rows(self, f: Mapping[str, int]) -> Tensor:
        """The position vector of each row in a residual decoder: [rows, d]."""
        rows, first = self.program.rows, f["position"]
        return self.positions[first : first + f["rows"] // rows].repeat_interleave(rows, dim=0)

    def _short_attention(self, f: Mapping[str, int], state: State) -> Tensor:
        """Attention among the positions of a residual decoder: each row's up to its own. [rows, d]."""
        config, rows, count = self.config, self.program.rows, f["rows"]
        queries = _rows(state, f["input"], count, config.dim).view(count, config.n_heads, config.head_dim)
        shape = (-1, rows, 2, config.n_kv_heads, config.head_dim)  # [position, row, keys or values, head, column]
        keys_values = state.view("dkv")[f["block"]].view(shape)
        mixed = torch.empty_like(queries)
        for i in range(count):
            seen = keys_values[: f["position"] + i // rows + 1, i % rows].permute(1, 2, 0, 3)
            mixed[i] = attend(queries[i], seen[0], seen[1])
        return mixed.view(count, config.dim)

    def _rms_norm(self, x: Tensor, offset: int) -> Tensor:
        weight = self.vectors[offset : offset + self.config.dim]
        return x * (x.square().mean(dim=-1, keepdim=True) + self.config.norm_eps).rsqrt() * weight


def _rows(state: State, offset: int, rows: int, columns: int) -> Tensor:
    """Rows of the arena from an offset on; writing to them writes to the arena."""
    return state.arena[offset : offset + rows * columns].view(rows, columns)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Queries [heads, head_dim] to keys and values [kv_heads, length, head_dim] -> [heads, head_dim]."""
    heads, head_dim = queries.shape
    grouped = queries.view(len(keys), heads // len(keys), head_dim)  # a key's queries follow one another
    weights = (grouped @ keys.transpose(1, 2) / math.sqrt(head_dim)).softmax(dim=-1)
    return (weights @ values).reshape(heads, head_dim)
