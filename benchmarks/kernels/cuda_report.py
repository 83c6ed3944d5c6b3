"""What the persistent CUDA kernel takes on each architecture, as it is built: no GPU is needed.

    python benchmarks/kernels/cuda_report.py [--archs 80 90a 100 120] [--json FILE]

Registers, stack and static shared memory are what cuobjdump finds in siren._cuda, or where that is not built, in what
nvcc makes of csrc/cuda/launch.cu; so are the instructions that are counted. The dynamic shared memory of a launch is
what csrc/cuda/layout.h says for the programs of siren/program.py, and with it the stages that are left for the ring of
weights. Exit code 1 if an architecture is missing, if a kernel spills or keeps a stack, if a block does not fit a
multiprocessor, or if what reads the weights is not there; 2 where neither the extension nor nvcc is found.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compile_report import SHARED_LIMIT

from siren.program_format import WARPS, Format

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = ROOT / "csrc" / "cuda"
DEFAULT_ARCHS = ("80", "90a", "100", "120")
FEW_ARCHS = ("80", "90a")  # the two ways in which weights are copied
KERNEL = "siren_decode"
PARTITIONS, REGISTERS = 4, 1 << 14  # of a multiprocessor; of a partition, which has whole warps
REGISTER_UNIT = 256  # registers are given to a warp in pieces of so many
RESERVED_SHARED = 1024  # of every block, by CUDA, beside what a block may ask for
FEWEST_STAGES = 2  # fewer, and csrc/cuda/launch.cu refuses
SPILLS = ("LDL", "STL")
LAYOUT_PROGRAM = """
#include <cstdio>
#include "layout.h"

int main() {
  siren::cuda::Arguments args{};
  int limit;
  while (std::scanf("%d %d %d %d %d", &args.format, &args.staged_bytes, &args.codes_per_codebook, &args.head_dim,
                    &limit) == 5) {
    args.stages = siren::cuda::ring_stages(args, limit);
    std::printf("%d %d\\n", args.stages, siren::cuda::shared_layout(args).bytes);
  }
}
"""


def wanted_archs() -> list[str]:
    """SIREN_CUDA_ARCHS, or as in setup.py all that siren is built for less what the nvcc that is here does not know."""
    if given := os.environ.get("SIREN_CUDA_ARCHS"):
        return given.split(",")
    nvcc = tool("nvcc")
    known = run([nvcc, "--list-gpu-arch"]) if nvcc else ""
    return [arch for arch in DEFAULT_ARCHS if not nvcc or f"compute_{arch.rstrip('af')}\n" in known]


def capability(arch: str) -> int:
    """90 of "90a"."""
    return int(arch.rstrip("af"))


def shared_limit(arch: str) -> int:
    """Bytes of shared memory that a block can have; the least there is, where the architecture is not known."""
    number = capability(arch)
    return SHARED_LIMIT.get(100 if number == 103 else number, min(SHARED_LIMIT.values()))


def copy_opcode(arch: str) -> str:
    """How the weights come to shared memory: in bulk, where the architecture can."""
    return "LDGSTS" if capability(arch) < 90 else "UBLKCP"


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, where toolkits are installed, or the one that Triton brings."""
    places = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(places))


def find_module() -> Path | None:
    """The file of siren._cuda, which is not imported: that would need CUDA's driver."""
    try:
        found = importlib.util.find_spec("siren._cuda")
    except ImportError:
        return None
    return Path(found.origin) if found and found.origin else None


def compile_kernel(archs: list[str], folder: Path) -> Path:
    """What nvcc makes of launch.cu for these architectures."""
    path = folder / "launch.fatbin"
    words = [tool("nvcc") or "nvcc", "-std=c++17", "-O3", "--threads", "2", f"-I{ROOT / 'csrc'}", "-fatbin", "-o", path]
    words += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    run([*words, CUDA / "launch.cu"])
    return path


def run(words: list[Any], text: str | None = None) -> str:
    """What a program prints. Raises RuntimeError with its messages where it fails."""
    made = subprocess.run([str(word) for word in words], capture_output=True, text=True, input=text, timeout=600)
    if made.returncode:
        raise RuntimeError(f"{Path(str(words[0])).name}: {(made.stderr or made.stdout).strip()[-2000:]}")
    return made.stdout


def resources(listing: str) -> list[dict[str, Any]]:
    """Rows of our kernels, from what `cuobjdump --dump-resource-usage` prints."""
    rows, arch, name = [], "", ""
    for line in listing.splitlines():
        if found := re.search(r"arch = sm_(\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\S+):", line):
            name = found[1]
        elif KERNEL in name and (numbers := dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line))):
            row = {"arch": arch, "kernel": KERNEL, "registers": int(numbers["REG"]), "stack": int(numbers["STACK"])}
            static = max(0, int(numbers["SHARED"]) - RESERVED_SHARED)
            rows.append({**row, "local": int(numbers["LOCAL"]), "static_shared": static})
            name = ""
    return rows


def opcodes(listing: str) -> dict[str, int]:
    """How often our kernel has each instruction, by the first part of its name, from what `cuobjdump -sass` prints."""
    counts: collections.Counter[str] = collections.Counter()
    ours = False
    for line in listing.splitlines():
        if "Function : " in line:
            ours = KERNEL in line
        elif ours and (found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", line)):
            counts[found[1]] += 1
    return dict(counts)


def inspect(path: Path) -> list[dict[str, Any]]:
    """A row for each architecture in a file, with counts of the instructions that matter."""
    program = tool("cuobjdump")
    if program is None:
        raise RuntimeError("cuobjdump was not found: install the CUDA toolkit or triton")
    rows = resources(run([program, "--dump-resource-usage", path]))
    for row in rows:
        counts = opcodes(run([program, "-sass", "-arch", f"sm_{row['arch']}", path]))
        row |= {"mma": counts.get("HMMA", 0), "copies": counts.get(copy_opcode(row["arch"]), 0)}
        row |= {"spills": sum(counts.get(name, 0) for name in SPILLS), "instructions": sum(counts.values())}
    return rows


def shared_memory(archs: list[str], folder: Path) -> list[dict[str, Any]]:
    """A row for every launch of the presets: its shared memory, and the stages of the ring in it."""
    from siren import SirenConfig
    from siren.program import build_program

    source, program = folder / "layout.cpp", folder / "layout"
    source.write_text(LAYOUT_PROGRAM)
    run([os.environ.get("CXX", "g++"), "-std=c++17", f"-I{CUDA}", f"-I{ROOT / 'csrc'}", source, "-o", program])
    rows: list[dict[str, Any]] = []
    given = []
    for preset in ("tiny", "siren-1.6b", "siren-3.1b"):
        config = SirenConfig.preset(preset)
        for batch, guided in ((1, False), (1, True), (16, False), (16, True)):
            for limit in {shared_limit(arch) for arch in archs}:
                made = build_program(config, batch, guided, config.num_experts, limit)
                for weights in Format:
                    row = {"preset": preset, "batch": batch, "guided": guided, "weights": weights.name, "limit": limit}
                    rows.append({**row, "staged": made.staged_bytes})
                    sizes = (weights.value, made.staged_bytes, config.codebook_size, config.head_dim, limit)
                    given.append(" ".join(str(size) for size in sizes))
    for row, line in zip(rows, run([program], "\n".join(given)).splitlines(), strict=True):
        row["stages"], row["bytes"] = (int(word) for word in line.split())
    return rows


def faults(kernels: list[dict[str, Any]], shared: list[dict[str, Any]], archs: list[str]) -> list[str]:
    """A line for everything that must not be."""
    lines = [f"sm_{arch}: no {KERNEL}" for arch in archs if arch not in {row["arch"] for row in kernels}]
    for row in kernels:
        where = f"sm_{row['arch']}"
        if row["stack"] or row["local"] or row["spills"]:
            lines.append(
                f"{where}: a stack of {row['stack']} bytes, {row['local']} bytes of local memory, and "
                f"{row['spills']} instructions that use them"
            )
        warp = -(-32 * row["registers"] // REGISTER_UNIT) * REGISTER_UNIT
        if -(-(WARPS + 1) // PARTITIONS) * warp > REGISTERS:
            lines.append(f"{where}: {row['registers']} registers a thread, {WARPS + 1} warps do not fit")
        for name in ("mma", "copies"):
            if not row[name]:
                lines.append(f"{where}: no instruction of the kind {name}")
    for row in shared:
        where = f"{row['preset']}, batch {row['batch']}{', guided' if row['guided'] else ''}, {row['weights']}"
        if row["stages"] < FEWEST_STAGES or row["bytes"] > row["limit"]:
            lines.append(f"{where}: {row['bytes']} bytes of {row['limit']} with {row['stages']} stages of weights")
    return lines


def report(archs: list[str] | None) -> dict[str, Any]:
    """All rows and faults; None: of the architectures that siren._cuda was built for, or where it is not built, of two.
    Raises FileNotFoundError where there is nothing to look at."""
    path = find_module()
    if path is None and tool("nvcc") is None:
        raise FileNotFoundError("siren._cuda is not built, and nvcc was not found to compile csrc/cuda/launch.cu")
    with tempfile.TemporaryDirectory(prefix="siren-cuda-report-") as name:
        kernels = inspect(path or compile_kernel(archs or [*FEW_ARCHS], Path(name)))
        archs = archs or [row["arch"] for row in kernels]
        shared = shared_memory(archs, Path(name))
    of = str(path.name) if path else "csrc/cuda/launch.cu"
    return {"of": of, "kernels": kernels, "shared": shared, "faults": faults(kernels, shared, archs)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a column for each field."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=wanted_archs(), metavar="XY", help="as nvcc names them: 80 90a")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    try:
        result = report(options.archs)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{result['of']}\n\n{table(result['kernels'])}\n\n{table(result['shared'])}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    for line in result["faults"]:
        print(f"error: {line}", file=sys.stderr)
    raise SystemExit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
