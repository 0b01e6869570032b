"""The order of a step is the privacy argument: recorded on disk, then noised once, then applied; whatever happens in between.

A backend in plain numpy stands in for the frameworks and writes down what it was asked, with what was on disk at that moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from accounting import LedgerError, PrivacyLedger, SampledGaussian
from dptrain import PoissonSampler, get_strategy
from dptrain.info import LayerInfo, ModelInfo
from dptrain.randomness import NOISE, SAMPLING, RandomKey, StepNoise
from dptrain.step import Release, TrainingStep

INFO = ModelInfo((LayerInfo("fc", "linear", 1, 2, 1, 2, ("fc.weight",)),))
EVENT = SampledGaussian(1.0, 0.5)
STDS = {"all": 2.0}
COUNT = 10


@dataclass
class Recorder:
    """A backend whose model is a vector and whose per-example gradient is the example, clipped to norm 1.

    Args:
        ledger: file whose releases are counted at every call.
        fail_in: name of the call that raises, once.
    """

    ledger: Any = None
    fail_in: str = ""
    calls: list[tuple[str, int]] = field(default_factory=list)
    sums: list[np.ndarray] = field(default_factory=list)
    noises: list[Any] = field(default_factory=list)
    applied: list[tuple[np.ndarray, float, float]] = field(default_factory=list)
    batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    seeds: list[tuple[int, int]] = field(default_factory=list)
    name: str = "recorder"

    def note(self, call: str) -> None:
        on_disk = PrivacyLedger.read(self.ledger).num_releases if self.ledger else -1
        self.calls.append((call, on_disk))
        if call == self.fail_in:
            self.fail_in = ""
            raise RuntimeError(f"{call} failed")

    def names(self) -> list[str]:
        return [call for call, _ in self.calls]

    def compile(self, function):
        return function

    def seed_dropout(self, model, seed, step):
        self.note("seed_dropout")
        self.seeds.append((seed, step))

    def zeros(self, model):
        self.note("zeros")
        return np.zeros(2)

    def batch(self, x, y, mask):
        self.note("batch")
        self.batches.append((x, y, mask))
        return x, mask

    def bounded_sum(self, model, loss, batch, plan, two_pass):
        self.note("bounded_sum")
        x, mask = batch
        norms = np.linalg.norm(x, axis=1)
        weights = np.where(mask & np.isfinite(norms), 1.0 / np.maximum(norms, 1.0), 0.0)
        return np.where(weights[:, None] > 0, weights[:, None] * x, 0.0).sum(0)

    def add(self, total, part):
        self.note("add")
        return total + part

    def reduce(self, total):
        self.note("reduce")
        self.sums.append(total)
        return total

    def privatize(self, total, plan, stds, noise):
        self.note("privatize")
        self.noises.append(noise)
        return total + stds["all"] * noise.normal(0, (2,), np.float64)

    def apply(self, model, optimizer, released, scale, learning_rate):
        self.note("apply")
        self.applied.append((released, scale, learning_rate))
        model -= learning_rate * scale * released

    def project(self, model, plan):
        self.note("project")

    def stats(self, grads):
        return {"loss": 0.0, "count": 0.0}


X = np.random.default_rng(0).standard_normal((COUNT, 2))
Y = np.arange(COUNT)


def make_step(backend: Recorder, ledger: PrivacyLedger | None, *, physical: int = 2, rate: float = 0.5, x: np.ndarray = X, **changes: Any):
    plan = get_strategy("ghost" if ledger is not None else "non_private").plan(INFO)
    release = None if ledger is None else Release(STDS, EVENT, RandomKey.make(NOISE, 1), ledger, changes.pop("recorded", 0))
    fields = {
        "backend": backend, "model": np.zeros(2), "loss": None, "optimizer": None, "plan": plan,
        "sampler": PoissonSampler(len(x), rate, RandomKey.make(SAMPLING, 2)), "x": x, "y": Y, "physical_batch_size": physical,
        "learning_rate": lambda step: 0.1 * (step + 1), "seed": 9, "release": release,
    }  # fmt: skip
    return TrainingStep(**{**fields, **changes})


@pytest.fixture
def ledger(tmp_path):
    with PrivacyLedger(tmp_path / "ledger.jsonl") as opened:
        yield opened


# ---- the order -----------------------------------------------------------------------------------------------------


def test_the_release_is_on_disk_before_anything_of_the_batch_is_computed(ledger):
    backend = Recorder(ledger.path)
    step = make_step(backend, ledger)
    for t in range(5):
        backend.calls.clear()
        step(t)
        assert {on_disk for _, on_disk in backend.calls} == {t + 1}  # at every call, so before `privatize` and before `apply`
        assert backend.names()[-4:] == ["reduce", "privatize", "apply", "project"]


@pytest.mark.parametrize("physical", [1, 2, 3, 7, 100])
def test_noise_is_drawn_once_per_logical_batch(ledger, physical):
    """Not once per physical batch (pitfalls.md G16), and after everything was added."""
    backend = Recorder(ledger.path)
    step = make_step(backend, ledger, physical=physical)
    for t in range(6):
        backend.calls.clear()
        size = len(step.sampler.sample(t))
        step(t)
        names = backend.names()
        parts = math.ceil(size / physical)
        sums = [*["batch", "bounded_sum"], *["batch", "bounded_sum", "add"] * (parts - 1)] if parts else ["zeros"]
        assert names == ["seed_dropout", *sums, "reduce", "privatize", "apply", "project"]
    assert ledger.num_releases == 6
    assert [noise.step for noise in backend.noises] == list(range(6))


def test_what_is_released_does_not_depend_on_the_physical_size(tmp_path):
    results = []
    for physical in (1, 3, 100):
        backend = Recorder()
        step = make_step(backend, PrivacyLedger(None), physical=physical)
        for t in range(4):
            step(t)
        results.append((step.model, backend.sums))
    for model, sums in results[1:]:
        np.testing.assert_allclose(model, results[0][0], rtol=1e-12)
        np.testing.assert_allclose(sums, results[0][1], rtol=1e-12)


def test_the_sum_is_over_the_drawn_examples_and_the_noise_over_the_sum(ledger):
    backend = Recorder()
    step = make_step(backend, ledger)
    step(3)
    drawn = X[step.sampler.sample(3)]
    clipped = drawn / np.maximum(np.linalg.norm(drawn, axis=1, keepdims=True), 1.0)
    np.testing.assert_allclose(backend.sums[0], clipped.sum(0), rtol=1e-12)
    released, _, _ = backend.applied[0]
    np.testing.assert_allclose(released - backend.sums[0], 2.0 * StepNoise(RandomKey.make(NOISE, 1), 3).normal(0, (2,), np.float64))
    assert not np.allclose(released, backend.sums[0])


def test_inputs_and_targets_stay_together_and_batches_have_one_shape(ledger):
    backend = Recorder()
    step = make_step(backend, ledger, physical=3)
    for t in range(4):
        step(t)
    for x, y, mask in backend.batches:
        assert x.shape == (3, 2)
        np.testing.assert_array_equal(x, X[y])
        assert mask.shape == (3,)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_the_divisor_is_the_constant_q_n(ledger, rate):
    """Never the realised size of the batch (pitfalls.md G27)."""
    backend = Recorder()
    step = make_step(backend, ledger, rate=rate)
    for t in range(5):
        step(t)
    assert len({len(step.sampler.sample(t)) for t in range(5)}) > 1 or rate == 1.0
    assert {scale for _, scale, _ in backend.applied} == {1.0 / (rate * COUNT)}
    assert [rate for _, _, rate in backend.applied] == [0.1 * (t + 1) for t in range(5)]
    assert backend.seeds == [(9, t) for t in range(5)]


# ---- whatever happens ----------------------------------------------------------------------------------------------


def test_an_empty_batch_is_recorded_noised_and_applied(ledger):
    """pitfalls.md G17."""
    backend = Recorder(ledger.path)
    step = make_step(backend, ledger, rate=1e-12)
    assert len(step.sampler.sample(0)) == 0
    step(0)
    assert backend.names() == ["seed_dropout", "zeros", "reduce", "privatize", "apply", "project"]
    assert ledger.num_releases == 1
    assert np.abs(step.model).max() > 0  # noise alone


@pytest.mark.parametrize("call", ["seed_dropout", "batch", "bounded_sum", "add", "reduce", "privatize", "apply", "project"])
def test_an_interrupted_step_stays_recorded_and_its_partial_sum_dies(ledger, call):
    """pitfalls.md G22: the partial sum of a broken step must not be released with the next one."""
    backend = Recorder(ledger.path, fail_in=call)
    step = make_step(backend, ledger, physical=2)
    assert len(step.sampler.sample(1)) >= 3
    with pytest.raises(RuntimeError, match=f"{call} failed"):
        step(1)
    assert ledger.num_releases == PrivacyLedger.read(ledger.path).num_releases == 1
    before = len(backend.applied)
    step(2)
    assert ledger.num_releases == 2
    fresh = Recorder()
    make_step(fresh, PrivacyLedger(None))(2)
    np.testing.assert_array_equal(backend.sums[-1], fresh.sums[-1])
    np.testing.assert_array_equal(backend.applied[-1][0], fresh.applied[-1][0])
    assert len(backend.applied) == before + 1


def test_nothing_is_released_if_the_ledger_cannot_be_written(ledger):
    backend = Recorder()
    step = make_step(backend, ledger)
    step(0)
    ledger.close()
    applied = len(backend.applied)
    with pytest.raises(LedgerError):
        step(1)
    assert len(backend.applied) == applied
    assert backend.names().count("privatize") == 1


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e308])
def test_nothing_raises_on_data(ledger, poison):
    """An error that depends on one example is a leak of one bit (pitfalls.md G29), and one poisoned example changes no other."""
    x = X.copy()
    step_index = 1
    clean_backend, backend = Recorder(), Recorder()
    clean, poisoned = make_step(clean_backend, PrivacyLedger(None)), make_step(backend, ledger, x=x)
    victim = poisoned.sampler.sample(step_index)[0]
    x[victim] = poison
    with np.errstate(all="ignore"):
        poisoned(step_index)
    clean(step_index)
    assert np.isfinite(backend.applied[0][0]).all()
    assert np.linalg.norm(backend.sums[0] - clean_backend.sums[0]) <= 2.0 + 1e-9  # one example was replaced: twice the bound at most
    assert ledger.num_releases == 1


# ---- with and without privacy --------------------------------------------------------------------------------------


def test_a_plan_with_bounds_cannot_be_trained_without_noise():
    with pytest.raises(TypeError, match="a plan with finite bounds is trained with a release"):
        make_step(Recorder(), PrivacyLedger(None), release=None)


def test_a_plan_without_bounds_cannot_be_trained_with_noise(ledger):
    release = Release(STDS, EVENT, RandomKey.make(NOISE, 1), ledger)
    with pytest.raises(TypeError, match="and only such a plan"):
        make_step(Recorder(), None, release=release)
    with pytest.raises(TypeError):
        make_step(Recorder(), ledger, plan=get_strategy("ghost").plan(INFO).with_clip_norm(math.inf))


def test_non_private_training_neither_records_nor_adds_noise():
    backend = Recorder()
    step = make_step(backend, None)
    for t in range(3):
        step(t)
    assert "privatize" not in backend.names()
    np.testing.assert_array_equal([released for released, _, _ in backend.applied], backend.sums)


def test_a_replayed_step_is_not_recorded_twice_and_releases_the_same_bits(ledger):
    """With an unsafe_seed the steps between checkpoint and ledger run again."""
    first = Recorder()
    step = make_step(first, ledger)
    for t in range(4):
        step(t)
    assert ledger.num_releases == 4
    again = Recorder()
    replay = make_step(again, ledger, recorded=4)
    for t in range(2, 6):
        replay(t)
    assert ledger.num_releases == 6
    for old, new in zip(first.applied[2:], again.applied[:2], strict=True):
        np.testing.assert_array_equal(old[0], new[0])
