"""What becomes of the memory of freed arrays: it serves the next step (docs/benchmarks.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dptrain import allocator

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
    base = {name: value for name, value in os.environ.items() if name not in allocator.SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(mib=mib, prefer=prefer)],
        capture_output=True, text=True, check=True, env=base | {"THP_MEM_ALLOC_ENABLE": "0"} | environment,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(not allocator.adjust(), reason="another libc, or an environment that has decided")
def test_freed_arrays_are_used_again() -> None:
    """Also those above 32 MiB, unless memory is preferred to speed or the environment says otherwise."""
    pages = 8 * 2**20 // os.sysconf("SC_PAGESIZE")  # of eight arrays, for each of their MiB
    assert faults(24, "memory") < pages
    assert faults(48, "speed") < pages
    assert faults(48, "memory") > 40 * pages
    assert faults(48, "speed", MALLOC_TRIM_THRESHOLD_="131072") > 40 * pages


@pytest.mark.parametrize("setting", [None, *allocator.SETTINGS])
def test_memory_is_kept_unless_the_environment_decides(setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda name, value: told.append((name, value)) or 1)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    for name in allocator.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if setting:
        monkeypatch.setenv(setting, "1")
    assert allocator.keep_pages() == (setting is None)
    assert allocator.keep_large(True) == allocator.keep_large(False) == (setting is None)
    assert told == ([] if setting else [(-1, 2**31 - 1), (-3, 32 * 2**20), (-4, 0), (-4, 65536)])
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: SimpleNamespace())  # a libc without it
    assert not allocator.keep_pages()
