"""LipDP under its own interpreter: the layers and the training step of its README."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deel.lip
import deel.lipdp
import tensorflow as tf
from deel.lipdp import layers as L
from deel.lipdp.losses import DP_TauCategoricalCrossentropy
from deel.lipdp.model import DP_Sequential, DPParameters
from deel.lipdp.pipeline import DatasetMetadata
from keras2 import data, ordinary, plain_step, sequential, stepping


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on."""
    return {"tensorflow": tf.__version__, "deel-lip": deel.lip.__version__, "lipdp": deel.lipdp.__version__}


def without_weights(spec: dict[str, Any]) -> tf.keras.layers.Layer:
    """A layer that has no weights: the same in the plain network and in the private one.

    Raises:
        NotImplementedError: LipDP has no such layer.
    """
    kind = spec["type"]
    if kind == "bounded_input":
        return L.DP_BoundedInput(upper_bound=spec["norm"])
    if kind == "group_sort":
        return L.DP_GroupSort(spec["size"])
    if kind == "scaled_l2_norm_pool":
        return L.DP_ScaledL2NormPooling2D(pool_size=spec["size"], strides=spec["size"])
    if kind == "flatten":
        return L.DP_Flatten()
    raise NotImplementedError(f"The adapter has no layer {kind!r} of LipDP.")


def unconstrained(spec: dict[str, Any]) -> tf.keras.layers.Layer:
    """A layer of the plain network."""
    if spec["type"] == "spectral_conv2d":
        return ordinary({**spec, "type": "conv2d", "groups": 1, "activation": None})
    if spec["type"] == "spectral_dense":
        return ordinary({**spec, "type": "dense", "activation": None})
    return without_weights(spec)


def constrained(way: str) -> Callable[[dict[str, Any]], tf.keras.layers.Layer]:
    """Layers of the private network: with a constraint after each step (``quick``), or normalised in the forward pass.

    Raises:
        NotImplementedError: LipDP has no such layer.
    """
    prefix = {"quick": "DP_QuickSpectral", "spectral": "DP_Spectral"}[way]
    conv, dense = getattr(L, prefix + "Conv2D"), getattr(L, prefix + "Dense")

    def layer(spec: dict[str, Any]) -> tf.keras.layers.Layer:
        if spec.get("bias"):
            raise NotImplementedError("LipDP's layers have no bias.")
        if spec["type"] == "spectral_conv2d":
            return conv(filters=spec["filters"], kernel_size=spec["kernel_size"], strides=spec["strides"], padding=spec["padding"])
        if spec["type"] == "spectral_dense":
            return dense(spec["units"])
        return without_weights(spec)

    return layer


def batch_and_loss(request: dict[str, Any]) -> tuple[tf.Tensor, tf.Tensor, Any]:
    """The batch, its labels as LipDP takes them, and the loss."""
    x, y = data(request)
    return x, tf.one_hot(y, request["classes"]), DP_TauCategoricalCrossentropy(1.0)


def plain(request: dict[str, Any]) -> Callable[[], None]:
    """The non-private step of the same network without constraints."""
    return plain_step(sequential(request, unconstrained), *batch_and_loss(request), request["learning_rate"])


def private(request: dict[str, Any]) -> Callable[[], None]:
    """The step that ``fit`` takes: bounds, noise, update, constraints."""
    batch = request["batch"]
    bound = next(spec["norm"] for spec in request["layers"] if spec["type"] == "bounded_input")
    about = DatasetMetadata(
        tuple(request["input"]), request["classes"], 50 * batch, batch, [str(i) for i in range(request["classes"])], 50, batch, bound
    )
    parameters = DPParameters("per-layer", request["noise_multiplier"], 1e-5)

    def make(layers: list[Any]) -> DP_Sequential:
        return DP_Sequential(layers, dp_parameters=parameters, dataset_metadata=about)

    model = sequential(request, constrained(request["way"]), make)
    x, y, loss = batch_and_loss(request)
    model.compile(tf.keras.optimizers.SGD(request["learning_rate"]), loss)
    return stepping(lambda: model.train_step((x, y)))
