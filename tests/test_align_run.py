"""Alignment runs: what is rewarded becomes more frequent, and a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alignment_runs import assert_same, low_codes, make_inputs, metrics, settings
from training_runs import TINY

import siren
from siren.align import learner
from siren.align.loop import Alignment
from siren.align.run import align
from siren.errors import CheckpointError, InputError, SirenError
from siren.sampler import Sampler
from siren.train import TrainingError, TrainingStoppedError
from siren.train.state import latest_state


def last_codes(prompts: list[str], completions: list[np.ndarray], codes: np.ndarray, **_: Any) -> list[float]:
    return (codes[:, -TINY.codes_per_expert :] < 512).mean((1, 2)).tolist()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM comes in the middle of a step (from 0)."""
    whole = Alignment.learn

    def signalling(self: Alignment, *given: Any) -> dict[str, float]:
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)
        return whole(self, *given)

    monkeypatch.setattr(Alignment, "learn", signalling)


@pytest.mark.parametrize("changes", [{}, {"loss": "dpo", "dpo_beta": 1.0}, {"guidance_scale": 2.0}, {"beta": 0.01}])
def test_what_is_rewarded_becomes_more_frequent(
    tmp_path: Path, inputs: dict[str, Any], changes: dict[str, Any]
) -> None:
    """By either loss, with guidance, and with a divergence that holds back; only the expert that learns changes."""
    out = align(
        settings(
            inputs,
            tmp_path / "run",
            max_steps=16,
            num_generations=8,
            batch_size=24,
            learning_rate=8e-3,
            eval_every=0,
            **changes,
        )
    )
    lines = metrics(tmp_path / "run")
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.04  # four deviations of the mean of 2,400 codes
    before, after = (siren.Siren.from_pretrained(folder) for folder in (inputs["model"], out))
    for k, (old, new) in enumerate(zip(before.experts, after.experts, strict=True)):
        changed = [n for n, v in new.state_dict().items() if not torch.equal(v, old.state_dict()[n])]
        assert bool(changed) == (k == 0)
        assert not [name for name in changed if ".codebook." in name or ".dac_out." in name]
    evaluations = [line["eval_reward"] for line in lines if "eval_reward" in line]
    assert len(evaluations) == 2
    assert evaluations[1] > evaluations[0]


def test_before_the_first_update_every_ratio_is_one(tmp_path: Path, inputs: dict[str, Any]) -> None:
    """With one update a step the logged distance of the ratios from 1 is rounding: nothing but what drew the codes."""
    align(settings(inputs, tmp_path / "run", num_iterations=1, guidance_scale=1.7, temperature=0.8))
    for line in metrics(tmp_path / "run"):
        if "ratio_off_one" in line:
            assert line["ratio_off_one"] < 1e-5
            assert line["clipped"] == 0


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"rollout_weights": "bf16"}])
def test_coarser_arithmetic_begins_at_a_ratio_of_one_too(
    tmp_path: Path, inputs: dict[str, Any], changes: dict[str, Any]
) -> None:
    """The old log-probabilities are then computed by the forward that learns, not taken from the sampler."""
    align(settings(inputs, tmp_path / "run", num_iterations=1, max_steps=2, **changes))
    assert all(line["ratio_off_one"] < 1e-6 for line in metrics(tmp_path / "run") if "ratio_off_one" in line)


@pytest.mark.parametrize("experts", [(2,), (0, 1)])
def test_other_experts_can_learn(tmp_path: Path, inputs: dict[str, Any], experts: tuple[int, ...]) -> None:
    """The causal direction, and two experts at once."""
    out = align(settings(inputs, tmp_path / "run", experts=experts, reward_funcs=[last_codes], max_steps=2))
    before, after = (siren.Siren.from_pretrained(folder) for folder in (inputs["model"], out))
    for k, (old, new) in enumerate(zip(before.experts, after.experts, strict=True)):
        same = all(torch.equal(v, old.state_dict()[n]) for n, v in new.state_dict().items())
        assert same == (k not in experts)


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """SIGTERM finishes the step, saves and raises; the same call then ends like a run that nobody stopped."""
    align(settings(inputs, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(TrainingStoppedError, match=f"stopped at step {step + 1} of 6"):
            align(settings(inputs, tmp_path / "stopped"))
    for _ in range(2):  # the second time there is nothing left to do
        align(settings(inputs, tmp_path / "stopped"))
        assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_an_evaluation_survives_a_signal_and_a_kill(
    tmp_path: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the last step saves; the next start evaluates, is killed there, and the one after it still does."""

    class Killed(BaseException):
        pass

    def die(self: Alignment) -> None:
        raise Killed

    align(settings(inputs, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(TrainingStoppedError):
            align(settings(inputs, tmp_path / "run"))
        patch.setattr(Alignment, "evaluate", die)
        with pytest.raises(Killed):
            align(settings(inputs, tmp_path / "run"))
    align(settings(inputs, tmp_path / "run"))
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("where", "step", "left"),
    [("learn", 1, None), ("learn", 3, "state-00000002"), ("evaluate", 6, "state-00000004")],
)
def test_what_a_kill_leaves_is_gone_on_from(
    tmp_path: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: str, step: int, left: str | None
) -> None:
    """A process that dies repeats the steps since the last save and their evaluations, or all, with the same result."""
    align(settings(inputs, tmp_path / "whole"))

    class Killed(BaseException):
        pass

    def die(self: Alignment, *given: Any) -> Any:
        if self.step == step:
            raise Killed
        return whole(self, *given)

    whole = getattr(Alignment, where)
    with monkeypatch.context() as patch:
        patch.setattr(Alignment, where, die)
        with pytest.raises(Killed):
            align(settings(inputs, tmp_path / "killed"))
    found = latest_state(tmp_path / "killed")
    assert (found and found.name) == left
    align(settings(inputs, tmp_path / "killed"))
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_rewards_that_fail(tmp_path: Path, inputs: dict[str, Any]) -> None:
    """A sound without a reward teaches nothing; a reward that fails now and then is counted; always: an error."""
    calls = []

    def moody(prompts: list[str], completions: list[np.ndarray], **given: Any) -> list[float | None]:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise ValueError("no mood")
        values: list[float | None] = list(low_codes(prompts, completions, **given))
        values[0], values[5] = None, float("nan")
        return values

    align(settings(inputs, tmp_path / "moody", reward_funcs=[moody], eval_every=0, eval_prompts=0))
    lines = [line for line in metrics(tmp_path / "moody") if "missing_rewards" in line]
    assert [line["missing_rewards"] for line in lines] == [2, 2, 12, 2, 2, 2]
    assert "ValueError" in lines[2]["failures"]
    assert lines[2]["kept"] == 0
    assert not [name for name in lines[2] if name.startswith("reward")]  # neither 0 nor NaN stands for what is missing

    def broken(*_: Any, **__: Any) -> list[float]:
        raise RuntimeError("gone")

    with pytest.raises(
        TrainingError, match=r"no rollout of the last 2 steps has a reward: broken: raised RuntimeError"
    ):
        align(settings(inputs, tmp_path / "broken", reward_funcs=[broken], max_failures=2, eval_prompts=0))


def test_a_hanging_reward_is_given_up(tmp_path: Path, inputs: dict[str, Any]) -> None:
    """Each batch costs the timeout at most."""

    def hanging(prompts: list[str], *_: Any, **__: Any) -> list[float]:
        time.sleep(30)
        return [0.0] * len(prompts)

    start = time.monotonic()
    with pytest.raises(TrainingError, match=r"timed out|still running"):
        align(
            settings(
                inputs, tmp_path / "run", reward_funcs=[hanging], reward_timeout=0.2, max_failures=2, eval_prompts=0
            )
        )
    assert time.monotonic() - start < 20


def test_rollouts_that_do_not_fit_are_made_in_halves(
    tmp_path: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same result: noise does not depend on the batch. A single one that does not fit is an error."""
    align(settings(inputs, tmp_path / "whole", eval_prompts=0))
    sample = Sampler.sample

    def limited(most: int) -> Callable[..., Any]:
        def wrapped(self: Sampler, prompt: torch.Tensor, *given: Any, **named: Any) -> Any:
            if len(prompt) > most:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
            return sample(self, prompt, *given, **named)

        return wrapped

    monkeypatch.setattr(Sampler, "sample", limited(5))
    align(settings(inputs, tmp_path / "halves", eval_prompts=0))
    assert_same(tmp_path / "whole", tmp_path / "halves")
    monkeypatch.setattr(Sampler, "sample", limited(0))
    with pytest.raises(SirenError, match="a single rollout does not fit into memory"):
        align(settings(inputs, tmp_path / "none", eval_prompts=0))


def test_without_spread_nothing_changes(tmp_path: Path, inputs: dict[str, Any]) -> None:
    """All rollouts are equally good: no update, and the optimiser does not move either."""
    out = align(settings(inputs, tmp_path / "run", reward_funcs=[lambda prompts, *_, **__: [0.5] * len(prompts)]))
    before, after = (siren.Siren.from_pretrained(folder) for folder in (inputs["model"], out))
    for name, value in after.state_dict().items():
        assert torch.equal(value, before.state_dict()[name])


def test_a_gradient_that_is_not_finite(tmp_path: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops with the step's number, and the last state is there."""
    monkeypatch.setattr(learner, "clipped_objective", lambda logprobs, *_: logprobs.mean((1, 2)) * float("nan"))
    with pytest.raises(TrainingError, match="the gradient of step 1 is not finite"):
        align(settings(inputs, tmp_path / "run"))


def test_a_full_disk_loses_nothing(tmp_path: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    align(settings(inputs, tmp_path / "whole"))

    def full(*_: Any) -> None:
        if (tmp_path / "run" / "state-00000002").exists():
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            align(settings(inputs, tmp_path / "run"))
    align(settings(inputs, tmp_path / "run"))
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": (3,)}, "experts must be indices from 0 to 2"),
        ({"experts": ()}, "experts must be"),
        ({"num_generations": 1}, "num_generations must be a whole number from 2"),
        ({"epsilon": 2.0}, "epsilon must be a number from 0 to 1"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"seconds": 9.0}, "450 frames; the model's max_seq_len is 64"),
        ({"reward_weights": (1.0, 2.0)}, "reward_weights must be 1 finite numbers"),
        ({"reward_funcs": ["nonsense"]}, "no reward 'nonsense'"),
        ({"loss": "ppo"}, "loss must be one of grpo, dpo"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    tmp_path: Path, inputs: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        align(settings(inputs, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 0}, "experts must be a list"),
        ({"reward_weights": 5.0}, "reward_weights must be a list"),
        ({"reward_funcs": low_codes}, "reward_funcs must be a list"),
        ({"reward_funcs": [3]}, "names or functions"),
        ({"betas": 0.9}, "betas must be a list"),
        ({"betas": (0.9, 1.5)}, "betas must be two numbers"),
    ],
)
def test_settings_of_another_type(inputs: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(inputs, Path("run"), **changes)


def test_a_reward_is_not_copied(tmp_path: Path, inputs: dict[str, Any]) -> None:
    """One that holds what cannot be copied, such as a lock, is used as it is; so is a folder that a kill has left."""

    class Locked:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __call__(self, *given: Any, **more: Any) -> list[float]:
            with self.lock:
                return low_codes(*given, **more)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".siren-0123").touch()
    align(settings(inputs, tmp_path / "run", reward_funcs=[Locked()], max_steps=1, eval_prompts=0))


def test_a_run_is_not_mixed_with_another(tmp_path: Path, inputs: dict[str, Any]) -> None:
    """Other settings, another folder's files, and resume=False are refused."""
    align(settings(inputs, tmp_path / "run", max_steps=2))
    with pytest.raises(InputError, match="num_generations was 4 and is 5"):
        align(settings(inputs, tmp_path / "run", max_steps=2, num_generations=5))
    with pytest.raises(InputError, match="holds a run already"):
        align(settings(inputs, tmp_path / "run", max_steps=2, resume=False))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        align(settings(inputs, tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
