"""The standard cases, ours and others', in one command: ``python -m benchmarks.run`` writes ``benchmarks/RESULTS.md``.

    python -m benchmarks.run --cases vgg transformer --backends torch --no-peers

Each case is one config of this folder, measured by ``dptrain compare``; what is finished is not run again. Peers are found as
``benchmarks/peers`` says, and a missing one is a row with what to install.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dptrain.comparison import Comparison, Settings, compare
from dptrain.progress import show_measurement

HERE = Path(__file__).parent
TORCH_PEERS = ("opacus:hooks", "opacus:ghost", "opacus:functorch", "private_vision:mixed", "fastdp:mixopt")
TFPRIVACY = ("tfprivacy:dp_model",)
LIPDP = ("lipdp:quick", "lipdp:spectral")
PLAIN = {"torch": "plain:torch_loop", "tensorflow": "plain:keras_loop"}

INTRO = """# Benchmarks

Written by `python -m benchmarks.run`. Time: the ratio of a private step to a non-private one, median and quartiles of {pairs}
interleaved pairs in one process with {threads} threads. Memory: the peak of the process during steps, above the framework loaded and
no model, in a process of its own, and its ratio to that of non-private training; model, data and what checks before the first step
left behind are in it. `plain` is the plainest loop of the framework: the yardstick `non_private` is ours, and this row shows that it
is not slow. Rows with `memory` in the column `performance.prefer` give up speed for memory. Peers run in their exact modes, on the
same model and batch. LipDP and TensorFlow Privacy run under an interpreter of their own, and their ratios are to a plain Keras loop over
the same network there, as the note says.

"""


@dataclass(frozen=True)
class Standard:
    """A standard case.

    Args:
        config: name of a file in this folder.
        input: shape of an example.
        num_classes: classes.
        strategies: ours.
        peers: others that can run the model, by framework.
        prefer_memory: whether the setting that gives up speed is measured too.
        model: a preset or a function of ``benchmarks.networks`` in place of the config's model.
        batch: physical batch in place of the config's.
    """

    config: str
    input: str
    num_classes: int = 10
    strategies: tuple[str, ...] = ("mixed_ghost", "per_sample")
    peers: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"torch": TORCH_PEERS})
    prefer_memory: bool = True
    model: str = ""
    batch: int = 0

    @property
    def name(self) -> str:
        """What the case is called on the command line."""
        return self.model.rpartition(":")[2] or self.config


STANDARD = (
    Standard("vgg", "32x32x3", peers={"torch": TORCH_PEERS, "tensorflow": TFPRIVACY}),
    Standard("resnet18_gn", "32x32x3"),
    Standard("transformer", "128", 2),
    Standard("bert", "128", 2, ("mixed_ghost",)),
    Standard("clipless", "32x32x3", 10, ("clipless",), peers={"tensorflow": LIPDP}, prefer_memory=False),
)
HOOKS = {"torch": ("opacus:hooks",)}
OTHERS = tuple(
    Standard(
        config, shape, classes, ("mixed_ghost",), HOOKS, False, model if model == "vit_tiny" else f"benchmarks.networks:{model}", batch
    )
    for model, config, shape, classes, batch in (
        ("vit_tiny", "vgg", "32x32x3", 10, 64),
        ("mobilenet", "vgg", "32x32x3", 10, 64),
        ("wide_resnet", "vgg", "32x32x3", 10, 64),
        ("text_cnn", "transformer", "128", 2, 64),
        ("lstm", "transformer", "64", 2, 64),
        ("gru", "transformer", "64", 2, 64),
    )
)
LARGEST = Standard("vgg19", "32x32x3", 10, ("mixed_ghost", "per_sample"))


def qualified(peers: Sequence[str]) -> list[str]:
    """Names as ``dptrain compare`` wants them."""
    return [f"benchmarks.peers.{name}" for name in peers]


def measure(case: Standard, backend: str, peers: bool, out: Path, settings: Settings) -> Comparison:
    """One case in one framework: ours, the plainest loop, and peers."""
    others = [PLAIN[backend], *(case.peers.get(backend, ()) if peers else ())]
    return compare(HERE / f"{case.config}.yaml", [backend], [*case.strategies, *qualified(others)], input=case.input,
                   models=[case.model] if case.model else [], batches=[case.batch] if case.batch else [],
                   num_classes=case.num_classes, settings=settings, out=out, progress=show_measurement)  # fmt: skip


def small(case: Standard, backend: str, out: Path, settings: Settings) -> Comparison:
    """The case with ``performance.prefer: memory``."""
    sweep = {"performance.prefer": ["memory"]}
    return compare(HERE / f"{case.config}.yaml", [backend], ["mixed_ghost"], input=case.input, num_classes=case.num_classes, sweep=sweep,
                   settings=settings, out=out, progress=show_measurement)  # fmt: skip


def largest(backend: str, peers: bool, out: Path, settings: Settings) -> Comparison:
    """The largest batch of a VGG-19 within the memory limit."""
    others = qualified(("opacus:hooks",)) if backend == "torch" and peers else []
    rows = []
    for strategies, prefer in (([*LARGEST.strategies, *others], "speed"), (["mixed_ghost"], "memory")):
        found = compare(HERE / "vgg19.yaml", [backend], strategies, input=LARGEST.input, num_classes=10, measurements=["largest"],
                        sweep={"performance.prefer": [prefer]}, settings=settings, out=out, progress=show_measurement)  # fmt: skip
        rows += found.rows
    return Comparison(rows)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[*(case.name for case in (*STANDARD, *OTHERS)), "vgg19"])
    parser.add_argument("--backends", nargs="+", default=["torch", "tensorflow"], choices=list(PLAIN))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-gib", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md")
    args = parser.parse_args()
    settings = Settings(pairs=args.pairs, threads=args.threads, limit_gib=args.limit_gib)
    sections = []
    for case in (*STANDARD, *OTHERS):
        for backend in args.backends if case.name in args.cases else ():
            out = args.out / f"{case.name}-{backend}"
            found = measure(case, backend, not args.no_peers, out, settings)
            if case.prefer_memory:
                found = Comparison([*found.rows, *small(case, backend, out, settings).rows])
            found.save(out)
            sections.append(f"## {case.name}, {backend}\n\n{found.markdown()}")
    for backend in args.backends if "vgg19" in args.cases else ():
        found = largest(backend, not args.no_peers, args.out / f"vgg19-{backend}", settings)
        sections.append(f"## Largest batch in {args.limit_gib:g} GiB, vgg19, {backend}\n\n{found.markdown()}")
    args.results.write_text(INTRO.format(pairs=args.pairs, threads=args.threads) + "\n".join(sections))


if __name__ == "__main__":
    main()
