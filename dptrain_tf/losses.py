"""Per-example losses by name, ``loss(y, output) -> [B]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tensorflow as tf
from tensorflow import Tensor

from dptrain.errors import ConfigError


def rows(x: Tensor, like: Tensor) -> Tensor:
    """``[B, ...]`` as ``[B, n]``, in the type of another tensor."""
    return tf.reshape(tf.cast(x, like.dtype), [like.shape[0], -1])


def cross_entropy(y: Tensor, output: Tensor) -> Tensor:
    """Softmax cross-entropy of logits ``[B, K]`` with labels ``[B]``."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(tf.reshape(y, [-1]), tf.int64), output)


def binary_cross_entropy(y: Tensor, output: Tensor) -> Tensor:
    """Logistic loss of one logit per example, ``[B]`` or ``[B, 1]``, with labels 0 and 1."""
    return tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(tf.reshape(y, [-1]), output.dtype), tf.reshape(output, [output.shape[0]]))


def mean_squared_error(y: Tensor, output: Tensor) -> Tensor:
    """Mean over an example's outputs of the squared error."""
    return tf.reduce_mean(tf.square(rows(output, output) - rows(y, output)), axis=1)


def mean_absolute_error(y: Tensor, output: Tensor) -> Tensor:
    """Mean over an example's outputs of the absolute error."""
    return tf.reduce_mean(tf.abs(rows(output, output) - rows(y, output)), axis=1)


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mean_squared_error": mean_squared_error,
    "mean_absolute_error": mean_absolute_error,
}


def get_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in LOSSES:
        raise ConfigError(f"There is no loss {name!r}; choose one of {', '.join(LOSSES)}.")
    return LOSSES[name]
