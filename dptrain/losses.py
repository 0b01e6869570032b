"""Per-example losses by name, with what is known of them without a framework.

A loss maps the model's output and the targets to a vector ``[B]``, one value per example; never a batch mean, whose scale would
depend on the batch (pitfalls.md G7), and never a normalisation by class counts of the batch (L4).

    losses:                              z the output of one example, K outputs, u the one-hot target, s = +1 at the target, -1 elsewhere
    cross_entropy                        CE(tau z) / tau
    binary_cross_entropy                 one logit; BCE(tau z) / tau
    mean_squared_error                   mean (z - y)^2
    mean_absolute_error                  mean |z - y|
    multiclass_hinge                     mean_k c_k max(0, margin / 2 - s_k z_k), c = K - 1 at the target, 1 elsewhere; one output: c = 1
    cosine_similarity                    - <u, z> / max(|z|, min_norm)
    kr                                   mean_k ( z_k / (1 - pi_k) off the target, - z_k / pi_k at the target ), pi the public priors
    hkr                                  kr + alpha multiclass_hinge

With one output, ``kr``, ``hkr`` and ``multiclass_hinge`` take labels 0 and 1, and ``pi`` is the prior of class 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LossName = Literal[
    "cross_entropy", "binary_cross_entropy", "mean_squared_error", "mean_absolute_error", "multiclass_hinge", "cosine_similarity",
    "kr", "hkr",
]  # fmt: skip
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Prior = Annotated[float, Field(gt=0, lt=1, strict=True)]
# Settings that each loss reads; others must stay at their defaults.
SETTINGS: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("temperature",),
    "binary_cross_entropy": ("temperature",),
    "mean_squared_error": (),
    "mean_absolute_error": (),
    "multiclass_hinge": ("margin",),
    "cosine_similarity": ("min_norm",),
    "kr": ("priors",),
    "hkr": ("priors", "margin", "alpha"),
}


class LossConfig(BaseModel):
    """A loss and its settings.

    Args:
        name: which loss.
        temperature: tau of the two cross-entropies.
        margin: of the hinge.
        alpha: weight of the hinge in ``hkr``.
        min_norm: outputs shorter than this are not normalised by ``cosine_similarity``.
        priors: public class probabilities of ``kr`` and ``hkr``, one per class, adding up to 1; uniform by default. They are
            constants of the configuration and never counted from a batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: LossName = "cross_entropy"
    temperature: Positive = 1.0
    margin: Positive = 1.0
    alpha: Positive = 10.0
    min_norm: Positive = 1.0
    priors: tuple[Prior, ...] | None = None

    @model_validator(mode="after")
    def _settings_fit(self) -> LossConfig:
        for key, info in type(self).model_fields.items():
            if key != "name" and getattr(self, key) != info.default and key not in SETTINGS[self.name]:
                raise ValueError(f"{key} does not belong to the loss {self.name}; remove it")
        if self.priors is not None and (len(self.priors) < 2 or not math.isclose(math.fsum(self.priors), 1.0, abs_tol=1e-6)):
            raise ValueError("priors must hold one probability per class and add up to 1")
        return self

    def class_priors(self, num_outputs: int) -> tuple[float, ...]:
        """pi_k of each output; with one output, that of class 1.

        Raises:
            ValueError: the priors do not fit the outputs.
        """
        classes = max(2, num_outputs)
        priors = self.priors or (1.0 / classes,) * classes
        if len(priors) != classes:
            raise ValueError(f"loss.priors has {len(priors)} probabilities for {classes} classes; give one per class")
        return priors if num_outputs > 1 else priors[1:]

    def lipschitz(self, num_outputs: int) -> float | None:
        """Lipschitz constant in one example's output (L2), None where there is none.

        Args:
            num_outputs: K, numbers in one example's output.
        Guarantee: no output and no target give the loss a gradient of a larger norm.
        Source: derived at the branches below; math.md section 5.
        """
        k = num_outputs
        match self.name:
            case "cross_entropy":
                return math.sqrt(2.0)  # softmax(tau z) - u, entries of u apart sum to at most 1
            case "binary_cross_entropy":
                return 1.0  # sigmoid(tau z) - y
            case "mean_squared_error":
                return None
            case "mean_absolute_error":
                return 1.0 / math.sqrt(k)  # K signs over K
            case "cosine_similarity":
                return 1.0 / self.min_norm  # inside the ball u / min_norm; outside, the part of u across z over |z|
            case "multiclass_hinge":
                return hinge_gradient_norm(k)
            case "kr" | "hkr":
                return max(self._kr_gradient_norm(k, target) for target in range(max(2, k)))

    def _kr_gradient_norm(self, k: int, target: int) -> float:
        """Largest gradient norm for one target: kr and the hinge pull every output in the same direction, so they add up."""
        priors, alpha = self.class_priors(k), self.alpha if self.name == "hkr" else 0.0
        if k == 1:
            return (1.0 / priors[0] if target == 1 else 1.0 / (1.0 - priors[0])) + alpha
        entries = [(1.0 / p + alpha * (k - 1) if i == target else 1.0 / (1.0 - p) + alpha) / k for i, p in enumerate(priors)]
        return math.sqrt(math.fsum(e * e for e in entries))


def hinge_gradient_norm(k: int) -> float:
    """``sqrt((K - 1)^2 + (K - 1)) / K``: the target's entry is (K - 1)/K, the others 1/K."""
    return 1.0 if k == 1 else math.sqrt((k - 1) ** 2 + (k - 1)) / k


@dataclass(frozen=True)
class LossInfo:
    """Facts of a loss.

    Args:
        name: the name used in configs.
        targets: ``classes`` (integers ``[B]``) or ``values`` (floats of the output's shape, or ``[B]`` for one output).
        binary: whether two classes may share one output.
    """

    name: str
    targets: Literal["classes", "values"]
    binary: bool = False


LOSSES: dict[str, LossInfo] = {
    "cross_entropy": LossInfo("cross_entropy", "classes"),
    "binary_cross_entropy": LossInfo("binary_cross_entropy", "classes", binary=True),
    "mean_squared_error": LossInfo("mean_squared_error", "values"),
    "mean_absolute_error": LossInfo("mean_absolute_error", "values"),
    "multiclass_hinge": LossInfo("multiclass_hinge", "classes"),
    "cosine_similarity": LossInfo("cosine_similarity", "classes"),
    "kr": LossInfo("kr", "classes"),
    "hkr": LossInfo("hkr", "classes"),
}


def loss_config(loss: str | LossConfig) -> LossConfig:
    """A loss by name, or its settings as they are."""
    return LossConfig(name=loss) if isinstance(loss, str) else loss  # type: ignore[arg-type]
