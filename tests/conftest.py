"""Shared set-up. Import torch before TensorFlow in one process; keep TensorFlow quiet; one thread per worker is enough."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as dptrain_tf does where it is imported first

import torch

torch.set_num_threads(1)


def loaded(file: Path) -> ModuleType:
    """A file as a module; no folder of examples is put on the path, where its names could hide others."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# torchvision, and so timm, can then be imported beside a torch that it does not fit; the module keeps its declarations alive.
PACKAGES = loaded(Path(__file__).parents[1] / "examples" / "packages.py")
