"""What an accountant is, and the registry of those that exist.

To add one: write a class with the methods of `Accountant`, add one line to `ACCOUNTANTS`, and the conformance tests run
on it. Accountants are stateless and return upper bounds only: a number that is merely close is not a privacy claim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from importlib import import_module
from typing import Protocol

from accounting.errors import AccountingError
from accounting.events import Events


class NeighboringRelation(StrEnum):
    """What one person can change: which pairs of data sets the guarantee compares.

    `zero_out` (one example replaced by an all-zero contribution) gives the same numbers as `add_remove`.
    `replace_one` doubles the sensitivity of a clipped sum; events are already in units of that doubled sensitivity.
    """

    add_remove = "add_remove"
    replace_one = "replace_one"
    zero_out = "zero_out"


class Accountant(Protocol):
    """Turns events into a guarantee.

    Guarantee: `epsilon` and `delta` are upper bounds on the true value for the composition of the events, whatever
    their order; no events, or zero counts, give 0.
    """

    name: str
    relation: NeighboringRelation

    def epsilon(self, events: Events, delta: float) -> float:
        """Returns an upper bound on epsilon (nats) at this delta."""
        ...

    def delta(self, events: Events, epsilon: float) -> float:
        """Returns an upper bound on delta at this epsilon (nats)."""
        ...

    def profile(self, events: Events, epsilons: Sequence[float]) -> tuple[float, ...]:
        """Returns upper bounds on delta at many epsilons (nats), 0 included."""
        ...

    def advantage(self, events: Events) -> float:
        """Returns an upper bound on the total variation distance (delta at epsilon 0): an attack's greatest advantage."""
        ...


class _Registry(Mapping[str, type[Accountant]]):
    """Maps a name to its class and imports the class only when asked for (SciPy and autodp are slow to import)."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = dict(paths)

    def __getitem__(self, name: str) -> type[Accountant]:
        module, _, attribute = self._paths[name].partition(":")
        cls: type[Accountant] = getattr(import_module(module), attribute)
        return cls

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


ACCOUNTANTS: Mapping[str, type[Accountant]] = _Registry(
    {
        "rdp": "accounting.rdp:RDPAccountant",
        "prv": "accounting.prv:PRVAccountant",
    }
)


def advantage_of(epsilon: float, delta: float) -> float:
    """Returns an upper bound on the total variation distance, rounded up.

    Args:
      epsilon: at least 0 (nats).
      delta: at epsilon, valid in both directions.

    Source: Kairouz, Oh, Viswanath 2015 (arXiv:1311.0776): with p <= e^epsilon q + delta and 1 - q <= e^epsilon (1 - p) + delta,
      add both and solve for p - q.
    """
    shrink = math.exp(-epsilon)
    return min(1.0, (-math.expm1(-epsilon) + 2.0 * delta * shrink) / (1.0 + shrink) * (1 + 1e-15))


def check_relation(relation: object, *, where: str) -> NeighboringRelation:
    """Returns the relation named by a string or a member; raises AccountingError otherwise."""
    try:
        return NeighboringRelation(relation)  # type: ignore[arg-type]
    except ValueError:
        known = ", ".join(member.value for member in NeighboringRelation)
        raise AccountingError(f"{where}: relation must be one of {known}, got {relation!r}.") from None


def get_accountant(name: str, relation: NeighboringRelation | str = "add_remove") -> Accountant:
    """Returns the accountant registered under `name`.

    Args:
      name: "prv" (near exact) or "rdp" (fast, a few per cent to tens of per cent looser).
      relation: the neighbouring relation, as a member or its name.

    Raises:
      AccountingError: for an unknown name or relation.
    """
    if not isinstance(name, str) or name not in ACCOUNTANTS:
        raise AccountingError(f"get_accountant: accountant must be one of {', '.join(ACCOUNTANTS)}, got {name!r}.")
    make = ACCOUNTANTS[name]
    return make(check_relation(relation, where="get_accountant"))  # type: ignore[call-arg]
