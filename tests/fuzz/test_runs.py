"""Damaged checkpoints and run files: training goes on from what is sound, or there is one sentence; spending is never lost."""

from __future__ import annotations

import contextlib
import shutil
import signal

import pytest

from dptrain.errors import USER_ERRORS
from tests.durability.harness import Place, releases, train
from tests.fuzz.tools import LENGTHS, damaged, fuzz, one_sentence

LEDGER = {"ledger": "data.jsonl"}  # in the working directory


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("runs"))
    with contextlib.chdir(place.root):
        train(place, "one", place.config(5, **LEDGER), progress=lambda p: signal.raise_signal(signal.SIGINT) if p.step == 3 else None)
    return place


@LENGTHS
@pytest.mark.parametrize("name", ["one/checkpoint.safetensors", "one/run.json", "one/ledger.jsonl", "data.jsonl", "one/metrics.jsonl"])
def test_a_run_with_a_damaged_file(begun, tmp_path, monkeypatch, name, length):
    home = Place(tmp_path / "p")

    def check(content):
        shutil.rmtree(home.root, ignore_errors=True)
        shutil.copytree(begun.root, home.root)
        monkeypatch.chdir(home.root)
        (home.root / name).write_bytes(content)
        try:
            result = train(home, "one", begun.config(5, **LEDGER))
        except USER_ERRORS as error:
            one_sentence(error)
            return
        assert result.privacy["releases"] == releases(home.out("one") / "ledger.jsonl") == 5
        assert releases(home.data) >= 5

    fuzz(check, damaged((begun.root / name).read_bytes()), examples=15, length=length)
