"""Noise in both frameworks: its variance per group, and every trainable parameter (math.md section 7, item 4)."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2

from dptrain.config import TrainConfig
from dptrain.data import from_arrays
from dptrain.randomness import NOISE, RandomKey, StepNoise
from dptrain.trainer import prepare

BACKENDS = ("torch", "tensorflow")


@pytest.mark.parametrize("backend", BACKENDS)
def test_variance_per_group_and_no_parameter_without_noise(backend: str) -> None:
    """An empty batch releases exactly the noise: chi-square per group, two-sided, 1e-6 over all groups."""
    rng = np.random.default_rng(0)
    source = from_arrays(rng.standard_normal((8, 40)).astype(np.float32), rng.integers(0, 5, 8), num_classes=5)
    config = TrainConfig.parse(
        {
            "model": {"name": "mlp", "hidden": [60, 30]},
            "strategy": {"name": "mixed_ghost", "grouping": "per_layer"},
            "privacy": {"noise_multiplier": 1.0},
            "sampling": {"sample_rate": 0.5, "steps": 1},
        }
    )
    setup = prepare(config, backend, source)
    stds = {group.name: 0.5 + i for i, group in enumerate(setup.plan.groups)}
    key, executor = RandomKey.make(NOISE, 11), setup.backend
    released = [executor.privatize(executor.zeros(setup.model), setup.plan, stds, StepNoise(key, t)) for t in range(3)]
    groups = {layer: group.name for group in setup.plan.groups for layer in group.layers}
    collected: dict[str, list[np.ndarray]] = {name: [] for name in stds}
    for grads in released:
        for name, value in grads.sums.items():
            array = np.asarray(value).ravel().astype(np.float64)
            assert np.abs(array).min() > 0, name
            collected[groups[name.replace("/", ".").rpartition(".")[0]]].append(array)
    for name, arrays in collected.items():
        values = np.concatenate(arrays)
        tail = 0.5e-6 / len(stds)
        low, high = chi2.ppf([tail, 1 - tail], len(values))
        assert low < float((values**2).sum()) / stds[name] ** 2 < high
    first, second = (np.concatenate([np.asarray(v).ravel() for v in g.sums.values()]) for g in released[:2])
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(len(first))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_private_run_moves_every_parameter_even_on_empty_batches(backend: str) -> None:
    """A sample rate so small that every batch is empty: noise-only steps, each recorded (pitfalls.md G17)."""
    import dptrain

    rng = np.random.default_rng(0)
    source = from_arrays(rng.standard_normal((8, 6)).astype(np.float32), rng.integers(0, 2, 8), num_classes=2)
    config = TrainConfig.parse(
        {
            "model": {"name": "mlp", "hidden": [4]},
            "privacy": {"noise_multiplier": 1.0, "unsafe_seed": 1},
            "sampling": {"sample_rate": 1e-9, "steps": 3},
        }
    )
    start = prepare(config, backend, source)
    before = start.backend.get_weights(start.model)
    result = dptrain.train(config, backend=backend, data=source)
    after = start.backend.get_weights(result.model)
    assert result.privacy["releases"] == 3
    assert all((before[k] != after[k]).all() for k in before)
