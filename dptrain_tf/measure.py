"""Times both norm methods of every layer once, on this machine and these shapes, for ``decision: measured``."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf

from dptrain.predict import PRODUCT, work_of
from dptrain_tf.describe import describe
from dptrain_tf.gradients import Batch, Loss, batch_size, call_model, call_uses, example_losses
from dptrain_tf.hooks import Call, Tap, find_units, layouts_of
from dptrain_tf.uses import DirectUse, Use, ghost_norm


def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Least wall time of a function over a few runs, after one to warm up."""
    best = float("inf")
    for i in range(repeats + 1):
        begin = time.perf_counter()
        tf.nest.map_structure(lambda tensor: tensor.numpy().size, function())  # waits for the device
        if i:
            best = min(best, time.perf_counter() - begin)
    return best


def ghost_way(use: Use, w: Any) -> Any:
    """Ghost norm, then the weighted sum from activations and cotangents."""
    return ghost_norm([use]), use.weighted_sum(w)


def instantiate_way(use: Use, w: Any) -> Any:
    """Per-sample gradient, its norm, and the weighted sum that reuses it."""
    square, kept = use.in_parts()
    return square, kept.weighted_sum(w)


def product_rate() -> float:
    """Multiply-adds per second of the product that Gram matrices are made with.

    Returns:
        The rate.
    """
    x = tf.ones(PRODUCT)
    return work_of(PRODUCT) / seconds(lambda: tf.reduce_sum(tf.matmul(x, x, transpose_b=True)), repeats=5)


def time_norms(model: Any, loss: Loss, batch: Batch) -> dict[str, dict[str, float]]:
    """Seconds per layer and method.

    Args:
        model: the model; left as it was.
        loss: per-example loss.
        batch: a physical batch of the size that training will use.
    Returns:
        Layer -> ``{"ghost": s, "instantiate": s}``, for layers that have a choice.
    """
    result: dict[str, dict[str, float]] = {}

    def sink(call: Call) -> None:
        for use in call_uses(call).values():
            if isinstance(use, DirectUse):
                continue
            times = result.setdefault(call.unit.name, {"ghost": 0.0, "instantiate": 0.0})
            times["ghost"] += seconds(partial(ghost_way, use, w))
            times["instantiate"] += seconds(partial(instantiate_way, use, w))

    size = batch_size(batch.x)
    layouts = layouts_of(describe(model, batch.x).layers)
    with Tap(find_units(model, True), size, True, layouts=layouts) as tap:
        losses = example_losses(loss, call_model(model, batch.x, True), batch.y, size)
    w = tf.ones_like(losses)
    tap.backward(losses, w, sink)
    return result
