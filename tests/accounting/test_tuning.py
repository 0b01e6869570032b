"""Hyper-parameter search: theorems 2 and 6 against dp-accounting and against the exact law of the best of K Gaussian runs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from accounting import ACCOUNTANTS, AccountingError, CappedGaussian, SampledGaussian, Tuning, event_from_dict, get_accountant, trade_off

RUN = ((SampledGaussian(2.0, 0.01), 1000),)
RANDOM = [("geometric", None), ("logarithmic", None), ("negative_binomial", 0.5), ("negative_binomial", -0.5), ("poisson", None)]


def generating(search: Tuning):
    """Derivative of the generating function of K, from its definition."""
    if search.distribution == "poisson":
        return lambda x: search.tries * np.exp(search.tries * (x - 1))
    eta, keep = search.shape, 1 - search.gamma
    if eta == 0:
        return lambda x: keep / (1 - keep * x) / -math.log(search.gamma)
    return lambda x: eta * keep * (1 - keep * x) ** (-eta - 1) / (search.gamma**-eta - 1)


@pytest.mark.parametrize(("distribution", "shape"), RANDOM)
@pytest.mark.parametrize("tries", [1.5, 8, 300])
@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_the_best_of_real_gaussian_runs_stays_below(distribution, shape, tries, sigma):
    # The score is the released value itself. Its density is f'(F(y)) p(y), F the distribution function of one run.
    search = Tuning([(SampledGaussian(sigma, 1.0), 1)], tries, distribution, shape)
    x, rise = np.linspace(-12, 14, 200_001) * sigma, generating(search)
    first, second = (rise(stats.norm.cdf(x, c, sigma)) * stats.norm.pdf(x, c, sigma) for c in (1.0, 0.0))
    step = x[1] - x[0]
    nothing = math.exp(-tries) if distribution == "poisson" else 0.0
    assert float(first.sum()) * step + nothing == pytest.approx(1, abs=1e-6)
    for epsilon in (0.5, 1.5, 3.0):
        exact = max(float(np.maximum(a - math.exp(epsilon) * b, 0).sum() * step) for a, b in ((first, second), (second, first)))
        for name in ACCOUNTANTS:
            assert get_accountant(name).delta([(search, 1)], epsilon) >= exact * (1 - 1e-6)
    for order in (1.5, 4.0):  # the moment itself, too: it lies between that of one run and the bound
        ratio = order * np.log(np.maximum(first, 1e-300)) + (1 - order) * np.log(np.maximum(second, 1e-300))
        exact = math.log(float(np.exp(np.minimum(ratio, 700)).sum()) * step + nothing)
        from accounting.rdp import _one_log_moment

        assert exact <= _one_log_moment(search, order, get_accountant("rdp").relation) + 1e-9


@pytest.mark.parametrize(
    ("distribution", "shape"), [("geometric", 1.0), ("logarithmic", 0.0), ("negative_binomial", 0.5), ("poisson", math.inf)]
)
@pytest.mark.parametrize(("sigma", "q", "steps", "tries"), [(2.0, 0.01, 1000, 20), (1.0, 0.01, 500, 100), (8.0, 0.02, 2000, 10)])
def test_against_dp_accounting(distribution, shape, sigma, q, steps, tries):
    import dp_accounting

    orders = np.concatenate([1 + np.geomspace(0.05, 10, 120), np.arange(12, 300, 4)])
    accountant = dp_accounting.rdp.RdpAccountant(list(orders))
    run = dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps)
    accountant.compose(dp_accounting.dp_event.RepeatAndSelectDpEvent(run, mean=tries, shape=shape))
    search = Tuning([(SampledGaussian(sigma, q), steps)], tries, distribution, 0.5 if shape == 0.5 else None)
    ours, theirs = get_accountant("rdp").epsilon([(search, 1)], 1e-5), accountant.get_epsilon(1e-5)
    assert 0.98 * theirs <= ours <= theirs * 1.001


@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_a_fixed_number_of_tries_is_composition(name):
    judge = get_accountant(name)
    search = Tuning([*RUN, (CappedGaussian(3.0, 0.01, 1000, 40), 5)], 7, "fixed")
    plain = [(SampledGaussian(2.0, 0.01), 14_000), (CappedGaussian(3.0, 0.01, 1000, 40), 70)]
    assert judge.epsilon([(search, 2)], 1e-5) == judge.epsilon(plain, 1e-5)
    if name == "prv":
        assert judge.detail([(search, 2)], 1e-5).method == "grid"


def test_prv_reports_the_fallback():
    events = [(Tuning(RUN, 20), 1), (SampledGaussian(2.0, 0.01), 100)]
    detail = get_accountant("prv").detail(events, 1e-5)
    assert (detail.method, detail.lower, detail.grid_epsilon) == ("rdp", 0.0, math.inf)
    assert detail.epsilon == detail.rdp_epsilon == get_accountant("rdp").epsilon(events, 1e-5)
    assert get_accountant("prv").delta(events, 2.0) == get_accountant("rdp").delta(events, 2.0)
    curve = trade_off(events)
    assert curve.advantage < 0.9 and curve.true_positive_rate(1e-3) < 0.2
    assert get_accountant("prv").advantage(events) == get_accountant("rdp").advantage(events)


def test_more_tries_cost_more_and_random_ones_less_than_all():
    judge = get_accountant("rdp")
    spend = lambda *search: judge.epsilon([(Tuning(RUN, *search), 1)], 1e-5)  # noqa: E731
    once = judge.epsilon(RUN, 1e-5)
    for distribution in ("geometric", "logarithmic", "poisson"):
        costs = [spend(tries, distribution) for tries in (2, 10, 100, 10_000)]
        assert once < costs[0] and costs == sorted(costs)
        assert spend(100, distribution) < spend(100, "fixed")
    assert spend(10, "geometric") == pytest.approx(spend(10, "negative_binomial", 1.0), rel=1e-9)


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_two_searches_compose(relation):
    judge, search = get_accountant("rdp", relation), Tuning(RUN, 5)
    one, two = (judge.epsilon([(search, n)], 1e-5) for n in (1, 2))
    assert one < two < 2 * one
    assert judge.delta([(search, 1)], one * 1.001) <= 1e-5


@pytest.mark.parametrize("shape", [-0.9, -0.5, 0.0, 1e-12, 0.3, 1.0, 50.0])
@pytest.mark.parametrize("tries", [1.01, 3, 1e4])
def test_gamma_gives_the_mean(shape, tries):
    search = Tuning(RUN, tries, "negative_binomial", shape)
    gamma, few = search.gamma, abs(shape) < 1e-9
    mean = (1 / gamma - 1) / -math.log(gamma) if few else shape * (1 - gamma) / gamma / -math.expm1(shape * math.log(gamma))
    assert tries * (1 - 1e-9) <= mean <= tries * (1 + 1e-6)


@pytest.mark.parametrize(
    "search", [Tuning(RUN, 20), Tuning(RUN, 3, "fixed"), Tuning(RUN, 7.5, "poisson"), Tuning(RUN, 9, "negative_binomial", 0.3)]
)
def test_round_trip(search):
    data = json.loads(json.dumps(search.to_dict()))
    assert event_from_dict(data) == search and hash(event_from_dict(data)) == hash(search)
    nested = {**data, "events": [{"event": data, "count": 1}]}
    for spoiled in (
        nested,
        {**data, "tries": "3"},
        {**data, "events": []},
        {**data, "events": {}},
        {**data, "events": [1]},
        {**data, "more": 1},
    ):
        with pytest.raises(AccountingError):
            event_from_dict(spoiled)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 5), "releases of one run"),
        (([(SampledGaussian(1.0, 0.1), 0)], 5), "releases of one run"),
        (([(Tuning(RUN, 5), 1)], 5), "no search of its own"),
        ((RUN, 0.5), "between 1 and"),
        ((RUN, math.nan), "tries must be finite"),
        ((RUN, 2.5, "fixed"), "tries must be an integer"),
        ((RUN, 5, "binomial"), "distribution must be one of"),
        ((RUN, 5, "negative_binomial"), "shape must be a real number"),
        ((RUN, 5, "negative_binomial", -1.0), "shape must lie above -1"),
        ((RUN, 5, "poisson", 1.0), "leave it out for poisson"),
        (([(SampledGaussian(1.0, 0.1), 2000)], 10**9, "fixed"), "more than 10"),
    ],
)
def test_bad_searches(arguments, message):
    with pytest.raises(AccountingError, match=message):
        Tuning(*arguments)
    with pytest.raises(AccountingError, match="has no gamma"):
        _ = Tuning(RUN, 5, "poisson").gamma
    with pytest.raises(AccountingError, match="too close to -1"):
        _ = Tuning(RUN, 1e6, "negative_binomial", -0.999).gamma
