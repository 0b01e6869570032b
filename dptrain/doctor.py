"""What is installed and found on this machine."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import Any

from dptrain.backend import BACKENDS
from dptrain.data import available
from dptrain.report import package_versions

PACKAGES = ("dptrain", "torch", "opacus", "tensorflow", "keras", "deel-lip", "numpy", "scipy", "autodp", "dp-accounting", "pydantic")

PROBES = {
    "torch": "import torch, json; print(json.dumps(['cpu'] + [f'cuda:{i}' for i in range(torch.cuda.device_count())]))",
    "tensorflow": "import tensorflow as tf, json; print(json.dumps([d.name for d in tf.config.list_physical_devices()]))",
}


def devices(backend: str) -> dict[str, Any]:
    """Devices that a framework sees, asked in a subprocess so that a broken one cannot take this process down."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBES[backend]], capture_output=True, text=True, timeout=120, check=True)
        return {"usable": True, "devices": json.loads(done.stdout.strip().splitlines()[-1])}
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        stderr = getattr(error, "stderr", "") or str(error)
        return {"usable": False, "reason": stderr.strip().splitlines()[-1] if stderr.strip() else "no answer"}


def examine() -> dict[str, Any]:
    """Versions, devices and data sets, as plain data."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(PACKAGES),
        "backends": {name: devices(name) for name in BACKENDS},
        "data": [{"name": s.name, "found": s.found, "where": s.where} for s in available()],
    }


def show(found: dict[str, Any]) -> None:
    """Print the findings as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"Python {found['python']} on {found['platform']}")
    packages = [(name, found["versions"].get(name, "not installed")) for name in PACKAGES]
    backends = [(n, ", ".join(b["devices"]) if b["usable"] else f"unusable: {b['reason']}") for n, b in found["backends"].items()]
    data = [(d["name"], "yes" if d["found"] else "no", d["where"]) for d in found["data"]]
    for title, columns, rows in (
        ("packages", ("package", "version"), packages),
        ("backends", ("backend", "devices"), backends),
        ("data sets", ("name", "found", "where, or how to get it"), data),
    ):
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
