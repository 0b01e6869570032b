"""What a planner may know about a model: plain Python facts, no tensors, the same in both frameworks.

A backend's ``describe`` makes these; a strategy's ``plan`` reads them. Two backends that hold the same model must produce
equal facts, because the plans made from them are compared with ``==``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LINEAR, CONV, EMBEDDING, NORM, GENERIC = "linear", "conv", "embedding", "norm", "generic"
KINDS = (LINEAR, CONV, EMBEDDING, NORM, GENERIC)


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
class ModelInfo:
    """Facts of a whole model, layers in the order in which the forward pass first calls them.

    Args:
        layers: the layers with trainable parameters.
        loss_lipschitz: Lipschitz constant of the per-example loss in the model's output, None where unknown.
        input_bound: L2 bound of one example's input, None where unknown.
        extra: facts for printing only.
    """

    layers: tuple[LayerInfo, ...]
    loss_lipschitz: float | None = None
    input_bound: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def num_params(self) -> int:
        """Trainable parameters of the model."""
        return sum(layer.num_params for layer in self.layers)
