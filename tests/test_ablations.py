"""The ablations: the arms are what their names say, and the report says no more than the intervals do."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from ablation_arms import ARMS, config_of
from ablation_report import draw, interval, report, verdict
from ablation_tables import COLUMNS, ITG, TABLES, Row

from siren.expert import Expert

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
    """95 times in 100, of 300 trials with four deviations to spare."""
    rng, missed = np.random.default_rng(0), 0
    for trial in range(300):
        rows = rng.gamma(4.0, 1.0, (64, 12)) * np.linspace(1, 2, 12)
        found = interval(rows, lambda drawn: drawn[:, -1].mean() / drawn[:, 0].mean(), trial, 200)
        missed += not found["low"] <= 2 <= found["high"]
    assert missed <= 300 * 0.06 + 4 * (300 * 0.06 * 0.94) ** 0.5
