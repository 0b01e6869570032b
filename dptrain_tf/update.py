"""From a sum of per-sample gradients to new weights: accumulate, reduce, add noise, apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf

from dptrain import projection
from dptrain.errors import ConfigError
from dptrain.info import Graph
from dptrain.plan import Plan
from dptrain.randomness import StepNoise
from dptrain_tf.gradients import Grads, identifiers, trainable
from dptrain_tf.graph import assign, weights
from dptrain_tf.hooks import find_units

STATS = ("loss", "count", "clipped", "nonfinite")


def zeros(model: Any) -> Grads:
    """The empty sum: what an empty logical batch releases, before noise (pitfalls.md G17)."""
    sums = {name: tf.zeros(v.shape, v.dtype) for name, v in trainable(model).items()}
    return Grads(sums, {name: tf.zeros([]) for name in STATS}, identifiers(find_units(model)))


def add(total: Grads, part: Grads) -> Grads:
    """The sum of two partial sums, in float64: a float32 sum of many examples rounds by more than one of them may weigh.

    Args:
        total: sum so far; used up.
        part: sum of another physical batch of the same logical batch.
    Returns:
        The sum.
    """
    total = widened(total)
    sums = {name: total.sums.pop(name) + tf.cast(part.sums[name], tf.float64) for name in list(total.sums)}
    counts = {name: value + total.counts.get(name, 0.0) for name, value in part.counts.items()}
    stats = {name: value + part.stats[name] for name, value in total.stats.items()}
    return Grads(sums, stats, total.identifiers, counts, kinds=total.kinds)


def widened(total: Grads) -> Grads:
    """The same sums in float64, with the kinds that they had."""
    if total.kinds:
        return total
    sums = {name: tf.cast(value, tf.float64) for name, value in total.sums.items()}
    return Grads(sums, total.stats, total.identifiers, total.counts, kinds={name: value.dtype for name, value in total.sums.items()})


def reduce(total: Grads) -> Grads:
    """The sum over all workers: an all-reduce in a replica of ``tf.distribute``, the identity on one process."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return total
    total = widened(total)  # on every worker, however many physical batches it had
    sums, counts = context.all_reduce(tf.distribute.ReduceOp.SUM, [dict(total.sums), dict(total.counts)])
    return Grads(sums, total.stats, total.identifiers, counts, kinds=total.kinds)


def group_of_parameter(plan: Plan) -> dict[str, str]:
    """Parameter identifier -> group name."""
    groups = {layer: group.name for group in plan.groups for layer in group.layers}
    return {param: groups[layer.name] for layer in reversed(plan.layers) for param in layer.params}


def group_norms(total: Grads, plan: Plan) -> dict[str, float]:
    """Group -> L2 norm of a sum. NOT private before noise."""
    groups, squares = group_of_parameter(plan), dict[str, Any]()
    for name, value in total.sums.items():
        group = groups[total.identifiers[name]]
        squares[group] = squares.get(group, 0.0) + tf.reduce_sum(tf.square(tf.cast(value, tf.float64)))
    return {name: float(square) ** 0.5 for name, square in squares.items()}


def sums(grads: Grads) -> dict[str, np.ndarray]:
    """Identifier -> gradient sum, copied. NOT private before noise."""
    return {grads.identifiers[name]: np.array(value) for name, value in grads.sums.items()}


def shifted(grads: Grads, by: Mapping[str, np.ndarray]) -> Grads:
    """The same sums with arrays added.

    Args:
        grads: sums; left as they are.
        by: identifier -> array; parameters that are not named stay as they are.
    Returns:
        New sums.
    """
    names = {name: by.get(grads.identifiers[name]) for name in grads.sums}
    added = {name: value if names[name] is None else value + tf.cast(names[name], value.dtype) for name, value in grads.sums.items()}
    return Grads(added, grads.stats, grads.identifiers, grads.counts, kinds=grads.kinds)


def parameters(model: Any) -> dict[str, np.ndarray]:
    """Identifier -> trainable parameter, copied."""
    known = identifiers(find_units(model))
    return {known[name]: v.numpy().copy() for name, v in trainable(model).items()}


def privatize(total: Grads, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Grads:
    """Add Gaussian noise to the sum of every trainable parameter, used in this step or not, and to every count. Not for ``tf.function``.

    Args:
        total: the sum over the whole logical batch and all workers; used up, so that each part is freed as its noise is added.
        plan: says which group a parameter belongs to.
        stds: group name -> standard deviation.
        noise: the noise of this release, used for nothing else.
    Returns:
        The released sums.
    Raises:
        KeyError: a parameter is in no group, so that nothing is ever released without noise.
        ConfigError: called while a ``tf.function`` is traced, where the noise would become a constant.
    Guarantee: with ``stds`` from ``GaussianMechanism`` this is one Gaussian mechanism with the stated noise multiplier, up to what the
        event pays for rounding.
    Source: math.md section 1; ``StepNoise.added_to``.
    """
    if not tf.executing_eagerly():
        raise ConfigError("privatize was called inside tf.function, which would freeze the noise to one draw; call it eagerly.")
    groups, sums = group_of_parameter(plan), {}
    # A missing group raises before anything has been used up.
    shares = {name: stds[groups[total.identifiers[name]]] for name in total.sums}
    for stream, name in enumerate(shares):
        sums[name] = noisy(total.sums.pop(name), shares[name], noise, stream, total.kinds.get(name))
    counts = {}
    if plan.count is not None:  # released in every step, an empty batch included
        name = plan.count.name
        count = tf.constant(float(total.counts.get(name, 0.0)), tf.float64)
        counts[name] = noisy(count, stds[name], noise, len(sums))
    return Grads(sums, total.stats, total.identifiers, counts)


def noisy(value: Any, std: float, noise: StepNoise, stream: int, kind: Any = None) -> Any:
    """A new tensor, the sum of one parameter and its noise; secure noise is added on the host, where its integers are.

    Args:
        value: the sum.
        std: standard deviation of the noise.
        noise: the noise of the release.
        stream: position of the parameter.
        kind: dtype of the result where the sum was widened; noise is drawn in it and added before anything is rounded.
    Returns:
        The release.
    """
    kind = kind or value.dtype
    drawn = np.float64 if kind == tf.float64 else np.float32
    if noise.kind == "secure" or ("CPU" in value.device and value.dtype in (tf.float32, tf.float64)):
        host = value if value.dtype in (tf.float32, tf.float64) else tf.cast(value, tf.float32)
        host = np.asarray(memoryview(host)) if "CPU" in host.device else host.numpy()
        return tf.cast(tf.convert_to_tensor(noise.added_to(host, stream, std, drawn)), kind)
    found = noise.normal(stream, tuple(value.shape), drawn)
    found *= std
    return tf.cast(value + tf.cast(found, value.dtype), kind)


_compiled: WeakKeyDictionary[Any, Callable[..., None]] = WeakKeyDictionary()


def compiled_apply(optimizer: Any, variables: list[Any]) -> Callable[..., None]:
    """One ``tf.function`` per optimizer that scales the gradients and applies them."""
    if optimizer not in _compiled:
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise ConfigError("LossScaleOptimizer divides gradients by a scale that is not used here; pass the optimizer inside it.")
        if not optimizer.built:
            optimizer.build(variables)
        step, members = optimizer.apply, list(variables)  # a bound method would keep the dictionary's key alive

        def apply_scaled(gradients: list[Any], scale: Any) -> None:
            step([g * tf.cast(scale, g.dtype) for g in gradients], members)

        _compiled[optimizer] = tf.function(apply_scaled)
    return _compiled[optimizer]


def forget(optimizer: Any) -> None:
    """Drop what was compiled for an optimizer: the set of trainable variables may have changed since."""
    _compiled.pop(optimizer, None)


def apply(model: Any, optimizer: Any, released: Grads, scale: float, learning_rate: float | None) -> None:
    """One optimizer step on the released sum.

    Args:
        model: the model.
        optimizer: any Keras optimizer; built here if need be.
        released: the output of ``privatize``.
        scale: ``1 / (q N)``, a constant.
        learning_rate: of this step; None leaves the optimizer's own, or its schedule, as it is.
    Raises:
        ConfigError: the optimizer has a schedule of its own, or scales losses.
    """
    parameters = trainable(model)
    try:
        if learning_rate is not None:
            optimizer.learning_rate = learning_rate
    except TypeError as error:
        raise ConfigError("The optimizer has a learning-rate schedule of its own; give it a number, the schedule is dptrain's.") from error
    compiled_apply(optimizer, list(parameters.values()))(
        [tf.cast(released.sums[name], v.dtype) for name, v in parameters.items()], tf.constant(scale, tf.float64)
    )


def project(model: Any, plan: Plan) -> dict[str, float]:
    """Restore the constraints that a proven bound rests on; clipping plans have none.

    Args:
        model: the model; its constrained weights are replaced.
        plan: the plan, with its graph.
    Returns:
        Certificates of the new weights.
    """
    return constrain(model, plan.graph) if plan.project and plan.graph is not None else {}


def constrain(model: Any, graph: Graph, first: bool = False) -> dict[str, float]:
    """Restore the constraints that a proven bound rests on.

    Args:
        model: the model; its constrained weights are replaced.
        graph: its operations.
        first: take more iterations, for weights that no projection has seen yet.
    Returns:
        Certificates of the new weights.
    Source: ``dptrain/projection.py``, which does it for both frameworks.
    """
    done = projection.project(graph, weights(model, graph), first)
    assign(model, done.weights)
    return done.certificates
