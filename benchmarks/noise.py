"""What noise costs, fast against secure: nanoseconds for a value that is added to a sum. And what rounds a sum before any noise.

    python -m benchmarks.noise
    python -m benchmarks.noise --size 50000000 --dtype float64
    python -m benchmarks.noise --sums

Both kinds use every core that the process may run on; ``taskset -c 0`` before the command measures one. ``--sums`` adds up gradients
of norm 1, in physical batches of 128, with one more example in the first place and without it, and prints by how much the norm of the
difference of the two sums exceeds 1, at the worst of ten seeds: the part of ``mechanism.FLOAT_MARGIN`` that is used.
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


def excess(count: int, aligned: bool, dtype: str, seed: int, size: int = 1000, block: int = 128) -> float:
    """How far two sums that differ by one example are apart, beyond its norm.

    Args:
        count: examples in the smaller sum.
        aligned: whether all point into nearly the same direction, so that the sum is long and its last bits are coarse.
        dtype: ``float32`` or ``float64``.
        seed: of the gradients.
        size: parameters.
        block: physical batch size; every example moves on by one place.
    Returns:
        The distance over the example's norm, less 1.
    """
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((count + 1, size)) + (10.0 * rng.standard_normal(size) if aligned else 0.0)
    gradients = (gradients / np.linalg.norm(gradients, axis=1, keepdims=True)).astype(dtype)

    def total(rows: np.ndarray) -> np.ndarray:
        found = np.zeros(size)
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            found = found + np.ones(len(part), dtype) @ part
        return found

    one = float(np.linalg.norm(gradients[0].astype(np.float64)))
    return float(np.linalg.norm(total(gradients) - total(gradients[1:]))) / one - 1.0


def sums() -> None:
    """Print one line for each kind of sum."""
    for count in (64, 1024, 16384):
        for aligned in (False, True):
            worst = {dtype: max(excess(count, aligned, dtype, seed) for seed in range(10)) for dtype in ("float32", "float64")}
            found = [f"{dtype} {value:8.1e}" for dtype, value in worst.items()]
            print(f"{count:6d} {'aligned' if aligned else 'random':7s} gradients: {', '.join(found)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000_000, help="values of the parameter")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sums", action="store_true", help="measure the rounding of sums instead")
    chosen = parser.parse_args(arguments)
    if chosen.sums:
        sums()
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for kind in get_args(NoiseKind):
        taken = measure(kind, chosen.size, chosen.dtype, chosen.repeats)
        print(f"{kind:6s}  {chosen.dtype}, {chosen.size:,} values, {cores} core{'s' if cores != 1 else ''}: {taken:5.1f} ns per value")


if __name__ == "__main__":
    main()
