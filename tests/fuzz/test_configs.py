"""Whatever a config holds: it loads and reads back as itself, or there is one message of ours."""

from __future__ import annotations

import json

import yaml
from hypothesis import strategies as st

from dptrain.config import TrainConfig
from dptrain.errors import ConfigError
from tests.core.shared import config, plain
from tests.fuzz.tools import LENGTHS, damaged, fuzz

LEAVES = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["ghost", "clipless", "mlp", "cnn", "adam", "prv", "1e-5", "", "0", "a\0b", 10**400])
)  # fmt: skip
KEYS = st.text(max_size=6) | st.sampled_from(["name", "model", "data", "privacy", "ledger", "hidden", "layers", "target_epsilon", "steps"])
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)
VALID = plain(
    strategy={"name": "ghost", "grouping": "per_layer"}, optimizer={"name": "adam", "learning_rate": 0.1}, loss="cross_entropy",
    performance={"checkpoint_every": 3}, privacy={"noise_multiplier": 1.0, "target_epsilon": 9.0, "ledger": "data.jsonl"}, seed=3,
)  # fmt: skip


def loads(raw, call=TrainConfig.parse) -> None:
    """It loads, and means the same when written and read again; or it is refused in words."""
    try:
        found = call(raw)
    except ConfigError:
        return
    again = TrainConfig.parse(found.to_dict())
    assert again == found and again.hash == found.hash


@LENGTHS
def test_any_nested_values(length):
    fuzz(loads, st.dictionaries(KEYS, NESTED, max_size=5), examples=80, length=length)


@LENGTHS
def test_a_valid_config_with_something_else_somewhere(length):
    paths = [(part, key) for part, value in VALID.items() for key in ([None, *value] if isinstance(value, dict) else [None])]

    def check(path, value, extra):
        part, key = path
        inner = value if key is None else {**VALID[part], key: value}
        if extra is not None and isinstance(inner, dict):
            inner = {**inner, extra: value}
        loads({**VALID, part: inner})

    fuzz(check, st.sampled_from(paths), NESTED, st.none() | KEYS, examples=150, length=length)


@LENGTHS
def test_damaged_files(tmp_path, length):
    texts = {
        "yaml": yaml.safe_dump(VALID),
        "toml": "seed = 3\n[model]\nname = 'mlp'\n[privacy]\nnoise_multiplier = 1.0\n[sampling]\nsteps = 4\n",
        "json": json.dumps(VALID),
    }

    def check(suffix, content):
        path = tmp_path / f"run.{'yaml' if suffix == 'json' else suffix}"
        path.write_bytes(content)
        loads(path, TrainConfig.load)

    for suffix, text in texts.items():
        fuzz(check, st.just(suffix), damaged(text.encode()) | st.binary(max_size=60), examples=60, length=length)


def test_deep_nesting_is_refused(tmp_path):
    for suffix, text in {"yaml": "[" * 100_000, "toml": "a = " + "[" * 100_000}.items():
        (tmp_path / f"run.{suffix}").write_text(text)
        loads(tmp_path / f"run.{suffix}", TrainConfig.load)


@LENGTHS
def test_overrides(length):
    from dptrain.config import apply_overrides

    base = config().to_dict()
    word = st.text(max_size=8) | st.sampled_from(
        ["privacy.ledger=x", "model=mlp", "strategy.max_grad_norm=1e400", "=", ".=.", "a.b.c=[", "seed=1_0"]
    )
    fuzz(
        lambda texts: loads(texts, lambda t: TrainConfig.parse(apply_overrides(base, t))),
        st.lists(word, max_size=3),
        examples=100,
        length=length,
    )
