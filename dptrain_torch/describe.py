"""Facts about a model for the planner, from one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dptrain.errors import UnsupportedModelError
from dptrain.info import GENERIC, LayerInfo, ModelInfo
from dptrain_torch.gradients import batch_size, call_model, trainable
from dptrain_torch.hooks import Call, Tap, Unit, find_units, has_batch, no_batch_axis


def describe(model: nn.Module, x: Any) -> ModelInfo:
    """The facts of every layer with trainable parameters, in the order of their first call.

    Args:
        model: any module; left as it was.
        x: a batch of inputs; only shapes matter.
    Returns:
        Facts.
    Raises:
        UnsupportedModelError: lists every layer that cannot be handled.
    """
    if not trainable(model):
        raise UnsupportedModelError(["no parameter is trainable; unfreeze a layer."])
    units, size = find_units(model), batch_size(x)
    with torch.enable_grad(), Tap(units, size) as tap:
        call_model(model, x)
    return facts_of_calls(model, units, tap.calls, size)


def facts_of_calls(model: nn.Module, units: list[Unit], seen: list[Call], size: int) -> ModelInfo:
    """The facts of every layer, from what a tap has seen of a forward pass.

    Args:
        model: the model.
        units: the modules that were tapped.
        seen: their calls.
        size: examples B in the pass.
    Returns:
        Facts.
    Raises:
        UnsupportedModelError: an output has no batch axis.
    """
    calls: dict[str, list[Call]] = {}
    for call in seen:
        calls.setdefault(call.unit.name, []).append(call)
    problems = [
        no_batch_axis(call.unit, tuple(z.shape), size)
        for call in seen
        for i, z in enumerate(call.outputs)
        if z.requires_grad and not has_batch(call.unit.module, i, z, size)
    ]
    if problems:
        raise UnsupportedModelError(list(dict.fromkeys(problems)))
    order = {name: i for i, name in enumerate(calls)}
    units = sorted(units, key=lambda unit: order.get(unit.name, len(order)))
    parameters, seen, layers = trainable(model), set[str](), []
    for unit in units:
        own = [name for name in dict.fromkeys(unit.params.values()) if name not in seen]
        seen.update(own)
        count = sum(parameters[name].numel() for name in own)
        layers.append(layer_info(unit, calls.get(unit.name, []), count))
    return ModelInfo(tuple(layers))


def layer_info(unit: Unit, calls: list[Call], num_params: int) -> LayerInfo:
    """The facts of one layer; a layer that is never called still receives noise, so it has facts too."""
    params = tuple(dict.fromkeys(unit.params.values()))
    if unit.rule is None or not calls:
        return LayerInfo(unit.name, GENERIC, 1, 1, num_params, num_params, params, len(calls))
    facts = [unit.rule.facts(unit.module, call.input, call.outputs[0]) for call in calls]
    positions = sum(f["positions"] for f in facts)
    attrs = dict(facts[0].get("attrs", {}))
    if "padded" in attrs:
        attrs["padded"] = sum(f["attrs"]["padded"] for f in facts)
    return LayerInfo(unit.name, unit.kind, positions, facts[0]["fan_in"], facts[0]["fan_out"], num_params, params, len(calls), attrs)
