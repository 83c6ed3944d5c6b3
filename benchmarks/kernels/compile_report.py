"""Compiles every kernel launch for GPUs that are not here and says what each kernel takes: no GPU is needed.

    python benchmarks/kernels/compile_report.py [--arch 80 90 100 120] [--stem rvq_embed ...] [--json FILE]

Each kernel's `launches()` run on meta tensors under a driver that only names an architecture, and a launch compiles
and stops there. So a kernel is specialised as it would be at run time: types, divisibility by 16, constants, warps and
stages. Registers, stack and spills are what ptxas prints in that very compilation. Exit code 1 if something does not
compile, if a kernel of the decode path spills or has instructions that add in another order than at other batch sizes,
or if one asks for more shared memory than a block can have.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from case import DECODE_STEMS, STEMS, load

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes a block can have
WORKERS = 2
_PTXAS = {
    "registers": re.compile(r"Used (\d+) registers"),
    "stack": re.compile(r"(\d+) bytes stack frame"),
    "spill_stores": re.compile(r"(\d+) bytes spill stores"),
    "spill_loads": re.compile(r"(\d+) bytes spill loads"),
    "static_shared": re.compile(r"(\d+) bytes smem"),
}


class CompileOnly:
    """A Triton driver of an architecture, with nothing to launch on; device numbers are architectures."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def compiling(arch: int, seen: Callable[[Any, str, float], None]) -> Iterator[None]:
    """Launches in the block compile for `arch` only; seen(kernel, what ptxas printed, seconds) hears of each."""
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001
        printed, start = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(printed):
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        seen(kernel, printed.getvalue(), time.perf_counter() - start)
        return kernel

    knobs.nvidia.dump_ptxas_log = True
    driver.set_active(CompileOnly(arch))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = launch


def describe(kernel: Any, log: str, seconds: float) -> dict[str, Any]:
    """What one compiled kernel takes, from Triton's metadata and ptxas' log."""
    found = {name: pattern.search(log) for name, pattern in _PTXAS.items()}
    if not found["registers"] or not found["spill_stores"]:
        raise RuntimeError(f"ptxas did not say what {kernel.name} takes: {log!r}")
    numbers = {name: int(match[1]) if match else 0 for name, match in found.items()}
    names = kernel.src.fn.arg_names
    return {
        "kernel": kernel.name,
        "constants": {names[path[0]]: str(value) for path, value in kernel.src.constants.items()},
        "num_warps": kernel.metadata.num_warps,
        "num_stages": kernel.metadata.num_stages,
        "shared": kernel.metadata.shared + numbers.pop("static_shared"),
        **numbers,
        "wgmma": "wgmma" in kernel.asm["ptx"],
        "seconds": round(seconds, 2),
    }


def compile_arch(arch: int, stems: list[str]) -> list[dict[str, Any]]:
    """Rows of one architecture: a compiled kernel each, or {"error": ...} for what did not compile."""
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    known: dict[str, dict[str, Any]] = {}  # by Triton's hash: what was compiled before is not compiled again
    listed: set[tuple[str, str]] = set()
    for stem in stems:
        try:
            launches = list(load(stem).launches())
        except Exception as error:
            rows.append({"stem": stem, "label": "launches()", "arch": arch, "error": _line(error)})
            continue
        for label, launch in launches:
            where = {"stem": stem, "label": label, "arch": arch}
            calls = 0

            def seen(kernel: Any, log: str, seconds: float, where: dict[str, Any] = where) -> None:
                nonlocal calls
                calls += 1
                if kernel.hash not in known:
                    known[kernel.hash] = describe(kernel, log, seconds)
                if (where["stem"], kernel.hash) not in listed:
                    listed.add((where["stem"], kernel.hash))
                    rows.append({**where, **known[kernel.hash]})

            try:
                with compiling(arch, seen):
                    launch()
                if not calls:
                    raise RuntimeError("launched no kernel")
            except Exception as error:
                rows.append({**where, "error": _line(error)})
        print(f"sm_{arch}, {stem}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """A line for everything that must not be."""
    lines = []
    for row in rows:
        where = f"{row['stem']}, {row['label']}, sm_{row['arch']}"
        if "error" in row:
            lines.append(f"{where}: {row['error']}")
            continue
        if row["stem"] in DECODE_STEMS and row["spill_stores"] + row["spill_loads"]:
            lines.append(f"{where}: {row['kernel']} spills {row['spill_stores']} bytes")
        if row["stem"] in DECODE_STEMS and row["wgmma"]:
            lines.append(f"{where}: {row['kernel']} uses wgmma, whose sums are not those of other batch sizes")
        limit = SHARED_LIMIT.get(row["arch"], min(SHARED_LIMIT.values()))
        if row["shared"] > limit:
            lines.append(f"{where}: {row['kernel']} takes {row['shared']} bytes of shared memory of {limit}")
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    head = ["kernel", "of", "sm", "warps", "stages", "registers", "spilled bytes", "stack", "shared", "s"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for row in rows:
        if "error" not in row:
            names = ("arch", "num_warps", "num_stages", "registers", "spill_stores", "stack", "shared", "seconds")
            cells = [f"`{row['kernel']}`", f"{row['stem']}: {row['label']}", *(str(row[name]) for name in names)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _line(error: BaseException) -> str:
    """An error as one line. Triton's compile errors end with what is wrong, after an excerpt of the source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    cause = f" ({_line(error.__cause__)})" if error.__cause__ else ""
    return f"{type(error).__name__}: {text[:500]}{cause}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED_LIMIT), metavar="CC")
    parser.add_argument("--stem", nargs="+", default=list(STEMS), choices=STEMS)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported, which the workers do
    with tempfile.TemporaryDirectory(prefix="siren-compile-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # an old compilation would hide a failure and has no log
        with multiprocessing.get_context("spawn").Pool(min(WORKERS, len(options.arch))) as pool:
            parts = pool.starmap(compile_arch, [(arch, options.stem) for arch in options.arch], chunksize=1)
    rows = [row for part in parts for row in part]
    print(table(rows))
    wrong = faults(rows)
    if options.json:
        import triton  # here, after the workers have theirs: this process compiles nothing

        result = {"triton": triton.__version__, "archs": options.arch, "kernels": rows, "faults": wrong}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
