"""What ``make_private`` was given, in one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dptrain.budget import Schedule
from dptrain.config import Privacy
from dptrain.costs import Decision
from dptrain.errors import ConfigError
from dptrain.info import ModelInfo
from dptrain.plan import Plan
from dptrain.sampling import default_physical_batch
from dptrain.strategies import SensitivityStrategy


@dataclass(frozen=True)
class Settings:
    """What ``make_private`` was given, and where its documentation is."""

    privacy: Privacy
    strategy: SensitivityStrategy
    expected_batch_size: float | None
    sample_rate: float | None
    epochs: float | None
    steps: int | None
    physical_batch_size: int | None
    decision: Decision
    two_pass: bool
    seed: int
    debug: bool

    def schedule(self, count: int) -> Schedule:
        """How N examples enter the steps."""
        return Schedule.make(count, self.expected_batch_size, self.sample_rate, self.epochs, self.steps)

    def physical(self, schedule: Schedule) -> int:
        """Examples processed at once."""
        return self.physical_batch_size or default_physical_batch(schedule.expected_batch_size, schedule.num_examples)

    def plan(self, info: ModelInfo, timings: Any) -> Plan:
        """The strategy's plan; without times that were measured, by the rule for time."""
        decision = "time" if self.decision == "measured" and timings is None else self.decision
        return self.strategy.plan(info, decision=decision, timings=timings)


def privacy_of(privacy: Privacy | Mapping[str, Any] | None) -> Privacy:
    """The promise, from settings of it."""
    if isinstance(privacy, Privacy):
        return privacy
    from pydantic import ValidationError

    from dptrain.config import explain

    raw = dict(privacy or {})
    try:
        return Privacy.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, "privacy", raw)) from None
