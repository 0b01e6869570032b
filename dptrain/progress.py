"""What a person sees while a run trains, made with rich."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dptrain.comparison.cases import Case
from dptrain.config import TrainConfig
from dptrain.sampling import sampling_words
from dptrain.trainer import Progress, Setup, TrainResult


class Display:
    """Progress bar and closing lines of one run.

    Args:
        config: the run.
        backend: name of the backend.
        out: run directory.
        quiet: no bar.
    """

    def __init__(self, config: TrainConfig, backend: str, out: Path, quiet: bool) -> None:
        self.config, self.backend, self.out = config, backend, out
        self.console = Console(highlight=False, soft_wrap=True)
        self.epsilon: float | None = None
        text = "{task.fields[shown]}"
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(text), TimeRemainingColumn())
        self.bar = Bar(*columns, console=self.console, disable=quiet)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def start(self, setup: Setup, stds: Mapping[str, float] | None, step: int) -> None:
        """Print what is about to run."""
        data, privacy = setup.data, self.config.privacy
        self.console.print(
            f"{self.backend}: {self.config.model.name} ({sum(layer.num_params for layer in setup.plan.layers):,} parameters) on "
            f"{data.name} ({len(data.x_train):,} examples), strategy {setup.plan.strategy}, "
            f"{sampling_words(setup.scheme.public(len(data.x_train)))}, sample rate {setup.sample_rate:.4g}, {setup.num_steps} steps"
        )
        if not setup.plan.private:
            self.console.print("non-private training: no noise, no epsilon; the privacy section is not used")
        elif privacy.target_delta >= 1 / len(data.x_train):
            self.console.print(
                f"warning: target_delta {privacy.target_delta:g} is not below 1/N = {1 / len(data.x_train):.3g}; the guarantee says little"
            )
        if privacy.unsafe_seed is not None and setup.plan.private:
            self.console.print("warning: unsafe_seed is set, so the guarantee is void against anyone who knows it")
        if step:
            self.console.print(f"resuming {self.out} at step {step}")
        self.task = self.bar.add_task("training", total=setup.num_steps, completed=step, shown="")
        self.bar.start()

    def update(self, progress: Progress) -> None:
        """Show one step."""
        self.epsilon = progress.epsilon if progress.epsilon is not None else self.epsilon
        shown = f"loss {progress.loss:.4f} (not private)"
        if self.epsilon is not None:
            shown += f"  epsilon so far {self.epsilon:.3f}"
        shown += f"  {progress.examples_per_second:,.0f} examples/s"
        self.bar.update(self.task, completed=progress.step, shown=shown)

    def finish(self, result: TrainResult) -> None:
        """Print accuracy, epsilon and where everything is."""
        say: Any = self.console.print
        if not result.complete:
            say(f"stopped after step {result.steps}; the same command with --out {self.out} resumes it")
        named = {
            "accuracy": f"test accuracy {result.metrics.get('accuracy', 0):.4f}",
            "loss": f"test loss {result.metrics.get('loss', 0):.4f}",
        }
        if result.metrics:
            say(", ".join(text for key, text in named.items() if key in result.metrics))
        say(result.privacy["statement"])
        say(f"{result.seconds:.1f} s of training; everything is in {result.out}")


def show_measurement(case: Case, row: Mapping[str, Any], number: int, count: int) -> None:
    """Print one measurement of a comparison as it comes."""
    name = ", ".join([case.backend, case.model, str(case.shape), f"batch {case.batch}", case.strategy])
    texts = {
        "ratio": "time ratio {:.2f}", "seconds": "{:.4f} s", "total_mib": "peak {:,.0f} MiB",
        "largest_batch": "largest batch {:,}", "unsupported": "unsupported: {}", "failed": "failed: {}",
    }  # fmt: skip
    found = [text.format(row[key]) for key, text in texts.items() if row.get(key) is not None]
    print(f"[{number}/{count}] {name}: {', '.join(found) or 'too large for the memory'}", file=sys.stderr, flush=True)
