"""What a step will cost: time and memory per layer and norm method, from the facts of a plan and one measured rate.

A model of arithmetic and of what is kept, not a promise: layers without parameters (activations, attention products, pooling) are not in
a plan, so they enter by an average only, and what allocators and kernels take for themselves does not enter at all. ``dptrain compare``
prints the prediction beside what it measured.
Nothing here touches a guarantee.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptrain.costs import MEMORY_COST, Method, ghost_cost, gradient_size, has_ghost_norm, instantiate_cost, numbers_in, sum_cost
from dptrain.info import CONV, EMBEDDING, LINEAR, LayerInfo
from dptrain.plan import Plan

if TYPE_CHECKING:
    from dptrain.setup import Setup

# Fitted to steps of torch on two cores with AVX-512 (small VGG, ResNet-18, a transformer, a BERT-like network; docs/benchmarks.md), in
# multiply-adds of a batched product: a native product of plain training, and one of a convolution; passes over a layer's input and output,
# which also stand for the operations without parameters around it; and more such passes of a convolution or normalisation, and of a linear
# layer, whose norms are taken: what is copied, rebuilt or kept.
PASS_COST, CONV_PASS_COST, PASSES, NORM_PASSES, LINEAR_PASSES = 1.0, 0.6, 12, 6, 3
# Per parameter and step, in multiply-adds: an optimizer reads and writes a few arrays; a Gaussian value of the counter-based
# generator takes a logarithm, a root, a sine and a cosine.
UPDATE_COST, NOISE_COST = 4 * MEMORY_COST, 100.0
PRODUCT = (32, 256, 512)  # [B, T, D] of the product whose rate is measured


def work_of(shape: tuple[int, int, int]) -> int:
    """Multiply-adds of the Gram matrices of ``[B, T, D]``."""
    return shape[0] * shape[1] ** 2 * shape[2]


@dataclass(frozen=True)
class LayerCost:
    """What one layer is predicted to take in a step.

    Args:
        name: the layer.
        method: the norm method of the plan.
        plain_seconds: forward pass, cotangent and weight gradient of plain training.
        seconds: norm method -> the same with the norm, and the weighted sum in place of the gradient; only methods that exist.
        plain_bytes: what the forward pass keeps for the backward pass.
        bytes: norm method -> what is kept from the backward pass until the weighted sum, the norm's own matrices included.
    """

    name: str
    method: Method
    plain_seconds: float
    seconds: Mapping[Method, float]
    plain_bytes: float
    bytes: Mapping[Method, float]


@dataclass(frozen=True)
class Prediction:
    """What a step over one physical batch is predicted to take.

    Args:
        layers: per layer, in the order of the forward pass.
        plain_seconds: a step of plain training.
        seconds: a step of the plan.
        plain_bytes: peak memory of plain training above the framework: weights, gradients, activations.
        bytes: peak memory of the plan.
        batch: B, examples in the physical batch.
    """

    layers: tuple[LayerCost, ...]
    plain_seconds: float
    seconds: float
    plain_bytes: float
    bytes: float
    batch: int

    @property
    def ratio(self) -> float:
        """Time of the plan over plain time."""
        return self.seconds / self.plain_seconds

    @property
    def memory_ratio(self) -> float:
        """Memory of the plan over plain memory."""
        return self.bytes / self.plain_bytes

    def __str__(self) -> str:
        from dptrain.tables import cost_table, render

        return render(cost_table(self))


def plain_cost(layer: LayerInfo) -> float:
    """Work per example of forward pass, cotangent and weight gradient, in multiply-adds."""
    traffic = MEMORY_COST * PASSES * (numbers_in(layer) + layer.positions * layer.fan_out)
    each = CONV_PASS_COST if layer.kind == CONV else PASS_COST
    products = 3 * each * layer.positions * gradient_size(layer) if layer.kind in (LINEAR, CONV) else 0.0
    return products + traffic


def norm_cost(layer: LayerInfo, method: Method, lean: bool = False) -> float:
    """Work per example of a norm and of the weighted sum, in place of the weight gradient of plain training."""
    if method == "none":
        return 0.0
    if layer.kind == EMBEDDING:  # the Gram matrix of cotangents, masked by equal ids; the sum is a scatter, as in plain training
        gram = layer.positions**2 * (layer.fan_out + 3 * MEMORY_COST)
        return gram if method == "ghost" else instantiate_cost(layer)
    if layer.kind not in (LINEAR, CONV):
        return (NORM_PASSES + 1) * 2 * MEMORY_COST * layer.positions * layer.fan_out
    way = ghost_cost(layer) if method == "ghost" else instantiate_cost(layer)
    if method == "instantiate" and passes(layer, lean):  # the gradient is not at hand any more when the sum is taken
        way += sum_cost(layer)
    passes_over = NORM_PASSES if layer.kind == CONV else LINEAR_PASSES
    copies = passes_over * MEMORY_COST * (numbers_in(layer) + layer.positions * layer.fan_out)
    return way + copies - sum_cost(layer)


def passes(layer: LayerInfo, lean: bool) -> bool:
    """Whether a per-sample gradient is not kept after its norm."""
    outputs = layer.positions * layer.fan_out
    return lean and layer.kind in (LINEAR, CONV) and gradient_size(layer) >= numbers_in(layer) + outputs


def kept(layer: LayerInfo, method: Method, lean: bool = False) -> int:
    """Floats per example that live from a layer's backward pass until the weighted sum."""
    outputs = layer.positions * layer.fan_out
    if method == "none":
        return 0
    if method == "ghost" or passes(layer, lean):
        return numbers_in(layer) + outputs
    return gradient_size(layer) if layer.kind in (LINEAR, CONV, EMBEDDING) else layer.num_params


def scratch(layer: LayerInfo, method: Method) -> int:
    """Floats per example of a norm's own matrices, freed with the norm."""
    return 2 * layer.attr("groups", 1) * layer.positions**2 if method == "ghost" and layer.positions > 1 else 0


def methods(layer: LayerInfo, chosen: Method) -> tuple[Method, ...]:
    """The norm methods that a layer has."""
    if chosen == "none":
        return ("none",)
    return ("ghost", "instantiate") if has_ghost_norm(layer) else ("instantiate",)


def predict(plan: Plan, batch: int, rate: float, *, two_pass: bool = False, lean: bool = False, float_bytes: int = 4) -> Prediction:
    """The predicted cost of a step over one physical batch.

    Args:
        plan: a plan of a clipping strategy or of plain training.
        batch: B, examples in the physical batch.
        rate: multiply-adds per second of a batched matrix product, as ``backend.product_rate()`` measures it.
        two_pass: whether the sum is taken in a second backward pass.
        lean: whether a per-sample gradient is kept only where it is smaller than what it is made of.
        float_bytes: bytes of a number.
    Returns:
        The prediction.
    """
    layers = tuple(layer_cost(layer, plan.norms[layer.name], batch, rate, float_bytes, lean) for layer in plan.layers)
    parameters = sum(layer.num_params for layer in plan.layers)
    private = plan.needs_norms
    plain = sum(cost.plain_seconds for cost in layers) + UPDATE_COST * parameters / rate
    ours = sum(cost.seconds[cost.method] for cost in layers) + (UPDATE_COST + NOISE_COST * private) * parameters / rate
    if two_pass and private:  # the second pass computes the cotangents again
        ours += sum(2 / 3 * cost.plain_seconds for cost in layers)
    plain_bytes = float_bytes * 2 * parameters + sum(cost.plain_bytes for cost in layers)
    return Prediction(layers, plain, ours, plain_bytes, peak(plan, layers, batch, two_pass, float_bytes, lean), batch)


def stored(layer: LayerInfo) -> int:
    """Floats per example that the forward pass keeps for the backward pass: a layer's input, and the output of a linear layer, which the
    activation or the attention after it reads; that of a convolution or normalisation is the next layer's input."""
    return numbers_in(layer) + (layer.positions * layer.fan_out if layer.kind in (LINEAR, EMBEDDING) else 0)


def layer_cost(layer: LayerInfo, method: Method, batch: int, rate: float, float_bytes: int, lean: bool = False) -> LayerCost:
    """The prediction for one layer."""
    plain = batch * plain_cost(layer) / rate
    seconds = {way: plain + batch * norm_cost(layer, way, lean) / rate for way in methods(layer, method)}
    size = float_bytes * batch
    held = {way: float(size * (kept(layer, way, lean) + scratch(layer, way))) for way in methods(layer, method)}
    return LayerCost(layer.name, method, plain, seconds, float(size * stored(layer)), held)


def peak(plan: Plan, layers: tuple[LayerCost, ...], batch: int, two_pass: bool, float_bytes: int, lean: bool = False) -> float:
    """Bytes at the worst moment: the backward pass frees what the forward pass kept, layer by layer, and keeps what the sum needs."""
    size, parameters = float_bytes * batch, sum(layer.num_params for layer in plan.layers)
    waiting, held, worst = sum(cost.plain_bytes for cost in layers), 0.0, 0.0
    for info, cost in zip(reversed(plan.layers), reversed(layers), strict=True):
        worst = max(worst, waiting + held + cost.bytes[cost.method])
        if not two_pass:  # a second pass needs all that was stored, and nothing else
            waiting -= cost.plain_bytes
            held += size * kept(info, cost.method, lean)
    return worst + float_bytes * (4 if plan.needs_norms else 2) * parameters  # weights, sums; noise, the noisy sum


def predicted(setup: Setup, batch: int | None = None) -> Prediction:
    """The prediction for what is about to be trained, at the rate of this machine.

    Args:
        setup: the parts of a run.
        batch: physical batch; by default the config's.
    Returns:
        The prediction.
    """
    performance = setup.config.performance
    size = 8 if performance.precision == "float64" else 4
    rate = setup.backend.product_rate()
    batch, lean = batch or performance.physical_batch_size, performance.prefer == "memory"
    return predict(setup.plan, batch, rate, two_pass=performance.two_pass, lean=lean, float_bytes=size)
