"""fastDP: book-keeping. https://github.com/awslabs/fast-differential-privacy (not this project on PyPI; import a checkout)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers import peer
from dptrain.comparison.measure import Bench

INSTALL = "git clone https://github.com/awslabs/fast-differential-privacy; pip install transformers"


def let_transformers_import() -> None:
    """fastDP imports transformers, and that a torchvision whose compiled part may not fit the torch that is installed."""
    spec = importlib.util.spec_from_file_location("packages", Path(__file__).parents[2] / "examples" / "packages.py")
    assert spec is not None and spec.loader is not None
    sys.modules["packages"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import transformers  # noqa: F401 - whole, before fastDP takes parts of it


def engine(bench: Bench, mode: str) -> Callable[[], None]:
    """A step as in its README, clipping all layers together, which is the exact form that others have too."""
    import torch

    let_transformers_import()
    package = peer("fastDP", INSTALL, "FASTDP")
    model, optimizer = bench.model.train(), torch.optim.SGD(bench.model.parameters(), bench.learning_rate)
    privacy = package.PrivacyEngine(
        model, batch_size=len(bench.x), sample_size=50 * len(bench.x), epochs=1, max_grad_norm=bench.max_grad_norm,
        noise_multiplier=bench.noise_multiplier, clipping_mode=mode, clipping_fn="Abadi", clipping_style="all-layer",
        loss_reduction="sum",
    )  # fmt: skip
    privacy.attach(optimizer)

    def step() -> None:
        bench.loss(model(bench.x), bench.y).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def mixopt(bench: Bench) -> Callable[[], None]:
    """The default mode."""
    return engine(bench, "MixOpt")


def ghost(bench: Bench) -> Callable[[], None]:
    """Ghost norms for every layer."""
    return engine(bench, "ghost")
