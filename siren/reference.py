"""The plain PyTorch decoder: cached keys and values, one expert after another.

It is what one would write from the modules of layers.py for fast decoding in PyTorch, the oracle that the engines are
compared with, and the benchmark's naive arm. Everything that does not change from frame to frame is computed once:
folded embedding tables, positions, and the keys and values of each distinct prompt.

Shapes: B sequences; R rows, B of them, or 2 B with guidance (first all prompts, then as many null prompts); K experts
of m codebooks each; d = dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checkpoint import Manifest, iter_tensors
from .config import SirenConfig
from .errors import InputError
from .expert import CodeEmbedding, Expert
from .layers import attend, sinusoidal_positions
from .sampling import SamplingSettings, draw, guide, gumbel_noise, log_probability

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
_QUANTISED = ("qkv", "output", "query", "key_value", "gate_value", "down", "heads", "prompt_summary")

Cache = list[tuple[Tensor, Tensor]]  # keys and values [R, heads, length, head_dim] of each block


def round_to_int8(weight: Tensor) -> Tensor:
    """The nearest values that int8 with one scale per output channel can hold: absmax / 127, ties to even."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)


def frame_backbone(
    expert: Expert, x: Tensor, position: Tensor, frame: int, past: Cache, prompt: Cache, prompt_mask: Tensor | None
) -> Tensor:
    """One frame through an expert's backbone: x [R, 1, d] -> h [R, 1, d]; writes its keys and values into `past`."""
    for block, (keys, values), (prompt_keys, prompt_values) in zip(expert.spatial_blocks, past, prompt, strict=True):
        x = x + position
        q = block.cross_attention.queries(block.cross_norm(x))
        x = x + block.cross_attention.output(attend(q, prompt_keys, prompt_values, prompt_mask))
        q, k, v = block.self_attention.project(block.self_norm(x))
        keys[:, :, frame : frame + 1] = k
        values[:, :, frame : frame + 1] = v
        x = x + block.self_attention.output(attend(q, keys[:, :, : frame + 1], values[:, :, : frame + 1]))
        x = x + block.feed_forward(block.ffn_norm(x))
    return expert.spatial_norm(x)


def decoder_positions(expert: Expert, x: Tensor, positions: Tensor, first: int, past: Cache) -> Tensor:
    """Positions first .. first + n - 1 through the residual decoder: x [R, n, d] -> the last one's output [R, d]."""
    end = first + x.shape[1]
    for block, (keys, values) in zip(expert.factorized_blocks, past, strict=True):
        x = x + positions[first:end]
        q, k, v = block.attention.project(block.attention_norm(x))
        keys[:, :, first:end] = k
        values[:, :, first:end] = v
        if block is expert.factorized_blocks[-1]:
            q, x = q[:, :, -1:], x[:, -1:]  # nothing reads the other positions any more
        mixed = attend(q, keys[:, :, :end], values[:, :, :end], causal=q.shape[2] > 1)
        x = x + block.attention.output(mixed)
        x = x + block.feed_forward(block.ffn_norm(x))
    return expert.factorized_norm(x[:, -1])


class ReferenceDecoder:
    """Experts ready to decode. Arguments are checked by siren.Sampler, not here.

    `weights`: "fp32"; "bf16" (modules, tables and activations; norms inside and logits fp32); "int8" (values rounded
    to int8, computed in fp32: it shows the numerics, not the speed). `compiled` runs the two functions of tensors
    above through torch.compile. Threads may share one: only `load_expert` changes it, while no other call is under way.
    """

    def __init__(
        self,
        config: SirenConfig,
        experts: Iterable[tuple[int, Mapping[str, Tensor]]],
        weights: str = "fp32",
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> None:
        if weights not in _DTYPES:
            raise InputError(f"weights must be one of {', '.join(_DTYPES)}, not {weights!r}")
        self.config, self.weights, self.device, self.dtype = config, weights, torch.device(device), _DTYPES[weights]
        # A single bf16 query is slow in PyTorch's CPU attention: 250 keys of 16 heads took 600 us (2 cores, AVX-512
        # BF16) against 90 us in fp32. So on a CPU the caches are fp32.
        self.cache_dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        self.experts: list[Expert] = []
        shape = (config.num_experts, config.num_codebooks, config.codebook_size, config.dim)
        self.tables = torch.empty(shape, dtype=self.dtype, device=self.device)
        for k, (start_codebook, state) in enumerate(experts):
            if start_codebook != k * config.codes_per_expert:
                raise InputError(f"expert {k} must start at codebook {k * config.codes_per_expert}")
            with torch.device("meta"):
                expert = Expert(config, start_codebook)
            expert.load_state_dict({name: self._convert(name, value) for name, value in state.items()}, assign=True)
            with torch.no_grad():
                self.tables[k] = expert.tables()
            del expert.codebooks  # folded into the tables
            self.experts.append(expert.eval().requires_grad_(False))
        if len(self.experts) != config.num_experts:
            raise InputError(f"expected {config.num_experts} experts, got {len(self.experts)}")
        positions = sinusoidal_positions(config.codes_per_expert + 1, config.dim)
        self.decoder_positions = positions.to(self.device, self.dtype)
        self.run_backbone = torch.compile(frame_backbone) if compiled else frame_backbone
        self.run_decoder = torch.compile(decoder_positions) if compiled else decoder_positions

    @classmethod
    def from_folder(
        cls, manifest: Manifest, weights: str = "fp32", device: torch.device | str = "cpu", compiled: bool = False
    ) -> ReferenceDecoder:
        """Build from a checkpoint, one expert in memory at a time beside those already converted."""
        states = ((entry.start_codebook, dict(iter_tensors(entry, manifest.config))) for entry in manifest.experts)
        return cls(manifest.config, states, weights, device, compiled)

    @torch.inference_mode()
    def load_expert(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write these weights over those of expert `index`, tensor by tensor. No other call may be under way."""
        expert = self.experts[index]
        with torch.autocast(self.device.type, enabled=False):
            self._load_tables(index, tensors)
        for name, parameter in expert.named_parameters():
            parameter.copy_(self._convert(name, tensors[name]))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # other threads may have streams of their own

    def _load_tables(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        for j in range(self.config.num_codebooks):
            with torch.device("meta"):
                layer = CodeEmbedding(self.config)
            names = {part: f"codebooks.layers.{j}.{part}" for part in layer.state_dict()}
            layer.load_state_dict({p: self._convert(name, tensors[name]) for p, name in names.items()}, assign=True)
            self.tables[index, j] = layer.table()

    def _convert(self, name: str, value: Tensor) -> Tensor:
        """A private copy on the device. The embeddings' factors stay fp32: their product is rounded once, folded."""
        dtype = torch.float32 if name.startswith("codebooks.") else self.dtype
        value = value.detach().to(self.device, dtype, copy=True)
        parts = name.split(".")
        if self.weights == "int8" and parts[-1] == "weight" and any(part in _QUANTISED for part in parts):
            value = round_to_int8(value)
        return value

    def describe(self) -> dict[str, Any]:
        """What runs and where."""
        tensors = [self.tables, *(tensor for expert in self.experts for tensor in expert.state_dict().values())]
        return {
            "backend": "reference",
            "weights": self.weights,
            "device": str(self.device),
            "instructions": torch.backends.cpu.get_cpu_capability() if self.device.type == "cpu" else "cuda",
            "threads": torch.get_num_threads(),
            "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            "compiled": self.run_backbone is not frame_backbone,
        }

    def new_cache(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Room for the keys and values of one block's self-attention."""
        shape = (2, rows, self.config.n_kv_heads, length, self.config.head_dim)
        keys, values = torch.empty(shape, dtype=self.cache_dtype, device=self.device)
        return keys, values

    @torch.inference_mode()
    def start(
        self, prompt: Tensor, prompt_mask: Tensor, seeds: NDArray[np.uint64], settings: SamplingSettings
    ) -> ReferenceState:
        """Prefill: prompt float32 [B, P, prompt_dim], prompt_mask bool [B, P], seeds [B] -> a state at frame 0."""
        return ReferenceState(self, prompt, prompt_mask, seeds, settings)

    def residual(
        self,
        h: Tensor,
        start: Tensor,
        seeds: NDArray[np.uint64],
        frame: NDArray[np.int64],
        settings: SamplingSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All of a frame after the backbones: h and start float32 [K, B, d], seeds and frame [B].

        Returns codes int64 [B, num_codebooks], log-probabilities float32 [B, num_codebooks] and the next frame's
        backbone inputs float32 [K, B, d].
        """
        with torch.inference_mode():
            pick = Draw(self, seeds, frame, settings)
            inputs = self.codes_of_frame(h.to(self.device, self.dtype), start.to(self.device), len(seeds), pick)
        # Copies made out here are ordinary tensors, which autograd may save.
        return pick.codes.cpu().clone(), pick.logprobs.cpu().clone(), inputs.cpu().clone()

    def codes_of_frame(
        self, hidden: Tensor, start: Tensor, batch: int, pick: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        """The residual decoders, one expert after another: hidden [K, R, d], start float32 [K, R, d].

        `pick(codebook, logits float32 [R, V])` says the codes int64 [B]. Returns the sum of the frame's embeddings,
        float32 [K, B, d]: the next frame's backbone inputs, and on the way there the accumulated condition (eq. 5).
        """
        config = self.config
        rows = hidden.shape[1]
        total = torch.zeros(config.num_experts, batch, config.dim, device=self.device)
        latest = total
        past = [self.new_cache(rows, config.codes_per_expert + 1) for _ in range(config.factorized_layers)]
        for k, expert in enumerate(self.experts):
            for i, head in enumerate(expert.heads):
                x = hidden[k]
                if config.factorized_layers:
                    conditioned = start[k]
                    if config.conditioning != "none":
                        known = total if config.conditioning == "accumulated" else latest
                        conditioned = (conditioned.view(-1, batch, config.dim) + known[k]).view(rows, config.dim)
                    conditioned = conditioned.to(self.dtype)
                    # Positions 0 and 1 go through the weights together.
                    x = torch.stack((x, conditioned), dim=1) if i == 0 else conditioned.unsqueeze(1)
                    x = self.run_decoder(expert, x, self.decoder_positions, i + 1 if i else 0, past)
                codebook = expert.start_codebook + i
                codes = pick(codebook, head(x).float())
                latest = self.tables[:, codebook, codes]
                total = total + latest
        return total


class Draw:
    """Draws the codes of one frame, codebook by codebook. The noise of all codebooks is computed at once."""

    def __init__(
        self,
        decoder: ReferenceDecoder,
        seeds: NDArray[np.uint64],
        frame: int | NDArray[np.int64],
        settings: SamplingSettings,
    ) -> None:
        self.frame, self.settings = frame, settings
        count, size = decoder.config.num_codebooks, decoder.config.codebook_size
        self.noise: Tensor | None = None
        if settings.temperature:
            self.noise = gumbel_noise(seeds, frame, range(count), size).to(decoder.device)
        self.codes = torch.empty(len(seeds), count, dtype=torch.int64, device=decoder.device)
        self.logprobs = torch.empty(len(seeds), count, device=decoder.device)

    def __call__(self, codebook: int, logits: Tensor) -> Tensor:
        noise = None if self.noise is None else self.noise[:, codebook]
        codes, logprobs = draw(guide(logits, self.settings), noise, self.settings, self.frame, codebook)
        self.codes[:, codebook] = codes
        self.logprobs[:, codebook] = logprobs
        return codes


class Force:
    """Takes the codes of one frame as given [B, num_codebooks] and keeps their logits."""

    def __init__(self, codes: Tensor, size: int, frame: int, settings: SamplingSettings) -> None:
        self.codes, self.frame, self.settings = codes, frame, settings
        self.logits = torch.empty(*codes.shape, size, device=codes.device)
        self.logprobs = torch.empty(codes.shape, device=codes.device)

    def __call__(self, codebook: int, logits: Tensor) -> Tensor:
        logits, codes = guide(logits, self.settings), self.codes[:, codebook]
        self.logits[:, codebook] = logits
        self.logprobs[:, codebook] = log_probability(logits, codes, self.settings, self.frame, codebook)
        return codes


class ReferenceState:
    """Sequences being decoded. A frame counts once all of its codes are there, so an interrupted step loses nothing."""

    def __init__(
        self,
        decoder: ReferenceDecoder,
        prompt: Tensor,
        prompt_mask: Tensor,
        seeds: NDArray[np.uint64],
        settings: SamplingSettings,
    ) -> None:
        config = decoder.config
        self.decoder, self.seeds, self.settings = decoder, seeds, settings
        self.batch, self.frame, self.capacity = len(seeds), 0, 0
        self.rows = self.batch * (2 if settings.guided else 1)
        self._codes = torch.empty(self.batch, config.num_codebooks, 0, dtype=torch.int64)
        self._logprobs = torch.empty(self.batch, config.num_codebooks, 0)
        self.inputs: Tensor | None = None  # embedding sums of the latest frame, float32 [K, B, d]
        self.past = [[decoder.new_cache(self.rows, 0) for _ in expert.spatial_blocks] for expert in decoder.experts]

        tokens, mask, index = distinct_prompts(prompt, prompt_mask, settings.guided)
        tokens, mask, index = (tensor.to(decoder.device) for tensor in (tokens, mask, index))
        tokens = tokens.to(decoder.dtype)
        self.prompt_mask = None if bool(mask.all()) else mask[index][:, None, None, :]
        self.prompts: list[Cache] = []
        starts = []
        for expert in decoder.experts:
            cache: Cache = []
            for block in expert.spatial_blocks:
                keys, values = block.cross_attention.keys_values(tokens)
                cache.append((keys.to(decoder.cache_dtype)[index], values.to(decoder.cache_dtype)[index]))
            self.prompts.append(cache)
            if config.factorized_layers:
                starts.append(expert.decoder_start(tokens, mask)[index, 0].float())
        shape = (config.num_experts, self.rows, 0)  # without a residual decoder nothing reads it
        self.start = torch.stack(starts) if starts else torch.empty(shape, device=decoder.device)

    @property
    def codes(self) -> Tensor:
        """int64 [B, num_codebooks, frame], on the CPU."""
        return self._codes[:, :, : self.frame].clone()

    @property
    def logprobs(self) -> Tensor:
        """float32 [B, num_codebooks, frame], on the CPU."""
        return self._logprobs[:, :, : self.frame].clone()

    @torch.inference_mode()
    def step(self, frames: int, on_frame: Callable[[int, int], None] | None = None) -> None:
        """Draw `frames` more frames; on_frame(done, frames) is called after each."""
        self._reserve(self.frame + frames)
        for done in range(1, frames + 1):
            self._advance(Draw(self.decoder, self.seeds, self.frame, self.settings))
            if on_frame is not None:
                on_frame(done, frames)

    @torch.inference_mode()
    def force(self, codes: Tensor) -> Tensor:
        """Advance with these codes int64 [B, num_codebooks, n] -> logits float32 [B, num_codebooks, n, V]."""
        self._reserve(self.frame + codes.shape[2])
        logits = []
        for given in codes.to(self.decoder.device).unbind(dim=2):
            pick = Force(given, self.decoder.config.codebook_size, self.frame, self.settings)
            self._advance(pick)
            logits.append(pick.logits)
        return torch.stack(logits, dim=2).cpu()

    @torch.inference_mode()
    def select(self, indices: list[int], seeds: NDArray[np.uint64] | None = None) -> None:
        """Keep, repeat or drop sequences. Their seeds go with them, unless new ones are given."""
        rows = indices + [self.batch + index for index in indices] if self.settings.guided else indices
        index = torch.tensor(rows, device=self.decoder.device)
        self.past = [[(k[index], v[index]) for k, v in cache] for cache in self.past]
        self.prompts = [[(k[index], v[index]) for k, v in cache] for cache in self.prompts]
        self.prompt_mask = None if self.prompt_mask is None else self.prompt_mask[index]
        self.start = self.start[:, index]
        self.inputs = None if self.inputs is None else self.inputs[:, index[: len(indices)]]
        self.seeds = self.seeds[indices] if seeds is None else seeds
        self._codes, self._logprobs = self._codes[indices], self._logprobs[indices]
        self.batch, self.rows = len(indices), len(rows)

    def _advance(self, pick: Draw | Force) -> None:
        decoder, frame = self.decoder, self.frame
        hidden = []
        for k, expert in enumerate(decoder.experts):
            if self.inputs is None:
                x = expert.sos.repeat(self.rows, 1, 1)
            else:
                x = self.inputs[k].to(decoder.dtype).repeat(self.rows // self.batch, 1).unsqueeze(1)
            position, past = self.positions[frame], self.past[k]
            hidden.append(
                decoder.run_backbone(expert, x, position, frame, past, self.prompts[k], self.prompt_mask)[:, 0]
            )
        self.inputs = decoder.codes_of_frame(torch.stack(hidden), self.start, self.batch, pick)
        self._codes[:, :, frame] = pick.codes
        self._logprobs[:, :, frame] = pick.logprobs
        self.frame += 1

    def _reserve(self, frames: int) -> None:
        """Room for this many frames in all. Doubling keeps the copies of a long stream of short steps linear."""
        if frames <= self.capacity:
            return
        decoder, used = self.decoder, self.frame
        self.capacity = max(frames, 2 * self.capacity)
        for past in self.past:
            for i, old in enumerate(past):
                # One spare frame: torch.compile would make a special case of a cache that is read to its end.
                past[i] = decoder.new_cache(self.rows, self.capacity + 1)
                for grown, cache in zip(past[i], old, strict=True):
                    grown[:, :, :used] = cache[:, :, :used]
        shape = (self.batch, decoder.config.num_codebooks, self.capacity)
        codes, logprobs = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        codes[:, :, :used], logprobs[:, :, :used] = self.codes, self.logprobs
        self._codes, self._logprobs = codes, logprobs
        self.positions = sinusoidal_positions(self.capacity, decoder.config.dim).to(decoder.device, decoder.dtype)


def distinct_prompts(prompt: Tensor, prompt_mask: Tensor, guided: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts [U, P', D] that differ, their masks [U, P'] and, for every row [R], which of them is its own.

    Padding is zeroed and cut off where no prompt has tokens. With guidance every sequence has a second row, whose
    prompt is a single zero token.
    """
    tokens = prompt.masked_fill(~prompt_mask.unsqueeze(-1), 0)
    mask = prompt_mask
    if guided:
        null = torch.zeros_like(mask[:1])
        null[:, 0] = True
        tokens, mask = torch.cat((tokens, torch.zeros_like(tokens[:1]))), torch.cat((mask, null))
    tokens, mask = (tensor[:, : int(mask.any(dim=0).nonzero()[-1]) + 1] for tensor in (tokens, mask))
    seen: dict[bytes, int] = {}
    keys = (row.numpy().tobytes() + valid.numpy().tobytes() for row, valid in zip(tokens, mask, strict=True))
    index = torch.tensor([seen.setdefault(key, len(seen)) for key in keys])
    first = torch.tensor([int((index == i).nonzero()[0]) for i in range(len(seen))])
    if guided:
        index = torch.cat((index[:-1], index[-1:].expand(len(prompt))))
    return tokens[first], mask[first], index
