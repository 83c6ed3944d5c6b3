"""From clip folders to token sets: what is kept and dropped, and that no kill or full disk changes a byte of it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fake_data import RATE, FakeCaptioner, FakeClap, FakeCodec, FakeEncoder, burst, clip_folder, contents, plain_clips

from siren.data import Report, TokenSet, open_tokens, tokenize
from siren.errors import DataError, InputError, SirenError

LONG = "one two three four five six seven eight nine"


def run(sources: Any, out: Path, **changed: Any) -> Report:
    """`tokenize` with the fake models, in this process, in shards of three clips."""
    values: dict[str, Any] = {"codec": FakeCodec(), "encoder": FakeEncoder(), "seconds": 0.5, "pad_seconds": 0.0}
    return tokenize(sources, out, **values | {"workers": 1, "shard_clips": 3, "progress": False} | changed)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips, one of them bad: three shards."""
    folder = plain_clips(tmp_path_factory.mktemp("source") / "clips", 7)
    (folder / "3.wav").write_bytes(b"no sound")
    return folder


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What comes of it."""
    out = tmp_path_factory.mktemp("wanted") / "tokens"
    run(source, out)
    return contents(out)


def test_codes_and_captions(source: Path, tmp_path: Path) -> None:
    """Each clip has the codes of its own sound and the prompts of its own captions, in the order of the list."""
    report = run(source, tmp_path / "tokens")
    tokens = open_tokens(tmp_path / "tokens")
    assert isinstance(tokens, TokenSet)
    names = [f"clip-{i}" for i in (0, 1, 2, 4, 5, 6)]
    assert [tokens.clip_id(i) for i in range(len(tokens))] == names
    assert report.clips == 6 and report.frames == 6 * 15 and report.seconds == pytest.approx(1.8)
    assert report.dropped == {"unreadable": 1} and report.resumed == 0
    codec, encoder = FakeCodec(), FakeEncoder()
    assert tokens.codec_identity == codec.identity and tokens.encoder_identity == encoder.identity
    for i, name in enumerate(names):
        number = int(name[-1])
        sound = burst(0.3, number)
        frames = sound.reshape(15, 320)[:, :12]
        np.testing.assert_allclose(tokens.codes(i), np.abs(frames.T) * 1023, atol=0.6)
        assert tokens.captions(i) == [f"burst {number}", "a burst"] and tokens.label(i) == f"c{number % 3}"
        for variant, caption in enumerate(tokens.captions(i)):
            np.testing.assert_allclose(tokens.prompt(i, variant), encoder([caption])[0][0], rtol=1e-3)
    dropped = [json.loads(line) for line in (tmp_path / "tokens/dropped.jsonl").read_text().splitlines()]
    assert [(value["id"], value["reason"]) for value in dropped] == [("clip-3", "unreadable")]
    assert str(source) not in (tmp_path / "tokens/dropped.jsonl").read_text()
    assert "6 clips" in str(report) and "1 unreadable" in str(report)


def test_what_is_dropped_and_why(tmp_path: Path) -> None:
    """Corrupt, cut off and missing files, silence, noise floors, sounds too short, and captions that say nothing."""
    good = burst(0.4)
    soundfile.write(tmp_path / "whole.flac", good, RATE)
    whole = (tmp_path / "whole.flac").read_bytes()
    folder = clip_folder(
        tmp_path / "clips",
        [
            {"id": "good", "caption": "a burst", "sound": good, "licence": "CC0", "source": "here"},
            {"id": "missing", "caption": "a click", "sound": None},
            {"id": "text", "caption": "a click", "sound": b"no sound"},
            {"id": "empty", "caption": "a click", "sound": b""},
            {"id": "cut", "audio": "cut.flac", "caption": "a click", "sound": whole[: len(whole) // 2]},
            {"id": "short", "caption": "a click", "sound": burst(0.1)},
            {"id": "silent", "caption": "a click", "sound": np.zeros(8000, np.float32)},
            {"id": "no caption", "sound": good},
            {"id": "empty caption", "caption": ["", " "], "sound": good},
            {"id": "long caption", "caption": LONG, "sound": good},
            {"id": "one of two", "caption": [LONG, "a short one"], "sound": good},
            {"id": "long", "caption": "a click", "sound": np.tile(burst(0.5), 3)[: round(1.3 * RATE)]},
        ],
    )
    report = run(folder, tmp_path / "tokens")
    tokens = open_tokens(tmp_path / "tokens")
    assert isinstance(tokens, TokenSet)
    assert [tokens.clip_id(i) for i in range(len(tokens))] == ["good", "one of two", "long#0", "long#1"]
    assert tokens.captions(1) == ["a short one"] and (tokens.licence(0), tokens.source(0)) == ("CC0", "here")
    np.testing.assert_array_equal(tokens.codes(2), tokens.codes(3))
    assert report.dropped == {
        "no activity": 1,
        "no caption": 3,
        "rest shorter than a segment": 1,
        "too short": 1,
        "unreadable": 4,
    }
    dropped = [json.loads(line) for line in (tmp_path / "tokens/dropped.jsonl").read_text().splitlines()]
    assert {value["id"]: value["reason"] for value in dropped} == {
        "missing": "unreadable",
        "text": "unreadable",
        "empty": "unreadable",
        "cut": "unreadable",
        "short": "too short",
        "silent": "no activity",
        "no caption": "no caption",
        "empty caption": "no caption",
        "long caption": "no caption",
        "long": "rest shorter than a segment",
    }
    details = {value["id"]: value["detail"] for value in dropped}
    assert details.pop("no caption") == details.pop("empty caption") == "" and all(details.values())
    assert details["long caption"] == "too long for the prompt encoder"


@pytest.mark.parametrize(("pad", "frames"), [(None, 25), (0.0, 15), (0.1, 20), (9.0, 25)])
def test_silence_after_short_clips(tmp_path: Path, pad: float | None, frames: int) -> None:
    folder = plain_clips(tmp_path / "clips", 1)
    run(folder, tmp_path / "tokens", pad_seconds=pad)
    tokens = open_tokens(tmp_path / "tokens")
    assert tokens.frames.tolist() == [frames] and not tokens.codes(0)[:, 15:].any()


def test_similarity_filter_and_reserve(tmp_path: Path) -> None:
    """Captions below the threshold go, then clips without any; the most similar clips are set aside."""
    scores = {"burst alpha": 0.3, "burst beta": 0.41, "burst gamma": 0.9, "burst delta": 0.5, "a burst": 0.39}
    folder = clip_folder(
        tmp_path / "clips",
        [{"id": name, "caption": [name, "a burst"], "sound": burst(0.3, i)} for i, name in enumerate(scores)],
    )
    report = run(folder, tmp_path / "tokens", clap=FakeClap(scores), reserve=1)
    tokens = open_tokens(tmp_path / "tokens")
    assert isinstance(tokens, TokenSet)
    assert [tokens.captions(i) for i in range(len(tokens))] == [["burst beta"], ["burst delta"]]
    assert [tokens.score(i) for i in range(2)] == pytest.approx([0.41, 0.5])
    reserve = open_tokens(tmp_path / "tokens", reserve=True)
    assert [reserve.clip_id(i) for i in range(len(reserve))] == ["burst gamma"]
    assert report.dropped == {"similarity below the threshold": 2} and (report.clips, report.reserve) == (3, 1)
    run(folder, tmp_path / "more", clap=FakeClap(scores), threshold=0.35)
    assert len(open_tokens(tmp_path / "more")) == 5


def test_crops_start_where_the_caption_is_heard(tmp_path: Path) -> None:
    """Six seconds of burst and six of silence: crops of six seconds may start in the first four or so."""
    sound = np.concatenate([burst(6.0), np.zeros(6 * RATE, np.float32)])
    folder = clip_folder(tmp_path / "clips", [{"id": "long", "caption": "a burst", "sound": sound}])
    run(folder, tmp_path / "tokens", clap=FakeClap({"a burst": 1.0}), seconds=12.0)
    starts = open_tokens(tmp_path / "tokens").crop_starts(0)
    assert starts is not None and starts.tolist() == list(range(0, starts[-1] + 1, 25)) and 100 < starts[-1] < 300


def test_captioner(tmp_path: Path) -> None:
    """Clips without captions are given some; what says nothing among them is cleaned away."""
    folder = clip_folder(
        tmp_path / "clips",
        [{"id": "named", "caption": "a click", "sound": burst(0.3)}, {"id": "unnamed", "sound": burst(0.3, 1)}],
    )
    given = ["The audio contains a loud burst.", "I'm sorry, I cannot hear anything.", "a loud burst"]
    run(folder, tmp_path / "tokens", captioner=FakeCaptioner(given))
    tokens = open_tokens(tmp_path / "tokens")
    assert [tokens.captions(i) for i in range(2)] == [["a click"], ["a loud burst"]]
    with pytest.raises(DataError, match="differs in: polisher"):
        run(folder, tmp_path / "tokens", captioner=FakeCaptioner(given), polisher=shorten)
    run(folder, tmp_path / "more", captioner=FakeCaptioner(given[:1]), polisher=shorten)
    assert open_tokens(tmp_path / "more").captions(1) == ["loud burst"]


def shorten(captions: list[str]) -> list[str]:
    """A polisher."""
    return [" ".join(caption.rstrip(".").split()[-2:]) for caption in captions]


def test_several_folders(tmp_path: Path) -> None:
    """Clips of all folders, in order; the same id in two of them is refused before anything is written."""
    first = plain_clips(tmp_path / "first", 2)
    second = clip_folder(tmp_path / "second", [{"id": "other", "caption": "a click", "sound": burst(0.3, 9)}])
    run([first, second], tmp_path / "tokens")
    tokens = open_tokens(tmp_path / "tokens")
    assert [tokens.clip_id(i) for i in range(3)] == ["clip-0", "clip-1", "other"]
    third = plain_clips(tmp_path / "third", 1)
    with pytest.raises(DataError, match=r"'clip-0' is in .*first and in .*third"):
        run([first, third], tmp_path / "more")
    assert not list(tmp_path.glob("*more*"))


def test_workers_make_no_difference(source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """Two processes give the bytes of one."""
    run(source, tmp_path / "tokens", workers=3)
    assert contents(tmp_path / "tokens") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


KILLED = """
import sys
from pathlib import Path
from fake_data import FakeCodec, FakeEncoder
from siren.data import tokenize
if __name__ == "__main__":
    tokenize(sys.argv[1], sys.argv[2], FakeCodec(delay=0.05), FakeEncoder(), seconds=0.5, pad_seconds=0.0, workers=2,
             shard_clips=3)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_with_its_workers(source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """SIGKILL of the main process ends the workers too, and another number of them ends the work."""
    (tmp_path / "killed.py").write_text(KILLED)
    out = tmp_path / "tokens"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, tmp_path / "killed.py", source, out]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        record = tmp_path / ".tokens.partial/shard-00000.json"
        while not record.exists() and process.poll() is None:
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2  # the workers, and what multiprocessing needs itself
        process.kill()
    deadline = time.monotonic() + 20
    while any(alive(int(child)) for child in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)
    assert not out.exists()
    report = run(source, out, workers=1)
    assert report.resumed >= 3 and contents(out) == wanted


def alive(process: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


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
    kinds = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        # rmtree works below an open folder: only the event that begins it has the whole path.
        inside = event in ("os.remove", "os.rmdir") or str(arguments[0] if arguments else "").startswith(str(folder))
        if (writes or event in kinds) and inside and next(changes) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_runs(work: Callable[[], object], folder: Path, start: int = 0) -> int:
    """Run `work` in a child that is killed before its `start`-th change. Returns the exit status."""
    return in_child(lambda: (kill_at(start, folder), work()))


def test_killed_anywhere(source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """SIGKILL before each change of the disk, one run each: what goes on behind it gives the same bytes."""
    for count in itertools.count():
        folder = tmp_path / str(count)
        folder.mkdir()
        out = folder / "tokens"
        status = killed_runs(lambda out=out: run(source, out), folder, count)  # type: ignore[misc]
        assert status in (0, -signal.SIGKILL)
        if out.exists():
            open_tokens(out)  # never half of one
        run(source, out)
        assert contents(out) == wanted, f"killed at change {count}"
        assert [path.name for path in folder.iterdir()] == ["tokens"], f"killed at change {count}"
        if not status:
            break
    assert count > 30


def test_killed_again_and_again(source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """A run that never gets further than a few changes still ends, because finished shards are kept."""
    out = tmp_path / "tokens"
    attempts = 1
    while killed_runs(lambda: run(source, out), tmp_path, 20):
        attempts += 1
        assert attempts < 30
    assert attempts > 2 and contents(out) == wanted


def test_killed_while_it_replaces(source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """An overwriting run that is killed leaves the old set or the new one, or the next run finds them."""
    other = tmp_path / "other"
    run(source, other, seconds=0.2)
    before = contents(other)
    for count in itertools.count(0, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        out = Path(shutil.copytree(other, folder / "tokens"))
        status = killed_runs(lambda out=out: run(source, out, overwrite=True), folder, count)  # type: ignore[misc]
        if out.exists():
            assert contents(out) in (before, wanted)
        run(source, out, overwrite=True)
        assert contents(out) == wanted and [path.name for path in folder.iterdir()] == ["tokens"]
        if not status:
            break


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_full_disk(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A disk that is full at any write: one line, finished shards stay, and the next run goes on behind them."""
    sync, resumed = os.fsync, []
    for count in itertools.count():
        out = tmp_path / str(count) / "tokens"
        writes = itertools.count()

        def fail(handle: int, writes: Any = writes, count: int = count) -> None:
            if next(writes) >= count:
                raise OSError(number, os.strerror(number))
            sync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            try:
                run(source, out)
                break
            except SirenError as error:
                message = str(error)
        assert os.strerror(number) in message and "\n" not in message
        if out.exists():  # all was written, and only whether it is on the disk is not known
            assert contents(out) == wanted
        report = run(source, out)
        resumed.append(report.resumed)
        assert contents(out) == wanted, f"full at write {count}"
    assert resumed[0] == 0 and resumed == sorted(resumed) and resumed[-1] == 7


def test_disk_full_in_the_middle_of_a_file(source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """The system's own limit on a file's size, met while a shard is written."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "tokens"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200))
        with pytest.raises(DataError, match=r"cannot write .*shard-00000.*finished shards are kept.*run the same"):
            run(source, out)

    assert in_child(limited) == 0
    assert not list(tmp_path.glob(".tokens.partial/.siren-*"))
    run(source, out)
    assert contents(out) == wanted


def test_done_already(source: Path, tmp_path: Path) -> None:
    """The same call again does nothing and says the same; changed sources, or other arguments, are refused."""
    folder = Path(shutil.copytree(source, tmp_path / "clips"))
    out = tmp_path / "tokens"
    first = run(folder, out)
    stamp = (out / "manifest.json").stat().st_mtime_ns
    again = run(folder, out)
    assert again.resumed == 7 and (again.clips, again.dropped) == (first.clips, first.dropped)
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="differs in: settings; overwrite it"):
        run(folder, out, min_snr=7.0)
    with pytest.raises(DataError, match="differs in: codec; overwrite it"):
        run(folder, out, codec=FakeCodec("other"))
    later = time.time() + 10
    os.utime(folder / "0.wav", (later, later))
    with pytest.raises(DataError, match="sources, which have changed since; overwrite it"):
        run(folder, out)
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    run(folder, out, overwrite=True, codec=FakeCodec("other"))
    assert open_tokens(out).codec_identity == FakeCodec("other").identity


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("codec", {"codec": FakeCodec("other")}),
        ("encoder", {"encoder": FakeEncoder("other")}),
        ("settings", {"seconds": 0.4}),
        ("settings", {"shard_clips": 2}),
        ("sources", {}),
        ("sources, which have changed since", {}),
        ("its job.json is damaged", {}),
    ],
)
def test_goes_on_with_other_arguments(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, part: str, changed: dict[str, Any]
) -> None:
    """An unfinished run is not mixed with another one; it can be finished, or given up by overwriting."""
    folder = Path(shutil.copytree(source, tmp_path / "clips"))
    out = tmp_path / "tokens"
    assert killed_runs(lambda: run(folder, out), tmp_path, 14) == -signal.SIGKILL
    partial = contents(tmp_path / ".tokens.partial")
    assert "shard-00000.json" in partial
    if part == "sources":
        lines = (folder / "clips.jsonl").read_text()
        (folder / "clips.jsonl").write_text(lines.replace("burst 6", "burst six"))
    elif part.startswith("sources"):
        later = time.time() + 10
        os.utime(folder / "0.wav", (later, later))
    elif part.startswith("its"):
        (tmp_path / ".tokens.partial/job.json").write_text("{")
        partial = contents(tmp_path / ".tokens.partial")
    with pytest.raises(DataError, match=f"unfinished run that differs in: {part}; finish it"):
        run(folder, out, **changed)
    assert contents(tmp_path / ".tokens.partial") == partial
    run(folder, out, overwrite=True, **changed)
    assert (contents(out) == wanted) == (not changed and part != "sources")


def test_altered_shard_is_made_again(source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """What an unfinished run left is checked by its hashes."""
    out = tmp_path / "tokens"
    assert killed_runs(lambda: run(source, out), tmp_path, 14) == -signal.SIGKILL
    path = tmp_path / ".tokens.partial/shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert run(source, out).resumed == 0
    assert contents(out) == wanted


@pytest.mark.parametrize("data", [None, b"", b"x"])
def test_a_finished_set_that_was_altered_is_not_done(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, data: bytes | None
) -> None:
    """Training says of such a set: tokenize again. Then that must help."""
    out = tmp_path / "tokens"
    run(source, out)
    path = out / "shard-00001.safetensors"
    path.unlink()  # not written to: it may share its bytes
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-00001\.safetensors, which is missing or was altered; overwrite it"):
        run(source, out)
    run(source, out, overwrite=True)
    assert contents(out) == wanted


def test_other_unfinished_work_stays(source: Path, tmp_path: Path) -> None:
    """Neither a finished set nor overwriting deletes an unfinished run of other settings, or what is none."""
    out, partial = tmp_path / "tokens", tmp_path / ".tokens.partial"
    run(source, out)
    assert killed_runs(lambda: run(source, out, overwrite=True, seconds=0.4), tmp_path, 14) == -signal.SIGKILL
    before = contents(partial)
    assert "shard-00000.json" in before
    assert run(source, out).resumed == 7 and contents(partial) == before
    (partial / "job.json").unlink()
    with pytest.raises(DataError, match=r"\.tokens\.partial is in the way"):
        run(source, out, overwrite=True, seconds=0.3)
    assert run(source, out).resumed == 7
    assert contents(partial).keys() == before.keys() - {"job.json"}


def test_a_name_longer_than_any_file_is_a_missing_sound(tmp_path: Path) -> None:
    lines = [{"id": "good", "caption": "a burst", "sound": burst(0.3)}, {"id": "long", "sound": None}]
    folder = clip_folder(tmp_path / "clips", [lines[0], lines[1] | {"audio": "x" * 300}])
    assert run(folder, tmp_path / "tokens").dropped == {"unreadable": 1}


def test_a_model_that_cannot_be_sent_to_workers(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be sent to other processes .* or use one worker"):
        run(source, tmp_path / "tokens", captioner=lambda waves, rate: [["a"] for _ in waves], workers=2)


def test_targets_that_are_not_replaced(source: Path, tmp_path: Path) -> None:
    """Files and folders of the user's stay, whether or not overwriting was asked for."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes").write_text("mine")
    run(source, tmp_path / "tokens")
    (tmp_path / "tokens/notes").write_text("mine")
    before = contents(tmp_path)
    for name, message in (("file", "no token set"), ("folder", "no token set"), ("tokens", "also holds 'notes'")):
        with pytest.raises(DataError, match=message):
            run(source, tmp_path / name, overwrite=True, seconds=0.2)
    assert contents(tmp_path) == before


def test_nothing_left(tmp_path: Path) -> None:
    """A set without clips is an error that counts why, and leaves nothing behind."""
    folder = clip_folder(tmp_path / "clips", [{"id": f"c{i}", "caption": "a click", "sound": b"?"} for i in range(3)])
    with pytest.raises(DataError, match=r"no clip is left.*'unreadable': 3.*c0"):
        run(folder, tmp_path / "tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seconds": 0.1}, "seconds must be"),
        ({"seconds": 1e9}, "seconds must be"),
        ({"seconds": float("nan")}, "seconds must be"),
        ({"pad_seconds": -1.0}, "pad_seconds must be"),
        ({"shard_clips": 0}, "shard_clips must be"),
        ({"workers": 0}, "workers must be"),
        ({"threshold": 0.4}, "need clap"),
        ({"threshold": 40.0, "clap": FakeClap({})}, "threshold must be"),
        ({"min_snr": float("nan")}, "min_snr must be"),
        ({"reserve": 3}, "need clap"),
        ({"clap": FakeClap({}), "reserve": -1}, "reserve must be"),
        ({"sources": []}, "at least one clip folder"),
    ],
)
def test_bad_arguments(source: Path, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(changed.pop("sources", source), tmp_path / "tokens", **changed)
    assert not list(tmp_path.iterdir())


def test_codec_of_another_rate(source: Path, tmp_path: Path) -> None:
    codec = FakeCodec()
    codec.sample_rate = 44100
    with pytest.raises(InputError, match="16000 Hz, not 44100"):
        run(source, tmp_path / "tokens", codec=codec)


def test_no_clip_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no clip folder"):
        run(tmp_path, tmp_path / "tokens")
