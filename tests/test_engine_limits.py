"""The engine when the system gives no more memory or threads: one clear error, and nothing lost.

Limits are set on the address space of a process of their own, a little above what it already uses.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("siren._cpu", reason="the C++ extension is not built")

START = """
import pathlib, resource, torch, siren
torch.set_num_threads(1)
model = siren.Siren(siren.SirenConfig.preset("tiny")).eval()
sampler = siren.Sampler(model, backend="cpu", weights="bf16", threads=2)
session = sampler.start(torch.randn(1, 3, 32))
session.step(2)
before = session.codes

def limit(megabytes):
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))

def unlimited():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def refused(call):
    try:
        call()
    except siren.SirenError as error:
        print(error)
    else:
        raise SystemExit("no error")
"""


def run(code: str) -> str:
    if not sys.platform.startswith("linux") or "san.so" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("limits on the address space need Linux without a sanitizer")
    result = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_select_without_memory_changes_nothing():
    """The session still has its batch, codes and place, and goes on."""
    printed = run("""
limit(60)
refused(lambda: session.select([0] * 12000))
unlimited()
assert session.batch == 1 and torch.equal(session.codes, before)
session.step(2)
assert torch.equal(session.codes[..., :2], before) and session.frame == 4
""")
    assert printed == "not enough memory for 12000 sequences: keep fewer\n"


def test_threads_that_cannot_start():
    """An error each time, not a call that waits for workers that never were; with memory again, it works."""
    printed = run("""
limit(30)
for _ in range(2):
    refused(lambda: siren.Sampler(model, backend="cpu", weights="bf16", threads=64))
unlimited()
many = siren.Sampler(model, backend="cpu", weights="bf16", threads=64)
assert many.sample(torch.ones(1, 3, 32), frames=1).codes.shape == (1, 12, 1)
""")
    assert printed.count("the engine's threads cannot start") == 2
