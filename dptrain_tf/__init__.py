"""The TensorFlow backend of dptrain, and its API for users with a Keras model of their own."""

import dptrain_tf.process  # noqa: F401  # before TensorFlow is imported
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
