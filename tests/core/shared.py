"""Small configs and data sets for the tests of the core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from dptrain import TrainConfig
from dptrain.data import Dataset, from_arrays

# Chance of a correct generator failing one statistical test. The seeds are fixed, so that a test that passes once passes always.
FALSE_FAILURE = 1e-6

EXAMPLES = settings(deadline=None, derandomize=True, database=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def plain(**parts: Any) -> dict[str, Any]:
    """The smallest config as plain data, with other parts."""
    base = {
        "model": {"name": "mlp", "hidden": [8]},
        "data": "digits",
        "privacy": {"noise_multiplier": 1.0, "accountant": "rdp"},
        "sampling": {"sample_rate": 0.2, "steps": 4},
    }
    return {**base, **parts}


def config(**parts: Any) -> TrainConfig:
    """The smallest config, with other parts."""
    return TrainConfig.parse(plain(**parts))


def blobs(count: int = 60, features: int = 5, classes: int = 3, seed: int = 0) -> Dataset:
    """Well separated classes."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    x = rng.standard_normal((count, features)) + 3.0 * np.eye(classes, features)[y]
    half = max(1, count // 3)
    return from_arrays(x, y, x[:half], y[:half], num_classes=classes, name="blobs")


def write_npz(path: Path, **arrays: Any) -> Path:
    """A user's data file; by default ``blobs``."""
    data = blobs()
    given = {"x_train": data.x_train, "y_train": data.y_train, "x_test": data.x_test, "y_test": data.y_test}
    np.savez(path, **{k: v for k, v in {**given, **arrays}.items() if v is not None})
    return path
