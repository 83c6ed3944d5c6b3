"""Writes the README's tables from benchmarks/results/*.json: `python benchmarks/readme.py`, or --check to compare."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from decode import table

ROOT = Path(__file__).parent.parent


def decode_section() -> str:
    """One table for each results/decode-*.json, with what it was measured on."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("decode-*.json"), key=lambda path: path.stem):
        result = json.loads(path.read_text(encoding="utf-8"))
        about = result["about"]
        measured = result["read_gb_per_s"].items()
        bandwidth = ", ".join(f"{value['median']:.1f} GB/s at batch {size}" for size, value in measured)
        machine = f"{about['cpu']}, {about['threads']} threads, {about['instructions']}, torch {about['torch']}"
        when = f"{about['date'][:10]}, commit {about['commit']}"
        head = f"{about['preset']}, {machine}, {when}. Read bandwidth {bandwidth}. `{about['command']}`"
        parts.append(f"{head}\n\n{table(result['rows'])}")
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
