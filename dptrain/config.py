"""The one configuration: the same file, with the same hash, runs in both frameworks.

What can change a guarantee (strategy, privacy, sampling) and what cannot (performance) are different types. Unknown keys are
errors. Files are YAML or TOML; ``--set a.b=c`` overrides single values.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError, model_validator

from accounting import NeighboringRelation
from dptrain.costs import Decision
from dptrain.errors import ConfigError
from dptrain.losses import LossConfig
from dptrain.mechanism import Allocation
from dptrain.models import ModelConfig
from dptrain.randomness import NoiseKind
from dptrain.sampling import MOST, Scheme, SchemeKind, relation_problem
from dptrain.strategies import StrategyConfig
from dptrain.strategies.clipping import MixedGhost

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**63, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=True)]
Delta = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False, strict=True)]
NAMED_PARTS = ("model", "data", "strategy", "optimizer", "loss")  # ``strategy: ghost`` stands for ``strategy: {name: ghost}``


LATER_SETTINGS = (
    ("privacy", "noise_weights"), ("privacy", "noise"), ("privacy", "ledger"),
    ("sampling", "scheme"), ("sampling", "max_batch_size"), ("performance", "check_bounds"), ("performance", "monitors"),
    ("performance", "prefer"),
)  # fmt: skip


class Part(BaseModel):
    """Base of the parts: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Part):
    """Which data set.

    Args:
        name: ``mnist_5k``, ``fashion_mnist``, ``cifar10``, ``digits``, ``npz`` or ``callable``.
        path: file or folder to read from; by default the usual places are searched.
        source: ``package.module:function`` for ``callable``.
        num_classes: classes, a public constant; by default the data set's own.
        limit: use only the first examples of the training split.
        download: fetch the data set from its official address if it is not found.
    """

    name: Literal["mnist_5k", "fashion_mnist", "cifar10", "digits", "adult", "npz", "callable"] = "mnist_5k"
    path: str | None = None
    source: str | None = None
    num_classes: PositiveInt | None = None
    limit: PositiveInt | None = None
    download: StrictBool = False


class Privacy(Part):
    """The promise. Give ``target_epsilon`` or ``noise_multiplier``; with both, the noise is as given and the target is a cap.

    Args:
        target_epsilon: budget, which no step may pass; without ``noise_multiplier``, the noise is calibrated to it.
        noise_multiplier: sigma, standard deviation of the noise over the sensitivity of the joint release.
        target_delta: delta at which epsilon is stated.
        accountant: ``prv`` or ``rdp``.
        relation: neighbouring relation.
        allocation: how the noise is shared among groups.
        noise_weights: group name or pattern -> factor of its share of the noise; sigma stays what it is.
        noise: ``fast``: floating-point numbers; ``secure``: a lattice, out of reach of attacks on floating-point noise (docs/noise.md).
        unsafe_seed: makes sampling and noise reproducible, and the guarantee void against anyone who knows it.
        ledger: file that all runs on the same data share; what it holds counts against ``target_epsilon``.
    """

    target_epsilon: Positive | None = None
    noise_multiplier: Positive | None = None
    target_delta: Delta = 1e-5
    accountant: Literal["prv", "rdp"] = "prv"
    relation: NeighboringRelation = NeighboringRelation.add_remove
    allocation: Allocation = "global"
    noise_weights: Mapping[str, Positive] = Field(default_factory=dict)
    noise: NoiseKind = "fast"
    unsafe_seed: NonNegativeInt | None = None
    ledger: str | None = None


class Sampling(Part):
    """How many steps, on which examples. Give ``sample_rate`` or ``expected_batch_size``, and ``steps`` or ``epochs``.

    Args:
        sample_rate: q, probability with which each example enters a step; with ``fixed_size`` and ``shuffle`` the part of the data that a
            batch is, for which q N must be whole.
        expected_batch_size: q N.
        steps: number of steps.
        epochs: expected passes over the data; ``steps = ceil(epochs / q)``, with ``shuffle`` ``ceil(epochs floor(N / B))``.
        scheme: ``poisson``: each step draws each example independently; ``fixed_size``: each step draws exactly B examples without
            replacement, under ``privacy.relation: replace_one``; ``shuffle``: passes over the data in secret orders, cut into batches of
            exactly B, recorded once per pass and without amplification, under ``zero_out`` or ``replace_one`` (docs/sampling.md).
        max_batch_size: of ``poisson``: the most examples of a step; what is drawn beyond is dropped at random, and the accountant knows.
    """

    sample_rate: Probability | None = None
    expected_batch_size: PositiveInt | None = None
    steps: PositiveInt | None = None
    epochs: Positive | None = None
    scheme: SchemeKind = "poisson"
    max_batch_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Sampling:
        if (self.sample_rate is None) == (self.expected_batch_size is None):
            raise ValueError("give exactly one of sample_rate and expected_batch_size")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.max_batch_size is not None and self.scheme != "poisson":
            raise ValueError(f"max_batch_size belongs to the scheme poisson, and batches of {self.scheme} have one size; remove it")
        return self

    def rate(self, num_examples: int) -> float:
        """The sample rate q for a data set of N examples.

        Raises:
            ConfigError: the expected batch is larger than the data set.
        """
        if self.sample_rate is not None:
            return self.sample_rate
        assert self.expected_batch_size is not None
        if self.expected_batch_size > num_examples:
            raise ConfigError(
                f"sampling.expected_batch_size {self.expected_batch_size} is larger than the data set of {num_examples} examples; "
                f"lower it to at most {num_examples}."
            )
        return self.expected_batch_size / num_examples

    def resolved(self, num_examples: int) -> Scheme:
        """How examples of a data set of N enter the steps.

        Raises:
            ConfigError: the expected batch is larger than the data set, or is no whole number where it must be one.
        """
        rate = self.rate(num_examples)
        if self.scheme == "poisson":
            return Scheme("poisson", rate, None, self.max_batch_size)
        size = self.expected_batch_size or round(rate * num_examples)
        if size < 1 or abs(size - rate * num_examples) > 1e-9 * size:
            raise ConfigError(
                f"sampling.sample_rate {rate:g} of {num_examples} examples is {rate * num_examples:g}, and batches of scheme {self.scheme} "
                f"have one whole size; set sampling.expected_batch_size, such as {max(1, size)}, in its place."
            )
        return Scheme(self.scheme, size / num_examples, size)

    def num_steps(self, num_examples: int) -> int:
        """The number of steps for a data set of N examples.

        Raises:
            ConfigError: the expected batch is larger than the data set, or the number is beyond any run.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        scheme = self.resolved(num_examples)
        whole = num_examples // scheme.batch_size if scheme.kind == "shuffle" and scheme.batch_size else None
        steps = self.epochs / scheme.sample_rate if whole is None else self.epochs * whole
        if not steps < 2.0**53:
            raise ConfigError(f"sampling.epochs {self.epochs:g} means {steps:g} steps, more than anyone can run; lower it.")
        return max(1, math.ceil(steps - 1e-9))


class OptimizerConfig(Part):
    """The framework's own optimizer, applied to the noisy gradient; post-processing, free of privacy cost.

    Args:
        name: ``sgd``, ``adam`` or ``adamw``.
        learning_rate: step size at its peak.
        momentum: of ``sgd``.
        weight_decay: decoupled decay of ``adamw``.
        schedule: ``constant``, ``linear`` or ``cosine`` decay to zero over the run.
        warmup_steps: steps of linear warm-up.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0

    @model_validator(mode="after")
    def _fields_fit(self) -> OptimizerConfig:
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum belongs to sgd, not to {self.name}; remove it")
        if self.weight_decay and self.name != "adamw":
            raise ValueError(f"weight_decay belongs to adamw, not to {self.name}; remove it")
        return self

    def rate_at(self, step: int, num_steps: int) -> float:
        """The learning rate of one step.

        Args:
            step: index of the step, from 0.
            num_steps: steps of the run.
        Returns:
            The learning rate.
        """
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        done = step / max(1, num_steps)
        decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.schedule]
        return self.learning_rate * warm * decay


class Performance(Part):
    """Speed and memory. Nothing here can change a guarantee or, beyond rounding, a number.

    Args:
        physical_batch_size: examples processed at once; a logical batch is split into as many as it needs.
        compile: ``tf.function`` / ``torch.compile``; ``auto`` compiles in TensorFlow and runs torch eagerly.
        decision: rule that chooses the norm method per layer.
        gradients: ``book_keeping`` rebuilds the clipped sum from what was measured; ``two_pass`` runs a second backward pass.
        prefer: ``memory`` keeps a per-sample gradient only where it is smaller than what it is made of, and stands for the decision
            ``space``, whatever that says: larger batches, slower steps.
        precision: ``float32`` or ``float64``.
        device: ``auto``, ``cpu``, ``cuda`` or another name the framework knows.
        check_bounds: compare proven bounds with the per-sample gradient norms of synthetic examples, before and after training.
        monitors: log, for each group and step, how much of its proven or clipped bound the summed gradient uses; NOT private.
        checkpoint_every: steps between checkpoints.
        evaluate_every: steps between evaluations on the test split; 0 evaluates at the end only.
    """

    physical_batch_size: PositiveInt = 128
    compile: StrictBool | Literal["auto"] = "auto"
    decision: Decision = "time"
    gradients: Literal["book_keeping", "two_pass"] = "book_keeping"
    prefer: Literal["speed", "memory"] = "speed"
    precision: Literal["float32", "float64"] = "float32"
    device: str = "auto"
    check_bounds: StrictBool = False
    monitors: StrictBool = False
    checkpoint_every: PositiveInt = 25
    evaluate_every: NonNegativeInt = 0

    @model_validator(mode="after")
    def _sums_are_short(self) -> Performance:
        if self.physical_batch_size > MOST:
            raise ValueError(f"physical_batch_size must be at most {MOST}: a longer sum rounds too much; larger logical batches are split")
        return self

    @property
    def two_pass(self) -> bool:
        """Whether the clipped sum comes from a second backward pass."""
        return self.gradients == "two_pass"

    @property
    def norm_decision(self) -> Decision:
        """The rule that chooses the norm method per layer, as it stands."""
        return "space" if self.prefer == "memory" else self.decision


class TrainConfig(Part):
    """A whole run. There is no backend in it.

    Args:
        model, data, strategy, privacy, sampling, optimizer, performance: the parts.
        loss: per-example loss, by name or with its settings.
        seed: public seed of the starting weights and of dropout; it never reaches sampling or noise.
    """

    model: ModelConfig
    data: DataConfig = DataConfig()
    strategy: StrategyConfig = MixedGhost()
    privacy: Privacy = Privacy()
    sampling: Sampling
    optimizer: OptimizerConfig = OptimizerConfig()
    performance: Performance = Performance()
    loss: LossConfig = LossConfig()
    seed: NonNegativeInt = 0

    @model_validator(mode="before")
    @classmethod
    def _short_names(cls, raw: Any) -> Any:
        """``strategy: ghost`` stands for ``strategy: {name: ghost}``, and settings without a name are those of the default strategy."""
        if not isinstance(raw, Mapping):
            return raw
        raw = {k: {"name": v} if k in NAMED_PARTS and isinstance(v, str) else v for k, v in raw.items()}
        if isinstance(raw.get("strategy"), Mapping):
            raw["strategy"] = {"name": MixedGhost().name, **raw["strategy"]}
        return raw

    @model_validator(mode="after")
    def _budget(self) -> TrainConfig:
        if self.strategy.name != "non_private" and self.privacy.target_epsilon is None and self.privacy.noise_multiplier is None:
            raise ValueError("privacy: give target_epsilon or noise_multiplier, or choose the strategy non_private")
        problem = relation_problem(self.sampling.scheme, self.privacy.relation)
        if problem is not None and self.strategy.name != "non_private":
            raise ValueError(f"sampling.scheme {self.sampling.scheme}: {problem}")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML or TOML file.

        Args:
            path: the file; its suffix decides the format.
            overrides: ``a.b=c`` assignments, values in YAML notation.
        Returns:
            The config.
        Raises:
            ConfigError: unreadable file, unknown key, bad value; one message for all problems.
        """
        return cls.parse(apply_overrides(read_file(Path(path)), overrides), str(path))

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str = "the configuration") -> TrainConfig:
        """A config from plain data, with readable errors.

        Args:
            raw: nested mappings.
            where: what to call the source in errors.
        Returns:
            The config.
        Raises:
            ConfigError: anything wrong.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise ConfigError(explain(error, where, raw)) from None

    def replace(self, **parts: Any) -> TrainConfig:
        """A copy with other parts, validated again.

        Args:
            parts: fields to replace, as objects or plain data.
        Returns:
            A new config.
        """
        return self.parse({**self.to_dict(), **{k: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for k, v in parts.items()}})

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``parse`` reads back; settings that came after the first version are left out at their defaults.

        So a run directory of an earlier version keeps its hash.
        """
        plain = self.model_dump(mode="json")
        if self.loss == LossConfig(name=self.loss.name):
            plain["loss"] = self.loss.name
        for part, key in LATER_SETTINGS:
            if getattr(getattr(self, part), key) == type(getattr(self, part)).model_fields[key].get_default(call_default_factory=True):
                del plain[part][key]
        return plain

    def to_yaml(self) -> str:
        """YAML text that ``load`` reads back."""
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON form, first 16 hexadecimal digits; the same in both frameworks.

        Keys stand in the order of the fields, whatever the file's; the order of ``strategy.grouping`` has a meaning and counts.
        """
        text = json.dumps(self.to_dict(), separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_file(path: Path) -> dict[str, Any]:
    """A YAML or TOML file as nested mappings.

    Raises:
        ConfigError: missing, unreadable, of another format, or not a mapping.
    """
    import yaml

    if path.suffix.lower() not in (".yaml", ".yml", ".toml"):
        raise ConfigError(f"The config file {path} must end in .yaml, .yml or .toml.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"There is no config file {path}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The config file {path} cannot be read: {error}.") from None
    try:
        raw = tomllib.loads(text) if path.suffix.lower() == ".toml" else yaml.load(text, YamlLoader())
    except (yaml.YAMLError, tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"The config file {path} is not valid {path.suffix[1:].upper()}: {one_line(error)}.") from None
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise ConfigError(f"The config file {path} must hold sections such as model:, data: and privacy:.")
    return raw


def YamlLoader() -> Any:  # noqa: N802 - stands where yaml expects a class
    """PyYAML's safe loader, reading ``1e-5`` as a number and refusing a key that is given twice."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [getattr(key, "value", None) for key, _ in node.value]
            twice = {str(k) for k in keys if isinstance(k, str) and keys.count(k) > 1}
            if twice:
                raise yaml.YAMLError(f"the key {sorted(twice)[0]!r} is given twice on or after line {node.start_mark.line + 1}")
            return dict(super().construct_mapping(node, deep))

    # YAML 1.1 wants a dot in the mantissa, so a safe loader reads 1e-5 as a string.
    number = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b=c`` assignments to nested mappings.

    Args:
        raw: nested mappings.
        overrides: assignments; the value is read as YAML, so ``null`` removes a setting.
    Returns:
        New nested mappings.
    Raises:
        ConfigError: malformed assignment.
    """
    import yaml

    try:
        result: dict[str, Any] = copy.deepcopy(dict(raw))
    except RecursionError:
        raise ConfigError("The configuration is nested too deeply; check its sections.") from None
    for item in overrides:
        key, equals, value = item.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise ConfigError(f"The override {item!r} must have the form section.key=value, such as strategy.max_grad_norm=0.5.")
        node = result
        for part in path[:-1]:
            child = node.get(part)
            if isinstance(child, str) and part in NAMED_PARTS:
                child = {"name": child}
            node[part] = child if isinstance(child, dict) else {}
            node = node[part]
        try:
            node[path[-1]] = yaml.load(value, YamlLoader())
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"The value of the override {item!r} is not valid YAML: {one_line(error)}.") from None
    return result


def explain(error: ValidationError, where: str, raw: Any) -> str:
    """All problems of a pydantic error as sentences with dotted paths.

    Args:
        error: the error.
        where: the source of the values.
        raw: the values; they tell the keys that a person wrote from pydantic's own names for the branches of a union.
    Returns:
        One line for one problem, a list for several.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for item in error.errors(include_url=False, include_context=True):
        kind, context = item["type"], item.get("ctx", {})
        path = written_path(item["loc"], raw, keep_last=kind == "missing")
        if kind == "extra_forbidden":
            text = "is not a known key; remove it or check its spelling"
        elif kind == "missing":
            text = "is missing"
        elif kind == "union_tag_not_found":
            path, text = (*path, str(context.get("discriminator", "name")).strip("'")), "is missing"
        elif kind == "union_tag_invalid":
            text = f"has no {shown(context.get('tag'))}; choose one of {context.get('expected_tags')}"
        else:
            text = ": " + ("Input should be a section of settings" if kind in SECTION_ERRORS else item["msg"].removeprefix("Value error, "))
            if kind != "value_error":
                text += f" (got {shown(item.get('input'))})"
        texts = found.setdefault(path, [])
        if text not in texts:
            texts.append(text)
    # A value that fits no branch of a union has a problem per branch; the deepest say what is wrong.
    problems = [
        ".".join(path) + (" " if path and not texts[0].startswith(":") else "") + either(texts)
        for path, texts in found.items()
        if not any(len(other) > len(path) and other[: len(path)] == path for other in found)
    ]
    problems = [problem.removeprefix(": ") for problem in problems]
    if len(problems) == 1:
        return f"{where}: {problems[0]}."
    return f"{where} has {len(problems)} problems:\n" + "\n".join(f"  - {p}." for p in problems)


SECTION_ERRORS = ("model_type", "model_attributes_type", "dict_type", "mapping_type", "dataclass_type")


def written_path(loc: Sequence[int | str], raw: Any, keep_last: bool) -> tuple[str, ...]:
    """The keys of a pydantic location that occur in the values, and the last one in any case if it is what is missing."""
    path: list[str] = []
    for index, part in enumerate(loc):
        in_mapping = isinstance(raw, Mapping) and part in raw
        if in_mapping or (isinstance(raw, Sequence) and isinstance(part, int) and part < len(raw)):
            raw = raw[part]
            path.append(one_line(part))
        elif keep_last and index == len(loc) - 1:
            path.append(str(part))
    return tuple(path)


def either(texts: Sequence[str]) -> str:
    """The messages of the branches of a union as one."""
    if len(texts) == 1:
        return texts[0]
    wanted = [text.partition(" (got ")[0].removeprefix(": Input should be ") for text in texts]
    return ": Input should be " + ", or ".join(wanted) + (texts[0][texts[0].index(" (got ") :] if " (got " in texts[0] else "")


def shown(value: Any) -> str:
    """A value for an error message, cut short."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    try:
        return one_line(short.repr(value))
    except ValueError:  # Python refuses to print numbers of thousands of digits
        return "a number of thousands of digits"


def one_line(error: object) -> str:
    """A message of several lines as one."""
    return " ".join(str(error).split())


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, short names included."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(TrainConfig).json_schema()}
    for title, part in schema["$defs"].items():  # the name that picks the branch of a union is read before its default
        tags = [name for name, value in part.get("properties", {}).items() if "const" in value]
        part["required"] = sorted({*part.get("required", ()), *(tags if title != MixedGhost.__name__ else ())})
    for key in NAMED_PARTS:
        part = schema["properties"][key]
        if "discriminator" in part:
            names = list(part["discriminator"]["mapping"])
        else:
            names = schema["$defs"][part["$ref"].rpartition("/")[2]]["properties"]["name"]["enum"]
        schema["properties"][key] = {"anyOf": [part, {"type": "string", "enum": names}]}
    return schema
