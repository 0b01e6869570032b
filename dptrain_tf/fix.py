"""Replace the layers of a Keras model that mix examples by layers that do not, and keep the weights that can be kept.

    BatchNormalization                 GroupNormalization over the same axis, with its gamma and beta
    BatchNormalization, frozen         Rescaling: the affine map that it computes from its moving statistics, exactly
    SpectralNormalization(layer)       the layer itself, with its weights

A frozen ``BatchNormalization`` (``trainable=False``) reads moving statistics alone, in training too, so it is one fixed map of each
example; ``Rescaling`` is that map and cannot be unfrozen by accident. The other layers that are refused are reported, and left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import keras
import numpy as np
from keras import layers as L

from dptrain.errors import UnsupportedModelError
from dptrain.validation import Change, FixReport, norm_groups
from dptrain_tf.rules import children, mixes_examples


def fix(model: Any, verbose: bool = True) -> Any:
    """Make a model trainable with differential privacy where a layer can be replaced.

    Args:
        model: a Keras model that is built. A Sequential or functional model is left as it was; a subclassed model is changed in place,
            because its code cannot be copied.
        verbose: print what was changed.
    Returns:
        The fixed model: a new one for Sequential and functional models, ``model`` itself otherwise or if there was nothing to replace.
    Raises:
        UnsupportedModelError: lists every layer that has to be replaced and cannot be.
    """
    found, report = fix_report(model)
    if verbose:
        print(report)
    return found


def fix_report(model: Any) -> tuple[Any, FixReport]:
    """As ``fix``, and what was changed.

    Args:
        model: a Keras model that is built.
    Returns:
        The fixed model, the report.
    Raises:
        UnsupportedModelError: as ``fix``.
    """
    wrong = [layer for layer in children(model) if is_target(layer)]
    left = tuple(
        f"layer {path_of(layer).removeprefix(path_of(model) + '/')!r}: {sentence}."
        for layer in children(model)
        if not is_target(layer) and layer is not model and (sentence := mixes_examples(layer))
    )
    if not wrong:
        return model, FixReport((), left, False)
    if not model.built:
        raise UnsupportedModelError([f"model {model.name!r} is not built; call it on a batch before fix."])
    problems = [f"layer {path_of(layer)!r}: {sentence}." for layer in wrong if (sentence := hopeless(layer))]
    if is_target(model):
        problems.append("the model itself is the layer to replace; put it into a keras.Sequential.")
    if problems:
        raise UnsupportedModelError(problems)
    changes: list[Change] = []
    graph = is_graph(model)
    found = cloned(model, changes) if graph else model
    if not graph:
        replace_below(model, changes, {})
    root = f"{path_of(model)}/"
    return found, FixReport(tuple(replace(change, layer=change.layer.removeprefix(root)) for change in changes), left, not graph)


def is_target(layer: Any) -> bool:
    """Whether ``fix`` replaces a layer."""
    return isinstance(layer, L.BatchNormalization | L.SpectralNormalization)


def is_graph(layer: Any) -> bool:
    """Whether a model is rebuilt from its list or graph of layers, and runs no code of its own."""
    kinds = (keras.Sequential, functional())
    own = getattr(layer, "_trainable_variables", None)
    return isinstance(layer, kinds) and any(type(layer).call is kind.call for kind in kinds) and not own


@cache
def functional() -> Any:
    """The class of functional models, which Keras does not export."""
    x = L.Input((1,))
    return next(c for c in type(keras.Model(x, x)).__mro__ if c.__name__ == "Functional")


def path_of(layer: Any) -> str:
    """How a layer is named in messages."""
    return str(layer.path or layer.name)


def hopeless(layer: Any) -> str | None:
    """Why a layer cannot be replaced, or None."""
    if isinstance(layer, L.BatchNormalization):
        if layer.trainable and flat(layer) and channels(layer) == 1:
            return "BatchNormalization of a single number per example has nothing left to normalise within one example; remove it"
        if not layer.trainable and rank(layer) is None and layer.axis != -1:
            return "frozen BatchNormalization over an axis other than the last; give it axis=-1"
    return None


def channels(layer: Any) -> int:
    """Numbers along the axis of a ``BatchNormalization``."""
    return int(layer.moving_mean.shape[0])


def rank(layer: Any) -> int | None:
    """Axes of its input, None where it is not known."""
    return getattr(layer.input_spec, "ndim", None)


def flat(layer: Any) -> bool:
    """Whether its inputs are vectors, so that a group of one channel would be a single number."""
    return rank(layer) == 2


def replacement(layer: Any, changes: list[Change]) -> tuple[Any, Callable[[], None]]:
    """The layer that replaces another one, and a function that gives it its weights when it is built."""
    if isinstance(layer, L.SpectralNormalization):
        inner = layer.layer
        changes.append(Change(path_of(layer), "SpectralNormalization", type(inner).__name__))
        return copied(inner)
    if not layer.trainable:
        new = rescaling(layer)
        changes.append(Change(path_of(layer), "frozen BatchNormalization", "Rescaling by its moving statistics"))
        return new, lambda: None
    groups = norm_groups(channels(layer), flat(layer))
    new = L.GroupNormalization(
        groups, layer.axis, layer.epsilon, layer.center, layer.scale, name=layer.name, dtype=layer.dtype_policy,
        beta_constraint=layer.beta_constraint, gamma_constraint=layer.gamma_constraint,
    )  # fmt: skip
    changes.append(Change(path_of(layer), type(layer).__name__, "GroupNormalization"))
    pairs = [("gamma", layer.scale), ("beta", layer.center)]

    def copy() -> None:
        for name, used in pairs:
            if used:
                getattr(new, name).assign(getattr(layer, name))

    return new, copy


def rescaling(layer: Any) -> Any:
    """The affine map of a frozen ``BatchNormalization``."""
    mean, variance = (v.numpy().astype(np.float64) for v in (layer.moving_mean, layer.moving_variance))
    scale = 1 / np.sqrt(variance + layer.epsilon)
    if layer.scale:
        scale = scale * layer.gamma.numpy()
    offset = -mean * scale + (layer.beta.numpy() if layer.center else 0.0)
    after = 0 if layer.axis == -1 else (rank(layer) or 0) - 1 - layer.axis % (rank(layer) or 1)
    shape = (-1, *[1] * after)
    return L.Rescaling(scale.reshape(shape), offset.reshape(shape), name=layer.name, dtype=layer.dtype_policy)


def copied(layer: Any) -> tuple[Any, Callable[[], None]]:
    """A copy of a layer from its configuration, and a function that gives it its weights when it is built.

    Raises:
        UnsupportedModelError: the layer does not say how to build it again.
    """
    try:
        new = type(layer).from_config(layer.get_config())
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        sentence = f"{type(layer).__name__} cannot be copied ({reason}); give it get_config, or replace its layers by hand"
        raise UnsupportedModelError([f"layer {path_of(layer)!r}: {sentence}."]) from error

    def copy() -> None:
        if len(new.variables) != len(layer.variables):
            raise UnsupportedModelError([f"layer {path_of(layer)!r}: its copy has other variables; replace its layers by hand."])
        for one, other in zip(new.variables, layer.variables, strict=True):
            one.assign(other)
        for one, other in zip(children(new), children(layer), strict=True):
            if one.trainable != other.trainable:
                one.trainable = other.trainable

    return new, copy


def cloned(model: Any, changes: list[Change]) -> Any:
    """A Sequential or functional model again, from new layers."""
    later: list[Callable[[], None]] = []

    def clone(layer: Any) -> Any:
        if is_target(layer):
            new, copy = replacement(layer, changes)
        else:
            new, copy = copied(layer)
        later.append(copy)
        if not is_target(layer) and any(is_target(child) for child in children(layer)):
            later.append(lambda: replace_below(new, changes, {}))
        return new

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, L.GroupNormalization | L.Rescaling):  # BatchNormalization takes these and they do not
            kwargs = {name: value for name, value in kwargs.items() if name not in ("mask", "training")}
        return layer(*args, **kwargs)

    chain = isinstance(model, keras.Sequential)
    new = keras.models.clone_model(model, clone_function=clone, call_function=None if chain else call, recursive=True)
    if not new.built:
        new.build(model.input_shape)
    for copy in later:
        copy()
    keep_frozen(model, new)
    return new


def keep_frozen(old: Any, new: Any) -> None:
    """Freeze in a clone what was frozen in the model: nested models as a whole have a flag of their own."""
    for one, other in zip(new.layers, old.layers, strict=True):
        if hasattr(other, "layers") and is_graph(other):
            keep_frozen(other, one)
    new._trainable = old._trainable


def replace_below(layer: Any, changes: list[Change], done: dict[int, Any]) -> None:
    """Replace, in place, the layers below a layer that runs code of its own: in attributes, lists and dictionaries.

    Args:
        layer: the layer.
        changes: filled with what was replaced.
        done: id of a layer that was met -> what stands in its place.
    Raises:
        UnsupportedModelError: a layer is held where it cannot be reached.
    """
    done[id(layer)] = layer
    for child in list(layer._flatten_layers(include_self=False, recursive=False)):
        wrong = is_target(child) or (is_graph(child) and any(is_target(one) for one in children(child)))
        if id(child) not in done:
            if wrong:
                done[id(child)] = built(child, changes) if is_target(child) else cloned(child, changes)
            else:
                replace_below(child, changes, done)
        if wrong and (isinstance(layer, keras.Sequential | functional()) or not put(layer, child, done[id(child)])):
            # A graph keeps its layers in its nodes, where nothing can be put in their place.
            where = f"{path_of(child)!r} in {type(layer).__name__}"
            raise UnsupportedModelError([f"layer {where} is in no attribute, list or dictionary; replace it by hand."])


def built(layer: Any, changes: list[Change]) -> Any:
    """The replacement of a layer, built like it and with its weights."""
    new, copy = replacement(layer, changes)
    if isinstance(layer, L.SpectralNormalization):
        shape = layer.get_build_config()["input_shape"]
    else:
        shape = [None] * (rank(layer) or 4)
        shape[layer.axis] = channels(layer)
    if not new.built:
        new.build(tuple(shape))
    copy()
    return new


def put(layer: Any, old: Any, new: Any) -> bool:
    """Put a layer in the place of another one, wherever a layer holds it."""
    tracker, found = layer._tracker, False
    locked = tracker.locked
    tracker.unlock()
    try:
        for name, value in list(vars(layer).items()):
            if name == "_layers":
                continue
            if value is old:
                setattr(layer, name, new)
                found = True
            elif isinstance(value, list | dict):
                found |= put_inside(value, old, new)
            elif isinstance(value, tuple) and any(one is old for one in value):
                setattr(layer, name, tuple(new if one is old else one for one in value))
                found = True
        if found:
            where = [i for i, one in enumerate(layer._layers) if one is old]
            tracker.untrack(old)
            if not any(one is new for one in layer._layers):
                tracker.track(new)
            if where and layer._layers[-1] is new:  # in the place of the old one, so that the order of variables stays
                layer._layers.insert(where[0], layer._layers.pop())
    finally:
        if locked:
            tracker.lock(msg=tracker._lock_violation_msg)
    return found


def put_inside(box: Any, old: Any, new: Any) -> bool:
    """The same in a list or dictionary, and in those that it holds."""
    found = False
    for key, value in list(box.items() if isinstance(box, dict) else enumerate(box)):
        if value is old:
            box[key] = new
            found = True
        elif isinstance(value, list | dict):
            found |= put_inside(value, old, new)
    return found
