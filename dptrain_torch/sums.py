"""What the API and the self-check share: whole batches, parts of them, and the bounded sums of the training step outside of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dptrain.info import ModelInfo
from dptrain.plan import Plan
from dptrain.strategies import get_strategy
from dptrain_torch.gradients import Batch, Loss, batch_size, bounded_sum
from dptrain_torch.lipschitz import LossGradientClip


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


def pair(x: Any) -> Any:
    """Two examples of a batch."""
    return take(x, [i % batch_size(x) for i in range(2)])


def take(x: Any, picks: list[int], count: int | None = None) -> Any:
    """The examples of a batch at some indices, in every tensor of it that has the batch axis.

    Args:
        x: a tensor, or tuples, lists and mappings of them.
        picks: indices.
        count: size of the batch, where ``x`` does not begin with a tensor that has it.
    """
    size = batch_size(x) if count is None else count

    def some(t: Any) -> Any:
        has_examples = isinstance(t, Tensor) and t.dim() > 0 and len(t) == size
        return t[torch.tensor(picks, device=t.device)] if has_examples else t

    return tree_map(some, plain(x))


def finite(x: Any) -> Any:
    """A batch with zeros in place of what is not finite: the probe is about the model, not about the data."""
    return tree_map(lambda t: torch.where(t.isfinite(), t, torch.zeros_like(t)) if is_float(t) else t, plain(x))


def plain(x: Any) -> Any:
    """Arguments or outputs of mapping classes as plain dictionaries."""
    return dict(x) if isinstance(x, Mapping) else x


def is_float(x: Any) -> bool:
    """Whether something is a tensor of real numbers."""
    return isinstance(x, Tensor) and x.is_floating_point()
