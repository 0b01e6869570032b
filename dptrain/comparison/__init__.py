"""Speed and memory of strategies, models and frameworks beside each other: one config, one subprocess per measurement.

    table = dptrain.compare("run.yaml", backends=("torch", "tensorflow"), strategies=("mixed_ghost", "per_sample"))
    print(table.markdown())

``cases`` says what is measured, ``measure`` runs in the subprocess, ``run`` starts it and keeps the results, ``report`` draws them.
"""

from dptrain.comparison.cases import Case, Settings, Shape, grid
from dptrain.comparison.run import Comparison, compare

__all__ = ["Case", "Comparison", "Settings", "Shape", "compare", "grid"]
