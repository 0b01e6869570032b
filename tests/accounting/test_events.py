"""Events are plain validated data."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from accounting import AccountingError, SampledGaussian, normalise

BAD_NUMBERS = [math.nan, math.inf, -math.inf, 0, -1.0, True, False, "1.0", None, 1 + 0j, [1.0], 10**400]


@pytest.mark.parametrize("bad", BAD_NUMBERS)
def test_bad_noise_multiplier(bad):
    with pytest.raises(AccountingError, match="noise_multiplier") as info:
        SampledGaussian(bad, 0.1)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("bad", [*BAD_NUMBERS, 1.0000001, 2])
def test_bad_sample_rate(bad):
    with pytest.raises(AccountingError, match="sample_rate"):
        SampledGaussian(1.0, bad)


def test_accepts_numpy_numbers_and_stores_floats():
    event = SampledGaussian(np.float32(0.5), np.int64(1))
    assert (event.noise_multiplier, event.sample_rate) == (0.5, 1.0)
    assert type(event.noise_multiplier) is float and type(event.sample_rate) is float


def test_round_trip_through_json():
    event = SampledGaussian(0.1 + 0.2, 1 / 3)
    assert SampledGaussian.from_dict(json.loads(json.dumps(event.to_dict()))) == event


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"kind": "laplace", "noise_multiplier": 1.0, "sample_rate": 0.1},
        {"kind": "sampled_gaussian", "noise_multiplier": 1.0},
        {"kind": "sampled_gaussian", "noise_multiplier": 1.0, "sample_rate": 0.1, "extra": 1},
        {"kind": "sampled_gaussian", "noise_multiplier": -1.0, "sample_rate": 0.1},
    ],
)
def test_from_dict_refuses(data):
    with pytest.raises(AccountingError):
        SampledGaussian.from_dict(data)


def test_normalise_merges_drops_zeros_and_forgets_order():
    a, b = SampledGaussian(1.0, 0.1), SampledGaussian(2.0, 0.1)
    assert normalise([(b, 1), (a, 2), (b, 3), (a, 0)]) == ((a, 2), (b, 4))
    assert normalise([(a, 2), (b, 4)]) == normalise([(b, 4), (a, 2)])
    assert normalise([]) == normalise([(a, 0)]) == ()


@pytest.mark.parametrize("count", [-1, 1.0, 1.5, True, "3", None, math.nan])
def test_normalise_refuses_counts(count):
    with pytest.raises(AccountingError, match="count"):
        normalise([(SampledGaussian(1.0, 0.1), count)])


@pytest.mark.parametrize("events", [None, "ab", SampledGaussian(1.0, 0.1), [SampledGaussian(1.0, 0.1)], [(1.0, 2)], {}])
def test_normalise_refuses_shapes(events):
    with pytest.raises(AccountingError, match="events"):
        normalise(events)
