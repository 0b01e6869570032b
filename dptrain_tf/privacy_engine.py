"""Private training with Keras' own ``compile`` and ``fit``: ``make_private`` and ``PrivacyCallback``.

The model stays what it is: a few methods are covered on the instance, so its class, its weights and what is saved are Keras'. Each Keras
step is one ``dptrain.step.TrainingStep``, the very step of the trainer: there is no second implementation of clipping, noise or accounting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from accounting import PrivacyLedger
from dptrain.budget import Schedule
from dptrain.config import Performance, Privacy
from dptrain.costs import Decision
from dptrain.errors import ConfigError, DataError, UnsupportedModelError
from dptrain.info import ModelInfo
from dptrain.inforce import PlanInForce
from dptrain.mechanism import GaussianMechanism, release_event
from dptrain.plan import Plan
from dptrain.randomness import NOISE, SAMPLING, RandomKey
from dptrain.sampling import PoissonSampler, check_physical_batch_size, take
from dptrain.step import Release, TrainingStep
from dptrain.strategies import SensitivityStrategy, get_strategy
from dptrain_tf import engine, update
from dptrain_tf.describe import describe
from dptrain_tf.fitting import data as reading
from dptrain_tf.fitting.callback import PrivacyCallback
from dptrain_tf.fitting.data import Data
from dptrain_tf.fitting.executor import FitBackend, in_full_precision, precision
from dptrain_tf.fitting.losses import Weighted, constant_of, example_loss
from dptrain_tf.fitting.promise import Promise
from dptrain_tf.fitting.refusals import check_ids, check_optimizer, refuse_added_losses, refuse_class
from dptrain_tf.fitting.settings import Settings, privacy_of
from dptrain_tf.fitting.steps import tickets, train_function
from dptrain_tf.hooks import find_units
from dptrain_tf.rules import children, mixes_examples

COVERED = ("compile", "fit", "make_train_function", "train_on_batch", "train_step")


class PrivacyEngine(Promise):
    """The private training of one Keras model, and what may be promised of it: ``model.privacy``.

    Args:
        model: the model.
        settings: how it is trained.
        ledger: where releases are recorded: a ledger, the path of one, which is continued, or None for one in memory.
        sample_size: N, if it is known already.
    """

    def __init__(self, model: Any, settings: Settings, ledger: PrivacyLedger | str | Path | None, sample_size: int | None) -> None:
        super().__init__(model, settings, ledger)
        self._final = sample_size is not None
        self._keys = tuple(RandomKey.make(purpose, settings.privacy.unsafe_seed) for purpose in (SAMPLING, NOISE))
        if settings.privacy.unsafe_seed is not None:
            self.count = self._ledger.num_releases  # no noise twice
        self._plan: Plan | None = None
        self._info: ModelInfo | None = None
        self._checked: Any = None
        self._jit = False
        self._data: Data | None = None
        self._trained: tuple[int, ...] = ()
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
    def traces(self) -> int:
        """How often the sum over a physical batch was traced in the last call of ``fit``."""
        return self.executor.traces if isinstance(self.executor, FitBackend) else 0

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

    # --- before training ---
    def _look(self) -> None:
        """Refuse at construction what can be known by then; plan, where the shapes are known and no loss is needed."""
        model = self.model
        if not all(layer.built for layer in children(model)):
            found = [(layer.name, mixes_examples(layer)) for layer in children(model)]
            if problems := [f"layer {name!r}: {sentence}." for name, sentence in found if sentence]:
                raise UnsupportedModelError(problems)
            return
        find_units(model, training=True)
        x = reading.inputs_of(model)
        if x is not None and not self.settings.strategy.proves:
            self._info = describe(model, x)
            self._plan = self.settings.plan(self._info, None)

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
        gradients: Any = "two_pass" if self.settings.two_pass else "book_keeping"
        self.executor = FitBackend(Performance(compile=not model.run_eagerly, precision=precision(model), gradients=gradients), self._jit)
        x, y = self.executor.tensor(x), self.executor.tensor(y)
        self._info = self._facts(x)
        loss = example_loss(model, data.weight is not None, precision(model))
        plan = self._plan = self.settings.plan(self._info, self._timings(loss, data, self.settings.physical(schedule)))
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
            noise = settings.privacy.noise
            stds = mechanism.stds(plan, relation)
            self._event = release_event(plan, stds, schedule.sample_rate, relation, noise)
            self._refuse_overspending()
            release = Release(stds, self._event, self._keys[1], self.ledger, noise=noise)
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

    def admit(self) -> bool:
        """Whether one more step may be run; stops Keras' loop if not."""
        if trained(self.model) != self._trained:
            raise ConfigError("A layer's trainable flag was changed while fit was running; change it between calls, and compile again.")
        return super().admit()

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
    physical_batch_size = check_physical_batch_size(physical_batch_size)
    if gradients not in ("book_keeping", "two_pass"):
        raise ConfigError(f"gradients must be book_keeping or two_pass, not {gradients!r}.")
    chosen = Settings(
        promise, found, expected_batch_size, sample_rate, epochs, steps, physical_batch_size, decision, gradients == "two_pass", seed, debug
    )
    made = PrivacyEngine(model, chosen, ledger, sample_size)
    model.__dict__.update({name: getattr(made, name) for name in COVERED}, privacy=made)
    model.train_function = None
    return model


def trained(model: Any) -> tuple[int, ...]:
    """Which variables are trainable."""
    return tuple(id(v) for v in model.trainable_variables)


__all__ = ["PrivacyCallback", "PrivacyEngine", "make_private"]
