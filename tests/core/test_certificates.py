"""Operator norms: never below the truth, and close to it; adversarial weights included (math.md section 5, pitfalls.md L7, L8)."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain import certificates as c
from tests.core.shared import EXAMPLES


def operator(kernel: np.ndarray, space: tuple[int, ...], strides: tuple[int, ...], dilation: tuple[int, ...], pad: int) -> np.ndarray:
    """The matrix of a zero-padded convolution, entry by entry."""
    p, depth, *taps = kernel.shape
    sizes = [(n + 2 * pad - d * (k - 1) - 1) // r + 1 for n, k, r, d in zip(space, taps, strides, dilation, strict=True)]
    matrix = np.zeros((p, *sizes, depth, *space))
    for out in product(*map(range, sizes)):
        for tap in product(*map(range, taps)):
            place = tuple(t * r + k * d - pad for t, r, k, d in zip(out, strides, tap, dilation, strict=True))
            if all(0 <= i < n for i, n in zip(place, space, strict=True)):
                matrix[(slice(None), *out, slice(None), *place)] += kernel[(slice(None), slice(None), *tap)]
    return matrix.reshape(p * math.prod(sizes), -1)


def weights(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random and adversarial weights."""
    rng = np.random.default_rng(seed)
    if name == "ones":
        return np.ones(shape)
    if name == "alternating":
        return np.ones(shape) * (-1.0) ** np.indices(shape).sum(0)
    if name == "rank one":
        rest = shape[0], math.prod(shape[1:])
        return np.outer(rng.standard_normal(rest[0]), rng.standard_normal(rest[1])).reshape(shape)
    if name == "orthogonal":
        rows = rng.standard_normal((shape[0], math.prod(shape[1:])))
        u, _, v = np.linalg.svd(rows, full_matrices=False)
        return (u @ v).reshape(shape)
    scale = {"random": 1.0, "huge": 1e30, "tiny": 1e-30}[name]
    return scale * rng.standard_normal(shape)


NAMES = ("random", "ones", "alternating", "rank one", "orthogonal", "huge", "tiny")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 40), (130, 110)])
def test_dense_norms_are_exact_from_above(name: str, shape: tuple[int, ...]) -> None:
    w = weights(name, shape)
    truth = np.linalg.norm(w, 2)
    slack = 1e-9 if min(shape) ** 3 <= c.EXACT_WORK else 2e-3  # beyond, a proven guess
    assert truth <= c.spectral_norm_bound(w) <= truth * (1 + c.MARGIN) * (1 + slack)


def test_zero_has_norm_zero() -> None:
    assert c.spectral_norm_bound(np.zeros((3, 4))) == 0.0
    assert c.conv_norm_bound(np.zeros((3, 4, 3, 3)), (8, 8), (1, 1), (1, 1)) == 0.0


@EXAMPLES
@given(
    name=st.sampled_from(NAMES),
    p=st.integers(1, 6),
    depth=st.integers(1, 4),
    taps=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    extra=st.integers(0, 6),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    pad=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_convolution_norms_are_never_below_the_truth(
    name: str, p: int, depth: int, taps: list[int], extra: int, stride: int, dilation: int, pad: int, seed: int
) -> None:
    n = len(taps)
    space = tuple(dilation * (k - 1) + 1 + extra for k in taps)
    kernel = weights(name, (p, depth, *taps), seed)
    truth = np.linalg.norm(operator(kernel, space, (stride,) * n, (dilation,) * n, pad), 2)
    assert truth <= c.conv_norm_bound(kernel, space, (stride,) * n, (dilation,) * n)


@pytest.mark.parametrize("name", ["random", "ones", "alternating", "rank one", "orthogonal"])
@pytest.mark.parametrize(
    ("taps", "stride", "least"), [((3, 3), 1, 0.8), ((3, 3), 2, 0.75), ((5, 5), 1, 0.7), ((2, 2), 2, 0.999), ((1, 1), 1, 0.999)]
)
def test_convolution_norms_are_tight(name: str, taps: tuple[int, int], stride: int, least: float) -> None:
    kernel, space = weights(name, (3, 2, *taps)), (10, 10)
    truth = np.linalg.norm(operator(kernel, space, (stride,) * 2, (1, 1), taps[0] // 2 if taps[0] % 2 else 0), 2)
    assert least * c.conv_norm_bound(kernel, space, (stride,) * 2, (1, 1)) <= truth


def test_a_coarse_grid_is_paid_for() -> None:
    """On a large image the grid is coarser than the torus, and the bound still holds, within a few percent."""
    for name in ("random", "ones", "alternating"):
        kernel = weights(name, (2, 2, 3))
        gram = c.conv_gram(kernel, (60,), (1,), (1,))
        assert gram.factor > 1 and len(gram.matrices) < 60
        truth = np.linalg.norm(operator(kernel, (60,), (1,), (1,), 1), 2)
        assert truth <= c.conv_norm_bound(kernel, (60,), (1,), (1,)) <= 1.06 * truth


@EXAMPLES
@given(degree=st.integers(1, 4), points=st.integers(2, 12), seed=st.integers(0, 99))
def test_the_grid_factor_bounds_what_lies_between_grid_points(degree: int, points: int, seed: int) -> None:
    points = points + degree
    coefficients = np.random.default_rng(seed).standard_normal(degree + 1)

    def p(angle: np.ndarray) -> np.ndarray:
        return np.abs(np.exp(1j * np.outer(angle, np.arange(degree + 1))) @ coefficients) ** 2

    fine, grid = p(np.linspace(0, 2 * np.pi, 4001)), p(2 * np.pi * np.arange(points) / points)
    assert fine.max() <= c.grid_factor(degree, points) * grid.max() * (1 + 1e-12)


def test_the_published_factor_of_reshaped_kernels_is_no_bound() -> None:
    """L7: deel-lip counts the average overlap of windows, which an all-ones kernel exceeds; ours is above it."""
    h, k = 16, 3
    kernel = np.ones((1, 1, k, k))
    truth = np.linalg.norm(operator(kernel, (h, h), (1, 1), (1, 1), 1), 2)
    reshaped = float(np.linalg.norm(kernel.reshape(1, -1), 2))
    average = (k * h - 2) / h  # 'same' padding: windows per position, averaged over the axis
    assert reshaped * average < truth <= c.conv_norm_bound(kernel, (h, h), (1, 1), (1, 1)) <= reshaped * k * (1 + 2 * c.MARGIN)


def test_power_iteration_alone_would_be_below() -> None:
    """L8: a guess from below is raised until a proof from above exists."""
    values = np.concatenate([[1.0], np.full(199, 0.98)])
    u, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((200, 200)))
    gram = (u * values) @ u.T
    assert c.sizes(c.powers(gram[None], 15))[0] < 1.0
    assert c.largest_eigenvalue(gram[None]) * (1 + 1e-12) >= 1.0


@pytest.mark.parametrize("way", ["exact", "cholesky", "gram iteration"])
def test_every_way_is_from_above(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXACT_WORK", "EXACT_STACK"):
        monkeypatch.setattr(c, name, math.inf if way == "exact" else 0)
    for name in ("GUESSES", "STACK_GUESSES"):
        monkeypatch.setattr(c, name, () if way == "gram iteration" else getattr(c, name))
    rng = np.random.default_rng(1)
    for n, spread in ((1, 1.0), (4, 1.0), (30, 1.0), (30, 0.0)):
        w = rng.standard_normal((5, n, n)) * spread + 1j * rng.standard_normal((5, n, n)) * spread + (1 - spread) * np.eye(n)
        gram = w @ w.conj().swapaxes(1, 2)
        truth = np.linalg.eigvalsh(gram).max()
        found = c.largest_eigenvalue(gram)
        assert truth * (1 - 1e-12) <= found <= truth * 1.06


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4), (1, 150, 150), (40, 40, 40)])
def test_what_is_no_number_has_no_bound(shape: tuple[int, ...], bad: float) -> None:
    matrices = np.tile(np.eye(shape[-1]), (shape[0], 1, 1))
    matrices[-1, -1, -1] = bad
    assert c.largest_eigenvalue(matrices) == math.inf


@pytest.mark.parametrize("apart", [1e-6, 1e-4, 9e-4, 2e-3])
def test_nearly_a_multiple_of_the_identity(apart: float) -> None:
    noise = np.random.default_rng(0).standard_normal((150, 150))
    noise = noise + noise.T
    gram = 3.0 * (np.eye(150) + apart * noise / np.linalg.norm(noise))
    truth = float(np.linalg.eigvalsh(gram)[-1])
    assert truth <= c.largest_eigenvalue(gram[None]) <= truth * (1 + 1e-3)


def test_overlap_counts_windows() -> None:
    for k, r, d in product((1, 2, 3, 5), (1, 2, 3, 4), (1, 2, 3)):
        places = [t * r + j * d for t in range(60) for j in range(k)]
        most = max(np.bincount(places)[40:80])
        assert c.overlap((k,), (r,), (d,)) == most


def arguments(kernel: Any) -> Any:
    """Space, strides and dilation of an 8 x 8 image."""
    return kernel, (8, 8), (1, 1), (1, 1)


def test_float32_weights_stay_within_the_margin() -> None:
    """Casting a projected weight to float32 moves its norm by far less than the margin."""
    w = weights("orthogonal", (64, 64, 3, 3))
    bound = c.conv_norm_bound(*arguments(w))
    assert c.conv_norm_bound(*arguments(w.astype(np.float32))) <= bound * (1 + c.MARGIN / 5)


@pytest.mark.parametrize(("taps", "stride"), [((7, 7), (2, 2)), ((5, 3), (2, 3)), ((4, 4), (2, 2)), ((2, 2), (3, 3))])
def test_the_side_of_the_inputs_phases_gives_the_same_norm(taps: tuple[int, int], stride: tuple[int, int]) -> None:
    """A strided convolution with few input channels is bounded on a small matrix, as tightly as on the large one."""
    kernel, space = weights("random", (20, 2, *taps)), (21, 22)
    small = c.conv_gram(kernel, space, stride, (1, 1))
    assert small.matrices.shape[-1] == 2 * math.prod(stride)
    merged, _, ones = c.polyphase(np.asarray(kernel), space, stride)
    assert ones == (1, 1) and np.linalg.norm(merged) == pytest.approx(np.linalg.norm(kernel))
    truth = np.linalg.norm(operator(kernel, space, stride, (1, 1), taps[0] // 2), 2)
    assert truth <= c.conv_norm_bound(kernel, space, stride, (1, 1)) <= 1.1 * truth
