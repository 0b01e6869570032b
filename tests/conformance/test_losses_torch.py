"""Losses of torch: constants that hold and are attained, examples that do not touch each other, values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dptrain.errors import ConfigError
from dptrain.losses import LOSSES, LossConfig
from dptrain_torch.losses import get_loss
from tests.conformance.test_lipschitz_torch import D, rand

PRIORS = (0.5, 0.3, 0.2)
CONFIGS = [
    LossConfig(name="cross_entropy"), LossConfig(name="cross_entropy", temperature=20.0), LossConfig(name="binary_cross_entropy"),
    LossConfig(name="binary_cross_entropy", temperature=3.0), LossConfig(name="mean_absolute_error"), LossConfig(name="multiclass_hinge"),
    LossConfig(name="multiclass_hinge", margin=4.0), LossConfig(name="cosine_similarity"),
    LossConfig(name="cosine_similarity", min_norm=0.2),
    LossConfig(name="kr"), LossConfig(name="kr", priors=PRIORS), LossConfig(name="hkr"), LossConfig(name="hkr", priors=PRIORS, alpha=2.0),
]  # fmt: skip


def output_counts(config: LossConfig) -> list[int]:
    """Numbers of outputs that fit a loss."""
    if config.name == "binary_cross_entropy":
        return [1]
    if config.priors is not None:
        return [3]
    return [1, 2, 3, 10] if config.name in ("multiclass_hinge", "kr", "hkr", "mean_absolute_error") else [2, 3, 10]


LOSS_CASES = [pytest.param(config, k, id=f"{config.name}-{i}-{k}") for i, config in enumerate(CONFIGS) for k in output_counts(config)]


def gradients(loss: Any, z: Tensor, y: Tensor) -> Tensor:
    """Gradient of every example's loss in its output."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z, y).sum(), z)[0]


@pytest.mark.parametrize(("config", "k"), LOSS_CASES)
def test_the_lipschitz_constant_of_a_loss_holds_and_is_attained(config: LossConfig, k: int) -> None:
    loss = get_loss(config, k)
    constant = loss.lipschitz(k)
    assert loss.config is config and constant is not None
    largest = 0.0
    for scale, dtype in itertools.product((0.0, 1e-3, 0.1, 1.0, 10.0, 1e4, 1e30), (torch.float32, D)):
        z = (rand(400, k) * scale).to(dtype)
        z[:k] = torch.where(torch.eye(k, dtype=torch.bool), torch.tensor(-scale), torch.tensor(scale)).to(dtype)  # all wrong
        for target in range(max(k, 2)):
            y = torch.full((len(z),), target)
            values = rand(*z.shape, seed=2).to(dtype) if LOSSES[config.name].targets == "values" else y
            g = gradients(loss, z, values)
            assert g.isfinite().all()
            largest = max(largest, float(g.double().norm(dim=1).max()))
    assert largest <= constant * (1 + 1e-5)
    assert largest >= 0.97 * constant


@pytest.mark.parametrize(("config", "k"), LOSS_CASES)
def test_losses_treat_examples_alone(config: LossConfig, k: int) -> None:
    loss, z = get_loss(config), rand(6, k)
    classes = LOSSES[config.name].targets == "classes"
    y = torch.tensor([0, 1, 1, 0, 1, 0]) % max(k, 2) if classes else rand(6, k, seed=1)
    other, labels = z.clone(), y.clone()
    other[2] = math.nan
    labels[2] = 1 - labels[2]
    keep = [0, 1, 3, 4, 5]
    assert loss(z, y).shape == (6,)
    assert torch.equal(loss(z, y)[keep], loss(other, labels)[keep])
    assert torch.equal(gradients(loss, z, y)[keep], gradients(loss, other, labels)[keep])
    alone = torch.cat([loss(z[i : i + 1], y[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, loss(z, y))
    if k == 1 and classes:
        torch.testing.assert_close(loss(z[:, 0], y), loss(z, y))
        torch.testing.assert_close(loss(z, y[:, None]), loss(z, y))


def test_values_of_the_losses() -> None:
    z, y = rand(5, 3), torch.tensor([0, 2, 1, 1, 0])
    u = F.one_hot(y, 3).double()
    s, c = 2 * u - 1, 1 + u
    pi = torch.tensor(PRIORS, dtype=D)
    hinge = (c * (2.0 - s * z).clamp(min=0)).mean(1)
    wasserstein = (z * (1 - u) / (1 - pi) - z * u / pi).mean(1)
    expected = {
        LossConfig(name="multiclass_hinge", margin=4.0): hinge,
        LossConfig(name="kr", priors=PRIORS): wasserstein,
        LossConfig(name="hkr", priors=PRIORS, margin=4.0, alpha=3.0): wasserstein + 3 * hinge,
        LossConfig(name="cosine_similarity", min_norm=0.1): -(u * z).sum(1) / z.norm(dim=1).clamp(min=0.1),
        LossConfig(name="cosine_similarity", min_norm=50.0): -(u * z).sum(1) / 50,
        LossConfig(name="cross_entropy", temperature=4.0): F.cross_entropy(4 * z, y, reduction="none") / 4,
    }
    for config, value in expected.items():
        torch.testing.assert_close(get_loss(config)(z, y), value)
    one, label = z[:, 0], torch.tensor([0, 1, 1, 0, 1])
    binary = torch.where(label == 1, -one / 0.25, one / 0.75)
    torch.testing.assert_close(get_loss(LossConfig(name="kr", priors=(0.75, 0.25)))(one, label), binary)
    torch.testing.assert_close(get_loss("multiclass_hinge")(one, label), (0.5 - (2 * label - 1) * one).clamp(min=0))
    torch.testing.assert_close(
        get_loss(LossConfig(name="binary_cross_entropy", temperature=2.0))(one, label),
        F.binary_cross_entropy_with_logits(2 * one, label.double(), reduction="none") / 2,
    )


def test_losses_that_do_not_exist_or_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="There is no loss 'nothing'"):
        get_loss("nothing")
    with pytest.raises(ConfigError, match="give one per class"):
        get_loss(LossConfig(name="kr", priors=PRIORS), 4)
    assert get_loss("mean_squared_error").lipschitz(3) is None
