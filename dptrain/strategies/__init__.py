"""Sensitivity strategies, picked by name.

To add one: write ``dptrain/strategies/NAME.py`` with a frozen pydantic model that has a ``name`` literal and a ``plan`` method, and
add it to the union below. The union is the registry.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import Field, TypeAdapter, ValidationError

from dptrain.errors import ConfigError
from dptrain.strategies.base import SensitivityStrategy
from dptrain.strategies.clipless import Clipless
from dptrain.strategies.clipping import Ghost, MixedGhost, PerSample
from dptrain.strategies.non_private import NonPrivate

StrategyConfig = Annotated[MixedGhost | Ghost | PerSample | Clipless | NonPrivate, Field(discriminator="name")]
STRATEGIES: dict[str, type[Any]] = {cls.model_fields["name"].default: cls for cls in get_args(get_args(StrategyConfig)[0])}


def get_strategy(strategy: str | SensitivityStrategy, **settings: Any) -> SensitivityStrategy:
    """A strategy by name, or the strategy itself.

    Args:
        strategy: a name in ``STRATEGIES`` or a strategy object.
        settings: fields of the strategy, with a name only.
    Returns:
        The strategy.
    Raises:
        ConfigError: unknown name or field.
    """
    if not isinstance(strategy, str):
        return strategy
    if strategy not in STRATEGIES:
        raise ConfigError(f"There is no strategy {strategy!r}; choose one of {', '.join(sorted(STRATEGIES))}.")
    raw = {"name": strategy, **settings}
    try:
        return TypeAdapter(StrategyConfig).validate_python(raw)
    except ValidationError as error:
        from dptrain.config import explain

        raise ConfigError(explain(error, f"strategy {strategy!r}", raw)) from None


__all__ = [
    "STRATEGIES",
    "Clipless",
    "Ghost",
    "MixedGhost",
    "NonPrivate",
    "PerSample",
    "SensitivityStrategy",
    "StrategyConfig",
    "get_strategy",
]
