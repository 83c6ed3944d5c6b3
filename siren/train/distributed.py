"""Several processes on one expert: DDP, which copies it, or FSDP2, which shards it (sharding.py).

The processes' gradients are summed, not averaged: every process divides its loss by the number of frames of the whole
step, so the mean of eq. 6 runs over all of them however they are spread (short clips weigh what their frames weigh).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..errors import InputError, SirenError


@dataclass(frozen=True)
class World:
    """Which process this is. `control` is a gloo group for messages beside the training, None if it is alone."""

    rank: int
    size: int
    device: torch.device
    control: Any = None

    def largest(self, value: int) -> int:
        """The largest of the processes' values; all must call."""
        if self.size == 1:
            return value
        return int(self._reduce(torch.tensor([value]), dist.ReduceOp.MAX))

    def first_does(self, work: Callable[[], object]) -> None:
        """Do `work` on process 0 alone. If it raises there, all raise, so that nobody waits for the others."""
        failure: BaseException | None = None
        if self.rank == 0:
            try:
                work()
            except Exception as error:
                failure = error
        failed = self.largest(int(failure is not None))
        if failure is not None:
            raise failure
        if failed:
            raise SirenError("process 0 failed; its message says why")

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes of a CPU tensor; all must call."""
        return self._reduce(values, dist.ReduceOp.SUM) if self.size > 1 else values

    def collect(self, own: Tensor, count: int) -> Tensor:
        """The `count` rows of all processes, on the CPU: this one has number rank, rank + size and so on, in `own`.

        All must call, those that have none with a tensor [0, ...].
        """
        rows = own.new_zeros(count, *own.shape[1:])
        rows[self.rank :: self.size] = own
        return self.total(rows)

    def collect_json(self, own: Any) -> list[Any]:
        """The values of all processes, in their order; all must call. Only what JSON can hold."""
        data = torch.tensor(list(json.dumps(own).encode()), dtype=torch.uint8)
        rows = torch.full((1, self.largest(len(data))), ord(" "), dtype=torch.uint8)
        rows[0, : len(data)] = data
        return [json.loads(bytes(row.tolist())) for row in self.collect(rows, self.size)]

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        try:
            dist.all_reduce(values, operation, group=self.control)
        except RuntimeError as error:  # gloo's, when a connection is closed
            raise SirenError("lost the other processes; the message of the first to end says why") from error
        return values


@contextmanager
def join(device: str, alone: bool) -> Iterator[World]:
    """This process's place among those that RANK and WORLD_SIZE (torchrun, accelerate launch) speak of.

    device: "auto", or a torch device; under a launcher a GPU is the one of LOCAL_RANK. alone: the processes of the
    launcher train an expert each and do not talk. A process group that exists already is used and left as it is.
    """
    local = _number("LOCAL_RANK", _number("SLURM_LOCALID", 0) if alone else 0)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", local % max(1, torch.cuda.device_count()))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error
    if place.type == "cuda":
        torch.cuda.set_device(place)
    size = _number("WORLD_SIZE", 1)
    if alone or (size == 1 and not dist.is_initialized()):
        yield World(0, 1, place)
        return
    own = not dist.is_initialized()
    if own:
        try:
            dist.init_process_group("cuda:nccl,cpu:gloo" if place.type == "cuda" else "gloo")
        except ValueError as error:  # a variable that it asks for is missing
            raise InputError(
                f"WORLD_SIZE is {size}, but the processes cannot meet: {str(error).splitlines()[0]}; start them with "
                "torchrun, or unset WORLD_SIZE"
            ) from error
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place, dist.new_group(backend="gloo"))
    finally:
        if own:
            dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    """A variable of the environment."""
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise InputError(f"{name} is {value!r}; it must be a whole number, as torchrun sets it")
    return int(value)


def copied(module: nn.Module, world: World) -> nn.parallel.DistributedDataParallel:
    """DDP, with gradients summed."""
    ids = [world.device.index] if world.device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, lambda _, bucket: _sum(bucket))  # it reads a function's annotations, as types
    return wrapped


def _sum(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def reduce_gradients(module: nn.Module, wanted: bool) -> None:
    """Whether the next backward passes sum gradients over the processes, or only keep this process's own."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module.require_backward_grad_sync = wanted
    elif hasattr(module, "set_requires_gradient_sync"):  # FSDP2's
        module.set_requires_gradient_sync(wanted)  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached, where it is; all processes must call where it is sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def take_over(target: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded; all processes must call."""
    if hasattr(target, "full_tensor"):
        from .sharding import like

        values = like(target, values)
    with torch.no_grad():
        target.copy_(values)
