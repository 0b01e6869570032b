"""Layers with a proven Lipschitz constant, for the strategy ``clipless``; ordinary modules that every other strategy trains too.

Weights are plain parameters: nothing is normalised in the forward pass, so that gradients and bounds are about the very same weight. The
constants of the constructors (``lipschitz``, ``norm``, ``max_bias_norm``) are restored after each update by ``dptrain/projection.py``.
No layer lets one example influence another, and no layer changes its state in the forward pass.

Arrays are channels-first, as in ``torch.nn``; ``dim=-1`` where a layer has a ``dim`` makes it work on channels-last ones. Names of the
Keras package are aliases here, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptrain_torch.own import example_axis, positive

# --- balls: inputs and cotangents -----------------------------------------------------------------------------------------


def to_ball(x: Tensor, norm: float) -> Tensor:
    """Each example scaled down to an L2 norm of at most ``norm``; one that is not finite becomes zero, by selection.

    The largest entry is divided out first, so no square overflows; the margin covers the rounding of the three operations. The divisor
    is a constant for autograd, which is right: the result does not depend on it.
    """
    axes = tuple(range(1, x.dim()))
    top = x.detach().abs().amax(axes, keepdim=True) if axes else x.detach().abs()
    finite = top.isfinite()
    x = torch.where(finite, x, torch.zeros_like(x))
    top = torch.where(finite & (top > 0), top, torch.ones_like(top))
    ratio = x / top
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # a long float32 sum of squares could lose more than the margin
    length = torch.linalg.vector_norm(ratio, dim=axes, keepdim=True, dtype=wide) if axes else ratio.abs().to(wide)
    limit = norm * (1 - max(1e-6, 2 * torch.finfo(x.dtype).eps))
    outside = length * top.to(wide) > limit
    scale = limit / torch.where(outside, length, torch.ones_like(length))
    return torch.where(outside, ratio * scale.to(x.dtype), x)


class BoundedInput(nn.Module):
    """Scales an example whose L2 norm exceeds ``norm`` down to it; an example that is not finite becomes zero.

    Args:
        norm: the bound; it holds in floating point too.
    """

    def __init__(self, norm: float) -> None:
        super().__init__()
        self.norm = positive("norm", norm)

    def forward(self, x: Tensor) -> Tensor:
        """Project each example onto the ball; integers become floats."""
        return to_ball(x if x.is_floating_point() else x.to(torch.get_default_dtype()), self.norm)

    def extra_repr(self) -> str:
        """The bound."""
        return f"norm={self.norm}"


class _ClipCotangent(torch.autograd.Function):
    """The identity, with ``to_ball`` on the way back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, norm: float) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.norm = inputs[1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return to_ball(cotangents[0], ctx.norm), None


class LossGradientClip(nn.Module):
    """The identity, whose cotangent is scaled down to L2 norm ``norm`` per example; one that is not finite becomes zero.

    Args:
        norm: the bound, in units of ONE example's loss: the training step sums losses and never takes their mean (pitfalls.md L10).
    """

    def __init__(self, norm: float) -> None:
        super().__init__()
        self.norm = positive("norm", norm)

    def forward(self, x: Tensor) -> Tensor:
        """The same values."""
        return _ClipCotangent.apply(x, self.norm)

    def extra_repr(self) -> str:
        """The bound."""
        return f"norm={self.norm}"


# --- affine maps ----------------------------------------------------------------------------------------------------------


class SpectralLinear(nn.Linear):
    """``torch.nn.Linear`` with a certified operator norm.

    Args:
        in_features, out_features, bias, device, dtype: as in ``torch.nn.Linear``.
        lipschitz: largest operator norm of the weight.
        orthogonal: bring all singular values near ``lipschitz`` (Bjorck), in place of scaling the largest down.
        max_bias_norm: largest L2 norm of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        lipschitz: float = 1.0,
        orthogonal: bool = True,
        max_bias_norm: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self.lipschitz, self.orthogonal = positive("lipschitz", lipschitz), bool(orthogonal)
        self.max_bias_norm = positive("max_bias_norm", max_bias_norm)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Orthogonal weight, zero bias."""
        orthogonal_start(self, self.lipschitz)

    def extra_repr(self) -> str:
        """Sizes and constraint."""
        return f"{super().extra_repr()}, lipschitz={self.lipschitz}, orthogonal={self.orthogonal}"


class FrobeniusLinear(nn.Linear):
    """``torch.nn.Linear`` whose weight has a bounded Frobenius norm, or bounded norms of its rows.

    Args:
        in_features, out_features, bias, device, dtype: as in ``torch.nn.Linear``.
        norm: the bound.
        disjoint_neurons: bound each output's row by ``norm``, in place of the whole weight.
        max_bias_norm: largest L2 norm of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        norm: float = 1.0,
        disjoint_neurons: bool = False,
        max_bias_norm: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self.norm, self.disjoint_neurons = positive("norm", norm), bool(disjoint_neurons)
        self.max_bias_norm = positive("max_bias_norm", max_bias_norm)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Orthogonal weight within the constraint, zero bias."""
        rank = 1 if self.disjoint_neurons else min(self.in_features, self.out_features)
        orthogonal_start(self, self.norm / math.sqrt(rank))

    def extra_repr(self) -> str:
        """Sizes and constraint."""
        return f"{super().extra_repr()}, norm={self.norm}, disjoint_neurons={self.disjoint_neurons}"


def orthogonal_start(module: Any, gain: float) -> None:
    """An orthogonal weight with singular values ``gain``, and a zero bias."""
    nn.init.orthogonal_(module.weight, gain)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def same_pads(space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """TensorFlow's ``same`` padding, before and after each axis: ``ceil(size / stride)`` outputs, the odd row comes last."""
    totals = (
        max(0, (-(-size // r) - 1) * r + d * (k - 1) + 1 - size) for size, k, r, d in zip(space, kernel, stride, dilation, strict=True)
    )
    return tuple((total // 2, total - total // 2) for total in totals)


class _SpectralConv(nn.Module):
    """What the two convolutions share; the other base is torch's own layer."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        bias: bool = True,
        *,
        lipschitz: float = 1.0,
        orthogonal: bool = True,
        max_bias_norm: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same', 'valid' or a size, not {padding!r}")
        self.lipschitz, self.orthogonal = positive("lipschitz", lipschitz), bool(orthogonal)
        self.max_bias_norm, self.same = positive("max_bias_norm", max_bias_norm), padding == "same"
        sizes = 0 if isinstance(padding, str) else padding
        super().__init__(in_channels, out_channels, kernel_size, stride, sizes, dilation, 1, bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Orthogonal weight, zero bias."""
        orthogonal_start(self, self.lipschitz)

    def pads(self, space: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Zeros before and after each axis of an input of this size."""
        if self.same:
            return same_pads(space, self.kernel_size, self.stride, self.dilation)
        return tuple((n, n) for n in self.padding)

    def forward(self, x: Tensor) -> Tensor:
        """Pad with zeros and convolve."""
        pads = self.pads(x.shape[2:])
        padding = [low for low, _ in pads]
        if any(low != high for low, high in pads):
            x, padding = F.pad(x, [n for pair in reversed(pads) for n in pair]), [0] * len(pads)
        if max(self.kernel_size) == 1 and max(self.stride) > 1 and not any(padding):
            # Rows that no window reaches: oneDNN's threads write out of bounds in the weight gradient of a strided 1x1 convolution on
            # channels-last arrays unless they are cut off (torch 2.13).
            x = x[(slice(None), slice(None), *(slice((n - 1) // r * r + 1) for n, r in zip(x.shape[2:], self.stride, strict=True)))]
        convolve: Any = F.conv1d if len(padding) == 1 else F.conv2d
        return convolve(x, self.weight, self.bias, self.stride, padding, self.dilation)

    def extra_repr(self) -> str:
        """Sizes and constraint."""
        return f"{super().extra_repr()}, same={self.same}, lipschitz={self.lipschitz}, orthogonal={self.orthogonal}"


class SpectralConv1d(_SpectralConv, nn.Conv1d):  # type: ignore[misc]
    """``torch.nn.Conv1d`` with zero padding, one group, and a certified operator norm.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, bias, device, dtype: as in ``torch.nn.Conv1d``.
        padding: zeros on both sides; ``valid`` for none; ``same`` for TensorFlow's ``ceil(size / stride)`` outputs, at any stride.
        lipschitz: largest operator norm of the convolution on inputs of the size it is used on.
        orthogonal: bring the singular values near ``lipschitz`` (Bjorck), in place of scaling the largest down.
        max_bias_norm: largest L2 norm of the bias.
    """


class SpectralConv2d(_SpectralConv, nn.Conv2d):  # type: ignore[misc]
    """``torch.nn.Conv2d`` with zero padding, one group, and a certified operator norm; the arguments are those of ``SpectralConv1d``."""


class BoundedBias(nn.Module):
    """Adds ``b / sqrt(T)`` at each of the T positions of an example, so that the sensitivity of ``b`` does not grow with T.

    Args:
        num_features: channels.
        max_norm: largest L2 norm of ``b``.
        dim: axis of the channels.
    """

    def __init__(self, num_features: int, *, max_norm: float = 1.0, dim: int = 1, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_features, self.max_norm, self.dim = num_features, positive("max_norm", max_norm), dim
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def positions(self, x: Tensor) -> int:
        """T, positions of one example."""
        return x.shape[1:].numel() // self.num_features

    def forward(self, x: Tensor) -> Tensor:
        """Add the bias."""
        axis = example_axis(self.dim, x)
        if x.shape[axis] != self.num_features:
            raise ValueError(f"a BoundedBias of {self.num_features} features met {x.shape[axis]} on axis {axis}")
        return x + (self.bias / math.sqrt(self.positions(x))).view(-1, *[1] * (x.dim() - 1 - axis))

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"{self.num_features}, max_norm={self.max_norm}, dim={self.dim}"


# --- activations ----------------------------------------------------------------------------------------------------------

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _SwapPairs(torch.autograd.Function):
    """Swaps neighbouring channels where the mask is all ones. Its own transpose.

    A selection on the bits of the numbers, exact for all of them: three times as fast on a CPU as ``where``, whose branches the
    processor cannot predict, and it keeps the memory format.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mask: Tensor, axis: int) -> Tensor:  # type: ignore[override]
        out = x.clone()
        pairs = out.view(mask.dtype).unflatten(axis, (-1, 2))
        first, second = pairs.select(axis + 1, 0), pairs.select(axis + 1, 1)
        difference = (first ^ second).bitwise_and_(mask)
        first.bitwise_xor_(difference)
        second.bitwise_xor_(difference)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.axis = inputs[2]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return _SwapPairs.apply(cotangents[0], *ctx.saved_tensors, ctx.axis), None, None


class GroupSort(nn.Module):
    """Sorts neighbouring channels in groups, in ascending order. At ties too the Jacobian is a permutation.

    Args:
        group_size: channels per group.
        dim: axis of the channels.
    """

    def __init__(self, group_size: int = 2, dim: int = 1) -> None:
        super().__init__()
        if group_size < 2:
            raise ValueError(f"group_size must be at least 2, not {group_size!r}")
        self.group_size, self.dim = group_size, dim

    def forward(self, x: Tensor) -> Tensor:
        """Sort each group."""
        axis = example_axis(self.dim, x)
        if x.shape[axis] % self.group_size:
            raise ValueError(f"{x.shape[axis]} channels do not divide into groups of {self.group_size}; choose a divisor")
        if self.group_size > 2:
            return x.unflatten(axis, (-1, self.group_size)).sort(axis + 1)[0].flatten(axis, axis + 1)
        pairs = x.detach().unflatten(axis, (-1, 2))
        mask = (pairs.select(axis + 1, 0) > pairs.select(axis + 1, 1)).to(_BITS[x.element_size()]).neg()
        return _SwapPairs.apply(x, mask, axis)

    def extra_repr(self) -> str:
        """Group size and axis."""
        return f"{self.group_size}, dim={self.dim}"


class FullSort(nn.Module):
    """Sorts all channels in ascending order.

    Args:
        dim: axis of the channels.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Sort."""
        return x.sort(example_axis(self.dim, x))[0]

    def extra_repr(self) -> str:
        """Its axis."""
        return f"dim={self.dim}"


class Householder(nn.Module):
    """Reflects the pair (channel k, channel k + C/2) in the line at angle ``theta_k / 2`` where it lies below that line.

    The starting angle pi / 2 sorts the pairs. Same function as deel-lip's (Singla et al. 2022, arXiv:2108.04062).

    Args:
        num_features: channels C, even.
        dim: axis of the channels.
    """

    def __init__(self, num_features: int, dim: int = 1, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if num_features % 2:
            raise ValueError(f"Householder pairs channels, so it needs an even number of them, not {num_features}")
        self.num_features, self.dim = num_features, dim
        self.theta = nn.Parameter(torch.full((num_features // 2,), math.pi / 2, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Keep or reflect each pair."""
        axis = example_axis(self.dim, x)
        theta = self.theta.view(-1, *[1] * (x.dim() - 1 - axis))
        a, b = x.chunk(2, axis)
        keep = a * (theta / 2).sin() <= b * (theta / 2).cos()
        sin, cos = theta.sin(), theta.cos()
        return torch.cat((torch.where(keep, a, a * cos + b * sin), torch.where(keep, b, a * sin - b * cos)), axis)

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"{self.num_features}, dim={self.dim}"


class Abs(nn.Module):
    """Absolute value."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return x.abs()


# --- other spellings ------------------------------------------------------------------------------------------------------

SpectralDense, FrobeniusDense = SpectralLinear, FrobeniusLinear
SpectralConv1D, SpectralConv2D = SpectralConv1d, SpectralConv2d
