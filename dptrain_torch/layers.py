"""Modules that specifications need and torch does not have, and every name that users compose models from.

Those below have no constant of their own: their weights live in ordinary layers inside them. Layers with a proven Lipschitz constant are in
``lipschitz.py`` and ``pooling.py``, and re-exported here, under the names of both packages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from dptrain_torch.lipschitz import (
    Abs,
    BoundedBias,
    BoundedInput,
    FrobeniusDense,
    FrobeniusLinear,
    FullSort,
    GroupSort,
    Householder,
    LossGradientClip,
    SpectralConv1D,
    SpectralConv1d,
    SpectralConv2D,
    SpectralConv2d,
    SpectralDense,
    SpectralLinear,
    same_pads,
)
from dptrain_torch.pooling import (
    LayerCentering,
    Patches,
    ScaledAveragePooling2D,
    ScaledAvgPool2d,
    ScaledGlobalAveragePooling2D,
    ScaledGlobalAvgPool2d,
    ScaledGlobalL2NormPool2d,
    ScaledGlobalL2NormPooling2D,
    ScaledL2NormPool2d,
    ScaledL2NormPooling2D,
)

Flatten, MaxPool2d, ReLU = nn.Flatten, nn.MaxPool2d, nn.ReLU
Mode = Literal["add", "convex"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,  # the exact one, in both frameworks
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "elu": F.elu,
    "softplus": F.softplus,
    "abs": torch.abs,
}


class Activation(nn.Module):
    """An elementwise function by name."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return ACTIVATIONS[self.function](x)

    def extra_repr(self) -> str:
        """Its name."""
        return self.function


class ChannelsFirst(nn.Module):
    """``[B, *S, C]`` to ``[B, C, *S]``, a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Move the last axis to place 1."""
        return x.movedim(-1, 1)


class ChannelsLast(nn.Module):
    """``[B, C, *S]`` to ``[B, *S, C]``, a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Move axis 1 to the end."""
        return x.movedim(1, -1)


class SamePad(nn.Module):
    """Zero padding as TensorFlow's ``same`` and ``causal``: the output has ``ceil(size / stride)`` positions, the odd row comes last."""

    def __init__(self, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], causal: bool = False) -> None:
        super().__init__()
        self.geometry, self.causal = list(zip(kernel, stride, dilation, strict=True)), causal

    def forward(self, x: Tensor) -> Tensor:
        """Pad the spatial axes."""
        kernel, stride, dilation = zip(*self.geometry, strict=True)
        pairs = same_pads(x.shape[2:], kernel, stride, dilation)
        if self.causal:
            pairs = tuple((d * (k - 1), 0) for k, d in zip(kernel, dilation, strict=True))
        pads = [n for pair in reversed(pairs) for n in pair]
        return F.pad(x, pads) if any(pads) else x


class Crop(nn.Module):
    """Cuts rows off the end of each spatial axis of ``[B, C, *S]``."""

    def __init__(self, surplus: Sequence[int]) -> None:
        super().__init__()
        self.surplus = tuple(surplus)

    def forward(self, x: Tensor) -> Tensor:
        """Cut."""
        return x[(slice(None), slice(None), *(slice(n - cut) for n, cut in zip(x.shape[2:], self.surplus, strict=True)))]


class PositionEmbedding(nn.Module):
    """Adds a learned vector to each position of ``[B, T, D]``."""

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(length, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Look up ids of shape ``[B, T]``, so that every example has its own row."""
        ids = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return x + self.embedding(ids)


class SelfAttention(nn.Module):
    """Multi-head self-attention with separate maps."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``[B, T, D]``."""
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, heads, T, D / heads]
        return self.out(mixed.transpose(1, 2).flatten(2))


class GlobalAvgPool(nn.Module):
    """Mean over the positions of ``[B, *S, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Average all axes but the first and the last."""
        return x.mean(dim=tuple(range(1, x.dim() - 1)))


class ToSequence(nn.Module):
    """``[B, H, W, C]`` to ``[B, H W, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Merge the spatial axes."""
        return x.flatten(1, -2)


# --- shapes ---------------------------------------------------------------------------------------------------------------


class Reshape(nn.Module):
    """Another shape of the same numbers.

    Args:
        shape: of one example.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Reshape each example."""
        return x.reshape(x.shape[0], *self.shape)

    def extra_repr(self) -> str:
        """Its shape."""
        return f"{self.shape}"


class Permute(nn.Module):
    """Another order of the axes of one example.

    Args:
        dims: the axes counted from 1, as Keras does.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        if sorted(dims) != list(range(1, len(dims) + 1)):
            raise ValueError(f"dims must hold each of 1 to {len(dims)} once, not {tuple(dims)}; axis 0 holds the examples")
        self.dims = tuple(dims)

    def forward(self, x: Tensor) -> Tensor:
        """Permute."""
        return x.permute(0, *self.dims)

    def extra_repr(self) -> str:
        """Its order."""
        return f"{self.dims}"


# --- blocks ---------------------------------------------------------------------------------------------------------------


@torch.fx.wrap
def mix(first: Tensor, second: Tensor, mode: str) -> Tensor:
    """The sum of two paths, or its half."""
    total = first + second
    return total if mode == "add" else 0.5 * total


def checked_mode(mode: str) -> str:
    """The mode of a block, if there is one of that name.

    Raises:
        ValueError: there is not.
    """
    if mode not in ("add", "convex"):
        raise ValueError(f"mode must be 'add' or 'convex', not {mode!r}")
    return mode


class Residual(nn.Module):
    """``f(x) + x``, or half of it with ``mode="convex"``, where f is the chain of the modules.

    Args:
        modules: f, in order.
        mode: ``add`` or ``convex``.
    """

    def __init__(self, *modules: nn.Module, mode: Mode = "add") -> None:
        super().__init__()
        self._fill({str(i): module for i, module in enumerate(modules)}, {}, mode)

    @classmethod
    def named(cls, body: dict[str, nn.Module], shortcut: dict[str, nn.Module], mode: Mode = "add") -> Residual:
        """A block whose children have the names of a specification: ``body(x) + shortcut(x)``, both on channels-last arrays.

        Args:
            body, shortcut: name -> module, in order; an empty shortcut is the identity.
            mode: ``add`` or ``convex``.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._fill(body, shortcut, mode)
        return made

    def _fill(self, body: dict[str, nn.Module], shortcut: dict[str, nn.Module], mode: str) -> None:
        for name, module in (body | shortcut).items():
            self.add_module(name, module)
        self._body, self._shortcut, self._mode = tuple(body), tuple(shortcut), checked_mode(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Add the two paths."""
        first = second = x
        for name in self._body:
            first = self.get_submodule(name)(first)
        for name in self._shortcut:
            second = self.get_submodule(name)(second)
        return mix(first, second, self._mode)

    def extra_repr(self) -> str:
        """Its mode."""
        return f"mode={self._mode!r}"


class MixerBlock(nn.Module):
    """A block of an MLP mixer on ``[B, T, D]``: two layers across the positions, then two across the channels, each pair residual.

    Args:
        tokens: T.
        channels: D.
        token_hidden, channel_hidden: hidden widths, even; by default T and D rounded up to even.
        mode: how each pair is joined with its input, ``add`` or ``convex``.
    """

    def __init__(
        self, tokens: int, channels: int, token_hidden: int | None = None, channel_hidden: int | None = None, mode: Mode = "convex"
    ) -> None:
        super().__init__()
        wide, deep = token_hidden or tokens + tokens % 2, channel_hidden or channels + channels % 2
        if wide % 2 or deep % 2:
            raise ValueError(f"the hidden widths {wide} and {deep} of a MixerBlock are sorted in pairs; make them even")
        self.token1, self.token2 = SpectralLinear(tokens, wide), SpectralLinear(wide, tokens)
        self.channel1, self.channel2 = SpectralLinear(channels, deep), SpectralLinear(deep, channels)
        self.sort, self.mode = GroupSort(2, dim=-1), checked_mode(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions, then channels."""
        x = mix(self.token2(self.sort(self.token1(x.transpose(1, 2)))).transpose(1, 2), x, self.mode)
        return mix(self.channel2(self.sort(self.channel1(x))), x, self.mode)

    def extra_repr(self) -> str:
        """Its mode."""
        return f"mode={self.mode!r}"


__all__ = [
    "Abs", "BoundedBias", "BoundedInput", "Flatten", "FrobeniusDense", "FrobeniusLinear", "FullSort", "GroupSort", "Householder",
    "LayerCentering", "LossGradientClip", "MaxPool2d", "MixerBlock", "Patches", "Permute", "ReLU", "Reshape", "Residual",
    "ScaledAveragePooling2D", "ScaledAvgPool2d", "ScaledGlobalAveragePooling2D", "ScaledGlobalAvgPool2d", "ScaledGlobalL2NormPool2d",
    "ScaledGlobalL2NormPooling2D", "ScaledL2NormPool2d", "ScaledL2NormPooling2D", "SpectralConv1D", "SpectralConv1d", "SpectralConv2D",
    "SpectralConv2d", "SpectralDense", "SpectralLinear",
]  # fmt: skip
