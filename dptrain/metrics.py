"""Numbers computed from a model's outputs: area under the ROC curve, certified radius, certified accuracy.

Plain numpy, so both frameworks report the same numbers. They are about the data they are computed on: on test data, not private.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dptrain.errors import DataError

Array = NDArray[Any]


def auroc(scores: Array, labels: Array) -> float:
    """Area under the ROC curve: the chance that a random positive scores above a random negative, a tie counting one half.

    With midranks, the U statistic of Mann and Whitney over ``N1 N0``; its numerator is a sum of integers, so the value is exact up
    to one division. For two outputs, the score of class 1 is ``outputs[:, 1] - outputs[:, 0]``.

    Args:
        scores: ``[N]``, larger where label 1 is likelier; infinities are allowed.
        labels: ``[N]``, 0 or 1.
    Returns:
        A number from 0 to 1.
    Raises:
        DataError: other shapes, NaN scores, labels other than 0 and 1, or one class only, for which no value exists.
    Source: Hanley and McNeil 1982 (Radiology 143).
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise DataError(
            f"auroc needs one score and one label per example, and got shapes {scores.shape} and {labels.shape}; give [N] twice."
        )
    if np.isnan(scores).any():
        raise DataError(f"auroc got {int(np.isnan(scores).sum())} NaN scores; the model has diverged, so lower the learning rate.")
    if not np.isin(labels, (0, 1)).all():
        raise DataError("auroc is for two classes and got labels other than 0 and 1; use the accuracy for more classes.")
    positive = labels == 1
    _, rank = np.unique(scores, return_inverse=True)
    ones = np.bincount(rank[positive], minlength=1)
    zeros = np.bincount(rank[~positive], minlength=len(ones))
    ones = np.pad(ones, (0, len(zeros) - len(ones)))
    num_ones, num_zeros = int(ones.sum()), int(zeros.sum())
    if not num_ones or not num_zeros:
        raise DataError(f"auroc needs examples of both classes, and got {num_ones} of class 1 and {num_zeros} of class 0.")
    below = np.cumsum(zeros) - zeros
    return int((ones * (2 * below + zeros)).sum()) / (2 * num_ones * num_zeros)


def classification_metrics(outputs: Array, labels: Array) -> dict[str, float]:
    """What a backend reports beside the loss: accuracy, and the area under the ROC curve where there are two classes.

    Args:
        outputs: ``[N, K]`` with the argmax as prediction, or ``[N, 1]`` or ``[N]``, positive for label 1.
        labels: ``[N]``; floats, or labels of more axes, are regression targets.
    Returns:
        ``accuracy``, and ``auroc`` if the outputs are of two classes, are numbers and the labels hold both; nothing for regression.
    """
    z, y = np.asarray(outputs), np.asarray(labels)
    if y.ndim != 1 or y.dtype.kind not in "iu" or not len(y):
        return {}
    z = z.reshape(len(y), -1)
    guess = z.argmax(axis=1) if z.shape[1] > 1 else z[:, 0] > 0
    metrics = {"accuracy": float((guess == y).mean())}
    if z.shape[1] <= 2:
        # A difference of float32 is exact in float64, except where it ties or underflows anyway.
        score = z[:, -1].astype(np.float64) - (z[:, 0] if z.shape[1] == 2 else 0.0)
        if not np.isnan(score).any() and len(np.unique(y)) == 2:
            metrics["auroc"] = auroc(score, y)
    return metrics


def certified_radius(outputs: Array, labels: Array, lipschitz: float, input_scale: float = 1.0) -> Array:
    """How far each input may be moved, in the L2 norm, with a proof that its prediction stays right.

    Args:
        outputs: ``[N, K]`` with the argmax as prediction, or one output ``[N]`` or ``[N, 1]`` that is positive for label 1.
        labels: ``[N]``, whole numbers below K, or 0 and 1 for one output.
        lipschitz: L, a bound on the Lipschitz constant of the whole vector of outputs, L2 to L2, in the normalised input.
        input_scale: s, the smallest standard deviation of the data's normalisation; the radius is in units before that division.
    Returns:
        Radii ``[N]``, float64; 0 for a wrong or tied prediction.
    Raises:
        DataError: shapes, labels or constants that do not fit, or outputs that are not finite.
    Guarantee: no perturbation of the input of a norm below the radius changes a right prediction, if L is a true bound and the
        outputs are exact. One output: it is L-Lipschitz, so it moves by less than ``|z|`` within ``|z| / L``. K outputs: class y
        stays ahead of j as long as the margin ``z_y - z_j = <e_y - e_j, z>`` is positive; ``|e_y - e_j| = sqrt(2)``, so by
        Cauchy-Schwarz the margin moves by at most ``sqrt(2) L |d|`` under a perturbation d, for every j: radius
        ``min_j (z_y - z_j) / (sqrt(2) L)``. Normalisation divides each coordinate by its standard deviation, so a perturbation of
        norm r before it has norm at most ``r / s`` after it: the radius before it is at least s times the radius after it.
    Source: Tsuzuku, Sato, Sugiyama 2018 (arXiv:1802.04034), proposition 1; Li, Haque, Anil, Lucas, Grosse, Jacobsen 2019
        (arXiv:1911.00937) for networks with a constant of 1.
    """
    z, y = np.asarray(outputs, np.float64), np.asarray(labels)
    if z.ndim == 2 and z.shape[1] == 1:
        z = z[:, 0]
    if z.ndim not in (1, 2) or y.shape != z.shape[:1]:
        raise DataError(
            f"certified_radius needs outputs [N, K], [N, 1] or [N] and labels [N], and got shapes {np.shape(outputs)} and {y.shape}."
        )
    classes = z.shape[1] if z.ndim == 2 else 2
    if not np.isin(y, np.arange(classes)).all():
        raise DataError(f"certified_radius got labels other than the whole numbers from 0 to {classes - 1}; they must fit the outputs.")
    if not np.isfinite(z).all():
        raise DataError("certified_radius got outputs that are not finite; the model has diverged, so lower the learning rate.")
    if not (math.isfinite(lipschitz) and lipschitz >= 0 and math.isfinite(input_scale) and input_scale > 0):
        raise DataError(
            f"certified_radius needs a finite Lipschitz constant and a positive input scale, and got {lipschitz!r} and {input_scale!r}."
        )
    y = y.astype(np.int64)
    if z.ndim == 1:
        margin, constant = np.where(y == 1, z, -z), lipschitz
    else:
        rows = np.arange(len(z))
        others = z.copy()
        others[rows, y] = -np.inf
        margin, constant = z[rows, y] - others.max(axis=1), math.sqrt(2) * lipschitz
    margin = np.maximum(margin, 0.0)
    if not constant:  # a constant network: what is right stays right everywhere
        return np.where(margin > 0, np.inf, 0.0)
    return np.asarray(input_scale * margin / constant)


def certified_accuracy(radii: Array, at: Sequence[float]) -> dict[float, float]:
    """The share of examples whose prediction is right and proven to stay so under every perturbation up to a norm.

    Args:
        radii: from ``certified_radius``.
        at: norms, in the same units; 0 gives the accuracy, ties counted as wrong.
    Returns:
        For each norm the share of radii above it.
    Raises:
        DataError: no radii, or radii or norms that are negative or NaN.
    Source: as ``certified_radius``.
    """
    radii = np.asarray(radii, np.float64)
    if radii.ndim != 1 or not len(radii) or not (radii >= 0).all():
        raise DataError("certified_accuracy needs at least one radius, none of them negative or NaN; use certified_radius.")
    if bad := [r for r in at if not r >= 0]:
        raise DataError(f"certified_accuracy got the norm {bad[0]!r}; give norms of at least 0.")
    return {float(r): float((radii > r).mean()) for r in at}
