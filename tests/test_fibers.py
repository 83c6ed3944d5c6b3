"""The host twins of the GPU primitives: barriers, collectives, copies and waits of threads that run as fibers."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2, 2**64 - 1)


def compiled(folder: Path, *flags: str) -> Path:
    words = (
        shlex.split(os.environ.get("CXX", "")) or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    )
    if not words:
        pytest.skip("no C++ compiler")
    sources = [ROOT / path for path in ("tests/fibers_check.cpp", "csrc/cuda/fibers.cpp", "csrc/cuda/context.cpp")]
    command = [*words, "-std=c++17", "-O1", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", *flags]
    command += [f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(folder / "fibers_check")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return folder / "fibers_check"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("fibers"))


def check(program: Path, name: str, seed: int) -> None:
    """Run one of the kernels in fibers_check.cpp, which compares its results itself."""
    done = subprocess.run([program, name, str(seed)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "name", ["barriers", "shuffles", "products", "ring", "exchange", "deadlocks", "misuses", "threads", "stop"]
)
def test_kernels(program: Path, name: str, seed: int) -> None:
    """Whatever the order in which the threads go on, the result is the same, and what is wrong is said."""
    check(program, name, seed)


def test_widening(program: Path) -> None:
    """Every int8 and every e4m3 value, as the lower and as the upper of a pair, is itself in bf16."""
    check(program, "widening", 0)


@pytest.mark.parametrize("seed", SEEDS[1:])
def test_a_missing_wait_shows(program: Path, seed: int) -> None:
    """A kernel that lacks a wait between blocks computes something else under a random schedule."""
    check(program, "missing_wait", seed)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ucontext is deprecated elsewhere")
def test_without_assembly(tmp_path: Path) -> None:
    """On processors whose registers fibers.cpp does not know, the C library switches."""
    program = compiled(tmp_path, "-DSIREN_UCONTEXT")
    for name in ("barriers", "ring", "exchange", "deadlocks", "threads"):
        check(program, name, 1)
