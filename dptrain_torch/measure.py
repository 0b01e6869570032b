"""Times both norm methods of every layer once, on this machine and these shapes, for ``decision: measured``."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dptrain.predict import PRODUCT, work_of
from dptrain_torch.bare import BareCall
from dptrain_torch.describe import describe
from dptrain_torch.gradients import Batch, Loss, batch_size, call_model, call_uses, example_losses
from dptrain_torch.hooks import Call, Tap, find_units
from dptrain_torch.uses import DirectUse, Use, ghost_norm, instantiated


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Least wall time of a function over a few runs, after one to warm up."""
    best = float("inf")
    for i in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            best = min(best, time.perf_counter() - begin)
    return best


def ghost_way(use: Use, w: Tensor) -> None:
    """Ghost norm, then the weighted sum from activations and cotangents."""
    ghost_norm([use])
    use.weighted_sum(w)


def instantiate_way(use: Use, w: Tensor) -> None:
    """Per-sample gradient, its norm, and the weighted sum that reuses it."""
    instantiated(use)[1].weighted_sum(w)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds per second of the product that Gram matrices are made with.

    Args:
        device: where to measure.
        dtype: numbers to multiply.
    Returns:
        The rate.
    """
    x = torch.ones(*PRODUCT, device=device, dtype=dtype)
    return work_of(PRODUCT) / seconds(lambda: torch.bmm(x, x.transpose(1, 2)), device, repeats=5)


def time_norms(model: nn.Module, loss: Loss, batch: Batch) -> dict[str, dict[str, float]]:
    """Seconds per layer and method.

    Args:
        model: the model; left as it was.
        loss: per-example loss.
        batch: a physical batch of the size that training will use.
    Returns:
        Layer -> ``{"ghost": s, "instantiate": s}``, for layers that have a choice.
    """
    result: dict[str, dict[str, float]] = {}
    w = torch.ones_like(batch.mask, dtype=next(model.parameters()).dtype)

    def sink(call: Call | BareCall) -> None:
        for use in call_uses(call).values():
            if isinstance(use, DirectUse):
                continue
            times = result.setdefault(call.unit.name, {"ghost": 0.0, "instantiate": 0.0})
            times["ghost"] += seconds(partial(ghost_way, use, w), w.device)
            times["instantiate"] += seconds(partial(instantiate_way, use, w), w.device)

    size = batch_size(batch.x)
    with torch.enable_grad(), Tap(find_units(model, describe(model, batch.x).layers), size) as tap:
        losses = example_losses(loss, call_model(model, batch.x), batch.y, size)
    with torch.enable_grad():
        total = losses.sum()
    with torch.no_grad():
        tap.backward(total, sink)
    return result
