"""Specification -> torch module, and the exchange of weights. Arrays are channels-last at every border, as in Keras."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dptrain import layer_specs as L
from dptrain.errors import ConfigError
from dptrain.layer_specs import AnyLayer, axes, named
from dptrain.models import Weights, check_weights, outputs
from dptrain_torch import layers as ours

Shape = tuple[int, ...]  # of one example, channels last
WANTS_FIRST = (L.Conv, L.ConvTranspose, L.Pool, L.GroupNorm, L.InstanceNorm, L.SpectralConv, L.ScaledPool, L.ScaledGlobalPool)
ANY_LAYOUT = (
    L.Activation, L.Dropout, L.BoundedInput, L.LossGradientClip, L.BoundedBias, L.GroupSort, L.Householder, L.LayerCentering,
)  # fmt: skip


class Builder:
    """Builds modules while it follows the shape of one example and the layout of the array.

    Convolutions, pooling and channel normalisation want channels first; layers that work on any axis take the layout as it is; everything
    else wants channels last. The builder inserts views where the layout has to change, so a block of convolutions changes it once on
    each side.

    Args:
        num_classes: width that ``units: num_classes`` stands for.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def chain(self, specs: tuple[AnyLayer, ...], shape: Shape, where: str = "") -> tuple[dict[str, nn.Module], Shape]:
        """Modules of a list of layers, channels last at both ends.

        Args:
            specs: the layers.
            shape: shape of one example.
            where: path of the parent with a trailing dot, for errors.
        Returns:
            Name -> module in order, and the shape after the last.
        Raises:
            ConfigError: a layer does not fit its input; names the layer.
        """
        modules: dict[str, nn.Module] = {}
        first = False
        for name, spec in named(specs):
            if name in modules:
                raise ConfigError(f"Two layers are called {where + name!r}; give them different names.")
            wants_first = isinstance(spec, WANTS_FIRST)
            if wants_first != first and not isinstance(spec, ANY_LAYOUT):
                modules[f"{name}_layout"] = ours.ChannelsFirst() if wants_first else ours.ChannelsLast()
                first = wants_first
            try:
                made, shape = self.layer(spec, shape, where + name + ".", first)
            except (ValueError, IndexError, RuntimeError) as error:
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(f"Layer {where + name!r} ({spec.type}) does not fit an input of shape {shape}: {error}.") from None
            modules |= {name + suffix: module for suffix, module in made.items()}
            first = first and len(shape) > 1
        if first:
            modules["layout_last"] = ours.ChannelsLast()
        return modules, shape

    def layer(self, spec: AnyLayer, shape: Shape, where: str, first: bool) -> tuple[dict[str, nn.Module], Shape]:
        """Modules of one layer by suffix of its name, and the shape after it; ``first`` says that channels are first."""
        *space, channels = shape
        match spec:
            case L.Dense():
                units = outputs(spec, self.num_classes)
                return self.fused(nn.Linear(channels, units, spec.bias), spec.activation), (*space, units)
            case L.Conv():
                return self.conv(spec, shape)
            case L.ConvTranspose():
                return self.conv_transpose(spec, shape)
            case L.Embedding():
                return {"": nn.Embedding(spec.vocabulary, spec.dim)}, (*shape, spec.dim)
            case L.PositionEmbedding():
                need(len(shape) == 2, "it needs a sequence [T, D]")
                return {"": ours.PositionEmbedding(shape[0], channels)}, shape
            case L.LayerNorm():
                return {"": nn.LayerNorm(channels, spec.epsilon)}, shape
            case L.RMSNorm():
                return {"": nn.RMSNorm(channels, spec.epsilon)}, shape
            case L.GroupNorm():
                need(channels % spec.groups == 0, f"{spec.groups} groups do not divide {channels} channels")
                return {"": nn.GroupNorm(spec.groups, channels, spec.epsilon)}, shape
            case L.InstanceNorm():
                need(len(space) in (1, 2, 3), "it needs 1, 2 or 3 spatial axes")
                norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[len(space) - 1]
                return {"": norm(channels, spec.epsilon, affine=True)}, shape
            case L.Activation():
                return {"": ours.Activation(spec.function)}, shape
            case L.Dropout():
                return {"": nn.Dropout(spec.rate)}, shape
            case L.Pool():
                stride = spec.strides or spec.size
                need(len(space) == 2, "it needs an image [H, W, C]")
                need(min(space) >= spec.size, f"the window {spec.size} is larger than the image")
                pool = nn.MaxPool2d if spec.type == "max_pool" else nn.AvgPool2d
                return {"": pool(spec.size, stride)}, (*((n - spec.size) // stride + 1 for n in space), channels)
            case L.GlobalAvgPool():
                need(bool(space), "there is no axis to average over")
                return {"": ours.GlobalAvgPool()}, (channels,)
            case L.Flatten():
                return {"": nn.Flatten()}, (math.prod(shape),)
            case L.ToSequence():
                return {"": ours.ToSequence()}, (math.prod(space), channels)
            case L.SelfAttention():
                need(len(shape) == 2 and channels % spec.heads == 0, f"it needs a sequence [T, D] with D divisible by {spec.heads} heads")
                return {"": ours.SelfAttention(channels, spec.heads)}, shape
            case L.Residual():
                body, out = self.chain(spec.body, shape, where)
                shortcut, out2 = self.chain(spec.shortcut, shape, where)
                need(out == out2, f"body gives {out}, shortcut {out2}")
                twice = set(body) & set(shortcut)
                need(not twice or all("layout" in name for name in twice), f"names {sorted(twice)} are in body and shortcut")
                renamed = {("shortcut_" + k if k in twice else k): v for k, v in shortcut.items()}
                return {"": ours.Residual.named(body, renamed, spec.mode)}, out
        return self.bounded(spec, shape, 1 if first else -1)

    def bounded(self, spec: AnyLayer, shape: Shape, dim: int) -> tuple[dict[str, nn.Module], Shape]:
        """The same for the layers with a proven Lipschitz constant; ``dim`` is the axis of the channels."""
        *space, channels = shape
        match spec:
            case L.BoundedInput():
                return {"": ours.BoundedInput(spec.norm)}, shape
            case L.SpectralDense():
                units = outputs(spec, self.num_classes)
                return {"": ours.SpectralLinear(channels, units, spec.bias, **constraint(spec))}, (*space, units)
            case L.SpectralConv():
                return self.spectral_conv(spec, shape)
            case L.FrobeniusDense():
                units = outputs(spec, self.num_classes)
                settings: Any = {"norm": spec.norm, "disjoint_neurons": spec.disjoint_neurons, "max_bias_norm": spec.max_bias_norm}
                return {"": ours.FrobeniusLinear(channels, units, spec.bias, **settings)}, (*space, units)
            case L.BoundedBias():
                return {"": ours.BoundedBias(channels, max_norm=spec.max_norm, dim=dim)}, shape
            case L.GroupSort(type="full_sort"):
                return {"": ours.FullSort(dim)}, shape
            case L.GroupSort():
                need(channels % spec.size == 0, f"{channels} channels do not divide into groups of {spec.size}")
                return {"": ours.GroupSort(spec.size, dim)}, shape
            case L.Householder():
                need(channels % 2 == 0, f"it pairs channels, of which there are {channels}")
                return {"": ours.Householder(channels, dim)}, shape
            case L.LayerCentering():
                positions = tuple(range(2, 2 + len(space)) if dim == 1 else range(1, 1 + len(space)))
                return {"": ours.LayerCentering(positions or 1)}, shape
            case L.ScaledPool():
                need(len(space) == 2, "it needs an image [H, W, C]")
                need(min(space) >= spec.size, f"the window {spec.size} is larger than the image")
                pool: Any = ours.ScaledL2NormPool2d if spec.type == "scaled_l2_norm_pool" else ours.ScaledAvgPool2d
                return {"": pool(spec.size)}, (*(n // spec.size for n in space), channels)
            case L.ScaledGlobalPool():
                need(bool(space), "there is no axis to pool over")
                l2 = spec.type == "scaled_global_l2_norm_pool"
                return {"": ours.ScaledGlobalL2NormPool2d() if l2 else ours.ScaledGlobalAvgPool2d()}, (channels,)
            case L.Reshape():
                need(math.prod(spec.shape) == math.prod(shape), f"{spec.shape} has another number of entries")
                return {"": ours.Reshape(spec.shape)}, spec.shape
            case L.Permute():
                need(sorted(spec.dims) == list(range(1, len(shape) + 1)), f"dims {spec.dims} must hold each of 1 to {len(shape)} once")
                return {"": ours.Permute(spec.dims)}, tuple(shape[d - 1] for d in spec.dims)
            case L.Patches():
                need(len(space) == 2, "it needs an image [H, W, C]")
                need(not any(n % spec.size for n in space), f"patches of {spec.size} do not divide the image")
                count = math.prod(n // spec.size for n in space)
                return {"": ours.Patches(spec.size, channels_last=True)}, (count, spec.size**2 * channels)
            case L.LossGradientClip():
                return {"": ours.LossGradientClip(spec.norm)}, shape
        raise ConfigError(f"Layer type {spec.type!r} is not built by this backend.")

    @staticmethod
    def fused(module: nn.Module, activation: str) -> dict[str, nn.Module]:
        """A layer followed by its activation."""
        return {"": module} | ({} if activation == "linear" else {"_activation": ours.Activation(activation)})

    def conv(self, spec: L.Conv, shape: Shape) -> tuple[dict[str, nn.Module], Shape]:
        """A convolution, with padding of its own where torch's differs from TensorFlow's."""
        *space, channels = shape
        n = int(spec.type[4])
        need(len(space) == n, f"it needs {n} spatial axes")
        need(spec.padding != "causal" or n == 1, "causal padding exists for conv1d only")
        need(
            channels % spec.groups == 0 and spec.filters % spec.groups == 0,
            f"{spec.groups} groups do not divide {channels} or {spec.filters}",
        )
        k, r, d = (axes(value, n) for value in (spec.kernel_size, spec.strides, spec.dilation))
        reach = [dd * (kk - 1) + 1 for kk, dd in zip(k, d, strict=True)]
        pad = spec.padding if isinstance(spec.padding, int) else 0
        padded = spec.padding in ("same", "causal")
        out = [-(-s // rr) if padded else (s + 2 * pad - e) // rr + 1 for s, rr, e in zip(space, r, reach, strict=True)]
        need(min(out) > 0, f"the kernel reaches over {reach} positions, the input has {space}")
        symmetric = spec.padding == "same" and all(rr == 1 and (e - 1) % 2 == 0 for rr, e in zip(r, reach, strict=True))
        padding: Any = tuple((e - 1) // 2 for e in reach) if symmetric else pad
        made: dict[str, nn.Module] = {}
        if padded and not symmetric:
            made["_pad"] = ours.SamePad(k, r, d, causal=spec.padding == "causal")
        surplus = [(s - 1) % rr for s, rr in zip(space, r, strict=True)]
        if max(k) == 1 and not pad and any(surplus):
            # Rows that no window reaches: oneDNN's threads write out of bounds in the weight gradient of a strided 1x1 convolution on
            # channels-last arrays unless they are cut off (torch 2.13, TensorFlow 2.21).
            made["_crop"] = ours.Crop(surplus)
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
        module = layer(channels, spec.filters, k, r, padding, d, spec.groups, spec.bias)  # type: ignore[arg-type]
        return made | self.fused(module, spec.activation), (*out, spec.filters)

    def spectral_conv(self, spec: L.SpectralConv, shape: Shape) -> tuple[dict[str, nn.Module], Shape]:
        """A convolution with a certified operator norm."""
        *space, channels = shape
        n = int(spec.type.removesuffix("d")[-1])
        need(len(space) == n, f"it needs {n} spatial axes")
        k, r, d = (axes(value, n) for value in (spec.kernel_size, spec.strides, spec.dilation))
        reach = [dd * (kk - 1) + 1 for kk, dd in zip(k, d, strict=True)]
        out = [-(-s // rr) if spec.padding == "same" else (s - e) // rr + 1 for s, rr, e in zip(space, r, reach, strict=True)]
        need(min(out) > 0, f"the kernel reaches over {reach} positions, the input has {space}")
        layer: Any = (ours.SpectralConv1d, ours.SpectralConv2d)[n - 1]
        module = layer(channels, spec.filters, k, r, spec.padding, d, spec.bias, **constraint(spec))
        return {"": module}, (*out, spec.filters)

    def conv_transpose(self, spec: L.ConvTranspose, shape: Shape) -> tuple[dict[str, nn.Module], Shape]:
        """A transposed convolution; as in TensorFlow the output covers at least one stride per input position."""
        *space, channels = shape
        n = int(spec.type[4])
        need(len(space) == n, f"it needs {n} spatial axes")
        k, r = axes(spec.kernel_size, n), axes(spec.strides, n)
        extra = tuple(max(rr - kk, 0) for kk, rr in zip(k, r, strict=True))
        layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
        module = layer(channels, spec.filters, k, r, 0, extra, 1, spec.bias)  # type: ignore[arg-type]
        out = [(s - 1) * rr + kk + e for s, rr, kk, e in zip(space, r, k, extra, strict=True)]
        return self.fused(module, spec.activation), (*out, spec.filters)


def constraint(spec: L.Constrained) -> dict[str, Any]:
    """The arguments of a layer with a certified operator norm."""
    return {"lipschitz": spec.lipschitz, "orthogonal": spec.orthogonal, "max_bias_norm": spec.max_bias_norm}


def need(condition: bool, message: str) -> None:
    """Raise a ValueError that ``Builder.chain`` turns into a sentence with the layer's name."""
    if not condition:
        raise ValueError(message)


def build(specs: tuple[AnyLayer, ...], input_shape: Shape, num_classes: int) -> nn.Module:
    """The torch module of a list of layers.

    Args:
        specs: the layers.
        input_shape: shape of one example, channels last.
        num_classes: number of outputs.
    Returns:
        A module on channels-last inputs ``[B, ...]``. Its output must be one vector per example.
    Raises:
        ConfigError: a layer does not fit.
    """
    modules, out = Builder(num_classes).chain(specs, input_shape)
    if len(out) != 1:
        raise ConfigError(f"The model's output has shape {out} per example; end with flatten or global_avg_pool and a dense layer.")
    if out != (num_classes,):
        raise ConfigError(f"The model's output has {out[0]} units for {num_classes} outputs; write units: num_classes in the last layer.")
    model = nn.Sequential()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def weight_shapes(model: nn.Module) -> dict[str, Shape]:
    """Exchange name -> shape. Torch's names and layouts are the exchange format."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def get_weights(model: nn.Module) -> Weights:
    """All parameters in the exchange layout, and buffers under their own names."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: value.detach().cpu().numpy().copy() for name, value in state.items()}


def set_weights(model: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Copy weights into a model.

    Raises:
        RunError: names or shapes differ; the model is left as it was.
    """
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    check_weights(dict(weights), {name: tuple(value.shape) for name, value in state.items()})
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(torch.from_numpy(np.array(weights[name])))
