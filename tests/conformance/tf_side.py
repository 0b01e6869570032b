"""The TensorFlow column of the conformance suite: oracle and public API, arrays in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

import dptrain_tf as api
from dptrain_tf.losses import cross_entropy

NAME = "tensorflow"
loss = cross_entropy


def tensor(x: np.ndarray) -> tf.Tensor:
    """An array as a tensor."""
    return tf.convert_to_tensor(x)


def oracle(model: Any, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Per-example gradients ``[B, *shape]`` by one ordinary backward pass per example."""
    variables = list(model.trainable_variables)
    rows: dict[str, list[np.ndarray]] = {v.path: [] for v in variables}
    # TensorFlow 2.21 on CPU reads out of bounds in the filter gradient of strided 1x1 convolutions; XLA does not.
    jit = any(getattr(m, "kernel_size", 0) == (1, 1) and m.strides != (1, 1) for m in model.layers)

    @tf.function(autograph=False, jit_compile=jit)
    def gradients(one: Any, target: Any) -> Any:
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(loss(target, model(one)))
        return tape.gradient(value, variables)

    for i in range(len(x)):
        for v, g in zip(variables, gradients(tensor(x[i : i + 1]), tensor(y[i : i + 1])), strict=True):
            rows[v.path].append(np.zeros(v.shape) if g is None else tf.convert_to_tensor(g).numpy())
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
    return {v.path: v.numpy() for v in model.variables}


def traces(model: Any) -> list[str]:
    """Things left behind on the user's objects."""
    left = []
    for layer in model._flatten_layers():
        left += [f"{layer.name}: call"] * ("call" in layer.__dict__)
    return left
