"""What a result was measured on, and how much memory is free for it."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import siren
from siren.engine import default_threads, instruction_path


def describe() -> dict[str, Any]:
    """CPU, software, date and commit."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": default_threads(),
        "memory_gb": round(_kilobytes("/proc/meminfo", "MemTotal") / 1e6, 1),
        "instructions": instruction_path(),
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
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
