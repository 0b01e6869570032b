"""A whole run keeps its promise: epsilon follows from the ledger alone, and no kill, no bad input and no restart changes that."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

import dptrain
from accounting import AccountingError, LedgerError, PrivacyLedger, calibrate_noise_multiplier, get_accountant
from dptrain import ConfigError, DataError, RunError, UnsupportedModelError
from dptrain.checkpoint import Checkpoint, load_arrays
from dptrain.cli import main
from dptrain.data import Dataset, from_arrays
from dptrain.mechanism import GaussianMechanism, event_noise_multiplier, release_event
from dptrain.trainer import noise_multiplier
from tests.core.shared import blobs, config, plain, write_npz

RDP = {"noise_multiplier": 1.0, "accountant": "rdp"}
COMMAND = [sys.executable, "-m", "dptrain.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def weights_of(result) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in result.model.named_parameters()}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- the promise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_epsilon_is_the_accountants_for_what_the_ledger_holds(tmp_path, accountant, relation):
    run = config(privacy={"noise_multiplier": 1.2, "target_delta": 1e-4, "accountant": accountant, "relation": relation})
    result = dptrain.train(run, data=blobs(), out=tmp_path)
    ledger = PrivacyLedger.read(tmp_path / "ledger.jsonl")
    stds = GaussianMechanism(1.2).stds(result.plan, relation)
    assert ledger.events == ((release_event(result.plan, stds, 0.2, relation), 4),)
    assert result.epsilon == get_accountant(accountant, relation).epsilon(ledger.events, 1e-4)
    stated = json.loads((tmp_path / "privacy.json").read_text())
    assert stated == json.loads(json.dumps(result.privacy))
    assert stated["epsilon_by_accountant"]["prv"] <= stated["epsilon_by_accountant"]["rdp"]
    assert (stated["private"], stated["delta"], stated["neighboring_relation"], stated["accountant"]) == (True, 1e-4, relation, accountant)
    assert stated["releases"] == result.steps == 4
    assert stated["groups"][0]["noise_std"] == stds["all"] == pytest.approx(1.2 * (2 if relation == "replace_one" else 1))
    assert (result.complete, stated["status"], stated["sampling"]) == (True, "complete", "poisson")
    for word in (f"delta = {1e-4:g}", relation, "Poisson", accountant, "4 releases"):
        assert word in stated["statement"]


def test_a_run_leaves_everything_and_its_weights_are_those_of_the_model(tmp_path):
    result = dptrain.train(config(performance={"evaluate_every": 2}), data=blobs(), out=tmp_path)
    stored, metadata = load_arrays(tmp_path / "weights.safetensors")
    assert metadata["config_hash"] == config(performance={"evaluate_every": 2}).hash
    for name, value in weights_of(result).items():
        np.testing.assert_array_equal(stored[name], value)
    metrics = lines_of(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in metrics if "train_loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in metrics if "test_accuracy" in line] == [2, 4, 4]
    assert all(line["private"] is False for line in metrics)
    assert metrics[-1]["test_accuracy"] == result.metrics["accuracy"]
    assert "fc1" in (tmp_path / "plan.txt").read_text()
    assert Checkpoint.load(tmp_path / "checkpoint.safetensors", {}).step == 4


def test_training_learns():
    result = dptrain.train(config(sampling={"sample_rate": 0.5, "steps": 40}, optimizer={"learning_rate": 0.5}), data=blobs(600))
    assert result.metrics["accuracy"] > 0.9


@pytest.mark.parametrize("name", ["per_sample", "ghost", "mixed_ghost"])
def test_the_strategy_changes_neither_weights_nor_epsilon(name):
    unsafe = {**RDP, "unsafe_seed": 1}
    one = dptrain.train(config(strategy=name, privacy=unsafe, performance={"physical_batch_size": 3}), data=blobs())
    two = dptrain.train(config(strategy="per_sample", privacy=unsafe, performance={"gradients": "two_pass"}), data=blobs())
    assert one.epsilon == two.epsilon
    for name, value in weights_of(one).items():
        np.testing.assert_allclose(value, weights_of(two)[name], rtol=1e-4, atol=1e-5)


def test_non_private_training_has_no_epsilon_and_records_nothing(tmp_path):
    result = dptrain.train(config(strategy="non_private", privacy={"target_epsilon": 3.0}), data=blobs(), out=tmp_path)
    assert result.epsilon is None
    assert PrivacyLedger.read(tmp_path / "ledger.jsonl").num_releases == 0
    stated = json.loads((tmp_path / "privacy.json").read_text())
    assert (stated["private"], stated["epsilon"]) == (False, None)
    assert "delta" not in stated
    assert all(line.get("epsilon") is None for line in lines_of(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize(("target", "rate", "steps"), [(3.0, 0.25, 6), (0.5, 0.1, 5), (8.0, 1.0, 2)])
def test_a_target_is_reached_from_below(accountant, target, rate, steps):
    run = config(privacy={"target_epsilon": target, "accountant": accountant}, sampling={"sample_rate": rate, "steps": steps})
    result = dptrain.train(run, data=blobs())
    assert target * (1 - 0.002) <= result.epsilon <= target


def test_the_calibrated_noise_supports_the_claim_after_paying_for_rounding():
    run = config(privacy={"target_epsilon": 3.0, "accountant": "rdp"})
    claimed = calibrate_noise_multiplier(3.0, 1e-5, 0.2, 4, accountant="rdp")
    assert event_noise_multiplier(noise_multiplier(run, 0.2, 4)) >= claimed
    assert noise_multiplier(config(), 0.2, 4) == 1.0  # what is given is used as it is


def test_a_budget_out_of_reach_is_refused_and_leaves_nothing_behind(tmp_path):
    run = config(privacy={"target_epsilon": 1e-9, "target_delta": 1e-300}, sampling={"sample_rate": 1.0, "steps": 10**6})
    with pytest.raises(AccountingError) as caught:
        dptrain.train(run, data=blobs(), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_useless_delta_and_a_known_seed_are_said_in_the_statement():
    stated = dptrain.train(config(privacy={**RDP, "target_delta": 1 / 60}), data=blobs()).privacy
    assert stated["notes"] == ["delta 0.0166667 is not below 1/N = 0.0167: publishing one example in full would keep the promise."]
    stated = dptrain.train(config(privacy={**RDP, "target_delta": 1 / 61, "unsafe_seed": 3}), data=blobs()).privacy
    assert stated["notes"] == []
    assert stated["private"] is False
    assert stated["unsafe_seed"] is True
    assert "VOID against anyone who knows unsafe_seed" in stated["statement"]
    assert "VOID" not in dptrain.train(config(), data=blobs()).privacy["statement"]


def test_progress_is_told_every_step_and_the_last_epsilon_is_the_final_one():
    seen, started = [], []
    result = dptrain.train(config(), data=blobs(), progress=seen.append, on_start=lambda *args: started.append(args))
    assert [p.step for p in seen] == [1, 2, 3, 4]
    assert seen[-1].epsilon == result.epsilon
    known = [p.epsilon for p in seen if p.epsilon is not None]
    assert known == sorted(known)
    ((setup, stds, first),) = started
    assert (setup.num_steps, setup.sample_rate, first) == (4, 0.2, 0)
    assert stds == {"all": 1.0}


@pytest.mark.parametrize("loss", ["mean_squared_error", "mean_absolute_error"])
def test_float_targets_train(loss):
    rng = np.random.default_rng(0)
    data = from_arrays(rng.standard_normal((40, 3)), rng.standard_normal((40, 2)))
    result = dptrain.train(config(loss=loss), data=data)
    assert result.metrics == {}  # there is no test split
    assert result.epsilon > 0


def test_two_classes_train_on_one_logit():
    result = dptrain.train(
        config(loss="binary_cross_entropy", sampling={"sample_rate": 0.5, "steps": 20}, optimizer={"learning_rate": 0.5}),
        data=blobs(400, classes=2),
    )
    assert result.model[-1].out_features == 1
    assert result.metrics["accuracy"] > 0.8


# ---- bad input: an error before training, from the API and from the command line -------------------------------------

TOKENS = {"model": {"name": "transformer_encoder", "vocabulary": 10, "dim": 4, "depth": 1, "heads": 1}}
IDS = np.arange(12).reshape(6, 2)
INPUTS = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
LABELS = np.arange(6) % 2


def arrays(**changed):
    """A data file of the user's."""
    return {"x_train": INPUTS, "y_train": LABELS, "x_test": None, "y_test": None, "num_classes": 2, **changed}


BAD_DATA = {
    "labels out of range": ({}, arrays(y_train=LABELS + 1), DataError, "y_train"),
    "negative labels": ({}, arrays(y_train=LABELS - 1), DataError, "y_train"),
    "test labels out of range": ({}, arrays(x_test=INPUTS, y_test=LABELS + 5), DataError, "y_test"),
    "NaN in the data": ({}, arrays(x_train=np.where(np.eye(6, 3) > 0, np.nan, INPUTS)), DataError, "x_train"),
    "infinity in the data": ({}, arrays(x_train=np.where(np.eye(6, 3) > 0, np.inf, INPUTS)), DataError, "x_train"),
    "NaN in the test split": ({}, arrays(x_test=INPUTS * np.nan, y_test=LABELS), DataError, "x_test"),
    "NaN in float targets": ({"loss": "mean_squared_error"}, arrays(y_train=INPUTS * np.nan, num_classes=None), DataError, "y_train"),
    "no examples": ({}, arrays(x_train=INPUTS[:0], y_train=LABELS[:0]), DataError, "the training set is empty"),
    "fewer labels than inputs": ({}, arrays(y_train=LABELS[:5]), DataError, "y_train"),
    "batch larger than the data": ({"sampling": {"expected_batch_size": 7, "steps": 1}}, arrays(), ConfigError, "of 6 examples"),
    "float targets with cross_entropy": ({}, arrays(y_train=INPUTS, num_classes=None), DataError, "use mean_squared_error"),
    "labels with a regression loss": ({"loss": "mean_squared_error"}, arrays(), DataError, "use cross_entropy"),
    "three classes for one logit": ({"loss": "binary_cross_entropy"}, arrays(num_classes=3), DataError, "needs 2 classes"),
    "token ids beyond the vocabulary": (TOKENS, arrays(x_train=IDS), DataError, "token ids outside 0..9"),
    "negative token ids": (TOKENS, arrays(x_train=IDS - 3), DataError, "x_train"),
    "token ids beyond it in the test split": (TOKENS, arrays(x_train=IDS % 9, x_test=IDS, y_test=LABELS), DataError, "the test split"),
    "token ids without an embedding": ({}, arrays(x_train=IDS), DataError, "without an embedding"),
    "an embedding without token ids": (
        {"model": {"name": "layers", "layers": [
            {"type": "embedding", "vocabulary": 9, "dim": 2}, {"type": "flatten"}, {"type": "dense", "units": "num_classes"}]}},
        arrays(), DataError, "with an embedding",
    ),
    "a convolution on vectors": ({"model": "cnn"}, arrays(), ConfigError, "conv1_1"),
    "a wrong number of outputs": (
        {"model": {"name": "layers", "layers": [{"type": "dense", "units": 5}]}}, arrays(), ConfigError, "5 units for 2 outputs",
    ),
    "two layers of one name": (
        {"model": {"name": "layers", "layers": [{"type": "dense", "units": 2, "name": "a"}] * 2}}, arrays(), ConfigError, "called 'a'",
    ),
    "nothing to train": (
        {"model": {"name": "layers", "layers": [{"type": "flatten"}]}}, arrays(num_classes=3), UnsupportedModelError, "unfreeze",
    ),
    "a group without layers": (
        {"strategy": {"name": "ghost", "grouping": {"a": ["*"], "b": ["x"]}}}, arrays(), ConfigError, "match no layer",
    ),
    "a device that does not exist": ({"performance": {"device": "abacus"}}, arrays(), RunError, "performance.device 'abacus'"),
    "an unreachable budget": (
        {"privacy": {"target_epsilon": 1e-9, "target_delta": 1e-300}, "sampling": {"sample_rate": 1.0, "steps": 10**6}},
        arrays(), AccountingError, "epsilon",
    ),
    "noise beyond accounting": ({"privacy": {"noise_multiplier": 1e-8}}, arrays(), AccountingError, "noise_multiplier"),
    "a sample rate beyond accounting": ({"sampling": {"sample_rate": 1e-20, "steps": 2}}, arrays(), AccountingError, "sample_rate"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_input_is_one_sentence_before_anything_is_spent(tmp_path, monkeypatch, capsys, case):
    parts, given, error, expected = BAD_DATA[case]
    path = write_npz(tmp_path / "data.npz", **given)
    raw = plain(data={"name": "npz", "path": str(path)}, **parts)
    out = tmp_path / "run"
    with pytest.raises(error) as caught:
        dptrain.train(dptrain.TrainConfig.parse(raw), out=out)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    code, _, err = command(monkeypatch, capsys, "train", tmp_path / "run.yaml", "--out", out, "--quiet")
    assert code == 2
    assert err == f"dptrain: error: {caught.value}\n"
    assert not out.exists()


def command(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, in this process; an exception that it lets out fails the test."""
    monkeypatch.setattr(sys, "argv", ["dptrain", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


BAD_CONFIGS = {
    "unknown key": ({"optimizer": {"lr": 1}}, "optimizer.lr is not a known key"),
    "wrong strategy": ({"strategy": "gost"}, "strategy has no 'gost'"),
    "a cap that the steps pass": (
        {"privacy": {"target_epsilon": 1.0, "noise_multiplier": 1.0}},
        "of 4 steps with this noise 0 fit; lower the steps",
    ),
    "no budget": ({"privacy": {}}, "give target_epsilon or noise_multiplier"),
    "unknown data": ({"data": "mnits"}, "data"),
    "missing file": ({"data": {"name": "npz", "path": "/no/such.npz"}}, "/no/such.npz"),
    "missing source": ({"data": {"name": "callable", "source": "no.such:thing"}}, "no.such"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
@pytest.mark.parametrize("word", ["train", "plan"])
def test_a_bad_config_is_one_sentence_on_the_command_line(tmp_path, monkeypatch, capsys, case, word):
    parts, expected = BAD_CONFIGS[case]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain(**parts)))
    code, _, err = command(monkeypatch, capsys, word, tmp_path / "run.yaml")
    assert code == 2
    assert err.startswith("dptrain: error: ")
    assert expected in err
    assert err.count("\n") == 1


def test_a_missing_data_set_names_every_way_to_get_it(tmp_path, monkeypatch):
    from dptrain import data_sources

    monkeypatch.delenv("DPTRAIN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data_sources, "FASHION_DEBIAN", tmp_path / "none")
    for name in ("fashion_mnist", "cifar10"):
        with pytest.raises(DataError, match="download"):
            dptrain.train(config(data=name))


@pytest.mark.parametrize("parts", [{"data": {"name": "npz", "path": "/no/such.npz"}}, {"sampling": {"sample_rate": 2, "steps": 1}}])
def test_a_real_command_fails_without_a_traceback(tmp_path, parts):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain(**parts)))
    done = subprocess.run([*COMMAND, "train", "run.yaml"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith("dptrain: error: ")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["run.yaml"]


def test_the_directory_of_another_run_is_refused(tmp_path):
    dptrain.train(config(), data=blobs(), out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RunError, match="belongs to another run"):
        dptrain.train(config(seed=1), data=blobs(), out=tmp_path)
    with pytest.raises(RunError, match="num_examples 60, here 90"):
        dptrain.train(config(), data=blobs(90), out=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(RunError, match="There is no backend 'jax'; choose one of torch, tensorflow"):
        dptrain.train(config(), backend="jax", data=blobs())


def test_a_data_set_made_by_hand_is_checked_too():
    data = blobs()
    broken = Dataset("mine", data.x_train * np.float32("nan"), data.y_train, data.x_test, data.y_test, 3, {})
    with pytest.raises(DataError, match="x_train"):
        dptrain.train(config(), data=broken)


# ---- interrupted and resumed ---------------------------------------------------------------------------------------


def stop_after(steps: int):
    """A progress callback that asks this process to stop, as Ctrl-C does."""
    return lambda progress: signal.raise_signal(signal.SIGINT) if progress.step == steps else None


def test_ctrl_c_finishes_the_step_and_the_same_call_resumes(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    run = config(sampling={"sample_rate": 0.2, "steps": 10})
    first = dptrain.train(run, data=blobs(), out=tmp_path, progress=stop_after(4))
    assert (first.complete, first.steps) == (False, 4)
    assert first.privacy["status"] == "interrupted, can be resumed"
    assert first.privacy["releases"] == 4
    started = []
    second = dptrain.train(run, data=blobs(), out=tmp_path, on_start=lambda setup, stds, step: started.append(step))
    assert started == [4]
    assert (second.complete, second.steps) == (True, 10)
    assert second.privacy["releases"] == PrivacyLedger.read(tmp_path / "ledger.jsonl").num_releases == 10
    assert second.epsilon == dptrain.train(run, data=blobs()).epsilon
    assert signal.getsignal(signal.SIGINT) is handler  # and Ctrl-C means again what it meant


def test_a_second_ctrl_c_stops_at_once_and_the_run_can_still_be_resumed(tmp_path):
    def twice(progress):
        if progress.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    run = config(sampling={"sample_rate": 0.2, "steps": 8}, performance={"checkpoint_every": 2})
    with pytest.raises(KeyboardInterrupt):
        dptrain.train(run, data=blobs(), out=tmp_path, progress=twice)
    result = dptrain.train(run, data=blobs(), out=tmp_path)
    assert (result.complete, result.privacy["releases"], result.steps) == (True, 8, 7)


def test_a_finished_run_is_not_run_again(tmp_path):
    first = dptrain.train(config(), data=blobs(), out=tmp_path)
    again = dptrain.train(config(), data=blobs(), out=tmp_path)
    assert (again.complete, again.steps, again.epsilon) == (True, 4, first.epsilon)
    assert PrivacyLedger.read(tmp_path / "ledger.jsonl").num_releases == 4
    for name, value in weights_of(first).items():
        np.testing.assert_array_equal(weights_of(again)[name], value)


OPTIMIZERS = {
    "momentum": {"name": "sgd", "learning_rate": 0.2, "momentum": 0.9, "schedule": "cosine"},
    "adam": {"name": "adam", "learning_rate": 0.05},
}
DROPOUT = {"model": {"name": "mlp", "hidden": [8], "dropout": 0.5}}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_interrupted_and_uninterrupted_runs_agree_bit_for_bit(tmp_path, optimizer):
    """With an unsafe_seed, dropout on, and a step that was lost between checkpoint and ledger."""
    run = config(
        **DROPOUT, privacy={**RDP, "unsafe_seed": 7}, sampling={"sample_rate": 0.3, "steps": 9},
        optimizer=OPTIMIZERS[optimizer], performance={"checkpoint_every": 2},
    )  # fmt: skip
    whole = dptrain.train(run, data=blobs())
    dptrain.train(run, data=blobs(), out=tmp_path, progress=stop_after(3))

    def crash(progress):
        if progress.step == 8:
            raise MemoryError  # steps 7 and 8 are in the ledger, the checkpoint holds 6

    with pytest.raises(MemoryError):
        dptrain.train(run, data=blobs(), out=tmp_path, progress=crash)
    assert Checkpoint.load(tmp_path / "checkpoint.safetensors", {}).step == 6
    assert PrivacyLedger.read(tmp_path / "ledger.jsonl").num_releases == 8
    resumed = dptrain.train(run, data=blobs(), out=tmp_path)
    for name, value in weights_of(whole).items():
        np.testing.assert_array_equal(weights_of(resumed)[name], value)
    assert resumed.privacy["releases"] == whole.privacy["releases"] == 9
    assert resumed.epsilon == whole.epsilon


def test_a_resumed_run_takes_fresh_keys(tmp_path, monkeypatch):
    """The steps between checkpoint and ledger run again, and what they release must not be the same noise."""
    made = []
    real = dptrain.randomness.RandomKey.make
    monkeypatch.setattr(dptrain.randomness.RandomKey, "make", lambda *args: made.append(real(*args)) or made[-1])
    run = config(sampling={"sample_rate": 0.2, "steps": 6})
    dptrain.train(run, data=blobs(), out=tmp_path, progress=stop_after(2))
    dptrain.train(run, data=blobs(), out=tmp_path)
    assert len({key.value for key in made}) == len(made) == 4


def test_releases_that_were_lost_are_not_made_up_for(tmp_path):
    """A killed run that lost steps ends with fewer steps in the weights, and never with more releases than planned."""
    run = config(sampling={"sample_rate": 0.2, "steps": 10}, performance={"checkpoint_every": 4})

    def crash(progress):
        if progress.step == 7:
            raise MemoryError

    with pytest.raises(MemoryError):
        dptrain.train(run, data=blobs(), out=tmp_path, progress=crash)
    result = dptrain.train(run, data=blobs(), out=tmp_path)
    assert result.privacy["releases"] == 10
    assert result.steps == 4 + 3
    assert result.complete


def test_a_target_is_kept_over_a_crash(tmp_path):
    run = config(privacy={"target_epsilon": 2.0, "accountant": "rdp"}, sampling={"sample_rate": 0.2, "steps": 8})

    def crash(progress):
        if progress.step == 5:
            raise MemoryError

    with pytest.raises(MemoryError):
        dptrain.train(run, data=blobs(), out=tmp_path, progress=crash)
    result = dptrain.train(run, data=blobs(), out=tmp_path)
    assert 1.996 <= result.epsilon <= 2.0


def test_a_ledger_that_lost_releases_is_refused(tmp_path):
    run = config(sampling={"sample_rate": 0.2, "steps": 6})
    dptrain.train(run, data=blobs(), out=tmp_path, progress=stop_after(3))
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(RunError, match="holds 2 releases and its checkpoint 3 steps, so releases were lost"):
        dptrain.train(run, data=blobs(), out=tmp_path)
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(LedgerError, match="cannot be opened"):
        dptrain.train(run, data=blobs(), out=tmp_path)


def test_every_release_is_on_disk_before_its_step_is_applied(tmp_path, monkeypatch):
    from dptrain_torch.backend import TorchBackend

    counts, apply = [], TorchBackend.apply

    def spy(self, *args):
        counts.append(PrivacyLedger.read(tmp_path / "ledger.jsonl").num_releases)
        return apply(self, *args)

    monkeypatch.setattr(TorchBackend, "apply", spy)
    dptrain.train(config(), data=blobs(), out=tmp_path)
    assert counts == [1, 2, 3, 4]


# ---- killed --------------------------------------------------------------------------------------------------------

LONG = {"sampling": {"sample_rate": 0.3, "steps": 150}, "performance": {"checkpoint_every": 3}}


@pytest.fixture(scope="module")
def fork():
    """Processes that have loaded everything already, so that a kill meets training rather than imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dptrain.trainer", "dptrain_torch.backend", "torch._dynamo", "autodp.rdp_acct", "autodp.rdp_bank"])
    return context


def check_directory(out: Path, replayed: bool) -> int:
    """Releases on disk; a checkpoint or a metric of a step that is not in the ledger fails the test."""
    # Read before the ledger, which only grows. With an unsafe_seed, a step that is replayed has a second line.
    steps = [line["step"] for line in whole_lines(out / "metrics.jsonl") if "train_loss" in line]
    applied = len(set(steps) if replayed else steps)
    step = Checkpoint.load(out / "checkpoint.safetensors", {}).step if (out / "checkpoint.safetensors").exists() else 0
    # Before there is a run.json an unused ledger may just be being made anew.
    ledger = PrivacyLedger.read(out / "ledger.jsonl").num_releases if (out / "run.json").exists() else 0
    assert applied <= ledger
    assert step <= ledger
    return ledger


def whole_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def killed(fork, run, out: Path, steps: int, delay: float) -> int:
    """Train in another process, kill it some time after some steps, and count the releases on disk."""
    replayed = run.privacy.unsafe_seed is not None
    child = fork.Process(target=dptrain.train, args=(run, "torch"), kwargs={"out": str(out)})
    child.start()
    before, deadline = len(whole_lines(out / "metrics.jsonl")), time.monotonic() + 60
    while len(whole_lines(out / "metrics.jsonl")) < before + steps and child.is_alive() and time.monotonic() < deadline:
        check_directory(out, replayed)
    time.sleep(delay)
    child.kill()
    child.join()
    return check_directory(out, replayed)


def kill_and_resume(fork, run, out: Path, seed: int, kills: int):
    """Kill a run while it starts, and again and again while it trains, then let it finish."""
    rng = random.Random(seed)
    counts = [killed(fork, run, out, 0, rng.uniform(0, 0.3))]
    counts += [killed(fork, run, out, rng.randint(1, 9), rng.uniform(0, 0.004)) for _ in range(kills - 1)]
    assert counts == sorted(counts)
    assert 0 < counts[1] < 150 >= counts[-1]  # on a machine in use the last kill may come after the end
    return dptrain.train(run, out=out)


def check_private(fork, tmp_path, seed, kills):
    run = config(data={"name": "npz", "path": str(write_npz(tmp_path / "d.npz"))}, **LONG)
    result = kill_and_resume(fork, run, tmp_path / "run", seed, kills)
    ledger = PrivacyLedger.read(tmp_path / "run" / "ledger.jsonl")
    assert ledger.num_releases == result.privacy["releases"] == 150  # what was planned, never more
    assert result.steps <= 150
    assert result.steps >= 150 - 3 * kills  # each kill loses less than the steps between two checkpoints
    assert result.complete
    assert result.epsilon == get_accountant("rdp").epsilon(ledger.events, 1e-5)


def check_reproducible(fork, tmp_path, seed, kills, optimizer):
    privacy = {**RDP, "unsafe_seed": 11}
    data = {"name": "npz", "path": str(write_npz(tmp_path / "d.npz"))}
    run = config(data=data, privacy=privacy, optimizer=OPTIMIZERS[optimizer], **DROPOUT, **LONG)
    result = kill_and_resume(fork, run, tmp_path / "run", seed, kills)
    whole = dptrain.train(run)
    for name, value in weights_of(whole).items():
        np.testing.assert_array_equal(weights_of(result)[name], value)
    assert result.privacy["releases"] == result.steps == 150


def test_a_killed_run_never_forgets_a_release(fork, tmp_path):
    check_private(fork, tmp_path, seed=1, kills=5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_killed_run_continues_bit_for_bit(fork, tmp_path, optimizer):
    check_reproducible(fork, tmp_path, seed=2, kills=4, optimizer=optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 30))
def test_many_kills(fork, tmp_path, seed):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    check_private(fork, tmp_path / "a", seed, kills=6)
    check_reproducible(fork, tmp_path / "b", seed, kills=6, optimizer=list(OPTIMIZERS)[seed % 2])


def test_ctrl_c_on_the_command_line_leaves_a_run_that_the_same_command_resumes(tmp_path):
    raw = plain(data={"name": "npz", "path": str(write_npz(tmp_path / "d.npz"))}, sampling={"sample_rate": 0.3, "steps": 4000})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    words = [*COMMAND, "train", "run.yaml", "--out", "run", "--quiet"]
    child = subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(whole_lines(tmp_path / "run" / "metrics.jsonl")) < 3 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == ""
    assert "the same command with --out run resumes it" in out
    releases = check_directory(tmp_path / "run", replayed=False)
    assert 3 <= releases < 4000
    stated = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert (stated["releases"], stated["status"]) == (releases, "interrupted, can be resumed")
    result = dptrain.train(dptrain.TrainConfig.load(tmp_path / "run.yaml"), out=tmp_path / "run", progress=stop_after(releases + 2))
    assert result.steps == result.privacy["releases"] == releases + 2
