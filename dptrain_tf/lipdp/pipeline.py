"""LipDP's data pipeline by its names, and what ``fit`` makes of the data it is given.

``fit`` draws Poisson samples, so it needs every training example at hand: a data set is read into arrays once. The data sets made here
remember the arrays they were made of, so shuffling, dropped remainders and augmentation in them are for display only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import tensorflow as tf

from dptrain.data import load
from dptrain.errors import ConfigError, DataError

Bound = tuple[Callable[[Any, Any], tuple[Any, Any]], float]
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
NAMES = {"mnist": "mnist_5k"}  # LipDP's name -> ours; others are the same
READ = 2000  # examples mapped at once


@dataclass
class DatasetMetadata:
    """Public facts of a data set, from which sampling is accounted.

    Args:
        input_shape: of one example.
        nb_classes: number of classes.
        nb_samples_train, nb_samples_test: examples.
        class_names: their names.
        nb_steps_per_epochs: steps in an epoch.
        batch_size: expected size of a Poisson batch; each example is drawn with probability ``batch_size / nb_samples_train``.
        max_norm: bound of an example's L2 norm.
    """

    input_shape: tuple[int, ...]
    nb_classes: int
    nb_samples_train: int
    nb_samples_test: int
    class_names: list[str]
    nb_steps_per_epochs: int | float
    batch_size: int
    max_norm: float

    @property
    def sample_rate(self) -> float:
        """Probability q with which an example enters a step."""
        return self.batch_size / self.nb_samples_train

    @property
    def steps(self) -> int:
        """Steps in an epoch, a whole number."""
        return max(1, math.floor(self.nb_steps_per_epochs))


# --- bounds and colours ---------------------------------------------------------------------------------------------------


def bound_clip_value(value: float) -> Bound:
    """Scale an example whose L2 norm exceeds a value down to it.

    Args:
        value: largest norm.
    Returns:
        Function of one example and its target, and the value.
    """
    return lambda x, y: (tf.clip_by_norm(x, value), y), value


def bound_normalize() -> Bound:
    """Divide an example by its L2 norm.

    Returns:
        Function of one example and its target, and 1.
    """
    return lambda x, y: (tf.math.l2_normalize(x), y), 1.0


def standardize_CIFAR(image: Any) -> Any:  # noqa: N802
    """An image in [0, 1] standardised with the published constants of CIFAR-10."""
    return (image - tf.constant(CIFAR10_MEAN, tf.float32)) / tf.constant(CIFAR10_STD, tf.float32)


COLORSPACES: dict[str, Callable[[Any], Any]] = {
    "RGB": tf.identity,
    "RGB_STANDARDIZED": standardize_CIFAR,
    "HSV": tf.image.rgb_to_hsv,
    "YIQ": tf.image.rgb_to_yiq,
    "YUV": tf.image.rgb_to_yuv,
    "GRAYSCALE": tf.image.rgb_to_grayscale,
}


def get_colorspace_function(colorspace: str | None) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Change of colours, as a function of an image and its target.

    Raises:
        ConfigError: unknown name.
    """
    name = "RGB" if colorspace is None else colorspace.upper()
    if name not in COLORSPACES:
        raise ConfigError(f"There is no colorspace {colorspace!r}; choose one of {', '.join(COLORSPACES)}.")
    return lambda x, y: (COLORSPACES[name](x), y)


# --- augmentation ---------------------------------------------------------------------------------------------------------


@dataclass
class AugmultConfig:
    """Augmentation multiplicity: K random copies of an example, which remain ONE example.

    Its loss is the mean over its copies, so its gradient is within the bound of a single copy. Crops, flips and colours depend on nothing
    but the example and public randomness.

    Args:
        augmult: K; 0 stands for no augmentation, 1 for ordinary augmentation.
        random_crop, random_flip, random_color: what is drawn.
        pad: mirrored pixels on each edge before a crop.
    """

    augmult: int
    random_crop: bool
    random_flip: bool
    random_color: bool
    pad: int | None = 4

    def __post_init__(self) -> None:
        if self.augmult < 0:
            raise ConfigError(f"augmult must not be negative, and is {self.augmult}.")

    def apply(self, image: Any, label: Any, *, crop_size: Sequence[int] | None = None) -> tuple[Any, Any]:
        """The copies of one image.

        Args:
            image: ``[H, W, C]``.
            label: its target.
            crop_size: of a crop; by default the image's.
        Returns:
            Images ``[K, H, W, C]`` and targets ``[K, ...]``; with K = 0, the image itself, once.
        """
        size = tuple(image.shape if crop_size is None else crop_size)
        copies = [self.copy(image, size) for _ in range(self.augmult)] or [image]
        return tf.stack(copies), tf.stack([label] * len(copies))

    def copy(self, image: Any, size: tuple[int, ...]) -> Any:
        """One random copy."""
        if self.random_crop:
            if self.pad:
                image = tf.pad(image, [(self.pad, self.pad), (self.pad, self.pad), (0, 0)], "SYMMETRIC")
            image = tf.image.random_crop(image, size)
        if self.random_flip:
            image = tf.image.random_flip_left_right(image)
        if self.random_color:
            image = tf.image.random_saturation(tf.image.random_hue(image, 0.1), 0.6, 1.6)
            image = tf.image.random_contrast(tf.image.random_brightness(image, 0.15), 0.7, 1.3)
        return image


def default_augmult_config(multiplicity: int) -> AugmultConfig:
    """Crops and flips.

    Args:
        multiplicity: K.
    """
    return AugmultConfig(multiplicity, random_crop=True, random_flip=True, random_color=False)


class Copies:
    """Training inputs that become ``[n, K, ...]`` fresh copies when they are looked up.

    Args:
        x: raw images ``[N, H, W, C]``.
        config: how they are augmented.
        finish: what follows for each copy.
    """

    def __init__(self, x: np.ndarray, config: AugmultConfig, finish: Callable[[Any], Any]) -> None:
        self.x, self.multiplicity = x, max(1, config.augmult)

        @tf.function(autograph=False, reduce_retracing=True)
        def copies(images: Any) -> Any:
            def one(image: Any) -> Any:
                found, _ = config.apply(image, 0)
                return tf.stack([finish(copy) for copy in tf.unstack(found)])

            return tf.map_fn(one, images)

        self.copies = copies

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, where: Any) -> np.ndarray:
        return self.copies(tf.constant(self.x[where])).numpy()  # type: ignore[no-any-return]


# --- data sets that remember ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source:
    """What a data set was made of.

    Args:
        x: inputs ``[N, ...]``, or copies of them.
        y: targets.
    """

    x: np.ndarray | Copies
    y: np.ndarray


_sources: WeakKeyDictionary[Any, Source] = WeakKeyDictionary()


def mapped(x: np.ndarray, y: np.ndarray, *functions: Callable[[Any, Any], tuple[Any, Any]]) -> np.ndarray:
    """Inputs after functions of one example and its target."""
    data = tf.data.Dataset.from_tensor_slices((x, y))
    for function in functions:
        data = data.map(function)
    parts = [part.numpy() for part, _ in data.batch(READ)]
    return np.concatenate(parts) if parts else x


def datasets(train: Source, test: Source, batch_size: int, drop_remainder: bool) -> tuple[Any, Any, int]:
    """Data sets as LipDP makes them, and the steps in an epoch."""
    count = len(train.y)
    if not 0 < batch_size <= count:
        raise ConfigError(f"batch_size must lie between 1 and the {count} training examples, and is {batch_size}.")
    if isinstance(train.x, Copies):
        copies, k = train.x, train.x.multiplicity
        shown = tf.data.Dataset.from_tensor_slices((copies.x, train.y)).shuffle(count).batch(batch_size, drop_remainder=drop_remainder)

        def unfold(x: Any, y: Any) -> Any:
            many = copies.copies(x)
            return tf.reshape(many, tf.concat([[-1], tf.shape(many)[2:]], 0)), tf.repeat(y, k, axis=0)

        shown = shown.map(unfold)
    else:
        shown = tf.data.Dataset.from_tensor_slices((train.x, train.y)).shuffle(count).batch(batch_size, drop_remainder=drop_remainder)
    ds_train = shown.prefetch(tf.data.AUTOTUNE)
    _sources[ds_train] = train
    ds_test = tf.data.Dataset.from_tensor_slices((test.x, test.y)).batch(batch_size).prefetch(tf.data.AUTOTUNE)
    return ds_train, ds_test, count // batch_size if drop_remainder else math.ceil(count / batch_size)


def load_and_prepare_images_data(
    dataset_name: str = "mnist",
    batch_size: int = 256,
    colorspace: str | None = "RGB",
    bound_fct: Bound | None = None,
    drop_remainder: bool = True,
    multiplicity: int = 0,
    *,
    augmult_config: AugmultConfig | None = None,
    path: str | Path | None = None,
    download: bool = False,
    limit: int | None = None,
) -> tuple[Any, Any, DatasetMetadata]:
    """An image data set of ``dptrain.data``, in [0, 1], with one-hot targets.

    Args:
        dataset_name: ``mnist`` (the ``mnist_5k`` that needs no download), ``fashion_mnist``, ``cifar10``, or another of ``dptrain.data``.
        batch_size: expected size of a Poisson batch.
        colorspace: a key of ``COLORSPACES``; images of one channel stay as they are.
        bound_fct: ``bound_normalize()``, ``bound_clip_value(v)``, or a function of one example and its target with the bound it keeps;
            None takes the largest norm that an image can have.
        drop_remainder: only counts the steps of an epoch: Poisson batches have no remainder, and every example takes part.
        multiplicity: K of ``default_augmult_config``.
        augmult_config: another augmentation.
        path, download, limit: as in ``dptrain.data.load``.
    Returns:
        Training set, test set, metadata.
    Raises:
        DataError: no such data set, or no images.
    """
    data = load(NAMES.get(dataset_name, dataset_name), path=path, download=download, limit=limit)
    if data.num_classes is None or len(data.input_shape) != 3:
        raise DataError(f"Data {dataset_name!r} are no images with classes; use prepare_tabular_data.")
    classes, gray = data.num_classes, data.input_shape[-1] == 1
    if gray and str(colorspace or "RGB").upper() not in ("RGB", "GRAYSCALE"):
        raise ConfigError(f"Data {dataset_name!r} have one channel and no {colorspace}; set colorspace='grayscale'.")
    color = get_colorspace_function(None if gray else colorspace)
    standardised = not gray and str(colorspace).upper() == "RGB_STANDARDIZED"
    bound, max_norm = bound_fct or (lambda x, y: (x, y), largest_norm(data.input_shape, standardised))
    mean, std = (np.asarray(data.public_constants[key], np.float32) for key in ("mean", "std"))
    x, x_test = (np.clip(part * std + mean, 0, 1).astype(np.float32) for part in (data.x_train, data.x_test))
    y, y_test = (np.eye(classes, dtype=np.float32)[part] for part in (data.y_train, data.y_test))
    config = augmult_config or (default_augmult_config(multiplicity) if multiplicity else None)
    if config is not None and config.augmult:
        train = Source(Copies(x, config, lambda image: bound(*color(image, 0))[0]), y)
    else:
        train = Source(mapped(x, y, color, bound), y)
    test = Source(mapped(x_test, y_test, color, bound), y_test)
    ds_train, ds_test, steps = datasets(train, test, batch_size, drop_remainder)
    shape = tuple(test.x.shape[1:]) if isinstance(test.x, np.ndarray) else data.input_shape
    names = [str(i) for i in range(classes)]
    return ds_train, ds_test, DatasetMetadata(shape, classes, len(y), len(y_test), names, steps, batch_size, float(max_norm))


load_and_prepare_data = load_and_prepare_images_data  # its name in LipDP's notebooks


def largest_norm(shape: tuple[int, ...], standardised: bool) -> float:
    """The largest L2 norm of an image with values in [-1, 1], or after ``standardize_CIFAR``."""
    if not standardised:
        return math.sqrt(math.prod(shape))
    worst = [max(m, 1 - m) / s for m, s in zip(CIFAR10_MEAN, CIFAR10_STD, strict=True)]
    return math.sqrt(math.prod(shape[:2]) * math.fsum(w * w for w in worst))


def prepare_tabular_data(
    x_train: Any,
    x_test: Any,
    y_train: Any,
    y_test: Any,
    batch_size: int,
    bound_fct: Bound | None = None,
    drop_remainder: bool = True,
    nb_classes: int | None = None,
) -> tuple[Any, Any, DatasetMetadata]:
    """Arrays as data sets.

    Args:
        x_train, x_test: inputs ``[N, F]``; note the order of the four.
        y_train, y_test: labels ``[N]`` or one-hot ``[N, C]``.
        batch_size: expected size of a Poisson batch.
        bound_fct: ``bound_normalize()`` or ``bound_clip_value(v)``, v chosen without looking at the data.
        drop_remainder: only counts the steps of an epoch.
        nb_classes: for the metadata; counted in the labels by default.
    Returns:
        Training set, test set, metadata.
    Raises:
        ConfigError: no bound, which no table of numbers has by itself.
    """
    if bound_fct is None:
        raise ConfigError("prepare_tabular_data needs a bound_fct, since numbers in a table have no largest norm; use bound_clip_value.")
    bound, max_norm = bound_fct
    x, xt, y, yt = (np.asarray(part, np.float32) for part in (x_train, x_test, y_train, y_test))
    classes = nb_classes or (y.shape[1] if y.ndim == 2 and y.shape[1] > 1 else len(np.unique(y)))
    ds_train, ds_test, steps = datasets(Source(mapped(x, y, bound), y), Source(mapped(xt, yt, bound), yt), batch_size, drop_remainder)
    names = [str(i) for i in range(classes)]
    return ds_train, ds_test, DatasetMetadata(tuple(x.shape[1:]), classes, len(x), len(xt), names, steps, batch_size, float(max_norm))


def load_adbench_data(
    dataset_name: str,
    dataset_dir: str | Path,
    standardize: bool = True,
    redownload: bool = False,
    mean: float | None = None,
    std: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A table of ADBench from your copy.

    Args:
        dataset_name: name of the file, without its ending.
        dataset_dir: folder that holds ``datasets/Classical``.
        standardize: subtract ``mean`` and divide by ``std``.
        redownload: False.
        mean, std: public constants; those of the data themselves would be private facts.
    Returns:
        Inputs and labels.
    Raises:
        ConfigError: constants are missing, or a download was asked for.
        DataError: there is no such file.
    """
    if redownload:
        raise ConfigError("load_adbench_data downloads nothing; fetch the ADBench folder adbench/datasets yourself.")
    if standardize and (mean is None or std is None):
        raise ConfigError("load_adbench_data would use statistics of private data; give public mean= and std=, or standardize=False.")
    file = Path(dataset_dir) / "datasets" / "Classical" / f"{dataset_name}.npz"
    if not file.is_file():
        raise DataError(f"There is no file {file}; give the folder of your copy of ADBench.")
    with np.load(file, allow_pickle=False) as arrays:
        x, y = arrays["X"], arrays["y"]
    return ((x - mean) / std if standardize else x), y


def default_delta_value(dataset_metadata: DatasetMetadata) -> float:
    """The largest power of ten below 1 / N; LipDP's was 1 / N itself where N is a power of ten.

    Args:
        dataset_metadata: says N, which counts as public.
    """
    digits = math.floor(math.log10(dataset_metadata.nb_samples_train)) + 1
    return float(f"1e-{digits}")


# --- what fit reads -------------------------------------------------------------------------------------------------------


def materialise(x: Any, y: Any, metadata: DatasetMetadata) -> Source:
    """All training examples, once.

    Args:
        x: a batched ``tf.data.Dataset`` of inputs and targets, or inputs as an array.
        y: targets, if ``x`` is an array.
        metadata: says how many examples there are.
    Returns:
        Arrays.
    Raises:
        DataError: the data are infinite, random, of another size than the metadata, or of no kind that is known.
    """
    if isinstance(x, tf.data.Dataset):
        if y is not None:
            raise DataError("fit was given a data set and y; the targets belong into the data set.")
        source = _sources.get(x) or read(x, metadata)
    elif y is not None and all(isinstance(part, np.ndarray | tf.Tensor) for part in (x, y)):
        source = Source(np.asarray(x), np.asarray(y))
    else:
        raise DataError("fit takes NumPy arrays x and y, or a batched tf.data.Dataset of finite size; a generator cannot be sampled from.")
    agree(len(source.x), len(source.y), metadata)
    return source


def agree(num_x: int, num_y: int, metadata: DatasetMetadata) -> None:
    """Refuse data of another size than the metadata says, since the sample rate would be wrong."""
    if num_x != num_y or num_x != metadata.nb_samples_train:
        raise DataError(
            f"The training data hold {num_x} examples and {num_y} targets, and dataset_metadata.nb_samples_train is "
            f"{metadata.nb_samples_train}; make them equal, and set drop_remainder=False, since Poisson batches have no remainder."
        )


def examples(data: Any, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of a data set, one more than needed to exceed a number of examples."""
    count = 0
    for batch in data:
        if not isinstance(batch, tuple) or len(batch) != 2:
            raise DataError("The data set must hold pairs of inputs and targets; weights would change the gradients' scale unnoticed.")
        x, y = (np.asarray(part) for part in batch)
        count += len(x)
        yield x, y
        if count > limit:
            return


def read(data: Any, metadata: DatasetMetadata) -> Source:
    """A data set as arrays."""
    if data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise DataError("The training data set is infinite, so no sample rate exists; remove repeat(), and set epochs or steps_per_epoch.")
    ranks = [spec.shape.rank for spec in tf.nest.flatten(data.element_spec)[:1]]
    if ranks == [len(metadata.input_shape)]:
        raise DataError("The training data set is not batched; call batch() on it.")
    parts = list(examples(data, metadata.nb_samples_train))
    if not parts:
        raise DataError("The training data set is empty.")
    x, y = (np.concatenate([part[i] for part in parts]) for i in range(2))
    agree(len(x), len(y), metadata)
    if fingerprint(parts) != fingerprint(examples(data, metadata.nb_samples_train)):
        raise DataError(
            "The training data set differs from one pass to the next: it is augmented at random, and reading it once would freeze one "
            "draw; give the plain images with multiplicity= or augmult_config=, which augment anew at every step."
        )
    return Source(x, y)


def fingerprint(parts: Any) -> int:
    """A number that does not depend on the order of the examples."""
    return sum(hash(row.tobytes() + label.tobytes()) for x, y in parts for row, label in zip(x, y, strict=True))


__all__ = [
    "AugmultConfig", "DatasetMetadata", "bound_clip_value", "bound_normalize", "default_augmult_config", "default_delta_value",
    "get_colorspace_function", "load_adbench_data", "load_and_prepare_data", "load_and_prepare_images_data", "prepare_tabular_data",
    "standardize_CIFAR",
]  # fmt: skip
