"""The operations of a model's forward pass, for proofs about the whole model; and its weights by the names that proofs use.

``torch.fx`` traces the forward pass. An operation counts only if it is in one of the tables of ``graph_rows.py``.
Everything else becomes a sentence in ``Graph.problems``. The trace is trusted only where a second look confirms it: it must be
the same with dropout on and off, its shapes must follow the batch at two batch sizes, and it must compute what the model computes.
Nothing stays on the user's objects.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from dptrain.info import Graph, Node
from dptrain_torch import layers as ours
from dptrain_torch.graph_rows import (
    ADD,
    ARITHMETIC,
    DIVIDE,
    FUNCTION_REMEDIES,
    FUNCTIONS,
    MULTIPLY,
    SUBTRACT,
    Fact,
    Shape,
    Unproven,
    remedy,
    require,
    row_for,
)  # fmt: skip
from dptrain_torch.rules import mixes_examples

BATCHES = (2, 3)  # a constant that happens to equal one of them does not equal the other


def tampered(module: nn.Module) -> str | None:
    """A sentence if a module may compute something other than its class says."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if is_parametrized(module):
        return "its weight is computed from other parameters, which the bound does not cover; remove the parametrization"
    if any(getattr(module, name, None) for name in hooks):
        return "it has hooks, which may change what it computes; remove them"
    if any(p is not None and p._backward_hooks for p in module._parameters.values()):
        return "a parameter of it has a gradient hook; remove it"
    if type(module).__call__ is not nn.Module.__call__ or any(callable(getattr(type(module), name, None)) for name in vars(module)):
        return "a method of it was replaced on the object; put it into a class"
    if any(hasattr(type(module), role) for role in module._parameters):
        return "a parameter of it is hidden by an attribute of its class; rename that"
    return None


# --- the trace ------------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """Calls a model with one input, so that the model's other arguments keep their defaults, and the root can be a layer too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """Call it."""
        return self.model(x)


class Tracer(fx.Tracer):
    """Keeps layers whole; follows everything that is composed of other modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node."""
        if isinstance(m, nn.Sequential):
            return False
        builtin = type(m).__module__.startswith("torch.") or isinstance(m, ours.SelfAttention | ours.PositionEmbedding)
        return builtin or row_for(m) is not None or (any(p is not None for p in m._parameters.values()) and not m._modules)


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode for a while."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = training
        yield
    finally:
        for module, value in before.items():
            module.training = value


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def trace(model: nn.Module) -> tuple[Holder, fx.Graph]:
    """The graph of the forward pass, and the module that it refers to.

    Raises:
        Unproven: there is no single one.
    """
    traces = []
    try:
        for training in (True, False):
            with mode(model, training):
                holder = Holder(model)
                traces.append((holder, Tracer().trace(holder)))
    except Exception as error:
        raise Unproven(
            f"its forward cannot be followed ({first_line(error)}); write it without branches or loops on the values of tensors, or as "
            "nn.Sequential"
        ) from None
    texts = [[(n.op, n.target, str(n.args), str(n.kwargs)) for n in graph.nodes] for _, graph in traces]
    require(texts[0] == texts[1], "its forward does something else in training than in evaluation; use nn.Dropout for dropout")
    return traces[0]


class Sized(tuple[int, ...]):
    """Shape of a tensor, told apart from shapes that the model itself reads."""


class Values(fx.Interpreter):
    """Runs a trace and keeps the shape of every tensor, and every other value as it is."""

    def __init__(self, holder: Holder, graph: fx.Graph) -> None:
        super().__init__(holder, graph=graph)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation."""
        value = super().run_node(n)
        self.found[n] = Sized(value.shape) if isinstance(value, Tensor) else value
        return value


def measured(holder: Holder, graph: fx.Graph, x: Tensor) -> tuple[list[dict[fx.Node, Any]], str | None]:
    """Shapes of all operations at each of ``BATCHES``, and a sentence if the trace differs from the model or examples are mixed.

    Raises:
        Unproven: the model does not run.
    """
    random = torch.Generator().manual_seed(0)
    probe = x[torch.arange(max(BATCHES)) % len(x)]
    if x.is_floating_point():
        probe = torch.randn(probe.shape, generator=random, dtype=torch.float64).to(x)
    runs, outputs = [], []
    try:
        with mode(holder, False), torch.no_grad():
            for batch in BATCHES:
                values = Values(holder, graph)
                outputs.append(values.run(probe[:batch].clone()))
                runs.append(values.found)
            truth = holder(probe.clone())
    except Exception as error:
        raise Unproven(f"its forward fails on inputs of shape {tuple(x.shape[1:])} ({first_line(error)})") from None
    if not agree(truth, outputs[1]):
        return runs, "its forward is not what it seems to be (a trace of it computes something else); write it as nn.Sequential"
    if not agree(truth[: BATCHES[0]], outputs[0]):
        return runs, "the output of one example depends on the others; find the operation that mixes them"
    return runs, None


def agree(a: Any, b: Any) -> bool:
    """Whether two outputs are one tensor up to rounding."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
        return False
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 5e-2)
    a, b = a.double(), b.double()
    scale = max(1.0, float(a.nan_to_num(0, 0, 0).abs().max())) if a.numel() else 1.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def module_of(model: nn.Module, n: fx.Node) -> tuple[str, nn.Module | None]:
    """Path and module that a node calls; ``model`` for the root, empty for an operation that is no layer."""
    if n.op != "call_module":
        return "", None
    path = str(n.target).removeprefix("model.")
    return path, model if n.target == "model" else model.get_submodule(path)


class Reader:
    """Turns a trace into nodes.

    Args:
        model: the user's model.
        runs: shapes at each of ``BATCHES``.
    """

    def __init__(self, model: nn.Module, runs: list[dict[fx.Node, Any]]) -> None:
        self.model, self.runs = model, runs
        self.identifiers = {id(p): name for name, p in model.named_parameters()}
        self.paths = {name for name, _ in model.named_modules()}
        self.nodes: dict[fx.Node, Node] = {}
        self.taken: set[str] = set()
        self.problems: list[str] = []

    def read(self, graph: fx.Graph) -> Graph:
        """All operations that the output depends on; those it does not depend on are looked at too, since they may work in place."""
        output = next(n for n in graph.nodes if n.op == "output")
        needed = {output}
        for n in reversed(graph.nodes):
            if n in needed:
                needed.update(n.all_input_nodes)
        for n in graph.nodes:
            if n is not output and not self.static(n):
                self.nodes[n] = self.node(n)
        if output.args[0] not in self.nodes:
            self.problems.append("layer 'model': its output must be one tensor that depends on its input.")
        return Graph(tuple(node for n, node in self.nodes.items() if n in needed), tuple(dict.fromkeys(self.problems)))

    def static(self, n: fx.Node) -> bool:
        """Whether an operation gives numbers that come from shapes alone."""
        if isinstance(self.runs[0][n], Sized):
            return False
        if n.target is getattr:
            return n.args[1] in ("shape", "ndim", "dtype", "device")
        reads = n.target in ("size", "dim", "numel", "ndimension")
        return reads or (n.target in ARITHMETIC and not any(m in self.nodes for m in n.all_input_nodes))

    def node(self, n: fx.Node) -> Node:
        """One node; a problem is noted, and stands in the graph with the kind ``unproven``."""
        path, module = module_of(self.model, n)
        base = path or self.place(n)
        name, count = base, 1
        while name in self.taken or (module is None and name in self.paths):
            count += 1
            name = f"{base}#{count}"
        self.taken.add(name)
        shown = f"layer {name!r} ({type(module).__name__})" if module is not None else f"operation {name!r}"
        own = {role: p for role, p in (module._parameters if module is not None else {}).items() if p is not None}
        params = {role: self.identifiers[id(p)] for role, p in own.items()}
        frozen = tuple(role for role, p in own.items() if not p.requires_grad)
        found: Fact = ("unproven", {})
        try:
            found = self.layer(n, module) if module is not None else self.function(n)
            self.check_batch(n)
        except Unproven as problem:
            if str(problem):
                self.problems.append(f"{shown}{problem}.")
        inputs = tuple(self.nodes[m].name for m in self.arguments(n))
        return Node(name, found[0], inputs, self.size(n), found[1], params, frozen)

    def place(self, n: fx.Node) -> str:
        """A readable name for an operation that is no layer: the module it is in, and what it is."""
        if n.op == "placeholder":
            return "input"
        stack = list(n.meta.get("nn_module_stack", {}))
        where = stack[-1].split("@")[0].removeprefix("model").removeprefix(".") if stack else ""
        what = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
        what = {"mix": "add", "iadd": "add"}.get(what, what).split(".")[-1]
        return f"{where}.{what}" if where else what

    def arguments(self, n: fx.Node) -> list[fx.Node]:
        """The tensors that feed an operation, one per use."""
        found: list[fx.Node] = []
        fx.node.map_arg((n.args, n.kwargs), lambda m: found.append(m))
        return [m for m in found if m in self.nodes]

    def shape(self, n: fx.Node, run: int = 0) -> Shape:
        """Shape with the batch."""
        value = self.runs[run].get(n)
        return tuple(value) if isinstance(value, Sized) else ()

    def size(self, n: fx.Node) -> int:
        """Numbers per example."""
        return math.prod(self.shape(n)[1:])

    def check_batch(self, n: fx.Node) -> None:
        """The first axis holds the examples, whatever their number."""
        shapes = [self.shape(n, run) for run in range(len(BATCHES))]
        kept = all(s[:1] == (batch,) for s, batch in zip(shapes, BATCHES, strict=True)) and shapes[0][1:] == shapes[1][1:]
        require(kept, f": its output has shapes {shapes[0]} and {shapes[1]} for 2 and 3 examples; keep the examples on the first axis")

    def layer(self, n: fx.Node, module: nn.Module) -> Fact:
        """A layer of the table."""
        row, inputs = row_for(module), self.arguments(n)
        require(row is not None, f" has no proven bound; {remedy(module)}")
        assert row is not None
        require(len(inputs) == 1, ": it must be called with one tensor")
        if getattr(module, "inplace", False):
            self.check_overwrite(inputs[0])
        try:
            return row(module, self.shape(inputs[0])[1:], self.shape(n)[1:])
        except Unproven as problem:
            raise Unproven(f" has no proven bound as it is; {problem}") from None

    def check_overwrite(self, source: fx.Node) -> None:
        """An operation in place is the same as one that is not if nothing else reads what it overwrites."""
        fresh = ("linear", "conv", "bias", "add", "scale", "avg_pool", "max_pool", "group_sort")
        alone = len(source.users) == 1 and self.nodes[source].kind in fresh
        require(alone, ": it works in place on an array that others may read; set inplace=False")

    def function(self, n: fx.Node) -> Fact:
        """An operation that is no layer."""
        target = n.target
        if n.op == "placeholder":
            return "input", {}
        if n.op == "get_attr":
            path = str(target).removeprefix("model.")
            raise Unproven(f" uses the tensor {path!r} of the model outside a layer; call a layer of dptrain_torch.layers in its place")
        inputs, shapes = self.arguments(n), [self.shape(m) for m in self.arguments(n)]
        if target is ours.mix:
            require(shapes == [self.shape(n)] * 2, ": it adds arrays of different shapes, which repeats numbers; give both the same shape")
            half = n.args[2] == "convex"
            return "add", {"coefficients": (0.5, 0.5) if half else (1.0, 1.0)}
        if target in ADD | SUBTRACT:
            require("alpha" not in n.kwargs and "out" not in n.kwargs, ": remove its keyword arguments")
            require(len(inputs) == 2, ": it adds a constant; use BoundedBias, or remove it")
            require(shapes == [self.shape(n)] * 2, ": it adds arrays of different shapes, which repeats numbers; give both the same shape")
            if target is operator.iadd:
                self.check_overwrite(inputs[0])
            return "add", {"coefficients": (1.0, 1.0 if target in ADD else -1.0)}
        if target in MULTIPLY | DIVIDE:
            return "scale", {"factor": self.factor(n)}
        if target in (torch.cat, torch.concat, torch.concatenate):
            return "concat", {}
        if target in FUNCTIONS:
            require(len(inputs) == 1, ": it must be called with one tensor")
            if n.kwargs.get("inplace") or (target is F.relu and len(n.args) > 1 and n.args[1]):
                self.check_overwrite(inputs[0])
            require("out" not in n.kwargs and "dtype" not in n.kwargs, ": remove its keyword arguments")
            return FUNCTIONS[target], {}
        what = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        require(target is not operator.getitem or not shapes or shapes[0] != (), "")  # an item of what was refused already
        raise Unproven(f" ({what}) has no proven bound; {FUNCTION_REMEDIES.get(what, 'call a layer of dptrain_torch.layers in its place')}")

    def factor(self, n: fx.Node) -> float:
        """The constant of a product or quotient with one tensor."""
        require(not n.kwargs and len(n.args) == 2, ": remove its keyword arguments")
        known = [[run[a] if isinstance(a, fx.Node) and a not in self.nodes else a for run in self.runs] for a in n.args]
        numbers = [v[0] for v in known if v[0] == v[1] and isinstance(v[0], int | float) and not isinstance(v[0], bool)]
        tensors = [a for a in n.args if isinstance(a, fx.Node) and a in self.nodes]
        fits = len(numbers) == len(tensors) == 1 and math.isfinite(float(numbers[0]))
        require(fits, f": it must be a tensor times a constant; {FUNCTION_REMEDIES['matmul']}")
        if n.target in MULTIPLY:
            return float(numbers[0])
        require(n.args[0] is tensors[0] and numbers[0] != 0, ": only division by a constant other than 0 has a bound")
        return 1.0 / float(numbers[0])


def graph(model: nn.Module, x: Any) -> Graph:
    """The operations of a model.

    Args:
        model: any module with one input; left as it was.
        x: a batch of at least one example; only its shape matters.
    Returns:
        The graph. Whatever has no bound is in its ``problems``; such a graph proves nothing.
    """
    if not isinstance(x, Tensor):
        return Graph((), ("layer 'model': it must have one tensor as its input.",))
    problems = []
    for path, module in model.named_modules():
        shown = f"layer {path or 'model'!r} ({type(module).__name__})"
        sentence = mixes_examples(module)
        if sentence and hasattr(module, "has_uninitialized_params"):
            return Graph((), (f"{shown}: {sentence}.",))
        if sentence := tampered(module):
            problems.append(f"{shown}: {sentence}.")
    if _has_any_global_hook():
        problems.append("layer 'model': hooks are registered for all modules, which may change what they compute; remove them.")
    problems += [
        f"parameter {name!r} has dtype {p.dtype}, whose rounding no bound covers; use float32."
        for name, p in model.named_parameters()
        if p.dtype not in (torch.float32, torch.float64)
    ]
    if problems:
        return Graph((), tuple(problems))
    shown = f"layer 'model' ({type(model).__name__})"
    try:
        holder, traced = trace(model)
    except Unproven as problem:
        return Graph((), (f"{shown}: {problem}.",))
    try:
        runs, doubt = measured(holder, traced, x)
    except Unproven as problem:
        return Graph((), (f"{shown}: {problem}.", *unknown_layers(model, traced)))
    found = Reader(model, runs).read(traced)
    return replace(found, problems=(f"{shown}: {doubt}.",)) if doubt and not found.problems else found


def unknown_layers(model: nn.Module, traced: fx.Graph) -> list[str]:
    """A sentence for each layer without a row, where shapes are not known."""
    called = [module_of(model, n) for n in traced.nodes]
    return [
        f"layer {path!r} ({type(module).__name__}) has no proven bound; {remedy(module)}."
        for path, module in called
        if module is not None and row_for(module) is None
    ]


# --- weights --------------------------------------------------------------------------------------------------------------


def identifiers(graph: Graph) -> list[str]:
    """Every parameter of a graph, once."""
    return list(dict.fromkeys(name for node in graph.nodes for name in node.params.values()))


def weights(model: nn.Module, graph: Graph) -> dict[str, np.ndarray]:
    """The parameters of a graph; torch's layouts are the exchange format.

    Args:
        model: the model that the graph was made from.
        graph: its graph.
    Returns:
        Identifier -> copy.
    """
    known = dict(model.named_parameters())
    wide = {name: known[name].detach().cpu() for name in identifiers(graph)}
    return {n: (p.float() if p.dtype in (torch.float16, torch.bfloat16) else p).numpy().copy() for n, p in wide.items()}


def assign(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Overwrite parameters in place.

    Args:
        model: the model.
        arrays: identifier -> value in the exchange layout.
    """
    known = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in arrays.items():
            known[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
