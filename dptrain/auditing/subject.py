"""One step of a run on logical batches of the auditor's choice, before and after noise, in units of the noise.

The steps are those of ``dptrain/step.py``, with the run's own backend, plan and loss. What is observed is what an attacker observes who
watches training: the change of the weights under plain gradient descent, which is the release itself. The weights are put back after
every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from accounting import PrivacyLedger
from dptrain import trainer  # its parts are what runs use, so they are what is audited
from dptrain.auditing.bounds import Array
from dptrain.auditing.watch import Watch, flat
from dptrain.config import OptimizerConfig
from dptrain.randomness import NOISE
from dptrain.sampling import physical_batches, take
from dptrain.setup import Setup


class StepWatch(Watch):
    """Leaves out the projection, which is post-processing, and notes what the ledger held when the weights changed."""

    ledger: PrivacyLedger
    recorded: int = 0

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.counts_off: list[float] = []  # noise of each released count, over its claimed standard deviation

    def privatize(self, total: Any, plan: Any, stds: Any, noise: Any) -> Any:
        count = plan.count
        exact = self._inner.counts(total)
        released = self._inner.privatize(total, plan, stds, noise)
        if count is not None:
            self.counts_off.append((self._inner.counts(released)[count.name] - exact.get(count.name, 0.0)) / stds[count.name])
        return released

    def apply(self, model: Any, optimizer: Any, released: Any, scale: float, learning_rate: float | None) -> None:
        self.recorded = self.ledger.num_releases
        self._inner.apply(model, optimizer, released, scale, learning_rate)

    def project(self, model: Any, plan: Any) -> dict[str, float]:
        return {}


@dataclass
class Chosen:
    """A sampler that gives what it is told."""

    num_examples: int
    sample_rate: float = 1.0
    indices: Array | Any = field(default_factory=lambda: np.zeros(0, np.int64))

    def sample(self, step: int) -> Any:
        """The chosen indices."""
        return self.indices


class Subject:
    """The step under audit.

    Args:
        setup: the run.
        x, y: examples to choose from.
        noise_multiplier: of the steps; the code under audit is the same for any.
        physical_batch_size: B.
        expected_batch_size: what sums are divided by, a constant.
    """

    def __init__(
        self, setup: Setup, x: Any, y: Any, noise_multiplier: float = 1.0, physical_batch_size: int = 8, expected_batch_size: int = 8
    ) -> None:
        self.setup, self.plan, self.x, self.y = setup, setup.plan, x, y
        self.claimed = setup.plan  # of ``total``; another one where clipping norms have moved by ``factor``
        self.factor: tuple[float, ...] = ()
        self.count = 0.0  # of the last ``total``
        privacy = setup.config.privacy
        mechanism = trainer.GaussianMechanism(noise_multiplier, privacy.allocation, privacy.noise_weights)
        self.stds = mechanism.stds(self.plan, privacy.relation)
        self.event = trainer.release_event(self.plan, self.stds, 1.0, privacy.relation, privacy.noise)
        self.watch, self.ledger = StepWatch(setup.backend), PrivacyLedger(None)
        self.watch.ledger = self.ledger
        self.start = self.watch.get_weights(setup.model)
        self.chosen, self.size, self.steps, self.late = Chosen(expected_batch_size), physical_batch_size, 0, 0
        # The change of the weights is about one standard deviation of the noise, so that nothing of it is lost to rounding.
        self.rate = expected_batch_size / float(np.median([self.stds[g.name] for g in self.plan.gradient_groups]))
        optimizer = self.watch.build_optimizer(OptimizerConfig(name="sgd", learning_rate=self.rate), setup.model)
        release = trainer.Release(self.stds, self.event, trainer.RandomKey.make(NOISE), self.ledger, noise=privacy.noise)
        self.step = trainer.TrainingStep(
            self.watch, setup.model, setup.loss, optimizer, self.plan, self.chosen, x, y, physical_batch_size,  # type: ignore[arg-type]
            lambda t: self.rate, setup.config.seed, release, setup.config.performance.two_pass,
        )  # fmt: skip

    @property
    def std(self) -> Array:
        """Noise standard deviation of every number of a release."""
        return self._join({g.name: np.full(len(part), self.stds[g.name]) for g, part in self._parts()})

    def _parts(self) -> list[tuple[Any, Array]]:
        vectors = flat(self.watch.parameters(self.setup.model), self.plan)
        return [(group, vectors[group.name]) for group in self.plan.gradient_groups]

    def _join(self, vectors: dict[str, Array]) -> Array:
        return np.concatenate([vectors[g.name] for g in self.plan.gradient_groups])

    def groups(self, vector: Array) -> dict[str, Array]:
        """A whitened vector by group."""
        sizes = np.cumsum([len(part) for _, part in self._parts()])[:-1]
        return dict(zip([g.name for g in self.plan.gradient_groups], np.split(vector, sizes), strict=True))

    def whitened(self, arrays: dict[str, np.ndarray]) -> Array:
        """Identifier -> array as one vector, each number over the standard deviation of its noise."""
        return self._join({name: v / self.stds[name] for name, v in flat(arrays, self.plan).items()})

    def total(self, indices: Sequence[int]) -> Array:
        """The sum over a logical batch as the next release will hold it, before noise; whitened."""
        backend, model, total = self.watch, self.setup.model, None
        backend.seed_dropout(model, self.setup.config.seed, self.steps)
        for part, mask in physical_batches(np.asarray(indices, np.int64), self.size):
            found = self.step._sum(backend.batch(take(self.x, part), take(self.y, part), mask, *self.factor))  # type: ignore[attr-defined]
            total = found if total is None else backend.add(total, found)
        total = backend.reduce(backend.zeros(model) if total is None else total)
        self.count = sum(backend.counts(total).values())
        return self.whitened(backend.sums(model, total))

    def release(self, indices: Sequence[int]) -> Array:
        """What an attacker sees of one step over a logical batch; whitened, so that its noise should be N(0, 1)."""
        self.chosen.indices = np.asarray(indices, np.int64)
        model = self.setup.model
        before = self.watch.parameters(model)
        self.step(self.steps)
        self.steps += 1
        self.late += self.watch.recorded < self.steps
        after = self.watch.parameters(model)
        self.watch.set_weights(model, self.start)
        unit = self.rate / self.chosen.num_examples
        return self.whitened({name: (np.asarray(before[name], np.float64) - after[name]) / unit for name in before})
