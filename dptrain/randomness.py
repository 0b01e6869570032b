"""Where randomness that protects people comes from: sampling and noise, keyed by the operating system, never by the user's seed.

Both streams come from counter-based generators with a 128-bit key, Philox (Salmon et al. 2011) for sampling and AES in counter mode for
noise (``gaussian.py``, and ``exact_normal.py`` for secure noise): the stream of a step is addressed by ``(key, step, stream)``, so nothing
has to be stored to continue, and an interrupted logical batch cannot shift what comes after it. One implementation in NumPy serves both
frameworks. ``torch.Generator`` would not do: its CPU engine keeps 32 bits of the seed.

With ``unsafe_seed`` the keys follow from the seed; then anyone who knows the seed can subtract the noise, and the report says so.
Keys are never printed and never written to disk.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from dptrain.errors import ConfigError
from dptrain.gaussian import add_normal, standard_normal
from dptrain.lattice import add_noise

NOISE, SAMPLING = "noise", "sampling"
NoiseKind = Literal["fast", "secure"]


@dataclass(frozen=True)
class RandomKey:
    """A secret 128-bit key for one purpose.

    Args:
        value: the key.
    """

    value: int = field(repr=False)

    @classmethod
    def make(cls, purpose: str, unsafe_seed: int | None = None) -> RandomKey:
        """A fresh key from the operating system, or one derived from an ``unsafe_seed``.

        Args:
            purpose: ``noise`` or ``sampling``; different purposes get independent keys.
            unsafe_seed: None in every run that claims privacy.
        Returns:
            The key.
        """
        if unsafe_seed is None:
            return cls(secrets.randbits(128))
        digest = hashlib.sha256(f"dptrain/{purpose}/{unsafe_seed}".encode()).digest()
        return cls(int.from_bytes(digest[:16], "big"))

    def generator(self, step: int, stream: int = 0) -> np.random.Generator:
        """The generator of one stream of one step; streams never overlap.

        Args:
            step: index of the step.
            stream: index of the stream within the step.
        Returns:
            A NumPy generator. Its 256-bit counter starts at ``(step, stream, 0, 0)``, leaving 2^128 blocks per stream.
        """
        return np.random.Generator(np.random.Philox(key=self.value, counter=[0, 0, stream, step]))


@dataclass(frozen=True)
class StepNoise:
    """The Gaussian noise of one release.

    Args:
        key: the noise key.
        step: index of the release; each index is used once.
        kind: ``fast``: floating-point noise, ``gaussian.py``; ``secure``: noise on a lattice, ``lattice.py``.
    """

    key: RandomKey
    step: int
    kind: NoiseKind = "fast"

    def __post_init__(self) -> None:
        if self.kind not in get_args(NoiseKind):
            raise ConfigError(f"There is no noise {self.kind!r}; choose {' or '.join(get_args(NoiseKind))}.")

    def normal(self, stream: int, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        """Standard normal noise for one parameter; ``fast`` only.

        Args:
            stream: position of the parameter in the model's order.
            shape: shape of the parameter.
            dtype: ``float32`` or ``float64``.
        Returns:
            Independent N(0, 1) values.
        Raises:
            ConfigError: the noise is ``secure``, which means nothing apart from the sum that it is added to.
        """
        if self.kind != "fast":
            raise ConfigError("Secure noise is added to a sum on its lattice, never as floating-point numbers; call added_to.")
        return standard_normal(self.key.value.to_bytes(16, "big"), self.step, stream, math.prod(shape), dtype).reshape(shape)

    def added_to(self, values: np.ndarray, stream: int, std: float, dtype: type | None = None) -> np.ndarray:
        """The sum of one parameter with its noise: the Gaussian mechanism, for values whose bounds ``std`` was made for.

        Args:
            values: float32 or float64; read only.
            stream: position of the parameter in the model's order.
            std: standard deviation.
            dtype: of the noise and of the result, that of the values by default; the addition itself is in the wider of the two.
        Returns:
            A new array. If ``fast``, ``values + std * normal(stream, values.shape)``, without the noise ever standing in memory.
        Guarantee: if ``secure``, post-processing of the Gaussian mechanism on the real numbers, for a sensitivity that is enlarged as
            ``mechanism.event_noise_multiplier`` pays for. If ``fast``, up to floating-point numbers.
        Source: ``lattice.py``.
        """
        add = add_noise if self.kind == "secure" else add_normal
        flat = np.ascontiguousarray(values).reshape(-1)
        return add(self.key.value.to_bytes(16, "big"), self.step, stream, flat, std, dtype).reshape(values.shape)
