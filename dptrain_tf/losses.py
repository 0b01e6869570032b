"""Per-example losses by name, ``loss(y, output) -> [B]``; formulas in ``dptrain/losses.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow import Tensor

from dptrain.errors import ConfigError
from dptrain.losses import SETTINGS, LossConfig, loss_config


def rows(x: Tensor, like: Tensor) -> Tensor:
    """``[B, ...]`` as ``[B, n]``, in the type of another tensor."""
    batch = tf.shape(like)[0] if like.shape[0] is None else like.shape[0]  # unknown in Keras' own evaluate
    return tf.reshape(tf.cast(x, like.dtype), [batch, -1])


def labels(y: Tensor) -> Tensor:
    """Class labels ``[B]``."""
    return tf.cast(tf.reshape(y, [-1]), tf.int64)


def targets(y: Tensor, output: Tensor) -> Tensor:
    """``[B, K]``: True at the target; with one output, where the label is 1."""
    count = output.shape[1]
    return labels(y)[:, None] == (1 if count == 1 else tf.range(count, dtype=tf.int64)[None])


def cross_entropy(y: Tensor, output: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax cross-entropy of logits ``[B, K]`` with labels ``[B]``."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels(y), output * temperature) / temperature


def binary_cross_entropy(y: Tensor, output: Tensor, temperature: float = 1.0) -> Tensor:
    """Logistic loss of one logit per example, ``[B]`` or ``[B, 1]``, with labels 0 and 1.

    Other targets count as the nearest between 0 and 1, since the gradient's bound rests on it.
    """
    output = tf.reshape(output, [output.shape[0]])
    y = tf.clip_by_value(tf.cast(tf.reshape(y, [-1]), output.dtype), 0.0, 1.0)
    return tf.nn.sigmoid_cross_entropy_with_logits(y, output * temperature) / temperature


def mean_squared_error(y: Tensor, output: Tensor) -> Tensor:
    """Mean over an example's outputs of the squared error."""
    return tf.reduce_mean(tf.square(rows(output, output) - rows(y, output)), axis=1)


def mean_absolute_error(y: Tensor, output: Tensor) -> Tensor:
    """Mean over an example's outputs of the absolute error."""
    return tf.reduce_mean(tf.abs(rows(output, output) - rows(y, output)), axis=1)


def multiclass_hinge(y: Tensor, output: Tensor, margin: float = 1.0) -> Tensor:
    """Hinge of every output against half the margin; the target's weighs as much as all others."""
    output = rows(output, output)
    target = targets(y, output)
    missing = tf.nn.relu(margin / 2 - tf.where(target, output, -output))
    return tf.reduce_mean(tf.where(target, missing * max(output.shape[1] - 1, 1), missing), axis=1)


def cosine_similarity(y: Tensor, output: Tensor, min_norm: float = 1.0) -> Tensor:
    """Minus the cosine of the angle between the output and the one-hot target; outputs shorter than ``min_norm`` are divided by it."""
    output = rows(output, output)
    largest = tf.maximum(tf.reduce_max(tf.abs(output), axis=1, keepdims=True), min_norm)
    largest = tf.stop_gradient(largest)  # entries at most 1 after division: the squares cannot overflow
    unit, floor = output / largest, min_norm / largest
    square = tf.reduce_sum(unit * unit, axis=1, keepdims=True)
    long = square > floor * floor
    length = tf.where(long, tf.sqrt(tf.where(long, square, tf.ones_like(square))), floor)
    count = output.shape[1]
    hot = tf.one_hot(labels(y), count, dtype=output.dtype) if count > 1 else tf.ones_like(output)
    return -tf.reduce_sum(hot * (unit / length), axis=1)


def kr(y: Tensor, output: Tensor, priors: Sequence[float] | None = None) -> Tensor:
    """Kantorovich-Rubinstein: each output's mean off its class minus that on it, weighed by public priors, uniform by default."""
    output = rows(output, output)
    pi = LossConfig(name="kr", priors=None if priors is None else tuple(priors)).class_priors(output.shape[1])
    on, off = (tf.constant([[1 / p for p in ps]], output.dtype) for ps in (pi, [1 - p for p in pi]))
    return tf.reduce_mean(tf.where(targets(y, output), -on, off) * output, axis=1)


def hkr(y: Tensor, output: Tensor, priors: Sequence[float] | None = None, margin: float = 1.0, alpha: float = 10.0) -> Tensor:
    """``kr`` plus ``alpha`` times ``multiclass_hinge``."""
    return kr(y, output, priors) + alpha * multiclass_hinge(y, output, margin)


LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mean_squared_error": mean_squared_error,
    "mean_absolute_error": mean_absolute_error,
    "multiclass_hinge": multiclass_hinge,
    "cosine_similarity": cosine_similarity,
    "kr": kr,
    "hkr": hkr,
}


@dataclass(frozen=True)
class Loss:
    """A loss with its settings: ``loss(y, output) -> [B]``.

    Args:
        config: its settings.
    Guarantee: an example whose loss is not finite, whatever its output or target hold, has the gradient zero, so it cannot poison a sum.
    """

    config: LossConfig

    def __call__(self, y: Any, output: Any) -> Tensor:
        """One value per example."""
        output, y = tf.convert_to_tensor(output), tf.convert_to_tensor(y)
        settings = {name: getattr(self.config, name) for name in SETTINGS[self.config.name]}
        function = LOSSES[self.config.name]
        values = tf.stop_gradient(function(y, output, **settings))
        finite = tf.math.is_finite(values)

        def chosen(x: Tensor) -> Tensor:
            return tf.where(tf.reshape(finite, [-1] + [1] * (x.shape.rank - 1)), x, tf.zeros_like(x))

        return tf.where(finite, function(chosen(y), chosen(output), **settings), values)

    def lipschitz(self, num_outputs: int) -> float | None:
        """Lipschitz constant in one example's output, None where there is none."""
        return self.config.lipschitz(num_outputs)


def get_loss(loss: str | LossConfig, num_outputs: int | None = None) -> Loss:
    """The loss of a name or of a configuration.

    Args:
        loss: its name, or its settings.
        num_outputs: K, to check the settings against; they are checked at the first call otherwise.
    Returns:
        ``loss(y, output) -> [B]``, with ``config`` and ``lipschitz(num_outputs)``.
    Raises:
        ConfigError: unknown name, or settings that do not fit the outputs.
    """
    if isinstance(loss, str) and loss not in LOSSES:
        raise ConfigError(f"There is no loss {loss!r}; choose one of {', '.join(LOSSES)}.")
    config = loss_config(loss)
    if num_outputs is not None and "priors" in SETTINGS[config.name]:
        try:
            config.class_priors(num_outputs)
        except ValueError as error:
            raise ConfigError(f"{error}.") from None
    return Loss(config)
