"""Damaged data files: arrays that a training can rely on, or one DataError."""

from __future__ import annotations

import numpy as np
import pytest

from dptrain import data_sources
from dptrain.data import load, validate
from dptrain.errors import DataError
from tests.core import test_data, test_data_adult
from tests.core.shared import write_npz
from tests.fuzz.tools import LENGTHS, damaged, fuzz


def npz(folder):
    return write_npz(folder / "d.npz"), "npz", folder / "d.npz"


def csv(folder):
    test_data_adult.write_official(folder)
    return folder / "adult.data", "adult", folder


def idx(folder):
    test_data.write_fashion(folder, compressed=False)
    return folder / "train-labels-idx1-ubyte", "fashion_mnist", folder


def idx_images(folder):
    test_data.write_fashion(folder)
    return folder / "t10k-images-idx3-ubyte.gz", "fashion_mnist", folder


def cifar(folder):
    test_data.write_folder(folder, test_data.cifar_batches("bin"))
    return folder / "data_batch_2.bin", "cifar10", folder


def cifar_python(folder):
    test_data.write_folder(folder, test_data.cifar_batches("py2"))
    return folder / "data_batch_3", "cifar10", folder


def cifar_archive(folder):
    test_data.write_tar(folder / "cifar-10-binary.tar.gz", test_data.cifar_batches("bin"))
    return folder / "cifar-10-binary.tar.gz", "cifar10", folder


@LENGTHS
@pytest.mark.parametrize("make", [npz, csv, idx, idx_images, cifar, cifar_python, cifar_archive])
def test_a_damaged_data_file(tmp_path, monkeypatch, make, length):
    monkeypatch.setattr(data_sources, "_package_folder", lambda package: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, name, path = make(tmp_path)

    def check(content):
        file.write_bytes(content)
        try:
            found = load(name, path=str(path))
        except DataError:
            return
        validate(found)
        assert np.isfinite(found.x_train).all()

    fuzz(check, damaged(file.read_bytes()), examples=100, length=length)
