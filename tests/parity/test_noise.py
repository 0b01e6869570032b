"""Noise in both frameworks: its variance per group, and every trainable parameter (math.md section 7, item 4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

from accounting import SampledGaussian
from dptrain.config import TrainConfig
from dptrain.data import from_arrays
from dptrain.exact_normal import noise
from dptrain.lattice import spacing
from dptrain.mechanism import NoiseKind, event_noise_multiplier
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


SECURE = {"noise_multiplier": 1.0, "noise": "secure"}
ADAPTIVE = {"name": "mixed_ghost", "grouping": "per_layer", "max_grad_norm": {"initial": 0.5, "quantile": 0.5}}


def released(backend: str, precision: str, kind: NoiseKind) -> tuple[list[np.ndarray], float, list[float]]:
    """What an empty batch releases: parameters in order, the count, and the standard deviation of each."""
    rng = np.random.default_rng(0)
    source = from_arrays(rng.standard_normal((8, 12)), rng.integers(0, 5, 8), num_classes=5)
    config = TrainConfig.parse(
        {
            "model": {"name": "mlp", "hidden": [10, 7]},
            "strategy": ADAPTIVE,
            "privacy": {**SECURE, "noise": kind},
            "sampling": {"sample_rate": 0.5, "steps": 1},
            "performance": {"precision": precision},
        }
    )
    setup = prepare(config, backend, source)
    stds = {group.name: 0.5 + i for i, group in enumerate(setup.plan.groups)}
    grads = setup.backend.privatize(setup.backend.zeros(setup.model), setup.plan, stds, StepNoise(RandomKey.make(NOISE, 11), 2, kind))
    groups = {layer: group.name for group in setup.plan.groups for layer in group.layers}
    assert setup.plan.count is not None
    spread = [stds[groups[name.replace("/", ".").rpartition(".")[0]]] for name in grads.sums] + [stds[setup.plan.count.name]]
    return [np.asarray(v).ravel() for v in grads.sums.values()], setup.backend.counts(grads)[setup.plan.count.name], spread


@pytest.mark.parametrize("kind", ["fast", "secure"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_both_frameworks_add_the_same_bits(precision: str, kind: NoiseKind) -> None:
    """To parameters and to the count; secure ones are lattice points, of each group's lattice."""
    torch_side, tf_side = released("torch", precision, kind), released("tensorflow", precision, kind)
    assert torch_side[1:] == tf_side[1:]
    for ours, theirs in zip(torch_side[0], tf_side[0], strict=True):
        assert ours.dtype == theirs.dtype == precision
        np.testing.assert_array_equal(ours, theirs)
    if kind == "secure":
        key = RandomKey.make(NOISE, 11).value.to_bytes(16, "big")
        values = [*torch_side[0], np.array([torch_side[1]])]
        for stream, (value, std) in enumerate(zip(values, torch_side[2], strict=True)):
            np.testing.assert_array_equal(value, (noise(key, 2, stream, len(value)) * spacing(std)).astype(value.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_that_numpy_does_not_have_get_secure_noise_on_the_host(backend: str) -> None:
    """Half precision stands for a GPU here: the lattice is left only by the last conversion, which is post-processing."""
    values = np.linspace(-2, 2, 9, dtype=np.float32)
    noise_of_step = StepNoise(RandomKey.make(NOISE, 3), 1, "secure")
    expected = noise_of_step.added_to(values, 0, 0.7)
    if backend == "torch":
        import torch

        from dptrain_torch.update import noisy

        found: Any = noisy(torch.from_numpy(values).to(torch.bfloat16), 0.7, noise_of_step, 0)
        wanted = torch.from_numpy(expected).to(torch.bfloat16)
        assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    else:
        import tensorflow as tf

        from dptrain_tf.update import noisy

        found = noisy(tf.cast(tf.constant(values), tf.bfloat16), 0.7, noise_of_step, 0)
        assert found.dtype == tf.bfloat16
        np.testing.assert_array_equal(tf.cast(found, tf.float32), tf.cast(tf.cast(tf.constant(expected), tf.bfloat16), tf.float32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", [ADAPTIVE, {"name": "clipless"}])
def test_a_secure_run_trains_and_records_what_rounding_takes(backend: str, strategy: dict[str, Any]) -> None:
    import dptrain

    rng = np.random.default_rng(0)
    source = from_arrays(rng.standard_normal((40, 6)).astype(np.float32), rng.integers(0, 2, 40), num_classes=2)
    config = TrainConfig.parse(
        {
            "model": {"name": "lipschitz_mlp" if strategy["name"] == "clipless" else "mlp", "hidden": [4]},
            "strategy": strategy,
            "privacy": {"target_epsilon": 2.0, "target_delta": 1e-3, "noise": "secure", "accountant": "rdp"},
            "sampling": {"sample_rate": 0.3, "steps": 3},
        }
    )
    result = dptrain.train(config, backend=backend, data=source)
    assert result.complete and result.epsilon is not None and 1.98 < result.epsilon <= 2.0
    assert (result.privacy["releases"], result.privacy["noise"]) == (3, "secure")


def test_both_engines_take_secure_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """``noise="secure"`` reaches the release of a loop of the user's own and of Keras' ``fit``, and their events."""
    import keras
    import torch
    from torch import nn

    from dptrain_tf import make_private
    from dptrain_torch import PrivacyEngine

    kinds: list[str] = []
    original = StepNoise.added_to
    monkeypatch.setattr(StepNoise, "added_to", lambda self, *args: kinds.append(self.kind) or original(self, *args))
    x, y = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32), np.arange(20) % 2
    module = nn.Linear(3, 2)
    engine = PrivacyEngine(module, sample_size=20, batch_size=5, steps=2, noise_multiplier=1.0, max_grad_norm=1.0, noise="secure")
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    engine.attach(optimizer)
    for a, b in engine.loader(torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))):
        optimizer.step(loss=nn.functional.cross_entropy(module(a), b, reduction="none"))
    claimed = SampledGaussian(event_noise_multiplier(1.0, "secure"), 0.25)
    assert engine.budget is not None and engine.budget.ledger.events == ((claimed, 2),)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model = make_private(model, privacy={**SECURE}, expected_batch_size=5, steps=2, max_grad_norm=1.0)
    model.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=1, steps_per_epoch=2, verbose=0)
    assert model.privacy.budget.ledger.events == ((claimed, 2),)
    assert kinds == ["secure"] * 8
    with pytest.raises(ValueError, match="noise"):
        PrivacyEngine(nn.Linear(3, 2), sample_size=20, batch_size=5, steps=2, noise_multiplier=1.0, max_grad_norm=1.0, noise="slow")  # type: ignore[arg-type]
