"""Per-example losses by name, ``loss(output, y) -> [B]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from dptrain.errors import ConfigError


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Softmax cross-entropy of logits ``[B, K]`` with labels ``[B]``."""
    return F.cross_entropy(output, y.long(), reduction="none")


def binary_cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Logistic loss of one logit per example, ``[B]`` or ``[B, 1]``, with labels 0 and 1."""
    return F.binary_cross_entropy_with_logits(output.reshape(len(output)), y.to(output.dtype), reduction="none")


def mean_squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean over an example's outputs of the squared error."""
    return (output.flatten(1) - y.to(output.dtype).reshape(len(output), -1)).square().mean(1)


def mean_absolute_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean over an example's outputs of the absolute error."""
    return (output.flatten(1) - y.to(output.dtype).reshape(len(output), -1)).abs().mean(1)


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
