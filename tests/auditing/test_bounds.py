"""Lower bounds on epsilon: against brute force, and never above the truth more often than they say."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from dptrain.auditing.bounds import (
    ErrorRates,
    error_rates,
    guess,
    one_run_epsilon,
    one_run_p_value,
    rate_above,
)
from dptrain.auditing.game import gaussian_trade_off
from tests.core.shared import EXAMPLES


def slow_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 of Steinke, Nasr, Jagielski, term by term."""
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(r, k) * chance**k * (1 - chance) ** (r - k) for k in range(r + 1)]
    tail = math.fsum(mass[v:])
    steepest = max((math.fsum(mass[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, tail + 2 * m * delta * steepest)


@EXAMPLES
@given(st.integers(1, 40), st.data())
def test_one_run_p_value_against_the_theorem(m: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(0, m))
    v = data.draw(st.integers(0, r))
    epsilon, delta = data.draw(st.floats(0.0, 6.0)), data.draw(st.sampled_from([0.0, 1e-9, 1e-5, 1e-2]))
    expected = 1.0 if v == 0 else slow_p_value(m, r, v, epsilon, delta)
    assert one_run_p_value(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@EXAMPLES
@given(st.integers(4, 300), st.floats(0.5, 1.0), st.sampled_from([1e-5, 1e-9]), st.sampled_from([0.05, 1e-6]))
def test_one_run_epsilon_is_the_largest_refuted(m: int, share: float, delta: float, error: float) -> None:
    v = int(share * m)
    found = one_run_epsilon(m, m, v, delta, error)
    assert found == 0.0 or one_run_p_value(m, m, v, found, delta) <= error
    assert one_run_p_value(m, m, v, found + 1e-3, delta) > error


def test_p_values_fall_with_right_guesses_and_rise_with_epsilon() -> None:
    values = [one_run_p_value(100, 50, v, 1.0, 1e-6) for v in range(51)]
    assert all(a >= b for a, b in pairwise(values))
    values = [one_run_p_value(100, 50, 48, e, 1e-6) for e in np.linspace(0, 8, 30)]
    assert all(a <= b for a, b in pairwise(values))


def test_rate_bounds_cover() -> None:
    """Exact coverage of Clopper and Pearson's bound: the chance that it lies below the truth, summed over all outcomes."""
    for n, p, error in ((20, 0.1, 0.05), (50, 0.5, 1e-3), (200, 0.01, 1e-6)):
        wrong = sum(binom.pmf(k, n, p) for k in range(n + 1) if rate_above(k, n, error) < p)
        assert wrong <= error * (1 + 1e-9)


def test_error_rates_of_randomised_response() -> None:
    """Its epsilon is log 3; the bound must come close and stay below, at one in a million for a fixed seed."""
    rng = np.random.default_rng(0)
    told = rng.random(200_000) < 0.75
    rates = error_rates(told[:100_000].astype(float), (~told[100_000:]).astype(float), 0.5, 1e-6)
    assert 0.9 * math.log(3) < rates.epsilon(1e-9) <= math.log(3)
    assert ErrorRates(1.0, 1.0, 0.1).epsilon(1e-5) == 0.0


def test_guesses_take_the_extremes() -> None:
    inside = np.arange(64) % 2 == 0
    perfect = guess(np.where(inside, 1.0, -1.0), inside)
    assert [r for r, _ in perfect.tries] == [64, 32, 16, 8]
    assert all(r == v for r, v in perfect.tries)
    assert perfect.epsilon(1e-6, 0.05) > 2.0
    assert perfect.p_value(10.0, 1e-6) == 1.0
    nothing = guess(np.random.default_rng(1).random(64), inside)
    assert nothing.epsilon(1e-6, 0.05) < 0.5


def test_a_gaussian_run_is_never_overstated() -> None:
    """1,000 simulated runs of 100 canaries at epsilon 1: more than 5 % refuted would be a defect; 10 % leaves 1e-9 for chance."""
    sigma, delta, rng = 4.0, 1e-5, np.random.default_rng(2)
    from accounting.prv import gaussian_epsilon

    epsilon, refuted = gaussian_epsilon(1 / sigma, delta), 0
    for _ in range(1000):
        inside = rng.random(100) < 0.5
        refuted += guess(inside + sigma * rng.standard_normal(100), inside).epsilon(delta, 0.05) > epsilon
    assert refuted <= 100


def test_gaussian_trade_off() -> None:
    assert gaussian_trade_off(2.0, 0.1) == pytest.approx(norm.cdf(norm.isf(0.1) - 0.5), rel=1e-12)
    assert gaussian_trade_off(2.0, 0.0) == pytest.approx(1.0)
    assert gaussian_trade_off(2.0, 1.0) == pytest.approx(0.0)
