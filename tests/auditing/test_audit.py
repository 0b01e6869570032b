"""Audits pass what is sound, in every strategy and both frameworks, and catch what is broken."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dptrain.mechanism as mechanism
from accounting.rdp import RDPAccountant
from dptrain.auditing import audit, audit_setup
from dptrain.auditing.run import structured_weights
from dptrain.cli import main
from dptrain.data import from_arrays
from dptrain.errors import ConfigError
from dptrain.sampling import PoissonSampler
from dptrain.setup import Setup, prepare
from dptrain_torch.backend import TorchBackend
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
    adaptive = {"name": "mixed_ghost", "max_grad_norm": {"initial": 1.0}, "grouping": "per_layer"}
    setup = make(strategy=adaptive, privacy={"noise_multiplier": 1.0, "allocation": "per_group", "accountant": "rdp"}, steps=6)
    found = audit_setup(setup, canaries=40, examples=20, trials=400)
    assert found.passed, str(found)


CASES = [
    (broken.NoNoise, "mixed_ghost", {"noise", "one release"}),
    (broken.HalvedNoise, "mixed_ghost", {"noise"}),
    (broken.NoNoiseOnOneParameter, "mixed_ghost", {"noise"}),
    (broken.UniformNoise, "mixed_ghost", {"shape of the noise"}),
    (broken.BroadcastNoise, "mixed_ghost", {"noise", "independence of the noise"}),
    (broken.RepeatedNoise, "mixed_ghost", {"independence of the noise"}),
    (broken.SameNoise, "mixed_ghost", {"independence of the noise", "noise of later steps"}),
    (broken.NoNoiseOnEmptyBatches, "mixed_ghost", {"noise"}),
    (broken.NoisePerPhysicalBatch, "mixed_ghost", {"noise"}),
    (broken.DataDependentDenominator, "mixed_ghost", {"noise"}),
    (broken.BatchClipped, "mixed_ghost", {"sensitivity (first weights)"}),
    (broken.AddedTwice, "mixed_ghost", {"sensitivity (first weights)"}),
    (broken.ClipSkipped, {"name": "mixed_ghost", "grouping": "per_layer"}, {"sensitivity (first weights)"}),
    (broken.NoiseOnOneGroup, {"name": "mixed_ghost", "grouping": "per_layer"}, {"noise"}),
    (broken.NoNoise, "clipless", {"noise"}),
    (broken.HalvedNoise, "clipless", {"noise"}),
]


# What a wrapper does is the same in both frameworks; of these some run quickly in TensorFlow, the others with ``make test-slow``.
IN_BOTH = (broken.NoNoise, broken.NoNoiseOnOneParameter, broken.NoisePerPhysicalBatch, broken.ClipSkipped, broken.BatchClipped)


@pytest.mark.parametrize(
    ("backend", "watch", "strategy", "caught"),
    [
        pytest.param(backend, *case, marks=[] if backend == "torch" or case[0] in IN_BOTH else pytest.mark.slow)
        for backend in BACKENDS
        for case in CASES
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_broken_backends_are_caught(backend: str, watch: Any, strategy: Any, caught: set[str]) -> None:
    found = audit_setup(broken.with_backend(make(backend, strategy), watch), **QUICK)
    assert caught <= set(found.failed()), str(found)


def test_bounds_that_nobody_restores_are_caught() -> None:
    setup = make(strategy="clipless", steps=3, optimizer={"name": "sgd", "learning_rate": 3.0})
    watch = broken.NoProjection(setup.backend)
    watch.first = setup.info.certificates
    found = audit_setup(dataclasses.replace(setup, backend=watch), **QUICK)  # type: ignore[arg-type]
    assert "proven bounds (trained weights)" in found.failed()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_convolution_bound_without_its_overlap_is_caught(backend: str) -> None:
    """What LipDP printed: each pixel counted once, though it is in nine windows (pitfalls.md L1)."""
    model = {"name": "lipschitz_cnn", "stages": [[4]], "hidden": [8]}
    pictures = from_arrays(np.random.default_rng(0).random((60, 8, 8, 1)), np.arange(60) % 3, num_classes=3)
    sound = prepare(config(strategy="clipless", model=model), backend, pictures)
    conv = next(g for g in sound.plan.gradient_groups if "conv" in g.name)
    setup = dataclasses.replace(sound, plan=sound.plan.with_bounds({conv.name: conv.norm_bound / 3}))
    assert "proven bounds (constant weights)" in [finding.name for finding in structured_weights(setup) if not finding.passed]
    assert audit_setup(sound, **QUICK).passed


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_of_one_use_of_a_shared_weight_is_caught(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of the uses' norms instead of all their pairs, and of the first use alone at that (pitfalls.md G1)."""
    native = shared(backend)
    sound = prepare(config(strategy="ghost", model={"name": "mlp", "hidden": [6, 6]}), backend, blobs(300, features=6), model=native)
    module = importlib.import_module({"torch": "dptrain_torch.gradients", "tensorflow": "dptrain_tf.gradients"}[backend])
    assert audit_setup(sound, **QUICK).passed
    whole = module.ghost_norm
    monkeypatch.setattr(module, "ghost_norm", lambda uses: whole(uses[:1]))
    assert {"sensitivity (first weights)"} <= set(audit_setup(sound, **QUICK).failed())


def shared(backend: str) -> Any:
    """A network that calls one layer twice."""
    if backend == "torch":
        torch = importlib.import_module("torch")
        twice = torch.nn.Linear(6, 6)
        torch.manual_seed(0)
        return torch.nn.Sequential(twice, torch.nn.ReLU(), twice, torch.nn.Linear(6, 3))
    keras = importlib.import_module("keras")
    x = keras.Input((6,))
    layer = keras.layers.Dense(6, name="twice")
    return keras.Model(x, keras.layers.Dense(3, name="head")(layer(keras.ops.relu(layer(x)))))


def test_an_unnoised_count_is_caught() -> None:
    setup = make(strategy={"name": "mixed_ghost", "max_grad_norm": {"initial": 1.0}})
    assert audit_setup(broken.with_backend(setup, broken.UnboundedCount), **QUICK).failed() == ["noise of the released count"]


def test_replacing_at_the_price_of_removing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "sensitivity", lambda group, relation="add_remove": group.norm_bound)
    setup = make(privacy={"noise_multiplier": 1.0, "accountant": "rdp", "relation": "replace_one"})
    found = set(audit_setup(setup, canaries=0, examples=0, trials=3000).failed())
    assert {"one release", "joint sensitivity (first weights)", "ledger"} <= found


def test_an_accountant_that_says_too_little_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = RDPAccountant.epsilon
    monkeypatch.setattr(RDPAccountant, "epsilon", lambda self, events, delta: 0.5 * true(self, events, delta))
    assert "accountant" in audit_setup(make(), **QUICK).failed()


@pytest.mark.parametrize("sampler", [broken.Shuffled, broken.FixedSize, broken.Favourites])
def test_other_sampling_accounted_as_poisson_is_caught(sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make()
    monkeypatch.setattr(PoissonSampler, "sample", sampler.sample)
    found = audit_setup(setup, **QUICK).failed()
    assert "sampling" in found
    assert set(found) <= {"sampling", "sampling of pairs", "two runs"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_run_alone_catches_missing_noise(backend: str) -> None:
    """Both forms: every release, and the finished model. The labels of the second have to be learnt by heart."""
    rng = np.random.default_rng(0)
    coins = from_arrays(rng.standard_normal((300, 5)), rng.integers(0, 3, 300), num_classes=3)
    run = {"privacy": {"noise_multiplier": 8.0, "accountant": "rdp"}, "sampling": {"sample_rate": 1.0, "steps": 5}}
    setup = prepare(config(model={"name": "mlp", "hidden": [64]}, **run), backend, coins)
    sound = audit_setup(setup, canaries=100, examples=100, trials=0)
    assert sound.passed, str(sound)
    found = audit_setup(broken.with_backend(setup, broken.NoNoise), canaries=150, examples=0, trials=0)
    assert "one run, gradient-space canaries" in found.failed()
    assert found.epsilon_lower_bound > found.epsilon


def test_a_backend_that_cannot_be_audited_says_so() -> None:
    setup = make()

    class Old:
        name = "old"

    with pytest.raises(ConfigError, match="has no sums, shifted, parameters, losses"):
        audit_setup(dataclasses.replace(setup, backend=Old()))  # type: ignore[arg-type]


def test_non_private_runs_have_nothing_to_audit() -> None:
    with pytest.raises(ConfigError, match="claims no privacy"):
        audit(config(strategy="non_private"), data=blobs(60))


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config(model={"name": "mlp", "hidden": [8]}, sampling={"sample_rate": 0.2, "steps": 3}).to_yaml())
    words = ["dptrain", "audit", str(path), "--canaries", "0", "--examples", "0", "--trials", "100", "--out", str(tmp_path), "--json"]

    def run() -> int:
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    assert run() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert found["private"] is False
    assert json.loads((tmp_path / "audit.json").read_text()) == found
    true = TorchBackend.privatize

    def quieter(self: TorchBackend, total: Any, plan: Any, stds: dict[str, float], noise: Any) -> Any:
        return true(self, total, plan, {name: 0.4 * s for name, s in stds.items()}, noise)

    monkeypatch.setattr(TorchBackend, "privatize", quieter)
    assert run() == 1
    assert "noise" in [f["name"] for f in json.loads(capsys.readouterr().out)["findings"] if not f["passed"]]
