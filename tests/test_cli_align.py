"""`siren align` on a tiny model: what it writes, that its options are the settings, and its errors."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alignment_runs import make_inputs, metrics

import siren
from siren.align import run
from siren.align.settings import AlignSettings
from siren.cli import main
from siren.cli_align import align

ROOT = Path(__file__).resolve().parent.parent
REWARD = """
def low(prompts, completions, codes, **_):
    return (codes[:, :2] < 512).mean((1, 2)).tolist()
"""
SMALL = ["--seconds", "0.2", "--prompts-per-step", "2", "--num-generations", "3", "--batch-size", "4"]
SMALL += ["--max-steps", "2", "--eval-prompts", "2", "--val-fraction", "0.2", "--device", "cpu", "--threads", "1"]
SMALL += ["--no-tensorboard"]


@pytest.fixture
def work(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `model`, `tokens` and rewards.py."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "tokens"):
        (tmp_path / name).symlink_to(inputs / name)
    (tmp_path / "rewards.py").write_text(REWARD)
    return tmp_path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def command(*more: str) -> list[str]:
    return ["align", "tokens", "--out", "run", "--model", "model", "--reward", "./rewards.py:low", *SMALL, *more]


@pytest.mark.parametrize("reward", ["./rewards.py:low", "rewards_of_the_command:low"])
def test_from_a_checkpoint_to_an_aligned_one(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], reward: str
) -> None:
    """A reward of a file or a module; the run's log, a checkpoint whose first expert has learned. Again: nothing."""
    (work / "rewards_of_the_command.py").write_text(REWARD)
    monkeypatch.syspath_prepend(work)
    words = [*command()[:6], "--reward", reward, *SMALL, "--learning-rate", "1e-3", "--save-every", "1", "--keep", "1"]
    main(words)
    assert capfd.readouterr().out.strip() == str(work / "run" / "checkpoint")
    lines = metrics(work / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert {"reward", "reward_low", "objective", "kept"} <= lines[1].keys() and "eval_reward" in lines[3]
    before, after = (siren.Siren.from_pretrained(work / name) for name in ("model", "run/checkpoint"))
    same = [
        all(bool((value == other).all()) for value, other in zip(a.parameters(), b.parameters(), strict=True))
        for a, b in zip(before.experts, after.experts, strict=True)
    ]
    assert same == [False, True, True]
    left = {path: path.read_bytes() for path in (work / "run").rglob("*") if path.is_file()}
    main(words)
    assert {path: path.read_bytes() for path in (work / "run").rglob("*") if path.is_file()} == left


def test_every_option_is_a_setting_with_the_same_default() -> None:
    """Of AlignSettings only `betas` and `progress` have no option."""
    fields = {field.name: field.default for field in dataclasses.fields(AlignSettings)}
    options = {name: parameter.default for name, parameter in inspect.signature(align).parameters.items()}
    assert fields.keys() - options.keys() == {"betas", "progress"}
    assert options.keys() <= fields.keys()
    written = {"experts", "reward_weights", "reward_funcs", "model"}  # as text, or what the command line alone fills in
    for name in options.keys() - written:
        default = inspect.Parameter.empty if fields[name] is dataclasses.MISSING else fields[name]
        assert options[name] == default and type(options[name]) is type(default), name


def test_options_reach_the_settings(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without options the settings have their defaults; those that are text on the command line are read."""
    seen: list[Any] = []
    monkeypatch.setattr(run, "align", lambda settings: seen.append(settings) or Path("checkpoint"))
    main(["align", "tokens", "--out", "run"])
    assert seen[0] == AlignSettings(
        model="siren-mini", data=Path("tokens"), out=Path("run"), reward_funcs=["aligner"], experts=[0]
    )
    rewards = ["--reward", "a:b", "--reward", "c:d", "--reward-weights", "1,-0.5"]
    main(["align", "tokens", "--out", "run", *rewards, "--experts", "0,1", "--no-resume", "--reserve"])
    assert (seen[1].reward_funcs, seen[1].reward_weights) == (["a:b", "c:d"], [1.0, -0.5])
    assert (seen[1].experts, seen[1].resume, seen[1].reserve) == ([0, 1], False, True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "none"], "none"),
        (["--reward", "nonsense"], "there is no reward 'nonsense'"),
        (["--reward", "./none.py:low"], "there is no file ./none.py"),
        (["--reward", "./rewards.py:high"], "has no 'high'"),
        (["--experts", "3"], "experts must be indices from 0 to 2"),
        (["--experts", "first"], "--experts must be numbers"),
        (["--reward-weights", "1;2"], "--reward-weights must be numbers"),
        (["--seconds", "9"], "max_seq_len is 64"),
        (["--loss", "ppo"], "loss must be one of grpo, dpo"),
        (["--num-generations", "1"], "num_generations must be"),
        (["--backend", "abacus"], "backend must be one of"),
        (["--data", "x"], "--data"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(
    work: Path, capfd: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert message in fails(capfd, *command(*more))
    assert not (work / "run").exists()


def test_data_that_cannot_be_prompts(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No token set; no captions to align on."""
    assert "none" in fails(capfd, *["none" if word == "tokens" else word for word in command()])
    assert "tokens" in fails(capfd, *[word for word in command() if word != "tokens"]).lower()
    assert not (work / "run").exists()


def fails(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command ends with; its exit code is 2."""
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    out, err = capfd.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


SIGNALLED = """
import signal, sys
from siren.align.loop import Alignment
from siren.cli import main
learn = Alignment.learn
def signalling(self, *given):
    signal.raise_signal(signal.SIGTERM)
    return learn(self, *given)
Alignment.learn = signalling
main(sys.argv[1:])
"""


def test_sigterm_saves_and_ends_with_143(work: Path) -> None:
    """As `siren train`: the step is finished, a state saved, one line says so; the same command goes on."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *command()], capture_output=True, text=True, env=environment, timeout=300
    )
    assert made.returncode == 143, made.stderr
    assert made.stderr.splitlines()[-1] == "error: stopped at step 1 of 2; the same command goes on there"
    assert "Traceback" not in made.stderr
    assert (work / "run" / "state-00000001" / "state.json").is_file()
    main(command())
    assert (work / "run" / "checkpoint" / "manifest.json").is_file()
