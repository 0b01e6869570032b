"""What an audit found, as data that a person and a program can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Args:
        name: of the check.
        passed: False if a sound mechanism would look like this with a chance of one in a million at most.
        text: what was done and seen.
        figures: the numbers behind it.
    """

    name: str
    passed: bool
    text: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Audit:
    """The outcome of an audit. NOT private: it has looked at the training data.

    Args:
        epsilon_lower_bound: of the whole run, at ``delta``, with ``confidence``; nats.
        epsilon: what the run's ledger claims at the same delta.
        delta: of both.
        confidence: of the lower bound.
        relation: neighbouring relation.
        strategy, backend: of the run.
        findings: of every check.
    """

    epsilon_lower_bound: float
    epsilon: float
    delta: float
    confidence: float
    relation: str
    strategy: str
    backend: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts the claim."""
        return all(finding.passed for finding in self.findings)

    def failed(self) -> Sequence[str]:
        """Names of the checks that a sound mechanism would not fail."""
        return [finding.name for finding in self.findings if not finding.passed]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in ``audit.json``."""
        return {**asdict(self), "findings": [asdict(finding) for finding in self.findings], "passed": self.passed, "private": False}

    def __str__(self) -> str:
        verdict = "nothing contradicts the claim" if self.passed else f"BROKEN: {', '.join(self.failed())}"
        lines = [f"{'ok  ' if f.passed else 'FAIL'}  {f.name}: {f.text}" for f in self.findings]
        lines.append(
            f"epsilon of the run is at least {self.epsilon_lower_bound:.4g} with confidence {self.confidence:g}, claimed "
            f"{self.epsilon:.6g}, at delta = {self.delta:g} ({self.relation}, {self.strategy}, {self.backend}); {verdict}. "
            "This audit is NOT private with respect to the training data."
        )
        return "\n".join(lines)
