"""The page of a comparison in a browser: headless Chromium by its own command line; skipped where there is none."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dptrain.comparison.report import save

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
)  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def row(strategy: str, measurement: str, **figures: Any) -> dict[str, Any]:
    return {
        "backend": "torch", "model": "cnn", "strategy": strategy, "batch": 64, "input": "32x32x3", "sweep": {}, "measurement": measurement,
        "threads": 2, "versions": {"torch": "2"}, "device": "a <machine>", **figures,
    }  # fmt: skip


ROWS = [
    row("non_private", "memory", total_mib=237.0),
    row("mixed_ghost", "time", plain_seconds=1.0, seconds=1.25, ratio=1.25, ratio_low=1.2, ratio_high=1.3),
    row("mixed_ghost", "memory", total_mib=300.0),
    row("theirs:quick", "time", unsupported="not installed; " + "a very long way to get it " * 10),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    save(ROWS, folder)
    return folder / "index.html"


def shown(page: Path, width: int) -> tuple[str, bytes]:
    """The document after layout and a screenshot, in a window of that width; nothing may be complained of.

    A script, added to a copy, puts the width that the layout came to into the title.
    """
    copy, shot = page.with_name(f"copy{width}.html"), page.with_name(f"{width}.png")
    probe = "<script>document.title = [document.documentElement.scrollWidth, innerWidth].join(' ')</script></body>"
    copy.write_text(page.read_text().replace("</body>", probe))
    folder = f"--user-data-dir={page.parent / 'profile'}"
    command = [str(CHROMIUM), *QUIET, folder, f"--window-size={width},900", "--dump-dom", f"--screenshot={shot}", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, shot.read_bytes()


@pytest.mark.parametrize("width", [1280, 500])  # Chromium lays out no narrower window
def test_a_browser_shows_table_and_plot_within_its_window(page: Path, width: int) -> None:
    dom, shot = shown(page, width)
    text = re.sub(r"<[^>]+>", "\n", dom)
    for expected in ("non_private", "1.25 (1.20 to 1.30)", "theirs:quick", "a very long way to get it", "a &lt;machine&gt;"):
        assert expected in text
    assert len(re.findall(r"<tr>", dom)) == 4
    assert re.search(r"<svg[^>]*>.*<path", dom, re.DOTALL)
    assert struct.unpack(">II", shot[16:24]) == (width, 900)
    found = re.search(r"<title>(\d+) (\d+)</title>", dom)
    assert found and int(found[1]) <= int(found[2]) == width, "the page scrolls sideways; only table and plot should"


def test_the_page_needs_nothing_outside_itself(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|@import|url\((?!["']?#)""", text)
