"""Watching a model's calls: what its trainable layers saw since the last step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from dptrain_torch.hooks import FIRST_CALLS, Tap, Unit


@dataclass
class Recording:
    """The forward passes since the last step.

    Args:
        tap: what the trainable layers saw.
        output: of the last pass, where a bound rests on the whole model.
        outputs: floating tensors that the passes returned, for the check of the first step.
        passes: examples of each pass, and calls seen up to its end.
    """

    tap: Tap
    output: Any = None
    outputs: list[Tensor] = field(default_factory=list)
    passes: list[tuple[int, int]] = field(default_factory=list)

    def keep(self, batch: int) -> None:
        """Forget the calls of passes over another number of examples: evaluations in between, which the loss does not come from."""
        start, stale = 0, set[int]()
        for size, end in self.passes:
            if size != batch:
                stale.update(id(call) for call in self.tap.calls[start:end])
            start = end
        self.tap.forget(stale)
        self.tap.batch, self.passes = batch, []


class Watching(ABC):
    """Records the forward passes of a model whenever gradients are enabled.

    Args:
        module: the model.
        units: its trainable layers.
    """

    def __init__(self, module: nn.Module, units: list[Unit]) -> None:
        self.module, self.units = module, units
        self._prepared = self._checked = False  # whether there is a plan, and whether a first step has passed its check
        self._handles: list[Any] = []
        self._depth = 0
        self._recording: Recording | None = None

    @abstractmethod
    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the plan, from what the model is called with for the first time."""

    def _watch(self) -> Any:
        """Follow the model's calls; returns the handle."""
        return self.module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._depth == 0 and torch.is_grad_enabled():
            if not self._prepared:
                self._prepare(args, kwargs)
            first = next((x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.dim()), None)
            if first is not None:
                if self._recording is None:
                    self._recording = Recording(Tap(self.units, len(first), first=0 if self._checked else FIRST_CALLS))
                self._recording.tap.batch = len(first)
                self._recording.tap.__enter__()
        if self._depth == 0:  # now, so that it runs after the tap's own hook where the whole model is one layer
            self._leave = module.register_forward_hook(self._after, always_call=True)
        self._depth += 1

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._leave.remove()
        if self._recording is not None and torch.is_grad_enabled():
            self._recording.tap.__exit__(None, None, None)
            self._recording.output = output
            found = [z for z in tree_flatten(output)[0] if isinstance(z, Tensor) and z.requires_grad and z.dim()]
            self._recording.outputs += [] if self._checked else found
            self._recording.passes.append((self._recording.tap.batch, len(self._recording.tap.calls)))
