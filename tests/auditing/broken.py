"""Mechanisms that are broken on purpose: each takes a sound setup and returns one that an audit must refuse.

They use public extension points alone: a backend that delegates to a real one, a sampler, a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dptrain.auditing.watch import Watch
from dptrain.plan import Plan
from dptrain.randomness import NOISE, RandomKey, StepNoise
from dptrain.sampling import PoissonSampler
from dptrain.setup import Setup


class NoNoise(Watch):
    """Forgets the noise."""

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        return total


class HalvedNoise(Watch):
    """Half the standard deviation; also what forgetting the factor of ``replace_one`` looks like."""

    factor = 0.5

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        return self._inner.privatize(total, plan, {name: self.factor * s for name, s in stds.items()}, noise)


class NoiseOnOneGroup(Watch):
    """Noise on the first group alone."""

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        return self._inner.privatize(total, plan, {name: s if i == 0 else 0.0 for i, (name, s) in enumerate(stds.items())}, noise)


class NoNoiseOnOneParameter(Watch):
    """A bias is released as it is."""

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        model = self.model
        before = self._inner.sums(model, total)
        released = self._inner.privatize(total, plan, stds, noise)
        name = min(before, key=lambda n: before[n].size)
        return self._inner.shifted(model, released, {name: before[name] - self._inner.sums(model, released)[name]})


class OtherNoise(Watch):
    """Noise of the right variance that a subclass makes."""

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        raise NotImplementedError

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        std, rng = next(iter(stds.values())), np.random.default_rng()
        arrays = {name: std * self.draw(rng, value.shape) for name, value in self._inner.sums(self.model, total).items()}
        return self._inner.shifted(self.model, total, arrays)


class UniformNoise(OtherNoise):
    """Bounded, so that some outcomes rule a data set out."""

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.uniform(-(3**0.5), 3**0.5, shape)


class BroadcastNoise(OtherNoise):
    """One number for a whole parameter."""

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, rng.standard_normal())


class RepeatedNoise(OtherNoise):
    """The second half of a parameter gets the noise of the first."""

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape))
        return np.resize(rng.standard_normal((size + 1) // 2), size).reshape(shape)


class SameNoise(Watch):
    """The noise of step 0 in every step."""

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        return self._inner.privatize(total, plan, stds, replace(noise, step=0))


class NoNoiseOnEmptyBatches(Watch):
    """Nothing was drawn, so nothing is added."""

    empty = False

    def zeros(self, model: Any) -> Any:
        self.empty = True
        return self._inner.zeros(model)

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        empty, self.empty = self.empty, False
        return total if empty else self._inner.privatize(total, plan, stds, noise)


class ClipSkipped(Watch):
    """One group is not clipped; for plans with several."""

    def bounded_sum(self, model: Any, loss: Any, batch: Any, plan: Plan, two_pass: bool = False) -> Any:
        groups = (replace(plan.groups[0], clip_norm=1e6), *plan.groups[1:])
        return self._inner.bounded_sum(model, loss, batch, replace(plan, groups=groups), two_pass)


class BatchClipped(Watch):
    """Clips the sum of a logical batch, not the examples."""

    def bounded_sum(self, model: Any, loss: Any, batch: Any, plan: Plan, two_pass: bool = False) -> Any:
        return self._inner.bounded_sum(model, loss, batch, plan.with_clip_norm(1e6), two_pass)

    def reduce(self, total: Any) -> Any:
        total = self._inner.reduce(total)
        arrays = self._inner.sums(self.model, total)
        norm = sum(float((value.astype(np.float64) ** 2).sum()) for value in arrays.values()) ** 0.5
        scale = min(1.0, 1.0 / max(norm, 1e-30))
        return self._inner.shifted(self.model, total, {name: (scale - 1) * value for name, value in arrays.items()})


class AddedTwice(Watch):
    """Every physical batch after the first counts twice."""

    def add(self, total: Any, part: Any) -> Any:
        return self._inner.add(self._inner.add(total, part), part)


class DataDependentDenominator(Watch):
    """Divides by the number of examples drawn."""

    drawn = 0

    def batch(self, x: Any, y: Any, mask: np.ndarray, *factor: float) -> Any:
        self.drawn += int(mask.sum())
        return self._inner.batch(x, y, mask, *factor)

    def privatize(self, *args: Any) -> Any:
        # What was looked at since the last step, by whoever, is not of this one.
        return self._inner.privatize(*args)

    def seed_dropout(self, model: Any, seed: int, step: int) -> None:
        self.drawn = 0
        self._inner.seed_dropout(model, seed, step)

    def apply(self, model: Any, optimizer: Any, released: Any, scale: float, learning_rate: float | None) -> None:
        self._inner.apply(model, optimizer, released, 1.0 / max(1, self.drawn), learning_rate)


class NoisePerPhysicalBatch(Watch):
    """Noise of full size on every physical batch, so none where nothing was drawn and too much elsewhere."""

    plan: Plan
    stds: Mapping[str, float]

    def compile(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        compiled, key, calls = self._inner.compile(function), RandomKey.make(NOISE), iter(range(10**9))
        return lambda batch: self._inner.privatize(compiled(batch), self.plan, self.stds, StepNoise(key, next(calls)))

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        return total


class NoProjection(Watch):
    """Says that constraints hold, and restores none."""

    first: Mapping[str, float] = {}

    def project(self, model: Any, plan: Plan) -> Mapping[str, float]:
        return self.first


class UnboundedCount(Watch):
    """The count that moves a clipping norm is released without noise."""

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        count = plan.count.name if plan.count else ""
        return self._inner.privatize(total, plan, {name: 0.0 if name == count else s for name, s in stds.items()}, noise)


class Shuffled(PoissonSampler):
    """Passes over shuffled data, accounted as Poisson."""

    def sample(self, step: int) -> np.ndarray:
        size = max(1, round(self.sample_rate * self.num_examples))
        per_pass = max(1, self.num_examples // size)
        order = self.key.generator(step // per_pass).permutation(self.num_examples)
        start = (step % per_pass) * size
        return np.sort(order[start : start + size])


class FixedSize(PoissonSampler):
    """Batches of one size without replacement, accounted as Poisson."""

    def sample(self, step: int) -> np.ndarray:
        size = max(1, round(self.sample_rate * self.num_examples))
        return np.sort(self.key.generator(step).choice(self.num_examples, size, replace=False))


class Favourites(PoissonSampler):
    """Draws the first half of the data twice as often, the rest less, at the right rate on the whole."""

    def sample(self, step: int) -> np.ndarray:
        rates = np.where(np.arange(self.num_examples) < self.num_examples // 2, 4 / 3, 2 / 3) * self.sample_rate
        return np.flatnonzero(self.key.generator(step).random(self.num_examples) < rates)


def with_backend(setup: Setup, watch: type[Watch]) -> Setup:
    """The setup with a broken backend."""
    broken = watch(setup.backend)
    broken.model = setup.model  # type: ignore[attr-defined]
    if isinstance(broken, NoisePerPhysicalBatch):
        from dptrain.mechanism import GaussianMechanism

        broken.plan, broken.stds = setup.plan, GaussianMechanism(1.0).stds(setup.plan)
    return replace(setup, backend=broken)  # type: ignore[arg-type]
