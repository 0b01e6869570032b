"""One use of one parameter in one call of a layer: its per-sample gradient, its norm without it, its weighted sum.

A parameter's per-sample gradient is the sum over its uses. Its squared norm is therefore the sum over ALL pairs of uses of their
inner products, cross terms included (math.md section 2): that is how tied weights and layers called twice come out exact.

    instantiate()      per-sample gradient                    [B, *shape]
    in_parts()         its squared norm, and the same a few examples at a time
    inner(other)       <G_i, G'_i> without instantiating      [B]
    weighted_sum(w)    sum_i w_i G_i                          [*shape]

Shapes: B examples, T positions, D fan-in, p fan-out, d width of an embedding. Channels are last, and ``shape`` is that of the
Keras variable, which is ``[D, p]`` where torch has ``[p, D]``. Shapes are static: a physical batch has a fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from dptrain.mechanism import FLOAT_MARGIN


def wide(x: Tensor) -> Tensor:
    """Norms and contractions are taken in float32 at least (pitfalls.md G11)."""
    return tf.cast(x, tf.float32) if x.dtype in (tf.float16, tf.bfloat16) else x


def column(w: Tensor, like: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1, ...]``, in the type and rank of another tensor."""
    w = tf.reshape(w, [-1] + [1] * (like.shape.rank - 1))
    return w if w.dtype == tf.bool else tf.cast(w, like.dtype)


def per_example(flags: Tensor, x: Tensor) -> Tensor:
    """Zero the examples whose flag is False, by selection, since 0 * NaN is NaN."""
    return tf.where(column(flags, x), x, tf.zeros([], x.dtype))


def split_rows(x: Tensor, batch: int) -> Tensor:
    """``[k B, ...]`` as ``[B, k, ...]``."""
    return tf.reshape(x, [batch, x.shape[0] // batch, *x.shape[1:]])


def square_sum(x: Tensor) -> Tensor:
    """Sum of squares of each example, ``[B]``."""
    return tf.reduce_sum(tf.square(x), axis=list(range(1, x.shape.rank)))


def by_axis(x: Tensor, axis: int) -> Tensor:
    """Sum of squares over all axes but one; over the outer ones first, so that no sum skips through memory, and one after the other, since
    rounding grows with the length of a sum."""
    if axis == 0:
        return square_sum(x)
    outer = tf.square(tf.reshape(x, [-1, *x.shape[axis - 1 :]]))
    outer = tf.reduce_sum(tf.reduce_sum(outer, axis=1), axis=0)
    return tf.reduce_sum(outer, axis=list(range(1, outer.shape.rank))) if outer.shape.rank > 1 else outer


def covered(positions: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Size per axis of the padded input that a convolution's windows reach."""
    return tuple((t - 1) * r + d * (k - 1) + 1 for t, k, r, d in zip(positions, kernel, stride, dilation, strict=True))


def gram_square(one: Tensor, two: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """What ``Use.square`` returns, from two Gram matrices over the same positions.

    Args:
        one, two: ``[B groups, T, T]``.
        groups: channel groups.
    Returns:
        The sum of their product ``[B]``; the sum over positions of the product of the lengths ``[B, groups]``.
    """
    # Roots before the product, which could leave float32's range.
    roots = [tf.sqrt(tf.nn.relu(tf.linalg.diag_part(gram))) for gram in (one, two)]
    lengths = roots[0] * roots[1]
    total = tf.reduce_sum(tf.reshape(one * two, [one.shape[0] // groups, -1]), axis=1)
    return total, tf.reshape(tf.reduce_sum(lengths, axis=1), [-1, groups])


# Slices that skip numbers, or are a few channels wide, are slow: there patches are unfolded instead, as long as they take at most so many
# times the memory of the cotangent. 256 images of 28x28, 8x8, stride 2: 108 ms by slices, 11 unfolded; 64 of 32x32x64, 3x3: 125, 167.
UNFOLD, FEW_CHANNELS = 8, 16
# Numbers that the temporaries of a norm should hold at once; more examples are taken in turns, which also keeps them in cache, but in no
# more turns than that, for the size of the graph.
TILE, TURNS = 1 << 21, 8
# Positions from which only a half of a Gram matrix is taken.
HALVED = 256
# Positions from which per-sample gradients of images without channel groups are left to the framework's kernel,
# numbers it works on at once, calls, and the most taps of a kernel of channel groups.
GROUP_POSITIONS, GROUP_NUMBERS, GROUP_CALLS, GROUP_TAPS = 256, 1 << 20, 32, 9
# Channels up to which strided ones are left to it as well.
STRIDED_CHANNELS = 32
Sizes = Sequence[int]  # of axes


@dataclass(eq=False)
class Use:
    """Base of the uses; a use whose gradient is already per sample is a ``DirectUse``."""

    ghost = False

    @property
    def shrinks(self) -> bool:
        """Whether the per-sample gradient takes less memory than what it is made of."""
        return False

    def instantiate(self) -> Tensor:
        """Per-sample gradient ``[B, *shape]``."""
        raise TypeError(f"{type(self).__name__} cannot be instantiated")

    def in_parts(self) -> tuple[Tensor, PartsUse]:
        """Squared norm of the per-sample gradient, ``[B]``, and the gradient, made a few examples at a time."""
        gradient = self.instantiate()
        return square_sum(gradient), PartsUse([gradient], 0, tuple(gradient.shape[1:]))

    def inner(self, other: Use) -> Tensor | None:
        """Inner product with another use's per-sample gradient, ``[B]``; None where no ghost formula joins the two."""
        return None

    def square(self) -> tuple[Tensor, Tensor] | None:
        """``|G_i|^2`` ``[B]`` without instantiating, and ``sum_t |a_t| |g_t|`` per channel group ``[B, groups]``.

        The second bounds the rounding error of ``inner``; it is 0 where nothing can cancel.
        """
        return None

    def weighted_sum(self, w: Tensor) -> Tensor:
        """``sum_i w_i G_i``, of the parameter's shape."""
        gradient = self.instantiate()
        return tf.tensordot(tf.cast(w, gradient.dtype), gradient, axes=1)

    def cut(self, start: int, stop: int) -> Use:
        """The use of some of the examples."""
        raise TypeError(f"{type(self).__name__} cannot be cut")

    def temporaries(self, ghost: bool) -> int:
        """Numbers that the norm of one example needs meanwhile; 0 where it cannot be taken for some of the examples."""
        return 0

    def keep(self, finite: Tensor) -> Use:
        """The same use with the examples zeroed whose flag is False."""
        raise TypeError(f"{type(self).__name__} cannot be masked")

    def fold(self, batch: int) -> Use:
        """The same use where ``[k B, ...]`` rows are B examples of k rows each, the examples outermost: the rows become positions."""
        raise TypeError(f"{type(self).__name__} cannot be folded")


@dataclass(eq=False)
class DirectUse(Use):
    """A per-sample gradient that is at hand: biases, normalisation layers, the slow method."""

    gradient: Tensor  # [B, *shape]

    def instantiate(self) -> Tensor:
        return self.gradient

    def keep(self, finite: Tensor) -> Use:
        return DirectUse(per_example(finite, self.gradient))

    def fold(self, batch: int) -> Use:
        return DirectUse(tf.reduce_sum(split_rows(self.gradient, batch), axis=1))


@dataclass(eq=False)
class PartsUse(Use):
    """A per-sample gradient that was made a few examples at a time and stays so, as the framework's kernel has laid it out."""

    pieces: list[Tensor]  # [..., b, p] each
    axis: int  # of the examples, in each
    shape: tuple[int, ...]  # of the weight

    def instantiate(self) -> Tensor:
        joined = tf.concat(self.pieces, axis=self.axis)
        others = [axis for axis in range(joined.shape.rank) if axis != self.axis]
        return tf.reshape(tf.transpose(joined, [self.axis, *others]), [joined.shape[self.axis], *self.shape])

    def split(self, w: Tensor) -> list[Tensor]:
        """``[B]`` cut and shaped to multiply the pieces."""
        parts = tf.split(w, [piece.shape[self.axis] for piece in self.pieces])
        return [tf.reshape(part, [-1] + [1] * (piece.shape.rank - 1 - self.axis)) for part, piece in zip(parts, self.pieces, strict=True)]

    def weighted_sum(self, w: Tensor) -> Tensor:
        parts = self.split(tf.cast(w, self.pieces[0].dtype))
        # Multiplied and summed: three times as fast, with the examples on an inner axis, as a contraction.
        sums = [tf.reduce_sum(piece * part, axis=self.axis) for piece, part in zip(self.pieces, parts, strict=True)]
        return tf.reshape(tf.add_n(sums), self.shape)

    def keep(self, finite: Tensor) -> Use:
        kept = [tf.where(part, piece, tf.zeros([], piece.dtype)) for part, piece in zip(self.split(finite), self.pieces, strict=True)]
        return replace(self, pieces=kept)

    def fold(self, batch: int) -> Use:
        return DirectUse(self.instantiate()).fold(batch)


def gram_blocks(x: Tensor) -> list[tuple[Tensor, int]]:
    """The Gram matrix over positions of ``[B, T, D]`` in blocks, and how often each counts: 1 on the diagonal, 2 above it.

    From ``HALVED`` positions on, half of the matrix is left out, since it is symmetric; below that, smaller products are slower ones.
    """
    if x.shape[1] < HALVED:
        return [(tf.matmul(x, x, transpose_b=True), 1)]
    half = x.shape[1] // 2
    low, high = x[:, :half], x[:, half:]
    return [*gram_blocks(low), *gram_blocks(high), (tf.matmul(low, high, transpose_b=True), 2)]


@dataclass(eq=False)
class LinearUse(Use):
    """``z = a W``: ``G_i = a_i^T g_i``. For a weight stored as ``[p, D]`` the roles of ``a`` and ``g`` are swapped."""

    a: Tensor  # [B, T, D]
    g: Tensor  # [B, T, p]
    shape: tuple[int, ...]  # of the weight: [D, p], or with either axis split
    ghost = True

    @property
    def shrinks(self) -> bool:
        return math.prod(self.shape) < math.prod(self.a.shape[1:]) + math.prod(self.g.shape[1:])

    def instantiate(self) -> Tensor:
        return tf.reshape(tf.matmul(self.a, self.g, transpose_a=True), [-1, *self.shape])

    def inner(self, other: Use) -> Tensor | None:
        if isinstance(other, EmbeddingUse):
            return other.inner(self)
        if not isinstance(other, LinearUse) or (self.a.shape[2], self.g.shape[2]) != (other.a.shape[2], other.g.shape[2]):
            return None
        if self.a.shape[1] == 1 and other.a.shape[1] == 1:
            return tf.reduce_sum(self.a * other.a, [1, 2]) * tf.reduce_sum(self.g * other.g, [1, 2])
        gram_a = tf.matmul(self.a, other.a, transpose_b=True)  # [B, T, T']
        return tf.reduce_sum(gram_a * tf.matmul(self.g, other.g, transpose_b=True), [1, 2])

    def square(self) -> tuple[Tensor, Tensor]:
        if self.a.shape[1] == 1:  # one position: a product of two sums of squares, nothing cancels
            squares = [tf.reduce_sum(tf.square(t), [1, 2]) for t in (self.a, self.g)]
            return squares[0] * squares[1], tf.zeros([self.a.shape[0], 1], self.a.dtype)
        total: Any = 0
        reach: Any = 0
        for (one, times), (two, _) in zip(gram_blocks(self.a), gram_blocks(self.g), strict=True):
            if times == 1:
                own, lengths = gram_square(one, two, 1)
                total, reach = total + own, reach + lengths
            else:
                total = total + times * tf.reduce_sum(one * two, [1, 2])
        return total, reach

    def weighted_sum(self, w: Tensor) -> Tensor:
        a, g, w = self.a, self.g, column(w, self.g)
        a, g = (a * w, g) if a.shape[2] < g.shape[2] else (a, g * w)  # the smaller one is copied
        a, g = (tf.reshape(t, [-1, t.shape[2]]) for t in (a, g))
        return tf.reshape(tf.matmul(a, g, transpose_a=True), self.shape)

    def cut(self, start: int, stop: int) -> Use:
        return replace(self, a=self.a[start:stop], g=self.g[start:stop])

    def temporaries(self, ghost: bool) -> int:
        return 3 * self.a.shape[1] ** 2 if ghost else self.a.shape[2] * self.g.shape[2]

    def keep(self, finite: Tensor) -> Use:
        return replace(self, a=per_example(finite, self.a), g=per_example(finite, self.g))

    def fold(self, batch: int) -> Use:
        a, g = (tf.reshape(t, [batch, -1, t.shape[2]]) for t in (self.a, self.g))
        return replace(self, a=a, g=g)


@dataclass(eq=False)
class EmbeddingUse(Use):
    """A table lookup: row ``v`` of ``G_i`` is the sum of ``g_t`` over the positions with ``id_t = v``."""

    ids: Tensor  # [B, T], int64
    g: Tensor  # [B, T, d]
    rows: int
    ghost = True

    def segments(self, ids: Tensor, count: int) -> Tensor:
        """``[B, count, d]``: the sum of ``g`` over equal ``ids`` within each example."""
        batch, _, width = self.g.shape
        offset = tf.range(batch, dtype=ids.dtype)[:, None] * count
        flat = tf.math.unsorted_segment_sum(tf.reshape(self.g, [-1, width]), tf.reshape(ids + offset, [-1]), batch * count)
        return tf.reshape(flat, [batch, count, width])

    def instantiate(self) -> Tensor:
        return self.segments(self.ids, self.rows)

    def inner(self, other: Use) -> Tensor | None:
        if other is self:  # segment sums over equal ids: O(B T d), the table is never written
            order = tf.argsort(self.ids, axis=1, stable=True)
            ids = tf.gather(self.ids, order, batch_dims=1)
            change = tf.cast(ids[:, 1:] != ids[:, :-1], tf.int64)
            segment = tf.cumsum(tf.pad(change, [[0, 0], [1, 0]]), axis=1)
            ordered = replace(self, ids=ids, g=tf.gather(self.g, order, batch_dims=1))
            return square_sum(ordered.segments(segment, self.ids.shape[1]))
        if isinstance(other, EmbeddingUse):
            same = self.ids[:, :, None] == other.ids[:, None, :]  # [B, T, T']
            gram = tf.matmul(self.g, other.g, transpose_b=True)
            return tf.reduce_sum(tf.where(same, gram, tf.zeros_like(gram)), [1, 2])
        if isinstance(other, LinearUse) and (other.a.shape[2], other.g.shape[2]) == (self.rows, self.g.shape[2]):
            # Tied embedding and output matrix: both have the table's layout [rows, d].
            picked = tf.gather(other.a, self.ids, axis=2, batch_dims=1)  # [B, T', T]
            return tf.reduce_sum(tf.matmul(other.g, self.g, transpose_b=True) * picked, [1, 2])
        return None

    def square(self) -> tuple[Tensor, Tensor]:
        own = self.inner(self)
        # The norm is that of the gradient's own rows: nothing cancels.
        return own, tf.zeros([self.g.shape[0], 1], self.g.dtype)

    def weighted_sum(self, w: Tensor) -> Tensor:
        g = tf.reshape(self.g * column(w, self.g), [-1, self.g.shape[2]])
        return tf.math.unsorted_segment_sum(g, tf.reshape(self.ids, [-1]), self.rows)

    def keep(self, finite: Tensor) -> Use:
        return replace(self, g=per_example(finite, self.g))

    def fold(self, batch: int) -> Use:
        return replace(self, ids=tf.reshape(self.ids, [batch, -1]), g=tf.reshape(self.g, [batch, -1, self.g.shape[2]]))


@dataclass(eq=False)
class ConvUse(Use):
    """A convolution of any rank, written as the map from ``x`` to positions of ``g``; a transposed one has the roles swapped.

    Nothing is unfolded: ``tf.image.extract_patches`` was twice as slow as one strided slice of the padded input per kernel tap.
    """

    x: Tensor  # [B, *S, C], not padded
    g: Tensor  # [B, *T, p]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pads: tuple[tuple[int, int], ...]  # before and after, per axis
    shape: tuple[int, ...]  # of the weight: [*kernel, C / groups, p], or depthwise [*kernel, C, p / C]
    native: Callable[[Tensor], Tensor] | None = None  # the framework's own weighted sum, where its precision is enough
    ghost = True

    @property
    def shrinks(self) -> bool:
        return math.prod(self.shape) < math.prod(self.x.shape[1:]) + math.prod(self.g.shape[1:])

    def padded(self) -> Tensor:
        """The input padded exactly as the layer does it, so that what follows is a convolution with padding 0 (G3).

        Rows that no window reaches are cut off.
        """
        return self.pad(self.x)

    def pad(self, x: Tensor) -> Tensor:
        """``padded`` of some of the examples."""
        x = tf.pad(x, [(0, 0), *self.pads, (0, 0)]) if any(map(any, self.pads)) else x
        reach = covered(self.g.shape[1:-1], self.kernel, self.stride, self.dilation)
        return x if tuple(x.shape[1:-1]) == reach else x[(slice(None), *(slice(n) for n in reach))]

    def offsets(self) -> list[tuple[slice, ...]]:
        """For each kernel tap, the slices of the padded input that it meets at the output positions."""
        out = self.g.shape[1:-1]
        taps = product(*(range(k) for k in self.kernel))
        return [
            tuple(slice(k * d, k * d + r * (t - 1) + 1, r) for k, d, r, t in zip(tap, self.dilation, self.stride, out, strict=True))
            for tap in taps
        ]

    def views(self, padded: Tensor) -> Iterator[Tensor]:
        """What each kernel tap meets of a padded input at the output positions, ``[B, *T, C]`` each.

        TensorFlow's slices with strides are slow: 5x5 taps with strides of 2 over 64 examples of 16x16x128 took 89 ms, and 10 as slices
        without strides of the input with every axis split in two.
        """
        if max(self.stride) == 1 or len(self.kernel) > 2:  # an axis more for each would be too many
            yield from (padded[(slice(None), *where)] for where in self.offsets())
            return
        surplus = [-size % step for size, step in zip(padded.shape[1:-1], self.stride, strict=True)]
        if any(surplus):
            padded = tf.pad(padded, [(0, 0), *((0, n) for n in surplus), (0, 0)])
        halves = [n for size, step in zip(padded.shape[1:-1], self.stride, strict=True) for n in (size // step, step)]
        split = tf.reshape(padded, [padded.shape[0], *halves, padded.shape[-1]])
        for where in self.offsets():
            first = [(axis.start // axis.step, axis.start % axis.step, size) for axis, size in zip(where, self.g.shape[1:-1], strict=True)]
            yield split[(slice(None), *(cut for row, phase, size in first for cut in (slice(row, row + size), phase)))]

    def grouped(self, x: Tensor) -> Tensor:
        """``[B, *S, C]`` as ``[B, S, groups, C / groups]``, or ``[B, S, C]`` where there is one group."""
        split = [self.groups, x.shape[-1] // self.groups] if self.groups > 1 else [x.shape[-1]]
        return tf.reshape(x, [x.shape[0], math.prod(x.shape[1:-1]), *split])

    def by_group(self, u: Tensor) -> Tensor:
        """``[B, S, groups, C]`` as ``[B groups, S, C]``; without groups as it is."""
        return u if self.groups == 1 else tf.reshape(tf.transpose(u, [0, 2, 1, 3]), [-1, u.shape[1], u.shape[3]])

    def unfolds(self, padded: Tensor) -> bool:
        """Whether patches are faster than slices, and not too large."""
        slow = any(step > 1 for step in self.stride) or padded.shape[-1] <= FEW_CHANNELS
        small = math.prod(self.kernel) * padded.shape[-1] <= UNFOLD * self.g.shape[-1]
        return len(self.kernel) == 2 and self.groups == 1 and slow and small

    def patches(self, padded: Tensor) -> Tensor:
        """What each position sees of a padded input, ``[B, T, taps C]``, or ``[B, T, groups, taps C / groups]``."""
        if len(self.kernel) == 2 and self.groups == 1:
            sizes, strides, rates = ([1, *axes, 1] for axes in (self.kernel, self.stride, self.dilation))
            found = tf.image.extract_patches(padded, sizes, strides, rates, "VALID")
            return tf.reshape(found, [found.shape[0], -1, found.shape[-1]])
        return tf.concat([self.grouped(view) for view in self.views(padded)], axis=-1)

    def contract(self, g: Tensor, out: str) -> Tensor:
        """``out = "b"``: per-sample gradients for the cotangents ``g``; ``out = ""``: their sum."""
        taps: list[Any] = []
        g, padded = self.grouped(g), self.padded()
        if self.unfolds(padded):
            patches = self.patches(padded)
            summed = tf.matmul(patches, g, transpose_a=True) if out else tf.tensordot(patches, g, axes=((0, 1), (0, 1)))
            return tf.reshape(summed, [*([self.x.shape[0]] if out else []), *self.shape])
        views = self.views(padded)
        for _ in range(math.prod(self.kernel)):
            with tf.control_dependencies(taps[-2:-1]):  # two slices at a time stand in memory
                x = self.grouped(next(views))
            if self.groups == 1 and out:
                taps.append(tf.matmul(x, g, transpose_a=True))  # [B, C, p]
            elif self.groups == 1:
                taps.append(tf.tensordot(x, g, axes=((0, 1), (0, 1))))
            elif x.shape[-1] == 1:  # depthwise
                taps.append(tf.reduce_sum(x * g, axis=1 if out else (0, 1)))
            else:
                taps.append(tf.einsum(f"btkc,btkq->{out}ckq", x, g))
        batch = [self.x.shape[0]] if out else []
        return tf.reshape(tf.stack(taps, axis=len(batch)), [*batch, *self.shape])

    def instantiate(self) -> Tensor:
        quick = self.suits_cotangents() or self.suits_groups()
        return self.in_parts()[1].instantiate() if quick else self.contract(self.g, "b")

    def in_parts(self) -> tuple[Tensor, PartsUse]:
        if self.suits_cotangents():
            return self.by_cotangents()
        return self.by_groups() if self.suits_groups() else super().in_parts()

    def suits_cotangents(self) -> bool:
        """Whether ``by_cotangents`` is the faster way: depthwise kernels above 3x3, for which oneDNN has no good weight gradient.

        Milliseconds for 32 examples on two cores, by cotangents; by slices: 7x7 16x16x40 1.2, 4.5, 8x8x80 1.4, 4.3, 4x4x160 1.1, 1.9; 8
        of 56x56x96 10, 45; 64 of 32x32x64, 5x5, 16, 62; with strides of 2 16x16x96 3.0, 4.7.
        """
        if len(self.kernel) > 2 or self.x.dtype != tf.float32 or not self.groups == self.x.shape[-1] == self.g.shape[-1] > 1:
            return False
        even = max(self.dilation) == 1 or (max(self.stride) == 1 and len(set(self.dilation)) == 1 and len(self.kernel) == 2)
        return even and math.prod(self.kernel) > GROUP_TAPS and _GROUPS.get() and groups_work()

    def by_cotangents(self) -> tuple[Tensor, PartsUse]:
        """As a depthwise convolution of the input, whose kernel is the cotangent: strides and dilations change places."""

        def gradient(x: Tensor, g: Tensor, b: int, kernel: Sizes, stride: Sizes, dilation: Sizes) -> Tensor:
            kernels = tf.reshape(g, [*g.shape[1:], 1])
            found = tf.nn.depthwise_conv2d(x, kernels, [1, *dilation, 1], "VALID", dilations=list(stride) if max(stride) > 1 else None)
            return tf.reshape(found[:, : kernel[0], : kernel[1]], [*kernel, 1, b, -1])

        return self.side_by_side(gradient)

    def suits_groups(self) -> bool:
        """Whether ``by_groups`` is the faster way: oneDNN's kernel, with enough positions to outweigh its setting up.

        Milliseconds for 64 examples on two busy cores, by groups; by slices; the native sum: 32x32x64 -> 64 54, 85, 48; 16x16x128 -> 128
        58, 72, 48; 16x16x64 -> 128 26, 37, 24; 32x32x3 -> 64 8, 23, 5; 8x8x128 -> 256 38, 42, 23. Where channels are in groups, it always
        is for kernels up to 3x3: depthwise 32x32x64 with strides of 2 7, 14 (native 1), 16x16x128 5, 14 (3), 4x4x512 2.3, 4.5 (0.5); 32
        groups of 16x16x128 7, 91; 128 of 4x4x512 8, 17. For larger ones oneDNN has no good kernel: 5x5 depthwise 16x16x128 28, 19. With
        strides of 2, 3x3: 64x64x3 -> 32 3, 12; 32x32x16 -> 32 2.6, 5.0; 32x32x32 -> 64 7, 10, but 16x16x64 -> 128 8.4, 8.1. A single
        channel, 64x64 -> 32, 7x7, strides of 2 6, 26.
        """
        if len(self.kernel) > 2 or max(self.kernel) == 1 or self.x.dtype != tf.float32:
            return False
        positions = math.prod(self.g.shape[1:-1])
        if self.groups > 1:
            reaches = len(set(self.stride)) == 1 and min(self.kernel) >= self.stride[0]
            slices = len(self.kernel) == 1 and self.groups == self.x.shape[-1]  # depthwise over sequences: slices are as good
            fits = positions > 4 and math.prod(self.kernel) <= GROUP_TAPS and reaches and not slices
        elif len(self.kernel) == 2 and max(self.stride) == 1:
            fits = positions >= GROUP_POSITIONS or self.x.shape[-1] == 1
        else:  # slices would be strided
            overlap = len(set(self.stride)) == 1 and min(self.kernel) > self.stride[0] and max(self.dilation) == 1
            fits = len(self.kernel) == 2 and overlap and self.x.shape[-1] <= STRIDED_CHANNELS
        return fits and _GROUPS.get() and groups_work()

    def by_groups(self) -> tuple[Tensor, PartsUse]:
        """By the framework's weight gradient, with each of a few examples a channel group of one example."""

        def gradient(x: Tensor, g: Tensor, b: int, kernel: Sizes, stride: Sizes, dilation: Sizes) -> Tensor:
            c, p = self.x.shape[-1] // self.groups, self.g.shape[-1]  # of a depthwise kernel [*kernel, C, m] too: outputs in the same order
            found = tf.raw_ops.Conv2DBackpropFilter(
                input=x, filter_sizes=[*kernel, c, b * p], out_backprop=g, strides=[1, *stride, 1], padding="VALID",
                dilations=[1, *dilation, 1],
            )  # fmt: skip
            return tf.reshape(found, [*kernel, c, b, p])

        return self.side_by_side(gradient)

    def side_by_side(self, gradient: Callable[..., Tensor]) -> tuple[Tensor, PartsUse]:
        """What ``in_parts`` returns, from gradients of a few examples that are channels of one example.

        Args:
            gradient: from input ``[1, *S, b C]``, cotangent ``[1, *T, b p]``, b, kernel, stride and dilation, of images, to
                ``[*kernel, C / groups, b, p]``.
        """
        x, g = self.x, self.g
        kernel, stride, dilation, row = self.kernel, self.stride, self.dilation, len(self.kernel) == 1
        if row:  # an image of one row
            kernel, stride, dilation = (1, *kernel), stride * 2, (1, *dilation)
        each = math.prod(x.shape[1:]) + math.prod(g.shape[1:]) + math.prod(self.shape)
        pieces: list[Any] = []
        squares: list[Any] = []
        for start, stop in spans(x.shape[0], max(1, GROUP_NUMBERS // each, -(-x.shape[0] // GROUP_CALLS))):
            b = stop - start
            with tf.control_dependencies(squares[-1:]):  # a norm is taken while its gradients are in the cache
                parts = [t[:, None] if row else t for t in (self.pad(x[start:stop]), g[start:stop])]
                one_x, one_g = (tf.reshape(tf.transpose(t, [1, 2, 0, 3]), [1, *t.shape[1:-1], -1]) for t in parts)
            pieces.append(gradient(one_x, one_g, b, kernel, stride, dilation))
            squares.append(by_axis(pieces[-1], 3))
        return tf.concat(squares, axis=0), PartsUse(pieces, 3, self.shape)

    def grams(self, other: ConvUse) -> tuple[Tensor, Tensor]:
        """Inner products of the patches, and of the cotangents, of every two positions: ``[B groups, *T, *T']`` each."""
        k, b = self.groups, self.x.shape[0]
        one_x = self.padded()
        two_x = one_x if other is self else other.padded()
        s, t, s2, t2 = one_x.shape[1:-1], self.g.shape[1:-1], two_x.shape[1:-1], other.g.shape[1:-1]

        def rows(u: Tensor) -> Tensor:
            return self.by_group(self.grouped(u))

        cotangents = tf.reshape(tf.matmul(rows(self.g), rows(other.g), transpose_b=True), [b * k, *t, *t2])
        if math.prod(s) * math.prod(s2) > math.prod((*self.kernel, *t, *t2)):
            # With strides the input is so much larger than the output that patches are the smaller thing.
            one, two = (use.by_group(use.patches(x)) for use, x in ((self, one_x), (other, two_x)))
            return tf.reshape(tf.matmul(one, two, transpose_b=True), [b * k, *t, *t2]), cotangents
        # Gram matrix of the input itself, not unfolded
        gram_x = tf.reshape(tf.matmul(rows(one_x), rows(two_x), transpose_b=True), [b * k, *s, *s2])
        total: Any = 0
        for where, and_where in zip(self.offsets(), other.offsets(), strict=True):  # math.md section 2: shifted copies
            with tf.control_dependencies([total] if tf.is_tensor(total) else []):
                shifted = gram_x[(slice(None), *where, *and_where)]
            total = total + shifted
        return total, cotangents

    def inner(self, other: Use) -> Tensor | None:
        if not isinstance(other, ConvUse) or (self.shape, self.groups) != (other.shape, other.groups):
            return None
        patches, cotangents = self.grams(other)
        return tf.reduce_sum(tf.reshape(patches * cotangents, [self.x.shape[0], -1]), axis=1)

    def square(self) -> tuple[Tensor, Tensor]:
        t = math.prod(self.g.shape[1:-1])
        patches, cotangents = (tf.reshape(gram, [-1, t, t]) for gram in self.grams(self))
        return gram_square(patches, cotangents, self.groups)

    def weighted_sum(self, w: Tensor) -> Tensor:
        # TensorFlow 2.21 on CPU reads out of bounds in the filter gradient of a strided convolution with a 1x1 kernel.
        unsafe = max(self.kernel) == 1 and max(self.stride) > 1
        return self.native(w) if self.native and not unsafe else self.contract(self.g * column(w, self.g), "")

    def cut(self, start: int, stop: int) -> Use:
        return replace(self, x=self.x[start:stop], g=self.g[start:stop], native=None)

    def temporaries(self, ghost: bool) -> int:
        inputs, positions = math.prod(self.x.shape[1:]), math.prod(self.g.shape[1:-1])
        if not ghost:
            return inputs + math.prod(self.shape)
        reach = math.prod(covered(self.g.shape[1:-1], self.kernel, self.stride, self.dilation))
        return inputs + self.groups * (reach**2 + 3 * positions**2)

    def keep(self, finite: Tensor) -> Use:
        return replace(self, x=per_example(finite, self.x), g=per_example(finite, self.g), native=None)

    def fold(self, batch: int) -> Use:
        """The rows of an example become one more spatial axis, along which the kernel has size 1."""
        return replace(
            self,
            x=split_rows(self.x, batch),
            g=split_rows(self.g, batch),
            kernel=(1, *self.kernel),
            stride=(1, *self.stride),
            dilation=(1, *self.dilation),
            pads=((0, 0), *self.pads),
        )


# Off while XLA traces, which has kernels of its own.
_GROUPS: ContextVar[bool] = ContextVar("groups", default=True)


@contextmanager
def compiled_by_xla(jit: bool) -> Iterator[None]:
    """What is traced inside is compiled by XLA, if ``jit``."""
    token = _GROUPS.set(not jit)
    try:
        yield
    finally:
        _GROUPS.reset(token)


@cache
def groups_work() -> bool:
    """Whether the weight gradient takes channel groups here: oneDNN's kernel does, TensorFlow's own on a CPU does not.

    On a GPU one product over all examples is the faster way.
    """
    if tf.config.list_logical_devices("GPU"):
        return False
    x, g = (np.arange(n, dtype=np.float32).reshape(1, 4, 4, 2) % 7 for n in (32, 32))
    try:
        with tf.init_scope():
            found = tf.raw_ops.Conv2DBackpropFilter(
                input=x, filter_sizes=[1, 1, 1, 2], out_backprop=g, strides=[1, 1, 1, 1], padding="VALID"
            ).numpy()
    except tf.errors.OpError:
        return False
    return bool(np.allclose(found.ravel(), (x * g).sum((0, 1, 2))))


def spans(batch: int, size: int) -> list[tuple[int, int]]:
    """Examples from and to, at most ``size`` at a time."""
    return [(start, min(start + size, batch)) for start in range(0, batch, size)]


def turns_of(batch: int, each: int) -> list[tuple[int, int]]:
    """Examples from and to, so that ``TILE`` numbers are needed at once where one example needs ``each``, in at most ``TURNS`` parts."""
    return spans(batch, max(1, TILE // each, -(-batch // TURNS)))


def in_tiles(use: Use, ghost: bool, norm: Callable[[Use], Tensor | None]) -> Tensor | None:
    """A norm of every example ``[B]``, for as many of them at once as ``TILE`` and ``TURNS`` allow.

    Args:
        use: the only use of a parameter.
        ghost: how the norm is taken.
        norm: use -> ``[B]`` or None.
    Returns:
        What ``norm`` gives for the whole use.
    """
    each = use.temporaries(ghost)
    turns = turns_of(use.g.shape[0], each) if each else []  # type: ignore[attr-defined]
    if len(turns) <= 1:
        return norm(use)
    parts: list[Any] = []
    for start, stop in turns:
        with tf.control_dependencies(parts[-1:]):
            parts.append(norm(use.cut(start, stop)))
        if parts[-1] is None:
            return None
    return tf.concat(parts, axis=0)


def ghost_norm(uses: Sequence[Use]) -> Tensor | None:
    """Squared norm of a parameter's per-sample gradient from all pairs of its uses, ``[B]``; see ``pairs_norm``."""
    return in_tiles(uses[0], True, lambda use: pairs_norm([use])) if len(uses) == 1 else pairs_norm(uses)


def instantiated_norm(use: Use) -> Tensor:
    """Squared norm of a per-sample gradient that is not kept, ``[B]``."""
    if isinstance(use, ConvUse) and use.suits_groups():
        return use.in_parts()[0]
    found = in_tiles(use, False, lambda part: square_sum(part.instantiate()))
    assert found is not None
    return found


def pairs_norm(uses: Sequence[Use]) -> Tensor | None:
    """Squared norm of a parameter's per-sample gradient from all pairs of its uses.

    Args:
        uses: every use of the parameter.
    Returns:
        ``[B]``, or None where some pair has no ghost formula.
    Guarantee: rounding cannot hide more than ``FLOAT_MARGIN`` of a norm. Terms of the double sum over positions may cancel, and
        then the rounding of ``|a_t| |a_u| |g_t| |g_u|``, which ``square`` sums, can exceed the result. Where that threatens, the
        possible error is added, so that the norm is over-estimated and the example is clipped more.
    Source: math.md section 2; pitfalls.md G1 and G11; Higham and Mary 2019 for the size of rounding errors in long sums.
    """
    total: Any = 0
    reach: Any = 0
    for i, one in enumerate(uses):
        own = one.square()
        if own is None:
            return None
        total, reach = total + own[0], reach + own[1]
        for other in uses[:i]:
            value = one.inner(other)
            if value is None:
                return None
            total = total + 2 * value
    total = tf.maximum(total, tf.zeros_like(total))
    doubt = 2 * float(np.finfo(total.dtype.as_numpy_dtype).eps) * tf.reduce_sum(tf.square(reach), axis=1)
    return tf.where(doubt > 2 * FLOAT_MARGIN * total, total + doubt, total)
