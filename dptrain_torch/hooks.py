"""Tap a model: what each trainable layer received, and the cotangent at its output. Nothing stays on the user's objects.

The tap registers forward hooks, and removes them when the forward pass is over. Cotangents arrive in one call of
``torch.autograd.grad`` with respect to the layers' outputs, so autograd computes no weight gradient at all. Each cotangent is handed
over as it appears: a pre-hook on the autograd node that made the output sees it before the node runs, even if the output was
overwritten in place afterwards (pitfalls.md G12). Only nodes that nothing trainable feeds do not run by themselves; their
cotangents are what is asked of ``grad``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dptrain.errors import ConfigError, UnsupportedModelError
from dptrain.info import EMBEDDING, GENERIC, LayerInfo
from dptrain_torch.bare import BareCall, Watch, open_to_modes
from dptrain_torch.recurrent import Carried, Uses, is_recurrent, recurrent_uses, tensors_given
from dptrain_torch.rules import Rule, batch_axis, generic_uses, mixes_examples, rule_for
from dptrain_torch.uses import DirectUse, Use, wide

# Facts that ``describe`` finds out and later passes follow: names of ``LayerInfo.attrs``, each present only where it is not 0.
BARE, AXIS, STATIC, SHARED, WHOLE = "bare", "batch_axis", "static", "shared", "whole"
ANOTHER_BATCH = "the loss reaches a forward pass over another number of examples; call the model on equally many each time."
FIRST_CALLS = 3  # calls whose outputs are kept for checks: their cotangents show whether examples are mixed anywhere above them


@dataclass(frozen=True)
class Unit:
    """A module that is tapped as a whole.

    Args:
        name: dotted path in the model, ``model`` for the root.
        module: the module.
        rule: the row of its class, or None for the slow method.
        params: relative name -> name in ``model.named_parameters()``, trainable ones only.
        bare: how its own parameters meet the examples (``Watch.signature``), where no row of its class says so; the modules inside it
            are units of their own. None for any other unit.
        axis: the axis of its inputs and outputs that holds the examples.
        static: it is computed from parameters and constants alone, so that its output has no batch axis (a table of biases).
        shared: bit i says that argument i of a module tapped as a whole is the same for all examples.
        recurrent: ``recurrent_uses`` gives its uses.
        root: the model.
    """

    name: str
    module: nn.Module
    rule: Rule | None
    params: dict[str, str]
    bare: int | None = None
    axis: int = 0
    static: bool = False
    shared: int = 0
    recurrent: bool = False
    root: nn.Module | None = None

    @property
    def kind(self) -> str:
        """Kind of layer, for the planner."""
        return self.rule.kind if self.rule else GENERIC

    @property
    def whole(self) -> bool:
        """Whether the slow method takes the module with everything in it."""
        return self.rule is None and self.bare is None

    @property
    def bias_only(self) -> bool:
        """Whether the cotangent is all that its parameters need, so that no input is kept."""
        return self.rule is not None and self.rule.bias is not None and set(self.params) == {"bias"}


@dataclass(eq=False)
class Call:
    """One call of a unit in the forward pass."""

    unit: Unit
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]  # shapes and edges only; values may be overwritten later
    versions: list[tuple[Tensor, int]]
    batch: int
    constant: bool = False  # called without any tensor that depends on the examples
    shape: tuple[int, ...] | None = None  # of the output, where its one row was expanded to the batch
    cotangents: list[Tensor | None] = field(default_factory=list)
    result: tuple[Tensor, int] | None = None  # the first output of a recurrent unit, and its version
    below: list[Tensor] | None = None  # cotangents of what a recurrent unit was called with, once ``uses`` has run

    @property
    def names(self) -> list[str]:
        """The parameters, one entry for each use that ``uses`` will give."""
        return list(self.unit.params.values())

    def uses(self) -> dict[str, Use]:
        """Parameter name -> use."""
        unit = self.unit
        again = self.recurrent_uses() if unit.recurrent and not unit.shared else None
        if again is not None:
            by_role, self.below = again
        elif unit.rule is None:
            by_role = generic_uses(unit.module, list(unit.params), self.args, self.kwargs, self.cotangents, unit.shared)
        else:
            cotangent = self.cotangents[0]
            assert cotangent is not None
            if unit.bias_only:
                assert unit.rule.bias is not None
                by_role = {"bias": DirectUse(unit.rule.bias(unit.module, cotangent.movedim(unit.axis, 0)))}
            elif unit.rule.whole is not None:
                by_role = unit.rule.whole(unit.module, self.args, self.kwargs, wide(cotangent))
            else:
                by_role = unit.rule.uses(unit.module, self.input.movedim(unit.axis, 0), cotangent.movedim(unit.axis, 0))
        rows = next(g.shape[row_axis(unit, i)] for i, g in enumerate(self.cotangents) if g is not None)
        if rows != self.batch:
            by_role = {role: use.fold(self.batch) for role, use in by_role.items()}
        return {name: by_role[role] for role, name in unit.params.items()}

    def recurrent_uses(self) -> Uses | None:
        """What ``recurrent_uses`` says of a recurrent unit, from what it put out where nothing has been written over that since."""
        result, version = self.result or (None, 0)
        states = result if result is not None and result._version == version else None
        return recurrent_uses(self.unit.module, self.args, self.kwargs, self.cotangents, states)

    @property
    def input(self) -> Tensor:
        """The first tensor the layer was called with."""
        found = next((x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)), None)
        assert found is not None
        return found.detach()


def row_axis(unit: Unit, position: int) -> int:
    """The axis of an output of a unit that holds the examples."""
    return unit.axis or batch_axis(unit.module, position)


def check_unchanged(call: Call | BareCall) -> None:
    """Raise if an input was overwritten after the layer read it."""
    if any(x._version != version for x, version in call.versions):
        raise UnsupportedModelError(
            [f"layer {call.unit.name!r}: its input was changed in place after the layer read it; set inplace=False there"]
        )


def find_units(model: nn.Module, layers: Iterable[LayerInfo] = ()) -> list[Unit]:
    """The modules to tap, every trainable parameter of the model in one of them.

    Args:
        model: any module.
        layers: facts that ``describe`` found, which the units follow.
    Returns:
        Units in the order of ``named_modules``.
    Raises:
        UnsupportedModelError: lists every layer that mixes examples or has settings that cannot be handled.
    """
    known = {layer.name: layer.attrs for layer in layers}
    units = units_of(model, {name for name, attrs in known.items() if WHOLE in attrs})
    return [
        replace(
            unit,
            bare=None if unit.bare is None else known[unit.name].get(BARE, 0),
            axis=known[unit.name].get(AXIS, 0),
            static=bool(known[unit.name].get(STATIC, 0)),
            shared=known[unit.name].get(SHARED, 0),
        )
        if unit.name in known
        else unit
        for unit in units
    ]


def units_of(model: nn.Module, whole: Container[str] = ()) -> list[Unit]:
    """The modules to tap, those named in ``whole`` by the slow method.

    Args:
        model: any module.
        whole: names of modules.
    Returns, Raises:
        As ``find_units``.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    units: list[Unit] = []
    problems: list[str] = []
    inside: set[int] = set()
    for path, module in model.named_modules():
        shown = path or "model"
        sentence = mixes_examples(module)
        if sentence:
            problems.append(f"layer {shown!r}: {sentence}.")
            inside.add(id(module))
        if id(module) in inside:
            continue
        rule = None if shown in whole else rule_for(module)
        slow = shown in whole or (rule is None and must_be_whole(module))
        own = {k: p for k, p in module.named_parameters(recurse=slow) if p.requires_grad}
        if slow:
            inside.update(id(child) for child in module.modules())
        if not own:
            continue
        if rule is not None and (sentence := rule.problem(module)):
            problems.append(f"layer {shown!r}: {sentence}.")
        if slow and any(random_rate(m) > 0 for m in module.modules() if m.training):
            problems.append(
                f"layer {shown!r}: {type(module).__name__} has no fast rule and drops units at random inside, so its gradient "
                "cannot be rebuilt; set its dropout to 0."
            )
        params = {k: names[id(p)] for k, p in own.items()}
        bare = 0 if rule is None and not slow else None
        units.append(Unit(shown, module, rule, params, bare, recurrent=slow and is_recurrent(module), root=model))
    if problems:
        raise UnsupportedModelError(problems)
    return units


def must_be_whole(module: nn.Module) -> bool:
    """Whether the parameters of a module without a row are read where no function of Python's sees them, or replaced before a call."""
    own = any(p.requires_grad for p in module.parameters(recurse=False))
    hooked = own and bool(module._forward_pre_hooks or module._forward_hooks)
    return hooked or is_parametrized(module) or isinstance(module, nn.RNNBase | nn.RNNCellBase)


def random_rate(module: nn.Module) -> float:
    """Probability with which a module drops units in training."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return float(module.p)
    rate = getattr(module, "dropout", 0.0)
    return float(rate) if isinstance(rate, int | float) else 0.0


class Tap:
    """Records the calls of units during one forward pass, and hands over their cotangents during one backward pass.

    Args:
        units: the units to record.
        batch: examples B in the pass.
        first: calls whose outputs are kept; of the others there remain shapes and edges, since what follows may not need the values.
    """

    def __init__(self, units: list[Unit], batch: int, first: int = FIRST_CALLS) -> None:
        self.units, self.batch, self.first = units, batch, first
        self.calls: list[Call | BareCall] = []
        self.watch: Watch | None = None
        self.adopted: set[str] = set()  # units that made a table for all examples
        self.failed: dict[str, str] = {}  # parameter -> function that uses it and cannot be followed
        self._edges: list[tuple[Call | BareCall, int, Any]] = []
        self._hooks: list[Any] = []
        self._arrivals: list[Any] = []
        self._sink: Callable[[Any], None] = lambda call: None
        self.running = self.retains = False  # whether its backward pass is running, and keeps the graph
        self._mark = object()  # on the nodes of autograd that a tapped call made, and False on those that nothing tapped feeds

    def __enter__(self) -> Tap:
        watched = any(unit.bare is not None or unit.static for unit in self.units)
        tapped = [unit for unit in self.units if unit.bare is None and not unit.static]
        if watched:  # from the outermost hook on, so that a layer's own hooks are followed too
            self._hooks += [u.module.register_forward_pre_hook(self._suspend, prepend=True) for u in tapped]
        self._hooks += [u.module.register_forward_hook(self._hook(u), with_kwargs=True) for u in tapped]
        if watched:
            self._hooks += [u.module.register_forward_hook(self._resume, always_call=True) for u in tapped]
            self.watch = watch_of(self.units, self.batch, self._record)
            self.watch.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.watch is not None:
            self.watch.__exit__(None, None, None)
            self.failed |= self.watch.failed
            if not any(exc):
                self.check_signature()

    def check_signature(self) -> None:
        """Refuse a pass in which parameters meet the examples in another way than in those that the plan was made from.

        Raises:
            ConfigError: the size of the batch changes it: a dimension of the model happens to have that size too.
            UnsupportedModelError: a function came that cannot be followed.
        """
        assert self.watch is not None
        expected = [unit.bare for unit in self.units if unit.bare]
        if expected and self.failed:
            raise UnsupportedModelError(
                [f"parameter {name!r} is used by {function}, which the plan does not know of; make a new plan with the model as it is now."
                 for name, function in self.failed.items()]
            )  # fmt: skip
        if self.batch > 1 and expected and self.watch.signature not in expected:
            raise ConfigError(
                f"A batch of {self.batch} examples cannot be told from a dimension of the model that has the same size (or the model has "
                "changed since it was described); choose another physical batch size, or make a new plan."
            )

    def _suspend(self, module: nn.Module, args: Any) -> None:
        assert self.watch is not None
        self.watch.depth += 1

    def _resume(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self.watch is not None
        self.watch.depth -= 1

    def _record(self, call: BareCall) -> None:
        self.calls.append(call)
        self._watch(call, any(map(self._descends, call.given)))

    def forget(self, stale: set[int]) -> None:
        """Drop calls, given by ``id``, that the loss will not be traced back to."""
        self.calls = [call for call in self.calls if id(call) not in stale]
        self._edges = [edge for edge in self._edges if id(edge[0]) not in stale]

    def _hook(self, unit: Unit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            leaves = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
            outputs = [z for z in tree_flatten(output)[0] if isinstance(z, Tensor)]
            if not torch.is_grad_enabled() or not any(z.requires_grad for z in outputs):
                return None  # the loss cannot depend on a parameter through this call
            result = None
            constant = self.watch is not None and bool(leaves) and self.watch.knows(leaves)
            single = bool(unit.rule and self.batch > 1 and outputs[0].dim() > 1 and outputs[0].shape[0] == 1 and unit.axis == 0)
            if single and constant and unit.kind != EMBEDDING:  # one table for all examples, computed by layers
                assert self.watch is not None
                self.watch.adopt(outputs, leaves, unit.params.values())
                self.adopted.add(unit.name)
                return None
            shape = tuple(outputs[0].shape) if single else None
            if single:
                # Broadcast over the batch afterwards, as position embeddings are (G9): the same values, one row per example.
                result = outputs[0].expand(self.batch, *outputs[0].shape[1:])
                outputs = [result]
                args = tuple(x.expand(self.batch, *x.shape[1:]) if isinstance(x, Tensor) and x.shape[0] == 1 else x for x in args)
                kwargs = {
                    k: x.expand(self.batch, *x.shape[1:]) if isinstance(x, Tensor) and x.dim() and x.shape[0] == 1 else x
                    for k, x in kwargs.items()
                }
            if unit.rule is None and len(outputs) > 1:  # one output may be computed from another: their cotangents are to be apart
                flat, spec = tree_flatten(output)
                flat = [z.view_as(z) if isinstance(z, Tensor) and z.requires_grad else z for z in flat]
                result, outputs = tree_unflatten(flat, spec), [z for z in flat if isinstance(z, Tensor)]
            fed, versions = any(map(self._descends, leaves)), [(x, x._version) for x in leaves]
            if unit.bias_only:
                args, kwargs, versions = tree_map(hollow, args), tree_map(hollow, kwargs), []
            call = Call(unit, args, kwargs, outputs, versions, self.batch, constant, shape)
            if unit.recurrent:  # its states are what it put out
                call.result = (outputs[0].detach(), outputs[0]._version)
            self.calls.append(call)
            inputs = tensors_given(module, args, kwargs) if unit.recurrent and not unit.shared and fed else None
            if inputs is not None:
                outputs = call.outputs = self._carry(call, inputs)
                rest = iter(outputs)
                flat, spec = tree_flatten(output)
                result = tree_unflatten([next(rest) if isinstance(z, Tensor) else z for z in flat], spec)
            else:
                self._watch(call, fed)
            if len(self.calls) > self.first:
                call.outputs = [hollow(z).requires_grad_(z.requires_grad) for z in outputs]
            return result

        return hook

    def _descends(self, x: Tensor) -> bool:
        """Whether autograd runs the node of a call of ``x`` anyway, on its way to an earlier call.

        To ask whether ``x`` requires a gradient is not enough: nobody asks for that of a tensor of the user's own.
        """
        ahead, seen = [x.grad_fn], set[Any]()
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            metadata: Any = node.metadata
            known = metadata.get(self._mark)
            if known:
                return True
            seen.add(node)
            if known is None:
                ahead.extend(before for before, _ in node.next_functions)
        for node in seen:
            node.metadata[self._mark] = False  # no later walk needs to come this way
        return False

    def _carry(self, call: Call, inputs: list[Tensor]) -> list[Tensor]:
        """The outputs of a recurrent call, whose cotangents are handed over by a node that passes on those of its inputs (``Carried``).

        Other backward passes through it are torch's own.
        """
        taps, calls, native = weakref.ref(self), weakref.ref(call), call.outputs
        weights = [p for p in call.unit.module.parameters() if p.requires_grad]
        given = [*inputs, *weights]

        def back(cotangents: list[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
            tap, arrived = taps(), calls()
            if tap is None or not tap.running:
                return plain_backward(native, given, cotangents, needed)
            if arrived is None:
                raise UnsupportedModelError([ANOTHER_BATCH])
            with torch._C.DisableTorchFunction():
                tap._deliver(arrived, cotangents)
                below = arrived.below
                if below is None:  # nobody has asked for the uses
                    arrived.cotangents = cotangents
                    found = arrived.recurrent_uses()
                    assert found is not None
                    below = found[1]
                arrived.cotangents, arrived.below = [], None
            if not tap.retains:
                native.clear()
            rows = [g.to(x.dtype) if need else None for g, x, need in zip(below, inputs, needed, strict=False)]
            return [*rows, *[None] * len(weights)]

        outputs = list(Carried.apply(native, back, *given))  # type: ignore[no-untyped-call]
        self._own(call, outputs)
        return outputs

    def _own(self, call: Call | BareCall, outputs: list[Tensor]) -> None:
        """Make room for the cotangents of a call, and mark the nodes that made its outputs."""
        call.cotangents = [None] * len(outputs)
        for z in outputs:
            if z.grad_fn is not None:
                metadata: Any = z.grad_fn.metadata
                metadata[self._mark] = True

    def _watch(self, call: Call | BareCall, fed: bool) -> None:
        """Arrange for the cotangents of a call; ``fed`` says that autograd runs the node anyway on its way to earlier layers."""
        self._own(call, call.outputs)
        if not fed or (isinstance(call, Call) and call.unit.rule is None):
            self._edges += [(call, i, get_gradient_edge(z)) for i, z in enumerate(call.outputs) if z.requires_grad]
            return
        edge = get_gradient_edge(call.outputs[0])
        # The closure must hold neither the node, which holds the closure, nor what holds the node: no collector sees that circle, and a
        # pass that is never taken backwards would stay in memory for good. The tap and its calls live as long as cotangents are wanted.
        place, taps, calls = edge.output_nr, weakref.ref(self), weakref.ref(call)

        def arrive(gradients: tuple[Tensor | None, ...]) -> None:
            tap, arrived = taps(), calls()
            if tap is None or not tap.running:
                return  # someone else's backward pass
            if arrived is None:
                raise UnsupportedModelError([ANOTHER_BATCH])
            with torch._C.DisableTorchFunction():  # thousands of small operations, which the watch would be told of one by one
                tap._deliver(arrived, [gradients[place]])

        self._arrivals.append(edge.node.register_prehook(arrive))

    @contextmanager
    def replay(self) -> Iterator[Callable[..., Any]]:
        """Let what activation checkpointing recomputes be computed as it was in the forward pass (pitfalls.md G13).

        Yields ``torch.autograd.grad``, to be used for the backward pass.
        """
        if self.watch is None:
            yield torch.autograd.grad
            return
        tapped = [unit for unit in self.units if unit.bare is None and not unit.static]
        hooks: list[Any] = [u.module.register_forward_pre_hook(self._suspend, prepend=True) for u in tapped]
        hooks += [u.module.register_forward_hook(self._resume, always_call=True) for u in tapped]
        self.watch.record = lambda call: None
        try:
            with self.watch:
                yield open_to_modes(torch.autograd.grad)
        finally:
            for hook in hooks:
                hook.remove()

    def _deliver(self, call: Call | BareCall, cotangents: list[Tensor | None]) -> None:
        call.cotangents = [None if g is None else g.detach() for g in cotangents]
        if isinstance(call, Call):
            for i, g in enumerate(call.cotangents):
                if g is not None and not has_batch(call.unit, i, g, self.batch):
                    raise UnsupportedModelError([no_batch_axis(call.unit, tuple(g.shape), self.batch)])
        check_unchanged(call)
        call.outputs = []
        if any(g is not None for g in call.cotangents):
            self._sink(call)
        call.cotangents = []

    def backward(self, total: Tensor, sink: Callable[[Any], None], retain_graph: bool = False) -> None:
        """One backward pass from a scalar to the tapped outputs, which computes no gradient of any parameter.

        Args:
            total: sum of the per-example losses.
            sink: called with each call as its cotangents become known; it must not keep the call.
            retain_graph: keep the graph for a second pass.
        """
        self._sink = sink
        edges = [edge for _, _, edge in self._edges]
        if not edges:
            return
        self.running, self.retains = True, retain_graph
        try:
            with self.replay() as grad:
                gradients: list[Tensor | None] = list(grad(total, edges, allow_unused=True, retain_graph=retain_graph))
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise UnsupportedModelError(
                ["activation checkpointing with use_reentrant=True hides its layers; set use_reentrant=False."]
            ) from None
        finally:
            self.running = False
            for hook in self._arrivals:  # never from inside a hook: autograd is iterating over them there
                hook.remove()
            self._arrivals = []
        by_call: dict[int, list[int]] = {}
        for position, (call, _, _) in enumerate(self._edges):
            by_call.setdefault(id(call), []).append(position)
        for positions in reversed(list(by_call.values())):
            call = self._edges[positions[0]][0]
            cotangents: list[Tensor | None] = [None] * len(call.outputs)
            for position in positions:
                cotangents[self._edges[position][1]] = gradients[position]
                gradients[position] = None
            self._deliver(call, cotangents)


def plain_backward(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """What autograd says of the inputs of a call, None where no cotangent is needed."""
    pairs = [(z, g) for z, g in zip(outputs, cotangents, strict=True) if g is not None]
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    found = torch.autograd.grad(
        [z for z, _ in pairs], wanted, [g for _, g in pairs], retain_graph=True, create_graph=torch.is_grad_enabled(), allow_unused=True
    )
    rest = iter(found)
    return [next(rest) if need else None for need in needed]


def hollow(x: Any) -> Any:
    """A tensor of the same shape that holds nothing."""
    return x.new_empty(()).expand(x.shape) if isinstance(x, Tensor) else x


def watch_of(units: list[Unit], batch: int, record: Callable[[BareCall], None]) -> Watch:
    """The mode that follows the parameters of a model's units; everything else that the modules hold is a constant."""
    root = units[0].root
    held = dict(root.named_parameters()) if root is not None else {}
    owners: dict[str, Unit] = {}
    for unit in units:
        for name in unit.params.values():
            owners.setdefault(name, unit)
    return Watch(constants_of(root), {name: held[name] for name in owners}, owners, batch, record)


def constants_of(model: nn.Module | None) -> list[Tensor]:
    """Tensors that the modules hold before a pass begins, trainable parameters apart."""
    if model is None:
        return []
    frozen = [p for p in model.parameters() if not p.requires_grad]
    attributes = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return [*frozen, *model.buffers(), *attributes]


def has_batch(unit: Unit, position: int, output: Tensor, batch: int) -> bool:
    """Whether an output has the examples where they are expected, ``k`` rows for each."""
    axis = row_axis(unit, position)
    return output.dim() > axis and output.shape[axis] > 0 and output.shape[axis] % batch == 0


def no_batch_axis(unit: Unit, shape: tuple[int, ...], batch: int) -> str:
    """The sentence for an output whose first axis is not the batch."""
    return (
        f"layer {unit.name!r} ({type(unit.module).__name__}): its output has shape {shape} for a batch of {batch}, so examples cannot be "
        f"told apart; give it inputs whose first axis is the batch (batch_first=True, ids expanded to [B, T])."
    )
