"""What the command line prints is what the library computes, and every failure is one line and a non-zero exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml

import dptrain
from accounting import SampledGaussian, Tuning, calibrate_noise_multiplier, get_accountant, trade_off
from dptrain.cli import fresh_directory, main
from dptrain.config import json_schema
from tests.core.shared import plain, write_npz

NUMBERS = ["--sample-rate", "0.01", "--noise-multiplier", "1.0", "--steps", "100", "--delta", "1e-5"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Exit code, stdout and stderr of the command line, in this process; an exception that it lets out fails the test."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["dptrain", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """A config with its data, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "data.npz")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain(data={"name": "npz", "path": "data.npz"})))
    return path


# ---- epsilon and calibrate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("relation", ["add_remove", "replace_one", "zero_out"])
def test_epsilon_is_the_accountants(run, accountant, relation):
    code, out, err = run("epsilon", *NUMBERS, "--accountant", accountant, "--relation", relation, "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    expected = get_accountant(accountant, relation).epsilon([(SampledGaussian(1.0, 0.01), 100)], 1e-5)
    assert printed == {
        "epsilon": expected, "delta": 1e-5, "accountant": accountant, "neighboring_relation": relation, "sampling": "poisson",
        "sample_rate": 0.01, "noise_multiplier": 1.0, "steps": 100,
    }  # fmt: skip


def test_epsilon_for_people_names_delta_relation_sampling_and_accountant(run):
    code, out, _ = run("epsilon", *NUMBERS)
    assert code == 0
    expected = get_accountant("prv").epsilon([(SampledGaussian(1.0, 0.01), 100)], 1e-5)
    assert out == f"epsilon = {expected:.6g} at delta = 1e-05 (add_remove, Poisson sampling, accountant prv)\n"


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("unknown", ["noise_multiplier", "steps", "sample_rate"])
def test_calibrate_solves_for_what_is_left_out(run, unknown, accountant):
    given = {"sample_rate": 0.01, "steps": 100, "noise_multiplier": 1.0}
    del given[unknown]
    flags = [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), value)]
    words = ["calibrate", "--target-epsilon", "1.5", "--delta", "1e-5", *flags, "--accountant", accountant]
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed["solved_for"] == unknown
    event = SampledGaussian(printed["noise_multiplier"], printed["sample_rate"])
    reached = get_accountant(accountant).epsilon([(event, printed["steps"])], 1e-5)
    assert printed["epsilon"] == reached <= 1.5 == printed["target_epsilon"]
    assert reached >= (1.5 * 0.998 if unknown != "steps" else 1.0)
    more = get_accountant(accountant).epsilon([(event, printed["steps"] + 1)], 1e-5)
    assert unknown != "steps" or more > 1.5  # one step more would be too many
    _, text, _ = run(*words)
    assert text.startswith(f"{unknown} = {printed[unknown]:.10g} gives epsilon = {reached:.6g} <= 1.5 at delta = 1e-05 (")


def test_the_two_commands_agree(run):
    sigma = json.loads(run("calibrate", "--target-epsilon", "2", "--delta", "1e-5", "--sample-rate", "0.1", "--steps", "50", "--json")[1])
    assert sigma["noise_multiplier"] == calibrate_noise_multiplier(2.0, 1e-5, 0.1, 50)
    again = run(
        "epsilon",
        "--sample-rate",
        "0.1",
        "--noise-multiplier",
        repr(sigma["noise_multiplier"]),
        "--steps",
        "50",
        "--delta",
        "1e-5",
        "--json",
    )
    assert json.loads(again[1])["epsilon"] == sigma["epsilon"] <= 2.0


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_risks_of_an_attack(run, accountant):
    words = ["epsilon", *NUMBERS, "--accountant", accountant, "--risks"]
    printed, curve = json.loads(run(*words, "--json")[1]), trade_off([(SampledGaussian(1.0, 0.01), 100)], accountant=accountant)
    assert printed["advantage"] == curve.advantage
    assert printed["true_positive_rate"] == {"0.01": curve.true_positive_rate(0.01), "0.001": curve.true_positive_rate(0.001)}
    assert ("epsilon_lower_bound" in printed) == (accountant == "prv")
    assert 0 < printed.get("epsilon_lower_bound", 0.1) <= printed["epsilon"]
    text = run(*words)[1]
    assert f"advantage at most {curve.advantage:.6g}; true-positive rate at most" in text


@pytest.mark.parametrize("distribution", ["geometric", "logarithmic", "poisson", "fixed"])
def test_the_price_of_tuning(run, distribution):
    words = ["epsilon", *NUMBERS, "--tuning-tries", "20", "--tuning-distribution", distribution]
    printed = json.loads(run(*words, "--json")[1])
    search = Tuning([(SampledGaussian(1.0, 0.01), 100)], 20, distribution)
    assert printed["epsilon"] == get_accountant("prv").epsilon([(search, 1)], 1e-5)
    assert (printed["tuning_tries"], printed["tuning_distribution"]) == (20, distribution)
    text = run(*words)[1]
    assert "the best of 20 runs" in text and (distribution == "fixed" or f"on average ({distribution})" in text)


@pytest.mark.parametrize("unknown", ["noise_multiplier", "steps", "sample_rate"])
@pytest.mark.parametrize("target", ["advantage", "delta"])
def test_calibrate_to_other_targets(run, unknown, target):
    given = {"sample_rate": "0.01", "steps": "500", "noise_multiplier": "1.0"}
    del given[unknown]
    flags = [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), value)]
    words = ["calibrate", *(["--target-advantage", "0.05"] if target == "advantage" else ["--target-delta", "1e-6", "--epsilon", "2"])]
    printed = json.loads(run(*words, *flags, "--json")[1])
    events = [(SampledGaussian(printed["noise_multiplier"], printed["sample_rate"]), printed["steps"])]
    prv = get_accountant("prv")
    reached, limit = (prv.advantage(events), 0.05) if target == "advantage" else (prv.delta(events, 2.0), 1e-6)
    assert printed["solved_for"] == unknown and printed[target] == reached <= limit == printed[f"target_{target}"]
    assert reached >= limit * (0.999 if unknown != "steps" else 0.9)
    assert " <= " in run(*words, *flags)[1]


CALIBRATE = ["calibrate", "--target-epsilon", "1", "--delta", "1e-5"]
EPSILON = {"--sample-rate": "0.01", "--noise-multiplier": "1.0", "--steps": "100", "--delta": "1e-5"}


def epsilon_with(**changed):
    words = {**EPSILON, **{"--" + name.replace("_", "-"): value for name, value in changed.items()}}
    return ["epsilon", *[word for pair in words.items() for word in pair]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (epsilon_with(noise_multiplier="0"), "noise_multiplier must be above 0"),
        (epsilon_with(noise_multiplier="-1"), "noise_multiplier must be above 0"),
        (epsilon_with(noise_multiplier="nan"), "noise_multiplier must be finite"),
        (epsilon_with(noise_multiplier="inf"), "noise_multiplier must be finite"),
        (epsilon_with(sample_rate="0"), "sample_rate must lie in (0, 1]"),
        (epsilon_with(sample_rate="1.1"), "sample_rate must lie in (0, 1]"),
        (epsilon_with(sample_rate="nan"), "sample_rate must be finite"),
        (epsilon_with(delta="0"), "delta must lie strictly between 0 and 1"),
        (epsilon_with(delta="1"), "delta must lie strictly between 0 and 1"),
        (epsilon_with(delta="nan"), "delta must be finite"),
        (epsilon_with(steps="-1"), "must not be negative"),
        (epsilon_with(accountant="gdp"), "gdp"),
        (epsilon_with(relation="substitute"), "substitute"),
        (epsilon_with(tuning_tries="0.5"), "tries must lie between 1 and"),
        (epsilon_with(tuning_tries="nan"), "tries must be finite"),
        ([*epsilon_with(tuning_tries="5"), "--tuning-distribution", "binomial"], "distribution must be one of geometric"),
        ([*CALIBRATE, "--steps", "10"], "Give exactly two of --sample-rate, --steps, --noise-multiplier; the third is solved for (got 1)."),
        ([*CALIBRATE, "--steps", "1", "--sample-rate", "0.1", "--noise-multiplier", "1"], "Give exactly two of"),
        ([*CALIBRATE, "--steps", "10", "--sample-rate", "0"], "sample_rate must lie in (0, 1]"),
        ([*CALIBRATE, "--steps", "-5", "--sample-rate", "0.1"], "steps"),
        (["calibrate", "--target-epsilon", "0", "--delta", "1e-5", "--steps", "10", "--sample-rate", "0.1"], "must be above 0"),
        (["calibrate", "--target-epsilon", "nan", "--delta", "1e-5", "--steps", "10", "--sample-rate", "0.1"], "must be finite"),
        (["calibrate", "--target-epsilon", "1e-9", "--delta", "1e-300", "--steps", "1000000", "--sample-rate", "1"], "epsilon"),
        (["calibrate", "--steps", "10", "--sample-rate", "0.1"], "exactly one of --target-epsilon"),
        ([*CALIBRATE, "--target-advantage", "0.1", "--steps", "10", "--sample-rate", "0.1"], "exactly one of --target-epsilon"),
        (["calibrate", "--target-epsilon", "1", "--steps", "10", "--sample-rate", "0.1"], "--delta belongs to --target-epsilon"),
        (["calibrate", "--target-delta", "1e-5", "--steps", "10", "--sample-rate", "0.1"], "--epsilon to --target-delta"),
        (["calibrate", "--target-advantage", "1.5", "--steps", "10", "--sample-rate", "0.1"], "target_advantage must lie strictly"),
        (["train", "none.yaml"], "There is no config file none.yaml"),
        (["plan", "none.yaml"], "There is no config file none.yaml"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_code_2(run, words, expected):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("dptrain: error: ")
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["epsilon"], ["epsilon", "--steps", "many"], ["fly"], ["train"], ["epsilon", *NUMBERS, "--bogus"], ["calibrate", "--steps", "1.5"]],
)
def test_a_usage_error_shows_the_usage(run, words):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "Usage: dptrain" in err
    assert "Traceback" not in err


# ---- help, schema, doctor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_lists_every_command(run, words):
    code, out, _ = run(*words)
    assert code == 0
    for name in ("train", "plan", "epsilon", "calibrate", "schema", "doctor"):
        assert name in out


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("train", ["--backend", "--set", "--out"]),
        ("plan", ["--backend", "--set"]),
        ("epsilon", ["--sample-rate", "--noise-multiplier", "--steps", "--delta", "--accountant", "--json"]),
        ("calibrate", ["--target-epsilon", "--delta", "--sample-rate", "--steps", "--json"]),
        ("schema", []),
        ("doctor", ["--json"]),
    ],
)
def test_every_command_has_its_flags(run, name, flags):
    code, out, _ = run(name, "--help")
    assert code == 0
    for flag in flags:
        assert flag in out


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["--help"], {"numpy", "dptrain.config", "rich", "scipy", "matplotlib", "torch", "tensorflow", "keras"}),
        (["train", "--help"], {"numpy", "dptrain.config", "rich", "scipy", "matplotlib", "torch", "tensorflow", "keras"}),
        (["epsilon", *NUMBERS], {"dptrain.config", "matplotlib", "torch", "tensorflow", "keras"}),
    ],
)
def test_a_command_loads_only_what_it_needs(words, heavy):
    code = (
        "import sys; from dptrain.cli import main\n"
        f"sys.argv = ['dptrain', *{words!r}]\n"
        "try: main()\n"
        f"except SystemExit as stop: print(); print('loaded', sorted({heavy!r} & set(sys.modules)), stop.code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded [] 0"


def test_public_names_load_at_first_use_and_a_module_does_not_take_the_place_of_a_function():
    code = (
        "import dptrain\n"
        "assert dptrain.errors.ConfigError is dptrain.ConfigError and not hasattr(dptrain, '_nothing')\n"
        "import dptrain.plan, types\n"
        "assert callable(dptrain.plan) and dptrain.plan.__module__ == 'dptrain.trainer'\n"
        "from dptrain.plan import Plan\n"
        "assert dptrain.Plan is Plan and set(dptrain.__all__) <= set(dir(dptrain))\n"
        "assert all(not isinstance(getattr(dptrain, name), types.ModuleType) for name in dptrain.__all__)\n"
        "import importlib; importlib.import_module('dptrain.plan'); assert callable(dptrain.plan)\n"
        "try: dptrain.nothing\n"
        "except AttributeError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "module 'dptrain' has no attribute 'nothing'"


def test_schema_is_the_schema(run):
    code, out, err = run("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(json_schema()))


def test_doctor_tells_versions_devices_and_data(run, monkeypatch):
    from dptrain import doctor

    monkeypatch.setitem(doctor.PROBES, "torch", "print('noise of a framework'); print('[\"cpu\"]')")
    monkeypatch.setitem(doctor.PROBES, "tensorflow", "raise SystemExit('no such library')")
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["versions"]["dptrain"] == dptrain.__version__
    assert found["backends"] == {
        "torch": {"usable": True, "devices": ["cpu"]},
        "tensorflow": {"usable": False, "reason": "no such library"},
    }
    assert {row["name"] for row in found["data"]} == {"mnist_5k", "fashion_mnist", "cifar10", "digits", "adult", "npz", "callable"}
    code, text, _ = run("doctor")
    assert code == 0
    for word in ("cpu", "unusable: no such library", "fashion_mnist", dptrain.__version__):
        assert word in text


def test_doctor_sees_the_real_torch(run):
    from dptrain import doctor

    assert "cpu" in doctor.devices("torch")["devices"]


# ---- plan and train ------------------------------------------------------------------------------------------------


def test_plan_shows_every_layer_the_noise_and_epsilon_without_training(run, config_file):
    code, out, err = run("plan", config_file.name, "--set", "strategy.grouping=per_layer")
    assert (code, err) == (0, "")
    for word in (
        "fc1",
        "head",
        "noise std",
        "N = 60, sample rate 0.2, 4 steps",
        "epsilon = ",
        "delta = 1e-05",
        "accountant rdp",
        "predicted for a physical batch of 128",
        "instantiate ms",
        "times a plain one",
        "times the plain one",
    ):
        assert word in out
    assert sorted(os.listdir()) == ["data.npz", "run.yaml"]
    code, out, _ = run("plan", config_file.name, "--set", "strategy=non_private")
    assert code == 0
    assert "epsilon" not in out


def test_the_planned_epsilon_is_the_trained_one(run, config_file):
    _, planned, _ = run("plan", config_file.name)
    code, out, _ = run("train", config_file.name, "--quiet")
    assert code == 0
    stated = json.loads((config_file.parent / "runs" / "run-torch-1" / "privacy.json").read_text())
    assert f"epsilon = {stated['epsilon']:.6g} at delta = 1e-05" in planned
    assert stated["statement"] in out


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_train_shows_where_a_step_goes(run, config_file, backend):
    code, out, _ = run("train", config_file.name, "--backend", backend, "--profile", "--quiet", "--out", "here")
    assert code == 0
    for word in ("ms per step", "forward", "cotangents", "norms", "sums", "noise", "update", "data", "not private"):
        assert word in out
    found = json.loads((config_file.parent / "here" / "profile.json").read_text())
    assert found["steps"] == 3 and found["milliseconds"]["norms"] > 0


def test_train_prints_accuracy_and_epsilon_and_writes_a_directory(run, config_file):
    code, out, err = run("train", config_file.name, "--backend", "torch", "--out", "here", "--set", "sampling.steps=3")
    assert (code, err) == (0, "")
    assert "test accuracy 0." in out or "test accuracy 1." in out
    assert "3 releases" in out
    assert "(not private)" in out  # every loss that is shown says so (pitfalls.md G18)
    assert sorted(os.listdir("here")) == [
        "checkpoint.safetensors", "config.yaml", "ledger.jsonl", "metrics.jsonl",
        "plan.txt", "privacy.json", "run.json", "weights.safetensors",
    ]  # fmt: skip
    assert dptrain.TrainConfig.load("here/config.yaml").sampling.steps == 3
    code, _, err = run("train", config_file.name, "--out", "here", "--set", "sampling.steps=4")
    assert code == 2
    assert "belongs to another run" in err


def test_warnings_are_said_before_training(run, config_file):
    _, out, _ = run("train", config_file.name, "-q", "--set", "privacy.target_delta=0.5", "--set", "privacy.unsafe_seed=1")
    assert "target_delta 0.5 is not below 1/N" in out
    assert "unsafe_seed is set" in out
    assert "VOID" in out
    _, out, _ = run("train", config_file.name, "-q", "--set", "strategy=non_private", "--set", "privacy.target_delta=0.5")
    assert "no noise, no epsilon" in out
    assert "warning" not in out


def test_directories_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(fresh_directory("mnist", "torch")) == "runs/mnist-torch-1"
    os.makedirs("runs/mnist-torch-1")
    assert str(fresh_directory("mnist", "torch")) == "runs/mnist-torch-2"
    assert str(fresh_directory("mnist", "tensorflow")) == "runs/mnist-tensorflow-1"


def test_ctrl_c_before_training_is_one_line(run, monkeypatch, config_file):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dptrain.trainer.train", interrupted)
    code, _, err = run("train", config_file.name)
    assert code == 130
    assert err == "dptrain: interrupted; the same command with --out runs/run-torch-1 resumes the run.\n"


def test_a_bug_is_not_dressed_up_as_a_user_error(monkeypatch, config_file):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("dptrain.trainer.train", broken)
    monkeypatch.setattr(sys, "argv", ["dptrain", "train", config_file.name])
    with pytest.raises(ZeroDivisionError):
        main()


def test_the_installed_command_answers(tmp_path):
    script = os.path.join(os.path.dirname(sys.executable), "dptrain")
    assert os.path.exists(script), "install the package: make install"
    done = subprocess.run(
        [script, "epsilon", *NUMBERS, "--accountant", "rdp", "--json"], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["epsilon"] == get_accountant("rdp").epsilon([(SampledGaussian(1.0, 0.01), 100)], 1e-5)


# ---- proven bounds -------------------------------------------------------------------------------------------------


CLIPLESS = ["--set", "model={name: lipschitz_mlp, hidden: [4]}", "--set", "strategy=clipless"]


def test_plan_attacks_proven_bounds(run, config_file):
    code, out, err = run("plan", config_file.name, *CLIPLESS, "--tightness")
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.replace("│", " ").split()[:1] == ["fc1"]]
    claimed, std, attained, tightness = map(float, line.replace("│", " ").split()[-4:])
    assert 0.5 <= tightness <= 1.0 and attained == pytest.approx(tightness * claimed, rel=1e-2) and std > 0
    code, _, err = run("plan", config_file.name, "--tightness")
    assert code == 2 and "use clipless" in err


def test_certify_tells_certified_accuracy_and_writes_radii(run, config_file, tmp_path):
    assert run("train", config_file.name, *CLIPLESS, "-q", "--out", "done")[0] == 0
    code, out, err = run("certify", "done", "--radius", "0.05", "--out", "radii.csv", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["private"] is False and found["lipschitz"] == pytest.approx(1.0, rel=1e-3)
    assert found["certified_accuracy"]["0"] >= found["certified_accuracy"]["0.05"]
    rows = (tmp_path / "radii.csv").read_text().splitlines()
    assert rows[0] == "example,certified_radius" and len(rows) == found["examples"] + 1
    assert "certified accuracy at L2 radius 0.1" in run("certify", "done")[1]
    code, _, err = run("certify", "nowhere")
    assert code == 2 and len(err.splitlines()) == 1
    for bad in ("-1", "nan"):
        code, _, err = run("certify", "done", "--radius", bad)
        assert code == 2, bad


def test_certify_refuses_a_network_without_bounds(run, config_file):
    assert run("train", config_file.name, "-q", "--out", "plain")[0] == 0
    code, _, err = run("certify", "plain")
    assert code == 2 and "Spectral" in err
