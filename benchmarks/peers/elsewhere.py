"""Peers that cannot live in our environment: measured whole under another interpreter, whose path an environment variable holds.

The scripts in ``children/`` run there and import nothing of ours. Request and reply are JSON: on the child's standard input, and on the
last line of its standard output. The yardstick of such a peer is a plain loop in its own process: same network, same framework version.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dptrain.comparison.cases import Case
from dptrain.comparison.measure import PeerMissingError, summary
from dptrain.config import TrainConfig
from dptrain.errors import DptrainError

CHILDREN = Path(__file__).parent / "children"
# A child must not see our packages. oneDNN is on in dptrain_tf too.
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
FIXED = {"TF_ENABLE_ONEDNN_OPTS": "1"}


@dataclass(frozen=True)
class Elsewhere:
    """A peer under another interpreter, for ``--strategies module:attribute``.

    Args:
        child: module of ``children/``.
        way: which of the child's private steps.
        interpreter: environment variable with the path of a Python executable that has the peer.
        install: how to get such an environment.
        checkout: environment variable with the folder of the peer's source, for a peer that is not installed.
    """

    child: str
    way: str
    interpreter: str
    install: str
    checkout: str | None = None

    def measure(self, case: Case) -> dict[str, Any]:
        """The figures of a case.

        Args:
            case: what is measured.
        Returns:
            Figures as ``dptrain.comparison.measure`` gives them, with ``yardstick``: what they are relative to.
        Raises:
            DptrainError: the peer is missing, or cannot run the case.
        """
        if case.backend != "tensorflow":
            raise DptrainError("The library runs in TensorFlow only.")
        if case.measurement == "largest":
            raise DptrainError("The largest batch is not searched for under another interpreter.")
        asked = request(case) | {"way": self.way, "checkout": self.named(self.checkout) if self.checkout else None}
        if case.measurement == "time":
            found = self.ask({**asked, "step": "both"})
            return found if "pairs" not in found else summary(found.pop("pairs"), case.batch) | found
        private, plain = (self.ask({**asked, "step": step}) for step in ("private", "plain"))
        return private if "total_mib" not in plain else private | {"plain_mib": plain["total_mib"]}

    def named(self, variable: str) -> str:
        """The value of an environment variable.

        Raises:
            PeerMissingError: it is not set.
        """
        if not (value := os.environ.get(variable)):
            raise PeerMissingError(f"{variable} is not set: {self.install}.")
        return value

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The child's reply.

        Raises:
            DptrainError: the peer is missing, or does not support what is asked.
        """
        python = self.named(self.interpreter)
        env = {key: value for key, value in os.environ.items() if key not in HIDDEN} | FIXED
        command = [python, str(CHILDREN / "measured.py"), self.child]
        try:
            done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=env, check=False)
        except OSError as error:
            raise PeerMissingError(f"{self.interpreter}={python} cannot be run ({error.strerror}): {self.install}.") from None
        if done.returncode == -9:
            return {"too_large": True}
        try:
            reply: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        except (ValueError, IndexError):
            return {"failed": f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"}
        if "missing" in reply:
            raise PeerMissingError(f"{reply['missing']}: {self.install}.")
        if "unsupported" in reply:
            raise DptrainError(reply["unsupported"])
        return reply


def request(case: Case) -> dict[str, Any]:
    """What a child needs of a case.

    Raises:
        DptrainError: a child could not build it.
    """
    config = TrainConfig.parse(case.config)
    if ":" in case.model or case.shape.num_classes is None or config.loss.name != "cross_entropy":
        raise DptrainError("Under another interpreter only a specified model with the loss cross_entropy can be built.")
    classes = case.shape.num_classes
    layers = [layer.model_dump() for layer in config.model.expand(case.shape.input)]
    for layer in layers:
        layer |= {"units": classes} if layer.get("units") == "num_classes" else {}
    return {
        "layers": layers, "input": case.shape.input, "tokens": case.shape.tokens, "classes": classes, "batch": case.batch,
        "pairs": case.settings.pairs, "warmup": case.settings.warmup, "threads": case.settings.threads, "learning_rate": 1e-3,
        "max_grad_norm": getattr(config.strategy, "max_grad_norm", 1.0), "noise_multiplier": 1.0,
    }  # fmt: skip
