"""Which noise, how many steps, or which sample rate a budget allows. Always on the private side.

A budget is an epsilon at a delta (`calibrate_noise_multiplier`, `calibrate_sample_rate`, `calibrate_steps`), a delta at an
epsilon (`calibrate_to_delta`), or the advantage of the best membership attack (`calibrate_to_advantage`).

Every result has been checked with the accountant itself: a search may steer as it likes, but what it returns satisfied
`spent <= target`. Continuous parameters waste at most 0.1 % of the target, except
where the accountant itself jumps: at deltas below about 1e-20 with tiny sample rates `prv` does, and 16 % was seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from accounting.accountant import Accountant, NeighboringRelation, get_accountant
from accounting.errors import (
    AccountingError,
    check_count,
    check_delta,
    check_epsilon,
    check_positive,
    check_real,
    check_sample_rate,
)
from accounting.events import Event, Events, SampledGaussian, normalise

# What is spent by which events, according to an accountant.
Measure = Callable[[Accountant, Events], float]

# The search stops inside this share below the target; the accountants' own grids move epsilon by less than half of it.
_WASTE = 8e-4
_AIM = 3e-4
_NOISE_RANGE = (1e-3, 1e6)
_MIN_RATE = 1e-12
_MAX_STEPS = 10**9
_MAX_EVALUATIONS = 200


def _log(value: float) -> float:
    return math.log(max(value, 1e-300))


class _Search:
    """A root search on a log-log scale for an epsilon that rises with the log of the parameter.

    Keeps a pair (`good`, `bad`): good satisfied the budget, bad did not, good < bad. Interpolates, with a bisection
    whenever interpolation is slow; steps in the accountant (a change of grid) cannot break it.

    Args:
      epsilon: of the log of the parameter.
      target: what it may not exceed.
      whole: whether the parameter is an integer, of which the largest good one is wanted: epsilon near the target is no
        reason to stop.
    """

    def __init__(self, epsilon: Callable[[float], float], target: float, *, whole: bool = False) -> None:
        self._epsilon, self._target, self._whole = epsilon, target, whole
        self.evaluations = 0

    def at(self, x: float) -> float:
        self.evaluations += 1
        return self._epsilon(x)

    def _near(self, value: float) -> bool:
        return not self._whole and self._target * (1 - _WASTE) <= value <= self._target

    def run(self, start: float, low: float, high: float, done: Callable[[float, float], bool]) -> tuple[float, float]:
        """Returns (good, bad) in logs of the parameter; one is NaN if the whole range is bad or good.

        Args:
          start: first guess (log of the parameter).
          low: most private end of the range (log).
          high: least private end (log).
          done: says whether a pair (good, bad) is close enough, besides epsilon itself being within the waste.
        """
        good, bad, at_good, at_bad = math.nan, math.nan, math.nan, math.nan
        x, step = min(max(start, low), high), 0.7
        while math.isnan(good) or math.isnan(bad):
            value = self.at(x)
            if value <= self._target:
                good, at_good = x, value
                if x == high or self._near(value):
                    return good, bad
            else:
                bad, at_bad = x, value
                if x == low:
                    return good, bad
            if math.isnan(good) or math.isnan(bad):
                slope_step = abs(_log(value) - _log(self._target)) * 1.2 + 0.01 if value > 0 else step
                move = max(min(slope_step, 4.0), 0.02) if self.evaluations < 3 else step
                x = min(x + move, high) if value <= self._target else max(x - move, low)
                step *= 2
        # For an integer the aim is the target itself, and both neighbours are wanted.
        goal = _log(self._target * (1 if self._whole else 1 - _AIM))
        widths = [bad - good]
        while not done(good, bad) and not self._near(at_good) and self.evaluations < _MAX_EVALUATIONS:
            x = self._next(good, bad, (_log(at_good) - goal, _log(at_bad) - goal), widths)
            value = self.at(x)
            if value <= self._target:
                good, at_good = x, value
            else:
                bad, at_bad = x, value
            widths.append(bad - good)
        return good, bad

    def _next(self, good: float, bad: float, ends: tuple[float, float], widths: list[float]) -> float:
        """Returns where to look next, strictly between good and bad."""
        at_good, at_bad = ends
        share = at_good / (at_good - at_bad) if at_bad > at_good else 0.5
        if len(widths) > 2 and widths[-1] > 0.5 * widths[-3]:
            share = 0.5
        share = min(max(share, 0.02), 0.98)
        if not self._whole:
            return good + (bad - good) * share
        low, high = round(math.exp(good)), round(math.exp(bad))
        # Just beyond the estimate, on the side of the farther end, so that both ends close in.
        exact = math.exp(good + (bad - good) * share)
        margin = max(1.0, 0.02 * (high - low))
        count = round(exact + margin if exact - low < high - exact else exact - margin) if share != 0.5 else round(exact)
        return math.log(min(max(count, low + 1), high - 1))


class _Budget:
    """A target for what is spent, and the checked arguments that every calibration shares.

    Args:
      where: the public function, for messages.
      target: what may be spent in all.
      measure: what a list of events spends.
      what: the target in words.
      mu: about the sensitivity, in noise standard deviations, of one Gaussian that spends the target.
      accountant: name in ACCOUNTANTS.
      relation: neighbouring relation.
      history: (event, count) pairs already spent.
    """

    def __init__(
        self,
        where: str,
        target: float,
        measure: Measure,
        what: str,
        mu: float,
        accountant: str,
        relation: NeighboringRelation | str,
        history: Events,
    ) -> None:
        self.where, self.target, self.what, self.mu = where, target, what, mu
        self._measure = measure
        self.accountant: Accountant = get_accountant(accountant, relation)
        self.history = normalise(history)
        spent = measure(self.accountant, self.history)
        if spent > self.target:
            raise AccountingError(f"{where}: the history alone has {what.format(spent)}, above the target {target:g}; raise the target.")

    def spent(self, event: Event, steps: int) -> float:
        return self._measure(self.accountant, (*self.history, (event, steps)))

    def unreachable(self, best: str, change: str) -> AccountingError:
        return AccountingError(f"{self.where}: {self.what.format(self.target)} is out of reach: {best}; {change}.")


def _epsilon_budget(
    where: str, target_epsilon: float, delta: float, accountant: str, relation: NeighboringRelation | str, history: Events
) -> _Budget:
    target = check_epsilon(target_epsilon, where=where, name="target_epsilon")
    delta = check_delta(delta, where=where)
    what, mu = f"epsilon {{:.6g}} at delta {delta:g}", target / math.sqrt(2 * -math.log(delta))
    return _Budget(where, target, lambda judge, events: judge.epsilon(events, delta), what, mu, accountant, relation, history)


def _close(good: float, bad: float) -> bool:
    return bad - good < 1e-9


def calibrate_noise_multiplier(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "prv",
    relation: NeighboringRelation | str = "add_remove",
    history: Events = (),
    *,
    event: Callable[[float], Event] | None = None,
) -> float:
    """Returns the smallest noise multiplier (to 0.1 % of epsilon) whose epsilon does not exceed the target.

    Args:
      target_epsilon: budget in nats, including `history`.
      delta: in (0, 1).
      sample_rate: Poisson sample rate in (0, 1]; with `event`, where the search begins.
      steps: number of releases, at least 1.
      accountant: name in ACCOUNTANTS.
      relation: neighbouring relation.
      history: (event, count) pairs already spent.
      event: noise multiplier -> what one release is recorded as, such as a `CappedGaussian`; a `SampledGaussian` by default.

    Returns:
      Noise standard deviation / L2 sensitivity.

    Raises:
      AccountingError: for invalid input, and if no noise multiplier between 0.001 and 10^6 meets or uses the budget.

    Guarantee: epsilon(history + result) <= target_epsilon.
    """
    where = "calibrate_noise_multiplier"
    return _noise(_epsilon_budget(where, target_epsilon, delta, accountant, relation, history), sample_rate, steps, event)


def calibrate_sample_rate(
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    steps: int,
    accountant: str = "prv",
    relation: NeighboringRelation | str = "add_remove",
    history: Events = (),
) -> float:
    """Returns the largest Poisson sample rate (to 0.1 % of epsilon) whose epsilon does not exceed the target.

    Args:
      target_epsilon: budget in nats, including `history`.
      delta: in (0, 1).
      noise_multiplier: noise standard deviation / L2 sensitivity.
      steps: number of releases, at least 1.
      accountant: name in ACCOUNTANTS.
      relation: neighbouring relation.
      history: (event, count) pairs already spent.

    Raises:
      AccountingError: for invalid input, and if even a sample rate of 10^-12 exceeds the budget.

    Guarantee: epsilon(history + result) <= target_epsilon.
    """
    where = "calibrate_sample_rate"
    return _rate(_epsilon_budget(where, target_epsilon, delta, accountant, relation, history), noise_multiplier, steps)


def calibrate_steps(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    noise_multiplier: float,
    accountant: str = "prv",
    relation: NeighboringRelation | str = "add_remove",
    history: Events = (),
    *,
    event: Event | None = None,
) -> int:
    """Returns the largest number of further releases whose epsilon does not exceed the target.

    Args:
      target_epsilon: budget in nats, including `history`.
      delta: in (0, 1).
      sample_rate: Poisson sample rate in (0, 1]; with `event`, where the search begins.
      noise_multiplier: noise standard deviation / L2 sensitivity; with `event`, likewise.
      accountant: name in ACCOUNTANTS.
      relation: neighbouring relation.
      history: (event, count) pairs already spent.
      event: what one release is recorded as, of any kind; a `SampledGaussian` by default.

    Raises:
      AccountingError: for invalid input, if one release exceeds the budget, and if 10^9 releases do not.

    Guarantee: epsilon(history + result) <= target_epsilon, and one release more was found to exceed it.
    """
    where = "calibrate_steps"
    return _steps(_epsilon_budget(where, target_epsilon, delta, accountant, relation, history), sample_rate, noise_multiplier, event)


def calibrate_to_delta(
    target_delta: float,
    epsilon: float,
    *,
    sample_rate: float | None = None,
    steps: int | None = None,
    noise_multiplier: float | None = None,
    accountant: str = "prv",
    relation: NeighboringRelation | str = "add_remove",
    history: Events = (),
) -> float | int:
    """Returns the one of sample rate, steps and noise multiplier that is left out, such that delta at `epsilon` is not above a target.

    Args:
      target_delta: budget in (0, 1), including `history`.
      epsilon: in nats, above 0.
      sample_rate: Poisson sample rate in (0, 1]; None to solve for the largest.
      steps: number of releases, at least 1; None to solve for the largest.
      noise_multiplier: noise standard deviation / L2 sensitivity; None to solve for the smallest.
      accountant: name in ACCOUNTANTS.
      relation: neighbouring relation.
      history: (event, count) pairs already spent.

    Raises:
      AccountingError: for invalid input, unless exactly one is left out, and if the target is out of reach.

    Guarantee: delta(history + result) at `epsilon` is at most target_delta, as the accountant's `delta` says.
    """
    where = "calibrate_to_delta"
    target = check_delta(target_delta, where=where, name="target_delta")
    epsilon = check_epsilon(epsilon, where=where)
    what, mu = f"delta {{:.6g}} at epsilon {epsilon:g}", epsilon / math.sqrt(2 * -math.log(target))
    budget = _Budget(where, target, lambda judge, events: judge.delta(events, epsilon), what, mu, accountant, relation, history)
    return _left_out(budget, sample_rate, steps, noise_multiplier)


def calibrate_to_advantage(
    target_advantage: float,
    *,
    sample_rate: float | None = None,
    steps: int | None = None,
    noise_multiplier: float | None = None,
    accountant: str = "prv",
    relation: NeighboringRelation | str = "add_remove",
    history: Events = (),
) -> float | int:
    """Returns the one of sample rate, steps and noise multiplier that is left out, such that no attack has more than some advantage.

    Args:
      target_advantage: the largest true-positive minus false-positive rate that any membership attack may have, in (0, 1),
        including `history`.
      sample_rate: Poisson sample rate in (0, 1]; None to solve for the largest.
      steps: number of releases, at least 1; None to solve for the largest.
      noise_multiplier: noise standard deviation / L2 sensitivity; None to solve for the smallest.
      accountant: name in ACCOUNTANTS.
      relation: neighbouring relation.
      history: (event, count) pairs already spent.

    Raises:
      AccountingError: for invalid input, unless exactly one is left out, and if the target is out of reach.

    Guarantee: the total variation distance of history + result is at most target_advantage, as the accountant's `advantage` says.
    Source: Kulynych et al. 2024 (arXiv:2407.02191): noise for an attack risk, without the detour over one epsilon.
    """
    where = "calibrate_to_advantage"
    target = check_real(target_advantage, "target_advantage", where=where)
    if not 0.0 < target < 1.0:
        raise AccountingError(
            f"{where}: target_advantage must lie strictly between 0 and 1, got {target!r}; it is the largest true-positive minus"
            " false-positive rate of an attack."
        )
    what, mu = "an attack advantage of {:.6g}", 2.5 * target
    budget = _Budget(where, target, lambda judge, events: judge.advantage(events), what, mu, accountant, relation, history)
    return _left_out(budget, sample_rate, steps, noise_multiplier)


def _left_out(budget: _Budget, rate: float | None, steps: int | None, sigma: float | None) -> float | int:
    """Returns the one of the three that is None."""
    if rate is not None and steps is not None and sigma is None:
        return _noise(budget, rate, steps)
    if rate is None and steps is not None and sigma is not None:
        return _rate(budget, sigma, steps)
    if rate is not None and steps is None and sigma is not None:
        return _steps(budget, rate, sigma)
    raise AccountingError(f"{budget.where}: give exactly two of sample_rate, steps and noise_multiplier; the third is solved for.")


def _check_steps(steps: int, where: str) -> int:
    count = check_count(steps, "steps", where=where)
    if count == 0:
        raise AccountingError(f"{where}: steps must be at least 1, got 0; nothing would be released.")
    return count


def _check_sigma(noise_multiplier: float, where: str) -> float:
    return SampledGaussian(check_positive(noise_multiplier, "noise_multiplier", where=where), 1.0).noise_multiplier


def _noise(budget: _Budget, sample_rate: float, steps: int, event: Callable[[float], Event] | None = None) -> float:
    rate, count = check_sample_rate(sample_rate, where=budget.where), _check_steps(steps, budget.where)
    of: Callable[[float], Event] = event or (lambda sigma: SampledGaussian(sigma, rate))
    normalise([(of(1.0), count)])  # refuses what no accountant can speak of
    # Larger noise is more private: search in the inverse. The guess is the Gaussian limit, right within a factor.
    guess = rate * math.sqrt(count) / budget.mu
    search = _Search(lambda x: budget.spent(of(math.exp(-x)), count), budget.target)
    smallest, largest = _NOISE_RANGE
    good, _ = search.run(-math.log(max(guess, 0.6)), -math.log(largest), -math.log(smallest), _close)
    if math.isnan(good):
        best = budget.spent(of(largest), count)
        raise budget.unreachable(
            f"with noise multiplier {largest:g} it is {best:.6g}",
            "take fewer steps, a smaller sample rate or a larger target or delta",
        )
    if good == -math.log(smallest):
        raise AccountingError(
            f"{budget.where}: even noise multiplier {smallest:g} stays within {budget.what.format(budget.target)}, because an example"
            " is hardly ever sampled; use a smaller target or delta, or choose the noise yourself."
        )
    return math.exp(-good)


def _rate(budget: _Budget, noise_multiplier: float, steps: int) -> float:
    sigma, count = _check_sigma(noise_multiplier, budget.where), _check_steps(steps, budget.where)
    normalise([(SampledGaussian(1.0, 1.0), count)])  # refuses what no accountant can speak of
    guess = budget.mu * sigma / math.sqrt(count)
    search = _Search(lambda x: budget.spent(SampledGaussian(sigma, min(1.0, math.exp(x))), count), budget.target)
    good, _ = search.run(math.log(min(max(guess, 1e-9), 1.0)), math.log(_MIN_RATE), 0.0, _close)
    if math.isnan(good):
        best = budget.spent(SampledGaussian(sigma, _MIN_RATE), count)
        raise budget.unreachable(
            f"with sample rate {_MIN_RATE:g} it is {best:.6g}",
            "raise the noise multiplier, the target or delta, or take fewer steps",
        )
    return min(1.0, math.exp(good))


def _steps(budget: _Budget, sample_rate: float, noise_multiplier: float, event: Event | None = None) -> int:
    rate = check_sample_rate(sample_rate, where=budget.where)
    sigma = SampledGaussian(check_positive(noise_multiplier, "noise_multiplier", where=budget.where), rate).noise_multiplier
    one = event if event is not None else SampledGaussian(sigma, rate)
    log_guess = 2 * (_log(budget.mu) + math.log(sigma) - math.log(rate))
    # Epsilon grows between the square root and the first power of the steps, mostly; the search does not rely on it.
    search = _Search(lambda x: budget.spent(one, round(math.exp(x))), budget.target, whole=True)
    start = math.log(round(math.exp(min(max(log_guess, 0.0), math.log(_MAX_STEPS)))))
    good, bad = search.run(start, 0.0, math.log(_MAX_STEPS), _adjacent)
    if math.isnan(good):
        raise budget.unreachable(f"one release already gives {budget.spent(one, 1):.6g}", "raise the noise multiplier or the budget")
    if math.isnan(bad):
        raise AccountingError(
            f"{budget.where}: {_MAX_STEPS:.0e} releases stay within {budget.what.format(budget.target)}; lower the noise multiplier or"
            " the budget."
        )
    return round(math.exp(good))


def _adjacent(good: float, bad: float) -> bool:
    return round(math.exp(bad)) - round(math.exp(good)) <= 1
