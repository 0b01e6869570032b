"""The search for hyper-parameters as an event: many private runs, of which only the best one is released."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from accounting.errors import AccountingError, check_count, check_positive, check_real
from accounting.events import MAX_RELEASES, Event, Events, fields_of, normalise

Distribution = Literal["geometric", "logarithmic", "negative_binomial", "poisson", "fixed"]
_SHAPES = {"geometric": 1.0, "logarithmic": 0.0}
_NAMES = ("geometric", "logarithmic", "negative_binomial", "poisson", "fixed")
_MAX_TRIES, _MAX_SHAPE = 1e9, 1e3
_LEAST_LOG_GAMMA = -690.0


@dataclass(frozen=True)
class Tuning(Event):
    """A random number of equal private runs, independent of each other; only the best one, with its setting, is released.

    The number of runs K must be drawn from the distribution before the search, and every run's setting at random from a list
    fixed beforehand; neither K nor another run may be shown to anyone. Which run is best may be judged by any score of the run
    that is itself part of what the events pay for, such as accuracy on public data. Settings with unlike costs: describe the
    dearest. A number of runs that is not random has distribution "fixed", and every run is paid for in full.

    Args:
      events: (event, count) pairs of ONE run.
      tries: E[K], at least 1, or K itself if it is fixed.
      distribution: "geometric", "logarithmic", "negative_binomial" (truncated, with its `shape`), "poisson" or "fixed".
      shape: eta > -1 of the negative binomial; given by the distribution otherwise.

    Raises:
      AccountingError: for numbers out of range, an empty run, or a search within a search.

    Source: Papernot, Steinke 2022 (arXiv:2110.03620), definition 1, theorems 2 and 6; the bound is in `rdp`.
    """

    kind: ClassVar[str] = "tuning"

    events: Events
    tries: float
    distribution: Distribution = "geometric"
    shape: float | None = None

    def __post_init__(self) -> None:
        where = "Tuning"
        inner = normalise(self.events)
        if not inner or any(isinstance(event, Tuning) for event, _ in inner):
            raise AccountingError(f"{where}: events must be the releases of one run, and no search of its own, got {self.events!r}.")
        if not isinstance(self.distribution, str) or self.distribution not in _NAMES:
            raise AccountingError(f"{where}: distribution must be one of {', '.join(_NAMES)}, got {self.distribution!r}.")
        fixed = self.distribution == "fixed"
        tries = float(check_count(self.tries, "tries", where=where)) if fixed else check_positive(self.tries, "tries", where=where)
        if not 1.0 <= tries <= _MAX_TRIES:
            raise AccountingError(f"{where}: tries must lie between 1 and 10^9, got {self.tries!r}; it is the expected number of runs.")
        if sum(n for _, n in inner) * tries > MAX_RELEASES:
            raise AccountingError(f"{where}: more than 10^12 releases cannot be accounted for; check tries and the counts.")
        shape = _SHAPES.get(self.distribution)
        if self.distribution == "negative_binomial":
            shape = check_real(self.shape, "shape", where=where)
            if not -1.0 < shape <= _MAX_SHAPE:
                raise AccountingError(f"{where}: shape must lie above -1 and up to {_MAX_SHAPE:g}, got {shape!r}; 1 is geometric.")
        elif self.shape is not None and self.shape != shape:
            raise AccountingError(f"{where}: shape belongs to negative_binomial; leave it out for {self.distribution}.")
        object.__setattr__(self, "events", inner)
        object.__setattr__(self, "tries", tries)
        object.__setattr__(self, "shape", shape)

    @property
    def gamma(self) -> float:
        """The parameter of the truncated negative binomial distribution whose mean is `tries`, at most 1, rounded down.

        Raises:
          AccountingError: for "poisson" and "fixed", which have none, and where it leaves the range of floats.
        """
        if self.shape is None:
            raise AccountingError(f"Tuning: the distribution {self.distribution!r} has no gamma; it has its mean, tries.")
        low, high = _LEAST_LOG_GAMMA, 0.0  # the mean falls as gamma grows
        if _log_mean(self.shape, low) < math.log(self.tries):
            raise AccountingError(f"Tuning: shape {self.shape:g} is too close to -1 for {self.tries:g} tries; use logarithmic.")
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if _log_mean(self.shape, middle) > math.log(self.tries) else (low, middle)
        return math.exp(low) * (1 - 1e-12)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict that `from_dict` turns back into an equal event."""
        return {
            "kind": self.kind,
            "events": [{"event": event.to_dict(), "count": count} for event, count in self.events],
            "tries": self.tries,
            "distribution": self.distribution,
            "shape": self.shape,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tuning:
        """Returns the event described by `data`; raises AccountingError for anything else."""
        from accounting.kinds import event_from_dict

        fields = fields_of(cls, data, ("events", "tries", "distribution", "shape"))
        items = fields["events"]
        if not isinstance(items, list) or not all(isinstance(item, Mapping) and set(item) == {"event", "count"} for item in items):
            raise AccountingError(f"Tuning.from_dict: events must be a list of objects with event and count, got {items!r}.")
        if any(isinstance(item["event"], Mapping) and item["event"].get("kind") == cls.kind for item in items):
            raise AccountingError("Tuning.from_dict: a search within a search cannot be accounted for; describe the outer one.")
        if fields["distribution"] == "fixed" and isinstance(fields["tries"], float) and fields["tries"].is_integer():
            fields["tries"] = int(fields["tries"])
        return cls(**{**fields, "events": [(event_from_dict(item["event"]), item["count"]) for item in items]})

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """What a canonical order sorts by, among events of one kind."""
        inner = tuple((event.kind, event.sort_key, count) for event, count in self.events)
        return (self.distribution, self.tries, -2.0 if self.shape is None else self.shape, inner)


def _log_mean(shape: float, log_gamma: float) -> float:
    """Returns log E[K] of the truncated negative binomial distribution.

    Source: Papernot, Steinke 2022, definition 1: shape (1 - gamma) / (gamma (1 - gamma^shape)), in the limit of shape 0
      (1 - gamma) / (gamma log(1 / gamma)).
    """
    if log_gamma == 0.0:
        return 0.0
    power = shape * log_gamma
    # shape / (1 - gamma^shape) = (power / expm1(power)) / log(1 / gamma)
    ratio = power / math.expm1(power) if abs(power) > 1e-8 and power < 700 else (1 - power / 2 if power < 700 else 1e-300)
    return math.log(-math.expm1(log_gamma)) - log_gamma - math.log(-log_gamma) + math.log(ratio)
