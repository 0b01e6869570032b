"""private_vision: mixed ghost clipping. https://github.com/woodyx218/private_vision (no package on PyPI; import a checkout)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.peers import peer
from dptrain.comparison.measure import Bench

INSTALL = "git clone https://github.com/woodyx218/private_vision"


def engine(bench: Bench, **mode: Any) -> Callable[[], None]:
    """A step as in its README: ``optimizer.step(loss=...)`` with the losses of all examples."""
    import torch

    package = peer("private_vision", INSTALL, "PRIVATE_VISION")
    model, optimizer = bench.model.train(), torch.optim.SGD(bench.model.parameters(), bench.learning_rate)
    privacy = package.PrivacyEngine(
        model, batch_size=len(bench.x), sample_size=50 * len(bench.x), epochs=1, max_grad_norm=bench.max_grad_norm,
        noise_multiplier=bench.noise_multiplier, target_epsilon=1.0, record_snr=False, **mode,
    )  # fmt: skip
    privacy.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.step(loss=bench.loss(model(bench.x), bench.y))

    return step


def mixed(bench: Bench) -> Callable[[], None]:
    """Mixed ghost clipping, its fastest mode."""
    return engine(bench, ghost_clipping=True, mixed=True)


def ghost(bench: Bench) -> Callable[[], None]:
    """Ghost clipping for every layer."""
    return engine(bench, ghost_clipping=True, mixed=False)
