"""The ablations: the arms are what their names say, and the report says no more than the intervals do."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import ablations
from ablation_arms import ARMS, Arm, config_of
from ablation_report import draw, interval, report, verdict
from ablation_tables import ABSENT, COLUMNS, ITG, TABLES, Row

from siren.cli import main as siren_command
from siren.errors import InputError
from siren.expert import Expert

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"num_codebooks": 12, "codebook_size": 1024, "prompt_dim": 384, "dac_code_dim": 16, "dac_feature_dim": 160}


def parameters(arm: str) -> int:
    config = config_of(ARMS[arm], SIZES)
    with torch.device("meta"):
        expert = Expert(config, 0)
    return config.num_experts * sum(p.numel() for p in expert.parameters() if p.requires_grad)


def test_arms_have_the_parameters_of_the_model_unless_their_name_says_otherwise() -> None:
    """Within a tenth; the small one has less than half, the large ones more than one and a half times as many."""
    usual = parameters("6-2")
    for arm in ARMS:
        share = parameters(arm) / usual
        if arm.endswith("small"):
            assert share < 0.5
        elif arm.endswith("large"):
            assert share > 1.5
        else:
            assert 0.9 < share < 1.1, arm


@pytest.mark.parametrize("arm", ARMS)
def test_names_say_how_many_transformers_have_how_many_codes(arm: str) -> None:
    config = config_of(ARMS[arm], SIZES)
    match = re.match(r"(\d+)-(\d+)", arm)
    if match:
        assert (config.num_experts, config.codes_per_expert) == (int(match[1]), int(match[2]))
    base = ARMS[arm].base
    if base is not None:  # an aligned arm is its base
        assert config == config_of(ARMS[base], SIZES) and max(ARMS[arm].aligned) < config.num_experts


@pytest.mark.parametrize("number", TABLES)
def test_tables_are_whole(number: str) -> None:
    table = TABLES[number]
    assert all(column in COLUMNS for column in table.columns)
    assert all(row.arm in ARMS and len(row.paper) == len(table.columns) for row in table.rows)
    assert len({row.arm for row in table.rows}) == len(table.rows) >= 3


def figure(value: float, half: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def made_up(**arms: list[dict[str, float]]) -> dict[str, Any]:
    """Results of arms whose figures are all the same, one for each seed."""
    labels = {label for _, label in COLUMNS.values()}
    return {
        "about": {"cpu": "c", "cores": 2, "torch": "2", "date": "2026-11-23T00", "commit": "abc"},
        "scale": {
            "updates": 7, "batch_size": 8, "seconds": 2.0, "learning_rate": 1e-3, "align_steps": 1, "temperature": 0.8,
            "guidance_scale": 3.0,
        },
        "seeds": list(range(len(next(iter(arms.values()))))), "training_clips": 10, "labels": 2, "clips": 4,
        "embeddings": {"aisfx": "aisfx sha256:1"},
        "codec": {label: figure(0.5) for label in sorted(labels) if not label.startswith("Loss")},
        "arms": {
            name.replace("_", "-"): {
                "parameters": 1_000_000,
                "runs": {
                    str(i): {"figures": dict.fromkeys(labels, value), "seconds": {"training": 60.0}}
                    for i, value in enumerate(values)
                },
            }
            for name, values in arms.items()
        },
    }  # fmt: skip


ROWS = (Row("first", "a", (1.0,)), Row("second", "b", (2.0,)), Row("third", "c", (ITG,)))


def test_an_order_that_is_found() -> None:
    value = made_up(a=[figure(1)], b=[figure(2)], c=[figure(3)])
    text = verdict(value, "FD", 0, ROWS)
    assert "here first, second, third (best first), the paper's order" in text
    assert "of 3 pairs 3 are as in the paper, 0 the other way round, 0 not told apart" in text


def test_an_order_that_is_turned_round_and_one_that_is_open() -> None:
    """c is the paper's worst and ours best; a and b overlap."""
    value = made_up(a=[figure(2)], b=[figure(2.15)], c=[figure(1)])
    text = verdict(value, "FD", 0, ROWS)
    assert "here third, first, second (best first), not the paper's order" in text
    assert "of 3 pairs 0 are as in the paper, 2 the other way round, 1 not told apart" in text


def test_more_is_better_in_other_columns() -> None:
    value = made_up(a=[figure(1)], b=[figure(2)], c=[figure(0)])
    text = verdict(value, "CLAP", 0, ROWS)
    assert "here second, first, third (best first), the paper's order" in text and "3 are as in the paper" in text


def test_seeds_that_disagree_tell_nothing_apart() -> None:
    value = made_up(a=[figure(1), figure(3)], b=[figure(2), figure(2)])
    assert "1 pairs 0 are as in the paper, 0 the other way round, 1 not" in verdict(value, "FD", 0, ROWS[:2])


def test_two_failures_of_the_paper_are_no_pair() -> None:
    value = made_up(a=[figure(1)], b=[figure(2)])
    rows = (Row("x", "a", (ITG,)), Row("y", "b", (ITG,)))
    assert "of 0 pairs" in verdict(value, "FD", 0, rows)


def test_a_row_without_a_figure_of_the_paper_is_left_out() -> None:
    value = made_up(a=[figure(1)], b=[figure(2)], c=[figure(0)])
    text = verdict(value, "FD", 0, (*ROWS[:2], Row("third", "c", (ABSENT,))))
    assert "here first, second (best first), the paper's order; of 1 pairs 1 are" in text.replace("\n", " ")


def test_the_report_and_the_picture() -> None:
    """Tables with one arm only are left out; the others have the paper's figures beside ours."""
    value = made_up(**{"1_12": [figure(2)], "6_2": [figure(1)], "1_12_heads": [figure(3)]})
    text = report(value)
    assert "### Table 5" in text and "### Table 7" not in text
    assert (
        "| Collaborative | 6-2 | 1.0 M | 0.29 | 1 (0.9 to 1.1) | 1.55 | 1 (0.9 to 1.1) | 1.44 | 1 (0.9 to 1.1) |"
        in text
    )
    for part in text.split("### ")[1:]:
        assert len({line.count("|") for line in part.splitlines() if line.startswith("|")}) == 1
    assert draw(value)[:4] == b"\x89PNG"


def test_the_interval_of_a_ratio_covers_the_truth() -> None:
    """95 times in 100, of 100 trials with four deviations to spare."""
    rng, missed = np.random.default_rng(0), 0
    for trial in range(100):
        rows = rng.gamma(4.0, 1.0, (64, 12)) * np.linspace(1, 2, 12)
        found = interval(rows, lambda drawn: drawn[:, -1].mean() / drawn[:, 0].mean(), trial, 100)
        missed += not found["low"] <= 2 <= found["high"]
    assert missed <= 100 * 0.06 + 4 * (100 * 0.06 * 0.94) ** 0.5


class Serial:
    """A pool that works when it is asked, in this process, where the arms can be made small."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Any, *given: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*given))
        return future


def test_one_command_trains_and_judges_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two tiny arms, one of them delayed: losses near ln 1024, a sound for every clip, and nothing done twice."""
    codec = ROOT / "siren" / "models" / "siren-mini" / "codec"
    clips, tokens, out = tmp_path / "clips", tmp_path / "tokens", tmp_path / "runs"
    labels = ["--labels", "rain,wolf", "--workers", "1"]
    siren_command(["data", "procedural", str(clips), "--clips", "20", "--seconds", "1", "--scenes", "0", *labels])
    siren_command(["data", "tokenize", str(clips), "--out", str(tokens), "--codec", str(codec), "--seconds", "1"])
    small = {"num_experts": 1, "dim": 16, "factorized_layers": 0, "conditioning": "none", "spatial_layers": 1}
    monkeypatch.setitem(ARMS, "1-12-heads", Arm(small))
    monkeypatch.setitem(ARMS, "delay-pattern", Arm(small, delayed=True))
    table = TABLES["1"]
    monkeypatch.setitem(TABLES, "1", type(table)(table.title, table.columns, table.rows[:2], table.note))
    monkeypatch.setattr(ablations, "worker_pool", Serial)
    options = {
        "table": "1", "clips": clips, "tokens": tokens, "codec": codec, "out": out, "seeds": "0", "updates": 10,
        "batch_size": 2, "learning_rate": 1e-3, "val_fraction": 0.5, "align_steps": 1, "align_rate": 1e-3,
        "temperature": 1.0, "guidance_scale": 1.0, "sounds": 8, "workers": 1, "results": tmp_path / "r.json",
        "picture": tmp_path / "r.png",
    }  # fmt: skip
    ablations.run(**options)
    value = json.loads((tmp_path / "r.json").read_text())
    assert list(value["arms"]) == ["1-12-heads", "delay-pattern"] and value["clips"] == 8
    for arm in value["arms"].values():
        [run] = arm["runs"].values()
        assert len(run["loss_by_codebook"]) == 12 and 6.0 < run["figures"]["Loss Mean"]["value"] < 7.5
        assert all(run["figures"][label]["low"] <= run["figures"][label]["value"] for label in run["figures"])
    assert len(list((out / "delay-pattern-seed0" / "sounds").glob("*.wav"))) == 8
    assert "### Table 1" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.wav")}
    before |= {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    ablations.run(**options)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert json.loads((tmp_path / "r.json").read_text())["arms"] == value["arms"]
    with pytest.raises(InputError, match="holds runs with other updates; choose another --out"):
        ablations.run(**options | {"updates": 11})


@pytest.mark.parametrize(
    ("name", "wrong", "message"), [("table", "2", "must be 1, 3"), ("seeds", "a", "whole numbers")]
)
def test_options_that_cannot_be(name: str, wrong: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ablations.run(**{"table": "1", "seeds": "0", name: wrong})
