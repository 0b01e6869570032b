"""The run itself under observation: the noise of every release, what is recorded before it, and whether weights follow from releases alone.

The checks of single steps (``checks``) call steps of their own. What a run does that they do not, at a later step or with the optimizer of
the config, shows here.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dptrain import trainer
from dptrain.auditing import pool
from dptrain.auditing.bounds import FALSE_ALARM, Array
from dptrain.auditing.checks import noise_over_sensitivity
from dptrain.auditing.findings import Finding
from dptrain.auditing.normal import furthest_normal, most_alike, variance_test
from dptrain.auditing.watch import Watch, flat, plan_owner
from dptrain.guard import Records
from dptrain.mechanism import FLOAT_MARGIN
from dptrain.plan import Plan
from dptrain.randomness import NOISE, StepNoise
from dptrain.rundir import RunDirectory
from dptrain.sampling import physical_batches
from dptrain.setup import Setup
from dptrain.trainer import Loop

KEPT_NUMBERS = 4_000_000  # of the residuals of all steps, for correlations between steps
REPLAYED_NUMBERS = 2**25  # of the releases that are kept to be applied again
MOST_REPLAYED = 24
LEFT_OUT = 12  # examples that are left out of a batch, one after the other
ULPS = 64  # rounding that a replay may differ by, in units of the last place of the largest number of an array


@dataclass
class Replay:
    """The first releases of a run, to be applied again.

    Args:
        start: weights and buffers before them.
        releases: identifier -> sums, scale and learning rate of each.
        end: weights, buffers and the optimizer's state after them.
    """

    start: Mapping[str, np.ndarray]
    releases: list[tuple[dict[str, np.ndarray], float, float | None]] = field(default_factory=list)
    end: Mapping[str, np.ndarray] | None = None


class RunWatch(Watch):
    """Sees every release of a run, from the sum before its noise to the weights after it.

    Args:
        backend: the run's.
        setup: of the run.
        rng: chooses the numbers that are kept.
    """

    def __init__(self, backend: Any, setup: Setup, rng: np.random.Generator) -> None:
        super().__init__(backend)
        self.setup, self.rng = setup, rng
        self.ledger: Any = None
        self.per_record = 1  # steps that one record stands for
        self.releases = self.late = self.without_noise = 0
        self.tests: list[tuple[float, float, str]] = []
        self.kept: list[Array] = []
        self.claims: list[float] = []  # noise over sensitivity of each release, from what it was made with
        self.scales: set[float] = set()
        self.replay = Replay(backend.get_weights(setup.model))
        sizes = {name: value.size for name, value in backend.parameters(setup.model).items()}
        self.to_replay = int(min(MOST_REPLAYED, max(1, REPLAYED_NUMBERS // max(1, sum(sizes.values())))))
        share = min(1.0, max(256.0, KEPT_NUMBERS / max(1, setup.num_steps)) / max(1, sum(sizes.values())))
        self.chosen = {name: np.sort(rng.choice(size, max(1, round(share * size)), replace=False)) for name, size in sizes.items()}
        self._exact: Mapping[str, np.ndarray] | None = None
        self._stds: Mapping[str, float] = {}
        self._optimizer: Any = None
        self._plan: Plan = setup.plan

    def privatize(self, total: Any, plan: Plan, stds: Mapping[str, float], noise: StepNoise) -> Any:
        """The release; its sum is noted before."""
        self._exact, self._plan, self._stds = self._inner.sums(self.setup.model, total), plan, dict(stds)
        self.claims.append(noise_over_sensitivity(plan, stds, self.setup.config.privacy.relation))
        return self._inner.privatize(total, plan, stds, noise)

    def apply(self, model: Any, optimizer: Any, released: Any, scale: float, learning_rate: float | None) -> None:
        """The update; what it is given is compared with the sum before the noise."""
        seen, self._optimizer = dict(self._inner.sums(model, released)), optimizer
        self.releases += 1
        self.late += self.ledger is not None and self.ledger.num_releases * self.per_record < self.releases
        self.scales.add(scale)
        if self._exact is None:
            self.without_noise += 1
        else:
            self._compare(seen, self._exact)
        self._exact = None
        if len(self.replay.releases) < self.to_replay:
            self.replay.releases.append((seen, scale, learning_rate))
        self._inner.apply(model, optimizer, released, scale, learning_rate)

    def project(self, model: Any, plan: Plan) -> Mapping[str, float]:
        """The projection, after which a step has ended."""
        found: Mapping[str, float] = self._inner.project(model, plan)
        if len(self.replay.releases) == self.to_replay and self.replay.end is None:
            self.replay.end = saved(self._inner, model, self._optimizer)
        return found

    def _compare(self, seen: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray]) -> None:
        step, groups, kept = self.releases - 1, dict[str, list[Array]](), []
        for name in seen:
            known = any(name in layer.params for layer in self._plan.layers)
            group = plan_owner(self._plan, name) if known else ""
            std = self._stds.get(group, math.nan) or math.nan  # what is claimed to have no noise is not private
            values = (np.asarray(seen[name], np.float64).ravel() - np.asarray(exact[name], np.float64).ravel()) / std
            if values.size == 0:
                continue
            self.tests.append((*variance_test(values), f"parameter {name!r}, step {step}"))
            groups.setdefault(group, []).append(values)
            kept.append(values[self.chosen[name]])
        for group, parts in groups.items():
            self.tests.append((*variance_test(np.concatenate(parts)), f"group {group!r}, step {step}"))
        self.kept.append(np.concatenate(kept))


def noise_finding(watch: RunWatch) -> Finding:
    """The noise of every release of the run, as ``checks.noise`` and ``checks.independence`` look at that of single steps."""
    name = "noise of the run"
    if not watch.tests:
        return Finding(name, watch.releases == 0, f"{watch.without_noise} of {watch.releases} releases had no noise", {})
    p, ratio, worst = min(watch.tests)
    alike, pair = most_alike(watch.kept) if len(watch.kept) > 1 else (0.0, (0, 0))
    quiet = p > FALSE_ALARM / len(watch.tests) and alike <= furthest_normal(len(watch.kept) ** 2)
    passed = quiet and not watch.without_noise and len(watch.scales) == 1
    text = (
        f"{watch.releases} releases, {watch.without_noise} without noise, divided by {len(watch.scales)} constants: largest deviation "
        f"{ratio:.4g} times the claimed standard deviation in {worst} (p = {p:.3g}), largest correlation {alike:.3g} standard "
        f"deviations, of steps {pair[0]} and {pair[1]}"
    )
    return Finding(name, bool(passed), text, {"p_value": p, "largest_correlation": alike, "without_noise": float(watch.without_noise)})


def post_processing(watch: RunWatch, seed: int) -> Finding:
    """Weights, buffers and the optimizer's state, which checkpoints hold, must follow from the releases.

    The first releases are applied once more from the first weights, by a new optimizer, while the backend sums over other data; what it
    keeps of the data, in an optimizer's momentum or a layer's buffer, then leads elsewhere.

    Returns:
        The finding; exact, up to the last places.
    """
    setup, replay, backend = watch.setup, watch.replay, watch._inner
    name = "post-processing"
    if not replay.releases:
        return Finding(name, setup.num_steps == 0, "no step has changed the weights", {})
    if replay.end is None:
        replay.end = saved(backend, setup.model, watch._optimizer)
    privacy = setup.config.privacy
    backend.set_weights(setup.model, dict(replay.start))
    optimizer = backend.build_optimizer(setup.config.optimizer, setup.model)
    x, y = pool.candidates(setup.config, setup.data, seed + 1)
    stds = trainer.GaussianMechanism(1.0, privacy.allocation, privacy.noise_weights).stds(setup.plan, privacy.relation)
    key, mask = trainer.RandomKey.make(NOISE), np.ones(2, bool)
    for step, (seen, scale, rate) in enumerate(replay.releases):
        backend.seed_dropout(setup.model, setup.config.seed, step)
        picks = [step % 8, 8 + step % 8]
        other = backend.reduce(backend.bounded_sum(setup.model, setup.loss, backend.batch(x[picks], y[picks], mask), setup.plan))
        backend.privatize(other, setup.plan, stds, StepNoise(key, step, privacy.noise))
        release = backend.shifted(setup.model, backend.zeros(setup.model), seen)
        backend.apply(setup.model, optimizer, release, scale, rate)
        backend.project(setup.model, setup.plan)
    found = saved(backend, setup.model, optimizer)
    names = [*replay.end, *(name for name in found if name not in replay.end)]
    both = {name: name in found and name in replay.end for name in names}
    off = {name: distance(replay.end[name], found[name]) if both[name] else math.inf for name in names}
    worst = max(off, key=lambda name: off[name])
    text = (
        f"{len(replay.releases)} releases, applied again, lead to weights and optimizer state within {off[worst]:.3g} units in the last "
        f"place of the run's (largest for {worst!r})"
    )
    return Finding(name, bool(off[worst] <= ULPS), text, {"units_in_the_last_place": off[worst]})


def saved(backend: Any, model: Any, optimizer: Any) -> dict[str, np.ndarray]:
    """What a checkpoint holds, copied. An optimizer's arrays go by their order: Keras has another name for every optimizer."""
    state = {f"optimizer/{i}": np.array(value) for i, value in enumerate(backend.get_optimizer_state(optimizer).values())}
    return {key: np.array(value) for key, value in backend.get_weights(model).items()} | state


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference in units of the last place of the largest number."""
    if a.shape != b.shape:
        return math.inf
    if not np.issubdtype(a.dtype, np.floating):
        return 0.0 if np.array_equal(a, b) else math.inf
    if a.size == 0 or np.array_equal(a, b, equal_nan=True):
        return 0.0
    gap, unit = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()), np.finfo(a.dtype)
    return gap / (float(unit.eps) * max(float(np.abs(a).max()), float(unit.tiny))) if math.isfinite(gap) else math.inf


def own_batches(loop: Loop, seed: int) -> Finding:
    """Sensitivity in physical batches of the run's own size, with the step that the run has compiled, at its last weights.

    The checks of single steps use small batches; what happens in large ones alone, as between examples that a layer mixes, shows here.

    Returns:
        The finding; exact, up to ``FLOAT_MARGIN``.
    """
    setup, backend, step = loop.setup, loop.backend, loop.step
    plan = loop.in_force.plan if loop.in_force else setup.plan
    factor = (step.update.factor,) if loop.in_force else ()  # type: ignore[attr-defined]
    x, y = pool.candidates(setup.config, setup.data, seed + 2)
    rng = np.random.default_rng([seed, 5])

    def total(rows: np.ndarray) -> dict[str, np.ndarray]:
        backend.seed_dropout(setup.model, setup.config.seed, 0)
        found = None
        for part, mask in physical_batches(rows, step.physical_batch_size):
            more = step._sum(backend.batch(x[part], y[part], mask, *factor))  # type: ignore[attr-defined]
            found = more if found is None else backend.add(found, more)
        return flat(backend.sums(setup.model, backend.reduce(found)), plan)

    everyone, largest, where = np.arange(len(x)), 0.0, "nothing at all"
    whole = total(everyone)
    for left in rng.choice(len(x), LEFT_OUT, replace=False):
        rest = total(everyone[everyone != left])
        for group in plan.gradient_groups:
            ratio = float(np.linalg.norm(whole[group.name] - rest[group.name])) / group.norm_bound
            ratio = ratio if math.isfinite(ratio) else math.inf
            largest, where = max((largest, where), (ratio, f"example {left}, group {group.name!r}"))
    text = f"leaving one of {len(x)} strained examples out of a batch changes it by at most {largest:.6g} times the claimed bound ({where})"
    return Finding("sensitivity (batches of the run)", bool(largest <= 1 + FLOAT_MARGIN), text, {"largest_over_bound": largest})


def other_run(loop: Loop, sigma: float, draws: int = 200) -> Finding:
    """A second run of the same config has other keys, and its batches tell nothing of those of the first.

    Args:
        loop: the run.
        sigma: its noise multiplier.
        draws: logical batches that are compared.
    Returns:
        The finding.
    """
    second = again(loop.setup, sigma)
    ours, theirs = (getattr(one.step.sampler, "sampler", one.step.sampler) for one in (loop, second))
    release, other = loop.step.update.release, second.step.update.release  # type: ignore[attr-defined]
    same_key = release.noise_key.value == other.noise_key.value
    used_for_both = release.noise_key.value in {getattr(getattr(s, "key", None), "value", None) for s in (ours, theirs)}
    pairs = [(np.asarray(ours.sample(t), np.int64), np.asarray(theirs.sample(t), np.int64)) for t in range(draws)]
    both = sum(len(np.intersect1d(a, b)) for a, b in pairs)
    expected, p = strangers(both, [(len(a), len(b)) for a, b in pairs], int(ours.num_examples))
    passed = not same_key and not used_for_both and p > FALSE_ALARM
    text = (
        f"noise keys are {'THE SAME' if same_key else 'different'}{', and one SERVES SAMPLING too' if used_for_both else ''}; the batches "
        f"of {draws} steps have {both} examples in common, where those of strangers have {expected:.4g} (p = {p:.3g})"
    )
    return Finding("two runs", bool(passed), text, {"same_key": float(same_key), "p_value": p})


def strangers(both: int, sizes: list[tuple[int, int]], n: int) -> tuple[float, float]:
    """Whether independent batches of some sizes have so many examples in common.

    Args:
        both: examples in common, over all pairs of batches.
        sizes: of each pair.
        n: examples to choose from.
    Returns:
        The expected number, and a two-sided p-value.
    Source: given the sizes the overlap is hypergeometric, a sum of independent coins, and no more spread than a binomial of the same mean
        (Hoeffding 1956).
    """
    from scipy.stats import binom  # type: ignore[import-untyped]

    expected, coins = math.fsum(a * b / n for a, b in sizes), sum(min(a, b) for a, b in sizes)
    if coins == 0 or abs(both - expected) < 1:
        return expected, 1.0
    rate = min(1.0, expected / coins)
    return expected, min(1.0, 2 * min(float(binom.cdf(both, coins, rate)), float(binom.sf(both - 1, coins, rate))))


def again(setup: Setup, sigma: float) -> Loop:
    """A second run of the same parts, before its first step."""
    with RunDirectory(None, setup.config, setup.backend.name, {}) as directory:
        return Loop(setup, directory, threading.Event(), sigma, Records(directory.ledger))
