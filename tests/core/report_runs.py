"""Run directories made without training: config, ledger, metrics and statement as the trainer writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accounting import PrivacyLedger
from dptrain.checkpoint import FORMAT, write_json
from dptrain.config import TrainConfig
from dptrain.info import LayerInfo
from dptrain.mechanism import GaussianMechanism, release_event
from dptrain.plan import Group, Plan
from dptrain.report import COMPLETE, INTERRUPTED, privacy_statement, run_facts
from tests.core.shared import blobs, config

VERSIONS = {"torch": "2.0"}


def plan_of(run: TrainConfig, bound: float = 0.5, layer: str = "fc") -> Plan:
    """Two layers in one group; without a bound in non-private training."""
    layers = (LayerInfo(layer, "linear", 1, 5, 8, 48), LayerInfo("head", "linear", 1, 8, 3, 27))
    private = run.strategy.name != "non_private"
    group = Group("all", (layer, "head"), bound if private else float("inf"), bound if private else None, 75)
    method = "ghost" if private else "none"
    return Plan(run.strategy.name, (group,), {layer: method, "head": method}, "abadi" if private else None, layers=layers)  # type: ignore[dict-item]


def make_run(
    path: Path,
    run: TrainConfig | None = None,
    releases: int | None = None,
    complete: bool | None = None,
    evaluate_every: int = 2,
    layer: str = "fc",
    **parts: Any,
) -> Path:
    """A run directory.

    Args:
        path: to be made.
        run: the config; by default the smallest one with ``parts``.
        releases: in the ledger; by default all planned ones.
        complete: what the closing files say; None leaves a run that has no closing files.
        evaluate_every: steps between lines with test metrics.
        layer: name of the first layer.
    Returns:
        The path.
    """
    run = run or config(**parts)
    data, private = blobs(), run.strategy.name != "non_private"
    rate, steps = run.sampling.rate(len(data.x_train)), run.sampling.num_steps(len(data.x_train))
    done = steps if releases is None else releases
    sigma = run.privacy.noise_multiplier or 1.0
    path.mkdir(parents=True)
    plan = plan_of(run, layer=layer)
    stds = GaussianMechanism(sigma).stds(plan, run.privacy.relation) if private else None
    with PrivacyLedger(path / "ledger.jsonl") as ledger:
        for _ in range(done if private and stds else 0):
            ledger.record(release_event(plan, stds or {}, rate, run.privacy.relation))
        events = ledger.events
    identity = {"config_hash": run.hash, "backend": "torch"}
    facts = run_facts(plan, stds, data, VERSIONS, identity)
    (path / "config.yaml").write_text(run.to_yaml())
    record = {"format": FORMAT, **identity, "num_examples": len(data.x_train), "num_steps": steps, "sample_rate": rate}
    write_json(path / "run.json", record | ({"noise_multiplier": sigma} if private else {}) | {"facts": facts})
    lines: list[dict[str, Any]] = []
    for step in range(1, done + 1):
        lines.append({"step": step, "train_loss": 1.0 / step, "private": False})
        if step % evaluate_every == 0:
            lines.append({"step": step, "private": False, "test_accuracy": 1 - 0.5 / step, "test_loss": 1.0 / step})
    if complete is not None:
        lines.append({"step": done, "private": False, "final": complete, "test_accuracy": 1 - 0.5 / max(1, done)})
        write_json(path / "privacy.json", privacy_statement(run, events, facts, COMPLETE if complete else INTERRUPTED))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def edit(path: Path, **values: Any) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
