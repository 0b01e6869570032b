"""Shared set-up. Import torch before TensorFlow in one process; keep TensorFlow quiet; one thread per worker is enough."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import torch

torch.set_num_threads(1)
