"""Every Triton kernel compiles for the GPUs it is meant for, and the kernels of the decode path do not spill.

The compiler is stricter than the interpreter, and no GPU is needed. What is compiled are the launches at real sizes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "kernels"
# Hopper, and the one with the least shared memory; the report by itself takes 80 and 100 too.
ARCHS = {"decode": (90, 120), "training": (90,)}
DECODE_STEMS = {"sample_heads", "backbone_step", "residual_frame"}
TRAINING_STEMS = {"rvq_embed", "residual_decoder", "linear_cross_entropy", "policy_loss"}
BAD_KERNELS = """
import torch
import triton
import triton.language as tl


@triton.jit
def spilling(x, out, N: tl.constexpr):
    values = tl.load(x + tl.arange(0, N))
    tl.store(out + tl.arange(0, N), values * tl.sum(values))


@triton.jit
def large(x, out, N: tl.constexpr, K: tl.constexpr):
    n, k = tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(x + n[:, None] * K + k[None, :]), tl.load(x + k[:, None] * N + n[None, :])
    tl.store(out + n[:, None] * N + n[None, :], tl.dot(a, b))


@triton.jit
def broken(x):
    tl.store(x, no_such_name)


def launches():
    x = torch.empty(1 << 20, device="meta")
    half = x.half()
    yield "few", lambda: spilling[(1,)](x, x, N=128)
    yield "many", lambda: spilling[(1,)](x, x, N=8192, num_warps=1)
    yield "large", lambda: large[(1,)](half, half, N=128, K=1024)
    yield "broken", lambda: broken[(1,)](x)
    yield "nothing", lambda: None
    yield "few again", lambda: spilling[(1,)](x, x, N=128)
"""


def report(out: Path, first: Path, *options: object) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run the report in a process of its own, which does not interpret, and read its JSON file.

    Benchmark modules are looked for in the folder `first` before their own.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"import sys; sys.path[:0] = [{str(first)!r}, {str(FOLDER)!r}]; import compile_report; compile_report.main()"
    words = [sys.executable, "-c", code, "--json", str(out), *(str(option) for option in options)]
    made = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900)
    return made, json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("use", "stems"), [("decode", DECODE_STEMS), ("training", TRAINING_STEMS)])
def test_every_kernel_compiles_and_the_decode_path_does_not_spill(tmp_path: Path, use: str, stems: set[str]) -> None:
    """Every launch; `python benchmarks/kernels/compile_report.py` prints what each takes, for every architecture."""
    made, result = report(tmp_path / "report.json", FOLDER, "--arch", *ARCHS[use], "--stem", *sorted(stems))
    assert made.returncode == 0, made.stderr[-4000:]
    assert result["faults"] == []
    rows = result["kernels"]
    assert {(row["stem"], row["arch"]) for row in rows} == {(stem, arch) for stem in stems for arch in ARCHS[use]}
    assert all(0 < row["registers"] <= 255 and row["num_warps"] in (1, 2, 4, 8, 16, 32) for row in rows)
    assert use == "training" or all(row["spill_stores"] == row["spill_loads"] == 0 for row in rows)
    assert made.stdout.count("\n| `") == len(rows)


def test_what_must_not_be_is_found(tmp_path: Path) -> None:
    """Spills, too much shared memory, a kernel that does not compile and a launch of nothing: a line each, code 1."""
    (tmp_path / "sample_heads.py").write_text(BAD_KERNELS)
    made, result = report(tmp_path / "report.json", tmp_path, "--stem", "sample_heads", "--arch", 120)
    assert made.returncode == 1
    faults = dict(line.removeprefix("sample_heads, ").split(", sm_120: ") for line in result["faults"])
    assert set(faults) == {"many", "large", "broken", "nothing"}
    assert faults["many"].startswith("spilling spills ")
    assert faults["large"].startswith("large takes ") and faults["large"].endswith(" bytes of shared memory of 101376")
    assert "no_such_name" in faults["broken"] and "\n" not in faults["broken"]
    assert faults["nothing"] == "RuntimeError: launched no kernel"
    few, *_ = result["kernels"]
    assert (few["label"], few["spill_stores"]) == ("few", 0)
    assert [line for line in made.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {line}" for line in result["faults"]
    ]
    labels = [row["label"] for row in result["kernels"] if "error" not in row]
    assert labels == ["few", "many", "large"]  # what was compiled before has no row of its own
