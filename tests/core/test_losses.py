"""Constants of the losses: above every gradient, and attained (math.md section 5, pitfalls.md L4, L11)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dptrain import ConfigError, TrainConfig
from dptrain.losses import LossConfig
from tests.core.shared import plain


def gradients(loss: LossConfig, k: int) -> np.ndarray:
    """Gradients at many outputs and every target, by differences of the formula in the module's docstring."""
    rng = np.random.default_rng(0)
    outputs = np.concatenate([scale * rng.standard_normal((60, k)) for scale in (0.1, 1.0, 30.0)] + [np.zeros((1, k))])
    rows = []
    for target in range(max(2, k)):
        for z in outputs:
            steps = 1e-5 * np.eye(k)
            rows.append([(value(loss, z + h, target) - value(loss, z - h, target)) / 2e-5 for h in steps])
    return np.linalg.norm(np.array(rows), axis=1)


def value(loss: LossConfig, z: np.ndarray, target: int) -> float:
    """The loss of one example."""
    k, tau = len(z), loss.temperature
    one_hot = np.eye(k)[target] if k > 1 else np.array([float(target)])
    sign = 2 * one_hot - 1
    if loss.name == "cross_entropy":
        return float(np.log(np.exp(tau * (z - z.max())).sum()) / tau + z.max() - z[target])
    if loss.name == "cosine_similarity":
        return float(-z[target] / max(np.linalg.norm(z), loss.min_norm))
    hinge = np.maximum(0, loss.margin / 2 - sign * z) * np.where((sign > 0) & (k > 1), k - 1, 1)
    if loss.name == "multiclass_hinge":
        return float(hinge.mean())
    priors = np.array(loss.class_priors(k))
    kr = np.where(one_hot > 0, -z / priors, z / (1 - priors)).mean()
    return float(kr + (loss.alpha * hinge.mean() if loss.name == "hkr" else 0.0))


@pytest.mark.parametrize("k", [1, 2, 3, 10])
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "cross_entropy", "temperature": 3.0}, {"name": "multiclass_hinge", "margin": 2.0}, {"name": "kr"},
        {"name": "hkr", "alpha": 5.0}, {"name": "cosine_similarity", "min_norm": 0.5},
    ],
)  # fmt: skip
def test_no_gradient_exceeds_the_constant_and_some_come_close(settings: dict[str, Any], k: int) -> None:
    loss = LossConfig(**settings)
    if k == 1 and loss.name in ("cross_entropy", "cosine_similarity"):
        return
    constant, norms = loss.lipschitz(k), gradients(loss, k)
    assert constant is not None
    assert norms.max() <= constant * (1 + 1e-5)
    assert norms.max() >= 0.9 * constant


def test_priors_are_public_constants_that_fit_the_classes() -> None:
    assert LossConfig(name="kr", priors=(0.2, 0.8)).lipschitz(1) == pytest.approx(5.0)
    assert LossConfig(name="kr").lipschitz(2) == pytest.approx(2.0 * math.sqrt(2) / 2)
    with pytest.raises(ValueError, match="3 classes"):
        LossConfig(name="kr", priors=(0.2, 0.8)).lipschitz(3)
    with pytest.raises(ConfigError, match="add up to 1"):
        TrainConfig.parse(plain(loss={"name": "kr", "priors": [0.2, 0.2]}))


def test_a_mean_over_outputs_shrinks_with_their_number() -> None:
    assert LossConfig(name="mean_absolute_error").lipschitz(4) == pytest.approx(0.5)
    assert LossConfig(name="mean_squared_error").lipschitz(4) is None
    assert LossConfig(name="binary_cross_entropy", temperature=9.0).lipschitz(1) == 1.0


def test_settings_of_other_losses_are_refused() -> None:
    """L11: a setting that would be ignored is an error."""
    with pytest.raises(ConfigError, match="margin does not belong to the loss cross_entropy"):
        TrainConfig.parse(plain(loss={"name": "cross_entropy", "margin": 2.0}))
    with pytest.raises(ConfigError, match="tau is not a known key"):
        TrainConfig.parse(plain(loss={"name": "kr", "tau": 1.0}))


def test_a_short_name_stands_for_the_defaults_and_keeps_the_hash() -> None:
    one, two = TrainConfig.parse(plain(loss="kr")), TrainConfig.parse(plain(loss={"name": "kr"}))
    assert one == two and one.hash == two.hash
    assert one.to_dict()["loss"] == "kr"
    assert TrainConfig.parse(plain(loss={"name": "kr", "priors": [0.5, 0.5]})).hash != one.hash
