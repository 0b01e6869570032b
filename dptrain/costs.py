"""Which way of taking a layer's per-sample gradient norm is cheaper: the decision rules of ``mixed_ghost``.

Nothing here touches a guarantee: both ways give the same norm. Three rules are offered (math.md section 2):

* ``space``: the published rule, ghost where ``2 T^2 <= p D``. It compares the memory of the two Gram matrices with that of the
  per-sample gradient.
* ``time``: compares arithmetic. Instantiating costs ``T p D`` and its result is reused for the weighted sum; the ghost norm costs
  its Gram matrices, and the weighted sum ``T p D`` still has to be paid after it. So ghost wins on time only where the
  per-sample gradient, which has to be written and read, is large against the work done per position. Where both are about as
  fast, the one that keeps less wins.
* ``measured``: the backend has timed both ways, once per layer, on this machine and with these shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from dptrain.info import CONV, EMBEDDING, LINEAR, LayerInfo

Decision = Literal["space", "time", "measured"]
Method = Literal["none", "ghost", "instantiate"]
Timings = Mapping[str, Mapping[str, float]]  # layer -> method -> seconds

# Cost of moving one float through memory, in units of one multiply-add of a matrix product, on the CPUs and GPUs tried:
# elementwise passes run at memory speed, products at many operations per float loaded.
MEMORY_COST = 12.0
# Cost of one multiply-add of the weighted sum and of per-sample gradients, relative to the batched matrix product of a Gram matrix.
# Those of linear layers were fitted to both ways timed for 32 examples at 16 to 512 positions and 64 x 64 to 768 x 3072 weights, in both
# frameworks on two cores: the rule then takes the slower way, by more than 8 %, in 1 of 118 cases. Of convolutions both come from native
# kernels or long products.
SUM_COST, INSTANTIATE_COST = 0.8, 0.9
CONV_SUM_COST, CONV_INSTANTIATE_COST = 0.5, 0.65
# By how much a per-sample gradient that is larger than the input and the cotangent that it is made of must be faster: the figures above are
# no closer than that, and memory is the surer loss.
ROOM = 1.15


def has_ghost_norm(layer: LayerInfo) -> bool:
    """Whether a norm without the per-sample gradient exists for this kind of layer."""
    return layer.kind in (LINEAR, CONV, EMBEDDING)


def gradient_size(layer: LayerInfo) -> int:
    """Floats of one per-sample weight gradient, ``p D``."""
    return layer.fan_in * layer.fan_out


def numbers_in(layer: LayerInfo) -> int:
    """Floats of one example's input of a layer, all calls together; ids of an embedding count as nothing."""
    if layer.kind == EMBEDDING:
        return 0
    if layer.kind == CONV:
        return layer.attr("padded", layer.positions) * layer.attr("channels", layer.fan_in) * layer.attr("groups", 1)
    return layer.positions * (layer.fan_in if layer.kind == LINEAR else layer.fan_out)


def sum_cost(layer: LayerInfo) -> float:
    """Work per example of a weighted sum by one native product, in multiply-adds."""
    return (CONV_SUM_COST if layer.kind == CONV else SUM_COST) * layer.positions * gradient_size(layer)


def ghost_cost(layer: LayerInfo) -> float:
    """Work per example of the ghost norm and of the weighted sum that must follow it, in multiply-adds.

    Source: math.md section 2. Convolutions use the unfold-free Gram matrix, ``T'^2 C + |kernel| T^2``.
    """
    t, groups, weighted_sum = layer.positions, layer.attr("groups", 1), sum_cost(layer)
    if t == 1:
        return float(weighted_sum + layer.fan_in + layer.fan_out)
    gram_out = t * t * layer.fan_out
    if layer.kind == CONV:
        padded = layer.attr("padded", t)
        gram_in = padded * padded * layer.attr("channels", layer.fan_in) * groups
        shifts = MEMORY_COST * groups * (padded * padded + (layer.attr("kernel", 1) + 2) * t * t)
    else:
        gram_in, shifts = t * t * layer.fan_in, MEMORY_COST * 3 * t * t
    return float(weighted_sum + gram_out + gram_in) + shifts


def instantiate_cost(layer: LayerInfo) -> float:
    """Work per example of the per-sample gradient, its norm and its weighted sum, in multiply-adds."""
    each = CONV_INSTANTIATE_COST if layer.kind == CONV else INSTANTIATE_COST
    return gradient_size(layer) * (each * layer.positions + MEMORY_COST * 3)


def choose(layer: LayerInfo, decision: Decision, timings: Timings | None = None) -> Method:
    """The norm method of one layer under a decision rule.

    Args:
        layer: facts of the layer.
        decision: ``space``, ``time`` or ``measured``.
        timings: seconds per layer and method; needed by ``measured`` alone. A layer that was not timed falls back to ``time``.
    Returns:
        ``"ghost"`` or ``"instantiate"``.
    """
    if not has_ghost_norm(layer):
        return "instantiate"
    if layer.kind == EMBEDDING:
        return "ghost"  # p D is vocabulary times width: the segment sum never writes it
    if decision == "measured" and timings is not None and {"ghost", "instantiate"} <= set(timings.get(layer.name, ())):
        seconds = timings[layer.name]
        return "ghost" if seconds["ghost"] <= seconds["instantiate"] else "instantiate"
    if decision == "space":
        gram = 2 * layer.attr("groups", 1) * layer.positions**2
        return "ghost" if gram <= gradient_size(layer) else "instantiate"
    larger = gradient_size(layer) > numbers_in(layer) + layer.positions * layer.fan_out
    return "ghost" if ghost_cost(layer) <= instantiate_cost(layer) * (ROOM if larger else 1.0) else "instantiate"
