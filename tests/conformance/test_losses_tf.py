"""The losses in TensorFlow: their Lipschitz constants, attained and never exceeded; independence of examples; values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from dptrain.errors import ConfigError
from dptrain.losses import LOSSES, LossConfig
from dptrain_tf.losses import get_loss

RNG = np.random.default_rng(0)
PRIORS = {2: (0.85, 0.15), 4: (0.1, 0.2, 0.3, 0.4)}
LOSS_ROWS = [
    (LossConfig(name="cross_entropy"), 4, 0.99), (LossConfig(name="cross_entropy", temperature=7.0), 4, 0.99),
    (LossConfig(name="binary_cross_entropy", temperature=3.0), 1, 0.99), (LossConfig(name="mean_absolute_error"), 3, 0.99),
    (LossConfig(name="cosine_similarity", min_norm=0.5), 4, 0.99), (LossConfig(name="multiclass_hinge", margin=2.0), 4, 0.99),
    (LossConfig(name="multiclass_hinge"), 1, 0.99), (LossConfig(name="kr"), 4, 0.99), (LossConfig(name="kr", priors=PRIORS[4]), 4, 0.99),
    (LossConfig(name="kr", priors=PRIORS[2]), 1, 0.99), (LossConfig(name="hkr", alpha=3.0), 4, 0.99),
    (LossConfig(name="hkr", priors=PRIORS[2], margin=0.5), 1, 0.99), (LossConfig(name="hkr", priors=PRIORS[2]), 2, 0.99),
]  # fmt: skip


def loss_gradient(loss: Any, y: Any, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and gradients."""
    output = tf.constant(z)
    with tf.GradientTape() as tape:
        tape.watch(output)
        values = loss(y, output)
    assert values.shape == (len(z),)
    return values.numpy(), tape.gradient(values, output).numpy()


@pytest.mark.parametrize(("config", "k", "attained"), LOSS_ROWS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loss_gradients_attain_and_never_exceed_the_constant(config: LossConfig, k: int, attained: float, dtype: str) -> None:
    loss = get_loss(config, k)
    constant = loss.lipschitz(k)
    assert loss.config is config and constant == config.lipschitz(k) and constant is not None
    z = np.concatenate([RNG.standard_normal((200, k)) * s for s in (0.0, 1e-20, 0.1, 1.0, 10.0, 1e3, 1e15, 1e30)])
    z = np.concatenate([z, np.eye(k).repeat(3, 0) * np.tile([[30.0], [-30.0], [0.2]], (k, 1)), np.full((4, k), 0.5)]).astype(dtype)
    largest = 0.0
    for target in range(max(k, 2)):
        y = np.full(len(z), target)
        values = RNG.standard_normal(z.shape).astype(dtype) if LOSSES[config.name].targets == "values" else y
        norms = np.linalg.norm(loss_gradient(loss, values, z)[1].astype("float64"), axis=1)
        assert np.isfinite(norms).all() and norms.max() <= constant * (1 + 1e-6)
        largest = max(largest, norms.max())
    assert largest >= attained * constant


@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_mix_examples_and_what_is_not_finite_has_no_gradient(name: str) -> None:
    k = 1 if name == "binary_cross_entropy" else 3
    loss = get_loss(name)
    z = RNG.standard_normal((4, k)).astype("float32")
    y: Any = RNG.standard_normal((4, k)).astype("float32") if LOSSES[name].targets == "values" else np.array([0, 1, 1, 0])
    before = loss_gradient(loss, y, z)
    for poison in (np.nan, np.inf, 3e38, 7.0):
        z2 = z.copy()
        z2[1] = poison
        after = loss_gradient(loss, y, z2)
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(new[[0, 2, 3]], old[[0, 2, 3]])
        assert np.isfinite(after[1]).all() and (np.isfinite(after[0][1]) or (after[1][1] == 0).all())
    y2 = y.copy()
    y2[1] = 1 - y2[1] if y.ndim == 1 else np.nan
    after = loss_gradient(loss, y2, z)
    assert np.array_equal(after[1][[0, 2, 3]], before[1][[0, 2, 3]]) and np.isfinite(after[1]).all()
    traced = tf.function(lambda y, z: loss(y, z), autograph=False, jit_compile=True)(tf.constant(y), tf.constant(z))
    np.testing.assert_allclose(traced, before[0], rtol=1e-5)


def test_values_of_losses() -> None:
    z = np.array([[1.0, -2.0, 0.5]])
    y = np.array([1])
    assert float(get_loss("multiclass_hinge")(y, z)[0]) == pytest.approx((2 * 2.5 + 1.5 + 1.0) / 3)
    assert float(get_loss("kr")(y, z)[0]) == pytest.approx((1.0 * 1.5 + 2.0 * 3 + 0.5 * 1.5) / 3)
    assert float(get_loss("hkr")(y, z)[0]) == pytest.approx(2.75 + 10 * 7.5 / 3)
    assert float(get_loss("cosine_similarity")(y, z)[0]) == pytest.approx(2.0 / math.sqrt(5.25))
    assert float(get_loss(LossConfig(name="cosine_similarity", min_norm=10.0))(y, z)[0]) == pytest.approx(0.2)
    tau = LossConfig(name="cross_entropy", temperature=2.0)
    assert float(get_loss(tau)(y, z)[0]) == pytest.approx((np.log(np.exp(2 * z).sum()) + 4.0) / 2)
    for shape in ((2,), (2, 1)):
        one = np.reshape([0.3, -0.4], shape)
        np.testing.assert_allclose(get_loss("multiclass_hinge")(np.array([1, 0]), one), [0.2, 0.1])
        np.testing.assert_allclose(get_loss("kr")(np.array([1, 0]), one), [-0.6, -0.8])
    with pytest.raises(ConfigError, match="no loss 'nothing'"):
        get_loss("nothing")
    with pytest.raises(ConfigError, match="3 classes"):
        get_loss(LossConfig(name="kr", priors=(0.5, 0.5)), 3)
