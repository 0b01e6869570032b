"""What every accountant promises; adding one to the registry runs all of this on it."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracles import REFERENCE, one_step_delta, two_step_delta

from accounting import ACCOUNTANTS, AccountingError, NeighboringRelation, SampledGaussian, get_accountant

RELATIONS = [relation.value for relation in NeighboringRelation]


def gaussian(sigma, q, count=1):
    return [(SampledGaussian(sigma, q), count)]


@pytest.mark.parametrize("name", ACCOUNTANTS)
class TestConformance:
    @pytest.mark.parametrize("relation", RELATIONS)
    def test_nothing_released_costs_nothing(self, name, relation):
        accountant = get_accountant(name, relation)
        assert accountant.name == name and accountant.relation == relation
        for events in ([], gaussian(1.0, 0.1, 0)):
            assert accountant.epsilon(events, 1e-5) == 0.0
            assert accountant.delta(events, 1.0) == 0.0

    @pytest.mark.parametrize(("events", "delta", "true"), REFERENCE)
    def test_never_below_the_reference(self, name, events, delta, true, pairs):
        assert get_accountant(name).epsilon(pairs(events), delta) >= true

    @pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
    @pytest.mark.parametrize(("sigma", "q"), [(0.5, 0.01), (1.0, 0.1), (0.8, 0.7), (3.0, 0.3), (1.0, 1.0)])
    def test_delta_above_quadrature(self, name, relation, sigma, q):
        accountant = get_accountant(name, relation)
        for epsilon in (0.01, 0.3, 1.5):
            assert accountant.delta(gaussian(sigma, q), epsilon) >= one_step_delta(sigma, q, relation, epsilon) - 1e-13

    @pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
    def test_two_steps_above_quadrature(self, name, relation):
        # The midpoint rule itself is good to about 1e-6 here.
        true = two_step_delta(0.9, 0.2, relation, 0.5)
        assert get_accountant(name, relation).delta(gaussian(0.9, 0.2, 2), 0.5) >= true * (1 - 1e-5)

    def test_zero_out_is_add_remove(self, name):
        events = gaussian(0.9, 0.05, 40)
        assert get_accountant(name, "zero_out").epsilon(events, 1e-6) == get_accountant(name).epsilon(events, 1e-6)

    def test_full_batch_relations_agree(self, name):
        events = gaussian(5.0, 1.0, 7)
        assert get_accountant(name, "replace_one").epsilon(events, 1e-6) == get_accountant(name).epsilon(events, 1e-6)

    @pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
    def test_order_and_splitting_do_not_matter(self, name, relation):
        a, b = SampledGaussian(0.9, 0.02), SampledGaussian(1.7, 0.05)
        accountant = get_accountant(name, relation)
        whole = accountant.epsilon([(a, 10), (b, 20)], 1e-5)
        assert accountant.epsilon([(b, 5), (a, 4), (b, 15), (a, 6)], 1e-5) == whole

    @settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(
        sigma=st.floats(0.4, 20),
        log_q=st.floats(-9, 0),
        steps=st.integers(1, 3000),
        log_delta=st.floats(-20, -3),
    )
    def test_monotone_and_consistent(self, name, sigma, log_q, steps, log_delta):
        accountant, q, delta = get_accountant(name), math.exp(log_q), math.exp(log_delta)
        epsilon = accountant.epsilon(gaussian(sigma, q, steps), delta)
        assert math.isfinite(epsilon) and epsilon >= 0
        # Each comparison moves epsilon by much more than the 0.1 % by which grids may differ.
        assert accountant.epsilon(gaussian(sigma, q, 2 * steps), delta) >= epsilon * (1 - 1e-3)
        assert accountant.epsilon(gaussian(sigma * 1.5, q, steps), delta) <= epsilon * (1 + 1e-3)
        assert accountant.epsilon(gaussian(sigma, q / 2, steps), delta) <= epsilon * (1 + 1e-3)
        assert accountant.epsilon(gaussian(sigma, q, steps), delta / 10) >= epsilon * (1 - 1e-3)
        if epsilon > 1e-3:
            assert accountant.delta(gaussian(sigma, q, steps), epsilon * 1.002) <= delta * (1 + 1e-3)

    @pytest.mark.parametrize("sigma", [0.3, 1.0, 100.0])
    @pytest.mark.parametrize("q", [1e-6, 0.01, 0.999999, 1.0])
    @pytest.mark.parametrize("steps", [1, 1_000_000])
    def test_extremes_are_finite(self, name, sigma, q, steps):
        epsilon = get_accountant(name).epsilon(gaussian(sigma, q, steps), 1e-6)
        assert 0 <= epsilon < math.inf

    def test_tiny_noise_is_a_huge_epsilon(self, name):
        assert 1e4 < get_accountant(name).epsilon(gaussian(1e-3, 0.5, 10), 1e-6) < 1e8


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_prv_is_not_above_rdp(relation):
    rdp, prv = get_accountant("rdp", relation), get_accountant("prv", relation)
    for sigma in (0.4, 1.0, 10.0):
        for q in (1e-4, 1e-2, 0.3, 1.0):
            for steps in (1, 3000):
                events = gaussian(sigma, q, steps)
                assert prv.epsilon(events, 1e-5) <= rdp.epsilon(events, 1e-5)


def test_registry():
    assert list(ACCOUNTANTS) == ["rdp", "prv"]
    for name in ("gdp", "PRV", "", None, 3, ["prv"]):
        with pytest.raises(AccountingError, match="rdp, prv"):
            get_accountant(name)
    for relation in ("swap", None, 1):
        with pytest.raises(AccountingError, match="relation"):
            get_accountant("rdp", relation)


def test_an_epsilon_is_computed_once():
    events = [(SampledGaussian(1.3, 0.01), 321)]
    first = get_accountant("prv").detail(events, 1e-5)
    assert get_accountant("prv").detail([(SampledGaussian(1.3, 0.01), 300), (SampledGaussian(1.3, 0.01), 21)], 1e-5) is first
    others = [get_accountant("prv").detail(events, 2e-5), get_accountant("prv", "replace_one").detail(events, 1e-5)]
    others.append(get_accountant("prv").detail([(SampledGaussian(1.3, 0.01), 322)], 1e-5))
    assert len({first.epsilon, *(other.epsilon for other in others)}) == 4


def test_import_is_light():
    code = (
        "import sys, accounting;"
        "heavy = {'scipy', 'numpy', 'torch', 'tensorflow', 'keras', 'opacus', 'autodp', 'dp_accounting', 'dptrain'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_framework_after_use_and_sys_path_untouched():
    code = (
        "import sys; before = list(sys.path);"
        "from accounting import *;"
        "e = [(SampledGaussian(1.0, .1), 3), (SampledGaussian(3.0, 1.0), 1)];"
        "[get_accountant(n).epsilon(e, 1e-5) for n in ACCOUNTANTS];"
        "print(sorted({'torch', 'tensorflow', 'keras', 'opacus', 'dptrain'} & set(sys.modules)), before == sys.path)"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] True"
