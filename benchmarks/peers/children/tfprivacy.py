"""TensorFlow Privacy under its own interpreter: as its Keras tutorial, or as the docstring of its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tensorflow_privacy
from keras2 import data, ordinary, plain_step, sequential, stepping
from tensorflow_privacy.privacy.fast_gradient_clipping import layer_registry


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on."""
    return {"tensorflow": tf.__version__, "tensorflow-privacy": tensorflow_privacy.__version__}


def plain(request: dict[str, Any]) -> Callable[[], None]:
    """The non-private step."""
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return plain_step(sequential(request, ordinary), *data(request), loss, request["learning_rate"])


def private(request: dict[str, Any]) -> Callable[[], None]:
    """The step that ``fit`` takes."""
    model = {"vectorized": with_optimizer, "dp_model": with_model}[request["way"]](request)
    batch = data(request)
    return stepping(lambda: model.train_step(batch))


def with_optimizer(request: dict[str, Any]) -> tf.keras.Model:
    """A plain model and the vectorized optimizer, one microbatch per example, with the losses of all examples."""
    optimizer = tensorflow_privacy.VectorizedDPKerasSGDOptimizer(
        l2_norm_clip=request["max_grad_norm"], noise_multiplier=request["noise_multiplier"], num_microbatches=request["batch"],
        learning_rate=request["learning_rate"],
    )  # fmt: skip
    model = sequential(request, ordinary)
    model.compile(optimizer, tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none"))
    return model


def with_model(request: dict[str, Any]) -> tf.keras.Model:
    """Its model, with fast gradient clipping if all layers are in the registry, else with per-example gradients."""

    def make(layers: list[Any]) -> tf.keras.Model:
        registry = layer_registry.make_default_layer_registry()
        norm, noise = request["max_grad_norm"], request["noise_multiplier"]
        return tensorflow_privacy.DPSequential(norm, noise, use_xla=False, layer_registry=registry, layers=layers)

    model = sequential(request, ordinary, make)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf.keras.optimizers.SGD(request["learning_rate"]), loss)
    return model
