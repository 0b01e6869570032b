"""Variables that no layer call shows: class tokens, position embeddings, layer scales, owned by a layer that has layers below it.

While such a layer's ``call`` runs, a ``Frame`` notes what the layers below it, which are tapped by themselves, were called with and what
they returned. What is left of the ``call`` is then replayed for one example at a time (``rules.generic_uses``), cut off at these places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor


def is_float(x: Any) -> bool:
    """Whether something is a tensor that can carry a gradient."""
    return bool(tf.is_tensor(x) and x.dtype.is_floating)


def as_tensor(x: Any) -> Any:
    """What a layer was called with, a variable as its value."""
    return tf.convert_to_tensor(x) if isinstance(x, keras.Variable) else x


@dataclass(eq=False)
class Frame:
    """What is known of one call of a bare unit: a layer that owns variables and calls layers below it, which are tapped by themselves.

    Args:
        below: ids of the layers below.
        records: in the order of their calls: layer, output, whether the output was given a batch axis.
        inputs: float tensors that they were called with, as the tape watches them.
        shapes: shapes of these before they were broadcast over the batch.
    """

    below: set[int]
    records: list[tuple[Any, Any, bool]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    @contextmanager
    def replay(self, layers: list[Any], outputs: list[Any]) -> Iterator[list[Tensor]]:
        """Let the layers below return the given outputs instead of computing; yields the float tensors they are called with.

        Args:
            layers: the layers below.
            outputs: what each call returns, in the order of the records.
        """
        inputs: list[Tensor] = []
        waiting = [(record[0], output) for record, output in zip(self.records, outputs, strict=True)]
        before = [(layer, layer.__dict__.get("call")) for layer in layers]

        def stub(layer: Any) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                expected, output = waiting.pop(0) if waiting else (None, None)
                if expected is not layer:
                    raise ValueError("it calls other layers for one example than for a batch")
                inputs.extend(x for x in map(as_tensor, tf.nest.flatten((args, kwargs))) if is_float(x))
                return output

            return call

        try:
            for layer in layers:
                layer.__dict__["call"] = stub(layer)
            yield inputs
        finally:
            for layer, own in before:
                if own is None:
                    layer.__dict__.pop("call", None)
                else:
                    layer.__dict__["call"] = own
