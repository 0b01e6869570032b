"""The API for users with a model of their own: diagnostics that run the very code of the training step, and the self-check."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from dptrain.errors import UnsupportedModelError
from dptrain.plan import Plan
from dptrain.strategies import SensitivityStrategy, get_strategy
from dptrain_tf.describe import describe, tensors
from dptrain_tf.gradients import Batch, Loss, batch_size, bounded_sum, call_model, example_losses, plain_sum, trainable
from dptrain_tf.rules import children


def make_plan(model: Any, x: Any, strategy: str | SensitivityStrategy = "mixed_ghost", **settings: Any) -> Plan:
    """The plan of a strategy for a model.

    Args:
        model: any Keras model; built by a call if it is not built yet.
        x: a batch of inputs.
        strategy: a strategy or its name.
        settings: fields of the strategy, such as ``max_grad_norm``, if it is given by name.
    Returns:
        The plan; ``print`` it.
    """
    return get_strategy(strategy, **settings).plan(describe(model, x))


def full_batch(x: Any, y: Any) -> Batch:
    """All examples as one physical batch without padding."""
    x = tensors(x)
    return Batch(x, tensors(y), tf.ones([batch_size(x)], tf.bool))


def per_sample_norms(
    model: Any, loss: Loss, x: Any, y: Any, strategy: str | SensitivityStrategy = "mixed_ghost", training: bool = False
) -> Tensor:
    """L2 norm of each example's gradient over all trainable parameters.

    Args:
        model: any Keras model; left as it was.
        loss: ``loss(y, output) -> [B]``, one value per example, such as a Keras loss with ``reduction="none"``.
        x: inputs ``[B, ...]``, or a list, tuple or mapping of such.
        y: targets.
        strategy: a clipping strategy or its name; all give the same norms.
        training: whether dropout is active.
    Returns:
        Norms ``[B]``. They are NOT private.
    Raises:
        UnsupportedModelError: the model or the loss cannot be bounded.
    """
    norms: dict[str, Tensor] = {}
    plan = make_plan(model, x, clipping_strategy(strategy))
    bounded_sum(model, loss, full_batch(x, y), plan, norms_out=norms, training=training)
    return tf.sqrt(tf.add_n([tf.square(norm) for norm in norms.values()]))


def clipped_sum(
    model: Any,
    loss: Loss,
    x: Any,
    y: Any,
    max_grad_norm: float = 1.0,
    strategy: str | SensitivityStrategy = "mixed_ghost",
    two_pass: bool = False,
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
        two_pass: take the sum from a second backward pass, after a self-check.
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
    if two_pass:
        self_check(model, loss, x, y, plan)
    return bounded_sum(model, loss, full_batch(x, y), plan, two_pass=two_pass, training=training).sums


def clipping_strategy(strategy: Any) -> Any:
    """The strategy, if it takes norms.

    Raises:
        UnsupportedModelError: ``non_private`` takes none.
    """
    name = strategy if isinstance(strategy, str) else strategy.name
    if name == "non_private":
        raise UnsupportedModelError(["strategy non_private takes no per-sample norms; choose mixed_ghost, ghost or per_sample."])
    return strategy


def take(x: Any, where: Any) -> Any:
    """The examples of every tensor of a batch that a list of indices names."""
    return tf.nest.map_structure(lambda t: tf.gather(t, where), tensors(x))


def self_check(model: Any, loss: Loss, x: Any, y: Any, plan: Plan) -> None:
    """Refuse a model whose clipped sum would not be what it claims. Costs a few passes over at most three examples.

    Checks, with dropout off: every layer keeps the batch first for two batch sizes; no other state moves; each example's loss is
    the same alone and in company; without clipping the sum equals the plain gradient; at a tiny C one example stays within its bound.

    Args:
        model: the model; left as it was.
        loss: per-example loss.
        x, y: a batch, of which up to three examples are used.
        plan: the plan that training will use.
    Raises:
        UnsupportedModelError: lists every problem.
    """
    count = batch_size(x)
    batches = [(take(x, np.arange(n) % count), take(y, np.arange(n) % count)) for n in (2, 3)]
    problems: list[str] = []
    random = {id(generator.state) for layer in children(model) for generator in layer._seed_generators}
    state = [(v, tf.identity(v.value)) for v in model.non_trainable_variables]
    try:
        bounded_sum(model, loss, full_batch(*batches[1]), plan, training=True)
        moved = [v.path for v, before in state if id(v) not in random and not bool(tf.reduce_all(v.value == before))]
        problems += [f"state {name!r} is updated from data without noise; remove the layer that does it." for name in moved]
        describe(model, batches[0][0])
        problems += independence_problems(model, loss, batches[1][0], batches[1][1])
        problems += completeness_problems(model, loss, full_batch(*batches[1]), plan)
        problems += bound_problems(model, loss, batches[0], plan)
    finally:
        for variable, before in state:
            variable.assign(before)
    if problems:
        raise UnsupportedModelError(problems)


def independence_problems(model: Any, loss: Loss, x: Any, y: Any) -> list[str]:
    """Each example's loss alone against its loss in company (pitfalls.md G8)."""
    together = example_losses(loss, call_model(model, x, False), y, 3)
    alone = [example_losses(loss, call_model(model, take(x, [i]), False), take(y, [i]), 1) for i in range(3)]
    gap = tf.reduce_max(tf.abs(tf.concat(alone, axis=0) - together))
    if not bool(gap <= tolerance(together) * (1 + tf.reduce_max(tf.abs(together)))):
        return [f"the loss of one example depends on its batch (by {float(gap):.3g}); find the layer or loss that mixes examples."]
    return []


def completeness_problems(model: Any, loss: Loss, batch: Batch, plan: Plan) -> list[str]:
    """Without clipping the sum must be the plain gradient: every use of every parameter is seen (G1, G4, G5, G23)."""
    ours = bounded_sum(model, loss, batch, plan.with_clip_norm(float("inf")), training=False).sums
    plain = plain_sum(model, loss, batch, training=False).sums
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
    sums = bounded_sum(model, loss, full_batch(take(x, [0]), take(y, [0])), plan.with_clip_norm(tiny), training=False).sums
    total = float(tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(tf.cast(value, tf.float64))) for value in sums.values()])))
    bound = tiny * len(plan.groups) ** 0.5
    if not total <= bound * (1 + 1e-3):
        return [f"one example contributes {total:.3g} for a bound of {bound:.3g}; please report this model."]
    return []


def tolerance(x: Tensor) -> float:
    """Relative agreement to expect of two ways to compute the same thing in a given precision."""
    return {tf.float64: 1e-9, tf.float32: 1e-4}.get(x.dtype, 5e-2)


__all__ = ["clipped_sum", "describe", "make_plan", "per_sample_norms", "self_check", "trainable"]
