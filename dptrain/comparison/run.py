"""Runs a comparison: one subprocess after another, results kept as they come, so that an interrupted comparison continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dptrain.comparison.cases import SWEPT, Case, Measurement, Settings, Shape, grid
from dptrain.comparison.measure import environment
from dptrain.comparison.memory import OUT_OF_MEMORY
from dptrain.config import TrainConfig, read_file
from dptrain.data import load
from dptrain.errors import ConfigError, RunError

Row = dict[str, Any]
COMMAND = (sys.executable, "-m", "dptrain.comparison.measure")
OUT_OF_MEMORY_WORDS = ("out of memory", "ResourceExhausted", "OOM when allocating", "MemoryError", "bad_alloc", "can't allocate memory")
PRECISION = 1.04  # the largest batch is found to within this factor
LARGEST_EVER = 2**20
PREDICTED_TRIALS = 10  # of the largest batch, before the search halves the interval
FURTHEST = 16  # times the largest batch that fitted, and no further in one go


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison.

    Args:
        rows: one for each measurement, in the order of the cases; ``unsupported`` says why there is no figure.
    """

    rows: list[Row]

    def markdown(self) -> str:
        """A table for people."""
        from dptrain.comparison.report import markdown

        return markdown(self.rows)

    def save(self, out: str | Path) -> None:
        """Write table, plots and page.

        Args:
            out: folder; ``table.md``, ``plot.png``, ``plot.svg`` and ``index.html`` in it are replaced.
        Raises:
            RunError: a package for it is not installed, or the folder cannot be written.
        """
        from dptrain.comparison.report import save

        save(self.rows, Path(out))


def shape_of(config: TrainConfig, text: str | None = None, num_classes: int | None = None) -> Shape:
    """The shape of one example, as given, or that of the config's data.

    Args:
        config: the run.
        text: ``32x32x3``; None reads the data.
        num_classes: classes; by default those of the data, or 10.
    Returns:
        The shape.
    Raises:
        DptrainError: it is not a shape, or the data are not found.
    """
    vocabulary = getattr(config.model, "vocabulary", 0)
    if text is not None:
        shape = Shape.parse(text, num_classes or config.data.num_classes or 10)
        return replace(shape, tokens=vocabulary or 1000) if len(shape.input) == 1 and vocabulary else shape
    c = config.data
    data = load(c.name, path=c.path, download=c.download, source=c.source, num_classes=c.num_classes, limit=c.limit)
    tokens = (vocabulary or 1 + int(data.x_train.max())) if data.x_train.dtype.kind in "iu" else 0
    return Shape(data.input_shape, num_classes or data.num_classes, tokens)


def compare(
    config: TrainConfig | Mapping[str, Any] | str | Path,
    backends: Sequence[str] = ("torch", "tensorflow"),
    strategies: Sequence[str] = ("mixed_ghost", "ghost", "per_sample"),
    *,
    models: Sequence[str] = (),
    batches: Sequence[int] = (),
    sweep: Mapping[str, Sequence[Any]] | None = None,
    input: str | None = None,
    num_classes: int | None = None,
    measurements: Sequence[Measurement] = ("time", "memory"),
    settings: Settings | None = None,
    out: str | Path | None = None,
    progress: Callable[[Case, Row, int, int], None] | None = None,
) -> Comparison:
    """Measure strategies, models and frameworks beside each other, relative to non-private training.

    Args:
        config: the run, or a file; its budget and data do not matter here, only shapes.
        backends: ``torch``, ``tensorflow``.
        strategies: names; ``module:function`` for a step that is not ours (see ``measure.Bench``).
        models: presets, or ``module:function`` of native models, in place of the config's.
        batches: physical batch sizes in place of the config's.
        sweep: setting -> values: ``batch``, ``input``, or any of the config's such as ``model.width``.
        input: shape of one example, such as ``32x32x3``; by default that of the config's data.
        num_classes: classes; by default those of the data.
        measurements: ``time``, ``memory``, ``largest`` (the largest physical batch within ``settings.limit_gib``).
        settings: pairs, warm-up, threads, memory limit.
        out: folder for ``results.jsonl``, from which a finished measurement is taken up again; None keeps nothing.
        progress: called after each measurement with case, result, number and count.
    Returns:
        The results.
    Raises:
        DptrainError: the config or a value of the grid is wrong. A case that cannot run becomes a row with its reason.
    """
    if isinstance(config, str | Path):
        config = TrainConfig.parse(read_file(Path(config)), str(config))
    elif not isinstance(config, TrainConfig):
        config = TrainConfig.parse(config)
    check(backends, measurements, sweep)
    shape = shape_of(config, input, num_classes)
    values = {key: [str(v) for v in vs] for key, vs in (sweep or {}).items()}
    cases = grid(config.to_dict(), shape, backends, strategies, models, batches, values, measurements, settings)
    return Comparison(run_cases(cases, None if out is None else Path(out), progress))


def check(backends: Sequence[str], measurements: Sequence[str], sweep: Mapping[str, Sequence[Any]] | None) -> None:
    """Refuse names that nothing could be measured for.

    Raises:
        ConfigError: lists them.
    """
    from dptrain.backend import BACKENDS

    problems = [f"there is no backend {b!r}; choose from {', '.join(BACKENDS)}" for b in backends if b not in BACKENDS]
    kinds = ("time", "memory", "largest")
    problems += [f"there is no measurement {m!r}; choose from {', '.join(kinds)}" for m in measurements if m not in kinds]
    for key, values in (sweep or {}).items():
        if key not in SWEPT and "." not in key:
            problems.append(f"the sweep over {key!r} must be over batch, input, or a setting such as model.width")
        if not values:
            problems.append(f"the sweep over {key!r} has no values")
    if not backends or not measurements:
        problems.append("at least one backend and one measurement are needed")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def run_cases(cases: Sequence[Case], out: Path | None, progress: Callable[[Case, Row, int, int], None] | None = None) -> list[Row]:
    """Measure every case that has no figure yet.

    Args:
        cases: the cases.
        out: folder of the results; None keeps nothing.
        progress: called after each.
    Returns:
        One row per case.
    Raises:
        RunError: the folder cannot be written.
    """
    known = read_results(out)
    rows = []
    for number, case in enumerate(cases, 1):
        row = known.get(case.hash)
        if row is None:
            row = {**facts(case), **(largest(case) if case.measurement == "largest" else subprocess_measure(case))}
            if "failed" not in row and "missing" not in row:  # tried again next time
                append(out, row)
        rows.append(row)
        if progress is not None:
            progress(case, row, number, len(cases))
    return rows


def facts(case: Case) -> Row:
    """What identifies a row."""
    config = TrainConfig.parse(case.config)
    return {
        "hash": case.hash, "config_hash": config.hash, "backend": case.backend, "model": case.model, "strategy": case.strategy,
        "batch": case.batch, "input": str(case.shape), "sweep": dict(case.swept), "measurement": case.measurement,
        "threads": case.settings.threads, "pairs": case.settings.pairs, "versions": case.versions,
    }  # fmt: skip


def read_results(out: Path | None) -> dict[str, Row]:
    """The finished measurements of a folder; a line torn by an interruption is left out.

    Raises:
        RunError: the folder cannot be made or read.
    """
    if out is None:
        return {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines() if (out / "results.jsonl").exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"The folder {out} cannot be used: {error}.") from None
    rows: dict[str, Row] = {}
    for line in lines:
        try:
            row = json.loads(line)
            rows[row["hash"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def append(out: Path | None, row: Row) -> None:
    """Keep one result.

    Raises:
        RunError: the folder cannot be written.
    """
    if out is None:
        return
    path = out / "results.jsonl"
    try:
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(row) + "\n")
    except OSError as error:
        raise RunError(f"The result cannot be written to {path}: {error}.") from None


def subprocess_measure(case: Case) -> Row:
    """The figures of one case, from a process of its own.

    Returns:
        Figures; or ``unsupported`` with the reason, ``too_large``, or ``failed`` with the last line of the error.
    """
    env = os.environ | environment(case)
    done = subprocess.run(COMMAND, input=case.to_json(), capture_output=True, text=True, env=env, check=False)
    if done.returncode == 0:
        try:
            return dict(json.loads(done.stdout.strip().splitlines()[-1]))
        except (ValueError, IndexError):
            return {"failed": "the measurement printed no result"}
    if done.returncode in (OUT_OF_MEMORY, -9) or any(word in done.stderr for word in OUT_OF_MEMORY_WORDS):
        return {"too_large": True}
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return {"failed": f"exit code {done.returncode}: {lines[-1].strip() if lines else 'no message'}"}


def largest(case: Case) -> Row:
    """The largest physical batch within the memory limit, one subprocess per trial.

    Args:
        case: its batch is where the search begins.
    Returns:
        ``largest_batch`` (to within 4 %) with the memory that it took, or why there is none.
    """
    limit = case.settings.limit_gib * 1024
    fits: dict[int, Row] = {}
    high, trials, size = LARGEST_EVER + 1, 0, case.batch
    while True:
        found = subprocess_measure(replace(case, batch=size))
        trials += 1
        if "unsupported" in found or "failed" in found:
            return found
        if found.get("too_large") or found["total_mib"] > limit:
            high = size
        else:
            fits[size] = found
        low = max(fits, default=0)
        if high - low <= 1 or high <= low * PRECISION:
            break
        known = [(batch, row["total_mib"]) for batch, row in sorted(fits.items())]
        size = next_size(known, high, limit, trials)
    kept = {k: fits[low][k] for k in ("total_mib", "device", "meter")} if fits else {}
    return {"largest_batch": low, "limit_gib": case.settings.limit_gib, "trials": trials, **kept}


def next_size(fits: Sequence[tuple[int, float]], high: int, limit: float, trials: int) -> int:
    """The batch to try next: memory grows by about the same for every example, so a few small trials tell where the limit is.

    Args:
        fits: batches that fit with their memory, ascending.
        high: the smallest batch known not to fit.
        limit: memory.
        trials: how many there were; after many, the middle, in case memory does not grow like that.
    Returns:
        A batch between the largest that fits and ``high``.
    """
    if not fits:
        return max(1, high // 2)
    low, taken = fits[-1]
    halfway = 2.0 * low if high > LARGEST_EVER else (low + high) / 2
    if len(fits) < 2 or trials > PREDICTED_TRIALS:
        guess = halfway
    else:
        first, least = fits[0]
        growth = max((taken - least) / (low - first), limit * 1e-9)
        # A little below the limit; from a fit as near as that, a little above it: the two are the answer.
        guess = min((low + (limit - taken) / growth) * (1 - (PRECISION - 1) / 3), low * FURTHEST)
        guess = max(guess, low * PRECISION) if guess < high else halfway
    return min(max(int(guess), low + 1), high - 1)
