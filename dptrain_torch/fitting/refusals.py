"""What private training refuses of a model and its optimizer, before anything is spent."""

from __future__ import annotations

import torch
from torch import nn

from dptrain.errors import ConfigError
from dptrain_torch.gradients import trainable


def refuse_wrappers(module: nn.Module) -> None:
    """Refuse what calls the model in a way that the engine cannot follow.

    Raises:
        ConfigError: a compiled or parallel wrapper, or several processes.
    """
    name = type(module).__name__
    if name in ("OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        raise ConfigError(f"PrivacyEngine needs the model itself, not its {name}; give it the module inside, and train on one device.")
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ConfigError("PrivacyEngine draws one sample and one noise on one process; several would each add their own. Run one process.")


def check_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that steps through a closure, or that holds other parameters than the trainable ones of the model.

    Raises:
        ConfigError: with the reason.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("LBFGS evaluates the loss several times per step through a closure; use an optimizer that does not.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    own = {id(p): name for name, p in trainable(module).items()}
    if held - own.keys():
        raise ConfigError("The optimizer holds trainable parameters that are not the model's; they would never be trained. Remove them.")
    missing = [name for i, name in own.items() if i not in held]
    if missing:
        raise ConfigError(
            f"The optimizer lacks {len(missing)} trainable parameters ({', '.join(missing[:3])} ...): they would use up the bound and "
            "never be trained; freeze them with requires_grad_(False) before making the engine, or give them to the optimizer."
        )
