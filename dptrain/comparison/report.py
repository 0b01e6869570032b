"""Tables, plots and a page of a comparison."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dptrain.comparison.cases import NON_PRIVATE
from dptrain.errors import RunError

Row = dict[str, Any]
COLUMNS = ("model", "input", "batch", "backend", "strategy")
NEEDS_PLOT = "Plots need matplotlib, which is not installed; run: pip install 'dptrain[plot]'."


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row per combination, with what was measured of it and its ratios to ``non_private``.

    Args:
        rows: one per measurement.
    Returns:
        Rows with ``ratio``, ``memory_ratio``, ``batch_ratio`` where they are known.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        entry = found.setdefault(identity(row), {key: row[key] for key in (*COLUMNS, "sweep")})
        known = {k: v for k, v in row.items() if k not in ("hash", "measurement", "versions", *COLUMNS, "sweep")}
        for problem in ("unsupported", "failed"):
            if problem in entry and problem in known:
                known.pop(problem)
        entry.update(known)
    plain = {identity(r)[:-1]: r for r in found.values() if r["strategy"] == NON_PRIVATE}
    for key, row in found.items():
        base = plain.get(key[:-1], {})
        for name, ratio in (("total_mib", "memory_ratio"), ("largest_batch", "batch_ratio")):
            if row.get(name) is not None and base.get(name):
                row[ratio] = row[name] / base[name]
        if "yardstick" in row:  # its own plain loop, in its own environment
            row |= {"memory_ratio": row["total_mib"] / row["plain_mib"]} if row.get("plain_mib") else {}
        if row["strategy"] == NON_PRIVATE:
            # Plain steps are timed beside each private strategy; the figure shown is their median.
            times = sorted(
                r["plain_seconds"] for k, r in found.items() if k[:-1] == key[:-1] and "plain_seconds" in r and "yardstick" not in r
            )
            if times:
                row |= {"seconds": times[len(times) // 2], "ratio": 1.0, "examples_per_second": row["batch"] / times[len(times) // 2]}
    return list(found.values())


def identity(row: Row) -> tuple[Any, ...]:
    """What makes two measurements those of one combination; the strategy is last."""
    return (row["model"], row["input"], row["batch"], row["backend"], tuple(sorted(row["sweep"].items())), row["strategy"])


def cells(row: Row, sweeps: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """The texts of one line of the table."""
    problem = row.get("unsupported") or row.get("failed") or ("too large for the memory" if row.get("too_large") else "")
    problem = problem or row.get("yardstick", "")
    texts = [str(row[key]) for key in COLUMNS] + [row["sweep"].get(key, "") for key in sweeps]

    def number(key: str, form: str, scale: float = 1.0) -> str:
        return form.format(scale * row[key]) if row.get(key) is not None else ""

    if "time" in kinds:
        spread = f" ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})" if "ratio_low" in row else ""
        texts += [number("seconds", "{:.1f}", 1e3), number("ratio", "{:.2f}") + spread, number("predicted_ratio", "{:.2f}")]
    if "memory" in kinds:
        texts += [number("total_mib", "{:,.0f}"), number("memory_ratio", "{:.2f}"), number("predicted_memory_ratio", "{:.2f}")]
    if "largest" in kinds:
        texts += [number("largest_batch", "{:,.0f}"), number("batch_ratio", "{:.2f}")]
    return [*texts, problem]


def header(sweeps: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """The titles of the columns."""
    titles = [*COLUMNS, *sweeps]
    titles += ["step, ms", "time ratio (quartiles)", "predicted"] if "time" in kinds else []
    titles += ["peak memory, MiB", "memory ratio", "predicted memory"] if "memory" in kinds else []
    titles += ["largest batch", "batch ratio"] if "largest" in kinds else []
    return [*titles, "note"]


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Titles and lines, without columns that are empty in every line."""
    kinds = sorted({row["measurement"] for row in rows})
    sweeps = sorted({key for row in rows for key in row["sweep"] if key not in ("batch", "input")})
    titles, lines = header(sweeps, kinds), [cells(row, sweeps, kinds) for row in merged(rows)]
    used = [i for i in range(len(titles)) if any(line[i] for line in lines)]
    return [titles[i] for i in used], [[line[i] for i in used] for line in lines]


def origin(rows: Sequence[Row]) -> str:
    """Machine and versions, in a sentence."""
    devices = sorted({row["device"] for row in rows if "device" in row})
    versions = {name: v for row in rows for name, v in row.get("versions", {}).items()}
    threads = sorted({row["threads"] for row in rows})
    return (
        f"{'; '.join(devices) or 'no measurement'}; {', '.join(f'{k} {v}' for k, v in sorted(versions.items()))}; "
        f"{' or '.join(map(str, threads))} threads. Ratios are to non_private in the same run: medians of interleaved pairs for time, "
        "peak during steps above the process that has loaded the framework and no model for memory."
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown, with machine and versions."""
    titles, lines = table(rows)
    out = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    out += ["| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in line) + " |" for line in lines]
    return "\n".join([*out, "", origin(rows), ""])


def figure(rows: Sequence[Row]) -> Any:
    """Speed against memory, one panel per model, input and backend; or the ratio along a sweep where there is one.

    Raises:
        RunError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError(NEEDS_PLOT) from None
    shown = [row for row in merged(rows) if "ratio" in row or "memory_ratio" in row or "batch_ratio" in row]
    axis = swept_axis(shown)
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in shown:
        middle = () if axis else (row["input"], str(row["batch"]))
        key = (row["model"], *middle, row["backend"])
        panels.setdefault(key, []).append(row)
    count = max(1, len(panels))
    across = min(count, 3)
    down = -(-count // across)
    drawn = Figure(figsize=(4.6 * across, 4.2 * down), layout="constrained")
    grid = drawn.subplots(down, across, squeeze=False).ravel()
    for ax, (key, members) in zip(grid, panels.items(), strict=False):
        ax.set_title(", ".join(key), fontsize=9)
        (draw_sweep if axis else draw_points)(ax, members, axis)
    for ax in grid[len(panels) :]:
        ax.set_visible(False)
    return drawn


def swept_axis(rows: Sequence[Row]) -> str | None:
    """The setting that most values were taken of, if there are at least three."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in {**row["sweep"], "batch": str(row["batch"]), "input": row["input"]}.items():
            values.setdefault(key, set()).add(value)
    best = max(values, key=lambda k: len(values[k]), default=None)
    return best if best is not None and len(values[best]) >= 3 else None


def draw_points(ax: Any, rows: Sequence[Row], _: str | None) -> None:
    """Time ratio across, memory ratio up; nearer to (1, 1) is better."""
    for row in rows:
        across, up = row.get("ratio"), row.get("memory_ratio")
        if across is None or up is None:
            continue
        ax.scatter(across, up, marker="*" if row["strategy"] == NON_PRIVATE else "o", label=short(row["strategy"]))
    ax.set_xlabel("time relative to non_private")
    ax.set_ylabel("memory relative to non_private")
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:  # names beside the points would cover each other where ratios are near 1
        ax.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def draw_sweep(ax: Any, rows: Sequence[Row], axis: str | None) -> None:
    """Time ratio, or memory ratio where no time was taken, along the swept setting; one line per strategy."""
    assert axis is not None
    value = "ratio" if any("ratio" in r for r in rows) else "memory_ratio" if any("memory_ratio" in r for r in rows) else "batch_ratio"
    for strategy in dict.fromkeys(r["strategy"] for r in rows):
        points = [(str({**r["sweep"], "batch": r["batch"], "input": r["input"]}.get(axis)), r[value])
                  for r in rows if r["strategy"] == strategy and value in r]  # fmt: skip
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", label=short(strategy))
    ax.set_xlabel(axis)
    ax.set_ylabel({"ratio": "time", "memory_ratio": "memory", "batch_ratio": "largest batch"}[value] + " relative to non_private")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def short(strategy: str) -> str:
    """A strategy's name without its module's path."""
    return strategy.rpartition(".")[2] if ":" in strategy else strategy


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>dptrain compare</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; }}
/* What is wider than the window scrolls by itself, and the page does not. */
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; }}
th, td {{ text-align: left; vertical-align: top; white-space: nowrap; padding: .3rem .5rem; border-bottom: 1px solid #ddd; }}
th {{ vertical-align: bottom; white-space: normal; border-bottom: 2px solid #888; }}
td.note {{ white-space: normal; overflow-wrap: anywhere; min-width: 13rem; }}
svg {{ width: 100%; min-width: 36rem; max-width: 75rem; height: auto; }}
</style></head><body>
<h1>Speed and memory relative to non-private training</h1>
<p>{origin}</p>
<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>
{lines}
</tbody></table></div>
<div class="wide">
{plot}
</div>
</body></html>
"""


def page(rows: Sequence[Row], plot: str) -> str:
    """A page that needs nothing else.

    Args:
        rows: the results.
        plot: SVG text.
    Returns:
        HTML.
    """
    titles, lines = table(rows)
    classes = [' class="note"' if title == "note" else "" for title in titles]
    escaped = [
        "<tr>" + "".join(f"<td{kind}>{html.escape(text)}</td>" for kind, text in zip(classes, line, strict=True)) + "</tr>"
        for line in lines
    ]
    return PAGE.format(
        origin=html.escape(origin(rows)), titles="".join(f"<th>{html.escape(t)}</th>" for t in titles), lines="\n".join(escaped),
        plot=plot[plot.find("<svg") :],
    )  # fmt: skip


def save(rows: Sequence[Row], out: Path) -> None:
    """Write ``table.md``, ``plot.png``, ``plot.svg`` and ``index.html``.

    Args:
        rows: the results.
        out: folder.
    Raises:
        RunError: matplotlib is not installed, or the folder cannot be written.
    """
    from dptrain.checkpoint import atomic_write

    drawn, files = figure(rows), {}
    for suffix in ("png", "svg"):
        buffer = io.BytesIO()
        # Without a date the same results give the same file.
        drawn.savefig(buffer, format=suffix, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
        files[f"plot.{suffix}"] = buffer.getvalue()
    files["table.md"] = markdown(rows).encode()
    files["index.html"] = page(rows, files["plot.svg"].decode()).encode()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            atomic_write(out / name, content)
    except OSError as error:
        raise RunError(f"The report cannot be written to {out}: {error}.") from None
