"""Trainings to be killed, and what must hold of the files whenever that happens."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import dptrain
from accounting import PrivacyLedger, SampledGaussian, get_accountant
from dptrain.checkpoint import Checkpoint, load_arrays
from tests.core.shared import blobs, config
from tests.durability import toy
from tests.durability.faults import Faults

DATA = blobs(40)
get_accountant("rdp").epsilon([(SampledGaussian(1.0, 0.3), 2)], 1e-5)  # loads what it needs before processes are forked from here
get_accountant("prv").epsilon([(SampledGaussian(1.0, 0.3), 2)], 1e-5)


class Place:
    """Where runs leave their traces: a directory each, a ledger that they share, a side file of true releases each."""

    def __init__(self, root: Path, share: bool = True) -> None:
        self.root, self.data = root, root / "data.jsonl" if share else None

    def out(self, name: str) -> Path:
        return self.root / name

    def side(self, name: str) -> Path:
        return self.root / f"{name}.side"

    def config(self, steps: int = 4, seed: int = 0, every: int = 2, **privacy: Any) -> dptrain.TrainConfig:
        """A run on the shared data; by default with a budget that is calibrated to the last step."""
        plain = {"noise_multiplier": 1.0, "accountant": "rdp", "ledger": str(self.data) if self.data else None, **privacy}
        return config(
            privacy={k: v for k, v in plain.items() if v is not None}, strategy="per_sample", seed=seed, model="mlp",
            sampling={"sample_rate": 0.3, "steps": steps}, performance={"checkpoint_every": every},
        )  # fmt: skip


def train(place: Place, name: str, cfg: dptrain.TrainConfig, faults: Faults | None = None, **options: Any) -> Any:
    """Train in this process with the toy backend, watched."""
    toy.register()
    toy.Side.path = str(place.side(name))
    try:
        if faults is None:
            return dptrain.train(cfg, toy.NAME, out=place.out(name), data=DATA, **options)
        with faults.in_force():
            return dptrain.train(cfg, toy.NAME, out=place.out(name), data=DATA, **options)
    finally:
        toy.Side.path = None


def in_a_small_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process that has loaded NumPy and dptrain and no framework, where a fork takes milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.durability.harness"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        fine, found = ours.recv()
    finally:
        process.join()
    assert fine, found
    return found


def _answer(pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def forked(function: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Call a function in a copy of this process; returns its number at once."""
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*args, **options)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(pid: int) -> bool:
    """Wait for a copy; whether it came to its end rather than being killed.

    Raises:
        AssertionError: it ended with an error.
    """
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), f"the training failed with status {status}; its traceback is on stderr"
    return status == 0


def releases(path: Path) -> int:
    """Releases in a ledger file as anybody may read it now; none where there is no file."""
    return PrivacyLedger.read(path).num_releases if path.exists() else 0


def inspect(place: Place, names: list[str]) -> dict[str, int]:
    """What must hold at any instant: spending is recorded, files are readable, claims are covered. Returns true releases by run."""
    true = {name: len(toy.seen(place.side(name))) for name in names}
    for name in names:
        out = place.out(name)
        recorded = releases(out / "ledger.jsonl")
        assert recorded >= true[name], f"{name}: {true[name]} releases were made, {recorded} are recorded"
        for file in sorted(out.iterdir()) if out.exists() else ():
            readable(file, recorded)
    if place.data is not None:
        assert releases(place.data) >= sum(true.values())
    return true


def readable(file: Path, recorded: int) -> None:
    """Every file that has its final name is whole."""
    if file.name.endswith(".tmp"):
        return
    if file.name == "checkpoint.safetensors":
        assert Checkpoint.load(file, {}).step <= recorded
    elif file.suffix == ".safetensors":
        load_arrays(file, own=True)
    elif file.name == "privacy.json":
        assert json.loads(file.read_text())["releases"] <= recorded
    elif file.name == "run.json":
        assert isinstance(json.loads(file.read_text()), dict)
    elif file.name == "config.yaml":
        dptrain.TrainConfig.load(file)
    elif file.name == "metrics.jsonl":
        *whole, _ = file.read_text().split("\n")
        steps = {line["step"] for line in map(json.loads, whole) if "train_loss" in line}
        assert len(steps) <= recorded
    else:
        assert file.name in ("ledger.jsonl", "plan.txt"), file


def weights(out: Path) -> dict[str, np.ndarray]:
    """Final weights of a run."""
    return load_arrays(out / "weights.safetensors", own=True)[0]


def assert_same_weights(one: Path, two: Path) -> None:
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), name


def left_behind(out: Path) -> list[str]:
    return [name for name in os.listdir(out) if name.endswith(".tmp")]
