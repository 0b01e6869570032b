"""Networks beside the standard ones, the same in both frameworks: ``dptrain compare --models benchmarks.networks:mobilenet``.

Each is a function of backend, shape of an example and number of outputs, as ``dptrain compare`` calls it. Images have channels last;
token ids stay below 10,000.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

VOCABULARY = 10_000
MOBILE = ((32, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))  # channels and strides
WIDE = ((16, 1), (64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1))

Factory = Callable[[str, tuple[int, ...], int], Any]


def both(of_torch: Callable[[int, int], Any], of_keras: Callable[[Any, int], Any], ids: bool = False) -> Factory:
    """A network from its torch module, given input channels and outputs, and from its Keras layers, given an input tensor and outputs."""

    def make(backend: str, shape: tuple[int, ...], outputs: int) -> Any:
        if backend == "torch":
            return of_torch(shape[-1], outputs) if ids else channels_first(of_torch(shape[-1], outputs))
        import keras

        x = keras.Input(shape, dtype="int32" if ids else "float32")
        return keras.Model(x, of_keras(x, outputs))

    return make


def channels_first(net: Any) -> Any:
    """A torch network behind a layer that puts channels where torch wants them."""
    from torch import nn

    class First(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.movedim(-1, 1)

    return nn.Sequential(First(), net)


# --- depthwise convolutions ---------------------------------------------------------------------------------------------------


def mobilenet_torch(channels: int, outputs: int) -> Any:
    from torch import nn

    def norm(width: int) -> list[Any]:
        return [nn.GroupNorm(8, width), nn.ReLU()]

    layers = [nn.Conv2d(channels, MOBILE[0][0], 3, padding=1, bias=False), *norm(MOBILE[0][0])]
    for (width, _), (wider, stride) in pairwise(MOBILE):
        layers += [nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), *norm(width)]
        layers += [nn.Conv2d(width, wider, 1, bias=False), *norm(wider)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(MOBILE[-1][0], outputs))


def mobilenet_keras(x: Any, outputs: int) -> Any:
    from keras import layers as L

    def norm(x: Any) -> Any:
        return L.ReLU()(L.GroupNormalization(8)(x))

    x = norm(L.Conv2D(MOBILE[0][0], 3, padding="same", use_bias=False)(x))
    for width, stride in MOBILE[1:]:
        x = norm(L.DepthwiseConv2D(3, stride, "same", use_bias=False)(x))
        x = norm(L.Conv2D(width, 1, use_bias=False)(x))
    return L.Dense(outputs)(L.GlobalAveragePooling2D()(x))


# --- a wide residual network --------------------------------------------------------------------------------------------------


def wide_resnet_torch(channels: int, outputs: int) -> Any:
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int, wider: int, stride: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.GroupNorm(16, width), nn.GroupNorm(16, wider)
            self.conv1 = nn.Conv2d(width, wider, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
            same = width == wider and stride == 1
            self.shortcut = nn.Identity() if same else nn.Conv2d(width, wider, 1, stride, bias=False)

        def forward(self, x: Any) -> Any:
            h = self.conv1(F.relu(self.norm1(x)))
            return self.shortcut(x) + self.conv2(F.relu(self.norm2(h)))

    blocks = [Block(width, wider, stride) for (width, _), (wider, stride) in pairwise(WIDE)]
    end = [nn.GroupNorm(16, WIDE[-1][0]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDE[-1][0], outputs)]
    return nn.Sequential(nn.Conv2d(channels, WIDE[0][0], 3, padding=1, bias=False), *blocks, *end)


def wide_resnet_keras(x: Any, outputs: int) -> Any:
    from keras import layers as L

    def conv(x: Any, width: int, stride: int = 1) -> Any:
        return L.Conv2D(width, 3, stride, "same", use_bias=False)(x)

    def norm(x: Any) -> Any:
        return L.ReLU()(L.GroupNormalization(16)(x))

    x = conv(x, WIDE[0][0])
    for (width, _), (wider, stride) in pairwise(WIDE):
        h = conv(norm(conv(norm(x), wider, stride)), wider)
        x = L.Add()([x if width == wider and stride == 1 else L.Conv2D(wider, 1, stride, use_bias=False)(x), h])
    return L.Dense(outputs)(L.GlobalAveragePooling2D()(norm(x)))


# --- text ---------------------------------------------------------------------------------------------------------------------


def text_cnn_torch(length: int, outputs: int) -> Any:
    import torch
    import torch.nn.functional as F
    from torch import nn

    class TextCNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(VOCABULARY, 128), nn.Linear(384, outputs)
            self.convs = nn.ModuleList(nn.Conv1d(128, 128, k, padding="same") for k in (3, 4, 5))

        def forward(self, x: Any) -> Any:
            h = self.embedding(x).transpose(1, 2)
            return self.head(torch.cat([F.relu(conv(h)).amax(2) for conv in self.convs], 1))

    return TextCNN()


def text_cnn_keras(x: Any, outputs: int) -> Any:
    from keras import layers as L

    h = L.Embedding(VOCABULARY, 128)(x)
    found = [L.GlobalMaxPooling1D()(L.Conv1D(128, k, padding="same", activation="relu")(h)) for k in (3, 4, 5)]
    return L.Dense(outputs)(L.Concatenate()(found))


def recurrent_torch(kind: str) -> Callable[[int, int], Any]:
    def build(length: int, outputs: int) -> Any:
        from torch import nn

        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding, self.head = nn.Embedding(VOCABULARY, 64), nn.Linear(128, outputs)
                self.recurrent = getattr(nn, kind)(64, 128, batch_first=True)

            def forward(self, x: Any) -> Any:
                return self.head(self.recurrent(self.embedding(x))[0][:, -1])

        return Recurrent()

    return build


def recurrent_keras(kind: str) -> Callable[[Any, int], Any]:
    def build(x: Any, outputs: int) -> Any:
        from keras import layers as L

        return L.Dense(outputs)(getattr(L, kind)(128)(L.Embedding(VOCABULARY, 64)(x)))

    return build


mobilenet = both(mobilenet_torch, mobilenet_keras)
wide_resnet = both(wide_resnet_torch, wide_resnet_keras)
text_cnn = both(text_cnn_torch, text_cnn_keras, ids=True)
lstm = both(recurrent_torch("LSTM"), recurrent_keras("LSTM"), ids=True)
gru = both(recurrent_torch("GRU"), recurrent_keras("GRU"), ids=True)
