"""`siren evaluate` and `siren compare-evaluations`: what they print and write, their options, and their errors."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_embedder import FakeEmbedder, manifest, sounds

from siren.cli import main
from siren.cli_evaluate import evaluate
from siren.evaluate import EvaluateSettings
from siren.evaluate import run as run_module


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two lists of five sounds; `load_embedder` gives fake models of any name."""
    monkeypatch.chdir(tmp_path)
    for name, first in (("gen", 0), ("ref", 20)):
        manifest(sounds(tmp_path / name, range(first, first + 5)), 5)
    module = SimpleNamespace(load_embedder=lambda name, device: FakeEmbedder(name, text=name != "aisfx"))
    monkeypatch.setitem(sys.modules, "siren.evaluate.embedders", module)  # type: ignore[arg-type]
    return tmp_path


def test_from_sounds_to_figures(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A line for each figure of the default models; the result beside its clips; nothing else on stderr."""
    main(["evaluate", "gen/list.jsonl", "--reference", "ref", "--out", "r.json", "--bootstrap", "20"])
    out, err = capfd.readouterr()
    lines = out.splitlines()
    labels = [f"{metric} ({name})" for name in ("aisfx", "aligner") for metric in ("FD", "IS", "KL")] + [
        "score (aligner)"
    ]
    assert lines[0].split() == ["figure", "value", "interval", "N"] and err == ""
    assert [line.partition(")")[0] + ")" for line in lines[1:8]] == labels
    assert "5 / 5" in lines[1] and "lower is better" in lines[1] and "higher is better" in lines[2]
    assert "generated: 5 of 5 clips used" in lines and "reference: 5 of 5 clips used" in lines
    result = json.loads((work / "r.json").read_text())
    assert result["format"] == "siren-evaluation 1" and [f["label"] for f in result["figures"]] == labels
    assert sorted(path.name for path in work.iterdir()) == ["gen", "r.clips.jsonl", "r.json", "r.work", "ref"]


def test_without_pairs(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither ids nor the files' names agree: a line says why there is no KL."""
    for i, path in enumerate(sorted((work / "ref").glob("*.wav"))):
        path.rename(work / f"ref/other-{i}.wav")
    main(["evaluate", "gen", "--reference", "ref", "--out", "r.json", "--bootstrap", "0"])
    assert "no KL (aisfx): no id is in both lists: gen has 'clip-000'" in capfd.readouterr().out


def test_shards_then_figures(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for i in ("1/2", "2/2"):
        main(["evaluate", "gen", "--shard", i, "--work", "parts", "--embedding", "x"])
        assert "of this shard are there" in capfd.readouterr().out
    main(["evaluate", "gen", "--work", "parts", "--embedding", "x", "--out", "r.json", "--bootstrap", "0"])
    assert capfd.readouterr().out.splitlines()[1].split()[:2] == ["IS", "(x)"]


def test_results_side_by_side(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In one table; other references give other columns."""
    for name, reference in (("a", "ref"), ("b", "ref"), ("c", "gen")):
        main(["evaluate", "gen", "--reference", reference, "--embedding", "aisfx", "--out", f"{name}.json"])
    capfd.readouterr()
    main(["compare-evaluations", "a.json", "b.json"])
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "| result | FD (aisfx) ↓ | IS (aisfx) ↑ | KL (aisfx) ↓ |"
    assert lines[2].startswith("| a.json | **") and lines[3].startswith("| b.json | **")
    main(["compare-evaluations", "a.json", "c.json"])
    assert "FD (aisfx) [2]" in capfd.readouterr().out.splitlines()[0]
    for name, text in (("x.json", "{}"), ("y.json", "{"), ("z.json", '{"format": "siren-evaluation 1"}')):
        (work / name).write_text(text)
        assert "z.json" not in fails(capfd, "compare-evaluations", "a.json", name) or name == "z.json"
    assert "cannot read none.json" in fails(capfd, "compare-evaluations", "none.json")


def test_every_option_is_a_setting_with_the_same_default() -> None:
    """Only `progress` has no option."""
    fields = {field.name: field.default for field in dataclasses.fields(EvaluateSettings)}
    options = {name: parameter.default for name, parameter in inspect.signature(evaluate).parameters.items()}
    assert fields.keys() - options.keys() == {"progress"} and options.keys() <= fields.keys()
    for name in options.keys() - {"generated"}:
        assert options[name] == fields[name] and type(options[name]) is type(fields[name]), name


def test_options_reach_the_settings(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def take(settings: EvaluateSettings) -> dict[str, Any]:
        seen.append(settings)
        return {"work": "", "parts": 0}

    monkeypatch.setattr(run_module, "evaluate", take)
    main(["evaluate", "gen", "--out", "r.json"])
    assert seen[0] == EvaluateSettings(Path("gen"), Path("r.json"))
    main(
        [
            "evaluate",
            "gen",
            "--out",
            "r.json",
            "--embedding",
            "a",
            "--embedding",
            "b",
            "--metric",
            "IS",
            "--shard",
            "1/2",
        ]
    )
    assert (seen[1].embeddings, seen[1].metrics, seen[1].shard) == (["a", "b"], ["IS"], "1/2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gen"], "--out RESULT.json"),
        (["none", "--out", "r.json"], "no file or folder none"),
        (["gen", "--out", "r.txt"], "out must end in .json"),
        (["gen", "--out", "r.json", "--metric", "FAD"], "metrics must be some of"),
        (["gen", "--out", "r.json", "--metric", "KL"], "give one (--reference)"),
        (["gen", "--out", "r.json", "--shard", "5/4"], "shard must be like 1/4"),
        (["gen", "--out", "r.json", "--bootstrap", "many"], "--bootstrap"),
        (["gen", "--out", "none/r.json"], "none is not a folder"),
        ([], "GENERATED"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_writes_nothing(
    work: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in fails(capfd, "evaluate", *words)
    assert sorted(path.name for path in work.iterdir()) == ["gen", "ref"]


def fails(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command ends with; its exit code is 2."""
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    out, err = capfd.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err
