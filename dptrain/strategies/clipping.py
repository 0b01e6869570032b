"""Per-sample clipping: ``per_sample``, ``ghost`` and ``mixed_ghost``.

The three release the same sum with the same certificate; they differ only in how a layer's norm is taken, which is written into
the plan. The certificate is the clipping function's (``dptrain/clipping.py``): an example's weighted gradient in group k has norm
at most ``C_k``.

Source: Bu, Mao, Xu 2022 (arXiv:2205.10683) for the choice per layer; math.md sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from dptrain.adaptive import AdaptiveClip, Positive, initial_clip
from dptrain.clipping import ClippingName
from dptrain.costs import Decision, Method, Timings, choose, has_ghost_norm
from dptrain.errors import ConfigError
from dptrain.info import LayerInfo, ModelInfo
from dptrain.plan import Group, Plan
from dptrain.strategies.base import Strategy


class Clipping(Strategy):
    """What the clipping strategies share.

    Args:
        max_grad_norm: C, the joint L2 bound on one example's gradient over all groups; fixed, or following a quantile.
        clipping: clipping function, ``abadi`` or ``automatic``.
        gamma: stability constant of ``automatic``.
        grouping: ``flat`` (one group), ``per_layer``, or named lists of layer-name patterns; a group's clipping norm is
            ``C / sqrt(K)``, so that the joint bound stays C.
    """

    max_grad_norm: Positive | AdaptiveClip = 1.0
    clipping: ClippingName = "abadi"
    gamma: Positive = 0.01
    grouping: Literal["flat", "per_layer"] | Mapping[str, tuple[str, ...]] = "flat"

    @property
    def adaptive(self) -> AdaptiveClip | None:
        """The moving clipping norm, if it moves."""
        return self.max_grad_norm if isinstance(self.max_grad_norm, AdaptiveClip) else None

    def method(self, layer: LayerInfo, decision: Decision, timings: Timings | None) -> Method:
        """How the norm of one layer is taken."""
        raise TypeError(f"{type(self).__name__} does not say how norms are taken")

    def plan(self, info: ModelInfo, *, decision: Decision = "time", timings: Timings | None = None) -> Plan:
        """Group the layers and choose a norm method for each.

        Guarantee: a group's ``norm_bound`` is its clipping norm, enforced at run time by the clipping function.
        Source: math.md section 3.
        """
        if not info.layers:
            raise ConfigError("The model has no trainable parameter, so there is nothing to clip or to train; unfreeze a layer.")
        methods = {layer.name: self.method(layer, decision, timings) for layer in info.layers}
        tied = tied_layers(info.layers)
        for names in tied:  # one parameter, one norm: its layers must agree on how it is taken
            if any(methods[name] != "ghost" for name in names):
                methods.update(dict.fromkeys(names, "instantiate"))
        members = group_layers(info.layers, tied, self.grouping)
        clip_norm = initial_clip(self.max_grad_norm) / math.sqrt(len(members))
        sizes = {layer.name: layer.num_params for layer in info.layers}
        groups = tuple(Group(name, layers, clip_norm, clip_norm, sum(sizes[layer] for layer in layers)) for name, layers in members.items())
        if self.adaptive is not None:
            groups += (self.adaptive.group(),)
        return Plan(str(getattr(self, "name", "clipping")), groups, methods, self.clipping, self.gamma, layers=info.layers)


class PerSample(Clipping):
    """Instantiates every per-sample gradient: simple, fast on small models, hungry for memory."""

    name: Literal["per_sample"] = "per_sample"

    def method(self, layer: LayerInfo, decision: Decision, timings: Timings | None) -> Method:
        """Always instantiate."""
        return "instantiate"


class Ghost(Clipping):
    """Takes every norm without the per-sample gradient where such a norm exists."""

    name: Literal["ghost"] = "ghost"

    def method(self, layer: LayerInfo, decision: Decision, timings: Timings | None) -> Method:
        """Ghost for linear, convolution and embedding layers."""
        return "ghost" if has_ghost_norm(layer) else "instantiate"


class MixedGhost(Clipping):
    """Chooses per layer between the ghost norm and the per-sample gradient."""

    name: Literal["mixed_ghost"] = "mixed_ghost"

    def method(self, layer: LayerInfo, decision: Decision, timings: Timings | None) -> Method:
        """By the decision rule of ``dptrain/costs.py``."""
        return choose(layer, decision, timings)


def tied_layers(layers: Sequence[LayerInfo]) -> list[tuple[str, ...]]:
    """Sets of layers that share a parameter, directly or through others, in order of first appearance.

    Args:
        layers: facts of the layers.
    Returns:
        Tuples of at least two layer names.
    """
    parts: list[tuple[list[str], set[str]]] = []
    for layer in layers:
        touching = [part for part in parts if part[1] & set(layer.params)]
        names = [name for part in touching for name in part[0]] + [layer.name]
        params = set(layer.params).union(*(part[1] for part in touching))
        parts = [part for part in parts if part not in touching] + [(names, params)]
    return [tuple(names) for names, _ in parts if len(names) > 1]


def group_layers(
    layers: Sequence[LayerInfo], tied: Sequence[tuple[str, ...]], grouping: str | Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Partition the layers into named groups; layers that share a parameter fall into one group.

    Args:
        layers: facts of the layers.
        tied: sets of layers that share a parameter.
        grouping: ``flat``, ``per_layer`` or group name -> patterns of layer names.
    Returns:
        Group name -> layer names, both in order of first appearance.
    Raises:
        ConfigError: a layer matches no group, a group matches no layer, or tied layers fall into different groups.
    """
    names = [layer.name for layer in layers]
    if grouping == "flat":
        return {"all": tuple(names)}
    leader = {name: part[0] for part in tied for name in part}
    result: dict[str, list[str]] = {}
    if isinstance(grouping, str):
        for name in names:
            result.setdefault(leader.get(name, name), []).append(name)
        return {name: tuple(members) for name, members in result.items()}
    for name in names:
        group = next((g for g, patterns in grouping.items() if any(fnmatchcase(name, p) for p in patterns)), None)
        if group is None:
            raise ConfigError(f"Layer {name!r} matches no pattern of strategy.grouping; add a group with the pattern '*' at the end.")
        result.setdefault(group, []).append(name)
    empty = [group for group in grouping if group not in result]
    if empty:
        raise ConfigError(f"The groups {empty} of strategy.grouping match no layer; the layers are {', '.join(names)}.")
    of = {name: group for group, members in result.items() for name in members}
    for part in tied:
        if len({of[name] for name in part}) > 1:
            raise ConfigError(f"The layers {', '.join(part)} share a parameter, so strategy.grouping must put them into one group.")
    return {name: tuple(members) for name, members in result.items()}
