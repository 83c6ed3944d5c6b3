"""The runs of test_train_distributed.py, in a process of their own that forks: `python distributed_runs.py FOLDER`."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_runs import make_data, settings

from siren.errors import SirenError
from siren.train import sharding, train  # noqa: F401
from siren.train.batches import Batches


def in_processes(count: int, work: Callable[[], Any]) -> list[str]:
    """Do `work` in processes with the environment that torchrun gives; the error of each, "" for none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(count):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                work()
            except SirenError as error:
                os.write(writing, str(error).encode())
            except BaseException:
                os.write(writing, traceback.format_exc().encode())
            os._exit(0)
        os.close(writing)
        children.append((child, reading))
    errors = []
    for child, reading in children:
        with os.fdopen(reading, "rb") as pipe:
            errors.append(pipe.read().decode())
        os.waitpid(child, 0)
    return errors


def stop_at(step: int, rank: int) -> None:
    """One process gets SIGTERM while it computes the update `step` (from 0)."""
    frames = Batches.frames

    def signalling(self: Batches, now: int) -> int:
        if now == step and int(os.environ["RANK"]) == rank and sys._getframe(1).f_code.co_name == "update":
            signal.raise_signal(signal.SIGTERM)
        return frames(self, now)

    Batches.frames = signalling  # type: ignore[method-assign]


def fill_disk_of_first() -> None:
    """Process 0 cannot save."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if os.environ["RANK"] == "0":
        os.fsync = full  # type: ignore[assignment]


def main(folder: Path) -> None:
    """Print what each process of each run raised, as JSON."""
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # this and sharding import much, once for all processes
    data = make_data(folder)
    two = {"accumulate": 1}

    def run(name: str, prepare: Callable[[], None] | None = None, **changes: Any) -> Callable[[], None]:
        def work() -> None:
            if prepare is not None:
                prepare()
            train(settings(data, folder / name, max_steps=6, **changes))

        return work

    errors = {
        "one": in_processes(1, run("one")),
        "two": in_processes(2, run("two", **two)),
        "stopped": in_processes(2, run("stopped", lambda: stop_at(3, 1), **two)),
        "resumed": in_processes(1, run("stopped")),
        "sharded, stopped": in_processes(2, run("sharded", lambda: stop_at(4, 0), fsdp=True, **two)),
        "sharded": in_processes(2, run("sharded", fsdp=True, checkpoint_activations=True, **two)),
        "full": in_processes(2, run("full", fill_disk_of_first, **two)),
    }
    print(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
