"""A report states what the ledger gives, says loudly what is void, and refuses a directory that contradicts itself."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import dptrain
from accounting import LedgerError, PrivacyLedger, SampledGaussian, get_accountant
from accounting.prv import PRVAccountant
from accounting.tradeoff import trade_off
from dptrain import RunError
from dptrain.checkpoint import write_json
from dptrain.cli import main
from dptrain.report import COMPLETE, INTERRUPTED, UNFINISHED, privacy_statement
from dptrain.reporting import examine
from dptrain.reporting.facts import spread
from dptrain.reporting.files import prefix, read_run
from dptrain.reporting.markdown import text
from dptrain.reporting.schema import Statement, json_schema
from dptrain.reporting.wording import down, up
from tests.core.report_runs import edit, make_run
from tests.core.shared import EXAMPLES, blobs, config

OUTPUTS = ("privacy.json", "MODEL_CARD.md", "report.html")


def read(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in OUTPUTS]


def plain_text(html: str) -> str:
    """What a person reads of a page, on one line."""
    parts: list[str] = []

    class Reader(HTMLParser):
        skipped = False

        def handle_starttag(self, tag, attrs):
            self.skipped = tag == "style"

        def handle_data(self, data):
            if not self.skipped:
                parts.append(data)

    Reader().feed(html)
    return " ".join(" ".join(parts).split())


@pytest.fixture
def run(monkeypatch, capsys):
    """Exit code, stdout and stderr of the command line."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["dptrain", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


# ---- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixed_ghost", "non_private"])
def test_the_report_of_a_real_run_repeats_the_trainers_statement_byte_for_byte(tmp_path, name):
    dptrain.train(config(strategy=name, performance={"evaluate_every": 2}), data=blobs(), out=tmp_path)
    before = (tmp_path / "privacy.json").read_bytes()
    (written,) = dptrain.report(tmp_path)
    assert [file.name for file in written.files] == list(OUTPUTS) and all(file.exists() for file in written.files)
    assert (tmp_path / "privacy.json").read_bytes() == before
    again = dptrain.train(config(strategy=name, performance={"evaluate_every": 2}), data=blobs(), out=tmp_path)  # the directory stays a run
    assert again.privacy == written.privacy


def test_a_real_run_that_left_no_statement_keeps_its_plan(tmp_path):
    def stop(progress):
        if progress.step == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        dptrain.train(config(strategy={"name": "per_sample", "grouping": "per_layer"}), data=blobs(), out=tmp_path, progress=stop)
    (found,) = examine([tmp_path])
    assert (found.files.status, found.statement["releases"]) == (UNFINISHED, 3)
    assert [(layer["name"], layer["method"], layer["group"]) for layer in found.statement["layers"]] == [
        ("fc1", "instantiate", "fc1"),
        ("head", "instantiate", "head"),
    ]
    assert [g["norm_bound"] for g in found.statement["groups"]] == pytest.approx([0.5**0.5] * 2)


@pytest.mark.parametrize(("accountant", "relation"), [("prv", "add_remove"), ("rdp", "replace_one"), ("prv", "zero_out")])
def test_every_figure_is_computed_from_the_ledger(tmp_path, accountant, relation):
    privacy = {"noise_multiplier": 1.3, "accountant": accountant, "relation": relation, "target_delta": 1e-4}
    make_run(tmp_path / "run", complete=True, privacy=privacy, sampling={"sample_rate": 0.2, "steps": 60})
    (found,) = examine([tmp_path / "run"])
    events = PrivacyLedger.read(tmp_path / "run" / "ledger.jsonl").events
    by = {name: get_accountant(name, relation) for name in ("rdp", "prv")}
    said = found.statement
    assert said["epsilon_by_accountant"] == {name: judge.epsilon(events, 1e-4) for name, judge in by.items()}
    assert said["epsilon"] == said["epsilon_by_accountant"][accountant]
    detail = PRVAccountant(relation).detail(events, 1e-4)
    assert 0 < said["epsilon_certified_lower"] == detail.lower <= said["epsilon_by_accountant"]["prv"]
    assert [s.releases for s in found.budget] == spread(60) and len(found.budget) == 50
    assert (found.budget[-1].prv, found.budget[-1].rdp) == (said["epsilon_by_accountant"]["prv"], said["epsilon_by_accountant"]["rdp"])
    middle = found.budget[20]
    assert middle.rdp == by["rdp"].epsilon([(events[0][0], middle.releases)], 1e-4)
    assert found.risks == trade_off(events, relation, "prv")
    assert [(q.step, q.epsilon) for q in found.quality[:2]] == [
        (step, by[accountant].epsilon([(events[0][0], step)], 1e-4)) for step in (2, 4)
    ]
    assert (found.quality[-1].epsilon, found.last("accuracy")) == (said["epsilon"], 1 - 0.5 / 60)


def test_all_three_outputs_say_the_same(tmp_path):
    dptrain.report(make_run(tmp_path / "run", complete=True, privacy={"noise_multiplier": 1.0, "target_delta": 1e-3}))
    statement, card, page = read(tmp_path / "run")
    said, shown = json.loads(statement), plain_text(page)
    card = card.replace("\\", "")
    risks = trade_off(PrivacyLedger.read(tmp_path / "run" / "ledger.jsonl").events)
    for expected in (
        f"epsilon = {said['epsilon']:.6g} at delta = 0.001", f"{said['epsilon_by_accountant']['rdp']:.6g}",
        f"certified to be at least {down(said['epsilon_certified_lower'])}", "one training example",
        "Two data sets are neighbours if one is the other with one example added or removed.", "Poisson", "probability 0.2",
        "mixed_ghost, clipping abadi", "complete; 4 of 4 planned releases", f"at most {up(risks.advantage)}",
        f"{up(risks.true_positive_rate(1e-3))} at a false-positive rate of 0.001", "choice of hyper-parameters", "side channels",
        "torch 2.0", f"numpy {said['versions']['numpy']}", "noise_multiplier: 1.0", "60 examples", "not private",
    ):  # fmt: skip
        assert expected in card, expected
        assert expected in shown, expected
    assert "Warning" not in shown and "WARNING" not in card and "VOID" not in card
    cells = re.search(r"<tr><th scope=\"row\">fc</th>(.*)</tr>", page)
    assert cells and re.findall(r"<td>(.*?)</td>", cells[1]) == ["linear", "1", "5", "8", "48", "ghost", "all", "0.5", "0.5"]


def test_the_same_directory_gives_the_same_bytes(tmp_path):
    made = make_run(tmp_path / "run", complete=True)
    (tmp_path / "far" / "away").mkdir(parents=True)
    shutil.copytree(made, tmp_path / "far" / "away" / "run")
    dptrain.report(made)
    dptrain.report(tmp_path / "far" / "away" / "run")
    first = read(made)
    assert first == read(tmp_path / "far" / "away" / "run")
    assert not any(str(tmp_path) in content for content in first)
    dptrain.report(made)
    assert read(made) == first


def test_a_delta_that_is_too_large_is_noted_everywhere(tmp_path):
    dptrain.report(make_run(tmp_path / "run", complete=True, privacy={"noise_multiplier": 1.0, "target_delta": 0.5}))
    for content in read(tmp_path / "run"):
        assert "delta 0.5 is not below 1/N" in content


def test_small_bounds_are_rounded_to_their_safe_side():
    assert (up(0.12341), up(1.0), up(0.0), up(1e-5), down(2.9979)) == ("0.1235", "1", "0", "1e-05", "2.997")


@given(st.floats(1e-12, 1e12))
@EXAMPLES
def test_rounding_keeps_bounds(value):
    assert float(down(value)) <= value * (1 + 1e-15) and float(up(value)) >= value * (1 - 1e-15)
    assert float(up(value)) - float(down(value)) <= 2e-3 * value


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), max_size=5), st.integers(0, 50))
@EXAMPLES
def test_a_prefix_is_the_first_releases(runs, count):
    events = [(SampledGaussian(float(sigma), 0.1), number) for sigma, number in runs]
    flat = [event for event, number in events for _ in range(number)]
    assert [event for event, number in prefix(events, count) for _ in range(number)] == flat[:count]


@given(st.integers(0, 10**6), st.integers(2, 60))
@EXAMPLES
def test_points_are_spread_from_end_to_end(count, points):
    found = spread(count, points)
    assert len(found) == min(count, points) and found == sorted(set(found))
    assert not found or (found[0], found[-1]) == (1, count)


# ---- runs that are not finished ------------------------------------------------------------------------------------


def test_a_run_in_progress_is_reported_from_its_ledger_while_that_is_locked(tmp_path):
    made = make_run(tmp_path / "run", releases=3, sampling={"sample_rate": 0.2, "steps": 10})
    with PrivacyLedger.open(made / "ledger.jsonl") as ledger:
        event = ledger.events[0][0]
        (written,) = dptrain.report(made)
        ledger.record(event)
    assert written.privacy["status"] == UNFINISHED
    assert written.privacy["epsilon"] == get_accountant("rdp").epsilon([(event, 3)], 1e-5)
    for content in read(made):
        assert UNFINISHED in content
    assert "so far (3 of 10 planned releases)" in read(made)[1].replace("\\", "")
    (later,) = examine([made])  # the statement that was written is an older one now
    assert later.statement["epsilon"] == get_accountant("rdp").epsilon([(event, 4)], 1e-5)
    assert "written after 3 releases; the ledger holds 4" in later.files.remarks[0]


def test_a_run_that_ends_while_its_report_is_written_is_not_left_with_an_older_statement(tmp_path, monkeypatch):
    made = make_run(tmp_path / "run", releases=3)
    from dptrain.reporting import write

    saved, save = [], write.save

    def ending(folder, files):
        save(folder, files)
        if not saved:
            with PrivacyLedger.open(made / "ledger.jsonl") as ledger:
                ledger.record(ledger.events[0][0])
            with open(made / "metrics.jsonl", "a") as lines:
                lines.write('{"step": 4, "train_loss": 0.1}\n{"step": 4, "final": true, "test_accuracy": 0.5}\n')
        saved.append(files)

    monkeypatch.setattr(write, "save", ending)
    dptrain.report(made)
    stated = json.loads((made / "privacy.json").read_text())
    assert (len(saved), stated["releases"], stated["status"]) == (2, 4, COMPLETE)


def test_an_interrupted_run_is_reported_as_such(tmp_path):
    (found,) = examine([make_run(tmp_path / "run", releases=2, complete=False)])
    assert found.files.status == found.statement["status"] == INTERRUPTED


def test_a_run_without_releases_has_spent_nothing(tmp_path):
    (written,) = dptrain.report(make_run(tmp_path / "run", releases=0))
    assert (written.privacy["epsilon"], written.privacy["releases"]) == (0.0, 0)
    assert "<svg" not in (tmp_path / "run" / "report.html").read_text()


def test_lost_steps_are_added_to_the_spending_at_every_evaluation(tmp_path):
    """Two releases left no line: they may have come first, so epsilon at step 2 is that of four releases."""
    made = make_run(tmp_path / "run", releases=6, sampling={"sample_rate": 0.2, "steps": 10})
    lines = (made / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 4]
    (made / "metrics.jsonl").write_text("\n".join(kept) + '\n{"step": 5, "train_l' + '{"step": 5, "test_accuracy": 0.5}\n[1]\n')
    found = read_run(made)
    assert [(e.step, e.releases) for e in found.metrics.evaluations] == [(2, 4), (4, 6)]


def test_a_torn_ledger_is_read_and_said(tmp_path):
    made = make_run(tmp_path / "run", releases=3)
    with open(made / "ledger.jsonl", "ab") as file:
        file.write(b'{"eve')
    dptrain.report(made)
    assert "Ledger ledger.jsonl: an incomplete last line (5 bytes) was dropped." in plain_text((made / "report.html").read_text())


# ---- void, not private, audited ------------------------------------------------------------------------------------


def test_a_run_with_an_unsafe_seed_is_refused_loudly_before_any_epsilon(tmp_path):
    privacy = {"noise_multiplier": 1.0, "unsafe_seed": 918273645}
    (written,) = dptrain.report(make_run(tmp_path / "run", complete=True, privacy=privacy))
    statement, card, page = read(tmp_path / "run")
    assert not written.privacy["private"] and written.privacy["unsafe_seed"]
    figure = f"{written.privacy['epsilon']:.6g}"
    assert list(json.loads(statement))[:2] == ["schema_version", "warning"]
    assert statement.index("VOID") < statement.index('"epsilon"')
    assert card.index("WARNING: No privacy guarantee: unsafe_seed is set") < card.index("VOID (unsafe_seed): epsilon") < card.index("## ")
    shown = plain_text(page)
    assert shown.index("No privacy guarantee: unsafe_seed is set") < shown.index(figure)
    for content in (card, shown):  # every statement of the figure has the word beside it
        for place in re.finditer(re.escape(figure), content):
            assert re.search("void", content[max(0, place.start() - 40) : place.end() + 60], re.I)
    assert page.count("VOID (unsafe_seed): ") >= 5  # headline and every chart
    assert not any("918273645" in content for content in (statement, card, page))


def test_a_non_private_run_has_no_epsilon(tmp_path):
    (written,) = dptrain.report(make_run(tmp_path / "run", complete=True, strategy="non_private", privacy={"target_epsilon": 3.0}))
    statement, card, page = read(tmp_path / "run")
    assert (written.privacy["private"], written.privacy["epsilon"]) == (False, None)
    assert "delta" not in json.loads(statement) and "groups" not in json.loads(statement)
    for content in (card, plain_text(page)):
        assert "trained without differential privacy: no epsilon exists" in content
        assert "epsilon =" not in content
        assert "the weights, every checkpoint" in content


def write_audit(made: Path, **values) -> None:
    findings = [{"name": "canaries <b>", "passed": values["passed"], "text": "gradient | space"}]
    write_json(made / "audit.json", {"epsilon_lower_bound": 0.3, "confidence": 0.95, "findings": findings, **values})


def test_an_audit_is_shown(tmp_path):
    made = make_run(tmp_path / "run", complete=True)
    write_audit(made, passed=True)
    dptrain.report(made)
    _, card, page = read(made)
    for content in (card.replace("\\", ""), plain_text(page)):
        assert "The audit passed: it shows that epsilon is at least 0.3 with confidence 0.95." in content
        assert "canaries <b>: passed. gradient | space" in content
        assert "warning" not in content.lower()


def test_an_audit_that_contradicts_the_guarantee_comes_first(tmp_path):
    made = make_run(tmp_path / "run", complete=True)
    write_audit(made, passed=False, epsilon_lower_bound=1e4)
    (found,) = examine([made])
    dptrain.report(made)
    _, card, page = read(made)
    for content in (card, plain_text(page)):
        assert content.index("An audit of this run failed") < content.index("An audit contradicts the guarantee: it found epsilon")
        assert content.index("above what is claimed") < content.index("What is promised")
    assert found.contradicted
    # The audit was of a longer run, whose claim was larger; or of another delta, at which this run's is.
    write_audit(made, passed=True, epsilon_lower_bound=1e4, epsilon=2e4)
    assert not examine([made])[0].contradicted
    lowest = found.statement["epsilon"] * 1.01
    write_audit(made, passed=True, epsilon_lower_bound=lowest, delta=1e-9)
    assert not examine([made])[0].contradicted
    write_audit(made, passed=True, epsilon_lower_bound=lowest, delta=1e-5)
    assert examine([made])[0].contradicted


def test_a_statement_names_what_all_runs_on_the_data_have_spent():
    together = {"epsilon": 2.5, "delta": 1e-5, "accountant": "rdp", "releases": 9, "runs": 2, "ledger": "x.jsonl", "facts": {}}
    said = privacy_statement(config(), [(SampledGaussian(1.0, 0.2), 4)], {"num_examples": 300}, COMPLETE, together)
    assert said["data_set"] == together and said["statement"].endswith("All 9 releases of 2 runs on this data: epsilon = 2.5.")
    assert "data_set" not in privacy_statement(config(), [(SampledGaussian(1.0, 0.2), 4)], {"num_examples": 300}, COMPLETE)


def test_runs_that_share_a_ledger_say_what_they_spent_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    privacy = {"noise_multiplier": 1.0, "accountant": "rdp", "ledger": "shared.jsonl"}
    for name in ("one", "two"):
        dptrain.train(config(privacy=privacy), data=blobs(), out=name)
    before = (tmp_path / "two" / "privacy.json").read_bytes()
    first, second = dptrain.report("one", "two")
    assert (tmp_path / "two" / "privacy.json").read_bytes() == before
    total = get_accountant("rdp").epsilon([(PrivacyLedger.read("shared.jsonl").events[0][0], 8)], 1e-5)
    for written in (first, second):
        assert (written.privacy["data_set"]["epsilon"], written.privacy["data_set"]["releases"]) == (total, 8)
        for content in read(written.folder):
            assert f"{total:.6g}" in content
    (tmp_path / "shared.jsonl").rename(tmp_path / "elsewhere.jsonl")
    (gone,) = examine(["two"])
    assert gone.statement["data_set"] == second.privacy["data_set"] and "is not there now" in gone.files.remarks[0]
    edit(tmp_path / "two" / "privacy.json", data_set={**second.privacy["data_set"], "epsilon": 0.1})
    with pytest.raises(RunError, match="all runs together spent less than this one"):
        examine(["two"])


# ---- several runs --------------------------------------------------------------------------------------------------


def test_several_runs_are_compared_on_every_page(tmp_path):
    one = make_run(tmp_path / "x" / "run", complete=True)
    two = make_run(tmp_path / "y" / "run", complete=True, privacy={"noise_multiplier": 3.0})
    plain = make_run(tmp_path / "plain", complete=True, strategy="non_private")
    void = make_run(tmp_path / "void", complete=True, privacy={"noise_multiplier": 1.0, "unsafe_seed": 1})
    written = dptrain.report(one, two, plain, void, out=tmp_path / "out")
    assert [w.folder.name for w in written] == ["run-1", "run-2", "plain", "void"]
    assert not (one / "report.html").exists()
    page = (tmp_path / "out" / "run-1" / "report.html").read_text()
    shown = plain_text(page)
    for w in written[:2]:
        assert f"{w.privacy['epsilon']:.6g}" in shown
    assert f"{written[3].privacy['epsilon']:.6g} (void: unsafe_seed)" in shown and "void (VOID: unsafe_seed)" in shown
    assert "none (not private)" in shown and "Runs compared" in shown
    assert page.count("<circle") == 3 * 3  # evaluations of three private runs; the fourth is a line across
    alone = (tmp_path / "out" / "plain" / "report.html").read_text()
    assert alone.count("<circle") == 9


def test_one_directory_with_a_folder_of_its_own(tmp_path):
    made = make_run(tmp_path / "run", complete=True)
    before = sorted(file.name for file in made.iterdir())
    dptrain.report(made, out=tmp_path / "new" / "folder")
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == sorted(OUTPUTS)
    assert sorted(file.name for file in made.iterdir()) == before


# ---- refused -------------------------------------------------------------------------------------------------------


def shorten_ledger(made: Path) -> None:
    lines = (made / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (made / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))


def other_ledger(made: Path, sigma: float, rate: float) -> None:
    (made / "ledger.jsonl").unlink()
    with PrivacyLedger(made / "ledger.jsonl") as ledger:
        ledger.record(SampledGaussian(sigma, rate), 4)


def change_group(made: Path, **values) -> None:
    stated = json.loads((made / "privacy.json").read_text())
    stated["groups"][0] |= values
    (made / "privacy.json").write_text(json.dumps(stated))


def change_config(made: Path, old: str, new: str) -> None:
    content = (made / "config.yaml").read_text()
    assert old in content
    (made / "config.yaml").write_text(content.replace(old, new))


def checkpoint(made: Path, step: int) -> None:
    from dptrain.checkpoint import Checkpoint

    Checkpoint(step, {}, {}).save(made / "checkpoint.safetensors", {})


def stated(made: Path) -> dict:
    return json.loads((made / "privacy.json").read_text())


BROKEN = {
    "a smaller epsilon": (lambda m: edit(m / "privacy.json", epsilon=stated(m)["epsilon"] * 0.999), "it is smaller than the true one"),
    "a smaller prv": (lambda m: edit(m / "privacy.json", epsilon_by_accountant={"prv": 0.1}), "states epsilon 0.1, and the ledger gives"),
    "fewer releases": (lambda m: edit(m / "privacy.json", releases=2), "is of a complete run of 2 releases, and the ledger holds 4"),
    "more releases": (lambda m: edit(m / "privacy.json", releases=5), "holds 4 releases and privacy.json tells of 5"),
    "no epsilon": (lambda m: edit(m / "privacy.json", epsilon=None), "states no epsilon, and the run is private"),
    "epsilon is text": (lambda m: edit(m / "privacy.json", epsilon="1"), "privacy.json is damaged (epsilon: "),
    "another delta": (lambda m: edit(m / "privacy.json", delta=1e-3), "not for the delta"),
    "another run's": (lambda m: edit(m / "privacy.json", config_hash="0"), "belongs to another run (config_hash '0'"),
    "newer statement": (lambda m: edit(m / "privacy.json", schema_version=2), "schema version 2, this dptrain knows up to 1"),
    "no JSON": (lambda m: (m / "privacy.json").write_text("{"), "cannot be read as JSON"),
    "less noise": (lambda m: change_group(m, noise_std=0.49), "gives bounds and noise of noise multiplier 0.98"),
    "larger bound": (lambda m: change_group(m, norm_bound=0.51), "the guarantee does not hold, or a file was changed"),
    "ledger gone": (lambda m: (m / "ledger.jsonl").unlink(), "cannot be read"),
    "ledger foreign": (lambda m: (m / "ledger.jsonl").write_text("epsilon,delta\n1,2\n"), "line 1 is not a dptrain ledger header"),
    "ledger newer": (lambda m: (m / "ledger.jsonl").write_text('{"dptrain_ledger": 9}\n'), "announces format 9"),
    "ledger damaged": (lambda m: (m / "ledger.jsonl").write_text('{"dptrain_ledger": 1}\n1\n1\n'), "line 2 is damaged"),
    "ledger shortened": (shorten_ledger, "so releases were lost"),
    "ledger of more noise": (lambda m: other_ledger(m, 2.0, 0.2), "claims the noise multiplier 2, and run.json says 1"),
    "ledger of a smaller rate": (lambda m: other_ledger(m, 0.9, 0.1), "claims the sample rate 0.1, and run.json says 0.2"),
    "no run.json": (lambda m: (m / "run.json").unlink(), "holds no dptrain run"),
    "newer run": (lambda m: (m / "run.json").write_text('{"format": "2"}'), "written by another version of dptrain (format '2'"),
    "damaged run": (lambda m: edit(m / "run.json", sample_rate=1.5), "run.json is damaged (sample_rate: "),
    "a list": (lambda m: (m / "run.json").write_text("[]"), "does not hold a JSON object"),
    "no config": (lambda m: (m / "config.yaml").unlink(), "There is no config file"),
    "bad config": (lambda m: change_config(m, "privacy:", "privacy:\n  bogus: 1\n  also: 2"), "has 2 problems"),
    "another config": (lambda m: change_config(m, "1.0e-05", "1.0e-03"), "is not the config of this run"),
    "checkpoint ahead": (lambda m: checkpoint(m, 5), "holds 4 releases and checkpoint.safetensors tells of 5"),
    "checkpoint damaged": (lambda m: (m / "checkpoint.safetensors").write_bytes(b"pickle"), "is not a readable checkpoint"),
    "audit damaged": (lambda m: (m / "audit.json").write_text('{"findings": []}'), "audit.json is damaged (passed: "),
    "metrics is a folder": (lambda m: (m / "metrics.jsonl").unlink() or (m / "metrics.jsonl").mkdir(), "metrics.jsonl cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_is_one_line_and_exit_code_2_and_nothing_is_written(run, tmp_path, name):
    made, good = make_run(tmp_path / "run", complete=True), make_run(tmp_path / "good", complete=True)
    spoil, expected = BROKEN[name]
    spoil(made)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for words in ([made], [good, made], [made, "--out", tmp_path / "out"]):
        code, out, err = run("report", *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("dptrain: error: ") and expected in err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_is_no_run_or_no_folder_is_refused(run, tmp_path):
    made, other = make_run(tmp_path / "run", complete=True), make_run(tmp_path / "other", complete=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for words, expected in (
        ([tmp_path / "none"], "is not a directory"),
        ([tmp_path / "file"], "is not a directory"),
        ([tmp_path / "empty"], "holds no dptrain run"),
        ([made, "--out", tmp_path / "file"], "cannot be written to"),
        ([made, "--out", other], "is the directory of another run"),
    ):
        code, out, err = run("report", *words)
        assert (code, out, err.count("\n")) == (2, "", 1) and expected in err
    assert not (made / "report.html").exists() and not (other / "report.html").exists()
    with pytest.raises(RunError, match="no run to report on"):
        dptrain.report()


@pytest.mark.parametrize(("steps", "complete"), [(6, True), (6, None)])
def test_a_run_that_says_it_is_complete_needs_a_whole_ledger(tmp_path, steps, complete):
    made = make_run(tmp_path / "run", releases=4, sampling={"sample_rate": 0.2, "steps": steps}, complete=complete)
    if complete is None:
        with open(made / "metrics.jsonl", "a") as file:
            file.write('{"step": 4, "final": true}\n')
    with pytest.raises(RunError, match="its ledger holds 4 of 6 releases"):
        examine([made])


def test_a_non_private_run_with_releases_or_an_epsilon_is_refused(tmp_path):
    made = make_run(tmp_path / "run", complete=True, strategy="non_private")
    edit(made / "privacy.json", epsilon=1.0)
    with pytest.raises(RunError, match="states an epsilon, and the run is non_private"):
        examine([made])
    (made / "privacy.json").unlink()
    other_ledger(made, 1.0, 0.2)
    with pytest.raises(RunError, match="holds 4 releases, and the run is non_private"):
        examine([made])


def test_a_statement_that_forgets_the_unsafe_seed_is_refused(tmp_path):
    made = make_run(tmp_path / "run", complete=True, privacy={"noise_multiplier": 1.0, "unsafe_seed": 1})
    edit(made / "privacy.json", private=True)
    with pytest.raises(RunError, match="claims a guarantee"):
        examine([made])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    made = make_run(tmp_path_factory.mktemp("fuzz") / "run", complete=True)
    checkpoint(made, 4)
    return made


@given(st.data())
@EXAMPLES
def test_a_damaged_file_never_gives_a_smaller_epsilon_or_a_traceback(sound, tmp_path_factory, data):
    """One file with a few bytes changed, cut or doubled: refused in a sentence, or the epsilon is not smaller than the true one."""
    true = get_accountant("rdp").epsilon(PrivacyLedger.read(sound / "ledger.jsonl").events, 1e-5)
    made = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(sound, made)
    name = data.draw(st.sampled_from(sorted(path.name for path in sound.iterdir())))
    content = bytearray((made / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        match data.draw(st.sampled_from(["change", "digit", "cut", "double"])):
            case "change":
                content[at : at + 1] = data.draw(st.binary(max_size=2))
            case "digit":
                content[at : at + 1] = data.draw(st.sampled_from([b"0", b"1", b"9", b".", b"-", b"e"]))
            case "cut":
                del content[at:]
            case "double":
                content[at:at] = content[at : at + 20]
    (made / name).write_bytes(content)
    message, epsilon = "", true
    try:
        files = read_run(made)
        epsilon = privacy_statement(files.config, files.events, files.facts, files.status)["epsilon"]
    except (RunError, LedgerError) as error:
        message = str(error)
    assert "\n" not in message
    assert epsilon >= true * (1 - 1e-6)


# ---- text from outside ---------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>|`*_[x](javascript:y)"


def test_text_from_the_config_and_the_directory_is_shown_and_never_run(tmp_path):
    data = {"name": "npz", "path": f"/data/{HOSTILE}\n</pre>```"}
    folder = tmp_path / "<img src=x onerror=y>"
    dptrain.report(make_run(folder, complete=True, layer=HOSTILE, data=data))
    _, card, page = read(folder)
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

    Reader().feed(page)
    assert not {"script", "img", "a", "link", "iframe", "object"} & {tag for tag, _ in tags}
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on") or name in ("src", "href")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and plain_text(page).count("<script>") >= 2
    # Outside of the fenced config nothing of it is markup, and table rows keep their cells.
    outside = re.sub(r"(?ms)^(`{3,})yaml$.*?^\1$", "", card)
    assert "<script>" not in outside.replace("\\<", "") and "onerror=y>" not in outside.replace("\\>", "")
    (row,) = [line for line in outside.splitlines() if line.startswith("| ") and "alert" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 11
    fence = re.search(r"(?m)^(`+)yaml$", card)
    assert fence and len(fence[1]) > max(len(run) for run in re.findall("`+", yaml.safe_dump(data)))
    again = yaml.safe_load(re.search(r"(?ms)^(`{3,})yaml$\n(.*?)^\1$", card)[2])
    assert again["data"]["path"] == data["path"]


@given(st.text(max_size=40))
@EXAMPLES
def test_markdown_text_is_one_line_without_markup(value):
    shown = text(value)
    assert "\n" not in shown and "\r" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*{}\[\]<>|#&~$]", shown)


# ---- schema and command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [{}, {"strategy": "non_private"}, {"privacy": {"noise_multiplier": 1.0, "unsafe_seed": 3, "target_delta": 0.1}}],
)
def test_statements_have_the_documented_fields_and_no_others(tmp_path, parts):
    (written,) = dptrain.report(make_run(tmp_path / "run", complete=True, **parts))
    read_back = Statement.model_validate(json.loads((tmp_path / "run" / "privacy.json").read_text()))
    assert not read_back.model_extra
    assert not any(part.model_extra for part in (*read_back.layers, *read_back.groups))
    assert read_back.epsilon == written.privacy["epsilon"]
    assert set(json_schema()["properties"]) >= set(written.privacy)


def test_the_schema_is_printed(run):
    code, out, err = run("schema", "privacy")
    assert (code, err) == (0, "") and json.loads(out) == json_schema()
    assert {"epsilon", "statement", "config_hash"} <= set(json_schema()["required"])
    code, out, err = run("schema", "bogus")
    assert (code, out) == (2, "") and "no schema of 'bogus'" in err


def test_the_schema_document_names_every_field():
    documented = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    for name in json_schema()["properties"]:
        assert f"`{name}`" in documented, name


def test_the_command_prints_the_statement(run, tmp_path):
    made = make_run(tmp_path / "run", complete=True)
    code, out, err = run("report", made)
    assert (code, err) == (0, "")
    assert out == f"{stated(made)['statement']}\ncomplete; the report is {made / 'report.html'}\n"
    code, out, err = run("report", made, "--out", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed["privacy"] == stated(made)
    assert printed["files"] == [str(tmp_path / "out" / name) for name in OUTPUTS]


def test_names_that_no_file_system_takes_are_refused_in_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dptrain", "report", "x" * 5000])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "is not a directory" in capsys.readouterr().err
