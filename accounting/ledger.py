"""The privacy ledger: what has been released, on disk before the release happens.

After a crash the ledger may have counted a release that was never made; it never misses one that was. The file is JSON
lines and only ever grows: a header, then `{"event": {...}, "count": n}` for a new event or a bare integer `n` for
"n more of the same", so that a million steps take two megabytes and every write is one short append.

The one exception: before the first event that format 1 does not know (any but `SampledGaussian`), the digit in the header becomes
that of the newer format, so that an older dptrain refuses the file as a whole.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from accounting.errors import AccountingError, LedgerError, check_count
from accounting.events import Event, SampledGaussian
from accounting.kinds import event_from_dict

try:
    import fcntl as _fcntl
except ImportError:  # pragma: no cover - a platform without advisory locks
    _flock: Any = None
else:
    _flock = _fcntl

# Format 1 holds only SampledGaussian, format 3 every kind of event. 2 was never used: a header that is one too high stays an error.
_VERSION, _EXTENDED = 1, 3
_HEADER_KEY = "dptrain_ledger"
_HEADER, _EXTENDED_HEADER = (json.dumps({_HEADER_KEY: version}).encode() + b"\n" for version in (_VERSION, _EXTENDED))


class PrivacyLedger:
    """Counts releases, in memory or in an append-only file.

    Args:
      path: file to create and keep locked while open; None keeps the ledger in memory. An existing ledger is continued
        with `PrivacyLedger.open`, so that a forgotten file is never mistaken for a fresh budget.

    Raises:
      LedgerError: if the file exists, cannot be created, or is locked by another process.

    Guarantee: when `record` returns, the release is on disk (fsync); when it raises, the release is counted in memory
      all the same. Over-counting is possible, under-counting is not.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._runs: list[tuple[Event, int]] = []
        self._fd: int | None = None
        self._path: Path | None = None
        self._dirty = False
        self._pending: list[tuple[Event, int]] = []
        self._written: Event | None = None
        self._extended = False
        self._closed = False
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
        return sum(count for _, count in self._runs)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> PrivacyLedger:
        """Returns a copy of a ledger file in memory; takes no lock and does not modify the file.

        A torn last line is skipped (see `open`); while another process writes, this is a snapshot.
        """
        path = _check_path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise LedgerError(f"ledger {path}: cannot be read ({error.strerror}); check the path.") from error
        ledger = cls()
        ledger._load(data, str(path))
        return ledger

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PrivacyLedger:
        """Returns the ledger in `path`, locked and ready to continue.

        Raises:
          LedgerError: if the file is missing, locked, damaged (with the line number), foreign or of a newer version;
            nothing is written then.
        """
        ledger = cls()
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
            if keep < len(data):
                os.ftruncate(ledger._fd, keep)
                os.fsync(ledger._fd)
            if keep == 0:
                ledger._append(_HEADER)
            elif not complete:
                ledger._append(b"\n")
        except OSError as error:
            ledger.close()
            raise LedgerError(f"ledger {path}: cannot be repaired ({error.strerror}); free some space.") from error
        except BaseException:
            ledger.close()
            raise
        return ledger

    def _load(self, data: bytes, name: str) -> tuple[int, bool]:
        """Fills the ledger from a file's bytes; returns (bytes to keep, whether they end in a newline)."""
        if len(data) < len(_HEADER) and _HEADER.startswith(data):
            # Creation was interrupted inside the header: nothing can have been recorded yet.
            self.warnings += (f"ledger {name}: the header was incomplete; the ledger is empty.",)
            return 0, True
        lines = data.split(b"\n")
        tail = lines.pop()
        if not lines:
            raise LedgerError(f"ledger {name}: line 1 is not a dptrain ledger header; this is another kind of file.")
        self._extended = _check_header(lines[0], name) == _EXTENDED
        event: Event | None = None
        for number, line in enumerate(lines[1:], start=2):
            try:
                event, count = _parse(line, event, self._extended)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if line.endswith(_TORN):
                    continue  # a failed append, closed by the process that saw it fail; it counted the release again
                raise LedgerError(
                    f"ledger {name}: line {number} is damaged ({error}); restore the file from a copy, or account for"
                    " the run with the number of steps it was planned for."
                ) from error
            self._extend(event, count)
        self._written = event
        if not tail:
            return len(data), True
        # No newline: `record` had not returned when the writer died, so the release did not happen. If the fragment
        # reads as a whole line we count it all the same (it may be the line without its newline): over-count, never
        # under-count. If it does not, it says nothing that could be counted, and keeping it would spoil the next line.
        try:
            event, count = _parse(tail, event, self._extended)
        except (ValueError, KeyError, TypeError, RecursionError):
            self.warnings += (f"ledger {name}: an incomplete last line ({len(tail)} bytes) was dropped.",)
            return len(data) - len(tail), True
        self._extend(event, count)
        self._written = event
        self.warnings += (f"ledger {name}: the last line had no newline and was counted.",)
        return len(data), False

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
        if self._closed:
            raise LedgerError(f"ledger {self._path}: is closed; continue it with PrivacyLedger.open(path).")
        if count == 0:
            return
        self._extend(event, count)
        if self._path is None:
            return
        if self._fd is None:
            raise LedgerError(f"ledger {self._path}: is not open for writing; use PrivacyLedger.open(path).")
        if event == self._written and not self._dirty:
            line: str = str(count)
        else:
            line = json.dumps({"event": event.to_dict(), "count": count})
        payload = line.encode() + b"\n"
        if self._dirty:
            # The last append failed and may have left a fragment: close it with a mark that the loader knows, so that
            # it neither glues to this line nor passes for a line of its own. What it counted is written out again.
            payload = _TORN + b"\n" + self._unwritten() + payload
        try:
            if not self._extended and any(not isinstance(e, SampledGaussian) for e, _ in [*self._pending, (event, count)]):
                self._extend_format()
            self._append(payload)
        except OSError as error:
            self._dirty = True
            self._pending.append((event, count))
            raise LedgerError(
                f"ledger {self._path}: the release could not be written ({error.strerror}); do not release: free disk"
                " space or fix the permissions, then record again (it stays counted)."
            ) from error
        self._dirty = False
        self._pending = []
        self._written = event

    def _unwritten(self) -> bytes:
        """Returns the lines of releases counted in memory whose append failed."""
        lines = (json.dumps({"event": e.to_dict(), "count": n}) for e, n in self._pending)
        return b"".join(line.encode() + b"\n" for line in lines)

    def _extend_format(self) -> None:
        """Changes the header, of the same length, to the format that holds every kind; raises OSError if it did not reach the disk."""
        assert self._path is not None and self._fd is not None
        # A descriptor opened for appending would write at the end. The file must be the locked one, even if another has its name now.
        fd = os.open(self._path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        try:
            if not os.path.sameopenfile(fd, self._fd):
                raise OSError(116, "the file was replaced")
            if os.write(fd, _EXTENDED_HEADER) != len(_EXTENDED_HEADER):
                raise OSError(28, "only part of the header was written")
            os.fsync(fd)
        finally:
            os.close(fd)
        self._extended = True

    def _extend(self, event: Event, count: int) -> None:
        if self._runs and self._runs[-1][0] == event:
            self._runs[-1] = (event, self._runs[-1][1] + count)
        elif count:
            self._runs.append((event, count))

    def _append(self, payload: bytes) -> None:
        """Writes with one system call and waits for the disk; raises OSError if any of it did not get there."""
        assert self._fd is not None
        written = os.write(self._fd, payload)
        if written != len(payload):
            raise OSError(28, "only part of the line was written")
        os.fsync(self._fd)

    def _create(self) -> None:
        assert self._path is not None
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
            self._append(_HEADER)
            # Without this the file itself could vanish with the machine, and with it everything spent.
            directory = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            self.close()
            raise LedgerError(f"ledger {self._path}: cannot be written ({error.strerror}); free some space.") from error

    def _lock(self) -> None:
        if _flock is None:  # pragma: no cover - a platform without advisory locks
            return
        assert self._fd is not None
        try:
            _flock.flock(self._fd, _flock.LOCK_EX | _flock.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise LedgerError(
                f"ledger {self._path}: another process (or another ledger object) holds it open for writing; close that"
                " one first, or use PrivacyLedger.read(path) to look at it."
            ) from None

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


# Ends a line that a failed append left behind. Not JSON, and no event line contains it.
_TORN = b"#torn"


def _check_path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not str(path):
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


def _check_header(line: bytes, name: str) -> int:
    """Returns the format that the header announces; raises LedgerError if it is not one that is known."""
    try:
        header = _json(line)
    except (ValueError, RecursionError):
        header = None
    version = header.get(_HEADER_KEY) if isinstance(header, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise LedgerError(f"ledger {name}: line 1 is not a dptrain ledger header; this is another kind of file.")
    if version not in (_VERSION, _EXTENDED):
        raise LedgerError(
            f"ledger {name}: line 1 announces format {version}, this dptrain knows {_VERSION} and {_EXTENDED}; upgrade dptrain."
        )
    return version


def _parse(line: bytes, previous: Event | None, extended: bool) -> tuple[Event, int]:
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
    return event, count
