"""The Python examples of the README and of docs/clipless.md run, and the README's YAML is a valid config."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dptrain.config import TrainConfig

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = TEXT) -> list[str]:
    """Code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("code", [*blocks("python"), *blocks("python", (ROOT / "docs" / "clipless.md").read_text())])
def test_python_examples_run(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})


def test_the_config_is_valid(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(text)
    assert TrainConfig.load(tmp_path / "run.yaml").strategy.name == "mixed_ghost"


def test_commands_exist() -> None:
    from dptrain.cli import app

    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(re.findall(r"^dptrain (\w+)", TEXT, re.M)) <= names
