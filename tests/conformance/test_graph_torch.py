"""The graph that torch models are proven from, and the models of specifications."""

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

from dptrain import layer_specs as L
from dptrain.bounds import RULES, backward, forward
from dptrain.errors import ConfigError
from dptrain_torch.graph import assign, graph, weights
from dptrain_torch.layers import (
    BoundedBias,
    BoundedInput,
    FrobeniusLinear,
    GroupSort,
    MixerBlock,
    Residual,
    ScaledGlobalAvgPool2d,
    SpectralConv2d,
    SpectralLinear,
)
from dptrain_torch.losses import get_loss
from dptrain_torch.models import build, get_weights, set_weights
from tests.conformance.test_lipschitz_torch import D, Make, image_model, jacobian, rand, sequence_model


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
