"""Bounds on a graph: the recursion by hand, uses that add up, and everything that must be refused at once."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dptrain.bounds import RULES, backward, forward, output_lipschitz, sensitivities
from dptrain.errors import UnsupportedModelError
from dptrain.info import Graph, Node


def node(
    name: str, kind: str, *inputs: str, size: int = 10, params: dict[str, str] | None = None, frozen: tuple[str, ...] = (), **attrs: Any
) -> Node:
    """One operation."""
    return Node(name, kind, inputs, size, attrs, params or {}, frozen)


def dense(name: str, x: str, weight: str | None = None, positions: int = 1, bias: bool = False, **more: Any) -> Node:
    """A linear layer."""
    params = {"weight": weight or f"{name}.weight"} | ({"bias": f"{name}.bias"} if bias else {})
    return node(name, "linear", x, params=params, positions=positions, **more)


START = (node("x", "input"), node("in", "bounded_input", "x", norm=3.0))


def test_a_chain_by_hand() -> None:
    graph = Graph((*START, dense("a", "in", bias=True, positions=4), node("s", "group_sort", "a"), dense("b", "s", positions=4)))
    certificates = {"a.weight": 0.5, "a.bias": 0.25, "b.weight": 2.0}
    delta = sensitivities(graph, certificates, loss_lipschitz=1.5)
    assert delta == {
        "a.weight": pytest.approx(3.0 * 2.0 * 1.5),
        "a.bias": pytest.approx(math.sqrt(4) * 2.0 * 1.5),
        "b.weight": pytest.approx((0.5 * 3.0 + math.sqrt(4) * 0.25) * 1.5),
    }
    assert output_lipschitz(graph, certificates) == pytest.approx(0.5 * 2.0)


@pytest.mark.parametrize(("mode", "c"), [("add", 1.0), ("convex", 0.5)])
def test_residual_blocks_by_hand(mode: str, c: float) -> None:
    graph = Graph((*START, dense("f", "in"), node("sum", "add", "in", "f", coefficients=(c, c)), dense("head", "sum")))
    certificates = {"f.weight": 0.8, "head.weight": 1.0}
    bounds = forward(graph, certificates)
    assert bounds["sum"].output == pytest.approx(c * (3.0 + 2.4))
    cotangents = backward(graph, bounds, 1.0)
    assert cotangents["f"] == pytest.approx(c)
    assert cotangents["in"] == pytest.approx(c * (1 + 0.8))
    assert sensitivities(graph, certificates, 1.0)["f.weight"] == pytest.approx(3.0 * c)
    assert output_lipschitz(graph, certificates) == pytest.approx(c * 1.8)


def test_uses_of_one_parameter_add_up() -> None:
    """L12: a layer called twice, and a weight that two layers share."""
    graph = Graph((*START, dense("a", "in", weight="w"), dense("a#2", "a", weight="w"), dense("b", "a#2", weight="w")))
    certificates = {"a.weight": 0.5, "a#2.weight": 0.5, "b.weight": 0.5}
    delta = sensitivities(graph, certificates, 1.0)
    assert delta == {"w": pytest.approx(3.0 * 0.25 + 1.5 * 0.5 + 0.75)}


def test_frozen_parameters_have_no_sensitivity_and_still_count() -> None:
    graph = Graph((*START, dense("a", "in", frozen=("weight",)), dense("b", "a")))
    assert sensitivities(graph, {"a.weight": 0.5, "b.weight": 1.0}, 1.0) == {"b.weight": pytest.approx(1.5)}


def test_branches_and_clips() -> None:
    """Cotangents of two consumers add up; a clip inside the network caps what lies before it only."""
    graph = Graph(
        (
            *START, dense("a", "in"), node("clip", "loss_gradient_clip", "a", norm=0.1), dense("left", "clip"), dense("right", "clip"),
            node("both", "concat", "left", "right"),
        )
    )  # fmt: skip
    certificates = {"a.weight": 1.0, "left.weight": 1.0, "right.weight": 2.0}
    bounds = forward(graph, certificates)
    cotangents = backward(graph, bounds, 1.0)
    assert (cotangents["left"], cotangents["right"], cotangents["clip"], cotangents["a"]) == (1.0, 1.0, pytest.approx(3.0), 0.1)
    assert bounds["both"].output == pytest.approx(math.hypot(3.0, 6.0))


def test_convolutions_count_their_windows() -> None:
    """L1 and L2: the kernel's sensitivity has the root of the overlap, the bias that of the positions."""
    conv = node(
        "c", "conv", "in", params={"weight": "w", "bias": "b"}, positions=49, kernel=(3, 3), strides=(2, 2), dilation=(1, 1), space=(14, 14)
    )
    delta = sensitivities(Graph((*START, conv)), {"c.weight": 1.0, "c.bias": 0.0}, 2.0)
    assert delta == {"w": pytest.approx(2 * 3.0 * 2.0), "b": pytest.approx(7 * 2.0)}


@pytest.mark.parametrize(
    ("kind", "attrs", "output", "lipschitz"),
    [
        ("max_pool", {"kernel": (2, 2), "strides": (2, 2)}, 3.0, 1.0),
        ("max_pool", {"kernel": (3, 3), "strides": (2, 2)}, 6.0, 2.0),
        ("avg_pool", {"kernel": (2, 2), "strides": (2, 2), "scaled": False}, 1.5, 0.5),
        ("avg_pool", {"kernel": (2, 2), "strides": (2, 2), "scaled": True}, 3.0, 1.0),
        ("l2_norm_pool", {"kernel": (2, 2), "strides": (2, 2), "epsilon": 0.1}, math.sqrt(10.0), 1.0),
        ("global_avg_pool", {"positions": 9, "scaled": False}, 1.0, 1 / 3),
        ("global_l2_norm_pool", {"positions": 9, "epsilon": 0.1}, math.sqrt(10.0), 1.0),
        ("sigmoid", {}, 0.5 * math.sqrt(10) + 0.75, 0.25),
        ("tanh", {}, 3.0, 1.0),
        ("softplus", {}, math.log(2) * math.sqrt(10) + 3.0, 1.0),
        ("scale", {"factor": -2.0}, 6.0, 2.0),
        ("dropout", {"rate": 0.5}, 6.0, 2.0),
        ("leaky_relu", {"slope": 0.1}, 3.0, 1.0),
    ],
)  # fmt: skip
def test_layers_without_parameters(kind: str, attrs: dict[str, Any], output: float, lipschitz: float) -> None:
    bound = RULES[kind](node("n", kind, "in", **attrs), [3.0], {})
    assert (bound.output, bound.lipschitz) == (pytest.approx(output), (pytest.approx(lipschitz),))


def test_slopes_of_smooth_activations() -> None:
    """The constants of gelu and silu are above their largest slopes, and not by much."""
    grid = [i * 1e-4 for i in range(-60000, 60000)]
    gelu = max(0.5 * (1 + math.erf(x / math.sqrt(2))) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in grid)
    silu = max((s := 1 / (1 + math.exp(-x))) + x * s * (1 - s) for x in grid)
    for kind, slope in (("gelu", gelu), ("silu", silu)):
        (constant,) = RULES[kind](node("n", kind, "in"), [1.0], {}).lipschitz
        assert slope <= constant <= slope * 1.0002


def test_everything_wrong_is_said_at_once() -> None:
    graph = Graph(
        (*START, node("odd", "attention", "in"), node("odder", "fourier", "odd")), problems=("layer 'fc' (Linear) has no bound.",)
    )
    with pytest.raises(UnsupportedModelError) as caught:
        sensitivities(graph, {}, 1.0)
    assert caught.value.problems == graph.problems  # the backend's own sentences, where there are any
    with pytest.raises(UnsupportedModelError) as caught:
        sensitivities(Graph(graph.nodes), {}, 1.0)
    assert len(caught.value.problems) == 2


def test_an_input_without_a_bound_is_refused() -> None:
    graph = Graph((node("x", "input"), dense("a", "x")))
    with pytest.raises(UnsupportedModelError, match="BoundedInput"):
        sensitivities(graph, {"a.weight": 1.0}, 1.0)
    assert sensitivities(graph, {"a.weight": 1.0}, 1.0, input_bound=2.0) == {"a.weight": pytest.approx(2.0)}
