"""Which noise, how many steps, or which sample rate a budget allows. Always on the private side.

Every result has been checked with the accountant itself: a search may steer as it likes, but what it returns satisfied
`epsilon <= target_epsilon`. Continuous parameters waste at most 0.1 % of epsilon, except
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
    check_sample_rate,
)
from accounting.events import Events, SampledGaussian, normalise

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
    """The checked arguments that every calibration shares."""

    def __init__(
        self,
        where: str,
        target_epsilon: float,
        delta: float,
        accountant: str,
        relation: NeighboringRelation | str,
        history: Events,
    ) -> None:
        self.where = where
        self.target = check_epsilon(target_epsilon, where=where, name="target_epsilon")
        self.delta = check_delta(delta, where=where)
        self.accountant: Accountant = get_accountant(accountant, relation)
        self.history = normalise(history)
        spent = self.accountant.epsilon(self.history, self.delta)
        if spent > self.target:
            raise AccountingError(
                f"{where}: the history alone has epsilon {spent:.6g} at delta {self.delta:g}, above the target"
                f" {self.target:g}; raise target_epsilon or delta."
            )

    def epsilon(self, sigma: float, rate: float, steps: int) -> float:
        events = (*self.history, (SampledGaussian(sigma, rate), steps))
        return self.accountant.epsilon(events, self.delta)

    def unreachable(self, best: str, change: str) -> AccountingError:
        return AccountingError(f"{self.where}: epsilon {self.target:g} at delta {self.delta:g} is out of reach: {best}; {change}.")


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
) -> float:
    """Returns the smallest noise multiplier (to 0.1 % of epsilon) whose epsilon does not exceed the target.

    Args:
      target_epsilon: budget in nats, including `history`.
      delta: in (0, 1).
      sample_rate: Poisson sample rate in (0, 1].
      steps: number of releases, at least 1.
      accountant: name in ACCOUNTANTS.
      relation: neighbouring relation.
      history: (event, count) pairs already spent.

    Returns:
      Noise standard deviation / L2 sensitivity.

    Raises:
      AccountingError: for invalid input, and if no noise multiplier between 0.001 and 10^6 meets or uses the budget.

    Guarantee: epsilon(history + result) <= target_epsilon.
    """
    where = "calibrate_noise_multiplier"
    rate = check_sample_rate(sample_rate, where=where)
    count = check_count(steps, "steps", where=where)
    if count == 0:
        raise AccountingError(f"{where}: steps must be at least 1, got 0; nothing would be released.")
    normalise([(SampledGaussian(1.0, rate), count)])  # refuses what no accountant can speak of
    budget = _Budget(where, target_epsilon, delta, accountant, relation, history)
    # Larger noise is more private: search in the inverse. The guess is the Gaussian limit, right within a factor.
    guess = rate * math.sqrt(2 * count * -math.log(budget.delta)) / budget.target
    search = _Search(lambda x: budget.epsilon(math.exp(-x), rate, count), budget.target)
    smallest, largest = _NOISE_RANGE
    good, _ = search.run(-math.log(max(guess, 0.6)), -math.log(largest), -math.log(smallest), _close)
    if math.isnan(good):
        best = budget.epsilon(largest, rate, count)
        raise budget.unreachable(
            f"with noise multiplier {largest:g} it is {best:.6g}",
            "take fewer steps, a smaller sample rate or a larger delta",
        )
    if good == -math.log(smallest):
        raise AccountingError(
            f"{where}: even noise multiplier {smallest:g} stays within epsilon {budget.target:g} at delta"
            f" {budget.delta:g}, because an example is hardly ever sampled; use a smaller delta, or choose the noise"
            " yourself."
        )
    return math.exp(-good)


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
    sigma = SampledGaussian(check_positive(noise_multiplier, "noise_multiplier", where=where), 1.0).noise_multiplier
    count = check_count(steps, "steps", where=where)
    if count == 0:
        raise AccountingError(f"{where}: steps must be at least 1, got 0; nothing would be released.")
    normalise([(SampledGaussian(1.0, 1.0), count)])  # refuses what no accountant can speak of
    budget = _Budget(where, target_epsilon, delta, accountant, relation, history)
    guess = budget.target * sigma / math.sqrt(2 * count * -math.log(budget.delta))
    search = _Search(lambda x: budget.epsilon(sigma, min(1.0, math.exp(x)), count), budget.target)
    good, _ = search.run(math.log(min(max(guess, 1e-9), 1.0)), math.log(_MIN_RATE), 0.0, _close)
    if math.isnan(good):
        best = budget.epsilon(sigma, _MIN_RATE, count)
        raise budget.unreachable(
            f"with sample rate {_MIN_RATE:g} it is {best:.6g}",
            "raise the noise multiplier or delta, or take fewer steps",
        )
    return min(1.0, math.exp(good))


def calibrate_steps(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    noise_multiplier: float,
    accountant: str = "prv",
    relation: NeighboringRelation | str = "add_remove",
    history: Events = (),
) -> int:
    """Returns the largest number of further releases whose epsilon does not exceed the target.

    Args:
      target_epsilon: budget in nats, including `history`.
      delta: in (0, 1).
      sample_rate: Poisson sample rate in (0, 1].
      noise_multiplier: noise standard deviation / L2 sensitivity.
      accountant: name in ACCOUNTANTS.
      relation: neighbouring relation.
      history: (event, count) pairs already spent.

    Raises:
      AccountingError: for invalid input, if one release exceeds the budget, and if 10^9 releases do not.

    Guarantee: epsilon(history + result) <= target_epsilon, and one release more was found to exceed it.
    """
    where = "calibrate_steps"
    rate = check_sample_rate(sample_rate, where=where)
    sigma = SampledGaussian(check_positive(noise_multiplier, "noise_multiplier", where=where), rate).noise_multiplier
    budget = _Budget(where, target_epsilon, delta, accountant, relation, history)
    log_guess = 2 * (_log(budget.target) + math.log(sigma) - math.log(rate)) - _log(2 * -math.log(budget.delta))
    # Epsilon grows between the square root and the first power of the steps, mostly; the search does not rely on it.
    search = _Search(lambda x: budget.epsilon(sigma, rate, round(math.exp(x))), budget.target, whole=True)
    good, bad = search.run(math.log(round(math.exp(min(max(log_guess, 0.0), math.log(_MAX_STEPS))))), 0.0, math.log(_MAX_STEPS), _adjacent)
    if math.isnan(good):
        one = budget.epsilon(sigma, rate, 1)
        raise budget.unreachable(f"one release already gives {one:.6g}", "raise the noise multiplier or the budget")
    if math.isnan(bad):
        raise AccountingError(
            f"{where}: {_MAX_STEPS:.0e} releases stay within epsilon {budget.target:g} at delta {budget.delta:g};"
            " lower the noise multiplier or the budget."
        )
    return round(math.exp(good))


def _adjacent(good: float, bad: float) -> bool:
    return round(math.exp(bad)) - round(math.exp(good)) <= 1
