"""Standard normal values from a keyed stream of bytes: AES in counter mode, then Box and Muller. Fast, and the same everywhere.

The stream is addressed, not stepped through: a 128-bit counter holds ``(step, stream, block)``, so any part of any release's noise can
be made on its own, and in parallel. AES runs in hardware; one core takes about 2.4 ns for a float32 value, two 1.7.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BLOCK = 16  # bytes per value of the counter
STEP_BITS, STREAM_BITS, BLOCK_BITS = 48, 32, 48
SPARE = 1 << (BLOCK_BITS - 1)  # where the blocks begin that refine uniforms close to zero
# Values made at once. A quarter of them would fit the second-level cache, and two threads then wait for each other at every call: 3.3 ns
# a value, no less than one thread takes; with this many 1.8.
CHUNK = 1 << 18
FINE = 256  # integers below it are refined, so that tails do not end at 6.7


def keystream(key: bytes, step: int, stream: int, block: int, size: int) -> bytes:
    """Bytes of a stream.

    Args:
        key: 16 bytes.
        step, stream: address of the stream.
        block: its first block.
        size: number of bytes.
    Returns:
        The bytes.
    Raises:
        ValueError: an address outside its range, where streams would run into each other.
    """
    into = bytearray(size + BLOCK - 1)
    _write(key, step, stream, block, memoryview(bytes(size)), into)
    return bytes(into[:size])


def _write(key: bytes, step: int, stream: int, block: int, zeros: memoryview, into: bytearray) -> None:
    """Write the bytes of ``keystream`` over the first of ``into``, as many as there are zeros; the cipher wants 15 more at its end."""
    size = len(zeros)
    blocks = block + -(-size // BLOCK)
    if not (0 <= step < 1 << STEP_BITS and 0 <= stream < 1 << STREAM_BITS and block >= 0 and blocks <= 1 << BLOCK_BITS):
        raise ValueError(f"step {step}, stream {stream}, block {block}: outside the counter; a run has fewer than 2^{STEP_BITS} steps.")
    counter = (step << (STREAM_BITS + BLOCK_BITS)) | (stream << BLOCK_BITS) | block
    Cipher(algorithms.AES(key), modes.CTR(counter.to_bytes(BLOCK, "big"))).encryptor().update_into(zeros, into)


class _Scratch(threading.local):
    """Arrays of one thread that are used again: with new ones for each chunk, the system's zeroing took two thirds of the time."""

    def __init__(self) -> None:
        self.stream = bytearray(8 * CHUNK + BLOCK - 1)
        self.arrays = np.empty((3, 4 * CHUNK), np.uint8)

    def rows(self, size: int, kind: type) -> list[np.ndarray]:
        """Three arrays ``[size]``."""
        return [row.view(kind)[:size] for row in self.arrays]


_SCRATCH = _Scratch()
_ZEROS = memoryview(bytes(8 * CHUNK))


def standard_normal(key: bytes, step: int, stream: int, size: int, dtype: type = np.float32) -> np.ndarray:
    """Independent N(0, 1) values.

    Args:
        key: 16 bytes.
        step, stream: address of the stream.
        size: number of values.
        dtype: ``float32`` or ``float64``.
    Returns:
        ``[size]``; value i depends on the arguments and on i alone, not on the number of threads.
    """
    values = np.empty(size, np.float64 if np.dtype(dtype) == np.float64 else np.float32)
    fill = functools.partial(_fill, key, step, stream, values)
    starts = range(0, size, CHUNK)
    if len(starts) > 1:
        list(threads().map(fill, starts))
    elif starts:
        fill(0)
    return values


def add_normal(key: bytes, step: int, stream: int, values: np.ndarray, std: float, dtype: type | None = None) -> np.ndarray:
    """``values + std * standard_normal(...)``, in one pass over memory.

    Args:
        key: 16 bytes.
        step, stream: address of the stream.
        values: float32 or float64 ``[size]``; read only.
        std: standard deviation.
        dtype: of the noise, that of the values by default.
    Returns:
        A new array ``[size]`` of the noise's kind: to the bit the sum of the two arrays, in the wider kind before it is rounded.
    """
    out = np.empty(values.shape, values.dtype if dtype is None else dtype)
    wide = out.dtype != values.dtype

    def fill(start: int) -> None:
        _fill(key, step, stream, out, start)
        part, given = out[start : start + CHUNK], values[start : start + CHUNK]
        part *= std
        if wide:
            np.copyto(part, given + part, casting="same_kind")
        else:
            part += given

    starts = range(0, len(values), CHUNK)
    if len(starts) > 1:
        list(threads().map(fill, starts))
    elif starts:
        fill(0)
    return out


def _fill(key: bytes, step: int, stream: int, values: np.ndarray, start: int) -> None:
    """One chunk, in place: radius from one half of its integers, angle from the other."""
    out, kind = values[start : start + CHUNK], values.dtype.type
    half = (len(out) + 1) // 2
    word = np.dtype(f"<u{values.dtype.itemsize}")
    block, size = start * word.itemsize // BLOCK, 2 * half * word.itemsize
    _write(key, step, stream, block, _ZEROS[:size], _SCRATCH.stream)
    words = np.frombuffer(_SCRATCH.stream, word, 2 * half)
    uniform, angle, part = _SCRATCH.rows(half, kind)
    scale = 2.0 ** (-8 * word.itemsize)
    np.copyto(uniform, words[:half], casting="unsafe")
    uniform *= kind(scale)
    uniform += kind(scale / 2)  # the middle of each of 2^n equal parts of (0, 1]
    small = np.flatnonzero(words[:half] < FINE)
    if len(small):
        spare = np.frombuffer(keystream(key, step, stream, SPARE + block, half * 8), "<u8")[small]
        fine = (words[:half][small].astype(np.float64) + (spare.astype(np.float64) + 0.5) * 2.0**-64) * scale
        uniform[small] = fine
    np.log(uniform, out=uniform)
    uniform *= kind(-2)
    radius = np.sqrt(uniform, out=uniform)
    np.copyto(angle, words[half:], casting="unsafe")
    angle *= kind(2 * math.pi * scale)
    np.multiply(radius, np.cos(angle, out=part), out=out[:half])
    rest = len(out) - half
    np.multiply(radius[:rest], np.sin(angle, out=part)[:rest], out=out[half:])


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Threads that fill chunks; NumPy and the cipher release Python's lock."""
    return ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
