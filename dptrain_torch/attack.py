"""How close one example can come to a proven bound: alternating maximisation over inputs and loss gradients.

It finds lower bounds of the true sensitivity, so an attained norm above the claimed one would refute a proof, and the ratio of the
two says how much noise a bound wastes. No data are used: the inputs are found, within the norm that the model admits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dptrain.bounds import input_norm
from dptrain.plan import Plan
from dptrain_torch.gradients import trainable
from dptrain_torch.update import group_of_parameter


def starts(shape: tuple[int, ...], like: Tensor, restarts: int) -> list[Tensor]:
    """A constant input, one with a single position, and random ones, as batches of one.

    Overlapping windows add up best on the constant one, disjoint windows and positions on the single one.
    """
    generator = torch.Generator().manual_seed(0)
    single = torch.zeros(shape)
    single[tuple(n // 2 for n in shape[:-1])] = 1.0
    draws = [torch.ones(shape), single]
    draws += [torch.randn(shape, generator=generator) for _ in range(restarts)]
    return [draw.unsqueeze(0).to(like) for draw in draws]


def to_norm(v: Tensor, norm: float) -> Tensor:
    """A tensor scaled to a norm; zero stays zero."""
    return (v * (norm / v.norm().clamp(min=torch.finfo(v.dtype).tiny))).detach()


def ascend(model: nn.Module, parameters: Sequence[Tensor], x: Tensor, norms: tuple[float, float], iterations: int) -> float:
    """Largest gradient norm met from one starting point.

    Args:
        model: the model.
        parameters: those whose joint gradient is maximised.
        x: an input ``[1, ...]``.
        norms: of the input, and of the cotangent at the output.
        iterations: steps; each replaces the cotangent, and every third one, later on, the input, by the direction in which the squared
            norm grows: power iterations wherever the network is linear, one after the other because the norm is bilinear there.
    Returns:
        The norm.
    """
    best, x = 0.0, to_norm(x, norms[0])
    cotangent = to_norm(torch.randn(model(x).shape, generator=torch.Generator().manual_seed(1)).to(x), norms[1])
    for i in range(iterations):
        x, cotangent = x.requires_grad_(), cotangent.requires_grad_()
        with torch.enable_grad():
            gradients = torch.autograd.grad((model(x) * cotangent).sum(), parameters, create_graph=True, allow_unused=True)
            square = sum((g.square().sum() for g in gradients if g is not None), torch.zeros((), dtype=x.dtype, device=x.device))
        best = max(best, float(square.detach()) ** 0.5)
        if not square.requires_grad:
            break
        dx, dc = torch.autograd.grad(square, [x, cotangent], allow_unused=True)
        if i % 3 == 2 and i > 4:
            x = to_norm(x if dx is None or not bool(dx.any()) else dx, norms[0])
        cotangent = to_norm(cotangent if dc is None or not bool(dc.any()) else dc, norms[1])
    return best


def tightness(model: nn.Module, x: Tensor, plan: Plan, *, restarts: int = 2, iterations: int = 18) -> dict[str, tuple[float, float]]:
    """Largest gradient norm found, beside the proven bound.

    Args:
        model: the model of the plan; left as it was.
        x: a batch, for its shape and device.
        plan: a plan of ``clipless``.
        restarts: random starting points beside the fixed ones.
        iterations: steps from each.
    Returns:
        Group -> attained, claimed. About synthetic inputs, hence not about anyone's data.
    """
    groups, parameters, found = group_of_parameter(plan), trainable(model), dict[str, tuple[float, float]]()
    norms = (input_norm(plan.graph), float(plan.loss_clip or 0.0))
    for group in plan.gradient_groups:
        members = [p for name, p in parameters.items() if groups[name] == group.name]
        attained = max(ascend(model, members, start, norms, iterations) for start in starts(tuple(x.shape[1:]), x, restarts))
        found[group.name] = (attained, group.norm_bound)
    return found
