"""dptrain: differentially private training of neural networks, one framework for PyTorch and TensorFlow/Keras.

    config = dptrain.TrainConfig.load("run.yaml")
    result = dptrain.train(config, backend="torch")        # or "tensorflow"
    print(dptrain.plan(config, backend="torch"))

Importing this package imports neither framework, and each name loads its module at its first use: the command line starts at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dptrain.auditing import Audit, audit
    from dptrain.comparison import Comparison, compare
    from dptrain.config import DataConfig, OptimizerConfig, Performance, Privacy, Sampling, TrainConfig
    from dptrain.errors import ConfigError, DataError, DptrainError, RunError, UnsupportedModelError
    from dptrain.info import LayerInfo, ModelInfo
    from dptrain.mechanism import GaussianMechanism
    from dptrain.plan import Group, Plan
    from dptrain.reporting import report
    from dptrain.robustness import Robustness, certify
    from dptrain.sampling import PoissonSampler
    from dptrain.strategies import STRATEGIES, get_strategy
    from dptrain.trainer import TrainResult, plan, train

__version__ = "0.1.0"

_HOMES = {
    "dptrain.auditing": ("Audit", "audit"),
    "dptrain.comparison": ("Comparison", "compare"),
    "dptrain.config": ("DataConfig", "OptimizerConfig", "Performance", "Privacy", "Sampling", "TrainConfig"),
    "dptrain.errors": ("ConfigError", "DataError", "DptrainError", "RunError", "UnsupportedModelError"),
    "dptrain.info": ("LayerInfo", "ModelInfo"),
    "dptrain.mechanism": ("GaussianMechanism",),
    "dptrain.plan": ("Group", "Plan"),
    "dptrain.reporting": ("report",),
    "dptrain.robustness": ("Robustness", "certify"),
    "dptrain.sampling": ("PoissonSampler",),
    "dptrain.strategies": ("STRATEGIES", "get_strategy"),
    "dptrain.trainer": ("TrainResult", "plan", "train"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "STRATEGIES",
    "Audit",
    "Comparison",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DptrainError",
    "GaussianMechanism",
    "Group",
    "LayerInfo",
    "ModelInfo",
    "OptimizerConfig",
    "Performance",
    "Plan",
    "PoissonSampler",
    "Privacy",
    "Robustness",
    "RunError",
    "Sampling",
    "TrainConfig",
    "TrainResult",
    "UnsupportedModelError",
    "audit",
    "certify",
    "compare",
    "get_strategy",
    "plan",
    "report",
    "train",
]


def __getattr__(name: str) -> Any:
    """The object of a public name, or a submodule; kept, so that this runs once per name."""
    if name not in _HOME:
        if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(f"{__name__}.{name}")
    found = globals()[name] = getattr(import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """``dptrain.plan`` is the function, though a module of that name exists: importing the module must not put itself in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
