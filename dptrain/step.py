"""The one training step. This order IS the privacy argument; it is written here and nowhere else.

    1. draw the logical batch      as the recorded event says, such as each example independently with probability q; key unknown to anyone
    2. record the event            on disk before anything is released, so a crash can over-count, never under-count; a pass over shuffled
                                   data is recorded as a whole, before its first batch is used
    3. sum                         physical batches of fixed shape; every example's weighted gradient is within the plan's bound
    4. reduce over workers         the identity on one process
    5. add noise                   once per logical batch, to every trainable parameter, used or not
    6. apply                       times the constant 1 / (q N); from here on everything is post-processing
    7. project                     restore the constraints that a proven bound rests on, and certify the new weights: the next step's
                                   bounds, and noise in proportion, follow from them

What is in the batch never decides whether a step happens: an empty batch releases noise and is recorded; a non-finite example has
weight 0; nothing raises on data. A step that is interrupted between 2 and 5 has released nothing; its partial sum is a local
variable and dies with it, while its event stays recorded (pitfalls.md G17, G22, G29).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from accounting import Event
from dptrain import profiling
from dptrain.backend import Backend
from dptrain.guard import Recorder
from dptrain.inforce import PlanInForce
from dptrain.plan import Plan
from dptrain.profiling import phase
from dptrain.randomness import NoiseKind, RandomKey, StepNoise
from dptrain.sampling import Sampler, physical_batches, take


@dataclass(frozen=True)
class Release:
    """What makes a step private; absent in non-private training.

    Args:
        stds: noise standard deviation per group; where a plan moves, those of ``TrainingStep.in_force`` take their place.
        event: what is recorded, made from these very standard deviations.
        noise_key: key of the noise stream.
        ledger: where the event is recorded.
        recorded: steps below this index are in the ledger already; only replayed steps of a run with ``unsafe_seed`` are, and
            those release the same bits again.
        noise: how the noise is made; the event has paid for it.
        span: steps that one record stands for, from ``sampling.steps_per_release``.
        first: the step at which a record is due, as after every ``span`` steps.
    """

    stds: Mapping[str, float]
    event: Event
    noise_key: RandomKey
    ledger: Recorder
    recorded: int = 0
    noise: NoiseKind = "fast"
    span: int = 1
    first: int = 0

    def due(self, step: int) -> bool:
        """Whether a step begins what one record stands for, and is not in the ledger yet.

        Guarantee: each step that is not a repetition is due, or follows one that is by fewer than ``span`` steps, if steps are taken in
            order from ``first`` on.
        """
        return step >= self.recorded and (step - self.first) % self.span == 0


@dataclass(frozen=True)
class Update:
    """Parts 2 and 4 to 7 of a step, for whoever draws logical batches and sums over them: the trainer, and a loop of the user's own.

    Args:
        backend, model, optimizer: the executor and what it works on.
        plan: certificate of sensitivity.
        expected_batch_size: q N, a constant.
        release: noise and record; None only for a plan that claims no bound.
        in_force: plan and noise of the next step, where they move; None where the first ones serve throughout.
        monitor: called with group -> norm of the sum over ``count * bound``, before noise; NOT private.
    """

    backend: Backend
    model: Any
    optimizer: Any
    plan: Plan
    expected_batch_size: float
    release: Release | None
    in_force: PlanInForce | None = None
    monitor: Callable[[Mapping[str, float]], None] | None = None

    def __post_init__(self) -> None:
        if (self.release is None) == self.plan.private:
            raise TypeError("a plan with finite bounds is trained with a release, and only such a plan")

    @property
    def factor(self) -> float:
        """What the plan's clipping norms are multiplied by at the next step."""
        return self.in_force.executed if self.in_force else 1.0

    def record(self, step: int) -> None:
        """Part 2. To be called before anything of the step is released, for every step in order.

        Args:
            step: its index.
        """
        if self.release is not None and self.release.due(step):
            self.release.ledger.record(self.release.event)

    def finish(self, step: int, total: Any, count: int, learning_rate: float | None = None) -> dict[str, float]:
        """Parts 4 to 7.

        Args:
            step: its index; each index is used once for noise.
            total: sum over the logical batch, from the backend's ``bounded_sum`` and ``add``; used up.
            count: examples in it, for the monitor.
            learning_rate: of this step; None leaves the optimizer's own as it is.
        Returns:
            Sums for the progress display. NOT private.
        Guarantee: with a total in which each example of the logical batch is within the plan's bounds, once recorded, this is one Gaussian
            mechanism with the recorded noise multiplier.
        Source: math.md sections 1 and 6.
        """
        backend, moving = self.backend, self.in_force
        plan = moving.plan if moving else self.plan
        total = backend.reduce(total)
        if self.monitor is not None:
            norms = backend.group_norms(total, plan)
            self.monitor({g.name: norms.get(g.name, 0.0) / (max(1, count) * g.norm_bound) for g in plan.gradient_groups})
        if self.release is not None:
            stds = moving.stds if moving else self.release.stds
            with phase("noise"):
                total = backend.privatize(total, plan, stds, StepNoise(self.release.noise_key, step, self.release.noise))
        with phase("update"):
            backend.apply(self.model, self.optimizer, total, 1.0 / self.expected_batch_size, learning_rate)
        with phase("projection"):
            certificates = backend.project(self.model, plan)
        if moving:
            moving.after_step(certificates, backend.counts(total))
        return backend.stats(total)


@dataclass(frozen=True)
class TrainingStep:
    """One step of training, as a callable.

    Args:
        backend, model, loss, optimizer: the executor and what it works on.
        plan: certificate of sensitivity.
        sampler: draws logical batches.
        x, y: the training data ``[N, ...]``; arrays, or tuples, lists or mappings of such.
        physical_batch_size: B.
        learning_rate: step index -> learning rate; None leaves the optimizer's own as it is.
        seed: public seed, for dropout.
        release: noise and record; None only for a plan that claims no bound.
        two_pass: see ``performance.gradients``.
        in_force: plan and noise of the next step, where they move; None where the first ones serve throughout.
        monitor: see ``Update``.
    """

    backend: Backend
    model: Any
    loss: Any
    optimizer: Any
    plan: Plan
    sampler: Sampler
    x: Any
    y: Any
    physical_batch_size: int
    learning_rate: Callable[[int], float | None]
    seed: int
    release: Release | None
    two_pass: bool = False
    in_force: PlanInForce | None = None
    monitor: Callable[[Mapping[str, float]], None] | None = None

    def __post_init__(self) -> None:
        expected = self.sampler.sample_rate * self.sampler.num_examples
        parts = (self.backend, self.model, self.optimizer, self.plan, expected, self.release, self.in_force, self.monitor)
        object.__setattr__(self, "update", Update(*parts))
        object.__setattr__(self, "_sum", self.backend.compile(self._bounded_sum))

    def _bounded_sum(self, batch: Any) -> Any:
        return self.backend.bounded_sum(self.model, self.loss, batch, self.plan, self.two_pass)

    def __call__(self, step: int) -> dict[str, float]:
        """Run one step.

        Args:
            step: its index; each index is used once for sampling and noise.
        Returns:
            Sums for the progress display. NOT private.
        Guarantee: the step is one Gaussian mechanism on a batch as the recorded event says, under the plan's certificate; with
            ``Release.span`` above 1, the steps that a record stands for are together.
        Source: math.md sections 1 and 6; Abadi et al. 2016 (arXiv:1607.00133), Algorithm 1.
        """
        with profiling.step():
            return self._run(step)

    def _run(self, step: int) -> dict[str, float]:
        backend, update = self.backend, self.update  # type: ignore[attr-defined]
        factor = (update.factor,) if self.in_force else ()
        with phase("data"):
            indices = self.sampler.sample(step)
        with phase("ledger"):
            update.record(step)
        backend.seed_dropout(self.model, self.seed, step)
        total = None
        for part, mask in physical_batches(indices, self.physical_batch_size):
            with phase("data"):
                batch = backend.batch(take(self.x, part), take(self.y, part), mask, *factor)
            found = self._sum(batch)  # type: ignore[attr-defined]
            total = found if total is None else backend.add(total, found)
            del found
        if total is None:
            total = backend.zeros(self.model)
        done: dict[str, float] = update.finish(step, total, len(indices), self.learning_rate(step))
        return done
