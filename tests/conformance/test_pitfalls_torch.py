"""Counter-examples from published DP code, torch: handled exactly, or refused by name with the remedy (rows G of the pitfalls)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dptrain.errors import ConfigError, UnsupportedModelError
from dptrain.randomness import NOISE, RandomKey, StepNoise
from dptrain_torch import clipped_sum, gradients, make_plan, per_sample_norms, self_check, validate
from dptrain_torch.engine import full_batch
from dptrain_torch.gradients import Batch, bounded_sum
from dptrain_torch.losses import cross_entropy
from dptrain_torch.update import privatize, zeros
from dptrain_torch.uses import LinearUse
from tests.conformance.torch_oracle import assert_exact, fill, slow_layers

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0])


def mlp(*middle: nn.Module) -> nn.Module:
    """A small network with something in the middle."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), *middle, nn.Tanh(), nn.Linear(5, 3)).double()


def norm(sums: dict[str, torch.Tensor]) -> float:
    """L2 norm over all parameters."""
    return float(torch.stack([v.square().sum() for v in sums.values()]).sum().sqrt())


class HandTied(nn.Module):
    """G5, G23: the embedding's table used by a function, where no module call shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.mid(self.emb(x).mean(1))), self.emb.weight)


def test_a_functional_use_is_refused_and_could_not_break_the_bound() -> None:
    torch.manual_seed(0)
    model, x, y = HandTied().double(), torch.randint(0, 9, (4, 5)), torch.randint(0, 9, (4,))
    with pytest.raises(UnsupportedModelError, match=r"emb\.weight.*functional"):
        self_check(model, cross_entropy, x, y, make_plan(model, x))
    with pytest.raises(UnsupportedModelError, match=r"emb\.weight"):
        clipped_sum(model, cross_entropy, x, y, 0.01, two_pass=True)
    with pytest.raises(UnsupportedModelError, match=r"emb\.weight"):
        per_sample_norms(model, cross_entropy, x, y)
    for i in range(4):  # book-keeping releases what it measured
        assert norm(clipped_sum(model, cross_entropy, x[i : i + 1], y[i : i + 1], 0.01, check=False)) <= 0.01 * (1 + 1e-9)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False), nn.SyncBatchNorm(5)])
def test_batch_norm_is_refused_with_its_replacement(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer '1'.*GroupNorm"):
        per_sample_norms(mlp(layer), cross_entropy, X, Y)


def test_frozen_batch_norm_is_refused_too() -> None:
    layer = nn.BatchNorm1d(5).requires_grad_(False).eval()
    with pytest.raises(UnsupportedModelError, match="GroupNorm"):
        per_sample_norms(mlp(layer), cross_entropy, X, Y)


def test_all_problems_come_in_one_message() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.InstanceNorm2d(2, affine=True, track_running_stats=True), nn.BatchNorm2d(2)
    )
    with pytest.raises(UnsupportedModelError) as error:
        per_sample_norms(model, lambda z, y: z.flatten(1).sum(1), torch.zeros(2, 1, 5, 5), None)
    assert len(error.value.problems) == 3
    assert all(f"'{i}'" in str(error.value) for i in (1, 2, 3))


@pytest.mark.parametrize("arguments", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding_settings_that_break_the_bound_are_refused(arguments: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, **arguments), nn.Flatten(), nn.Linear(6, 3))
    with pytest.raises(UnsupportedModelError, match=next(iter(arguments))):
        per_sample_norms(model, cross_entropy, torch.zeros(2, 2, dtype=torch.long), Y[:2])


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        lambda z, y: F.cross_entropy(z, y, reduction="none").mean(0, keepdim=True),
        lambda z, y: float(F.cross_entropy(z, y).detach()),
        lambda z, y: z,
    ],
)
def test_a_loss_that_is_not_per_example_is_refused(loss: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="reduction='none'"):
        per_sample_norms(mlp(), loss, X, Y)


def test_a_loss_that_mixes_examples_is_refused_by_the_probe() -> None:
    def contrastive(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(z - z.mean(0), y, reduction="none")

    model = mlp()
    with pytest.raises(UnsupportedModelError, match="depends on its batch"):
        self_check(model, contrastive, X, Y, make_plan(model, X))


class BatchCentring(nn.Module):
    """G8: a layer without parameters that mixes examples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def test_a_layer_that_mixes_examples_is_refused_by_the_probe() -> None:
    model = mlp(BatchCentring())
    with pytest.raises(UnsupportedModelError, match="depends on its batch"):
        self_check(model, cross_entropy, X, Y, make_plan(model, X))


class Running(nn.Module):
    """G24: a buffer updated from data."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.detach().mean(0)
        return x


def test_a_buffer_that_stores_data_is_refused_and_restored() -> None:
    model = mlp(Running())
    with pytest.raises(UnsupportedModelError, match=r"buffer '1\.seen'"):
        self_check(model, cross_entropy, X, Y, make_plan(model, X))
    before = model[1].seen.clone()
    with pytest.raises(UnsupportedModelError):
        self_check(model, cross_entropy, X, Y, make_plan(model, X[:2]))
    assert not torch.equal(before, torch.zeros(5))  # make_plan ran the model; the check itself left the buffer alone


class TimeFirst(nn.Module):
    """G9: the layer sees [T, B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.fc(x.transpose(0, 1))).mean(0))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
def test_a_batch_axis_that_is_not_first_is_found(length: int) -> None:
    """Also where T happens to equal the size of one probe, or that of the batch."""
    x = torch.randn(4, length, 6).double()
    plan = assert_exact(fill(TimeFirst()), x, Y, cross_entropy)
    assert slow_layers(plan) == []


class Rolled(nn.Module):
    """G9: rows ``[k B]`` with the examples innermost, which no shape gives away."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.fc(x.transpose(0, 1).reshape(-1, 6))  # row t B + i belongs to example i
        return self.head(torch.tanh(rows).view(x.shape[1], len(x), 5).mean(0))


def test_examples_that_are_not_outermost_are_refused() -> None:
    x = torch.randn(4, 3, 6).double()
    with pytest.raises(UnsupportedModelError, match=r"fc\.weight.*rows of one example among those of another"):
        per_sample_norms(Rolled().double(), cross_entropy, x, Y)
    with pytest.raises(UnsupportedModelError, match=r"fc\.weight.*rows of one example among those of another"):
        validate(Rolled().double(), x)


class Indexed(nn.Module):
    """A parameter expanded to a size that one batch has too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.randn(1, 6)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(x * self.scale.expand(x.shape[1], -1)).mean(1))


def test_a_batch_that_cannot_be_told_from_a_dimension_is_refused() -> None:
    """G9: with 5 examples the expansion to 5 positions looks like one copy per example; nothing may be trained on that guess."""
    model = fill(Indexed())
    x, y = torch.randn(6, 5, 6).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    plan = assert_exact(model, x, y, cross_entropy)
    with pytest.raises(ConfigError, match="another physical batch size"):
        bounded_sum(model, cross_entropy, full_batch(x[:5], y[:5]), plan)
    bounded_sum(model, cross_entropy, full_batch(x[:4], y[:4]), plan)


def test_ghost_norms_that_cancel_are_rounded_up() -> None:
    """G11: positions cancel almost exactly; in float32 the double sum loses every digit, and must not be under-estimated."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    a = torch.ones(3, 64, 8) * 30 + 1e-5 * torch.randn(3, 64, 8)
    signs = torch.tensor([1.0, -1.0]).repeat(32)[:, None] * 30

    def loss(z: torch.Tensor, y: Any) -> torch.Tensor:
        return (z * signs.to(z.dtype)).sum((1, 2))

    exact = per_sample_norms(layer.double(), loss, a.double(), None, "per_sample")
    ours = per_sample_norms(layer.float(), loss, a, None, "ghost").double()
    assert bool((ours >= exact * (1 - 1e-4)).all())
    for i in range(3):
        part = clipped_sum(layer, loss, a[i : i + 1], None, 1e-3, "ghost")["weight"]
        assert float(part.norm()) <= 1e-3 * (1 + 1e-4)


class Checkpointed(nn.Module):
    """G13: layers, a bare parameter and a normalisation inside an activation checkpoint, a class token before it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(6))
        self.fc, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * torch.tanh(self.norm(self.fc(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), x.unsqueeze(1)], 1)
        h = checkpoint(self.block, h, **self.settings) if self.settings else self.block(h)
        return self.head(h[:, 0])


@pytest.mark.parametrize("two_pass", [False, True])
def test_activation_checkpointing_changes_nothing(two_pass: bool) -> None:
    """G13: recomputed without reentrance; the other kind is refused with the remedy."""
    model = Checkpointed(use_reentrant=False).double()
    one = clipped_sum(model, cross_entropy, X, Y, 0.1, two_pass=two_pass)
    model.settings = {}
    two = clipped_sum(model, cross_entropy, X, Y, 0.1)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)
    model.settings = {"use_reentrant": True}
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        per_sample_norms(model, cross_entropy, X, Y)


class Autocast(nn.Module):
    """G13: a model that computes in bfloat16 and keeps its parameters in float32."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


def test_autocast_stays_within_the_bound() -> None:
    inner = fill(Checkpointed()).float()
    x = X.float()
    exact = per_sample_norms(inner, cross_entropy, x, Y)
    torch.testing.assert_close(per_sample_norms(Autocast(inner), cross_entropy, x, Y), exact, rtol=3e-2, atol=0)
    for i in range(4):
        assert norm(clipped_sum(Autocast(inner), cross_entropy, x[i : i + 1], Y[i : i + 1], 1e-3)) <= 1e-3 * (1 + 1e-4)


def test_a_second_forward_pass_before_the_backward_pass() -> None:
    """G6: a model that calls its layers twice, and a pass of its own without gradients in between."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.token = mlp(), nn.Parameter(torch.randn(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.body(x * self.token)
            with torch.no_grad():
                shift = self.body(x + self.token)
            return first * self.body(x + self.token) + shift

    assert_exact(fill(Twice()), X, Y, cross_entropy)


def test_in_place_activations_of_a_real_network() -> None:
    """G12: torchvision's residual block, whose activations overwrite what normalisation and convolution gave."""
    from torchvision.models.resnet import BasicBlock

    block = BasicBlock(3, 3, norm_layer=lambda c: nn.GroupNorm(1, c))
    assert block.relu.inplace
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), block, nn.Flatten(), nn.Linear(48, 3))
    assert_exact(fill(model), torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double(), Y, cross_entropy)


def test_a_hand_tied_weight_beside_bare_parameters_is_followed() -> None:
    """G23: with a parameter of its own in the model, functions are watched, and the second use of the table is exact."""

    class Scaled(HandTied):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale.exp()

    assert_exact(fill(Scaled()), torch.arange(20).view(4, 5) % 9, torch.tensor([0, 8, 2, 5]), cross_entropy)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_are_all_frozen_are_an_error() -> None:
    """G28: a PEFT-wrapped model in inference mode trains nothing."""
    import peft

    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), peft.LoraConfig(r=2, target_modules=["0"]))
    model.double()
    trained = set(clipped_sum(model, cross_entropy, X, Y))
    assert trained and all("lora_" in name for name in trained)
    model.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="unfreeze"):
        validate(model, X)


def test_validate_leaves_everything_as_it_was_and_reports() -> None:
    model = Checkpointed().double()
    model.drop = nn.Dropout(0.5)
    model.register_buffer("kept", torch.ones(3))
    model.norm.eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    report = validate(model, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {layer.name: layer.method for layer in report.layers} == {"model": "bare", "fc": "rule", "norm": "rule", "head": "rule"}
    assert report.num_params == sum(p.numel() for p in model.parameters())
    assert "token" in str(report) and "Checkpointed" in str(report)
    assert validate(model, (X,), cross_entropy, Y) == report == validate(model, {"x": X[:1]})


def test_validate_lists_every_problem() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.BatchNorm1d(4), BatchCentring()).double()
    with pytest.raises(UnsupportedModelError) as error:
        validate(model, X)
    assert [("'1'" in p, "'3'" in p, "depends on its batch" in p) for p in error.value.problems] == [
        (True, False, False), (False, True, False), (False, False, True),
    ]  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"buffer '1\.seen'"):
        validate(mlp(Running()), X)
    with pytest.raises(UnsupportedModelError, match="unfreeze"):
        validate(mlp().requires_grad_(False), X)
    with pytest.raises(ConfigError, match="targets"):
        validate(mlp(), X, cross_entropy)


def test_an_error_in_attribution_that_leaves_the_sum_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of two examples' gradients is right if they are exchanged; the check must still refuse."""
    from dptrain_torch.uses import LinearUse

    original = LinearUse.weighted_sum
    monkeypatch.setattr(LinearUse, "weighted_sum", lambda self, w: original(self, w.flip(0)))
    with pytest.raises(UnsupportedModelError, match="rows of one example among those of another"):
        validate(mlp(), X)


@pytest.mark.parametrize("p", [0.5, 0.9])
@pytest.mark.parametrize("two_pass", [False, True])
def test_dropout_draws_one_mask_for_norm_and_gradient(p: float, two_pass: bool) -> None:
    """G21: one example stays within its bound, and is clipped to exactly C."""
    model = mlp(nn.Dropout(p))
    plan = make_plan(model, X, max_grad_norm=1e-3)
    for seed in range(20):
        torch.manual_seed(seed)
        sums = bounded_sum(model, cross_entropy, full_batch(X[:1], Y[:1]), plan, two_pass=two_pass).sums
        assert norm(sums) == pytest.approx(1e-3, rel=1e-9)


def test_dropout_inside_a_slow_layer_is_refused() -> None:
    model = nn.Sequential(nn.LSTM(6, 3, 2, dropout=0.5, batch_first=True))
    with pytest.raises(UnsupportedModelError, match="dropout to 0"):
        per_sample_norms(model, lambda z, y: z[0].sum((1, 2)), X[:, None].float(), Y)


def test_zero_gradients_and_non_finite_examples_have_finite_weights() -> None:
    """G19, G29, L15: zero input, NaN and infinity beside good examples; the good ones are untouched."""
    model = nn.Sequential(nn.Linear(6, 3, bias=False)).double()
    x = torch.stack(
        [
            X[0],
            torch.zeros(6, dtype=torch.float64),
            torch.full((6,), float("nan"), dtype=torch.float64),
            torch.full((6,), float("inf"), dtype=torch.float64),
            X[1],
        ]
    )
    y = torch.tensor([0, 1, 2, 0, 1])
    good = torch.tensor([0, 1, 4])
    for strategy in ("ghost", "per_sample"):
        for clipping in ("abadi", "automatic"):
            for way in ({}, {"two_pass": True}, {"lean": True}):
                plan = make_plan(model, x, strategy, clipping=clipping)
                grads = bounded_sum(model, cross_entropy, full_batch(x, y), plan, **way)
                clean = bounded_sum(model, cross_entropy, full_batch(x[good], y[good]), plan)
                torch.testing.assert_close(grads.sums, clean.sums, rtol=1e-12, atol=1e-15)
                assert float(grads.stats["nonfinite"]) == 2


@pytest.mark.parametrize("tied", [False, True])
def test_a_lean_sum_keeps_no_per_sample_gradient_and_is_the_same(tied: bool) -> None:
    first, head = nn.Linear(6, 6), nn.Linear(6, 3)
    model = nn.Sequential(first, nn.Tanh(), first if tied else nn.Linear(6, 6), head).double()
    plan, kept = make_plan(model, X, "per_sample", max_grad_norm=0.1), []

    class Watched(gradients.Accumulator):
        def finish(self, name: str) -> None:
            super().finish(name)
            kept.extend(use for use in self.ready[name] if use.instantiate().dim() == 3 and not isinstance(use, LinearUse))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "Accumulator", Watched)
        lean = bounded_sum(model, cross_entropy, full_batch(X, Y), plan, lean=True).sums
        assert not kept
        torch.testing.assert_close(lean, bounded_sum(model, cross_entropy, full_batch(X, Y), plan).sums, rtol=1e-12, atol=1e-15)
        assert len(kept) == len(plan.layers)


def test_a_lean_sum_keeps_what_is_smaller() -> None:
    """Eight positions of 3 + 4 numbers are more than a gradient of 12, one is not."""
    for positions, smaller in ((8, True), (1, False)):
        x = torch.randn(5, positions, 3, dtype=torch.float64)
        model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(4 * positions, 3)).double()
        plan, kept = make_plan(model, x, "per_sample", max_grad_norm=0.1), {}

        class Watched(gradients.Accumulator):
            def finish(self, name: str) -> None:
                super().finish(name)
                kept[name] = self.ready[name][0]  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gradients, "Accumulator", Watched)
            lean = bounded_sum(model, cross_entropy, full_batch(x, torch.arange(5) % 3), plan, lean=True).sums
        assert isinstance(kept["0.weight"], LinearUse) != smaller
        expected = bounded_sum(model, cross_entropy, full_batch(x, torch.arange(5) % 3), plan).sums
        torch.testing.assert_close(lean, expected, rtol=1e-12, atol=1e-15)


def test_padding_has_weight_zero_whatever_it_holds() -> None:
    model = mlp()
    x, y = torch.cat([X, torch.full((2, 6), float("nan")).double()]), torch.cat([Y, Y[:2]])
    plan = make_plan(model, X, max_grad_norm=0.1)
    mask = torch.tensor([True] * 4 + [False] * 2)
    padded = bounded_sum(model, cross_entropy, Batch(x, y, mask), plan).sums
    torch.testing.assert_close(padded, bounded_sum(model, cross_entropy, full_batch(X, Y), plan).sums, rtol=1e-12, atol=1e-15)


def test_every_trainable_parameter_gets_noise_used_or_not() -> None:
    """G4, G17: an empty batch, and a layer that no example reaches."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.expert = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Unused().double()
    plan = make_plan(model, X)
    assert "expert" in plan.groups[0].layers
    assert plan.groups[0].num_params == sum(p.numel() for p in model.parameters())
    for total in (zeros(model), bounded_sum(model, cross_entropy, full_batch(X, Y), plan)):
        sums = dict(total.sums)
        released = privatize(total, plan, {"all": 1.0}, StepNoise(RandomKey.make(NOISE), 0)).sums
        assert set(released) == {n for n, _ in model.named_parameters()}
        assert not total.sums  # freed as it went
        assert all(float((released[n] - sums[n]).abs().min()) > 0 for n in released)


def test_noise_has_the_planned_variance_per_group_and_is_independent() -> None:
    """math.md 7.4: chi-square on the variance of each group, two-sided, 1e-6; cross-correlations below 5.6 standard errors."""
    from scipy.stats import chi2

    model = nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 40)).double()
    x = torch.zeros(2, 60).double()
    plan, stds = make_plan(model, x, grouping="per_layer"), {"0": 0.5, "2": 3.0}
    key = RandomKey.make(NOISE, 3)
    draws = [privatize(zeros(model), plan, stds, StepNoise(key, step)).sums for step in range(2)]
    for prefix, std in stds.items():
        values = np.concatenate([d[n].numpy().ravel() for d in draws for n in d if n.startswith(prefix)])
        statistic = float((values**2).sum()) / std**2
        low, high = chi2.ppf([0.25e-6, 1 - 0.25e-6], len(values))  # two groups share 1e-6
        assert low < statistic < high
    flat = [d["0.weight"].numpy().ravel() for d in draws] + [draws[0]["2.weight"].numpy().ravel()]
    for i in range(3):
        for j in range(i):
            n = min(len(flat[i]), len(flat[j]))
            assert abs(np.corrcoef(flat[i][:n], flat[j][:n])[0, 1]) < 5.6 / np.sqrt(n)


def test_noise_does_not_depend_on_the_batch() -> None:
    model = mlp()
    plan = make_plan(model, X)
    noise = StepNoise(RandomKey.make(NOISE, 5), 0)
    difference = []
    for picks in ([0], [1, 2, 3]):
        total = bounded_sum(model, cross_entropy, full_batch(X[picks], Y[picks]), plan)
        sums = dict(total.sums)
        released = privatize(total, plan, {"all": 1.0}, noise)
        difference.append({n: released.sums[n] - sums[n] for n in sums})
    torch.testing.assert_close(difference[0], difference[1], rtol=0, atol=1e-12)


def test_unfreezing_after_planning_is_an_error() -> None:
    """G4: a parameter that the plan does not know must not be trained."""
    model = mlp()
    model[0].requires_grad_(False)
    plan = make_plan(model, X)
    model[0].requires_grad_(True)
    with pytest.raises(ConfigError, match="make a new plan"):
        bounded_sum(model, cross_entropy, full_batch(X, Y), plan)


def test_nothing_to_train_is_an_error() -> None:
    """G28."""
    model = mlp().requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="unfreeze"):
        per_sample_norms(model, cross_entropy, X, Y)
    model = mlp()
    with pytest.raises(UnsupportedModelError, match="nothing would be trained"):
        per_sample_norms(model, lambda z, y: cross_entropy(z.detach(), y), X, Y)


def test_an_input_overwritten_in_place_after_a_layer_read_it_is_an_error() -> None:
    """G12: the activation that was measured is gone."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.one(x).clone()
            z = self.two(h)
            h.data.mul_(1.0)  # hidden from autograd, not from us
            h.mul_(2.0)
            return z + h.sum(1, keepdim=True)

    with pytest.raises((UnsupportedModelError, RuntimeError), match=r"in place|inplace"):
        per_sample_norms(Overwrites().double(), cross_entropy, X, Y)


def test_weight_norm_goes_by_the_slow_method_and_is_exact() -> None:
    """G5: a parametrised weight is computed from others; the module as a whole is rebuilt per example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    rows = []
    for i in range(4):
        gradients = torch.autograd.grad(cross_entropy(model(X[i : i + 1]), Y[i : i + 1]).sum(), list(model.parameters()))
        rows.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    torch.testing.assert_close(per_sample_norms(model, cross_entropy, X, Y), torch.stack(rows), rtol=1e-9, atol=0)


def test_no_weight_gradient_is_computed_by_the_backward_pass() -> None:
    """Book-keeping: autograd is never asked for a weight gradient; native kernels see one only through our own weighted sums."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.masks: list[list[bool]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution_backward.default:
                self.masks.append(list(args[10]))
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(2, 2, 8, 8)
    model(x)
    plan = make_plan(model, x)
    with Watch() as watch:
        bounded_sum(model, cross_entropy, full_batch(x, Y[:2]), plan)
    from_autograd = [m for m in watch.masks if m[0]]
    assert from_autograd == [[True, False, False]]  # one input gradient between the convolutions, no weight gradient with it


def test_strided_1x1_convolutions_do_not_corrupt_memory() -> None:
    """oneDNN with two threads crashes on channels-last arrays whose surplus rows are not cut off; in a process of its own."""
    import subprocess
    import sys

    code = """
import numpy as np, torch
torch.set_num_threads(2)
from dptrain.config import TrainConfig
from dptrain.data import from_arrays
from dptrain.trainer import train
x = np.random.default_rng(0).standard_normal((24, 16, 16, 3)).astype(np.float32)
data = from_arrays(x, np.arange(24) % 3, num_classes=3)
for strategy in ("non_private", "ghost", "per_sample"):
    train(TrainConfig.parse({
        "model": {"name": "resnet18_gn", "width": 8, "norm_groups": 4}, "strategy": strategy,
        "privacy": {"noise_multiplier": 1.0}, "sampling": {"sample_rate": 0.9, "steps": 6},
        "performance": {"physical_batch_size": 3},
    }), "torch", data=data)
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "fine"), done.stderr[-500:]
