"""LipDP's names on dptrain: its README example, Keras' loop, the ledger, noise, bounds, refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import dptrain_tf
from accounting import NeighboringRelation, PrivacyLedger, get_accountant
from dptrain.adaptive import AdaptiveClip
from dptrain.data import load
from dptrain.errors import ConfigError, DataError, UnsupportedModelError
from dptrain.mechanism import effective_noise_multiplier, event_noise_multiplier
from dptrain.metrics import auroc
from dptrain_tf import lipdp
from dptrain_tf.gradients import Batch
from dptrain_tf.lipdp import layers as L
from dptrain_tf.lipdp import losses, pipeline
from dptrain_tf.lipdp.dynamic import AdaptiveQuantileClipping, LaplaceAdaptiveLossGradientClipping
from dptrain_tf.lipdp.model import DP_Accountant, DP_Model, DP_Sequential, DPParameters, compute_gradient_bounds, get_eps_delta
from dptrain_tf.lipdp.pipeline import DatasetMetadata
from dptrain_tf.lipdp.sensitivity import get_max_epochs
from dptrain_tf.lipdp.session import FoldingBackend, Performance

DOC = Path(__file__).parents[2] / "docs" / "lipdp.md"
N, CLASSES, WIDTH = 120, 3, 6
rng = np.random.default_rng(3)
X = rng.standard_normal((N, WIDTH)).astype(np.float32)
Y = rng.integers(0, CLASSES, N)
HOT = np.eye(CLASSES, dtype=np.float32)[Y]


def metadata(**changes: Any) -> DatasetMetadata:
    """Of the data above."""
    facts = {"input_shape": (WIDTH,), "nb_classes": CLASSES, "nb_samples_train": N, "nb_samples_test": 0, "class_names": ["a", "b", "c"]}
    return DatasetMetadata(**{**facts, "nb_steps_per_epochs": 3, "batch_size": 40, "max_norm": 1.0, **changes})


def body() -> list[Any]:
    """Layers without a last clip."""
    return [
        L.DP_BoundedInput(upper_bound=1.0),
        L.DP_QuickSpectralDense(8),
        L.DP_GroupSort(2),
        L.DP_AddBias(1.0),
        L.DP_SpectralDense(CLASSES),
    ]


def make(*more: Any, strategy: str = "local", sigma: float = 4.0, compiled: bool = True, **changes: Any) -> Any:
    """A small model."""
    model = DP_Sequential([*body(), *more], dp_parameters=DPParameters(strategy, sigma, 1e-5), dataset_metadata=metadata(**changes))
    if compiled:
        model.compile(loss=losses.DP_TauCategoricalCrossentropy(2.0), optimizer=keras.optimizers.SGD(0.1), metrics=["accuracy"])
    return model


def within(found: dict[str, tuple[float, float]]) -> bool:
    """Whether every norm is within its bound."""
    return all(norm <= bound * (1 + 1e-5) for norm, bound in found.values())


# --- the example of the documentation ----------------------------------------------------------------------------------------


def test_the_documented_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
    monkeypatch.setattr(pipeline, "load", lambda name, **options: load(name, **{**options, "limit": 250}))
    scope: dict[str, Any] = {}
    for old, new in {"epochs=num_epochs": "epochs=min(num_epochs, 2), verbose=0", "=32": "=4", "=64": "=8", "(512)": "(16)"}.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, str(DOC), "exec"), scope)
    history, model = scope["hist"].history, scope["model"]
    assert set(history) == {"loss", "val_loss", "val_accuracy", "epsilon"}
    assert history["epsilon"] == sorted(history["epsilon"]) and history["epsilon"][-1] == model.epsilon()
    assert scope["num_epochs"] > 2 and model.ledger.num_releases == 2
    said = capsys.readouterr().out
    for word in ("delta = 1e-05", "add_remove", "Poisson", "prv", "2 releases"):
        assert word in said


def test_every_public_name_of_lipdp_exists() -> None:
    names = [
        "CertifiableAUROC", "DPLayer", "DP_Accountant", "DP_AddBias", "DP_BoundedInput", "DP_ClipGradient", "DP_Flatten", "DP_GroupSort",
        "DP_InputLayer", "DP_KCosineSimilarity", "DP_Lambda", "DP_LayerCentering", "DP_MeanAbsoluteError", "DP_Model", "DP_MulticlassHKR",
        "DP_MulticlassHinge", "DP_MulticlassKR", "DP_Permute", "DP_QuickFrobeniusDense", "DP_Reshape", "DP_ScaledL2NormPooling2D",
        "DP_Sequential", "DP_SpectralConv2D", "DP_SpectralDense", "DP_TauCategoricalCrossentropy", "LaplaceAdaptiveLossGradientClipping",
        "PrivacyMetrics", "ScaledAUC", "SignaltoNoiseAverage", "SignaltoNoiseHistogram", "bound_clip_value", "bound_normalize",
        "get_max_epochs", "load_adbench_data", "load_and_prepare_images_data", "make_residuals", "prepare_tabular_data",
    ]  # fmt: skip
    assert not [name for name in names if not hasattr(lipdp, name)]
    with pytest.raises(ImportError, match="get_eps_delta"):
        exec("from dptrain_tf.lipdp import DPGD_Mechanism")


# --- Keras' loop and the ledger -----------------------------------------------------------------------------------------------


class Watch(keras.callbacks.Callback):
    """Counts batches, and compares the ledger at each."""

    def __init__(self) -> None:
        super().__init__()
        self.releases: list[int] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        assert set(logs) == {"loss"}
        self.releases.append(self.model.ledger.num_releases)


def test_fit_is_keras_loop_and_a_second_fit_continues_the_ledger(tmp_path: Path) -> None:
    model, watch, said = make(), Watch(), list[Any]()
    accountant = DP_Accountant(said.append, verbose=False)
    rate = keras.callbacks.LearningRateScheduler(lambda epoch: 0.05 / (epoch + 1))
    planned = get_eps_delta(model, 2)[0]
    history = model.fit(X, HOT, epochs=2, validation_data=(X, HOT), callbacks=[watch, rate, accountant], verbose=0).history
    assert watch.releases == [1, 2, 3, 4, 5, 6] and history["learning_rate"] == pytest.approx([0.05, 0.025])
    assert {"loss", "val_loss", "val_accuracy", "epsilon"} <= set(history)
    prv = get_accountant("prv", NeighboringRelation.add_remove)
    assert history["epsilon"][-1] == prv.epsilon(model.ledger.events, 1e-5) == planned == said[-1]["epsilon"]
    assert {"delta", "relation", "sampling", "accountant", "releases"} <= set(said[-1])
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(N).batch(40)  # integer labels now, and another number of steps
    model.fit(data, epochs=1, steps_per_epoch=5, verbose=0)
    assert model.ledger.num_releases == 11 and len(model.ledger.events) == 1
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.epsilon() == model.epsilon() == prv.epsilon([(model.ledger.events[0][0], 11)], 1e-5)
    np.testing.assert_allclose(loaded.predict(X[:5], verbose=0), model.predict(X[:5], verbose=0), rtol=1e-5)


def test_the_ledger_may_be_on_disk_and_is_written_before_a_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, seen = DPParameters("global", 2.0, 1e-5), list[int]()
    model = DP_Sequential(body(), dp_parameters=parameters, dataset_metadata=metadata(), ledger=tmp_path / "ledger", debug=True)
    model.compile(loss=losses.DP_MulticlassHinge(), optimizer="sgd", metrics=["accuracy"], run_eagerly=True, steps_per_execution=2)
    privatize = dptrain_tf.backend.TensorFlowBackend.privatize

    def spy(self: Any, *args: Any) -> Any:
        seen.append(PrivacyLedger.read(tmp_path / "ledger").num_releases)
        return privatize(self, *args)

    monkeypatch.setattr(dptrain_tf.backend.TensorFlowBackend, "privatize", spy)
    history = model.fit(X, HOT, epochs=1, verbose=0).history
    assert seen == [1, 2, 3] and "accuracy" in history  # the latter because of debug
    model.ledger.close()
    again = DP_Sequential(body(), dp_parameters=parameters, dataset_metadata=metadata(), ledger=tmp_path / "ledger")
    assert again.ledger.num_releases == 3


def test_weights_that_a_callback_writes_are_certified_again() -> None:
    class Inflate(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch == 1:
                weight = self.model.layers[1].kernel
                weight.assign(weight * 50.0)

    model, norms = make(), list[float]()
    checks = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda b, logs: norms.append(np.linalg.norm(model.layers[1].kernel.numpy(), 2))
    )
    model.fit(X, Y, epochs=1, callbacks=[Inflate(), checks], verbose=0)
    assert max(norms) <= 1 + 1e-4
    assert max(model._session.in_force.info.certificates.values()) <= 1 + 1e-4


# --- noise and accounting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["local", "per-layer", "global"])
def test_joint_noise_multiplier(strategy: str) -> None:
    facts = make(strategy=strategy, sigma=4.0)._session.facts()
    stds = facts.mechanism.stds(facts.plan)
    groups = facts.plan.gradient_groups
    sigma = 4.0 if strategy == "global" else 4.0 / math.sqrt(len(groups))
    assert len(groups) == 3 and effective_noise_multiplier(facts.plan, stds) == pytest.approx(sigma)
    assert facts.event.noise_multiplier == event_noise_multiplier(effective_noise_multiplier(facts.plan, stds))
    if strategy == "global":
        assert len({round(std, 12) for std in stds.values()}) == 1
        assert stds[groups[0].name] == pytest.approx(4.0 * math.sqrt(sum(g.norm_bound**2 for g in groups)))
    else:
        assert all(stds[g.name] == pytest.approx(4.0 * g.norm_bound) for g in groups)


def test_nm_coef_is_a_factor_of_a_layers_noise() -> None:
    model = make(compiled=False)
    model.layers[1].nm_coef = 3.0
    model.compile(loss=losses.DP_MulticlassHinge(), optimizer="sgd")
    facts = model._session.facts()
    stds = facts.mechanism.stds(facts.plan)
    ratio = {g.name: stds[g.name] / g.norm_bound for g in facts.plan.gradient_groups}
    assert ratio.pop(model.layers[1].name) == pytest.approx(12.0) and list(ratio.values()) == pytest.approx([4.0, 4.0])
    assert effective_noise_multiplier(facts.plan, stds) == pytest.approx(4.0 / math.sqrt(2 + 1 / 9))


@pytest.mark.parametrize("clip", [None, "dynamic"])
def test_get_max_epochs_stays_within_the_budget(clip: str | None) -> None:
    model = make(*([L.DP_ClipGradient(None, mode="dynamic")] if clip else []))
    for budget in (0.1, 2.0, 6.0):
        epochs = get_max_epochs(budget, model, epochs_max=200)
        assert get_eps_delta(model, epochs)[0] <= budget < get_eps_delta(model, epochs + 1)[0] or epochs in (0, 200)
    assert get_max_epochs(6.0, model, epochs_max=None) == get_max_epochs(6.0, model) > get_max_epochs(2.0, model)
    assert get_max_epochs(6.0, model, epochs_max=2) == 2
    model._session.ledger.record(model._session.facts().event, 6)  # two epochs
    assert get_max_epochs(6.0, model) == get_max_epochs(6.0, make(), epochs_max=1000) - 2


def test_a_moving_clip_is_paid_from_the_same_multiplier() -> None:
    """The planner is asked before the callback exists, as in LipDP's experiments, and is right all the same (L14)."""
    model = make(L.DP_ClipGradient(None, mode="dynamic"))
    epochs, before = get_max_epochs(3.0, model), model._session.facts()
    adaptive = AdaptiveQuantileClipping(ds_train=None, patience=1, noise_multiplier=3.0, quantile=0.2, learning_rate=3.0)
    adaptive.set_model(model)
    said: list[Any] = []
    model.fit(X, Y, epochs=2, callbacks=[adaptive, DP_Accountant(said.append, verbose=False)], verbose=0)
    facts = model._session.facts()
    assert facts.event == before.event == model.ledger.events[0][0] and get_max_epochs(3.0, model) == epochs - 2
    clip = facts.strategy.loss_gradient_clip
    assert isinstance(clip, AdaptiveClip) and clip.initial == pytest.approx(math.sqrt(2)) and clip.learning_rate == pytest.approx(1.0)
    stds, count = facts.mechanism.stds(facts.plan), facts.plan.count
    assert count is not None and stds[count.name] / 0.5 >= 3.0  # the count has the noise it was given, and so has every layer
    assert all(stds[g.name] >= 4.0 * g.norm_bound for g in facts.plan.gradient_groups)
    assert said[0]["clipping_value"] < math.sqrt(2)
    scale = model._session.in_force.scale
    model.fit(X, Y, epochs=1, steps_per_epoch=1, verbose=0)
    assert 0.4 < model._session.in_force.scale / scale < 1.3  # it goes on from where it was


def test_a_smaller_clip_cuts_the_noise_in_proportion() -> None:
    bounds = [sum(compute_gradient_bounds(make(L.DP_ClipGradient(clip))).values()) for clip in (1.0, 0.25)]
    assert bounds[1] == pytest.approx(bounds[0] / 4)


# --- bounds -------------------------------------------------------------------------------------------------------------------


def residual_model() -> DP_Model:
    """Functional, with two kinds of branches."""
    inputs = keras.Input((4, WIDTH))
    x = L.DP_BoundedInput(upper_bound=2.0)(inputs)
    one, two = L.DP_WrappedResidual(L.DP_QuickSpectralDense(WIDTH))(L.DP_SplitResidual()(x))
    x = L.DP_MergeResidual("1-lip-add")([one, L.DP_GroupSort(2)(two)])
    x = keras.layers.Add()([L.DP_LayerCentering()(x), L.DP_QuickFrobeniusDense(WIDTH, use_bias=True)(x)])
    outputs = L.DP_SpectralDense(CLASSES)(L.DP_Flatten()(x))
    return DP_Model(inputs=inputs, outputs=outputs, dp_parameters=DPParameters("local", 3.0, 1e-5), dataset_metadata=metadata())


def listed_model() -> DP_Model:
    """A list of layers with LipDP's residual layers in it."""
    inner = [L.DP_Permute((2, 1)), L.DP_QuickSpectralDense(4), L.DP_GroupSort(2), L.DP_LayerCentering(), L.DP_Permute((2, 1))]
    split = [L.DP_SplitResidual(), L.DP_WrappedResidual(L.DP_SpectralDense(WIDTH)), L.DP_MergeResidual("add")]
    layers = [
        L.DP_BoundedInput(upper_bound=2.0),
        *L.make_residuals("1-lip-add", inner),
        *split,
        L.DP_Flatten(),
        L.DP_SpectralDense(CLASSES),
    ]
    facts = metadata(input_shape=(4, WIDTH))
    return DP_Model(layers, dp_parameters=DPParameters("per-layer", 3.0, 1e-5), dataset_metadata=facts, name="listed")


@pytest.mark.parametrize("build", [residual_model, listed_model])
def test_models_with_residuals(build: Callable[[], DP_Model], tmp_path: Path) -> None:
    model = build()
    model.build(input_shape=(None, 4, WIDTH))
    model.compile(loss=losses.DP_MulticlassHKR(alpha=5.0), optimizer=keras.optimizers.Adam(0.05))
    x = rng.standard_normal((N, 4, WIDTH)).astype(np.float32)
    model.fit(x, Y, epochs=1, verbose=0)
    assert within(dptrain_tf.check_bounds(model, model._session.loss.examples, 10 * x[:40], Y[:40]))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x[:4], verbose=0), model.predict(x[:4], verbose=0), rtol=1e-5, atol=1e-6)
    assert loaded.ledger.num_releases == 3


PATCHES = {"sizes": [1, 4, 4, 1], "strides": [1, 4, 4, 1], "rates": [1, 1, 1, 1], "padding": "VALID"}
IMAGE: dict[str, Callable[[], list[Any]]] = {
    "quick": lambda: [L.DP_QuickSpectralConv2D(4, 3, use_bias=True, orthogonal=False), L.DP_ScaledL2NormPooling2D(2, strides=2)],
    "same": lambda: [L.DP_SpectralConv2D(4, 3, strides=2), L.DP_AddBias(0.5), L.DP_ReLU(), L.DP_MaxPool2D(2)],
    "average": lambda: [L.DP_SpectralConv2D(4, 5, k_coef_lip=2.0), L.DP_LayerCentering(), L.DP_ScaledAveragePooling2D((2, 2))],
    "global": lambda: [L.DP_QuickSpectralConv2D(4, 3, eps_bjorck=None), L.DP_GroupSort(), L.DP_ScaledGlobalL2NormPooling2D()],
    "mixer": lambda: [
        L.DP_Lambda(tf.image.extract_patches, arguments=PATCHES),
        L.DP_Reshape((4, 32)), L.DP_QuickSpectralDense(4, kernel_initializer="identity"), L.DP_ScaledL2NormPooling1D(axis=1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGE)
def test_image_layers_are_within_their_bounds(name: str) -> None:
    layers = [L.DP_BoundedInput(input_shape=(8, 8, 2), upper_bound=3.0), *IMAGE[name](), L.DP_Flatten(), L.DP_QuickSpectralDense(CLASSES)]
    model = DP_Sequential(layers, dp_parameters=DPParameters("local", 1.0, 1e-5), dataset_metadata=metadata(input_shape=(8, 8, 2)))
    x = np.concatenate([rng.standard_normal((6, 8, 8, 2)), np.ones((1, 8, 8, 2))]).astype(np.float32)
    dptrain_tf.project(model, x)
    assert within(dptrain_tf.check_bounds(model, losses.DP_MulticlassKR().examples, x, np.arange(7) % CLASSES))
    copy = keras.Sequential.from_config(keras.Sequential(model.layers).get_config())  # every layer is rebuilt from its configuration
    assert [type(layer) for layer in copy.layers] == [type(layer) for layer in model.layers]
    assert [layer.get_config() for layer in copy.layers] == [layer.get_config() for layer in model.layers]


# --- losses -------------------------------------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[Callable[[], losses.DP_Loss], int]] = {
    "cce": (lambda: losses.DP_TauCategoricalCrossentropy(30.0), 4),
    "bce": (lambda: losses.DP_TauBCE(30.0), 1),
    "cosine": (lambda: losses.DP_KCosineSimilarity(0.5), 4),
    "hinge": (lambda: losses.DP_MulticlassHinge(2.0), 4),
    "kr": (lambda: losses.DP_MulticlassKR(), 4),
    "kr_priors": (lambda: losses.DP_MulticlassKR(priors=(0.1, 0.2, 0.3, 0.4)), 4),
    "hkr": (lambda: losses.DP_MulticlassHKR(alpha=3.0, min_margin=9.0), 4),
    "hkr_binary": (lambda: losses.DP_MulticlassHKR(alpha=3.0, min_margin=9.0, priors=(0.25, 0.75)), 1),
    "mae": (lambda: losses.DP_MeanAbsoluteError(), 4),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_their_true_constant(name: str) -> None:
    build, outputs = LOSSES[name]
    loss = build()
    widest = loss.get_L()
    loss.num_outputs = outputs
    assert loss.get_L() <= widest * (1 + 1e-12)
    y = np.arange(400) % max(2, outputs)
    z = tf.Variable(rng.standard_normal((400, outputs)).astype(np.float32) * np.logspace(-3, 0, 400, dtype=np.float32)[:, None])
    with tf.GradientTape() as tape:
        value = loss.call(tf.constant(y), z)
    norms = np.linalg.norm(tape.gradient(value, z).numpy(), axis=1)
    assert norms.max() <= loss.get_L() * (1 + 1e-5) and norms.max() > 0.7 * loss.get_L()
    if outputs > 1:  # one-hot targets, and a batch of unknown size
        hot = np.eye(outputs, dtype=np.float32)[y]
        graph = tf.function(loss.call, input_signature=[tf.TensorSpec([None, outputs]), tf.TensorSpec([None, outputs])])
        np.testing.assert_allclose(graph(hot, z), value, rtol=1e-5, atol=1e-6)
    again = type(loss).from_config(loss.get_config())
    np.testing.assert_allclose(again.call(tf.constant(y), z), value)


# --- data and augmentation ----------------------------------------------------------------------------------------------------


def test_pipeline_functions() -> None:
    clip, value = pipeline.bound_clip_value(2.0)
    unit, one = pipeline.bound_normalize()
    assert np.linalg.norm(clip(tf.constant([3.0, 4.0]), 0)[0]) == pytest.approx(value) and clip(tf.constant([0.3, 0.4]), 7)[1] == 7
    assert np.linalg.norm(unit(tf.constant([3.0, 4.0]), 0)[0]) == pytest.approx(one)
    deltas = {n: pipeline.default_delta_value(metadata(nb_samples_train=n)) for n in (999, 1000, 60000)}
    assert deltas == {999: 1e-3, 1000: 1e-4, 60000: 1e-5} and all(delta < 1 / n for n, delta in deltas.items())
    train, test, facts = pipeline.prepare_tabular_data(X, X[:10], Y % 2, Y[:10] % 2, 25, pipeline.bound_clip_value(1.0))
    assert (facts.nb_steps_per_epochs, facts.sample_rate, facts.nb_classes) == (4, 25 / N, 2)
    assert max(np.linalg.norm(x, axis=1).max() for x, _ in train) <= 1 + 1e-6 and len(list(test)) == 1


def test_tabular_data_with_one_logit_and_exact_metrics() -> None:
    train, test, facts = pipeline.prepare_tabular_data(X, X, Y % 2, Y % 2, 30, pipeline.bound_clip_value(1.0))
    layers = [L.DP_BoundedInput(input_shape=facts.input_shape, upper_bound=1.0), L.DP_QuickSpectralDense(1), L.DP_ClipGradient(0.5)]
    model = DP_Model(layers, dp_parameters=DPParameters("global", 1.0, 1e-5), dataset_metadata=facts)
    shifted = lipdp.CertifiableAUROC(0.1)
    model.compile(loss=losses.DP_TauBCE(10.0), optimizer="sgd", metrics=[lipdp.ScaledAUC(scale=10.0), shifted])
    seen: list[Any] = []
    average, each = lipdp.SignaltoNoiseAverage((X, Y % 2), seen.append), lipdp.SignaltoNoiseHistogram((X, Y % 2), seen.append)
    attack = lipdp.PrivacyMetrics((X, Y % 2, X, Y % 2), seen.append)
    history = model.fit(train, epochs=1, validation_data=test, callbacks=[average, each, attack], verbose=0).history
    scores = model.predict(X, verbose=0)[:, 0].astype(np.float64)
    assert history["val_auc"][-1] == pytest.approx(auroc(scores, Y % 2), abs=1e-6)
    assert history["val_certifiable_auroc"][-1] < history["val_auc"][-1]
    name = model.layers[2].name
    assert seen[0]["ratios_" + name] <= seen[1]["ratios_" + name].max() <= 1 + 1e-5
    attack.log_report()
    assert seen[-1] == {"mia_auc_entire_dataset": pytest.approx(0.5), "mia_adv_entire_dataset": pytest.approx(0.0)}


def test_copies_of_an_example_are_one_example() -> None:
    """A clip far below the loss's constant, and copies that all pull the same way: the worst case for their sum."""
    k, clip = 4, 0.25
    model = make(L.DP_ClipGradient(clip))
    dptrain_tf.project(model, X[:2])
    facts = model._session.facts()
    backend = FoldingBackend(Performance(), k)
    direction = rng.standard_normal(WIDTH).astype(np.float32)
    for x in (np.tile(direction, (2, k, 1)), rng.standard_normal((2, k, WIDTH)).astype(np.float32) * 10):
        for label in range(CLASSES):
            batch = Batch(tf.constant(x), tf.constant([label, 0], tf.int64), tf.constant([True, False]))
            sums = backend.bounded_sum(model, losses.DP_TauCategoricalCrossentropy(50.0).examples, batch, facts.plan)
            for name, value in sums.sums.items():
                bound = facts.plan.group_of(sums.identifiers[name].rsplit(".", 1)[0]).norm_bound
                assert np.linalg.norm(value) <= bound * (1 + 1e-5)
    single = Batch(tf.constant(x[:, :1]), tf.constant([1, 0], tf.int64), tf.constant([True, False]))
    loss = losses.DP_TauCategoricalCrossentropy(1.0).examples
    folded = FoldingBackend(Performance(), 1).bounded_sum(model, loss, single, facts.plan).sums
    plain = dptrain_tf.gradients.bounded_sum(model, loss, Batch(single.x[:, 0], single.y, single.mask), facts.plan).sums
    for name, value in plain.items():
        np.testing.assert_allclose(folded[name], value, rtol=1e-4, atol=1e-6)


def test_training_with_augmentation_multiplicity() -> None:
    train, test, facts = pipeline.load_and_prepare_images_data("mnist", 30, bound_fct=pipeline.bound_normalize(), multiplicity=3, limit=90)
    x, y = next(iter(train))
    assert x.shape == (90, 28, 28, 1) and y.shape == (90, 10) and facts.nb_samples_train == 90
    layers = [L.DP_BoundedInput(upper_bound=1.0), L.DP_Flatten(), L.DP_QuickSpectralDense(10)]
    model = DP_Sequential(layers, dp_parameters=DPParameters("local", 2.0, 1e-5), dataset_metadata=facts)
    model.compile(loss=losses.DP_TauCategoricalCrossentropy(5.0), optimizer="sgd", metrics=["accuracy"])
    history = model.fit(train, epochs=1, validation_data=test, verbose=0).history
    assert model.ledger.num_releases == 3 and np.isfinite(history["loss"]).all()
    source = pipeline._sources[train].x
    assert isinstance(source, pipeline.Copies)
    one, two = source[np.arange(2)], source[np.arange(2)]
    assert one.shape == (2, 3, 28, 28, 1) and not np.array_equal(one, two)
    inner = DP_Sequential(
        [L.DP_BoundedInput(upper_bound=1.0), L.DP_Flatten(), L.DP_SpectralDense(8), L.DP_ClipGradient(0.1), L.DP_SpectralDense(10)],
        dp_parameters=DPParameters("local", 2.0, 1e-5), dataset_metadata=facts,
    )  # fmt: skip
    inner.compile(loss=losses.DP_TauCategoricalCrossentropy(5.0), optimizer="sgd")
    with pytest.raises(UnsupportedModelError, match="each copy"):
        inner.fit(train, verbose=0)


def jittered(x: Any) -> Any:
    """Another value in every pass; TensorFlow's own numbers would repeat where some test has set its global seed."""
    moved = tf.numpy_function(lambda v: (v + np.random.default_rng().standard_normal(v.shape)).astype(v.dtype), [x], x.dtype)
    return tf.ensure_shape(moved, x.shape)


DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "infinite": (lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(40).repeat(), "infinite"),
    "remainder dropped": (lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(50, drop_remainder=True), "drop_remainder=False"),
    "too long": (lambda: tf.data.Dataset.from_tensor_slices((X, Y)).repeat(3).batch(40), "nb_samples_train"),
    "random": (
        lambda: tf.data.Dataset.from_tensor_slices((X, Y)).map(lambda x, y: (jittered(x), y)).batch(40),
        "at random",
    ),
    "not batched": (lambda: tf.data.Dataset.from_tensor_slices((X, Y)), "batch"),
    "weighted": (lambda: tf.data.Dataset.from_tensor_slices((X, Y, Y)).batch(40), "pairs"),
    "generator": (lambda: iter([(X, Y)]), "generator"),
    "labels": (lambda: tf.data.Dataset.from_tensor_slices((X, Y + 1)).batch(40), "labels"),
    "smoothed": (lambda: tf.data.Dataset.from_tensor_slices((X, HOT * 0.9 + 0.03)).batch(40), "one-hot"),
    "not a number": (lambda: tf.data.Dataset.from_tensor_slices((np.where(X > 2, np.nan, X), Y)).batch(40), "NaN"),
}


def test_data_that_cannot_be_sampled_are_refused() -> None:
    model = make()
    for build, words in DATA.values():
        with pytest.raises(DataError, match=words):
            model.fit(build(), verbose=0)
    assert model.ledger.num_releases == 0


# --- refusals -----------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "strategy": (lambda: DPParameters("sideways", 1.0, 1e-5), "noisify_strategy"),
    "no noise": (lambda: DPParameters("local", 0.0, 1e-5), "noise_multiplier"),
    "delta": (lambda: DPParameters("local", 1.0, 1.0), "delta"),
    "activation": (lambda: L.DP_SpectralDense(3, activation="relu"), "activation"),
    "channels first": (lambda: L.DP_QuickSpectralConv2D(3, 3, data_format="channels_first"), "data_format"),
    "power iteration": (lambda: L.DP_SpectralDense(3, maxiter_spectral=3), "certified"),
    "input not enforced": (lambda: L.DP_BoundedInput(upper_bound=1.0, enforce_clipping=False), "enforce_clipping"),
    "group sort scaled": (lambda: L.DP_GroupSort(2, k_coef_lip=2.0), "Rescaling"),
    "pool strides": (lambda: L.DP_ScaledL2NormPooling2D(2, strides=1), "disjoint"),
    "pool over channels": (lambda: L.DP_ScaledL2NormPooling1D(), "DP_Permute"),
    "centering scale": (lambda: L.DP_LayerCentering(scale=True), "Lipschitz"),
    "lambda": (lambda: L.DP_Lambda(tf.sin), "extract_patches"),
    "overlapping patches": (lambda: L.DP_Lambda(tf.image.extract_patches, arguments={"sizes": [1, 2, 2, 1]}), "disjoint"),
    "clip mode": (lambda: L.DP_ClipGradient(1.0, mode="dynamic_svt"), "private quantile"),
    "no clip value": (lambda: L.DP_ClipGradient(None), "clip_value"),
    "nm_coef": (lambda: L.DP_SpectralDense(3, nm_coef=0.0), "nm_coef"),
    "gnp": (lambda: L.DP_GNP_Factory(keras.layers.Softmax), "trust"),
    "residual": (lambda: L.make_residuals("mean", []), "1-lip-add"),
    "open residual": (lambda: DP_Sequential([L.DP_SplitResidual()], dp_parameters=None, dataset_metadata=None), "DP_MergeResidual"),  # type: ignore[arg-type]
    "laplace": (lambda: LaplaceAdaptiveLossGradientClipping(None, patience=1, epsilon=1.0), "AdaptiveQuantileClipping"),
    "sum": (lambda: losses.DP_TauBCE(1.0, reduction="sum"), "reduction"),
    "batch counts": (lambda: losses.DP_MulticlassKR(priors="batch"), "couple"),  # type: ignore[arg-type]
    "multi gpu": (lambda: losses.DP_MulticlassHKR(multi_gpu=True), "multi_gpu"),
    "tau": (lambda: losses.DP_TauBCE(-1.0), "greater than 0"),
    "other loss": (lambda: make(compiled=False).compile(loss="mse"), "Lipschitz"),
    "loss weights": (lambda: make(compiled=False).compile(loss=losses.DP_MulticlassKR(), loss_weights=[2.0]), "loss_weights"),
    "priors": (lambda: make(compiled=False).compile(loss=losses.DP_MulticlassKR(priors=(0.5, 0.5))), "priors"),
    "not compiled": (lambda: get_eps_delta(make(compiled=False), 1), "compile"),
    "class weights": (lambda: make().fit(X, Y, class_weight={0: 2.0}), "class_weight"),
    "validation split": (lambda: make().fit(X, Y, validation_split=0.1), "validation_split"),
    "batch size": (lambda: make().fit(X, Y, batch_size=7), "batch_size"),
    "own batch": (lambda: make().train_on_batch(X, Y), "Poisson|accounted"),
    "unsafe search": (lambda: get_max_epochs(1.0, make(), safe=False), "safe"),
    "adaptive without clip": (lambda: fit_adaptive(make()), "dynamic"),
    "adaptive with fixed clip": (lambda: fit_adaptive(make(L.DP_ClipGradient(1.0))), "dynamic"),
    "dynamic inside": (lambda: get_eps_delta(make(L.DP_ClipGradient(None, mode="dynamic"), L.DP_ReLU()), 1), "last layer"),
    "unknown layer": (lambda: get_eps_delta(make(keras.layers.Dense(CLASSES)), 1), "SpectralDense"),
    "standardize": (lambda: pipeline.load_adbench_data("x", ".", standardize=True), "public"),
    "table without bound": (lambda: pipeline.prepare_tabular_data(X, X, Y, Y, 10), "bound_fct"),
    "colours": (lambda: pipeline.get_colorspace_function("XYZ"), "RGB"),
    "wandb": (lambda: DP_Accountant("wandb.log"), "wandb"),
}


def fit_adaptive(model: Any) -> None:
    """Fit with a moving clip."""
    model.fit(X, Y, callbacks=[AdaptiveQuantileClipping(noise_multiplier=9.0, quantile=0.5)], verbose=0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_unsound_is_refused(name: str) -> None:
    if name == "wandb" and __import__("importlib.util").util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    build, words = REFUSED[name]
    with pytest.raises((ConfigError, DataError, UnsupportedModelError), match=words):
        build()


def test_a_schedule_is_refused_before_anything_is_spent() -> None:
    model = make(compiled=False)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    model.compile(loss=losses.DP_MulticlassHinge(), optimizer=keras.optimizers.SGD(schedule))
    with pytest.raises(ConfigError, match="LearningRateScheduler"):
        model.fit(X, Y, verbose=0)
    assert model.ledger.num_releases == 0
