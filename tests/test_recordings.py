"""The clip folder of recordings: the table, what is taken from packages, and what is left when something fails."""

import io
import itertools
import json
import os
import re
import shutil
import stat
import tarfile
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import soundfile

from siren.data import recordings
from siren.data.clips import read_clip_folder
from siren.data.recordings import Row, make_recordings, read_table
from siren.errors import CheckpointError, DataError

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb")

ROWS = [
    Row("bells-data", "*/sounds/bell-[12].wav", "bell", ("a bell", "a bell ringing"), "CC0-1.0"),
    Row("bells-data", "*/sounds/long.wav", "drone", ("a long tone",), "GPL-2+"),
    Row("bells-data", "*/sounds/loud.wav", "horn", ("a loud horn",), "CC-BY-3.0"),
    Row("bells-data", "*/sounds/gone.wav", "ghost", ("what another version has",), "MIT"),
    Row("bells-data", "*/sounds/bad*.wav", "noise", ("what cannot be used",), "MIT"),
    Row("bells-data", "*evil.wav", "noise", ("what must not be read",), "MIT"),
    Row("dogs-1.2-data", "*/dog.wav", "dog", ("a dog barking",), "CC-BY-SA-3.0"),
]


def wav(samples: np.ndarray, rate: int = 22050) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def tone(seconds: float, frequency: float, rate: int = 22050) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


PACKAGES = {
    "bells-data": {
        "usr/share/doc/bells-data/copyright": b"License: CC0\n",
        "usr/share/bells/sounds/bell-2.wav": wav(tone(0.3, 880)),
        "usr/share/bells/sounds/bell-1.wav": wav(np.stack([tone(0.301, 440), 0 * tone(0.301, 440)], axis=1)),
        "usr/share/bells/sounds/long.wav": wav(np.concatenate([np.zeros(3 * 22050), tone(10.5, 220)])),
        "usr/share/bells/sounds/loud.wav": wav(5 * tone(0.5, 330)),
        "usr/share/bells/sounds/bad-silent.wav": wav(np.zeros(9000)),
        "usr/share/bells/sounds/bad-short.wav": wav(tone(0.1, 500)),
        "usr/share/bells/sounds/bad-file.wav": b"RIFF, but no sound",
        "usr/share/bells/sounds/bad-copy.wav": wav(tone(0.3, 880)),
        "usr/share/bells/music/theme.wav": wav(tone(1, 600)),
    },
    "dogs-1.2-data": {"usr/share/dogs/dog.wav": wav(tone(0.7, 300, 8000), 8000)},
}
DROPPED = {"row without a file in the package": 2, "same as another": 1, "silent": 1, "too short": 1, "unreadable": 1}


def write_deb(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> None:
    """A .deb file, written here so that its members can be such as dpkg-deb would never pack."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    control = io.BytesIO()
    with tarfile.open(fileobj=control, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("./control"))
    parts = {"debian-binary": b"2.0\n", "control.tar": control.getvalue(), "data.tar": data.getvalue()}
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in parts.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "read_table", lambda: ROWS)


@pytest.fixture
def debs(tmp_path: Path, table: None) -> Path:
    folder = tmp_path / "debs"
    folder.mkdir()
    for package, files in PACKAGES.items():
        write_deb(folder / f"{package}_1%3a0.1-2_all.deb", {f"./{name}": data for name, data in files.items()})
    return folder


@pytest.fixture
def unpacked(tmp_path: Path, table: None) -> Path:
    folder = tmp_path / "unpacked"
    for package, files in PACKAGES.items():
        for name, data in files.items():
            file = folder / package / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def use_programs(monkeypatch: pytest.MonkeyPatch, folder: Path, apt: str | None, dpkg: bool = True) -> None:
    """Only these programs are found: `apt`, a shell script run as apt-get, and dpkg-deb if `dpkg`."""
    folder.mkdir()
    if apt is not None:
        script = folder / "apt-get"
        script.write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{apt}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    if dpkg and (real := shutil.which("dpkg-deb")):
        (folder / "dpkg-deb").symlink_to(real)
        for tool in ("tar", "rm"):
            (folder / tool).symlink_to(shutil.which(tool) or tool)
    monkeypatch.setenv("PATH", str(folder))


# The table


def test_the_table_is_complete() -> None:
    """Five packages; every row has a label, captions that read like captions, and a licence."""
    rows = read_table()
    packages = {
        "wesnoth-1.16-data",
        "tuxpaint-stamps-default",
        "minetest-data",
        "supertuxkart-data",
        "sonic-pi-samples",
    }
    assert {row.package for row in rows} == packages
    licences = {"GPL-2", "GPL-2+", "GPL-3+", "CC0-1.0", "MIT", "public-domain"}
    licences |= {"CC-BY-3.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0"}
    for row in rows:
        assert row.licence in licences, row
        assert re.fullmatch(r"[a-z-]+( [a-z-]+)*", row.label), row
        assert 2 <= len(set(row.captions)) == len(row.captions) <= 3, row
        for caption in row.captions:
            assert re.fullmatch(r"[A-Za-z0-9' -]{4,}", caption) and caption == " ".join(caption.split()), row
            assert "someone talking" not in caption and "music" not in caption.split(), row
        assert row.path.startswith("*/") and row.path.endswith((".ogg", ".wav", ".flac")), row
        assert "_desc" not in row.path, row  # speech


def test_the_table_has_no_row_twice() -> None:
    """No file can fall under two rows, and no caption stands for two labels."""
    files = []
    for row in read_table():
        parts = [
            re.findall(r".", part[1:-1]) if part[0] == "[" else [part]
            for part in re.findall(r"\[.*?\]|[^\[]+", row.path)
        ]
        files += [(row, "usr/share" + "".join(choice).replace("*", "/x")) for choice in itertools.product(*parts)]
    assert any("/core/sounds/wolf-growl-4.ogg" in file for _, file in files)
    for row in read_table():
        for other, file in files:
            if other.package == row.package and other != row:
                assert not fnmatchcase(file, row.path), (row, other)
    labels: dict[str, str] = {}
    for row in read_table():
        for caption in row.captions:
            assert labels.setdefault(caption, row.label) == row.label, caption


# What is made


def test_clips_of_unpacked_packages(tmp_path: Path, unpacked: Path) -> None:
    """16 kHz mono FLAC in the table's order with captions, licence and source; the rest counted."""
    made = make_recordings(tmp_path / "out", unpacked, progress=False)
    assert made.clips == 5 and made.dropped == DROPPED
    assert str(made).startswith("5 clips, 0.2 minutes (dropped: 2 row without a file in the package, 1 same as")
    assert made.seconds == pytest.approx(0.301 + 0.3 + 10 + 0.5 + 0.7, abs=0.001)
    clips = read_clip_folder(tmp_path / "out")
    names = ["bells-data-bell-1", "bells-data-bell-2", "bells-data-long", "bells-data-loud", "dogs-1-2-data-dog"]
    assert [clip.id for clip in clips] == names
    assert [clip.licence for clip in clips] == ["CC0-1.0", "CC0-1.0", "GPL-2+", "CC-BY-3.0", "CC-BY-SA-3.0"]
    assert clips[1].captions == ("a bell", "a bell ringing") and clips[1].label == "bell"
    assert clips[1].source == "bells-data: usr/share/bells/sounds/bell-2.wav"
    for clip in clips:
        info = soundfile.info(clip.path)
        assert (info.samplerate, info.channels, info.format, info.subtype) == (16000, 1, "FLAC", "PCM_16")
    assert (tmp_path / "out/copyright/bells-data.txt").read_bytes() == b"License: CC0\n"


def test_levels_and_lengths(tmp_path: Path, unpacked: Path) -> None:
    """A loud clip is turned down, others are not touched; a long one begins where its sound does and is faded."""
    make_recordings(tmp_path / "out", unpacked, progress=False)
    sounds = {clip.id: soundfile.read(clip.path)[0] for clip in read_clip_folder(tmp_path / "out")}
    loud = sounds["bells-data-loud"]
    assert np.abs(loud).max() == pytest.approx(1, abs=0.001)
    assert np.sqrt(np.mean(loud**2)) == pytest.approx(np.sqrt(0.5), abs=0.02)  # a sine still, not a clipped one
    assert np.abs(sounds["bells-data-bell-2"]).max() == pytest.approx(0.5, abs=0.05)
    assert np.abs(sounds["bells-data-bell-1"]).max() == pytest.approx(0.25, abs=0.03)  # two channels averaged
    long = sounds["bells-data-long"]
    assert len(long) == 160000 and np.abs(long[:200]).max() < 0.1 < np.abs(long[400:800]).max()
    assert np.abs(long[-800:-400]).max() > 0.45 and abs(long[-1]) < 0.001


@needs_dpkg
def test_debs_give_the_same_bytes(tmp_path: Path, debs: Path, unpacked: Path) -> None:
    """From .deb files or unpacked, in a new folder or over an old one: the same folder."""
    first = make_recordings(tmp_path / "first", debs, progress=False)
    second = make_recordings(tmp_path / "second", unpacked, progress=False)
    assert first == second
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    make_recordings(tmp_path / "first", debs, progress=False)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["debs", "first", "second", "unpacked"]


@needs_dpkg
def test_unsafe_members_are_not_read(tmp_path: Path, debs: Path) -> None:
    """Paths that leave the package, and links, are neither read nor written."""
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav(tone(0.4, 700)))
    evil = {name: wav(tone(0.4, 800)) for name in ("../evil.wav", "/evil.wav", "./a/../../evil.wav", "a\nevil.wav")}
    write_deb(
        debs / "bells-data_9_all.deb",
        PACKAGES["bells-data"] | evil,
        {"./b/evil.wav": str(secret), "./evil.wav": "/etc"},
    )
    made = make_recordings(tmp_path / "out", debs, progress=False)
    assert made.dropped == DROPPED | {"unsafe path in a package": 4}
    assert "noise" not in {clip.label for clip in read_clip_folder(tmp_path / "out")}
    assert not list(tmp_path.rglob("*evil*"))


def test_links_in_an_unpacked_package_are_not_read(tmp_path: Path, unpacked: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(wav(tone(0.4, 700)))
    (unpacked / "bells-data/evil.wav").symlink_to(tmp_path / "secret.wav")
    assert make_recordings(tmp_path / "out", unpacked, progress=False).clips == 5


def test_large_files_are_left_out(tmp_path: Path, unpacked: Path, debs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "_MAX_BYTES", 500_000)
    for i, source in enumerate([unpacked, debs] if shutil.which("dpkg-deb") else [unpacked]):
        made = make_recordings(tmp_path / f"out{i}", source, progress=False)
        assert made.clips == 4 and made.dropped["too large"] == 1


# Failures


@pytest.mark.parametrize("written", range(6))
def test_killed_while_writing(tmp_path: Path, unpacked: Path, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    """Killed after any number of clips: no folder, or the old one; the next call makes the whole one."""
    make_recordings(tmp_path / "whole", unpacked, progress=False)
    if written % 2:
        make_recordings(tmp_path / "out", unpacked, progress=False)
    write, sync, count = soundfile.write, recordings.sync, itertools.count()
    pid = os.fork()
    if not pid:  # ends without cleaning up, as by kill -9
        monkeypatch.setattr(
            soundfile, "write", lambda *a, **k: write(*a, **k) if next(count) < written else os._exit(9)
        )
        monkeypatch.setattr(recordings, "sync", lambda path: os._exit(9) if path.name == "clips.jsonl" else sync(path))
        try:
            make_recordings(tmp_path / "out", unpacked, progress=False)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert (tmp_path / "out").exists() == bool(written % 2)
    if written % 2:
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    make_recordings(tmp_path / "out", unpacked, progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_leaves_nothing(tmp_path: Path, unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(soundfile, "write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        make_recordings(tmp_path / "out", unpacked, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["unpacked"]


def test_other_folders_are_not_touched(tmp_path: Path, unpacked: Path) -> None:
    """A folder of something else, or with a file of the user's, is refused before any work."""
    make_recordings(tmp_path / "out", unpacked, progress=False)
    (tmp_path / "out/audio/mine.wav").write_bytes(b"mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / "clips.jsonl").write_text("mine\n")
    for folder, message in ((tmp_path / "out", "also holds 'mine.wav'"), (other, "is no folder of recordings")):
        before = contents(folder)
        with pytest.raises(DataError, match=message):
            make_recordings(folder, tmp_path / "no packages", progress=False)
        assert contents(folder) == before


def test_missing_packages(tmp_path: Path, unpacked: Path) -> None:
    """A package that is not there, and one without any of the sounds, are errors that name it."""
    shutil.rmtree(unpacked / "dogs-1.2-data")
    with pytest.raises(DataError, match=r"neither dogs-1\.2-data_VERSION\.deb nor"):
        make_recordings(tmp_path / "out", unpacked, progress=False)
    (unpacked / "dogs-1.2-data").mkdir()
    with pytest.raises(DataError, match=r"none of the sounds that dogs-1\.2-data should have"):
        make_recordings(tmp_path / "out", unpacked, progress=False)
    assert not (tmp_path / "out").exists()


@needs_dpkg
@pytest.mark.parametrize("size", [0, 100, 3000, -1024])
def test_damaged_deb(tmp_path: Path, debs: Path, size: int) -> None:
    """A .deb file that is cut off anywhere is named."""
    file = next(debs.glob("dogs*.deb"))
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DataError, match=f"{re.escape(file.name)} is damaged"):
        make_recordings(tmp_path / "out", debs, progress=False)
    assert not (tmp_path / "out").exists()


def test_no_dpkg(tmp_path: Path, debs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_programs(monkeypatch, tmp_path / "bin", apt=None, dpkg=False)
    with pytest.raises(DataError, match="this machine has no dpkg-deb; unpack the packages elsewhere"):
        make_recordings(tmp_path / "out", debs, progress=False)


def test_no_apt(tmp_path: Path, table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says how to go on without it, and leaves nothing."""
    use_programs(monkeypatch, tmp_path / "bin", apt=None)
    with pytest.raises(DataError, match=r"this machine has no apt-get; pass a folder .* \(--packages FOLDER\)"):
        make_recordings(tmp_path / "out/deep", progress=False)
    assert not (tmp_path / "out").exists()


@needs_dpkg
def test_download(tmp_path: Path, debs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get's own message is passed on; what it got before is not fetched again, and goes when all is done."""
    fail = tmp_path / "fail"
    fail.touch()
    script = (
        f'echo "$3" >>{tmp_path}/log; [ "$1 $2" = "-qq download" ] || exit 1\n'
        f'case "$3" in dogs*) if [ -e {fail} ]; then echo "E: Unable to locate package $3" >&2; exit 100; fi;; esac\n'
        f"cp {debs}/$3_*.deb ."
    )
    use_programs(monkeypatch, tmp_path / "bin", apt=script)
    with pytest.raises(DataError, match=r"cannot download dogs-1\.2-data \(Unable to locate package .*\); run apt-get"):
        make_recordings(tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.packages").is_dir()
    assert not list(tmp_path.rglob("*.part"))
    fail.unlink()
    assert make_recordings(tmp_path / "out", progress=False).clips == 5
    assert (tmp_path / "log").read_text().split() == ["bells-data", "dogs-1.2-data", "dogs-1.2-data"]
    assert not (tmp_path / ".out.packages").exists()
    assert json.loads((tmp_path / "out/clips.jsonl").read_text().splitlines()[-1])["label"] == "dog"
