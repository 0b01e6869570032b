"""What is set for the process: arrays that are freed serve the next step (docs/benchmarks.md)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dptrain_torch import process

COUNT = """
import resource
import torch
from dptrain.config import Performance
from dptrain_torch.backend import make_backend
make_backend(Performance(device="cpu", prefer="{prefer}"))
def arrays():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones({mib} * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
arrays()
print(arrays())
"""


def faults(mib: int, prefer: str, **environment: str) -> int:
    """Page faults of eight arrays, one after the other, once eight others have been freed."""
    base = {name: value for name, value in os.environ.items() if name not in process.SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(mib=mib, prefer=prefer)],
        capture_output=True, text=True, check=True, env=base | {"THP_MEM_ALLOC_ENABLE": "0"} | environment,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(not process.adjust(), reason="another libc, or an environment that has decided")
def test_freed_arrays_are_used_again() -> None:
    """Also those above 32 MiB, unless memory is preferred to speed or the environment says otherwise."""
    pages = 8 * 2**20 // os.sysconf("SC_PAGESIZE")  # of eight arrays, for each of their MiB
    assert faults(24, "memory") < pages
    assert faults(48, "speed") < pages
    assert faults(48, "memory") > 40 * pages
    assert faults(48, "speed", MALLOC_TRIM_THRESHOLD_="131072") > 40 * pages
