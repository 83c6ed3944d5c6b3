"""The weights of all experts as the persistent CUDA kernel reads them, and the launches' arguments that come from them.

The matrices of a frame are on the tape of siren/tape.py, norms, biases and scales in one vector beside it, embedding
tables in bfloat16. What reads the prompts, once in a session, is kept as plain matrices. On the CPU all of it is the
same, for the kernel's emulator.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoint import expected_shapes
from .config import SirenConfig
from .engine import folded_tensors, free_memory
from .errors import BackendError, CheckpointError, InputError
from .layers import sinusoidal_positions
from .program import Matrix, Program, build_program
from .program_format import MAX_ROWS, Conditioning, Format
from .tape import DTYPES, kernel_order, pack_matrix, quantise, tape_bytes

FORMATS = tuple(Format.__members__)
_POLLS = 1 << 22  # of a wait in the kernel before it gives up

# Where a checkpoint's tensor goes: a matrix of the program, or a part of its vectors.
_BACKBONE_MATRICES = {
    "cross_attention.query.weight": "cross_query",
    "cross_attention.output.weight": "cross_output",
    "self_attention.qkv.weight": "qkv",
    "self_attention.output.weight": "self_output",
    "feed_forward.gate_value.weight": "gate_value",
    "feed_forward.down.weight": "down",
}
_BACKBONE_VECTORS = {
    "cross_norm.weight": "cross_norm",
    "self_norm.weight": "self_norm",
    "ffn_norm.weight": "ffn_norm",
    "cross_attention.query.bias": "cross_query_bias",
    "cross_attention.output.bias": "cross_output_bias",
}
_DECODER_MATRICES = {
    "attention.qkv.weight": "decoder_qkv",
    "attention.output.weight": "decoder_output",
    "feed_forward.gate_value.weight": "decoder_gate_value",
    "feed_forward.down.weight": "decoder_down",
}
_DECODER_VECTORS = {"attention_norm.weight": "attention_norm", "ffn_norm.weight": "decoder_ffn_norm"}


def settle(device: torch.device) -> None:
    """Wait for what this thread has begun: other threads may have streams of their own."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _free_bytes(device: torch.device) -> float:
    """Memory that is free, infinite where the system does not say."""
    if device.type != "cuda":
        return free_memory()
    free, _ = torch.cuda.mem_get_info(device)
    # What PyTorch keeps to use again counts too.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@dataclass(frozen=True)
class Plan:
    """A program, and its instructions where the kernel reads them. Its CudaWeights keeps it for as long as it lives."""

    program: Program
    instructions: Tensor  # int32 [n, 32]
    starts: Tensor  # int32 [sms + 1]


class _Stored:
    """Matrices that PyTorch multiplies, in the format of the weights: [..., outputs, columns]."""

    def __init__(self, shape: tuple[int, ...], weights: str, device: torch.device) -> None:
        self.weights = weights
        self.values = torch.zeros(shape, dtype=DTYPES[weights], device=device)
        self.scales = None if weights == "bf16" else torch.zeros(shape[:-1], device=device)

    def put(self, place: tuple[int, ...], value: Tensor) -> None:
        values, scales = quantise(value, self.weights)
        self.values[place] = values
        if self.scales is not None and scales is not None:
            self.scales[place] = scales

    def get(self, place: tuple[int, ...]) -> Tensor:
        """In float32."""
        value = self.values[place].float()
        return value if self.scales is None else value * self.scales[place].unsqueeze(-1)

    @property
    def bytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


class CudaWeights:
    """Weights "bf16", "int8" (symmetric) or "fp8" (e4m3), both with a scale for each output; tables and caches bf16.

    `experts` gives (start_codebook, tensors under their checkpoint's names), one expert at a time. `sms`
    multiprocessors of `shared_bytes` of shared memory each are what programs are made for. `residual`: only what a
    frame needs after its backbones. Raises BackendError where the model does not fit the kernel or the memory.
    """

    def __init__(
        self,
        config: SirenConfig,
        experts: Iterable[tuple[int, Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]]],
        weights: str,
        device: torch.device,
        sms: int,
        shared_bytes: int,
        residual: bool = False,
    ) -> None:
        self.config, self.kind, self.device, self.residual = config, weights, device, residual
        self.sms, self.shared_bytes = sms, shared_bytes
        self._plans: dict[tuple[int, bool], Plan] = {}
        self._lock = threading.Lock()
        program = self.plan(1, False).program
        self._places = {(matrix.name, matrix.expert, matrix.block): matrix for matrix in program.matrices}
        self._program = program  # tape and vectors are laid out alike in all of them
        self._check_memory(program)
        count, d = config.num_experts, config.dim
        blocks = 0 if residual else config.spatial_layers
        summaries = 0 if residual else count
        self.tape = torch.zeros(tape_bytes(program, weights), dtype=torch.uint8, device=device)
        self.vectors = torch.zeros(program.vector_floats, device=device)
        shape = (count, config.num_codebooks, config.codebook_size, d)
        self.tables = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.sos = torch.zeros(count, d, device=device)
        longest = max(config.max_seq_len, config.codes_per_expert + 1)
        self.positions = sinusoidal_positions(longest, d).contiguous().to(device)
        self._key_value = _Stored((blocks, count, 2 * d, config.prompt_dim), weights, device)
        self._key_value_bias = torch.zeros(blocks, count, 2 * d, device=device)
        self._summary = _Stored((summaries, d, config.prompt_dim), weights, device)
        self._start = torch.zeros(count, d, device=device)
        self._load(experts)
        settle(device)

    @property
    def bytes(self) -> int:
        """Of all weights on the device."""
        tensors = (self.tape, self.vectors, self.tables, self.sos, self.positions, self._key_value_bias, self._start)
        return sum(tensor.nbytes for tensor in tensors) + self._key_value.bytes + self._summary.bytes

    def plan(self, sequences: int, guided: bool) -> Plan:
        """The program of this many sequences, made at its first use. Threads may share it."""
        most = MAX_ROWS // 2  # a residual decoder begins with two positions in one pass
        if sequences * (2 if guided else 1) > most:
            raise InputError(
                f"backend 'cuda' decodes at most {most} sequences at a time, with guidance {most // 2}, "
                f"and was given {sequences}: split the batch, or use backend 'triton'"
            )
        with self._lock:
            key = (sequences, guided)
            if key not in self._plans:
                program = build_program(self.config, sequences, guided, self.sms, self.shared_bytes, self.residual)
                tables = (torch.from_numpy(array).to(self.device) for array in (program.instructions, program.starts))
                self._plans[key] = Plan(program, *tables)
            return self._plans[key]

    @torch.inference_mode()  # where the weights themselves may have been made
    def load_expert(self, k: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of expert k, under their checkpoint's names, where launches read them: addresses stay."""
        self._put_all(k, tensors.items())
        settle(self.device)

    def arguments(self, plan: Plan) -> dict[str, Any]:
        """Fields of csrc/cuda/program.h's Arguments that do not change from launch to launch of a plan.

        They are addresses in this object's tensors and the plan's: whoever launches keeps this object until the launch
        has ended, and beside it the memory of the fields that it adds.
        """
        config, program = self.config, plan.program
        offsets = {
            name: program.regions[name][0] if name in program.regions else 0
            for name in ("h", "start", "total", "logits", "noise", "codes", "dkv", "dx")
        }
        return {
            "instructions": plan.instructions.data_ptr(),
            "starts": plan.starts.data_ptr(),
            "tape": self.tape.data_ptr(),
            "vectors": self.vectors.data_ptr(),
            "tables": self.tables.data_ptr(),
            "sos": self.sos.data_ptr(),
            "positions": self.positions.data_ptr(),
            **offsets,
            "sms": program.sms,
            "operations": len(program.operations),
            "first_operation": 0,
            "last_operation": len(program.operations),
            "sequences": program.sequences,
            "rows": program.rows,
            "dim": config.dim,
            "heads": config.n_heads,
            "kv_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "hidden": config.ffn_hidden,
            "backbone_blocks": config.spatial_layers,
            "decoder_blocks": config.factorized_layers,
            "codebooks": config.num_codebooks,
            "experts": config.num_experts,
            "codes_per_codebook": config.codebook_size,
            "conditioning": Conditioning[config.conditioning],
            "format": Format[self.kind],
            "staged_bytes": program.staged_bytes,
            "stages": 0,  # as many as fit
            "spin_limit": _POLLS,
            "trace": 0,
            "eps": config.norm_eps,
        }

    def embed(self, codes: Tensor, last: int) -> Tensor:
        """Sums of the embeddings of codebooks before `last`, float32 [K, B, d], codes [B, num_codebooks] on the CPU.

        One after another from codebook 0, as the kernel adds them up.
        """
        codes = codes.to(self.device)
        total = torch.zeros(self.config.num_experts, len(codes), self.config.dim, device=self.device)
        for j in range(last):
            total += self.tables[:, j, codes[:, j]].float()
        return total

    def prompt_cache(self, prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values bf16 [K, blocks, U, n_heads, P, head_dim] of prompts float32 [tokens, prompt_dim].

        Prompt by prompt, each as long as it is: libraries of matrix products choose by the size how they add, and a
        sequence must not depend on the prompts beside it. Beyond a prompt's tokens it is zero.
        """
        config = self.config
        shape = (2, config.num_experts, config.spatial_layers, len(prompts), config.n_heads, max(map(len, prompts)))
        caches = torch.zeros((*shape, config.head_dim), dtype=torch.bfloat16, device=self.device)
        for i in range(config.spatial_layers):
            weight, bias = self._key_value.get((i,)), self._key_value_bias[i]
            for u, tokens in enumerate(prompts):
                both = torch.einsum("pc,kdc->kpd", tokens, weight) + bias[:, None]
                parts = both.view(config.num_experts, len(tokens), 2, config.n_heads, config.head_dim)
                caches[:, :, i, u, :, : len(tokens)] = parts.permute(2, 0, 3, 1, 4)
        keys, values = caches.unbind(0)
        return keys, values

    def decoder_starts(self, prompts: list[Tensor]) -> Tensor:
        """What the residual decoders' conditions are added to, float32 [K, U, d]: of the prompts' means, or learned."""
        config, start = self.config, self._start.unsqueeze(1)
        if config.decoder_start == "learned" or not config.factorized_layers:
            return start.repeat(1, len(prompts), 1)
        summary = torch.stack([self._summary.get((k,)) for k in range(config.num_experts)])
        means = [torch.einsum("c,kdc->kd", tokens.mean(dim=0), summary) for tokens in prompts]
        return torch.stack(means, dim=1) + start

    def _check_memory(self, program: Program) -> None:
        """Raise BackendError if the weights cannot fit, before any are read."""
        config, item = self.config, DTYPES[self.kind].itemsize
        needed = tape_bytes(program, self.kind) + 4 * program.vector_floats
        needed += 2 * config.num_experts * config.num_codebooks * config.codebook_size * config.dim
        needed += 4 * config.dim * max(config.max_seq_len, config.codes_per_expert + 1)  # positions
        if not self.residual:
            needed += item * config.num_experts * (2 * config.spatial_layers + 1) * config.dim * config.prompt_dim
        free = _free_bytes(self.device)
        if needed > free:
            lighter = "; weights='int8' need less" if self.kind == "bf16" else ""
            raise BackendError(
                f"{self.kind} weights of this model need {needed / 1e9:.1f} GB on {self.device} and "
                f"{free / 1e9:.1f} GB are free{lighter}"
            )

    def _load(self, experts: Iterable[tuple[int, Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]]]) -> None:
        shapes = expected_shapes(self.config)
        missing = {(k, name) for k in range(self.config.num_experts) for name in shapes}

        def checked(k: int, items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in items:
                if name not in shapes or k not in range(self.config.num_experts):
                    raise CheckpointError(f"expert {k}: {name} is not a tensor of this model")
                if tuple(tensor.shape) != shapes[name]:
                    shape, wanted = list(tensor.shape), list(shapes[name])
                    raise CheckpointError(f"expert {k}: {name} has shape {shape}, not {wanted}")
                missing.discard((k, name))
                yield name, tensor

        for start_codebook, tensors in experts:
            k = start_codebook // self.config.codes_per_expert
            items = tensors.items() if isinstance(tensors, Mapping) else tensors
            self._put_all(k, checked(k, items))
        if missing:
            k, name = min(missing)
            others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"expert {k}: {name} is missing{others}")

    def _put_all(self, k: int, items: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in folded_tensors(items):
            value = tensor.detach().to(self.device, torch.float32)
            # In the coarsest range that values are kept in: what it cannot hold would be infinite on the device.
            if not torch.stack(value.aminmax()).to(torch.bfloat16).isfinite().all():
                raise CheckpointError(f"expert {k}: {name} holds a value that is not finite")
            self._put(k, name, value)

    def _put(self, k: int, name: str, value: Tensor) -> None:
        """One tensor of expert k under its checkpoint's name."""
        parts = name.split(".")
        inner = ".".join(parts[2:])
        if parts[0] == "spatial_blocks":
            self._put_block(k, int(parts[1]), inner, value)
        elif parts[0] == "factorized_blocks" and inner in _DECODER_MATRICES:
            self._put_matrix(_DECODER_MATRICES[inner], k, int(parts[1]), value)
        elif parts[0] == "factorized_blocks":
            self._put_vector(_DECODER_VECTORS[inner], k, int(parts[1]), value)
        elif parts[0] == "codebooks":
            self.tables[k, int(parts[2])] = value
        elif parts[0] == "heads":
            self._put_matrix("heads", k, int(parts[1]), value)
        elif name == "factorized_norm.weight":
            self._put_vector("decoder_norm", k, 0, value)
        elif name == "spatial_norm.weight":
            if not self.residual:
                self._put_vector("final_norm", k, 0, value)
        elif name == "sos":
            self.sos[k] = value.flatten()
        elif name == "prompt_summary.weight":
            if not self.residual:
                self._summary.put((k,), value)
        else:  # "prompt_summary.bias" or "start"
            self._start[k] = value.flatten()

    def _put_block(self, k: int, block: int, name: str, value: Tensor) -> None:
        """A tensor of a backbone's block."""
        if self.residual:
            return
        if name in _BACKBONE_MATRICES:
            self._put_matrix(_BACKBONE_MATRICES[name], k, block, value)
        elif name == "cross_attention.key_value.weight":
            self._key_value.put((block, k), value)
        elif name == "cross_attention.key_value.bias":
            self._key_value_bias[block, k] = value
        else:
            self._put_vector(_BACKBONE_VECTORS[name], k, block, value)

    def _put_matrix(self, name: str, k: int, block: int, value: Tensor) -> None:
        matrix: Matrix = self._places[name, k, block]
        values, scales = quantise(value, self.kind)
        pack_matrix(self.tape, self._program, matrix, values)
        if scales is not None:
            self._put_vector(f"scale:{name}", k, block, kernel_order(matrix, scales))

    def _put_vector(self, name: str, k: int, block: int, value: Tensor) -> None:
        offset, length = self._program.vectors[name, k, block]
        self.vectors[offset : offset + length] = value.view(length)
