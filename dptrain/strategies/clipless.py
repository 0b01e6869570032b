"""``clipless``: no per-sample gradient is ever taken; the bound is a theorem about the weights in memory.

The network is made of layers with certified operator norms. ``dptrain/bounds.py`` follows norms forward and cotangents backward through the
graph, so every parameter has a proven sensitivity Delta, and the sum of plain gradients is released with noise to match. What starts the
backward recursion is the loss's Lipschitz constant, or a smaller bound that the executor enforces by scaling each example's loss
gradient (one vector of the size of the output, before any layer's backward pass): a smaller one cuts all noise in proportion.

The certificates are those of the current weights, at every step: post-processing, and tighter than the constraint.

Source: Bethune et al., ICLR 2024 (arXiv:2305.16202); math.md section 5; what their code gets wrong is in pitfalls.md L1 to L15.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from dptrain.adaptive import AdaptiveClip, Positive, initial_clip
from dptrain.bounds import sensitivities
from dptrain.costs import Decision, Timings
from dptrain.errors import ConfigError, UnsupportedModelError
from dptrain.info import LayerInfo, ModelInfo
from dptrain.plan import Group, Plan
from dptrain.strategies.base import Strategy
from dptrain.strategies.clipping import group_layers, tied_layers

# Smallest bound claimed for a group, relative to the largest: where weights are zero a true bound may be zero, and noise must not be.
FLOOR = 1e-6


class Clipless(Strategy):
    """Proven sensitivities.

    Args:
        loss_gradient_clip: largest L2 norm of one example's loss gradient in the model's output, fixed or following a quantile; None uses
            the loss's Lipschitz constant.
        grouping: ``per_layer``, ``flat``, or named lists of layer-name patterns.
    """

    name: Literal["clipless"] = "clipless"
    loss_gradient_clip: Positive | AdaptiveClip | None = None
    grouping: Literal["flat", "per_layer"] | Mapping[str, tuple[str, ...]] = "per_layer"

    @property
    def proves(self) -> bool:
        """It does."""
        return True

    @property
    def adaptive(self) -> AdaptiveClip | None:
        """The moving loss-gradient clip, if it moves."""
        return self.loss_gradient_clip if isinstance(self.loss_gradient_clip, AdaptiveClip) else None

    def loss_clip(self, info: ModelInfo, scale: float = 1.0) -> float:
        """The bound of the loss gradient that is enforced at run time.

        Raises:
            UnsupportedModelError: neither the loss nor the settings give one.
        """
        wanted = math.inf if self.loss_gradient_clip is None else initial_clip(self.loss_gradient_clip) * scale
        bound = min(wanted, math.inf if info.loss_lipschitz is None else info.loss_lipschitz)
        if not math.isfinite(bound):
            raise UnsupportedModelError(
                ["the loss has no Lipschitz constant in the model's output; set strategy.loss_gradient_clip or choose a loss that has one."]
            )
        return bound

    def most(self, info: ModelInfo) -> float:
        """The largest factor of the moving clip that can matter."""
        if self.adaptive is None or info.loss_lipschitz is None:
            return math.inf
        return max(1.0, info.loss_lipschitz / self.adaptive.initial)

    def plan(self, info: ModelInfo, *, decision: Decision = "time", timings: Timings | None = None) -> Plan:
        """Prove a bound for every group.

        Guarantee: no example that could exist has a gradient in group k of norm above ``norm_bound``, up to the rounding that
            ``certificates.MARGIN`` and ``mechanism.FLOAT_MARGIN`` pay for.
        Source: ``bounds.sensitivities``.
        Raises:
            UnsupportedModelError: lists every layer without a bound.
        """
        del decision, timings
        if not info.layers:
            raise ConfigError("The model has no trainable parameter, so there is nothing to train; unfreeze a layer.")
        members = group_layers(info.layers, tied_layers(info.layers), self.grouping)
        bounds = self.bounds(info, members)
        sizes = {layer.name: layer.num_params for layer in info.layers}
        groups = [Group(name, layers, bounds[name], None, sum(sizes[layer] for layer in layers)) for name, layers in members.items()]
        if self.adaptive is not None:
            groups.append(self.adaptive.group())
        methods = {layer.name: "none" for layer in info.layers}
        return Plan(self.name, tuple(groups), methods, project=True, loss_clip=self.loss_clip(info), layers=info.layers, graph=info.graph)  # type: ignore[arg-type]

    def refresh(self, plan: Plan, info: ModelInfo, scale: float) -> Plan:
        """The plan with the bounds of the current certificates and clip."""
        bounds = self.bounds(info, {group.name: group.layers for group in plan.gradient_groups}, scale)
        return replace(plan.with_bounds(bounds), loss_clip=self.loss_clip(info, scale))

    def executed(self, plan: Plan, info: ModelInfo, scale: float) -> float:
        """The loss's own constant may be the smaller bound, so the factor is taken from the bounds that result."""
        return self.loss_clip(info, scale) / (plan.loss_clip or 1.0)

    def bounds(self, info: ModelInfo, members: Mapping[str, tuple[str, ...]], scale: float = 1.0) -> dict[str, float]:
        """Group name -> proven bound: the root of the sum of its parameters' squared sensitivities."""
        if info.graph is None:
            raise ConfigError("Strategy clipless needs the graph of the model; describe it with the graph.")
        delta = sensitivities(info.graph, info.certificates, self.loss_clip(info, scale), info.input_bound)
        params = owned(info.layers)
        joint = {
            name: math.sqrt(math.fsum(delta.get(p, 0.0) ** 2 for p in dict.fromkeys(p for layer in layers for p in params[layer])))
            for name, layers in members.items()
        }
        largest = max(joint.values())
        return {name: max(bound, FLOOR * largest) for name, bound in joint.items()}


def owned(layers: tuple[LayerInfo, ...]) -> dict[str, tuple[str, ...]]:
    """Layer name -> identifiers of its trainable parameters; tied layers share them, and are always in one group."""
    return {layer.name: layer.params for layer in layers}
