"""The lines of a ledger file: a header with public facts, and a seal on every line after it.

A seal is a checksum over the line and all before it, so that a flipped digit, a lost line or two lines that changed places are an error
and not another epsilon. It guards against accidents; whoever may write the file can write another one.

Format 1 had neither facts nor seals; such files are read and continued as they are.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from accounting.errors import LedgerError

PLAIN, SEALED = 1, 2  # formats
KEY = "dptrain_ledger"
LONGEST_HEADER = 4096  # bytes

Facts = Mapping[str, str | int]


def header(facts: Facts | None) -> bytes:
    """Returns the first line of a new file, with its newline.

    Raises:
      LedgerError: unless every fact is a short string or an integer.
    """
    value: dict[str, Any] = {KEY: SEALED}
    if facts:
        value["facts"] = check_facts(facts)
    line = json.dumps(value).encode() + b"\n"
    if len(line) > LONGEST_HEADER:
        raise LedgerError(
            f"ledger: the facts of a header must fit into {LONGEST_HEADER} bytes, these take {len(line)}; shorten the data's name."
        )
    return line


def check_facts(facts: object) -> dict[str, str | int]:
    """Returns facts as a dict; raises LedgerError unless they map names to strings and integers."""
    if not isinstance(facts, Mapping) or not all(
        isinstance(k, str) and isinstance(v, str | int) and not isinstance(v, bool) for k, v in facts.items()
    ):
        raise LedgerError(f"ledger: facts must map names to strings and integers, got {facts!r}.")
    return dict(facts)


def compare(found: Facts, wanted: Facts, name: str, exactly: bool = False) -> None:
    """Refuse facts that differ.

    Args:
      found: those of the file.
      wanted: those of whoever opens it; only these are looked at.
      name: the file.
      exactly: whether the file may state no others.

    Raises:
      LedgerError: naming every difference.
    """
    keys = [*wanted, *(key for key in found if exactly and key not in wanted)]
    wrong = [f"{key} {found.get(key)!r}, here {wanted.get(key)!r}" for key in keys if found.get(key) != wanted.get(key)]
    if wrong:
        raise LedgerError(f"ledger {name}: was made for something else ({'; '.join(wrong)}); use the ledger of this data and relation.")


def parse_header(line: bytes, name: str) -> tuple[int, dict[str, str | int]]:
    """Returns the format and the facts that a header states.

    Raises:
      LedgerError: for another kind of file, and a newer format.
    """
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        value = None
    version = value.get(KEY) if isinstance(value, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise LedgerError(f"ledger {name}: line 1 is not a dptrain ledger header; this is another kind of file.")
    if version > SEALED:
        raise LedgerError(f"ledger {name}: line 1 announces format {version}, this dptrain knows up to {SEALED}; upgrade dptrain.")
    facts = value.get("facts", {})
    # Written anew, a sound header is the same line: anything else in it would be lost, or is damage.
    if version == SEALED and (not isinstance(facts, dict) or header_or_none(facts) != line + b"\n"):
        raise LedgerError(f"ledger {name}: line 1 is damaged; restore the file from a copy.")
    return version, facts if version == SEALED else {}


def header_or_none(facts: object) -> bytes | None:
    """Returns the header with these facts, or None if there is no such."""
    try:
        return header(check_facts(facts))
    except LedgerError:
        return None


def torn_header(data: bytes) -> bool:
    """Returns whether a file's creation was interrupted inside the header, so that nothing can have been recorded."""
    if b"\n" in data or len(data) >= LONGEST_HEADER:
        return False
    start = {PLAIN: f'{{"{KEY}": {PLAIN}}}', SEALED: f'{{"{KEY}": {SEALED}'}
    if any(text.encode().startswith(data) for text in start.values()):
        return True
    if not data.startswith(start[SEALED].encode()):
        return False
    text = data.decode("utf-8", errors="replace")
    try:  # a whole header, with something behind it or not: only in the second case has nothing been recorded
        return json.JSONDecoder().raw_decode(text)[1] == len(text)
    except (ValueError, RecursionError):
        return text.startswith(start[SEALED] + ', "facts": {'[: max(0, len(text) - len(start[SEALED]))])


def sealed(line: bytes, chain: int) -> tuple[bytes, int]:
    """Returns a line with its seal and newline, and the chain after it."""
    chain = zlib.crc32(line, chain)
    return line + b" %08x\n" % chain, chain


def unsealed(line: bytes, chain: int) -> tuple[bytes, int]:
    """Returns what a line holds, and the chain after it; raises ValueError if its seal does not fit."""
    content, space, seal = line.rpartition(b" ")
    after = zlib.crc32(content, chain)
    if not space or seal != b"%08x" % after:
        raise ValueError("its seal does not fit")
    return content, after
