"""A run in sentences, for the page and for the model card alike; plain text, which either escapes as it must."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Any

from accounting import NeighboringRelation
from dptrain.report import COMPLETE, VOID
from dptrain.reporting.facts import FALSE_POSITIVE_RATES, RunReport
from dptrain.sampling import CappedSampler, FixedSizeSampler, ShuffledSampler

RELATIONS = {
    NeighboringRelation.add_remove: "Two data sets are neighbours if one is the other with one example added or removed.",
    NeighboringRelation.replace_one: "Two data sets are neighbours if they have the same size and differ in one example.",
    NeighboringRelation.zero_out: "Two data sets are neighbours if one is the other with one example's contribution set to zero.",
}
SEED_HIDDEN = "a number that is not shown"


def alarms(report: RunReport) -> list[str]:
    """What must be read before any figure."""
    found = []
    if not report.private:
        found.append("No privacy guarantee. This model was trained without differential privacy: no epsilon exists.")
    if report.void:
        found.append(
            "No privacy guarantee: unsafe_seed is set. Whoever knows it can reproduce sampling and noise, and subtract the noise. Every "
            "epsilon below is void; it is what would hold had the keys come from the operating system."
        )
    audit = report.files.audit
    if audit is not None and not audit.passed:
        found.append("An audit of this run failed; see its findings before relying on any figure.")
    if report.contradicted and audit is not None:
        found.append(
            f"An audit contradicts the guarantee: it found epsilon to be at least {audit.epsilon_lower_bound:.6g}, above what is claimed. "
            "Something that was accounted for did not happen; do not release this model."
        )
    return found


def remarks(report: RunReport) -> list[str]:
    """Notes that belong beside the guarantee."""
    said = report.statement
    found = list(said.get("notes", ()))
    if report.files.status != COMPLETE:
        ending = "; resuming it spends more, and needs a new report" if report.private else ""
        found.append(f"The run is {report.files.status}{ending}.")
    elif report.private and report.files.releases < report.files.planned:
        found.append(f"The run was ended by its budget after {report.files.releases} of {report.files.planned} planned releases.")
    together = said.get("data_set")
    if together is not None:
        found.append(
            f"All {together['runs']} runs that share the ledger {together['ledger']} have made {together['releases']} releases from this "
            f"data: together epsilon = {together['epsilon']:.6g} at delta = {together['delta']:g}{mark(report)}."
        )
    found += [text[:1].upper() + text[1:].rstrip(".") + "." for text in report.files.remarks]
    return found


def headline(report: RunReport) -> str:
    """The guarantee in a line; never an epsilon of a void run without saying so."""
    if not report.private:
        return "no differential privacy, no epsilon"
    said = report.statement
    text = f"epsilon = {said['epsilon']:.6g} at delta = {said['delta']:g}"
    if report.files.status != COMPLETE:
        text += f", so far ({report.files.releases} of {report.files.planned} planned releases)"
    return f"VOID (unsafe_seed): {text}" if report.void else text


def mark(report: RunReport) -> str:
    """What stands beside an epsilon."""
    return " (void: unsafe_seed)" if report.void else ""


def figures(report: RunReport) -> list[tuple[str, str]]:
    """The guarantee as (name, value)."""
    said, files = report.statement, report.files
    rows = [("status", progress(report))]
    if report.private:
        by, void = said["epsilon_by_accountant"], mark(report)
        rows += [
            ("epsilon", f"{said['epsilon']:.6g}, an upper bound by accountant {said['accountant']}{void}"),
            ("delta", f"{said['delta']:g}"),
            ("epsilon by prv", f"{by['prv']:.6g}; certified to be at least {down(said['epsilon_certified_lower'])}{void}"),
            ("epsilon by rdp", f"{by['rdp']:.6g}{void}"),
            ("unit of privacy", "one training example"),
            ("neighbouring relation", said["neighboring_relation"]),
            ("sampling", sampling(report)),
            ("noise", noise(report)),
        ]
    rows += [
        ("strategy", str(said["strategy"]) + (f", clipping {said['clipping']}" if said.get("clipping") else "")),
        ("training data", f"{said['data']}, {said['num_examples']:,} examples (the number is taken to be public)"),
        ("backend", str(said["backend"])),
    ]
    if files.config.privacy.target_epsilon is not None and report.private:
        rows.insert(2, ("target", f"epsilon at most {files.config.privacy.target_epsilon:g}"))
    return rows


def up(value: float) -> str:
    """Four digits, rounded up: an upper bound stays one."""
    return f"{float(Context(4, ROUND_CEILING).create_decimal(repr(value))):.4g}"


def down(value: float) -> str:
    """Four digits, rounded down: a lower bound stays one."""
    return f"{float(Context(4, ROUND_FLOOR).create_decimal(repr(value))):.4g}"


def progress(report: RunReport) -> str:
    """How far the run came."""
    files = report.files
    if not report.private:
        return f"{files.status}; {files.metrics.steps} of {files.run.num_steps} steps"
    return f"{files.status}; {files.releases} of {files.planned} planned releases"


def sampling(report: RunReport) -> str:
    """How examples enter a step."""
    sampler = report.files.sampler
    if isinstance(sampler, FixedSizeSampler):
        return f"Fixed size: each step draws {sampler.batch_size} of the {sampler.num_examples} examples anew, without replacement"
    if isinstance(sampler, ShuffledSampler):
        return (
            f"Shuffled passes: each takes the examples in an order of its own, in {sampler.per_pass} batches of {sampler.batch_size}; a "
            "release is a whole pass, and no amplification by the shuffling is claimed"
        )
    rates = sorted({event.sample_rate for event in report.files.batches}) or [report.files.run.sample_rate]
    text = f"{rates[0]:.6g}" if len(rates) == 1 else f"between {rates[0]:.6g} and {rates[-1]:.6g}"
    capped = f"; at most {sampler.max_batch_size} of those drawn are kept" if isinstance(sampler, CappedSampler) else ""
    return f"Poisson: each step draws every example independently with probability {text}{capped}"


def noise(report: RunReport) -> str:
    """Noise multiplier and kind."""
    sigmas = sorted({event.noise_multiplier for event in report.files.batches})
    text = "Gaussian"
    if sigmas:
        several = f"s from {sigmas[0]:.6g} to {sigmas[-1]:.6g}"
        text += ", noise multiplier" + (f" {sigmas[0]:.6g}" if len(sigmas) == 1 else several)
    return f"{text}; privacy.noise: {report.files.config.privacy.noise}"


def promise(report: RunReport) -> list[str]:
    """What is guaranteed, in sentences."""
    said = report.statement
    if not report.private:
        return ["Nothing is promised to the people in the training data: the weights may reveal any example."]
    void = f"The following would hold, and is {VOID} " if report.void else ""
    epsilon = said["epsilon"]
    factor = "" if epsilon > 30 else f" (a factor of {2.718281828459045**epsilon:.4g})"
    unit = (
        "The unit is one training example. Someone who contributed several is protected less, and what is common to many examples is "
        "not hidden at all."
    )
    return [
        f"{void}For any two neighbouring data sets, every set of outcomes of this training is at most e^epsilon times as probable with one "
        f"as with the other, plus delta, with epsilon = {epsilon:.6g}{mark(report)}{factor} and delta = {said['delta']:g}.",
        RELATIONS[NeighboringRelation(said["neighboring_relation"])],
        "An outcome is everything that follows from the noisy sums: the final weights, every checkpoint, and whatever is computed from "
        "them alone.",
        unit,
        bounds(report),
        "The figures are upper bounds, computed for this report from the privacy ledger, in which every release was recorded on disk "
        "before it was made.",
    ]


def bounds(report: RunReport) -> str:
    """Where the bound on an example's influence comes from."""
    if report.files.config.strategy.proves:
        return (
            "No example's gradient can exceed the bounds below: they are proven from certified operator norms of the weights in force, "
            "renewed at every step; those shown are the last ones known."
        )
    moves = " The clipping norm follows a quantile that was released with noise." if report.files.config.strategy.adaptive else ""
    return (
        "Each example's gradient is scaled, at every step, so that its L2 norm stays within the clipping norm of its group; the noise is "
        f"measured against these bounds.{moves} A relative margin of {report.statement['float_margin']:g} of the noise pays for "
        "floating-point rounding."
    )


def risks(report: RunReport) -> list[str]:
    """What the guarantee means for a membership attack."""
    if report.risks is None:
        return []
    found = report.risks.true_positive_rate
    rates = "; ".join(f"{up(found(rate))} at a false-positive rate of {rate:g}" for rate in FALSE_POSITIVE_RATES)
    return [
        f"Whoever has the weights and knows everything but whether one example took part{mark(report)}: the advantage (true-positive minus "
        f"false-positive rate) of any test is at most {up(report.risks.advantage)}.",
        f"The true-positive rate of any test is at most {rates}.",
    ]


def audit(report: RunReport) -> list[str]:
    """What an audit found, if there was one."""
    found = report.files.audit
    if found is None:
        return []
    text = f"The audit {'passed' if found.passed else 'FAILED'}"
    if found.epsilon_lower_bound is not None:
        confidence = f" with confidence {found.confidence:.4g}" if found.confidence is not None else ""
        text += f": it shows that epsilon is at least {found.epsilon_lower_bound:.6g}{confidence}"
    limits = "An audit that passes proves nothing; it has looked at the training data, and is not private with respect to it."
    return [text + ".", limits, *(f"{f.name}: {'passed' if f.passed else 'FAILED'}. {f.text}".strip() for f in found.findings)]


def plan(report: RunReport) -> tuple[list[str], list[list[str]]]:
    """The plan as titles and rows, without columns that are empty in every row; no rows for a run that kept none."""
    rows = plan_rows(report)
    used = [i for i in range(len(PLAN_TITLES)) if any(row[i] for row in rows)]
    return [PLAN_TITLES[i] for i in used], [[row[i] for i in used] for row in rows]


def plan_rows(report: RunReport) -> list[list[str]]:
    """The plan, one row per layer, and one per group that holds no layer."""
    groups = {g["name"]: g for g in report.statement.get("groups", ())}
    rows = []
    for layer in report.statement.get("layers", ()):
        group = groups.get(layer["group"], {})
        sizes = [f"{layer[key]:,}" for key in ("positions", "fan_in", "fan_out", "num_params")]
        rows.append([layer["name"], layer["kind"], *sizes, layer["method"], layer["group"], *bound_and_noise(group)])
    listed = {layer["group"] for layer in report.statement.get("layers", ())}
    for name, group in groups.items():  # a released count; or all groups of a run that kept no layers
        if name not in listed:
            rows.append(["", "", "", "", "", f"{group['num_params']:,}", "", name, *bound_and_noise(group)])
    return rows


PLAN_TITLES = ("layer", "kind", "T", "D", "p", "parameters", "method", "group", "bound of the group", "noise std")
PLAN_TEXT = (
    "T: positions per example; D: inputs per position; p: outputs per position. Method: how an example's norm is taken. Bound: L2 norm of "
    "one example's part of the group's sum; noise std: standard deviation of the noise on that sum, in the same units."
)


def bound_and_noise(group: dict[str, Any]) -> list[str]:
    """Two cells."""
    return [f"{group[key]:.6g}" if group.get(key) is not None else "" for key in ("norm_bound", "noise_std")]


def config_text(report: RunReport) -> str:
    """The config as YAML, without the seed that undoes the noise."""
    return re.sub(r"(?m)^(  unsafe_seed: )\d+$", rf"\g<1># {SEED_HIDDEN}", report.files.config.to_yaml())


def versions(report: RunReport) -> str:
    """Of the run, and of what computed the report."""

    def listed(found: dict[str, str]) -> str:
        return ", ".join(f"{name} {text}" for name, text in found.items()) or "not recorded"

    return f"Trained with {listed(report.statement.get('versions', {}))}. This report was computed with {listed(report.tools)}."
