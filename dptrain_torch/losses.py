"""Per-example losses by name, ``loss(output, y) -> [B]``. Formulas and constants: ``dptrain/losses.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from dptrain.errors import ConfigError
from dptrain.losses import SETTINGS, LossConfig, loss_config


def cross_entropy(output: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax cross-entropy of logits ``[B, K]`` with labels ``[B]``."""
    if temperature == 1.0:
        return F.cross_entropy(output, y.long(), reduction="none")
    return F.cross_entropy(output * temperature, y.long(), reduction="none") / temperature


def binary_cross_entropy(output: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
    """Logistic loss of one logit per example, ``[B]`` or ``[B, 1]``, with labels 0 and 1."""
    logit = output.reshape(len(output)) * temperature
    return F.binary_cross_entropy_with_logits(logit, y.reshape(len(output)).to(output.dtype), reduction="none") / temperature


def mean_squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean over an example's outputs of the squared error."""
    return (output.flatten(1) - y.to(output.dtype).reshape(len(output), -1)).square().mean(1)


def mean_absolute_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean over an example's outputs of the absolute error."""
    return (output.flatten(1) - y.to(output.dtype).reshape(len(output), -1)).abs().mean(1)


def at_target(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, K]``, and which of them belong to the label; one output belongs to label 1."""
    output, y = output.reshape(len(output), -1), y.reshape(len(output), 1).long()
    k = output.shape[1]
    return output, y == (torch.arange(k, device=y.device) if k > 1 else torch.ones((), dtype=torch.long, device=y.device))


def multiclass_hinge(output: Tensor, y: Tensor, margin: float = 1.0) -> Tensor:
    """Mean over an example's outputs of the hinge, ``K - 1`` times as heavy at the label; labels ``[B]``."""
    z, target = at_target(output, y)
    hinge = F.relu(margin / 2 - torch.where(target, z, -z))
    return torch.where(target, max(z.shape[1] - 1, 1) * hinge, hinge).mean(1)


def cosine_similarity(output: Tensor, y: Tensor, min_norm: float = 1.0) -> Tensor:
    """Minus the label's output over the norm of all, or over ``min_norm`` where that is larger; labels ``[B]``."""
    z = output.reshape(len(output), -1)
    top = z.detach().abs().amax(1, keepdim=True).clamp(min=min_norm)  # no square overflows; the result does not depend on it
    ratio = z / top
    length = torch.maximum(torch.linalg.vector_norm(ratio, dim=1), min_norm / top[:, 0])
    return -ratio.gather(1, y.reshape(-1, 1).long())[:, 0] / length


def kr(output: Tensor, y: Tensor, priors: tuple[float, ...] | None = None) -> Tensor:
    """Kantorovich-Rubinstein loss with public class priors, uniform by default; labels ``[B]``."""
    z, target = at_target(output, y)
    pi = torch.tensor(LossConfig(name="kr", priors=priors).class_priors(z.shape[1]), dtype=z.dtype, device=z.device)
    return torch.where(target, -z / pi, z / (1 - pi)).mean(1)


def hkr(output: Tensor, y: Tensor, priors: tuple[float, ...] | None = None, margin: float = 1.0, alpha: float = 10.0) -> Tensor:
    """``kr`` plus ``alpha`` times the hinge; labels ``[B]``."""
    return kr(output, y, priors) + alpha * multiclass_hinge(output, y, margin)


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


class Loss:
    """A loss with its settings: ``loss(output, y) -> [B]``.

    Args:
        config: name and settings.
    """

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self._settings = {key: getattr(config, key) for key in SETTINGS[config.name]}

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        """One value per example."""
        return LOSSES[self.config.name](output, y, **self._settings)

    def lipschitz(self, num_outputs: int) -> float | None:
        """Lipschitz constant in one example's output, None where there is none."""
        return self.config.lipschitz(num_outputs)

    def __repr__(self) -> str:
        return f"Loss({self.config!r})"


def get_loss(loss: str | LossConfig, num_outputs: int | None = None) -> Loss:
    """A loss by name, or with its settings.

    Args:
        loss: name or settings.
        num_outputs: numbers in one example's output, to check that the settings fit.
    Raises:
        ConfigError: unknown name, or priors for another number of classes.
    """
    try:
        made = Loss(loss_config(loss))
        if num_outputs is not None:
            made.config.class_priors(num_outputs)
    except ValidationError:
        raise ConfigError(f"There is no loss {loss!r}; choose one of {', '.join(LOSSES)}.") from None
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    return made
