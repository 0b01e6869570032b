"""The grad-sample cases of Opacus' test suite, and more of the same kind: layers, shapes and corner cases through the public API."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dptrain_torch import clipped_sum, make_plan, per_sample_norms, uses
from dptrain_torch.engine import full_batch
from dptrain_torch.gradients import bounded_sum
from dptrain_torch.losses import cross_entropy
from tests.conformance.torch_oracle import assert_exact, fill, projection, slow_layers

Y = torch.tensor([0, 1, 2, 0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random input."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(*shape: int, rows: int = 9) -> Tensor:
    """Random indices."""
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(0))


def exact(model: nn.Module, x: Any, batch: int = 4, check: bool = False) -> Any:
    """Exact against the oracle; without the self-check, which has tests of its own."""
    return assert_exact(fill(model), x, Y[:batch], check=check)


# --- convolutions: groups, strides, dilations, every kind of padding ---

CONV1D = [
    (c, out, kernel, stride, padding, dilation, groups)
    for i, (c, out, kernel, stride, padding, dilation, groups) in enumerate(
        itertools.product((1, 3, 8), (2, 3), (2, 3), (1, 2), (0, 2, "same", "valid"), (1, 2), (1, 3))
    )
    if i % 7 == 0 and c % groups == 0 and (out * c) % groups == 0 and not (padding == "same" and stride > 1)
]


@pytest.mark.parametrize("settings", CONV1D, ids=str)
def test_conv1d(settings: tuple[Any, ...]) -> None:
    c, out, kernel, stride, padding, dilation, groups = settings
    exact(nn.Conv1d(c, out * c, kernel, stride, padding, dilation, groups), normal(4, c, 9))


CONV2D = [
    (1, 2, 2, 1, 0, 1, 1), (3, 6, 3, 2, 2, 1, 3), (8, 2, 4, 1, "same", 1, 2), (3, 3, 3, 1, "same", 2, 1), (3, 3, 2, 1, "valid", 3, 3),
    (8, 16, (3, 1), (2, 1), (1, 0), (3, 1), 4), (1, 1, (3, 1), 1, 0, (3, 1), 1), (8, 4, 1, 2, 0, 1, 1),
    (3, 2, (2, 3), (1, 2), (0, 2), (1, 3), 1),
]  # fmt: skip


@pytest.mark.parametrize("settings", CONV2D, ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_conv2d(settings: tuple[Any, ...], batch: int) -> None:
    c, out, kernel, stride, padding, dilation, groups = settings
    exact(nn.Conv2d(c, out, kernel, stride, padding, dilation, groups), normal(batch, c, 11, 13), batch)


CONV3D = [
    (1, 2, 2, 1, 0, 1, 1), (3, 3, (1, 2, 3), (1, 2, 3), (1, 2, 3), 1, 3), (2, 4, 3, 1, "same", (1, 2, 2), 2),
    (3, 2, 2, 2, "valid", (1, 2, 2), 1),
]  # fmt: skip


@pytest.mark.parametrize("settings", CONV3D, ids=str)
def test_conv3d(settings: tuple[Any, ...]) -> None:
    c, out, kernel, stride, padding, dilation, groups = settings
    exact(nn.Conv3d(c, out, kernel, stride, padding, dilation, groups), normal(4, c, 5, 6, 7))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same"])
def test_padding_modes(mode: str, padding: Any) -> None:
    exact(nn.Conv2d(2, 3, 4, padding=padding, padding_mode=mode), normal(4, 2, 7, 8))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), (4, 7)),
        (lambda: nn.ConvTranspose2d(2, 3, (3, 2), (2, 1), 1, (1, 0)), (2, 5, 6)),
        (lambda: nn.ConvTranspose3d(2, 2, 2, dilation=2), (2, 3, 4, 3)),
    ],
)
def test_transposed_convolutions(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    exact(layer(), normal(4, *shape))


# --- linear, embedding, normalisation ---


@pytest.mark.parametrize("shape", [(12,), (3, 12), (3, 2, 12), (2, 2, 2, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    exact(nn.Linear(12, 5, bias=bias), normal(4, *shape))


class Swapped(nn.Module):
    """Gives a module the sequence first, as ``batch_first=False`` layers of other libraries want it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6])
def test_sequence_first_layers(length: int) -> None:
    """Whatever the length, that of a probe and that of the batch included."""
    body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3), nn.RMSNorm(3))
    plan = exact(Swapped(body), normal(4, length, 6), check=True)
    assert slow_layers(plan) == []
    exact(Swapped(nn.Embedding(9, 4)), ids(4, length))


@pytest.mark.parametrize("shape", [(), (5,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("padding", [None, 0, -1])
def test_embedding(shape: tuple[int, ...], padding: int | None) -> None:
    exact(nn.Embedding(9, 4, padding_idx=padding), ids(4, *shape))


class Bags(nn.Module):
    """An ``EmbeddingBag`` called with one flat list of ids, offsets and perhaps weights, made from padded rows (-1 is no id)."""

    def __init__(self, mode: str, **settings: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode=mode, **settings)

    def forward(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        used = rows >= 0
        offsets = nn.functional.pad(used.sum(1).cumsum(0), (1, 0))
        offsets = offsets if self.bag.include_last_offset else offsets[:-1]
        return self.bag(rows[used], offsets, None if weights is None else weights[used])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("settings", [{}, {"padding_idx": 2}, {"include_last_offset": True}], ids=str)
def test_embedding_bag(mode: str, settings: dict[str, Any]) -> None:
    if "include_last_offset" not in settings:
        exact(nn.EmbeddingBag(9, 4, mode=mode, **settings), ids(4, 6))
    rows = ids(4, 5).masked_fill(torch.arange(5) >= torch.tensor([[5], [3], [1], [0]]), -1)
    plan = exact(Bags(mode, **settings), rows, check=True)
    assert slow_layers(plan) == []


def test_embedding_bag_with_weights() -> None:
    exact(nn.EmbeddingBag(9, 4, mode="sum"), {"input": ids(4, 5), "per_sample_weights": normal(4, 5)})
    exact(Bags("sum"), (ids(4, 5), normal(4, 5)))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(5), (5,)), (nn.LayerNorm([3, 5]), (2, 3, 5)), (nn.LayerNorm([2, 3, 5]), (2, 3, 5)),
        (nn.LayerNorm(5, bias=False), (3, 5)),
        (nn.RMSNorm(5), (5,)), (nn.RMSNorm([3, 5]), (2, 3, 5)), (nn.RMSNorm([2, 3, 5]), (2, 3, 5)),
        (nn.GroupNorm(1, 4), (4, 5, 3)), (nn.GroupNorm(4, 8), (8, 3, 4)), (nn.GroupNorm(4, 4), (4, 6)), (nn.GroupNorm(2, 4), (4, 5, 2, 3)),
        (nn.InstanceNorm1d(3, affine=True), (3, 7)), (nn.InstanceNorm2d(3, affine=True), (3, 4, 5)),
        (nn.InstanceNorm3d(2, affine=True), (2, 3, 3, 4)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 4])
def test_normalisation(layer: nn.Module, shape: tuple[int, ...], batch: int) -> None:
    exact(layer, normal(batch, *shape), batch)


# --- attention ---


class Attention(nn.Module):
    """Self- or cross-attention; several inputs, called with keyword arguments."""

    def __init__(self, cross: bool, weights: bool = False, **settings: Any) -> None:
        super().__init__()
        self.first = settings.get("batch_first", False)
        self.attention = nn.MultiheadAttention(4, 2, **settings)
        self.cross, self.weights = cross, weights

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        x, memory = (t if self.first else t.transpose(0, 1) for t in (x, memory))
        other = memory if self.cross else x
        out, weights = self.attention(query=x, key=other, value=other, need_weights=self.weights)
        out = out if self.first else out.transpose(0, 1)
        return {"out": out, "weights": weights} if self.weights else out


ATTENTION: list[dict[str, Any]] = [
    {}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 6, "add_bias_kv": True},
    {"weights": True, "batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
]  # fmt: skip


@pytest.mark.parametrize("settings", ATTENTION, ids=str)
@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_attention(settings: dict[str, Any], cross: bool) -> None:
    width = settings.get("kdim", 4)
    if width != 4 and not cross:
        return
    plan = exact(Attention(cross, **settings), {"x": normal(4, 5, 4), "memory": normal(4, 3, width, seed=1)}, check="kdim" in settings)
    assert slow_layers(plan) == []


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers(first: bool, norm_first: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            settings: dict[str, Any] = {"batch_first": first, "norm_first": norm_first, "dropout": 0.0}
            self.encoder = nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", **settings)
            self.decoder = nn.TransformerDecoderLayer(4, 2, 6, **settings)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            x, z = (t if first else t.transpose(0, 1) for t in (x, z))
            mask = nn.Transformer.generate_square_subsequent_mask(z.shape[1 if first else 0], dtype=z.dtype)
            out = self.decoder(z, self.encoder(x), tgt_mask=mask)
            return out if first else out.transpose(0, 1)

    plan = exact(Both(), (normal(4, 5, 4), normal(4, 4, 4, seed=1)), check=True)
    assert slow_layers(plan) == []


# --- Opacus' own layers, as modules that a user wrote ---


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 4, "vdim": 4}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_opacus_multi_head_attention(settings: dict[str, Any], batch: int) -> None:
    from opacus.layers import DPMultiheadAttention

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = DPMultiheadAttention(4, 2, dropout=0.0, **settings)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(*x.transpose(0, 1).unbind(-1))[0].transpose(0, 1)

    exact(Adapter(), normal(batch, 5, 4, 3), batch)


@pytest.mark.parametrize("name", ["DPRNN", "DPGRU", "DPLSTM"])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"batch_first": False}], ids=str)
def test_opacus_recurrent(name: str, settings: dict[str, Any]) -> None:
    import opacus.layers

    first = settings.get("batch_first", True)
    layer = getattr(opacus.layers, name)(4, 5, **{"batch_first": True, **settings})
    exact(Outputs(layer, first), normal(4, 3, 4))


@pytest.mark.parametrize("first", [True, False])
def test_opacus_sequence_bias(first: bool) -> None:
    from opacus.layers import SequenceBias

    layer = SequenceBias(4, batch_first=first)
    exact(layer if first else Swapped(layer), normal(4, 5, 4))


# --- recurrent layers of torch ---


class Outputs(nn.Module):
    """The sequence of outputs of a recurrent layer, examples first."""

    def __init__(self, layer: nn.Module, first: bool) -> None:
        super().__init__()
        self.layer, self.first = layer, first

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x if self.first else x.transpose(0, 1))[0]
        return out if self.first else out.transpose(0, 1)


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_recurrent(layer: type[nn.Module], settings: dict[str, Any], first: bool) -> None:
    exact(Outputs(layer(4, 5, batch_first=first, **settings), first), normal(4, 3, 4), check=not settings)


def test_recurrent_states_and_projections() -> None:
    class All(nn.Module):
        """States ``[layers, B, D]`` beside the outputs, which are computed from them."""

        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, 2, batch_first=True, proj_size=2)

        def forward(self, x: Tensor) -> Any:
            out, (h, c) = self.lstm(x)
            return out, h.transpose(0, 1), c.transpose(0, 1)

    exact(All(), normal(4, 3, 4), check=True)

    class WithState(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gru = nn.Linear(2, 5), nn.GRU(4, 5, batch_first=True)

        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            return self.gru(x, self.first(s).unsqueeze(0))[0]

    exact(WithState(), (normal(4, 3, 4), normal(4, 2, seed=1)), check=True)


class Packed(nn.Module):
    """Sequences of different lengths, packed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=x.shape[1])[0]


@pytest.mark.parametrize("kind", ["torch", "opacus"])
def test_packed_sequences(kind: str) -> None:
    from opacus.layers import DPLSTM

    layer = nn.LSTM(4, 3, batch_first=True) if kind == "torch" else DPLSTM(4, 3, batch_first=True)
    exact(Packed(layer), (normal(4, 5, 4), torch.tensor([5, 2, 4, 2])))


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells_called_once_per_step(cell: type[nn.Module]) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
            assert state is not None
            return state[0] if isinstance(state, tuple) else state

    exact(Steps(), normal(4, 3, 4))


# --- the rest ---


class TwoInputs(nn.Module):
    """A layer with two inputs and one with a parameter of its own."""

    def __init__(self, slopes: int) -> None:
        super().__init__()
        self.bilinear, self.slope = nn.Bilinear(4, 3, 5), nn.PReLU(slopes)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return self.slope(self.bilinear(one, two))


@pytest.mark.parametrize("slopes", [1, 5])
def test_bilinear_and_prelu(slopes: int) -> None:
    exact(TwoInputs(slopes), (normal(4, 4), normal(4, 3, seed=1)), check=True)


def test_layers_without_parameters() -> None:
    body = nn.Sequential(
        nn.ZeroPad2d(1), nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.PixelShuffle(2), nn.AvgPool2d(2), nn.Unfold(2), nn.Dropout(0.0),
        nn.Flatten(), nn.Unflatten(1, (4, -1)), nn.AdaptiveAvgPool1d(3), nn.Softmax(-1), nn.Linear(3, 2),
    )  # fmt: skip
    exact(body, normal(4, 2, 9, 9), check=True)


def test_batches_of_one_and_of_none() -> None:
    model = fill(nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)))
    assert_exact(model, normal(1, 2, 6), Y[:1])
    norms = per_sample_norms(model, projection, normal(0, 2, 6), Y[:0])
    sums = clipped_sum(model, projection, normal(0, 2, 6), Y[:0])
    assert norms.shape == (0,)
    assert {n: v.shape for n, v in sums.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert not any(v.any() for v in sums.values())


class Nested(nn.Module):
    """Containers in containers, modules in lists and dictionaries, a dictionary of outputs, keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4), "act": nn.Tanh()}) for _ in range(2)])
        self.scales = nn.ParameterList([torch.ones(4), torch.ones(())])
        self.head = nn.Sequential(nn.Sequential(nn.Linear(4, 3)))

    def forward(self, x: Tensor, *, scale: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        for block, own in zip(self.blocks, self.scales, strict=True):
            x = block["act"](input=block["fc"](input=x)) * scale[:, None] * own
        x = x if mask is None else x.masked_fill(mask, 0.0)
        return {"logits": self.head(x), "features": [x]}


def test_nested_modules_and_keyword_arguments() -> None:
    mask = torch.tensor([[True, False, False, True]]).expand(4, 4)
    exact(Nested(), {"x": normal(4, 4), "scale": normal(4, seed=1), "mask": mask}, check=True)


# --- batches folded into other axes, and parameters used by functions ---


class Frames(nn.Module):
    """Several frames per example, folded into the batch axis, examples outermost."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (nn.Conv1d(2, 4, 3, padding=1, groups=2), (2, 5)),
        (nn.Conv2d(2, 3, 2, stride=2, padding="valid"), (2, 4, 5)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 5)),
        (nn.Conv3d(1, 2, 2, dilation=(1, 2, 1)), (1, 3, 4, 3)),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 3, 3)),
        (nn.Sequential(nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)), (4, 5)),
        (nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3), nn.RMSNorm(3)), (4, 5)),
        (nn.Sequential(nn.Linear(5, 3), nn.PReLU(), nn.Linear(3, 2)), (5,)),
        (nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), (3, 4)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_folded_batches(body: nn.Module, shape: tuple[int, ...]) -> None:
    exact(Frames(body), normal(4, 3, *shape), check=True)


class Functional(nn.Module):
    """Parameters of its own in functions that do the work of layers, some of them computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.across, self.low, self.high = (nn.Parameter(normal(*s)) for s in ((4, 4), (4, 5), (5, 2), (2, 5)))
        self.kernel, self.table, self.places = (nn.Parameter(normal(*s)) for s in ((6, 1, 3), (9, 5), (7, 5)))
        self.scale, self.bias, self.shift = (nn.Parameter(normal(*s)) for s in ((5,), (5,), ()))
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        f = nn.functional
        x = torch.tanh(f.linear(x, self.square) @ self.across)  # [B, 3, 5]
        x = x + f.linear(f.linear(x, self.high), self.low) + x @ (self.low @ self.high).t()
        x = f.layer_norm(x, (5,), self.scale.exp(), self.bias) * f.softplus(self.shift)
        x = x + f.embedding(ids, self.table) + f.embedding(torch.arange(3), self.places) + self.places[self.order + 2]
        x = f.group_norm(x.transpose(1, 2), 5, self.scale, self.bias).transpose(1, 2)
        y = f.conv1d(x[:, :, :2].reshape(len(x), 2, 3), self.kernel / self.kernel.norm(), padding="same", groups=2)
        return torch.cat(
            [x.flatten(1), y.flatten(1), torch.addmm(self.bias, x.reshape(-1, 5), self.high.t() @ self.high).view(len(x), -1)], 1
        )


@pytest.mark.parametrize("batch", [1, 4])
def test_parameters_used_by_functions(batch: int) -> None:
    plan = exact(Functional(), (normal(batch, 3, 4), ids(batch, 3)), batch, check=batch > 1)
    assert slow_layers(plan) == []


class Positions(nn.Module):
    """Position embeddings without a batch axis, as small GPTs have them, beside a tied output matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(ids) + self.places(torch.arange(ids.shape[1]))))


@pytest.mark.parametrize("length", [2, 3, 4, 6])
def test_positions_without_a_batch_axis(length: int) -> None:
    plan = exact(Positions(), ids(4, length), check=True)
    assert slow_layers(plan) == []


class Unknown(nn.Module):
    """A parameter in a function that is not followed: the module around it goes by the slow method, the rest does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.mix, self.head = nn.Linear(4, 4), self.Mix(), nn.Linear(4, 3)

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(normal(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("btd,de->bte", x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.fc(x))))


def test_what_cannot_be_followed_is_slow_and_nothing_else() -> None:
    plan = exact(Unknown(), normal(4, 3, 4), check=True)
    assert slow_layers(plan) == ["mix"]


@pytest.mark.parametrize("tile", [1, 500, 1200])
@pytest.mark.parametrize(
    "use",
    [
        uses.LinearUse(normal(7, 5, 4), normal(7, 5, 6, seed=1)),
        uses.LinearUse(normal(7, 1, 4), normal(7, 1, 6, seed=1)),
        uses.ConvUse(normal(7, 4, 6, 5), normal(7, 6, 3, 5, seed=1), (3, 3), (2, 1), (1, 1), 2, ((1, 1), (1, 1))),
    ],
    ids=["linear", "one position", "conv"],
)
def test_norms_that_are_taken_in_turns_are_those_of_all_at_once(use: Any, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = use.instantiate().flatten(1).square().sum(1)
    lengths: list[int] = []
    original = type(use).cut
    monkeypatch.setattr(uses, "TILE", tile)
    monkeypatch.setattr(type(use), "cut", lambda self, a, b: lengths.append(b - a) or original(self, a, b))
    for found in (uses.ghost_norm([use]), uses.instantiated_norm(use)):
        torch.testing.assert_close(found, expected)
    assert tile > 1 or lengths == [1] * 7


@pytest.mark.parametrize("length", [8, 9, 19])
def test_half_of_a_gram_matrix_is_the_whole(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use = uses.LinearUse(normal(5, length, 4), normal(5, length, 6, seed=1))
    whole = use.square()
    monkeypatch.setattr(uses, "HALVED", 4)
    assert len(uses.gram_blocks(use.a)) > 3
    for found, expected in zip(use.square(), whole, strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(whole[0], use.instantiate().flatten(1).square().sum(1))


def test_gram_matrices_are_kept_for_layers_that_read_the_same_input(monkeypatch: pytest.MonkeyPatch) -> None:
    a, other, grams = normal(5, 7, 4), normal(5, 7, 4, seed=1), uses.Grams()
    made: list[int] = []
    original = uses.gram_blocks
    monkeypatch.setattr(uses, "gram_blocks", lambda x: made.append(len(x)) or original(x))
    for x, times in ((a, 1), (a.view(5, 7, 4), 1), (a[:2], 2), (a[:2], 2), (other, 3), (a, 4)):
        torch.testing.assert_close(grams.of(x)[0][0], torch.bmm(x, x.transpose(1, 2)))
        assert len(made) == times
    a.mul_(2)
    torch.testing.assert_close(grams.of(a)[0][0], torch.bmm(a, a.transpose(1, 2)))
    torch.testing.assert_close(grams.of(a.transpose(1, 2))[0][0], torch.bmm(a.transpose(1, 2), a))  # the same memory, read otherwise
    monkeypatch.setattr(uses, "TILE", 1)
    for _ in range(2):
        grams.of(other)
    assert len(made) == 8  # too large to be kept


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "uneven padding": {"pads": ((0, 2), (1, 0))},
    "dilated": {"dilation": (2, 1), "pads": ((2, 2), (1, 1))},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4, "out": 8},
    "reflected": {"mode": "reflect"},
    "wide kernel": {"kernel": (1, 5), "pads": ((0, 0), (2, 2))},
    "strided": {"stride": (2, 1)},
    "strided groups": {"groups": 2, "stride": (2, 2), "size": (9, 6)},
    "strided depthwise": {"groups": 4, "stride": (2, 3), "size": (8, 9), "out": 4, "pads": ((1, 2), (0, 1))},
    "dilated depthwise": {"groups": 4, "dilation": (2, 1), "stride": (1, 2), "kernel": (2, 5), "out": 4, "pads": ((2, 2), (3, 1))},
    "surplus rows": {"groups": 4, "stride": (3, 3), "size": (9, 8), "out": 4, "pads": ((0, 0), (1, 0))},
}


@pytest.mark.parametrize("inner", [False, True], ids=["channels outermost", "channels innermost"])
@pytest.mark.parametrize("window", [1, 700, 1 << 19])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_by_groups_of_examples(name: str, window: int, inner: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "groups": 1, "pads": ((1, 1), (1, 1)), "size": (6, 5)}
    kind = plain | {"mode": "constant", "out": 6} | CONVOLUTIONS[name]
    x, axes = normal(7, 4, *kind["size"]), ("size", "pads", "dilation", "kernel", "stride")
    reach = [1 + (s + sum(p) - d * (k - 1) - 1) // r for s, p, d, k, r in zip(*(kind[axis] for axis in axes), strict=True)]
    g = normal(7, kind["out"], *reach, seed=1)
    if inner:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    use = uses.ConvUse(x, g, kind["kernel"], kind["stride"], kind["dilation"], kind["groups"], kind["pads"], kind["mode"])
    expected = torch.cat(list(use.by_positions()))
    monkeypatch.setattr(uses, "WINDOW", window)
    torch.testing.assert_close(torch.cat(list(use.by_groups())), expected)
    if use.groups == use.shape[0] == x.shape[1]:
        torch.testing.assert_close(torch.cat(list(use.by_cotangents())), expected)
    torch.testing.assert_close(torch.cat(list(use.by_positions())), expected)
    monkeypatch.setattr(uses.ConvUse, "suits_groups", lambda self: True)
    square, kept = uses.instantiated(use)
    w = torch.linspace(0, 1, 7, dtype=x.dtype)
    assert len(kept.pieces) == 7 or window > 1
    torch.testing.assert_close(square, expected.flatten(1).square().sum(1))
    torch.testing.assert_close(kept.weighted_sum(w), torch.tensordot(w, expected, 1))
    torch.testing.assert_close(kept.keep(w > 0.5).weighted_sum(w), torch.tensordot(w * (w > 0.5), expected, 1))


def test_convolutions_by_groups_in_float32() -> None:
    x, g = normal(9, 8, 17, 16).float(), normal(9, 3, 17, 16, seed=1).float()
    use = uses.ConvUse(x, g, (3, 3), (1, 1), (1, 1), 1, ((1, 1), (1, 1)))
    wide = uses.ConvUse(x.double(), g.double(), (3, 3), (1, 1), (1, 1), 1, ((1, 1), (1, 1)))
    assert use.suits_groups() and not wide.suits_groups()
    torch.testing.assert_close(use.instantiate().double(), wide.instantiate(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", [False, True], ids=["channels outermost", "channels innermost"])
@pytest.mark.parametrize(("groups", "out"), [(8, 8), (8, 16), (2, 6)])
@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 1), (8, 3, 2), (9, 5, 3), (7, 7, 1), (5, 2, 2)])
def test_grouped_convolutions_in_float32(size: int, kernel: int, stride: int, groups: int, out: int, inner: bool) -> None:
    low, high = (kernel - 1) // 2, kernel // 2
    count = 1 + (size + low + high - kernel) // stride
    x, g = normal(9, 8, size, size).float(), normal(9, out, count, count, seed=1).float()
    if inner:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    settings = ((kernel, kernel), (stride, stride), (1, 1), groups, ((low, high), (low, high)))
    use, wide = uses.ConvUse(x, g, *settings), uses.ConvUse(x.double(), g.double(), *settings)
    assert use.suits_groups() == (count > 2) and not wide.suits_groups()
    assert use.suits_cotangents() == (groups == out and (count <= 2 or kernel > 3)) and not wide.suits_cotangents()
    torch.testing.assert_close(use.instantiate().double(), wide.instantiate(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", [False, True], ids=["cotangents outermost", "cotangents innermost"])
@pytest.mark.parametrize("window", [1, 1 << 19])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "pads"),
    [
        ((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
        ((8, 8), (2, 2), (1, 1), ((3, 3), (3, 3))),
        ((2, 3), (2, 1), (1, 2), ((0, 2), (1, 0))),
        ((4, 2), (5, 3), (1, 1), ((0, 0), (1, 1))),
        ((12, 11), (1, 1), (1, 1), ((0, 0), (0, 0))),
        ((5,), (1,), (2,), ((4, 4),)),
        ((3,), (2,), (1,), ((0, 1),)),
    ],
)
def test_a_single_channel_in_float32(
    kernel: Any, stride: Any, dilation: Any, pads: Any, window: int, inner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uses, "WINDOW", window)
    size = (12, 11)[: len(kernel)]
    reach = [1 + (s + sum(p) - d * (k - 1) - 1) // r for s, p, d, k, r in zip(size, pads, dilation, kernel, stride, strict=True)]
    x, g = normal(9, 1, *size).float(), normal(9, 5, *reach, seed=1).float()
    if inner:
        g = g.movedim(1, -1).contiguous().movedim(-1, 1)
    use, wide = (uses.ConvUse(a, b, kernel, stride, dilation, 1, pads) for a, b in ((x, g), (x.double(), g.double())))
    assert use.suits_cotangents() == g.is_contiguous() and not wide.suits_cotangents()
    expected = torch.cat(list(wide.by_positions()))
    square, kept = uses.instantiated(use)
    assert len(kept.pieces) == 9 or window > 1
    torch.testing.assert_close(use.instantiate().double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(square.double(), expected.flatten(1).square().sum(1), rtol=1e-5, atol=1e-5)
    w = torch.linspace(0, 1, 9)
    torch.testing.assert_close(kept.weighted_sum(w).double(), torch.tensordot(w.double(), expected, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_sequences_in_float32(stride: int) -> None:
    x, g = normal(9, 6, 31).float(), normal(9, 6, (31 - 11) // stride + 1, seed=1).float()
    settings = ((11,), (stride,), (1,), 6, ((0, 0),))
    use, wide = uses.ConvUse(x, g, *settings), uses.ConvUse(x.double(), g.double(), *settings)
    assert use.suits_cotangents() and not wide.suits_cotangents()
    torch.testing.assert_close(use.instantiate().double(), wide.instantiate(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [False, True], ids=["channels outermost", "channels innermost"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("kernel", "pads"), [(3, (1, 1)), (4, (0, 2)), (1, (0, 0))])
@pytest.mark.parametrize("tile", [1, 1 << 21])
def test_sequences_by_taps(
    kernel: int, pads: tuple[int, int], dilation: int, last: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 11 + sum(pads) - dilation * (kernel - 1)
    x, g = normal(5, 32, 11), normal(5, 6, length, seed=1)
    if last:
        x, g = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, g))
    use = uses.ConvUse(x, g, (kernel,), (1,), (dilation,), 1, (pads,))
    expected = torch.cat(list(use.by_positions()))
    monkeypatch.setattr(uses, "TILE", tile)
    square, kept = uses.instantiated(use)
    assert len(kept.pieces) == (5 if tile == 1 else 1)
    torch.testing.assert_close(kept.instantiate(), expected)
    torch.testing.assert_close(square, expected.flatten(1).square().sum(1))
    w = torch.linspace(0, 1, 5, dtype=x.dtype)
    torch.testing.assert_close(kept.weighted_sum(w), torch.tensordot(w, expected, 1))


@pytest.mark.parametrize("last", [False, True], ids=["channels outermost", "channels innermost"])
@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 1), (4, 1, 2), (8, 2, 1)])
def test_sequences_by_groups_in_float32(groups: int, stride: int, dilation: int, last: bool) -> None:
    count = 1 + (80 + 2 - dilation * 2 - 1) // stride
    x, g = normal(9, 8, 80).float(), normal(9, 16, count, seed=1).float()
    if last:
        x, g = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, g))
    settings = ((3,), (stride,), (dilation,), groups, ((0, 2),))
    use, wide = uses.ConvUse(x, g, *settings), uses.ConvUse(x.double(), g.double(), *settings)
    assert use.suits_groups() and not wide.suits_groups()
    torch.testing.assert_close(use.instantiate().double(), wide.instantiate(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["mixed_ghost", "per_sample"])
@pytest.mark.parametrize("lean", [False, True])
def test_images_of_many_positions_in_float32(strategy: str, lean: bool) -> None:
    """Where the framework's kernels make per-sample gradients; the other tests use float64, which they do not take."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Tanh(), nn.Conv2d(8, 6, 3, groups=2), nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding="same", groups=6, padding_mode="reflect"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    x, y = normal(5, 3, 20, 18).float(), torch.arange(5) % 3
    for inner in (False, True):
        model, images = copy.deepcopy(net), x
        if inner:
            model, images = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload]
        exact = copy.deepcopy(net).double()
        each = [F.cross_entropy(exact(x[i : i + 1].double()), y[i : i + 1]) for i in range(5)]
        gradients = [torch.autograd.grad(loss, list(exact.parameters())) for loss in each]
        norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in gradients])
        clip = float(norms.min() / 2)
        plan = make_plan(model, images, strategy, max_grad_norm=clip)
        found = bounded_sum(model, cross_entropy, full_batch(images, y), plan, lean=lean).sums
        for j, value in enumerate(found.values()):
            expected = sum(clip / norms[i] * gradients[i][j] for i in range(5))
            torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-5 * clip)


class Joined(nn.Module):
    """Two inputs, one of which meets nothing trainable before they are joined, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tanh(self.first(x)), torch.tanh(self.second(torch.cat([x, x[:, :1]], 1) * 2))
        return self.last(torch.relu(self.scale * a) + b)


@pytest.mark.parametrize("strategy", ["mixed_ghost", "per_sample"])
@pytest.mark.parametrize("way", ["leaf", "computed"])
def test_inputs_that_require_a_gradient_hide_nothing(way: str, strategy: str) -> None:
    """Autograd does not run a node because a tensor of the user's own asks for a gradient."""
    torch.manual_seed(0)
    model = Joined().double()
    x, y = normal(5, 3), normal(5, 2, seed=1)
    plan = make_plan(model, x, strategy, max_grad_norm=0.1)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().sum(1)

    expected = bounded_sum(model, loss, full_batch(x, y), plan).sums
    given = x.clone().requires_grad_()
    found = bounded_sum(model, loss, full_batch(given if way == "leaf" else 1.0 * given, y), plan).sums
    for name, value in expected.items():
        assert value.any()
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
