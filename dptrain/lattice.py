"""Secure noise: what is released lies on a lattice, and where on it is decided by integers alone.

``S + s Z`` in floating point is not the Gaussian mechanism: which numbers can come out, and how often, depends on S in the last bits, and
with noise from a finite set of floats an observer may tell S from S' with certainty (Mironov 2012; Jin et al. 2022; Haney et al. 2022).
Here, with ``g = 2^-32 s`` and the sum S of a parameter of d numbers,

    n = q(S) + R,     q(S) = round(clamp(S / g)),     R = round(2^32 Z) with Z standard normal, by ``exact_normal.py``

is all that depends on the data, and ``n g`` is released. As q(S) is whole, ``n = round((g q(S) + s Z) / g)``: this is post-processing of
the Gaussian mechanism on real numbers, applied to ``g q(S)``. So every accountant holds for n exactly, and for whatever is computed from
it: the product ``n g`` in float64, its rounding to float32, the update. Nothing remains to be said about the floats that come out.

What the lattice costs is sensitivity. A quotient in float64 errs by up to 1/8 where it is below 2^51, and a larger one is clamped to that;
rounding errs by up to 1/2. So every coordinate of q(S) is within 5/8 of ``clamp(S / g)``, and as clamping moves no two points apart,

    ||g q(S) - g q(S')|| <= ||S - S'|| + 5/4 g sqrt(d).                                                                   (1)

``mechanism.event_noise_multiplier`` pays for the second term. The clamp is at 2^19 standard deviations.

What (1) takes for granted is ``||S - S'||`` itself, of the sums as floats: that is what ``mechanism.FLOAT_MARGIN`` is for (docs/noise.md).

*Source:* Mironov 2012 (CCS), "On significance of the least significant bits for differential privacy"; Jin, McMurtry, Rubinstein and
Ohrimenko 2022 (arXiv:2112.05307); Haney, Desfontaines, Hartman, Shrestha and Hay 2022 (arXiv:2207.13793).
"""

from __future__ import annotations

import functools
import threading

import numpy as np

from dptrain.errors import ConfigError
from dptrain.exact_normal import BITS, CHUNK, fill
from dptrain.gaussian import threads

LARGEST = 2.0**51  # of a sum, in units of the lattice; with the noise it stays below 2^53, up to where float64 holds every integer
SMALLEST_STD, LARGEST_STD = 2.0**-900, 2.0**900  # between them ``2^-32 s`` and every ``n g`` are normal numbers


def spacing(std: float) -> float:
    """The lattice of a standard deviation.

    Args:
        std: standard deviation s of the noise.
    Returns:
        ``2^-32 s``, exactly.
    Raises:
        ConfigError: s is so small or so large that float64 could not hold it exactly.
    """
    if not SMALLEST_STD <= std <= LARGEST_STD:
        raise ConfigError(f"A noise standard deviation of {std!r} is outside what secure noise can represent; scale the loss or the bound.")
    return std * 2.0**-BITS


class _Scratch(threading.local):
    """Arrays of one thread that are used again."""

    def __init__(self) -> None:
        self.noise, self.sums = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
        self.wide = np.empty(CHUNK, np.float64)


_SCRATCH = _Scratch()


def to_lattice(values: np.ndarray, step: float, wide: np.ndarray, out: np.ndarray) -> None:
    """``q(S)``.

    Args:
        values: S, float32 or float64 ``[n]``.
        step: g.
        wide: float64 ``[n]`` to work in.
        out: int64 ``[n]``, written.
    Guarantee: equation (1), for finite values. Others cannot occur in a sum of bounded gradients; what is not a number counts as the
        lowest, so that nothing but a lattice point is ever released.
    """
    with np.errstate(over="ignore"):
        np.divide(values, step, out=wide, dtype=np.float64)
    np.fmax(wide, -LARGEST, out=wide)
    np.fmin(wide, LARGEST, out=wide)
    np.rint(wide, out=wide)
    np.copyto(out, wide, casting="unsafe")


def released(key: bytes, step: int, stream: int, values: np.ndarray, std: float, start: int, out: np.ndarray) -> None:
    """One chunk of n.

    Args:
        key: 16 bytes.
        step, stream: address of the release and the parameter.
        values: all of the parameter's sum, float32 or float64.
        std: standard deviation of the noise.
        start: where the chunk begins, a multiple of ``CHUNK``.
        out: int64, as long as the chunk; written.
    Guarantee: equation (1), and n is post-processing of the Gaussian mechanism with this standard deviation on ``g q(S)``.
    """
    sums = _SCRATCH.sums[: len(out)]
    to_lattice(values[start : start + CHUNK], spacing(std), _SCRATCH.wide[: len(out)], sums)
    fill(key, step, stream, start // CHUNK, out)
    out += sums


def add_noise(key: bytes, step: int, stream: int, values: np.ndarray, std: float, dtype: type | None = None) -> np.ndarray:
    """``n g`` for one parameter.

    Args:
        key: 16 bytes.
        step, stream: address of the release and the parameter.
        values: float32 or float64 ``[size]``; read only.
        std: standard deviation of the noise.
        dtype: of the result, that of the values by default.
    Returns:
        A new array ``[size]``; value i depends on the arguments and on i alone, not on the number of threads.
    Raises:
        ConfigError: a standard deviation beyond what float64 can hold.
    Guarantee: a function of n alone, see ``released``.
    """
    out, step_size = np.empty(values.shape, values.dtype if dtype is None else dtype), spacing(std)

    def part(start: int) -> None:
        size = len(out[start : start + CHUNK])
        whole, wide = _SCRATCH.noise[:size], _SCRATCH.wide[:size]
        released(key, step, stream, values, std, start, whole)
        np.copyto(wide, whole)
        wide *= step_size
        with np.errstate(over="ignore"):
            np.copyto(out[start : start + CHUNK], wide, casting="same_kind")

    starts = range(0, len(values), CHUNK)
    if len(starts) > 1:
        list(threads().map(part, starts))
    elif starts:
        part(0)
    return out


def released_integers(key: bytes, step: int, stream: int, values: np.ndarray, std: float) -> np.ndarray:
    """The integers n behind ``add_noise``, for tests and audits.

    Args:
        key, step, stream, values, std: as there.
    Returns:
        int64 ``[size]``
    """
    out = np.empty(values.shape, np.int64)
    write = functools.partial(released, key, step, stream, values, std)
    for start in range(0, len(values), CHUNK):
        write(start, out[start : start + CHUNK])
    return out
