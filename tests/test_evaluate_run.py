"""`evaluate`: its figures are those of the clips it used, each says how it was made, and no kill or full disk changes
them or repeats finished work."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.special
import soundfile
from fake_embedder import RATE, FakeEmbedder, manifest, run, sounds, tone

from siren.errors import DataError, InputError, SirenError
from siren.evaluate import EvaluateSettings, parts, sides, table
from siren.evaluate import figures as figures_module
from siren.evaluate import run as run_module
from siren.evaluate.gaussians import fit_gaussian, frechet_distance
from siren.evaluate.parts import PART


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEmbedder:
    """The model that `load_embedder` gives; parts have five clips.

    Nothing waits for the disk: that is for a loss of power, which no test here is about.
    """
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    embedder = FakeEmbedder()
    give(monkeypatch, {"fake": embedder})
    for module in (parts, run_module, sides):
        monkeypatch.setattr(module, "PART", 5)
    assert PART == 64
    return embedder


def give(monkeypatch: pytest.MonkeyPatch, made: dict[str, FakeEmbedder]) -> None:
    """`load_embedder` gives these, by name."""
    module = SimpleNamespace(load_embedder=lambda name, device: made[name])
    monkeypatch.setitem(sys.modules, "siren.evaluate.embedders", module)  # type: ignore[arg-type]


@pytest.fixture
def lists(tmp_path: Path) -> tuple[Path, Path]:
    """Twelve generated sounds and thirteen real ones, twelve of them with the ids of these."""
    generated, reference = sounds(tmp_path / "gen", range(12)), sounds(tmp_path / "ref", range(100, 113))
    return manifest(generated, 12), manifest(reference, 13)


def figures(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {figure["label"]: figure for figure in result["figures"]}


def test_figures_are_those_of_the_definitions(fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path) -> None:
    """All four, from embeddings computed here; every figure carries what made it, and the files hold the same."""
    result = run(lists[0], tmp_path / "out.json", reference=lists[1])
    ours, theirs = (fake.embed([tone(n) for n in numbers]) for numbers in (range(12), range(100, 113)))
    gaussians = [
        fit_gaussian(lambda made=made: iter([(np.concatenate(made.vectors), np.arange(len(made.vectors)))]))
        for made in (ours, theirs)
    ]
    assert ours.logits is not None and theirs.logits is not None
    q, p = (scipy.special.softmax(made.logits.astype(np.float64), axis=1) for made in (ours, theirs))
    kl = scipy.special.rel_entr(p[:12], q).sum(axis=1)
    texts = fake.embed_texts(["rain " * (1 + i % 3) + "falls" for i in range(12)])
    cosines = [float(v[0] @ t) / float(np.linalg.norm(v[0])) for v, t in zip(ours.vectors, texts, strict=True)]
    wanted = {
        "FD (fake)": frechet_distance(*gaussians),
        "IS (fake)": np.exp(scipy.special.rel_entr(q, q.mean(axis=0)).sum(axis=1).mean()),
        "KL (fake)": kl.mean(),
        "score (fake)": np.mean(cosines),
    }
    found = figures(result)
    # Sounds go through the file as float32, so the model gets the very same numbers.
    assert {label: figure["value"] for label, figure in found.items()} == pytest.approx(wanted, rel=1e-5)
    for label, figure in found.items():
        assert figure["low"] <= figure["value"] <= figure["high"] and figure["low"] < figure["high"], label
        assert (figure["bootstrap"], figure["confidence"], figure["identity"]) == (40, 0.95, "fake sha256:0")
        assert (figure["sample_rate"], figure["n"], figure["embedding"]) == (RATE, 12, "fake")
        assert figure["list"] == result["generated"]["sha256"]
        compared = label[:2] in ("FD", "KL")
        assert figure["reference_list"] == (result["reference"]["sha256"] if compared else None)
        assert figure["better"] == ("lower" if compared else "higher")
    assert (found["FD (fake)"]["n_reference"], found["KL (fake)"]["n_reference"]) == (13, 12)
    assert found["KL (fake)"]["note"] == "0 generated and 1 reference clips have no partner"
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert result["clips"] == "out.clips.jsonl"
    lines = [json.loads(line) for line in (tmp_path / "out.clips.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"c{i}" for i in range(12)]
    assert [line["scores"]["score (fake)"] for line in lines] == pytest.approx(cosines, abs=1e-5)
    assert [line["scores"]["KL (fake)"] for line in lines] == pytest.approx(kl.tolist(), abs=1e-3)
    assert lines[1]["prompt"] == "rain rain falls" and Path(lines[1]["file"]).samefile(tmp_path / "gen/clip-001.wav")


def test_batches_and_work_folders_change_nothing(
    fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do vectors that are read from the disk again for each use; another seed moves the intervals only."""
    first = run(lists[0], tmp_path / "a.json", reference=lists[1])
    monkeypatch.setattr(sides, "_IN_MEMORY", 0)
    monkeypatch.setattr(figures_module, "_COUNTS", 30)
    monkeypatch.setattr(figures_module, "_PAIRS", 4)
    monkeypatch.setattr(sides, "_OPEN_PARTS", 1)
    second = run(lists[0], tmp_path / "b.json", reference=lists[1], batch_size=2, work=tmp_path / "work")
    values, others = ([{k: f[k] for k in ("value", "low", "high")} for f in r["figures"]] for r in (first, second))
    for value, other in zip(values, others, strict=True):
        assert other == pytest.approx(value, rel=1e-12)
    third = run(lists[0], tmp_path / "c.json", reference=lists[1], seed=1, work=tmp_path / "work")
    assert [f["value"] for f in third["figures"]] == [f["value"] for f in second["figures"]]
    assert [f["high"] for f in third["figures"]] != [f["high"] for f in second["figures"]]


def test_windows_of_a_clip_stay_together(fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a model with several vectors a clip, N counts clips, and the Gaussian is of all vectors."""
    fake.windows = 3
    result = run(lists[0], tmp_path / "out.json", reference=lists[1])
    sides = []
    for numbers in (range(12), range(100, 113)):
        vectors = np.concatenate(fake.embed([tone(n) for n in numbers]).vectors)
        sides.append(fit_gaussian(lambda v=vectors: iter([(v, np.arange(len(v)))])))  # type: ignore[misc]
    assert sides[0].count == 36
    figure = figures(result)["FD (fake)"]
    assert figure["value"] == pytest.approx(frechet_distance(*sides), rel=1e-5) and figure["n"] == 12


def test_names_of_the_paper(fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path) -> None:
    """FAD is VGGish's only; the CLAP score is a hundred times the cosine."""
    plain = figures(run(lists[0], tmp_path / "a.json"))["score (fake)"]["value"]
    fake.name = "clap"
    clap = run(lists[0], tmp_path / "b.json", metrics=["score"])
    assert [figure["label"] for figure in clap["figures"]] == ["CLAP score (clap)"]
    assert clap["figures"][0]["value"] == pytest.approx(100 * plain)
    fake.name, fake.text, fake.classes = "vggish", False, 0
    found = run(lists[0], tmp_path / "c.json", reference=lists[1])["figures"]
    assert [(figure["label"], figure["metric"]) for figure in found] == [("FAD (vggish)", "FAD")]


def test_what_is_skipped_is_counted(fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path) -> None:
    """Bad files of a list cost no more than themselves; the figures are those of a list without them."""
    folder = tmp_path / "gen"
    whole = run(lists[0], tmp_path / "whole.json", reference=lists[1])
    kept = [line for i, line in enumerate(lists[0].read_text().splitlines()) if i not in (1, 3, 5, 7)]
    (folder / "kept.jsonl").write_text("\n".join(kept))
    wanted = run(folder / "kept.jsonl", tmp_path / "kept.json", reference=lists[1])
    soundfile.write(folder / "clip-001.wav", np.zeros(RATE), RATE)
    (folder / "clip-003.wav").unlink()
    (folder / "clip-005.wav").write_bytes(b"no sound")
    soundfile.write(folder / "clip-007.wav", tone(7, 0.1), RATE)
    clipped = tone(8)
    clipped[:5] = 1
    soundfile.write(folder / "clip-008.wav", clipped, RATE, subtype="FLOAT")
    result = run(lists[0], tmp_path / "out.json", reference=lists[1])
    about = result["generated"]
    assert about["skipped"] == {"missing": 1, "silent": 1, "too short": 1, "unreadable": 1}
    assert (about["clips"], about["used"], about["clipped"], about["clipped_share"]) == (12, 8, 1, 0.125)
    assert [skip["id"] for skip in about["skips"]] == ["c1", "c3", "c5", "c7"]
    assert all(skip["detail"] for skip in about["skips"]) and whole["generated"]["skips"] == []
    assert {f["n"] for f in result["figures"]} == {8} and about["rates"] == {str(RATE): 8}
    lines = [json.loads(line) for line in (tmp_path / "out.clips.jsonl").read_text().splitlines()]
    assert [line.get("skipped") for line in lines[:4]] == [None, "silent", None, "missing"]
    assert lines[1]["scores"] == {} and lines[2]["scores"]
    soundfile.write(folder / "clip-008.wav", tone(8), RATE, subtype="FLOAT")
    again = run(lists[0], tmp_path / "again.json", reference=lists[1])
    assert [f["value"] for f in again["figures"]] == pytest.approx([f["value"] for f in wanted["figures"]])
    soundfile.write(folder / "clip-008.wav", clipped, RATE, subtype="FLOAT")
    left = run(lists[0], tmp_path / "left.json", skip_clipped=True)
    assert left["generated"]["skipped"]["clipped"] == 1 and left["generated"]["used"] == 7


def test_a_model_that_gives_no_number(fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path) -> None:
    embed = fake.embed

    def broken(waves: Any) -> Any:
        made = embed(waves)
        if fake.seen == 3:  # the third clip: clips come one at a time here
            made.vectors[-1][0, 1] = np.inf
        return made

    fake.embed = broken  # type: ignore[method-assign]
    result = run(lists[0], tmp_path / "out.json", batch_size=1)
    assert result["generated"]["skipped"] == {"embedding has NaN or infinity": 1}
    assert result["generated"]["skips"][0]["id"] == "c2" and {f["n"] for f in result["figures"]} == {11}


def test_more_than_half_skipped_is_an_error(fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path) -> None:
    """Half is not. Missing files are seen before anything is embedded or written."""
    for i in range(6):
        (tmp_path / f"ref/clip-{i:03d}.wav").write_bytes(b"no sound")
    assert run(lists[0], tmp_path / "out.json", reference=lists[1])["reference"]["used"] == 7
    (tmp_path / "ref/clip-006.wav").write_bytes(b"no sound")
    with pytest.raises(DataError, match=r"at least 7 of the 13 reference clips .* \(7 unreadable\); for example .*000"):
        run(lists[0], tmp_path / "more.json", reference=lists[1])
    shutil.rmtree(tmp_path / "gen")
    (tmp_path / "gen").mkdir()
    manifest(tmp_path / "gen", 12)
    soundfile.write(tmp_path / "gen/clip-000.wav", tone(0), RATE)
    seen = fake.seen
    with pytest.raises(DataError, match=r"11 of the 12 generated clips .* \(11 missing\)"):
        run(lists[0], tmp_path / "none.json")
    assert fake.seen == seen and not (tmp_path / "none.work").exists() and not (tmp_path / "more.json").exists()


def test_no_pairs(fake: FakeEmbedder, tmp_path: Path) -> None:
    """A distance needs none, so KL is left out with the reason; where it was asked for, that is an error."""
    generated, reference = sounds(tmp_path / "a", [1, 2, 3]), sounds(tmp_path / "b", [4, 5])
    (reference / "clip-000.wav").rename(reference / "x.wav")
    (reference / "clip-001.wav").rename(reference / "y.wav")
    result = run(generated, tmp_path / "out.json", reference=reference)
    assert list(figures(result)) == ["FD (fake)", "IS (fake)"]
    reasons = {one["label"]: one["reason"] for one in result["absent"]}
    assert "'clip-000', 'clip-001'" in reasons["KL (fake)"] and "'x', 'y'" in reasons["KL (fake)"]
    assert "prompt" in reasons["score (fake)"]
    with pytest.raises(DataError, match=r"no id is in both lists: .*'clip-000'.*'x', 'y'"):
        run(generated, tmp_path / "more.json", reference=reference, metrics=["KL"])


def test_few_clips(fake: FakeEmbedder, tmp_path: Path) -> None:
    """One clip has a score without interval and no distribution; of few, notes say what that does to a figure."""
    one, two = manifest(sounds(tmp_path / "a", [1]), 1), manifest(sounds(tmp_path / "b", [2, 3]), 2)
    result = run(one, tmp_path / "one.json", reference=two)
    found = figures(result)
    assert sorted(found) == ["KL (fake)", "score (fake)"]
    assert found["score (fake)"]["low"] is None and found["score (fake)"]["bootstrap"] == 0
    assert [one["reason"] for one in result["absent"]] == [
        "a Frechet distance needs two embeddings of each list; there are 1 and 2",
        "an Inception Score needs two clips; there is 1",
    ]
    found = figures(run(two, tmp_path / "two.json", reference=two))
    assert found["FD (fake)"]["value"] == 0 and "the same clips" in found["FD (fake)"]["note"]
    assert "biased upwards" in found["FD (fake)"]["note"] and "biased downwards" in found["IS (fake)"]["note"]
    with pytest.raises(DataError, match=r"nothing to compute: .*two clips"):
        run(one, tmp_path / "none.json", metrics=["IS"])


def test_a_mix_of_rates_is_noted(fake: FakeEmbedder, tmp_path: Path) -> None:
    """Files below the model's rate move the figures; files above it do not."""
    low, high = sounds(tmp_path / "low", [1, 2, 3], RATE // 2), sounds(tmp_path / "high", [4, 5, 6], 2 * RATE)
    found = figures(run(low, tmp_path / "a.json", reference=high))
    assert found["FD (fake)"]["note"].endswith(
        "generated files of 4000 Hz, embedded at 8000 Hz; the rates differ, which moves the figure"
    )
    assert "differ" not in found["IS (fake)"]["note"] and "4000 Hz" in found["IS (fake)"]["note"]
    soundfile.write(low / "other.wav", tone(9), RATE)
    found = figures(run(low, tmp_path / "b.json"))
    assert "4000 Hz and higher" in found["IS (fake)"]["note"] and "differ" in found["IS (fake)"]["note"]
    assert "Hz" not in figures(run(high, tmp_path / "c.json"))["IS (fake)"]["note"]


def test_several_models(lists: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its figures; a sound that is too short for one of them is left out of all."""
    made = {"one": FakeEmbedder("one", text=False), "two": FakeEmbedder("two", classes=0, min_samples=RATE // 4)}
    give(monkeypatch, made)
    soundfile.write(tmp_path / "gen/clip-000.wav", tone(0, 0.24), RATE)
    result = run(lists[0], tmp_path / "out.json", reference=lists[1], embeddings=["one", "two"])
    assert list(figures(result)) == ["FD (one)", "IS (one)", "KL (one)", "FD (two)", "score (two)"]
    assert result["absent"] == [] and {figure["n"] for figure in result["figures"]} == {11}
    made["three"] = FakeEmbedder("one")
    with pytest.raises(InputError, match="two embeddings are called 'one'"):
        run(lists[0], tmp_path / "more.json", embeddings=["one", "three"])


def test_finished_parts_are_used_again_where_they_fit(
    fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path
) -> None:
    """For the same clips in another list or place; not for another model, limit or sound, nor if damaged."""
    work = tmp_path / "work"
    first = run(lists[0], tmp_path / "a.json", reference=lists[1], work=work)
    assert fake.seen == 25 and len(list(work.iterdir())) == 6
    (tmp_path / "ref").rename(tmp_path / "moved")
    run(lists[0], tmp_path / "b.json", reference=tmp_path / "moved/list.jsonl", work=work, bootstrap=0)
    assert fake.seen == 25
    run(lists[0], tmp_path / "c.json", work=work, min_seconds=0.1)
    assert fake.seen == 37
    before = (tmp_path / "gen/clip-011.wav").read_bytes()
    soundfile.write(tmp_path / "gen/clip-011.wav", tone(99), RATE)
    run(lists[0], tmp_path / "d.json", work=work)
    assert fake.seen == 39
    fake.identity = "other"
    run(lists[0], tmp_path / "e.json", work=work)
    assert fake.seen == 51
    fake.identity = "fake sha256:0"
    (tmp_path / "gen/clip-011.wav").write_bytes(before)
    for damage in (lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""):
        seen = fake.seen
        for path in work.iterdir():
            path.write_bytes(damage(path.read_bytes()))
        again = run(lists[0], tmp_path / "a.json", reference=tmp_path / "moved/list.jsonl", work=work)
        assert fake.seen == seen + 25 and again["figures"] == first["figures"]
    for path in work.iterdir():  # what the header says is hashed too
        path.write_bytes(path.read_bytes().replace(b"kept", b"keep"))
    assert run(lists[0], tmp_path / "a.json", reference=tmp_path / "moved/list.jsonl", work=work)["figures"]


def test_shards(fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path) -> None:
    """Three shards do each part once between them; the run without a shard then embeds nothing."""
    whole = run(lists[0], tmp_path / "whole.json", reference=lists[1])
    fake.seen = 0
    for i in (1, 2, 3):
        said = run(lists[0], tmp_path / "out.json", reference=lists[1], shard=f"{i}/3")
        assert "figures" not in said and said["parts"] == 2
    assert fake.seen == 25 and not (tmp_path / "out.json").exists()
    result = run(lists[0], tmp_path / "out.json", reference=lists[1])
    assert fake.seen == 25 and result["figures"] == whole["figures"]
    run(lists[0], None, shard="2/2", work=tmp_path / "other")  # type: ignore[arg-type]
    assert [path.name[:10] for path in (tmp_path / "other").iterdir()] == ["fake-00001"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bootstrap": -1}, "bootstrap must be"),
        ({"bootstrap": 5}, "at least 20"),
        ({"confidence": 1.0}, "confidence must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"min_seconds": 5, "max_seconds": 5}, "must be below"),
        ({"min_seconds": float("nan")}, "min_seconds must be"),
        ({"embeddings": []}, "embeddings must be"),
        ({"embeddings": ["fake", "fake"]}, "embeddings must be"),
        ({"metrics": ["FID"]}, "metrics must be some of FD, IS, KL, score"),
        ({"shard": "0/2"}, "shard must be like 1/4"),
        ({"shard": "3/2"}, "shard must be like 1/4"),
        ({"html": "x.txt"}, "html must end in .html"),
        ({"out": "x.txt"}, "out must end in .json"),
        ({"out": None}, "nowhere to write"),
        ({"generated": "none"}, "there is no file or folder none"),
        ({"metrics": ["FD"]}, "give one"),
        ({"reference": "none.csv"}, "there is no file or folder none.csv"),
        ({"out": "none/x.json"}, "none is not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    values: dict[str, Any] = {"generated": lists[0], "out": tmp_path / "out.json", "embeddings": ["fake"]}
    with pytest.raises(SirenError, match=message) as caught:
        run_module.evaluate(EvaluateSettings(**values | changes))
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before and not fake.seen


def test_a_metric_that_no_model_gives(fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path) -> None:
    fake.classes, fake.text = 0, False
    for metric, message in (("IS", "with classes"), ("score", "sound and text")):
        with pytest.raises(InputError, match=message):
            run(lists[0], tmp_path / "out.json", metrics=[metric])
    fake.text = True
    with pytest.raises(DataError, match="score needs prompts"):
        run(tmp_path / "gen", tmp_path / "out.json", metrics=["score"])
    with pytest.raises(DataError, match="nothing to compute"):
        run(tmp_path / "gen", tmp_path / "out.json")


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked process, without its clean-up. Returns the exit status; 0 is the end of the work."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(count: int, folder: Path) -> None:
    """Kill this process before its `count`-th change of a file or folder below `folder`."""
    changes = itertools.count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        inside = str(arguments[0] if arguments else "").startswith(str(folder))
        if (writes or event in ("os.rename", "os.mkdir", "os.remove")) and inside and next(changes) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def files(folder: Path) -> dict[str, bytes]:
    """What a run leaves, without the times in the result."""
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".json"}


def test_killed_anywhere(fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path) -> None:
    """SIGKILL before each change of the disk: a part is whole or not there, the next run gives the same figures and
    embeds only what was not finished."""
    wanted = run(lists[0], tmp_path / "wanted.json", reference=lists[1], bootstrap=0)
    for count in itertools.count():
        out = tmp_path / str(count)
        out.mkdir()

        def work(out: Path = out) -> dict[str, Any]:
            return run(lists[0], out / "r.json", reference=lists[1], bootstrap=0)

        status = in_child(lambda count=count, out=out, work=work: (kill_at(count, out), work()))  # type: ignore[misc]
        assert status in (0, -signal.SIGKILL)
        left = len(list(out.glob("r.work/fake-*")))
        fake.seen = 0
        assert work()["figures"] == wanted["figures"]
        # Of each list the parts have 5, 5 and 2 or 3 clips, the generated ones come first.
        assert fake.seen == 25 - [0, 5, 10, 12, 17, 22, 25][left]
        if not status:
            break
    assert count >= 1 + 2 * 6 + 2 * 2


def test_full_disk(
    fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full at any write: one line, finished parts stay, and the next run goes on behind them."""
    for count in itertools.count():
        out = tmp_path / str(count)
        out.mkdir()
        writes = itertools.count()

        def fail(handle: int, writes: Iterator[int] = writes, count: int = count) -> None:
            if next(writes) >= count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            try:
                run(lists[0], out / "r.json", reference=lists[1], bootstrap=0)
                break
            except SirenError as error:
                message = str(error)
        assert os.strerror(errno.ENOSPC) in message and "\n" not in message
        assert "run the same command again" in message
        assert not list(out.rglob(".siren-*")) and not list(out.glob("r*json*"))
        fake.seen = 0
        run(lists[0], out / "r.json", reference=lists[1], bootstrap=0)
        assert fake.seen == 25 - [0, 5, 10, 12, 17, 22, 25, 25][count]
    assert count == 6 + 2


def test_what_kills_leave_is_cleared_away(fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path) -> None:
    """A half-written file of yesterday; not one that another run may be writing."""
    work = tmp_path / "work"
    work.mkdir()
    for name, time in (("old", 1), ("new", None)):
        (work / f".siren-{name}").write_bytes(b"half")
        if time:
            os.utime(work / f".siren-{name}", (time, time))
    run(lists[0], tmp_path / "out.json", work=work)
    assert [path.name for path in work.glob(".siren-*")] == [".siren-new"]


def test_a_table_never_mixes(fake: FakeEmbedder, lists: tuple[Path, Path], tmp_path: Path) -> None:
    """Of another model, rate, reference or prompts, a figure has another column; of other clips, the same one."""
    results = [run(lists[0], tmp_path / "a.json", reference=lists[1])]
    other = manifest(sounds(tmp_path / "other", range(50, 62)), 12)
    results.append(run(other, tmp_path / "b.json", reference=lists[1]))
    head = table(results).splitlines()[0]
    assert head == "| result | FD (fake) ↓ | IS (fake) ↑ | KL (fake) ↓ | score (fake) ↑ |"
    assert table(results).count("**") == 8 and "N=12" in table(results)
    (tmp_path / "gen/clip-000.wav").unlink()
    results.append(run(other, tmp_path / "c.json", reference=tmp_path / "gen/list.jsonl"))
    mixed = table(results).splitlines()
    assert mixed[0].count("FD (fake) [1]") == mixed[0].count("FD (fake) [2]") == 1 and "IS (fake) ↑" in mixed[0]
    assert mixed[2].split(" | ")[-2].strip() == "" and mixed[4].split(" | ")[1] == ""
    for name, value in (("identity", "other weights"), ("sample_rate", 16000)):
        changed = [results[0], results[1] | {"figures": [f | {name: value} for f in results[1]["figures"]]}]
        lines = table(changed).splitlines()
        assert lines[0].count("[2]") == 4 and "**" not in lines[2]
        assert all(row.split(" | ").count("") >= 3 for row in lines[2:4])
    text = (tmp_path / "gen/list.jsonl").read_text().replace("rain", "snow")
    (tmp_path / "gen/list.jsonl").write_text(text)
    head = table([results[0], run(lists[0], tmp_path / "d.json", reference=lists[1])]).splitlines()[0]
    assert "score (fake) [2]" in head and "IS (fake) ↑" in head and "FD (fake) ↓" in head
    with pytest.raises(DataError, match="damaged"):
        table([{"figures": [{}]}])
