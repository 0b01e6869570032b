"""Facts about a model for the planner, from one forward pass."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from dptrain.errors import UnsupportedModelError
from dptrain.info import GENERIC, LayerInfo, ModelInfo
from dptrain_tf.gradients import batch_size, call_model, trainable
from dptrain_tf.hooks import Call, Tap, Unit, find_units, no_batch_axis
from dptrain_tf.rules import children


def tensors(x: Any) -> Any:
    """Arrays of a batch as tensors."""
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
    units, size = find_units(model), batch_size(x)
    with Tap(units, size) as tap:
        call_model(model, x, training=False)
    calls: dict[str, list[Call]] = {}
    for call in tap.calls:
        calls.setdefault(call.unit.name, []).append(call)
    problems = [
        no_batch_axis(call.unit, tuple(z.shape), size)
        for call in tap.calls
        for z in call.outputs
        if z.shape.rank == 0 or z.shape[0] != size
    ]
    if problems:
        raise UnsupportedModelError(list(dict.fromkeys(problems)))
    order, graph = {name: i for i, name in enumerate(calls)}, graph_order(model)
    units = sorted(units, key=lambda unit: (unit.name not in order, graph.get(id(unit.layer), 0), order.get(unit.name, 0)))
    parameters, seen, layers = trainable(model), set[str](), []
    for unit in units:
        own = [name for name in dict.fromkeys(unit.params.values()) if name not in seen]
        seen.update(own)
        count = sum(math.prod(parameters[name].shape) for name in own)
        layers.append(layer_info(unit, calls.get(unit.name, []), count))
    return ModelInfo(tuple(layers))


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
    if unit.rule is None or not calls:
        return LayerInfo(unit.name, GENERIC, 1, 1, num_params, num_params, params, len(calls))
    facts = [unit.rule.facts(unit.layer, call.input, call.outputs[0]) for call in calls]
    positions = sum(f["positions"] for f in facts)
    attrs = dict(facts[0].get("attrs", {}))
    if "padded" in attrs:
        attrs["padded"] = sum(f["attrs"]["padded"] for f in facts)
    return LayerInfo(unit.name, unit.kind, positions, facts[0]["fan_in"], facts[0]["fan_out"], num_params, params, len(calls), attrs)
