"""What the benchmarks share: their command line, what a result was measured on, and the memory that is free for it.

As a script: describe_gpu() as JSON.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

import siren
from siren.engine import default_threads, instruction_path
from siren.errors import InputError, SirenError

MOST_THREADS = 256


def main(run: Callable[..., None]) -> None:
    """The arguments of `run` as a command line; an error of Siren's is one line and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    try:
        app()
    except SirenError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def thread_count(threads: int) -> int:
    """What --threads means: 0 is every core that this process may use."""
    if not 0 <= threads <= MOST_THREADS:
        raise InputError(f"--threads must be from 0 (all cores) to {MOST_THREADS}, not {threads}")
    return threads or default_threads()


def describe() -> dict[str, Any]:
    """CPU, software, date and commit."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": default_threads(),
        "memory_gb": round(_kilobytes("/proc/meminfo", "MemTotal") / 1e6, 1),
        "instructions": instruction_path(),
        **_software(),
    }


def describe_gpu() -> dict[str, Any]:
    """The first GPU as it is found, software, date and commit."""
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "multiprocessors": device.multi_processor_count,
        "l2_mb": round(device.L2_cache_size / 1e6, 1),
        "gpu_memory_gb": round(device.total_memory / 1e9, 1),
        "capability": f"{device.major}.{device.minor}",
        "driver": _nvidia_smi("driver_version"),
        "clocks": gpu_clocks(),
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton"),
        **_software(),
    }


def gpu_clocks() -> dict[str, str]:
    """Clocks at this moment, in nvidia-smi's words; nothing is set."""
    return {name: _nvidia_smi(f"clocks.{name}") for name in ("sm", "mem", "max.sm", "max.mem")}


def _nvidia_smi(field: str) -> str:
    command = ["nvidia-smi", "--id=0", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _software() -> dict[str, str]:
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "siren": siren.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def available_bytes() -> int:
    """Memory that can be used without swapping; 0 where the system does not say."""
    return _kilobytes("/proc/meminfo", "MemAvailable") * 1024


def private_bytes() -> int:
    """Memory of this process that no file backs."""
    return _kilobytes("/proc/self/status", "RssAnon") * 1024


def peak_bytes() -> int:
    """The most memory this process has held, files it had mapped included."""
    return _kilobytes("/proc/self/status", "VmHWM") * 1024


def _kilobytes(path: str, name: str) -> int:
    value = _field(path, name)
    return int(value.split()[0]) if value else 0


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _commit() -> str:
    """What SIREN_COMMIT says, for a copy without its history, or git."""
    if given := os.environ.get("SIREN_COMMIT"):
        return given
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    print(json.dumps(describe_gpu()))
