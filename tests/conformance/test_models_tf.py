"""Keras models that users bring: exact per-sample norms and clipped sums, or a refusal that says what to do."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L
from keras import ops

import dptrain_tf as api
from dptrain.errors import ConfigError, UnsupportedModelError
from dptrain_tf import engine
from dptrain_tf.gradients import Batch, bounded_sum
from dptrain_tf.hooks import find_units
from dptrain_tf.losses import cross_entropy, mean_squared_error
from dptrain_tf.uses import ConvUse
from tests.conformance.oracle_tf import METHODS, assert_exact, example_gradients, methods_of, norms_of, precision, stir

SPEC = importlib.util.spec_from_file_location("families_tf", Path(__file__).parents[2] / "docs" / "families_tf.py")
assert SPEC is not None and SPEC.loader is not None
families = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(families)

B = 4


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with precision("float64"):
        yield


def data(*shape: int, ids: int = 0, batch: int = B) -> Any:
    rng = np.random.default_rng(0)
    return rng.integers(0, ids, (batch, *shape)) if ids else rng.normal(size=(batch, *shape))


# --- families -------------------------------------------------------------------------------------------------------------

# Grouped convolutions are compiled by XLA at each eager call: minutes of CPU in all.
HEAVY = {f"keras.applications {name}" for name in ("ConvNeXtTiny", "EfficientNetB0", "DenseNet121", "ResNet50V2")}
NEEDS = {"keras_hub BERT": "keras_hub", "keras_hub GPT-2": "keras_hub"}
FAMILIES = [pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in families.FAMILIES]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_exact(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    model, x = families.FAMILIES[name]()
    stir(model)
    assert_exact(model, x, methods=METHODS[2:], tolerance=1e-6 if name == "LoRA" else 1e-9)  # Keras keeps LoRA weights in float32


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Keras ViT with a class token", {"rule": 11, "bare": 2}),
        ("Keras Swin", {"rule": 9, "bare": 2}),
        ("tied embeddings (ReversibleEmbedding)", {"rule": 9, "bare": 1}),
        ("keras.applications MobileNetV2", {"rule": 19}),
    ],
)
def test_fast_rules_stay_fast_below_bare_variables(name: str, expected: dict[str, int]) -> None:
    assert methods_of(find_units(families.FAMILIES[name]()[0])) == expected


def test_validate_accepts_bare_variables_and_folded_rows() -> None:
    model, x = families.FAMILIES["Keras Swin"]()
    assert [row.method for row in api.validate(model, x).layers].count("bare") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50V2", "EfficientNetB0", "ConvNeXtTiny", "DenseNet121", "Xception"])
def test_a_whole_application_passes_the_check_and_takes_a_step(name: str) -> None:
    keras.config.set_dtype_policy("float32")
    size = 71 if name == "Xception" else 32
    make = getattr(keras.applications, name)
    model = api.fix(make(weights=None, input_shape=(size, size, 3), classes=5, classifier_activation=None), verbose=False)
    x, y = families.images(size)[:2], np.array([0, 3])
    plan = api.make_plan(model, x, max_grad_norm=0.1)
    api.self_check(model, cross_entropy, x, y, plan)

    @tf.function(autograph=False)
    def step(x: Any, y: Any, mask: Any) -> Any:
        return bounded_sum(model, cross_entropy, Batch(x, y, mask), plan).sums

    whole = engine.full_batch(x, y)
    sums = step(whole.x, whole.y, tf.constant([True, False]))
    assert abs(float(tf.linalg.global_norm(list(sums.values()))) / 0.1 - 1) < 1e-3


# --- bare variables -------------------------------------------------------------------------------------------------------


class Owner(keras.Model):
    """The root owns variables, uses one twice and one on the way to a layer, has a dictionary output and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = L.Dense(4, activation="tanh"), L.Dense(4), L.Dropout(0.5)
        self.norm = L.LayerNormalization()
        self.gain = self.add_weight(name="gain", shape=(4,), initializer="ones")
        self.start = self.add_weight(name="start", shape=(1, 4), initializer="random_normal")
        self.unused = self.add_weight(name="unused", shape=(2,))

    def call(self, x: Any) -> Any:
        h = self.drop(self.first(x)) * self.gain
        one = self.norm(self.start)  # no batch axis yet
        return {"a": self.second(h + one) * self.gain, "b": (ops.sum(h, axis=1), ops.shape(x)[0])}


def test_a_root_model_that_owns_variables_is_exact() -> None:
    model, x = Owner(), data(3)
    model(x)
    stir(model)
    assert_exact(model, x)
    rows = {row.name: row for row in api.validate(model, x).layers}
    assert (rows["model"].method, len(rows["model"].parameters)) == ("bare", 3)
    assert {row.method for name, row in rows.items() if name != "model"} == {"rule"}


def test_dropout_below_a_bare_unit_is_not_drawn_again() -> None:
    """G21: the one release of one example stays within C, and is its own gradient for the masks that were drawn."""
    model, x = families.FAMILIES["Keras ViT with a class token"]()
    drops = [layer for layer in model._flatten_layers() if isinstance(layer, L.Dropout) and layer.rate > 0]
    x, y = x[:1], np.array([1])
    plan = api.make_plan(model, x, max_grad_norm=1e-3)

    def seed(rate: float = 0.5) -> None:
        for layer in drops:
            layer.rate = rate
            layer.seed_generator.state.assign([3, 5])

    seed()
    found = bounded_sum(model, cross_entropy, engine.full_batch(x, y), plan.with_clip_norm(float("inf"))).sums
    seed()
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(cross_entropy(y, model(x, training=True)))
    for v, g in zip(model.trainable_variables, tape.gradient(value, [v.value for v in model.trainable_variables]), strict=True):
        assert np.abs(found[v.path].numpy() - tf.convert_to_tensor(g).numpy()).max() < 1e-9
    seed(0.0)
    plain = bounded_sum(model, cross_entropy, engine.full_batch(x, y), plan.with_clip_norm(float("inf"))).sums
    assert max(np.abs(found[name] - value).max() for name, value in plain.items()) > 1e-3  # the masks do something
    seed()
    sums = bounded_sum(model, cross_entropy, engine.full_batch(x, y), plan).sums
    assert abs(float(tf.linalg.global_norm(list(sums.values()))) / 1e-3 - 1) < 1e-9


class RandomGlue(L.Layer):
    """Owns a variable and draws random numbers itself, beside a layer below it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.seed = L.Dense(3), keras.random.SeedGenerator(0)

    def build(self, shape: Any) -> None:
        self.gain = self.add_weight(name="gain", shape=(3,))
        self.fc.build(shape)

    def call(self, x: Any, training: bool = False) -> Any:
        h = self.fc(x) * self.gain
        return keras.random.dropout(h, 0.5, seed=self.seed) if training else h


def test_random_numbers_between_bare_variables_are_refused_in_training() -> None:
    model, x = keras.Sequential([L.Input((3,)), RandomGlue()]), data(3)
    assert_exact(model, x, methods=METHODS[2:])
    with pytest.raises(UnsupportedModelError, match="Dropout layer of its own"):
        api.validate(model, x)
    assert api.validate(model, x, training=False).layers[0].method == "bare"


class TokenOrder(keras.Model):
    """Calls its layers with the time axis first: the first axis is ``T * B`` with the examples innermost, or ``T`` itself."""

    def __init__(self, fold: bool) -> None:
        super().__init__()
        self.fold, self.fc, self.head = fold, L.Dense(4, activation="tanh"), L.Dense(2)

    def call(self, x: Any) -> Any:
        h = ops.transpose(x, (1, 0, 2))
        time = h.shape[0]
        if self.fold:
            h = ops.reshape(self.fc(ops.reshape(h, (-1, h.shape[2]))), (time, -1, 4))
        else:
            h = self.fc(h)
        return self.head(ops.mean(ops.transpose(h, (1, 0, 2)), axis=1))


@pytest.mark.parametrize("length", [2, 3, 4, 6])
@pytest.mark.parametrize("fold", [False, True])
def test_rows_that_are_not_examples_outermost_are_refused(fold: bool, length: int) -> None:
    """G9: shapes alone cannot tell, the gradients of two examples can."""
    model, x = TokenOrder(fold), data(length, 3, batch=length)
    model(x)
    with pytest.raises(UnsupportedModelError, match=r"cannot be told apart|outermost part of its first axis"):
        api.validate(model, x)
    with pytest.raises(UnsupportedModelError, match=r"cannot be told apart|outermost part of its first axis"):
        api.validate(model, np.zeros_like(x))  # equal examples do not hide it


def test_an_input_that_a_layer_does_not_cast() -> None:
    """``LayerNormalization`` in float64 computes on a float32 input as it is."""
    x = L.Input((3,), dtype="float32")
    model = keras.Model(x, L.Dense(2)(L.LayerNormalization()(x)))
    stir(model)
    assert_exact(model, data(3).astype("float32"), tolerance=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_what_has_no_batch_axis_is_known_whatever_the_batch_size(batch: int) -> None:
    """A position table of 6 rows is not a batch of 6, nor 3 examples of 2 rows (G9)."""
    model, _ = families.FAMILIES["Keras text transformer"]()
    stir(model)
    x = data(6, ids=11, batch=batch)
    gradients = example_gradients(model, x, np.zeros(batch))
    norms = api.per_sample_norms(model, engine.surrogate, x, np.zeros(batch), check=False)
    assert np.abs(norms.numpy() / norms_of(gradients) - 1).max() < 1e-9


class OwnsAndLooksUp(keras.Model):
    """A bare variable meets a table that has no batch axis; a layer of a layer below is called, with a dropout beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.block, self.head = L.Embedding(11, 4), L.Embedding(6, 4), Inner(), L.Dense(2)
        self.gain = self.add_weight(name="gain", shape=(4,), initializer="ones")

    def call(self, ids: Any) -> Any:
        places = self.places(ops.arange(6))
        h = self.block.drop(self.tokens(ids) * self.gain + places * self.gain)
        return self.head(ops.sum(self.block(h) + self.block.fc(h * self.gain), axis=1))


class Inner(L.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = L.Dense(4, activation="tanh"), L.Dropout(0.5)

    def call(self, x: Any) -> Any:
        return self.drop(self.fc(x))


@pytest.mark.parametrize("batch", [2, 3, 6])
def test_bare_variables_beside_what_has_no_batch_axis(batch: int) -> None:
    model, x = OwnsAndLooksUp(), data(6, ids=11, batch=batch)
    model(x)
    stir(model)
    assert_exact(model, x, methods=METHODS[2:])
    if batch == 3:  # dropout in a layer of a layer below is drawn once, too
        assert {row.method for row in api.validate(model, x).layers} == {"rule", "bare"}
        plan, one = api.make_plan(model, x, max_grad_norm=1e-3), engine.full_batch(x[:1], np.array([1]))
        free = plan.with_clip_norm(float("inf"))
        model.block.drop.seed_generator.state.assign([3, 5])
        found = bounded_sum(model, cross_entropy, one, free).sums
        model.block.drop.seed_generator.state.assign([3, 5])
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(cross_entropy(one.y, model(one.x, training=True)))
        expected = tf.convert_to_tensor(tape.gradient(value, model.gain.value))
        assert np.allclose(found[model.gain.path], expected, rtol=1e-9)


class Masked(L.Layer):
    """A slow layer with an argument that has no batch axis."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1], 3), initializer="random_normal")

    def call(self, x: Any, mask: Any, table: Any = None) -> Any:
        return ops.tanh(ops.einsum("ts,bsd->btd", mask, x) @ self.kernel) * (1.0 if table is None else table)


class UsesMasked(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.slow, self.head = Masked(), L.Dense(2)

    def call(self, x: Any) -> Any:
        mask = ops.convert_to_tensor(np.tril(np.ones((x.shape[1], x.shape[1])) / 3))
        return self.head(self.slow(x, mask, table=ops.convert_to_tensor(np.arange(3.0) + 1)))


@pytest.mark.parametrize("batch", [3, 4, 8])
def test_static_arguments_of_the_slow_method_are_not_split(batch: int) -> None:
    model, x = UsesMasked(), data(4, 3, batch=batch)
    model(x)
    stir(model)
    assert_exact(model, x, methods=METHODS[2:])


class Table(L.Layer):
    """A slow layer that returns a table without a batch axis, or with an axis of 1."""

    def __init__(self, lead: bool) -> None:
        super().__init__()
        self.lead = lead

    def build(self, shape: Any) -> None:
        self.table = self.add_weight(name="table", shape=(shape[1], shape[2]), initializer="random_normal")

    def call(self, x: Any) -> Any:
        return ops.sin(self.table)[None] if self.lead else ops.sin(self.table)


@pytest.mark.parametrize("lead", [False, True])
def test_a_slow_layer_without_a_batch_axis(lead: bool) -> None:
    inputs = L.Input((4, 3))
    model = keras.Model(inputs, L.Dense(2)(L.Activation("tanh")(inputs + Table(lead)(inputs))))
    stir(model)
    assert_exact(model, data(4, 3, batch=4), methods=METHODS[2:])


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_folded_convolutions_have_cross_terms(slow: bool) -> None:
    """Two frames of an example meet in one kernel: strided, transposed, shared between two sizes; and LSTM."""

    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.body = [
                L.Conv2D(4, 3, strides=2, padding="same", activation="tanh"), L.Conv2DTranspose(4, 2, strides=2),
                L.GroupNormalization(2), L.Conv2D(4, 3, padding="same"),
            ]  # fmt: skip
            self.head = L.Dense(2)
            if slow:
                self.rnn = L.LSTM(3)

        def call(self, x: Any) -> Any:
            h = ops.reshape(x, (-1, 6, 6, 2))
            for layer in self.body:
                h = layer(h)
            h = self.body[-1](ops.max(ops.reshape(h, (-1, 3, 2, 3, 2, 4)), axis=(2, 4)))
            h = ops.reshape(h, (-1, 9, 4))
            h = self.rnn(h) if slow else ops.mean(h, axis=1)
            return self.head(ops.reshape(h, (-1, 2 * h.shape[-1])))

    model, x = Net(), data(2, 6, 6, 2)
    model(x)
    stir(model)
    assert_exact(model, x, methods=METHODS[2:] if slow else METHODS[:2])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_folded_use_is_the_sum_over_its_rows(groups: int) -> None:
    """Norm, instance and weighted sum of ``ConvUse.fold`` against the per-row gradients, whatever the settings."""
    rng = np.random.default_rng(0)
    x, g = (tf.constant(rng.normal(size=(6, *shape))) for shape in ((7, 6, 4), (3, 4, 8)))
    rows = ConvUse(x, g, (2, 3), (2, 1), (2, 1), groups, ((1, 0), (0, 0)), (2, 3, 4 // groups, 8))
    expected = tf.reduce_sum(tf.reshape(rows.instantiate(), [2, 3, 2, 3, 4 // groups, 8]), axis=1)
    folded = rows.fold(2)
    w = tf.constant([0.3, -1.7], tf.float64)
    assert np.allclose(folded.instantiate(), expected, rtol=1e-12)
    assert np.allclose(folded.inner(folded), tf.reduce_sum(expected**2, axis=[1, 2, 3, 4]), rtol=1e-12)
    assert np.allclose(folded.weighted_sum(w), tf.tensordot(w, expected, 1), rtol=1e-12)
    assert (folded.square()[1].numpy() >= 0).all()


# --- the cases of TensorFlow Privacy's registry tests ---------------------------------------------------------------------


def one_layer(layer: Any, shape: Any, ids: bool = False) -> Any:
    """The layer, and the sum of what it returns."""
    x = L.Input(shape, dtype="int32" if ids else None)
    z = layer(x)
    return keras.Model(x, ops.sum(ops.reshape(z, (-1, int(np.prod(z.shape[1:])))), axis=1, keepdims=True))


def tfp(model: Any, x: Any) -> None:
    """Norms of a squared loss, which depends on the output as a sum of outputs alone would not."""
    stir(model)
    size = len(tf.nest.flatten(x)[0])
    y = np.full((size, 1), 0.7)
    gradients = example_gradients(model, x, y, mean_squared_error)
    expected = norms_of(gradients)
    found = api.per_sample_norms(model, mean_squared_error, x, y, "ghost", check=False).numpy()
    assert np.abs(found - expected).max() <= 1e-9 * max(expected.max(), 1e-3)
    sums = api.clipped_sum(model, mean_squared_error, x, y, float("inf"), "per_sample", check=False)
    for name, value in sums.items():
        assert np.allclose(value, sum(one[name] for one in gradients), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
@pytest.mark.parametrize("kind", ["one", "two", "towers"])
def test_tfp_dense(kind: str, activation: str | None) -> None:
    for x in (np.zeros((1, 4)), np.stack([np.zeros(4), np.arange(4.0)]), data(2, 3, 4)):
        shape = x.shape[1:]
        a, b = L.Input(shape), L.Input(shape)
        z = L.Dense(2, activation=activation)(a)
        if kind == "towers":
            z = z + L.Dense(2, activation=activation)(b)
        if kind != "one":
            z = L.Dense(1)(z)
        out = ops.sum(ops.reshape(z, (-1, int(np.prod(z.shape[1:])))), axis=1, keepdims=True)
        tfp(keras.Model([a, b] if kind == "towers" else a, out), [x, x] if kind == "towers" else x)


EQUATIONS = [
    ("ab,bc->ac", [2], [3], (None, "c")),
    ("abc,cd->abd", [2, 3], [2, 4], (None, "b", "d", "bd")),
    ("abc,cef->abef", [2, 3], [2, 4, 5], (None, "bf")),
    ("...b,bc->...c", [2, 3], [4], (None, "c")),
    ("...ab,bc->...ac", [2, 3], [2, 4], (None, "c")),
    ("...abc,cd->...abd", [2, 3, 4], [2, 3, 5], (None, "b", "d", "bd")),
    ("...abc,cef->...abef", [2, 3, 4], [2, 3, 5, 6], (None, "bf")),
    ("ab...,bc->ac...", [2, 3], [4, 3], (None, "c")),
    ("abc...,cd->abd...", [2, 3, 4], [2, 5, 4], (None, "b", "d", "bd")),
    ("abc...,cef->abef...", [2, 3, 4], [2, 5, 6, 4], (None, "bf")),
]


@pytest.mark.parametrize("case", EQUATIONS, ids=lambda case: case[0])
def test_tfp_einsum_dense(case: Any) -> None:
    equation, inputs, outputs, biases = case
    for i, bias in enumerate(biases):
        shape = tuple(outputs[:-1] if equation.endswith("...") else outputs)  # Keras 3 adds what the last ellipsis stands for
        tfp(one_layer(L.EinsumDense(equation, shape, bias_axes=bias, activation=[None, "sigmoid"][i % 2]), inputs), data(*inputs))


@pytest.mark.parametrize("x", [[[0, 1]], [[0, 1], [1, 1], [0, 0]], [[[0, 1]]], [[[0, 1]], [[1, 1]], [[0, 0]]]], ids=str)
@pytest.mark.parametrize("kind", ["bag", "dense", "weighted"])
def test_tfp_embedding(kind: str, x: Any) -> None:
    x = np.array(x)
    inputs = L.Input(x.shape[1:], dtype="int32")
    h = L.Embedding(10, 2)(inputs)
    if kind == "weighted":
        h = h * np.arange(np.prod(h.shape[1:]), dtype=float).reshape(1, *h.shape[1:])
    h = ops.sum(ops.reshape(h, (-1, int(np.prod(h.shape[1:])))), axis=1, keepdims=True)
    tfp(keras.Model(inputs, h if kind == "bag" else L.Dense(1)(h)), x)


def test_ragged_and_sparse_inputs_are_refused_with_the_remedy() -> None:
    model = one_layer(L.Embedding(10, 2), (2,), ids=True)
    with pytest.raises(UnsupportedModelError, match=r"RaggedTensor; make it dense \(to_tensor\(\)\)"):
        api.per_sample_norms(model, mean_squared_error, tf.ragged.constant([[0], [1, 1]]), np.zeros((2, 1)))
    with pytest.raises(UnsupportedModelError, match=r"SparseTensor; make it dense \(tf.sparse.to_dense\)"):
        api.clipped_sum(model, mean_squared_error, tf.sparse.eye(2), np.zeros((2, 1)))


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 5)], ids=str)
def test_tfp_layer_normalization(shape: tuple[int, ...]) -> None:
    rank = len(shape)
    lists = [[i + 1 for i in range(rank) if bits >> i & 1] for bits in range(1, 2**rank)]
    for axis in (-1, *lists):
        tfp(one_layer(L.LayerNormalization(axis=axis), shape), data(*shape))


ATTENTION: dict[str, dict[str, Any]] = {
    "defaults": {}, "key": {"key": True}, "no bias": {"use_bias": False}, "dropout": {"dropout": 0.1}, "output shape": {"output_shape": 3},
    "single head": {"num_heads": 1, "output_shape": 3}, "mask": {"mask": True}, "causal, flash off": {"causal": True},
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("dense", [False, True])
def test_tfp_multi_head_attention(name: str, dense: bool) -> None:
    settings = dict(ATTENTION[name])
    key, mask, causal = (settings.pop(k, False) for k in ("key", "mask", "causal"))
    query, value, other, flags = L.Input((2, 3)), L.Input((3, 4)), L.Input((3, 4)), L.Input((2, 3), dtype="bool")
    layer = L.MultiHeadAttention(settings.pop("num_heads", 2), 2, value_dim=3, **settings)
    z = layer(query, value, key=other if key else None, attention_mask=flags if mask else None, use_causal_mask=causal)
    z = L.Dense(1)(z) if dense else z
    model = keras.Model([query, value, other, flags], ops.sum(ops.reshape(z, (-1, int(np.prod(z.shape[1:])))), axis=1, keepdims=True))
    flags = np.random.default_rng(0).uniform(size=(B, 2, 3)) < 0.7
    tfp(model, [data(2, 3), data(3, 4), 3 * data(3, 4), flags])


class Twin(L.Layer):
    """Custom layers that hold Dense layers, nested twice, as in TensorFlow Privacy's tests of custom layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first, self.second = L.Dense(4), Twin(depth - 1) if depth else L.Dense(1)

    def call(self, x: Any) -> Any:
        return self.second(self.first(x))


def test_tfp_custom_layers_and_losses() -> None:
    for depth in (0, 1, 2):
        tfp(one_layer(Twin(depth), (3,)), data(3))
    model, x = keras.Sequential([L.Input((3,)), Twin(1), L.Activation("sigmoid")]), data(3)
    y = (np.arange(B) % 2)[:, None].astype(float)
    for loss in (keras.losses.BinaryCrossentropy, keras.losses.MeanAbsoluteError, keras.losses.Hinge):
        assert_exact(model, x, y, loss(reduction="none", dtype="float64"), methods=METHODS[2:])


@pytest.mark.parametrize("kind", ["several inputs", "one input twice", "slices"])
def test_tfp_shared_layers_are_exact_not_only_bounded(kind: str) -> None:
    shared, x = L.Dense(2, activation="tanh"), L.Input((3, 4))
    parts = {"several inputs": lambda: [x, L.Dense(4)(x)], "one input twice": lambda: [x, x], "slices": lambda: [x[:, :1], x[:, 1:]]}[
        kind
    ]()
    z = ops.concatenate([shared(part) for part in parts], axis=1)
    tfp(keras.Model(x, ops.sum(ops.reshape(z, (-1, int(np.prod(z.shape[1:])))), axis=1, keepdims=True)), data(3, 4))


def test_several_outputs_and_nested_models() -> None:
    inner = keras.Sequential([L.Dense(4, activation="relu"), keras.Sequential([L.Dense(3), L.LayerNormalization()])])
    a, b = L.Input((3,), name="a"), L.Input((5, 2), name="b")
    h = L.Concatenate()([inner(a), L.Flatten()(L.Conv1D(2, 2)(b))])
    model = keras.Model({"a": a, "b": b}, {"one": L.Dense(2)(h), "two": L.Dense(1)(h * 2), "ids": ops.argmax(h, axis=1)})
    assert_exact(model, {"a": data(3), "b": data(5, 2)})


# --- validate -------------------------------------------------------------------------------------------------------------


class Hidden(keras.Model):
    """Uses an embedding table where no layer call shows it (G23)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = L.Embedding(6, 4)

    def call(self, ids: Any) -> Any:
        return ops.matmul(self.table(ids), ops.transpose(self.table.embeddings))


class Centred(keras.Model):
    """Subtracts the mean over the batch, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = L.Dense(3)
        self.mean = self.add_weight(name="mean", shape=(3,), trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        h = self.fc(x)
        if training:
            self.mean.assign(ops.mean(h, axis=0))
        return h - ops.mean(h, axis=0, keepdims=True)


def test_validate_lists_every_problem_and_leaves_nothing() -> None:
    model, x = Centred(), data(3)
    model(x)
    before = [v.numpy() for v in model.variables]
    with pytest.raises(UnsupportedModelError) as error:
        api.validate(model, x)
    assert [("updated from data" in p, "depends on its batch" in p) for p in error.value.problems[:2]] == [(True, False), (False, True)]
    assert all((a == v.numpy()).all() for a, v in zip(before, model.variables, strict=True))
    mixed = keras.Sequential(
        [L.Input((3,)), L.Dense(3, kernel_regularizer="l2"), L.BatchNormalization(name="one"), L.BatchNormalization(name="two")]
    )
    with pytest.raises(UnsupportedModelError) as error:
        api.validate(mixed, x)
    text = str(error.value)
    assert all(part in text for part in ("weight_decay", "'one'", "'two'", "moving_mean", "GroupNormalization"))


def test_validate_refuses_a_hidden_use_and_says_where() -> None:
    model, x = Hidden(), data(5, ids=6)
    model(x)
    with pytest.raises(UnsupportedModelError, match="no layer call shows"):
        api.validate(model, x)


def test_validate_reports_layers_and_changes_nothing() -> None:
    model = keras.Sequential([L.Input((6, 6, 2)), L.SeparableConv2D(3, 2), L.Dropout(0.5), L.Flatten(), L.Dense(2, name="head")])
    x = data(6, 6, 2)
    before = [v.numpy() for v in model.variables]
    report = api.validate(model, x)
    assert all((a == v.numpy()).all() for a, v in zip(before, model.variables, strict=True))
    assert [(row.layer, row.method) for row in report.layers] == [("SeparableConv2D", "slow"), ("Dense", "rule")]
    assert report.layers[1].parameters == ("head.weight", "head.bias")
    assert "SeparableConv2D" in str(report) and f"{report.num_params:,}" in str(report)
    with pytest.raises(AttributeError):
        report.num_params = 0  # type: ignore[misc]
    assert api.validate(model, x, cross_entropy, np.arange(B) % 2).num_params == sum(v.numpy().size for v in model.trainable_variables)
    with pytest.raises(ConfigError, match="targets beside a loss"):
        api.validate(model, x, cross_entropy)
    with pytest.raises(UnsupportedModelError, match="give validate a loss"):
        api.validate(keras.Sequential([L.Input((3,)), L.Dense(2), L.Lambda(lambda z: ops.sum(z))]), data(3))


def test_a_batch_of_one_and_of_equal_examples_can_be_checked() -> None:
    model = keras.Sequential([L.Input((3,)), L.Dense(4, activation="relu"), L.Dense(2)])
    for x in (data(3, batch=1), np.zeros((2, 3))):
        api.validate(model, x)


# --- the G rows of docs/pitfalls.md that real Keras layers can meet -------------------------------------------------------


def small(*layers: Any) -> Any:
    return keras.Sequential([L.Input((3,)), *layers])


def test_parameters_that_are_easily_missed_are_covered_by_identity() -> None:
    """G4: bias-only training, a layer that is never called, a frozen part, a variable of the model itself."""

    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.expert = L.Dense(4), L.Dense(2), L.Dense(2)
            self.expert.build((None, 4))
            self.bare = self.add_weight(name="bare", shape=(4,))

        def call(self, x: Any) -> Any:
            return self.head(ops.tanh(self.body(x) + self.bare))

    model, x = Net(), data(3)
    model(x)
    model.body.kernel.trainable = False
    stir(model)
    gradients = example_gradients(model, x, np.zeros(B))
    assert set(gradients[0]) == {v.path for v in model.trainable_variables} and len(gradients[0]) == 6
    assert_exact(model, x)
    rows = api.validate(model, x).layers
    assert {p for row in rows for p in row.parameters} == {
        "dense.bias", "dense_1.weight", "dense_1.bias", "dense_2.weight", "dense_2.bias", "model.bare",
    }  # fmt: skip


def test_unfreezing_after_the_plan_is_an_error() -> None:
    """G4: the set of trainable layers is compared at each step."""
    model, x = small(L.Dense(4, name="a"), L.Dense(2, name="b")), data(3)
    model.layers[0].trainable = False
    plan = api.make_plan(model, x)
    model.layers[0].trainable = True
    with pytest.raises(ConfigError, match="make a new plan"):
        bounded_sum(model, mean_squared_error, engine.full_batch(x, np.zeros((B, 2))), plan)


def test_nothing_to_train_is_an_error() -> None:
    """G28: adapters without a trainable variable."""
    model, x = small(L.Dense(2)), data(3)
    model.trainable = False
    with pytest.raises(UnsupportedModelError, match="no parameter is trainable"):
        api.validate(model, x)


def test_losses_over_tokens_are_one_value_for_each_example() -> None:
    """G7: a loss of each token, or a mean over the batch, is refused."""
    model, x, y = keras.Sequential([L.Input((5, 3)), L.Dense(2)]), data(5, 3), np.zeros((B, 5, 2))
    for loss in (keras.losses.MeanSquaredError(reduction="none"), keras.losses.MeanSquaredError()):
        with pytest.raises(UnsupportedModelError, match="one value per example"):
            api.per_sample_norms(model, loss, x, y)


def test_state_that_real_layers_keep_is_refused() -> None:
    """G24: layers that store what they saw, real ones of Keras."""
    for layer in (L.BatchNormalization(), L.BatchNormalization(synchronized=True), L.SpectralNormalization(L.Dense(3))):
        with pytest.raises(UnsupportedModelError):
            api.validate(small(layer, L.Dense(2)), data(3))


def test_zero_gradients_and_bad_examples_have_finite_weights() -> None:
    """G19 and L15, through a bare unit: an example without a gradient, and one that is not a number."""
    model, x = families.FAMILIES["Keras ViT with a class token"]()
    y = np.arange(3) % 3
    bad = x.copy()
    bad[1] = np.nan
    for clipping in ("abadi", "automatic"):
        plan = api.make_plan(model, x, max_grad_norm=0.1, clipping=clipping)
        found = bounded_sum(model, cross_entropy, engine.full_batch(bad, y), plan, training=False)
        kept = Batch(tf.convert_to_tensor(x), tf.convert_to_tensor(y), tf.constant([True, False, True]))
        expected = bounded_sum(model, cross_entropy, kept, plan, training=False)
        for name, value in found.sums.items():
            assert np.allclose(value, expected.sums[name], rtol=1e-9, atol=1e-12)
        assert float(found.stats["nonfinite"]) == 1


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_low_precision_with_bare_variables_stays_within_the_bound(policy: str) -> None:
    """G11 and G13."""
    keras.config.set_dtype_policy(policy)
    model, x = families.FAMILIES["Keras ViT with a class token"]()
    plan = api.make_plan(model, x, max_grad_norm=0.1)
    sums = bounded_sum(model, cross_entropy, engine.full_batch(x[:1].astype("float32"), np.array([1])), plan).sums
    assert 0.05 < float(tf.linalg.global_norm(list(sums.values()))) <= 0.1 * (1 + 1e-4)


def test_the_self_check_allows_for_half_precision() -> None:
    """Weights in float32, arithmetic in bfloat16: other ways to a gradient differ by more than float32 rounding."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    layers = [L.Input((6, 6, 3)), L.Conv2D(4, 3, activation="relu"), L.GroupNormalization(2), L.Flatten(), L.Dense(3, dtype="float32")]
    api.validate(keras.Sequential(layers), data(6, 6, 3).astype("float32"))


class HandsTable(keras.Model):
    """Owns a table and hands it, without a batch axis, to a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = L.Dense(3)
        self.table = self.add_weight(name="table", shape=(4, 3), initializer="ones")

    def call(self, x: Any) -> Any:
        return self.fc(self.table) + x


def test_a_variable_without_a_batch_axis_is_refused_where_a_layer_takes_it() -> None:
    model, x = HandsTable(), data(4, 3)
    model(x)
    with pytest.raises(UnsupportedModelError, match="give that tensor a first axis of 1"):
        api.validate(model, x)


@pytest.mark.parametrize("name", ["Keras Swin", pytest.param("Keras text transformer", marks=pytest.mark.slow)])
def test_the_graph_of_a_step_equals_the_eager_step(name: str) -> None:
    """Bare units, folded rows and static tables inside ``tf.function``, traced once for a fixed batch."""
    model, x = families.FAMILIES[name]()
    stir(model)
    y, plan = np.arange(3) % 3, api.make_plan(model, x, max_grad_norm=0.1)
    batch = engine.full_batch(x, y)

    @tf.function(autograph=False)
    def step(x: Any, y: Any, mask: Any) -> Any:
        return bounded_sum(model, cross_entropy, Batch(x, y, mask), plan, training=False).sums

    eager = bounded_sum(model, cross_entropy, batch, plan, training=False).sums
    graph = step(batch.x, batch.y, batch.mask)
    for key, value in eager.items():
        assert np.allclose(graph[key], value, rtol=1e-9, atol=1e-12)
    step(batch.x, batch.y, batch.mask)
    assert step.experimental_get_tracing_count() == 1
