"""Run directories and checkpoints: safetensors and JSON only, replaced atomically, never a pickle.

A run directory holds ``config.yaml``, ``run.json`` (backend, config hash, calibrated noise), ``ledger.jsonl``, ``metrics.jsonl``,
``checkpoint.safetensors`` (weights, optimizer and step in ONE file, so that they cannot disagree after a kill),
``weights.safetensors`` and ``privacy.json``. Random keys are never among them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dptrain.errors import RunError

FORMAT = "1"


def atomic_write(path: Path, data: bytes) -> None:
    """Replace a file so that a reader sees the old or the new content, never a part.

    Args:
        path: the file.
        data: its new content.
    Raises:
        RunError: the directory cannot be written or the disk is full; the old file is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}); free some space or choose another --out directory."
        ) from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    atomic_write(path, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())


def refuse_devices(path: Path) -> None:
    """Refuse what might never end, such as a pipe.

    Raises:
        OSError: it exists and is not a file.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunError: missing or malformed.
    """
    try:
        refuse_devices(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error}); restore it or start in another --out directory.") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} does not hold a JSON object; restore it or start in another --out directory.")
    return value


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write named arrays as safetensors, atomically, with a digest of everything in the metadata."""
    from safetensors.numpy import save

    plain = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    atomic_write(path, save(plain, metadata={**metadata, "sha256": digest(plain, metadata)}))


def digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """SHA-256 of named arrays and metadata; safetensors itself would read a damaged weight as another weight."""
    total = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, value in sorted(arrays.items()):
        total.update(repr((name, value.dtype.str, value.shape)).encode())
        total.update(np.asarray(value, order="C").tobytes())
    return total.hexdigest()


def load_arrays(path: Path, own: bool = False) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read named arrays and their metadata.

    Args:
        path: the file.
        own: refuse a file that ``save_arrays`` did not write.
    Returns:
        Name -> array, and the metadata.
    Raises:
        RunError: missing, truncated, damaged, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        refuse_devices(path)
        with safe_open(str(path), framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path} is not a readable safetensors file ({reason}); restore it or start in another --out directory.") from None
    stated = metadata.pop("sha256", None)
    if stated is None and own:
        raise RunError(f"{path} carries no digest, so it is not of dptrain; restore it or start in another --out directory.")
    if stated is not None and stated != digest(arrays, metadata):
        raise RunError(f"{path} is damaged, its digest does not match; restore it or start in another --out directory.")
    return arrays, metadata


@dataclass(frozen=True)
class Checkpoint:
    """State from which training continues.

    Args:
        step: steps applied to the weights.
        weights: in the exchange layout.
        optimizer: state of the optimizer.
        bounds: clipping norm and certificates, where they move.
    """

    step: int
    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    bounds: dict[str, np.ndarray] = field(default_factory=dict)

    def save(self, path: Path, run: Mapping[str, str]) -> None:
        """Write to one file, atomically."""
        parts = {"weights": self.weights, "optimizer": self.optimizer, "bounds": self.bounds}
        arrays = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
        save_arrays(path, arrays, {"format": FORMAT, "step": str(self.step), **run})

    @classmethod
    def load(cls, path: Path, run: Mapping[str, str]) -> Checkpoint:
        """Read a checkpoint of the same run.

        Raises:
            RunError: unreadable, of another format, or of another run.
        """
        arrays, metadata = load_arrays(path, own=True)
        if metadata.get("format") != FORMAT or not re.fullmatch("[0-9]{1,15}", metadata.get("step", "")):
            raise RunError(f"{path} is not a dptrain checkpoint of format {FORMAT}; start in another --out directory.")
        if any(metadata.get(key) != value for key, value in run.items()):
            raise RunError(f"{path} belongs to another run; start in another --out directory.")
        parts: dict[str, dict[str, np.ndarray]] = {"weights": {}, "optimizer": {}, "bounds": {}}
        for name, value in arrays.items():
            part, _, rest = name.partition("/")
            if part not in parts:
                raise RunError(f"{path} holds an unknown entry {name!r}; restore it or start in another --out directory.")
            parts[part][rest] = value
        wrong = [name for name, value in parts["bounds"].items() if value.shape != () or not np.isfinite(value) or value < 0]
        if wrong:
            raise RunError(f"{path} holds no finite number as {', '.join(wrong)}; restore it or start in another --out directory.")
        return cls(int(metadata["step"]), parts["weights"], parts["optimizer"], parts["bounds"])

    def refuse_misfit(self, weights: Mapping[str, np.ndarray], path: Path) -> None:
        """Refuse weights that are not those of the model, or from which no training can go on, and the optimizer's state likewise.

        Args:
            weights: those of the model, fresh.
            path: the file, for the message.
        Raises:
            RunError: names, shapes, types or values are wrong.
        """
        found = {name: (value.dtype, value.shape) for name, value in self.weights.items()}
        wanted = {name: (value.dtype, value.shape) for name, value in weights.items()}
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if wrong:
            raise RunError(f"{path} does not fit the model, see {wrong[0]!r}; restore it or start in another --out directory.")
        sizes = {1, *(value.size for value in weights.values())}
        for name, value in [*self.weights.items(), *self.optimizer.items()]:
            if np.issubdtype(value.dtype, np.inexact) and not np.isfinite(value).all():
                raise RunError(
                    f"{path} holds values that are not finite in {name!r}: the training has diverged, or the file is damaged; start in "
                    "another --out directory, with a lower learning rate."
                )
        if any(value.size not in sizes for value in self.optimizer.values()):
            raise RunError(f"{path} holds an optimizer state that does not fit the model; restore it or start in another --out directory.")
