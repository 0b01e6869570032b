"""Time per step relative to non-private training, both frameworks, every strategy: `python -m benchmarks.steps`.

One subprocess per case; within it private and non-private steps alternate, so that the machine's mood cancels. Ratios are medians,
with quartiles. With ``--memory`` each of the two also runs alone, and the ratio of the processes' peak memories is shown. Write the
output to ``benchmarks/RESULTS.md`` with the machine it was taken on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from rich.console import Console
from rich.table import Table


def run_case(**settings: object) -> dict[str, object]:
    """One case in a subprocess."""
    command = [sys.executable, "-m", "benchmarks.case"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {**settings, "error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def peak_ratio(backend: str, model: str, strategy: str, batch: int) -> str:
    """Peak memory of a process that takes private steps over that of one that takes plain ones."""
    runs = [run_case(backend=backend, model=model, strategy=strategy, batch=batch, pairs=3, only=only) for only in ("plain", "private")]
    if any("error" in r for r in runs):
        return str(next(r["error"] for r in runs if "error" in r))[:60]
    plain, private = (float(str(r["peak_mib"])) for r in runs)
    return f"{plain:.0f} MiB, {private:.0f} MiB, {private / plain:.3f}"


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=["torch", "tensorflow"])
    parser.add_argument("--strategies", nargs="+", default=["mixed_ghost", "ghost", "per_sample"])
    parser.add_argument("--models", nargs="+", default=["cnn"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    table = Table(title=f"step time relative to non_private, batch {args.batch}, 32x32x3, 2 threads")
    for name in (
        "model",
        "backend",
        "strategy",
        "non_private ms",
        "private ms",
        "ratio",
        "quartiles",
        *(["peak memory"] if args.memory else []),
    ):
        table.add_column(name)
    for model in args.models:
        for backend in args.backends:
            for strategy in args.strategies:
                r = run_case(backend=backend, model=model, strategy=strategy, batch=args.batch, pairs=args.pairs)
                if "error" in r:
                    table.add_row(model, backend, strategy, "", "", str(r["error"])[:80], "")
                    continue
                quartiles = f"{r['ratio_low']:.2f} to {r['ratio_high']:.2f}"
                row = [model, backend, strategy, f"{r['plain_ms']:.1f}", f"{r['private_ms']:.1f}", f"{r['ratio']:.2f}", quartiles]
                table.add_row(*row, *([peak_ratio(backend, model, strategy, args.batch)] if args.memory else []))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
