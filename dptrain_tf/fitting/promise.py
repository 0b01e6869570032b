"""What is promised of one Keras model: noise calibrated to its budget, epsilon at any time, and where training stops."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from accounting import AccountingError, GaussianEvent, PrivacyLedger, calibrate_steps, get_accountant
from dptrain.budget import Budget, Schedule, open_ledger
from dptrain.errors import ConfigError, DataError
from dptrain_tf.fitting.data import Data
from dptrain_tf.fitting.settings import Settings
from dptrain_tf.fitting.steps import Steps

logger = logging.getLogger("dptrain_tf")

NO_EPSILON = "Trained without differential privacy; no epsilon exists."


class Promise(Steps):
    """Steps of one model within a budget.

    Args:
        model: the model.
        settings: how it is trained.
        ledger: where releases are recorded: a ledger, the path of one, which is continued, or None for one in memory.
    Guarantee: epsilon is that of the ledger alone, and no step begins once the planned ones are used up.
    Source: ``dptrain/budget.py``.
    """

    def __init__(self, model: Any, settings: Settings, ledger: PrivacyLedger | str | Path | None) -> None:
        super().__init__(model)
        self.settings = self._given = settings
        self._ledger = open_ledger(ledger)
        self._opened = not isinstance(ledger, PrivacyLedger)
        self._final = False  # whether the calibration is
        self.schedule: Schedule | None = None
        self.budget: Budget | None = None
        self._event: GaussianEvent | None = None
        self._limit: float | None = None  # epsilon asked for by a callback
        self._allowed: float = math.inf  # further steps within it
        self._wanted = 0  # steps of this call of fit that are still to come
        self._said = False

    # --- what a user may ask ---
    @property
    def private(self) -> bool:
        """Whether there is any promise."""
        return self.settings.strategy.name != "non_private"

    @property
    def ledger(self) -> PrivacyLedger:
        """Every release that was made from data."""
        return self._ledger

    @property
    def noise_multiplier(self) -> float:
        """sigma; 0 in non-private training.

        Raises:
            ConfigError: it is not calibrated yet.
        """
        if self.private and self.budget is None:
            raise ConfigError("The noise is calibrated when fit has seen how many examples there are; give sample_size= to know it now.")
        return self.budget.noise_multiplier if self.budget else 0.0

    @property
    def sample_rate(self) -> float:
        """q, the probability with which each example enters a step.

        Raises:
            ConfigError: it is not known yet.
        """
        if self.schedule is not None:
            return self.schedule.sample_rate
        if self.settings.sample_rate is None:
            raise ConfigError("The sample rate is known when fit has seen how many examples there are; give sample_size= to know it now.")
        return self.settings.sample_rate

    @property
    def steps_left(self) -> int | None:
        """Steps left of the planned ones; None where none were planned."""
        if self.schedule is None or self.budget is None:
            return None
        return self.budget.left

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon of everything in the ledger; infinity in non-private training.

        Args:
            delta: by default ``privacy.target_delta``.
        """
        if not self.private:
            return math.inf
        return self.budget.epsilon(delta) if self.budget else self._spent(delta)

    def statement(self, delta: float | None = None) -> str:
        """What may be promised of the weights: epsilon with delta, relation, sampling and accountant."""
        if not self.private:
            return NO_EPSILON
        if self.budget is None:
            return f"Nothing has been released by this model yet; the ledger holds epsilon = {self._spent(delta):.6g}."
        text, allowed = self.budget.statement(delta), 1.0 / self.budget.schedule.num_examples
        used = self.settings.privacy.target_delta if delta is None else delta
        if used >= allowed:
            text += f" delta {used:g} is not below 1/N = {allowed:.3g}: publishing one example in full would keep the promise."
        return text

    # --- calibration ---
    def _calibrate(self, count: int, asked: Settings | None = None) -> Schedule:
        """Noise for N examples; what the ledger holds by then counts against the budget. It is final once a step has begun.

        Args:
            count: N.
            asked: the settings, completed by a call of ``fit``.
        Raises:
            DataError: N is another number than that of a final calibration.
        """
        settings = asked or self.settings
        if self.schedule is None or not (self._final or (settings == self.settings and count == self.schedule.num_examples)):
            schedule = settings.schedule(count)
            self.budget = Budget(settings.privacy, schedule, self.ledger) if self.private else None
            self.schedule, self.settings = schedule, settings
        if count != self.schedule.num_examples:
            raise DataError(
                f"The training data hold {count} examples, and the noise was calibrated for {self.schedule.num_examples}; give the same "
                "number, or call make_private again with the same ledger."
            )
        return self.schedule

    def _completed(self, data: Data, batch_size: int | None, epochs: int, steps_per_epoch: int | None) -> Settings:
        """The settings, where ``make_private`` was not told the batch size or the steps to calibrate for, with those of a ``fit``."""
        settings = self._given
        if settings.expected_batch_size is None and settings.sample_rate is None:
            settings = replace(settings, expected_batch_size=batch_size or min(data.batch, data.count))
        if self.private and settings.privacy.target_epsilon is not None and settings.epochs is None and settings.steps is None:
            per_epoch = steps_per_epoch or settings.schedule(data.count).steps_per_pass
            settings = replace(settings, steps=epochs * per_epoch)
        return settings

    def _spent(self, delta: float | None) -> float:
        """Epsilon of a ledger that was continued."""
        privacy = self.settings.privacy
        return get_accountant(privacy.accountant, privacy.relation).epsilon(
            self.ledger.events, privacy.target_delta if delta is None else delta
        )

    def _close(self) -> None:
        if self._opened:
            self.ledger.close()

    # --- the budget ---
    def _refuse_spent(self) -> None:
        if self.budget is not None and self.budget.left == 0:
            raise AccountingError(
                f"The {self.schedule.num_steps if self.schedule else 0} planned steps are used up: {self.statement()} Nothing was trained; "
                "to go on, plan more with make_private on the same ledger."
            )

    def _refuse_overspending(self) -> None:
        """Refuse steps beyond ``target_epsilon``, as after releases that others have put into the ledger since the calibration."""
        target = self.settings.privacy.target_epsilon
        if target is None or self.budget is None or self._event is None:
            return
        planned = self._epsilon_after(min(self.budget.left or 0, self._wanted) or 1)
        if planned > target:
            raise AccountingError(
                f"The planned releases would spend epsilon {planned:.6g}, above target_epsilon {target:.6g}, because the ledger has grown "
                "since the noise was calibrated; call make_private again on this ledger."
            )

    def _epsilon_after(self, steps: int) -> float:
        """Epsilon after more steps of the kind that runs."""
        privacy, event = self.settings.privacy, self._event
        assert event is not None
        return get_accountant(privacy.accountant, privacy.relation).epsilon([*self.ledger.events, (event, steps)], privacy.target_delta)

    def limit(self, epsilon: float) -> None:
        """Stop before an epsilon is passed, in addition to the planned steps.

        Args:
            epsilon: at ``privacy.target_delta``.
        Raises:
            AccountingError: a single step would pass it.
        """
        privacy, event = self.settings.privacy, self._event
        self._limit, self._allowed = epsilon, math.inf
        if event is None or not self._wanted or self._epsilon_after(self._wanted) <= epsilon:
            return
        if (least := self._epsilon_after(1)) > epsilon:
            raise AccountingError(f"One more step would spend epsilon {least:.6g}, above max_epsilon {epsilon:g}; nothing was trained.")
        self._allowed = calibrate_steps(
            epsilon, privacy.target_delta, event.sample_rate, event.noise_multiplier, privacy.accountant, privacy.relation,
            self.ledger.events,
        )  # fmt: skip

    def _available(self) -> bool:
        """Whether the budget leaves another step."""
        return self._allowed > 0 and not (self.budget is not None and self.budget.left == 0)

    def _stop(self) -> None:
        """Stop Keras' loop, and say why, once per ``fit``."""
        self.model.stop_training = True
        if not self._said:
            self._said = True
            what = f"epsilon {self._limit:g} of PrivacyCallback" if self._allowed <= 0 else "the planned budget"
            logger.warning("Training stops after step %d: one more would pass %s. %s", self.count, what, self.statement())

    # --- steps within it ---
    def admit(self) -> bool:
        """Whether one more step may be run; stops Keras' loop if not."""
        if self._available():
            return True
        self._stop()
        return False

    def run(self) -> dict[str, float]:
        """One step, within the budget."""
        self._final = True
        if self.budget is not None:
            self.budget.begin()
        self._allowed, self._wanted = self._allowed - 1, self._wanted - 1
        stats = super().run()
        if self._wanted > 0 and not self._available():
            self._stop()
        return stats
