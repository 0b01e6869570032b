"""Tap a model: what each trainable layer received, and the cotangent at its output. Nothing stays on the user's objects.

The tap registers forward hooks, and removes them when the forward pass is over. Cotangents arrive in one call of
``torch.autograd.grad`` with respect to the layers' outputs, so autograd computes no weight gradient at all. Each cotangent is handed
over as it appears: a pre-hook on the autograd node that made the output sees it before the node runs, even if the output was
overwritten in place afterwards (pitfalls.md G12). Only nodes that nothing trainable feeds do not run by themselves; their
cotangents are what is asked of ``grad``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten

from dptrain.errors import UnsupportedModelError
from dptrain.info import GENERIC
from dptrain_torch.rules import Rule, batch_axis, mixes_examples, rule_for


@dataclass(frozen=True)
class Unit:
    """A module that is tapped as a whole.

    Args:
        name: dotted path in the model, ``model`` for the root.
        module: the module.
        rule: the row of its class, or None for the slow method.
        params: relative name -> name in ``model.named_parameters()``, trainable ones only.
    """

    name: str
    module: nn.Module
    rule: Rule | None
    params: dict[str, str]

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
    outputs: list[Tensor]  # shapes and edges only; values may be overwritten later
    versions: list[tuple[Tensor, int]]
    cotangents: list[Tensor | None] = field(default_factory=list)

    @property
    def input(self) -> Tensor:
        """The first tensor the layer was called with."""
        found = next((x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)), None)
        assert found is not None
        return found.detach()

    def check(self) -> None:
        """Raise if an input was overwritten after the layer read it."""
        if any(x._version != version for x, version in self.versions):
            raise UnsupportedModelError(
                [f"layer {self.unit.name!r}: its input was changed in place after the layer read it; set inplace=False there"]
            )


def find_units(model: nn.Module) -> list[Unit]:
    """The modules to tap, every trainable parameter of the model in one of them.

    Args:
        model: any module.
    Returns:
        Units in the order of ``named_modules``.
    Raises:
        UnsupportedModelError: lists every layer that mixes examples or has settings that cannot be handled.
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
        own = {k: p for k, p in module.named_parameters(recurse=is_parametrized(module)) if p.requires_grad}
        if not own:
            continue
        rule = rule_for(module)
        if rule is not None and (sentence := rule.problem(module)):
            problems.append(f"layer {shown!r}: {sentence}.")
        if rule is None:  # the module and everything below it is one unit
            own = {k: p for k, p in module.named_parameters() if p.requires_grad}
            inside.update(id(child) for child in module.modules())
            if any(random_rate(m) > 0 for m in module.modules() if m.training):
                problems.append(
                    f"layer {shown!r}: {type(module).__name__} has no fast rule and drops units at random inside, so its gradient "
                    "cannot be rebuilt; set its dropout to 0."
                )
        units.append(Unit(shown, module, rule, {k: names[id(p)] for k, p in own.items()}))
    if problems:
        raise UnsupportedModelError(problems)
    return units


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
    """

    def __init__(self, units: list[Unit], batch: int) -> None:
        self.units, self.batch = units, batch
        self.calls: list[Call] = []
        self._edges: list[tuple[Call, int, Any]] = []
        self._hooks: list[Any] = []
        self._arrivals: list[Any] = []
        self._sink: Callable[[Call], None] = lambda call: None

    def __enter__(self) -> Tap:
        self._hooks = [u.module.register_forward_hook(self._hook(u), with_kwargs=True) for u in self.units]
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

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
            if unit.rule and self.batch > 1 and outputs[0].dim() > 1 and outputs[0].shape[0] == 1:
                # Broadcast over the batch afterwards, as position embeddings are (G9): the same values, one row per example.
                result = outputs[0].expand(self.batch, *outputs[0].shape[1:])
                outputs = [result]
                args = tuple(x.expand(self.batch, *x.shape[1:]) if isinstance(x, Tensor) and x.shape[0] == 1 else x for x in args)
            self.calls.append(Call(unit, args, kwargs, outputs, [(x, x._version) for x in leaves]))
            self._watch(self.calls[-1], any(x.requires_grad for x in leaves))
            return result

        return hook

    def _watch(self, call: Call, fed: bool) -> None:
        """Arrange for the cotangents of a call; ``fed`` says that autograd runs the node anyway on its way to earlier layers."""
        call.cotangents = [None] * len(call.outputs)
        if not (fed and call.unit.rule):
            self._edges += [(call, i, get_gradient_edge(z)) for i, z in enumerate(call.outputs) if z.requires_grad]
            return
        edge = get_gradient_edge(call.outputs[0])
        place = edge.output_nr  # the closure must not hold the node, which holds the closure

        def arrive(gradients: tuple[Tensor | None, ...]) -> None:
            self._deliver(call, [gradients[place]])

        self._arrivals.append(edge.node.register_prehook(arrive))

    def _deliver(self, call: Call, cotangents: list[Tensor | None]) -> None:
        call.cotangents = [None if g is None else g.detach() for g in cotangents]
        for i, g in enumerate(call.cotangents):
            if g is not None and not has_batch(call.unit.module, i, g, self.batch):
                raise UnsupportedModelError([no_batch_axis(call.unit, tuple(g.shape), self.batch)])
        call.check()
        call.outputs = []
        if any(g is not None for g in call.cotangents):
            self._sink(call)
        call.cotangents = []

    def backward(self, total: Tensor, sink: Callable[[Call], None], retain_graph: bool = False) -> None:
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
        try:
            gradients: list[Tensor | None] = list(torch.autograd.grad(total, edges, allow_unused=True, retain_graph=retain_graph))
        finally:
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


def has_batch(module: nn.Module, position: int, output: Tensor, batch: int) -> bool:
    """Whether an output has the examples where they are expected."""
    axis = batch_axis(module, position)
    return output.dim() > axis and output.shape[axis] == batch


def no_batch_axis(unit: Unit, shape: tuple[int, ...], batch: int) -> str:
    """The sentence for an output whose first axis is not the batch."""
    return (
        f"layer {unit.name!r} ({type(unit.module).__name__}): its output has shape {shape} for a batch of {batch}, so examples cannot be "
        f"told apart; give it inputs whose first axis is the batch (batch_first=True, ids expanded to [B, T])."
    )
