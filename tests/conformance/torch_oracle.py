"""The oracle for torch models as users bring them: one ordinary backward pass per example, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from dptrain.plan import Plan
from dptrain_torch import clipped_sum, make_plan, per_sample_norms
from dptrain_torch.engine import random_layers

STRATEGIES = ("ghost", "per_sample")


def projection(output: Any, y: Tensor) -> Tensor:
    """A loss that reaches every output: inner products with fixed directions, and a curved term."""
    total = torch.zeros(len(y), dtype=torch.float64)
    outputs = dict(output) if isinstance(output, Mapping) else output
    for i, z in enumerate(tree_flatten(outputs)[0]):
        if isinstance(z, Tensor) and z.is_floating_point() and z.dim() and len(z) == len(y):
            direction = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(i), dtype=z.dtype)
            total = total + (z * direction + 0.1 * z.square()).flatten(1).sum(1)
    return total * (1 + y.double())


def called(model: nn.Module, x: Any) -> Any:
    """The output for a tensor, a tuple of arguments or a mapping of keyword arguments."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def oracle(model: nn.Module, loss: Callable[..., Tensor], x: Any, y: Tensor) -> dict[str, Tensor]:
    """Per-example gradients ``[B, *shape]``."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {n: [] for n in parameters}
    for i in range(len(y)):
        one = tree_map(lambda t, i=i: t[i : i + 1] if isinstance(t, Tensor) and t.dim() and len(t) == len(y) else t, x)
        value = loss(called(model, one), y[i : i + 1]).sum()
        for n, g in zip(parameters, torch.autograd.grad(value, list(parameters.values()), allow_unused=True), strict=True):
            rows[n].append(torch.zeros_like(parameters[n]) if g is None else g)
    return {n: torch.stack(r) if r else parameters[n].new_zeros(0, *parameters[n].shape) for n, r in rows.items()}


def assert_exact(
    model: nn.Module,
    x: Any,
    y: Tensor,
    loss: Callable[..., Tensor] = projection,
    check: bool = True,
    strategies: tuple[str, ...] = STRATEGIES,
) -> Plan:
    """Norms and a clipped sum equal the oracle's, by ghost norms and by instantiated gradients; returns the plan."""
    rows = oracle(model, loss, x, y)
    norms = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in rows.values()]).sum(0).sqrt()
    limit = float(norms.median()) * 0.8 if len(norms) else 1.0
    weights = (limit / norms).clamp(max=1)
    for strategy in strategies:
        ours = per_sample_norms(model, loss, x, y, strategy, check=check and strategy == strategies[0])
        torch.testing.assert_close(ours.double(), norms.double(), rtol=1e-9, atol=0)
        sums = clipped_sum(model, loss, x, y, limit, strategy, check=False)
        for name, g in rows.items():
            expected = torch.einsum("b,b...->...", weights, g)
            torch.testing.assert_close(sums[name], expected, rtol=1e-9, atol=1e-9 * limit, msg=lambda m, n=name: f"{n}: {m}")
    return make_plan(model, x, strategies[0]) if len(y) else Plan("none", (), {}, None, 0.01)


def fill(model: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """The model in float64 with random parameters, none of them at a special value, and with dropout layers off."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    for module in random_layers(model):
        module.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def slow_layers(plan: Plan) -> list[str]:
    """Layers of a plan that are called and go by the slow method."""
    return [layer.name for layer in plan.layers if layer.kind == "generic" and layer.calls and not {"bare", "static"} & layer.attrs.keys()]
