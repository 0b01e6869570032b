"""The privacy statement of a run, computed from its ledger alone: what the trainer and ``dptrain report`` write as ``privacy.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from accounting import Events, get_accountant
from accounting.prv import PRVAccountant
from dptrain.config import TrainConfig
from dptrain.data import Dataset
from dptrain.mechanism import FLOAT_MARGIN
from dptrain.plan import Plan
from dptrain.sampling import Sampler, sampling_kind, sampling_words

SCHEMA_VERSION = 1  # of privacy.json; dptrain/reporting/schema.py says what its fields mean
NOT_PRIVATE = (
    "training loss, clipping and speed shown while training, and metrics.jsonl",
    "accuracy and loss on the test split, with respect to the test data",
    "the choice of hyper-parameters, if it was made by looking at results on this data",
    "side channels of the training machine, such as the time and the memory that a step takes",
)
WEIGHTS = "the weights, every checkpoint, and whatever is computed from them"  # of non-private training
# What a statement needs beside config and ledger: the trainer knows it, run.json and privacy.json keep it.
FACTS = (
    "config_hash", "backend", "strategy", "num_examples", "data", "public_constants", "clipping", "layers", "groups", "versions",
)  # fmt: skip
COMPLETE, INTERRUPTED, UNFINISHED = "complete", "interrupted, can be resumed", "in progress, or interrupted"
VOID = "VOID against anyone who knows unsafe_seed: sampling and noise can be reproduced from it."


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Installed versions of packages, without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run_facts(
    plan: Plan, stds: Mapping[str, float] | None, data: Dataset, versions: Mapping[str, str], identity: Mapping[str, str]
) -> dict[str, Any]:
    """What a statement needs beside config and ledger, as plain data.

    Args:
        plan: certificate of sensitivity.
        stds: noise per group.
        data: the data set, for its public constants.
        versions: of the framework.
        identity: config hash and backend.
    Returns:
        The keys of ``FACTS``; no groups where nothing is bounded.
    """
    layers = [
        {
            "name": layer.name, "kind": layer.kind, "calls": layer.calls, "positions": layer.positions, "fan_in": layer.fan_in,
            "fan_out": layer.fan_out, "num_params": layer.num_params, "method": plan.norms[layer.name],
            "group": plan.group_of(layer.name).name,
        }
        for layer in plan.layers
    ]  # fmt: skip
    groups = [
        {
            "name": g.name, "norm_bound": g.norm_bound, "clip_norm": g.clip_norm, "noise_std": (stds or {}).get(g.name),
            "num_params": g.num_params,
        }
        for g in plan.groups
    ]  # fmt: skip
    return {
        **identity,
        "strategy": plan.strategy,
        "num_examples": len(data.x_train),
        "data": data.name,
        "public_constants": dict(data.public_constants),
        "clipping": plan.clipping,
        "layers": layers,
        "groups": groups if plan.private else [],
        "versions": {**package_versions(("dptrain", "numpy", "autodp", "dp-accounting")), **versions},
    }


def privacy_statement(
    config: TrainConfig,
    events: Events,
    facts: Mapping[str, Any],
    status: str,
    data_set: Mapping[str, Any] | None = None,
    sampler: Sampler | None = None,
) -> dict[str, Any]:
    """What may be promised of a run's weights and checkpoints; the content of ``privacy.json``.

    Args:
        config: the run.
        events: the ledger.
        facts: see ``run_facts``; ``num_examples`` is needed, others may be missing.
        status: ``COMPLETE``, ``INTERRUPTED`` or ``UNFINISHED``.
        data_set: what all runs on the data have spent together, where they share a ledger.
        sampler: what drew the batches, to be named in words; by default, one as the config says.
    Returns:
        Plain data, as ``dptrain.reporting.schema.Statement`` describes it; ``epsilon`` is None for non-private training.
    Guarantee: epsilon is the accountant's upper bound on the recorded releases, at ``delta``, for the relation stated. Nothing in
        ``facts`` enters it.
    """
    privacy = config.privacy
    facts = {key: facts[key] for key in FACTS if key in facts}
    if config.strategy.name == "non_private":
        text = "Trained without differential privacy; no epsilon exists."
        facts = {key: value for key, value in facts.items() if key not in ("groups", "clipping")}
        return {
            "schema_version": SCHEMA_VERSION, "private": False, "epsilon": None, "statement": text, "status": status,
            "not_private": [WEIGHTS, *NOT_PRIVATE], **facts,
        }  # fmt: skip
    delta, relation, num_examples = privacy.target_delta, privacy.relation.value, facts["num_examples"]
    sampler = sampler or config.sampling.resolved(num_examples).public(num_examples)
    values = {name: get_accountant(name, privacy.relation).epsilon(events, delta) for name in ("rdp", "prv")}
    epsilon, releases = values[privacy.accountant], sum(count for _, count in events)
    statement = (
        f"epsilon = {epsilon:.6g} at delta = {delta:g} for one example, neighbouring relation {relation}, {sampling_words(sampler)}, "
        f"accountant {privacy.accountant}, {releases} releases."
    )
    if data_set is not None:
        statement += f" All {data_set['releases']} releases of {data_set['runs']} runs on this data: epsilon = {data_set['epsilon']:.6g}."
    unsafe = privacy.unsafe_seed is not None
    return {
        "schema_version": SCHEMA_VERSION,
        **({"warning": f"This epsilon is {VOID}"} if unsafe else {}),
        "private": not unsafe,
        "epsilon": epsilon,
        "delta": delta,
        "unit": "example",
        "neighboring_relation": relation,
        "sampling": sampling_kind(sampler),
        "accountant": privacy.accountant,
        "statement": f"{statement} {VOID}" if unsafe else statement,
        "status": status,
        "notes": notes(delta, num_examples),
        "unsafe_seed": unsafe,
        "epsilon_by_accountant": values,
        "epsilon_certified_lower": PRVAccountant(privacy.relation).detail(events, delta).lower,
        "releases": releases,
        "events": [{**event.to_dict(), "count": count} for event, count in events],
        **({"data_set": dict(data_set)} if data_set is not None else {}),
        "float_margin": FLOAT_MARGIN,
        "noise": privacy.noise,
        "allocation": privacy.allocation,
        "not_private": list(NOT_PRIVATE),
        **facts,
    }


def notes(delta: float, num_examples: int) -> list[str]:
    """What a reader of an epsilon should know of its delta."""
    if delta < 1 / num_examples:
        return []
    return [f"delta {delta:g} is not below 1/N = {1 / num_examples:.3g}: publishing one example in full would keep the promise."]
