"""Examples that strain a bound: the canaries of the checks. Synthetic, but for a few real ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from dptrain.config import TrainConfig
from dptrain.data import Dataset
from dptrain.layer_specs import Embedding

SCALES = (0.1, 1.0, 10.0, 1000.0)
REAL = 8


def vocabulary(config: TrainConfig, data: Dataset) -> int:
    """Token ids that the model knows."""
    tables = [layer.vocabulary for layer in config.model.expand(data.input_shape) if isinstance(layer, Embedding)]
    return tables[0] if tables else int(data.x_train.max()) + 1


def inputs(config: TrainConfig, data: Dataset, rng: np.random.Generator) -> np.ndarray:
    """Inputs ``[n, ...]``: real ones; random, constant and single-position ones in several sizes; for tokens, random and repeated ids."""
    shape, kind = data.input_shape, data.x_train.dtype
    real = data.x_train[rng.integers(0, len(data.x_train), REAL)]
    if np.issubdtype(kind, np.integer):
        rows = vocabulary(config, data)
        made = [rng.integers(0, rows, shape) for _ in range(6)] + [np.full(shape, rng.integers(0, rows)) for _ in range(6)]
        return np.concatenate([real, np.stack(made).astype(kind)])
    single = np.zeros(shape)
    single[tuple(n // 2 for n in shape)] = 1.0
    shapes = [rng.standard_normal(shape), rng.random(shape), np.ones(shape), single, -np.ones(shape)]
    return np.concatenate([real, np.stack([scale * s for s in shapes for scale in SCALES]).astype(kind)])


def strange_inputs(data: Dataset) -> np.ndarray:
    """Inputs that nothing good can come of: not finite, wholly or in one place, and so large that products overflow."""
    shape, kind = data.input_shape, data.x_train.dtype
    if np.issubdtype(kind, np.integer):
        return np.zeros((0, *shape), kind)
    place = tuple(n // 2 for n in shape)
    rows = np.ones((5, *shape))
    rows[0], rows[2] = np.nan, 1e30
    rows[(1, *place)], rows[(3, *place)], rows[(4, *place)] = np.inf, np.nan, -1e37
    return rows.astype(kind)


def candidates(config: TrainConfig, data: Dataset, seed: int = 0, strange: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Candidates with labels of two kinds each.

    Args:
        config: of the run.
        data: shapes, types, and a few examples.
        seed: of the choice; auditing promises nothing.
        strange: whether to add inputs that are not finite.
    Returns:
        Inputs ``[2 n, ...]`` and targets ``[2 n, ...]``; row ``i + n`` is row i with another target.
    """
    rng = np.random.default_rng(seed)
    x = inputs(config, data, rng)
    if strange:
        x = np.concatenate([x, strange_inputs(data)])
    n = len(x)
    if data.num_classes is None:
        real = data.y_train[rng.integers(0, len(data.y_train), n)]
        spread = float(np.abs(data.y_train).max()) or 1.0
        return np.concatenate([x, x]), np.concatenate([real, -10 * spread - real]).astype(data.y_train.dtype)
    y = rng.integers(0, data.num_classes, n)
    other = (y + 1 + rng.integers(0, max(1, data.num_classes - 1), n)) % data.num_classes
    return np.concatenate([x, x]), np.concatenate([y, other]).astype(data.y_train.dtype)


def mislabelled(data: Dataset, count: int, rng: np.random.Generator) -> tuple[Any, np.ndarray, np.ndarray]:
    """Real examples with wrong targets: what a model has to remember in order to fit.

    Args:
        data: the data set.
        count: how many, at most N.
        rng: chooses.
    Returns:
        Rows of the training split ``[m]``, their inputs and their wrong targets.
    """
    rows = rng.choice(len(data.x_train), count, replace=False)
    if data.num_classes is None:
        return rows, data.x_train[rows], data.y_train[rng.permutation(rows)]
    wrong = (data.y_train[rows] + 1 + rng.integers(0, max(1, data.num_classes - 1), count)) % data.num_classes
    return rows, data.x_train[rows], wrong.astype(data.y_train.dtype)
