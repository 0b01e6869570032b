"""The protocol of a sensitivity strategy: facts in, plan out, no tensors; and what most strategies share."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from dptrain.adaptive import AdaptiveClip
from dptrain.costs import Decision, Timings
from dptrain.info import ModelInfo
from dptrain.plan import Plan


@runtime_checkable
class SensitivityStrategy(Protocol):
    """Turns the facts of a model into a plan with a certificate."""

    @property
    def name(self) -> str:
        """The name under which the strategy is registered."""
        ...

    @property
    def proves(self) -> bool:
        """Whether the bound is proven from the model's graph and certified weights, which the facts must then hold."""
        ...

    @property
    def adaptive(self) -> AdaptiveClip | None:
        """How the clipping norm moves, None where it is fixed."""
        ...

    def plan(self, info: ModelInfo, *, decision: Decision = "time", timings: Timings | None = None) -> Plan:
        """Decide groups, bounds and norm methods.

        Args:
            info: facts of the model.
            decision: rule by which ghost or instantiated norms are chosen; cannot change a bound.
            timings: measured seconds per layer and method, for ``decision="measured"``.
        Returns:
            The plan.
        Guarantee: for every group, no example can contribute more than ``norm_bound`` in L2 norm to the weighted sum that
            the plan describes.
        """
        ...

    def refresh(self, plan: Plan, info: ModelInfo, scale: float) -> Plan:
        """The plan in force at a later step.

        Args:
            plan: the plan of the first step.
            info: facts of the model, with the certificates of its current weights.
            scale: current factor of the clipping norm.
        Returns:
            The same groups and methods with the bounds of now.
        """
        ...

    def executed(self, plan: Plan, info: ModelInfo, scale: float) -> float:
        """The factor by which the executor multiplies the clipping norms of the first plan, to enforce those of ``refresh``."""
        ...

    def most(self, info: ModelInfo) -> float:
        """The largest factor of a moving clipping norm that can matter."""
        ...


class Strategy(BaseModel):
    """Base of the strategies: nothing is proven beforehand, nothing moves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def proves(self) -> bool:
        """Whether the bound is proven from the graph and certified weights."""
        return False

    @property
    def adaptive(self) -> AdaptiveClip | None:
        """How the clipping norm moves."""
        return None

    def refresh(self, plan: Plan, info: ModelInfo, scale: float) -> Plan:
        """The first plan with every clipping norm times a factor."""
        return plan if scale == 1.0 else plan.scaled(scale)

    def executed(self, plan: Plan, info: ModelInfo, scale: float) -> float:
        """The very same factor."""
        return scale

    def most(self, info: ModelInfo) -> float:
        """No limit of its own."""
        return math.inf
