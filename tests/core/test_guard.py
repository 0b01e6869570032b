"""No step passes the target, and runs on the same data spend one budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dptrain
from accounting import AccountingError, LedgerError, PrivacyLedger, SampledGaussian, get_accountant
from dptrain import ConfigError, RunError
from dptrain.budget import Budget, BudgetError, Schedule
from dptrain.config import Privacy
from dptrain.guard import MOST, Guard, Records, data_facts, fitting, open_shared
from dptrain.mechanism import event_noise_multiplier
from dptrain.spending import spending
from tests.core.shared import EXAMPLES, blobs, config
from tests.core.test_trainer import command, stop_after, weights_of

A, B = SampledGaussian(1.0, 0.1), SampledGaussian(0.8, 0.3)
FACTS = {"relation": "add_remove", "num_examples": 60, "data": "blobs"}


def epsilon(events, delta=1e-5, accountant="rdp"):
    return get_accountant(accountant).epsilon(events, delta)


def capped(target, **more):
    return Privacy(target_epsilon=target, noise_multiplier=1.0, accountant="rdp", **more)


# ---- the guard -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize("history", [(), ((B, 3),)])
def test_what_fits_is_the_largest_number_that_fits(accountant, history):
    ledger = PrivacyLedger()
    for event, count in history:
        ledger.record(event, count)
    privacy = Privacy(target_epsilon=12.0, accountant=accountant)
    n = fitting(privacy, ledger, A, MOST)
    assert n > 10
    assert epsilon([*history, (A, n)], accountant=accountant) <= 12.0 < epsilon([*history, (A, n + 1)], accountant=accountant)
    assert fitting(privacy, ledger, A, n - 1) == n - 1
    assert fitting(privacy, ledger, A, 0) == 0
    assert fitting(Privacy(target_epsilon=1e-3, accountant=accountant), ledger, A, 100) == 0
    assert fitting(Privacy(noise_multiplier=1.0), ledger, A, 100) == 100


@given(
    target=st.floats(1.5, 6),
    planned=st.integers(0, 60),
    others=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([A, B]), st.integers(1, 5)), max_size=4),
)
@EXAMPLES
def test_whoever_else_records_the_target_is_kept(target, planned, others):
    """Others may pass it themselves; then the guard grants nothing more."""
    ledger, foreign = PrivacyLedger(), {at: (event, n) for at, event, n in others}
    guard = Guard(Privacy(target_epsilon=target, accountant="rdp"), ledger, A, planned)
    for t in range(planned):
        if t in foreign:
            ledger.record(*foreign[t])
        if not guard.ask():
            assert t == planned or epsilon([*ledger.events, (A, 1)]) > target
            break
        ledger.record(A)
        assert epsilon(ledger.events) <= target


def test_a_guard_is_cheap(monkeypatch):
    guard = Guard(Privacy(target_epsilon=50.0, accountant="rdp"), PrivacyLedger(), A, 1000)
    monkeypatch.setattr("dptrain.guard.get_accountant", lambda *_: pytest.fail("an accountant ran"))
    for _ in range(1000):
        assert guard.ask()
        guard.ledger.record(A)
    assert not guard.ask()


def test_a_budget_with_noise_and_target_ends_where_the_target_is():
    budget = Budget(capped(3.0), Schedule.make(1000, 100))

    def spend_all():
        while True:
            assert budget.begin()
            budget.ledger.record(budget.event)

    with pytest.raises(BudgetError, match="One more release would spend"):
        spend_all()
    steps = budget.ledger.num_releases
    assert epsilon([(budget.event, steps)]) <= 3.0 < epsilon([(budget.event, steps + 1)])
    with pytest.raises(AccountingError, match=f"of {steps + 1} steps with this noise {steps} fit; lower the steps"):
        Budget(capped(3.0), Schedule.make(1000, 100, steps=steps + 1))
    assert Budget(capped(3.0), Schedule.make(1000, 100, steps=steps)).noise_multiplier == 1.0


def test_an_engine_on_the_ledger_of_other_data_is_refused(tmp_path):
    PrivacyLedger(tmp_path / "l", facts=FACTS).close()
    with pytest.raises(LedgerError, match="num_examples 60, here 61"):
        Budget(capped(3.0), Schedule.make(61, 6), tmp_path / "l")
    with pytest.raises(LedgerError, match="relation 'add_remove', here 'replace_one'"):
        Budget(capped(3.0, relation="replace_one"), Schedule.make(60, 6), tmp_path / "l")
    with pytest.raises(LedgerError, match="relation 'add_remove', here 'zero_out'"):  # what shuffled passes are accounted for
        Budget(capped(3.0), Schedule.make(60, 6, sampling="shuffle"), tmp_path / "l")
    Budget(capped(3.0), Schedule.make(60, 6), tmp_path / "l").ledger.close()


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(tmp_path, steps=6, seed=0, **privacy):
    plain = {"noise_multiplier": 1.0, "accountant": "rdp", "ledger": str(tmp_path / "data.jsonl"), **privacy}
    return config(privacy={k: v for k, v in plain.items() if v is not None}, sampling={"sample_rate": 0.2, "steps": steps}, seed=seed)


def shared(tmp_path):
    return PrivacyLedger.read(tmp_path / "data.jsonl")


def test_a_cap_refuses_a_run_that_would_pass_it_and_leaves_nothing(tmp_path):
    event = SampledGaussian(event_noise_multiplier(1.0), 0.2)
    target = epsilon([(event, 5)]) * 1.000001
    with pytest.raises(AccountingError, match="of 6 steps with this noise 5 fit"):
        dptrain.train(run(tmp_path, ledger=None, target_epsilon=target), data=blobs(), out=tmp_path / "run")
    assert os.listdir(tmp_path) == []
    result = dptrain.train(run(tmp_path, steps=5, ledger=None, target_epsilon=target), data=blobs(), out=tmp_path / "run")
    assert (result.steps, result.privacy["releases"]) == (5, 5) and result.epsilon <= target


def test_two_runs_share_a_budget(tmp_path):
    first = dptrain.train(run(tmp_path, noise_multiplier=None, target_epsilon=2.0), data=blobs(), out=tmp_path / "a")
    second = dptrain.train(run(tmp_path, noise_multiplier=None, target_epsilon=2.5, seed=1), data=blobs(), out=tmp_path / "b")
    for result, name in ((first, "a"), (second, "b")):
        assert result.privacy["releases"] == PrivacyLedger.read(tmp_path / name / "ledger.jsonl").num_releases == 6
    events = [*PrivacyLedger.read(tmp_path / "a/ledger.jsonl").events, *PrivacyLedger.read(tmp_path / "b/ledger.jsonl").events]
    total = second.privacy["data_set"]
    assert total["epsilon"] == epsilon(events) == epsilon(shared(tmp_path).events)
    assert 2.49 < total["epsilon"] <= 2.5
    assert (total["releases"], total["runs"], total["facts"]) == (12, 2, FACTS)
    assert second.epsilon < total["epsilon"]
    assert f"All 12 releases of 2 runs on this data: epsilon = {total['epsilon']:.6g}" in second.privacy["statement"]
    assert json.loads((tmp_path / "b/privacy.json").read_text())["data_set"] == total
    with pytest.raises(AccountingError, match="history alone"):
        dptrain.train(run(tmp_path, noise_multiplier=None, target_epsilon=2.0, seed=2), data=blobs(), out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_without_a_shared_ledger_the_statement_speaks_of_the_run_alone(tmp_path):
    assert "data_set" not in dptrain.train(run(tmp_path, ledger=None), data=blobs()).privacy


def test_a_run_that_writes_nothing_else_is_recorded_too(tmp_path):
    for seed in (0, 0):
        dptrain.train(run(tmp_path, seed=seed), data=blobs())
    assert shared(tmp_path).num_releases == 12 and len(shared(tmp_path).run_names) == 2


def test_facts_that_differ_and_training_without_privacy_are_refused(tmp_path):
    dptrain.train(run(tmp_path), data=blobs())
    before = (tmp_path / "data.jsonl").read_bytes()
    with pytest.raises(LedgerError, match="num_examples 60, here 90"):
        dptrain.train(run(tmp_path), data=blobs(90))
    with pytest.raises(LedgerError, match="relation 'add_remove', here 'replace_one'"):
        dptrain.train(run(tmp_path, relation="replace_one"), data=blobs())
    with pytest.raises(ConfigError, match="spends without bound"):
        dptrain.train(run(tmp_path).replace(strategy="non_private"), data=blobs())
    dptrain.train(run(tmp_path, ledger=None), data=blobs(), out=tmp_path / "own")
    with pytest.raises(LedgerError, match="was made for something else"):
        dptrain.train(run(tmp_path, ledger=str(tmp_path / "own/ledger.jsonl")), data=blobs())
    with pytest.raises(LedgerError, match="path must be a file name"):
        dptrain.train(run(tmp_path, ledger=""), data=blobs())
    with pytest.raises(LedgerError, match="cannot be"):
        dptrain.train(run(tmp_path, ledger=str(tmp_path)), data=blobs())
    assert (tmp_path / "data.jsonl").read_bytes() == before


def test_a_second_process_waits_for_nobody_and_spends_nothing(tmp_path, monkeypatch, capsys):
    held = PrivacyLedger(tmp_path / "data.jsonl", facts={**FACTS, "num_examples": 1437, "data": "digits"})
    (tmp_path / "run.yaml").write_text(run(tmp_path).to_yaml())
    code, _, err = command(monkeypatch, capsys, "train", tmp_path / "run.yaml", "--out", tmp_path / "run", "--quiet")
    assert code == 2 and err.count("\n") == 1 and "another process" in err
    assert not (tmp_path / "run").exists() and held.num_releases == 0
    held.close()
    assert command(monkeypatch, capsys, "train", tmp_path / "run.yaml", "--out", tmp_path / "run", "--quiet")[0] == 0
    assert shared(tmp_path).num_releases == 6


def test_interrupted_and_resumed_counts_once(tmp_path):
    first = dptrain.train(run(tmp_path, steps=10), data=blobs(), out=tmp_path / "a", progress=stop_after(4))
    assert not first.complete
    dptrain.train(run(tmp_path, seed=1), data=blobs(), out=tmp_path / "b")
    second = dptrain.train(run(tmp_path, steps=10), data=blobs(), out=tmp_path / "a")
    assert (second.complete, second.steps, second.privacy["releases"]) == (True, 10, 10)
    assert sorted(sum(n for _, n in shared(tmp_path).events_of(name)) for name in shared(tmp_path).run_names) == [6, 10]


def test_a_resumed_run_without_its_shared_ledger_is_refused(tmp_path):
    dptrain.train(run(tmp_path), data=blobs(), out=tmp_path / "a", progress=stop_after(2))
    copy = (tmp_path / "data.jsonl").read_bytes()
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(LedgerError, match="cannot be opened"):
        dptrain.train(run(tmp_path), data=blobs(), out=tmp_path / "a")
    PrivacyLedger(tmp_path / "data.jsonl", facts=FACTS).close()
    with pytest.raises(RunError, match="holds 0 releases of this run, and the run's own 2"):
        dptrain.train(run(tmp_path), data=blobs(), out=tmp_path / "a")
    (tmp_path / "data.jsonl").write_bytes(copy)
    with pytest.raises(RunError, match="belongs to another run"):  # the ledger cannot be left out either
        dptrain.train(run(tmp_path, ledger=None), data=blobs(), out=tmp_path / "a")
    assert dptrain.train(run(tmp_path), data=blobs(), out=tmp_path / "a").complete


def between_the_two(monkeypatch, at):
    """Die after the shared ledger has a release and before the run's own has it."""
    real = Records.record
    seen = []

    def record(self, event, count=1):
        seen.append(event)
        if len(seen) == at:
            self.shared.record(event, count)
            raise MemoryError
        real(self, event, count)

    monkeypatch.setattr(Records, "record", record)


@pytest.mark.parametrize("seed", [None, 5])
def test_a_kill_between_the_two_records_neither_overspends_nor_counts_twice(tmp_path, monkeypatch, seed):
    """With noise calibrated to the very limit; with an unsafe_seed the result is that of an uninterrupted run, bit for bit."""
    cfg = run(tmp_path, steps=8, noise_multiplier=None, target_epsilon=2.0, unsafe_seed=seed)
    cfg = cfg.replace(performance={"checkpoint_every": 2})
    with monkeypatch.context() as patch:
        between_the_two(patch, 6)
        with pytest.raises(MemoryError):
            dptrain.train(cfg, data=blobs(), out=tmp_path / "a")
    assert (shared(tmp_path).num_releases, PrivacyLedger.read(tmp_path / "a/ledger.jsonl").num_releases) == (6, 5)
    result = dptrain.train(cfg, data=blobs(), out=tmp_path / "a")
    assert shared(tmp_path).num_releases == PrivacyLedger.read(tmp_path / "a/ledger.jsonl").num_releases == 8
    assert result.complete and result.privacy["data_set"]["epsilon"] <= 2.0
    assert result.steps == (6 if seed is None else 8)
    if seed is not None:
        whole = dptrain.train(cfg.replace(privacy={**cfg.privacy.model_dump(mode="json"), "ledger": None}), data=blobs())
        for name, value in weights_of(whole).items():
            np.testing.assert_array_equal(weights_of(result)[name], value)


def test_a_run_whose_budget_others_have_spent_meanwhile_ends_early(tmp_path):
    cfg = run(tmp_path, steps=10, noise_multiplier=None, target_epsilon=2.0)
    dptrain.train(cfg, data=blobs(), out=tmp_path / "a", progress=stop_after(4))
    with PrivacyLedger.open(tmp_path / "data.jsonl", facts=FACTS) as ledger:
        ledger.record(ledger.events[0][0], 3)
    result = dptrain.train(cfg, data=blobs(), out=tmp_path / "a")
    assert (result.complete, result.steps, result.privacy["releases"]) == (True, 7, 7)
    assert result.privacy["data_set"]["epsilon"] <= 2.0 and shared(tmp_path).num_releases == 10
    again = dptrain.train(cfg, data=blobs(), out=tmp_path / "a")
    assert (again.steps, shared(tmp_path).num_releases) == (7, 10)


def test_the_loop_itself_asks_before_every_step(tmp_path):
    """Whatever puts releases into the ledger while training runs: the next step that would pass the target does not start."""
    cfg, kept = run(tmp_path, steps=10, ledger=None, noise_multiplier=None, target_epsilon=2.0), []

    def meddle(progress):
        if progress.step == 4:
            ledger = next(r for r in kept)
            ledger.record(ledger.events[0][0], 3)

    real = dptrain.trainer.Records

    class Spied(real):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self.own)

    dptrain.trainer.Records = Spied
    try:
        result = dptrain.train(cfg, data=blobs(), out=tmp_path / "a", progress=meddle)
    finally:
        dptrain.trainer.Records = real
    assert (result.complete, result.steps, result.privacy["releases"]) == (True, 7, 10)
    assert result.epsilon <= 2.0


def test_the_config_names_the_ledger_and_keeps_its_hash_without_one(tmp_path):
    assert "ledger" not in config().to_dict()["privacy"]
    assert run(tmp_path).to_dict()["privacy"]["ledger"] == str(tmp_path / "data.jsonl")
    assert run(tmp_path).hash != run(tmp_path, ledger=None).hash


def test_records_of_one_ledger_alone(tmp_path):
    own = PrivacyLedger()
    records = Records(own)
    records.record(A, 2)
    assert (records.budget, own.num_releases, records.total(capped(1.0))) == (own, 2, None)
    assert open_shared(None, FACTS, True) is None
    assert data_facts(capped(1.0), 60, "blobs") == FACTS


# ---- the command line ------------------------------------------------------------------------------------------------


def test_ledger_show_and_new(tmp_path, monkeypatch, capsys):
    path = tmp_path / "data.jsonl"
    new = ("ledger", "new", path, "--data", "digits", "--num-examples", 1437)
    assert command(monkeypatch, capsys, *new)[0] == 0
    code, _, err = command(monkeypatch, capsys, *new)
    assert code == 2 and "already exists" in err
    with PrivacyLedger.open(path, run="one") as ledger:
        ledger.record(A, 20)
        ledger.run = "two"
        ledger.record(B)
    code, out, err = command(monkeypatch, capsys, "ledger", "show", path)
    value = epsilon([(A, 20), (B, 1)])
    assert (code, err) == (0, "")
    assert "21 releases of 2 runs on 1437 examples of digits, neighbouring relation add_remove" in out
    assert f"epsilon = {value:.6g} at delta = 1e-05 (accountant rdp)" in out
    more = ("--target-epsilon", 9, "--noise-multiplier", 1, "--sample-rate", 0.1, "--json")
    found = json.loads(command(monkeypatch, capsys, "ledger", "show", path, *more)[1])
    assert found["epsilon"]["rdp"] == value and found["left"]["rdp"] == 9 - value and found["epsilon"]["prv"] < value
    n = found["steps_left"]["rdp"]
    assert epsilon([(A, 20 + n), (B, 1)]) <= 9 < epsilon([(A, 21 + n), (B, 1)])
    assert found["runs"] == [{"run": "one", "releases": 20}, {"run": "two", "releases": 1}]
    assert "ABOVE the target 1" in command(monkeypatch, capsys, "ledger", "show", path, "--target-epsilon", 1)[1]
    for wrong in (("--relation", "replace_one"), ("--relation", "x"), ("--delta", 0), ("--sample-rate", 0.1), ("--target-epsilon", -1)):
        code, _, err = command(monkeypatch, capsys, "ledger", "show", path, *wrong)
        assert code == 2 and err.count("\n") == 1, wrong
    code, _, err = command(monkeypatch, capsys, "ledger", "show", tmp_path / "none")
    assert code == 2 and "cannot be read" in err


def test_the_ledger_of_a_run_is_shown_by_its_directory(tmp_path):
    dptrain.train(run(tmp_path, ledger=None, relation="replace_one"), data=blobs(), out=tmp_path / "a")
    found = spending(tmp_path / "a")
    assert (found.ledger.num_releases, found.relation.value, found.values()["facts"]["data"]) == (6, "replace_one", "blobs")
    PrivacyLedger(tmp_path / "plain").close()
    assert "add_remove (not stated by the ledger)" in str(spending(tmp_path / "plain"))


def test_train_takes_the_ledger_from_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(run(tmp_path, ledger=None).to_yaml())
    path = tmp_path / "it's: a {ledger}.jsonl"
    words = ("train", tmp_path / "run.yaml", "--out", tmp_path / "run", "--quiet", "--ledger", path)
    assert command(monkeypatch, capsys, *words)[0] == 0
    assert PrivacyLedger.read(path).num_releases == 6
    assert dptrain.TrainConfig.load(tmp_path / "run/config.yaml").privacy.ledger == str(path)


def test_two_processes_at_once_spend_one_budget(tmp_path):
    """Started together on a budget that covers one of them: whatever the order, the total stays within the target."""
    (tmp_path / "run.yaml").write_text(run(tmp_path, steps=40, noise_multiplier=None, target_epsilon=1.0).to_yaml())
    words = [sys.executable, "-m", "dptrain.cli", "train", "run.yaml", "--quiet", "--out"]
    children = [subprocess.Popen([*words, name], cwd=tmp_path, stderr=subprocess.PIPE, text=True) for name in ("a", "b")]
    errors = [child.communicate(timeout=120)[1] for child in children]
    codes = [child.returncode for child in children]
    assert 0 in codes and set(codes) <= {0, 2}, errors
    assert shared(tmp_path).num_releases == 40 * codes.count(0)
    assert epsilon(shared(tmp_path).events) <= 1.0
    assert all("Traceback" not in error for error in errors)


def test_names_that_are_too_long_are_one_sentence(tmp_path, monkeypatch, capsys):
    long = "x" * 300
    (tmp_path / "run.yaml").write_text(run(tmp_path, ledger=None).to_yaml())
    monkeypatch.chdir(tmp_path)
    for words in (
        ("train", "run.yaml", "--ledger", long), ("train", "run.yaml", "--out", long), ("train", "run.yaml", "--backend", long),
        ("ledger", "show", long), ("ledger", "new", long, "--data", "x", "--num-examples", 1), ("certify", long), ("train", long + ".yaml"),
    ):  # fmt: skip
        code, _, err = command(monkeypatch, capsys, *words)
        assert code == 2 and err.startswith("dptrain: error: ") and err.count("\n") == 1, words
    with pytest.raises(LedgerError, match="File name too long"):
        Budget(capped(3.0), Schedule.make(60, 6), tmp_path / long)
