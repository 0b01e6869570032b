"""The table of cases: one row per layer or combination, one column per framework. A new layer is one row.

A column builds ``(model, input shape or integer input)`` in float64. ``None`` marks what a framework does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dptrain_tf import layers as FL
from dptrain_torch import layers as TL

KL = keras.layers
BATCH, CLASSES = 4, 3


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        name: what it is.
        shape: shape of one example, channels last for Keras; torch gets ``torch_shape``.
        torch: builds a module, or None.
        keras: builds a model, or None.
        torch_shape: shape of one example for torch, where it differs.
        tokens: size of the vocabulary for integer inputs, 0 for real ones.
    """

    name: str
    shape: tuple[int, ...]
    torch: Callable[[], nn.Module] | None
    keras: Callable[[], Any] | None
    torch_shape: tuple[int, ...] | None = None
    tokens: int = 0

    def inputs(self, backend: str) -> np.ndarray:
        """A batch of inputs."""
        rng = np.random.default_rng(1)
        shape = (BATCH, *((self.torch_shape or self.shape) if backend == "torch" else self.shape))
        return rng.integers(0, self.tokens, shape) if self.tokens else rng.standard_normal(shape)

    def targets(self) -> np.ndarray:
        """A batch of labels."""
        return np.random.default_rng(2).integers(0, CLASSES, BATCH)


class Head(nn.Module):
    """Flattens and maps to logits, so that every case ends in the same loss."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.head: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x).flatten(1)
        return self.head(h) if self.head is not None else h


def t(*body: nn.Module, shape: tuple[int, ...], tokens: bool = False) -> nn.Module:
    """A torch model: body, flatten, linear head."""
    torch.manual_seed(0)
    model = Head(*body).double()
    probe = torch.zeros(2, *shape, dtype=torch.long if tokens else torch.float64)
    with torch.no_grad():
        width = model(probe).shape[1]
    model.head = nn.Linear(width, CLASSES).double()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.5, 0.5)  # scales and offsets away from their defaults
    return model


def k(*body: Any, shape: tuple[int, ...], tokens: bool = False) -> Any:
    """A Keras model: body, flatten, dense head."""
    keras.utils.set_random_seed(0)
    x = inp = keras.Input(shape, dtype="int64" if tokens else "float64")
    for layer in body:
        x = layer(x)
    model = keras.Model(inp, KL.Dense(CLASSES, dtype="float64")(KL.Flatten(dtype="float64")(x)))
    rng = np.random.default_rng(3)
    for v in model.trainable_variables:
        if len(v.shape) == 1:
            v.assign(rng.normal(0.5, 0.5, v.shape))
    return model


def simple(
    name: str,
    shape: tuple[int, ...],
    torch_layers: Callable[[], list[nn.Module]] | None,
    keras_layers: Callable[[], list[Any]] | None,
    torch_shape: tuple[int, ...] | None = None,
    tokens: int = 0,
) -> Case:
    """A row whose models are chains of layers."""
    ts = torch_shape or shape
    return Case(
        name,
        shape,
        (lambda: t(*torch_layers(), shape=ts, tokens=bool(tokens))) if torch_layers else None,
        (lambda: k(*keras_layers(), shape=shape, tokens=bool(tokens))) if keras_layers else None,
        torch_shape,
        tokens,
    )


D64: dict[str, Any] = {"dtype": "float64"}


def conv(
    name: str,
    n: int,
    size: tuple[int, ...],
    torch_args: dict[str, Any] | None,
    keras_args: dict[str, Any] | None,
    channels: int = 4,
    filters: int = 6,
) -> Case:
    """A row with one convolution of rank n."""
    t_layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    k_layer = (KL.Conv1D, KL.Conv2D, KL.Conv3D)[n - 1]
    return simple(
        name,
        (*size, channels),
        (lambda: [t_layer(channels, filters, **torch_args)]) if torch_args is not None else None,
        (lambda: [k_layer(filters, **keras_args, **D64)]) if keras_args is not None else None,
        (channels, *size),
    )


class CalledThrice(nn.Module):
    """One linear layer and one convolution called several times, the convolution on two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 2), nn.Linear(2, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.conv(x))
        h = torch.tanh(self.conv(F.avg_pool2d(h, 2)))
        h = h.mean((2, 3))
        return self.head(torch.tanh(self.fc(torch.tanh(self.fc(self.fc(h))))))


def keras_called_thrice() -> Any:
    keras.utils.set_random_seed(0)
    c, fc = KL.Conv2D(2, 3, padding="same", activation="tanh", **D64), KL.Dense(2, activation="tanh", **D64)
    x = inp = keras.Input((8, 8, 2), dtype="float64")
    x = c(KL.AveragePooling2D(2, **D64)(c(x)))
    x = KL.GlobalAveragePooling2D(**D64)(x)
    return keras.Model(inp, KL.Dense(CLASSES, **D64)(fc(fc(fc(x)))))


class Tied(nn.Module):
    """Embedding and output matrix are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.emb.weight
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.out(torch.tanh(self.emb(x)))).mean(1))


class Positions(nn.Module):
    """Position ids of batch size 1, broadcast over the batch, as in Hugging Face BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.pos, self.norm, self.head = nn.Embedding(9, 4), nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(x.shape[1]).unsqueeze(0)
        return self.head(torch.tanh(self.norm(self.emb(x) + self.pos(ids))).mean(1))


class Attention(nn.Module):
    """torch.nn's own multi-head attention, by the slow method."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mha(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    """An LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, (h, _) = self.rnn(x)
        return self.head(out.mean(1) + torch.tanh(h[-1]))


class BareParameter(nn.Module):
    """A class token that no layer owns: the whole model goes by the slow method."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(torch.tanh(self.fc(h))[:, 0] + x.mean(1))


def seeded(cls: type[nn.Module]) -> Callable[[], nn.Module]:
    """A factory of a double-precision module."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return cls().double()

    return make


def frozen(make: Callable[[], Any], role: str) -> Callable[[], Any]:
    """A factory that freezes weight or bias of the first layer (torch)."""

    def frozen_model() -> Any:
        model = make()
        first = next(m for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter))
        getattr(first, role).requires_grad_(False)
        return model

    return frozen_model


def keras_attention() -> Any:
    keras.utils.set_random_seed(0)
    inp = keras.Input((5, 8), dtype="float64")
    h = KL.MultiHeadAttention(2, 4, **D64)(inp, inp)
    return keras.Model(inp, KL.Dense(CLASSES, **D64)(KL.GlobalAveragePooling1D(**D64)(h)))


CASES: list[Case] = [
    simple("linear rank 2", (5,), lambda: [nn.Linear(5, 4), nn.Tanh()], lambda: [KL.Dense(4, activation="tanh", **D64)]),
    simple("linear rank 3", (3, 5), lambda: [nn.Linear(5, 4), nn.Tanh()], lambda: [KL.Dense(4, activation="tanh", **D64)]),
    simple("linear rank 4", (2, 3, 5), lambda: [nn.Linear(5, 4), nn.Tanh()], lambda: [KL.Dense(4, activation="relu", **D64)]),
    simple("linear rank 5", (2, 2, 3, 5), lambda: [nn.Linear(5, 2), nn.Tanh()], lambda: [KL.Dense(2, activation="softmax", **D64)]),
    simple("linear no bias", (3, 5), lambda: [nn.Linear(5, 4, bias=False)], lambda: [KL.Dense(4, use_bias=False, **D64)]),
    conv("conv1d", 1, (9,), {"kernel_size": 3}, {"kernel_size": 3}),
    conv("conv1d causal", 1, (9,), None, {"kernel_size": 3, "padding": "causal", "dilation_rate": 2}),
    conv("conv1d groups dilation", 1, (11,), {"kernel_size": 3, "groups": 2, "dilation": 2}, {"kernel_size": 3, "groups": 2, "dilation_rate": 2}),
    conv("conv2d valid", 2, (6, 7), {"kernel_size": 3}, {"kernel_size": 3, "activation": "tanh"}),
    conv("conv2d same even kernel", 2, (5, 6), {"kernel_size": (2, 4), "padding": "same"}, {"kernel_size": (2, 4), "padding": "same"}),
    conv("conv2d stride", 2, (7, 8), {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 3, "strides": 2, "padding": "same"}),
    conv("conv2d stride over kernel", 2, (8, 9), {"kernel_size": 2, "stride": 3}, {"kernel_size": 2, "strides": 3}),
    conv("conv2d uneven stride", 2, (8, 9), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 0)}, {"kernel_size": (3, 2), "strides": 2}),
    conv("conv2d dilation", 2, (8, 8), {"kernel_size": 3, "dilation": 2, "padding": 2}, {"kernel_size": 3, "dilation_rate": 2, "padding": "same"}),
    conv("conv2d groups", 2, (5, 5), {"kernel_size": 3, "groups": 2, "padding": 1}, {"kernel_size": 3, "groups": 2, "padding": "same"}),
    conv("conv2d depthwise", 2, (5, 5), {"kernel_size": 3, "groups": 4}, {"kernel_size": 3, "groups": 4}, 4, 8),
    conv("conv2d 1x1", 2, (4, 4), {"kernel_size": 1}, {"kernel_size": 1}),
    conv("conv2d 1x1 stride", 2, (16, 16), {"kernel_size": 1, "stride": 2}, {"kernel_size": 1, "strides": 2}, 8, 16),
    conv("conv2d whole image", 2, (3, 4), {"kernel_size": (3, 4)}, {"kernel_size": (3, 4)}),
    conv("conv2d no bias", 2, (5, 5), {"kernel_size": 3, "bias": False}, {"kernel_size": 3, "use_bias": False}),
    *[conv(f"conv2d {m}", 2, (5, 6), {"kernel_size": 3, "padding": (1, 2), "padding_mode": m}, None) for m in ("reflect", "replicate", "circular")],
    conv("conv2d same circular even", 2, (5, 6), {"kernel_size": (2, 4), "padding": "same", "padding_mode": "circular"}, None),
    conv("conv3d", 3, (4, 5, 4), {"kernel_size": 2, "stride": (1, 2, 1), "padding": 1}, {"kernel_size": 2, "strides": (1, 2, 1), "padding": "same"}, 2, 2),
    simple("keras depthwise", (6, 6, 3), None, lambda: [KL.DepthwiseConv2D(3, strides=2, depth_multiplier=2, **D64)]),
    simple("keras depthwise1d", (7, 3), None, lambda: [KL.DepthwiseConv1D(3, padding="same", **D64)]),
    simple("keras separable", (6, 6, 3), None, lambda: [KL.SeparableConv2D(4, 3, **D64)]),
    simple("conv1d transpose", (5, 4), lambda: [nn.ConvTranspose1d(4, 3, 3, stride=2)], lambda: [KL.Conv1DTranspose(3, 3, 2, **D64)], (4, 5)),
    simple("conv2d transpose", (4, 5, 4), lambda: [nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)], lambda: [KL.Conv2DTranspose(6, 3, 2, "same", **D64)], (4, 4, 5)),
    simple("conv2d transpose dilation", (4, 5, 4), lambda: [nn.ConvTranspose2d(4, 6, 3, dilation=2)], lambda: [KL.Conv2DTranspose(6, 2, 3, **D64)], (4, 4, 5)),
    simple("conv3d transpose", (3, 2, 3, 2), lambda: [nn.ConvTranspose3d(2, 2, 2, 2)], lambda: [KL.Conv3DTranspose(2, 2, 2, **D64)], (2, 3, 2, 3)),
    simple("embedding", (6,), lambda: [nn.Embedding(5, 4), nn.Tanh()], lambda: [KL.Embedding(5, 4, **D64), KL.Activation("tanh", **D64)], tokens=5),
    simple("embedding padding index", (6,), lambda: [nn.Embedding(5, 4, padding_idx=1), nn.Tanh()], None, tokens=5),
    simple("embedding rank 3", (2, 3), lambda: [nn.Embedding(5, 4), nn.Tanh()], lambda: [KL.Embedding(5, 4, **D64)], tokens=5),
    simple("layer norm", (3, 6), lambda: [nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()], lambda: [KL.Dense(6, **D64), KL.LayerNormalization(**D64), KL.Activation("tanh", **D64)]),
    simple("layer norm two axes", (2, 3, 4), lambda: [nn.Linear(4, 4), nn.LayerNorm((3, 4))], lambda: [KL.Dense(4, **D64), KL.LayerNormalization(axis=(2, 3), **D64)]),
    simple("group norm", (4, 4, 6), lambda: [nn.Conv2d(6, 6, 3), nn.GroupNorm(3, 6), nn.ReLU()], lambda: [KL.Conv2D(6, 3, **D64), KL.GroupNormalization(3, **D64), KL.ReLU(**D64)], (6, 4, 4)),
    simple("instance norm", (4, 4, 3), lambda: [nn.Conv2d(3, 3, 2), nn.InstanceNorm2d(3, affine=True)], lambda: [KL.Conv2D(3, 2, **D64), KL.GroupNormalization(-1, **D64)], (3, 4, 4)),
    simple("rms norm", (3, 6), lambda: [nn.Linear(6, 6), nn.RMSNorm(6), nn.Tanh()], lambda: [KL.Dense(6, **D64), KL.RMSNormalization(**D64), KL.Activation("tanh", **D64)]),
    simple("in-place activation", (4, 4, 2), lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3), nn.ELU(inplace=True)], None, (2, 4, 4)),
    simple("prelu, slow method", (4, 4, 2), lambda: [nn.Conv2d(2, 3, 3), nn.PReLU(3)], lambda: [KL.Conv2D(3, 3, **D64), KL.PReLU(**D64)], (2, 4, 4)),
    simple("einsum dense", (3, 5), None, lambda: [KL.EinsumDense("abc,cde->abde", (3, 2, 3), bias_axes="de", **D64)]),
    simple("nested models", (4,), lambda: [nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 3)))], lambda: [keras.Sequential([KL.Dense(3, **D64), keras.Sequential([KL.Dense(3, activation="tanh", **D64)])])]),
    simple("spectral dense and sorting", (3, 6), lambda: [TL.SpectralLinear(6, 4), TL.GroupSort(dim=-1)], lambda: [FL.SpectralDense(4, **D64), FL.GroupSort(dtype="float64")]),
    simple("spectral conv2d same stride", (7, 6, 3), lambda: [TL.SpectralConv2d(3, 4, 3, 2, "same"), TL.ScaledL2NormPool2d()], lambda: [FL.SpectralConv2D(4, 3, 2, "same", **D64), FL.ScaledL2NormPool2d(**D64)], (3, 7, 6)),
    simple("spectral conv1d dilation", (9, 3), lambda: [TL.SpectralConv1d(3, 4, 3, dilation=2), TL.FullSort()], lambda: [FL.SpectralConv1D(4, 3, dilation_rate=2, **D64), FL.FullSort(**D64)], (3, 9)),
    simple("bounded bias", (4, 4, 3), lambda: [TL.BoundedBias(3), nn.Tanh()], lambda: [FL.BoundedBias(**D64), KL.Activation("tanh", **D64)], (3, 4, 4)),
    simple("householder, slow method", (4, 4), lambda: [TL.Householder(4, dim=-1), nn.Tanh()], lambda: [FL.Householder(**D64), KL.Activation("tanh", **D64)]),
    simple("residual of spectral layers", (5,), lambda: [TL.Residual(TL.FrobeniusLinear(5, 5), TL.Abs(), mode="convex")], lambda: [FL.Residual([FL.FrobeniusDense(5, **D64), FL.Abs(**D64)], mode="convex", **D64)]),
    Case("layer called three times", (8, 8, 2), seeded(CalledThrice), keras_called_thrice, (2, 8, 8)),
    Case("tied embedding and output", (5,), seeded(Tied), None, tokens=7),
    Case("broadcast position ids", (6,), seeded(Positions), None, tokens=9),
    Case("attention", (5, 8), seeded(Attention), keras_attention),
    Case("lstm", (4, 3), seeded(Recurrent), lambda: k(KL.LSTM(4, **D64), shape=(4, 3))),
    Case("bare parameter, slow method", (3, 4), seeded(BareParameter), None),
    Case("frozen weight", (3, 5), frozen(lambda: t(nn.Linear(5, 4), nn.Tanh(), shape=(3, 5)), "weight"), None),
    Case("frozen bias", (5, 5, 2), frozen(lambda: t(nn.Conv2d(2, 3, 3), nn.Tanh(), shape=(2, 5, 5)), "bias"), None, (2, 5, 5)),
]  # fmt: skip
