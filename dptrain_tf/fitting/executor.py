"""The backend as ``fit`` uses it, and the precision that it works in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from dptrain.config import Performance
from dptrain_tf.backend import TensorFlowBackend
from dptrain_tf.gradients import Batch
from dptrain_tf.rules import children


class FitBackend(TensorFlowBackend):
    """The backend, counting how often a step is traced.

    Args:
        performance: as for the backend.
        jit: compile the sum over a physical batch by XLA.
    """

    def __init__(self, performance: Performance, jit: bool) -> None:
        super().__init__(performance)
        self.jit, self.traces = jit, 0

    def compile(self, function: Any) -> Any:
        """As the backend."""

        def counted(batch: Any) -> Any:
            self.traces += 1
            return function(batch)

        return super().compile(counted)

    def batch(self, x: Any, y: Any, mask: np.ndarray, factor: float | None = None) -> Batch:  # type: ignore[override]
        """As the backend; a factor is a tensor even where it is 1, so that its first move does not retrace."""
        scale = None if factor is None else tf.constant(factor, self.dtype)
        return Batch(self.tensor(x), self.tensor(y), self.tensor(mask), scale)


def precision(model: Any) -> Literal["float32", "float64"]:
    """float64 if any variable is, else float32."""
    return "float64" if any(v.dtype == "float64" for v in model.variables) or model.compute_dtype == "float64" else "float32"


@contextmanager
def in_full_precision(model: Any) -> Iterator[None]:
    """Let layers of a mixed precision policy compute in the type of their variables: what the self-check compares is then exact."""
    before = [(layer, layer._dtype_policy) for layer in children(model) if layer.compute_dtype in ("bfloat16", "float16")]
    try:
        for layer, _ in before:
            layer._dtype_policy = keras.dtype_policies.DTypePolicy(layer.variable_dtype)
        yield
    finally:
        for layer, policy in before:
            layer._dtype_policy = policy
