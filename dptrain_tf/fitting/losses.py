"""Per-example losses from what Keras' ``compile`` was given.

Keras resolves names, structures of outputs and loss weights (``CompileLoss``); what is changed is the reduction: each loss gives one value
per example, from that example alone. A mean over a batch would scale by its size, and a mean over the tokens that a mask leaves would let
one example change the others' scale (pitfalls.md G7, G27); both are taken over an example's own values here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers.compile_utils import CompileLoss
from tensorflow import Tensor

from dptrain.errors import ConfigError, DataError, UnsupportedModelError
from dptrain.losses import LossConfig


class ExampleLoss(CompileLoss):
    """The compiled loss of a model as ``loss(y, output) -> [B]``.

    Args:
        loss, loss_weights, output_names: as given to ``compile``.
        dtype: in which the losses of several outputs are added up.
    """

    _flat_losses: Any

    def __init__(self, loss: Any, loss_weights: Any = None, output_names: Any = None, dtype: str = "float32") -> None:
        self._sum_dtype = dtype
        super().__init__(loss, loss_weights, output_names=output_names)

    @property
    def dtype(self) -> str:
        """In which the losses of several outputs are added up."""
        return self._sum_dtype

    @property
    def metrics(self) -> list[Any]:
        """None: nothing is updated while a step sums."""
        return [None] * len(self._flat_losses or [None])

    def build(self, y_true: Any, y_pred: Any) -> None:
        """Resolve the losses, and take their reduction away."""
        super().build(y_true, y_pred)
        self._flat_losses = [entry._replace(loss=OneOutput(entry.loss, entry.name)) for entry in self._flat_losses]

    def check_labels(self, y: Any, example: Any, output: Any) -> None:
        """Refuse class labels that no output stands for: a step never raises on data (pitfalls.md G29).

        Args:
            y: all targets.
            example: synthetic targets.
            output: the model's outputs for synthetic examples.
        Raises:
            DataError: lists every such output.
        """
        self(example, output)  # builds it
        losses = [entry.loss for entry in self._flat_losses]
        for loss in losses:
            loss.checking = True
        try:
            self(y, output)
        finally:
            for loss in losses:
                loss.checking = False
        problems = [loss.problem for loss in losses if loss.problem]
        if problems:
            raise DataError(" ".join(problems))


class OneOutput:
    """The loss of one output, one value per example.

    Args:
        loss: a Keras loss; left as it is.
        name: of the output.
    """

    def __init__(self, loss: Any, name: str) -> None:
        self.reduction, self.name, self.checking, self.problem = loss.reduction, name, False, ""
        self.loss = object.__new__(type(loss))  # copy.copy would go through get_config, which keeps neither dtype nor state
        self.loss.__dict__.update(loss.__dict__, reduction="none")

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Tensor:
        """``[B]``."""
        size = tf.nest.flatten(y_pred)[0].shape[0]
        if self.checking:
            self.problem = label_problem(self.loss, self.name, y_true, y_pred)
            return tf.zeros([size])
        values, masks = self.values(y_true, y_pred)
        if not tf.is_tensor(values) or values.shape.rank == 0 or values.shape[0] != size:
            shape = tuple(values.shape) if tf.is_tensor(values) else type(values).__name__
            raise UnsupportedModelError(
                [
                    f"the loss {self.loss.name!r} returned {shape} for a batch of {size}, and must give values for each example, [B, ...]: "
                    "do not reduce over the batch in it."
                ]
            )
        seen = tf.ones([size, values.shape[1:].num_elements()], values.dtype)
        for mask in masks:
            if mask.shape != values.shape:
                raise UnsupportedModelError([f"the mask of output {self.name!r} has other axes than its loss; remove the mask before it."])
            seen = seen * tf.cast(tf.reshape(mask, [size, -1]), values.dtype)
        total = tf.reduce_sum(tf.reshape(values, [size, -1]) * seen, axis=1)
        return total if self.reduction == "sum" else total / tf.maximum(tf.reduce_sum(seen, axis=1), 1.0)

    def values(self, y_true: Any, y_pred: Any) -> tuple[Any, list[Any]]:
        """Values ``[B, ...]``, and masks of them: that of the output, and that of the loss, as where it ignores a class."""
        mask = None if tf.nest.is_nested(y_pred) else getattr(y_pred, "_keras_mask", None)
        if type(self.loss).__call__ is not keras.losses.Loss.__call__:  # a loss with a way of its own, which sees the output's mask itself
            found, own = self.loss(y_true, y_pred), None
        else:
            y_true, y_pred = (keras.tree.map_structure(self.convert, y) for y in (y_true, y_pred))
            found = self.loss.call(y_true, y_pred)
            own = getattr(found, "_keras_mask", None)
        return found, [m for m in (mask, own) if m is not None]

    def convert(self, x: Any) -> Tensor:
        """A tensor in the type of the loss, as Keras does it."""
        return keras.ops.convert_to_tensor(x, dtype=self.loss.dtype)


def label_problem(loss: Any, name: str, y: Any, output: Any) -> str:
    """A sentence about labels outside the classes of a sparse cross-entropy; empty for other losses."""
    function = getattr(loss, "fn", None)
    if not isinstance(loss, keras.losses.SparseCategoricalCrossentropy) and function is not keras.losses.sparse_categorical_crossentropy:
        return ""
    settings = {**getattr(loss, "_fn_kwargs", {})}
    classes = output.shape[settings.get("axis", -1) or -1]
    y = np.asarray(y)
    ignored = settings.get("ignore_class")
    used = y if ignored is None else y[y != ignored]
    fraction = used.dtype.kind == "f" and not (used == np.floor(used)).all()
    if not used.size or (used.min() >= 0 and used.max() < classes and not fraction):
        return ""
    return f"The targets of {name!r} must be whole numbers from 0 to {classes - 1}, the classes that there are outputs for; correct them."


@dataclass(frozen=True, eq=False)
class Weighted:
    """A loss times one weight per example, where there are weights.

    Args:
        loss: per-example loss.
        weighted: whether targets come as ``(y, weight)``.
    Guarantee: an example's weight scales its own loss alone, before its gradient is bounded.
    """

    loss: ExampleLoss
    weighted: bool

    def __call__(self, y: Any, output: Any) -> Tensor:
        """``[B]``."""
        if not self.weighted:
            return self.loss(y, output)
        y, weight = y
        losses = self.loss(y, output)
        return losses * tf.cast(weight, losses.dtype)

    def check_labels(self, y: Any, example: Any, output: Any) -> None:
        """As ``ExampleLoss.check_labels``, without weights."""
        self.loss.check_labels(y, example, output)


class MeanBinary:
    """Constant of the mean over K outputs of logistic losses: K entries of at most 1 / K."""

    @staticmethod
    def lipschitz(num_outputs: int) -> float:
        """``1 / sqrt(K)``."""
        return 1.0 / math.sqrt(num_outputs)


def constant_of(loss: Any) -> Any:
    """Something with ``lipschitz(num_outputs)`` for a loss whose constant in the output is known, else None.

    Args:
        loss: as given to ``compile``.
    Guarantee: none is needed; ``clipless`` enforces the constant on every example's loss gradient.
    """
    if callable(getattr(loss, "lipschitz", None)):
        return loss
    if getattr(loss, "from_logits", False):
        if isinstance(loss, keras.losses.SparseCategoricalCrossentropy | keras.losses.CategoricalCrossentropy):
            return LossConfig(name="cross_entropy")
        if isinstance(loss, keras.losses.BinaryCrossentropy):
            return MeanBinary()
    return None


def example_loss(model: Any, weighted: bool, dtype: str) -> Weighted:
    """The per-example loss of a compiled model.

    Args:
        model: the model.
        weighted: whether targets come as ``(y, weight)``.
        dtype: in which losses are added up.
    Raises:
        ConfigError: there is none.
    """
    compiled = model._compile_loss
    if compiled is None:
        raise ConfigError("The model is compiled without a loss; give compile(loss=...), one value per example.")
    return Weighted(ExampleLoss(compiled._user_loss, compiled._user_loss_weights, compiled.output_names, dtype), weighted)
