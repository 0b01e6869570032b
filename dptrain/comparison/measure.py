"""One measurement, in a process of its own: reads a case from standard input and prints one line of JSON.

Time: pairs of a non-private and a private step, alternating, so that the machine's mood cancels; all that training does after the
batch is drawn: transfer, sum, noise, update, projection. Memory: the step alone in the process, above the framework without a model;
what was freed while the model was built may stay with an allocator and serve the step, so a mark taken later would hide a part of
the peak.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dptrain.comparison.cases import NON_PRIVATE, Case, Shape, resolve
from dptrain.errors import DptrainError

Step = Callable[[], None]
MIB = 2**20
STEPS_FOR_MEMORY = 3
# glibc moves the size from which arrays get pages of their own up to 32 MiB; fixed, what is freed goes back at once, and the
# high-water mark is that of the arrays alive. TensorFlow with oneDNN has a pool of its own on top, which is turned off for the same end.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "TF_ONEDNN_USE_SYSTEM_ALLOCATOR": "1"}


class PeerMissingError(DptrainError):
    """A step that is not ours cannot be built here; the message says how to get it."""


@dataclass(frozen=True)
class Bench:
    """What a step that is not ours is built from, by a function ``make(bench)`` that returns it.

    What cannot live in this environment is an object with ``measure(case)`` in the function's place: it returns all figures itself, and
    with them ``yardstick``, a text that says what they are relative to, and ``plain_mib`` beside ``total_mib``.

    Args:
        model: the native model, with the config's starting weights.
        x, y: the batch ``[B, ...]`` and its targets, as native tensors on the device.
        loss: the config's per-example loss ``[B]``, called as the framework does: ``(outputs, targets)`` in torch,
            ``(targets, outputs)`` in Keras.
        learning_rate, max_grad_norm, noise_multiplier: what to train with.
        backend: ours, for device and helpers.
    """

    model: Any
    x: Any
    y: Any
    loss: Any
    learning_rate: float
    max_grad_norm: float
    noise_multiplier: float
    backend: Any


def environment(case: Case) -> dict[str, str]:
    """Environment variables of a measurement's process; set before the framework is imported.

    Args:
        case: the case.
    Returns:
        Name -> value.
    """
    threads = str(case.settings.threads)
    fixed = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"), threads)
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "TF_NUM_INTEROP_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}
    return fixed | quiet | ({} if case.measurement == "time" else ALLOCATOR)


def synthetic(shape: Shape, count: int) -> Any:
    """A data set of a shape; no real example is touched."""
    import numpy as np

    from dptrain.data import from_arrays

    rng = np.random.default_rng(0)
    if shape.tokens:
        x: Any = rng.integers(0, shape.tokens, (count, *shape.input))
    else:
        x = rng.standard_normal((count, *shape.input)).astype(np.float32)
    if shape.num_classes is None:
        return from_arrays(x, rng.standard_normal(count).astype(np.float32))
    return from_arrays(x, np.arange(count) % shape.num_classes, num_classes=shape.num_classes)


def native_model(case: Case) -> Any:
    """The model of ``module:function``, called with backend, input shape and number of outputs; None for a specification."""
    if ":" not in case.model:
        return None
    return load(case.model)(case.backend, case.shape.input, case.shape.num_classes or 1)


def load(name: str) -> Any:
    """The object called ``module:attribute``.

    Raises:
        DptrainError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DptrainError(f"{name} cannot be loaded: {error}.") from None


class Built(NamedTuple):
    """A step over one physical batch, which returns when the device has finished; the backend; of ours, the parts of the run."""

    step: Step
    backend: Any
    setup: Any = None


def build(case: Case, strategy: str) -> Built:
    """A step over one physical batch, and what it was built of.

    Args:
        case: the case.
        strategy: ours by name, or ``module:function``.
    Returns:
        The step and its parts.
    """
    from dptrain.config import TrainConfig

    external = ":" in strategy
    raw = TrainConfig.parse(case.config)
    config = resolve(case.config, NON_PRIVATE if external else strategy, None, (), case.batch)
    data = synthetic(case.shape, case.batch)
    if external:
        return peer_step(case, raw, config, data, load(strategy))
    return our_step(case, config, data)


def our_step(case: Case, config: Any, data: Any) -> Built:
    """A step of ours."""
    from accounting import PrivacyLedger
    from dptrain.inforce import PlanInForce
    from dptrain.mechanism import GaussianMechanism, release_event
    from dptrain.randomness import NOISE, SAMPLING, RandomKey
    from dptrain.sampling import PoissonSampler
    from dptrain.setup import prepare
    from dptrain.step import Release, TrainingStep

    setup = prepare(config, case.backend, data, native_model(case))
    release = in_force = None
    if setup.plan.private:
        privacy = config.privacy
        mechanism, relation = GaussianMechanism(1.0, privacy.allocation, privacy.noise_weights), privacy.relation
        moving = PlanInForce(config.strategy, setup.info, setup.plan, mechanism, relation, case.batch)
        in_force = moving if moving.moves else None
        stds = mechanism.stds(setup.plan, relation)
        event = release_event(setup.plan, stds, 1.0, relation, privacy.noise)
        release = Release(stds, event, RandomKey.make(NOISE), PrivacyLedger(None), noise=privacy.noise)
    sampler = PoissonSampler(case.batch, 1.0, RandomKey.make(SAMPLING))
    two_pass = config.performance.two_pass
    optimizer = setup.backend.build_optimizer(config.optimizer, setup.model)
    step = TrainingStep(
        setup.backend, setup.model, setup.loss, optimizer, setup.plan, sampler, setup.data.x_train, setup.data.y_train, case.batch,
        lambda t: 1e-3, 0, release, two_pass, in_force,
    )  # fmt: skip
    count = iter(range(10**9))

    def run() -> None:
        step(next(count))
        setup.backend.synchronize()

    return Built(run, setup.backend, setup)


def peer_step(case: Case, raw: Any, config: Any, data: Any, make: Callable[[Bench], Step]) -> Built:
    """A step of someone else's, on the same model and data."""
    from dptrain.setup import assemble

    parts = assemble(config, case.backend, data, native_model(case))
    tensor = parts.backend.tensor  # type: ignore[attr-defined]
    clip = getattr(raw.strategy, "max_grad_norm", 1.0)
    bench = Bench(parts.model, tensor(data.x_train), tensor(data.y_train), parts.loss, 1e-3, clip, 1.0, parts.backend)
    step = make(bench)

    def run() -> None:
        step()
        parts.backend.synchronize()

    return Built(run, parts.backend)


def timed(step: Step) -> float:
    """Seconds of one step."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def measure_time(case: Case) -> dict[str, Any]:
    """Interleaved pairs of the plain and the private step."""
    plain = build(case, NON_PRIVATE).step
    private, _, setup = build(case, case.strategy)
    for _ in range(case.settings.warmup):
        plain(), private()
    pairs = [(timed(plain), timed(private)) for _ in range(case.settings.pairs)]
    return summary(pairs, case.batch) | prediction(setup, case.batch)


def summary(pairs: Sequence[tuple[float, float]], batch: int) -> dict[str, Any]:
    """The figures of a time measurement.

    Args:
        pairs: seconds of a plain and of a private step, taken in turns.
        batch: examples per step.
    Returns:
        Medians, and the ratio with its quartiles.
    """
    ratios = [b / a for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "plain_seconds": statistics.median(a for a, _ in pairs),
        "seconds": statistics.median(b for _, b in pairs),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "examples_per_second": batch / statistics.median(b for _, b in pairs),
    }


def prediction(setup: Any, batch: int) -> dict[str, float]:
    """What ``dptrain/predict.py`` says of a step of ours that clips: figures to be compared with the measured ones."""
    from dptrain.predict import predicted

    if setup is None or not setup.plan.needs_norms:
        return {}
    found = predicted(setup, batch)
    return {
        "predicted_seconds": found.seconds,
        "predicted_ratio": found.ratio,
        "predicted_mib": found.bytes / MIB,
        "predicted_memory_ratio": found.memory_ratio,
    }


def measure_memory(case: Case, limit: int | None = None) -> dict[str, Any]:
    """Peak of the process during steps.

    Args:
        case: the case.
        limit: bytes above the process with the framework loaded and no model, beyond which the process ends itself.
    Returns:
        ``total_mib``: the peak, above the process with the framework loaded and no model; ``model_mib`` of it were there before the
        first step and ``peak_mib`` came with the steps. ``rest_mib``: the process before the first step; ``step_mib``: the peak above
        the warm process.
    """
    from dptrain.backend import get_backend
    from dptrain.comparison.memory import end_above, meter
    from dptrain.config import TrainConfig

    backend = get_backend(case.backend, TrainConfig.parse(case.config).performance)
    backend.synchronize()
    scale = meter(backend)
    empty = scale.now()
    if limit is not None:
        end_above(empty + limit, scale)
    step = build(case, case.strategy).step
    before = scale.now()
    # The first steps trace, compile and fill caches that stay; what they leave counts as the step's, what they needed meanwhile does not.
    for _ in range(2 if limit is None else 1):
        step()
    warm = scale.now()
    scale.reset()
    for _ in range(STEPS_FOR_MEMORY if limit is None else 1):
        step()
    peak = scale.peak()
    return {
        "meter": scale.source,
        "rest_mib": before / MIB,
        "model_mib": (before - empty) / MIB,
        "peak_mib": (peak - before) / MIB,
        "step_mib": (peak - warm) / MIB,
        "total_mib": (peak - empty) / MIB,
    }


def measure(case: Case) -> dict[str, Any]:
    """The figures of a case, or why there are none.

    Args:
        case: the case.
    Returns:
        Figures, or ``unsupported`` with the reason; ``missing`` if that may be another tomorrow.
    """
    try:
        if case.external and hasattr(elsewhere := load(case.strategy), "measure"):
            found = elsewhere.measure(case)
        elif case.measurement == "time":
            found = measure_time(case)
        else:
            found = measure_memory(case, int(case.settings.limit_gib * 2**30) if case.measurement == "largest" else None)
    except PeerMissingError as error:
        return {"unsupported": str(error), "missing": True}
    except DptrainError as error:
        return {"unsupported": str(error)}
    return {**found, "device": device()}


def device() -> str:
    """The machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    """Measure the case on standard input."""
    case = Case.from_json(sys.stdin.read())
    print(json.dumps(measure(case)), flush=True)
    os._exit(0)  # TensorFlow's threads may take seconds to end


if __name__ == "__main__":
    # Of this module, not of ``__main__``: adapters import it, and what they raise must be the class that is caught here.
    from dptrain.comparison import measure as module

    module.main()
