"""Errors of the accounting package, and the checks every public entry point makes before any library sees a number.

Libraries answer NaN, 0 or True with a plausible epsilon; a privacy claim must not rest on that.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


class AccountingError(ValueError):
    """An input for which no epsilon can be stated; the message says what, where and what to do."""


class LedgerError(AccountingError):
    """A ledger file that cannot be trusted, written or locked."""


def check_real(value: Any, name: str, *, where: str) -> float:
    """Returns a finite real number as `float`.

    Args:
      value: what the caller passed.
      name: the argument's name, for the message.
      where: the function or class the argument belongs to, for the message.

    Raises:
      AccountingError: for booleans, strings, None, NaN and infinities.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise AccountingError(f"{where}: {name} must be a real number, got {value!r}; pass a finite float.")
    try:
        number = float(value)
    except OverflowError:
        raise AccountingError(f"{where}: {name} is too large for a float; pass a finite float.") from None
    if not math.isfinite(number):
        raise AccountingError(f"{where}: {name} must be finite, got {number!r}; pass a finite float.")
    return number


def check_positive(value: Any, name: str, *, where: str) -> float:
    """Returns a finite number above zero; raises AccountingError otherwise."""
    number = check_real(value, name, where=where)
    if number <= 0.0:
        raise AccountingError(f"{where}: {name} must be above 0, got {number!r}; pass a positive number.")
    return number


def check_nonnegative(value: Any, name: str, *, where: str) -> float:
    """Returns a finite number that is not below zero; raises AccountingError otherwise."""
    number = check_real(value, name, where=where)
    if number < 0.0:
        raise AccountingError(f"{where}: {name} must not be negative, got {number!r}; pass 0 or more.")
    return number


def check_epsilon(value: Any, *, where: str, name: str = "epsilon") -> float:
    """Returns a finite epsilon above zero (nats); raises AccountingError otherwise."""
    return check_positive(value, name, where=where)


def check_delta(value: Any, *, where: str, name: str = "delta") -> float:
    """Returns a delta strictly between 0 and 1; raises AccountingError otherwise."""
    number = check_real(value, name, where=where)
    if not 0.0 < number < 1.0:
        raise AccountingError(f"{where}: {name} must lie strictly between 0 and 1, got {number!r}; use a value below 1 / data-set size.")
    return number


def check_sample_rate(value: Any, *, where: str) -> float:
    """Returns a Poisson sampling probability in (0, 1]; raises AccountingError otherwise."""
    number = check_real(value, "sample_rate", where=where)
    if not 0.0 < number <= 1.0:
        raise AccountingError(
            f"{where}: sample_rate must lie in (0, 1], got {number!r}; pass the probability with which one example enters a step."
        )
    return number


def check_count(value: Any, name: str, *, where: str) -> int:
    """Returns a number of releases as a non-negative `int`; raises AccountingError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise AccountingError(f"{where}: {name} must be an integer, got {value!r}; pass a whole number of releases.")
    number = int(value)
    if number < 0:
        raise AccountingError(f"{where}: {name} must not be negative, got {number}; pass 0 or more releases.")
    return number
