"""`prv`: numerical composition of the privacy loss distribution. Near exact, always from above.

The loss of one release is rounded up to a few hundred losses (`discretise`) and composed by a Fourier sum
(`composition`); the smaller one of this bound and of `rdp` is reported. The loss rounded down gives a certified lower
value, so the gap is visible. Full-batch releases (sample rate 1) compose to one Gaussian, one release needs no grid.

Where to look and how finely is learned from rough bounds first (`_View`): whatever the choice, the bound is valid.

Both steps are our own because dp-accounting's lose what is needed here: its second differences of delta fail on grids
finer than about 1e-6, and its FFT has an absolute error of 1e-16 per release. Its distributions are the test oracle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from accounting.accountant import NeighboringRelation, check_relation
from accounting.errors import AccountingError, check_delta, check_epsilon, check_nonnegative
from accounting.events import Event, Events, SampledGaussian, normalise
from accounting.mixtures import Pairs, attained, components, simplify
from accounting.rdp import RDPAccountant
from accounting.tuning import Tuning

if TYPE_CHECKING:
    from accounting.composition import Composition
    from accounting.discretise import Array, Nodes, Piece, PointLoss

# Excess of epsilon aimed at (relative): for the value reported, for a direction that only has to stay below it, and
# for the certified lower value.
_TOLERANCE = 2e-4
_ROUGH = 4e-3
_LOWER_TOLERANCE = 1e-3
# Excess left in epsilon (relative) and in log delta that is good enough.
_GOOD = 3e-4
_GOOD_LOG_DELTA = 5e-4
# An epsilon below this share of the spread of the composed loss is found to within that share's tolerance.
_SMALL_EPSILON = 0.03
# Excess of log delta that is accepted where epsilon is so large that its tolerance would exceed all spread.
_BLUR = 0.3
_FEWEST_CELLS, _MOST_CELLS = 64, 1500
# How often a low guess of delta is corrected.
_MOST_AIMS = 3
# Rough bounds from which a view learns, and over how many nodes on both sides it takes means.
_MOST_ROUGH, _FEW, _MOST_POINTS = 6, 2, 1000
# For how many epsilons a profile makes compositions of their own.
_ANCHORS = 9
# Shares of delta (log) that may be moved to plus infinity, and of the mass moved up from below, in all releases together.
_LOG_SHARE = -11.0
_LOW_TAIL = -12.0
# Log of the smallest delta for which normal tails keep their relative precision; `rdp` serves below.
_LEAST_LOG_DELTA = -600.0


@dataclass(frozen=True)
class Detail:
    """How an epsilon was obtained.

    Args:
      epsilon: the reported upper bound (nats).
      lower: a certified lower bound on the true epsilon (nats).
      grid_epsilon: the upper bound from the grid, infinite if none is certified.
      rdp_epsilon: the upper bound from `rdp`.
      method: "none" (no releases), "gaussian" (closed form), "grid", or "rdp" (the recorded fallback).
      interval: root mean square of the widths of the cells used (nats), 0 without a grid.
    """

    epsilon: float
    lower: float
    grid_epsilon: float
    rdp_epsilon: float
    method: str
    interval: float


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns epsilon of a Gaussian mechanism whose sensitivity is `mu` noise standard deviations, rounded up.

    Guarantee: delta(result) <= delta, checked in log space with a margin above the rounding error.
    Source: Balle, Wang 2018 (arXiv:1805.06530), theorem 8; composition: Dong, Roth, Su 2022 (arXiv:1905.02383), 3.3.
    """
    from dp_accounting import gaussian_mechanism  # type: ignore[import-untyped]

    target = math.log(delta)
    if gaussian_log_delta(mu, 0.0) <= target:
        return 0.0
    import numpy as np

    with np.errstate(all="ignore"):
        start = float(gaussian_mechanism.get_epsilon_gaussian(1.0 / mu, delta))
    step = 1e-12 * max(1.0, start)
    while gaussian_log_delta(mu, start) > target:
        start, step = start + step, 2 * step
    return start * (1 + 1e-10)


def gaussian_log_delta(mu: float, epsilon: float, *, upper: bool = True) -> float:
    """Returns log delta of the same mechanism, rounded up (or down) by more than its rounding error."""
    from scipy.special import log_ndtr  # type: ignore[import-untyped]

    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    # log(e^first - e^second): the rounding of both is relative to their size, which epsilon and mu scale.
    error = 1e-14 * (1.0 + abs(first) + epsilon)
    gap = min(second - first, -1e-300)
    if not upper:
        return first + math.log(-math.expm1(gap + error)) - error if gap + error < 0 else -math.inf
    return min(0.0, first + math.log(-math.expm1(gap - error)) + error)


def _gaussian_lower(mu: float, delta: float, upper: float) -> float:
    """Returns a certified lower bound, not far below an upper one."""
    lower, step = upper * (1 - 1e-9), 1e-9 * upper
    while lower > 0 and gaussian_log_delta(mu, lower, upper=False) <= math.log(delta):
        lower, step = lower - step, 2 * step
    return max(lower, 0.0)


class PRVAccountant:
    """Privacy-loss-distribution accountant of sampled Gaussians; for a random number of tuning runs it reports `rdp`'s value.

    Args:
      relation: the neighbouring relation.

    Guarantee: an upper bound on epsilon (delta) of the composition; `detail` shows a certified lower bound beside it.
    Source: Koskela, Jalko, Honkela 2020; Doroshenko et al. 2022; Zhu, Dong, Wang 2022.
    """

    name = "prv"

    def __init__(self, relation: NeighboringRelation | str = "add_remove") -> None:
        self.relation = check_relation(relation, where="PRVAccountant")
        self._rdp = RDPAccountant(self.relation)

    def epsilon(self, events: Events, delta: float) -> float:
        """Returns an upper bound on epsilon.

        Args:
          events: (event, count) pairs.
          delta: in (0, 1).

        Returns:
          Epsilon in nats, 0 for no releases.
        """
        return self._detail(events, delta, certify=False).epsilon

    def detail(self, events: Events, delta: float) -> Detail:
        """Returns the reported epsilon with a certified lower value and what it was chosen from."""
        return self._detail(events, delta, certify=True)

    def _detail(self, events: Events, delta: float, *, certify: bool) -> Detail:
        delta = check_delta(delta, where="prv.epsilon")
        pairs = self._simple(events)
        if not pairs:
            return Detail(0.0, 0.0, 0.0, 0.0, "none", 0.0)
        return _detail_of(self.relation, pairs, delta, certify)

    def _simple(self, events: Events) -> Pairs:
        return simplify(normalise(events), self.relation)

    def _compute(self, pairs: Pairs, delta: float, certify: bool) -> Detail:
        if _searched(pairs):
            rdp = self._rdp.epsilon(pairs, delta)
            return Detail(rdp, 0.0, math.inf, rdp, "rdp", 0.0)
        mu, sampled = _split(pairs)
        if not mu and not certify and _log_sampled(sampled) <= math.log(delta):
            return Detail(0.0, 0.0, 0.0, math.inf, "grid", 0.0)  # an example that is never sampled leaves no trace
        rdp = self._rdp.epsilon(pairs, delta)
        if not sampled:
            exact = gaussian_epsilon(mu, delta)
            return Detail(min(exact, rdp), _gaussian_lower(mu, delta, exact), exact, rdp, "gaussian", 0.0)
        log_delta = math.log(delta)
        grid, interval = self._upper(mu, sampled, _Question(log_delta))
        best = min(grid, rdp)
        method = "grid" if grid <= rdp else "rdp"
        if not certify:
            return Detail(best, 0.0, grid, rdp, method, interval)
        lower = max(0.0, self._lower(mu, sampled, _Question(log_delta)))
        if lower > best * (1 + 1e-7):
            raise AccountingError(
                f"prv.detail: the certified lower value {lower!r} exceeds the upper bound {best!r} for {pairs!r} at"
                f" delta {delta!r}; this is a defect of dptrain, please report it."
            )
        return Detail(best, min(lower, best), grid, rdp, method, interval)

    def delta(self, events: Events, epsilon: float) -> float:
        """Returns an upper bound on delta at `epsilon` (nats), 0 for no releases."""
        return self._delta(self._simple(events), check_epsilon(epsilon, where="prv.delta"))

    def _delta(self, pairs: Pairs, epsilon: float, views: list[_View] | None = None) -> float:
        """Returns `delta`; the views that were refined on the way are appended to `views`."""
        if not pairs:
            return 0.0
        log_bound = self._rdp.log_delta(pairs, epsilon)
        if _searched(pairs):
            return min(1.0, max(math.exp(min(0.0, log_bound)), 5e-324))
        mu, sampled = _split(pairs)
        if sampled and not mu:
            log_bound = min(log_bound, _log_sampled(sampled))
        if not sampled:
            log_bound = min(log_bound, gaussian_log_delta(mu, epsilon))
        elif log_bound > -600.0:
            # The true delta lies a few orders of magnitude below the Renyi bound; far more if large losses are rare.
            aim = min(log_bound, 0.0) - 7.0
            for _ in range(_MOST_AIMS):
                found = self._upper(mu, sampled, _Question(aim, epsilon), views)[0]
                log_bound = min(log_bound, found)
                if found > aim + 4.0:
                    break
                aim = found - 7.0
        # The margin covers the rounding of 1 / sigma and of the exponential.
        return min(1.0, max(math.exp(min(0.0, log_bound)) * (1 + 1e-12), 5e-324))

    def profile(self, events: Events, epsilons: Sequence[float]) -> tuple[float, ...]:
        """Returns upper bounds on delta at many epsilons (nats, at least 0), much faster than one by one.

        A composition that was made for one epsilon is a valid bound at every other one, and a good one nearby: it is made for
        `_ANCHORS` of them, and the best one is taken.
        """
        wanted = [check_nonnegative(epsilon, "epsilon", where="prv.profile") for epsilon in epsilons]
        pairs = self._simple(events)
        mu, sampled = _split(pairs)
        points = sorted(set(wanted))
        many = len(points) > _ANCHORS and bool(sampled) and (bool(mu) or not _alone(sampled)) and not _searched(pairs)
        anchors = {points[round(i * (len(points) - 1) / (_ANCHORS - 1))] for i in range(_ANCHORS)} if many else set(points)
        views: list[_View] = []
        found: dict[float, float] = {}
        for epsilon in sorted(anchors, reverse=True):
            hopeless = bool(found) and min(found.values()) == 1.0  # and no smaller epsilon has a smaller delta
            found[epsilon] = 1.0 if hopeless else self._delta(pairs, epsilon, views if many else None)
        best = 1.0
        for epsilon in points:  # delta falls
            values = [found[epsilon]] if epsilon in found else []
            if epsilon not in found:
                near = [sorted((v for v in views if v.direction == d), key=lambda v: abs(v.aimed - epsilon)) for d in self._directions()]
                if all(near):
                    log_delta = max(min(view.again(epsilon) for view in side[:2]) for side in near)
                    values += [math.exp(log_delta) * (1 + 1e-12)]
            best = found[epsilon] = min([best, *values])
        return tuple(found[epsilon] for epsilon in wanted)

    def advantage(self, events: Events) -> float:
        """Returns an upper bound on the total variation distance: delta at epsilon 0."""
        pairs = self._simple(events)
        return self._rdp.advantage(pairs) if _searched(pairs) else self._delta(pairs, 0.0)

    def _directions(self) -> tuple[str, ...]:
        # Replace-one's pairs are their own mirror image. For add/remove the worse direction may change under composition.
        return ("replace",) if self.relation is NeighboringRelation.replace_one else ("remove", "add")

    def _upper(self, mu: float, sampled: Pairs, question: _Question, kept: list[_View] | None = None) -> tuple[float, float]:
        """Returns the upper bound for the worse direction (infinite if none is certified), and the cell width used.

        The direction that looks worse is done well. For the other a coarse bound is enough if it stays below; if the views are
        `kept`, both are done well.
        """
        if not mu and question.epsilon is None and _log_sampled(sampled) <= question.log_delta:
            return 0.0, 0.0
        if question.log_delta < _LEAST_LOG_DELTA:
            return math.inf, 0.0
        if not mu and (alone := _alone(sampled)):
            return self._single(alone, question)
        import numpy as np

        try:
            with np.errstate(all="ignore"):  # NaN certifies nothing
                views = [_View(mu, sampled, direction, question, self.relation) for direction in self._directions()]
                views.sort(key=lambda view: view.estimate, reverse=True)
                worst = views[0].refined()
                for view in views[1:]:
                    if kept is not None or (view.limit > worst[0] and view.bound(_ROUGH)[0] > worst[0]):
                        worst = max(worst, view.refined())
                if kept is not None:
                    kept.extend(views)
        except (ArithmeticError, ValueError):  # out of the range of floats
            return math.inf, 0.0
        return worst

    def _single(self, event: SampledGaussian, question: _Question) -> tuple[float, float]:
        """Returns the bound for one release, which needs no grid."""
        from accounting.discretise import Pair, single_epsilon, single_log_delta

        pairs = [Pair(event.noise_multiplier, event.sample_rate, direction) for direction in self._directions()]
        if question.epsilon is None:
            return max(single_epsilon(pair, question.log_delta) for pair in pairs), 0.0
        return max(single_log_delta(pair, question.epsilon) for pair in pairs), 0.0

    def _lower(self, mu: float, sampled: Pairs, question: _Question) -> float:
        """Returns a certified lower bound for the worse direction, of pairs that some data attain."""
        if question.log_delta < _LEAST_LOG_DELTA:
            return 0.0
        import numpy as np

        found = [(pair, n) for event, n in sampled for pair in [attained(event, self.relation)] if pair is not None]
        directions = self._directions()
        if any(lone for (_, lone), _ in found):  # N(0) on one side: either side may be the first
            directions = ("remove", "add")
        if not found and not mu:
            return 0.0
        best = 0.0
        for direction in directions:
            pairs = [(event, n, direction if lone or "replace" not in self._directions() else "replace") for (event, lone), n in found]
            try:
                with np.errstate(all="ignore"):
                    best = max(best, _View.of_pairs(mu, pairs, question).certified())
            except (ArithmeticError, ValueError):
                continue
        return best


@dataclass(frozen=True)
class _Question:
    """What is asked: epsilon at `log_delta`, or (if it is given) log delta at `epsilon`, which is not far below `log_delta`."""

    log_delta: float
    epsilon: float | None = None


class _View:
    """The releases in one direction: where to look, and bounds of any accuracy there."""

    def __init__(
        self,
        mu: float,
        sampled: Pairs,
        direction: str,
        question: _Question,
        relation: NeighboringRelation = NeighboringRelation.add_remove,
    ) -> None:
        # In one release of a kind this much mass may be moved to plus infinity.
        releases = math.log(sum(n for _, n in sampled))
        rare = question.log_delta + _LOG_SHARE - releases
        self._begin(mu, [(_release(event, relation, direction, rare), n) for event, n in sampled], direction, question)

    @classmethod
    def of_pairs(cls, mu: float, sampled: Sequence[tuple[SampledGaussian, int, str]], question: _Question) -> _View:
        """Returns the view of releases whose directions are given one by one."""
        from accounting.discretise import Pair, Piece

        view = cls.__new__(cls)
        releases = [(_Release((Piece(Pair(e.noise_multiplier, e.sample_rate, side)),)), n) for e, n, side in sampled]
        view._begin(mu, releases, sampled[0][2] if sampled else "", question)
        return view

    def _begin(self, mu: float, releases: list[tuple[_Release, int]], direction: str, question: _Question) -> None:
        from accounting.composition import Steering

        self._mu, self._question, self.direction = mu, question, direction
        self.aimed = question.epsilon if question.epsilon is not None else math.nan
        self._releases = releases
        self._pairs = [(release.pieces[0].pair, n) for release, n in releases]
        log_count = math.log(sum(n for _, n in releases))
        tails = question.log_delta + _LOG_SHARE - log_count, _LOW_TAIL - log_count
        self._nodes = [(release.steer(*tails), n) for release, n in releases]
        self._full = self._steer = Steering(self._nodes, mu)
        self._cut = math.inf
        self._last: Composition | None = None
        if question.epsilon is not None:
            self._aim(question.epsilon)
        else:
            self._place(*self._steer.solve(log_delta=question.log_delta))
            if self._guess <= 0.0:
                self._aim(0.0)
        #: What the variance of a small Gaussian adds to epsilon, doubled, and what the squared cell widths add, times 12.
        self._curve = self._tilt + 1
        self._weights = [self._curve * weight for weight in self._tilted()]
        #: What the answer cannot exceed: "add" has a largest total loss.
        self.limit = math.inf
        if direction == "add" and not mu and all(release.plain for release, _ in releases):
            most = math.fsum(-n * math.log1p(-pair.q) for pair, n in self._pairs) * (1 + 1e-12)
            self.limit = most if question.epsilon is None else (-math.inf if question.epsilon >= most else math.inf)
        #: The value expected, roughly.
        self.estimate = self._guess if question.epsilon is None else self._steer.point(self._tilt)[1]

    def _aim(self, epsilon: float) -> None:
        """Puts the cut for jumps above this epsilon and the saddle point there."""
        from accounting.composition import Steering

        self._cut = self._full.jumps(epsilon, self._question.log_delta)
        self._steer = Steering(self._nodes, self._mu, self._cut)
        self._place(self._steer.solve(epsilon=epsilon)[0], epsilon)

    def _place(self, tilt: float, guess: float) -> None:
        self._tilt, self._guess = tilt, guess
        self._relaxed = self._steer.relax(tilt, guess, self._question.log_delta)

    def _tilted(self) -> list[Array]:
        from accounting.discretise import tilted

        return [tilted(nodes, self._tilt, self._cut) for nodes, _ in self._nodes]

    def _settle(self) -> float:
        """Returns a rough upper bound, and learns from it where to look and where the cells should lie.

        The saddle point of a loss with a heavy tail may have to move first, and its tilt says little about the cells.
        """
        best = math.inf
        for turn in range(_MOST_ROUGH):
            rough = self.bound(_ROUGH)[0]
            if not math.isfinite(rough):
                break
            best = min(best, rough)
            if best == 0.0 and self._question.epsilon is None:
                break
            self._learn(self._question.epsilon if self._question.epsilon is not None else best)
            near = self._question.epsilon is not None or abs(best - self._guess) <= 0.03 * best
            if self._question.epsilon is None:
                self._aim(best)
            if turn and near:
                break
        return best

    def _learn(self, epsilon: float) -> None:
        """Weighs the cells by the loss of a release given that the total is epsilon, from the last composition.

        A cell of width h at loss l adds to delta about h^2 / 12 times the density of the other releases at epsilon - l.
        """
        import numpy as np

        assert self._last is not None
        step = min(0.1 * max(epsilon, self._steer.spread / 10), 1 / self._tilt)
        (near, here, far), (_, above, _) = self._last.shape(np.array([epsilon - step, epsilon, epsilon + step]))
        slope = math.log(near / far) / (2 * step)
        # -d delta / d epsilon is e^epsilon Q(loss > epsilon), with the jumps.
        fall = above - here + math.exp(min(epsilon, 700.0)) * self._last.jump_other
        if not (slope > 0 and above > here and math.isfinite(fall)):
            return
        losses = np.unique(np.concatenate([nodes.loss for nodes, _ in self._nodes]))
        losses = np.append(losses[:: 1 + len(losses) // _MOST_POINTS], losses[-1])  # long ledgers: no more than needed
        shape = self._last.shape(epsilon - losses)
        weights = []
        for nodes, _ in self._nodes:
            delta, above_each = (np.interp(nodes.loss, losses, values) for values in shape)
            density = slope * (slope + 1) * delta
            # Where the others hardly ever lose anything their density is a peak: take the mean over a few nodes.
            low, high = np.roll(nodes.loss, _FEW), np.roll(nodes.loss, -_FEW)
            mean = (np.roll(above_each, -_FEW) - np.roll(above_each, _FEW)) / np.maximum(high - low, 1e-300)
            wide = high - low > 0.01 / slope
            weights.append(np.exp(nodes.log_weight) * np.where(wide, np.maximum(mean, 0.01 * density), density) / fall)
        if all(np.isfinite(weight).all() for weight in weights):
            self._weights, self._curve = weights, (slope + 1) * (above - here) / fall

    def refined(self) -> tuple[float, float]:
        """Returns `bound` from above at an accuracy at which, going by a coarser one, little is left to gain."""
        rough = self._settle()
        if rough == 0.0 and self._question.epsilon is None:
            return 0.0, 0.0
        fine = self.bound(_TOLERANCE)
        good = _GOOD * abs(fine[0]) if self._question.epsilon is None else _GOOD_LOG_DELTA
        if _left(rough, fine[0], _ROUGH / _TOLERANCE) > good:
            coarse = self.bound(4 * _TOLERANCE)[0]
            left = _left(coarse, fine[0], 4.0)
            if left > good:
                fine = min(fine, self.bound(_TOLERANCE * max(good / left, 1 / 20) / 2))
            rough = min(rough, coarse)
        return min(fine, (rough, fine[1]))

    def again(self, epsilon: float) -> float:
        """Returns an upper bound on log delta at another epsilon (nats), from the last composition from above."""
        import numpy as np

        assert self._last is not None and self._last.upper
        with np.errstate(all="ignore"):  # NaN and what is out of range certify nothing
            try:
                value = self._last.log_delta(epsilon)
            except (ArithmeticError, ValueError):
                return 0.0
        return value if value <= 0.0 else 0.0

    def certified(self) -> float:
        """Returns `bound` from below."""
        self._settle()
        return self.bound(_LOWER_TOLERANCE, upper=False)[0]

    def bound(self, tolerance: float, *, upper: bool = True) -> tuple[float, float]:
        """Returns a bound on what is asked, and the root mean square of the cell widths (nats).

        Args:
          tolerance: relative excess of epsilon aimed at, shared by the cells and the Gaussian.
          upper: bound from above or from below.
        """
        import numpy as np

        from accounting.composition import Composition, Plan

        # Where epsilon is many spreads of the loss, a share of it would blur what is to be resolved.
        allowed = min(tolerance * max(self._guess, _SMALL_EPSILON * self._steer.spread) / 2, _BLUR / self._tilt)
        if self._question.epsilon is not None:
            allowed = min(allowed, tolerance / self._curve)
        variance = 2 * allowed / self._curve if upper else (allowed / 3) ** 2
        tilt, period = self._relaxed
        with np.errstate(all="ignore"):  # tails underflow; what is neglected is counted by Composition
            parts, width = self._parts(allowed, upper)
            composition = Composition(parts, self._mu, Plan(tilt, period, variance, self._cut, self._guess), upper=upper)
            if self._question.epsilon is not None:
                value = composition.log_delta(self._question.epsilon)
            else:
                # 1 / sigma is rounded, too.
                value = composition.epsilon(self._question.log_delta, self._guess) * (1 + (1e-12 if upper else -1e-12))
        self._last = composition
        value = (math.inf if upper else -math.inf) if math.isnan(value) else value
        return min(value, self.limit), width

    def _parts(self, allowed: float, upper: bool) -> tuple[list[tuple[PointLoss, int]], float]:
        """Returns the rounded losses of the releases, on as many cells as cost `allowed` of epsilon in all."""
        from accounting.discretise import merged, place_cells, round_down, round_up_piece, spread_cells

        rows = []  # piece by piece: (release, nodes, share of the cells below each node, roughness, count)
        for index, ((release, n), (_, weight), tilted) in enumerate(
            zip(self._releases, zip(self._nodes, self._weights, strict=True), self._tilted(), strict=True)
        ):
            start = 0
            for nodes in release.nodes:
                part = slice(start, start + len(nodes.x))
                rows.append((index, nodes, *spread_cells(nodes, weight[part], tilted[part]), n))
                start = part.stop
        # With J cells a piece costs roughness / (12 J^2); the smallest total number of cells is wanted.
        wanted = [(n * roughness) ** (1 / 3) for _, _, _, roughness, n in rows]
        unit = math.sqrt(math.fsum(wanted) / (12 * allowed))
        found: list[list[PointLoss]] = [[] for _ in self._releases]
        square = 0.0
        for (index, nodes, share, roughness, n), want in zip(rows, wanted, strict=True):
            cells = min(max(math.ceil(want * unit), _FEWEST_CELLS), _MOST_CELLS)
            piece, edges = self._releases[index][0].pieces[len(found[index])], place_cells(nodes, share, cells)
            found[index].append(round_up_piece(piece, edges) if upper else round_down(piece.pair, edges))
            square += n * roughness / self._curve / cells**2
        parts = []
        for (release, n), losses in zip(self._releases, found, strict=True):
            parts.append((losses[0] if release.plain else merged(losses, release.atom, release.infinite), n))
        return parts, math.sqrt(square / sum(n for _, n in self._releases))


class _Release:
    """One release in one direction: pieces of pairs, an atom at loss 0, and mass that is given up.

    Args:
      pieces: with their weights.
      atom: mass at loss 0.
      infinite: mass at plus infinity.
    """

    def __init__(self, pieces: Sequence[Piece], atom: float = 0.0, infinite: float = 0.0) -> None:
        self.pieces, self.atom, self.infinite = tuple(pieces), atom, infinite
        self.nodes: list[Nodes] = []

    @property
    def plain(self) -> bool:
        """Whether this is a single pair."""
        return len(self.pieces) == 1 and self.atom == 0.0 and self.infinite == 0.0

    def steer(self, log_upper: float, log_lower: float) -> Nodes:
        """Returns the nodes of all pieces and of the atom; a piece that lies in a negligible tail is left out, its mass moved up."""
        import numpy as np

        from accounting.discretise import Nodes, mass_of, steering_of

        if self.plain:
            self.nodes = [steering_of(self.pieces[0], log_upper, log_lower)]
            return self.nodes[0]
        kept = []
        for piece in self.pieces:
            nodes = steering_of(piece, log_upper, log_lower)
            if len(nodes.x) > 2:
                kept.append(piece)
                self.nodes.append(nodes)
            elif piece.high < math.inf:
                self.atom += mass_of(piece)  # losses below 0
            else:
                self.infinite += mass_of(piece)
        self.pieces = tuple(kept)
        x, loss, log_weight = (np.concatenate([getattr(nodes, name) for nodes in self.nodes]) for name in ("x", "loss", "log_weight"))
        if self.atom > 0.0:
            x, loss, log_weight = np.append(x, 0.0), np.append(loss, 0.0), np.append(log_weight, math.log(self.atom))
        return Nodes(x, loss, log_weight - np.logaddexp.reduce(log_weight))


def _release(event: Event, relation: NeighboringRelation, direction: str, rare: float) -> _Release:
    """Returns one release in one direction; a component whose log-weight is below `rare` is given up to plus infinity."""
    from accounting.discretise import Pair, Piece, swapped_pieces

    pieces: list[Piece] = []
    atom = infinite = 0.0
    for part in components(event, relation):
        if part.log_weight < rare:
            infinite += math.exp(part.log_weight) * (1 + 1e-12) + 5e-324
        elif part.form == "sampled":
            pieces.append(Piece(Pair(part.sigma, part.q, direction), part.log_weight))
        else:
            both, at_zero = swapped_pieces(part.sigma, part.q, part.log_weight)
            pieces.extend(both)
            atom += at_zero
    return _Release(pieces, atom, infinite)


def _searched(pairs: Pairs) -> bool:
    """Returns whether a search of random length is among the events: only its Renyi divergence is bounded."""
    return any(isinstance(event, Tuning) for event, _ in pairs)


def _alone(sampled: Pairs) -> SampledGaussian | None:
    """Returns the event if there is one single release, and that an ordinary one."""
    if len(sampled) == 1 and sampled[0][1] == 1 and isinstance(sampled[0][0], SampledGaussian):
        return sampled[0][0]
    return None


def _log_sampled(sampled: Pairs) -> float:
    """Returns log of the probability that an example is sampled at all, rounded up: delta is never larger."""
    if any(_rate(event) == 1.0 for event, _ in sampled):
        return 0.0
    return math.log(-math.expm1(math.fsum(n * math.log1p(-_rate(e)) for e, n in sampled))) + 1e-9


def _rate(event: Event) -> float:
    rate: float = event.sample_rate  # type: ignore[attr-defined]  # every kind that is sampled has one
    return rate


def _left(coarse: float, fine: float, ratio: float) -> float:
    """Returns the excess of `fine`, if the excess is proportional to a tolerance that was `ratio` times as large in `coarse`."""
    left = (coarse - fine) / (ratio - 1)
    return left if math.isfinite(left) else 0.0


@lru_cache(maxsize=256)  # a key holds its whole list of releases, which is long for noise that moves
def _detail_of(relation: NeighboringRelation, pairs: Pairs, delta: float, certify: bool) -> Detail:
    """A pure function of its arguments: a calibration, its check and the printed epsilon ask for the same values."""
    return PRVAccountant(relation)._compute(pairs, delta, certify)


def _split(pairs: Pairs) -> tuple[float, Pairs]:
    """Returns (mu of the full-batch releases as one Gaussian, the sampled ones): mu^2 is the sum of 1 / sigma^2."""
    full = [(e, n) for e, n in pairs if isinstance(e, SampledGaussian) and e.sample_rate == 1.0]
    square = math.fsum(n / e.noise_multiplier**2 for e, n in full)
    return math.sqrt(square), tuple((e, n) for e, n in pairs if not (isinstance(e, SampledGaussian) and e.sample_rate == 1.0))


__all__ = ["Detail", "PRVAccountant", "SampledGaussian", "gaussian_epsilon", "gaussian_log_delta"]
