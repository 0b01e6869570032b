"""The page of a run: one HTML file with its style and its charts inside, no script, nothing fetched from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dptrain.reporting import wording
from dptrain.reporting.charts import Axis, Series, legend, line_chart, linear
from dptrain.reporting.facts import RunReport, spread

TEMPLATE = Path(__file__).with_name("page.html")
ROWS = 12  # of the table beside a chart
LEAST_RATE = 1e-5  # smallest false-positive rate shown


@dataclass(frozen=True)
class Chart:
    """A chart, its legend, and some of its figures as a table."""

    title: str
    svg: Markup
    legend: Markup
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]


def page(report: RunReport, others: Sequence[RunReport] = ()) -> str:
    """The page of one run.

    Args:
        report: the run.
        others: further runs, compared in the chart and table of quality.
    Returns:
        HTML, the same for the same directories.
    """
    titles, rows = wording.plan(report)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        label=report.label,
        void=report.void,
        alarms=wording.alarms(report),
        headline=wording.headline(report),
        remarks=wording.remarks(report),
        promise=wording.promise(report),
        properties=wording.figures(report),
        risks=wording.risks(report),
        risk_charts=risk_charts(report),
        budget_charts=budget_charts(report),
        quality_text=quality_text(report, others),
        quality_charts=quality_charts(report, others),
        compared_titles=("run", "epsilon", "delta", "test metric", "value"),
        compared=[compared(run) for run in (report, *others)] if others else [],
        audit=wording.audit(report),
        not_private=report.statement["not_private"],
        plan_text=wording.PLAN_TEXT,
        plan_titles=titles,
        plan_rows=rows,
        versions=wording.versions(report),
        config_hash=report.files.run.config_hash,
        config=wording.config_text(report),
    )


def titled(report: RunReport, title: str) -> str:
    """A chart's title, with the warning that belongs to its figures."""
    return f"VOID (unsafe_seed): {title}" if report.void else title


def risk_charts(report: RunReport) -> list[Chart]:
    """The trade-off between false positives and false negatives, and the most true positives of any attack."""
    if report.risks is None:
        return []
    rates, misses = report.risks.curve()
    tradeoff = [(float(a), float(b)) for a, b in zip(rates, misses, strict=True)]
    found = [(rate, report.risks.true_positive_rate(rate)) for rate, _ in tradeoff if rate >= LEAST_RATE]
    guess = [(rate, rate) for rate, _ in found]
    across = Axis("false-positive rate", LEAST_RATE, 1.0, log=True)
    least = min((b for _, b in tradeoff if b > 0), default=1.0)
    down = Axis("false-negative rate, at least", min(0.1, max(LEAST_RATE, 10.0 ** math.floor(math.log10(least)))), 1.0, log=True)
    up = Axis("true-positive rate, at most", LEAST_RATE, 1.0, log=True)
    bound = Series("bound for every attack", found)
    chance = Series("guessing", guess)
    first, second = titled(report, "Trade-off curve"), titled(report, "Most that a membership attack finds")
    missed = [Series("bound for every attack", tradeoff), Series("guessing", [(rate, 1 - rate) for rate, _ in tradeoff])]
    text = "At every false-positive rate, the least share of members that any attack misses; guessing misses all that it does not hit."
    drawn = line_chart("tradeoff", first, text, across, down, missed)
    rows = some_rows([(a, b) for a, b in tradeoff if a >= LEAST_RATE])
    advantage = wording.up(report.risks.advantage)
    text = f"At every false-positive rate, the greatest true-positive rate of any attack; advantage at most {advantage}."
    return [
        Chart(first, drawn, legend(missed), ("false-positive rate", "false-negative rate, at least"), rows),
        Chart(
            second, line_chart("roc", second, text, across, up, [bound, chance]), legend([bound, chance]),
            ("false-positive rate", "true-positive rate, at most"), some_rows(found),
        ),
    ]  # fmt: skip


def budget_charts(report: RunReport) -> list[Chart]:
    """Epsilon over the releases, by both accountants."""
    if not report.budget:
        return []
    privacy, void = report.files.config.privacy, wording.mark(report)
    lines = [Series(name, [(float(s.releases), getattr(s, name)) for s in report.budget]) for name in ("prv", "rdp")]
    target = privacy.target_epsilon
    limits = [] if target is None else [(f"target {target:g}, by {privacy.accountant}", target)]
    values = [y for line in lines for _, y in line.points] + [value for _, value in limits]
    title = titled(report, f"Epsilon spent, at delta = {privacy.target_delta:g}")
    text = f"Epsilon after each number of releases, by accountants prv and rdp; it ends at {report.statement['epsilon']:.6g}{void}."
    unit = "training steps" if report.files.span == 1 else f"passes of {report.files.span} steps"
    x = linear(f"releases ({unit})", [0.0, float(report.files.releases)], zero=True)
    svg = line_chart("spent", title, text, x, linear("epsilon (nats)", values, zero=True), lines, limits)
    chosen = [report.budget[i - 1] for i in spread(len(report.budget), ROWS)]
    rows = [[f"{s.releases:,}", f"{s.prv:.6g}{void}", f"{s.rdp:.6g}{void}"] for s in chosen]
    return [Chart(title, svg, legend(lines), ("releases", "epsilon (prv)", "epsilon (rdp)"), rows)]


def quality_text(report: RunReport, others: Sequence[RunReport]) -> str:
    """What the quality section shows; empty where nothing was evaluated."""
    runs = [run for run in (report, *others) if run.metric is not None]
    if not runs:
        return ""
    text = "Metrics on the test split are not private with respect to the test data."
    if report.metric is not None:
        text = f"Test {report.metric} {report.last(report.metric):.4g} at the last evaluation. {text}"
    lacking = [run.label for run in runs if not run.private]
    if lacking:
        text += f" Runs without differential privacy have no epsilon and are drawn as lines across: {', '.join(lacking)}."
    invalid = [run.label for run in runs if run.void]
    return text + (f" VOID, because of unsafe_seed, is the epsilon of: {', '.join(invalid)}." if invalid else "")


def quality_charts(report: RunReport, others: Sequence[RunReport]) -> list[Chart]:
    """A metric against epsilon; each point of a line is one evaluation, and runs that lack the metric are left out."""
    runs = [report, *others]
    metric = next((run.metric for run in runs if run.metric is not None), None)
    if metric is None:
        return []
    lines = [
        Series(run.label + (" (VOID: unsafe_seed)" if run.void else ""), run.series(metric), marked=True, colour=index)
        for index, run in enumerate(runs)
        if run.series(metric)
    ]
    limits = [(run.label, value) for run in runs if not run.private and (value := run.last(metric)) is not None]
    if not lines:
        return []
    xs, ys = [x for line in lines for x, _ in line.points], [y for line in lines for _, y in line.points] + [y for _, y in limits]
    title = f"Test {metric} against epsilon"
    title = titled(report, title) if not others else title
    text = f"Test {metric} at each evaluation over the epsilon spent by then, for {len(lines)} private run(s)."
    # Accuracy and the like do not pass 1.
    y = linear(f"test {metric}" + (" (nats)" if metric == "loss" else ""), ys, most=None if metric == "loss" else 1.0)
    svg = line_chart("quality", title, text, linear("epsilon spent (nats)", xs, zero=True), y, lines, limits)
    rows = [[line.name, f"{x:.6g}", f"{y:.4g}"] for line in lines for x, y in (line.points[i - 1] for i in spread(len(line.points), ROWS))]
    return [Chart(title, svg, legend(lines), ("run", "epsilon", metric), rows)]


def compared(run: RunReport) -> list[str]:
    """One run among several."""
    value = run.last(run.metric) if run.metric is not None else None
    epsilon = f"{run.statement['epsilon']:.6g}{wording.mark(run)}" if run.private else "none (not private)"
    delta = f"{run.statement['delta']:g}" if run.private else ""
    return [run.label, epsilon, delta, run.metric or "", "" if value is None else f"{value:.4g}"]


def some_rows(points: Sequence[tuple[float, float]]) -> list[list[str]]:
    """A dozen points as texts."""
    return [[f"{a:.4g}", f"{b:.4g}"] for a, b in (points[i - 1] for i in spread(len(points), ROWS))]
