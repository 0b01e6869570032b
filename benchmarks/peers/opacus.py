"""Opacus: per-sample gradients by hooks or by functorch, and ghost clipping. https://github.com/pytorch/opacus"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.peers import mean_loss_step, peer
from dptrain.comparison.measure import Bench, PeerMissingError

INSTALL = "pip install opacus"


def private_parts(bench: Bench, mode: str, **settings: Any) -> tuple[Any, ...]:
    """What ``make_private`` returns for one whole batch per step."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    opacus = peer("opacus", INSTALL)
    optimizer = torch.optim.SGD(bench.model.parameters(), bench.learning_rate)
    loader = DataLoader(TensorDataset(bench.x.cpu(), bench.y.cpu()), batch_size=len(bench.x))
    try:
        return tuple(
            opacus.PrivacyEngine().make_private(
                module=bench.model.train(), optimizer=optimizer, data_loader=loader, noise_multiplier=bench.noise_multiplier,
                max_grad_norm=bench.max_grad_norm, poisson_sampling=False, grad_sample_mode=mode, **settings,
            )
        )  # fmt: skip
    except Exception as error:
        raise PeerMissingError(f"Opacus refuses this model: {str(error).splitlines()[0]}") from None


def per_sample(bench: Bench, mode: str) -> Callable[[], None]:
    """A step with materialised per-sample gradients."""
    model, optimizer, _ = private_parts(bench, mode)
    return mean_loss_step(bench, model, optimizer)


def hooks(bench: Bench) -> Callable[[], None]:
    """The default mode."""
    return per_sample(bench, "hooks")


def functorch(bench: Bench) -> Callable[[], None]:
    """Per-sample gradients by ``torch.func``."""
    return per_sample(bench, "functorch")


def ghost(bench: Bench) -> Callable[[], None]:
    """Fast gradient clipping with ghost norms: two backward passes."""
    import torch

    class Criterion:
        """The loss as Opacus calls it: with and without reduction."""

        reduction = "mean"

        def __call__(self, outputs: Any, targets: Any) -> Any:
            losses = bench.loss(outputs, targets)
            return losses.mean() if self.reduction == "mean" else losses

    for module in bench.model.modules():
        if isinstance(module, torch.nn.Embedding):  # its ghost norm takes a view of the indices, and expanded ones have none
            module.register_forward_pre_hook(lambda m, args: (args[0].contiguous(), *args[1:]))
    model, optimizer, criterion, _ = private_parts(bench, "ghost", criterion=Criterion())

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(bench.x), bench.y).backward()
        optimizer.step()

    return step
