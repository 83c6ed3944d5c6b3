"""Training a critic: its targets, a task it learns, what it is measured by, and runs that end early or badly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from training_runs import TINY, make_codec, make_data

import siren
from siren import critic_training
from siren.cli import main
from siren.critic import Critic, CriticConfig
from siren.critic_training import Episodes, Foresight, fit, foresee, lambda_returns, start, train_critic
from siren.errors import CheckpointError, InputError, SirenError


@given(st.integers(1, 4), st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**32))
def test_lambda_returns(batch: int, frames: int, gae_lambda: float, seed: int) -> None:
    """Values plus generalised advantages (the sum over all later errors, written out), in double precision."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, frames, generator=generator, dtype=torch.float64)
    rewards = torch.randn(batch, generator=generator, dtype=torch.float64)
    found = lambda_returns(values, rewards, gae_lambda)
    for i in range(batch):
        later = [*values[i, 1:].tolist(), rewards[i].item()]
        errors = [after - now for now, after in zip(values[i].tolist(), later, strict=True)]
        for t in range(frames):
            advantage = sum(gae_lambda ** (s - t) * errors[s] for s in range(t, frames))
            assert found[i, t].item() == pytest.approx(values[i, t].item() + advantage, abs=1e-12)


def test_ends_of_lambda() -> None:
    """1: the reward everywhere; 0: the next value."""
    values, rewards = torch.randn(3, 5), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(lambda_returns(values, rewards, 1.0), rewards[:, None].expand(3, 5))
    assert torch.equal(lambda_returns(values, rewards, 0.0), torch.cat((values[:, 1:], rewards[:, None]), dim=1))


def low_codes(prompts: list[str], completions: list[np.ndarray], codes: np.ndarray, **_: Any) -> list[float]:
    """The share of codes of the first codebook that are below 512: known frame by frame."""
    return (codes[:, 0] < 512).mean(1).tolist()


def half_failing(prompts: list[str], completions: list[np.ndarray], codes: np.ndarray, **_: Any) -> list[float | None]:
    return [None if code % 2 else float(code) for code in codes[:, 0, 0].tolist()]


def failing(*_: Any, **__: Any) -> list[float]:
    raise ValueError("no ears")


def make_episodes(groups: int, size: int, frames: int, seed: int = 0) -> Episodes:
    """Sounds of one repeated frame each, of two codes; which of them is the reward, as the prompt says."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 2, (groups * size,), generator=generator)
    frames_of = torch.randint(0, 1024, (2, 12), generator=torch.Generator().manual_seed(9))
    codes = frames_of[kinds][..., None].expand(-1, -1, frames).clone()
    group = torch.arange(groups).repeat_interleave(size)
    wanted = torch.randint(0, 2, (groups,), generator=generator)
    prompt = torch.eye(2)[wanted][:, None].repeat(1, 3, 2)
    rewards = (kinds == wanted[group]).float() + 10
    return Episodes(codes, rewards, group, prompt, torch.ones(groups, 3, dtype=torch.bool), 0)


def test_it_learns_what_a_prompt_wants() -> None:
    """The same sound is right for one prompt and wrong for the other; new groups of sounds are told apart early."""
    codec = make_codec()
    episodes = make_episodes(24, 6, 8)
    model = start(CriticConfig(4, dim=16), codec, episodes, 0)
    losses = fit(model, episodes, 150, 48, 1e-2, 0.9, 0, progress=False)
    assert np.mean(losses[-10:]) < 0.1 < 0.4 < np.mean(losses[:10])  # 0.014 and 0.48
    critic = Critic(model, codec)
    found = foresee(critic, make_episodes(10, 8, 8, seed=1))
    assert found.prompts == 10 and found.sounds == 80
    assert min(found.within) > 0.9 and min(found.overall) > 0.9


class Given:
    """A critic whose values are known."""

    def __init__(self, values: torch.Tensor) -> None:
        self.given = values

    def values(self, codes: torch.Tensor, prompt: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
        return self.given


def test_foresight_by_hand() -> None:
    """Three prompts, the second without sounds. Within prompts -1 at a quarter, 0 half-way, undefined, 1 at the end."""
    rewards = torch.tensor([0.0, 2.0, 10.0, 12.0])
    group = torch.tensor([0, 0, 2, 2])
    episodes = Episodes(torch.zeros(4, 12, 5), rewards, group, torch.zeros(3, 1, 2), torch.ones(3, 1), 0)
    quarter, half, flat = rewards * -1, torch.tensor([1.0, 1, 2, 2]), torch.ones(4)
    critic: Any = Given(torch.stack((quarter, half, flat, flat, torch.tensor([0.0, 1, -1, 0])), dim=1))
    found = foresee(critic, episodes)
    assert found.prompts == 2 and found.sounds == 4
    assert found.within[0] == pytest.approx(-1) and math.isnan(found.within[1]) and found.within[3] == pytest.approx(1)
    assert found.overall[0] == pytest.approx(-1) and found.overall[1] == pytest.approx(10 / math.sqrt(104))
    assert math.isnan(found.overall[2])
    assert "within prompts -1.000 nan" in str(found) and "4 sounds of 2 held-out prompts" in str(found)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    made = make_data(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = siren.Siren(TINY)
    codec = siren.Codec.from_pretrained(made["codec"])
    model.set_decode_embeddings(codec.decode_embeddings())
    model.save_pretrained(folder / "model", codec)
    return {"model": folder / "model", "data": made["data"]}


def train(inputs: dict[str, Any], out: Path, /, **changes: Any) -> tuple[Critic, Foresight | None, str]:
    values: dict[str, Any] = {"reward": low_codes, "rollouts": 22, "generations": 4, "val_prompts": 3, "seconds": 0.12}
    values |= {"val_fraction": 0.3, "steps": 5, "batch_size": 8, "dim": 9, "seed": 4, "top_k": 50, "progress": False}
    return train_critic(**inputs | {"out": out} | values | changes)


def weights(folder: Path) -> dict[str, bytes]:
    """Not the file's bytes: safetensors writes the header's two fields in any order."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_a_run(inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 training prompts with 4 rollouts each and 3 others; what is saved is what is returned, bit for bit again."""
    seen: list[Episodes] = []
    whole = critic_training.roll_out_all
    monkeypatch.setattr(critic_training, "roll_out_all", lambda *args: seen.append(whole(*args)) or seen[-1])
    critic, foresight, lost = train(inputs, tmp_path / "a")
    learned, held_out = seen
    assert len(learned) == 24 and len(learned.prompt) == 6 and len(held_out.prompt) == 3 and not lost
    assert learned.codes.shape == (24, 12, 6)
    assert len(learned.codes.flatten(1).unique(dim=0)) == 24
    torch.testing.assert_close(learned.rewards, (learned.codes[:, 0] < 512).float().mean(1))
    assert foresight is not None and foresight.prompts == 3 and foresight.sounds == 12
    loaded = Critic.from_pretrained(tmp_path / "a", siren.Codec.from_pretrained(inputs["model"] / "codec"))
    group = held_out.group
    given = (held_out.codes, held_out.prompt[group], held_out.prompt_mask[group])
    assert torch.equal(loaded.score(*given), critic.score(*given))
    torch.manual_seed(99)
    train(inputs, tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    train(inputs, tmp_path / "c", seed=5)
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_many_rollouts_go_in_parts(inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give the same critic."""
    train(inputs, tmp_path / "whole")
    monkeypatch.setattr(critic_training, "_AT_ONCE", 9)
    train(inputs, tmp_path / "parts")
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def test_rollouts_without_a_reward_are_left_out(inputs: dict[str, Any], tmp_path: Path) -> None:
    _, foresight, lost = train(inputs, tmp_path / "critic", reward=half_failing)
    assert foresight is not None
    assert "rollouts without a reward were left out (half_failing: None, " in lost
    assert 0 < int(lost.split()[0]) < 36 and int(lost.split()[0]) >= 12 - foresight.sounds


def test_no_reward_at_all(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SirenError, match=r"0 of 24 rollouts have a reward: failing: raised ValueError.*no ears"):
        train(inputs, tmp_path / "critic", reward=failing)
    assert not list(tmp_path.iterdir())


def test_without_held_out_prompts(inputs: dict[str, Any], tmp_path: Path) -> None:
    _, foresight, _ = train(inputs, tmp_path / "critic", val_prompts=0)
    assert foresight is None


def test_an_interruption_leaves_nothing(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the rollouts and in the updates; what was there before stays away."""

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    for target in ("roll_out", "scheduled"):
        with monkeypatch.context() as patch:
            patch.setattr(critic_training, target, interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(inputs, tmp_path / "critic")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"rollouts": 0}, InputError, "rollouts"),
        ({"generations": 2.0}, InputError, "generations"),
        ({"steps": 0}, InputError, "steps"),
        ({"batch_size": True}, InputError, "batch_size"),
        ({"val_prompts": -1}, InputError, "val_prompts"),
        ({"seed": 1 << 32}, InputError, "seed"),
        ({"learning_rate": float("nan")}, InputError, "learning_rate"),
        ({"gae_lambda": 1.1}, InputError, "gae_lambda"),
        ({"dim": 2000}, InputError, "dim"),
        ({"seconds": 60.0}, InputError, "seconds"),
        ({"temperature": -1.0}, InputError, "temperature"),
        ({"seconds": 0.001}, InputError, "seconds"),
        ({"reward": "applause"}, InputError, "no reward 'applause'"),
        ({"model": "nowhere"}, SirenError, "nowhere"),
    ],
)
def test_arguments_that_are_refused(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, error: type, words: str
) -> None:
    """Before anything is sampled or written."""
    monkeypatch.delattr(critic_training, "roll_out")
    with pytest.raises(error, match=words):
        train(inputs, tmp_path / "critic", **changes)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(inputs: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="exists"):
        train(inputs, tmp_path)
    with pytest.raises(InputError, match="not a folder"):  # before the rollouts, not after them
        train(inputs, tmp_path / "thesis.txt" / "critic")


def test_command(inputs: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rewards.py").write_text(
        "def low(prompts, completions, codes, **_):\n    return (codes[:, 0] < 512).mean(1)\n"
    )
    words = ["train-critic", str(inputs["data"]), "--out", str(tmp_path / "critic"), "--model", str(inputs["model"])]
    words += [
        "--reward",
        f"{tmp_path / 'rewards.py'}:low",
        "--rollouts",
        "8",
        "--generations",
        "4",
        "--val-prompts",
        "2",
    ]
    words += ["--val-fraction", "0.3", "--seconds", "0.1", "--steps", "2", "--dim", "5"]
    main(words)
    printed = capfd.readouterr().out.splitlines()
    assert "M parameters" in printed[0] and "8 sounds of 2 held-out prompts" in printed[1] and len(printed) == 2
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and "exists" in capfd.readouterr().err
