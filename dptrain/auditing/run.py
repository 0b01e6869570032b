"""An audit of a run: what could be wrong with it, looked for from outside, and a lower bound on its epsilon.

The parts of a step are checked one by one (``checks``), one release is put to a distinguishing game (``game``), and one training run with
canaries gives a lower bound on the epsilon of the whole (``onerun``). An audit that passes proves nothing; one that fails shows a defect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accounting import get_accountant
from dptrain.auditing import checks, game, onerun, pool
from dptrain.auditing.bounds import FALSE_ALARM, Guesses
from dptrain.auditing.findings import Audit, Finding
from dptrain.auditing.subject import Subject
from dptrain.config import TrainConfig
from dptrain.data import Dataset
from dptrain.errors import ConfigError
from dptrain.mechanism import FLOAT_MARGIN
from dptrain.setup import Setup, prepare
from dptrain.trainer import Progress, noise_multiplier


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
    privacy = setup.config.privacy
    start = setup.backend.get_weights(setup.model)
    findings = step_findings(setup, trials, privacy.target_delta, seed)
    sigma = noise_multiplier(setup.config, setup.sample_rate, setup.num_steps)
    outcome = onerun.run(setup, sigma, canaries, examples, seed, progress)
    loop = outcome.loop
    findings.append(checks.sampling(getattr(loop.step.sampler, "sampler", loop.step.sampler)))
    trained = replace(setup, plan=loop.in_force.plan) if loop.in_force else setup
    findings += bound_findings(trained, "trained weights", seed)
    setup.backend.set_weights(setup.model, start)
    accountant = get_accountant(privacy.accountant, privacy.relation)
    claimed = accountant.epsilon(loop.ledger.events, privacy.target_delta)
    counted = loop.ledger.num_releases
    findings.append(Finding("ledger of the run", counted >= setup.num_steps, f"{counted} releases recorded for {setup.num_steps} steps"))
    lowest = 0.0
    kinds = [("one run, gradient-space canaries", outcome.white), ("one run, mislabelled examples", outcome.black)]
    used = [(name, found) for name, found in kinds if found is not None]
    for name, found in used:
        finding, bound = one_run_finding(name, found, claimed, privacy.target_delta, (1 - confidence) / len(used))
        findings.append(finding)
        lowest = max(lowest, bound)
    return Audit(
        lowest, claimed, privacy.target_delta, confidence, privacy.relation.value, setup.plan.strategy, setup.backend.name, tuple(findings)
    )


def subject_of(setup: Setup, seed: int) -> Subject:
    """The step of a run, over strained examples."""
    x, y = pool.candidates(setup.config, setup.data, seed)
    return Subject(setup, x, y)


def step_findings(setup: Setup, trials: int, delta: float, seed: int) -> list[Finding]:
    """Everything about single steps, at the first weights."""
    subject = subject_of(setup, seed)
    alone = checks.contributions(subject)
    seen = checks.residuals(subject, alone)
    findings = bound_findings(setup, "first weights", seed, subject)
    findings += [checks.noise(subject, seen), checks.independence(subject, seen)]
    if trials:
        findings.append(game.distinguish(subject, alone, max(trials, 40), delta, seed))
    findings.append(checks.bookkeeping(subject))
    return findings


def bound_findings(setup: Setup, when: str, seed: int, subject: Subject | None = None) -> list[Finding]:
    """Sensitivity at the present weights: enforced bounds, or proven ones under attack too."""
    subject = subject or subject_of(setup, seed)
    findings = [checks.sensitivity(subject, checks.contributions(subject), when)]
    plan = setup.plan
    if plan.loss_clip is not None and plan.graph is not None:
        found = setup.backend.tightness(setup.model, setup.data.x_train[:1], plan)
        worst = max(found, key=lambda name: found[name][0] / found[name][1])
        ratio = found[worst][0] / found[worst][1]
        findings.append(
            Finding(
                f"proven bounds ({when})", bool(ratio <= 1 + FLOAT_MARGIN),
                f"inputs and cotangents found by ascent reach {ratio:.6g} times the bound of group {worst!r}",
                {"largest_over_bound": ratio},
            )
        )  # fmt: skip
    return findings


def one_run_finding(name: str, found: Guesses, claimed: float, delta: float, error: float) -> tuple[Finding, float]:
    """A finding, and the lower bound on epsilon that goes with it."""
    bound, p = found.epsilon(delta, error), found.p_value(claimed, delta)
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
