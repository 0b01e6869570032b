"""The privacy report of a run: a statement as data, as Markdown for a model card, and as one page that works offline.

    dptrain.report("runs/a")                               # privacy.json, MODEL_CARD.md and report.html, in the run directory
    dptrain.report("runs/a", "runs/b", out="runs/report")  # each page compares both

``files`` reads a directory and checks it against itself, ``facts`` computes, ``wording`` says it in sentences, ``markdown``, ``charts``
and ``page`` draw it, ``write`` writes. ``schema`` describes ``privacy.json``, which ``dptrain/report.py`` makes for the trainer and for us.
"""

from dptrain.reporting.facts import RunReport, examine
from dptrain.reporting.write import Report, report

__all__ = ["Report", "RunReport", "examine", "report"]
