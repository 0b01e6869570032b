"""What both children share: layers of a specification in Keras 2, data, and the plain step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

K = tf.keras.layers


def threads(request: dict[str, Any]) -> None:
    """Fix the number of threads, as in the parent's process."""
    tf.config.threading.set_intra_op_parallelism_threads(request["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(1)


def data(request: dict[str, Any]) -> tuple[tf.Tensor, tf.Tensor]:
    """A batch of the request's shape and its labels."""
    rng, shape = np.random.default_rng(0), (request["batch"], *request["input"])
    x = rng.integers(0, request["tokens"], shape) if request["tokens"] else rng.standard_normal(shape).astype(np.float32)
    return tf.constant(x), tf.constant(np.arange(request["batch"]) % request["classes"])


def ordinary(spec: dict[str, Any]) -> tf.keras.layers.Layer:
    """A layer of Keras.

    Raises:
        NotImplementedError: there is none here for the specification.
    """
    kind = spec["type"]
    if kind == "dense":
        return K.Dense(spec["units"], spec["activation"], spec["bias"])
    if kind == "conv2d" and isinstance(spec["padding"], str):
        return K.Conv2D(
            spec["filters"], spec["kernel_size"], spec["strides"], spec["padding"], dilation_rate=spec["dilation"], groups=spec["groups"],
            activation=spec["activation"], use_bias=spec["bias"],
        )  # fmt: skip
    if kind in ("max_pool", "avg_pool"):
        return (K.MaxPooling2D if kind == "max_pool" else K.AveragePooling2D)(spec["size"], spec["strides"] or spec["size"])
    if kind == "group_norm":
        return K.GroupNormalization(spec["groups"], epsilon=spec["epsilon"])
    if kind == "layer_norm":
        return K.LayerNormalization(epsilon=spec["epsilon"])
    if kind == "activation":
        return K.Activation(spec["function"])
    if kind == "flatten":
        return K.Flatten()
    raise NotImplementedError(f"The adapter has no layer {kind!r} in Keras 2.")


def sequential(request: dict[str, Any], layer: Callable[[dict[str, Any]], Any], make: Any = tf.keras.Sequential) -> Any:
    """A built model of the request's layers."""
    threads(request)
    first = tf.keras.layers.InputLayer(tuple(request["input"]), dtype=tf.int64 if request["tokens"] else tf.float32)
    return make([first, *(layer(spec) for spec in request["layers"])])


def stepping(train: Callable[[], tf.Tensor]) -> Callable[[], None]:
    """A step as one graph, which waits for its result."""
    graph = tf.function(train)

    def step() -> None:
        tf.nest.map_structure(lambda t: t.numpy(), graph())

    return step


def plain_step(model: tf.keras.Model, x: tf.Tensor, y: tf.Tensor, loss: Any, rate: float) -> Callable[[], None]:
    """``GradientTape`` in a ``tf.function``, as in Keras' guide to custom loops."""
    optimizer = tf.keras.optimizers.SGD(rate)
    optimizer.build(model.trainable_variables)

    def train() -> tf.Tensor:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))  # noqa: B905 - Python 3.9 has no ``strict``
        return value

    return stepping(train)
