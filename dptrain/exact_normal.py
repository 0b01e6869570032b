"""Integers distributed as ``round(2^32 Z)``, Z a standard normal: exactly, by comparing the bits of uniforms that are drawn as needed.

The half-normal is sampled by cells of width ``w = 2^-6`` and rejection:

1. cell i with probability in proportion to ``exp(-(i w)^2 / 2)``, by a uniform against a table of 256-bit integers;
2. a uniform position u in ``[0, 1)`` within the cell, z = (i + u) w;
3. accepted with probability ``exp(-t)``, ``t = u w (i w + u w / 2)``, so that z has density in proportion to
   ``exp(-(i w)^2 / 2) exp(-t) = exp(-z^2 / 2)``; otherwise all is drawn anew;
4. a sign.

One word of 64 bits begins all four uniforms, and integer operations on it settle all but about 2.7 % of values. Its first 14 bits name the
cell, unless a boundary of the table shares them. 27 bits of the position are all that ``round(2^32 z)`` depends on. As ``exp(-t)`` is at
least ``1 - w^2 (i + 1/2)`` anywhere in the cell, 22 bits of the last uniform are enough where they are below that. The other values get
further words for each uniform, 64 bits at a time. A comparison is decided when the bits decide it: in float64 where the two sides are
further apart than its error by far, and by ``decimal`` with as many digits as it takes where they are not.

The only deviation from the distribution above: the table is rounded to 256 bits and ends at 19 standard deviations, ``DISTANCE`` in total
variation for each value. 2^60 values, more than any training draws, are within 2^-180 of the exact ones together, which adds at most
``(1 + e^epsilon) 2^-180`` to delta: nothing that any printed digit could show.

The bits are AES-256 in counter mode. Every chunk of every parameter and release has a key of its own, derived by BLAKE2 from the run's,
so that no stream is long enough for the missing repetitions among its blocks to be noticed: with n blocks that advantage is below
``n^2 / 2^129``, 2^-95 for a chunk. A word's address is ``(attempt, word, position)``; nothing is shared with ``gaussian.py``.

*Source:* von Neumann 1951 for the comparison; Karney 2016 (arXiv:1303.6257) for exact sampling by digits drawn as needed.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal, localcontext
from fractions import Fraction

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BITS = 32  # of 1 / spacing: values are round(2^BITS Z)
CELL_BITS = 6  # cells are 2^-6 wide
RANGE = 19  # standard deviations that the table covers; the mass beyond is below 2^-260
TABLE_BITS = 256
DISTANCE = 2.0**-240  # between a value's distribution and that of round(2^BITS Z), in total variation; a test computes it
CHUNK = 1 << 17  # values of one derived key, made at once; part of the address, so another number would be other noise
# A word: TOP bits of the cell's uniform, the sign, POSITION bits of the position, ACCEPT bits of the acceptance's uniform.
TOP, POSITION, ACCEPT = 14, 27, 22
STEP = BITS - CELL_BITS  # a cell is 2^STEP wide in the units of the result, and the position needs one bit more for rounding
DOUBT = 2.0**-45  # an upper bound on the error of the float64 comparison, generously: its operations err by less than 2^-49
BLOCK = 16


@dataclass(frozen=True)
class Table:
    """The cells' cumulative distribution.

    Args:
        starts: ``starts[i] / 2^256`` is the probability of the cells before i, rounded down.
        tops: the first 64 bits of each.
        guide: by the first ``TOP`` bits of a uniform: the cell, shifted to where it stands in a result, plus the number that the first
            ``ACCEPT`` bits of the acceptance's uniform have to be below to be accepted wherever in the cell the value lies; that number is
            0 where the bits do not decide the cell.
    """

    starts: tuple[int, ...]
    tops: np.ndarray
    guide: np.ndarray


def digits(precision: int) -> Context:
    """Decimal arithmetic with so many digits, whatever a program has set for its own."""
    return Context(prec=precision, rounding=ROUND_HALF_EVEN, Emin=-999999, Emax=999999, clamp=0, flags=[], traps=[])


@functools.cache
def table() -> Table:
    """The table, made once in a few hundredths of a second.

    Guarantee: each of the starts, over 2^256, is within ``2^-256 + 10^-90`` of the exact one.
    """
    count = RANGE << CELL_BITS
    with localcontext(digits(100)):
        masses = [(-Decimal(i * i) / (1 << (2 * CELL_BITS + 1))).exp() for i in range(count)]
        total, before, starts = sum(masses), Decimal(0), []
        for mass in masses:
            starts.append(int((before / total * (1 << TABLE_BITS)).to_integral_value(ROUND_FLOOR)))
            before += mass
    rest = TABLE_BITS - TOP
    buckets = np.arange(1 << TOP)
    first = np.searchsorted([-(-start >> rest) for start in starts], buckets, "right") - 1  # the cell where a bucket begins
    last = np.searchsorted([start >> rest for start in starts], buckets, "right") - 1  # and where it ends
    # exp(-t) >= 1 - t, and t is at most w^2 (i + 1/2) in cell i.
    below = (1 << ACCEPT) - ((2 * first + 1) << (ACCEPT - 2 * CELL_BITS - 1))
    guide = (first << STEP) + np.where(first == last, below, 0)
    return Table(tuple(starts), np.array([start >> (TABLE_BITS - 64) for start in starts], np.uint64), guide.astype(np.int64))


class Words:
    """The random words of one chunk.

    Args:
        key: of the run, 16 bytes.
        step, stream: address of the release and the parameter.
        chunk: index of the chunk.
    """

    def __init__(self, key: bytes, step: int, stream: int, chunk: int) -> None:
        if not (0 <= step < 1 << 64 and 0 <= stream < 1 << 64):
            raise ValueError(f"step {step}, stream {stream}: both must be whole numbers of at most 64 bits.")
        address = b"".join(part.to_bytes(8, "big") for part in (step, stream, chunk))
        derived = hashlib.blake2b(address, key=key, person=b"dptrain/lattice", digest_size=32).digest()
        self._cipher = algorithms.AES(derived)

    def __repr__(self) -> str:
        return "Words(...)"

    def first(self, zeros: memoryview, into: bytearray) -> None:
        """Write the first word of every position over ``into``, as many bytes as there are zeros; the cipher wants 15 more at its end."""
        Cipher(self._cipher, modes.CTR(bytes(BLOCK))).encryptor().update_into(zeros, into)

    def at(self, attempt: int, word: int, positions: np.ndarray, count: int = 1) -> np.ndarray:
        """Blocks of words of some positions.

        Args:
            attempt: how often the values there were rejected.
            word: index of the first block, from 1 on in the first attempt, whose block 0 is ``first``'s.
            positions: ``[n]``, within the chunk.
            count: blocks of each position.
        Returns:
            ``[n, 2 count]`` words.
        """
        counters = np.empty((len(positions), count, 2), ">u8")
        counters[:, :, 0] = (attempt << 32) + word + np.arange(count)
        counters[:, :, 1] = positions[:, None]
        into = bytearray(counters.nbytes + BLOCK - 1)
        # Block by block under counters that are all different: counter mode, at scattered places.
        size = Cipher(self._cipher, modes.ECB()).encryptor().update_into(counters.tobytes(), into)
        return np.frombuffer(into, "<u8", size // 8).astype(np.uint64).reshape(len(positions), 2 * count)


class _Scratch(threading.local):
    """Arrays of one thread that are used again."""

    def __init__(self) -> None:
        self.stream = bytearray(8 * CHUNK + BLOCK - 1)
        self.arrays = np.empty((2, CHUNK), np.int64)


_SCRATCH = _Scratch()
_ZEROS = memoryview(bytes(8 * CHUNK))


def fill(key: bytes, step: int, stream: int, chunk: int, out: np.ndarray) -> None:
    """Write one chunk of independent ``round(2^BITS Z)``.

    Args:
        key: 16 bytes.
        step, stream: address of the release and the parameter.
        chunk: index of the chunk.
        out: int64, at most ``CHUNK`` of them; the i-th depends on the other arguments and on i alone.
    Guarantee: with uniform and independent bits, each is within ``DISTANCE`` of that distribution.
    """
    size, cells, words = len(out), table(), Words(key, step, stream, chunk)
    words.first(_ZEROS[: 8 * size], _SCRATCH.stream)
    drawn = np.frombuffer(_SCRATCH.stream, "<u8", size).view("<i8")
    found, part = _SCRATCH.arrays[:, :size]
    np.right_shift(drawn.view("<u8"), 64 - TOP, out=part.view(np.uint64))
    np.take(cells.guide, part, out=found, mode="clip")
    np.bitwise_and(drawn, (1 << ACCEPT) - 1, out=part)
    np.bitwise_and(found, (1 << ACCEPT) - 1, out=out)
    later = np.flatnonzero(part >= out)
    np.bitwise_and(found, -1 << STEP, out=found)
    np.right_shift(drawn, ACCEPT, out=part)
    np.bitwise_and(part, (1 << POSITION) - 1, out=part)
    part += 1
    part >>= 1  # rounded to nearest: the bits that follow cannot change it
    found += part
    np.left_shift(drawn.view("<u8"), TOP, out=part.view(np.uint64))
    part >>= 63  # -1 where the sign bit is set
    np.bitwise_xor(found, part, out=found)
    np.subtract(found, part, out=out)
    if len(later):
        out[later] = settle(words, later, drawn[later].view(np.uint64))


def settle(words: Words, positions: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The values that their first words do not settle.

    Args:
        words: of the chunk.
        positions: within the chunk, ``[n]``.
        drawn: their first words.
    Returns:
        ``[n]``
    """
    values, pending, attempt = np.empty(len(positions), np.int64), np.arange(len(positions)), 0
    while len(pending):
        at = positions[pending]
        if attempt:
            drawn = words.at(attempt, 0, at)[:, 0]
        more = words.at(attempt, 1, at, 2)
        cell = find_cells(words, attempt, at, drawn, more[:, 0])
        ok = accepted(words, attempt, at, cell, drawn, more[:, 1], more[:, 2])
        position = (drawn >> np.uint64(ACCEPT)).astype(np.int64) & ((1 << POSITION) - 1)
        size = (cell << STEP) + ((position + 1) >> 1)
        negative = (drawn >> np.uint64(POSITION + ACCEPT)) & np.uint64(1) != 0
        values[pending[ok]] = np.where(negative, -size, size)[ok]
        pending, attempt = pending[~ok], attempt + 1
    return values


def find_cells(words: Words, attempt: int, at: np.ndarray, drawn: np.ndarray, more: np.ndarray) -> np.ndarray:
    """The cells, by the first 64 bits of their uniforms; by 256 where those are a boundary's."""
    cells = table()
    top = (drawn & np.uint64((1 << TOP) - 1 << (64 - TOP))) | (more >> np.uint64(TOP))
    found = np.searchsorted(cells.tops, top, "right") - 1
    for i in np.flatnonzero(cells.tops[found] == top):
        bits = int(top[i])
        for word in words.at(attempt, 3, at[i : i + 1], 2)[0][: TABLE_BITS // 64 - 1]:
            bits = bits << 64 | int(word)
        found[i] = bisect_right(cells.starts, bits) - 1
    return found


def accepted(
    words: Words, attempt: int, at: np.ndarray, cell: np.ndarray, drawn: np.ndarray, position: np.ndarray, accept: np.ndarray
) -> np.ndarray:
    """Whether uniforms of 84 bits and more are below ``exp(-t)``, for positions of 91 bits and more."""
    head, low = (drawn >> np.uint64(ACCEPT)) & np.uint64((1 << POSITION) - 1), drawn & np.uint64((1 << ACCEPT) - 1)
    u = head * 2.0**-POSITION + position * 2.0 ** -(POSITION + 64)
    above = np.exp(u * (cell + u / 2) * -(2.0 ** (-2 * CELL_BITS))) - (low * 2.0**-ACCEPT + accept * 2.0 ** -(ACCEPT + 64))
    ok = above > 0
    for i in np.flatnonzero(np.abs(above) <= DOUBT):
        ok[i] = accepted_exactly(
            int(cell[i]),
            int(head[i]) << 64 | int(position[i]),
            int(low[i]) << 64 | int(accept[i]),
            lambda word, i=i: words.at(attempt, 5 + word, at[i : i + 1])[0],  # type: ignore[misc]
        )
    return ok


def accepted_exactly(cell: int, position: int, accept: int, more: Callable[[int], np.ndarray]) -> bool:
    """Whether a uniform is below ``exp(-t)``, by intervals that shrink with every two words until they are apart.

    Args:
        cell: i.
        position: the first ``POSITION + 64`` bits of u.
        accept: the first ``ACCEPT + 64`` bits of the uniform.
        more: index -> two further words, one for each.
    Returns:
        Whether it is. More words are needed with probability 2^-60 or so, and for ever with probability 0.
    """
    words = 1
    while True:
        scale = 1 << (POSITION + 64 * words)
        with localcontext(digits(40 * (words + 1))) as context:
            slack = Decimal(10) ** (4 - context.prec)  # three correctly rounded operations on numbers below 1 err by less

            def chance(u: int, scale: int = scale) -> Decimal:
                exponent = Fraction(u * (2 * cell * scale + u), scale * scale << (2 * CELL_BITS + 1))
                return (-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp()

            whole = Decimal(1 << (ACCEPT + 64 * words))
            if Decimal(accept + 1) / whole + slack <= chance(position + 1):
                return True
            if Decimal(accept) / whole - slack >= chance(position):
                return False
        further, words = more(words - 1), words + 1
        position, accept = position << 64 | int(further[0]), accept << 64 | int(further[1])


def noise(key: bytes, step: int, stream: int, size: int) -> np.ndarray:
    """Independent ``round(2^BITS Z)``, in one array; for tests and measurements, since ``lattice.py`` goes by chunks.

    Args:
        key: 16 bytes.
        step, stream: address of the release and the parameter.
        size: number of values.
    Returns:
        int64 ``[size]``
    """
    out = np.empty(size, np.int64)
    for chunk in range(math.ceil(size / CHUNK)):
        fill(key, step, stream, chunk, out[chunk * CHUNK : (chunk + 1) * CHUNK])
    return out
