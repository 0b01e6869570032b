"""The privacy statement of a run, computed from its ledger alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from accounting import Events, get_accountant
from dptrain.config import TrainConfig
from dptrain.data import Dataset
from dptrain.mechanism import FLOAT_MARGIN
from dptrain.plan import Plan

NOT_PRIVATE = (
    "training loss, clipping and speed shown while training, and metrics.jsonl",
    "accuracy and loss on the test split, with respect to the test data",
    "the choice of hyper-parameters, if it was made by looking at results on this data",
)


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Installed versions of packages, without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def privacy_statement(
    config: TrainConfig,
    events: Events,
    plan: Plan,
    stds: Mapping[str, float] | None,
    data: Dataset,
    complete: bool,
    versions: Mapping[str, str],
    identity: Mapping[str, str],
) -> dict[str, Any]:
    """What may be promised of a run's weights and checkpoints.

    Args:
        config: the run.
        events: the ledger.
        plan: certificate of sensitivity.
        stds: noise per group.
        data: the data set, for its public constants.
        complete: whether all planned steps were run.
        versions: of the framework.
        identity: config hash and backend.
    Returns:
        Plain data; ``epsilon`` is None for non-private training.
    Guarantee: epsilon is the accountant's upper bound on the recorded releases, at ``delta``, for the relation stated.
    """
    privacy = config.privacy
    common = {
        "status": "complete" if complete else "interrupted, can be resumed",
        **identity,
        "strategy": plan.strategy,
        "num_examples": len(data.x_train),
        "data": data.name,
        "public_constants": dict(data.public_constants),
        "not_private": list(NOT_PRIVATE),
        "versions": {**package_versions(("dptrain", "numpy", "autodp", "dp-accounting")), **versions},
    }
    if not plan.private:
        return {"private": False, "epsilon": None, "statement": "Trained without differential privacy; no epsilon exists.", **common}
    values = {name: get_accountant(name, privacy.relation).epsilon(events, privacy.target_delta) for name in ("rdp", "prv")}
    epsilon, delta, relation = values[privacy.accountant], privacy.target_delta, privacy.relation.value
    releases = sum(count for _, count in events)
    statement = (
        f"epsilon = {epsilon:.6g} at delta = {delta:g} for one example, neighbouring relation {relation}, Poisson sampling, "
        f"accountant {privacy.accountant}, {releases} releases."
    )
    if privacy.unsafe_seed is not None:
        statement += " VOID against anyone who knows unsafe_seed: sampling and noise can be reproduced from it."
    notes = []
    if delta >= 1 / len(data.x_train):
        notes.append(
            f"delta {delta:g} is not below 1/N = {1 / len(data.x_train):.3g}: publishing one example in full would keep the promise."
        )
    return {
        "private": privacy.unsafe_seed is None,
        "epsilon": epsilon,
        "delta": delta,
        "unit": "example",
        "neighboring_relation": relation,
        "sampling": "poisson",
        "accountant": privacy.accountant,
        "statement": statement,
        "notes": notes,
        "unsafe_seed": privacy.unsafe_seed is not None,
        "epsilon_by_accountant": values,
        "releases": releases,
        "events": [{**event.to_dict(), "count": count} for event, count in events],
        "float_margin": FLOAT_MARGIN,
        "groups": [
            {"name": g.name, "norm_bound": g.norm_bound, "noise_std": (stds or {}).get(g.name), "num_params": g.num_params}
            for g in plan.groups
        ],
        "allocation": privacy.allocation,
        "clipping": plan.clipping,
        **common,
    }
