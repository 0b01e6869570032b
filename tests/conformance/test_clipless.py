"""Proven bounds against the worst example that an attack finds, in both frameworks (math.md 7.3), and the L rows of pitfalls.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch

import dptrain
from accounting import NeighboringRelation, PrivacyLedger, SampledGaussian
from dptrain.config import TrainConfig
from dptrain.data import Dataset, from_arrays
from dptrain.errors import RunError, UnsupportedModelError
from dptrain.inforce import PlanInForce
from dptrain.mechanism import effective_noise_multiplier
from dptrain.projection import certify, project
from dptrain.randomness import NOISE, SAMPLING, RandomKey
from dptrain.sampling import PoissonSampler
from dptrain.setup import Setup, prepare
from dptrain.step import Release, TrainingStep
from dptrain.trainer import train
from tests.core.test_certificates import weights as adversarial

BACKENDS = ("torch", "tensorflow")
EXCESS = 1e-6


def images(shape: tuple[int, ...] = (8, 8, 2), classes: int = 3, count: int = 24, seed: int = 0) -> Dataset:
    """Random data."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((count, *shape)).astype(np.float32), rng.integers(0, classes, count)
    return from_arrays(x, y, x[:8], y[:8], num_classes=classes)


def run(model: Any, strategy: Any = "clipless", **parts: Any) -> TrainConfig:
    """A short run."""
    base = {
        "model": model,
        "strategy": strategy,
        "privacy": {"noise_multiplier": 1.0},
        "sampling": {"sample_rate": 0.5, "steps": 3},
        "optimizer": {"name": "sgd", "learning_rate": 0.01},
        "performance": {"physical_batch_size": 8},
    }
    return TrainConfig.parse(
        {**base, **{k: {**base.get(k, {}), **v} if isinstance(v, dict) and k in base else v for k, v in parts.items()}}
    )


def chain(*layers: dict[str, Any], norm: float = 3.0) -> dict[str, Any]:
    """A model of a bounded input and some layers."""
    return {"name": "layers", "layers": [{"type": "bounded_input", "norm": norm}, *layers, {"type": "flatten"}]}


# --- one layer at a time --------------------------------------------------------------------------------------------------

CONV = {"type": "spectral_conv2d", "filters": 3, "bias": False}
LAYERS: dict[str, tuple[tuple[dict[str, Any], ...], tuple[int, ...], int, float]] = {
    # name: layers, shape of an example, outputs, least tightness
    "dense": (({"type": "spectral_dense", "units": 5, "bias": False},), (7,), 5, 0.9),
    "dense and bias": (({"type": "spectral_dense", "units": 5},), (7,), 5, 0.9),
    "dense on a sequence": (({"type": "spectral_dense", "units": 4, "bias": False},), (6, 3), 24, 0.9),
    "dense and bias on a sequence": (({"type": "spectral_dense", "units": 4},), (6, 3), 24, 0.9),
    "frobenius": (({"type": "frobenius_dense", "units": 5},), (7,), 5, 0.9),
    "1x1 convolution": (({**CONV, "kernel_size": 1},), (6, 6, 2), 108, 0.9),
    "2x2 convolution, stride 2": (({**CONV, "kernel_size": 2, "strides": 2, "padding": "valid"},), (6, 6, 2), 27, 0.9),
    "3x3 convolution, stride 3": (({**CONV, "kernel_size": 3, "strides": 3, "padding": "valid"},), (6, 6, 2), 12, 0.9),
    "3x3 convolution": (({**CONV, "kernel_size": 3},), (8, 8, 2), 192, 0.6),
    "3x3 convolution and bias": (({**CONV, "kernel_size": 3, "bias": True},), (8, 8, 2), 192, 0.6),
    "3x3 convolution, valid": (({**CONV, "kernel_size": 3, "padding": "valid"},), (8, 8, 2), 108, 0.6),
    "3x3 convolution, stride 2": (({**CONV, "kernel_size": 3, "strides": 2},), (8, 8, 2), 48, 0.6),
    "3x3 convolution, dilation 2": (({**CONV, "kernel_size": 3, "dilation": 2},), (9, 9, 1), 243, 0.6),
    "5x5 convolution": (({**CONV, "kernel_size": 5},), (12, 12, 1), 432, 0.6),
    "1d convolution": (({"type": "spectral_conv1d", "filters": 3, "kernel_size": 3, "bias": False},), (10, 2), 30, 0.6),
    "bounded bias": (({"type": "bounded_bias"},), (4, 4, 2), 32, 0.9),
    "bounded bias on a vector": (({"type": "bounded_bias"},), (6,), 6, 0.9),
    "householder": (({"type": "householder"},), (4, 4, 2), 32, 0.6),
}  # fmt: skip


def single(backend: str, name: str, weight: str | None = None) -> Setup:
    """A model of one layer, in double precision, with given weights that have been projected."""
    layers, shape, outputs, _ = LAYERS[name]
    config = run(chain(*layers), performance={"precision": "float64"}, loss={"name": "multiclass_hinge"})
    setup = prepare(config, backend, images(shape, outputs))
    if weight is None:
        return setup
    values = setup.backend.get_weights(setup.model)
    fresh = {k: adversarial(weight, v.shape) if v.ndim > 1 else v for k, v in values.items()}
    setup.backend.set_weights(setup.model, fresh)
    certificates = setup.backend.constrain(setup.model, setup.info.graph)
    info = dptrain.ModelInfo(setup.info.layers, setup.info.loss_lipschitz, None, setup.info.graph, certificates)
    return Setup(**{**vars(setup), "plan": config.strategy.plan(info), "info": info})


def attack(setup: Setup) -> dict[str, float]:
    """Group -> attained over claimed."""
    found = setup.backend.tightness(setup.model, setup.data.x_train[:1], setup.plan)
    return {name: attained / claimed for name, (attained, claimed) in found.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_bound_holds_and_is_tight(backend: str, name: str) -> None:
    (ratio,) = attack(single(backend, name)).values()
    assert LAYERS[name][3] <= ratio <= 1 + EXCESS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dense", "3x3 convolution", "3x3 convolution, stride 2"])
@pytest.mark.parametrize("weight", ["ones", "alternating", "rank one", "orthogonal", "huge", "tiny"])
def test_bounds_hold_for_adversarial_weights(backend: str, name: str, weight: str) -> None:
    """A layer's own sensitivity does not depend on its weight; what lies before it sees the weight's certificate."""
    layer = LAYERS[name][0][0]
    first = {**layer, "name": "first"}
    spec = chain(
        first, {"type": "group_sort"} if "filters" not in layer else {"type": "activation", "function": "abs"}, {**layer, "name": "second"}
    )
    if name == "dense":
        spec["layers"][1]["units"] = 6
    shape, outputs = LAYERS[name][1], LAYERS[name][2] if "stride" not in name else 12
    setup = prepare(run(spec, performance={"precision": "float64"}, loss="multiclass_hinge"), backend, images(shape, outputs))
    values = setup.backend.get_weights(setup.model)
    setup.backend.set_weights(setup.model, {k: adversarial(weight, v.shape) if v.ndim > 1 else v for k, v in values.items()})
    certificates = setup.backend.constrain(setup.model, setup.info.graph)
    info = dptrain.ModelInfo(setup.info.layers, setup.info.loss_lipschitz, None, setup.info.graph, certificates)
    ratios = attack(Setup(**{**vars(setup), "plan": setup.config.strategy.plan(info)}))
    assert max(ratios.values()) <= 1 + EXCESS
    assert min(ratios.values()) >= (0.5 if name == "dense" else 0.1)


# --- whole networks, before and after noisy training ------------------------------------------------------------------------

NETWORKS: dict[str, Any] = {
    "mlp": {"name": "lipschitz_mlp", "hidden": [8, 6], "bias": True},
    "cnn": {"name": "lipschitz_cnn", "stages": [[4], [6]], "hidden": [8], "bias": True},
    "cnn, not orthogonal": {
        "name": "lipschitz_cnn",
        "stages": [[4, 4]],
        "hidden": [],
        "orthogonal": False,
        "pool": "max_pool",
        "gain": 3.0,
    },
    "resnet": {"name": "lipschitz_resnet", "width": 4, "blocks": [1, 1], "mode": "add"},
    "mixer": {"name": "lipschitz_mixer", "dim": 8, "depth": 1, "patch": 2, "token_hidden": 8, "channel_hidden": 8},
}


HEAVY = (("resnet", "tensorflow"), ("mixer", "tensorflow"))  # half a minute each; bounds and projection are the same code in both
PAIRS = [pytest.param(name, b, marks=pytest.mark.slow if (name, b) in HEAVY else ()) for name in NETWORKS for b in BACKENDS]


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_network_bounds_hold_before_and_after_noisy_steps(backend: str, name: str) -> None:
    """50 steps with noise that throws the weights about; every weight obeys its certificate and every group its bound (L6, L8)."""
    config = run(
        NETWORKS[name], sampling={"sample_rate": 0.5, "steps": 50}, optimizer={"name": "adam", "learning_rate": 0.1},
        performance={"check_bounds": True},
    )  # fmt: skip
    before = prepare(config, backend, images())
    ratios = attack(before)
    assert max(ratios.values()) <= 1 + EXCESS
    done = train(config, backend, data=images())
    if "not orthogonal" in name:
        assert done.plan != before.plan, "bounds follow the weights"
    after = Setup(**{**vars(before), "model": done.model, "plan": done.plan})
    assert max(attack(after).values()) <= 1 + EXCESS
    weights = before.backend.graph_weights(done.model, before.info.graph)
    claimed = certify(before.info.graph, weights)
    limits = {n.name: float(n.attrs.get("radius", 1.0)) for n in before.info.graph.nodes}
    assert all(value <= limits[key.rpartition(".")[0]] * (1 + 1e-3) for key, value in claimed.items() if key.endswith("weight"))
    moved = before.backend.graph_weights(before.model, before.info.graph)
    assert all(not np.array_equal(weights[k], moved[k]) for k in weights), "every parameter moved"


@pytest.mark.parametrize("name", NETWORKS)
def test_both_frameworks_prove_the_same(name: str) -> None:
    """Plans equal with ==, equal certificates, equal projected weights, at the start and after noisy steps with the same noise."""
    one, two = (prepare(run(NETWORKS[name]), b, images()) for b in BACKENDS)
    assert one.plan == two.plan
    assert one.info.certificates == two.info.certificates
    a, b = (s.backend.get_weights(s.model) for s in (one, two))
    assert all(np.array_equal(a[k], b[k]) for k in a)
    first, second = (silent_steps(setup, 5) for setup in (one, two))
    for left, right in zip(first.plan.groups, second.plan.groups, strict=True):
        assert left.norm_bound == pytest.approx(right.norm_bound, rel=1e-6)
    assert all(first.info.certificates[k] == pytest.approx(v, rel=1e-6) for k, v in second.info.certificates.items())
    c, d = one.backend.get_weights(one.model), two.backend.get_weights(two.model)
    assert any(np.abs(c[k] - a[k]).max() > 1e-3 for k in c)
    assert all(np.abs(c[k] - d[k]).max() <= 1e-5 * max(1.0, np.abs(c[k]).max()) for k in c)


def silent_steps(setup: Setup, count: int) -> PlanInForce:
    """Steps with known batches and next to no noise; the plan in force after them."""
    mechanism, relation = dptrain.GaussianMechanism(1e-12), NeighboringRelation.add_remove
    in_force = PlanInForce(setup.config.strategy, setup.info, setup.plan, mechanism, relation, 12.0)
    release = Release(in_force.stds, SampledGaussian(1.0, 0.5), RandomKey.make(NOISE, 7), PrivacyLedger(None))
    optimizer = setup.backend.build_optimizer(setup.config.optimizer, setup.model)
    step = TrainingStep(
        setup.backend, setup.model, setup.loss, optimizer, setup.plan, PoissonSampler(24, 0.5, RandomKey.make(SAMPLING, 7)),
        setup.data.x_train, setup.data.y_train, 8, lambda t: 0.01, 0, release, in_force=in_force,
    )  # fmt: skip
    for t in range(count):
        step(t)
    return in_force


@pytest.mark.parametrize("backend", BACKENDS)
def test_ghost_norms_never_exceed_the_bound(backend: str) -> None:
    setup = prepare(run(NETWORKS["cnn"]), backend, images())
    x, y = setup.data.x_train, setup.data.y_train
    found = setup.backend.attained(setup.model, setup.loss, x, y, setup.plan)
    assert set(found) == {group.name for group in setup.plan.groups}
    assert all(0 < norm <= bound for norm, bound in found.values())
    with pytest.raises(UnsupportedModelError, match="over its proven bound"):
        setup.backend.self_check(setup.model, setup.loss, x[:3], y[:3], setup.plan.with_bounds(dict.fromkeys(found, 1e-6)))


# --- one step -------------------------------------------------------------------------------------------------------------


def summed(setup: Setup, x: np.ndarray, y: np.ndarray, mask: np.ndarray | None = None) -> tuple[dict[str, np.ndarray], Any]:
    """The sum that a step releases before noise, by parameter."""
    grads = setup.backend.bounded_sum(
        setup.model, setup.loss, setup.backend.batch(x, y, np.ones(len(x), bool) if mask is None else mask), setup.plan
    )
    return {k: np.asarray(v) for k, v in grads.sums.items()}, grads


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_one_bad_example_does_not_poison_the_step(backend: str, bad: float) -> None:
    """L15: it is zeroed or scaled down; the others' sum is what it was."""
    setup = prepare(run(NETWORKS["cnn"]), backend, images())
    x, y = setup.data.x_train[:6].copy(), setup.data.y_train[:6]
    without, _ = summed(setup, x[:5], y[:5])
    x[5, 2, 3] = bad
    with_it, grads = summed(setup, x, y)
    assert all(np.isfinite(v).all() for v in with_it.values())
    groups = {p: g.norm_bound for g in setup.plan.groups for name in g.layers for p in setup.plan.layer(name).params}
    for key, value in with_it.items():
        identifier = getattr(grads, "identifiers", {}).get(key, key)
        assert np.linalg.norm(value - without[key]) <= groups[identifier] * (1 + 1e-4)
    masked, _ = summed(setup, x, y, np.array([True] * 5 + [False]))
    assert all(np.allclose(masked[k], without[k], rtol=1e-4, atol=1e-5) for k in masked)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_smaller_clip_of_the_loss_gradient_cuts_noise_and_sum_in_proportion(backend: str) -> None:
    """L10: bounds per example, one division at the end."""
    wide, narrow = (prepare(run(NETWORKS["cnn"], {"name": "clipless", "loss_gradient_clip": c}), backend, images()) for c in (0.5, 0.05))
    for a, b in zip(wide.plan.groups, narrow.plan.groups, strict=True):
        assert b.norm_bound == pytest.approx(a.norm_bound / 10, rel=1e-12)
    mechanism = dptrain.GaussianMechanism(1.3, "per_group")
    stds = [mechanism.stds(s.plan) for s in (wide, narrow)]
    assert all(stds[1][k] == pytest.approx(stds[0][k] / 10) for k in stds[0])
    assert all(effective_noise_multiplier(s.plan, std) == pytest.approx(1.3) for s, std in zip((wide, narrow), stds, strict=True))
    one = wide.data.x_train[:1], wide.data.y_train[:1]  # its loss gradient is longer than both clips
    a, b = summed(wide, *one)[0], summed(narrow, *one)[0]
    assert all(np.allclose(b[k], a[k] / 10, rtol=1e-3, atol=1e-7) for k in a)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_that_of_the_plain_weight(backend: str) -> None:
    """L5: nothing is normalised in the forward pass, so doubling a weight doubles the output."""
    setup = prepare(run(chain({"type": "spectral_dense", "units": 3, "bias": False})), backend, images((5,)))
    before = setup.backend.predict(setup.model, setup.data.x_test)
    values = setup.backend.get_weights(setup.model)
    setup.backend.set_weights(setup.model, {k: 2 * v for k, v in values.items()})
    np.testing.assert_allclose(setup.backend.predict(setup.model, setup.data.x_test), 2 * before, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_wrong_is_listed_with_a_remedy(backend: str) -> None:
    layers = [
        {"type": "bounded_input", "norm": 1.0}, {"type": "conv2d", "name": "plain", "filters": 4, "kernel_size": 3},
        {"type": "group_norm", "name": "normed", "groups": 2}, {"type": "flatten"},
        {"type": "dense", "name": "last", "units": "num_classes"},
    ]  # fmt: skip
    with pytest.raises(UnsupportedModelError) as caught:
        prepare(run({"name": "layers", "layers": layers}), backend, images())
    text = str(caught.value)
    for word in ("plain", "SpectralConv2", "normed", "LayerCentering", "last", "Spectral"):
        assert word in text
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_without_a_bound_and_losses_without_a_constant_are_refused(backend: str) -> None:
    model = {"name": "layers", "layers": [{"type": "spectral_dense", "units": "num_classes"}]}
    with pytest.raises(UnsupportedModelError, match="BoundedInput"):
        prepare(run(model), backend, images((5,)))
    rng = np.random.default_rng(0)
    data = from_arrays(rng.standard_normal((20, 5)), rng.standard_normal((20, 2)))
    model = chain({"type": "spectral_dense", "units": "num_classes"})
    with pytest.raises(UnsupportedModelError, match="loss_gradient_clip"):
        prepare(run(model, loss="mean_squared_error"), backend, data)
    assert (
        prepare(run(model, {"name": "clipless", "loss_gradient_clip": 1.0}, loss="mean_squared_error"), backend, data).plan.loss_clip == 1.0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_that_look_at_the_batch_are_refused(backend: str) -> None:
    """L4: class counts of the batch couple the examples."""
    setup = prepare(run(NETWORKS["mlp"]), backend, images())
    if backend == "torch":
        import torch

        def coupled(output: Any, y: Any) -> Any:
            return -output.gather(1, y.long()[:, None])[:, 0] / torch.bincount(y.long(), minlength=3)[y.long()]
    else:
        import tensorflow as tf

        def coupled(y: Any, output: Any) -> Any:
            counts = tf.cast(tf.math.bincount(tf.cast(y, tf.int32), minlength=3), output.dtype)
            return -tf.gather(output, y, batch_dims=1) / tf.gather(counts, y)

    x, y = setup.data.x_train[:3], np.array([0, 0, 1])
    with pytest.raises(UnsupportedModelError, match="depends on its batch"):
        setup.backend.self_check(setup.model, coupled, x, y, setup.plan)


# --- a moving clip ----------------------------------------------------------------------------------------------------------

ADAPTIVE = {"initial": 0.02, "quantile": 0.5, "learning_rate": 0.5, "share": 0.05}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "strategy",
    [{"name": "clipless", "loss_gradient_clip": ADAPTIVE}, {"name": "mixed_ghost", "max_grad_norm": ADAPTIVE, "grouping": "per_layer"}],
    ids=["clipless", "mixed_ghost"],
)
def test_a_moving_clip_reaches_its_quantile_within_the_budget(backend: str, strategy: Any) -> None:
    """L14: the count is one more group of the release; sigma is what it was, and so is epsilon."""
    config = run(
        NETWORKS["mlp"], strategy, privacy={"noise_multiplier": None, "target_epsilon": 400.0, "target_delta": 1e-5},
        sampling={"sample_rate": 1.0, "steps": 30}, optimizer={"learning_rate": 1e-6},
    )  # fmt: skip
    data = images(count=200)
    done = train(config, backend, data=data)
    assert done.epsilon <= 400.0
    start = prepare(config, backend, data)
    sigma = done.privacy["events"][0]["noise_multiplier"]
    stds = {g["name"]: g["noise_std"] for g in done.privacy["groups"]}
    assert effective_noise_multiplier(done.plan, stds) == pytest.approx(sigma, rel=2e-4)
    assert 0.5 / stds["clip_count"] == pytest.approx(np.sqrt(ADAPTIVE["share"]) / sigma, rel=2e-4)
    if strategy["name"] == "clipless":
        clip, wide = done.plan.loss_clip, prepare(run(NETWORKS["mlp"], "clipless"), backend, data)
        norms = np.linalg.norm(loss_gradients(wide, data), axis=1)
    else:
        clip = float(np.sqrt(sum(g.clip_norm**2 for g in done.plan.gradient_groups)))
        norms = per_sample_norms(start, data)
    assert np.mean(norms <= clip) == pytest.approx(0.5, abs=0.1)


def loss_gradients(setup: Setup, data: Dataset) -> np.ndarray:
    """Gradient of the cross-entropy in the outputs, by hand."""
    z = setup.backend.predict(setup.model, data.x_train).astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True) - np.eye(z.shape[1])[data.y_train]


def per_sample_norms(setup: Setup, data: Dataset) -> np.ndarray:
    """Joint norms over all groups, by the public diagnostics."""
    if setup.backend.name == "torch":
        import dptrain_torch as api
    else:
        import dptrain_tf as api
    tensors = [setup.backend.tensor(a) for a in (data.x_train, data.y_train)]
    return np.asarray(api.per_sample_norms(setup.model, setup.loss, *tensors, check=False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_count_is_half_per_example(backend: str) -> None:
    """+1/2 below the clip, -1/2 above it or not finite, 0 for padding; an empty batch releases noise alone."""
    strategy = {"name": "clipless", "loss_gradient_clip": {"initial": 1.0, "share": 0.1}}
    setup = prepare(run(NETWORKS["mlp"], strategy), backend, images())
    x, y = setup.data.x_train[:8], setup.data.y_train[:8]
    norms = np.linalg.norm(loss_gradients(setup, setup.data), axis=1)[:8]
    for factor in (0.1, float(np.median(norms)), 10.0):
        mask = np.array([True] * 7 + [False])
        grads = setup.backend.bounded_sum(setup.model, setup.loss, setup.backend.batch(x, y, mask, factor), setup.plan)
        assert setup.backend.counts(grads)["clip_count"] == np.where(norms[:7] <= factor, 0.5, -0.5).sum()
    config = run(NETWORKS["mlp"], strategy, sampling={"sample_rate": 1e-9, "steps": 3}, privacy={"noise_multiplier": 1.0})
    assert train(config, backend, data=images()).steps == 3


# --- allocation, resuming, monitors, robustness -------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["global", "per_group", "min_noise"])
@pytest.mark.parametrize("weights", [{}, {"fc*": 0.5, "head": 3.0}])
def test_noise_is_shared_as_asked_and_sigma_stays(allocation: str, weights: dict[str, float]) -> None:
    plan = prepare(run(NETWORKS["mlp"], {"name": "clipless", "loss_gradient_clip": {"initial": 1.0, "share": 0.1}}), "torch", images()).plan
    stds = dptrain.GaussianMechanism(2.0, allocation, weights).stds(plan)
    assert effective_noise_multiplier(plan, stds) == pytest.approx(2.0, rel=1e-12)
    plain = dptrain.GaussianMechanism(2.0, allocation).stds(plan)
    ratio = (stds["head"] / plain["head"]) / (stds["fc1"] / plain["fc1"])
    assert ratio == pytest.approx(6.0 if weights else 1.0)
    assert stds["clip_count"] == pytest.approx(plain["clip_count"])


def test_noise_weights_that_match_nothing_are_refused() -> None:
    plan = prepare(run(NETWORKS["mlp"]), "torch", images()).plan
    with pytest.raises(dptrain.ConfigError, match="match no group"):
        dptrain.GaussianMechanism(1.0, "global", {"conv*": 2.0}).stds(plan)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["clipless", {"name": "clipless", "loss_gradient_clip": {"initial": 0.5}}], ids=["fixed", "moving"])
def test_a_resumed_run_equals_an_uninterrupted_one(backend: str, strategy: Any, tmp_path: Path) -> None:
    """Bit for bit with unsafe_seed: certificates and clip are stored with the weights, and proven again before they are used."""
    config = run(
        NETWORKS["mlp"], strategy, privacy={"noise_multiplier": 1.0, "unsafe_seed": 5}, sampling={"sample_rate": 0.5, "steps": 6},
        performance={"checkpoint_every": 2},
    )  # fmt: skip
    whole = train(config, backend, data=images(), out=tmp_path / "whole")

    def fail(progress: Any) -> None:
        if progress.step == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(config, backend, data=images(), out=tmp_path / "cut", progress=fail)
    resumed = train(config, backend, data=images(), out=tmp_path / "cut")
    assert resumed.privacy["releases"] == whole.privacy["releases"] == 6
    assert resumed.plan == whole.plan
    get = prepare(config, backend, images()).backend.get_weights
    a, b = get(whole.model), get(resumed.model)
    assert all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("backend", BACKENDS)
def test_monitors_say_how_much_of_a_bound_is_used(backend: str, tmp_path: Path) -> None:
    import json

    train(run(NETWORKS["mlp"], performance={"monitors": True}), backend, data=images(), out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "gradient_to_bound" in line]
    assert len(steps) == 3
    assert all(line["private"] is False for line in steps)
    assert all(0 <= v <= 1 for line in steps for v in line["gradient_to_bound"].values())
    assert any(v > 1e-4 for line in steps for v in line["gradient_to_bound"].values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_certified_radii_hold_against_an_attack(backend: str, tmp_path: Path) -> None:
    """No perturbation found within the certified radius, in the raw input's units, changes a prediction."""
    from dptrain.robustness import certify, certify_run

    data = images()
    data = Dataset(**{**vars(data), "public_constants": {**data.public_constants, "std": [0.5, 0.25]}})
    config = run(NETWORKS["cnn"], sampling={"sample_rate": 0.5, "steps": 20}, optimizer={"learning_rate": 0.05})
    done = train(config, backend, data=data, out=tmp_path / "run")
    backend_object = prepare(config, backend, data).backend
    found = certify(backend_object, done.model, data, [0.0, 0.01, 0.1])
    assert found.input_scale == 0.25
    assert found.accuracy[0.0] == pytest.approx(done.metrics["accuracy"])
    assert found.accuracy[0.0] >= found.accuracy[0.01] >= found.accuracy[0.1]
    rng = np.random.default_rng(0)
    guess = backend_object.predict(done.model, data.x_test).argmax(1)
    for i in np.flatnonzero(found.radii > 0):
        delta = rng.standard_normal((50, *data.input_shape))
        delta *= 0.999 * found.radii[i] / np.sqrt((delta**2).sum((1, 2, 3), keepdims=True))
        moved = data.x_test[i] + delta / np.array([0.5, 0.25])  # the raw perturbation after normalisation
        assert (backend_object.predict(done.model, moved.astype(np.float32)).argmax(1) == guess[i]).all()
    again = certify_run(tmp_path / "run", [0.0, 0.01, 0.1], data)
    np.testing.assert_allclose(again.radii, found.radii, rtol=1e-6)


def test_certifying_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    from dptrain.robustness import certify_run

    with pytest.raises(RunError, match="finish the run"):
        certify_run(tmp_path, [0.1])


# --- models of a user's own -------------------------------------------------------------------------------------------------


def own_model(backend: str) -> Any:
    """A residual network that calls one layer twice, written in the framework."""
    if backend == "torch":
        import torch

        from dptrain_torch import layers as L

        class Net(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bound, self.inner, self.sort = L.BoundedInput(2.0), L.SpectralLinear(6, 6), L.GroupSort()
                self.head = L.SpectralLinear(6, 3)

            def forward(self, x: Any) -> Any:
                x = self.bound(x)
                x = x + self.sort(self.inner(x))
                return self.head(self.inner(x))

        return Net()
    import keras

    from dptrain_tf import layers as L

    x = keras.Input((6,))
    inner = L.SpectralDense(6, name="inner")
    h = L.BoundedInput(2.0)(x)
    h = keras.layers.Add()([h, L.GroupSort()(inner(h))])
    return keras.Model(x, L.SpectralDense(3, name="head")(inner(h)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_users_own_network_trains_and_is_refused_by_the_same_rules(backend: str) -> None:
    """L12: a layer called twice has the sum of two sensitivities."""
    model = own_model(backend)
    config = run("given", performance={"check_bounds": True}, sampling={"sample_rate": 0.5, "steps": 5})
    setup = prepare(config, backend, images((6,)), model)
    ratios = attack(setup)
    assert max(ratios.values()) <= 1 + EXCESS
    inner = next(layer for layer in setup.plan.layers if layer.name == "inner")
    assert inner.calls == 2
    done = train(config, backend, data=images((6,)), model=model)
    assert done.model is model
    assert max(attack(Setup(**{**vars(setup), "plan": done.plan})).values()) <= 1 + EXCESS


@pytest.mark.parametrize("backend", BACKENDS)
def test_public_functions_project_and_check(backend: str) -> None:
    model = own_model(backend)
    if backend == "torch":
        import dptrain_torch as api
        from dptrain_torch.losses import get_loss
    else:
        import dptrain_tf as api
        from dptrain_tf.losses import get_loss
    executor = prepare(run(NETWORKS["mlp"]), backend, images()).backend
    data = images((6,))
    x, y = executor.tensor(data.x_train), executor.tensor(data.y_train)
    certificates = api.project(model, x)
    assert max(certificates.values()) == pytest.approx(1.0, rel=1e-3)
    found = api.check_bounds(model, get_loss("cross_entropy"), x, y)
    assert all(0 < norm <= bound for norm, bound in found.values())
    print(api.make_plan(model, x, "clipless", loss=get_loss("cross_entropy")))


def test_two_passes_through_a_clip_are_refused() -> None:
    """A clip inside the model is not linear in the weights of a second pass."""
    model = chain({"type": "spectral_dense", "units": "num_classes"}, {"type": "loss_gradient_clip", "norm": 0.1})
    for backend in BACKENDS:
        config = run(model, "mixed_ghost", performance={"gradients": "two_pass"})
        with pytest.raises(UnsupportedModelError, match="book_keeping"):
            train(config, backend, data=images((5,)))
        assert train(run(model, "mixed_ghost"), backend, data=images((5,))).complete
        assert prepare(run(model, "clipless"), backend, images((5,))).plan.groups[0].norm_bound == pytest.approx(
            0.1 * np.hypot(3.0, 1.0), rel=1e-3
        )


def test_two_passes_over_a_layer_that_is_run_again_are_refused_before_training() -> None:
    """Its norm is that of another run of it, which may round a ReLU inside to the other side than the pass that is summed."""
    data = images((5,))
    for backend in BACKENDS:
        if backend == "torch":
            model: Any = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.PReLU(), torch.nn.Linear(4, 3))
        else:
            model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4), keras.layers.PReLU(), keras.layers.Dense(3)])
        config = run(NETWORKS["mlp"], "mixed_ghost", performance={"gradients": "two_pass"})
        with pytest.raises(UnsupportedModelError, match=r"PReLU.*running it again.*book_keeping"):
            prepare(config, backend, data, model)
        assert train(run(NETWORKS["mlp"], "mixed_ghost"), backend, data=data, model=model).complete


def test_projection_is_what_the_backends_run() -> None:
    """One implementation: the projected weights of both backends are the core's, to the bit."""
    for backend in BACKENDS:
        setup = prepare(run(NETWORKS["cnn"]), backend, images())
        weights = setup.backend.graph_weights(setup.model, setup.info.graph)
        noisy = {k: (v + 0.1 * np.random.default_rng(0).standard_normal(v.shape)).astype(np.float32) for k, v in weights.items()}
        expected = project(setup.info.graph, noisy)
        by_name = setup.backend.get_weights(setup.model)
        setup.backend.set_weights(setup.model, {k: noisy.get(k, v) for k, v in by_name.items()})
        assert setup.backend.project(setup.model, setup.plan) == expected.certificates
        found = setup.backend.graph_weights(setup.model, setup.info.graph)
        assert all(np.array_equal(found[k], v) for k, v in expected.weights.items())
