"""What is promised of one model: its noise, its steps, and epsilon at any time."""

from __future__ import annotations

from typing import Any

from accounting import PrivacyLedger
from dptrain.budget import Budget, Schedule
from dptrain.errors import RunError


class Promise:
    """Steps of one model within a budget.

    Args:
        schedule: how examples enter the steps.
        budget: noise and releases; None in non-private training.
    Guarantee: epsilon is that of the ledger alone.
    Source: ``dptrain/budget.py``.
    """

    def __init__(self, schedule: Schedule, budget: Budget | None) -> None:
        self.schedule, self.budget = schedule, budget
        self._index = 0  # logical batches applied

    @property
    def noise_multiplier(self) -> float:
        """sigma; 0 in non-private training."""
        return self.budget.noise_multiplier if self.budget else 0.0

    @property
    def sample_rate(self) -> float:
        """q of the accountant: 1 with ``shuffle``."""
        return self.schedule.sample_rate

    @property
    def num_steps(self) -> int | None:
        """Planned logical batches."""
        return self.schedule.num_steps

    @property
    def steps(self) -> int:
        """Logical batches applied in this session."""
        return self._index

    @property
    def steps_left(self) -> int | None:
        """Logical batches left of the planned ones."""
        planned = self.schedule.num_steps
        return None if planned is None else max(0, planned - (self.budget.steps if self.budget else self._index))

    @property
    def ledger(self) -> PrivacyLedger:
        """Every release.

        Raises:
            RunError: training is not private.
        """
        return self._private().ledger

    def _private(self) -> Budget:
        if self.budget is None:
            raise RunError("The strategy is non_private, so there is no ledger and no epsilon.")
        return self.budget

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon of every release so far.

        Args:
            delta: by default ``target_delta``.
        Returns:
            An upper bound, by the engine's accountant and for its neighbouring relation.
        """
        return self._private().epsilon(delta)

    get_epsilon = epsilon

    def statement(self, delta: float | None = None) -> str:
        """What may be promised of the weights: epsilon with delta, relation, sampling and accountant."""
        return self._private().statement(delta) if self.budget else "Trained without differential privacy; no epsilon exists."

    def get_privacy_spent(self, **_: Any) -> dict[str, Any]:
        """Epsilon and what it refers to, as plain data; arguments of private_vision are accepted and have no effect."""
        budget = self._private()
        privacy = budget.privacy
        return {
            "epsilon": budget.epsilon(), "delta": privacy.target_delta, "accountant": privacy.accountant,
            "neighboring_relation": privacy.relation.value, "sampling": self.schedule.sampling, "releases": budget.ledger.num_releases,
        }  # fmt: skip
