"""Damaged, foreign, newer and swapped files in a run's directory: one sentence, exit code 2, and no code of theirs is executed."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import dptrain
from accounting import LedgerError, PrivacyLedger, SampledGaussian
from dptrain import RunError
from dptrain.checkpoint import Checkpoint, load_arrays, read_json, write_json
from tests.core.test_trainer import command
from tests.durability import toy
from tests.durability.harness import DATA, Place, assert_same_weights, train

ROOT = Path(__file__).parents[2]


def stop(progress):
    if progress.step == 3:
        signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Runs that were interrupted after 3 of 6 steps: the one, one of the same config, and one of another."""
    place = Place(tmp_path_factory.mktemp("runs"), share=False)
    for name, seed in (("one", 0), ("twin", 0), ("other", 1)):
        assert not train(place, name, place.config(6, seed), progress=stop).complete
    return place


@pytest.fixture
def place(template, tmp_path):
    shutil.copytree(template.root, tmp_path / "p")
    return Place(tmp_path / "p", share=False)


def refused(place, error=RunError) -> str:
    """The one-line message with which a run is not resumed; it must change nothing."""
    out = place.out("one")
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and not p.is_symlink()}
    with pytest.raises(error) as caught:
        train(place, "one", place.config(6))
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and not p.is_symlink()} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(path: Path, **changes) -> None:
    """A checkpoint with other parts and a digest that fits, as only a program of ours could have written it."""
    arrays, metadata = load_arrays(path, own=True)
    loaded = Checkpoint.load(path, {})
    run = {k: v for k, v in metadata.items() if k not in ("format", "step")} | changes.pop("run", {})
    parts = {"step": loaded.step, "weights": loaded.weights, "optimizer": loaded.optimizer, "bounds": loaded.bounds, **changes}
    Checkpoint(**parts).save(path, run)
    assert arrays


class Bomb:
    """Unpickling it would leave a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


FILES = ["checkpoint.safetensors", "run.json", "ledger.jsonl"]
CONTENTS = {
    "empty": b"",
    "zeros": bytes(4096),
    "text": b"thesis\n",
    "a huge header": (2**60).to_bytes(8, "little") + b"{}",
    "a header of a gigabyte": (2**30).to_bytes(8, "little") + b"{" + b" " * 100,
    "nesting": b"[" * 10**6,
    "nested objects": b'{"a":' * 10**6,
    "a number of digits": b"9" * 10**5,
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[]\n",
    "an object": b"{}\n",
    "null": b"null\n",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_that_is_something_else(place, name, content):
    path = place.out("one") / name
    path.write_bytes(CONTENTS[content])
    if (name, content) == ("ledger.jsonl", "empty"):  # a ledger whose first write was interrupted, and not this run's
        assert "belongs to another run, or to none" in refused_after_repair(place)
    else:
        assert str(path.parent) in refused(place, (RunError, LedgerError))


def refused_after_repair(place) -> str:
    with pytest.raises(RunError) as caught:
        train(place, "one", place.config(6))
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_not_executed(place, tmp_path, name):
    (place.out("one") / name).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    refused(place, (RunError, LedgerError))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", ["directory", "fifo", "dangling", "elsewhere"])
def test_a_file_that_is_no_file(place, tmp_path, name, what):
    path = place.out("one") / name
    path.unlink()
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "elsewhere":
        (tmp_path / "elsewhere").write_text("secret\n")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.symlink_to(tmp_path / "none")
    if (name, what) == ("checkpoint.safetensors", "dangling"):  # as if there were no checkpoint yet: what was spent stays spent
        result = train(place, "one", place.config(6))
        assert (result.steps, result.privacy["releases"]) == (3, 6)
        return
    with pytest.raises((RunError, LedgerError)) as caught:
        train(place, "one", place.config(6))
    assert "\n" not in str(caught.value)
    if what == "elsewhere":
        assert (tmp_path / "elsewhere").read_text() == "secret\n"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("source", ["twin", "other"])
def test_files_of_another_run(place, name, source):
    """A twin has the same config: only the name that each run draws for itself tells them apart."""
    shutil.copy(place.out(source) / name, place.out("one") / name)
    message = refused(place, (RunError, LedgerError))
    assert "belongs to another run" in message


def test_the_checkpoint_of_another_framework(place):
    rewrite(place.out("one") / "checkpoint.safetensors", run={"backend": "torch"})
    assert "belongs to another run" in refused(place)


def edited(value: np.ndarray, position, number) -> np.ndarray:
    value = value.copy()
    value[position] = number
    return value


def parts(place):
    return Checkpoint.load(place.out("one") / "checkpoint.safetensors", {})


MISFITS = {
    "NaN weights": (lambda c: {"weights": {**c.weights, "out.bias": edited(c.weights["out.bias"], 0, np.nan)}}, "not finite in 'out.bias'"),
    "infinite weights": (lambda c: {"weights": {**c.weights, "out.weight": edited(c.weights["out.weight"], (0, 0), np.inf)}}, "not finite"),
    "another type": (lambda c: {"weights": {k: v.astype(np.float32) for k, v in c.weights.items()}}, "does not fit the model"),
    "integers": (lambda c: {"weights": {k: v.astype(np.int64) for k, v in c.weights.items()}}, "does not fit the model"),
    "another shape": (lambda c: {"weights": {**c.weights, "out.bias": np.zeros(7)}}, "does not fit the model, see 'out.bias'"),
    "transposed": (lambda c: {"weights": {**c.weights, "out.weight": c.weights["out.weight"].T}}, "does not fit the model"),
    "a weight missing": (lambda c: {"weights": {"out.bias": c.weights["out.bias"]}}, "does not fit the model, see 'out.weight'"),
    "a weight too many": (lambda c: {"weights": {**c.weights, "more": np.zeros(2)}}, "does not fit the model, see 'more'"),
    "no optimizer": (lambda c: {"optimizer": {}}, "not of this optimizer"),
    "another optimizer": (lambda c: {"optimizer": {"0/exp_avg": np.zeros(3)}}, "not of this optimizer"),
    "an optimizer's shape": (lambda c: {"optimizer": {k: np.zeros(999) for k in c.optimizer}}, "does not fit the model"),
    "an optimizer's NaN": (lambda c: {"optimizer": {k: v * np.nan for k, v in c.optimizer.items()}}, "not finite"),
    "more steps than recorded": (lambda c: {"step": 4}, "holds 3 releases and its checkpoint 4 steps, so releases were lost"),
    "more steps than planned": (lambda c: {"step": 7}, "holds 7 steps of a run of 6"),
    "a bound that is no number": (lambda c: {"bounds": {"scale": np.array(np.nan)}}, "no finite number as scale"),
    "a bound that is a list": (lambda c: {"bounds": {"scale": np.ones(2)}}, "no finite number as scale"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_checkpoint_that_does_not_fit(place, case):
    change, expected = MISFITS[case]
    rewrite(place.out("one") / "checkpoint.safetensors", **change(parts(place)))
    assert expected in refused(place)


@pytest.mark.parametrize("step", ["", "-1", "1.5", "²", "1" * 5000, "0x1"])
def test_a_step_that_is_no_number(place, step):
    from dptrain.checkpoint import save_arrays

    path = place.out("one") / "checkpoint.safetensors"
    arrays, metadata = load_arrays(path, own=True)
    save_arrays(path, arrays, {**metadata, "step": step})
    assert "is not a dptrain checkpoint" in refused(place)


@pytest.mark.parametrize("change", [
    *({"noise_multiplier": value} for value in ("1.0", [1.0], True, 1, -1.0, float("nan"), 1e-300, float("inf"))),
    {"run": 1}, {"run": None}, {"run": "x"}, {"format": 1}, {"format": "2"}, {"config_hash": None}, {"backend": ["toy"]},
    {"num_steps": "6"}, {"num_steps": 6.5}, {"sample_rate": {}},
])  # fmt: skip
def test_a_run_file_with_wrong_values(place, change):
    path = place.out("one") / "run.json"
    write_json(path, {**read_json(path), **change})
    refused(place, dptrain.errors.USER_ERRORS)


@pytest.mark.parametrize("key", ["noise_multiplier", "run", "num_examples", "format"])
def test_a_run_file_with_a_value_missing(place, key):
    path = place.out("one") / "run.json"
    write_json(path, {k: v for k, v in read_json(path).items() if k != key})
    refused(place)


def test_a_ledger_that_is_shorter_than_the_checkpoint(place):
    path = place.out("one") / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert "so releases were lost" in refused(place)


def test_a_ledger_of_a_newer_version(place):
    path = place.out("one") / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"dptrain_ledger": 2', b'"dptrain_ledger": 3'))
    assert "upgrade dptrain" in refused(place, LedgerError)


def test_a_ledger_of_somebodys_loop(place):
    path = place.out("one") / "ledger.jsonl"
    path.unlink()
    with PrivacyLedger(path) as ledger:
        ledger.record(SampledGaussian(100.0, 1e-6), 3)
    assert "belongs to another run, or to none" in refused(place)


def test_a_directory_of_the_version_before_is_resumed(place):
    """It has no name of its own: neither run.json nor the checkpoint says one, and its ledger is of format 1."""
    out = place.out("one")
    event = PrivacyLedger.read(out / "ledger.jsonl").events[0][0]
    line = json.dumps({"event": event.to_dict(), "count": 1})
    (out / "ledger.jsonl").write_text(f'{{"dptrain_ledger": 1}}\n{line}\n1\n1\n')
    write_json(out / "run.json", {k: v for k, v in read_json(out / "run.json").items() if k != "run"})
    loaded, metadata = load_arrays(out / "checkpoint.safetensors")
    from dptrain.checkpoint import save_arrays

    save_arrays(out / "checkpoint.safetensors", loaded, {k: v for k, v in metadata.items() if k != "run"})
    result = train(place, "one", place.config(6))
    assert (result.complete, result.steps, result.privacy["releases"]) == (True, 6, 6)


def test_what_is_sound_is_resumed(place):
    for name in ("one", "twin"):
        assert train(place, name, place.config(6, unsafe_seed=None)).steps == 6


def test_a_seeded_run_is_not_confused_by_leftovers(tmp_path):
    place = Place(tmp_path, share=False)
    cfg = place.config(6, unsafe_seed=1)
    train(place, "one", cfg, progress=stop)
    (place.out("one") / ".checkpoint.safetensors.999.tmp").write_bytes(b"half")
    with open(place.out("one") / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "tra')
    train(place, "one", cfg)
    train(place, "two", cfg)
    assert_same_weights(place.out("one"), place.out("two"))
    assert not [name for name in os.listdir(place.out("one")) if name.endswith(".tmp")]
    for line in (place.out("one") / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize("name", FILES)
def test_the_command_line_says_one_sentence(place, monkeypatch, capsys, name):
    toy.register()
    np.savez(place.root / "d.npz", x_train=DATA.x_train, y_train=DATA.y_train)
    cfg = place.config(6).replace(data={"name": "npz", "path": str(place.root / "d.npz")})
    (place.root / "run.yaml").write_text(cfg.to_yaml())
    words = ("train", place.root / "run.yaml", "--backend", toy.NAME, "--out", place.root / "out", "--quiet")
    assert command(monkeypatch, capsys, *words)[0] == 0
    (place.root / "out" / name).write_bytes(b"\xff" * 100)
    code, _, err = command(monkeypatch, capsys, *words)
    assert code == 2 and err.startswith("dptrain: error: ") and err.count("\n") == 1 and name in err


# ---- no code in data ---------------------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "__import__",
    "torch.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "load_model",
    "keras.models.load_model",
}


def imported(node: ast.AST) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            return [node.module or ""]
    return []


def offences(source: str) -> list[str]:
    """Where a source could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        found += [f"import {name}" for name in imported(node) if name.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name, arguments = ast.unparse(node.func), [ast.unparse(argument) for argument in node.args]
            if name in FORBIDDEN_CALLS or name.endswith(".load_model") or (name == "yaml.load" and arguments[1:] != ["YamlLoader()"]):
                found.append(f"line {node.lineno}: {name}")
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if options.get("allow_pickle", "False") != "False":
                found.append(f"line {node.lineno}: allow_pickle")
    return found


@pytest.mark.parametrize("package", ["accounting", "dptrain", "dptrain_torch", "dptrain_tf"])
def test_nothing_is_loaded_that_could_be_code(package):
    """But for the published archive of CIFAR-10, which is read by an unpickler that looks names up in a list of five."""
    found = {path.name: offences(path.read_text()) for path in (ROOT / package).rglob("*.py")}
    assert len(found) > 5
    cifar = found.pop("data_sources.py", [])
    assert cifar in ([], ["import pickle"])
    assert not {path: lines for path, lines in found.items() if lines}


def test_the_archive_of_cifar_is_read_without_running_it(tmp_path):
    from dptrain.data_sources import parse_cifar_python
    from dptrain.errors import DataError

    assert re.findall(r"pickle\.(\w+)", (ROOT / "dptrain" / "data_sources.py").read_text()).count("Unpickler") == 1
    assert not re.search(r"pickle\.loads?\(", (ROOT / "dptrain" / "data_sources.py").read_text())
    with pytest.raises(DataError, match="is not allowed in a data file"):
        parse_cifar_python(pickle.dumps(Bomb(tmp_path / "executed")), "here")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "eval('1')", "exec(text)",
    "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=flag)",
    "yaml.load(text)", "yaml.load(text, yaml.Loader)", "keras.models.load_model(p)", "import joblib",
])  # fmt: skip
def test_the_search_itself_finds_what_it_looks_for(source):
    assert offences(source)
