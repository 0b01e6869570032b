"""Recurrent layers of torch by the cotangents of their gates: every setting against plain autograd, one example at a time."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from dptrain_torch import hooks
from dptrain_torch.describe import describe
from dptrain_torch.engine import full_batch, make_plan
from dptrain_torch.gradients import bounded_sum
from dptrain_torch.hooks import Call, Tap, find_units
from dptrain_torch.recurrent import is_recurrent, recurrent_uses, tensors_given
from dptrain_torch.rules import generic_uses

B, T, D, H = 3, 5, 3, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Uses from gates, and cotangents of what was given, are those of autograd, whichever of the outputs the loss depends on."""
    given = tensors_given(module, args, kwargs)
    assert given is not None
    for x in given:
        x.requires_grad_()
    found = module(*args, **kwargs)
    outputs = [found] if isinstance(found, Tensor) else [found[0], *(found[1] if isinstance(found[1], tuple) else (found[1],))]
    names = [name for name, _ in module.named_parameters()]
    assert is_recurrent(module)
    for chosen in product((False, True), repeat=len(outputs)):
        if any(chosen):
            cotangents = [normal(*z.shape, seed=i) if keep else None for i, (z, keep) in enumerate(zip(outputs, chosen, strict=True))]
            theirs = generic_uses(module, names, args, kwargs, cotangents)
            met = [(z, g) for z, g in zip(outputs, cotangents, strict=True) if g is not None]
            below = torch.autograd.grad([z for z, _ in met], given, [g for _, g in met], retain_graph=True)
            for known in (None, outputs[0].detach()):
                ours = recurrent_uses(module, args, kwargs, cotangents, known)
                assert ours is not None
                for name in names:
                    torch.testing.assert_close(ours[0][name].instantiate(), theirs[name].instantiate(), atol=1e-12, rtol=1e-12)
                for mine, yours in zip(ours[1], below, strict=False):  # of first states that were not given too
                    torch.testing.assert_close(mine, yours, atol=1e-12, rtol=1e-12)
                assert len(ours[1]) >= len(given)


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

    model, x, y = Last().double(), normal(B, T, D), normal(B, H, seed=1)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z * y).sum(1)

    sums = bounded_sum(model, loss, full_batch(x, y), make_plan(model, x, "mixed_ghost", max_grad_norm=1e6)).sums
    loss(model(x), y).sum().backward()
    assert set(sums) == {"layer.weight_hh_l0", "layer.bias_ih_l0", "layer.bias_hh_l0"}
    for name, value in sums.items():
        torch.testing.assert_close(value, model.get_parameter(name).grad)


class Between(nn.Module):
    """A recurrent layer with something trainable below it, and its first state from something trainable too."""

    def __init__(self, layer: nn.Module, states: int) -> None:
        super().__init__()
        self.below, self.layer, self.states = nn.Linear(D, D), layer, states
        self.start, self.head = nn.Linear(D, H), nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.below(x))
        first = torch.tanh(self.start(x[:, 0])).unsqueeze(0)
        out, end = self.layer(h, (None, first, (first, 2 * first))[self.states])
        end = end[0] if isinstance(end, tuple) else end
        return self.head(out.mean(1) + torch.tanh(end[0]))


def squares(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().sum(1)


def model_between(layer: Any, states: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Between(layer(D, H, batch_first=True), states).double(), normal(B, T, D), normal(B, 2, seed=1)


@pytest.mark.parametrize(("layer", "states"), [(nn.LSTM, 0), (nn.LSTM, 2), (nn.GRU, 0), (nn.GRU, 1), (nn.RNN, 1)])
def test_torchs_own_backward_pass_is_not_run(layer: Any, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers below get their cotangents from the loop that finds those of the gates."""
    model, x, y = model_between(layer, states)
    plan = make_plan(model, x, "mixed_ghost", max_grad_norm=1e6)
    asked: list[int] = []
    monkeypatch.setattr(hooks, "plain_backward", lambda *args: asked.append(1))
    for inputs in (x, x.clone().requires_grad_()):
        sums = bounded_sum(model, squares, full_batch(inputs, y), plan).sums
        expected = torch.autograd.grad(squares(model(x), y).sum(), list(model.parameters()), allow_unused=True)
        assert set(sums) == {name for name, _ in model.named_parameters()}
        for value, theirs in zip(sums.values(), expected, strict=True):
            torch.testing.assert_close(value, torch.zeros_like(value) if theirs is None else theirs, atol=1e-12, rtol=1e-12)
    assert not asked


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_other_backward_passes_are_torchs_own(layer: Any) -> None:
    """Of a penalty of the user's own, say; weights included, and after the tap's pass if the graph is kept, and twice differentiable."""
    model, x, y = model_between(layer, 0)
    units = find_units(model, describe(model, x).layers)
    parameters = [p for name, p in model.named_parameters() if not name.startswith("start")]
    expected = torch.autograd.grad(squares(model(x), y).sum(), parameters, create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in expected), parameters)
    with torch.enable_grad(), Tap(units, B, first=0) as tap:
        loss = squares(model(x), y).sum()
    before = torch.autograd.grad(loss, parameters, retain_graph=True)
    twice = torch.autograd.grad(loss, parameters, create_graph=True)
    deep = torch.autograd.grad(sum(g.square().sum() for g in twice), parameters, retain_graph=True)
    arrived: list[str] = []
    tap.backward(loss, lambda call: arrived.append(call.unit.name), retain_graph=True)
    after = torch.autograd.grad(loss, parameters)
    assert arrived == ["head", "layer", "below"]
    for found, theirs in ((before, expected), (twice, expected), (after, expected), (deep, again)):
        for mine, yours in zip(found, theirs, strict=True):
            torch.testing.assert_close(mine, yours, atol=1e-12, rtol=1e-12)
