"""Audits of batches that are not plain Poisson samples: sound samplers pass, and broken ones are caught."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dptrain
import dptrain.trainer as trainer
from accounting import SampledGaussian
from dptrain.auditing import audit_setup, checks
from dptrain.auditing.membership import membership
from dptrain.data import from_arrays
from dptrain.randomness import SAMPLING, RandomKey
from dptrain.sampling import CappedSampler, FixedSizeSampler, PoissonSampler, ShuffledSampler
from dptrain.setup import Setup, prepare
from tests.auditing import broken
from tests.core.shared import blobs, config

KEY = RandomKey.make(SAMPLING, unsafe_seed=41)
SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "capped": ({"sample_rate": 0.2, "max_batch_size": 62}, "add_remove"),
    "fixed_size": ({"sample_rate": 0.2, "scheme": "fixed_size"}, "replace_one"),
    "shuffle": ({"expected_batch_size": 40, "scheme": "shuffle"}, "zero_out"),
}


def make(name: str, backend: str = "torch", steps: int = 8, relation: str = "", sigma: float = 1.0, data: Any = None) -> Setup:
    """A small run of one of the schemes."""
    sampling, usual = SCHEMES[name]
    privacy = {"noise_multiplier": sigma, "accountant": "rdp", "relation": relation or usual}
    run = config(model={"name": "mlp", "hidden": [16]}, sampling={**sampling, "steps": steps}, privacy=privacy)
    return prepare(run, backend, data or blobs(300))


@pytest.mark.parametrize(
    ("name", "backend", "relation"),
    [("capped", "torch", ""), ("fixed_size", "tensorflow", ""), ("shuffle", "torch", "replace_one"),
     pytest.param("capped", "tensorflow", "replace_one", marks=pytest.mark.slow),
     pytest.param("fixed_size", "torch", "", marks=pytest.mark.slow), pytest.param("shuffle", "tensorflow", "", marks=pytest.mark.slow)],
)  # fmt: skip
def test_sound_runs_pass(name: str, backend: str, relation: str) -> None:
    found = audit_setup(make(name, backend, relation=relation), canaries=60, examples=41, trials=200)
    assert found.passed, str(found)
    assert 0 <= found.epsilon_lower_bound <= found.epsilon


@pytest.mark.parametrize("name", SCHEMES)
def test_canaries_are_in_a_run_as_often_as_its_event_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little noise an attack finds what there is to find: sound runs pass, and one that records half of its passes does not."""
    rng = np.random.default_rng(0)
    coins = from_arrays(rng.standard_normal((300, 5)), rng.integers(0, 3, 300), num_classes=3)
    setup = make(name, steps=14, sigma=0.5, data=coins)
    found = audit_setup(setup, canaries=150, examples=0, trials=0)
    assert found.passed, str(found)
    if name == "shuffle":
        assert found.epsilon_lower_bound > 1
        span = trainer.steps_per_release
        monkeypatch.setattr(trainer, "steps_per_release", lambda sampler: 2 * span(sampler))
        assert audit_setup(setup, canaries=0, examples=0, trials=0).failed() == ["ledger of the run"]


SOUND = {
    "poisson": lambda key: PoissonSampler(300, 0.2, key),
    "capped tightly": lambda key: CappedSampler(300, 0.2, 30, key),
    "capped where it binds half of the time": lambda key: CappedSampler(300, 0.2, 60, key),
    "capped where it hardly binds": lambda key: CappedSampler(1000, 0.01, 20, key),
    "capped at one": lambda key: CappedSampler(50, 0.02, 1, key),
    "fixed": lambda key: FixedSizeSampler(300, 60, key),
    "fixed, few": lambda key: FixedSizeSampler(40, 3, key),
    "fixed, one": lambda key: FixedSizeSampler(1000, 1, key),
    "fixed, nearly all": lambda key: FixedSizeSampler(100, 99, key),
    "fixed, all": lambda key: FixedSizeSampler(100, 100, key),
    "shuffled": lambda key: ShuffledSampler(300, 60, key),
    "shuffled with a remainder": lambda key: ShuffledSampler(300, 70, key, 11),
    "fixed, one of very many": lambda key: FixedSizeSampler(10**5, 1, key),
    "shuffled, many of one": lambda key: ShuffledSampler(2000, 1, key),
    "shuffled, two": lambda key: ShuffledSampler(2, 1, key),
    "shuffled, all": lambda key: ShuffledSampler(50, 50, key),
    "shuffled, most": lambda key: ShuffledSampler(50, 40, key),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_samplers_pass(name: str) -> None:
    for seed in range(5):
        found = checks.sampling(SOUND[name](RandomKey.make(SAMPLING, unsafe_seed=seed)))
        assert found.passed, found.text


class ShuffledAsFixed(FixedSizeSampler):
    """Passes over shuffled data, accounted as batches drawn anew."""

    def sample(self, step: int) -> np.ndarray:
        return ShuffledSampler(self.num_examples, self.batch_size, self.key).sample(step)


class PoissonAsFixed(FixedSizeSampler):
    """Batches of any size, accounted as batches of one size."""

    def sample(self, step: int) -> np.ndarray:
        return PoissonSampler(self.num_examples, self.sample_rate, self.key).sample(step)


class FavouritesAsFixed(FixedSizeSampler):
    """The first example is in every second batch."""

    def sample(self, step: int) -> np.ndarray:
        found = self.key.generator(step).choice(self.num_examples, self.batch_size, replace=False)
        return np.sort(found) if step % 2 or 0 in found else np.sort([0, *found[1:]])


class LowestKept(CappedSampler):
    """What is beyond the cap is not dropped at random."""

    def sample(self, step: int) -> np.ndarray:
        return PoissonSampler(self.num_examples, self.sample_rate, self.key).sample(step)[: self.max_batch_size]


class FavouritesKept(CappedSampler):
    """What is kept goes by a fixed order that has nothing to do with the indices."""

    def sample(self, step: int) -> np.ndarray:
        drawn = PoissonSampler(self.num_examples, self.sample_rate, self.key).sample(step)
        return np.sort(drawn[np.argsort(drawn * 137 % self.num_examples)][: self.max_batch_size])


class NoCap(CappedSampler):
    """The cap is ignored."""

    def sample(self, step: int) -> np.ndarray:
        return PoissonSampler(self.num_examples, self.sample_rate, self.key).sample(step)


class AlwaysFull(CappedSampler):
    """Every batch is as large as the cap."""

    def sample(self, step: int) -> np.ndarray:
        return FixedSizeSampler(self.num_examples, self.max_batch_size, self.key).sample(step)


class OneOrder(ShuffledSampler):
    """Every pass in the same order."""

    def sample(self, step: int) -> np.ndarray:
        return ShuffledSampler.sample(self, self.first + (step - self.first) % self.per_pass)


class Overlapping(ShuffledSampler):
    """Each batch begins with the last example of the one before."""

    def sample(self, step: int) -> np.ndarray:
        found = ShuffledSampler.sample(self, step)
        if (step - self.first) % self.per_pass:
            found = np.concatenate([ShuffledSampler.sample(self, step - 1)[-1:], found[1:]])
        return found


class Anew(ShuffledSampler):
    """Batches drawn anew, accounted as parts of a pass."""

    def sample(self, step: int) -> np.ndarray:
        return FixedSizeSampler(self.num_examples, self.batch_size, self.key).sample(step)


BROKEN: dict[str, tuple[Any, str]] = {
    "shuffled as fixed": (ShuffledAsFixed(300, 60, KEY), "overlap of neighbouring batches is off by"),
    "shuffled as fixed, small batches": (ShuffledAsFixed(300, 3, KEY), "spread of examples' counts has p"),
    "Poisson as fixed": (PoissonAsFixed(300, 60, KEY), "a batch has another size"),
    "favourites as fixed": (FavouritesAsFixed(300, 60, KEY), "an example's rate has p"),
    "lowest kept": (LowestKept(300, 0.2, 60, KEY), "position of what is kept is off by"),
    "favourites kept": (FavouritesKept(300, 0.2, 50, KEY), "spread of examples' counts in full batches has p"),
    "no cap": (NoCap(300, 0.2, 70, KEY), "a batch is above the cap"),
    "always full": (AlwaysFull(300, 0.2, 60, KEY), "full batches has p"),
    "one order": (OneOrder(300, 60, KEY), "places that two passes share is off by"),
    "overlapping": (Overlapping(300, 60, KEY), "an example is twice in a pass"),
    "anew": (Anew(300, 60, KEY), "an example is twice in a pass"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_samplers_are_caught(name: str) -> None:
    sampler, words = BROKEN[name]
    found = checks.sampling(sampler)
    assert not found.passed and words in found.text, found.text


@pytest.mark.parametrize(
    ("name", "kind", "draws"),
    [("fixed_size", FixedSizeSampler, ShuffledAsFixed), ("capped", CappedSampler, LowestKept), ("capped", CappedSampler, NoCap),
     ("shuffle", ShuffledSampler, Anew)],
)  # fmt: skip
def test_broken_runs_are_caught(name: str, kind: Any, draws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make(name, steps=3)
    monkeypatch.setattr(kind, "sample", draws.sample)
    found = audit_setup(setup, canaries=0, examples=0, trials=0).failed()
    assert "sampling" in found and set(found) <= {"sampling", "two runs"}


def rate_of(sampler: Any) -> float:
    """Of a sampler, or of Poisson samples given by their rate."""
    return float(getattr(sampler, "sample_rate", sampler))


def test_a_ledger_of_other_batches_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed batches recorded as Poisson samples of the same rate, and a cap that is not told."""
    for name in ("fixed_size", "capped"):
        monkeypatch.setattr(trainer, "release_event", lambda plan, stds, sampler, *_: SampledGaussian(0.9, rate_of(sampler)))
        found = audit_setup(make(name, steps=3), canaries=0, examples=0, trials=0)
        assert found.failed() == ["ledger of the run"]
        text = next(finding.text for finding in found.findings if finding.name == "ledger of the run")
        assert "recorded as SampledGaussian, in truth" in text


def test_a_backend_that_is_broken_is_caught_whatever_the_sampling() -> None:
    setup = make("shuffle", steps=2)
    assert "noise" in audit_setup(broken.with_backend(setup, broken.HalvedNoise), canaries=0, examples=0, trials=0).failed()
    assert dataclasses.replace(setup).scheme.kind == "shuffle"


@pytest.mark.parametrize("name", SCHEMES)
def test_shadow_models_are_trained_like_the_run(name: str, tmp_path: Path) -> None:
    """On other data, for which neither the rate times N is whole nor the budget of the run enough."""
    sampling, relation = SCHEMES[name]
    privacy = {"target_epsilon": 2.0, "accountant": "rdp", "relation": relation}
    run = config(model={"name": "mlp", "hidden": [8]}, sampling={**sampling, "steps": 5}, privacy=privacy)
    data = blobs(300)
    dptrain.train(run, data=data, out=tmp_path)
    found = membership(tmp_path, shadows=2, most=101, data=data)
    assert (found.members, found.others, len(found.rocs)) == (101, 100, 2)
    assert found.epsilon is not None and found.epsilon <= 2.0
