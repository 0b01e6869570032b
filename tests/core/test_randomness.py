"""Noise and sampling are keyed by the operating system, and by nothing a user, a framework or a file knows."""

from __future__ import annotations

import math
import pickle
import random
import secrets

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

import dptrain
from dptrain import gaussian
from dptrain.gaussian import CHUNK, keystream
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


def test_the_whole_key_and_the_whole_address_reach_the_noise():
    first = keystream(KEY.value.to_bytes(16, "big"), 0, 0, 0, 64)
    for bit in (0, 31, 32, 63, 64, 100, 127):
        assert keystream((KEY.value ^ 1 << bit).to_bytes(16, "big"), 0, 0, 0, 64) != first
    addresses = [(step, stream, block) for step in (0, 1, 2**47) for stream in (0, 1, 2**31) for block in (0, 4, 2**47)]
    parts = {keystream(bytes(16), *address, 64) for address in addresses}
    assert len(parts) == len(addresses)
    for outside in ((2**48, 0, 0), (-1, 0, 0), (0, 2**32, 0), (0, 0, 2**48)):
        with pytest.raises(ValueError, match="outside the counter"):
            keystream(bytes(16), *outside, 64)


def test_the_keystream_is_aes_in_counter_mode():
    """Rebuilt from single blocks: step, stream and block stand in the counter as written."""
    cipher = Cipher(algorithms.AES(bytes(range(16))), modes.ECB()).encryptor()
    counters = b"".join((5 << 80 | 7 << 48 | 9 + i).to_bytes(16, "big") for i in range(3))
    assert keystream(bytes(range(16)), 5, 7, 9, 48) == cipher.update(counters)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_do_not_depend_on_how_many_are_asked_for_at_once(dtype):
    """Chunks are filled by threads; sizes that divide the chunks differently share their whole chunks, and nothing repeats."""
    sizes = (CHUNK, 3 * CHUNK, 3 * CHUNK + 1, 4 * CHUNK)
    draws = [StepNoise(KEY, 1).normal(2, (size,), dtype) for size in sizes]
    for draw in draws:
        np.testing.assert_array_equal(draw[:CHUNK], draws[0])
        np.testing.assert_array_equal(StepNoise(KEY, 1).normal(2, (len(draw),), dtype), draw)
    np.testing.assert_array_equal(draws[1], draws[3][: 3 * CHUNK])
    whole = draws[3].reshape(4, CHUNK).astype(np.float64)
    correlations = (whole @ whole.T / CHUNK)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < stats.norm.isf(FALSE_FAILURE / 12) / math.sqrt(CHUNK)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tails_of_ten_million_values(dtype):
    """Counts beyond 1 to 5 standard deviations on either side are binomial; cosine and sine halves alike."""
    size = 10_000_000
    values = StepNoise(KEY, 9).normal(0, (size,), dtype)
    assert np.isfinite(values).all()
    for bound in (1.0, 2.0, 3.0, 4.0, 5.0):
        for count in ((values > bound).sum(), (values < -bound).sum()):
            p = stats.norm.sf(bound)
            assert min(stats.binom.cdf(count, size, p), stats.binom.sf(count - 1, size, p)) > FALSE_FAILURE / 20
    blocks = values.reshape(-1, 100).astype(np.float64).sum(1) / 10
    assert stats.kstest(blocks, "norm").pvalue > FALSE_FAILURE


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_uniforms_near_zero_are_refined(dtype, monkeypatch):
    """An integer of 0 would end the tail at 6.7; with the refinement the largest value is beyond 9, and ordinary ones do not move."""
    bits, byte = 8 * np.dtype(dtype).itemsize, b"\x00"

    def write(key, step, stream, block, zeros, into):
        into[: len(zeros)] = byte * len(zeros)

    monkeypatch.setattr(gaussian, "_write", write)
    low = StepNoise(KEY, 0).normal(0, (8,), dtype)  # every integer is 0, the refinement's too: the far end of the tail
    assert np.all(np.isfinite(low))
    assert float(low[:4].min()) == pytest.approx(math.sqrt(2 * (65 + bits) * math.log(2)), rel=1e-6)
    byte = b"\xff"
    high = StepNoise(KEY, 0).normal(0, (8,), dtype)  # every integer is the largest: the centre
    assert np.abs(high).max() < 1e-3


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (3, 5), (CHUNK + 5, 2)])
def test_noise_that_is_added_in_one_pass_is_the_noise(shape, dtype):
    noise, values = StepNoise(RandomKey.make(NOISE, 3), 4), np.random.default_rng(0).normal(size=shape).astype(dtype)
    before = values.copy()
    found = noise.added_to(values, 2, 0.7)
    np.testing.assert_array_equal(found, noise.normal(2, shape, dtype) * dtype(0.7) + values)
    assert found.dtype == dtype
    np.testing.assert_array_equal(values, before)
    np.testing.assert_array_equal(noise.added_to(values.T, 2, 0.7), noise.normal(2, values.T.shape, dtype) * dtype(0.7) + values.T)
