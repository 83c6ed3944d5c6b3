"""The Triton embedding sum equals the plain PyTorch one bit for bit, at sizes that fit no block.

Triton decides at its first import whether it interprets, so the checks run in a process of their own: this file as a
script, with TRITON_INTERPRET=1 for the CPU and without it on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SIZES = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 7, 3, 2), (6, 12, 33, 65, 1, 1), (3, 4, 9, 300, 2, 13), (1, 2, 1, 17, 9, 1)]


def run(mode: str, cache: Path) -> None:
    interpret = "1" if mode == "cpu" else "0"
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, __file__, mode]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_in_the_interpreter(tmp_path: Path) -> None:
    """All checks below, on CPU tensors."""
    run("cpu", tmp_path)


@needs_triton
def test_compiles_for_gpus(tmp_path: Path) -> None:
    """The compiler, which is stricter than the interpreter, makes machine code for Ampere and Hopper; no GPU needed."""
    run("compile", tmp_path)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernel ran in Triton's interpreter only")
def test_on_a_gpu(tmp_path: Path) -> None:
    """All checks below, compiled."""
    run("cuda", tmp_path)


def test_package_needs_no_triton(tmp_path: Path) -> None:
    """`siren.kernels` imports without triton, and does not bring it in."""
    script = "import sys; sys.modules['triton'] = None; import siren.kernels"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, check=True)


def check_values(op, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for K, J, V, d, B, T in SIZES:
            generator = torch.Generator().manual_seed(d)
            tables = torch.randn(K, J, V, d, generator=generator).to(device, dtype)
            codes = torch.randint(V, (B, J, T), generator=generator).to(device)
            expected = op.rvq_embed_reference(tables, codes)
            poisoned = torch.full((K, B, T, d), float("nan"), device=device)
            for variant in (codes, codes.int(), codes.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
                assert op.rvq_embed(tables, variant, out=poisoned) is poisoned
                assert torch.equal(poisoned, expected), (dtype, K, J, V, d, B, T)
                assert torch.equal(op.rvq_embed(tables, variant), expected)
                poisoned.fill_(float("nan"))


def check_neighbours_untouched(op, device: str) -> None:
    buffer = torch.full((3, 2, 3, 5, 7), -1.0, device=device)
    tables, codes = torch.ones(2, 4, 3, 7, device=device), torch.ones(3, 4, 5, dtype=torch.long, device=device)
    op.rvq_embed(tables, codes, out=buffer[1])
    assert (buffer[1] == 4).all()
    assert (buffer[0] == -1).all()
    assert (buffer[2] == -1).all()


def check_arguments(op, device: str) -> None:
    tables, codes = torch.ones(2, 4, 3, 8, device=device), torch.ones(5, 4, 6, dtype=torch.long, device=device)
    assert op.rvq_embed(tables, codes[:, :, :0]).shape == (2, 5, 0, 8)
    wrong = {
        r"tables must be float \[K, J, V, d\]": (tables.long(), codes),
        r"tables must be float .*\[4, 3, 8\]": (tables[0], codes),
        "tables must be contiguous": (tables.transpose(0, 1), codes),
        r"codes must be \[B, J=4, T\]": (tables, codes[:, :3]),
        "codes must be int32 or int64": (tables, codes.float()),
        "codes must be on": (tables, codes.to("meta")),
        r"out must be contiguous float32 \[2, 5, 6, 8\]": (tables, codes, torch.empty(2, 5, 6, 9, device=device)),
        "out must be contiguous": (tables, codes, torch.empty(2, 5, 6, 8, dtype=torch.float16, device=device)),
    }
    for message, arguments in wrong.items():
        with pytest.raises((ValueError, TypeError), match=message):
            op.rvq_embed(*arguments)
    for bad in (-1, 3, 2**40):
        outside = codes.clone()
        outside[1, 2, 3] = bad
        if device == "cpu":
            with pytest.raises(ValueError, match=r"codes must be 0\.\.2"):
                op.rvq_embed(tables, outside)
            # Past the check, as on a GPU: the kernel itself must not read there.
            op._check, check = lambda *_: None, op._check
        sums = op.rvq_embed(tables, outside)
        if device == "cpu":
            op._check = check
        assert sums[:, 1, 3].isnan().all()
        assert sums.isnan().sum() == 2 * 8


def check_compiles(op) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = op._rvq_embed_kernel
    pointers = {"tables": "*bf16", "codes": "*i64", "sums": "*fp32"}
    constants = {"J": 12, "BLOCK_N": 8, "BLOCK_D": 256}
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, types, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    for architecture in (80, 90):
        assert triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]


if __name__ == "__main__":
    from siren.kernels import rvq_embed

    if sys.argv[1] == "compile":
        check_compiles(rvq_embed)
    else:
        for check in (check_values, check_neighbours_untouched, check_arguments):
            check(rvq_embed, sys.argv[1])
