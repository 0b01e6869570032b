"""The budget of a loop of the user's own: noise calibrated to it, releases counted against it, and what may be promised at any time.

The trainer knows its number of steps beforehand; a user's loop can run on, run twice, or stop. So every release is asked for here before it
is made, and refused once the planned ones are used up. Epsilon is computed from the ledger alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accounting import Event, NeighboringRelation, PrivacyLedger, SampledGaussian, calibrate_noise_multiplier, get_accountant
from dptrain.config import Privacy
from dptrain.errors import ConfigError, DptrainError, RunError
from dptrain.guard import MOST, Guard, refuse_overplanning, spent
from dptrain.mechanism import GaussianMechanism, event_noise_multiplier, noise_multiplier_for
from dptrain.sampling import POISSON_WORDS, SHUFFLE_WORDS

SamplingKind = Literal["poisson", "shuffle"]
SAMPLING_WORDS = {"poisson": POISSON_WORDS, "shuffle": SHUFFLE_WORDS}


class BudgetError(DptrainError):
    """The planned releases are used up; one more would break the promise."""


def open_ledger(ledger: PrivacyLedger | str | Path | None) -> PrivacyLedger:
    """A ledger, the file of one, which is continued if it exists, or one in memory."""
    if isinstance(ledger, PrivacyLedger):
        return ledger
    if ledger is None:
        return PrivacyLedger(None)
    path = Path(ledger)
    return PrivacyLedger.open(path) if os.path.exists(path) else PrivacyLedger(path)


@dataclass(frozen=True)
class Schedule:
    """How examples enter the steps; all of it public.

    Args:
        num_examples: N, a public constant.
        expected_batch_size: q N; with ``shuffle``, the most examples that a logical batch may have.
        num_steps: planned logical batches; None where no budget is given.
        sampling: ``poisson``: each step draws every example with probability q. ``shuffle``: passes over the data in some order, each
            example at most once per pass.
    """

    num_examples: int
    expected_batch_size: float
    num_steps: int | None
    sampling: SamplingKind = "poisson"

    @classmethod
    def make(
        cls,
        sample_size: int,
        expected_batch_size: float | None = None,
        sample_rate: float | None = None,
        epochs: float | None = None,
        steps: int | None = None,
        sampling: SamplingKind = "poisson",
    ) -> Schedule:
        """From what users give.

        Args:
            sample_size: N.
            expected_batch_size, sample_rate: one of them.
            epochs, steps: at most one of them.
            sampling: kind.
        Returns:
            The schedule.
        Raises:
            ConfigError: missing, contradictory or impossible values.
        """
        if isinstance(sample_size, bool) or not isinstance(sample_size, int) or sample_size < 1:
            raise ConfigError(f"sample_size must be the number of training examples, a whole number above 0, not {sample_size!r}.")
        if sampling not in SAMPLING_WORDS:
            raise ConfigError(f"There is no sampling {sampling!r}; choose poisson, or shuffle for a shuffled loader of your own.")
        if (expected_batch_size is None) == (sample_rate is None):
            raise ConfigError("Give exactly one of expected_batch_size (batch_size) and sample_rate.")
        batch = expected_batch_size if expected_batch_size is not None else float(sample_rate or 0.0) * sample_size
        if not (isinstance(batch, int | float) and 0 < batch <= sample_size):
            raise ConfigError(f"The expected batch size must lie above 0 and up to the {sample_size} examples, not {batch!r}.")
        if epochs is not None and steps is not None:
            raise ConfigError("Give epochs or steps, not both; the other follows from it.")
        for name, value in (("epochs", epochs), ("steps", steps)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be finite and above 0, not {value!r}.")
        passes = cls(sample_size, batch, None, sampling).steps_per_pass
        planned = None if epochs is None and steps is None else int(steps) if steps is not None else math.ceil(epochs * passes - 1e-9)  # type: ignore[operator]
        return cls(sample_size, float(batch), planned, sampling)

    @property
    def steps_per_pass(self) -> int:
        """Logical batches in an expected pass over the data."""
        return math.ceil(self.num_examples / self.expected_batch_size - 1e-9)

    @property
    def sample_rate(self) -> float:
        """Probability with which an example enters a release."""
        return 1.0 if self.sampling == "shuffle" else self.expected_batch_size / self.num_examples

    @property
    def per_release(self) -> int:
        """Steps that one recorded release stands for.

        Guarantee: with ``shuffle`` an example enters at most one logical batch of a pass, and a pass has at least
            ``floor(N / B)`` of them, so t steps hold at most ``ceil(t / floor(N / B))`` Gaussian releases in which it takes part.
        Source: accounting.md, "Shuffling, no amplification claimed".
        """
        return max(1, int(self.num_examples // self.expected_batch_size)) if self.sampling == "shuffle" else 1

    @property
    def num_releases(self) -> int | None:
        """Releases that the planned steps are recorded as."""
        return None if self.num_steps is None else math.ceil(self.num_steps / self.per_release)


class Budget:
    """Noise multiplier and releases of one model's training.

    Args:
        privacy: the promise.
        schedule: how examples enter the steps.
        ledger: where releases are recorded; what it holds already counts against ``target_epsilon``.
    Raises:
        ConfigError: no budget, or no number of steps for it.
        AccountingError: the budget cannot be reached.
    Guarantee: as long as every step asks ``allow`` first and records ``event`` as ``recorded`` says, epsilon of the ledger stays within
        ``target_epsilon``.
    """

    def __init__(self, privacy: Privacy, schedule: Schedule, ledger: PrivacyLedger | str | Path | None = None) -> None:
        # Adding an example to shuffled passes moves the others between batches; the same numbers hold where it is zeroed in its place.
        if schedule.sampling == "shuffle" and privacy.relation is NeighboringRelation.add_remove:
            privacy = privacy.model_copy(update={"relation": NeighboringRelation.zero_out})
        if privacy.target_epsilon is None and privacy.noise_multiplier is None:
            raise ConfigError("Give target_epsilon or noise_multiplier, or choose the strategy non_private.")
        if privacy.noise_multiplier is None and schedule.num_releases is None:
            raise ConfigError("target_epsilon needs the number of steps to calibrate the noise: give epochs or steps.")
        self.privacy, self.schedule, self.ledger = privacy, schedule, open_ledger(ledger)
        self.ledger.check_facts({"relation": privacy.relation.value, "num_examples": schedule.num_examples})
        self.steps = self.releases = 0  # begun and to be recorded in this session
        self._in_pass: int | None = None  # steps since the last release; None where the next step needs one
        self._observed = False  # whether passes announce themselves
        if privacy.noise_multiplier is not None:
            self.noise_multiplier = privacy.noise_multiplier
        else:
            assert privacy.target_epsilon is not None and schedule.num_releases is not None
            self.noise_multiplier = noise_multiplier_for(
                calibrate_noise_multiplier(
                    privacy.target_epsilon, privacy.target_delta, schedule.sample_rate, schedule.num_releases,
                    accountant=privacy.accountant, relation=privacy.relation, history=self.ledger.events,
                ),
                privacy.noise,
            )  # fmt: skip
        # What a release is recorded as; refuses what no accountant can speak of.
        self.event = SampledGaussian(event_noise_multiplier(self.noise_multiplier, privacy.noise), schedule.sample_rate)
        planned = schedule.num_releases
        if privacy.noise_multiplier is not None and planned is not None:
            refuse_overplanning(privacy, self.ledger, self.event, planned)
        self._guard = Guard(privacy, self.ledger, self.event, MOST if planned is None else planned, calibrated=planned is not None)

    @property
    def mechanism(self) -> GaussianMechanism:
        """How the noise is shared among groups."""
        return GaussianMechanism(self.noise_multiplier, self.privacy.allocation, dict(self.privacy.noise_weights))

    @property
    def left(self) -> int | None:
        """Steps that are left of the planned ones; None where none were planned."""
        return None if self.schedule.num_steps is None else max(0, self.schedule.num_steps - self.steps)

    def begin(self) -> bool:
        """Ask for one more step.

        Returns:
            Whether a release has to be recorded for it; with ``shuffle``, one stands for a whole pass.
        Raises:
            BudgetError: the planned steps are used up.
        """
        if self.left == 0:
            raise BudgetError(
                f"The {self.schedule.num_steps} planned steps are used up: {self.statement()} Training on would break the promise; "
                "plan more epochs with a new engine that continues the ledger."
            )
        new = self._in_pass is None or (not self._observed and self._in_pass >= self.schedule.per_release)
        planned = self.schedule.num_releases
        if new and planned is not None and self.releases >= planned:
            raise BudgetError(f"The {planned} planned releases are used up, by passes that were cut short: {self.statement()}")
        if new:
            self._refuse_overspending()
        self.steps += 1
        self.releases += new
        self._in_pass = 1 if new else (self._in_pass or 0) + 1
        return new

    def _held(self) -> dict[Event, int]:
        """Event -> releases of its kind in the ledger."""
        held: dict[Event, int] = {}
        for event, count in self.ledger.events:
            held[event] = held.get(event, 0) + count
        return held

    def _refuse_overspending(self) -> None:
        """Refuse a release beyond ``target_epsilon``.

        Raises:
            BudgetError: it would pass the target.
        """
        if self._guard.ask():
            return
        privacy = self.privacy
        grown = (
            ": the ledger has grown since the noise was calibrated; make a new engine on this ledger."
            if privacy.noise_multiplier is None
            else "."
        )
        raise BudgetError(
            f"One more release would spend epsilon {spent(privacy, self.ledger, self.event, 1):.6g}, above target_epsilon "
            f"{privacy.target_epsilon:.6g}{grown}"
        )

    def new_pass(self, observed: bool) -> None:
        """A pass over shuffled data begins, or ends: what follows is another release, however short the last pass was.

        Args:
            observed: whether the engine itself sees the pass, so that its steps need not be counted.
        """
        self._in_pass, self._observed = None, observed

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon of everything in the ledger.

        Args:
            delta: by default ``target_delta``.
        Returns:
            An upper bound.
        """
        privacy = self.privacy
        return get_accountant(privacy.accountant, privacy.relation).epsilon(
            self.ledger.events, privacy.target_delta if delta is None else delta
        )

    def statement(self, delta: float | None = None) -> str:
        """What may be promised of the weights."""
        privacy = self.privacy
        text = (
            f"epsilon = {self.epsilon(delta):.6g} at delta = {privacy.target_delta if delta is None else delta:g} for one example, "
            f"neighbouring relation {privacy.relation.value}, {SAMPLING_WORDS[self.schedule.sampling]}, accountant {privacy.accountant}, "
            f"{self.ledger.num_releases} releases."
        )
        if privacy.unsafe_seed is not None:
            text += " VOID against anyone who knows unsafe_seed: sampling and noise can be reproduced from it."
        return text

    def state(self) -> dict[str, Any]:
        """Steps and releases, as plain data."""
        return {"steps": self.steps, "events": [[event.to_dict(), count] for event, count in self.ledger.events]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state``; what the ledger holds beyond it is kept, so spending is never forgotten.

        Raises:
            RunError: the state is not one.
        """
        try:
            steps, events = int(state["steps"]), [(SampledGaussian.from_dict(event), int(count)) for event, count in state["events"]]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"This is not the state of a privacy budget ({error}); pass what state_dict() returned.") from None
        for event, count in events:
            if (held := self._held().get(event, 0)) < count:
                self.ledger.record(event, count - held)
        # Releases with other noise are not those that this budget planned; they count as what others spent.
        own = sum(count for event, count in events if event == self.event)
        self.steps, self.releases = max(self.steps, steps), max(self.releases, own)
        self._in_pass = None
