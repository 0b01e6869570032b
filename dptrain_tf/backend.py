"""The TensorFlow backend: what the core asks for, in TensorFlow and Keras 3."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before the import: TensorFlow greets on stderr otherwise

import keras
import numpy as np
import tensorflow as tf

from dptrain.config import OptimizerConfig, Performance, TrainConfig
from dptrain.errors import RunError
from dptrain.info import Graph, ModelInfo
from dptrain.losses import LossConfig
from dptrain.metrics import classification_metrics
from dptrain.models import initial_weights
from dptrain.plan import Plan
from dptrain.randomness import StepNoise
from dptrain.report import package_versions
from dptrain_tf import attack, engine, gradients, graph, losses, measure, models, update
from dptrain_tf.describe import describe
from dptrain_tf.gradients import Batch, Grads
from dptrain_tf.uses import compiled_by_xla

CHUNK = 500  # examples per prediction


class TensorFlowBackend:
    """An executor of plans in TensorFlow.

    Args:
        performance: device, precision and compilation.
    Raises:
        RunError: Keras runs on another backend, or the device does not exist.
    """

    name = "tensorflow"
    jit = False  # whether ``compile`` asks XLA too

    def __init__(self, performance: Performance) -> None:
        self.performance, self.dtype = performance, performance.precision
        if keras.backend.backend() != "tensorflow":
            raise RunError(f"Keras runs on {keras.backend.backend()!r} here; set KERAS_BACKEND=tensorflow and start again.")
        gpus = [device.name for device in tf.config.list_logical_devices("GPU")]
        names = {"auto": gpus[0] if gpus else "/CPU:0", "cpu": "/CPU:0", "cuda": gpus[0] if gpus else ""}
        self.device = names.get(performance.device, performance.device)
        try:
            with tf.device(self.device or "/GPU:0"):
                tf.zeros(()).numpy()
        except (ValueError, RuntimeError, tf.errors.OpError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(
                f"performance.device {performance.device!r} cannot be used by TensorFlow ({reason}); choose cpu or auto."
            ) from None

    # --- building ---
    def build_model(self, config: TrainConfig, input_shape: tuple[int, ...], num_outputs: int) -> Any:
        with tf.device(self.device):
            model = models.build(config.model.expand(input_shape), input_shape, num_outputs, self.dtype)
            models.set_weights(model, initial_weights(models.weight_shapes(model), config.seed))
        return model

    def build_loss(self, loss: str | LossConfig, num_outputs: int | None = None) -> Any:
        return losses.get_loss(loss, num_outputs)

    def build_optimizer(self, config: OptimizerConfig, model: Any) -> Any:
        if config.name == "sgd":
            optimizer = keras.optimizers.SGD(config.learning_rate, config.momentum)
        elif config.name == "adam":
            optimizer = keras.optimizers.Adam(config.learning_rate, epsilon=1e-8)
        else:
            optimizer = keras.optimizers.AdamW(config.learning_rate, weight_decay=config.weight_decay, epsilon=1e-8)
        optimizer.build(model.trainable_variables)
        return optimizer

    # --- planning ---
    def describe(self, model: Any, x: np.ndarray) -> ModelInfo:
        return describe(model, self.tensor(x))

    def graph(self, model: Any, x: np.ndarray) -> Graph:
        return graph.graph(model, self.tensor(x[:2]))

    def constrain(self, model: Any, found: Graph) -> dict[str, float]:
        return update.constrain(model, found, first=True)

    def graph_weights(self, model: Any, found: Graph) -> dict[str, np.ndarray]:
        return graph.weights(model, found)

    def time_norms(self, model: Any, loss: Any, x: np.ndarray, y: np.ndarray) -> dict[str, dict[str, float]]:
        return measure.time_norms(model, loss, self.batch(x, y, np.ones(len(x), bool)))

    def product_rate(self) -> float:
        return measure.product_rate()

    def attained(self, model: Any, loss: Any, x: np.ndarray, y: np.ndarray, plan: Plan) -> dict[str, tuple[float, float]]:
        return engine.attained(model, loss, self.tensor(x), self.tensor(y), plan)

    def tightness(self, model: Any, x: np.ndarray, plan: Plan) -> dict[str, tuple[float, float]]:
        return attack.tightness(model, self.tensor(x), plan)

    def self_check(self, model: Any, loss: Any, x: np.ndarray, y: np.ndarray, plan: Plan) -> None:
        engine.self_check(model, loss, self.tensor(x), self.tensor(y), plan, two_pass=self.performance.two_pass)

    # --- one step ---
    def seed_dropout(self, model: Any, seed: int, step: int) -> None:
        for i, layer in enumerate(model._flatten_layers()):
            generator = getattr(layer, "seed_generator", None)
            if generator is not None:
                generator.state.assign(np.array([(seed * 1_000_003 + i) % 2**31, step % 2**31], dtype="uint32"))

    def tensor(self, array: Any) -> Any:
        """An array on the device, floats in the run's precision; or each array of a tuple or mapping."""
        if isinstance(array, Mapping):
            return {key: self.tensor(value) for key, value in array.items()}
        if isinstance(array, tuple | list):
            return tuple(map(self.tensor, array))
        with tf.device(self.device):
            value = tf.convert_to_tensor(np.ascontiguousarray(array))
            return tf.cast(value, self.dtype) if value.dtype.is_floating else value

    def batch(self, x: Any, y: Any, mask: np.ndarray, factor: float = 1.0) -> Batch:
        scale = None if factor == 1.0 else tf.constant(factor, self.dtype)
        return Batch(self.tensor(x), self.tensor(y), self.tensor(mask), scale)

    def zeros(self, model: Any) -> Grads:
        return update.zeros(model)

    def bounded_sum(self, model: Any, loss: Any, batch: Batch, plan: Plan, two_pass: bool = False) -> Grads:
        return gradients.bounded_sum(model, loss, batch, plan, two_pass=two_pass, lean=self.performance.prefer == "memory")

    def add(self, total: Grads, part: Grads) -> Grads:
        return update.add(total, part)

    def reduce(self, total: Grads) -> Grads:
        return update.reduce(total)

    def privatize(self, total: Grads, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Grads:
        return update.privatize(total, plan, stds, noise)

    def apply(self, model: Any, optimizer: Any, released: Grads, scale: float, learning_rate: float | None) -> None:
        update.apply(model, optimizer, released, scale, learning_rate)

    def project(self, model: Any, plan: Plan) -> dict[str, float]:
        return update.project(model, plan)

    @property
    def compiles(self) -> bool:
        return self.performance.compile is not False

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.compiles:
            return function
        quick, careful = self._traced(function, False), self._traced(function, True)

        def run(batch: Batch) -> Grads:
            grads = quick(batch)
            # A graph with both ways in it is twice as large, and keeps every layer's arrays until it has chosen.
            return grads if grads.usable is None or bool(grads.usable) else careful(batch)

        return run

    def _traced(self, function: Callable[[Batch], Grads], careful: bool) -> Callable[[Batch], Grads]:
        """The function as a graph, traced at its first call."""
        keys: list[str] = []
        identifiers: dict[str, str] = {}

        @tf.function(autograph=False, reduce_retracing=False, jit_compile=self.jit or None)
        def traced(x: Any, y: Any, mask: Any, factor: Any) -> Any:
            with compiled_by_xla(self.jit):
                grads = function(Batch(x, y, mask, factor, careful))
            keys[:] = list(grads.sums)
            identifiers.update(grads.identifiers)
            return list(grads.sums.values()), grads.stats, grads.counts, grads.usable

        def run(batch: Batch) -> Grads:
            sums, stats, counts, usable = traced(batch.x, batch.y, batch.mask, batch.factor)
            return Grads(dict(zip(keys, sums, strict=True)), stats, identifiers, counts, usable)

        return run

    def synchronize(self) -> None:
        if "GPU" in self.device:
            tf.test.experimental.sync_devices()

    def device_meter(self) -> Any:
        return GpuMeter(self.device) if "GPU" in self.device else None

    # --- around the step ---
    def counts(self, grads: Grads) -> dict[str, float]:
        return {name: float(value) for name, value in grads.counts.items()}

    def stats(self, grads: Grads) -> dict[str, float]:
        return {name: float(value) for name, value in grads.stats.items()}

    def group_norms(self, grads: Grads, plan: Plan) -> dict[str, float]:
        return update.group_norms(grads, plan)

    def sums(self, model: Any, grads: Grads) -> dict[str, np.ndarray]:
        return update.sums(grads)

    def shifted(self, model: Any, grads: Grads, by: Mapping[str, np.ndarray]) -> Grads:
        return update.shifted(grads, by)

    def parameters(self, model: Any) -> dict[str, np.ndarray]:
        return update.parameters(model)

    def predict(self, model: Any, x: np.ndarray) -> np.ndarray:
        run = tf.function(lambda batch: model(batch, training=False), autograph=False)
        return np.concatenate([run(self.tensor(x[i : i + CHUNK])).numpy() for i in range(0, len(x), CHUNK)])

    def losses(self, model: Any, loss: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        outputs = self.predict(model, x)
        parts = [slice(i, i + CHUNK) for i in range(0, len(x), CHUNK)]
        return np.concatenate([loss(self.tensor(y[part]), self.tensor(outputs[part])).numpy() for part in parts])

    def evaluate(self, model: Any, loss: Any, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        outputs = self.predict(model, x)
        parts = [slice(i, i + CHUNK) for i in range(0, len(x), CHUNK)]
        total = sum(float(tf.reduce_sum(loss(self.tensor(y[part]), self.tensor(outputs[part])))) for part in parts)
        return {"loss": total / len(x), **classification_metrics(outputs, y)}

    def get_weights(self, model: Any) -> dict[str, np.ndarray]:
        return models.get_weights(model)

    def set_weights(self, model: Any, weights: dict[str, np.ndarray]) -> None:
        models.set_weights(model, weights)

    def get_optimizer_state(self, optimizer: Any) -> dict[str, np.ndarray]:
        return {f"{i:04d}/{v.path}": v.value.numpy() for i, v in enumerate(optimizer.variables)}

    def set_optimizer_state(self, optimizer: Any, model: Any, state: dict[str, np.ndarray]) -> None:
        values = [state[name] for name in sorted(state)]
        if len(values) != len(optimizer.variables) or any(
            a.shape != tuple(v.shape) for a, v in zip(values, optimizer.variables, strict=True)
        ):
            raise RunError("The checkpoint's optimizer state does not fit the optimizer; start in another --out directory.")
        for variable, value in zip(optimizer.variables, values, strict=True):
            variable.assign(value)

    def versions(self) -> dict[str, str]:
        return package_versions(("tensorflow", "keras", "deel-lip"))


class GpuMeter:
    """Bytes that TensorFlow's allocator has given out on one device."""

    source = "allocator of the GPU"

    def __init__(self, device: str) -> None:
        self.device = device.rpartition("device:")[2].strip("/") if "device:" in device else device.strip("/")

    def now(self) -> int:
        return int(tf.config.experimental.get_memory_info(self.device)["current"])

    def reset(self) -> None:
        tf.config.experimental.reset_memory_stats(self.device)

    def peak(self) -> int:
        return int(tf.config.experimental.get_memory_info(self.device)["peak"])


def make_backend(performance: Performance) -> TensorFlowBackend:
    """The backend for ``dptrain.backend.get_backend``."""
    return TensorFlowBackend(performance)
