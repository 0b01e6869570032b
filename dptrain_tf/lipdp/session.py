"""The private training of one model: what a step of ``fit`` runs, and what outlives a call of ``fit``.

Nothing private is decided here: the bound is that of ``Clipless``, the step is ``dptrain.step.TrainingStep``, noise and event come from
``dptrain.mechanism``, and the ledger counts. This module brings a model, a loss and data together for them.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from accounting import GaussianEvent, NeighboringRelation, PrivacyLedger, get_accountant
from dptrain.adaptive import AdaptiveClip
from dptrain.budget import open_ledger
from dptrain.config import Performance
from dptrain.data import Dataset, validate
from dptrain.errors import ConfigError, UnsupportedModelError
from dptrain.info import ModelInfo
from dptrain.inforce import PlanInForce
from dptrain.mechanism import GaussianMechanism, release_event
from dptrain.plan import Plan
from dptrain.randomness import NOISE, SAMPLING, RandomKey
from dptrain.sampling import PoissonSampler, check_physical_batch_size, default_physical_batch
from dptrain.step import Release, TrainingStep
from dptrain.strategies import get_strategy
from dptrain.strategies.clipless import Clipless
from dptrain_tf import engine, gradients
from dptrain_tf.backend import TensorFlowBackend
from dptrain_tf.fitting.steps import Steps
from dptrain_tf.hooks import find_units
from dptrain_tf.lipdp.dynamic import QuantileSettings
from dptrain_tf.lipdp.layers import DP_ClipGradient
from dptrain_tf.lipdp.losses import DP_Loss
from dptrain_tf.lipdp.pipeline import Copies, DatasetMetadata, materialise
from dptrain_tf.lipschitz import LossGradientClip
from dptrain_tf.rules import children
from dptrain_tf.update import group_of_parameter

RELATION = NeighboringRelation.add_remove
ACCOUNTANT: Literal["prv"] = "prv"
LOCAL, GLOBAL = ("local", "per-layer"), ("global",)


@dataclass
class DPParameters:
    """How much noise, and how it is shared.

    LipDP's strategy ``"local"`` (in its code ``"per-layer"``) gives each of K parameter groups, mostly one per layer, noise of
    ``noise_multiplier`` times its own sensitivity. All groups are released together, so the joint release has the noise multiplier
    ``sigma = noise_multiplier / sqrt(K)``, and with factors ``nm_coef`` per layer ``noise_multiplier / sqrt(sum_k nm_coef_k^-2)``
    (math.md section 1: LipDP's multiplier is ``sqrt(K) sigma``). ``"global"`` gives all groups one standard deviation, ``noise_multiplier``
    times the joint sensitivity, so ``sigma = noise_multiplier``; there ``nm_coef`` moves noise between groups and leaves sigma as it is.
    sigma is what the accountant sees, and a count that moves a clip is paid from it.

    Args:
        noisify_strategy: "local", "per-layer" (the same), or "global".
        noise_multiplier: per layer with the first two, joint with the last.
        delta: of the guarantee.
    Raises:
        ConfigError: one of them is out of range.
    """

    noisify_strategy: str
    noise_multiplier: float
    delta: float

    def __post_init__(self) -> None:
        if self.noisify_strategy not in (*LOCAL, *GLOBAL):
            raise ConfigError(f"noisify_strategy must be one of {', '.join((*LOCAL, *GLOBAL))}, not {self.noisify_strategy!r}.")
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta must lie between 0 and 1, and is {self.delta!r}.")
        GaussianMechanism(self.noise_multiplier)  # refuses what is no noise

    def joint(self, coefficients: list[float]) -> float:
        """sigma of the joint release, for groups with these factors."""
        if self.noisify_strategy in GLOBAL:
            return float(self.noise_multiplier)
        return float(self.noise_multiplier) / math.sqrt(math.fsum(c**-2 for c in coefficients))


class Folded:
    """A model on ``[B, K, ...]``: K copies of each example, folded into the batch, outputs divided by ``sqrt(K)``.

    The division makes the training step's clip of one example's loss gradient the right one. Let ``o_k = z_k / sqrt(K)`` be what it sees,
    and C its clip: it hands back cotangents with ``sum_k |o'_k|^2 <= C^2``, those of ``z_k`` are ``o'_k / sqrt(K)``, and by Cauchy-Schwarz
    ``sum_k |z'_k| <= C``. The gradient of a parameter is a sum over the copies, each at most Delta per unit of cotangent, so it is within
    the bound of one copy. What is compared with C is the root mean square of the copies' loss gradients.

    Args:
        model: the model; whatever else is asked of this object comes from it.
        copies: K.
    """

    def __init__(self, model: Any, copies: int) -> None:
        self._model, self._copies = model, copies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: Any, training: bool = False) -> Any:
        """``[B, K, ...]`` to ``[B, K, n]``."""
        z = self._model(tf.reshape(x, [-1, *x.shape[2:]]), training=training)
        return tf.reshape(z, [x.shape[0], self._copies, -1]) / math.sqrt(self._copies)

    def loss(self, loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """The mean of a loss over an example's copies."""
        k, shape = self._copies, self._model.output_shape[1:]

        def mean(y: Any, output: Any) -> Any:
            z = tf.reshape(output * math.sqrt(k), [-1, *shape])
            return tf.reduce_mean(tf.reshape(loss(tf.repeat(y, k, axis=0), z), [-1, k]), axis=1)

        return mean


class FoldingBackend(TensorFlowBackend):
    """The backend for inputs ``[B, K, ...]``.

    Args:
        performance: as for the backend.
        copies: K.
    """

    def __init__(self, performance: Performance, copies: int) -> None:
        super().__init__(performance)
        self.copies = copies

    def bounded_sum(self, model: Any, loss: Any, batch: gradients.Batch, plan: Plan, two_pass: bool = False) -> gradients.Grads:
        folded = Folded(model, self.copies)
        return super().bounded_sum(folded, folded.loss(loss), batch, plan, two_pass)


@dataclass(frozen=True)
class Facts:
    """What is known of a model before a step: proof, noise, event."""

    strategy: Clipless
    info: ModelInfo
    plan: Plan
    mechanism: GaussianMechanism
    event: GaussianEvent


class Session(Steps):
    """Training state of one model.

    Args:
        model: the model.
        parameters: noise.
        metadata: data.
        ledger: where releases are recorded: a ledger, the path of one, or None for one in memory.
        physical_batch_size: examples processed at once; None chooses.
    """

    def __init__(
        self,
        model: Any,
        parameters: DPParameters,
        metadata: DatasetMetadata,
        ledger: PrivacyLedger | str | Path | None = None,
        physical_batch_size: int | None = None,
    ) -> None:
        super().__init__(model)
        self.parameters, self.metadata = parameters, metadata
        self.physical = check_physical_batch_size(physical_batch_size)  # before a ledger is opened
        self.ledger = open_ledger(ledger)
        self.loss: DP_Loss | None = None
        self.eager = False
        self.quantile: QuantileSettings | None = None
        self.keys = RandomKey.make(SAMPLING), RandomKey.make(NOISE)
        self.labels = np.zeros(0)  # training targets as they were given

    # --- facts ---
    def compiled(self) -> DP_Loss:
        """The loss.

        Raises:
            ConfigError: there is none yet.
        """
        if self.loss is None:
            raise ConfigError("The model is not compiled; call compile(loss=DP_..., optimizer=...) first.")
        if not self.model.built:
            self.model.build((None, *self.metadata.input_shape))
        return self.loss

    def probe(self, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """Synthetic examples; no real one is touched by planning."""
        loss, shape = self.compiled(), tuple(self.model.input_shape[1:])
        x = np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)
        outputs = math.prod(self.model.output_shape[1:])
        return x, loss.targets(np.arange(count) % max(2, outputs), outputs)

    def facts(self) -> Facts:
        """Proof, noise and event for the weights as they are."""
        loss = self.compiled()
        info = engine.facts(self.model, self.probe()[0], loss)
        coefficients = self.coefficients(Clipless().plan(info))  # the groups do not depend on a clip
        sigma = self.parameters.joint(list(coefficients.values()))
        strategy = self.strategy(loss, sigma)
        plan = strategy.plan(info)
        weights = {glob.escape(name): c for name, c in coefficients.items() if c != 1.0}
        allocation: Literal["global", "per_group"] = "global" if self.parameters.noisify_strategy in GLOBAL else "per_group"
        mechanism = GaussianMechanism(sigma, allocation, weights)
        event = release_event(plan, mechanism.stds(plan, RELATION), self.metadata.sample_rate, RELATION)
        return Facts(strategy, info, plan, mechanism, event)

    def strategy(self, loss: DP_Loss, sigma: float) -> Clipless:
        """``Clipless`` with the clip of the last layer, for a joint noise multiplier."""
        last = last_layer(self.model)
        moving = [layer.name for layer in clips(self.model) if layer.mode == "dynamic" and layer is not last]
        if moving:
            raise UnsupportedModelError([f"layer {name!r} can be dynamic as the last layer only; move it there." for name in moving])
        if not isinstance(last, DP_ClipGradient):
            if self.quantile is not None:
                raise ConfigError('AdaptiveQuantileClipping needs DP_ClipGradient(None, mode="dynamic") as the last layer; add it.')
            return Clipless()
        if last.mode == "fixed":
            if self.quantile is not None:
                raise ConfigError(f"AdaptiveQuantileClipping needs layer {last.name!r} to have mode='dynamic'; set it.")
            return Clipless(loss_gradient_clip=last.clip_value)
        constant = loss.lipschitz(math.prod(self.model.output_shape[1:]))
        initial = constant if last.clip_value is None else float(last.clip_value)
        assert initial is not None
        if self.quantile is None:
            return Clipless(loss_gradient_clip=AdaptiveClip(initial=initial))
        return Clipless(loss_gradient_clip=self.quantile.clip(initial, sigma, self.metadata.steps))

    def coefficients(self, plan: Plan) -> dict[str, float]:
        """Group -> ``nm_coef`` of its layers."""
        own = {unit.name: float(getattr(unit.layer, "nm_coef", 1.0)) for unit in find_units(self.model)}
        found = {}
        for group in plan.gradient_groups:
            values = {own[name] for name in group.layers}
            if len(values) > 1:
                raise ConfigError(f"The layers {', '.join(group.layers)} share a parameter; give them the same nm_coef.")
            found[group.name] = values.pop()
        return found

    def epsilon(self, events: tuple[tuple[GaussianEvent, int], ...] = ()) -> float:
        """Of what the ledger holds, and more events."""
        return get_accountant(ACCOUNTANT, RELATION).epsilon([*self.ledger.events, *events], self.parameters.delta)

    # --- training ---
    def start(self, x: Any, y: Any) -> None:
        """Prepare the steps of a call of ``fit``; raises whatever is wrong before anything is spent."""
        loss = self.compiled()
        source = materialise(x, y, self.metadata)
        targets, self.labels = loss.targets(source.y, math.prod(self.model.output_shape[1:])), source.y
        copied = isinstance(source.x, Copies)
        inputs: Any = source.x if copied else np.asarray(source.x, np.float32)
        raw, copies = (inputs.x, inputs.multiplicity) if copied else (inputs, 1)
        classes = max(2, int(targets.max(initial=1)) + 1) if targets.dtype == np.int64 else None
        validate(Dataset("fit", raw, targets, raw[:0], targets[:0], classes, {}))
        optimizer = self.model.optimizer
        if isinstance(optimizer._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            raise ConfigError("The optimizer has a schedule; give it a number, and keras.callbacks.LearningRateScheduler to fit.")
        performance = Performance(compile=not self.eager)
        executor = FoldingBackend(performance, copies) if copied else TensorFlowBackend(performance)
        probe = self.probe()
        engine.project(self.model, probe[0])
        facts = self.facts()
        if copies > 1:
            check_clips(self.model, facts.info)
        executor.self_check(self.model, loss.examples, *probe, facts.plan)
        scale = self.in_force.scale if self.in_force is not None and facts.strategy.adaptive is not None else 1.0
        expected = self.metadata.sample_rate * self.metadata.nb_samples_train
        self.executor = executor
        self.in_force = PlanInForce(facts.strategy, facts.info, facts.plan, facts.mechanism, RELATION, expected)
        self.certify(scale)
        release = Release(facts.mechanism.stds(facts.plan, RELATION), facts.event, self.keys[1], self.ledger)
        sampler = PoissonSampler(len(raw), self.metadata.sample_rate, self.keys[0])
        self.step = TrainingStep(
            executor, self.model, loss.examples, optimizer, facts.plan, sampler, inputs, targets, self.physical_batch(copies),
            lambda t: float(optimizer.learning_rate), 0, release, in_force=self.in_force,
        )  # fmt: skip

    def physical_batch(self, copies: int) -> int:
        """Examples processed at once."""
        return self.physical or default_physical_batch(self.metadata.batch_size, self.metadata.nb_samples_train, copies)

    def drawn(self) -> list[tuple[Any, Any]]:
        """The last logical batch, in pieces, for metrics. NOT private."""
        assert self.step is not None
        x = self.step.x
        return [(fold(x[part], isinstance(x, Copies)), self.labels[part]) for part in self.pieces()]

    def metrics_probe(self) -> tuple[Any, Any]:
        """Targets in the form they were given, and outputs, of synthetic examples."""
        x, _ = self.probe()
        return np.zeros((len(x), *self.labels.shape[1:]), self.labels.dtype), self.model(x, training=False)

    # --- monitors, NOT private ---
    def norms(self, x: Any, y: Any) -> dict[str, np.ndarray]:
        """Group -> gradient norm of each example of a batch, after the clip of the loss gradient."""
        loss, plan = self.compiled(), self.facts().plan
        y = loss.targets(y, math.prod(self.model.output_shape[1:]))
        members = {group.name: group.layers for group in plan.gradient_groups}
        measuring = get_strategy("mixed_ghost", grouping=members).plan(ModelInfo(plan.layers)).with_clip_norm(math.inf)
        clip, found = LossGradientClip(plan.loss_clip or math.inf), dict[str, Any]()
        batch = engine.full_batch(np.asarray(x, np.float32), y)
        engine.checked_sum(self.model, lambda t, z: loss.examples(t, clip(z)), batch, measuring, norms_out=found)
        return {group.name: np.asarray(found.get(group.name, np.zeros(len(y)))) for group in plan.gradient_groups}

    def mean_norms(self, x: Any, y: Any) -> dict[str, float]:
        """Group -> norm of the mean gradient of a batch, without noise."""
        loss, plan = self.compiled(), self.facts().plan
        y = loss.targets(y, math.prod(self.model.output_shape[1:]))
        found = gradients.bounded_sum(self.model, loss.examples, engine.full_batch(np.asarray(x, np.float32), y), plan, training=False)
        groups, squares = group_of_parameter(plan), dict.fromkeys((g.name for g in plan.gradient_groups), 0.0)
        for name, value in found.sums.items():
            squares[groups[found.identifiers[name]]] += float(tf.reduce_sum(tf.square(value)))
        return {name: math.sqrt(square) / len(y) for name, square in squares.items()}

    def bounds(self) -> dict[str, float]:
        """Group -> bound of one example's gradient, for the weights as they are."""
        return {group.name: group.norm_bound for group in self.facts().plan.gradient_groups}


def fold(x: np.ndarray, copied: bool) -> np.ndarray:
    """One copy of each example."""
    return x[:, 0] if copied else x


def last_layer(model: Any) -> Any:
    """The layer whose output is the model's."""
    return model.outputs[0]._keras_history.operation


def clips(model: Any) -> list[DP_ClipGradient]:
    """All gradient clips of a model."""
    return [layer for layer in children(model) if isinstance(layer, DP_ClipGradient)]


def check_clips(model: Any, info: ModelInfo) -> None:
    """Refuse clips inside a model whose examples have copies: each copy would be clipped by itself, and their sum exceed the bound.

    A ``DP_ClipGradient`` at the end is no danger: the training step enforces its value for all copies together.
    """
    assert info.graph is not None
    nodes = info.graph.nodes[:-1] if isinstance(last_layer(model), DP_ClipGradient) else info.graph.nodes
    inner = [node.name for node in nodes if node.kind == "loss_gradient_clip" and math.isfinite(node.attrs["norm"])]
    if inner:
        raise UnsupportedModelError(
            [f"layer {name!r} would clip each copy of an example and not all of them together; remove it." for name in inner]
        )
