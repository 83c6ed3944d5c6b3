"""The critic: what its values may depend on, its folder, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_folders import edit_config, edit_weights, leave_only_a_pickle
from training_runs import make_codec

from siren.critic import Critic, CriticConfig, CriticModel
from siren.errors import CheckpointError, InputError

DIM = 7  # of a prompt's token states


def make_critic(seed: int = 0, prompt_dim: int = DIM, codec_seed: int = 0) -> Critic:
    """Random weights, means and spreads too."""
    codec = make_codec(codec_seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CriticModel(CriticConfig(prompt_dim, dim=11, layers=2), codec)
        for tensor in (*model.parameters(), model.frame_mean, model.reward_mean):
            tensor.data.copy_(torch.randn(tensor.shape) * 0.4)
        for tensor in (model.frame_spread, model.reward_spread):
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return Critic(model, codec)


def arguments(batch: int, frames: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, prompts of 1 to 5 tokens and their mask."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1024, (batch, 12, frames), generator=generator)
    prompt = torch.randn(batch, 5, DIM, generator=generator)
    lengths = torch.arange(batch) % 5 + 1
    return codes, prompt, torch.arange(5) < lengths[:, None]


@pytest.fixture(scope="module")
def critic() -> Critic:
    return make_critic()


def test_later_codes_change_no_earlier_value(critic: Critic) -> None:
    """Whichever frame and codebook changes: values before it keep their bits, and its own value changes."""
    codes, prompt, mask = arguments(1, 9)
    before = critic.values(codes, prompt, mask)
    assert before.shape == (1, 9) and before.dtype == torch.float32
    for frame in range(9):
        for codebook in (0, 5, 11):
            other = codes.clone()
            other[0, codebook, frame] = (other[0, codebook, frame] + 500) % 1024
            after = critic.values(other, prompt, mask)
            assert torch.equal(after[:, :frame], before[:, :frame])
            assert (after[:, frame:] != before[:, frame:]).all()


def test_a_prefix_has_the_score_of_its_last_value(critic: Critic) -> None:
    codes, prompt, mask = arguments(3, 9)
    values = critic.values(codes, prompt, mask)
    for frames in (1, 4, 9):
        torch.testing.assert_close(critic.score(codes[:, :, :frames], prompt, mask), values[:, frames - 1])


def test_the_prompt_counts_and_its_padding_does_not(critic: Critic) -> None:
    """Padding of any length that holds anything, NaN too; in the training forward the same up to rounding."""
    codes, prompt, mask = arguments(4, 6)
    wanted = critic.score(codes, prompt, mask)
    padded = torch.cat((prompt, torch.zeros(4, 3, DIM)), dim=1).masked_fill(
        ~torch.nn.functional.pad(mask, (0, 3))[..., None], float("nan")
    )
    longer = torch.nn.functional.pad(mask, (0, 3))
    assert torch.equal(critic.score(codes, padded, longer), wanted)
    torch.testing.assert_close(critic.model(codes, padded, longer)[:, -1], wanted)
    assert (critic.score(codes, -prompt, mask) != wanted).all()


def test_company_does_not_count(critic: Critic) -> None:
    """A sound's score has the same bits alone, in a batch, and at another place of it."""
    codes, prompt, mask = arguments(7, 6)
    scores = critic.score(codes, prompt, mask)
    assert len(scores.unique()) == 7
    order = torch.tensor([3, 6, 0])
    assert torch.equal(critic.score(codes[order], prompt[order], mask[order]), scores[order])
    assert torch.equal(critic.score(codes[4:5], prompt[4:5], mask[4:5]), scores[4:5])


def test_a_frame_is_the_sum_of_its_embeddings(critic: Critic) -> None:
    """As the codec's decoder adds them up."""
    codes, _, _ = arguments(2, 5)
    stages = zip(make_codec().model.quantizer.quantizers, codes[1], strict=True)
    torch.testing.assert_close(critic.model.frames(codes)[1], sum(stage.look_up(row) for stage, row in stages))


def test_training_sounds_give_mean_and_spread() -> None:
    """Inside, their frames and rewards have mean 0 and deviation 1; equal rewards divide nothing by 0."""
    model = make_critic().model
    codes, _, _ = arguments(6, 5)
    rewards = torch.tensor([0.1, 0.5, -3.0, 2.0, 0.0, 1.0])
    model.standardise(codes, rewards)
    inside = ((model.frames(codes) - model.frame_mean) / model.frame_spread).flatten(0, 1)
    torch.testing.assert_close(inside.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(inside.std(0), torch.ones(8))
    assert model.reward_mean == rewards.mean() and model.reward_spread == rewards.std()
    model.standardise(codes, torch.ones(6))
    assert model.reward_spread > 0


def test_folder(critic: Critic, tmp_path: Path) -> None:
    """What is loaded scores with the same bits; the embeddings are the codec's and are not stored."""
    critic.save_pretrained(tmp_path / "critic")
    assert sorted(path.name for path in (tmp_path / "critic").iterdir()) == ["config.json", "model.safetensors"]
    loaded = Critic.from_pretrained(tmp_path / "critic", make_codec())
    given = arguments(3, 6)
    assert torch.equal(loaded.score(*given), critic.score(*given))
    assert loaded.config == critic.config and "M parameters" in repr(loaded)
    size = sum(tensor.numel() for tensor in critic.model.state_dict().values())
    assert (tmp_path / "critic" / "model.safetensors").stat().st_size < 4 * size + 4096 < critic.model.tables.numel()
    make_critic(1).save_pretrained(tmp_path / "critic")
    assert not torch.equal(
        Critic.from_pretrained(tmp_path / "critic", make_codec()).score(*given), loaded.score(*given)
    )
    (tmp_path / "critic" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        critic.save_pretrained(tmp_path / "critic")


def test_another_codec(critic: Critic, tmp_path: Path) -> None:
    """Refused when it is loaded, and when it is to prune."""
    critic.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="trained with the codec"):
        Critic.from_pretrained(tmp_path, make_codec(seed=1))
    critic.check(make_codec(), DIM)
    with pytest.raises(InputError, match="trained with the codec"):
        critic.check(make_codec(seed=1), DIM)
    with pytest.raises(InputError, match="prompts of 7 values and the model has 8"):
        critic.check(make_codec(), DIM + 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "siren-aligner"}, "model_type"),
        ({"dim": 10**9}, "dim must be"),
        ({"layers": 0}, "layers must be"),
        ({"layers": True}, "layers must be"),
        ({"prompt_dim": "7"}, "prompt_dim must be"),
        ({"codec": 3}, "codec must be"),
        ({"wings": 2}, "unknown fields wings"),
        ({"dim": 12}, "has shape"),
    ],
)
def test_a_hostile_config(critic: Critic, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    critic.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words):
        Critic.from_pretrained(tmp_path, make_codec())


def test_a_config_that_lacks_a_size(critic: Critic, tmp_path: Path) -> None:
    critic.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "dim"}))
    with pytest.raises(CheckpointError, match="lacks dim"):
        Critic.from_pretrained(tmp_path, make_codec())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("value.bias", torch.tensor([float("nan")]), "NaN"),
        ("frame_spread", torch.zeros(8), "deviation"),
        ("reward_spread", torch.tensor(-1.0), "deviation"),
        ("value.bias", None, "lacks value.bias"),
        ("tables", torch.zeros(1), "unknown tables"),
    ],
)
def test_hostile_weights(critic: Critic, tmp_path: Path, name: str, value: torch.Tensor | None, words: str) -> None:
    critic.save_pretrained(tmp_path)
    edit_weights(tmp_path, {name: value})
    with pytest.raises(CheckpointError, match=words):
        Critic.from_pretrained(tmp_path, make_codec())


def test_a_pickle_is_not_read(critic: Critic, tmp_path: Path) -> None:
    critic.save_pretrained(tmp_path)
    leave_only_a_pickle(tmp_path)
    with pytest.raises(CheckpointError, match="never read"):
        Critic.from_pretrained(tmp_path, make_codec())
    assert not (tmp_path / "run").exists()


def test_arguments_that_are_refused(critic: Critic) -> None:
    codes, prompt, mask = arguments(2, 4)
    for wrong, words in (
        ((codes[:, :11], prompt, mask), "codes must have shape"),
        ((codes[:, :, :0], prompt, mask), "codes must have shape"),
        ((codes + 1024, prompt, mask), "from 0 to 1023"),
        ((codes.int(), prompt, mask), "int64"),
        ((codes, prompt[:1], mask), "prompt must have shape"),
        ((codes, prompt[..., :6], mask), "prompt must have shape"),
        ((codes, prompt, mask[:, :4]), "prompt_mask must be"),
        ((codes, prompt, mask & False), "needs a token"),
    ):
        with pytest.raises(InputError, match=words):
            critic.score(*wrong)
