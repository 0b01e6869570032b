"""Metrics against independent computations: pairs counted one by one, scikit-learn, and attacks that must fail or just succeed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.errors import DataError
from dptrain.metrics import auroc, certified_accuracy, certified_radius, classification_metrics
from tests.core.shared import EXAMPLES

RNG = np.random.default_rng(0)


# ---- area under the ROC curve --------------------------------------------------------------------------------------


@EXAMPLES
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_the_share_of_pairs_in_the_right_order(examples):
    scores, labels = np.array([s for s, _ in examples], float), np.array([int(y) for _, y in examples])
    ones, zeros = scores[labels == 1], scores[labels == 0]
    if not len(ones) or not len(zeros):
        with pytest.raises(DataError, match="both classes"):
            auroc(scores, labels)
        return
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in ones for b in zeros]
    assert auroc(scores, labels) == sum(pairs) / len(pairs)
    assert auroc(-scores, labels) == pytest.approx(1 - auroc(scores, labels), abs=1e-15)


@pytest.mark.parametrize("levels", [3, 50, 10**9])
def test_auroc_agrees_with_scikit_learn(levels):
    metrics = pytest.importorskip("sklearn.metrics")
    labels = RNG.integers(0, 2, 5000)
    scores = (RNG.standard_normal(5000) + labels).astype(np.float32)
    scores = np.round(scores * levels) / levels
    assert auroc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)


def test_auroc_at_its_extremes():
    labels = np.array([0, 0, 1, 1, 1])
    assert auroc(np.array([-math.inf, 0, 1, 2, math.inf]), labels) == 1.0
    assert auroc(np.array([5, 4, 3, 2, 1]), labels) == 0.0
    assert auroc(np.zeros(5), labels) == 0.5
    assert auroc(np.arange(5, dtype=np.float32), labels.astype(bool)) == 1.0


@pytest.mark.parametrize(
    ("scores", "labels", "said"),
    [
        ([0.1, 0.2], [1, 1], "2 of class 1 and 0 of class 0"),
        ([0.1, 0.2], [0, 0], "0 of class 1 and 2 of class 0"),
        ([], [], "both classes"),
        ([0.1, math.nan], [0, 1], "1 NaN"),
        ([0.1, 0.2, 0.3], [0, 1, 2], "two classes"),
        ([0.1, 0.2], [-1, 1], "two classes"),
        ([[0.1, 0.2]], [[0, 1]], "shapes"),
        ([0.1], [0, 1], "shapes"),
    ],
)
def test_auroc_without_a_value_is_an_error(scores, labels, said):
    with pytest.raises(DataError, match=said):
        auroc(np.array(scores), np.array(labels))


# ---- what a backend reports ----------------------------------------------------------------------------------------


def test_accuracy_and_auroc_of_one_output_and_of_two_are_the_same():
    z = RNG.standard_normal(200).astype(np.float32)
    labels = (z + RNG.standard_normal(200) > 0).astype(np.int64)
    expected = {"accuracy": float(((z > 0) == labels).mean()), "auroc": auroc(z, labels)}
    assert classification_metrics(z, labels) == classification_metrics(z[:, None], labels) == expected
    two = np.stack([np.zeros_like(z), z], axis=1)
    assert classification_metrics(two, labels) == expected
    assert classification_metrics(two + np.float32(1e-3), labels)["accuracy"] == pytest.approx(expected["accuracy"], abs=0.01)


def test_metrics_that_do_not_exist_are_left_out():
    labels = np.array([0, 1, 2, 2])
    assert classification_metrics(np.eye(4, 3), labels) == {"accuracy": 0.75}
    assert classification_metrics(np.eye(4, 2), np.array([0, 1, 0, 0])).keys() == {"accuracy", "auroc"}
    assert classification_metrics(np.eye(4, 2), np.zeros(4, int)) == {"accuracy": 0.75}  # one class only
    assert classification_metrics(np.full((4, 1), math.nan), np.array([0, 1, 0, 0])) == {"accuracy": 0.75}  # diverged
    for targets in (np.zeros(4), np.zeros((4, 1)), np.zeros((4, 1), int)):
        assert classification_metrics(np.zeros((4, 1)), targets) == {}


# ---- certified radius ----------------------------------------------------------------------------------------------


def linear(weight, bias, x):
    return x @ weight.T + bias


def attacks(weight, label, rng, count=2000):
    """Unit directions: random ones, and the one towards each other class, which is the best against a linear model."""
    directions = [*rng.standard_normal((count, weight.shape[1]))]
    directions += [weight[j] - weight[label] for j in range(len(weight)) if j != label and (weight[j] != weight[label]).any()]
    directions = np.array(directions)
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


TIGHT = {
    "opposite rows": np.array([[3.0, -1.0, 2.0], [-3.0, 1.0, -2.0]]),
    "orthogonal rows of one norm": 0.7 * np.array([[1.0, 2.0, 2.0], [2.0, 1.0, -2.0]]),
    "three orthogonal rows": 5.0 * np.eye(3),
}


@pytest.mark.parametrize("name", TIGHT)
def test_the_radius_is_the_smallest_perturbation_that_flips_a_linear_classifier(name):
    """``|w_0 - w_1| = sqrt(2) |W|`` for these rows, so the certificate wastes nothing."""
    weight = TIGHT[name]
    lipschitz = np.linalg.norm(weight, 2)
    bias, rng = 0.1 * RNG.standard_normal(len(weight)), np.random.default_rng(1)
    x = rng.standard_normal((20, 3))
    labels = linear(weight, bias, x).argmax(1)
    radii = certified_radius(linear(weight, bias, x), labels, lipschitz)
    assert (radii > 0).all()
    for point, label, radius in zip(x, labels, radii, strict=True):
        directions = attacks(weight, label, rng)
        below = linear(weight, bias, point + (1 - 1e-9) * radius * directions)
        assert (below.argmax(1) == label).all()
        above = linear(weight, bias, point + (1 + 1e-9) * radius * directions)
        assert (above.argmax(1) != label).any()


@EXAMPLES
@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_no_perturbation_below_the_radius_flips_any_linear_classifier(classes, features, seed):
    rng = np.random.default_rng(seed)
    weight, bias, x = rng.standard_normal((classes, features)), rng.standard_normal(classes), rng.standard_normal((5, features))
    outputs = linear(weight, bias, x)
    labels = rng.integers(0, classes, 5)
    radii = certified_radius(outputs, labels, np.linalg.norm(weight, 2))
    np.testing.assert_array_equal(radii > 0, outputs.argmax(1) == labels)
    for point, label, radius in zip(x, labels, radii, strict=True):
        if radius:
            moved = linear(weight, bias, point + (1 - 1e-9) * radius * attacks(weight, label, rng, 200))
            assert (moved.argmax(1) == label).all()


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_with_one_output_the_radius_is_the_distance_to_the_hyperplane(shape):
    weight, bias = RNG.standard_normal(4), 0.3
    x = RNG.standard_normal((50, 4))
    z = x @ weight + bias
    labels = RNG.integers(0, 2, 50)
    radii = certified_radius(z.reshape(shape), labels, float(np.linalg.norm(weight)))
    distance = np.abs(z) / np.linalg.norm(weight)
    np.testing.assert_allclose(radii, np.where((z > 0) == (labels == 1), distance, 0.0))
    # The foot of the perpendicular is on the boundary: the same distance, found otherwise.
    foot = x - np.outer(z / (weight @ weight), weight)
    np.testing.assert_allclose(np.linalg.norm(foot - x, axis=1), distance)


def test_the_radius_is_in_the_units_of_the_input_before_normalisation():
    """The attack moves pixels; the network sees them divided by one standard deviation per channel."""
    std = np.array([0.25, 0.5, 2.0])
    weight = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])  # the worst case: everything hangs on the smallest scale
    pixels = np.array([[0.4, 0.1, 0.2]])
    outputs = linear(weight, 0.0, pixels / std)
    (radius,) = certified_radius(outputs, np.array([0]), np.linalg.norm(weight, 2), input_scale=std.min())
    assert radius == pytest.approx(0.4)  # the first pixel must reach 0
    for size, flips in ((0.999, False), (1.001, True)):
        moved = linear(weight, 0.0, (pixels - [[size * radius, 0, 0]]) / std)
        assert (moved.argmax(1) != 0).all() == flips
    directions = attacks(np.eye(3), 0, RNG)
    assert (linear(weight, 0.0, (pixels + 0.999 * radius * directions) / std).argmax(1) == 0).all()


def test_wrong_and_tied_predictions_have_radius_zero_and_constant_networks_an_infinite_one():
    outputs = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], np.float32)
    np.testing.assert_allclose(certified_radius(outputs, np.zeros(3, int), 2.0), [1 / (2 * math.sqrt(2)), 0, 0])
    np.testing.assert_array_equal(certified_radius(outputs, np.zeros(3, int), 0.0), [math.inf, 0, 0])
    assert certified_radius(np.zeros((0, 3)), np.zeros(0, int), 1.0).shape == (0,)


@pytest.mark.parametrize(
    ("outputs", "labels", "constants", "said"),
    [
        (np.zeros((2, 3)), np.array([0, 3]), {}, "0 to 2"),
        (np.zeros(2), np.array([0, 2]), {}, "0 to 1"),
        (np.zeros((2, 3)), np.array([0, 0.5]), {}, "0 to 2"),
        (np.zeros((2, 3)), np.array([0]), {}, "shapes"),
        (np.zeros((2, 3, 1)), np.array([0, 0]), {}, "shapes"),
        (np.array([[math.nan, 0.0]]), np.array([0]), {}, "not finite"),
        (np.zeros((1, 2)), np.array([0]), {"lipschitz": -1.0}, "-1.0"),
        (np.zeros((1, 2)), np.array([0]), {"lipschitz": math.inf}, "inf"),
        (np.zeros((1, 2)), np.array([0]), {"lipschitz": math.nan}, "nan"),
        (np.zeros((1, 2)), np.array([0]), {"input_scale": 0.0}, "0.0"),
    ],
)
def test_a_radius_without_a_meaning_is_an_error(outputs, labels, constants, said):
    with pytest.raises(DataError, match=said):
        certified_radius(outputs, labels, **{"lipschitz": 1.0, **constants})


def test_certified_accuracy_counts_the_radii_above():
    radii = np.array([0.0, 0.0, 0.1, 0.2, math.inf])
    assert certified_accuracy(radii, [0, 0.1, 0.15, 9]) == {0.0: 0.6, 0.1: 0.4, 0.15: 0.4, 9.0: 0.2}
    assert certified_accuracy(radii, []) == {}
    for bad, at in ((np.array([]), [0]), (np.array([-1.0]), [0]), (np.array([math.nan]), [0]), (radii, [-0.1]), (radii, [math.nan])):
        with pytest.raises(DataError, match="certified_accuracy"):
            certified_accuracy(bad, at)
