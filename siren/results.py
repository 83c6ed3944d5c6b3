"""results.jsonl: a line for each finished clip, appended once its files are on the disk, and read back to go on.

A kill leaves at most a line that was cut short and files without a line; both are made again. So the list costs the
same for every clip, however many there are. When all are finished, its lines are put in the order of the prompts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from .errors import InputError, SirenError


class Line(NamedTuple):
    """A line of the list: its number from 1, the byte it begins at and ends before, and what it says."""

    number: int
    start: int
    end: int
    about: dict[str, Any]


class Results:
    """The list of one run's clips at `path`. A context: until its end no other process can write the list.

    `mark` is in the names of the temporary files of this run, and of no other's that writes into the same folder.
    """

    def __init__(self, path: Path, mark: str) -> None:
        self.path = path
        self.mark = mark
        self._file: Any = None
        self._places: dict[str, tuple[int, int]] = {}  # of the lines of each job: first byte, and the one after them
        self._size = 0

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, is_finished: Callable[[str, list[Line]], bool]) -> set[str]:
        """The ids of the finished jobs of a list that exists. Writes nothing.

        is_finished(id, lines) judges the lines of one job, and raises what is wrong with them. Raises InputError for a
        list that is damaged before its last line, or that another process is writing.
        """
        self._open()
        for name, group in groupby(self._lines(), key=lambda line: str(line.about["id"])):
            lines = list(group)
            if name in self._places:
                raise InputError(f"{self.path}, line {lines[0].number}: {name!r} is listed twice; {_START}")
            if is_finished(name, lines):
                self._places[name] = (lines[0].start, lines[-1].end)
        return set(self._places)

    def begin(self, overwrite: bool = False) -> None:
        """Make the list, or drop from one that was read what is not finished; remove what kills left.

        Raises InputError if it exists, was not read and is not to be overwritten.
        """
        if self._file is None:
            self._open()
            if self._size and not overwrite:
                raise InputError(f"{self.path} exists; go on with it (--resume), or {_START}")
        try:
            for path in self.path.parent.glob(f".siren-{self.mark}*"):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise SirenError(f"cannot clear {self.path.parent}: {error.strerror or error}") from error
        self._rewrite(self._places)

    def append(self, name: str, lines: list[dict[str, Any]]) -> None:
        """Add the lines of job `name`, all or none. Raises SirenError if the disk is full."""
        data = "".join(json.dumps(about, ensure_ascii=False) + "\n" for about in lines).encode()
        try:
            _write(self._file, data)
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # otherwise the next start drops what was cut short
                os.ftruncate(self._file.fileno(), self._size)
            raise SirenError(
                f"cannot write {self.path}: {error.strerror}; make room and go on with --resume"
            ) from error
        self._places[name] = (self._size, self._size + len(data))
        self._size += len(data)

    def finish(self, order: Iterable[str]) -> None:
        """Put the lines in the order of these jobs. A kill leaves the list as it was or as it will be."""
        self._rewrite(order)

    def _open(self) -> None:
        if self._file is None:
            try:
                self._file = self.path.open("ab", buffering=0)
                _lock(self._file, self.path)
                self._size = os.fstat(self._file.fileno()).st_size
            except OSError as error:
                raise SirenError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _lines(self) -> Iterator[Line]:
        """The lines up to the first that was cut short, which must be the last."""
        bad, end = 0, 0
        with self.path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if bad:
                    raise InputError(f"{self.path}, line {bad} is damaged or not of this version of siren; {_START}")
                start, end = end, end + len(data)
                try:
                    about = json.loads(data)
                    good = data.endswith(b"\n") and all(isinstance(about[key], str) for key in ("id", "file", "sha256"))
                except (ValueError, RecursionError, KeyError, TypeError):
                    good = False
                if good:
                    yield Line(number, start, end, about)
                else:
                    bad = number

    def _rewrite(self, order: Iterable[str]) -> None:
        """Put the lines of these jobs, in this order, in the place of the file, unless they are what it holds."""
        names = list(order)
        end = 0
        for name in names:
            if self._places[name][0] != end:
                break
            end = self._places[name][1]
        else:
            if end == self._size:
                return
        places: dict[str, tuple[int, int]] = {}
        temporary = self.path.with_name(f".siren-{self.mark}{secrets.token_hex(8)}")
        try:
            file = temporary.open("xb", buffering=0)
            try:
                _lock(file, temporary)
                size = 0
                with self.path.open("rb") as old:
                    for name in names:
                        start, end = self._places[name]
                        old.seek(start)
                        _write(file, old.read(end - start))
                        places[name] = (size, size + end - start)
                        size += end - start
                os.fsync(file.fileno())
                temporary.replace(self.path)
            except BaseException:
                file.close()
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        except OSError as error:
            reason = f"{error.strerror or error}; make room and go on with --resume"
            raise SirenError(f"cannot write {self.path}: {reason}") from error
        self._file.close()
        self._file, self._places, self._size = file, places, size


_START = "choose another folder, or start anew with --overwrite"


def check_same(line: Line, wanted: dict[str, Any], path: Path) -> None:
    """Raise InputError naming everything in which a line is not what it would be if the clip were made now."""
    changed = [
        f"{name} was {_show(line.about.get(name))} and is {_show(value)}"
        for name, value in wanted.items()
        if line.about.get(name) != value or name not in line.about
    ]
    if changed:
        raise InputError(
            f"{path}, line {line.number} was made with other settings: {'; '.join(changed)}. Use the old ones, {_START}"
        )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write(file: Any, data: bytes) -> None:
    """All of `data` to an unbuffered file, which may take less at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _lock(file: Any, path: Path) -> None:
    """Hold an open file for this process, however it ends. Where the file system has no locks, go on without."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another process is writing {path}; wait for it or stop it") from error
    except OSError:
        return
    if os.fstat(file.fileno()).st_ino != path.stat().st_ino:  # it has just been replaced
        raise InputError(f"another process is writing {path}; wait for it or stop it")
