"""Clipless: how far one example can reach, layer by layer. Pure functions on plain numbers, the same for every framework.

Forward, ``X`` bounds the L2 norm of a layer's whole per-example input; backward, ``B`` bounds the cotangent at its output, from the loss's
Lipschitz constant on. A parameter's gradient is then at most ``P B`` for every example that could exist (math.md section 5; Bethune et al.,
ICLR 2024, arXiv:2305.16202, Theorem 1, with the constants corrected as in pitfalls.md L1, L2 and L7).

One function per kind of node returns its ``LayerBound``; the table ``RULES`` is the registration. Each docstring is the proof. ``s`` is the
certified operator norm of the current weight and ``beta`` the norm of the current bias (``dptrain/certificates.py``), ``T`` the
number of positions, ``n`` the number of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dptrain.certificates import overlap
from dptrain.errors import UnsupportedModelError
from dptrain.info import Graph, Node

Certificates = Mapping[str, float]


@dataclass(frozen=True)
class LayerBound:
    """What is proven of one node.

    Args:
        output: bound of the L2 norm of one example's output.
        lipschitz: one constant per input: how much a cotangent can grow on its way to that input.
        sensitivity: role -> P, norm of the parameter's gradient per unit of cotangent.
        cap: bound of the cotangent handed to the inputs, whatever arrives.
    """

    output: float
    lipschitz: tuple[float, ...]
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    cap: float = math.inf


LayerRule = Callable[[Node, Sequence[float], Certificates], LayerBound]


def certificate(node: Node, role: str, certificates: Certificates) -> float:
    """The certified norm of a parameter at a node; 0 if the node has no such parameter."""
    return certificates[f"{node.name}.{role}"] if role in node.params else 0.0


def bounded_input(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """Projection onto the ball of radius ``norm``, which is convex: 1-Lipschitz, and nothing leaves it."""
    return LayerBound(min(x[0], float(node.attrs["norm"])), (1.0,))


def linear(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """``z_t = W a_t + b``: the positions' squares add up, so the map of all of them has the norm of W.

    The gradient of W is ``sum_t g_t a_t^T``, of norm at most ``sum_t |g_t| |a_t| <= |g| |a|``; that of b is ``sum_t g_t``, at most
    ``sqrt(T) |g|``.
    """
    s, beta, t = certificate(node, "weight", c), certificate(node, "bias", c), node.attrs["positions"]
    return LayerBound(s * x[0] + math.sqrt(t) * beta, (s,), {"weight": x[0], "bias": math.sqrt(t)})


def conv(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """A linear map of windows. One input position is in at most M windows, so ``sum_t |window_t|^2 <= M X^2``: P is ``sqrt(M) X``."""
    s, beta, t = certificate(node, "weight", c), certificate(node, "bias", c), node.attrs["positions"]
    m = min(overlap(node.attrs["kernel"], node.attrs["strides"], node.attrs["dilation"]), t)
    return LayerBound(s * x[0] + math.sqrt(t) * beta, (s,), {"weight": math.sqrt(m) * x[0], "bias": math.sqrt(t)})


def bias(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """``z_t = a_t + b / sqrt(T)``: adds a vector of norm ``beta``; the gradient ``sum_t g_t / sqrt(T)`` is at most ``|g|``."""
    return LayerBound(x[0] + certificate(node, "bias", c), (1.0,), {"bias": 1.0})


def householder(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """A pair of channels is kept or reflected: an isometry on each side of a line, continuous across it.

    The derivative of a reflection by its angle is an orthogonal matrix, so ``|d z_k / d theta_k| <= |a_k|`` and P is X.
    """
    return LayerBound(x[0], (1.0,), {"theta": x[0]})


def same(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """Permutations, reshapes, sorting within an example, subtraction of a mean, cropping, zero padding, abs, ReLU: 1-Lipschitz, 0 to 0."""
    return LayerBound(x[0], (1.0,))


def elementwise(slope: float, at_zero: float = 0.0, ceiling: float = math.inf, growth: float | None = None) -> LayerRule:
    """A scalar function with ``|f'| <= slope`` and ``|f(a)| <= min(ceiling, at_zero + growth |a|)``."""

    def rule(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
        root = math.sqrt(node.size)
        rate = slope if growth is None else growth
        return LayerBound(min(ceiling * root, at_zero * root + rate * x[0]), (slope,))

    return rule


def leaky_relu(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """Slope 1 above 0 and ``slope`` below."""
    steepest = max(1.0, abs(float(node.attrs["slope"])))
    return LayerBound(steepest * x[0], (steepest,))


def max_pool(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """Each output selects one input, and an input is selected by at most the M windows it is in: the Jacobian's norm is ``sqrt(M)``."""
    root = math.sqrt(overlap(node.attrs["kernel"], node.attrs["strides"]))
    return LayerBound(root * x[0], (root,))


def avg_pool(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """A window's mean has norm ``|window| / sqrt(m)``; ``scaled`` multiplies by ``sqrt(m)``. Squared windows sum to at most ``M X^2``."""
    kernel = node.attrs["kernel"]
    factor = math.sqrt(overlap(kernel, node.attrs["strides"])) / (1.0 if node.attrs["scaled"] else math.sqrt(math.prod(kernel)))
    return LayerBound(factor * x[0], (factor,))


def l2_norm_pool(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """``sqrt(sum a^2 + eps)`` per window: its gradient ``a / z`` has norm at most 1, and the squares add up to ``M X^2 + n eps``."""
    m = overlap(node.attrs["kernel"], node.attrs["strides"])
    return LayerBound(math.sqrt(m * x[0] ** 2 + node.size * node.attrs["epsilon"]), (math.sqrt(m),))


def global_avg_pool(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """One window over all positions."""
    factor = 1.0 if node.attrs["scaled"] else 1.0 / math.sqrt(node.attrs["positions"])
    return LayerBound(factor * x[0], (factor,))


def global_l2_norm_pool(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """One window over all positions."""
    return LayerBound(math.sqrt(x[0] ** 2 + node.size * node.attrs["epsilon"]), (1.0,))


def add(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """``sum_i c_i x_i``: norms add up, and each input sees the cotangent times its coefficient."""
    weights = tuple(abs(float(w)) for w in node.attrs["coefficients"])
    return LayerBound(math.fsum(w * v for w, v in zip(weights, x, strict=True)), weights)


def scale(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """A constant multiple."""
    factor = abs(float(node.attrs["factor"]))
    return LayerBound(factor * x[0], (factor,))


def concat(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """Squares add up; each input sees its part of the cotangent."""
    return LayerBound(math.hypot(*x), (1.0,) * len(x))


def loss_gradient_clip(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """The identity, whose cotangent is scaled down to ``norm``."""
    return LayerBound(x[0], (1.0,), cap=float(node.attrs["norm"]))


def dropout(node: Node, x: Sequence[float], c: Certificates) -> LayerBound:
    """Entries become 0 or ``1 / (1 - rate)`` times themselves."""
    factor = 1.0 / (1.0 - float(node.attrs["rate"]))
    return LayerBound(factor * x[0], (factor,))


RULES: Mapping[str, LayerRule] = {
    "bounded_input": bounded_input,
    "linear": linear,
    "conv": conv,
    "bias": bias,
    "householder": householder,
    **dict.fromkeys(("identity", "relu", "abs", "group_sort", "full_sort", "centering", "flatten", "reshape", "permute", "patches"), same),
    **dict.fromkeys(("pad", "crop"), same),
    "elu": same,  # with alpha 1: slope at most 1, |f(a)| <= |a|
    "tanh": elementwise(1.0, ceiling=1.0),
    "sigmoid": elementwise(0.25, at_zero=0.5, ceiling=1.0),
    "softplus": elementwise(1.0, at_zero=math.log(2.0)),
    "gelu": elementwise(1.12905, growth=1.0),  # largest slope 1.128904..., at sqrt(2)
    "silu": elementwise(1.09985, growth=1.0),  # largest slope 1.099839..., where x tanh(x/2) = 2
    "leaky_relu": leaky_relu,
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "l2_norm_pool": l2_norm_pool,
    "global_avg_pool": global_avg_pool,
    "global_l2_norm_pool": global_l2_norm_pool,
    "add": add,
    "scale": scale,
    "concat": concat,
    "loss_gradient_clip": loss_gradient_clip,
    "dropout": dropout,
}


def forward(graph: Graph, certificates: Certificates, input_bound: float | None = None) -> dict[str, LayerBound]:
    """Bounds of every node, in order.

    Args:
        graph: the model.
        certificates: ``node.role`` -> norm of the current weights.
        input_bound: L2 bound of one example's input, None where a ``bounded_input`` node has to give it.
    Returns:
        Node name -> bound.
    Raises:
        UnsupportedModelError: lists every node without a bound, and every parameter that an unbounded input would reach.
    """
    problems, found = list(graph.problems), dict[str, LayerBound]()
    for node in graph.nodes:
        if node.kind == "input":
            found[node.name] = LayerBound(math.inf if input_bound is None else input_bound, ())
            continue
        if node.kind not in RULES:
            if not graph.problems:
                problems.append(f"layer {node.name!r}: there is no bound for operations of kind {node.kind!r}.")
            found[node.name] = LayerBound(math.inf, (math.inf,) * len(node.inputs))
            continue
        inputs = [found[name].output for name in node.inputs]
        found[node.name] = RULES[node.kind](node, inputs, certificates)
        if node.params and not all(map(math.isfinite, found[node.name].sensitivity.values())) and not problems:
            problems.append(f"layer {node.name!r}: the norm of its input has no bound; put a BoundedInput before the first layer.")
    if problems:
        raise UnsupportedModelError(problems)
    return found


def backward(graph: Graph, bounds: Mapping[str, LayerBound], loss_lipschitz: float) -> dict[str, float]:
    """B, the bound of the cotangent at the output of every node.

    Args:
        graph: the model.
        bounds: from ``forward``.
        loss_lipschitz: bound of the loss's gradient in the model's output.
    Returns:
        Node name -> B; the cotangents from several consumers add up.
    """
    arriving: dict[str, list[float]] = {node.name: [] for node in graph.nodes}
    arriving[graph.output.name].append(loss_lipschitz)
    total: dict[str, float] = {}
    for node in reversed(graph.nodes):
        b = total[node.name] = math.fsum(arriving[node.name])
        bound = bounds[node.name]
        for name, constant in zip(node.inputs, bound.lipschitz, strict=True):
            arriving[name].append(min(constant * b, bound.cap))
    return total


def sensitivities(graph: Graph, certificates: Certificates, loss_lipschitz: float, input_bound: float | None = None) -> dict[str, float]:
    """Delta of every parameter: no example's gradient in it can have a larger L2 norm.

    Args:
        graph: the model.
        certificates: ``node.role`` -> norm of the current weights.
        loss_lipschitz: bound of the loss's gradient in the model's output.
        input_bound: L2 bound of one example's input, None where the model bounds it itself.
    Returns:
        Parameter identifier -> Delta; a parameter with several uses has the sum over them (pitfalls.md L12).
    Raises:
        UnsupportedModelError: some node has no bound.
    Guarantee: with the triangle inequality over uses, ``Delta = sum_uses P B``.
    Source: math.md section 5; Bethune et al. 2024, Theorem 1.
    """
    bounds = forward(graph, certificates, input_bound)
    cotangents = backward(graph, bounds, loss_lipschitz)
    uses: dict[str, list[float]] = {}
    for node in graph.nodes:
        for role, identifier in node.params.items():
            if role not in node.frozen:
                uses.setdefault(identifier, []).append(bounds[node.name].sensitivity[role] * cotangents[node.name])
    return {identifier: math.fsum(values) for identifier, values in uses.items()}


def output_lipschitz(graph: Graph, certificates: Certificates) -> float:
    """Certified Lipschitz constant of the model's output in its input; for certified robustness.

    Args:
        graph: the model.
        certificates: ``node.role`` -> norm of the current weights.
    Returns:
        L: the outputs of two inputs differ by at most L times the inputs' distance (L2).
    Raises:
        UnsupportedModelError: some node has no bound.
    """
    growth: dict[str, float] = {}
    bounds = forward(graph, certificates)
    for node in graph.nodes:
        inputs = [growth[name] for name in node.inputs]
        parts = [constant * g for constant, g in zip(bounds[node.name].lipschitz, inputs, strict=True)]
        growth[node.name] = 1.0 if node.kind == "input" else math.hypot(*parts) if node.kind == "concat" else math.fsum(parts)
    return growth[graph.output.name]


def input_norm(graph: Graph | None) -> float:
    """The norm down to which the model itself scales its input; 1 where it does not."""
    norms = [float(node.attrs["norm"]) for node in graph.nodes if node.kind == "bounded_input"] if graph else []
    return norms[0] if norms else 1.0
