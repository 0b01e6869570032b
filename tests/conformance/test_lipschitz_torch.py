"""The Lipschitz layers of torch: constants against exact Jacobians, independence of examples, the graph, the losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptrain_torch as api
from dptrain import layer_specs as L
from dptrain.bounds import RULES, backward, forward
from dptrain.errors import ConfigError
from dptrain.losses import LOSSES, LossConfig
from dptrain_torch.graph import assign, graph, weights
from dptrain_torch.layers import (
    Abs,
    BoundedBias,
    BoundedInput,
    FrobeniusLinear,
    FullSort,
    GroupSort,
    Householder,
    LayerCentering,
    LossGradientClip,
    MixerBlock,
    Patches,
    Permute,
    Reshape,
    Residual,
    ScaledAvgPool2d,
    ScaledGlobalAvgPool2d,
    ScaledGlobalL2NormPool2d,
    ScaledL2NormPool2d,
    SpectralConv1d,
    SpectralConv2d,
    SpectralLinear,
)
from dptrain_torch.losses import get_loss
from dptrain_torch.models import build, get_weights, set_weights

D = torch.float64
TINY = 1e-9
Make = Callable[[], nn.Module]


def rand(*shape: int, seed: int = 0) -> Tensor:
    """A reproducible array."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def turned() -> nn.Module:
    """A Householder away from its starting angle."""
    module = Householder(4)
    nn.init.uniform_(module.theta, -3.0, 3.0)
    return module


# name -> layer, shapes of one example it takes, Lipschitz constant, whether |output| <= constant |input|
UNIT: dict[str, tuple[Make, list[tuple[int, ...]], float, bool]] = {
    "bounded_input": (lambda: BoundedInput(1.5), [(7,), (3, 4), (2, 3, 4), (2, 2, 2, 3)], 1.0, True),
    "group_sort": (GroupSort, [(6,), (4, 5), (4, 3, 3), (4, 2, 2, 2)], 1.0, True),
    "group_sort_last": (lambda: GroupSort(2, dim=-1), [(6,), (5, 4), (3, 3, 4)], 1.0, True),
    "group_sort_3": (lambda: GroupSort(3), [(6,), (6, 3), (6, 2, 2), (3, 2, 2, 2)], 1.0, True),
    "full_sort": (FullSort, [(6,), (4, 5), (4, 3, 3), (4, 2, 2, 2)], 1.0, True),
    "householder": (lambda: Householder(4), [(4,), (4, 5), (4, 3, 3), (4, 2, 2, 2)], 1.0, True),
    "householder_turned": (turned, [(4,), (4, 5)], 1.0, True),
    "abs": (Abs, [(6,), (2, 3), (2, 3, 2), (2, 2, 2, 2)], 1.0, True),
    "centering": (LayerCentering, [(6,), (2, 5), (2, 3, 3), (2, 2, 2, 3)], 1.0, True),
    "l2_pool": (ScaledL2NormPool2d, [(2, 4, 4), (1, 5, 7)], 1.0, False),
    "l2_pool_wide": (lambda: ScaledL2NormPool2d((2, 3)), [(2, 4, 7)], 1.0, False),
    "avg_pool": (ScaledAvgPool2d, [(2, 4, 4), (1, 5, 7)], 1.0, True),
    "global_l2_pool": (ScaledGlobalL2NormPool2d, [(3, 5), (2, 3, 4)], 1.0, False),
    "global_avg_pool": (ScaledGlobalAvgPool2d, [(3, 5), (2, 3, 4)], 1.0, True),
    "max_pool": (lambda: nn.MaxPool2d(2), [(2, 4, 4)], 1.0, True),
    "reshape": (lambda: Reshape((3, 4)), [(12,), (2, 6)], 1.0, True),
    "permute": (lambda: Permute((3, 1, 2)), [(2, 3, 4)], 1.0, True),
    "patches": (lambda: Patches(2), [(3, 4, 2)], 1.0, True),
    "loss_gradient_clip": (lambda: LossGradientClip(1e6), [(4,), (2, 3)], 1.0, True),
    "bias": (lambda: BoundedBias(2), [(2,), (2, 3), (2, 3, 3)], 1.0, True),
}
CASES = [pytest.param(make, s, c, home, id=f"{n}-{s}") for n, (make, shapes, c, home) in UNIT.items() for s in shapes]


def jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """Jacobian of one example, flattened."""
    j = torch.autograd.functional.jacobian(lambda v: module(v[None]).flatten(), x)
    return j.reshape(-1, x.numel())


def places(shape: tuple[int, ...]) -> list[Tensor]:
    """Random, zero, constant, half constant, large and small inputs."""
    ties = rand(*shape, seed=3).round()
    return [rand(*shape), torch.zeros(shape, dtype=D), torch.ones(shape, dtype=D), -torch.ones(shape, dtype=D), ties,
            1e8 * rand(*shape, seed=1), 1e-8 * rand(*shape, seed=2)]  # fmt: skip


@pytest.mark.parametrize(("make", "shape", "constant", "home"), CASES)
def test_jacobian_and_output_norms(make: Make, shape: tuple[int, ...], constant: float, home: bool) -> None:
    torch.manual_seed(0)
    module = make().double()
    for x in places(shape):
        j = jacobian(module, x)
        assert j.isfinite().all()
        assert torch.linalg.matrix_norm(j, 2) <= constant * (1 + TINY)
        z = module(x[None])[0]
        epsilon = z.numel() * getattr(module, "eps", 0.0)
        assert z.norm() ** 2 <= (constant * x.norm() * (1 + TINY)) ** 2 + epsilon * (1 + TINY)
        assert home is not hasattr(module, "eps")
        y = x + 1e-3 * max(1.0, float(x.norm())) * rand(*shape, seed=9)
        assert (module(y[None]) - module(x[None])).norm() <= constant * (y - x).norm() * (1 + 1e-6)


@pytest.mark.parametrize("make", [GroupSort, lambda: GroupSort(3), FullSort, lambda: GroupSort(2, -1)])
@pytest.mark.parametrize("shape", [(6,), (6, 6)])
def test_sorting_has_a_permutation_as_its_jacobian_at_ties_too(make: Make, shape: tuple[int, ...]) -> None:
    for x in places(shape):
        j = jacobian(make(), x)
        assert set(j.unique().tolist()) <= {0.0, 1.0}
        assert (j.sum(0) == 1).all() and (j.sum(1) == 1).all()


def test_sorted_values() -> None:
    x = rand(5, 6, 3, 3)
    for size in (2, 3):
        expected = x.unflatten(1, (-1, size)).sort(2)[0].flatten(1, 2)
        assert torch.equal(GroupSort(size)(x), expected)
        assert torch.equal(GroupSort(size, dim=-1)(x.movedim(1, -1)), expected.movedim(1, -1))
        last = x.to(memory_format=torch.channels_last)
        assert torch.equal(GroupSort(size)(last), expected)
    for dtype in (torch.float32, torch.bfloat16):
        y = x.to(dtype)
        assert torch.equal(GroupSort()(y), y.unflatten(1, (-1, 2)).sort(2)[0].flatten(1, 2))
    first, second = x.chunk(2, 1)
    expected = torch.cat((torch.minimum(first, second), torch.maximum(first, second)), 1)
    torch.testing.assert_close(Householder(6, dtype=D)(x), expected, rtol=0, atol=1e-12)


def test_the_pair_sort_can_be_differentiated_twice_and_mapped() -> None:
    x = rand(3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v: GroupSort()(v) ** 3, (x,))
    assert torch.equal(torch.func.vmap(lambda v: GroupSort()(v[None])[0])(x), GroupSort()(x))
    assert torch.equal(torch.func.vmap(lambda v: BoundedInput(0.1)(v[None])[0])(x), BoundedInput(0.1)(x))


@pytest.mark.parametrize(
    "axis_layer", [GroupSort(2, 0), FullSort(0), FullSort(-2), LayerCentering(0), LayerCentering((1, -2)), BoundedBias(4, dim=-2)]
)
def test_no_layer_works_along_the_batch(axis_layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="axis 0 holds the examples"):
        axis_layer(torch.zeros(4, 4))


def test_bad_settings_are_refused() -> None:
    for make in (
        lambda: BoundedInput(0.0), lambda: BoundedInput(math.inf), lambda: LossGradientClip(-1.0),
        lambda: SpectralLinear(2, 2, lipschitz=0.0),
        lambda: GroupSort(1), lambda: Householder(3), lambda: ScaledL2NormPool2d(eps=0.0), lambda: Permute((0, 1)),
        lambda: BoundedBias(2, max_norm=0.0),
        lambda: SpectralConv1d(2, 2, 3, padding="causal"), lambda: Residual(mode="mean"), lambda: MixerBlock(4, 4, 3),
        lambda: GroupSort(4)(torch.zeros(2, 6)), lambda: Patches(3)(torch.zeros(2, 1, 4, 4)), lambda: BoundedBias(3)(torch.zeros(2, 4)),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            make()


# --- inputs and cotangents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (3, 40, 40), (100_000,)])
def test_no_input_leaves_the_ball(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    top = torch.finfo(dtype).max
    x = rand(9, *shape).to(dtype)
    x[1] *= 1e4
    x[2], x[3] = top, -top / 3
    x[4] = 0.0
    x[5].view(-1)[1], x[6].view(-1)[0], x[7].view(-1)[2] = math.nan, math.inf, -math.inf
    x[8] = torch.finfo(dtype).tiny / 4
    for norm in (1e-3, 1.0, 300.0):
        z = BoundedInput(norm)(x)
        lengths = z.double().flatten(1).norm(dim=1)
        assert z.dtype == dtype and z.isfinite().all()
        assert (lengths <= norm).all()
        assert (lengths[1:4] >= norm * (0.97 if dtype == torch.bfloat16 else 1 - 1e-5)).all()
        assert (z[4:8] == 0).all()
        assert torch.equal(z[8], x[8])
    small = rand(2, *shape).to(dtype)
    assert torch.equal(BoundedInput(1e4)(small), small)


def test_the_gradient_of_a_bounded_input_is_that_of_the_projection() -> None:
    x = 3 * rand(4, 5)
    assert torch.autograd.gradcheck(BoundedInput(1.0), (x.requires_grad_(),))
    x = torch.stack([torch.zeros(3), torch.full((3,), math.nan), torch.full((3,), 1e38)]).requires_grad_()
    (g,) = torch.autograd.grad(BoundedInput(1.0)(x).sum(), x)
    assert g.isfinite().all() and (g[1] == 0).all()
    assert BoundedInput(1.0)(torch.full((2, 3), 7, dtype=torch.uint8)).norm(dim=1) == pytest.approx([1.0, 1.0], rel=1e-5)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 3), (1, 2, 2, 2)])
def test_the_loss_gradient_is_clipped_per_example(shape: tuple[int, ...]) -> None:
    x = rand(6, *shape).requires_grad_()
    g = rand(6, *shape, seed=1)
    g[0] *= 1e-3
    g[2] *= 1e200
    g[3].view(-1)[0] = math.nan
    g[4].view(-1)[0] = math.inf
    z = LossGradientClip(0.5)(x)
    assert torch.equal(z, x)
    (clipped,) = torch.autograd.grad(z, x, g)
    n, c = g.flatten(1).norm(dim=1), clipped.flatten(1).norm(dim=1)
    assert torch.equal(clipped[0], g[0]) and (clipped[3:5] == 0).all() and (c <= 0.5).all()
    for i in (1, 5):
        torch.testing.assert_close(clipped[i], g[i] * min(1.0, 0.5 / float(n[i])), rtol=2e-6, atol=0)
    assert c[2] == pytest.approx(0.5, rel=2e-6)


# --- affine maps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize("krd", [(3, 1, 1), (3, 2, 1), (2, 1, 1), (2, 2, 1), (4, 3, 1), (3, 1, 2), (1, 2, 1), (5, 2, 1), (2, 3, 2)])
def test_convolutions_pad_as_tensorflow_does(n: int, padding: Any, krd: tuple[int, int, int]) -> None:
    k, r, d = krd
    layer: Any = (SpectralConv1d, SpectralConv2d)[n - 1](2, 3, k, r, padding, d).double()
    plain: Any = (F.conv1d, F.conv2d)[n - 1]
    nn.init.normal_(layer.bias)
    for size in (7, 8, 9):
        x = rand(2, 2, *(size + i for i in range(n)))
        if padding == "same":  # TensorFlow: total = max((ceil(n / r) - 1) r + (k - 1) d + 1 - n, 0), the odd one at the end
            totals = [max((math.ceil(s / r) - 1) * r + (k - 1) * d + 1 - s, 0) for s in x.shape[2:]]
            pads = [p for t in reversed(totals) for p in (t // 2, t - t // 2)]
        else:
            pads = [0 if padding == "valid" else 1] * (2 * n)
        expected = plain(F.pad(x, pads), layer.weight, layer.bias, r, 0, d)
        assert torch.equal(layer(x), expected) or torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-12)
        if padding == "same":
            assert layer(x).shape[2:] == tuple(math.ceil(s / r) for s in x.shape[2:])


def test_starting_values() -> None:
    torch.manual_seed(0)
    for layer in (SpectralLinear(6, 4, lipschitz=2.0), SpectralConv2d(3, 5, 3, lipschitz=2.0), SpectralConv1d(3, 5, 3, lipschitz=2.0)):
        values = torch.linalg.svdvals(layer.weight.detach().flatten(1))
        assert values.tolist() == pytest.approx([2.0] * len(values), rel=1e-5)
        assert (layer.bias == 0).all()
    assert float(FrobeniusLinear(6, 4, norm=0.5).weight.detach().norm()) == pytest.approx(0.5, rel=1e-5)
    assert FrobeniusLinear(6, 4, norm=0.5, disjoint_neurons=True).weight.norm(dim=1).tolist() == pytest.approx([0.5] * 4, rel=1e-5)
    assert SpectralLinear(3, 3, bias=False).bias is None and SpectralConv2d(3, 3, 1, bias=False).bias is None
    assert (Householder(4).theta == math.pi / 2).all() and (BoundedBias(3).bias == 0).all()
    assert isinstance(SpectralLinear(2, 2), nn.Linear) and isinstance(SpectralConv2d(2, 2, 1), nn.Conv2d)


def test_the_bias_is_divided_by_the_root_of_the_positions() -> None:
    layer = BoundedBias(3).double()
    nn.init.normal_(layer.bias)
    for shape in ((3,), (3, 5), (3, 4, 5)):
        x = rand(2, *shape)
        added = (layer(x) - x).detach()
        assert float(added[0].norm()) == pytest.approx(float(layer.bias.detach().norm()), rel=1e-12)
    last = BoundedBias(3, dim=-1).double()
    last.bias = layer.bias
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), layer(x))


# --- independence ---------------------------------------------------------------------------------------------------------

MIXED: dict[str, tuple[Make, list[tuple[int, ...]]]] = {name: (make, shapes) for name, (make, shapes, _, _) in UNIT.items()} | {
    "linear": (lambda: SpectralLinear(4, 3), [(4,), (5, 4), (2, 3, 4), (2, 2, 2, 4)]),
    "frobenius": (lambda: FrobeniusLinear(4, 3), [(4,), (5, 4)]),
    "conv1d": (lambda: SpectralConv1d(2, 3, 3, 2, "same"), [(2, 7)]),
    "conv2d": (lambda: SpectralConv2d(2, 3, 3, padding="same"), [(2, 5, 5)]),
    "residual": (lambda: Residual(SpectralLinear(4, 4), GroupSort(), mode="convex"), [(4,)]),
    "mixer": (lambda: MixerBlock(5, 4), [(5, 4)]),
}
INDEPENDENT = [pytest.param(make, shape, id=f"{name}-{shape}") for name, (make, shapes) in MIXED.items() for shape in shapes]


@pytest.mark.parametrize(("make", "shape"), INDEPENDENT)
@pytest.mark.parametrize("poison", ["other", "nan", "inf", "huge"])
def test_no_example_touches_another(make: Make, shape: tuple[int, ...], poison: str) -> None:
    torch.manual_seed(0)
    module = make().double()
    x, g = rand(4, *shape), None
    y = x.clone()
    y[1] = {"other": 5 * rand(*shape, seed=7), "nan": torch.tensor(math.nan), "inf": torch.tensor(math.inf), "huge": torch.tensor(1e300)}[
        poison
    ]
    outputs, gradients = [], []
    for value in (x, y):
        value.requires_grad_()
        z = module(value)
        g = rand(*z.shape, seed=5) if g is None else g
        if poison != "other" and value is y:
            g = g.clone()
            g[1] = math.nan
        outputs.append(z.detach()), gradients.append(torch.autograd.grad(z, value, g)[0])
    others = [0, 2, 3]
    assert torch.equal(outputs[0][others], outputs[1][others])
    assert torch.equal(gradients[0][others], gradients[1][others])


# --- per-sample norms -----------------------------------------------------------------------------------------------------


def image_model() -> nn.Module:
    """All layers for images."""
    return nn.Sequential(
        BoundedInput(2.0), SpectralConv2d(2, 4, 3, 2, "same"), GroupSort(), BoundedBias(4),
        SpectralConv2d(4, 4, 2, padding="same", dilation=2),
        Householder(4), LayerCentering(), SpectralConv2d(4, 6, 1, 2), ScaledL2NormPool2d(), Abs(), ScaledGlobalAvgPool2d(),
        FrobeniusLinear(6, 4), BoundedBias(4), LossGradientClip(0.05), SpectralLinear(4, 3), LossGradientClip(0.7),
    )  # fmt: skip


def sequence_model() -> nn.Module:
    """All layers for sequences."""
    return nn.Sequential(
        Patches(2), MixerBlock(16, 8, 10), BoundedBias(8, dim=-1), Permute((2, 1)), SpectralConv1d(8, 4, 3, 2, "same"), FullSort(),
        Residual(SpectralConv1d(4, 4, 3, padding=1), GroupSort(), mode="convex"), ScaledGlobalL2NormPool2d(), SpectralLinear(4, 3),
    )  # fmt: skip


@pytest.mark.parametrize("make", [image_model, sequence_model])
@pytest.mark.parametrize("strategy", ["ghost", "mixed_ghost", "per_sample"])
def test_ghost_norms_are_exact(make: Make, strategy: str) -> None:
    torch.manual_seed(0)
    model = make().double()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.3, 0.5)
    x, y, loss = rand(5, 2, 8, 8), torch.tensor([0, 1, 2, 0, 1]), get_loss("cross_entropy")
    norms = api.per_sample_norms(model, loss, x, y, strategy)
    for i in range(len(x)):
        gradients = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]).sum(), list(model.parameters()))
        assert float(norms[i]) == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients)), rel=1e-9)
    kinds = {layer.name: layer.kind for layer in api.describe(model, x).layers}
    assert "generic" not in {kind for name, kind in kinds.items() if not isinstance(model.get_submodule(name), Householder)}


# --- the graph ------------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A forward as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = BoundedInput(1.0)
        self.fc = SpectralLinear(8, 8)
        self.tied = SpectralLinear(8, 8, bias=False)
        self.tied.weight = self.fc.weight
        self.act, self.drop = GroupSort(), nn.Dropout(0.25)
        self.mean = Residual(SpectralLinear(8, 8), nn.ReLU(), mode="convex")
        self.head = SpectralLinear(16, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual by hand, a layer called twice, tied weights, concatenation, a mean of two."""
        x = self.clip(x)
        x = x.view(x.size(0), -1)
        for _ in range(2):
            x = x + self.act(self.fc(x))
        x = self.mean(self.drop(0.5 * (self.tied(x) + F.relu(x)) / 2))
        return self.head(torch.cat([x, torch.tanh(x.reshape(x.shape[0], 2, 4).transpose(1, 2).flatten(1))], dim=1))


def test_the_graph_of_a_forward_as_users_write_it() -> None:
    model = Own()
    found = graph(model, torch.zeros(2, 2, 4))
    assert found.problems == ()
    nodes = {node.name: node for node in found.nodes}
    assert found.output.name == "head" and nodes["input"].kind == "input"
    assert nodes["fc"].params == nodes["fc#2"].params == {"weight": "fc.weight", "bias": "fc.bias"}
    assert nodes["tied"].params == {"weight": "fc.weight"} and nodes["head"].frozen == ("bias",)
    assert nodes["add"].inputs == ("view", "act") and nodes["add"].attrs["coefficients"] == (1.0, 1.0)
    assert nodes["fc#2"].inputs == ("add",) and nodes["drop"].attrs == {"rate": 0.25}
    assert nodes["mean.add"].attrs["coefficients"] == (0.5, 0.5) and nodes["mean.add"].inputs == ("mean.1", "drop")
    assert [nodes[n].attrs["factor"] for n in ("mul", "truediv")] == [0.5, 0.5]
    assert {n.kind for n in found.nodes} <= set(RULES) | {"input"}
    assert list(weights(model, found)) == ["fc.weight", "fc.bias", "mean.0.weight", "mean.0.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize(("make", "shape"), [(image_model, (2, 8, 8)), (sequence_model, (2, 8, 8)), (Own, (2, 4))])
def test_the_bounds_of_the_graph_hold(make: Make, shape: tuple[int, ...]) -> None:
    """Largest gradients over hostile examples against the bounds from exact norms; tightness is the core's affair."""
    torch.manual_seed(0)
    model = make().double().eval()
    model.requires_grad_(True)
    found = graph(model, torch.zeros(2, *shape, dtype=D))
    assert found.problems == ()
    exact: dict[str, float] = {}
    for node in found.nodes:
        for role, name in node.params.items():
            w = model.get_parameter(name).detach()
            if role == "weight" and node.kind == "conv":
                space = (*node.attrs["space"],)
                bare = nn.Sequential(model.get_submodule(node.name.split("#")[0]))
                j = jacobian(bare, torch.zeros(w.shape[1], *space, dtype=D))
                exact[f"{node.name}.{role}"] = float(torch.linalg.matrix_norm(j, 2))
            else:
                exact[f"{node.name}.{role}"] = float(torch.linalg.matrix_norm(w, 2) if w.dim() > 1 else w.norm())
    loss = get_loss("cross_entropy")
    bounds = forward(found, exact, input_bound=3.0)
    cotangents = backward(found, bounds, math.sqrt(2))
    delta: dict[str, float] = {}
    for node in found.nodes:
        for role, name in node.params.items():
            delta[name] = delta.get(name, 0.0) + bounds[node.name].sensitivity[role] * cotangents[node.name]
    for scale in (0.0, 1e-3, 1.0, 30.0):
        x = rand(3, *shape) * scale
        x = x * (3.0 / x.flatten(1).norm(dim=1).clamp(min=3.0)).view(-1, *[1] * len(shape))
        for i, target in itertools.product(range(3), range(3)):
            value = loss(model(x[i : i + 1]), torch.tensor([target])).sum()
            for (name, p), g in zip(model.named_parameters(), torch.autograd.grad(value, list(model.parameters())), strict=True):
                assert float(g.norm()) <= delta[name] * (1 + 1e-9), (name, p.shape)


def problems(model: nn.Module, *shape: int) -> str:
    """All sentences."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    found = graph(model, torch.zeros(2, *shape))
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules()) or found.problems
    return "\n".join(found.problems)


class Calls(nn.Module):
    """A forward from a function of the module and x."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **children: Any) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        """Call it."""
        return self.function(self, x)


class Louder(SpectralLinear):
    """Overrides forward."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice."""
        return 2 * super().forward(x)


class Sneaky(SpectralConv2d):
    """Overrides what forward calls."""

    def pads(self, space: Any) -> Any:
        """More."""
        return ((5, 5), (5, 5))


class Named(SpectralLinear):
    """Inherits everything."""

    def __init__(self) -> None:
        super().__init__(4, 4)


REFUSED_LAYERS = [
    (nn.Linear(4, 4), (4,), "layer '0' (Linear) has no proven bound; use SpectralLinear"),
    (nn.Conv2d(4, 4, 1), (4, 3, 3), "use SpectralConv2d"),
    (nn.Conv1d(4, 4, 1), (4, 3), "use SpectralConv1d"),
    (nn.Conv3d(4, 4, 1), (4, 3, 3, 3), "only SpectralConv1d and SpectralConv2d"),
    (nn.BatchNorm1d(4), (4,), "use LayerCentering"),
    (nn.LayerNorm(4), (4,), "use LayerCentering"),
    (nn.GroupNorm(2, 4), (4, 3), "use LayerCentering"),
    (nn.InstanceNorm1d(4), (4, 3), "use LayerCentering"),
    (nn.RMSNorm(4), (4,), "use LayerCentering"),
    (nn.Softmax(1), (4,), "the loss takes logits; remove it"),
    (nn.MaxPool2d(3, padding=1), (4, 6, 6), "set padding=0"),
    (nn.MaxPool2d(2, dilation=2), (4, 6, 6), "set dilation=1"),
    (nn.MaxPool2d(2, ceil_mode=True), (4, 5, 5), "ceil_mode=False"),
    (nn.AvgPool2d(3, padding=1), (4, 6, 6), "set padding=0"),
    (nn.AvgPool2d(2, divisor_override=1), (4, 6, 6), "divisor_override=None"),
    (nn.AdaptiveAvgPool2d(2), (4, 6, 6), "set output_size=1"),
    (nn.LPPool2d(2, 2), (4, 6, 6), "use ScaledL2NormPool2d"),
    (nn.GELU("tanh"), (4,), "set approximate='none'"),
    (nn.ELU(2.0), (4,), "set alpha=1"),
    (nn.Softplus(2.0), (4,), "set beta=1"),
    (nn.PReLU(), (4,), "use GroupSort or ReLU"),
    (nn.ReflectionPad2d(1), (4, 6, 6), "use ZeroPad2d"),
    (nn.Dropout(1.0), (4,), "set p below 1"),
    (nn.Flatten(0), (4,), "keep the examples on the first axis"),
    (nn.ReLU(inplace=True), (4,), "set inplace=False"),
    (Louder(4, 4), (4,), "has no proven bound"),
    (Sneaky(4, 4, 3), (4, 6, 6), "has no proven bound"),
    (nn.Embedding(4, 4), (4,), "its forward fails"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "shape", "sentence"), REFUSED_LAYERS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else ""
)
def test_refused_layers(module: nn.Module, shape: tuple[int, ...], sentence: str) -> None:
    assert sentence in problems(nn.Sequential(module), *shape)


FC = {"fc": (4, 4)}
REFUSED_FORWARDS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "functional linear": (lambda m, x: F.linear(x, m.fc.weight), "uses the tensor 'fc.weight' of the model outside a layer"),
    "parameter": (lambda m, x: m.fc(x) * m.scale, "uses the tensor 'scale'"),
    "product": (lambda m, x: m.fc(x) * x, "must be a tensor times a constant"),
    "quotient": (lambda m, x: 1.0 / m.fc(x), "only division by a constant"),
    "softmax": (lambda m, x: F.softmax(m.fc(x), -1), "the loss takes logits; remove it"),
    "mean": (lambda m, x: x - x.mean(1, keepdim=True), "LayerCentering"),
    "constant": (lambda m, x: m.fc(x) + 1.0, "it adds a constant"),
    "tensor": (lambda m, x: m.fc(x) + torch.ones(4), "uses the tensor '_tensor_constant0'"),
    "broadcast": (lambda m, x: m.fc(x) + m.pool(x.unsqueeze(1)), "adds arrays of different shapes"),
    "alpha": (lambda m, x: torch.add(x, m.fc(x), alpha=3), "remove its keyword arguments"),
    "branch": (lambda m, x: m.fc(x) if x.sum() > 0 else x, "cannot be followed"),
    "training": (lambda m, x: m.fc(x) if m.training else x, "something else in training than in evaluation"),
    "batch statistics": (lambda m, x: m.fc(x) / x.shape[0], "must be a tensor times a constant"),
    "transpose": (lambda m, x: m.fc(x).transpose(0, 1), "keep the examples on the first axis"),
    "fold": (lambda m, x: m.fc(x).reshape(2, -1), "keep the examples on the first axis"),
    "batch concatenation": (lambda m, x: torch.cat([x, m.fc(x)]), "keep the examples on the first axis"),
    "chunk": (lambda m, x: m.fc(x).chunk(2, 1)[0], "(chunk) has no proven bound"),
    "tuple": (lambda m, x: (m.fc(x), x), "its output must be one tensor"),
    "item": (lambda m, x: m.fc(x) * x.max().item(), "has no proven bound"),
    "unused and in place": (lambda m, x: (h := m.fc(x), h.mul_(100.0), h)[2], "(mul_) has no proven bound"),
    "in place on a shared array": (lambda m, x: (h := m.fc(x), r := F.relu(h, inplace=True), h + r)[2], "works in place"),
    "in place on the input": (lambda m, x: F.relu(x, inplace=True), "works in place"),
    "no dependence": (lambda m, x: torch.zeros(2, 4), "uses the tensor '_tensor_constant0'"),
    "no tensor": (lambda m, x: 3.0, "must be one tensor that depends on its input"),
    "fails": (lambda m, x: m.fc(x.reshape(len(x.shape), 3)), "cannot be followed"),
    "matmul": (lambda m, x: (x.unsqueeze(1) @ m.fc(x).unsqueeze(2)).flatten(1), "products of activations are not Lipschitz"),
    "dropout": (lambda m, x: F.dropout(m.fc(x)), "call an nn.Dropout layer"),
    "two inputs": (lambda m, x: m.both(x, x), "must be called with one tensor"),
}


@pytest.mark.parametrize("name", REFUSED_FORWARDS)
def test_refused_forwards(name: str) -> None:
    function, sentence = REFUSED_FORWARDS[name]
    both = nn.Bilinear(4, 4, 4) if name == "two inputs" else None
    children = {"fc": SpectralLinear(4, 4), "scale": nn.Parameter(torch.ones(4)), "pool": ScaledGlobalAvgPool2d(), "both": both}
    found = problems(Calls(function, **children), 4)
    assert sentence in found or (name == "two inputs" and "use SpectralLinear" in found)


def test_every_problem_is_listed() -> None:
    found = graph(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Softmax(1)), torch.zeros(2, 4))
    assert len(found.problems) == 3
    failing = graph(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(5)), torch.zeros(2, 4))
    assert len(failing.problems) == 3 and "fails on inputs" in failing.problems[0]


def test_objects_that_were_tampered_with_are_refused() -> None:
    def fresh() -> Any:
        return nn.Sequential(SpectralLinear(4, 4), nn.ReLU(), SpectralLinear(4, 3))

    model = fresh()
    model[2].register_forward_hook(lambda m, a, z: 2 * z)
    assert "layer '2' (SpectralLinear): it has hooks" in problems(model, 4)
    model = fresh()
    model.register_forward_pre_hook(lambda m, a: None)
    assert "layer 'model' (Sequential): it has hooks" in problems(model, 4)
    model = fresh()
    model[0].register_full_backward_hook(lambda m, a, b: None)
    assert "it has hooks" in problems(model, 4)
    model = fresh()
    model[0].weight.register_hook(lambda g: 2 * g)
    assert "gradient hook" in problems(model, 4)
    model = fresh()
    torch.nn.utils.parametrizations.spectral_norm(model[0])
    assert "remove the parametrization" in problems(model, 4)
    model = fresh()
    model[0].forward = lambda x: 2 * x
    assert "a method of it was replaced" in problems(model, 4)
    image = nn.Sequential(SpectralConv2d(2, 2, 3))
    image[0].pads = lambda space: ((0, 9), (0, 9))
    assert "a method of it was replaced" in problems(image, 2, 5, 5)
    assert "run one forward pass first" in "".join(graph(nn.Sequential(nn.LazyLinear(3)), torch.zeros(2, 4)).problems)
    assert graph(fresh(), (torch.zeros(2, 4),)).problems == ("layer 'model': it must have one tensor as its input.",)


def test_layers_that_count() -> None:
    model = nn.Sequential(
        nn.ZeroPad2d(1), nn.PixelUnshuffle(2), SpectralConv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.AvgPool2d(2, 1), nn.Dropout2d(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Unflatten(1, (2, 4)), nn.Flatten(), Named(),
    )  # fmt: skip
    model[-1] = nn.Sequential(SpectralLinear(8, 4), nn.LeakyReLU(0.1), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.Sigmoid(), Named())
    found = graph(model, torch.zeros(2, 2, 10, 10))
    assert found.problems == ()
    kinds = {node.name: node.kind for node in found.nodes}
    assert kinds["3"] == "relu" and kinds["7"] == "global_avg_pool" and kinds["11.7"] == "linear" and kinds["1"] == "permute"
    assert found.nodes[5].attrs == {"kernel": (2, 2), "strides": (2, 2)} and set(kinds.values()) <= set(RULES) | {"input"}
    conv = next(node for node in found.nodes if node.kind == "conv")
    assert conv.attrs == {
        "positions": 36, "kernel": (3, 3), "strides": (1, 1), "dilation": (1, 1), "space": (6, 6), "fan_out": 8, "constraint": "orthogonal",
        "radius": 1.0, "bias_radius": 1.0,
    }  # fmt: skip
    root = graph(SpectralLinear(4, 3), torch.zeros(2, 4))
    assert root.output.name == "model" and root.output.params == {"weight": "weight", "bias": "bias"}
    tangled = graph(nn.Sequential(), torch.zeros(2, 4))
    assert tangled.problems == () and [n.kind for n in tangled.nodes] == ["input"]


def test_constraints_in_the_graph() -> None:
    model = nn.Sequential(
        SpectralLinear(4, 4, orthogonal=False, lipschitz=2.0), FrobeniusLinear(4, 4, norm=3.0),
        FrobeniusLinear(4, 4, disjoint_neurons=True, max_bias_norm=0.1), BoundedBias(4, max_norm=0.2),
    )  # fmt: skip
    attrs = [dict(node.attrs) for node in graph(model, torch.zeros(2, 4)).nodes[1:]]
    assert [(a.get("constraint"), a["radius"]) for a in attrs] == [("spectral", 2.0), ("frobenius", 3.0), ("rows", 1.0), (None, 0.2)]
    assert attrs[2]["bias_radius"] == 0.1 and attrs[3]["positions"] == 1
    mixer = graph(MixerBlock(5, 4, mode="add"), torch.zeros(2, 5, 4))
    positions = {n.name: n.attrs["positions"] for n in mixer.nodes if n.kind == "linear"}
    assert positions == {"token1": 4, "token2": 4, "channel1": 5, "channel2": 5} and mixer.problems == ()


def test_weights_go_out_and_come_back() -> None:
    model = Own()
    found = graph(model, torch.zeros(2, 2, 4))
    arrays = weights(model, found)
    arrays["fc.weight"][:] = 7.0
    assert not (model.fc.weight == 7).any()
    assign(model, {"fc.weight": arrays["fc.weight"].astype(np.float64)})
    assert (model.tied.weight == 7).all() and model.fc.weight.dtype == torch.float32


# --- specifications -------------------------------------------------------------------------------------------------------

SPECS: tuple[Any, ...] = (
    L.BoundedInput(norm=2.0),
    L.SpectralConv(type="spectral_conv2d", name="conv1", filters=4, kernel_size=3, strides=2),
    L.GroupSort(),
    L.BoundedBias(),
    L.LayerCentering(),
    L.Residual(
        name="block", mode="convex",
        body=(L.SpectralConv(type="spectral_conv2d", name="conv", filters=4, kernel_size=2, dilation=2), L.Householder(name="turn")),
    ),
    L.ScaledPool(type="scaled_l2_norm_pool"),
    L.Activation(function="abs"),
    L.Patches(size=2),
    L.Permute(dims=(2, 1)),
    L.SpectralConv(type="spectral_conv1d", name="conv2", filters=6, kernel_size=2, padding="valid"),
    L.GroupSort(type="full_sort"),
    L.ScaledGlobalPool(type="scaled_global_l2_norm_pool"),
    L.Reshape(shape=(2, 3)),
    L.Flatten(),
    L.FrobeniusDense(name="fc", units=4, norm=1.5),
    L.SpectralDense(name="head", units="num_classes", lipschitz=0.9),
    L.LossGradientClip(norm=0.3),
)  # fmt: skip


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    """The same function, channels last throughout, from the weights alone."""
    p = dict(model.named_parameters())

    def convolve(x: Tensor, name: str, pads: list[int], **settings: Any) -> Tensor:
        function: Any = F.conv1d if x.dim() == 3 else F.conv2d
        return function(F.pad(x.movedim(-1, 1), pads), p[name + ".weight"], p[name + ".bias"], **settings).movedim(1, -1)

    x = x * (2.0 / x.flatten(1).norm(dim=1).clamp(min=2.0)).view(-1, 1, 1, 1) * (1 - 1e-6)
    x = convolve(x, "conv1", [0, 1, 0, 1], stride=2)  # 8 x 8: the odd row comes last
    x = x.unflatten(-1, (2, 2)).sort(-1)[0].flatten(-2)
    x = x + p["bounded_bias_3.bias"] / 4
    x = x - x.mean((1, 2), keepdim=True)
    h = convolve(x, "block.conv", [1, 1, 1, 1], dilation=2)
    a, b = h.chunk(2, -1)
    theta = p["block.turn.theta"]
    keep = a * (theta / 2).sin() <= b * (theta / 2).cos()
    h = torch.cat([torch.where(keep, a, a * theta.cos() + b * theta.sin()), torch.where(keep, b, a * theta.sin() - b * theta.cos())], -1)
    x = (x + h) / 2
    x = (x.unflatten(2, (2, 2)).unflatten(1, (2, 2)).square().sum((2, 4)) + 1e-6).sqrt().abs()
    x = x.unfold(1, 2, 2).unfold(2, 2, 2).permute(0, 1, 2, 4, 5, 3).reshape(len(x), 1, -1).transpose(1, 2)
    x = convolve(x, "conv2", [0, 0]).sort(-1)[0]
    x = (x.square().sum(1) + 1e-6).sqrt()
    x = x @ p["fc.weight"].T + p["fc.bias"]
    return x @ p["head.weight"].T + p["head.bias"]


def test_specifications_build_what_they_say() -> None:
    torch.manual_seed(0)
    model = build(SPECS, (8, 8, 2), 3).double()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.1, 0.4)
    x = rand(3, 8, 8, 2)
    torch.testing.assert_close(model(x), by_hand(model, x), rtol=1e-5, atol=1e-6)
    found = graph(model, x)
    assert found.problems == ()
    named = {node.name: node for node in found.nodes if node.params}
    assert list(named) == ["conv1", "bounded_bias_3", "block.conv", "block.turn", "conv2", "fc", "head"]
    assert named["head"].attrs["radius"] == 0.9 and named["bounded_bias_3"].attrs["positions"] == 16
    assert named["block.conv"].attrs["space"] == (4, 4) and found.output.kind == "loss_gradient_clip"
    assert {node.kind for node in found.nodes} <= set(RULES) | {"input"}
    saved = get_weights(model)
    set_weights(model, {k: v + 1 for k, v in saved.items()})
    assert np.array_equal(get_weights(model)["conv1.weight"], saved["conv1.weight"] + 1)
    layouts = [name for name, m in model.named_modules() if type(m).__name__.startswith("Channels")]
    assert layouts == [
        "conv1_layout", "block_layout", "block.conv_layout", "block.layout_last", "scaled_l2_norm_pool_6_layout", "patches_8_layout",
        "conv2_layout",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "shape", "sentence"),
    [
        (L.GroupSort(size=4), (6,), "do not divide"),
        (L.Householder(), (3,), "pairs channels"),
        (L.Patches(size=3), (8, 8, 1), "do not divide"),
        (L.Reshape(shape=(5,)), (6,), "another number"),
        (L.Permute(dims=(1, 3)), (2, 3), "once"),
        (L.ScaledPool(type="scaled_avg_pool"), (4, 3), "needs an image"),
        (L.ScaledPool(type="scaled_avg_pool", size=9), (4, 4, 3), "larger"),
        (L.ScaledGlobalPool(type="scaled_global_avg_pool"), (4,), "no axis"),
        (L.SpectralConv(type="spectral_conv2d", filters=2, kernel_size=3), (4, 2), "2 spatial axes"),
        (L.SpectralConv(type="spectral_conv1d", filters=2, kernel_size=5, padding="valid"), (4, 2), "reaches over"),
    ],
)
def test_specifications_that_do_not_fit(spec: Any, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build((spec,), shape, 3)


def test_old_specifications_have_their_graph_too() -> None:
    specs = (
        L.Dense(name="fc", units=6, activation="softplus"), L.Activation(function="linear"), L.GlobalAvgPool(), L.Dense(units="num_classes")
    )  # fmt: skip
    found = graph(build(specs, (4, 4, 2), 3), torch.zeros(2, 4, 4, 2))
    assert len(found.problems) == 2 and all("(Linear) has no proven bound" in sentence for sentence in found.problems)
    assert [node.kind for node in found.nodes if node.kind != "unproven"] == ["input", "softplus", "identity", "global_avg_pool"]


# --- losses ---------------------------------------------------------------------------------------------------------------

PRIORS = (0.5, 0.3, 0.2)
CONFIGS = [
    LossConfig(name="cross_entropy"), LossConfig(name="cross_entropy", temperature=20.0), LossConfig(name="binary_cross_entropy"),
    LossConfig(name="binary_cross_entropy", temperature=3.0), LossConfig(name="mean_absolute_error"), LossConfig(name="multiclass_hinge"),
    LossConfig(name="multiclass_hinge", margin=4.0), LossConfig(name="cosine_similarity"),
    LossConfig(name="cosine_similarity", min_norm=0.2),
    LossConfig(name="kr"), LossConfig(name="kr", priors=PRIORS), LossConfig(name="hkr"), LossConfig(name="hkr", priors=PRIORS, alpha=2.0),
]  # fmt: skip


def output_counts(config: LossConfig) -> list[int]:
    """Numbers of outputs that fit a loss."""
    if config.name == "binary_cross_entropy":
        return [1]
    if config.priors is not None:
        return [3]
    return [1, 2, 3, 10] if config.name in ("multiclass_hinge", "kr", "hkr", "mean_absolute_error") else [2, 3, 10]


LOSS_CASES = [pytest.param(config, k, id=f"{config.name}-{i}-{k}") for i, config in enumerate(CONFIGS) for k in output_counts(config)]


def gradients(loss: Any, z: Tensor, y: Tensor) -> Tensor:
    """Gradient of every example's loss in its output."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z, y).sum(), z)[0]


@pytest.mark.parametrize(("config", "k"), LOSS_CASES)
def test_the_lipschitz_constant_of_a_loss_holds_and_is_attained(config: LossConfig, k: int) -> None:
    loss = get_loss(config, k)
    constant = loss.lipschitz(k)
    assert loss.config is config and constant is not None
    largest = 0.0
    for scale, dtype in itertools.product((0.0, 1e-3, 0.1, 1.0, 10.0, 1e4, 1e30), (torch.float32, D)):
        z = (rand(400, k) * scale).to(dtype)
        z[:k] = torch.where(torch.eye(k, dtype=torch.bool), torch.tensor(-scale), torch.tensor(scale)).to(dtype)  # all wrong
        for target in range(max(k, 2)):
            y = torch.full((len(z),), target)
            values = rand(*z.shape, seed=2).to(dtype) if LOSSES[config.name].targets == "values" else y
            g = gradients(loss, z, values)
            assert g.isfinite().all()
            largest = max(largest, float(g.double().norm(dim=1).max()))
    assert largest <= constant * (1 + 1e-5)
    assert largest >= 0.97 * constant


@pytest.mark.parametrize(("config", "k"), LOSS_CASES)
def test_losses_treat_examples_alone(config: LossConfig, k: int) -> None:
    loss, z = get_loss(config), rand(6, k)
    classes = LOSSES[config.name].targets == "classes"
    y = torch.tensor([0, 1, 1, 0, 1, 0]) % max(k, 2) if classes else rand(6, k, seed=1)
    other, labels = z.clone(), y.clone()
    other[2] = math.nan
    labels[2] = 1 - labels[2]
    keep = [0, 1, 3, 4, 5]
    assert loss(z, y).shape == (6,)
    assert torch.equal(loss(z, y)[keep], loss(other, labels)[keep])
    assert torch.equal(gradients(loss, z, y)[keep], gradients(loss, other, labels)[keep])
    alone = torch.cat([loss(z[i : i + 1], y[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, loss(z, y))
    if k == 1 and classes:
        torch.testing.assert_close(loss(z[:, 0], y), loss(z, y))
        torch.testing.assert_close(loss(z, y[:, None]), loss(z, y))


def test_values_of_the_losses() -> None:
    z, y = rand(5, 3), torch.tensor([0, 2, 1, 1, 0])
    u = F.one_hot(y, 3).double()
    s, c = 2 * u - 1, 1 + u
    pi = torch.tensor(PRIORS, dtype=D)
    hinge = (c * (2.0 - s * z).clamp(min=0)).mean(1)
    wasserstein = (z * (1 - u) / (1 - pi) - z * u / pi).mean(1)
    expected = {
        LossConfig(name="multiclass_hinge", margin=4.0): hinge,
        LossConfig(name="kr", priors=PRIORS): wasserstein,
        LossConfig(name="hkr", priors=PRIORS, margin=4.0, alpha=3.0): wasserstein + 3 * hinge,
        LossConfig(name="cosine_similarity", min_norm=0.1): -(u * z).sum(1) / z.norm(dim=1).clamp(min=0.1),
        LossConfig(name="cosine_similarity", min_norm=50.0): -(u * z).sum(1) / 50,
        LossConfig(name="cross_entropy", temperature=4.0): F.cross_entropy(4 * z, y, reduction="none") / 4,
    }
    for config, value in expected.items():
        torch.testing.assert_close(get_loss(config)(z, y), value)
    one, label = z[:, 0], torch.tensor([0, 1, 1, 0, 1])
    binary = torch.where(label == 1, -one / 0.25, one / 0.75)
    torch.testing.assert_close(get_loss(LossConfig(name="kr", priors=(0.75, 0.25)))(one, label), binary)
    torch.testing.assert_close(get_loss("multiclass_hinge")(one, label), (0.5 - (2 * label - 1) * one).clamp(min=0))
    torch.testing.assert_close(
        get_loss(LossConfig(name="binary_cross_entropy", temperature=2.0))(one, label),
        F.binary_cross_entropy_with_logits(2 * one, label.double(), reduction="none") / 2,
    )


def test_losses_that_do_not_exist_or_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="There is no loss 'nothing'"):
        get_loss("nothing")
    with pytest.raises(ConfigError, match="give one per class"):
        get_loss(LossConfig(name="kr", priors=PRIORS), 4)
    assert get_loss("mean_squared_error").lipschitz(3) is None
