"""Secure noise: only lattice points come out, what rounding adds to a sensitivity is paid for, and floating point gives nothing away."""

from __future__ import annotations

import base64
import math
import secrets
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import algorithms
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

import dptrain
from accounting import NeighboringRelation, SampledGaussian, calibrate_noise_multiplier, get_accountant
from dptrain import ConfigError, TrainConfig, exact_normal
from dptrain.budget import Budget, Schedule
from dptrain.config import Privacy
from dptrain.exact_normal import CHUNK, noise
from dptrain.lattice import LARGEST, add_noise, released_integers, spacing, to_lattice
from dptrain.mechanism import (
    FLOAT_MARGIN,
    LATTICE_MARGIN,
    LATTICE_PARAMETERS,
    GaussianMechanism,
    effective_noise_multiplier,
    event_noise_multiplier,
    noise_multiplier_for,
    release_event,
)
from dptrain.plan import Group, Plan
from dptrain.randomness import NOISE, RandomKey, StepNoise
from dptrain.trainer import noise_multiplier
from tests.core.shared import EXAMPLES, FALSE_FAILURE, blobs, config

KEY = bytes(range(100, 116))
NUMBERS = st.floats(-1e25, 1e25) | st.floats(-4.0, 4.0) | st.floats(-1e-9, 1e-9)
STDS = st.floats(1e-6, 1e6)
SECURE = {"noise_multiplier": 1.0, "accountant": "rdp", "noise": "secure"}


def rounded(values: np.ndarray, std: float) -> np.ndarray:
    """q(S)."""
    out = np.empty(values.shape, np.int64)
    to_lattice(values, spacing(std), np.empty(values.shape), out)
    return out


def plan_of(*groups: tuple[float, int]) -> Plan:
    """A plan with these bounds and sizes."""
    return Plan("test", tuple(Group(f"g{i}", (), bound, bound, size) for i, (bound, size) in enumerate(groups)), {})


# ---- the lattice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 7, 2 * CHUNK + 5])
@pytest.mark.parametrize("std", [1.0, 0.7, 3e-5, 123456.789])
def test_what_is_released_is_an_integer_times_the_spacing(dtype, size, std):
    values = (np.random.default_rng(0).standard_normal(size) * 3 * std).astype(dtype)
    before = values.copy()
    found, whole = add_noise(KEY, 4, 2, values, std), released_integers(KEY, 4, 2, values, std)
    np.testing.assert_array_equal(found, (whole * spacing(std)).astype(dtype))
    np.testing.assert_array_equal(whole - rounded(values, std), noise(KEY, 4, 2, size))
    np.testing.assert_array_equal(values, before)
    assert found.dtype == dtype and whole.dtype == np.int64
    assert Fraction(spacing(std)) * 2**32 == Fraction(std)
    if size > 1000:
        assert abs(((found - values) ** 2).mean() / std**2 - 1) < stats.norm.isf(FALSE_FAILURE / 48) * math.sqrt(2 / size)


@EXAMPLES
@given(arrays.arrays(np.float64, st.integers(1, 20), elements=NUMBERS), STDS)
def test_rounding_moves_a_coordinate_by_at_most_five_eighths(values, std):
    """Of its clamped value, in exact rational arithmetic."""
    step, limit = Fraction(spacing(std)), Fraction(LARGEST)
    for value, found in zip(values.tolist(), rounded(values, std).tolist(), strict=True):
        assert abs(found - max(-limit, min(limit, Fraction(value) / step))) <= Fraction(5, 8)
    narrow = values.astype(np.float32)
    np.testing.assert_array_equal(rounded(narrow, std), rounded(narrow.astype(np.float64), std))


@EXAMPLES
@given(st.data(), st.integers(1, 30), STDS, st.sampled_from([1e-12, 1e-9, 1e-3, 1.0, 1e20]))
def test_rounding_enlarges_a_distance_by_at_most_what_is_paid(data, size, std, scale):
    """Equation (1), exactly: neighbouring sums that differ by little, by much, or by halves of the lattice."""
    one = data.draw(arrays.arrays(np.float64, size, elements=NUMBERS))
    other = one + scale * data.draw(arrays.arrays(np.float64, size, elements=st.floats(-1, 1)))
    moved = sum(int(a - b) ** 2 for a, b in zip(rounded(one, std).tolist(), rounded(other, std).tolist(), strict=True))
    apart = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(one.tolist(), other.tolist(), strict=True)) / Fraction(spacing(std)) ** 2
    # sqrt(moved) <= sqrt(apart) + 5/4 sqrt(d), squared twice so that nothing is rounded
    rest = moved - apart - Fraction(25, 16) * size
    assert rest <= 0 or rest**2 <= 4 * apart * Fraction(25, 16) * size


def test_the_enlargement_is_there():
    """Sums next to the middle between lattice points: what is paid for is attained up to the division's eighths."""
    step, size = spacing(1.0), 64
    low, high = np.full(size, np.nextafter(0.5, 0) * step), np.full(size, np.nextafter(0.5, 1) * step)
    moved = np.linalg.norm((rounded(high, 1.0) - rounded(low, 1.0)).astype(np.float64))
    assert moved == math.sqrt(size) > np.linalg.norm(high - low) / step + 0.99 * math.sqrt(size)


def test_sums_beyond_the_lattice_are_clamped_and_nothing_but_numbers_comes_out():
    values = np.array([np.inf, -np.inf, np.nan, 1e300, -1e300, LARGEST * spacing(1.0), -(2.0**19)])
    assert rounded(values, 1.0).tolist() == [int(LARGEST), -int(LARGEST), -int(LARGEST), int(LARGEST), -int(LARGEST), 2**51, -(2**51)]
    for std in (1.0, 1e-200):
        assert np.isfinite(add_noise(KEY, 0, 0, values, std)).all()
    assert int(LARGEST) + exact_normal.RANGE * 2**32 < 2**53  # so that float64 holds every n


@pytest.mark.parametrize("std", [0.0, 5e-324, 1e-280, 1e280, math.inf, math.nan, -1.0])
def test_a_spacing_that_float64_cannot_hold_is_refused(std):
    with pytest.raises(ConfigError, match="outside what secure noise can represent"):
        add_noise(KEY, 0, 0, np.zeros(3), std)


def test_fast_noise_can_be_told_apart_by_its_last_bits_and_secure_noise_cannot():
    """Mironov's observation. Added to 0, small releases are finer than any sum with 1 can be: one of them proves which input it was."""
    near, grain = 2.0**-9, 2.0**-24  # a float32 sum of 1 and a number near -1 is a multiple of the grain

    def fine(kind: str, value: float, dtype: type) -> float:
        """Share of the small releases that are no multiples of the grain."""
        found = StepNoise(RandomKey(7), 1, kind).added_to(np.full(2_000_000, value, dtype), 0, 1.0).astype(np.float64)
        small = found[np.abs(found) < near]
        assert len(small) > 1000
        return float(np.mean(small / grain % 1 != 0))

    assert fine("fast", 0.0, np.float32) > 0.9
    assert fine("fast", 1.0, np.float32) == 0.0
    expected = 1 - 2.0**-8  # the lattice of 2^-32 is as fine for either
    for value in (0.0, 1.0):
        share, count = fine("secure", value, np.float32), 2_000_000 * near
        assert abs(share - expected) < 6 * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("shift", [1, -1, 12345, 2**40, -(2**45)])
def test_neighbouring_sums_have_the_same_support(shift):
    """A sum that lies k lattice points away releases what the other does, k points away: no integer is reachable from one alone."""
    std = 0.37
    values = np.random.default_rng(1).integers(-(2**33), 2**33, 1000) * spacing(std)
    moved = values + shift * spacing(std)
    np.testing.assert_array_equal(rounded(moved, std), rounded(values, std) + shift)
    np.testing.assert_array_equal(released_integers(KEY, 1, 0, moved, std), released_integers(KEY, 1, 0, values, std) + shift)


@pytest.mark.parametrize("kind", ["fast", "secure"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise_of_either_kind_is_white_and_normal(kind, dtype):
    size, steps = 200_000, 4
    series = np.stack([StepNoise(RandomKey(9), t, kind).added_to(np.zeros(size, dtype), 3, 2.5) / 2.5 for t in range(steps)])
    series = series.astype(np.float64)
    assert stats.kstest(series.ravel(), "norm").pvalue > FALSE_FAILURE / 4
    assert FALSE_FAILURE / 8 < stats.chi2.cdf((series**2).sum(), series.size) < 1 - FALSE_FAILURE / 8
    cells = np.floor(stats.norm.cdf(series.ravel()) * 200).astype(int).clip(0, 199)
    assert stats.chisquare(np.bincount(cells, minlength=200)).pvalue > FALSE_FAILURE / 4
    for values in (series, (series**2 - 1) / math.sqrt(2)):  # halves that share a radius would show in the squares
        pairs = (values @ values.T / math.sqrt(size))[np.triu_indices(steps, 1)]
        lags = [(row[:-lag] @ row[lag:]) / math.sqrt(size - lag) for row in values for lag in (1, 2, 50, size // 2)]
        assert np.abs([*pairs, *lags]).max() < stats.norm.isf(FALSE_FAILURE / 200)


def test_secure_noise_of_any_shape_and_the_two_kinds_apart():
    key = RandomKey.make(NOISE, 3)
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    found = StepNoise(key, 4, "secure").added_to(values.T, 2, 0.7)
    np.testing.assert_array_equal(found, add_noise(key.value.to_bytes(16, "big"), 4, 2, values.T.ravel(), 0.7).reshape(5, 3))
    for shape in ((), (0, 3)):
        assert StepNoise(key, 4, "secure").added_to(np.zeros(shape), 2, 0.7).shape == shape
    assert np.corrcoef(found.ravel(), StepNoise(key, 4).added_to(values.T, 2, 0.7).ravel())[0, 1] < 0.999
    with pytest.raises(ConfigError, match="added to a sum on its lattice"):
        StepNoise(key, 4, "secure").normal(0, (3,))
    with pytest.raises(ConfigError, match=r"There is no noise 'slow'; choose fast or secure"):
        StepNoise(key, 4, "slow")


# ---- what is claimed of it -----------------------------------------------------------------------------------------


GROUPS = st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 2**29)), min_size=1, max_size=6)


@EXAMPLES
@given(GROUPS, st.floats(0.05, 1000.0), st.sampled_from(["global", "per_group", "min_noise"]), st.sampled_from(list(NeighboringRelation)))
def test_the_event_claims_no_more_than_the_enlarged_sensitivity_allows(groups, sigma, allocation, relation):
    """Group by group, each with its own lattice; and the claim is within 2e-5 sigma of the nominal one."""
    plan = plan_of(*groups)
    stds = GaussianMechanism(sigma, allocation).stds(plan, relation)
    factor = 2 if relation is NeighboringRelation.replace_one else 1
    enlarged = [
        (1 + FLOAT_MARGIN) * factor * g.norm_bound / stds[g.name] + 1.25 * spacing(stds[g.name]) * math.sqrt(g.num_params) / stds[g.name]
        for g in plan.groups
    ]
    event = release_event(plan, stds, 0.1, relation, "secure")
    assert event.noise_multiplier <= 1 / math.sqrt(math.fsum(x**2 for x in enlarged))
    fast = release_event(plan, stds, 0.1, relation)
    assert fast.noise_multiplier * (1 - 2e-5 * sigma - 1e-11) <= event.noise_multiplier < fast.noise_multiplier
    assert event.noise_multiplier == event_noise_multiplier(effective_noise_multiplier(plan, stds, relation), "secure")


@EXAMPLES
@given(st.floats(1e-4, 4700.0))
def test_noise_for_a_claim_supports_the_claim(claimed):
    needed = noise_multiplier_for(claimed, "secure")
    assert claimed <= event_noise_multiplier(needed, "secure") <= claimed * (1 + 1e-10)
    assert needed <= claimed * (1 + FLOAT_MARGIN) / (1 - LATTICE_MARGIN * claimed) * (1 + 1e-10)


def test_what_would_cost_too_much_is_refused():
    plan = plan_of((1.0, LATTICE_PARAMETERS), (1.0, 1))
    stds = GaussianMechanism(1.0).stds(plan)
    with pytest.raises(ConfigError, match=r"has 4,294,967,297 parameters, and secure noise pays for the rounding of 4,294,967,296"):
        release_event(plan, stds, 0.1, noise="secure")
    release_event(plan, stds, 0.1)
    assert LATTICE_MARGIN == 1.25 / 2**32 * math.sqrt(LATTICE_PARAMETERS) == 1.25 / 2**16
    for refused in (lambda: event_noise_multiplier(6000.0, "secure"), lambda: noise_multiplier_for(6000.0, "secure")):
        with pytest.raises(ConfigError, match=r"would take 11% of it; lower it to at most 5243, or set privacy.noise to fast"):
            refused()


@pytest.mark.parametrize("target", [0.05, 1.0, 8.0])
def test_calibration_reaches_the_target_after_rounding_is_paid_for(target):
    privacy = {"target_epsilon": target, "target_delta": 1e-5, "noise": "secure"}
    sigma = noise_multiplier(config(privacy=privacy), 0.2, 50)
    accountant = get_accountant("prv")
    spent = accountant.epsilon([(SampledGaussian(event_noise_multiplier(sigma, "secure"), 0.2), 50)], 1e-5)
    assert 0.99 * target < spent <= target
    claimed = calibrate_noise_multiplier(target, 1e-5, 0.2, 50)
    assert event_noise_multiplier(sigma, "secure") >= claimed > event_noise_multiplier(noise_multiplier_for(claimed), "secure")
    budget = Budget(Privacy(**privacy), Schedule.make(100, sample_rate=0.2, steps=50))
    assert budget.noise_multiplier == sigma
    assert budget.event == SampledGaussian(event_noise_multiplier(sigma, "secure"), 0.2)


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_the_setting_is_left_out_at_its_default():
    assert config().privacy.noise == "fast"
    assert "noise" not in config().to_dict()["privacy"]
    assert config().hash == config(privacy={"noise_multiplier": 1.0, "accountant": "rdp", "noise": "fast"}).hash
    secure = config(privacy=SECURE)
    assert secure.to_dict()["privacy"]["noise"] == "secure" and secure.hash != config().hash
    assert TrainConfig.parse(secure.to_dict()) == secure
    with pytest.raises(ConfigError, match=r"privacy\.noise"):
        config(privacy={**SECURE, "noise": "slow"})


@pytest.mark.parametrize("target", [None, 3.0])
def test_a_run_states_its_noise_and_keeps_its_budget(tmp_path, target):
    privacy = {**SECURE, "noise_multiplier": None, "target_epsilon": target, "target_delta": 1e-3} if target else SECURE
    result = dptrain.train(config(privacy=privacy), data=blobs(), out=tmp_path)
    assert result.privacy["noise"] == "secure" and result.complete
    assert target is None or 0.99 * target < result.epsilon <= target
    (event,) = result.privacy["events"]
    sigma = effective_noise_multiplier(result.plan, {g["name"]: g["noise_std"] for g in result.privacy["groups"]})
    assert event["noise_multiplier"] == event_noise_multiplier(sigma, "secure") < event_noise_multiplier(sigma)
    assert dptrain.train(config(), data=blobs()).privacy["noise"] == "fast"


def test_an_unsafe_seed_fixes_secure_runs_too_and_voids_them():
    def weights(seed, noise="secure"):
        result = dptrain.train(config(privacy={**SECURE, "noise": noise, "unsafe_seed": seed}), data=blobs())
        assert result.privacy["private"] is False and "VOID" in result.privacy["statement"]
        return np.concatenate([p.detach().numpy().ravel() for p in result.model.parameters()])

    first = weights(4)
    np.testing.assert_array_equal(first, weights(4))
    assert not np.array_equal(first, weights(5))
    assert not np.array_equal(first, weights(4, "fast"))
    free = [dptrain.train(config(privacy=SECURE), data=blobs()).model.state_dict() for _ in range(2)]
    assert not all(np.array_equal(free[0][name], free[1][name]) for name in free[0])


@pytest.mark.parametrize("kind", ["fast", "secure"])
def test_no_key_is_written_to_disk_or_printed(tmp_path, monkeypatch, capfd, kind):
    """Of a run with checkpoints, metrics and a statement: no key, and with secure noise no derived key, in any usual notation."""
    keys: list[bytes] = []
    original = secrets.randbits

    def randbits(bits: int) -> int:
        value = original(bits)
        keys.append(value.to_bytes(16, "big"))
        return value

    monkeypatch.setattr(secrets, "randbits", randbits)
    spy = SimpleNamespace(AES=lambda key: keys.append(bytes(key)) or algorithms.AES(key))
    monkeypatch.setattr(exact_normal, "algorithms", spy)
    strategy = {"name": "mixed_ghost", "max_grad_norm": {"initial": 1.0, "quantile": 0.5}}
    privacy = {**SECURE, "noise": kind}
    result = dptrain.train(
        config(strategy=strategy, privacy=privacy, performance={"checkpoint_every": 1, "monitors": True}), data=blobs(), out=tmp_path
    )
    assert len(keys) == (2 if kind == "fast" else 2 + 4 * 5)  # sampling, noise, and 4 steps of 4 parameters and a count
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) >= 6
    out = capfd.readouterr()
    texts = [*files.values(), out.out.encode(), out.err.encode(), repr(result).encode(), repr(StepNoise(RandomKey(1), 0, kind)).encode()]
    for key in keys:
        for value in (key, key[::-1]):
            number = int.from_bytes(value, "big")
            written = [value, value.hex().encode(), value.hex().upper().encode(), f"{number:x}".encode(), str(number).encode()]
            written += [base64.b64encode(value).rstrip(b"="), base64.urlsafe_b64encode(value).rstrip(b"=")]
            for text in texts:
                assert not any(w in text or w[: len(w) // 2] in text for w in written)
