"""More mechanisms that are broken on purpose, as someone would write them who has not read the audit.

Each takes a sound setup and pytest's ``monkeypatch``, and returns a broken one. Nothing here knows what the audit looks at.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import dptrain.trainer as trainer
from accounting import SampledGaussian
from accounting.prv import PRVAccountant
from accounting.rdp import RDPAccountant
from dptrain.auditing.watch import Watch
from dptrain.guard import Records
from dptrain.mechanism import GaussianMechanism, sensitivity
from dptrain.plan import Plan
from dptrain.randomness import RandomKey, StepNoise
from dptrain.sampling import PoissonSampler
from dptrain.setup import Setup
from dptrain.step import TrainingStep, Update

Break = Callable[[Setup, pytest.MonkeyPatch], Setup]


def gradients(setup: Setup) -> Any:
    """The module of a backend that clips."""
    return importlib.import_module({"torch": "dptrain_torch.gradients", "tensorflow": "dptrain_tf.gradients"}[setup.backend.name])


# --- noise ---


class Broken(Watch):
    """A backend that knows its model."""

    model: Any = None

    def stds_of(self, stds: Mapping[str, float], noise: StepNoise) -> Mapping[str, float]:
        return stds

    def noise_of(self, noise: StepNoise) -> StepNoise:
        return noise

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        return self._inner.privatize(total, plan, self.stds_of(stds, noise), self.noise_of(noise))


class Own(Broken):
    """Noise of the right variance, from the right key, that a subclass makes."""

    def draw(self, rng: np.random.Generator, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        std, arrays = next(iter(stds.values())), self._inner.sums(self.model, total)
        drawn = self.draw(noise.key.generator(noise.step, 7), arrays)
        return self._inner.shifted(self.model, total, {name: std * value for name, value in drawn.items()})


class Laplace(Own):
    def draw(self, rng: Any, arrays: Any) -> Any:
        return {name: rng.laplace(0, 0.5**0.5, v.shape) for name, v in arrays.items()}


class HeavyTails(Own):
    def draw(self, rng: Any, arrays: Any) -> Any:
        return {name: rng.standard_t(8, v.shape) * (6 / 8) ** 0.5 for name, v in arrays.items()}


class CutTails(Own):
    """Nothing beyond three standard deviations."""

    def draw(self, rng: Any, arrays: Any) -> Any:
        return {name: np.clip(rng.standard_normal(v.shape), -3, 3) * 1.0015 for name, v in arrays.items()}


class Rounded(Own):
    """Multiples of a twentieth."""

    def draw(self, rng: Any, arrays: Any) -> Any:
        return {name: np.round(rng.standard_normal(v.shape) * 20) / 20 for name, v in arrays.items()}


class Correlated(Own):
    """Parameters share a part of their noise."""

    def draw(self, rng: Any, arrays: Any) -> Any:
        shared = rng.standard_normal(max(v.size for v in arrays.values()))
        return {n: (0.7 * shared[: v.size] + 0.51**0.5 * rng.standard_normal(v.size)).reshape(v.shape) for n, v in arrays.items()}


class RowsAlike(Own):
    """One row of noise for all rows of a matrix."""

    def draw(self, rng: Any, arrays: Any) -> Any:
        return {name: np.broadcast_to(rng.standard_normal(v.shape[-1:]), v.shape).copy() for name, v in arrays.items()}


class Mirrored(Own):
    """The second half is the first, turned round and negated."""

    def draw(self, rng: Any, arrays: Any) -> Any:
        found = {}
        for name, v in arrays.items():
            half = rng.standard_normal((v.size + 1) // 2)
            found[name] = np.concatenate([half, -half[::-1]])[: v.size].reshape(v.shape)
        return found


class Permuted(Own):
    """The second parameter has the numbers of the first in another order."""

    def draw(self, rng: Any, arrays: Any) -> Any:
        numbers, order = rng.standard_normal(max(v.size for v in arrays.values())), np.random.default_rng(5)
        return {name: order.permutation(numbers)[: v.size].reshape(v.shape) for name, v in arrays.items()}


class WithoutMean(Own):
    """Its sum over a parameter is zero, so the sum of the gradients shows."""

    def draw(self, rng: Any, arrays: Any) -> Any:
        found = {name: rng.standard_normal(v.shape) for name, v in arrays.items()}
        return {name: v - v.mean() if v.size > 50 else v for name, v in found.items()}


class AcrossTheSum(Broken):
    """No noise along the sum itself."""

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        exact = {name: v.astype(np.float64) for name, v in self._inner.sums(self.model, total).items()}
        released = self._inner.privatize(total, plan, stds, noise)
        seen = self._inner.sums(self.model, released)
        length = sum(float((v**2).sum()) for v in exact.values())
        along = sum(float(((seen[n] - exact[n]) * exact[n]).sum()) for n in exact) / max(length, 1e-30)
        return self._inner.shifted(self.model, released, {n: -along * v for n, v in exact.items()})


class GlobalGenerator(Broken):
    """Noise from a generator with a fixed seed: the same in every process."""

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.rng = np.random.default_rng(0)

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        std, arrays = next(iter(stds.values())), self._inner.sums(self.model, total)
        return self._inner.shifted(self.model, total, {n: std * self.rng.standard_normal(v.shape) for n, v in arrays.items()})


class SeededByStep(Broken):
    def noise_of(self, noise: StepNoise) -> StepNoise:
        return replace(noise, key=RandomKey(1234))


class ShortKey(Broken):
    """32 bits of the key are used, as by a ``torch.Generator`` on the CPU."""

    def noise_of(self, noise: StepNoise) -> StepNoise:
        return replace(noise, key=RandomKey(noise.key.value % 2**32))


class EveryTenthStep(Broken):
    def stds_of(self, stds: Mapping[str, float], noise: StepNoise) -> Mapping[str, float]:
        return dict.fromkeys(stds, 0.0) if noise.step % 10 == 9 else stds


class EveryTenthCall(Broken):
    calls = 0

    def stds_of(self, stds: Mapping[str, float], noise: StepNoise) -> Mapping[str, float]:
        self.calls += 1
        return dict.fromkeys(stds, 0.0) if self.calls % 10 == 0 else stds


class QuietLater(Broken):
    """Half the noise after a thousand steps."""

    def stds_of(self, stds: Mapping[str, float], noise: StepNoise) -> Mapping[str, float]:
        return {name: s / 2 for name, s in stds.items()} if noise.step >= 1000 else stds


class Fading(Broken):
    """A little less noise in every step."""

    def stds_of(self, stds: Mapping[str, float], noise: StepNoise) -> Mapping[str, float]:
        return {name: s / (1 + 0.001 * noise.step) for name, s in stds.items()}


class Periodic(Broken):
    """After 256 steps the noise repeats."""

    def noise_of(self, noise: StepNoise) -> StepNoise:
        return replace(noise, step=noise.step % 256)


class Capped(Broken):
    """Never more noise than this, whatever was asked for."""

    def stds_of(self, stds: Mapping[str, float], noise: StepNoise) -> Mapping[str, float]:
        return {name: min(s, 1.0) for name, s in stds.items()}


class Shared(Broken):
    """The noise is divided among physical batches, and added to the first alone."""

    parts = 1

    def add(self, total: Any, part: Any) -> Any:
        self.parts += 1
        return self._inner.add(total, part)

    def seed_dropout(self, *args: Any) -> None:
        self.parts = 1
        self._inner.seed_dropout(*args)

    def stds_of(self, stds: Mapping[str, float], noise: StepNoise) -> Mapping[str, float]:
        return {name: s / self.parts for name, s in stds.items()}


# --- what is done with the sum and the release ---


class Remembers(Broken):
    """Keeps the raw sum for the update."""

    raw: Mapping[str, np.ndarray] = {}

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        self.raw = self._inner.sums(self.model, total)
        return self._inner.privatize(total, plan, stds, noise)


class RawMomentum(Remembers):
    """The second moments of Adam are fed with the raw sum; plain gradient descent has none."""

    def apply(self, model: Any, optimizer: Any, released: Any, scale: float, learning_rate: float | None) -> None:
        if "Adam" in type(optimizer).__name__:
            released = self._inner.shifted(model, released, {n: 0.05 * v for n, v in self.raw.items()})
        self._inner.apply(model, optimizer, released, scale, learning_rate)


class RawInCheckpoints(Remembers):
    """The optimizer's state is saved with the raw sum of the last step."""

    def get_optimizer_state(self, optimizer: Any) -> dict[str, np.ndarray]:
        return {**self._inner.get_optimizer_state(optimizer), **{f"raw/{name}": v for name, v in self.raw.items()}}


class RateByNorm(Remembers):
    """The learning rate follows the norm of the raw sum."""

    def apply(self, model: Any, optimizer: Any, released: Any, scale: float, learning_rate: float | None) -> None:
        norm = sum(float((v**2).sum()) for v in self.raw.values()) ** 0.5
        self._inner.apply(model, optimizer, released, scale, (learning_rate or 0.1) / (1 + norm))


class PaddingCounts(Broken):
    def batch(self, x: Any, y: Any, mask: np.ndarray, *factor: float) -> Any:
        return self._inner.batch(x, y, np.ones_like(mask), *factor)


class FactorIgnored(Broken):
    """A clipping norm that moves is announced, and not enforced."""

    def batch(self, x: Any, y: Any, mask: np.ndarray, *factor: float) -> Any:
        return self._inner.batch(x, y, mask)


class CountsDouble(Broken):
    """Each example moves the count of a clipping norm by one; it was to be a half."""

    def bounded_sum(self, *args: Any) -> Any:
        found = self._inner.bounded_sum(*args)
        for name in list(found.counts):
            found.counts[name] = 2 * found.counts[name]
        return found


class LossClipForgotten(Broken):
    def bounded_sum(self, model: Any, loss: Any, batch: Any, plan: Plan, *args: Any) -> Any:
        return self._inner.bounded_sum(model, lambda output, y: 10 * loss(output, y), batch, replace(plan, loss_clip=1e6), *args)


def by(watch: type[Broken]) -> Break:
    """Break the backend."""

    def broken(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
        backend = watch(setup.backend)
        backend.model = setup.model
        return replace(setup, backend=backend)  # type: ignore[arg-type]

    return broken


def raw_after_noise(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """A tenth of the raw sum is added to the release."""
    backend, true = setup.backend, Update.finish

    class Adding(Remembers):
        def apply(self, model: Any, optimizer: Any, released: Any, *args: Any) -> None:
            self._inner.apply(model, optimizer, self._inner.shifted(model, released, {n: 0.1 * v for n, v in self.raw.items()}), *args)

    def finish(self: Update, *args: Any) -> dict[str, float]:
        adding = Adding(self.backend)  # type: ignore[arg-type]
        adding.model = self.model
        return true(replace(self, backend=adding), *args)  # type: ignore[arg-type]

    del backend
    monkeypatch.setattr(Update, "finish", finish)
    return setup


def clip_by(weight: Callable[[Any, Any], Any]) -> Break:
    """Another clipping function, of the norm and C."""

    def broken(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
        monkeypatch.setattr(gradients(setup), "clip_weight", lambda name, norm, c, gamma, maximum: weight(norm, c))
        return setup

    return broken


def total_of(values: Any) -> Any:
    """The sum of a tensor of either framework."""
    return values.sum() if hasattr(values, "sum") else importlib.import_module("tensorflow").reduce_sum(values)


def twice_for_large(norm: Any, c: Any) -> Any:
    large = norm > 5 * c
    where = importlib.import_module("torch").where if hasattr(norm, "clamp") else importlib.import_module("tensorflow").where
    return where(large, 2 * c / (norm + 1e-9), c / (0.5 * (norm + c) + 0.5 * abs(norm - c)))


def mean_norm(norm: Any, c: Any) -> Any:
    return norm * 0 + c / (total_of(norm) / norm.shape[0] + 1e-9)


def low_norm(norm: Any, c: Any) -> Any:
    """The norm is three in ten thousand too low, as one in half precision may be."""
    return c / (0.5 * (norm * 0.9997 + c) + 0.5 * abs(norm * 0.9997 - c))


def bias_left_out(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """The norm of the weights alone."""
    accumulator = gradients(setup).Accumulator
    true = accumulator.finish

    def finish(self: Any, name: str) -> None:
        before = {group: list(v) if isinstance(v, list) else v for group, v in self.squares.items()}
        true(self, name)
        if "bias" in name and before:
            self.squares = before

    monkeypatch.setattr(accumulator, "finish", finish)
    return setup


def not_finite_passes(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Weights of examples whose norm is not finite are not set to 0."""
    module = gradients(setup)

    def weights_of(plan: Any, norms: Any, valid: Any, factor: Any = None) -> Any:
        weights = {g.name: module.clip_weight("abadi", norms[g.name], g.clip_norm, 0.01, lambda n, c: n.clamp(min=c)) for g in plan.groups}
        return {name: valid * w for name, w in weights.items()}, valid | True

    monkeypatch.setattr(module, "weights_of", weights_of)
    return setup


def smaller_bounds(factor: float) -> Break:
    """Bounds that are too small by a factor."""

    def broken(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
        first = setup.plan.gradient_groups[0]
        return replace(setup, plan=setup.plan.with_bounds({first.name: first.norm_bound / factor}))

    return broken


# --- what is recorded and printed ---


def every_second_release(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    true, calls = Records.record, itertools.count()
    monkeypatch.setattr(Records, "record", lambda self, event, count=1: true(self, event, count) if next(calls) % 2 else None)
    return setup


def recorded_after(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    record, finish = Update.record, Update.finish

    def late(self: Update, step: int, *args: Any) -> dict[str, float]:
        done = finish(self, step, *args)
        record(self, step)
        return done

    monkeypatch.setattr(Update, "record", lambda self, step: None)
    monkeypatch.setattr(Update, "finish", late)
    return setup


def event_by(noise: float, rate: float) -> Break:
    """Events that claim more noise, or less sampling, than there is."""

    def broken(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
        true = trainer.release_event

        def event(*args: Any) -> SampledGaussian:
            found = true(*args)
            return SampledGaussian(noise * found.noise_multiplier, rate * found.sample_rate)

        monkeypatch.setattr(trainer, "release_event", event)
        return setup

    return broken


def groups_apart(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Each group gets the noise that it would need alone, and the event claims it for all."""

    def stds(self: GaussianMechanism, plan: Plan, relation: Any = "add_remove") -> dict[str, float]:
        return {group.name: self.noise_multiplier * sensitivity(group, relation) for group in plan.groups}

    def claim(plan: Plan, stds: Mapping[str, float], relation: Any = "add_remove") -> float:
        return min(stds[group.name] / sensitivity(group, relation) for group in plan.groups)

    monkeypatch.setattr(GaussianMechanism, "stds", stds)
    for module in ("dptrain.mechanism", "dptrain.inforce"):
        monkeypatch.setattr(f"{module}.effective_noise_multiplier", claim)
    return setup


def forgets_counts(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """An accountant that looks at the first releases alone."""
    true = RDPAccountant.epsilon
    monkeypatch.setattr(RDPAccountant, "epsilon", lambda self, events, delta: true(self, [(e, min(c, 4)) for e, c in events], delta))
    return setup


def both_accountants(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Half of everything, the certified lower value included."""
    rdp, prv = RDPAccountant.epsilon, PRVAccountant.detail
    monkeypatch.setattr(RDPAccountant, "epsilon", lambda self, events, delta: 0.5 * rdp(self, events, delta))

    def detail(self: PRVAccountant, events: Any, delta: float) -> Any:
        found = prv(self, events, delta)
        return replace(found, lower=0.4 * found.lower)

    monkeypatch.setattr(PRVAccountant, "detail", detail)
    return setup


def statement_too_low(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    true = trainer.privacy_statement

    def statement(*args: Any) -> dict[str, Any]:
        found = true(*args)
        return {**found, "epsilon": found["epsilon"] / 2}

    monkeypatch.setattr(trainer, "privacy_statement", statement)
    return setup


# --- batches and keys ---


class Pairs(PoissonSampler):
    """Two neighbours in the data are drawn together or not at all."""

    def sample(self, step: int) -> np.ndarray:
        first = self.key.generator(step).random((self.num_examples + 1) // 2) < self.sample_rate
        return np.flatnonzero(np.repeat(first, 2)[: self.num_examples])


class OnePair(PoissonSampler):
    """The first example and the last are drawn together."""

    def sample(self, step: int) -> np.ndarray:
        drawn = self.key.generator(step).random(self.num_examples) < self.sample_rate
        drawn[-1] = drawn[0]
        return np.flatnonzero(drawn)


class Weekly(PoissonSampler):
    """Every seventh batch is the same."""

    def sample(self, step: int) -> np.ndarray:
        return np.flatnonzero(self.key.generator(step % 7).random(self.num_examples) < self.sample_rate)


class Antithetic(PoissonSampler):
    """Whoever was drawn ten steps ago is not drawn now."""

    def sample(self, step: int) -> np.ndarray:
        u = self.key.generator(step // 20 * 10 + step % 10).random(self.num_examples)
        return np.flatnonzero((u if step // 10 % 2 else 1 - u) < self.sample_rate)


class NoKey(PoissonSampler):
    """The batches of every run are the same."""

    def sample(self, step: int) -> np.ndarray:
        return np.flatnonzero(np.random.default_rng(step).random(self.num_examples) < self.sample_rate)


class OftenAtFirst(PoissonSampler):
    """Twice the rate in the first hundred thousand steps."""

    def sample(self, step: int) -> np.ndarray:
        rate = min(1.0, self.sample_rate * (2 if step < 100_000 else 1))
        return np.flatnonzero(self.key.generator(step).random(self.num_examples) < rate)


def draws_by(sampler: type[PoissonSampler]) -> Break:
    """Another sampler."""

    def broken(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
        monkeypatch.setattr(PoissonSampler, "sample", sampler.sample)
        return setup

    return broken


def keys_by(value: Callable[[str], int]) -> Break:
    """Other keys."""

    def broken(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
        made = classmethod(lambda cls, purpose, unsafe_seed=None: cls(value(purpose)))
        monkeypatch.setattr(RandomKey, "make", made)
        return setup

    return broken


_few = np.random.default_rng()


def fixed_key(purpose: str) -> int:
    """The same in every run: two purposes, two keys of many bits."""
    return int.from_bytes(purpose.ljust(16).encode()[:16], "big")


def short_key(purpose: str) -> int:
    """A million keys."""
    value = int(_few.integers(0, 2**20))
    return int.from_bytes(np.random.default_rng(value).bytes(16), "big")


class QuietStep(TrainingStep):
    """The trainer's own step, with every fifth one released as it is."""

    def _run(self, step: int) -> dict[str, float]:
        update = self.update  # type: ignore[attr-defined]
        if step % 5 == 4 and update.release is not None:
            quiet = replace(update.release, stds=dict.fromkeys(update.release.stds, 0.0))
            object.__setattr__(self, "update", replace(update, release=quiet))
        done = super()._run(step)
        object.__setattr__(self, "update", update)
        return done


def quiet_step(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr(trainer, "TrainingStep", QuietStep)
    return setup


def stops_early(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Training ends when the loss on the training data is small."""
    true = trainer.Loop.steps
    monkeypatch.setattr(trainer.Loop, "steps", lambda self: range(true(self).start, true(self).stop - 1))
    return setup


# What breaks, the config that shows it, a finding that must fail, and the frameworks that it is written for.
BOTH, TORCH = ("torch", "tensorflow"), ("torch",)
ADAM: dict[str, Any] = {"optimizer": {"name": "adam", "learning_rate": 0.01}}
MOVING: dict[str, Any] = {"strategy": {"name": "mixed_ghost", "max_grad_norm": {"initial": 1.0}}}
LAYERS: dict[str, Any] = {"strategy": {"name": "mixed_ghost", "grouping": "per_layer"}}
LOUD: dict[str, Any] = {"privacy": {"noise_multiplier": 6.0, "accountant": "rdp"}}
LONG: dict[str, Any] = {"steps": 12}
CLIPLESS: dict[str, Any] = {"strategy": "clipless"}
SENSITIVITY, JOINT = "sensitivity (first weights)", "joint sensitivity (first weights)"
SHAPE, INDEPENDENCE = "shape of the noise", "independence of the noise"

CASES: dict[str, tuple[Break, dict[str, Any], str, tuple[str, ...]]] = {
    "laplace noise": (by(Laplace), {}, SHAPE, BOTH),
    "noise with heavy tails": (by(HeavyTails), {}, SHAPE, BOTH),
    "noise without tails": (by(CutTails), {}, SHAPE, BOTH),
    "rounded noise": (by(Rounded), {}, SHAPE, BOTH),
    "parameters with common noise": (by(Correlated), {}, INDEPENDENCE, BOTH),
    "rows with the same noise": (by(RowsAlike), {}, INDEPENDENCE, BOTH),
    "mirrored noise": (by(Mirrored), {}, INDEPENDENCE, BOTH),
    "permuted noise": (by(Permuted), {}, SHAPE, BOTH),
    "noise without its mean": (by(WithoutMean), {}, "noise", BOTH),
    "no noise along the sum": (by(AcrossTheSum), {}, "noise", BOTH),
    "noise of a global generator": (by(GlobalGenerator), {}, "key of the noise", BOTH),
    "noise seeded by the step": (by(SeededByStep), {}, "key of the noise", BOTH),
    "32 bits of the key": (by(ShortKey), {}, "key of the noise", BOTH),
    "no noise in every tenth step": (by(EveryTenthStep), LONG, "noise of the run", BOTH),
    "no noise in every tenth call": (by(EveryTenthCall), {}, "noise", BOTH),
    "half the noise after 1000 steps": (by(QuietLater), {}, "noise of later steps", BOTH),
    "fading noise": (by(Fading), {}, "noise of later steps", BOTH),
    "noise that repeats after 256 steps": (by(Periodic), {}, "noise of later steps", BOTH),
    "noise with a ceiling": (by(Capped), LOUD, "noise of the run", BOTH),
    "noise shared among physical batches": (by(Shared), {}, "noise", BOTH),
    "raw sums in the optimizer": (by(RawMomentum), ADAM, "post-processing", BOTH),
    "raw sums in checkpoints": (by(RawInCheckpoints), {}, "post-processing", BOTH),
    "a learning rate from the raw norm": (by(RateByNorm), {}, "post-processing", BOTH),
    "a part of the raw sum after the noise": (raw_after_noise, {}, "noise", BOTH),
    "padding that counts": (by(PaddingCounts), {}, SENSITIVITY, BOTH),
    "a moving clip that is not enforced": (by(FactorIgnored), MOVING, "sensitivity (clipping norm times 0.2)", BOTH),
    "a count of whole examples": (by(CountsDouble), MOVING, SENSITIVITY, BOTH),
    "a loss clip that is forgotten": (by(LossClipForgotten), CLIPLESS, SENSITIVITY, BOTH),
    "twice the norm for large gradients": (clip_by(twice_for_large), {}, SENSITIVITY, BOTH),
    "clipping by the mean norm": (clip_by(mean_norm), {}, SENSITIVITY, BOTH),
    "norms in half precision": (clip_by(low_norm), {}, SENSITIVITY, BOTH),
    "norms without biases": (bias_left_out, {}, SENSITIVITY, BOTH),
    "examples that are not finite": (not_finite_passes, {}, SENSITIVITY, TORCH),
    "bounds that are small by root 2": (smaller_bounds(2**0.5), CLIPLESS, "proven bounds (constant weights)", BOTH),
    "bounds below what is clipped": (smaller_bounds(1.1), {}, SENSITIVITY, BOTH),
    "every second release recorded": (every_second_release, {}, "ledger of the run", BOTH),
    "recorded after the update": (recorded_after, {}, "ledger of the run", BOTH),
    "events with more noise": (event_by(1.2, 1), {}, JOINT, BOTH),
    "events with less sampling": (event_by(1, 0.5), {}, "ledger of the run", BOTH),
    "groups accounted apart": (groups_apart, LAYERS, JOINT, BOTH),
    "an accountant without history": (forgets_counts, {}, "accountant", TORCH),
    "all accountants wrong": (both_accountants, {}, "drawn losses", TORCH),
    "a statement with half the epsilon": (statement_too_low, {}, "accountant", TORCH),
    "a trainer with a step of its own": (quiet_step, LONG, "noise of the run", BOTH),
    "a run that stops early": (stops_early, {}, "ledger of the run", TORCH),
    "pairs drawn together": (draws_by(Pairs), {}, "sampling of pairs", TORCH),
    "one pair drawn together": (draws_by(OnePair), {}, "sampling of pairs", TORCH),
    "every seventh batch alike": (draws_by(Weekly), {}, "sampling of pairs", TORCH),
    "batches that avoid each other": (draws_by(Antithetic), {}, "sampling of pairs", TORCH),
    "more examples in the first steps": (draws_by(OftenAtFirst), {}, "sampling of pairs", TORCH),
    "batches of a fixed seed": (draws_by(NoKey), {}, "two runs", TORCH),
    "keys of a fixed seed": (keys_by(fixed_key), {}, "keys", TORCH),
    "keys of twenty bits": (keys_by(short_key), {}, "keys", TORCH),
}
