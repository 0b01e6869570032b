"""A plan is a partition of the layers with bounds that add up to C; how norms are taken never changes what is promised."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain import STRATEGIES, ConfigError, Group, LayerInfo, ModelInfo, Plan, get_strategy
from dptrain.costs import ROOM, choose, ghost_cost, gradient_size, has_ghost_norm, instantiate_cost, numbers_in
from dptrain.info import CONV, EMBEDDING, GENERIC, KINDS, LINEAR, NORM
from dptrain.strategies import SensitivityStrategy
from dptrain.strategies.clipping import tied_layers
from tests.core.shared import EXAMPLES

CLIPPING = ("per_sample", "ghost", "mixed_ghost")
DECISIONS = ("space", "time", "measured")


def linear(name: str, t: int = 1, d: int = 8, p: int = 4, **fields) -> LayerInfo:
    return LayerInfo(name, LINEAR, t, d, p, d * p + p, **{"params": (f"{name}.weight", f"{name}.bias"), **fields})


def conv(name: str, side: int, kernel: int, channels: int, filters: int, groups: int = 1) -> LayerInfo:
    attrs = {"groups": groups, "kernel": kernel**2, "channels": channels // groups, "padded": (side + kernel - 1) ** 2}
    d = kernel**2 * channels // groups
    return LayerInfo(name, CONV, side**2, d, filters, d * filters + filters, (f"{name}.weight", f"{name}.bias"), attrs=attrs)


MODEL = ModelInfo(
    (
        LayerInfo("embed", EMBEDDING, 16, 1000, 32, 32000, ("embed.weight",)),
        linear("attn.query", 16, 32, 32),
        LayerInfo("norm", NORM, 16, 32, 32, 64, ("norm.weight", "norm.bias")),
        linear("head", 1, 32, 10),
    )
)
TIED = ModelInfo(
    (
        LayerInfo("embed", EMBEDDING, 16, 1000, 32, 32000, ("embed.weight",)),
        linear("middle", 16, 32, 32),
        LayerInfo("output", LINEAR, 16, 32, 1000, 0, ("embed.weight",)),
    )
)


def joint(plan: Plan) -> float:
    return math.sqrt(math.fsum(group.norm_bound**2 for group in plan.groups))


# ---- strategies by name --------------------------------------------------------------------------------------------


def test_the_strategies_of_this_version():
    assert sorted(STRATEGIES) == ["clipless", "ghost", "mixed_ghost", "non_private", "per_sample"]


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"clipless"}))  # which needs a graph: test_clipless.py
def test_a_strategy_has_its_name_and_keeps_it_in_the_plan(name):
    strategy = get_strategy(name)
    assert strategy.name == name
    assert isinstance(strategy, SensitivityStrategy)
    assert strategy.plan(MODEL).strategy == name
    assert get_strategy(strategy) is strategy


def test_a_wrong_name_or_field_is_refused():
    with pytest.raises(
        ConfigError, match=r"There is no strategy 'gost'; choose one of clipless, ghost, mixed_ghost, non_private, per_sample\."
    ):
        get_strategy("gost")
    with pytest.raises(ConfigError, match="strategy 'ghost': max_grad_norm: Input should be greater than 0"):
        get_strategy("ghost", max_grad_norm=0)
    with pytest.raises(ConfigError, match="strategy 'non_private': clipping is not a known key"):
        get_strategy("non_private", clipping="abadi")


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        get_strategy("ghost").plan(ModelInfo(()))


# ---- methods -------------------------------------------------------------------------------------------------------


def test_fixed_strategies_take_every_norm_one_way():
    assert get_strategy("per_sample").plan(MODEL).norms == dict.fromkeys(("embed", "attn.query", "norm", "head"), "instantiate")
    ghost = get_strategy("ghost").plan(MODEL).norms
    assert ghost == {"embed": "ghost", "attn.query": "ghost", "norm": "instantiate", "head": "ghost"}
    none = get_strategy("non_private").plan(MODEL)
    assert set(none.norms.values()) == {"none"}
    assert not none.needs_norms


@pytest.mark.parametrize(
    ("t", "d", "p", "method"),
    [
        (1, 1, 2, "ghost"),  # 2 <= 2, on the boundary
        (1, 1, 1, "instantiate"),
        (10, 20, 10, "ghost"),  # 200 <= 200
        (10, 199, 1, "instantiate"),
        (10, 201, 1, "ghost"),
        (1024, 2048, 1024, "ghost"),  # 2^21 <= 2^21
        (1024, 2047, 1024, "instantiate"),
        (50176, 27, 64, "instantiate"),  # first layer of VGG on 224x224: the paper's example
        (196, 4608, 512, "ghost"),  # a late layer of it
        (1, 25088, 4096, "ghost"),
    ],
)
def test_the_space_rule_is_the_published_one(t, d, p, method):
    """2 T^2 <= p D (Bu, Mao, Xu 2022), equality included."""
    assert (2 * t * t <= p * d) == (method == "ghost")
    plan = get_strategy("mixed_ghost").plan(ModelInfo((linear("a", t, d, p),)), decision="space")
    assert plan.norms == {"a": method}


def test_the_space_rule_counts_a_grams_per_channel_group():
    ordinary, grouped = conv("a", 4, 3, 16, 16), conv("b", 4, 3, 16, 16, groups=16)
    assert choose(ordinary, "space") == "ghost"  # 2 * 256 <= 2304
    assert choose(grouped, "space") == "instantiate"  # 2 * 16 * 256 > 144


@pytest.mark.parametrize(
    ("layer", "method"),
    [
        (linear("a", 1, 784, 256), "ghost"),  # a plain vector: the norm is a product of two norms
        (linear("a", 1, 1, 1), "ghost"),
        (linear("a", 4, 512, 512), "ghost"),
        (linear("a", 4096, 16, 16), "instantiate"),
        (conv("a", 28, 3, 1, 16), "instantiate"),
        (conv("a", 4, 3, 512, 512), "ghost"),
        (LayerInfo("a", NORM, 16, 32, 32, 64), "instantiate"),
        (LayerInfo("a", GENERIC, 1, 1000, 1000, 10**6), "instantiate"),
        (LayerInfo("a", EMBEDDING, 10**6, 2, 2, 4), "ghost"),
    ],
)
def test_the_time_rule_on_clear_cases(layer, method):
    assert choose(layer, "time") == method


def test_the_time_rule_compares_its_two_costs():
    for t, d, p in itertools.product((1, 2, 7, 32, 200), (1, 9, 64, 500), (1, 10, 300)):
        layer = linear("a", t, d, p)
        larger = gradient_size(layer) > numbers_in(layer) + layer.positions * layer.fan_out
        room = ROOM if larger else 1.0  # where both are about as fast, memory decides
        assert choose(layer, "time") == ("ghost" if ghost_cost(layer) <= room * instantiate_cost(layer) else "instantiate")


def test_the_measured_rule_believes_the_clock_and_falls_back_to_time():
    slow = linear("a", 4096, 16, 16)
    assert choose(slow, "measured", {"a": {"ghost": 1.0, "instantiate": 2.0}}) == "ghost"
    assert choose(slow, "measured", {"a": {"ghost": 2.0, "instantiate": 1.0}}) == "instantiate"
    assert choose(slow, "measured", {"a": {"ghost": 1.0, "instantiate": 1.0}}) == "ghost"
    for timings in (None, {}, {"b": {"ghost": 0.0, "instantiate": 1.0}}, {"a": {"ghost": 0.0}}):
        assert choose(slow, "measured", timings) == choose(slow, "time") == "instantiate"
    assert choose(LayerInfo("n", NORM, 1, 1, 1, 1), "measured", {"n": {"ghost": 0.0, "instantiate": 1.0}}) == "instantiate"


def test_costs_grow_with_the_layer():
    for cost in (ghost_cost, instantiate_cost):
        assert cost(linear("a", 8, 8, 8)) < min(cost(linear("a", 16, 8, 8)), cost(linear("a", 8, 16, 8)), cost(linear("a", 8, 8, 16)))
    assert gradient_size(linear("a", 5, 6, 7)) == 42
    assert [has_ghost_norm(LayerInfo("a", kind, 1, 1, 1, 1)) for kind in KINDS] == [True, True, True, False, False, False]


# ---- groups and bounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize(
    ("grouping", "expected"),
    [
        ("flat", {"all": ("embed", "attn.query", "norm", "head")}),
        ("per_layer", {n: (n,) for n in ("embed", "attn.query", "norm", "head")}),
        ({"attention": ["attn.*"], "rest": ["*"]}, {"rest": ("embed", "norm", "head"), "attention": ("attn.query",)}),
        ({"one": ["*e*"], "two": ["n*", "head"]}, {"one": ("embed", "attn.query", "head"), "two": ("norm",)}),
    ],
)
def test_groups_partition_the_layers_and_share_the_bound(name, grouping, expected):
    plan = get_strategy(name, grouping=grouping, max_grad_norm=0.7).plan(MODEL)
    assert {group.name: group.layers for group in plan.groups} == expected
    assert joint(plan) == pytest.approx(0.7, rel=1e-14)
    assert {group.norm_bound for group in plan.groups} == {group.clip_norm for group in plan.groups} == {0.7 / math.sqrt(len(expected))}
    assert sum(group.num_params for group in plan.groups) == MODEL.num_params
    assert plan.private
    assert plan.group_of("norm").layers.count("norm") == 1


@pytest.mark.parametrize(
    ("grouping", "sentence"),
    [
        ({"a": ["attn.*"]}, "Layer 'embed' matches no pattern of strategy.grouping"),
        ({"a": ["*"], "b": ["head"]}, r"The groups \['b'\] of strategy.grouping match no layer"),
        ({}, "Layer 'embed' matches no pattern"),
    ],
)
def test_a_grouping_that_is_no_partition_is_refused(grouping, sentence):
    with pytest.raises(ConfigError, match=sentence):
        get_strategy("ghost", grouping=grouping).plan(MODEL)


def test_patterns_that_part_tied_layers_are_refused():
    with pytest.raises(ConfigError, match="The layers embed, output share a parameter"):
        get_strategy("ghost", grouping={"a": ["embed"], "b": ["*"]}).plan(TIED)


@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize("decision", DECISIONS)
def test_tied_layers_are_one_group_with_one_method(name, decision):
    plan = get_strategy(name, grouping="per_layer").plan(TIED, decision=decision)
    assert {group.name: group.layers for group in plan.groups} == {"embed": ("embed", "output"), "middle": ("middle",)}
    assert plan.norms["embed"] == plan.norms["output"]
    assert [group.num_params for group in plan.groups] == [32000, TIED.layers[1].num_params]


def test_ties_join_through_a_third_layer():
    a, b, c, d = (linear(n, params=p) for n, p in (("a", ("x",)), ("b", ("y",)), ("c", ("y", "x")), ("d", ("z",))))
    assert tied_layers((a, b, c, d)) == [("a", "b", "c")]
    assert tied_layers((a, b, d)) == []
    instantiated = LayerInfo("n", NORM, 1, 1, 1, 1, ("x",))
    plan = get_strategy("ghost").plan(ModelInfo((a, b, c, d, instantiated)))
    assert plan.norms == {"a": "instantiate", "b": "instantiate", "c": "instantiate", "d": "ghost", "n": "instantiate"}


def test_the_plan_without_privacy_promises_nothing():
    plan = get_strategy("non_private").plan(MODEL)
    assert [group.norm_bound for group in plan.groups] == [math.inf]
    assert plan.groups[0].clip_norm is None
    assert not plan.private
    assert plan.groups[0].num_params == MODEL.num_params


NAMES = st.lists(st.text("abc.", min_size=1, max_size=4), min_size=1, max_size=7, unique=True)
SIZES = st.integers(1, 2000)


@st.composite
def models(draw) -> ModelInfo:
    """Random facts; parameters are shared at random."""
    layers = []
    for name in draw(NAMES):
        kind = draw(st.sampled_from(KINDS))
        params = tuple(draw(st.lists(st.sampled_from(["shared1", "shared2", f"{name}.weight", f"{name}.bias"]), min_size=1, unique=True)))
        attrs = draw(st.fixed_dictionaries({"groups": st.sampled_from([1, 2, 8]), "kernel": st.integers(1, 49), "padded": SIZES}))
        t, d, p = draw(SIZES), draw(SIZES), draw(SIZES)
        layers.append(LayerInfo(name, kind, t, d, p, d * p, params, attrs=attrs if kind == CONV else {}))
    return ModelInfo(tuple(layers))


@EXAMPLES
@given(models(), st.sampled_from(CLIPPING), st.sampled_from(["flat", "per_layer"]), st.floats(1e-6, 1e6), st.data())
def test_any_model_gets_a_partition_with_the_joint_bound(info, name, grouping, clip_norm, data):
    timings = {
        layer.name: {"ghost": data.draw(st.floats(0, 1)), "instantiate": data.draw(st.floats(0, 1))}
        for layer in info.layers
        if data.draw(st.booleans())
    }
    strategy = get_strategy(name, grouping=grouping, max_grad_norm=clip_norm)
    plans = [strategy.plan(info, decision=decision, timings=timings) for decision in DECISIONS]
    for plan in plans:
        assert sorted(layer for group in plan.groups for layer in group.layers) == sorted(layer.name for layer in info.layers)
        assert len({group.name for group in plan.groups}) == len(plan.groups)
        assert math.isclose(joint(plan), clip_norm, rel_tol=1e-12)
        assert sum(group.num_params for group in plan.groups) == info.num_params
        assert plan.groups == plans[0].groups  # a decision about speed changes neither groups nor bounds
        owner = {param: plan.group_of(layer.name).name for layer in info.layers for param in layer.params}
        method = {param: plan.norms[layer.name] for layer in info.layers for param in layer.params}
        for layer in info.layers:
            assert {owner[param] for param in layer.params} == {plan.group_of(layer.name).name}
            assert {method[param] for param in layer.params} == {plan.norms[layer.name]}
            assert has_ghost_norm(layer) or plan.norms[layer.name] == "instantiate"


# ---- the plan as an object -----------------------------------------------------------------------------------------

GOOD = {"strategy": "x", "groups": (Group("a", ("fc",), 1.0, 1.0, 36),), "norms": {"fc": "ghost"}, "layers": (linear("fc"),)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": ()},
        {"groups": (Group("a", ("fc", "fc"), 1.0, 1.0, 36),)},
        {"groups": (Group("a", ("fc",), 1.0, 1.0, 36), Group("b", ("fc",), 1.0, 1.0, 36))},
        {"groups": (Group("a", ("fc", "gone"), 1.0, 1.0, 36),)},
        {"groups": (Group("a", ("gone",), 1.0, 1.0, 36),)},
        {"norms": {}},
        {"norms": {"fc": "ghost", "gone": "ghost"}},
        {"layers": ()},
        {"layers": (linear("fc"), linear("uncovered"))},
    ],
)
def test_a_plan_that_misses_or_repeats_a_layer_cannot_be_made(wrong):
    assert Plan(**GOOD).private
    with pytest.raises(ConfigError, match="every layer with trainable parameters into exactly one group"):
        Plan(**{**GOOD, **wrong})


def test_plans_of_equal_facts_are_equal():
    strategy = get_strategy("mixed_ghost", grouping="per_layer")
    assert strategy.plan(MODEL) == strategy.plan(ModelInfo(MODEL.layers, extra={"framework": "other"}))
    assert strategy.plan(MODEL) != get_strategy("mixed_ghost").plan(MODEL)
    assert strategy.plan(MODEL) != get_strategy("mixed_ghost", grouping="per_layer", max_grad_norm=2.0).plan(MODEL)
    assert strategy.plan(MODEL) != strategy.plan(TIED)


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"clipless"}))
def test_printing_a_plan_explains_every_layer(name):
    plan = get_strategy(name, **({} if name == "non_private" else {"grouping": "per_layer"})).plan(MODEL)
    lines = str(plan).splitlines()
    for layer in MODEL.layers:
        (line,) = [line for line in lines if layer.name in line.split()]
        words = line.replace("│", " ").split()
        group = plan.group_of(layer.name)
        for word in (
            layer.kind,
            plan.norms[layer.name],
            group.name,
            f"{group.norm_bound:.6g}",
            f"{layer.num_params:,}",
            f"{layer.fan_in:,}",
        ):
            assert word in words, (word, line)
    assert f"plan: {name}" in lines[0]
    assert f"{MODEL.num_params:,} trainable parameters" in str(plan)


def test_a_clipping_norm_can_be_set_for_a_test():
    plan = get_strategy("ghost", grouping="per_layer").plan(MODEL)
    open_ = plan.with_clip_norm(math.inf)
    assert not open_.private
    assert {group.clip_norm for group in open_.groups} == {math.inf}
    assert plan.with_clip_norm(1e-3).private
    assert open_.norms == plan.norms
    assert plan.layer("norm") is MODEL.layers[2]
