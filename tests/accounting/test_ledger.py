"""The ledger never under-counts: torn lines, killed processes, full disks, second writers, foreign files."""

from __future__ import annotations

import errno
import json
import os
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
    assert json.loads(lines[0]) == {"dptrain_ledger": 1}
    assert json.loads(lines[1]) == {"event": A.to_dict(), "count": 1}
    assert lines[2] == "2"
    with PrivacyLedger.open(path) as ledger:
        assert ledger.events == ((A, 3), (B, 3), (A, 1)) and not ledger.warnings
        ledger.record(A)
    assert path.read_text().splitlines()[-1] == "1"
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
    path.write_text('{"dptrain_ledger": 2}\n')
    with pytest.raises(LedgerError, match="upgrade"):
        PrivacyLedger.open(path)


OTHERS = [CappedGaussian(1.0, 0.01, 1000, 30), FixedSizeGaussian(1.0, 1000, 10), Tuning([(A, 10), (B, 2)], 20, "poisson")]


@pytest.mark.parametrize("other", OTHERS)
def test_other_kinds_change_the_format(path, other):
    fill(path, (A, 3))
    assert path.read_text().startswith('{"dptrain_ledger": 1}\n')
    with PrivacyLedger.open(path) as ledger:
        ledger.record(other, 2)
        ledger.record(other)
        ledger.record(A)
    # A header that an older dptrain refuses; the lines before it are as they were.
    assert path.read_text().startswith('{"dptrain_ledger": 3}\n{"event": {"kind": "sampled_gaussian"')
    with PrivacyLedger.open(path) as ledger:
        assert ledger.events == ((A, 3), (other, 3), (A, 1)) and not ledger.warnings
        ledger.record(other)
    assert PrivacyLedger.read(path).num_releases == 8


@pytest.mark.parametrize("other", OTHERS)
def test_other_kinds_in_the_old_format_are_damage(path, other):
    fill(path, (A, 3))
    with path.open("a") as file:
        file.write(json.dumps({"event": other.to_dict(), "count": 1}) + "\n" + "2\n")
    with pytest.raises(LedgerError, match="line 3"):
        PrivacyLedger.open(path)


@pytest.mark.parametrize("keep", [0, 1, 20, 10_000])
def test_a_failed_change_of_format_over_counts(path, monkeypatch, keep):
    ledger = PrivacyLedger(path)
    ledger.record(A, 1)
    disk = FullDisk(monkeypatch, keep)
    if keep == 10_000:
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(LedgerError, match="do not release"):
        ledger.record(OTHERS[0], 12)
    disk.healed = True
    if keep == 10_000:
        monkeypatch.setattr(os, "fsync", real)
    assert PrivacyLedger.read(path).num_releases >= 1
    ledger.record(B, 5)
    ledger.close()
    stored = PrivacyLedger.read(path)
    assert stored.num_releases >= 18 and (OTHERS[0], 12) in stored.events


def test_a_replaced_file_is_not_written(path, tmp_path):
    ledger = PrivacyLedger(path)
    os.replace(path, tmp_path / "moved")
    path.write_text("something else")
    with pytest.raises(LedgerError, match="was replaced"):
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
