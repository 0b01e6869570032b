"""The API for users with a model of their own: diagnostics that run the very code of the training step, and the self-check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from dptrain.errors import UnsupportedModelError
from dptrain.info import ModelInfo
from dptrain.mechanism import FLOAT_MARGIN
from dptrain.plan import Plan
from dptrain.projection import certify
from dptrain.strategies import SensitivityStrategy, get_strategy
from dptrain_tf import update
from dptrain_tf.describe import describe, tensors
from dptrain_tf.gradients import Batch, Grads, Loss, batch_size, bounded_sum, call_model, example_losses, plain_sum, trainable
from dptrain_tf.graph import graph, weights
from dptrain_tf.lipschitz import LossGradientClip
from dptrain_tf.rules import children


def make_plan(model: Any, x: Any, strategy: str | SensitivityStrategy = "mixed_ghost", *, loss: Any = None, **settings: Any) -> Plan:
    """The plan of a strategy for a model.

    Args:
        model: any Keras model; built by a call if it is not built yet. For ``clipless``, ``project`` it first.
        x: a batch of inputs.
        strategy: a strategy or its name.
        loss: for ``clipless``, a loss of ``get_loss``, or the Lipschitz constant of your own.
        settings: fields of the strategy, such as ``max_grad_norm``, if it is given by name.
    Returns:
        The plan; ``print`` it.
    """
    found = get_strategy(strategy, **settings)
    return found.plan(facts(model, x, loss) if found.proves else describe(model, x))


def facts(model: Any, x: Any, loss: Any = None) -> ModelInfo:
    """What a proof needs of a model: its layers, its graph, and certificates of its current weights.

    Args:
        model: a model made of layers with a proven bound; left as it was.
        x: a batch of inputs.
        loss: a loss of ``get_loss``, the Lipschitz constant of your own, or None where none is known.
    Returns:
        Facts.
    Raises:
        UnsupportedModelError: lists every layer that has no bound.
    """
    found = graph(model, pair(x))
    if found.problems:
        raise UnsupportedModelError(found.problems)
    constant = loss.lipschitz(found.output.size) if hasattr(loss, "lipschitz") else loss if isinstance(loss, int | float) else None
    return replace(describe(model, x), graph=found, certificates=certify(found, weights(model, found)), loss_lipschitz=constant)


def project(model: Any, x: Any) -> dict[str, float]:
    """Restore the constraints of a model's Lipschitz layers, and certify them.

    Args:
        model: a model made of layers with a proven bound; its weights are changed.
        x: a batch of inputs; only shapes matter.
    Returns:
        ``layer.role`` -> certified norm.
    Raises:
        UnsupportedModelError: lists every layer that has no bound.
    """
    found = graph(model, pair(x))
    if found.problems:
        raise UnsupportedModelError(found.problems)
    return update.constrain(model, found, first=True)


def check_bounds(model: Any, loss: Loss, x: Any, y: Any, **settings: Any) -> dict[str, tuple[float, float]]:
    """Per-sample gradient norms, taken with ghost norms, beside the bounds that ``clipless`` proves.

    Args:
        model: a model made of layers with a proven bound; left as it was.
        loss: a loss of ``get_loss``.
        x, y: a batch.
        settings: fields of ``clipless``.
    Returns:
        Group -> largest norm in the batch, proven bound. The norms are NOT private.
    """
    return attained(model, loss, x, y, make_plan(model, x, "clipless", loss=loss, **settings))


def attained(model: Any, loss: Loss, x: Any, y: Any, plan: Plan) -> dict[str, tuple[float, float]]:
    """Group -> largest per-sample gradient norm in a batch, and the bound of a plan with proven bounds."""
    members = {group.name: group.layers for group in plan.gradient_groups}
    info = ModelInfo(plan.layers)
    measuring = get_strategy("mixed_ghost", grouping=members).plan(info).with_clip_norm(float("inf"))
    clip = LossGradientClip(plan.loss_clip or float("inf"))
    norms: dict[str, Tensor] = {}
    checked_sum(model, lambda target, output: loss(target, clip(output)), full_batch(x, y), measuring, norms_out=norms)
    return {g.name: (float(tf.reduce_max(norms[g.name])) if g.name in norms else 0.0, g.norm_bound) for g in plan.gradient_groups}


def full_batch(x: Any, y: Any) -> Batch:
    """All examples as one physical batch without padding."""
    x = tensors(x)
    return Batch(x, tensors(y), tf.ones([batch_size(x)], tf.bool))


def per_sample_norms(
    model: Any,
    loss: Loss,
    x: Any,
    y: Any,
    strategy: str | SensitivityStrategy = "mixed_ghost",
    check: bool = True,
    training: bool = False,
) -> Tensor:
    """L2 norm of each example's gradient over all trainable parameters.

    Args:
        model: any Keras model; left as it was.
        loss: ``loss(y, output) -> [B]``, one value per example, such as a Keras loss with ``reduction="none"``.
        x: inputs ``[B, ...]``, or a list, tuple or mapping of such.
        y: targets.
        strategy: a clipping strategy or its name; all give the same norms.
        check: run ``self_check`` first, on up to three of the examples; turn it off for a model that has passed it.
        training: whether dropout is active.
    Returns:
        Norms ``[B]``. They are NOT private.
    Raises:
        UnsupportedModelError: the model or the loss cannot be bounded.
    """
    norms: dict[str, Tensor] = {}
    plan = make_plan(model, x, clipping_strategy(strategy))
    if check:
        self_check(model, loss, x, y, plan, training)
    checked_sum(model, loss, full_batch(x, y), plan, norms_out=norms, training=training)
    return tf.sqrt(tf.add_n([tf.square(norm) for norm in norms.values()]))


def clipped_sum(
    model: Any,
    loss: Loss,
    x: Any,
    y: Any,
    max_grad_norm: float = 1.0,
    strategy: str | SensitivityStrategy = "mixed_ghost",
    two_pass: bool = False,
    check: bool = True,
    training: bool = False,
    **settings: Any,
) -> dict[str, Tensor]:
    """The sum over the batch of clipped per-sample gradients, before noise.

    Args:
        model: any Keras model; left as it was.
        loss: ``loss(y, output) -> [B]``, one value per example, such as a Keras loss with ``reduction="none"``.
        x: inputs ``[B, ...]``, or a list, tuple or mapping of such.
        y: targets.
        max_grad_norm: C; infinity turns clipping off and gives the plain gradient of the summed loss.
        strategy: a clipping strategy or its name; all give the same sum. A strategy object keeps its own ``max_grad_norm``.
        two_pass: take the sum from a second backward pass, always after a self-check.
        check: run ``self_check`` first, on up to three of the examples; turn it off for a model that has passed it.
        training: whether dropout is active.
        settings: further fields of the strategy.
    Returns:
        ``variable.path`` -> tensor. It is NOT private.
    Raises:
        UnsupportedModelError: the model or the loss cannot be bounded.
    """
    infinite = max_grad_norm == float("inf")
    if isinstance(strategy, str):
        strategy = get_strategy(clipping_strategy(strategy), max_grad_norm=1.0 if infinite else max_grad_norm, **settings)
    plan = make_plan(model, x, strategy)
    if infinite:
        plan = plan.with_clip_norm(max_grad_norm)
    if check or two_pass:
        self_check(model, loss, x, y, plan, training or two_pass)
    return checked_sum(model, loss, full_batch(x, y), plan, two_pass=two_pass, training=training).sums


def hazardous(model: Any) -> bool:
    """Whether TensorFlow 2.21 on CPU may read out of bounds in an ordinary filter gradient: strided convolutions with a 1x1 kernel."""
    sizes = [(getattr(m, "kernel_size", ()), getattr(m, "strides", ())) for m in children(model)]
    return any(isinstance(k, tuple) and k and max(k) == 1 and isinstance(r, tuple) and max(r) > 1 for k, r in sizes)


def safely(model: Any, batch: Batch, function: Callable[[Batch], Grads], jit: bool = False) -> Grads:
    """Run a sum eagerly, or, for a hazardous model, traced: there the unwanted filter gradients are pruned, or compiled by XLA."""
    if not hazardous(model):
        return function(batch)
    found: list[Grads] = []

    @tf.function(autograph=False, jit_compile=jit)
    def traced(x: Any, y: Any, mask: Any) -> Any:
        found.append(function(Batch(x, y, mask)))
        return list(found[-1].sums.values()), found[-1].stats

    sums, stats = traced(batch.x, batch.y, batch.mask)
    return Grads(dict(zip(found[-1].sums, sums, strict=True)), stats, found[-1].identifiers)


def checked_sum(
    model: Any,
    loss: Loss,
    batch: Batch,
    plan: Plan,
    norms_out: dict[str, Tensor] | None = None,
    two_pass: bool = False,
    training: bool = False,
) -> Grads:
    """``bounded_sum`` outside the training loop."""
    if norms_out is None or not hazardous(model):
        return safely(
            model,
            batch,
            lambda b: bounded_sum(model, loss, b, plan, two_pass=two_pass, norms_out=norms_out, training=training),
            jit=two_pass,
        )

    def with_norms(b: Batch) -> Grads:
        norms: dict[str, Tensor] = {}
        grads = bounded_sum(model, loss, b, plan, two_pass=two_pass, norms_out=norms, training=training)
        return Grads(norms, grads.stats, grads.identifiers)

    norms_out.update(safely(model, batch, with_norms).sums)
    return Grads({}, {}, {})


def clipping_strategy(strategy: Any) -> Any:
    """The strategy, if it takes norms.

    Raises:
        UnsupportedModelError: ``non_private`` takes none.
    """
    name = strategy if isinstance(strategy, str) else strategy.name
    if name in ("non_private", "clipless"):
        raise UnsupportedModelError([f"strategy {name} takes no per-sample norms; choose mixed_ghost, ghost or per_sample."])
    return strategy


def pair(x: Any) -> Any:
    """Two examples of a batch."""
    return take(x, [i % batch_size(tensors(x)) for i in range(2)])


def take(x: Any, where: Any) -> Any:
    """The examples of every tensor of a batch that a list of indices names."""
    return tf.nest.map_structure(lambda t: tf.gather(t, where), tensors(x))


def finite(x: Any) -> Any:
    """A batch with zeros in place of what is not finite: the probe is about the model, not about the data."""
    return tf.nest.map_structure(lambda t: tf.where(tf.math.is_finite(t), t, tf.zeros_like(t)) if t.dtype.is_floating else t, x)


def self_check(model: Any, loss: Loss, x: Any, y: Any, plan: Plan, training: bool = True) -> None:
    """Refuse a model whose clipped sum would not be what it claims. Costs a few passes over at most three examples.

    Checks, with dropout off: every layer keeps the batch first for two batch sizes; no other state moves; each example's loss is
    the same in any company; without clipping the sum equals the plain gradient; at a tiny C one example stays within its bound.

    Args:
        model: the model; left as it was.
        loss: per-example loss.
        x, y: a batch, of which up to three examples are used.
        plan: the plan that training will use.
        training: whether the model will be run in training mode; every other check runs with dropout off.
    Raises:
        UnsupportedModelError: lists every problem.
    """
    count = batch_size(x)
    batches = [(finite(take(x, np.arange(n) % count)), finite(take(y, np.arange(n) % count))) for n in (2, 3)]
    problems: list[str] = []
    random = {id(generator.state) for layer in children(model) for generator in layer._seed_generators}
    state = [(v, tf.identity(v.value)) for v in model.non_trainable_variables]
    try:
        checked_sum(model, loss, full_batch(*batches[1]), plan, training=training)
        moved = [v.path for v, before in state if id(v) not in random and not bool(tf.reduce_all(v.value == before))]
        problems += [f"state {name!r} is updated from data without noise; remove the layer that does it." for name in moved]
        describe(model, batches[0][0])
        problems += independence_problems(model, loss, batches[1][0], batches[1][1])
        if plan.loss_clip is None:
            problems += completeness_problems(model, loss, full_batch(*batches[1]), plan)
            problems += bound_problems(model, loss, batches[0], plan)
        else:
            problems += proof_problems(model, loss, batches[1], plan)
    finally:
        for variable, before in state:
            variable.assign(before)
    if problems:
        raise UnsupportedModelError(problems)


def independence_problems(model: Any, loss: Loss, x: Any, y: Any) -> list[str]:
    """Each example's loss among copies of itself against its loss in company (pitfalls.md G8)."""
    together = example_losses(loss, call_model(model, x, False), y, 3)
    alone = [example_losses(loss, call_model(model, take(x, [i] * 3), False), take(y, [i] * 3), 3)[0] for i in range(3)]
    gap = tf.reduce_max(tf.abs(tf.stack(alone) - together))
    if not bool(gap <= tolerance(together) * (1 + tf.reduce_max(tf.abs(together)))):
        return [f"the loss of one example depends on its batch (by {float(gap):.3g}); find the layer or loss that mixes examples."]
    return []


def completeness_problems(model: Any, loss: Loss, batch: Batch, plan: Plan) -> list[str]:
    """Without clipping the sum must be the plain gradient: every use of every parameter is seen (G1, G4, G5, G23)."""
    ours = checked_sum(model, loss, batch, plan.with_clip_norm(float("inf"))).sums
    plain = safely(model, batch, lambda b: plain_sum(model, loss, b, training=False), jit=True).sums
    scale = max(float(tf.norm(value)) for value in plain.values())
    bad = [
        name
        for name, value in plain.items()
        if not float(tf.norm(ours[name] - value)) <= 10 * tolerance(value) * max(float(tf.norm(value)), 1e-2 * scale) + 1e-30
    ]
    return [
        f"parameter {name!r} is used in a way that no layer call shows (a functional use, a reused weight), so its gradient would be "
        "wrong; call the layer itself, or wrap the use in a layer of its own."
        for name in bad
    ]


def bound_problems(model: Any, loss: Loss, pair: tuple[Any, Any], plan: Plan) -> list[str]:
    """One example at a tiny clipping norm must stay within it."""
    tiny, (x, y) = 1e-3, pair
    one = Batch(x, y, tf.constant([True, False]))
    sums = checked_sum(model, loss, one, plan.with_clip_norm(tiny)).sums
    total = float(tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(tf.cast(value, tf.float64))) for value in sums.values()])))
    bound = tiny * len(plan.groups) ** 0.5
    if not total <= bound * (1 + 1e-3):
        return [f"one example contributes {total:.3g} for a bound of {bound:.3g}; please report this model."]
    return []


def proof_problems(model: Any, loss: Loss, batch: tuple[Any, Any], plan: Plan) -> list[str]:
    """No example exceeds its proven bound."""
    return [
        f"group {name!r} reaches a gradient norm of {norm:.6g} over its proven bound {bound:.6g}; please report this model."
        for name, (norm, bound) in attained(model, loss, *batch, plan).items()
        if not norm <= bound * (1 + FLOAT_MARGIN)
    ]


def tolerance(x: Tensor) -> float:
    """Relative agreement to expect of two ways to compute the same thing in a given precision."""
    return {tf.float64: 1e-6, tf.float32: 1e-4}.get(x.dtype, 5e-2)


__all__ = [
    "attained",
    "check_bounds",
    "clipped_sum",
    "describe",
    "facts",
    "make_plan",
    "per_sample_norms",
    "project",
    "self_check",
    "trainable",
]
