"""Membership inference: exact curves, a model that has memorised, a private one that has not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dptrain.auditing.membership import balanced, likelihood_ratios, membership, roc, save, statistic
from dptrain.checkpoint import read_json
from dptrain.data import from_arrays
from dptrain.errors import ConfigError, RunError
from dptrain.trainer import train
from tests.core.shared import config


def noise_labels(n: int = 60) -> tuple[np.ndarray, ...]:
    """Inputs whose labels have to be learnt by heart."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, 20)), rng.integers(0, 2, n), rng.standard_normal((n, 20)), rng.integers(0, 2, n)


def test_curve_against_all_thresholds() -> None:
    rng = np.random.default_rng(1)
    scores, member = rng.integers(0, 6, 50).astype(float), rng.random(50) < 0.5
    found = roc("x", scores, member)
    pairs = {(float((scores >= t)[~member].mean()), float((scores >= t)[member].mean())) for t in [*np.unique(scores), np.inf]}
    assert set(zip(found.false_positive.tolist(), found.true_positive.tolist(), strict=True)) == pairs
    wins = (scores[member][:, None] > scores[~member]).mean() + (scores[member][:, None] == scores[~member]).mean() / 2
    assert found.area == pytest.approx(wins)
    assert found.advantage == pytest.approx(max(t - f for f, t in pairs))
    assert found.true_positive_at(0.0) == max(t for f, t in pairs if f == 0)


def test_likelihood_ratios_of_known_normals() -> None:
    rng = np.random.default_rng(2)
    inside = balanced(40, 500, rng)
    assert (inside.sum(0) == 20).all()
    member = np.arange(500) < 250
    shadows = rng.standard_normal((40, 500)) + 2.0 * inside
    target = rng.standard_normal(500) + 2.0 * member
    found = roc("lr", likelihood_ratios(target, shadows, inside), member)
    assert 0.88 < found.area < 0.95  # of two normals two standard deviations apart: 0.921


def test_statistic_is_the_logit() -> None:
    p = np.array([1e-9, 0.1, 0.5, 0.999999])
    assert statistic(-np.log(p), True) == pytest.approx(np.log(p) - np.log1p(-p), rel=1e-6)
    assert np.isfinite(statistic(np.array([0.0, np.inf, np.nan]), True)).all()


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_memorised_and_private_runs(backend: str, tmp_path: Path) -> None:
    data = from_arrays(*noise_labels(), num_classes=2, name="coins")
    base = {"model": {"name": "mlp", "hidden": [64]}, "optimizer": {"name": "adam", "learning_rate": 0.02}}
    plain = config(strategy="non_private", sampling={"sample_rate": 1.0, "steps": 60}, **base)
    train(plain, backend, out=tmp_path / "plain", data=data)
    found = membership(tmp_path / "plain", shadows=4, data=data)
    assert [r.attack for r in found.rocs] == ["loss threshold", "likelihood ratio"]
    assert all(r.advantage > 0.5 for r in found.rocs)
    assert found.epsilon is None
    private = config(privacy={"noise_multiplier": 20.0, "accountant": "rdp"}, sampling={"sample_rate": 0.5, "steps": 5}, **base)
    train(private, backend, out=tmp_path / "private", data=data)
    kept = membership(tmp_path / "private", shadows=0, data=data)
    assert kept.epsilon is not None
    assert kept.rocs[0].advantage < kept.claim + 0.5  # chance of more with 60 and 60: 6e-7 by Kolmogorov and Smirnov
    save(found, tmp_path / "plain")
    stored = read_json(tmp_path / "plain" / "membership.json")
    assert stored["private"] is False
    assert "NOT private" in (tmp_path / "plain" / "membership.svg").read_text()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="finish the run first"):
        membership(tmp_path)
    x, y, *_ = noise_labels()
    data = from_arrays(x, y, num_classes=2)
    train(config(), out=tmp_path / "run", data=data)
    with pytest.raises(ConfigError, match="no test split"):
        membership(tmp_path / "run", data=data)
    with pytest.raises(ConfigError, match="even whole number"):
        membership(tmp_path / "run", shadows=3, data=data)
