"""Writes the README's tables from benchmarks/results/*.json: `python benchmarks/readme.py`, or --check to compare."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decode_report import residual_table, table

ROOT = Path(__file__).parent.parent


def decode_results() -> Iterator[dict[str, Any]]:
    """results/decode-*.json, then the decode parts of every results/gpu-*.json that has them."""
    folder = ROOT / "benchmarks" / "results"
    for path in sorted(folder.glob("decode-*.json"), key=lambda path: path.stem):
        yield json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(folder.glob("gpu-*.json"), key=lambda path: path.stem):
        parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
        for name in ("decode", "decode-compile"):
            if parts.get(name, {}).get("rows"):
                yield parts[name]


def decode_section() -> str:
    """One table for each result, with what it was measured on."""
    parts = []
    for result in decode_results():
        about = result["about"]
        if "gpu" in about:
            kind, clock = "Copy", about.get("clocks_after", {}).get("sm", "unknown")
            machine = f"{about['gpu']}, SM at {clock}, driver {about['driver']}, torch {about['torch']}"
            machine += f", triton {about['triton']}"
        else:
            kind = "Read"
            machine = f"{about['cpu']}, {about['threads']} threads, {about['instructions']}, torch {about['torch']}"
        measured = result[f"{kind.lower()}_gb_per_s"].items()
        bandwidth = ", ".join(f"{value['median']:.1f} GB/s at batch {size}" for size, value in measured)
        when = f"{about['date'][:10]}, commit {about['commit']}"
        head = f"{about['preset']}, {machine}, {when}. {kind} bandwidth {bandwidth}. `{about['command']}`"
        tables = [head, table(result["rows"]), residual_table(result.get("residual", []))]
        parts.append("\n\n".join(part for part in tables if part))
    return "\n\n".join(parts)


def filled(readme: str) -> str:
    marked = re.compile(r"(<!-- decode-table -->\n).*?(<!-- /decode-table -->)", re.DOTALL)
    return marked.sub(lambda found: f"{found[1]}\n{decode_section()}\n\n{found[2]}", readme)


def main() -> None:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        raise SystemExit(
            "README.md differs from benchmarks/results: run benchmarks/readme.py" if before != after else 0
        )
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
