"""The certified trade-off curve against the exact one of a Gaussian, quadrature, and a real attack."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from oracles import densities
from scipy import stats

from accounting import ACCOUNTANTS, AccountingError, SampledGaussian, TradeOff, get_accountant, trade_off

RATES = np.geomspace(1e-6, 0.6, 60)
MIXED = ((SampledGaussian(1.0, 0.02), 200), (SampledGaussian(8.0, 1.0), 3), (SampledGaussian(0.7, 1e-3), 50))


def gaussian(mu):
    """The exact true-positive rate at every false-positive rate, from either side of the pair."""
    return lambda rate: stats.norm.sf(stats.norm.isf(rate) - mu)


@pytest.mark.parametrize(("sigma", "count"), [(100.0, 1), (2.0, 1), (4.0, 100), (0.5, 1), (1.0, 49)])
@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_gaussian(sigma, count, name):
    mu = math.sqrt(count) / sigma
    curve, exact = trade_off([(SampledGaussian(sigma, 1.0), count)], accountant=name), gaussian(mu)
    advantage = 2 * stats.norm.cdf(mu / 2) - 1
    assert advantage <= curve.advantage
    for rate in (1e-12, 1e-9, *RATES, 0.99, 1 - 1e-9):
        assert curve.true_positive_rate(rate) >= exact(rate) * (1 - 1e-12)
        missed = curve.type_two_error(rate)
        assert 0 <= missed <= stats.norm.cdf(stats.norm.isf(rate) - mu) * (1 + 1e-12)
    if name == "prv":
        assert curve.advantage <= advantage * (1 + 1e-9)
        assert all(curve.true_positive_rate(rate) <= exact(rate) * 1.003 for rate in RATES)


def hull(points):
    """The smallest concave function through or above the points, as sorted arrays."""
    kept = []
    for x, y in sorted(points):
        while len(kept) > 1 and (kept[-1][1] - kept[-2][1]) * (x - kept[-2][0]) <= (y - kept[-2][1]) * (kept[-1][0] - kept[-2][0]):
            kept.pop()
        kept.append((x, y))
    return np.array(kept).T


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
@pytest.mark.parametrize(("sigma", "q"), [(0.5, 0.01), (1.0, 0.2), (3.0, 0.7)])
def test_one_release_is_tight(sigma, q, relation):
    # Neyman and Pearson: the optimal tests of one release are thresholds. Of both directions, and of mixtures of the two.
    curve, x = trade_off([(SampledGaussian(sigma, q), 1)], relation), np.linspace(-9 * sigma, 9 * sigma + 1, 20_001)
    tail = lambda centre: (1 - q) * stats.norm.sf(x / sigma) + q * stats.norm.sf((x - centre) / sigma)  # noqa: E731
    true, false = (tail(0.5), tail(-0.5)) if relation == "replace_one" else (tail(1.0), stats.norm.sf(x / sigma))
    best = hull([*zip(false, true, strict=True), *zip(1 - true, 1 - false, strict=True), (0.0, 0.0), (1.0, 1.0)])
    for rate in RATES:
        exact = np.interp(rate, *best)
        assert exact * (1 - 1e-9) <= curve.true_positive_rate(rate) <= exact * 1.005


def test_advantage_of_one_release_is_the_total_variation():
    p, r = densities(0.8, 0.3, "add_remove")
    x = np.linspace(-10, 11, 2_000_001)
    exact = float(np.maximum(p(x) - r(x), 0).sum() * (x[1] - x[0]))
    assert exact - 1e-9 <= trade_off([(SampledGaussian(0.8, 0.3), 1)]).advantage <= exact * (1 + 1e-6)


@pytest.mark.parametrize("relation", ["add_remove", "replace_one", "zero_out"])
@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_profile_is_what_delta_says(relation, name):
    accountant = get_accountant(name, relation)
    epsilons = [0.3 + 0.05 * i for i in range(40)]
    for events in (MIXED, MIXED[:1], MIXED[1:2], [(SampledGaussian(0.7, 0.1), 1)]):
        profile = accountant.profile(events, epsilons)
        assert all(a >= b for a, b in pairwise(profile))
        for i in (0, 7, 20, 33, 39):
            assert profile[i] == pytest.approx(accountant.delta(events, epsilons[i]), rel=2e-3)
        assert accountant.profile(events, epsilons[::-1]) == profile[::-1]
        assert accountant.profile(events, [0.0])[0] >= accountant.advantage(events) > profile[0]


def test_profile_without_releases():
    for name in ACCOUNTANTS:
        assert get_accountant(name).profile([], [0.0, 1.0]) == (0.0, 0.0) and get_accountant(name).profile(MIXED, []) == ()
        with pytest.raises(AccountingError, match="epsilon"):
            get_accountant(name).profile(MIXED, [1.0, -1.0])


@pytest.mark.parametrize("events", [MIXED, ((SampledGaussian(1.0, 0.01), 1000),), ((SampledGaussian(0.6, 1e-4), 3000),)])
def test_a_curve_is_tight(events):
    curve = trade_off(events)
    fine = trade_off(events, points=600)
    assert all(fine.true_positive_rate(rate) <= curve.true_positive_rate(rate) * 1.002 for rate in RATES)
    assert all(curve.true_positive_rate(rate) <= fine.true_positive_rate(rate) * 1.005 for rate in RATES)
    loose = trade_off(events, accountant="rdp")
    assert all(curve.true_positive_rate(rate) <= loose.true_positive_rate(rate) for rate in RATES)


def test_an_attack_stays_below():
    # The optimal test of 60 releases, by simulation: the likelihood ratio, thresholded. 1e-6: 4.9 standard errors of a share.
    sigma, q, steps, trials = 0.8, 0.1, 60, 40_000
    generator, curve = np.random.default_rng(1), trade_off([(SampledGaussian(0.8, 0.1), 60)])
    ratio = lambda x: np.log1p(q * np.expm1((x - 0.5) / sigma**2)).sum(axis=1)  # noqa: E731
    without = np.sort(ratio(generator.normal(0, sigma, (trials, steps))))
    chosen = generator.random((trials, steps)) < q
    found = ratio(generator.normal(0, sigma, (trials, steps)) + chosen)
    for rate in (1e-2, 0.1, 0.3):
        threshold = without[int((1 - rate) * trials)]
        false, true = float((without >= threshold).mean()), float((found >= threshold).mean())
        slack = 4.9 / math.sqrt(4 * trials)
        assert true <= curve.true_positive_rate(false + 4.9 * math.sqrt(rate / trials)) + slack
        assert true >= 0.9 * curve.true_positive_rate(false) - slack  # the bound is attained, nearly


def test_curve_for_a_plot():
    rates, missed = trade_off([(SampledGaussian(2.0, 1.0), 1)]).curve(41)
    assert rates[0] == 0.0 and rates[-1] == 1.0 and missed[-1] == 0.0 and len(rates) == len(missed)
    assert (np.diff(missed) <= 0).all() and (missed <= 1 - rates).all()


def test_nothing_released_is_a_coin():
    curve = trade_off([])
    assert curve.advantage == 0.0 and curve.type_two_error(0.3) == pytest.approx(0.7, abs=1e-14)
    assert curve.true_positive_rate(0.3) == pytest.approx(0.3, abs=1e-14)


def test_without_epsilon_zero_the_advantage_is_still_an_upper_bound():
    whole = trade_off([(SampledGaussian(2.0, 1.0), 1)])
    part = TradeOff(whole.epsilons[5:], whole.deltas[5:], whole.relation, whole.accountant)
    assert whole.advantage <= part.advantage <= whole.advantage * 1.2


@pytest.mark.parametrize(
    ("epsilons", "deltas"), [((), ()), ((1.0,), ()), ((1.0, 0.5), (0.1, 0.2)), ((0.0,), (1.5,)), ((-1.0,), (0.5,)), ((math.nan,), (0.5,))]
)
def test_bad_sets(epsilons, deltas):
    with pytest.raises(AccountingError, match="TradeOff"):
        TradeOff(epsilons, deltas, "add_remove", "prv")


def test_bad_arguments():
    curve = trade_off([])
    for bad in (-0.1, 1.1, math.nan, "0.1", True):
        for ask in (curve.type_two_error, curve.true_positive_rate):
            with pytest.raises(AccountingError, match=r"type_one_error|false_positive_rate"):
                ask(bad)
    for points in (0, 1, 2.5, True):
        with pytest.raises(AccountingError, match="points"):
            trade_off(MIXED, points=points)
        with pytest.raises(AccountingError, match="points"):
            curve.curve(points)


def test_an_enormous_epsilon_promises_nothing():
    curve = TradeOff((800.0,), (0.0,), "add_remove", "prv")
    assert curve.type_two_error(1e-305) < 1e-9 and curve.true_positive_rate(1e-305) > 1 - 1e-9
    assert curve.type_two_error(0.0) > 1 - 1e-9
