"""Tap a model: what each trainable layer received, and the cotangent at its output. Nothing stays on the user's objects.

The tap shadows ``call`` on the layers' instances, and uncovers it when the forward pass is over. ``Layer.__call__`` has resolved
masks, ``training`` and autocasting by then, and every kind of model goes through it. A fused activation is taken out during the
call and applied after the tap. Cotangents arrive in one call of ``GradientTape.gradient`` with respect to the layers' outputs; the
tape watches nothing else, so no weight gradient is computed at all.

A layer that owns variables AND has layers below it (a class token in a model) is a *bare* unit: the layers below it are tapped by
themselves, and what is left of its ``call`` is cut off at their inputs and outputs (``Frame``), to be replayed for one example at a time.

Where the first axis of a tensor is not the batch is a matter of shapes, which one pass cannot tell: a position table of 8 rows looks like
a batch of 8. ``describe`` runs two batch sizes and writes what it found into the plan (``Layout``); without it, a first axis that B
divides is taken for B examples, outermost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from tensorflow import Tensor

from dptrain.errors import UnsupportedModelError
from dptrain.info import CONV, GENERIC, LayerInfo
from dptrain_tf.bare import Frame, as_tensor, is_float
from dptrain_tf.recurrent import Called, given_to, is_recurrent, recurrent_uses
from dptrain_tf.rules import (
    WHOLE,
    Rule,
    below_of,
    children,
    fold_of,
    mixes_examples,
    random_rate,
    role_of,
    rule_for,
)
from dptrain_tf.uses import column

# Roles of variables of layers without a rule, by the variable's own name; other names are their own role.
ROLE_NAMES = {
    "kernel": "weight", "depthwise_kernel": "weight", "embeddings": "weight", "gamma": "weight", "scale": "weight", "beta": "bias",
}  # fmt: skip
ABSENT = object()
LAYOUT = "static."  # prefix of attributes of ``LayerInfo``, followed by the index of the call
Layout = Mapping[int, int]  # call -> bits: 0 for an output without a batch axis, i + 1 for ``leaves[i]``


@dataclass(frozen=True)
class Unit:
    """A layer that is tapped as a whole.

    Args:
        name: dotted path in the model, ``model`` for the root.
        layer: the layer.
        rule: the row of its class, or None for the slow method.
        params: role -> name in ``trainable``, trainable ones only.
        variables: role -> variable.
        identifiers: role -> ``layer.role``; a tied variable carries its first owner's identifier.
        bare: the variables are the layer's own alone; the layers below it are units of their own.
        recurrent: ``recurrent_uses`` gives its uses.
    """

    name: str
    layer: Any
    rule: Rule | None
    params: dict[str, str]
    variables: dict[str, Any]
    identifiers: dict[str, str]
    bare: bool = False
    recurrent: bool = False

    @property
    def kind(self) -> str:
        """Kind of layer, for the planner."""
        return self.rule.kind if self.rule else GENERIC


@dataclass(eq=False)
class Call:
    """One call of a unit in the forward pass."""

    unit: Unit
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    outputs: list[Tensor]  # as the tape watches them
    tape: tf.GradientTape | None = None  # from the weight to ``own_output``, where the framework's own contraction is wanted
    own_output: Tensor | None = None
    cotangents: list[Tensor | None] = field(default_factory=list)
    batch: int = 0
    static: frozenset[int] = frozenset()  # which tensors of the arguments have no batch axis although B divides their first axis
    expanded: bool = False  # the output has no batch axis, and was given one
    frame: Frame | None = None  # of a bare unit
    below: list[Tensor] | None = None  # cotangents of what a recurrent unit was called with, once its uses are known
    first: tuple[list[int | None], list[tuple[int, ...]]] = ([], [])  # first axes of ``leaves``, shapes of the float outputs

    @property
    def leaves(self) -> list[Any]:
        """Everything the layer was called with, and what the layers below a bare unit returned."""
        return tf.nest.flatten((self.args, self.kwargs, [record[1] for record in self.frame.records] if self.frame else []))

    @property
    def input(self) -> Tensor:
        """The first tensor the layer was called with."""
        return next(x for x in (*self.args, *self.kwargs.values()) if tf.is_tensor(x))

    @property
    def folded(self) -> int:
        """Rows of the cotangent that belong to one example."""
        return next(g.shape[0] for g in self.cotangents if g is not None) // self.batch

    def native(self, role: str) -> Callable[[Tensor], Tensor] | None:
        """The framework's own weighted sum for a parameter; None in low precision, where it would lose the signal."""
        tape, output, cotangent = self.tape, self.own_output, self.cotangents[0]
        if tape is None or output is None or cotangent is None or output.dtype not in (tf.float32, tf.float64):
            return None
        value, fold = self.unit.variables[role].value, cotangent.shape[0] // self.batch

        return lambda w: tape.gradient(output, value, cotangent * column(tf.repeat(w, fold) if fold > 1 else w, cotangent))


def layouts_of(layers: Iterable[LayerInfo]) -> dict[str, Layout]:
    """What a plan says about the axes of calls, by the name of the unit."""
    found: dict[str, Layout] = {}
    for layer in layers:
        bits = {int(name.removeprefix(LAYOUT)): value for name, value in layer.attrs.items() if name.startswith(LAYOUT)}
        if bits:
            found[layer.name] = bits
    return found


def trainable(model: Any) -> dict[str, Any]:
    """The trainable variables by path, a tied one once; a path that two variables share is numbered."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for variable in model.trainable_variables:
        if id(variable) not in seen:
            seen.add(id(variable))
            found[unused(variable.path, found)] = variable
    return found


def unused(name: str, taken: Any) -> str:
    """The name, numbered if it is taken."""
    count = 2
    while (new := name if count == 2 and name not in taken else f"{name}#{count}") in taken:
        count += 1
    return new


def dotted(path: str, root: Any) -> str:
    """A Keras path as a dotted path relative to the root model."""
    return path.removeprefix(f"{root.path or root.name}/").replace("/", ".")


def find_units(model: Any, training: bool = False) -> list[Unit]:
    """The layers to tap, every trainable parameter of the model in one of them.

    Args:
        model: any Keras layer or model that is built.
        training: whether it will be called in training mode.
    Returns:
        Units, parents before children and siblings in their order.
    Raises:
        UnsupportedModelError: lists every layer that mixes examples or has settings that cannot be handled.
    """
    keys = {id(v): key for key, v in trainable(model).items()}
    units: list[Unit] = []
    problems: list[str] = []
    inside: set[int] = set()
    names: set[str] = set()
    owners: dict[int, str] = {}
    for layer in children(model):
        shown = "model" if layer is model else dotted(layer.path or layer.name, model)
        sentence = mixes_examples(layer)
        if sentence:
            problems.append(f"layer {shown!r}: {sentence}.")
            inside.add(id(layer))
        if id(layer) in inside:
            continue
        whole = isinstance(layer, WHOLE)
        own = [v for v in (layer.trainable_variables if whole else layer._trainable_variables) if id(v) in keys]
        if not own:
            continue
        rule = None if whole else rule_for(layer)
        if rule is not None and (sentence := rule.problem(layer)):
            problems.append(f"layer {shown!r}: {sentence}.")
        bare = rule is None and not whole and any(below_of(layer))
        shown = unused(shown, names)
        names.add(shown)
        if rule is not None:
            by_role = {role_of(layer, v) or v.name: v for v in own}
        else:
            by_role = {}
            for v in {id(v): v for v in own}.values():
                *parents, last = v.path.removeprefix(f"{layer.path or layer.name}/").split("/")
                by_role[unused(".".join([*parents, ROLE_NAMES.get(last, last)]), by_role)] = v
            below = [layer] if bare else list(children(layer))
            if whole:  # the layer and everything below it is one unit
                inside.update(id(child) for child in below)
            if training and any((bool(child._seed_generators) if bare else random_rate(child) > 0) for child in below):
                problems.append(
                    f"layer {shown!r}: {type(layer).__name__} has no fast rule and drops units at random inside, so its gradient "
                    "cannot be rebuilt; set its dropout to 0, or drop units in a Dropout layer of its own."
                )
        identifiers = {role: owners.setdefault(id(v), f"{shown}.{role}") for role, v in by_role.items()}
        params = {role: keys[id(v)] for role, v in by_role.items()}
        units.append(Unit(shown, layer, rule, params, by_role, identifiers, bare, whole and is_recurrent(layer)))
    covered = {key for unit in units for key in unit.params.values()}
    if not problems:
        loose = [key for key in keys.values() if key not in covered]
        problems += [f"variable {key!r} belongs to no layer that could be tapped; create it with add_weight." for key in loose]
    if problems:
        raise UnsupportedModelError(problems)
    return units


Sink = Callable[[Call], Iterable[Tensor] | None]


class Tap:
    """Records the calls of units during one forward pass, and hands over their cotangents during one backward pass.

    Args:
        units: the units to record.
        batch: examples B in the pass.
        training: the mode of the pass.
        watch: variables for ``second``, a tape of the same pass that gives weight gradients; None for no such tape.
        layouts: unit name -> what ``describe`` found of the axes of its calls.
    """

    def __init__(
        self,
        units: list[Unit],
        batch: int,
        training: bool = False,
        watch: list[Any] | None = None,
        layouts: Mapping[str, Layout] | None = None,
    ) -> None:
        self.units, self.batch, self.training, self.layouts = units, batch, training, layouts or {}
        self.calls: list[Call] = []
        self.problems: list[str] = []  # raised on leaving: Keras rewrites what is raised inside a call
        self.tape = tf.GradientTape(watch_accessed_variables=False)
        self.second = tf.GradientTape(persistent=True, watch_accessed_variables=False) if watch else None
        self._watch = watch or []
        self._graph = tf.compat.v1.get_default_graph()
        self._tapes = ExitStack()
        self._covered: list[tuple[Any, Any]] = []
        self._frames: list[Frame | None] = []  # of the bare unit whose call runs; None inside of a layer below it
        self._count: dict[str, int] = {}
        self._arrivals = Arrivals(batch)

    def __enter__(self) -> Tap:
        for tape in (self.tape, self.second):
            if tape is not None:
                self._tapes.enter_context(tape)
        if self.second is not None:
            self.second.watch([v.value for v in self._watch])
        for unit in self.units:
            values = [v.value for v in unit.variables.values()]  # here, because inside a layer's call they may be cast
            self._cover(unit.layer, self._shadow(unit, unit.layer.call, values))
        for child in {id(child): child for unit in self.units if unit.bare for child in below_of(unit.layer)}.values():
            self._cover(child, self._record(child, child.call))
        return self

    def _cover(self, layer: Any, call: Callable[..., Any]) -> None:
        self._covered.append((layer, layer.__dict__.get("call", ABSENT)))
        layer.__dict__["call"] = call

    def __exit__(self, *exc: object) -> None:
        while self._covered:
            layer, before = self._covered.pop()
            if before is ABSENT:
                layer.__dict__.pop("call", None)
            else:
                layer.__dict__["call"] = before
        self._tapes.close()
        if self.problems:  # they explain whatever else went wrong
            raise UnsupportedModelError(list(dict.fromkeys(self.problems)))

    def _outside(self, name: str, layer: Any) -> bool:
        """Whether a call runs in another graph than the pass; if so, it is a problem."""
        if tf.compat.v1.get_default_graph() is self._graph:
            return False
        self.problems.append(
            f"layer {name!r} ({type(layer).__name__}) is called inside a loop, a condition or a function of its own, "
            "where its output cannot be tapped; write the loop in Python."
        )
        return True

    def _shadow(self, unit: Unit, call: Callable[..., Any], values: list[Any]) -> Callable[..., Any]:
        def shadow(*args: Any, **kwargs: Any) -> Any:
            if self._outside(unit.name, unit.layer):
                return call(*args, **kwargs)
            args, kwargs = tf.nest.map_structure(as_tensor, (args, kwargs))
            if unit.recurrent and (given := given_to(self._new_call(unit, args, kwargs, [], count=False))) is not None:
                return self._tap_recurrent(unit, call, args, kwargs, given)
            if unit.rule is None:
                return self._tap_generic(unit, call, args, kwargs)
            return self._tap_rule(unit, call, values, args, kwargs)

        return shadow

    def _record(self, child: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        """Cut a layer off from the bare unit that calls it: its float inputs are tapped, its outputs become constants of the replay."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            frame = self._frames[-1] if self._frames else None
            if frame is None or id(child) not in frame.below or self._outside(child.name, child):
                return call(*args, **kwargs)
            leaves = [self._cut(x, frame) if is_float(x) else x for x in map(as_tensor, tf.nest.flatten((args, kwargs)))]
            args, kwargs = tf.nest.pack_sequence_as((args, kwargs), leaves)
            before = len(self.calls)
            self._frames.append(None)
            try:
                output = call(*args, **kwargs)
            finally:
                self._frames.pop()
            own = [done for done in self.calls[before:] if done.unit.layer is child]
            frame.records.append((child, output, bool(own and own[-1].expanded)))
            return output

        return recorded

    def _cut(self, x: Tensor, frame: Frame) -> Tensor:
        frame.shapes.append(tuple(x.shape))
        cut = self._watched(self._broadcast(x))
        frame.inputs.append(cut)
        return cut

    def _new_call(self, unit: Unit, args: Any, kwargs: Any, z: Any, frame: Frame | None = None, count: bool = True) -> Call:
        index = self._count.get(unit.name, 0)
        self._count[unit.name] = index + count
        call = Call(unit, args, kwargs, self.training, [], batch=self.batch, frame=frame)
        first = [x.shape[0] if tf.is_tensor(x) and x.shape.rank else None for x in call.leaves]
        outputs = [tuple(t.shape) for t in tf.nest.flatten(z) if is_float(t)] + (frame.shapes if frame else [])
        call.first = (first, outputs)
        bits = self.layouts.get(unit.name, {}).get(index, 0)
        call.static = frozenset(i for i in range(len(first)) if bits >> (i + 1) & 1)
        call.expanded = bool(bits & 1)
        return call

    def _tap_generic(self, unit: Unit, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = Frame({id(child) for child in below_of(unit.layer)}) if unit.bare else None
        self._frames.append(frame)
        try:
            output = call(*args, **kwargs)
        finally:
            self._frames.pop()
        done = self._new_call(unit, args, kwargs, output, frame)
        leaves = [self._watched(self._broadcast(z, done.expanded)) if is_float(z) else z for z in tf.nest.flatten(output)]
        done.outputs = [z for z in leaves if is_float(z)] + (frame.inputs if frame else [])
        self.calls.append(done)
        return tf.nest.pack_sequence_as(output, leaves)

    def _tap_recurrent(self, unit: Unit, call: Callable[..., Any], args: Any, kwargs: Any, given: Called) -> Any:
        """The layer's own output, whose cotangents become those of its inputs in the loop that finds those of its gates."""
        with self.tape.stop_recording():
            output = call(*args, **kwargs)
        done = self._new_call(unit, args, kwargs, output)
        values = tf.nest.flatten(output)
        found = self._arrivals.carry(values, given, len(self.calls), lambda: call(*args, **kwargs))
        done.outputs = [self._watched(z) for z in found]
        for z, value in zip(done.outputs, values, strict=True):
            if getattr(value, "_keras_mask", None) is not None:
                z._keras_mask = value._keras_mask
        self.calls.append(done)
        return tf.nest.pack_sequence_as(output, done.outputs)

    def _tap_rule(self, unit: Unit, call: Callable[..., Any], values: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert unit.rule is not None
        own = unit.layer.__dict__
        activation = own.get("activation")
        inner = tf.GradientTape(persistent=True, watch_accessed_variables=False) if unit.rule.kind == CONV else None
        try:
            if activation is not None:
                own["activation"] = None
            with inner or ExitStack():
                if inner is not None:
                    inner.watch(values)
                z = call(*args, **kwargs)
                done = self._new_call(unit, args, kwargs, z)
                if done.expanded or (self.batch > 1 and z.shape.rank > 1 and z.shape[0] == 1):
                    # Broadcast over the batch, as position embeddings are (G9): the same values, one row per example.
                    z = self._broadcast(z, done.expanded)
                    done.args = tuple(self._broadcast(x, done.expanded) if tf.is_tensor(x) else x for x in args)
        finally:
            if activation is not None:
                own["activation"] = activation
        source = self._watched(z)
        watched = self._arrivals.gate(source, len(self.calls))
        done.outputs, done.tape, done.own_output = [source], inner, z
        self.calls.append(done)
        return watched if activation is None else activation(watched)

    def _broadcast(self, x: Tensor, whole: bool = False) -> Tensor:
        """One row per example of what has no batch axis: of a first axis of 1, or of the whole tensor."""
        if whole:
            return tf.broadcast_to(x[None], [self.batch, *x.shape])
        return tf.broadcast_to(x, [self.batch, *x.shape[1:]]) if self.batch > 1 and x.shape.rank and x.shape[0] == 1 else x

    def _watched(self, z: Tensor) -> Tensor:
        watched = tf.identity(z)
        if getattr(z, "_keras_mask", None) is not None:
            watched._keras_mask = z._keras_mask
        self.tape.watch(watched)
        return watched

    def backward(self, losses: Tensor, seed: Tensor, sink: Sink) -> None:
        """One backward pass from the losses to the tapped outputs, which computes no gradient of any parameter.

        Args:
            losses: per-example losses, computed inside the tap.
            seed: their cotangent.
            sink: called with each call whose cotangents are known; it must not keep the call. It returns what is to be computed before
                the pass goes on.
        """
        sources, arrivals = [call.outputs for call in self.calls], self._arrivals
        arrivals.sink, arrivals.waiting, self.calls = sink, dict(enumerate(self.calls)), []
        gradients = self.tape.gradient(losses, sources, seed)
        if all(g is None for gs in gradients for g in gs):
            raise UnsupportedModelError(["the loss depends on no trainable parameter, so nothing would be trained; unfreeze a layer."])
        for index in sorted(arrivals.waiting, reverse=True):
            arrivals.deliver(arrivals.waiting.pop(index), gradients[index])
            gradients[index] = []


class Arrivals:
    """Hands over cotangents as the backward pass brings them.

    Apart from ``Tap``, since a tape keeps what is called in its backward pass, and a tap its tape: Python could not see that circle, and
    what the tape recorded would never be freed.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.sink: Sink = lambda call: None
        self.waiting: dict[int, Call] = {}  # for their cotangents, by position in ``Tap.calls``

    def gate(self, z: Tensor, index: int) -> Tensor:
        """The same value; its cotangent goes on to earlier layers when what is made of it here is done.

        In a graph nothing else would order the two, and the per-sample gradients of all layers would stand in memory at once.

        Args:
            z: the output of a call.
            index: position of the call.
        """

        @tf.custom_gradient
        def gate(x: Tensor) -> tuple[Tensor, Callable[[Any], Tensor]]:
            def arrive(g: Any) -> Tensor:
                g, call = tf.convert_to_tensor(g), self.waiting.pop(index, None)
                if call is None:  # in a second backward pass
                    return g
                with tf.control_dependencies(self.deliver(call, [g])):
                    return tf.identity(g)

            return tf.identity(x), arrive

        gated = gate(z)
        if getattr(z, "_keras_mask", None) is not None:
            gated._keras_mask = z._keras_mask
        return gated

    def carry(self, values: list[Tensor], given: Called, index: int, again: Callable[[], Any]) -> list[Tensor]:
        """The outputs of a recurrent layer, as functions of what it was called with.

        Args:
            values: the outputs.
            given: what the layer was called with.
            index: position of the call.
            again: calls the layer once more, for a backward pass of others.
        Returns:
            The same values. Their cotangents are handed over, and go on as those of what the layer was called with.
        """

        @tf.custom_gradient
        def carry(*tensors: Tensor) -> tuple[list[Tensor], Callable[..., Any]]:
            def arrive(*cotangents: Any) -> Any:
                gs, call = [tf.convert_to_tensor(g) for g in cotangents], self.waiting.pop(index, None)
                if call is None:
                    with tf.GradientTape() as tape:
                        tape.watch(given.tensors)
                        outputs = tf.nest.flatten(again())
                    return tape.gradient(outputs, given.tensors, gs)
                with tf.control_dependencies(self.deliver(call, gs)):
                    if call.below is None:  # nobody has asked for the uses
                        call.cotangents = gs
                        found = recurrent_uses(call)
                        assert found is not None
                        call.below = found[1]
                    return [tf.identity(g) for g in call.below]

            return [tf.identity(z) for z in values], arrive

        return list(carry(*given.tensors))

    def deliver(self, call: Call, cotangents: list[Any]) -> list[Tensor]:
        """Hand over one call; returns what the backward pass is to wait for."""
        call.cotangents = [None if g is None else tf.convert_to_tensor(g) for g in cotangents]
        for g in call.cotangents:
            if g is not None and (g.shape.rank == 0 or fold_of(g, self.batch) == 0):
                raise UnsupportedModelError([no_batch_axis(call.unit, tuple(g.shape), self.batch)])
        call.outputs = []
        return list(self.sink(call) or ()) if any(g is not None for g in call.cotangents) else []


def no_batch_axis(unit: Unit, shape: tuple[int, ...], batch: int) -> str:
    """The sentence for an output whose first axis is not the batch."""
    return (
        f"layer {unit.name!r} ({type(unit.layer).__name__}): its output has shape {shape} for a batch of {batch}, so examples cannot be "
        f"told apart; give it inputs whose first axis is the batch (ids expanded to [B, T])."
    )
