"""What the core asks of a framework, and the backends by name. A backend is imported only when it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from dptrain.config import OptimizerConfig, Performance, TrainConfig
from dptrain.costs import Timings
from dptrain.errors import RunError
from dptrain.info import Graph, ModelInfo
from dptrain.losses import LossConfig
from dptrain.plan import Plan
from dptrain.randomness import StepNoise

Model = Any
Loss = Any
Optimizer = Any
Grads = Any  # opaque to the core
Batch = Any
Arrays = dict[str, np.ndarray]


class Backend(Protocol):
    """An executor of plans. Its tensors never reach the core."""

    name: str

    # --- building ---
    def build_model(self, config: TrainConfig, input_shape: tuple[int, ...], num_outputs: int) -> Model:
        """The native model of a specification, with the config's starting weights."""
        ...

    def build_loss(self, loss: str | LossConfig, num_outputs: int | None = None) -> Loss:
        """A per-example loss by name or settings, for a number of outputs."""
        ...

    def build_optimizer(self, config: OptimizerConfig, model: Model) -> Optimizer:
        """The framework's own optimizer."""
        ...

    # --- planning ---
    def describe(self, model: Model, x: np.ndarray) -> ModelInfo:
        """Facts for the planner, from the shapes of a few examples."""
        ...

    def graph(self, model: Model, x: np.ndarray) -> Graph:
        """The operations of the forward pass, for proofs about the whole model."""
        ...

    def constrain(self, model: Model, graph: Graph) -> Mapping[str, float]:
        """Restore a model's constraints for the first time; returns the certificates of its weights."""
        ...

    def graph_weights(self, model: Model, graph: Graph) -> Arrays:
        """Identifier -> array in the exchange layout, of every parameter in a graph."""
        ...

    def time_norms(self, model: Model, loss: Loss, x: np.ndarray, y: np.ndarray) -> Timings:
        """Seconds per layer and norm method, for ``decision: measured``."""
        ...

    def product_rate(self) -> float:
        """Multiply-adds per second of a batched matrix product on the device, which predictions of time are made with."""
        ...

    def attained(self, model: Model, loss: Loss, x: np.ndarray, y: np.ndarray, plan: Plan) -> Mapping[str, tuple[float, float]]:
        """Group -> largest per-sample gradient norm on a batch, and the plan's bound, for plans with proven bounds."""
        ...

    def tightness(self, model: Model, x: np.ndarray, plan: Plan) -> Mapping[str, tuple[float, float]]:
        """Group -> largest gradient norm found over inputs and loss gradients, and the plan's bound, for plans with proven bounds."""
        ...

    def self_check(self, model: Model, loss: Loss, x: np.ndarray, y: np.ndarray, plan: Plan) -> None:
        """Refuse a model whose clipped sum would not be what it claims."""
        ...

    # --- one step, in the order of ``step.py`` ---
    def seed_dropout(self, model: Model, seed: int, step: int) -> None:
        """Make dropout a function of the public seed and the step, so that a resumed run continues alike."""
        ...

    def batch(self, x: Any, y: Any, mask: np.ndarray, factor: float = 1.0) -> Batch:
        """A physical batch on the device; the plan's clipping norms are to be multiplied by a factor."""
        ...

    def zeros(self, model: Model) -> Grads:
        """The sum over no example."""
        ...

    def bounded_sum(self, model: Model, loss: Loss, batch: Batch, plan: Plan, two_pass: bool = False) -> Grads:
        """The weighted sum of per-sample gradients, each within the plan's bounds."""
        ...

    def add(self, total: Grads, part: Grads) -> Grads:
        """Sum of two partial sums of one logical batch."""
        ...

    def reduce(self, total: Grads) -> Grads:
        """Sum over workers; the identity on one process."""
        ...

    def privatize(self, total: Grads, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Grads:
        """Add noise to the sum of every trainable parameter."""
        ...

    def apply(self, model: Model, optimizer: Optimizer, released: Grads, scale: float, learning_rate: float | None) -> None:
        """One optimizer step on the released sum times a constant; a rate of None leaves the optimizer's own as it is."""
        ...

    def project(self, model: Model, plan: Plan) -> Mapping[str, float]:
        """Restore the constraints that a proven bound rests on; returns the certificates of the new weights, none for clipping plans."""
        ...

    @property
    def compiles(self) -> bool:
        """Whether ``compile`` changes anything, as ``performance.compile`` says."""
        ...

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``tf.function``, ``torch.compile`` or the function itself, as ``performance.compile`` says."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished; for honest timings."""
        ...

    def device_meter(self) -> Any:
        """A ``comparison.memory.Meter`` of the device's allocator; None where the process's memory is what counts."""
        ...

    # --- around the step ---
    def counts(self, grads: Grads) -> Mapping[str, float]:
        """Released counts by group name."""
        ...

    def stats(self, grads: Grads) -> dict[str, float]:
        """Sums for the progress display. NOT private."""
        ...

    def group_norms(self, grads: Grads, plan: Plan) -> Mapping[str, float]:
        """Group -> L2 norm of a gradient sum. NOT private before noise."""
        ...

    # --- for audits: identifiers are those of the plan's layers, layouts the framework's own ---
    def sums(self, model: Model, grads: Grads) -> Arrays:
        """Identifier -> gradient sum of each trainable parameter, copied. NOT private before noise."""
        ...

    def shifted(self, model: Model, grads: Grads, by: Mapping[str, np.ndarray]) -> Grads:
        """The same sums with arrays added; parameters that are not named stay as they are."""
        ...

    def parameters(self, model: Model) -> Arrays:
        """Identifier -> each trainable parameter, copied."""
        ...

    def predict(self, model: Model, x: np.ndarray) -> np.ndarray:
        """Outputs of the model in inference mode."""
        ...

    def losses(self, model: Model, loss: Loss, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Loss of each example in inference mode, ``[N]``. NOT private."""
        ...

    def evaluate(self, model: Model, loss: Loss, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        """Mean loss, and accuracy where targets are classes."""
        ...

    def get_weights(self, model: Model) -> Arrays:
        """All weights and buffers in the exchange layout, shared by both frameworks."""
        ...

    def set_weights(self, model: Model, weights: Arrays) -> None:
        """The inverse of ``get_weights``."""
        ...

    def get_optimizer_state(self, optimizer: Optimizer) -> Arrays:
        """The optimizer's state as named arrays; not exchangeable between frameworks."""
        ...

    def set_optimizer_state(self, optimizer: Optimizer, model: Model, state: Arrays) -> None:
        """The inverse of ``get_optimizer_state``."""
        ...

    def versions(self) -> dict[str, str]:
        """Versions of the framework's packages."""
        ...


# name -> module that has ``make_backend(performance) -> Backend``, package that must be installed, extra that installs it
BACKENDS: dict[str, tuple[str, str, str]] = {
    "torch": ("dptrain_torch.backend", "torch", "torch"),
    "tensorflow": ("dptrain_tf.backend", "tensorflow", "tf"),
}


def get_backend(name: str, performance: Performance | None = None) -> Backend:
    """Import and configure a backend.

    Args:
        name: ``torch`` or ``tensorflow``.
        performance: device, precision and compilation.
    Returns:
        The backend.
    Raises:
        RunError: unknown name, or the framework is not installed.
    """
    if name not in BACKENDS:
        raise RunError(f"There is no backend {name!r}; choose one of {', '.join(BACKENDS)}.")
    module, package, extra = BACKENDS[name]
    if importlib.util.find_spec(package) is None:
        raise RunError(f"The backend {name!r} needs {package}, which is not installed; run: pip install 'dptrain[{extra}]'.")
    backend: Backend = importlib.import_module(module).make_backend(performance or Performance())
    return backend


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Silence what native libraries write to stderr; TensorFlow's start-up messages obey no setting.

    Python's own errors are not affected: they are raised, and printed later.
    """
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # no stderr at all
        yield
        return
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def preload(name: str, performance: Performance | None = None) -> None:
    """Import a backend without its greetings; for the command line.

    Args:
        name: ``torch`` or ``tensorflow``.
        performance: device, precision and compilation.
    Raises:
        RunError: as ``get_backend``.
    """
    with quiet_stderr():
        get_backend(name, performance)
