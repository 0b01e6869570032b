"""Whatever a ledger file holds: an error of one sentence, or an epsilon no lower than that of what was certainly written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st

from accounting import AccountingError, LedgerError, PrivacyLedger, SampledGaussian, get_accountant
from tests.fuzz.tools import LENGTHS, damaged, fuzz, one_sentence

A, B = SampledGaussian(1.0, 0.01), SampledGaussian(2.0, 0.5)
FACTS = {"relation": "add_remove", "num_examples": 60, "data": "digits"}
RECORDS = [(A, 1), (A, 12), (B, 3), (A, 1), (A, 1), (B, 2)]
OLD = b'{"dptrain_ledger": 1}\n{"event": {"kind": "sampled_gaussian", "noise_multiplier": 1.0, "sample_rate": 0.01}, "count": 3}\n2\n1\n'


def epsilon(events) -> float:
    return get_accountant("rdp").epsilon(events, 1e-5)


def written(path: Path) -> list[tuple[bytes, float]]:
    """A file after each release, with the epsilon spent by then."""
    states = []
    with PrivacyLedger(path, facts=FACTS, run="one") as ledger:
        states.append((path.read_bytes(), 0.0))
        for index, (event, count) in enumerate(RECORDS):
            ledger.run = "one" if index < 3 else "two"
            ledger.record(event, count)
            states.append((path.read_bytes(), epsilon(ledger.events)))
    return states


def accepted(path: Path) -> PrivacyLedger | None:
    """The ledger, read and continued alike; None where both refuse it."""
    before = path.read_bytes()
    try:
        ledger = PrivacyLedger.read(path)
    except LedgerError as error:
        one_sentence(error)
        with pytest.raises(LedgerError):
            PrivacyLedger.open(path)
        assert path.read_bytes() == before  # nothing is written to what is not understood
        return None
    with PrivacyLedger.open(path) as opened:
        assert opened.events == ledger.events
        opened.record(B)
        assert PrivacyLedger.read(path).events == opened.events
    return ledger


@LENGTHS
def test_random_bytes(tmp_path, length):
    def check(start, content):
        (tmp_path / "l").write_bytes(start + content)
        accepted(tmp_path / "l")

    starts = st.sampled_from([b"", b'{"dptrain_ledger": ', b'{"dptrain_ledger": 2}\n', b'{"dptrain_ledger": 1}\n', OLD])
    fuzz(check, starts, st.binary(max_size=80), examples=150, length=length)


@LENGTHS
def test_damage_never_lowers_epsilon(tmp_path, length):
    """What of a damaged file is still as it was written counts; only an end that is gone can be missing, as after a kill."""
    states = written(tmp_path / "l")
    whole = states[-1][0]

    def check(content):
        (tmp_path / "l").write_bytes(content)
        ledger = accepted(tmp_path / "l")
        certain = max((value for state, value in states if content.startswith(state)), default=0.0)
        if ledger is not None:
            assert epsilon(ledger.events) >= certain
            body = content.rstrip(b"\n")
            assert whole.startswith(body) or content.startswith(whole) or not ledger.num_releases or prefix_of(ledger)

    fuzz(check, damaged(whole), examples=250, length=length)


def prefix_of(ledger: PrivacyLedger) -> bool:
    """Whether the releases are the first of those that were recorded; a damaged end was taken for a torn one."""
    flat = [event for event, count in ledger.events for _ in range(count)]
    return flat == [event for event, count in RECORDS for _ in range(count)][: len(flat)]


@LENGTHS
def test_files_of_format_1(tmp_path, length):
    """They have no seals, so that a changed digit goes unseen; still no traceback, and what is read is what is continued."""

    def check(content):
        (tmp_path / "l").write_bytes(content)
        ledger = accepted(tmp_path / "l")
        if ledger is not None:
            try:
                assert 0 <= epsilon(ledger.events) < float("inf")
            except AccountingError as error:
                one_sentence(error)

    fuzz(check, damaged(OLD), examples=150, length=length)


@LENGTHS
def test_every_prefix_of_a_history_with_failures(tmp_path, length, monkeypatch):
    """Records in any order by any run, appends that fail half-way: the file never says less than was recorded without an error."""
    import os

    real = os.write

    def check(actions):
        path = tmp_path / "h"
        path.unlink(missing_ok=True)
        certain = 0
        ledger = PrivacyLedger(path, facts=FACTS)
        for event, count, run, keep in actions:
            ledger.run = run
            if keep is not None:
                monkeypatch.setattr(os, "write", lambda fd, data, k=keep: real(fd, data[: min(k, len(data) - 1)]))
            try:
                ledger.record(event, count)
                certain = ledger.num_releases
            except LedgerError:
                assert keep is not None
            monkeypatch.setattr(os, "write", real)
            assert certain <= PrivacyLedger.read(path).num_releases <= ledger.num_releases
        ledger.close()
        with PrivacyLedger.open(path, facts=FACTS) as again:
            assert again.num_releases >= certain

    action = st.tuples(st.sampled_from([A, B]), st.integers(1, 20), st.sampled_from([None, "x", "y"]), st.none() | st.integers(0, 90))
    fuzz(check, st.lists(action, max_size=8), examples=60, length=length)
