"""Every bad input is one AccountingError of one sentence, before any library sees it."""

from __future__ import annotations

import math

import pytest

from accounting import (
    ACCOUNTANTS,
    AccountingError,
    LedgerError,
    SampledGaussian,
    calibrate_noise_multiplier,
    calibrate_sample_rate,
    calibrate_steps,
    get_accountant,
)

EVENTS = [(SampledGaussian(1.0, 0.1), 10)]
NOT_REAL = [math.nan, math.inf, -math.inf, True, "1", None, [1.0]]


def message(call) -> str:
    with pytest.raises(AccountingError) as info:
        call()
    text = str(info.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_types():
    assert issubclass(AccountingError, ValueError) and issubclass(LedgerError, AccountingError)


@pytest.mark.parametrize("name", ACCOUNTANTS)
@pytest.mark.parametrize("delta", [*NOT_REAL, 0, 0.0, 1, 1.0, -1e-5, 2.0])
def test_delta(name, delta):
    assert "delta" in message(lambda: get_accountant(name).epsilon(EVENTS, delta))
    assert "delta" in message(lambda: get_accountant(name).epsilon([], delta))


@pytest.mark.parametrize("name", ACCOUNTANTS)
@pytest.mark.parametrize("epsilon", [*NOT_REAL, 0, -1.0])
def test_epsilon(name, epsilon):
    assert "epsilon" in message(lambda: get_accountant(name).delta(EVENTS, epsilon))


@pytest.mark.parametrize("bad", [*NOT_REAL, 0, -1.0])
def test_calibration_arguments(bad):
    assert "target_epsilon" in message(lambda: calibrate_noise_multiplier(bad, 1e-5, 0.1, 10))
    assert "delta" in message(lambda: calibrate_noise_multiplier(1.0, bad, 0.1, 10))
    assert "sample_rate" in message(lambda: calibrate_noise_multiplier(1.0, 1e-5, bad, 10))
    assert "noise_multiplier" in message(lambda: calibrate_sample_rate(1.0, 1e-5, bad, 10))
    assert "noise_multiplier" in message(lambda: calibrate_steps(1.0, 1e-5, 0.1, bad))
    assert "accountant" in message(lambda: calibrate_steps(1.0, 1e-5, 0.1, 1.0, accountant=bad))
    assert "relation" in message(lambda: calibrate_steps(1.0, 1e-5, 0.1, 1.0, relation=bad))
    assert "events" in message(lambda: calibrate_steps(1.0, 1e-5, 0.1, 1.0, history=[bad]))
