"""Certified robustness of Lipschitz networks: no perturbation smaller than the radius changes a prediction.

The same certificates that bound the sensitivity bound how fast outputs can move with the input. Radii are in the input's own units:
data that were divided by a standard deviation per channel have moved by at most the perturbation over the smallest of them. Certificates
belong to the trained weights, which are a private release; radii and accuracies are about the examples they are computed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dptrain.backend import Backend
from dptrain.bounds import output_lipschitz
from dptrain.checkpoint import load_arrays
from dptrain.config import TrainConfig
from dptrain.data import Dataset
from dptrain.errors import ConfigError, RunError, UnsupportedModelError
from dptrain.metrics import certified_accuracy, certified_radius
from dptrain.projection import certify as certify_weights
from dptrain.rundir import read_json
from dptrain.setup import assemble, probe


@dataclass(frozen=True)
class Robustness:
    """What is certified of a model's predictions on some examples.

    Args:
        lipschitz: certified Lipschitz constant of the outputs in the model's (normalised) input.
        input_scale: smallest scale of the data's normalisation; a perturbation r of the raw input is at most ``r / input_scale`` of the
            normalised one.
        radii: ``[N]``, in the input's own units; 0 where the prediction is wrong.
        accuracy: radius -> certified accuracy; at 0 the ordinary one.
    """

    lipschitz: float
    input_scale: float
    radii: np.ndarray
    accuracy: dict[float, float]


def input_scale(data: Dataset) -> float:
    """The smallest standard deviation that the data were divided by; 1 where they were not."""
    std = data.public_constants.get("std", ())
    return min((float(s) for s in std), default=1.0)


def certify(backend: Backend, model: Any, data: Dataset, radii: Sequence[float] = (0.0, 0.1, 0.25, 0.5, 1.0)) -> Robustness:
    """Certified radii of a model's predictions on the test split.

    Args:
        backend: the model's backend.
        model: a model made of layers with a proven bound.
        data: the data set.
        radii: where to report the certified accuracy, in the input's own units.
    Returns:
        Radii and accuracies. NOT private with respect to the test data.
    Raises:
        UnsupportedModelError: lists every layer without a bound.
        ConfigError: there is no test split, or the targets are no classes.
    Guarantee: within its radius (L2) no perturbation of a raw input changes the prediction, in exact arithmetic.
    Source: Tsuzuku, Sato, Sugiyama 2018 (arXiv:1802.04034), Proposition 1; ``metrics.certified_radius``.
    """
    if not len(data.x_test):
        raise ConfigError(f"data {data.name!r} has no test split, so there is no prediction to certify; give one.")
    if data.num_classes is None:
        raise ConfigError(f"data {data.name!r} has float targets; certified radii are for classes.")
    graph = backend.graph(model, probe(data)[0])
    if graph.problems:
        raise UnsupportedModelError(graph.problems)
    constant = output_lipschitz(graph, certify_weights(graph, backend.graph_weights(model, graph)))
    scale = input_scale(data)
    found = certified_radius(backend.predict(model, data.x_test), data.y_test, constant, scale)
    return Robustness(constant, scale, found, certified_accuracy(found, radii))


def certify_run(path: Path, radii: Sequence[float], data: Dataset | None = None) -> Robustness:
    """Certified robustness of a finished run.

    Args:
        path: its directory.
        radii: where to report the certified accuracy.
        data: a data set in place of the config's.
    Returns:
        Radii and accuracies.
    Raises:
        RunError: the directory holds no finished run.
    """
    if not (path / "weights.safetensors").exists():
        raise RunError(f"{path} holds no weights.safetensors; finish the run first.")
    config, backend = TrainConfig.load(path / "config.yaml"), read_json(path / "run.json").get("backend")
    parts = assemble(config, str(backend), data)
    parts.backend.set_weights(parts.model, load_arrays(path / "weights.safetensors")[0])
    return certify(parts.backend, parts.model, parts.data, radii)
