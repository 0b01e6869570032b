"""One use of one parameter in one call of a layer: its per-sample gradient, its norm without it, its weighted sum.

A parameter's per-sample gradient is the sum over its uses. Its squared norm is therefore the sum over ALL pairs of uses of their
inner products, cross terms included (math.md section 2): that is how tied weights and layers called twice come out exact.

    instantiate()      per-sample gradient                    [B, *shape]
    in_parts()         the same, a few examples at a time     [b, *shape] each
    inner(other)       <G_i, G'_i> without instantiating      [B]
    weighted_sum(w)    sum_i w_i G_i by a native kernel       [*shape]

Shapes: B examples, T positions, D fan-in, p fan-out, d width of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dptrain.mechanism import FLOAT_MARGIN


def wide(x: Tensor) -> Tensor:
    """Norms and contractions are taken in float32 at least (pitfalls.md G11)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def per_example(flags: Tensor, x: Tensor) -> Tensor:
    """Zero the examples whose flag is False, by selection, since 0 * NaN is NaN."""
    return torch.where(flags.view(-1, *[1] * (x.dim() - 1)), x, torch.zeros((), dtype=x.dtype, device=x.device))


def covered(positions: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Size per axis of the padded input that a convolution's windows reach."""
    return tuple((t - 1) * r + d * (k - 1) + 1 for t, k, r, d in zip(positions, kernel, stride, dilation, strict=True))


def split_rows(x: Tensor, batch: int) -> Tensor:
    """``[k B, ...]`` as ``[B, k, ...]``."""
    return x.reshape(batch, len(x) // batch, *x.shape[1:])


# Numbers that the temporaries of a norm may hold at once; more examples are taken in turns, which also keeps them in cache.
TILE = 1 << 21
# Positions from which only a half of a Gram matrix is taken.
HALVED = 256
# Numbers of one array that elementwise passes of a norm take at once on a CPU.
TURN = 1 << 19
# Numbers of a convolution's input that are laid out for one matrix product.
WINDOW = 1 << 19
# Positions from which per-sample gradients of convolutions without groups are left to the framework's kernel, by the number of axes.
GROUP_POSITIONS = {1: 64, 2: 256}
# Channels of a sequence from which one product per tap is taken.
TAP_CHANNELS = 32
# Taps of a kernel of channel groups up to which channels that are innermost stay so: 32 images of 4x4x160, 7x7, 26 ms, 6 otherwise.
INNER_TAPS = 9
# Positions of a depthwise convolution up to which its cotangent is always taken for a kernel.
FEW_POSITIONS = 4
# Channels below which they are put innermost for it: 32 images of 56x56x3 to 32 channels, 7x7, 9 ms, 111 otherwise.
FEW_CHANNELS = 16
# Channels below which cotangents that have them outermost would have to be turned round first: 64 images of 32x32x3 to 64, 3x3, 14 ms, 6 by
# positions.
TOO_FEW_CHANNELS = 8
# Channels times taps up to which one product over positions takes in all taps.
TAP_WIDTH = 192


def turns(x: Tensor) -> Iterator[slice]:
    """Slices of the examples of ``[B, ...]``, as many at a time as stay in the cache of a CPU; all of them on another device."""
    size = max(1, TURN // max(1, x[0].numel())) if x.device.type == "cpu" else len(x)
    return (slice(start, start + size) for start in range(0, len(x), size))


def innermost(x: Tensor) -> bool:
    """Whether channels lie innermost in memory, and nowhere else."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def square_sum(gradient: Tensor) -> Tensor:
    """Squared norm of each example's gradient, ``[B]``, whatever the memory layout."""
    return torch.linalg.vector_norm(gradient.unsqueeze(-1), dim=tuple(range(1, gradient.dim() + 1))).square()


def weighted(gradient: Tensor, w: Tensor) -> Tensor:
    """``sum_i w_i G_i`` as one matrix-vector product, without copying a gradient whose axes are permuted in memory."""
    strides = gradient.stride()
    order = [0, *sorted(range(1, gradient.dim()), key=lambda axis: -strides[axis])]
    dense = gradient.permute(order)
    total = (w @ dense.reshape(len(w), -1)).view(dense.shape[1:])
    return total.permute([order.index(axis) - 1 for axis in range(1, gradient.dim())])


def gram_square(one: Tensor, two: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """What ``Use.square`` returns, from two Gram matrices over the same positions.

    Args:
        one, two: ``[B groups, T, T]``.
        groups: channel groups.
    Returns:
        The sum of their product ``[B]``; the sum over positions of the product of the lengths ``[B, groups]``.
    """
    # Roots before the product, which could leave float32's range.
    roots = [gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() for gram in (one, two)]
    lengths = (roots[0] * roots[1]).sum(1)
    return (one * two).view(len(one) // groups, -1).sum(1), lengths.view(-1, groups)


@dataclass
class Use:
    """Base of the uses; a use whose gradient is already per sample is a ``DirectUse``."""

    ghost = False

    @property
    def batch(self) -> int:
        """Examples B; asked only of uses that can be cut."""
        return 0

    @property
    def shrinks(self) -> bool:
        """Whether the per-sample gradient takes less memory than what it is made of."""
        return False

    def instantiate(self) -> Tensor:
        """Per-sample gradient ``[B, *shape]``."""
        raise TypeError(f"{type(self).__name__} cannot be instantiated")

    def in_parts(self) -> Iterator[Tensor]:
        """The per-sample gradient of a few examples after the other, ``[b, *shape]`` each."""
        yield self.instantiate()

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
        return weighted(self.instantiate(), w)

    def cut(self, start: int, stop: int) -> Use:
        """The use of some of the examples."""
        raise TypeError(f"{type(self).__name__} cannot be cut")

    def temporaries(self) -> int:
        """Numbers that the ghost norm of one example needs meanwhile; 0 where it cannot be taken for some of the examples."""
        return 0

    def keep(self, finite: Tensor) -> Use:
        """The same use with the examples zeroed whose flag is False."""
        raise TypeError(f"{type(self).__name__} cannot be masked")

    def fold(self, batch: int) -> Use:
        """The same use where ``k B`` rows are B examples of k rows each, the examples outermost."""
        raise TypeError(f"{type(self).__name__} cannot be folded")


@dataclass
class DirectUse(Use):
    """A per-sample gradient that is at hand: biases, normalisation layers, the slow method."""

    gradient: Tensor  # [B, *shape]

    def instantiate(self) -> Tensor:
        return self.gradient

    def keep(self, finite: Tensor) -> Use:
        return DirectUse(per_example(finite, self.gradient))

    def fold(self, batch: int) -> Use:
        return DirectUse(split_rows(self.gradient, batch).sum(1))


@dataclass
class PartsUse(Use):
    """A per-sample gradient that was made a few examples at a time and stays so: no array of its size has to be found and joined."""

    pieces: list[Tensor]  # [b, *shape] each

    def instantiate(self) -> Tensor:
        return torch.cat(self.pieces)

    def weighted_sum(self, w: Tensor) -> Tensor:
        sums = [weighted(piece, part) for piece, part in zip(self.pieces, w.split([len(p) for p in self.pieces]), strict=True)]
        total = sums[0]
        for more in sums[1:]:
            total += more
        return total

    def keep(self, finite: Tensor) -> Use:
        flags = finite.split([len(piece) for piece in self.pieces])
        return PartsUse([per_example(part, piece) for part, piece in zip(flags, self.pieces, strict=True)])

    def fold(self, batch: int) -> Use:
        return DirectUse(self.instantiate()).fold(batch)


Blocks = list[tuple[Tensor, int]]


def gram_blocks(x: Tensor) -> Blocks:
    """The Gram matrix over positions of ``[B, T, D]`` in blocks, and how often each counts: 1 on the diagonal, 2 above it.

    From ``HALVED`` positions on, half of the matrix is left out, since it is symmetric; below that, smaller products are slower ones: T =
    512, D = 1,280, 8 examples, 23 ms and 29 whole, T = 128 8.1 and 8.4, T = 64 4.3 and 3.9.
    """
    if x.shape[1] < HALVED:
        return [(torch.bmm(x, x.transpose(1, 2)), 1)]
    half = x.shape[1] // 2
    low, high = x[:, :half], x[:, half:]
    return [*gram_blocks(low), *gram_blocks(high), (torch.bmm(low, high.transpose(1, 2)), 2)]


class Grams:
    """Gram matrices of the last array, for uses that have the same one.

    Query, key and value read one input; the two maps of an LSTM have one cotangent. An array is told by its memory, which it holds on to.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.version = 0  # of the memory, when its matrices were made
        self.found: dict[tuple[Any, ...], Blocks] = {}
        self.numbers = 0

    def of(self, a: Tensor) -> Blocks:
        """``gram_blocks`` of an array, or of some of its examples."""
        last = self.last
        if last is None or last.untyped_storage().data_ptr() != a.untyped_storage().data_ptr() or self.version != a._version:
            self.last, self.version, self.found, self.numbers = a, a._version, {}, 0
        key = (a.storage_offset(), a.shape, a.stride(), a.dtype)
        if key in self.found:
            return self.found[key]
        blocks = gram_blocks(a)
        self.numbers += sum(block.numel() for block, _ in blocks)
        if self.numbers <= TILE:
            self.found[key] = blocks
        return blocks


@dataclass
class LinearUse(Use):
    """``z = a W^T``: ``G_i = g_i^T a_i``."""

    a: Tensor  # [B, T, D]
    g: Tensor  # [B, T, p]
    grams: Grams | None = None  # of inputs that other uses may read too
    pair: Grams | None = None  # of cotangents that another use may have too
    ghost = True

    @property
    def shrinks(self) -> bool:
        return self.a.shape[2] * self.g.shape[2] < self.a[0].numel() + self.g[0].numel()

    def instantiate(self) -> Tensor:
        return torch.bmm(self.g.transpose(1, 2), self.a)  # [B, p, D]

    def in_parts(self) -> Iterator[Tensor]:
        size = max(1, TILE // (self.a.shape[2] * self.g.shape[2]))
        for start in range(0, self.batch, size):
            part = slice(start, start + size)
            yield torch.bmm(self.g[part].transpose(1, 2), self.a[part])

    def inner(self, other: Use) -> Tensor | None:
        if isinstance(other, EmbeddingUse):
            return other.inner(self)
        if not isinstance(other, LinearUse):
            return None
        if self.a.shape[1] == 1 and other.a.shape[1] == 1:
            return (self.a * other.a).sum((1, 2)) * (self.g * other.g).sum((1, 2))
        gram_a = torch.bmm(self.a, other.a.transpose(1, 2))  # [B, T, T']
        return (gram_a * torch.bmm(self.g, other.g.transpose(1, 2))).sum((1, 2))

    def square(self) -> tuple[Tensor, Tensor]:
        if self.a.shape[1] == 1:  # one position: a product of two sums of squares, nothing cancels
            return self.a.square().sum((1, 2)) * self.g.square().sum((1, 2)), self.a.new_zeros(self.a.shape[0], 1)
        total: Any = 0
        reach: Any = 0
        inputs = gram_blocks(self.a) if self.grams is None else self.grams.of(self.a)
        cotangents = gram_blocks(self.g) if self.pair is None else self.pair.of(self.g)
        for (one, times), (two, _) in zip(inputs, cotangents, strict=True):
            if times == 1:
                own, lengths = gram_square(one, two, 1)
                total, reach = total + own, reach + lengths
            else:
                total = total + times * (one * two).flatten(1).sum(1)
        return total, reach

    def weighted_sum(self, w: Tensor) -> Tensor:
        a, g, w = self.a, self.g, w.view(-1, 1, 1)
        a, g = (a * w, g) if a.shape[2] < g.shape[2] else (a, g * w)  # the smaller one is copied
        return g.flatten(0, 1).t() @ a.flatten(0, 1)  # [p, D]

    @property
    def batch(self) -> int:
        return len(self.a)

    def cut(self, start: int, stop: int) -> Use:
        return LinearUse(self.a[start:stop], self.g[start:stop], self.grams, self.pair)

    def temporaries(self) -> int:
        return 3 * self.a.shape[1] ** 2

    def keep(self, finite: Tensor) -> Use:
        return LinearUse(per_example(finite, self.a), per_example(finite, self.g))

    def fold(self, batch: int) -> Use:
        a, g = (t.reshape(batch, -1, t.shape[2]) for t in (self.a, self.g))
        return LinearUse(a, g)


@dataclass
class EmbeddingUse(Use):
    """A table lookup: row ``v`` of ``G_i`` is the sum of ``g_t`` over the positions with ``id_t = v``."""

    ids: Tensor  # [B, T], int64
    g: Tensor  # [B, T, d]; zero where the id is the padding index
    rows: int
    ghost = True

    def instantiate(self) -> Tensor:
        out = self.g.new_zeros(self.g.shape[0], self.rows, self.g.shape[2])
        return out.scatter_add_(1, self.ids.unsqueeze(-1).expand_as(self.g), self.g)

    def inner(self, other: Use) -> Tensor | None:
        if other is self:  # segment sums over equal ids: O(B T d), the table is never written
            ids, order = self.ids.sort(1)
            segment = F.pad((ids[:, 1:] != ids[:, :-1]).long(), (1, 0)).cumsum(1)
            g = self.g.gather(1, order.unsqueeze(-1).expand_as(self.g))
            return torch.zeros_like(g).scatter_add_(1, segment.unsqueeze(-1).expand_as(g), g).square().sum((1, 2))
        if isinstance(other, EmbeddingUse):
            same = self.ids.unsqueeze(2) == other.ids.unsqueeze(1)  # [B, T, T']
            return torch.where(same, torch.bmm(self.g, other.g.transpose(1, 2)), 0).sum((1, 2))
        if isinstance(other, LinearUse):  # tied embedding and output matrix: the linear map has p = rows, D = d
            ids = self.ids.unsqueeze(1).expand(-1, other.g.shape[1], -1)
            return (torch.bmm(other.a, self.g.transpose(1, 2)) * other.g.gather(2, ids)).sum((1, 2))
        return None

    def square(self) -> tuple[Tensor, Tensor]:
        own = self.inner(self)
        assert own is not None
        return own, self.g.new_zeros(self.g.shape[0], 1)  # the norm is that of the gradient's own rows: nothing cancels

    def weighted_sum(self, w: Tensor) -> Tensor:
        out = self.g.new_zeros(self.rows, self.g.shape[2])
        return out.index_add_(0, self.ids.flatten(), (self.g * w.view(-1, 1, 1)).flatten(0, 1))

    def keep(self, finite: Tensor) -> Use:
        return replace(self, g=per_example(finite, self.g))

    def fold(self, batch: int) -> Use:
        return replace(self, ids=self.ids.reshape(batch, -1), g=self.g.reshape(batch, -1, self.g.shape[2]))


@dataclass
class ConvUse(Use):
    """A convolution of any rank, written as the map from ``x`` to positions of ``g``; a transposed one has the roles swapped."""

    x: Tensor  # [B, C, *S], not padded
    g: Tensor  # [B, p, *T]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pads: tuple[tuple[int, int], ...]  # before and after, per axis
    mode: str = "constant"  # of torch.nn.functional.pad
    ghost = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, ``[p, C / groups, *kernel]``."""
        return (self.g.shape[1], self.x.shape[1] // self.groups, *self.kernel)

    @property
    def shrinks(self) -> bool:
        return math.prod(self.shape) < self.x[0].numel() + self.g[0].numel()

    def padded(self) -> Tensor:
        """The input padded exactly as the layer does it, so that what follows is a convolution with padding 0 (G3).

        Rows that no window reaches are cut off.
        """
        x = self.x
        if any(map(any, self.pads)):
            x = F.pad(x, [n for pair in reversed(self.pads) for n in pair], mode=self.mode)
        reach = covered(self.g.shape[2:], self.kernel, self.stride, self.dilation)
        return x[(slice(None), slice(None), *(slice(n) for n in reach))]

    def offsets(self) -> list[tuple[slice, ...]]:
        """For each kernel tap, the slices of the padded input that it meets at the output positions."""
        out = self.g.shape[2:]
        taps = product(*(range(k) for k in self.kernel))
        return [
            tuple(slice(k * d, k * d + r * (t - 1) + 1, r) for k, d, r, t in zip(tap, self.dilation, self.stride, out, strict=True))
            for tap in taps
        ]

    def native(self, x: Tensor, g: Tensor, padding: list[int]) -> Tensor:
        """The framework's weight gradient, summed over the examples given."""
        weight = x.new_empty(()).expand(self.shape)  # only its shape is read
        zeros = [0] * len(self.kernel)
        args = (weight, None, list(self.stride), padding, list(self.dilation), False, zeros, self.groups, [False, True, False])
        return torch.ops.aten.convolution_backward(g, x, *args)[1]

    def native_input(self) -> tuple[Tensor, list[int]]:
        """Input and padding for ``native``: zero padding that is even on both sides needs no copy."""
        if max(self.kernel) == 1 and max(self.stride) > 1:  # oneDNN writes out of bounds unless surplus rows are cut off
            return self.padded().contiguous(), [0] * len(self.pads)
        if self.mode == "constant" and all(low == high for low, high in self.pads):
            return self.x, [low for low, _ in self.pads]
        return self.padded(), [0] * len(self.pads)

    def instantiate(self) -> Tensor:
        pieces = list(self.in_parts())
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def in_parts(self) -> Iterator[Tensor]:
        if len(self.kernel) == 1 and self.groups == max(self.stride) == 1 and self.shape[1] >= TAP_CHANNELS:
            return self.by_taps()
        if self.suits_cotangents():
            return self.by_cotangents()
        return self.by_groups() if self.suits_groups() else self.by_positions()

    def by_taps(self) -> Iterator[Tensor]:
        """By one matrix product per tap of a sequence, whose shifted views need no copy.

        64 examples of 128x128 to 128 channels, 3 taps, two cores: 6 ms, by groups 8, by positions 17, the native sum 6.
        """
        x, g, (p, c, taps) = self.padded(), self.g, self.shape
        size = max(1, TILE // math.prod(self.shape))
        for start in range(0, len(x), size):
            some, found = g[start : start + size], x.new_empty(len(g[start : start + size]), taps, p, c)
            for i, where in enumerate(self.offsets()):
                found[:, i] = torch.bmm(some, x[(slice(start, start + size), slice(None), *where)].transpose(1, 2))
            yield found.permute(0, 2, 3, 1)

    def suits_cotangents(self) -> bool:
        """Whether ``by_cotangents`` is the faster way: a single channel, and depthwise kernels without good code in the framework.

        Milliseconds for 32 examples on two cores, by cotangents; by groups: 7x7 16x16x40 0.3, 5.7, 8x8x80 0.2, 3.4, 4x4x160 0.1, 3.0; 5x5
        32x32x64 1.0, 31; 3x3 of 2x2x320 0.1, 2.8. For 3x3 kernels and more positions both are alike. A single channel, 256 of 28x28, by
        cotangents; by positions: 8x8 to 16 with strides of 2 2.3, 3.7, 3x3 to 32 4.3, 8.4; 64 sequences of 1,000, 9 taps to 16, 1.1, 11.
        """
        if not self.native_kernels():
            return False
        if self.x.shape[1] == 1:
            return not innermost(self.g if len(self.kernel) == 2 else self.g.unsqueeze(2))
        if self.groups == 1 or not self.groups == self.x.shape[1] == self.g.shape[1]:
            return False
        return math.prod(self.kernel) > INNER_TAPS or self.g.shape[2:].numel() <= FEW_POSITIONS

    def by_cotangents(self) -> Iterator[Tensor]:
        """As a convolution of the input, whose kernel is the cotangent: strides and dilations change places."""
        (x, padding), g = self.native_input(), self.g
        kernel, stride, dilation = self.kernel, self.stride, self.dilation
        if len(kernel) == 1:  # an image of one row
            x, g, padding = x.unsqueeze(2), g.unsqueeze(2), [0, *padding]
            kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
        inner = innermost(x) or g.shape[2:].numel() <= FEW_POSITIONS
        for some, b in self.side_by_side(x, g, inner):
            found = F.conv2d(some[0], some[1].transpose(0, 1), None, dilation, padding, stride, groups=b * self.groups)
            yield found[:, :, : kernel[0], : kernel[1]].view(b, -1, 1, *self.kernel)

    def native_kernels(self) -> bool:
        """Whether the CPU's kernels for images are there."""
        native = self.x.device.type == "cpu" and self.x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        return native and len(self.kernel) <= 2 and max(self.kernel) > 1

    def side_by_side(self, x: Tensor, g: Tensor, inner: bool) -> Iterator[tuple[list[Tensor], int]]:
        """Input and cotangent of a few examples as channels of one example, ``[1, b C, *S]`` and ``[1, b p, *T]``, and b.

        Args:
            x, g: images, padded as it needs to be.
            inner: whether channels are to lie innermost.
        """
        each = x[0].numel() + g[0].numel() + math.prod(self.shape)
        size = max(1, WINDOW * torch.get_num_threads() // each)
        for start in range(0, len(x), size):
            rows = [t[start : start + size] for t in (x, g)]
            if inner:  # copies want channels to stay innermost, and so do kernels where they are few
                # Contiguous: where the axes happen to fit, ``reshape`` would only look at them in another order.
                made = [t.permute(2, 3, 0, 1).reshape(1, *t.shape[2:], -1).contiguous().permute(0, 3, 1, 2) for t in rows]
            else:
                made = [t.reshape(1, -1, *t.shape[2:]) for t in rows]
            yield made, len(rows[0])

    def suits_groups(self) -> bool:
        """Whether ``by_groups`` is the faster way: a native kernel of the CPU, with enough positions to outweigh its setting up.

        Milliseconds for 64 examples on two cores with AVX-512, arrays with channels innermost, by groups; by positions; the native sum:
        32x32x64 -> 64 27, 35, 25; 16x16x128 -> 128 33, 41, 23; 32x32x16 -> 16 4, 8, 1.5; 32x32x3 -> 64 3, 6, 2; but 8x8x256 -> 256 55,
        45, 23, strides of 2 26, 20, 14, and kernels of size 1 14, 5, 5. Where channels are in groups, whose products are small, it always
        is: depthwise 16x16x128 2.5, 11 with strides of 2 (native 0.8), 8x8x256 1.7, 21 (0.6), 4x4x512 1.1, 11 (0.4); 32 groups of 8x8x256
        5, 16 (1.5); 7x7 depthwise 8x8x80, 32 examples, 3.3, 7.0 (3.2). So it is for a single channel: 256 of 28x28, 8x8 to 16 with strides
        of 2 2.3, 3.7, 3x3 to 32 5.9, 14.
        """
        if not self.native_kernels():
            return False
        positions, enough = self.g.shape[2:].numel(), GROUP_POSITIONS[len(self.kernel)]
        if self.groups > 1:
            return positions > 4 and all(k >= r for k, r in zip(self.kernel, self.stride, strict=True))
        if self.x.shape[1] == 1:  # of any layout; the outermost has a better way
            return all(k > r for k, r in zip(self.kernel, self.stride, strict=True))
        tiny = self.shape[1] < TOO_FEW_CHANNELS and not innermost(self.g if len(self.kernel) == 2 else self.g.unsqueeze(2))
        return positions >= enough and max(self.stride) == 1 and not tiny

    def by_groups(self) -> Iterator[Tensor]:
        """By the framework's weight gradient, with each of a few examples a channel group of one example."""
        (x, padding), g = self.native_input(), self.g
        (p, c), k, kernel, stride, dilation = self.shape[:2], self.groups, self.kernel, self.stride, self.dilation
        if len(kernel) == 1:  # an image of one row
            x, g, padding = x.unsqueeze(2), g.unsqueeze(2), [0, *padding]
            kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
        if k == 1:
            inner = innermost(x) or (c < FEW_CHANNELS and innermost(g))
        else:
            inner = innermost(x) and math.prod(kernel) <= INNER_TAPS
        for (one_x, one_g), b in self.side_by_side(x, g, inner):
            weight = x.new_empty(()).expand(b * p, c, *kernel)  # only its shape is read
            args = (weight, None, list(stride), padding, list(dilation), False, [0, 0], b * k, [False, True, False])
            found = torch.ops.aten.convolution_backward(one_g, one_x, *args)[1]
            yield found.view(b, p, c, *self.kernel)

    def by_positions(self) -> Iterator[Tensor]:
        """By matrix products over positions, one row of kernel taps at a time, or all taps where they are few, and few examples at once.

        64 examples of 32x32x64 to 64 channels, 3x3, on two CPU cores: 42 ms, where the framework's sum over them takes 40 and one row of
        taps of all of them at once 90 (their 50 MiB are new pages from the system each time). One native kernel call per example took
        35 ms there, and twice as long as this for 16 channels, and 125 ms to this one's 53 on an older machine. Without copies
        of windows, as nine products of shifted views or three with shifted copies of the cotangents, it took 32 ms where channels were
        outermost, and 47 and 57 where they were innermost, as they mostly are.
        """
        k, batch, n = self.groups, self.x.shape[0], len(self.kernel)
        p, c, out = self.shape[0] // k, self.shape[1], self.g.shape[2:]
        g = self.g.reshape(batch * k, p, -1) if k > 1 else self.g.flatten(2)  # [B k, p/k, T]
        x = self.padded().movedim(1, -1).contiguous()  # [B, *S, C]
        steps = x.stride()[1 : 1 + n]
        moves, taps = ([m * s for m, s in zip(by, steps, strict=True)] for by in (self.stride, self.dilation))
        strides = (x.stride(0), *moves, c, *taps, 1)
        windows = x.as_strided((batch, *out, k, *self.kernel, c), strides).movedim(1 + n, 1)  # a view, [B, k, *T, *kernel, C/k]
        windows = windows.flatten(2 + n, -3) if n > 1 else windows.unsqueeze(2 + n)  # [B, k, *T, rows, last, C/k]
        few = windows.shape[-3:].numel() <= TAP_WIDTH
        rows = [windows] if few else [windows.narrow(-3, row, 1) for row in range(windows.shape[-3])]
        width, positions = rows[0].shape[-3:].numel(), g.shape[2]
        size = max(1, WINDOW // (k * positions * width))
        for start in range(0, batch, size):
            some = g[start * k : min(start + size, batch) * k]
            gradient = x.new_empty(len(some), p, len(rows) * width)
            for i, row in enumerate(rows):
                part = row[start : start + size].reshape(-1, positions, width)
                # Written by itself and copied: twice as fast as a product into every third row.
                gradient[:, :, i * width : (i + 1) * width] = torch.bmm(some, part)
            yield gradient.view(-1, k * p, *self.kernel, c).movedim(-1, 2)  # a view: taps stay outside channels in memory

    def grams(self, other: ConvUse) -> tuple[Tensor, Tensor]:
        """Inner products of the patches, and of the cotangents, of every two positions: ``[B groups, *T, *T']`` each."""
        k, b = self.groups, self.x.shape[0]
        one_x = self.padded()
        two_x = one_x if other is self else other.padded()
        s, t, s2, t2 = one_x.shape[2:], self.g.shape[2:], two_x.shape[2:], other.g.shape[2:]
        x, x2 = (u.reshape(b * k, u.shape[1] // k, -1) for u in (one_x, two_x))
        g, g2 = (u.g.reshape(b * k, u.g.shape[1] // k, -1) for u in (self, other))
        gram_x = torch.bmm(x.transpose(1, 2), x2).view(b * k, *s, *s2)  # Gram matrix of the input itself, not unfolded
        total: Any = 0
        for one, two in zip(self.offsets(), other.offsets(), strict=True):  # math.md section 2: shifted copies
            total = total + gram_x[(slice(None), *one, *two)]
        return total, torch.bmm(g.transpose(1, 2), g2).view(b * k, *t, *t2)

    def inner(self, other: Use) -> Tensor | None:
        if not isinstance(other, ConvUse) or self.shape != other.shape:
            return None
        patches, cotangents = self.grams(other)
        return (patches * cotangents).view(self.x.shape[0], -1).sum(1)

    def square(self) -> tuple[Tensor, Tensor]:
        t = self.g.shape[2:].numel()
        patches, cotangents = (gram.reshape(-1, t, t) for gram in self.grams(self))
        return gram_square(patches, cotangents, self.groups)

    def weighted_sum(self, w: Tensor) -> Tensor:
        (x, padding), g = self.native_input(), self.g
        w = w.view(-1, *[1] * (g.dim() - 1))
        x, g = (x * w, g) if x.numel() < g.numel() else (x, g * w)  # the smaller one is copied
        return self.native(x, g, padding)

    @property
    def batch(self) -> int:
        return len(self.x)

    def cut(self, start: int, stop: int) -> Use:
        return replace(self, x=self.x[start:stop], g=self.g[start:stop])

    def temporaries(self) -> int:
        inputs, positions = self.x[0].numel(), self.g.shape[2:].numel()
        reach = math.prod(covered(self.g.shape[2:], self.kernel, self.stride, self.dilation))
        return inputs + self.groups * (reach**2 + 3 * positions**2)

    def keep(self, finite: Tensor) -> Use:
        return replace(self, x=per_example(finite, self.x), g=per_example(finite, self.g))

    def fold(self, batch: int) -> Use:
        return FoldedConvUse(self, len(self.x) // batch)


@dataclass
class FoldedConvUse(Use):
    """A convolution of ``k B`` rows that are B examples of k rows each."""

    rows: ConvUse
    parts: int  # k
    ghost = True

    @property
    def shrinks(self) -> bool:
        return self.lifted().shrinks

    def lifted(self) -> ConvUse:
        """The rows of an example as one more spatial axis, along which the kernel has size 1."""
        rows = self.rows
        x, g = (split_rows(t, len(t) // self.parts).transpose(1, 2) for t in (rows.x, rows.g))
        pads = ((0, 0), *rows.pads)
        if rows.mode != "constant":  # padded here, since torch pads at most three axes of one array in the other modes
            x, pads = split_rows(rows.padded(), len(x)).transpose(1, 2), ((0, 0),) * len(pads)
        return ConvUse(x, g, (1, *rows.kernel), (1, *rows.stride), (1, *rows.dilation), rows.groups, pads)

    def instantiate(self) -> Tensor:
        return self.lifted().instantiate().squeeze(3)

    def in_parts(self) -> Iterator[Tensor]:
        return (piece.squeeze(3) for piece in self.lifted().in_parts())

    def inner(self, other: Use) -> Tensor | None:
        if not isinstance(other, FoldedConvUse):
            return None
        one = self.lifted()
        return one.inner(one if other is self else other.lifted())

    def square(self) -> tuple[Tensor, Tensor]:
        return self.lifted().square()

    def weighted_sum(self, w: Tensor) -> Tensor:
        return self.rows.weighted_sum(w.repeat_interleave(self.parts))

    def keep(self, finite: Tensor) -> Use:
        flags, rows = finite.repeat_interleave(self.parts), self.rows
        return FoldedConvUse(replace(rows, x=per_example(flags, rows.x), g=per_example(flags, rows.g)), self.parts)


def joined(uses: Sequence[Use]) -> Sequence[Use]:
    """The same uses, linear ones of equal width as one over all their positions: a layer called T times needs one Gram matrix, not T^2."""
    linear: dict[tuple[int, int], list[LinearUse]] = {}
    rest: list[Use] = []
    for use in uses:
        if isinstance(use, LinearUse):
            linear.setdefault((use.a.shape[2], use.g.shape[2]), []).append(use)
        else:
            rest.append(use)
    merged = [u[0] if len(u) == 1 else LinearUse(torch.cat([v.a for v in u], 1), torch.cat([v.g for v in u], 1)) for u in linear.values()]
    return [*merged, *rest]


def in_tiles(use: Use, norm: Callable[[Use], Tensor | None]) -> Tensor | None:
    """A ghost norm of every example ``[B]``, for as many of them at once as ``TILE`` allows.

    Args:
        use: the only use of a parameter.
        norm: use -> ``[B]`` or None.
    Returns:
        What ``norm`` gives for the whole use.
    """
    each, batch = use.temporaries(), use.batch
    size = batch if each == 0 else max(1, TILE // each)
    if size >= batch:
        return norm(use)
    parts = [norm(use.cut(start, min(start + size, batch))) for start in range(0, batch, size)]
    return None if any(part is None for part in parts) else torch.cat(parts)  # type: ignore[arg-type]


def ghost_norm(uses: Sequence[Use]) -> Tensor | None:
    """Squared norm of a parameter's per-sample gradient from all pairs of its uses, ``[B]``; see ``pairs_norm``."""
    uses = joined(uses)
    return in_tiles(uses[0], lambda use: pairs_norm([use])) if len(uses) == 1 else pairs_norm(uses)


def instantiated_norm(use: Use) -> Tensor:
    """Squared norm of a per-sample gradient that is not kept, ``[B]``."""
    return torch.cat([square_sum(piece) for piece in use.in_parts()])


def instantiated(use: Use) -> tuple[Tensor, PartsUse]:
    """Squared norm of a per-sample gradient, ``[B]``, and the gradient."""
    squares, pieces = [], []
    for piece in use.in_parts():
        squares.append(square_sum(piece))  # while it is in the cache
        pieces.append(piece)
    return torch.cat(squares), PartsUse(pieces)


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
    total = total.clamp(min=0)
    doubt = 2 * torch.finfo(total.dtype).eps * reach.square().sum(1)
    return torch.where(doubt > 2 * FLOAT_MARGIN * total, total + doubt, total)
