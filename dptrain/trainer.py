"""From a config to a trained model: data, plan, calibration, loop, ledger, checkpoints, privacy statement."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from accounting import PrivacyLedger, calibrate_noise_multiplier, get_accountant
from dptrain.checkpoint import Checkpoint, atomic_write, save_arrays, write_json
from dptrain.config import TrainConfig
from dptrain.data import Dataset
from dptrain.errors import ConfigError, RunError
from dptrain.guard import Guard, Records, data_facts, open_shared, refuse_overplanning, refuse_unbounded
from dptrain.inforce import PlanInForce
from dptrain.mechanism import GaussianMechanism, event_noise_multiplier, noise_multiplier_for, release_event
from dptrain.plan import Plan
from dptrain.profiling import Profile
from dptrain.randomness import NOISE, SAMPLING, RandomKey
from dptrain.report import COMPLETE, INTERRUPTED, privacy_statement, run_facts
from dptrain.rundir import RunDirectory, begun
from dptrain.sampling import Sampler, event_of, first_step, steps_per_release
from dptrain.setup import Setup, check_bounds, prepare
from dptrain.step import Release, TrainingStep


@dataclass(frozen=True)
class Progress:
    """What a progress display is told after each step.

    Args:
        step, num_steps: steps done and planned.
        loss: mean loss of the logical batch; NOT private.
        epsilon: spent so far, None in non-private training or where it was not computed for this step.
        examples_per_second: processed examples per second since the last report.
    """

    step: int
    num_steps: int
    loss: float
    epsilon: float | None
    examples_per_second: float


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Args:
        model: the native model.
        plan: the plan it was trained with.
        privacy: the privacy statement, as in ``privacy.json``; ``privacy["epsilon"]`` is None for non-private runs.
        metrics: on the test split, ``accuracy`` and ``loss``; about the test data NOT private.
        steps: steps applied to the weights.
        complete: False if the run was interrupted and can be resumed.
        seconds: time spent in steps, this session.
        out: the run directory, None if nothing was written.
    """

    model: Any = field(repr=False)
    plan: Plan = field(repr=False)
    privacy: dict[str, Any] = field(repr=False)
    metrics: dict[str, float]
    steps: int
    complete: bool
    seconds: float
    out: Path | None

    @property
    def epsilon(self) -> float | None:
        """Epsilon of all releases in the ledger."""
        value = self.privacy["epsilon"]
        return None if value is None else float(value)


def noise_multiplier(config: TrainConfig, sampling: Sampler | float, num_releases: int, history: PrivacyLedger | None = None) -> float:
    """The given noise multiplier, or the one calibrated to the target, before rounding is paid for.

    Args:
        config: the run.
        sampling: a sampler like the run's, with any key; or the rate of Poisson samples.
        num_releases: planned releases.
        history: what others have released from the same data.
    Raises:
        AccountingError: the budget cannot be reached, or does not cover the planned steps with the given noise, or noise or sample rate are
            beyond what can be accounted for.
    """
    privacy, before = config.privacy, history or PrivacyLedger(None)
    if privacy.noise_multiplier is not None:
        # Refuses what no accountant can speak of.
        event = event_of(sampling, event_noise_multiplier(privacy.noise_multiplier, privacy.noise), privacy.relation)
        refuse_overplanning(privacy, before, event, num_releases, steps_per_release(sampling))
        return privacy.noise_multiplier
    assert privacy.target_epsilon is not None
    claimed = calibrate_noise_multiplier(
        privacy.target_epsilon, privacy.target_delta, event_of(sampling, 1.0, privacy.relation).sample_rate, num_releases,
        accountant=privacy.accountant, relation=privacy.relation, history=before.events,
        event=lambda sigma: event_of(sampling, sigma, privacy.relation),
    )  # fmt: skip
    return noise_multiplier_for(claimed, privacy.noise)


def planned_noise(setup: Setup, history: PrivacyLedger | None = None) -> float:
    """The noise multiplier of a run that has not begun; as ``noise_multiplier``."""
    return noise_multiplier(setup.config, setup.scheme.public(len(setup.data.x_train)), setup.num_releases, history)


def train(
    config: TrainConfig,
    backend: str = "torch",
    *,
    out: str | Path | None = None,
    data: Dataset | None = None,
    model: Any = None,
    progress: Callable[[Progress], None] | None = None,
    on_start: Callable[[Setup, Mapping[str, float] | None, int], None] | None = None,
    profile: Profile | None = None,
) -> TrainResult:
    """Train a model with differential privacy.

    Args:
        config: the run; the same config runs in both frameworks.
        backend: ``torch`` or ``tensorflow``.
        out: run directory; resumed if it holds an unfinished run of the same config, backend and data. None writes nothing.
        data: a data set in place of the config's.
        model: a native model in place of the config's: any torch module, or a Keras model that is built.
        progress: called after each step.
        on_start: called once with the parts, the noise standard deviations and the first step.
        profile: filled with the time that each part of a step took; needs steps that are not compiled.
    Returns:
        The outcome, with the privacy statement.
    Raises:
        DptrainError: bad data, model, settings or directory; before the first step.
        AccountingError: the budget cannot be reached.
    Guarantee: the trained weights, and every checkpoint, are post-processing of the releases in the ledger, from which alone the
        stated epsilon is computed.
    """
    setup = prepare(config, backend, data, model)
    if profile is not None and setup.backend.compiles:
        raise ConfigError("A profile needs steps whose parts can be told apart; set performance.compile to false.")
    facts = {"num_examples": len(setup.data.x_train), "num_steps": setup.num_steps, "sample_rate": setup.sample_rate}
    about = data_facts(config.privacy, len(setup.data.x_train), setup.data.name)
    if not setup.plan.private:
        refuse_unbounded(config.privacy)
    stored, sigma = begun(out), None
    measuring = profile.running(setup.backend.synchronize) if profile is not None else nullcontext()
    with open_shared(config.privacy.ledger, about, bool(stored)) or nullcontext() as shared:
        if setup.plan.private:  # before the directory exists, so that a budget out of reach leaves nothing behind
            sigma = stored.get("noise_multiplier") or planned_noise(setup, shared)
        with RunDirectory(out, config, backend, facts, about) as run, interruptible() as stop, measuring:
            return Loop(setup, run, stop, sigma, Records(run.ledger, shared, run.run)).run(progress, on_start)


class Loop:
    """The loop of one run, from a fresh start or from a checkpoint."""

    def __init__(self, setup: Setup, run: RunDirectory, stop: threading.Event, sigma: float | None, records: Records) -> None:
        self.setup, self.run_dir, self.stop, self.records = setup, run, stop, records
        self.config, self.backend, self.ledger = setup.config, setup.backend, run.ledger
        self.stds: dict[str, float] | None = None
        self.in_force: PlanInForce | None = None
        self.guard: Guard | None = None
        self.bounds: dict[str, np.ndarray] = {}
        self.used: dict[str, float] = {}  # group -> part of its bound that the last sum used, NOT private
        self.optimizer = self.backend.build_optimizer(self.config.optimizer, setup.model)
        self.start = self._restore()
        seed = self.config.privacy.unsafe_seed
        # A shuffled pass that was cut short is not continued: its order is gone with the key, unless both follow from a seed.
        first = self.start if seed is None else 0
        self.sampler = sampler = setup.scheme.sampler(len(setup.data.x_train), RandomKey.make(SAMPLING, seed), first)
        self.span = steps_per_release(sampler)
        release = None
        if sigma is not None:
            sigma = self._sigma(sigma)
            self.in_force = self._in_force(sigma)
            release = self._release(seed, sigma)
        self.run_dir.remember(facts=self._facts())  # for a report of a run that never ends
        self.step = TrainingStep(
            self.backend, setup.model, setup.loss, self.optimizer, setup.plan, sampler, setup.data.x_train, setup.data.y_train,
            self.config.performance.physical_batch_size, lambda t: self.config.optimizer.rate_at(t, setup.num_steps),
            self.config.seed, release, self.config.performance.two_pass, self.in_force,
            self.used.update if self.config.performance.monitors else None,
        )  # fmt: skip

    def _restore(self) -> int:
        checkpoint = self.run_dir.load_checkpoint()
        if checkpoint is None:
            return 0
        assert self.run_dir.path is not None
        file = self.run_dir.path / "checkpoint.safetensors"
        checkpoint.refuse_misfit(self.backend.get_weights(self.setup.model), file)
        if checkpoint.step > self.setup.num_steps:
            raise RunError(f"{file} holds {checkpoint.step} steps of a run of {self.setup.num_steps}; start in another --out directory.")
        self.backend.set_weights(self.setup.model, checkpoint.weights)
        try:
            self.backend.set_optimizer_state(self.optimizer, self.setup.model, checkpoint.optimizer)
        except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{file} holds a state that is not of this optimizer ({reason}); start in another --out directory.") from None
        self.bounds = checkpoint.bounds
        return checkpoint.step

    def _facts(self) -> dict[str, Any]:
        """What a report says of this run beside config and ledger: the plan in force, the data and the versions."""
        setup = self.setup
        plan, stds = (self.in_force.plan, self.in_force.stds) if self.in_force else (setup.plan, self.stds)
        return run_facts(plan, stds, setup.data, self.backend.versions(), self.run_dir.identity)

    def _sigma(self, sigma: float) -> float:
        """The noise multiplier that this run began with, or the one given, which is then remembered."""
        stored, given = self.run_dir.record.get("noise_multiplier"), self.config.privacy.noise_multiplier
        if (stored is None and self.ledger.num_releases) or (None not in (stored, given) and stored != given):
            raise RunError(
                f"The run.json of {self.run_dir.path} does not hold the noise_multiplier that the run began with (found {stored!r}); "
                "restore it or start in another --out directory."
            )
        if isinstance(stored, float):
            return stored
        self.run_dir.remember(noise_multiplier=sigma)
        return sigma

    def _in_force(self, sigma: float) -> PlanInForce | None:
        """Bounds and clipping norms that move, as the checkpoint left them; None where nothing moves."""
        setup, privacy = self.setup, self.config.privacy
        mechanism = GaussianMechanism(sigma, privacy.allocation, privacy.noise_weights)
        expected = self.sampler.sample_rate * self.sampler.num_examples
        found = PlanInForce(self.config.strategy, setup.info, setup.plan, mechanism, privacy.relation, expected)
        if not found.moves:
            return None
        if self.start:
            graph = setup.info.graph
            found.restore(self.bounds, self.backend.graph_weights(setup.model, graph) if graph else {})
        return found

    def _release(self, seed: int | None, sigma: float) -> Release:
        """Noise and event of every release of this run, within the budget that the ledger leaves."""
        setup, privacy = self.setup, self.config.privacy
        if self.ledger.num_releases * self.span < self.start:
            raise RunError(
                f"The ledger of {self.run_dir.path} holds {self.ledger.num_releases} releases and its checkpoint {self.start} steps, so "
                "releases were lost; restore the ledger or start in another --out directory."
            )
        self.stds = GaussianMechanism(sigma, privacy.allocation, privacy.noise_weights).stds(setup.plan, privacy.relation)
        event = release_event(setup.plan, self.stds, self.sampler, privacy.relation, privacy.noise)
        planned = -(-setup.num_steps // self.span)
        remaining = max(0, planned - self.ledger.num_releases)
        self.guard = Guard(privacy, self.records.budget, event, remaining)
        if not self.ledger.num_releases and self.guard.room < remaining:
            refuse_overplanning(privacy, self.records.budget, event, remaining, self.span)
        # With an unsafe_seed the steps between checkpoint and ledger release the same bits again, so they are not counted twice.
        recorded = self.ledger.num_releases * self.span if seed is not None else 0
        key = RandomKey.make(NOISE, seed)
        return Release(self.stds, event, key, self.records, recorded, privacy.noise, self.span, first_step(self.sampler))

    def steps(self) -> range:
        """The steps to run: what ledger and budget leave of the plan; a killed run that lost weights does not get its releases back.

        Nor does a run whose pass was cut short get the rest of that pass: it begins another one, which is another release.
        """
        if self.guard is None:
            return range(self.start, self.setup.num_steps)
        return range(self.start, min(self.setup.num_steps, self._replayed() + self.guard.room * self.span))

    def _replayed(self) -> int:
        """The first step that no record in the ledger covers; only with an ``unsafe_seed`` are there any before it."""
        covered = self.ledger.num_releases * self.span
        return max(self.start, covered) if self.config.privacy.unsafe_seed is not None else self.start

    def run(self, progress: Callable[[Progress], None] | None, on_start: Callable[..., None] | None) -> TrainResult:
        """Run the remaining steps."""
        setup, performance = self.setup, self.config.performance
        steps, done, seconds = self.steps(), self.start, 0.0
        release = self.step.release
        if on_start:
            on_start(setup, self.stds, self.start)
        meter = EpsilonMeter(self.config, self.ledger)
        for t in steps:
            if self.guard is not None and release is not None and release.due(t) and not self.guard.ask():
                steps = range(self.start, t)  # the ledger holds more than it did when the steps were counted
                break
            begin = time.perf_counter()
            stats = self.step(t)
            self.backend.synchronize()
            took = time.perf_counter() - begin
            seconds, done = seconds + took, t + 1
            count = stats["count"]
            loss = stats["loss"] / count if count else float("nan")
            epsilon = meter(last=done == steps.stop) if setup.plan.private and progress else None
            used = {"gradient_to_bound": dict(self.used)} if self.used else {}
            self.run_dir.log(step=done, train_loss=loss if count else None, private=False, epsilon=epsilon, seconds=round(took, 6), **used)
            if progress:
                progress(Progress(done, setup.num_steps, loss, epsilon, count / took))
            if done % performance.checkpoint_every == 0 or self.stop.is_set():
                self.save(done)
            if performance.evaluate_every and done % performance.evaluate_every == 0:
                self.run_dir.log(step=done, private=False, **{f"test_{k}": v for k, v in self.evaluate().items()})
            if self.stop.is_set():
                break
        complete = done == steps.stop or not steps
        self.save(done)
        return self.finish(done, complete, seconds)

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        if self.run_dir.path is not None:
            model, optimizer = self.setup.model, self.optimizer
            bounds = self.in_force.state() if self.in_force else {}
            optimizer_state = self.backend.get_optimizer_state(optimizer)
            self.run_dir.save_checkpoint(Checkpoint(step, self.backend.get_weights(model), optimizer_state, bounds))

    def evaluate(self) -> dict[str, float]:
        """Metrics on the test split; empty without one."""
        data = self.setup.data
        return self.backend.evaluate(self.setup.model, self.setup.loss, data.x_test, data.y_test) if len(data.x_test) else {}

    def finish(self, step: int, complete: bool, seconds: float) -> TrainResult:
        """Evaluate, write weights and privacy statement."""
        setup, out = self.setup, self.run_dir.path
        metrics = self.evaluate()
        plan = self.in_force.plan if self.in_force else setup.plan
        if self.config.performance.check_bounds:
            check_bounds(setup, plan)
        status, total = COMPLETE if complete else INTERRUPTED, self.records.total(self.config.privacy)
        statement = privacy_statement(self.config, self.ledger.events, self._facts(), status, total, self.sampler)
        if out is not None:
            self.run_dir.log(step=step, private=False, final=complete, **{f"test_{k}": v for k, v in metrics.items()})
            weights = self.backend.get_weights(setup.model)
            save_arrays(out / "weights.safetensors", weights, {"format": "dptrain", **self.run_dir.identity})
            write_json(out / "privacy.json", statement)
            atomic_write(out / "plan.txt", (str(plan) + "\n").encode())
        return TrainResult(setup.model, plan, statement, metrics, step, complete, seconds, out)


class EpsilonMeter:
    """Epsilon spent so far, at a cost of a few percent of the run: computed only when it is due.

    Args:
        config: names accountant, relation and delta.
        ledger: what was spent.
    """

    def __init__(self, config: TrainConfig, ledger: Any) -> None:
        self.privacy, self.ledger = config.privacy, ledger
        self.accountant = get_accountant(self.privacy.accountant, self.privacy.relation)
        self.due = 0.0

    def __call__(self, last: bool = False) -> float | None:
        """Epsilon of the ledger as it stands, or None while another evaluation is not due."""
        begin = time.perf_counter()
        if begin < self.due and not last:
            return None
        value = self.accountant.epsilon(self.ledger.events, self.privacy.target_delta)
        took = time.perf_counter() - begin
        self.due = begin + took + 20 * took
        return value


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the current step; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def plan(config: TrainConfig, backend: str = "torch", *, data: Dataset | None = None, model: Any = None) -> Plan:
    """The plan of a run, without training: print it.

    Args:
        config: the run.
        backend: ``torch`` or ``tensorflow``.
        data: a data set in place of the config's.
        model: a native model in place of the config's.
    Returns:
        The plan.
    """
    return prepare(config, backend, data, model).plan


__all__ = ["ConfigError", "Progress", "Setup", "TrainResult", "plan", "prepare", "train"]
