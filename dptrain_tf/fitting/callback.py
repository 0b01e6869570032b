"""Epsilon in Keras' own logs."""

from __future__ import annotations

from typing import Any

import keras

from dptrain.errors import ConfigError
from dptrain_tf.fitting.promise import Promise


class PrivacyCallback(keras.callbacks.Callback):
    """Epsilon after each epoch as ``logs["epsilon"]``, so that ``History`` has it; at the end, what may be promised of the weights.

    Training stops before the planned budget is passed, with this callback or without it.

    Args:
        max_epsilon: also stop before this epsilon is passed.
        verbose: print the statement at the end.
    """

    def __init__(self, max_epsilon: float | None = None, verbose: bool = True) -> None:
        super().__init__()
        if max_epsilon is not None and not max_epsilon > 0:
            raise ConfigError(f"max_epsilon must be above 0, not {max_epsilon!r}.")
        self.max_epsilon, self.verbose = max_epsilon, verbose

    def set_model(self, model: Any) -> None:
        """Refuse a model that is not private."""
        super().set_model(model)
        if not isinstance(getattr(model, "privacy", None), Promise):
            raise ConfigError("PrivacyCallback needs a model of make_private.")

    @property
    def engine(self) -> Promise:
        """The model's."""
        found: Promise = self.model.privacy
        return found

    def on_train_begin(self, logs: Any = None) -> None:
        """Set the limit."""
        if self.max_epsilon is not None and self.engine.private:
            self.engine.limit(self.max_epsilon)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Put epsilon into the logs."""
        if logs is not None and self.engine.private:
            logs["epsilon"] = self.engine.epsilon()

    def on_train_end(self, logs: Any = None) -> None:
        """Print the statement."""
        if self.verbose:
            print(self.engine.statement())
