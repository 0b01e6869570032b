"""The weighted sum of per-sample gradients of a batch, as a plan describes it: one forward and one backward pass.

Book-keeping (Bu et al. 2022, arXiv:2210.00038): what is released is rebuilt from the very activations and cotangents that were
measured. A use of a weight that the tap does not see can bias the sum, but it cannot break the bound. ``two_pass`` takes the sum
from a second backward pass over the reweighted loss instead; there an unseen use WOULD break the bound, so it is allowed only for a
model that has passed ``engine.self_check``, and only where norms come from the very pass that is summed (``two_pass_problems``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dptrain import validation
from dptrain.clipping import clip_weight
from dptrain.errors import ConfigError, UnsupportedModelError
from dptrain.plan import Plan
from dptrain.profiling import phase
from dptrain_torch.bare import BareCall
from dptrain_torch.hooks import Call, Tap, Unit, find_units
from dptrain_torch.lipschitz import LossGradientClip
from dptrain_torch.uses import (
    DirectUse,
    Grams,
    LinearUse,
    Use,
    ghost_norm,
    instantiated,
    instantiated_norm,
    joined,
    per_example,
    square_sum,
)

Loss = Callable[[Tensor, Any], Tensor]


@dataclass
class Batch:
    """A physical batch of fixed shape.

    Args:
        x: inputs ``[B, ...]``; a tuple or mapping of tensors is passed to the model as arguments.
        y: targets ``[B, ...]``, passed to the loss as they are.
        mask: bool ``[B]``; False marks padding, which has weight 0.
        factor: what the plan's clipping norms are multiplied by, a scalar tensor where they move; None stands for 1.
    """

    x: Any
    y: Any
    mask: Tensor
    factor: Tensor | None = None


@dataclass
class Grads:
    """A gradient sum on its way to release; opaque to the core.

    Args:
        sums: parameter name -> sum over examples, in the order of ``named_parameters``.
        stats: sums that are NOT private: ``loss``, ``count``, ``clipped``, ``nonfinite``; for progress displays only.
        counts: group name -> sum of +1/2 and -1/2 over examples, where the plan releases a count; noise is added to it as to the sums.
        kinds: parameter name -> dtype before the sum was widened to float64; empty where nothing was.
    """

    sums: dict[str, Tensor]
    stats: dict[str, Tensor]
    counts: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, torch.dtype] = field(default_factory=dict)


def zeros_like(parameter: Tensor) -> Tensor:
    """A zero sum for a parameter."""
    return torch.zeros_like(parameter, requires_grad=False)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; a tied one appears once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def call_model(model: nn.Module, x: Any) -> Any:
    """Call a model on a tensor, a tuple of arguments or a mapping of keyword arguments."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple | list) else model(x)


def batch_size(x: Any) -> int:
    """B, from the first tensor of a batch."""
    first = next(iter(x.values())) if isinstance(x, Mapping) else x[0] if isinstance(x, tuple | list) else x
    return int(first.shape[0])


def example_losses(loss: Loss, output: Any, y: Any, batch: int) -> Tensor:
    """Per-example losses ``[B]``, or a refusal.

    Raises:
        UnsupportedModelError: the loss is not one value per example, or does not depend on a trainable parameter.
    """
    losses = loss(output, y)
    if not isinstance(losses, Tensor) or losses.shape != (batch,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise UnsupportedModelError(
            [
                f"the loss returned {shape} for a batch of {batch}: it must give one value per example; use reduction='none', and reduce "
                "each example's own values to one."
            ]
        )
    if not losses.requires_grad:
        raise UnsupportedModelError(["the loss depends on no trainable parameter, so nothing would be trained; unfreeze a layer."])
    return losses


class Accumulator:
    """Turns calls into squared norms per group while the backward pass runs, and into weighted sums after it.

    Args:
        plan: the plan; norm methods are read from it.
        expected: parameter name -> number of uses in the forward pass.
        owners: parameter name -> layers that use it.
        keep: whether uses are kept for the weighted sum (book-keeping).
        lean: whether they are kept as they came, although their per-sample gradients have been at hand, where that is smaller.
    """

    def __init__(
        self, plan: Plan, expected: Mapping[str, int], owners: Mapping[str, list[str]], batch: int, keep: bool, lean: bool = False
    ) -> None:
        self.plan, self.expected, self.owners, self.batch, self.keep, self.lean = plan, expected, owners, batch, keep, lean
        self.group_of = {layer: group.name for group in plan.groups for layer in group.layers}
        self.waiting: dict[str, list[Use]] = {}
        self.ready: dict[str, list[Use]] = {}
        self.squares: dict[str, Tensor] = {}
        self.grams = Grams()

    def __call__(self, call: Call | BareCall) -> None:
        """Take in one call; a parameter is finished when its last use has arrived."""
        with phase("norms"):
            for name, use in call_uses(call).items():
                if isinstance(use, LinearUse):
                    use.grams = self.grams
                uses = self.waiting.setdefault(name, [])
                uses.append(use)
                if len(uses) == self.expected[name]:
                    self.finish(name)

    def finish(self, name: str) -> None:
        """Norm of one parameter's per-sample gradient, from all its uses."""
        uses = self.waiting.pop(name)
        wants_ghost = all(self.plan.norms.get(layer) == "ghost" for layer in self.owners[name])
        direct = all(isinstance(use, DirectUse) for use in uses)
        square = ghost_norm(uses) if wants_ghost and not direct else None
        for use in uses:
            if isinstance(use, LinearUse):
                use.pair = None  # its matrices are needed no more
        if square is None:
            parts = uses if direct else joined(uses)  # of a layer called T times one product over all its positions
            single = len(parts) == 1 and not direct
            passing = not self.keep or (self.lean and not (single and parts[0].shrinks))
            if single and passing:
                square = instantiated_norm(parts[0])
            elif single:
                square, kept = instantiated(parts[0])
                uses = [kept]
            else:
                gradient = parts[0].instantiate()
                for use in parts[1:]:
                    gradient = gradient + use.instantiate()
                square, uses = square_sum(gradient), [DirectUse(gradient)] if direct or not passing else uses
        group = self.group_of[self.owners[name][0]]
        self.squares[group] = self.squares[group] + square if group in self.squares else square
        if self.keep:
            self.ready[name] = uses

    def finish_all(self) -> None:
        """Finish parameters some of whose uses never got a cotangent: those uses contribute zero."""
        for name in list(self.waiting):
            self.finish(name)

    def norms(self) -> dict[str, Tensor]:
        """Group -> norm ``[B]`` of each example's gradient."""
        return {name: square.sqrt() for name, square in self.squares.items()}


def call_uses(call: Call | BareCall) -> dict[str, Use]:
    """Parameter name -> use, for the trainable parameters of one call."""
    return call.uses()


def limit_of(clip_norm: float | None, factor: Tensor | None) -> Any:
    """A clipping norm as it stands at this step."""
    return clip_norm if factor is None or clip_norm is None else clip_norm * factor


def count_below(plan: Plan, below: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The count that moves a clipping norm: +1/2 for each example below it, -1/2 for the others, 0 for padding.

    Guarantee: one example changes it by at most 1/2, its replacement by at most 1.
    Source: Andrew et al. 2021 (arXiv:1905.03871), section 2.1.
    """
    if plan.count is None:
        return {}
    return {plan.count.name: (torch.where(below, 0.5, -0.5) * mask).double().sum()}


def weights_of(plan: Plan, norms: Mapping[str, Tensor], valid: Tensor, factor: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Group -> weight ``[B]`` of each example, and which examples are finite in every group.

    Guarantee: padding and examples with a norm that is not finite have weight 0 in every group.
    """
    finite = torch.ones_like(valid)
    for norm in norms.values():
        finite = finite & norm.isfinite()
    weights = {}
    for group in plan.groups:
        if group.name in norms:
            norm, limit = norms[group.name], limit_of(group.clip_norm, factor)
            w = clip_weight(plan.clipping or "abadi", norm, limit, plan.gamma, lambda n, c: n.clamp(min=c))
            weights[group.name] = torch.where(valid & finite, w, torch.zeros_like(w))
    return weights, finite


def bounded_sum(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    plan: Plan,
    *,
    two_pass: bool = False,
    lean: bool = False,
    norms_out: dict[str, Tensor] | None = None,
) -> Grads:
    """``sum_i w_ik g_ik`` for every group k of a plan.

    Args:
        model: the user's model; left as it was.
        loss: ``loss(output, y) -> [B]``.
        batch: a physical batch.
        plan: groups, clipping norms and norm methods.
        two_pass: take the sum from a second backward pass.
        lean: keep a per-sample gradient only where it is smaller than what it is made of.
        norms_out: filled with group -> norms ``[B]``, for diagnostics.
    Returns:
        The sums.
    Raises:
        UnsupportedModelError: the model or the loss cannot be bounded.
    Guarantee: with a clipping plan, changing one example changes the sum of group k by a vector of norm at most its
        ``norm_bound`` (twice for a replacement), up to ``mechanism.FLOAT_MARGIN``.
    Source: math.md sections 1 to 3.
    """
    if batch_size(batch.x) == 0:
        return nothing(model, plan)
    if plan.loss_clip is not None:
        return proven_sum(model, loss, batch, plan)
    if not plan.needs_norms:
        return plain_sum(model, loss, batch)
    units, size = known_units(model, plan), batch_size(batch.x)
    if two_pass and (problems := two_pass_problems(model, units)):
        raise UnsupportedModelError(problems)
    with phase("forward"), torch.enable_grad(), Tap(units, size, first=0) as tap:
        losses = example_losses(loss, call_model(model, batch.x), batch.y, size)
    found = tapped_sum(model, tap, losses, batch.mask, plan, batch.factor, two_pass=two_pass, lean=lean, norms_out=norms_out)
    return bounded_sum(model, loss, batch, plan) if found is None else found  # a non-finite example would poison the native sum


def nothing(model: nn.Module, plan: Plan) -> Grads:
    """The sums over no example."""
    sums = {name: zeros_like(p) for name, p in trainable(model).items()}
    counts = {plan.count.name: torch.zeros((), dtype=torch.float64)} if plan.count else {}
    return Grads(sums, dict.fromkeys(("loss", "count", "clipped", "nonfinite"), torch.zeros(())), counts)


def known_units(model: nn.Module, plan: Plan) -> list[Unit]:
    """The modules to tap.

    Raises:
        ConfigError: they are not the layers of the plan.
    """
    units = find_units(model, plan.layers)
    if {layer.name for layer in plan.layers} != {unit.name for unit in units}:
        raise ConfigError("The model's trainable layers are not those of the plan; make a new plan after freezing or unfreezing.")
    return units


def tapped_sum(
    model: nn.Module,
    tap: Tap,
    losses: Tensor,
    mask: Tensor,
    plan: Plan,
    factor: Tensor | None = None,
    *,
    two_pass: bool = False,
    lean: bool = False,
    norms_out: dict[str, Tensor] | None = None,
    retain_graph: bool = False,
) -> Grads | None:
    """``sum_i w_ik g_ik`` from a forward pass that was tapped: the backward pass, the norms, the weights and the sums.

    Args:
        model: the model that was called.
        tap: what the tap has seen.
        losses: per-example losses ``[B]``.
        mask: bool ``[B]``; False marks padding.
        plan: groups, clipping norms and norm methods.
        factor: what the clipping norms are multiplied by.
        two_pass: take the sum from a second backward pass.
        lean: keep a per-sample gradient only where it is smaller than what it is made of.
        norms_out: filled with group -> norms ``[B]``, for diagnostics.
        retain_graph: keep the graph for what else is to be asked of it.
    Returns:
        The sums; None if ``two_pass`` met an example that is not finite.
    Guarantee, Source: as ``bounded_sum``.
    """
    size, units = len(losses), tap.units
    expected: dict[str, int] = {}
    for call in tap.calls:
        for name in call.names:
            expected[name] = expected.get(name, 0) + 1
    owners: dict[str, list[str]] = {}
    for unit in units:
        for name in unit.params.values():
            owners.setdefault(name, []).append(unit.name)
    valid = mask & losses.detach().isfinite()
    accumulator = Accumulator(plan, expected, owners, size, keep=not two_pass, lean=lean)
    with torch.enable_grad():
        total = torch.where(valid, losses, torch.zeros_like(losses)).sum()
    with phase("cotangents"), torch.no_grad():
        tap.backward(total, accumulator, retain_graph=two_pass or retain_graph)
        accumulator.finish_all()
        norms = accumulator.norms()
        if norms_out is not None:
            norms_out.update(norms)
        weights, finite = weights_of(plan, norms, valid, factor)
        stats = statistics(plan, losses, mask, valid & finite, norms, factor)
        counts = count_below(plan, joint_below(plan, norms, factor) & valid & finite, mask) if plan.count else {}
    group_of = {name: accumulator.group_of[layers[0]] for name, layers in owners.items()}
    if two_pass:
        clean = bool((finite & valid | ~mask).all())
        if not clean:
            return None
        with phase("sums"), tap.replay() as grad:
            return Grads(second_pass(model, losses, weights, group_of, grad), stats, counts)
    with phase("sums"), torch.no_grad():
        clean = bool(finite.all()) and bool(losses.isfinite().all())
        sums = {}
        for name, parameter in trainable(model).items():
            value: Tensor | None = None
            for use in accumulator.ready.pop(name, ()):
                w = weights[group_of[name]]
                part = (use if clean else use.keep(w > 0)).weighted_sum(w).to(parameter.dtype)
                value = part if value is None else value + part
            sums[name] = zeros_like(parameter) if value is None else value
    return Grads(sums, stats, counts)


def joint_below(plan: Plan, norms: Mapping[str, Tensor], factor: Tensor | None) -> Tensor:
    """Whether each example's gradient over all groups is within the joint clipping norm, ``[B]``."""
    joint = torch.stack([norm.square() for norm in norms.values()]).sum(0).sqrt()
    clip = sum((group.clip_norm or 0.0) ** 2 for group in plan.gradient_groups) ** 0.5
    return joint <= limit_of(clip, factor)


def proven_sum(model: nn.Module, loss: Loss, batch: Batch, plan: Plan) -> Grads:
    """The sum of plain gradients, each example's loss gradient in the output scaled down to the plan's ``loss_clip``.

    Guarantee: with a plan of ``clipless``, one example contributes to group k at most its ``norm_bound``: what enters the backward pass is
        within ``loss_clip`` whatever the loss does, and is zero for padding and for examples that are not finite (pitfalls.md L15).
    Source: math.md section 5.
    """
    size = batch_size(batch.x)
    with phase("forward"), torch.enable_grad():
        output = call_model(model, batch.x)
        check_output(output, size)
        seen = output.detach().requires_grad_()
        losses = example_losses(loss, seen, batch.y, size)
    with phase("gradients"):
        return sum_below(model, output, seen, losses, batch.mask, plan, batch.factor)


def sum_below(
    model: nn.Module, output: Tensor, seen: Tensor, losses: Tensor, mask: Tensor, plan: Plan, factor: Tensor | None = None
) -> Grads:
    """The sum of gradients from a model's output down, each example's loss gradient in that output scaled to the plan's ``loss_clip``.

    Args:
        model: the model that was called.
        output: its output, with its graph.
        seen: the tensor that the losses were computed from: the output, or a detached copy.
        losses: per-example losses ``[B]``.
        mask: bool ``[B]``; False marks padding.
        plan: a plan with proven bounds.
        factor: what ``loss_clip`` is multiplied by.
    Returns:
        The sums.
    Guarantee, Source: as ``proven_sum``.
    """
    parameters = trainable(model)
    (cotangent,) = torch.autograd.grad(losses.sum(), seen, retain_graph=seen is output)
    with torch.no_grad():
        used = mask & losses.isfinite() & cotangent.flatten(1).isfinite().all(1)
        cotangent = per_example(used, cotangent)
        limit = limit_of(plan.loss_clip, factor)
        norm = cotangent.flatten(1).norm(dim=1)
        cotangent = cotangent * column(limit / norm.clamp(min=limit), cotangent)
        counts = count_below(plan, used & (norm <= limit), mask)
    gradients = torch.autograd.grad(output, list(parameters.values()), cotangent, allow_unused=True)
    sums = {n: zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
    stats = {
        "loss": per_example(used, losses.detach()).sum(),
        "count": mask.sum(),
        "clipped": (used & (norm > limit)).sum(),
        "nonfinite": (mask & ~used).sum(),
    }
    return Grads(sums, stats, counts)


def check_output(output: Any, batch: int) -> None:
    """Refuse an output that is not one array with the examples first, or that nothing trainable reaches."""
    if not isinstance(output, Tensor) or output.dim() == 0 or output.shape[0] != batch:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UnsupportedModelError([f"the model returned {shape} for a batch of {batch}; strategy clipless needs one tensor [B, ...]."])
    if not output.requires_grad:
        raise UnsupportedModelError(["the output depends on no trainable parameter, so nothing would be trained; unfreeze a layer."])


def column(w: Tensor, like: Tensor) -> Tensor:
    """``[B]`` shaped to multiply ``[B, ...]``."""
    return w.view(-1, *[1] * (like.dim() - 1))


def two_pass_problems(model: nn.Module, units: Iterable[Unit]) -> list[str]:
    """``validation.two_pass_problems`` of a model."""
    clips = (name for name, part in model.named_modules() if isinstance(part, LossGradientClip))
    return validation.two_pass_problems(clips, ((unit.name, type(unit.module).__name__) for unit in units if unit.whole))


def second_pass(
    model: nn.Module, losses: Tensor, weights: Mapping[str, Tensor], group_of: Mapping[str, str], grad: Callable[..., Any]
) -> dict[str, Tensor]:
    """The same sums from a backward pass over the reweighted losses, one pass per group; ``grad`` is ``torch.autograd.grad``."""
    parameters = trainable(model)
    sums: dict[str, Tensor] = {}
    for i, (group, w) in enumerate(weights.items()):
        with torch.enable_grad():
            total = (losses * w).sum()
        last = i == len(weights) - 1
        # All parameters are asked for, not the group's alone: torch 2.13 crashes in the backward pass of a GroupNorm on channels-last
        # arrays when the gradient of its input is not wanted.
        gradients = grad(total, list(parameters.values()), retain_graph=not last, allow_unused=True)
        sums |= {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None and group_of[n] == group}
    return {n: sums[n] if n in sums else zeros_like(p) for n, p in parameters.items()}


def plain_sum(model: nn.Module, loss: Loss, batch: Batch) -> Grads:
    """The unclipped sum by ordinary backpropagation: what ``non_private`` and proven bounds need."""
    with phase("forward"), torch.enable_grad():
        losses = example_losses(loss, call_model(model, batch.x), batch.y, batch_size(batch.x))
    with phase("gradients"):
        return loss_sum(model, losses, batch.mask)


def loss_sum(model: nn.Module, losses: Tensor, mask: Tensor) -> Grads:
    """The unclipped sum from per-example losses ``[B]``."""
    parameters = trainable(model)
    with torch.enable_grad():
        total = torch.where(mask, losses, torch.zeros_like(losses)).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    sums = {n: zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
    zero = losses.new_zeros(())
    count = mask.sum()
    return Grads(sums, {"loss": total.detach(), "count": count, "clipped": zero, "nonfinite": zero})


def statistics(
    plan: Plan, losses: Tensor, mask: Tensor, used: Tensor, norms: Mapping[str, Tensor], factor: Tensor | None = None
) -> dict[str, Tensor]:
    """Sums over the batch for progress displays. NOT private (pitfalls.md G18)."""
    clipped = torch.zeros_like(used)
    for group in plan.groups:
        if group.name in norms and group.clip_norm is not None:
            clipped = clipped | (norms[group.name] > limit_of(group.clip_norm, factor))
    loss = per_example(used, losses.detach()).sum()
    return {"loss": loss, "count": mask.sum(), "clipped": (clipped & used).sum(), "nonfinite": (mask & ~used).sum()}
