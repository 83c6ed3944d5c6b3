"""Stopping on SIGTERM and SIGINT: the running update is finished, a state is saved, and then training raises."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from ..errors import SirenError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO_SECONDS = 5.0


class TrainingStoppedError(SirenError):
    """Training was stopped by a signal, after it saved a state. `exit_code` is the shell's: 143 for SIGTERM, 130."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number
        self.exit_code = 128 + number


class StopSignals:
    """Inside this context a first SIGTERM or SIGINT only sets `received`; a second one does what it always did.

    A SIGTERM that follows another within 5 s is taken for the same: SLURM signals every process of a step, and torchrun
    passes on to its processes what it got. Outside the main thread signals cannot be caught and are left alone.
    """

    def __init__(self) -> None:
        self.received = 0
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received:
            if number == self.received == signal.SIGTERM and now - self._when < _ECHO_SECONDS:
                return
            self._restore()
            signal.raise_signal(number)
            return
        self.received, self._when = number, now
        print(f"{signal.Signals(number).name}: saving; once more stops at once", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
