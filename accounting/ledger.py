"""The privacy ledger: what has been released, on disk before the release happens.

After a crash the ledger may have counted a release that was never made; it never misses one that was. The file is JSON
lines and only ever grows: a header, then `{"event": {...}, "count": n}` for a new event or a bare integer `n` for
"n more of the same", each with a seal (`ledger_format.py`), so that a million steps take eleven megabytes and every write is one
short append. Runs that share a ledger say who they are with `{"run": name}` in front of what they release.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from accounting.errors import AccountingError, LedgerError, check_count
from accounting.events import Event, SampledGaussian
from accounting.kinds import event_from_dict
from accounting.ledger_format import PLAIN, SEALED, Facts, check_facts, compare, header, parse_header, sealed, torn_header, unsealed

try:
    import fcntl as _fcntl
except ImportError:  # pragma: no cover - a platform without advisory locks
    _flock: Any = None
else:
    _flock = _fcntl

_MOST = 10**12  # releases in one line; no accountant speaks of more


class _Disk(NamedTuple):
    """What is known to be on disk; replaced as a whole, so that an interrupt cannot leave half of a change.

    Args:
      size: bytes of whole lines.
      chain: of their seals; None in a file without seals.
      event: of the last release.
      writer: who made it.
      pending: releases counted in memory whose append has not succeeded.
    """

    size: int = 0
    chain: int | None = None
    event: Event | None = None
    writer: str | None = None
    pending: tuple[tuple[Event, int], ...] = ()


class PrivacyLedger:
    """Counts releases, in memory or in an append-only file.

    Args:
      path: file to create and keep locked while open; None keeps the ledger in memory. An existing ledger is continued
        with `PrivacyLedger.open`, so that a forgotten file is never mistaken for a fresh budget.
      facts: public facts that everybody who continues the file must agree on, such as the neighbouring relation (events are in units
        of its sensitivity) and the number of examples.
      run: who records from now on, where several share the file.

    Raises:
      LedgerError: if the file exists, cannot be created, or is locked by another process.

    Guarantee: when `record` returns, the release is on disk (fsync); when it raises, the release is counted in memory
      all the same. Over-counting is possible, under-counting is not.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, facts: Facts | None = None, run: str | None = None) -> None:
        self._runs: list[tuple[Event, int]] = []
        self._totals: dict[Event, int] = {}
        self._shares: dict[str | None, dict[Event, int]] = {}
        self._fd: int | None = None
        self._path: Path | None = None
        self._disk = _Disk()
        self._closed = False
        self._facts = check_facts(facts or {})
        self.run = run
        self.warnings: tuple[str, ...] = ()
        if path is not None:
            self._path = _check_path(path)
            self._create()

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path | None:
        """The file, or None for a ledger in memory."""
        return self._path

    @property
    def events(self) -> tuple[tuple[Event, int], ...]:
        """(event, count) pairs in the order of release; consecutive equal events are one pair."""
        return tuple(self._runs)

    @property
    def num_releases(self) -> int:
        """Number of releases counted."""
        return sum(self._totals.values())

    @property
    def facts(self) -> dict[str, str | int]:
        """The facts in the header; empty for a ledger that states none."""
        return dict(self._facts)

    @property
    def run_names(self) -> tuple[str | None, ...]:
        """Who has recorded; None stands for whoever did not say."""
        return tuple(self._shares)

    def count(self, event: Event) -> int:
        """Returns the number of releases of one event."""
        return self._totals.get(event, 0)

    def events_of(self, run: str | None) -> tuple[tuple[Event, int], ...]:
        """Returns (event, count) pairs of what one run has recorded."""
        return tuple(self._shares.get(run, {}).items())

    def check_facts(self, facts: Facts) -> None:
        """Refuse a user for whom the facts are others; facts that the header does not state are not compared.

        Raises:
          LedgerError: naming every difference.
        """
        compare(self._facts, {key: value for key, value in facts.items() if key in self._facts}, str(self._path))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> PrivacyLedger:
        """Returns a copy of a ledger file in memory; takes no lock and does not modify the file.

        A torn last line is skipped (see `open`); while another process writes, this is a snapshot.
        """
        path = _check_path(path)
        try:
            if path.exists() and not path.is_file():  # a device or a pipe might never end
                raise OSError(errno.EINVAL, "not a file")
            data = path.read_bytes()
        except OSError as error:
            raise LedgerError(f"ledger {path}: cannot be read ({error.strerror}); check the path.") from error
        ledger = cls()
        ledger._load(data, str(path))
        return ledger

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, facts: Facts | None = None, run: str | None = None) -> PrivacyLedger:
        """Returns the ledger in `path`, locked and ready to continue.

        Args:
          path: the file.
          facts: what its header must state, no more and no less; None takes any.
          run: who records from now on, where several share the file.

        Raises:
          LedgerError: if the file is missing, locked, damaged (with the line number), foreign, of a newer version or made with other
            facts; nothing is written then.
        """
        ledger = cls(facts=facts, run=run)
        ledger._path = path = _check_path(path)
        try:
            ledger._fd = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise LedgerError(
                f"ledger {path}: cannot be opened for writing ({error.strerror}); create a new one with"
                " PrivacyLedger(path), or use PrivacyLedger.read(path) to look at it."
            ) from error
        try:
            ledger._lock()
            data = _read_all(ledger._fd)
            keep, complete = ledger._load(data, str(path))
            if facts is not None and keep:
                compare(ledger._facts, facts, str(path), exactly=True)
            if keep < len(data):
                os.ftruncate(ledger._fd, keep)
                os.fsync(ledger._fd)
            ledger._disk = ledger._disk._replace(size=keep)
            if keep == 0:
                ledger._start()
            elif not complete:
                ledger._append(b"\n")
                ledger._disk = ledger._disk._replace(size=keep + 1)
        except OSError as error:
            ledger.close()
            raise LedgerError(f"ledger {path}: cannot be repaired ({error.strerror}); free some space.") from error
        except BaseException:
            ledger.close()
            raise
        return ledger

    def _load(self, data: bytes, name: str) -> tuple[int, bool]:
        """Fills the ledger from a file's bytes; returns (bytes to keep, whether they end in a newline)."""
        if torn_header(data):
            self.warnings += (f"ledger {name}: the header was incomplete; the ledger is empty.",)
            return 0, True
        lines = data.split(b"\n")
        tail = lines.pop()
        if not lines:
            raise LedgerError(f"ledger {name}: line 1 is not a dptrain ledger header; this is another kind of file.")
        version, self._facts = parse_header(lines[0], name)
        self._disk = _Disk(chain=zlib.crc32(lines[0]) if version >= SEALED else None)
        for number, line in enumerate(lines[1:], start=2):
            try:
                self._take(line)
            except _MALFORMED as error:
                if version == PLAIN and line.endswith(_TORN):
                    continue  # a failed append, closed by the process that saw it fail; it counted the release again
                raise LedgerError(
                    f"ledger {name}: line {number} is damaged ({error}); restore the file from a copy, or account for"
                    " the run with the number of steps it was planned for."
                ) from error
        if not tail:
            return len(data), True
        # No newline: `record` had not returned when the writer died, so the release did not happen. If the fragment
        # reads as a whole line we count it all the same (it may be the line without its newline): over-count, never
        # under-count. If it does not, it says nothing that could be counted, and keeping it would spoil the next line.
        try:
            self._take(tail)
        except _MALFORMED:
            self.warnings += (f"ledger {name}: an incomplete last line ({len(tail)} bytes) was dropped.",)
            return len(data) - len(tail), True
        self.warnings += (f"ledger {name}: the last line had no newline and was counted.",)
        return len(data), False

    def _take(self, line: bytes) -> None:
        """Takes in one line of a file; raises one of _MALFORMED, and takes in nothing, if it is not one."""
        disk = self._disk
        if disk.chain is not None:
            line, chain = unsealed(line, disk.chain)
            disk = disk._replace(chain=chain)
        if line.startswith(_RUN):
            self._disk = disk._replace(writer=_parse_run(line))
        else:
            event, count = _parse(line, disk.event, extended=disk.chain is not None)
            self._extend(event, count, disk.writer)
            self._disk = disk._replace(event=event)

    # -- writing ------------------------------------------------------------------------------------------------------

    def record(self, event: Event, count: int = 1) -> None:
        """Counts `count` releases of `event`; call it BEFORE releasing.

        Args:
          event: what is about to be released.
          count: number of releases, >= 0.

        Raises:
          LedgerError: if the ledger is closed or the line did not reach the disk. The releases are counted in memory
            even then: do not release, and do not retry unless the release is to be counted twice.
        """
        if not isinstance(event, Event):
            raise AccountingError(f"PrivacyLedger.record: event must be an event such as SampledGaussian, got {event!r}.")
        count = check_count(count, "count", where="PrivacyLedger.record")
        if count > _MOST:
            raise AccountingError(f"PrivacyLedger.record: a count above {_MOST:g} cannot be accounted for; check it.")
        if self._closed:
            raise LedgerError(f"ledger {self._path}: is closed; continue it with PrivacyLedger.open(path).")
        if count == 0:
            return
        if self._fd is not None and self._disk.chain is None and not isinstance(event, SampledGaussian):
            raise LedgerError(
                f"ledger {self._path}: has format 1, which holds releases on Poisson samples alone; do not release: begin a new ledger,"
                " with what this one holds recorded first."
            )
        self._extend(event, count, self.run)
        if self._path is None:
            return
        if self._fd is None:
            raise LedgerError(f"ledger {self._path}: is not open for writing; use PrivacyLedger.open(path).")
        disk = self._disk
        self._disk = disk = disk._replace(pending=(*disk.pending, (event, count)))
        try:
            if len(disk.pending) > 1:  # the last append failed, or was interrupted, and may have left a fragment
                os.ftruncate(self._fd, disk.size)
            payload, chain = self._lines()
            self._append(payload)
        except OSError as error:
            raise LedgerError(
                f"ledger {self._path}: the release could not be written ({error.strerror}); do not release: free disk"
                " space or fix the permissions, then record again (it stays counted)."
            ) from error
        self._disk = _Disk(disk.size + len(payload), chain, event, self.run)

    def _lines(self) -> tuple[bytes, int | None]:
        """Returns the lines of all pending releases, and the chain after them."""
        disk = self._disk
        found: list[bytes] = []
        if disk.writer != self.run:
            found.append(json.dumps({"run": self.run}).encode())
        written = disk.event
        for event, count in disk.pending:
            text = str(count) if event == written else json.dumps({"event": event.to_dict(), "count": count})
            found.append(text.encode())
            written = event
        if disk.chain is None:
            return b"".join(line + b"\n" for line in found), None
        chain = disk.chain
        for index, line in enumerate(found):
            found[index], chain = sealed(line, chain)
        return b"".join(found), chain

    def _extend(self, event: Event, count: int, run: str | None) -> None:
        share = self._shares.setdefault(run, {})
        share[event] = share.get(event, 0) + count
        self._totals[event] = self._totals.get(event, 0) + count
        if self._runs and self._runs[-1][0] == event:
            self._runs[-1] = (event, self._runs[-1][1] + count)
        elif count:
            self._runs.append((event, count))

    def _append(self, payload: bytes) -> None:
        """Writes with one system call and waits for the disk; raises OSError if any of it did not get there."""
        assert self._fd is not None
        mine = os.fstat(self._fd)
        with suppress(FileNotFoundError):  # moved, perhaps with its directory: it is still there
            if self._path is not None and not os.path.samestat(mine, os.stat(self._path)):
                raise OSError(errno.ESTALE, "the file was removed or replaced")
        if mine.st_nlink == 0:  # written to a file without a name, a release would be forgotten
            raise OSError(errno.ENOENT, "the file was removed or replaced")
        written = os.write(self._fd, payload)
        if written != len(payload):
            raise OSError(errno.ENOSPC, "only part of the line was written")
        os.fsync(self._fd)

    def _start(self) -> None:
        """Writes the header."""
        line = header(self._facts)
        self._append(line)
        self._disk = _Disk(len(line), zlib.crc32(line[:-1]))

    def _create(self) -> None:
        assert self._path is not None
        header(self._facts)  # refuses what does not fit before the file exists
        try:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
            self._fd = os.open(self._path, flags, 0o644)
        except FileExistsError:
            raise LedgerError(
                f"ledger {self._path}: already exists; continue it with PrivacyLedger.open(path) or choose a new path."
            ) from None
        except OSError as error:
            raise LedgerError(f"ledger {self._path}: cannot be created ({error.strerror}); choose a writable directory.") from error
        try:
            self._lock()
            if os.fstat(self._fd).st_size:  # another process was quicker to open it
                raise LedgerError(f"ledger {self._path}: already exists; continue it with PrivacyLedger.open(path).")
            self._start()
            # Without this the file itself could vanish with the machine, and with it everything spent.
            directory = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            self.close()
            raise LedgerError(f"ledger {self._path}: cannot be written ({error.strerror}); free some space.") from error
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        """Locks the open file, and makes sure that it is the one the path names."""
        assert self._fd is not None
        if _flock is not None:
            try:
                _flock.flock(self._fd, _flock.LOCK_EX | _flock.LOCK_NB)
            except BlockingIOError:
                raise LedgerError(
                    f"ledger {self._path}: another process (or another ledger object) holds it open for writing; close that"
                    " one first, or use PrivacyLedger.read(path) to look at it."
                ) from None
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            raise LedgerError(f"ledger {self._path}: is not a file; releases recorded there would be lost. Choose another path.")
        if found.st_nlink == 0:
            raise LedgerError(f"ledger {self._path}: was removed or replaced while it was opened; try again.")

    # -- closing ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Releases the lock; what was counted stays readable. Safe to call twice."""
        self._closed = self._closed or self._path is not None
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def __enter__(self) -> PrivacyLedger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def __repr__(self) -> str:
        return f"PrivacyLedger(path={str(self._path) if self._path else None!r}, num_releases={self.num_releases})"


# Ends a line that a failed append left behind in a file of format 1. Not JSON, and no event line contains it.
_TORN = b"#torn"
_RUN = b'{"run":'
_MALFORMED = (ValueError, KeyError, TypeError, RecursionError)


def _check_path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not str(path) or "\0" in str(path):
        raise LedgerError(f"ledger: path must be a file name, got {path!r}; pass a str or a Path.")
    return Path(path)


def _read_all(fd: int) -> bytes:
    chunks = []
    while chunk := os.read(fd, 1 << 20):
        chunks.append(chunk)
    return b"".join(chunks)


def _json(line: bytes) -> Any:
    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not a number")

    return json.loads(line.decode("utf-8"), parse_constant=refuse)


def _parse_run(line: bytes) -> str | None:
    """Returns the run that a line names; raises ValueError or TypeError if it is not such a line."""
    value = _json(line)
    if set(value) != {"run"} or not isinstance(value["run"], str | None):
        raise ValueError("unknown fields")
    name: str | None = value["run"]
    return name


def _parse(line: bytes, previous: Event | None, *, extended: bool) -> tuple[Event, int]:
    """Returns the (event, count) a line stands for; raises ValueError, KeyError or TypeError if it is not one."""
    value = _json(line)
    if isinstance(value, dict):
        if set(value) != {"event", "count"}:
            raise ValueError("unknown fields")
        event: Event = event_from_dict(value["event"]) if extended else SampledGaussian.from_dict(value["event"])
        count = value["count"]
    elif previous is not None:
        event, count = previous, value
    else:
        raise ValueError("a repetition without an event")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError("a count that is not a positive integer")
    if count > _MOST:
        raise ValueError("a count beyond any run")
    return event, count
