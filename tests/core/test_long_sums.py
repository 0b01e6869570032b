"""Sums of many examples: what one more of them changes is what it adds, to within the margin, however long the sum is."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from dptrain.config import Performance
from dptrain.errors import ConfigError
from dptrain.mechanism import FLOAT_MARGIN, GaussianMechanism
from dptrain.randomness import NOISE, RandomKey, StepNoise
from dptrain.sampling import MOST, check_physical_batch_size, default_physical_batch
from dptrain.setup import prepare
from tests.core.shared import blobs, config

SIZE, LONG, BLOCK = 1000, 16_384, 128


def gradients() -> np.ndarray:
    """Gradients of norm 1 in nearly one direction, float32: their sum is long, so its last bits are coarse."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((LONG + 1, SIZE)) + 10.0 * rng.standard_normal(SIZE)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_one_more_example_changes_what_it_adds(backend: str) -> None:
    module = importlib.import_module({"torch": "dptrain_torch.update", "tensorflow": "dptrain_tf.update"}[backend])
    rows = gradients()

    def grads(part: np.ndarray) -> Any:
        value = np.ones(len(part), np.float32) @ part
        if backend == "torch":
            torch = importlib.import_module("torch")
            return module.Grads({"w": torch.from_numpy(value)}, {})
        tf = importlib.import_module("tensorflow")
        return module.Grads({"w": tf.constant(value)}, {}, {"w": "w"})

    def total(part: np.ndarray) -> np.ndarray:
        found = grads(part[:BLOCK])
        for start in range(BLOCK, len(part), BLOCK):
            found = module.add(found, grads(part[start : start + BLOCK]))
        return np.asarray(found.sums["w"], np.float64)

    # One example in the first place moves all others on by one, so that no physical batch is the same.
    distance = float(np.linalg.norm(total(rows) - total(rows[1:])))
    assert abs(distance - float(np.linalg.norm(rows[0].astype(np.float64)))) < FLOAT_MARGIN / 10


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
@pytest.mark.parametrize("kind", ["fast", "secure"])
def test_noise_is_added_before_the_sum_is_rounded(backend: str, kind: Any) -> None:
    """Beside 2^24 a float32 loses what is less than 1, unless noise comes first. The noise has the bits that it has for one batch."""
    setup = prepare(config(), backend, blobs())
    executor, model, plan = setup.backend, setup.model, setup.plan
    stds = GaussianMechanism(1.0).stds(plan)
    noise = StepNoise(RandomKey.make(NOISE, 1), 0, kind)

    def released(*offsets: float) -> dict[str, np.ndarray]:
        total = executor.zeros(model)
        for offset in offsets:
            shift = {name: np.full(value.shape, offset) for name, value in executor.parameters(model).items()}
            total = executor.add(total, executor.shifted(model, executor.zeros(model), shift))
        return executor.sums(model, executor.privatize(total, plan, stds, noise))

    plain = executor.sums(model, executor.privatize(executor.zeros(model), plan, stds, noise))
    twice, there_and_back = released(0.0), released(2.0**24, 0.25, -(2.0**24))
    for name, value in plain.items():
        assert value.dtype == twice[name].dtype == np.float32
        assert np.array_equal(value, twice[name])
        assert np.allclose(there_and_back[name], value + 0.25, atol=1e-5)


def test_physical_batches_have_a_largest_size() -> None:
    with pytest.raises(ConfigError, match="at most 4096"):
        check_physical_batch_size(MOST + 1)
    with pytest.raises(ConfigError, match="at most 4096"):
        config(performance={"physical_batch_size": MOST + 1})
    assert Performance(physical_batch_size=MOST).physical_batch_size == MOST
    assert default_physical_batch(1e6, 10**7, largest=None) == MOST
