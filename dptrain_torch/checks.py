"""Proof on a few examples that a model's bounded sums are what they claim, or sentences that say why they are not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from dptrain.clipping import clip_weight
from dptrain.errors import ConfigError, UnsupportedModelError
from dptrain.mechanism import FLOAT_MARGIN
from dptrain.plan import Plan
from dptrain.strategies import get_strategy
from dptrain.validation import ValidatedLayer, Validation
from dptrain_torch import update
from dptrain_torch.describe import describe
from dptrain_torch.gradients import Loss, batch_size, bounded_sum, call_model, example_losses, trainable, two_pass_problems, zeros_like
from dptrain_torch.hooks import Unit, find_units
from dptrain_torch.sums import attained, finite, full_batch, is_float, plain, take


def self_check(model: nn.Module, loss: Loss, x: Any, y: Any, plan: Plan, two_pass: bool = False) -> None:
    """Refuse a model whose clipped sum would not be what it claims. Costs a few passes over at most three examples.

    Checks: no buffer moves; and, with dropout off: every layer shows which rows belong to which example, for two batch sizes; each
    example's loss is the same in any company; the gradient of each example's own loss is what autograd gives, in norm, in the sum and
    in the clipped sum, so that every use of every parameter is seen and rows are given to the right examples; at a tiny C one example
    stays within its bound.

    Args:
        model: the model; left as it was.
        loss: per-example loss.
        x, y: a batch, of which up to three examples are used.
        plan: the plan that training will use.
        two_pass: whether the sum will be taken in a second backward pass.
    Raises:
        UnsupportedModelError: lists every problem.
    """
    with kept_state(model):
        problems = probe_problems(model, loss, x, y, plan)
        if two_pass and plan.needs_norms and not problems:
            problems = two_pass_problems(model, find_units(model, plan.layers))
    if problems:
        raise UnsupportedModelError(list(dict.fromkeys(problems)))


def validate(model: nn.Module, batch: Any, loss: Loss | None = None, targets: Any = None) -> Validation:
    """Prove on a few examples that a model can be trained with differential privacy, or say everything that is in the way.

    Every trainable parameter belongs to a layer that is tapped; examples do not depend on each other; the gradients of two examples' own
    losses are what autograd gives; no buffer moves; a tiny clipping norm holds.

    Args:
        model: any module; left as it was, with its random states, modes, buffers and ``.grad``.
        batch: a batch of inputs, of which up to three examples are used: a tensor, a tuple of arguments or a mapping of them.
        loss: ``loss(output, y) -> [B]``; None stands for the inner product of each float output with a fixed random direction.
        targets: targets of the batch, with a loss.
    Returns:
        How each layer is handled.
    Raises:
        UnsupportedModelError: lists every problem.
    """
    if loss is not None and targets is None:
        raise ConfigError("validate needs targets beside a loss; give both or neither.")
    size = batch_size(batch)
    if size == 0:
        raise ConfigError("validate needs at least one example.")
    y = torch.zeros(size) if loss is None else targets
    with kept_state(model):
        try:
            plan = get_strategy("mixed_ghost", max_grad_norm=1.0).plan(describe(model, batch))
            units = find_units(model, plan.layers)
        except UnsupportedModelError as error:
            raise UnsupportedModelError([*error.problems, *independence_alone(model, loss or surrogate, batch, y)]) from None
        problems = probe_problems(model, loss or surrogate, batch, y, plan)
    held = {id(p) for unit in units for p in unit.module.parameters()}
    problems += [f"parameter {name!r} belongs to no layer." for name, p in trainable(model).items() if id(p) not in held]
    if problems:
        raise UnsupportedModelError(list(dict.fromkeys(problems)))
    calls = {layer.name: layer.calls for layer in plan.layers}
    rows = [ValidatedLayer(u.name, type(u.module).__name__, method_of(u, calls[u.name]), tuple(u.params.values())) for u in units]
    return Validation(tuple(rows), sum(p.numel() for p in trainable(model).values()))


def method_of(unit: Unit, calls: int) -> str:
    """How a unit's per-sample gradients are found."""
    if unit.whole and not unit.recurrent:
        return "slow" if calls else "unused"
    return "bare" if unit.bare is not None or unit.static else "rule" if calls else "unused"


def surrogate(output: Any, y: Tensor) -> Tensor:
    """A loss for models without one: the inner product of each float output with a fixed random direction."""
    batch, total = len(y), None
    for i, z in enumerate(tree_flatten(plain(output))[0]):
        if is_float(z) and z.requires_grad and z.dim() and len(z) == batch:
            direction = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(i)).to(z)
            part = (z * direction).flatten(1).sum(1) if z.dim() > 1 else z * direction
            part = part.float() if part.dtype in (torch.float16, torch.bfloat16) else part
            total = part if total is None else total + part
    if total is None:
        raise UnsupportedModelError(["no output of the model is a float tensor with one row per example; give validate a loss."])
    return total


@contextmanager
def kept_state(model: nn.Module) -> Iterator[None]:
    """Put back buffers, training modes and random states."""
    state = copy.deepcopy(dict(model.named_buffers()))
    modes = {m: m.training for m in model.modules()}
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for name, buffer in model.named_buffers():
                if name in state:
                    buffer.data.copy_(state[name])


def probe_problems(model: nn.Module, loss: Loss, x: Any, y: Any, plan: Plan) -> list[str]:
    """Everything that is wrong with a model, found with a few examples."""
    count = batch_size(x)
    picks = [[i % count for i in range(n)] for n in (2, 3)]
    batches = [(finite(take(x, p)), finite(take(y, p, count))) for p in picks]
    state = copy.deepcopy(dict(model.named_buffers()))
    bounded_sum(model, loss, full_batch(*batches[1]), plan)
    moved = [name for name, b in model.named_buffers() if name in state and not torch.equal(b, state[name])]
    problems = [f"buffer {name!r} is updated from data without noise; remove the layer that does it." for name in moved]
    for module in random_layers(model):
        module.eval()
    describe(model, batches[0][0])
    problems += independence_problems(model, loss, *batches[1])
    if plan.loss_clip is not None:
        return problems + proof_problems(model, loss, batches[1], plan)
    if plan.needs_norms:
        inexact = exactness_problems(model, loss, *batches[0], plan)
        problems += in_double(model, loss, *batches[0], plan, inexact) if inexact else []
        problems += bound_problems(model, loss, batches[0], plan)
    return problems


def random_layers(model: nn.Module) -> list[nn.Module]:
    """Dropout in its many forms, which would make two passes differ."""
    names = ("drop", "stochasticdepth")
    found = [m for m in model.modules() if any(name in type(m).__name__.lower() for name in names)]
    return [m for m in found if not any(True for _ in m.parameters())]


def losses_of(model: nn.Module, loss: Loss, x: Any, y: Any, size: int, seed: int = 0) -> Tensor:
    """Per-example losses, random functions drawing the same numbers in every pass."""
    with torch.enable_grad():
        return seeded(lambda: example_losses(loss, call_model(model, x), y, size), seed)


def seeded(function: Callable[[], Any], seed: int = 0) -> Any:
    """The value of a function under fixed random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return function()


def independence_alone(model: nn.Module, loss: Loss, x: Any, y: Any) -> list[str]:
    """``independence_problems`` of a model that has other problems already."""
    count = batch_size(x)
    picks = [i % count for i in range(3)]
    for module in random_layers(model):
        module.eval()
    try:
        return independence_problems(model, loss, finite(take(x, picks)), finite(take(y, picks, count)))
    except UnsupportedModelError as error:
        return list(error.problems)


def independence_problems(model: nn.Module, loss: Loss, x: Any, y: Any) -> list[str]:
    """Whether an example's loss depends on its company (pitfalls.md G8).

    Each example is exchanged for another one, which must leave the others' losses alone; and where nothing is random, each example's
    loss among copies of itself is compared with its loss in company.
    """
    together = losses_of(model, loss, x, y, 3).detach()
    gap = torch.zeros_like(together[0])
    for j in range(3):
        picks = [(i + 1) % 3 if i == j else i for i in range(3)]
        moved = losses_of(model, loss, changed(take(x, picks), j), take(y, picks, 3), 3).detach()
        gap = torch.maximum(gap, torch.stack([(moved[i] - together[i]).abs() for i in range(3) if i != j]).max())
    if torch.equal(losses_of(model, loss, x, y, 3, seed=1).detach(), together):
        alone = [losses_of(model, loss, take(x, [i] * 3), take(y, [i] * 3, 3), 3).detach()[0] for i in range(3)]
        gap = torch.maximum(gap, (torch.stack(alone) - together).abs().max())
    if not bool(gap <= tolerance(together) * (1 + together.abs().max())):
        return [f"the loss of one example depends on its batch (by {float(gap):.3g}); find the layer or loss that mixes examples."]
    return []


def changed(x: Any, j: int) -> Any:
    """A batch whose example j is halved, so that it differs from an equal one that it replaced."""

    def halved(t: Any) -> Any:
        if not is_float(t) or t.dim() == 0 or len(t) != batch_size(x):
            return t
        factors = torch.ones(len(t), dtype=t.dtype, device=t.device)
        factors[j] = 0.5
        return t * factors.view(-1, *[1] * (t.dim() - 1))

    return tree_map(halved, x)


SCALES = (1.0, -0.6)  # of the two losses of the probe: even equal examples then have different gradients


def exactness_problems(model: nn.Module, loss: Loss, x: Any, y: Any, plan: Plan) -> list[str]:
    """The gradients of two examples' own losses against autograd.

    Without clipping the sum must be the plain gradient: every use of every parameter is seen (G1, G4, G5, G23). No norm may be
    below the true one, and the sum in which the examples have different weights must be that of their own gradients: rows are given to
    the right examples (G9).
    """

    def scaled(output: Any, target: Any) -> Tensor:
        losses = loss(output, target)
        fits = isinstance(losses, Tensor) and losses.shape == (2,)
        return losses * torch.tensor(SCALES, dtype=losses.dtype, device=losses.device) if fits else losses

    def ours(clip_norm: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        norms: dict[str, Tensor] = {}
        limited = plan.with_clip_norm(clip_norm)
        return seeded(lambda: bounded_sum(model, scaled, full_batch(x, y), limited, norms_out=norms)).sums, norms

    parameters, groups = trainable(model), update.group_of_parameter(plan)
    close = 10 * coarseness(model, scaled, x, y)
    losses = losses_of(model, scaled, x, y, 2)
    one, two = (torch.autograd.grad(losses[i], list(parameters.values()), retain_graph=i == 0, allow_unused=True) for i in range(2))
    true_gradients = {
        n: [zeros_like(p) if g is None else g for g in gs]
        for (n, p), gs in zip(parameters.items(), zip(one, two, strict=True), strict=True)
    }
    squares: dict[str, Tensor] = {}
    for name, pair_of in true_gradients.items():
        square = torch.stack([g.double().square().sum() for g in pair_of])
        squares[groups[name]] = squares.get(groups[name], torch.zeros_like(square)) + square
    true = {name: square.sqrt() for name, square in squares.items()}
    sums, norms = ours(float("inf"))
    unseen = differing(sums, {name: g[0] + g[1] for name, g in true_gradients.items()}, close)
    problems = [
        f"parameter {name!r} is used in a way that no layer call shows (a functional use, a reused weight), so its gradient would be "
        "wrong; call the layer itself, or wrap the use in a module of its own."
        for name in unseen
    ]
    low = [g for g, n in true.items() if g in norms and not bool((norms[g] >= n * (1 - close)).all())]
    limit = 0.9 * float(torch.stack([n.double() for n in norms.values()]).prod(1).sqrt().median()) if norms else 0.0
    if unseen or not 0 < limit < float("inf"):
        return problems
    clipped = {}
    for name, (first, second) in true_gradients.items():
        w = weights_at(plan, norms[groups[name]], limit) if groups[name] in norms else torch.zeros(2)
        clipped[name] = first * w[0].to(first) + second * w[1].to(second)
    mixed = differing(ours(limit)[0], clipped, close)
    problems += [
        f"parameter {name!r}: its per-sample gradients are not those of the examples' own losses; a layer that uses it has rows of one "
        "example among those of another: keep the batch axis first, and what belongs to one example together."
        for name in mixed
    ]
    if low and not mixed:
        problems += [f"group {name!r}: a norm of its per-sample gradients is too small; please report this model." for name in low]
    return problems


def in_double(model: nn.Module, loss: Loss, x: Any, y: Any, plan: Plan, found: list[str]) -> list[str]:
    """What of ``exactness_problems`` remains in float64: gradients that nearly cancel can differ by rounding alone."""
    if all(p.dtype == torch.float64 for p in trainable(model).values()):
        return found
    x, y = (tree_map(lambda t: t.double() if is_float(t) else t, plain(z)) for z in (x, y))
    try:
        return exactness_problems(copy.deepcopy(model).double(), loss, x, y, plan)
    except (RuntimeError, TypeError):  # a model that cannot be copied, or a loss with constants of one precision
        return found


def weights_at(plan: Plan, norms: Tensor, limit: float) -> Tensor:
    """The clipping function's weights at given norms."""
    return clip_weight(plan.clipping or "abadi", norms, limit, plan.gamma, lambda n, c: n.clamp(min=c))


def differing(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], close: float) -> list[str]:
    """Names of parameters whose gradients differ by more than a relative amount."""
    scale = max(float(value.norm()) for value in plain.values())
    return [
        name
        for name, value in plain.items()
        if not bool((ours[name] - value).norm() <= close * max(float(value.norm()), 1e-2 * scale) + 1e-30)
    ]


def bound_problems(model: nn.Module, loss: Loss, pair: tuple[Any, Any], plan: Plan) -> list[str]:
    """One example at a tiny clipping norm must stay within it."""
    tiny, (x, y) = 1e-3, pair
    one = full_batch(x, y)
    one.mask[1] = False
    sums = seeded(lambda: bounded_sum(model, loss, one, plan.with_clip_norm(tiny)).sums)
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


def coarseness(model: nn.Module, loss: Loss, x: Any, y: Any) -> float:
    """Relative agreement to expect of a model's gradients: that of its parameters, or less where autocast rounds between its layers."""
    seen: set[torch.dtype] = set()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.update(z.dtype for z in tree_flatten(output)[0] if is_float(z))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        losses_of(model, loss, x, y, 2)
    finally:
        for hook in hooks:
            hook.remove()
    rounded = bool(seen & {torch.bfloat16, torch.float16})
    return 1e-2 if rounded else max((tolerance(p) for p in trainable(model).values()), default=0.0)


def tolerance(x: Tensor) -> float:
    """Relative agreement to expect of two ways to compute the same thing in a given precision."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(x.dtype, 5e-2)
