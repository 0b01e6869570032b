"""LipDP's public names on top of dptrain: ``from deel.lipdp...`` becomes ``from dptrain_tf.lipdp...``; see docs/lipdp.md."""

from dptrain_tf.lipdp import dynamic, layers, losses, model, pipeline, sensitivity, utils
from dptrain_tf.lipdp.dynamic import *  # noqa: F403
from dptrain_tf.lipdp.layers import *  # noqa: F403
from dptrain_tf.lipdp.losses import *  # noqa: F403
from dptrain_tf.lipdp.model import *  # noqa: F403
from dptrain_tf.lipdp.pipeline import *  # noqa: F403
from dptrain_tf.lipdp.sensitivity import *  # noqa: F403
from dptrain_tf.lipdp.utils import *  # noqa: F403

__all__ = [name for part in (dynamic, layers, losses, model, pipeline, sensitivity, utils) for name in part.__all__]


def __getattr__(name: str) -> object:
    if name == "DPGD_Mechanism":
        raise ImportError("DPGD_Mechanism has no counterpart, since epsilon comes from the model's ledger; use get_eps_delta.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
