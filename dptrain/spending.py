"""What a ledger file says was spent, and what is left of a target; for ``dptrain ledger show``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accounting import ACCOUNTANTS, NeighboringRelation, PrivacyLedger, SampledGaussian, get_accountant
from accounting.accountant import check_relation
from accounting.errors import check_delta, check_epsilon
from dptrain.config import Privacy
from dptrain.errors import ConfigError
from dptrain.guard import MOST, fitting


@dataclass(frozen=True)
class Spending:
    """What was spent according to one ledger.

    Args:
        ledger: the file, read.
        delta: at which epsilon is stated.
        relation: neighbouring relation.
        epsilon: by accountant, upper bounds.
        target: budget; None where none was named.
        steps_left: by accountant, further releases that the target allows; empty where none were asked about.
    """

    ledger: PrivacyLedger
    delta: float
    relation: NeighboringRelation
    epsilon: dict[str, float]
    target: float | None
    steps_left: dict[str, int]

    def values(self) -> dict[str, Any]:
        """Plain data for a program."""
        ledger = self.ledger
        found: dict[str, Any] = {
            "facts": ledger.facts, "releases": ledger.num_releases, "neighboring_relation": self.relation.value, "delta": self.delta,
            "epsilon": self.epsilon,
            "runs": [{"run": name, "releases": sum(n for _, n in ledger.events_of(name))} for name in ledger.run_names],
            "events": [{**event.to_dict(), "count": count} for event, count in ledger.events],
            "warnings": list(ledger.warnings),
        }  # fmt: skip
        if self.target is not None:
            found |= {"target_epsilon": self.target, "left": {name: self.target - value for name, value in self.epsilon.items()}}
        return found | ({"steps_left": self.steps_left} if self.steps_left else {})

    def __str__(self) -> str:
        ledger, facts = self.ledger, self.ledger.facts
        about = f" on {facts['num_examples']} examples of {facts['data']}" if {"num_examples", "data"} <= facts.keys() else ""
        given = "" if "relation" in facts else " (not stated by the ledger)"
        lines = [
            f"{ledger.num_releases} releases of {len(ledger.run_names)} runs{about}, neighbouring relation {self.relation.value}{given}"
        ]
        for name, value in self.epsilon.items():
            line = f"epsilon = {value:.6g} at delta = {self.delta:g} (accountant {name})"
            if self.target is not None:
                rest = self.target - value
                line += f", {rest:.6g} below the target {self.target:g}" if rest >= 0 else f", ABOVE the target {self.target:g}"
            if name in self.steps_left:
                line += f": {self.steps_left[name]} more such steps fit"
            lines.append(line)
        if self.steps_left:
            lines.append("epsilon does not grow in proportion to the steps: ask for steps, not for shares of what is left")
        return "\n".join([*lines, *ledger.warnings])


def spending(
    path: Path,
    delta: float = 1e-5,
    target: float | None = None,
    noise_multiplier: float | None = None,
    sample_rate: float | None = None,
    relation: str | None = None,
) -> Spending:
    """Read a ledger and account for it.

    Args:
        path: the file, or the directory of a run.
        delta: at which epsilon is stated.
        target: budget.
        noise_multiplier, sample_rate: of further steps, whose number the target limits; as a run's ledger records them.
        relation: where the ledger does not state it; by default ``add_remove``.
    Returns:
        What was spent.
    Raises:
        ConfigError: contradictory questions.
        LedgerError: the file cannot be read.
    """
    if (noise_multiplier is None) != (sample_rate is None) or (noise_multiplier is not None and target is None):
        raise ConfigError("To ask how many steps are left give --target-epsilon, --noise-multiplier and --sample-rate together.")
    check_delta(delta, where="dptrain ledger show")
    if target is not None:
        check_epsilon(target, where="dptrain ledger show", name="target_epsilon")
    ledger = PrivacyLedger.read(path / "ledger.jsonl" if os.path.isdir(path) else path)
    kind = check_relation(relation or ledger.facts.get("relation", "add_remove"), where="dptrain ledger show")
    ledger.check_facts({"relation": kind.value})
    epsilon = {name: get_accountant(name, kind).epsilon(ledger.events, delta) for name in ACCOUNTANTS}
    left = {}
    if noise_multiplier is not None and sample_rate is not None:
        event = SampledGaussian(noise_multiplier, sample_rate)
        for name in ACCOUNTANTS:
            privacy = Privacy.model_validate({"target_epsilon": target, "target_delta": delta, "accountant": name, "relation": kind})
            left[name] = fitting(privacy, ledger, event, MOST)
    return Spending(ledger, delta, kind, epsilon, target, left)
