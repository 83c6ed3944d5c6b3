"""The sampling contract: published Philox vectors, the noise's definition, and draws against a slow plain reading."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from siren import InputError, SamplingError
from siren import sampling as module
from siren.sampling import SamplingSettings, draw, expand_seeds, guide, gumbel_noise, log_probability, philox4x32

NINF, NAN = -math.inf, math.nan


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The vectors that Random123 publishes for Philox4x32-10."""
    assert tuple(int(word) for word in philox4x32(counter, key)) == words


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The published algorithm in Python integers."""
    for _ in range(10):
        low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(high >> 32) ^ counter[1] ^ key[0], high % 2**32, (low >> 32) ^ counter[3] ^ key[1], low % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 63), min_size=1, max_size=3),
    st.integers(1, 21),
)
def test_noise_is_its_definition(seeds, frame, codebooks, size):
    """Every value, for any seed, frame, codebook and codebook size, is the formula of the contract."""
    noise = gumbel_noise(expand_seeds(seeds, len(seeds)), frame, codebooks, size)
    assert noise.shape == (len(seeds), len(codebooks), size)
    assert noise.dtype == torch.float32
    for i, seed in enumerate(seeds):
        for j, codebook in enumerate(codebooks):
            for v in range(size):
                word = plain_philox([frame, codebook, v // 4, 0], [seed % 2**32, seed >> 32])[v % 4]
                u = ((word >> 8) + 0.5) * 2**-24
                assert float(noise[i, j, v]) == pytest.approx(-math.log(-math.log(u)), rel=1e-6, abs=1e-7)


def test_noise_of_one_sequence_does_not_depend_on_the_others():
    seeds, frames = expand_seeds([3, 2**63, 3], 3), np.array([5, 9, 6])
    together = gumbel_noise(seeds, frames, range(12), 1025)
    for i in range(3):
        assert torch.equal(gumbel_noise(seeds[i : i + 1], frames[i], range(12), 1025)[0], together[i])
    assert torch.equal(gumbel_noise(seeds[:1], 5, [7], 1025)[0, 0], together[0, 7])
    assert not torch.equal(together[0], together[2])


@pytest.mark.parametrize(("word", "u"), [(0, 2.0**-25), (0xFFFFFFFF, 1 - 2.0**-25)])
def test_noise_at_the_ends_is_finite(monkeypatch, word, u):
    """In float32 the largest u would be 1 and its noise infinite: that code would always win."""
    monkeypatch.setattr(module, "philox4x32", lambda counter, key: (np.full(1, word, np.uint64),) * 4)
    noise = gumbel_noise(expand_seeds(0, 1), 0, [0], 4)
    assert float(noise[0, 0, 0]) == np.float32(-math.log(-math.log(u)))


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (5, [5, 6, 7]),
        (np.int32(5), [5, 6, 7]),
        (2**64 - 3, [2**64 - 3, 2**64 - 2, 2**64 - 1]),
        ([9, 9, 0], [9, 9, 0]),
        ((2**64 - 1, 0, 1), [2**64 - 1, 0, 1]),
        (np.array([1, 2, 3], dtype=np.uint64), [1, 2, 3]),
        (torch.tensor([1, 2, 3]), [1, 2, 3]),
        (torch.tensor(4), [4, 5, 6]),
    ],
)
def test_seeds(seed, expected):
    seeds = expand_seeds(seed, 3)
    assert seeds.dtype == np.uint64
    assert seeds.tolist() == expected


@pytest.mark.parametrize(
    "seed",
    [
        -1, 2**64, 2**64 - 2, True, 1.0, "123", b"123", None, [1, 2], [], [1, 2, -3], [1, 2, 2**64], [1, 2, 3.0],
        [[1, 2, 3]], [1, True, 2], torch.ones(3), np.zeros((3, 1), dtype=int),
    ],
)  # fmt: skip
def test_bad_seeds(seed):
    with pytest.raises(InputError, match="seed"):
        expand_seeds(seed, 3)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1}, {"temperature": NAN}, {"temperature": math.inf}, {"temperature": "1"},
        {"temperature": 1e-9}, {"temperature": True}, {"top_k": -1}, {"top_k": 1.0}, {"top_k": True}, {"top_k": None},
        {"top_p": 0}, {"top_p": 1.01}, {"top_p": NAN}, {"top_p": None}, {"guidance_scale": NAN},
        {"guidance_scale": math.inf}, {"guidance_scale": None},
    ],
)  # fmt: skip
def test_bad_settings(values):
    with pytest.raises(InputError, match=next(iter(values))):
        SamplingSettings(**values)


def plain_allowed(logits: list[float], settings: SamplingSettings) -> list[int]:
    """Codes that top_k and then top_p keep, by sorting and adding in Python."""
    scaled = [x / settings.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda v: (-scaled[v], v))
    if settings.top_k:
        order = order[: settings.top_k]
    weights = [math.exp(scaled[v] - scaled[order[0]]) for v in order]
    kept, reached = [], 0.0
    for v, weight in zip(order, weights, strict=True):
        if settings.top_p < 1 and reached >= settings.top_p * sum(weights):
            break
        kept.append(v)
        reached += weight
    return kept


@given(
    # Quarters, so that ties are frequent and exact; probabilities meet top_p on the boundary only by accident.
    st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=9),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    st.integers(0, 9),
    st.sampled_from([1e-9, 0.2137, 0.5391, 0.9173, 1.0]),
    st.integers(0, 2**32),
)
def test_draw_is_the_argmax_over_allowed_codes(logits, temperature, top_k, top_p, seed):
    settings = SamplingSettings(temperature, min(top_k, len(logits)), top_p)
    noise = gumbel_noise(expand_seeds(seed, 64), 3, [2], len(logits))[:, 0]
    rows = torch.tensor(logits).expand(64, -1)
    codes, logprobs = draw(rows, noise, settings)
    allowed = plain_allowed(logits, settings)
    scores = rows / temperature + noise
    assert codes.tolist() == [max(allowed, key=lambda v: (float(row[v]), -v)) for row in scores]
    expected = torch.log_softmax(rows / temperature, -1)[torch.arange(64), codes]
    assert torch.equal(logprobs, expected)
    assert torch.equal(log_probability(rows, codes, settings), logprobs)


@pytest.mark.parametrize("forbidden_noise", [100.0, 1e30])
def test_forbidden_codes_never_win(forbidden_noise):
    """However large their noise: codes beyond top_k and top_p, and codes of probability zero."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, NINF, 0.0]])
    for settings, allowed in (
        (SamplingSettings(top_k=1), [1]),
        (SamplingSettings(top_k=2), [1, 3]),
        (SamplingSettings(top_p=1e-6), [1]),
        (SamplingSettings(top_p=0.6), [1, 3]),
        (SamplingSettings(top_k=3, top_p=0.9), [1, 3, 2]),
        (SamplingSettings(top_k=6), [0, 1, 2, 3, 5]),
        (SamplingSettings(), [0, 1, 2, 3, 5]),
    ):
        assert_allowed(logits, settings, allowed, forbidden_noise)


def assert_allowed(logits: torch.Tensor, settings: SamplingSettings, allowed: list[int], forbidden: float) -> None:
    for v in allowed:
        noise = torch.full_like(logits, forbidden)
        noise[0, allowed] = 0.0
        noise[0, v] = 20.0
        assert draw(logits, noise, settings)[0].tolist() == [v], settings


def test_greedy():
    """The lowest index wins a tie; top_k, top_p and noise do not matter; log-probabilities are of temperature 1."""
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0], [NINF, NINF, -7.0, -7.0]])
    codes, logprobs = draw(logits, None, SamplingSettings(temperature=0, top_k=2, top_p=0.1))
    assert codes.tolist() == [1, 0, 2]
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[torch.arange(3), codes])


def test_tiny_temperature_does_not_overflow():
    logits = torch.tensor([[900.0, 901.0, -900.0]])
    codes, logprobs = draw(logits, torch.tensor([[17.0, -3.0, 17.0]]), SamplingSettings(temperature=1e-6, top_p=0.9))
    assert codes.tolist() == [1]
    assert logprobs.tolist() == [0.0]


@pytest.mark.parametrize("bad", [[1.0, NAN, 0.0], [math.inf, 0.0, 0.0], [NINF, NINF, NINF], [NAN, NINF, math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_that_cannot_be_drawn_from(bad, temperature):
    """The error names sequence, frame and codebook."""
    logits = torch.tensor([[0.0, 1.0, 2.0], bad, bad])
    settings = SamplingSettings(temperature=temperature)
    with pytest.raises(SamplingError, match="sequence 1, frame 40, codebook 7"):
        draw(logits, torch.zeros(3, 3), settings, np.array([4, 40, 400]), 7)
    with pytest.raises(SamplingError, match="sequence 1, frame 8, codebook 0"):
        log_probability(logits, torch.zeros(3, dtype=torch.int64), settings, 8, 0)


def test_guided_rows():
    conditional, unconditional = torch.randn(3, 5), torch.randn(3, 5)
    rows = torch.cat((conditional, unconditional))
    guided = guide(rows, SamplingSettings(guidance_scale=2.5))
    torch.testing.assert_close(guided, unconditional + 2.5 * (conditional - unconditional))
    assert torch.equal(guide(rows, SamplingSettings()), rows)


SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "combined": {"temperature": 1.4, "top_k": 6, "top_p": 0.8},
    "guidance": {"guidance_scale": 2.0},
    "guidance combined": {"guidance_scale": 0.4, "temperature": 0.8, "top_k": 7, "top_p": 0.9},
}


@pytest.mark.parametrize("values", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("axis", ["seeds", "frames", "codebooks"])
def test_frequencies(values, axis):
    """40,000 draws over seeds, frames or codebooks follow the truncated distribution, and never leave it."""
    settings = SamplingSettings(**values)
    size, count = 11, 40_000
    generator = torch.Generator().manual_seed(1)
    conditional, unconditional = torch.randn(2, 1, size, generator=generator) * 1.3
    if axis == "seeds":
        noise = gumbel_noise(expand_seeds(10**12, count), 3, [1], size)[:, 0]
    elif axis == "frames":
        noise = gumbel_noise(np.repeat(expand_seeds(5, 1), count), np.arange(count), [1], size)[:, 0]
    else:
        noise = gumbel_noise(expand_seeds(5, 1), 7, np.arange(count), size)[0]
    rows = [conditional.expand(count, -1)] + ([unconditional.expand(count, -1)] if settings.guided else [])
    logits = guide(torch.cat(rows), settings)
    codes, _ = draw(logits, noise, settings)
    exact = (
        (unconditional + settings.guidance_scale * (conditional - unconditional))[0]
        if settings.guided
        else conditional[0]
    )
    allowed = plain_allowed(exact.tolist(), settings)
    expected = torch.softmax(exact[allowed].double() / settings.temperature, -1)
    counts = torch.bincount(codes, minlength=size)
    assert int(counts[allowed].sum()) == count, "a forbidden code was drawn"
    assert len(allowed) == size or values.keys() & {"top_k", "top_p"}
    assert stats.chisquare(counts[allowed].numpy(), expected.numpy() * count).pvalue > 1e-3
