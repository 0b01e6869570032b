"""Errors a user can meet: one sentence that says what is wrong, where, and what to do instead.

Every class derives from ``ValueError`` so that notebooks catch them the ordinary way, and from ``DptrainError`` so that the
command line can print them without a traceback. ``accounting`` cannot import this package; its ``AccountingError`` is a
``ValueError`` of its own, and ``USER_ERRORS`` names both.
"""

from __future__ import annotations

from collections.abc import Sequence

from accounting import AccountingError, LedgerError


class DptrainError(ValueError):
    """Base of every error that a user can cause and can mend."""


class ConfigError(DptrainError):
    """The configuration is malformed, contradictory, or asks for something that does not exist."""


class DataError(DptrainError):
    """The data set is missing, malformed, or does not fit the model."""


class RunError(DptrainError):
    """An output directory, checkpoint or backend cannot be used for this run."""


class UnsupportedModelError(DptrainError):
    """The model holds something whose sensitivity cannot be bounded; lists every problem at once.

    Args:
        problems: one sentence per offending layer, each naming the layer and the remedy.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        head = "The model cannot be trained with differential privacy as it is"
        if len(self.problems) == 1:
            super().__init__(f"{head}: {self.problems[0]}")
        else:
            super().__init__(f"{head}; {len(self.problems)} problems:\n" + "\n".join(f"  - {p}" for p in self.problems))


USER_ERRORS: tuple[type[Exception], ...] = (DptrainError, AccountingError, LedgerError)
