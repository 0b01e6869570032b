"""The protocol of a sensitivity strategy: facts in, plan out, no tensors."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

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
