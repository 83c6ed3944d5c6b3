"""The alignment benchmark: its intervals and tables with made-up rewards, and all of it once on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import TINY, make_data
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import typer
from alignment import run
from alignment_report import Scores, draw_curves, interval, report

import siren
from siren.errors import InputError


def few_high_codes(prompts: list[str], completions: list[Any], codes: np.ndarray, **_: Any) -> list[float]:
    """A reward that the runs' processes can import. A rollout whose first code is 7 has none."""
    return [float(np.nan) if row[0, 0] == 7 else float((row[:2] < 512).mean()) for row in codes]


def test_the_interval_of_one_seed_is_that_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(0.3, 2.0, (1, 400))
    error = 1.96 * values.std(ddof=1) / 20
    assert interval(values) == pytest.approx((values.mean() - error, values.mean() + error))


@pytest.mark.parametrize(("seed", "prompt"), [(0.02, 0.0), (0.02, 0.1), (0.0, 0.2)])
def test_the_interval_covers_the_truth(seed: float, prompt: float) -> None:
    """95 times in 100 or more, with three seeds, whatever varies: of 600 trials 5% may miss, and four deviations."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(600):
        gains = rng.normal(0, seed, (3, 1)) + rng.normal(0, prompt, (1, 34)) + rng.normal(0, 0.02, (3, 34))
        low, high = interval(gains)
        missed += not low <= 0 <= high
    assert missed <= 600 * 0.05 + 4 * (600 * 0.05 * 0.95) ** 0.5


def made_up() -> dict[str, Any]:
    """Two seeds of an arm that gains 0.1 and 0.3, two prompts, and a third one that once lacks a reward."""

    def row(arm: str, seed: int, rewards: list[list[float | None]], scale: float = 1.0) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "guidance_scale": scale, "rewards": rewards}

    return {
        "about": {"options": {
            "model": "m", "steps": 4, "prompts_per_step": 2, "num_generations": 3, "seconds": 1.0,
            "num_iterations": 1, "learning_rate": 1e-3, "temperature": 0.8,
        }, "date": "2026-11-23", "commit": "abc"},
        "reward": "r",
        "before": "before",
        "curves": {
            f"anti-causal {s}": {"rewards": [0.1], "held_out_steps": [0, 4], "held_out_rewards": [0.1, 0.2]}
            for s in (0, 1)
        },
        "scores": [
            row("before", -1, [[0.0, 0.2], [0.4, 0.6], [5.0, 5.0]]),
            row("before", -1, [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], 3.0),
            row("anti-causal", 0, [[0.1, 0.3], [0.5, 0.7], [5.0, None]]),
            row("anti-causal", 1, [[0.3, 0.5], [0.7, 0.9], [9.0, 9.0]]),
            row("causal", 0, [[0.0, 0.2], [0.4, 0.6], [9.0, 9.0]]),
        ],
    }  # fmt: skip


def test_the_tables_say_what_was_measured() -> None:
    """Gains are paired by prompt and noise, and a prompt without a reward somewhere counts nowhere."""
    value = made_up()
    scores = Scores(value)
    assert (scores.prompts, scores.left_out, scores.sounds) == (2, 1, 2)
    assert scores.gain("anti-causal", 1.0, ("before", 1.0)) == pytest.approx(np.array([[0.1] * 2, [0.3] * 2]))
    text = report(value)
    assert "2 held-out prompts (1 without a reward left out), 2 sounds each" in text
    assert "| anti-causal | 1 | 2 | 0.500 | +0.200 | -1.071 to +1.471 | +0.100, +0.300 |" in text
    assert "| causal | 1 | 1 | 0.300 | +0.000 | +0.000 to +0.000 | +0.000 |" in text
    assert "| anti-causal minus causal | +0.200 | -1.071 to +1.471 |" in text
    assert "| guidance 3 alone, without alignment | +0.200 |" in text
    pytest.importorskip("matplotlib")
    assert draw_curves(value)[:4] == b"\x89PNG"


def test_all_of_it(tmp_path: Path) -> None:
    """Runs, judging, tables; a second call does nothing again and says the same; the arms that must differ do."""
    made = make_data(tmp_path)
    torch.manual_seed(0)
    codec = siren.Codec.from_pretrained(made["codec"])
    model = siren.Siren(TINY)
    model.set_decode_embeddings(codec.decode_embeddings())
    model.save_pretrained(tmp_path / "model", codec)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(run)
    options = {
        "tokens": made["data"], "out": tmp_path / "out", "model": tmp_path / "model", "seeds": "3",
        "reward": "test_alignment_benchmark:few_high_codes", "arms": "anti-causal,guided", "steps": 2,
        "prompts-per-step": 2, "num-generations": 3, "num-iterations": 1, "seconds": 0.1, "val-fraction": 0.2,
        "sounds": 2, "eval-every": 1, "eval-prompts": 3, "results": tmp_path / "r.json",
    }  # fmt: skip
    command = [part for name, given in options.items() for part in (f"--{name}", str(given))]
    first = CliRunner().invoke(app, command, catch_exceptions=False)
    value = json.loads((tmp_path / "r.json").read_text())
    assert [(row["arm"], row["guidance_scale"]) for row in value["scores"]] == [
        *(("before", 1.0), ("before", 3.0)),
        *(("anti-causal", 1.0), ("guided", 1.0), ("anti-causal", 3.0), ("guided", 3.0)),
    ]
    assert all(np.shape(row["rewards"]) == (3, 2) for row in value["scores"])
    assert value["curves"]["guided 3"]["held_out_steps"] == [0, 1, 2]
    runs = [json.loads((tmp_path / "out" / f"{arm}-3" / "run.json").read_text()) for arm in ("anti-causal", "guided")]
    assert [run["settings"]["guidance_scale"] for run in runs] == [1.0, 3.0]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert again.stdout == first.stdout
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    with pytest.raises(InputError, match="other steps; choose another --out"):
        CliRunner().invoke(app, [*command, "--steps", "3"], catch_exceptions=False)


@pytest.mark.parametrize(("name", "words"), [("arms", "anti-causal, causal"), ("seeds", "whole numbers")])
def test_what_is_refused(tmp_path: Path, name: str, words: str) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(run)
    with pytest.raises(InputError, match=words):
        CliRunner().invoke(app, [f"--{name}", "x", "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert not (tmp_path / "out").exists()
