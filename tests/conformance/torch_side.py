"""The torch column of the conformance suite: oracle and public API, arrays in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import dptrain_torch as api
from dptrain_torch.losses import cross_entropy

NAME = "torch"
loss = cross_entropy


def tensor(x: np.ndarray) -> torch.Tensor:
    """An array as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(x))


def oracle(model: Any, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Per-example gradients ``[B, *shape]`` by one ordinary backward pass per example."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[np.ndarray]] = {n: [] for n in parameters}
    for i in range(len(x)):
        value = loss(model(tensor(x[i : i + 1])), tensor(y[i : i + 1])).sum()
        for n, g in zip(parameters, torch.autograd.grad(value, list(parameters.values()), allow_unused=True), strict=True):
            rows[n].append(np.zeros(parameters[n].shape) if g is None else g.numpy())
    return {n: np.stack(r) for n, r in rows.items()}


def norms(model: Any, x: np.ndarray, y: np.ndarray, strategy: str) -> np.ndarray:
    """Public diagnostics."""
    return api.per_sample_norms(model, loss, tensor(x), tensor(y), strategy, check=False).numpy()


def clipped(model: Any, x: np.ndarray, y: np.ndarray, max_grad_norm: float, strategy: Any, **settings: Any) -> dict[str, np.ndarray]:
    """Public diagnostics."""
    sums = api.clipped_sum(model, loss, tensor(x), tensor(y), max_grad_norm, strategy, check=False, **settings)
    return {n: v.numpy() for n, v in sums.items()}


def state(model: Any) -> dict[str, np.ndarray]:
    """Everything a user could find changed on the model."""
    return {n: v.detach().numpy().copy() for n, v in model.state_dict().items()}


def traces(model: Any) -> list[str]:
    """Things left behind on the user's objects."""
    left = []
    for name, module in model.named_modules():
        left += [f"{name}: hooks"] * bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        left += [f"{name}: forward"] * ("forward" in module.__dict__)
    left += [f"{n}: grad" for n, p in model.named_parameters() if p.grad is not None]
    return left
