"""Keras layers with a proven bound: the kind and the constants of their nodes, and what to use in place of layers without one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import layers as L
from keras.src.ops import nn as nn_ops
from keras.src.ops import numpy as np_ops
from tensorflow import Tensor

from dptrain_tf import layers as ours
from dptrain_tf.rules import inherits

Attrs = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What is known of a layer class.

    Args:
        kind: of its node.
        attrs: ``(layer, input, output) -> constants of the node``; it may return a kind of its own under ``kind``.
        params: role -> attribute that holds the variable, or None.
        problem: ``(layer) -> sentence or None``: settings without a bound.
    """

    kind: str
    attrs: Callable[[Any, Tensor, Tensor], Attrs] = lambda layer, x, z: {}
    params: Mapping[str, str] = field(default_factory=dict)
    problem: Callable[[Any], str | None] = lambda layer: None


# --- constants of the rows ------------------------------------------------------------------------------------------------


def positions(z: Tensor) -> int:
    """Numbers of one channel of one example."""
    return math.prod(z.shape[1:-1])


def linear_attrs(layer: Any, x: Tensor, z: Tensor) -> Attrs:
    if isinstance(layer, ours.FrobeniusDense):
        constraint, radius = "rows" if layer.disjoint_neurons else "frobenius", layer.norm
    else:
        constraint, radius = "orthogonal" if layer.orthogonal else "spectral", layer.lipschitz
    sizes = {"positions": positions(z), "fan_in": int(x.shape[-1]), "fan_out": int(z.shape[-1])}
    return {**sizes, "constraint": constraint, "radius": float(radius), "bias_radius": float(layer.max_bias_norm)}


def conv_attrs(layer: Any, x: Tensor, z: Tensor) -> Attrs:
    windows = {"kernel": tuple(layer.kernel_size), "strides": tuple(layer.strides), "dilation": tuple(layer.dilation_rate)}
    return {
        "positions": positions(z), **windows, "space": tuple(x.shape[1:-1]), "fan_out": int(z.shape[-1]),
        "constraint": "orthogonal" if layer.orthogonal else "spectral", "radius": float(layer.lipschitz),
        "bias_radius": float(layer.max_bias_norm),
    }  # fmt: skip


def pool_attrs(layer: Any, x: Tensor, z: Tensor) -> Attrs:
    return {"kernel": tuple(layer.pool_size), "strides": tuple(layer.strides)}


def affine_problem(layer: Any) -> str | None:
    """Settings that change what an affine layer computes."""
    if layer.activation not in (None, keras.activations.linear):
        return "has an activation of its own; add the activation as a layer"
    if layer.kernel_constraint is not None or layer.bias_constraint is not None:
        return "has a Keras constraint beside its own; remove it"
    if getattr(layer, "lora_enabled", False):
        return "has LoRA weights; merge them first"
    if layer.kernel_regularizer is not None or layer.bias_regularizer is not None:
        return "has a weight regularizer, which is no per-example loss; remove it and set weight_decay in the optimizer"
    return None


def pool_problem(layer: Any) -> str | None:
    if layer.padding != "valid":
        return f"pads its windows with {layer.padding!r}; use padding='valid'"
    return None if layer.data_format == "channels_last" else "has its channels first; use channels_last"


def last_problem(layer: Any) -> str | None:
    return None if layer.data_format == "channels_last" else "has its channels first; use channels_last"


FUNCTIONS: Mapping[Any, tuple[str, Attrs]] = {
    keras.activations.linear: ("identity", {}),
    keras.activations.relu: ("relu", {}),
    keras.activations.tanh: ("tanh", {}),
    keras.activations.sigmoid: ("sigmoid", {}),
    keras.activations.softplus: ("softplus", {}),
    keras.activations.elu: ("elu", {}),
    keras.activations.gelu: ("gelu", {}),
    keras.activations.silu: ("silu", {}),
    keras.activations.leaky_relu: ("leaky_relu", {"slope": 0.2}),
    ours.exact_gelu: ("gelu", {}),
    ours.absolute: ("abs", {}),
}


def function_attrs(layer: Any, x: Tensor, z: Tensor) -> Attrs:
    kind, attrs = FUNCTIONS[layer.activation]
    return {"kind": kind, **attrs}


def function_problem(layer: Any) -> str | None:
    if layer.activation is keras.activations.softmax:
        return "is a softmax, and the loss takes logits; remove it"
    if layer.activation not in FUNCTIONS:
        name = getattr(layer.activation, "__name__", "its function")
        return f"({name}) has no proven bound; use relu, tanh, sigmoid, softplus, elu, gelu, silu or GroupSort"
    return None


def relu_attrs(layer: Any, x: Tensor, z: Tensor) -> Attrs:
    slope = float(layer.negative_slope)
    return {"kind": "leaky_relu", "slope": slope} if slope else {}


def relu_problem(layer: Any) -> str | None:
    return "has a threshold or a largest value; use a plain ReLU" if layer.threshold or layer.max_value is not None else None


def rescale_problem(layer: Any) -> str | None:
    plain = isinstance(layer.scale, int | float) and isinstance(layer.offset, int | float) and layer.offset == 0
    return None if plain and math.isfinite(layer.scale) else "is no multiplication by one number; use Rescaling with offset=0"


_WEIGHTS = {"weight": "_kernel", "bias": "bias"}
_LINEAR = Row("linear", linear_attrs, _WEIGHTS, affine_problem)
_CONV = Row("conv", conv_attrs, _WEIGHTS, affine_problem)
_MAX = Row("max_pool", pool_attrs, problem=pool_problem)
_AVG = Row("avg_pool", lambda layer, x, z: {**pool_attrs(layer, x, z), "scaled": False}, problem=pool_problem)
_MEAN = Row("global_avg_pool", lambda layer, x, z: {"positions": positions(x), "scaled": False}, problem=last_problem)
_PAD, _CROP = Row("pad"), Row("crop")
ROWS: Mapping[type, Row] = {
    ours.BoundedInput: Row("bounded_input", lambda layer, x, z: {"norm": float(layer.norm)}),
    ours.SpectralDense: _LINEAR,
    ours.FrobeniusDense: _LINEAR,
    ours.SpectralConv1D: _CONV,
    ours.SpectralConv2D: _CONV,
    ours.BoundedBias: Row("bias", lambda layer, x, z: {"positions": positions(z), "radius": float(layer.max_norm)}, {"bias": "bias"}),
    ours.Householder: Row("householder", params={"theta": "theta"}),
    ours.GroupSort: Row("group_sort"),
    ours.FullSort: Row("full_sort"),
    ours.Abs: Row("abs"),
    ours.LayerCentering: Row("centering"),
    ours.Patches: Row("patches"),
    ours.LossGradientClip: Row("loss_gradient_clip", lambda layer, x, z: {"norm": float(layer.norm)}),
    ours.ScaledL2NormPool2d: Row("l2_norm_pool", lambda layer, x, z: {**pool_attrs(layer, x, z), "epsilon": float(layer.eps)}),
    ours.ScaledAvgPool2d: Row("avg_pool", lambda layer, x, z: {**pool_attrs(layer, x, z), "scaled": True}),
    ours.ScaledGlobalL2NormPool2d: Row("global_l2_norm_pool", lambda layer, x, z: {"positions": positions(x), "epsilon": float(layer.eps)}),
    ours.ScaledGlobalAvgPool2d: Row("global_avg_pool", lambda layer, x, z: {"positions": positions(x), "scaled": True}),
    L.Activation: Row("identity", function_attrs, problem=function_problem),
    L.ReLU: Row("relu", relu_attrs, problem=relu_problem),
    L.LeakyReLU: Row("leaky_relu", lambda layer, x, z: {"slope": float(layer.negative_slope)}),
    L.ELU: Row("elu", problem=lambda layer: None if layer.alpha == 1 else "has an alpha other than 1; use alpha=1"),
    L.Identity: Row("identity"),
    L.Flatten: Row("flatten"),
    L.Reshape: Row("reshape"),
    L.Permute: Row("permute"),
    L.Dropout: Row("dropout", lambda layer, x, z: {"rate": float(layer.rate)}),
    L.Rescaling: Row("scale", lambda layer, x, z: {"factor": float(layer.scale)}, problem=rescale_problem),
    **dict.fromkeys((L.MaxPooling1D, L.MaxPooling2D, L.MaxPooling3D), _MAX),
    **dict.fromkeys((L.AveragePooling1D, L.AveragePooling2D, L.AveragePooling3D), _AVG),
    **dict.fromkeys((L.GlobalAveragePooling1D, L.GlobalAveragePooling2D, L.GlobalAveragePooling3D), _MEAN),
    **dict.fromkeys((L.ZeroPadding1D, L.ZeroPadding2D, L.ZeroPadding3D), _PAD),
    **dict.fromkeys((L.Cropping1D, L.Cropping2D, L.Cropping3D), _CROP),
}
# The nearest layer with a bound, by class; the first row that fits.
REMEDIES: tuple[tuple[tuple[type, ...], str], ...] = (
    ((L.Dense, L.EinsumDense), "has no proven bound, since its weight is not constrained; use SpectralDense"),
    ((L.Conv1D, L.SeparableConv1D, L.DepthwiseConv1D, L.Conv1DTranspose), "has no proven bound; use SpectralConv1D"),
    ((L.Conv2D, L.SeparableConv2D, L.DepthwiseConv2D, L.Conv2DTranspose), "has no proven bound; use SpectralConv2D"),
    ((L.Conv3D, L.Conv3DTranspose), "has no proven bound; use SpectralConv2D on slices"),
    (
        (L.BatchNormalization, L.LayerNormalization, L.GroupNormalization, L.RMSNormalization, L.UnitNormalization),
        "divides by a statistic, which has no Lipschitz constant; use LayerCentering",
    ),
    ((L.Softmax,), "is a softmax, and the loss takes logits; remove it"),
    ((L.GlobalMaxPooling1D, L.GlobalMaxPooling2D, L.GlobalMaxPooling3D), "has no proven bound; use ScaledGlobalL2NormPool2d"),
    ((L.PReLU,), "has slopes without a bound; use GroupSort or Householder"),
    ((L.Embedding,), "has no proven bound; use a strategy that clips, such as mixed_ghost"),
    ((L.RNN, L.MultiHeadAttention, L.GroupQueryAttention, ours.SelfAttention), "has no proven bound; use a MixerBlock"),
    ((L.TimeDistributed,), "has no proven bound; call SpectralDense directly, it maps the last axis"),
    ((L.Multiply, L.Dot), "multiplies two inputs, which has no Lipschitz constant; use Add or Concatenate"),
    ((L.Wrapper,), "has no proven bound; call the layer inside it directly"),
)


def row_for(layer: Any) -> Row | None:
    """The row of a layer's class; a subclass counts only if it inherits everything that ``call`` runs unchanged."""
    cls = next((c for c in type(layer).__mro__ if c in ROWS), None)
    return ROWS[cls] if cls is not None and inherits(layer, cls) else None


def refusal(layer: Any) -> str:
    """Why a layer without a row cannot be bounded, and what to use instead."""
    base = next((c for c in type(layer).__mro__ if c in ROWS), None)
    if base is not None:
        return f"overrides parts of {base.__name__}; use {base.__name__} itself"
    if isinstance(layer, keras.Model):
        return "is a subclassed model, whose operations cannot be listed; write it as a Sequential or functional model"
    for classes, sentence in REMEDIES:
        if isinstance(layer, classes):
            return sentence
    return "has no proven bound; build it from the layers that dptrain_tf exports"


# --- several inputs, functions ---------------------------------------------------------------------------------------------

MERGES: Mapping[type, Any] = {
    L.Add: lambda n: (1.0,) * n,
    L.Average: lambda n: (1.0 / n,) * n,
    L.Subtract: lambda n: (1.0, -1.0),
    L.Concatenate: None,
}
SUMS: Mapping[type, tuple[float, ...]] = {np_ops.Add: (1.0, 1.0), np_ops.Subtract: (1.0, -1.0)}
SIMPLE: Mapping[type, str] = {
    np_ops.Absolute: "abs", np_ops.Abs: "abs", np_ops.Tanh: "tanh", nn_ops.Relu: "relu", nn_ops.Sigmoid: "sigmoid",
}  # fmt: skip
DIVISIONS = (np_ops.TrueDivide, np_ops.Divide)
