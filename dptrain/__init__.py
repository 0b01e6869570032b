"""dptrain: differentially private training of neural networks, one framework for PyTorch and TensorFlow/Keras.

    config = dptrain.TrainConfig.load("run.yaml")
    result = dptrain.train(config, backend="torch")        # or "tensorflow"
    print(dptrain.plan(config, backend="torch"))

Importing this package imports neither framework.
"""

from dptrain.comparison import Comparison, compare
from dptrain.config import DataConfig, OptimizerConfig, Performance, Privacy, Sampling, TrainConfig
from dptrain.errors import ConfigError, DataError, DptrainError, RunError, UnsupportedModelError
from dptrain.info import LayerInfo, ModelInfo
from dptrain.mechanism import GaussianMechanism
from dptrain.plan import Group, Plan
from dptrain.robustness import Robustness, certify
from dptrain.sampling import PoissonSampler
from dptrain.strategies import STRATEGIES, get_strategy
from dptrain.trainer import TrainResult, plan, train

__version__ = "0.1.0"

__all__ = [
    "STRATEGIES",
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
    "certify",
    "compare",
    "get_strategy",
    "plan",
    "train",
]
