"""Everything a report says of a run, computed from its files: frozen data, no wording and no markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from accounting import get_accountant
from accounting.tradeoff import TradeOff, trade_off
from dptrain.report import package_versions, privacy_statement
from dptrain.reporting.files import RunFiles, prefix, read_run

POINTS = 50  # of the budget over time, and of accuracy against epsilon
FALSE_POSITIVE_RATES = (1e-4, 1e-3, 1e-2, 0.1)


@dataclass(frozen=True)
class Spent:
    """What was spent by one time, by both accountants."""

    releases: int
    prv: float
    rdp: float


@dataclass(frozen=True)
class Quality:
    """Metrics on the test split, and the epsilon spent by then (an upper bound); None for non-private training."""

    step: int
    epsilon: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class RunReport:
    """What is known of a run.

    Args:
        label: what the run is called among those of one report.
        files: its directory, consistent with itself.
        statement: what ``privacy.json`` holds, computed from the ledger.
        budget: spending over the releases.
        risks: bounds on membership attacks; None where nothing was released or no epsilon exists.
        quality: metrics over time.
        tools: versions that this report was computed with.
        contradicted: whether an audit's lower bound is above every epsilon that is claimed.
    """

    label: str
    files: RunFiles = field(repr=False)
    statement: dict[str, Any] = field(repr=False)
    budget: tuple[Spent, ...] = field(repr=False)
    risks: TradeOff | None = field(repr=False)
    quality: tuple[Quality, ...] = field(repr=False)
    tools: dict[str, str] = field(repr=False)
    contradicted: bool = False

    @property
    def private(self) -> bool:
        """Whether there is an epsilon at all, valid or void."""
        return self.files.private

    @property
    def void(self) -> bool:
        """Whether the epsilon must not be relied on."""
        return bool(self.statement.get("unsafe_seed"))

    @cached_property
    def metric(self) -> str | None:
        """The metric that is compared among runs: accuracy where there is one."""
        known = [name for quality in self.quality for name in quality.metrics]
        return next((name for name in ("accuracy", "auroc", "loss") if name in known), known[0] if known else None)

    def series(self, metric: str) -> list[tuple[float, float]]:
        """(epsilon, metric) in the order of time; non-private runs have none."""
        return [(q.epsilon, q.metrics[metric]) for q in self.quality if q.epsilon is not None and metric in q.metrics]

    def last(self, metric: str) -> float | None:
        """The last value of a metric."""
        return next((q.metrics[metric] for q in reversed(self.quality) if metric in q.metrics), None)


def examine(directories: Sequence[str | Path]) -> list[RunReport]:
    """Read and compute everything about some runs.

    Args:
        directories: run directories.
    Returns:
        One report per directory, in their order.
    Raises:
        RunError, LedgerError: a directory that cannot be reported on; see ``read_run``.
    """
    paths = [Path(directory) for directory in directories]
    names = [path.resolve().name or str(path) for path in paths]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    return [compute(read_run(path), label) for path, label in zip(paths, labels, strict=True)]


def compute(files: RunFiles, label: str) -> RunReport:
    """The figures of one run, all from its ledger."""
    statement = privacy_statement(files.config, files.events, files.facts, files.status, files.data_set)
    risks = None
    if files.private and files.releases:
        risks = trade_off(files.events, files.config.privacy.relation, "prv")
    tools = package_versions(("dptrain", "numpy", "scipy", "autodp", "dp-accounting"))
    return RunReport(label, files, statement, budget(files), risks, quality(files), tools, contradicted(files))


def contradicted(files: RunFiles) -> bool:
    """Whether an audit's lower bound is above what its own training claimed, and above the epsilon of this run, at the audit's delta."""
    audit, privacy = files.audit, files.config.privacy
    if audit is None or audit.epsilon_lower_bound is None or not files.private or audit.relation not in (None, privacy.relation.value):
        return False
    delta = audit.delta or privacy.target_delta
    claimed = min(get_accountant(name, privacy.relation).epsilon(files.events, delta) for name in ("rdp", "prv"))
    return audit.epsilon_lower_bound > max(claimed, audit.epsilon or 0.0)


def spread(count: int, points: int = POINTS) -> list[int]:
    """At most so many whole numbers from 1 to ``count``, evenly spread, both ends among them."""
    if count <= points:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (points - 1)) for i in range(points)})


def budget(files: RunFiles) -> tuple[Spent, ...]:
    """Epsilon over the releases, by both accountants."""
    if not files.private:
        return ()
    privacy = files.config.privacy
    by = {name: get_accountant(name, privacy.relation) for name in ("prv", "rdp")}

    def at(count: int) -> Spent:
        events = prefix(files.events, count)
        return Spent(count, *(by[name].epsilon(events, privacy.target_delta) for name in ("prv", "rdp")))

    return tuple(map(at, spread(files.releases)))


def quality(files: RunFiles) -> tuple[Quality, ...]:
    """Metrics over time with the epsilon spent by then."""
    found = files.metrics.evaluations
    chosen = [found[i - 1] for i in spread(len(found))]
    if not files.private:
        return tuple(Quality(e.step, None, e.metrics) for e in chosen)
    privacy = files.config.privacy
    accountant = get_accountant(privacy.accountant, privacy.relation)
    return tuple(Quality(e.step, accountant.epsilon(prefix(files.events, e.releases), privacy.target_delta), e.metrics) for e in chosen)
