"""A plan: what a strategy decided, as frozen Python data that a backend executes and a person can read.

``print(plan)`` is the explanation of a run: layer, T, D, p, norm method, group, bound. Two plans made in different frameworks
for the same model are equal with ``==``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dptrain.costs import Method
from dptrain.errors import ConfigError
from dptrain.info import Graph, LayerInfo


@dataclass(frozen=True)
class Group:
    """Parameters that are clipped together and share one noise standard deviation.

    Args:
        name: unique name of the group.
        layers: names of its layers.
        norm_bound: Delta_k, the L2 bound on any example's weighted gradient in this group; infinity where none is claimed.
        clip_norm: C_k, enforced by weights at run time; None means the bound is proven beforehand and the weight is 1.
        num_params: d_k, trainable parameters in the group; 1 for a released count.
        share: part of the joint budget ``1 / sigma^2`` that is set aside for a released count; None for gradients, which divide the rest.
    """

    name: str
    layers: tuple[str, ...]
    norm_bound: float
    clip_norm: float | None
    num_params: int
    share: float | None = None


@dataclass(frozen=True)
class Plan:
    """How a model's weighted gradient sum is to be computed, and the certificate of its sensitivity.

    Args:
        strategy: name of the strategy that made it.
        groups: a partition of the layers that have trainable parameters.
        norms: layer name -> ``none``, ``ghost`` or ``instantiate``.
        clipping: name of the clipping function, None where no weights are computed.
        gamma: stability constant of the clipping function.
        project: whether constraints are restored after each update.
        loss_clip: bound of one example's loss gradient in the model's output, enforced at run time; None with clipping strategies.
        layers: the facts the plan was made from.
        graph: the model, where a bound was proven from it.
    """

    strategy: str
    groups: tuple[Group, ...]
    norms: Mapping[str, Method]
    clipping: str | None = None
    gamma: float = 0.01
    project: bool = False
    loss_clip: float | None = None
    layers: tuple[LayerInfo, ...] = field(default=(), repr=False)
    graph: Graph | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        grouped = [name for group in self.groups for name in group.layers]
        known = [layer.name for layer in self.layers]
        if sorted(grouped) != sorted(known) or set(self.norms) != set(known):
            raise ConfigError(
                f"The plan of strategy {self.strategy!r} must put every layer with trainable parameters into exactly one group and "
                f"give it one norm method; layers {sorted(known)}, grouped {sorted(grouped)}, methods for {sorted(self.norms)}."
            )

    @property
    def needs_norms(self) -> bool:
        """Whether any per-sample norm has to be computed."""
        return any(method != "none" for method in self.norms.values())

    @property
    def private(self) -> bool:
        """Whether every group has a finite bound, without which no noise scale and no epsilon exist."""
        return all(math.isfinite(group.norm_bound) for group in self.groups)

    @property
    def count(self) -> Group | None:
        """The group of the released count that moves a clipping norm, if there is one."""
        return next((group for group in self.groups if group.share is not None), None)

    @property
    def gradient_groups(self) -> tuple[Group, ...]:
        """The groups that hold gradients."""
        return tuple(group for group in self.groups if group.share is None)

    def scaled(self, scale: float) -> Plan:
        """The same plan with every clipping norm, and the bounds that follow from it, times a factor.

        Args:
            scale: the factor.
        Returns:
            A new plan.
        """

        def stretch(group: Group) -> Group:
            if group.clip_norm is None:
                return group
            return replace(group, clip_norm=group.clip_norm * scale, norm_bound=group.norm_bound * scale)

        return replace(self, groups=tuple(map(stretch, self.groups)))

    def with_bounds(self, bounds: Mapping[str, float]) -> Plan:
        """The same plan with other proven bounds.

        Args:
            bounds: group name -> bound; groups that are not named keep theirs.
        Returns:
            A new plan.
        """
        groups = tuple(replace(group, norm_bound=bounds.get(group.name, group.norm_bound)) for group in self.groups)
        return replace(self, groups=groups)

    def group_of(self, layer: str) -> Group:
        """The group a layer belongs to."""
        return next(group for group in self.groups if layer in group.layers)

    def layer(self, name: str) -> LayerInfo:
        """The facts of one layer."""
        return next(layer for layer in self.layers if layer.name == name)

    def with_clip_norm(self, clip_norm: float) -> Plan:
        """The same plan with another clipping norm in every group; for tests and self-checks.

        Args:
            clip_norm: the new C of each group; infinity turns clipping off.
        Returns:
            A new plan.
        """
        groups = tuple(replace(group, clip_norm=clip_norm, norm_bound=clip_norm) for group in self.gradient_groups)
        return replace(self, groups=groups)

    def __str__(self) -> str:
        from dptrain.tables import plan_table, render

        return render(plan_table(self))
