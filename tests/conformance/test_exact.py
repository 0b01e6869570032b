"""Norms and clipped sums against a per-example autograd loop in float64, every row of the table, both backends (math.md 7.1)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dptrain.errors import UnsupportedModelError
from tests.conformance import tf_side, torch_side
from tests.conformance.cases import CASES, Case

SIDES: dict[str, ModuleType] = {"torch": torch_side, "tensorflow": tf_side}
ROWS = [
    pytest.param(side, case, id=f"{name}-{case.name}")
    for name, side in SIDES.items()
    for case in CASES
    if (case.torch if name == "torch" else case.keras) is not None
]
TOLERANCE = 1e-9  # math.md section 7
# Cases with a layer whose norms are found by running it again, by framework.
RUN_AGAIN = {
    "torch": ("lstm", "prelu, slow method"),
    "tensorflow": ("lstm", "prelu, slow method", "householder, slow method", "keras separable"),
}


def made(side: ModuleType, case: Case) -> tuple[Any, np.ndarray, np.ndarray]:
    """Model, inputs, targets of one row."""
    build = case.torch if side.NAME == "torch" else case.keras
    assert build is not None
    return build(), case.inputs(side.NAME), case.targets()


def total_norms(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """Norm per example over all parameters."""
    return np.sqrt(sum((g.reshape(len(g), -1) ** 2).sum(1) for g in gradients.values()))


def assert_close(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal to ``TOLERANCE`` of the largest entry over all parameters."""
    assert list(ours) == list(expected)
    scale = max(np.abs(v).max() for v in expected.values())
    for name, value in expected.items():
        assert ours[name].shape == value.shape, name
        assert np.abs(ours[name] - value).max() <= TOLERANCE * scale, name


@pytest.mark.parametrize(("side", "case"), ROWS)
def test_norms_and_clipped_sums_equal_the_oracle(side: ModuleType, case: Case) -> None:
    model, x, y = made(side, case)
    before = side.state(model)
    gradients = side.oracle(model, x, y)
    n = total_norms(gradients)
    assert n.min() > 0
    for strategy in ("per_sample", "ghost", "mixed_ghost"):
        np.testing.assert_allclose(side.norms(model, x, y, strategy), n, rtol=TOLERANCE)
        for c in (float(np.median(n)), 1e-3 * n.min()):
            w = np.minimum(1, c / n)
            expected = {name: np.tensordot(w, g, 1) for name, g in gradients.items()}
            assert_close(side.clipped(model, x, y, c, strategy), expected)
    assert side.traces(model) == []
    after = side.state(model)
    assert all(np.array_equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(("side", "case"), ROWS)
def test_no_clipping_gives_the_plain_gradient(side: ModuleType, case: Case) -> None:
    model, x, y = made(side, case)
    gradients = side.oracle(model, x, y)
    expected = {name: g.sum(0) for name, g in gradients.items()}
    assert_close(side.clipped(model, x, y, float("inf"), "mixed_ghost"), expected)


@pytest.mark.parametrize(("side", "case"), ROWS)
def test_two_pass_gives_the_same_numbers(side: ModuleType, case: Case) -> None:
    model, x, y = made(side, case)
    c = 0.5 * float(np.median(total_norms(side.oracle(model, x, y))))
    one = side.clipped(model, x, y, c, "ghost", grouping="per_layer")  # a pass per group; one group: test_models_torch, test_tf_executor
    if case.name in RUN_AGAIN[side.NAME]:
        with pytest.raises(UnsupportedModelError, match=r"running it again.*book_keeping"):  # a ReLU in it could round to the other side
            side.clipped(model, x, y, c, "ghost", grouping="per_layer", two_pass=True)
        return
    assert_close(side.clipped(model, x, y, c, "ghost", grouping="per_layer", two_pass=True), one)


@pytest.mark.parametrize(("side", "case"), ROWS)
@pytest.mark.parametrize("clipping", ["abadi", "automatic"])
def test_per_layer_groups_bound_every_example(side: ModuleType, case: Case, clipping: str) -> None:
    """One example alone: its contribution is exactly its weight times its gradient, within C/sqrt(K) per group."""
    model, x, y = made(side, case)
    gradients = side.oracle(model, x[:1], y[:1])
    c = 0.1 * float(total_norms(gradients)[0])
    sums = side.clipped(model, x[:1], y[:1], c, "mixed_ghost", grouping="per_layer", clipping=clipping)
    total = np.sqrt(sum((v**2).sum() for v in sums.values()))
    assert 0 < total <= c * (1 + 1e-9)
    for name, value in sums.items():  # a clipped gradient keeps its direction
        g = gradients[name][0]
        if np.abs(g).max() > 1e-12:
            ratio = value[np.abs(g) > 1e-12] / g[np.abs(g) > 1e-12]
            assert clipping == "automatic" or ratio.max() <= 1 + 1e-9
            assert ratio.max() - ratio.min() <= 1e-6 * abs(ratio.max())


@pytest.mark.parametrize(("side", "case"), ROWS)
def test_the_self_check_accepts_every_row(side: ModuleType, case: Case) -> None:
    model, x, y = made(side, case)
    before = side.state(model)
    checked = side.api.per_sample_norms(model, side.loss, side.tensor(x), side.tensor(y))
    np.testing.assert_allclose(checked.numpy(), side.norms(model, x, y, "mixed_ghost"), rtol=1e-12)
    after = side.state(model)
    assert all(np.array_equal(before[k], after[k]) for k in before)
