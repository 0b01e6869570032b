"""Other libraries on the same models and data, for `dptrain compare --strategies benchmarks.peers.NAME:FUNCTION`.

Each adapter imports its library from the environment, or from a checkout whose folder an environment variable names, and says how to
get it where there is none. Nothing of theirs is copied. An adapter makes one training step as the library's own examples do:
zero the gradients, forward, backward, clipped and noisy step, with the settings under which the library is exact.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from dptrain.comparison.measure import Bench, PeerMissingError


def peer(package: str, install: str, variable: str | None = None) -> Any:
    """A peer's package.

    Args:
        package: its import name.
        install: how to get it.
        variable: environment variable with the folder of a checkout that contains the package.
    Returns:
        The module.
    Raises:
        PeerMissingError: it is not there, or cannot be imported.
    """
    if variable and (folder := os.environ.get(variable)):
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        where = f", or set {variable} to the folder of a checkout" if variable else ""
        raise PeerMissingError(f"{package} cannot be imported ({error}): {install}{where}.") from None


def mean_loss_step(bench: Bench, model: Any, optimizer: Any) -> Callable[[], None]:
    """A step of torch's tutorials: zero the gradients, the mean loss backward, the optimizer's step."""

    def step() -> None:
        optimizer.zero_grad()
        bench.loss(model(bench.x), bench.y).mean().backward()
        optimizer.step()

    return step
