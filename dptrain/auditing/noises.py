"""What the noise of many steps looks like: at steps that no short audit reaches, under other keys, at every lag, and in its tails.

Noise is asked of the backend for an empty sum (``privatize`` of ``zeros``), which needs no data and costs little, so that far more of it
can be looked at than the releases of an audit have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dptrain import trainer
from dptrain.auditing.bounds import FALSE_ALARM, Array
from dptrain.auditing.checks import pieces
from dptrain.auditing.findings import Finding
from dptrain.auditing.normal import furthest_normal, most_alike, variance_test
from dptrain.auditing.subject import Subject
from dptrain.randomness import NOISE, RandomKey, StepNoise

MOST_NUMBERS = 2**25  # in all probes together; what larger models get is fewer probes
MOST_PROBES, FEWEST_PROBES = 128, 12
FURTHEST = 100_000  # step indices up to which noise is looked at, whatever the run's length
BITS = 128


def probe_steps(num_steps: int, count: int, rng: np.random.Generator) -> list[int]:
    """Step indices: the first ones, round ones with their neighbours, the last one, and random ones.

    Args:
        num_steps: of the run.
        count: how many.
        rng: chooses.
    Returns:
        Sorted, each once.
    """
    end = max(num_steps, FURTHEST)
    bases = [2**k for k in range(4, 17)] + [m * 10**k for k in range(1, 6) for m in (1, 5)]
    listed = [*range(12), num_steps - 1, *(b + off for b in rng.permutation(bases) for off in (0, -1))]
    half = list(dict.fromkeys(int(t) for t in listed if 0 <= t < end))[: max(12, count // 2)]
    rest = [int(t) for t in rng.integers(0, end, count)]
    return sorted(list(dict.fromkeys([*half, *rest]))[:count])


def drawn(subject: Subject, key: RandomKey, step: int) -> Array:
    """The noise that the backend adds to an empty sum, whitened."""
    setup = subject.setup
    noise = StepNoise(key, step, setup.config.privacy.noise)
    released = setup.backend.privatize(setup.backend.zeros(setup.model), subject.plan, subject.stds, noise)
    return subject.whitened(dict(setup.backend.sums(setup.model, released)))


def probes(subject: Subject, seed: int) -> tuple[list[int], list[Array]]:
    """Noise of many steps under one key.

    Args:
        subject: the step.
        seed: of the choice of steps.
    Returns:
        Step indices, and a whitened vector for each.
    """
    size = sum(len(part) for part in subject.groups(subject.whitened(dict(subject.watch.parameters(subject.setup.model)))).values())
    count = int(min(MOST_PROBES, max(FEWEST_PROBES, MOST_NUMBERS // max(1, size))))
    key = trainer.RandomKey.make(NOISE)
    steps = probe_steps(subject.setup.num_steps, count, np.random.default_rng([seed, 2]))
    return steps, [drawn(subject, key, step) for step in steps]


def later_steps(subject: Subject, steps: Sequence[int], seen: Sequence[Array]) -> Finding:
    """The noise of every step has the claimed standard deviation, and none repeats or resembles that of another.

    Returns:
        The finding; chi-square tests of each group of each step, and all correlations, at one in a million together.
    """
    places = {name: where for name, where in pieces(subject).items() if where.stop > where.start}
    tests = [(*variance_test(v[where]), f"{name}, step {t}") for t, v in zip(steps, seen, strict=True) for name, where in places.items()]
    p, ratio, worst = min(tests)
    alike, pair = most_alike(seen)
    between = f"steps {steps[pair[0]]} and {steps[pair[1]]}"
    text = (
        f"at {len(steps)} steps up to {steps[-1]}: largest deviation {ratio:.4g} times the claimed standard deviation in {worst} "
        f"(p = {p:.3g}), largest correlation {alike:.3g} standard deviations, of {between}"
    )
    passed = p > FALSE_ALARM / len(tests) and alike <= furthest_normal(len(seen) * (len(seen) - 1) // 2)
    return Finding("noise of later steps", bool(passed), text, {"p_value": p, "largest_correlation": alike})


def key_of_the_noise(subject: Subject) -> Finding:
    """The noise is a function of key and step, and of every bit of the key.

    What comes from elsewhere, such as a generator with a fixed seed, may be the same in the next process, which nothing that runs in one
    can see; and a run with ``unsafe_seed`` that replays a step would release other bits without recording them.

    Returns:
        The finding: the same bits for the same key and step; for keys that differ in one bit, correlations as between independent ones.
    """
    key = trainer.RandomKey.make(NOISE)
    first, again = drawn(subject, key, 3), drawn(subject, key, 3)
    same = bool(np.array_equal(first, again))
    count = int(min(BITS, max(FEWEST_PROBES, MOST_NUMBERS // max(1, len(first)))))
    bits = np.unique(np.linspace(0, BITS - 1, count).astype(int))
    flipped = [drawn(subject, type(key)(key.value ^ (1 << int(bit))), 3) for bit in bits]
    alike, _ = most_alike([first, *flipped])
    # Few numbers cannot tell keys apart for sure, but equal ones are equal.
    repeats = any(np.array_equal(first, other) for other in flipped)
    passed = same and not repeats and alike <= furthest_normal((len(bits) + 1) * len(bits) // 2)
    text = f"one key twice gives {'the same' if same else 'OTHER'} noise; keys that differ in one of {len(bits)} bits give "
    text += "THE SAME noise" if repeats else f"noise that is correlated by at most {alike:.3g} standard deviations"
    return Finding("key of the noise", bool(passed), text, {"repeatable": float(same), "largest_correlation": alike})


def keys(unsafe_seed: int | None, count: int = 2**14) -> Finding:
    """Keys are never made twice, and every bit of them is a fair coin.

    Args:
        unsafe_seed: of the config; with it the keys follow from a number that is no secret.
        count: keys of either purpose.
    Returns:
        The finding. Keys with fewer than about 27 random bits repeat among so many; no test can tell a secret key from one that only looks
        random.
    """
    if unsafe_seed is not None:
        return Finding(
            "keys", False, "privacy.unsafe_seed makes noise and sampling a function of a number that the config shows; remove it"
        )
    values = [trainer.RandomKey.make(purpose).value for purpose in (trainer.NOISE, trainer.SAMPLING) for _ in range(count)]
    repeated = len(values) - len(set(values))
    words = np.frombuffer(b"".join((v % 2**BITS).to_bytes(BITS // 8, "little") for v in values), np.uint8).reshape(len(values), -1)
    ones = np.unpackbits(words, axis=1).sum(0, dtype=np.int64)
    worst = float(np.abs(ones - len(values) / 2).max() / math.sqrt(len(values) / 4))
    passed = not repeated and worst <= furthest_normal(BITS)
    text = f"{len(values)} keys, {repeated} of them made before; the least even of {BITS} bits is off by {worst:.3g} standard deviations"
    return Finding("keys", bool(passed), text, {"repeated": float(repeated), "least_even_bit": worst})
