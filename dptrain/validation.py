"""What checking and fixing a model tell a person; the work itself is the backends'."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MAX_GROUPS = 32  # of a GroupNorm in the place of a BatchNorm
LEAST = 8  # channels in a group where there is nothing else to average over: two numbers normalised together are +1 and -1


@dataclass(frozen=True)
class ValidatedLayer:
    """One layer in a ``Validation``.

    Args:
        name: path in the model.
        layer: its class.
        method: ``rule``: norms from activations and cotangents; ``bare``: the layer's own parameters, without the layers inside it;
            ``slow``: one vector-Jacobian product for each example; ``unused``: no call reached it.
        parameters: names of its trainable parameters.
    """

    name: str
    layer: str
    method: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Validation:
    """A model that passed ``validate``; print it.

    Args:
        layers: the layers that are tapped.
        num_params: numbers that are trained.
    """

    layers: tuple[ValidatedLayer, ...]
    num_params: int

    def __str__(self) -> str:
        from rich.table import Table

        from dptrain.tables import render

        table = Table(*("layer", "class", "method", "parameters"))
        for layer in self.layers:
            table.add_row(layer.name, layer.layer, layer.method, ", ".join(layer.parameters))
        table.caption = f"{len(self.layers)} layers, {self.num_params:,} trainable parameters: per-sample gradients are exact"
        return render(table)


@dataclass(frozen=True)
class Change:
    """One layer that was replaced or set differently.

    Args:
        layer: path in the model.
        before: what it was.
        after: what it is now.
    """

    layer: str
    before: str
    after: str


@dataclass(frozen=True)
class FixReport:
    """What ``fix`` did; print it.

    Args:
        changes: the layers that were replaced or set differently.
        left: sentences about what is still refused.
        in_place: whether the given model itself was changed, although its class usually leads to a copy.
    """

    changes: tuple[Change, ...]
    left: tuple[str, ...]
    in_place: bool = False

    def __str__(self) -> str:
        kinds: dict[tuple[str, str], list[str]] = {}
        for change in self.changes:
            kinds.setdefault((change.before, change.after), []).append(change.layer)
        lines = [f"{before} -> {after}: {shown(names)}" for (before, after), names in kinds.items()] or ["nothing had to be replaced"]
        lines += [f"still refused: {sentence}" for sentence in self.left]
        return "\n".join([*lines, "the given model was changed in place"] if self.in_place and self.changes else lines)


def shown(names: list[str]) -> str:
    """A list of layers that fits on a line."""
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def norm_groups(channels: int, alone: bool) -> int:
    """Groups of a GroupNorm that takes the place of a BatchNorm.

    Args:
        channels: C.
        alone: the channels of one example are all there is, as in ``[B, C]``.
    Returns:
        The greatest common divisor of C and 32, as Opacus chooses; with ``alone`` it is halved until a group has 8 channels.
    """
    count = math.gcd(MAX_GROUPS, channels)
    while alone and count > 1 and channels // count < LEAST:
        count //= 2
    return count


def two_pass_problems(clips: Iterable[str], again: Iterable[tuple[str, str]]) -> list[str]:
    """Why a second pass, which runs backwards through the forward pass itself with weighted losses, would not be bounded.

    A clip inside the model is not linear in them. And a layer whose norm is found by running it again, one example at a time, may round
    to the other side of a kink (a ReLU) than it did in the forward pass: its norm is then not that of the gradient that is summed.

    Args:
        clips: names of the layers that clip cotangents.
        again: name and class of each layer whose norms come from running it again.
    Returns:
        A sentence for each layer to blame.
    """
    return [
        f"layer {name!r}: LossGradientClip scales cotangents, so two_pass is not bounded; use gradients: book_keeping, or remove it."
        for name in clips
    ] + [
        f"layer {name!r} ({kind}): its norms are found by running it again, which may round otherwise than the pass that two_pass sums, "
        "so the sum would not be bounded; use gradients: book_keeping."
        for name, kind in again
    ]
