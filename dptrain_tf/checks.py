"""Proof on a few examples that a model's bounded sums are what they claim, or sentences that say why they are not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from dptrain.errors import ConfigError, UnsupportedModelError
from dptrain.mechanism import FLOAT_MARGIN
from dptrain.plan import Plan
from dptrain.strategies import get_strategy
from dptrain.validation import ValidatedLayer, Validation
from dptrain_tf import update
from dptrain_tf.describe import describe, take, tensors
from dptrain_tf.gradients import (
    Batch,
    Grads,
    Loss,
    batch_size,
    call_model,
    example_losses,
    gradients_of,
    plain_sum,
    trainable,
    two_pass_problems,
)
from dptrain_tf.hooks import Tap, Unit, find_units
from dptrain_tf.rules import children, is_float
from dptrain_tf.sums import attained, checked_sum, finite, full_batch, safely


def self_check(model: Any, loss: Loss, x: Any, y: Any, plan: Plan, training: bool = True, two_pass: bool = False) -> None:
    """Refuse a model whose clipped sum would not be what it claims. Costs a few passes over at most three examples.

    Checks: no other state moves; and, with dropout off: each example's loss is the same in any company; the gradient of each example's
    own loss is what ordinary differentiation gives, in norm and in the sum, so that every use of every parameter is seen and the rows of
    a layer are given to the right examples; at a tiny C one example stays within its bound. That examples can be told apart at every
    layer was found when the plan was made.

    Args:
        model: the model; left as it was.
        loss: per-example loss.
        x, y: a batch, of which up to three examples are used.
        plan: the plan that training will use.
        training: whether the model will be run in training mode; every other check runs with dropout off.
        two_pass: whether the sum will be taken in a second backward pass.
    Raises:
        UnsupportedModelError: lists every problem.
    """
    with kept_state(model):
        problems = probe_problems(model, loss, x, y, plan, training)
        if two_pass and plan.needs_norms and not problems:
            problems = two_pass_problems(model, find_units(model, training))
    if problems:
        raise UnsupportedModelError(list(dict.fromkeys(problems)))


def validate(model: Any, batch: Any, loss: Loss | None = None, targets: Any = None, training: bool = True) -> Validation:
    """Prove on a few examples that a model can be trained with differential privacy, or say everything that is in the way.

    Every trainable variable belongs to a layer that is tapped; examples do not depend on each other; the gradients of two examples' own
    losses are what ordinary differentiation gives; no state moves; a tiny clipping norm holds.

    Args:
        model: any Keras model; built by a call if it is not built yet, otherwise left as it was.
        batch: a batch of inputs, of which up to three examples are used.
        loss: ``loss(y, output) -> [B]``; None stands for the inner product of each float output with a fixed random direction.
        targets: targets of the batch, with a loss.
        training: whether the model will be run in training mode.
    Returns:
        How each layer is handled.
    Raises:
        UnsupportedModelError: lists every problem.
    """
    if loss is not None and targets is None:
        raise ConfigError("validate needs targets beside a loss; give both or neither.")
    x = tensors(batch)
    y = tensors(targets) if loss is not None else tf.zeros([batch_size(x)])
    problems: list[str] = []
    units: list[Unit] = []
    with kept_state(model) if model.built else nullcontext():
        try:
            plan = get_strategy("mixed_ghost", max_grad_norm=1.0).plan(describe(model, x))
            units = find_units(model, training)
        except UnsupportedModelError as error:
            plan, problems = None, list(error.problems)
        if model.built:
            problems += probe_problems(model, loss or surrogate, x, y, plan, training)
    covered = {id(v) for unit in units for v in unit.variables.values()}
    if not problems:
        problems = [f"variable {v.path!r} belongs to no layer." for v in model.trainable_variables if id(v) not in covered]
    if problems:
        raise UnsupportedModelError(list(dict.fromkeys(problems)))
    rows = [ValidatedLayer(u.name, type(u.layer).__name__, method_of(u), tuple(u.identifiers.values())) for u in units]
    return Validation(tuple(rows), sum(math.prod(v.shape) for v in trainable(model).values()))


def method_of(unit: Unit) -> str:
    """How a unit's per-sample gradients are found."""
    return "rule" if unit.rule or unit.recurrent else "bare" if unit.bare else "slow"


def surrogate(y: Any, output: Any) -> Tensor:
    """A loss for models without one: the inner product of each float output with a fixed random direction."""
    batch, total = y.shape[0], None
    for i, z in enumerate(tf.nest.flatten(output)):
        if is_float(z) and z.shape.rank and z.shape[0] == batch:
            direction = tf.cast(np.random.default_rng(i).standard_normal(z.shape[1:]), z.dtype)
            part = tf.reduce_sum(tf.reshape(z * direction, [batch, -1]), axis=1)
            part = tf.cast(part, tf.float64 if part.dtype == tf.float64 else tf.float32)
            total = part if total is None else total + tf.cast(part, total.dtype)
    if total is None:
        raise UnsupportedModelError(["no output of the model is a float tensor with one row per example; give validate a loss."])
    return total


@contextmanager
def kept_state(model: Any) -> Iterator[None]:
    """Put back every variable that is not trained, those of random generators included."""
    state = [(v, tf.identity(v.value)) for v in model.non_trainable_variables]
    try:
        yield
    finally:
        for variable, before in state:
            variable.assign(before)


def probe_problems(model: Any, loss: Loss, x: Any, y: Any, plan: Plan | None, training: bool) -> list[str]:
    """Everything that is wrong with a model; without a plan, what can be found without one."""
    count = batch_size(tensors(x))
    batches = [(finite(take(x, np.arange(n) % count)), finite(take(y, np.arange(n) % count))) for n in (2, 3)]
    problems = state_problems(model, batches[1][0], training)
    problems += independence_problems(model, loss, *batches[1])
    if plan is None:
        return problems
    if not plan.needs_norms and plan.loss_clip is None:
        return problems + completeness_problems(model, loss, *batches[1], plan)
    if plan.loss_clip is not None:
        checked_sum(model, loss, full_batch(*batches[1]), plan, training=training)
        return problems + completeness_problems(model, loss, *batches[1], plan) + proof_problems(model, loss, batches[1], plan)
    return problems + exactness_problems(model, loss, distinct(batches[0][0]), batches[0][1], plan)


def state_problems(model: Any, x: Any, training: bool) -> list[str]:
    """State other than that of random generators which a forward pass moves (pitfalls.md G24), and layers that it cannot tap."""
    random = {id(generator.state) for layer in children(model) for generator in layer._seed_generators}
    before = [(v, tf.identity(v.value)) for v in model.non_trainable_variables if id(v) not in random]
    problems: list[str] = []
    try:
        with Tap(find_units(model, training), batch_size(x), training):
            call_model(model, x, training)
    except UnsupportedModelError as error:
        problems += error.problems
        call_model(model, x, training)
    moved = [v.path for v, value in before if not bool(tf.reduce_all(v.value == value))]
    return problems + [f"state {name!r} is updated from data without noise; remove the layer that does it." for name in moved]


def distinct(x: Any) -> Any:
    """Two examples that differ, so that what belongs to one cannot pass for the other's."""
    rng = np.random.default_rng(0)

    def apart(t: Tensor) -> Tensor:
        if not t.dtype.is_floating or bool(tf.reduce_any(t[0] != t[1])):
            return t
        return t + tf.cast(rng.uniform(0, 0.5, t.shape), t.dtype)  # below 1: what a layer may round to integers stays what it is

    return tf.nest.map_structure(apart, x)


def independence_problems(model: Any, loss: Loss, x: Any, y: Any) -> list[str]:
    """Each example's loss among copies of itself against its loss in company (pitfalls.md G8)."""

    def losses(x: Any, y: Any) -> Tensor:
        return example_losses(loss, call_model(model, x, False), y, 3)

    if any(getattr(layer, "groups", 1) > 1 and hasattr(layer, "kernel_size") for layer in children(model)):
        losses = tf.function(losses, autograph=False)  # Keras compiles grouped convolutions anew at each eager call
    together = losses(x, y)
    alone = [losses(take(x, [i] * 3), take(y, [i] * 3))[0] for i in range(3)]
    gap = tf.reduce_max(tf.abs(tf.stack(alone) - together))
    if not bool(gap <= tolerance(together) * (1 + tf.reduce_max(tf.abs(together)))):
        return [f"the loss of one example depends on its batch (by {float(gap):.3g}); find the layer or loss that mixes examples."]
    return []


TINY = 1e-3  # a clipping norm below that of any gradient that matters
SCALES = (1.0, -0.6)  # of the two losses of the probe: even equal examples then have different gradients


def exactness_problems(model: Any, loss: Loss, x: Any, y: Any, plan: Plan) -> list[str]:
    """The gradients of two examples' own losses against ordinary differentiation: sums, norms, separation, bound.

    Without clipping the sum over one example must be its own plain gradient: every use of every parameter is seen (G1, G4, G5, G23), and
    the rows of each layer are given to the right example (G9). No norm may be below the true one. At a tiny C the other stays within it.
    """

    def scaled(target: Any, output: Any) -> Tensor:
        losses = loss(target, output)
        return losses * tf.cast(SCALES, losses.dtype) if tf.is_tensor(losses) and losses.shape == (2,) else losses

    free, tiny = plan.with_clip_norm(float("inf")), plan.with_clip_norm(TINY)
    plain = example_gradients(model, scaled, full_batch(x, y))
    first, second = dict[str, Tensor](), dict[str, Tensor]()
    one = checked_sum(model, scaled, Batch(x, y, tf.constant([True, False])), free, norms_out=first, keep_sums=True)
    other = checked_sum(model, scaled, Batch(x, y, tf.constant([False, True])), tiny, norms_out=second, keep_sums=True)
    group_of = update.group_of_parameter(plan)
    group = {name: group_of[identifier] for name, identifier in one.identifiers.items()}
    half = in_half_precision(model)
    wrong = differing(one.sums, {name: g[0] for name, g in plain.items()}, half)
    problems: list[str] = []
    if wrong:
        both = checked_sum(model, scaled, full_batch(x, y), free).sums
        problems = wrong_gradients(wrong, differing(both, {name: g[0] + g[1] for name, g in plain.items()}, half))
    else:
        for i, norms in enumerate((first, second)):
            found = [n for n in norms if too_small(norms[n][i], [g[i] for k, g in plain.items() if group[k] == n], half)]
            problems += [f"one example's norm in group {name!r} is below the true one; please report this model." for name in found]
    total = float(tf.linalg.global_norm([tf.cast(value, tf.float64) for value in other.sums.values()]))
    bound = TINY * len(plan.groups) ** 0.5
    if not total <= bound * (1 + 1e-3):
        problems.append(f"one example contributes {total:.3g} for a bound of {bound:.3g}; please report this model.")
    return problems


def wrong_gradients(names: list[str], incomplete: list[str]) -> list[str]:
    """Sentences for parameters whose gradient is wrong for one example, some of them in the sum over all examples too."""
    problems = [
        f"parameter {name!r} is used in a way that no layer call shows (a functional use, a reused weight), so its gradient would be "
        "wrong; call the layer itself (keras.layers.ReversibleEmbedding for a tied output), or wrap the use in a layer of its own."
        for name in incomplete
    ]
    mixed = [name for name in names if name not in incomplete]
    if mixed:
        more = f" and {len(mixed) - 3} more" if len(mixed) > 3 else ""
        problems.append(
            f"the gradient of one example is mixed with another's at {', '.join(map(repr, mixed[:3]))}{more}: a layer there is called "
            "with examples that are not the outermost part of its first axis; move the batch axis to the front before the call."
        )
    return problems


def example_gradients(model: Any, loss: Loss, batch: Batch) -> dict[str, list[Tensor]]:
    """Variable path -> the plain gradient of each of two examples' own losses."""

    def both(batch: Batch) -> Grads:
        parameters = trainable(model)
        variables = list(parameters.values())
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch([v.value for v in variables])
            losses = example_losses(loss, call_model(model, batch.x, False), batch.y, 2)
        found = [gradients_of(tape, losses, variables, tf.one_hot(i, 2, dtype=losses.dtype)) for i in range(2)]
        return Grads({f"{i}{name}": g for i in range(2) for name, g in zip(parameters, found[i], strict=True)}, {}, {})

    sums = safely(model, batch, both, jit=True).sums
    return {name: [sums[f"{i}{name}"] for i in range(2)] for name in trainable(model)}


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], half: bool = False) -> list[str]:
    """Names under which two sets of tensors differ by more than rounding, that of half precision if layers compute in it."""
    scale = max((float(tf.norm(value)) for value in theirs.values()), default=0.0)
    return [
        name
        for name, value in theirs.items()
        if not float(tf.norm(tf.cast(ours[name], value.dtype) - value))
        <= slack(value, half) * max(float(tf.norm(value)), 1e-2 * scale) + 1e-30
    ]


def too_small(norm: Tensor, gradients: list[Tensor], half: bool = False) -> bool:
    """Whether a norm is below that of the gradients; rounding may only put it above."""
    true = float(tf.linalg.global_norm([tf.cast(g, tf.float64) for g in gradients]))
    return not float(norm) >= true * (1 - max(slack(g, half) for g in gradients)) - 1e-30


def slack(value: Tensor, half: bool) -> float:
    """Relative difference to allow between a gradient and one computed another way."""
    return 0.1 if half else 10 * tolerance(value)


def in_half_precision(model: Any) -> bool:
    """Whether some layer computes in half precision, while its weights may be kept in float32."""
    return any(layer.compute_dtype in ("float16", "bfloat16") for layer in children(model))


def completeness_problems(model: Any, loss: Loss, x: Any, y: Any, plan: Plan) -> list[str]:
    """The sum of a proven plan is the plain gradient where nothing is clipped."""
    batch = full_batch(x, y)
    unclipped = replace(plan.with_clip_norm(float("inf")), loss_clip=None if plan.loss_clip is None else 1e30)
    ours = checked_sum(model, loss, batch, unclipped).sums
    plain = safely(model, batch, lambda b: plain_sum(model, loss, b, training=False), jit=True).sums
    return [
        f"parameter {name!r}: its gradient is not the plain one; please report this model."
        for name in differing(ours, plain, in_half_precision(model))
    ]


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
