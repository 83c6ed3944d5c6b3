"""How far the engine's logits are from exact ones, for every instruction path and weight type.

    python benchmarks/numerics.py                              official-tiny, and 1.6B widths with 2 blocks of each kind
    python benchmarks/numerics.py --preset siren-3.1b --blocks 8 --weights int8 --paths avx2

Decoders are fed given codes frame by frame (teacher forcing), and their logits for every frame and codebook compared:
KL is the divergence of their distribution from that of plain PyTorch in fp32, in nats; error is the RMS distance from
the same model computed in fp64, as a share of the RMS logit; top 1 says how often the most probable code is the same as
in fp32. The rule: an engine's error is at most twice plain PyTorch's with the same weights. Exit code 1 if it is not.

Two models: the one in tests/data/official-tiny with the frames that the official code was run on, and random weights
of deviation 1 / sqrt(inputs) at the widths of a preset, with random frames and few blocks so that memory allows it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import arms
import machine
import numpy as np
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from siren import SirenConfig
from siren.checkpoint import iter_tensors, read_manifest
from siren.engine import CpuDecoder, instruction_path
from siren.errors import BackendError, InputError
from siren.expert import Expert
from siren.reference import ReferenceDecoder
from siren.sampling import SamplingSettings

GOLDEN = Path(__file__).parent.parent / "tests" / "data" / "official-tiny"
PATHS = ("avx512bf16", "avx512", "avx2", "portable")
WEIGHTS = ("fp32", "bf16", "int8")
LIMIT = 2.0


@dataclass(frozen=True)
class Case:
    """A model, and the frames and prompts it is fed: codes [B, 12, T], prompt [B, P, D], mask [B, P]."""

    name: str
    config: SirenConfig
    experts: Callable[[], Iterator[tuple[int, dict[str, Tensor]]]]
    codes: Tensor
    prompt: Tensor
    mask: Tensor


def official_case() -> Case:
    if not GOLDEN.is_dir():
        raise InputError(f"{GOLDEN} is missing; it comes with the source, not with an installed package")
    manifest = read_manifest(GOLDEN)
    with np.load(GOLDEN / "vectors.npz") as arrays:
        codes, prompt, mask = (torch.from_numpy(arrays[name]) for name in ("codes", "prompt", "prompt_mask"))

    def experts() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for entry in manifest.experts:
            yield entry.start_codebook, dict(iter_tensors(entry, manifest.config))

    return Case("official-tiny", manifest.config, experts, codes.long(), prompt, mask)


def random_case(preset: str, blocks: int, batch: int, frames: int, tokens: int) -> Case:
    config = SirenConfig.preset(preset)
    backbone, decoder = min(blocks, config.spatial_layers), min(blocks, config.factorized_layers)
    config = dataclasses.replace(config, spatial_layers=backbone, factorized_layers=decoder)
    if frames > config.max_seq_len or tokens > config.max_prompt_len:
        raise InputError(
            f"{preset} takes at most {config.max_seq_len} frames and {config.max_prompt_len} prompt tokens"
        )
    prompt, mask = arms.random_prompts(config, batch, tokens)
    shape = (batch, config.num_codebooks, frames)
    codes = torch.randint(config.codebook_size, shape, generator=torch.Generator().manual_seed(2))

    def experts() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for start, tensors in arms.random_experts(config, 0):
            yield start, dict(tensors)

    return Case(f"{preset} widths, {backbone} + {decoder} blocks", config, experts, codes, prompt, mask)


@torch.inference_mode()
def exact_logits(case: Case) -> Tensor:
    """Teacher-forced logits in fp64 [B, 12, T, V], one expert in memory at a time."""
    logits = []
    for start, state in case.experts():
        with torch.device("meta"):
            expert = Expert(case.config, start)
        expert.load_state_dict({name: state.pop(name).double() for name in list(state)}, assign=True)
        logits.append(expert.eval()(case.codes, case.prompt.double(), case.mask))
    return torch.cat(logits, dim=1)


def forced_logits(decoder: Any, case: Case) -> Tensor:
    seeds = np.zeros(len(case.codes), np.uint64)
    return decoder.start(case.prompt, case.mask, seeds, SamplingSettings()).force(case.codes)


def compare(logits: Tensor, fp32: Tensor, exact: Tensor) -> dict[str, float]:
    ours, theirs = logits.double().log_softmax(-1), fp32.double().log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "error": float((logits - exact).square().mean().sqrt() / exact.square().mean().sqrt()),
        "top1": float((logits.argmax(-1) == fp32.argmax(-1)).double().mean()),
    }


def run_case(case: Case, paths: list[str], weights: list[str], threads: int) -> list[dict[str, Any]]:
    """A row for plain PyTorch with each weight type, then one for each instruction path."""
    with tqdm(
        total=2 + len(weights) * (1 + len(paths)), desc=case.name, unit="model", disable=None, leave=False
    ) as bar:

        def step(decoder: Any) -> Tensor:
            logits = forced_logits(decoder, case)
            bar.update()
            return logits

        exact = exact_logits(case)
        bar.update()
        fp32 = step(ReferenceDecoder(case.config, case.experts(), "fp32"))
        rows = []
        for kind in weights:
            plain = compare(step(ReferenceDecoder(case.config, case.experts(), kind)), fp32, exact)
            rows.append({"model": case.name, "decoder": "PyTorch", "weights": kind, **plain})
            for path in paths:
                os.environ["SIREN_CPU_ISA"] = path
                row = compare(step(CpuDecoder(case.config, case.experts(), kind, threads)), fp32, exact)
                ratio = row["error"] / plain["error"]
                rows.append({"model": case.name, "decoder": path, "weights": kind, **row, "ratio": ratio})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| weights | decoder | KL mean | KL max | error | ratio to PyTorch | top 1 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        lines.append(
            f"| {row['weights']} | {row['decoder']} | {row['kl_mean']:.1e} | {row['kl_max']:.1e} | {row['error']:.2e} "
            f"| {ratio} | {row['top1']:.2%} |"
        )
    return "\n".join(lines)


def available_paths() -> list[str]:
    """Instruction paths that this build has and this CPU runs, best first. Leaves SIREN_CPU_ISA as the last one."""
    found = []
    for path in PATHS:
        os.environ["SIREN_CPU_ISA"] = path
        try:
            found.append(instruction_path())
        except BackendError:
            print(f"not here: {path}")
    return found


def chosen(text: str, name: str, choices: tuple[str, ...]) -> list[str]:
    values = text.split(",")
    if not set(values) <= set(choices):
        raise InputError(f"{name} must be any of {', '.join(choices)} with commas between, not {text!r}")
    return values


def run(
    preset: Annotated[str, typer.Option(help="whose widths: siren-1.6b, siren-3.1b or tiny; none: leave this out")] = (
        "siren-1.6b"
    ),
    blocks: Annotated[int, typer.Option(min=1, help="blocks of each kind at those widths")] = 2,
    batch: Annotated[int, typer.Option(min=1, max=64)] = 2,
    frames: Annotated[int, typer.Option(min=1)] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="prompt tokens")] = 13,
    weights: Annotated[str, typer.Option(help="weight types, with commas between")] = ",".join(WEIGHTS),
    paths: Annotated[
        str, typer.Option(help="instruction paths, with commas between; all: those that run here")
    ] = "all",
    threads: Annotated[int, typer.Option(help="of the engine and of PyTorch; 0: all cores")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Compare the engine's logits with fp32's."""
    kinds = chosen(weights, "--weights", WEIGHTS)
    threads = machine.thread_count(threads)
    torch.set_num_threads(threads)
    about = {**machine.describe(), "threads": threads}
    names = available_paths() if paths == "all" else chosen(paths, "--paths", PATHS)
    cases = [official_case()]
    if preset != "none":
        cases.append(random_case(preset, blocks, batch, frames, tokens))
    rows = []
    for case in cases:
        shape = f"{len(case.codes)} sequences of {case.codes.shape[-1]} frames"
        print(f"\n{case.name}, {shape}, {threads} threads\n", flush=True)
        found = run_case(case, names, kinds, threads)
        print(table(found), flush=True)
        rows += found
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        print(f"\nwrote {out}")
    broken = [row for row in rows if not row.get("ratio", 0) <= LIMIT]
    for row in broken:
        print(
            f"error rule broken: {row['model']}, {row['weights']}, {row['decoder']}: {row['ratio']:.2f} times "
            f"PyTorch's error, at most {LIMIT:g} allowed",
            file=sys.stderr,
        )
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    machine.main(run)
