"""Clips spread over processes, results in order. Each process has one thread, so that the bits are the same with any
number of them.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread

import torch

from ..errors import DataError
from .clip_tokenizer import ClipTokenizer, Models, Outcome, Settings
from .clips import ClipRecord

_AHEAD = 8  # clips in work or done for each worker, while the first of them is waited for

_tokenizer: ClipTokenizer | None = None  # of a worker process


def outcomes(records: Sequence[ClipRecord], models: Models, settings: Settings, workers: int) -> Generator[Outcome]:
    """What each record gives, in order. With one worker, in this process."""
    if workers == 1 or len(records) < 2:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(ClipTokenizer(models, settings), records)
        finally:
            torch.set_num_threads(threads)
        return
    # Started fresh: a fork would copy whatever locks the threads of this process hold.
    pool = ProcessPoolExecutor(min(workers, len(records)), get_context("spawn"), _start, (models, settings))
    waiting: deque[Future[Outcome]] = deque()
    try:
        for record in records:
            waiting.append(pool.submit(_run, record))
            if len(waiting) >= workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended (too little memory, or a script without `if __name__ == '__main__':`); finished "
            "shards are kept: run the same command again, perhaps with fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(models: Models, settings: Settings) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the workers
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _tokenizer = ClipTokenizer(models, settings)


def _end_with_parent() -> None:
    """A main process that is killed cannot stop its workers; they would wait for work forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(record: ClipRecord) -> Outcome:
    assert _tokenizer is not None
    return _tokenizer(record)
