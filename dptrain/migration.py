"""What the arguments of other libraries' engines mean here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dptrain.errors import ConfigError
from dptrain.strategies import SensitivityStrategy, get_strategy

# private_vision's clipping functions
CLIP_FUNCTIONS = {"vanilla": "abadi", "abadi": "abadi", "Abadi": "abadi", "autos": "automatic", "automatic": "automatic"}
ACCOUNTING_MODES: dict[str, Literal["prv", "rdp"]] = {"rdp": "rdp", "rdp_cks": "rdp", "glw": "prv", "all": "prv"}
WITHOUT_EFFECT = ("alphas", "eps_error", "record_snr")  # private_vision's; accountants choose their own orders and grids
REFUSED = {
    "named_params": "the parameters that are trained are those with requires_grad, by identity; a list beside them could leave one without "
    "noise. Freeze the others with requires_grad_(False)",
    "poisson": "sampling='poisson' is the default",
    "grad_sample_mode": "choose strategy='mixed_ghost', 'ghost' or 'per_sample'",
    "loss_reduction": "losses are per example, reduction='none'",
}


@dataclass(frozen=True)
class Understood:
    """A strategy and an accountant."""

    strategy: SensitivityStrategy
    accountant: Literal["prv", "rdp"]


def understood(
    settings: dict[str, Any], strategy: str | SensitivityStrategy | None, max_grad_norm: float | None, accountant: Any
) -> Understood:
    """Strategy and accountant from our arguments and those of private_vision.

    Args:
        settings: what was given beside the named arguments.
        strategy: a strategy, its name, or None.
        max_grad_norm: C, or None.
        accountant: a name, or None.
    Returns:
        What they mean.
    Raises:
        ConfigError: contradictions, and what is refused, with the reason.
    """
    settings = {k: v for k, v in settings.items() if k not in WITHOUT_EFFECT}
    for name, reason in REFUSED.items():
        if settings.pop(name, None) is not None:
            raise ConfigError(f"{name} is not taken here: {reason}.")
    mode = settings.pop("accounting_mode", None)
    if mode is not None:
        if mode not in ACCOUNTING_MODES:
            raise ConfigError(
                f"accounting_mode {mode!r} is not offered: the central limit theorem under-reports epsilon; use accountant='prv' or 'rdp'."
            )
        accountant = accountant or ACCOUNTING_MODES[mode]
    ghost, mixed = settings.pop("ghost_clipping", None), settings.pop("mixed", None)
    if ghost is not None or mixed is not None:
        if strategy is not None:
            raise ConfigError("ghost_clipping and mixed choose a strategy, and strategy is given too; remove one of them.")
        strategy = "per_sample" if ghost is False else "ghost" if mixed is False else "mixed_ghost"
    function = settings.pop("clip_function", None)
    if function is not None:
        if function not in CLIP_FUNCTIONS:
            raise ConfigError(f"clip_function {function!r} is not offered; choose one of {', '.join(CLIP_FUNCTIONS)}.")
        settings["clipping"] = CLIP_FUNCTIONS[function]
    stability = settings.pop("numerical_stability_constant", None)
    if stability is not None and settings.get("clipping") == "automatic":
        settings["gamma"] = stability
    if max_grad_norm is not None:
        settings["max_grad_norm"] = max_grad_norm
    chosen = strategy or "mixed_ghost"
    if not isinstance(chosen, str) and settings:
        raise ConfigError(f"The strategy is an object, so {', '.join(settings)} belong to it; set them there.")
    return Understood(get_strategy(chosen, **settings), accountant or "prv")
