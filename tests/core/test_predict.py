"""Predictions of time and memory: they follow the plan, the batch and the rate, and agree with the rule that chose the methods."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain import LayerInfo, ModelInfo, get_strategy
from dptrain.costs import ROOM, choose, gradient_size
from dptrain.info import CONV, EMBEDDING, GENERIC, LINEAR, NORM
from dptrain.predict import Prediction, kept, predict, work_of
from dptrain.setup import prepare
from tests.core.shared import EXAMPLES, blobs, config

LAYERS = (
    LayerInfo("embed", EMBEDDING, 64, 1000, 32, 32000, ("embed.weight",)),
    LayerInfo("conv", CONV, 256, 27, 16, 448, ("conv.weight", "conv.bias"), attrs={"kernel": 9, "channels": 3, "padded": 324}),
    LayerInfo("norm", NORM, 64, 32, 32, 64, ("norm.weight", "norm.bias")),
    LayerInfo("late", LINEAR, 64, 512, 512, 512 * 513, ("late.weight", "late.bias")),
    LayerInfo("head", LINEAR, 1, 512, 10, 5130, ("head.weight", "head.bias")),
)


def of(strategy: str, batch: int = 16, rate: float = 1e10, layers: tuple[LayerInfo, ...] = LAYERS, **settings: bool) -> Prediction:
    return predict(get_strategy(strategy).plan(ModelInfo(layers)), batch, rate, **settings)


def test_plain_training_is_its_own_yardstick() -> None:
    found = of("non_private")
    assert found.seconds == found.plain_seconds and found.bytes == found.plain_bytes


@pytest.mark.parametrize("strategy", ["mixed_ghost", "ghost", "per_sample"])
def test_privacy_costs_time_and_memory(strategy: str) -> None:
    found = of(strategy)
    assert found.ratio > 1 and found.memory_ratio > 1
    assert [layer.name for layer in found.layers] == [layer.name for layer in LAYERS]
    for layer in found.layers:
        assert all(value >= layer.plain_seconds > 0 for value in layer.seconds.values())


def test_the_mixture_is_predicted_to_be_fastest() -> None:
    """By construction of its rule, which compares the same figures, and lets memory decide where they are near each other."""
    assert of("mixed_ghost").seconds <= min(of("ghost").seconds, of("per_sample").seconds) * ROOM


dims = st.integers(1, 600)


@given(st.sampled_from([LINEAR, CONV, EMBEDDING, NORM, GENERIC]), dims, dims, dims)
@EXAMPLES
def test_the_method_that_the_rule_of_time_chooses_is_predicted_to_be_no_slower_or_to_keep_less(kind: str, t: int, d: int, p: int) -> None:
    attrs = {"kernel": 1, "channels": d, "padded": t} if kind == CONV else {}
    layer = LayerInfo("a", kind, t, d, p, d * p, ("a.weight",), attrs=attrs)
    cost = of("mixed_ghost", layers=(layer,)).layers[0]
    assert cost.method == choose(layer, "time")
    if kind != EMBEDDING:  # there the ghost norm is chosen for its memory
        smaller = cost.method == "ghost" and gradient_size(layer) > kept(layer, "ghost")
        assert cost.seconds[cost.method] <= min(cost.seconds.values()) * (ROOM if smaller else 1 + 1e-9)


@given(st.integers(1, 4096), st.floats(1e8, 1e13))
@EXAMPLES
def test_time_grows_with_the_batch_and_shrinks_with_the_rate(batch: int, rate: float) -> None:
    one, more, faster = of("mixed_ghost", batch, rate), of("mixed_ghost", 2 * batch, rate), of("mixed_ghost", batch, 2 * rate)
    assert one.seconds < more.seconds <= 2 * one.seconds
    assert faster.seconds == pytest.approx(one.seconds / 2)
    assert one.bytes < more.bytes <= 2 * one.bytes and faster.bytes == one.bytes
    assert more.ratio <= one.ratio * (1 + 1e-9)  # noise and update are paid once


def test_two_passes_take_longer_and_keep_no_per_sample_gradient() -> None:
    assert of("per_sample", two_pass=True).seconds > of("per_sample").seconds
    assert of("per_sample", two_pass=True).bytes < of("per_sample").bytes


def test_a_lean_sum_takes_longer_and_keeps_no_per_sample_gradient() -> None:
    assert of("per_sample").seconds < of("per_sample", lean=True).seconds < of("per_sample", lean=True, two_pass=True).seconds
    assert of("per_sample", lean=True).bytes < of("per_sample").bytes
    assert (of("ghost", lean=True).seconds, of("ghost", lean=True).bytes) == (of("ghost").seconds, of("ghost").bytes)


def test_double_precision_takes_twice_the_memory() -> None:
    plan = get_strategy("mixed_ghost").plan(ModelInfo(LAYERS))
    assert predict(plan, 8, 1e10, float_bytes=8).bytes == 2 * predict(plan, 8, 1e10).bytes


def test_the_table_shows_every_layer_and_marks_what_was_chosen() -> None:
    text = str(of("mixed_ghost"))
    assert all(layer.name in text for layer in LAYERS)
    assert text.count("*") == 2 * len(LAYERS)
    assert "ghost ms" in text and "instantiate MiB" in text
    assert "ghost" not in str(of("non_private"))


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_the_rate_is_measured_by_the_framework(backend: str) -> None:
    from dptrain.predict import predicted

    setup = prepare(config(strategy="mixed_ghost", performance={"physical_batch_size": 32}), backend, blobs())
    assert 1e7 < setup.backend.product_rate() < 1e16
    assert predicted(setup).batch == 32 and predicted(setup, 64).batch == 64
    assert predicted(setup).ratio > 1


def test_the_work_of_a_product() -> None:
    assert work_of((2, 3, 5)) == 2 * 3 * 3 * 5
