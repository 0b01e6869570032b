"""The few modules that specifications need and torch does not have. Weights live in ordinary torch layers inside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,  # the exact one, in both frameworks
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "elu": F.elu,
    "softplus": F.softplus,
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
        pads: list[int] = []
        for size, (k, r, d) in reversed(list(zip(x.shape[2:], self.geometry, strict=True))):
            total = d * (k - 1) if self.causal else max(0, (-(-size // r) - 1) * r + d * (k - 1) + 1 - size)
            pads += [total, 0] if self.causal else [total // 2, total - total // 2]
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


class Residual(nn.Module):
    """``body(x) + shortcut(x)``, both on channels-last arrays; children are named as in the specification.

    Args:
        body, shortcut: name -> module, in order; an empty shortcut is the identity.
    """

    def __init__(self, body: dict[str, nn.Module], shortcut: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in (body | shortcut).items():
            self.add_module(name, module)
        self.body, self.shortcut = tuple(body), tuple(shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Add the two paths."""
        first = second = x
        for name in self.body:
            first = self.get_submodule(name)(first)
        for name in self.shortcut:
            second = self.get_submodule(name)(second)
        return first + second
