"""One benchmark case in a process of its own: pairs of a private and a non-private step, interleaved, medians.

    python -m benchmarks.case --backend torch --model cnn --strategy mixed_ghost --batch 64

Prints one JSON line. A step is all that training does after the batch is drawn: transfer, sum, noise, update, projection. With
``--only plain`` or ``--only private`` one of the two runs alone, so that the process's peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from typing import Any

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--backend", default="torch")
PARSER.add_argument("--model", default="cnn")
PARSER.add_argument("--strategy", default="mixed_ghost")
PARSER.add_argument("--batch", type=int, default=64)
PARSER.add_argument("--size", type=int, default=32)
PARSER.add_argument("--pairs", type=int, default=15)
PARSER.add_argument("--threads", type=int, default=2)
PARSER.add_argument("--decision", default="time")
PARSER.add_argument("--gradients", default="book_keeping")
PARSER.add_argument("--only", default="both", choices=["both", "plain", "private"])
PARSER.add_argument("--compile", default="auto", choices=["auto", "true", "false"])


def make_step(args: argparse.Namespace, strategy: str, data: Any) -> Any:
    """A step function over the whole data set as one physical batch."""
    from accounting import PrivacyLedger
    from dptrain.config import TrainConfig
    from dptrain.inforce import PlanInForce
    from dptrain.mechanism import GaussianMechanism, release_event
    from dptrain.randomness import NOISE, SAMPLING, RandomKey
    from dptrain.sampling import PoissonSampler
    from dptrain.step import Release, TrainingStep
    from dptrain.trainer import prepare

    config = TrainConfig.parse(
        {
            "model": args.model,
            "strategy": strategy,
            "privacy": {"noise_multiplier": 1.0},
            "sampling": {"sample_rate": 1.0, "steps": 1},
            "performance": {
                "physical_batch_size": args.batch,
                "decision": args.decision,
                "gradients": args.gradients,
                "compile": {"true": True, "false": False}.get(args.compile, "auto"),
            },
        }
    )
    setup = prepare(config, args.backend, data)
    release = in_force = None
    if setup.plan.private:
        mechanism, relation = GaussianMechanism(1.0), config.privacy.relation
        in_force = PlanInForce(config.strategy, setup.info, setup.plan, mechanism, relation, args.batch)
        stds = mechanism.stds(setup.plan)
        release = Release(stds, release_event(setup.plan, stds, 1.0), RandomKey.make(NOISE), PrivacyLedger(None))
    optimizer = setup.backend.build_optimizer(config.optimizer, setup.model)
    sampler = PoissonSampler(args.batch, 1.0, RandomKey.make(SAMPLING))
    step = TrainingStep(
        setup.backend, setup.model, setup.loss, optimizer, setup.plan, sampler, data.x_train, data.y_train,
        args.batch, lambda t: 1e-3, 0, release, args.gradients == "two_pass", in_force if in_force and in_force.moves else None,
    )  # fmt: skip
    count = iter(range(10**9))

    def run() -> float:
        begin = time.perf_counter()
        step(next(count))
        setup.backend.synchronize()
        return time.perf_counter() - begin

    return run


def main() -> None:
    """Measure and print."""
    args = PARSER.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ[name] = str(args.threads)
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TF_NUM_INTEROP_THREADS": "1"}
    import numpy as np

    from dptrain.data import from_arrays

    rng = np.random.default_rng(0)
    x = rng.standard_normal((args.batch, args.size, args.size, 3)).astype(np.float32)
    data = from_arrays(x, rng.integers(0, 10, args.batch), num_classes=10)
    plain = make_step(args, "non_private", data) if args.only != "private" else lambda: 1.0
    private = make_step(args, args.strategy, data) if args.only != "plain" else lambda: 1.0
    for _ in range(3):
        plain(), private()
    pairs = [(plain(), private()) for _ in range(args.pairs)]
    ratios = sorted(b / a for a, b in pairs)
    result = {
        **vars(args),
        "plain_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "private_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
