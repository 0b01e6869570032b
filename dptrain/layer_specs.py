"""The layer vocabulary of model specifications: what can be built in both frameworks from the same config.

Arrays are channels-last everywhere, in both frameworks: images ``[B, H, W, C]``, sequences ``[B, T, D]``, tokens ``[B, T]``. Defaults that
differ between torch and Keras are written out (epsilons, padding), because a default is where parity breaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

PositiveInt = Annotated[int, Field(gt=0, lt=2**31, strict=True)]
Rate = Annotated[float, Field(ge=0, lt=1, strict=True)]
Epsilon = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Sizes = PositiveInt | tuple[PositiveInt, ...]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
ActivationName = Literal["linear", "relu", "tanh", "gelu", "sigmoid", "silu", "elu", "softplus", "abs"]
Padding = Literal["same", "valid", "causal"] | Annotated[int, Field(ge=0, lt=2**31, strict=True)]


class LayerSpec(BaseModel):
    """Base of the vocabulary. ``name`` is unique among its siblings; left out, it is derived from type and position."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]*$")] = ""


class Dense(LayerSpec):
    """Affine map of the last axis, with an optional fused activation."""

    type: Literal["dense"] = "dense"
    units: PositiveInt | Literal["num_classes"]
    activation: ActivationName = "linear"
    bias: StrictBool = True


class Conv(LayerSpec):
    """Convolution over 1, 2 or 3 spatial axes. ``same`` pads as TensorFlow does; an integer pads both sides of every axis by it."""

    type: Literal["conv1d", "conv2d", "conv3d"]
    filters: PositiveInt
    kernel_size: Sizes
    strides: Sizes = 1
    padding: Padding = "same"
    dilation: Sizes = 1
    groups: PositiveInt = 1
    activation: ActivationName = "linear"
    bias: StrictBool = True


class ConvTranspose(LayerSpec):
    """Transposed convolution with ``valid`` padding."""

    type: Literal["conv1d_transpose", "conv2d_transpose", "conv3d_transpose"]
    filters: PositiveInt
    kernel_size: Sizes
    strides: Sizes = 1
    activation: ActivationName = "linear"
    bias: StrictBool = True


class Embedding(LayerSpec):
    """Token ids to vectors."""

    type: Literal["embedding"] = "embedding"
    vocabulary: PositiveInt
    dim: PositiveInt


class PositionEmbedding(LayerSpec):
    """Adds a learned vector to each position of a sequence ``[B, T, D]``."""

    type: Literal["position_embedding"] = "position_embedding"


class LayerNorm(LayerSpec):
    """Normalisation of the last axis."""

    type: Literal["layer_norm"] = "layer_norm"
    epsilon: Epsilon = 1e-5


class GroupNorm(LayerSpec):
    """Normalisation of groups of channels over all positions of one example."""

    type: Literal["group_norm"] = "group_norm"
    groups: PositiveInt = 8
    epsilon: Epsilon = 1e-5


class InstanceNorm(LayerSpec):
    """Normalisation of each channel over all positions of one example, with scale and offset and no running statistics."""

    type: Literal["instance_norm"] = "instance_norm"
    epsilon: Epsilon = 1e-5


class RMSNorm(LayerSpec):
    """Division of the last axis by its root mean square."""

    type: Literal["rms_norm"] = "rms_norm"
    epsilon: Epsilon = 1e-6


class Activation(LayerSpec):
    """An elementwise function."""

    type: Literal["activation"] = "activation"
    function: ActivationName


class Pool(LayerSpec):
    """Max or average pooling of an image, windows that fit only."""

    type: Literal["max_pool", "avg_pool"]
    size: PositiveInt = 2
    strides: PositiveInt | None = None


class GlobalAvgPool(LayerSpec):
    """Mean over all axes but the first and the last."""

    type: Literal["global_avg_pool"] = "global_avg_pool"


class Flatten(LayerSpec):
    """All axes but the first into one, channels last."""

    type: Literal["flatten"] = "flatten"


class ToSequence(LayerSpec):
    """An image ``[B, H, W, C]`` as a sequence ``[B, H W, C]``."""

    type: Literal["to_sequence"] = "to_sequence"


class Dropout(LayerSpec):
    """Dropout."""

    type: Literal["dropout"] = "dropout"
    rate: Rate


class SelfAttention(LayerSpec):
    """Multi-head self-attention over a sequence, with separate query, key, value and output maps."""

    type: Literal["self_attention"] = "self_attention"
    heads: PositiveInt


class Residual(LayerSpec):
    """``body(x) + shortcut(x)``, or half of it with ``mode: convex``; an empty shortcut is the identity."""

    type: Literal["residual"] = "residual"
    body: tuple[AnyLayer, ...]
    shortcut: tuple[AnyLayer, ...] = ()
    mode: Literal["add", "convex"] = "add"


# --- layers with a proven Lipschitz constant, for the strategy ``clipless`` -------------------------------------------------


class BoundedInput(LayerSpec):
    """Scales an example whose L2 norm exceeds ``norm`` down to it; an example that is not finite becomes zero."""

    type: Literal["bounded_input"] = "bounded_input"
    norm: Positive


class Constrained(LayerSpec):
    """What layers with a constrained weight share.

    Args:
        lipschitz: largest operator norm of the weight.
        orthogonal: bring all singular values near ``lipschitz`` (Bjorck), in place of scaling the largest down.
        bias: with a bias.
        max_bias_norm: largest L2 norm of the bias.
    """

    lipschitz: Positive = 1.0
    orthogonal: StrictBool = True
    bias: StrictBool = True
    max_bias_norm: Positive = 1.0


class SpectralDense(Constrained):
    """Affine map of the last axis with a certified operator norm."""

    type: Literal["spectral_dense"] = "spectral_dense"
    units: PositiveInt | Literal["num_classes"]


class SpectralConv(Constrained):
    """Zero-padded convolution with a certified operator norm."""

    type: Literal["spectral_conv1d", "spectral_conv2d"]
    filters: PositiveInt
    kernel_size: Sizes
    strides: Sizes = 1
    padding: Literal["same", "valid"] = "same"
    dilation: Sizes = 1


class FrobeniusDense(LayerSpec):
    """Affine map of the last axis; the Frobenius norm of the weight, or of each output's row, is at most ``norm``."""

    type: Literal["frobenius_dense"] = "frobenius_dense"
    units: PositiveInt | Literal["num_classes"]
    norm: Positive = 1.0
    disjoint_neurons: StrictBool = False
    bias: StrictBool = True
    max_bias_norm: Positive = 1.0


class BoundedBias(LayerSpec):
    """Adds ``b / sqrt(T)`` to each of T positions, ``|b| <= max_norm``: its sensitivity does not grow with T."""

    type: Literal["bounded_bias"] = "bounded_bias"
    max_norm: Positive = 1.0


class GroupSort(LayerSpec):
    """Sorts the channels in groups of ``size``; ``full_sort`` sorts all of them."""

    type: Literal["group_sort", "full_sort"] = "group_sort"
    size: Annotated[int, Field(gt=1, lt=2**31, strict=True)] = 2


class Householder(LayerSpec):
    """Reflects pairs of channels at a trained angle, where they lie on one side of its line."""

    type: Literal["householder"] = "householder"


class LayerCentering(LayerSpec):
    """Subtracts the mean over the positions of each channel of one example; over the channels where there are no positions."""

    type: Literal["layer_centering"] = "layer_centering"


class ScaledPool(LayerSpec):
    """Pooling over disjoint windows that keeps gradient norms: ``sqrt(sum x^2 + eps)``, or the mean times ``sqrt(window)``."""

    type: Literal["scaled_l2_norm_pool", "scaled_avg_pool"]
    size: PositiveInt = 2


class ScaledGlobalPool(LayerSpec):
    """The same over all positions."""

    type: Literal["scaled_global_l2_norm_pool", "scaled_global_avg_pool"]


class Reshape(LayerSpec):
    """Another shape of the same numbers, channels last."""

    type: Literal["reshape"] = "reshape"
    shape: tuple[PositiveInt, ...]


class Permute(LayerSpec):
    """Another order of the axes of one example, counted from 1, as Keras does."""

    type: Literal["permute"] = "permute"
    dims: tuple[PositiveInt, ...]


class Patches(LayerSpec):
    """An image ``[B, H, W, C]`` as a sequence of flattened disjoint patches ``[B, H/s W/s, s s C]``."""

    type: Literal["patches"] = "patches"
    size: PositiveInt


class LossGradientClip(LayerSpec):
    """The identity, whose cotangent is scaled down to L2 norm ``norm`` per example."""

    type: Literal["loss_gradient_clip"] = "loss_gradient_clip"
    norm: Positive


AnyLayer = Annotated[
    Dense | Conv | ConvTranspose | Embedding | PositionEmbedding | LayerNorm | GroupNorm | InstanceNorm | RMSNorm | Activation
    | Pool | GlobalAvgPool | Flatten | ToSequence | Dropout | SelfAttention | Residual
    | BoundedInput | SpectralDense | SpectralConv | FrobeniusDense | BoundedBias | GroupSort | Householder | LayerCentering
    | ScaledPool | ScaledGlobalPool | Reshape | Permute | Patches | LossGradientClip,
    Field(discriminator="type"),
]  # fmt: skip
Residual.model_rebuild()


def named(layers: tuple[AnyLayer, ...], prefix: str = "") -> Iterator[tuple[str, AnyLayer]]:
    """Each layer with its dotted path.

    Args:
        layers: siblings.
        prefix: path of their parent with a trailing dot, or empty.
    Yields:
        ``(path, layer)``; a layer without a name is called after its type and position.
    """
    for index, layer in enumerate(layers):
        yield prefix + (layer.name or f"{layer.type}_{index}"), layer


def axes(sizes: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """A size per axis.

    Args:
        sizes: one size for all, or one per axis.
        count: spatial axes.
    Returns:
        ``count`` sizes.
    """
    return (sizes,) * count if isinstance(sizes, int) else tuple(sizes)
