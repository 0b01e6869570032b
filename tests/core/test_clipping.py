"""The certificate of clipping: weight times norm never exceeds C, whatever the norm."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dptrain.clipping import CLIPPING_FUNCTIONS, clip_weight
from dptrain.mechanism import FLOAT_MARGIN
from tests.core.shared import EXAMPLES

NAMES = sorted(CLIPPING_FUNCTIONS)
# A norm is the root of a sum of squares: above the root of the largest float it is infinite, which has a test of its own.
LARGEST, LARGEST32 = 1.3e154, 1.8e19
NORMS = st.floats(0, LARGEST) | st.sampled_from([0.0, 5e-324, 2.2e-308, 1e-30, 1.0, 1e38, LARGEST])
CLIPS = st.floats(1e-8, 1e8)
GAMMAS = st.floats(1e-6, 10.0)


def test_the_clipping_functions_of_this_version():
    assert NAMES == ["abadi", "automatic"]


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(NORMS, CLIPS, GAMMAS)
@example(1.0, 1.0, 0.01)
@example(math.nextafter(1.0, 2.0), 1.0, 0.01)
def test_weight_times_norm_is_at_most_c(name, norm, clip_norm, gamma):
    weight = clip_weight(name, norm, clip_norm, gamma)
    assert weight >= 0
    assert math.isfinite(weight)
    assert weight * norm <= clip_norm * (1 + 4e-16)  # two roundings; the noise pays for FLOAT_MARGIN


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(st.lists(st.floats(0, np.float32(LARGEST32).item(), width=32), min_size=1, max_size=20), CLIPS, GAMMAS)
def test_weight_times_norm_is_at_most_c_for_arrays(name, norms, clip_norm, gamma):
    for dtype, slack in ((np.float64, 4e-16), (np.float32, 4e-7)):
        assert slack < FLOAT_MARGIN
        array = np.array(norms, dtype)
        weights = clip_weight(name, array, clip_norm, gamma, np.maximum)
        assert weights.shape == array.shape
        assert np.isfinite(weights).all()
        assert (weights.astype(np.float64) * array <= clip_norm * (1 + slack)).all()
        for norm, weight in zip(norms, weights, strict=True):
            assert weight == pytest.approx(clip_weight(name, norm, clip_norm, gamma), rel=1e-6, abs=1e-30)


@EXAMPLES
@given(NORMS, CLIPS)
def test_abadi_leaves_small_gradients_alone(norm, clip_norm):
    weight = clip_weight("abadi", norm, clip_norm, 0.01)
    if norm <= clip_norm:
        assert weight == 1.0
    else:
        assert weight < 1.0 or norm <= clip_norm * (1 + 4e-16)
        assert weight * norm == pytest.approx(clip_norm, rel=1e-12)


def test_automatic_normalises_and_bends_near_zero():
    assert clip_weight("automatic", 100.0, 1.0, 0.01) * 100.0 == pytest.approx(1.0, rel=2e-4)
    assert clip_weight("automatic", 1e-3, 1.0, 0.01) * 1e-3 == pytest.approx(1e-3 / 1.1e-2)
    assert clip_weight("automatic", 0.0, 2.0, 0.01) == 200.0  # finite: a zero gradient stays zero (pitfalls.md G19)


@pytest.mark.parametrize("name", NAMES)
def test_an_infinite_norm_gets_a_finite_weight(name):
    """Zero, so that the weighted example can be selected away (math.md section 3); never NaN, which would poison the sum."""
    assert clip_weight(name, math.inf, 1.0, 0.01) == 0.0
    with np.errstate(over="ignore"):
        weights = clip_weight(name, np.array([np.inf, 1.0, 3e38], np.float32), 1.0, 0.01, np.maximum)
    assert weights[0] == 0.0
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip_norm", [None, math.inf])
def test_without_a_clipping_norm_every_weight_is_one(name, clip_norm):
    assert clip_weight(name, 7.0, clip_norm, 0.01) == 1.0
    np.testing.assert_array_equal(clip_weight(name, np.array([0.0, 7.0]), clip_norm, 0.01, np.maximum), [1.0, 1.0])
