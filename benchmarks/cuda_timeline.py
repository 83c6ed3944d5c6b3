"""Which multiprocessor (SM) of the persistent kernel does what when: the last of some frames, traced.

    python benchmarks/cuda_timeline.py [--preset siren-1.6b] [--batch 1,16] [--frames 20] [--out FILE] [--picture FILE]
    SIREN_CUDA_EMULATE=1 python benchmarks/cuda_timeline.py --preset tiny --batch 2 --frames 3        its emulator

The kernel notes for every instruction the GPU's clock when its wait was over and when it was done. An SM waits from the
end of one instruction to that moment of its next, and works from then on; a matmul that is short of weights waits for
its ring inside of its work. The picture has the SMs from top to bottom, time from left to right, and a colour for each
kind of work; white is waiting. Weights are random. The clock's steps are in the file (`clock_step_ns`): where they are
as long as an instruction, its figures say something only as sums over many. The frame is slower than without a trace
by the writes of the notes.
"""

from __future__ import annotations

import collections
import itertools
import re
from pathlib import Path
from typing import Annotated, Any

import json_file
import machine
import numpy as np
import torch
import typer
from arms import random_experts, random_prompts
from decode import numbers
from numpy.typing import NDArray

from siren import SirenConfig
from siren.cuda_engine import CudaDecoder
from siren.errors import InputError
from siren.sampling import SamplingSettings

FRAMES, TOKENS = 20, 20


def traced(decoder: CudaDecoder, batch: int, frames: int) -> tuple[Any, NDArray[np.int64]]:
    """The program, and nanoseconds int64 [instructions, 2] of the last of `frames` frames: waited for, done.

    -1: the instruction did not run. The frames are one launch, after a launch of one that warms up.
    """
    config = decoder.weights.config
    prompt, mask = random_prompts(config, batch, min(TOKENS, config.max_prompt_len))
    state = decoder.start(prompt, mask, np.arange(batch, dtype=np.uint64), SamplingSettings())
    state.step(1, None)
    program = state._plan.program
    notes = torch.full((len(program.instructions), 2), -1, dtype=torch.int64, device=decoder.weights.device)
    launch = state._launch
    state._launch = lambda arguments: launch({**arguments, "trace": notes.data_ptr()})
    state.step(frames - 1, None)
    return program, notes.cpu().numpy()


def label(operation: Any) -> str:
    """What an operation is called in the sums and in the picture: its matrix, or its kind and what it is for."""
    if operation.matrix is not None:
        return operation.matrix.name
    if operation.kind == "attention":
        return "frames attention" if operation.fields["source"] else "prompt attention"
    if operation.kind == "enter":
        return "decoder enter" if operation.fields["source"] else "backbone enter"
    return operation.kind


def phase(operation: Any) -> str:
    """The part of the frame: the backbones, or what a codebook takes."""
    found = re.search(r"codebook \d+", operation.name)
    return found[0] if found else "backbones"


def spans(program: Any, notes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Columns with an element for every instruction that ran, SM by SM in order: sm, operation, began (where the SM's
    wait began), waited (when it was over) and done, in nanoseconds since the frame's first moment."""
    starts = np.asarray(program.starts)
    sm = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    ran = (notes >= 0).all(axis=1)
    operation = np.asarray(program.instructions)[:, 1]
    sm, operation, waited, done = sm[ran], operation[ran], notes[ran, 0], notes[ran, 1]
    if not len(sm):
        raise InputError("the trace is empty")
    origin = waited.min()
    waited, done = waited - origin, done - origin
    # An SM's first wait began with the end of the frame before, which is not in the notes: it counts as none.
    first = np.concatenate(([True], sm[1:] != sm[:-1]))
    began = np.where(first, waited, np.concatenate(([0], done[:-1])))
    return {"sm": sm, "operation": operation, "began": np.minimum(began, waited), "waited": waited, "done": done}


def summarise(program: Any, notes: NDArray[np.int64]) -> dict[str, Any]:
    """The frame's length, and how its SMs spent it: by kind of work, by SM, and by phase of the frame.

    Shares are of SMs x the frame's length. A phase is the backbones, or a codebook.
    """
    at = spans(program, notes)
    frame, sms = int(at["done"].max()), len(program.starts) - 1
    work, wait = at["done"] - at["waited"], at["waited"] - at["began"]
    names = [label(operation) for operation in program.operations]
    phases = [phase(operation) for operation in program.operations]
    by_kind: dict[str, dict[str, float]] = collections.defaultdict(
        lambda: {"instructions": 0, "work_us": 0, "wait_us": 0}
    )
    by_phase: dict[str, list[int]] = {}
    for i, number in enumerate(at["operation"].tolist()):
        row = by_kind[names[number]]
        row["instructions"] += 1
        row["work_us"] += work[i] / 1e3
        row["wait_us"] += wait[i] / 1e3
        ends = by_phase.setdefault(phases[number], [int(at["waited"][i]), int(at["done"][i])])
        ends[0], ends[1] = min(ends[0], int(at["waited"][i])), max(ends[1], int(at["done"][i]))
    total = sms * frame / 1e3 or 1.0
    for row in by_kind.values():
        row |= {"work_share": row["work_us"] / total, "wait_share": row["wait_us"] / total}
    differences = np.diff(np.unique(notes[notes >= 0]))
    busy = np.bincount(at["sm"], weights=work, minlength=sms) / max(frame, 1)
    return {
        "frame_us": frame / 1e3,
        "instructions": len(work),
        "clock_step_ns": int(differences.min()) if len(differences) else 0,
        "work_share": float(work.sum() / 1e3 / total),
        "wait_share": float(wait.sum() / 1e3 / total),
        "kinds": {name: rounded(by_kind[name]) for name in sorted(by_kind, key=lambda name: -by_kind[name]["work_us"])},
        "phases_us": {name: [begin / 1e3, end / 1e3] for name, (begin, end) in by_phase.items()},
        "busy_share_of_sm": [round(float(share), 4) for share in busy],
    }


def rounded(row: dict[str, float]) -> dict[str, float]:
    return {name: round(float(value), 5) if "share" in name else round(float(value), 1) for name, value in row.items()}


def draw_picture(program: Any, notes: NDArray[np.int64], title: str, path: Path) -> None:
    """A row of coloured bars for each SM."""
    try:
        from matplotlib import colormaps
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'siren[pictures]')")
        return
    at, sms = spans(program, notes), len(program.starts) - 1
    names = [label(operation) for operation in program.operations]
    colours = dict(zip(dict.fromkeys(names), itertools.cycle(colormaps["tab20"].colors)))  # in the order of the frame
    left, right, top, bottom = at["waited"] / 1e3, at["done"] / 1e3, at["sm"] - 0.45, at["sm"] + 0.45
    bars = np.stack(
        [np.stack(corner, axis=1) for corner in ((left, top), (right, top), (right, bottom), (left, bottom))], 1
    )
    figure = Figure(figsize=(24, max(5.0, 0.09 * sms + 1.5)), layout="constrained")
    axes = figure.subplots()
    of_bars = [colours[names[number]] for number in at["operation"].tolist()]
    axes.add_collection(PolyCollection(list(bars), facecolors=of_bars, linewidths=0))
    axes.set_ylim(sms - 0.5, -0.5)
    axes.set_xlim(0, right.max())
    axes.set_xlabel("microseconds since the frame's first work")
    axes.set_ylabel("SM")
    axes.set_title(title, fontsize=10)
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=patches, loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def run(
    preset: Annotated[str, typer.Option(help="siren-1.6b, siren-3.1b or tiny")] = "siren-1.6b",
    weights: Annotated[str, typer.Option(help="bf16, int8 or fp8")] = "bf16",
    batch: Annotated[str, typer.Option(help="batch sizes, with commas between")] = "1",
    frames: Annotated[int, typer.Option(min=2, help="of which the last is traced")] = FRAMES,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG file to write, of the first batch size")] = None,
) -> None:
    """Trace one frame of the persistent kernel for each batch size."""
    config = SirenConfig.preset(preset)
    if frames > config.max_seq_len:
        raise InputError(f"--frames must be at most {config.max_seq_len}, not {frames}")
    sizes = numbers(batch, "--batch", 1, 32)
    decoder = CudaDecoder(config, random_experts(config, 0), weights)
    about = machine.describe_gpu() if decoder.weights.device.type == "cuda" else machine.describe()
    about |= {"gpu": decoder.machine.name, "preset": preset, "weights": weights, "frame": frames}
    result: dict[str, Any] = {"about": about, "batches": {}}
    for size in sizes:
        program, notes = traced(decoder, size, frames)
        found = result["batches"][str(size)] = summarise(program, notes)
        json_file.write(out, result)
        head = f"{preset}, {weights}, batch {size}, frame {frames} on {about['gpu']}: {found['frame_us']:.1f} us"
        print(f"{head}, of which SMs work {found['work_share']:.1%} and wait {found['wait_share']:.1%}")
        for name, row in found["kinds"].items():
            shares = f"work {row['work_share']:.1%}, wait before it {row['wait_share']:.1%} of all SMs' time"
            print(f"  {name}: {row['instructions']:.0f} instructions, {shares}")
        if picture and size == sizes[0]:
            draw_picture(program, notes, head, picture)
            print(f"wrote {picture}", flush=True)


if __name__ == "__main__":
    machine.main(run)
