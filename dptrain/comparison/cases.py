"""What is compared: the grid of cases, each with everything that its measurement depends on."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from dptrain.config import TrainConfig, apply_overrides
from dptrain.errors import ConfigError

NON_PRIVATE = "non_private"
Measurement = Literal["time", "memory", "largest"]
PACKAGES = {"torch": ("torch", "opacus"), "tensorflow": ("tensorflow", "keras")}
# Swept beside the settings of a config: they belong to the data and to the batch.
SWEPT = ("batch", "input")


@dataclass(frozen=True)
class Shape:
    """One example, as far as speed depends on it.

    Args:
        input: shape, channels last; ``(T,)`` for token ids.
        num_classes: classes; None for one float target.
        tokens: size of the vocabulary that token ids are drawn from; 0 for real numbers.
    """

    input: tuple[int, ...]
    num_classes: int | None = 10
    tokens: int = 0

    def __str__(self) -> str:
        return "x".join(map(str, self.input)) + (" tokens" if self.tokens else "")

    @classmethod
    def parse(cls, text: str, num_classes: int | None = 10, tokens: int = 0) -> Shape:
        """A shape written as ``32x32x3``.

        Raises:
            ConfigError: it is not one.
        """
        try:
            dims = tuple(int(part) for part in str(text).split("x"))
        except ValueError:
            dims = ()
        if not dims or min(dims) < 1:
            raise ConfigError(f"The input shape {text!r} must be positive sizes, channels last, such as 32x32x3, or 128 for token ids.")
        return cls(dims, num_classes, tokens)


@dataclass(frozen=True)
class Settings:
    """How everything is measured; a part of every case, so that results taken in another way are not mixed.

    Args:
        pairs: interleaved pairs of a non-private and a private step.
        warmup: pairs before them that are not counted.
        threads: CPU threads of the framework.
        limit_gib: memory for the largest physical batch, in GiB.
    """

    pairs: int = 9
    warmup: int = 5
    threads: int = 2
    limit_gib: float = 4.0

    def __post_init__(self) -> None:
        problems = [f"{name} must be at least {least}" for name, least in (("pairs", 1), ("warmup", 1), ("threads", 1))
                    if getattr(self, name) < least]  # fmt: skip
        problems += [] if self.limit_gib > 0 else ["limit_gib must be positive"]
        if problems:
            raise ConfigError("; ".join(problems) + ".")


@dataclass(frozen=True)
class Case:
    """One measurement in one subprocess.

    Args:
        config: the resolved config as plain data.
        backend: ``torch`` or ``tensorflow``.
        strategy: a strategy's name, or ``module:function`` of a step that is not ours.
        model: the name in the tables; ``module:function`` for a native model.
        shape: one example.
        batch: physical batch size; examples per step.
        swept: the settings of a sweep, for the tables.
        measurement: what is measured.
        settings: how.
    """

    config: Mapping[str, Any] = field(hash=False)
    backend: str
    strategy: str
    model: str
    shape: Shape
    batch: int
    swept: tuple[tuple[str, str], ...] = ()
    measurement: Measurement = "time"
    settings: Settings = Settings()

    @property
    def external(self) -> bool:
        """Whether the step is not ours."""
        return ":" in self.strategy

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that the figure depends on."""
        found = {}
        for name in ("dptrain", *PACKAGES.get(self.backend, ())):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "not installed"
        return found

    @property
    def hash(self) -> str:
        """What makes two measurements the same; a finished one is not run again."""
        text = json.dumps({**asdict(self), "versions": self.versions}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Text that ``from_json`` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The inverse of ``to_json``."""
        raw = json.loads(text)
        shape = {**raw["shape"], "input": tuple(raw["shape"]["input"])}
        swept = tuple((key, value) for key, value in raw["swept"])
        return cls(**{**raw, "shape": Shape(**shape), "settings": Settings(**raw["settings"]), "swept": swept})


def with_strategy(raw: Mapping[str, Any], strategy: str) -> dict[str, Any]:
    """A config's plain data with another strategy; settings that both have are kept.

    Raises:
        ConfigError: there is no such strategy.
    """
    given = raw.get("strategy") or {}
    given = {"name": given} if isinstance(given, str) else dict(given)
    if strategy == given.get("name"):
        return dict(raw)
    bare = TrainConfig.parse({**raw, "strategy": strategy}).to_dict()["strategy"]
    shared = {key: value for key, value in given.items() if key in bare and key != "name"}
    try:
        return TrainConfig.parse({**raw, "strategy": {**shared, "name": strategy}}).to_dict()
    except ConfigError:
        return {**raw, "strategy": {"name": strategy}}


def resolve(raw: Mapping[str, Any], strategy: str, model: str | None, overrides: Sequence[str], batch: int) -> TrainConfig:
    """The config of a case: one release over one physical batch, with the noise of sigma 1.

    Args:
        raw: the config's plain data.
        strategy: name.
        model: a preset in place of the config's; None keeps it.
        overrides: ``a.b=c`` of a sweep.
        batch: physical batch size.
    Returns:
        The config.
    Raises:
        ConfigError: the combination is not one.
    """
    private = {k: v for k, v in (raw.get("privacy") or {}).items() if k not in ("target_epsilon", "noise_multiplier", "unsafe_seed")}
    base: dict[str, Any] = {**raw, "privacy": {**private, "noise_multiplier": 1.0}, "sampling": {"sample_rate": 1.0, "steps": 1}}
    if model is not None:
        base["model"] = {"name": "given"} if ":" in model else {"name": model}
    base = with_strategy(apply_overrides(base, overrides), strategy)
    base["performance"] = {**(base.get("performance") or {}), "physical_batch_size": batch}
    return TrainConfig.parse(base)


def label(raw: Mapping[str, Any]) -> str:
    """The name of a config's model."""
    model = raw.get("model") or {}
    return model if isinstance(model, str) else str(model.get("name"))


def grid(
    raw: Mapping[str, Any],
    shape: Shape,
    backends: Sequence[str],
    strategies: Sequence[str],
    models: Sequence[str] = (),
    batches: Sequence[int] = (),
    sweep: Mapping[str, Sequence[str]] | None = None,
    measurements: Sequence[Measurement] = ("time", "memory"),
    settings: Settings | None = None,
) -> list[Case]:
    """All cases of a comparison; ``non_private`` is measured with every combination.

    Args:
        raw: the config's plain data.
        shape: one example.
        backends, strategies, models, batches: what varies; ``models`` and ``batches`` are the config's by default.
        sweep: setting (``batch``, ``input``, or a dotted one of the config) -> values as text; every combination is a case.
        measurements: ``time``, ``memory``, ``largest``.
        settings: how to measure.
    Returns:
        The cases.
    Raises:
        ConfigError: a value of the grid is no setting.
    """
    default = (raw.get("performance") or {}).get("physical_batch_size", 128)
    keys, cases = list(sweep or {}), []
    for values in itertools.product(*(sweep[k] for k in keys) if sweep else ()):
        chosen = dict(zip(keys, (str(v) for v in values), strict=True))
        here = Shape.parse(chosen["input"], shape.num_classes, shape.tokens) if "input" in chosen else shape
        sizes = [whole(chosen["batch"])] if "batch" in chosen else [whole(b) for b in batches] or [default]
        overrides = [f"{k}={v}" for k, v in chosen.items() if k not in SWEPT]
        swept = tuple(sorted(chosen.items()))
        for model, batch, backend in itertools.product(models or [None], sizes, backends):  # type: ignore[list-item]
            for strategy in dict.fromkeys([NON_PRIVATE, *strategies]):
                ours = strategy if ":" not in strategy else "per_sample"
                config = resolve(raw, ours, model, overrides, batch).to_dict()
                one = Case(config, backend, strategy, model or label(raw), here, batch, swept, settings=settings or Settings())
                cases += [replace(one, measurement=m) for m in measurements if not (m == "time" and strategy == NON_PRIVATE)]
    return cases


def whole(text: object) -> int:
    """A batch size.

    Raises:
        ConfigError: it is not one.
    """
    try:
        if (number := int(str(text))) > 0:
            return number
    except ValueError:
        pass
    raise ConfigError(f"The batch size {text!r} must be a positive whole number.")
