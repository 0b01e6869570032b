"""Recurrent layers of torch by the cotangents of their gates: every setting against plain autograd, one example at a time."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from dptrain_torch.describe import describe
from dptrain_torch.gradients import bounded_sum
from dptrain_torch.hooks import Call, Tap, find_units
from dptrain_torch.recurrent import is_recurrent, recurrent_uses
from dptrain_torch.rules import generic_uses

B, T, D, H = 3, 5, 3, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The uses from gates are those of autograd, whichever of the outputs the loss depends on."""
    found = module(*args, **kwargs)
    outputs = [found] if isinstance(found, Tensor) else [found[0], *(found[1] if isinstance(found[1], tuple) else (found[1],))]
    names = [name for name, _ in module.named_parameters()]
    assert is_recurrent(module)
    for chosen in product((False, True), repeat=len(outputs)):
        if any(chosen):
            cotangents = [normal(*z.shape, seed=i) if keep else None for i, (z, keep) in enumerate(zip(outputs, chosen, strict=True))]
            theirs = generic_uses(module, names, args, kwargs, cotangents)
            for ours, name in product(
                (recurrent_uses(module, args, kwargs, cotangents, known) for known in (None, outputs[0].detach())), names
            ):
                assert ours is not None
                torch.testing.assert_close(ours[name].instantiate(), theirs[name].instantiate(), atol=1e-12, rtol=1e-12)


SETTINGS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
]
LAYERS = [(nn.LSTM, {}), (nn.LSTM, {"proj_size": 2}), (nn.GRU, {}), (nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"})]


@pytest.mark.parametrize("states", ["none", "given", "by name"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("layer", "own"), LAYERS, ids=str)
def test_layers(layer: Any, own: dict[str, Any], settings: dict[str, Any], states: str) -> None:
    module = layer(D, H, **own, **settings).double()
    x = normal(B, T, D) if module.batch_first else normal(T, B, D)
    count = module.num_layers * (2 if module.bidirectional else 1)
    h, c = normal(count, B, module.proj_size or H, seed=1), normal(count, B, H, seed=2)
    first: Any = (h, c) if layer is nn.LSTM else h
    assert_same(module, (x, first) if states == "given" else (x,), {"hx": first} if states == "by name" else {})


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell: Any, bias: bool, states: bool) -> None:
    module, h = cell(D, H, bias=bias).double(), normal(B, H, seed=1)
    args = (normal(B, D), (h, normal(B, H, seed=2)) if cell is nn.LSTMCell else h)
    assert_same(module, args if states else args[:1], {})


def test_states_that_were_written_over_are_computed_again() -> None:
    module, x = nn.GRU(D, H).double(), normal(T, B, D)
    (unit,) = find_units(module)
    with torch.enable_grad(), Tap([unit], B) as tap:
        out = module(x)[0]
    (call,) = tap.calls
    assert isinstance(call, Call)
    call.cotangents = [normal(T, B, H), None]
    expected = {name: use.instantiate() for name, use in call.uses().items()}
    with torch.no_grad():
        out.mul_(3)
    for name, use in call.uses().items():
        torch.testing.assert_close(use.instantiate(), expected[name])


class Own(nn.LSTM):
    def forward(self, *args: Any) -> Any:
        out, state = super().forward(*args)
        return 2 * out, state


@pytest.mark.parametrize(
    "module",
    [
        Own(D, H),
        weight_norm(nn.LSTM(D, H), "weight_hh_l0"),
        spectral_norm(nn.GRU(D, H), "weight_hh_l0"),
        nn.LSTM(D, H, 2, dropout=0.5),
    ],
    ids=["subclass", "weight_norm", "spectral_norm", "dropout"],
)
def test_what_does_something_else_is_not_taken_for_one(module: nn.Module) -> None:
    assert not is_recurrent(module)


def test_a_hook_of_the_users() -> None:
    module = nn.LSTM(D, H)
    module.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    assert not is_recurrent(module)
    assert not find_units(nn.ModuleDict({"layer": module}))[0].recurrent


def test_dropout_counts_in_training_only() -> None:
    assert is_recurrent(nn.LSTM(D, H, 2, dropout=0.5).eval())


def test_facts_of_a_linear_map() -> None:
    """All directions of all layers, as the planner sees them."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(D, H, 2, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0][:, -1]

    (layer,) = describe(Last(), torch.randn(B, T, D)).layers
    sizes = [4 * H * (width + H) for width in (D, D, 2 * H, 2 * H)]
    assert (layer.kind, layer.positions, layer.fan_out) == ("linear", T, 4 * 4 * H)
    assert layer.fan_in == sum(sizes) // layer.fan_out


def test_only_trainable_weights_are_asked_for() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(D, H)
            self.layer.weight_ih_l0.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1))[1][0]

    from dptrain_torch.engine import full_batch, make_plan

    model, x, y = Last().double(), normal(B, T, D), normal(B, H, seed=1)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z * y).sum(1)

    sums = bounded_sum(model, loss, full_batch(x, y), make_plan(model, x, "mixed_ghost", max_grad_norm=1e6)).sums
    loss(model(x), y).sum().backward()
    assert set(sums) == {"layer.weight_hh_l0", "layer.bias_ih_l0", "layer.bias_hh_l0"}
    for name, value in sums.items():
        torch.testing.assert_close(value, model.get_parameter(name).grad)
