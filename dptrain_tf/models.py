"""Specification -> Keras model, and the exchange of weights. Arrays are channels-last at every border, as in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from dptrain import layer_specs as L
from dptrain.errors import ConfigError
from dptrain.layer_specs import AnyLayer, axes, named
from dptrain.models import Weights, check_weights, outputs
from dptrain_tf import layers as ours

Shape = tuple[int, ...]  # of one example, channels last
Transform = Callable[[np.ndarray], np.ndarray]
KL = keras.layers


class Builder:
    """Chains Keras layers on a symbolic tensor; names are dotted paths, equal to torch's.

    Args:
        num_classes: width that ``units: num_classes`` stands for.
        dtype: precision of weights and arithmetic.
    """

    def __init__(self, num_classes: int, dtype: str) -> None:
        self.num_classes, self.dtype = num_classes, dtype
        self.used: set[str] = set()

    def chain(self, specs: tuple[AnyLayer, ...], x: Any, where: str = "") -> Any:
        """Apply a list of layers.

        Args:
            specs: the layers.
            x: symbolic tensor, channels last.
            where: path of the parent with a trailing dot.
        Returns:
            The last output.
        Raises:
            ConfigError: a layer does not fit its input; names the layer.
        """
        for name, spec in named(specs, where):
            if name in self.used:
                raise ConfigError(f"Two layers are called {name!r}; give them different names.")
            self.used.add(name)
            shape = tuple(x.shape[1:])
            try:
                x = self.layer(spec, x, name)
            except (ValueError, IndexError, TypeError) as error:
                if isinstance(error, ConfigError):
                    raise
                reason = str(error).strip().splitlines()[0].rstrip(".")
                raise ConfigError(f"Layer {name!r} ({spec.type}) does not fit an input of shape {shape}: {reason}.") from None
        return x

    def layer(self, spec: AnyLayer, x: Any, name: str) -> Any:
        """Apply one layer."""
        *space, channels = x.shape[1:]
        common: dict[str, Any] = {"name": name, "dtype": self.dtype}
        match spec:
            case L.Dense():
                units = outputs(spec, self.num_classes)
                return KL.Dense(units, ours.activation(spec.activation), spec.bias, **common)(x)
            case L.Conv():
                return self.conv(spec, x, name)
            case L.ConvTranspose():
                n = int(spec.type[4])
                need(len(space) == n, f"it needs {n} spatial axes")
                layer = (KL.Conv1DTranspose, KL.Conv2DTranspose, KL.Conv3DTranspose)[n - 1]
                k, r = axes(spec.kernel_size, n), axes(spec.strides, n)
                return layer(spec.filters, k, r, "valid", activation=ours.activation(spec.activation), use_bias=spec.bias, **common)(x)
            case L.Embedding():
                return KL.Embedding(spec.vocabulary, spec.dim, **common)(x)
            case L.PositionEmbedding():
                need(len(space) == 1, "it needs a sequence [T, D]")
                return ours.PositionEmbedding(space[0], channels, **common)(x)
            case L.LayerNorm():
                return KL.LayerNormalization(epsilon=spec.epsilon, **common)(x)
            case L.RMSNorm():
                return KL.RMSNormalization(epsilon=spec.epsilon, **common)(x)
            case L.GroupNorm():
                need(channels % spec.groups == 0, f"{spec.groups} groups do not divide {channels} channels")
                return KL.GroupNormalization(spec.groups, epsilon=spec.epsilon, **common)(x)
            case L.InstanceNorm():
                need(len(space) in (1, 2, 3), "it needs 1, 2 or 3 spatial axes")
                return KL.GroupNormalization(-1, epsilon=spec.epsilon, **common)(x)
            case L.Activation():
                return KL.Activation(ours.activation(spec.function), **common)(x)
            case L.Dropout():
                return KL.Dropout(spec.rate, **common)(x)
            case L.Pool():
                need(len(space) == 2, "it needs an image [H, W, C]")
                need(min(space) >= spec.size, f"the window {spec.size} is larger than the image")
                pool = KL.MaxPooling2D if spec.type == "max_pool" else KL.AveragePooling2D
                return pool(spec.size, spec.strides or spec.size, "valid", **common)(x)
            case L.GlobalAvgPool():
                need(bool(space), "there is no axis to average over")
                pool = {1: KL.GlobalAveragePooling1D, 2: KL.GlobalAveragePooling2D, 3: KL.GlobalAveragePooling3D}[len(space)]
                return pool(**common)(x)
            case L.Flatten():
                return KL.Flatten(**common)(x)
            case L.ToSequence():
                return KL.Reshape((-1, channels), **common)(x)
            case L.SelfAttention():
                need(len(space) == 1 and channels % spec.heads == 0, f"it needs a sequence [T, D] with D divisible by {spec.heads} heads")
                return ours.SelfAttention(channels, spec.heads, **common)(x)
            case L.Residual():
                body, shortcut = self.chain(spec.body, x, name + "."), self.chain(spec.shortcut, x, name + ".")
                need(body.shape == shortcut.shape, f"body gives {tuple(body.shape[1:])}, shortcut {tuple(shortcut.shape[1:])}")
                return (KL.Average if spec.mode == "convex" else KL.Add)(**common)([body, shortcut])
            case L.BoundedInput():
                return ours.BoundedInput(spec.norm, **common)(x)
            case L.SpectralDense():
                units = outputs(spec, self.num_classes)
                return ours.SpectralDense(units, spec.bias, spec.lipschitz, spec.orthogonal, spec.max_bias_norm, **common)(x)
            case L.SpectralConv():
                return self.spectral_conv(spec, x, name)
            case L.FrobeniusDense():
                units = outputs(spec, self.num_classes)
                return ours.FrobeniusDense(units, spec.bias, spec.norm, spec.disjoint_neurons, spec.max_bias_norm, **common)(x)
            case L.BoundedBias():
                return ours.BoundedBias(spec.max_norm, **common)(x)
            case L.GroupSort():
                return (ours.FullSort(**common) if spec.type == "full_sort" else ours.GroupSort(spec.size, **common))(x)
            case L.Householder():
                return ours.Householder(**common)(x)
            case L.LayerCentering():
                return ours.LayerCentering(**common)(x)
            case L.ScaledPool():
                need(len(space) == 2, "it needs an image [H, W, C]")
                need(min(space) >= spec.size, f"the window {spec.size} is larger than the image")
                return (ours.ScaledL2NormPool2d if spec.type == "scaled_l2_norm_pool" else ours.ScaledAvgPool2d)(spec.size, **common)(x)
            case L.ScaledGlobalPool():
                need(bool(space), "there is no axis to pool over")
                scaled = ours.ScaledGlobalL2NormPool2d if spec.type == "scaled_global_l2_norm_pool" else ours.ScaledGlobalAvgPool2d
                return scaled(**common)(x)
            case L.Reshape():
                return KL.Reshape(spec.shape, **common)(x)
            case L.Permute():
                need(sorted(spec.dims) == list(range(1, len(x.shape))), f"dims {spec.dims} do not name each of its axes once")
                return KL.Permute(spec.dims, **common)(x)
            case L.Patches():
                need(len(space) == 2, "it needs an image [H, W, C]")
                need(all(n % spec.size == 0 for n in space), f"patches of {spec.size} do not tile it")
                return ours.Patches(spec.size, **common)(x)
            case L.LossGradientClip():
                return ours.LossGradientClip(spec.norm, **common)(x)
        raise ConfigError(f"Layer type {spec.type!r} is not built by this backend.")

    def conv(self, spec: L.Conv, x: Any, name: str) -> Any:
        """A convolution; an integer padding becomes a layer of its own."""
        *space, channels = x.shape[1:]
        n = int(spec.type[4])
        need(len(space) == n, f"it needs {n} spatial axes")
        need(spec.padding != "causal" or n == 1, "causal padding exists for conv1d only")
        need(
            channels % spec.groups == 0 and spec.filters % spec.groups == 0,
            f"{spec.groups} groups do not divide {channels} or {spec.filters}",
        )
        k, r, d = (axes(value, n) for value in (spec.kernel_size, spec.strides, spec.dilation))
        padding = spec.padding
        if isinstance(padding, int):
            pad = (KL.ZeroPadding1D, KL.ZeroPadding2D, KL.ZeroPadding3D)[n - 1]
            x = pad(padding, name=name + "_pad", dtype=self.dtype)(x) if padding else x
            padding = "valid"
        surplus = [(s - 1) % rr for s, rr in zip(space, r, strict=True)]
        if max(k) == 1 and any(surplus):
            # Rows that no window reaches: TensorFlow 2.21 on CPU reads out of bounds in the filter gradient unless they are cut off.
            crop = (KL.Cropping1D, KL.Cropping2D, KL.Cropping3D)[n - 1]
            ends = [(0, s) for s in surplus]
            x = crop(ends[0] if n == 1 else ends, name=name + "_crop", dtype=self.dtype)(x)
        reach = [dd * (kk - 1) + 1 for kk, dd in zip(k, d, strict=True)]
        need(
            padding != "valid" or all(s >= e for s, e in zip(x.shape[1:-1], reach, strict=True)),
            f"the kernel reaches over {reach} positions, the input has {space}",
        )
        layer = (KL.Conv1D, KL.Conv2D, KL.Conv3D)[n - 1]
        return layer(
            spec.filters, k, r, padding, dilation_rate=d, groups=spec.groups, activation=ours.activation(spec.activation),
            use_bias=spec.bias, name=name, dtype=self.dtype,
        )(x)  # fmt: skip

    def spectral_conv(self, spec: L.SpectralConv, x: Any, name: str) -> Any:
        """A convolution with a certified norm."""
        *space, _ = x.shape[1:]
        n = int(spec.type[-2])
        need(len(space) == n, f"it needs {n} spatial axes")
        k, r, d = (axes(value, n) for value in (spec.kernel_size, spec.strides, spec.dilation))
        reach = [dd * (kk - 1) + 1 for kk, dd in zip(k, d, strict=True)]
        need(
            spec.padding == "same" or all(s >= e for s, e in zip(space, reach, strict=True)),
            f"the kernel reaches over {reach} positions, the input has {space}",
        )
        layer = (ours.SpectralConv1D, ours.SpectralConv2D)[n - 1]
        return layer(
            spec.filters, k, r, spec.padding, d, spec.bias, spec.lipschitz, spec.orthogonal, spec.max_bias_norm,
            name=name, dtype=self.dtype,
        )(x)  # fmt: skip


def need(condition: bool, message: str) -> None:
    """Raise a ValueError that ``Builder.chain`` turns into a sentence with the layer's name."""
    if not condition:
        raise ValueError(message)


def build(specs: tuple[AnyLayer, ...], input_shape: Shape, num_classes: int, dtype: str = "float32") -> Any:
    """The Keras model of a list of layers.

    Args:
        specs: the layers.
        input_shape: shape of one example, channels last.
        num_classes: number of outputs.
        dtype: precision of weights and arithmetic.
    Returns:
        A functional model on inputs ``[B, ...]``. Its output must be one vector per example.
    Raises:
        ConfigError: a layer does not fit.
    """
    tokens = bool(specs) and isinstance(specs[0], L.Embedding)
    x = keras.Input(input_shape, dtype="int64" if tokens else dtype)
    y = Builder(num_classes, dtype).chain(specs, x)
    if len(y.shape) != 2:
        raise ConfigError(
            f"The model's output has shape {tuple(y.shape[1:])} per example; end with flatten or global_avg_pool and a dense layer."
        )
    if y.shape[1] != num_classes:
        raise ConfigError(
            f"The model's output has {y.shape[1]} units for {num_classes} outputs; write units: num_classes in the last layer."
        )
    return keras.Model(x, y, name="model")


def leaves(layer: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The layers that own variables, with dotted paths."""
    if layer._trainable_variables or layer._non_trainable_variables:
        yield path, layer
    for child in layer._layers:
        yield from leaves(child, f"{path}.{child.name}" if path else child.name)


def same(array: np.ndarray) -> np.ndarray:
    """No change of layout."""
    return array


def layout(layer: Any, role: str) -> tuple[str, Transform, Transform]:
    """Exchange name of a variable, and its transforms to and from the exchange layout, which is torch's."""
    if role == "kernel" and isinstance(layer, KL.Dense):
        return "weight", np.transpose, np.transpose
    if role == "kernel":  # convolutions: kernel axes first, the two channel axes last; torch has them first, swapped
        return "weight", lambda a: np.moveaxis(a, (-2, -1), (1, 0)), lambda a: np.moveaxis(a, (1, 0), (-2, -1))
    return {"embeddings": "weight", "gamma": "weight", "scale": "weight", "beta": "bias"}.get(role, role), same, same


def exchange(model: Any) -> dict[str, tuple[Any, Transform, Transform]]:
    """Exchange name -> variable, transform to the exchange layout, transform back."""
    found = {}
    for path, layer in leaves(model):
        for variable in (*layer._trainable_variables, *layer._non_trainable_variables):
            if "seed_generator" in variable.path:
                continue
            name, forth, back = layout(layer, variable.name)
            found[f"{path}.{name}"] = (variable, forth, back)
    return found


def weight_shapes(model: Any) -> dict[str, Shape]:
    """Exchange name -> shape. Torch's names and layouts are the exchange format."""
    return {name: tuple(forth(np.empty(tuple(v.shape))).shape) for name, (v, forth, _) in exchange(model).items()}


def get_weights(model: Any) -> Weights:
    """All weights in the exchange layout."""
    return {name: np.ascontiguousarray(forth(v.value.numpy())) for name, (v, forth, _) in exchange(model).items()}


def set_weights(model: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Copy weights into a model.

    Raises:
        RunError: names or shapes differ; the model is left as it was.
    """
    check_weights(dict(weights), weight_shapes(model))
    for name, (variable, _, back) in exchange(model).items():
        variable.assign(back(np.asarray(weights[name])))
