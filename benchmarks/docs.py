"""Writes what the pages show of benchmarks/results: `python benchmarks/docs.py`, or --check to compare.

A page, README.md or one in docs, marks a part with <!-- NAME --> and <!-- /NAME -->, where NAME is one of SECTIONS;
what stands between is replaced by what that function makes of the committed JSON files. A new table needs a function
here and its markers on a page. docs/retrieval.md is a whole page of one benchmark: all but its head is written here.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ablation_report
import align_report
import alignment_report
import best_of_n
import decode_report
import memory
import numerics
import retrieval_report
import train
import train_report

from siren.evaluate import compare

ROOT = Path(__file__).parent.parent
_MARKED = re.compile(r"<!-- ([a-z0-9-]+) -->\n(.*?)<!-- /\1 -->", re.DOTALL)
_LOOSE = re.compile(r"<!-- (/?[a-z0-9-]+) -->")


def result(name: str) -> dict[str, Any]:
    """benchmarks/results/NAME.json."""
    value: dict[str, Any] = json.loads((_results() / f"{name}.json").read_text(encoding="utf-8"))
    return value


def decode_results() -> Iterator[dict[str, Any]]:
    """results/decode-*.json, then the decode parts of every results/gpu-*.json that has them."""
    for path in sorted(_results().glob("decode-*.json"), key=lambda path: path.stem):
        yield result(path.stem)
    yield from _gpu_results()


def _gpu_results() -> Iterator[dict[str, Any]]:
    for path in sorted(_results().glob("gpu-*.json"), key=lambda path: path.stem):
        parts = result(path.stem)["parts"]
        for name in ("decode", "decode-compile"):
            if parts.get(name, {}).get("rows"):
                yield parts[name]


def decode_section() -> str:
    """One table for each result, with what it was measured on."""
    return _parts(map(_decode, decode_results()))


def decode_first_section() -> str:
    """The main result of a CPU, and those of GPUs."""
    return _parts(map(_decode, (result("decode-1.6b"), *_gpu_results())))


def _decode(value: dict[str, Any]) -> str:
    about = value["about"]
    if "gpu" in about:
        kind, clock = "Copy", about.get("clocks_after", {}).get("sm", "unknown")
        machine = f"{about['gpu']}, SM at {clock}, driver {about['driver']}, torch {about['torch']}"
        machine += f", triton {about['triton']}, {_when(about)}"
    else:
        kind, machine = "Read", f"{_machine(about)}, {_when(about)}"
    measured = value[f"{kind.lower()}_gb_per_s"].items()
    bandwidth = ", ".join(f"{speed['median']:.1f} GB/s at batch {size}" for size, speed in measured)
    head = f"{about['preset']}, {machine}. {kind} bandwidth {bandwidth}. `{about['command']}`"
    tables = decode_report.table(value["rows"]), decode_report.residual_table(value.get("residual", []))
    return _parts((_wrapped(head), *tables))


def memory_section() -> str:
    """What loading and sampling take."""
    parts = []
    for path in sorted(_results().glob("memory-*.json")):
        value = result(path.stem)
        about = value["about"]
        head = (
            f"{about['preset']}, a checkpoint of {about['checkpoint_bytes'] / 1e9:.2f} GB, "
            f"{value['rows'][0]['frames']} frames, {about['cpu']}, torch {about['torch']}, {_when(about)}. Megabytes; "
            "growth is the most memory above that before loading, over the bytes of the weights."
        )
        parts += [_wrapped(head), memory.table(value["rows"])]
    return _parts(parts)


def numerics_section() -> str:
    """The rows of each model."""
    value = result("numerics")
    parts = []
    for model in dict.fromkeys(row["model"] for row in value["rows"]):
        head = f"{model}, {_machine(value['about'])}, {_when(value['about'])}."
        parts += [_wrapped(head), numerics.table([row for row in value["rows"] if row["model"] == model])]
    return _parts(parts)


def train_section() -> str:
    value = result("train-cpu")
    about = value["about"]
    head = (
        f"One expert of {about['preset']} ({about['parameters'] / 1e6:.1f} million parameters), {about['batch']} crops "
        f"of up to {about['frames']} frames, {_machine(about)}, {_when(about)}. `{about['command']}`"
    )
    return _parts((_wrapped(head), train_report.table(value["rows"], train.PARTS)))


def align_section() -> str:
    value = result("align-cpu")
    about = value["about"]
    rollouts = about["prompts_per_step"] * about["num_generations"]
    head = (
        f"siren-mini, {rollouts} rollouts of {about['seconds']:g} s a step, {_machine(about)}, {_when(about)}. "
        "Medians; parts of a step run side by side, so their shares add up to more than all of it. "
        f"`{about['command']}`"
    )
    return _parts((_wrapped(head), align_report.table(value["rows"])))


def alignment_section() -> str:
    return _alignment("alignment")


def alignment_one_seed_section() -> str:
    return _alignment("alignment-one-seed")


def _alignment(name: str) -> str:
    """The report of alignment.py without its title and the line that says who wrote it."""
    head, tables = alignment_report.report(result(name)).split("\n\n", 2)[2].strip().split("\n\n", 1)
    return _parts((_wrapped(head), tables))


def best_of_n_section() -> str:
    head, table = best_of_n.report(result("best-of-n")).strip().split("\n\n", 1)
    return _parts((_wrapped(head), table))


def retrieval_section() -> str:
    """siren-mini by retrieval, in short; docs/retrieval.md has all of it."""
    value = result("retrieval")
    lines = ["| sounds | own kind first | with prompts shuffled |", "| --- | ---: | ---: |"]
    for name, end in (("retrieval", ""), ("retrieval_without_noise", ", without the noise")):
        for kind, title in retrieval_report.KINDS.items():
            row = value[name][kind]
            shuffled = f"{row['shuffled']['top1']:.2f}"
            lines.append(f"| {title}{end} | {row['hits']} of {row['sounds']} | {shuffled} |")
    loss = {name: sum(books) / len(books) for name, books in value["loss"].items() if name in ("own", "shuffled")}
    low, high = value["retrieval"]["generated"]["interval_by_class"]
    after = (
        f"The mean loss over all codebooks on held-out clips is {loss['own']:.2f} nats with a clip's own prompt and "
        f"{loss['shuffled']:.2f} with another clip's; the codec leaves a log-mel distance of "
        f"{value['codec_log_mel_db']['mean']:.1f} dB. For other prompts of such kinds the interval is wide, "
        f"{low:.2f} to {high:.2f}: the sounds of a prompt succeed or fail together."
    )
    return _parts(("\n".join(lines), _wrapped(after)))


def retrieval_aligned_section() -> str:
    """What an embedding that had no part in the alignment hears, before and after."""
    lines = ["| Model | Own kind first | 95%, these prompts | 95%, such prompts |", "| --- | ---: | ---: | ---: |"]
    models = {
        "retrieval": "siren-mini",
        "retrieval-aligned": "after `anti-causal`",
        "retrieval-guided": "after `guided`",
    }
    for name, title in models.items():
        row = result(name)["retrieval"]["generated"]
        these, such = ("{:.2f} to {:.2f}".format(*row[key]) for key in ("interval", "interval_by_class"))
        lines.append(f"| {title} | {row['hits']} of {row['sounds']} | {these} | {such} |")
    return "\n".join(lines)


def studies_section() -> str:
    """The numbers of the five studies by codebook, and of the task vectors by module."""
    cosine, semantics, gradients, convergence, vectors = (
        result(f"study-{name}") for name in ("cosine", "semantics", "gradients", "convergence", "task-vectors")
    )
    lines = [
        "| Codebook | Accuracy (95%) | Final loss, nats | of its entropy |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for accuracy, loss in zip(semantics["codebooks"], convergence["codebooks"], strict=True):
        low, high = accuracy["interval"]
        lines.append(
            f"| {accuracy['codebook'] + 1} | {accuracy['accuracy']:.3f} ({low:.3f} to {high:.3f}) | "
            f"{loss['final_val_loss']:.2f} | {loss['final_loss_over_entropy']:.0%} |"
        )
    together = semantics["together"]["accuracy"]
    text = (
        f"Codebooks: accuracy on {semantics['test_clips']} test clips (chance {semantics['chance']:.3f}, all codebooks "
        f"together {together:.3f}), and loss of independent heads on held-out clips (mean "
        f"{convergence['val_loss_mean']:.2f}, last over first {convergence['val_loss_ratio']:.2f})."
    )
    rows = ["| Cosine of two codebooks' features | Mean | Standard deviation | In random order |"]
    rows.append("| --- | ---: | ---: | ---: |")
    for view, title in (("features", "at the same frame"), ("pooled", "mean over a clip")):
        whole, shuffled = cosine["views"][view]["overall"], cosine["views"][view]["overall_permuted"]
        numbers = f"{whole['mean']:.3f} | {whole['std']:.3f} | {shuffled['mean']:.3f}, {shuffled['std']:.3f}"
        rows.append(f"| {title} | {numbers} |")
    angles = ["| Angle between gradients, degrees | Two heads | One head, two batches |", "| --- | ---: | ---: |"]
    for name, title in (("averaged", "averaged over outputs, as in the paper"), ("whole", "whole gradients")):
        two, one = gradients[name]["overall"], gradients[name]["same_head_other_batch"]
        angles.append(f"| {title} | {two['mean']:.1f} ± {two['std']:.1f} | {one['mean']:.1f} ± {one['std']:.1f} |")
    modules = ["| Task vectors of | Mean cosine of two experts | Early with last |", "| --- | ---: | ---: |"]
    for name, module in vectors["modules"].items():
        modules.append(f"| {name} | {module['mean']:.2f} | {module['early_with_last']:.2f} |")
    return _parts((_wrapped(text), *("\n".join(table) for table in (lines, rows, angles, modules))))


def thousand_section() -> str:
    """A thousand clips under kills."""
    value = result("thousand")
    made, evaluated = value["generate"], value["evaluate"]
    runs = [
        ("generate, never killed", made["alone"]["clips"], made["alone"]),
        (f"generate, after {made['kills']} kills", made["last_life_made"], made["lives"][-1]),
        ("evaluate, never killed", value["clips"], evaluated["alone"]),
        (f"evaluate, {evaluated['kills']} kills", value["clips"], evaluated),
    ]
    rows = ["| Run | Clips of the process | Seconds | Peak memory, MB |", "| --- | ---: | ---: | ---: |"]
    for name, count, measured in runs:
        rows.append(f"| {name} | {count} | {measured['seconds']} | {measured['peak_mb']} |")
    text = (
        f"{value['clips']} clips of {value['seconds_of_a_clip']:g} s by {value['model']}, {value['threads']} thread, "
        f"{len(value['problems'])} problems ({value['machine']['cpu']}, {_when(value['machine'])})."
    )
    return _parts((_wrapped(text), "\n".join(rows)))


def evaluation_section() -> str:
    """siren-mini beside a model of the ablations, on the same captions and references."""
    names = {"siren-mini": "evaluation-siren-mini", "6-2 of the ablations": "evaluation-6-2"}
    text = compare.table([result(file) | {"path": name} for name, file in names.items()]).strip()
    table, notes = text.split("\n\n", 1)
    return f"{table}\n\n" + "\n".join(_wrapped(line).replace("\n", "\n  ") for line in notes.splitlines())


def ablations_section() -> str:
    """The paper's tables beside ours."""
    return ablation_report.report(result("ablations")).strip()


SECTIONS: dict[str, Callable[[], str]] = {
    "decode-first": decode_first_section,
    "decode": decode_section,
    "memory": memory_section,
    "numerics": numerics_section,
    "train": train_section,
    "align": align_section,
    "alignment": alignment_section,
    "alignment-one-seed": alignment_one_seed_section,
    "best-of-n": best_of_n_section,
    "retrieval": retrieval_section,
    "retrieval-aligned": retrieval_aligned_section,
    "ablations": ablations_section,
    "studies": studies_section,
    "thousand": thousand_section,
    "evaluation": evaluation_section,
}


def pages() -> list[Path]:
    """README.md and the pages in docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(page: Path) -> str:
    """The page's text with its marked parts as they must be. Raises ValueError for a marker that is none."""
    text = page.read_text(encoding="utf-8")
    if page.name == "retrieval.md":
        head = text.split("\n\n", 2)[:2]
        return _parts((*head, retrieval_report.report(result("retrieval"))))
    marked = {found[1] for found in _MARKED.finditer(text)} & SECTIONS.keys()
    if wrong := [name for name in _LOOSE.findall(text) if name.removeprefix("/") not in marked]:
        raise ValueError(f"{page.name}: <!-- {wrong[0]} --> is no section of benchmarks/docs.py, or has no other end")
    return _MARKED.sub(lambda found: f"<!-- {found[1]} -->\n\n{SECTIONS[found[1]]()}\n\n<!-- /{found[1]} -->", text)


def _results() -> Path:
    return ROOT / "benchmarks" / "results"


def _machine(about: dict[str, Any]) -> str:
    threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
    return f"{about['cpu']}, {threads}, {about['instructions']}, torch {about['torch']}"


def _when(about: dict[str, Any]) -> str:
    return f"{about['date'][:10]}, commit {about['commit']}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _parts(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    stale = [page for page in pages() if filled(page) != page.read_text(encoding="utf-8")]
    if "--check" in sys.argv[1:]:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        raise SystemExit(f"{names}: not what benchmarks/results says; run python benchmarks/docs.py" if stale else 0)
    for page in stale:
        page.write_text(filled(page), encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
