"""Runs on shuffled passes that are killed in the middle of one: every example is in one batch of each recorded pass, and no more."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from dptrain import TrainConfig
from dptrain.checkpoint import Checkpoint
from dptrain.sampling import ShuffledSampler
from tests.core.shared import config
from tests.durability import toy
from tests.durability.harness import Place, assert_same_weights, ended, forked, in_a_small_process, releases, train

BATCH, SPAN, STEPS = 8, 5, 25  # of the forty examples of the harness: five passes of five steps


def passes(place: Place, seeded: bool) -> TrainConfig:
    """A run that shares a ledger, with a checkpoint after every second step."""
    privacy = {"noise_multiplier": 1.0, "accountant": "rdp", "relation": "zero_out", "ledger": str(place.data)}
    return config(
        privacy={**privacy, **({"unsafe_seed": 9} if seeded else {})}, strategy="per_sample", model="mlp",
        sampling={"expected_batch_size": BATCH, "steps": STEPS, "scheme": "shuffle"}, performance={"checkpoint_every": 2},
    )  # fmt: skip


def observed(place: Place, name: str, cfg: TrainConfig, kill_at: int | None) -> None:
    """Train; note in a file, as it happens, which examples each step drew, and at which step the process dies by its own hand."""
    draw, log = ShuffledSampler.sample, place.root / "drawn"

    def spy(self: ShuffledSampler, step: int) -> np.ndarray:
        found = draw(self, step)
        with open(log, "a") as file:
            file.write(f"{releases(place.out(name) / 'ledger.jsonl')} {step} {' '.join(map(str, found))}\n")
        return found

    ShuffledSampler.sample = spy  # type: ignore[method-assign]
    try:
        train(place, name, cfg, progress=lambda p: os.kill(os.getpid(), signal.SIGKILL) if p.step == kill_at else None)
    finally:
        ShuffledSampler.sample = draw  # type: ignore[method-assign]


def killed_in_passes(root: str, seeded: bool) -> tuple[int, int, int]:
    """Kill in the second pass, and again in the third; then let the run finish. Returns steps, releases made, releases recorded."""
    place = Place(Path(root))
    cfg = passes(place, seeded)
    for kill_at in (7, 13):
        assert not ended(forked(observed, place, "a", cfg, kill_at))
    assert ended(forked(observed, place, "a", cfg, None))
    assert releases(place.out("a") / "ledger.jsonl") == releases(place.data)  # type: ignore[arg-type]
    if seeded:
        train(Place(place.root / "other"), "b", passes(Place(place.root / "other"), True))
        assert_same_weights(place.out("a"), place.root / "other" / "b")
    recorded = releases(place.out("a") / "ledger.jsonl")
    return Checkpoint.load(place.out("a") / "checkpoint.safetensors", {}).step, len(toy.seen(place.side("a"))), recorded


def under_each_record(root: Path, seeded: bool) -> list[dict[int, tuple[int, ...]]]:
    """Step -> batch for each recorded release; a step that begins a pass is drawn before its record is there."""
    found: list[dict[int, tuple[int, ...]]] = []
    session_first, before = 0, -1
    for line in (root / "drawn").read_text().splitlines():
        recorded, step, *batch = map(int, line.split())
        if step <= before or before < 0:
            session_first = step  # a session begins
        before = step
        begins = step % SPAN == 0 and step // SPAN >= recorded if seeded else (step - session_first) % SPAN == 0
        if begins:
            found.append({})
        under = found[step // SPAN] if seeded else found[-1]
        assert under.setdefault(step, tuple(batch)) == tuple(batch)
    return found


@pytest.mark.parametrize("seeded", [False, True])
def test_killed_in_the_middle_of_a_pass(tmp_path: Path, seeded: bool) -> None:
    (tmp_path / "other").mkdir()
    steps, made, recorded = in_a_small_process(killed_in_passes, str(tmp_path), seeded)
    under = under_each_record(tmp_path, seeded)
    assert recorded == len(under) == STEPS // SPAN  # what was planned, never more
    for batches in under:
        drawn = [i for batch in batches.values() for i in batch]
        assert len(batches) <= SPAN and len(set(drawn)) == len(drawn) == BATCH * len(batches)
    # Checkpoints are after steps 6 and 12; without the seed the passes from there on are new ones, and two were cut short.
    assert steps == (STEPS if seeded else 6 + 6 + 5)
    assert made == (STEPS if seeded else 7 + 7 + 5)
