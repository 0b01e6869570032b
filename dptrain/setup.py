"""Everything a run is made of before its first step: data, model, loss, plan and self-check. Nothing is spent here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dptrain.backend import Backend, get_backend
from dptrain.config import TrainConfig
from dptrain.data import Dataset, load, validate
from dptrain.errors import ConfigError, DataError, UnsupportedModelError
from dptrain.info import ModelInfo
from dptrain.layer_specs import AnyLayer, Embedding
from dptrain.losses import LOSSES
from dptrain.mechanism import FLOAT_MARGIN
from dptrain.plan import Plan
from dptrain.sampling import Scheme, steps_per_release


@dataclass(frozen=True)
class Setup:
    """Everything a run is made of before its first step: built by ``prepare``, without spending anything."""

    config: TrainConfig
    backend: Backend
    data: Dataset
    model: Any
    loss: Any
    plan: Plan
    sample_rate: float
    num_steps: int
    scheme: Scheme
    info: ModelInfo = field(default_factory=lambda: ModelInfo(()))

    @property
    def num_releases(self) -> int:
        """Releases that the planned steps are recorded as."""
        return -(-self.num_steps // steps_per_release(self.scheme.public(len(self.data.x_train))))


def num_outputs(config: TrainConfig, data: Dataset) -> int:
    """Width of the model's last layer, from public facts.

    Raises:
        DataError: the targets do not fit the loss.
    """
    info = LOSSES[config.loss.name]
    if info.targets == "values":
        if data.num_classes is not None:
            raise DataError(f"loss {info.name} needs float targets, and data {data.name!r} has class labels; use cross_entropy.")
        return int(np.prod(data.y_train.shape[1:], dtype=int)) if data.y_train.ndim > 1 else 1
    if data.num_classes is None:
        raise DataError(f"loss {info.name} needs class labels, and data {data.name!r} has float targets; use mean_squared_error.")
    if info.binary:
        if data.num_classes != 2:
            raise DataError(f"loss binary_cross_entropy needs 2 classes, and data {data.name!r} has {data.num_classes}; use cross_entropy.")
        return 1
    return data.num_classes


def check_tokens(layers: tuple[AnyLayer, ...], data: Dataset) -> None:
    """Refuse integer inputs that the model's embedding has no row for, before training (pitfalls.md G29)."""
    tables = [layer.vocabulary for layer in layers if isinstance(layer, Embedding)]
    integers = np.issubdtype(data.x_train.dtype, np.integer)
    if integers != bool(tables):
        kind = "token ids" if integers else "real numbers"
        raise DataError(
            f"data {data.name!r} holds {kind}, and the model starts {'with' if tables else 'without'} an embedding; "
            "choose a model that fits."
        )
    for split, x in (("training", data.x_train), ("test", data.x_test)):
        if tables and x.size and (x.min() < 0 or x.max() >= tables[0]):
            raise DataError(f"the {split} split of data {data.name!r} has token ids outside 0..{tables[0] - 1}; raise model.vocabulary.")


def probe(data: Dataset, count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic examples with the data's shapes, for planning and the self-check; no real example is touched.

    Args:
        data: shapes and types.
        count: examples.
    Returns:
        Inputs and targets.
    """
    rng = np.random.default_rng(0)
    shape = (count, *data.input_shape)
    if np.issubdtype(data.x_train.dtype, np.integer):
        x = rng.integers(0, 2, shape).astype(data.x_train.dtype)
    else:
        x = rng.standard_normal(shape).astype(data.x_train.dtype)
    if data.num_classes is not None:
        return x, (np.arange(count) % data.num_classes).astype(data.y_train.dtype)
    return x, rng.standard_normal((count, *data.y_train.shape[1:])).astype(data.y_train.dtype)


@dataclass(frozen=True)
class Parts:
    """Data, model and loss of a run, before any strategy has looked at them."""

    backend: Backend
    data: Dataset
    model: Any
    loss: Any
    num_outputs: int


def assemble(config: TrainConfig, backend: str = "torch", data: Dataset | None = None, model: Any = None) -> Parts:
    """Load the data and build the model and the loss.

    Args:
        config: the run.
        backend: ``torch`` or ``tensorflow``.
        data: a data set in place of the config's.
        model: a native model in place of the config's.
    Returns:
        The parts.
    Raises:
        DptrainError: bad data or model.
    """
    if data is None:
        c = config.data
        data = load(c.name, path=c.path, download=c.download, source=c.source, num_classes=c.num_classes, limit=c.limit)
    else:
        validate(data)
    outputs = num_outputs(config, data)
    executor = get_backend(backend, config.performance)
    if model is None:
        check_tokens(config.model.expand(data.input_shape), data)
        model = executor.build_model(config, data.input_shape, outputs)
    return Parts(executor, data, model, executor.build_loss(config.loss, outputs), outputs)


def prepare(config: TrainConfig, backend: str = "torch", data: Dataset | None = None, model: Any = None) -> Setup:
    """Data, model, self-check and plan of a run; raises whatever is wrong with them before anything is spent.

    Args:
        config: the run.
        backend: ``torch`` or ``tensorflow``.
        data: a data set in place of the config's.
        model: a native model in place of the config's; with ``clipless`` its constraints are restored here.
    Returns:
        The parts.
    Raises:
        DptrainError: bad data, model or settings.
    """
    parts = assemble(config, backend, data, model)
    executor, count = parts.backend, len(parts.data.x_train)
    scheme, steps = config.sampling.resolved(count), config.sampling.num_steps(count)
    x, y = probe(parts.data)
    info = describe(parts, config, x)
    timings = None
    if config.performance.norm_decision == "measured" and config.strategy.name == "mixed_ghost":
        timings = executor.time_norms(parts.model, parts.loss, *probe(parts.data, config.performance.physical_batch_size))
    plan = config.strategy.plan(info, decision=config.performance.norm_decision, timings=timings)
    if plan.private:
        executor.self_check(parts.model, parts.loss, x, y, plan)
    setup = Setup(config, executor, parts.data, parts.model, parts.loss, plan, scheme.sample_rate, steps, scheme, info)
    if config.performance.check_bounds:
        check_bounds(setup, plan)
    return setup


def describe(parts: Parts, config: TrainConfig, x: np.ndarray) -> ModelInfo:
    """The facts a strategy asks for; where it proves bounds, after the model's constraints have been restored for the first time.

    Raises:
        UnsupportedModelError: lists every layer that cannot be handled, or has no bound.
    """
    executor, model = parts.backend, parts.model
    info = executor.describe(model, x)
    if not config.strategy.proves:
        return info
    graph = executor.graph(model, x)
    if graph.problems:
        raise UnsupportedModelError(graph.problems)
    try:
        lipschitz = config.loss.lipschitz(parts.num_outputs)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    return replace(info, graph=graph, certificates=executor.constrain(model, graph), loss_lipschitz=lipschitz)


def check_bounds(setup: Setup, plan: Plan) -> None:
    """Compare proven bounds with per-sample gradient norms on a synthetic batch; the option ``performance.check_bounds``.

    Raises:
        UnsupportedModelError: a norm exceeds its bound, which would be an error of ours.
    """
    x, y = probe(setup.data, setup.config.performance.physical_batch_size)
    for name, (attained, bound) in setup.backend.attained(setup.model, setup.loss, x, y, plan).items():
        if not attained <= bound * (1 + FLOAT_MARGIN):
            raise UnsupportedModelError(
                [f"group {name!r} reaches a gradient norm of {attained:.6g} over its bound {bound:.6g}; report this."]
            )
