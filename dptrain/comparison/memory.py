"""Peak memory of a step: the device's allocator where it counts, else the process's high-water mark."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from dptrain.errors import RunError

OUT_OF_MEMORY = 77  # exit code of a process that passed its limit
STATUS = Path("/proc/self/status")


class Meter(Protocol):
    """Bytes in use, and the most since ``reset``."""

    source: str

    def now(self) -> int:
        """Bytes in use."""
        ...

    def reset(self) -> None:
        """Forget the peak."""
        ...

    def peak(self) -> int:
        """The most bytes in use since ``reset``."""
        ...


class ProcessMeter:
    """Resident memory of this process, on Linux.

    Raises:
        RunError: the system does not tell.
    """

    source = "resident memory of the process"

    def __init__(self) -> None:
        if not STATUS.exists():
            raise RunError("Peak memory on a CPU is read from /proc, which only Linux has; measure time only, or on an accelerator.")

    def read(self, key: str) -> int:
        """One line of the process's status, in bytes."""
        for line in STATUS.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
        raise RunError(f"{STATUS} has no {key}.")

    def now(self) -> int:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # what was freed goes back to the system, else it would count as in use
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        return self.read("VmRSS")

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return self.read("VmHWM")


def meter(backend: Any) -> Meter:
    """How a backend's memory is measured.

    Args:
        backend: the backend; its ``device_meter()`` counts where it has a device with an allocator of its own.
    Returns:
        The meter.
    Raises:
        RunError: the system does not tell.
    """
    own: Meter | None = backend.device_meter()
    return own if own is not None else ProcessMeter()


def end_above(limit: int, measured: Meter) -> None:
    """End this process when it uses more than a limit, before the machine has to.

    Args:
        limit: bytes.
        measured: of the process; a device's allocator refuses by itself, and its peak is compared afterwards.
    """
    if not isinstance(measured, ProcessMeter):
        return

    def watch() -> None:
        while True:
            if measured.read("VmRSS") > limit:
                os._exit(OUT_OF_MEMORY)
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
