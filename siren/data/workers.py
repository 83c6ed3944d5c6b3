"""Clips spread over processes, results in order. Each process has one thread, so that the bits are the same with any
number of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from ..errors import DataError, InputError
from .clip_tokenizer import ClipTokenizer, Models, Outcome, Settings
from .clips import ClipRecord
from .processes import ENDED, worker_pool

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
    pool = worker_pool(min(workers, len(records)), _prepare, models, settings)
    waiting: deque[Future[Outcome]] = deque()
    try:
        for record in records:
            waiting.append(_submit(pool, record))
            if len(waiting) >= workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"{ENDED}; finished shards are kept: run the same command again, perhaps with fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, record: ClipRecord) -> Future[Outcome]:
    try:
        return pool.submit(_run, record)
    except (OSError, RuntimeError):
        raise
    except Exception as error:  # the pool's processes are started here, and get the models: theirs may be any
        raise InputError(
            f"a model cannot be sent to other processes ({error}); define it at the top of a module, or use one worker"
        ) from error


def _prepare(models: Models, settings: Settings) -> None:
    global _tokenizer
    torch.set_num_threads(1)
    _tokenizer = ClipTokenizer(models, settings)


def _run(record: ClipRecord) -> Outcome:
    assert _tokenizer is not None
    return _tokenizer(record)
