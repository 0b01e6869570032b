"""From a sum of per-sample gradients to new weights: accumulate, reduce, add noise, apply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dptrain import projection
from dptrain.info import Graph
from dptrain.plan import Plan
from dptrain.randomness import StepNoise
from dptrain_torch.gradients import Grads, trainable, zeros_like
from dptrain_torch.graph import assign, weights

STATS = ("loss", "count", "clipped", "nonfinite")


def zeros(model: nn.Module) -> Grads:
    """The empty sum: what an empty logical batch releases, before noise (pitfalls.md G17)."""
    parameters = trainable(model)
    some = next(iter(parameters.values()))
    sums = {name: zeros_like(p) for name, p in parameters.items()}
    return Grads(sums, {name: torch.zeros((), device=some.device) for name in STATS})


def add(total: Grads, part: Grads) -> Grads:
    """The sum of two partial sums, in float64: a float32 sum of many examples rounds by more than one of them may weigh.

    Args:
        total: sum so far; used up.
        part: sum of another physical batch of the same logical batch.
    Returns:
        The sum.
    """
    total = widened(total)
    sums = {name: total.sums.pop(name).add_(part.sums[name]) for name in list(total.sums)}
    counts = {name: value + total.counts.get(name, 0.0) for name, value in part.counts.items()}
    return Grads(sums, {name: value + part.stats[name] for name, value in total.stats.items()}, counts, total.kinds)


def widened(total: Grads) -> Grads:
    """The same sums in float64, in arrays of their own, with the kinds that they had."""
    if total.kinds:
        return total
    sums = {name: value.to(torch.float64, copy=True) for name, value in total.sums.items()}
    return Grads(sums, total.stats, total.counts, {name: value.dtype for name, value in total.sums.items()})


def reduce(total: Grads) -> Grads:
    """The sum over all workers: an all-reduce under ``torch.distributed``, the identity on one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = widened(total)  # on every worker, however many physical batches it had
        for value in (*total.sums.values(), *total.counts.values()):
            torch.distributed.all_reduce(value)
    return total


def group_of_parameter(plan: Plan) -> dict[str, str]:
    """Parameter name -> group name."""
    groups = {layer: group.name for group in plan.groups for layer in group.layers}
    return {param: groups[layer.name] for layer in reversed(plan.layers) for param in layer.params}


def group_norms(total: Grads, plan: Plan) -> dict[str, float]:
    """Group -> L2 norm of a sum. NOT private before noise."""
    groups, squares = group_of_parameter(plan), dict[str, Any]()
    for name, value in total.sums.items():
        squares[groups[name]] = squares.get(groups[name], 0.0) + value.double().square().sum()
    return {name: float(square) ** 0.5 for name, square in squares.items()}


def sums(grads: Grads) -> dict[str, np.ndarray]:
    """Identifier -> gradient sum, copied. NOT private before noise."""
    return {name: value.detach().cpu().numpy().copy() for name, value in grads.sums.items()}


def shifted(grads: Grads, by: Mapping[str, np.ndarray]) -> Grads:
    """The same sums with arrays added.

    Args:
        grads: sums; left as they are.
        by: identifier -> array; parameters that are not named stay as they are.
    Returns:
        New sums.
    """
    added = {name: value + torch.from_numpy(np.array(by[name])).to(value) if name in by else value for name, value in grads.sums.items()}
    return Grads(added, grads.stats, grads.counts, grads.kinds)


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    """Identifier -> trainable parameter, copied."""
    return {name: p.detach().cpu().numpy().copy() for name, p in trainable(model).items()}


def privatize(total: Grads, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Grads:
    """Add Gaussian noise to the sum of every trainable parameter, used in this step or not, and to every count.

    Args:
        total: the sum over the whole logical batch and all workers; used up, so that each part is freed as its noise is added.
        plan: says which group a parameter belongs to.
        stds: group name -> standard deviation.
        noise: the noise of this release, used for nothing else.
    Returns:
        The released sums.
    Raises:
        KeyError: a parameter is in no group, so that nothing is ever released without noise.
    Guarantee: with ``stds`` from ``GaussianMechanism`` this is one Gaussian mechanism with the stated noise multiplier, up to what the
        event pays for rounding.
    Source: math.md section 1; ``StepNoise.added_to``.
    """
    groups, sums = group_of_parameter(plan), {}
    # A missing group raises before anything has been used up.
    shares = {name: stds[groups[name]] for name in total.sums}
    for stream, name in enumerate(shares):
        sums[name] = noisy(total.sums.pop(name), shares[name], noise, stream, total.kinds.get(name))
    counts = {}
    if plan.count is not None:  # released in every step, an empty batch included
        name = plan.count.name
        count = torch.tensor(float(total.counts.get(name, 0.0)), dtype=torch.float64)
        counts[name] = noisy(count, stds[name], noise, len(sums))
    return Grads(sums, total.stats, counts)


def noisy(value: Tensor, std: float, noise: StepNoise, stream: int, kind: torch.dtype | None = None) -> Tensor:
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
    drawn = np.float64 if kind == torch.float64 else np.float32
    if noise.kind == "secure" or (value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64)):
        host = value.detach().cpu()
        host = host if host.dtype in (torch.float32, torch.float64) else host.float()
        host = host.contiguous()  # torch turns channels round three times as fast as NumPy would
        return torch.from_numpy(noise.added_to(host.numpy(), stream, std, drawn)).to(value.device, kind)
    found = torch.from_numpy(noise.normal(stream, tuple(value.shape), drawn))
    return found.to(value.device, value.dtype).mul_(std).add_(value).to(kind)


def apply(model: nn.Module, optimizer: torch.optim.Optimizer, released: Grads, scale: float, learning_rate: float | None) -> None:
    """One optimizer step on the released sum.

    Args:
        model: the model.
        optimizer: any torch optimizer over its trainable parameters.
        released: the output of ``privatize``; used up.
        scale: ``1 / (q N)``, a constant.
        learning_rate: of this step; None leaves the optimizer's own as it is.
    """
    if learning_rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    parameters = trainable(model)
    for name, parameter in parameters.items():
        parameter.grad = released.sums.pop(name).to(parameter.dtype) * scale
    optimizer.step()
    for parameter in parameters.values():
        parameter.grad = None


def project(model: nn.Module, plan: Plan) -> dict[str, float]:
    """Restore the constraints that a proven bound rests on; clipping plans have none.

    Args:
        model: the model; its constrained weights are replaced.
        plan: the plan, with its graph.
    Returns:
        Certificates of the new weights.
    """
    return constrain(model, plan.graph) if plan.project and plan.graph is not None else {}


def constrain(model: nn.Module, graph: Graph, first: bool = False) -> dict[str, float]:
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
