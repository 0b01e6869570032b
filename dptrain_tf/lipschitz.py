"""Keras layers whose effect on norms is proven in ``dptrain/bounds.py``: what a network is built from for the strategy ``clipless``.

Channels are last. Weights are plain: nothing is normalised in the forward pass, so a gradient is that of the very weight whose norm
is certified (pitfalls.md L5); ``dptrain/projection.py`` restores the constraints after each update. Every Jacobian is non-expansive at ties
and at zero too: where two entries are equal a sort selects one order for both of its outputs, while the gradients of ``tf.minimum`` and
``tf.maximum`` would both go to the same entry, which has norm sqrt(2). No layer mixes examples or keeps a state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor

from dptrain.errors import ConfigError
from dptrain_tf.own import KL, Layer, Settings, need, positive, registered
from dptrain_tf.pooling import (
    LayerCentering,
    Patches,
    ScaledAvgPool2d,
    ScaledGlobalAvgPool2d,
    ScaledGlobalL2NormPool2d,
    ScaledL2NormPool2d,
)

# Rounding of a projection onto a ball, by type: the result must not leave it.
MARGINS = {"float16": 2e-3, "bfloat16": 2e-2}
# Groups up to this size are sorted by compare-and-exchange, several times faster than ``tf.sort``.
NETWORK = 5


def into_ball(x: Tensor, norm: float) -> Tensor:
    """Projection of each example onto the L2 ball around zero.

    Args:
        x: ``[B, ...]``.
        norm: radius.
    Returns:
        The same shape; an example that is not finite is zero.
    Guarantee: no example is longer than ``norm``, whatever it holds. The map is 1-Lipschitz on finite examples, its gradient finite there.
    """
    axes = list(range(1, x.shape.rank))
    finite = tf.reduce_all(tf.math.is_finite(x), axis=axes, keepdims=True)
    x = tf.where(finite, x, tf.zeros_like(x))
    exact = tf.cast(x, tf.float64)
    largest = tf.stop_gradient(tf.reduce_max(tf.abs(exact), axis=axes, keepdims=True))
    unit = exact / tf.where(largest > 1e-300, largest, tf.ones_like(largest))  # entries at most 1: the squares cannot overflow
    square = tf.reduce_sum(unit * unit, axis=axes, keepdims=True)
    length = tf.sqrt(tf.where(square > 0, square, tf.ones_like(square)))
    limit = min(norm, 1e300) * (1.0 - MARGINS.get(x.dtype.name, 1e-6))
    return tf.where(largest * length > limit, tf.cast(unit * (limit / length), x.dtype), x)


# --- bounds of examples and cotangents ------------------------------------------------------------------------------------


@registered
class BoundedInput(Layer):
    """Scales an example whose L2 norm exceeds ``norm`` down to it; an example that is not finite becomes zero.

    Args:
        norm: largest L2 norm of one example.
    """

    settings = ("norm",)

    def __init__(self, norm: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        positive(self, norm=norm)
        self.norm = norm

    def call(self, x: Any) -> Any:
        """Project each example onto the ball."""
        return into_ball(tf.cast(x, self.compute_dtype), self.norm)


@registered
class LossGradientClip(Layer):
    """The identity, whose cotangent is scaled down to L2 norm ``norm`` per example; one that is not finite becomes zero.

    Args:
        norm: largest L2 norm of one example's cotangent, in units of ONE example's loss: steps sum losses and never take their mean
            (pitfalls.md L10).
    """

    settings = ("norm",)

    def __init__(self, norm: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        positive(self, norm=1.0 if norm == math.inf else norm)
        self.norm = norm

    def call(self, x: Any) -> Any:
        """Hand on the input."""

        @tf.custom_gradient
        def clip(x: Tensor) -> Any:
            return tf.identity(x), lambda cotangent: into_ball(cotangent, self.norm)

        return clip(x)


# --- affine maps ----------------------------------------------------------------------------------------------------------


def plain(layer: type, kwargs: dict[str, Any], **fixed: Any) -> dict[str, Any]:
    """Keyword arguments of a Keras layer without those whose value is fixed here.

    Raises:
        ConfigError: a fixed one has another value; it would change the bound unnoticed (pitfalls.md L11).
    """
    activation = kwargs.pop("activation", None)
    if keras.activations.get(activation) is not keras.activations.linear:
        raise ConfigError(
            f"{layer.__name__} takes no activation, since its bound is that of the affine map; add the activation as a layer."
        )
    for name, value in fixed.items():
        if kwargs.pop(name, value) not in (value, None):
            raise ConfigError(f"{layer.__name__} has {name}={value!r} only; remove the argument.")
    return kwargs


@registered
class SpectralDense(Settings, KL.Dense):
    """Affine map of the last axis whose weight has a certified operator norm.

    Args:
        units: outputs.
        use_bias: with a bias.
        lipschitz: largest operator norm of the weight.
        orthogonal: bring all singular values near ``lipschitz`` (Bjorck), in place of scaling the largest down.
        max_bias_norm: largest L2 norm of the bias.
        kwargs: further arguments of ``keras.layers.Dense``; no activation.
    """

    settings = ("lipschitz", "orthogonal", "max_bias_norm")

    def __init__(
        self,
        units: int,
        use_bias: bool = True,
        lipschitz: float = 1.0,
        orthogonal: bool = True,
        max_bias_norm: float = 1.0,
        **kwargs: Any,
    ) -> None:
        positive(self, lipschitz=lipschitz, max_bias_norm=max_bias_norm)
        kwargs = {"kernel_initializer": keras.initializers.Orthogonal(lipschitz)} | plain(type(self), kwargs, lora_rank=None)
        super().__init__(units, use_bias=use_bias, **kwargs)
        self.lipschitz, self.orthogonal, self.max_bias_norm = lipschitz, orthogonal, max_bias_norm


@registered
class FrobeniusDense(Settings, KL.Dense):
    """Affine map of the last axis whose weight, or each output's row of it, has a bounded Frobenius norm.

    Args:
        units: outputs.
        use_bias: with a bias.
        norm: largest Frobenius norm.
        disjoint_neurons: bound each output's row by ``norm`` in place of the whole weight.
        max_bias_norm: largest L2 norm of the bias.
        kwargs: further arguments of ``keras.layers.Dense``; no activation.
    """

    settings = ("norm", "disjoint_neurons", "max_bias_norm")

    def __init__(
        self,
        units: int,
        use_bias: bool = True,
        norm: float = 1.0,
        disjoint_neurons: bool = False,
        max_bias_norm: float = 1.0,
        **kwargs: Any,
    ) -> None:
        positive(self, norm=norm, max_bias_norm=max_bias_norm)
        kwargs = {"kernel_initializer": keras.initializers.Orthogonal(norm)} | plain(type(self), kwargs, lora_rank=None)
        super().__init__(units, use_bias=use_bias, **kwargs)
        self.norm, self.disjoint_neurons, self.max_bias_norm = norm, disjoint_neurons, max_bias_norm


def convolve(layer: Any, x: Any) -> Any:
    """What a spectral convolution computes.

    A kernel of one position with a stride reads single positions: they are sliced out first, since TensorFlow 2.21 on CPU reads out of
    bounds in the filter gradient of such a convolution.
    """
    strides = list(layer.strides)
    if max(layer.kernel_size) == 1 and max(strides) > 1:
        x, strides = x[(slice(None), *(slice(None, None, r) for r in strides))], [1] * len(strides)
    z = keras.ops.conv(
        x, layer.kernel, strides=strides, padding=layer.padding, dilation_rate=layer.dilation_rate, data_format="channels_last"
    )
    return z + layer.bias if layer.use_bias else z


class _SpectralConv(Settings):
    """What spectral convolutions of every rank share; first of two base classes, the second one Keras' convolution."""

    settings = ("lipschitz", "orthogonal", "max_bias_norm")

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        dilation_rate: int | Sequence[int] = 1,
        use_bias: bool = True,
        lipschitz: float = 1.0,
        orthogonal: bool = True,
        max_bias_norm: float = 1.0,
        **kwargs: Any,
    ) -> None:
        positive(self, lipschitz=lipschitz, max_bias_norm=max_bias_norm)
        if padding not in ("same", "valid"):
            raise ConfigError(f"{type(self).__name__} pads with zeros, 'same' or 'valid', not {padding!r}; choose one of them.")
        kwargs = plain(type(self), kwargs, groups=1, data_format="channels_last", lora_rank=None)
        super().__init__(  # type: ignore[call-arg]
            filters, kernel_size, strides=strides, padding=padding, dilation_rate=dilation_rate, use_bias=use_bias,
            **{"kernel_initializer": keras.initializers.Orthogonal(lipschitz), "data_format": "channels_last"} | kwargs,
        )  # fmt: skip
        self.lipschitz, self.orthogonal, self.max_bias_norm = lipschitz, orthogonal, max_bias_norm

    def call(self, inputs: Any) -> Any:
        """The convolution and its bias."""
        return convolve(self, inputs)


_ARGS = """

    Args:
        filters, kernel_size, strides, dilation_rate, use_bias: as in Keras.
        padding: "valid", or "same" as TensorFlow does it at any stride.
        lipschitz: largest operator norm of the convolution.
        orthogonal: bring all singular values of the flattened kernel near each other (Bjorck), in place of scaling the largest down.
        max_bias_norm: largest L2 norm of the bias.
        kwargs: further arguments of Keras' convolution; no activation, no groups.
    """


@registered
class SpectralConv1D(_SpectralConv, KL.Conv1D):
    __doc__ = "Zero-padded convolution of ``[B, T, C]`` with a certified operator norm." + _ARGS


@registered
class SpectralConv2D(_SpectralConv, KL.Conv2D):
    __doc__ = "Zero-padded convolution of ``[B, H, W, C]`` with a certified operator norm." + _ARGS


@registered
class BoundedBias(Layer):
    """``x + b / sqrt(T)`` at each of T positions, ``|b| <= max_norm``: its sensitivity does not grow with T.

    Args:
        max_norm: largest L2 norm of the bias.
    """

    settings = ("max_norm",)

    def __init__(self, max_norm: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        positive(self, max_norm=max_norm)
        self.max_norm = max_norm

    def build(self, input_shape: Any) -> None:
        """Create the bias."""
        need(self, len(input_shape) > 1, "needs inputs [B, ..., C]")
        self.bias = self.add_weight(name="bias", shape=(input_shape[-1],), initializer="zeros")
        self.built = True

    def call(self, x: Any) -> Any:
        """Add the bias."""
        positions = x.shape[1:-1]
        if None in positions:
            return x + self.bias / tf.sqrt(tf.cast(tf.reduce_prod(tf.shape(x)[1:-1]), x.dtype))
        return x + self.bias * math.prod(positions) ** -0.5


# --- activations ----------------------------------------------------------------------------------------------------------


@registered
def absolute(x: Any) -> Any:
    """The absolute value, whose gradient at 0 is 0."""
    return tf.abs(x)


@registered
class Abs(Layer):
    """The absolute value."""

    def call(self, x: Any) -> Any:
        """Apply it."""
        return tf.abs(x)


def group_sort(x: Tensor, n: int) -> Tensor:
    """Each group of ``n`` successive channels in ascending order, by odd-even transposition.

    Each comparison selects, so the Jacobian is a permutation at ties too.
    """
    groups = tf.reshape(x, [-1, x.shape[-1] // n, n])
    if n > NETWORK:
        groups = tf.sort(groups, axis=-1)
    else:
        columns = tf.unstack(groups, axis=-1)
        for start in range(n):
            for i in range(start % 2, n - 1, 2):
                a, b = columns[i], columns[i + 1]
                swap = a > b
                columns[i], columns[i + 1] = tf.where(swap, b, a), tf.where(swap, a, b)
        groups = tf.stack(columns, axis=-1)
    return tf.reshape(groups, tf.shape(x) if None in x.shape[1:] else [-1, *x.shape[1:]])


@registered
class GroupSort(Layer):
    """Sorts each group of ``n`` successive channels in ascending order (Anil, Lucas, Grosse 2019, arXiv:1811.05381).

    Args:
        n: channels in a group.
    """

    settings = ("n",)

    def __init__(self, n: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = n
        need(self, isinstance(n, int) and n > 1, f"sorts groups of at least 2 channels, not {n!r}")

    def build(self, input_shape: Any) -> None:
        """Check the channels."""
        channels = input_shape[-1]
        need(self, channels % self.n == 0, f"sorts groups of {self.n}, which do not divide {channels} channels; choose a divisor")
        self.built = True

    def call(self, x: Any) -> Any:
        """Sort."""
        return group_sort(x, self.n)


@registered
class FullSort(Layer):
    """Sorts all channels in ascending order."""

    def call(self, x: Any) -> Any:
        """Sort; the gradient goes back to the places the values came from, one each."""
        return tf.sort(x, axis=-1)


@registered
class Householder(Layer):
    """Reflects the pairs of channels ``(c, c + C/2)`` at a line of trained angle, where they lie on one side of it.

    An angle of pi/2, the first value, gives the sorting of each pair (Singla, Singla, Feizi 2022, arXiv:2108.04062).
    """

    def build(self, input_shape: Any) -> None:
        """Create the angles."""
        channels = input_shape[-1]
        need(self, channels % 2 == 0, f"needs an even number of channels, not {channels}")
        self.theta = self.add_weight(name="theta", shape=(channels // 2,), initializer=keras.initializers.Constant(math.pi / 2))
        self.built = True

    def call(self, x: Any) -> Any:
        """Keep or reflect each pair."""
        first, second = tf.split(x, 2, axis=-1)
        theta = tf.convert_to_tensor(self.theta)
        cos, sin = tf.cos(theta), tf.sin(theta)
        keep = first * tf.sin(theta / 2) <= second * tf.cos(theta / 2)
        one = tf.where(keep, first, first * cos + second * sin)
        two = tf.where(keep, second, first * sin - second * cos)
        return tf.concat([one, two], axis=-1)


# --- blocks ---------------------------------------------------------------------------------------------------------------


def join(x: Any, y: Any, mode: str) -> Any:
    """The sum of two paths, or its half."""
    return x + y if mode == "add" else (x + y) * 0.5


@registered
class Residual(Layer):
    """``x + f(x)``, or with mode "convex" its half, which does not grow; f is a chain of layers that keeps the shape.

    Args:
        layers: the layers of f.
        mode: "add" or "convex".
    """

    settings = ("mode",)

    def __init__(self, layers: Sequence[Any], mode: str = "add", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        need(self, mode in ("add", "convex"), f"has the modes 'add' and 'convex', not {mode!r}")
        self.body, self.mode = list(layers), mode

    def build(self, input_shape: Any) -> None:
        """Build the layers."""
        shape = tuple(input_shape)
        for layer in self.body:
            if not layer.built:
                layer.build(shape)
            shape = tuple(layer.compute_output_shape(shape))
        need(self, shape == tuple(input_shape), f"has layers that turn {tuple(input_shape[1:])} into {shape[1:]}; they must keep the shape")
        self.built = True

    def call(self, x: Any) -> Any:
        """Add the two paths."""
        y = x
        for layer in self.body:
            y = layer(y)
        return join(x, y, self.mode)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "layers": [keras.saving.serialize_keras_object(layer) for layer in self.body]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Residual:
        """From the arguments of the constructor."""
        layers = [keras.saving.deserialize_keras_object(layer) for layer in config["layers"]]
        return cls(**{**config, "layers": layers})


@registered
class MixerBlock(Layer):
    """A block of an MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601) on ``[B, T, D]``: across tokens, then across channels.

    Args:
        token_hidden, channel_hidden: hidden widths, even; by default T and D rounded up to even.
        mode: how each of the two is joined with its input, "add" or "convex".
    """

    settings = ("token_hidden", "channel_hidden", "mode")

    def __init__(self, token_hidden: int | None = None, channel_hidden: int | None = None, mode: str = "convex", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        need(self, mode in ("add", "convex"), f"has the modes 'add' and 'convex', not {mode!r}")
        self.token_hidden, self.channel_hidden, self.mode = token_hidden, channel_hidden, mode

    def build(self, input_shape: Any) -> None:
        """Create the maps."""
        need(self, len(input_shape) == 3 and None not in input_shape[1:], "needs sequences [B, T, D] of known size")
        _, tokens, channels = input_shape
        wide, deep = self.token_hidden or tokens + tokens % 2, self.channel_hidden or channels + channels % 2
        need(self, wide % 2 == deep % 2 == 0, f"sorts its {wide} and {deep} hidden units in pairs; make both numbers even")
        sizes = {"token1": (tokens, wide), "token2": (wide, tokens), "channel1": (channels, deep), "channel2": (deep, channels)}
        for name, (width, units) in sizes.items():
            layer = SpectralDense(units, name=name, dtype=self.dtype_policy)
            layer.build((None, None, width))
            setattr(self, name, layer)
        self.built = True

    def call(self, x: Any) -> Any:
        """Mix tokens, then channels."""
        turned = tf.transpose(x, [0, 2, 1])
        x = join(x, tf.transpose(self.token2(group_sort(self.token1(turned), 2)), [0, 2, 1]), self.mode)
        return join(x, self.channel2(group_sort(self.channel1(x), 2)), self.mode)


# --- other spellings ------------------------------------------------------------------------------------------------------

SpectralLinear, FrobeniusLinear = SpectralDense, FrobeniusDense
SpectralConv1d, SpectralConv2d = SpectralConv1D, SpectralConv2D
ScaledL2NormPooling2D, ScaledAveragePooling2D = ScaledL2NormPool2d, ScaledAvgPool2d
ScaledGlobalL2NormPooling2D, ScaledGlobalAveragePooling2D = ScaledGlobalL2NormPool2d, ScaledGlobalAvgPool2d
MaxPool2d, Flatten, ReLU, Reshape, Permute = KL.MaxPooling2D, KL.Flatten, KL.ReLU, KL.Reshape, KL.Permute

__all__ = [
    "Abs", "BoundedBias", "BoundedInput", "Flatten", "FrobeniusDense", "FrobeniusLinear", "FullSort", "GroupSort", "Householder",
    "LayerCentering", "LossGradientClip", "MaxPool2d", "MixerBlock", "Patches", "Permute", "ReLU", "Reshape", "Residual",
    "ScaledAveragePooling2D", "ScaledAvgPool2d", "ScaledGlobalAveragePooling2D", "ScaledGlobalAvgPool2d",
    "ScaledGlobalL2NormPool2d", "ScaledGlobalL2NormPooling2D", "ScaledL2NormPool2d", "ScaledL2NormPooling2D",
    "SpectralConv1D", "SpectralConv1d", "SpectralConv2D", "SpectralConv2d", "SpectralDense", "SpectralLinear",
]  # fmt: skip
