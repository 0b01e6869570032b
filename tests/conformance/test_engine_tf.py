"""``make_private``: Keras' own compile and fit, checked against a loop over examples, and everything that must be refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import dptrain
from accounting import AccountingError, NeighboringRelation, PrivacyLedger, get_accountant
from dptrain.adaptive import AdaptiveClip
from dptrain.errors import ConfigError, DataError, UnsupportedModelError
from dptrain.randomness import NOISE, SAMPLING, RandomKey, StepNoise
from dptrain.sampling import PoissonSampler
from dptrain_tf import PrivacyCallback, make_private
from dptrain_tf.fitting import data as reading
from dptrain_tf.fitting.losses import ExampleLoss
from dptrain_tf.lipdp import losses as lipdp_losses
from dptrain_tf.lipschitz import BoundedInput, GroupSort, SpectralDense

DOC = Path(__file__).parents[2] / "docs" / "keras.md"
L: Any = keras.layers
N, WIDTH, CLASSES, BATCH, SEED = 30, 5, 3, 10, 7
rng = np.random.default_rng(1)
X = rng.standard_normal((N, WIDTH))
Y = rng.integers(0, CLASSES, N)
IMAGES = rng.standard_normal((N, 6, 6, 2))
IDS = rng.integers(1, 9, (N, 4))
IDS[::3, 2:] = 0  # padding


@pytest.fixture(autouse=True)
def _start() -> Any:
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(policy)


def private(model: Any, sigma: float = 0.5, seed: int | None = SEED, **settings: Any) -> Any:
    """With noise that the oracle knows."""
    promise = dptrain.Privacy(noise_multiplier=sigma, unsafe_seed=seed)
    return make_private(model, privacy=promise, expected_batch_size=BATCH, **{"max_grad_norm": 0.3, **settings})


def small(*layers: Any, shape: Any = (WIDTH,)) -> Any:
    """A sequential model."""
    return keras.Sequential([keras.Input(shape), *layers])


def mlp() -> Any:
    return small(L.Dense(4, activation="tanh"), L.Dense(CLASSES))


def cross_entropy(**settings: Any) -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **{"dtype": "float64", **settings})


def ready(model: Any, **settings: Any) -> Any:
    """A private model, compiled; eager, which is faster where there are few steps."""
    model = private(model, **settings)
    model.compile(keras.optimizers.SGD(0.125), cross_entropy(), metrics=["accuracy"], run_eagerly=True)
    return model


# --- exact -----------------------------------------------------------------------------------------------------------------


def expected_weights(
    model: Any, loss: Callable[[Any, Any], Any], x: Any, y: Any, steps: int, clip: float = 0.3, sigma: float = 0.5, rate: float = 0.125
) -> list[np.ndarray]:
    """SGD by a loop over examples, with the sample and the noise that the seed stands for; the model's weights are moved."""
    sampler, key = PoissonSampler(N, BATCH / N, RandomKey.make(SAMPLING, SEED)), RandomKey.make(NOISE, SEED)
    variables = model.trainable_variables
    for step in range(steps):
        total = [np.zeros(v.shape) for v in variables]
        for i in sampler.sample(step):
            one = [reading.structure(part, lambda a, i=i: tf.constant(a[i : i + 1])) for part in (x, y)]
            with tf.GradientTape() as tape:
                value = loss(one[1], model(one[0], training=True))
            gradients = [
                tf.convert_to_tensor(g).numpy() for g in tape.gradient(value, [v.value for v in variables], unconnected_gradients="zero")
            ]
            factor = min(1.0, clip / np.sqrt(sum((g**2).sum() for g in gradients)))
            total = [t + factor * g for t, g in zip(total, gradients, strict=True)]
        for stream, (v, t) in enumerate(zip(variables, total, strict=True)):
            noise = StepNoise(key, step).normal(stream, tuple(v.shape), np.float64)
            v.assign(v.numpy() - rate * (t + sigma * clip * noise) / BATCH)
    return [v.numpy() for v in variables]


class Own(keras.Model):
    """A subclassed model: two inputs, a layer called twice, no training argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = L.Dense(WIDTH, activation="tanh"), L.Dense(CLASSES)

    def call(self, inputs: Any) -> Any:
        return self.head(self.first(self.first(inputs["a"])) + inputs["b"])


def two_heads() -> Any:
    a, b = keras.Input((WIDTH,), name="a"), keras.Input((WIDTH,), name="b")
    hidden = L.Dense(4, activation="tanh")(L.Concatenate()([a, b]))
    return keras.Model([a, b], [L.Dense(CLASSES, name="kind")(hidden), L.Dense(1, name="size")(hidden)])


def ce(y: Any, z: Any) -> Any:
    return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(y, tf.int64), z))


def huber_of_own(y: Any, z: Any) -> Any:
    """A loss of the user's own, with values ``[B, K]``."""
    return tf.math.log(tf.math.cosh(z - tf.one_hot(tf.cast(y, tf.int32), CLASSES, dtype=z.dtype)))


def tokens() -> Any:
    return small(L.Embedding(9, 3, mask_zero=True), L.Dense(CLASSES), shape=(4,))


def masked_mean(y: Any, z: Any) -> Any:
    """Of one example: over its own tokens."""
    values = tf.nn.sparse_softmax_cross_entropy_with_logits(y, z)
    seen = tf.cast(tf.not_equal(y, CLASSES - 1), values.dtype)
    return tf.reduce_sum(values * seen) / tf.reduce_sum(seen)


LABELS = np.where(IDS == 0, CLASSES - 1, IDS % (CLASSES - 1))  # the last class stands where there is padding, and nowhere else
SIZES = rng.standard_normal((N, 1))
WEIGHTS = rng.uniform(0.2, 3.0, N)


CASES: dict[str, tuple[Callable[[], Any], Any, Any, Any, Callable[[Any, Any], Any], dict[str, Any]]] = {
    # name: model, compile's losses, x, y, the loss of one example, arguments of fit
    "sequential": (mlp, cross_entropy(), X, Y, ce, {}),
    "sum": (mlp, cross_entropy(reduction="sum"), X, Y, ce, {}),
    "images": (
        lambda: small(L.Conv2D(3, 3, activation="tanh"), L.GroupNormalization(3), L.Flatten(), L.Dense(CLASSES), shape=(6, 6, 2)),
        cross_entropy(), IMAGES, Y, ce, {},
    ),
    "subclassed": (Own, cross_entropy(), {"a": X, "b": X[::-1].copy()}, Y, ce, {}),
    "two_heads": (
        two_heads, ({"kind": cross_entropy(), "size": keras.losses.MeanSquaredError(dtype="float64")}, {"kind": 1.0, "size": 0.5}),
        [X, X[::-1].copy()], {"kind": Y, "size": SIZES},
        lambda y, z: ce(y["kind"], z[0]) + 0.5 * tf.reduce_sum((z[1] - y["size"]) ** 2), {},
    ),
    "masked": (tokens, cross_entropy(), IDS, LABELS, masked_mean, {}),
    "sample_weight": (
        mlp, cross_entropy(), X, np.stack([Y, WEIGHTS], 1), lambda y, z: y[0, 1] * ce(y[:, 0], z), {"sample_weight": WEIGHTS},
    ),
    "class_weight": (
        mlp, cross_entropy(), X, Y, lambda y, z: (4.0 if int(y[0]) == 1 else 1.0) * ce(y, z), {"class_weight": {1: 4.0}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_a_loop_over_examples(name: str) -> None:
    build, loss, x, y, one, extra = CASES[name]
    model = build()
    first = reading.structure(x, lambda a: a[:2])
    model(first if isinstance(first, dict) or not isinstance(first, tuple) else list(first))
    start = model.get_weights()
    expected = expected_weights(model, one, x if not isinstance(x, list) else tuple(x), y, 5)
    model.set_weights(start)
    strategy = {"sequential": "ghost", "images": "per_sample"}.get(name, "mixed_ghost")
    private(model, strategy=strategy, physical_batch_size=4)
    losses, loss_weights = loss if isinstance(loss, tuple) else (loss, None)
    traced = name in ("sequential", "images")
    model.compile(keras.optimizers.SGD(0.125), losses, loss_weights, run_eagerly=not traced)
    model.fit(x, y[:, 0].astype(int) if name == "sample_weight" else y, epochs=2, steps_per_epoch=2, verbose=0, **extra)
    model.fit(x, y[:, 0].astype(int) if name == "sample_weight" else y, steps_per_epoch=1, verbose=0, **extra)
    for found, wanted, before in zip(model.trainable_variables, expected, start, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-12)
        assert np.abs(wanted - before).max() > 1e-3
    assert model.privacy.ledger.num_releases == 5 and int(model.optimizer.iterations) == 5
    assert not traced or model.privacy.traces == 1  # in each call of fit, whatever the sizes of the batches


def test_values_of_an_example_are_averaged_over_its_own_places() -> None:
    """Neither a mask nor an ignored class of one example may change the scale of another's loss (pitfalls.md G7, G27)."""
    z, y = tf.constant(rng.standard_normal((2, 4, CLASSES))), np.array([[0, 1, 2, 1], [2, 2, 2, 0]])
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(y, z).numpy()
    plain = ExampleLoss(cross_entropy(), dtype="float64")(y, z).numpy()
    np.testing.assert_allclose(plain, each.mean(axis=1))
    ignoring = ExampleLoss(cross_entropy(ignore_class=2), dtype="float64")(y, z).numpy()
    np.testing.assert_allclose(ignoring, [each[0, [0, 1, 3]].mean(), each[1, 3]])
    z._keras_mask = tf.constant([[True, True, False, False], [False] * 4])
    masked = ExampleLoss(cross_entropy(), dtype="float64")(y, z).numpy()
    np.testing.assert_allclose(masked, [each[0, :2].mean(), 0.0])

    class Own(keras.losses.Loss):
        scale = 1.0

        def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            return self.scale * tf.nn.sparse_softmax_cross_entropy_with_logits(y_true, y_pred)

    own = Own(reduction="sum")
    own.scale = 2.0  # state that no get_config knows
    del z._keras_mask
    np.testing.assert_allclose(ExampleLoss(own, dtype="float64")(y, z).numpy(), 2 * each.sum(axis=1))
    assert own.reduction == "sum"


# --- Keras' loop, the ledger and the budget ----------------------------------------------------------------------------------


class Watch(keras.callbacks.Callback):
    """Releases in the ledger after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.releases: list[int] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.releases.append(self.model.privacy.ledger.num_releases)


def budgeted(model: Any, epsilon: float = 3.0, eager: bool = True, **settings: Any) -> Any:
    """Noise calibrated to a target."""
    promise = dptrain.Privacy(target_epsilon=epsilon, accountant="rdp")
    make_private(model, privacy=promise, **{"expected_batch_size": BATCH, "epochs": 2, **settings})
    model.compile(keras.optimizers.Adam(0.01), cross_entropy(), metrics=["accuracy"], run_eagerly=eager)
    return model


def test_fit_is_keras_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, watch = budgeted(mlp(), eager=False, sample_size=N), Watch()
    sigma = model.privacy.noise_multiplier
    keep = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="val_loss", save_best_only=True)
    stop = keras.callbacks.EarlyStopping("val_accuracy", patience=5)
    rate = keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 / (epoch + 1))
    done = model.fit(X, Y, BATCH, 2, 0, [watch, keep, stop, rate, PrivacyCallback()], validation_data=(X, Y))
    assert watch.releases == [1, 2, 3, 4, 5, 6] and model.privacy.traces == 1
    assert set(done.history) == {"loss", "val_loss", "val_accuracy", "epsilon", "learning_rate"}
    assert done.history["learning_rate"] == pytest.approx([0.01, 0.005])
    rdp = get_accountant("rdp", NeighboringRelation.add_remove)
    assert done.history["epsilon"][-1] == model.privacy.epsilon() == rdp.epsilon(model.privacy.ledger.events, 1e-5) <= 3.0
    assert model.privacy.epsilon() > 2.99 and model.privacy.epsilon(1e-3) < 2.5 and done.history["epsilon"][0] < 3.0
    assert model.privacy.noise_multiplier == sigma and model.privacy.sample_rate == BATCH / N and model.privacy.steps_left == 0
    said = capsys.readouterr().out
    for word in ("epsilon = 2.99", "delta = 1e-05", "add_remove", "Poisson", "rdp", "6 releases"):
        assert word in said
    loaded = keras.models.load_model(tmp_path / "best.keras")
    assert type(loaded) is keras.Sequential and not hasattr(loaded, "privacy")
    assert len(model.evaluate(X, Y, verbose=0)) == 2 and model.predict(X, verbose=0).shape == (N, CLASSES)
    model.save_weights(tmp_path / "some.weights.h5")
    other = mlp()
    other.load_weights(tmp_path / "some.weights.h5")
    np.testing.assert_array_equal(other.predict(X, verbose=0), model.predict(X, verbose=0))


@keras.saving.register_keras_serializable("dptrain_tests")
class Saved(keras.Model):
    """A subclassed model that can be saved."""

    def __init__(self, width: int = 4, **settings: Any) -> None:
        super().__init__(**settings)
        self.width, self.hidden, self.head = width, L.Dense(width, activation="tanh"), L.Dense(CLASSES)

    def call(self, x: Any) -> Any:
        return self.head(self.hidden(x))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


def test_a_subclassed_model_is_saved_as_what_it_was(tmp_path: Path) -> None:
    model = Saved(5)
    model(X[:2])
    budgeted(model, sample_size=N).fit(X, Y, BATCH, 1, 0)
    model.save(tmp_path / "saved.keras")
    loaded = keras.models.load_model(tmp_path / "saved.keras")
    assert type(loaded) is Saved and loaded.width == 5 and not hasattr(loaded, "privacy")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_training_stops_before_the_budget_is_passed(caplog: pytest.LogCaptureFixture) -> None:
    model = budgeted(mlp())
    first = model.fit(X, Y, epochs=1, verbose=0)
    assert set(first.history) == {"loss"} and model.privacy.steps_left == 3 and not caplog.records
    history = model.fit(X, Y, epochs=9, verbose=0).history
    assert len(history["loss"]) == 1 and model.privacy.ledger.num_releases == 6
    assert "stops after step 6" in caplog.text and "the planned budget" in caplog.text and "epsilon = 2.99" in caplog.text
    before = model.get_weights()
    with pytest.raises(AccountingError, match=r"6 planned steps are used up.*Nothing was trained"):
        model.fit(X, Y, verbose=0)

    class Unstoppable(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = False

    stubborn = budgeted(mlp())
    stubborn.fit(X, Y, epochs=4, verbose=0, callbacks=[Unstoppable()])
    assert stubborn.privacy.ledger.num_releases == 6 and all(map(np.array_equal, before, model.get_weights()))


def test_what_make_private_was_not_told_comes_from_the_first_fit() -> None:
    for data, batch, more in (((X, Y), 15, {"batch_size": 15}), ((pairs().batch(6), None), 6, {})):
        model = make_private(mlp(), privacy=dptrain.Privacy(target_epsilon=3.0, accountant="rdp"))
        model.compile("adam", cross_entropy(), run_eagerly=True)
        model.fit(*data, epochs=2, verbose=0, **more)
        assert model.privacy.ledger.num_releases == 2 * N // batch and 2.99 < model.privacy.epsilon() <= 3.0
        assert model.privacy.sample_rate == batch / N and "adam" in str(type(model.optimizer)).lower()
        with pytest.raises(AccountingError, match="planned steps are used up"):
            model.fit(*data, verbose=0)


def test_a_callback_may_set_a_lower_budget(caplog: pytest.LogCaptureFixture) -> None:
    model = ready(mlp(), sigma=2.0)
    history = model.fit(X, Y, epochs=9, verbose=0, callbacks=[PrivacyCallback(max_epsilon=3.0, verbose=False)]).history
    spent, event = model.privacy.epsilon(), model.privacy.ledger.events[0][0]
    prv = get_accountant("prv", NeighboringRelation.add_remove)
    assert spent <= 3.0 < prv.epsilon([(event, model.privacy.ledger.num_releases + 1)], 1e-5)
    assert "epsilon 3 of PrivacyCallback" in caplog.text and history["epsilon"][-1] == spent
    with pytest.raises(AccountingError, match="above max_epsilon 3; nothing was trained"):
        model.fit(X, Y, verbose=0, callbacks=[PrivacyCallback(max_epsilon=3.0)])
    other = mlp()
    other.compile("sgd", "mse")
    with pytest.raises(ConfigError, match="needs a model of make_private"):
        other.fit(X, np.zeros((N, 3)), verbose=0, callbacks=[PrivacyCallback()])


def test_a_ledger_file_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    model = budgeted(mlp(), ledger=path)
    model.fit(X, Y, verbose=0)
    assert PrivacyLedger.read(path).num_releases == 3
    plain, spent = model.privacy, model.privacy.epsilon()
    assert plain.detach() is model and plain.epsilon() == spent and not hasattr(model, "privacy")
    model.fit(X, Y, verbose=0)  # Keras' own now, and not private
    assert plain.ledger.num_releases == 3
    again = budgeted(mlp(), ledger=path)
    assert again.privacy.epsilon() == spent and "the ledger holds" in again.privacy.statement()
    again.fit(X, Y, epochs=2, verbose=0)
    assert again.privacy.ledger.num_releases == 9 and 2.99 < again.privacy.epsilon() <= 3.0
    assert again.privacy.noise_multiplier > plain.noise_multiplier
    with pytest.raises(AccountingError, match="the history alone has epsilon"):
        budgeted(mlp(), 1.0, ledger=again.privacy.ledger, sample_size=N)


def test_releases_of_others_in_the_ledger_are_seen() -> None:
    ledger = PrivacyLedger()
    one, two = budgeted(mlp(), ledger=ledger, sample_size=N), budgeted(mlp(), ledger=ledger, sample_size=N)
    one.fit(X, Y, epochs=2, verbose=0)
    with pytest.raises(AccountingError, match="the ledger has grown since"):
        two.fit(X, Y, verbose=0)
    assert ledger.num_releases == 6


def test_a_release_is_recorded_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(mlp(), ledger=tmp_path / "ledger.jsonl")
    model.fit(X, Y, steps_per_epoch=1, verbose=0)
    before = model.get_weights()

    def fails(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("accounting.ledger.os.write", fails)
    with pytest.raises(dptrain.errors.LedgerError):
        model.fit(X, Y, steps_per_epoch=1, verbose=0)
    assert model.privacy.ledger.num_releases == 2 and all(map(np.array_equal, before, model.get_weights()))


def test_an_empty_batch_releases_noise() -> None:
    model = mlp()
    make_private(model, privacy=dptrain.Privacy(noise_multiplier=1.0), sample_rate=1e-9, max_grad_norm=0.3)
    model.compile(keras.optimizers.SGD(1e-9), cross_entropy(), metrics=["accuracy"], run_eagerly=True)
    before = model.get_weights()
    model.fit(X, Y, steps_per_epoch=2, verbose=0)
    assert model.privacy.ledger.num_releases == 2
    moved = np.concatenate([np.ravel(a - b) for a, b in zip(model.get_weights(), before, strict=True)])
    assert 0.5 < moved.std() / (0.3 * np.sqrt(2) * 1e-9 / (1e-9 * N)) < 1.6  # two draws, over q N


WAYS_OF_KERAS = ("steps_per_execution", "run_eagerly", "jit_compile")


def run(how: str, rate: float) -> list[np.ndarray]:
    """Weights after six steps, with dropout of some rate."""
    keras.utils.set_random_seed(0)
    model, watch = small(L.Dense(4, activation="tanh"), L.Dropout(rate, seed=3), L.Dense(CLASSES)), Watch()
    gradients: Any = "two_pass" if how == "two_pass" else "book_keeping"
    private(model, physical_batch_size=4, gradients=gradients, debug=how == "debug")
    extra = {how: 2 if how == "steps_per_execution" else True} if how in WAYS_OF_KERAS else {}
    model.compile(keras.optimizers.SGD(0.125), cross_entropy(), metrics=["accuracy"], **extra)
    done = model.fit(X, Y, epochs=2, steps_per_epoch=3, verbose=0, callbacks=[watch])
    assert watch.releases == ([2, 3, 5, 6] if how == "steps_per_execution" else [1, 2, 3, 4, 5, 6])
    assert ("accuracy" in done.history) == (how == "debug")
    return list(model.get_weights())


@pytest.mark.parametrize("hows", [("plain", *WAYS_OF_KERAS[:2], "two_pass", "debug"), ("run_eagerly", "jit_compile")])
def test_ways_to_run_agree(hows: tuple[str, ...]) -> None:
    rate = 0.0 if "jit_compile" in hows else 0.5  # XLA's random numbers are others
    first, *others = [run(how, rate) for how in hows]
    for other in others:
        for plain, found in zip(first, other, strict=True):
            np.testing.assert_allclose(found, plain, rtol=1e-9, atol=1e-12)


# --- settings that change between calls ------------------------------------------------------------------------------------------


def test_frozen_layers_stay_and_a_change_makes_a_new_plan() -> None:
    model = mlp()
    model.layers[0].trainable = False
    ready(model)
    frozen = model.layers[0].get_weights()
    assert len(model.privacy.plan.layers) == 1
    model.fit(X, Y, verbose=0)
    assert all(map(np.array_equal, frozen, model.layers[0].get_weights()))
    model.layers[0].trainable = True
    with pytest.raises(ConfigError, match="compile again with a new optimizer"):
        model.fit(X, Y, verbose=0)
    model.compile(keras.optimizers.SGD(0.125), cross_entropy(), run_eagerly=True)
    model.fit(X, Y, verbose=0)
    assert len(model.privacy.plan.layers) == 2 and not np.array_equal(frozen[0], model.layers[0].get_weights()[0])
    model.layers[0].trainable = False
    kept = model.layers[0].get_weights()
    model.fit(X, Y, verbose=0)
    assert all(map(np.array_equal, kept, model.layers[0].get_weights())) and len(model.privacy.ledger.events) == 1

    class Thaw(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.model.layers[0].trainable = True

    with pytest.raises(ConfigError, match="trainable flag was changed while fit was running"):
        model.fit(X, Y, verbose=0, callbacks=[Thaw()])


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
    "adamw_ema": lambda: keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.9),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5),
    "accumulation": lambda: keras.optimizers.Lion(0.01, gradient_accumulation_steps=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_is_post_processing(name: str) -> None:
    keras.utils.set_random_seed(0)  # Lion moves by signs: a small bias may return to where it was
    model = private(mlp())
    model.compile(OPTIMIZERS[name](), cross_entropy(), run_eagerly=True)
    before = model.get_weights()
    model.fit(X, Y, verbose=0, steps_per_epoch=4)
    assert int(model.optimizer.iterations) == (2 if name == "accumulation" else 4) and model.privacy.ledger.num_releases == 4
    assert all(np.isfinite(v.numpy()).all() and not np.array_equal(v, b) for v, b in zip(model.trainable_variables, before, strict=True))
    if name == "schedule":
        assert float(model.optimizer.learning_rate) == pytest.approx(0.1 * 0.5**2)


# --- data ------------------------------------------------------------------------------------------------------------------------


def pairs(x: Any = X, y: Any = Y) -> Any:
    return tf.data.Dataset.from_tensor_slices((x, y))


def test_a_data_set_gives_the_same_training_as_its_arrays() -> None:
    weights = []
    for data in ((X, Y), (pairs().batch(7).prefetch(1), None), (tf.constant(X), tf.constant(Y))):
        keras.utils.set_random_seed(0)
        model = ready(mlp())
        model.fit(*data, verbose=0, steps_per_epoch=2)
        weights.append(model.get_weights())
    for found in weights[1:]:
        assert all(map(np.array_equal, weights[0], found))
    model.fit(pairs().shuffle(N).batch(7), verbose=0, steps_per_epoch=1)  # another order on each pass
    triples = tf.data.Dataset.from_tensor_slices(({"a": X, "b": X}, Y, WEIGHTS)).batch(8)
    assert reading.load(triples, None).weight.shape == (N,) and set(reading.load(triples, None).x) == {"a", "b"}


def test_validation_split_takes_its_examples_away_first() -> None:
    model = ready(mlp())
    seen: list[Any] = []
    look = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: seen.append(model.privacy.step.x))
    history = model.fit(X, Y, validation_split=0.4, verbose=0, callbacks=[look]).history
    assert model.privacy.sample_rate == BATCH / 18 and set(history) == {"loss", "val_loss", "val_accuracy"}
    np.testing.assert_allclose(history["val_loss"][-1], model.evaluate(X[18:], Y[18:], verbose=0)[0], rtol=1e-6)
    np.testing.assert_array_equal(seen[0], X[:18])
    with pytest.raises(DataError, match="hold 30 examples, and the noise was calibrated for 18"):
        model.fit(X, Y, verbose=0)


def bad(**changes: Any) -> dict[str, Any]:
    """Arguments of fit."""
    return {"x": X, "y": Y, "verbose": 0, **changes}


NAN = X.copy()
NAN[3, 1] = np.nan
noisy = pairs().map(lambda x, y: (x + tf.random.normal([WIDTH], dtype=x.dtype), y)).batch(10)

BAD_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "infinite": (bad(x=pairs().repeat().batch(5), y=None), "infinite"),
    "repeated": (bad(x=pairs().repeat(2).batch(5), y=None), "repeats its examples"),
    "unknown": (bad(x=pairs().filter(lambda x, y: y > 0).batch(5), y=None), "size of the training data set is unknown"),
    "unbatched": (bad(x=pairs(), y=None), "not batched"),
    "random": (bad(x=noisy, y=None), "augmented at random"),
    "no_targets": (bad(x=tf.data.Dataset.from_tensor_slices(X).batch(5), y=None), "pairs"),
    "targets_twice": (bad(x=pairs().batch(5)), "belong into the data set"),
    "generator": (bad(x=(x for x in X), y=None), "no targets"),
    "generator_and_y": (bad(x=iter(X)), "which a generator cannot serve"),
    "y_missing": (bad(y=None), "no targets"),
    "lengths": (bad(y=Y[:-1]), "different numbers of examples"),
    "strings": (bad(x=np.array(["a"] * N)), "give numbers"),
    "nan": (bad(x=NAN), "x holds 1 values that are not finite"),
    "label": (bad(y=Y + 1), "whole numbers from 0 to 2"),
    "fraction": (bad(y=Y + 0.5), "whole numbers from 0 to 2"),
    "batch_size": (bad(batch_size=32), "batch_size 32 is not the expected batch size 10"),
    "weight_shape": (bad(sample_weight=np.ones((N, 2))), "one number per example"),
    "both_weights": (bad(sample_weight=WEIGHTS, class_weight={0: 2.0}), "give one"),
    "split_of_data_set": (bad(x=pairs().batch(5), y=None, validation_split=0.2), "needs arrays"),
    "split_of_all": (bad(validation_split=0.999), "leaves no example"),
}  # fmt: skip


@pytest.fixture(scope="module")
def one_model() -> Any:
    policy = keras.config.dtype_policy()  # this comes before the fixture that every test has
    keras.config.set_dtype_policy("float64")
    model = mlp()
    keras.config.set_dtype_policy(policy)
    make_private(model, privacy=dptrain.Privacy(noise_multiplier=1.0), expected_batch_size=BATCH)
    model.compile("sgd", cross_entropy())
    return model


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_cannot_be_sampled_from_are_refused(one_model: Any, name: str) -> None:
    arguments, sentence = BAD_DATA[name]
    assert not one_model.privacy.ledger.num_releases
    with pytest.raises((DataError, ConfigError), match=sentence):
        one_model.fit(**arguments)
    assert one_model.privacy.ledger.num_releases == 0


def test_a_call_that_was_refused_does_not_fix_the_number_of_examples() -> None:
    model = budgeted(mlp(), expected_batch_size=None, epochs=None)
    with pytest.raises(DataError, match="not finite"):
        model.fit(NAN, Y, 5, epochs=9, verbose=0)
    kept = np.arange(N) != 3
    model.fit(NAN[kept], Y[kept], 10, epochs=1, steps_per_epoch=2, verbose=0)
    assert model.privacy.sample_rate == 10 / (N - 1) and 2.99 < model.privacy.epsilon() <= 3.0
    with pytest.raises(DataError, match="hold 30 examples, and the noise was calibrated for 29"):
        model.fit(X, Y, verbose=0)


def test_token_ids_outside_an_embedding_are_found_before_training() -> None:
    model = ready(small(L.Embedding(9, 3), L.Flatten(), L.Dense(CLASSES), shape=(4,)))
    with pytest.raises(DataError, match="no row for"):
        model.fit(IDS + 1, Y, verbose=0)
    assert model.privacy.ledger.num_releases == 0
    model.fit(IDS, Y, verbose=0, steps_per_epoch=1)


# --- refusals --------------------------------------------------------------------------------------------------------------------


def compiled(loss: Any = None, optimizer: Any = "sgd", build: Callable[[], Any] = mlp, **settings: Any) -> Callable[[], Any]:
    """A call of fit that must be refused."""

    def run() -> Any:
        model = private(build(), **settings)
        model.compile(optimizer, loss, run_eagerly=True)
        return model.fit(X, Y, verbose=0)

    return run


class OwnStep(keras.Model):
    def train_step(self, data: Any) -> Any:
        return {}


class Adds(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        self.add_loss(tf.reduce_mean(x))
        return x


def centred(y: Any, z: Any) -> Any:
    """One value per example, but each depends on the batch."""
    return tf.reduce_sum(tf.square(z - tf.reduce_mean(z, axis=0)), axis=1)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "scalar_loss": (compiled(lambda y, z: tf.reduce_mean(z)), "do not reduce over the batch"),
    "batch_loss": (compiled(centred), "depends on its batch"),
    "no_loss": (compiled(None), "without a loss"),
    "loss_scale": (compiled(cross_entropy(), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())), "LossScaleOptimizer"),
    "loss_scale_factor": (compiled(cross_entropy(), keras.optimizers.SGD(loss_scale_factor=8.0)), "loss_scale_factor"),
    "add_loss": (compiled(cross_entropy(), build=lambda: small(Adds(), L.Dense(CLASSES))), "add_loss"),
    "batch_norm": (lambda: private(small(L.Dense(4), L.BatchNormalization(), L.Dense(CLASSES))), "GroupNormalization"),
    "batch_norm_unbuilt": (lambda: private(keras.Sequential([L.Dense(4), L.BatchNormalization()])), "GroupNormalization"),
    "clipless_without_constant": (compiled("mse", strategy="clipless", max_grad_norm=None), "strategy 'clipless'"),
    "own_step": (lambda: private(OwnStep()), "its own train_step"),
    "twice": (lambda: private(private(mlp())), "private already"),
    "no_model": (lambda: private(L.Dense(3)), "takes a keras.Model"),
    "no_budget": (lambda: make_private(mlp(), expected_batch_size=BATCH), "target_epsilon or noise_multiplier"),
    "two_rates": (lambda: private(mlp(), sample_rate=0.5), "not both"),
    "size_alone": (lambda: make_private(mlp(), privacy={"noise_multiplier": 1.0}, sample_size=N), "needs expected_batch_size"),
    "size_without_epochs": (lambda: budgeted(mlp(), epochs=None, sample_size=N), "give epochs or steps"),
    "bad_privacy": (lambda: make_private(mlp(), privacy={"epsilon": 1.0}, expected_batch_size=BATCH), "privacy"),
    "bad_strategy": (lambda: private(mlp(), strategy="ghostly"), "no strategy 'ghostly'"),
    "not_compiled": (lambda: private(mlp()).fit(X, Y), "not compiled"),
    "plan_too_early": (lambda: private(Own()).privacy.plan, "no plan yet"),
    "noise_too_early": (lambda: budgeted(mlp()).privacy.noise_multiplier, "give sample_size="),
    "train_on_batch": (lambda: ready(mlp()).train_on_batch(X, Y), "batch of your choice"),
    "train_step": (lambda: ready(mlp()).train_step((X, Y)), "batch of your choice"),
    "keras_fit": (lambda: keras.Model.fit(ready(mlp()), X, Y, verbose=0), "train it by model.fit"),
    "too_few": (lambda: ready(mlp()).fit(X[:8], Y[:8], verbose=0), "expected batch size"),
    "other_size": (lambda: budgeted(mlp(), sample_size=99).fit(X, Y, verbose=0), "calibrated for 99"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_private_is_refused(name: str) -> None:
    run, sentence = REFUSED[name]
    with pytest.raises((ConfigError, UnsupportedModelError, DataError), match=sentence):
        run()


def test_a_model_that_xla_cannot_compile_is_refused_before_anything_is_spent() -> None:
    class Strings(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x + 0.0 * tf.cast(tf.strings.length(tf.strings.as_string(x)), x.dtype)

    model = private(small(Strings(), L.Dense(CLASSES)))
    model.compile("sgd", cross_entropy(), jit_compile=True)
    with pytest.raises(ConfigError, match=r"XLA cannot compile.*remove jit_compile=True"):
        model.fit(X, Y, verbose=0)
    assert model.privacy.ledger.num_releases == 0


# --- other strategies, precisions --------------------------------------------------------------------------------------------------


def test_non_private_training_has_no_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_private(mlp(), privacy={"unsafe_seed": 1}, strategy="non_private", expected_batch_size=BATCH)
    model.compile(keras.optimizers.SGD(0.5), cross_entropy(), run_eagerly=True)
    before = model.evaluate(X, Y, verbose=0)
    history = model.fit(X, Y, epochs=20, verbose=0, callbacks=[PrivacyCallback()]).history
    assert model.evaluate(X, Y, verbose=0) < 0.8 * before and set(history) == {"loss"}
    assert model.privacy.epsilon() == np.inf and "no epsilon exists" in capsys.readouterr().out and not model.privacy.ledger.num_releases


def lipschitz(*last: Any) -> Any:
    return small(BoundedInput(1.0), SpectralDense(4), GroupSort(2), SpectralDense(CLASSES), *last)


@pytest.mark.parametrize("loss", ["keras", "lipdp", "clip"])
def test_clipless_proves_its_bounds_and_again_for_weights_that_a_callback_wrote(loss: str) -> None:
    model = lipschitz()
    settings = {"loss_gradient_clip": 0.5} if loss == "clip" else {}
    make_private(model, privacy=dptrain.Privacy(noise_multiplier=1.0), strategy="clipless", expected_batch_size=BATCH, **settings)
    with pytest.raises(ConfigError, match="for clipless the loss"):
        _ = model.privacy.plan
    losses = {"keras": cross_entropy(), "lipdp": lipdp_losses.DP_TauCategoricalCrossentropy(2.0), "clip": "mse"}
    model.compile(keras.optimizers.SGD(0.1), losses[loss], run_eagerly=True)
    seen: list[float] = []

    class Writes(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            kernel = self.model.layers[-1].kernel
            kernel.assign(3.0 * np.ones(kernel.shape))

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append(float(np.linalg.norm(self.model.layers[-1].kernel.numpy(), 2)))

    y = np.eye(CLASSES)[Y] if loss == "clip" else Y
    model.fit(X, y, verbose=0, steps_per_epoch=2, callbacks=[Writes()])
    assert max(seen) <= 1 + 1e-4 and model.privacy.ledger.num_releases == 2
    assert model.privacy.plan.project and model.privacy.plan.loss_clip == pytest.approx(0.5 if loss == "clip" else np.sqrt(2))


def test_a_clipping_norm_may_follow_a_quantile() -> None:
    model = ready(mlp(), sigma=1.0, max_grad_norm=AdaptiveClip(initial=5.0, learning_rate=1.0))
    model.compile(keras.optimizers.SGD(0.125), cross_entropy())
    model.fit(X, Y, verbose=0, steps_per_epoch=3)
    scale = model.privacy.in_force.scale
    assert scale < 0.9 and model.privacy.traces == 1
    model.fit(X, Y, verbose=0, steps_per_epoch=2)
    assert model.privacy.in_force.scale < scale and len(model.privacy.ledger.events) == 1


def test_mixed_precision() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = private(small(L.Dense(8, activation="relu"), L.Dense(CLASSES, dtype="float32")), seed=None)
    model.compile(keras.optimizers.SGD(0.125), cross_entropy(dtype="float32"), metrics=["accuracy"])
    history = model.fit(X, Y, verbose=0, validation_data=(X, Y)).history
    assert np.isfinite(history["val_loss"]).all() and model.privacy.ledger.num_releases == 3
    keras.config.set_dtype_policy("mixed_float16")
    model = private(small(L.Dense(8, activation="relu"), L.Dense(CLASSES, dtype="float32")), seed=None)
    model.compile(keras.optimizers.SGD(0.125), cross_entropy(dtype="float32"))
    model.fit(X, Y, verbose=0)
    assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


# --- the documentation -------------------------------------------------------------------------------------------------------------


def test_the_documented_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)  # one of them saves its model
    keras.config.set_dtype_policy("float32")
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
    assert len(blocks) >= 3
    scope: dict[str, Any] = {
        "x": rng.standard_normal((300, 8, 8, 1)).astype("float32"), "y": rng.integers(0, 10, 300),
        "x_test": rng.standard_normal((40, 8, 8, 1)).astype("float32"), "y_test": rng.integers(0, 10, 40),
    }  # fmt: skip
    for code in blocks:
        exec(compile(code, str(DOC), "exec"), scope)
    assert "epsilon = 2.99" in capsys.readouterr().out
