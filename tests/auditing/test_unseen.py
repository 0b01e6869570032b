"""Audits catch mechanisms that nobody thought of when they were written, and the tests behind them pass what is sound."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import numpy as np
import pytest

from dptrain.auditing import audit_setup
from dptrain.auditing.checks import noise_over_sensitivity, spread
from dptrain.auditing.joint import joint_sampling
from dptrain.auditing.noises import keys, probe_steps
from dptrain.auditing.normal import furthest_normal, lags, most_alike, shape
from dptrain.auditing.run import structured_weights
from dptrain.auditing.runwatch import distance, strangers
from dptrain.auditing.spent import COARSE, delta_at_least, drawn_losses
from dptrain.data import from_arrays
from dptrain.mechanism import GaussianMechanism, effective_noise_multiplier
from dptrain.randomness import SAMPLING, RandomKey
from dptrain.sampling import PoissonSampler
from dptrain.setup import prepare
from tests.auditing import unseen
from tests.auditing.test_audit import make
from tests.core.shared import config

QUICK: dict[str, Any] = {"canaries": 0, "examples": 0, "trials": 0}
# One of each check, in seconds; the others run with ``make test-slow``.
FEW = {
    ("noise without tails", "torch"), ("32 bits of the key", "torch"), ("noise that repeats after 256 steps", "torch"),
    ("no noise along the sum", "torch"), ("raw sums in the optimizer", "torch"), ("raw sums in the optimizer", "tensorflow"),
    ("a moving clip that is not enforced", "torch"), ("a count of whole examples", "torch"), ("examples that are not finite", "torch"),
    ("groups accounted apart", "torch"), ("all accountants wrong", "torch"), ("a statement with half the epsilon", "torch"),
    ("a trainer with a step of its own", "torch"), ("batches of a fixed seed", "torch"),
}  # fmt: skip
RUNS = [
    pytest.param(name, backend, marks=[] if (name, backend) in FEW else pytest.mark.slow, id=f"{name}, {backend}")
    for name, (_, _, _, backends) in unseen.CASES.items()
    for backend in backends
]


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_what_is_broken_is_caught(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, parts, finding, _ = unseen.CASES[name]
    setup = make(backend, **{"strategy": "mixed_ghost", "steps": 6, **parts})
    found = audit_setup(broken(setup, monkeypatch), **QUICK)
    assert finding in found.failed(), str(found)


def test_buffers_that_follow_the_data_are_caught() -> None:
    """A layer that keeps the mean of its inputs, which is saved; not in batches as small as those of the self-check."""
    torch = pytest.importorskip("torch")

    class Keeping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(5))

        def forward(self, x: Any) -> Any:
            with torch.no_grad():
                if len(x) > 8:
                    self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            return x

    setup = make(steps=3)
    model = torch.nn.Sequential(Keeping(), torch.nn.Linear(5, 3))
    found = audit_setup(prepare(setup.config, "torch", setup.data, model), **QUICK)
    assert found.failed() == ["post-processing"]


def test_layers_that_mix_examples_in_large_batches_are_caught() -> None:
    """The self-check and the checks of single steps use small batches."""
    torch = pytest.importorskip("torch")

    class Mixing(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x - 3 * x.mean(0) if len(x) > 8 else x

    setup = make(steps=3)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), Mixing(), torch.nn.Linear(8, 3))
    found = audit_setup(prepare(setup.config, "torch", setup.data, model), **QUICK)
    assert found.failed() == ["sensitivity (batches of the run)"]


def test_losses_that_mix_examples_are_caught() -> None:
    setup = make(steps=3)
    true = setup.loss
    mixed = dataclasses.replace(setup, loss=lambda output, y: true(output - 2 * output.mean(0), y))
    assert unseen.SENSITIVITY in audit_setup(mixed, **QUICK).failed()


@pytest.mark.parametrize("backend", ["torch", pytest.param("tensorflow", marks=pytest.mark.slow)])
def test_a_convolution_bound_that_is_small_by_root_2_is_caught(backend: str) -> None:
    """With all weights equal, two convolutions reach 0.65 of their bounds: too little to see it."""
    pictures = from_arrays(np.random.default_rng(0).random((40, 8, 8, 1)), np.arange(40) % 3, num_classes=3)
    model = {"name": "lipschitz_cnn", "stages": [[4], [8]], "hidden": [8]}
    sound = prepare(config(strategy="clipless", model=model, sampling={"sample_rate": 0.2, "steps": 2}), backend, pictures)
    conv = next(g for g in sound.plan.gradient_groups if "conv1" in g.name)
    setup = dataclasses.replace(sound, plan=sound.plan.with_bounds({conv.name: conv.norm_bound / 2**0.5}))
    before = sound.backend.get_weights(sound.model)
    found = {finding.name: finding.passed for finding in structured_weights(setup)}
    assert found == {"proven bounds (constant weights)": True, "proven bounds (kernels of one entry)": False}
    assert all(finding.passed for finding in structured_weights(sound))
    after = sound.backend.get_weights(sound.model)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_unsafe_seeds_are_no_secret() -> None:
    setup = make(privacy={"noise_multiplier": 1.0, "accountant": "rdp", "unsafe_seed": 3}, steps=2)
    assert {"keys", "two runs"} <= set(audit_setup(setup, **QUICK).failed())


NOISES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(0, 0.5**0.5, n),
    "heavy tails": lambda rng, n: rng.standard_t(8, n) * 0.75**0.5,
    "clipped": lambda rng, n: np.clip(rng.standard_normal(n), -3, 3),
    "without tails": lambda rng, n: (v := rng.standard_normal(2 * n))[np.abs(v) < 3][:n],
    "rounded": lambda rng, n: np.round(rng.standard_normal(n) * 20) / 20,
    "half precision": lambda rng, n: rng.standard_normal(n).astype(np.float16).astype(np.float64),
    "twice": lambda rng, n: np.tile(rng.standard_normal(n // 2), 2),
    "not finite": lambda rng, n: np.where(np.arange(n) == 7, np.nan, rng.standard_normal(n)),
}


@pytest.mark.parametrize("name", NOISES)
def test_shape_of_noise(name: str) -> None:
    assert shape(NOISES[name](np.random.default_rng(0), 30_000)).passed == (name == "normal")


@pytest.mark.parametrize("size", [9, 10, 100, 1000])
def test_lags(size: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((24, size))
    most = {
        "sound": noise,
        "halves": np.concatenate([noise[:, : size // 2]] * 2, axis=1),
        "mirrored": np.concatenate([noise[:, : size // 2], -noise[:, : size // 2][:, ::-1]], axis=1),
        "rows": np.tile(noise[:, : size // 3], (1, 3)),
    }
    for name, part in most.items():
        largest, tests = lags([part])
        assert (largest > furthest_normal(tests)) == (name != "sound"), name


def test_vectors_that_are_alike() -> None:
    rng = np.random.default_rng(0)
    rows = list(rng.standard_normal((40, 10)))
    assert most_alike(rows)[0] < furthest_normal(780)
    assert most_alike([*rows, 2 * rows[3]]) == (np.inf, (3, 40))


@pytest.mark.parametrize(
    ("count", "rate", "steps"), [(1, 0.5, 5), (3, 0.5, 3), (6, 0.2, 20), (300, 0.2, 6), (300, 0.005, 20), (900, 0.97, 9999)]
)
def test_sound_samplers_pass(count: int, rate: float, steps: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        sampler = PoissonSampler(count, rate, RandomKey(int(rng.integers(2**62))))
        found = joint_sampling(sampler, steps)
        assert found.passed, found


@pytest.mark.parametrize("sampler", [unseen.Pairs, unseen.OnePair, unseen.Weekly, unseen.Antithetic, unseen.OftenAtFirst])
def test_samplers_with_ties_are_caught(sampler: Any) -> None:
    assert not joint_sampling(sampler(300, 0.2, RandomKey.make(SAMPLING)), 6).passed


def test_spreads_of_few_values() -> None:
    """A sum of three squares is far from normal: at six of its standard deviations it would be called wrong every thousandth time."""
    rng = np.random.default_rng(0)
    scores = [spread(rng.binomial(200, 0.5, 3).astype(float), 200, 0.5) for _ in range(3000)]
    assert max(map(abs, scores)) < 5
    assert abs(float(np.mean(scores))) < 0.1
    assert spread(np.full(200, 1.0), 1, 0.5) == 0.0
    assert spread(np.full(40, 60.0), 200, 0.5) > 6
    assert spread(np.full(40, 100.0), 200, 0.5) < -6


def test_equation_one_is_computed_twice() -> None:
    plan = make(**unseen.LAYERS).plan
    for relation, allocation in itertools.product(("add_remove", "replace_one", "zero_out"), ("global", "per_group", "min_noise")):
        stds = GaussianMechanism(0.7, allocation).stds(plan, relation)
        ours = noise_over_sensitivity(plan, stds, relation)
        assert ours == pytest.approx(effective_noise_multiplier(plan, stds, relation), rel=1e-12)
        assert ours == pytest.approx(0.7, rel=1e-12)
    assert noise_over_sensitivity(plan, dict.fromkeys(stds, 0.0), "add_remove") == 0.0


def test_drawn_losses_against_a_closed_form() -> None:
    """Without sampling, k releases are one Gaussian mechanism, whose delta is known exactly (Balle and Wang 2018, theorem 8)."""
    from scipy.stats import norm

    from accounting import SampledGaussian

    losses, mu = drawn_losses([(SampledGaussian(2.0, 1.0), 9)], np.random.default_rng(0)), 1.5
    for epsilon in (0.3, 1.0, 2.5):
        true = norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        least = delta_at_least(losses, epsilon, 1e-6)
        assert 0.8 * true < least < true
    assert max(COARSE) < 1


def test_keys_of_the_operating_system_pass() -> None:
    assert keys(None).passed
    assert not keys(0).passed


@pytest.mark.parametrize("value", [unseen.fixed_key, unseen.short_key, lambda purpose: time.time_ns()])
def test_keys_from_elsewhere_are_caught(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomKey, "make", classmethod(lambda cls, purpose, unsafe_seed=None: cls(value(purpose))))
    assert not keys(None).passed


def test_steps_that_are_probed() -> None:
    steps = probe_steps(700, 64, np.random.default_rng(0))
    assert len(steps) == 64
    assert {0, 1, 9, 11, 699} <= set(steps)
    assert probe_steps(10**7, 12, np.random.default_rng(0))[-1] < 10**7


def test_batches_of_strangers() -> None:
    assert strangers(200, [(20, 20)] * 100, 200) == (200, 1.0)
    assert strangers(290, [(20, 20)] * 100, 200)[1] < 1e-6
    assert strangers(120, [(20, 20)] * 100, 200)[1] < 1e-6
    assert strangers(250, [(20, 20)] * 100, 200)[1] > 1e-6
    assert strangers(500, [(5, 5)] * 100, 5)[1] == 1.0


def test_distances_in_last_places() -> None:
    a = np.ones(3, np.float32)
    assert distance(a, a) == 0
    assert distance(a, np.nextafter(a, np.float32(2))) == 1
    assert distance(a, np.full(3, np.nan, np.float32)) == np.inf
    assert distance(np.arange(3), np.arange(3) + 1) == np.inf
    assert distance(a, a[:2]) == np.inf


def test_a_trainer_without_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """``privatize`` is never called: there is nothing to compare, and that is a finding."""
    from dptrain.step import Update

    true = Update.finish
    monkeypatch.setattr(
        Update, "finish", lambda self, *args: true(dataclasses.replace(self, release=None, plan=unbounded(self.plan)), *args)
    )
    assert {"noise", "noise of the run"} <= set(audit_setup(make(steps=3), **QUICK).failed())


def unbounded(plan: Any) -> Any:
    """The same plan, which claims nothing."""
    return dataclasses.replace(plan, groups=tuple(dataclasses.replace(g, norm_bound=float("inf")) for g in plan.groups))
