"""`prv` against published values, quadrature, dp-accounting's PLD and its own certified lower bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
from oracles import REFERENCE, dp_accounting_pld, one_step_delta, two_step_delta
from scipy import stats

from accounting import SampledGaussian, get_accountant, prv
from accounting.discretise import Pair, round_up, support
from accounting.prv import gaussian_epsilon, gaussian_log_delta

PRV = get_accountant("prv")


@pytest.mark.parametrize(("events", "delta", "true"), REFERENCE)
def test_reference_values(events, delta, true, pairs):
    assert true <= PRV.epsilon(pairs(events), delta) <= true * 1.001


@pytest.mark.parametrize("sigma", [0.4, 0.8, 2.0, 20.0])
@pytest.mark.parametrize(("q", "steps"), [(1e-3, 3000), (0.02, 1), (0.02, 500), (0.3, 100), (0.95, 10)])
@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_bracket_is_narrow(sigma, q, steps, relation):
    detail = get_accountant("prv", relation).detail([(SampledGaussian(sigma, q), steps)], 1e-5)
    assert 0 <= detail.lower <= detail.epsilon == min(detail.grid_epsilon, detail.rdp_epsilon)
    assert detail.epsilon - detail.lower <= 0.02 * detail.epsilon + 1e-5


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
@pytest.mark.parametrize(("sigma", "q"), [(0.5, 0.01), (1.0, 0.1), (0.8, 0.7), (3.0, 0.3)])
def test_one_step_is_exact(sigma, q, relation):
    for epsilon in (0.05, 0.8):
        true = one_step_delta(sigma, q, relation, epsilon)
        ours = get_accountant("prv", relation).delta([(SampledGaussian(sigma, q), 1)], epsilon)
        assert true - 1e-13 <= ours <= true * 1.02 + 1e-12


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_two_steps_are_exact(relation):
    true = two_step_delta(0.9, 0.2, relation, 0.5)
    ours = get_accountant("prv", relation).delta([(SampledGaussian(0.9, 0.2), 2)], 0.5)
    assert true * (1 - 1e-5) <= ours <= true * 1.02


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.0, 0.02, 300), (0.6, 0.1, 20), (3.0, 0.5, 50)])
def test_between_dp_accounting_bounds(sigma, q, steps, pairs):
    ours = PRV.epsilon(pairs([(sigma, q, steps)]), 1e-5)
    low = dp_accounting_pld([(sigma, q, steps)], 1e-5, 2e-3, pessimistic=False)
    high = dp_accounting_pld([(sigma, q, steps)], 1e-5, 2e-3)
    assert low <= ours <= high * 1.001


@pytest.mark.parametrize("direction", ["remove", "add", "replace"])
@pytest.mark.parametrize(("sigma", "q"), [(0.5, 1e-4), (1.0, 0.05), (2.0, 0.9), (4.0, 1e-6)])
def test_discretisation_keeps_both_masses(direction, sigma, q):
    edges = np.linspace(*support(Pair(sigma, q, direction), -40.0, -40.0), 300)
    grid = round_up(Pair(sigma, q, direction), edges)
    assert grid.mass.min() >= 0
    assert grid.mass.sum() + grid.infinite == pytest.approx(1, abs=1e-12)
    # Q mass: E_P[e^-loss] = 1 up to the cut tails; above 1 would mean some loss was rounded down.
    assert float(grid.mass @ np.exp(-grid.losses)) <= 1 + 1e-9


def test_heterogeneous_with_full_batch_releases():
    mixed = [(SampledGaussian(40.0, 1.0), 100), (SampledGaussian(1.0, 0.01), 1000)]
    detail = PRV.detail(mixed, 1e-5)
    assert detail.method == "grid" and detail.epsilon - detail.lower < 0.01 * detail.epsilon
    for part in mixed:
        assert PRV.epsilon([part], 1e-5) < detail.epsilon


def test_almost_full_batch_tends_to_the_gaussian():
    exact = PRV.epsilon([(SampledGaussian(4.0, 1.0), 100)], 1e-5)
    assert PRV.epsilon([(SampledGaussian(4.0, 1 - 1e-9), 100)], 1e-5) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 10.0, 300.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.3])
def test_gaussian_closed_form(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    assert gaussian_log_delta(mu, epsilon) <= math.log(delta)
    if epsilon > 1e-6:
        assert gaussian_log_delta(mu, epsilon * (1 - 1e-6)) > math.log(delta)


def test_fallback_is_recorded(monkeypatch):
    monkeypatch.setattr(prv._View, "refined", lambda self: (math.inf, 0.0))
    detail = prv.PRVAccountant()._compute(((SampledGaussian(0.9, 0.01), 700),), 1e-6, True)
    assert detail.method == "rdp" and detail.epsilon == detail.rdp_epsilon < detail.grid_epsilon
    assert 0 < detail.lower < detail.epsilon


@pytest.mark.parametrize(("sigma", "relation"), [(0.6, "add_remove"), (0.3, "replace_one")])
@pytest.mark.parametrize(("q", "steps"), [(1e-6, 10_000), (1e-4, 2), (1e-5, 300)])
def test_rare_large_losses(sigma, relation, q, steps):
    # Seldom sampled, but then exposed: epsilon is far below `rdp`, and one big loss decides.
    detail = get_accountant("prv", relation).detail([(SampledGaussian(sigma, q), steps)], 1e-9)
    assert detail.method == "grid" and detail.lower <= detail.epsilon <= 1.06 * detail.lower
    assert detail.epsilon < 0.5 * detail.rdp_epsilon


def test_never_sampled_is_nothing_lost():
    # With probability 1 - 1e-5 nobody is sampled, and then both outputs are the same.
    assert PRV.epsilon([(SampledGaussian(0.3, 1e-6), 10)], 1.0001e-5) == 0.0 < PRV.epsilon([(SampledGaussian(0.3, 1e-6), 10)], 0.7e-5)
    assert PRV.delta([(SampledGaussian(0.3, 1e-6), 10)], 1e-9) <= 1.0001e-5


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.0, 0.01, 500), (0.5, 0.6, 3), (20.0, 0.5, 100)])
def test_the_direction_left_out_is_the_smaller_one(sigma, q, steps, monkeypatch):
    event, asked = ((SampledGaussian(sigma, q), steps),), prv._Question(math.log(1e-6))
    fine, bound = [], prv._View.bound

    def watched(self, tolerance, *, upper=True):
        if tolerance == prv._TOLERANCE:
            fine.append(self._pairs[0][0].direction)
        return bound(self, tolerance, upper=upper)

    both = {direction: prv._View(0.0, event, direction, asked).refined()[0] for direction in ("remove", "add")}
    monkeypatch.setattr(prv._View, "bound", watched)
    assert prv.PRVAccountant()._upper(0.0, event, asked)[0] == max(both.values()) == both[fine[0]]
    # Unlike directions: the smaller one is never computed finely. Nearly equal ones: both are.
    assert len(set(fine)) == (1 if min(both.values()) < 0.99 * max(both.values()) else 2)


def test_small_delta_after_many_steps_is_not_lost_in_rounding():
    detail = PRV.detail([(SampledGaussian(2.0, 1e-3), 1_000_000)], 1e-12)
    assert detail.method == "grid" and detail.lower <= detail.epsilon <= detail.lower * 1.03


@pytest.mark.parametrize(("sigma", "delta"), [(119665450.0, 2.15e-14), (1e9, 1e-11)])
def test_the_lower_value_of_a_gaussian_is_certified(sigma, delta):
    # For small mu delta is mu (phi(r) - r Phi(-r)), r = epsilon / mu, but for a share of about mu.
    detail = PRV.detail([(SampledGaussian(sigma, 1.0), 1)], delta)
    r = detail.lower * sigma
    assert detail.epsilon * (1 - 0.01) <= detail.lower <= detail.epsilon
    assert (stats.norm.pdf(r) - r * stats.norm.sf(r)) / sigma * (1 + 1e-6) >= delta


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
@pytest.mark.parametrize("name", ["prv", "rdp"])
def test_tiny_noise_is_a_huge_epsilon(name, relation):
    # Neither infinite nor small: a full-batch Gaussian costs at least as much.
    for q in (1e-3, 0.999):
        epsilon = get_accountant(name, relation).epsilon([(SampledGaussian(1e-5, q), 2)], 1e-7)
        assert 1e9 < epsilon <= 1.01 * gaussian_epsilon(math.sqrt(2) * 1e5, 1e-7)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("delta", [5e-324, 1e-310, 1e-280])
def test_denormal_delta_is_left_to_rdp(delta):
    # Normal tails beyond 37.7 standard deviations are 0 in floats, which must not pass for "no loss".
    detail = PRV.detail([(SampledGaussian(1.0, 0.01), 1000), (SampledGaussian(0.05, 1e-5), 2)], delta)
    assert detail.method == "rdp" and detail.lower <= detail.epsilon == detail.rdp_epsilon < math.inf
    assert PRV.delta([(SampledGaussian(3.0, 3e-14), 1), (SampledGaussian(0.08, 0.002), 2)], 60.0) > 0
