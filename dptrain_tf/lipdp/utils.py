"""LipDP's metrics and monitors by their names. None of them is private with respect to the data it looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dptrain.errors import ConfigError
from dptrain.metrics import auroc
from dptrain_tf.lipdp.model import log_function
from dptrain_tf.own import registered


class _AUROC(keras.metrics.Metric):
    """Exact area under the ROC curve of one logit per example, NaN as long as only one class was seen. NOT private.

    Args:
        name: of the metric.
        kwargs: ``dtype``; LipDP's thresholds mean nothing to an exact value.
    """

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(name=name, **{k: v for k, v in kwargs.items() if k == "dtype"})
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []

    def score(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """What is ranked."""
        return scores

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Take in a batch."""
        if sample_weight is not None:
            raise ConfigError(f"{type(self).__name__} takes no sample weights; remove them.")

        def keep(y: np.ndarray, z: np.ndarray) -> None:
            if z.shape[1:] not in ((), (1,)):
                raise ConfigError(f"{type(self).__name__} needs one logit per example; the model has outputs of shape {z.shape[1:]}.")
            labels = y.argmax(axis=1) if y.ndim == 2 and y.shape[1] == 2 else y.reshape(-1)
            self.parts.append((z.reshape(-1).astype(np.float64), labels.astype(np.int64)))

        tf.numpy_function(keep, [y_true, y_pred], [])

    def result(self) -> Any:
        """The area."""

        def area() -> np.float32:
            if not self.parts:
                return np.float32(np.nan)
            scores, labels = (np.concatenate(part) for part in zip(*self.parts, strict=True))
            scores = self.score(scores, labels)
            whole = len(np.unique(labels)) == 2 and not np.isnan(scores).any()
            return np.float32(auroc(scores, labels) if whole else np.nan)

        return tf.ensure_shape(tf.numpy_function(area, [], tf.float32), [])

    def reset_state(self) -> None:
        """Forget everything."""
        self.parts.clear()


@registered
class ScaledAUC(_AUROC):
    """Area under the ROC curve. NOT private.

    Args:
        scale: a positive factor of the logits, which leaves their order, and so the exact area, as it is.
        name, kwargs: as in ``_AUROC``.
    """

    def __init__(self, scale: float = 1.0, name: str = "auc", **kwargs: Any) -> None:
        if not scale > 0 or kwargs.get("from_logits") is False:
            raise ConfigError("ScaledAUC takes logits and a scale above 0.")
        super().__init__(name, **kwargs)
        self.scale = scale

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "scale": self.scale}


@registered
class CertifiableAUROC(_AUROC):
    """Area under the ROC curve when every input is moved against its label, by at most a norm. NOT private.

    Args:
        radius: largest L2 norm of the perturbation of an input of the model.
        lipschitz: certified constant of the model in its input, from ``dptrain.bounds.output_lipschitz``; LipDP took 1 for granted.
        name, kwargs: as in ``_AUROC``.
    Guarantee: within the radius a logit moves by at most ``radius * lipschitz``, so no perturbation makes the area smaller.
    """

    def __init__(self, radius: float, lipschitz: float = 1.0, name: str = "certifiable_auroc", **kwargs: Any) -> None:
        if not (radius >= 0 and lipschitz >= 0):
            raise ConfigError("CertifiableAUROC needs a radius and a Lipschitz constant of at least 0.")
        super().__init__(name, **kwargs)
        self.radius, self.lipschitz = radius, lipschitz

    def score(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The worst logits within the radius."""
        return scores - (2 * labels - 1) * self.radius * self.lipschitz

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "radius": self.radius, "lipschitz": self.lipschitz}


class PrivacyMetrics(keras.callbacks.Callback):
    """A threshold attack on membership after training: how well the loss tells training from test examples. NOT private.

    Its result is no guarantee: a weak attack that fails proves nothing, the ledger's epsilon does.

    Args:
        np_dataset: x_train, y_train, x_test, y_test.
        log_fn: as in ``DP_Accountant``.
    """

    def __init__(self, np_dataset: Any, log_fn: Any = "all") -> None:
        super().__init__()
        self.data, self.log_fn = np_dataset, log_function(log_fn)
        self.attack_results: dict[str, float] | None = None

    def losses(self, x: Any, y: Any) -> np.ndarray:
        """Loss of each example."""
        session = self.model._session
        z = self.model.predict(np.asarray(x, np.float32), batch_size=500, verbose=0)
        return session.loss.examples(session.loss.targets(y, int(np.prod(z.shape[1:]))), z).numpy()  # type: ignore[no-any-return]

    def on_train_end(self, logs: Any = None) -> None:
        """Attack."""
        x_train, y_train, x_test, y_test = self.data
        inside, outside = self.losses(x_train, y_train), self.losses(x_test, y_test)
        area = auroc(-np.concatenate([inside, outside]), np.repeat([1, 0], [len(inside), len(outside)]))
        cuts = np.unique(np.concatenate([inside, outside]))
        rates = (np.searchsorted(np.sort(part), cuts, side="right") / len(part) for part in (inside, outside))
        advantage = float(np.abs(np.subtract(*rates)).max())
        self.attack_results = {"mia_auc_entire_dataset": max(area, 1 - area), "mia_adv_entire_dataset": advantage}

    def log_report(self) -> None:
        """Log what the attack found."""
        if self.attack_results is None:
            raise ConfigError("PrivacyMetrics has nothing to report before training has ended.")
        self.log_fn(self.attack_results)


class _SignalToNoise(keras.callbacks.Callback):
    """Gradient norms on a batch beside their bounds, after each epoch. NOT private.

    Args:
        batch: inputs and targets.
        log_fn: as in ``DP_Accountant``.
    """

    def __init__(self, batch: Any, log_fn: Any = "all") -> None:
        super().__init__()
        self.batch, self.log_fn = batch, log_function(log_fn)

    def report(self, epoch: int, measure: Callable[[Any], Any]) -> dict[str, Any]:
        """Everything by name."""
        parts = zip(("ratios_", "norms_", "gradient_bounds_"), measure(self.batch), strict=True)
        return {"epoch": epoch} | {prefix + name: value for prefix, part in parts for name, value in part.items()}


class SignaltoNoiseAverage(_SignalToNoise):
    """Norm of the batch's mean gradient per group, beside the bound of one example's. NOT private."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Measure and log."""
        self.log_fn(self.report(epoch, self.model.signal_to_noise_average))


class SignaltoNoiseHistogram(_SignalToNoise):
    """Norm of each example's gradient per group, beside its bound. NOT private."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Measure and log."""
        self.log_fn(self.report(epoch, self.model.signal_to_noise_elementwise))


__all__ = ["CertifiableAUROC", "PrivacyMetrics", "ScaledAUC", "SignaltoNoiseAverage", "SignaltoNoiseHistogram"]
