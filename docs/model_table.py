"""Writes the table of model families in ``docs/models.md``: ``python docs/model_table.py --backend torch`` (or ``tensorflow``).

Every family is built small, validated on a few examples, and listed with what takes its gradients. The registries of builders are
``families_torch.py`` and ``families_tf.py`` beside this file: ``FAMILIES`` maps a name to a builder of ``(model, inputs)``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BACKENDS = {"torch": ("families_torch", "dptrain_torch"), "tensorflow": ("families_tf", "dptrain_tf")}
HEAD = "| family | result | layers | by a rule | own parameters | slow |\n|---|---|---:|---:|---:|---|"


def row(name: str, build: Any, validate: Any) -> str:
    """One line: exact by fast rules, exact with the slow method somewhere, or refused and why."""
    from dptrain.errors import UnsupportedModelError

    model, inputs = build()
    try:
        found = validate(model, inputs)
    except UnsupportedModelError as error:
        return f"| {name} | refused: {error.problems[0]} | | | | |"
    methods = Counter(layer.method for layer in found.layers)
    slow = sorted({layer.layer for layer in found.layers if layer.method == "slow"})
    result = "exact, slow method in part" if slow else "exact, fast rules"
    return f"| {name} | {result} | {len(found.layers)} | {methods['rule']} | {methods['bare']} | {', '.join(slow)} |"


def table(backend: str) -> str:
    """The table of a backend's families."""
    registry, package = BACKENDS[backend]
    families = importlib.import_module(registry).FAMILIES
    validate = importlib.import_module(package).validate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "\n".join([HEAD, *(row(name, build, validate) for name, build in families.items())])


def replaced(text: str, backend: str, new: str) -> str:
    """A page with the table between a backend's marks replaced."""
    begin, end = f"<!-- {backend} families -->", f"<!-- end of {backend} families -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def declare_operators() -> Any:
    """What torchvision asks for where its compiled operators do not fit the installed torch; they are never called."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def main() -> None:
    """Write the table into the page, or print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, default="torch")
    parser.add_argument("--print", action="store_true", help="print instead of writing docs/models.md")
    arguments = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    kept = declare_operators() if arguments.backend == "torch" else None
    new = table(arguments.backend)
    page = HERE / "models.md"
    if arguments.print:
        print(new)
    else:
        page.write_text(replaced(page.read_text(), arguments.backend, new))
    del kept


if __name__ == "__main__":
    main()
