"""Killed at every system call, and at random instants hundreds of times: spending is recorded, files are whole, runs can be resumed.

True releases are observed from outside: see ``toy.py``. Everything runs in a process without frameworks that forks the ones to be killed.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from accounting import PrivacyLedger, get_accountant
from dptrain import RunError
from dptrain.errors import USER_ERRORS
from tests.durability.faults import AFTER, BEFORE, HALF, Faults, die, full
from tests.durability.harness import (
    Place,
    assert_same_weights,
    ended,
    forked,
    in_a_small_process,
    inspect,
    left_behind,
    releases,
    train,
)

TARGET, STEPS = 2.0, 4


@pytest.fixture
def quick(tmp_path):
    """A place in memory where there is one: a kill does not lose what the kernel has, so that waiting for a disk shows nothing."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as root:
        yield Path(root)


PRIVATE = {"noise_multiplier": None, "target_epsilon": TARGET}
SEEDED = {**PRIVATE, "unsafe_seed": 7}


def finished(place: Place, name: str, result, seeded: bool) -> None:
    """What must hold of a run that was resumed to its end: every planned release is spent, and no more."""
    true = inspect(place, [name])[name]
    assert result.complete
    assert releases(place.out(name) / "ledger.jsonl") == result.privacy["releases"] == STEPS
    assert result.epsilon <= TARGET
    assert true <= STEPS and result.steps <= true
    if seeded:
        assert result.steps == true == STEPS
    if place.data is not None:
        assert releases(place.data) == STEPS
        assert get_accountant("rdp").epsilon(PrivacyLedger.read(place.data).events, 1e-5) <= TARGET
    assert left_behind(place.out(name)) == []


def reference(root: Path) -> tuple[Path, int]:
    """An uninterrupted seeded run, and the number of its system calls."""
    place, faults = Place(root / "reference"), Faults()
    place.root.mkdir()
    train(place, "a", place.config(**SEEDED), faults)
    return place.out("a"), len(faults.calls)


def at_every_call(root: str, moment: str, seeded: bool, share: bool, every: int) -> int:
    """Kill a run at every call, resume it; returns how many kills there were."""
    whole, calls = reference(Path(root))
    settings, killed = (SEEDED if seeded else PRIVATE), 0
    for at in range(0, calls, every):
        place = Place(Path(root) / f"{at}", share)
        place.root.mkdir()
        cfg = place.config(**settings)
        killed += not ended(forked(train, place, "a", cfg, Faults(at, moment, die)))
        inspect(place, ["a"])
        finished(place, "a", train(place, "a", cfg), seeded)
        if seeded and share:
            assert_same_weights(place.out("a"), whole)
    return killed


SLOWLY = [pytest.param(moment, 1, marks=pytest.mark.slow) for moment in (BEFORE, HALF, AFTER)]


@pytest.mark.parametrize(("moment", "every"), [(HALF, 1), (BEFORE, 3), *SLOWLY])  # half-way through a call that writes nothing is after it
def test_killed_at_every_system_call(quick, moment, every):
    assert in_a_small_process(at_every_call, str(quick), moment, True, True, every) > 50 // every


@pytest.mark.parametrize(("moment", "every"), [(BEFORE, 5), (HALF, 6), *SLOWLY])
def test_killed_at_system_calls_of_a_run_with_fresh_noise(quick, moment, every):
    assert in_a_small_process(at_every_call, str(quick), moment, False, True, every) > 50 // every


@pytest.mark.parametrize(("moment", "every"), [(BEFORE, 7), (HALF, 6), *SLOWLY])
def test_killed_at_system_calls_of_a_run_that_shares_nothing(quick, moment, every):
    assert in_a_small_process(at_every_call, str(quick), moment, True, False, every) > 36 // every


def killed_twice(root: str, seed: int, pairs: int) -> None:
    """The resumed run is killed, too, at any of its own calls."""
    whole, calls = reference(Path(root))
    rng = random.Random(seed)
    for i in range(pairs):
        place, seeded = Place(Path(root) / f"{i}"), i % 2 == 0
        place.root.mkdir()
        cfg = place.config(**(SEEDED if seeded else PRIVATE))
        for _ in range(rng.randint(2, 4)):
            ended(forked(train, place, "a", cfg, Faults(rng.randrange(calls), rng.choice([BEFORE, HALF, AFTER]), die)))
            inspect(place, ["a"])
        finished(place, "a", train(place, "a", cfg), seeded)
        if seeded:
            assert_same_weights(place.out("a"), whole)


def test_killed_again_while_resuming(quick):
    in_a_small_process(killed_twice, str(quick), 1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_killed_again_while_resuming_often(quick, seed):
    in_a_small_process(killed_twice, str(quick), seed, 150)


# ---- at random instants ------------------------------------------------------------------------------------------------

LONG = 16


def at_random(root: str, seed: int, kills: int) -> tuple[int, int]:
    """Runs on shared data, killed again and again at any instant; returns (kills that met a run, true releases lost by them)."""
    rng, place, calm = random.Random(seed), Place(Path(root)), Place(Path(root) / "calm")
    calm.root.mkdir()
    train(calm, "first", calm.config(LONG, every=3))  # loads what the one that is timed would have to load
    begin = time.perf_counter()
    train(calm, "seeded", calm.config(LONG, every=3, unsafe_seed=3))
    duration = time.perf_counter() - begin
    names, met = ["private0", "seeded0"], 0
    while met < kills:
        which = rng.randrange(2)
        name = names[which]
        cfg = place.config(LONG, every=3, **({"unsafe_seed": 3} if which else {}))
        pid = forked(train, place, name, cfg)
        time.sleep(rng.uniform(0, 0.7) * duration)
        os.kill(pid, signal.SIGKILL)
        done = ended(pid)
        met += not done
        inspect(place, names)
        if done:
            names[which] = f"{name.rstrip('0123456789')}{len(runs(place)) + 1}"
    lost = 0
    for name in names:
        train(place, name, place.config(LONG, every=3, **({"unsafe_seed": 3} if name.startswith("seeded") else {})))
    true = inspect(place, runs(place))
    for name in runs(place):
        recorded = releases(place.out(name) / "ledger.jsonl")
        assert recorded == LONG
        lost += recorded - true[name]
        if name.startswith("seeded"):
            assert true[name] == LONG
            assert_same_weights(place.out(name), calm.out("seeded"))
    assert releases(place.data) == LONG * len(runs(place))
    return met, lost


def runs(place: Place) -> list[str]:
    """Names of the runs that were begun."""
    return sorted(path.name for path in place.root.iterdir() if path.is_dir() and path.name != "calm")


def test_killed_at_random_instants(quick):
    met, lost = in_a_small_process(at_random, str(quick), 1, 40)
    assert met == 40 and lost <= met


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
def test_killed_at_random_instants_hundreds_of_times(quick, seed):
    met, lost = in_a_small_process(at_random, str(quick), seed, 150)
    assert met == 150 and lost <= met


# ---- a full disk -------------------------------------------------------------------------------------------------------


def full_at_every_call(root: str, moment: str, lasting: bool, every: int) -> int:
    """The disk is full at a call, once or from then on: an error of one sentence, and the same run is resumed when there is space."""
    whole, calls = reference(Path(root))
    refused = 0
    for at in range(0, calls, every):
        place = Place(Path(root) / f"{at}")
        place.root.mkdir()
        cfg = place.config(**SEEDED)
        try:
            train(place, "a", cfg, Faults(at, moment, full, lasting))
        except USER_ERRORS:
            refused += 1
        inspect(place, ["a"])
        finished(place, "a", train(place, "a", cfg), True)
        assert_same_weights(place.out("a"), whole)
    return refused


@pytest.mark.parametrize(("moment", "every"), [(BEFORE, 4), (HALF, 4), *SLOWLY])
def test_a_disk_that_is_full_at_any_call(quick, moment, every):
    assert in_a_small_process(full_at_every_call, str(quick), moment, moment != AFTER, every) > 50 // every


def limited(root: str, limit: int) -> str:
    """A kernel that lets no file grow beyond a limit; the sentence that the run ends with."""
    import resource

    place = Place(Path(root))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        train(place, "a", place.config(STEPS, **SEEDED))
    except USER_ERRORS as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return ""


@pytest.mark.parametrize("limit", [10, 200, 400, 700, 1500])
def test_files_that_may_not_grow(tmp_path, limit):
    message = in_a_small_process(limited, str(tmp_path), limit)
    assert "File too large" in message or "only part" in message
    assert "\n" not in message
    place = Place(tmp_path)
    inspect(place, ["a"])
    finished(place, "a", in_a_small_process(resumed, str(tmp_path)), True)


def resumed(root: str):
    place = Place(Path(root))
    result = train(place, "a", place.config(STEPS, **SEEDED))
    object.__setattr__(result, "model", None)
    object.__setattr__(result, "plan", None)
    return result


# ---- directories -------------------------------------------------------------------------------------------------------


def removed_while_running(root: str, what: str) -> tuple[str, int, int]:
    """Remove something after the second step; returns the error, true releases, and those that had been recorded at that instant."""
    import shutil

    place, before = Place(Path(root), share=what == "data.jsonl"), []

    def remove(progress):
        if progress.step == 2:
            before.append(inspect(place, ["a"])["a"])
            path = place.root / what
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    with pytest.raises(USER_ERRORS) as caught:
        train(place, "a", place.config(STEPS, every=100), progress=remove)
    from tests.durability import toy

    return str(caught.value), len(toy.seen(place.side("a"))), before[0]


@pytest.mark.parametrize("what", ["a", "a/ledger.jsonl", "data.jsonl"])
def test_nothing_is_released_once_the_ledger_is_gone(tmp_path, what):
    message, true, before = in_a_small_process(removed_while_running, str(tmp_path), what)
    assert "removed or replaced" in message and "do not release" in message
    assert true == before == 2


def in_a_small_disk(root: str, size: str) -> None:
    """A real disk of a few kilobytes, filled up by another program while the run goes on."""
    place = Place(Path(root))
    stuffed = place.root / "stuffing"

    def stuff(progress):
        if progress.step == 2:
            with suppress(OSError), open(stuffed, "wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass

    with pytest.raises(USER_ERRORS, match="No space left"):
        train(place, "a", place.config(STEPS, **SEEDED), progress=stuff)
    inspect(place, ["a"])
    stuffed.unlink()
    finished(place, "a", train(place, "a", place.config(STEPS, **SEEDED)), True)


def mounted(path: Path, options: str) -> bool:
    """Whether a small file system could be mounted there, which takes privileges."""
    path.mkdir(exist_ok=True)
    return os.system(f"mount -t tmpfs -o {options} tmpfs {path} 2>/dev/null") == 0


def test_a_real_disk_that_is_full(tmp_path):
    if not mounted(tmp_path / "disk", "size=256k"):
        pytest.skip("needs the right to mount a file system")
    try:
        in_a_small_process(in_a_small_disk, str(tmp_path / "disk"), "256k")
    finally:
        os.system(f"umount {tmp_path / 'disk'}")


def read_only(root: str) -> list[str]:
    """The sentences with which a fresh and a begun run refuse a place that cannot be written."""
    place, found = Place(Path(root)), []
    for name in ("begun", "fresh"):
        with pytest.raises(USER_ERRORS) as caught:
            train(place, name, place.config(STEPS, **SEEDED))
        found.append(str(caught.value))
    place = Place(Path(root), share=False)
    with pytest.raises(USER_ERRORS) as caught:
        train(place, "fresh", place.config(STEPS, **SEEDED))
    return [*found, str(caught.value)]


def begun(root: str) -> None:
    place = Place(Path(root))
    train(place, "begun", place.config(STEPS, **SEEDED), progress=lambda p: os.kill(os.getpid(), signal.SIGINT) if p.step == 2 else None)


def test_a_read_only_disk(tmp_path):
    disk = tmp_path / "disk"
    if not mounted(disk, "size=1m"):
        pytest.skip("needs the right to mount a file system")
    try:
        in_a_small_process(begun, str(disk))
        os.system(f"mount -o remount,ro {disk}")
        messages = in_a_small_process(read_only, str(disk))
        assert all("Read-only file system" in message and "\n" not in message for message in messages)
        inspect(Place(disk), ["begun"])
    finally:
        os.system(f"umount {disk}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_directory(tmp_path):
    place = Place(tmp_path, share=False)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError, match="cannot be used"):
            train(place, "a", place.config())
    finally:
        tmp_path.chmod(0o700)
