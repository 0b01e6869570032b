"""Parameters that no layer call shows: class tokens, position embeddings, layer scales, bias tables, weights used by a function.

While the forward pass of a tap runs, a torch function mode follows every tensor that is computed from parameters and constants alone.
Where such a tensor meets one that depends on the examples, it is expanded to one copy per example first, which changes no value; the
cotangent of the copies is the per-sample gradient of that tensor, and the chain rule carries it to the parameters. Products with a
weight matrix, convolutions and lookups are recorded as the layers of the same name are, so that their weights have fast uses.

What cannot be followed is named in ``failed``; the module around it is then tapped as a whole, by the slow method.
"""

from __future__ import annotations

import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dptrain_torch.rules import channel_uses, trailing_uses
from dptrain_torch.uses import ConvUse, DirectUse, EmbeddingUse, LinearUse, Use, split_rows, wide

# Functions that broadcast their tensors against each other.
ARITHMETIC = ("add", "sub", "mul", "div", "truediv", "pow")
OTHERS = ("subtract", "multiply", "divide", "true_divide", "where", "lerp", "addcmul", "addcdiv", "maximum", "minimum", "expand_as")
BROADCASTING = frozenset((*(prefix + name for prefix in ("", "r", "i") for name in ARITHMETIC), *OTHERS))
TURNING = frozenset(("t", "T", "mT", "transpose", "permute", "adjoint", "swapaxes"))
EXPANDING = frozenset(("expand", "broadcast_to", "repeat"))
PRODUCTS = frozenset(("matmul", "mm"))
CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))
# Functions that give no tensor.
READING = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "layout", "ndim", "is_nested")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.__len__),
    )
)
CONVERSIONS = frozenset(("to", "type_as"))  # change the type of their first argument, and read no value of the others


@dataclass(eq=False)
class Source:
    """A tensor computed from parameters alone.

    Args:
        value: the tensor, connected to the parameters.
        params: name -> trainable parameter it was computed from.
        lookup: parameter and ids, if it is a table lookup.
        turned: the parameter of which it is the transposed matrix.
    """

    value: Tensor
    params: dict[str, Tensor]
    lookup: tuple[Tensor, Tensor] | None = None
    turned: Tensor | None = None

    def pull(self, gradient: Tensor) -> dict[str, Use]:
        """Per-sample gradients of the parameters from that of the value, ``[B, *shape]``."""
        if len(self.params) == 1 and next(iter(self.params.values())) is self.value:
            return {next(iter(self.params)): DirectUse(gradient)}
        wanted = list(self.params.values())
        rows = chain(self.value, wanted, gradient.to(self.value.dtype))
        return {name: DirectUse(wide(row)) for name, row in zip(self.params, rows, strict=True) if row is not None}


def chain(value: Tensor, wanted: list[Tensor], gradients: Tensor) -> Sequence[Tensor | None]:
    """Vector-Jacobian products for many cotangents at once, one at a time where torch cannot batch a function."""
    settings: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        return torch.autograd.grad(value, wanted, gradients, is_grads_batched=True, **settings)
    except RuntimeError:
        rows = [torch.autograd.grad(value, wanted, g, **settings) for g in gradients]
        return [None if some[0] is None else torch.stack(some) for some in zip(*rows, strict=True)]  # type: ignore[arg-type]


@dataclass(eq=False)
class BareCall:
    """One use of parameters outside the layers that own them.

    Args:
        unit: the unit that owns the first of them.
        batch: examples B.
        names: the parameters, one entry for each use that ``uses`` will give.
        outputs: the tensor whose cotangent is asked for.
        build: cotangent -> uses.
        facts: of the layer that this call stands for, where it is one.
        given: what the parameters met.
    """

    unit: Any
    batch: int
    names: list[str]
    outputs: list[Tensor]
    build: Callable[[Tensor], dict[str, Use]]
    facts: dict[str, Any] | None = None
    given: list[Tensor] = field(default_factory=list)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    cotangents: list[Tensor | None] = field(default_factory=list)

    def uses(self) -> dict[str, Use]:
        """Parameter name -> use."""
        (cotangent,) = self.cotangents
        assert cotangent is not None
        return self.build(wide(cotangent))


class Watch(TorchFunctionMode):
    """Follows the parameters of a model through one forward pass.

    Args:
        constants: buffers, frozen parameters, tensors held as attributes.
        params: name -> trainable parameter.
        owners: name -> unit.
        batch: examples B in the pass.
        record: called with each ``BareCall``.
    """

    def __init__(
        self,
        constants: Sequence[Tensor],
        params: Mapping[str, Tensor],
        owners: Mapping[str, Any],
        batch: int,
        record: Callable[[BareCall], None],
    ) -> None:
        super().__init__()
        self.params, self.owners, self.batch, self.record = params, owners, batch, record
        self.depth = 0  # inside a tapped layer, which accounts for its parameters itself
        self.axis, self.lanes = 0, 0  # inside attention: the examples are on axis 1, and how many rows they take there
        self.known: dict[int, Tensor] = {id(t): t for t in (*constants, *params.values())}
        self.sources: dict[int, Source] = {id(p): Source(p, {name: p}) for name, p in params.items()}
        self.failed: dict[str, str] = {}  # parameter -> function
        self.marks: set[tuple[str, ...]] = set()

    @property
    def signature(self) -> int:
        """A number for how parameters met the examples; it must not depend on the size of the batch."""
        return zlib.crc32(repr(sorted(self.marks)).encode()) or 1

    def knows(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors are computed from parameters and constants alone."""
        return all(id(t) in self.known for t in tensors)

    # --- one function ---
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth or func in READING:
            return func(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if self.knows(tensors):
            return self.follow(func, args, kwargs, tensors)
        found = [self.sources[id(t)] for t in tensors if id(t) in self.sources]
        name = name_of(func)
        if found and torch.is_grad_enabled():
            out = self.meet(name, func, args, kwargs, tensors, found)
        else:
            out = func(*args, **kwargs)
        if tensors and id(tensors[0]) in self.known and (out is tensors[0] or name == "setitem"):
            self.forget(tensors[0])  # a constant that was filled with examples
        return out

    def follow(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """A function of parameters and constants: its results are such too, unless it makes one copy per example."""
        name = name_of(func)
        if name in EXPANDING and tensors and self.batch > 1:
            out = func(*args, **kwargs)
            axis = self.axis
            lead = out.dim() - tensors[0].dim()
            rows = 1 if lead > axis else tensors[0].shape[axis - lead] if tensors[0].dim() > axis - lead else 0
            if rows == 1 and out.dim() > axis and out.shape[axis] == (self.lanes if axis else self.batch):
                return self.spread(name, tensors[0], out, lead)
        else:
            out = func(*args, **kwargs)
        for t in tensors_in(out):
            self.learn(name, t, tensors)
        return out

    def learn(self, name: str, out: Tensor, tensors: list[Tensor]) -> None:
        """Take in a result of known tensors."""
        if id(out) in self.known and id(out) not in self.sources:
            return
        self.known[id(out)] = out
        if not out.requires_grad:
            return
        params: dict[str, Tensor] = {}
        for t in tensors:
            params |= self.sources[id(t)].params if id(t) in self.sources else {}
        if not params:
            return
        first = tensors[0]
        matrix = isinstance(first, nn.Parameter) and first.dim() == 2 and out.shape == first.shape[::-1]
        turned = first if matrix and name in TURNING else None
        lookup = (tensors[1], tensors[0]) if name == "embedding" and isinstance(tensors[1], nn.Parameter) else None
        self.sources[id(out)] = Source(out, params, lookup, turned)

    def adopt(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], names: Iterable[str]) -> None:
        """Take in the results of a layer that was called with known tensors alone."""
        params = {name: self.params[name] for name in names}
        for t in inputs:
            params |= self.sources[id(t)].params if id(t) in self.sources else {}
        for out in outputs:
            self.known[id(out)] = out
            self.sources[id(out)] = Source(out, params)

    def forget(self, t: Tensor) -> None:
        """A tensor that examples were written into."""
        self.known.pop(id(t), None)
        self.sources.pop(id(t), None)

    def spread(self, name: str, t: Tensor, out: Tensor, lead: int) -> Tensor:
        """One copy per example, where the model itself asks for them."""
        if id(t) not in self.sources or not torch.is_grad_enabled():
            self.marks.add((name, "constant"))
            return out  # a constant per example is no longer known: it counts as one of the examples
        axis, source = self.axis, self.sources[id(t)]
        rows = self.lanes if axis else self.batch
        value = source.value.reshape(*[1] * lead, *source.value.shape)
        copies = value.expand(*[rows if i == axis else n for i, n in enumerate(value.shape)])

        def build(g: Tensor) -> dict[str, Use]:
            g = split_rows(g.movedim(axis, 0), self.batch).sum(1)
            return source.pull(g.reshape(len(g), *source.value.shape))

        self.tap(name, source, copies, build)
        if name == "repeat":
            return copies.repeat(*[1 if i == axis else n // m for i, (n, m) in enumerate(zip(out.shape, value.shape, strict=True))])
        return copies.expand(out.shape)

    def tap(self, name: str, source: Source, copies: Tensor, build: Callable[[Tensor], dict[str, Use]]) -> None:
        """Ask for the cotangent of copies of a source."""
        names = list(source.params)
        self.marks.add((name, *sorted(names)))
        self.record(BareCall(self.owners[names[0]], self.batch, names, [copies], build))

    def fail(self, name: str, found: Sequence[Source]) -> None:
        """Note parameters whose use cannot be followed."""
        for source in found:
            self.failed |= dict.fromkeys(source.params, name)

    # --- parameters meet examples ---
    def meet(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], found: list[Source]) -> Any:
        """A function of parameters and examples."""
        if name in CONVERSIONS:
            return self.follow(func, args, kwargs, [args[0]]) if id(args[0]) in self.known else func(*args, **kwargs)
        special = self._convolution if name in CONVOLUTIONS else self._product if name in PRODUCTS else getattr(self, f"_{name}", None)
        out = special(func, args, kwargs) if special is not None else None
        if out is not None:
            return out
        swapped: dict[int, Tensor] | None = None
        if not (in_place(func) and id(args[0]) in self.known):
            if name in BROADCASTING and not self.axis:
                swapped = self.copies(name, found, torch.broadcast_shapes(*(t.shape for t in tensors)))
            elif self.batch == 1:  # one example: any function will do
                swapped = {id(s.value): self.alone(name, s) for s in {id(s): s for s in found}.values()}
        if swapped is not None:
            return func(*swap(args, swapped), **swap(kwargs, swapped))
        out = func(*args, **kwargs)
        if any(t.requires_grad for t in tensors_in(out)):
            self.fail(name, found)
        return out

    def alone(self, name: str, source: Source) -> Tensor:
        """The copy for a batch of one example."""
        copy = source.value.unsqueeze(0).expand(1, *source.value.shape)
        self.tap(name, source, copy, lambda g: source.pull(g))
        return copy.squeeze(0)

    def copies(self, name: str, found: Sequence[Source], shape: Sequence[int]) -> dict[int, Tensor] | None:
        """For each source one copy per example, aligned to a result of a shape; None where that cannot be done."""
        batch = self.batch
        if not shape or shape[0] % batch:
            return None
        swapped: dict[int, Tensor] = {}
        for source in found:
            value, lead = source.value, len(shape) - source.value.dim()
            if lead < 0 or (batch > 1 and lead == 0 and value.shape[0] != 1):
                return None  # it has rows for the examples already, or for something else
        for source in {id(s): s for s in found}.values():
            value, lead = source.value, len(shape) - source.value.dim()
            full = value.reshape(1, *[1] * lead, *value.shape).expand(batch, *[1] * lead, *value.shape)  # [B, 1..., *value]

            def build(g: Tensor, source: Source = source) -> dict[str, Use]:
                g = g.reshape(len(g), *source.value.shape)
                if source.lookup is not None and g.shape[1:-1] == source.lookup[1].shape:
                    table, ids = source.lookup
                    flat = ids.reshape(1, -1).expand(len(g), -1)
                    return {next(iter(source.params)): EmbeddingUse(flat.long(), g.reshape(len(g), -1, g.shape[-1]), len(table))}
                return source.pull(g)

            self.tap(name, source, full, build)
            # Rows of the result: k for each example; of a copy: one, or as many as it has itself.
            parts = shape[0] // batch
            if lead:
                swapped[id(value)] = full.expand(batch, parts, *full.shape[2:]).flatten(0, 1) if parts > 1 else full.flatten(0, 1)
            else:
                rows = full if value.shape[0] != 1 else full.expand(batch, parts, *full.shape[2:])
                swapped[id(value)] = rows.flatten(0, 1)
        return swapped

    def source(self, t: Any) -> Source | None:
        """The source that a tensor is, if it is one."""
        return self.sources.get(id(t)) if isinstance(t, Tensor) else None

    def has_rows(self, t: Tensor) -> bool:
        """Whether a tensor's leading axis holds the examples."""
        if self.axis:
            return t.shape[1] == self.lanes if t.dim() == 3 else t.dim() == 2 and t.shape[0] % self.lanes == 0
        return t.dim() > 1 and t.shape[0] % self.batch == 0

    def layer(
        self,
        name: str,
        z: Tensor,
        x: Tensor,
        weight: Source | None,
        bias: Source | None,
        weight_use: Callable[[Tensor], Use],
        bias_gradient: Callable[[Tensor], Tensor],
        facts: dict[str, Any] | None,
    ) -> Tensor:
        """Record a function that a layer of the same name would have computed; returns its output."""
        found = [source for source in (weight, bias) if source is not None]
        names = [n for source in found for n in source.params]
        if not names or not z.requires_grad:
            return z
        self.marks.add((name, *sorted(names)))

        def build(g: Tensor) -> dict[str, Use]:
            uses: dict[str, Use] = {}
            if weight is not None:
                use = weight_use(g)
                merge(uses, {next(iter(weight.params)): use} if plain(weight) else weight.pull(use.instantiate()))
            if bias is not None:
                merge(uses, bias.pull(bias_gradient(g)))
            return uses

        call = BareCall(self.owners[names[0]], self.batch, list(dict.fromkeys(names)), [z], build, facts, [x])
        call.versions = [(x, x._version)]
        self.record(call)
        return z

    # --- functions that are layers ---
    def _linear(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, w, b = arguments(args, kwargs, "input", "weight", "bias")
        return self.linear(x, w, b, func, args, kwargs)

    def _product(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, w = arguments(args, kwargs, "input", "other")
        source = self.source(w)
        if source is None or w.dim() != 2:
            return None
        return self.linear(x, w, None, func, args, kwargs, across=True)

    def _addmm(self, func: Any, args: Any, kwargs: Any) -> Any:
        b, x, w = arguments(args, kwargs, "input", "mat1", "mat2")
        if kwargs.keys() & {"beta", "alpha"} or b.dim() != 1 or w.dim() != 2:
            return None
        return self.linear(x, w, b, func, args, kwargs, across=True)

    def linear(self, x: Any, w: Any, b: Any, func: Any, args: Any, kwargs: Any, across: bool = False) -> Any:
        """``x W^T + b``, or ``x W + b`` with ``across``."""
        weight, bias = self.source(w), self.source(b)
        if id(x) in self.known or not self.has_rows(x) or w.dim() != 2 or (weight is None and id(w) not in self.known):
            return None
        z = func(*args, **kwargs)
        a, axis, lanes = x.detach(), self.axis, self.lanes

        def rows(t: Tensor) -> Tensor:  # [B, T, D]
            flat = t.reshape(-1, lanes, t.shape[-1]).movedim(1, 0) if axis else t
            return wide(flat).reshape(self.batch, -1, t.shape[-1])

        def weight_use(g: Tensor) -> Use:
            one, two = rows(a), rows(g)
            assert weight is not None
            swapped = across != (weight.turned is not None)  # the parameter itself is [D, p]
            return LinearUse(two, one) if swapped else LinearUse(one, two)

        width = z.shape[-1]
        facts = {"positions": z.numel() // width // self.batch, "fan_in": a.shape[-1], "fan_out": width}
        return self.layer("linear", z, x, weight, bias, weight_use, lambda g: rows(g).sum(1), facts if weight else None)

    def _convolution(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, w, b, stride, padding, dilation, groups = arguments(
            args, kwargs, "input", "weight", "bias", "stride", "padding", "dilation", "groups"
        )
        n, weight, bias = w.dim() - 2, self.source(w), self.source(b)
        if self.axis or id(x) in self.known or x.dim() != n + 2 or x.shape[0] % self.batch or (weight is None and id(w) not in self.known):
            return None
        kernel = tuple(w.shape[2:])
        stride, dilation = (tuple([v or 1] * n if isinstance(v, int | None) else v) for v in (stride, dilation))
        pads = pads_of(padding, kernel, dilation)
        z, a = func(*args, **kwargs), x.detach()

        def weight_use(g: Tensor) -> Use:
            use: Use = ConvUse(wide(a), g, kernel, stride, dilation, groups or 1, pads)
            return use if len(g) == self.batch else use.fold(self.batch)

        def bias_gradient(g: Tensor) -> Tensor:
            return split_rows(g.flatten(2).sum(2), self.batch).sum(1)

        return self.layer("convolution", z, x, weight, bias, weight_use, bias_gradient, None)

    def _embedding(self, func: Any, args: Any, kwargs: Any) -> Any:
        ids, w, padding, max_norm, _, by_freq, sparse = arguments(
            args, kwargs, "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"
        )
        weight = self.source(w)
        if weight is None or max_norm is not None or by_freq or sparse or self.axis or not ids.dim() or ids.shape[0] % self.batch:
            return None
        z = func(*args, **kwargs)
        padding = padding + len(w) if padding is not None and padding < 0 else padding

        def weight_use(g: Tensor) -> Use:
            flat, g = ids.reshape(self.batch, -1).long(), g.reshape(self.batch, -1, g.shape[-1])
            g = g if padding is None else g.masked_fill((flat == padding).unsqueeze(-1), 0.0)
            return EmbeddingUse(flat, g, len(w))

        return self.layer("embedding", z, ids, weight, None, weight_use, lambda g: g, None)

    def _layer_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, shape, w, b, eps = arguments(args, kwargs, "input", "normalized_shape", "weight", "bias", "eps")
        shape, eps = tuple(shape), 1e-5 if eps is None else eps

        def normalise(t: Tensor) -> Tensor:
            return F.layer_norm(t, shape, None, None, eps)

        return self.norm(func, args, kwargs, x, w, b, lambda a, g: trailing_uses(normalise, a, g, shape))

    def _rms_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, shape, w, eps = arguments(args, kwargs, "input", "normalized_shape", "weight", "eps")
        shape = tuple(shape)
        return self.norm(func, args, kwargs, x, w, None, lambda a, g: trailing_uses(lambda t: F.rms_norm(t, shape, None, eps), a, g, shape))

    def _group_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, groups, w, b, eps = arguments(args, kwargs, "input", "num_groups", "weight", "bias", "eps")
        eps = 1e-5 if eps is None else eps
        return self.norm(func, args, kwargs, x, w, b, lambda a, g: channel_uses(lambda t: F.group_norm(t, groups, None, None, eps), a, g))

    def norm(
        self, func: Any, args: Any, kwargs: Any, x: Tensor, w: Any, b: Any, uses: Callable[[Tensor, Tensor], dict[str, Use]]
    ) -> Tensor | None:
        """A normalisation; ``uses`` gives those of scale and offset from input and cotangent."""
        if self.axis or id(x) in self.known or not self.has_rows(x):
            return None
        z, a = func(*args, **kwargs), x.detach()

        def use(role: str, g: Tensor) -> Use:
            found = uses(wide(a), g)[role]
            return found if len(g) == self.batch else found.fold(self.batch)

        def offset(g: Tensor) -> Tensor:
            return use("bias", g).instantiate()

        return self.layer(str(func.__name__), z, x, self.source(w), self.source(b), lambda g: use("weight", g), offset, None)

    def _scaled_dot_product_attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        query, key, value, mask = arguments(args, kwargs, "query", "key", "value", "attn_mask")
        source = self.source(mask)
        if source is None or self.axis or any(id(t) in self.known for t in (query, key, value)):
            return None
        swapped = self.copies("attention", [source], query.shape)
        return None if swapped is None else func(*swap(args, swapped), **swap(kwargs, swapped))

    def _multi_head_attention_forward(self, func: Any, args: Any, kwargs: Any) -> Any:
        query = arguments(args, kwargs, "query")[0]
        if query.dim() != 3 or query.shape[1] % self.batch or self.axis:
            return None
        inside = open_to_modes(func)
        self.axis, self.lanes = 1, query.shape[1]
        try:
            with self:
                return inside(*args, **kwargs)
        finally:
            self.axis, self.lanes = 0, 0


def open_to_modes(func: Any) -> Callable[..., Any]:
    """A function of torch's own, with its question whether to ask a mode answered no, so that the functions inside it come to the mode."""
    names = {**func.__globals__, "has_torch_function": lambda _: False}
    inside = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    inside.__kwdefaults__ = func.__kwdefaults__
    return inside


def plain(source: Source) -> bool:
    """Whether a source is a parameter itself, or one transposed."""
    return source.turned is not None or any(p is source.value for p in source.params.values())


def merge(uses: dict[str, Use], more: Mapping[str, Use]) -> None:
    """Add uses to others; two of one parameter become one."""
    for name, use in more.items():
        uses[name] = DirectUse(uses[name].instantiate() + use.instantiate()) if name in uses else use


def in_place(func: Any) -> bool:
    """Whether a function writes into its first argument."""
    name = str(getattr(func, "__name__", ""))
    return name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def name_of(func: Any) -> str:
    """Name of a function, method or operator: ``add`` for ``torch.add``, ``Tensor.add_`` and ``Tensor.__add__``."""
    name = str(getattr(func, "__name__", ""))
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return name.strip("_")


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from tensors_in(part)
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from tensors_in(part)


def swap(tree: Any, swapped: Mapping[int, Tensor]) -> Any:
    """Arguments with some tensors replaced."""
    if isinstance(tree, Tensor):
        return swapped.get(id(tree), tree)
    if isinstance(tree, tuple | list):
        return type(tree)(swap(part, swapped) for part in tree) if not hasattr(tree, "_fields") else tree
    return {k: swap(v, swapped) for k, v in tree.items()} if isinstance(tree, dict) else tree


def arguments(args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> list[Any]:
    """Arguments by name, given in place or by keyword; None for those that are not given."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def pads_of(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Padding before and after each axis, as the functional convolutions apply it."""
    if padding == "same":
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((n // 2, n - n // 2) for n in reach)
    if padding is None or padding == "valid":
        return ((0, 0),) * len(kernel)
    return tuple((n, n) for n in ([padding] * len(kernel) if isinstance(padding, int) else padding))
