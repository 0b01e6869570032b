"""The blocks of docs/migration.md and of the README's "Moving over" run without the other library's lines, on small data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dptrain_torch
from dptrain.adaptive import AdaptiveClip
from dptrain.data import load
from dptrain.strategies import get_strategy
from dptrain_tf.lipdp import pipeline

ROOT = Path(__file__).parents[2]
N = 64


def blocks(file: str) -> list[Any]:
    """Ours of each comparison: green lines and common ones."""
    text = (ROOT / file).read_text()
    found = []
    for i, block in enumerate(re.findall(r"```diff\n(.*?)```", text, re.S)):
        lines = block.splitlines()
        assert all(line[:1] in (" ", "+", "-", "") for line in lines)
        theirs = " ".join(line for line in lines if line.startswith("-"))
        ours = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        name = next((n for n in ("private_vision", "opacus", "tensorflow_privacy", "deel.lipdp") if n in theirs), "loader")
        found.append(pytest.param(ours, id=f"{Path(file).stem}-{i}-{name}"))
    return found


def torch_names() -> dict[str, Any]:
    """A model with BatchNorm, and images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 10))
    return {"model": model, "dataset": TensorDataset(torch.randn(N, 3, 8, 8), torch.arange(N) % 10)}


def keras_names() -> dict[str, Any]:
    """A Keras model with BatchNormalization, and images."""
    rng = np.random.default_rng(0)
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(8, 3), layers.BatchNormalization(), layers.ReLU(), layers.Flatten(), layers.Dense(10)]
    )
    x, y = rng.standard_normal((N, 8, 8, 3)).astype(np.float32), rng.integers(0, 10, N)
    return {"model": model, "x": x, "y": y, "x_test": x[:8], "y_test": y[:8]}


BLOCKS = [*blocks("docs/migration.md"), *blocks("README.md")]


@pytest.mark.parametrize("code", BLOCKS)
def test_our_side_of_every_comparison_runs(code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches and widths are made small; what was promised is printed or can be."""
    monkeypatch.setattr(pipeline, "load", lambda name, **options: load(name, **{**options, "limit": 250}))
    names = {**(keras_names() if "keras" in code else torch_names())}
    small = code.replace("256", "16").replace("=64", "=4").replace("batch_size=200", "batch_size=50").replace("(128)", "(8)")
    assert not re.search(r"\b(opacus|private_vision|tensorflow_privacy|deel)\b", small)
    exec(compile(small, "migration", "exec"), names)
    engine = names.get("engine", names.get("privacy_engine"))
    if engine is not None:
        assert 1 < engine.epsilon() <= engine.budget.privacy.target_epsilon
        assert engine.steps >= engine.schedule.steps_per_pass
    else:
        assert "epsilon = " in capsys.readouterr().out


def test_every_library_is_there_in_both_texts() -> None:
    for file in ("docs/migration", "README"):
        ids = [str(param.id) for param in BLOCKS if str(param.id).startswith(Path(file).stem)]
        for name in ("opacus", "private_vision", "tensorflow_privacy", "deel.lipdp"):
            assert any(i.endswith(name) for i in ids)


def test_the_example_of_transfer_learning_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "transfer.md").read_text(), re.S)
    exec(compile(code, "transfer", "exec"), {})
    text = capsys.readouterr().out
    assert "-> ChannelAffine" in text and "epsilon = 2.99" in text


def test_names_in_the_tables_exist() -> None:
    for name in ("fix", "validate", "PrivacyEngine"):
        assert callable(getattr(dptrain_torch, name))
    get_strategy("mixed_ghost", grouping="per_layer")
    get_strategy("mixed_ghost", max_grad_norm=AdaptiveClip(initial=1.0))
