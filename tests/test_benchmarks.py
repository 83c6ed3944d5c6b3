"""The benchmarks run, check what they time, and write what they say: tiny models, no figure is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import siren

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"

pytest.importorskip("siren._cpu", reason="the C++ extension is not built")


def run(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python with this siren and one thread of PyTorch's."""
    package = str(Path(siren.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *(str(word) for word in command)]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_numerics(tmp_path: Path) -> None:
    """Every weight type obeys the error rule on the official frames, on every path here; rows go to JSON."""
    out = tmp_path / "numerics.json"
    made = run(FOLDER / "numerics.py", "--preset", "none", "--threads", 1, "--out", out)
    assert made.returncode == 0, made.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["weights"] for row in rows} == {"fp32", "bf16", "int8"}
    assert {row["decoder"] for row in rows} >= {"PyTorch", "portable"}
    assert all(row["kl_mean"] < 1e-3 and row["top1"] > 0.9 for row in rows)


def test_memory(tmp_path: Path) -> None:
    """Exit code 1 over the limit, here 0; a folder that holds another model is one line and exit code 2."""
    folder = tmp_path / "model"
    command = (FOLDER / "memory.py", "--folder", folder, "--weights", "bf16", "--frames", 4, "--tokens", 3)
    made = run(*command, "--preset", "tiny", "--limit", 0, "--out", tmp_path / "memory.json")
    assert made.returncode == 1, made.stderr
    assert "over 0" in made.stderr
    (row,) = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert 0 < row["weight_bytes"] < row["private_loading_peak"] < row["resident_peak"]
    assert row["growth"] > 1
    made = run(*command, "--preset", "siren-1.6b")
    assert made.returncode == 2, made.stderr
    assert made.stderr.startswith("error: ") and made.stderr.count("\n") == 1


def test_decode(tmp_path: Path) -> None:
    """The gate is green for every arm, and each has a row."""
    arms = "naive-fp32,siren-fp32,siren-bf16,siren-int8"
    out = tmp_path / "decode.json"
    made = run(
        FOLDER / "decode.py", "--preset", "tiny", "--arms", arms, "--batch", "1,2", "--frames", 4, "--rounds", 2,
        "--tokens", 5, "--threads", 1, "--out", out,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["arm"]) for row in rows] == [(size, arm) for size in (1, 2) for arm in arms.split(",")]
    assert all(row["ms"] > 0 for row in rows)


def test_operations(tmp_path: Path) -> None:
    """The checks before the timing, and one call of each, for the draws and one of the matrices."""
    pytest.importorskip("pytest_benchmark")
    made = run(
        "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", "--benchmark-disable",
        "-k", "draw or 1024x1024-siren", FOLDER / "bench_operations.py", cwd=tmp_path,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout
    assert "24 passed" in made.stdout
