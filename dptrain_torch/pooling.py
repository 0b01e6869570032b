"""Pooling, centering and patches with Lipschitz constant 1. Nothing here looks beyond one example."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dptrain_torch.own import example_axis, positive


def pair(sizes: Any) -> tuple[int, int]:
    """A size per axis of an image."""
    return (sizes, sizes) if isinstance(sizes, int) else (int(sizes[0]), int(sizes[1]))


class ScaledL2NormPool2d(nn.Module):
    """``sqrt(sum x^2 + eps)`` over disjoint windows of ``[B, C, H, W]``; rows that fill no window are left out.

    Args:
        kernel_size: the window.
        eps: keeps the derivative finite at 0.
    """

    def __init__(self, kernel_size: Any = 2, eps: float = 1e-6) -> None:
        super().__init__()
        self.kernel_size, self.eps = pair(kernel_size), positive("eps", eps)

    def forward(self, x: Tensor) -> Tensor:
        """Pool."""
        return (F.avg_pool2d(x.square(), self.kernel_size) * math.prod(self.kernel_size) + self.eps).sqrt()

    def extra_repr(self) -> str:
        """Its window."""
        return f"{self.kernel_size}, eps={self.eps}"


class ScaledAvgPool2d(nn.Module):
    """Mean times the root of the window's size over disjoint windows of ``[B, C, H, W]``; rows that fill no window are left out.

    Args:
        kernel_size: the window.
    """

    def __init__(self, kernel_size: Any = 2) -> None:
        super().__init__()
        self.kernel_size = pair(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Pool."""
        return F.avg_pool2d(x, self.kernel_size) * math.sqrt(math.prod(self.kernel_size))

    def extra_repr(self) -> str:
        """Its window."""
        return f"{self.kernel_size}"


class ScaledGlobalL2NormPool2d(nn.Module):
    """``sqrt(sum x^2 + eps)`` over all positions of ``[B, C, *S]``, as ``[B, C]``.

    Args:
        eps: keeps the derivative finite at 0.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = positive("eps", eps)

    def forward(self, x: Tensor) -> Tensor:
        """Pool."""
        return (x.square().flatten(2).sum(2) + self.eps).sqrt()

    def extra_repr(self) -> str:
        """Its epsilon."""
        return f"eps={self.eps}"


class ScaledGlobalAvgPool2d(nn.Module):
    """Mean times the root of the number of positions of ``[B, C, *S]``, as ``[B, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool."""
        return x.flatten(2).sum(2) / math.sqrt(x.shape[2:].numel())


class LayerCentering(nn.Module):
    """Subtracts a mean within each example.

    Args:
        dim: axes to average over; by default the positions of each channel of ``[B, C, *S]``, and the features of ``[B, C]``.
    """

    def __init__(self, dim: int | tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.dim = (dim,) if isinstance(dim, int) else dim

    def forward(self, x: Tensor) -> Tensor:
        """Centre."""
        dims = tuple(range(2, x.dim())) or (1,) if self.dim is None else self.dim
        return x - x.mean([example_axis(dim, x) for dim in dims], keepdim=True)

    def extra_repr(self) -> str:
        """Its axes."""
        return f"dim={self.dim}"


class Patches(nn.Module):
    """An image as a sequence of flattened disjoint patches ``[B, H/s W/s, s s C]``, each in the order row, column, channel.

    Args:
        size: s.
        channels_last: the image is ``[B, H, W, C]``, not ``[B, C, H, W]``.
    """

    def __init__(self, size: int, channels_last: bool = False) -> None:
        super().__init__()
        self.size, self.channels_last = positive("size", size), channels_last

    def forward(self, x: Tensor) -> Tensor:
        """Cut."""
        x = x if self.channels_last else x.movedim(1, -1)
        b, h, w, c = x.shape
        s = self.size
        if h % s or w % s:
            raise ValueError(f"an image of {h} x {w} does not divide into patches of {s}; choose a divisor")
        return x.reshape(b, h // s, s, w // s, s, c).transpose(2, 3).reshape(b, h // s * (w // s), s * s * c)

    def extra_repr(self) -> str:
        """Its size."""
        return f"{self.size}, channels_last={self.channels_last}"


ScaledL2NormPooling2D, ScaledAveragePooling2D = ScaledL2NormPool2d, ScaledAvgPool2d
ScaledGlobalL2NormPooling2D, ScaledGlobalAveragePooling2D = ScaledGlobalL2NormPool2d, ScaledGlobalAvgPool2d
