"""Private training with Keras' own ``compile`` and ``fit``: ``make_private`` and ``PrivacyCallback``.

The model stays what it is: a few methods are covered on the instance, so its class, its weights and what is saved are Keras'. Each Keras
step is one ``dptrain.step.TrainingStep``, the very step of the trainer: there is no second implementation of clipping, noise or accounting.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from accounting import AccountingError, PrivacyLedger, SampledGaussian, calibrate_steps, get_accountant
from dptrain.budget import Budget, Schedule, open_ledger
from dptrain.config import Performance, Privacy
from dptrain.costs import Decision
from dptrain.errors import ConfigError, DataError, UnsupportedModelError
from dptrain.info import ModelInfo
from dptrain.inforce import PlanInForce
from dptrain.mechanism import GaussianMechanism, release_event
from dptrain.plan import Plan
from dptrain.randomness import NOISE, SAMPLING, RandomKey
from dptrain.sampling import PoissonSampler, default_physical_batch, take
from dptrain.step import Release, TrainingStep
from dptrain.strategies import SensitivityStrategy, get_strategy
from dptrain_tf import engine, update
from dptrain_tf.backend import CHUNK, TensorFlowBackend
from dptrain_tf.describe import describe
from dptrain_tf.fitting import data as reading
from dptrain_tf.fitting.data import Data
from dptrain_tf.fitting.losses import Weighted, constant_of, example_loss
from dptrain_tf.fitting.steps import Steps, tickets, train_function
from dptrain_tf.gradients import Batch
from dptrain_tf.hooks import find_units
from dptrain_tf.rules import children, mixes_examples

logger = logging.getLogger("dptrain_tf")

COVERED = ("compile", "fit", "make_train_function", "train_on_batch", "train_step")
OWN = ("compute_loss", "fit", "make_train_function", "train_on_batch", "train_step")  # a class's own versions would be passed over
NO_EPSILON = "Trained without differential privacy; no epsilon exists."


@dataclass(frozen=True)
class Settings:
    """What ``make_private`` was given, and where its documentation is."""

    privacy: Privacy
    strategy: SensitivityStrategy
    expected_batch_size: float | None
    sample_rate: float | None
    epochs: float | None
    steps: int | None
    physical_batch_size: int | None
    decision: Decision
    two_pass: bool
    seed: int
    debug: bool

    def schedule(self, count: int) -> Schedule:
        """How N examples enter the steps."""
        return Schedule.make(count, self.expected_batch_size, self.sample_rate, self.epochs, self.steps)

    def physical(self, schedule: Schedule) -> int:
        """Examples processed at once."""
        return self.physical_batch_size or default_physical_batch(schedule.expected_batch_size, schedule.num_examples)


class FitBackend(TensorFlowBackend):
    """The backend, counting how often a step is traced.

    Args:
        performance: as for the backend.
        jit: compile the sum over a physical batch by XLA.
    """

    def __init__(self, performance: Performance, jit: bool) -> None:
        super().__init__(performance)
        self.jit, self.traces = jit, 0

    def compile(self, function: Any) -> Any:
        """As the backend."""

        def counted(batch: Any) -> Any:
            self.traces += 1
            return function(batch)

        return super().compile(counted)

    def batch(self, x: Any, y: Any, mask: np.ndarray, factor: float | None = None) -> Batch:  # type: ignore[override]
        """As the backend; a factor is a tensor even where it is 1, so that its first move does not retrace."""
        scale = None if factor is None else tf.constant(factor, self.dtype)
        return Batch(self.tensor(x), self.tensor(y), self.tensor(mask), scale)


class PrivacyEngine(Steps):
    """The private training of one Keras model, and what may be promised of it: ``model.privacy``.

    Args:
        model: the model.
        settings: how it is trained.
        ledger: where releases are recorded: a ledger, the path of one, which is continued, or None for one in memory.
        sample_size: N, if it is known already.
    """

    def __init__(self, model: Any, settings: Settings, ledger: PrivacyLedger | str | Path | None, sample_size: int | None) -> None:
        super().__init__(model)
        self.settings = self._given = settings
        self._ledger = open_ledger(ledger)
        self._final = sample_size is not None  # whether the calibration is
        self._opened = not isinstance(ledger, PrivacyLedger)
        self.schedule: Schedule | None = None
        self.budget: Budget | None = None
        self._keys = tuple(RandomKey.make(purpose, settings.privacy.unsafe_seed) for purpose in (SAMPLING, NOISE))
        if settings.privacy.unsafe_seed is not None:
            self.count = self._ledger.num_releases  # no noise twice
        self._plan: Plan | None = None
        self._info: ModelInfo | None = None
        self._checked: Any = None
        self._jit = False
        self._data: Data | None = None
        self._trained: tuple[int, ...] = ()
        self._event: SampledGaussian | None = None
        self._limit: float | None = None  # epsilon asked for by a callback
        self._allowed: float = math.inf  # further steps within it
        self._wanted = 0  # steps of this call of fit that are still to come
        self._said = False
        self._running = False
        try:
            self._look()
            if sample_size is not None:
                self._calibrate(sample_size)
        except BaseException:
            self._close()
            raise

    # --- what a user may ask ---
    @property
    def private(self) -> bool:
        """Whether there is any promise."""
        return self.settings.strategy.name != "non_private"

    @property
    def ledger(self) -> PrivacyLedger:
        """Every release that was made from data."""
        return self._ledger

    @property
    def plan(self) -> Plan:
        """The plan: ``print`` it.

        Raises:
            ConfigError: it needs shapes or a loss that are not known yet.
        """
        if self.in_force is not None:
            return self.in_force.plan
        if self._plan is None:
            raise ConfigError("There is no plan yet: it needs the shapes of the data, and for clipless the loss; call fit first.")
        return self._plan

    @property
    def noise_multiplier(self) -> float:
        """sigma; 0 in non-private training.

        Raises:
            ConfigError: it is not calibrated yet.
        """
        if self.private and self.budget is None:
            raise ConfigError("The noise is calibrated when fit has seen how many examples there are; give sample_size= to know it now.")
        return self.budget.noise_multiplier if self.budget else 0.0

    @property
    def sample_rate(self) -> float:
        """q, the probability with which each example enters a step.

        Raises:
            ConfigError: it is not known yet.
        """
        if self.schedule is not None:
            return self.schedule.sample_rate
        if self.settings.sample_rate is None:
            raise ConfigError("The sample rate is known when fit has seen how many examples there are; give sample_size= to know it now.")
        return self.settings.sample_rate

    @property
    def steps_left(self) -> int | None:
        """Steps left of the planned ones; None where none were planned."""
        if self.schedule is None or self.budget is None:
            return None
        return self.budget.left

    @property
    def traces(self) -> int:
        """How often the sum over a physical batch was traced in the last call of ``fit``."""
        return self.executor.traces if isinstance(self.executor, FitBackend) else 0

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon of everything in the ledger; infinity in non-private training.

        Args:
            delta: by default ``privacy.target_delta``.
        """
        if not self.private:
            return math.inf
        return self.budget.epsilon(delta) if self.budget else self._spent(delta)

    def statement(self, delta: float | None = None) -> str:
        """What may be promised of the weights: epsilon with delta, relation, sampling and accountant."""
        if not self.private:
            return NO_EPSILON
        if self.budget is None:
            return f"Nothing has been released by this model yet; the ledger holds epsilon = {self._spent(delta):.6g}."
        text, allowed = self.budget.statement(delta), 1.0 / self.budget.schedule.num_examples
        used = self.settings.privacy.target_delta if delta is None else delta
        if used >= allowed:
            text += f" delta {used:g} is not below 1/N = {allowed:.3g}: publishing one example in full would keep the promise."
        return text

    def __repr__(self) -> str:
        return f"PrivacyEngine({type(self.model).__name__} {self.model.name!r}, {self.settings.strategy.name}: {self.statement()})"

    def detach(self) -> Any:
        """Make the model a plain Keras model again; the ledger's file is closed, what it holds stays readable.

        Returns:
            The model.
        """
        for name in (*COVERED, "privacy"):
            self.model.__dict__.pop(name, None)
        self.model.train_function = None
        self.step = self._data = None
        self._close()
        return self.model

    def _close(self) -> None:
        if self._opened:
            self.ledger.close()

    # --- before training ---
    def _spent(self, delta: float | None) -> float:
        """Epsilon of a ledger that was continued."""
        privacy = self.settings.privacy
        return get_accountant(privacy.accountant, privacy.relation).epsilon(
            self.ledger.events, privacy.target_delta if delta is None else delta
        )

    def _calibrate(self, count: int, asked: Settings | None = None) -> Schedule:
        """Noise for N examples; what the ledger holds by then counts against the budget. It is final once a step has begun.

        Args:
            count: N.
            asked: the settings, completed by a call of ``fit``.
        Raises:
            DataError: N is another number than that of a final calibration.
        """
        settings = asked or self.settings
        if self.schedule is None or not (self._final or (settings == self.settings and count == self.schedule.num_examples)):
            schedule = settings.schedule(count)
            self.budget = Budget(settings.privacy, schedule, self.ledger) if self.private else None
            self.schedule, self.settings = schedule, settings
        if count != self.schedule.num_examples:
            raise DataError(
                f"The training data hold {count} examples, and the noise was calibrated for {self.schedule.num_examples}; give the same "
                "number, or call make_private again with the same ledger."
            )
        return self.schedule

    def _completed(self, data: Data, batch_size: int | None, epochs: int, steps_per_epoch: int | None) -> Settings:
        """The settings, where ``make_private`` was not told the batch size or the steps to calibrate for, with those of a ``fit``."""
        settings = self._given
        if settings.expected_batch_size is None and settings.sample_rate is None:
            settings = replace(settings, expected_batch_size=batch_size or min(data.batch, data.count))
        if self.private and settings.privacy.target_epsilon is not None and settings.epochs is None and settings.steps is None:
            per_epoch = steps_per_epoch or settings.schedule(data.count).steps_per_pass
            settings = replace(settings, steps=epochs * per_epoch)
        return settings

    def _look(self) -> None:
        """Refuse at construction what can be known by then; plan, where the shapes are known and no loss is needed."""
        model = self.model
        if not all(layer.built for layer in children(model)):
            found = [(layer.name, mixes_examples(layer)) for layer in children(model)]
            if problems := [f"layer {name!r}: {sentence}." for name, sentence in found if sentence]:
                raise UnsupportedModelError(problems)
            return
        find_units(model, training=True)
        x = inputs_of(model)
        if x is not None and not self.settings.strategy.proves:
            self._info = describe(model, x)
            self._plan = settings_plan(self.settings, self._info, None)

    def _timings(self, loss: Any, data: Data, size: int) -> Any:
        """Measured times of the norm methods, if the decision asks for them."""
        if self.settings.decision != "measured" or self.settings.strategy.name != "mixed_ghost":
            return None
        assert self.executor is not None
        x, y = (self.executor.tensor(reading.synthetic(part, size)) for part in (data.x, data.targets))
        return self.executor.time_norms(self.model, loss, x, y)

    # --- a call of fit ---
    def start(self, data: Data) -> None:
        """Prepare the steps of a call of ``fit``.

        Args:
            data: all training examples.
        Raises:
            ConfigError, DataError, UnsupportedModelError: before anything is spent.
            AccountingError: the budget cannot be reached, or is used up.
        """
        model = self.model
        check_optimizer(model)
        schedule = self._calibrate(data.count)
        self._refuse_spent()
        reading.check(data)
        x, y = reading.synthetic(data.x, 3), reading.synthetic(data.targets, 3)
        self.executor = FitBackend(Performance(compile=not model.run_eagerly, precision=precision(model)), self._jit)
        x, y = self.executor.tensor(x), self.executor.tensor(y)
        self._info = self._facts(x)
        loss = example_loss(model, data.weight is not None, precision(model))
        plan = self._plan = settings_plan(self.settings, self._info, self._timings(loss, data, self.settings.physical(schedule)))
        self._check(loss, x, y, plan)
        refuse_added_losses(model)
        loss.check_labels(data.y, y if data.weight is None else y[0], model(x, training=False))
        check_ids(self.executor, model, data)
        self._data, self._trained = data, trained(model)
        update.forget(model.optimizer)
        self.step = self._training_step(data, loss, plan, schedule)
        self._rehearse(data)

    def _facts(self, x: Any) -> ModelInfo:
        """Facts of the model; where bounds are proven, after its constraints have been restored for the first time."""
        if not self.settings.strategy.proves:
            return describe(self.model, x)
        describe(self.model, x)  # builds it
        engine.project(self.model, x)
        return engine.facts(self.model, x, constant_of(self.model._compile_loss._user_loss if self.model._compile_loss else None))

    def _check(self, loss: Weighted, x: Any, y: Any, plan: Plan) -> None:
        """The self-check, whenever model, plan or loss are not those that passed it."""
        key = (plan, self.model._compile_loss, trained(self.model))
        if self._checked is None or self._checked != key:
            assert self.executor is not None
            with in_full_precision(self.model):
                self.executor.self_check(self.model, loss, x, y, plan)
            self._checked = key

    def _training_step(self, data: Data, loss: Weighted, plan: Plan, schedule: Schedule) -> TrainingStep:
        """The step, with the noise and the event of the plan."""
        assert self.executor is not None and self._info is not None
        settings, relation = self.settings, self.settings.privacy.relation
        scale = self.in_force.scale if self.in_force is not None and settings.strategy.adaptive is not None else 1.0
        self.in_force, release = None, None
        if self.budget is not None:
            mechanism: GaussianMechanism = self.budget.mechanism
            stds = mechanism.stds(plan, relation)
            self._event = release_event(plan, stds, schedule.sample_rate, relation)
            self._refuse_overspending()
            release = Release(stds, self._event, self._keys[1], self.ledger)
            moving = PlanInForce(settings.strategy, self._info, plan, mechanism, relation, schedule.expected_batch_size)
            if moving.moves:
                self.in_force = moving
                self.certify(scale)
        sampler = PoissonSampler(schedule.num_examples, schedule.sample_rate, self._keys[0])
        return TrainingStep(
            self.executor, self.model, loss, self.model.optimizer, plan, sampler, data.x, data.targets, settings.physical(schedule),
            lambda t: None, settings.seed, release, settings.two_pass, self.in_force,
        )  # fmt: skip

    def _rehearse(self, data: Data) -> None:
        """Trace and run the sum over a physical batch of synthetic examples, all masked, so that nothing of it can fail in a step.

        Raises:
            ConfigError: XLA cannot compile it.
        """
        assert self.step is not None and self.executor is not None
        size = self.step.physical_batch_size
        x, y = reading.synthetic(data.x, size), reading.synthetic(data.targets, size)
        factor = (self.in_force.executed,) if self.in_force else ()
        try:
            self.step._sum(self.executor.batch(x, y, np.zeros(size, bool), *factor))  # type: ignore[attr-defined]
        except (tf.errors.OpError, NotImplementedError, TypeError) as error:
            if not self._jit:
                raise
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"XLA cannot compile the private step of this model ({reason}); remove jit_compile=True.") from None

    # --- the budget ---
    def _refuse_spent(self) -> None:
        if self.budget is not None and self.budget.left == 0:
            raise AccountingError(
                f"The {self.schedule.num_steps if self.schedule else 0} planned steps are used up: {self.statement()} Nothing was trained; "
                "to go on, plan more with make_private on the same ledger."
            )

    def _refuse_overspending(self) -> None:
        """Refuse steps beyond ``target_epsilon``, as after releases that others have put into the ledger since the calibration."""
        target = self.settings.privacy.target_epsilon
        if target is None or self.budget is None or self._event is None:
            return
        planned = self._epsilon_after(min(self.budget.left or 0, self._wanted) or 1)
        if planned > target:
            raise AccountingError(
                f"The planned releases would spend epsilon {planned:.6g}, above target_epsilon {target:.6g}, because the ledger has grown "
                "since the noise was calibrated; call make_private again on this ledger."
            )

    def _epsilon_after(self, steps: int) -> float:
        """Epsilon after more steps of the kind that runs."""
        privacy, event = self.settings.privacy, self._event
        assert event is not None
        return get_accountant(privacy.accountant, privacy.relation).epsilon([*self.ledger.events, (event, steps)], privacy.target_delta)

    def limit(self, epsilon: float) -> None:
        """Stop before an epsilon is passed, in addition to the planned steps.

        Args:
            epsilon: at ``privacy.target_delta``.
        Raises:
            AccountingError: a single step would pass it.
        """
        privacy, event = self.settings.privacy, self._event
        self._limit, self._allowed = epsilon, math.inf
        if event is None or not self._wanted or self._epsilon_after(self._wanted) <= epsilon:
            return
        if (least := self._epsilon_after(1)) > epsilon:
            raise AccountingError(f"One more step would spend epsilon {least:.6g}, above max_epsilon {epsilon:g}; nothing was trained.")
        self._allowed = calibrate_steps(
            epsilon, privacy.target_delta, event.sample_rate, event.noise_multiplier, privacy.accountant, privacy.relation,
            self.ledger.events,
        )  # fmt: skip

    def _available(self) -> bool:
        """Whether the budget leaves another step."""
        return self._allowed > 0 and not (self.budget is not None and self.budget.left == 0)

    def _stop(self) -> None:
        """Stop Keras' loop, and say why, once per ``fit``."""
        self.model.stop_training = True
        if not self._said:
            self._said = True
            what = f"epsilon {self._limit:g} of PrivacyCallback" if self._allowed <= 0 else "the planned budget"
            logger.warning("Training stops after step %d: one more would pass %s. %s", self.count, what, self.statement())

    def admit(self) -> bool:
        """Whether one more step may be run; stops Keras' loop if not."""
        if trained(self.model) != self._trained:
            raise ConfigError("A layer's trainable flag was changed while fit was running; change it between calls, and compile again.")
        if self._available():
            return True
        self._stop()
        return False

    def run(self) -> dict[str, float]:
        """One step, within the budget."""
        self._final = True
        if self.budget is not None:
            self.budget.begin()
        self._allowed, self._wanted = self._allowed - 1, self._wanted - 1
        stats = super().run()
        if self._wanted > 0 and not self._available():
            self._stop()
        return stats

    def drawn(self) -> list[tuple[Any, Any]]:
        """The last logical batch, in pieces, for metrics. NOT private."""
        assert self._data is not None and self.executor is not None
        tensor, data = self.executor.tensor, self._data
        return [(tensor(take(data.x, part)), tensor(take(data.y, part))) for part in self.pieces() if len(part)]

    # --- what covers Keras' methods ---
    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As in Keras; ``jit_compile=True`` compiles the sum over a physical batch by XLA."""
        kwargs = {"auto_scale_loss": False} | kwargs
        type(self.model).compile(self.model, *args, **kwargs)
        self._jit = kwargs.get("jit_compile") is True
        check_optimizer(self.model)
        if self.model._compile_loss is None:
            raise ConfigError("The model is compiled without a loss; give compile(loss=...), one value per example.")

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: Any = 1,
    ) -> Any:
        """Keras' ``fit``, with private steps.

        The training data are read into arrays once. Each step draws every example independently with probability q, since that is what is
        accounted for: batches have no fixed size and no order, and an epoch is ``ceil(1 / q)`` steps. The loss that is logged is NOT
        private, nor is anything computed from it.

        Args:
            x: NumPy arrays or tensors, a tuple, list or mapping of these, or a batched ``tf.data.Dataset`` of known size, without
                augmentation at random.
            y: targets, if ``x`` holds arrays.
            batch_size: the expected batch size, or None. Where ``make_private`` was given none it is this one, by default 32, or that of
                the data set.
            epochs, verbose, callbacks, initial_epoch: as in Keras.
            validation_split: share of the examples, from the end, that is validated on and not trained on; N is what is left. These
                examples are not protected.
            validation_data, validation_steps, validation_batch_size, validation_freq: as in Keras; not protected.
            shuffle: without effect.
            class_weight: label -> weight, public constants; weights counted from these data would be private facts.
            sample_weight: ``[N]``, each a function of its own example.
            steps_per_epoch: steps in an epoch.
        Returns:
            Keras' ``History``.
        Raises:
            ConfigError, DataError, UnsupportedModelError, AccountingError: before anything is spent.
        Guarantee: every release from data is in the ledger before it is made; the epsilon of the ledger holds for the weights at any time.
            Training stops before the planned budget is passed, and a second call continues the ledger.
        Source: ``dptrain/step.py``.
        """
        del shuffle
        model = self.model
        if not model.compiled:
            raise ConfigError("The model is not compiled; call compile(optimizer, loss=...) first.")
        if tf.distribute.has_strategy() or model._distribute_strategy is not None:
            raise ConfigError("fit draws one sample on one process; leave the tf.distribute strategy.")
        data, held = self._read(x, y, sample_weight, class_weight, validation_split, validation_data)
        asked = self._completed(data, batch_size, max(0, epochs - initial_epoch), steps_per_epoch)
        schedule = self._calibrate(data.count, asked)
        if batch_size is not None and abs(batch_size - schedule.expected_batch_size) > 1e-9 * batch_size:
            raise ConfigError(
                f"batch_size {batch_size} is not the expected batch size {schedule.expected_batch_size:g} of make_private; leave it out."
            )
        per_epoch = schedule.steps_per_pass if steps_per_epoch is None else steps_per_epoch
        if per_epoch < 1:
            raise ConfigError(f"steps_per_epoch must be at least 1, not {steps_per_epoch!r}.")
        self._wanted, self._allowed, self._limit, self._said = max(0, epochs - initial_epoch) * per_epoch, math.inf, None, False
        self.start(data)
        self._build_metrics(data)
        self._running = True
        try:
            return type(model).fit(
                model, tickets(per_epoch), epochs=epochs, verbose=verbose, callbacks=callbacks, validation_data=held, shuffle=False,
                initial_epoch=initial_epoch, validation_steps=validation_steps,
                validation_batch_size=validation_batch_size or batch_size, validation_freq=validation_freq,
            )  # fmt: skip
        finally:
            self._running, self.step, self._data = False, None, None  # the data are the caller's again

    def _read(
        self, x: Any, y: Any, sample_weight: Any, class_weight: Mapping[int, float] | None, validation_split: float, validation_data: Any
    ) -> tuple[Data, Any]:
        """Training data and validation data."""
        if validation_split and isinstance(x, tf.data.Dataset):
            raise DataError("validation_split needs arrays; split the data set with take() and skip(), and give validation_data.")
        data = reading.load(x, y, sample_weight)
        if class_weight is not None:
            if data.weight is not None:
                raise ConfigError("class_weight and sample_weight are both given; give one.")
            data = replace(data, weight=reading.by_class(class_weight, data.y))
        if validation_split and validation_data is None:
            return reading.split(data, validation_split)
        return data, validation_data

    def _build_metrics(self, data: Data) -> None:
        """Build the compiled metrics on synthetic examples: Keras asks them for results, and chooses "accuracy" by the first targets."""
        model = self.model
        if model._compile_metrics is not None and not model._compile_metrics.built:
            assert self.executor is not None
            x, y = (self.executor.tensor(reading.synthetic(part, 3)) for part in (data.x, data.y))
            model.compute_metrics(x, y, model(x, training=False))

    def make_train_function(self, force: bool = False) -> None:
        """One private step per ticket."""
        del force
        if not self._running:
            raise ConfigError("This model is private: train it by model.fit(...), which draws the samples that are accounted for.")
        self.model.train_function = train_function(self.model, self, lambda: self.settings.debug)

    def train_step(self, *_: Any, **__: Any) -> Any:
        """Refused: Keras' own step has no noise."""
        raise ConfigError("train_step would train on a batch of your choice; only fit draws the samples that are accounted for.")

    def train_on_batch(self, *_: Any, **__: Any) -> Any:
        """Refused: a batch of the caller's choice is not a Poisson sample."""
        raise ConfigError("train_on_batch would train on a batch of your choice; only fit draws the samples that are accounted for.")


def make_private(
    model: Any,
    *,
    privacy: Privacy | Mapping[str, Any] | None = None,
    strategy: str | SensitivityStrategy = "mixed_ghost",
    expected_batch_size: float | None = None,
    sample_rate: float | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    sample_size: int | None = None,
    physical_batch_size: int | None = None,
    ledger: PrivacyLedger | str | Path | None = None,
    decision: Decision = "time",
    gradients: Literal["book_keeping", "two_pass"] = "book_keeping",
    seed: int = 0,
    debug: bool = False,
    **settings: Any,
) -> Any:
    """Let a Keras model's own ``compile`` and ``fit`` train it with differential privacy.

        model = make_private(model, privacy=Privacy(target_epsilon=3.0), expected_batch_size=256, epochs=3, max_grad_norm=0.1)
        model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        model.fit(x, y, epochs=3, callbacks=[PrivacyCallback()])

    Args:
        model: a Sequential, functional or subclassed model; changed in place, on the instance only.
        privacy: the promise; without it, only ``non_private``.
        strategy: a strategy or its name; ``clipless`` needs layers with a proven bound.
        expected_batch_size, sample_rate: q N or q; by default the batch size of the first ``fit``.
        epochs, steps: what is planned, and where training stops; for ``target_epsilon``, by default the epochs of the first ``fit``. An
            epoch is ``ceil(1 / q)`` steps.
        sample_size: N, to calibrate at once; otherwise the first ``fit`` does it, from its data.
        physical_batch_size: examples processed at once; None chooses. No number but memory and speed depends on it.
        ledger: a ``PrivacyLedger``, or the path of one, which is continued if it exists. What it holds counts against ``target_epsilon``.
        decision: rule that chooses the norm method per layer.
        gradients: ``book_keeping``, or ``two_pass``.
        seed: public seed of dropout.
        debug: also compute the compiled metrics on each drawn batch; they are NOT private.
        settings: fields of the strategy, such as ``max_grad_norm``, if it is given by name.
    Returns:
        The model, whose ``privacy`` is a ``PrivacyEngine``.
    Raises:
        ConfigError: settings that contradict each other, or a class whose own training methods would be passed over.
        UnsupportedModelError: lists every layer that cannot be handled.
        AccountingError: the budget cannot be reached.
    """
    refuse_class(model)
    promise = privacy_of(privacy)
    found = get_strategy(strategy, **settings)
    if found.name != "non_private" and promise.target_epsilon is None and promise.noise_multiplier is None:
        raise ConfigError("privacy: give target_epsilon or noise_multiplier, or choose the strategy non_private.")
    if expected_batch_size is not None and sample_rate is not None:
        raise ConfigError("Give expected_batch_size or sample_rate, not both; the other follows from it.")
    if sample_size is not None and expected_batch_size is None and sample_rate is None:
        raise ConfigError("sample_size is for calibrating at once, which needs expected_batch_size or sample_rate too.")
    if physical_batch_size is not None and physical_batch_size < 1:
        raise ConfigError(f"physical_batch_size must be at least 1, not {physical_batch_size!r}.")
    if gradients not in ("book_keeping", "two_pass"):
        raise ConfigError(f"gradients must be book_keeping or two_pass, not {gradients!r}.")
    chosen = Settings(
        promise, found, expected_batch_size, sample_rate, epochs, steps, physical_batch_size, decision, gradients == "two_pass", seed, debug
    )
    made = PrivacyEngine(model, chosen, ledger, sample_size)
    model.__dict__.update({name: getattr(made, name) for name in COVERED}, privacy=made)
    model.train_function = None
    return model


def privacy_of(privacy: Privacy | Mapping[str, Any] | None) -> Privacy:
    """The promise, from settings of it."""
    if isinstance(privacy, Privacy):
        return privacy
    from pydantic import ValidationError

    from dptrain.config import explain

    raw = dict(privacy or {})
    try:
        return Privacy.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, "privacy", raw)) from None


def refuse_class(model: Any) -> None:
    """Refuse what is no Keras model, is private already, or has training methods of its own.

    Raises:
        ConfigError: with the reason.
    """
    if not isinstance(model, keras.Model):
        raise ConfigError(f"make_private takes a keras.Model, not {type(model).__name__}.")
    if isinstance(model.__dict__.get("privacy"), PrivacyEngine):
        raise ConfigError(f"Model {model.name!r} is private already; call model.privacy.detach() first.")
    own = [name for name in OWN if getattr(type(model), name) is not getattr(keras.Model, name)]
    if own:
        raise ConfigError(
            f"{type(model).__name__} has its own {', '.join(own)}, which a private step cannot run; move the loss into compile(loss=...), "
            "one value per example."
        )
    if hasattr(model, "privacy"):
        raise ConfigError(f"{type(model).__name__} has an attribute privacy of its own; rename it.")


def check_optimizer(model: Any) -> None:
    """Refuse an optimizer that would undo a scaling of the loss which is not done here, or that knows other variables.

    Raises:
        ConfigError: with the reason.
    """
    optimizer = model.optimizer
    if optimizer is None:
        raise ConfigError("The model is compiled without an optimizer; give compile(optimizer=...).")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or getattr(optimizer, "loss_scale_factor", None):
        raise ConfigError(
            "The optimizer divides gradients by a scale of the loss that is not used here; compile again with the optimizer that is inside "
            "LossScaleOptimizer, or without loss_scale_factor."
        )
    if optimizer.built and model.built:
        known = {id(v) for v in getattr(optimizer, "_trainable_variables", model.trainable_variables)}
        if not {id(v) for v in model.trainable_variables} <= known:
            raise ConfigError("Variables have become trainable since the optimizer was built; compile again with a new optimizer.")


def refuse_added_losses(model: Any) -> None:
    """Refuse ``add_loss``, whose terms are not per example; called after a forward pass.

    Raises:
        UnsupportedModelError: lists the layers.
    """
    found = [layer.name for layer in children(model) if layer._losses]
    if found:
        raise UnsupportedModelError(
            [f"layer {name!r} calls add_loss, which is no per-example loss; put it into the loss." for name in found]
        )


def check_ids(executor: TensorFlowBackend, model: Any, data: Data) -> None:
    """Refuse token ids outside an embedding, before training: a step never raises on data (pitfalls.md G29).

    Where the values alone do not show that all are inside, every example goes through the model once.

    Raises:
        DataError: an id is outside.
    """
    sizes = [layer.input_dim for layer in children(model) if isinstance(layer, keras.layers.Embedding)]
    if not sizes or all(a.min() >= 0 and a.max() < min(sizes) for a in reading.leaves(data.x)):
        return
    run = tf.function(lambda x: model(x, training=False), autograph=False, reduce_retracing=True)
    try:
        for start in range(0, data.count, CHUNK):
            run(executor.tensor(take(data.x, np.arange(start, min(start + CHUNK, data.count)))))
    except tf.errors.InvalidArgumentError:
        raise DataError("The training data hold token ids that an embedding has no row for; correct them or raise its input_dim.") from None


def inputs_of(model: Any) -> Any:
    """Synthetic inputs for a model that knows their shapes, else None."""
    specs = getattr(getattr(model, "_functional", None) or model, "_inputs_struct", None)
    if specs is None:
        return None
    flat = reading.leaves(specs)
    if any(None in spec.shape[1:] or not spec.dtype.startswith(("float", "int", "uint", "bool")) for spec in flat):
        return None
    return reading.synthetic(reading.structure(specs, lambda spec: np.zeros((0, *spec.shape[1:]), spec.dtype)), 3)


def settings_plan(settings: Settings, info: ModelInfo, timings: Any) -> Plan:
    """The strategy's plan; without times that were measured, by the rule for time."""
    decision = "time" if settings.decision == "measured" and timings is None else settings.decision
    return settings.strategy.plan(info, decision=decision, timings=timings)


@contextmanager
def in_full_precision(model: Any) -> Iterator[None]:
    """Let layers of a mixed precision policy compute in the type of their variables: what the self-check compares is then exact."""
    before = [(layer, layer._dtype_policy) for layer in children(model) if layer.compute_dtype in ("bfloat16", "float16")]
    try:
        for layer, _ in before:
            layer._dtype_policy = keras.dtype_policies.DTypePolicy(layer.variable_dtype)
        yield
    finally:
        for layer, policy in before:
            layer._dtype_policy = policy


def trained(model: Any) -> tuple[int, ...]:
    """Which variables are trainable."""
    return tuple(id(v) for v in model.trainable_variables)


def precision(model: Any) -> Literal["float32", "float64"]:
    """float64 if any variable is, else float32."""
    return "float64" if any(v.dtype == "float64" for v in model.variables) or model.compute_dtype == "float64" else "float32"


class PrivacyCallback(keras.callbacks.Callback):
    """Epsilon after each epoch as ``logs["epsilon"]``, so that ``History`` has it; at the end, what may be promised of the weights.

    Training stops before the planned budget is passed, with this callback or without it.

    Args:
        max_epsilon: also stop before this epsilon is passed.
        verbose: print the statement at the end.
    """

    def __init__(self, max_epsilon: float | None = None, verbose: bool = True) -> None:
        super().__init__()
        if max_epsilon is not None and not max_epsilon > 0:
            raise ConfigError(f"max_epsilon must be above 0, not {max_epsilon!r}.")
        self.max_epsilon, self.verbose = max_epsilon, verbose

    def set_model(self, model: Any) -> None:
        """Refuse a model that is not private."""
        super().set_model(model)
        if not isinstance(getattr(model, "privacy", None), PrivacyEngine):
            raise ConfigError("PrivacyCallback needs a model of make_private.")

    @property
    def engine(self) -> PrivacyEngine:
        """The model's."""
        found: PrivacyEngine = self.model.privacy
        return found

    def on_train_begin(self, logs: Any = None) -> None:
        """Set the limit."""
        if self.max_epsilon is not None and self.engine.private:
            self.engine.limit(self.max_epsilon)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Put epsilon into the logs."""
        if logs is not None and self.engine.private:
            logs["epsilon"] = self.engine.epsilon()

    def on_train_end(self, logs: Any = None) -> None:
        """Print the statement."""
        if self.verbose:
            print(self.engine.statement())


__all__ = ["PrivacyCallback", "PrivacyEngine", "make_private"]
