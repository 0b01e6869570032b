"""A backend of NumPy alone, so that a process that trains starts in milliseconds and can be killed hundreds of times.

One dense layer, softmax cross-entropy, gradient descent with momentum, in float64. Every release is written to a side file, by the
kernel's own write, the moment it exists: what is found there has been released, whatever else a kill has destroyed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dptrain.backend import BACKENDS
from dptrain.info import LayerInfo, ModelInfo

Arrays = dict[str, np.ndarray]
WRITE = os.write  # the real one: faults that a test puts into os.write do not reach the side file
NAME = "toy"


class Side:
    """The side file of this process; None where releases are not watched."""

    path: str | None = None


def released(arrays: Mapping[str, Any]) -> None:
    """Note a release, by a digest of its bits."""
    if Side.path is not None:
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in sorted(arrays))).hexdigest()
        fd = os.open(Side.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        WRITE(fd, digest.encode() + b"\n")
        os.close(fd)


def seen(path: Path) -> list[str]:
    """Digests of the releases in a side file, each once: with an ``unsafe_seed``, a replayed step releases the same bits again."""
    return list(dict.fromkeys(path.read_text().split())) if path.exists() else []


class Model:
    """Weights, and the momentum of an optimizer beside them."""

    def __init__(self, features: int, classes: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.weights = {"out.weight": 0.1 * rng.standard_normal((features, classes)), "out.bias": np.zeros(classes)}


class Optimizer:
    """Gradient descent with momentum."""

    def __init__(self, model: Model) -> None:
        self.velocity = {name: np.zeros_like(value) for name, value in model.weights.items()}


class ToyBackend:
    """See ``dptrain.backend.Backend``."""

    name = NAME
    compiles = False

    def build_model(self, config: Any, input_shape: tuple[int, ...], num_outputs: int) -> Model:
        return Model(int(np.prod(input_shape)), num_outputs, config.seed)

    def build_loss(self, loss: Any, num_outputs: int | None = None) -> str:
        return "cross_entropy"

    def build_optimizer(self, config: Any, model: Model) -> Optimizer:
        return Optimizer(model)

    def describe(self, model: Model, x: np.ndarray) -> ModelInfo:
        d, p = model.weights["out.weight"].shape
        return ModelInfo((LayerInfo("out", "linear", 1, d, p, d * p + p, ("out.weight", "out.bias")),))

    def self_check(self, *args: Any) -> None:
        pass

    def seed_dropout(self, model: Model, seed: int, step: int) -> None:
        pass

    def batch(self, x: Any, y: Any, mask: np.ndarray, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return x.reshape(len(x), -1).astype(np.float64), y, mask

    def zeros(self, model: Model) -> Arrays:
        return {name: np.zeros_like(value) for name, value in model.weights.items()}

    def bounded_sum(self, model: Model, loss: Any, batch: Any, plan: Any, two_pass: bool = False) -> Arrays:
        x, y, mask = batch
        errors = self._probabilities(model, x) - np.eye(model.weights["out.bias"].size)[y]
        norms = np.sqrt((errors**2).sum(1) * ((x**2).sum(1) + 1))
        scaled = errors * (mask * np.minimum(1.0, plan.groups[0].clip_norm / np.maximum(norms, 1e-12)))[:, None]
        return {"out.weight": x.T @ scaled, "out.bias": scaled.sum(0)}

    def _probabilities(self, model: Model, x: np.ndarray) -> np.ndarray:
        scores = x @ model.weights["out.weight"] + model.weights["out.bias"]
        powers = np.exp(scores - scores.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def add(self, total: Arrays, part: Arrays) -> Arrays:
        return {name: value + part[name] for name, value in total.items()}

    def reduce(self, total: Arrays) -> Arrays:
        return total

    def privatize(self, total: Arrays, plan: Any, stds: Mapping[str, float], noise: Any) -> Arrays:
        std = stds[plan.groups[0].name]
        found = {n: v + std * noise.normal(i, v.shape, np.float64) for i, (n, v) in enumerate(total.items())}
        released(found)
        return found

    def apply(self, model: Model, optimizer: Optimizer, total: Arrays, scale: float, learning_rate: float | None) -> None:
        for name, value in total.items():
            optimizer.velocity[name] = 0.9 * optimizer.velocity[name] + scale * value
            model.weights[name] = model.weights[name] - (learning_rate or 0.0) * optimizer.velocity[name]

    def project(self, model: Model, plan: Any) -> dict[str, float]:
        return {}

    def compile(self, function: Any) -> Any:
        return function

    def synchronize(self) -> None:
        pass

    def counts(self, grads: Arrays) -> dict[str, float]:
        return {}

    def stats(self, grads: Arrays) -> dict[str, float]:
        return {"count": 1.0, "loss": 0.0}

    def evaluate(self, model: Model, loss: Any, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        found = self._probabilities(model, x.reshape(len(x), -1).astype(np.float64))
        return {"loss": float(-np.log(found[np.arange(len(y)), y]).mean()), "accuracy": float((found.argmax(1) == y).mean())}

    def get_weights(self, model: Model) -> Arrays:
        return dict(model.weights)

    def set_weights(self, model: Model, weights: Arrays) -> None:
        model.weights = {name: weights[name] for name in model.weights}

    def get_optimizer_state(self, optimizer: Optimizer) -> Arrays:
        return {f"{name}/velocity": value for name, value in optimizer.velocity.items()}

    def set_optimizer_state(self, optimizer: Optimizer, model: Model, state: Arrays) -> None:
        optimizer.velocity = {name: state[f"{name}/velocity"] for name in optimizer.velocity}

    def versions(self) -> dict[str, str]:
        return {}


def make_backend(performance: Any) -> ToyBackend:
    """For ``dptrain.backend.get_backend``."""
    return ToyBackend()


def register() -> None:
    """Make the backend known in this process."""
    BACKENDS[NAME] = (__name__, "numpy", "")
