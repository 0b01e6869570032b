"""How close one example can come to a proven bound: alternating maximisation over inputs and loss gradients.

It finds lower bounds of the true sensitivity, so an attained norm above the claimed one would refute a proof, and the ratio of the
two says how much noise a bound wastes. No data are used: the inputs are found, within the norm that the model admits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from dptrain.bounds import input_norm
from dptrain.plan import Plan
from dptrain_tf.gradients import identifiers, trainable
from dptrain_tf.hooks import find_units
from dptrain_tf.update import group_of_parameter


def starts(shape: tuple[int, ...], dtype: Any, restarts: int) -> list[Tensor]:
    """A constant input, one with a single position, and random ones, as batches of one.

    Overlapping windows add up best on the constant one, disjoint windows and positions on the single one.
    """
    single = np.zeros((1, *shape))
    single[(0, *(n // 2 for n in shape[:-1]))] = 1.0
    draws = [tf.ones((1, *shape), dtype), tf.constant(single, dtype)]
    return draws + [tf.random.stateless_normal((1, *shape), [0, i + 1], dtype=dtype) for i in range(restarts)]


def to_norm(v: Tensor, norm: float) -> Tensor:
    """A tensor scaled to a norm; zero stays zero."""
    size = tf.norm(v)
    return v * tf.cast(norm, v.dtype) / tf.where(size > 0, size, tf.ones_like(size))


def ascent(model: Any, variables: list[Any]) -> Callable[[Tensor, Tensor], Any]:
    """A traced function from an input ``[1, ...]`` and a cotangent at the output to the squared norm of the joint gradient of some
    variables, and the directions in which it grows.
    """
    values = [v.value for v in variables]

    @tf.function(autograph=False, reduce_retracing=False)
    def step(x: Tensor, cotangent: Tensor) -> Any:
        with tf.GradientTape() as outer:
            outer.watch([x, cotangent])
            with tf.GradientTape() as inner:
                output = tf.reduce_sum(model(x, training=False) * cotangent)
            gradients = inner.gradient(output, values, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            square = tf.add_n([tf.reduce_sum(tf.square(g)) for g in gradients])
        return square, outer.gradient(square, [x, cotangent], unconnected_gradients=tf.UnconnectedGradients.ZERO)

    return step


def ascend(step: Callable[[Tensor, Tensor], Any], x: Tensor, cotangent: Tensor, norms: tuple[float, float], iterations: int) -> float:
    """Largest gradient norm met from one starting point.

    Args:
        step: of ``ascent``.
        x: an input ``[1, ...]``.
        cotangent: a first cotangent at the output.
        norms: of the input, and of the cotangent.
        iterations: steps; each replaces the cotangent, and every third one, later on, the input, by the direction in which the squared
            norm grows: power iterations wherever the network is linear, one after the other because the norm is bilinear there.
    Returns:
        The norm.
    """
    best, x, cotangent = 0.0, to_norm(x, norms[0]), to_norm(cotangent, norms[1])
    for i in range(iterations):
        square, (dx, dc) = step(x, cotangent)
        best = max(best, float(square) ** 0.5)
        if i % 3 == 2 and i > 4:
            x = to_norm(dx if bool(tf.reduce_any(dx != 0)) else x, norms[0])
        cotangent = to_norm(dc if bool(tf.reduce_any(dc != 0)) else cotangent, norms[1])
    return best


def tightness(model: Any, x: Tensor, plan: Plan, *, restarts: int = 2, iterations: int = 18) -> dict[str, tuple[float, float]]:
    """Largest gradient norm found, beside the proven bound.

    Args:
        model: the model of the plan; left as it was.
        x: a batch, for its shape.
        plan: a plan of ``clipless``.
        restarts: random starting points beside the fixed ones.
        iterations: steps from each.
    Returns:
        Group -> attained, claimed. About synthetic inputs, hence not about anyone's data.
    """
    groups, parameters, found = group_of_parameter(plan), trainable(model), dict[str, tuple[float, float]]()
    names, norms = identifiers(find_units(model)), (input_norm(plan.graph), float(plan.loss_clip or 0.0))
    points = starts(tuple(x.shape[1:]), x.dtype, restarts)
    output = model(points[0], training=False)
    cotangent = tf.random.stateless_normal(output.shape, [1, 1], dtype=output.dtype)
    for group in plan.gradient_groups:
        members = [v for name, v in parameters.items() if groups[names[name]] == group.name]
        step = ascent(model, members)
        attained = max(ascend(step, start, cotangent, norms, iterations) for start in points)
        found[group.name] = (attained, group.norm_bound)
    return found
