"""One specification, one model: presets expand to the documented layers and every one of them builds, runs and keeps its weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from scipy import stats

from dptrain import ConfigError, RunError, TrainConfig
from dptrain import layer_specs as L
from dptrain.backend import get_backend
from dptrain.checkpoint import load_arrays, save_arrays
from dptrain.models import ModelConfig, check_weights, initial_weight, initial_weights, outputs
from dptrain_torch import models as torch_models
from tests.core.shared import FALSE_FAILURE, plain

CLASSES = 7


def spec(**fields):
    return TypeAdapter(ModelConfig).validate_python(fields)


SMALL = {
    "mlp": {"hidden": [6, 5]},
    "cnn": {"stages": [[4], [8, 8]], "norm_groups": 4, "hidden": [6]},
    "resnet18_gn": {"width": 4, "norm_groups": 4},
    "transformer_encoder": {"vocabulary": 11, "dim": 8, "depth": 2, "heads": 2},
    "vit_tiny": {"dim": 12, "depth": 2, "heads": 3},
    "layers": {"layers": [
        {"type": "conv2d", "filters": 4, "kernel_size": 3}, {"type": "instance_norm"}, {"type": "avg_pool"},
        {"type": "conv2d_transpose", "filters": 2, "kernel_size": 2, "strides": 2}, {"type": "flatten"},
        {"type": "layer_norm"}, {"type": "rms_norm"}, {"type": "dense", "units": "num_classes"}]},
}  # fmt: skip

IMAGE, GRAY, VECTOR, TOKENS, SEQUENCE = (12, 12, 3), (8, 8, 1), (5,), (9,), (6, 4)
SHAPES = [
    ("mlp", {}, VECTOR), ("mlp", {}, IMAGE), ("mlp", {"dropout": 0.5}, SEQUENCE), ("mlp", {"hidden": []}, GRAY),
    ("cnn", {}, IMAGE), ("cnn", {}, GRAY), ("cnn", {"norm_groups": 0, "pool": "avg_pool", "global_pool": True}, IMAGE),
    ("cnn", {"kernel_size": 4, "activation": "gelu"}, (13, 9, 2)),
    ("resnet18_gn", {}, IMAGE), ("resnet18_gn", {"blocks": [1, 1]}, GRAY),
    ("transformer_encoder", {}, TOKENS), ("transformer_encoder", {"dropout": 0.1}, SEQUENCE), ("transformer_encoder", {}, GRAY),
    ("vit_tiny", {}, IMAGE), ("vit_tiny", {"patch": 2, "dropout": 0.1}, GRAY),
    ("layers", {}, IMAGE), ("layers", {}, GRAY),
]  # fmt: skip


# ---- presets -------------------------------------------------------------------------------------------------------


def test_presets_expand_to_the_documented_layers():
    def kinds(name, shape, **fields):
        return [layer.type for layer in spec(name=name, **{**SMALL[name], **fields}).expand(shape)]

    assert kinds("mlp", VECTOR) == ["flatten", "dense", "dense", "dense"]
    assert kinds("mlp", VECTOR, dropout=0.1) == ["flatten", "dense", "dropout", "dense", "dropout", "dense"]
    block = ["conv2d", "group_norm", "activation"]
    assert kinds("cnn", IMAGE) == [*block, "max_pool", *block, *block, "max_pool", "flatten", "dense", "dense"]
    assert kinds("cnn", IMAGE, norm_groups=0) == ["conv2d", "max_pool", "conv2d", "conv2d", "max_pool", "flatten", "dense", "dense"]
    assert kinds("resnet18_gn", IMAGE) == [*block, *["residual", "activation"] * 8, "global_avg_pool", "dense"]
    ends = [*["residual"] * 4, "layer_norm", "global_avg_pool", "dense"]
    assert kinds("transformer_encoder", TOKENS) == ["embedding", "position_embedding", *ends]
    assert kinds("transformer_encoder", SEQUENCE) == ["dense", "position_embedding", *ends]
    assert kinds("transformer_encoder", IMAGE) == ["to_sequence", "dense", "position_embedding", *ends]
    assert kinds("vit_tiny", IMAGE) == ["conv2d", "to_sequence", "position_embedding", *ends]


def test_resnet18_has_the_published_size():
    """11.2 million parameters at width 64, with 18 weighted layers on the path of the data."""
    layers = spec(name="resnet18_gn").expand((32, 32, 3))
    residuals = [layer for layer in layers if isinstance(layer, L.Residual)]
    convolutions = [inner for block in residuals for inner in block.body if isinstance(inner, L.Conv)]
    assert len(convolutions) + 2 == 18
    assert sum(bool(block.shortcut) for block in residuals) == 3
    model = torch_models.build(layers, (32, 32, 3), 10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # torchvision's CIFAR variant, GroupNorm in place of BatchNorm


@pytest.mark.parametrize("name", SMALL)
def test_names_are_unique_and_complete(name):
    shape = TOKENS if name == "transformer_encoder" else IMAGE

    def walk(layers, prefix=""):
        paths = [path for path, _ in L.named(layers, prefix)]
        assert len(set(paths)) == len(paths)
        for path, layer in L.named(layers, prefix):
            yield path
            if isinstance(layer, L.Residual):
                yield from walk((*layer.body, *layer.shortcut), path + ".")

    names = list(walk(spec(name=name, **SMALL[name]).expand(shape)))
    assert len(set(names)) == len(names)
    assert all(names)


def test_layers_without_a_name_are_called_after_type_and_position():
    layers = spec(**{"name": "layers", **SMALL["layers"]}).expand(IMAGE)
    assert [name for name, _ in L.named(layers, "a.")][:2] == ["a.conv2d_0", "a.instance_norm_1"]


def test_helpers_of_the_vocabulary():
    assert L.axes(3, 2) == (3, 3)
    assert L.axes((1, 2), 2) == (1, 2)
    assert outputs(L.Dense(units="num_classes"), 4) == 4
    assert outputs(L.Dense(units=9), 4) == 9


# ---- building ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "fields", "shape"), SHAPES)
def test_every_preset_builds_and_gives_one_vector_per_example(name, fields, shape):
    layers = spec(name=name, **{**SMALL[name], **fields}).expand(shape)
    model = torch_models.build(layers, shape, CLASSES)
    torch_models.set_weights(model, initial_weights(torch_models.weight_shapes(model), 0))
    tokens = isinstance(layers[0], L.Embedding)
    x = torch.from_numpy(
        np.random.default_rng(0).integers(0, 11, (4, *shape)) if tokens else np.random.default_rng(0).standard_normal((4, *shape))
    )
    model.eval()
    output = model(x if tokens else x.float())
    assert output.shape == (4, CLASSES)
    assert torch.isfinite(output).all()
    assert output.std() > 1e-4
    alone = model((x if tokens else x.float())[1:2])
    torch.testing.assert_close(alone, output[1:2], rtol=1e-4, atol=1e-5)  # nothing mixes examples


@pytest.mark.parametrize(
    ("layers", "shape", "sentence"),
    [
        ([{"type": "dense", "units": 5}], VECTOR, "The model's output has 5 units for 7 outputs"),
        ([{"type": "dense", "units": "num_classes"}], SEQUENCE, r"The model's output has shape \(6, 7\) per example"),
        ([{"type": "flatten", "name": "a"}, {"type": "dense", "units": "num_classes", "name": "a"}], VECTOR, "Two layers are called 'a'"),
        ([{"type": "conv2d", "filters": 2, "kernel_size": 3, "name": "c"}], VECTOR, r"Layer 'c' \(conv2d\) does not fit"),
        ([{"type": "conv2d", "filters": 3, "kernel_size": 3, "groups": 2, "name": "c"}], IMAGE, "2 groups do not divide 3"),
        ([{"type": "conv2d", "filters": 3, "kernel_size": 20, "padding": "valid"}], IMAGE, "the kernel reaches over"),
        ([{"type": "conv2d", "filters": 3, "kernel_size": [3, 3, 3]}], IMAGE, "conv2d_0"),
        ([{"type": "group_norm", "groups": 2}], IMAGE, "2 groups do not divide 3 channels"),
        ([{"type": "max_pool", "size": 13}], IMAGE, "the window 13 is larger than the image"),
        ([{"type": "self_attention", "heads": 3}], SEQUENCE, "divisible by 3 heads"),
        ([{"type": "position_embedding"}], IMAGE, "it needs a sequence"),
        ([{"type": "residual", "name": "r", "body": [{"type": "dense", "units": 9}]}], VECTOR, "body gives"),
        ([{"type": "residual", "name": "r", "body": [{"type": "dense", "units": 5}, {"type": "group_norm", "name": "n", "groups": 2}]}],
         VECTOR, r"'r\.n'"),
    ],
)  # fmt: skip
def test_a_layer_that_does_not_fit_is_named(layers, shape, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        torch_models.build(spec(name="layers", layers=layers).expand(shape), shape, CLASSES)
    assert "\n" not in str(caught.value)


# ---- starting weights ----------------------------------------------------------------------------------------------


def test_starting_weights_follow_from_seed_name_and_shape_alone():
    one = initial_weight("fc1.weight", (30, 20), 3)
    np.testing.assert_array_equal(one, initial_weight("fc1.weight", (30, 20), 3))
    assert one.dtype == np.float32
    assert not np.array_equal(one, initial_weight("fc1.weight", (30, 20), 4))
    assert not np.array_equal(one, initial_weight("fc2.weight", (30, 20), 3))
    shapes = {"b.weight": (3, 2), "a.weight": (3, 2), "a.bias": (3,)}
    both, reverse = initial_weights(shapes, 1), initial_weights(dict(reversed(shapes.items())), 1)
    for name in shapes:
        np.testing.assert_array_equal(both[name], reverse[name])


def test_starting_weights_have_the_documented_distribution():
    assert not initial_weight("a.bias", (5,), 0).any()
    assert (initial_weight("norm.weight", (5,), 0) == 1).all()
    for shape, fans in (((300, 200), 500), ((64, 32, 3, 3), 96 * 9), ((64, 1, 5), 65 * 5)):
        values = initial_weight("w.weight", shape, 0).ravel()
        limit = math.sqrt(6 / fans)
        assert stats.kstest(values / limit, stats.uniform(-1, 2).cdf).pvalue > FALSE_FAILURE
        assert np.abs(values).max() <= limit * (1 + 1e-6)


def test_position_tables_start_at_two_hundredths():
    backend = get_backend("torch")
    run = TrainConfig.parse(plain(model={"name": "transformer_encoder", **SMALL["transformer_encoder"]}))
    weights = backend.get_weights(backend.build_model(run, (200,), CLASSES))
    (table,) = [value for value in weights.values() if value.shape == (200, 8)]
    assert stats.kstest(table.ravel() / 0.02, "norm").pvalue > FALSE_FAILURE


def test_the_backend_starts_from_these_very_weights():
    run = TrainConfig.parse(plain(seed=5, model={"name": "cnn", **SMALL["cnn"]}))
    backend = get_backend("torch")
    weights = backend.get_weights(backend.build_model(run, GRAY, CLASSES))
    expected = initial_weights({name: value.shape for name, value in weights.items()}, 5)
    for name, value in expected.items():
        np.testing.assert_array_equal(weights[name], value)


# ---- weights in and out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_weights_survive_a_file(tmp_path, name):
    shape = TOKENS if name == "transformer_encoder" else IMAGE
    layers = spec(name=name, **SMALL[name]).expand(shape)
    model, other = (torch_models.build(layers, shape, CLASSES) for _ in range(2))
    torch_models.set_weights(model, initial_weights(torch_models.weight_shapes(model), 1))
    weights = torch_models.get_weights(model)
    save_arrays(tmp_path / "w.safetensors", weights, {"format": "dptrain"})
    stored, metadata = load_arrays(tmp_path / "w.safetensors")
    assert metadata == {"format": "dptrain"}
    torch_models.set_weights(other, stored)
    for key, value in torch_models.get_weights(other).items():
        assert value.dtype == weights[key].dtype
        np.testing.assert_array_equal(value, weights[key])


def test_weights_that_do_not_fit_are_all_named_and_change_nothing():
    expected = {"a.weight": (2, 3), "a.bias": (2,)}
    good = {"a.weight": np.zeros((2, 3)), "a.bias": np.zeros(2)}
    check_weights(good, expected)
    with pytest.raises(RunError, match=r"a\.bias is missing; b\.bias is unknown; a\.weight has shape \(3, 2\) in place of \(2, 3\)\."):
        check_weights({"a.weight": np.zeros((3, 2)), "b.bias": np.zeros(2)}, expected)
    model = torch_models.build(spec(name="mlp", **SMALL["mlp"]).expand(VECTOR), VECTOR, CLASSES)
    before = torch_models.get_weights(model)
    with pytest.raises(RunError, match=r"head\.bias is missing"):
        torch_models.set_weights(model, {name: value + 1 for name, value in before.items() if name != "head.bias"})
    for name, value in torch_models.get_weights(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_long_list_of_misfits_is_cut():
    with pytest.raises(RunError) as caught:
        check_weights({}, {f"w{i}": (1,) for i in range(99)})
    assert str(caught.value).count("is missing") == 10
