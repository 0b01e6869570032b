"""How long an epsilon and a calibration take, each with cold caches: ``python -m benchmarks.accounting``.

    python -m benchmarks.accounting --quick

Prints a Markdown table: median, 99th percentile and worst time, and the share of the settings above the limit (50 ms for an
epsilon, 1 s for a calibration). Wall time is what a user waits; processor time is what it costs on a machine that does nothing
else. The libraries are imported before the first setting. Settings are the products of SETTINGS, for every relation.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from accounting import (
    ACCOUNTANTS,
    AccountingError,
    NeighboringRelation,
    SampledGaussian,
    calibrate_noise_multiplier,
    calibrate_sample_rate,
    calibrate_steps,
    get_accountant,
)

RATES = (1e-6, 1e-4, 1e-2, 0.3, 1.0)
SIGMAS = (0.3, 0.6, 1.0, 3.0, 10.0, 100.0)
STEPS = (1, 100, 10_000, 1_000_000)
DELTAS = (1e-5, 1e-10)
TARGETS = (0.1, 1.0, 8.0)
LIMITS = {"epsilon": 0.05, "noise": 1.0, "rate": 1.0, "steps": 1.0}


@dataclass(frozen=True)
class Timing:
    """One setting: seconds of wall and of processor time, and what was timed."""

    wall: float
    cpu: float
    setting: tuple[object, ...]


def calls(kind: str, name: str, relation: str, quick: bool) -> Iterator[tuple[tuple[object, ...], Callable[[], object]]]:
    """Yields (setting, call) for one kind of question.

    Args:
        kind: "epsilon", or what is calibrated: "noise", "rate" or "steps".
        name: of the accountant.
        relation: the neighbouring relation.
        quick: take every seventh setting only.
    """
    accountant = get_accountant(name, relation)
    if kind == "epsilon":
        for q, s, n, d in itertools.islice(itertools.product(RATES, SIGMAS, STEPS, DELTAS), 0, None, 7 if quick else 1):
            yield (q, s, n, d), lambda q=q, s=s, n=n, d=d: accountant.epsilon([(SampledGaussian(s, q), n)], d)
        return
    function: Callable[..., object]
    function, first, second = {
        "noise": (calibrate_noise_multiplier, RATES, STEPS),
        "rate": (calibrate_sample_rate, SIGMAS, STEPS),
        "steps": (calibrate_steps, RATES, SIGMAS),
    }[kind]
    for e, d, a, b in itertools.islice(itertools.product(TARGETS, DELTAS, first, second), 0, None, 7 if quick else 1):
        yield (e, d, a, b), lambda e=e, d=d, a=a, b=b: function(e, d, a, b, name, relation)


def clear() -> None:
    """Empties every cache of the accountants."""
    from accounting import prv, rdp, renyi

    for cached in (prv._detail_of, rdp._autodp_curve, renyi.log_moment):
        cached.cache_clear()


def measure(kind: str, name: str, quick: bool) -> list[Timing]:
    """Returns the time of every setting; a budget that is out of reach counts, too: its refusal takes its time."""
    found = []
    for relation in NeighboringRelation:
        for setting, call in calls(kind, name, relation.value, quick):
            clear()
            wall, cpu = time.perf_counter(), time.process_time()
            with contextlib.suppress(AccountingError):
                call()
            found.append(Timing(time.perf_counter() - wall, time.process_time() - cpu, (relation.value, *setting)))
    return found


def row(kind: str, name: str, timings: Sequence[Timing]) -> str:
    """Returns the line of the table."""
    limit, count = LIMITS[kind], len(timings)
    cells = [f"{name}, {kind}", str(count), f"{limit * 1e3:.0f}"]
    for seconds in (sorted(t.wall for t in timings), sorted(t.cpu for t in timings)):
        shown = (seconds[count // 2], seconds[int(0.99 * (count - 1))], seconds[-1])
        cells += [f"{second * 1e3:.0f}" for second in shown] + [f"{sum(second > limit for second in seconds) / count:.1%}"]
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, and the slowest setting of each row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="every seventh setting only")
    parser.add_argument("--kinds", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    args = parser.parse_args(argv)
    for name in ACCOUNTANTS:  # imports
        for event in (SampledGaussian(1.0, 1.0), SampledGaussian(1.1, 0.01)):
            get_accountant(name).epsilon([(event, 10)], 1e-5)
    heads = [f"{what} {kind}" for kind in ("wall", "cpu") for what in ("median", "p99", "worst", "above limit,")]
    print("Milliseconds; limit as stated.\n\n| question | settings | limit | " + " | ".join(heads) + " |\n|" + "---|" * 11)
    slowest = []
    for kind in args.kinds:
        for name in ACCOUNTANTS:
            timings = measure(kind, name, args.quick)
            print(row(kind, name, timings), flush=True)
            slowest.append((name, kind, max(timings, key=lambda t: t.cpu)))
    print("\nSlowest (processor time):")
    for name, kind, timing in slowest:
        print(f"- {name}, {kind}: {timing.cpu * 1e3:.0f} ms at {timing.setting}")


if __name__ == "__main__":
    main()
