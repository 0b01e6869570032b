"""What ``fit`` makes of the data it is given: arrays, read once, since a Poisson sample needs every example at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from dptrain.errors import DataError
from dptrain.sampling import take

KINDS = {"b": "booleans", "i": "integers", "u": "integers", "f": "real numbers"}
RANDOM = (
    "The training data set differs from one pass to the next: it is augmented at random, and reading it once would freeze one draw; "
    "augment inside the model, with Keras' preprocessing layers, or remove the augmentation."
)


@dataclass(frozen=True, eq=False)
class Data:
    """Training data.

    Args:
        x: inputs, an array ``[N, ...]`` or a tuple or mapping of such.
        y: targets, in the same way.
        weight: ``[N]``, what each example's loss is multiplied by; None stands for 1.
        batch: examples in a batch of a data set, else Keras' default.
    """

    x: Any
    y: Any
    weight: np.ndarray | None = None
    batch: int = 32

    @property
    def count(self) -> int:
        """N."""
        return len(leaves(self.x)[0])

    @property
    def targets(self) -> Any:
        """What the training step hands to the loss."""
        return self.y if self.weight is None else (self.y, self.weight)


def structure(x: Any, function: Callable[[Any], Any]) -> Any:
    """A structure of arrays with a function applied to each; lists become tuples."""
    if isinstance(x, Mapping):
        return {key: structure(value, function) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return tuple(structure(value, function) for value in x)
    return function(x)


def leaves(x: Any) -> list[Any]:
    """The arrays of a structure."""
    found: list[Any] = []
    structure(x, found.append)
    return found


def array(x: Any) -> np.ndarray:
    """An array of numbers, one row per example.

    Raises:
        DataError: it is none.
    """
    if isinstance(x, tf.RaggedTensor | tf.SparseTensor):
        raise DataError(f"fit was given a {type(x).__name__}, whose examples have no common shape; give dense arrays, padded.")
    if hasattr(x, "to_numpy"):  # pandas
        x = x.to_numpy()
    if not hasattr(x, "__array__"):
        raise DataError(
            f"fit takes NumPy arrays, tensors, tuples and dictionaries of these, or a batched tf.data.Dataset of known size, not "
            f"{type(x).__name__}: each step draws from all examples, which a generator cannot serve."
        )
    found = np.asarray(x)
    if found.dtype.kind not in KINDS or found.ndim == 0:
        raise DataError(f"fit was given an array of {found.dtype} with shape {found.shape}; give numbers, one row per example.")
    return found


def load(x: Any, y: Any, sample_weight: Any = None) -> Data:
    """All examples as arrays.

    Args:
        x: arrays, or a batched ``tf.data.Dataset`` of known finite size.
        y: targets, if ``x`` holds arrays.
        sample_weight: ``[N]`` or None, if ``x`` holds arrays.
    Returns:
        The data.
    Raises:
        DataError: they cannot be sampled from, with the reason.
    """
    batch = Data.batch
    if isinstance(x, tf.data.Dataset):
        if y is not None or sample_weight is not None:
            raise DataError("fit was given a data set and y or sample_weight; these belong into the data set.")
        x, y, sample_weight, batch = read(x)
    if y is None:
        raise DataError("fit was given no targets y, and a loss of one example needs its target.")
    x, y = structure(x, array), structure(y, array)
    counts = {len(part) for part in [*leaves(x), *leaves(y)]}
    if len(counts) != 1:
        raise DataError(f"The arrays given to fit hold different numbers of examples: {sorted(counts)}; make them equal.")
    if not counts.pop():
        raise DataError("fit was given no examples.")
    return Data(x, y, weights(sample_weight, len(leaves(x)[0])), batch)


def weights(sample_weight: Any, count: int) -> np.ndarray | None:
    """Weights ``[N]``."""
    if sample_weight is None:
        return None
    found = array(sample_weight)
    if found.size != count or len(found) != count:
        raise DataError(f"sample_weight has shape {found.shape} for {count} examples; give one number per example.")
    return found.reshape(-1).astype(np.float32 if found.dtype.kind != "f" else found.dtype)


def by_class(class_weight: Mapping[int, float], y: Any) -> np.ndarray:
    """Weight of each example by its class, as Keras has it: labels, or the largest entry of a row; classes that are not named weigh 1.

    Raises:
        DataError: there is more than one array of targets.
    """
    if not isinstance(y, np.ndarray):
        raise DataError("class_weight needs one array of targets; give sample_weight instead.")
    labels = y.reshape(len(y), -1)
    classes = labels.argmax(axis=1) if labels.shape[1] > 1 else np.round(labels[:, 0]).astype(np.int64)
    found = np.ones(len(y), np.float32)
    for label, weight in class_weight.items():
        found[classes == int(label)] = weight
    return found


def check(data: Data) -> None:
    """Refuse values that are not finite, before training: a step never raises on data (pitfalls.md G29).

    Raises:
        DataError: lists which.
    """
    problems = []
    for name, part in (("x", data.x), ("y", data.y), ("sample_weight", data.weight if data.weight is not None else ())):
        bad = sum(int((~np.isfinite(a)).sum()) for a in leaves(part) if a.dtype.kind == "f")
        if bad:
            problems.append(f"{name} holds {bad} values that are not finite")
    if problems:
        raise DataError(f"The training data cannot be used: {'; '.join(problems)}. Remove or replace these examples.")


def split(data: Data, fraction: float) -> tuple[Data, tuple[Any, ...]]:
    """Take validation data away from the end, as Keras does.

    Args:
        data: everything.
        fraction: share of the examples.
    Returns:
        Training data, and validation data for ``fit``.
    Raises:
        DataError: nothing is left on one side.
    """
    at = int(np.floor(data.count * (1.0 - fraction)))
    if not 0 < at < data.count:
        raise DataError(f"validation_split={fraction!r} leaves no example on one side of {data.count}; give validation_data.")

    def part(where: np.ndarray) -> Data:
        return replace(data, x=take(data.x, where), y=take(data.y, where), weight=None if data.weight is None else data.weight[where])

    kept, held = part(np.arange(at)), part(np.arange(at, data.count))
    return kept, (held.x, held.y) if held.weight is None else (held.x, held.y, held.weight)


# --- tf.data ----------------------------------------------------------------------------------------------------------------


def read(data: Any) -> tuple[Any, Any, Any, int]:
    """A data set as arrays.

    Returns:
        Inputs, targets, weights or None, examples in the largest batch.
    Raises:
        DataError: infinite, of unknown size, repeated, random, or not batched.
    """
    size = int(data.cardinality())
    if size == tf.data.INFINITE_CARDINALITY:
        raise DataError("The training data set is infinite, so no sample rate exists; remove repeat(), and set epochs or steps_per_epoch.")
    if size == tf.data.UNKNOWN_CARDINALITY:
        raise DataError("The size of the training data set is unknown; add .apply(tf.data.experimental.assert_cardinality(batches)).")
    if repeats(data):
        raise DataError(
            "The training data set repeats its examples, so one person's example would count as several; remove repeat(), and set epochs."
        )
    spec = data.element_spec
    if not isinstance(spec, tuple) or len(spec) not in (2, 3):
        raise DataError("The training data set must hold pairs (inputs, targets), or triples with one weight per example.")
    if any(getattr(leaf, "shape", None) is None or leaf.shape.rank == 0 for leaf in leaves(spec)):
        raise DataError("The training data set is not batched; call batch() on it.")
    parts = [structure(batch, array) for batch in data]
    if not parts:
        raise DataError("fit was given no examples.")
    if fingerprint(parts) != fingerprint(structure(batch, array) for batch in data):
        raise DataError(RANDOM)
    try:
        x, y, *weight = joined(parts)
    except ValueError:
        raise DataError("The batches of the training data set have different shapes; pad all examples to one length.") from None
    return x, y, weight[0] if weight else None, max(len(leaves(part)[0]) for part in parts)


def repeats(data: Any) -> bool:
    """Whether there is a ``repeat`` anywhere in a data set."""
    return "Repeat" in type(data).__name__ or any(repeats(one) for one in getattr(data, "_inputs", list)())


def joined(parts: list[Any]) -> Any:
    """One structure of arrays from one per batch."""
    first = parts[0]
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(joined(list(column)) for column in zip(*parts, strict=True))
    return np.concatenate(parts)


def fingerprint(parts: Any) -> int:
    """A number that does not depend on the order of the examples."""

    def rows(batch: Any) -> Iterator[bytes]:
        arrays = leaves(batch)
        return (b"".join(a[i].tobytes() for a in arrays) for i in range(len(arrays[0])))

    return sum(hash(row) for batch in parts for row in rows(batch))


# --- synthetic examples -----------------------------------------------------------------------------------------------------


def synthetic(x: Any, count: int) -> Any:
    """Examples with the shapes and types of a structure of arrays; no value of these is used.

    Args:
        x: arrays ``[N, ...]``.
        count: examples.
    """
    rng = np.random.default_rng(0)

    def one(a: np.ndarray) -> np.ndarray:
        shape = (count, *a.shape[1:])
        if a.dtype.kind == "f":
            return rng.uniform(0.1, 0.9, shape).astype(a.dtype)
        return rng.integers(0, 2, shape).astype(a.dtype)

    return structure(x, one)


def inputs_of(model: Any) -> Any:
    """Synthetic inputs for a model that knows their shapes, else None."""
    specs = getattr(getattr(model, "_functional", None) or model, "_inputs_struct", None)
    if specs is None:
        return None
    flat = leaves(specs)
    if any(None in spec.shape[1:] or not spec.dtype.startswith(("float", "int", "uint", "bool")) for spec in flat):
        return None
    return synthetic(structure(specs, lambda spec: np.zeros((0, *spec.shape[1:]), spec.dtype)), 3)
