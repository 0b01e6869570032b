"""The plan in force: bounds that move with the weights' certificates, and clipping norms that follow a released quantile.

Both are functions of what was released before, so using them is post-processing. The noise multiplier of the joint release stays
what it is: standard deviations follow the bounds, and equation (1) of math.md holds at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from accounting import NeighboringRelation
from dptrain.info import ModelInfo
from dptrain.mechanism import GaussianMechanism, effective_noise_multiplier
from dptrain.plan import Plan
from dptrain.projection import confirm
from dptrain.strategies.base import SensitivityStrategy

ROUNDING = 1e-9  # relative; far below FLOAT_MARGIN, which the recorded event has paid


class PlanInForce:
    """Plan and noise of the next step.

    Args:
        strategy: makes the bounds.
        info: facts of the model, with the certificates of its first weights.
        plan: the plan of the first step; the executor keeps it, and scales its clipping norms by ``executed``.
        mechanism: shares the noise.
        relation: neighbouring relation.
        expected_batch_size: q N.
    """

    def __init__(
        self,
        strategy: SensitivityStrategy,
        info: ModelInfo,
        plan: Plan,
        mechanism: GaussianMechanism,
        relation: NeighboringRelation,
        expected_batch_size: float,
    ) -> None:
        self.strategy, self.info, self.first = strategy, info, plan
        self.mechanism, self.relation, self.expected = mechanism, relation, expected_batch_size
        self.scale, self.plan, self.stds = 1.0, plan, dict[str, float]()
        self._renew()

    @property
    def moves(self) -> bool:
        """Whether anything can change from step to step."""
        return self.strategy.proves or self.strategy.adaptive is not None

    @property
    def executed(self) -> float:
        """Factor of the first plan's clipping norms that the executor has to enforce now."""
        return self.strategy.executed(self.first, self.info, self.scale)

    def _renew(self) -> None:
        if self.moves:
            self.plan = self.strategy.refresh(self.first, self.info, self.scale)
        self.stds = self.mechanism.stds(self.plan, self.relation)
        claimed = effective_noise_multiplier(self.plan, self.stds, self.relation)
        if not claimed >= self.mechanism.noise_multiplier * (1 - ROUNDING):
            raise RuntimeError(f"noise multiplier {claimed!r} fell below {self.mechanism.noise_multiplier!r}; please report this")

    def after_step(self, certificates: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """Take in what a step has released.

        Args:
            certificates: of the projected weights; empty if none are needed.
            counts: released counts by group name, with noise.
        """
        if not self.moves:
            return
        adaptive, count = self.strategy.adaptive, self.first.count
        if adaptive is not None and count is not None:
            self.scale = adaptive.moved(self.scale, counts[count.name], self.expected, self.strategy.most(self.info))
        if certificates:
            self.info = replace(self.info, certificates=dict(certificates))
        self._renew()

    def state(self) -> dict[str, np.ndarray]:
        """What a resumed run needs to continue bit for bit."""
        if not self.moves:
            return {}
        certificates = {f"certificate/{name}": np.asarray(value, np.float64) for name, value in self.info.certificates.items()}
        return {"scale": np.asarray(self.scale, np.float64), **certificates}

    def restore(self, state: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]) -> None:
        """The inverse of ``state``.

        Args:
            state: as stored with the weights.
            weights: identifier -> restored array, of every parameter in the graph; a stored certificate is used only if it is proven
                again for them.
        """
        if not self.moves:
            return
        self.scale = float(state.get("scale", 1.0))
        if self.info.graph is not None:
            stored = {k.removeprefix("certificate/"): float(v) for k, v in state.items() if k.startswith("certificate/")}
            self.info = replace(self.info, certificates=confirm(self.info.graph, weights, stored))
        self._renew()
