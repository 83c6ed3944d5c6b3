"""`siren evaluate`: lists of clips in, a result with figures out; what was embedded is kept and never done twice.

OUT.json            the result;  OUT.clips.jsonl  a line for each generated clip;  OUT.work/  finished parts
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..audio import write_files
from ..data.clips import is_file
from ..errors import DataError, InputError, SirenError
from ..jsonl import check_folder
from .clip_lists import ClipList, file_digest, list_digest, read_list
from .figures import Figures, compute_figures
from .pairs import find_pairs, no_pairs
from .parts import PART, Limits, Part, make_part, part_path, read_part
from .settings import EvaluateSettings
from .sides import Side

if TYPE_CHECKING:
    from .embedders import Embedder

FORMAT = "siren-evaluation 1"
_LISTED_SKIPS = 100  # in the result; every clip's line of the clips file says it too
_STALE = 86400.0  # seconds after which a half-written file of a run that was killed is no other run's


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate a list of generated clips, write the result, and return it (see docs/evaluation.md for its keys).

    Clips are embedded in parts of 64, in the order of the list; finished parts are in the work folder. A run that was
    killed goes on behind them, and shards are runs that do some of the parts each: they give {"format", "parts",
    "made"} and write no result. Memory does not grow with the number of clips, but for ids, prompts and scores, and
    vectors as far as they take less than 256 MiB a list.

    Raises InputError and DataError for arguments and lists that cannot be, before anything is written; DataError if
    more than half of a list's clips cannot be used; what `load_embedder` raises; and SirenError if writing fails,
    after which the same call goes on.
    """
    began = time.monotonic()
    lists = {"generated": read_list(settings.generated)}
    if settings.reference is not None:
        lists["reference"] = read_list(settings.reference)
    for title, clips in lists.items():
        _check_usable(title, clips, [("missing", str(e.path)) for e in clips.entries if not is_file(e.path)])
    embedders = _load(settings, lists["generated"])
    pairs = find_pairs(lists["generated"], lists["reference"]) if "reference" in lists else []
    _check_metrics(settings, lists, embedders, bool(pairs))
    for path in (settings.out, settings.html):
        if path is not None:
            _check_target(Path(path).expanduser())
    work = settings.work_folder()
    check_folder(work)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SirenError(f"cannot make the folder {work}: {error.strerror}") from error

    digests = _Digests(lists)
    done = _embed(settings, work, lists, digests, embedders)
    if settings.shard_of() is not None:
        made = sum(part is not None for parts in done.values() for part in parts)
        return {"format": f"{FORMAT}, shard {settings.shard}", "work": str(work), "parts": made}
    hashes = {title: list_digest(clips, digests.all(title)) for title, clips in lists.items()}
    sides = {
        key: Side(lists[key[0]], hashes[key[0]], [part for part in parts if part is not None])
        for key, parts in done.items()
    }
    for (title, _), side in sides.items():
        _check_usable(title, side.clips, [(reason, detail) for _, reason, detail in side.skips])
    found = []
    for i, embedder in enumerate(embedders):
        found.append(compute_figures(embedder, sides["generated", i], sides.get(("reference", i)), pairs, settings))
    figures = [figure for one in found for figure in one.figures]
    absent = [reason for one in found for reason in one.absent]
    if not pairs and "reference" in lists:
        reason = no_pairs(lists["generated"], lists["reference"])
        absent = [a | {"reason": reason} if a["label"].startswith("KL ") else a for a in absent]
    if not figures:
        raise DataError(
            "there is nothing to compute: " + ("; ".join(a["reason"] for a in absent) or "give --reference")
        )
    result = {
        "format": FORMAT,
        "about": _about(settings),
        "generated": _summary(
            lists["generated"], hashes["generated"], [sides["generated", i] for i in range(len(found))]
        ),
        "reference": None,
        "figures": figures,
        "absent": absent,
        "clips": _clips_path(settings).name,
        "seconds": 0.0,
    }
    if "reference" in lists:
        result["reference"] = _summary(
            lists["reference"], hashes["reference"], [sides["reference", i] for i in range(len(found))]
        )
    result["seconds"] = round(time.monotonic() - began, 3)
    _write(settings, result, _clip_lines(lists["generated"], sides["generated", 0], found))
    for stale in work.glob(".siren-*"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > _STALE:
                stale.unlink()
    return result


class _Digests:
    """Hashes of the lists' files, each read when it is first asked for. One path has one, in whichever list it is."""

    def __init__(self, lists: dict[str, ClipList]) -> None:
        self._lists = lists
        self._known: dict[Path, str] = {}

    def of(self, title: str, number: int) -> list[str]:
        """Of a part's clips."""
        found = []
        for entry in self._lists[title].entries[number * PART : (number + 1) * PART]:
            if entry.path not in self._known:
                self._known[entry.path] = file_digest(entry.path)
            found.append(self._known[entry.path])
        return found

    def all(self, title: str) -> list[str]:
        return [digest for number in range(_parts(self._lists[title])) for digest in self.of(title, number)]


def _parts(clips: ClipList) -> int:
    return -(-len(clips) // PART)


def _load(settings: EvaluateSettings, generated: ClipList) -> list[Embedder]:
    from .embedders import load_embedder

    names = settings.embeddings
    if names is None:
        names = ["aisfx", "aligner"] if any(entry.prompt for entry in generated.entries) else ["aisfx"]
    embedders = [load_embedder(name, settings.device) for name in names]
    twice = [name for name, count in Counter(embedder.name for embedder in embedders).items() if count > 1]
    if twice:
        raise InputError(f"two embeddings are called {twice[0]!r}; evaluate them one after the other")
    return embedders


def _check_metrics(
    settings: EvaluateSettings, lists: dict[str, ClipList], embedders: Sequence[Embedder], paired: bool
) -> None:
    """InputError or DataError for a metric that was asked for and cannot be."""
    for metric in settings.metrics or ():
        if metric in ("FD", "KL") and "reference" not in lists:
            raise InputError(f"{metric} compares with a reference; give one (--reference)")
        if metric in ("IS", "KL") and not any(embedder.classes for embedder in embedders):
            raise InputError(f"{metric} needs an embedding with classes, such as aisfx or cnn14")
        if metric == "KL" and not paired:
            raise DataError(no_pairs(lists["generated"], lists["reference"]))
        if metric == "score" and not any(embedder.text for embedder in embedders):
            raise InputError("score needs an embedding of sound and text: aligner or clap")
        if metric == "score" and not any(entry.prompt for entry in lists["generated"].entries):
            raise DataError(f"score needs prompts; {lists['generated'].path} has none")


def _embed(
    settings: EvaluateSettings, work: Path, lists: dict[str, ClipList], digests: _Digests, embedders: Sequence[Embedder]
) -> dict[tuple[str, int], list[Part | None]]:
    """The parts of each list and embedder, by title and the embedder's place; None for those of other shards."""
    # One lower limit for all, so that all figures are of the same clips.
    least = max([settings.min_seconds, *(e.min_samples / e.sample_rate for e in embedders)])
    limits = Limits(least, settings.max_seconds, settings.skip_clipped)
    shard = settings.shard_of()
    jobs = [
        (title, i, number)
        for i in range(len(embedders))
        for title, clips in lists.items()
        for number in range(_parts(clips))
    ]
    mine = [job for k, job in enumerate(jobs) if shard is None or k % shard[1] == shard[0]]
    done: dict[tuple[str, int], list[Part | None]] = {
        (title, i): [None] * _parts(clips) for title, clips in lists.items() for i in range(len(embedders))
    }
    lost: dict[tuple[str, int], list[tuple[str, str]]] = {key: [] for key in done}
    total = sum(_size(lists[title], number) for title, _, number in mine)
    hidden = None if settings.progress else True
    with tqdm(total=total, unit="clip", desc="embedding", disable=hidden) as bar:
        for title, i, number in mine:
            entries = lists[title].entries[number * PART : (number + 1) * PART]
            texts = title == "generated" and embedders[i].text
            path = part_path(work, number, embedders[i], limits, texts, entries, digests.of(title, number))
            part = read_part(path)
            if part is None:
                with _kept():
                    part = make_part(path, embedders[i], limits, texts, entries, settings.batch_size)
            done[title, i][number] = part
            lost[title, i] += [(reason, detail) for _, reason, detail in part.skips]
            _check_usable(title, lists[title], lost[title, i])
            bar.update(len(entries))
    return done


def _size(clips: ClipList, number: int) -> int:
    return min(PART, len(clips) - number * PART)


def _check_usable(title: str, clips: ClipList, lost: Sequence[tuple[str, str]]) -> None:
    """DataError if more than half of a list is lost, given reasons and details, or all of it."""
    if 2 * len(lost) > len(clips):
        counts = ", ".join(f"{count} {reason}" for reason, count in Counter(reason for reason, _ in lost).most_common())
        raise DataError(
            f"at least {len(lost)} of the {len(clips)} {title} clips of {clips.path} cannot be used ({counts}); "
            f"for example {lost[0][1]}"
        )


def _check_target(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; make it first")
    check_folder(path.parent)


def _clips_path(settings: EvaluateSettings) -> Path:
    return Path(settings.out or "").expanduser().with_suffix(".clips.jsonl")


def _about(settings: EvaluateSettings) -> dict[str, Any]:
    from .. import __version__

    options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"siren": __version__, "date": now, "options": {k: v for k, v in options.items() if k != "progress"}}


def _summary(clips: ClipList, digest: str, sides: Sequence[Side]) -> dict[str, Any]:
    """What became of a list. A clip is used if every embedding could use it."""
    lost = {place: (reason, detail) for side in reversed(sides) for place, reason, detail in side.skips}
    counts = Counter(reason for reason, _ in lost.values())
    skips = [
        {"id": clips.entries[i].id, "file": str(clips.entries[i].path), "reason": reason, "detail": detail}
        for i, (reason, detail) in sorted(lost.items())
    ]
    first = sides[0]
    return {
        "list": str(clips.path),
        "sha256": digest,
        "clips": len(clips),
        "used": len(clips) - len(lost),
        "skipped": dict(sorted(counts.items())),
        "skips": skips[:_LISTED_SKIPS],
        "prompts": sum(bool(entry.prompt) for entry in clips.entries),
        "clipped": first.clipped,
        "clipped_share": round(first.clipped / max(1, len(first.rows)), 6),
        "rates": {str(rate): count for rate, count in sorted(first.rates.items())},
    }


def _clip_lines(clips: ClipList, side: Side, found: Sequence[Figures]) -> list[dict[str, Any]]:
    """A line for each generated clip, in order."""
    lost = {place: reason for place, reason, _ in side.skips}
    lines = []
    for place, entry in enumerate(clips.entries):
        line: dict[str, Any] = {"id": entry.id, "file": str(entry.path), "prompt": entry.prompt, "scores": {}}
        for one in found:
            values = {label: of[place] for label, of in one.scores.items() if place in of}
            line["scores"] |= {label: round(v, 6) for label, v in values.items() if math.isfinite(v)}
        if place in lost:
            line["skipped"] = lost[place]
        lines.append(line)
    return lines


def _write(settings: EvaluateSettings, result: dict[str, Any], lines: Sequence[dict[str, Any]]) -> None:
    """All files or none."""
    out = Path(settings.out or "").expanduser()
    listed = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files = {_clips_path(settings): listed.encode(errors="backslashreplace")}
    if settings.html is not None:
        from .report import report_html

        files[Path(settings.html).expanduser()] = report_html(result, lines, Path()).encode()
    files[out] = (json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(
        errors="backslashreplace"
    )
    with _kept():
        write_files(files)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """What cannot be written loses nothing; say so."""
    try:
        yield
    except SirenError as error:
        if type(error) is not SirenError:
            raise
        raise SirenError(f"{error}; finished parts are kept: run the same command again") from error
