"""Whatever is typed: exit code 0, 2 or 130, and never a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import strategies as st

from accounting import PrivacyLedger, SampledGaussian
from dptrain.cli import app, main
from tests.durability import toy
from tests.durability.harness import DATA, Place
from tests.fuzz.tools import LENGTHS, fuzz

NUMBERS = ["0", "-1", "1", "2", "0.1", "1e-5", "1e-300", "1e300", "1e400", "nan", "inf", "-0.0", "1_0", "0x10", "9" * 400, "³"]
WORDS = ["", "add_remove", "replace_one", "prv", "rdp", "x", "toy", "torch2", "run.yaml", "missing.yaml", "out", "data.jsonl", ".", "/",
         "/dev/null", "a=b", "sampling.steps=2", "privacy.ledger=data.jsonl", "privacy.target_epsilon=3.0", "seed=", "=", "ü",
         "x" * 300]  # fmt: skip
SKIPPED = {"compare", "doctor"}  # they start processes, or look at the machine


def commands() -> dict[str, list[tuple[str, bool]]]:
    """Every command with its options and whether each is a flag."""
    found = {}

    def walk(command, words):
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                walk(inner, [*words, name])
        elif words[0] not in SKIPPED:
            found[" ".join(words)] = [(p.opts[0], p.is_flag) for p in command.params if p.opts[0].startswith("-")]

    walk(typer.main.get_command(app), [])
    return found


COMMANDS = commands()


def command_lines(name: str) -> st.SearchStrategy[list[str]]:
    values = st.sampled_from(NUMBERS + WORDS)
    options = [st.just([flag]) if is_flag else values.map(lambda v, f=flag: [f, v]) for flag, is_flag in COMMANDS[name] if flag != "--help"]
    parts = st.lists(st.one_of(values.map(lambda v: [v]), *options, *options), max_size=7)
    begin = [name.split()] + ([[name, "run.yaml", "--backend", "toy", "--quiet"]] if name in ("train", "plan") else [])
    begin += [[*name.split(), "ledger.jsonl"]] if name == "ledger show" else []
    return st.tuples(st.sampled_from(begin), parts).map(lambda found: [*found[0], *(word for part in found[1] for word in part)])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.register()
    place = Place(tmp_path)
    np.savez("d.npz", x_train=DATA.x_train, y_train=DATA.y_train)
    cfg = place.config(2).replace(data={"name": "npz", "path": "d.npz"})
    Path("run.yaml").write_text(cfg.to_yaml())
    with PrivacyLedger("ledger.jsonl", facts={"relation": "add_remove", "num_examples": 40, "data": "x"}) as ledger:
        ledger.record(SampledGaussian(1.0, 0.1), 5)
    return tmp_path


@LENGTHS
@pytest.mark.parametrize("name", COMMANDS)
def test_any_arguments(folder, monkeypatch, capsys, name, length):
    def check(words):
        monkeypatch.setattr(sys, "argv", ["dptrain", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert stop.value.code in (0, 2, 130), (words, err)
        assert "Traceback" not in out + err

    fuzz(check, command_lines(name), examples=25, length=length)


def test_every_command_is_tried():
    assert {"train", "plan", "epsilon", "calibrate", "certify", "schema", "ledger show", "ledger new"} <= COMMANDS.keys()


@LENGTHS
def test_numbers_that_almost_make_sense(folder, monkeypatch, capsys, length):
    def check(values, command):
        flags = {"epsilon": ["--sample-rate", "--noise-multiplier", "--steps", "--delta"],
                 "calibrate": ["--sample-rate", "--noise-multiplier", "--target-epsilon", "--delta"]}[command]  # fmt: skip
        monkeypatch.setattr(
            sys, "argv", ["dptrain", command, *(w for pair in zip(flags, values, strict=True) for w in pair), "--accountant", "rdp"]
        )
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert stop.value.code in (0, 2), (values, err)
        assert ("nan" not in out and "inf" not in out) or stop.value.code == 2

    fuzz(check, st.tuples(*[st.sampled_from(NUMBERS)] * 4), st.sampled_from(["epsilon", "calibrate"]), examples=60, length=length)
