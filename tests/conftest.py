"""Shared set-up. Import torch before TensorFlow in one process; keep TensorFlow quiet; one thread per worker is enough."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as dptrain_tf does where it is imported first

import torch

torch.set_num_threads(1)


def declare_torchvision_operators() -> object:
    """Let torchvision, and so timm, be imported beside a torch that its compiled operators do not fit: they are declared, never called.

    Returns:
        What keeps the declarations alive, None where none are needed. torchvision itself is not imported, which takes seconds.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
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


TORCHVISION_OPERATORS = declare_torchvision_operators()
