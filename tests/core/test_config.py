"""One file means one run: what a config says does not depend on its format, and whatever is wrong is one sentence with a path."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dptrain import ConfigError, TrainConfig
from dptrain.config import Sampling, apply_overrides, json_schema, read_file
from dptrain.strategies import STRATEGIES
from tests.core.shared import EXAMPLES, config, plain

YAML = """
model: {name: cnn, stages: [[8], [16, 16]], kernel_size: 5, norm_groups: 4}
data: {name: npz, path: numbers.npz, num_classes: 3}
strategy:
  name: ghost
  max_grad_norm: 0.3
  clipping: automatic
  grouping: {convolutions: ["conv*", "norm*"], rest: ["*"]}
privacy: {target_epsilon: 3, target_delta: 1e-5, accountant: rdp, allocation: min_noise, relation: replace_one}
sampling: {expected_batch_size: 64, epochs: 2.5}
optimizer: {name: adam, learning_rate: 1e-3, schedule: cosine, warmup_steps: 5}
performance: {physical_batch_size: 32, decision: space, gradients: two_pass, compile: false}
loss: cross_entropy
seed: 7
"""

TOML = """
seed = 7
loss = "cross_entropy"
[performance]
compile = false
gradients = "two_pass"
decision = "space"
physical_batch_size = 32
[optimizer]
name = "adam"
learning_rate = 0.001
schedule = "cosine"
warmup_steps = 5
[sampling]
epochs = 2.5
expected_batch_size = 64
[privacy]
relation = "replace_one"
allocation = "min_noise"
target_epsilon = 3.0
target_delta = 0.00001
accountant = "rdp"
[strategy]
name = "ghost"
clipping = "automatic"
max_grad_norm = 0.3
[strategy.grouping]
convolutions = ["conv*", "norm*"]
rest = ["*"]
[data]
name = "npz"
path = "numbers.npz"
num_classes = 3
[model]
name = "cnn"
stages = [[8], [16, 16]]
kernel_size = 5
norm_groups = 4
"""


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def refusal(call, *args, **kwargs) -> str:
    """The message of the ConfigError that a call must end in; any other exception fails the test."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_yaml_and_toml_of_the_same_content_are_the_same_run(tmp_path):
    from_yaml = TrainConfig.load(written(tmp_path / "run.yaml", YAML))
    from_toml = TrainConfig.load(written(tmp_path / "run.toml", TOML))
    assert from_yaml == from_toml
    assert from_yaml.hash == from_toml.hash
    assert from_yaml.strategy.name == "ghost"
    assert from_yaml.privacy.target_delta == 1e-5
    assert from_yaml.model.stages == ((8,), (16, 16))


def test_a_config_survives_being_written_and_read(tmp_path):
    original = TrainConfig.load(written(tmp_path / "run.yml", YAML))
    again = TrainConfig.load(written(tmp_path / "again.yaml", original.to_yaml()))
    assert again == original
    assert again.hash == original.hash
    assert TrainConfig.parse(json.loads(json.dumps(original.to_dict()))) == original


def test_a_hash_is_a_constant_of_the_content():
    """A changed hash orphans every run directory, so a change must be meant."""
    assert config().hash == config().hash == "b4402c180ba1654e"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"privacy": {"noise_multiplier": 1.0000000000000002, "accountant": "rdp"}},
        {"strategy": "ghost"},
        {"sampling": {"sample_rate": 0.2, "steps": 5}},
        {"performance": {"physical_batch_size": 64}},
        {"performance": {"prefer": "memory"}},
    ],
)
def test_another_run_has_another_hash(change):
    assert config(**change).hash != config().hash


def test_preferring_memory_stands_for_the_rule_of_space():
    fast, small = config().performance, config(performance={"prefer": "memory", "decision": "measured"}).performance
    assert (fast.two_pass, fast.norm_decision) == (False, "time")
    assert (small.two_pass, small.norm_decision) == (False, "space")
    assert config(performance={"gradients": "two_pass"}).performance.two_pass


def test_the_order_of_groups_counts_and_no_other_order_does():
    """The first pattern that matches takes a layer, so swapped groups are another plan."""
    one, two = {"a": ["fc1", "fc2"], "b": ["fc2", "head"]}, {"b": ["fc2", "head"], "a": ["fc1", "fc2"]}
    assert config(strategy={"name": "ghost", "grouping": one}).hash != config(strategy={"name": "ghost", "grouping": two}).hash
    assert TrainConfig.parse(dict(reversed(plain().items()))).hash == config().hash


def test_short_names_stand_for_sections():
    short = config(model="mlp", data="digits", strategy="ghost", optimizer="adam")
    long = config(model={"name": "mlp"}, data={"name": "digits"}, strategy={"name": "ghost"}, optimizer={"name": "adam"})
    assert short == long


def test_settings_without_a_name_are_those_of_the_default_strategy():
    """So that ``--set strategy.max_grad_norm=0.5`` works on a file that does not mention the strategy."""
    assert config(strategy={"max_grad_norm": 0.5}) == config(strategy={"name": "mixed_ghost", "max_grad_norm": 0.5})
    assert config(strategy={}) == config()
    assert apply_overrides(plain(), ["strategy.max_grad_norm=0.5"])["strategy"] == {"max_grad_norm": 0.5}


def test_the_example_in_the_repository_loads(pytestconfig):
    for path in sorted((pytestconfig.rootpath / "examples").glob("*.yaml")):
        assert TrainConfig.load(path).hash


# ---- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_change_single_values(tmp_path):
    path = written(tmp_path / "run.yaml", yaml.safe_dump(plain()))
    changed = TrainConfig.load(
        path,
        [
            "strategy.name=per_sample",
            "strategy.max_grad_norm=5e-1",
            "sampling.steps=9",
            "sampling.sample_rate=null",
            "sampling.expected_batch_size=7",
            "model=cnn",
            "privacy.unsafe_seed=3",
            "optimizer.learning_rate = 2",
            "data.limit=10",
        ],
    )
    assert changed.strategy.name == "per_sample"
    assert changed.strategy.max_grad_norm == 0.5
    assert changed.sampling == Sampling(steps=9, expected_batch_size=7)
    assert changed.model.name == "cnn"
    assert changed.privacy.unsafe_seed == 3
    assert changed.optimizer.learning_rate == 2.0
    assert (changed.data.name, changed.data.limit) == ("digits", 10)  # the short name was kept


def test_overrides_leave_their_argument_alone():
    raw = plain()
    assert apply_overrides(raw, ["privacy.noise_multiplier=2"])["privacy"]["noise_multiplier"] == 2
    assert raw == plain()


@pytest.mark.parametrize("item", ["", "=", "=3", "sampling", "a..b=1", ".a=1", "a.=1", "seed=[1", "seed=2020-13-45", "seed={a: 1, a: 2}"])
def test_a_malformed_override_is_named(item):
    message = refusal(apply_overrides, plain(), [item])
    assert repr(item) in message
    assert "\n" not in message


def test_an_override_is_checked_like_the_file(tmp_path):
    path = written(tmp_path / "run.yaml", yaml.safe_dump(plain()))
    assert "sampling.step is not a known key" in refusal(TrainConfig.load, path, ["sampling.step=3"])
    assert "sampling.steps" in refusal(TrainConfig.load, path, ["sampling.steps=many"])
    assert "sampling.steps" in refusal(TrainConfig.load, path, ["sampling.steps.deep=1"])


# ---- bad values: one sentence, with the path -----------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
LAYER = {"type": "dense", "units": 3}


def layers(**fields: Any) -> dict[str, Any]:
    return {"model": {"name": "layers", "layers": [LAYER, {**LAYER, **fields}]}}


def strategy(**fields: Any) -> dict[str, Any]:
    return {"strategy": {"name": "ghost", **fields}}


def privacy(**fields: Any) -> dict[str, Any]:
    return {"privacy": fields}


BAD = [
    # unknown keys, at every level
    ({"modle": "mlp"}, "modle is not a known key"),
    (privacy(noise_multiplier=1.0, epsilon=3), "privacy.epsilon is not a known key"),
    ({"sampling": {"sample_rate": 0.1, "steps": 3, "shuffle": True}}, "sampling.shuffle is not a known key"),
    ({"data": {"name": "digits", "x": 1}}, "data.x is not a known key"),
    ({"optimizer": {"lr": 1}}, "optimizer.lr is not a known key"),
    ({"performance": {"batch": 1}}, "performance.batch is not a known key"),
    (strategy(clip=1), "strategy.clip is not a known key"),
    ({"strategy": {"name": "non_private", "max_grad_norm": 1.0}}, "strategy.max_grad_norm is not a known key"),
    ({"model": {"name": "mlp", "hiden": [3]}}, "model.hiden is not a known key"),
    (layers(use_bias=True), "model.layers.1.use_bias is not a known key"),
    ({"model": {"name": "layers", "layers": [{"type": "residual", "body": [{**LAYER, "x": 1}]}]}}, "model.layers.0.body.0.x is not"),
    # names
    ({"strategy": "gost"}, "strategy has no 'gost'; choose one of 'mixed_ghost', 'ghost', 'per_sample', 'clipless', 'non_private'"),
    ({"strategy": {"name": 3}}, "strategy has no '3'; choose one of"),
    ({"strategy": None}, "strategy: Input should be a section of settings (got None)"),
    ({"model": "resnet"}, "model has no 'resnet'; choose one of 'mlp', 'cnn'"),
    ({"model": {"name": "layers"}}, "model.layers is missing"),
    ({"model": {"name": "layers", "layers": [{"units": 3}]}}, "model.layers.0.type is missing"),
    ({"model": {"name": "layers", "layers": [{"type": "lstm"}]}}, "model.layers.0 has no 'lstm'; choose one of 'dense'"),
    ({"data": "imagenet"}, "data: Input should be 'mnist_5k'"),
    ({"optimizer": "lion"}, "optimizer: Input should be 'sgd', 'adam' or 'adamw' (got 'lion')"),
    ({"loss": "hinge"}, "loss: Input should be 'cross_entropy'"),
    (privacy(noise_multiplier=1.0, accountant="gdp"), "privacy.accountant: Input should be 'prv' or 'rdp' (got 'gdp')"),
    (privacy(noise_multiplier=1.0, relation="substitute"), "privacy.relation: Input should be 'add_remove', 'replace_one' or 'zero_out'"),
    (privacy(noise_multiplier=1.0, allocation="local"), "privacy.allocation: Input should be 'global'"),
    (strategy(clipping="psac"), "strategy.clipping: Input should be 'abadi' or 'automatic' (got 'psac')"),
    (strategy(grouping="by_layer"), "strategy.grouping: Input should be 'flat' or 'per_layer', or a section of settings (got 'by_layer')"),
    (strategy(grouping={"all": "*"}), "strategy.grouping.all: "),
    ({"performance": {"decision": "fast"}}, "performance.decision: Input should be 'space', 'time' or 'measured'"),
    ({"performance": {"precision": "float16"}}, "performance.precision"),
    ({"performance": {"compile": "yes"}}, "performance.compile: Input should be a valid boolean, or 'auto' (got 'yes')"),
    # both, or neither
    (privacy(noise_multiplier=1.0, ledger=3), "privacy.ledger: Input should be a valid string"),
    (privacy(), "privacy: give target_epsilon or noise_multiplier, or choose the strategy non_private"),
    ({"privacy": None}, "privacy: Input should be a section of settings"),
    ({"sampling": {"steps": 3}}, "sampling: give exactly one of sample_rate and expected_batch_size"),
    ({"sampling": {"sample_rate": 0.1, "expected_batch_size": 3, "steps": 3}}, "sampling: give exactly one of sample_rate"),
    ({"sampling": {"sample_rate": 0.1}}, "sampling: give exactly one of steps and epochs"),
    ({"sampling": {"sample_rate": 0.1, "steps": 3, "epochs": 1}}, "sampling: give exactly one of steps and epochs"),
    ({"optimizer": {"name": "adam", "momentum": 0.9}}, "optimizer: momentum belongs to sgd, not to adam"),
    ({"optimizer": {"name": "sgd", "weight_decay": 0.1}}, "optimizer: weight_decay belongs to adamw, not to sgd"),
    ({"model": {"name": "cnn", "stages": [[12]], "norm_groups": 8}}, "model: norm_groups 8 does not divide"),
    ({"model": {"name": "vit_tiny", "dim": 10, "heads": 3}}, "model: heads 3 does not divide dim 10"),
    ({"model": {"name": "resnet18_gn", "width": 24, "norm_groups": 16}}, "model: norm_groups 16 does not divide width 24"),
]  # fmt: skip

NUMBERS = [  # path, setter, values that are not in its range or of its type
    ("privacy.noise_multiplier", lambda v: privacy(noise_multiplier=v), (True, "1.0", NAN, INF, -INF, -1.0, 0, 0.0, [1.0], {})),
    ("privacy.target_epsilon", lambda v: privacy(target_epsilon=v), (True, "3", NAN, INF, -1, 0, 10**400)),
    ("privacy.target_delta", lambda v: privacy(noise_multiplier=1.0, target_delta=v), (True, "1e-5", NAN, INF, -1e-5, 0, 1, 1.5, None)),
    ("privacy.unsafe_seed", lambda v: privacy(noise_multiplier=1.0, unsafe_seed=v), (True, "3", 1.0, -1, NAN, 16**5000)),
    ("sampling.sample_rate", lambda v: {"sampling": {"sample_rate": v, "steps": 3}}, (True, "0.1", NAN, INF, -0.1, 0, 1.0000001)),
    ("sampling.expected_batch_size", lambda v: {"sampling": {"expected_batch_size": v, "steps": 3}}, (True, "8", 8.0, 0, -1, NAN)),
    ("sampling.steps", lambda v: {"sampling": {"sample_rate": 0.1, "steps": v}}, (True, "3", 3.0, 0, -1, INF, 16**5000)),
    ("sampling.epochs", lambda v: {"sampling": {"sample_rate": 0.1, "epochs": v}}, (True, "3", 0, -1.0, NAN, INF)),
    ("optimizer.learning_rate", lambda v: {"optimizer": {"learning_rate": v}}, (True, "0.1", 0, -0.1, NAN, INF, None)),
    ("optimizer.momentum", lambda v: {"optimizer": {"momentum": v}}, (True, "0.9", 1, -0.1, NAN, INF)),
    ("optimizer.weight_decay", lambda v: {"optimizer": {"name": "adamw", "weight_decay": v}}, (True, "0.1", -0.1, NAN, INF)),
    ("optimizer.warmup_steps", lambda v: {"optimizer": {"warmup_steps": v}}, (True, "1", 1.0, -1)),
    ("strategy.max_grad_norm", lambda v: strategy(max_grad_norm=v), (True, "1", 0, -1.0, NAN, INF, None)),
    ("strategy.gamma", lambda v: strategy(gamma=v), (False, "0.01", 0, -1.0, NAN, INF)),
    ("performance.physical_batch_size", lambda v: {"performance": {"physical_batch_size": v}}, (True, "8", 8.5, 0, -1, None)),
    ("performance.checkpoint_every", lambda v: {"performance": {"checkpoint_every": v}}, (True, 0, -1)),
    ("data.limit", lambda v: {"data": {"name": "digits", "limit": v}}, (True, "5", 0, -5, 2.0)),
    ("data.num_classes", lambda v: {"data": {"name": "digits", "num_classes": v}}, (True, "5", 0, 2.0)),
    ("data.download", lambda v: {"data": {"name": "digits", "download": v}}, ("yes", 1, None)),
    ("seed", lambda v: {"seed": v}, (True, "0", 1.0, -1, None, 2**63, 16**5000)),
    ("model.hidden.0", lambda v: {"model": {"name": "mlp", "hidden": [v]}}, (True, "8", 8.0, 0, -1, None)),
    ("model.dropout", lambda v: {"model": {"name": "mlp", "dropout": v}}, (True, "0.5", 1, -0.1, NAN)),
    ("model.layers.1.units", lambda v: layers(units=v), (True, "8", 8.0, 0, -1, None)),
    ("model.layers.1.bias", lambda v: layers(bias=v), ("no", 0, None)),
    ("model.norm_groups", lambda v: {"model": {"name": "cnn", "norm_groups": v}}, (True, -1, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "expected"), BAD)
def test_a_bad_setting_is_one_sentence_with_its_path(parts, expected):
    message = refusal(TrainConfig.parse, plain(**parts), "run.yaml")
    assert message.startswith("run.yaml: " + expected)
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("path", "build", "value"), [pytest.param(p, b, v, id=f"{p}-{type(v).__name__}-{i}") for p, b, vs in NUMBERS for i, v in enumerate(vs)]
)
def test_a_bad_number_is_one_sentence_with_its_path(path, build, value):
    message = refusal(TrainConfig.parse, plain(**build(value)))
    assert message.startswith(f"the configuration: {path}: Input should be ")
    assert "\n" not in message
    assert len(message) < 250


@pytest.mark.parametrize("value", [1, 2.5])
def test_whole_numbers_are_numbers(value):
    assert config(privacy={"noise_multiplier": value}).privacy.noise_multiplier == value
    assert config(privacy={"noise_multiplier": 1}).hash == config(privacy={"noise_multiplier": 1.0}).hash


@pytest.mark.parametrize("missing", ["model", "sampling"])
def test_what_has_no_default_must_be_given(missing):
    raw = {key: value for key, value in plain().items() if key != missing}
    assert refusal(TrainConfig.parse, raw) == f"the configuration: {missing} is missing."


def test_all_problems_are_in_one_message():
    message = refusal(TrainConfig.parse, plain(seed=-1, loss="x", optimizer={"lr": 1}))
    assert "3 problems" in message
    assert all(path in message for path in ("- seed:", "- loss:", "- optimizer.lr is"))


def test_the_non_private_strategy_needs_no_budget():
    assert config(strategy="non_private", privacy={}).privacy.noise_multiplier is None


def test_the_batch_cannot_be_larger_than_the_data():
    sampling = config(sampling={"expected_batch_size": 50, "epochs": 3}).sampling
    assert sampling.rate(50) == 1.0
    assert sampling.rate(200) == 0.25
    assert sampling.num_steps(200) == 12
    message = refusal(sampling.rate, 49)
    assert "sampling.expected_batch_size 50 is larger than the data set of 49 examples" in message


def test_epochs_round_up_to_whole_steps():
    assert Sampling(sample_rate=0.3, epochs=1).num_steps(10) == 4
    assert Sampling(sample_rate=0.1, epochs=3).num_steps(10) == 30  # 3 / 0.1 is 30.000000000000004 or less in floating point
    assert Sampling(sample_rate=1.0, epochs=0.001).num_steps(10) == 1
    assert "sampling.epochs" in refusal(Sampling(sample_rate=1e-10, epochs=1e308).num_steps, 10)


# ---- bad files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("run.yaml", b"model: mlp\nmodel: cnn\n", "the key 'model' is given twice"),
        ("run.yaml", b"privacy:\n  noise_multiplier: 1\n  noise_multiplier: 2\n", "the key 'noise_multiplier' is given twice"),
        ("run.yaml", b"model: [1, 2\n", "is not valid YAML"),
        ("run.yaml", b"model: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        ("run.yaml", b"seed: 2020-13-45\n", "is not valid YAML"),
        ("run.yaml", b"? [a, b]\n: c\n", "is not valid YAML"),
        ("run.yaml", b"- model\n- data\n", "must hold sections"),
        ("run.yaml", b"just text\n", "must hold sections"),
        ("run.yaml", b"", "must hold sections"),
        ("run.yaml", b"3: 4\n", "must hold sections"),
        ("run.yaml", b"a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("run.yaml", b"\x00\x01\x02", "is not valid YAML"),
        ("run.yaml", b"\x89PNG\r\n\x1a\n\xff\xfe", "cannot be read"),
        ("run.yaml", b"a: " + b"[" * 5000, "is not valid YAML"),
        (
            "run.yaml",
            b"data: {2020-01-01: 3}\nmodel: mlp\nsampling: {sample_rate: 0.1, steps: 1}\nstrategy: non_private\n",
            "data: Keys should be strings",
        ),
        ("run.toml", b"model = 'mlp'\nmodel = 'cnn'\n", "is not valid TOML"),
        ("run.toml", b"[model\n", "is not valid TOML"),
        ("run.toml", b"a = " + b"[" * 5000, "is not valid TOML"),
        ("run.toml", b"a." * 2000 + b"a = 1\n", "nested too deeply"),
        ("run.toml", b"seed = 1" + b"0" * 5000 + b"\n", "is not valid TOML"),
        ("run.toml", b"", "model is missing"),
        ("run.json", b"{}", "must end in .yaml, .yml or .toml"),
        ("run", b"model: mlp\n", "must end in .yaml, .yml or .toml"),
    ],
)
@pytest.mark.parametrize("overrides", [[], ["seed=1"]])
def test_a_bad_file_is_named_in_one_message(tmp_path, name, content, expected, overrides):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(TrainConfig.load, path, overrides)
    assert expected in message
    assert str(path) in message or "nested" in message
    assert message.count("\n") == message.count("\n  - ")


def test_a_missing_file_a_directory_and_an_unreadable_file(tmp_path):
    assert "There is no config file" in refusal(TrainConfig.load, tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read" in refusal(TrainConfig.load, tmp_path / "folder.yaml")
    assert "cannot be read" in refusal(TrainConfig.load, tmp_path / ("x" * 300 + ".yaml"))


def test_numbers_without_a_dot_in_the_mantissa_are_numbers(tmp_path):
    """YAML 1.1 reads 1e-5 as text, and a text would be refused."""
    raw = read_file(written(tmp_path / "a.yaml", "a: 1e-5\nb: -2E3\nc: 1.5e+2\nd: .5e1\ne: 1e\nf: e5\ng: '1e5'\n"))
    assert raw == {"a": 1e-5, "b": -2e3, "c": 150.0, "d": 5.0, "e": "1e", "f": "e5", "g": "1e5"}


# ---- properties ----------------------------------------------------------------------------------------------------

POSITIVE = st.floats(1e-6, 1e6)
CONFIGS = st.fixed_dictionaries(
    {
        "model": st.one_of(
            st.fixed_dictionaries({"name": st.just("mlp"), "hidden": st.lists(st.integers(1, 300), max_size=3)}),
            st.just("cnn"),
            st.fixed_dictionaries({"name": st.just("layers"), "layers": st.lists(st.just(LAYER), max_size=2)}),
        ),
        "sampling": st.fixed_dictionaries({"sample_rate": st.floats(1e-9, 1.0), "steps": st.integers(1, 10**9)}),
        "privacy": st.fixed_dictionaries(
            {"noise_multiplier": POSITIVE, "target_delta": st.floats(1e-300, 0.99)},
            optional={"unsafe_seed": st.integers(0, 2**63 - 1), "relation": st.sampled_from(["add_remove", "replace_one", "zero_out"])},
        ),
    },
    optional={
        "strategy": st.fixed_dictionaries(
            {"name": st.sampled_from(sorted(set(STRATEGIES) - {"non_private", "clipless"})), "max_grad_norm": POSITIVE},
            optional={"grouping": st.dictionaries(st.text(max_size=5), st.lists(st.text(max_size=5), max_size=2), max_size=3)},
        ),
        "seed": st.integers(0, 2**63 - 1),
        "optimizer": st.fixed_dictionaries({"name": st.just("sgd"), "learning_rate": POSITIVE, "momentum": st.floats(0, 0.999)}),
        "data": st.fixed_dictionaries({"name": st.just("npz"), "path": st.text(max_size=9)}),
    },
)


@EXAMPLES
@given(CONFIGS)
def test_plain_data_yaml_and_json_read_back_as_the_same_run(raw):
    made = TrainConfig.parse(raw)
    for again in (
        TrainConfig.parse(made.to_dict()),
        TrainConfig.parse(yaml.safe_load(made.to_yaml())),
        TrainConfig.parse(json.loads(json.dumps(made.to_dict()))),
        made.replace(),
    ):
        assert again == made
        assert again.hash == made.hash
    assert re.fullmatch("[0-9a-f]{16}", made.hash)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers() | st.none(), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from([*sorted(TrainConfig.model_fields), "name", "steps", "noise_multiplier", "layers", "type", "grouping", "hidden"])


@EXAMPLES
@given(st.dictionaries(KEYS | st.text(max_size=5), JUNK | st.dictionaries(KEYS, JUNK, max_size=3), max_size=5) | JUNK)
def test_junk_never_raises_anything_but_a_config_error(raw):
    base = plain()
    for candidate in (raw, {**base, **raw} if isinstance(raw, dict) else raw):
        try:
            TrainConfig.parse(candidate)
        except ConfigError as error:
            assert str(error).count("\n") == str(error).count("\n  - ")  # noqa: PT017 - nothing may be raised in its place either


@EXAMPLES
@given(st.lists(st.text(max_size=15) | st.builds("{}={}".format, st.sampled_from(["seed", "model.name", "data"]), st.text(max_size=9))))
def test_junk_overrides_never_raise_anything_but_a_config_error(overrides):
    try:
        TrainConfig.parse(apply_overrides(plain(), overrides))
    except ConfigError:
        return


@EXAMPLES
@given(st.binary(max_size=60) | st.text(alphabet="{}[]:&*!|>'\"%@`#- \n\tab1", max_size=40).map(str.encode))
def test_junk_files_never_raise_anything_but_a_config_error(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for name in ("junk.yaml", "junk.toml"):
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigError):
            TrainConfig.load(folder / name)


def test_a_config_cannot_be_changed_by_hand():
    made = config()
    for part, name, value in ((made, "seed", 3), (made.privacy, "noise_multiplier", 1e9), (made.strategy, "max_grad_norm", 9.0)):
        with pytest.raises(ValidationError):
            setattr(part, name, value)
    assert made.replace(seed=3).seed == 3
    assert "steps" in refusal(made.replace, sampling={"sample_rate": 0.1, "steps": 0})


# ---- learning rates ------------------------------------------------------------------------------------------------


def test_the_learning_rate_follows_its_schedule():
    constant = config(optimizer={"learning_rate": 2.0, "warmup_steps": 3}).optimizer
    assert [constant.rate_at(t, 10) for t in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    linear = config(optimizer={"learning_rate": 2.0, "schedule": "linear"}).optimizer
    assert [linear.rate_at(t, 4) for t in range(4)] == [2.0, 1.5, 1.0, 0.5]
    cosine = config(optimizer={"learning_rate": 2.0, "schedule": "cosine"}).optimizer
    assert cosine.rate_at(0, 4) == 2.0
    assert cosine.rate_at(2, 4) == pytest.approx(1.0)
    assert 0 < cosine.rate_at(3, 4) < cosine.rate_at(2, 4)


# ---- the schema ----------------------------------------------------------------------------------------------------

ANNOTATIONS = {"$schema", "$defs", "title", "description", "default", "discriminator", "pattern"}
TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "null": type(None), "boolean": bool, "integer": int, "number": (int, float),
}  # fmt: skip


def fits(schema: Any, value: Any, root: Any) -> bool:
    """Whether a value fits a JSON Schema; an unknown keyword fails, so that nothing is left unchecked."""

    def keyword(name: str, want: Any) -> bool:
        match name:
            case _ if name in ANNOTATIONS:
                return True
            case "$ref":
                return fits(root["$defs"][want.rpartition("/")[2]], value, root)
            case "type":
                return isinstance(value, TYPES[want]) and (want == "boolean" or not isinstance(value, bool))
            case "const":
                return value == want
            case "enum":
                return value in want
            case "anyOf":
                return any(fits(s, value, root) for s in want)
            case "oneOf":
                return sum(fits(s, value, root) for s in want) == 1
            case "properties":
                return all(fits(s, value[k], root) for k, s in want.items() if k in value)
            case "required":
                return all(k in value for k in want)
            case "additionalProperties":
                extra = [v for k, v in value.items() if k not in schema.get("properties", {})]
                return not extra if want is False else all(fits(want, v, root) for v in extra)
            case "items":
                return all(fits(want, v, root) for v in value)
            case "minimum":
                return value >= want
            case "exclusiveMinimum":
                return value > want
            case "maximum":
                return value <= want
            case "exclusiveMaximum":
                return value < want
        raise AssertionError(f"the schema uses {name}")

    order = sorted(schema, key=lambda name: name != "type")  # all() stops at the first misfit, so a wrong type is met first
    return all(keyword(name, schema[name]) for name in order)


def test_the_schema_accepts_what_loads_and_refuses_what_does_not():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["required"] == ["model", "sampling"]
    good = [
        plain(),
        config().to_dict(),
        yaml.safe_load(YAML.replace("1e-", "1.0e-")),
        plain(model="cnn", strategy="ghost"),
        plain(strategy={"gamma": 0.1}),
    ]
    for raw in good:
        assert TrainConfig.parse(raw)
        assert fits(schema, raw, schema)
    relations_between_fields = ("give exactly one", "privacy: give", "belongs to", "does not divide")
    for parts, expected in BAD:
        if not any(text in expected for text in relations_between_fields):
            assert not fits(schema, plain(**parts), schema), parts
    for _, build, values in NUMBERS:
        for value in values:
            fraction = isinstance(value, float) and value.is_integer()  # JSON has one kind of number
            if not fraction and not (isinstance(value, float) and not math.isfinite(value)) and value != 10**400:
                assert not fits(schema, plain(**build(value)), schema), (build(value), value)
