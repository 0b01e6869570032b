"""The loader of ``PrivacyEngine``: Poisson batches in physical batches of one size, or a shuffled loader of the user's own as it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from dptrain.errors import ConfigError
from dptrain.randomness import SAMPLING, RandomKey
from dptrain.sampling import PoissonSampler, check_physical_batch_size, default_physical_batch, physical_batches

if TYPE_CHECKING:
    from dptrain_torch.privacy_engine import PrivacyEngine

TAKEN_OVER = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)
OURS = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator")


@dataclass(frozen=True)
class Ticket:
    """What the engine must know of a physical batch.

    Args:
        mask: bool ``[B]``; False marks padding.
        last: whether it ends its logical batch.
        origin: number of the pass that it belongs to.
    """

    mask: np.ndarray
    last: bool
    origin: int


def private_loader(engine: PrivacyEngine, data: Any, physical: int | None, options: dict[str, Any]) -> PoissonLoader | ShuffledLoader:
    """The loader for an engine's kind of sampling.

    Args:
        engine: the engine.
        data: a map-style data set, or a ``DataLoader`` over one.
        physical: physical batch size, or None.
        options: of ``DataLoader``.
    Returns:
        An iterable.
    Raises:
        ConfigError: the data cannot be sampled, or an option would decide what is sampled.
    """
    bad = [name for name in options if name in OURS]
    if bad:
        raise ConfigError(f"{', '.join(bad)} would decide which examples are drawn, which the engine does; remove them.")
    loader = data if isinstance(data, DataLoader) else None
    dataset = loader.dataset if loader is not None else data
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ConfigError("The data set must have a length and items (map-style): an example is drawn by its index.")
    size = len(dataset)  # type: ignore[arg-type]
    if size != engine.schedule.num_examples:
        raise ConfigError(f"The data set has {size} examples and sample_size is {engine.schedule.num_examples}; make them equal.")
    if loader is not None:
        check_sampler(loader)
    if engine.schedule.sampling == "shuffle":
        if loader is None:
            raise ConfigError("With sampling='shuffle' give a DataLoader(data, batch_size=..., shuffle=True).")
        if options:
            raise ConfigError(f"{', '.join(options)}: with sampling='shuffle' set them in your DataLoader.")
        return ShuffledLoader(engine, loader)
    if loader is not None:
        options = {name: getattr(loader, name) for name in TAKEN_OVER if getattr(loader, name, None) is not None} | options
    return PoissonLoader(engine, dataset, physical, options)


def check_sampler(loader: DataLoader[Any]) -> None:
    """Refuse a loader that weighs or repeats examples (pitfalls.md G25).

    Raises:
        ConfigError: its sampler is not a plain pass over the data.
    """
    sampler = loader.sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None
    )
    if not plain or type(loader.batch_sampler) is not BatchSampler:
        name = type(sampler if not plain else loader.batch_sampler).__name__
        raise ConfigError(f"The DataLoader's {name} decides which examples are drawn, and nothing is known of it; use shuffle=True alone.")


class PoissonLoader:
    """Physical batches of Poisson-sampled logical batches; see ``PrivacyEngine.loader``."""

    def __init__(self, engine: PrivacyEngine, dataset: Any, physical: int | None, options: dict[str, Any]) -> None:
        schedule = engine.schedule
        self.engine, self.dataset, self.options = engine, dataset, options
        whole = default_physical_batch(schedule.expected_batch_size, schedule.num_examples, largest=None)
        self.physical_batch_size = check_physical_batch_size(physical) or whole
        if engine.sampling_key is None:
            engine.sampling_key = RandomKey.make(SAMPLING, engine.unsafe_seed)
        self.sampler = PoissonSampler(schedule.num_examples, schedule.sample_rate, engine.sampling_key)

    def __len__(self) -> int:
        """Logical batches in a pass: steps of the optimizer. Physical batches are as many or more, by chance."""
        left = self.engine.steps_left
        return self.engine.schedule.steps_per_pass if left is None else min(left, self.engine.schedule.steps_per_pass)

    def _indices(self, tickets: deque[Ticket], origin: int) -> Iterator[list[int]]:
        for _ in range(len(self)):
            step, self.engine.drawn = self.engine.drawn, self.engine.drawn + 1  # each index is drawn once, used or not
            indices = self.sampler.sample(step)
            parts = list(physical_batches(indices, self.physical_batch_size))
            if not parts:  # an empty logical batch releases noise, so it is handed out too
                parts = [(np.zeros(self.physical_batch_size, np.int64), np.zeros(self.physical_batch_size, bool))]
            for i, (part, mask) in enumerate(parts):
                tickets.append(Ticket(mask, i == len(parts) - 1, origin))
                yield part.tolist()

    def __iter__(self) -> Iterator[Any]:
        origin = self.engine.new_pass()
        tickets: deque[Ticket] = deque()
        batches: Any = Indices(self._indices(tickets, origin))
        for batch in DataLoader(self.dataset, batch_sampler=batches, **self.options):
            self.engine.arrive(tickets.popleft())
            yield batch
        self.engine.check_served()


@dataclass
class Indices:
    """An iterator as the batch sampler that ``DataLoader`` wants."""

    batches: Iterator[list[int]]

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches


class ShuffledLoader:
    """The passes of a shuffled ``DataLoader``, which the engine counts."""

    def __init__(self, engine: PrivacyEngine, loader: DataLoader[Any]) -> None:
        self.engine, self.loader = engine, loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        origin = self.engine.new_pass(observed=True)
        try:
            for batch in self.loader:
                self.engine.check_origin(origin)
                yield batch
        finally:
            self.engine.end_pass(origin)
