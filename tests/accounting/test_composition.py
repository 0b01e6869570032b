"""The Fourier sum against the plain enumeration of all outcomes, and the rounding of one release on both sides."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from oracles import one_step_delta

from accounting.composition import Composition, Plan
from accounting.discretise import Pair, PointLoss, _loss_above, round_down, round_up, single_epsilon, single_log_delta, support

# (losses, masses, probability of an infinite loss, count): a bell, a rare jump, two unlike releases, a certain gain.
CASES = [
    [([-0.2, 0.0, 0.3], [0.3, 0.4, 0.3], 0.0, 6)],
    [([-0.001, 0.0, 0.002, 1.5, 3.0], [0.3, 0.4, 0.2999, 7e-5, 3e-5], 0.0, 4)],
    [([-0.1, 0.2], [0.45, 0.55], 0.0, 3), ([-1.0, 0.05, 2.0], [0.01, 0.985, 0.005], 1e-9, 3)],
    [([0.1, 0.4], [0.5, 0.5], 0.0, 5)],
]


def exact_delta(case, epsilon):
    """E[(1 - e^(epsilon - X))_+] by enumeration, an infinite loss counting 1."""
    releases = [(losses, masses) for losses, masses, _, n in case for _ in range(n)]
    total = 0.0
    for choice in itertools.product(*(range(len(losses)) for losses, _ in releases)):
        loss = math.fsum(releases[i][0][k] for i, k in enumerate(choice))
        if loss > epsilon:
            total += math.prod(releases[i][1][k] for i, k in enumerate(choice)) * -math.expm1(epsilon - loss)
    return total - math.expm1(math.fsum(n * math.log1p(-infinite) for _, _, infinite, n in case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", [math.inf, 1.2])
def test_between_the_bounds(case, cut):
    parts = [(PointLoss(np.array(losses), np.array(masses), infinite), n) for losses, masses, infinite, n in case]
    for epsilon in (0.05, 0.5):
        for tilt, period in itertools.product((0.7, 4.0, 15.0), (3.0, 25.0)):
            plan = Plan(tilt, period, 1e-5, cut, epsilon)
            true = math.log(exact_delta(case, epsilon))
            assert Composition(parts, 0.0, plan, upper=True).log_delta(epsilon) >= true - 1e-12
            finite = [(PointLoss(part.losses, part.mass, 0.0), n) for part, n in parts]
            assert Composition(finite, 0.0, plan, upper=False).log_delta(epsilon) <= true + 1e-12


def test_a_good_plan_is_tight():
    for case, tilt in ((CASES[0], 4.0), (CASES[1], 2.0)):
        parts = [(PointLoss(np.array(losses), np.array(masses), infinite), n) for losses, masses, infinite, n in case]
        upper, lower = (Composition(parts, 0.0, Plan(tilt, 12.0, 1e-6, math.inf, 0.55), upper=side) for side in (True, False))
        true = math.log(exact_delta(case, 0.55))
        assert true <= upper.log_delta(0.55) <= true + 1e-3
        assert true - 0.03 <= lower.log_delta(0.55) <= true


def test_a_certified_epsilon_is_where_delta_is():
    parts = [(PointLoss(np.array(losses), np.array(masses), infinite), n) for losses, masses, infinite, n in CASES[0]]
    for upper in (True, False):
        composition = Composition(parts, 0.0, Plan(4.0, 12.0, 1e-6, math.inf, 0.5), upper=upper)
        for guess in (0.0, 0.5, 1.7):
            epsilon = composition.epsilon(-4.0, guess)
            assert composition.log_delta(epsilon) == pytest.approx(-4.0, abs=1e-4)
            assert (exact_delta(CASES[0], epsilon) <= math.exp(-4.0)) == upper


@pytest.mark.parametrize("direction", ["remove", "add", "replace"])
@pytest.mark.parametrize(("sigma", "q", "cells"), [(0.5, 1e-4, 40), (1.0, 0.05, 7), (2.0, 0.9, 40), (30.0, 1e-6, 15), (0.3, 0.3, 100)])
def test_hockey_stick_of_one_release(direction, sigma, q, cells):
    pair = Pair(sigma, q, direction)
    edges = np.linspace(*support(pair, -40.0, -25.0), cells)
    above, below = round_up(pair, edges), round_down(pair, edges)
    for log_delta in (-3.0, -9.0, -20.0):
        epsilon = single_epsilon(pair, log_delta)
        if epsilon == 0.0:
            continue
        assert single_log_delta(pair, epsilon) <= log_delta + 1e-6
        assert single_log_delta(pair, epsilon * (1 - 1e-3)) > log_delta
        values = [float(p.mass @ np.maximum(-np.expm1(epsilon - p.losses), 0.0)) + p.infinite for p in (above, below)]
        assert values[1] * (1 - 1e-6) <= math.exp(log_delta) * (1 + 1e-6)
        assert values[0] >= math.exp(log_delta) * (1 - 1e-6)


@pytest.mark.parametrize(("sigma", "q"), [(0.8, 0.1), (2.0, 0.6)])
def test_single_release_matches_quadrature(sigma, q):
    ours = max(single_log_delta(Pair(sigma, q, direction), 0.2) for direction in ("remove", "add"))
    assert math.exp(ours) == pytest.approx(one_step_delta(sigma, q, "add_remove", 0.2), rel=1e-6)


@pytest.mark.parametrize("direction", ["remove", "add", "replace"])
@pytest.mark.parametrize("q", [1 - 1e-6, 1 - 1e-10, 1 - 1e-13])
def test_losses_of_almost_full_batches_are_rounded_up(direction, q):
    # log(1 - q + q e^w) where e^w is as small as 1 - q: q (e^w - 1) alone has lost the digits of what is left of 1.
    pair = Pair(0.5, q, direction)
    x, mu = np.linspace(-25.0, 25.0, 4001), pair.shift
    up, down = (np.log((1 - q) + q * np.exp(sign * mu * x - mu * mu / 2)) for sign in (1, -1))
    true = {"remove": up, "add": -down, "replace": up - down}[direction]
    ours = _loss_above(pair, x)
    assert (ours >= true - 1e-14 * (1 + abs(true))).all() and (ours <= true + 1e-12 * (1 + abs(true))).all()


def test_a_cell_whose_width_underflows_is_moved_up():
    # At the lower end e^w = e^-1250. A larger floor would make the cell look wide and leave its mass below.
    assert round_up(Pair(0.02, 1e-3, "remove"), np.array([0.0, 13.9, 60.0])).mass[1] >= 0.4
