# ruff: noqa: N801 -- the names of LipDP
"""LipDP's models: Keras models whose ``fit`` is Keras' own loop, with one private training step per Keras batch.

``make_train_function`` gives Keras a function that runs ONE ``dptrain.step.TrainingStep``: one logical Poisson batch, recorded in the
ledger before its noisy sum is released, then projected and certified. What Keras iterates over is a data set of empty tickets, one per
step; callbacks, ``History``, validation, epochs and the progress bar are Keras'. Epsilon is computed from the ledger alone, so a second
``fit``, other ``steps_per_epoch`` or a stopped epoch are counted as they happened (pitfalls.md L13).
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from keras.src.models.functional import Functional

from accounting import PrivacyLedger, SampledGaussian
from dptrain.errors import ConfigError, DataError
from dptrain_tf.fitting.steps import tickets, train_function
from dptrain_tf.lipdp.dynamic import AdaptiveQuantileClipping, QuantileSettings
from dptrain_tf.lipdp.layers import DP_MergeResidual, DP_SplitResidual, DP_WrappedResidual, collapse
from dptrain_tf.lipdp.losses import DP_Loss
from dptrain_tf.lipdp.pipeline import DatasetMetadata
from dptrain_tf.lipdp.session import ACCOUNTANT, RELATION, DPParameters, Session
from dptrain_tf.own import registered

logger = logging.getLogger(__name__)


class _Private:
    """Private training; first of two base classes, the second one a Keras model."""

    _session: Session

    def _privatise(
        self,
        dp_parameters: DPParameters | Mapping[str, Any],
        dataset_metadata: DatasetMetadata | Mapping[str, Any],
        debug: bool,
        ledger: PrivacyLedger | str | Path | None,
        physical_batch_size: int | None,
        spent: Sequence[Any],
    ) -> None:
        parameters = DPParameters(**dp_parameters) if isinstance(dp_parameters, Mapping) else dp_parameters
        metadata = DatasetMetadata(**dataset_metadata) if isinstance(dataset_metadata, Mapping) else dataset_metadata
        self._session = Session(self, parameters, metadata, ledger, physical_batch_size)
        for event, count in spent:
            self._session.ledger.record(SampledGaussian.from_dict(event), count)
        self.debug = debug

    # --- what a user may ask ---
    @property
    def dp_parameters(self) -> DPParameters:
        """How much noise."""
        return self._session.parameters

    @property
    def dataset_metadata(self) -> DatasetMetadata:
        """Public facts of the data."""
        return self._session.metadata

    @property
    def ledger(self) -> PrivacyLedger:
        """Every release that was made from data."""
        return self._session.ledger

    def plan(self) -> Any:
        """The plan for the weights as they are: ``print`` it."""
        return self._session.facts().plan

    def epsilon(self) -> float:
        """Epsilon of the ledger at ``dp_parameters.delta``."""
        return self._session.epsilon()

    def statement(self) -> str:
        """What may be promised of the weights."""
        return (
            f"epsilon = {self.epsilon():.6g} at delta = {self.dp_parameters.delta:g} for one example, neighbouring relation "
            f"{RELATION.value}, Poisson sampling, accountant {ACCOUNTANT}, {self.ledger.num_releases} releases."
        )

    def layers_forward_order(self) -> list[Any]:
        """The layers from input to output."""
        return list(self.layers)  # type: ignore[attr-defined]

    def layers_backward_order(self) -> list[Any]:
        """The layers from output to input."""
        return self.layers_forward_order()[::-1]

    def signal_to_noise_average(self, data: Any) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """Norm of a batch's mean gradient per group, beside the bound of one example's. NOT private.

        Args:
            data: inputs and targets.
        Returns:
            Ratios, norms, bounds.
        """
        norms, bounds = self._session.mean_norms(*data), self._session.bounds()
        return {name: norm / bounds[name] for name, norm in norms.items()}, norms, bounds

    def signal_to_noise_elementwise(self, data: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
        """Norm of each example's gradient per group, beside its bound. NOT private.

        Args:
            data: inputs and targets.
        Returns:
            Ratios ``[B]``, norms ``[B]``, bounds.
        """
        norms, bounds = self._session.norms(*data), self._session.bounds()
        return {name: norm / bounds[name] for name, norm in norms.items()}, norms, bounds

    def adopt_clipping(self, settings: QuantileSettings) -> None:
        """Take the settings of ``AdaptiveQuantileClipping``; they hold from the next ``fit``."""
        self._session.quantile = settings

    # --- Keras ---
    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, loss_weights: Any = None, metrics: Any = None, **kwargs: Any) -> None:
        """As in Keras.

        Args:
            optimizer: any Keras optimizer without a schedule of its own.
            loss: an object of ``dptrain_tf.lipdp.losses``.
            loss_weights: refused.
            metrics: computed on validation data and by ``evaluate``; on training data only with ``debug``.
            kwargs: further arguments of Keras.
        Raises:
            ConfigError: the loss has no known constant, or an argument would change its scale.
        """
        if not isinstance(loss, DP_Loss):
            name = loss if isinstance(loss, str) else type(loss).__name__
            raise ConfigError(f"The loss {name!r} has no known Lipschitz constant; use one of dptrain_tf.lipdp.losses.")
        if loss_weights is not None:
            raise ConfigError("loss_weights would change the scale of gradients but not of their bound; change the learning rate.")
        if kwargs.get("jit_compile") is True:
            raise ConfigError("jit_compile=True cannot hold a private step, whose noise is drawn on the host; remove it.")
        # XLA, which Keras chooses by itself on a GPU, could not run the exact metrics of ``utils``.
        kwargs = {"auto_scale_loss": False} | kwargs | {"jit_compile": False}
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)  # type: ignore[misc]
        session = self._session
        session.loss, session.eager = loss, bool(kwargs.get("run_eagerly", False))
        session.compiled()
        outputs = math.prod(self.output_shape[1:])  # type: ignore[attr-defined]
        if loss.kind in ("kr", "hkr"):
            try:
                loss.config.class_priors(outputs)
            except ValueError as error:
                raise ConfigError(f"{error}.") from None
        loss.num_outputs = outputs

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile a model that was loaded."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:  # type: ignore[attr-defined]
            self.optimizer.build(self.trainable_variables)  # type: ignore[attr-defined]

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Any = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Keras' ``fit``, with private steps.

        The training data are read into arrays once. Each step then draws every example independently with probability
        ``q = batch_size / nb_samples_train``, since that is what is accounted: batches have no fixed size and no order, and an epoch is a
        number of steps. The loss that is logged is NOT private, nor is anything computed from it.

        Args:
            x: NumPy arrays, or a batched ``tf.data.Dataset`` of finite size, without augmentation at random.
            y: targets, if ``x`` is an array.
            batch_size: that of ``dataset_metadata``, or None.
            epochs, verbose, callbacks, validation_data, initial_epoch: as in Keras.
            validation_split, class_weight, sample_weight: refused.
            shuffle: without effect.
            steps_per_epoch: steps in an epoch; by default ``nb_steps_per_epochs`` of ``dataset_metadata``.
            kwargs: further arguments of Keras about validation.
        Returns:
            Keras' ``History``.
        Raises:
            ConfigError, DataError, UnsupportedModelError: before anything is spent.
        Guarantee: every release from data is in ``ledger`` before it is made; the epsilon of the ledger holds for the weights at any time.
            A second call continues the ledger.
        Source: ``dptrain/step.py``.
        """
        metadata = self.dataset_metadata
        if class_weight is not None or sample_weight is not None:
            raise ConfigError("class_weight and sample_weight would scale an example's gradient beyond its bound; remove them.")
        if validation_split:
            raise DataError("validation_split would change the number of training examples; split the arrays and give validation_data.")
        if batch_size is not None and batch_size != metadata.batch_size:
            raise ConfigError(f"batch_size {batch_size} is not the {metadata.batch_size} of dataset_metadata; make them equal.")
        if tf.distribute.has_strategy() or self._distribute_strategy is not None:  # type: ignore[attr-defined]
            raise ConfigError("fit draws one sample on one process; leave the tf.distribute strategy.")
        for callback in callbacks if isinstance(callbacks, list | tuple) else []:
            if isinstance(callback, AdaptiveQuantileClipping):
                self.adopt_clipping(callback.settings)
        self._session.start(x, y)
        # Keras asks its metrics for results after the epoch, and "accuracy" is chosen by the form of the first targets it sees.
        self.compute_metrics(None, *self._session.metrics_probe())  # type: ignore[attr-defined]
        per_epoch = metadata.steps if steps_per_epoch is None else steps_per_epoch
        return super().fit(  # type: ignore[misc]
            tickets(per_epoch), epochs=epochs, verbose=verbose, callbacks=callbacks, validation_data=validation_data, shuffle=False,
            initial_epoch=initial_epoch, **kwargs,
        )  # fmt: skip

    def make_train_function(self, force: bool = False) -> None:
        """What Keras calls once per step, or per ``steps_per_execution`` steps."""
        self.train_function = train_function(self, self._session, lambda: self.debug)

    def train_step(self, data: Any) -> Any:
        """Refused: Keras' own step has no noise."""
        raise ConfigError("train_step would train on a batch of your choice; only fit draws the samples that are accounted for.")

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a batch of the caller's choice is not a Poisson sample."""
        return self.train_step(None)

    def _config(self) -> dict[str, Any]:
        """What saving adds to Keras' own configuration; the ledger goes with the weights (pitfalls.md L13)."""
        return {
            "dp_parameters": asdict(self.dp_parameters),
            "dataset_metadata": asdict(self.dataset_metadata),
            "debug": self.debug,
            "physical_batch_size": self._session.physical,
            "spent": [[event.to_dict(), count] for event, count in self.ledger.events],
        }


_ARGS = """

    Args:
        {what}
        dp_parameters: how much noise.
        dataset_metadata: public facts of the training data.
        debug: also compute the compiled metrics on each drawn batch, by a second forward pass; they are NOT private.
        name: of the model.
        ledger: a ``PrivacyLedger``, or the path of one, which is continued if it exists; None keeps it in memory and in saved models.
        physical_batch_size: examples processed at once; None chooses. No number but memory and speed depends on it.
    """


@registered
class DP_Sequential(_Private, keras.Sequential):
    __doc__ = "Layers with a proven bound, one after the other." + _ARGS.format(
        what="layers: the layers, from ``dptrain_tf.lipdp.layers`` or ``dptrain_tf``."
    )

    def __init__(
        self,
        layers: Sequence[Any] | None = None,
        name: str | None = None,
        *,
        dp_parameters: DPParameters,
        dataset_metadata: DatasetMetadata,
        debug: bool = False,
        trainable: bool = True,
        k_coef_lip: float = 1.0,
        ledger: PrivacyLedger | str | Path | None = None,
        physical_batch_size: int | None = None,
        spent: Sequence[Any] = (),
    ) -> None:
        if k_coef_lip != 1.0:
            raise ConfigError("DP_Sequential has k_coef_lip=1 only; set it in a layer.")
        super().__init__(collapse(layers or []), trainable=trainable, name=name)
        self._privatise(dp_parameters, dataset_metadata, debug, ledger, physical_batch_size, spent)
        if layers and not self.built:
            self.build((None, *self.dataset_metadata.input_shape))

    def add(self, layer: Any, rebuild: bool = True) -> None:
        """Append a layer."""
        if isinstance(layer, DP_SplitResidual | DP_WrappedResidual | DP_MergeResidual):
            raise ConfigError("add() takes layers one at a time, and a residual connection is several; use make_residuals.")
        super().add(layer, rebuild=rebuild)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor, and the ledger."""
        return {**super().get_config(), **self._config()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> DP_Sequential:
        """From ``get_config``."""
        layers = [keras.saving.deserialize_keras_object(layer, custom_objects) for layer in config["layers"]]
        dropped = ("layers", "build_input_shape", "dtype")
        return cls(layers, **{key: value for key, value in config.items() if key not in dropped})


@registered
class DP_Model(_Private, Functional):
    __doc__ = "A model with one input and one output: a list of layers, or a functional graph, with branches." + _ARGS.format(
        what="dp_layers: the layers, one after the other; or\n        inputs, outputs: as in ``keras.Model``."
    )

    def __init__(
        self,
        dp_layers: Any = None,
        inputs: Any = None,
        outputs: Any = None,
        *,
        dp_parameters: DPParameters,
        dataset_metadata: DatasetMetadata,
        debug: bool = False,
        name: str | None = None,
        trainable: bool = True,
        ledger: PrivacyLedger | str | Path | None = None,
        physical_batch_size: int | None = None,
        spent: Sequence[Any] = (),
    ) -> None:
        if isinstance(dp_layers, keras.KerasTensor):  # positional inputs and outputs
            dp_layers, inputs, outputs = None, dp_layers, inputs if outputs is None else outputs
        if (dp_layers is None) == (inputs is None or outputs is None):
            raise ConfigError("DP_Model takes a list of layers, or inputs and outputs; give one of the two.")
        if dp_layers is not None:
            shape = dataset_metadata["input_shape"] if isinstance(dataset_metadata, Mapping) else dataset_metadata.input_shape
            inputs = outputs = keras.Input(shape=tuple(shape))
            for layer in collapse(dp_layers):
                outputs = outputs if isinstance(layer, keras.layers.InputLayer) else layer(outputs)
        super().__init__(inputs, outputs, name=name, trainable=trainable)
        self._privatise(dp_parameters, dataset_metadata, debug, ledger, physical_batch_size, spent)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor, and the ledger."""
        plain = keras.Model(self.inputs, self.outputs, name=self.name, trainable=self.trainable)
        return {"graph": plain.get_config(), **self._config()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> DP_Model:
        """From ``get_config``."""
        config = dict(config)
        plain = Functional.from_config(config.pop("graph"), custom_objects)
        return cls(inputs=plain.inputs, outputs=plain.outputs, name=plain.name, trainable=plain.trainable, **config)


# --- accounting -----------------------------------------------------------------------------------------------------------


def get_eps_delta(model: Any, epochs: int) -> tuple[float, float]:
    """Epsilon and delta after more epochs of ``fit``.

    Args:
        model: a compiled model.
        epochs: further epochs, of ``dataset_metadata.nb_steps_per_epochs`` steps; 0 gives what is spent.
    Returns:
        Epsilon of the ledger and these epochs together, and delta.
    """
    session: Session = model._session
    more = ((session.facts().event, epochs * session.metadata.steps),) if epochs else ()
    return session.epsilon(more), session.parameters.delta


def compute_gradient_bounds(model: Any) -> dict[str, float]:
    """Bound of one example's gradient per group; LipDP's were divided by the nominal batch size.

    Args:
        model: a compiled model.
    Returns:
        Group -> bound, for the weights as they are.
    """
    found: dict[str, float] = model._session.bounds()
    return found


def log_function(log_fn: Any) -> Callable[[Mapping[str, Any]], None]:
    """A function that logs a dictionary.

    Args:
        log_fn: "logging"; "wandb" or "wandb.log"; "all" for logging, and wandb where it is installed; or the function itself.
    Raises:
        ConfigError: none of these, or wandb is not installed.
    """
    if callable(log_fn):
        return log_fn  # type: ignore[no-any-return]
    if log_fn not in ("all", "logging", "wandb", "wandb.log"):
        raise ConfigError(f"log_fn must be 'all', 'logging', 'wandb.log' or a function, not {log_fn!r}.")
    wandb: Any = importlib.import_module("wandb") if importlib.util.find_spec("wandb") else None
    if wandb is None and log_fn.startswith("wandb"):
        raise ConfigError("wandb is not installed; install it, or choose log_fn='logging'.")

    def log(values: Mapping[str, Any]) -> None:
        if log_fn in ("all", "logging"):
            logger.info("%s", dict(values))
        if log_fn != "logging" and wandb is not None:
            wandb.log(dict(values))

    return log


class DP_Accountant(keras.callbacks.Callback):
    """Epsilon after each epoch, from the ledger; it becomes ``logs["epsilon"]``, and with it part of ``History``.

    Args:
        log_fn: as in ``log_function``.
        verbose: print the statement too.
    """

    def __init__(self, log_fn: Any = "all", verbose: bool = True) -> None:
        super().__init__()
        self.log_fn, self.verbose = log_function(log_fn), verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Compute, print and log."""
        model: Any = self.model
        epsilon = model.epsilon()
        if logs is not None:
            logs["epsilon"] = epsilon
        if self.verbose:
            print(f"\nepoch {epoch + 1}: {model.statement()}")
        session: Session = model._session
        clip = session.in_force.plan.loss_clip if session.in_force else None
        facts = {"relation": RELATION.value, "sampling": "poisson", "accountant": ACCOUNTANT, "releases": model.ledger.num_releases}
        values = {"epsilon": epsilon, "delta": model.dp_parameters.delta, "epoch": epoch + 1, "clipping_value": clip}
        self.log_fn({**values, **facts})


__all__ = ["DPParameters", "DP_Accountant", "DP_Model", "DP_Sequential", "compute_gradient_bounds", "get_eps_delta"]
