"""Shared pieces of the accounting tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # oracles.py, whatever the import mode

from accounting import SampledGaussian


@pytest.fixture
def pairs():
    """Turns (sigma, q, count) triples into events."""
    return lambda triples: [(SampledGaussian(s, q), n) for s, q, n in triples]
