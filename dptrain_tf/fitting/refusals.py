"""What private training refuses of a model, its optimizer and its data, before anything is spent."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dptrain.errors import ConfigError, DataError, UnsupportedModelError
from dptrain.sampling import take
from dptrain_tf.backend import CHUNK, TensorFlowBackend
from dptrain_tf.fitting import data as reading
from dptrain_tf.fitting.data import Data
from dptrain_tf.fitting.promise import Promise
from dptrain_tf.rules import children

OWN = ("compute_loss", "fit", "make_train_function", "train_on_batch", "train_step")  # a class's own versions would be passed over


def refuse_class(model: Any) -> None:
    """Refuse what is no Keras model, is private already, or has training methods of its own.

    Raises:
        ConfigError: with the reason.
    """
    if not isinstance(model, keras.Model):
        raise ConfigError(f"make_private takes a keras.Model, not {type(model).__name__}.")
    if isinstance(model.__dict__.get("privacy"), Promise):
        raise ConfigError(f"Model {model.name!r} is private already; call model.privacy.detach() first.")
    own = [name for name in OWN if getattr(type(model), name) is not getattr(keras.Model, name)]
    if own:
        raise ConfigError(
            f"{type(model).__name__} has its own {', '.join(own)}, which a private step cannot run; move the loss into compile(loss=...), "
            "one value per example."
        )
    if hasattr(model, "privacy"):
        raise ConfigError(f"{type(model).__name__} has an attribute privacy of its own; rename it.")


def check_optimizer(model: Any) -> None:
    """Refuse an optimizer that would undo a scaling of the loss which is not done here, or that knows other variables.

    Raises:
        ConfigError: with the reason.
    """
    optimizer = model.optimizer
    if optimizer is None:
        raise ConfigError("The model is compiled without an optimizer; give compile(optimizer=...).")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or getattr(optimizer, "loss_scale_factor", None):
        raise ConfigError(
            "The optimizer divides gradients by a scale of the loss that is not used here; compile again with the optimizer that is inside "
            "LossScaleOptimizer, or without loss_scale_factor."
        )
    if optimizer.built and model.built:
        known = {id(v) for v in getattr(optimizer, "_trainable_variables", model.trainable_variables)}
        if not {id(v) for v in model.trainable_variables} <= known:
            raise ConfigError("Variables have become trainable since the optimizer was built; compile again with a new optimizer.")


def refuse_added_losses(model: Any) -> None:
    """Refuse ``add_loss``, whose terms are not per example; called after a forward pass.

    Raises:
        UnsupportedModelError: lists the layers.
    """
    found = [layer.name for layer in children(model) if layer._losses]
    if found:
        raise UnsupportedModelError(
            [f"layer {name!r} calls add_loss, which is no per-example loss; put it into the loss." for name in found]
        )


def check_ids(executor: TensorFlowBackend, model: Any, data: Data) -> None:
    """Refuse token ids outside an embedding, before training: a step never raises on data (pitfalls.md G29).

    Where the values alone do not show that all are inside, every example goes through the model once.

    Raises:
        DataError: an id is outside.
    """
    sizes = [layer.input_dim for layer in children(model) if isinstance(layer, keras.layers.Embedding)]
    if not sizes or all(a.min() >= 0 and a.max() < min(sizes) for a in reading.leaves(data.x)):
        return
    run = tf.function(lambda x: model(x, training=False), autograph=False, reduce_retracing=True)
    try:
        for start in range(0, data.count, CHUNK):
            run(executor.tensor(take(data.x, np.arange(start, min(start + CHUNK, data.count)))))
    except tf.errors.InvalidArgumentError:
        raise DataError("The training data hold token ids that an embedding has no row for; correct them or raise its input_dim.") from None
