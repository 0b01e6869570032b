"""What is checked on the very graph of a user's first step, before anything is released.

A user's loop calls the model as it likes: parts of it, twice, with losses that mix examples. So the first physical batch is compared with
plain autograd, on the same graph: gradient norms of single examples, and that no example's loss depends on another. These are questions
about the program, not about the data; the answers do not depend on which examples were drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from dptrain.errors import UnsupportedModelError
from dptrain.plan import Plan
from dptrain_torch.checks import tolerance
from dptrain_torch.gradients import trainable
from dptrain_torch.update import group_of_parameter

EXAMPLES = 2  # compared with autograd, one backward pass each
SURPLUS = 0.05  # ghost norms add the doubt of float32 to what they found; a larger norm clips more, which costs accuracy and no privacy


def check_first_step(
    model: nn.Module,
    plan: Plan,
    edges: list[GradientEdge],
    outputs: list[Tensor],
    losses: Tensor,
    mask: Tensor,
    norms: Mapping[str, Tensor],
) -> bool:
    """Refuse a step whose bounded sum would not be what it claims.

    Args:
        model: the model.
        plan: groups.
        edges: of the first layers' outputs, in the graph of the losses.
        outputs: of the model, in that graph.
        losses: per-example losses ``[B]``.
        mask: bool ``[B]``; False marks padding.
        norms: group -> norms ``[B]``, as the tap took them.
    Returns:
        Whether there was an example to look at; a batch of padding alone has none, and one in which an example overflows may have none,
        since autograd's sum over the batch is not finite then. Such a step is sound all the same: what is released is rebuilt from
        what was measured.
    Raises:
        UnsupportedModelError: lists every problem.
    """
    parameters, groups = trainable(model), group_of_parameter(plan)
    members: dict[str, list[int]] = {}
    for position, name in enumerate(parameters):
        members.setdefault(groups[name], []).append(position)
    usable = [i for i in range(len(losses)) if bool(mask[i]) and bool(losses[i].isfinite())]
    broken = ~losses.detach().isfinite()
    for norm in norms.values():
        broken = broken | ~norm.isfinite()
    problems: list[str] = []
    looked = 0
    for i in usable[:EXAMPLES]:
        ask: list[Any] = [*parameters.values(), *edges, *outputs]
        found = torch.autograd.grad(losses[i], ask, retain_graph=True, allow_unused=True)
        own, rest = found[: len(parameters)], found[len(parameters) :]
        mixed = coupled(rest, i, broken)
        problems += mixed
        if mixed:
            continue  # norms of single examples mean nothing then
        if bool(broken.any()) and not all(bool(g.isfinite().all()) for g in own if g is not None):
            continue  # 0 * inf, from another row
        looked += 1
        for group, positions in members.items():
            squares = [g.double().square().sum() for g in (own[p] for p in positions) if g is not None]
            true = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
            seen = float(norms[group][i]) if group in norms else 0.0
            missing = true - seen > 10 * tolerance(losses) * true + 1e-12
            if missing or not seen - true <= SURPLUS * true + 1e-6:
                problems.append(
                    f"group {group!r}: an example's gradient has norm {true:.6g}, and the layers' calls show {seen:.6g}; a weight is used "
                    "where no call of a layer shows it (outside model(...), by a functional, in a loss), or a batch axis is not the "
                    "first one: call layers through the model, batch first."
                )
    if problems:
        raise UnsupportedModelError(list(dict.fromkeys(problems)))
    return looked > 0


def check_coupling(outputs: list[Tensor], losses: Tensor, mask: Tensor) -> bool:
    """Refuse losses of which one depends on another example's output.

    Args:
        outputs: of the model, in the graph of the losses.
        losses: per-example losses ``[B]``.
        mask: bool ``[B]``; False marks padding.
    Returns:
        Whether there was an example to look at.
    Raises:
        UnsupportedModelError: an example's loss has a gradient in the rows of another.
    """
    usable = [i for i in range(len(losses)) if bool(mask[i]) and bool(losses[i].isfinite())]
    for i in usable[:EXAMPLES]:
        if problems := coupled(
            torch.autograd.grad(losses[i], outputs, retain_graph=True, allow_unused=True), i, ~losses.detach().isfinite()
        ):
            raise UnsupportedModelError(problems)
    return bool(usable)


def coupled(gradients: tuple[Tensor | None, ...], i: int, broken: Tensor) -> list[str]:
    """A sentence if the loss of example i has a gradient in the rows of another.

    Args:
        gradients: of that loss, rows of the examples first.
        i: the example.
        broken: bool ``[B]``; examples that are not finite themselves, in whose rows ``0 * inf`` may stand.
    """
    batch = len(broken)
    for g in gradients:
        if g is None or g.dim() == 0 or g.shape[0] % batch or not len(g):
            continue
        rows = g.reshape(batch, -1)
        foreign = (rows != 0) & ~(rows.isnan() & broken.unsqueeze(1))
        foreign[i] = False
        if bool(foreign.any()):
            return [
                "the loss of one example depends on another example; find the layer or the loss that mixes examples (batch statistics, a "
                "mean over the batch, a contrastive loss)."
            ]
    return []
