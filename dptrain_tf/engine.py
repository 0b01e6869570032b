"""The API for users with a model of their own: plans, proofs, and diagnostics that run the very code of the training step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tensorflow as tf
from tensorflow import Tensor

from dptrain.errors import UnsupportedModelError
from dptrain.info import ModelInfo
from dptrain.plan import Plan
from dptrain.projection import certify
from dptrain.strategies import SensitivityStrategy, get_strategy
from dptrain.validation import ValidatedLayer, Validation
from dptrain_tf import update
from dptrain_tf.checks import method_of, self_check, surrogate, validate
from dptrain_tf.describe import describe, take, tensors
from dptrain_tf.gradients import Loss, trainable
from dptrain_tf.graph import graph, weights
from dptrain_tf.sums import attained, checked_sum, full_batch, pair


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
        self_check(model, loss, x, y, plan, training or two_pass, two_pass)
    return checked_sum(model, loss, full_batch(x, y), plan, two_pass=two_pass, training=training).sums


def clipping_strategy(strategy: Any) -> Any:
    """The strategy, if it takes norms.

    Raises:
        UnsupportedModelError: ``non_private`` takes none.
    """
    name = strategy if isinstance(strategy, str) else strategy.name
    if name in ("non_private", "clipless"):
        raise UnsupportedModelError([f"strategy {name} takes no per-sample norms; choose mixed_ghost, ghost or per_sample."])
    return strategy


__all__ = [
    "ValidatedLayer",
    "Validation",
    "attained",
    "check_bounds",
    "checked_sum",
    "clipped_sum",
    "describe",
    "facts",
    "full_batch",
    "make_plan",
    "method_of",
    "per_sample_norms",
    "project",
    "self_check",
    "surrogate",
    "take",
    "tensors",
    "trainable",
    "validate",
]
