"""The budget of a user's own loop: what it plans it keeps, and what was spent is never forgotten."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import NeighboringRelation, PrivacyLedger, SampledGaussian, get_accountant
from dptrain.budget import Budget, BudgetError, Schedule, open_ledger
from dptrain.config import Privacy
from dptrain.errors import ConfigError, RunError
from dptrain.mechanism import event_noise_multiplier


def spend(budget: Budget, steps: int) -> None:
    """Steps as the engines take them."""
    event = SampledGaussian(event_noise_multiplier(budget.noise_multiplier), budget.schedule.sample_rate)
    for _ in range(steps):
        if budget.begin():
            budget.ledger.record(event)


def test_schedules() -> None:
    poisson = Schedule.make(1000, 30, epochs=2)
    assert (poisson.steps_per_pass, poisson.num_steps, poisson.num_releases, poisson.sample_rate) == (34, 68, 68, 0.03)
    assert Schedule.make(1000, sample_rate=0.03, epochs=2) == poisson
    assert Schedule.make(1000, 30, steps=7).num_releases == 7
    assert Schedule.make(1000, 30).num_steps is None
    shuffle = Schedule.make(1000, 30, epochs=2, sampling="shuffle")
    assert (shuffle.num_steps, shuffle.per_release, shuffle.num_releases, shuffle.sample_rate) == (68, 33, 3, 1.0)
    assert Schedule.make(1000, 50, epochs=2, sampling="shuffle").num_releases == 2
    assert Schedule.make(10, 10, epochs=3, sampling="shuffle").num_releases == 3


@given(n=st.integers(1, 60), size=st.integers(1, 60), passes=st.integers(1, 5), drop_last=st.booleans(), steps=st.integers(1, 100))
@settings(max_examples=300, deadline=None)
def test_no_example_of_a_shuffled_loader_takes_part_in_more_releases_than_are_recorded(n, size, passes, drop_last, steps) -> None:
    """Every pass has a batch for each example, so an example is in as many logical batches as passes were begun."""
    if size > n:
        return
    per_pass = n // size if drop_last else math.ceil(n / size)
    schedule = Schedule.make(n, size, sampling="shuffle")
    taken = min(steps, passes * per_pass)
    recorded = math.ceil(taken / schedule.per_release)
    assert recorded >= math.ceil(taken / per_pass)
    assert recorded <= math.ceil(taken / per_pass) * (2 if per_pass > 1 else 1)


@given(
    epsilon=st.floats(0.2, 8), n=st.integers(50, 5000), share=st.floats(0.01, 0.5), epochs=st.integers(1, 5),
    sampling=st.sampled_from(["poisson", "shuffle"]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_the_target_is_kept_and_nearly_used(epsilon, n, share, epochs, sampling) -> None:
    schedule = Schedule.make(n, max(1, int(share * n)), epochs=epochs, sampling=sampling)
    budget = Budget(Privacy(target_epsilon=epsilon, accountant="rdp"), schedule)
    assert schedule.num_steps is not None
    spend(budget, schedule.num_steps)
    assert 0.98 * epsilon <= budget.epsilon() <= epsilon
    assert budget.left == 0
    with pytest.raises(BudgetError, match="used up"):
        budget.begin()
    assert budget.ledger.num_releases == schedule.num_releases


def test_a_shuffled_pass_is_one_full_gaussian_and_the_relation_says_what_it_covers() -> None:
    budget = Budget(Privacy(noise_multiplier=2.0), Schedule.make(100, 10, epochs=4, sampling="shuffle"))
    spend(budget, 40)
    assert budget.ledger.events == ((SampledGaussian(event_noise_multiplier(2.0), 1.0), 4),)
    assert budget.privacy.relation is NeighboringRelation.zero_out
    assert "zero_out" in budget.statement()
    assert "without amplification" in budget.statement()
    replace = Budget(Privacy(noise_multiplier=2.0, relation=NeighboringRelation.replace_one), Schedule.make(100, 10, sampling="shuffle"))
    assert replace.privacy.relation is NeighboringRelation.replace_one


def test_a_continued_ledger_counts(tmp_path) -> None:
    path, privacy, schedule = tmp_path / "l.jsonl", Privacy(target_epsilon=2.0), Schedule.make(1000, 50, steps=30)
    first = Budget(privacy, schedule, path)
    spend(first, 30)
    first.ledger.close()
    second = Budget(privacy.model_copy(update={"target_epsilon": 2.5}), schedule, path)
    assert second.noise_multiplier > first.noise_multiplier
    spend(second, 30)
    assert second.epsilon() <= 2.5
    assert PrivacyLedger.read(path).num_releases == 60
    assert get_accountant("prv").epsilon(PrivacyLedger.read(path).events, 1e-5) == second.epsilon()
    with pytest.raises(ValueError, match="history alone"):
        Budget(privacy, schedule, second.ledger)


def test_two_budgets_on_one_ledger_do_not_spend_the_target_twice() -> None:
    """Each was calibrated while the ledger was empty; together they would pass the target."""
    ledger, schedule = PrivacyLedger(None), Schedule.make(1000, 50, steps=30)
    one, two = (Budget(Privacy(target_epsilon=1.0, accountant="rdp"), schedule, ledger) for _ in range(2))
    spend(one, 20)
    with pytest.raises(BudgetError, match="ledger has grown"):
        spend(two, 30)
    assert 0.95 < two.epsilon() <= 1.0
    assert 25 <= ledger.num_releases <= 31
    with pytest.raises(BudgetError, match="ledger has grown"):
        spend(one, 10)


def test_what_was_begun_and_never_recorded_makes_no_room_for_others() -> None:
    """As many releases of other noise as steps that failed: the count of the ledger is what was expected, its content is not."""
    ledger, schedule = PrivacyLedger(None), Schedule.make(1000, 50, steps=30)
    budget = Budget(Privacy(target_epsilon=1.0, accountant="rdp"), schedule, ledger)
    for _ in range(5):
        budget.begin()  # and the ledger cannot be written
    ledger.record(SampledGaussian(0.6, 0.05), 5)
    with pytest.raises(BudgetError, match="ledger has grown"):
        budget.begin()


def test_no_accountant_runs_while_the_ledger_is_the_budgets_own(monkeypatch) -> None:
    budget = Budget(Privacy(target_epsilon=1.0, accountant="rdp"), Schedule.make(1000, 50, steps=30))
    monkeypatch.setattr("dptrain.budget.get_accountant", lambda *_: pytest.fail("an accountant ran"))
    spend(budget, 30)
    assert budget.left == 0


def test_a_foreign_state_cannot_make_room() -> None:
    """What another run spent with less noise counts, although the planned steps are not used up."""
    other = Budget(Privacy(noise_multiplier=0.5), Schedule.make(1000, 50, steps=5))
    spend(other, 5)
    budget = Budget(Privacy(target_epsilon=1.0), Schedule.make(1000, 50, steps=30))
    budget.restore(other.state())
    with pytest.raises(BudgetError, match="ledger has grown"):
        budget.begin()


def test_ledgers_in_memory_files_and_objects(tmp_path) -> None:
    ledger = PrivacyLedger(None)
    assert open_ledger(ledger) is ledger
    assert open_ledger(None).path is None
    assert open_ledger(tmp_path / "new.jsonl").path == tmp_path / "new.jsonl"


def test_restoring_never_forgets() -> None:
    one = Budget(Privacy(noise_multiplier=1.0), Schedule.make(100, 10, steps=20))
    spend(one, 5)
    old = one.state()
    spend(one, 5)
    one.restore(old)
    assert (one.steps, one.ledger.num_releases) == (10, 10)
    two = Budget(Privacy(noise_multiplier=1.0), Schedule.make(100, 10, steps=20))
    spend(two, 2)
    two.restore(one.state())
    assert (two.steps, two.ledger.num_releases, two.left) == (10, 10, 10)
    for wrong in ({}, {"steps": "x", "events": []}, {"steps": 1, "events": [[{"kind": "other"}, 1]]}, {"steps": 1, "events": [1]}):
        with pytest.raises(RunError):
            two.restore(wrong)
    assert two.ledger.num_releases == 10


@pytest.mark.parametrize(("arguments", "words"), [
    ({"sample_size": 0, "expected_batch_size": 1}, "sample_size"),
    ({"sample_size": True, "expected_batch_size": 1}, "sample_size"),
    ({"sample_size": 10.0, "expected_batch_size": 1}, "sample_size"),
    ({"sample_size": 10}, "exactly one"),
    ({"sample_size": 10, "expected_batch_size": 1, "sample_rate": 0.1}, "exactly one"),
    ({"sample_size": 10, "expected_batch_size": 11}, "expected batch size"),
    ({"sample_size": 10, "expected_batch_size": math.nan}, "expected batch size"),
    ({"sample_size": 10, "sample_rate": 1.5}, "expected batch size"),
    ({"sample_size": 10, "expected_batch_size": 1, "epochs": 1, "steps": 1}, "not both"),
    ({"sample_size": 10, "expected_batch_size": 1, "epochs": math.inf}, "epochs"),
    ({"sample_size": 10, "expected_batch_size": 1, "steps": -1}, "steps"),
    ({"sample_size": 10, "expected_batch_size": 1, "sampling": "all"}, "sampling"),
])  # fmt: skip
def test_schedules_that_are_refused(arguments, words) -> None:
    with pytest.raises(ConfigError, match=words):
        Schedule.make(**arguments)


def test_budgets_that_are_refused() -> None:
    with pytest.raises(ConfigError, match="target_epsilon or noise_multiplier"):
        Budget(Privacy(), Schedule.make(10, 1, steps=1))
    with pytest.raises(ConfigError, match="epochs or steps"):
        Budget(Privacy(target_epsilon=1.0), Schedule.make(10, 1))
