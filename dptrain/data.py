"""Data sets as validated numpy arrays, the same for every framework.

Everything is checked here, before training, and all at once: an exception or an early exit that depends on one example
in mid-training is itself a leak, so a step never raises on data and this module must have refused it. Whatever is used
as a scale (number of classes, sizes, normalisation) is a constant of the published data set or of the configuration;
`Dataset.public_constants` lists each one and says so when it was taken from private data instead.

`dptrain.data_sources` finds and parses the files; this module turns what it returns into a `Dataset`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dptrain.data_sources import SOURCES, Array, DataError, Images, Request

__all__ = ["SOURCES", "DataError", "Dataset", "SourceStatus", "available", "from_arrays", "load", "validate"]

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test arrays, and the facts about them that a report may publish.

    Args:
        name: what the report calls it.
        x_train: float32 [N, ...] (images are channels-last) or int64 tokens [N, T].
        y_train: int64 class labels [N], or float32 regression targets [N, ...].
        x_test: as `x_train`; may have no examples.
        y_test: as `y_train`.
        num_classes: None for regression.
        public_constants: JSON values that are public: normalisation, sizes, number of classes and where it came from.
    """

    # Examples are private, so they stay out of the repr, and with it out of logs and tracebacks.
    name: str
    x_train: Array = field(repr=False)
    y_train: Array = field(repr=False)
    x_test: Array = field(repr=False)
    y_test: Array = field(repr=False)
    num_classes: int | None
    public_constants: Mapping[str, Any]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.x_train.shape[1:])


@dataclass(frozen=True)
class SourceStatus:
    """Whether a data set is on this machine, for `dptrain doctor`."""

    name: str
    found: bool
    where: str  # the place, or why it was not found


def available() -> list[SourceStatus]:
    """Look for every data set without importing a package or opening a file.

    Returns:
        One status per row of `SOURCES`, in its order.
    """
    statuses = []
    for name, source in SOURCES.items():
        if source.locate is None:
            # Nothing that could be missing: a doctor has no reason to complain.
            statuses.append(SourceStatus(name, True, f"yours: give {' and '.join(sorted(source.accepts))}="))
            continue
        location = source.locate(None)
        statuses.append(SourceStatus(name, location.path is not None, location.where))
    return statuses


def load(
    name: str,
    *,
    path: str | os.PathLike[str] | None = None,
    download: bool = False,
    source: str | None = None,
    num_classes: int | None = None,
    limit: int | None = None,
) -> Dataset:
    """Load and validate a data set.

    Args:
        name: a key of `SOURCES`.
        path: a file or folder to read instead of searching the usual places.
        download: fetch `fashion_mnist` or `cifar10` into the cache if no copy is found.
        source: for `callable`, "package.module:function".
        num_classes: for `npz` and `callable`; without it the number is taken from the labels, which is recorded.
        limit: keep only the first `limit` examples of the training set and of the test set.

    Returns:
        The data set, validated.

    Raises:
        DataError: if it is not found, not readable or not usable.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(str(name), SOURCES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(SOURCES)}."
        raise DataError(f"there is no data set {name!r}: {hint}")
    row = SOURCES[name]
    options = {"path": path is not None, "download": download, "source": source is not None}
    # An option that would be ignored is an error: silence would train on other data than the user meant.
    problems = [
        f"{option}= means nothing for data set {name!r}: remove it."
        for option, given in options.items()
        if given and option not in row.accepts
    ]
    if path is not None and download and "download" in row.accepts:
        problems.append("path= and download=True exclude each other: downloads go to the cache, so remove one of them.")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, np.integer)) or limit < 1):
        problems.append(f"limit={limit!r} is not a whole number of at least 1: give one, or None for all examples.")
    values: dict[str, Any] = {"path": path, "source": source}
    for option, kinds, want in (
        ("path", (str, os.PathLike), "a string or a pathlib.Path"),
        ("source", (str,), '"package.module:function"'),
    ):
        value = values[option]
        if value is not None and not isinstance(value, kinds):
            problems.append(f"{option}={value!r} is a {type(value).__name__}: give {want}.")
    _raise(name, problems)

    raw = row.read(Request(None if path is None else Path(os.path.expanduser(path)), download, source))
    if isinstance(raw, Images):
        return _standardise(name, raw, num_classes, limit)
    return _limited(_from_user(name, f"{name} {path if source is None else source}", raw, num_classes), limit)


def from_arrays(
    x_train: Any,
    y_train: Any,
    x_test: Any = None,
    y_test: Any = None,
    num_classes: int | None = None,
    name: str = "arrays",
) -> Dataset:
    """Make a validated data set from a user's arrays, which are copied.

    Floats become float32. uint8 inputs of rank 3 or more are images and are divided by 255; other whole numbers are
    tokens and become int64. Labels are whole numbers of any dtype; without `num_classes`, floats that are not whole
    numbers, or that have more than one axis, are regression targets.

    Args:
        x_train: inputs [N, ...].
        y_train: labels [N] or float targets [N, ...].
        x_test: inputs of the same shape per example; None for no test set.
        y_test: None exactly when `x_test` is.
        num_classes: give it: otherwise it is the largest label + 1, a fact about private data.
        name: what the report calls it.

    Returns:
        The data set, validated.

    Raises:
        DataError: listing everything that is wrong with the arrays.
    """
    given = dict(zip(_KEYS, (x_train, y_train, x_test, y_test), strict=True))
    problems = [
        f"{here} is given without {other}: give both or neither."
        for here, other in (("x_test", "y_test"), ("y_test", "x_test"))
        if given[here] is not None and given[other] is None
    ]
    arrays: dict[str, Array] = {}
    for key, value in given.items():
        if value is not None:
            try:
                arrays[key] = _as_array(key, value)
            except DataError as error:
                problems.append(str(error))
        elif key.endswith("_train"):
            problems.append(f"{key} is None: give the training arrays.")
    _raise(name, problems)
    classes, is_classes = num_classes, _holds_labels(arrays["y_train"], num_classes)
    problems = _problems(arrays, num_classes, is_classes)
    _raise(name, problems)

    for axis in "xy":
        like = arrays[f"{axis}_train"]
        arrays.setdefault(f"{axis}_test", np.empty((0, *like.shape[1:]), like.dtype))
    if is_classes and num_classes is None:
        # Only a fallback, and recorded: it depends on every label.
        classes = max(int(arrays[key].max()) + 1 for key in ("y_train", "y_test") if len(arrays[key]))
        num_examples = len(arrays["y_train"]) + len(arrays["y_test"])
        if classes < 2:
            problems.append("y_train holds only the label 0, so there is nothing to tell apart: give num_classes=.")
        elif classes > max(1000, num_examples):
            problems.append(
                f"y_train and y_test hold labels up to {classes - 1}, more than there are examples: give "
                "num_classes= if they are labels, or for regression give floats of shape [N, 1]."
            )
    _raise(name, problems)

    classes_source = "given" if num_classes is not None else "inferred from the data"
    constants: dict[str, Any] = {
        "num_train": len(arrays["x_train"]),
        "num_test": len(arrays["x_test"]),
        "sizes_source": "counted in the data",
        "num_classes": classes,
        "num_classes_source": classes_source if is_classes else "none: regression",
    }
    treatment = _treatment(arrays["x_train"])
    if treatment == "uint8 images":
        constants["scale"] = "uint8 images divided by 255"
    # astype copies, so what was validated is what is trained on, whatever the caller does to the arrays later.
    converted = {
        key: array.astype(np.int64 if (treatment == "tokens" if key[0] == "x" else is_classes) else np.float32)
        for key, array in arrays.items()
    }
    if treatment == "uint8 images":
        for key in ("x_train", "x_test"):
            np.divide(converted[key], np.float32(255), out=converted[key])
    classes = None if classes is None else int(classes)
    dataset = Dataset(name=name, **converted, num_classes=classes, public_constants=constants)
    validate(dataset)
    return dataset


def validate(dataset: Dataset) -> None:
    """Check everything that a training step must be able to rely on.

    Args:
        dataset: any data set, built in or built by hand.

    Raises:
        DataError: listing everything that is wrong, one sentence each.
    """
    _validate(dataset, dataset.name)


def _validate(dataset: Dataset, label: str) -> None:
    """As `validate`, with a `label` that says where the data came from."""
    arrays = {key: getattr(dataset, key) for key in _KEYS}
    is_classes = dataset.num_classes is not None
    problems = [f"{key} is a {type(a).__name__}: give a numpy array." for key, a in arrays.items() if not _plain(a)]
    if not problems:
        for key, array in arrays.items():
            allowed = ("float32", "int64") if key[0] == "x" else ("int64",) if is_classes else ("float32",)
            if array.dtype not in [np.dtype(dtype) for dtype in allowed]:
                problems.append(f"{key} has dtype {array.dtype}, not {' or '.join(allowed)}: use from_arrays to convert it.")
        problems += _problems(arrays, dataset.num_classes, is_classes)
    _raise(label, problems)


# ---- the two ways in -----------------------------------------------------------------------------------------------


def _standardise(name: str, raw: Images, num_classes: int | None, limit: int | None) -> Dataset:
    """Scale whole-number images to [0, 1] and standardise them by their published constants."""
    if num_classes not in (None, raw.num_classes):
        raise DataError(f"num_classes={num_classes!r} is wrong for {name!r}: leave it out or give {raw.num_classes}.")
    published = (len(raw.x_train), len(raw.x_test)) == raw.published_sizes

    def inputs(images: Array) -> Array:
        x = images[:limit].astype(np.float32, order="C")
        x /= np.float32(raw.white)
        x -= np.asarray(raw.mean, np.float32)
        x /= np.asarray(raw.std, np.float32)
        return x

    dataset = Dataset(
        name=name,
        x_train=inputs(raw.x_train),
        y_train=raw.y_train[:limit].astype(np.int64),
        x_test=inputs(raw.x_test),
        y_test=raw.y_test[:limit].astype(np.int64),
        num_classes=raw.num_classes,
        public_constants={
            "num_train": len(raw.x_train[:limit]),
            "num_test": len(raw.x_test[:limit]),
            "sizes_source": "published with the data set" if published else "counted in the data",
            "num_classes": raw.num_classes,
            "num_classes_source": "published with the data set",
            "scale": f"divided by {raw.white:g}",
            "mean": list(raw.mean),
            "std": list(raw.std),
        }
        | ({} if limit is None else {"limit": int(limit)}),
    )
    _validate(dataset, f"{name} {raw.where}")
    return dataset


def _from_user(name: str, label: str, raw: Any, num_classes: int | None) -> Dataset:
    """Interpret what a user's file or function gave: a Dataset, a mapping by key, or a tuple of four arrays."""
    if isinstance(raw, (tuple, list)) and len(raw) == len(_KEYS):
        raw = dict(zip(_KEYS, raw, strict=True))
    if not isinstance(raw, (Dataset, Mapping)):
        size = f" of length {len(raw)}" if isinstance(raw, (tuple, list)) else ""
        raise DataError(
            f"data set {label!r}: got a {type(raw).__name__}{size}: give a Dataset, a dict with keys "
            f"{', '.join(_KEYS)}, or a tuple of those four."
        )
    stated = raw.num_classes if isinstance(raw, Dataset) else raw.get("num_classes")
    if isinstance(stated, np.ndarray) and stated.ndim == 0:
        stated = stated.item()  # .npz files hold nothing but arrays
    problems = []
    if stated is not None and num_classes is not None and not np.array_equal(stated, num_classes):
        problems.append(f"num_classes={num_classes!r} was asked for, but the data states {stated!r}: remove one of them.")
    if isinstance(raw, Dataset):
        _raise(label, problems)
        _validate(raw, label)
        # Its own account of where numbers come from stands; the numbers themselves are counted here.
        defaults = {
            "sizes_source": "counted in the data",
            "num_classes_source": "given" if stated else "none: regression",
        }
        facts = {"num_train": len(raw.x_train), "num_test": len(raw.x_test), "num_classes": raw.num_classes}
        return replace(raw, public_constants={**defaults, **raw.public_constants, **facts})
    problems += [f"{key} is missing: add it." for key in ("x_train", "y_train") if raw.get(key) is None]
    # A misspelt x_test would silently leave the test set empty.
    problems += [
        f"{key!r} is not a known key: use only {', '.join(_KEYS)} and num_classes." for key in raw if key not in (*_KEYS, "num_classes")
    ]
    _raise(label, problems)
    classes = stated if num_classes is None else num_classes
    arrays = {key: raw.get(key) for key in _KEYS}
    return replace(from_arrays(**arrays, num_classes=classes, name=label), name=name)


def _limited(dataset: Dataset, limit: int | None) -> Dataset:
    if limit is None:
        return dataset
    kept = {key: getattr(dataset, key)[:limit] for key in _KEYS}
    sizes = {"num_train": len(kept["x_train"]), "num_test": len(kept["x_test"]), "limit": int(limit)}
    return replace(dataset, **kept, public_constants={**dataset.public_constants, **sizes})


# ---- checks: each returns sentences that say what, where, and what to do -------------------------------------------


def _raise(name: str, problems: list[str]) -> None:
    if len(problems) == 1:
        raise DataError(f"data set {name!r}: {problems[0]}")
    if problems:
        raise DataError(f"data set {name!r} has {len(problems)} problems:\n" + "\n".join(f"- {p}" for p in problems))


def _as_array(key: str, value: Any) -> Array:
    if np.ma.isMaskedArray(value) and np.ma.is_masked(value):
        # np.asarray would silently expose the values under the mask.
        raise DataError(f"{key} is a masked array with masked values: fill them in, or remove those examples.")
    try:
        return np.asarray(value)
    except Exception as error:  # any object can be passed, and can fail in any way at all
        raise DataError(f"{key} cannot be made an array ({error}): give a rectangular array of numbers.") from error


def _plain(value: Any) -> bool:
    return isinstance(value, np.ndarray) and not np.ma.isMaskedArray(value)


def _treatment(x: Array) -> str:
    """How an input array is read: 'uint8 images', 'tokens' or 'floats' (booleans are 0 and 1)."""
    if x.dtype == np.uint8 and x.ndim >= 3:
        return "uint8 images"
    return "tokens" if x.dtype.kind in "iu" else "floats"


def _holds_labels(y: Array, num_classes: int | None) -> bool:
    """Whether targets are class labels; floats are ambiguous, so without `num_classes` whole numbers decide."""
    if num_classes is not None or y.dtype.kind != "f":
        return True
    finite = y[np.isfinite(y)]
    return _is_one_hot(y) or (y.ndim == 1 and bool((finite == np.floor(finite)).all()))


def _is_one_hot(y: Array) -> bool:
    if y.ndim != 2 or y.shape[1] < 2 or not len(y) or y.dtype.kind not in "fiub":
        return False
    return bool(((y == 0) | (y == 1)).all() and (y.sum(axis=1) == 1).all())


def _first(bad: Array) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))


def _problems(arrays: Mapping[str, Array], num_classes: Any, is_classes: bool) -> list[str]:
    """Everything wrong with the arrays; where one fault makes a check meaningless, that check is skipped."""
    problems = []
    numeric = {key: array.dtype.kind in "fiub" for key, array in arrays.items()}
    ranked = {key: array for key, array in arrays.items() if array.ndim >= (2 if key[0] == "x" else 1)}
    for key, array in arrays.items():
        if not numeric[key]:
            problems.append(f"{key} has dtype {array.dtype}: give real numbers (encode text and categories first).")
        if key not in ranked:
            want = "one row per example, as from x.reshape(-1, 1)" if key[0] == "x" else "one entry per example"
            problems.append(f"{key} has shape {array.shape}: give {want}.")
    bad_count = is_classes and num_classes is not None and not _is_class_count(num_classes)
    if bad_count:
        problems.append(f"num_classes={num_classes!r} is not a whole number of at least 2: give the number of classes.")
    for split in ("train", "test"):
        x, y = ranked.get(f"x_{split}"), ranked.get(f"y_{split}")
        if split == "train" and ((x is not None and not len(x)) or (y is not None and not len(y))):
            problems.append("the training set is empty: give at least one example.")
        if x is not None and y is not None and len(x) != len(y):
            problems.append(f"x_{split} has {len(x)} examples but y_{split} has {len(y)}: give one target per example.")
        if x is not None and numeric[f"x_{split}"]:
            problems += _input_problems(f"x_{split}", x)
        if y is not None and numeric[f"y_{split}"]:
            problems += _finite_problems(f"y_{split}", y)
            if is_classes:
                problems += _label_problems(f"y_{split}", y, None if bad_count else num_classes)
    for axis, word in (("x", "inputs"), ("y", "targets")):
        train, test = ranked.get(f"{axis}_train"), ranked.get(f"{axis}_test")
        if train is None or test is None:
            continue
        if train.shape[1:] != test.shape[1:]:
            problems.append(
                f"{axis}_train has {word} of shape {train.shape[1:]} but {axis}_test of shape {test.shape[1:]}: give both the same shape."
            )
        elif axis == "x" and numeric["x_train"] and numeric["x_test"] and _treatment(train) != _treatment(test):
            problems.append(
                f"x_train ({train.dtype}) would be read as {_treatment(train)} but x_test ({test.dtype}) as "
                f"{_treatment(test)}: give both the same dtype."
            )
    return problems


def _is_class_count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 2)


def _finite_problems(where: str, array: Array) -> list[str]:
    if array.dtype.kind != "f":
        return []
    finite = np.isfinite(array)
    # Only a type wider than float32 can hold finite values that overflow in it.
    fits = finite if array.dtype.itemsize <= 4 else finite & ~(np.abs(array) > _FLOAT32_MAX)
    problems = []
    for good, what, remedy in (
        (finite, "NaN or infinite values", "remove those examples or fill the values in"),
        (fits | ~finite, "values too large for float32", "rescale them by a public constant"),
    ):
        if not good.all():
            num_bad, first = int(good.size - good.sum()), _first(~good)
            problems.append(f"{where} holds {num_bad} {what}, the first at index {first}: {remedy}.")
    return problems


def _input_problems(where: str, x: Array) -> list[str]:
    if 0 in x.shape[1:]:
        return [f"{where} has shape {x.shape}, so its examples are empty: give at least one value per example."]
    if _treatment(x) != "tokens":
        return _finite_problems(where, x)
    # An embedding would fail, or wrap around, on one example in mid-training.
    bad = (x < 0) | (x > np.iinfo(np.int64).max)
    if not bad.any():
        return []
    index = _first(bad)
    token = f"{where} holds the token {int(x[index])} at index {index}, which is negative or too large for int64"
    return [f"{token}: number tokens from 0, or give numeric features as floats."]


def _label_problems(where: str, y: Array, num_classes: int | None) -> list[str]:
    if _is_one_hot(y):
        return [f"{where} is one-hot of shape {y.shape}: give class numbers, {where}.argmax(axis=1)."]
    if y.ndim != 1:
        remedy = f"use {where}.reshape(-1)" if y.shape[1:] == (1,) else "give one class number per example"
        return [f"{where} has shape {y.shape}, not [N]: {remedy}, or for regression give floats without num_classes=."]
    problems = []

    def report(bad: Array, text: str) -> None:
        if bad.any():
            index = _first(bad)
            problems.append(f"{where} holds the label {y[index].item()} at index {index[0]}, {text}.")

    if y.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            report(np.isfinite(y) & (y != np.floor(y)), "not a whole number: give class numbers, one per example")
    report(np.isfinite(y) & (y < 0), "which is negative: number the classes from 0, or for regression use shape [N, 1]")
    if num_classes is not None:
        beyond = np.isfinite(y) & (y >= num_classes)
        report(beyond, f"not below num_classes={num_classes}: correct the labels or num_classes=")
    return problems
