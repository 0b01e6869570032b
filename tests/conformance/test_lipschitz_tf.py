"""The Keras layers for ``clipless``: norms, ties, independence of examples, serialisation, graphs, ghost norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import dptrain_tf as d
from dptrain import layer_specs as L
from dptrain.bounds import forward
from dptrain.errors import ConfigError
from dptrain.projection import certify, project
from dptrain_tf import models
from dptrain_tf.graph import assign, graph, weights
from dptrain_tf.losses import get_loss
from dptrain_tf.rules import inherits, names_of_a_subclass, rule_for
from dptrain_torch import graph as torch_graph
from dptrain_torch import models as torch_models

KL = keras.layers
Layer = Callable[..., Any]
# name -> layer of a dtype, shapes of one example
LAYERS: dict[str, tuple[Layer, tuple[tuple[int, ...], ...]]] = {
    "bounded_input": (lambda **k: d.BoundedInput(1.5, **k), ((6,), (3, 4), (2, 3, 2), (2, 2, 2, 2))),
    "loss_gradient_clip": (lambda **k: d.LossGradientClip(100.0, **k), ((6,), (3, 4), (2, 3, 2), (2, 2, 2, 2))),
    "spectral_dense": (lambda **k: d.SpectralDense(5, **k), ((6,), (3, 4), (2, 3, 2), (2, 2, 2, 2))),
    "spectral_dense_scaled": (lambda **k: d.SpectralDense(5, lipschitz=2.5, orthogonal=False, **k), ((6,), (3, 4))),
    "frobenius_dense": (lambda **k: d.FrobeniusDense(5, norm=2.0, **k), ((6,), (3, 4), (2, 3, 2), (2, 2, 2, 2))),
    "frobenius_rows": (lambda **k: d.FrobeniusDense(3, disjoint_neurons=True, **k), ((6,), (3, 4))),
    "bounded_bias": (lambda **k: d.BoundedBias(**k), ((6,), (3, 4), (2, 3, 2), (2, 2, 2, 2))),
    "group_sort": (lambda **k: d.GroupSort(**k), ((6,), (3, 4), (2, 3, 2), (2, 2, 2, 2))),
    "group_sort_3": (lambda **k: d.GroupSort(3, **k), ((6,), (3, 3))),
    "group_sort_10": (lambda **k: d.GroupSort(10, **k), ((20,), (2, 10))),
    "full_sort": (lambda **k: d.FullSort(**k), ((6,), (3, 4), (2, 3, 2), (2, 2, 2, 2))),
    "householder": (lambda **k: d.Householder(**k), ((6,), (3, 4), (2, 3, 2), (2, 2, 2, 2))),
    "abs": (lambda **k: d.Abs(**k), ((6,), (3, 4), (2, 3, 2), (2, 2, 2, 2))),
    "centering": (lambda **k: d.LayerCentering(**k), ((6,), (3, 4), (2, 3, 2), (2, 2, 2, 2))),
    "centering_last": (lambda **k: d.LayerCentering(-1, **k), ((6,), (3, 4), (2, 3, 2))),
    "spectral_conv1d": (lambda **k: d.SpectralConv1D(4, 3, padding="same", **k), ((5, 2),)),
    "spectral_conv2d": (lambda **k: d.SpectralConv2D(4, 3, padding="same", **k), ((4, 5, 2),)),
    "spectral_conv2d_stride": (lambda **k: d.SpectralConv2D(4, 3, 2, "same", orthogonal=False, **k), ((5, 4, 2),)),
    "spectral_conv2d_valid": (lambda **k: d.SpectralConv2D(3, 2, dilation_rate=2, **k), ((5, 5, 2),)),
    "spectral_conv2d_1x1": (lambda **k: d.SpectralConv2D(3, 1, 2, **k), ((4, 5, 2),)),
    "l2_norm_pool": (lambda **k: d.ScaledL2NormPool2d(**k), ((4, 5, 2),)),
    "scaled_avg_pool": (lambda **k: d.ScaledAvgPool2d((2, 3), **k), ((4, 7, 2),)),
    "global_l2_norm_pool": (lambda **k: d.ScaledGlobalL2NormPool2d(**k), ((3, 4), (3, 2, 2), (2, 2, 2, 2))),
    "global_avg_pool": (lambda **k: d.ScaledGlobalAvgPool2d(**k), ((3, 4), (3, 2, 2), (2, 2, 2, 2))),
    "patches": (lambda **k: d.Patches(2, **k), ((4, 6, 2),)),
    "residual": (lambda **k: d.Residual([d.SpectralDense(4, **k), d.GroupSort(**k)], **k), ((4,), (3, 4))),
    "residual_convex": (lambda **k: d.Residual([d.SpectralDense(4, **k), d.GroupSort(**k)], "convex", **k), ((4,), (3, 4))),
    "mixer": (lambda **k: d.MixerBlock(4, **k), ((3, 5),)),
    "max_pool": (lambda **k: KL.MaxPooling2D(2, **k), ((4, 5, 2),)),
    "max_pool_overlap": (lambda **k: KL.MaxPooling2D(3, 2, **k), ((5, 5, 2),)),
    "avg_pool_overlap": (lambda **k: KL.AveragePooling2D(3, 2, **k), ((5, 5, 2),)),
    "global_average": (lambda **k: KL.GlobalAveragePooling2D(**k), ((3, 2, 2),)),
    "max_pool1d": (lambda **k: KL.MaxPooling1D(2, **k), ((5, 2),)),
    "relu": (lambda **k: KL.ReLU(**k), ((6,),)),
    "leaky_relu": (lambda **k: KL.LeakyReLU(0.3, **k), ((6,),)),
    **{
        name: (lambda name=name, **k: KL.Activation(name, **k), ((6,),))
        for name in ("relu", "tanh", "sigmoid", "softplus", "elu", "gelu", "silu")
    },
}
ROWS = [pytest.param(make, shape, id=f"{name}-{len(shape) + 1}") for name, (make, shapes) in LAYERS.items() for shape in shapes]
RNG = np.random.default_rng(0)


def model_of(*layers: Any, shape: tuple[int, ...], dtype: str = "float32", projected: bool = True) -> Any:
    """A Sequential model with random weights within their constraints."""
    model = keras.Sequential([keras.Input(shape, dtype=dtype), *layers])
    for variable in model.variables:
        variable.assign(RNG.standard_normal(variable.shape))
    if projected:
        found = graph(model, np.zeros((2, *shape), dtype))
        assign(model, project(found, weights(model, found), first=True).weights)
    return model


def inputs(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Examples on which Jacobians are checked; many entries are tied in all but one."""
    random = RNG.standard_normal(shape)
    return {
        "random": random,
        "zero": np.zeros(shape),
        "constant": np.full(shape, -0.7),
        "two values": np.sign(random),
        "large": 50 * random,
    }


def jacobian(model: Any, x: np.ndarray) -> np.ndarray:
    """``[outputs, inputs]`` of one example: a copy of it for every output, since examples do not touch each other."""
    outputs = model(x[None]).shape[1:]
    count = math.prod(outputs)
    _, rows = pulled_back(model, np.repeat(x[None], count, 0), np.eye(count).reshape(count, *outputs))
    return rows.reshape(count, -1)


def pulled_back(model: Any, x: Any, cotangent: Any, jit: bool | None = None) -> list[np.ndarray]:
    """Output, and the vector-Jacobian product with a cotangent; ``jit`` None runs eagerly."""

    def both(x: Any, cotangent: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            z = model(x)
        return z, tape.gradient(z, x, cotangent)

    run = both if jit is None else tf.function(both, autograph=False, jit_compile=jit)
    return [value.numpy() for value in run(tf.constant(x), tf.constant(cotangent))]


# --- layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "shape"), ROWS)
def test_no_jacobian_and_no_output_exceeds_its_bound(make: Layer, shape: tuple[int, ...]) -> None:
    model = model_of(make(dtype="float64"), shape=shape, dtype="float64")
    found = graph(model, np.zeros((2, *shape)))
    assert not found.problems
    certificates = certify(found, weights(model, found))
    for label, x in inputs(shape).items():
        bounds = forward(found, certificates, float(np.linalg.norm(x)))
        growth: dict[str, float] = {}
        for node in found.nodes:
            parts = [c * growth[name] for c, name in zip(bounds[node.name].lipschitz, node.inputs, strict=True)]
            growth[node.name] = math.fsum(parts) if node.inputs else 1.0
        assert np.linalg.norm(jacobian(model, x), 2) <= growth[found.output.name] * (1 + 1e-9), label
        assert np.linalg.norm(model(x[None])) <= bounds[found.output.name].output * (1 + 1e-9), label


@pytest.mark.parametrize(("make", "shape"), ROWS)
def test_an_example_does_not_touch_the_others(make: Layer, shape: tuple[int, ...]) -> None:
    model = model_of(make(dtype="float32"), shape=shape)
    x = RNG.standard_normal((3, *shape)).astype("float32")
    g = RNG.standard_normal((3, *model.output_shape[1:])).astype("float32")
    before = pulled_back(model, x, g)
    for poison in (np.nan, np.inf, -1e30, 5.0):
        x2 = x.copy()
        x2[1].flat[0] = poison
        for old, new in zip(before, pulled_back(model, x2, g), strict=True):
            assert np.isfinite(new[[0, 2]]).all()
            np.testing.assert_array_equal(new[[0, 2]], old[[0, 2]])


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_sorts_sort_and_their_jacobian_is_a_permutation(n: int) -> None:
    values = RNG.integers(-2, 3, (50, 2 * n)).astype("float64")  # ties everywhere
    assert np.array_equal(d.GroupSort(n, dtype="float64")(values), np.sort(values.reshape(50, 2, n)).reshape(50, -1))
    assert np.array_equal(d.FullSort(dtype="float64")(values), np.sort(values))
    for layer in (d.GroupSort(n, dtype="float64"), d.FullSort(dtype="float64")):
        for x in values[:8]:
            j = jacobian(layer, x)
            assert set(np.unique(j)) <= {0, 1} and (j.sum(0) == 1).all() and (j.sum(1) == 1).all()


def test_bounded_input() -> None:
    layer = d.BoundedInput(2.0)
    x = np.array([[0.3, 0.4], [3e38, 3e38], [np.nan, 1.0], [np.inf, 0.0], [1e-45, 0.0], [30.0, 40.0], [0, 0]], np.float32)
    z, g = pulled_back(layer, x, np.ones_like(x))
    assert np.array_equal(z[[0, 2, 3, 6]], np.float32([[0.3, 0.4], [0, 0], [0, 0], [0, 0]]))
    norms = np.linalg.norm(z.astype("float64"), axis=1)
    assert (norms <= 2.0).all() and (norms[[1, 5]] > 2.0 * (1 - 2e-6)).all()
    assert np.isfinite(g).all() and (g[[2, 3]] == 0).all() and (np.linalg.norm(g, axis=1) <= math.sqrt(2) + 1e-6).all()
    many = (RNG.standard_normal((64, 50_000)) * 10.0 ** RNG.integers(-3, 30, (64, 1))).astype("float32")
    for jit in (False, True):
        assert (np.linalg.norm(pulled_back(layer, many, many, jit)[0].astype("float64"), axis=1) <= 2.0).all()
    assert layer(np.full((1, 4), 7, np.uint8)).dtype == tf.float32


def test_loss_gradient_clip() -> None:
    layer = d.LossGradientClip(2.0)
    x = RNG.standard_normal((5, 2, 3)).astype("float32")
    g = RNG.standard_normal((5, 2, 3)).astype("float32")
    g[0] *= 1e-3
    g[1] *= 1e30
    g[2, 0, 0], g[3, 1, 1] = np.nan, np.inf
    for jit in (None, False, True):
        z, back = pulled_back(layer, x, g, jit)
        assert np.array_equal(z, x) and np.array_equal(back[0], g[0]) and (back[[2, 3]] == 0).all()
        assert np.linalg.norm(back[1]) <= 2.0 and np.linalg.norm(back[1]) == pytest.approx(2.0, rel=1e-5)
        np.testing.assert_allclose(back[1] / np.linalg.norm(back[1]), g[1] / np.linalg.norm(g[1].astype("float64")), rtol=1e-5)
    assert np.array_equal(pulled_back(d.LossGradientClip(math.inf), x, g)[1][1], g[1])


def test_a_strided_convolution_of_single_positions_has_the_right_gradients() -> None:
    layer = d.SpectralConv2D(8, 1, 2, padding="same")
    x = tf.constant(RNG.standard_normal((16, 14, 13, 8)).astype("float32"))
    layer.build(x.shape)
    for jit in (None, False, True):

        def kernel_gradient() -> Any:
            with tf.GradientTape() as tape:
                z = layer(x)
                total = tf.reduce_sum(z * z)
            return z, tape.gradient(total, layer.trainable_variables)[0]

        for _ in range(5):
            z, g = (kernel_gradient if jit is None else tf.function(kernel_gradient, autograph=False, jit_compile=jit))()
            np.testing.assert_allclose(g[0, 0], np.einsum("bhwc,bhwp->cp", x[:, ::2, ::2], 2 * z), rtol=1e-3, atol=1e-2)


def test_settings_that_change_a_bound_are_refused() -> None:
    for make in (
        lambda: d.SpectralDense(3, activation="relu"),
        lambda: d.SpectralConv2D(3, 3, activation=keras.activations.tanh),
        lambda: d.FrobeniusDense(3, activation="softmax"),
        lambda: d.SpectralConv2D(4, 3, groups=2),
        lambda: d.SpectralConv1D(4, 3, padding="causal"),
        lambda: d.SpectralConv2D(4, 3, data_format="channels_first"),
        lambda: d.SpectralDense(4, lora_rank=2),
        lambda: d.SpectralDense(4, lipschitz=0.0),
        lambda: d.SpectralDense(4, max_bias_norm=math.nan),
        lambda: d.BoundedInput(-1.0),
        lambda: d.GroupSort(1),
        lambda: d.GroupSort(4).build((None, 6)),
        lambda: d.Householder().build((None, 5)),
        lambda: d.LayerCentering(0),
        lambda: d.LayerCentering((1, -3)).build((None, 4, 4)),
        lambda: d.ScaledL2NormPool2d(3).build((None, 2, 8, 1)),
        lambda: d.ScaledGlobalAvgPool2d().build((None, 4)),
        lambda: d.Patches(3).build((None, 4, 6, 1)),
        lambda: d.Residual([d.SpectralDense(3)], "sum"),
        lambda: d.Residual([d.SpectralDense(3)]).build((None, 4)),
        lambda: d.MixerBlock(3).build((None, 4, 4)),
    ):
        with pytest.raises(ConfigError, match=r"^[^\n]+\.$"):
            make()
    assert d.SpectralDense(3, activation="linear").activation is keras.activations.linear


# --- whole models ---------------------------------------------------------------------------------------------------------


def everything(dtype: str = "float32") -> list[Any]:
    """All layers in one chain, from ``[9, 9, 3]``."""
    k = {"dtype": dtype}
    return [
        d.BoundedInput(10.0, **k), d.SpectralConv2D(8, 3, 1, "same", **k), d.BoundedBias(0.5, **k), d.GroupSort(4, **k),
        d.ScaledL2NormPool2d(2, 1e-3, **k), d.SpectralConv2D(4, 2, dilation_rate=1, orthogonal=False, **k), d.Householder(**k),
        d.LayerCentering((1, 2), **k), d.Patches(1, **k), d.SpectralConv1D(8, 3, 2, lipschitz=1.5, **k), d.Abs(**k), d.FullSort(**k),
        d.Residual([d.SpectralDense(8, name="inner", **k), d.GroupSort(**k)], mode="convex", **k), d.MixerBlock(4, 8, "add", **k),
        d.Reshape((2, 2, 8), **k), d.ScaledAvgPool2d((2, 1), **k), d.Residual([d.SpectralConv2D(8, 1, **k)], **k),
        d.ScaledGlobalL2NormPool2d(1e-4, **k), d.FrobeniusDense(6, True, 2.0, True, **k), d.LayerCentering(**k),
        KL.Activation("tanh", **k), d.SpectralDense(3, False, **k), d.LossGradientClip(0.7, **k),
    ]  # fmt: skip


def test_saved_and_loaded_models_are_equal(tmp_path: Path) -> None:
    model = model_of(*everything(), shape=(9, 9, 3))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = RNG.standard_normal((3, 9, 9, 3)).astype("float32")
    assert np.array_equal(model(x), loaded(x))
    for one, two in zip(model._flatten_layers(), loaded._flatten_layers(), strict=True):
        assert type(one) is type(two)
        for name in getattr(one, "settings", ()):
            assert getattr(one, name) == getattr(two, name)
    for one, two in zip(graph(model, x).nodes, graph(loaded, x).nodes, strict=True):  # Keras leaves some paths out on loading
        assert (one.kind, one.attrs, one.params.keys()) == (two.kind, two.attrs, two.params.keys())


def test_eager_traced_and_compiled_gradients_are_equal() -> None:
    model = model_of(*everything(), shape=(9, 9, 3))
    x = RNG.standard_normal((4, 9, 9, 3)).astype("float32")
    g = RNG.standard_normal((4, 3)).astype("float32")
    eager, traced, compiled = (pulled_back(model, x, g, jit) for jit in (None, False, True))
    for a, b, c in zip(eager, traced, compiled, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(c, a, rtol=1e-4, atol=1e-5)


def test_ghost_norms_are_exact() -> None:
    shared = d.SpectralConv2D(4, 3, padding="same", dtype="float64", name="shared")
    x = keras.Input((9, 9, 4), dtype="float64")
    twice = keras.Model(x, d.SpectralDense(3, dtype="float64")(d.ScaledGlobalAvgPool2d(dtype="float64")(shared(d.GroupSort()(shared(x))))))
    k = {"dtype": "float64"}
    strided = [d.SpectralConv2D(4, 1, 2, **k), d.BoundedBias(**k), d.Householder(**k), KL.Flatten(**k), d.FrobeniusDense(3, **k)]
    for model in (
        model_of(*everything("float64"), shape=(9, 9, 3), dtype="float64"),
        model_of(*strided, shape=(9, 9, 3), dtype="float64"),
        twice,
    ):
        for variable in model.trainable_variables:
            variable.assign(variable + 0.1 * RNG.standard_normal(variable.shape))
        data, y = RNG.standard_normal((4, *model.input_shape[1:])), np.array([0, 1, 2, 1])
        loss = get_loss("cross_entropy")
        expected = []
        for i in range(4):
            with tf.GradientTape() as tape:
                value = loss(y[i : i + 1], model(data[i : i + 1]))[0]
            expected.append(math.sqrt(sum(float(tf.reduce_sum(g**2)) for g in tape.gradient(value, model.trainable_variables))))
        for strategy in ("ghost", "per_sample"):
            np.testing.assert_allclose(d.per_sample_norms(model, loss, data, y, strategy, check=False), expected, rtol=1e-9)


def test_constrained_layers_keep_the_fast_rules() -> None:
    class Mine(d.SpectralDense):
        """Changes nothing."""

    for layer, kind in (
        (d.SpectralDense(3), "linear"), (d.FrobeniusDense(3), "linear"), (Mine(3), "linear"), (d.SpectralConv1D(3, 3), "conv"),
        (d.SpectralConv2D(3, 3), "conv"), (d.BoundedBias(), "bias"),
    ):  # fmt: skip
        rule = rule_for(layer)
        assert rule is not None and rule.kind == kind


# --- graphs ---------------------------------------------------------------------------------------------------------------


def kinds(model: Any, shape: tuple[int, ...]) -> list[str]:
    """Kinds of a model's nodes, which must have no problem."""
    found = graph(model, np.zeros((2, *shape), "float32"))
    assert found.problems == ()
    assert len({node.name for node in found.nodes}) == len(found.nodes)
    return [node.kind for node in found.nodes]


def test_graph_of_a_chain() -> None:
    model = model_of(*everything(), shape=(9, 9, 3))
    names = [v.path for v in model.variables], [len(layer._inbound_nodes) for layer in model._flatten_layers()]
    found = graph(model, np.zeros((2, 9, 9, 3), "float32"))
    assert found.problems == () and found.output.kind == "loss_gradient_clip"
    assert [node.kind for node in found.nodes] == [
        "input", "bounded_input", "conv", "bias", "group_sort", "l2_norm_pool", "conv", "householder", "centering", "patches", "conv",
        "abs", "full_sort", "linear", "group_sort", "add", "permute", "linear", "group_sort", "linear", "permute", "add", "linear",
        "group_sort", "linear", "add", "reshape", "avg_pool", "conv", "add", "global_l2_norm_pool", "linear", "centering", "tanh", "linear",
        "loss_gradient_clip",
    ]  # fmt: skip
    by_kind = {node.kind: node for node in reversed(found.nodes)}
    conv = {
        "positions": 81, "kernel": (3, 3), "strides": (1, 1), "dilation": (1, 1), "space": (9, 9), "fan_out": 8,
        "constraint": "orthogonal", "radius": 1.0, "bias_radius": 1.0,
    }  # fmt: skip
    assert by_kind["conv"].attrs == conv and by_kind["conv"].size == 648
    assert by_kind["bias"].attrs == {"positions": 81, "radius": 0.5}
    assert by_kind["l2_norm_pool"].attrs == {"kernel": (2, 2), "strides": (2, 2), "epsilon": 1e-3}
    assert by_kind["avg_pool"].attrs == {"kernel": (2, 1), "strides": (2, 1), "scaled": True}
    assert by_kind["global_l2_norm_pool"].attrs == {"positions": 2, "epsilon": 1e-4}
    rows = next(node for node in found.nodes if node.attr("constraint") == "rows")
    sizes = {"positions": 1, "fan_in": 8, "fan_out": 6}
    assert rows.attrs == {**sizes, "constraint": "rows", "radius": 2.0, "bias_radius": 1.0}
    values = weights(model, found)
    assert set(values) == {p for node in found.nodes for p in node.params.values()}
    assert values[by_kind["conv"].params["weight"]].shape == (8, 3, 3, 3) and values[rows.params["weight"]].shape == (6, 8)
    assert len(values) == len(model.trainable_variables)
    assign(model, {name: value + 1 for name, value in values.items()})
    assert all(np.array_equal(after, values[name] + 1) for name, after in weights(model, found).items())
    assert names == ([v.path for v in model.variables], [len(layer._inbound_nodes) for layer in model._flatten_layers()])
    assert not any("call" in layer.__dict__ for layer in model._flatten_layers())
    described = {p for layer in d.describe(model, np.zeros((2, 9, 9, 3), "float32")).layers for p in layer.params}
    assert described == set(values)


def test_graph_of_functional_models() -> None:
    x = keras.Input((4, 6))
    inner_input = keras.Input((4, 6))
    inner = keras.Model(inner_input, KL.ReLU()(d.SpectralDense(6, name="fc")(inner_input)), name="inner")
    fc = d.SpectralDense(6, name="fc")
    y = KL.Add()([fc(x), x])
    y = KL.Average()([inner(y), fc(y), y])
    y = (y - x) * 0.25 + inner(y) / 2 + abs(-y)
    y = KL.Concatenate(axis=-1)([y, KL.Subtract()([y, x])])
    y = keras.Sequential([d.Residual([d.SpectralDense(12, name="fc")], name="res"), KL.Dropout(0.5), KL.Flatten()], name="nest")(y)
    model = keras.Model(x, KL.Rescaling(0.5)(d.SpectralDense(3, name="head")(y)))
    nodes = {name: len(layer._inbound_nodes) for name, layer in zip("xfih", (fc, inner, model.layers[-1]), strict=False)}
    found = graph(model, np.zeros((2, 4, 6), "float32"))
    assert found.problems == ()
    linear = [node for node in found.nodes if node.kind == "linear"]
    calls: dict[str, int] = {}
    for node in linear:
        calls[node.params["weight"]] = calls.get(node.params["weight"], 0) + 1
    assert calls["fc.weight"] == 2 and sorted(calls.values()) == [1, 1, 2, 2]
    assert next(node.name for node in linear if node.params["weight"] == "fc.weight") == "fc"
    assert [node.attrs["coefficients"] for node in found.nodes if node.kind == "add"] == [
        (1.0, 1.0), (1 / 3,) * 3, (1.0, -1.0), (1.0, 1.0), (1.0, 1.0), (1.0, -1.0), (1.0, 1.0),
    ]  # fmt: skip
    assert [node.attrs["factor"] for node in found.nodes if node.kind == "scale"] == [0.25, 0.5, -1.0, 0.5]
    assert len({node.name for node in found.nodes}) == len(found.nodes)
    places = {node.name: i for i, node in enumerate(found.nodes)}
    assert all(places[name] < places[node.name] for node in found.nodes for name in node.inputs)
    assert nodes == {name: len(layer._inbound_nodes) for name, layer in zip("xfih", (fc, inner, model.layers[-1]), strict=False)}


def test_graph_marks_frozen_and_tied_parameters() -> None:
    one, two = d.SpectralDense(4, name="one"), d.SpectralDense(4, name="two", use_bias=False)
    model = keras.Sequential([keras.Input((4,)), one, two, d.SpectralDense(2, name="three")])
    two.__dict__["_kernel"] = one._kernel
    two._trainable_variables[:] = [one._kernel]
    model.layers[-1].trainable = False
    found = graph(model, np.zeros((2, 4), "float32"))
    assert found.problems == ()
    assert [dict(node.params) for node in found.nodes[1:]] == [
        {"weight": "one.weight", "bias": "one.bias"}, {"weight": "one.weight"}, {"weight": "three.weight", "bias": "three.bias"},
    ]  # fmt: skip
    assert [node.frozen for node in found.nodes[1:]] == [(), (), ("weight", "bias")]
    assert set(weights(model, found)) == {"one.weight", "one.bias", "three.weight", "three.bias"}


def subclassed() -> Any:
    class Net(keras.Model):
        """Its operations cannot be listed."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = d.SpectralDense(4)

        def call(self, x: Any) -> Any:
            """Anything."""
            return self.fc(x)

    return Net()


class Doubled(d.SpectralDense):
    """Not what it inherits from."""

    def call(self, inputs: Any) -> Any:
        """Twice as large."""
        return 2 * super().call(inputs)


def functional(function: Callable[[Any], Any], shape: tuple[int, ...] = (4, 4)) -> Any:
    """A functional model."""
    x = keras.Input(shape)
    return keras.Model(x, function(x))


def late(layer: Any, shape: tuple[int, ...], **attributes: Any) -> Any:
    """A model one of whose layers was changed after it was made."""
    model = keras.Sequential([keras.Input(shape), layer])
    for name, value in attributes.items():
        setattr(layer, name, value)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], tuple[int, ...], str]] = {
    "dense": (lambda: keras.Sequential([KL.Dense(3)]), (4,), "use SpectralDense"),
    "conv": (lambda: keras.Sequential([KL.Conv2D(3, 3)]), (4, 4, 2), "use SpectralConv2D"),
    "conv1d": (lambda: keras.Sequential([KL.Conv1D(3, 3)]), (4, 2), "use SpectralConv1D"),
    "layer norm": (lambda: keras.Sequential([KL.LayerNormalization()]), (4,), "use LayerCentering"),
    "group norm": (lambda: keras.Sequential([KL.GroupNormalization(2)]), (4, 4), "use LayerCentering"),
    "batch norm": (lambda: keras.Sequential([KL.BatchNormalization()]), (4,), "use LayerCentering"),
    "softmax": (lambda: keras.Sequential([KL.Softmax()]), (4,), "the loss takes logits"),
    "softmax activation": (lambda: keras.Sequential([KL.Activation("softmax")]), (4,), "the loss takes logits"),
    "unknown function": (lambda: keras.Sequential([KL.Activation(tf.exp)]), (4,), "has no proven bound"),
    "padded max pool": (lambda: keras.Sequential([KL.MaxPooling2D(2, padding="same")]), (4, 4, 2), "padding='valid'"),
    "padded avg pool": (lambda: keras.Sequential([KL.AveragePooling2D(2, padding="same")]), (4, 4, 2), "padding='valid'"),
    "subclassed model": (subclassed, (4,), "Sequential or functional"),
    "changed call": (lambda: keras.Sequential([Doubled(3)]), (4,), "overrides parts of SpectralDense"),
    "activity regularizer": (lambda: keras.Sequential([d.SpectralDense(3, activity_regularizer="l2")]), (4,), "activity_regularizer"),
    "weight regularizer": (lambda: keras.Sequential([d.SpectralDense(3, kernel_regularizer="l2")]), (4,), "regularizer"),
    "frozen regularizer": (
        lambda: keras.Sequential([d.SpectralDense(3, kernel_regularizer="l2", trainable=False)]), (4,), "regularizer",
    ),
    "weight constraint": (lambda: keras.Sequential([d.SpectralDense(3, kernel_constraint="max_norm")]), (4,), "constraint"),
    "late activation": (lambda: late(d.SpectralDense(3), (4,), activation=tf.exp), (4,), "has an activation of its own"),
    "late call": (lambda: late(d.GroupSort(), (4,), call=lambda x: 3 * x), (4,), "overrides parts of GroupSort"),
    "clipped relu": (lambda: keras.Sequential([KL.ReLU(6.0)]), (4,), "use a plain ReLU"),
    "elu": (lambda: keras.Sequential([KL.ELU(2.0)]), (4,), "use alpha=1"),
    "low precision": (lambda: keras.Sequential([d.SpectralDense(3, dtype="mixed_bfloat16")]), (4,), "use float32"),
    "shift": (lambda: functional(lambda x: x + 1.0), (4, 4), "has no proven bound"),
    "inverse": (lambda: functional(lambda x: 1.0 / x), (4, 4), "has no proven bound"),
    "square": (lambda: functional(lambda x: x * x), (4, 4), "has no proven bound"),
    "broadcast": (lambda: functional(lambda x: x + d.SpectralDense(1)(x)), (4, 4), "different shapes"),
    "product": (lambda: functional(lambda x: KL.Multiply()([x, x])), (4, 4), "multiplies two inputs"),
    "function": (lambda: functional(keras.ops.exp), (4, 4), "has no proven bound"),
    "lambda": (lambda: keras.Sequential([KL.Lambda(lambda x: x)]), (4,), "has no proven bound"),
    "attention": (lambda: functional(lambda x: KL.MultiHeadAttention(1, 2)(x, x)), (4, 4), "MixerBlock"),
    "rescaling": (lambda: keras.Sequential([KL.Rescaling(1.0, 0.5)]), (4,), "offset=0"),
    "time distributed": (lambda: functional(KL.TimeDistributed(d.SpectralDense(2))), (4, 4), "call SpectralDense directly"),
    "two outputs": (lambda: functional(lambda x: [x * 1.0, x * 2.0]), (4, 4), "1 inputs and 2 outputs"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_bound_is_refused_with_a_remedy(name: str) -> None:
    make, shape, words = REFUSED[name]
    model = make()
    found = graph(model, np.zeros((2, *shape), "float32"))
    assert any(words in problem for problem in found.problems), found.problems
    assert all(problem.endswith(".") and "\n" not in problem for problem in found.problems)


def test_all_problems_are_listed_and_inputs_counted() -> None:
    model = keras.Sequential([keras.Input((4,)), KL.Dense(4, name="one"), d.Residual([KL.Dense(4, name="two")]), KL.LayerNormalization()])
    problems = graph(model, np.zeros((2, 4), "float32")).problems
    assert len(problems) == 3 and "'one'" in problems[0] and ".two'" in problems[1]
    inputs = [keras.Input((4,)), keras.Input((4,))]
    assert "several inputs" in graph(keras.Model(inputs, KL.Add()(inputs)), [np.zeros((2, 4), "float32")] * 2).problems[0]


def test_a_model_with_its_own_training_is_walked() -> None:
    class Own(keras.Model):
        """Overrides training only."""

        def train_step(self, data: Any) -> Any:
            """Nothing."""
            return {}

    x = keras.Input((4,))
    assert kinds(Own(x, d.SpectralDense(2)(x)), (4,)) == ["input", "linear"]


# --- specifications -------------------------------------------------------------------------------------------------------

CONV, POOL, ALL = "spectral_conv2d", "scaled_l2_norm_pool", "num_classes"
SPECS: dict[str, tuple[tuple[int, ...], tuple[L.AnyLayer, ...]]] = {
    "image": ((9, 9, 3), (
        L.BoundedInput(norm=5.0), L.SpectralConv(type=CONV, filters=8, kernel_size=3, strides=2), L.BoundedBias(), L.GroupSort(size=4),
        L.SpectralConv(type=CONV, filters=6, kernel_size=1, strides=2), L.Householder(), L.LayerCentering(), L.ScaledPool(type=POOL),
        L.Flatten(), L.SpectralDense(units=ALL), L.LossGradientClip(norm=0.5),
    )),
    "dilated": ((8, 8, 3), (
        L.BoundedInput(norm=5.0), L.SpectralConv(type=CONV, filters=8, kernel_size=3, padding="valid", dilation=2),
        L.Activation(function="abs"), L.ScaledPool(type="scaled_avg_pool"),
        L.Residual(mode="convex", body=(L.SpectralConv(type=CONV, filters=8, kernel_size=2), L.GroupSort(type="full_sort"))),
        L.Pool(type="max_pool"), L.ScaledGlobalPool(type="scaled_global_l2_norm_pool"),
        L.FrobeniusDense(units=ALL, disjoint_neurons=True),
    )),
    "residual": ((8, 8, 4), (
        L.BoundedInput(norm=5.0),
        L.Residual(
            body=(L.SpectralConv(type=CONV, filters=8, kernel_size=3, strides=2),),
            shortcut=(L.SpectralConv(type=CONV, name="down", filters=8, kernel_size=1, strides=2),),
        ),
        L.ScaledGlobalPool(type="scaled_global_avg_pool"), L.SpectralDense(units=6, bias=False, orthogonal=False, lipschitz=2.0),
        L.Activation(function="softplus"), L.LayerCentering(), L.SpectralDense(units=ALL),
    )),
    "mixer": ((8, 8, 3), (
        L.BoundedInput(norm=5.0), L.Patches(size=4), L.SpectralDense(units=6),
        L.Residual(mode="convex", body=(
            L.Permute(dims=(2, 1)), L.SpectralDense(units=8), L.GroupSort(), L.SpectralDense(units=4), L.Permute(dims=(2, 1)),
        )),
        L.LayerCentering(), L.Reshape(shape=(2, 2, 6)), L.BoundedBias(), L.GlobalAvgPool(), L.SpectralDense(units=ALL),
    )),
    "sequence": ((10, 4), (
        L.BoundedInput(norm=5.0), L.SpectralConv(type="spectral_conv1d", filters=6, kernel_size=3, strides=3), L.Householder(),
        L.BoundedBias(), L.ScaledGlobalPool(type="scaled_global_avg_pool"), L.SpectralDense(units=ALL),
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_a_specification_is_the_same_function_and_the_same_graph_as_in_torch(name: str) -> None:
    shape, spec = SPECS[name]
    ours, theirs = models.build(spec, shape, 3), torch_models.build(spec, shape, 3)
    shapes = models.weight_shapes(ours)
    assert shapes == torch_models.weight_shapes(theirs)
    values = {key: 0.4 * RNG.standard_normal(size).astype("float32") for key, size in shapes.items()}
    models.set_weights(ours, values)
    torch_models.set_weights(theirs, values)
    x = RNG.standard_normal((4, *shape)).astype("float32") * np.reshape([1.0, 0.0, 100.0, 1.0], (4, *[1] * len(shape))).astype("float32")
    np.testing.assert_allclose(ours(x), theirs(torch.tensor(x)).detach(), rtol=1e-4, atol=1e-5)
    one, two = graph(ours, x), torch_graph.graph(theirs, torch.tensor(x))
    assert one.problems == two.problems == ()
    assert [node for node in one.nodes if node.params] == [
        replace(node, inputs=mine.inputs) for mine, node in zip(
            [node for node in one.nodes if node.params], [node for node in two.nodes if node.params], strict=True
        )
    ]  # fmt: skip
    same = [weights(ours, one), torch_graph.weights(theirs, two)]
    assert list(same[0]) == list(same[1]) and all(np.array_equal(same[0][key], same[1][key]) for key in same[0])


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (L.GroupSort(size=4), "do not divide 6 channels"), (L.Patches(size=3), "do not tile"), (L.Permute(dims=(1, 2)), "name each"),
        (L.ScaledPool(type=POOL, size=9), "larger than the image"), (L.Reshape(shape=(5, 5)), "reshape"),
        (L.SpectralConv(type=CONV, filters=2, kernel_size=9, padding="valid"), "the kernel reaches"),
        (L.SpectralConv(type="spectral_conv1d", filters=2, kernel_size=3), "1 spatial axes"),
    ],
)  # fmt: skip
def test_a_specification_that_does_not_fit_is_refused(layer: L.AnyLayer, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"{layer.type}.*{words}|{words}"):
        models.build((layer, L.Flatten(), L.SpectralDense(units=ALL)), (8, 8, 6), 3)


def test_a_subclass_keeps_its_rule_while_garbage_is_collected() -> None:
    """A temporary class whose names were read was once emptied by the collector in between, so that rules were lost at random."""
    import gc

    class Mine(d.SpectralDense):
        """Adds nothing."""

    layer = Mine(4)
    layer.build((None, 3))
    before = gc.get_threshold()
    names_of_a_subclass.cache_clear()
    gc.set_threshold(1, 1, 1)
    try:
        assert all(inherits(layer, d.SpectralDense) for _ in range(100))
    finally:
        gc.set_threshold(*before)
