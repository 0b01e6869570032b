"""The page of a report: well-formed, accessible, self-contained; and in headless Chromium, offline, from a phone to a desk."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dptrain
from dptrain.reporting.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Series, legend, line_chart, linear
from dptrain.reporting.page import TEMPLATE
from tests.core.report_runs import make_run
from tests.core.shared import EXAMPLES

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Pages of a run, compared with others, of a void one and of a non-private one."""
    folder = tmp_path_factory.mktemp("pages")
    long = {"sampling": {"sample_rate": 0.2, "steps": 40}}
    runs = {
        "private": make_run(
            folder / "a-long-name" / "private", complete=True, data={"name": "npz", "path": HOSTILE}, layer=HOSTILE, **long
        ),
        "void": make_run(folder / "void", complete=True, privacy={"noise_multiplier": 1.0, "unsafe_seed": 7}, **long),
        "plain": make_run(folder / "plain", complete=True, strategy="non_private"),
    }
    dptrain.report(*runs.values(), out=folder / "out")
    return {name: folder / "out" / name / "report.html" for name in runs}


class Elements(HTMLParser):
    """Start tags with their attributes, in order; unbalanced tags fail."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# ---- the document --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["private", "void", "plain"])
def test_a_page_is_well_formed_accessible_and_needs_nothing_else(pages, name):
    text = pages[name].read_text()
    found = Elements(text).found
    tags = [tag for tag, _ in found]
    assert text.startswith("<!doctype html>") and ("html", {"lang": "en"}) in found and tags.count("main") == tags.count("h1") == 1
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attrs["id"] for _, attrs in found if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = [word for _, attrs in found for word in (attrs.get("aria-labelledby") or "").split()]
    assert named and set(named) <= set(ids)
    for tag, attrs in found:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "form")
        assert not {"src", "href", "style"} & set(attrs) and not any(key.startswith("on") for key in attrs)
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or (attrs["role"] == "img" and attrs["aria-labelledby"])
        if tag == "th":
            assert attrs["scope"] in ("col", "row")
        if "tabindex" in attrs and tag == "div":
            assert attrs["role"] == "region" and attrs["aria-label"]
    assert tags.count("table") == tags.count("caption")
    assert not re.search(r"@import|url\(|https?://", text)
    assert len(text) < 100_000


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear_parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear_parts, strict=True))


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out_in_light_and_dark():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    schemes = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(), re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        for text, ground in (("text", "page"), ("soft", "page"), ("text", "panel"), ("soft", "panel"), ("alarm-text", "alarm")):
            assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
        for index in range(6):
            assert contrast(colour[f"c{index}"], colour["page"]) >= 4.5


# ---- charts --------------------------------------------------------------------------------------------------------


def drawn(chart: str) -> ET.Element:
    return ET.fromstring(str(chart).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def test_points_are_where_they_belong():
    x, y = Axis("x (s)", 0.0, 10.0), Axis("rate", 1e-4, 1.0, log=True)
    points = [(0.0, 1e-4), (5.0, 1e-2), (10.0, 1.0), (11.0, 0.5), (3.0, 0.0), (4.0, float("nan"))]
    svg = drawn(line_chart("c", "A <title>", "what & why", x, y, [Series("one", points, marked=True)]))
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in svg.iter(SVG + "circle")]
    assert dots == [(left, bottom), ((left + right) / 2, (top + bottom) / 2), (right, top)]  # what lies outside is left out
    (line,) = [path for path in svg.iter(SVG + "path") if path.attrib["class"] == "line c0"]
    assert [tuple(map(float, pair.split())) for pair in line.attrib["d"][1:].split("L")] == dots
    assert svg.find(SVG + "title").text == "A <title>" and svg.find(SVG + "desc").text == "what & why"
    labels = [text.text for text in svg.iter(SVG + "text")]
    assert labels == ["0", "2", "4", "6", "8", "10", "10⁻⁴", "0.001", "0.01", "0.1", "1", "x (s)", "rate"]


def test_a_limit_is_a_line_with_its_name_and_a_single_point_is_a_dot():
    x, y = Axis("x", 0.0, 1.0), Axis("y", 0.0, 4.0)
    svg = drawn(line_chart("c", "t", "d", x, y, [Series("one", [(0.5, 2.0)])], [("target", 3.0), ("beyond", 5.0)]))
    assert len(list(svg.iter(SVG + "circle"))) == 1
    (limit,) = [path for path in svg.iter(SVG + "path") if path.attrib["class"] == "limit"]
    assert limit.attrib["d"] == f"M{LEFT}.0 {TOP + (HEIGHT - TOP - BOTTOM) / 4}H{WIDTH - RIGHT}.0"
    assert "target" in [text.text for text in svg.iter(SVG + "text")]
    assert "beyond" not in [text.text for text in svg.iter(SVG + "text")]


@given(st.lists(st.floats(-1e6, 1e6), max_size=8), st.booleans())
@EXAMPLES
def test_an_axis_holds_its_values_and_has_few_round_ticks(values, zero):
    kept = [abs(value) for value in values] if zero else values
    axis = linear("x", kept, zero=zero)
    assert axis.low < axis.high and all(axis.holds(value) for value in kept) and (not zero or axis.low == 0)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(axis.holds(tick) for tick in ticks) and len({axis.text(tick) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize(("low", "high", "count"), [(1e-5, 1.0, 6), (1e-3, 1.0, 4), (1e-12, 1.0, 5)])
def test_a_log_axis_has_powers_of_ten(low, high, count):
    axis = Axis("x", low, high, log=True)
    texts = [axis.text(tick) for tick in axis.ticks()]
    assert len(texts) == count and texts[-1] == "1" and texts[0] == {1e-5: "10⁻⁵", 1e-3: "0.001", 1e-12: "10⁻¹²"}[low]


def test_a_legend_names_every_line():
    text = legend([Series("a <b>", []), Series("c", [], colour=3)])
    assert "a &lt;b&gt;" in text and 'class="line c3"' in text


# ---- the browser ---------------------------------------------------------------------------------------------------

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9",
)  # fmt: skip
# Chromium lays out no window narrower than 500 pixels, so the page stands in a frame of the width wanted. A script in the frame's parent
# reads the layout: what is wider than the page, what is hidden or empty.
FRAME = """<!doctype html><body style="margin:0"><iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>
<pre id="seen"></pre><script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement, size = node => node.getBoundingClientRect();
  const inner = [...page.querySelectorAll("main > *, main > section > *:not(.wide):not(pre), figure > *")];
  const seen = {{
    width: root.scrollWidth, window: event.target.contentWindow.innerWidth,
    over: inner.filter(node => size(node).right > root.clientWidth + 0.5).map(node => node.outerHTML.slice(0, 80)),
    charts: [...page.querySelectorAll("svg[role=img]")].map(node => [size(node).width, size(node).height]),
    lines: [...page.querySelectorAll("svg[role=img] .line")].filter(node => getComputedStyle(node).stroke == "none").length,
    alarm: [...page.querySelectorAll(".alarm")].map(node => [size(node).top, size(node).height, node.textContent.trim()]),
    small: [...page.querySelectorAll("svg[role=img] text")].filter(node => size(node).height < 8).length,
    ground: getComputedStyle(page.body).backgroundColor, title: page.title,
  }};
  document.getElementById("seen").textContent = JSON.stringify(seen);
}};
</script></body>"""


def shown(page: Path, width: int, dark: bool = False) -> dict:
    """The layout of a page at a width; a word on the console fails the test."""
    copy = page.with_name(f"frame{width}.html")
    copy.write_text(FRAME.format(width=width, page=html.escape(page.read_text(), quote=True)))
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    folder = f"--user-data-dir={page.parent / 'profile'}"
    command = [str(CHROMIUM), *QUIET, *scheme, folder, f"--window-size={max(width, 500)},1000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found and found[1]
    return dict(json.loads(html.unescape(found[1])))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("name", "width", "charts"), [("private", 375, 4), ("private", 1280, 4), ("void", 375, 4), ("plain", 375, 1)])
def test_a_browser_shows_the_page_within_its_window(pages, name, width, charts):
    seen = shown(pages[name], width)
    assert seen["window"] == width and seen["width"] <= width and not seen["over"]
    assert len(seen["charts"]) == charts and all(w > 250 and h > 170 for w, h in seen["charts"])
    assert not seen["lines"] and not seen["small"]
    assert seen["title"] == f"Privacy report: {name}"  # and no script of the config has changed it
    if name == "private":
        assert not seen["alarm"]
    else:
        ((top, height, text),) = seen["alarm"]
        assert height > 50 and top + height < 900  # seen at once, without scrolling
        assert "No privacy guarantee" in text and ("unsafe_seed" in text) == (name == "void")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_dark_screen_gets_a_dark_page(pages):
    assert shown(pages["plain"], 600, dark=True)["ground"] == "rgb(20, 24, 29)"
    assert shown(pages["plain"], 600)["ground"] == "rgb(255, 255, 255)"
