"""The weighted sum of per-sample gradients of a batch, as a plan describes it: one forward and one backward pass.

Book-keeping (Bu et al. 2022, arXiv:2210.00038): what is released is rebuilt from the very activations and cotangents that were
measured. A use of a weight that the tap does not see can bias the sum, but it cannot break the bound. ``two_pass`` takes the sum
from a second backward pass over the reweighted loss instead; there an unseen use WOULD break the bound, so it is allowed only for a
model that has passed ``engine.self_check``, and only where norms come from the very pass that is summed (``two_pass_problems``).

Everything here runs eagerly and inside ``tf.function``; there the physical batch must have a fixed size. Trace with ``autograph=False``:
AutoGraph would hide what an error says behind an error of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import tensorflow as tf
from tensorflow import Tensor

from dptrain import validation
from dptrain.clipping import clip_weight
from dptrain.errors import ConfigError, UnsupportedModelError
from dptrain.plan import Plan
from dptrain.profiling import phase
from dptrain_tf.hooks import Call, Tap, Unit, find_units, layouts_of, trainable
from dptrain_tf.lipschitz import LossGradientClip
from dptrain_tf.recurrent import recurrent_uses
from dptrain_tf.rules import aligned, children, generic_uses
from dptrain_tf.uses import ConvUse, DirectUse, Use, ghost_norm, instantiated_norm, per_example, square_sum

Loss = Callable[[Any, Any], Tensor]


@dataclass
class Batch:
    """A physical batch of fixed shape.

    Args:
        x: inputs ``[B, ...]``; a list, tuple or mapping of tensors is passed to the model as it is, as Keras does.
        y: targets ``[B, ...]``, passed to the loss as they are.
        mask: bool ``[B]``; False marks padding, which has weight 0.
        factor: what the plan's clipping norms are multiplied by, a scalar tensor where they move; None stands for 1.
        careful: True selects the finite examples before anything is summed; False takes all to be finite, and ``Grads.usable`` says whether
            they were; None does what the numbers ask for, at the price of both ways in a traced graph.
    """

    x: Any
    y: Any
    mask: Tensor
    factor: Tensor | None = None
    careful: bool | None = None


@dataclass
class Grads:
    """A gradient sum on its way to release; opaque to the core.

    Args:
        sums: variable path -> sum over examples, in the order of ``trainable_variables``.
        stats: sums that are NOT private: ``loss``, ``count``, ``clipped``, ``nonfinite``; for progress displays only.
        identifiers: variable path -> identifier in the plan.
        counts: group name -> sum of +1/2 and -1/2 over examples, where the plan releases a count; noise is added to it as to the sums.
        usable: whether the sums are what they claim, a scalar; None stands for True. Only a batch that is not ``careful`` can be unusable.
        kinds: variable path -> dtype before the sum was widened to float64; empty where nothing was.
    """

    sums: dict[str, Tensor]
    stats: dict[str, Tensor]
    identifiers: dict[str, str]
    counts: dict[str, Tensor] = field(default_factory=dict)
    usable: Tensor | None = None
    kinds: dict[str, Any] = field(default_factory=dict)


def call_model(model: Any, x: Any, training: bool) -> Any:
    """Call a model on a tensor, or on a list, tuple or mapping of tensors, which Keras takes as one argument."""
    return model(x, training=training)


def batch_size(x: Any) -> int:
    """B, from the first tensor of a batch."""
    size = tf.nest.flatten(x)[0].shape[0]
    if size is None:
        raise ConfigError("The batch size is unknown inside tf.function; give every physical batch the same fixed size.")
    return int(size)


def example_losses(loss: Loss, output: Any, y: Any, batch: int) -> Tensor:
    """Per-example losses ``[B]``, or a refusal.

    Raises:
        UnsupportedModelError: the loss is not one value per example.
    """
    losses = loss(y, output)
    if not tf.is_tensor(losses) or losses.shape != (batch,):
        shape = tuple(losses.shape) if tf.is_tensor(losses) else type(losses).__name__
        raise UnsupportedModelError(
            [
                f"the loss returned {shape} for a batch of {batch}: it must give one value per example; use reduction='none', and reduce "
                "each example's own values to one."
            ]
        )
    return losses


class Accumulator:
    """Turns calls into squared norms per group while cotangents arrive, and into weighted sums after it.

    Args:
        plan: the plan; norm methods are read from it.
        expected: parameter name -> number of uses in the forward pass.
        owners: parameter name -> layers that use it.
        keep: whether uses are kept for the weighted sum (book-keeping).
        lean: whether they are kept as they came, although their per-sample gradients have been at hand, where that is smaller.
    """

    def __init__(self, plan: Plan, expected: Mapping[str, int], owners: Mapping[str, list[str]], keep: bool, lean: bool = False) -> None:
        self.plan, self.expected, self.owners, self.keep, self.lean = plan, expected, owners, keep, lean
        self.group_of = {layer: group.name for group in plan.groups for layer in group.layers}
        self.waiting: dict[str, list[Use]] = {}
        self.ready: dict[str, list[Use]] = {}
        self.squares: dict[str, list[Tensor]] = {}

    def __call__(self, call: Call) -> list[Tensor]:
        """Take in one call; a parameter is finished when its last use has arrived. Returns the norms that this finished."""
        done = []
        # What is made of the inputs alone would otherwise be made, in a graph, as soon as they are there, and wait for the cotangent.
        arrived = [g for g in call.cotangents if g is not None]
        with phase("norms"), tf.control_dependencies(arrived):
            for name, use in call_uses(call).items():
                uses = self.waiting.setdefault(name, [])
                uses.append(use)
                if len(uses) == self.expected[name]:
                    self.finish(name)
                    done.append(self.squares[self.group_of[self.owners[name][0]]][-1])
        return done

    def finish(self, name: str) -> None:
        """Norm of one parameter's per-sample gradient, from all its uses."""
        uses = self.waiting.pop(name)
        wants_ghost = all(self.plan.norms.get(layer) == "ghost" for layer in self.owners[name])
        direct = all(isinstance(use, DirectUse) for use in uses)
        square = ghost_norm(uses) if wants_ghost and not direct else None
        single = len(uses) == 1 and not direct
        passing = not self.keep or (self.lean and not (single and uses[0].shrinks))
        if square is None and single and passing:
            square = instantiated_norm(uses[0])
        elif square is None and single:
            square, uses[0] = uses[0].in_parts()
        elif square is None:
            gradient = uses[0].instantiate()
            for use in uses[1:]:
                gradient = gradient + use.instantiate()
            square, uses = square_sum(gradient), [DirectUse(gradient)] if direct or not passing else uses
        self.squares.setdefault(self.group_of[self.owners[name][0]], []).append(square)
        if self.keep:
            self.ready[name] = uses

    def finish_all(self) -> None:
        """Finish parameters some of whose uses never got a cotangent: those uses contribute zero."""
        for name in list(self.waiting):
            self.finish(name)

    def norms(self) -> dict[str, Tensor]:
        """Group -> norm ``[B]`` of each example's gradient."""
        found = {}
        for name, squares in self.squares.items():
            dtype = tf.float64 if any(square.dtype == tf.float64 for square in squares) else tf.float32
            found[name] = tf.sqrt(tf.add_n([tf.cast(square, dtype) for square in squares]))
        return found


def call_uses(call: Call) -> dict[str, Use]:
    """Parameter name -> use, for the trainable parameters of one call."""
    unit = call.unit
    by_role: Any = None
    if unit.recurrent and (found := recurrent_uses(call)) is not None:
        by_role, call.below = found
    if by_role is None and unit.rule is None:
        by_role = generic_uses(call)
    else:
        if by_role is None:
            assert unit.rule is not None
            by_role = unit.rule.uses(unit.layer, *aligned(call.input, call.cotangents[0]))
        if call.folded > 1:
            by_role = {role: use.fold(call.batch) for role, use in by_role.items()}
        for role, use in by_role.items():
            if isinstance(use, ConvUse) and role in unit.params:
                use.native = call.native(role)
    return {name: by_role[role] for role, name in unit.params.items()}


def limit_of(clip_norm: float | None, factor: Tensor | None, dtype: Any) -> Any:
    """A clipping norm as it stands at this step."""
    return clip_norm if factor is None or clip_norm is None else tf.cast(clip_norm * factor, dtype)


def count_below(plan: Plan, below: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The count that moves a clipping norm: +1/2 for each example below it, -1/2 for the others, 0 for padding.

    Guarantee: one example changes it by at most 1/2, its replacement by at most 1.
    Source: Andrew et al. 2021 (arXiv:1905.03871), section 2.1.
    """
    if plan.count is None:
        return {}
    half = tf.where(below, tf.constant(0.5, tf.float64), tf.constant(-0.5, tf.float64))
    return {plan.count.name: tf.reduce_sum(half * tf.cast(mask, tf.float64))}


def weights_of(plan: Plan, norms: Mapping[str, Tensor], valid: Tensor, factor: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Group -> weight ``[B]`` of each example, and which examples are finite in every group.

    Guarantee: padding and examples with a norm that is not finite have weight 0 in every group.
    """
    finite = tf.ones_like(valid)
    for norm in norms.values():
        finite = finite & tf.math.is_finite(norm)
    weights = {}
    for group in plan.groups:
        if group.name in norms:
            norm = norms[group.name]
            w = clip_weight(plan.clipping or "abadi", norm, limit_of(group.clip_norm, factor, norm.dtype), plan.gamma, tf.maximum)
            weights[group.name] = tf.where(valid & finite, w, tf.zeros_like(w))
    return weights, finite


def owners_of(units: list[Unit]) -> dict[str, list[str]]:
    """Parameter name -> names of the layers that use it."""
    owners: dict[str, list[str]] = {}
    for unit in units:
        for name in unit.params.values():
            owners.setdefault(name, []).append(unit.name)
    return owners


def identifiers(units: list[Unit]) -> dict[str, str]:
    """Variable path -> identifier in the plan."""
    return {unit.params[role]: identifier for unit in units for role, identifier in unit.identifiers.items()}


@tf.autograph.experimental.do_not_convert  # plain Python, run once while a tf.function is traced
def bounded_sum(
    model: Any,
    loss: Loss,
    batch: Batch,
    plan: Plan,
    *,
    two_pass: bool = False,
    lean: bool = False,
    norms_out: dict[str, Tensor] | None = None,
    training: bool = True,
) -> Grads:
    """``sum_i w_ik g_ik`` for every group k of a plan.

    Args:
        model: the user's model, built; left as it was.
        loss: ``loss(y, output) -> [B]``.
        batch: a physical batch.
        plan: groups, clipping norms and norm methods.
        two_pass: take the sum from a second backward pass.
        lean: keep a per-sample gradient only where it is smaller than what it is made of.
        norms_out: filled with group -> norms ``[B]``, for diagnostics.
        training: the mode in which the model is called.
    Returns:
        The sums.
    Raises:
        UnsupportedModelError: the model or the loss cannot be bounded.
    Guarantee: with a clipping plan, changing one example changes the sum of group k by a vector of norm at most its
        ``norm_bound`` (twice for a replacement), up to ``mechanism.FLOAT_MARGIN``.
    Source: math.md sections 1 to 3.
    """
    if plan.loss_clip is not None:
        return proven_sum(model, loss, batch, plan, training=training)
    if not plan.needs_norms:
        return plain_sum(model, loss, batch, training=training)
    units, size = find_units(model, training), batch_size(batch.x)
    if two_pass:
        if problems := two_pass_problems(model, units):
            raise UnsupportedModelError(problems)
        two_pass = not batch.careful  # a non-finite example would poison the native sum
    known = {layer.name for layer in plan.layers}
    if known != {unit.name for unit in units}:
        raise ConfigError("The model's trainable layers are not those of the plan; make a new plan after freezing or unfreezing.")
    parameters = trainable(model)
    with phase("forward"), Tap(units, size, training, list(parameters.values()) if two_pass else None, layouts_of(plan.layers)) as tap:
        losses = example_losses(loss, call_model(model, batch.x, training), batch.y, size)
    expected: dict[str, int] = {}
    for call in tap.calls:
        for name in call.unit.params.values():
            expected[name] = expected.get(name, 0) + 1
    owners = owners_of(units)
    valid = batch.mask & tf.math.is_finite(losses)
    accumulator = Accumulator(plan, expected, owners, keep=not two_pass, lean=lean)
    with phase("cotangents"):
        tap.backward(losses, tf.cast(valid, losses.dtype), accumulator)
        accumulator.finish_all()
    norms = accumulator.norms()
    if norms_out is not None:
        norms_out.update(norms)
    weights, finite = weights_of(plan, norms, valid, batch.factor)
    stats = statistics(plan, losses, batch.mask, valid & finite, norms, batch.factor)
    counts = count_below(plan, joint_below(plan, norms, batch.factor) & valid & finite, batch.mask) if plan.count else {}
    group_of = {name: accumulator.group_of[layers[0]] for name, layers in owners.items()}

    def contract(clean: bool) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            value: Any = None
            with tf.control_dependencies(list(sums.values())[-1:]):  # one parameter after the other, for their temporaries
                for use in accumulator.ready.get(name, ()):
                    w = weights[group_of[name]]
                    part = tf.cast((use if clean else use.keep(w > 0)).weighted_sum(w), parameter.dtype)
                    value = part if value is None else value + part
                sums[name] = tf.zeros(parameter.shape, parameter.dtype) if value is None else value
        return sums

    with phase("sums"):
        if two_pass:
            usable = tf.reduce_all((finite & valid) | ~batch.mask)
            ways = (
                lambda: second_pass(parameters, tap.second, losses, weights, group_of),
                lambda: bounded_sum(model, loss, replace(batch, careful=True), plan, training=training).sums,
            )
        else:
            usable = tf.reduce_all(finite) & tf.reduce_all(tf.math.is_finite(losses))
            ways = (lambda: contract(clean=True), lambda: contract(clean=False))
        sums = tf.cond(usable, *ways) if batch.careful is None else ways[batch.careful]()
    return Grads(sums, stats, identifiers(units), counts, usable if batch.careful is False else None)


def joint_below(plan: Plan, norms: Mapping[str, Tensor], factor: Tensor | None) -> Tensor:
    """Whether each example's gradient over all groups is within the joint clipping norm, ``[B]``."""
    joint = tf.sqrt(tf.add_n([tf.square(tf.cast(norm, tf.float64)) for norm in norms.values()]))
    clip = sum((group.clip_norm or 0.0) ** 2 for group in plan.gradient_groups) ** 0.5
    return joint <= limit_of(clip, None if factor is None else tf.cast(factor, tf.float64), tf.float64)


@tf.autograph.experimental.do_not_convert  # plain Python, run once while a tf.function is traced
def proven_sum(model: Any, loss: Loss, batch: Batch, plan: Plan, *, training: bool = True) -> Grads:
    """The sum of plain gradients, each example's loss gradient in the output scaled down to the plan's ``loss_clip``.

    Guarantee: with a plan of ``clipless``, one example contributes to group k at most its ``norm_bound``: what enters the backward pass is
        within ``loss_clip`` whatever the loss does, and is zero for padding and for examples that are not finite (pitfalls.md L15).
    Source: math.md section 5.
    """
    parameters, size = trainable(model), batch_size(batch.x)
    variables = list(parameters.values())
    with phase("forward"), tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([v.value for v in variables])
        output = call_model(model, batch.x, training)
    check_output(output, size)
    with tf.GradientTape(watch_accessed_variables=False) as head:
        head.watch(output)
        losses = example_losses(loss, output, batch.y, size)
    cotangent = tf.convert_to_tensor(head.gradient(losses, output, unconnected_gradients=tf.UnconnectedGradients.ZERO))
    rows = tf.reshape(cotangent, [size, -1])
    used = batch.mask & tf.math.is_finite(losses) & tf.reduce_all(tf.math.is_finite(rows), axis=1)
    rows = per_example(used, rows)
    limit = limit_of(plan.loss_clip, batch.factor, rows.dtype)
    norm = tf.norm(rows, axis=1)
    rows = rows * (limit / tf.maximum(norm, limit))[:, None]
    counts = count_below(plan, used & (norm <= limit), batch.mask)
    with phase("gradients"):
        gradients = gradients_of(tape, output, variables, tf.reshape(rows, cotangent.shape))
    found = {
        "loss": per_example(used, losses),
        "count": batch.mask,
        "clipped": used & (norm > limit),
        "nonfinite": batch.mask & ~used,
    }
    stats = {name: tf.reduce_sum(tf.cast(value, tf.float32)) for name, value in found.items()}
    return Grads(dict(zip(parameters, gradients, strict=True)), stats, identifiers(find_units(model)), counts)


def check_output(output: Any, batch: int) -> None:
    """Refuse an output that is not one array with the examples first."""
    if not tf.is_tensor(output) or output.shape.rank == 0 or output.shape[0] != batch:
        shape = tuple(output.shape) if tf.is_tensor(output) else type(output).__name__
        raise UnsupportedModelError([f"the model returned {shape} for a batch of {batch}; strategy clipless needs one tensor [B, ...]."])


def two_pass_problems(model: Any, units: Iterable[Unit]) -> list[str]:
    """``validation.two_pass_problems`` of a model."""
    clips = (part.name for part in children(model) if isinstance(part, LossGradientClip))
    return validation.two_pass_problems(clips, ((unit.name, type(unit.layer).__name__) for unit in units if unit.rule is None))


def second_pass(
    parameters: Mapping[str, Any], tape: Any, losses: Tensor, weights: Mapping[str, Tensor], group_of: Mapping[str, str]
) -> dict[str, Tensor]:
    """The same sums from a backward pass over the reweighted losses, one pass per group."""
    sums: dict[str, Tensor] = {}
    for group, w in weights.items():
        names = [name for name in parameters if group_of[name] == group]
        sums |= zip(names, gradients_of(tape, losses, [parameters[n] for n in names], tf.cast(w, losses.dtype)), strict=True)
    return {n: sums[n] if n in sums else tf.zeros(p.shape, p.dtype) for n, p in parameters.items()}


def gradients_of(tape: Any, losses: Tensor, variables: list[Any], w: Tensor) -> list[Tensor]:
    """Dense gradients of the weighted loss; zeros where a variable is not used."""
    zero = tf.UnconnectedGradients.ZERO
    return [tf.convert_to_tensor(g) for g in tape.gradient(losses, [v.value for v in variables], w, unconnected_gradients=zero)]


@tf.autograph.experimental.do_not_convert  # plain Python, run once while a tf.function is traced
def plain_sum(model: Any, loss: Loss, batch: Batch, *, training: bool = True) -> Grads:
    """The unclipped sum by ordinary backpropagation: what ``non_private`` and proven bounds need."""
    parameters, size = trainable(model), batch_size(batch.x)
    variables = list(parameters.values())
    with phase("forward"), tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([v.value for v in variables])
        losses = example_losses(loss, call_model(model, batch.x, training), batch.y, size)
    with phase("gradients"):
        gradients = gradients_of(tape, losses, variables, tf.cast(batch.mask, losses.dtype))
    zero = tf.zeros([])
    total = tf.cast(tf.reduce_sum(per_example(batch.mask, losses)), tf.float32)
    stats = {"loss": total, "count": tf.reduce_sum(tf.cast(batch.mask, tf.float32)), "clipped": zero, "nonfinite": zero}
    return Grads(dict(zip(parameters, gradients, strict=True)), stats, identifiers(find_units(model)))


def statistics(
    plan: Plan, losses: Tensor, mask: Tensor, used: Tensor, norms: Mapping[str, Tensor], factor: Tensor | None = None
) -> dict[str, Tensor]:
    """Sums over the batch for progress displays, in float32. NOT private (pitfalls.md G18)."""
    clipped = tf.zeros_like(used)
    for group in plan.groups:
        if group.name in norms and group.clip_norm is not None:
            clipped = clipped | (norms[group.name] > limit_of(group.clip_norm, factor, norms[group.name].dtype))
    loss = tf.reduce_sum(per_example(used, losses))
    found = {"loss": loss, "count": mask, "clipped": clipped & used, "nonfinite": mask & ~used}
    return {name: tf.reduce_sum(tf.cast(value, tf.float32)) for name, value in found.items()}
