"""Calibration is private-side and tight."""

from __future__ import annotations

import math

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy import stats

from accounting import (
    ACCOUNTANTS,
    AccountingError,
    CappedGaussian,
    FixedSizeGaussian,
    SampledGaussian,
    Tuning,
    calibrate_noise_multiplier,
    calibrate_sample_rate,
    calibrate_steps,
    calibrate_to_advantage,
    calibrate_to_delta,
    get_accountant,
    shuffled_pass,
)

HISTORY = ((SampledGaussian(2.0, 0.01), 300),)


@pytest.mark.parametrize("name", ACCOUNTANTS)
@pytest.mark.parametrize("history", [(), HISTORY])
class TestCalibration:
    @settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(epsilon=st.floats(0.7, 30), log_q=st.floats(-7, 0), steps=st.integers(1, 20_000))
    def test_noise(self, name, history, epsilon, log_q, steps):
        q = math.exp(log_q)
        sigma = calibrate_noise_multiplier(epsilon, 1e-6, q, steps, name, history=history)
        spent = get_accountant(name).epsilon([*history, (SampledGaussian(sigma, q), steps)], 1e-6)
        assert epsilon * (1 - 1e-3) <= spent <= epsilon

    @settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(epsilon=st.floats(0.7, 5), sigma=st.floats(0.8, 5), steps=st.integers(200, 20_000))
    def test_sample_rate(self, name, history, epsilon, sigma, steps):
        q = calibrate_sample_rate(epsilon, 1e-6, sigma, steps, name, history=history)
        spent = get_accountant(name).epsilon([*history, (SampledGaussian(sigma, q), steps)], 1e-6)
        assert spent <= epsilon
        assert spent >= epsilon * (1 - 1e-3) or q == 1.0

    @settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(epsilon=st.floats(2.5, 6), sigma=st.floats(1.0, 1.5), log_q=st.floats(-5, -3.5))
    def test_steps(self, name, history, epsilon, sigma, log_q):
        q = math.exp(log_q)
        steps = calibrate_steps(epsilon, 1e-6, q, sigma, name, history=history)
        spend = lambda n: get_accountant(name).epsilon([*history, (SampledGaussian(sigma, q), n)], 1e-6)  # noqa: E731
        assert spend(steps) <= epsilon < spend(steps + 1)


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
@pytest.mark.parametrize("name", ACCOUNTANTS)
@pytest.mark.parametrize("known", [{"sample_rate": 0.02, "steps": 400}, {"sample_rate": 0.02, "noise_multiplier": 1.0},
                                   {"steps": 400, "noise_multiplier": 1.2}, {"sample_rate": 1.0, "steps": 7}])  # fmt: skip
class TestOtherTargets:
    def solved(self, known, found):
        values = {"noise_multiplier": found, "sample_rate": found, "steps": found, **known}
        return [(SampledGaussian(values["noise_multiplier"], values["sample_rate"]), values["steps"])]

    def test_advantage(self, name, relation, known):
        found = calibrate_to_advantage(0.2, accountant=name, relation=relation, history=HISTORY, **known)
        judge, events = get_accountant(name, relation), self.solved(known, found)
        spent = judge.advantage([*HISTORY, *events])
        assert 0.2 * (1 - 1e-3) * (known.get("steps") is not None) <= spent <= 0.2
        assert "steps" in known or judge.advantage([*HISTORY, (events[0][0], events[0][1] + 1)]) > 0.2

    def test_delta(self, name, relation, known):
        found = calibrate_to_delta(1e-6, 3.0, accountant=name, relation=relation, history=HISTORY, **known)
        judge, events = get_accountant(name, relation), self.solved(known, found)
        spent = judge.delta([*HISTORY, *events], 3.0)
        assert 1e-6 * (1 - 1e-3) * (known.get("steps") is not None) <= spent <= 1e-6
        assert "steps" in known or judge.delta([*HISTORY, (events[0][0], events[0][1] + 1)], 3.0) > 1e-6


@pytest.mark.parametrize("advantage", [1e-3, 0.1, 0.9])
def test_advantage_of_one_gaussian_has_a_closed_form(advantage):
    sigma = calibrate_to_advantage(advantage, sample_rate=1.0, steps=1)
    exact = 1 / (2 * stats.norm.ppf((1 + advantage) / 2))
    assert exact <= sigma <= exact * (1 + 1e-3) / (1 - advantage)


def test_one_of_three_is_left_out():
    for known in ({}, {"steps": 3}, {"steps": 3, "sample_rate": 0.1, "noise_multiplier": 1.0}):
        for solve in (lambda **k: calibrate_to_advantage(0.1, **k), lambda **k: calibrate_to_delta(1e-5, 1.0, **k)):
            with pytest.raises(AccountingError, match="exactly two"):
                solve(**known)
    for bad in (0, 1, -0.1, math.nan, "0.1", True):
        with pytest.raises(AccountingError, match="target_advantage"):
            calibrate_to_advantage(bad, sample_rate=0.1, steps=3)
    with pytest.raises(AccountingError, match="history alone has an attack advantage"):
        calibrate_to_advantage(1e-3, sample_rate=0.1, steps=3, history=HISTORY)
    with pytest.raises(AccountingError, match="hardly ever sampled"):
        calibrate_to_advantage(0.5, sample_rate=1e-3, steps=3)


CALIBRATIONS = {
    "noise": (lambda x, name: calibrate_noise_multiplier(1.0, 1e-6, x, 1000, name), (1e-6, 0.01, 1.0)),
    "rate": (lambda x, name: calibrate_sample_rate(1.0, 1e-6, x, 1000, name), (1.0, 3.0, 30.0)),
    "steps": (lambda x, name: calibrate_steps(1.5, 1e-6, x, 1.0, name), (1e-3, 1e-2)),
}


@pytest.mark.parametrize("name", ACCOUNTANTS)
@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_few_evaluations(name, kind, monkeypatch):
    count, cls = [0], ACCOUNTANTS[name]
    epsilon = cls.epsilon

    def counted(self, events, delta):
        count[0] += len(events) > 0
        return epsilon(self, events, delta)

    monkeypatch.setattr(cls, "epsilon", counted)
    calibrate, values = CALIBRATIONS[kind]
    for value in values:
        count[0] = 0
        calibrate(value, name)
        assert 0 < count[0] <= 25


@pytest.mark.parametrize("relation", ["replace_one", "zero_out"])
def test_other_relations(relation):
    sigma = calibrate_noise_multiplier(2.0, 1e-5, 0.02, 500, relation=relation)
    spent = get_accountant("prv", relation).epsilon([(SampledGaussian(sigma, 0.02), 500)], 1e-5)
    assert 2.0 * (1 - 1e-3) <= spent <= 2.0


OTHERS = {
    "capped": (lambda sigma: CappedGaussian(sigma, 0.05, 1000, 60), 0.05, "add_remove"),
    "capped where it binds": (lambda sigma: CappedGaussian(sigma, 0.05, 1000, 40), 0.05, "replace_one"),
    "fixed size": (lambda sigma: FixedSizeGaussian(sigma, 1000, 50), 0.05, "replace_one"),
    "shuffled": (shuffled_pass, 1.0, "zero_out"),
    "tuning": (lambda sigma: Tuning(((SampledGaussian(sigma, 0.05), 50),), 5.0, "geometric"), 0.05, "add_remove"),
}


@pytest.mark.parametrize("name", ACCOUNTANTS)
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("history", [(), HISTORY])
def test_other_events(kind, name, history):
    """Whatever is released, the accountant itself has said that the result is within the target, and close to it."""
    event, rate, relation = OTHERS[kind]
    spend = lambda one, n: get_accountant(name, relation).epsilon([*history, (one, n)], 1e-5)  # noqa: E731
    steps = 1 if kind == "tuning" else 30
    sigma = calibrate_noise_multiplier(4.0, 1e-5, rate, steps, name, relation, history, event=event)
    assert 4.0 * (1 - 1e-3) <= spend(event(sigma), steps) <= 4.0
    found = calibrate_steps(4.0, 1e-5, rate, sigma, name, relation, history, event=event(sigma))
    assert found >= steps and spend(event(sigma), found) <= 4.0 < spend(event(sigma), found + 1)


@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_the_default_event_is_a_poisson_sample(name):
    for rate in (0.02, 1.0):
        given = calibrate_noise_multiplier(2.0, 1e-5, rate, 40, name, event=lambda sigma, q=rate: SampledGaussian(sigma, q))
        assert given == calibrate_noise_multiplier(2.0, 1e-5, rate, 40, name)
        event = SampledGaussian(8.0, rate)
        assert calibrate_steps(2.0, 1e-5, rate, 8.0, name, event=event) == calibrate_steps(2.0, 1e-5, rate, 8.0, name)
    # Where the search begins is of no consequence for what holds of its end.
    off = calibrate_noise_multiplier(2.0, 1e-5, 1e-3, 40, name, event=shuffled_pass, relation="zero_out")
    assert 2.0 * (1 - 1e-3) <= get_accountant(name, "zero_out").epsilon([(shuffled_pass(off), 40)], 1e-5) <= 2.0


def test_an_event_without_a_meaning_is_refused():
    with pytest.raises(AccountingError, match="under replace_one only"):
        calibrate_noise_multiplier(2.0, 1e-5, 0.05, 40, event=lambda sigma: FixedSizeGaussian(sigma, 1000, 50))
    with pytest.raises(AccountingError, match="one release already gives"):
        calibrate_steps(0.1, 1e-5, 1.0, 1.0, event=shuffled_pass(1.0))


def test_full_sample_rate_when_the_budget_allows_it():
    assert calibrate_sample_rate(1.0, 1e-5, 1000.0, 10) == 1.0


def test_unreachable_budgets_say_what_to_change():
    with pytest.raises(AccountingError, match="history alone has epsilon"):
        calibrate_noise_multiplier(0.1, 1e-6, 0.01, 10, history=((SampledGaussian(0.5, 0.1), 100),))
    with pytest.raises(AccountingError, match="one release already gives"):
        calibrate_steps(0.1, 1e-6, 0.5, 0.5)
    with pytest.raises(AccountingError, match="hardly ever sampled"):
        calibrate_noise_multiplier(1.0, 0.1, 1e-6, 10)
    with pytest.raises(AccountingError, match="lower the noise multiplier"):
        calibrate_steps(100.0, 1e-5, 1e-6, 100.0)


@pytest.mark.parametrize("bad", [0, 1.5, True, -1, "10", None, math.nan])
def test_bad_steps(bad):
    with pytest.raises(AccountingError, match="steps"):
        calibrate_noise_multiplier(1.0, 1e-5, 0.1, bad)


@pytest.mark.parametrize("extreme", [1e-300, 1e-16, 1e300, 10**400])
def test_extreme_arguments_are_refused_in_words(extreme):
    """Their squares, or they themselves, leave the range of a float."""
    for call, wrong in (
        (calibrate_steps, {"sample_rate": extreme, "noise_multiplier": 1.0}),
        (calibrate_steps, {"sample_rate": 0.1, "noise_multiplier": extreme}),
        (calibrate_noise_multiplier, {"sample_rate": extreme, "steps": 10}),
        (calibrate_noise_multiplier, {"sample_rate": 0.1, "steps": 10**400}),
        (calibrate_sample_rate, {"noise_multiplier": 1.0, "steps": 10**400}),
    ):
        with pytest.raises(AccountingError):
            call(1.0, 1e-5, accountant="rdp", **wrong)
    with pytest.raises(AccountingError, match="releases stay within"):
        calibrate_steps(1e300, 1e-5, 0.1, 1.0, accountant="rdp")
