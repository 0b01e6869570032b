"""The oracle of the Keras model tests: one ordinary gradient per example, against the public functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import dptrain_tf as api
from dptrain_tf.engine import checked_sum, full_batch, method_of, surrogate, take, trainable
from dptrain_tf.rules import children

METHODS = ("per_sample", "ghost", "mixed_ghost")


@contextmanager
def precision(policy: str) -> Iterator[None]:
    """Build and run in a dtype policy, from a fixed seed."""
    before, floats = keras.config.dtype_policy(), keras.config.floatx()
    keras.utils.set_random_seed(0)
    keras.config.set_floatx(policy)  # inputs of functional models too
    keras.config.set_dtype_policy(policy)
    yield
    keras.config.set_floatx(floats)
    keras.config.set_dtype_policy(before)
    keras.backend.clear_session(free_memory=False)


def stir(model: Any, seed: int = 1) -> None:
    """Move the parameters away from zeros and ones, so that every term of every formula counts."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign_add(0.3 * rng.normal(size=variable.shape) / max(1.0, np.prod(variable.shape[:-1]) ** 0.5))


def example_gradients(model: Any, x: Any, y: Any, loss: Any = surrogate) -> list[dict[str, np.ndarray]]:
    """For each example, alone: parameter -> ordinary gradient of its loss."""
    parameters, found = trainable(model), []
    for i in range(len(tf.nest.flatten(x)[0])):
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(loss(take(y, [i]), model(take(x, [i]), training=False)))
        gradients = tape.gradient(value, [v.value for v in parameters.values()], unconnected_gradients="zero")
        found.append({k: tf.convert_to_tensor(g).numpy() for k, g in zip(parameters, gradients, strict=True)})
    return found


def norms_of(gradients: list[dict[str, np.ndarray]]) -> Any:
    """L2 norms over all parameters."""
    return np.sqrt([sum((g.astype(np.float64) ** 2).sum() for g in one.values()) for one in gradients])


def assert_exact(model: Any, x: Any, y: Any = None, loss: Any = surrogate, methods: Any = METHODS, tolerance: float = 1e-9) -> None:
    """Norms and clipped sums equal the oracle's, and nothing is left on the model."""
    y = np.zeros(len(tf.nest.flatten(x)[0])) if y is None else y
    gradients = example_gradients(model, x, y, loss)
    norms = norms_of(gradients)
    assert (norms > 0).all() and np.ptp(norms) > 0
    clip = float(np.median(norms)) * 0.9
    scale = max(np.abs(g).max() for one in gradients for g in one.values())
    for method in methods:
        plan, found = api.make_plan(model, x, method, max_grad_norm=clip), dict[str, Any]()
        sums = checked_sum(model, loss, full_batch(x, y), plan, norms_out=found, keep_sums=True).sums
        assert np.abs(found["all"].numpy() - norms).max() < tolerance * norms.max(), (method, found, norms)
        assert list(sums) == list(gradients[0])
        for name, value in sums.items():
            expected = sum(min(1.0, clip / n) * one[name] for n, one in zip(norms, gradients, strict=True))
            assert np.abs(value.numpy() - expected).max() < tolerance * scale, (method, name)
    assert not any("call" in layer.__dict__ or layer.__dict__.get("activation", 0) is None for layer in children(model))


def methods_of(units: Any) -> dict[str, int]:
    """How many layers are handled by rule, bare, slow."""
    found = [method_of(unit) for unit in units]
    return {method: found.count(method) for method in found}
