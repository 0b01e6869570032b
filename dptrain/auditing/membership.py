"""Membership inference on a finished run: who was in the training data, guessed from the model. NOT private, and no proof of anything.

Two attacks: the *loss threshold* (Yeom et al. 2018, arXiv:1709.01604) calls an example a member if its loss is small; the *likelihood
ratio* (Carlini et al. 2022, arXiv:2112.03570) asks whether its loss looks more like that of models trained with it or without it, for
which it trains shadow models of the same config. True-positive rates at low false-positive rates are what matters, hence logarithmic axes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from accounting import get_accountant
from dptrain.auditing.bounds import Array, Coins
from dptrain.checkpoint import load_arrays
from dptrain.config import TrainConfig
from dptrain.data import Dataset
from dptrain.errors import ConfigError, RunError
from dptrain.guard import Records
from dptrain.losses import LOSSES
from dptrain.rundir import RunDirectory, read_json
from dptrain.setup import prepare
from dptrain.trainer import Loop, planned_noise

LOW_RATES = (0.001, 0.01, 0.1)
# Below it a spread of losses is rounding.
LEAST_SPREAD = 1e-6


@dataclass(frozen=True)
class Roc:
    """How well an attack tells members from others.

    Args:
        attack: its name.
        false_positive, true_positive: rates of all thresholds, rising.
    """

    attack: str
    false_positive: Array = field(repr=False)
    true_positive: Array = field(repr=False)

    @property
    def advantage(self) -> float:
        """Largest difference of the rates."""
        return float((self.true_positive - self.false_positive).max())

    @property
    def area(self) -> float:
        """Area under the curve; 0.5 is guessing."""
        return float(np.trapezoid(self.true_positive, self.false_positive))

    def true_positive_at(self, false_positive: float) -> float:
        """The best true-positive rate at up to this false-positive rate."""
        return float(self.true_positive[self.false_positive <= false_positive].max(initial=0.0))


@dataclass(frozen=True)
class Membership:
    """What membership inference found out. NOT private with respect to training and test data.

    Args:
        rocs: one per attack.
        members, others: examples of either kind.
        shadows: shadow models.
        claim: advantage that the run's guarantee allows at most (total variation at its epsilon and delta); 1 for non-private runs.
        epsilon, delta: the guarantee; None for non-private runs.
    """

    rocs: tuple[Roc, ...]
    members: int
    others: int
    shadows: int
    claim: float
    epsilon: float | None
    delta: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in ``membership.json``."""
        attacks = {
            roc.attack: {
                "advantage": roc.advantage,
                "area": roc.area,
                "true_positive_rate_at": {f"{rate:g}": roc.true_positive_at(rate) for rate in LOW_RATES},
            }
            for roc in self.rocs
        }
        return {
            "private": False, "attacks": attacks, "members": self.members, "others": self.others, "shadows": self.shadows,
            "largest_advantage_allowed": self.claim, "epsilon": self.epsilon, "delta": self.delta,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [
            f"{roc.attack}: advantage {roc.advantage:.4f}, area {roc.area:.4f}, "
            + ", ".join(f"TPR {roc.true_positive_at(rate):.4f} at FPR {rate:g}" for rate in LOW_RATES)
            for roc in self.rocs
        ]
        lines.append(
            f"{self.members} members, {self.others} others, {self.shadows} shadow models. NOT private: these figures were computed from "
            "training and test data; what an attack does not find proves nothing."
        )
        return "\n".join(lines)


def roc(attack: str, scores: Array, member: Coins) -> Roc:
    """The curve of an attack.

    Args:
        attack: its name.
        scores: ``[n]``; the higher, the more likely a member.
        member: ``[n]``.
    Returns:
        One point per distinct score.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf) != 0)  # equal scores are one threshold
    true, false = np.cumsum(member[order])[last], np.cumsum(~member[order])[last]
    start = np.zeros(1)
    return Roc(attack, np.concatenate([start, false / (~member).sum()]), np.concatenate([start, true / member.sum()]))


def likelihood_ratios(target: Array, shadows: Array, inside: Coins) -> Array:
    """How much more an example's statistic looks like that of models trained with it.

    Args:
        target: statistic under the model that is attacked ``[n]``.
        shadows: under shadow models ``[k, n]``.
        inside: which shadows were trained with which example ``[k, n]``.
    Returns:
        Log-likelihood ratios ``[n]`` of normal fits whose spread is shared by all examples, as few shadows call for.
    Source: Carlini et al. 2022, section VI and its fixed-variance form.
    """

    def fit(chosen: Coins) -> tuple[Array, float]:
        count = np.maximum(chosen.sum(0), 1)
        mean = np.where(chosen, shadows, 0.0).sum(0) / count
        rest = np.where(chosen, shadows - mean, 0.0)
        freedom = max(1, int(chosen.sum()) - shadows.shape[1])
        return mean, max(float(np.sqrt((rest**2).sum() / freedom)), LEAST_SPREAD)

    (mean_in, std_in), (mean_out, std_out) = fit(inside), fit(~inside)
    found: Array = -(((target - mean_in) / std_in) ** 2) / 2 + (((target - mean_out) / std_out) ** 2) / 2
    return found


def statistic(losses: Array, classes: bool) -> Array:
    """What is nearly normal among models: log(p / (1 - p)) of the right class's probability; for values, minus the loss."""
    losses = np.nan_to_num(losses.astype(np.float64), nan=1e6, posinf=1e6)
    if not classes:
        return -losses
    losses = np.maximum(losses, 1e-12)
    found: Array = -losses - np.log(-np.expm1(-losses))
    return found


def membership(
    directory: Path | str,
    *,
    shadows: int = 8,
    most: int = 2000,
    seed: int = 0,
    data: Dataset | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Membership:
    """Attack a finished run of ``dptrain train``.

    Args:
        directory: of the run.
        shadows: shadow models of the likelihood-ratio attack, an even number; 0 leaves it out.
        most: examples of either kind, at most.
        seed: chooses examples and shadows' halves.
        data: a data set in place of the config's.
        progress: called with shadow models trained and wanted.
    Returns:
        Curves of the attacks. NOT private.
    Raises:
        RunError: the directory holds no finished run.
        ConfigError: there is no test split to compare with, or the settings are impossible.
    """
    directory = Path(directory)
    if not (directory / "weights.safetensors").exists():
        raise RunError(f"{directory} holds no weights.safetensors; finish the run first.")
    if isinstance(shadows, bool) or not isinstance(shadows, int) or shadows < 0 or shadows % 2:
        raise ConfigError(f"shadows must be an even whole number, 0 or more, not {shadows!r}; each example is in half of them.")
    config, record = TrainConfig.load(directory / "config.yaml"), read_json(directory / "run.json")
    setup = prepare(config, str(record.get("backend")), data)
    data, backend = setup.data, setup.backend
    if not len(data.x_test):
        raise ConfigError(f"data {data.name!r} has no test split, so there is nobody who was not in the training data; give one.")
    backend.set_weights(setup.model, load_arrays(directory / "weights.safetensors")[0])
    rng = np.random.default_rng(seed)
    ins, outs = (rng.choice(n, min(n, most), replace=False) for n in (len(data.x_train), len(data.x_test)))
    x = np.concatenate([data.x_train[ins], data.x_test[outs]])
    y = np.concatenate([data.y_train[ins], data.y_test[outs]])
    member = np.arange(len(x)) < len(ins)
    classes = LOSSES[config.loss.name].name == "cross_entropy"
    target = backend.losses(setup.model, setup.loss, x, y)
    found = [roc("loss threshold", -np.nan_to_num(target.astype(np.float64), nan=np.inf), member)]
    if shadows:
        halves = balanced(shadows, len(x), rng)
        rest = np.setdiff1d(np.arange(len(data.x_train)), ins)
        seen = np.empty((shadows, len(x)))
        for i, half in enumerate(halves):
            part = replace(
                data, x_train=np.concatenate([data.x_train[rest], x[half]]), y_train=np.concatenate([data.y_train[rest], y[half]])
            )
            name, sigma = str(record.get("backend")), record.get("noise_multiplier")
            seen[i] = statistic(shadow_losses(config, name, part, sigma, x, y, setup.scheme.batch_size), classes)
            if progress:
                progress(i + 1, shadows)
        found.append(roc("likelihood ratio", likelihood_ratios(statistic(target, classes), seen, halves), member))
    epsilon, delta, claim = guarantee(directory, config) if setup.plan.private else (None, None, 1.0)
    return Membership(tuple(found), len(ins), len(outs), shadows, claim, epsilon, delta)


def balanced(shadows: int, count: int, rng: np.random.Generator) -> Coins:
    """Who is in which shadow's data ``[k, n]``: every example in half of them."""
    ranks = np.argsort(rng.random((shadows, count)), axis=0)
    found: Coins = ranks < shadows // 2
    return found


def shadow_losses(config: TrainConfig, backend: str, data: Dataset, sigma: Any, x: Array, y: Array, size: int | None = None) -> Array:
    """Losses of some examples under a model trained like the run, on other data and with fresh randomness.

    Args:
        config: the run.
        backend: its name.
        data: what the model is trained on.
        sigma: noise multiplier of the run; None for a run without noise.
        x, y: the examples.
        size: of the run's batches, where they have one.
    """
    config = config.replace(privacy=config.privacy.model_copy(update={"unsafe_seed": None}))
    if size is not None:  # q N need not be whole for other data
        config = config.replace(sampling=config.sampling.model_copy(update={"sample_rate": None, "expected_batch_size": size}))
    given = float(sigma) if isinstance(sigma, float) else None
    if given is not None:  # nobody's budget is spent here, and fewer examples would spend another one
        config = config.replace(privacy=config.privacy.model_copy(update={"target_epsilon": None, "noise_multiplier": given}))
    setup = prepare(config, backend, data)
    if given is None and setup.plan.private:
        given = planned_noise(setup)
    with RunDirectory(None, config, backend, {}) as nowhere:
        Loop(setup, nowhere, threading.Event(), given, Records(nowhere.ledger)).run(None, None)
    return setup.backend.losses(setup.model, setup.loss, x, y)


def guarantee(directory: Path, config: TrainConfig) -> tuple[float, float, float]:
    """Epsilon, delta, and the largest advantage they allow: (e^eps - 1 + 2 delta) / (e^eps + 1) (Kairouz et al. 2015)."""
    from accounting import PrivacyLedger

    privacy = config.privacy
    events = PrivacyLedger.read(directory / "ledger.jsonl").events
    epsilon = get_accountant(privacy.accountant, privacy.relation).epsilon(events, privacy.target_delta)
    return (
        epsilon,
        privacy.target_delta,
        min(1.0, float(np.tanh(epsilon / 2)) + 2 * privacy.target_delta / (1 + float(np.exp(min(epsilon, 700.0))))),
    )


def save(found: Membership, folder: Path) -> None:
    """Write ``membership.json`` and, with matplotlib, ``membership.svg``."""
    from dptrain.checkpoint import write_json

    write_json(folder / "membership.json", found.to_dict())
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5.0, 4.6), layout="constrained")
    axes = figure.subplots()
    low = 0.5 / max(found.others, 2)
    line = np.geomspace(low, 1.0, 200)
    axes.plot(line, line, color="0.6", linewidth=1, label="guessing")
    for one in found.rocs:
        rates = (np.maximum(part, low) for part in (one.false_positive, one.true_positive))
        axes.step(*rates, where="post", label=f"{one.attack} (area {one.area:.3f})")
    if found.epsilon is not None and found.delta is not None:
        bound = np.minimum(np.exp(min(found.epsilon, 700.0)) * line + found.delta, 1 - np.exp(-found.epsilon) * (1 - found.delta - line))
        axes.plot(line, np.clip(bound, low, 1.0), "--", color="black", linewidth=1, label=f"allowed at epsilon {found.epsilon:.3g}")
    axes.set(xscale="log", yscale="log", xlim=(low, 1), ylim=(low, 1), xlabel="false-positive rate", ylabel="true-positive rate")
    axes.set_title("Membership inference; NOT private", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(folder / "membership.svg", metadata={"Date": None})
