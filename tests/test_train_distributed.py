"""Two processes train the expert that one process with accumulation trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import assert_same_runs, final_state, metrics

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def errors(runs: Path) -> dict[str, list[str]]:
    """What each process of each run raised; see distributed_runs.py."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "distributed_runs.py", runs]
    made = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert made.returncode == 0, made.stderr
    values: dict[str, list[str]] = json.loads(made.stdout.splitlines()[-1])
    return values


def test_two_processes_equal_one_with_accumulation(runs: Path, errors: dict[str, list[str]]) -> None:
    """Weights, optimiser and logged losses, bit for bit: the sums of two processes' gradients have one order."""
    assert errors["one"] == [""] and errors["two"] == ["", ""]
    assert_same_runs(runs / "one", runs / "two")
    assert len(metrics(runs / "two")) == 6 + 2


def test_a_signal_to_one_stops_both_and_one_may_go_on(runs: Path, errors: dict[str, list[str]]) -> None:
    """Both raise after the same update; a single process with accumulation finishes the run as if nothing had been."""
    assert len(errors["stopped"]) == 2 and all("stopped at update 4 of 6" in error for error in errors["stopped"])
    assert errors["resumed"] == [""]
    assert_same_runs(runs / "one", runs / "stopped")


def test_sharded_processes_equal_one(runs: Path, errors: dict[str, list[str]]) -> None:
    """FSDP2, stopped and resumed: the same to float32 rounding, for it averages, and adds norms up shard by shard."""
    assert all("stopped at update 5 of 6" in error for error in errors["sharded, stopped"])
    assert errors["sharded"] == ["", ""]
    one, sharded = final_state(runs / "one"), final_state(runs / "sharded")
    for mine, other in ((one.model, sharded.model), (one.optimizer, sharded.optimizer)):
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    losses = [[line["loss"] for line in metrics(runs / name) if "loss" in line] for name in ("one", "sharded")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 6


def test_a_full_disk_of_the_first_ends_both(errors: dict[str, list[str]]) -> None:
    """Nobody waits for a process that could not save."""
    first, second = errors["full"]
    assert "No space left on device" in first and "process 0 failed" in second
