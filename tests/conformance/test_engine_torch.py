"""The torch engine for loops of the user's own: the same step as the trainer's, exact sums, and a refusal for every way to misuse it."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from accounting import PrivacyLedger, SampledGaussian, get_accountant
from dptrain.budget import BudgetError
from dptrain.errors import ConfigError, RunError, UnsupportedModelError
from dptrain.randomness import NOISE, SAMPLING, RandomKey, StepNoise
from dptrain.sampling import PoissonSampler
from dptrain_torch import SpectralLinear, clipped_sum, make_plan, privacy_engine
from dptrain_torch.fitting.first_step import check_first_step, coupled
from dptrain_torch.layers import BoundedInput, GroupSort
from dptrain_torch.losses import get_loss
from dptrain_torch.privacy_engine import PrivacyEngine

N = 60
torch.manual_seed(0)
X, Y = torch.randn(N, 1, 6, 6, dtype=torch.float64), torch.arange(N) % 3
DATA = TensorDataset(X, Y)


def net() -> nn.Module:
    """A small network, the same at every call."""
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(*layers).double()


def losses(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, reduction="none")


def engine_for(model: nn.Module, **settings: Any) -> tuple[PrivacyEngine, torch.optim.Optimizer]:
    """An engine attached to plain SGD with learning rate 1."""
    defaults: dict[str, Any] = {"sample_size": N, "expected_batch_size": 20, "epochs": 2, "noise_multiplier": 1.0, "max_grad_norm": 0.5}
    engine = PrivacyEngine(model, **{**defaults, **settings})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine.attach(optimizer)
    return engine, optimizer


def weights(model: nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def run(model: nn.Module, step: Any, batches: Any) -> None:
    """A user's loop."""
    for x, y in batches:
        step(loss=losses(model(x), y))


# ---- the step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["mixed_ghost", "ghost", "per_sample"])
@pytest.mark.parametrize("physical", [None, 7])
def test_a_step_is_the_clipped_sum_of_the_drawn_examples_plus_the_noise(strategy: str, physical: int | None) -> None:
    """Rebuilt from the public clipped sum, the sampler and the noise, for every step of a pass."""
    model = net()
    engine, optimizer = engine_for(model, unsafe_seed=3, strategy=strategy, physical_batch_size=physical)
    reference = net()
    sampler = PoissonSampler(N, 20 / N, RandomKey.make(SAMPLING, 3))
    steps = 0
    for x, y in engine.loader(DATA):
        optimizer.step(loss=losses(model(x), y))
        if not engine.stepped:
            continue
        drawn = torch.from_numpy(sampler.sample(steps))
        total = clipped_sum(reference, losses, X[drawn], Y[drawn], max_grad_norm=0.5)
        noise = StepNoise(RandomKey.make(NOISE, 3), steps)
        with torch.no_grad():
            for stream, (name, p) in enumerate(reference.named_parameters()):
                p -= (total[name] + 0.5 * torch.from_numpy(noise.normal(stream, tuple(p.shape), np.float64))) / 20
        steps += 1
        np.testing.assert_allclose(weights(model), weights(reference), rtol=1e-9, atol=1e-12)
    assert steps == 3
    assert engine.ledger.num_releases == 3


def test_padding_of_an_empty_batch_releases_noise_alone() -> None:
    model = net()
    engine, optimizer = engine_for(model, sample_rate=1e-9, expected_batch_size=None, epochs=None, steps=3, unsafe_seed=1)
    before = weights(model)
    x, y = next(iter(engine.loader(DATA)))
    optimizer.step(loss=losses(model(x), y))
    moved = (before - weights(model)) * 1e-9 * N
    expected = [
        StepNoise(RandomKey.make(NOISE, 1), 0).normal(i, tuple(p.shape), np.float64).ravel() for i, p in enumerate(model.parameters())
    ]
    np.testing.assert_allclose(moved, 0.5 * np.concatenate(expected), rtol=1e-6)
    assert engine.ledger.num_releases == 1


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.Adam(p, lr=1e-3), lambda p: torch.optim.AdamW(p, lr=1e-3), lambda p: torch.optim.RMSprop(p, lr=1e-3),
    lambda p: torch.optim.Adagrad(p, lr=1e-3), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    lambda p: torch.optim.NAdam(p),
])  # fmt: skip
def test_any_optimizer_and_scheduler_see_the_released_gradient(make: Any) -> None:
    """The same released gradients given to a plain optimizer with the same scheduler lead to the same weights."""
    model, twin = net(), net()
    engine = PrivacyEngine(model, sample_size=N, expected_batch_size=20, epochs=2, noise_multiplier=1.0, unsafe_seed=5)
    parts = nn.ParameterList(model.parameters())
    optimizer = make([{"params": list(parts)[:2]}, {"params": list(parts)[2:], "lr": 1e-2}])
    early = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    engine.attach(optimizer)
    twins = list(twin.parameters())
    plain = make([{"params": twins[:2]}, {"params": twins[2:], "lr": 1e-2}])
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 1, gamma=0.5)
    sampler = PoissonSampler(N, 20 / N, RandomKey.make(SAMPLING, 5))
    for step, (x, y) in enumerate(engine.loader(DATA, physical_batch_size=N)):
        optimizer.step(loss=losses(model(x), y))
        optimizer.zero_grad()
        early.step()
        drawn = torch.from_numpy(sampler.sample(step))
        total = clipped_sum(twin, losses, X[drawn], Y[drawn], max_grad_norm=1.0)
        for stream, (name, p) in enumerate(twin.named_parameters()):
            drawn_noise = StepNoise(RandomKey.make(NOISE, 5), step).normal(stream, tuple(p.shape), np.float64)
            p.grad = (total[name] + torch.from_numpy(drawn_noise)) / 20
        plain.step()
        scheduler.step()
    assert all(p.grad is None for p in model.parameters())
    np.testing.assert_allclose(weights(model), weights(twin), rtol=1e-7, atol=1e-10)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in plain.param_groups]


def test_virtual_steps_accumulate_and_the_loader_says_when_to_release() -> None:
    """The loop of private_vision's second example, on Poisson batches: its own count of accumulation steps cannot split a batch."""
    model, other = net(), net()
    one, first = engine_for(model, unsafe_seed=2)
    two, second = engine_for(other, unsafe_seed=2)
    for x, y in one.loader(DATA, physical_batch_size=5):
        first.step(loss=losses(model(x), y))
    for i, (x, y) in enumerate(two.loader(DATA, physical_batch_size=5)):
        loss = losses(other(x), y)
        if i % 3 == 0:
            second.step(loss=loss)
            second.zero_grad()
        else:
            second.virtual_step(loss=loss)
    np.testing.assert_array_equal(weights(model), weights(other))
    assert one.ledger.num_releases == two.ledger.num_releases == 3


def test_two_forward_passes_of_one_loss_are_both_counted() -> None:
    """Two views of each example (pitfalls.md G6): the sum equals that of the model called twice inside a wrapper."""

    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner(-x)

    model, twin = net(), net()
    engine, optimizer = engine_for(model, unsafe_seed=2, noise_multiplier=1e-5, steps=1, epochs=None)
    for x, y in engine.loader(DATA, physical_batch_size=N):
        optimizer.step(loss=losses(model(x) + model(-x), y))
    drawn = torch.from_numpy(PoissonSampler(N, 20 / N, RandomKey.make(SAMPLING, 2)).sample(0))
    total = clipped_sum(Twice(twin), losses, X[drawn], Y[drawn], max_grad_norm=0.5)
    start = net()
    for (name, p), before in zip(model.named_parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(before - p, total[f"inner.{name}"] / 20, rtol=0, atol=1e-5)


def test_evaluation_between_steps_leaves_no_trace() -> None:
    """With and without gradients, in both modes, other batch sizes, a failing call."""
    model, twin = net(), net()
    one, first = engine_for(model, unsafe_seed=4)
    two, second = engine_for(twin, unsafe_seed=4)
    for x, y in one.loader(DATA, physical_batch_size=N):
        model.eval()
        with torch.no_grad():
            model(X[:7])
        model(X[:7])
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 3, dtype=torch.float64))
        model.train()
        first.step(loss=losses(model(x), y))
    for x, y in two.loader(DATA, physical_batch_size=N):
        second.step(loss=losses(twin(x), y))
    np.testing.assert_array_equal(weights(model), weights(twin))
    assert not any(m._forward_hooks for m in model.modules())


def test_detaching_restores_model_and_optimizer() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step, before = optimizer.step.__func__, set(vars(optimizer))  # type: ignore[attr-defined]
    engine = PrivacyEngine(model, sample_size=N, expected_batch_size=20, epochs=1, noise_multiplier=1.0)
    engine.attach(optimizer)
    with pytest.raises(ConfigError, match="attached already"):
        engine.attach(optimizer)
    engine.detach()
    assert optimizer.step.__func__ is step  # type: ignore[attr-defined]
    assert set(vars(optimizer)) == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    losses(model(X), Y).mean().backward()
    optimizer.step()


def test_a_model_that_is_one_layer() -> None:
    model = nn.Linear(36, 3).double()
    engine, optimizer = engine_for(model)
    for x, y in engine.loader(DATA):
        optimizer.step(loss=losses(model(x.flatten(1)), y))
    assert engine.ledger.num_releases == 3


def test_dropout_uses_the_very_masks_of_the_users_pass() -> None:
    """The first-step check compares with autograd on the same graph, so it would fail if masks were drawn again."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)).double()
    engine, optimizer = engine_for(model)
    for x, y in engine.loader(DATA):
        optimizer.step(loss=losses(model(x), y))
    assert engine.steps == 3


class TokenModel(nn.Module):
    """A class token, a position embedding and a layer scale, owned by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(6, 8)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(0.1 * torch.ones(1, 7, 8))
        self.scale, self.head = nn.Parameter(0.5 * torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x.squeeze(1))], 1) + self.position
        return self.head((torch.tanh(h) * self.scale)[:, :3].mean(1))


@pytest.mark.parametrize("probed", [False, True])
def test_bare_parameters_are_tapped_in_the_users_own_pass(probed: bool) -> None:
    torch.manual_seed(0)
    model = TokenModel().double()
    twin = copy.deepcopy(model)
    engine, optimizer = engine_for(model, unsafe_seed=6, noise_multiplier=1e-5, steps=1, epochs=None, probe=X[:3] if probed else None)
    for x, y in engine.loader(DATA, physical_batch_size=N):
        optimizer.step(loss=losses(model(x), y))
    drawn = torch.from_numpy(PoissonSampler(N, 20 / N, RandomKey.make(SAMPLING, 6)).sample(0))
    total = clipped_sum(twin, losses, X[drawn], Y[drawn], max_grad_norm=0.5)
    for (name, p), before in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(before - p, total[name] / 20, rtol=0, atol=1e-5)
    assert float(total["token"].norm()) > 1e-3
    assert engine.plan is not None
    assert {layer.name: layer.kind for layer in engine.plan.layers}["patch"] == "linear"


def test_other_strategies() -> None:
    model = net()
    engine, optimizer = engine_for(model, strategy="non_private", max_grad_norm=None, noise_multiplier=None)
    for x, y in engine.loader(DATA, physical_batch_size=N):
        optimizer.step(loss=losses(model(x), y))
    assert engine.steps == 3
    with pytest.raises(RunError, match="no ledger"):
        engine.epsilon()
    lipschitz = nn.Sequential(nn.Flatten(), BoundedInput(1.0), SpectralLinear(36, 8), GroupSort(2), SpectralLinear(8, 3))
    with pytest.raises(ConfigError, match="probe"):
        engine_for(lipschitz, strategy="clipless", max_grad_norm=None, loss=get_loss("cross_entropy"))
    engine, optimizer = engine_for(lipschitz, strategy="clipless", max_grad_norm=None, loss=get_loss("cross_entropy"), probe=X[:2].float())
    data = TensorDataset(X.float(), Y)
    for _ in range(2):
        for x, y in engine.loader(data):
            optimizer.step(loss=losses(lipschitz(x), y))
    assert engine.ledger.num_releases == 6
    norms = [float(torch.linalg.matrix_norm(m.weight.detach(), 2)) for m in lipschitz if isinstance(m, SpectralLinear)]
    assert max(norms) <= 1 + 1e-5


def test_clipless_proves_its_bounds_again_for_weights_that_somebody_else_wrote() -> None:
    lipschitz = nn.Sequential(nn.Flatten(), BoundedInput(1.0), SpectralLinear(36, 8), GroupSort(2), SpectralLinear(8, 3))
    settings = {"strategy": "clipless", "max_grad_norm": None, "loss": get_loss("cross_entropy"), "probe": X[:2].float(), "epochs": 9}
    engine, optimizer = engine_for(lipschitz, **settings)
    data = TensorDataset(X.float(), Y)
    batches = iter(engine.loader(data, physical_batch_size=N))
    x, y = next(batches)
    optimizer.step(loss=losses(lipschitz(x), y))
    assert engine._in_force is not None
    before = dict(engine._in_force.stds)
    with torch.no_grad():
        for module in lipschitz:
            if isinstance(module, SpectralLinear):
                module.weight.mul_(3.0)
    x, y = next(batches)
    output = lipschitz(x)
    engine._bounded_sum(engine._recording, losses(output, y), torch.ones(len(y), dtype=torch.bool))  # type: ignore[arg-type]
    after = engine._in_force.stds
    assert max(after[name] / before[name] for name in before) > 2


# ---- accounting ----------------------------------------------------------------------------------------------------


def test_epsilon_is_the_accountants_and_the_budget_is_never_passed() -> None:
    model = net()
    engine, optimizer = engine_for(model, noise_multiplier=None, target_epsilon=2.0, target_delta=1e-6)
    event = engine.ledger
    for _ in range(5):  # two epochs were planned
        for x, y in engine.loader(DATA, physical_batch_size=N):
            optimizer.step(loss=losses(model(x), y))
    assert engine.num_steps == engine.ledger.num_releases == 6
    assert 1.9 < engine.epsilon() <= 2.0
    assert engine.epsilon() == get_accountant("prv").epsilon(event.events, 1e-6)
    assert engine.get_epsilon(1e-3) < engine.epsilon()
    for word in ("delta = 1e-06", "add_remove", "Poisson", "prv", "6 releases"):
        assert word in engine.statement()
    assert engine.get_privacy_spent()["epsilon"] == engine.epsilon()
    assert len(engine.loader(DATA)) == 0


def test_a_ledger_file_is_continued_and_counts_against_the_target(tmp_path: Any) -> None:
    path = tmp_path / "ledger.jsonl"
    model = net()
    engine, optimizer = engine_for(model, noise_multiplier=None, target_epsilon=1.0, ledger=path)
    for x, y in engine.loader(DATA, physical_batch_size=N):
        optimizer.step(loss=losses(model(x), y))
    assert PrivacyLedger.read(path).num_releases == 3  # on disk before each release
    engine.ledger.close()
    again, _ = engine_for(net(), noise_multiplier=None, target_epsilon=1.5, ledger=path)
    assert again.ledger.num_releases == 3
    planned = [*again.ledger.events, (SampledGaussian(again.noise_multiplier, 20 / N), 6)]
    assert get_accountant("prv").epsilon(planned, again.budget.privacy.target_delta) <= 1.5  # type: ignore[union-attr]


def test_state_dicts_make_a_round_trip() -> None:
    """Model, optimizer and engine: what was spent is known to the new engine, and noise indices do not repeat."""
    model = net()
    engine, optimizer = engine_for(model, unsafe_seed=8)
    for x, y in engine.loader(DATA, physical_batch_size=N):
        optimizer.step(loss=losses(model(x), y))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), engine.state_dict()))
    twin = net()
    other, second = engine_for(twin, unsafe_seed=8)
    twin.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    assert other.epsilon() == engine.epsilon()
    assert other.steps_left == engine.steps_left == 3
    for e, m, o in ((engine, model, optimizer), (other, twin, second)):
        for x, y in e.loader(DATA, physical_batch_size=N):
            o.step(loss=losses(m(x), y))
    np.testing.assert_array_equal(weights(model), weights(twin))
    other.load_state_dict(saved[2])  # an older state cannot win spending back
    assert other.ledger.num_releases == 6
    assert other.steps_left == 0
    for wrong in ({}, {"budget": None}, {"budget": {"steps": 1, "events": [[{"kind": "other"}, 1]]}}, []):
        with pytest.raises(RunError):
            other.load_state_dict(wrong)  # type: ignore[arg-type]
    assert "value" not in str(saved[2])


# ---- shuffled loaders of the user's own ----------------------------------------------------------------------------


def shuffled(size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=size, shuffle=True, **options)


def test_a_shuffled_loader_claims_no_amplification() -> None:
    """Epsilon is that of one full Gaussian release per pass and above that of Poisson sampling with the same noise."""
    model = net()
    engine, optimizer = engine_for(model, sampling="shuffle", epochs=3)
    for _ in range(3):
        for x, y in shuffled(20):
            optimizer.step(loss=losses(model(x), y))
    assert engine.ledger.num_releases == 3
    assert engine.steps == 9
    sigma = engine.ledger.events[0][0].noise_multiplier
    assert engine.ledger.events == ((SampledGaussian(sigma, 1.0), 3),)
    assert engine.epsilon() == pytest.approx(
        get_accountant("prv").epsilon([(SampledGaussian(sigma / math.sqrt(3), 1.0), 1)], 1e-5), rel=1e-3
    )
    poisson, _ = engine_for(net(), epochs=3)
    planned = get_accountant("prv").epsilon([(SampledGaussian(sigma, poisson.sample_rate), 9)], 1e-5)
    assert engine.epsilon() > 1.1 * planned
    assert "without amplification" in engine.statement()
    assert "zero_out" in engine.statement()
    with pytest.raises(BudgetError, match="used up"):
        optimizer.step(loss=losses(model(X[:20]), Y[:20]))


def test_a_physical_batch_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its float32 sum would round by more than the event pays for; nothing is recorded and no weight moves."""
    monkeypatch.setattr(privacy_engine, "MOST", 19)
    model = net()
    engine, optimizer = engine_for(model, sampling="shuffle", epochs=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="longer than 19"):
        optimizer.step(loss=losses(model(X[:20]), Y[:20]))
    assert engine.ledger.num_releases == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [20, 25, 7])
def test_passes_are_never_undercounted(size: int, drop_last: bool) -> None:
    """Whatever the batch size leaves over, every pass that an example can be in is recorded."""
    model = net()
    engine, optimizer = engine_for(model, sampling="shuffle", expected_batch_size=size, epochs=None, noise_multiplier=1.0)
    for passes in range(1, 5):
        for x, y in shuffled(size, drop_last=drop_last):
            optimizer.step(loss=losses(model(x), y))
        assert engine.ledger.num_releases >= passes
        if N % size == 0 or drop_last:
            assert engine.ledger.num_releases == passes


def test_accumulation_over_shuffled_batches() -> None:
    """One logical batch of up to ``expected_batch_size`` examples, never across two passes."""
    model = net()
    engine, optimizer = engine_for(model, sampling="shuffle", batch_size=20, expected_batch_size=None)
    for _ in range(2):
        for i, (x, y) in enumerate(shuffled(5)):
            loss = losses(model(x), y)
            if (i + 1) % 4:
                optimizer.virtual_step(loss=loss)
                assert not engine.stepped
            else:
                optimizer.step(loss=loss)
                assert engine.stepped
    assert engine.steps == 6
    fresh, optimizer = engine_for(net(), sampling="shuffle")
    model = fresh.module
    with pytest.raises(RunError, match="more than the expected_batch_size"):
        run(model, optimizer.virtual_step, shuffled(15))
    fresh, optimizer = engine_for(net(), sampling="shuffle")
    steps = itertools.cycle([optimizer.step] * 5 + [optimizer.virtual_step])
    with pytest.raises(RunError, match="two passes"):
        run(fresh.module, lambda loss: next(steps)(loss=loss), [*shuffled(10), *shuffled(10)])


def test_a_shuffled_loader_through_the_engine() -> None:
    model = net()
    engine, optimizer = engine_for(model, sampling="shuffle")
    loader = engine.loader(shuffled(20))
    assert len(loader) == 3
    for x, y in loader:
        optimizer.step(loss=losses(model(x), y))
    assert engine.ledger.num_releases == 1
    with pytest.raises(ConfigError, match="DataLoader"):
        engine.loader(DATA)


def test_passes_that_are_cut_short_are_releases_of_their_own() -> None:
    """An example may be in the first batch of every pass, so ten passes of one batch are ten releases, not one."""
    model = net()
    engine, optimizer = engine_for(model, sampling="shuffle", epochs=None)
    for _ in range(4):
        for x, y in engine.loader(shuffled(20)):
            optimizer.step(loss=losses(model(x), y))
            break
    assert engine.ledger.num_releases == engine.steps == 4
    planned, optimizer = engine_for(net(), sampling="shuffle", epochs=2)
    model = planned.module
    for _ in range(2):
        run(model, optimizer.step, [next(iter(planned.loader(shuffled(20))))])
    with pytest.raises(BudgetError, match="used up"):
        run(model, optimizer.step, [next(iter(planned.loader(shuffled(20))))])
    assert planned.ledger.num_releases == 2


def test_two_passes_at_once_are_refused() -> None:
    """Parts of two logical batches must not meet in one release: an example could be in both."""
    model = net()
    engine, optimizer = engine_for(model, unsafe_seed=2)
    first = iter(engine.loader(DATA, physical_batch_size=3))
    x, y = next(first)
    optimizer.step(loss=losses(model(x), y))
    second = iter(engine.loader(DATA, physical_batch_size=3))
    x, y = next(second)
    optimizer.step(loss=losses(model(x), y))
    with pytest.raises(RunError, match="one at a time"):
        next(first)
    assert engine.ledger.num_releases == 0


def test_a_frozen_parameter_with_an_old_gradient_does_not_move() -> None:
    """torch's optimizers apply whatever ``.grad`` holds; this one is a raw gradient of the data."""
    model = net()
    losses(model(X), Y).mean().backward()
    frozen = model[0].weight  # type: ignore[index]
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    engine, optimizer = engine_for(model)
    run(model, optimizer.step, engine.loader(DATA, physical_batch_size=N))
    assert engine.ledger.num_releases == 3
    torch.testing.assert_close(frozen, before, rtol=0, atol=0)


def test_a_module_that_is_replaced_is_refused() -> None:
    model = net()
    engine, optimizer = engine_for(model)
    model[-1] = nn.Linear(64, 3).double()  # type: ignore[operator]
    with pytest.raises(ConfigError, match="replaced"):
        run(model, optimizer.step, engine.loader(DATA, physical_batch_size=N))
    assert engine.ledger.num_releases == 0


def test_clipless_refuses_a_loss_that_couples_examples() -> None:
    """Each row of the cotangent is clipped, but another example would change every row."""
    model = nn.Sequential(nn.Flatten(), BoundedInput(1.0), SpectralLinear(36, 3))
    engine, optimizer = engine_for(model, strategy="clipless", max_grad_norm=None, loss=get_loss("cross_entropy"), probe=X[:2].float())
    batches = engine.loader(TensorDataset(X.float(), Y), physical_batch_size=N)
    with pytest.raises(UnsupportedModelError, match="depends on another example"):
        run(model, lambda loss: optimizer.step(loss=loss - loss.mean()), batches)
    assert engine.ledger.num_releases == 0


# ---- loaders -------------------------------------------------------------------------------------------------------


def test_the_loader_draws_each_example_with_its_probability_and_pads_with_weight_zero() -> None:
    engine, _ = engine_for(net(), epochs=None, steps=4000)
    counts, sizes, drawn = np.zeros(N), [], []
    loader = engine.loader(TensorDataset(torch.arange(N)), physical_batch_size=16)
    for _ in range(400):
        for (index,) in loader:
            assert engine._ticket is not None
            mask = engine._ticket.mask
            assert len(index) == len(mask) == 16
            np.add.at(counts, index.numpy()[mask], 1)
            drawn.append(int(mask.sum()))
            if engine._ticket.last:
                sizes.append(sum(drawn))
                drawn = []
            engine._served = True
    from scipy import stats

    total = len(sizes)
    assert total == 1200
    assert all(stats.binom.cdf(c, total, 1 / 3) > 1e-6 / N and stats.binom.sf(c - 1, total, 1 / 3) > 1e-6 / N for c in counts)
    assert abs(sum(sizes) - total * 20) / math.sqrt(total * 20 * 2 / 3) < stats.norm.isf(0.5e-6)


def test_workers_and_collate_functions_are_taken_over() -> None:
    model = net()
    engine, optimizer = engine_for(model)
    loader = DataLoader(DATA, batch_size=3, shuffle=True, num_workers=1, collate_fn=lambda items: {"x": torch.stack([i[0] for i in items]), "y": torch.stack([i[1] for i in items])})  # fmt: skip  # noqa: E501
    for batch in engine.loader(loader, physical_batch_size=8):
        assert batch["x"].shape == (8, 1, 6, 6)
        optimizer.step(loss=losses(model(batch["x"]), batch["y"]))
    assert engine.ledger.num_releases == 3


def test_an_interrupted_logical_batch_is_forgotten() -> None:
    """A partial sum must not enter the next release (pitfalls.md G22), and nothing is recorded for it."""
    model = net()
    engine, optimizer = engine_for(model, unsafe_seed=2)
    for x, y in engine.loader(DATA, physical_batch_size=3):
        optimizer.step(loss=losses(model(x), y))
        break
    assert engine.ledger.num_releases == 0
    np.testing.assert_array_equal(weights(model), weights(net()))
    reference = net()
    for x, y in engine.loader(DATA, physical_batch_size=N):
        optimizer.step(loss=losses(model(x), y))
        break
    drawn = torch.from_numpy(PoissonSampler(N, 20 / N, RandomKey.make(SAMPLING, 2)).sample(1))
    total = clipped_sum(reference, losses, X[drawn], Y[drawn], max_grad_norm=0.5)
    for stream, ((name, p), q) in enumerate(zip(model.named_parameters(), reference.parameters(), strict=True)):
        noise = torch.from_numpy(StepNoise(RandomKey.make(NOISE, 2), 0).normal(stream, tuple(p.shape), np.float64))
        torch.testing.assert_close(p, q - (total[name] + 0.5 * noise) / 20, rtol=1e-9, atol=1e-12)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(("data", "options", "words"), [
    (Stream(), {}, "map-style"),
    (TensorDataset(X[:5]), {}, "sample_size"),
    (DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * N, N)), {}, "WeightedRandomSampler"),
    (DATA, {"batch_size": 4}, "decide which"),
    (DATA, {"physical_batch_size": -2}, "physical_batch_size"),
    (iter(()), {}, "map-style"),
])  # fmt: skip
def test_loaders_that_are_refused(data: Any, options: dict[str, Any], words: str) -> None:
    engine, _ = engine_for(net())
    with pytest.raises(ConfigError, match=words):
        engine.loader(data, **options)


# ---- misuse --------------------------------------------------------------------------------------------------------


def test_every_misuse_of_a_step_is_refused_before_anything_is_spent() -> None:
    model = net()
    engine, optimizer = engine_for(model)
    start = weights(model)
    with pytest.raises(UnsupportedModelError, match="one value per example"):
        optimizer.step()
    with pytest.raises(UnsupportedModelError, match="one value per example"):
        optimizer.step(loss=losses(model(X), Y).mean())
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step(lambda: 1.0)
    with pytest.raises(RunError, match="does not come from engine"):
        optimizer.step(loss=losses(model(X[:4]), Y[:4]))
    with pytest.raises(UnsupportedModelError, match="no trainable parameter"):
        optimizer.step(loss=torch.ones(4))
    x, y = next(iter(engine.loader(DATA, physical_batch_size=6)))
    with pytest.raises(UnsupportedModelError, match="3 values for a physical batch of 6"):
        optimizer.step(loss=losses(model(x), y)[:3])
    with pytest.raises(RunError, match="was not passed"):
        for _ in engine.loader(DATA, physical_batch_size=6):
            pass
    batches = iter(engine.loader(DATA, physical_batch_size=6))
    x, y = next(batches)
    optimizer.step(loss=losses(model(x), y))
    with pytest.raises(RunError, match=r"does not come from engine.loader|was not called"):
        optimizer.step(loss=losses(model(x), y))
    assert engine.ledger.num_releases == 0 or engine.stepped is False
    assert engine.ledger.num_releases <= 1
    if engine.ledger.num_releases == 0:
        np.testing.assert_array_equal(weights(model), start)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.table(x).mean(1), self.table.weight)


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(36, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x.flatten(1))
        return self.two(h - h.mean(0))


@pytest.mark.parametrize("case", ["tied by hand", "batch centred", "coupled loss", "outside the model", "frozen later", "unfrozen later"])
def test_the_first_step_shows_what_the_tap_cannot_see(case: str) -> None:
    """G5, G8, G7, G4 and G23 of pitfalls.md, met in a user's loop; nothing is recorded or trained."""
    model: nn.Module = {"tied by hand": Tied, "batch centred": Centred}.get(case, lambda: net().float())()
    if case == "unfrozen later":
        model[0].weight.requires_grad_(False)  # type: ignore[index]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    engine = PrivacyEngine(model, sample_size=N, expected_batch_size=20, epochs=2, noise_multiplier=1.0)
    engine.attach(optimizer)
    tokens = TensorDataset(torch.randint(0, 10, (N, 5)), torch.randint(0, 10, (N,)))
    data = tokens if case == "tied by hand" else TensorDataset(X.float(), Y)
    if "later" in case:
        model[0].weight.requires_grad_(case == "unfrozen later")  # type: ignore[index]
    start = weights(model)
    change = {
        "coupled loss": lambda loss: loss - 0.1 * loss.mean(),
        "outside the model": lambda loss: loss + model[-1](torch.ones(1, 64)).square().sum(),  # type: ignore[index]
    }.get(case, lambda loss: loss)
    with pytest.raises((UnsupportedModelError, ConfigError)):
        run(model, lambda loss: optimizer.step(loss=change(loss)), engine.loader(data, physical_batch_size=N))
    assert engine.ledger.num_releases == 0
    np.testing.assert_array_equal(weights(model), start)


def test_optimizers_that_are_refused() -> None:
    model = net()

    def fresh() -> PrivacyEngine:
        return PrivacyEngine(model, sample_size=N, expected_batch_size=20, epochs=1, noise_multiplier=1.0)

    with pytest.raises(ConfigError, match="LBFGS"):
        fresh().attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ConfigError, match="not the model's"):
        fresh().attach(torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(3))], lr=0.1))
    with pytest.raises(ConfigError, match="lacks 2"):
        fresh().attach(torch.optim.SGD(list(model.parameters())[2:], lr=0.1))


@pytest.mark.parametrize(("settings", "words"), [
    ({"named_params": [("a", 1)]}, "named_params"),
    ({"target_epsilon": 3.0}, "of 6 steps with this noise 0 fit"),
    ({"noise_multiplier": None}, "target_epsilon or noise_multiplier"),
    ({"noise_multiplier": None, "target_epsilon": 3.0, "epochs": None}, "epochs or steps"),
    ({"batch_size": 20}, "the same"),
    ({"expected_batch_size": None}, "exactly one"),
    ({"expected_batch_size": 1000}, "expected batch size"),
    ({"sample_size": 0}, "sample_size"),
    ({"epochs": 0}, "epochs"),
    ({"epochs": float("nan")}, "epochs"),
    ({"strategy": "ghosts"}, "no strategy"),
    ({"clip_function": "global"}, "clip_function"),
    ({"accounting_mode": "gdp"}, "under-reports"),
    ({"mixed": True, "strategy": "ghost"}, "remove one"),
    ({"sampling": "sequential"}, "no sampling"),
    ({"unknown": 1}, "unknown"),
    ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ({"noise_multiplier": -1.0}, "noise_multiplier"),
    ({"target_delta": 1.5}, "target_delta"),
    ({"relation": "neighbours"}, "relation"),
])  # fmt: skip
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine_for(net(), **settings)


@pytest.mark.parametrize(("settings", "name", "clipping"), [
    ({"ghost_clipping": True, "mixed": True}, "mixed_ghost", "abadi"),
    ({"ghost_clipping": True, "mixed": False}, "ghost", "abadi"),
    ({"ghost_clipping": False, "mixed": True}, "per_sample", "abadi"),
    ({"clip_function": "vanilla", "alphas": [2, 3], "record_snr": True, "eps_error": 0.1}, "mixed_ghost", "abadi"),
    ({"clip_function": "autos", "numerical_stability_constant": 1e-3}, "mixed_ghost", "automatic"),
    ({"strategy": "per_sample", "accounting_mode": "rdp_cks"}, "per_sample", "abadi"),
])  # fmt: skip
def test_the_arguments_of_private_vision(settings: dict[str, Any], name: str, clipping: str) -> None:
    engine, _ = engine_for(net(), **settings)
    assert engine.strategy.name == name
    assert engine.strategy.clipping == clipping  # type: ignore[attr-defined]
    assert engine.budget is not None
    assert engine.budget.privacy.accountant == ("rdp" if "accounting_mode" in settings else "prv")


def first_step(factor: float, mixed: float = 0.0, poison: bool = False) -> bool:
    """The check of a first step of a linear map, with its norms multiplied by a factor."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    if poison:
        x[3] = math.inf
    output = model(x)
    values = output.square().sum(1)
    values = values + mixed * output[2].sum()
    grads = [torch.autograd.grad(values[i], list(model.parameters()), retain_graph=True) for i in range(4)]
    norms = {"all": factor * torch.stack([torch.stack([g.square().sum() for g in gs]).sum().sqrt() for gs in grads])}
    plan = make_plan(model, torch.randn(4, 3, dtype=torch.float64))
    edges = [get_gradient_edge(output)]
    return check_first_step(model, plan, edges, [output], values, torch.ones(4, dtype=torch.bool), norms)


def test_a_first_step_may_overestimate_norms_a_little_and_not_underestimate_them() -> None:
    """Ghost norms add the doubt of float32 to what they found (G11); a norm that is too small would break the bound."""
    assert first_step(1.0) and first_step(1.04)
    for factor in (0.999, 1.1, math.nan):
        with pytest.raises(UnsupportedModelError, match="an example's gradient has norm"):
            first_step(factor)


def test_a_first_step_tells_an_example_that_overflows_from_one_that_is_coupled() -> None:
    # 0 * inf stands in the row of the example that overflows, and in autograd's sum over the batch: the next step is checked.
    assert not first_step(1.0, poison=True)
    with pytest.raises(UnsupportedModelError, match="depends on another example"):
        first_step(1.0, poison=True, mixed=1e-3)
    with pytest.raises(UnsupportedModelError, match="depends on another example"):
        first_step(1.0, mixed=1e-3)


@pytest.mark.parametrize(("foreign", "broken", "found"), [(0.0, False, False), (1e-30, True, True), (math.inf, True, True),
                                                          (math.nan, True, False), (math.nan, False, True)])  # fmt: skip
def test_only_nan_in_the_row_of_an_example_that_is_broken_itself_is_excused(foreign: float, broken: bool, found: bool) -> None:
    gradient = torch.zeros(6, 2)
    gradient[2:4], gradient[5, 1] = 1.0, foreign  # two rows for each of three examples; the loss is the second one's
    assert bool(coupled((None, gradient), 1, torch.tensor([False, False, broken]))) is found


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_a_physical_batch_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="whole number above 0"):
        engine_for(net(), physical_batch_size=size)
    engine, _ = engine_for(net())
    with pytest.raises(ConfigError, match="whole number above 0"):
        engine.loader(DATA, physical_batch_size=size)
