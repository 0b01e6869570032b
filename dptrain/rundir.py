"""The output directory of a run: who it belongs to, and what was spent there."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
        about: what the ledger's header states of the data, besides the name of the run.
    Raises:
        RunError: the directory is not empty and not of this run, or cannot be written.
    """

    def __init__(
        self,
        path: str | Path | None,
        config: TrainConfig,
        backend: str,
        facts: Mapping[str, Any],
        about: Mapping[str, str | int] | None = None,
    ) -> None:
        self.path = Path(path) if path is not None else None
        self.identity = {"config_hash": config.hash, "backend": backend}
        self.record: dict[str, Any] = {"format": FORMAT, **self.identity, **facts}
        self.resumed = False
        self.about = dict(about or {})
        self.run: str | None = f"{config.hash}-{secrets.token_hex(8)}"
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
            self._guarded(self._check_ledger)
        else:
            self.ledger = self._first_ledger(present)
            self._guarded(self._begin, config)
        self._guarded(self._sweep)

    def _guarded(self, action: Callable[..., None], *args: Any) -> None:
        """Do something, and let the ledger go if it fails."""
        try:
            action(*args)
        except BaseException:
            self.ledger.close()
            raise

    def _begin(self, config: TrainConfig) -> None:
        """The ledger came first and run.json comes last: a directory with run.json has a ledger, whenever its making was interrupted."""
        assert self.path is not None
        self.record["run"] = self.run
        atomic_write(self.path / "config.yaml", config.to_yaml().encode())
        write_json(self.path / "run.json", self.record)

    def _first_ledger(self, present: Sequence[str]) -> PrivacyLedger:
        """An empty ledger in an empty directory, or in one whose making was interrupted."""
        assert self.path is not None
        if "ledger.jsonl" in present and set(present) <= {"ledger.jsonl", "config.yaml"}:
            with PrivacyLedger.open(self.path / "ledger.jsonl") as left:
                unused = not left.num_releases
            if unused:  # made for another name of this run; the ledger last, so that a kill in between leaves what is understood here
                (self.path / "config.yaml").unlink(missing_ok=True)
                (self.path / "ledger.jsonl").unlink()
                present = ()
        if not present:
            return PrivacyLedger(self.path / "ledger.jsonl", facts={**self.about, "run": str(self.run)})
        raise RunError(
            f"The output directory {self.path} is not empty and holds no dptrain run (found {present[0]}); choose another --out."
        )

    def _check_ledger(self) -> None:
        """Refuse the ledger of another run, whose releases would be taken for those of this one."""
        self.run = self.record.get("run")  # none in a directory that an earlier version began, and none in its ledger
        if self.ledger.facts.get("run") != self.run:
            raise RunError(f"{self.ledger.path} belongs to another run, or to none; restore it, or start in another --out directory.")

    def _sweep(self) -> None:
        """Remove what a killed process left half written; the ledger's lock keeps others away."""
        assert self.path is not None
        drop_fragment(self.path / "metrics.jsonl")
        for left in self.path.glob(".*.tmp"):
            with suppress(OSError):
                left.unlink()

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
        for key, kind in (("noise_multiplier", float), ("run", str)):
            if not isinstance(stored.get(key), kind | None):
                raise RunError(
                    f"{self.path / 'run.json'} holds no {kind.__name__} as {key} ({stored[key]!r}); restore it or choose another --out."
                )
        self.record, self.resumed = stored, True

    def remember(self, **facts: Any) -> None:
        """Store facts that a resumed run must reuse, such as the calibrated noise multiplier."""
        self.record.update(facts)
        if self.path is not None:
            write_json(self.path / "run.json", self.record)

    @property
    def owner(self) -> dict[str, str]:
        """What a checkpoint has to say of its run."""
        return {**self.identity, **({} if self.run is None else {"run": self.run})}

    def load_checkpoint(self) -> Checkpoint | None:
        """The latest checkpoint, if there is one."""
        file = self.path / "checkpoint.safetensors" if self.path else None
        return Checkpoint.load(file, self.owner) if file is not None and file.exists() else None

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        if self.path is not None:
            checkpoint.save(self.path / "checkpoint.safetensors", self.owner)

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


def drop_fragment(path: Path) -> None:
    """Cut off a last line without an end, to which the next one would be glued.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        with open(path, "r+b") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error}); choose another --out.") from None


def begun(path: str | Path | None) -> dict[str, Any]:
    """What ``run.json`` of a directory says, before anything is locked; empty where no run was begun.

    Raises:
        RunError: it is malformed.
    """
    file = Path(path) / "run.json" if path is not None else None
    try:
        present = file is not None and file.exists()
    except OSError:
        present = False  # the directory cannot be used, which is said where it is made
    return read_json(file) if file is not None and present else {}
