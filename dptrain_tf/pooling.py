"""Pooling, centering and patches with the norms that ``dptrain/bounds.py`` proves; channels last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from dptrain_tf.own import Layer, need, positive, registered


class _ScaledPool(Layer):
    """Pooling of ``[B, H, W, C]`` over disjoint windows that fit.

    Args:
        pool_size: rows and columns of a window.
    """

    settings: tuple[str, ...] = ("pool_size",)

    def __init__(self, pool_size: int | Sequence[int] = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        sizes = (pool_size, pool_size) if isinstance(pool_size, int) else tuple(pool_size)
        need(self, len(sizes) == 2 and all(isinstance(k, int) and k > 0 for k in sizes), f"needs one or two sizes, not {pool_size!r}")
        self.pool_size = self.strides = sizes

    def build(self, input_shape: Any) -> None:
        """Check the image."""
        need(self, len(input_shape) == 4, "needs images [B, H, W, C]")
        fits = all(n is None or n >= k for n, k in zip(input_shape[1:3], self.pool_size, strict=True))
        need(self, fits, f"has windows of {self.pool_size}, larger than the image {tuple(input_shape[1:3])}")
        self.built = True

    def mean(self, x: Any) -> Any:
        """Of each window."""
        return tf.nn.avg_pool2d(x, self.pool_size, self.strides, "VALID")

    def compute_output_shape(self, input_shape: Any) -> Any:
        """One position per window."""
        space = (None if n is None else n // k for n, k in zip(input_shape[1:3], self.pool_size, strict=True))
        return (input_shape[0], *space, input_shape[3])


@registered
class ScaledL2NormPool2d(_ScaledPool):
    """``sqrt(sum x^2 + eps)`` over disjoint windows of ``[B, H, W, C]``: keeps the norms of gradients.

    Args:
        pool_size: rows and columns of a window.
        eps: keeps the gradient finite at zero.
    """

    settings: tuple[str, ...] = ("pool_size", "eps")

    def __init__(self, pool_size: int | Sequence[int] = 2, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(pool_size, **kwargs)
        positive(self, eps=eps)
        self.eps = eps

    def call(self, x: Any) -> Any:
        """Norm of each window."""
        return tf.sqrt(self.mean(x * x) * math.prod(self.pool_size) + self.eps)


@registered
class ScaledAvgPool2d(_ScaledPool):
    """The mean of each disjoint window of ``[B, H, W, C]`` times the square root of its size: keeps the norms of gradients.

    Args:
        pool_size: rows and columns of a window.
    """

    def call(self, x: Any) -> Any:
        """Scaled mean of each window."""
        return self.mean(x) * math.prod(self.pool_size) ** 0.5


class _ScaledGlobalPool(Layer):
    """Pooling of ``[B, ..., C]`` over all positions."""

    def build(self, input_shape: Any) -> None:
        """Check the input."""
        need(self, len(input_shape) > 2, "needs inputs [B, ..., C] with positions to pool over")
        self.built = True

    def total(self, x: Any) -> Any:
        """Sum over the positions."""
        return tf.reduce_sum(x, axis=list(range(1, x.shape.rank - 1)))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """``[B, C]``."""
        return (input_shape[0], input_shape[-1])


@registered
class ScaledGlobalL2NormPool2d(_ScaledGlobalPool):
    """``sqrt(sum x^2 + eps)`` over all positions of each channel.

    Args:
        eps: keeps the gradient finite at zero.
    """

    settings: tuple[str, ...] = ("eps",)

    def __init__(self, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        positive(self, eps=eps)
        self.eps = eps

    def call(self, x: Any) -> Any:
        """Norm of each channel."""
        return tf.sqrt(self.total(x * x) + self.eps)


@registered
class ScaledGlobalAvgPool2d(_ScaledGlobalPool):
    """The mean over all T positions of each channel times ``sqrt(T)``."""

    def call(self, x: Any) -> Any:
        """Scaled mean of each channel."""
        positions = tf.cast(tf.reduce_prod(tf.shape(x)[1:-1]), x.dtype)
        return self.total(x) / tf.sqrt(positions)


@registered
class LayerCentering(Layer):
    """Subtracts a mean of each example, never one over examples (pitfalls.md L3).

    Args:
        axis: axes of the mean, not 0; by default the positions of each channel, or the channels where there are no positions.
    """

    settings: tuple[str, ...] = ("axis",)

    def __init__(self, axis: int | Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
        need(self, 0 not in ((axis,) if isinstance(axis, int) else axis or ()), "would average over the examples with axis 0; remove it")

    def axes(self, rank: int) -> list[int]:
        """The axes of the mean for an input of a rank."""
        if self.axis is None:
            return [1] if rank == 2 else list(range(1, rank - 1))
        return [i % rank for i in ((self.axis,) if isinstance(self.axis, int) else self.axis)]

    def build(self, input_shape: Any) -> None:
        """Check the axes."""
        rank = len(input_shape)
        given = (self.axis,) if isinstance(self.axis, int) else self.axis or ()
        need(self, rank > 1, "needs inputs [B, ..., C]")
        need(self, all(-rank <= i < rank for i in given), f"has axis {self.axis} for inputs of rank {rank}")
        need(self, 0 not in self.axes(rank), f"would average over the examples with axis {self.axis} at rank {rank}; choose other axes")
        self.built = True

    def call(self, x: Any) -> Any:
        """Subtract the mean."""
        return x - tf.reduce_mean(x, axis=self.axes(x.shape.rank), keepdims=True)


@registered
class Patches(Layer):
    """An image ``[B, H, W, C]`` as a sequence of flattened disjoint patches ``[B, H/s W/s, s s C]``.

    Args:
        size: rows and columns s of a patch.
    """

    settings: tuple[str, ...] = ("size",)

    def __init__(self, size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = size
        need(self, isinstance(size, int) and size > 0, f"needs a size in pixels, not {size!r}")

    def build(self, input_shape: Any) -> None:
        """Check the image."""
        need(self, len(input_shape) == 4, "needs images [B, H, W, C]")
        space, s = tuple(input_shape[1:3]), self.size
        need(self, None not in space and all(n % s == 0 for n in space), f"has patches of {s}, which do not tile the image {space}")
        self.built = True

    def call(self, x: Any) -> Any:
        """Cut."""
        _, h, w, c = x.shape
        s = self.size
        tiles = tf.transpose(tf.reshape(x, [-1, h // s, s, w // s, s, c]), [0, 1, 3, 2, 4, 5])
        return tf.reshape(tiles, [-1, (h // s) * (w // s), s * s * c])

    def compute_output_shape(self, input_shape: Any) -> Any:
        """``[B, patches, s s C]``."""
        batch, h, w, c = input_shape
        return (batch, (h // self.size) * (w // self.size), self.size**2 * c)
