"""The privacy part of a model card, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dptrain.reporting import wording
from dptrain.reporting.facts import RunReport


def text(value: str) -> str:
    """Any text as Markdown that shows it as it is, on one line."""
    # An underscore between letters is no emphasis, and names such as unsafe_seed stay readable in the source.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])|[\\`*{}\[\]<>|#&~$]", r"\\\g<0>", " ".join(value.split()))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table."""
    lines = ["| " + " | ".join(map(text, titles)) + " |", "|" + "---|" * len(titles)]
    return [*lines, *("| " + " | ".join(map(text, row)) + " |" for row in rows), ""]


def bullets(sentences: Sequence[str]) -> list[str]:
    """A list."""
    return [*(f"- {text(sentence)}" for sentence in sentences), ""]


def fenced(content: str, language: str) -> list[str]:
    """A block of code whose fence is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", content.rstrip("\n"), fence, ""]


def model_card(report: RunReport) -> str:
    """The statement of one run.

    Args:
        report: the run.
    Returns:
        Markdown that begins with what must be read first.
    """
    lines = [f"# Privacy of {text(report.label)}", ""]
    for alarm in wording.alarms(report):
        lines += [f"> **WARNING: {text(alarm)}**", ""]
    lines += [f"**{text(wording.headline(report))}**", ""]
    lines += [*bullets(wording.remarks(report))] if wording.remarks(report) else []
    lines += ["## What is promised", "", *bullets(wording.promise(report)), *table(("property", "value"), wording.figures(report))]
    if wording.risks(report):
        lines += ["## What an attacker can achieve", "", *bullets(wording.risks(report))]
    if report.metric is not None:
        last = report.last(report.metric)
        lines += ["## Quality", "", f"Test {report.metric} {last:.4g} (not private with respect to the test data).", ""]
    if wording.audit(report):
        lines += ["## Audit", "", *bullets(wording.audit(report))]
    lines += ["## What is not private", "", *bullets(report.statement["not_private"])]
    if wording.plan(report)[1]:
        lines += ["## Bounds and noise", "", text(wording.PLAN_TEXT), "", *table(*wording.plan(report))]
    lines += ["## Versions and config", "", text(wording.versions(report)), ""]
    lines += [f"Config {report.files.run.config_hash}:", "", *fenced(wording.config_text(report), "yaml")]
    return "\n".join(lines).rstrip("\n") + "\n"
