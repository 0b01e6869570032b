"""The dependency direction, proved in fresh interpreters: accounting <- dptrain <- backends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FRAMEWORKS = ("torch", "tensorflow", "keras", "opacus", "tf_keras", "jax")
ROOT = Path(__file__).parent.parent


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


ALL_CORE = "import dptrain, dptrain.cli, dptrain.doctor, dptrain.progress, dptrain.backend, dptrain.step, dptrain.trainer, dptrain.data"
USED = "from accounting import *; e = SampledGaussian(1.0, 0.01)\nfor name in ('rdp', 'prv'): get_accountant(name).epsilon([(e, 10)], 1e-5)"


@pytest.mark.parametrize("statement", ["import accounting", USED, "import dptrain", ALL_CORE])
def test_the_core_loads_no_framework(statement: str) -> None:
    assert not loaded_after(statement) & set(FRAMEWORKS)


def test_accounting_does_not_load_the_core() -> None:
    assert not loaded_after("import accounting") & {"dptrain", "dptrain_torch", "dptrain_tf", "scipy", "autodp", "dp_accounting"}


def test_each_backend_loads_only_its_own_framework() -> None:
    assert not loaded_after("import dptrain_torch, dptrain_torch.backend") & {"tensorflow", "keras", "dptrain_tf"}
    assert not loaded_after("import dptrain_tf, dptrain_tf.backend") & {"torch", "dptrain_torch", "opacus"}


def test_both_backends_have_the_same_files() -> None:
    def files(package: str) -> set[str]:
        return {p.name for p in (ROOT / package).glob("*.py")}

    assert files("dptrain_torch") == files("dptrain_tf")


def test_starting_the_command_line_is_cheap() -> None:
    """The help must not load what it does not need; time itself is a benchmark."""
    heavy = {"scipy", "autodp", "dp_accounting", "matplotlib", "safetensors", *FRAMEWORKS}
    assert not loaded_after("import dptrain.cli") & heavy
