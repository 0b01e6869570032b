"""Peers under another interpreter: the parent's side, with children that need no framework."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import elsewhere
from benchmarks.peers.elsewhere import Elsewhere
from dptrain import TrainConfig
from dptrain.comparison import Case, Settings, Shape, grid
from dptrain.comparison.measure import PeerMissingError, measure
from dptrain.comparison.report import markdown, merged
from dptrain.comparison.run import subprocess_measure
from dptrain.errors import DptrainError

CONFIG = {
    "model": {"name": "mlp", "hidden": [16]}, "strategy": "per_sample", "privacy": {"noise_multiplier": 1.0},
    "sampling": {"sample_rate": 0.1, "steps": 10},
}  # fmt: skip
CHILD = """
import time
def versions():
    return {"framework": "1.2"}
def step(request, seconds):
    kept = b"x" * int(8 * seconds * 2**30)
    return lambda: (time.sleep(seconds), len(kept))
def plain(request):
    return step(request, 0.002)
def private(request):
    if request["layers"][0]["type"] != "flatten" or request["layers"][-1]["units"] != 10:
        raise NotImplementedError("no such layer")
    return step(request, 0.004)
"""
PEER = Elsewhere("fake", "quick", "FAKE_PYTHON", "pip install fake")


def case(measurement: str = "time", **changes: Any) -> Case:
    given = {"backends": ["tensorflow"], "strategies": ["benchmarks.peers.lipdp:quick"], "settings": Settings(pairs=3, warmup=1), **changes}
    cases = grid(TrainConfig.parse(CONFIG).to_dict(), Shape((4, 4, 1)), measurements=[measurement], **given)
    return next(c for c in cases if c.external)


@pytest.fixture
def children(tmp_path: Path, monkeypatch) -> Path:
    """A folder of children with the real script and a child that needs nothing."""
    (tmp_path / "measured.py").write_text((elsewhere.CHILDREN / "measured.py").read_text())
    (tmp_path / "fake.py").write_text(CHILD)
    monkeypatch.setattr(elsewhere, "CHILDREN", tmp_path)
    monkeypatch.setenv("FAKE_PYTHON", sys.executable)
    return tmp_path


def test_time_is_that_of_pairs_in_the_childs_process_and_the_row_says_what_it_is_relative_to(children: Path) -> None:
    found = PEER.measure(case())
    assert 1.5 < found["ratio"] < 2.5
    assert found["seconds"] > found["plain_seconds"] >= 0.002
    assert found["yardstick"] == "relative to a plain loop of its own, under framework 1.2"


def test_memory_is_that_of_two_processes(children: Path) -> None:
    found = PEER.measure(case("memory"))
    assert 16 < found["plain_mib"] < 24
    assert 32 < found["total_mib"] < 40
    assert "yardstick" in found


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"python": None}, PeerMissingError, "FAKE_PYTHON is not set: pip install fake"),
        ({"python": "/no/such/python"}, PeerMissingError, "cannot be run .*: pip install fake"),
        ({"child": "import nothing_of_this_name"}, PeerMissingError, "cannot be imported .*nothing_of_this_name.*: pip install fake"),
        ({"child": CHILD.replace('"flatten"', '"conv"')}, DptrainError, "no such layer"),
        ({"backends": ["torch"]}, DptrainError, "TensorFlow only"),
        ({"models": ["my:model"]}, DptrainError, "only a specified model"),
    ],
)
def test_what_cannot_run_says_why(children: Path, monkeypatch, change: dict[str, Any], error: type[Exception], words: str) -> None:
    if "child" in change:
        (children / "fake.py").write_text(change.pop("child"))
    if "python" in change:
        python = change.pop("python")
        monkeypatch.setenv("FAKE_PYTHON", python) if python else monkeypatch.delenv("FAKE_PYTHON")
    with pytest.raises(error, match=words):
        PEER.measure(case(**change))


def test_a_crash_of_the_child_is_a_failed_row(children: Path) -> None:
    (children / "fake.py").write_text("raise RuntimeError('a strange crash')")
    assert PEER.measure(case()) == {"failed": "exit code 1: RuntimeError: a strange crash"}


def test_a_peer_that_is_missing_is_a_row_with_how_to_get_it_which_is_tried_again(monkeypatch) -> None:
    """In the measurement's own process, where the adapter's exceptions must be those that are caught."""
    for name in ("LIPDP", "LIPDP_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    found = subprocess_measure(case())
    assert found["missing"] and "git clone https://github.com/deel-ai/lipdp" in found["unsupported"]


def test_its_ratios_are_to_its_own_plain_loop_and_leave_ours_alone(children: Path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.peers.lipdp.quick", PEER)
    shared = {"model": "mlp", "input": "4x4x1", "batch": 8, "backend": "tensorflow", "sweep": {}, "threads": 1}
    rows = [
        {**shared, "strategy": "non_private", "measurement": "memory", "total_mib": 100.0},
        {**shared, "strategy": "per_sample", "measurement": "time", "plain_seconds": 1.0, "seconds": 2.0, "ratio": 2.0},
        {**shared, "strategy": "theirs:quick", "measurement": "time", **measure(case())},
        {**shared, "strategy": "theirs:quick", "measurement": "memory", "total_mib": 90.0, "plain_mib": 60.0, "yardstick": "its own"},
    ]
    found = {row["strategy"]: row for row in merged(rows)}
    assert found["non_private"]["seconds"] == 1.0
    assert found["theirs:quick"]["memory_ratio"] == 1.5
    assert "its own |" in markdown(rows)
    json.dumps(rows)
