"""Recurrent layers of Keras by the cotangents of their gates: every setting against one ordinary gradient per example."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

import dptrain_tf as api
from dptrain_tf.engine import full_batch, surrogate
from dptrain_tf.gradients import Batch, bounded_sum
from dptrain_tf.hooks import Tap, find_units
from tests.conformance.oracle_tf import assert_exact, precision, stir

B, T, D, H = 3, 4, 3, 2


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with precision("float64"):
        yield


class Net(keras.Model):
    """A recurrent layer under masks and with states, and everything it puts out."""

    def __init__(self, layer: Any, mask: bool, states: bool) -> None:
        super().__init__()
        self.layer, self.mask, self.head = layer, mask, L.Dense(2)
        self.states = [L.Dense(H) for _ in range(2 if isinstance(layer, L.LSTM) else 1)] if states else []

    def call(self, x: Any) -> Any:
        # The first time, one in the middle and the last are masked, in different examples.
        counts = tf.constant([[False, True, False, True], [True, True, True, False], [True, True, True, True]])
        mask = tf.gather(counts, tf.cast(x[:, 0, 0] > 0, tf.int32) + tf.cast(x[:, 1, 0] > 0, tf.int32)) if self.mask else None
        first = [dense(x[:, 0]) for dense in self.states]
        found = self.layer(x, mask=mask, initial_state=(first if len(first) > 1 else first[0]) if first else None)
        out, *states = found if isinstance(found, list | tuple) else (found,)
        return tf.concat([self.head(tf.reshape(out, [x.shape[0], -1])), *states], axis=-1)


def net(layer: Any, mask: bool = False, states: bool = False) -> tuple[Any, Any]:
    x = np.random.default_rng(0).normal(size=(B, T, D))
    model = Net(layer, mask, states)
    model(x)
    stir(model)
    return model, x


def fast(model: Any) -> bool:
    return next(unit for unit in find_units(model) if isinstance(unit.layer, L.RNN)).recurrent


PLAIN = [L.LSTM, L.GRU, L.SimpleRNN]
SETTINGS: dict[str, dict[str, Any]] = {
    "last": {},
    "sequences": {"return_sequences": True},
    "states": {"return_sequences": True, "return_state": True},
    "last state": {"return_state": True},
    "backwards": {"go_backwards": True, "return_sequences": True},
    "no bias": {"use_bias": False},
    "zero masked": {"return_sequences": True, "zero_output_for_mask": True},
    "zero masked last": {"zero_output_for_mask": True},
}


STATEFUL = ("states", "last")  # where masks and initial states are tried beside each other
ALL = [
    (name, kind, mask, states)
    for name, kind, mask, states in product(SETTINGS, PLAIN, (False, True), (False, True))
    if (mask or "zero" not in name) and (name in STATEFUL or not states)
]


@pytest.mark.parametrize(("name", "kind", "mask", "states"), ALL)
def test_settings(name: str, kind: Any, mask: bool, states: bool) -> None:
    model, x = net(kind(H, **SETTINGS[name]), mask, states)
    assert fast(model)
    assert_exact(model, x, methods=("mixed_ghost",))


@pytest.mark.parametrize("method", ["ghost", "per_sample"])
@pytest.mark.parametrize("kind", PLAIN)
def test_methods(kind: Any, method: str) -> None:
    model, x = net(kind(H, return_sequences=True))
    assert_exact(model, x, methods=(method,))


OTHERS = [
    (lambda: L.SimpleRNN(H, activation="relu"), True),
    (lambda: L.LSTM(H, unit_forget_bias=False), True),
    (lambda: L.GRU(H, unroll=True), True),
    (lambda: L.GRU(H, reset_after=False), False),
    (lambda: L.LSTM(H, activation="relu"), False),
    (lambda: L.LSTM(H, recurrent_activation="hard_sigmoid"), False),
    (lambda: L.RNN([L.LSTMCell(H), L.GRUCell(H)]), False),
]


@pytest.mark.parametrize(("layer", "known"), OTHERS)
def test_other_cells(layer: Any, known: bool) -> None:
    model, x = net(layer())
    assert fast(model) == known
    assert_exact(model, x, methods=("mixed_ghost",))


def test_a_subclass_is_run_as_it_is() -> None:
    class Own(L.LSTM):
        def call(self, sequences: Any, initial_state: Any = None, mask: Any = None, training: bool = False) -> Any:
            return 2.0 * super().call(sequences, initial_state, mask, training)

    class Cell(L.LSTMCell):
        def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
            out, states = super().call(inputs, states, training)
            return 2.0 * out, states

    own = L.LSTM(H)
    own.cell.__class__ = Cell
    for layer in (Own(H), own):
        model, x = net(layer)
        assert not fast(model)
        assert_exact(model, x, methods=("mixed_ghost",))


def test_both_directions_with_an_embedding_that_masks() -> None:
    ids = np.random.default_rng(0).integers(0, 4, (B, 5))
    ids[0, 2:] = 0
    inner = L.Bidirectional(L.LSTM(H, return_sequences=True))
    first = [L.Input((5,), dtype="int64"), L.Embedding(4, D, mask_zero=True)]
    model = keras.Sequential([*first, inner, L.Bidirectional(L.GRU(H)), L.Dense(2)])
    stir(model)
    assert_exact(model, ids, methods=("mixed_ghost", "ghost"))


def test_called_twice_and_from_one_state() -> None:
    class Twice(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.layer = L.LSTM(H, return_state=True)

        def call(self, x: Any) -> Any:
            out, h, c = self.layer(x)
            return self.layer(tf.reverse(x, [1]), initial_state=[h, c])[0] + out

    x = np.random.default_rng(0).normal(size=(B, T, D))
    model = Twice()
    model(x)
    stir(model)
    assert_exact(model, x, methods=("mixed_ghost", "ghost"))


def test_facts_of_a_linear_map() -> None:
    model, x = net(L.GRU(H))
    layer = next(layer for layer in api.describe(model, x).layers if "gru" in layer.name)
    assert (layer.kind, layer.positions, layer.fan_in, layer.fan_out) == ("linear", T, D + H, 3 * H)


@pytest.mark.parametrize("xla", [False, True])
def test_traced(xla: bool) -> None:
    model, x = net(L.LSTM(H, return_sequences=True), mask=True)
    plan = api.make_plan(model, x, "mixed_ghost", max_grad_norm=0.1)
    batch = full_batch(x, np.zeros(B))

    @tf.function(jit_compile=xla)
    def run(x: Any, y: Any, mask: Any) -> Any:
        return bounded_sum(model, surrogate, Batch(x, y, mask), plan, training=False).sums

    eager = bounded_sum(model, surrogate, batch, plan, training=False).sums
    for name, value in run(batch.x, batch.y, batch.mask).items():
        np.testing.assert_allclose(value, eager[name], atol=1e-12)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_tape_of_others_gets_what_it_would_get_without_the_tap(kind: Any) -> None:
    model, x = net(kind(H, return_sequences=True, return_state=True), states=True)
    x = tf.constant(x)

    def squares() -> Any:
        return tf.reduce_sum(tf.square(model(x)), axis=1)

    with tf.GradientTape() as plain:
        plain.watch(x)
        losses = squares()
    with tf.GradientTape() as outer:
        outer.watch(x)
        with Tap(find_units(model), B):
            found = squares()
    assert np.allclose(outer.gradient(found, x), plain.gradient(losses, x), rtol=1e-12, atol=1e-12)


def test_a_tap_whose_calls_are_asked_for_no_uses() -> None:
    model, x = net(L.LSTM(H), states=True)
    with Tap(find_units(model), B) as tap:
        losses = tf.reduce_sum(tf.square(model(x)), axis=1)
    arrived: list[str] = []
    tap.backward(losses, tf.ones_like(losses), lambda call: arrived.append(call.unit.name))
    assert sorted(arrived) == sorted(unit.name for unit in find_units(model))
