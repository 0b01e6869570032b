"""What can go wrong at a system call: the process dies before, half-way through or after it, or the disk is full.

The calls are those through which dptrain writes: ``os.write``, ``os.fsync``, ``os.replace`` and ``os.ftruncate``, and the writes of the
files that it opens.
"""

from __future__ import annotations

import builtins
import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

BEFORE, HALF, AFTER = "before", "half", "after"


def die() -> None:
    """As a machine that loses its power: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    """A disk without space."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Faults:
    """Counts the calls, and lets the one of a given number fail.

    Args:
        at: its number, from 0; -1 for none.
        moment: ``before``, ``half`` (of what is written) or ``after``.
        happen: what happens there.
        lasting: whether it also happens at every later call.
    """

    def __init__(self, at: int = -1, moment: str = BEFORE, happen: Callable[[], None] = die, lasting: bool = False) -> None:
        self.at, self.moment, self.happen, self.lasting = at, moment, happen, lasting
        self.calls: list[str] = []

    def around(self, name: str, call: Callable[..., Any], data: Any = None) -> Any:
        """One call; ``call`` takes the data that it is to write."""
        number = len(self.calls)
        self.calls.append(name)
        here = number == self.at or (self.lasting and 0 <= self.at < number)
        if here and self.moment == BEFORE:
            self.happen()
        if here and self.moment == HALF and data is not None:
            call(data[: len(data) // 2])
            self.happen()
        result = call(data)
        if here:
            self.happen()
        return result

    @contextmanager
    def in_force(self) -> Iterator[Faults]:
        """Put the faults into this process."""
        real = {name: getattr(os, name) for name in ("write", "fsync", "replace", "ftruncate")}
        with ExitStack() as stack:
            stack.enter_context(patch("os.write", lambda fd, data: self.around("write", lambda d: real["write"](fd, d), data)))
            for name in ("fsync", "replace", "ftruncate"):
                stack.enter_context(patch(f"os.{name}", lambda *a, n=name: self.around(n, lambda _: real[n](*a))))
            for module in ("checkpoint", "rundir"):
                stack.enter_context(patch(f"dptrain.{module}.open", self._open, create=True))
            yield self

    def _open(self, *args: Any, **kwargs: Any) -> Any:
        file = builtins.open(*args, **kwargs)  # noqa: SIM115 - whoever opens it closes it
        return Written(file, self) if args[1] in ("wb", "a") else file


class Written:
    """A file whose writes can fail."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self.file, self.faults = file, faults

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        """Through to the kernel, so that what was written before a kill is there after it."""

        def through(part: Any) -> None:
            self.file.write(part)
            self.file.flush()

        self.faults.around("file", through, data)

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return int(self.file.fileno())
