"""How far a budget reaches: epochs of a model within an epsilon, by the accountant that ``fit`` is billed by."""

from __future__ import annotations

from typing import Any

from dptrain.errors import ConfigError
from dptrain_tf.lipdp.session import Session


def get_max_epochs(epsilon_max: float, model: Any, epochs_max: int | None = 1024, safe: bool = True, atol: float = 1e-2) -> int:
    """The most epochs that the next ``fit`` may run within a budget.

    Args:
        epsilon_max: budget, including what the model's ledger already holds.
        model: a compiled model.
        epochs_max: upper end of the search; None searches without one.
        safe: True; False asked for the first number of epochs that exceeds the budget.
        atol: accepted for the sake of old code; an upper bound needs no tolerance.
    Returns:
        Epochs, possibly 0.
    Raises:
        ConfigError: ``safe`` is False, or the model is not compiled.
    Guarantee: the epsilon of the ledger and these epochs was computed and is at most ``epsilon_max``. The cost of a moving clip is in it,
        since the count is part of every step's one event (pitfalls.md L14).
    """
    del atol
    if not safe:
        raise ConfigError("get_max_epochs with safe=False would return more epochs than the budget allows; remove it.")
    if epochs_max is not None and epochs_max < 0:
        raise ConfigError(f"epochs_max must not be negative, and is {epochs_max}.")

    session: Session = model._session
    event = session.facts().event

    def affordable(epochs: int) -> bool:
        return session.epsilon(((event, epochs * session.metadata.steps),)) <= epsilon_max

    if not affordable(0):
        return 0
    good, bad = 0, 1 if epochs_max is None else epochs_max + 1
    if epochs_max is None:
        while affordable(bad):
            good, bad = bad, bad * 2
            if bad > 2**40:
                raise ConfigError(f"More than {good} epochs stay within epsilon {epsilon_max:g}; give epochs_max.")
    elif affordable(epochs_max):
        return epochs_max
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if affordable(middle) else (good, middle)
    return good


__all__ = ["get_max_epochs"]
