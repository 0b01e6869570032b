"""What the update steps: the user's optimizer, whose own step the engine covers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dptrain_torch.privacy_engine import PrivacyEngine


@dataclass
class Inner:
    """An optimizer with the step that it had before the engine came."""

    optimizer: torch.optim.Optimizer
    step: Callable[..., Any]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optimizer.param_groups


@dataclass
class Late:
    """Stands for the optimizer of an engine that is attached later."""

    engine: PrivacyEngine

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.engine._inner.param_groups

    def step(self) -> None:
        """The optimizer's own step."""
        self.engine._inner.step()
