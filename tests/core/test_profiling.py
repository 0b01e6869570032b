"""A profile counts each moment of a step once, and changes nothing of what is trained."""

from __future__ import annotations

import json

import pytest

from dptrain import ConfigError, train
from dptrain.profiling import PHASES, Profile, phase, step
from tests.core.shared import blobs, config


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_times_are_exclusive_and_the_first_step_is_left_out() -> None:
    clock = Clock()
    profile = Profile(clock)
    waits = []
    with profile.running(lambda: waits.append(clock.now)):
        for unit in (100.0, 1.0, 2.0):
            with step():
                clock.now += unit
                with phase("cotangents"):
                    clock.now += 2 * unit
                    with phase("norms"):
                        clock.now += 3 * unit
                    clock.now += 4 * unit
            clock.now += 1000.0  # between steps: logging, checkpoints
    assert profile.figures() == {"steps": 2, "milliseconds": {"cotangents": 9e3, "norms": 4.5e3, "other": 1.5e3}, "private": False}
    assert waits  # for the device, wherever a phase ends
    text = " ".join(str(profile).split())
    assert "norms" in text and "30.0%" in text and "15,000.00 ms per step, mean of 2 steps" in text


def test_nothing_is_measured_outside_and_an_error_ends_it() -> None:
    profile = Profile()
    with pytest.raises(ValueError, match="a bad step"), profile.running(lambda: None), step(), phase("norms"):
        raise ValueError("a bad step")
    with step(), phase("norms"):
        pass
    assert profile.steps == -1 and "too few steps" in " ".join(str(profile).split())


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
@pytest.mark.parametrize(
    ("strategy", "phases"),
    [
        ("mixed_ghost", {"forward", "cotangents", "norms", "sums", "noise"}),
        ("non_private", {"forward", "gradients"}),
    ],
)
def test_a_run_is_taken_apart_and_is_the_same_run(backend: str, strategy: str, phases: set[str]) -> None:
    parts = {"strategy": strategy, "performance": {"compile": False, "physical_batch_size": 8}}
    run = config(privacy={"noise_multiplier": 1.0, "accountant": "rdp", "unsafe_seed": 3}, **parts)
    profile = Profile()
    seen = train(run, backend, data=blobs(), profile=profile)
    found = profile.figures()
    assert found["steps"] == 3
    assert phases | {"data", "ledger", "update", "projection", "other"} == set(found["milliseconds"])
    assert set(found["milliseconds"]) <= set(PHASES) and all(value >= 0 for value in found["milliseconds"].values())
    assert sum(found["milliseconds"].values()) * found["steps"] / 1e3 <= seen.seconds
    alone = train(run, backend, data=blobs())
    assert alone.metrics == seen.metrics


def test_clipless_has_gradients_and_a_projection() -> None:
    profile = Profile()
    train(config(strategy="clipless", model={"name": "lipschitz_mlp", "hidden": [8]}), "torch", data=blobs(), profile=profile)
    assert {"forward", "gradients", "noise", "projection"} <= set(profile.figures()["milliseconds"])


@pytest.mark.parametrize(("backend", "compiled"), [("tensorflow", "auto"), ("tensorflow", True), ("torch", True)])
def test_a_compiled_step_is_refused(backend: str, compiled: object, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"set performance\.compile to false"):
        train(config(performance={"compile": compiled}), backend, data=blobs(), out=tmp_path / "run", profile=Profile())
    assert not (tmp_path / "run").exists()


def test_figures_are_plain_data() -> None:
    assert json.loads(json.dumps(Profile().figures())) == {"steps": 0, "milliseconds": {}, "private": False}
