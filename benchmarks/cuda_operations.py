"""The persistent kernel operation by operation, where it is: each against the executor's plain PyTorch.

    python benchmarks/cuda_operations.py [--preset tiny] [--weights bf16] [--batch 2] [--guided] [--blocks 2]   on a GPU
    SIREN_CUDA_EMULATE=1 python benchmarks/cuda_operations.py --blocks 1                                   its emulator

A launch runs one operation of a frame, from a state that the executor made on the CPU; then every number of the arena
and the caches is compared with what the executor makes of the same state, and both go on from the executor's. So a
kernel that is wrong is wrong where it says so. At the end the kernel goes on from its own numbers, an operation a
launch and then all frames in one launch, as they run for a user: both must draw the same codes with the same bits of
log-probabilities. How many of the codes differ from the executor's is said and not judged, as rounding may change a
draw. With `--blocks` the model has so many blocks of each kind, or fewer. Weights are random. Exit code 1 for a
difference, or a launch that fails.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import json_file
import machine
import numpy as np
import torch
import typer
from arms import random_experts
from torch import Tensor

from siren import SirenConfig
from siren.cuda_engine import CudaDecoder
from siren.cuda_session import follow, host_tensor, settings_arguments
from siren.errors import BackendError
from siren.program import Operation, Program
from siren.program_executor import Executor, State, new_state
from siren.sampling import SamplingSettings
from siren.tape import unpack

FRAMES, PROMPT_LENGTHS = 2, (3, 1)
ON_HOST = ("codes_out", "logprobs_out")
# Activations are two bf16 in the kernel, 16 bits; sums are in another order. A bf16 of a cache may round the other way.
ALLOWED, ALLOWED_CACHE = 1e-4, 2**-7
MOST_LINES = 10


class Both:
    """A program with a state on the CPU for the executor, and its copy where the kernel runs."""

    def __init__(self, decoder: CudaDecoder, batch: int, settings: SamplingSettings) -> None:
        weights = decoder.weights
        self.launch, self.weights, self.settings = decoder.machine.launch, weights, settings
        self.plan = weights.plan(batch, settings.guided)
        self.program: Program = self.plan.program
        self.executor = Executor(self.program, *model_of(decoder, self.program), settings)
        self.state = first_state(self.program, FRAMES)
        device = weights.device
        self.there: dict[str, Tensor] = {}
        for field in dataclasses.fields(State):
            value = getattr(self.state, field.name)
            if isinstance(value, Tensor):
                here = host_tensor(value.shape, value.dtype, device) if field.name in ON_HOST else value.to(device)
                self.there[field.name] = here if here.data_ptr() != value.data_ptr() else value.clone()

    def send(self) -> None:
        """The CPU's state to where the kernel runs."""
        for name, value in self.there.items():
            value.copy_(getattr(self.state, name))

    def run(self, first: int, last: int, frame: int, frames: int = 1) -> None:
        """Operations from first to before last, in the kernel."""
        arguments: dict[str, Any] = {
            **self.weights.arguments(self.plan),
            **settings_arguments(self.settings),
            **{name: value.data_ptr() for name, value in self.there.items()},
            "forced": 0,
            "first_operation": first,
            "last_operation": last,
            "frames": frames,
            "first_frame": frame,
            "capacity": self.state.keys.shape[4],
            "prompts": len(self.state.prompt_length),
            "prompt_capacity": self.state.prompt_keys.shape[4],
        }
        follow(self.launch(arguments), frames, lambda _: None)

    def differences(self, operation: Operation, frame: int) -> list[str]:
        """A line for each region that the kernel left otherwise than the executor did."""
        lines = []
        for name in ("codes_out", "logprobs_out", "keys", "values", *self.program.regions):
            if name in self.program.regions:
                offset, shape = self.program.regions[name]
                part = slice(offset, offset + math.prod(shape))
                ours, theirs = self.there["arena"][part].cpu(), self.state.arena[part]
            else:
                ours, theirs = self.there[name].cpu(), getattr(self.state, name)
            if name in ("codes", "codes_out"):
                wrong = ours.view(torch.int32) != theirs.view(torch.int32)
            else:
                ours, theirs = ours.float(), theirs.float()
                limit = ALLOWED * theirs.nan_to_num(0, 0, 0).abs().max()
                limit = limit + (ALLOWED_CACHE * theirs.abs() if name in ("keys", "values") else 0)
                error = (ours - theirs).abs()
                wrong = ~((error <= limit) | (ours == theirs) | (ours.isnan() & theirs.isnan()))
            if wrong.any():
                place = int(wrong.flatten().nonzero()[0])
                values = f"{ours.flatten()[place]:g} for {theirs.flatten()[place]:g}"
                where = f"{operation.name}, frame {frame}: {name}"
                lines.append(
                    f"{where}: {int(wrong.sum())} of {wrong.numel()} are wrong, the first at {place}: {values}"
                )
        return lines


def model_of(decoder: CudaDecoder, program: Program) -> tuple[Any, ...]:
    """What an Executor takes of a model, on the CPU: the matrices as they are on the tape, and the rest."""
    weights, matrices = decoder.weights, {}
    vectors = weights.vectors.cpu()
    for matrix, values in unpack(weights.tape.cpu(), program, weights.kind).items():
        offset, length = program.vectors[f"scale:{matrix.name}", matrix.expert, matrix.block]
        scales = vectors[offset : offset + length]
        scales = torch.cat((scales[0::2], scales[1::2])) if matrix.swiglu else scales
        matrices[matrix] = values if weights.kind == "bf16" else values * scales.unsqueeze(1)
    return matrices, vectors, weights.tables.cpu(), weights.sos.cpu(), weights.positions.cpu()


def first_state(program: Program, frames: int) -> State:
    """The beginning of a clip, with random prompts and starts; what is not written yet is NaN."""
    config, generator = program.config, torch.Generator().manual_seed(1)
    heads = (config.n_heads, max(PROMPT_LENGTHS), config.head_dim)
    shape = (2, config.num_experts, config.spatial_layers, len(PROMPT_LENGTHS), *heads)
    keys, values = torch.randn(shape, generator=generator).to(torch.bfloat16)
    index = torch.arange(program.rows) % len(PROMPT_LENGTHS)
    seeds = np.arange(program.sequences, dtype=np.uint64) + 2**40
    prompts = (keys.contiguous(), values.contiguous(), index, torch.tensor(PROMPT_LENGTHS))
    state = new_state(program, frames, seeds, prompts)
    if "start" in program.regions:
        state.view("start").copy_(0.1 * torch.randn(state.view("start").shape, generator=generator))
    return state


def check(both: Both) -> dict[str, Any]:
    """How many operations ran, a line for each difference, and how many codes the kernel alone draws otherwise than the
    executor (None where it did not come to that); a launch that fails ends it."""
    result: dict[str, Any] = {"operations": 0, "differences": [], "other_codes": None}
    lines, where = result["differences"], ""
    begin = {name: getattr(both.state, name).clone() for name in both.there}
    codes = []
    try:
        for frame in range(FRAMES):
            for operation in both.program.operations:
                where = f"{operation.name}, frame {frame}"
                both.send()
                both.run(operation.number, operation.number + 1, frame)
                both.executor.run(operation, both.state, frame, 0)
                lines += both.differences(operation, frame)
                result["operations"] += 1
            codes.append(both.state.codes_out[0].clone())
            both.state.noise_frames += 1
        for name, value in begin.items():
            getattr(both.state, name).copy_(value)
        where = f"{FRAMES} frames, an operation a launch"
        expected = step_by_step(both)
        where = f"{FRAMES} frames in one launch"
        both.send()
        both.run(0, len(both.program.operations), 0, FRAMES)
    except BackendError as error:
        lines.append(f"{where}: {error}")
        return result
    found = torch.stack([both.there["codes_out"], both.there["logprobs_out"].view(torch.int32)], dim=1)
    if wrong := int((found != expected).sum()):
        lines.append(f"{where}: {wrong} codes and log-probabilities are not those of an operation a launch")
    result["other_codes"] = int((found[:, 0] != torch.stack(codes)).sum())
    return result


def step_by_step(both: Both) -> Tensor:
    """Codes and the bits of log-probabilities, int32 [FRAMES, 2, codebooks, sequences], of the kernel with a launch for
    each operation, which takes from the one before what that left."""
    both.send()
    drawn = []
    for frame in range(FRAMES):
        for number in range(len(both.program.operations)):
            both.run(number, number + 1, frame)
        drawn.append(torch.stack([both.there["codes_out"][0], both.there["logprobs_out"][0].view(torch.int32)]))
        both.there["noise_frames"] += 1
    return torch.stack(drawn)


def run(
    preset: Annotated[str, typer.Option(help="siren-1.6b, siren-3.1b or tiny")] = "tiny",
    weights: Annotated[str, typer.Option(help="bf16, int8 or fp8")] = "bf16",
    batch: Annotated[int, typer.Option(min=1, max=32)] = 2,
    guided: Annotated[bool, typer.Option("--guided", help="two rows a sequence")] = False,
    blocks: Annotated[int, typer.Option(min=1, help="of each kind, or the preset's where that has fewer")] = 2,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Compare every operation of the persistent kernel with the executor."""
    config = SirenConfig.preset(preset)
    backbone, decoder_blocks = min(blocks, config.spatial_layers), min(blocks, config.factorized_layers)
    config = dataclasses.replace(config, spatial_layers=backbone, factorized_layers=decoder_blocks)
    decoder = CudaDecoder(config, random_experts(config, 0), weights)
    with torch.inference_mode():
        both = Both(decoder, batch, SamplingSettings(guidance_scale=2.0 if guided else 1.0))
        result = check(both)
    head = f"{preset}, {backbone} + {decoder_blocks} blocks, {weights}, batch {batch}{', guided' if guided else ''}"
    json_file.write(out, {"of": head, "device": decoder.machine.name, **result})
    lines, others = result["differences"], result["other_codes"]
    print(f"{decoder.machine.name}, {head}: {result['operations']} operations, {len(lines)} differences")
    if others is not None:
        print(f"{FRAMES} frames in one launch: {others} codes are not the executor's")
    for line in lines[:MOST_LINES]:
        print(f"error: {line}", file=sys.stderr)
    raise SystemExit(1 if lines else 0)


if __name__ == "__main__":
    machine.main(run)
