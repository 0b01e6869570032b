"""fix: what is replaced and how, the weights that are kept, functions that must not change, and exactness afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dptrain.errors import ConfigError, UnsupportedModelError
from dptrain_torch import clipped_sum, per_sample_norms
from dptrain_torch.fix import ChannelAffine, fix, fix_report

B = 4


def losses(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, reduction="none")


def used(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """A model whose running statistics and affine weights are not those of a new one; in evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5) if name.endswith("weight") else p.normal_()
        model.train()
        for _ in range(2):
            model(torch.randn(B, *shape, dtype=next(model.parameters()).dtype) + 1)
    return model.eval()


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


BATCH_NORMS: list[tuple[Callable[..., nn.Module], tuple[int, ...]]] = [
    (nn.BatchNorm1d, (5,)), (nn.BatchNorm1d, (7,)), (nn.BatchNorm2d, (5, 4)), (nn.BatchNorm3d, (3, 2, 2)), (nn.SyncBatchNorm, (5, 4)),
]  # fmt: skip
IDS = ["1d", "1d_long", "2d", "3d", "sync"]


# ---- BatchNorm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "space"), BATCH_NORMS, ids=IDS)
@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 16), (6, 2), (7, 1)])
def test_batch_norm_becomes_the_group_norm_of_its_channels(cls: Any, space: tuple[int, ...], channels: int, groups: int) -> None:
    """The very weights, by a function written out here."""
    torch.manual_seed(0)
    model = nn.Sequential(cls(channels, eps=0.01)).double()
    for p in model.parameters():
        p.data.normal_()
    model[0].weight.requires_grad_(False)
    found, report = fix_report(model)
    if cls is nn.BatchNorm1d:
        groups = {64: 8, 48: 4, 6: 1, 7: 1}[channels]
    x = torch.randn(B, channels, *space, dtype=torch.float64)
    parts = x.reshape(B, groups, -1)
    centred = parts - parts.mean(2, keepdim=True)
    normal = (centred / (centred.square().mean(2, keepdim=True) + 0.01).sqrt()).reshape(x.shape)
    shape = (1, channels, *[1] * len(space))
    expected = normal * model[0].weight.view(shape) + model[0].bias.view(shape)
    torch.testing.assert_close(found(x), expected, rtol=1e-10, atol=1e-12)
    assert [(c.layer, c.before, c.after) for c in report.changes] == [("0", cls.__name__, "GroupNorm")]
    assert not found[0].weight.requires_grad and found[0].bias.requires_grad
    assert report.left == ()


def test_vectors_keep_something_to_be_trained_on() -> None:
    """Opacus makes 16 groups of one number here, and the output no longer depends on the input; of groups of two, signs would be left."""
    found = fix(nn.BatchNorm1d(16), verbose=False)
    assert found.num_groups == 2
    torch.manual_seed(0)
    x = torch.randn(B, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad((found(x) * torch.randn(B, 16)).sum(), x)
    assert gradient.norm() > 1
    assert "nothing is left" in str(fix_report(nn.BatchNorm1d(1))[1])


@pytest.mark.parametrize(("cls", "space"), [*BATCH_NORMS[:4], (nn.BatchNorm1d, ())], ids=[*IDS[:4], "vectors"])
@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_batch_norm_keeps_its_function(cls: Any, space: tuple[int, ...], affine: bool) -> None:
    model = used(nn.Sequential(cls(6, eps=0.01, affine=affine), nn.Linear(*(space[-1:] or (6,)), 3)).double(), (6, *space))
    model[0].requires_grad_(False)
    found, report = fix_report(model)
    x = torch.randn(B, 6, *space, dtype=torch.float64)
    torch.testing.assert_close(found(x), model(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.train()(x), model(x), rtol=1e-10, atol=1e-10)
    assert isinstance(found[0], ChannelAffine) and report.changes[0].before == f"frozen {cls.__name__}"
    per_sample_norms(found, lambda o, y: losses(o.flatten(1), y), x, torch.arange(B) % 3)


def test_what_counts_as_frozen() -> None:
    """Trainable weights, batch statistics at all times, and a BatchNorm without weights in a model that trains are not."""
    cases = {
        "GroupNorm": [nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4, affine=False),
                      nn.BatchNorm2d(4, track_running_stats=False).requires_grad_(False)],
        "ChannelAffine": [nn.BatchNorm2d(4).requires_grad_(False), nn.BatchNorm2d(4, affine=False).eval()],
    }  # fmt: skip
    for name, modules in cases.items():
        assert [type(fix(m, verbose=False)).__name__ for m in modules] == [name] * len(modules)
    assert isinstance(fix(cases["ChannelAffine"][0], verbose=False, frozen_batchnorm="group_norm"), nn.GroupNorm)


def test_the_options_of_opacus() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6))
    assert [m.num_groups for m in fix(model, verbose=False, num_groups=2) if isinstance(m, nn.GroupNorm)] == [2, 2]
    found = fix(model, verbose=False, replace_bn_with_in=True)
    assert isinstance(found[1], nn.InstanceNorm2d) and torch.equal(found[1].weight, model[1].weight) and found[1].affine
    with pytest.raises(UnsupportedModelError, match="layer '3': its 6 channels"):
        fix(model, num_groups=4)
    with pytest.raises(UnsupportedModelError, match="no InstanceNorm for SyncBatchNorm"):
        fix(nn.SyncBatchNorm(4), replace_bn_with_in=True)
    with pytest.raises(ConfigError, match="remove one"):
        fix(model, num_groups=2, replace_bn_with_in=True)
    with pytest.raises(ConfigError, match="fold or group_norm"):
        fix(model, frozen_batchnorm="keep")  # type: ignore[arg-type]


# ---- everything else -----------------------------------------------------------------------------------------------


def test_settings_are_turned_off_and_said() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4, max_norm=0.5, norm_type=1.0, scale_grad_by_freq=True, sparse=True)
            self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
            self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.3, inplace=True)
            self.lstm, self.attention = nn.LSTM(4, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.drop(self.act(self.norm(self.embed(ids).transpose(1, 2)))).transpose(1, 2)
            h = self.lstm(h)[0]
            return self.head(self.attention(h, h, h)[0].mean(1))

    torch.manual_seed(0)
    model = Net().double()
    before = copy.deepcopy(model.state_dict())
    found, report = fix_report(model)
    text = str(report)
    for word in ("max_norm", "scale_grad_by_freq", "sparse", "InstanceNorm1d with running statistics", "ReLU(inplace=True)", "Dropout(inp"):
        assert word in text
    assert report.left == () and "LSTM" not in text and "Multihead" not in text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # the given model is left as it was
    ids = torch.randint(0, 9, (B, 5))
    torch.testing.assert_close(found.embed(ids), model.embed(ids))
    for name, p in found.named_parameters():
        assert name == "embed.weight" or torch.equal(p, before[name])
    found.train()
    found.drop.eval()
    exact(found, ids, torch.arange(B) % 3)


@pytest.mark.parametrize("make", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_is_taken_off_and_the_function_kept(make: Any) -> None:
    model = nn.Sequential(make(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    model(torch.randn(2, 6, dtype=torch.float64))
    found, report = fix_report(model)
    x = torch.randn(B, 6, dtype=torch.float64)
    assert "spectral_norm of the weight" in str(report)
    torch.testing.assert_close(found(x), model.eval()(x), rtol=1e-12, atol=1e-12)
    assert type(found[0]) is nn.Linear
    exact(found, x, torch.arange(B) % 3)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("make", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm_is_exact_as_it_is(make: Any) -> None:
    """The older kind keeps a computed weight, which cannot be copied like a parameter."""
    model = nn.Sequential(make(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(B, 6, dtype=torch.float64)
    model(x).sum().backward()
    found, report = fix_report(model)
    assert str(report) == "nothing had to be replaced"
    torch.testing.assert_close(found(x), model(x), rtol=0, atol=0)
    exact(found, x, torch.arange(B) % 3)


def test_what_is_still_refused_is_reported_all_at_once() -> None:
    class Strange(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(Strange(3), nn.BatchNorm2d(3), nn.Sequential(Strange(3)), nn.Linear(3, 3))
    _, report = fix_report(model)
    assert [c.layer for c in report.changes] == ["1"]
    assert len(report.left) == 2 and "'0'" in report.left[0] and "'2.0'" in report.left[1]
    with pytest.raises(UnsupportedModelError, match=r"(?s)'0'.*one forward pass.*'1'.*one forward pass"):
        fix(nn.Sequential(nn.LazyBatchNorm2d(), nn.LazyLinear(3)))
    both = nn.Sequential(parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(3, 3))))
    assert "another parametrization" in fix_report(both)[1].left[0]

    class Uncopied(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no")

    with pytest.raises(UnsupportedModelError, match="Uncopied cannot be copied"):
        fix(Uncopied())


def test_a_module_that_is_used_twice_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    shared = nn.BatchNorm2d(4)
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.Conv2d(3, 4, 3), shared), "b": nn.Sequential(shared, nn.ReLU(True)), "c": nn.BatchNorm2d(4)}
    )
    model["c"].weight = shared.weight
    found = fix(model)
    assert found["a"][1] is found["b"][0] and isinstance(found["a"][1], nn.GroupNorm)
    assert found["c"].weight is found["a"][1].weight
    assert capsys.readouterr().out == "BatchNorm2d -> GroupNorm: a.1, c\nReLU(inplace=True) -> inplace=False: b.1\n"
    assert fix(found, verbose=False).state_dict().keys() == found.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_device_precision_and_mode_are_kept(dtype: torch.dtype) -> None:
    for frozen in (False, True):
        model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4)).to(dtype).requires_grad_(not frozen)
        model[0].eval()
        found = fix(model, verbose=False)
        assert {x.dtype for x in (*found.parameters(), *found.buffers())} == {dtype}
        assert [m.training for m in found] == [False, True]
    with torch.device("meta"):
        found = fix(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4).requires_grad_(False)), verbose=False)
    assert {x.device.type for x in (*found.parameters(), *found.buffers())} == {"meta"}


# ---- models of timm and torchvision --------------------------------------------------------------------------------


def oracle(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """Gradients of single examples, by autograd."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        found = torch.autograd.grad(losses(model(x[i : i + 1]), y[i : i + 1]).sum(), [model.get_parameter(n) for n in names])
        rows.append(dict(zip(names, found, strict=True)))
    return rows


def exact(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Norms and clipped sums against the oracle."""
    rows = oracle(model, x, y)
    norms = torch.stack([torch.stack([g.square().sum() for g in row.values()]).sum().sqrt() for row in rows])
    torch.testing.assert_close(per_sample_norms(model, losses, x, y), norms, rtol=1e-9, atol=1e-12)
    clip = float(norms.median())
    sums = clipped_sum(model, losses, x, y, max_grad_norm=clip)
    for name in rows[0]:
        expected = sum(row[name] * min(1.0, clip / float(norm)) for row, norm in zip(rows, norms, strict=True))
        torch.testing.assert_close(sums[name], expected, rtol=1e-8, atol=1e-11)


SMALL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm_resnet": (lambda: timm.create_model("resnet10t", num_classes=3, channels=(8, 8, 16, 16), stem_width=8), 64),
    "timm_fused": (lambda: timm.create_model("mobilenetv2_035", num_classes=3), 64),
    "timm_seresnet": (lambda: timm.create_model("seresnet18", num_classes=3, channels=(8, 8, 16, 16)), 32),
    "torchvision_mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=3, width_mult=0.1), 32),
    "torchvision_densenet": (lambda: torchvision.models.DenseNet(4, (1, 1), 8, num_classes=3), 32),
}


@pytest.mark.parametrize("name", SMALL)
def test_models_of_timm_and_torchvision(name: str) -> None:
    """Weights are kept, nothing is refused, a second time changes nothing; frozen: the evaluation output is what it was."""
    make, size = SMALL[name]
    torch.manual_seed(0)
    model = make().double()
    found, report = fix_report(model)
    assert report.left == () and not has_batch_norm(found)
    assert not any(getattr(m, "inplace", False) for m in found.modules())
    kept = sorted((tuple(p.shape), float(p.detach().norm())) for p in found.parameters())
    assert kept == sorted((tuple(p.shape), float(p.detach().norm())) for p in model.parameters())
    assert str(fix_report(found)[1]) == "nothing had to be replaced"
    x = torch.randn(B, 3, size, size, dtype=torch.float64)
    assert torch.isfinite(found(x)).all()
    model = used(model, (3, size, size)).requires_grad_(False)
    frozen, report = fix_report(model)
    assert {c.after.split(" ")[0] for c in report.changes} <= {"ChannelAffine", "inplace=False"}
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["timm_resnet", "timm_fused"])
def test_a_fixed_model_is_exact(name: str) -> None:
    make, size = SMALL[name]
    torch.manual_seed(0)
    model = fix(make().double(), verbose=False)
    for m in model.modules():
        if "drop" in type(m).__name__.lower():
            m.eval()
    exact(model, torch.randn(3, 3, size, size, dtype=torch.float64), torch.arange(3))


def test_the_activation_of_a_fused_batch_norm_stays() -> None:
    from timm.layers.norm_act import BatchNormAct2d

    model = used(nn.Sequential(BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Identity)).double(), (8, 4, 4))
    x = torch.randn(B, 8, 4, 4, dtype=torch.float64)
    found, report = fix_report(model)
    assert report.changes[0].after == "GroupNorm and its activation"
    expected = F.silu(F.group_norm(x, math.gcd(32, 8), model[0].weight, model[0].bias, model[0].eps))
    torch.testing.assert_close(found(x), expected, rtol=1e-12, atol=1e-12)
    frozen = fix(model.requires_grad_(False), verbose=False)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-10, atol=1e-10)
