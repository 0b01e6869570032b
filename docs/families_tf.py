"""Builders of small models of each family, for the table in ``docs/models.md`` and for the tests.

``FAMILIES``: name -> function that returns a built model and a batch of inputs. Weights are random; normalisation over the batch is
replaced by ``dptrain_tf.fix``; everything follows the global dtype policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops

from dptrain_tf import fix

BATCH = 3


def images(size: int = 32, channels: int = 3) -> Any:
    """A batch of images."""
    return np.random.default_rng(0).normal(size=(BATCH, size, size, channels)).astype(keras.config.floatx())


def sequences(*shape: int) -> Any:
    """A batch of real sequences."""
    return np.random.default_rng(0).normal(size=(BATCH, *shape)).astype(keras.config.floatx())


def tokens(length: int, vocabulary: int) -> Any:
    """A batch of token ids."""
    return np.random.default_rng(0).integers(0, vocabulary, (BATCH, length))


# --- convolutional networks -----------------------------------------------------------------------------------------------


def application(name: str, until: str, size: int = 32) -> Callable[[], tuple[Any, Any]]:
    """The first blocks of a model of ``keras.applications``, with a linear head."""

    def build() -> tuple[Any, Any]:
        whole = getattr(keras.applications, name)(weights=None, include_top=False, input_shape=(size, size, 3))
        features = L.GlobalAveragePooling2D()(whole.get_layer(until).output)
        return fix(keras.Model(whole.input, L.Dense(3)(features)), verbose=False), images(size)

    return build


def sequential(shape: tuple[int, ...], *layers: Callable[[], Any]) -> Callable[[], tuple[Any, Any]]:
    """A chain of layers on real inputs."""
    return lambda: (keras.Sequential([L.Input(shape), *(make() for make in layers)]), sequences(*shape))


# --- transformers ---------------------------------------------------------------------------------------------------------


class Block(L.Layer):
    """A transformer block with layer scale: it owns two vectors and calls layers below it."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.width = width
        self.norm1, self.norm2 = L.LayerNormalization(), L.LayerNormalization()
        self.attention = L.MultiHeadAttention(heads, width // heads)
        self.up, self.down, self.drop = L.Dense(2 * width, activation="gelu"), L.Dense(width), L.Dropout(0.1)

    def build(self, shape: Any) -> None:
        self.scale1 = self.add_weight(name="scale1", shape=(self.width,), initializer="ones")
        self.scale2 = self.add_weight(name="scale2", shape=(self.width,), initializer="ones")

    def call(self, x: Any) -> Any:
        h = self.norm1(x)
        x = x + self.drop(self.attention(h, h)) * self.scale1
        return x + self.drop(self.down(self.up(self.norm2(x)))) * self.scale2


class ViT(keras.Model):
    """A vision transformer; the model itself owns the class token and the position embedding."""

    def __init__(self, size: int = 8, patch: int = 4, width: int = 8, depth: int = 1) -> None:
        super().__init__()
        self.count, self.width = (size // patch) ** 2, width
        self.patches = L.Conv2D(width, patch, strides=patch)
        self.blocks = [Block(width) for _ in range(depth)]
        self.norm, self.head = L.LayerNormalization(), L.Dense(3)
        self.token = self.add_weight(name="token", shape=(1, 1, width), initializer="random_normal")
        self.positions = self.add_weight(name="positions", shape=(1, self.count + 1, width), initializer="random_normal")

    def call(self, x: Any) -> Any:
        x = self.patches(x)
        x = ops.reshape(x, (-1, self.count, self.width))
        x = ops.concatenate([ops.broadcast_to(self.token, (ops.shape(x)[0], 1, self.width)), x], axis=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class WindowAttention(L.Layer):
    """Attention within windows ``[B * windows, tokens, width]`` with a table of relative position biases, as in Swin."""

    def __init__(self, window: int, width: int, heads: int) -> None:
        super().__init__()
        self.window, self.width, self.heads = window, width, heads
        self.qkv, self.out, self.drop = L.Dense(3 * width), L.Dense(width), L.Dropout(0.1)
        place = np.stack(np.meshgrid(range(window), range(window), indexing="ij"), -1).reshape(-1, 2)
        offset = place[:, None] - place[None] + window - 1
        self.index = (offset[..., 0] * (2 * window - 1) + offset[..., 1]).ravel()

    def build(self, shape: Any) -> None:
        self.table = self.add_weight(name="table", shape=((2 * self.window - 1) ** 2, self.heads), initializer="random_normal")

    def call(self, x: Any) -> Any:
        count = self.window**2
        q, k, v = ops.split(ops.reshape(self.qkv(x), (-1, count, self.heads, 3 * self.width // self.heads)), 3, axis=-1)
        scores = ops.einsum("bqhd,bkhd->bhqk", q, k) / (self.width // self.heads) ** 0.5
        bias = ops.transpose(ops.reshape(ops.take(self.table, self.index, axis=0), (count, count, self.heads)), (2, 0, 1))
        h = ops.einsum("bhqk,bkhd->bqhd", self.drop(ops.softmax(scores + bias)), v)
        return self.out(ops.reshape(h, (-1, count, self.width)))


class Swin(keras.Model):
    """Two blocks of window attention, the second one shifted; inside them the first axis is ``B * windows``."""

    def __init__(self, size: int = 8, patch: int = 2, window: int = 2, width: int = 8) -> None:
        super().__init__()
        self.size, self.window, self.width = size // patch, window, width
        self.patches = L.Conv2D(width, patch, strides=patch)
        self.norms = [L.LayerNormalization() for _ in range(2)]
        self.attention = [WindowAttention(window, width, 2) for _ in range(2)]
        self.mix, self.head = L.Dense(width, activation="gelu"), L.Dense(3)

    def call(self, x: Any) -> Any:
        n, w, c = self.size // self.window, self.window, self.width
        x = self.patches(x)
        for i in range(2):
            h = ops.roll(self.norms[i](x), (-i, -i), axis=(1, 2))
            h = ops.transpose(ops.reshape(h, (-1, n, w, n, w, c)), (0, 1, 3, 2, 4, 5))
            h = self.mix(self.attention[i](ops.reshape(h, (-1, w * w, c))))
            h = ops.transpose(ops.reshape(h, (-1, n, n, w, w, c)), (0, 1, 3, 2, 4, 5))
            x = x + ops.roll(ops.reshape(h, (-1, self.size, self.size, c)), (i, i), axis=(1, 2))
        return self.head(ops.mean(x, axis=(1, 2)))


class TextModel(keras.Model):
    """Token and position embeddings; the positions are looked up with ids that have no batch axis."""

    def __init__(self, length: int = 6, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.tokens, self.places = L.Embedding(vocabulary, width), L.Embedding(length, width)
        self.block, self.head = Block(width), L.Dense(3)

    def call(self, ids: Any) -> Any:
        return self.head(ops.mean(self.block(self.tokens(ids) + self.places(ops.arange(ids.shape[1]))), axis=1))


class Frames(keras.Model):
    """A convolutional network on each frame of a clip, with the frames folded into the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = L.Conv2D(4, 3, strides=2, activation="relu"), L.DepthwiseConv2D(2)
        self.norm, self.fc, self.head = L.GroupNormalization(2), L.Dense(5, activation="tanh"), L.Dense(2)

    def call(self, x: Any) -> Any:
        frames = x.shape[1]
        h = self.norm(self.depthwise(self.conv(ops.reshape(x, (-1, *x.shape[2:])))))
        h = self.fc(ops.reshape(h, (-1, int(np.prod(h.shape[1:])))))
        return self.head(ops.reshape(h, (-1, frames * 5)))


def text() -> tuple[Any, Any]:
    ids = tokens(6, 11)
    model = TextModel()
    model(ids)
    return model, ids


def subclassed(make: Callable[[], Any], x: Callable[[], Any]) -> Callable[[], tuple[Any, Any]]:
    """A subclassed model, built by a call."""

    def build() -> tuple[Any, Any]:
        model, inputs = make(), x()
        model(inputs)
        return model, inputs

    return build


def attention(layer: Callable[[], Any]) -> Callable[[], tuple[Any, Any]]:
    """A residual attention block between two layers."""

    def build() -> tuple[Any, Any]:
        x = L.Input((5, 8))
        h = L.Dense(8)(x)
        return keras.Model(x, L.Dense(2)(L.LayerNormalization()(h + layer()(h, h)))), sequences(5, 8)

    return build


def tied() -> tuple[Any, Any]:
    """A language model whose output matrix is its embedding table."""
    ids, table = L.Input((6,), dtype="int32"), L.ReversibleEmbedding(11, 8)
    return keras.Model(ids, table(Block(8)(table(ids)), reverse=True)), tokens(6, 11)


def lora() -> tuple[Any, Any]:
    """Low-rank updates of a frozen transformer's dense layers, and its trainable head."""
    model, x = text()
    for layer in model._flatten_layers():
        if isinstance(layer, L.Dense | L.EinsumDense) and layer is not model.head:
            layer.enable_lora(2)
        elif not list(layer._flatten_layers(include_self=False, recursive=False)) and layer is not model.head:
            layer.trainable = False
    return model, x


def bert() -> tuple[Any, Any]:
    """``keras_hub.models.BertBackbone`` with a head on the pooled output."""
    import keras_hub

    body = keras_hub.models.BertBackbone(
        vocabulary_size=17, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16, max_sequence_length=6, dropout=0.1
    )
    model = keras.Model(body.input, L.Dense(3)(body.output["pooled_output"]))
    mask = np.ones((BATCH, 6), int)
    mask[1, 4:] = 0
    return model, {"token_ids": tokens(6, 17), "segment_ids": tokens(6, 2), "padding_mask": mask}


def gpt2() -> tuple[Any, Any]:
    """``keras_hub.models.GPT2Backbone`` with its table as output matrix."""
    import keras_hub

    body = keras_hub.models.GPT2Backbone(
        vocabulary_size=17, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16, max_sequence_length=6, dropout=0.1
    )
    model = keras.Model(body.input, body.token_embedding(body.output, reverse=True))
    return model, {"token_ids": tokens(6, 17), "padding_mask": np.ones((BATCH, 6), int)}


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "keras.applications MobileNetV2": application("MobileNetV2", "block_2_add"),
    "keras.applications ResNet50V2": application("ResNet50V2", "conv3_block1_out"),
    "keras.applications EfficientNetB0": application("EfficientNetB0", "block2b_add"),
    "keras.applications DenseNet121": application("DenseNet121", "conv2_block2_concat"),
    "keras.applications ConvNeXtTiny": application("ConvNeXtTiny", "convnext_tiny_stage_0_block_0_identity"),
    "SeparableConv1D, SeparableConv2D": sequential(
        (8, 8, 3), lambda: L.SeparableConv2D(4, 3), lambda: L.Reshape((6, 24)), lambda: L.SeparableConv1D(3, 2, padding="same")
    ),
    "DepthwiseConv1D, DepthwiseConv2D": sequential(
        (8, 8, 3), lambda: L.DepthwiseConv2D(3, depth_multiplier=2), lambda: L.Reshape((6, 36)), lambda: L.DepthwiseConv1D(2, strides=2)
    ),
    "Conv1DTranspose, Conv2DTranspose, Conv3DTranspose": sequential(
        (3, 3, 2), lambda: L.Conv2DTranspose(3, 3, strides=2, padding="same"), lambda: L.Reshape((6, 18)),
        lambda: L.Conv1DTranspose(4, 3), lambda: L.Reshape((2, 4, 2, 2)), lambda: L.Conv3DTranspose(2, 2),
    ),
    "LSTM": sequential((4, 3), lambda: L.LSTM(3), lambda: L.Dense(2)),
    "Bidirectional GRU": sequential((4, 3), lambda: L.Bidirectional(L.GRU(2)), lambda: L.Dense(2)),
    "TimeDistributed": sequential((4, 3), lambda: L.TimeDistributed(L.Dense(2)), lambda: L.Dense(2)),
    "MultiHeadAttention": attention(lambda: L.MultiHeadAttention(2, 4)),
    "GroupQueryAttention": attention(lambda: L.GroupQueryAttention(4, 4, 2)),
    "Keras ViT with a class token": subclassed(ViT, lambda: images(8)),
    "Keras Swin": subclassed(Swin, lambda: images(8)),
    "Keras text transformer": text,
    "frames folded into the batch": subclassed(Frames, lambda: sequences(2, 8, 8, 3)),
    "tied embeddings (ReversibleEmbedding)": tied,
    "LoRA": lora,
    "keras_hub BERT": bert,
    "keras_hub GPT-2": gpt2,
}  # fmt: skip
