"""The result of generation: what is saved is the sound, files appear whole or not at all, pictures show the sound."""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from siren.audio import Audio, write_files
from siren.errors import InputError, MissingDependencyError, SirenError
from siren.picture import mel_spectrogram

RATE = 16000


def make(clips: int = 1, samples: int = 640, prompts: list[str] | None = None, gain: float = 0.5) -> Audio:
    generator = torch.Generator().manual_seed(clips)
    return Audio(
        waveform=torch.rand(clips, 1, samples, generator=generator).mul(2 * gain).sub(gain),
        sample_rate=RATE,
        codes=torch.randint(1024, (clips, 12, 2), generator=generator),
        logprobs=-torch.rand(clips, 12, 2, generator=generator),
        prompts=prompts or [],
    )


def _contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dog.wav", "dog.flac", "DOG.WAV", "a b.c.wav", "x" * 251 + ".wav"])
def test_what_is_saved_is_the_sound(tmp_path: Path, name: str) -> None:
    audio = make()
    assert audio.save(tmp_path / name) == [tmp_path / name]
    assert _contents(tmp_path) == [name]
    wave, rate = soundfile.read(tmp_path / name, dtype="float32", always_2d=True)
    assert rate == RATE
    assert wave.shape == (640, 1)
    np.testing.assert_allclose(wave[:, 0], audio.waveform[0, 0], rtol=0, atol=1 / 32768)
    assert soundfile.info(tmp_path / name).subtype == "PCM_16"


def test_several_clips_are_numbered_or_picked(tmp_path: Path) -> None:
    audio = make(11)
    paths = audio.save(str(tmp_path / "rain.wav"))
    assert _contents(tmp_path) == [f"rain-{i:02}.wav" for i in range(11)] == [path.name for path in paths]
    assert audio.save(tmp_path / "one.wav", index=-1) == [tmp_path / "one.wav"]
    assert (tmp_path / "one.wav").read_bytes() == (tmp_path / "rain-10.wav").read_bytes()
    assert audio[3].save(tmp_path / "three.wav") == [tmp_path / "three.wav"]
    assert (tmp_path / "three.wav").read_bytes() == (tmp_path / "rain-03.wav").read_bytes()


def test_a_clip_that_is_too_loud_is_turned_down_alone(tmp_path: Path) -> None:
    """Its shape stays, no sample wraps around, and its quiet neighbour is left as it is."""
    audio = make(2)
    audio.waveform[1] *= 10
    for path, factor in zip(audio.save(tmp_path / "x.wav"), (1.0, float(audio.waveform[1].abs().max())), strict=True):
        wave, _ = soundfile.read(path, dtype="float32")
        clip = audio.waveform[0 if factor == 1 else 1, 0]
        np.testing.assert_allclose(wave, clip / factor, rtol=0, atol=1 / 16384)


def test_full_scale_does_not_wrap(tmp_path: Path) -> None:
    audio = Audio(torch.tensor([[[1.0, -1.0, 0.0]]]), RATE, torch.zeros(1, 12, 1, dtype=torch.int64))
    audio.save(tmp_path / "x.wav")
    wave, _ = soundfile.read(tmp_path / "x.wav", dtype="int16")
    assert wave[0] >= 32766
    assert wave[1] <= -32766


def test_saving_replaces_a_file_and_keeps_the_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_text("old")
    make().save(path)
    assert soundfile.info(path).frames == 640
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["x.mp3", "x", "", ".wav", "x.wav/"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    if name == "x.wav/":  # pathlib drops the slash: this one is a fine name
        assert make().save(f"{tmp_path}/{name}") == [tmp_path / "x.wav"]
        return
    with pytest.raises(InputError, match=r"must end in \.wav or \.flac"):
        make().save(tmp_path / name)
    with pytest.raises(InputError, match=r"must end in \.png"):
        make().picture(tmp_path / name)
    assert _contents(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.wav").mkdir()
    for path, message in (
        (tmp_path / "nowhere" / "x.wav", "No such file or directory"),
        (tmp_path / "file" / "x.wav", "Not a directory"),
        (tmp_path / ("x" * 300 + ".wav"), "too long"),
        (tmp_path / "nul\0.wav", "null"),
        (tmp_path / "folder.wav", "it is a folder"),
    ):
        with pytest.raises(SirenError, match=message):
            make().save(path)
    with pytest.raises(InputError, match="is not a path"):
        make().save(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is not a path"):
        make().save("~nobody_of_that_name/x.wav")
    assert _contents(tmp_path) == ["file", "folder.wav"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x-0.wav").write_text("old")
    calls = []

    def full_at_the_third(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_at_the_third)
    with pytest.raises(SirenError, match=r"cannot write .*x-2\.wav: No space left on device"):
        make(5).save(tmp_path / "x.wav")
    assert _contents(tmp_path) == ["x-0.wav"]
    assert (tmp_path / "x-0.wav").read_text() == "old"


def test_write_files_writes_bytes(tmp_path: Path) -> None:
    write_files({tmp_path / "a": b"1", tmp_path / "b": b"22"})
    assert [(tmp_path / name).read_bytes() for name in _contents(tmp_path)] == [b"1", b"22"]


def test_a_rate_that_no_file_can_hold(tmp_path: Path) -> None:
    audio = Audio(torch.zeros(1, 1, 4), 10_000_000, torch.zeros(1, 12, 1, dtype=torch.int64))
    with pytest.raises(InputError, match="FLAC cannot hold 10000000"):
        audio.save(tmp_path / "x.flac")
    assert _contents(tmp_path) == []


# ---- the object ------------------------------------------------------------------------------------------------------


def test_indexing_and_looping_give_clips_with_everything_of_theirs() -> None:
    audio = make(3, prompts=["a", "b", "c"])
    assert len(audio) == 3
    assert audio.seconds == 0.04
    assert repr(audio) == "Audio(3 clips of 0.04 s at 16000 Hz)"
    assert repr(audio[0]) == "Audio(1 clip of 0.04 s at 16000 Hz)"
    for i, clip in enumerate(audio):
        assert clip.prompts == [audio.prompts[i]]
        assert torch.equal(clip.waveform, audio.waveform[i : i + 1])
        assert torch.equal(clip.codes, audio.codes[i : i + 1])
        assert torch.equal(clip.logprobs, audio.logprobs[i : i + 1])
    assert audio[-2:].prompts == ["b", "c"]
    for index in (3, -4, "0", True):
        with pytest.raises(InputError):
            audio[index]
        with pytest.raises(InputError):
            audio.save("x.wav", index=index)


GOOD = {
    "waveform": torch.zeros(2, 1, 3), "sample_rate": RATE, "codes": torch.zeros(2, 12, 1, dtype=torch.int64),
    "logprobs": None, "prompts": ["a", "b"],
}  # fmt: skip
BAD = {
    "double": ({"waveform": torch.zeros(2, 1, 3, dtype=torch.float64)}, "must be a float32 tensor"),
    "array": ({"waveform": np.zeros((2, 1, 3), np.float32)}, "must be a float32 tensor"),
    "stereo": ({"waveform": torch.zeros(2, 2, 3)}, r"\[clips, 1, samples\], not \[2, 2, 3\]"),
    "nothing": ({"waveform": torch.zeros(2, 1, 0)}, "clips, 1, samples"),
    "nan": ({"waveform": torch.full((2, 1, 3), torch.nan)}, "NaN or infinity"),
    "infinity": ({"waveform": torch.full((2, 1, 3), -torch.inf)}, "NaN or infinity"),
    "rate": ({"sample_rate": 0}, "sample_rate must be"),
    "rate of another kind": ({"sample_rate": 16000.0}, "sample_rate must be"),
    "float codes": ({"codes": torch.zeros(2, 12, 1)}, "codes must be an int64 tensor"),
    "one code": ({"codes": torch.zeros(1, 12, 1, dtype=torch.int64)}, "of the same clips"),
    "logprobs": ({"logprobs": torch.zeros(2, 12, 2)}, "of the same clips"),
    "prompts": ({"prompts": ["a"]}, "1 prompts for 2 clips"),
}


@pytest.mark.parametrize("kind", BAD)
def test_parts_that_do_not_fit(kind: str) -> None:
    change, message = BAD[kind]
    Audio(**GOOD)
    with pytest.raises(InputError, match=message):
        Audio(**(GOOD | change))


def test_a_notebook_plays_the_clips_and_shows_prompts_as_text() -> None:
    page = make(2, prompts=["<script>alert(1)</script>", "rain & wind"])._repr_html_()
    assert "<script>" not in page
    assert "rain &amp; wind" in page
    sounds = re.findall(r"data:audio/wav;base64,([^\"]+)", page)
    assert [len(soundfile.read(io.BytesIO(base64.b64decode(sound)))[0]) for sound in sounds] == [640, 640]
    many = make(20)._repr_html_()
    assert many.count("<audio") == 8
    assert "and 12 more" in many


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_the_spectrogram_shows_where_a_tone_is() -> None:
    """Silence, then 1000 Hz: loudest in the band of 1000 Hz (of 128 bands even in mel up to 8000 Hz)."""
    wave = np.zeros(RATE, np.float32)
    wave[RATE // 2 :] = np.sin(2 * np.pi * 1000 * np.arange(RATE // 2) / RATE)
    image = mel_spectrogram(wave, RATE, 160)
    assert image.shape == (128, 100)
    assert image.max() == 0
    assert (image[:, :40] == -80).all()
    band = 2595 * np.log10(1 + 1000 / 700) / (2595 * np.log10(1 + 8000 / 700)) * 129 - 1
    assert set(image[:, 60:90].argmax(axis=0)) == {round(band)}
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    assert mel_spectrogram(noise, RATE, 160).min() > -60, "an empty band would draw a dark stripe"


@pytest.mark.parametrize("samples", [1, 2, 319, 5000, 96001])
def test_any_length_and_any_title_makes_a_picture(tmp_path: Path, samples: int) -> None:
    pytest.importorskip("matplotlib")
    prompts = ["first", "costs $5 or $6 \\frac \n" + "very " * 100 + "long \u72ac\u304c\u5420\u3048\u308b \U0001f415"]
    path = make(2, samples, prompts).picture(tmp_path / "x.png", index=1)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert _contents(tmp_path) == ["x.png"]


def test_silence_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make(1, 1000, gain=0.0).picture(tmp_path / "x.png")
    assert (mel_spectrogram(np.zeros(1000, np.float32), RATE, 10) == -80).all()


def test_pictures_leave_pyplot_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    before = "matplotlib.pyplot" in sys.modules
    make().picture(tmp_path / "x.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"siren\[pictures\]"):
        make().picture(tmp_path / "x.png")
    assert _contents(tmp_path) == []
