# ruff: noqa: N801, N802 -- the names of LipDP
"""LipDP's layers by their names: the layers of ``dptrain_tf.lipschitz`` with LipDP's arguments.

The mathematics is that of the base classes and of ``dptrain/bounds.py``; here arguments are translated. One that would change a scale is
either exact (``k_coef_lip`` of affine layers is the radius of the constraint) or refused (pitfalls.md L11). None of these classes overrides
``call``: a class that did would lose its proven bound (``graph_rows.row_for``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from dptrain.errors import ConfigError
from dptrain_tf import lipschitz as ours
from dptrain_tf.own import KL, positive, registered

# Settings of iterations that only approach a norm; certificates bound it from above, so there is nothing to set (pitfalls.md L8).
ITERATIONS = ("eps_spectral", "beta_bjorck", "maxiter_spectral", "maxiter_bjorck")


def refuse(layer: Any, sentence: str) -> None:
    """Refuse an argument, naming the class."""
    raise ConfigError(f"{layer if isinstance(layer, str) else type(layer).__name__} {sentence}.")


def fixed(layer: Any, remedy: str, **pairs: tuple[Any, tuple[Any, ...]]) -> None:
    """Refuse arguments whose value is none of those allowed.

    Args:
        layer: the layer.
        remedy: what to do instead.
        pairs: name -> given value, allowed values.
    """
    for name, (value, allowed) in pairs.items():
        if value not in allowed:
            refuse(layer, f"has {name}={allowed[0]!r} only, not {value!r}; {remedy}")


class DPLayer:
    """What the layers here share; first of two base classes.

    Bounds are not methods of layers, as ``backpropagate_params`` and its kin are in LipDP: ``dptrain/bounds.py`` proves them from the graph
    of the whole model. A class of your own gets no bound by inheriting from this one.
    """

    nm_coef: float = 1.0
    renamed: tuple[tuple[str, str], ...] = ()  # setting of the base class, argument here; "" for one that is no argument here

    def has_parameters(self) -> bool:
        """Whether the layer, once built, has something to train."""
        return bool(self.trainable_variables)  # type: ignore[attr-defined]

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        names = dict(self.renamed)
        config = {names.get(name, name): value for name, value in super().get_config().items()}  # type: ignore[misc]
        config.pop("", None)
        return config | ({"nm_coef": self.nm_coef} if self.nm_coef != 1.0 else {})

    def _noise(self, nm_coef: float) -> None:
        positive(self, nm_coef=nm_coef)
        self.nm_coef = nm_coef


# --- inputs ---------------------------------------------------------------------------------------------------------------


@registered
class DP_BoundedInput(DPLayer, ours.BoundedInput):
    """Scales an example whose L2 norm exceeds ``upper_bound`` down to it.

    Args:
        upper_bound: largest L2 norm of one example.
        input_shape: shape of one example, for a first layer.
        enforce_clipping: True; a bound that is claimed and not enforced is no bound.
        kwargs: name and the like.
    """

    renamed = (("norm", "upper_bound"),)

    def __init__(self, upper_bound: float, input_shape: Sequence[int] | None = None, enforce_clipping: bool = True, **kwargs: Any) -> None:
        fixed(self, "an input that may exceed its bound voids every bound after it", enforce_clipping=(enforce_clipping, (True,)))
        super().__init__(float(upper_bound), **kwargs)
        self.upper_bound = self.norm
        if input_shape is not None:
            self._input_shape_arg = tuple(input_shape)  # where Keras looks for it; handed to ``Layer`` it would draw a warning


@registered
class DP_InputLayer(KL.InputLayer):
    """Keras' ``InputLayer``; ``input_shape`` is the older name of ``shape``.

    Args:
        input_shape: shape of one example.
        kwargs: as in Keras.
    """

    def __init__(self, input_shape: Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**({"shape": tuple(input_shape)} if input_shape is not None else {}), **kwargs)


# --- affine maps ----------------------------------------------------------------------------------------------------------


def affine(layer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of deel-lip's affine layers as those of ours."""
    for name in ITERATIONS:
        if kwargs.pop(name, None) is not None:
            refuse(layer, f"takes no {name}, since norms are certified and not iterated towards; remove it")
    if "eps_bjorck" in kwargs:
        kwargs["orthogonal"] = kwargs.pop("eps_bjorck") is not None
    return kwargs


@registered
class DP_SpectralDense(DPLayer, ours.SpectralDense):
    """``SpectralDense`` without a bias unless asked for; the weight is plain and projected after each update.

    Args:
        units: outputs.
        activation: None; add the activation as a layer.
        use_bias: with a bias, which joins the weight's group with its exact bound.
        kernel_initializer: of the weight, which is projected before the first step.
        k_coef_lip: largest operator norm of the weight.
        nm_coef: factor of this layer's noise.
        kwargs: ``orthogonal``, ``max_bias_norm``, and further arguments of ``keras.layers.Dense``.
    """

    renamed = (("lipschitz", "k_coef_lip"),)

    def __init__(
        self,
        units: int,
        activation: Any = None,
        use_bias: bool = False,
        kernel_initializer: Any = "orthogonal",
        k_coef_lip: float = 1.0,
        nm_coef: float = 1.0,
        **kwargs: Any,
    ) -> None:
        arguments = {"activation": activation, "kernel_initializer": kernel_initializer} | affine(self, kwargs)
        super().__init__(units, use_bias, k_coef_lip, **arguments)
        self._noise(nm_coef)


@registered
class DP_QuickSpectralDense(DP_SpectralDense):
    """The same layer: here every weight is plain and projected, which is what made this one quick in LipDP."""


@registered
class DP_QuickFrobeniusDense(DPLayer, ours.FrobeniusDense):
    """``FrobeniusDense`` without a bias unless asked for.

    Args:
        units, activation, use_bias, kernel_initializer, nm_coef: as in ``DP_SpectralDense``.
        k_coef_lip: largest Frobenius norm of the weight.
        kwargs: ``disjoint_neurons``, ``max_bias_norm``, and further arguments of ``keras.layers.Dense``.
    """

    renamed = (("norm", "k_coef_lip"),)

    def __init__(
        self,
        units: int,
        activation: Any = None,
        use_bias: bool = False,
        kernel_initializer: Any = "orthogonal",
        k_coef_lip: float = 1.0,
        nm_coef: float = 1.0,
        **kwargs: Any,
    ) -> None:
        for name in (*ITERATIONS, "eps_bjorck"):
            if kwargs.pop(name, None) is not None:
                refuse(self, f"takes no {name}, since a Frobenius norm needs no iteration; remove it")
        super().__init__(units, use_bias, k_coef_lip, activation=activation, kernel_initializer=kernel_initializer, **kwargs)
        self._noise(nm_coef)


class _Conv2D(DPLayer, ours.SpectralConv2D):
    """What both convolutions share."""

    renamed = (("lipschitz", "k_coef_lip"),)
    default_padding = "valid"

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = (1, 1),
        padding: str | None = None,
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = (1, 1),
        activation: Any = None,
        use_bias: bool = False,
        kernel_initializer: Any = "orthogonal",
        k_coef_lip: float = 1.0,
        nm_coef: float = 1.0,
        **kwargs: Any,
    ) -> None:
        given = {"data_format": data_format, "activation": activation, "kernel_initializer": kernel_initializer} | affine(self, kwargs)
        padding = self.default_padding if padding is None else padding
        super().__init__(filters, kernel_size, strides, padding, dilation_rate, use_bias, k_coef_lip, **given)
        self._noise(nm_coef)


_CONV = """

    Args:
        filters, kernel_size, strides, dilation_rate: as in Keras.
        data_format: channels last.
        activation, use_bias, kernel_initializer, nm_coef: as in ``DP_SpectralDense``.
        padding: "same" or "valid".
        k_coef_lip: largest operator norm of the convolution.
        kwargs: ``orthogonal``, ``max_bias_norm``, and further arguments of ``keras.layers.Conv2D``; no groups.
    """


@registered
class DP_SpectralConv2D(_Conv2D):
    __doc__ = 'Convolution with a certified operator norm, padding "same" unless asked for otherwise.' + _CONV
    default_padding = "same"


@registered
class DP_QuickSpectralConv2D(_Conv2D):
    __doc__ = 'Convolution with a certified operator norm, padding "valid" unless asked for otherwise.' + _CONV


@registered
class DP_AddBias(DPLayer, ours.BoundedBias):
    """``x + b / sqrt(T)`` at each of T positions, ``|b| <= norm_max``; for T = 1 it is LipDP's ``x + b``.

    Without the factor a bias on feature maps has ``sqrt(T)`` times the sensitivity that LipDP claimed (pitfalls.md L2).

    Args:
        norm_max: largest L2 norm of the bias.
        nm_coef: factor of this layer's noise.
        kwargs: name and the like.
    """

    renamed = (("max_norm", "norm_max"),)

    def __init__(self, norm_max: float, nm_coef: float = 1.0, **kwargs: Any) -> None:
        super().__init__(float(norm_max), **kwargs)
        self._noise(nm_coef)


# --- without parameters ---------------------------------------------------------------------------------------------------


@registered
class DP_GroupSort(DPLayer, ours.GroupSort):
    """Sorts each group of ``n`` successive channels.

    Args:
        n: channels in a group; None sorts all.
        data_format: channels last.
        k_coef_lip: 1.
        kwargs: name and the like.
    """

    def __init__(self, n: int | None = None, data_format: str = "channels_last", k_coef_lip: float = 1.0, **kwargs: Any) -> None:
        fixed(self, "put DP_Permute around it", data_format=(data_format, ("channels_last",)))
        fixed(self, "put keras.layers.Rescaling after it", k_coef_lip=(k_coef_lip, (1.0,)))
        super().__init__(2 if n is None else n, **kwargs)
        self.whole = n is None

    def build(self, input_shape: Any) -> None:
        """Check the channels."""
        if self.whole:
            self.n = int(input_shape[-1])
        super().build(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), **({"n": None} if self.whole else {})}


@registered
class DP_ReLU(DPLayer, KL.ReLU):
    """Keras' ``ReLU``."""


@registered
class DP_Flatten(DPLayer, KL.Flatten):
    """Keras' ``Flatten``."""


@registered
class DP_Reshape(DPLayer, KL.Reshape):
    """Keras' ``Reshape``."""


@registered
class DP_Permute(DPLayer, KL.Permute):
    """Keras' ``Permute``."""


@registered
class DP_MaxPool2D(DPLayer, KL.MaxPooling2D):
    """Keras' ``MaxPooling2D``; windows that overlap are allowed, with their exact Lipschitz constant."""


class _Pool(DPLayer):
    """Scaled pooling over disjoint windows; first of two base classes."""

    renamed = (("eps", "eps_grad_sqrt"),)

    def __init__(
        self,
        pool_size: int | Sequence[int] = (2, 2),
        strides: int | Sequence[int] | None = None,
        padding: str = "valid",
        data_format: str | None = None,
        k_coef_lip: float = 1.0,
        **kwargs: Any,
    ) -> None:
        sizes, steps = ((v, v) if isinstance(v, int) else None if v is None else tuple(v) for v in (pool_size, strides))
        if steps not in (None, sizes):
            refuse(self, f"pools disjoint windows, so strides must be pool_size {sizes}, not {steps}; remove strides")
        fixed(self, "remove the argument", padding=(padding, ("valid",)), data_format=(data_format, ("channels_last", None)))
        fixed(self, "put keras.layers.Rescaling after it", k_coef_lip=(k_coef_lip, (1.0,)))
        super().__init__(pool_size, **epsilon(kwargs))  # type: ignore[call-arg]


def epsilon(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``eps_grad_sqrt`` of deel-lip is ``eps`` here."""
    return {"eps" if name == "eps_grad_sqrt" else name: value for name, value in kwargs.items()}


@registered
class DP_ScaledL2NormPooling2D(_Pool, ours.ScaledL2NormPool2d):
    """L2 norm of each disjoint window.

    Args:
        pool_size, strides: rows and columns of a window.
        padding, data_format, k_coef_lip: "valid", channels last, 1.
        kwargs: ``eps_grad_sqrt``, name and the like.
    """


@registered
class DP_ScaledAveragePooling2D(_Pool, ours.ScaledAvgPool2d):
    """Mean of each disjoint window times the square root of its size.

    Args:
        pool_size, strides: rows and columns of a window.
        padding, data_format, k_coef_lip: "valid", channels last, 1.
        kwargs: name and the like.
    """


@registered
class DP_ScaledGlobalL2NormPooling2D(DPLayer, ours.ScaledGlobalL2NormPool2d):
    """L2 norm over all positions of each channel.

    Args:
        data_format, k_coef_lip: channels last, 1.
        kwargs: ``eps_grad_sqrt``, name and the like.
    """

    renamed = (("eps", "eps_grad_sqrt"),)

    def __init__(self, data_format: str | None = None, k_coef_lip: float = 1.0, **kwargs: Any) -> None:
        fixed(self, "put DP_Permute before it", data_format=(data_format, ("channels_last", None)))
        fixed(self, "put keras.layers.Rescaling after it", k_coef_lip=(k_coef_lip, (1.0,)))
        super().__init__(**epsilon(kwargs))


@registered
class DP_ScaledL2NormPooling1D(DPLayer, ours.ScaledGlobalL2NormPool2d):
    """L2 norm over the positions of ``[B, T, C]``.

    Args:
        axis: 1, the positions.
        eps: keeps the gradient finite at zero.
        kwargs: name and the like.
    """

    def __init__(self, axis: int = -1, eps: float = 1e-6, **kwargs: Any) -> None:
        fixed(self, "for the norm over the channels put DP_Permute((2, 1)) before it and set axis=1", axis=(axis, (1, -2)))
        super().__init__(eps, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "axis": 1}


@registered
class DP_LayerCentering(DPLayer, ours.LayerCentering):
    """Subtracts a mean of each example, at every rank; LipDP's took one over the batch at ranks 2 and 3 (pitfalls.md L3).

    Args:
        pixelwise: subtract each channel's mean over the positions (over the channels, where there are no positions).
        channelwise: subtract each position's mean over the channels. With neither, the mean of the whole example is subtracted.
        kwargs: name and the like; ``scale`` must be False and ``center`` True.
    """

    renamed = (("axis", ""),)

    def __init__(self, pixelwise: bool = False, channelwise: bool = True, **kwargs: Any) -> None:
        scale, center = kwargs.pop("scale", False), kwargs.pop("center", True)
        fixed(self, "to divide by a statistic has no Lipschitz constant", scale=(scale, (False,)), center=(center, (True,)))
        if pixelwise and channelwise:
            refuse(self, "would average over single values with pixelwise and channelwise; choose one of them")
        super().__init__(-1 if channelwise else None, **kwargs)
        self.pixelwise, self.channelwise = pixelwise, channelwise

    def build(self, input_shape: Any) -> None:
        """Choose the axes."""
        if not (self.pixelwise or self.channelwise):
            self.axis = tuple(range(1, len(input_shape)))
        super().build(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "pixelwise": self.pixelwise, "channelwise": self.channelwise}


@registered
class DP_Lambda(DPLayer, ours.Patches):
    """The one function that LipDP's models hand to it: ``tf.image.extract_patches`` of disjoint square patches.

    The output is the sequence ``[B, patches, values]`` that the ``DP_Reshape`` after it makes in any case.

    Args:
        function: ``tf.image.extract_patches``; any other has no proven bound and is refused.
        arguments: its arguments: square ``sizes``, the same ``strides``, ``rates`` of 1, padding "VALID".
        size: rows and columns of a patch, in place of both.
        kwargs: name and the like.
    """

    def __init__(
        self, function: Callable[..., Any] | None = None, arguments: Mapping[str, Any] | None = None, size: int = 0, **kwargs: Any
    ) -> None:
        if function is not None:
            size = patch_size(self, function, dict(arguments or {}))
        super().__init__(size, **kwargs)


def patch_size(layer: Any, function: Callable[..., Any], arguments: dict[str, Any]) -> int:
    """Rows of a patch, if the function cuts an image into disjoint square patches."""
    name = getattr(function, "__name__", "the function")
    if function is not tf.image.extract_patches:
        refuse(layer, f"gives {name} no bound; of functions only tf.image.extract_patches has one, so use a layer of this module")
    sizes = [int(n) for n in arguments.get("sizes", [])]
    square = len(sizes) == 4 and sizes[0] == sizes[3] == 1 and sizes[1] == sizes[2]
    same = list(arguments.get("strides", [])) == sizes and list(arguments.get("rates", [])) == [1] * 4
    if not (square and same and str(arguments.get("padding")).upper() == "VALID"):
        refuse(layer, f"cuts disjoint square patches only, not {arguments}; set strides to sizes, rates to 1 and padding to 'VALID'")
    return sizes[1]


@registered
class DP_ClipGradient(DPLayer, ours.LossGradientClip):
    """Scales each example's cotangent down to ``clip_value``; as the last layer, in units of ONE example's loss (pitfalls.md L10).

    Args:
        clip_value: largest norm. In dynamic mode the first value, by default the loss's own constant.
        mode: "fixed"; or "dynamic", for the last layer: a quantile of the norms, released with noise as part of every step, moves the
            value (``dptrain.adaptive``), by default and as ``AdaptiveQuantileClipping`` says.
        kwargs: name and the like.
    """

    renamed = (("norm", ""),)

    def __init__(self, clip_value: float | None, mode: str = "fixed", **kwargs: Any) -> None:
        if mode not in ("fixed", "dynamic"):
            refuse(self, f"has the modes 'fixed' and 'dynamic', not {mode!r}; in place of others use 'dynamic', a private quantile")
        if clip_value is None and mode == "fixed":
            refuse(self, "needs a clip_value in mode 'fixed'; give one")
        if clip_value is not None:
            positive(self, clip_value=clip_value)
        # What moves is enforced by the training step, where the output's cotangent is at hand; the layer is the identity then.
        super().__init__(float(clip_value) if clip_value is not None and mode == "fixed" else math.inf, **kwargs)
        self.clip_value, self.mode = clip_value, mode

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "clip_value": self.clip_value, "mode": self.mode}


# --- residuals ------------------------------------------------------------------------------------------------------------

POLICIES = {"add": "add", "1-lip-add": "convex"}


def mode_of(merge_policy: str) -> str:
    """The mode of ``Residual``."""
    if merge_policy not in POLICIES:
        refuse("merge_policy", f"must be one of {', '.join(POLICIES)}, not {merge_policy!r}")
    return POLICIES[merge_policy]


class DP_SplitResidual:
    """Opens a residual connection in a list of layers; called on a tensor, returns it twice."""

    def __call__(self, x: Any) -> Any:
        """Both paths."""
        return x, x


class DP_WrappedResidual:
    """A layer on the second path of a residual connection.

    Args:
        block: the layer.
    """

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(self, paths: Any) -> Any:
        """Call the layer on the second path."""
        one, two = paths
        return one, self.block(two)


class DP_MergeResidual:
    """Closes a residual connection.

    Args:
        merge_policy: "add", or "1-lip-add" for half the sum.
    """

    def __init__(self, merge_policy: str) -> None:
        self.mode = mode_of(merge_policy)

    def __call__(self, paths: Any) -> Any:
        """Add the paths."""
        return (keras.layers.Add if self.mode == "add" else keras.layers.Average)()(list(paths))


def make_residuals(merge_policy: str, wrapped_layers: Sequence[Any]) -> list[Any]:
    """A residual connection around layers.

    Args:
        merge_policy: "add", or "1-lip-add" for half the sum.
        wrapped_layers: the layers of the second path.
    Returns:
        A list of one layer.
    """
    return [ours.Residual(collapse(wrapped_layers), mode_of(merge_policy))]


def collapse(layers: Sequence[Any]) -> list[Any]:
    """A list of layers with a ``Residual`` in place of each ``DP_SplitResidual`` ... ``DP_MergeResidual``.

    Raises:
        ConfigError: they do not match.
    """
    found: list[list[Any]] = [[]]
    for layer in layers:
        if isinstance(layer, DP_SplitResidual):
            found.append([])
        elif isinstance(layer, DP_MergeResidual):
            if len(found) == 1:
                refuse(layer, "has no DP_SplitResidual before it; use make_residuals")
            body = found.pop()
            found[-1].append(ours.Residual(body, layer.mode))
        elif isinstance(layer, DP_WrappedResidual) != (len(found) > 1):
            refuse(layer, "stands on the wrong side of a DP_SplitResidual; use make_residuals")
        else:
            found[-1].append(layer.block if isinstance(layer, DP_WrappedResidual) else layer)
    if len(found) > 1:
        refuse("DP_SplitResidual", "has no DP_MergeResidual after it; use make_residuals")
    return found[0]


def DP_GNP_Factory(layer_cls: type) -> Any:
    """Refused: a class is not 1-Lipschitz because it is said to be."""
    return refuse("DP_GNP_Factory", f"would take it on trust that {layer_cls.__name__} keeps norms; use a layer that has a proven bound")


__all__ = [
    "DPLayer", "DP_AddBias", "DP_BoundedInput", "DP_ClipGradient", "DP_Flatten", "DP_GNP_Factory", "DP_GroupSort", "DP_InputLayer",
    "DP_Lambda", "DP_LayerCentering", "DP_MaxPool2D", "DP_MergeResidual", "DP_Permute", "DP_QuickFrobeniusDense",
    "DP_QuickSpectralConv2D", "DP_QuickSpectralDense", "DP_ReLU", "DP_Reshape", "DP_ScaledAveragePooling2D",
    "DP_ScaledGlobalL2NormPooling2D", "DP_ScaledL2NormPooling1D", "DP_ScaledL2NormPooling2D", "DP_SpectralConv2D", "DP_SpectralDense",
    "DP_SplitResidual", "DP_WrappedResidual", "make_residuals",
]  # fmt: skip
