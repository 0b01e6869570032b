"""Constraints restored and certified: after every projection the float32 weights obey their certificates (pitfalls.md L5, L6, L8)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dptrain.certificates import MARGIN, conv_norm_bound
from dptrain.errors import RunError
from dptrain.info import Graph, Node
from dptrain.projection import Projected, bjorck, certify, confirm, project
from tests.core.test_certificates import NAMES, operator, weights


def layer(
    kind: str, constraint: str = "orthogonal", radius: float = 1.0, name: str = "n", frozen: tuple[str, ...] = (), **attrs: Any
) -> Node:
    """A constrained layer."""
    common = {"constraint": constraint, "radius": radius, "bias_radius": 0.5, "positions": 64}
    conv = {"kernel": (3, 3), "strides": (1, 1), "dilation": (1, 1), "space": (8, 8)} if kind == "conv" else {}
    return Node(name, kind, ("x",), 10, {**common, **conv, **attrs}, {"weight": "w", "bias": "b"}, frozen)


def norm(kind: str, w: np.ndarray) -> float:
    """The true operator norm."""
    w = w.astype(np.float64)
    return float(np.linalg.norm(operator(w, (8, 8), (1, 1), (1, 1), 1) if kind == "conv" else w, 2))


def shape_of(kind: str) -> tuple[int, ...]:
    return (4, 3, 3, 3) if kind == "conv" else (6, 9)


def run(node: Node, w: np.ndarray, first: bool = True) -> Projected:
    bias = np.linspace(-3, 3, len(w)).astype(np.float32)
    return project(Graph((node,)), {"w": w, "b": bias}, first)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("constraint", ["orthogonal", "spectral"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("radius", [1.0, 0.3])
def test_weights_obey_their_certificates(kind: str, constraint: str, name: str, radius: float) -> None:
    w = weights(name, shape_of(kind)).astype(np.float32)
    done = run(layer(kind, constraint, radius), w)
    new, certified = done.weights["w"], done.certificates["n.weight"]
    assert new.dtype == np.float32
    assert norm(kind, new) <= certified <= radius * (1 + 2 * MARGIN)
    if constraint == "orthogonal" or name == "huge":
        assert certified == pytest.approx(radius * (1 + MARGIN))
    if name == "tiny" and constraint == "spectral":
        np.testing.assert_allclose(new, w, rtol=1e-6)  # within its allowance, so it is left alone
    assert np.linalg.norm(done.weights["b"].astype(np.float64)) <= done.certificates["n.bias"] <= 0.5 * (1 + 2 * MARGIN)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_zero_weights_stay_zero(kind: str) -> None:
    done = run(layer(kind), np.zeros(shape_of(kind), np.float32))
    assert not done.weights["w"].any() and done.certificates["n.weight"] == 0.0


def test_rows_and_frobenius() -> None:
    w = weights("random", (6, 9)).astype(np.float32)
    rows = run(layer("linear", "rows", 2.0), w)
    np.testing.assert_allclose(np.linalg.norm(rows.weights["w"], axis=1), 2.0, rtol=1e-6)
    frobenius = run(layer("linear", "frobenius", 2.0), w)
    assert np.linalg.norm(frobenius.weights["w"]) == pytest.approx(2.0)
    for done in (rows, frobenius):
        assert norm("linear", done.weights["w"]) <= done.certificates["n.weight"]


def test_orthogonal_means_equal_singular_values() -> None:
    """Gradient norms are preserved; a few iterations per step keep them so while noise pushes them apart."""
    rng = np.random.default_rng(0)
    node, w = layer("linear"), rng.standard_normal((6, 9)).astype(np.float32)
    w = run(node, w).weights["w"]
    assert np.ptp(np.linalg.svd(w)[1]) < 1e-4
    for _ in range(20):
        w = run(node, (w + 0.05 * rng.standard_normal(w.shape)).astype(np.float32), first=False).weights["w"]
    assert np.linalg.svd(w)[1].min() > 0.97


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (1, 5)])
def test_bjorck_is_what_its_definition_says(shape: tuple[int, int], kind: type[np.floating]) -> None:
    """Iterations on the Gram matrix are those on the weight, end in equal singular values, and leave such a weight alone."""
    rng, small = np.random.default_rng(3), min(shape)
    even = bjorck(rng.standard_normal(shape).astype(kind), 60)
    assert even.dtype == kind
    np.testing.assert_allclose(np.linalg.svd(even.astype(np.float64))[1], 1.0, atol=1e-4)
    moved = (3 * even + 0.1 * rng.standard_normal(shape)).astype(kind)
    x = moved.astype(np.float64)
    x /= np.linalg.norm(x) / np.sqrt(small)  # singular values of 1 in the quadratic mean
    for iterations in (1, 2):
        x = 1.5 * x - 0.5 * x @ x.T @ x
        np.testing.assert_allclose(bjorck(moved, iterations), x, atol=5e-4 if iterations == 2 else 1e-6)
    near = 3 * even
    assert bjorck(near, 2, 0.02) is near


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_the_first_projection_is_taken_in_float64(rank: int) -> None:
    """Twenty iterations would raise what float32 rounds off the Gram matrix by a factor of millions."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((64, rank)) @ rng.standard_normal((rank, 128))).astype(np.float32)
    expected = bjorck(w.astype(np.float64), 20)
    expected /= np.linalg.norm(expected, 2)
    assert np.linalg.norm(bjorck(w, 20) / np.linalg.norm(bjorck(w, 20), 2) - expected, 2) > 2e-5
    found = run(layer("linear"), w).weights["w"].astype(np.float64)
    assert np.linalg.norm(found / np.linalg.norm(found, 2) - expected, 2) < 2e-6


def test_a_weight_for_which_bjorck_diverges_is_only_scaled() -> None:
    """Its largest singular value hides from the power iteration, whose first vector is orthogonal to it."""
    n = 6
    start = np.cos(np.arange(1, n + 1) * 1.7)
    hidden = np.linalg.qr(np.stack([start, np.ones(n)], 1))[0][:, 1]
    w = np.eye(n) + (np.sqrt(8) - 1) * np.outer(hidden, hidden)
    assert bjorck(w, 20) is w
    done = run(layer("linear"), w)
    assert done.certificates["n.weight"] == pytest.approx(1.0, rel=1e-3)
    assert norm("linear", done.weights["w"]) <= done.certificates["n.weight"]


def test_one_weight_at_two_resolutions() -> None:
    """A shared kernel obeys every use, and each use has a certificate of its own."""
    nodes = layer("conv", "spectral", space=(4, 4)), layer("conv", "spectral", name="n#2", space=(16, 16))
    w = weights("ones", (2, 2, 3, 3)).astype(np.float32)
    done = project(Graph(nodes), {"w": w, "b": np.zeros(2, np.float32)})
    assert done.certificates["n.weight"] < done.certificates["n#2.weight"] == pytest.approx(1 + MARGIN)


def test_frozen_weights_are_certified_and_not_touched() -> None:
    w = 5 * weights("random", (6, 9)).astype(np.float32)
    done = run(layer("linear", frozen=("weight",)), w)
    assert set(done.weights) == {"b"}
    assert norm("linear", w) <= done.certificates["n.weight"] <= norm("linear", w) * 1.001


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = np.full((6, 9), bad, np.float32)
    with pytest.raises(RunError, match="no longer finite"):
        run(layer("linear"), w)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_stored_certificates_are_proven_again(kind: str) -> None:
    """A checkpoint's certificate is kept if it holds for the weights, and replaced if it does not."""
    node = layer(kind)
    done = run(node, weights("random", shape_of(kind)).astype(np.float32))
    graph = Graph((node,))
    assert confirm(graph, done.weights, done.certificates) == done.certificates
    forged = {name: 0.9 * value for name, value in done.certificates.items()}
    fresh = confirm(graph, done.weights, forged)
    assert fresh == certify(graph, done.weights)
    assert norm(kind, done.weights["w"]) <= fresh["n.weight"]
    assert certify(graph, done.weights)["n.weight"] == pytest.approx(
        conv_norm_bound(done.weights["w"], (8, 8), (1, 1), (1, 1)) if kind == "conv" else 1.0, rel=1e-3
    )
