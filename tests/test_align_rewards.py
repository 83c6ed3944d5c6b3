"""The mix of rewards: its sum, its policy for every way in which a reward function can fail, and what names load."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siren.align.rewards import RewardMix, load_reward
from siren.errors import InputError, MissingDependencyError, SirenError

RATE = 16000


def batch(count: int, samples: int = 4) -> tuple[list[str], list[np.ndarray], dict[str, Any]]:
    """Prompts, sounds that hold their index, and the keywords of a mix."""
    sounds = [np.full(samples, i, np.float32) for i in range(count)]
    return [f"sound {i}" for i in range(count)], sounds, {"sample_rate": RATE, "codes": np.zeros((count, 2, 3), int)}


def call(mix: RewardMix, count: int):
    prompts, sounds, keywords = batch(count)
    return mix(prompts, sounds, **keywords)


def giving(values: Any, name: str = "giving") -> Callable[..., Any]:
    """A reward function that returns these values."""

    def function(prompts, completions, **kwargs):
        return values

    function.__name__ = name
    return function


def index(prompts, completions, **kwargs):
    return [float(sound[0]) for sound in completions]


VALUES = st.one_of(st.none(), st.floats(), st.integers(-5, 5), st.sampled_from(["1", [1.0], object, 1j, 10**400]))


@given(
    st.integers(0, 6).flatmap(
        lambda count: st.lists(st.lists(VALUES, min_size=count, max_size=count), min_size=1, max_size=4)
    ),
    st.data(),
)
def test_the_total_is_the_weighted_sum_of_what_is_there(columns: list[list], data: st.DataObject) -> None:
    """For values of any kind: a total where every function with a weight gave a number, else NaN; all is counted."""
    weights = data.draw(st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1]), min_size=len(columns), max_size=len(columns)))
    if not any(weights):
        weights[0] = 1.0
    count = len(columns[0])
    mix = RewardMix([giving(column, f"f{i}") for i, column in enumerate(columns)], weights)
    result = call(mix, count)

    def good(value: Any) -> bool:
        return isinstance(value, float | int) and value != 10**400 and math.isfinite(value)

    assert result.total.shape == (count,) and result.total.dtype == np.float64
    for row in range(count):
        parts = [(weight, column[row]) for weight, column in zip(weights, columns, strict=True) if weight]
        wanted = sum(weight * value for weight, value in parts) if all(good(v) for _, v in parts) else math.nan
        if math.isfinite(wanted):
            assert result.total[row] == pytest.approx(wanted)
        else:
            assert math.isnan(result.total[row])
    for i, column in enumerate(columns):
        missing = int(np.isnan(result.parts[f"f{i}"]).sum())
        assert missing == sum(result.failures.get(f"f{i}", {}).values())
        assert [v == w for v, w in zip(result.parts[f"f{i}"], column, strict=True) if good(w)].count(False) == 0


def test_arrays_and_tensors_are_lists_too() -> None:
    for values in (np.arange(3), torch.arange(3.0), (0, 1, 2), [np.float32(0), torch.tensor(1.0), np.array(2)]):
        result = call(RewardMix([giving(values)]), 3)
        assert result.total.tolist() == [0, 1, 2] and not result.failures


def test_what_a_function_is_given() -> None:
    """Prompts, float32 sounds, the sample rate and the codes; its own copies of them."""
    seen = []

    def rude(prompts, completions, *, sample_rate, codes):
        seen.append((list(prompts), [sound.copy() for sound in completions], sample_rate, codes.copy()))
        prompts.clear()
        for sound in completions:
            sound[:] = np.nan
        codes[:] = 9
        completions.clear()
        return [1.0, 1.0]

    prompts, sounds, keywords = batch(2)
    result = RewardMix([rude, rude, index])(prompts, sounds, **keywords)
    assert result.total.tolist() == [2.0, 3.0] and list(result.parts) == ["rude", "rude_2", "index"]
    for first, waves, rate, codes in seen:
        assert first == prompts and rate == RATE and codes.shape == (2, 2, 3) and not codes.any()
        assert all(wave.dtype == np.float32 and (wave == i).all() for i, wave in enumerate(waves))
    assert not keywords["codes"].any()


def raising(error: BaseException) -> Callable[..., Any]:
    def broken(prompts, completions, **kwargs):
        raise error

    return broken


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize(
    ("function", "reason", "message"),
    [
        (raising(ValueError("no\nsuch sound")), "raised ValueError", "no such sound"),
        (raising(MemoryError()), "raised MemoryError", "MemoryError"),
        (raising(SirenError("x" * 999)), "raised SirenError", "x" * 300),
        (giving([1.0, 2.0]), "wrong number of values", "2 values for 3 sounds"),
        (giving([]), "wrong number of values", "0 values for 3 sounds"),
        (giving(np.ones((3, 1))), "wrong number of values", "an array of shape [3, 1]"),
        (giving(torch.tensor(1.0)), "wrong number of values", "an array of shape []"),
        (giving(None), "no list of values", "it returned NoneType"),
        (giving(1.5), "no list of values", "it returned float"),
        (giving("abc"), "no list of values", "it returned str"),
        (giving({0: 1.0, 1: 1.0, 2: 1.0}), "no list of values", "it returned dict"),
        (lambda prompts: [1.0], "raised TypeError", "argument"),
    ],
)
def test_a_function_that_fails_costs_the_batch_its_reward(
    timeout: float | None, function: Callable[..., Any], reason: str, message: str
) -> None:
    """And nothing else: the others' values are kept, the failure is counted for each sound, its first words stay."""
    mix = RewardMix([index, function], timeout=timeout)
    (name,) = set(mix.names) - {"index"}
    for times in (1, 2):
        result = call(mix, 3)
        assert np.isnan(result.total).all() and np.isnan(result.parts[name]).all()
        assert result.parts["index"].tolist() == [0, 1, 2]
        assert result.failures == {name: {reason: 3}} and mix.failures[name] == {reason: 3 * times}
    assert message in mix.messages[name, reason] and len(mix.messages[name, reason]) <= 300
    assert f"{name}: {reason}, 6 sounds (first: " in mix.describe_failures()


def test_values_that_are_none() -> None:
    """One sound's value; the message names its prompt, and functions with weight 0 cost nothing."""
    mix = RewardMix([giving([1.0, None, math.nan, -math.inf, "5"]), index], [0, 1])
    result = call(mix, 5)
    assert result.failures == {"giving": {"None": 1, "NaN": 1, "infinite": 1, "not a number": 1}}
    assert mix.messages["giving", "NaN"] == "for 'sound 2'"
    assert result.total.tolist() == [0, 1, 2, 3, 4]
    assert np.isnan(call(RewardMix(mix.functions), 5).total).tolist() == [False, True, True, True, True]
    assert RewardMix([index]).describe_failures() == ""


def test_sums_that_overflow_are_no_rewards() -> None:
    assert np.isnan(call(RewardMix([giving([1e308]), giving([1e308])], [10.0, -10.0]), 1).total).all()


class Hanging:
    """A reward that waits for `release` if `hang` is set, and counts its calls."""

    def __init__(self) -> None:
        self.hang, self.release, self.calls = True, threading.Event(), 0

    def __call__(self, prompts, completions, **kwargs):
        self.calls += 1
        if self.hang:
            self.release.wait(60)
        return [float(self.calls)] * len(prompts)


def test_a_function_that_hangs() -> None:
    """It gives nothing and is not called again until it is back; what it returns then is no reward of a later batch."""
    hanging = Hanging()
    mix = RewardMix([hanging, index], timeout=0.05)
    try:
        start = time.monotonic()
        first, second = call(mix, 2), call(mix, 2)
        assert time.monotonic() - start < 30 and hanging.calls == 1
        assert first.failures == {"Hanging": {"timed out": 2}} and second.failures == {"Hanging": {"still running": 2}}
        for result in (first, second):
            assert np.isnan(result.total).all() and result.parts["index"].tolist() == [0, 1]
        assert "0.05 s" in mix.messages["Hanging", "timed out"]
        hanging.hang = False
    finally:
        hanging.release.set()
    earlier = mix._running["Hanging"]
    assert earlier.done.wait(60)
    mix.timeout = 60
    assert call(mix, 2).parts["Hanging"].tolist() == [2, 2]


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_goes_to_the_caller(timeout: float | None, error: type[BaseException]) -> None:
    """Who stops the program while a reward runs, or a reward that ends it, is heard; it is no failure."""
    mix = RewardMix([raising(error())], timeout=timeout)
    with pytest.raises(error):
        call(mix, 1)
    assert mix.describe_failures() == ""


def test_without_a_timeout_the_caller_thread_works() -> None:
    threads = []

    def where(prompts, completions, **kwargs):
        threads.append(threading.current_thread())
        return [0.0]

    for timeout in (None, 30):
        call(RewardMix([where], timeout=timeout), 1)
    assert threads[0] is threading.current_thread() is not threads[1] and threads[1].daemon


def test_an_empty_batch_calls_nobody() -> None:
    result = call(RewardMix([raising(ValueError())]), 0)
    assert result.total.shape == (0,) and not result.failures


def test_names_and_identities() -> None:
    """Names are distinct whatever the functions are called; a model's identity is its own."""
    model = Hanging()
    model.identity = "model sha256:0"  # type: ignore[attr-defined]
    functions = [giving([], "a"), giving([], "a_2"), giving([], "a"), giving([], "a"), model, model]
    mix = RewardMix(functions)
    assert len(set(mix.names)) == 6 and mix.names[:2] == ["a", "a_2"] and mix.names[4:] == ["Hanging", "Hanging_2"]
    assert mix.identities == [*mix.names[:4], "model sha256:0", "model sha256:0"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "at least one"),
        (([3],), "must be a function"),
        (([Hanging],), "must be a function"),
        (([index], [1, 2]), "one a reward"),
        (([index], [math.nan]), "finite"),
        (([index], [0]), "all weights are 0"),
        (([index], None, 0), "timeout"),
        (([index], None, math.inf), "timeout"),
    ],
)
def test_arguments_that_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(InputError, match=words):
        RewardMix(*arguments)


def test_batches_that_do_not_fit() -> None:
    prompts, sounds, keywords = batch(2)
    for wrong in ((prompts[:1], sounds), (prompts, sounds[:1])):
        with pytest.raises(InputError, match="prompts"):
            RewardMix([index])(*wrong, **keywords)
    with pytest.raises(InputError, match="codes of 1"):
        RewardMix([index])(prompts, sounds, sample_rate=RATE, codes=keywords["codes"][:1])


def test_functions_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By file, by module, and an attribute of an attribute."""
    (tmp_path / "my_rewards.py").write_text(
        "def loud(prompts, completions, **kwargs):\n    return [float(abs(c).max()) for c in completions]\n"
        "class Box:\n    quiet = staticmethod(lambda p, c, **k: [0.0] * len(p))\nnumber = 3\n"
    )
    loud = load_reward(f"{tmp_path / 'my_rewards.py'}:loud")
    assert call(RewardMix([loud]), 3).total.tolist() == [0, 1, 2]
    monkeypatch.syspath_prepend(tmp_path)
    assert RewardMix([load_reward("my_rewards:loud")]).names == ["loud"]
    assert call(RewardMix([load_reward("my_rewards:Box.quiet")]), 2).total.tolist() == [0, 0]
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for name, words in {
        "my_rewards:silent": "has no 'silent'",
        "my_rewards:number": "no function but int",
        "my_rewards:Box": "no function but type",
        "none_of_this:f": "does not import.*named by its path",
        "./none.py:f": "there is no file",
        "broken:f": "ZeroDivisionError",
        "loudness": "there are aligner",
        "clap": "there are aligner",
        "clap:": "there are aligner",
        "imagebind:": "there are aligner",
        ":f": "there are aligner",
    }.items():
        with pytest.raises(InputError, match=words) as caught:
            load_reward(name)
        assert "\n" not in str(caught.value)


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each that says what to do, before anything is sampled."""
    monkeypatch.setattr("siren.aligner._MINI_FOLDER", tmp_path / "none")
    monkeypatch.setitem(__import__("sys").modules, "imagebind", None)
    for name, words in {
        "aligner": "siren train-aligner",
        f"aligner:{tmp_path / 'none'}": "an aligner is a local folder",
        f"clap:{tmp_path / 'none'}": "a CLAP model is a local folder",
        "imagebind": "facebookresearch/ImageBind",
    }.items():
        with pytest.raises((SirenError, MissingDependencyError), match=words) as caught:
            load_reward(name)
        assert "\n" not in str(caught.value)
