# ruff: noqa: N801, N803 -- the names of LipDP
"""LipDP's losses by their names: the per-example losses of ``dptrain_tf.losses`` as Keras losses.

``get_L`` is the true constant of one example's loss in that example's output. Training takes one value per example, sums, and divides by
the expected batch size, whatever ``reduction`` says; ``evaluate`` shows the mean. Targets are one-hot or integer labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from pydantic import ValidationError

from dptrain.errors import ConfigError, DataError
from dptrain.losses import LOSSES, LossConfig, LossName
from dptrain_tf.losses import get_loss
from dptrain_tf.own import registered

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight", "auto", "none", None)


class DP_Loss(keras.losses.Loss):
    """Base of the losses here; ``kind`` is the loss of ``dptrain.losses``.

    Args:
        reduction: how ``evaluate`` reduces; "sum" is refused, since it meant another learning rate for each batch size.
        name: of the loss.
        settings: of ``LossConfig``.
    """

    kind: LossName

    def __init__(self, reduction: str | None = "sum_over_batch_size", name: str | None = None, **settings: Any) -> None:
        shown = type(self).__name__
        if reduction not in MEANS:
            raise ConfigError(f"{shown} has no reduction {reduction!r}, since steps divide by the expected batch size; remove it.")
        try:
            self.config = LossConfig(name=self.kind, **settings)
        except ValidationError as error:
            raise ConfigError(f"{shown}: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from None
        super().__init__(name=name, reduction="none" if reduction in ("none", None) else "sum_over_batch_size")
        self.examples = get_loss(self.config)
        self.num_outputs: int | None = None  # of the model it is compiled into

    def lipschitz(self, num_outputs: int) -> float | None:
        """Lipschitz constant in one example's output of a size."""
        return self.config.lipschitz(num_outputs)

    def get_L(self) -> float:  # noqa: N802
        """Lipschitz constant in one example's output.

        Returns:
            That of the model's number of outputs, once the loss is compiled into one. Before, the largest over all numbers of outputs that
            fit the priors: where priors are uniform that is the constant of one output, since ``kr`` has ``sqrt(1 + 1 / (K - 1))`` for
            K > 1 and 2 for K = 1, the hinge ``sqrt((K - 1) / K)`` and 1, and a mean of K absolute values ``1 / sqrt(K)`` and 1.
        """
        priors = self.config.priors
        sizes = (1,) if priors is None else (1, 2) if len(priors) == 2 else (len(priors),)
        found = [self.config.lipschitz(k) for k in ((self.num_outputs,) if self.num_outputs else sizes)]
        return max(value for value in found if value is not None)

    def targets(self, y: Any, num_outputs: int) -> np.ndarray:
        """Training targets in the form that the training step takes.

        Args:
            y: ``[N]``, ``[N, 1]``, or one-hot ``[N, K]``.
            num_outputs: K.
        Raises:
            DataError: they are neither.
        """
        y = np.asarray(y)
        if LOSSES[self.kind].targets == "values":
            if y.size == len(y) and num_outputs > 1:
                y = one_hot(y.reshape(-1), num_outputs)
            return np.asarray(y, np.float32)
        if y.ndim == 2 and y.shape[1] > 1:
            hot = y.shape[1] == num_outputs and bool(((y == 0) | (y == 1)).all() and (y.sum(axis=1) == 1).all())
            if not hot:
                raise DataError(f"Targets of shape {y.shape} are not one-hot over {num_outputs} outputs; give labels or one-hot rows.")
            y = y.argmax(axis=1)
        y = y.reshape(-1)
        if not np.isfinite(y).all() or not (y == np.floor(y)).all() or y.min(initial=0) < 0 or y.max(initial=0) >= max(2, num_outputs):
            raise DataError(f"Targets must be labels from 0 to {max(2, num_outputs) - 1} or one-hot rows; correct them.")
        return y.astype(np.int64)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per example."""
        outputs = math.prod(y_pred.shape[1:])
        if LOSSES[self.kind].targets == "values":
            if outputs > 1 and math.prod(y_true.shape[1:]) == 1:
                y_true = tf.one_hot(tf.cast(tf.reshape(y_true, [-1]), tf.int64), outputs, dtype=y_pred.dtype)
        elif y_true.shape.rank == 2 and y_true.shape[1] > 1:
            y_true = tf.argmax(y_true, axis=1)
        if y_pred.shape[0] is not None:
            return self.examples(y_true, y_pred)
        # The losses take batches of known size; one example at a time always has one.
        return tf.map_fn(lambda one: self.examples(one[0][None], one[1][None])[0], (y_true, y_pred), fn_output_signature=y_pred.dtype)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {"name": self.name, "reduction": self.reduction, **self.arguments()}

    def arguments(self) -> dict[str, Any]:
        """Those of the class."""
        return {}


def one_hot(y: np.ndarray, classes: int) -> np.ndarray:
    """Labels as rows."""
    if not (y == np.floor(y)).all() or y.min(initial=0) < 0 or y.max(initial=0) >= classes:
        raise DataError(f"Targets must be labels from 0 to {classes - 1} or arrays of the output's shape; correct them.")
    return np.eye(classes, dtype=np.float32)[y.astype(np.int64)]


@registered
class DP_KCosineSimilarity(DP_Loss):
    """Minus the cosine of the angle between output and target; outputs shorter than K are divided by K. L = 1 / K.

    LipDP divided the target by K too where K > 1, so that its loss was 1 / K of this one.

    Args:
        K: shortest length that is normalised.
        axis: -1.
        reduction, name: as in ``DP_Loss``.
    """

    kind = "cosine_similarity"

    def __init__(
        self, K: float = 1.0, axis: int = -1, reduction: str | None = "sum_over_batch_size", name: str = "cosine_similarity"
    ) -> None:
        if axis != -1:
            raise ConfigError(f"DP_KCosineSimilarity takes the angle of the whole output, axis=-1, not axis={axis!r}; remove it.")
        super().__init__(reduction, name, min_norm=float(K))

    def arguments(self) -> dict[str, Any]:
        """Those of the class."""
        return {"K": self.config.min_norm}


class _Tau(DP_Loss):
    """A cross-entropy with temperature.

    Args:
        tau: temperature: the loss of tau times the logits, divided by tau.
        reduction, name: as in ``DP_Loss``.
    """

    def __init__(self, tau: float, reduction: str | None = "sum_over_batch_size", name: str | None = None) -> None:
        super().__init__(reduction, name or type(self).__name__.removeprefix("DP_"), temperature=float(tau))

    def arguments(self) -> dict[str, Any]:
        """Those of the class."""
        return {"tau": self.config.temperature}


@registered
class DP_TauCategoricalCrossentropy(_Tau):
    __doc__ = "Softmax cross-entropy of logits. L = sqrt(2).\n" + (_Tau.__doc__ or "").partition("\n")[2]
    kind = "cross_entropy"


@registered
class DP_TauBCE(_Tau):
    __doc__ = "Logistic loss of one logit. L = 1.\n" + (_Tau.__doc__ or "").partition("\n")[2]
    kind = "binary_cross_entropy"


class _Multiclass(DP_Loss):
    """What the three multiclass losses share."""

    def __init__(self, reduction: str | None, name: str, multi_gpu: bool = False, **settings: Any) -> None:
        shown = type(self).__name__
        if multi_gpu:
            raise ConfigError(f"{shown}: multi_gpu prepares labels with counts of the batch; remove it.")
        if isinstance(settings.get("priors"), str):
            raise ConfigError(f"{shown} takes public class probabilities as priors; counts of a batch would couple its examples.")
        if settings.get("priors") is not None:
            settings["priors"] = tuple(float(p) for p in settings["priors"])
        super().__init__(reduction, name, **settings)


@registered
class DP_MulticlassKR(_Multiclass):
    """Kantorovich-Rubinstein term of every output against the others, averaged. L depends on the priors.

    LipDP weighted examples by the class counts of their batch, which couples them (pitfalls.md L4).

    Args:
        priors: public class probabilities; uniform by default. Never count them in private data.
        reduction, name: as in ``DP_Loss``.
        multi_gpu: False.
    """

    kind = "kr"

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str = "MulticlassKR",
        priors: Sequence[float] | None = None,
        multi_gpu: bool = False,
    ) -> None:
        super().__init__(reduction, name, multi_gpu, priors=priors)

    def arguments(self) -> dict[str, Any]:
        """Those of the class."""
        return {"priors": self.config.priors}


@registered
class DP_MulticlassHinge(_Multiclass):
    """Hinge of every output against half the margin, averaged. L = sqrt((K - 1) / K), or 1 for one output.

    Args:
        min_margin: margin.
        reduction, name: as in ``DP_Loss``.
    """

    kind = "multiclass_hinge"

    def __init__(self, min_margin: float = 1.0, reduction: str | None = "sum_over_batch_size", name: str = "MulticlassHinge") -> None:
        super().__init__(reduction, name, margin=float(min_margin))

    def arguments(self) -> dict[str, Any]:
        """Those of the class."""
        return {"min_margin": self.config.margin}


@registered
class DP_MulticlassHKR(_Multiclass):
    """``DP_MulticlassKR`` plus alpha times ``DP_MulticlassHinge``. L depends on priors and alpha.

    Args:
        alpha: weight of the hinge.
        min_margin: its margin.
        priors: public class probabilities; uniform by default. Never count them in private data.
        reduction, name: as in ``DP_Loss``.
        multi_gpu: False.
    """

    kind = "hkr"

    def __init__(
        self,
        alpha: float = 10.0,
        min_margin: float = 1.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "MulticlassHKR",
        priors: Sequence[float] | None = None,
        multi_gpu: bool = False,
    ) -> None:
        super().__init__(reduction, name, multi_gpu, alpha=float(alpha), margin=float(min_margin), priors=priors)

    def arguments(self) -> dict[str, Any]:
        """Those of the class."""
        return {"alpha": self.config.alpha, "min_margin": self.config.margin, "priors": self.config.priors}


@registered
class DP_MeanAbsoluteError(DP_Loss):
    """Mean over an example's outputs of the absolute error. L = 1 / sqrt(K).

    Args:
        reduction, name: as in ``DP_Loss``.
    """

    kind = "mean_absolute_error"

    def __init__(self, reduction: str | None = "sum_over_batch_size", name: str = "MeanAbsoluteError") -> None:
        super().__init__(reduction, name)


__all__ = [
    "DP_KCosineSimilarity", "DP_Loss", "DP_MeanAbsoluteError", "DP_MulticlassHKR", "DP_MulticlassHinge", "DP_MulticlassKR", "DP_TauBCE",
    "DP_TauCategoricalCrossentropy",
]  # fmt: skip
