"""The clipping norm that follows a released count: sensitivity, direction, limits (math.md section 4, pitfalls.md L14)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dptrain import ConfigError, GaussianMechanism, Group, Plan, get_strategy
from dptrain.adaptive import COUNT, LIMIT, AdaptiveClip
from dptrain.info import LINEAR, LayerInfo, ModelInfo
from dptrain.mechanism import effective_noise_multiplier, release_event

INFO = ModelInfo(tuple(LayerInfo(name, LINEAR, 1, 4, 3, 12, (f"{name}.weight",)) for name in ("a", "b")))
CLIP = AdaptiveClip(initial=0.5, quantile=0.7, share=0.1)


@pytest.mark.parametrize("name", ["mixed_ghost", "ghost", "per_sample"])
@pytest.mark.parametrize("grouping", ["flat", "per_layer"])
@pytest.mark.parametrize("allocation", ["global", "per_group", "min_noise"])
@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_the_count_is_one_more_group_and_sigma_is_what_it_was(name: str, grouping: str, allocation: str, relation: str) -> None:
    plan = get_strategy(name, max_grad_norm=CLIP, grouping=grouping).plan(INFO)
    assert plan.count == Group(COUNT, (), 0.5, None, 1, 0.1)
    assert math.isclose(math.hypot(*(g.norm_bound for g in plan.gradient_groups)), 0.5)
    for scale in (1.0, 0.01, 30.0):
        now = plan.scaled(scale)
        stds = GaussianMechanism(1.5, allocation).stds(now, relation)
        assert effective_noise_multiplier(now, stds, relation) == pytest.approx(1.5, rel=1e-12)
        assert stds[COUNT] == pytest.approx(1.5 * (0.5 if relation == "add_remove" else 1.0) / math.sqrt(0.1))
        assert release_event(now, stds, 0.1, relation).noise_multiplier == pytest.approx(1.5, rel=2e-4)
        fixed = GaussianMechanism(1.5, allocation).stds(
            get_strategy(name, max_grad_norm=0.5 * scale, grouping=grouping).plan(INFO), relation
        )
        for group in now.gradient_groups:
            assert stds[group.name] == pytest.approx(fixed[group.name] / math.sqrt(0.9))


def test_it_moves_towards_the_quantile() -> None:
    """All below: the norm shrinks; all above: it grows; at the quantile it stays."""
    assert CLIP.moved(1.0, 50.0, 100.0) < 1.0 < CLIP.moved(1.0, -50.0, 100.0)
    assert CLIP.moved(1.0, 20.0, 100.0) == pytest.approx(1.0)
    norms, scale = np.random.default_rng(0).gamma(2.0, size=1000), 1.0
    for _ in range(200):
        scale = CLIP.moved(scale, float(np.where(norms <= scale * CLIP.initial, 0.5, -0.5).sum()), 1000.0)
    assert np.mean(norms <= scale * CLIP.initial) == pytest.approx(CLIP.quantile, abs=0.01)


def test_no_noise_drives_it_to_zero_or_infinity() -> None:
    low = high = 1.0
    for _ in range(1000):
        low, high = CLIP.moved(low, 1e9, 1.0), CLIP.moved(high, -1e9, 1.0)
    assert (low, high) == (1 / LIMIT, LIMIT)
    assert CLIP.moved(1.0, -1e9, 1.0, most=1.0) == 1.0


@pytest.mark.parametrize(
    "bad", [{"initial": 0.0}, {"initial": 1.0, "quantile": 1.0}, {"initial": 1.0, "share": 0.0}, {"initial": 1.0, "pace": 1}]
)
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="max_grad_norm"):
        get_strategy("mixed_ghost", max_grad_norm=bad)


def test_weights_leave_sigma_alone_and_must_match_and_be_positive() -> None:
    plan = get_strategy("ghost", max_grad_norm=1.0, grouping="per_layer").plan(INFO)
    stds = GaussianMechanism(2.0, "per_group", {"a": 4.0}).stds(plan)
    assert stds["a"] == pytest.approx(4 * stds["b"])
    assert effective_noise_multiplier(plan, stds) == pytest.approx(2.0)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="finite and above 0"):
            GaussianMechanism(2.0, "per_group", {"a": bad})
    with pytest.raises(ConfigError, match="match no group"):
        GaussianMechanism(2.0, "per_group", {"c*": 1.0}).stds(plan)


def test_a_plan_with_a_count_still_covers_every_layer_once() -> None:
    with pytest.raises(ConfigError, match="exactly one group"):
        Plan("x", (CLIP.group(),), {"a": "none", "b": "none"}, layers=INFO.layers)
