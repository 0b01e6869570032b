"""``dptrain_tf.fix``: what it replaces, what it keeps, what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import dptrain_tf as api
from dptrain.errors import UnsupportedModelError
from dptrain_tf.fix import fix_report
from dptrain_tf.rules import children
from tests.conformance.oracle_tf import assert_exact, precision


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with precision("float64"):
        yield


def data(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=(4, *shape))


def stir(model: Any) -> None:
    """Weights and statistics that are not what they start as."""
    rng = np.random.default_rng(1)
    for variable in model.weights:
        if "seed" not in variable.path:
            variable.assign(0.5 + rng.uniform(0, 1, variable.shape))


def functional() -> Any:
    x = L.Input((6, 6, 4))
    h = L.Conv2D(8, 3, name="conv")(x)
    h = L.BatchNormalization(epsilon=1e-4, name="bn")(h)
    h = L.Dropout(0.1)(L.Activation("relu")(h))
    h = L.BatchNormalization(center=False, name="bn2")(h)
    nested = keras.Sequential([L.Conv2D(6, 2), L.BatchNormalization(scale=False, name="inner")], name="nested")
    return keras.Model(x, L.Dense(3, name="head")(L.GlobalAveragePooling2D()(nested(h))))


def chain() -> Any:
    return keras.Sequential([L.Input((6, 6, 4)), L.Conv2D(8, 3), L.BatchNormalization(), L.Flatten(), L.Dense(3)])


class ConvBlock(L.Layer):
    """A block that holds its layers in attributes, a list, a dictionary and a tuple."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv, self.bn = L.Conv2D(4, 3, padding="same"), L.BatchNormalization()
        self.more = [L.Conv2D(4, 1), [L.BatchNormalization()]]
        self.named = {"bn": L.BatchNormalization()}
        self.pair = (L.BatchNormalization(), L.Activation("relu"))

    def call(self, x: Any) -> Any:
        h = self.named["bn"](self.more[1][0](self.more[0](self.bn(self.conv(x)))))
        return self.pair[1](self.pair[0](h))


class Net(keras.Model):
    """A subclassed model with blocks, a nested Sequential, and one layer that is used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [ConvBlock(), ConvBlock()]
        self.body = keras.Sequential([L.Conv2D(4, 3), L.BatchNormalization()])
        self.shared = L.BatchNormalization()
        self.again = self.shared
        self.head = L.Dense(2)

    def call(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(ops.max(self.again(ops.tanh(self.shared(self.body(x)) / 20)), axis=(1, 2)))


def subclassed() -> Any:
    model = Net()
    model(data(6, 6, 3))
    return model


def functional_with_blocks() -> Any:
    x = L.Input((6, 6, 3))
    return keras.Model(x, L.Dense(2)(L.GlobalAveragePooling2D()(ConvBlock(name="block")(x))))


MODELS = {"functional": (functional, 4), "chain": (chain, 4), "subclassed": (subclassed, 3), "blocks": (functional_with_blocks, 3)}


@pytest.mark.parametrize("name", MODELS)
def test_a_fixed_model_is_exact_and_keeps_its_weights(name: str) -> None:
    make, channels = MODELS[name]
    model, x = make(), data(6, 6, channels)
    stir(model)
    before = {id(layer): layer.get_weights() for layer in children(model)}
    kept = {v.path: v.numpy() for v in model.weights}
    counts = sum(isinstance(layer, L.BatchNormalization) for layer in children(model))
    with pytest.raises(UnsupportedModelError, match="GroupNormalization"):
        api.validate(model, x)
    fixed, report = fix_report(model)
    assert len(report.changes) == counts and not report.left
    assert not any(isinstance(layer, L.BatchNormalization) for layer in children(fixed))
    assert (fixed is model) == report.in_place == (name == "subclassed")
    if fixed is not model:  # the given model is as it was, and shares nothing with the new one
        assert all((a == b).all() for layer in children(model) for a, b in zip(layer.get_weights(), before[id(layer)], strict=True))
        assert not {id(v) for v in model.variables} & {id(v) for v in fixed.variables}
    values = [v.numpy() for v in fixed.trainable_variables]
    old = [value for path, value in kept.items() if "moving" not in path]
    assert len(values) == len(old)
    for one in old:  # each weight is there, in a layer of the same shape
        assert any(one.shape == v.shape and (one == v).all() for v in values)
    assert_exact(fixed, x, methods=("mixed_ghost",))


def test_the_order_of_weights_and_the_settings_are_kept() -> None:
    model = functional()
    stir(model)
    fixed = api.fix(model, verbose=False)
    assert [v.path for v in fixed.trainable_variables] == [v.path for v in model.trainable_variables]
    for one, other in zip(fixed.trainable_variables, model.trainable_variables, strict=True):
        assert (one.numpy() == other.numpy()).all()
    layer = fixed.get_layer("bn")
    assert (layer.groups, layer.axis, layer.epsilon, layer.center, layer.scale) == (8, -1, 1e-4, True, True)
    assert not fixed.get_layer("bn2").center
    assert fixed.get_layer("head").get_config() == model.get_layer("head").get_config()


@pytest.mark.parametrize(("width", "groups"), [(64, 32), (48, 16), (6, 2), (32, 32), (7, 1), (1, 1)])
def test_groups_divide_the_channels_as_in_opacus(width: int, groups: int) -> None:
    fixed = api.fix(keras.Sequential([L.Input((2, 2, width)), L.BatchNormalization()]), verbose=False)
    assert fixed.layers[0].groups == groups


@pytest.mark.parametrize(("width", "groups"), [(64, 8), (32, 4), (8, 1), (2, 1), (6, 1), (7, 1)])
def test_groups_over_vectors_hold_at_least_eight_numbers(width: int, groups: int) -> None:
    """A group of one number would be normalised to zero, one of two numbers to their order; the same rule as in torch."""
    fixed = api.fix(keras.Sequential([L.Input((5,)), L.Dense(width), L.BatchNormalization(), L.Dense(2)]), verbose=False)
    assert fixed.layers[1].groups == groups
    assert np.ptp(fixed(data(5)).numpy(), axis=0).min() > 0


@pytest.mark.parametrize("axis", [-1, 1, 2, 3])
def test_the_axis_is_respected(axis: int) -> None:
    model = keras.Sequential([L.Input((4, 6, 8)), L.BatchNormalization(axis=axis), L.Flatten(), L.Dense(2)])
    stir(model)
    fixed = api.fix(model, verbose=False)
    assert fixed.layers[0].axis == axis and (fixed.layers[0].gamma.numpy() == model.layers[0].gamma.numpy()).all()
    assert_exact(fixed, data(4, 6, 8), methods=("mixed_ghost",))


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_batch_norm_becomes_the_same_map(axis: int, affine: bool) -> None:
    """It reads moving statistics alone, in training too: one fixed map of each example."""
    make = [L.Input((4, 5, 6)), L.BatchNormalization(axis=axis, scale=affine, center=affine, name="frozen"), L.Flatten(), L.Dense(3)]
    model, x = keras.Sequential(make), data(4, 5, 6)
    stir(model)
    model.get_layer("frozen").trainable = False
    fixed, report = fix_report(model)
    assert [change.after for change in report.changes] == ["Rescaling by its moving statistics"]
    for training in (False, True):
        assert np.abs(fixed(x, training=training) - model(x, training=training)).max() < 1e-12
    assert_exact(fixed, x, methods=("mixed_ghost",))
    assert len(fixed.trainable_variables) == 2


def test_spectral_normalization_is_taken_off() -> None:
    model = keras.Sequential([L.Input((5,)), L.SpectralNormalization(L.Dense(4), name="sn"), L.Dense(2)])
    kernel = model.layers[0].layer.kernel.numpy()
    fixed, report = fix_report(model)
    assert type(fixed.layers[0]) is L.Dense and (fixed.layers[0].kernel.numpy() == kernel).all()
    assert (report.changes[0].before, report.changes[0].after) == ("SpectralNormalization", "Dense")
    assert_exact(fixed, data(5), methods=("mixed_ghost",))


class WithSpectral(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = L.SpectralNormalization(L.Dense(4)), L.Dense(2)

    def call(self, x: Any) -> Any:
        return self.head(self.fc(x))


def test_spectral_normalization_inside_a_subclassed_model() -> None:
    model, x = WithSpectral(), data(5)
    model(x)
    kernel = model.fc.layer.kernel.numpy()
    assert api.fix(model, verbose=False) is model
    assert type(model.fc) is L.Dense and (model.fc.kernel.numpy() == kernel).all() and len(model.trainable_variables) == 4
    assert_exact(model, x, methods=("mixed_ghost",))


def test_the_report_is_printed_and_names_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    layers = [L.Input((5,)), L.Dense(4, kernel_regularizer="l2", name="reg"), L.BatchNormalization(name="bn"), L.UnitNormalization()]
    model = keras.Sequential(layers)
    fixed = api.fix(model)
    printed = capsys.readouterr().out
    assert (
        "BatchNormalization -> GroupNormalization: bn" in printed and "still refused: layer 'reg'" in printed and "weight_decay" in printed
    )
    assert isinstance(fixed.layers[-1], L.UnitNormalization)
    assert api.fix(model, verbose=False) is not model and capsys.readouterr().out == ""
    plain = keras.Sequential([L.Input((5,)), L.Dense(2)])
    assert api.fix(plain) is plain
    assert "nothing had to be replaced" in capsys.readouterr().out
    model = subclassed()
    api.fix(model)
    assert "changed in place" in capsys.readouterr().out


class Fixed(L.Layer):
    """Cannot be built again from its configuration."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table, self.bn = table, L.BatchNormalization()

    def call(self, x: Any) -> Any:
        return self.bn(x) * self.table


class Closure(keras.Model):
    """Holds a layer where no attribute, list or dictionary shows it."""

    def __init__(self) -> None:
        super().__init__()
        bn = L.BatchNormalization()
        self._layers.append(bn)
        self.function = lambda x: bn(x)

    def call(self, x: Any) -> Any:
        return self.function(x)


class Overrides(keras.Model):
    """A functional model with code of its own around its graph, which holds its layers where none can be replaced."""

    def call(self, x: Any, training: bool = False, mask: Any = None) -> Any:
        return super().call(x, training=training, mask=mask) * 2


def test_what_cannot_be_fixed_is_refused_with_the_reason() -> None:
    x = L.Input((5,))
    with pytest.raises(UnsupportedModelError, match="Fixed cannot be copied"):
        api.fix(keras.Model(x, Fixed(np.ones(5))(x)))
    model = Closure()
    model(data(5))
    with pytest.raises(UnsupportedModelError, match="in no attribute, list or dictionary"):
        api.fix(model)
    y = L.BatchNormalization()(x)
    for model in (Overrides(x, y), keras.Model(x, y)):
        if type(model) is not Overrides:
            model.gain = model.add_weight(name="gain", shape=(1,))
        with pytest.raises(UnsupportedModelError, match="in no attribute, list or dictionary"):
            api.fix(model)
    with pytest.raises(UnsupportedModelError, match="single number per example"):
        api.fix(keras.Sequential([L.Input((5,)), L.Dense(1), L.BatchNormalization(), L.Dense(2)]))
    with pytest.raises(UnsupportedModelError, match="call it on a batch before fix"):
        api.fix(Net())


def test_a_frozen_part_stays_frozen() -> None:
    model = functional()
    model.get_layer("conv").trainable = False
    model.get_layer("nested").trainable = False
    fixed = api.fix(model, verbose=False)
    assert not fixed.get_layer("conv").trainable and not fixed.get_layer("nested").trainable
    assert [v.path for v in fixed.trainable_variables] == [v.path for v in model.trainable_variables]
    assert isinstance(fixed.get_layer("nested").layers[1], L.Rescaling)


def test_a_fixed_model_can_be_saved_and_loaded(tmp_path: Any) -> None:
    fixed, x = api.fix(functional(), verbose=False), data(6, 6, 4)
    fixed.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert np.abs(again(x) - fixed(x)).max() < 1e-12
