"""The Lipschitz layers of torch: constants against exact Jacobians, independence of examples, the graph, the losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptrain_torch as api
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
