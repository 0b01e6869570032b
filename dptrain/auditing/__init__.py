"""Empirical audits: lower bounds on epsilon, checks of every part of a step, and membership inference. Nothing here is private."""

from __future__ import annotations

from dptrain.auditing.findings import Audit, Finding
from dptrain.auditing.run import audit, audit_setup

__all__ = ["Audit", "Finding", "audit", "audit_setup"]
