"""What noise costs: nanoseconds for a value that is added to a sum, fast against secure.

    python -m benchmarks.noise
    python -m benchmarks.noise --size 50000000 --dtype float64

Both kinds use every core that the process may run on; ``taskset -c 0`` before the command measures one.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import get_args

import numpy as np

from dptrain.mechanism import NoiseKind
from dptrain.randomness import NOISE, RandomKey, StepNoise


def measure(kind: NoiseKind, size: int, dtype: str, repeats: int) -> float:
    """Nanoseconds per value, the least of some releases.

    Args:
        kind: ``fast`` or ``secure``.
        size: values of the parameter.
        dtype: ``float32`` or ``float64``.
        repeats: releases.
    Returns:
        The time.
    """
    key, values, times = RandomKey.make(NOISE), np.ones(size, dtype), []
    StepNoise(key, 0, kind).added_to(values, 0, 1.0)  # tables, threads and memory
    for step in range(1, repeats + 1):
        begin = time.perf_counter()
        StepNoise(key, step, kind).added_to(values, 0, 1.0)
        times.append(time.perf_counter() - begin)
    return min(times) / size * 1e9


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000_000, help="values of the parameter")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    chosen = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for kind in get_args(NoiseKind):
        taken = measure(kind, chosen.size, chosen.dtype, chosen.repeats)
        print(f"{kind:6s}  {chosen.dtype}, {chosen.size:,} values, {cores} core{'s' if cores != 1 else ''}: {taken:5.1f} ns per value")


if __name__ == "__main__":
    main()
