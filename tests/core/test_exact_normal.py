"""The integers of secure noise are distributed as round(2^32 Z): by construction, bit for bit where a comparison is close, and by count."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace
from decimal import Decimal, localcontext
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from dptrain import exact_normal
from dptrain.exact_normal import (
    ACCEPT,
    BITS,
    CELL_BITS,
    CHUNK,
    DISTANCE,
    POSITION,
    RANGE,
    STEP,
    TABLE_BITS,
    TOP,
    Words,
    accepted,
    accepted_exactly,
    digits,
    fill,
    find_cells,
    noise,
    table,
)
from dptrain.gaussian import keystream
from tests.core.shared import FALSE_FAILURE

KEY = bytes(range(16))
CELLS = RANGE << CELL_BITS
MANY = 20_000_000


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """Twenty million integers."""
    return noise(KEY, 3, 5, MANY)


def fits(observed: np.ndarray, chances: np.ndarray, share: int = 1) -> None:
    """Pearson's chi-square, at a false failure rate of 1e-6 divided among ``share`` tests."""
    assert len(observed) == len(chances) and math.isclose(chances.sum(), 1.0, abs_tol=1e-9)
    expected = chances * observed.sum()
    assert expected.min() > 20
    assert stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(chances) - 1) > FALSE_FAILURE / share


def exponent(cell: int, u: Decimal) -> Decimal:
    """t at a position of a cell."""
    return u * (cell + u / 2) / (1 << (2 * CELL_BITS))


# ---- the table -----------------------------------------------------------------------------------------------------


def test_the_table_is_within_the_stated_distance_of_the_exact_distribution():
    """Rounding of all cells, and the mass beyond the last one, divided by the smallest chance of acceptance; computed with 200 digits."""
    starts = table().starts
    assert starts[0] == 0 and list(starts) == sorted(starts) and len(set(starts)) > CELLS - 25 and starts[-1] < 1 << TABLE_BITS
    with localcontext(digits(200)):
        masses = [(-Decimal(i * i) / (1 << (2 * CELL_BITS + 1))).exp() for i in range(CELLS)]
        total = sum(masses)
        ends = [*starts[1:], 1 << TABLE_BITS]
        off = sum(abs(Decimal(b - a) / (1 << TABLE_BITS) - m / total) for a, b, m in zip(starts, ends, masses, strict=True)) / 2
        kept = (-exponent(CELLS - 1, Decimal(1))).exp()  # of the last cell, the least
        beyond = (-Decimal(RANGE**2) / 2).exp() / RANGE  # Mills: at least the tail of the half-normal, as sqrt(2 / pi) < 1
        assert 2 * off / kept + beyond < Decimal(DISTANCE)
        assert off > 0


def test_cells_and_acceptance_make_the_normal_distribution():
    """Mass of a cell times the mean acceptance in it, against the normal's mass: Gauss-Legendre on each cell."""
    starts = [*table().starts, 1 << TABLE_BITS]
    proposed = np.array([(b - a) / 2**TABLE_BITS for a, b in itertools.pairwise(starts)])
    nodes, weights = np.polynomial.legendre.leggauss(12)
    u, cell = (nodes + 1) / 2, np.arange(CELLS)[:, None]
    mass = proposed * (np.exp(-u * (cell + u / 2) * 2.0 ** (-2 * CELL_BITS)) * weights / 2).sum(1)
    edges = np.arange(CELLS + 1) / (1 << CELL_BITS)
    np.testing.assert_allclose(mass / mass.sum(), 2 * (stats.norm.sf(edges[:-1]) - stats.norm.sf(edges[1:])), rtol=1e-9, atol=1e-74)


def test_the_guide_decides_only_what_its_bits_decide():
    starts, guide = table().starts, table().guide
    rest, undecided = TABLE_BITS - TOP, 0
    for bucket, entry in enumerate(guide.tolist()):
        cell, below = entry >> STEP, entry & ((1 << ACCEPT) - 1)
        first, last = (bisect_right(starts, x) - 1 for x in (bucket << rest, ((bucket + 1) << rest) - 1))
        assert cell == first
        assert (below > 0) == (first == last)
        undecided += first != last
        # Whoever is below is accepted wherever in the cell the value lies, whatever the bits that follow.
        assert below * 2.0**-ACCEPT <= 1 - (cell + 0.5) * 2.0 ** (-2 * CELL_BITS) <= math.exp(-(cell + 0.5) * 2.0 ** (-2 * CELL_BITS))
    assert 0 < undecided < len(guide) / 50


# ---- close comparisons ---------------------------------------------------------------------------------------------


def lists(words: Iterable[int]) -> SimpleNamespace:
    """Words that a test has chosen, in place of the stream's."""
    return SimpleNamespace(at=lambda attempt, word, at, count=1: np.array([list(words)], np.uint64))


def split(top: int) -> tuple[np.ndarray, np.ndarray]:
    """A first word and a further one whose cell's uniform begins with these 64 bits."""
    return np.array([top >> (64 - TOP) << (64 - TOP)], np.uint64), np.array([top << TOP & (1 << 64) - 1], np.uint64)


@pytest.mark.parametrize("cell", [1, 2, 64, 200, 500, 1100, 1150])
def test_a_uniform_that_begins_as_a_boundary_is_compared_with_all_its_bits(cell):
    start = table().starts[cell]
    rest = [start >> (TABLE_BITS - 64 * (k + 1)) & (1 << 64) - 1 for k in range(4)]
    zero = np.zeros(1, np.int64)
    for change in (0, -1, 1):
        bits = start + change
        words = [bits >> (TABLE_BITS - 64 * (k + 1)) & (1 << 64) - 1 for k in range(4)]
        assert words[0] == rest[0]
        found = find_cells(lists([*words[1:], 0]), 0, zero, *split(words[0]))
        assert found[0] == bisect_right(table().starts, bits) - 1
        assert found[0] == cell + min(change, 0)


def test_cells_are_found_without_ties_too():
    rng = np.random.default_rng(0)
    tops = [int(x) for x in rng.integers(0, 2**63, 200)] + [0, 2**64 - 1 - 2**20] + [int(t) - 1 for t in table().tops[1:500]]
    for top in tops:
        found = find_cells(lists([0, 0, 0, 0]), 0, np.zeros(1, np.int64), *split(top))
        assert found[0] == bisect_right(table().starts, top << (TABLE_BITS - 64)) - 1


@pytest.mark.parametrize("cell", [0, 1, 63, 300, CELLS - 1])
@pytest.mark.parametrize("position", [0, 12345 << 70, (1 << (POSITION + 64)) - 1])
def test_the_exact_comparison_goes_on_until_the_bits_decide(cell, position):
    """A uniform equal to exp(-t) in all its first bits is undecided; the next 200 bits decide as they should."""
    bits = ACCEPT + 64
    follow = 0x0123456789ABCDEF  # of the position
    with localcontext(digits(200)):
        deep = position
        for _ in range(5):
            deep = deep << 64 | follow
        chance = (-exponent(cell, Decimal(deep) / (1 << (POSITION + 64 * 6)))).exp()
        head = int(chance * (1 << bits))
        wide = int(chance * (1 << (bits + 320)))
    for change, expected in ((-(1 << 120), True), (1 << 120, False)):
        asked, target = [], wide + change
        assert target >> 320 == head or head == 1 << bits or (position == 0 and cell == 0)

        def more(word: int, asked: list[int] = asked, target: int = target) -> np.ndarray:
            asked.append(word)
            return np.array([follow, target >> (320 - 64 * (word + 1)) & (1 << 64) - 1], np.uint64)

        assert accepted_exactly(cell, position, target >> 320, more) is expected
        if target >> 320 == head < 1 << bits:
            assert asked == list(range(len(asked))) and len(asked) >= 2
    nothing = lambda word: pytest.fail("more words were asked for than it takes")  # noqa: E731
    if head + 2 < 1 << bits:
        assert accepted_exactly(cell, position, head - 2, nothing)
        assert not accepted_exactly(cell, position, head + 2, nothing)


def test_the_band_of_doubt_is_wider_than_the_error_of_the_float_comparison():
    """Against 60 digits, over cells and positions, ends included."""
    rng = np.random.default_rng(1)
    cells = np.concatenate([rng.integers(0, CELLS, 3000), [0, 0, CELLS - 1, CELLS - 1]])
    heads = np.concatenate([rng.integers(0, 1 << POSITION, 3000), [0, (1 << POSITION) - 1] * 2]).astype(np.uint64)
    lows = np.concatenate([rng.integers(0, 1 << 64, 3000, np.uint64), np.array([0, 2**64 - 1] * 2, np.uint64)])
    u = heads * 2.0**-POSITION + lows * 2.0 ** -(POSITION + 64)
    chances = np.exp(u * (cells + u / 2) * -(2.0 ** (-2 * CELL_BITS)))
    with localcontext(digits(60)):
        for cell, head, low, chance in zip(cells.tolist(), heads.tolist(), lows.tolist(), chances.tolist(), strict=True):
            exact = (-exponent(cell, Decimal(head << 64 | low) / (1 << (POSITION + 64)))).exp()
            assert abs(Decimal(chance) - exact) < Decimal(2.0**-49)
    assert exact_normal.DOUBT >= 2.0**-48


def test_the_exact_comparison_agrees_with_the_float_one(monkeypatch):
    """With everything in doubt, ``decimal`` decides all that the float comparison decided; and with no guide, every value is settled so."""
    expected = noise(KEY, 0, 0, 4000)
    whole = table()
    doubts = []
    monkeypatch.setattr(exact_normal, "DOUBT", 2.0)
    exact = exact_normal.accepted_exactly
    monkeypatch.setattr(exact_normal, "accepted_exactly", lambda *args: doubts.append(1) or exact(*args))
    monkeypatch.setattr(exact_normal, "table", lambda: replace(whole, guide=whole.guide >> STEP << STEP))
    np.testing.assert_array_equal(noise(KEY, 0, 0, 4000), expected)
    assert len(doubts) > 4000


def test_uniforms_at_their_ends_are_accepted_as_they_should_be():
    """The smallest uniform always; the largest nowhere but where t is 0 to all its bits, which further words would tell."""
    top = np.uint64((1 << 64) - 1)
    one, at = np.array([5], np.int64), np.zeros(1, np.int64)
    first = np.array([1 << ACCEPT + 5], np.uint64)
    assert accepted(lists([0, 0]), 0, at, one, first, np.zeros(1, np.uint64), np.zeros(1, np.uint64))[0]
    assert not accepted(lists([0, 0]), 0, at, one, first | np.uint64((1 << ACCEPT) - 1), np.zeros(1, np.uint64), np.array([top]))[0]


# ---- what comes out ------------------------------------------------------------------------------------------------


def test_cells_have_the_normals_masses(drawn):
    """Every cell up to 4 standard deviations, on either side, and what lies beyond."""
    edges = np.arange(-4 << CELL_BITS, (4 << CELL_BITS) + 1)
    cell = np.clip(((drawn + (edges[-1] << STEP)) >> STEP), -1, len(edges) - 1)
    # Integers from k up are values from k - 1/2 up.
    cuts = np.concatenate([[-np.inf], (edges * 2.0**STEP - 0.5) * 2.0**-BITS, [np.inf]])
    fits(np.bincount(cell + 1, minlength=len(edges) + 1), np.diff(stats.norm.cdf(cuts)))


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (0.5, 1.5), (1.5, 2.5), (2.5, 3.5), (3.5, 9.0)])
def test_positions_within_cells_have_the_normals_masses(drawn, low, high):
    """128 parts of a cell, summed over the cells of a band: without rejection these would be off by up to a few percent."""
    parts = 128 if low < 2.5 else 16
    size = np.abs(drawn)
    size = size[(size >= low * 2.0**BITS) & (size < high * 2.0**BITS)]
    edges = np.arange(int(low * 64) * parts, int(high * 64) * parts + 1)
    cuts = np.maximum(0.0, edges * 2.0**STEP / parts - 0.5) * 2.0**-BITS
    mass = np.diff(-stats.norm.sf(cuts)).reshape(-1, parts).sum(0)
    fits(np.bincount((size & ((1 << STEP) - 1)) >> (STEP - int(math.log2(parts))), minlength=parts), mass / mass.sum(), 5)


@pytest.mark.parametrize("shift", range(0, 24, 4))
def test_the_last_bits_are_uniform(drawn, shift):
    """Eight bits at a time, from the lowest on: the density changes by less than 1e-3 of itself over as much, and evens out over sides."""
    fits(np.bincount(drawn >> shift & 255, minlength=256), np.full(256, 1 / 256), 6)


def test_tails_are_the_normals(drawn):
    for bound in (1.0, 2.0, 3.0, 4.0, 5.0):
        for count in ((drawn >= bound * 2.0**BITS).sum(), (drawn <= -bound * 2.0**BITS).sum()):
            p = stats.norm.sf(bound)
            assert min(stats.binom.cdf(count, MANY, p), stats.binom.sf(count - 1, MANY, p)) > FALSE_FAILURE / 20


def test_moments_and_the_whole_distribution(drawn):
    values = drawn * 2.0**-BITS
    assert abs(values.sum()) / math.sqrt(MANY) < stats.norm.isf(FALSE_FAILURE / 6)
    assert abs((values**2).sum() - MANY) / math.sqrt(2 * MANY) < stats.norm.isf(FALSE_FAILURE / 6)
    assert abs((values**4).sum() - 3 * MANY) / math.sqrt(96 * MANY) < stats.norm.isf(FALSE_FAILURE / 6)
    assert stats.kstest(values[:2_000_000], "norm").pvalue > FALSE_FAILURE


def test_values_are_independent_of_their_neighbours_and_in_size(drawn):
    """Lags from 1 to the length of a chunk, of the values and of their squares."""
    values = drawn[:4_000_000] * 2.0**-BITS
    squares = (values**2 - 1) / math.sqrt(2)
    for series in (values, squares):
        for lag in (1, 2, 3, 7, 64, CHUNK // 2, CHUNK):
            found = (series[:-lag] * series[lag:]).sum() / math.sqrt(len(series) - lag)
            assert abs(found) < stats.norm.isf(FALSE_FAILURE / 28)


def test_values_that_later_words_settle_are_distributed_alike(monkeypatch):
    """All of them settled that way, the exponential included: an error there would hide among the 2.7 %."""
    whole = table()
    monkeypatch.setattr(exact_normal, "table", lambda: replace(whole, guide=whole.guide >> STEP << STEP))
    settled = noise(KEY, 1, 1, 300_000)
    monkeypatch.undo()
    np.testing.assert_array_equal(settled, noise(KEY, 1, 1, 300_000))


# ---- addresses -----------------------------------------------------------------------------------------------------


def test_a_value_depends_on_its_address_alone():
    whole = noise(KEY, 1, 2, 2 * CHUNK + 77)
    for size in (1, 2, 3, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK):
        np.testing.assert_array_equal(noise(KEY, 1, 2, size), whole[:size])
    assert len(noise(KEY, 1, 2, 0)) == 0


def test_streams_steps_chunks_and_keys_are_independent():
    size = 20_000
    others = [noise(bytes([*KEY[:15], k]), step, stream, size) for k in (15, 16) for step in (0, 1, 2**40) for stream in (0, 1, 2**31)]
    whole = noise(KEY, 0, 0, 2 * CHUNK)
    series = np.stack([*others, whole[CHUNK : CHUNK + size]]) * 2.0**-BITS
    for other in (series, np.roll(series, 1, axis=1)):
        correlations = (series @ other.T / math.sqrt(size))[np.triu_indices(len(series), 1)]
        assert np.abs(correlations).max() < stats.norm.isf(FALSE_FAILURE / (4 * len(correlations)))
    assert len(np.unique(whole)) > len(whole) - 40  # about two birthdays among 2^34 integers; a repeated chunk would be 2^17


def test_words_are_aes_in_counter_mode_under_a_derived_key(monkeypatch):
    seen: list[bytes] = []
    monkeypatch.setattr(exact_normal, "algorithms", SimpleNamespace(AES=lambda key: seen.append(bytes(key)) or algorithms.AES(key)))
    words = Words(KEY, 7, 8, 9)
    (derived,) = seen
    assert len(derived) == 32 and KEY not in derived
    cipher = Cipher(algorithms.AES(derived), modes.ECB()).encryptor()
    into = bytearray(64 + 15)
    words.first(memoryview(bytes(64)), into)
    assert bytes(into[:64]) == cipher.update(b"".join(i.to_bytes(16, "big") for i in range(4)))
    counters = b"".join(((3 << 32 | 1 + k) << 64 | position).to_bytes(16, "big") for position in (5, 70000) for k in range(2))
    expected = np.frombuffer(cipher.update(counters), "<u8").reshape(2, 4)
    np.testing.assert_array_equal(words.at(3, 1, np.array([5, 70000]), 2), expected)
    assert derived.hex() not in repr(words) and repr(words) == "Words(...)"


def test_no_word_is_used_twice(monkeypatch):
    """Every block that a chunk asks for has an address of its own, and none lies among the first words'."""
    used: list[tuple[int, int, int]] = []
    original = Words.at

    def at(self, attempt, word, positions, count=1):
        used.extend((attempt, word + k, int(p)) for p in positions for k in range(count))
        return original(self, attempt, word, positions, count)

    monkeypatch.setattr(Words, "at", at)
    monkeypatch.setattr(exact_normal, "DOUBT", 0.5)  # so that exact comparisons ask for words as well
    noise(KEY, 0, 0, 5000)
    assert len(used) == len(set(used)) > 200
    assert all(attempt > 0 or word > 0 for attempt, word, _ in used)


def test_ties_and_close_comparisons_of_one_value_have_words_of_their_own(monkeypatch):
    """They never meet in practice, so they are made to: blocks 1 and 2 are everybody's, then come the boundary's, then the comparison's."""
    used: list[int] = []

    def at(attempt, word, positions, count=1):
        used.extend(range(word, word + count))
        return np.zeros((1, 2 * count), np.uint64)

    words, zero = SimpleNamespace(at=at), np.zeros(1, np.int64)
    find_cells(words, 0, zero, *split(int(table().tops[5])))
    monkeypatch.setattr(exact_normal, "DOUBT", 2.0)
    monkeypatch.setattr(exact_normal, "accepted_exactly", lambda cell, position, accept, more: [more(0), more(1)] and True)
    accepted(words, 0, zero, zero, np.zeros(1, np.uint64), np.zeros(1, np.uint64), np.zeros(1, np.uint64))
    assert used == [3, 4, 5, 6]


def test_no_two_purposes_share_bytes():
    """Neither fast noise of the same key and address, nor another chunk, stream, step or key."""
    parts = set()
    for key in (KEY, bytes([*KEY[:15], 99])):
        for address in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**63, 2**40, 0)):
            into = bytearray(4096 + 15)
            Words(key, *address).first(memoryview(bytes(4096)), into)
            parts |= {bytes(into[i : i + 16]) for i in range(0, 4096, 16)}
        fast = keystream(key, 0, 0, 0, 4096)
        parts |= {fast[i : i + 16] for i in range(0, 4096, 16)}
    assert len(parts) == 2 * 6 * 256
    for outside in ((-1, 0, 0), (2**64, 0, 0), (0, 2**64, 0), (0, -1, 0)):
        with pytest.raises(ValueError, match="at most 64 bits"):
            Words(KEY, *outside)


def test_a_value_of_zero_and_both_signs_occur(monkeypatch):
    """Words of the stream's own, at the smallest positions: round(2^32 z) for z next to 0 is 0 for one half of a spacing on either side."""
    out = np.empty(4, np.int64)
    bits = [0, 1 << ACCEPT, 2 << ACCEPT, (1 << (POSITION + ACCEPT)) | 1 << ACCEPT]

    class Fixed(Words):
        def first(self, zeros: memoryview, into: bytearray) -> None:
            into[: len(zeros)] = np.array(bits, "<u8").tobytes()

    monkeypatch.setattr(exact_normal, "Words", Fixed)
    fill(KEY, 0, 0, 0, out)
    assert out.tolist() == [0, 1, 1, -1]
