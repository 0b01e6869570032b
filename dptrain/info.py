"""What a planner may know about a model: plain Python facts, no tensors, the same in both frameworks.

A backend's ``describe`` makes these; a strategy's ``plan`` reads them. Two backends that hold the same model must produce
equal facts, because the plans made from them are compared with ``==``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LINEAR, CONV, EMBEDDING, NORM, BIAS, GENERIC = "linear", "conv", "embedding", "norm", "bias", "generic"
KINDS = (LINEAR, CONV, EMBEDDING, NORM, BIAS, GENERIC)


@dataclass(frozen=True)
class LayerInfo:
    """Facts of one layer that has trainable parameters.

    Args:
        name: dotted path of the layer, unique in the model.
        kind: one of ``KINDS``; says which norm methods exist.
        positions: T, positions per example summed over the calls of the layer (1 for a plain vector).
        fan_in: D, inputs per position after unfolding, within one channel group.
        fan_out: p, outputs per position.
        num_params: trainable parameters owned by the layer; a tied parameter counts where it appears first.
        params: identifiers ``layer.role`` of its trainable parameters; a tied one carries its first owner's identifier.
        calls: how many times one forward pass calls the layer.
        attrs: further facts by kind; convolutions: ``groups``, ``kernel`` (taps), ``channels`` (per group), ``padded`` (T').
        lipschitz: certified Lipschitz constant of the layer, None where unknown.
        inputs: names of the layers that feed it, None where the graph was not recorded.
    """

    name: str
    kind: str
    positions: int
    fan_in: int
    fan_out: int
    num_params: int
    params: tuple[str, ...] = ()
    calls: int = 1
    attrs: Mapping[str, int] = field(default_factory=dict)
    lipschitz: float | None = None
    inputs: tuple[str, ...] | None = None

    def attr(self, name: str, default: int) -> int:
        """An integer attribute, or a default."""
        return int(self.attrs.get(name, default))


@dataclass(frozen=True)
class Node:
    """One operation of a model's graph, for proofs about the whole network (``dptrain/bounds.py``).

    Args:
        name: unique; the dotted path of the layer, with ``#2`` and so on for later calls of the same layer.
        kind: a key of ``bounds.RULES``.
        inputs: names of the nodes that feed it; empty for kind ``input`` alone.
        size: numbers in one example's output.
        attrs: constants by kind, as listed in ``bounds.RULES``.
        params: role -> identifier of its parameter, trainable or not; a shared parameter carries one identifier everywhere.
        frozen: roles whose parameter is not trainable.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    size: int
    attrs: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()

    def attr(self, name: str, default: Any = None) -> Any:
        """A constant, or a default."""
        return self.attrs.get(name, default)


@dataclass(frozen=True)
class Graph:
    """The operations of a model in an order in which each comes after those that feed it; the last one is the output.

    Args:
        nodes: the operations.
        problems: one sentence for each operation that has no bound; such a graph proves nothing.
    """

    nodes: tuple[Node, ...]
    problems: tuple[str, ...] = ()

    @property
    def output(self) -> Node:
        """The operation whose output the loss reads."""
        return self.nodes[-1]


@dataclass(frozen=True)
class ModelInfo:
    """Facts of a whole model, layers in the order in which the forward pass first calls them.

    Args:
        layers: the layers with trainable parameters.
        loss_lipschitz: Lipschitz constant of the per-example loss in the model's output, None where unknown.
        input_bound: L2 bound of one example's input, None where unknown.
        graph: the operations of the forward pass, None where they were not asked for.
        certificates: ``node.role`` -> proven bound of the current weights: operator norm of a ``weight``, L2 norm of a ``bias``.
        extra: facts for printing only.
    """

    layers: tuple[LayerInfo, ...]
    loss_lipschitz: float | None = None
    input_bound: float | None = None
    graph: Graph | None = field(default=None, compare=False, repr=False)
    certificates: Mapping[str, float] = field(default_factory=dict, compare=False)
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def num_params(self) -> int:
        """Trainable parameters of the model."""
        return sum(layer.num_params for layer in self.layers)
