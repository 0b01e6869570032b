"""The output directory of a run: who it belongs to, and what was spent there."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accounting import PrivacyLedger
from dptrain.checkpoint import FORMAT, Checkpoint, atomic_write, read_json, write_json
from dptrain.config import TrainConfig
from dptrain.errors import RunError


class RunDirectory:
    """Opens or creates the directory of a run; refuses one that belongs to another config or backend.

    Args:
        path: the directory, or None for a run that leaves nothing behind.
        config: the run's config.
        backend: name of the backend.
        facts: what must be the same when the run is resumed, such as the number of examples.
    Raises:
        RunError: the directory is not empty and not of this run, or cannot be written.
    """

    def __init__(self, path: str | Path | None, config: TrainConfig, backend: str, facts: Mapping[str, Any]) -> None:
        self.path = Path(path) if path is not None else None
        self.identity = {"config_hash": config.hash, "backend": backend}
        self.record: dict[str, Any] = {"format": FORMAT, **self.identity, **facts}
        self.resumed = False
        if self.path is None:
            self.ledger = PrivacyLedger(None)
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            present = sorted(p.name for p in self.path.iterdir() if not p.name.endswith(".tmp"))
        except OSError as error:
            raise RunError(f"The output directory {self.path} cannot be used ({error.strerror or error}); choose another --out.") from None
        if "run.json" in present:
            self._check_owner()
            self.ledger = PrivacyLedger.open(self.path / "ledger.jsonl")  # refuses if it is gone: what was spent would be forgotten
            return
        self.ledger = self._first_ledger(present)
        try:  # the ledger first and run.json last: a directory with run.json has a ledger, whenever its making was interrupted
            atomic_write(self.path / "config.yaml", config.to_yaml().encode())
            write_json(self.path / "run.json", self.record)
        except BaseException:
            self.ledger.close()
            raise

    def _first_ledger(self, present: Sequence[str]) -> PrivacyLedger:
        """An empty ledger in an empty directory, or in one whose making was interrupted."""
        assert self.path is not None
        if not present:
            return PrivacyLedger(self.path / "ledger.jsonl")
        if "ledger.jsonl" in present and set(present) <= {"ledger.jsonl", "config.yaml"}:
            ledger = PrivacyLedger.open(self.path / "ledger.jsonl")
            if not ledger.num_releases:
                return ledger
            ledger.close()
        raise RunError(
            f"The output directory {self.path} is not empty and holds no dptrain run (found {present[0]}); choose another --out."
        )

    def _check_owner(self) -> None:
        assert self.path is not None
        stored = read_json(self.path / "run.json")
        if stored.get("format") != FORMAT:
            raise RunError(
                f"{self.path} was written by another version of dptrain (format {stored.get('format')!r}); choose another --out."
            )
        for key, value in self.record.items():
            if stored.get(key) != value:
                raise RunError(
                    f"The output directory {self.path} belongs to another run ({key} {stored.get(key)!r}, here {value!r}); "
                    "choose another --out, or resume with the same config, backend and data."
                )
        self.record, self.resumed = stored, True

    def remember(self, **facts: Any) -> None:
        """Store facts that a resumed run must reuse, such as the calibrated noise multiplier."""
        self.record.update(facts)
        if self.path is not None:
            write_json(self.path / "run.json", self.record)

    def load_checkpoint(self) -> Checkpoint | None:
        """The latest checkpoint, if there is one."""
        file = self.path / "checkpoint.safetensors" if self.path else None
        return Checkpoint.load(file, self.identity) if file is not None and file.exists() else None

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        if self.path is not None:
            checkpoint.save(self.path / "checkpoint.safetensors", self.identity)

    def log(self, **values: Any) -> None:
        """Append one line to ``metrics.jsonl``; a loss that is not finite becomes null, which every JSON reader knows."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if self.path is not None:
            try:
                with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(values) + "\n")
                    file.flush()
            except OSError as error:
                raise RunError(f"{self.path / 'metrics.jsonl'} cannot be written ({error.strerror or error}); free some space.") from None

    def close(self) -> None:
        """Release the ledger's lock."""
        self.ledger.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __fspath__(self) -> str:
        return os.fspath(self.path or "")
