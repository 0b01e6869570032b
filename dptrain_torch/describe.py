"""Facts about a model for the planner, from two small forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from dptrain.errors import UnsupportedModelError
from dptrain.info import EMBEDDING, GENERIC, LINEAR, NORM, LayerInfo, ModelInfo
from dptrain_torch.bare import BareCall
from dptrain_torch.gradients import trainable
from dptrain_torch.hooks import (
    AXIS,
    BARE,
    SHARED,
    STATIC,
    WHOLE,
    Call,
    Tap,
    Unit,
    has_batch,
    must_be_whole,
    no_batch_axis,
    row_axis,
    units_of,
)  # fmt: skip
from dptrain_torch.recurrent import recurrent_facts
from dptrain_torch.rules import batch_axis

SIZES = (2, 3)  # of the batches that tell what grows with the batch
MOVABLE = (LINEAR, NORM, EMBEDDING)  # kinds whose uses do not care where the examples are; of norms, those over trailing axes


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
    args, kwargs = arguments_of(x)
    units, calls = probe(model, args, kwargs)
    return facts_of_calls(model, units, calls, SIZES[0])


def probe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Unit], list[Call | BareCall]]:
    """The modules to tap with all that is to be known of them, from forward passes over two and over three examples.

    What grows with the batch has rows for the examples; what does not, has none. A module around something that cannot be followed
    becomes one unit for the slow method.

    Args:
        model: any module; random states are left as they were.
        args, kwargs: what it is called with; examples are taken from every tensor whose first axis is the batch.
    Returns:
        Units, and the calls of the pass over two examples.
    Raises:
        UnsupportedModelError: lists every layer that cannot be handled.
    """
    whole: dict[str, str] = {}
    static: set[str] = set()
    second: dict[str, int] = {}  # units whose examples are on axis 1, and whose first axis of size 1 looks like a broadcast batch
    while True:
        units = [replace(unit, static=unit.name in static, axis=second.get(unit.name, 0)) for unit in units_of(model, whole)]
        taps = [tapped(model, units, args, kwargs, size) for size in SIZES]
        findings = Findings(units, taps)
        findings.look()
        found, tables = findings.whole.keys() - whole.keys(), findings.static - static
        moved = {name: axis for name, axis in findings.axes.items() if axis and name in findings.spread and name not in second}
        if not found and not tables and not moved:
            if findings.problems:
                raise UnsupportedModelError(list(dict.fromkeys(findings.problems)))
            return findings.decided(), taps[0].calls
        whole |= {name: findings.whole[name] for name in found}
        static |= tables
        second |= moved


def tapped(model: nn.Module, units: list[Unit], args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> Tap:
    """A tap after a forward pass over some of the examples."""
    count = next((len(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.dim()), 0)
    picks = [i % count for i in range(size)] if count else []

    def some(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != count:
            return x
        return x[torch.tensor(picks, device=x.device)] if count else x.new_zeros((size, *x.shape[1:]))

    args, kwargs = tree_map(some, (args, kwargs))
    with torch.random.fork_rng(), torch.enable_grad(), Tap(units, size) as tap:
        model(*args, **kwargs)
    return tap


class Findings:
    """What two passes over batches of different sizes say of the units.

    Args:
        units: the modules that were tapped.
        taps: what was seen, for each of ``SIZES``.
    """

    def __init__(self, units: list[Unit], taps: list[Tap]) -> None:
        self.units, self.taps = units, taps
        self.problems: list[str] = []
        self.whole: dict[str, str] = {}  # module to be tapped as a whole -> why
        self.static: set[str] = set()
        self.axes: dict[str, int] = {}
        self.spread: set[str] = set()
        self.shared: dict[str, int] = {}

    def look(self) -> None:
        """Fill in everything."""
        calls: list[dict[str, list[Call]]] = []
        for tap in self.taps:
            calls.append({})
            for call in tap.calls:
                if isinstance(call, Call):
                    calls[-1].setdefault(call.unit.name, []).append(call)
        for unit in self.units:
            self.layouts(unit, list(zip(*(found.get(unit.name, []) for found in calls), strict=False)))
        owners = {name: unit for unit in reversed(self.units) for name in unit.params.values()}
        self.static |= {name for tap in self.taps for name in tap.adopted if not any(name in found for found in calls)}
        for tap in self.taps:
            for name, function in tap.failed.items():
                self.enclose(owners[name], f"parameter {name!r} is used by {function}, which cannot be followed")
        marks = [tap.watch.marks for tap in self.taps if tap.watch is not None]
        for function, *names in set.symmetric_difference(*marks) if marks else ():
            if names:
                self.enclose(owners[names[0]], f"parameter {names[0]!r} meets the examples in {function}, depending on the batch size")
            else:
                self.problems.append(f"a constant is expanded by {function} to a size that equals a small batch; build it per example.")

    def layouts(self, unit: Unit, pairs: list[tuple[Call, ...]]) -> None:
        """Where the outputs of a unit hold the examples."""
        for pair in pairs:
            for position in range(len(pair[0].outputs)):
                if any(call.outputs[position].requires_grad for call in pair):
                    self.layout(unit, pair, position)
            if unit.rule is None:
                leaves = [tree_flatten((call.args, call.kwargs))[0] for call in pair]
                bits = sum(
                    1 << i for i, xs in enumerate(zip(*leaves, strict=False)) if isinstance(xs[0], Tensor) and not grows(xs, unit, i)
                )
                self.shared[unit.name] = self.shared.get(unit.name, 0) | bits

    def layout(self, unit: Unit, pair: tuple[Call, ...], position: int) -> None:
        """Where one output of a unit holds the examples."""
        shapes = [call.shape or tuple(call.outputs[position].shape) for call in pair]
        if pair[0].shape:
            self.spread.add(unit.name)
        axes = [batch_axis(unit.module, position)] if unit.rule is None else [0, 1] if unit.kind in MOVABLE else [0]
        axis = next((i for i in axes if scales([shape[i] if len(shape) > i else 0 for shape in shapes])), None)
        if axis is None and all(call.shape for call in pair):
            axis = 0  # one row, which was expanded to the batch
        if axis is not None and (unit.rule is None or self.axes.setdefault(unit.name, axis) == axis):
            return
        watched = self.taps[0].watch is not None
        if unit.rule is not None and axis is None and (pair[0].constant or not watched) and unit.name not in self.static:
            self.static.add(unit.name)
        else:
            self.enclose(unit, no_batch_axis(unit, shapes[0], SIZES[0]))

    def enclose(self, unit: Unit, why: str) -> None:
        """Take the module around a unit as a whole; for a bare unit, the module itself."""
        name = unit.name if unit.bare is not None else parent(unit)
        if name is None:
            self.problems.append(why)
        else:
            self.whole.setdefault(name, why)

    def decided(self) -> list[Unit]:
        """The units with all that was found."""
        watch = self.taps[0].watch
        signature = watch.signature if watch is not None else 0
        return [
            replace(
                unit,
                bare=None if unit.bare is None else signature,
                axis=self.axes.get(unit.name, 0) if unit.rule is not None else 0,
                shared=self.shared.get(unit.name, 0),
            )
            for unit in self.units
        ]


def scales(sizes: Sequence[int]) -> bool:
    """Whether sizes are the same positive multiple of the two batch sizes."""
    return sizes[0] > 0 and all(n % size == 0 and n // size == sizes[0] // SIZES[0] for n, size in zip(sizes, SIZES, strict=True))


def grows(xs: Sequence[Tensor], unit: Unit, position: int) -> bool:
    """Whether an argument of a module tapped as a whole has rows for the examples."""
    axis = batch_axis(unit.module, position)
    return all(x.dim() > axis for x in xs) and scales([x.shape[axis] for x in xs])


def parent(unit: Unit) -> str | None:
    """The nearest module around a unit that is called; None for the model itself."""
    if unit.name == "model" or unit.root is None:
        return None
    path = unit.name.rpartition(".")[0]
    while path and isinstance(unit.root.get_submodule(path), nn.ModuleList | nn.ModuleDict):
        path = path.rpartition(".")[0]
    return path or "model"


def arguments_of(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and keyword arguments of the model."""
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x), {}) if isinstance(x, tuple | list) else ((x,), {})


def facts_of_calls(model: nn.Module, units: list[Unit], tapped: Sequence[Call | BareCall], size: int) -> ModelInfo:
    """The facts of every layer, from what a tap has seen of a forward pass.

    Args:
        model: the model.
        units: the modules that were tapped.
        tapped: their calls.
        size: examples B in the pass.
    Returns:
        Facts.
    Raises:
        UnsupportedModelError: an output has no batch axis.
    """
    calls: dict[str, list[Call | BareCall]] = {}
    for call in tapped:
        calls.setdefault(call.unit.name, []).append(call)
    decided = {unit.name: unit for unit in units}
    problems = [
        no_batch_axis(call.unit, tuple(z.shape), size)
        for call in tapped
        for i, z in enumerate(call.outputs)
        if isinstance(call, Call) and z.requires_grad and not has_batch(decided[call.unit.name], i, z, size)
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
        layers.append(layer_info(unit, calls.get(unit.name, []), count, size))
    return ModelInfo(tuple(layers))


def layer_info(unit: Unit, calls: Sequence[Call | BareCall], num_params: int, size: int) -> LayerInfo:
    """The facts of one layer; a layer that is never called still receives noise, so it has facts too."""
    params = tuple(dict.fromkeys(unit.params.values()))
    chosen = {BARE: unit.bare or 0, AXIS: unit.axis, STATIC: int(unit.static), SHARED: unit.shared}
    chosen[WHOLE] = int(unit.whole and not must_be_whole(unit.module))
    chosen = {name: value for name, value in chosen.items() if value}
    facts = [found for call in calls if (found := call_facts(unit, call, size)) is not None]
    if not facts:
        return LayerInfo(unit.name, GENERIC, 1, 1, num_params, num_params, params, len(calls), chosen)
    positions = sum(f["positions"] for f in facts)
    attrs = {**facts[0].get("attrs", {}), **chosen}
    if "padded" in attrs:
        attrs["padded"] = sum(f["attrs"]["padded"] for f in facts)
    kind = unit.kind if unit.rule is not None else LINEAR
    return LayerInfo(unit.name, kind, positions, facts[0]["fan_in"], facts[0]["fan_out"], num_params, params, len(calls), attrs)


def call_facts(unit: Unit, call: Call | BareCall, size: int) -> dict[str, Any] | None:
    """The facts of one call of a layer with a fast rule, positions counted over all rows of an example."""
    if isinstance(call, BareCall):
        return call.facts
    z = call.outputs[0].movedim(row_axis(unit, 0), 0)
    if unit.rule is not None:
        facts = dict(unit.rule.facts(unit.module, call.input.movedim(unit.axis, 0), z))
    else:
        found = recurrent_facts(unit.module, call.input) if unit.recurrent and not unit.shared else None
        if found is None:
            return None
        facts = found
    rows = len(z) // size
    facts["positions"] *= rows
    if "padded" in facts.get("attrs", {}):
        facts["attrs"] = {**facts["attrs"], "padded": facts["attrs"]["padded"] * rows}
    return facts
