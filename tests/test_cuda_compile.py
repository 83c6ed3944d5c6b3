"""The persistent kernel as nvcc builds it: registers, stack, shared memory and instructions on every architecture.

No GPU is needed, only the built extension, or nvcc. What the report calls a fault is tried on listings made up here.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import cuda_report
import pytest
import torch

nvcc = pytest.mark.skipif(cuda_report.tool("nvcc") is None, reason="nvcc was not found")
FULL = 232448

RESOURCES = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN5other6kernelE:
  REG:255 STACK:800 SHARED:9000 LOCAL:8 CONSTANT[0]:904 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN5siren4cuda12siren_decodeENS0_9ArgumentsE:
  REG:168 STACK:144 SHARED:1024 LOCAL:0 CONSTANT[2]:132 CONSTANT[0]:904 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_80
 Function _ZN5siren4cuda12siren_decodeENS0_9ArgumentsE:
  REG:176 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:904 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
		Function : _ZN5siren4cuda12siren_decodeENS0_9ArgumentsE
        /*0000*/                   LDC R1, c[0x0][0x28] ;               /* 0x00000a00ff017b82 */
                                                                        /* 0x000e300000000800 */
        /*0010*/              @!P0 LDL.LU R19, [R1] ;                   /* 0x0000cd00ff137b82 */
        /*0020*/              @UP2 UBLKCP.S.G [UR4], [UR6], UR8 ;       /* 0x00000cd0ff137b82 */
       /*10030*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ; /* 0x00000cd0ff137b82 */
		Function : _ZN5other6kernelE
        /*0000*/                   STL [R1], R2 ;                       /* 0x00000a00ff017b82 */
"""


def test_the_kernel_fits_every_architecture() -> None:
    """There for each that SIREN_CUDA_ARCHS names, or for those that the module was built for; no spills, one block fits
    a multiprocessor with every preset's launches."""
    given = os.environ.get("SIREN_CUDA_ARCHS")
    try:
        result = cuda_report.report(given.split(",") if given else None)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert result["kernels"] and result["faults"] == []
    assert {row["weights"] for row in result["shared"]} == {"bf16", "int8", "fp8"}


def test_listings_are_read() -> None:
    """Only our kernel's lines count; what CUDA reserves of shared memory is not the kernel's."""
    hopper, ampere = cuda_report.resources(RESOURCES)
    assert (hopper["arch"], hopper["registers"], hopper["stack"], hopper["static_shared"]) == ("90a", 168, 144, 0)
    assert (ampere["arch"], ampere["registers"], ampere["stack"]) == ("80", 176, 0)
    assert cuda_report.opcodes(SASS) == {"LDC": 1, "LDL": 1, "UBLKCP": 1, "HMMA": 1}


def test_what_must_not_be_is_found() -> None:
    """A missing architecture, a spill, too many registers, an instruction that is not there, too little memory."""
    kernels = cuda_report.resources(RESOURCES)
    for row in kernels:
        row.update(mma=64, copies=1, spills=0)
    kernels[0]["spills"] = 1
    shared = {"preset": "tiny", "batch": 1, "guided": False, "weights": "bf16", "limit": FULL, "stages": 12}
    tight = [{**shared, "bytes": FULL}, {**shared, "bytes": FULL + 1}, {**shared, "bytes": 0, "stages": 1}]
    lines = cuda_report.faults(kernels, tight, ["80", "90a", "120"])
    assert lines == [
        "sm_120: no siren_decode",
        "sm_90a: a stack of 144 bytes, 0 bytes of local memory, and 1 instructions that use them",
        "sm_80: 176 registers a thread, 9 warps do not fit",
        f"tiny, batch 1, bf16: {FULL + 1} bytes of {FULL} with 12 stages of weights",
        f"tiny, batch 1, bf16: 0 bytes of {FULL} with 1 stages of weights",
    ]
    kernels[0].update(stack=0, spills=0, mma=0)
    kernels[1].update(registers=168, copies=0)
    assert cuda_report.faults(kernels, [], ["80"]) == [
        "sm_90a: no instruction of the kind mma",
        "sm_80: no instruction of the kind copies",
    ]


def test_architectures_are_those_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIREN_CUDA_ARCHS", "80,90a")
    assert cuda_report.wanted_archs() == ["80", "90a"]
    monkeypatch.delenv("SIREN_CUDA_ARCHS")
    monkeypatch.setattr(cuda_report, "tool", lambda name: name)
    monkeypatch.setattr(cuda_report, "run", lambda words: "compute_80\ncompute_90\ncompute_100\n")
    assert cuda_report.wanted_archs() == ["80", "90a", "100"]
    monkeypatch.setattr(cuda_report, "tool", lambda name: None)
    assert cuda_report.wanted_archs() == ["80", "90a", "100", "120"]


def test_architectures_that_siren_is_not_built_for_are_known() -> None:
    limits = {"80": 163, "86": 99, "89": 99, "90a": 227, "100f": 227, "103": 227, "120": 99, "121a": 99}
    assert {arch: cuda_report.shared_limit(arch) >> 10 for arch in limits} == limits
    bulk = {arch for arch in limits if cuda_report.copy_opcode(arch) == "UBLKCP"}
    assert bulk == {"90a", "100f", "103", "120", "121a"}


@nvcc
def test_microbench_compiles(tmp_path: Path) -> None:
    """Without a warning; what it measures needs a GPU, and it says so in one line."""
    program = tmp_path / "microbench"
    words = [cuda_report.tool("nvcc"), "-std=c++17", "-O1", "-Xptxas=-O1", "--threads", "2", "-Xcompiler=-Wall,-Wextra"]
    words += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_report.FEW_ARCHS]
    made = subprocess.run(
        [*words, "-o", program, cuda_report.CUDA / "microbench.cu"], capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stderr
    assert "warning" not in made.stderr
    if not torch.cuda.is_available():
        made = subprocess.run([program], capture_output=True, text=True, timeout=60)
        assert made.returncode == 1 and made.stderr.startswith("error: ") and made.stderr.count("\n") == 1
