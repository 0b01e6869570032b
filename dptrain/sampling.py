"""How logical batches are drawn, what that is to an accountant, and fixed-size physical batches with a mask.

An accountant assumes a way of drawing, so that very way is what is done here (math.md section 6, docs/sampling.md), and ``event_of`` is the
one place that says which event a sampler gives: it asks the sampler itself (pitfalls.md G25). A draw is split into physical batches of ONE
shape afterwards: a single draw per logical batch, never one draw per physical batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from accounting import CappedGaussian, FixedSizeGaussian, GaussianEvent, NeighboringRelation, SampledGaussian, shuffled_pass
from dptrain.errors import ConfigError
from dptrain.randomness import RandomKey

LARGEST = 512  # rows up to which a logical batch is not split where the user does not say
# Physical batches are added up in float64, but each is summed in float32: with 16,384 aligned gradients in one of them, that rounds by more
# than ``mechanism.FLOAT_MARGIN`` pays for (docs/noise.md).
MOST = 4096


SchemeKind = Literal["poisson", "fixed_size", "shuffle"]
POISSON_WORDS, SHUFFLE_WORDS = "Poisson sampling", "shuffled passes without amplification"
THINNING, PASSES = 1, 1  # streams of a sampling key, beside the draws of Poisson samples in stream 0


class Sampler(Protocol):
    """Draws the logical batch of each step."""

    @property
    def num_examples(self) -> int:
        """N, a public constant."""
        ...

    @property
    def sample_rate(self) -> float:
        """Expected batch size over N; what sums are divided by is ``sample_rate * num_examples``, whatever was drawn."""
        ...

    def sample(self, step: int) -> np.ndarray:
        """The indices of one logical batch; the same key and step give the same draw."""
        ...


@dataclass(frozen=True)
class PoissonSampler:
    """Draws every example independently.

    Args:
        num_examples: N, examples in the data set.
        sample_rate: q, probability with which each example enters a step.
        key: secret key of the sampling stream.
    """

    num_examples: int
    sample_rate: float
    key: RandomKey

    def __post_init__(self) -> None:
        refuse_empty(self.num_examples)
        if not (math.isfinite(self.sample_rate) and 0 < self.sample_rate <= 1):
            raise ConfigError(f"sample_rate must lie in (0, 1], not {self.sample_rate!r}.")

    @property
    def threshold(self) -> int:
        """A 64-bit draw below it lets an example in."""
        return math.floor(self.sample_rate * 2.0**64)

    def sample(self, step: int) -> np.ndarray:
        """The indices of one logical batch.

        Args:
            step: index of the step; the same key and step give the same draw.
        Returns:
            Sorted indices ``[size]``, int64; possibly empty.
        Guarantee: each index is drawn independently with probability ``floor(q 2^64) / 2^64 <= q``.
        Source: math.md section 6.
        """
        generator = self.key.generator(step)
        if self.sample_rate >= 1:
            return np.arange(self.num_examples)
        draws = generator.integers(0, 2**64, size=self.num_examples, dtype=np.uint64)
        return np.flatnonzero(draws < np.uint64(self.threshold))


@dataclass(frozen=True)
class CappedSampler:
    """Draws every example independently, and keeps a uniformly random part of the draw where it is too large.

    Args:
        num_examples: N, examples in the data set.
        sample_rate: q, probability with which each example is drawn.
        max_batch_size: the most that are kept; below N, or there would be nothing to cap.
        key: secret key of the sampling stream.
    """

    num_examples: int
    sample_rate: float
    max_batch_size: int
    key: RandomKey
    _drawn: PoissonSampler = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_drawn", PoissonSampler(self.num_examples, self.sample_rate, self.key))
        if not 1 <= self.max_batch_size < self.num_examples:
            raise ConfigError(f"max_batch_size must lie between 1 and N - 1 = {self.num_examples - 1}, not {self.max_batch_size!r}.")

    @property
    def drawn_rate(self) -> float:
        """The probability with which an example really is drawn: q, rounded down to a multiple of 2^-64."""
        return min(self._drawn.threshold / 2.0**64, 1.0)

    def sample(self, step: int) -> np.ndarray:
        """The indices of one logical batch.

        Args:
            step: index of the step; the same key and step give the same draw.
        Returns:
            Sorted indices ``[size]``, int64; possibly empty, never more than ``max_batch_size``.
        Guarantee: given how many examples were drawn, what is kept is a uniformly random subset of them, so that the step is the mechanism
            that ``CappedGaussian`` describes. What is kept is drawn from a stream of its own: which examples were drawn says nothing of it.
        Source: ``accounting/mixtures.py``, "Capped Poisson".
        """
        found = self._drawn.sample(step)
        if len(found) <= self.max_batch_size:
            return found
        return np.sort(self.key.generator(step, THINNING).choice(found, self.max_batch_size, replace=False, shuffle=False))


@dataclass(frozen=True)
class FixedSizeSampler:
    """Draws a uniformly random subset of one size, anew at each step.

    Args:
        num_examples: N, examples in the data set.
        batch_size: B, at most N.
        key: secret key of the sampling stream.
    """

    num_examples: int
    batch_size: int
    key: RandomKey

    def __post_init__(self) -> None:
        refuse_size(self.batch_size, self.num_examples)

    @property
    def sample_rate(self) -> float:
        """B / N, the probability with which an example is in a batch."""
        return self.batch_size / self.num_examples

    def sample(self, step: int) -> np.ndarray:
        """The indices of one logical batch.

        Args:
            step: index of the step; the same key and step give the same draw.
        Returns:
            Sorted indices ``[B]``, int64.
        Guarantee: every subset of B examples is equally likely, independently at each step.
        Source: ``accounting/mixtures.py``, "Fixed size".
        """
        return np.sort(self.key.generator(step).choice(self.num_examples, self.batch_size, replace=False, shuffle=False))


@dataclass(frozen=True)
class ShuffledSampler:
    """Cuts passes over the data, each in a secret order of its own, into batches of exactly one size.

    Args:
        num_examples: N, examples in the data set.
        batch_size: B, at most N; the ``N mod B`` examples at the end of an order are left out of that pass.
        key: secret key of the sampling stream.
        first: the step at which the first pass begins. A key must not be used with another value of it.
    """

    num_examples: int
    batch_size: int
    key: RandomKey
    first: int = 0
    _order: dict[int, np.ndarray] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        refuse_size(self.batch_size, self.num_examples)

    @property
    def sample_rate(self) -> float:
        """B / N, the part of the data that a batch is."""
        return self.batch_size / self.num_examples

    @property
    def per_pass(self) -> int:
        """Batches of a pass, ``floor(N / B)``."""
        return self.num_examples // self.batch_size

    def sample(self, step: int) -> np.ndarray:
        """The indices of one logical batch.

        Args:
            step: index of the step, at least ``first``; the same key and step give the same draw.
        Returns:
            Sorted indices ``[B]``, int64.
        Raises:
            ConfigError: no pass of this sampler has the step.
        Guarantee: steps ``first + k per_pass`` up to ``first + (k + 1) per_pass - 1`` cut the order of pass k into disjoint parts, so that
            no example is in two of them. The order follows from key and k alone.
        Source: ``accounting/schemes.py``, ``shuffled_pass``.
        """
        if step < self.first:
            raise ConfigError(f"Step {step} is before the first pass of this sampler, which begins at step {self.first}.")
        number, place = divmod(step - self.first, self.per_pass)
        if number not in self._order:
            self._order.clear()  # one order at a time
            self._order[number] = self.key.generator(number, PASSES).permutation(self.num_examples)
        return np.sort(self._order[number][place * self.batch_size : (place + 1) * self.batch_size])


def refuse_empty(num_examples: int) -> None:
    """Refuse a data set without examples.

    Raises:
        ConfigError: there are none.
    """
    if num_examples < 1:
        raise ConfigError("The data set has no examples to sample from; check the data section.")


def refuse_size(batch_size: int, num_examples: int) -> None:
    """Refuse batches that cannot be drawn without replacement.

    Raises:
        ConfigError: there are no examples, or too few, or the batch is empty.
    """
    refuse_empty(num_examples)
    if not 1 <= batch_size <= num_examples:
        raise ConfigError(f"The batch size must lie between 1 and the {num_examples} examples of the data set, not {batch_size!r}.")


@dataclass(frozen=True)
class Scheme:
    """How the examples of a run enter its steps, all of it public: a sampler without its key.

    Args:
        kind: ``poisson``, ``fixed_size`` or ``shuffle``.
        sample_rate: q, or B / N.
        batch_size: B; None for ``poisson``, whose batches vary.
        max_batch_size: of ``poisson``; None where nothing is dropped.
    """

    kind: SchemeKind
    sample_rate: float
    batch_size: int | None = None
    max_batch_size: int | None = None

    def sampler(self, num_examples: int, key: RandomKey, first: int = 0) -> AnySampler:
        """The sampler for a data set.

        Args:
            num_examples: N.
            key: secret key of the sampling stream.
            first: the step with which a session begins; a shuffled pass begins there, too.
        Returns:
            The sampler; where a cap is no cap, the one without.
        """
        if self.kind == "poisson":
            if self.max_batch_size is None or self.max_batch_size >= num_examples:
                return PoissonSampler(num_examples, self.sample_rate, key)
            return CappedSampler(num_examples, self.sample_rate, self.max_batch_size, key)
        assert self.batch_size is not None
        if self.kind == "fixed_size":
            return FixedSizeSampler(num_examples, self.batch_size, key)
        return ShuffledSampler(num_examples, self.batch_size, key, first)

    def public(self, num_examples: int) -> AnySampler:
        """A sampler to ask for its event or for words, never for a batch: its key is nobody's secret."""
        return self.sampler(num_examples, RandomKey(0))


AnySampler = PoissonSampler | CappedSampler | FixedSizeSampler | ShuffledSampler


def event_of(
    sampling: Sampler | float, noise_multiplier: float, relation: NeighboringRelation | str = NeighboringRelation.add_remove
) -> GaussianEvent:
    """What one release is to an accountant: the only place where a way of drawing becomes an event.

    Args:
        sampling: the sampler itself; a number stands for Poisson samples of this rate, drawn by ``PoissonSampler``.
        noise_multiplier: what is claimed of the noise.
        relation: the neighbouring relation.
    Returns:
        The event of the ``steps_per_release`` steps that one record stands for.
    Raises:
        ConfigError: nothing is proven about the sampler under this relation, or about its class at all. A subclass is another class: it may
            draw in another way.
    Source: ``accounting/mixtures.py`` and ``accounting/schemes.py``.
    """
    if isinstance(sampling, float | int):
        return SampledGaussian(noise_multiplier, sampling)
    if type(sampling) is PoissonSampler:
        return SampledGaussian(noise_multiplier, sampling.sample_rate)
    if type(sampling) is CappedSampler:
        return CappedGaussian(noise_multiplier, sampling.drawn_rate, sampling.num_examples, sampling.max_batch_size)
    if type(sampling) is FixedSizeSampler:
        refuse_relation("fixed_size", relation)
        return FixedSizeGaussian(noise_multiplier, sampling.num_examples, sampling.batch_size)
    if type(sampling) is ShuffledSampler:
        refuse_relation("shuffle", relation)
        return shuffled_pass(noise_multiplier)
    name = type(sampling).__name__
    raise ConfigError(f"Nothing is known of the batches that {name} draws, so no event covers them; use a sampler of dptrain.sampling.")


def relation_problem(kind: SchemeKind, relation: NeighboringRelation | str) -> str | None:
    """Why a way of drawing has no guarantee under a relation, and what to do; None where it has one."""
    relation = NeighboringRelation(relation)
    if kind == "fixed_size" and relation is not NeighboringRelation.replace_one:
        return (
            "batches of a fixed size have a guarantee under privacy.relation replace_one only: the number of examples must be the same for "
            "both neighbours; set privacy.relation to replace_one (twice the noise for the same bound), or sampling.scheme to poisson"
        )
    if kind == "shuffle" and relation is NeighboringRelation.add_remove:
        return (
            "shuffled passes have no guarantee under privacy.relation add_remove: one example more would move the others between batches; "
            "set privacy.relation to zero_out (the same numbers) or replace_one, or sampling.scheme to poisson"
        )
    return None


def refuse_relation(kind: SchemeKind, relation: NeighboringRelation | str) -> None:
    """Refuse a way of drawing that has no guarantee under a relation.

    Raises:
        ConfigError: says what to do.
    """
    problem = relation_problem(kind, relation)
    if problem is not None:
        raise ConfigError(f"sampling.scheme {kind}: {problem}.")


def steps_per_release(sampling: Sampler | float) -> int:
    """Steps that one record stands for: a pass of a shuffled sampler, one step of any other.

    Guarantee: for ``ShuffledSampler`` a record before step ``first + k per_pass`` covers the steps up to the next one, which are those of
        pass k, or its beginning. No example is in two batches of a pass, so given the order these steps are one Gaussian release for every
        example, and ``shuffled_pass`` covers them. A session that is continued has another ``first`` and another key: it begins with a pass
        and a record of its own, and none of its steps is covered by a record of the session before. With an ``unsafe_seed`` key and
        ``first`` are the same in both: a step that is repeated has the same batch and the same noise, so it releases the same bits again,
        and the rest of a pass that was begun has the examples that are left of the same order.
    """
    return sampling.per_pass if type(sampling) is ShuffledSampler else 1


def first_step(sampling: Sampler) -> int:
    """The step at which the first record of a sampler's session is due."""
    return sampling.first if type(sampling) is ShuffledSampler else 0


def sampling_kind(sampling: Sampler) -> str:
    """``sampling`` of ``privacy.json``: ``poisson``, ``capped_poisson``, ``fixed_size`` or ``shuffle``."""
    kinds: dict[type, str] = {CappedSampler: "capped_poisson", FixedSizeSampler: "fixed_size", ShuffledSampler: "shuffle"}
    return kinds.get(type(sampling), "poisson")


def sampling_words(sampling: Sampler) -> str:
    """How examples are drawn, for a sentence beside an epsilon."""
    if type(sampling) is CappedSampler:
        return f"{POISSON_WORDS}, at most {sampling.max_batch_size} examples kept"
    if type(sampling) is FixedSizeSampler:
        return f"batches of {sampling.batch_size} drawn without replacement"
    return SHUFFLE_WORDS if type(sampling) is ShuffledSampler else POISSON_WORDS


def physical_batches(indices: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split a logical batch into physical batches of one fixed size.

    Args:
        indices: the logical batch, ``[n]``.
        size: physical batch size B.
    Yields:
        ``(indices [B], mask [B])``; padded places repeat an index of the same batch and have mask False, so weight 0. Nothing is
        yielded for an empty batch.
    """
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        mask = np.zeros(size, dtype=bool)
        mask[: len(part)] = True
        yield np.concatenate([part, np.full(size - len(part), part[0], dtype=part.dtype)]), mask


def check_physical_batch_size(size: Any) -> int | None:
    """A physical batch size as the user gave it; None stands for a choice of ours.

    Raises:
        ConfigError: it is not a positive whole number.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1):
        raise ConfigError(f"physical_batch_size must be a whole number above 0, not {size!r}.")
    if size is not None and size > MOST:
        raise ConfigError(
            f"physical_batch_size must be at most {MOST}, not {size}: a longer sum rounds too much; larger logical batches are split."
        )
    return None if size is None else int(size)


def default_physical_batch(expected_batch_size: float, num_examples: int, copies: int = 1, largest: int | None = LARGEST) -> int:
    """The size of physical batches where the user names none: nearly every logical batch whole, if memory allows.

    Args:
        expected_batch_size: q N.
        num_examples: N.
        copies: rows that one example takes.
        largest: rows up to which a logical batch is not split; half of it is used beyond. None never splits.
    Returns:
        Examples per physical batch; no guarantee depends on it.
    """
    whole = max(1, min(math.ceil(expected_batch_size + 3 * math.sqrt(expected_batch_size)), num_examples, MOST // copies))
    return whole if largest is None or whole * copies <= largest else max(1, largest // 2 // copies)


def take(x: Any, indices: np.ndarray) -> Any:
    """The examples at some indices.

    Args:
        x: an array ``[N, ...]``, or a tuple, list or mapping of such.
        indices: ``[n]``.
    Returns:
        The same structure of arrays ``[n, ...]``.
    """
    if isinstance(x, Mapping):
        return {key: take(value, indices) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return tuple(take(value, indices) for value in x)
    return x[indices]
