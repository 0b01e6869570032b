"""The two frameworks beside each other: equal plans, equal batches, equal numbers (math.md section 7, item 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from accounting import PrivacyLedger, SampledGaussian
from dptrain.config import TrainConfig
from dptrain.data import Dataset, from_arrays
from dptrain.randomness import NOISE, SAMPLING, RandomKey, StepNoise
from dptrain.sampling import PoissonSampler
from dptrain.setup import assemble, prepare, probe
from dptrain.step import Release, TrainingStep
from dptrain.strategies import get_strategy

BACKENDS = ("torch", "tensorflow")
IMAGE, TOKENS = (16, 16, 3), (12,)
LIST: list[dict[str, Any]] = [
    {"type": "conv2d", "filters": 6, "kernel_size": [3, 2], "strides": 2, "padding": "same", "activation": "tanh"},
    {"type": "conv2d", "filters": 6, "kernel_size": 4, "padding": "same", "dilation": 2, "groups": 3},
    {"type": "instance_norm"},
    {"type": "conv2d_transpose", "filters": 4, "kernel_size": 3, "strides": 2, "activation": "gelu"},
    {"type": "conv2d", "filters": 6, "kernel_size": 3, "strides": 2, "padding": 1, "bias": False},
    {"type": "group_norm", "groups": 2},
    {"type": "activation", "function": "silu"},
    {"type": "avg_pool", "size": 2},
    {"type": "to_sequence"},
    {"type": "rms_norm"},
    {"type": "conv1d", "filters": 5, "kernel_size": 3, "padding": "causal"},
    {"type": "residual", "name": "r", "body": [{"type": "dense", "units": 5, "activation": "elu"}]},
    {"type": "flatten"},
    {"type": "dense", "units": "num_classes"},
]
MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": ({"name": "mlp", "hidden": [16, 8]}, IMAGE),
    "cnn": ({"name": "cnn", "stages": [[8], [8, 16]], "norm_groups": 4, "hidden": [16]}, IMAGE),
    "resnet18_gn": ({"name": "resnet18_gn", "width": 8, "norm_groups": 4, "activation": "tanh"}, IMAGE),
    "transformer_encoder": ({"name": "transformer_encoder", "dim": 16, "depth": 2, "heads": 2, "vocabulary": 50}, TOKENS),
    "transformer_encoder on values": ({"name": "transformer_encoder", "dim": 16, "depth": 1, "heads": 2}, (6, 5)),
    "vit_tiny": ({"name": "vit_tiny", "dim": 16, "depth": 2, "heads": 2}, IMAGE),
    "layers": ({"name": "layers", "layers": LIST}, IMAGE),
}


def config(model: Any, strategy: Any, **parts: Any) -> TrainConfig:
    """A run of ten steps; every example is in a batch of about 10, physical batches of 4."""
    return TrainConfig.parse(
        {
            "model": model,
            "strategy": strategy,
            "privacy": {"noise_multiplier": 1.0},
            "sampling": {"sample_rate": 0.4, "steps": 10},
            "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.5},
            "performance": {"physical_batch_size": 4},
            **parts,
        }
    )


def data(shape: tuple[int, ...]) -> Dataset:
    """A small synthetic data set."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 50, (25, *shape)) if len(shape) == 1 else rng.standard_normal((25, *shape)).astype(np.float32)
    return from_arrays(x, rng.integers(0, 3, 25), num_classes=3)


def trained(run: TrainConfig, backend: str, source: Dataset, std: float = 0.0) -> tuple[dict[str, np.ndarray], Any]:
    """Weights after the run's steps with known batches and a given noise, and the plan."""
    setup = prepare(run, backend, source)
    release = None
    if setup.plan.private:
        stds = {g.name: std for g in setup.plan.groups}
        release = Release(stds, SampledGaussian(1.0, 0.4), RandomKey.make(NOISE, 7), PrivacyLedger(None))
    optimizer = setup.backend.build_optimizer(run.optimizer, setup.model)
    step = TrainingStep(
        setup.backend, setup.model, setup.loss, optimizer, setup.plan, PoissonSampler(25, 0.4, RandomKey.make(SAMPLING, 7)),
        source.x_train, source.y_train, 4, lambda t: run.optimizer.rate_at(t, 10), 0, release,
        run.performance.gradients == "two_pass",
    )  # fmt: skip
    for t in range(10):
        step(t)
    return setup.backend.get_weights(setup.model), setup.plan


def gap(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Relative L2 distance of two sets of weights, over all of them together."""
    assert a.keys() == b.keys()
    difference = sum(float(((a[k] - b[k]).astype(np.float64) ** 2).sum()) for k in a)
    return float(np.sqrt(difference / sum(float((v.astype(np.float64) ** 2).sum()) for v in a.values())))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "resnet18_gn" else name for name in MODELS])
def test_ten_steps_agree(name: str) -> None:
    """Without noise, weights after ten steps agree to 1e-5, plans are equal, and the weights have moved."""
    model, shape = MODELS[name]
    run, source = config(model, {"name": "mixed_ghost", "max_grad_norm": 0.5}), data(shape)
    (one, plan_one), (two, plan_two) = (trained(run, b, source) for b in BACKENDS)
    assert plan_one == plan_two
    assert gap(one, two) <= 1e-5
    start = prepare(run, "torch", source)
    assert gap(one, start.backend.get_weights(start.model)) > 1e-3


@pytest.mark.parametrize(("strategy", "grouping"), [("non_private", "flat"), ("per_sample", "flat"), ("ghost", "per_layer")])
def test_strategies_agree(strategy: str, grouping: str) -> None:
    """Every strategy, grouping and way to take the sum gives the same weights in both frameworks."""
    source = data(IMAGE)
    settings: dict[str, Any] = {"name": strategy}
    if strategy != "non_private":
        settings |= {"grouping": grouping, "clipping": "automatic", "max_grad_norm": 0.5}
    results = []
    for gradients in ("book_keeping", "two_pass"):
        run = config(MODELS["cnn"][0], settings, performance={"physical_batch_size": 4, "gradients": gradients})
        results += [trained(run, b, source) for b in BACKENDS]
    assert all(plan == results[0][1] for _, plan in results)
    assert max(gap(results[0][0], weights) for weights, _ in results) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_reaches_the_weights_in_both_frameworks(backend: str) -> None:
    """The same key gives the same noise; without noise the weights are others."""
    run, source = config(MODELS["mlp"][0], {"name": "mixed_ghost", "max_grad_norm": 0.5}), data(IMAGE)
    noisy, again, silent = (trained(run, backend, source, std=s)[0] for s in (0.3, 0.3, 0.0))
    assert gap(noisy, again) == 0
    assert gap(noisy, silent) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_facts_and_plans_are_equal(name: str) -> None:
    """The two frameworks see the same facts, and a plan depends on nothing else."""
    model, shape = MODELS[name]
    run, source = config(model, "non_private"), data(shape)
    parts = [assemble(run, backend, source) for backend in BACKENDS]
    one, two = (part.backend.describe(part.model, probe(source)[0]) for part in parts)
    assert one == two
    for strategy in ("mixed_ghost", "ghost", "per_sample", "non_private"):
        for decision in ("space", "time"):
            assert get_strategy(strategy).plan(one, decision=decision) == get_strategy(strategy).plan(two, decision=decision)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_exchanged_in_both_directions(name: str) -> None:
    """Weights trained in one framework give the same predictions in the other, and come back unchanged."""
    model, shape = MODELS[name]
    run, source = config(model, "non_private", seed=5), data(shape)
    torch_side, tf_side = (prepare(run, b, source) for b in BACKENDS)
    rng = np.random.default_rng(3)
    weights = {
        k: v + 0.1 * rng.standard_normal(v.shape).astype(v.dtype) for k, v in torch_side.backend.get_weights(torch_side.model).items()
    }
    tf_side.backend.set_weights(tf_side.model, weights)
    back = tf_side.backend.get_weights(tf_side.model)
    assert all(np.array_equal(back[k], weights[k]) for k in weights)
    torch_side.backend.set_weights(torch_side.model, back)
    a, b = (s.backend.evaluate(s.model, s.loss, source.x_train, source.y_train) for s in (torch_side, tf_side))
    assert a["accuracy"] == b["accuracy"]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_one_stream_per_parameter_and_step() -> None:
    """The noise of two parameters, and of two steps, is independent."""
    key = RandomKey.make(NOISE, 1)
    draws = [StepNoise(key, step).normal(stream, (1000,)) for step in (0, 1) for stream in (0, 1)]
    correlations = np.corrcoef(draws)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 5.3 / np.sqrt(1000)  # 1e-6 over six pairs
