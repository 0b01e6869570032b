"""A backend that does everything another one does, and shows what an attacker would see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dptrain.backend import Backend
from dptrain.plan import Plan


class Watch:
    """Delegates to a backend; a subclass sees or changes what passes through.

    Args:
        backend: the one that is watched.
    """

    def __init__(self, backend: Backend) -> None:
        self._inner = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def plan_owner(plan: Plan, parameter: str) -> str:
    """The group of a parameter: that of the first layer that uses it."""
    return next(plan.group_of(layer.name).name for layer in plan.layers if parameter in layer.params)


def owner_parameters(plan: Plan, group: str) -> list[str]:
    """Identifiers of a group's parameters, each once, in the plan's order."""
    names = dict.fromkeys(name for layer in plan.layers for name in layer.params)
    return [name for name in names if plan_owner(plan, name) == group]


def flat(arrays: Mapping[str, np.ndarray], plan: Plan) -> dict[str, np.ndarray]:
    """Group -> all its numbers in one float64 vector, parameters in the plan's order.

    Args:
        arrays: identifier -> array.
        plan: groups and their layers.
    Returns:
        Group name -> ``[d_k]``.
    """
    empty = np.zeros(0)
    return {
        g.name: np.concatenate([empty, *(np.asarray(arrays[n], np.float64).ravel() for n in owner_parameters(plan, g.name) if n in arrays)])
        for g in plan.gradient_groups
    }
