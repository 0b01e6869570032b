"""All kinds of events, by the name they have in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accounting.errors import AccountingError
from accounting.events import Event, SampledGaussian
from accounting.schemes import CappedGaussian, FixedSizeGaussian
from accounting.tuning import Tuning

KINDS: Mapping[str, type[SampledGaussian | CappedGaussian | FixedSizeGaussian | Tuning]] = {
    cls.kind: cls for cls in (SampledGaussian, CappedGaussian, FixedSizeGaussian, Tuning)
}


def event_from_dict(data: Any) -> Event:
    """Returns the event that `to_dict` described.

    Args:
      data: a dict with the event's kind and fields.

    Raises:
      AccountingError: for an unknown kind, and for missing, unknown or invalid fields.
    """
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise AccountingError(f"event_from_dict: kind must be one of {', '.join(KINDS)}, got {data!r}; pass what to_dict() returned.")
    return KINDS[kind].from_dict(data)
