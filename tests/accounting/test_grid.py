"""A grid of settings, extremes among them, against dp-accounting's two accountants, Opacus' Renyi one and closed forms.

`prv` is an upper bound and carries its own lower bound: lower <= truth <= upper, with every other sound bound on the right side.
"""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
from oracles import dp_accounting_pld, dp_accounting_rdp
from scipy import optimize, stats

from accounting import SampledGaussian, get_accountant

RDP, PRV = get_accountant("rdp"), get_accountant("prv")

# Sample rate, noise multiplier, steps: epsilons from about 0.01 to 100 (and beyond, where the noise is tiny).
ORDINARY = [
    *itertools.product((1e-3, 1e-2), (0.6, 1.0, 3.0), (1, 100, 10_000)),
    *itertools.product((0.05, 0.3), (0.8, 2.0, 10.0), (1, 30, 1000)),
    *itertools.product((0.9,), (1.0, 5.0, 100.0), (1, 100)),
]
EXTREME = [
    *itertools.product((1e-6, 1e-5), (0.3, 1.0, 100.0), (1, 1_000_000)),
    *itertools.product((1e-3, 0.1, 0.999), (0.3, 100.0), (1, 1_000_000)),
    *itertools.product((1e-4,), (0.5, 20.0), (1000, 300_000)),
]
FULL = [*itertools.product((0.3, 1.0, 4.0, 30.0, 100.0), (1, 40, 1_000_000))]


def test_the_grid_is_large_enough():
    settings = {*ORDINARY, *EXTREME, *((1.0, sigma, steps) for sigma, steps in FULL)}
    assert len(settings) >= 60
    assert min(settings)[0] == 1e-6 and max(settings)[0] == 1.0 and max(steps for _, _, steps in settings) == 1_000_000
    assert {0.3, 100.0} <= {sigma for _, sigma, _ in settings}


def check_bracket(q, sigma, steps, delta):
    """Returns the detail, after checking what must hold of every one."""
    events = [(SampledGaussian(sigma, q), steps)]
    detail, rdp = PRV.detail(events, delta), RDP.epsilon(events, delta)
    assert all(math.isfinite(value) for value in (detail.epsilon, detail.lower, rdp))
    assert 0.0 <= detail.lower <= detail.epsilon <= rdp
    # 0 only where an example is seldom sampled at all, or the noise hides it: delta is then large enough for epsilon 0.
    if detail.epsilon == 0.0:
        assert min(-math.expm1(steps * math.log1p(-q)), PRV.advantage(events)) <= delta * (1 + 1e-6)
    assert rdp > 0.0 or detail.epsilon == 0.0
    return detail, rdp


@pytest.mark.parametrize(("q", "sigma", "steps"), [*ORDINARY, *EXTREME])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_bracket_and_renyi(q, sigma, steps, delta):
    detail, rdp = check_bracket(q, sigma, steps, delta)
    # dp-accounting's Renyi bound is sound: the truth is below it. Ours takes more orders, so it is not above it either.
    theirs = dp_accounting_rdp([(sigma, q, steps)], delta)
    assert detail.lower <= theirs * (1 + 1e-9) and rdp <= theirs * 1.002 + 1e-12
    # What the bracket leaves open: 3 % of epsilon, 6 % where one rare large loss decides, or less than delta is worth.
    share = 0.03 if q > 1e-4 else 0.06
    assert detail.epsilon - detail.lower <= share * detail.epsilon + 10 * delta or detail.epsilon > 300


@pytest.mark.slow
@pytest.mark.parametrize(("q", "sigma", "steps"), ORDINARY)
def test_between_the_two_bounds_of_dp_accounting(q, sigma, steps):
    detail, rdp = check_bracket(q, sigma, steps, 1e-5)
    if not 0.01 <= detail.epsilon <= 100:
        pytest.skip("outside of the range that its regular grid resolves")
    interval = min(1e-3, detail.epsilon / 300)
    low = dp_accounting_pld([(sigma, q, steps)], 1e-5, interval, pessimistic=False)
    high = dp_accounting_pld([(sigma, q, steps)], 1e-5, interval)
    assert low * (1 - 1e-6) <= detail.epsilon <= high * 1.001
    assert detail.lower <= high * (1 + 1e-6) and low <= rdp


@pytest.mark.parametrize(("q", "sigma", "steps"), [(1e-2, 1.0, 100), (0.05, 0.8, 30), (0.3, 2.0, 30), (1e-3, 0.6, 10_000), (0.9, 5.0, 100)])
def test_between_the_two_bounds_of_dp_accounting_quick(q, sigma, steps):
    detail, _ = check_bracket(q, sigma, steps, 1e-5)
    low, high = (dp_accounting_pld([(sigma, q, steps)], 1e-5, 3e-3, pessimistic=side) for side in (False, True))
    assert low * (1 - 1e-6) <= detail.epsilon <= high * 1.001 and detail.lower <= high * (1 + 1e-6)


@pytest.mark.parametrize(("sigma", "steps"), FULL)
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_full_batches_have_a_closed_form(sigma, steps, delta):
    # Balle and Wang 2018, theorem 8, solved here by bisection.
    mu = math.sqrt(steps) / sigma

    def excess(e):
        first, second = stats.norm.logcdf(mu / 2 - e / mu), e + stats.norm.logcdf(-mu / 2 - e / mu)
        return first + math.log(max(-math.expm1(second - first), 1e-300)) - math.log(delta)

    events = [(SampledGaussian(sigma, 1.0), steps)]
    detail = PRV.detail(events, delta)
    assert 0.0 <= detail.lower <= detail.epsilon <= RDP.epsilon(events, delta) < math.inf
    if mu < 100:  # beyond, the oracle's logarithms lose their digits
        exact = 0.0 if excess(1e-12) < 0 else optimize.brentq(excess, 1e-12, mu * mu / 2 + 40 * mu + 10)
        assert exact * (1 - 1e-6) <= detail.epsilon <= exact * (1 + 1e-6) + 1e-9
        assert detail.lower <= exact * (1 + 1e-6)


@pytest.mark.parametrize("relation", ["replace_one", "zero_out"])
@pytest.mark.parametrize(("q", "sigma", "steps"), [*ORDINARY[::4], *EXTREME[::3]])
def test_other_relations_bracket(relation, q, sigma, steps):
    events = [(SampledGaussian(sigma, q), steps)]
    detail = get_accountant("prv", relation).detail(events, 1e-6)
    assert 0.0 <= detail.lower <= detail.epsilon <= get_accountant("rdp", relation).epsilon(events, 1e-6) < math.inf


def test_opacus_renyi_accountant_is_not_below_the_truth():
    opacus = pytest.importorskip("opacus.accountants.analysis.rdp")
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    for q, sigma, steps in ORDINARY[::5]:
        rdp = opacus.compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=orders)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the best order at an end of the list: looser, as sound
            theirs, _ = opacus.get_privacy_spent(orders=orders, rdp=rdp, delta=1e-5)
        ours = PRV.detail([(SampledGaussian(sigma, q), steps)], 1e-5)
        assert ours.lower <= theirs * (1 + 1e-9) and ours.epsilon <= theirs * (1 + 2e-3) + 1e-9
