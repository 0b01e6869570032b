"""The files of a run that a report reads or writes, as pydantic models; ``dptrain schema privacy`` prints that of ``privacy.json``.

Reading is lenient about fields it does not know, which a later version of the same schema may add, and strict about those it does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dptrain.checkpoint import read_json
from dptrain.config import NonNegative, NonNegativeInt, Positive, PositiveInt, Probability, one_line
from dptrain.errors import RunError
from dptrain.report import SCHEMA_VERSION


class Record(BaseModel):
    """Base of what is read: frozen, other fields are kept aside."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Layer(Record):
    """A row of the plan: one layer with trainable parameters."""

    name: str
    kind: str
    calls: PositiveInt = 1
    positions: NonNegativeInt = Field(description="T, positions per example, summed over the calls")
    fan_in: NonNegativeInt = Field(description="D, inputs per position")
    fan_out: NonNegativeInt = Field(description="p, outputs per position")
    num_params: NonNegativeInt
    method: Literal["none", "ghost", "instantiate"] = Field(description="how per-example norms are taken; none where the bound is proven")
    group: str


class Group(Record):
    """Parameters that share a bound and a noise standard deviation."""

    name: str
    norm_bound: Positive = Field(description="L2 bound on any one example's part of the sum")
    clip_norm: Positive | None = Field(None, description="the clipping norm that enforces the bound; null where it is proven beforehand")
    noise_std: Positive | None = Field(description="standard deviation of the noise on the sum, in the units of the bound")
    num_params: NonNegativeInt


class DataSet(Record):
    """What all runs that share a ledger have spent on their data."""

    epsilon: NonNegative
    delta: Probability
    accountant: str
    releases: NonNegativeInt
    runs: NonNegativeInt
    ledger: str
    facts: dict[str, Any] = {}


class Statement(Record):
    """The privacy statement of a run: ``privacy.json``. Fields that are absent for non-private training are null here."""

    schema_version: PositiveInt = Field(SCHEMA_VERSION, description="1; a reader refuses a larger one")
    warning: str | None = Field(None, description="present where the epsilon must not be relied on: unsafe_seed is set")
    private: bool = Field(description="whether a guarantee holds; false with unsafe_seed and for non-private training")
    epsilon: NonNegative | None = Field(description="upper bound by the run's accountant; null where no epsilon exists")
    delta: Probability | None = None
    unit: Literal["example"] | None = Field(None, description="what the guarantee protects")
    neighboring_relation: Literal["add_remove", "replace_one", "zero_out"] | None = None
    sampling: str | None = Field(
        None, description="how batches were drawn: poisson, capped_poisson, fixed_size or shuffle; the events have the numbers"
    )
    accountant: str | None = None
    statement: str = Field(description="all of it in a sentence")
    status: str = Field(description="complete; interrupted, can be resumed; in progress, or interrupted")
    notes: tuple[str, ...] = ()
    unsafe_seed: bool = False
    epsilon_by_accountant: dict[str, NonNegative] = Field(default={}, description="upper bounds, all of them valid")
    epsilon_certified_lower: NonNegative | None = Field(None, description="the true epsilon of the recorded releases is at least this")
    releases: NonNegativeInt | None = None
    events: tuple[dict[str, Any], ...] = Field((), description="the ledger: what was released, and how often")
    data_set: DataSet | None = Field(None, description="what all runs on the data have spent together, where they share a ledger")
    float_margin: NonNegative | None = Field(None, description="relative reduction of the claimed noise, which pays for rounding")
    noise: str | None = Field(None, description="how the noise is made: fast or secure")
    allocation: str | None = None
    clipping: str | None = Field(None, description="clipping function; null where bounds are proven")
    not_private: tuple[str, ...] = Field((), description="what the guarantee does not cover")
    config_hash: str
    backend: str
    strategy: str
    num_examples: PositiveInt = Field(description="N, taken to be public")
    data: str
    public_constants: dict[str, Any] = Field(default={}, description="facts of the data that are taken to be public")
    layers: tuple[Layer, ...] = Field((), description="the plan, one row per layer")
    groups: tuple[Group, ...] = Field((), description="bounds and noise of the last step")
    versions: dict[str, str] = {}


class Facts(Record):
    """What ``run.json`` keeps of a run from its start."""

    clipping: str | None = None
    data: str
    public_constants: dict[str, Any] = {}
    layers: tuple[Layer, ...] = ()
    groups: tuple[Group, ...] = ()
    versions: dict[str, str] = {}


class Run(Record):
    """``run.json``."""

    format: str
    config_hash: str
    backend: str
    num_examples: PositiveInt
    num_steps: PositiveInt
    sample_rate: Probability
    noise_multiplier: Positive | None = None
    run: str | None = None
    facts: Facts | None = None


class Finding(Record):
    """One check of an audit."""

    name: str
    passed: bool
    text: str = ""


class Audit(Record):
    """``audit.json``, where the config of a run has been audited."""

    epsilon_lower_bound: NonNegative | None = None
    epsilon: NonNegative | None = None
    delta: Probability | None = None
    relation: str | None = None
    confidence: Probability | None = None
    passed: bool
    findings: tuple[Finding, ...] = ()


R = TypeVar("R", bound=Record)


def parse(model: type[R], path: Path, check: Callable[[Path, dict[str, Any]], None] | None = None) -> R:
    """A JSON file as one of these models.

    Args:
        model: the model.
        path: the file.
        check: called first with path and content; refuses what is not to be looked at.
    Returns:
        The record.
    Raises:
        RunError: missing, malformed, or with a value that cannot be; one line.
    """
    value = read_json(path)
    if check is not None:
        check(path, value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise RunError(f"{path} is damaged ({where}: {one_line(first['msg'])}); restore it from a copy, or move it away.") from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema of ``privacy.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Statement.model_json_schema()}
