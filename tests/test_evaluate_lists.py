"""Lists of clips of every kind, their hashes, which clips are pairs, and why a sound is skipped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fake_embedder import RATE, manifest, sounds, tone

from siren.data.sound import SoundError
from siren.errors import DataError, InputError, SirenError
from siren.evaluate.clip_lists import ClipList, Entry, file_digest, list_digest, prompts_digest, read_list
from siren.evaluate.pairs import find_pairs, no_pairs
from siren.evaluate.sounds import hear, is_clipped


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def listed(path: Path) -> list[tuple[str, str, str, str]]:
    return [(e.id, e.pair, e.path.name, e.prompt) for e in read_list(path).entries]


def test_a_folder_of_sounds(tmp_path: Path) -> None:
    """At any depth; the id is the path without suffix, and there are no prompts."""
    sounds(tmp_path / "a", [1, 2])
    sounds(tmp_path / "a" / "deep", [3])
    ids = [e.id for e in read_list(tmp_path / "a").entries]
    assert ids == ["clip-000", "clip-001", "deep/clip-000"]
    assert not any(e.prompt for e in read_list(tmp_path / "a").entries)
    soundfile.write(tmp_path / "a" / "clip-000.flac", tone(1), RATE)
    with pytest.raises(DataError, match="several sounds named clip-000"):
        read_list(tmp_path / "a")


def test_a_clip_folder(tmp_path: Path) -> None:
    """By its folder or its list; the first caption is the prompt."""
    folder = sounds(tmp_path / "a", [1, 2])
    write(folder / "clips.jsonl", {"id": "x", "audio": "clip-001.wav", "caption": ["rain", "wet"]})
    assert listed(folder) == listed(folder / "clips.jsonl") == [("x", "x", "clip-001.wav", "rain")]


def test_what_generate_writes(tmp_path: Path) -> None:
    """results.jsonl; several clips of a prompt have ids of their own and one partner."""
    folder = sounds(tmp_path / "a", [1])
    about = {"id": "1", "file": "1.wav", "prompt": "rain", "seed": 0, "seconds": 1.0, "temperature": 1.0}
    write(folder / "results.jsonl", about, about | {"id": "2", "file": "2.wav", "prompt": "wind"})
    assert listed(folder) == [("1", "1", "1.wav", "rain"), ("2", "2", "2.wav", "wind")]
    write(folder / "results.jsonl", *(about | {"file": f"1-{i}.wav"} for i in range(2)), about | {"id": "2"})
    assert listed(folder)[:2] == [("1-0", "1", "1-0.wav", "rain"), ("1-1", "1", "1-1.wav", "rain")]
    write(folder / "clips.jsonl", {"id": "x", "audio": "clip-000.wav"})
    with pytest.raises(InputError, match=r"both clips.jsonl and results.jsonl"):
        read_list(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "id,file_name,text\nx,a.wav,rain\n,b/c.wav,\n"),
        ("l.tsv", "clip_id\tpath\tprompt\nx\ta.wav\train\n\tb/c.wav\t\n"),
        ("l.jsonl", '{"id": "x", "audio": "a.wav", "caption": "rain"}\n\n{"audio": "b/c.wav"}\n'),
        ("l.csv", "id,audio,caption\nx,a.wav,rain\nx,a.wav,more rain\n,b/c.wav,\n"),
    ],
)
def test_a_manifest(tmp_path: Path, name: str, text: str) -> None:
    """By the columns' usual names; without an id, the path is one; rows of one sound are one clip."""
    write(tmp_path / name, text)
    assert listed(tmp_path / name) == [("x", "x", "a.wav", "rain"), ("b/c", "b/c", "c.wav", "")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.jsonl", "", "lists no clips"),
        ("l.jsonl", "{", "line 1 is not valid JSON"),
        ("l.jsonl", '{"caption": "x"}\n', "has no audio"),
        ("l.jsonl", '{"audio": "../x.wav"}\n', "is not a path inside"),
        ("l.jsonl", '{"id": "x", "audio": "a.wav"}\n{"id": "x", "audio": "b.wav"}\n', "line 2: the id 'x' is taken"),
        ("l.csv", "audio,id\na.wav,x\nx-1.wav,x\n", "line 3: the id 'x' is taken"),
        ("l.csv", "audio,id\nx-0.wav,x\nx-1.wav,x\na.wav,x-1\n", "'x-1' is there twice"),
        ("l.csv", "audio,id\na.wav\n", "1 fields"),
        ("l.txt", "a.wav", "is no list of clips"),
        ("none.csv", None, "there is no file or folder"),
        ("empty", None, "has no clips"),
    ],
)
def test_what_is_no_list(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    (tmp_path / "empty").mkdir()
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(SirenError, match=message):
        read_list(tmp_path / name)


def test_lists_of_shards_are_joined_first(tmp_path: Path) -> None:
    """A folder that shards made is not taken for bare sounds, whose prompts nobody knows."""
    folder = sounds(tmp_path / "a", [1, 2])
    (folder / "results-1-of-2.jsonl").write_text("")
    with pytest.raises(InputError, match=r"holds lists of shards, such as results-1-of-2.jsonl; join them to"):
        read_list(folder)


def test_hashes(tmp_path: Path) -> None:
    """A list's hash is of ids, prompts and sounds: not of order, place or time, but of each byte."""
    folder = sounds(tmp_path / "a", [1, 2, 3])
    clips = read_list(manifest(folder, 3))

    def digest(clips: ClipList) -> str:
        return list_digest(clips, [file_digest(entry.path) for entry in clips.entries])

    first = digest(clips)
    os.utime(folder / "clip-000.wav", (1, 1))
    folder.rename(tmp_path / "b")
    moved = read_list(tmp_path / "b/list.jsonl")
    assert digest(moved) == first == digest(ClipList(moved.path, moved.entries[::-1]))
    assert prompts_digest(moved) == prompts_digest(ClipList(moved.path, moved.entries[::-1]))
    other = Entry("c0", "c0", moved.entries[0].path, "snow")
    changed = ClipList(moved.path, (other, *moved.entries[1:]))
    assert digest(changed) != first and prompts_digest(changed) != prompts_digest(moved)
    data = bytearray((tmp_path / "b/clip-000.wav").read_bytes())
    data[-1] ^= 1
    (tmp_path / "b/clip-000.wav").write_bytes(data)
    assert digest(moved) != first
    (tmp_path / "b/clip-000.wav").unlink()
    assert file_digest(tmp_path / "b/clip-000.wav") == file_digest(tmp_path) == "missing"


def make(*entries: str) -> ClipList:
    """A list from "id", "id=file" or "id:pair=file"."""
    made = []
    for text in entries:
        names, _, stem = text.partition("=")
        name, _, pair = names.partition(":")
        made.append(Entry(name, pair or name, Path("folder", f"{stem or name}.wav"), ""))
    return ClipList(Path("list"), tuple(made))


@pytest.mark.parametrize(
    ("generated", "reference", "pairs"),
    [
        (["a", "b", "c"], ["c", "a"], [(0, 1), (2, 0)]),
        (["a-0:a", "a-1:a", "b"], ["a", "b"], [(0, 0), (1, 0), (2, 1)]),  # several clips of a prompt
        (["1", "2"], ["x=1", "y=2"], [(0, 0), (1, 1)]),  # the id is the file's name there
        (["x=1", "y=2"], ["u=2", "v=1"], [(0, 1), (1, 0)]),  # both ids differ
        (["deep/1=1"], ["1"], [(0, 0)]),
        (["1"], ["a/1=1", "b/1=1"], []),  # which of them?
        (["a", "b=a"], ["a"], [(0, 0)]),  # a partner is not used twice
        (["a"], ["b"], []),
    ],
)
def test_pairs(generated: list[str], reference: list[str], pairs: list[tuple[int, int]]) -> None:
    assert find_pairs(make(*generated), make(*reference)) == pairs
    assert "'1', '2', '3'" in no_pairs(make("1", "2", "3", "4"), make("x"))


def test_a_sound_at_the_models_rate(tmp_path: Path) -> None:
    """Read at its own rate, resampled once; the own rate is told."""
    soundfile.write(tmp_path / "a.wav", np.stack([tone(1, 1.0, 44100)] * 2, axis=1), 44100, subtype="FLOAT")
    same = hear(tmp_path / "a.wav", 44100, 0.2, 2)
    np.testing.assert_allclose(same.wave, tone(1, 1.0, 44100), atol=1e-7)
    lower = hear(tmp_path / "a.wav", 32000, 0.2, 2)
    assert (len(lower.wave), lower.rate, lower.clipped, lower.wave.dtype) == (32000, 44100, False, np.float32)


def test_reasons_to_skip_a_sound(tmp_path: Path) -> None:
    good = tone(1, 1.0)
    soundfile.write(tmp_path / "good.wav", good, RATE)
    soundfile.write(tmp_path / "good.flac", good, RATE)
    for name in ("good.wav", "good.flac"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(data[: len(data) // 2])
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE, np.float32), RATE)
    soundfile.write(tmp_path / "nearly.wav", np.full(RATE, 0.9 / 32768, np.float32), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", good[: round(0.19 * RATE)], RATE)
    soundfile.write(tmp_path / "long.wav", tone(1, 2.1), RATE)
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        soundfile.write(tmp_path / f"{name}.wav", np.where(good > 0.2, value, good), RATE, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), RATE)
    (tmp_path / "folder.wav").mkdir()
    reasons = {
        "cut-good.wav": "truncated",
        "cut-good.flac": "unreadable",
        "silent.wav": "silent",
        "nearly.wav": "silent",
        "short.wav": "too short",
        "nothing.wav": "too short",
        "long.wav": "too long",
        "nan.wav": "NaN or infinity",
        "infinite.wav": "NaN or infinity",
        "text.wav": "unreadable",
        "empty.wav": "unreadable",
        "folder.wav": "missing",
        "none.wav": "missing",
    }
    for name, reason in reasons.items():
        with pytest.raises(SoundError, match=name.replace(".", r"\.")) as caught:
            hear(tmp_path / name, RATE, 0.2, 2)
        assert caught.value.reason == reason, (name, str(caught.value))
    for name in ("good.wav", "good.flac"):
        assert len(hear(tmp_path / name, RATE, 0.2, 2).wave) == RATE


def test_a_wav_of_unknown_length_is_whole(tmp_path: Path) -> None:
    """A program that writes to a pipe leaves the largest number, or 0, where the size should be."""
    soundfile.write(tmp_path / "a.wav", tone(1), RATE)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    for size in (0, 0xFFFFFFFF):
        data[4:8] = size.to_bytes(4, "little")
        (tmp_path / "a.wav").write_bytes(data)
        assert hear(tmp_path / "a.wav", RATE, 0.2, 2).rate == RATE


def test_clipping() -> None:
    """Three samples in a row at full scale on one side; a peak that just reaches it is none."""
    wave = tone(1)
    assert not is_clipped(wave) and not is_clipped(wave[:1]) and not is_clipped(wave[:2])
    for run, clipped in ((1, False), (2, False), (3, True), (9, True)):
        for value in (1.0, -1.0, 32767 / 32768):
            wave = tone(1)
            wave[-run:] = value
            assert is_clipped(wave) == clipped
    wave = tone(1)
    wave[-4:] = [1, -1, 1, -1]
    assert not is_clipped(wave)
    assert not is_clipped(np.sin(np.arange(16000) * 0.1))  # at full scale, but round
