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
    from dptrain.tables import plan_table, render
    from dptrain.trainer import noise_multiplier, prepare

    loaded = TrainConfig.load(config, set_)
    preload(backend, loaded.performance)
    setup = prepare(loaded, backend)
    stds = None
    if setup.plan.private:
        sigma = noise_multiplier(loaded, setup.sample_rate, setup.num_steps)
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
        event = release_event(setup.plan, stds, setup.sample_rate, loaded.privacy.relation)
        typer.echo(statement(loaded.privacy.accountant, loaded.privacy.relation.value, event, setup.num_steps, loaded.privacy.target_delta))


def statement(accountant: str, relation: str, event: Any, steps: int, delta: float) -> str:
    """A printed epsilon, with delta, relation, sampling and accountant."""
    from accounting import get_accountant

    epsilon = get_accountant(accountant, relation).epsilon([(event, steps)], delta)
    return (
        f"epsilon = {epsilon:.6g} at delta = {delta:g} ({relation}, Poisson sampling, accountant {accountant}); "
        f"noise multiplier {event.noise_multiplier:.6g}, sample rate {event.sample_rate:.6g}, {steps} steps"
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
    as_json: AsJson = False,
) -> None:
    """Epsilon of a number of Poisson-sampled Gaussian releases; an upper bound."""
    from accounting import SampledGaussian, get_accountant

    event = SampledGaussian(noise_multiplier, sample_rate)
    value = get_accountant(accountant, relation).epsilon([(event, steps)], delta)
    values = {
        "epsilon": value, "delta": delta, "accountant": accountant, "neighboring_relation": relation, "sampling": "poisson",
        "sample_rate": sample_rate, "noise_multiplier": noise_multiplier, "steps": steps,
    }  # fmt: skip
    emit(values, f"epsilon = {value:.6g} at delta = {delta:g} ({relation}, Poisson sampling, accountant {accountant})", as_json)


@app.command()
def calibrate(
    target_epsilon: Annotated[float, typer.Option("--target-epsilon", help="Budget.")],
    delta: Delta,
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

    given = {"sample_rate": sample_rate, "steps": steps, "noise_multiplier": noise_multiplier}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) != 1:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"Give exactly two of {flags}; the third is solved for (got {3 - len(missing)}).")
    solve: Any = getattr(acc, f"calibrate_{missing[0]}")
    known = {k: v for k, v in given.items() if v is not None}
    found = solve(target_epsilon=target_epsilon, delta=delta, accountant=accountant, relation=relation, **known)
    given[missing[0]] = found
    event = acc.SampledGaussian(float(given["noise_multiplier"] or 0), float(given["sample_rate"] or 0))
    reached = acc.get_accountant(accountant, relation).epsilon([(event, int(given["steps"] or 0))], delta)
    values = {
        **given, "solved_for": missing[0], "epsilon": reached, "target_epsilon": target_epsilon, "delta": delta,
        "accountant": accountant, "neighboring_relation": relation, "sampling": "poisson",
    }  # fmt: skip
    sentence = (
        f"{missing[0]} = {found:.10g} gives epsilon = {reached:.6g} <= {target_epsilon:g} at delta = {delta:g} "
        f"({relation}, Poisson sampling, accountant {accountant})"
    )
    emit(values, sentence, as_json)


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
def schema() -> None:
    """Print the JSON Schema of a config."""
    from dptrain.config import json_schema

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
        else:
            raise
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
