"""Procedural sound: pure functions of a seed with captions that are true, and folders that survive a kill."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from siren.data import procedural, synth_clips
from siren.data.clips import read_clip_folder
from siren.data.procedural import CLASSES, ProceduralClip, make_procedural, synthesize
from siren.errors import DataError, InputError

RATE = 16000


def check(clip: ProceduralClip, seconds: float) -> None:
    wave = clip.waveform
    assert wave.dtype == np.float32
    assert wave.shape == (round(seconds * RATE),)
    assert np.isfinite(wave).all()
    assert -12 <= 20 * math.log10(float(np.abs(wave).max())) <= -1
    assert 2 <= len(set(clip.captions)) == len(clip.captions) <= 4
    assert all(caption == " ".join(caption.split()) and caption[0].islower() for caption in clip.captions)


def names(caption: str) -> list[str]:
    """The classes whose words, but for their endings, are in a caption."""
    return [label for label in CLASSES if all(word[:5].rstrip("s") in caption for word in label.split())]


def onsets(wave: npt.NDArray[np.float32]) -> int:
    """How often the sound sets in: where 10 ms are four times as loud as the 30 ms before them."""
    level = np.sqrt(np.mean(wave[: len(wave) // 160 * 160].reshape(-1, 160) ** 2, axis=1)) + 1e-3 * np.abs(wave).max()
    rises = [i for i in range(3, len(level)) if level[i] > 4 * level[i - 3 : i].max()]
    return sum(1 for i, rise in enumerate(rises) if i == 0 or rise - rises[i - 1] > 3)


def clips_of(label: str, word: str, count: int = 3) -> list[ProceduralClip]:
    """The first clips of a class that have a word in their first caption."""
    found = (clip for i in range(200) if word in (clip := synthesize(i, 11, 2.0, label)).captions[0])
    return [clip for clip, _ in zip(found, range(count), strict=False)]


# Clips


def test_there_are_enough_classes() -> None:
    assert len(set(CLASSES)) == len(CLASSES) >= 24


@pytest.mark.parametrize("label", CLASSES)
def test_every_class_can_be_heard_and_is_named(label: str) -> None:
    """At the shortest length, where events are most easily missed, and at an odd one."""
    for index, seconds in ((0, 1.0), (1, 1.0), (2, 1.2345)):
        clip = synthesize(index, 5, seconds, label)
        check(clip, seconds)
        assert clip.label == label
        assert label in names(clip.captions[0]), clip.captions


@settings(max_examples=15, derandomize=True)
@given(
    index=st.integers(0, 10**6),
    seed=st.integers(0, 2**70),
    seconds=st.floats(1.0, 1.6),
    scenes=st.sampled_from([0, 0.2, 0.5, 1]),
)
def test_clips_are_pure_functions_of_their_arguments(index: int, seed: int, seconds: float, scenes: float) -> None:
    first, again = (synthesize(index, seed, seconds, scenes=scenes) for _ in range(2))
    check(first, seconds)
    assert np.array_equal(first.waveform, again.waveform)
    assert (first.captions, first.label, first.id) == (again.captions, again.label, again.id)
    if first.label is not None:  # a label that is asked for gives what its turn gives
        assert np.array_equal(first.waveform, synthesize(index, seed, seconds, first.label).waveform)
    for other in (synthesize(index + 1, seed, seconds, first.label), synthesize(index, seed + 1, seconds, first.label)):
        assert not np.array_equal(first.waveform, other.waveform)
        assert first.id != other.id


@pytest.mark.parametrize("scenes", [0, 0.2, 1 / 3, 0.9, 1])
def test_classes_and_scenes_are_balanced(scenes: float) -> None:
    counts = Counter(synth_clips.label_in_turn(i, scenes) for i in range(1000))
    assert abs(counts.pop(None, 0) - 1000 * scenes) <= 1
    assert len(counts) == (len(CLASSES) if scenes < 1 else 0)
    assert scenes == 1 or max(counts.values()) - min(counts.values()) <= 1


def test_scenes_name_all_of_their_events() -> None:
    for i in range(8):
        clip = synthesize(i, 2, 3.0, scenes=1)
        assert clip.label is None
        check(clip, 3.0)
        assert len(names(clip.captions[0])) >= 2, clip.captions


def test_levels_vary() -> None:
    peaks = [float(np.abs(synthesize(i, 0, 1.0, "clock").waveform).max()) for i in range(12)]
    assert max(peaks) > 1.5 * min(peaks)


def test_continuous_sounds_fill_the_clip_and_events_leave_silence() -> None:
    for label, quiet in (("rain", False), ("vacuum cleaner", False), ("clock", True), ("owl", True)):
        wave = synthesize(0, 1, 3.0, label).waveform
        loud = np.abs(wave[: 48000 // 480 * 480].reshape(-1, 480)).max(axis=1) > 0.02 * np.abs(wave).max()
        assert (loud.mean() < 0.9) == quiet, label


# Captions


def test_a_helicopter_that_approaches_gets_louder() -> None:
    for word, rising in (("approaching", True), ("flying away", False)):
        for clip in clips_of("helicopter", word):
            half = len(clip.waveform) // 2
            assert (np.std(clip.waveform[half:]) > np.std(clip.waveform[:half])) == rising


def test_number_words_count_what_is_heard() -> None:
    """Far shots and those in halls are left out: their echoes hide the onsets."""
    for word, number in (("one rifle", 1), ("two rifle", 2), ("one pistol", 1), ("three pistol", 3)):
        for clip in clips_of("gunshot", word, 2):
            if "distance" not in clip.captions[0]:
                assert onsets(clip.waveform) == number, clip.captions


def test_speed_words_order_the_clocks() -> None:
    ticks = [onsets(clips_of("clock", f"{name} clock", 1)[0].waveform) for name in ("grandfather", "wall", "alarm")]
    assert ticks == sorted(ticks)
    assert len(set(ticks)) == 3


def test_what_is_far_away_sounds_dull() -> None:
    def high(clip: ProceduralClip) -> float:
        power = np.abs(np.fft.rfft(clip.waveform)) ** 2
        return float(power[int(3000 * 2.0) :].sum() / power.sum())

    for label in ("crow", "rooster", "applause"):
        far, near = clips_of(label, "in the distance"), clips_of(label, label, 6)
        near = [clip for clip in near if "distance" not in clip.captions[0]]
        assert far
        assert near
        assert max(high(clip) for clip in far) < min(high(clip) for clip in near)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"index": -1}, "index must be a whole number of at least 0, not -1"),
        ({"index": 1.0}, "index must be"),
        ({"index": True}, "index must be"),
        ({"index": 0, "seed": -3}, "seed must be"),
        ({"index": 0, "seconds": 0.5}, "seconds must be a number from 1 to 30, not 0.5"),
        ({"index": 0, "seconds": math.nan}, "seconds must be"),
        ({"index": 0, "seconds": "4"}, "seconds must be"),
        ({"index": 0, "scenes": 1.01}, "scenes must be a number from 0 to 1"),
        ({"index": 0, "label": "unicorn"}, "there is no class 'unicorn'; there are rain,"),
        ({"index": 0, "label": ""}, "there is no class ''"),
    ],
)
def test_bad_arguments_of_a_clip(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        synthesize(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"clips": 0}, "clips must be a whole number of at least 1, not 0"),
        ({"clips": 2.0}, "clips must be"),
        ({"clips": 1, "workers": 0}, "workers must be"),
        ({"clips": 1, "seed": -1}, "seed must be"),
        ({"clips": 1, "seconds": 31}, "seconds must be"),
        ({"clips": 1, "scenes": -0.1}, "scenes must be"),
        ({"clips": 1, "labels": ["rain", "dragon"]}, "no class 'dragon'; there are .*rain"),
        ({"clips": 1, "labels": []}, "names no class"),
    ],
)
def test_bad_arguments_of_a_folder_leave_nothing(tmp_path: Path, arguments: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_procedural(tmp_path / "sounds", **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# Folders

CLIPS, SECONDS = 40, 1.0  # three groups, the last of them not full


def test_some_kinds_alone(tmp_path: Path, made: Path) -> None:
    """The named kinds in turn, scenes between them as ever; a folder of other kinds is another one."""
    folder = tmp_path / "sounds"
    counts = make_procedural(folder, 8, seed=3, seconds=SECONDS, scenes=0.25, workers=1, labels=["wolf", "rain"])
    assert counts == {"wolf": 3, "rain": 3, "scene": 2}
    assert [record.label for record in read_clip_folder(folder)][:3] == ["wolf", "rain", "wolf"]
    with pytest.raises(InputError, match="other arguments"):
        make_procedural(folder, 8, seed=3, seconds=SECONDS, scenes=0.25, workers=1)
    assert "labels" not in json.loads((made / "procedural.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder made in one go by one process."""
    folder = tmp_path_factory.mktemp("procedural") / "sounds"
    counts = make_procedural(folder, CLIPS, seed=3, seconds=SECONDS, workers=1)
    assert sum(counts.values()) == CLIPS
    assert counts["scene"] == CLIPS // 5
    assert {path.name for path in folder.parent.iterdir()} == {"sounds"}
    return folder


def test_a_folder_holds_the_clips(made: Path) -> None:
    records = read_clip_folder(made)
    assert {path.name for path in made.iterdir()} == {"audio", "clips.jsonl", "procedural.json"}
    assert len(list((made / "audio").iterdir())) == len(records) == CLIPS
    for index in (0, 9, 39):
        clip, record = synthesize(index, 3, SECONDS), records[index]
        assert (record.id, record.captions, record.label) == (clip.id, clip.captions, clip.label)
        assert record.licence and record.source
        assert (info := soundfile.info(record.path)).format == "FLAC"
        assert (info.subtype, info.samplerate, info.channels) == ("PCM_16", RATE, 1)
        wave, _ = soundfile.read(record.path, dtype="float32")
        assert np.abs(wave - clip.waveform).max() <= 1 / 32768


def test_two_processes_write_the_same_bytes(made: Path, tmp_path: Path) -> None:
    make_procedural(tmp_path / "sounds", CLIPS, seed=3, seconds=SECONDS, workers=2)
    assert contents(tmp_path / "sounds") == contents(made)


def test_a_finished_folder_is_left_alone(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procedural, "synthesize", None)
    before = contents(made)
    assert make_procedural(made, CLIPS, seed=3, seconds=SECONDS)["scene"] == CLIPS // 5
    assert contents(made) == before


def test_a_killed_run_goes_on(made: Path, tmp_path: Path) -> None:
    """Killed with two processes at work: they end too, and what they had finished is not made again."""
    call = f"make_procedural({str(tmp_path / 'sounds')!r}, {CLIPS}, 3, {SECONDS}, workers=2)"
    script = tmp_path / "make.py"
    script.write_text(
        f"from siren.data.procedural import make_procedural\nif __name__ == '__main__':\n    {call}\n", encoding="utf-8"
    )
    process = subprocess.Popen([sys.executable, script], cwd=Path(__file__).parent.parent, start_new_session=True)
    partial = tmp_path / ".sounds.partial"
    while not list(partial.glob("parts/[0-9]*")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    for _ in range(1000):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the workers live on")
    assert not (tmp_path / "sounds").exists()
    finished = [json.loads(line) for part in partial.glob("parts/[0-9]*") for line in part.read_bytes().splitlines()]
    inodes = {line["audio"]: (partial / line["audio"]).stat().st_ino for line in finished}
    make_procedural(tmp_path / "sounds", CLIPS, seed=3, seconds=SECONDS, workers=1)
    assert contents(tmp_path / "sounds") == contents(made)
    assert inodes == {name: (tmp_path / "sounds" / name).stat().st_ino for name in inodes}


def failing(calls: int, original: Callable[..., object] | None, error: BaseException) -> Iterator[Any]:
    """`original` for some calls, then functions that raise."""

    def fail(*_: object, **__: object) -> None:
        raise error

    yield from [original] * calls
    while True:
        yield fail


@pytest.mark.parametrize("target", ["fsync", "replace", "rename", "rmtree"])
def test_a_run_that_fails_anywhere_goes_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """The disk fills up at one write after another; each call gets a little further, and nothing half-made is kept."""
    owner = {"fsync": os, "replace": Path, "rename": Path, "rmtree": procedural.shutil}[target]
    original = getattr(owner, target)
    folder = tmp_path / "sounds"
    for calls in (0, 1, 18) if target in ("fsync", "replace") else (0,):
        functions = failing(calls, original, OSError(errno.ENOSPC, "No space left on device"))
        monkeypatch.setattr(owner, target, lambda *args, turn=functions: next(turn)(*args))
        with pytest.raises(DataError, match=r"cannot write .*sounds: No space left on device; the same call"):
            make_procedural(folder, CLIPS, seed=3, seconds=SECONDS, workers=1)
        assert not folder.exists()
    monkeypatch.setattr(owner, target, original)
    make_procedural(folder, CLIPS, seed=3, seconds=SECONDS, workers=1)
    assert contents(folder) == contents(made)


def test_what_is_there_already_is_refused(made: Path, tmp_path: Path) -> None:
    (foreign := tmp_path / "photos").mkdir()
    (foreign / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(InputError, match="photos exists and is no folder of procedural sound; choose another folder"):
        make_procedural(foreign, 1)
    (file := tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="file exists"):
        make_procedural(file, 1)
    with pytest.raises(InputError, match="sounds holds procedural sound of other arguments"):
        make_procedural(made, CLIPS, seed=4, seconds=SECONDS)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "file"}
    assert [path.name for path in foreign.iterdir()] == ["cat.jpg"]


def test_an_unfinished_run_of_other_arguments_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(procedural, "synthesize", next(failing(0, None, KeyboardInterrupt())))
        with pytest.raises(KeyboardInterrupt):
            make_procedural(tmp_path / "sounds", 2, seconds=1.0, workers=1)
    with pytest.raises(InputError, match=r"\.sounds\.partial holds an unfinished run of other arguments"):
        make_procedural(tmp_path / "sounds", 3, seconds=1.0, workers=1)
    (tmp_path / ".sounds.partial" / "procedural.json").write_bytes(b"{")
    with pytest.raises(InputError, match="is damaged; delete"):
        make_procedural(tmp_path / "sounds", 2, seconds=1.0, workers=1)


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    assert make_procedural(tmp_path / "sounds", 1, seed=1234567, seconds=1.0, workers=1) == {CLASSES[0]: 1}
    assert read_clip_folder(tmp_path / "sounds")[0].source == "procedural sound, seed 1234567"  # all of its digits
