"""Rewards: what says how good the sounds of a batch are, several mixed, and what happens when one of them fails.

    total = sum of weight_i * reward_i

A reward function is any callable `f(prompts, completions, **kwargs)`: prompts is a list of N texts, completions a list
of N mono waveforms float32 [samples]; kwargs has sample_rate in Hz and codes int64 [N, num_codebooks, T]. It returns N
numbers, None for a sound it has nothing to say about (the convention of TRL). What is missing costs a sound its reward
and nothing else; every failure is counted, and the run goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import InputError, SirenError
from .reward_models import AlignerReward, ClapReward, ImageBindReward

RewardFunction = Callable[..., Sequence[float | None]]

_NAMES = "aligner, aligner:FOLDER, clap:FOLDER_OR_HUB_NAME, imagebind, imagebind:CHECKPOINT, or MODULE:FUNCTION"
_MESSAGE = 300  # characters kept of an error


@dataclass(frozen=True)
class RewardBatch:
    """total float64 [N], NaN where a sound has no reward; parts: each function's values, the same way, unweighted.

    failures: of each function that failed, for how many sounds and why.
    """

    total: npt.NDArray[np.float64]
    parts: dict[str, npt.NDArray[np.float64]]
    failures: dict[str, Counter[str]]


class RewardMix:
    """Reward functions and their weights (1 if None). `mix(prompts, completions, sample_rate=, codes=)` scores a batch.

    The policy. A function that raises, returns anything but N values, or takes more than `timeout` seconds gives no
    reward for this batch. A value that is None, NaN, infinite or no number gives none for that sound. A sound has a
    total if every function with a weight other than 0 gave it a value; those with weight 0 are only recorded.

    With a timeout a function runs in a thread of its own, because nothing in Python can stop it: what hangs keeps its
    thread. Until it returns it is not called again, and what it returns is thrown away. Without one (None) it runs in
    the caller's thread and is waited for. Every function gets copies, so one that writes into its arguments, or is
    still busy with them, disturbs nobody.

    Running out of memory is a failure like others. KeyboardInterrupt and SystemExit are none: they go to the caller.

    names: of the functions; a second one of the same name is "name_2". identities: what makes the values, for models
    their name and hash. failures and messages: all counts so far, and the first message for each (name, reason).
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
    ) -> None:
        if not functions:
            raise InputError("a reward needs at least one function")
        for function in functions:
            if not callable(function) or isinstance(function, type):
                raise InputError(f"a reward must be a function, not {function!r}")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions) or not all(_is_number(weight) for weight in weights):
            raise InputError(f"weights must be {len(functions)} finite numbers, one a reward, not {weights!r}")
        if not any(weights):
            raise InputError("all weights are 0; nothing would be rewarded")
        if timeout is not None and not (_is_number(timeout) and 0 < timeout <= threading.TIMEOUT_MAX):
            raise InputError(f"timeout must be a number of seconds above 0, or None, not {timeout!r}")
        self.names = _names(functions)
        self.identities = [
            str(getattr(function, "identity", name)) for function, name in zip(functions, self.names, strict=True)
        ]
        self.functions = list(functions)
        self.weights = [float(weight) for weight in weights]
        self.timeout = timeout
        self.failures: dict[str, Counter[str]] = {name: Counter() for name in self.names}
        self.messages: dict[tuple[str, str], str] = {}
        self._running: dict[str, _Call] = {}

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[np.ndarray], *, sample_rate: int, codes: np.ndarray
    ) -> RewardBatch:
        """The rewards of N sounds. Raises InputError if there are not as many prompts, sounds and codes."""
        count = len(completions)
        if len(prompts) != count or len(codes) != count:
            raise InputError(f"there are {len(prompts)} prompts, {count} sounds and codes of {len(codes)}")
        total = np.zeros(count)
        parts: dict[str, npt.NDArray[np.float64]] = {}
        failures: dict[str, Counter[str]] = {}
        for name, function, weight in zip(self.names, self.functions, self.weights, strict=True):
            values, failed = self._call(name, function, prompts, completions, sample_rate, codes)
            parts[name] = values
            if weight:
                with np.errstate(over="ignore", invalid="ignore"):
                    total += weight * values
            if failed:
                failures[name] = Counter()
                for reason, (sounds, message) in failed.items():
                    failures[name][reason] = sounds
                    self.messages.setdefault((name, reason), message)
                self.failures[name].update(failures[name])
        total[~np.isfinite(total)] = np.nan  # finite values can add up to infinity
        return RewardBatch(total, parts, failures)

    def describe_failures(self) -> str:
        """All failures so far in one line, for people; empty if there were none."""
        return "; ".join(
            f"{name}: {reason}, {sounds} sounds (first: {self.messages[name, reason]})"
            for name, reasons in self.failures.items()
            for reason, sounds in reasons.most_common()
        )

    def _call(
        self,
        name: str,
        function: RewardFunction,
        prompts: Sequence[str],
        completions: Sequence[np.ndarray],
        sample_rate: int,
        codes: np.ndarray,
    ) -> tuple[npt.NDArray[np.float64], dict[str, tuple[int, str]]]:
        """The values [N] of one function, NaN where there is none; and reason -> (sounds, message)."""
        count = len(completions)
        nothing = np.full(count, np.nan)
        if not count:
            return nothing, {}
        earlier = self._running.get(name)
        if earlier is not None and not earlier.done.is_set():
            busy = f"it has been busy with an earlier batch for {time.monotonic() - earlier.start:.0f} s"
            return nothing, {"still running": (count, busy)}
        self._running.pop(name, None)
        arguments = (list(prompts), [np.array(wave, np.float32) for wave in completions])
        call = _Call(function, arguments, {"sample_rate": sample_rate, "codes": np.array(codes)}, count)
        if not call.run(self.timeout):
            self._running[name] = call
            return nothing, {"timed out": (count, f"no answer after {self.timeout:g} s")}
        if call.failure is not None:
            return nothing, {call.failure[0]: (count, call.failure[1])}
        failed: dict[str, tuple[int, str]] = {}
        for i, value in enumerate(call.values):
            reason = _what_is_wrong(value)
            if reason is None:
                nothing[i] = value
            else:
                before, message = failed.get(reason, (0, f"for {prompts[i][:60]!r}"))
                failed[reason] = (before + 1, message)
        return nothing, failed


class _Call:
    """One call of a reward function: its values, or (reason, message), or what goes on to the caller."""

    def __init__(
        self, function: RewardFunction, arguments: tuple[Any, ...], kwargs: dict[str, Any], count: int
    ) -> None:
        self.function, self.arguments, self.kwargs, self.count = function, arguments, kwargs, count
        self.values: list[float | None] = []
        self.failure: tuple[str, str] | None = None
        self.interrupt: BaseException | None = None
        self.done = threading.Event()
        self.start = time.monotonic()
        # A thread begins on the first GPU, whichever the caller's is.
        self.gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run(self, timeout: float | None) -> bool:
        """Whether the function came back in time. Raises KeyboardInterrupt and SystemExit if it did."""
        if timeout is None:
            self._run()
        else:
            threading.Thread(target=self._run, name="siren-reward", daemon=True).start()
            if not self.done.wait(timeout):
                return False
        if self.interrupt is not None:
            raise self.interrupt
        return True

    def _run(self) -> None:
        try:
            if self.gpu is not None:
                torch.cuda.set_device(self.gpu)
            self.values = _plain(self.function(*self.arguments, **self.kwargs))
            if len(self.values) != self.count:
                raise _WrongAnswerError("wrong number of values", f"{len(self.values)} values for {self.count} sounds")
        except _WrongAnswerError as error:
            self.failure = (error.reason, str(error))
        except Exception as error:
            # Only the words are kept: a traceback holds the function's arrays, and memory may be what ran out.
            message = " ".join(str(error).split())[:_MESSAGE]
            self.failure = (f"raised {type(error).__name__}", message or type(error).__name__)
        except BaseException as error:
            self.interrupt = error
        finally:
            self.arguments, self.kwargs = (), {}
            self.done.set()


class _WrongAnswerError(Exception):
    """What a function returned is not N values."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _plain(answer: Any) -> list[Any]:
    """The values of a list, array or tensor [N]."""
    if isinstance(answer, (np.ndarray, torch.Tensor)):
        if answer.ndim != 1:
            raise _WrongAnswerError("wrong number of values", f"an array of shape {list(answer.shape)}")
        return list(answer.tolist())
    if not isinstance(answer, Sequence) or isinstance(answer, (str, bytes)):
        raise _WrongAnswerError("no list of values", f"it returned {type(answer).__name__}")
    return [value.item() if _is_scalar(value) else value for value in answer]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, np.generic) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0)


def _what_is_wrong(value: Any) -> str | None:
    """Why a value is no reward, or None."""
    if value is None:
        return "None"
    if not isinstance(value, (int, float)):
        return "not a number"
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return "infinite"
    if math.isnan(number):
        return "NaN"
    return None if math.isfinite(number) else "infinite"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _names(functions: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        name = getattr(function, "__name__", None) or type(function).__name__
        taken = sum(other == name or other.startswith(f"{name}_") for other in names)
        while (candidate := name if not taken else f"{name}_{taken + 1}") in names:
            taken += 1
        names.append(candidate)
    return names


def load_reward(name_or_path: str, device: str | torch.device = "cpu") -> RewardFunction:
    """The reward function of a name.

    "aligner": the offline aligner of siren-mini; "aligner:FOLDER": another, made by `siren train-aligner`.
    "clap:FOLDER_OR_HUB_NAME": cosine of a CLAP by transformers. "imagebind": cosine of ImageBind (eq. 8), from the
    user's own installation; "imagebind:CHECKPOINT" names its weights. "package.module:function" or
    "folder/file.py:function": the user's own. What it names is imported and runs.

    Raises InputError for a name that means nothing, and what loading the models raises.
    """
    kind, colon, rest = name_or_path.partition(":")
    if kind == "aligner" and (rest or not colon):
        return AlignerReward.from_pretrained(rest or None, device)
    if kind == "clap" and rest:
        return ClapReward.from_pretrained(rest, device)
    if kind == "imagebind" and (rest or not colon):
        return ImageBindReward.from_installed(rest or None, device)
    module, colon, path = name_or_path.rpartition(":")
    if not module or not path or kind in ("aligner", "clap", "imagebind"):
        raise InputError(f"there is no reward {name_or_path!r}; there are {_NAMES}")
    found: Any = _import(module, name_or_path)
    for part in path.split("."):
        if not hasattr(found, part):
            raise InputError(f"the reward {name_or_path!r}: {module} has no {path!r}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, type):
        raise InputError(f"the reward {name_or_path!r} is no function but {type(found).__name__}")
    return found


def _import(module: str, name: str) -> Any:
    """A module by its dotted name or its file."""
    try:
        if not module.endswith(".py"):
            return importlib.import_module(module)
        path = Path(module).expanduser()
        if not path.is_file():
            raise InputError(f"the reward {name!r}: there is no file {module}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise InputError(f"the reward {name!r}: {module} is no Python file")
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found
    except SirenError:
        raise
    except Exception as error:  # the user's code may raise anything
        hint = ""
        if isinstance(error, ModuleNotFoundError) and not module.endswith(".py"):
            hint = "; a file is named by its path, such as ./my_rewards.py:loud"
        raise InputError(f"the reward {name!r} does not import ({type(error).__name__}: {error}){hint}") from error
