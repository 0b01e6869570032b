"""One noise multiplier describes the joint release of all groups: equation (1) of math.md holds however the noise is shared."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting import NeighboringRelation
from dptrain import ConfigError, GaussianMechanism, Group, LayerInfo, Plan
from dptrain.mechanism import (
    FLOAT_MARGIN,
    effective_noise_multiplier,
    event_noise_multiplier,
    noise_multiplier_for,
    release_event,
    sensitivity,
)
from tests.core.shared import EXAMPLES

ALLOCATIONS = ("global", "per_group", "min_noise")


def plan_of(*groups: tuple[float, int]) -> Plan:
    """A plan with one layer per (bound, parameters)."""
    layers = tuple(LayerInfo(f"l{i}", "linear", 1, 1, 1, d) for i, (_, d) in enumerate(groups))
    made = tuple(Group(f"g{i}", (f"l{i}",), bound, bound, d) for i, (bound, d) in enumerate(groups))
    return Plan("test", made, {layer.name: "ghost" for layer in layers}, layers=layers)


PLANS = st.lists(st.tuples(st.floats(1e-6, 1e6), st.integers(1, 10**8)), min_size=1, max_size=8).map(lambda groups: plan_of(*groups))
SIGMAS = st.floats(1e-3, 1e4)
RELATIONS = st.sampled_from(list(NeighboringRelation))
THREE = plan_of((1.0, 10), (0.5, 1000), (3.0, 7))


def whitened_sensitivity(plan: Plan, stds: dict[str, float], factor: float) -> float:
    """sqrt(sum_k (Delta_k / s_k)^2), written out independently of the code under test."""
    return math.sqrt(sum((factor * group.norm_bound / stds[group.name]) ** 2 for group in plan.groups))


@EXAMPLES
@given(PLANS, SIGMAS, st.sampled_from(ALLOCATIONS), RELATIONS)
def test_equation_1_holds_for_every_allocation(plan, sigma, allocation, relation):
    stds = GaussianMechanism(sigma, allocation).stds(plan, relation)
    factor = 2.0 if relation.value == "replace_one" else 1.0
    assert set(stds) == {group.name for group in plan.groups}
    assert all(s > 0 and math.isfinite(s) for s in stds.values())
    assert math.isclose(whitened_sensitivity(plan, stds, factor), 1 / sigma, rel_tol=1e-12)
    assert math.isclose(effective_noise_multiplier(plan, stds, relation), sigma, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("allocation", "expected"),
    [
        ("global", dict.fromkeys(("g0", "g1", "g2"), 2 * math.sqrt(1 + 0.25 + 9))),
        ("per_group", {"g0": 2 * math.sqrt(3) * 1.0, "g1": 2 * math.sqrt(3) * 0.5, "g2": 2 * math.sqrt(3) * 3.0}),
        (
            "min_noise",
            {
                name: 2 * math.sqrt(bound / math.sqrt(d) * (math.sqrt(10) + 0.5 * math.sqrt(1000) + 3 * math.sqrt(7)))
                for name, bound, d in (("g0", 1.0, 10), ("g1", 0.5, 1000), ("g2", 3.0, 7))
            },
        ),
    ],
)
def test_allocations_are_the_published_formulas(allocation, expected):
    assert GaussianMechanism(2.0, allocation).stds(THREE) == pytest.approx(expected, rel=1e-14)


def test_one_group_gets_the_classical_noise():
    for allocation in ALLOCATIONS:
        assert GaussianMechanism(1.5, allocation).stds(plan_of((0.3, 99))) == {"g0": pytest.approx(0.45)}


@EXAMPLES
@given(PLANS, SIGMAS, st.integers(0, 2**32 - 1))
def test_min_noise_has_the_least_total_energy(plan, sigma, seed):
    """Against random standard deviations that satisfy equation (1) too."""
    best = GaussianMechanism(sigma, "min_noise").stds(plan)

    def energy(stds):
        return math.fsum(group.num_params * stds[group.name] ** 2 for group in plan.groups)

    rng = np.random.default_rng(seed)
    for _ in range(20):
        raw = {name: value * math.exp(rng.normal(0, rng.choice([0.01, 1.0]))) for name, value in best.items()}
        scale = whitened_sensitivity(plan, raw, 1.0) * sigma  # divides the excess out, so that the joint release has sigma again
        rival = {name: value * scale for name, value in raw.items()}
        assert math.isclose(whitened_sensitivity(plan, rival, 1.0), 1 / sigma, rel_tol=1e-9)
        assert energy(best) <= energy(rival) * (1 + 1e-9)
    for other in ("global", "per_group"):
        assert energy(best) <= energy(GaussianMechanism(sigma, other).stds(plan)) * (1 + 1e-9)


def test_min_noise_really_saves_where_groups_differ():
    stds = {a: GaussianMechanism(1.0, a).stds(THREE) for a in ALLOCATIONS}
    energy = {a: sum(g.num_params * s[g.name] ** 2 for g in THREE.groups) for a, s in stds.items()}
    assert energy["min_noise"] < 0.8 * min(energy["global"], energy["per_group"])


# ---- neighbouring relations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_replacing_an_example_doubles_the_noise(allocation):
    mechanism = GaussianMechanism(1.3, allocation)
    base = mechanism.stds(THREE, "add_remove")
    assert mechanism.stds(THREE, "zero_out") == base
    assert mechanism.stds(THREE, "replace_one") == pytest.approx({name: 2 * value for name, value in base.items()}, rel=1e-15)
    assert mechanism.stds(THREE) == base


def test_sensitivity_is_the_only_place_of_the_factor():
    group = Group("a", ("a",), 0.7, 0.7, 1)
    assert [sensitivity(group, r) for r in ("add_remove", "zero_out", "replace_one")] == [0.7, 0.7, 1.4]
    with pytest.raises(ValueError, match="substitute"):
        sensitivity(group, "substitute")


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0, 0.0, -0.0, -1.0, float("nan"), float("inf"), -float("inf"), True, False, None, "1", 1j, [1.0]])
def test_a_noise_multiplier_must_be_a_positive_number(sigma):
    with pytest.raises(ConfigError, match="noise_multiplier must be a finite number above 0"):
        GaussianMechanism(sigma)


def test_an_unknown_allocation_is_refused():
    with pytest.raises(ConfigError, match="There is no noise allocation 'local'; choose global, per_group or min_noise"):
        GaussianMechanism(1.0, "local")


@pytest.mark.parametrize("bound", [math.inf, math.nan, 0.0, -1.0])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_no_noise_is_derived_from_a_bound_that_is_none(allocation, bound):
    with pytest.raises(ConfigError, match=r"The groups \['g1'\] of strategy 'test' have no finite bound"):
        GaussianMechanism(1.0, allocation).stds(plan_of((1.0, 5), (bound, 5)))


# ---- the event -----------------------------------------------------------------------------------------------------


@EXAMPLES
@given(PLANS, SIGMAS, st.sampled_from(ALLOCATIONS), RELATIONS)
def test_the_event_claims_less_noise_than_there_is(plan, sigma, allocation, relation):
    """By the margin that pays for rounding, and hardly more."""
    event = release_event(plan, GaussianMechanism(sigma, allocation).stds(plan, relation), 0.25, relation)
    assert event.sample_rate == 0.25
    assert sigma / (1 + FLOAT_MARGIN) * (1 - 1e-10) <= event.noise_multiplier <= sigma / (1 + FLOAT_MARGIN)


@pytest.mark.parametrize(
    "sigma", [0.3, 0.5, 0.7, 1.0, 1.1, 1.2345678, 2.0, 3.3, 10.0, 50.0, noise_multiplier_for(1.0), noise_multiplier_for(0.8765)]
)
def test_equal_settings_make_equal_events_however_the_noise_is_shared(sigma):
    events = {
        release_event(plan, GaussianMechanism(sigma, allocation).stds(plan, relation), 0.1, relation)
        for plan in (THREE, plan_of((0.1, 3)), plan_of(*[(1 / math.sqrt(7), 10 + i) for i in range(7)]))
        for allocation in ALLOCATIONS
        for relation in NeighboringRelation
    }
    assert len(events) == 1


def test_too_little_noise_in_one_group_shows_in_the_event():
    stds = GaussianMechanism(1.0).stds(THREE)
    weak = {**stds, "g2": stds["g2"] / 10}
    assert release_event(THREE, weak, 0.1).noise_multiplier < 0.2


@EXAMPLES
@given(st.floats(1e-4, 1e6))
def test_noise_for_a_claim_supports_the_claim(claimed):
    needed = noise_multiplier_for(claimed)
    assert event_noise_multiplier(needed) >= claimed
    assert needed <= claimed * (1 + FLOAT_MARGIN) * (1 + 1e-10)
    assert event_noise_multiplier(claimed) < claimed
