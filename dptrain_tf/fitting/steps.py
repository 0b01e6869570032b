"""Private steps for Keras' own loop.

Keras calls a train function with an iterator over the data. The one made here takes empty tickets from it, and runs ONE
``dptrain.step.TrainingStep`` per ticket: one logical Poisson batch, recorded in the ledger before its noisy sum is released. Callbacks,
``History``, validation, epochs and the progress bar are Keras'.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from dptrain.inforce import PlanInForce
from dptrain.sampling import physical_batches
from dptrain.step import TrainingStep
from dptrain_tf.backend import TensorFlowBackend


class Steps(ABC):
    """The steps of one model, counted over all calls of ``fit``.

    Args:
        model: the model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.count = 0  # steps begun; each index is used once for sampling and noise
        self.executor: TensorFlowBackend | None = None
        self.step: TrainingStep | None = None
        self.in_force: PlanInForce | None = None
        self.certified: dict[str, np.ndarray] = {}

    def admit(self) -> bool:
        """Whether one more step may be run."""
        return True

    def certify(self, scale: float) -> None:
        """Take the bounds of the weights as they are, which have been projected.

        Args:
            scale: factor of a clipping norm that moves.
        """
        assert self.in_force is not None and self.executor is not None
        graph = self.in_force.info.graph
        self.certified = self.executor.graph_weights(self.model, graph) if graph is not None else {}
        self.in_force.restore({"scale": np.asarray(scale)}, self.certified)

    def run(self) -> dict[str, float]:
        """One step, after proving the bounds again if a callback has written weights since the last one.

        Returns:
            Sums for the progress display. NOT private.
        Guarantee: where bounds are proven, those in force are of the very weights that the step differentiates.
        """
        assert self.step is not None and self.executor is not None
        graph = self.in_force.info.graph if self.in_force is not None else None
        if graph is not None:
            assert self.in_force is not None
            now = self.executor.graph_weights(self.model, graph)
            if not all(np.array_equal(value, self.certified[name]) for name, value in now.items()):
                self.executor.constrain(self.model, graph)
                self.certify(self.in_force.scale)
        index, self.count = self.count, self.count + 1
        stats = self.step(index)
        if graph is not None:
            self.certified = self.executor.graph_weights(self.model, graph)
        return stats

    def pieces(self) -> list[np.ndarray]:
        """Indices of the last logical batch, by physical batches. NOT private."""
        assert self.step is not None
        drawn = self.step.sampler.sample(self.count - 1)
        return [part[mask] for part, mask in physical_batches(drawn, self.step.physical_batch_size)]

    @abstractmethod
    def drawn(self) -> list[tuple[Any, Any]]:
        """The last logical batch, in pieces, for metrics. NOT private."""


def tickets(count: int) -> Any:
    """What Keras iterates over in place of data: one empty ticket per step."""
    return tf.data.Dataset.range(count).batch(1)


def train_function(model: Any, steps: Steps, debug: Callable[[], bool]) -> Callable[[Any], dict[str, Any]]:
    """What Keras calls once per step, or per ``steps_per_execution`` steps.

    Args:
        model: the model.
        steps: its steps.
        debug: whether the compiled metrics are computed on the drawn examples too. NOT private, nor is the loss.
    """

    def run(iterator: Any) -> dict[str, Any]:
        for _ in range(model.steps_per_execution):
            if next(iterator, None) is None or not steps.admit():
                break
            stats = steps.run()
            if stats["count"]:
                model._loss_tracker.update_state(stats["loss"] / stats["count"], sample_weight=stats["count"])
            if debug():
                for x, y in steps.drawn():
                    model.compute_metrics(x, y, model(x, training=False))
        return model.get_metrics_result() if debug() else {"loss": model._loss_tracker.result()}

    return run
