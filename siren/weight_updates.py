"""New weights for one expert of a running sampler: what they must be, and who waits for whom.

Calls that sample share the weights; a load has them to itself. It waits for the calls under way, and calls that come
after it wait for it, so that a stream of short calls cannot keep it out. A call from inside another one (its on_frame
steps a second session) never waits: the load is waiting for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from .checkpoint import expected_shapes
from .config import SirenConfig
from .device_session import out_of_memory
from .engine import folded_tensors
from .errors import BackendError, InputError
from .expert import Expert

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What an expert computes with the same weights depends on these too. The names and shapes of the tensors say the rest.
_MEANING = ("n_heads", "n_kv_heads", "norm_eps", "conditioning")


class WeightUpdates:
    """The updates of one sampler, whose weights are kept as `weights` says."""

    def __init__(self, config: SirenConfig, weights: str) -> None:
        self._config = config
        self._range = torch.float32 if weights == "fp32" else torch.bfloat16  # the coarsest that values are kept in
        self._changed = threading.Condition()
        self._calls: dict[int, int] = {}  # by thread: calls under way, one inside another
        self._wanted = 0  # loads that wait or are under way
        self._writing = False
        self._number = 0  # of the latest load; 0: none yet
        self._latest = 0  # its expert
        self._torn: set[int] = set()  # experts whose last load did not end

    @contextlib.contextmanager
    def call(self, began: int | None = None) -> Iterator[int]:
        """Inside, weights do not change. Gives the number of the latest load.

        `began`: that number when the caller's caches were made. Raises InputError if there was a load since, or if the
        last load of an expert did not end.
        """
        own, counted = threading.get_ident(), False
        try:
            with self._changed:
                while self._wanted and own not in self._calls:
                    self._changed.wait()
                if began not in (None, self._number):
                    raise InputError(
                        f"expert {self._latest} has new weights since this session started, and what the session keeps "
                        "is made with the old ones: start a new session"
                    )
                if self._torn:
                    torn = min(self._torn)
                    raise InputError(
                        f"load_expert was interrupted and has left expert {torn} half new: load expert {torn} again"
                    )
                self._calls[own] = self._calls.get(own, 0) + 1
                counted = True
            yield self._number
        finally:
            if counted:
                with self._changed:
                    self._calls[own] -= 1
                    if not self._calls[own]:
                        del self._calls[own]
                    self._changed.notify_all()

    def load(
        self, index: int, expert: Expert | Mapping[str, Tensor], put: Callable[[int, Mapping[str, Tensor]], None]
    ) -> None:
        """Check the weights, wait for the calls under way and let `put(index, tensors)` write. See Sampler.load_expert.

        Nothing has changed when an InputError comes. After an error of `put` no call goes through until a load of the
        same expert has ended.
        """
        with torch.autocast("cpu", enabled=False):  # a training loop's would round what embedding tables are folded of
            tensors = checked_tensors(self._config, index, expert, self._range)
            with self._alone():
                self._number, self._latest = self._number + 1, index
                self._torn.add(index)
                try:
                    put(index, tensors)
                except (MemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    raise BackendError(
                        f"not enough memory to convert expert {index}: free some, load it again"
                    ) from error
                self._torn.discard(index)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no call is under way in any thread, and no other load."""
        wanted = False
        try:
            with self._changed:
                if threading.get_ident() in self._calls:
                    raise InputError(
                        "load_expert cannot be called from an on_frame of the same sampler, whose frames still need "
                        "the old weights: call it after step or sample has returned"
                    )
                self._wanted += 1
                wanted = True
                while self._writing or self._calls:
                    self._changed.wait()
                self._writing = True
            yield
        finally:
            if wanted:
                with self._changed:
                    self._wanted -= 1
                    self._writing = False
                    self._changed.notify_all()


def checked_tensors(
    config: SirenConfig, index: int, expert: Expert | Mapping[str, Tensor], kept_in: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of an expert that can take the place of expert `index` of a model, not copied.

    kept_in: the dtype in whose range values have to be. Raises InputError for anything that does not fit.
    """
    shapes, where = expected_shapes(config), f"expert {index}"
    tensors = _tensors_of(config, index, expert)
    for title, names in (("lacks", shapes.keys() - tensors.keys()), ("has unknown", tensors.keys() - shapes.keys())):
        if names:
            some = ", ".join(sorted(map(str, names))[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise InputError(f"{where} {title} {some}: it is not an expert of this sampler's model")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{where}: {name} must be a torch.Tensor, not {type(tensor).__name__}")
        if tuple(tensor.shape) != shapes[name]:
            raise InputError(f"{where}: {name} must have shape {list(shapes[name])}, not {list(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise InputError(f"{where}: {name} must be floating point of 16 bits or more, not {tensor.dtype}")
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise InputError(
                f"{where}: {name} must be a dense tensor with values, not {tensor.layout} on {tensor.device}"
            )
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        _check_finite(f"{where}: {name}", tensor, kept_in)
    # Finite factors of an embedding table can have a product that is not.
    factors = ((name, tensor) for name, tensor in tensors.items() if name.startswith("codebooks."))
    for name, table in folded_tensors(factors):
        _check_finite(f"{where}: {name}", table, kept_in)
    return tensors


def _tensors_of(config: SirenConfig, index: int, expert: Expert | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(expert, Mapping):
        return dict(expert)
    if not isinstance(expert, Expert):
        kind = type(expert).__name__
        raise InputError(f"expert {index} must be a siren.expert.Expert or a mapping of names to tensors, not {kind}")
    first = index * config.codes_per_expert
    if expert.start_codebook != first:
        raise InputError(f"expert {index} starts at codebook {first}, and the one given at {expert.start_codebook}")
    for name in _MEANING:
        own, wanted = getattr(expert.config, name), getattr(config, name)
        if own != wanted:
            raise InputError(f"expert {index} was given with {name} {own!r}, and this sampler's model has {wanted!r}")
    return expert.state_dict()


def _check_finite(name: str, tensor: Tensor, kept_in: torch.dtype) -> None:
    """NaN and what is infinite in this dtype are refused."""
    if not bool(torch.stack(tensor.aminmax()).to(kept_in).isfinite().all()):
        raise InputError(
            f"{name} holds NaN, infinity or a value beyond the range of {str(kept_in).removeprefix('torch.')}"
        )
