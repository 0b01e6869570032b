"""Privacy accounting for sampled Gaussian mechanisms: events, accountants, calibration and the ledger.

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
from accounting.events import Event, Events, SampledGaussian, normalise
from accounting.kinds import event_from_dict
from accounting.ledger import PrivacyLedger
from accounting.schemes import CappedGaussian, FixedSizeGaussian, GaussianEvent, shuffled_pass
from accounting.tradeoff import TradeOff, trade_off
from accounting.tuning import Tuning

__all__ = [
    "ACCOUNTANTS",
    "Accountant",
    "AccountingError",
    "CappedGaussian",
    "Event",
    "Events",
    "FixedSizeGaussian",
    "GaussianEvent",
    "LedgerError",
    "NeighboringRelation",
    "PrivacyLedger",
    "SampledGaussian",
    "TradeOff",
    "Tuning",
    "calibrate_noise_multiplier",
    "calibrate_sample_rate",
    "calibrate_steps",
    "calibrate_to_advantage",
    "calibrate_to_delta",
    "event_from_dict",
    "get_accountant",
    "normalise",
    "shuffled_pass",
    "trade_off",
]
