"""Noise and sampling are keyed by the operating system, and by nothing a user, a framework or a file knows."""

from __future__ import annotations

import math
import pickle
import random
import secrets

import numpy as np
import pytest
import torch
from scipy import stats

import dptrain
from dptrain.randomness import NOISE, SAMPLING, RandomKey, StepNoise
from tests.core.shared import FALSE_FAILURE, blobs, config

KEY = RandomKey.make(NOISE, unsafe_seed=5)
SIZE = 20_000


def trained(**parts):
    """Weights after a tiny run."""
    result = dptrain.train(config(**parts), data=blobs())
    return np.concatenate([p.detach().numpy().ravel() for p in result.model.parameters()])


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_keys_come_from_the_operating_system(monkeypatch):
    asked = []
    monkeypatch.setattr(secrets, "randbits", lambda bits: asked.append(bits) or 12345)
    assert RandomKey.make(NOISE).value == 12345
    assert asked == [128]


def test_keys_differ_and_use_all_their_bits():
    keys = [RandomKey.make(NOISE).value for _ in range(64)]
    assert len(set(keys)) == 64
    assert all(0 <= key < 2**128 for key in keys)
    ones = sum(keys[i] >> bit & 1 for i in range(64) for bit in range(128))
    assert stats.binomtest(ones, 64 * 128, 0.5).pvalue > FALSE_FAILURE
    high = sum(key >> 127 for key in keys)
    assert stats.binomtest(high, 64, 0.5).pvalue > FALSE_FAILURE


def test_the_whole_key_reaches_the_generator():
    """A generator that keeps 32 or 64 bits of its seed would not do."""
    base = KEY.generator(0).integers(0, 2**63)
    for bit in (0, 31, 32, 63, 64, 100, 127):
        assert RandomKey(KEY.value ^ 1 << bit).generator(0).integers(0, 2**63) != base


def test_a_key_does_not_show_itself():
    key = RandomKey.make(NOISE)
    for text in (repr(key), str(key), f"{key}", repr(StepNoise(key, 3))):
        assert str(key.value) not in text
        assert f"{key.value:x}" not in text
    with pytest.raises(AttributeError):
        key.value = 3


def test_an_unsafe_seed_fixes_the_keys_and_purposes_stay_apart():
    assert RandomKey.make(NOISE, 5) == RandomKey.make(NOISE, 5)
    keys = {RandomKey.make(purpose, seed).value for purpose in (NOISE, SAMPLING) for seed in (0, 1, 5, 15, 2**63 - 1)}
    assert len(keys) == 10
    assert all(key.bit_length() > 100 for key in keys)


def test_the_seed_zero_is_a_seed():
    """And not the absence of one."""
    assert RandomKey.make(NOISE, 0) == RandomKey.make(NOISE, 0)


# ---- streams -------------------------------------------------------------------------------------------------------


def test_streams_are_normal_with_unit_variance():
    for stream, step in ((0, 0), (1, 0), (0, 1), (7, 10**6)):
        for dtype in (np.float32, np.float64):
            values = StepNoise(KEY, step).normal(stream, (SIZE,), dtype).astype(np.float64)
            assert FALSE_FAILURE < stats.chi2.sf((values**2).sum(), SIZE) < 1 - FALSE_FAILURE
            assert abs(values.sum()) / math.sqrt(SIZE) < stats.norm.isf(FALSE_FAILURE / 2)
            assert stats.kstest(values, "norm").pvalue > FALSE_FAILURE


def test_streams_and_steps_are_independent():
    """Every pair of 5 streams of 5 steps, at lag 0 and lag 1."""
    streams = np.stack([StepNoise(KEY, step).normal(stream, (SIZE,), np.float64) for step in range(5) for stream in range(5)])
    for other in (streams, np.roll(streams, 1, axis=1)):
        correlations = (streams @ other.T / math.sqrt(SIZE))[np.triu_indices(25, 1)]
        assert np.abs(correlations).max() < stats.norm.isf(FALSE_FAILURE / (2 * len(correlations)))


def test_no_two_streams_share_a_value():
    """Streams that overlap, as with a counter that steps through them, would repeat values."""
    blocks = [KEY.generator(step, stream).integers(0, 2**63, 2000) for step in range(6) for stream in range(6)]
    assert len(np.unique(np.concatenate(blocks))) == 36 * 2000


def test_noise_depends_on_stream_and_step_and_on_nothing_else():
    first = StepNoise(KEY, 3).normal(1, (4, 5))
    np.random.seed(0)
    np.random.default_rng(0).normal(size=10)
    torch.manual_seed(0)
    random.seed(0)
    np.testing.assert_array_equal(StepNoise(KEY, 3).normal(1, (4, 5)), first)
    assert first.shape == (4, 5)
    assert first.dtype == np.float32
    assert StepNoise(KEY, 3).normal(1, (2,), np.float64).dtype == np.float64
    assert not np.array_equal(StepNoise(KEY, 3).normal(2, (4, 5)), first)
    assert not np.array_equal(StepNoise(KEY, 4).normal(1, (4, 5)), first)
    assert not np.array_equal(StepNoise(RandomKey.make(NOISE, 6), 3).normal(1, (4, 5)), first)


def test_noise_and_sampling_of_one_run_are_independent():
    uniform = np.stack([RandomKey.make(SAMPLING, 5).generator(t).random(SIZE) for t in range(3)])
    noise = np.stack([StepNoise(KEY, t).normal(0, (SIZE,), np.float64) for t in range(3)])
    correlations = (uniform - 0.5) @ noise.T / math.sqrt(SIZE / 12)
    assert np.abs(correlations).max() < stats.norm.isf(FALSE_FAILURE / 18)


# ---- whole runs ----------------------------------------------------------------------------------------------------


def test_the_public_seed_fixes_neither_sampling_nor_noise():
    """Two runs of one config differ, although their starting weights are equal."""
    assert not np.array_equal(trained(seed=3), trained(seed=3))
    # nor the draw alone: with noise of 1e-5 of the clipping norm, runs that drew the same batches would agree to that
    quiet = {"privacy": {"noise_multiplier": 1e-5, "accountant": "rdp"}, "seed": 3}
    assert np.abs(trained(**quiet) - trained(**quiet)).max() > 1e-4


def test_global_seeds_of_numpy_torch_and_python_have_no_influence():
    def seeded():
        np.random.seed(1)
        torch.manual_seed(1)
        random.seed(1)
        return trained()

    assert not np.array_equal(seeded(), seeded())


def test_an_unsafe_seed_fixes_the_whole_run():
    unsafe = {"privacy": {"noise_multiplier": 1.0, "accountant": "rdp", "unsafe_seed": 4}}
    other = {"privacy": {"noise_multiplier": 1.0, "accountant": "rdp", "unsafe_seed": 5}}
    np.testing.assert_array_equal(trained(**unsafe), trained(**unsafe))
    assert not np.array_equal(trained(**unsafe), trained(**other))


def test_training_leaves_the_generators_of_numpy_and_python_alone():
    np.random.seed(3)
    before = pickle.dumps(np.random.get_state()), random.getstate()
    trained()
    assert pickle.dumps(np.random.get_state()) == before[0]
    assert random.getstate() == before[1]
