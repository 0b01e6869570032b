"""The torch backend: what the core asks for, in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dptrain.allocator import keep_large
from dptrain.config import OptimizerConfig, Performance, TrainConfig
from dptrain.errors import RunError
from dptrain.info import Graph, ModelInfo
from dptrain.losses import LossConfig
from dptrain.metrics import classification_metrics
from dptrain.models import initial_weights
from dptrain.plan import Plan
from dptrain.randomness import StepNoise
from dptrain.report import package_versions
from dptrain_torch import attack, engine, gradients, graph, losses, measure, models, update
from dptrain_torch.describe import describe
from dptrain_torch.gradients import Batch, Grads

CHUNK = 500  # examples per prediction
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class TorchBackend:
    """An executor of plans in torch.

    Args:
        performance: device, precision and compilation.
    Raises:
        RunError: the device does not exist.
    """

    name = "torch"

    def __init__(self, performance: Performance) -> None:
        self.performance = performance
        self.dtype = DTYPES[performance.precision]
        wanted = performance.device
        try:
            self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
            torch.zeros((), device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise RunError(
                f"performance.device {wanted!r} cannot be used by torch ({str(error).splitlines()[0]}); choose cpu or auto."
            ) from None
        keep_large(performance.prefer == "speed")

    # --- building ---
    def build_model(self, config: TrainConfig, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        model = models.build(config.model.expand(input_shape), input_shape, num_outputs)
        models.set_weights(model, initial_weights(models.weight_shapes(model), config.seed) | buffers(model))
        return model.to(self.device, self.dtype)

    def build_loss(self, loss: str | LossConfig, num_outputs: int | None = None) -> Any:
        return losses.get_loss(loss, num_outputs)

    def build_optimizer(self, config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
        parameters = list(gradients.trainable(model).values())
        if config.name == "sgd":
            return torch.optim.SGD(parameters, config.learning_rate, config.momentum)
        if config.name == "adam":
            return torch.optim.Adam(parameters, config.learning_rate, eps=1e-8)
        return torch.optim.AdamW(parameters, config.learning_rate, eps=1e-8, weight_decay=config.weight_decay)

    # --- planning ---
    def describe(self, model: nn.Module, x: np.ndarray) -> ModelInfo:
        return describe(model, self.tensor(x))

    def graph(self, model: nn.Module, x: np.ndarray) -> Graph:
        return graph.graph(model, self.tensor(x[:2]))

    def constrain(self, model: nn.Module, found: Graph) -> dict[str, float]:
        return update.constrain(model, found, first=True)

    def graph_weights(self, model: nn.Module, found: Graph) -> dict[str, np.ndarray]:
        return graph.weights(model, found)

    def time_norms(self, model: nn.Module, loss: Any, x: np.ndarray, y: np.ndarray) -> dict[str, dict[str, float]]:
        return measure.time_norms(model, loss, self.batch(x, y, np.ones(len(x), bool)))

    def product_rate(self) -> float:
        return measure.product_rate(self.device, self.dtype)

    def attained(self, model: nn.Module, loss: Any, x: np.ndarray, y: np.ndarray, plan: Plan) -> dict[str, tuple[float, float]]:
        return engine.attained(model, loss, self.tensor(x), self.tensor(y), plan)

    def tightness(self, model: nn.Module, x: np.ndarray, plan: Plan) -> dict[str, tuple[float, float]]:
        return attack.tightness(model, self.tensor(x), plan)

    def self_check(self, model: nn.Module, loss: Any, x: np.ndarray, y: np.ndarray, plan: Plan) -> None:
        engine.self_check(model, loss, self.tensor(x), self.tensor(y), plan, two_pass=self.performance.two_pass)

    # --- one step ---
    def seed_dropout(self, model: nn.Module, seed: int, step: int) -> None:
        if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
            torch.manual_seed((seed * 1_000_003 + step) % 2**63)

    def tensor(self, array: Any) -> Any:
        """An array on the device, floats in the run's precision; or each array of a tuple or mapping."""
        if isinstance(array, Mapping):
            return {key: self.tensor(value) for key, value in array.items()}
        if isinstance(array, tuple | list):
            return tuple(map(self.tensor, array))
        value = torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)
        return value.to(self.dtype) if value.is_floating_point() else value

    def batch(self, x: Any, y: Any, mask: np.ndarray, factor: float = 1.0) -> Batch:
        scale = None if factor == 1.0 else torch.tensor(factor, dtype=self.dtype, device=self.device)
        return Batch(self.tensor(x), self.tensor(y), self.tensor(mask), scale)

    def zeros(self, model: nn.Module) -> Grads:
        return update.zeros(model)

    def bounded_sum(self, model: nn.Module, loss: Any, batch: Batch, plan: Plan, two_pass: bool = False) -> Grads:
        return gradients.bounded_sum(model, loss, batch, plan, two_pass=two_pass, lean=self.performance.prefer == "memory")

    def add(self, total: Grads, part: Grads) -> Grads:
        return update.add(total, part)

    def reduce(self, total: Grads) -> Grads:
        return update.reduce(total)

    def privatize(self, total: Grads, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Grads:
        return update.privatize(total, plan, stds, noise)

    def apply(self, model: nn.Module, optimizer: Any, released: Grads, scale: float, learning_rate: float | None) -> None:
        update.apply(model, optimizer, released, scale, learning_rate)

    def project(self, model: nn.Module, plan: Plan) -> dict[str, float]:
        return update.project(model, plan)

    @property
    def compiles(self) -> bool:
        return self.performance.compile is True

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function) if self.compiles else function

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def device_meter(self) -> Any:
        return CudaMeter(self.device) if self.device.type == "cuda" else None

    # --- around the step ---
    def counts(self, grads: Grads) -> dict[str, float]:
        return {name: float(value) for name, value in grads.counts.items()}

    def stats(self, grads: Grads) -> dict[str, float]:
        return {name: float(value) for name, value in grads.stats.items()}

    def group_norms(self, grads: Grads, plan: Plan) -> dict[str, float]:
        return update.group_norms(grads, plan)

    def sums(self, model: nn.Module, grads: Grads) -> dict[str, np.ndarray]:
        return update.sums(grads)

    def shifted(self, model: nn.Module, grads: Grads, by: Mapping[str, np.ndarray]) -> Grads:
        return update.shifted(grads, by)

    def parameters(self, model: nn.Module) -> dict[str, np.ndarray]:
        return update.parameters(model)

    def predict(self, model: nn.Module, x: np.ndarray) -> np.ndarray:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return np.concatenate([model(self.tensor(x[i : i + CHUNK])).cpu().numpy() for i in range(0, len(x), CHUNK)])
        finally:
            model.train(was_training)

    def losses(self, model: nn.Module, loss: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        outputs = self.predict(model, x)
        parts = [slice(i, i + CHUNK) for i in range(0, len(x), CHUNK)]
        return np.concatenate([loss(self.tensor(outputs[part]), self.tensor(y[part])).cpu().numpy() for part in parts])

    def evaluate(self, model: nn.Module, loss: Any, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        outputs = self.predict(model, x)
        parts = [slice(i, i + CHUNK) for i in range(0, len(x), CHUNK)]
        total = sum(float(loss(self.tensor(outputs[part]), self.tensor(y[part])).sum()) for part in parts)
        return {"loss": total / len(x), **classification_metrics(outputs, y)}

    def get_weights(self, model: nn.Module) -> dict[str, np.ndarray]:
        return models.get_weights(model)

    def set_weights(self, model: nn.Module, weights: dict[str, np.ndarray]) -> None:
        models.set_weights(model, weights)

    def get_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
        state = optimizer.state_dict()["state"]
        return {
            f"{index}/{key}": np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
            for index, slots in state.items()
            for key, value in slots.items()
            if value is not None
        }

    def set_optimizer_state(self, optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, np.ndarray]) -> None:
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            index, _, key = name.partition("/")
            slots.setdefault(int(index), {})[key] = torch.from_numpy(np.array(value))
        if slots:
            optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})

    def versions(self) -> dict[str, str]:
        return package_versions(("torch", "opacus"))


def buffers(model: nn.Module) -> dict[str, np.ndarray]:
    """Buffers as they are, to complete a set of starting weights."""
    return {name: value.detach().cpu().numpy() for name, value in model.named_buffers()}


class CudaMeter:
    """Bytes that torch's allocator has given out on one device."""

    source = "allocator of the CUDA device"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def make_backend(performance: Performance) -> TorchBackend:
    """The backend for ``dptrain.backend.get_backend``."""
    return TorchBackend(performance)
