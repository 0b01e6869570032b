"""Batches that are not plain Poisson samples: their law, the one function that says what they are to an accountant, and whole runs."""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import dptrain
from accounting import (
    AccountingError,
    CappedGaussian,
    FixedSizeGaussian,
    PrivacyLedger,
    SampledGaussian,
    get_accountant,
    shuffled_pass,
)
from dptrain import ConfigError, TrainConfig
from dptrain.config import Privacy, Sampling
from dptrain.errors import RunError
from dptrain.guard import Guard, Records
from dptrain.mechanism import GaussianMechanism, event_noise_multiplier, release_event
from dptrain.randomness import NOISE, SAMPLING, RandomKey
from dptrain.reporting.facts import examine
from dptrain.rundir import RunDirectory
from dptrain.sampling import (
    CappedSampler,
    FixedSizeSampler,
    PoissonSampler,
    Scheme,
    ShuffledSampler,
    event_of,
    first_step,
    sampling_words,
    steps_per_release,
)
from dptrain.setup import prepare
from dptrain.step import Release
from dptrain.trainer import Loop, planned_noise
from tests.core.shared import EXAMPLES, FALSE_FAILURE, blobs, config
from tests.core.test_trainer import command, stop_after, weights_of

KEY = RandomKey.make(SAMPLING, unsafe_seed=33)
RDP = {"noise_multiplier": 1.0, "accountant": "rdp"}
# Sixty examples, in batches of about twelve; what each way of drawing needs.
SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "capped": ({"expected_batch_size": 12, "max_batch_size": 13}, "add_remove"),
    "fixed_size": ({"expected_batch_size": 12, "scheme": "fixed_size"}, "replace_one"),
    "shuffle": ({"expected_batch_size": 12, "scheme": "shuffle"}, "zero_out"),
}


def run_of(name: str, steps: int = 6, privacy: dict[str, Any] | None = None, **parts: Any) -> TrainConfig:
    """A run of one of the schemes."""
    sampling, relation = SCHEMES[name]
    given = {"model": {"name": "mlp", "hidden": [4]}, "performance": {"compile": False}, **parts}
    return config(sampling={**sampling, "steps": steps}, privacy={**(privacy or RDP), "relation": relation}, **given)


def table(sampler: Any, steps: int) -> np.ndarray:
    """Who was in which step, ``[steps, N]``."""
    drawn = np.zeros((steps, sampler.num_examples), bool)
    for step in range(steps):
        drawn[step, sampler.sample(step)] = True
    return drawn


def chi_square(observed: Any, expected: Any) -> float:
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    assert expected.min() > 5
    return float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


# ---- the law ---------------------------------------------------------------------------------------------------------


def test_sizes_of_capped_batches_are_binomial_up_to_the_cap():
    count, rate, cap, steps = 60, 0.2, 14, 4000
    sizes = table(CappedSampler(count, rate, cap, KEY), steps).sum(1)
    law = stats.binom(count, rate)
    expected = [law.cdf(5), *(law.pmf(k) for k in range(6, cap)), law.sf(cap - 1)]
    observed = [(sizes <= 5).sum(), *((sizes == k).sum() for k in range(6, cap)), (sizes == cap).sum()]
    assert sizes.max() == cap
    assert chi_square(observed, np.array(expected) * steps) > FALSE_FAILURE


def test_what_a_cap_keeps_is_a_uniform_part_of_the_draw():
    """Of draws of all five examples, each pair is as likely as any other; and a draw that fits is the Poisson sample itself."""
    capped, plain = CappedSampler(5, 0.9, 2, KEY), PoissonSampler(5, 0.9, KEY)
    full = [tuple(capped.sample(t)) for t in range(6000) if len(plain.sample(t)) == 5]
    assert chi_square([full.count(pair) for pair in itertools.combinations(range(5), 2)], np.full(10, len(full) / 10)) > FALSE_FAILURE
    wide = CappedSampler(50, 0.2, 12, KEY)
    drawn = [PoissonSampler(50, 0.2, KEY).sample(t) for t in range(200)]
    for t, whole in enumerate(drawn):
        assert set(wide.sample(t)) <= set(whole)
        if len(whole) <= 12:
            np.testing.assert_array_equal(wide.sample(t), whole)
    assert any(len(whole) > 12 for whole in drawn)


def test_every_example_is_kept_at_the_same_rate():
    count, rate, cap, steps = 200, 0.2, 38, 2000
    drawn = table(CappedSampler(count, rate, cap, KEY), steps)
    kept = (np.minimum(np.arange(count + 1), cap) * stats.binom(count, rate).pmf(np.arange(count + 1))).sum() / count
    tails = stats.binom(steps, kept)
    counts = drawn.sum(0)
    assert count * 2 * np.minimum(tails.cdf(counts), tails.sf(counts - 1)).min() > FALSE_FAILURE


@pytest.mark.parametrize("make", [lambda: FixedSizeSampler(5, 2, KEY), lambda: FixedSizeSampler(5, 3, KEY)])
def test_subsets_of_one_size_are_uniform_and_independent_from_step_to_step(make):
    sampler, steps = make(), 8000
    subsets = list(itertools.combinations(range(5), sampler.batch_size))
    found = [subsets.index(tuple(sampler.sample(t))) for t in range(steps)]
    assert chi_square(np.bincount(found, minlength=10), np.full(10, steps / 10)) > FALSE_FAILURE
    pairs = np.zeros((10, 10))
    np.add.at(pairs, (found[:-1], found[1:]), 1)
    assert stats.chi2_contingency(pairs).pvalue > FALSE_FAILURE


def test_orders_are_uniform_and_independent_from_pass_to_pass():
    sampler, passes = ShuffledSampler(4, 1, KEY), 4000
    orders = list(itertools.permutations(range(4)))
    found = [orders.index(tuple(int(sampler.sample(4 * k + t)[0]) for t in range(4))) for k in range(passes)]
    assert chi_square(np.bincount(found, minlength=24), np.full(24, passes / 24)) > FALSE_FAILURE
    pairs = np.zeros((24, 24))
    np.add.at(pairs, (found[:-1], found[1:]), 1)
    assert stats.chi2_contingency(pairs).pvalue > FALSE_FAILURE


@given(count=st.integers(1, 300), size=st.integers(1, 300), seed=st.integers(0, 2**64), step=st.integers(0, 2**60))
@EXAMPLES
def test_fixed_batches_have_their_size(count, size, seed, step):
    if size > count:
        with pytest.raises(ConfigError, match=f"between 1 and the {count} examples"):
            FixedSizeSampler(count, size, KEY)
        return
    found = FixedSizeSampler(count, size, RandomKey(seed)).sample(step)
    assert (found.dtype, len(found), len(np.unique(found))) == (np.int64, size, size)
    assert 0 <= found.min() <= found.max() < count and (np.diff(found) > 0).all()
    np.testing.assert_array_equal(found, FixedSizeSampler(count, size, RandomKey(seed)).sample(step))


@given(count=st.integers(2, 300), cap=st.integers(1, 299), rate=st.floats(1e-9, 1.0), step=st.integers(0, 2**60))
@EXAMPLES
def test_capped_batches_stay_below_the_cap(count, cap, rate, step):
    if cap >= count:
        with pytest.raises(ConfigError, match=f"between 1 and N - 1 = {count - 1}"):
            CappedSampler(count, rate, cap, KEY)
        return
    sampler = CappedSampler(count, rate, cap, KEY)
    found = sampler.sample(step)
    assert len(found) <= cap and (np.diff(found) > 0).all()
    assert set(found) <= set(PoissonSampler(count, rate, KEY).sample(step))
    assert 0 < sampler.drawn_rate <= rate


@given(count=st.integers(1, 200), size=st.integers(1, 60), first=st.integers(0, 2**40), number=st.integers(0, 2**20))
@EXAMPLES
def test_passes_are_disjoint_batches_of_one_size(count, size, first, number):
    if size > count:
        return
    sampler = ShuffledSampler(count, size, KEY, first)
    assert sampler.per_pass == count // size
    begin = first + number * sampler.per_pass
    drawn = [sampler.sample(step) for step in range(begin, begin + sampler.per_pass)]
    assert all(len(batch) == size for batch in drawn)
    assert len(np.unique(np.concatenate(drawn))) == size * sampler.per_pass  # no example twice
    again = ShuffledSampler(count, size, KEY, first)  # and in any order of asking
    for step in reversed(range(begin, begin + sampler.per_pass)):
        np.testing.assert_array_equal(again.sample(step), drawn[step - begin])


def test_a_step_before_the_first_pass_is_refused():
    with pytest.raises(ConfigError, match="Step 4 is before the first pass of this sampler, which begins at step 5"):
        ShuffledSampler(10, 2, KEY, 5).sample(4)


# ---- what it is to an accountant -------------------------------------------------------------------------------------

EVENTS = {
    "poisson": (PoissonSampler(60, 0.2, KEY), "add_remove", SampledGaussian(1.5, 0.2), "Poisson sampling", 1),
    "capped": (
        CappedSampler(60, 0.25, 20, KEY), "add_remove", CappedGaussian(1.5, 0.25, 60, 20), "Poisson sampling, at most 20 examples kept", 1,
    ),
    "fixed size": (
        FixedSizeSampler(60, 12, KEY), "replace_one", FixedSizeGaussian(1.5, 60, 12), "batches of 12 drawn without replacement", 1,
    ),
    "shuffled": (ShuffledSampler(60, 13, KEY), "zero_out", shuffled_pass(1.5), "shuffled passes without amplification", 4),
}  # fmt: skip


@pytest.mark.parametrize("name", EVENTS)
def test_one_function_says_what_a_sampler_is(name):
    sampler, relation, event, words, span = EVENTS[name]
    assert event_of(sampler, 1.5, relation) == event
    assert sampling_words(sampler) == words
    assert steps_per_release(sampler) == span
    setup = prepare(config(model={"name": "mlp", "hidden": [4]}), data=blobs())
    stds = GaussianMechanism(1.5).stds(setup.plan, relation)
    claimed = event_noise_multiplier(1.5)
    assert release_event(setup.plan, stds, sampler, relation) == event_of(sampler, claimed, relation)


def test_a_rate_that_is_no_multiple_of_the_draws_is_rounded_down():
    sampler = CappedSampler(60, 1e-13, 20, KEY)
    assert event_of(sampler, 1.0).sample_rate == math.floor(1e-13 * 2.0**64) / 2.0**64 < 1e-13


@pytest.mark.parametrize("kind", [PoissonSampler, CappedSampler, FixedSizeSampler, ShuffledSampler])
def test_a_class_that_nothing_is_known_of_is_refused(kind):
    """A subclass may draw in another way."""

    class Mine(kind):
        pass

    arguments = {PoissonSampler: (60, 0.2), CappedSampler: (60, 0.2, 20)}.get(kind, (60, 12))
    with pytest.raises(ConfigError, match="Nothing is known of the batches that Mine draws"):
        event_of(Mine(*arguments, KEY), 1.0, "replace_one")
    with pytest.raises(ConfigError, match="Nothing is known of the batches that object draws"):
        event_of(object(), 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("relation", ["add_remove", "zero_out", "replace_one"])
def test_relations_without_a_guarantee_are_refused(relation):
    for sampler, good, what in (
        (FixedSizeSampler(60, 12, KEY), ("replace_one",), "set privacy.relation to replace_one"),
        (ShuffledSampler(60, 12, KEY), ("replace_one", "zero_out"), "set privacy.relation to zero_out"),
    ):
        if relation in good:
            event_of(sampler, 1.0, relation)
            continue
        with pytest.raises(ConfigError, match=what):
            event_of(sampler, 1.0, relation)
        kind = "fixed_size" if isinstance(sampler, FixedSizeSampler) else "shuffle"
        parts = {"sampling": {"expected_batch_size": 12, "steps": 4, "scheme": kind}, "privacy": {**RDP, "relation": relation}}
        with pytest.raises(ConfigError, match=rf"sampling\.scheme {kind}: .*{what}"):
            config(**parts)
        assert config(**parts, strategy="non_private").sampling.scheme == kind  # no guarantee, no relation


# ---- the config ------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 10**7), size=st.integers(1, 10**7), kind=st.sampled_from(["fixed_size", "shuffle"]))
@EXAMPLES
def test_a_rate_and_the_size_it_stands_for_are_the_same(count, size, kind):
    size = min(size, count)
    by_rate = Sampling(sample_rate=size / count, steps=3, scheme=kind).resolved(count)
    assert by_rate == Sampling(expected_batch_size=size, steps=3, scheme=kind).resolved(count) == Scheme(kind, size / count, size)


@given(count=st.integers(1, 10**6), size=st.integers(1, 10**6), epochs=st.integers(1, 50))
@EXAMPLES
def test_epochs_of_shuffled_data_are_whole_passes(count, size, epochs):
    size = min(size, count)
    steps = Sampling(expected_batch_size=size, epochs=float(epochs), scheme="shuffle").num_steps(count)
    assert steps == epochs * (count // size)


def test_a_size_that_is_not_whole_is_refused():
    for kind in ("fixed_size", "shuffle"):
        with pytest.raises(ConfigError, match=r"0\.11 of 60 examples is 6\.6, .* set sampling\.expected_batch_size, such as 7"):
            Sampling(sample_rate=0.11, steps=1, scheme=kind).resolved(60)
        with pytest.raises(ConfigError, match="such as 1,"):
            Sampling(sample_rate=1e-9, steps=1, scheme=kind).resolved(60)
        with pytest.raises(ConfigError, match="max_batch_size belongs to the scheme poisson"):
            config(sampling={"sample_rate": 0.2, "steps": 4, "scheme": kind, "max_batch_size": 3})
    with pytest.raises(ConfigError, match=r"sampling\.scheme: Input should be 'poisson', 'fixed_size' or 'shuffle'"):
        config(sampling={"sample_rate": 0.2, "steps": 4, "scheme": "balls"})


def test_a_config_of_before_keeps_its_hash():
    assert set(config().to_dict()["sampling"]) == {"sample_rate", "expected_batch_size", "steps", "epochs"}
    capped = config(sampling={"sample_rate": 0.2, "steps": 4, "max_batch_size": 20})
    assert TrainConfig.parse(capped.to_dict()) == capped != config() and capped.hash != config().hash


# ---- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_noise_is_calibrated_to_the_event_that_is_recorded(name, accountant):
    promise = {"target_epsilon": 3.0, "accountant": accountant}
    result = dptrain.train(run_of(name, steps=12, privacy=promise), data=blobs(62))
    assert 3.0 * (1 - 2e-3) <= result.epsilon <= 3.0
    assert result.complete and result.steps == 12
    assert result.privacy["releases"] == (3 if name == "shuffle" else 12)


def test_a_cap_that_binds_often_costs_noise_and_one_above_n_nothing():
    promise = {"target_epsilon": 3.0, "accountant": "rdp"}

    def noise(cap: int | None) -> float:
        return planned_noise(
            prepare(config(sampling={"sample_rate": 0.2, "steps": 4, "max_batch_size": cap}, privacy=promise), data=blobs())
        )

    assert noise(None) == noise(60) == noise(1000) < noise(20) < noise(13)
    free = config(sampling={"sample_rate": 0.2, "steps": 4, "max_batch_size": 60}, privacy={**RDP, "unsafe_seed": 3})
    plain = config(privacy={**RDP, "unsafe_seed": 3})
    one, two = dptrain.train(free, data=blobs()), dptrain.train(plain, data=blobs())
    assert one.privacy["events"] == two.privacy["events"] and one.privacy["sampling"] == "poisson"
    for weight, value in weights_of(one).items():
        np.testing.assert_array_equal(value, weights_of(two)[weight])


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch):
    """Every batch that any sampler drew, in order."""
    drawn: list[np.ndarray] = []
    for kind in (PoissonSampler, CappedSampler, FixedSizeSampler, ShuffledSampler):

        def spy(self, step, draw=kind.sample, kind=kind):
            found = draw(self, step)
            if kind is CappedSampler:  # made from a Poisson sample, which is not the batch
                drawn.pop()
            drawn.append(found)
            return found

        monkeypatch.setattr(kind, "sample", spy)
    return drawn


DIGITS = {
    "capped": ({"expected_batch_size": 100, "max_batch_size": 104}, "add_remove", "Poisson sampling, at most 104 examples kept"),
    "fixed_size": ({"expected_batch_size": 100, "scheme": "fixed_size"}, "replace_one", "batches of 100 drawn without replacement"),
    "shuffle": ({"expected_batch_size": 100, "scheme": "shuffle"}, "zero_out", "shuffled passes without amplification"),
}


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
@pytest.mark.parametrize("name", DIGITS)
def test_digits_in_both_frameworks(name, backend, batches, tmp_path):
    sampling, relation, words = DIGITS[name]
    run = config(
        data={"name": "digits", "limit": 1030}, sampling={**sampling, "steps": 12}, performance={"compile": False},
        privacy={"target_epsilon": 2.0, "accountant": "rdp", "relation": relation, "unsafe_seed": 5},
    )  # fmt: skip
    result = dptrain.train(run, backend, out=tmp_path / "run")
    scheme = run.sampling.resolved(1030)
    sampler = scheme.sampler(1030, RandomKey.make(SAMPLING, 5))
    for step, batch in enumerate(batches[:12]):
        np.testing.assert_array_equal(batch, sampler.sample(step))
    sizes = [len(batch) for batch in batches[:12]]
    assert max(sizes) <= 104 if name == "capped" else sizes == [100] * 12
    ledger = PrivacyLedger.read(tmp_path / "run" / "ledger.jsonl")
    ((event, count),) = ledger.events
    assert event == event_of(scheme.public(1030), event.noise_multiplier, relation)
    assert count == (2 if name == "shuffle" else 12)
    assert get_accountant("rdp", relation).epsilon(ledger.events, 1e-5) == result.epsilon <= 2.0
    assert f"{words}, accountant rdp, {count} releases" in result.privacy["statement"]
    assert result.privacy["sampling"] == {"capped": "capped_poisson"}.get(name, name)
    (report,) = examine([tmp_path / "run"])
    assert report.statement["epsilon"] == result.epsilon and report.files.status == "complete"
    # The plain run of the same config draws the same batches.
    before = len(batches)
    dptrain.train(run.replace(strategy="non_private"), backend)
    for mine, other in zip(batches[before:], batches[:12], strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_denominator_is_the_expected_batch_size(name):
    run = run_of(name)
    setup = prepare(run, data=blobs())
    with RunDirectory(None, run, "torch", {}) as nowhere:
        loop = Loop(setup, nowhere, threading.Event(), 1.0, Records(nowhere.ledger))
    assert loop.step.update.expected_batch_size == pytest.approx(12.0, rel=1e-15)
    assert type(loop.step.sampler) is type(EVENTS[name.replace("_", " ").replace("shuffle", "shuffled")][0])


WORDS = {
    "capped": ("at most 13 of those drawn are kept", "6 of 6 planned releases"),
    "fixed_size": ("each step draws 12 of the 60 examples anew, without replacement", "6 of 6 planned releases"),
    "shuffle": ("in 5 batches of 12; a release is a whole pass", "2 of 2 planned releases"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_plan_and_report_name_the_sampling(name, tmp_path, monkeypatch, capsys):
    run = run_of(name)
    (tmp_path / "run.yaml").write_text(run.replace(data={"name": "digits", "limit": 60}).to_yaml())
    code, out, _ = command(monkeypatch, capsys, "plan", tmp_path / "run.yaml")
    assert code == 0 and f"{sampling_words(run.sampling.resolved(60).public(60))}, accountant rdp" in out
    assert out.endswith("6 steps in 2 releases\n" if name == "shuffle" else "6 steps\n")
    dptrain.train(run, data=blobs(), out=tmp_path / "run")
    dptrain.report(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    for words in WORDS[name]:
        assert words in page
    assert ("releases (passes of 5 steps)" in page) == (name == "shuffle")


def test_a_ledger_of_other_batches_is_refused(tmp_path):
    """An event of another kind, however careful, is not of the batches that the config says."""
    dptrain.train(run_of("fixed_size"), data=blobs(), out=tmp_path / "run")
    ledger = PrivacyLedger.read(tmp_path / "run" / "ledger.jsonl")
    for event in (SampledGaussian(0.9, 1.0), FixedSizeGaussian(0.9, 60, 11), FixedSizeGaussian(0.9, 61, 12)):
        (tmp_path / "run" / "ledger.jsonl").unlink()
        with PrivacyLedger(tmp_path / "run" / "ledger.jsonl", facts=ledger.facts) as other:
            other.record(event, 6)
        with pytest.raises(RunError, match=r"batches drawn as config\.yaml says are"):
            examine([tmp_path / "run"])


# ---- passes that are cut short ---------------------------------------------------------------------------------------


@given(
    count=st.integers(2, 60), size=st.integers(1, 30), sessions=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), max_size=6),
    seeded=st.booleans(),
)  # fmt: skip
@EXAMPLES
def test_no_example_is_twice_under_one_record(count, size, sessions, seeded):
    """Sessions that begin at some checkpoint and end after some steps, in any place of a pass."""
    size, ledger, covered, done = min(size, count), PrivacyLedger(), [], 0
    span = count // size
    for number, (back, steps) in enumerate(sessions):
        start = max(0, done - back)  # the checkpoint: not after what was done
        sampler = ShuffledSampler(count, size, RandomKey(0 if seeded else number), 0 if seeded else start)
        release = Release(
            {}, shuffled_pass(1.0), RandomKey.make(NOISE, 1), ledger, ledger.num_releases * span if seeded else 0,
            span=steps_per_release(sampler), first=first_step(sampler),
        )  # fmt: skip
        for step in range(start, start + steps):
            if release.due(step):
                ledger.record(release.event)
                covered.append({})
            batch = tuple(sampler.sample(step))
            under = covered[step // span] if seeded else covered[-1]
            assert under.setdefault(step, batch) == batch  # a repeated step has the same batch
        done = max(done, start + steps) if seeded else start + steps
    assert len(covered) == ledger.num_releases
    for under in covered:
        assert len(under) <= span
        drawn = [i for batch in under.values() for i in batch]
        assert len(set(drawn)) == len(drawn)


def test_an_interrupted_pass_is_paid_for_and_a_new_one_begins(tmp_path, batches):
    run = run_of("shuffle", steps=15)  # three passes of five
    first = dptrain.train(run, data=blobs(), out=tmp_path / "run", progress=stop_after(7))
    assert (first.complete, first.steps, first.privacy["releases"]) == (False, 7, 2)
    second = dptrain.train(run, data=blobs(), out=tmp_path / "run")
    assert (second.complete, second.steps, second.privacy["releases"]) == (True, 12, 3)  # what was planned, never more
    passes = [batches[:5], batches[5:7], batches[7:12]]
    assert len(batches) == 12
    for drawn in passes:
        assert len(np.unique(np.concatenate(drawn))) == 12 * len(drawn)
    assert set(np.concatenate(batches[5:7])) & set(np.concatenate(batches[7:12]))  # which one record would not have covered
    assert dptrain.train(run, data=blobs(), out=tmp_path / "run").steps == 12
    (report,) = examine([tmp_path / "run"])
    assert report.files.status == "complete" and report.statement["epsilon"] == second.epsilon
    assert second.epsilon == dptrain.train(run, data=blobs()).epsilon


def test_an_interrupted_pass_with_a_seed_goes_on_bit_for_bit(tmp_path):
    run = run_of("shuffle", steps=15, privacy={**RDP, "unsafe_seed": 4}, optimizer={"name": "adam", "learning_rate": 0.01})
    whole = dptrain.train(run, data=blobs())

    def crash(progress):
        if progress.step == 9:
            raise MemoryError

    first = dptrain.train(run, data=blobs(), out=tmp_path, progress=stop_after(7))
    assert (first.complete, first.privacy["releases"]) == (False, 2)
    with pytest.raises(MemoryError):
        dptrain.train(run, data=blobs(), out=tmp_path, progress=crash)
    assert PrivacyLedger.read(tmp_path / "ledger.jsonl").num_releases == 2
    last = dptrain.train(run, data=blobs(), out=tmp_path)
    assert (last.complete, last.steps, last.privacy["releases"]) == (True, 15, 3)
    assert last.privacy["events"] == whole.privacy["events"]
    for name, value in weights_of(whole).items():
        np.testing.assert_array_equal(value, weights_of(last)[name])


def test_evaluations_know_at_most_how_many_passes_were_begun(tmp_path):
    parts = {"performance": {"compile": False, "evaluate_every": 2}}
    dptrain.train(run_of("shuffle", steps=15, **parts), data=blobs(), out=tmp_path / "whole")
    (whole,) = examine([tmp_path / "whole"])
    found = [(e.step, e.releases) for e in whole.files.metrics.evaluations]
    assert found == [*((step, -(-step // 5)) for step in range(2, 15, 2)), (15, 3)]
    run = run_of("shuffle", steps=15, **parts)
    dptrain.train(run, data=blobs(), out=tmp_path / "cut", progress=stop_after(7))
    dptrain.train(run, data=blobs(), out=tmp_path / "cut")
    (cut,) = examine([tmp_path / "cut"])
    begun = {2: 1, 4: 1, 6: 2, 7: 2, 8: 3, 10: 3, 12: 3}  # by steps 0, 5 and, anew, 7
    for evaluation in cut.files.metrics.evaluations:
        assert begun[evaluation.step] <= evaluation.releases <= 3
    seeded = run_of("shuffle", steps=15, privacy={**RDP, "unsafe_seed": 1}, **parts)
    dptrain.train(seeded, data=blobs(), out=tmp_path / "seeded")
    assert {e.releases for e in examine([tmp_path / "seeded"])[0].files.metrics.evaluations} == {3}


def test_a_ledger_that_lost_a_pass_is_refused(tmp_path):
    run = run_of("shuffle", steps=15)
    dptrain.train(run, data=blobs(), out=tmp_path, progress=stop_after(7))
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(RunError, match="holds 1 releases and its checkpoint 7 steps, so releases were lost"):
        dptrain.train(run, data=blobs(), out=tmp_path)
    with pytest.raises(RunError, match="so releases were lost"):
        examine([tmp_path])


# ---- budgets ---------------------------------------------------------------------------------------------------------


def epsilon(events: Any, relation: str) -> float:
    return get_accountant("rdp", relation).epsilon(events, 1e-5)


def test_planned_passes_beyond_a_cap_are_refused():
    event = shuffled_pass(event_noise_multiplier(1.0))
    target = epsilon([(event, 2)], "zero_out") * 1.000001
    with pytest.raises(AccountingError, match="of 3 passes of 5 steps with this noise 2 fit; lower the steps"):
        dptrain.train(run_of("shuffle", steps=11, privacy={**RDP, "target_epsilon": target}), data=blobs())
    result = dptrain.train(run_of("shuffle", steps=10, privacy={**RDP, "target_epsilon": target}), data=blobs())
    assert (result.steps, result.privacy["releases"]) == (10, 2) and result.epsilon <= target


@pytest.mark.parametrize("name", SCHEMES)
def test_a_guard_counts_releases_of_every_kind(name):
    sampler, relation, *_ = EVENTS[name.replace("_", " ").replace("shuffle", "shuffled")]
    event, other = event_of(sampler, 1.5, relation), SampledGaussian(2.0, 0.3)
    target = epsilon([(event, 4)], relation) * 1.000001
    promise = Privacy(target_epsilon=target, accountant="rdp", relation=relation)
    ledger = PrivacyLedger()
    guard = Guard(promise, ledger, event, 10)
    assert guard.room == 4
    for number in range(10):
        if number == 2:
            ledger.record(other)
        if not guard.ask():
            break
        ledger.record(event)
        assert epsilon(ledger.events, relation) <= target
    assert 2 <= ledger.count(event) < 4 and epsilon([*ledger.events, (event, 1)], relation) > target


def test_a_run_ends_with_a_pass_where_the_ledger_has_grown():
    event = shuffled_pass(event_noise_multiplier(1.0))
    run = run_of("shuffle", steps=15, privacy={**RDP, "target_epsilon": epsilon([(event, 3)], "zero_out") * 1.000001})
    setup = prepare(run, data=blobs())
    with RunDirectory(None, run, "torch", {}) as nowhere:
        loop = Loop(setup, nowhere, threading.Event(), 1.0, Records(nowhere.ledger))
        result = loop.run(lambda progress: nowhere.ledger.record(shuffled_pass(2.0)) if progress.step == 7 else None, None)
    assert (result.steps, result.complete) == (10, True)  # the pass that was begun is whole, and no other fits
    assert result.epsilon <= run.privacy.target_epsilon


def test_runs_of_all_kinds_share_a_ledger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relation, events, total = "replace_one", [], None
    for number, name in enumerate(SCHEMES):
        sampling, _ = SCHEMES[name]
        promise = {"target_epsilon": 1.0 + number, "accountant": "rdp", "relation": relation, "ledger": "data.jsonl"}
        run = config(model={"name": "mlp", "hidden": [4]}, sampling={**sampling, "steps": 10}, privacy=promise)
        result = dptrain.train(run, data=blobs(), out=name)
        assert result.privacy["releases"] == (2 if name == "shuffle" else 10)
        events += PrivacyLedger.read(f"{name}/ledger.jsonl").events
        total = result.privacy["data_set"]
        assert total["epsilon"] == epsilon(events, relation) == epsilon(PrivacyLedger.read("data.jsonl").events, relation)
        assert (1.0 + number) * (1 - 2e-3) <= total["epsilon"] <= 1.0 + number
    assert total is not None and (total["releases"], total["runs"]) == (22, 3)
    assert {type(event) for event, _ in PrivacyLedger.read("data.jsonl").events} == {CappedGaussian, FixedSizeGaussian, SampledGaussian}
