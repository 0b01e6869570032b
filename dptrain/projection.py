"""Restores the constraints of a Lipschitz network after an update, and certifies what it leaves: NumPy, the same in both frameworks.

It runs outside the differentiated graph, so the gradient is that of the plain weight and the bounds of ``bounds.py`` are exact (pitfalls.md
L5). Weights are post-processing of private releases; so are their certificates, which feed the bounds of the next step.

    orthogonal   Bjorck iterations, X <- X (3 - X^T X) / 2, bring all singular values near each other (Anil, Lucas, Grosse 2019,
                 arXiv:1811.05381); then the weight is scaled so that its certificate equals the radius
    spectral     scaled down so that the certificate is at most the radius
    frobenius    scaled to the Frobenius norm
    rows         each output's row scaled to the norm
    bias         scaled down to the radius

Cost: a weight whose singular values are near each other is only certified and scaled. The iterations run on the Gram matrix of the smaller
side, after the first call in the weight's own precision: what is certified, in float64, is their outcome. An update moves a weight little,
so a few per step suffice; the first call takes more. Parameters are worked on in parallel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from dptrain.certificates import MARGIN, conv_gram, dominates, matrix_gram, normalised, overlap, powers, sizes
from dptrain.errors import RunError
from dptrain.info import Graph, Node

FIRST_ITERATIONS, ITERATIONS = 20, 2
TOLERANCE = 0.02  # spread of squared singular values below which a step takes no iteration
SETTLED = 1e-4  # Frobenius distance of the Gram matrix from the identity below which no more iterations are taken
WORKERS = 4  # threads, one parameter each; the result does not depend on their number
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Projected:
    """The outcome of a projection.

    Args:
        weights: identifier -> new value, for the parameters that changed.
        certificates: ``node.role`` -> certified norm of the new values.
    """

    weights: dict[str, np.ndarray]
    certificates: dict[str, float]


def constrained(graph: Graph) -> dict[str, list[tuple[Node, str]]]:
    """Identifier -> the nodes and roles that use it, for parameters whose norm a bound rests on."""
    found: dict[str, list[tuple[Node, str]]] = {}
    for node in graph.nodes:
        for role, identifier in node.params.items():
            if role in ("weight", "bias"):
                found.setdefault(identifier, []).append((node, role))
    return found


def project(graph: Graph, weights: Arrays, first: bool = False) -> Projected:
    """Restore every constraint of a model.

    Args:
        graph: the model.
        weights: identifier -> array in the exchange layout, of every parameter in the graph.
        first: take more iterations, for weights that no projection has seen yet.
    Returns:
        New weights in the dtype of the old, and their certificates.
    Raises:
        RunError: a weight is not finite, so that nothing can be certified.
    Guarantee: every certificate bounds the norm of the returned array, after rounding to its dtype.
    """
    with one_thread():
        return _project(graph, weights, first)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread() -> Any:
    """Keep each call of NumPy's linear algebra on one thread: the matrices are small, and its threads would fight with the framework's.

    On two cores with torch running beside it, two threads took up to nine times as long as one.
    """
    return _pools().limit(limits=1, user_api="blas")


def _project(graph: Graph, weights: Arrays, first: bool) -> Projected:
    changed: dict[str, np.ndarray] = {}
    certificates: dict[str, float] = {}
    work = constrained(graph)
    for identifier in work:
        old = weights[identifier]
        if not np.isfinite(old).all():
            raise RunError(f"Parameter {identifier!r} is no longer finite, so its norm cannot be certified; lower the learning rate.")

    def one(identifier: str) -> tuple[np.ndarray | None, dict[str, float]]:
        old, uses = weights[identifier], work[identifier]
        kept = all(role in node.frozen for node, role in uses)
        if uses[0][1] == "bias":
            new, norms = _bias(old, uses, kept)
        else:
            new, norms = _weight(old, uses, kept, FIRST_ITERATIONS if first else ITERATIONS)
        return None if kept else new.astype(old.dtype), norms

    largest_first = sorted(work, key=lambda identifier: -weights[identifier].size)  # so that the workers end together
    with ThreadPoolExecutor(min(WORKERS, cores(), max(1, len(work)))) as pool:
        done = dict(zip(largest_first, pool.map(one, largest_first), strict=True))
    for identifier in work:
        new, norms = done[identifier]
        certificates |= norms
        if new is not None:
            changed[identifier] = new
    return Projected(changed, certificates)


def certify(graph: Graph, weights: Arrays) -> dict[str, float]:
    """Certificates of the weights as they are.

    Args:
        graph: the model.
        weights: identifier -> array.
    Returns:
        ``node.role`` -> norm.
    Raises:
        RunError: a weight is not finite.
    """
    frozen = tuple(Node(n.name, n.kind, n.inputs, n.size, n.attrs, n.params, tuple(n.params)) for n in graph.nodes)
    return project(Graph(frozen), weights).certificates


def confirm(graph: Graph, weights: Arrays, claimed: Mapping[str, float]) -> dict[str, float]:
    """Certificates of the weights as they are, keeping claimed ones that can be proven again.

    Args:
        graph: the model.
        weights: identifier -> array.
        claimed: ``node.role`` -> norm, such as a checkpoint stored.
    Returns:
        The claimed value where it is proven anew, else a fresh certificate.
    """
    fresh = certify(graph, weights)
    with one_thread():
        return _confirm(graph, weights, claimed, fresh)


def _confirm(graph: Graph, weights: Arrays, claimed: Mapping[str, float], fresh: dict[str, float]) -> dict[str, float]:
    for node in graph.nodes:
        for role, identifier in node.params.items():
            name = f"{node.name}.{role}"
            if name in fresh and name in claimed and _holds(node, role, weights[identifier], claimed[name] / (1 + MARGIN / 2)):
                fresh[name] = claimed[name]
    return fresh


def _holds(node: Node, role: str, weight: np.ndarray, bound: float) -> bool:
    """Whether ``bound`` is proven to be above the norm of a weight."""
    w, scale = normalised(weight)
    if not (math.isfinite(bound) and bound >= 0):
        return False
    if role == "bias" or not scale:
        return scale * float(np.linalg.norm(w)) <= bound
    a = node.attrs
    gram = conv_gram(w, a["space"], a["strides"], a["dilation"]) if node.kind == "conv" else matrix_gram(w.reshape(len(w), -1))
    return dominates((bound / scale) ** 2 / gram.factor, gram.matrices)


def _bias(old: np.ndarray, uses: list[tuple[Node, str]], kept: bool) -> tuple[np.ndarray, dict[str, float]]:
    b, scale = normalised(old)
    norm = scale * float(np.linalg.norm(b))
    radius = math.inf if kept else min(bias_radius(node) for node, _ in uses)
    factor = min(1.0, radius / norm) if norm else 1.0
    return b * (scale * factor), {f"{node.name}.{role}": norm * factor * (1 + MARGIN) for node, role in uses}


def bias_radius(node: Node) -> float:
    """Largest norm of a node's bias."""
    return float(node.attrs["radius"] if node.kind == "bias" else node.attrs["bias_radius"])


def _weight(old: np.ndarray, uses: list[tuple[Node, str]], kept: bool, iterations: int) -> tuple[np.ndarray, dict[str, float]]:
    """One weight: constrain it, bound it at every use, scale it to the smallest allowance."""
    constraints = {str(node.attrs["constraint"]) for node, _ in uses}
    orthogonal, first = not kept and "orthogonal" in constraints, iterations == FIRST_ITERATIONS
    # Many iterations would raise what float32 rounds off small singular values by as much as those.
    w, scale = normalised(old, np.float32 if orthogonal and not first and old.dtype == np.float32 else np.float64)
    rows = w.reshape(len(w), -1)
    if orthogonal and scale:
        rows, scale = bjorck(rows, iterations, 0.0 if first else TOLERANCE), 1.0
    rows = np.asarray(rows, np.float64)
    if not kept and "rows" in constraints and scale:
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows, scale = rows / np.where(norms > 0, norms, 1.0) * min(float(n.attrs["radius"]) for n, _ in uses), 1.0
    w = rows.reshape(w.shape)
    bounds = {f"{node.name}.{role}": _norm_bound(node, w) for node, role in uses}  # of w, to be multiplied by scale
    factor = scale
    if not kept and scale:
        allowed = [_allowance(node, w, bounds[f"{node.name}.{role}"]) for node, role in uses]
        exact = bool(constraints & {"orthogonal", "frobenius"})  # these are scaled up as well as down
        factor = min(allowed) if exact else min(scale, *allowed)
    return w * factor, {name: factor * bound * (1 + MARGIN) for name, bound in bounds.items()}


def _allowance(node: Node, w: np.ndarray, bound: float) -> float:
    """The factor at which a weight of unit scale reaches its radius."""
    radius, constraint = float(node.attrs["radius"]), node.attrs["constraint"]
    if constraint == "rows":
        return 1.0
    size = float(np.linalg.norm(w)) if constraint == "frobenius" else bound
    return radius / size if size else 1.0


def _norm_bound(node: Node, w: np.ndarray) -> float:
    """Operator norm of a node with weight ``w``, from above and without margin."""
    rows = w.reshape(len(w), -1)
    if node.kind != "conv":
        return matrix_gram(rows).norm_bound()
    a = node.attrs
    symbol = conv_gram(w, a["space"], a["strides"], a["dilation"])
    torus = symbol.norm_bound()
    if symbol.factor == 1.0:  # exact on the torus, and the reshaped kernel's bound is never below that
        return torus
    most = math.sqrt(overlap(a["kernel"], a["strides"], a["dilation"]))
    least = float(np.linalg.norm(rows)) / math.sqrt(min(rows.shape))  # no bound of the reshaped kernel is smaller
    return torus if least * most >= torus else min(torus, matrix_gram(rows).norm_bound() * most)


def bjorck(w: np.ndarray, iterations: int, tolerance: float = 0.0) -> np.ndarray:
    """Bring the singular values of a matrix near each other.

    Args:
        w: ``[p, D]``, not zero.
        iterations: how many.
        tolerance: root mean square spread of the squared singular values, relative to their mean, that is left as it is.
    Returns:
        The new matrix, or the old one if it was within the tolerance or did not converge.
    Source: Bjorck and Bowie 1971; all iterations act on the Gram matrix ``G``: with ``Q = (3 - G) / 2``, ``X <- Q X`` and ``G <- Q G Q``.
    """
    wide = w.shape[0] <= w.shape[1]
    gram = w @ w.T if wide else w.T @ w
    n = len(gram)
    unit = float(np.trace(gram)) / n
    scaled = gram / unit
    if tolerance and off_identity(scaled) <= tolerance * math.sqrt(n):
        return w
    if off_identity(scaled) >= 1.0:  # else no value is above 2
        # From below: enough here, because the iteration converges for singular values below sqrt(3).
        unit *= float(sizes(powers(scaled[None], 15))[0])
        scaled = gram / unit
    total: np.ndarray | None = None
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(iterations):
            q = -0.5 * scaled
            q.flat[:: n + 1] += 1.5
            total, scaled = (q if total is None else total @ q), q @ scaled @ q
            scaled = 0.5 * (scaled + scaled.T)
            if off_identity(scaled) <= SETTLED:
                break
    assert total is not None
    total *= 1.0 / math.sqrt(unit)
    if not np.isfinite(total).all():  # the guess of the largest value was far below it, and the iteration has diverged
        return w
    return total @ w if wide else w @ total


def off_identity(gram: np.ndarray) -> float:
    """Frobenius norm of ``G - I``."""
    apart = gram.copy()
    apart.flat[:: len(gram) + 1] -= 1.0
    return float(np.linalg.norm(apart))
