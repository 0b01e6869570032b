"""The command line. Starts quickly: neither framework, nor the accounting libraries, load before they are needed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="dptrain",
    help="Differentially private training of neural networks, in PyTorch and TensorFlow, from one config.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # panels around the help cost a third of the start-up
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigPath = Annotated[Path, typer.Argument(help="YAML or TOML config.")]
BackendName = Annotated[str, typer.Option("--backend", "-b", help="torch or tensorflow.")]
Overrides = Annotated[list[str], typer.Option("--set", help="Override a setting, such as strategy.max_grad_norm=0.5; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AccountantName = Annotated[str, typer.Option(help="prv (tight) or rdp.")]
Relation = Annotated[str, typer.Option(help="add_remove, replace_one or zero_out.")]
Delta = Annotated[float, typer.Option("--delta", help="Delta at which epsilon is stated.")]
SampleRate = Annotated[float, typer.Option("--sample-rate", help="Probability with which an example enters a step.")]


def emit(values: dict[str, Any], sentence: str, as_json: bool) -> None:
    """Print a result for a person or for a program."""
    typer.echo(json.dumps(values) if as_json else sentence)


@app.command()
def train(
    config: ConfigPath,
    backend: BackendName = "torch",
    set_: Overrides = [],  # noqa: B006 - typer reads the default
    out: Annotated[Path | None, typer.Option(help="Run directory; resumes an unfinished run of the same config.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    ledger: Annotated[Path | None, typer.Option("--ledger", help="File shared by all runs on this data; sets privacy.ledger.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where a step goes; sets performance.compile=false, so steps take longer.")
    ] = False,
) -> None:
    """Train a model; Ctrl-C leaves a run that the same command resumes."""
    from dptrain.config import TrainConfig
    from dptrain.profiling import Profile
    from dptrain.progress import Display

    added = [f"privacy.ledger={json.dumps(str(ledger))}"] if ledger is not None else []
    loaded = TrainConfig.load(config, [*set_, *added, *(["performance.compile=false"] if profile else [])])
    measured = Profile() if profile else None
    from dptrain.backend import preload
    from dptrain.trainer import train as run

    preload(backend, loaded.performance)
    directory = out or fresh_directory(config.stem, backend)
    try:
        with Display(loaded, backend, directory, quiet) as display:
            result = run(loaded, backend, out=directory, progress=display.update, on_start=display.start, profile=measured)
        display.finish(result)
    except KeyboardInterrupt:
        print(f"dptrain: interrupted; the same command with --out {directory} resumes the run.", file=sys.stderr)
        raise typer.Exit(130) from None
    if measured is not None:
        from dptrain.checkpoint import write_json

        write_json(directory / "profile.json", measured.figures())
        typer.echo(str(measured))
    if not result.complete:
        raise typer.Exit(130)


def fresh_directory(stem: str, backend: str) -> Path:
    """``runs/<config>-<backend>-<number>``, the first that does not exist."""
    number = 1
    while os.path.exists(path := Path("runs") / f"{stem}-{backend}-{number}"):  # says no to a name that is too long, and does not raise
        number += 1
    return path


@app.command()
def plan(
    config: ConfigPath,
    backend: BackendName = "torch",
    set_: Overrides = [],  # noqa: B006
    tightness: Annotated[bool, typer.Option("--tightness", help="Attack every proven bound and show what of it is attained.")] = False,
) -> None:
    """Show what would be done to each layer, and the noise, without training."""
    from dptrain.backend import preload
    from dptrain.config import TrainConfig
    from dptrain.errors import ConfigError
    from dptrain.mechanism import GaussianMechanism, release_event
    from dptrain.predict import predicted
    from dptrain.sampling import sampling_words
    from dptrain.tables import plan_table, render
    from dptrain.trainer import planned_noise, prepare

    loaded = TrainConfig.load(config, set_)
    preload(backend, loaded.performance)
    setup = prepare(loaded, backend)
    stds = None
    if setup.plan.private:
        sigma = planned_noise(setup)
        mechanism = GaussianMechanism(sigma, loaded.privacy.allocation, loaded.privacy.noise_weights)
        stds = mechanism.stds(setup.plan, loaded.privacy.relation)
    found = None
    if tightness:
        if setup.plan.loss_clip is None:
            raise ConfigError(f"--tightness attacks proven bounds, and strategy {setup.plan.strategy} enforces its bound; use clipless.")
        found = setup.backend.tightness(setup.model, setup.data.x_train[:1], setup.plan)
    typer.echo(render(plan_table(setup.plan, stds, found)))
    if setup.plan.loss_clip is None:  # what a projection costs is not modelled
        typer.echo(str(predicted(setup)))
    typer.echo(f"N = {len(setup.data.x_train)}, sample rate {setup.sample_rate:.6g}, {setup.num_steps} steps")
    if stds is not None:
        sampler, privacy = setup.scheme.public(len(setup.data.x_train)), loaded.privacy
        event = release_event(setup.plan, stds, sampler, privacy.relation, privacy.noise)
        words, delta = sampling_words(sampler), privacy.target_delta
        said = statement(privacy.accountant, privacy.relation.value, event, setup.num_releases, delta, words)
        releases = f" in {setup.num_releases} releases" if setup.num_releases < setup.num_steps else ""
        typer.echo(f"{said}, {setup.num_steps} steps{releases}")


def statement(accountant: str, relation: str, event: Any, releases: int, delta: float, sampling: str) -> str:
    """A printed epsilon, with delta, relation, sampling and accountant."""
    from accounting import get_accountant

    epsilon = get_accountant(accountant, relation).epsilon([(event, releases)], delta)
    return (
        f"epsilon = {epsilon:.6g} at delta = {delta:g} ({relation}, {sampling}, accountant {accountant}); "
        f"noise multiplier {event.noise_multiplier:.6g}, sample rate {event.sample_rate:.6g}"
    )


@app.command()
def compare(
    config: ConfigPath,
    backends: Annotated[str, typer.Option("--backends", help="Comma-separated.")] = "torch,tensorflow",
    strategies: Annotated[
        str, typer.Option("--strategies", help="Comma-separated; module:function for a step that is not ours.")
    ] = "mixed_ghost,ghost,per_sample",
    models: Annotated[str, typer.Option("--models", help="Presets, or module:function; by default the config's.")] = "",
    batches: Annotated[str, typer.Option("--batches", help="Physical batch sizes; by default the config's.")] = "",
    sweep: Annotated[
        list[str], typer.Option("--sweep", help="batch=32,64 or input=32x32x3,64x64x3 or model.width=16,32; repeatable.")
    ] = [],  # noqa: B006
    input_: Annotated[
        str | None, typer.Option("--input", help="Shape of an example, such as 32x32x3; by default that of the data.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option("--num-classes", help="By default those of the data.")] = None,
    measure: Annotated[str, typer.Option("--measure", help="time, memory, largest; comma-separated.")] = "time,memory",
    pairs: Annotated[int, typer.Option("--pairs", help="Interleaved pairs of a private and a non-private step.")] = 9,
    threads: Annotated[int, typer.Option("--threads", help="CPU threads.")] = 2,
    limit_gib: Annotated[float, typer.Option("--limit-gib", help="Memory for the largest batch.")] = 4.0,
    out: Annotated[Path, typer.Option(help="Folder of the results; finished measurements in it are not run again.")] = Path("runs/compare"),
    set_: Overrides = [],  # noqa: B006
) -> None:
    """Compare speed and memory of frameworks and strategies; one process per measurement."""
    from dptrain.comparison import Settings
    from dptrain.comparison import compare as run
    from dptrain.config import TrainConfig
    from dptrain.progress import show_measurement

    def several(text: str) -> list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]

    kinds: list[Any] = several(measure)
    result = run(
        TrainConfig.load(config, set_), several(backends), several(strategies), models=several(models), batches=several(batches),  # type: ignore[arg-type]
        sweep=sweeps(sweep), input=input_, num_classes=num_classes, measurements=kinds,
        settings=Settings(pairs=pairs, threads=threads, limit_gib=limit_gib), out=out, progress=show_measurement,
    )  # fmt: skip
    typer.echo(result.markdown())
    result.save(out)
    typer.echo(f"everything is in {out}")


def sweeps(texts: list[str]) -> dict[str, list[str]]:
    """``key=v1,v2`` as a mapping.

    Raises:
        ConfigError: another form.
    """
    from dptrain.errors import ConfigError

    found = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"The sweep {text!r} must have the form key=value,value such as batch=32,64 or model.width=16,32.")
        found[key.strip()] = [value.strip() for value in values.split(",") if value.strip()]
    return found


@app.command()
def epsilon(
    sample_rate: SampleRate,
    noise_multiplier: Annotated[float, typer.Option("--noise-multiplier", help="Noise standard deviation over sensitivity.")],
    steps: Annotated[int, typer.Option("--steps", help="Number of releases.")],
    delta: Delta,
    accountant: AccountantName = "prv",
    relation: Relation = "add_remove",
    risks: Annotated[
        bool, typer.Option("--risks", help="Also what an attack can achieve, and (prv) the certified lower bound on epsilon.")
    ] = False,
    tuning_tries: Annotated[
        float | None, typer.Option("--tuning-tries", help="Runs of a hyper-parameter search, only the best released; the mean if random.")
    ] = None,
    tuning_distribution: Annotated[
        str, typer.Option("--tuning-distribution", help="Of the number of runs: geometric, logarithmic, poisson, or fixed.")
    ] = "geometric",
    as_json: AsJson = False,
) -> None:
    """Epsilon of a number of Poisson-sampled Gaussian releases; an upper bound."""
    import accounting as acc

    events: list[tuple[acc.Event, int]] = [(acc.SampledGaussian(noise_multiplier, sample_rate), steps)]
    values: dict[str, Any] = {
        "delta": delta, "accountant": accountant, "neighboring_relation": relation, "sampling": "poisson",
        "sample_rate": sample_rate, "noise_multiplier": noise_multiplier, "steps": steps,
    }  # fmt: skip
    words = "Poisson sampling"
    if tuning_tries is not None:
        tries: Any = int(tuning_tries) if tuning_tries.is_integer() else tuning_tries
        chosen: Any = tuning_distribution
        events = [(acc.Tuning(events, tries, chosen), 1)]
        values |= {"tuning_tries": tries, "tuning_distribution": tuning_distribution}
        words += f", the best of {tries:g} runs" + ("" if chosen == "fixed" else f" on average ({chosen})")
    value = acc.get_accountant(accountant, relation).epsilon(events, delta)
    sentence = f"epsilon = {value:.6g} at delta = {delta:g} ({relation}, {words}, accountant {accountant})"
    values = {"epsilon": value, **values}
    if risks:
        found = attack_risks(events, delta, accountant, relation)
        values |= found
        sentence += f"\n{risk_sentence(found)}"
    emit(values, sentence, as_json)


def attack_risks(events: Any, delta: float, accountant: str, relation: str) -> dict[str, Any]:
    """What the best membership attack can achieve, and how far epsilon may be from the truth."""
    from accounting import get_accountant, trade_off

    curve = trade_off(events, relation, accountant)
    found: dict[str, Any] = {
        "advantage": curve.advantage,
        "true_positive_rate": {f"{rate:g}": curve.true_positive_rate(rate) for rate in (0.01, 0.001)},
    }
    if accountant == "prv":
        judge: Any = get_accountant(accountant, relation)
        found["epsilon_lower_bound"] = judge.detail(events, delta).lower
    return found


def risk_sentence(found: dict[str, Any]) -> str:
    """``attack_risks`` for people."""
    rates = ", ".join(f"at most {share:.6g} at false-positive rate {rate}" for rate, share in found["true_positive_rate"].items())
    lines = [f"membership attack: advantage at most {found['advantage']:.6g}; true-positive rate {rates}"]
    if found.get("epsilon_lower_bound", 0.0) > 0.0:  # 0: nothing is known
        lines.append(f"the true epsilon is at least {found['epsilon_lower_bound']:.6g} (certified)")
    return "\n".join(lines)


@app.command()
def calibrate(
    target_epsilon: Annotated[float | None, typer.Option("--target-epsilon", help="Budget; needs --delta.")] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="Delta of the target epsilon.")] = None,
    target_advantage: Annotated[
        float | None, typer.Option("--target-advantage", help="Largest true- minus false-positive rate of a membership attack.")
    ] = None,
    target_delta: Annotated[float | None, typer.Option("--target-delta", help="Largest delta; needs --epsilon.")] = None,
    at_epsilon: Annotated[float | None, typer.Option("--epsilon", help="Epsilon of the target delta.")] = None,
    sample_rate: Annotated[float | None, typer.Option("--sample-rate", help="Leave out to solve for it.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Leave out to solve for it.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option("--noise-multiplier", help="Leave out to solve for it.")] = None,
    accountant: AccountantName = "prv",
    relation: Relation = "add_remove",
    as_json: AsJson = False,
) -> None:
    """Solve for the one of noise multiplier, steps and sample rate that is left out; never above the budget."""
    import accounting as acc
    from dptrain.errors import ConfigError

    given: dict[str, Any] = {"sample_rate": sample_rate, "steps": steps, "noise_multiplier": noise_multiplier}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) != 1:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"Give exactly two of {flags}; the third is solved for (got {3 - len(missing)}).")
    targets = (target_epsilon, target_advantage, target_delta)
    if sum(target is not None for target in targets) != 1:
        raise ConfigError("Give exactly one of --target-epsilon (with --delta), --target-delta (with --epsilon) and --target-advantage.")
    if (delta is None) != (target_epsilon is None) or (at_epsilon is None) != (target_delta is None):
        raise ConfigError("--delta belongs to --target-epsilon, and --epsilon to --target-delta; give both or neither.")
    known = {k: v for k, v in given.items() if v is not None}
    who: dict[str, Any] = {"accountant": accountant, "relation": relation}
    if target_epsilon is not None:
        found = getattr(acc, f"calibrate_{missing[0]}")(target_epsilon=target_epsilon, delta=delta, **who, **known)
    elif target_delta is not None:
        assert at_epsilon is not None
        found = acc.calibrate_to_delta(target_delta, at_epsilon, **who, **known)
    else:
        assert target_advantage is not None
        found = acc.calibrate_to_advantage(target_advantage, **who, **known)
    given[missing[0]] = found
    judge = acc.get_accountant(accountant, relation)
    events = [(acc.SampledGaussian(given["noise_multiplier"], given["sample_rate"]), given["steps"])]
    values: dict[str, Any] = {**given, "solved_for": missing[0]}
    if delta is not None:
        reached = judge.epsilon(events, delta)
        values |= {"epsilon": reached, "target_epsilon": target_epsilon, "delta": delta}
        outcome = f"epsilon = {reached:.6g} <= {target_epsilon:g} at delta = {delta:g}"
    elif at_epsilon is not None:
        reached = judge.delta(events, at_epsilon)
        values |= {"delta": reached, "target_delta": target_delta, "epsilon": at_epsilon}
        outcome = f"delta = {reached:.6g} <= {target_delta:g} at epsilon = {at_epsilon:g}"
    else:
        reached = judge.advantage(events)
        values |= {"advantage": reached, "target_advantage": target_advantage}
        outcome = f"attack advantage = {reached:.6g} <= {target_advantage:g}"
    values |= {"accountant": accountant, "neighboring_relation": relation, "sampling": "poisson"}
    emit(values, f"{missing[0]} = {found:.10g} gives {outcome} ({relation}, Poisson sampling, accountant {accountant})", as_json)


@app.command()
def certify(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    radius: Annotated[list[float], typer.Option(help="L2 radius in the input's own units; repeatable.")] = [0.1, 0.25, 0.5, 1.0],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Write the certified radius of every test prediction as CSV.")] = None,
    as_json: AsJson = False,
) -> None:
    """Certified robustness of a run's Lipschitz network on the test split; NOT private with respect to it."""
    from dptrain.backend import preload
    from dptrain.config import TrainConfig
    from dptrain.robustness import certify_run
    from dptrain.rundir import read_json

    preload(str(read_json(directory / "run.json").get("backend")), TrainConfig.load(directory / "config.yaml").performance)
    found = certify_run(directory, [0.0, *radius])
    if out is not None:
        rows = "".join(f"{i},{r:.9g}\n" for i, r in enumerate(found.radii))
        out.write_text("example,certified_radius\n" + rows)
    values = {
        "lipschitz": found.lipschitz, "input_scale": found.input_scale, "examples": len(found.radii), "private": False,
        "certified_accuracy": {f"{r:g}": value for r, value in found.accuracy.items()},
    }  # fmt: skip
    lines = [
        f"accuracy {found.accuracy[0.0]:.4f} on {len(found.radii)} test examples (not private), Lipschitz constant {found.lipschitz:.6g}"
    ]
    lines += [f"certified accuracy at L2 radius {r:g}: {value:.4f}" for r, value in found.accuracy.items() if r]
    emit(values, "\n".join(lines), as_json)


ledgers = typer.Typer(help="Ledgers: what was spent, and files that several runs share.", no_args_is_help=True)
app.add_typer(ledgers, name="ledger")
LedgerPath = Annotated[Path, typer.Argument(help="A ledger file, or the directory of a run.")]


@ledgers.command("show")
def show_ledger(
    path: LedgerPath,
    delta: Delta = 1e-5,
    target_epsilon: Annotated[float | None, typer.Option("--target-epsilon", help="Budget, to say what is left of it.")] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option("--noise-multiplier", help="With a target: how many such steps are left.")
    ] = None,
    sample_rate: Annotated[float | None, typer.Option("--sample-rate", help="Of these steps.")] = None,
    relation: Annotated[str | None, typer.Option(help="Where the ledger does not state it; by default add_remove.")] = None,
    as_json: AsJson = False,
) -> None:
    """What was spent, by every accountant, and what is left of a target; takes no lock."""
    from dptrain.spending import spending

    found = spending(path, delta, target_epsilon, noise_multiplier, sample_rate, relation)
    emit(found.values(), str(found), as_json)


@ledgers.command("new")
def new_ledger(
    path: Annotated[Path, typer.Argument(help="The file to make.")],
    data: Annotated[str, typer.Option(help="Name of the data set, as in the config's data.name.")],
    num_examples: Annotated[int, typer.Option("--num-examples", help="Training examples, a public constant.")],
    relation: Relation = "add_remove",
) -> None:
    """Make the shared ledger of a data set; the first run with privacy.ledger makes one, too."""
    from accounting import PrivacyLedger
    from accounting.accountant import check_relation
    from accounting.errors import check_count

    check_count(num_examples, "num_examples", where="dptrain ledger new")
    facts = {"relation": check_relation(relation, where="dptrain ledger new").value, "num_examples": num_examples, "data": data}
    PrivacyLedger(path, facts=facts).close()
    typer.echo(f"{path} is an empty ledger for {num_examples} examples of {data}, relation {relation}")


@app.command()
def audit(
    config: ConfigPath,
    backend: BackendName = "torch",
    set_: Overrides = [],  # noqa: B006
    canaries: Annotated[int, typer.Option("--canaries", help="Gradient-space canaries of the one-run audit; 0 for none.")] = 400,
    examples: Annotated[int, typer.Option("--examples", help="Mislabelled examples of the one-run audit; 0 for none.")] = 200,
    trials: Annotated[int, typer.Option("--trials", help="Releases of the distinguishing game; 0 for none.")] = 1000,
    steps: Annotated[int | None, typer.Option("--steps", help="Train, and audit the claim for, fewer steps.")] = None,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the lower bound on epsilon.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Of canaries and coins.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder, such as that of the run, for audit.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look for broken privacy: checks of every part of a step, and a lower bound on epsilon; exit code 1 if something is wrong."""
    from dptrain.auditing.run import audit as run
    from dptrain.auditing.run import save
    from dptrain.backend import preload
    from dptrain.config import TrainConfig

    loaded = TrainConfig.load(config, set_)
    preload(backend, loaded.performance)
    found = run(
        loaded, backend, canaries=canaries, examples=examples, trials=trials, steps=steps, confidence=confidence, seed=seed,
    )  # fmt: skip
    if out is not None:
        save(found, out)
    emit(found.to_dict(), str(found), as_json)
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def membership(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    shadows: Annotated[int, typer.Option("--shadows", help="Shadow models of the likelihood-ratio attack, an even number or 0.")] = 8,
    most: Annotated[int, typer.Option("--most", help="Members and others, at most so many each.")] = 2000,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice of examples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Membership inference on a finished run, NOT private: loss threshold and likelihood ratio; writes membership.json and .svg."""
    from dptrain.auditing.membership import membership as run
    from dptrain.auditing.membership import save
    from dptrain.backend import preload
    from dptrain.config import TrainConfig
    from dptrain.rundir import read_json

    preload(str(read_json(directory / "run.json").get("backend")), TrainConfig.load(directory / "config.yaml").performance)
    found = run(directory, shadows=shadows, most=most, seed=seed)
    save(found, directory)
    emit(found.to_dict(), str(found), as_json)


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run directories; the pages of several compare them.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the files; by default each run's own directory.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write what may be promised of a run: privacy.json, MODEL_CARD.md and report.html, computed from its ledger."""
    from dptrain.reporting import report as write

    for written in write(*directories, out=out):
        values = {"directory": str(written.directory), "files": [str(file) for file in written.files], "privacy": written.privacy}
        emit(values, f"{written.privacy['statement']}\n{written.privacy['status']}; the report is {written.files[-1]}", as_json)


@app.command()
def schema(
    of: Annotated[str, typer.Argument(metavar="[config|privacy]", help="config, or privacy: the statement of a run.")] = "config",
) -> None:
    """Print the JSON Schema of a config, or of a run's privacy.json."""
    if of == "privacy":
        from dptrain.reporting.schema import json_schema
    elif of == "config":
        from dptrain.config import json_schema
    else:
        from dptrain.errors import ConfigError

        raise ConfigError(f"There is no schema of {of!r}; choose config or privacy.")
    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices and data sets found on this machine."""
    from dptrain.doctor import examine, show

    found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found)


def main() -> None:
    """Entry point: user errors become one line on stderr and exit code 2."""
    from accounting.errors import AccountingError, LedgerError

    try:
        code = app(standalone_mode=False, prog_name="dptrain")
    except typer.Exit as stop:
        code = stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("dptrain: interrupted.", file=sys.stderr)
        code = 130
    except Exception as error:
        from dptrain.errors import DptrainError

        if isinstance(error, DptrainError | AccountingError | LedgerError):
            print(f"dptrain: error: {error}", file=sys.stderr)
            code = 2
        elif hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error; where its class lives depends on typer's version
            error.show()
            code = error.exit_code
        elif isinstance(error, OSError) and error.filename is not None:  # of a path that the user gave
            print(f"dptrain: error: {error.filename}: {error.strerror}; choose another path.", file=sys.stderr)
            code = 2
        else:
            raise
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
