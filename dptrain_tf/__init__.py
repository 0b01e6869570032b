"""The TensorFlow backend of dptrain, and its API for users with a Keras model of their own."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before the import: TensorFlow greets on stderr otherwise
# TensorFlow leaves oneDNN off on some processors; with it batched products are twice as fast. Yours to set otherwise, before any import.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

from dptrain_tf.describe import describe
from dptrain_tf.engine import check_bounds, clipped_sum, make_plan, per_sample_norms, project, self_check, validate
from dptrain_tf.fix import fix
from dptrain_tf.lipschitz import *  # noqa: F403
from dptrain_tf.lipschitz import __all__ as _layers
from dptrain_tf.privacy_engine import PrivacyCallback, PrivacyEngine, make_private

__all__ = [
    *_layers, "PrivacyCallback", "PrivacyEngine", "check_bounds", "clipped_sum", "describe", "fix", "make_plan", "make_private",
    "per_sample_norms", "project", "self_check", "validate",
]  # fmt: skip
