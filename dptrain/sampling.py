"""Poisson sampling, and fixed-size physical batches with a mask.

The accountants assume that each example enters each step independently with probability q, so that is what is done
(math.md section 6). The realised size varies, may be 0, and is split into physical batches of ONE shape afterwards: a single draw
per logical batch, never one draw per physical batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dptrain.errors import ConfigError
from dptrain.randomness import RandomKey

LARGEST = 512  # rows up to which a logical batch is not split where the user does not say
# Physical batches are added up in float64, but each is summed in float32: with 16,384 aligned gradients in one of them, that rounds by more
# than ``mechanism.FLOAT_MARGIN`` pays for (docs/noise.md).
MOST = 4096


@dataclass(frozen=True)
class PoissonSampler:
    """Draws the logical batch of each step.

    Args:
        num_examples: N, examples in the data set.
        sample_rate: q, probability with which each example enters a step.
        key: secret key of the sampling stream.
    """

    num_examples: int
    sample_rate: float
    key: RandomKey

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ConfigError("The data set has no examples to sample from; check the data section.")
        if not (math.isfinite(self.sample_rate) and 0 < self.sample_rate <= 1):
            raise ConfigError(f"sample_rate must lie in (0, 1], not {self.sample_rate!r}.")

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
        threshold = np.uint64(math.floor(self.sample_rate * 2.0**64))
        draws = generator.integers(0, 2**64, size=self.num_examples, dtype=np.uint64)
        return np.flatnonzero(draws < threshold)


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
