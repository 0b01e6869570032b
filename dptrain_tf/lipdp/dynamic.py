"""LipDP's callbacks that moved the clip of the loss gradient.

Here it is moved by the training step itself (``dptrain.adaptive``): the count of examples below the clip is one more group of every
step's release, so one event pays for both and the planner cannot forget it (pitfalls.md L14).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from dptrain.adaptive import AdaptiveClip
from dptrain.errors import ConfigError


@dataclass(frozen=True)
class QuantileSettings:
    """A moving clip, in LipDP's terms.

    Args:
        patience: epochs between LipDP's updates.
        noise_multiplier: of the count.
        quantile: fraction of examples that should lie below the clip.
        learning_rate: step size of its logarithm, per update.
    """

    patience: int
    noise_multiplier: float
    quantile: float
    learning_rate: float

    def clip(self, initial: float, noise_multiplier: float, steps_per_epoch: int) -> AdaptiveClip:
        """The same in dptrain's terms.

        The joint noise multiplier stays that of ``DPParameters``. The count's share of the budget keeps the ratio of the two noise
        multipliers that were asked for, so each of the two gets at least the noise it was given. Every step moves the clip, by so much less
        that an epoch moves it as far.

        Args:
            initial: first value of the clip.
            noise_multiplier: of the gradients' joint release.
            steps_per_epoch: steps in an epoch.
        """
        share = 1.0 / (1.0 + (self.noise_multiplier / noise_multiplier) ** 2)
        rate = self.learning_rate / (self.patience * steps_per_epoch)
        return AdaptiveClip(initial=initial, quantile=self.quantile, learning_rate=rate, share=share)


class AdaptiveQuantileClipping(keras.callbacks.Callback):
    """Settings of the moving clip of a model that ends with ``DP_ClipGradient(mode="dynamic")``.

    Nothing happens at the end of an epoch, and ``ds_train`` is not read: the steps of ``fit`` do the work.

    Args:
        ds_train: ignored.
        patience, noise_multiplier, quantile, learning_rate: as in ``QuantileSettings``.
    """

    def __init__(
        self, ds_train: Any = None, *, patience: int = 1, noise_multiplier: float, quantile: float, learning_rate: float = 1.0
    ) -> None:
        super().__init__()
        del ds_train
        numbers = {"patience": patience, "noise_multiplier": noise_multiplier, "learning_rate": learning_rate}
        for name, value in numbers.items():
            if not value > 0:
                raise ConfigError(f"AdaptiveQuantileClipping: {name} must be above 0, not {value!r}.")
        if not 0 < quantile < 1:
            raise ConfigError(f"AdaptiveQuantileClipping: quantile must lie between 0 and 1, not {quantile!r}.")
        self.settings = QuantileSettings(patience, float(noise_multiplier), float(quantile), float(learning_rate))

    def set_model(self, model: Any) -> None:
        """Hand the settings to the model."""
        super().set_model(model)
        adopt = getattr(model, "adopt_clipping", None)
        if adopt is None:
            raise ConfigError("AdaptiveQuantileClipping works with DP_Sequential and DP_Model only; remove it.")
        adopt(self.settings)


class LaplaceAdaptiveLossGradientClipping(keras.callbacks.Callback):
    """Refused: its sparse-vector search spends pure epsilon on full batches, and no ledger here can count it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        raise ConfigError("LaplaceAdaptiveLossGradientClipping has no sound counterpart; use AdaptiveQuantileClipping.")


__all__ = ["AdaptiveQuantileClipping", "LaplaceAdaptiveLossGradientClipping", "QuantileSettings"]
