"""One training run, many canaries: a lower bound on the epsilon of the whole run (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846).

Two kinds of canaries, each in or out by a coin of its own, in the same run:

* *gradient-space* (white-box): a vector of the largest norm that the plan allows, on numbers of its own, is added to the sum of every
  step that the canary was drawn for. The auditor sees every release and what the other examples added, which can only help. This
  strains noise, accounting and composition.
* *examples* (black-box): real inputs with wrong labels. The auditor sees the finished model alone, and guesses from the loss.

What is in the data set without a canary follows the neighbouring relation: nothing (``add_remove``, ``zero_out``), or for ``replace_one``
another example: the opposite vector, the right label.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from accounting import NeighboringRelation
from accounting.mixtures import attained
from dptrain.auditing import pool
from dptrain.auditing.bounds import Array, Guesses, guess
from dptrain.auditing.runwatch import RunWatch
from dptrain.auditing.watch import Watch, owner_parameters
from dptrain.backend import Backend
from dptrain.guard import Records
from dptrain.plan import Group, Plan
from dptrain.randomness import StepNoise
from dptrain.rundir import RunDirectory
from dptrain.sampling import ShuffledSampler, event_of, steps_per_release
from dptrain.setup import Setup
from dptrain.trainer import Loop, Progress, TrainResult

TINY = 1e-6  # of a bound, in place of no noise at all, under which every canary shows


@dataclass
class Vectors:
    """Gradient-space canaries: which numbers of which parameter each one holds.

    Args:
        inside: ``[m]``, the coins.
        places: group -> (identifier, flat index) of each canary, or None where the group is too small for all of them.
        opposite: whether a canary that is out adds the opposite vector.
    """

    inside: np.ndarray
    places: Mapping[str, list[tuple[str, int]]]
    opposite: bool


def place(shapes: Mapping[str, int], plan: Plan, canaries: int, opposite: bool, rng: np.random.Generator) -> Vectors:
    """Give every canary one number of each group that is large enough.

    Args:
        shapes: identifier -> size.
        plan: the groups.
        canaries: m; fewer are placed where no group has as many numbers.
        opposite: see ``Vectors``.
        rng: chooses.
    Returns:
        The canaries.
    """
    places = {}
    owned = {group.name: owner_parameters(plan, group.name) for group in plan.gradient_groups}
    canaries = min(canaries, max(sum(shapes.get(name, 0) for name in names) for names in owned.values()))
    for group in plan.gradient_groups:
        names = [name for name in owned[group.name] if name in shapes]
        ends = np.cumsum([shapes[name] for name in names])
        if len(ends) and ends[-1] >= canaries:
            chosen = rng.choice(int(ends[-1]), canaries, replace=False)
            which = np.searchsorted(ends, chosen, side="right")
            starts = np.concatenate([[0], ends[:-1]])
            places[group.name] = [(names[w], int(c - starts[w])) for w, c in zip(which, chosen, strict=True)]
    return Vectors(rng.random(canaries) < 0.5, places, opposite)


class VectorWatch(Watch):
    """Adds gradient-space canaries to every sum, and keeps the likelihood ratio of each coin.

    Args:
        backend: the run's.
        vectors: the canaries.
        sample_rate: chance of each canary in each step.
        rng: draws them.
        span: steps of a pass over shuffled data, in one of which each canary is; the auditor knows in which. None draws them anew at each
            step, and the auditor does not know whether.
    """

    def __init__(self, backend: Backend, vectors: Vectors, sample_rate: float, rng: np.random.Generator, span: int | None = None) -> None:
        super().__init__(backend)
        self.vectors, self.rate, self.rng, self.span = vectors, sample_rate, rng, span
        self.model: Any = None
        self.scores = np.zeros(len(vectors.inside))
        self.known = np.ones(len(vectors.inside), bool)  # whose step it may be, as far as the auditor knows
        self.steps, self.places = 0, np.zeros(len(vectors.inside), np.int64)

    def _drawn(self) -> np.ndarray:
        """Which canaries this step has."""
        count = len(self.vectors.inside)
        if self.span is None:
            return self.rng.random(count) < self.rate
        if self.steps % self.span == 0:
            self.places = self.rng.integers(0, self.span, count)
        self.known = self.places == self.steps % self.span
        self.steps += 1
        return self.known

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        """The release, with canaries in it."""
        vectors, inner = self.vectors, self._inner
        exact = inner.sums(self.model, total)
        sign = np.where(vectors.inside, 1.0, -1.0 if vectors.opposite else 0.0) * self._drawn()
        groups = [group for group in plan.gradient_groups if group.name in vectors.places]
        added = {name: np.zeros(value.shape) for name, value in exact.items()}
        for group in groups:
            for s, (name, index) in zip(sign, vectors.places[group.name], strict=True):
                added[name].flat[index] += s * group.norm_bound
        released = inner.privatize(inner.shifted(self.model, total, added), plan, stds, noise)
        self._score(inner.sums(self.model, released), exact, groups, stds)
        return released

    def _score(
        self, seen: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray], groups: list[Group], stds: Mapping[str, float]
    ) -> None:
        """Add this release's log-likelihood ratio of in against out, exact for Gaussian noise on canaries that were drawn so."""
        along, square = np.zeros(len(self.scores)), 0.0
        for group in groups:
            std = max(stds[group.name], TINY * group.norm_bound)
            weight, places = group.norm_bound / std**2, self.vectors.places[group.name]
            along += weight * np.array([float(seen[name].flat[i]) - float(exact[name].flat[i]) for name, i in places])
            square += weight * group.norm_bound
        self.scores += np.where(self.known, self._log_mix(along - square / 2), 0.0)
        if self.vectors.opposite:
            self.scores -= np.where(self.known, self._log_mix(-along - square / 2), 0.0)

    def _log_mix(self, w: Array) -> Array:
        """log(1 - q + q e^w)."""
        if self.rate >= 1:
            return w
        found: Array = np.logaddexp(np.log1p(-self.rate), np.log(self.rate) + w)
        return found


def canary_rate(setup: Setup, num_examples: int) -> tuple[float, int | None]:
    """How often a canary is in a step, as often as an example is; and the steps of a pass, where the data are shuffled.

    Args:
        setup: the run.
        num_examples: that the run will draw from, canaries among them.

    Source: under a cap an example is kept less often than it is drawn, ``accounting.mixtures.attained``.
    """
    sampler, relation = setup.scheme.public(num_examples), setup.config.privacy.relation
    if isinstance(sampler, ShuffledSampler):
        return 1.0, sampler.per_pass
    found = attained(event_of(sampler, 1.0, relation), NeighboringRelation(relation))
    return (found[0].sample_rate if found is not None else setup.sample_rate), None


@dataclass
class Replacing:
    """A sampler whose draws lack some examples, or have others in their place.

    Args:
        sampler: the run's.
        instead: for each example what takes its place, itself by default; -1 for nothing.
    """

    sampler: Any
    instead: np.ndarray

    @property
    def num_examples(self) -> int:
        """N, a public constant: it does not tell which canaries are in."""
        return int(self.sampler.num_examples)

    @property
    def sample_rate(self) -> float:
        """q."""
        return float(self.sampler.sample_rate)

    def sample(self, step: int) -> np.ndarray:
        """The indices of one logical batch."""
        found = self.instead[np.asarray(self.sampler.sample(step), np.int64)]
        return found[found >= 0]


@dataclass
class Outcome:
    """What one run gave.

    Args:
        white: guesses from every release; None if there were no such canaries.
        black: guesses from the finished model; None likewise.
        loop: the run, for its ledger, its plan in force and its sampler.
        watch: saw its releases.
        result: what the run said of itself.
        scores: by kind, with the coins, for plots.
    """

    white: Guesses | None
    black: Guesses | None
    loop: Loop
    watch: RunWatch
    result: TrainResult
    scores: dict[str, tuple[Array, np.ndarray]] = field(default_factory=dict)


def run(setup: Setup, sigma: float, vectors: int, examples: int, seed: int, progress: Callable[[Progress], None] | None = None) -> Outcome:
    """Train once with canaries.

    Args:
        setup: the run.
        sigma: noise multiplier of the run.
        vectors: gradient-space canaries, 0 for none.
        examples: canaries among the examples, 0 for none; at most N.
        seed: of coins and canaries; auditing promises nothing.
        progress: called after each step.
    Returns:
        Guesses and the run.
    """
    rng = np.random.default_rng([seed, 1])
    opposite = NeighboringRelation(setup.config.privacy.relation) is NeighboringRelation.replace_one
    watch: VectorWatch | None = None
    seen = RunWatch(setup.backend, setup, np.random.default_rng([seed, 4]))
    setup = replace(setup, backend=seen)  # type: ignore[arg-type]
    if vectors:
        sizes = {name: value.size for name, value in setup.backend.parameters(setup.model).items()}
        clean = len(setup.data.x_train)
        rate, span = canary_rate(setup, clean + min(examples, clean))
        watch = VectorWatch(setup.backend, place(sizes, setup.plan, vectors, opposite, rng), rate, rng, span)
        watch.model = setup.model
        setup = replace(setup, backend=watch)  # type: ignore[arg-type]
    data, clean = setup.data, len(setup.data.x_train)
    rows, x, y = pool.mislabelled(data, min(examples, clean), rng)
    inside = rng.random(len(rows)) < 0.5
    if len(rows):
        data = replace(data, x_train=np.concatenate([data.x_train, x]), y_train=np.concatenate([data.y_train, y]))
        setup = replace(setup, data=data)
    # The budget is that of the run without canaries; with them among the data a cap, for one, binds more often.
    privacy = setup.config.privacy.model_copy(update={"target_epsilon": None, "noise_multiplier": sigma})
    setup = replace(setup, config=setup.config.replace(privacy=privacy))
    before = setup.backend.losses(setup.model, setup.loss, x, y) if len(rows) else np.zeros(0)
    with RunDirectory(None, setup.config, setup.backend.name, {}) as directory:
        loop = Loop(setup, directory, threading.Event(), sigma, Records(directory.ledger))
        seen.ledger, seen.per_record = loop.ledger, steps_per_release(loop.step.sampler)
        if len(rows):
            instead = np.arange(len(data.x_train))
            instead[clean:][~inside] = rows[~inside] if opposite else -1
            loop.step = replace(loop.step, sampler=Replacing(loop.step.sampler, instead))  # type: ignore[arg-type]
        result = loop.run(progress, None)
    found = Outcome(None, None, loop, seen, result)
    if watch is not None:
        found.white, found.scores["white"] = guess(watch.scores, watch.vectors.inside), (watch.scores, watch.vectors.inside)
    if len(rows):
        learned = before - setup.backend.losses(setup.model, setup.loss, x, y)
        learned = np.nan_to_num(learned, nan=0.0, posinf=0.0, neginf=0.0)
        found.black, found.scores["black"] = guess(learned, inside), (learned, inside)
    return found
