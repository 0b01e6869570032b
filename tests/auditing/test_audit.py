"""Audits pass what is sound, in every strategy and both frameworks, and catch what is broken."""

from __future__ import annotations

from typing import Any

import pytest

import dptrain.trainer as trainer
from dptrain.auditing import audit, audit_setup
from dptrain.errors import ConfigError
from dptrain.setup import Setup, prepare
from tests.auditing import broken
from tests.core.shared import blobs, config

BACKENDS = ("torch", "tensorflow")
STRATEGIES = ("clipless", "mixed_ghost", "ghost", "per_sample")
QUICK: dict[str, Any] = {"canaries": 0, "examples": 0, "trials": 400}


def make(backend: str = "torch", strategy: Any = "mixed_ghost", steps: int = 4, **parts: Any) -> Setup:
    """A small run. With noise multiplier 1 its steps are those of the checks."""
    clipless = strategy == "clipless" or (isinstance(strategy, dict) and strategy.get("name") == "clipless")
    model = {"name": "lipschitz_mlp" if clipless else "mlp", "hidden": [16]}
    given = {"model": model, "sampling": {"sample_rate": 0.2, "steps": steps}, **parts}
    return prepare(config(strategy=strategy, **given), backend, blobs(300))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sound_runs_pass(backend: str, strategy: str) -> None:
    found = audit_setup(make(backend, strategy, steps=10), canaries=60, examples=40, trials=400)
    assert found.passed, str(found)
    assert 0 <= found.epsilon_lower_bound <= found.epsilon
    assert found.strategy == strategy
    assert found.backend == backend


@pytest.mark.parametrize("relation", ["replace_one", "zero_out"])
def test_sound_runs_pass_under_other_relations(relation: str) -> None:
    setup = make(privacy={"noise_multiplier": 1.0, "accountant": "rdp", "relation": relation}, steps=10)
    found = audit_setup(setup, canaries=60, examples=40, trials=400)
    assert found.passed, str(found)


def test_moving_clips_and_split_noise_pass() -> None:
    adaptive = {"name": "mixed_ghost", "adaptive": {"quantile": 0.5}, "grouping": "per_layer"}
    setup = make(strategy=adaptive, privacy={"noise_multiplier": 1.0, "allocation": "per_group", "accountant": "rdp"}, steps=6)
    found = audit_setup(setup, canaries=40, examples=20, trials=400)
    assert found.passed, str(found)


CASES = [
    (broken.NoNoise, "mixed_ghost", {"noise", "one release"}),
    (broken.HalvedNoise, "mixed_ghost", {"noise"}),
    (broken.SameNoise, "mixed_ghost", {"independence of the noise"}),
    (broken.NoNoiseOnEmptyBatches, "mixed_ghost", {"noise"}),
    (broken.NoisePerPhysicalBatch, "mixed_ghost", {"noise"}),
    (broken.DataDependentDenominator, "mixed_ghost", {"noise"}),
    (broken.ClipSkipped, {"name": "mixed_ghost", "grouping": "per_layer"}, {"sensitivity (first weights)"}),
    (broken.NoiseOnOneGroup, {"name": "mixed_ghost", "grouping": "per_layer"}, {"noise"}),
    (broken.NoNoise, "clipless", {"noise"}),
    (broken.HalvedNoise, "clipless", {"noise"}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("watch", "strategy", "caught"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_broken_backends_are_caught(backend: str, watch: Any, strategy: Any, caught: set[str]) -> None:
    found = audit_setup(broken.with_backend(make(backend, strategy), watch), **QUICK)
    assert caught <= set(found.failed()), str(found)


@pytest.mark.parametrize("sampler", [broken.Shuffled, broken.FixedSize, broken.Favourites])
def test_other_sampling_accounted_as_poisson_is_caught(sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make()
    monkeypatch.setattr(trainer, "PoissonSampler", sampler)
    assert audit_setup(setup, **QUICK).failed() == ["sampling"]


def test_non_private_runs_have_nothing_to_audit() -> None:
    with pytest.raises(ConfigError, match="claims no privacy"):
        audit(config(strategy="non_private"), data=blobs(60))
