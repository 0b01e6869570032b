"""Recurrent layers: the cotangents of their gates, from which the uses of all their weights follow as those of linear layers do.

A recurrent layer is a linear map of ``[x_t, h_{t-1}]`` at each time, with elementwise functions after it. What those maps receive is
known once the layer has run again; their cotangents come from one loop backwards in time, in which only ``dh`` and ``dc`` are carried.
Per-sample gradients are then ``sum_t [x_t, h_{t-1}]^T dz_t``, with ghost norms and all, where ``vectorized_map`` would run the whole
layer once for every example. Cells of other kinds, and other activations, are left to that. The layers below get their cotangents from
the same loop; TensorFlow's own backward pass through the layer is not recorded (``Tap``): it was a seventh to a quarter of a step.

Shapes: T times, B examples, D inputs, H units, k gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import layers as L
from tensorflow import Tensor

from dptrain_tf.rules import inherits
from dptrain_tf.uses import DirectUse, LinearUse, Use, wide

CELLS_OF: Mapping[type, type] = {L.LSTM: L.LSTMCell, L.GRU: L.GRUCell, L.SimpleRNN: L.SimpleRNNCell}


class Pass(NamedTuple):
    """What a layer was called with, and its weights; time is the first axis."""

    x: Tensor  # [T, B, D]
    states: list[Tensor]  # [B, H] each
    mask: Tensor | None  # [T, B, 1], True where a time counts
    kernel: Tensor  # [D, kH]
    recurrent: Tensor  # [H, kH]
    bias: tuple[Tensor | None, Tensor | None]  # [kH] each, of the two maps

    def inputs(self) -> Tensor:
        """``x W + b`` at all times, ``[T, B, kH]``."""
        return plus(tf.matmul(self.x, self.kernel), self.bias[0])


class Given(NamedTuple):
    """Cotangents of what a layer put out."""

    out: Tensor  # [T, B, H]
    states: list[Tensor]  # [B, H] each, of the last states
    zeroed: bool  # masked outputs are zero, not the last one before them


class Cell(NamedTuple):
    """How a cell works.

    Args:
        step: ``(inputs [B, kH], inner [B, kH], states) -> new states``; ``inner`` is ``h U + b``.
        slopes: ``(inputs, inner, states before each time) -> arrays [T, B, H]`` that ``back`` reads, all times at once.
        back: ``(slopes of one time, cotangents of its new states) -> cotangents of inputs and inner [B, kH], of the states before it,
            without what reaches h through ``inner``.``
    """

    step: Callable[..., list[Tensor]]
    slopes: Callable[..., list[Tensor]]
    back: Callable[..., tuple[Tensor, Tensor, list[Tensor]]]


def plus(x: Tensor, bias: Tensor | None) -> Tensor:
    """A sum, if there is a bias."""
    return x if bias is None else x + bias


# --- cells ------------------------------------------------------------------------------------------------------------------


def lstm_step(inputs: Tensor, inner: Tensor, states: list[Tensor]) -> list[Tensor]:
    """``c' = f c + i g``, ``h' = o tanh(c')``."""
    i, f, g, o = tf.split(inputs + inner, 4, axis=-1)
    c = tf.sigmoid(f) * states[1] + tf.sigmoid(i) * tf.tanh(g)
    return [tf.sigmoid(o) * tf.tanh(c), c]


def lstm_slopes(inputs: Tensor, inner: Tensor, states: list[Tensor]) -> list[Tensor]:
    i, f, g, o = tf.split(inputs + inner, 4, axis=-1)
    i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
    after = tf.tanh(f * states[1] + i * g)
    from_cell = [g * i * (1 - i), states[1] * f * (1 - f), i * (1 - g * g)]  # of the cell state, in each gate but the last
    return [*from_cell, after * o * (1 - o), o * (1 - after * after), f]


def lstm_back(slopes: list[Tensor], given: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    dh, (i, f, g, o, into_cell, forget) = given[0], slopes
    dc = given[1] + dh * into_cell
    dz = tf.concat([dc * i, dc * f, dc * g, dh * o], axis=-1)
    return dz, dz, [tf.zeros_like(dh), dc * forget]


def gru_step(inputs: Tensor, inner: Tensor, states: list[Tensor]) -> list[Tensor]:
    """``n = tanh(i_n + r h_n)``, ``h' = z h + (1 - z) n``."""
    (iz, ir, new), (hz, hr, hidden) = tf.split(inputs, 3, axis=-1), tf.split(inner, 3, axis=-1)
    z = tf.sigmoid(iz + hz)
    return [z * states[0] + (1 - z) * tf.tanh(new + tf.sigmoid(ir + hr) * hidden)]


def gru_slopes(inputs: Tensor, inner: Tensor, states: list[Tensor]) -> list[Tensor]:
    (iz, ir, new), (hz, hr, hidden) = tf.split(inputs, 3, axis=-1), tf.split(inner, 3, axis=-1)
    z, r = tf.sigmoid(iz + hz), tf.sigmoid(ir + hr)
    n = tf.tanh(new + r * hidden)
    in_n = (1 - z) * (1 - n * n)
    return [(states[0] - n) * z * (1 - z), in_n * hidden * r * (1 - r), in_n, in_n * r, z]


def gru_back(slopes: list[Tensor], given: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    dh, (in_z, in_r, in_n, in_hidden, z) = given[0], slopes
    gates = [dh * in_z, dh * in_r]
    return tf.concat([*gates, dh * in_n], axis=-1), tf.concat([*gates, dh * in_hidden], axis=-1), [dh * z]


def simple(act: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Cell:
    """``h' = act(z)``, from the activation and its slope."""

    def back(slopes: list[Tensor], given: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        dz = given[0] * slopes[0]
        return dz, dz, [tf.zeros_like(dz)]

    return Cell(lambda inputs, inner, states: [act(inputs + inner)], lambda inputs, inner, states: [slope(inputs + inner)], back)


LSTM = Cell(lstm_step, lstm_slopes, lstm_back)
GRU = Cell(gru_step, gru_slopes, gru_back)
TANH = simple(tf.tanh, lambda z: 1 - tf.square(tf.tanh(z)))
RELU = simple(tf.nn.relu, lambda z: tf.cast(z > 0, z.dtype))


def cell_of(layer: Any) -> Cell | None:
    """How a layer's cell works; None for settings that are not known here."""
    tanh, relu, sigmoid = keras.activations.tanh, keras.activations.relu, keras.activations.sigmoid
    cell = layer.cell
    if isinstance(layer, L.SimpleRNN):
        return TANH if cell.activation is tanh else RELU if cell.activation is relu else None
    if cell.activation is not tanh or cell.recurrent_activation is not sigmoid:
        return None
    return LSTM if isinstance(layer, L.LSTM) else GRU if cell.reset_after else None


# --- loops ------------------------------------------------------------------------------------------------------------------


def loop(times: int, body: Callable[[Any, list[Tensor]], tuple[list[Tensor], list[Tensor]]], carried: list[Tensor], put_out: int,
         reverse: bool) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """A loop over time.

    Args:
        times: T.
        body: ``(t, carried) -> carried, what is put out``.
        carried: at the beginning.
        put_out: how many arrays ``body`` puts out.
        reverse: from the last time to the first.
    Returns:
        What was put out, ``[T, ...]`` each, and what was carried at the end.
    """
    arrays = tuple(tf.TensorArray(carried[0].dtype, size=times, element_shape=None) for _ in range(put_out))

    def once(k: Any, carried: Any, arrays: Any) -> Any:
        t = times - 1 - k if reverse else k
        carried, outs = body(t, list(carried))
        return k + 1, tuple(carried), tuple(array.write(t, out) for array, out in zip(arrays, outs, strict=True))

    start = (tf.constant(0), tuple(carried), arrays)
    _, end, arrays = tf.while_loop(lambda k, *_: k < times, once, start, maximum_iterations=times)
    return [array.stack() for array in arrays], list(end)


def forward(cell: Cell, run: Pass, inputs: Tensor) -> list[Tensor]:
    """The states that each time began with, ``[T, B, H]`` each."""

    def body(t: Any, states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        new = cell.step(inputs[t], plus(tf.matmul(states[0], run.recurrent), run.bias[1]), states)
        if run.mask is not None:
            new = [tf.where(run.mask[t], n, s) for n, s in zip(new, states, strict=True)]
        return new, states

    found, _ = loop(inputs.shape[0], body, run.states, len(run.states), False)
    return [still(states, inputs.shape[:2], state) for states, state in zip(found, run.states, strict=True)]


def still(x: Tensor, first: Any, like: Tensor) -> Tensor:
    """The static shape that a loop lost."""
    return tf.ensure_shape(x, [*first, *like.shape[1:]])


def backward(
    cell: Cell, run: Pass, given: Given, inputs: Tensor, inner: Tensor, before: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Cotangents of the two maps, ``[T, B, kH]`` each, and of the first states.

    At a masked time the states stay, and the output is the last one before it, or zero: cotangents go to where the values came from.
    """
    slopes, count = cell.slopes(inputs, inner, before), len(before)

    def body(t: Any, carried: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        states, pending = carried[:count], carried[count]
        out = given.out[t] if given.zeroed else given.out[t] + pending
        dzi, dzh, earlier = cell.back([s[t] for s in slopes], [states[0] + out, *states[1:]])
        earlier[0] += tf.matmul(dzh, run.recurrent, transpose_b=True)
        if run.mask is None:
            return [*earlier, pending], [dzi, dzh]
        counts = run.mask[t]
        earlier = [tf.where(counts, e, s) for e, s in zip(earlier, states, strict=True)]
        dzi, dzh = (tf.where(counts, dz, tf.zeros_like(dz)) for dz in (dzi, dzh))
        return [*earlier, tf.where(counts, tf.zeros_like(out), out)], [dzi, dzh]

    found, end = loop(inputs.shape[0], body, [*given.states, tf.zeros_like(given.out[0])], 2, True)
    return still(found[0], inputs.shape[:2], inputs[0]), still(found[1], inputs.shape[:2], inputs[0]), end[:count]


# --- layers -----------------------------------------------------------------------------------------------------------------


def is_recurrent(layer: Any) -> bool:
    """Whether the uses of a layer are found here: Keras's own class and cell, run as they stand, without dropout inside."""
    kind = next((cls for cls in CELLS_OF if isinstance(layer, cls)), None)
    if kind is None or not inherits(layer, kind) or not inherits(layer.cell, CELLS_OF[kind]):
        return False
    plain = not layer.cell.dropout and not layer.cell.recurrent_dropout and layer.cell.quantization_mode is None
    return plain and cell_of(layer) is not None


def recurrent_facts(layer: Any, x: Tensor) -> dict[str, int]:
    """Facts for the planner: the layer is a linear map of ``[x, h]`` at each time."""
    kernel, recurrent = layer.cell.kernel.shape, layer.cell.recurrent_kernel.shape
    return {"positions": x.shape[1], "fan_in": kernel[0] + recurrent[0], "fan_out": kernel[1]}


def recurrent_uses(call: Any) -> tuple[dict[str, Use], list[Tensor]] | None:
    """The uses of every variable of a recurrent layer, and the cotangents of what it was called with.

    Args:
        call: a ``hooks.Call`` of a layer for which ``is_recurrent`` holds.
    Returns:
        Role -> use, and cotangents of the tensors of ``given_to``; None where what it was called with is not known here.
    """
    layer, cell = call.unit.layer, cell_of(call.unit.layer)
    given = given_to(call)
    if cell is None or given is None:
        return None
    run = pass_of(call, given)
    before = forward(cell, run, inputs := run.inputs())
    inner = plus(tf.matmul(before[0], run.recurrent), run.bias[1])
    dzi, dzh, first = backward(cell, run, given_of(call, run), inputs, inner, before)
    dx = tf.matmul(tf.reverse(dzi, [0]) if layer.go_backwards else dzi, run.kernel, transpose_b=True)
    below = [tf.cast(g, x.dtype) for g, x in zip([tf.transpose(dx, [1, 0, 2]), *first], given.tensors, strict=False)]
    x, h, dzi, dzh = (tf.transpose(t, [1, 0, 2]) for t in (run.x, before[0], dzi, dzh))
    uses: dict[int, Use] = {
        id(layer.cell.kernel): LinearUse(x, dzi, tuple(run.kernel.shape)),
        id(layer.cell.recurrent_kernel): LinearUse(h, dzh, tuple(run.recurrent.shape)),
    }
    if layer.cell.use_bias:
        sums = [tf.reduce_sum(dz, axis=1) for dz in (dzi, dzh)]
        uses[id(layer.cell.bias)] = DirectUse(sums[0] if run.bias[1] is None else tf.stack(sums, axis=1))
    return {role: uses[id(variable)] for role, variable in call.unit.variables.items()}, below


class Called(NamedTuple):
    """What a layer was called with."""

    tensors: list[Tensor]  # sequences [B, T, D], and first states [B, H] where they were given
    mask: Tensor | None  # [B, T]


def given_to(call: Any) -> Called | None:
    """What a layer was called with; None for masks and states of other forms."""
    names = ("sequences", "initial_state", "mask")
    known = dict(zip(names, call.args, strict=False)) | call.kwargs
    x, states, mask = (known.get(name) for name in names)
    if call.static or call.expanded or not tf.is_tensor(x) or None in x.shape or not set(known) <= {*names, "training"}:
        return None
    if mask is not None and (not tf.is_tensor(mask) or mask.shape.rank != 2):
        return None
    return Called([x, *([] if states is None else tf.nest.flatten(states))], mask)


def pass_of(call: Any, given: Called) -> Pass:
    """One call, run again."""
    layer, cell, mask = call.unit.layer, call.unit.layer.cell, given.mask
    x, *states = map(wide, given.tensors)
    if not states:
        states = [tf.zeros([x.shape[0], layer.units], x.dtype)] * (2 if isinstance(layer, L.LSTM) else 1)
    x = tf.transpose(x, [1, 0, 2])
    mask = None if mask is None else tf.transpose(tf.cast(mask, tf.bool))[..., None]
    if layer.go_backwards:
        x, mask = tf.reverse(x, [0]), None if mask is None else tf.reverse(mask, [0])
    kernel, recurrent = (wide(tf.cast(v.value, x.dtype)) for v in (cell.kernel, cell.recurrent_kernel))
    bias: tuple[Tensor | None, Tensor | None] = (None, None)
    if cell.use_bias:
        value = tf.cast(cell.bias.value, x.dtype)
        bias = (value[0], value[1]) if isinstance(layer, L.GRU) else (value, None)
    return Pass(x, [tf.cast(s, x.dtype) for s in states], mask, kernel, recurrent, bias)


def given_of(call: Any, run: Pass) -> Given:
    """The cotangents of a call, those that are missing as zeros."""
    layer, given = call.unit.layer, [None if g is None else tf.cast(g, run.x.dtype) for g in call.cotangents]
    out, *states = given if layer.return_state else [given[0]]
    times, shape = run.x.shape[0], run.states[0].shape
    if out is None:
        out = tf.zeros([times, *shape], run.x.dtype)
    elif layer.return_sequences:
        out = tf.transpose(out, [1, 0, 2])
    else:
        out = tf.concat([tf.zeros([times - 1, *shape], out.dtype), out[None]], axis=0)
    found = [tf.zeros_like(s) if g is None else g for s, g in zip(run.states, states or [None] * len(run.states), strict=True)]
    return Given(out, found, layer.zero_output_for_mask)
