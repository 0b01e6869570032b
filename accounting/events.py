"""What was released: an event is data, an accountant interprets it.

Here are the base of all kinds and the usual kind, `SampledGaussian`; other samplers are in `schemes`, the search for
hyper-parameters in `tuning`, and `kinds` reads them all. To add a kind: a frozen dataclass here or beside those, a line in
`kinds`, and what it costs in `mixtures`.

Several Gaussians on the same Poisson sample are ONE event with the joint noise multiplier;
recorded one by one they would be accounted as independent samples, which under-reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from accounting.errors import AccountingError, check_count, check_positive, check_sample_rate

# Beyond these limits 1 / sigma^2 or sigma^2 leaves the range of a float and no accountant could say anything true.
_MIN_NOISE_MULTIPLIER = 1e-6
_MAX_NOISE_MULTIPLIER = 1e9
# Below it 1 / sample_rate overflows intermediate quantities; such an example is never sampled in practice.
_MIN_SAMPLE_RATE = 1e-15
MAX_RELEASES = 10**12


class Event:
    """Base of all kinds of release: frozen dataclasses of validated numbers.

    Args:
      kind: name in files.
    """

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict that `kinds.event_from_dict` turns back into an equal event."""
        raise NotImplementedError

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """What a canonical order sorts by, among events of one kind."""
        raise NotImplementedError


def check_noise_multiplier(value: Any, *, where: str) -> float:
    """Returns a noise multiplier that an accountant can work with; raises AccountingError otherwise."""
    sigma = check_positive(value, "noise_multiplier", where=where)
    if not _MIN_NOISE_MULTIPLIER <= sigma <= _MAX_NOISE_MULTIPLIER:
        raise AccountingError(
            f"{where}: noise_multiplier must lie in [{_MIN_NOISE_MULTIPLIER:g}, {_MAX_NOISE_MULTIPLIER:g}],"
            f" got {sigma!r}; it is standard deviation / sensitivity, usually between 0.3 and 100."
        )
    return sigma


def check_rate(value: Any, *, where: str) -> float:
    """Returns a sample rate that an accountant can work with; raises AccountingError otherwise."""
    rate = check_sample_rate(value, where=where)
    if rate < _MIN_SAMPLE_RATE:
        raise AccountingError(f"{where}: sample_rate must be at least {_MIN_SAMPLE_RATE:g}, got {rate!r}; account for a larger rate.")
    return rate


def fields_of(cls: type[Event], data: Any, names: Sequence[str]) -> dict[str, Any]:
    """Returns the named fields of a dict that describes an event of a kind.

    Raises:
      AccountingError: for another kind of event, and for missing or unknown fields.
    """
    fields = {"kind", *names}
    if not isinstance(data, Mapping) or set(data) != fields or data["kind"] != cls.kind:
        raise AccountingError(
            f"{cls.__name__}.from_dict: expected the fields {sorted(fields)} with kind {cls.kind!r},"
            f" got {data!r}; pass what to_dict() returned."
        )
    return {name: data[name] for name in names}


@dataclass(frozen=True)
class SampledGaussian(Event):
    """One release of a Poisson-sampled Gaussian mechanism.

    Args:
      noise_multiplier: standard deviation of the noise / L2 sensitivity of the release. The sensitivity is the true one
        under the neighbouring relation in use: under replace-one it is twice the clipping norm.
      sample_rate: probability with which each example enters the release, independently.

    Raises:
      AccountingError: unless both are finite, noise_multiplier > 0 and 0 < sample_rate <= 1.

    Source: math.md, equation (1), for a release made of several groups.
    """

    kind: ClassVar[str] = "sampled_gaussian"

    noise_multiplier: float
    sample_rate: float

    def __post_init__(self) -> None:
        where = "SampledGaussian"
        sigma = check_noise_multiplier(self.noise_multiplier, where=where)
        rate = check_rate(self.sample_rate, where=where)
        object.__setattr__(self, "noise_multiplier", sigma)
        object.__setattr__(self, "sample_rate", rate)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict that `from_dict` turns back into an equal event."""
        return {
            "kind": self.kind,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SampledGaussian:
        """Returns the event described by `data`.

        Raises:
          AccountingError: for another kind of event, and for missing, unknown or invalid fields.
        """
        return cls(**fields_of(cls, data, ("noise_multiplier", "sample_rate")))

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """What a canonical order sorts by, among events of one kind."""
        return (self.noise_multiplier, self.sample_rate)


Events = Sequence[tuple[Event, int]]


def normalise(events: Iterable[tuple[Event, int]]) -> tuple[tuple[Event, int], ...]:
    """Returns distinct events with their total counts, in a canonical order and without zero counts.

    The order of a composition of mechanisms fixed in advance does not matter, so equal events are merged and sorted:
    the same multiset of releases always gives the same epsilon, bit for bit.

    Raises:
      AccountingError: if an item is not an (event, count) pair, or a count is not an integer >= 0.
    """
    where = "events"
    if isinstance(events, (str, bytes, Event, Mapping)) or not isinstance(events, Iterable):
        raise AccountingError(f"{where}: expected a sequence of (event, count) pairs, such as (SampledGaussian, 100), got {events!r}.")
    totals: dict[Event, int] = {}
    for index, item in enumerate(events):
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], Event):
            raise AccountingError(f"{where}: item {index} must be an (event, count) pair, such as (SampledGaussian, 100), got {item!r}.")
        event, raw = item
        count = check_count(raw, f"the count of item {index}", where=where)
        if count:
            totals[event] = totals.get(event, 0) + count
    if sum(totals.values()) > MAX_RELEASES:
        raise AccountingError(f"{where}: more than 10^12 releases cannot be accounted for; check the counts.")
    return tuple(sorted(totals.items(), key=lambda pair: (pair[0].kind, pair[0].sort_key)))
