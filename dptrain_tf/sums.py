"""What the API and the self-check share: whole batches, parts of them, and the bounded sums of the training step outside of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
import tensorflow as tf
from keras.src.layers.convolutional.base_conv import BaseConv
from tensorflow import Tensor

from dptrain.info import ModelInfo
from dptrain.plan import Plan
from dptrain.strategies import get_strategy
from dptrain_tf.describe import take, tensors
from dptrain_tf.gradients import Batch, Grads, Loss, batch_size, bounded_sum
from dptrain_tf.lipschitz import LossGradientClip
from dptrain_tf.rules import children
from dptrain_tf.uses import compiled_by_xla

NORM_OF = "norm of group "  # in the name of a traced result that is no sum


def attained(model: Any, loss: Loss, x: Any, y: Any, plan: Plan) -> dict[str, tuple[float, float]]:
    """Group -> largest per-sample gradient norm in a batch, and the bound of a plan with proven bounds."""
    members = {group.name: group.layers for group in plan.gradient_groups}
    info = ModelInfo(plan.layers)
    measuring = get_strategy("mixed_ghost", grouping=members).plan(info).with_clip_norm(float("inf"))
    clip = LossGradientClip(plan.loss_clip or float("inf"))
    norms: dict[str, Tensor] = {}
    checked_sum(model, lambda target, output: loss(target, clip(output)), full_batch(x, y), measuring, norms_out=norms)
    return {g.name: (float(tf.reduce_max(norms[g.name])) if g.name in norms else 0.0, g.norm_bound) for g in plan.gradient_groups}


def full_batch(x: Any, y: Any) -> Batch:
    """All examples as one physical batch without padding."""
    x = tensors(x)
    return Batch(x, tensors(y), tf.ones([batch_size(x)], tf.bool))


def checked_sum(
    model: Any,
    loss: Loss,
    batch: Batch,
    plan: Plan,
    norms_out: dict[str, Tensor] | None = None,
    two_pass: bool = False,
    training: bool = False,
    keep_sums: bool = False,
) -> Grads:
    """``bounded_sum`` outside the training loop; where it has to be traced, it gives norms or sums, and both with ``keep_sums``."""
    if norms_out is None or not hazardous(model):
        return safely(
            model,
            batch,
            lambda b: bounded_sum(model, loss, b, plan, two_pass=two_pass, norms_out=norms_out, training=training),
            jit=two_pass,
        )

    def with_norms(b: Batch) -> Grads:
        norms: dict[str, Tensor] = {}
        grads = bounded_sum(model, loss, b, plan, two_pass=two_pass, norms_out=norms, training=training)
        marked = {f"{NORM_OF}{name}": norm for name, norm in norms.items()}
        return Grads(marked | (grads.sums if keep_sums else {}), grads.stats, grads.identifiers)

    found = safely(model, batch, with_norms)
    norms_out.update({name.removeprefix(NORM_OF): value for name, value in found.sums.items() if name.startswith(NORM_OF)})
    sums = {name: value for name, value in found.sums.items() if not name.startswith(NORM_OF)}
    return Grads(sums, found.stats, found.identifiers)


def safely(model: Any, batch: Batch, function: Callable[[Batch], Grads], jit: bool = False) -> Grads:
    """Run a sum eagerly, or, for a hazardous model, traced: there the unwanted filter gradients are pruned, or compiled by XLA."""
    with sliced(model):
        if not hazardous(model):
            return function(batch)
        found: list[Grads] = []

        @tf.function(autograph=False, jit_compile=jit)
        def traced(x: Any, y: Any, mask: Any) -> Any:
            with compiled_by_xla(jit):
                found.append(function(Batch(x, y, mask)))
            return list(found[-1].sums.values()), found[-1].stats

        sums, stats = traced(batch.x, batch.y, batch.mask)
        return Grads(dict(zip(found[-1].sums, sums, strict=True)), stats, found[-1].identifiers)


def skips(layer: Any) -> bool:
    """Whether a layer is a strided convolution with a 1x1 kernel.

    TensorFlow 2.21 on CPU may read out of bounds in the ordinary filter gradient of such a layer.
    """
    kernel, strides = getattr(layer, "kernel_size", ()), getattr(layer, "strides", ())
    return isinstance(kernel, tuple) and bool(kernel) and max(kernel) == 1 and isinstance(strides, tuple) and max(strides) > 1


def hazardous(model: Any) -> bool:
    """Whether there is a strided convolution with a 1x1 kernel that ``sliced`` cannot make safe."""
    return any(skips(layer) and not sliceable(layer) for layer in children(model))


def sliceable(layer: Any) -> bool:
    """Whether a layer convolves with Keras' own ``convolution_op``."""
    return isinstance(layer, BaseConv) and type(layer).call is BaseConv.call and type(layer).convolution_op is BaseConv.convolution_op


@contextmanager
def sliced(model: Any) -> Iterator[None]:
    """Let strided convolutions with a 1x1 kernel slice their input and convolve what is left, which is the same and safe.

    XLA would be safe as well, but what it compiles is never freed: 150 MiB for the self-check of a ResNet-18.
    """
    layers = [layer for layer in children(model) if skips(layer) and sliceable(layer) and "convolution_op" not in layer.__dict__]
    for layer in layers:
        layer.__dict__["convolution_op"] = partial(convolve_slices, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["convolution_op"]


def convolve_slices(layer: Any, inputs: Any, kernel: Any) -> Any:
    """What ``layer.convolution_op`` computes for a 1x1 kernel, which needs no padding whatever the layer says."""
    every = [slice(None, None, step) for step in layer.strides]
    axes = [slice(None), *every] if layer.data_format == "channels_last" else [slice(None), slice(None), *every]
    return keras.ops.conv(inputs[tuple(axes)], kernel, strides=1, padding="valid", data_format=layer.data_format)


def pair(x: Any) -> Any:
    """Two examples of a batch."""
    return take(x, [i % batch_size(tensors(x)) for i in range(2)])


def finite(x: Any) -> Any:
    """A batch with zeros in place of what is not finite: the probe is about the model, not about the data."""
    return tf.nest.map_structure(lambda t: tf.where(tf.math.is_finite(t), t, tf.zeros_like(t)) if t.dtype.is_floating else t, x)
