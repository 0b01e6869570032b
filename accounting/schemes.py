"""Gaussian releases on batches that are not plain Poisson samples: capped ones and ones of a fixed size; shuffled passes.

What each of them costs is proved in `mixtures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from accounting.errors import AccountingError, check_count
from accounting.events import Event, SampledGaussian, check_noise_multiplier, check_rate, fields_of

_MAX_EXAMPLES = 10**12


@dataclass(frozen=True)
class CappedGaussian(Event):
    """One release of a Gaussian mechanism on a Poisson sample of which at most `max_batch_size` examples are kept.

    If more examples were drawn, a uniformly random subset of that size is kept. The cap is not free: where it binds, an
    example takes the place of another one (see `mixtures`). A cap well above the expected batch size costs next to nothing.

    Args:
      noise_multiplier: standard deviation of the noise / L2 sensitivity of a release WITHOUT cap, as for `SampledGaussian`.
      sample_rate: probability with which each example is drawn, independently.
      num_examples: size of the data set; under add_remove either of two that differ by one example.
      max_batch_size: the cap, at least 1; public, chosen without looking at a batch.

    Raises:
      AccountingError: for numbers out of range.
    """

    kind: ClassVar[str] = "capped_gaussian"

    noise_multiplier: float
    sample_rate: float
    num_examples: int
    max_batch_size: int

    def __post_init__(self) -> None:
        where = "CappedGaussian"
        object.__setattr__(self, "noise_multiplier", check_noise_multiplier(self.noise_multiplier, where=where))
        object.__setattr__(self, "sample_rate", check_rate(self.sample_rate, where=where))
        object.__setattr__(self, "num_examples", _check_size(self.num_examples, "num_examples", where))
        object.__setattr__(self, "max_batch_size", _check_size(self.max_batch_size, "max_batch_size", where))

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict that `from_dict` turns back into an equal event."""
        return {
            "kind": self.kind,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
            "num_examples": self.num_examples,
            "max_batch_size": self.max_batch_size,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CappedGaussian:
        """Returns the event described by `data`; raises AccountingError for anything else."""
        return cls(**fields_of(cls, data, ("noise_multiplier", "sample_rate", "num_examples", "max_batch_size")))

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """What a canonical order sorts by, among events of one kind."""
        return (self.noise_multiplier, self.sample_rate, self.num_examples, self.max_batch_size)


@dataclass(frozen=True)
class FixedSizeGaussian(Event):
    """One release of a Gaussian mechanism on a uniformly random batch of fixed size, without replacement.

    Every release draws its batch anew, independently of the others. Batches cut from one shuffled pass are NOT that: see
    `shuffled_pass`. The number of examples is the same for neighbours, so the relation must be replace_one.

    Args:
      noise_multiplier: standard deviation of the noise / L2 sensitivity under replace-one: twice the clipping norm.
      num_examples: size of the data set.
      batch_size: at most num_examples.

    Raises:
      AccountingError: for numbers out of range.
    """

    kind: ClassVar[str] = "fixed_size_gaussian"

    noise_multiplier: float
    num_examples: int
    batch_size: int

    def __post_init__(self) -> None:
        where = "FixedSizeGaussian"
        object.__setattr__(self, "noise_multiplier", check_noise_multiplier(self.noise_multiplier, where=where))
        object.__setattr__(self, "num_examples", _check_size(self.num_examples, "num_examples", where))
        object.__setattr__(self, "batch_size", _check_size(self.batch_size, "batch_size", where))
        if self.batch_size > self.num_examples:
            raise AccountingError(f"{where}: batch_size {self.batch_size} exceeds num_examples {self.num_examples}; draw fewer.")

    @property
    def sample_rate(self) -> float:
        """Probability with which an example is in a batch."""
        return self.batch_size / self.num_examples

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict that `from_dict` turns back into an equal event."""
        return {
            "kind": self.kind,
            "noise_multiplier": self.noise_multiplier,
            "num_examples": self.num_examples,
            "batch_size": self.batch_size,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FixedSizeGaussian:
        """Returns the event described by `data`; raises AccountingError for anything else."""
        return cls(**fields_of(cls, data, ("noise_multiplier", "num_examples", "batch_size")))

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """What a canonical order sorts by, among events of one kind."""
        return (self.noise_multiplier, self.num_examples, self.batch_size)


# Every kind of event that a training step can be: a Gaussian mechanism on a batch.
GaussianEvent = SampledGaussian | CappedGaussian | FixedSizeGaussian


def shuffled_pass(noise_multiplier: float) -> SampledGaussian:
    """Returns the event of one pass over shuffled data in disjoint batches, no amplification by the shuffle claimed.

    Args:
      noise_multiplier: noise standard deviation of every batch / L2 sensitivity of a batch.

    Guarantee: for the relations zero_out and replace_one. Given the order, an example is in one batch of the pass, whose
      release is one full Gaussian one; the other releases of the pass are the same for both neighbours. Adding or removing
      an example would move the others between batches: account for that as zero_out, with a constant denominator.
    """
    return SampledGaussian(noise_multiplier, 1.0)


def _check_size(value: Any, name: str, where: str) -> int:
    size = check_count(value, name, where=where)
    if not 1 <= size <= _MAX_EXAMPLES:
        raise AccountingError(f"{where}: {name} must lie between 1 and 10^12, got {size}; pass a number of examples.")
    return size
