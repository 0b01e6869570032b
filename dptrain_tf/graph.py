"""The operations of a Keras model as a ``Graph`` for the proofs of ``dptrain/bounds.py``, and the exchange of the weights it names.

Known are Sequential and functional models, nested ones, the blocks of ``lipschitz.py``, and layers with a row in ``graph_rows.py``. The
walk runs each operation on two examples, eagerly: that gives the shapes, leaves nothing on the user's objects, and shows whether the
operations that were walked compute what the model computes. Whatever has no row is a problem with a remedy, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers as L
from keras.src.models.functional import Functional
from keras.src.ops import numpy as np_ops
from tensorflow import Tensor

from dptrain.errors import UnsupportedModelError
from dptrain.info import Graph, Node
from dptrain_tf import layers as ours
from dptrain_tf.graph_rows import DIVISIONS, MERGES, SIMPLE, SUMS, Attrs, refusal, row_for
from dptrain_tf.hooks import dotted, find_units, trainable, unused
from dptrain_tf.lipschitz import join
from dptrain_tf.models import Transform, layout
from dptrain_tf.rules import children, mixes_examples

UNKNOWN = "unknown"  # no rule has this kind, so a graph with a problem cannot be mistaken for a proof


@dataclass(frozen=True)
class Value:
    """The output of a node, and its value on two examples."""

    node: str
    tensor: Tensor


@dataclass(frozen=True)
class Parameter:
    """A variable of a layer with a row.

    Args:
        variable: the variable.
        forth, back: its transforms to and from the exchange layout, which is torch's.
    """

    variable: Any
    forth: Transform
    back: Transform


# --- parameters -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Names of a model's layers and parameters.

    Args:
        layers: layer id -> dotted path, unique.
        identifiers: variable id -> identifier: ``layer.role`` of its first owner.
        parameters: identifier -> variable and layout.
        problems: what keeps the model from being trained at all.
    """

    layers: dict[int, str]
    identifiers: dict[int, str]
    parameters: dict[str, Parameter]
    problems: tuple[str, ...]


def roles(layer: Any) -> dict[str, Any]:
    """Role -> variable of a layer with a row."""
    row = row_for(layer)
    found = {role: getattr(layer, attribute, None) for role, attribute in row.params.items()} if row else {}
    return {role: variable for role, variable in found.items() if variable is not None}


def names_of(model: Any) -> Names:
    """Names of layers and parameters, those of ``hooks.find_units`` where it has any."""
    layers: dict[int, str] = {}
    identifiers: dict[int, str] = {}
    problems: tuple[str, ...] = ()
    try:
        units = find_units(model)
    except UnsupportedModelError as error:
        units, problems = [], error.problems
    for unit in units:
        layers[id(unit.layer)] = unit.name
        for role, variable in unit.variables.items():
            identifiers.setdefault(id(variable), unit.identifiers[role])
    taken = set(layers.values())
    used = set(identifiers.values())
    parameters: dict[str, Parameter] = {}
    for layer in children(model):
        if id(layer) not in layers:
            shown = unused("model" if layer is model else dotted(layer.path or layer.name, model), taken)
            layers[id(layer)] = shown
            taken.add(shown)
        for role, variable in roles(layer).items():
            if id(variable) not in identifiers:  # frozen
                identifiers[id(variable)] = unused(f"{layers[id(layer)]}.{role}", used)
                used.add(identifiers[id(variable)])
            _, forth, back = layout(layer, variable.name)
            parameters.setdefault(identifiers[id(variable)], Parameter(variable, forth, back))
    return Names(layers, identifiers, parameters, problems)


def weights(model: Any, graph: Graph) -> dict[str, np.ndarray]:
    """The parameters that a graph names.

    Args:
        model: the model.
        graph: its graph.
    Returns:
        Identifier -> float array in the exchange layout, torch's: ``[p, D]`` and ``[p, D, *kernel]``.
    """
    wanted = {identifier for node in graph.nodes for identifier in node.params.values()}
    found = {}
    for identifier, parameter in names_of(model).parameters.items():
        if identifier in wanted:
            value = parameter.variable.value.numpy()
            value = value if value.dtype in (np.float32, np.float64) else value.astype(np.float32)
            found[identifier] = np.ascontiguousarray(parameter.forth(value))
    return found


def assign(model: Any, values: Mapping[str, np.ndarray]) -> None:
    """Write parameters.

    Args:
        model: the model.
        values: identifier -> array in the exchange layout.
    """
    parameters = names_of(model).parameters
    for identifier, value in values.items():
        parameters[identifier].variable.assign(parameters[identifier].back(np.asarray(value)))


# --- the walk -------------------------------------------------------------------------------------------------------------


class Walk:
    """Runs a model's operations one by one and records a node for each.

    Args:
        model: a built model.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.names = model, names_of(model)
        self.nodes: list[Node] = []
        self.problems: list[str] = []
        self.frozen = {id(variable) for layer in children(model) for variable in roles(layer).values()} - {
            id(variable) for variable in trainable(model).values()
        }
        self.taken: set[str] = set()
        self.reserved = set(self.names.layers.values())

    def name(self, layer: Any) -> str:
        """Name of a new node: the layer's path, numbered from its second call on."""
        base = self.names.layers.get(id(layer)) or unused(layer.name, self.reserved)
        name = base if base not in self.taken else unused(base, self.taken | self.reserved)
        self.taken.add(name)
        return name

    def refuse(self, layer: Any, sentence: str) -> None:
        """Record a problem."""
        name = self.names.layers.get(id(layer), layer.name)
        self.problems.append(f"layer {name!r} ({type(layer).__name__}) {sentence}.")

    def add(self, layer: Any, kind: str, inputs: Iterable[Value], tensor: Tensor, attrs: Attrs | None = None) -> Value:
        """Record a node."""
        variables = roles(layer) if isinstance(layer, L.Layer) else {}
        params = {role: self.names.identifiers[id(variable)] for role, variable in variables.items()}
        frozen = tuple(role for role, variable in variables.items() if id(variable) in self.frozen)
        size = math.prod(tensor.shape[1:])
        node = Node(self.name(layer), kind, tuple(value.node for value in inputs), size, attrs or {}, params, frozen)
        self.nodes.append(node)
        return Value(node.name, tensor)

    def layer(self, layer: Any, inputs: list[Value], call: Callable[[], Any]) -> Value:
        """One call of a layer or of a model.

        Args:
            layer: the layer.
            inputs: what feeds it.
            call: runs it as a whole.
        """
        one = inputs[0] if len(inputs) == 1 else None
        if one is not None and calls_as(layer, keras.Sequential):
            return self.chain(layer.layers, one)
        if one is not None and calls_as(layer, Functional):
            return self.functional(layer, one)
        if one is not None and type(layer) is ours.Residual:
            return self.join(layer, self.chain(layer.body, one), one)
        if one is not None and type(layer) is ours.MixerBlock:
            return self.mixer(layer, one)
        tensor = call()
        if sentence := mixes_examples(layer):
            self.refuse(layer, f"cannot be bounded: {sentence}" if row_for(layer) else refusal(layer))
            return self.add(layer, UNKNOWN, inputs, tensor)
        if isinstance(layer, L.Layer) and layer.compute_dtype not in ("float32", "float64"):
            self.refuse(layer, f"computes in {layer.compute_dtype}, whose rounding no bound covers; use float32")
        if type(layer) in MERGES:
            return self.merge(layer, inputs, tensor)
        row = row_for(layer)
        sentence = refusal(layer) if row is None or one is None else row.problem(layer)
        if sentence is None and row is not None:
            rest = {id(v) for v in layer._trainable_variables} - {id(v) for v in roles(layer).values()}
            sentence = "has variables beside those of its class; use the class itself" if rest else None
        if sentence is not None or row is None or one is None:
            self.refuse(layer, sentence or "has several inputs; give it one")
            return self.add(layer, UNKNOWN, inputs, tensor)
        attrs = row.attrs(layer, one.tensor, tensor)
        return self.add(layer, attrs.pop("kind", row.kind), inputs, tensor, attrs)

    def chain(self, layers: Iterable[Any], x: Value) -> Value:
        """Layers one after the other."""
        for layer in layers:
            if not isinstance(layer, L.InputLayer):
                x = self.layer(layer, [x], partial(layer, x.tensor))
        return x

    def join(self, layer: Any, body: Value, x: Value) -> Value:
        """The end of a residual connection."""
        half = 0.5 if layer.mode == "convex" else 1.0
        return self.add(layer, "add", [body, x], join(x.tensor, body.tensor, layer.mode), {"coefficients": (half, half)})

    def mixer(self, block: Any, x: Value) -> Value:
        """The inside of a ``MixerBlock``."""
        path = self.names.layers[id(block)]
        turn, sort = (
            made(name=f"{path}.{name}", dtype=block.dtype_policy)
            for made, name in ((partial(L.Permute, (2, 1)), "turn"), (ours.GroupSort, "sort"))
        )
        x = self.join(block, self.chain([turn, block.token1, sort, block.token2, turn], x), x)
        return self.join(block, self.chain([block.channel1, sort, block.channel2], x), x)

    def functional(self, model: Any, x: Value) -> Value:
        """A functional model, its branches one after the other."""
        inputs, outputs = keras.tree.flatten(model.inputs), keras.tree.flatten(model.outputs)
        if len(inputs) != 1 or len(outputs) != 1:
            self.refuse(model, f"has {len(inputs)} inputs and {len(outputs)} outputs; bounds are for models with one of each")
            return self.add(model, UNKNOWN, [x], x.tensor)
        values = {id(inputs[0]): x}
        for node in ordered(outputs[0], set(values)):
            operation = node.operation
            given = [values[id(tensor)] for tensor in node.input_tensors]
            if not given:
                self.refuse(operation, "does not depend on the input; remove it")
                return self.add(operation, UNKNOWN, [x], x.tensor)
            args, kwargs = filled(node, values)
            call = partial(operation, *args, **kwargs)
            value = self.layer(operation, given, call) if isinstance(operation, L.Layer) else self.operation(operation, given, args, call)
            values.update({id(tensor): value for tensor in node.outputs})
        return values[id(outputs[0])]

    def merge(self, layer: Any, inputs: list[Value], tensor: Tensor) -> Value:
        """Layers with several inputs."""
        if isinstance(layer, L.Concatenate):
            if layer.axis % tensor.shape.rank == 0:
                self.refuse(layer, "joins examples along axis 0; choose another axis")
            return self.add(layer, "concat", inputs, tensor)
        return self.sum(layer, MERGES[type(layer)](len(inputs)), inputs, tensor)

    def sum(self, layer: Any, coefficients: tuple[float, ...], inputs: list[Value], tensor: Tensor) -> Value:
        """A weighted sum of arrays of one shape."""
        if any(value.tensor.shape != tensor.shape for value in inputs):
            self.refuse(layer, "adds arrays of different shapes; make them equal")
        return self.add(layer, "add", inputs, tensor, {"coefficients": coefficients})

    def operation(self, operation: Any, inputs: list[Value], args: tuple[Any, ...], call: Callable[[], Any]) -> Value:
        """A function on symbolic tensors, such as ``x + y``."""
        tensor, kind = call(), type(operation)
        if len(inputs) == 2 and kind in SUMS:
            return self.sum(operation, SUMS[kind], inputs, tensor)
        if len(inputs) == 1 and kind in SIMPLE:
            return self.add(operation, SIMPLE[kind], inputs, tensor)
        if len(inputs) == 1 and kind is np_ops.Negative:
            return self.add(operation, "scale", inputs, tensor, {"factor": -1.0})
        numbers = [arg for arg in args if isinstance(arg, int | float | np.number) and not isinstance(arg, bool)]
        divides = kind in DIVISIONS and len(args) == 2 and args[1] is not inputs[0].tensor
        if len(inputs) == 1 and len(args) == 2 and len(numbers) == 1 and (kind is np_ops.Multiply or divides):
            number = float(numbers[0])
            factor = number if kind is np_ops.Multiply else 1 / number if number else math.inf
            if math.isfinite(factor):
                return self.add(operation, "scale", inputs, tensor, {"factor": factor})
        self.refuse(operation, "has no proven bound; of functions only x + y, x - y, and x times or divided by a number have one")
        return self.add(operation, UNKNOWN, inputs, tensor)

    def graph(self, x: Tensor) -> Graph:
        """The graph of the model on two examples."""
        name = unused("input", self.reserved)
        self.taken.add(name)
        self.nodes.append(Node(name, "input", (), math.prod(x.shape[1:])))
        try:
            whole = run(self.model, x)
            value = self.layer(self.model, [Value(name, x)], lambda: whole)
        except Exception as error:  # whatever a user's layer raises: such a model has no proof
            return Graph(tuple(self.nodes), (*self.problems, unusable(error)))
        if not self.problems:
            self.problems += self.names.problems
        if not self.problems and not equal(value.tensor, whole):
            self.problems.append("the operations of the model do not compute its output; write it as a Sequential or functional model.")
        if not self.problems and value.tensor.shape[0] != x.shape[0]:
            self.problems.append("the first axis of the model's output does not hold the examples; keep it.")
        if self.nodes[-1].name != value.node:  # an output that is handed on to other operations too
            self.nodes.append(
                Node(unused("output", self.taken | self.reserved), "identity", (value.node,), math.prod(value.tensor.shape[1:]))
            )
        return Graph(tuple(self.nodes), tuple(dict.fromkeys(self.problems)))


def calls_as(model: Any, cls: Any) -> bool:
    """Whether a model of a class computes what that class does; it may override its training."""
    same = isinstance(model, cls) and type(model).call is cls.call and type(model).__call__ is cls.__call__
    return same and "call" not in model.__dict__


def ordered(output: Any, known: set[int]) -> list[Any]:
    """The nodes of a functional graph down to the known tensors, inputs first, one branch after the other.

    Args:
        output: symbolic tensor.
        known: ids of the tensors to stop at.
    """
    order: list[Any] = []
    seen: set[int] = set()
    stack = [(output, False)]
    while stack:
        tensor, done = stack.pop()
        if id(tensor) in known:
            continue
        operation, index, _ = tensor._keras_history
        node = operation._inbound_nodes[index]
        if done and id(node) not in seen:
            seen.add(id(node))
            order.append(node)
        elif id(node) not in seen:
            stack.append((tensor, True))
            stack += [(parent, False) for parent in reversed(node.input_tensors)]
    return order


def filled(node: Any, values: Mapping[int, Value]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a recorded call with tensors in the place of symbols."""
    return keras.tree.map_structure(
        lambda a: values[id(a)].tensor if isinstance(a, keras.KerasTensor) else a, (node.arguments.args, node.arguments.kwargs)
    )


def run(model: Any, x: Tensor) -> Any:
    """The model's output for evaluation."""
    return model(x, training=False)


def unusable(error: Exception) -> str:
    """The problem of a model that raises."""
    reason = str(error).strip().split("\n")[0].rstrip(".")
    return f"the model could not be run operation by operation ({reason})."


def equal(one: Any, two: Any) -> bool:
    """Whether two outputs agree up to rounding."""
    if not (tf.is_tensor(one) and tf.is_tensor(two)) or one.shape != two.shape:
        return False
    a, b = np.asarray(one.numpy(), np.float64), np.asarray(two.numpy(), np.float64)
    return bool(np.abs(a - b).max(initial=0.0) <= 1e-4 * np.abs(b).max(initial=0.0) + 1e-12)


def sample(x: Tensor) -> Tensor:
    """Two examples of the shape of a batch, random where they are floats, so that equal outputs mean equal functions."""
    x = tf.repeat(x[:1], 2, axis=0)
    return tf.constant(np.random.default_rng(0).standard_normal(x.shape), x.dtype) if x.dtype.is_floating else x


def graph(model: Any, x: Any) -> Graph:
    """The operations of a model.

    Args:
        model: a Sequential or functional model; built by a call if it is not built yet, otherwise left as it was.
        x: a batch of inputs; only shapes and types matter.
    Returns:
        The graph, with one sentence in ``problems`` for every operation that has no bound.
    """
    if len(tf.nest.flatten(x)) != 1 or not hasattr(x, "shape"):
        return Graph((Node("input", "input", (), 0),), ("the model has several inputs; bounds are for models with one input array.",))
    example = sample(tf.convert_to_tensor(x))
    if not all(layer.built for layer in children(model)):
        try:
            run(model, example)
        except Exception as error:  # as in ``Walk.graph``
            return Graph((Node("input", "input", (), math.prod(example.shape[1:])),), (unusable(error),))
    return Walk(model).graph(example)
