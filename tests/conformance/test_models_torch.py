"""Models as users bring them: per-sample norms and clipped sums equal a float64 oracle, with fast rules wherever the layers have one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from dptrain_torch import clipped_sum, make_plan
from dptrain_torch.engine import full_batch
from dptrain_torch.gradients import bounded_sum, plain_sum
from dptrain_torch.losses import cross_entropy
from tests.conformance.torch_oracle import assert_exact, fill, projection, slow_layers

Y = torch.tensor([0, 1, 2, 0])


def families() -> ModuleType:
    """``docs/families_torch.py``, which the table in the documentation is made from."""
    path = Path(__file__).parents[2] / "docs" / "families_torch.py"
    spec = importlib.util.spec_from_file_location("families_torch", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault("families_torch", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


FAMILIES = families().FAMILIES
# Layers for which the slow method is unavoidable.
SLOW = {"BEiT (transformers)": ["beit.layers.0", "beit.layers.1"]}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")  # of the libraries that define the models
def test_every_family_is_exact(name: str) -> None:
    """Norms and clipped sums, ghost and instantiated, with the self-check first; every linear, convolution, norm and embedding is fast."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    model = fill(model.train(), scale=0.05)
    if isinstance(inputs, torch.Tensor):
        inputs = inputs.double()
    plan = assert_exact(model, inputs, Y)
    assert slow_layers(plan) == SLOW.get(name, [])
    fast = {layer.name for layer in plan.layers} - set(slow_layers(plan))
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.Embedding)
    layers = {n for n, m in model.named_modules() if isinstance(m, kinds) and any(p.requires_grad for p in m.parameters(recurse=False))}
    assert {n for n in layers if not any(n == s or n.startswith(f"{s}.") for s in SLOW.get(name, []))} <= fast


@pytest.mark.filterwarnings("ignore")
def test_dropout_of_every_kind_is_drawn_once() -> None:
    """G21: a ViT with dropout, stochastic depth and attention dropout: complete without clipping, within the bound with it."""
    settings = dict.fromkeys(("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate"), 0.3)
    model, x = families().timm_vit("vit_tiny_patch16_224", **settings)
    model, x = model.double().train(), x.double()
    plan = make_plan(model, x, max_grad_norm=1e-3)
    for seed in range(3):
        batch = full_batch(x, Y)
        torch.manual_seed(seed)
        ours = bounded_sum(model, cross_entropy, batch, plan.with_clip_norm(float("inf"))).sums
        torch.manual_seed(seed)
        torch.testing.assert_close(ours, plain_sum(model, cross_entropy, batch).sums, rtol=1e-9, atol=1e-12)
        one = bounded_sum(model, cross_entropy, full_batch(x[:1], Y[:1]), plan).sums
        assert float(torch.stack([v.square().sum() for v in one.values()]).sum().sqrt()) == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ViT (timm)", "Swin v2 (torchvision)", "BERT (transformers)", "GPT-2 (transformers)"])
def test_two_passes_give_the_same_sum(name: str) -> None:
    """The second backward pass runs through the copies that were made for the examples."""
    torch.manual_seed(0)
    model, x = FAMILIES[name]()
    model = fill(model.train(), scale=0.05)
    x = x.double() if isinstance(x, torch.Tensor) else x
    one, two = (clipped_sum(model, projection, x, Y, 0.1, two_pass=two_pass, check=False) for two_pass in (False, True))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
