"""Where a training step goes: forward, cotangents, norms, sums, noise, update, data.

The parts of a step name themselves with ``phase``, which does nothing unless a profile is running. Times are exclusive: a norm that is
taken inside of the backward pass counts as norm alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

PHASES = ("data", "ledger", "forward", "cotangents", "gradients", "norms", "sums", "noise", "update", "projection", "other")
_NOTHING = nullcontext()
_running: Profile | None = None


class Profile:
    """Seconds per phase, over the steps that ran while it was running; the first step, which warms up, is left out.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.wait: Callable[[], None] = lambda: None
        self.seconds: dict[str, float] = {}
        self.steps = -1  # of which the figures are
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def running(self, wait: Callable[[], None]) -> Iterator[Profile]:
        """Measure what runs inside.

        Args:
            wait: returns when the device has finished, called wherever a phase ends.
        """
        global _running
        before, self.wait, _running = _running, wait, self
        try:
            yield self
        finally:
            _running = before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside, but for phases within it."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step; what belongs to no phase in it is ``other``."""
        with self.phase("other"):
            yield
        self.steps += 1
        if self.steps == 0:
            self.seconds.clear()

    def _turn(self) -> None:
        """Give the time since the last turn to the innermost open phase."""
        if self._open:
            self.wait()
        now = self.clock()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def figures(self) -> dict[str, Any]:
        """Milliseconds of a step per phase, as plain data."""
        steps = max(self.steps, 0)
        found = {name: self.seconds[name] / steps * 1e3 for name in PHASES if steps and name in self.seconds}
        return {"steps": steps, "milliseconds": found, "private": False}

    def __str__(self) -> str:
        from dptrain.tables import profile_table, render

        return render(profile_table(self))


def phase(name: str) -> AbstractContextManager[Any]:
    """A part of a step, by one of the names in ``PHASES``."""
    return _NOTHING if _running is None else _running.phase(name)


def step() -> AbstractContextManager[Any]:
    """A whole step."""
    return _NOTHING if _running is None else _running.step()
