"""The API for users with a model of their own: diagnostics that run the very code of the training step, and the self-check."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dptrain.errors import UnsupportedModelError
from dptrain.info import ModelInfo
from dptrain.mechanism import FLOAT_MARGIN
from dptrain.plan import Plan
from dptrain.projection import certify
from dptrain.strategies import SensitivityStrategy, get_strategy
from dptrain_torch import update
from dptrain_torch.describe import describe
from dptrain_torch.gradients import Batch, Loss, batch_size, bounded_sum, plain_sum, trainable
from dptrain_torch.graph import graph, weights
from dptrain_torch.lipschitz import LossGradientClip


def make_plan(model: nn.Module, x: Any, strategy: str | SensitivityStrategy = "mixed_ghost", *, loss: Any = None, **settings: Any) -> Plan:
    """The plan of a strategy for a model.

    Args:
        model: any module; left as it was. For ``clipless``, ``project`` it first.
        x: a batch of inputs.
        strategy: a strategy or its name.
        loss: for ``clipless``, a loss of ``get_loss``, or the Lipschitz constant of your own.
        settings: fields of the strategy, such as ``max_grad_norm``, if it is given by name.
    Returns:
        The plan; ``print`` it.
    """
    found = get_strategy(strategy, **settings)
    return found.plan(facts(model, x, loss) if found.proves else describe(model, x))


def facts(model: nn.Module, x: Any, loss: Any = None) -> ModelInfo:
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


def project(model: nn.Module, x: Any) -> dict[str, float]:
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


def check_bounds(model: nn.Module, loss: Loss, x: Any, y: Any, **settings: Any) -> dict[str, tuple[float, float]]:
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


def attained(model: nn.Module, loss: Loss, x: Any, y: Any, plan: Plan) -> dict[str, tuple[float, float]]:
    """Group -> largest per-sample gradient norm in a batch, and the bound of a plan with proven bounds."""
    members = {group.name: group.layers for group in plan.gradient_groups}
    info = ModelInfo(plan.layers)
    measuring = get_strategy("mixed_ghost", grouping=members).plan(info).with_clip_norm(float("inf"))
    clip = LossGradientClip(plan.loss_clip or float("inf"))
    norms: dict[str, Tensor] = {}
    bounded_sum(model, lambda output, target: loss(clip(output), target), full_batch(x, y), measuring, norms_out=norms)
    return {g.name: (float(norms[g.name].max()) if g.name in norms else 0.0, g.norm_bound) for g in plan.gradient_groups}


def full_batch(x: Any, y: Any) -> Batch:
    """All examples as one physical batch without padding."""
    some = next(iter(x.values())) if isinstance(x, Mapping) else x[0] if isinstance(x, tuple | list) else x
    return Batch(x, y, torch.ones(batch_size(x), dtype=torch.bool, device=some.device))


def per_sample_norms(
    model: nn.Module, loss: Loss, x: Any, y: Any, strategy: str | SensitivityStrategy = "mixed_ghost", check: bool = True
) -> Tensor:
    """L2 norm of each example's gradient over all trainable parameters.

    Args:
        model: any module; left as it was.
        loss: ``loss(output, y) -> [B]``, one value per example.
        x: inputs ``[B, ...]``, or a tuple or mapping of such.
        y: targets.
        strategy: a clipping strategy or its name; all give the same norms.
        check: run ``self_check`` first, on up to three of the examples; turn it off for a model that has passed it.
    Returns:
        Norms ``[B]``. They are NOT private.
    Raises:
        UnsupportedModelError: the model or the loss cannot be bounded.
    """
    norms: dict[str, Tensor] = {}
    plan = make_plan(model, x, clipping_strategy(strategy))
    if check:
        self_check(model, loss, x, y, plan)
    bounded_sum(model, loss, full_batch(x, y), plan, norms_out=norms)
    if not norms:  # no parameter was reached by the loss
        return torch.zeros(batch_size(x))
    return torch.stack([norm.square() for norm in norms.values()]).sum(0).sqrt()


def clipped_sum(
    model: nn.Module,
    loss: Loss,
    x: Any,
    y: Any,
    max_grad_norm: float = 1.0,
    strategy: str | SensitivityStrategy = "mixed_ghost",
    two_pass: bool = False,
    check: bool = True,
    **settings: Any,
) -> dict[str, Tensor]:
    """The sum over the batch of clipped per-sample gradients, before noise.

    Args:
        model: any module; left as it was.
        loss: ``loss(output, y) -> [B]``, one value per example.
        x: inputs ``[B, ...]``, or a tuple or mapping of such.
        y: targets.
        max_grad_norm: C; infinity turns clipping off and gives the plain gradient of the summed loss.
        strategy: a clipping strategy or its name; all give the same sum. A strategy object keeps its own ``max_grad_norm``.
        two_pass: take the sum from a second backward pass, always after a self-check.
        check: run ``self_check`` first, on up to three of the examples; turn it off for a model that has passed it.
        settings: further fields of the strategy.
    Returns:
        Name in ``named_parameters`` -> tensor. It is NOT private.
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
        self_check(model, loss, x, y, plan)
    return bounded_sum(model, loss, full_batch(x, y), plan, two_pass=two_pass).sums


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
    return take(x, [i % batch_size(x) for i in range(2)])


def take(x: Any, picks: list[int]) -> Any:
    """The examples of a batch at some indices, in every tensor of it."""
    if isinstance(x, Mapping):
        return {k: take(v, picks) for k, v in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(take(v, picks) for v in x)
    return x[torch.tensor(picks, device=x.device)] if isinstance(x, Tensor) else x


def finite(x: Any) -> Any:
    """A batch with zeros in place of what is not finite: the probe is about the model, not about the data."""
    if isinstance(x, Mapping):
        return {k: finite(v) for k, v in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(finite(v) for v in x)
    return torch.where(x.isfinite(), x, torch.zeros_like(x)) if isinstance(x, Tensor) and x.is_floating_point() else x


def random_layers(model: nn.Module) -> list[nn.Module]:
    """Dropout in its many forms, which would make two passes differ."""
    return [m for m in model.modules() if "drop" in type(m).__name__.lower() and not any(True for _ in m.parameters())]


def self_check(model: nn.Module, loss: Loss, x: Any, y: Any, plan: Plan) -> None:
    """Refuse a model whose clipped sum would not be what it claims. Costs a few passes over at most three examples.

    Checks, with dropout off: every layer keeps the batch first for two batch sizes; no buffer moves; each example's loss is the
    same in any company; without clipping the sum equals the plain gradient; at a tiny C one example stays within its bound.

    Args:
        model: the model; left as it was.
        loss: per-example loss.
        x, y: a batch, of which up to three examples are used.
        plan: the plan that training will use.
    Raises:
        UnsupportedModelError: lists every problem.
    """
    count = batch_size(x)
    batches = [(finite(take(x, picks)), finite(take(y, picks))) for picks in ([i % count for i in range(n)] for n in (2, 3))]
    problems: list[str] = []
    state = copy.deepcopy(dict(model.named_buffers()))
    modes = {m: m.training for m in model.modules()}
    try:
        training_probe = full_batch(*batches[1])
        bounded_sum(model, loss, training_probe, plan)
        moved = [name for name, b in model.named_buffers() if not torch.equal(b, state[name])]
        problems += [f"buffer {name!r} is updated from data without noise; remove the layer that does it." for name in moved]
        for module in random_layers(model):
            module.eval()
        describe(model, batches[0][0])
        problems += independence_problems(model, loss, batches[1][0], batches[1][1])
        if plan.loss_clip is None:
            problems += completeness_problems(model, loss, full_batch(*batches[1]), plan)
            problems += bound_problems(model, loss, batches[0], plan)
        else:
            problems += proof_problems(model, loss, batches[1], plan)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, buffer in model.named_buffers():
            buffer.data.copy_(state[name])
    if problems:
        raise UnsupportedModelError(problems)


def independence_problems(model: nn.Module, loss: Loss, x: Any, y: Any) -> list[str]:
    """Each example's loss among copies of itself against its loss in company (pitfalls.md G8)."""
    from dptrain_torch.gradients import call_model, example_losses

    with torch.enable_grad():
        together = example_losses(loss, call_model(model, x), y, 3).detach()
        alone = [example_losses(loss, call_model(model, take(x, [i] * 3)), take(y, [i] * 3), 3).detach()[0] for i in range(3)]
    gap = (torch.stack(alone) - together).abs().max()
    if not bool(gap <= tolerance(together) * (1 + together.abs().max())):
        return [f"the loss of one example depends on its batch (by {float(gap):.3g}); find the layer or loss that mixes examples."]
    return []


def completeness_problems(model: nn.Module, loss: Loss, batch: Batch, plan: Plan) -> list[str]:
    """Without clipping the sum must be the plain gradient: every use of every parameter is seen (G1, G4, G5, G23)."""
    ours = bounded_sum(model, loss, batch, plan.with_clip_norm(float("inf"))).sums
    plain = plain_sum(model, loss, batch).sums
    scale = max(float(value.norm()) for value in plain.values())
    bad = [
        name
        for name, value in plain.items()
        if not bool((ours[name] - value).norm() <= 10 * tolerance(value) * max(float(value.norm()), 1e-2 * scale) + 1e-30)
    ]
    return [
        f"parameter {name!r} is used in a way that no layer call shows (a functional use, a reused weight), so its gradient would be "
        "wrong; call the layer itself, or wrap the use in a module of its own."
        for name in bad
    ]


def bound_problems(model: nn.Module, loss: Loss, pair: tuple[Any, Any], plan: Plan) -> list[str]:
    """One example at a tiny clipping norm must stay within it."""
    tiny, (x, y) = 1e-3, pair
    one = full_batch(x, y)
    one.mask[1] = False
    sums = bounded_sum(model, loss, one, plan.with_clip_norm(tiny)).sums
    total = float(torch.stack([value.double().square().sum() for value in sums.values()]).sum().sqrt())
    bound = tiny * len(plan.groups) ** 0.5
    if not total <= bound * (1 + 1e-3):
        return [f"one example contributes {total:.3g} for a bound of {bound:.3g}; please report this model."]
    return []


def proof_problems(model: nn.Module, loss: Loss, batch: tuple[Any, Any], plan: Plan) -> list[str]:
    """No example exceeds its proven bound."""
    return [
        f"group {name!r} reaches a gradient norm of {norm:.6g} over its proven bound {bound:.6g}; please report this model."
        for name, (norm, bound) in attained(model, loss, *batch, plan).items()
        if not norm <= bound * (1 + FLOAT_MARGIN)
    ]


def tolerance(x: Tensor) -> float:
    """Relative agreement to expect of two ways to compute the same thing in a given precision."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(x.dtype, 5e-2)


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
