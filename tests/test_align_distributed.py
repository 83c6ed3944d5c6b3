"""Two processes align as one does: groups stay whole, and what is logged is of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from alignment_runs import assert_same, metrics

from siren.train.state import latest_state, read_state

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def errors(runs: Path) -> dict[str, list[str]]:
    """What each process of each run raised; see distributed_align_runs.py."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "distributed_align_runs.py", runs]
    made = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert made.returncode == 0, made.stderr
    values: dict[str, list[str]] = json.loads(made.stdout.splitlines()[-1])
    return values


@pytest.mark.parametrize("loss", ["", ", dpo"])
def test_two_processes_equal_one(runs: Path, errors: dict[str, list[str]], loss: str) -> None:
    """Bit for bit with a group on each and `batch_size` of a group (of a pair, dpo): gradients are sums of two numbers.

    Weights, optimiser and log, although the reward fails now and then for the group of one process alone, or of both,
    and one of them has no prompt to evaluate on.
    """
    assert errors[f"one{loss}"] == [""] and errors[f"two{loss}"] == ["", ""]
    assert_same(runs / f"one{loss}", runs / f"two{loss}")
    lines = [line for line in metrics(runs / f"two{loss}") if "missing_rewards" in line]
    assert {line["missing_rewards"] for line in lines} == {0, 4, 8}
    assert all(line["failures"].endswith(f": {line['missing_rewards']}}}") for line in lines if "failures" in line)
    assert {line["rollout_frames"] for line in lines} == {2 * 4 * 10}
    assert sum("eval_reward" in line for line in metrics(runs / f"two{loss}")) == 3


def test_many_groups_on_two_processes_differ_by_rounding(runs: Path, errors: dict[str, list[str]]) -> None:
    """Gradients are added in another order. Too little to change a code, so all rewards are the same bit for bit."""
    assert errors["one, many"] == [""] and errors["two, many"] == ["", ""]
    one, two = (read_state(latest_state(runs / name)) for name in ("one, many", "two, many"))
    for name, tensor in one.model.items():  # measured: 6e-7 apart, of weights that moved by up to 1e-2
        torch.testing.assert_close(two.model[name], tensor, rtol=0, atol=5e-6, msg=name)
    names = ("step", "reward", "reward_std", "reward_moody_codes", "missing_rewards", "failures", "eval_reward")
    logs = [
        [[line.get(name) for name in names] for line in metrics(run)]
        for run in (runs / "one, many", runs / "two, many")
    ]
    assert logs[0] == logs[1]


def test_a_signal_to_one_stops_both_and_one_may_go_on(runs: Path, errors: dict[str, list[str]]) -> None:
    """Both raise after the same step; a single process finishes the run as if nothing had been."""
    assert len(errors["stopped"]) == 2 and all("stopped at step 4 of 6" in error for error in errors["stopped"])
    assert errors["resumed"] == [""]
    assert_same(runs / "one", runs / "stopped")


@pytest.mark.parametrize("run", ["full", "log"])
def test_a_full_disk_of_the_first_ends_both(errors: dict[str, list[str]], run: str) -> None:
    """Whether a state or a line of the log does not fit."""
    first, second = errors[run]
    assert "No space left on device" in first and second == "process 0 failed; its message says why"


def test_a_process_that_ends_does_not_leave_the_other_waiting(errors: dict[str, list[str]]) -> None:
    first, second = errors["lost"]
    assert first.startswith("lost the other processes") and second == "out of luck"


def test_prompts_that_cannot_be_dealt_are_refused(runs: Path, errors: dict[str, list[str]]) -> None:
    assert errors["uneven"] == ["prompts_per_step 3 must be a multiple of 2 processes"] * 2
    assert not (runs / "uneven").exists()
