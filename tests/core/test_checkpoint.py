"""A run directory survives kills, full disks and mistaken identity, and never holds a key."""

from __future__ import annotations

import errno
import json
import os
import pickle
import secrets
from pathlib import Path

import numpy as np
import numpy.random  # draws from secrets where it is imported for the first time, which a test below replaces
import pytest

import dptrain
from accounting import LedgerError, PrivacyLedger, SampledGaussian
from dptrain import RunError
from dptrain.checkpoint import Checkpoint, atomic_write, load_arrays, read_json, save_arrays, write_json
from dptrain.rundir import RunDirectory
from tests.core.shared import blobs, config

RUN = {"config_hash": "abc", "backend": "torch"}
CHECKPOINT = Checkpoint(
    7,
    {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "fc.bias": np.zeros(2, np.float64)},
    {"0/step": np.array(7.0, np.float32), "0/exp_avg": np.ones((2, 3), np.float32), "0/count": np.array([3], np.int64)},
)
FACTS = {"num_examples": 60, "num_steps": 4, "sample_rate": 0.2}


def refusal(call, *args, **kwargs) -> str:
    """The one-line message of the RunError that a call must end in; any other exception fails the test."""
    with pytest.raises(RunError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ---- writing -------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.bin"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("broken", ["replace", "fsync", "write", "open"])
def test_a_failure_in_the_middle_keeps_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.bin"
    atomic_write(path, b"old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full:
        def __init__(self, *args):
            self.file = open(*args)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def write(self, data):
            self.file.write(data[:1])
            full()

    if broken == "open":
        monkeypatch.setattr("builtins.open", full)
    elif broken == "write":
        monkeypatch.setattr("dptrain.checkpoint.open", Full, raising=False)
    else:
        monkeypatch.setattr(f"dptrain.checkpoint.os.{broken}", full)
    message = refusal(atomic_write, path, b"new content")
    monkeypatch.undo()
    assert "No space left on device" in message
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    assert "cannot be written (No such file or directory)" in refusal(atomic_write, tmp_path / "none" / "a", b"")


def test_the_data_is_on_disk_before_the_name_points_to_it(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(f"dptrain.checkpoint.os.{name}", lambda *a, n=name, r=real: (order.append(n), r(*a))[1])
    atomic_write(tmp_path / "a", b"x")
    assert order == ["fsync", "replace", "fsync"]  # the content, the swap, the directory


# ---- reading -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_reads_back_bit_for_bit(tmp_path):
    CHECKPOINT.save(tmp_path / "c", RUN)
    again = Checkpoint.load(tmp_path / "c", RUN)
    assert again.step == 7
    for ours, theirs in ((CHECKPOINT.weights, again.weights), (CHECKPOINT.optimizer, again.optimizer)):
        assert list(ours) == sorted(ours, key=list(ours).index)
        assert set(ours) == set(theirs)
        for name, value in ours.items():
            assert theirs[name].dtype == value.dtype
            assert theirs[name].shape == value.shape  # a scalar stays a scalar
            assert theirs[name].tobytes() == value.tobytes()


def test_arrays_in_any_memory_layout_read_back(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_arrays(tmp_path / "a", {"turned": array.T, "strided": array[:, ::2], "empty": array[:0]}, {"k": "v"})
    arrays, metadata = load_arrays(tmp_path / "a")
    np.testing.assert_array_equal(arrays["turned"], array.T)
    np.testing.assert_array_equal(arrays["strided"], array[:, ::2])
    assert arrays["empty"].shape == (0, 4)
    assert metadata == {"k": "v"}


def test_files_of_others_that_carry_no_digest_load(tmp_path):
    from safetensors.numpy import save_file

    save_file({"w": np.ones(3, np.float32)}, tmp_path / "w.safetensors")
    arrays, metadata = load_arrays(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(arrays["w"], np.ones(3))
    assert metadata == {}


def test_every_single_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "c"
    small = Checkpoint(3, {"w": np.array([1.0, -2.0], np.float32)}, {"0/s": np.array(1.0, np.float32)})
    small.save(path, RUN)
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            refusal(Checkpoint.load, path, RUN)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "c"
    CHECKPOINT.save(path, RUN)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        refusal(Checkpoint.load, path, RUN)
    path.write_bytes(content + b"\0")
    refusal(Checkpoint.load, path, RUN)


class Bomb:
    """Unpickling it would leave a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_foreign_files_are_refused_and_a_pickle_is_not_executed(tmp_path):
    path, trace = tmp_path / "c", tmp_path / "executed"
    for content in (pickle.dumps(Bomb(trace)), b"PK\x03\x04" + b"\0" * 100, b"", b"{}", b"\xff" * 64, os.urandom(200)):
        path.write_bytes(content)
        assert "is not a readable safetensors file" in refusal(Checkpoint.load, path, RUN)
    assert not trace.exists()
    assert "is not a readable safetensors file" in refusal(Checkpoint.load, tmp_path / "none", RUN)
    assert "is not a readable safetensors file" in refusal(Checkpoint.load, tmp_path, RUN)


@pytest.mark.parametrize(
    ("metadata", "arrays", "expected"),
    [
        ({"format": "2", "step": "1", **RUN}, {}, "is not a dptrain checkpoint of format 1"),
        ({"step": "1", **RUN}, {}, "is not a dptrain checkpoint"),
        ({"format": "1", **RUN}, {}, "is not a dptrain checkpoint"),
        ({"format": "1", "step": "-1", **RUN}, {}, "is not a dptrain checkpoint"),
        ({"format": "1", "step": "1", **RUN, "config_hash": "x"}, {}, "belongs to another run"),
        ({"format": "1", "step": "1", **RUN, "backend": "tensorflow"}, {}, "belongs to another run"),
        ({"format": "1", "step": "1", "backend": "torch"}, {}, "belongs to another run"),
        ({"format": "1", "step": "1", **RUN}, {"keys/noise": np.ones(1)}, "unknown entry 'keys/noise'"),
    ],
)
def test_a_checkpoint_of_another_format_or_run_is_refused(tmp_path, metadata, arrays, expected):
    save_arrays(tmp_path / "c", arrays, metadata)
    assert expected in refusal(Checkpoint.load, tmp_path / "c", RUN)


def test_a_weights_file_is_no_checkpoint(tmp_path):
    """It has no step and no digest, so that training must not continue from it."""
    from safetensors.numpy import save_file

    save_file({"weights/w": np.ones(1)}, tmp_path / "c", metadata={"format": "1", "step": "1", **RUN})
    assert "carries no digest" in refusal(Checkpoint.load, tmp_path / "c", RUN)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_json_file_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    refusal(read_json, tmp_path / "run.json")
    refusal(read_json, tmp_path / "none.json")


# ---- whose directory it is -----------------------------------------------------------------------------------------


def opened(path, run=None, backend="torch", **facts):
    with RunDirectory(path, run or config(), backend, {**FACTS, **facts}) as directory:
        return directory


def test_a_new_directory_is_made_with_everything_a_resumed_run_needs(tmp_path):
    directory = opened(tmp_path / "deep" / "run")
    assert not directory.resumed
    assert sorted(os.listdir(directory.path)) == ["config.yaml", "ledger.jsonl", "run.json"]
    assert dptrain.TrainConfig.load(directory.path / "config.yaml") == config()
    again = opened(tmp_path / "deep" / "run")
    assert again.resumed
    assert again.load_checkpoint() is None


def test_what_is_remembered_is_there_for_the_resumed_run(tmp_path):
    with RunDirectory(tmp_path, config(), "torch", FACTS) as directory:
        directory.remember(noise_multiplier=1.2345678901234567)
        directory.save_checkpoint(CHECKPOINT)
        directory.log(step=1, loss=float("nan"), epsilon=float("inf"), seconds=0.5)
    again = opened(tmp_path)
    assert again.record["noise_multiplier"] == 1.2345678901234567
    assert again.load_checkpoint().step == 7
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "epsilon": None, "seconds": 0.5}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"run": config(seed=1)}, "belongs to another run (config_hash"),
        ({"run": config(privacy={"noise_multiplier": 2.0, "accountant": "rdp"})}, "belongs to another run (config_hash"),
        ({"backend": "tensorflow"}, "belongs to another run (backend 'torch', here 'tensorflow')"),
        ({"num_examples": 61}, "belongs to another run (num_examples 60, here 61)"),
        ({"sample_rate": 0.3}, "belongs to another run (sample_rate"),
    ],
)
def test_the_directory_of_another_run_is_refused(tmp_path, change, expected):
    opened(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert expected in refusal(opened, tmp_path, **change)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml", "weights.safetensors", "checkpoint.safetensors", "subfolder/file"])
def test_a_directory_with_other_things_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert "is not empty and holds no dptrain run" in refusal(opened, tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert len(os.listdir(tmp_path)) == 1


def test_a_directory_without_its_run_file_but_with_releases_is_refused(tmp_path):
    """What was spent there would otherwise be spent again under another name."""
    with PrivacyLedger(tmp_path / "ledger.jsonl") as ledger:
        ledger.record(SampledGaussian(1.0, 0.1))
    assert "is not empty and holds no dptrain run" in refusal(opened, tmp_path)


@pytest.mark.parametrize("left", [["ledger.jsonl"], ["ledger.jsonl", "config.yaml"], [".run.json.123.tmp"], []])
def test_a_directory_whose_making_was_killed_is_made_anew(tmp_path, left):
    opened(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    for name in left:
        source = tmp_path / "whole" / name
        (tmp_path / "killed" / name).write_bytes(source.read_bytes() if source.exists() else b"half")
    assert not opened(tmp_path / "killed", config(seed=5)).resumed
    assert opened(tmp_path / "killed", config(seed=5)).resumed


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_a_disk_that_is_full_while_a_directory_is_made_costs_nothing(tmp_path, monkeypatch, name):
    real = os.replace

    def replace(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr("dptrain.checkpoint.os.replace", replace)
    assert "No space left" in refusal(opened, tmp_path)
    monkeypatch.undo()
    assert not opened(tmp_path).resumed


def test_a_run_whose_ledger_is_gone_is_refused(tmp_path):
    """A deleted ledger is a forgotten budget."""
    opened(tmp_path)
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(LedgerError, match=r"ledger\.jsonl: cannot be opened"):
        opened(tmp_path)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_two_processes_cannot_share_a_directory(tmp_path):
    with RunDirectory(tmp_path, config(), "torch", FACTS), pytest.raises(LedgerError, match="another process"):
        RunDirectory(tmp_path, config(), "torch", FACTS)
    assert opened(tmp_path).resumed


def test_a_run_file_of_a_newer_version_is_refused(tmp_path):
    opened(tmp_path)
    record = read_json(tmp_path / "run.json")
    write_json(tmp_path / "run.json", {**record, "format": "2"})
    assert "another version of dptrain (format '2')" in refusal(opened, tmp_path)


def test_a_file_or_an_unusable_path_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be used (File exists)" in refusal(opened, tmp_path / "file")
    assert "cannot be used" in refusal(opened, tmp_path / "file" / "below")
    assert "cannot be used" in refusal(opened, tmp_path / ("x" * 300))


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunDirectory(None, config(), "torch", FACTS) as directory:
        directory.log(a=1)
        directory.remember(noise_multiplier=1.0)
        directory.save_checkpoint(CHECKPOINT)
        assert directory.load_checkpoint() is None
    assert os.listdir(tmp_path) == []


# ---- secrets -------------------------------------------------------------------------------------------------------


def spellings(key: int) -> list[bytes]:
    """A key as it might be written."""
    raw = key.to_bytes(16, "big")
    halves = (key >> 64, key & 2**64 - 1)
    texts = [str(key), f"{key:x}", f"{key:X}", f"{key:032x}", *(str(h) for h in halves), *(f"{h:x}" for h in halves)]
    return [raw, raw[::-1], raw[:8], raw[8:], raw[:8][::-1], raw[8:][::-1], *(text.encode() for text in texts)]


def test_keys_are_never_on_disk(tmp_path, monkeypatch):
    keys = [0x0123456789ABCDEF_F1E2D3C4B5A69788, 0x9D8C7B6A5F4E3D2C_0A1B2C3D4E5F6978]
    given = iter(keys)
    monkeypatch.setattr(secrets, "randbits", lambda bits: next(given))
    run = config(privacy={"noise_multiplier": 1.0, "accountant": "rdp"}, performance={"checkpoint_every": 1})
    dptrain.train(run, data=blobs(), out=tmp_path / "run")
    assert next(given, None) is None  # both keys were used
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {p.name for p in files} >= {
        "checkpoint.safetensors", "config.yaml", "ledger.jsonl", "metrics.jsonl",
        "plan.txt", "privacy.json", "run.json", "weights.safetensors",
    }  # fmt: skip
    for path in files:
        content = path.read_bytes()
        for key in keys:
            for spelling in spellings(key):
                assert spelling not in content, path.name
