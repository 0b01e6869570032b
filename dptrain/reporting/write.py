"""From run directories to files: everything is computed and rendered before the first byte is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accounting import PrivacyLedger
from dptrain.checkpoint import atomic_write
from dptrain.errors import RunError
from dptrain.reporting.facts import RunReport, examine
from dptrain.reporting.markdown import model_card
from dptrain.reporting.page import page

STATEMENT, CARD, PAGE = "privacy.json", "MODEL_CARD.md", "report.html"


@dataclass(frozen=True)
class Report:
    """What was written of one run.

    Args:
        directory: the run.
        folder: where the files are.
        privacy: the statement, as in ``privacy.json``.
    """

    directory: Path
    folder: Path
    privacy: dict[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """The three files."""
        return tuple(self.folder / name for name in (STATEMENT, CARD, PAGE))


def report(*directories: str | Path, out: str | Path | None = None) -> list[Report]:
    """Write the privacy report of runs: ``privacy.json``, ``MODEL_CARD.md`` and ``report.html``.

    Args:
        directories: run directories, finished or not; the pages of several compare them.
        out: folder for the files; of several runs, each has a folder in it. By default each run's own directory.
    Returns:
        What was written, one per directory.
    Raises:
        RunError: a directory is no run, contradicts itself, or the folder cannot be used; nothing was written then.
        LedgerError: a ledger is missing, damaged or foreign; nothing was written then.
    Guarantee: every epsilon is computed from the ledger; a stored one that is smaller is refused.
    """
    if not directories:
        raise RunError("There is no run to report on; give one or more run directories.")
    reports = examine(directories)
    places = folders(reports, None if out is None else Path(out))
    contents = [rendered(run, reports) for run in reports]
    for run, folder, files in zip(reports, places, contents, strict=True):
        save(folder, files)
        if folder == run.files.path:
            renew(run, reports)
    return [Report(run.files.path, folder, run.statement) for run, folder in zip(reports, places, strict=True)]


def rendered(run: RunReport, reports: Sequence[RunReport]) -> dict[str, str]:
    """The files of one run, beside others."""
    return {
        STATEMENT: json.dumps(run.statement, indent=2) + "\n",
        CARD: model_card(run),
        PAGE: page(run, [other for other in reports if other is not run]),
    }


def renew(run: RunReport, reports: Sequence[RunReport]) -> None:
    """Write again if the run went on meanwhile: its own statement, of more releases, may just have been replaced by an older one."""
    path = run.files.path
    if PrivacyLedger.read(path / "ledger.jsonl").events != run.files.events:
        again = replace(examine([path])[0], label=run.label)
        save(path, rendered(again, [again if other is run else other for other in reports]))


def folders(reports: Sequence[RunReport], out: Path | None) -> list[Path]:
    """Where the files of each run go.

    Raises:
        RunError: they would replace those of another run.
    """
    if out is None:
        return [run.files.path for run in reports]
    names = [run.files.path.resolve().name for run in reports]
    places = [out] if len(reports) == 1 else [out / (n if names.count(n) == 1 else f"{n}-{i}") for i, n in enumerate(names, 1)]
    for run, place in zip(reports, places, strict=True):
        if os.path.exists(place / "run.json") and place.resolve() != run.files.path.resolve():
            raise RunError(f"{place} is the directory of another run, whose statement would be replaced; choose another --out.")
    return places


def save(folder: Path, files: Mapping[str, str]) -> None:
    """Write files into a folder, which is made if it does not exist.

    Raises:
        RunError: the folder cannot be used, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"The report cannot be written to {folder} ({error.strerror or error}); choose another --out.") from None
    for name, content in files.items():
        atomic_write(folder / name, content.encode())
