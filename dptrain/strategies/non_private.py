"""No clipping, no noise, no guarantee: the baseline every ratio is taken against."""

from __future__ import annotations

from typing import Literal

from dptrain.costs import Decision, Timings
from dptrain.info import ModelInfo
from dptrain.plan import Group, Plan
from dptrain.strategies.base import Strategy


class NonPrivate(Strategy):
    """Ordinary training. Its bound is infinite, so that no noise scale and no epsilon can be derived from it."""

    name: Literal["non_private"] = "non_private"

    def plan(self, info: ModelInfo, *, decision: Decision = "time", timings: Timings | None = None) -> Plan:
        """One group of weight 1 and infinite bound."""
        del decision, timings
        names = tuple(layer.name for layer in info.layers)
        group = Group("all", names, float("inf"), None, info.num_params)
        return Plan(self.name, (group,), dict.fromkeys(names, "none"), layers=info.layers)
