"""Privacy accounting for Poisson-sampled Gaussian mechanisms: events, accountants, calibration and the ledger.

Importing this package is cheap and imports no framework; SciPy, autodp and dp-accounting load at the first epsilon.
"""

from __future__ import annotations

from accounting.accountant import ACCOUNTANTS, Accountant, NeighboringRelation, get_accountant
from accounting.calibrate import (
    calibrate_noise_multiplier,
    calibrate_sample_rate,
    calibrate_steps,
    calibrate_to_advantage,
    calibrate_to_delta,
)
from accounting.errors import AccountingError, LedgerError
from accounting.events import Events, SampledGaussian, normalise
from accounting.ledger import PrivacyLedger
from accounting.tradeoff import TradeOff, trade_off

__all__ = [
    "ACCOUNTANTS",
    "Accountant",
    "AccountingError",
    "Events",
    "LedgerError",
    "NeighboringRelation",
    "PrivacyLedger",
    "SampledGaussian",
    "TradeOff",
    "calibrate_noise_multiplier",
    "calibrate_sample_rate",
    "calibrate_steps",
    "calibrate_to_advantage",
    "calibrate_to_delta",
    "get_accountant",
    "normalise",
    "trade_off",
]
