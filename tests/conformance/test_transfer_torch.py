"""Transfer learning: what is frozen costs no norms, no stored activations and no noise, and what is trained is exact."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import TensorDataset

from dptrain.errors import ConfigError
from dptrain_torch import clipped_sum, make_plan, per_sample_norms
from dptrain_torch.fix import fix, freeze_all_but
from dptrain_torch.hooks import FIRST_CALLS, Tap, find_units
from dptrain_torch.privacy_engine import PrivacyEngine
from dptrain_torch.uses import ConvUse, EmbeddingUse, LinearUse

B = 4


def losses(output: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, reduction="none")


def exact(model: nn.Module, x: Any, y: Tensor, each: Any = None) -> None:
    """Norms and clipped sums against autograd, one example at a time; no gradient of anything frozen."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    each = each or (lambda i: (x[i : i + 1],))
    rows = []
    for i in range(len(y)):
        loss = losses(model(*each(i)), y[i : i + 1]).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        rows.append({n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)})
    norms = torch.stack([torch.stack([g.square().sum() for g in row.values()]).sum().sqrt() for row in rows])
    torch.testing.assert_close(per_sample_norms(model, losses, x, y), norms, rtol=1e-9, atol=1e-12)
    clip = float(norms.median())
    sums = clipped_sum(model, losses, x, y, max_grad_norm=clip)
    assert sums.keys() == parameters.keys()
    for name in parameters:
        expected = sum(row[name] * min(1.0, clip / float(norm)) for row, norm in zip(rows, norms, strict=True))
        torch.testing.assert_close(sums[name], expected, rtol=1e-8, atol=1e-11)


def vit(**changes: Any) -> Any:
    """A small vision transformer of timm."""
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3, **changes}
    return timm.models.vision_transformer.VisionTransformer(**options).double()


def resnet() -> Any:
    """A small network of timm with BatchNorm."""
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=3, channels=(8, 8, 16, 16), stem_width=8).double()


IMAGES = torch.randn(B, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(B) % 3


def one_step(model: nn.Module, x: Tensor, y: Tensor) -> PrivacyEngine:
    """One private step on all examples of a batch, as a data set."""
    engine = PrivacyEngine(model, sample_size=len(x), sample_rate=1.0, steps=1, noise_multiplier=1.0, max_grad_norm=1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine.attach(optimizer)
    for images, labels in engine.loader(TensorDataset(x, y)):
        optimizer.step(loss=losses(model(images), labels))
    engine.detach()
    return engine


# ---- frozen parts --------------------------------------------------------------------------------------------------


def saved(run: Any) -> tuple[int, Any]:
    """Elements of activations that autograd keeps during a call, and its result; parameters are kept anyway."""
    count = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal count
        count += 0 if isinstance(x, nn.Parameter) or (x._base is not None and isinstance(x._base, nn.Parameter)) else x.numel()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        result = run()
    return count, result


@pytest.mark.parametrize("make", [vit, resnet])
def test_a_frozen_trunk_is_neither_tapped_nor_stored(make: Any) -> None:
    """A pass through trunk and head keeps what the head alone keeps."""
    model = make()
    freeze_all_but(model, ["head.*" if make is vit else "fc.*"])
    model = fix(model, verbose=False)
    x = IMAGES if make is vit else F.interpolate(IMAGES, 64)
    assert [unit.name for unit in find_units(model)] == ["head" if make is vit else "fc"]
    assert [layer.name for layer in make_plan(model, x).layers] == ["head" if make is vit else "fc"]
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert not model.forward_features(x).requires_grad
    alone, _ = saved(lambda: losses(model.get_classifier()(features), Y).sum())
    with Tap(find_units(model), B) as tap:
        whole, _ = saved(lambda: losses(model(x), Y).sum())
    assert whole == alone
    assert sum(t.numel() for call in tap.calls for t in call.args) == features.numel()
    for p in model.parameters():
        p.requires_grad_(True)
    full, _ = saved(lambda: losses(model(x), Y).sum())
    assert full > 10 * whole


def test_frozen_parameters_stay_and_trained_ones_all_get_noise() -> None:
    model = vit()
    chosen = freeze_all_but(model, ["blocks.2.*", "norm.*", "head.*"])
    before = copy.deepcopy(model.state_dict())
    engine = one_step(model, IMAGES, Y)
    assert engine.ledger.num_releases == 1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (name in chosen)


@pytest.mark.parametrize("patterns", [["head.*"], ["blocks.2.*", "head.*"], ["*norm*"], ["*.bias"], ["pos_embed", "head.weight"]])
def test_part_of_a_transformer_is_exact(patterns: list[str]) -> None:
    model = vit()
    freeze_all_but(model, patterns)
    exact(model, IMAGES, Y)


def test_a_network_with_folded_statistics_is_exact() -> None:
    """Convolutions of a pretrained network's last stage, its BatchNorm frozen."""
    model = resnet()
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64, dtype=torch.float64))
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("layer4", "fc")) and p.dim() != 1)
    found = fix(model, verbose=False)
    x = F.interpolate(IMAGES, 64)
    torch.testing.assert_close(found(x), model.eval()(x), rtol=1e-9, atol=1e-9)
    exact(found, x, Y)


def test_freezing_by_patterns() -> None:
    model = vit()
    assert freeze_all_but(model, "head.*") == ["head.weight", "head.bias"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    with pytest.raises(ConfigError, match=r"haed\.\* fits no parameter; names are like .*head.bias"):
        freeze_all_but(model, ["blocks.*", "haed.*"])
    with pytest.raises(ConfigError, match="empty list"):
        freeze_all_but(model, [])
    assert sum(p.requires_grad for p in model.parameters()) == 2


# ---- biases alone --------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A bias in every kind of layer that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.line = nn.Conv1d(8, 8, 3)
        self.layer, self.mid, self.head = nn.LayerNorm((5, 8)), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.instance(self.up(torch.tanh(self.group(self.conv(x)))))
        h = self.line(h.flatten(2)[:, :, :7]).transpose(1, 2)
        return self.head(torch.tanh(self.mid(torch.tanh(self.layer(h))))).mean(1)


@pytest.mark.parametrize("strategy", ["mixed_ghost", "ghost", "per_sample"])
def test_biases_alone_need_no_work_on_weights(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to a weight's gradient or norm raises here; the sums are those of autograd."""
    torch.manual_seed(0)
    model = Mixed().double()
    freeze_all_but(model, "*.bias")

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("work on a weight that is frozen")

    for cls in (LinearUse, ConvUse, EmbeddingUse):
        for method in ("instantiate", "in_parts", "inner", "weighted_sum", "square"):
            monkeypatch.setattr(cls, method, never)
    monkeypatch.setattr(F, "group_norm", counted(F.group_norm, seen := []))
    exact(model, IMAGES[:, :, :4, :4].contiguous(), Y)
    seen.clear()
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    sums = clipped_sum(model, losses, IMAGES[:, :, :4, :4], Y, strategy=strategy, check=False)
    assert len(seen) == len(passes) > 0  # no normalisation is computed a second time
    assert set(sums) == {name for name, _ in model.named_parameters() if name.endswith("bias")}
    for p in model.parameters():
        p.requires_grad_(True)
    with pytest.raises(AssertionError, match="frozen"):
        clipped_sum(model, losses, IMAGES[:, :, :4, :4], Y, strategy=strategy, check=False)


def counted(function: Any, seen: list[int]) -> Any:
    """A function that counts its calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("bias_only", [True, False])
def test_biases_alone_store_no_inputs(bias_only: bool) -> None:
    """What goes from one layer to the next is freed while the forward pass runs; with weights it has to be kept."""

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            between.append(weakref.ref(x))
            return x

    between: list[Any] = []
    model = nn.Sequential(nn.Linear(5, 6), *[nn.Linear(6, 6) for _ in range(FIRST_CALLS)], Look(), nn.Linear(6, 3))
    if bias_only:
        freeze_all_but(model, "*.bias")
    with Tap(find_units(model), B) as tap:
        output = model(torch.randn(B, 5))
    gc.collect()
    assert (between[0]() is None) == bias_only
    kept = sum(t.untyped_storage().nbytes() for call in tap.calls for t in call.args)
    assert kept == 4 * len(tap.calls) if bias_only else kept == 4 * B * (5 + 6 * (FIRST_CALLS + 1))
    assert output.requires_grad


def test_passes_that_are_never_taken_backwards_leave_nothing_behind() -> None:
    """What is planned, checked or evaluated with gradients on is freed; collectors do not see circles through autograd's nodes."""

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(weakref.ref(x))  # which the node of tanh keeps
            return x

    seen: list[Any] = []
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Look(), nn.Linear(6, 3))
    make_plan(model, torch.randn(4, 5))
    clipped_sum(model, losses, torch.randn(4, 5), Y)
    with Tap(find_units(model), B) as tap:
        output = model(torch.randn(B, 5))
    assert seen[-1]() is not None
    del tap, output
    gc.collect()
    assert len(seen) > 3 and all(ref() is None for ref in seen)


def test_outputs_that_nothing_needs_are_not_kept() -> None:
    """What a normalisation gives to an activation is freed in the forward pass, as in plain training."""

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            between.append(weakref.ref(x))
            return x

    between: list[Any] = []
    model = nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), Look(), nn.ReLU(), nn.Linear(6, 6), nn.LayerNorm(6), Look(), nn.ReLU(), nn.Linear(6, 3)
    )
    for first, kept in ((0, [False, False]), (FIRST_CALLS, [True, False])):
        between.clear()
        with Tap(find_units(model), B, first=first) as tap:
            output = model(torch.randn(B, 5))
        gc.collect()
        assert [ref() is not None for ref in between] == kept
        assert [call.outputs[0].shape for call in tap.calls] == [(B, 6)] * 4 + [(B, 3)]
        assert output.requires_grad


def test_overwriting_an_input_does_not_matter_to_a_bias() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    freeze_all_but(model, "*.bias")
    exact(model, torch.randn(B, 5, dtype=torch.float64), Y)


# ---- LoRA ----------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A text encoder and a linear classifier on the mean over tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * weight).sum(1) / weight.sum(1))


def lora_model() -> nn.Module:
    """A small BERT with LoRA on queries and values, by peft."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=8
    )
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], init_lora_weights=False)
    return Classifier(peft.get_peft_model(encoder, lora)).double().eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_is_exact_and_taps_its_own_layers_alone() -> None:
    model = lora_model()
    ids = torch.randint(0, 20, (B, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    units = find_units(model)
    assert all("lora_" in unit.name or unit.name == "head" for unit in units)
    assert {unit.kind for unit in units} == {"linear"} and len(units) == 9
    exact(model, (ids, mask), Y, lambda i: (ids[i : i + 1], mask[i : i + 1]))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_step_of_lora_leaves_the_encoder_alone() -> None:
    model = lora_model()
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(0, 20, (B, 6))

    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, torch.ones_like(ids))

    one_step(Ids(), ids, Y)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (name in trained)
