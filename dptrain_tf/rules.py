"""Layer classes and what is known of each: kind, facts for the planner, uses of its parameters.

One row per layer class; the rows are the registration. A class without a row gets the slow method (``generic_uses``), exact for any
layer that treats examples independently; a class that mixes examples is refused, with the replacement named.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import keras
import tensorflow as tf
from keras import layers as L
from tensorflow import Tensor

from dptrain.errors import UnsupportedModelError
from dptrain.info import BIAS, CONV, EMBEDDING, LINEAR, NORM
from dptrain_tf.bare import is_float
from dptrain_tf.lipschitz import BoundedBias, SpectralConv1D, SpectralConv2D
from dptrain_tf.uses import ConvUse, DirectUse, EmbeddingUse, LinearUse, Use, covered, split_rows, turns_of, wide

Facts = dict[str, Any]  # positions, fan_in, fan_out, attrs: per call

# Attribute of a layer with a rule -> role of the variable it holds.
ROLES = {
    "_kernel": "weight", "kernel": "weight", "_embeddings": "weight", "gamma": "weight", "scale": "weight",
    "bias": "bias", "beta": "bias",
}  # fmt: skip
# What a subclass may define for itself without changing what ``call`` computes.
HARMLESS = {
    "__init__", "build", "get_config", "from_config", "compute_mask", "compute_output_shape", "compute_output_spec", "settings",
    "__dict__", "__weakref__", "__annotations__",
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """What is known of a layer class.

    Args:
        kind: one of ``dptrain.info.KINDS``.
        facts: ``(layer, input, output) -> Facts``.
        uses: ``(layer, input, cotangent) -> {role: use}``.
        problem: ``(layer) -> sentence or None``: settings that cannot be handled.
        applies: ``(layer) -> bool``: False sends a layer to the slow method.
    """

    kind: str
    facts: Callable[[Any, Tensor, Tensor], Facts]
    uses: Callable[[Any, Tensor, Tensor], dict[str, Use]]
    problem: Callable[[Any], str | None] = lambda layer: None
    applies: Callable[[Any], bool] = lambda layer: True


def flat(x: Tensor) -> Tensor:
    """``[B, ..., D]`` as ``[B, T, D]``."""
    return tf.reshape(x, [x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]])


# --- linear ---------------------------------------------------------------------------------------------------------------


def linear_facts(layer: Any, a: Tensor, z: Tensor) -> Facts:
    return {"positions": math.prod(z.shape[1:-1]), "fan_in": a.shape[-1], "fan_out": layer.units}


def linear_uses(layer: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    a, g = flat(wide(a)), flat(wide(g))  # [B, T, D], [B, T, p]
    return {"weight": LinearUse(a, g, (a.shape[-1], g.shape[-1])), "bias": DirectUse(tf.reduce_sum(g, axis=1))}


# --- linear, by an einsum equation ----------------------------------------------------------------------------------------


def equation(layer: Any, rank: int | None = None) -> tuple[str, str, str] | None:
    """Index letters of input, kernel and output; None where the equation is no map of each example by the kernel.

    Args:
        layer: an ``EinsumDense``.
        rank: axes of the input; None leaves an ellipsis out, which is enough to judge the rest.
    """
    left, _, out = layer.equation.replace(" ", "").partition("->")
    x, _, k = left.partition(",")
    if "." in k:
        return None
    if x.startswith("..."):
        batch_first = out.startswith("...")
    else:
        batch_first = x[:1] == out[:1] and x[:1] not in (".", *k)
    free = [c for c in string.ascii_letters if c not in layer.equation]
    fill = "".join(free[: max(rank - len(x.replace("...", "")), 0)]) if rank else ""
    x, out = x.replace("...", fill), out.replace("...", fill)
    repeated = any(len(set(letters)) < len(letters) for letters in (x, k, out))
    return (x, k, out) if batch_first and not repeated and set(k) <= {*x, *out} else None


def einsum_facts(layer: Any, a: Tensor, z: Tensor) -> Facts:
    x, k, _ = equation(layer, a.shape.rank) or ("", "", "")
    size = dict(zip(x, a.shape, strict=True))
    kernel = dict(zip(k, layer.kernel.shape, strict=True))
    fan_in = math.prod(n for c, n in kernel.items() if c in x)
    positions = math.prod(n for c, n in size.items() if c not in k) // a.shape[0]
    return {"positions": positions, "fan_in": fan_in, "fan_out": math.prod(kernel.values()) // fan_in}


def einsum_uses(layer: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    a, g = wide(a), wide(g)
    x, k, out = equation(layer, a.shape.rank) or ("", "", "")
    shape = tuple(layer.kernel.shape)
    uses: dict[str, Use] = {}
    inside, outside = ([c for c in k if c in one and c not in other] for one, other in ((x, out), (out, x)))
    positions = [c for c in x[1:] if c not in k]
    plain = "".join(inside + outside) == k or "".join(outside + inside) == k
    if plain and inside and outside and set(positions) == set(out[1:]) - set(k):

        def rows(letters: str, tensor: Tensor, columns: list[str]) -> Tensor:  # [B, T, columns]
            tensor = tf.transpose(tensor, [letters.index(c) for c in [letters[0], *positions, *columns]])
            split = 1 + len(positions)
            return tf.reshape(tensor, [tensor.shape[0], math.prod(tensor.shape[1:split]), math.prod(tensor.shape[split:])])

        pair = rows(x, a, inside), rows(out, g, outside)
        uses["weight"] = LinearUse(*(pair if k.startswith(inside[0]) else pair[::-1]), shape)
    else:  # an axis of the kernel that input and output share, or an input axis that is summed away
        uses["weight"] = DirectUse(tf.einsum(f"{x},{out}->{x[0]}{k}", a, g))
    if layer.bias is not None:
        uses["bias"] = DirectUse(unbroadcast(g, tuple(layer.bias.shape)))
    return uses


def unbroadcast(g: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Per-example sums ``[B, *shape]`` of a cotangent over the axes along which a parameter was broadcast."""
    full = (1,) * (g.shape.rank - len(shape)) + shape
    axes = [i for i in range(1, g.shape.rank) if full[i] == 1 and g.shape[i] != 1]
    return tf.reshape(tf.reduce_sum(g, axis=axes), [g.shape[0], *shape])


# --- convolution ----------------------------------------------------------------------------------------------------------


def conv_pads(layer: Any, sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Padding before and after each spatial axis, as the layer itself applies it; an odd ``same`` pads more at the end."""
    if layer.padding == "valid":
        return ((0, 0),) * len(sizes)
    reach = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
    if layer.padding == "causal":
        return tuple((n, 0) for n in reach)
    total = [max((-(-n // r) - 1) * r + m + 1 - n, 0) for n, r, m in zip(sizes, layer.strides, reach, strict=True)]
    return tuple((n // 2, n - n // 2) for n in total)


def conv_groups(layer: Any, channels: int) -> int:
    """Channel groups; a depthwise convolution has one per channel."""
    return channels if hasattr(layer, "depth_multiplier") else getattr(layer, "groups", 1)


def conv_facts(layer: Any, a: Tensor, z: Tensor) -> Facts:
    taps = math.prod(layer.kernel_size)
    if transposed(layer):  # the roles of input and output are swapped
        windows, fan_out, channels, groups = tuple(a.shape[1:-1]), a.shape[-1], z.shape[-1], 1
    else:
        windows, fan_out, channels = tuple(z.shape[1:-1]), z.shape[-1], a.shape[-1]
        groups = conv_groups(layer, channels)
    positions, channels = math.prod(windows), channels // groups
    padded = math.prod(covered(windows, layer.kernel_size, layer.strides, layer.dilation_rate))
    attrs = {"groups": groups, "kernel": taps, "channels": channels, "padded": padded}
    return {"positions": positions, "fan_in": channels * taps, "fan_out": fan_out, "attrs": attrs}


def conv_uses(layer: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    a, g = wide(a), wide(g)
    shape = (layer.kernel_size, layer.strides, layer.dilation_rate)
    bias = DirectUse(tf.reduce_sum(g, axis=list(range(1, g.shape.rank - 1))))
    if transposed(layer):  # <g, convT(x, W)> = <conv(g, W), x>
        return {"weight": ConvUse(g, a, *shape, 1, conv_pads(layer, tuple(g.shape[1:-1])), tuple(layer.kernel.shape)), "bias": bias}
    pads = conv_pads(layer, tuple(a.shape[1:-1]))
    return {"weight": ConvUse(a, g, *shape, conv_groups(layer, a.shape[-1]), pads, tuple(layer.kernel.shape)), "bias": bias}


def transposed(layer: Any) -> bool:
    """Whether a convolution layer is a transposed one."""
    return isinstance(layer, L.Conv1DTranspose | L.Conv2DTranspose | L.Conv3DTranspose)


def conv_problem(layer: Any) -> str | None:
    if layer.data_format != "channels_last":
        return f"{type(layer).__name__} with data_format {layer.data_format!r} has no rule; use channels_last"
    return None


# --- embedding ------------------------------------------------------------------------------------------------------------


def embedding_facts(layer: Any, a: Tensor, z: Tensor) -> Facts:
    return {"positions": math.prod(z.shape[1:-1]), "fan_in": layer.input_dim, "fan_out": layer.output_dim}


def embedding_uses(layer: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    g = flat(wide(g))  # [B, T, d]
    ids = tf.reshape(tf.cast(a, tf.int64), g.shape[:2])
    ids = tf.where(ids < 0, ids + layer.input_dim, ids)  # Keras counts negative ids from the end
    return {"weight": EmbeddingUse(ids, g, layer.input_dim)}


# --- normalisation --------------------------------------------------------------------------------------------------------


def axis_uses(x_hat: Tensor, g: Tensor, axes: list[int], layer: Any) -> dict[str, Use]:
    """Scale and offset over the given axes."""
    between = [i for i in range(1, g.shape.rank) if i not in axes]
    shape = own_shape(layer)
    sums = [tf.reshape(tf.reduce_sum(t, axis=between), [g.shape[0], *shape]) for t in (g * x_hat, g)]
    return {"weight": DirectUse(sums[0]), "bias": DirectUse(sums[1])}


def in_turns(uses: Callable[[Any, Tensor, Tensor], dict[str, Use]]) -> Callable[[Any, Tensor, Tensor], dict[str, Use]]:
    """The uses of a normalisation layer, whose normalised input is not made for more examples at once than ``TILE`` allows."""

    def parted(layer: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
        turns = turns_of(g.shape[0], 3 * math.prod(g.shape[1:])) if a.shape == g.shape else []
        if len(turns) <= 1:
            return uses(layer, a, g)
        parts: list[dict[str, Any]] = []
        for start, stop in turns:
            with tf.control_dependencies([use.gradient for part in parts[-1:] for use in part.values()]):
                parts.append(uses(layer, a[start:stop], g[start:stop]))
        return {role: DirectUse(tf.concat([part[role].gradient for part in parts], axis=0)) for role in parts[0]}

    return parted


def axes_of(layer: Any, rank: int) -> list[int]:
    """The axes that a normalisation layer's parameters run over."""
    axis = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    return sorted(i % rank for i in axis)


def own_shape(layer: Any) -> tuple[int, ...]:
    """Shape of a normalisation layer's parameters."""
    found = next(v for role in ("gamma", "beta", "scale") for v in [layer.__dict__.get(role)] if isinstance(v, keras.Variable))
    return tuple(found.shape)


@in_turns
def layer_norm_uses(layer: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    axes = axes_of(layer, a.shape.rank)
    return axis_uses(keras.ops.layer_normalization(wide(a), axis=axes, epsilon=layer.epsilon), wide(g), axes, layer)


@in_turns
def rms_norm_uses(layer: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    axes = axes_of(layer, a.shape.rank)
    return axis_uses(keras.ops.rms_normalization(wide(a), axis=axes, epsilon=layer.epsilon), wide(g), axes, layer)


@in_turns
def group_norm_uses(layer: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    a, (axis,) = wide(a), axes_of(layer, a.shape.rank)
    order = [i for i in range(a.shape.rank) if i != axis] + [axis]
    moved = tf.transpose(a, order)
    split = tf.reshape(moved, [a.shape[0], math.prod(moved.shape[1:-1]), layer.groups, -1])  # [B, T, groups, C / groups]
    mean, variance = tf.nn.moments(split, axes=[1, 3], keepdims=True)
    x_hat = tf.reshape((split - mean) * tf.math.rsqrt(variance + layer.epsilon), moved.shape)
    return axis_uses(x_hat, tf.transpose(wide(g), order), [a.shape.rank - 1], layer)


def reversible_facts(layer: Any, a: Tensor, z: Tensor) -> Facts:
    if is_reverse(a, z):
        return {"positions": math.prod(z.shape[1:-1]), "fan_in": layer.output_dim, "fan_out": layer.input_dim}
    return embedding_facts(layer, a, z)


def reversible_uses(layer: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    """The table is looked up, or is the output matrix; both uses have its layout ``[rows, d]``."""
    if is_reverse(a, g):
        return {"weight": LinearUse(flat(wide(g)), flat(wide(a)), (layer.input_dim, layer.output_dim))}
    return embedding_uses(layer, a, g)


def is_reverse(a: Tensor, z: Tensor) -> bool:
    """Whether a ``ReversibleEmbedding`` was called with ``reverse=True``: a lookup adds an axis."""
    return a.shape.rank == z.shape.rank


def norm_facts(layer: Any, a: Tensor, z: Tensor) -> Facts:
    size = math.prod(own_shape(layer))
    return {"positions": math.prod(z.shape[1:]) // size, "fan_in": 1, "fan_out": size}


def norm_problem(layer: Any) -> str | None:
    if getattr(layer, "rms_scaling", False):
        return "LayerNormalization(rms_scaling=True) is deprecated and has no rule; use RMSNormalization"
    return None


# --- bias -----------------------------------------------------------------------------------------------------------------


def bias_facts(layer: Any, a: Tensor, z: Tensor) -> Facts:
    return {"positions": math.prod(z.shape[1:-1]), "fan_in": 1, "fan_out": z.shape[-1]}


def bias_uses(layer: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    g = flat(wide(g))
    return {"bias": DirectUse(tf.reduce_sum(g, axis=1) * g.shape[1] ** -0.5)}


# --- the table ------------------------------------------------------------------------------------------------------------

_CONV = Rule(CONV, conv_facts, conv_uses, conv_problem)
RULES: Mapping[type, Rule] = {
    L.Dense: Rule(LINEAR, linear_facts, linear_uses),
    L.EinsumDense: Rule(LINEAR, einsum_facts, einsum_uses, applies=lambda layer: equation(layer) is not None),
    L.Conv1D: _CONV,
    L.Conv2D: _CONV,
    L.Conv3D: _CONV,
    L.DepthwiseConv1D: _CONV,
    L.DepthwiseConv2D: _CONV,
    L.Conv1DTranspose: _CONV,
    L.Conv2DTranspose: _CONV,
    L.Conv3DTranspose: _CONV,
    SpectralConv1D: _CONV,
    SpectralConv2D: _CONV,
    BoundedBias: Rule(BIAS, bias_facts, bias_uses),
    L.Embedding: Rule(EMBEDDING, embedding_facts, embedding_uses),
    L.ReversibleEmbedding: Rule(
        EMBEDDING, reversible_facts, reversible_uses, applies=lambda layer: layer.tie_weights and not layer.logit_soft_cap
    ),
    L.LayerNormalization: Rule(NORM, norm_facts, layer_norm_uses, norm_problem),
    L.RMSNormalization: Rule(NORM, norm_facts, rms_norm_uses),
    L.GroupNormalization: Rule(NORM, norm_facts, group_norm_uses),
}
# Their children's weights are used in a loop or without calling the child, so the layer is one unit.
WHOLE = (L.RNN, L.TimeDistributed)
# ``tf.vectorized_map`` over these aborts the process on CPU (TensorFlow 2.21 with oneDNN), so they run one example at a time.
LOOPED = (L.MultiHeadAttention, L.GroupQueryAttention, L.EinsumDense)


def rule_for(layer: Any) -> Rule | None:
    """The row of a layer's class; a subclass counts only if it inherits everything that ``call`` runs unchanged."""
    for cls in type(layer).__mro__:
        if cls in RULES:
            roles = all(role_of(layer, v) for v in layer._trainable_variables if v.trainable)
            return RULES[cls] if inherits(layer, cls) and roles and RULES[cls].applies(layer) else None
    return None


def inherits(layer: Any, cls: type) -> bool:
    """Whether a layer computes what its base class does: nothing that ``call`` may run is overridden, in a subclass or on the object."""
    between = type(layer).__mro__[: type(layer).__mro__.index(cls)]
    changed = {name for c in between for name in vars(c) if hasattr(cls, name)} - HARMLESS - set(vars(object))
    return not changed - names_of_a_subclass(cls) and "call" not in layer.__dict__


@cache
def names_of_a_subclass(cls: type) -> frozenset[str]:
    """What Keras gives every subclass of a layer by itself.

    The class is kept alive until its names are read: it is in a cycle, and the garbage collector would empty it.
    """
    plain = type("plain", (cls,), {})
    names = frozenset(vars(plain))
    del plain
    return names


def role_of(layer: Any, variable: Any) -> str | None:
    """``weight`` or ``bias``, by the attribute of the layer that holds a variable."""
    return next((role for attribute, role in ROLES.items() if layer.__dict__.get(attribute) is variable), None)


def children(layer: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """A layer and everything below it, each once, parents first and siblings in their order."""
    seen = {id(layer)} if seen is None else seen
    yield layer
    for child in layer._flatten_layers(include_self=False, recursive=False):
        if id(child) not in seen:
            seen.add(id(child))
            yield from children(child, seen)


def below_of(layer: Any) -> list[Any]:
    """The layers below a layer."""
    return [child for child in children(layer) if child is not layer]


def mixes_examples(layer: Any) -> str | None:
    """A sentence if a layer lets one example influence another or cannot be tapped, trainable or not; else None."""
    name = type(layer).__name__
    if isinstance(layer, L.BatchNormalization):
        sentence = f"{name} computes statistics over the batch, so one example moves the others"
        return f"{sentence}; replace it by GroupNormalization, as dptrain_tf.fix does"
    if isinstance(layer, L.SpectralNormalization):
        return f"{name} rewrites the weight in the forward pass; remove it (dptrain_tf.fix does) and use a kernel_constraint"
    if isinstance(layer, tuple(getattr(L, c) for c in ("MixUp", "CutMix") if hasattr(L, c))):
        return f"{name} blends examples; remove it"
    if isinstance(layer, L.RNN) and layer.stateful:
        return f"{name}(stateful=True) carries data from one batch to the next; set stateful=False"
    if isinstance(layer, L.LayerNormalization | L.RMSNormalization | L.UnitNormalization | L.GroupNormalization):
        axis = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
        if 0 in axis:
            return f"{name} normalises over the batch axis; choose other axes"
    if layer.activity_regularizer is not None:
        return "activity_regularizer adds a term that is no per-example loss; remove it"
    if layer.quantization_mode is not None:
        return "quantized layers cannot be trained; use a float dtype policy"
    if getattr(layer, "_remat_mode", None) is not None:
        return "rematerialisation hides the layer's output from the tap; build the layer outside of keras.RematScope"
    if any(v.trainable and v.regularizer is not None for v in layer._trainable_variables):
        return "weight regularizers are no per-example loss; remove them and set weight_decay in the optimizer"
    return None


def random_rate(layer: Any) -> float:
    """How strongly a layer draws random numbers in training; 0 if it draws none."""
    known = [getattr(layer, name, None) for name in ("rate", "dropout", "_dropout", "recurrent_dropout", "stddev")]
    rates = [float(rate) for rate in known if isinstance(rate, int | float)]
    return max(rates) if rates else float(bool(layer._seed_generators))


def aligned(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Input and cotangent in the wider of their types; they differ where a layer does not cast its input."""
    if not is_float(a) or a.dtype == g.dtype:
        return a, g
    wider = a.dtype if a.dtype.size > g.dtype.size else g.dtype
    return tf.cast(a, wider), tf.cast(g, wider)


def fold_of(x: Any, batch: int) -> int:
    """How many rows of a tensor belong to one example, where its first axis is made of examples; else 0."""
    return 0 if not tf.is_tensor(x) or not x.shape.rank or x.shape[0] % batch else x.shape[0] // batch


def generic_uses(call: Any) -> dict[str, Use]:
    """The slow method: per-sample gradients of a layer by ``tf.vectorized_map`` over its vector-Jacobian product.

    Of a bare unit only what its own ``call`` computes is run again: the layers below return what they returned in the forward pass, and
    the cotangents at their inputs are those of the loss, so that the chain rule is cut exactly there. Dropout below is not drawn again.

    Args:
        call: a ``hooks.Call`` of a layer that treats examples independently and draws no random numbers itself.
    Returns:
        Role -> use.
    """
    layer, batch, frame = call.unit.layer, call.batch, call.frame
    leaves, variables = call.leaves, call.unit.variables
    structure = (call.args, call.kwargs, [record[1] for record in frame.records] if frame else [])
    whole, start = set[int](), len(tf.nest.flatten(structure[:2]))  # leaves that have one row per example and no further axis for it
    for _, output, expanded in frame.records if frame else []:
        count = len(tf.nest.flatten(output))
        whole.update(range(start, start + count) if expanded else ())
        start += count
    split = [i for i, x in enumerate(leaves) if fold_of(x, batch) and (i in whole or i not in call.static)]
    masks = {i: leaves[i]._keras_mask for i in split if getattr(leaves[i], "_keras_mask", None) is not None}
    present = [i for i, c in enumerate(call.cotangents) if c is not None]
    values = [v.value for v in variables.values()]
    below = below_of(layer) if frame else []

    def one(elements: Any) -> list[Tensor]:
        xs, ms, gs = elements
        full = list(leaves)
        for i, x in zip(split, xs, strict=True):
            full[i] = x
        for i, m in zip(masks, ms, strict=True):
            full[i]._keras_mask = m
        args, kwargs, outputs = tf.nest.pack_sequence_as(structure, full)
        with tf.GradientTape(watch_accessed_variables=False) as tape, frame.replay(below, outputs) if frame else nullcontext([]) as cut:
            tape.watch(values)
            found = [z for z in tf.nest.flatten(layer(*args, **{"training": call.training, **kwargs})) if is_float(z)]
            found += cut
            found = [found[i] for i in present]
        gradients = tape.gradient(found, values, gs, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [tf.convert_to_tensor(g) for g in gradients]

    own = len(call.cotangents) - len(frame.inputs if frame else [])
    elements = (
        [leaves[i] if i in whole else split_rows(leaves[i], batch) for i in split],
        [split_rows(m, batch) for m in masks.values()],
        [call.cotangents[i] if call.expanded and i < own else split_rows(call.cotangents[i], batch) for i in present],
    )
    gradients = each_example(one, elements, values, layer, alone=frame is not None)
    return {role: DirectUse(wide(gradient)) for role, gradient in zip(variables, gradients, strict=True)}


def each_example(one: Callable[[Any], list[Tensor]], elements: Any, values: list[Any], layer: Any, alone: bool) -> list[Tensor]:
    """Run a function for every example at once, or for one after the other where that fails.

    Args:
        one: the function.
        elements: its argument, with a batch axis in front of every tensor.
        values: variables whose shapes its results have.
        layer: what it runs.
        alone: whether it runs nothing of the layers below.
    Raises:
        UnsupportedModelError: it cannot be run.
    """
    looped = (*LOOPED, *WHOLE) if tf.executing_eagerly() else LOOPED  # to convert a recurrent layer takes seconds: pays in a graph only
    if alone or not any(isinstance(child, looped) for child in children(layer)):
        try:
            return tf.vectorized_map(one, elements)
        except Exception:  # whatever it cannot convert, the loop below can still run, or says why not
            pass
    try:
        signature = [tf.TensorSpec(v.shape, v.dtype) for v in values]
        return tf.function(lambda: tf.map_fn(one, elements, fn_output_signature=signature), autograph=False)()
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        sentence = f"layer {layer.name!r} ({type(layer).__name__}) cannot be run one example at a time ({reason})"
        raise UnsupportedModelError([f"{sentence}; build it from layers that have a rule."]) from error
