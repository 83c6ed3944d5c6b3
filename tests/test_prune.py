"""Prefix pruning: which sounds are finished, that they are those of their seeds, and what is refused before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_critic import make_critic
from training_runs import TINY, make_codec

import siren
from siren.errors import InputError, SamplingError
from siren.generate import generate
from siren.prune import Pruning
from siren.rerank import highest_first

NAN = float("nan")
FRAME = 0.02  # seconds


class Scores:
    """A critic that gives what `score` returns for the codes, and remembers what it saw."""

    def __init__(self, score: Any) -> None:
        self.function = score
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def check(self, codec: siren.Codec, prompt_dim: int) -> None:
        assert prompt_dim == TINY.prompt_dim

    def score(self, codes: torch.Tensor, prompt: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
        self.seen.append((codes, prompt, prompt_mask))
        return torch.as_tensor(self.function(codes))


class Words:
    """A prompt encoder: a word is a vector of its letters' sum, one prompt longer than the other."""

    name, dim = "words", TINY.prompt_dim

    def __call__(self, texts: list[str], limit: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [torch.stack([torch.full((self.dim,), sum(map(ord, w)) / 700) for w in t.split()]) for t in texts]
        lengths = torch.tensor([len(row) for row in rows])
        states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return states, torch.arange(states.shape[1]) < lengths[:, None]

    def tokenize(self, texts: list[str], limit: int) -> None:
        pass


@pytest.fixture(scope="module")
def codec() -> siren.Codec:
    return make_codec()


@pytest.fixture(scope="module")
def model(codec: siren.Codec) -> siren.Siren:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = siren.Siren(TINY)
    made.set_decode_embeddings(codec.decode_embeddings())
    return made.eval()


@pytest.fixture(autouse=True)
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siren.generate.find_encoder", lambda *_: Words())


TEXTS = ["rain", "wind in trees", "a bell"]


def make(model: siren.Siren, codec: siren.Codec, **changes: Any) -> siren.Audio:
    values: dict[str, Any] = {"seconds": 9 * FRAME, "seed": 3, "weights": "fp32", "progress": False}
    return generate(model, changes.pop("prompts", TEXTS), codec=codec, **values | changes)


def by_code(codes: torch.Tensor) -> torch.Tensor:
    """Scores that sort the sounds of a prompt in an order of their own."""
    return (codes[:, :, -1] * torch.arange(1, 13)).sum(1).double()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_a_kept_sound_is_that_of_its_seed(
    model: siren.Siren, codec: siren.Codec, backend: str, guidance_scale: float
) -> None:
    """Bit for bit what generation of all 5 sounds of each prompt gives, log-probabilities and waveform too."""
    if backend == "cpu":
        pytest.importorskip("siren._cpu")
    options = {"backend": backend, "guidance_scale": guidance_scale, "temperature": 0.9, "top_k": 40}
    whole = make(model, codec, num_return_sequences=5, **options)
    critic = Scores(by_code)
    pruned = make(model, codec, num_return_sequences=2, prune=Pruning(critic, 5, 4 * FRAME, 2), **options)
    scores = by_code(whole.codes[:, :, :4]).view(3, 5)
    assert all(len(row.unique()) == 5 for row in scores)
    kept = (scores.topk(2).indices + torch.arange(3)[:, None] * 5).flatten()
    assert kept.tolist() != [i for i in range(15) if i % 5 < 2]
    assert torch.equal(pruned.codes, whole.codes[kept])
    assert torch.equal(pruned.logprobs, whole.logprobs[kept])
    assert torch.equal(pruned.waveform, whole.waveform[kept])
    assert pruned.prompts == [text for text in TEXTS for _ in range(2)]
    assert pruned.seeds == [whole.seeds[place] for place in kept.tolist()]


def test_the_critic_sees_the_prefixes_and_their_prompts(model: siren.Siren, codec: siren.Codec) -> None:
    critic = Scores(by_code)
    make(model, codec, num_return_sequences=1, prune=Pruning(critic, 3, 2 * FRAME, 1))
    ((codes, prompt, mask),) = critic.seen
    assert torch.equal(codes, make(model, codec, num_return_sequences=3).codes[:, :, :2])
    states, wanted = Words()(TEXTS, 64)
    assert torch.equal(prompt, states.repeat_interleave(3, 0)) and torch.equal(mask, wanted.repeat_interleave(3, 0))


def test_groups_stay_whole(model: siren.Siren, codec: siren.Codec) -> None:
    """Sessions of 2 prompts and 1 (7 sequences have no room for a third); the result and the bar are the same."""
    calls: list[tuple[int, int]] = []
    critic = Scores(by_code)
    plan = {"num_return_sequences": 2, "prune": Pruning(critic, 3, 2 * FRAME, 2)}
    split = make(model, codec, batch_size=7, on_frame=lambda *call: calls.append(call), **plan)
    assert [len(codes) for codes, _, _ in critic.seen] == [6, 3]
    assert calls == [(i, 18) for i in range(1, 19)]
    whole = make(model, codec, **plan)
    assert torch.equal(split.codes, whole.codes)
    assert split.seeds == whole.seeds


def test_seeds_can_be_listed(model: siren.Siren, codec: siren.Codec) -> None:
    """One for each prefix."""
    plan = {"num_return_sequences": 1, "prune": Pruning(Scores(lambda codes: [0.0, 2.0, 1.0]), 3, FRAME, 1)}
    assert torch.equal(
        make(model, codec, prompts="rain", seed=[7, 90, 5], **plan).codes,
        make(model, codec, prompts="rain", seed=90).codes,
    )
    with pytest.raises(InputError, match="seed"):
        make(model, codec, prompts="rain", seed=[7], **plan)


def test_a_real_critic_and_a_rerank(model: siren.Siren, codec: siren.Codec) -> None:
    """The kept sounds of a prompt are then in the reward's order; a prefix may be the whole sound."""
    critic = make_critic(prompt_dim=TINY.prompt_dim)
    reward: list[float | None] = [0.0, 3.0, 1.0, 2.0, None, 5.0]
    whole = make(model, codec, num_return_sequences=4)
    states, mask = (part.repeat_interleave(4, 0) for part in Words()(TEXTS, 64))
    kept = highest_first(critic.score(whole.codes, states, mask).tolist(), 4, 2)
    plan = {"num_return_sequences": 2, "prune": Pruning(critic, 4, 9 * FRAME, 2)}
    assert torch.equal(make(model, codec, **plan).codes, whole.codes[kept])
    ranked = make(model, codec, rerank=lambda *_, **__: reward, **plan)
    assert torch.equal(ranked.codes, whole.codes[[kept[i] for i in (1, 0, 3, 2, 5, 4)]])
    assert ranked.scores[:3] == [3.0, 0.0, 2.0]


def test_highest_first() -> None:
    """Each group for itself; of equal scores the earlier place, NaN after minus infinity."""
    assert highest_first([1.0, 3.0, 2.0, 9.0, 9.0, 8.0], 3, 2) == [1, 2, 3, 4]
    assert highest_first([NAN, 0.0, -float("inf"), NAN], 4, 3) == [1, 2, 0]
    assert highest_first([0.0] * 4, 2, 1) == [0, 2]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0, 1.0, 0), "prefixes must be"),
        ((True, 1.0, 1), "prefixes must be"),
        ((4, 1.0, 0), "keep must be"),
        ((4, 1.0, 2.0), "keep must be"),
        ((4, 1.0, 5), "keep is 5, more than the 4"),
        ((4, 0.0, 1), "prefix_seconds"),
        ((4, NAN, 1), "prefix_seconds"),
        ((4, "1", 1), "prefix_seconds"),
    ],
)
def test_plans_that_are_refused(values: tuple[Any, Any, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Pruning(Scores(by_code), *values)
    critic: Any = by_code
    with pytest.raises(InputError, match="Critic"):
        Pruning(critic)


def test_refused_before_anything_is_sampled(
    model: siren.Siren, codec: siren.Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a session was started")

    monkeypatch.setattr(siren.Sampler, "start", started)
    scores, short = Scores(by_code), FRAME
    for plan, changes, words in (
        (Pruning(scores, 3, 10 * FRAME, 1), {}, "a prefix of 10 frames is longer than the sound, which has 9"),
        (Pruning(scores, 3, short, 2), {}, "num_return_sequences is 1 and the pruning keeps 2"),
        (
            Pruning(scores, 3, short, 1),
            {"batch_size": 2},
            "3 prefixes of a prompt are sampled together; batch_size is 2",
        ),
        (Pruning(scores, 65, short, 1), {}, "batch_size is 64"),
        (Pruning(make_critic(prompt_dim=7), 3, short, 1), {}, "prompts of 7 values"),
        (Pruning(make_critic(codec_seed=1, prompt_dim=8), 3, short, 1), {}, "trained with the codec"),
    ):
        with pytest.raises(InputError, match=words):
            make(model, codec, prune=plan, **changes)


def test_a_critic_that_gives_too_few_scores(model: siren.Siren, codec: siren.Codec) -> None:
    with pytest.raises(InputError, match=r"must give a tensor \[9\] of scores"):
        make(model, codec, prune=Pruning(Scores(lambda codes: [0.0]), 3, FRAME, 1))


@pytest.mark.parametrize(("call", "clip"), [(1, 1), (2, 5), (3, 10), (4, 14)])
def test_an_error_of_the_sampler_names_the_prefix(
    model: siren.Siren, codec: siren.Codec, monkeypatch: pytest.MonkeyPatch, call: int, clip: int
) -> None:
    """Its number is that of the seed: also after others were dropped, and in the second session."""
    step = siren.Session.step
    calls: list[int] = []

    def failing(self: siren.Session, *given: Any) -> None:
        calls.append(self.batch)
        if len(calls) == call:
            raise SamplingError("the logits of sequence 1, frame 4, codebook 7 hold NaN")
        step(self, *given)

    monkeypatch.setattr(siren.Session, "step", failing)
    plan = Pruning(Scores(lambda codes: [0.0, 1.0, 2.0] * (len(codes) // 3)), 3, FRAME, 1)
    with pytest.raises(SamplingError, match=f"sequence {clip}, frame 4"):
        make(model, codec, prompts=[*TEXTS, "a dog", "hail"], prune=plan, batch_size=9)
