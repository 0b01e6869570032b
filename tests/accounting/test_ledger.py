"""The ledger never under-counts: torn lines, killed processes, full disks, second writers, foreign files."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from accounting import AccountingError, CappedGaussian, FixedSizeGaussian, LedgerError, PrivacyLedger, SampledGaussian, Tuning

A, B = SampledGaussian(1.0, 0.01), SampledGaussian(2.0, 0.5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def fill(path, *records):
    with PrivacyLedger(path) as ledger:
        for event, count in records:
            ledger.record(event, count)


def test_memory():
    ledger = PrivacyLedger()
    ledger.record(A)
    ledger.record(A, 4)
    ledger.record(B, 0)
    ledger.record(B)
    assert ledger.events == ((A, 5), (B, 1)) and ledger.num_releases == 6 and ledger.path is None


def test_file_round_trip_and_format(path):
    fill(path, (A, 1), (A, 2), (B, 3), (A, 1))
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"dptrain_ledger": 2}
    assert json.loads(lines[1].rpartition(" ")[0]) == {"event": A.to_dict(), "count": 1}
    assert re.fullmatch("2 [0-9a-f]{8}", lines[2])
    with PrivacyLedger.open(path) as ledger:
        assert ledger.events == ((A, 3), (B, 3), (A, 1)) and not ledger.warnings
        ledger.record(A)
    assert path.read_text().splitlines()[-1].startswith("1 ")
    assert PrivacyLedger.read(path).events == ((A, 3), (B, 3), (A, 2))


def test_record_is_on_disk_before_it_returns(path, monkeypatch):
    log = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda fd, data: (log.append("write"), write(fd, data))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append("fsync"), fsync(fd))[1])
    ledger = PrivacyLedger(path)
    assert log == ["write", "fsync", "fsync"]  # the header, then the directory
    log.clear()
    ledger.record(A)
    assert log == ["write", "fsync"]
    ledger.close()


def test_sigkill_loses_nothing(path):
    code = (
        "import sys; from accounting import *; ledger = PrivacyLedger(sys.argv[1]); n = 0\n"
        "while True:\n    ledger.record(SampledGaussian(1.0, .01)); n += 1; print(n, flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if int(line) >= 25:
            break
    child.send_signal(signal.SIGKILL)
    acknowledged = 25 + len(child.stdout.read().split())
    child.stdout.close()
    child.wait()
    with PrivacyLedger.open(path) as ledger:  # the kernel dropped the dead process's lock
        assert acknowledged <= ledger.num_releases <= acknowledged + 1


@pytest.mark.parametrize("cut", range(1, 60))
def test_torn_last_line(path, cut):
    fill(path, (A, 3), (B, 2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    before = path.read_bytes()
    copy = PrivacyLedger.read(path)
    assert path.read_bytes() == before
    with PrivacyLedger.open(path) as ledger:
        assert ledger.events == copy.events
        assert ledger.num_releases == (5 if cut == 1 else 3) and len(ledger.warnings) == 1
        ledger.record(B, 7)
        total = ledger.num_releases
    assert PrivacyLedger.read(path).num_releases == total and not PrivacyLedger.read(path).warnings


@pytest.mark.parametrize("keep", [0, 1, 10])
def test_torn_header_is_an_empty_ledger(path, keep):
    fill(path)
    path.write_bytes(path.read_bytes()[:keep])
    with PrivacyLedger.open(path) as ledger:
        assert ledger.num_releases == 0
        ledger.record(A)
    assert PrivacyLedger.read(path).num_releases == 1


class FullDisk:
    """os.write that stores only the first `keep` bytes, then reports a full disk, until `healed`."""

    def __init__(self, monkeypatch, keep):
        self.real, self.keep, self.healed = os.write, keep, False
        monkeypatch.setattr(os, "write", self)

    def __call__(self, fd, data):
        if self.healed:
            return self.real(fd, data)
        if self.keep:
            return self.real(fd, data if self.keep >= 10_000 else data[: min(self.keep, len(data) - 1)])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("first", [A, B])
@pytest.mark.parametrize("keep", [0, 1, 2, 20, 10_000])
def test_failed_writes_over_count(path, monkeypatch, first, keep):
    ledger = PrivacyLedger(path)
    ledger.record(A, 1)
    disk = FullDisk(monkeypatch, keep)
    if keep == 10_000:
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    for n in (1, 2):
        with pytest.raises(LedgerError, match="do not release"):
            ledger.record(first, 12)
        assert ledger.num_releases == 1 + 12 * n
    disk.healed = True
    if keep == 10_000:
        monkeypatch.setattr(os, "fsync", real)
    ledger.record(B, 5)
    ledger.record(B, 1)
    ledger.close()
    stored = PrivacyLedger.read(path)
    assert stored.num_releases >= 31
    if keep != 10_000:
        assert stored.events == ledger.events


def test_only_fsync_failing_is_a_failure_too(path, monkeypatch):
    ledger = PrivacyLedger(path)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(LedgerError):
        ledger.record(A)
    assert ledger.num_releases == 1


@pytest.mark.parametrize(
    "line",
    ['{"event": 1, "count": 2}', "0", "-3", "1.5", "true", "null", "", "NaN", '"x"', "[1]", '{"count": 1}', "1e3"],
)
def test_damage_in_the_middle_is_refused_untouched(path, line):
    fill(path, (A, 3), (B, 2))
    lines = path.read_text().splitlines()
    lines.insert(2, line)
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    for load in (PrivacyLedger.open, PrivacyLedger.read):
        with pytest.raises(LedgerError, match="line 3"):
            load(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["hello\n", "{}\n", '{"dptrain_ledger": true}\n', '{"dptrain_ledger": 0}\n', "[" * 99999 + "\n", "x"])
def test_foreign_files(path, text):
    path.write_text(text)
    with pytest.raises(LedgerError, match="line 1"):
        PrivacyLedger.open(path)
    assert path.read_text() == text


def test_newer_version(path):
    path.write_text('{"dptrain_ledger": 3}\n')
    with pytest.raises(LedgerError, match="upgrade"):
        PrivacyLedger.open(path)


OTHERS = [CappedGaussian(1.0, 0.01, 1000, 30), FixedSizeGaussian(1.0, 1000, 10), Tuning([(A, 10), (B, 2)], 20, "poisson")]


@pytest.mark.parametrize("other", OTHERS)
def test_other_kinds(path, other):
    fill(path, (A, 3))
    with PrivacyLedger.open(path) as ledger:
        ledger.record(other, 2)
        ledger.record(other)
        ledger.record(A)
    with PrivacyLedger.open(path) as ledger:
        assert ledger.events == ((A, 3), (other, 3), (A, 1)) and not ledger.warnings
        ledger.record(other)
    assert PrivacyLedger.read(path).num_releases == 8


@pytest.mark.parametrize("other", OTHERS)
def test_other_kinds_do_not_go_into_the_old_format(path, other):
    path.write_text('{"dptrain_ledger": 1}\n' + json.dumps({"event": A.to_dict(), "count": 3}) + "\n")
    with PrivacyLedger.open(path) as ledger, pytest.raises(LedgerError, match="begin a new ledger"):
        ledger.record(other, 2)
    assert PrivacyLedger.read(path).events == ((A, 3),)


@pytest.mark.parametrize("other", OTHERS)
def test_other_kinds_in_the_old_format_are_damage(path, other):
    path.write_text('{"dptrain_ledger": 1}\n' + json.dumps({"event": A.to_dict(), "count": 3}) + "\n")
    with path.open("a") as file:
        file.write(json.dumps({"event": other.to_dict(), "count": 1}) + "\n" + "2\n")
    with pytest.raises(LedgerError, match="line 3"):
        PrivacyLedger.open(path)


def test_a_replaced_file_is_not_written(path, tmp_path):
    ledger = PrivacyLedger(path)
    os.replace(path, tmp_path / "moved")
    path.write_text("something else")
    with pytest.raises(LedgerError, match="removed or replaced"):
        ledger.record(OTHERS[0])
    assert path.read_text() == "something else" and ledger.num_releases == 1
    ledger.close()


def test_second_writer_in_this_and_another_process(path):
    ledger = PrivacyLedger(path)
    ledger.record(A, 2)
    with pytest.raises(LedgerError, match="holds it open"):
        PrivacyLedger.open(path)
    code = "import sys; from accounting import *; PrivacyLedger.open(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "holds it open" in result.stderr
    assert PrivacyLedger.read(path).num_releases == 2
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.record(A)
    del ledger
    forgotten = PrivacyLedger.open(path)
    del forgotten  # releases the lock
    PrivacyLedger.open(path).close()


def test_existing_missing_and_unwritable_paths(path, tmp_path):
    fill(path)
    with pytest.raises(LedgerError, match="already exists"):
        PrivacyLedger(path)
    with pytest.raises(LedgerError, match="cannot be opened"):
        PrivacyLedger.open(tmp_path / "none")
    with pytest.raises(LedgerError, match="cannot be created"):
        PrivacyLedger(tmp_path / "no" / "such" / "directory")
    with pytest.raises(LedgerError):
        PrivacyLedger.open(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LedgerError, match="cannot be created"):
        PrivacyLedger(tmp_path / "ledger.jsonl")


@pytest.mark.parametrize("count", [-1, 1.0, True, "1", None])
def test_bad_counts_and_events(count):
    ledger = PrivacyLedger()
    with pytest.raises(AccountingError, match="count"):
        ledger.record(A, count)
    with pytest.raises(AccountingError, match="event"):
        ledger.record((1.0, 0.1))
    for bad in (3, "", b"x"):
        with pytest.raises(LedgerError, match="path"):
            PrivacyLedger(bad)
    assert ledger.num_releases == 0


# ---- facts, runs and seals -------------------------------------------------------------------------------------------

FACTS = {"relation": "add_remove", "num_examples": 60, "data": "digits"}
OLD = b'{"dptrain_ledger": 1}\n{"event": {"kind": "sampled_gaussian", "noise_multiplier": 1.0, "sample_rate": 0.01}, "count": 3}\n2\n'


def test_facts_must_agree(path):
    PrivacyLedger(path, facts=FACTS).close()
    assert PrivacyLedger.read(path).facts == FACTS
    for facts in (FACTS, None):
        PrivacyLedger.open(path, facts=facts).close()
    before = path.read_bytes()
    for change in ({"num_examples": 61}, {"relation": "replace_one"}, {"run": "x"}):
        with pytest.raises(LedgerError, match=f"was made for something else .*{next(iter(change))}"):
            PrivacyLedger.open(path, facts={**FACTS, **change})
    with pytest.raises(LedgerError, match="data 'digits', here None"):
        PrivacyLedger.open(path, facts={k: v for k, v in FACTS.items() if k != "data"})
    ledger = PrivacyLedger.read(path)
    ledger.check_facts({"num_examples": 60, "something": 1})
    with pytest.raises(LedgerError, match="num_examples 60, here 61"):
        ledger.check_facts({"num_examples": 61})
    assert path.read_bytes() == before


def test_a_ledger_without_facts_is_no_ledger_of_a_data_set(path):
    fill(path, (A, 1))
    with pytest.raises(LedgerError, match="relation None, here 'add_remove'"):
        PrivacyLedger.open(path, facts=FACTS)


@pytest.mark.parametrize("facts", [{"a": 1.5}, {"a": True}, {"a": None}, {1: "a"}, [("a", 1)], {"a": "x" * 5000}])
def test_facts_that_are_none(path, facts):
    with pytest.raises(LedgerError, match="facts"):
        PrivacyLedger(path, facts=facts)
    assert not path.exists()


def test_runs_are_told_apart(path):
    with PrivacyLedger(path, facts=FACTS, run="one") as ledger:
        ledger.record(A, 2)
        ledger.record(B)
    with PrivacyLedger.open(path, run="two") as ledger:
        ledger.record(B, 5)
    with PrivacyLedger.open(path) as ledger:
        ledger.record(B, 7)
    with PrivacyLedger.open(path, facts=FACTS, run="one") as ledger:
        ledger.record(B)
        assert ledger.events_of("one") == ((A, 2), (B, 2))
    copy = PrivacyLedger.read(path)
    assert (copy.events_of("one"), copy.events_of("two"), copy.events_of(None)) == (((A, 2), (B, 2)), ((B, 5),), ((B, 7),))
    assert (copy.run_names, copy.events_of("three"), copy.count(B)) == (("one", "two", None), (), 14)
    assert copy.events == ((A, 2), (B, 14))


@pytest.mark.parametrize("facts", [None, FACTS])
def test_every_truncation_of_a_file_is_a_ledger_that_can_be_continued(path, facts):
    lengths = []
    with PrivacyLedger(path, facts=facts, run="one") as ledger:
        for event, count in ((A, 1), (A, 12), (B, 3), (A, 1)):
            ledger.record(event, count)
            lengths.append((os.path.getsize(path), ledger.num_releases))
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        written = max((n for size, n in lengths if size <= cut), default=0)
        with PrivacyLedger.open(path, facts=facts or {}, run="two") as ledger:
            assert written <= ledger.num_releases <= 17
            ledger.record(B)
        again = PrivacyLedger.read(path)
        assert (again.num_releases, again.facts, again.warnings) == (ledger.num_releases, facts or {}, ())


def test_every_flipped_bit_is_an_error_or_costs_nothing(path):
    """In the last byte alone, the newline, a flip makes a torn line that is counted or dropped; the file was not written so."""
    fill(path, (A, 1), (A, 12), (B, 3))
    whole = path.read_bytes()
    for position in range(len(whole) - 1):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(LedgerError):
                PrivacyLedger.read(path)


def test_lines_that_are_lost_or_have_changed_places_are_noticed(path):
    fill(path, (A, 1), (B, 1), (A, 2), (B, 2))
    header, *lines = path.read_bytes().splitlines(keepends=True)
    for order in ([1, 0, 2, 3], [0, 2, 1, 3], [0, 1, 3], [1, 2, 3], [0, 0, 1, 2, 3], [0, 1, 2, 3, 3]):
        path.write_bytes(header + b"".join(lines[i] for i in order))
        with pytest.raises(LedgerError, match="seal"):
            PrivacyLedger.read(path)


def test_a_file_of_format_1_is_continued_as_it_is(path):
    path.write_bytes(OLD + b'{"event": {"kind": "samp#torn\n')
    with PrivacyLedger.open(path) as ledger:
        assert ledger.events == ((A, 5),)
        ledger.record(A)
        ledger.record(B, 2)
    assert path.read_bytes().splitlines()[-2] == b"1"
    assert PrivacyLedger.read(path).events == ((A, 6), (B, 2))


def test_a_header_that_states_more_is_refused(path):
    for text in ('{"dptrain_ledger": 2, "colour": 1}', '{"dptrain_ledger": 2, "facts": []}', '{"dptrain_ledger": 2, "facts": {"a": 1.5}}'):
        path.write_text(text + "\n")
        with pytest.raises(LedgerError, match="line 1 is damaged"):
            PrivacyLedger.open(path)


@pytest.mark.parametrize("text", ['{"dptrain_ledger": 1}{"event": 1}', '{"dptrain_ledger": 2}{"event": 1}', '{"dptrain_ledger": 3'])
def test_a_file_that_lost_its_newlines_is_not_an_empty_ledger(path, text):
    path.write_text(text)
    with pytest.raises(LedgerError, match="line 1"):
        PrivacyLedger.open(path)


def test_a_file_that_was_removed_or_replaced_takes_no_release(path):
    with PrivacyLedger(path) as ledger:
        ledger.record(A)
        path.unlink()
        with pytest.raises(LedgerError, match="removed or replaced"):
            ledger.record(A)
        PrivacyLedger(path).close()
        with pytest.raises(LedgerError, match="removed or replaced"):
            ledger.record(A)


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_a_device_is_no_ledger(device):
    with pytest.raises(LedgerError, match="is not a file"):
        PrivacyLedger.open(device)
    with pytest.raises(LedgerError, match="not a file"):
        PrivacyLedger.read(device)


def test_a_pipe_is_no_ledger(path):
    os.mkfifo(path)
    with pytest.raises(LedgerError, match="is not a file"):
        PrivacyLedger.open(path)
    with pytest.raises(LedgerError, match="not a file"):
        PrivacyLedger.read(path)


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_an_interrupt_inside_a_write_leaves_a_ledger_that_goes_on(path, monkeypatch, moment):
    """As a second Ctrl-C in a notebook, after which the same ledger object is used again."""
    ledger = PrivacyLedger(path, run="one")
    ledger.record(A)
    real = os.write

    def interrupted(fd, data):
        real(fd, data[: {"before": 0, "half": len(data) // 2, "after": len(data)}[moment]])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ledger.record(A, 3)
    monkeypatch.undo()
    ledger.record(B)
    ledger.close()
    assert PrivacyLedger.read(path).events == ledger.events == ((A, 4), (B, 1))


def test_counts_beyond_any_run_are_refused(path):
    with pytest.raises(AccountingError, match="cannot be accounted for"):
        PrivacyLedger().record(A, 10**13)
    path.write_bytes(OLD.replace(b": 3}", b": 1" + b"0" * 4000 + b"}"))
    with pytest.raises(LedgerError, match="line 2"):
        PrivacyLedger.read(path)
