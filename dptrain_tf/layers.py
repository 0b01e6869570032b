"""The layers that specifications need and Keras does not have: a few whose weights live in ordinary Keras layers inside them, and those of
``lipschitz.py``."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from dptrain_tf.lipschitz import *  # noqa: F403
from dptrain_tf.lipschitz import absolute


def activation(name: str) -> Any:
    """An elementwise function by name."""
    if name == "gelu":
        return exact_gelu
    if name == "abs":
        return absolute
    return getattr(keras.activations, name)


def exact_gelu(x: Any) -> Any:
    """The exact GELU, in both frameworks."""
    return keras.activations.gelu(x, approximate=False)


class PositionEmbedding(keras.layers.Layer):
    """Adds a learned vector to each position of ``[B, T, D]``."""

    def __init__(self, length: int, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.length, self.dim = length, dim
        self.embedding = keras.layers.Embedding(length, dim, name="embedding", dtype=self.dtype_policy)

    def build(self, input_shape: Any) -> None:
        """Create the table."""
        self.embedding.build((None, self.length))
        self.built = True

    def call(self, x: Any) -> Any:
        """Look up ids of shape ``[B, T]``, so that every example has its own row."""
        ids = ops.broadcast_to(ops.arange(self.length), (ops.shape(x)[0], self.length))
        return x + self.embedding(ids)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "length": self.length, "dim": self.dim}


class SelfAttention(keras.layers.Layer):
    """Multi-head self-attention with separate maps."""

    def __init__(self, dim: int, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim, self.heads = dim, heads
        maps = [keras.layers.Dense(dim, name=name, dtype=self.dtype_policy) for name in ("query", "key", "value", "out")]
        self.query, self.key, self.value, self.out = maps

    def build(self, input_shape: Any) -> None:
        """Create the maps."""
        for part in (self.query, self.key, self.value, self.out):
            part.build((None, None, self.dim))
        self.built = True

    def call(self, x: Any) -> Any:
        """Attend over ``[B, T, D]``."""
        batch, length = ops.shape(x)[0], ops.shape(x)[1]
        width = self.dim // self.heads

        def split(z: Any) -> Any:
            return ops.transpose(ops.reshape(z, (batch, length, self.heads, width)), (0, 2, 1, 3))

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))  # [B, heads, T, D / heads]
        scores = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) * width**-0.5)
        mixed = ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3))
        return self.out(ops.reshape(mixed, (batch, length, self.dim)))

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "dim": self.dim, "heads": self.heads}
