"""Capped and fixed-size batches: against real mechanisms, convolved losses, quadrature and dp-accounting."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracles import capped_sums, composed_delta, hockey_stick, one_step_delta, renyi_log_moment, sampled_losses, swapped_losses
from scipy import stats

from accounting import (
    ACCOUNTANTS,
    AccountingError,
    CappedGaussian,
    FixedSizeGaussian,
    SampledGaussian,
    event_from_dict,
    get_accountant,
    shuffled_pass,
)
from accounting.binomial import log_tail
from accounting.mixtures import components, simplify
from accounting.prv import PRVAccountant
from accounting.rdp import _one_log_moment

RELATIONS = ["add_remove", "zero_out", "replace_one"]


# -- the binomial tail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [Fraction(1, 100), Fraction(1, 2), Fraction(9, 10), Fraction(999, 1000)])
@pytest.mark.parametrize("trials", [1, 7, 60])
def test_tail_is_on_the_safe_side(trials, rate):
    masses = [math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(trials + 1)]
    for least in range(trials + 2):
        exact = sum(masses[least:])
        above, below = (log_tail(trials, float(rate), least, upper=side) for side in (True, False))
        assert math.exp(below) * (1 - 1e-8) <= exact * (1 + Fraction(1, 10**15)) <= math.exp(above) * (1 + 1e-8) + 1e-15
        assert (exact == 0) == (above == -math.inf) and below <= above
        if 0 < exact < 1:
            log_exact = math.log(exact)
            assert below <= log_exact + 1e-14 and above >= log_exact - 1e-14 and above - below <= 1e-8


@pytest.mark.parametrize(("trials", "rate"), [(10_000, 0.01), (10**6, 1e-3), (10**9, 1e-6), (50_000, 0.6)])
def test_tail_of_many(trials, rate):
    mean, spread = trials * rate, math.sqrt(trials * rate * (1 - rate))
    for far in (-6.0, -1.0, 0.0, 1.0, 6.0, 15.0):
        least = round(mean + far * spread)
        exact = stats.binom.logsf(least - 1, trials, rate)
        assert log_tail(trials, rate, least, upper=False) <= exact + 1e-9
        assert exact - 1e-9 <= log_tail(trials, rate, least) <= exact + 1e-3


# -- the events ---------------------------------------------------------------------------------------------------------

EVENTS = [CappedGaussian(1.5, 0.01, 10_000, 150), FixedSizeGaussian(0.7, 50_000, 256), SampledGaussian(1.0, 0.1)]


@pytest.mark.parametrize("event", EVENTS)
def test_round_trip(event):
    assert event_from_dict(json.loads(json.dumps(event.to_dict()))) == event
    assert type(event).from_dict(event.to_dict()) == event
    for spoiled in ({**event.to_dict(), "extra": 1}, {"kind": event.kind}, {**event.to_dict(), "noise_multiplier": "1"}, [], None):
        with pytest.raises(AccountingError):
            type(event).from_dict(spoiled)
    with pytest.raises(AccountingError, match="kind must be one of sampled_gaussian, capped_gaussian"):
        event_from_dict({**event.to_dict(), "kind": "laplace"})


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3", None, math.nan, 10**13])
def test_sizes(bad):
    for make in (
        lambda: CappedGaussian(1.0, 0.1, bad, 5),
        lambda: CappedGaussian(1.0, 0.1, 5, bad),
        lambda: FixedSizeGaussian(1.0, bad, 1),
    ):
        with pytest.raises(AccountingError, match=r"num_examples|max_batch_size"):
            make()
    with pytest.raises(AccountingError, match="batch_size"):
        FixedSizeGaussian(1.0, 10, bad)
    with pytest.raises(AccountingError, match="exceeds num_examples"):
        FixedSizeGaussian(1.0, 10, 11)


@pytest.mark.parametrize("name", ACCOUNTANTS)
@pytest.mark.parametrize("relation", ["add_remove", "zero_out"])
def test_fixed_size_needs_replace_one(name, relation):
    with pytest.raises(AccountingError, match="use relation replace_one"):
        get_accountant(name, relation).epsilon([(FixedSizeGaussian(1.0, 100, 10), 1)], 1e-5)


def test_a_shuffled_pass_is_a_full_release():
    assert shuffled_pass(2.0) == SampledGaussian(2.0, 1.0)


@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_what_binds_nowhere_costs_nothing(name):
    for relation in RELATIONS:
        judge, plain = get_accountant(name, relation), [(SampledGaussian(1.0, 0.02), 300)]
        loose = [(CappedGaussian(1.0, 0.02, 500, 501 - (relation == "replace_one")), 300)]
        assert judge.epsilon(loose, 1e-5) == judge.epsilon(plain, 1e-5)
        rare = [(CappedGaussian(1.0, 0.02, 5000, 300), 300)]  # 20 standard deviations above the mean
        assert judge.epsilon(rare, 1e-5) == pytest.approx(judge.epsilon(plain, 1e-5), rel=1e-6)
    whole, judge = [(FixedSizeGaussian(3.0, 50, 50), 20)], get_accountant(name, "replace_one")
    assert judge.epsilon(whole, 1e-5) == judge.epsilon([(SampledGaussian(3.0, 1.0), 20)], 1e-5)


def test_weights_cover_everything():
    for relation in RELATIONS:
        for cap in (1, 90, 100, 130, 170, 400):
            for event, _ in simplify([(CappedGaussian(1.0, 0.01, 10_000, cap), 1)], PRVAccountant(relation).relation):
                parts = components(event, PRVAccountant(relation).relation)
                # Under add_remove the weights are those of two sizes; the tail differs by q P(X = cap - 1).
                more = 0.01 * stats.binom.pmf(cap - 1, 9_999, 0.01) if relation == "add_remove" else 0.0
                assert 1.0 - 1e-15 <= math.fsum(math.exp(part.log_weight) for part in parts) <= 1.0 + more + 1e-7


# -- real mechanisms -----------------------------------------------------------------------------------------------------

# Others, rate, cap: the cap binds seldom, often, always.
CAPS = [(12, 0.3, 8), (12, 0.5, 5), (20, 0.1, 2), (9, 0.4, 1), (6, 1.0, 3), (6, 0.95, 6)]


@pytest.mark.parametrize(("others", "q", "cap"), CAPS)
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("name", ACCOUNTANTS)
@pytest.mark.parametrize("base", [-1.0, 0.0, 0.5])
def test_real_capped_mechanism_stays_below(name, relation, others, q, cap, base):
    sigma = 1.1
    first, second = {"add_remove": (1.0, None), "zero_out": (1.0, 0.0), "replace_one": (1.0, -1.0)}[relation]
    scale = 2.0 if relation == "replace_one" else 1.0
    mechanism = [capped_sums(others, q, cap, base, record) for record in (first, second)]
    event = CappedGaussian(sigma / scale, q, others + (relation == "replace_one"), cap)
    judge = get_accountant(name, relation)
    for epsilon in (0.02, 0.5, 1.5, 3.0):
        exact = hockey_stick(*mechanism, sigma, epsilon)
        assert judge.delta([(event, 1)], epsilon) >= exact * (1 - 1e-6) - 1e-12


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_cap_is_not_free_under_any_relation(relation):
    # Everyone else contributes -C: a record that displaces one of them moves the sum by up to twice the norm, under zero_out, too, where
    # which positions are kept does not depend on values. The uncapped event would under-report.
    first, second = {"add_remove": (1.0, None), "zero_out": (1.0, 0.0), "replace_one": (1.0, -1.0)}[relation]
    scale = 2.0 if relation == "replace_one" else 1.0
    exact = hockey_stick(*[capped_sums(40, 0.25, 3, -1.0, record) for record in (first, second)], 0.8, 4.0)
    judge = get_accountant("prv", relation)
    assert judge.delta([(SampledGaussian(0.8 / scale, 0.25), 1)], 4.0) < 0.3 * exact
    assert judge.delta([(CappedGaussian(0.8 / scale, 0.25, 41, 3), 1)], 4.0) >= exact


@pytest.mark.parametrize(("n", "size"), [(10, 1), (10, 5), (100, 3), (8, 7)])
@pytest.mark.parametrize("name", ACCOUNTANTS)
@pytest.mark.parametrize("base", [-1.0, 0.0, 1.0, 0.3])
def test_real_fixed_size_mechanism_stays_below(name, n, size, base):
    sigma, gamma = 1.6, size / n
    mechanism = [
        {base * size: 1 - gamma, base * (size - 1) + record: gamma} if base != record else {base * size: 1.0} for record in (1.0, -1.0)
    ]
    judge = get_accountant(name, "replace_one")
    for epsilon in (0.02, 0.5, 1.5, 3.0):
        exact = hockey_stick(*mechanism, sigma, epsilon)
        assert judge.delta([(FixedSizeGaussian(sigma / 2, n, size), 1)], epsilon) >= exact * (1 - 1e-6) - 1e-12


# -- losses ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "n", "size"), [(0.5, 1000, 10), (1.0, 10, 1), (3.0, 10, 7)])
def test_one_fixed_size_release_is_exact(sigma, n, size):
    # Above epsilon 0 it is the worse direction of the sampled pair.
    judge, event = get_accountant("prv", "replace_one"), [(FixedSizeGaussian(sigma, n, size), 1)]
    for epsilon in (0.02, 0.4, 1.2):
        remove = composed_delta(sampled_losses(sigma, size / n, "remove"), 1, epsilon, 1e-4)
        assert remove[0] * (1 - 1e-9) <= judge.delta(event, epsilon) <= remove[1] * (1 + 3e-3) + 1e-12
        assert judge.delta(event, epsilon) <= one_step_delta(sigma, size / n, "add_remove", epsilon) * (1 + 3e-3) + 1e-12


@pytest.mark.parametrize(("sigma", "n", "size", "count"), [(1.0, 100, 5, 8), (0.6, 20, 1, 4), (4.0, 10, 9, 20), (0.8, 100, 1, 9)])
def test_composed_fixed_size_losses(sigma, n, size, count):
    judge, event = get_accountant("prv", "replace_one"), [(FixedSizeGaussian(sigma, n, size), count)]
    masses = swapped_losses(sigma, size / n)
    for epsilon in (0.05, 0.6, 1.5):
        low, high = composed_delta(masses, count, epsilon, 5e-4)
        if high > 1e-12:
            assert low * (1 - 1e-6) <= judge.delta(event, epsilon) <= high * 1.01 + 1e-12
    assert judge.detail(event, 1e-4).method == "grid"


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(("sigma", "q", "n", "cap", "count"), [(1.0, 0.1, 200, 22, 6), (0.8, 0.02, 500, 11, 5), (2.0, 0.5, 30, 10, 4)])
def test_composed_capped_losses(relation, sigma, q, n, cap, count):
    # Under add_remove the data set may be the smaller or the larger one, and the bound covers both.
    least, most = n - 1, n - (relation != "add_remove")
    judge, event = get_accountant("prv", relation), [(CappedGaussian(sigma, q, n, cap), count)]

    def delta(epsilon, room, full, enters):
        """Of the mixture with the weights and the rate of these numbers of others."""
        free, tau = stats.binom.cdf(cap - 1, room, q), stats.binom.sf(cap - 1, full, q)
        rate = cap / (enters + 1) * stats.binom.sf(cap, enters + 1, q) / stats.binom.sf(cap - 1, enters, q)
        swapped = swapped_losses(sigma if relation == "replace_one" else sigma / 2, rate)
        bounds = []
        for direction in ("replace",) if relation == "replace_one" else ("remove", "add"):
            usual = sampled_losses(sigma, q, direction)
            masses = tuple(np.concatenate([free * a, tau * b]) for a, b in zip(usual, swapped, strict=True))
            bounds.append(composed_delta(masses, count, epsilon, 5e-4))
        return tuple(max(side) for side in zip(*bounds, strict=True))

    for epsilon in (0.3, 1.2):
        low = max(delta(epsilon, others, others, others)[0] for others in (least, most))
        high = delta(epsilon, least, most, least)[1]
        assert low * (1 - 1e-6) <= judge.delta(event, epsilon) <= high * 1.01 + 1e-12


@pytest.mark.parametrize(("relation", "event", "epsilon", "least"), [
    ("zero_out", CappedGaussian(0.3, 0.9, 2, 1), 1.0, 0.4190),  # the other record contributes -C, this one C or nothing
    ("add_remove", CappedGaussian(1.0, 0.9, 20, 5), 2.0, 0.03775),  # the data set being the larger one
    ("add_remove", CappedGaussian(2.0, 0.5, 200, 20), 2.0, 2.355e-6),
])  # fmt: skip
def test_capped_covers_both_sizes(relation, event, epsilon, least):
    for name in ("prv", "rdp"):
        assert get_accountant(name, relation).delta([(event, 1)], epsilon) >= least


def test_weights_of_capped_add_up_in_huge_data_sets():
    # A record enters with probability 1 - (1 - q)^1 at least once in N tries only if no weight is lost.
    n = 10**12
    found = get_accountant("prv").advantage([(CappedGaussian(0.02, 0.5 / n, n, 1), 1)])
    assert found >= 0.7869 * 0.5 / n


def test_heterogeneous_ledger_between_its_bounds():
    events = [
        (FixedSizeGaussian(1.0, 10_000, 100), 500),
        (SampledGaussian(1.2, 0.02), 300),
        (CappedGaussian(0.9, 0.01, 10_000, 140), 300),
        (SampledGaussian(20.0, 1.0), 5),
    ]
    detail = get_accountant("prv", "replace_one").detail(events, 1e-5)
    assert detail.method == "grid" and 0.6 * detail.epsilon < detail.lower < detail.epsilon < detail.rdp_epsilon
    parts = [get_accountant("prv", "replace_one").epsilon([part], 1e-5) for part in events]
    assert max(parts) < detail.epsilon
    for relation in ("add_remove", "zero_out"):
        detail = get_accountant("prv", relation).detail(events[1:], 1e-5)
        assert detail.method == "grid" and 0.5 * detail.epsilon < detail.lower < detail.epsilon < detail.rdp_epsilon


@pytest.mark.parametrize(("sigma", "q"), [(0.7, 0.1), (1.5, 0.02), (2.0, 0.7)])
@pytest.mark.parametrize("order", [1.3, 2.0, 7.5, 20.0])
def test_moment_of_a_swapped_pair(sigma, q, order):
    p, r = swapped_losses(sigma, q)
    used = (p > 0) & (r > 0)
    exact = math.log(float((r[used] * np.exp(np.minimum(order * np.log(p[used] / r[used]), 600))).sum()))
    ours = _one_log_moment(FixedSizeGaussian(sigma, 1000, round(1000 * q)), order, PRVAccountant("replace_one").relation)
    assert exact * (1 - 1e-6) <= ours
    # Never more than twice the excess of the worse direction.
    assert math.expm1(ours) <= 2 * math.expm1(renyi_log_moment(sigma, q, order, "add_remove")) * (1 + 1e-6)


# -- other libraries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cap", "reference"), [(200, 0.718), (130, 2.09), (100, 5.55)])
def test_capped_reference_values(cap, reference):
    ours = get_accountant("prv").epsilon([(CappedGaussian(1.0, 0.01, 10_000, cap), 100)], 1e-5)
    assert ours == pytest.approx(reference, rel=0.01)


@pytest.mark.parametrize(
    ("sigma", "q", "n", "cap", "count"), [(1.0, 0.01, 10_000, 120, 100), (2.0, 0.05, 2000, 110, 300), (0.8, 0.001, 50_000, 60, 1000)]
)
@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_capped_against_dp_accounting(sigma, q, n, cap, count, relation):
    from dp_accounting.pld import privacy_loss_distribution as pld

    # Their noise multiplier is relative to the norm under every relation; for a filled batch they take centres that lie further apart.
    kind = pld.NeighborRel.ADD_OR_REMOVE_ONE if relation == "add_remove" else pld.NeighborRel.REPLACE_ONE
    scale = 2.0 if relation == "replace_one" else 1.0
    step = pld.from_truncated_subsampled_gaussian_mechanism(
        n, q, cap, sigma * scale, value_discretization_interval=1e-3, neighboring_relation=kind
    )
    theirs = step.self_compose(count).get_epsilon_for_delta(1e-5)
    ours = get_accountant("prv", relation).epsilon([(CappedGaussian(sigma, q, n, cap), count)], 1e-5)
    # Ours covers the data set's being either size, theirs one of them: 0.3 % where a batch of 50 is capped at 60.
    assert 0.8 * theirs <= ours <= theirs * (1.004 if relation == "add_remove" else 1.002)


def test_fixed_size_against_dp_accounting():
    import dp_accounting

    for sigma, n, size, count in [(1.0, 10_000, 100, 10_000), (2.0, 1000, 50, 500), (0.8, 100_000, 100, 1000)]:
        accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
        # Their Renyi accountant takes the noise multiplier relative to the replace-one sensitivity, as we do.
        step = dp_accounting.SampledWithoutReplacementDpEvent(n, size, dp_accounting.GaussianDpEvent(sigma))
        theirs = accountant.compose(step, count).get_epsilon(1e-5)
        # The truth is at least what the sampled pair costs, which everyone else contributing -C attains.
        least = get_accountant("prv").detail([(SampledGaussian(sigma, size / n), count)], 1e-5).lower
        rdp, prv = (
            get_accountant(name, "replace_one").epsilon([(FixedSizeGaussian(sigma, n, size), count)], 1e-5) for name in ("rdp", "prv")
        )
        assert least < prv < rdp < theirs
    detail = get_accountant("prv", "replace_one").detail([(FixedSizeGaussian(1.0, 10_000, 100), 10_000)], 1e-5)
    assert 6.17 < detail.lower < 6.19 < detail.epsilon < 13.15


# -- properties -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACCOUNTANTS)
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    sigma=st.floats(0.5, 8), log_q=st.floats(-6, -0.3), n=st.integers(50, 5000), ratio=st.floats(0.3, 3), steps=st.integers(1, 500),
    relation=st.sampled_from(RELATIONS),
)  # fmt: skip
def test_capped_is_monotone(name, sigma, log_q, n, ratio, steps, relation):
    judge, q = get_accountant(name, relation), math.exp(log_q)
    cap = max(1, round(ratio * q * n))
    spend = lambda sigma, q, cap, steps: judge.epsilon([(CappedGaussian(sigma, q, n, cap), steps)], 1e-6)  # noqa: E731
    epsilon = spend(sigma, q, cap, steps)
    assert math.isfinite(epsilon) and epsilon >= 0
    assert spend(sigma * 1.5, q, cap, steps) <= epsilon * (1 + 1e-3)
    assert spend(sigma, q, cap, 2 * steps) >= epsilon * (1 - 1e-3)
    assert judge.epsilon([(CappedGaussian(sigma, q, n, cap), steps)], 1e-5) <= epsilon * (1 + 1e-3)
    if cap > q * n:  # below, a smaller cap also means that hardly anyone is in a batch
        assert spend(sigma, q, cap + n // 10 + 1, steps) <= epsilon * (1 + 1e-3)
        assert epsilon >= judge.epsilon([(SampledGaussian(sigma, q), steps)], 1e-6) * (1 - 1e-3)
    detail = get_accountant("prv", relation).detail([(CappedGaussian(sigma, q, n, cap), steps)], 1e-6)
    assert detail.lower <= detail.epsilon <= detail.rdp_epsilon


@pytest.mark.parametrize("name", ACCOUNTANTS)
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(sigma=st.floats(0.4, 20), n=st.integers(2, 10**6), share=st.floats(0, 1), steps=st.integers(1, 2000))
def test_fixed_size_is_monotone(name, sigma, n, share, steps):
    judge, size = get_accountant(name, "replace_one"), max(1, round(n ** (1 - share)))
    spend = lambda sigma, size, steps: judge.epsilon([(FixedSizeGaussian(sigma, n, size), steps)], 1e-6)  # noqa: E731
    epsilon = spend(sigma, size, steps)
    assert math.isfinite(epsilon) and epsilon >= 0
    assert spend(sigma * 1.5, size, steps) <= epsilon * (1 + 1e-3)
    assert spend(sigma, max(1, size // 2), steps) <= epsilon * (1 + 1e-3)
    assert spend(sigma, size, 2 * steps) >= epsilon * (1 - 1e-3)
    assert epsilon >= judge.epsilon([(SampledGaussian(sigma, size / n), steps)], 1e-6) * (1 - 1e-3)
    if name == "prv":
        detail = judge.detail([(FixedSizeGaussian(sigma, n, size), steps)], 1e-6)
        assert detail.lower <= detail.epsilon <= detail.rdp_epsilon
        assert judge.epsilon([(SampledGaussian(sigma, 1.0), steps)], 1e-6) >= epsilon * (1 - 1e-3)


@pytest.mark.parametrize("name", ACCOUNTANTS)
@pytest.mark.parametrize("sigma", [0.3, 100.0])
@pytest.mark.parametrize("steps", [1, 1_000_000])
def test_extremes_are_finite(name, sigma, steps):
    events = [CappedGaussian(sigma, 0.3, 10**6, cap) for cap in (1, 299_000, 300_500, 310_000)]
    events += [CappedGaussian(sigma, 1e-6, 10**6, 2), CappedGaussian(sigma, 1.0, 10**6, 10**5)]
    events += [FixedSizeGaussian(sigma, 10**6, size) for size in (1, 10**3, 10**6 - 1)]
    for event in events:
        judge = get_accountant(name, "replace_one")
        assert 0.0 <= judge.epsilon([(event, steps)], 1e-6) < math.inf
        if isinstance(event, CappedGaussian):
            assert 0.0 <= get_accountant(name).epsilon([(event, steps)], 1e-6) < math.inf
