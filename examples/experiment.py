"""Accuracy against epsilon: several configs, backends and strategies, as a table and a plot.

    python examples/experiment.py examples/mnist.yaml --backends torch tensorflow --epsilons 1 3 8 --repeats 3 --out runs/exp

Every case is one `dptrain train` in a process of its own. A finished case is recognised in `results.jsonl` by the hash of its
config and is not run again, so the same command continues after an interruption, and a changed config is run anew. A case that
fails becomes a row with its reason, and is tried again next time. Two-class data are judged by the AUROC where the run reports it.

Not private: the table shows test metrics, and choosing by it is a choice that no epsilon covers.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from dptrain.checkpoint import atomic_write
from dptrain.config import TrainConfig, apply_overrides, read_file
from dptrain.errors import ConfigError, DptrainError, RunError

COMMAND = (sys.executable, "-m", "dptrain.cli", "train")
NON_PRIVATE = "non_private"
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One training run.

    Args:
        config: the file.
        backend, strategy, epsilon, repeat: what varies; ``epsilon`` is None for a strategy without privacy.
        overrides: the assignments that make this case of the file.
        hash: of the resulting config; None if there is none.
        problem: why there is none.
    """

    config: Path
    backend: str
    strategy: str
    epsilon: float | None
    repeat: int
    overrides: tuple[str, ...]
    hash: str | None
    problem: str | None = None

    @property
    def key(self) -> tuple[str | None, str]:
        """What makes two cases the same: seed, budget, data and strategy are in the hash."""
        return self.hash, self.backend

    @property
    def line(self) -> str:
        """The line of the plot that this case belongs to."""
        own = self.config.stem.endswith(self.strategy)
        return " ".join([self.config.stem, *([] if own else [self.strategy]), self.backend])

    @property
    def name(self) -> str:
        """A file name for its run directory and its log."""
        budget = [] if self.epsilon is None else [f"eps{self.epsilon:g}"]
        return "-".join([*self.line.split(), *budget, f"run{self.repeat + 1}", str(self.hash)[:8]])


# ---- which cases ---------------------------------------------------------------------------------------------------


def make_case(config: Path, raw: Row, backend: str, strategy: str | None, epsilon: float, repeat: int, extra: Sequence[str]) -> Case:
    """One case, or why it cannot exist.

    A strategy that differs from the file's keeps the settings of the file's as far as it has them, else it takes its own defaults.

    Args:
        config: the file.
        raw: its content.
        backend, strategy, epsilon, repeat: what varies; without a strategy it is the file's.
        extra: assignments for all cases.
    Returns:
        The case.
    """
    given = apply_overrides(raw, extra)
    privacy, seed = given.get("privacy"), given.get("seed", 0)
    fixed = [f"privacy.target_epsilon={epsilon:g}"]
    if isinstance(privacy, dict) and privacy.get("noise_multiplier") is not None:
        fixed.append("privacy.noise_multiplier=null")
    if repeat and isinstance(seed, int):
        fixed.append(f"seed={seed + repeat}")
    choices: list[list[str]] = [[]] if strategy is None else [[f"strategy.name={strategy}"], [f"strategy={strategy}"]]
    problem = ""
    for choice in choices:
        overrides = (*choice, *extra, *fixed)
        try:
            parsed = TrainConfig.parse(apply_overrides(raw, overrides), str(config))
            if parsed.strategy.name == NON_PRIVATE:
                overrides = (*overrides, "privacy.target_epsilon=null")
                parsed = TrainConfig.parse(apply_overrides(raw, overrides), str(config))
        except ConfigError as error:
            problem = str(error)
            continue
        name = parsed.strategy.name
        return Case(config, backend, name, None if name == NON_PRIVATE else epsilon, repeat, overrides, parsed.hash)
    return Case(config, backend, strategy or "", epsilon, repeat, (), None, problem)


def make_cases(
    configs: Sequence[Path],
    backends: Sequence[str],
    strategies: Sequence[str] | None,
    epsilons: Sequence[float],
    repeats: int,
    extra: Sequence[str] = (),
) -> list[Case]:
    """All combinations, each once; a strategy without privacy runs once for all budgets.

    Args:
        configs: the files.
        backends, strategies, epsilons: what varies; without strategies each file's own.
        repeats: runs of each, every one from other starting weights.
        extra: assignments for all cases.
    Returns:
        The cases, in the order in which to run them.
    Raises:
        ConfigError: a file cannot be read, or two have the same name.
    """
    stems = [config.stem for config in configs]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise ConfigError(f"Two configs are called {twice[0]!r}, which names the lines of the plot; rename one of them.")
    raws = [(config, read_file(config)) for config in configs]
    cases: dict[Any, Case] = {}
    # Repeats are outermost, so that an interrupted experiment has every case once before any twice.
    names: Sequence[str | None] = strategies or [None]
    for repeat, (config, raw), strategy, backend, epsilon in product(range(repeats), raws, names, backends, epsilons):
        case = make_case(config, raw, backend, strategy, epsilon, repeat, extra)
        cases.setdefault((case.config, case.backend, case.strategy, case.epsilon, case.repeat), case)
    return list(cases.values())


# ---- running -------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[tuple[str | None, str], Row]:
    """The last row of each case; a line that was cut off by a crash counts for nothing."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            rows[row["config_hash"], row["backend"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def run_command(command: Sequence[str], log: Path) -> int:
    """Run a command with its output in a file; Ctrl-C reaches it once, so that it can save what it has.

    Args:
        command: the words.
        log: the file, overwritten.
    Returns:
        The exit code.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        # Its own session, because a terminal would send Ctrl-C to both, and dptrain takes a second one for "at once".
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise


def last_words(log: Path) -> str:
    """The error in a log, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("dptrain: error: ")]
    return (errors or lines or ["no output"])[-1]


def outcome(directory: Path) -> Row:
    """The metrics and the privacy statement of a finished run.

    Raises:
        RunError: the run is not finished, or its files cannot be read.
    """
    try:
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        statement = json.loads((directory / "privacy.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"The run left no readable metrics.jsonl and privacy.json ({error}).") from None
    final: Row = next((line for line in reversed(lines) if "final" in line), {})
    if not final.get("final"):
        raise RunError("The run was interrupted; the same command resumes it.")
    return {
        "seconds": round(math.fsum(line.get("seconds") or 0.0 for line in lines), 3),
        "steps": final["step"],
        "metrics": {key.removeprefix("test_"): value for key, value in final.items() if key.startswith("test_")},
        "epsilon": statement["epsilon"],
        "delta": statement.get("delta"),
        "num_classes": statement.get("public_constants", {}).get("num_classes"),
        "statement": statement["statement"],
    }


def run_case(case: Case, out: Path) -> Row:
    """Train one case in its own process.

    Args:
        case: the case.
        out: directory of the experiment.
    Returns:
        Its row, with ``status`` ``done`` or ``failed`` and, if failed, a ``reason``.
    """
    row: Row = {
        "config": case.config.stem, "config_hash": case.hash, "backend": case.backend, "strategy": case.strategy,
        "target_epsilon": case.epsilon, "repeat": case.repeat,
    }  # fmt: skip
    if case.problem is not None:
        return {**row, "status": "failed", "reason": case.problem}
    directory, log = out / case.name, out / "logs" / f"{case.name}.log"
    settings = [word for override in case.overrides for word in ("--set", override)]
    code = run_command([*COMMAND, str(case.config), "--backend", case.backend, *settings, "--out", str(directory), "--quiet"], log)
    if code:
        return {**row, "status": "failed", "reason": f"{last_words(log)} (exit code {code})"}
    try:
        return {**row, "status": "done", **outcome(directory)}
    except RunError as error:
        return {**row, "status": "failed", "reason": str(error)}


def run_all(cases: Sequence[Case], out: Path) -> list[tuple[Case, Row]]:
    """Run what is not done yet, appending each row to ``results.jsonl`` as soon as it exists.

    Args:
        cases: the cases.
        out: directory of the experiment.
    Returns:
        Every case with its row, old or new.
    """
    file = out / "results.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    known, rows = read_results(file), []
    cut_off = file.exists() and not file.read_bytes().endswith(b"\n")
    for number, case in enumerate(cases, 1):
        row = known.get(case.key) if case.hash else None
        again = row is None or row.get("status") != "done"
        if again:
            print(f"[{number}/{len(cases)}] {case.name} ...", end=" ", flush=True)
            row = run_case(case, out)
            with file.open("a", encoding="utf-8") as sink:
                sink.write("\n" * cut_off + json.dumps(row) + "\n")
            cut_off = False
            print(f"{result_text(row)}, {row['seconds']:.1f} s" if row["status"] == "done" else f"failed: {row['reason']}")
        else:
            print(f"[{number}/{len(cases)}] {case.name}: done before")
        assert row is not None
        rows.append((case, row))
    return rows


def result_text(row: Row) -> str:
    """The judged metric of one row."""
    name = metric_of([row])
    value = row["metrics"].get(name)
    return f"{name} {value:.4f}" if value is not None else f"no {name}"


# ---- showing -------------------------------------------------------------------------------------------------------


def metric_of(rows: Iterable[Row]) -> str:
    """AUROC if all rows are of two classes and have it, else accuracy, else loss: one metric for what is compared."""
    rows = list(rows)
    for name in ("auroc", "accuracy"):
        if rows and all(name in row["metrics"] and (name != "auroc" or row["num_classes"] == 2) for row in rows):
            return name
    return "loss"


def groups(results: Sequence[tuple[Case, Row]]) -> Iterator[tuple[str, float | None, list[Row]]]:
    """The rows of each line and budget, repeats together, in the order of the command."""
    found: dict[tuple[str, float | None], list[Row]] = {}
    for case, row in results:
        found.setdefault((case.line, case.epsilon), []).append(row)
    for line in dict.fromkeys(line for line, _ in found):
        for (other, epsilon), rows in found.items():
            if other == line:
                yield line, epsilon, rows


def markdown(results: Sequence[tuple[Case, Row]]) -> str:
    """The table: mean and range over repeats, and a reason where there is no number.

    Args:
        results: cases and rows.
    Returns:
        Markdown.
    """
    name = metric_of(row for _, row in results if row["status"] == "done")
    head = ["config, strategy and backend", "target epsilon", "epsilon", name, "lowest to highest", "runs", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for line, epsilon, rows in groups(results):
        valued = [row for row in rows if row["status"] == "done" and row["metrics"].get(name) is not None]
        values = [row["metrics"][name] for row in valued]
        spent = [row["epsilon"] for row in valued if row["epsilon"] is not None]
        cells = [line, "none" if epsilon is None else f"{epsilon:g}", f"{max(spent):.4g}" if spent else "none"]
        if values:
            cells += [f"{fmean(values):.4f}", f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else ""]
            cells += [str(len(values)), f"{fmean(row['seconds'] for row in valued):.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
        reasons = [row["reason"] if row["status"] != "done" else f"the run has no {name}" for row in rows if row not in valued]
        for reason in dict.fromkeys(reasons):
            text = re.sub(r"\s+", " ", reason).replace("|", "\\|")
            lines.append(f"| {' | '.join([*cells[:2], '', 'failed: ' + text, '', '0', ''])} |")
    note = f"epsilon{at_delta(results)}; {name} on the test split, not private."
    return "\n".join(lines) + f"\n\n{note}\n"


def at_delta(results: Sequence[tuple[Case, Row]]) -> str:
    """The deltas of the epsilons."""
    deltas = {row["delta"] for _, row in results if row["status"] == "done" and row["delta"] is not None}
    return f" at delta {', '.join(f'{delta:g}' for delta in sorted(deltas))}" if deltas else ""


def plot(results: Sequence[tuple[Case, Row]], out: Path) -> list[Path]:
    """The metric against the target epsilon, one line per config, strategy and backend, with the range over repeats.

    Args:
        results: cases and rows.
        out: directory for ``plot.png`` and ``plot.svg``.
    Returns:
        The files; none if there is nothing to show.
    Raises:
        RunError: matplotlib is not installed.
    """
    done = [(case, row) for case, row in results if row["status"] == "done"]
    name = metric_of(row for _, row in done)
    points: dict[str, list[tuple[float | None, list[float]]]] = {}
    for line, epsilon, rows in groups(done):
        if values := [row["metrics"][name] for row in rows if row["metrics"].get(name) is not None]:
            points.setdefault(line, []).append((epsilon, values))
    if not points:
        return []
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("The plot needs matplotlib, which is not installed; run: pip install 'dptrain[plot]'.") from None
    budgets = sorted({epsilon for values in points.values() for epsilon, _ in values if epsilon is not None})
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (line, found) in enumerate(points.items()):
        color = f"C{index % 10}"
        private = sorted((epsilon, values) for epsilon, values in found if epsilon is not None)
        for epsilon, values in found:
            if epsilon is None:
                axes.axhline(fmean(values), color=color, linestyle="--", label=line)
        if private:
            x, means = [epsilon for epsilon, _ in private], [fmean(values) for _, values in private]
            below = [mean - min(values) for mean, (_, values) in zip(means, private, strict=True)]
            above = [max(values) - mean for mean, (_, values) in zip(means, private, strict=True)]
            marker = "osD^v<>*"[index % 8]
            axes.errorbar(x, means, yerr=[below, above], color=color, marker=marker, capsize=3, label=line)
    axes.set_xscale("log")
    if budgets:
        axes.set_xticks(budgets, [f"{epsilon:g}" for epsilon in budgets])
        axes.minorticks_off()
    axes.set_xlabel(f"epsilon{at_delta(results)}")
    axes.set_ylabel(f"test {'AUROC' if name == 'auroc' else name}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    files = [out / "plot.png", out / "plot.svg"]
    with matplotlib.rc_context({"svg.hashsalt": "dptrain"}):
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
    return files


# ---- the command ---------------------------------------------------------------------------------------------------


def positive(kind: type) -> Any:
    """An argparse type: a finite number above 0."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError(text)
        return value

    convert.__name__ = f"positive {kind.__name__}"
    return convert


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Accuracy against epsilon over configs, backends and strategies.")
    parser.add_argument("configs", nargs="+", type=Path, help="YAML or TOML configs; each runs unchanged in every backend")
    parser.add_argument("--backends", nargs="+", default=["torch"], help="torch, tensorflow")
    parser.add_argument("--strategies", nargs="+", help="strategies to run each config with; by default the config's own")
    parser.add_argument("--epsilons", nargs="+", type=positive(float), default=[1.0, 3.0, 8.0], help="budgets")
    parser.add_argument("--repeats", type=positive(int), default=1, help="runs per case, each from other starting weights")
    parser.add_argument("--set", dest="extra", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override for all cases")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results; the same command continues there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment.

    Args:
        arguments: the command line; by default the process's.
    Returns:
        0 if every case has a result, 1 if one failed, 2 for a user's error, 130 after an interruption.
    """
    options = parse_arguments(arguments)
    try:
        cases = make_cases(options.configs, options.backends, options.strategies, options.epsilons, options.repeats, options.extra)
        results = run_all(cases, options.out)
        table = markdown(results)
        atomic_write(options.out / "table.md", table.encode())
        print("\n" + table)
        files = plot(results, options.out)
        print("written: " + ", ".join(str(file) for file in (options.out / "results.jsonl", options.out / "table.md", *files)))
    except KeyboardInterrupt:
        print("\nexperiment: interrupted; the same command continues.", file=sys.stderr)
        return 130
    except (DptrainError, OSError) as error:
        print(f"experiment: error: {error}", file=sys.stderr)
        return 2
    return int(any(row["status"] != "done" for _, row in results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that no run is left behind
    sys.exit(main())
