"""Runs under a peer's interpreter: ``python measured.py CHILD`` reads a request from standard input and prints the reply.

Only the standard library, NumPy and the peer's packages; Python 3.9 or later. A child is a module of this folder with ``plain(request)``
and ``private(request)``, which build a step that returns when it has finished, and ``versions()``. Measured as
``dptrain/comparison/measure.py`` does: interleaved pairs in one process, or the peak of a process with one of the steps.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[[], None]
MIB = 2**20
STEPS_FOR_MEMORY = 3


def timed(step: Step) -> float:
    """Seconds of one step."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def pairs(plain: Step, private: Step, warmup: int, count: int) -> list[tuple[float, float]]:
    """Seconds of both steps, in turns."""
    for _ in range(warmup):
        plain(), private()
    return [(timed(plain), timed(private)) for _ in range(count)]


def status(key: str) -> int:
    """One line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def resident() -> int:
    """Memory of the process, without what it has freed."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("VmRSS")


def peak(build: Callable[[], Step]) -> dict[str, Any]:
    """The peak during steps, above the process with the framework loaded and no model."""
    empty = resident()
    step = build()
    for _ in range(2):  # the first steps trace and fill caches
        step()
    resident()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS_FOR_MEMORY):
        step()
    return {"total_mib": (status("VmHWM") - empty) / MIB, "meter": "resident memory of the process"}


def reply(child: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The figures that the request asks for."""
    if request["step"] == "both":
        plain, private = child.plain(request), child.private(request)
        found: dict[str, Any] = {"pairs": pairs(plain, private, request["warmup"], request["pairs"])}
    else:
        found = peak(lambda: getattr(child, request["step"])(request))
    versions = ", ".join(f"{name} {version}" for name, version in child.versions().items())
    return {**found, "yardstick": f"relative to a plain loop of its own, under {versions}"}


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    if request["checkout"]:
        sys.path.insert(0, request["checkout"])
    try:
        child = importlib.import_module(sys.argv[1])
    except ImportError as error:
        answer = {"missing": f"the peer cannot be imported ({error})"}
    else:
        try:
            answer = reply(child, request)
        except NotImplementedError as error:
            answer = {"unsupported": str(error)}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # TensorFlow's threads may take seconds to end


if __name__ == "__main__":
    main()
