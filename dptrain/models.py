"""Model specifications: presets that expand to a list of layers, buildable in both frameworks from the same config.

The expansion is pure data. Starting weights are drawn here too, from the config's ``seed``, so that both frameworks start from
the very same weights; they are public, hence an ordinary generator.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from dptrain import layer_specs as L
from dptrain.errors import ConfigError
from dptrain.layer_specs import ActivationName, AnyLayer, Positive, PositiveInt, Rate


class ModelSpec(BaseModel):
    """Base of the model specifications."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def expand(self, input_shape: tuple[int, ...]) -> tuple[AnyLayer, ...]:
        """The layers of the model.

        Args:
            input_shape: shape of one example, channels last.
        Returns:
            Layers; ``units="num_classes"`` stands for the number of outputs.
        """
        raise TypeError(f"{type(self).__name__} does not say which layers it has")


class MLP(ModelSpec):
    """Dense layers on the flattened input."""

    name: Literal["mlp"] = "mlp"
    hidden: tuple[PositiveInt, ...] = (128, 64)
    activation: ActivationName = "tanh"
    dropout: Rate = 0.0

    def expand(self, input_shape: tuple[int, ...]) -> tuple[AnyLayer, ...]:
        """Flatten, hidden layers, output."""
        layers: list[AnyLayer] = [L.Flatten(name="flatten")]
        for i, units in enumerate(self.hidden, 1):
            layers.append(L.Dense(name=f"fc{i}", units=units, activation=self.activation))
            if self.dropout:
                layers.append(L.Dropout(name=f"drop{i}", rate=self.dropout))
        return (*layers, L.Dense(name="head", units="num_classes"))


class CNN(ModelSpec):
    """A small VGG: stages of convolution, GroupNorm and activation, each followed by pooling, then dense layers."""

    name: Literal["cnn"] = "cnn"
    stages: tuple[tuple[PositiveInt, ...], ...] = ((32, 32), (64, 64), (128,))
    kernel_size: PositiveInt = 3
    activation: ActivationName = "tanh"
    norm_groups: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 8
    pool: Literal["max_pool", "avg_pool"] = "max_pool"
    hidden: tuple[PositiveInt, ...] = (128,)
    global_pool: bool = False

    @model_validator(mode="after")
    def _groups_divide(self) -> CNN:
        bad = [f for stage in self.stages for f in stage if self.norm_groups and f % min(self.norm_groups, f)]
        if bad:
            raise ValueError(f"norm_groups {self.norm_groups} does not divide the channel counts {bad}; choose a common divisor, or 0")
        return self

    def expand(self, input_shape: tuple[int, ...]) -> tuple[AnyLayer, ...]:
        """Stages, then the head."""
        layers: list[AnyLayer] = []
        for s, stage in enumerate(self.stages, 1):
            for c, filters in enumerate(stage, 1):
                fused: ActivationName = "linear" if self.norm_groups else self.activation
                layers.append(L.Conv(type="conv2d", name=f"conv{s}_{c}", filters=filters, kernel_size=self.kernel_size, activation=fused))
                if self.norm_groups:
                    layers.append(L.GroupNorm(name=f"norm{s}_{c}", groups=min(self.norm_groups, filters)))
                    layers.append(L.Activation(name=f"act{s}_{c}", function=self.activation))
            layers.append(L.Pool(type=self.pool, name=f"pool{s}"))
        layers.append(L.GlobalAvgPool(name="gap") if self.global_pool else L.Flatten(name="flatten"))
        layers += [L.Dense(name=f"fc{i}", units=u, activation=self.activation) for i, u in enumerate(self.hidden, 1)]
        return (*layers, L.Dense(name="head", units="num_classes"))


class ResNet18GN(ModelSpec):
    """ResNet-18 for small images with GroupNorm in place of BatchNorm."""

    name: Literal["resnet18_gn"] = "resnet18_gn"
    width: PositiveInt = 64
    blocks: tuple[PositiveInt, ...] = (2, 2, 2, 2)
    norm_groups: PositiveInt = 16
    activation: ActivationName = "relu"

    @model_validator(mode="after")
    def _groups_divide(self) -> ResNet18GN:
        if self.width % min(self.norm_groups, self.width):
            raise ValueError(f"norm_groups {self.norm_groups} does not divide width {self.width}; choose a divisor")
        return self

    def expand(self, input_shape: tuple[int, ...]) -> tuple[AnyLayer, ...]:
        """Stem, four stages of basic blocks, global pooling, head."""
        groups = min(self.norm_groups, self.width)

        def conv(name: str, filters: int, stride: int = 1, kernel: int = 3) -> AnyLayer:
            return L.Conv(type="conv2d", name=name, filters=filters, kernel_size=kernel, strides=stride, padding=kernel // 2, bias=False)

        def norm(name: str) -> AnyLayer:
            return L.GroupNorm(name=name, groups=groups)

        act = L.Activation(name="act", function=self.activation)
        layers: list[AnyLayer] = [conv("stem", self.width), norm("stem_norm"), act.model_copy(update={"name": "stem_act"})]
        previous = self.width
        for s, count in enumerate(self.blocks):
            filters = self.width * 2**s
            for b in range(count):
                stride = 2 if s > 0 and b == 0 else 1
                body = (conv("conv1", filters, stride), norm("norm1"), act, conv("conv2", filters), norm("norm2"))
                change = stride != 1 or previous != filters
                shortcut = (conv("down", filters, stride, kernel=1), norm("down_norm")) if change else ()
                layers.append(L.Residual(name=f"stage{s + 1}_block{b + 1}", body=body, shortcut=shortcut))
                layers.append(act.model_copy(update={"name": f"stage{s + 1}_act{b + 1}"}))
                previous = filters
        return (*layers, L.GlobalAvgPool(name="gap"), L.Dense(name="head", units="num_classes"))


def transformer_blocks(depth: int, dim: int, heads: int, mlp_ratio: float, dropout: float) -> list[AnyLayer]:
    """Pre-norm transformer blocks followed by a last LayerNorm."""
    drop = (L.Dropout(name="drop", rate=dropout),) if dropout else ()
    layers: list[AnyLayer] = []
    for i in range(1, depth + 1):
        attention = (L.LayerNorm(name="norm"), L.SelfAttention(name="attn", heads=heads), *drop)
        mlp = (
            L.LayerNorm(name="norm"),
            L.Dense(name="fc1", units=int(dim * mlp_ratio), activation="gelu"),
            L.Dense(name="fc2", units=dim),
            *drop,
        )
        layers += [L.Residual(name=f"attention{i}", body=attention), L.Residual(name=f"mlp{i}", body=mlp)]
    return [*layers, L.LayerNorm(name="last_norm")]


class Transformer(ModelSpec):
    """Shape of a transformer."""

    dim: PositiveInt = 128
    depth: PositiveInt = 4
    heads: PositiveInt = 4
    mlp_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] = 4.0
    dropout: Rate = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> Transformer:
        if self.dim % self.heads:
            raise ValueError(f"heads {self.heads} does not divide dim {self.dim}; choose a divisor")
        return self

    def blocks(self) -> list[AnyLayer]:
        """The transformer blocks."""
        return transformer_blocks(self.depth, self.dim, self.heads, self.mlp_ratio, self.dropout)


class TransformerEncoder(Transformer):
    """A text classifier on token ids ``[B, T]``; on a float sequence ``[B, T, D]`` a dense map takes the embedding's place."""

    name: Literal["transformer_encoder"] = "transformer_encoder"
    vocabulary: PositiveInt = 10_000

    def expand(self, input_shape: tuple[int, ...]) -> tuple[AnyLayer, ...]:
        """Embedding, positions, blocks, mean over positions, head."""
        tokens = len(input_shape) == 1
        first: list[AnyLayer] = [] if len(input_shape) < 3 else [L.ToSequence(name="sequence")]
        first.append(
            L.Embedding(name="embed", vocabulary=self.vocabulary, dim=self.dim) if tokens else L.Dense(name="embed", units=self.dim)
        )
        first.append(L.PositionEmbedding(name="positions"))
        return (*first, *self.blocks(), L.GlobalAvgPool(name="mean"), L.Dense(name="head", units="num_classes"))


class ViTTiny(Transformer):
    """A small vision transformer with mean pooling."""

    name: Literal["vit_tiny"] = "vit_tiny"
    dim: PositiveInt = 192
    depth: PositiveInt = 6
    heads: PositiveInt = 3
    patch: PositiveInt = 4

    def expand(self, input_shape: tuple[int, ...]) -> tuple[AnyLayer, ...]:
        """Patches, positions, blocks, mean over patches, head."""
        patches = L.Conv(type="conv2d", name="patches", filters=self.dim, kernel_size=self.patch, strides=self.patch, padding="valid")
        first: list[AnyLayer] = [patches, L.ToSequence(name="sequence"), L.PositionEmbedding(name="positions")]
        return (*first, *self.blocks(), L.GlobalAvgPool(name="mean"), L.Dense(name="head", units="num_classes"))


class Lipschitz(ModelSpec):
    """Base of the networks with a proven Lipschitz constant, for the strategy ``clipless``; any other strategy trains them too.

    Args:
        input_norm: L2 norm down to which examples are scaled; by default the root of the input's size, the norm of standardised data.
        bias: learned offsets after every hidden layer, with a sensitivity that does not grow with the number of positions.
        orthogonal: keep all singular values near each other, so that gradients keep their norm.
        gain: largest operator norm of the last layer.
    """

    input_norm: Positive | None = None
    bias: StrictBool = False
    orthogonal: StrictBool = True
    gain: Positive = 1.0

    def bounded(self, input_shape: tuple[int, ...]) -> AnyLayer:
        """The first layer."""
        return L.BoundedInput(name="input_norm", norm=self.input_norm or math.sqrt(math.prod(input_shape)))

    def offset(self, name: str) -> list[AnyLayer]:
        """A bias, if there are any."""
        return [L.BoundedBias(name=name)] if self.bias else []

    def dense(self, name: str, units: int) -> L.SpectralDense:
        """A dense layer without a bias of its own."""
        return L.SpectralDense(name=name, units=units, bias=False, orthogonal=self.orthogonal)

    def conv(self, name: str, filters: int, kernel: int = 3, stride: int = 1) -> L.SpectralConv:
        """A convolution without a bias of its own."""
        return L.SpectralConv(
            type="spectral_conv2d", name=name, filters=filters, kernel_size=kernel, strides=stride, bias=False, orthogonal=self.orthogonal
        )

    def hidden_layers(self, widths: tuple[int, ...]) -> list[AnyLayer]:
        """Dense layers, each followed by sorting."""
        layers: list[AnyLayer] = []
        for i, units in enumerate(widths, 1):
            layers += [self.dense(f"fc{i}", units), *self.offset(f"fc{i}_bias"), L.GroupSort(name=f"sort_fc{i}")]
        return layers

    def head(self) -> L.SpectralDense:
        """The last layer, with a bias, which is cheap there: its sensitivity is that of the loss."""
        return L.SpectralDense(name="head", units="num_classes", lipschitz=self.gain, orthogonal=self.orthogonal, bias=self.bias)


Even = Annotated[int, Field(gt=0, lt=2**31, strict=True, multiple_of=2)]


class LipschitzMLP(Lipschitz):
    """Spectral dense layers and GroupSort on the flattened input; without hidden layers, a linear classifier."""

    name: Literal["lipschitz_mlp"] = "lipschitz_mlp"
    hidden: tuple[Even, ...] = (128, 64)

    def expand(self, input_shape: tuple[int, ...]) -> tuple[AnyLayer, ...]:
        """Flatten, bound, hidden layers, head."""
        return (L.Flatten(name="flatten"), self.bounded(input_shape), *self.hidden_layers(self.hidden), self.head())


class LipschitzCNN(Lipschitz):
    """Stages of spectral convolution, GroupSort and L2-norm pooling, then dense layers."""

    name: Literal["lipschitz_cnn"] = "lipschitz_cnn"
    stages: tuple[tuple[Even, ...], ...] = ((16,), (32,), (64,))
    kernel_size: PositiveInt = 3
    pool: Literal["scaled_l2_norm_pool", "scaled_avg_pool", "max_pool"] = "scaled_l2_norm_pool"
    hidden: tuple[Even, ...] = (128,)

    def expand(self, input_shape: tuple[int, ...]) -> tuple[AnyLayer, ...]:
        """Bound, stages, dense layers, head."""
        layers: list[AnyLayer] = [self.bounded(input_shape)]
        for s, stage in enumerate(self.stages, 1):
            for c, filters in enumerate(stage, 1):
                name = f"{s}_{c}"
                layers += [
                    self.conv(f"conv{name}", filters, self.kernel_size),
                    *self.offset(f"bias{name}"),
                    L.GroupSort(name=f"sort{name}"),
                ]
            pool = L.Pool(type="max_pool", name=f"pool{s}") if self.pool == "max_pool" else L.ScaledPool(type=self.pool, name=f"pool{s}")
            layers.append(pool)
        return (*layers, L.Flatten(name="flatten"), *self.hidden_layers(self.hidden), self.head())


class LipschitzResNet(Lipschitz):
    """Residual blocks of spectral convolutions; ``convex`` halves the sum of path and shortcut, which keeps the block 1-Lipschitz."""

    name: Literal["lipschitz_resnet"] = "lipschitz_resnet"
    width: Even = 16
    blocks: tuple[PositiveInt, ...] = (1, 1, 1)
    mode: Literal["add", "convex"] = "convex"
    hidden: tuple[Even, ...] = ()

    def expand(self, input_shape: tuple[int, ...]) -> tuple[AnyLayer, ...]:
        """Bound, stem, stages of residual blocks with pooling and widening between them, head."""
        layers: list[AnyLayer] = [self.bounded(input_shape), self.conv("stem", self.width), L.GroupSort(name="stem_sort")]
        for s, count in enumerate(self.blocks, 1):
            filters = self.width * 2 ** (s - 1)
            if s > 1:
                layers += [L.ScaledPool(type="scaled_l2_norm_pool", name=f"pool{s}"), self.conv(f"widen{s}", filters, kernel=1)]
            for b in range(1, count + 1):
                body = (self.conv("conv1", filters), *self.offset("bias1"), L.GroupSort(name="sort"), self.conv("conv2", filters))
                layers += [L.Residual(name=f"stage{s}_block{b}", body=body, mode=self.mode), L.GroupSort(name=f"stage{s}_sort{b}")]
        layers += [L.ScaledPool(type="scaled_l2_norm_pool", name="last_pool"), L.Flatten(name="flatten")]
        return (*layers, *self.hidden_layers(self.hidden), self.head())


class LipschitzMixer(Lipschitz):
    """MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601) of spectral dense layers over patches and over channels."""

    name: Literal["lipschitz_mixer"] = "lipschitz_mixer"
    patch: PositiveInt = 4
    dim: Even = 64
    depth: PositiveInt = 2
    token_hidden: Even = 64
    channel_hidden: Even = 64
    mode: Literal["add", "convex"] = "convex"

    def expand(self, input_shape: tuple[int, ...]) -> tuple[AnyLayer, ...]:
        """Bound, patches, embedding, mixer blocks, head."""
        tokens = math.prod(n // self.patch for n in input_shape[:2])
        layers: list[AnyLayer] = [self.bounded(input_shape), L.Patches(name="patches", size=self.patch), self.dense("embed", self.dim)]
        flip = L.Permute(name="flip", dims=(2, 1))
        for i in range(1, self.depth + 1):
            across = (
                flip, self.dense("fc1", self.token_hidden), L.GroupSort(name="sort"), self.dense("fc2", tokens),
                flip.model_copy(update={"name": "back"}),
            )  # fmt: skip
            within = (self.dense("fc1", self.channel_hidden), L.GroupSort(name="sort"), self.dense("fc2", self.dim))
            layers += [L.Residual(name=f"tokens{i}", body=across, mode=self.mode)]
            layers += [L.Residual(name=f"channels{i}", body=within, mode=self.mode)]
        return (*layers, L.Flatten(name="flatten"), self.head())


class Layers(ModelSpec):
    """A plain list of layers."""

    name: Literal["layers"] = "layers"
    layers: tuple[AnyLayer, ...]

    def expand(self, input_shape: tuple[int, ...]) -> tuple[AnyLayer, ...]:
        """The list as it stands."""
        return self.layers


class Given(ModelSpec):
    """No specification: a native model is passed to ``train`` or ``plan``."""

    name: Literal["given"] = "given"

    def expand(self, input_shape: tuple[int, ...]) -> tuple[AnyLayer, ...]:
        """There is nothing to expand.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("model 'given' stands for a native model: pass it as train(config, model=...), or name a specification.")


ModelConfig = Annotated[
    MLP | CNN | ResNet18GN | TransformerEncoder | ViTTiny | LipschitzMLP | LipschitzCNN | LipschitzResNet | LipschitzMixer | Layers | Given,
    Field(discriminator="name"),
]


def initial_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The starting value of one weight in the exchange layout (torch's names and axes).

    Args:
        name: dotted name, ending in ``weight`` or ``bias``.
        shape: torch's shape: ``[p, D]``, ``[p, D/groups, *kernel]``, transposed ``[D, p, *kernel]``, embeddings ``[V, D]``.
        seed: the config's public seed.
    Returns:
        float32 array: zeros for a bias, pi/2 for an angle, ones for a scale, N(0, 0.02) for a table of positions
        (``...embedding.weight``), else uniform with variance ``2 / (fan_in + fan_out)`` (Glorot and Bengio 2010), tables of tokens
        included.
    """
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    if name.endswith("theta"):
        return np.full(shape, math.pi / 2, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    if name.endswith("embedding.weight"):
        return rng.normal(0.0, 0.02, shape).astype(np.float32)
    taps = math.prod(shape[2:])
    limit = math.sqrt(6.0 / ((shape[0] + shape[1]) * taps))
    return rng.uniform(-limit, limit, shape).astype(np.float32)


Weights = dict[str, np.ndarray]


def initial_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    """Starting values for all weights of a model.

    Args:
        shapes: exchange name -> shape.
        seed: the config's public seed.
    Returns:
        Exchange name -> array.
    """
    return {name: initial_weight(name, tuple(shape), seed) for name, shape in shapes.items()}


def outputs(layer: L.Dense | L.SpectralDense | L.FrobeniusDense, num_classes: int) -> int:
    """The number of units of a dense layer, with ``num_classes`` filled in."""
    return num_classes if layer.units == "num_classes" else int(layer.units)


def check_weights(given: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise if weights do not fit a model.

    Args:
        given: exchange name -> array.
        expected: exchange name -> shape.
    Raises:
        RunError: names or shapes differ.
    """
    from dptrain.errors import RunError

    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in expected]
    problems += [
        f"{name} has shape {tuple(given[name].shape)} in place of {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != tuple(shape)
    ]
    if problems:
        raise RunError("The weights do not fit the model: " + "; ".join(problems[:10]) + ".")
