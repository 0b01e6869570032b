"""Facts about a model for the planner, from one forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from dptrain.errors import UnsupportedModelError
from dptrain.info import GENERIC, LINEAR, LayerInfo, ModelInfo
from dptrain_tf.gradients import batch_size, call_model, trainable
from dptrain_tf.hooks import LAYOUT, Call, Layout, Tap, Unit, find_units, no_batch_axis
from dptrain_tf.recurrent import recurrent_facts
from dptrain_tf.rules import children


def tensors(x: Any) -> Any:
    """Arrays of a batch as tensors.

    Raises:
        UnsupportedModelError: a ragged or sparse tensor, whose rows have no fixed shape.
    """
    for leaf in tf.nest.flatten(x):
        if isinstance(leaf, tf.RaggedTensor | tf.SparseTensor):
            dense = "to_tensor()" if isinstance(leaf, tf.RaggedTensor) else "tf.sparse.to_dense"
            raise UnsupportedModelError([f"an input is a {type(leaf).__name__}; make it dense ({dense}) and mask what is padding."])
    return tf.nest.map_structure(tf.convert_to_tensor, x)


def describe(model: Any, x: Any) -> ModelInfo:
    """The facts of every layer with trainable parameters, in the order of their first call.

    Args:
        model: any Keras model; built by a call if it is not built yet, otherwise left as it was.
        x: a batch of inputs; only shapes matter.
    Returns:
        Facts.
    Raises:
        UnsupportedModelError: lists every layer that cannot be handled.
    """
    x = tensors(x)
    if not all(layer.built for layer in children(model)):
        call_model(model, x, training=False)
    if not trainable(model):
        raise UnsupportedModelError(["no parameter is trainable; unfreeze a layer."])
    units = find_units(model)
    calls, layouts = probe(model, units, x)
    order, graph = {name: i for i, name in enumerate(calls)}, graph_order(model)
    units = sorted(units, key=lambda unit: (unit.name not in order, graph.get(id(unit.layer), 0), order.get(unit.name, 0)))
    parameters, seen, layers = trainable(model), set[str](), []
    for unit in units:
        own = [name for name in dict.fromkeys(unit.params.values()) if name not in seen]
        seen.update(own)
        count = sum(math.prod(parameters[name].shape) for name in own)
        info = layer_info(unit, calls.get(unit.name, []), count)
        static = {f"{LAYOUT}{index}": bits for index, bits in layouts.get(unit.name, {}).items()}
        layers.append(replace(info, attrs={**info.attrs, **static}) if static else info)
    return ModelInfo(tuple(layers))


def take(x: Any, where: Any) -> Any:
    """The examples of every tensor of a batch that a list of indices names."""
    return tf.nest.map_structure(lambda t: tf.gather(t, where), tensors(x))


def tapped(model: Any, units: list[Unit], x: Any, size: int, layouts: Mapping[str, Layout] | None = None) -> dict[str, list[Call]]:
    """The calls of one forward pass over some of the examples, by unit."""
    with Tap(units, size, layouts=layouts) as tap:
        call_model(model, take(x, [i % batch_size(x) for i in range(size)]), training=False)
    calls: dict[str, list[Call]] = {}
    for call in tap.calls:
        calls.setdefault(call.unit.name, []).append(call)
    return calls


def probe(model: Any, units: list[Unit], x: Any) -> tuple[dict[str, list[Call]], dict[str, Layout]]:
    """The calls of a forward pass over two examples, and which of their tensors have no batch axis.

    Two passes over two and three examples tell: what grows with the batch has ``k B`` rows, what does not is static.

    Raises:
        UnsupportedModelError: lists every layer whose output does neither, or whose calls depend on the batch.
    """
    calls, more = tapped(model, units, x, 2), tapped(model, units, x, 3)
    layouts: dict[str, Layout] = {}
    problems: list[str] = []
    for name, own in calls.items():
        if len(own) != len(more.get(name, [])):
            problems.append(
                f"layer {name!r} is called {len(own)} times for 2 examples and {len(more.get(name, []))} times for 3; fix that."
            )
            continue
        for index, (two, three) in enumerate(zip(own, more[name], strict=True)):
            (leaves, shapes), (leaves3, shapes3) = two.first, three.first
            grows = [3 * a[0] == 2 * b[0] if a and b else False for a, b in zip(shapes, shapes3, strict=True)]
            fixed = [a == b and len(a) > 0 for a, b in zip(shapes, shapes3, strict=True)]
            single = [a[:1] == (1,) for a in shapes]
            static = not any(grows) and len(shapes) == 1 and fixed[0] and not single[0]
            handed = len(shapes) - (len(two.frame.inputs) if two.frame else 0)  # from here on: what the layers below were called with
            for i, shape in enumerate(shapes):
                if grows[i] or single[i] or (static and expandable(two.unit)):
                    continue
                problems.append(no_batch_axis(two.unit, shape, 2) if i < handed else hands_no_batch(two.unit, shape))
            flags = [static, *(a is not None and a == b for a, b in zip(leaves, leaves3, strict=True))]
            plain = two.unit.rule is not None and not static
            bits = 0 if plain else sum(1 << i for i, flag in enumerate(flags) if flag)
            if bits:
                layouts.setdefault(name, {})[index] = bits  # type: ignore[index]
    if problems:
        raise UnsupportedModelError(list(dict.fromkeys(problems)))
    return (tapped(model, units, x, 2, layouts) if any(b & 1 for bits in layouts.values() for b in bits.values()) else calls), layouts


def hands_no_batch(unit: Unit, shape: tuple[int, ...]) -> str:
    """The sentence for a float tensor that a bare unit hands to a layer below it, where its first axis is not the batch."""
    return (
        f"layer {unit.name!r} ({type(unit.layer).__name__}): it owns variables and calls a layer below it with a tensor of shape {shape}, "
        f"where examples cannot be told apart; give that tensor a first axis of 1."
    )


def expandable(unit: Unit) -> bool:
    """Whether a layer that was called without a batch axis may be treated as if it had been called once for each example."""
    return (unit.rule is None and not unit.bare) or isinstance(unit.layer, keras.layers.Dense | keras.layers.Embedding)


def graph_order(model: Any) -> dict[int, int]:
    """Layer id -> rank of a functional model's layers in the order of a depth-first walk, one branch after the other.

    Keras runs parallel branches in step with each other, where the same model written as code runs one after the other, as torch does;
    plans of both are compared. Empty for a model without a graph.
    """
    ranks: dict[int, int] = {}
    seen: set[int] = set()
    stack = [(tensor, False) for tensor in reversed(tf.nest.flatten(getattr(model, "outputs", None) or []))]
    while stack:
        tensor, done = stack.pop()
        operation, index, _ = tensor._keras_history
        node = operation._inbound_nodes[index]
        if done:
            below = children(operation) if hasattr(operation, "_flatten_layers") else ()
            for layer in below:
                ranks.setdefault(id(layer), len(seen))
            seen.add(id(node))
        elif id(node) not in seen:
            stack.append((tensor, True))
            stack += [(parent, False) for parent in reversed(node.input_tensors)]
    return ranks


def layer_info(unit: Unit, calls: list[Call], num_params: int) -> LayerInfo:
    """The facts of one layer; a layer that is never called still receives noise, so it has facts too."""
    params = tuple(dict.fromkeys(unit.identifiers.values()))
    if not calls or (unit.rule is None and not unit.recurrent):
        return LayerInfo(unit.name, GENERIC, 1, 1, num_params, num_params, params, len(calls))
    if unit.rule is None:
        facts: list[dict[str, Any]] = [recurrent_facts(unit.layer, call.input) for call in calls]
    else:
        facts = [unit.rule.facts(unit.layer, call.input, call.outputs[0]) for call in calls]
    folds = [call.outputs[0].shape[0] // call.batch for call in calls]
    positions = sum(f["positions"] * fold for f, fold in zip(facts, folds, strict=True))
    attrs = dict(facts[0].get("attrs", {}))
    if "padded" in attrs:
        attrs["padded"] = sum(f["attrs"]["padded"] * fold for f, fold in zip(facts, folds, strict=True))
    kind = LINEAR if unit.rule is None else unit.kind
    fan_in, fan_out = facts[0]["fan_in"], facts[0]["fan_out"]
    return LayerInfo(unit.name, kind, positions, fan_in, fan_out, num_params, params, len(calls), attrs)
