"""What the fuzz tests share: two lengths of every test, and ways to damage a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# Every test runs shortly with fixed examples, and at length with fresh ones: make fuzz.
LENGTHS = pytest.mark.parametrize("length", [1, pytest.param(40, marks=pytest.mark.slow)])


def fuzz(check: Callable[..., Any], *strategies: SearchStrategy[Any], examples: int, length: int) -> None:
    """Run a check on examples; those of the short length are the same every time."""
    profile = settings(
        max_examples=examples * length, deadline=None, derandomize=length == 1, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def attempt(arguments: tuple[Any, ...]) -> None:
        check(*arguments)

    profile(given(st.tuples(*strategies))(attempt))()


def one_sentence(error: Exception) -> None:
    """An error of ours is one line, which says something."""
    assert str(error).strip()
    assert "\n" not in str(error)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes changed, cut out, repeated, put in, or cut off; or lines that have changed places."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        to = min(len(content), at + draw(st.integers(1, 12)))
        match draw(st.sampled_from(["flip", "cut", "repeat", "put", "truncate", "digit", "shuffle", "drop"])):
            case "flip" if content:
                place = min(at, len(content) - 1)
                content = content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
            case "cut":
                content = content[:at] + content[to:]
            case "repeat":
                content = content[:to] + content[at:to] * draw(st.integers(1, 3)) + content[to:]
            case "put":
                content = content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
            case "truncate":
                content = content[:at]
            case "digit":
                places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
                if places:
                    place = draw(st.sampled_from(places))
                    content = content[:place] + draw(st.sampled_from([b"0", b"9", b"-1", b"1e9", b"NaN"])) + content[place + 1 :]
            case "shuffle":
                content = b"".join(draw(st.permutations(content.splitlines(keepends=True)[:12])))
            case "drop":
                lines = content.splitlines(keepends=True)
                content = b"".join(lines[: at % (len(lines) + 1)] + lines[at % (len(lines) + 1) + 1 :])
    return content
