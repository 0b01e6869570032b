"""`rdp` against quadrature, autodp at integer orders, and two other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from oracles import REFERENCE, dp_accounting_rdp, renyi_log_moment

from accounting import SampledGaussian, get_accountant
from accounting.rdp import _autodp_curve
from accounting.renyi import log_moment, rough_log_moments


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
@pytest.mark.parametrize(("sigma", "q"), [(0.5, 0.3), (1.0, 0.01), (1.0, 0.9), (4.0, 0.1)])
@pytest.mark.parametrize("order", [1.1, 1.5, 2.0, 3.7, 12.0])
def test_moment_matches_quadrature(sigma, q, order, relation):
    ours = log_moment(sigma, q, order, relation == "replace_one")
    assert ours == pytest.approx(renyi_log_moment(sigma, q, order, relation), rel=1e-7, abs=1e-11)


@pytest.mark.parametrize("q", [1e-6, 1e-4])
@pytest.mark.parametrize("sigma", [0.7, 3.0, 50.0])
def test_moment_at_tiny_rates_keeps_relative_precision(q, sigma):
    # A(2) - 1 = q^2 (e^(1/sigma^2) - 1), exactly; quadrature of A itself would lose it in the 1.
    exact = math.log1p(q * q * math.expm1(1 / sigma**2))
    ours = log_moment(sigma, q, 2.0, False)
    assert exact <= ours <= exact * (1 + 1e-8)


@pytest.mark.parametrize("replace_one", [False, True])
@pytest.mark.parametrize(("sigma", "q"), [(0.4, 0.3), (1.0, 1e-6), (4.0, 0.9), (100.0, 0.01)])
def test_the_rough_moment_steers(sigma, q, replace_one):
    orders = np.array([1.01, 1.5, 4.0, 30.0, 900.0])
    ours = [log_moment(sigma, q, float(order), replace_one) for order in orders]
    assert rough_log_moments(sigma, q, orders, replace_one) == pytest.approx(ours, rel=0.02)


def test_agrees_with_autodp_at_integer_orders():
    event = SampledGaussian(0.8, 0.05)
    curve = _autodp_curve(((event, 7), (SampledGaussian(9.0, 1.0), 3)))
    for order in (2, 3, 10, 40):
        ours = 7 * log_moment(0.8, 0.05, float(order), False) + 3 * log_moment(9.0, 1.0, float(order), False)
        assert (order - 1) * curve(order) == pytest.approx(ours, rel=1e-8)


@pytest.mark.parametrize(("events", "delta", "true"), REFERENCE[1:4] + REFERENCE[5:])
def test_not_looser_than_dp_accounting(events, delta, true, pairs):
    ours, theirs = get_accountant("rdp").epsilon(pairs(events), delta), dp_accounting_rdp(events, delta)
    assert true <= ours <= theirs * (1 + 1e-3)


def test_fractional_orders_matter(pairs):
    assert get_accountant("rdp").epsilon(pairs([(0.4, 1e-3, 100)]), 1e-5) < 6.56


def test_huge_orders_never_exhaust_memory():
    for order in (1e5, 1e7):
        for replace_one in (False, True):
            assert log_moment(1.0, 0.01, order, replace_one) > 0


def test_opacus_agrees_in_the_ordinary_range(pairs):
    opacus = pytest.importorskip("opacus.accountants.analysis.rdp")
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    for sigma, q, count in [(1.1, 0.01, 1000), (0.8, 0.05, 200), (5.0, 0.2, 500)]:
        rdp = opacus.compute_rdp(q=q, noise_multiplier=sigma, steps=count, orders=orders)
        theirs, _ = opacus.get_privacy_spent(orders=orders, rdp=rdp, delta=1e-5)
        assert get_accountant("rdp").epsilon(pairs([(sigma, q, count)]), 1e-5) == pytest.approx(theirs, rel=2e-3)
