"""The experiment runs every case once, survives failures and interruptions, and shows what it found."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dptrain import TrainConfig
from dptrain.errors import RunError
from tests.core.shared import plain

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "experiment.py"
spec = importlib.util.spec_from_file_location("experiment", SCRIPT)
assert spec is not None and spec.loader is not None
experiment = importlib.util.module_from_spec(spec)
sys.modules["experiment"] = experiment  # dataclasses look their module up
spec.loader.exec_module(experiment)

# Stands in for `dptrain train`: leaves a run's files, or fails as told by the settings.
STUB = """
import json, pathlib, sys, time
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--out") + 1])
settings = dict(w.split("=", 1) for k, w in zip(words, words[1:]) if k == "--set")
with open("calls.txt", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
if "seed" in settings and pathlib.Path("fail").exists():
    print("some output")
    print("dptrain: error: The stub was told to fail; use | less.", file=sys.stderr)
    sys.exit(2)
if pathlib.Path("hang").exists():
    pathlib.Path("started").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pathlib.Path("saved").touch()
        sys.exit(130)
epsilon = settings["privacy.target_epsilon"]
private = epsilon != "null" and settings.get("strategy") != "non_private"
value = (0.5 + 0.05 * float(epsilon) if private else 0.95) + 0.01 * int(settings.get("seed", 0))
out.mkdir(parents=True)
metrics = {"test_loss": 1.0, "test_accuracy": value}
if pathlib.Path("binary").exists():
    metrics["test_auroc"] = value + 0.02
lines = [{"step": 1, "seconds": 1.5}, {"step": 2, "seconds": 2.0}, {"step": 2, "final": not pathlib.Path("unfinished").exists(), **metrics}]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
statement = {"epsilon": 0.99 * float(epsilon), "delta": 1e-5} if private else {"epsilon": None}
(out / "privacy.json").write_text(json.dumps(statement | {"statement": "so", "public_constants": {"num_classes": 2}}))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a config and a stub for the command."""
    monkeypatch.chdir(tmp_path)
    Path("stub.py").write_text(STUB)
    Path("tiny.yaml").write_text(yaml.safe_dump(plain(strategy={"name": "mixed_ghost", "max_grad_norm": 0.5})))
    monkeypatch.setattr(experiment, "COMMAND", (sys.executable, "stub.py"))
    return tmp_path


def run(*words: str) -> int:
    return experiment.main([*words, "--out", "exp"])


def calls() -> list[list[str]]:
    return [json.loads(line) for line in Path("calls.txt").read_text().splitlines()] if Path("calls.txt").exists() else []


def rows() -> list[dict]:
    return [json.loads(line) for line in Path("exp/results.jsonl").read_text().splitlines()]


# ---- which cases ---------------------------------------------------------------------------------------------------


def test_cases_are_all_combinations_and_differ_by_hash_or_backend(here):
    cases = experiment.make_cases([Path("tiny.yaml")], ["torch", "tensorflow"], ["mixed_ghost", "ghost"], [1.0, 3.0], 2)
    assert len({case.key for case in cases}) == len({case.name for case in cases}) == len(cases) == 16
    assert len({case.hash for case in cases}) == 8  # the same file, the same hash, in both frameworks
    assert [case.repeat for case in cases] == [0] * 8 + [1] * 8
    for case in cases:
        config = TrainConfig.load("tiny.yaml", case.overrides)
        assert config.hash == case.hash
        assert (config.strategy.name, config.privacy.target_epsilon, config.seed) == (case.strategy, case.epsilon, case.repeat)
        assert config.privacy.noise_multiplier is None and config.strategy.max_grad_norm == 0.5
    assert cases[0].line == "tiny mixed_ghost torch"


def test_overrides_hold_for_all_cases_and_repeats_count_from_the_given_seed(here):
    cases = experiment.make_cases([Path("tiny.yaml")], ["torch"], None, [1.0], 2, ["seed=7", "strategy.max_grad_norm=0.1"])
    configs = [TrainConfig.load("tiny.yaml", case.overrides) for case in cases]
    assert [(c.seed, c.strategy.max_grad_norm) for c in configs] == [(7, 0.1), (8, 0.1)]
    assert [case.hash for case in cases] == [c.hash for c in configs]


def test_a_strategy_without_privacy_runs_once_for_all_budgets(here):
    cases = experiment.make_cases([Path("tiny.yaml")], ["torch"], ["non_private", "ghost"], [1.0, 3.0], 1)
    assert [(case.strategy, case.epsilon) for case in cases] == [("non_private", None), ("ghost", 1.0), ("ghost", 3.0)]
    assert TrainConfig.load("tiny.yaml", cases[0].overrides).privacy.target_epsilon is None
    other = experiment.make_cases([Path("tiny.yaml")], ["torch"], ["non_private"], [8.0], 1)
    assert other[0].hash == cases[0].hash


def test_a_line_is_named_by_its_file_where_that_names_the_strategy(here):
    Path("tiny_mixed_ghost.yaml").write_text(Path("tiny.yaml").read_text())
    paths = [Path("tiny.yaml"), Path("tiny_mixed_ghost.yaml")]
    cases = experiment.make_cases(paths, ["torch"], None, [1.0], 1)
    assert [case.line for case in cases] == ["tiny mixed_ghost torch", "tiny_mixed_ghost torch"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.yaml"], "no config file"),
        (["tiny.yaml", "./tiny.yaml"], "called 'tiny'"),
        (["tiny.yaml", "--set", "nonsense"], "form section.key=value"),
    ],
)
def test_a_users_error_is_one_sentence_before_anything_runs(here, capsys, words, said):
    assert run(*words) == 2
    assert said in capsys.readouterr().err and not calls()


@pytest.mark.parametrize(
    "words", [["--epsilons", "0"], ["--epsilons", "nan"], ["--epsilons", "inf"], ["--repeats", "0"], ["--repeats", "x"]]
)
def test_bad_numbers_are_refused(here, words):
    with pytest.raises(SystemExit) as caught:
        run("tiny.yaml", *words)
    assert caught.value.code == 2


# ---- running -------------------------------------------------------------------------------------------------------


def test_a_finished_case_is_not_run_again_and_a_changed_config_is(here, capsys):
    assert run("tiny.yaml", "--epsilons", "1", "3") == 0
    assert [row["status"] for row in rows()] == ["done", "done"] and len(calls()) == 2
    table = Path("exp/table.md").read_text()
    assert run("tiny.yaml", "--epsilons", "1", "3") == 0
    assert len(calls()) == 2 and Path("exp/table.md").read_text() == table
    assert capsys.readouterr().out.count("done before") == 2
    run("tiny.yaml", "--epsilons", "1", "3", "8")
    assert len(calls()) == 3
    run("tiny.yaml", "--epsilons", "1", "--set", "strategy.max_grad_norm=0.1")
    assert len(calls()) == 4


def test_failures_are_rows_with_their_reason_and_are_tried_again(here):
    Path("fail").touch()
    assert run("tiny.yaml", "--epsilons", "1", "--repeats", "2", "--strategies", "mixed_ghost", "bogus") == 1
    assert [row["status"] for row in rows()] == ["done", "failed", "failed", "failed"]
    table = Path("exp/table.md").read_text()
    assert "failed: The stub was told to fail; use \\| less. (exit code 2)" in table
    assert "bogus" in table and "choose one of" in table and "0.5500" in table
    assert len(calls()) == 2  # a strategy that does not exist is never started
    Path("fail").unlink()
    assert run("tiny.yaml", "--epsilons", "1", "--repeats", "2") == 0
    assert len(calls()) == 3 and "failed" not in Path("exp/table.md").read_text()


def test_a_run_that_did_not_finish_is_no_result(here):
    Path("unfinished").touch()
    assert run("tiny.yaml", "--epsilons", "1") == 1
    assert "interrupted" in rows()[0]["reason"]
    with pytest.raises(RunError, match="no readable"):
        experiment.outcome(here)


def test_a_line_cut_off_by_a_crash_costs_that_case_only(here):
    run("tiny.yaml", "--epsilons", "1", "3")
    file = Path("exp/results.jsonl")
    first, second = file.read_text().splitlines()
    file.write_text(first + "\n" + second[:40])
    for directory in Path("exp").glob("*eps3*"):
        directory.rename("moved")
    assert run("tiny.yaml", "--epsilons", "1", "3") == 0
    assert len(calls()) == 3
    assert set(experiment.read_results(file)) == {(json.loads(line)["config_hash"], "torch") for line in (first, second)}


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_lets_the_run_save_and_is_continued(here, number):
    Path("hang").touch()
    wrapper = here / "wrapper.py"
    wrapper.write_text(
        "import importlib.util, signal, sys\n"
        f"spec = importlib.util.spec_from_file_location('experiment', {str(SCRIPT)!r})\n"
        "experiment = sys.modules['experiment'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(experiment)\n"
        "experiment.COMMAND = (sys.executable, 'stub.py')\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, signal.default_int_handler)\n"
        "sys.exit(experiment.main())\n"
    )
    command = [sys.executable, str(wrapper), "tiny.yaml", "--epsilons", "1", "--out", "exp"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not Path("started").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command continues" in errors
    assert Path("saved").exists() and not Path("exp/results.jsonl").exists()
    Path("hang").unlink()
    assert run("tiny.yaml", "--epsilons", "1") == 0


# ---- showing -------------------------------------------------------------------------------------------------------


def test_the_table_shows_mean_and_range_per_line_and_budget(here):
    run("tiny.yaml", "--epsilons", "3", "1", "--repeats", "3", "--backends", "torch", "tensorflow")
    lines = Path("exp/table.md").read_text().splitlines()
    assert lines[0].startswith("| config, strategy and backend | target epsilon | epsilon | accuracy |")
    assert lines[2] == "| tiny mixed_ghost torch | 3 | 2.97 | 0.6600 | 0.6500 to 0.6700 | 3 | 3.5 |"
    assert [line.split("|")[1].split()[-1] for line in lines[2:6]] == ["torch", "torch", "tensorflow", "tensorflow"]
    assert "delta 1e-05" in lines[-1] and "not private" in lines[-1]


def test_two_class_data_are_judged_by_the_auroc_where_every_run_has_it(here):
    run("tiny.yaml", "--epsilons", "1")
    Path("binary").touch()
    run("tiny.yaml", "--epsilons", "1", "3")
    assert "| accuracy |" in Path("exp/table.md").read_text()
    run("tiny.yaml", "--epsilons", "3")
    assert "| auroc |" in Path("exp/table.md").read_text() and "0.6700" in Path("exp/table.md").read_text()


def test_a_run_whose_metric_is_not_a_number_is_said_to_have_none(here):
    run("tiny.yaml", "--epsilons", "1", "3")
    text = Path("exp/results.jsonl").read_text().replace('"accuracy": 0.55', '"accuracy": null')
    Path("exp/results.jsonl").write_text(text)
    assert run("tiny.yaml", "--epsilons", "1", "3") == 0
    assert "the run has no accuracy" in Path("exp/table.md").read_text()


def test_the_plot_is_written_as_png_and_svg_and_is_reproducible(here):
    pytest.importorskip("matplotlib")
    run("tiny.yaml", "--epsilons", "1", "3", "8", "--repeats", "2", "--strategies", "mixed_ghost", "non_private")
    assert Path("exp/plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    svg = Path("exp/plot.svg").read_bytes()
    assert b"<svg" in svg
    run("tiny.yaml", "--epsilons", "1", "3", "8", "--repeats", "2", "--strategies", "mixed_ghost", "non_private")
    assert Path("exp/plot.svg").read_bytes() == svg


def test_without_matplotlib_the_table_is_there_and_the_remedy_is_named(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("tiny.yaml", "--epsilons", "1") == 2
    assert "pip install 'dptrain[plot]'" in capsys.readouterr().err
    assert "0.5500" in Path("exp/table.md").read_text()


# ---- for real ------------------------------------------------------------------------------------------------------


def test_a_real_run_gives_the_numbers_of_its_own_files(here, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(experiment, "COMMAND", (sys.executable, "-m", "dptrain.cli", "train"))
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run("tiny.yaml", "--epsilons", "3", "--set", "sampling.steps=2") == 0, next(iter(Path("exp/logs").iterdir())).read_text()
    (row,) = rows()
    (directory,) = (p.parent for p in Path("exp").glob("*/privacy.json"))
    stated = json.loads((directory / "privacy.json").read_text())
    assert row["config_hash"] == stated["config_hash"] and row["epsilon"] == stated["epsilon"] <= 3
    final = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["metrics"]["accuracy"] == final["test_accuracy"] and row["steps"] == 2
    assert f"{final['test_accuracy']:.4f}" in Path("exp/table.md").read_text()


@pytest.mark.parametrize("path", sorted(SCRIPT.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_config_that_takes_any_budget(path):
    (case,) = experiment.make_cases([path], ["torch"], None, [8.0], 1)
    assert case.problem is None
    assert case.strategy in path.stem or path.stem in ("mnist", "fashion_mnist")
