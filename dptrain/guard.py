"""What keeps spending within ``target_epsilon``: how many releases still fit, asked before every one; and the ledger of a data set.

A run has a ledger of its own. Where several runs use the same data, ``privacy.ledger`` names one more file that all of them share: its
history counts in every calibration, every release is recorded there first, and its lock is held for the whole run, so that no two
processes can spend the same budget (``docs/budget.md``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from accounting import AccountingError, Event, GaussianEvent, PrivacyLedger, calibrate_steps, get_accountant
from dptrain.config import Privacy
from dptrain.errors import ConfigError, RunError

MOST = 10**9  # releases, where none are planned


class Recorder(Protocol):
    """Where a step records its release before it is made."""

    def record(self, event: Event, count: int = 1) -> None:
        """Count releases; on disk when it returns."""
        ...


def spent(privacy: Privacy, ledger: PrivacyLedger, event: Event | None = None, more: int = 0) -> float:
    """Epsilon of a ledger, and of further releases.

    Args:
        privacy: names accountant, relation and delta.
        ledger: what was released.
        event: what would be released.
        more: how often.
    Returns:
        An upper bound.
    """
    further = [(event, more)] if event is not None and more else []
    return get_accountant(privacy.accountant, privacy.relation).epsilon([*ledger.events, *further], privacy.target_delta)


def fitting(privacy: Privacy, ledger: PrivacyLedger, event: GaussianEvent, most: int) -> int:
    """How many further releases a budget allows.

    Args:
        privacy: the promise, with its ``target_epsilon``.
        ledger: what it has to cover besides.
        event: what would be released.
        most: more are not asked for.
    Returns:
        The largest number found, at most ``most``.
    Guarantee: epsilon of the ledger and that many releases is at most the target, by the accountant itself; so is the true epsilon of
        fewer of them, which are post-processing.
    """
    target = privacy.target_epsilon
    if target is None or most <= 0 or spent(privacy, ledger, event, most) <= target:
        return max(0, most)
    if spent(privacy, ledger, event, 1) > target:
        return 0
    found = calibrate_steps(
        target, privacy.target_delta, event.sample_rate, event.noise_multiplier,
        accountant=privacy.accountant, relation=privacy.relation, history=ledger.events, event=event,
    )  # fmt: skip
    return min(found, most)


class Guard:
    """Asked before every release; an accountant runs only where the ledger holds what was not expected.

    Args:
        privacy: the promise.
        ledger: everything that ``target_epsilon`` has to cover.
        event: what is released each time.
        planned: releases that will be asked for.
        calibrated: whether these are known to fit, because the noise was calibrated to them on this ledger.
    Guarantee: if each release is asked for, and recorded before the next is asked for, epsilon of the ledger stays within the target.
        With h what the ledger held when ``room`` was computed, epsilon(h + room releases) was at most the target; until it is computed
        again the ledger has gained nothing but releases of this kind, no more than were granted, and no more than ``room`` are granted.
    """

    def __init__(self, privacy: Privacy, ledger: PrivacyLedger, event: GaussianEvent, planned: int, calibrated: bool = False) -> None:
        self.privacy, self.ledger, self.event, self.planned = privacy, ledger, event, planned
        self.room = planned if calibrated else fitting(privacy, ledger, event, planned)
        self._note()

    def _note(self) -> None:
        self._same, self._granted = self.ledger.count(self.event), 0
        self._others = self.ledger.num_releases - self._same

    def _as_expected(self) -> bool:
        same = self.ledger.count(self.event)  # a ledger only grows, so that equal counts of the others mean equal content
        return same <= self._same + self._granted and self.ledger.num_releases - same == self._others

    def ask(self) -> bool:
        """Whether one more release stays within the target."""
        if self.privacy.target_epsilon is None:
            return True
        if not self._as_expected():
            self.room = fitting(self.privacy, self.ledger, self.event, self.planned)
            self._note()
        if self.room <= 0:
            return False
        self.room, self._granted = self.room - 1, self._granted + 1
        return True


def refuse_overplanning(privacy: Privacy, ledger: PrivacyLedger, event: GaussianEvent, planned: int, span: int = 1) -> None:
    """Refuse to begin what would have to end early.

    Args:
        privacy: the promise.
        ledger: what it has to cover besides.
        event: what would be released.
        planned: how often.
        span: steps that a release stands for.
    Raises:
        AccountingError: the planned releases would pass ``target_epsilon``; says how many fit.
    """
    fits = fitting(privacy, ledger, event, planned)
    if fits < planned:
        after = f" after the {ledger.num_releases} releases of the ledger" if ledger.num_releases else ""
        unit = "steps" if span == 1 else f"passes of {span} steps"
        raise AccountingError(
            f"The planned releases would spend epsilon {spent(privacy, ledger, event, planned):.6g}, above target_epsilon "
            f"{privacy.target_epsilon:.6g}: of {planned} {unit} with this noise {fits} fit{after}; lower the steps, "
            "or raise the noise or the target."
        )


def data_facts(privacy: Privacy, num_examples: int, data: str) -> dict[str, str | int]:
    """What all runs on one ledger must agree on: events are in units of the relation's sensitivity, for one data set."""
    return {"relation": privacy.relation.value, "num_examples": num_examples, "data": data}


def open_shared(path: str | None, facts: Mapping[str, str | int], resumed: bool) -> PrivacyLedger | None:
    """The ledger of a data set, locked.

    Args:
        path: the file; None where the run shares none.
        facts: what its header must state.
        resumed: whether a run is continued, whose releases the file must hold, so that it must exist.
    Returns:
        The ledger.
    Raises:
        LedgerError: missing, damaged, of other data or another relation, or held by another process.
    """
    if path is None:
        return None
    if resumed or os.path.exists(path):
        return PrivacyLedger.open(path, facts=facts)
    return PrivacyLedger(path, facts=facts)


class Records:
    """The ledger of a run, and the one it shares with others, as one.

    Args:
        own: of the run alone.
        shared: of the data set; None where there is none.
        run: name of the run, under which the shared ledger keeps its releases.
    Guarantee: a release is on disk in both before ``record`` returns, first in the shared one. A process killed between the two has not
        made the release; ``reconcile`` then records it in the other one, and the run counts it as lost.
    """

    def __init__(self, own: PrivacyLedger, shared: PrivacyLedger | None = None, run: str | None = None) -> None:
        self.own, self.shared, self.run = own, shared, run
        if shared is not None:
            shared.run = run
            self.reconcile()

    @property
    def budget(self) -> PrivacyLedger:
        """The one that ``target_epsilon`` speaks of."""
        return self.own if self.shared is None else self.shared

    def record(self, event: Event, count: int = 1) -> None:
        """Count releases in both; on disk when it returns."""
        if self.shared is not None:
            self.shared.record(event, count)
        self.own.record(event, count)

    def reconcile(self) -> None:
        """Record in the run's own ledger what only the shared one holds of it.

        Raises:
            RunError: the shared one holds less of the run than its own, so that spending would be forgotten.
        """
        assert self.shared is not None
        theirs = dict(self.shared.events_of(self.run))
        ours: dict[Event, int] = {}
        for event, count in self.own.events:
            ours[event] = ours.get(event, 0) + count
        if any(theirs.get(event, 0) < count for event, count in ours.items()):
            raise RunError(
                f"The ledger {self.shared.path} holds {sum(theirs.values())} releases of this run, and the run's own "
                f"{sum(ours.values())}, so releases were lost, or it is another file; restore it, or start in another --out directory."
            )
        for event, count in theirs.items():
            if count > ours.get(event, 0):
                self.own.record(event, count - ours.get(event, 0))

    def total(self, privacy: Privacy) -> dict[str, Any] | None:
        """What all runs on the data have spent together, for the privacy statement; None where no ledger is shared."""
        ledger = self.shared
        if ledger is None:
            return None
        return {
            "epsilon": spent(privacy, ledger), "delta": privacy.target_delta, "accountant": privacy.accountant,
            "releases": ledger.num_releases, "runs": len(ledger.run_names), "ledger": str(ledger.path), "facts": ledger.facts,
        }  # fmt: skip

    def close(self) -> None:
        """Release both locks."""
        self.own.close()
        if self.shared is not None:
            self.shared.close()


def refuse_unbounded(privacy: Privacy) -> None:
    """Refuse training without privacy on data whose budget is kept.

    Raises:
        ConfigError: ``privacy.ledger`` is given.
    """
    if privacy.ledger is not None:
        raise ConfigError(
            "Training without privacy spends without bound, which privacy.ledger cannot record; remove it, or choose a private strategy."
        )
