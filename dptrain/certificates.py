"""Upper bounds of operator norms, proven for the very weights in memory. NumPy float64, the same for every framework.

Power iteration and a few Bjorck steps approach a norm from BELOW; they guess, and a proof from above follows:

* ``SymbolGram`` holds Hermitian matrices whose largest eigenvalue, times a known factor, bounds the squared operator norm: one matrix
  for a dense map, one per frequency for a convolution.
* ``largest_eigenvalue`` bounds it: exactly by ``eigvalsh`` where that is cheap; otherwise a guess ``t`` from power iteration is proven by
  the Cholesky factorisation of ``t I - G``, which exists in floating point only if ``t I - G`` is positive definite up to a rounding far
  below ``MARGIN``; if no guess can be proven, Gram iteration (Delattre et al. 2023, arXiv:2305.16173), which is always above.

A zero-padded convolution on an image is a restriction of the circular one on any torus that is large enough, so the largest norm over
the torus's frequencies is rigorous (Sedghi, Gupta, Long 2019, arXiv:1805.10408); with a stride the frequencies that alias are taken
together, which here means that only lags divisible by the stride remain. Where the torus has many points, a coarser grid is taken and
the gap between its points is paid for (``grid_factor``).

Every certificate is rounded up by ``MARGIN``. It pays for casting projected weights to float32 (relative error 2^-24 per entry, so at
most 2^-24 sqrt(rank) of the norm) and for the rounding of a float32 forward or backward pass through the layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

MARGIN = 1e-5
# Work n^3 up to which all eigenvalues of a matrix are computed, and of a stack of them; beyond, a Cholesky test is much cheaper.
EXACT_WORK, EXACT_STACK = 1.2e6, 1e5
# Frobenius distance from a multiple of the identity, relative to it, that is added to the mean eigenvalue instead.
CLOSE = 1e-3
# Grid points per axis and degree of the symbol's polynomial, where the torus has more.
POINTS_PER_DEGREE = 8
# Side up to which the eigenvalues of one matrix of a stack take no longer than Lanczos.
EXACT_SIDE = 48
# By how much a guess is raised until it can be proven; a stack's first guess is of one promising matrix among many.
GUESSES, STACK_GUESSES = (1e-4, 2e-3, 2e-2, 1e-1), (5e-3, 3e-2, 1e-1)


@dataclass(frozen=True)
class SymbolGram:
    """Hermitian positive semidefinite matrices of an operator.

    Args:
        matrices: ``[F, n, n]``, real or complex.
        factor: the squared operator norm is at most ``factor`` times their largest eigenvalue.
    """

    matrices: np.ndarray
    factor: float = 1.0

    def norm_bound(self) -> float:
        """Upper bound of the operator norm, without margin."""
        return math.sqrt(self.factor * largest_eigenvalue(self.matrices))


def matrix_gram(weight: np.ndarray) -> SymbolGram:
    """The smaller Gram matrix of ``[p, D]``."""
    w = np.asarray(weight, np.float64)
    return SymbolGram((w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w)[None])


def grid_factor(degree: int, points: int) -> float:
    """What a grid of ``points`` on the circle can miss of the largest value of a nonnegative trigonometric polynomial.

    Args:
        degree: of the polynomial, at most ``points``.
        points: equally spaced.
    Returns:
        ``1 / cos^2(pi degree / (2 points))``.
    Guarantee: the maximum over the circle is at most this factor times the maximum over the grid.
    Source: M. Riesz (see Zygmund, Trigonometric Series, X.3.8): a real trigonometric polynomial q of degree n with ``q(u) = max |q|`` has
        ``q(v) >= q(u) cos n (v - u)`` for ``|v - u| <= pi / n``. Applied to ``p - max p / 2`` for ``0 <= p``, at the grid point nearest to
        the maximum, which is at most ``pi / points`` away.
    """
    return 1.0 / math.cos(math.pi * degree / (2 * points)) ** 2


def conv_gram(kernel: np.ndarray, space: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> SymbolGram:
    """Gram matrices, by frequency, of a zero-padded convolution.

    Args:
        kernel: ``[p, D, *k]``.
        space: size of the input per axis, without padding; any padding with zeros is covered.
        strides, dilation: per axis.
    Returns:
        The matrices of ``A A^T`` of the operator on a torus, or of ``A^T A`` if that is smaller and there is no stride.
    Guarantee: the operator norm of the layer on inputs of this size, with zeros as padding, is at most ``norm_bound()``.
    Source: math.md section 5. On a torus of ``r M >= H + d (k - 1)`` points per axis no window sees two copies of the image, so the layer
        is the circular operator between two sub-spaces. ``A A^T`` maps output s to output t by the sum of ``W_j W_j'^T`` over pairs of taps
        with ``d (j - j') = r (s - t)``: a convolution again, whose symbol is computed here.
    """
    w = np.asarray(kernel, np.float64)
    if 1 < math.prod(strides) < w.shape[0] / w.shape[1] and max(dilation) == 1:  # the side of the input's phases is the smaller
        w, space, strides = polyphase(w, space, strides)
    if all(r == 1 for r in strides) and w.shape[1] < w.shape[0]:
        w = w.swapaxes(0, 1)
    taps = w.shape[2:]
    steps = [r // math.gcd(d, r) for d, r in zip(dilation, strides, strict=True)]  # lags, in taps, that the stride keeps
    degrees = [(k - 1) // step for k, step in zip(taps, steps, strict=True)]
    points, factor = [], 1.0
    for n, k, d, r, degree in zip(space, taps, dilation, strides, degrees, strict=True):
        torus = math.ceil(math.ceil((n + d * (k - 1)) / r) / (d // math.gcd(d, r)))
        coarse = POINTS_PER_DEGREE * degree if degree else 1
        points.append(min(torus, coarse))
        factor *= grid_factor(degree, coarse) if coarse < torus else 1.0
    lags, correlations = autocorrelations(w if max(steps) == 1 else polyphase(w, space, steps)[0])
    if len(lags) == 1:
        return SymbolGram(correlations, factor)
    cosines, sines = waves(tuple(points), lags)
    flipped = correlations.swapaxes(1, 2)
    symbol = np.empty((len(cosines), len(w) ** 2), np.complex128)
    np.matmul(cosines, (correlations + flipped).reshape(len(lags), -1), out=symbol.real)
    np.matmul(sines, (correlations - flipped).reshape(len(lags), -1), out=symbol.imag)
    return SymbolGram(symbol.reshape(-1, len(w), len(w)), factor)


@lru_cache(maxsize=32)
def waves(points: tuple[int, ...], lags: tuple[tuple[int, ...], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the angle of every frequency and lag, ``[F, lags]``: the same in each step. Lag 0, the first, counts half."""
    half = [*map(range, points[:-1]), range(points[-1] // 2 + 1)]  # the symbol at -f is the conjugate of that at f
    angles = np.array(list(product(*half))) * (2 * np.pi / np.array(points)) @ np.array(lags, float).T
    cosines = np.cos(angles)
    cosines[:, 0] = 0.5
    return cosines, np.sin(angles)


def polyphase(w: np.ndarray, space: Sequence[int], strides: Sequence[int]) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
    """A strided convolution as one without stride, on as many times more channels as the stride has phases.

    Tap ``r q + s`` of the kernel meets the input's phase s at position ``t + q``; sorting pixels by phase is a permutation, so the norm
    is the same. Kernel and space are filled up with zeros to a multiple of the stride.
    """
    fill = [(0, -k % r) for k, r in zip(w.shape[2:], strides, strict=True)]
    w = np.pad(w, [(0, 0), (0, 0), *fill])
    p, depth, *taps = w.shape
    n = len(taps)
    split = w.reshape(p, depth, *(m for k, r in zip(taps, strides, strict=True) for m in (k // r, r)))
    order = [0, 1, *(3 + 2 * i for i in range(n)), *(2 + 2 * i for i in range(n))]  # phases beside the channels, then taps
    merged = split.transpose(order).reshape(p, depth * math.prod(strides), *(k // r for k, r in zip(taps, strides, strict=True)))
    return merged, tuple(math.ceil(m / r) + 1 for m, r in zip(space, strides, strict=True)), (1,) * n


def autocorrelations(w: np.ndarray) -> tuple[tuple[tuple[int, ...], ...], np.ndarray]:
    """``sum_j W_j W_{j + lag}^T`` over the taps for which both exist, for one of each pair of lags.

    Args:
        w: kernel ``[p, D, *k]``.
    Returns:
        Lags, 0 first, and ``[lags, p, p]``.
    """
    p, taps = len(w), math.prod(w.shape[2:])
    rows = np.ascontiguousarray(w.reshape(p, -1, taps).transpose(2, 0, 1)).reshape(taps * p, -1)
    products = (rows @ rows.T).reshape(taps, p, taps, p)  # of all taps at once: a product per lag is as much work and many copies
    lags, first, second, member = pairs_of_taps(w.shape[2:])
    return lags, (member @ products[first, :, second, :].reshape(len(first), -1)).reshape(-1, p, p)


@lru_cache(maxsize=32)
def pairs_of_taps(taps: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], ...], np.ndarray, np.ndarray, np.ndarray]:
    """Lags, the pairs ``(j, j + lag)`` of taps that have them, and which pair has which, ``[lags, pairs]`` of 0 and 1."""
    places = list(np.ndindex(*taps))
    found: dict[tuple[int, ...], list[tuple[int, int]]] = {(0,) * len(taps): []}
    for (i, a), (j, b) in product(enumerate(places), repeat=2):
        lag = tuple(m - n for m, n in zip(b, a, strict=True))
        if lag >= (0,) * len(taps):
            found.setdefault(lag, []).append((i, j))
    pairs = [(row, *pair) for row, lag in enumerate(found) for pair in found[lag]]
    row, first, second = np.array(pairs).T
    member = np.zeros((len(found), len(pairs)))
    member[row, np.arange(len(pairs))] = 1.0
    return tuple(found), first, second, member


def overlap(kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int] | None = None) -> int:
    """M: how many windows one position can be in, ``prod ceil(k gcd(d, r) / r)``."""
    dilation = dilation or (1,) * len(kernel)
    return math.prod(-(-k * math.gcd(d, r) // r) for k, r, d in zip(kernel, strides, dilation, strict=True))


def largest_eigenvalue(matrices: np.ndarray) -> float:
    """An upper bound of the largest eigenvalue of Hermitian positive semidefinite matrices.

    Args:
        matrices: ``[F, n, n]``.
    Returns:
        The bound; above by a thousandth or so where a guess is proven, by nothing where eigenvalues are computed.
    Guarantee: never below the largest eigenvalue by more than float64 rounding (about ``n 1e-16`` relative), which ``MARGIN`` pays for.
    Source: Rump 2006, "Verification of positive definiteness": if Cholesky succeeds, the smallest eigenvalue of the matrix is above
        ``- gamma trace``, gamma of the order of ``n 1e-16``.
    """
    count, n = matrices.shape[:2]
    if not matrices.any():
        return 0.0
    if not np.isfinite(np.einsum("fii->", matrices)):  # a comparison with what is no number must not end as a bound
        return math.inf
    if count == 1:
        mean = float(np.trace(matrices[0]).real) / n
        apart = matrices[0].copy()
        apart.flat[:: n + 1] -= mean
        if length(apart) <= CLOSE * mean:  # ``G = mean I + (G - mean I)``, and no eigenvalue of the second is above its Frobenius norm
            return (mean + length(apart)) * (1 + 1e-12)
    if count * n**3 <= (EXACT_WORK if count == 1 else EXACT_STACK):
        return float(np.linalg.eigvalsh(matrices)[:, -1].max()) * (1 + 1e-12)
    guess = lanczos(matrices[0], 30) if count == 1 else guess_of_stack(matrices)
    for excess in GUESSES if count == 1 else STACK_GUESSES:
        bound = guess * (1 + excess)
        if dominates(bound, matrices):
            return bound
    return gram_iteration(matrices)


def guess_of_stack(matrices: np.ndarray) -> float:
    """Largest eigenvalue of the most promising of many matrices: of all by a few powers, then of the best quarter by more."""
    v = powers(matrices, 6)
    best = np.argsort(-sizes(v))[: max(1, len(v) // 4)]
    top = matrices[best[int(np.argmax(sizes(powers(matrices[best], 8, v[best]))))]]
    return float(np.linalg.eigvalsh(top)[-1]) if len(top) <= EXACT_SIDE else lanczos(top, 10)


def lanczos(matrix: np.ndarray, steps: int) -> float:
    """Largest eigenvalue on a Krylov space; from below, so a guess only, but a close one."""
    n = len(matrix)
    basis = np.empty((min(steps, n), n), matrix.dtype)
    conjugates = np.empty_like(basis)
    v = np.cos(np.arange(1, n + 1) * 1.7).astype(matrix.dtype)
    for i in range(len(basis)):
        before = length(v)
        for _ in range(2):  # once leaves what rounding lost
            v = v - (conjugates[:i] @ v) @ basis[:i]
        size = length(v)
        if size <= 1e-9 * before:  # the space is invariant
            basis, conjugates = basis[:i], conjugates[:i]
            break
        basis[i] = v / size
        conjugates[i] = basis[i].conj()
        v = matrix @ basis[i]
    return float(np.linalg.eigvalsh(conjugates @ matrix @ basis.T)[-1])


def length(v: np.ndarray) -> float:
    """Norm of a small array, without what ``np.linalg.norm`` spends on looking at its arguments."""
    return math.sqrt(np.vdot(v, v).real)


def powers(matrices: np.ndarray, iterations: int, v: np.ndarray | None = None) -> np.ndarray:
    """Power iteration on all matrices at once, from ``v`` on.

    Returns:
        Vectors ``[F, n, 1]``; their ``sizes`` approach the largest eigenvalues from below.
    """
    if v is None:  # any fixed vector without symmetry
        v = np.tile(np.cos(np.arange(1, matrices.shape[-1] + 1) * 1.7)[:, None], (len(matrices), 1, 1))
    for _ in range(iterations):
        v = matrices @ (v / (sizes(v) + 1e-300)[:, None, None])
    return v


def sizes(v: np.ndarray) -> np.ndarray:
    """Norms of vectors ``[F, n, 1]``, ``[F]``."""
    return np.asarray(np.linalg.norm(v, axis=(1, 2)))


def dominates(bound: float, matrices: np.ndarray) -> bool:
    """Whether a Cholesky factorisation proves ``bound I - G > 0`` for every matrix."""
    difference = np.negative(matrices)
    np.einsum("fii->fi", difference)[:] += bound  # a view of the diagonals
    try:
        np.linalg.cholesky(difference)
    except np.linalg.LinAlgError:
        return False
    return True


def gram_iteration(matrices: np.ndarray, squarings: int = 8) -> float:
    """``max_f || G^(2^m) ||_F^(2^-m)``, above the largest eigenvalue by at most ``n^(2^-m / 2)``."""
    best = 0.0
    for g in matrices:
        log, power = 0.0, g
        for m in range(squarings + 1):
            size = float(np.linalg.norm(power))
            if size == 0.0:
                break
            log += math.log(size) / 2**m
            power = power / size
            if m < squarings:
                power = power @ power
        else:
            best = max(best, math.exp(log))
    return best * (1 + 1e-9)


def spectral_norm_bound(weight: np.ndarray) -> float:
    """Certified operator norm of a dense weight.

    Args:
        weight: ``[p, D]``.
    Returns:
        Upper bound, margin included.
    """
    w, scale = normalised(weight)
    return scale * matrix_gram(w).norm_bound() * (1 + MARGIN)


def conv_norm_bound(kernel: np.ndarray, space: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> float:
    """Certified operator norm of a zero-padded convolution: the smaller of the torus bound and the reshaped kernel's.

    Args:
        kernel: ``[p, D, *k]``.
        space: size of the input per axis, without padding.
        strides, dilation: per axis.
    Returns:
        Upper bound, margin included. The reshaped kernel can only win where the torus was sampled on a coarser grid.
    Source: math.md section 5; for the reshaped kernel Cisse et al. 2017 (arXiv:1704.08847), with the overlap counted exactly.
    """
    w, scale = normalised(kernel)
    torus = conv_gram(w, space, strides, dilation).norm_bound()
    reshaped = matrix_gram(w.reshape(len(w), -1)).norm_bound() * math.sqrt(overlap(w.shape[2:], strides, dilation))
    return scale * min(torus, reshaped) * (1 + MARGIN)


def normalised(weight: np.ndarray, kind: type[np.floating] = np.float64) -> tuple[np.ndarray, float]:
    """The weight, and a factor taken out of it, so that the squares of huge and tiny weights neither overflow nor vanish.

    Args:
        weight: any shape.
        kind: of the result.
    Returns:
        Both; the factor is 0 for a weight of zeros.
    """
    w = np.asarray(weight, kind)
    size = max(float(w.max()), -float(w.min())) if w.size else 0.0
    most = 1e40 if kind is np.float64 else 1e6
    scale = 1.0 if 1 / most < size < most else size
    return (w if scale in (0.0, 1.0) else w / scale), scale
