"""What the layers of this package share: registration with Keras, settings, refusals."""

from __future__ import annotations

import math
from typing import Any

import keras

from dptrain.errors import ConfigError

KL: Any = keras.layers
registered = keras.saving.register_keras_serializable("dptrain")


def positive(layer: Any, **values: float) -> None:
    """Refuse a bound that is not a positive number."""
    for name, value in values.items():
        if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
            raise ConfigError(f"{type(layer).__name__}: {name} must be a positive number, not {value!r}.")


def need(layer: Any, condition: bool, message: str) -> None:
    """Refuse an input or a setting, naming the layer."""
    if not condition:
        raise ConfigError(f"{type(layer).__name__} {layer.name!r} {message}.")


class Settings:
    """First base class of the layers here: ``settings`` names the arguments of the constructor that the other base does not know."""

    settings: tuple[str, ...] = ()

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), **{name: getattr(self, name) for name in self.settings}}  # type: ignore[misc]


class Layer(Settings, keras.layers.Layer):
    """A layer whose output has the input's shape, unless it says otherwise."""

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Shape of the output."""
        return input_shape
