"""What a run directory holds, read without a lock and checked against itself; nothing is written here.

The ledger is the only source of an epsilon. Every other file is a witness: it may show that the ledger has lost releases, or that a
stated epsilon is not the ledger's, and then there is no report.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accounting import CappedGaussian, Events, FixedSizeGaussian, GaussianEvent, PrivacyLedger, SampledGaussian
from dptrain.checkpoint import FORMAT
from dptrain.config import TrainConfig, one_line
from dptrain.errors import ConfigError, RunError
from dptrain.mechanism import effective_noise_multiplier
from dptrain.plan import Group, Plan
from dptrain.report import COMPLETE, FACTS, INTERRUPTED, SCHEMA_VERSION, UNFINISHED
from dptrain.reporting.schema import Audit, Run, Statement, parse
from dptrain.sampling import AnySampler, PoissonSampler, event_of, steps_per_release

# Figures that are stored and computed again may differ by this, relative; an epsilon that is smaller by more is refused.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Evaluation:
    """Metrics on the test split at one time.

    Args:
        step: steps applied to the weights.
        releases: an upper bound on the releases made by then.
        metrics: name, without ``test_`` -> value; NOT private with respect to the test data.
    """

    step: int
    releases: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Metrics:
    """What ``metrics.jsonl`` tells.

    Args:
        lines: lines of training steps; each stands for a release that was made.
        steps: different steps among them.
        evaluations: in the order of the file.
        final: what the last line says: whether the run is complete; None if it is not the closing line of a session.
    """

    lines: int
    steps: int
    evaluations: tuple[Evaluation, ...]
    final: bool | None


@dataclass(frozen=True)
class RunFiles:
    """A run directory whose files agree with each other.

    Args:
        path: the directory.
        run: ``run.json``.
        config: ``config.yaml``.
        stored: ``privacy.json``, where there is one.
        metrics: ``metrics.jsonl``.
        events: the ledger.
        status: see ``dptrain.report``.
        audit: ``audit.json``, where there is one.
        remarks: what a reader should know of the files.
        data_set: what all runs on the data have spent together, if they share a ledger that is known.
    """

    path: Path
    run: Run
    config: TrainConfig
    stored: Statement | None
    metrics: Metrics
    events: Events
    status: str
    audit: Audit | None
    remarks: tuple[str, ...]
    data_set: dict[str, Any] | None = None

    @property
    def private(self) -> bool:
        """Whether the run was trained with noise."""
        return self.config.strategy.name != "non_private"

    @property
    def releases(self) -> int:
        """Releases in the ledger."""
        return sum(count for _, count in self.events)

    @property
    def sampler(self) -> AnySampler:
        """What drew the batches, to be asked for its event and for words, never for a batch."""
        return self.config.sampling.resolved(self.run.num_examples).public(self.run.num_examples)

    @property
    def span(self) -> int:
        """Steps that one release stands for."""
        return steps_per_release(self.sampler)

    @property
    def planned(self) -> int:
        """Releases that the planned steps are recorded as."""
        return -(-self.run.num_steps // self.span)

    @property
    def batches(self) -> list[GaussianEvent]:
        """The events; what a run makes are releases on batches.

        Raises:
            RunError: the ledger holds others.
        """
        found = [event for event, _ in self.events if isinstance(event, SampledGaussian | CappedGaussian | FixedSizeGaussian)]
        if len(found) < len(self.events):
            raise RunError(f"{self.path / 'ledger.jsonl'} holds releases that are not of a run of dptrain train; restore the ledger.")
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """What the statement takes from beside config and ledger; the plan of the last step if the run came to an end."""
        base = {
            "config_hash": self.run.config_hash, "backend": self.run.backend, "strategy": self.config.strategy.name,
            "num_examples": self.run.num_examples, "data": self.config.data.name,
        }  # fmt: skip
        source = self.stored or self.run.facts
        found = {**base, **(source.model_dump(mode="json", exclude_unset=True) if source is not None else {})}
        return {key: found[key] for key in FACTS if key in found}


def read_run(directory: str | Path) -> RunFiles:
    """Read a run directory and check it against itself.

    Args:
        directory: the ``--out`` directory of a run, finished or not.
    Returns:
        Its files.
    Raises:
        RunError: no run directory, foreign, of a newer version, damaged, or in contradiction with itself.
        LedgerError: the ledger is missing, damaged, foreign or of a newer version.
    """
    path = Path(directory)
    if not os.path.isdir(path):  # says no to a name that is too long, and does not raise
        raise RunError(f"{path} is not a directory; give the --out directory of a dptrain run.")
    if not (path / "run.json").exists():
        raise RunError(f"{path} holds no dptrain run (there is no run.json); give the --out directory of a run.")
    run = parse(Run, path / "run.json", newer)
    config = read_config(path, run)
    stored = read_stored(path, run)
    audit = parse(Audit, path / "audit.json") if (path / "audit.json").exists() else None
    # Everything that was written after a release is read before the ledger, which may grow while this is read.
    checkpoint, metrics = checkpoint_step(path), read_metrics(path)
    ledger = PrivacyLedger.read(path / "ledger.jsonl")
    about = {"relation": config.privacy.relation.value, "num_examples": run.num_examples}
    check_owner(ledger, path / "ledger.jsonl", about | ({"run": run.run} if run.run is not None else {}))
    remarks = tuple(text.replace(str(path / "ledger.jsonl"), "ledger.jsonl") for text in ledger.warnings)
    found = RunFiles(path, run, config, stored, metrics, ledger.events, "", audit, remarks)
    check_ledger(found, checkpoint)
    fresh, status = check_stored(found), status_of(found)
    if stored is not None and not fresh:
        remarks += (f"privacy.json was written after {stored.releases} releases; the ledger holds {found.releases}, which count here.",)
    together, remark = shared(found)
    return RunFiles(path, run, config, stored, with_releases(metrics, found), ledger.events, status, audit, remarks + remark, together)


def newer(path: Path, value: dict[str, Any]) -> None:
    """Refuse a run directory of another format before its fields are looked at.

    Raises:
        RunError: another format.
    """
    if value.get("format") != FORMAT:
        raise RunError(f"{path.parent} was written by another version of dptrain (format {value.get('format')!r}, here {FORMAT!r}).")


def newer_statement(path: Path, value: dict[str, Any]) -> None:
    """Refuse a statement of a newer schema.

    Raises:
        RunError: a newer one.
    """
    version = value.get("schema_version", 1)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise RunError(f"{path} has schema version {version!r}, this dptrain knows up to {SCHEMA_VERSION}; upgrade dptrain.")


def read_config(path: Path, run: Run) -> TrainConfig:
    """The config that the run was made with.

    Raises:
        RunError: unreadable, or another one.
    """
    try:
        config = TrainConfig.load(path / "config.yaml")
    except ConfigError as error:
        raise RunError(one_line(error)) from None
    if config.hash != run.config_hash:
        raise RunError(
            f"{path / 'config.yaml'} is not the config of this run (hash {config.hash}, in run.json {run.config_hash}); restore it."
        )
    return config


def read_stored(path: Path, run: Run) -> Statement | None:
    """The statement that the trainer left, if it did.

    Raises:
        RunError: damaged, newer, or of another run.
    """
    file = path / "privacy.json"
    if not file.exists():
        return None
    stored = parse(Statement, file, newer_statement)
    for key in ("config_hash", "backend", "num_examples"):
        if getattr(stored, key) != getattr(run, key):
            raise RunError(
                f"{file} belongs to another run ({key} {getattr(stored, key)!r}, in run.json {getattr(run, key)!r}); move it away."
            )
    return stored


def checkpoint_step(path: Path) -> int:
    """The step of the checkpoint, 0 without one.

    Raises:
        RunError: it cannot be read.
    """
    file = path / "checkpoint.safetensors"
    if not file.exists():
        return 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as opened:
            return int((opened.metadata() or {})["step"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"{file} is not a readable checkpoint ({one_line(error)}); restore it from a copy, or move it away.") from None


def read_metrics(path: Path) -> Metrics:
    """The lines of ``metrics.jsonl``; one that a kill cut short, which another may follow on the same line, is passed over.

    Raises:
        RunError: the file cannot be read.
    """
    file = path / "metrics.jsonl"
    try:
        texts = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    except OSError as error:
        raise RunError(f"{file} cannot be read ({error.strerror or error}); restore it from a copy.") from None
    lines, steps, evaluations, final = 0, set[int](), [], None
    for line in map(plain_object, texts):
        step = line.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            continue
        final = line.get("final") if isinstance(line.get("final"), bool) else None
        if "train_loss" in line:
            lines += 1
            steps.add(step)
        found = {k.removeprefix("test_"): float(v) for k, v in line.items() if k.startswith("test_") and is_number(v)}
        if found:
            evaluations.append(Evaluation(step, lines, found))
    return Metrics(lines, len(steps), tuple(evaluations), final)


def plain_object(text: str) -> dict[str, Any]:
    """A line of JSON as a mapping; empty if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def with_releases(metrics: Metrics, files: RunFiles) -> Metrics:
    """The same metrics with an upper bound on the releases at each evaluation, instead of the lines before it.

    Guarantee: a release that left no line may have happened before any of them, so all such releases are added. Where a release stands for
        several steps, those after an evaluation had at least so many releases of their own as whole passes fit into them, since one may
        have been begun before; where steps can be repeated under a record, nothing is known but the total.
    """
    if files.span > 1:
        total, unsafe = files.releases, files.config.privacy.unsafe_seed is not None
        later = [0 if unsafe else (metrics.lines - e.releases) // files.span for e in metrics.evaluations]
        spans = (Evaluation(e.step, max(0, total - after), e.metrics) for e, after in zip(metrics.evaluations, later, strict=True))
        return Metrics(metrics.lines, metrics.steps, tuple(spans), metrics.final)
    unseen = max(0, files.releases - metrics.lines)
    moved = (Evaluation(e.step, min(files.releases, e.releases + unseen), e.metrics) for e in metrics.evaluations)
    return Metrics(metrics.lines, metrics.steps, tuple(moved), metrics.final)


def check_owner(ledger: PrivacyLedger, name: Path, wanted: Mapping[str, object]) -> None:
    """Compare what a ledger's header states, if it states anything, with the run.

    Raises:
        RunError: it is the ledger of another run, or its events are in units of another relation's sensitivity.
    """
    stated = ledger.facts
    for key, value in wanted.items():
        if stated.get(key, value) != value:
            raise RunError(f"{name} is not the ledger of this run ({key} {stated[key]!r}, of the run {value!r}); restore it.")


def check_ledger(files: RunFiles, checkpoint: int) -> None:
    """Refuse a ledger that cannot be that of the run.

    Raises:
        RunError: it lost releases, or holds others than the run made.
    """
    run, releases, name = files.run, files.releases, files.path / "ledger.jsonl"
    if not files.private:
        if releases:
            raise RunError(f"{name} holds {releases} releases, and the run is non_private; restore the ledger or config.yaml.")
        return
    # With an unsafe_seed a replayed step releases the same bits again and is recorded once.
    replayed = files.config.privacy.unsafe_seed is not None
    lines = files.metrics.steps if replayed else files.metrics.lines
    seen = {
        "checkpoint.safetensors": -(-checkpoint // files.span),
        "metrics.jsonl": -(-lines // files.span),
        "privacy.json": (files.stored.releases or 0) if files.stored is not None else 0,
    }
    for witness, count in seen.items():
        if count > releases:
            raise RunError(f"{name} holds {releases} releases and {witness} tells of {count}, so releases were lost; restore the ledger.")
    poisson = isinstance(files.sampler, PoissonSampler)
    for event in files.batches:
        if run.noise_multiplier is not None and event.noise_multiplier > run.noise_multiplier * (1 + ROUNDING):
            raise RunError(
                f"{name} claims the noise multiplier {event.noise_multiplier:.9g}, and run.json says {run.noise_multiplier:.9g}; "
                "this is the ledger of another run."
            )
        said = event_of(files.sampler, event.noise_multiplier, files.config.privacy.relation)
        if type(event) is not type(said) or (not poisson and event != said):
            raise RunError(f"{name} holds {event}, and batches drawn as config.yaml says are {said}; this is the ledger of another run.")
        if poisson and event.sample_rate < run.sample_rate * (1 - ROUNDING):
            raise RunError(
                f"{name} claims the sample rate {event.sample_rate:.9g}, and run.json says {run.sample_rate:.9g}; "
                "this is the ledger of another run."
            )
    check_noise(files)


def check_noise(files: RunFiles) -> None:
    """Refuse a plan whose bounds and noise do not carry what the ledger claims: equation (1) of math.md.

    Raises:
        RunError: the noise is too small.
    """
    facts = files.facts.get("groups") or []
    groups = [Group(g["name"], (), g["norm_bound"], g.get("clip_norm"), g["num_params"]) for g in facts]
    stds = {g["name"]: g["noise_std"] for g in facts}
    if not groups or not files.events or None in stds.values():
        return
    sigma = effective_noise_multiplier(Plan(files.config.strategy.name, tuple(groups), {}), stds, files.config.privacy.relation)
    claimed = files.batches[-1].noise_multiplier
    if claimed > sigma * (1 + ROUNDING):
        source = "privacy.json" if files.stored is not None else "run.json"
        raise RunError(
            f"{files.path / source} gives bounds and noise of noise multiplier {sigma:.9g}, and the ledger claims {claimed:.9g}; "
            "the guarantee does not hold, or a file was changed."
        )


def check_stored(files: RunFiles) -> bool:
    """Compare the stored statement with the ledger.

    Returns:
        Whether it is of the whole ledger; one that an interrupted session left may be older.
    Raises:
        RunError: its epsilon is smaller than that of the releases it names, or it is complete and names too few.
    """
    from accounting import get_accountant

    stored, name = files.stored, files.path / "privacy.json"
    if stored is None:
        return False
    if not files.private:
        if stored.epsilon is not None or stored.private:
            raise RunError(f"{name} states an epsilon, and the run is non_private: no epsilon exists; move it away.")
        return True
    if stored.epsilon is None or stored.releases is None:
        raise RunError(f"{name} states no epsilon, and the run is private; move it away.")
    fresh = stored.releases == files.releases
    if not fresh and stored.status == COMPLETE:
        raise RunError(f"{name} is of a complete run of {stored.releases} releases, and the ledger holds {files.releases}; move it away.")
    privacy, events = files.config.privacy, prefix(files.events, stored.releases)
    if stored.delta != privacy.target_delta or stored.neighboring_relation != privacy.relation.value:
        raise RunError(f"{name} is not for the delta and the neighbouring relation of config.yaml; move it away.")
    if stored.private and privacy.unsafe_seed is not None:
        raise RunError(f"{name} claims a guarantee, and config.yaml has an unsafe_seed; move it away.")
    claims = {**stored.epsilon_by_accountant, privacy.accountant: stored.epsilon}
    claims[privacy.accountant] = min(stored.epsilon, stored.epsilon_by_accountant.get(privacy.accountant, stored.epsilon))
    for accountant in ("rdp", "prv"):
        computed = get_accountant(accountant, privacy.relation).epsilon(events, privacy.target_delta)
        claimed = claims.get(accountant, computed)
        if claimed < computed * (1 - ROUNDING):
            raise RunError(
                f"{name} states epsilon {claimed:.9g}, and the ledger gives {computed:.9g} ({accountant}): it is smaller than the true "
                "one; move it away."
            )
    return fresh


def shared(files: RunFiles) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """What all runs on the data have spent together, if this one shares a ledger, and what is to be said of it.

    Raises:
        RunError: it holds fewer releases than this run made, or a stored total is smaller than what this run spent.
        LedgerError: it is damaged.
    """
    from accounting import get_accountant
    from accounting.prv import PRVAccountant

    privacy = files.config.privacy
    name = privacy.ledger
    if not isinstance(name, str) or not files.private:
        return None, ()
    if os.path.exists(name):
        ledger = PrivacyLedger.read(name)
        check_owner(ledger, Path(name), {"relation": privacy.relation.value, "num_examples": files.run.num_examples})
        if ledger.num_releases < files.releases:
            raise RunError(
                f"The shared ledger {name} holds {ledger.num_releases} releases, and this run made {files.releases}; restore it."
            )
        epsilon = get_accountant(privacy.accountant, privacy.relation).epsilon(ledger.events, privacy.target_delta)
        return {
            "epsilon": epsilon, "delta": privacy.target_delta, "accountant": privacy.accountant, "releases": ledger.num_releases,
            "runs": len(ledger.run_names), "ledger": name, "facts": ledger.facts,
        }, ()  # fmt: skip
    stored = files.stored.data_set if files.stored is not None else None
    if stored is None:
        return None, (f"the run shares the ledger {name} with others, which is not there now; they have spent, too",)
    if (
        stored.epsilon < PRVAccountant(privacy.relation).detail(files.events, privacy.target_delta).lower
        or stored.releases < files.releases
    ):
        raise RunError(f"{files.path / 'privacy.json'} states that all runs together spent less than this one; move it away.")
    return stored.model_dump(mode="json", exclude_unset=True), (
        f"the shared ledger {name} is not there now; its total is that of privacy.json",
    )


def prefix(events: Events, count: int) -> Events:
    """The first releases of a ledger.

    Args:
        events: the ledger.
        count: releases wanted, at most all.
    Returns:
        Events with that many releases.
    """
    found = []
    for event, number in events:
        if count <= 0:
            break
        found.append((event, min(number, count)))
        count -= number
    return tuple(found)


def status_of(files: RunFiles) -> str:
    """Whether the run came to its end.

    Raises:
        RunError: it says so, and the ledger holds fewer releases than were planned.
    """
    fresh = files.stored is not None and (not files.private or files.stored.releases == files.releases)
    told = files.stored.status if fresh and files.stored is not None else UNFINISHED
    if files.metrics.final or told == COMPLETE:
        # With a target, the budget may end a run before its last planned step.
        if files.private and files.releases < files.planned and files.config.privacy.target_epsilon is None:
            raise RunError(
                f"{files.path} says that the run is complete, and its ledger holds {files.releases} of {files.planned} releases; "
                "restore the ledger."
            )
        return COMPLETE
    return INTERRUPTED if files.metrics.final is False and told == INTERRUPTED else UNFINISHED
