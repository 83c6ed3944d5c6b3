"""Checks and times every case of every kernel: benchmarks/kernels/<stem>.py says what the cases are.

    python benchmarks/kernel_times.py [--stem rvq_embed ...] [--json FILE]       on a GPU
    python benchmarks/kernel_times.py --gates                                    on a GPU, the checks alone
    python benchmarks/kernel_times.py --small --device cpu                       Triton's interpreter, nothing is timed

A case's gate comes first, and nothing is timed on a red one. Times are medians by events with the L2 cache flushed,
arms interleaved (gpu_timing.py). "eager" of the decode path's operations is PyTorch's launches as one CUDA graph, as
ours are; without it PyTorch would be slower by what its launches take. Shares are those of a device-to-device copy and
of a bf16 matrix product in the same run: fewest bytes / (time x bandwidth), fewest operations / (time x rate). Exit
code 1 if a gate is red or an arm raises.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parent / "kernels"))

import json_file
import numpy as np
import torch
from case import STEMS, load

if TYPE_CHECKING:
    from case import Case

CASE_SECONDS = 2.0
PYTORCH = ("eager", "compile")


def check(case: Case) -> str:
    """ "green", or what is wrong, in one line."""
    try:
        case.gate()
    except Exception as error:
        return f"red: {_line(error)}"
    return "green"


def run_once(case: Case) -> dict[str, str]:
    """Run every arm once, which also compiles it; the arms that raise, and what."""
    errors = {}
    for name, arm in case.arms.items():
        try:
            arm()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:
            errors[name] = _line(error)
    return errors


def timed(case: Case, errors: dict[str, str], copy: float, rate: float) -> dict[str, dict[str, Any]]:
    """The figures of every arm that runs; ours also against PyTorch's arms and the two rates."""
    from gpu_timing import interleaved

    seconds = interleaved({name: arm for name, arm in case.arms.items() if name not in errors}, CASE_SECONDS)
    figures: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        low, median, high = (1e6 * float(value) for value in np.percentile(values, [10, 50, 90]))
        figures[name] = {"us": median, "us_p10": low, "us_p90": high, "calls": len(values)}
    for name, own in figures.items():
        if name.startswith("triton"):
            own["ratio_to"] = {other: figures[other]["us"] / own["us"] for other in PYTORCH if other in figures}
            own["share_of_copy"] = case.bytes / (own["us"] / 1e6 * copy)
            own["share_of_matmul"] = case.flops / (own["us"] / 1e6 * rate)
    return figures


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each of our arms, or for each case where nothing was timed."""
    head = ["case", "gate", "arm", "us", "10% to 90%", "x eager", "x compile", "of copy", "of matmul"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- | --- |" + " ---: |" * (len(head) - 3)]
    for row in rows:
        case = [f"{row['stem']}: {row['label']}", row["gate"].split(":")[0]]
        own = {name: figures for name, figures in row.get("arms", {}).items() if "ratio_to" in figures}
        for name, figures in own.items():
            cells = [*case, name, f"{figures['us']:.1f}", f"{figures['us_p10']:.1f} to {figures['us_p90']:.1f}"]
            ratio = figures["ratio_to"]
            cells += [f"{ratio[other]:.2f}" if other in ratio else "" for other in PYTORCH]
            cells += [f"{figures['share_of_copy']:.2f}", f"{figures['share_of_matmul']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
        if not own:
            lines.append("| " + " | ".join([*case, *[""] * (len(head) - 2)]) + " |")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rows; the JSON file is written after each gate and after each case's times, against a stop."""
    result: dict[str, Any] = {"rows": [], "not_run": []}
    timing = options.device == "cuda" and not options.gates
    if timing:
        from gpu_timing import CopyProbe, matmul_rate

        rate, probe = matmul_rate(), CopyProbe()  # the product first: it brings the clocks up
        copy = statistics.median(probe.run() for _ in range(5))
        del probe
        result |= {"copy_gb_per_s": copy / 1e9, "matmul_tflop_per_s": rate / 1e12}
        torch.cuda.empty_cache()
    stop = time.monotonic() + options.budget
    for stem in options.stem:
        try:
            for case in load(stem).cases(options.device, options.small):
                if time.monotonic() > stop:
                    result["not_run"].append(f"{stem}: {case.label} and what follows")
                    break
                row: dict[str, Any] = {"stem": stem, "label": case.label, "bytes": case.bytes, "flops": case.flops}
                row["gate"] = check(case)
                result["rows"].append(row)
                print(f"{stem}: {case.label}: {row['gate']}", flush=True)
                json_file.write(options.json, result)
                if row["gate"] == "green" and not options.gates:
                    if timing and "compile" in case.arms:
                        torch.compiler.reset()  # other cases' sizes would count against torch.compile's limit
                    row["arm_errors"] = run_once(case)
                    if timing:
                        row["arms"] = timed(case, row["arm_errors"], copy, rate)
                    json_file.write(options.json, result)
        except Exception as error:
            result["rows"].append({"stem": stem, "label": "cases()", "gate": f"red: {_line(error)}"})
    json_file.write(options.json, result)
    return result


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """A line for every red gate and every arm that raises."""
    lines = []
    for row in rows:
        where = f"{row['stem']}, {row['label']}"
        if row["gate"] != "green":
            lines.append(f"{where}: {row['gate']}")
        lines += [f"{where}: arm {name}: {text}" for name, text in row.get("arm_errors", {}).items()]
    return lines


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--gates", action="store_true", help="check, time nothing")
    parser.add_argument("--stem", nargs="+", default=list(STEMS), choices=STEMS)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no case is begun")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if options.device == "cpu":
        if not options.small:
            parser.error("Triton's interpreter is slow: --device cpu needs --small")
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        torch.compiler.set_stance("force_eager")  # compiling for the CPU would say nothing about a GPU
        print("Triton's interpreter on the CPU: gates, and every arm once. Nothing is timed.")
    elif not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device")
    result = measure(options)
    print("\n" + table(result["rows"]))
    wrong = faults(result["rows"])
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    for line in result["not_run"]:
        print(f"not run, out of time: {line}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
