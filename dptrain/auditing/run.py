"""An audit of a run: what could be wrong with it, looked for from outside, and a lower bound on its epsilon.

The parts of a step are checked one by one (``checks``), one release is put to a distinguishing game (``game``), and one training run with
canaries gives a lower bound on the epsilon of the whole (``onerun``). An audit that passes proves nothing; one that fails shows a defect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from accounting import GaussianEvent, get_accountant
from dptrain.auditing import checks, game, joint, noises, onerun, pool, runwatch, spent
from dptrain.auditing.bounds import FALSE_ALARM, Array, Guesses
from dptrain.auditing.findings import Audit, Finding
from dptrain.auditing.normal import shape, some
from dptrain.auditing.subject import Subject
from dptrain.config import TrainConfig
from dptrain.data import Dataset
from dptrain.errors import ConfigError
from dptrain.mechanism import FLOAT_MARGIN
from dptrain.sampling import CappedSampler, FixedSizeSampler, ShuffledSampler, event_of, steps_per_release
from dptrain.setup import Setup, prepare
from dptrain.trainer import Loop, Progress, planned_noise

SMALL_DELTAS = (1e-7, 1e-9, 1e-12)
SPEAKABLE = (1e-6, 1e9)  # noise multipliers that events can claim


def audit(
    config: TrainConfig,
    backend: str = "torch",
    *,
    data: Dataset | None = None,
    model: Any = None,
    canaries: int = 400,
    examples: int = 200,
    trials: int = 1000,
    steps: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Audit:
    """Audit a run.

    Args:
        config: the run.
        backend: ``torch`` or ``tensorflow``.
        data: a data set in place of the config's.
        model: a native model in place of the config's.
        canaries: gradient-space canaries of the one-run audit; 0 leaves it out.
        examples: mislabelled examples of the one-run audit; 0 leaves them out.
        trials: releases of the distinguishing game; 0 leaves it out.
        steps: train fewer steps than the config says; the claim that is audited is then that of the shorter run.
        confidence: of the lower bound on epsilon.
        seed: of canaries and coins; never of the run's own randomness.
        progress: called after each training step.
    Returns:
        What was found. NOT private with respect to the training data.
    Raises:
        DptrainError: bad data, model or settings.
        AccountingError: the budget cannot be reached.
    """
    for name, value in (("canaries", canaries), ("examples", examples), ("trials", trials)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{name} must be a whole number, 0 or more, not {value!r}.")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must lie between 0 and 1, not {confidence!r}.")
    if steps is not None:
        config = config.replace(sampling={**config.to_dict()["sampling"], "steps": steps, "epochs": None})
    return audit_setup(
        prepare(config, backend, data, model), canaries=canaries, examples=examples, trials=trials, confidence=confidence, seed=seed,
        progress=progress,
    )  # fmt: skip


def audit_setup(
    setup: Setup,
    *,
    canaries: int = 400,
    examples: int = 200,
    trials: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Audit:
    """Audit what ``prepare`` made; the parts may have been replaced since.

    Args:
        setup: the run.
        canaries, examples, trials, confidence, seed, progress: as ``audit``.
    Returns:
        What was found.
    Raises:
        ConfigError: the run claims no privacy.
    """
    if not setup.plan.private:
        raise ConfigError(f"Strategy {setup.plan.strategy} claims no privacy, so there is nothing to audit; choose another strategy.")
    lacking = [name for name in ("sums", "shifted", "parameters", "losses") if not hasattr(setup.backend, name)]
    if lacking:
        raise ConfigError(f"Backend {setup.backend.name!r} has no {', '.join(lacking)}, which audits need; see dptrain/backend.py.")
    privacy = setup.config.privacy
    start = setup.backend.get_weights(setup.model)
    findings = step_findings(setup, trials, privacy.target_delta, seed)
    sigma = planned_noise(setup)
    outcome = onerun.run(setup, sigma, canaries, examples, seed, progress)
    loop = outcome.loop
    sampler = own_sampler(loop)
    findings.append(checks.sampling(sampler))
    if not isinstance(sampler, CappedSampler | FixedSizeSampler | ShuffledSampler):  # it claims coins
        findings.append(joint.joint_sampling(sampler, setup.num_steps))
    trained = replace(setup, plan=loop.in_force.plan) if loop.in_force else setup
    findings += [*bound_findings(trained, "trained weights", seed), runwatch.own_batches(loop, seed)]
    findings += [runwatch.noise_finding(outcome.watch), runwatch.post_processing(outcome.watch, seed)]
    setup.backend.set_weights(setup.model, start)
    findings.append(runwatch.other_run(loop, sigma))
    setup.backend.set_weights(setup.model, start)
    accountant = get_accountant(privacy.accountant, privacy.relation)
    # A claim at one delta is one at all of them, and small ones are what many canaries can refute.
    events = loop.ledger.events
    claims = [(accountant.epsilon(events, delta), delta) for delta in (privacy.target_delta, *SMALL_DELTAS)]
    claimed = claims[0][0]
    findings += [run_ledger(setup, outcome), spent.accountant_finding(events, setup, outcome.result.privacy)]
    drawn = spent.losses_finding(events, setup, seed)
    findings += [drawn] if drawn is not None else []
    lowest = 0.0
    kinds = [("one run, gradient-space canaries", outcome.white), ("one run, mislabelled examples", outcome.black)]
    used = [(name, found) for name, found in kinds if found is not None]
    for name, found in used:
        finding, bound = one_run_finding(name, found, claims, (1 - confidence) / len(used))
        findings.append(finding)
        lowest = max(lowest, bound)
    return Audit(
        lowest, claimed, privacy.target_delta, confidence, privacy.relation.value, setup.plan.strategy, setup.backend.name, tuple(findings)
    )


def own_sampler(loop: Loop) -> Any:
    """The run's sampler, without what the audit has put around it."""
    return getattr(loop.step.sampler, "sampler", loop.step.sampler)


def run_ledger(setup: Setup, outcome: onerun.Outcome) -> Finding:
    """The run's ledger holds every step, before the weights change, drawn in the way and with the noise that it had."""
    loop, watch = outcome.loop, outcome.watch
    events, counted, sampler = loop.ledger.events, loop.ledger.num_releases, own_sampler(loop)
    noise = min(watch.claims, default=math.inf)
    truth = event_of(sampler, float(np.clip(noise, *SPEAKABLE)), setup.config.privacy.relation)
    needed = -(-max(setup.num_steps, watch.releases) // steps_per_release(sampler))
    quiet = max((checks.claim(event) for event, _ in events), default=0.0)
    rare = min((getattr(event, "sample_rate", truth.sample_rate) for event, _ in events), default=1.0)
    same = all(drawn_alike(event, truth) for event, _ in events)
    enough = counted >= needed and not watch.late
    right = enough and quiet <= noise * (1 + 1e-9) and rare >= truth.sample_rate * (1 - 1e-9) and same
    text = (
        f"{counted} releases recorded for {setup.num_steps} steps, {watch.late} of them after the weights had changed, at noise multiplier "
        f"{quiet:.6g} (in truth {noise:.6g}) and sample rate {rare:.6g} (in truth {truth.sample_rate:.6g})"
    )
    if not same:
        text += f"; recorded as {', '.join(sorted({type(event).__name__ for event, _ in events}))}, in truth {truth}"
    return Finding("ledger of the run", bool(right), text, {"recorded": float(counted), "steps": float(setup.num_steps)})


def drawn_alike(event: Any, truth: GaussianEvent) -> bool:
    """Whether an event is of the batches that were drawn, whatever it says of rate and noise."""
    left_out = ("noise_multiplier", "sample_rate")
    said, is_so = ({k: v for k, v in one.to_dict().items() if k not in left_out} for one in (event, truth))
    return bool(said == is_so)


def subject_of(setup: Setup, seed: int) -> Subject:
    """The step of a run, over strained examples."""
    x, y = pool.candidates(setup.config, setup.data, seed)
    return Subject(setup, x, y)


def step_findings(setup: Setup, trials: int, delta: float, seed: int) -> list[Finding]:
    """Everything about single steps, at the first weights."""
    x, y = pool.candidates(setup.config, setup.data, seed, strange=True)
    subject = Subject(setup, x, y)
    alone = checks.contributions(subject)
    findings = bound_findings(setup, "first weights", seed, subject, alone)
    findings += moved_findings(subject)
    alone = [np.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0) for v in alone]  # what is not finite has been found by now
    seen = checks.residuals(subject, alone)
    steps, probed = noises.probes(subject, seed)
    values = some([*probed, *(v for kind in seen.values() for v in kind)])
    if proven(setup):
        findings += structured_weights(setup)
    findings += [checks.noise(subject, seen, alone), shape(values), checks.independence(subject, seen)]
    findings += [noises.later_steps(subject, steps, probed), noises.key_of_the_noise(subject)]
    findings.append(noises.keys(setup.config.privacy.unsafe_seed))
    if trials:
        findings.append(game.distinguish(subject, alone, max(trials, 40), delta, seed))
    if setup.plan.count is not None:
        findings.append(checks.count_noise(subject))
    findings.append(checks.bookkeeping(subject))
    return findings


def bound_findings(setup: Setup, when: str, seed: int, subject: Subject | None = None, alone: list[Array] | None = None) -> list[Finding]:
    """Sensitivity at the present weights: enforced bounds, or proven ones under attack too."""
    subject = subject or subject_of(setup, seed)
    alone = checks.contributions(subject) if alone is None else alone
    found = checks.changes(subject, alone)
    findings = [checks.sensitivity(subject, found, when), checks.joint_sensitivity(subject, alone, found, when)]
    return [*findings, attacked(setup, when)] if proven(setup) else findings


def moved_findings(subject: Subject) -> list[Finding]:
    """The bounds that a moving clipping norm claims, at a small and at a large one."""
    setup, strategy = subject.setup, subject.setup.config.strategy
    findings = []
    if strategy.adaptive is None:
        return []
    for scale in (0.2, min(5.0, strategy.most(setup.info))):
        subject.claimed = strategy.refresh(setup.plan, setup.info, scale)
        subject.factor = (strategy.executed(setup.plan, setup.info, scale),)
        found = checks.changes(subject, checks.contributions(subject))
        findings.append(checks.sensitivity(subject, found, f"clipping norm times {scale:g}"))
    subject.claimed, subject.factor = setup.plan, ()
    return findings


def proven(setup: Setup) -> bool:
    """Whether the plan's bounds are proven from the model, so that they can be attacked there."""
    return setup.plan.loss_clip is not None and setup.plan.graph is not None


def attacked(setup: Setup, when: str) -> Finding:
    """No input and no cotangent may reach more than a proven bound."""
    found = setup.backend.tightness(setup.model, setup.data.x_train[:1], setup.plan)
    worst = max(found, key=lambda name: found[name][0] / found[name][1])
    ratio = found[worst][0] / found[worst][1]
    text = f"inputs and cotangents found by ascent reach {ratio:.6g} times the bound of group {worst!r}"
    return Finding(f"proven bounds ({when})", bool(ratio <= 1 + FLOAT_MARGIN), text, {"largest_over_bound": ratio})


def structured_weights(setup: Setup) -> list[Finding]:
    """The same at weights that make everything that a bound adds up point in one direction.

    A bound holds for every weight that the constraints allow. At random weights a network stays far below it, so that a bound that is wrong
    by a factor of three goes unnoticed. With all weights equal, networks with overlapping windows reach 0.2 to 0.86 of it, the less the
    deeper they are, because every convolution loses at the border; with kernels of a single entry, which lose nothing there, 0.7 to 1.
    """
    start = setup.backend.get_weights(setup.model)
    kinds = {"constant weights": {name: np.ones_like(value) for name, value in start.items()}}
    if any(value.ndim > 2 for value in start.values()):
        kinds["kernels of one entry"] = {name: single_taps(value) for name, value in start.items()}
    findings = [at_weights(setup, when, weights) for when, weights in kinds.items()]
    setup.backend.set_weights(setup.model, start)
    return findings


def single_taps(value: np.ndarray) -> np.ndarray:
    """Ones in the middle of each kernel ``[out, in, *space]``, zeros around; ones where there is no space."""
    found = np.zeros_like(value)
    found[(..., *(size // 2 for size in value.shape[2:]))] = 1.0
    return found


def at_weights(setup: Setup, when: str, weights: dict[str, np.ndarray]) -> Finding:
    """An attack on the bounds that hold at some weights, after their constraints have been restored."""
    backend, model, plan, info, strategy = setup.backend, setup.model, setup.plan, setup.info, setup.config.strategy
    assert plan.graph is not None
    backend.set_weights(model, weights)
    certificates = backend.constrain(model, plan.graph)
    was, now = (strategy.refresh(plan, one, 1.0) for one in (info, replace(info, certificates=dict(certificates))))
    bounds = {g.name: g.norm_bound for g in plan.gradient_groups}
    moved = {a.name: bounds[a.name] * b.norm_bound / a.norm_bound for a, b in zip(was.gradient_groups, now.gradient_groups, strict=True)}
    return attacked(replace(setup, plan=plan.with_bounds(moved)), when)


def one_run_finding(name: str, found: Guesses, claims: Sequence[tuple[float, float]], error: float) -> tuple[Finding, float]:
    """A finding, and the lower bound on epsilon at the first delta that goes with it.

    Args:
        name: of the finding.
        found: the guesses.
        claims: (epsilon, delta) pairs that hold together; the chance of a false alarm is shared among them.
        error: chance that the lower bound is too high.
    Returns:
        Both.
    """
    claimed, delta = claims[0]
    bound, p = found.epsilon(delta, error), min(1.0, len(claims) * min(found.p_value(*claim) for claim in claims))
    best = max(found.tries, key=lambda pair: pair[1] / pair[0] if pair[0] else 0.0)
    text = f"{best[1]} of {best[0]} guesses right on {found.canaries} canaries: epsilon at least {bound:.4g} (claimed {claimed:.4g})"
    return Finding(
        name, bool(p > FALSE_ALARM), text, {"epsilon_lower_bound": bound, "p_value": p, "canaries": float(found.canaries)}
    ), bound


def save(result: Audit, folder: Path) -> None:
    """Write ``audit.json``."""
    from dptrain.checkpoint import write_json

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "audit.json", result.to_dict())


__all__ = ["Audit", "Finding", "audit", "audit_setup", "save"]
