"""The two tables of operations with a proven bound, for ``graph.py``: layers by class, and functions. One row per layer class."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dptrain_torch import layers as ours

Shape = tuple[int, ...]
Fact = tuple[str, dict[str, Any]]  # kind and attributes of a node


class Unproven(Exception):  # noqa: N818
    """An operation without a bound; the message ends a sentence that names it."""


def require(condition: bool, message: str) -> None:
    """Raise ``Unproven`` unless a condition holds."""
    if not condition:
        raise Unproven(message)


# --- layers ---------------------------------------------------------------------------------------------------------------


def sizes(value: Any, count: int) -> Shape:
    """A size per spatial axis."""
    return (int(value),) * count if isinstance(value, int) else tuple(int(v) for v in value)


def kind(name: str, *attrs: str) -> Callable[[Any, Shape, Shape], Fact]:
    """A layer whose attributes are its own of the same names."""
    return lambda module, x, z: (name, {attr: getattr(module, attr) for attr in attrs})


def linear(module: Any, x: Shape, z: Shape) -> Fact:
    spectral = isinstance(module, ours.SpectralLinear)
    constraint = ("orthogonal" if module.orthogonal else "spectral") if spectral else "rows" if module.disjoint_neurons else "frobenius"
    return "linear", {
        "positions": math.prod(z[:-1]), "fan_in": module.in_features, "fan_out": module.out_features,
        "constraint": constraint, "radius": module.lipschitz if spectral else module.norm, "bias_radius": module.max_bias_norm,
    }  # fmt: skip


def conv(module: Any, x: Shape, z: Shape) -> Fact:
    require(module.groups == 1 and module.padding_mode == "zeros", "set groups=1 and padding_mode='zeros'")
    return "conv", {
        "positions": math.prod(z[1:]), "kernel": sizes(module.kernel_size, len(z) - 1),
        "strides": sizes(module.stride, len(z) - 1), "dilation": sizes(module.dilation, len(z) - 1), "space": x[1:],
        "fan_out": module.out_channels, "constraint": "orthogonal" if module.orthogonal else "spectral", "radius": module.lipschitz,
        "bias_radius": module.max_bias_norm,
    }  # fmt: skip


def bias(module: Any, x: Shape, z: Shape) -> Fact:
    return "bias", {"positions": math.prod(z) // module.num_features, "radius": module.max_norm}


def pool(module: Any, x: Shape, z: Shape) -> Fact:
    n = len(z) - 1
    padding = sizes(module.padding, n)
    require(not any(padding) and not module.ceil_mode, "its windows must lie inside the input; set padding=0 and ceil_mode=False")
    attrs = {"kernel": sizes(module.kernel_size, n), "strides": sizes(module.stride, n)}
    if isinstance(module, nn.modules.pooling._MaxPoolNd):
        require(set(sizes(module.dilation, n)) == {1} and not module.return_indices, "set dilation=1 and return_indices=False")
        return "max_pool", attrs
    require(getattr(module, "divisor_override", None) is None, "set divisor_override=None")
    return "avg_pool", attrs | {"scaled": False}


def scaled_pool(module: Any, x: Shape, z: Shape) -> Fact:
    attrs = {"kernel": module.kernel_size, "strides": module.kernel_size}
    if isinstance(module, ours.ScaledL2NormPool2d):
        return "l2_norm_pool", attrs | {"epsilon": module.eps}
    return "avg_pool", attrs | {"scaled": True}


def global_pool(module: Any, x: Shape, z: Shape) -> Fact:
    last = isinstance(module, ours.GlobalAvgPool)  # channels last; the others have them first
    positions = math.prod(x[:-1] if last else x[1:])
    if isinstance(module, ours.ScaledGlobalL2NormPool2d):
        return "global_l2_norm_pool", {"positions": positions, "epsilon": module.eps}
    if not last and not isinstance(module, ours.ScaledGlobalAvgPool2d):
        require(set(sizes(module.output_size, len(z) - 1)) == {1}, "only the mean over all positions has a bound; set output_size=1")
    return "global_avg_pool", {"positions": positions, "scaled": isinstance(module, ours.ScaledGlobalAvgPool2d)}


def activation(module: Any, x: Shape, z: Shape) -> Fact:
    return ("identity" if module.function == "linear" else module.function), {}


def only(name: str, **wanted: Any) -> Callable[[Any, Shape, Shape], Fact]:
    """A layer that counts with these settings only."""

    def row(module: Any, x: Shape, z: Shape) -> Fact:
        for attr, value in wanted.items():
            require(getattr(module, attr) == value, f"set {attr}={value!r}")
        return name, {}

    return row


def dropout(module: Any, x: Shape, z: Shape) -> Fact:
    require(0 <= module.p < 1, "set p below 1")
    return "dropout", {"rate": float(module.p)}


Row = Callable[[Any, Shape, Shape], Fact]
LAYERS: Mapping[type[nn.Module], Row] = {
    ours.BoundedInput: kind("bounded_input", "norm"),
    ours.LossGradientClip: kind("loss_gradient_clip", "norm"),
    ours.SpectralLinear: linear,
    ours.FrobeniusLinear: linear,
    **dict.fromkeys((ours.SpectralConv1d, ours.SpectralConv2d), conv),
    ours.BoundedBias: bias,
    ours.Householder: kind("householder"),
    ours.GroupSort: kind("group_sort"),
    ours.FullSort: kind("full_sort"),
    ours.LayerCentering: kind("centering"),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), pool),
    **dict.fromkeys((ours.ScaledL2NormPool2d, ours.ScaledAvgPool2d), scaled_pool),
    **dict.fromkeys((ours.ScaledGlobalL2NormPool2d, ours.ScaledGlobalAvgPool2d, ours.GlobalAvgPool), global_pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), global_pool),
    ours.Activation: activation,
    ours.Abs: kind("abs"),
    **{cls: kind(cls.__name__.lower()) for cls in (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Identity)},
    nn.Softplus: only("softplus", beta=1, threshold=20),
    nn.ELU: only("elu", alpha=1),
    nn.GELU: only("gelu", approximate="none"),
    nn.LeakyReLU: lambda module, x, z: ("leaky_relu", {"slope": float(module.negative_slope)}),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), dropout),
    nn.Flatten: kind("flatten"),
    **dict.fromkeys((nn.Unflatten, ours.Reshape, ours.ToSequence), kind("reshape")),
    **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle, ours.Permute, ours.ChannelsFirst, ours.ChannelsLast), kind("permute")),
    ours.Patches: kind("patches"),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, ours.SamePad), kind("pad")),
    ours.Crop: kind("crop"),
}  # fmt: skip
LOGITS = "the loss takes logits; remove it"
CLIP = "use a clipping strategy such as mixed_ghost for this model"
REMEDIES: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Linear, nn.Bilinear), "use SpectralLinear or FrobeniusLinear"),
    ((nn.Conv1d, nn.ConvTranspose1d), "use SpectralConv1d"),
    ((nn.Conv2d, nn.ConvTranspose2d), "use SpectralConv2d"),
    ((nn.modules.conv._ConvNd,), f"only SpectralConv1d and SpectralConv2d have one; {CLIP}"),
    ((nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), "use LayerCentering"),
    ((nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin), LOGITS),
    ((nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, ours.SelfAttention), f"use MixerBlock, or {CLIP}"),
    ((ours.PositionEmbedding,), "use BoundedBias"),
    ((nn.Embedding, nn.EmbeddingBag, nn.RNNBase), CLIP),
    ((nn.LPPool1d, nn.LPPool2d, nn.LPPool3d), "use ScaledL2NormPool2d"),
    ((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), "use ScaledGlobalL2NormPool2d"),
    ((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.CircularPad2d), "use ZeroPad2d"),
    ((nn.PReLU, nn.ReLU6, nn.Hardtanh, nn.SELU, nn.Mish, nn.Hardswish), "use GroupSort or ReLU"),
)
# Attributes that a subclass may define without changing what the layer computes.
HARMLESS = {"__init__", "__repr__", "extra_repr", "reset_parameters", "__doc__", "__module__", "__qualname__", "__annotations__",
            "__annotate__", "__annotate_func__", "__firstlineno__", "__static_attributes__", "__parameters__", "__constants__"}  # fmt: skip


def row_for(module: nn.Module) -> Row | None:
    """The row of a module's class; a subclass counts only if it overrides nothing that the layer uses."""
    ancestry = type(module).__mro__
    for place, cls in enumerate(ancestry):
        if cls in LAYERS:
            overridden = {name for c in ancestry[:place] for name in vars(c) if name not in HARMLESS and hasattr(cls, name)}
            return None if overridden else LAYERS[cls]
    return None


def remedy(module: nn.Module) -> str:
    """What to use in place of a layer without a row."""
    for classes, sentence in REMEDIES:
        if isinstance(module, classes):
            return sentence
    return "use a layer of dptrain_torch.layers"


# --- functions ------------------------------------------------------------------------------------------------------------

ADD = {operator.add, operator.iadd, torch.add, "add"}
SUBTRACT = {operator.sub, torch.sub, "sub"}
MULTIPLY = {operator.mul, torch.mul, "mul"}
DIVIDE = {operator.truediv, torch.div, torch.true_divide, "div", "true_divide"}
FUNCTIONS: Mapping[Any, str] = {
    **dict.fromkeys((torch.flatten, "flatten"), "flatten"),
    **dict.fromkeys((torch.reshape, "reshape", "view", torch.unflatten, "unflatten", torch.squeeze, "squeeze"), "reshape"),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), "reshape"),
    **dict.fromkeys((torch.permute, "permute", torch.transpose, "transpose", torch.movedim, "movedim"), "permute"),
    **dict.fromkeys((torch.swapaxes, "swapaxes", torch.moveaxis, "moveaxis"), "permute"),
    "contiguous": "identity",
    **dict.fromkeys((torch.abs, operator.abs, "abs"), "abs"),
    **dict.fromkeys((torch.relu, F.relu, "relu"), "relu"),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), "tanh"),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), "sigmoid"),
}
# Of numbers read off shapes, which are no part of the graph; the operations that use them are checked at two batch sizes.
ARITHMETIC = {operator.getitem, operator.mul, operator.floordiv, operator.add, operator.sub, operator.neg}
FUNCTION_REMEDIES: Mapping[str, str] = {
    **{f: f"call a Spectral{f.capitalize()} layer, whose weight is constrained" for f in ("linear", "conv1d", "conv2d")},
    **dict.fromkeys(("softmax", "log_softmax"), LOGITS),
    **{f.lower(): f"call an nn.{f} layer" for f in ("Dropout", "GELU", "SiLU", "ELU", "Softplus")},
    "leaky_relu": "call an nn.LeakyReLU layer",
    "max_pool2d": "call an nn.MaxPool2d layer",
    "avg_pool2d": "call an nn.AvgPool2d or ScaledAvgPool2d layer",
    "adaptive_avg_pool2d": "call an nn.AdaptiveAvgPool2d(1) or ScaledGlobalAvgPool2d layer",
    "mean": "call a ScaledGlobalAvgPool2d, nn.AdaptiveAvgPool2d(1) or LayerCentering layer",
    "pad": "call an nn.ZeroPad2d layer",
    **dict.fromkeys(("layer_norm", "normalize"), "use LayerCentering"),
    **dict.fromkeys(("matmul", "bmm"), f"products of activations are not Lipschitz; {CLIP}"),
    "scaled_dot_product_attention": f"attention is not Lipschitz; use MixerBlock, or {CLIP}",
}
