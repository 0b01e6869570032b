"""The comparison harness: the grid, resuming, the search for the largest batch, the report, and one measurement in each framework."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from dptrain import TrainConfig, compare
from dptrain.cli import sweeps
from dptrain.comparison import Case, Settings, Shape, grid
from dptrain.comparison import run as runner
from dptrain.comparison.measure import ALLOCATOR, environment
from dptrain.comparison.memory import ProcessMeter
from dptrain.comparison.report import merged
from dptrain.errors import ConfigError

CONFIG = {
    "model": {"name": "mlp", "hidden": [16]},
    "strategy": {"name": "mixed_ghost", "max_grad_norm": 0.5},
    "privacy": {"target_epsilon": 1.0},
    "sampling": {"sample_rate": 0.1, "steps": 10},
    "performance": {"physical_batch_size": 8},
}
SHAPE = Shape((8, 8, 1))


def cases(**settings: Any) -> list[Case]:
    given = {"backends": ["torch"], "strategies": ["mixed_ghost", "per_sample"], **settings}
    return grid(TrainConfig.parse(CONFIG).to_dict(), SHAPE, **given)


def test_the_grid_has_every_combination_once_and_always_non_private() -> None:
    found = cases(backends=["torch", "tensorflow"], batches=[8, 16], models=["mlp", "lipschitz_mlp"])
    # per model, batch and backend: memory of three strategies, time of two
    assert len(found) == 2 * 2 * 2 * 5
    assert len({case.hash for case in found}) == len(found)
    assert {case.strategy for case in found if case.measurement == "memory"} == {"non_private", "mixed_ghost", "per_sample"}
    assert all(case.strategy != "non_private" for case in found if case.measurement == "time")


def test_a_case_is_one_release_over_one_physical_batch_and_keeps_what_the_strategies_share() -> None:
    one = next(case for case in cases(batches=[16]) if case.strategy == "per_sample")
    config = TrainConfig.parse(one.config)
    assert config.strategy.max_grad_norm == 0.5
    assert config.privacy.target_epsilon is None
    assert config.sampling.sample_rate == 1.0
    assert config.performance.physical_batch_size == 16
    assert Case.from_json(one.to_json()).hash == one.hash


def test_a_sweep_sets_any_setting_the_batch_and_the_input() -> None:
    sweep = {"model.hidden": ["[8]", "[8, 8]"], "input": ["8x8x1", "16x16x3"], "batch": ["4"]}
    found = [case for case in cases(sweep=sweep) if case.strategy == "mixed_ghost" and case.measurement == "time"]
    assert [(case.config["model"]["hidden"], case.shape.input, case.batch) for case in found] == [
        ([8], (8, 8, 1), 4), ([8], (16, 16, 3), 4), ([8, 8], (8, 8, 1), 4), ([8, 8], (16, 16, 3), 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backends": ["jax"]}, "no backend 'jax'"),
        ({"backends": []}, "at least one backend"),
        ({"measurements": ["speed"]}, "no measurement 'speed'"),
        ({"sweep": {"width": [1]}}, "a setting such as model.width"),
        ({"sweep": {"model.width": []}}, "has no values"),
        ({"sweep": {"model.width": [16]}}, "width"),  # the mlp has none
        ({"batches": ["many"]}, "positive whole number"),
        ({"batches": [0]}, "positive whole number"),
        ({"input": "32xx3"}, "channels last"),
        ({"strategies": ["gost"]}, "gost"),
        ({"models": ["vgg99"]}, "vgg99"),
    ],
)
def test_what_is_no_setting_is_refused_before_anything_runs(settings: dict[str, Any], words: str, monkeypatch) -> None:
    monkeypatch.setattr(runner, "subprocess_measure", lambda case: pytest.fail("a measurement ran"))
    given = {"backends": ["torch"], "strategies": ["mixed_ghost"], "input": "8x8x1", **settings}
    with pytest.raises(ConfigError, match=words):
        compare(CONFIG, given.pop("backends"), given.pop("strategies"), **given)


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="pairs must be at least 1; threads must be at least 1"):
        Settings(pairs=0, threads=0)


class Fake:
    """Stands for the subprocess: figures that depend on the strategy alone."""

    def __init__(self) -> None:
        self.calls: list[Case] = []

    def __call__(self, case: Case) -> dict[str, Any]:
        self.calls.append(case)
        slow = {"non_private": 1.0, "mixed_ghost": 1.2, "per_sample": 2.0}[case.strategy]
        if case.measurement == "time":
            return {"plain_seconds": 0.1, "seconds": 0.1 * slow, "ratio": slow, "ratio_low": slow - 0.1, "ratio_high": slow + 0.1,
                    "device": "a machine"}  # fmt: skip
        return {"total_mib": 50.0 * slow, "rest_mib": 300.0, "device": "a machine"}


def run(tmp_path, monkeypatch, fake: Any, **settings: Any) -> Any:
    monkeypatch.setattr(runner, "subprocess_measure", fake)
    return compare(CONFIG, ["torch"], ["mixed_ghost", "per_sample"], input="8x8x1", out=tmp_path, **settings)


def test_a_finished_measurement_is_not_run_again_and_a_torn_or_failed_one_is(tmp_path, monkeypatch) -> None:
    fake = Fake()
    first = run(tmp_path, monkeypatch, fake)
    assert len(fake.calls) == 5
    second = run(tmp_path, monkeypatch, fake)
    assert len(fake.calls) == 5
    assert second.rows == first.rows
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text()[:-30])  # a kill in mid-write
    assert run(tmp_path, monkeypatch, fake).rows == first.rows
    assert len(fake.calls) == 6
    assert run(tmp_path, monkeypatch, fake).rows == first.rows  # the torn line did not swallow the one after it
    assert len(fake.calls) == 6
    run(tmp_path, monkeypatch, fake, settings=Settings(pairs=11))
    assert len(fake.calls) == 11


def test_what_failed_is_a_row_with_its_reason_and_is_tried_again(tmp_path, monkeypatch) -> None:
    failed = run(tmp_path, monkeypatch, lambda case: {"failed": "exit code 1: RuntimeError: no such kernel"})
    assert "no such kernel" in failed.markdown()
    fake = Fake()
    assert "no such kernel" not in run(tmp_path, monkeypatch, fake).markdown()
    assert len(fake.calls) == 5


def test_the_table_has_ratios_to_non_private_and_the_machine(tmp_path, monkeypatch) -> None:
    found = run(tmp_path, monkeypatch, Fake())
    rows = {row["strategy"]: row for row in merged(found.rows)}
    assert rows["mixed_ghost"]["ratio"] == 1.2
    assert rows["mixed_ghost"]["memory_ratio"] == pytest.approx(1.2)
    assert rows["non_private"]["ratio"] == 1.0
    text = found.markdown()
    assert "| mlp | 8x8x1 | 8 | torch | per_sample | 200.0 | 2.00 (1.90 to 2.10) | 100 | 2.00 |" in text
    assert "a machine" in text
    assert "torch 2" in text


def test_the_report_is_a_table_two_plots_and_a_page_that_needs_nothing_else(tmp_path, monkeypatch) -> None:
    found = run(tmp_path, monkeypatch, lambda case: {"unsupported": "no <bound>"} if case.strategy == "per_sample" else Fake()(case))
    found.save(tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "no &lt;bound&gt;" in page
    assert "<svg" in page
    assert not re.search(r"(src|href)=\"(?!#)", page.replace('xlink:href="#', "")), "the page refers to something outside itself"
    assert (tmp_path / "report" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report" / "table.md").read_text() == found.markdown()


def test_a_sweep_is_drawn_as_lines(tmp_path, monkeypatch) -> None:
    found = run(tmp_path, monkeypatch, Fake(), sweep={"batch": [8, 16, 32]})
    found.save(tmp_path)
    svg = (tmp_path / "plot.svg").read_text()
    assert "line2d" in svg


def test_the_largest_batch_is_found_to_within_four_percent(monkeypatch) -> None:
    """A linear memory model of which a few trials are killed, as a process that passes its limit is."""
    for per_example, start in ((7.3, 8), (0.9, 64), (1500.0, 32), (5000.0, 8)):
        trials = []

        def fake(case: Case, per_example: float = per_example, trials: list[int] = trials) -> dict[str, Any]:
            trials.append(case.batch)
            total = 100 + per_example * case.batch
            return {"too_large": True} if total > 6000 else {"total_mib": total, "device": "a machine", "meter": "a meter"}

        monkeypatch.setattr(runner, "subprocess_measure", fake)
        [case] = [c for c in cases(measurements=["largest"], batches=[start]) if c.strategy == "mixed_ghost"]
        found = runner.largest(case)["largest_batch"]
        exact = int((4096 - 100) / per_example)
        assert found <= exact
        assert exact <= max(found * 1.04, found + 1), (found, exact)
        assert len(trials) == len(set(trials)) <= 12


def test_the_search_for_the_largest_batch_ends_soon_whatever_the_memory(monkeypatch) -> None:
    """Memory that grows by a power of the batch, and not quite steadily."""
    rng = random.Random(0)
    for _ in range(200):
        base, growth, power, start = rng.uniform(0, 2000), 10 ** rng.uniform(-1, 3.5), rng.choice([0.8, 1.0, 1.3]), rng.choice([1, 8, 64])
        trials: list[int] = []

        def fake(
            case: Case, base: float = base, growth: float = growth, power: float = power, trials: list[int] = trials
        ) -> dict[str, Any]:
            trials.append(case.batch)
            total = (base + growth * case.batch**power) * (1 + 0.02 * ((case.batch * 7919 % 100) / 100 - 0.5))
            return {"total_mib": total, "device": "a machine", "meter": "a meter"}

        monkeypatch.setattr(runner, "subprocess_measure", fake)
        [case] = [c for c in cases(measurements=["largest"], batches=[start]) if c.strategy == "mixed_ghost"]
        runner.largest(case)
        assert len(trials) == len(set(trials)) <= 20, trials


def test_an_unsupported_case_has_no_largest_batch(monkeypatch) -> None:
    monkeypatch.setattr(runner, "subprocess_measure", lambda case: {"unsupported": "no bound"})
    [case] = [c for c in cases(measurements=["largest"]) if c.strategy == "mixed_ghost"]
    assert runner.largest(case) == {"unsupported": "no bound"}


def test_threads_are_fixed_before_the_framework_is_imported() -> None:
    case = cases(settings=Settings(threads=3))[0]
    assert environment(case)["OMP_NUM_THREADS"] == "3"
    timed = next(c for c in cases() if c.measurement == "time")
    assert not set(ALLOCATOR) & set(environment(timed)), "the allocator's settings cost time"


def test_the_process_meter_sees_an_array() -> None:
    import numpy as np

    meter = ProcessMeter()
    rest = meter.now()
    meter.reset()
    array = np.ones(32 * 2**20 // 8)
    del array
    assert 30 * 2**20 < meter.peak() - rest < 40 * 2**20


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_a_measurement_in_a_process_of_its_own(backend: str, tmp_path) -> None:
    """A weight of 24 MiB and its gradient are in the peak, whatever the framework's allocator keeps of what was freed before."""
    config = {**CONFIG, "model": {"name": "mlp", "hidden": [512]}}
    quick = Settings(pairs=2, warmup=1, threads=1)
    unsupported = ["clipless"] if backend == "torch" else []
    found = compare(config, [backend], ["mixed_ghost", *unsupported], input="64x64x3", settings=quick, out=tmp_path)
    rows = {row["strategy"]: row for row in merged(found.rows)}
    assert rows["mixed_ghost"]["ratio"] > 0
    assert rows["mixed_ghost"]["seconds"] > 0
    assert rows["mixed_ghost"]["model_mib"] > 24
    assert rows["mixed_ghost"]["predicted_ratio"] > 1 and rows["mixed_ghost"]["predicted_seconds"] > 0
    assert rows["mixed_ghost"]["predicted_mib"] > 48 and "predicted memory" in found.markdown()
    assert rows["non_private"]["total_mib"] > 48
    assert rows["mixed_ghost"]["total_mib"] > 48
    assert rows["mixed_ghost"]["memory_ratio"] == rows["mixed_ghost"]["total_mib"] / rows["non_private"]["total_mib"]
    assert all("no proven bound" in rows[name]["unsupported"] for name in unsupported)
    kept = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["hash"] for row in kept] == [row["hash"] for row in found.rows]
    assert {"config_hash", "versions", "device", "threads"} <= set(kept[0])


def test_a_process_that_passes_its_limit_ends_itself() -> None:
    [case] = [c for c in cases(measurements=["largest"], settings=Settings(limit_gib=1e-3, threads=1)) if c.strategy == "non_private"]
    assert runner.subprocess_measure(case) == {"too_large": True}


def test_a_crash_of_the_process_is_a_failed_row(monkeypatch) -> None:
    monkeypatch.setattr(runner, "COMMAND", (runner.sys.executable, "-c", "raise RuntimeError('a strange crash')"))
    assert runner.subprocess_measure(cases()[0]) == {"failed": "exit code 1: RuntimeError: a strange crash"}


def test_a_step_that_is_not_ours_and_a_native_model(tmp_path, monkeypatch) -> None:
    (tmp_path / "theirs.py").write_text(
        "import torch\n"
        "def loop(bench):\n"
        "    optimizer = torch.optim.SGD(bench.model.parameters(), bench.learning_rate)\n"
        "    def step():\n"
        "        optimizer.zero_grad()\n"
        "        bench.loss(bench.model(bench.x), bench.y).mean().backward()\n"
        "        optimizer.step()\n"
        "    return step\n"
        "def model(backend, shape, outputs):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, outputs))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    quick = Settings(pairs=2, warmup=1, threads=1)
    found = compare(
        CONFIG, ["torch"], ["theirs:loop", "theirs:gone"], models=["theirs:model"], input="8x8x1", settings=quick, measurements=["time"]
    )
    assert found.rows[0]["ratio"] > 0
    assert "theirs:gone cannot be loaded" in found.rows[1]["unsupported"]


def test_the_command_line_reads_sweeps() -> None:
    assert sweeps(["batch=8, 16", "model.width=4"]) == {"batch": ["8", "16"], "model.width": ["4"]}
    with pytest.raises(ConfigError, match="key=value"):
        sweeps(["batch"])
