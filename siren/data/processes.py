"""Worker processes that never outlive the main one. PyTorch is not imported: every process would."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

# Why a BrokenProcessPool is raised; callers add what to do.
ENDED = "a worker process ended (too little memory, or a script without `if __name__ == '__main__':`)"


def worker_pool(workers: int, prepare: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """A pool whose processes call `prepare(*arguments)` first. Ctrl-C is left to the main process."""
    # Started fresh: a fork would copy whatever locks the threads of this process hold.
    return ProcessPoolExecutor(workers, get_context("spawn"), _start, (prepare, arguments))


def _start(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the workers
    Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare(*arguments)


def _end_with_parent() -> None:
    """A main process that is killed cannot stop its workers; they would wait for work forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
