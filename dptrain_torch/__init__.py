"""The torch backend of dptrain, and its API for users with a model of their own."""

from dptrain_torch.describe import describe
from dptrain_torch.engine import clipped_sum, make_plan, per_sample_norms, self_check

__all__ = ["clipped_sum", "describe", "make_plan", "per_sample_norms", "self_check"]
