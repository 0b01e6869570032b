"""Layer classes and what is known of each: kind, facts for the planner, uses of its parameters.

One row per layer class; the rows are the registration. A class without a row gets the slow method (``generic_uses``), exact for any
module that treats examples independently; a class that mixes examples is refused, with the replacement named.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten, tree_unflatten

from dptrain.errors import UnsupportedModelError
from dptrain.info import BIAS, CONV, EMBEDDING, LINEAR, NORM
from dptrain_torch.lipschitz import BoundedBias, SpectralConv1d, SpectralConv2d
from dptrain_torch.own import example_axis
from dptrain_torch.uses import ConvUse, DirectUse, EmbeddingUse, LinearUse, Use, covered, turns, wide

Facts = dict[str, Any]  # positions, fan_in, fan_out, attrs: per call


@dataclass(frozen=True)
class Rule:
    """What is known of a layer class.

    Args:
        kind: one of ``dptrain.info.KINDS``.
        facts: ``(module, input, output) -> Facts``.
        uses: ``(module, input, cotangent) -> {role: use}``.
        problem: ``(module) -> sentence or None``: settings that cannot be handled.
        whole: ``(module, args, kwargs, cotangent) -> {role: use}``, in place of ``uses`` where one input is not enough.
        bias: ``(module, cotangent) -> per-sample gradient`` of the role ``bias``, which needs no input.
    """

    kind: str
    facts: Callable[[Any, Tensor, Tensor], Facts]
    uses: Callable[[Any, Tensor, Tensor], dict[str, Use]]
    problem: Callable[[Any], str | None] = lambda module: None
    whole: Callable[[Any, Any, Any, Tensor], dict[str, Use]] | None = None
    bias: Callable[[Any, Tensor], Tensor] | None = None


# --- biases of layers that have a weight too --------------------------------------------------------------------------------


def last_axis_bias(module: Any, g: Tensor) -> Tensor:
    return wide(g).reshape(g.shape[0], -1, g.shape[-1]).sum(1)


def channel_bias(module: Any, g: Tensor) -> Tensor:
    return wide(g).flatten(2).sum(2)


def trailing_bias(module: Any, g: Tensor) -> Tensor:
    between = list(range(1, g.dim() - len(module.normalized_shape)))
    return wide(g).sum(between) if between else wide(g)


# --- linear ---------------------------------------------------------------------------------------------------------------


def linear_facts(module: nn.Linear, a: Tensor, z: Tensor) -> Facts:
    return {"positions": z[0, ..., 0].numel(), "fan_in": module.in_features, "fan_out": module.out_features}


def linear_uses(module: nn.Linear, a: Tensor, g: Tensor) -> dict[str, Use]:
    batch = g.shape[0]
    a, g = wide(a).reshape(batch, -1, a.shape[-1]), wide(g).reshape(batch, -1, g.shape[-1])  # [B, T, D], [B, T, p]
    return {"weight": LinearUse(a, g), "bias": DirectUse(g.sum(1))}


def transposed_linear_facts(module: Any, a: Tensor, z: Tensor) -> Facts:
    return {"positions": z[0, ..., 0].numel(), "fan_in": a.shape[-1], "fan_out": z.shape[-1]}


def transposed_linear_uses(module: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    """``z = a W``: the roles of input and output are swapped."""
    batch = g.shape[0]
    a, g = wide(a).reshape(batch, -1, a.shape[-1]), wide(g).reshape(batch, -1, g.shape[-1])
    return {"weight": LinearUse(g, a), "bias": DirectUse(g.sum(1))}


# --- convolution ----------------------------------------------------------------------------------------------------------


def conv_pads(module: Any) -> tuple[tuple[int, int], ...]:
    """Padding before and after each spatial axis, as the layer itself applies it."""
    if isinstance(module.padding, str):
        flat = module._reversed_padding_repeated_twice
        return tuple((flat[i], flat[i + 1]) for i in range(len(flat) - 2, -1, -2))
    return tuple((n, n) for n in module.padding)


def conv_facts(module: Any, a: Tensor, z: Tensor) -> Facts:
    taps = torch.Size(module.kernel_size).numel()
    if module.transposed:  # the roles of input and output are swapped
        windows, fan_out, channels = a.shape[2:], module.in_channels, module.out_channels
    else:
        windows, fan_out, channels = z.shape[2:], module.out_channels, module.in_channels
    positions, channels = windows.numel(), channels // module.groups
    padded = math.prod(covered(windows, module.kernel_size, module.stride, module.dilation))
    attrs = {"groups": module.groups, "kernel": taps, "channels": channels, "padded": padded}
    return {"positions": positions, "fan_in": channels * taps, "fan_out": fan_out, "attrs": attrs}


def conv_uses(module: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    a, g = wide(a), wide(g)
    shape = (module.kernel_size, module.stride, module.dilation, module.groups)
    bias = DirectUse(g.flatten(2).sum(2))
    if module.transposed:  # <g, convT(x, W)> = <conv(g, W), x>
        return {"weight": ConvUse(g, a, *shape, tuple((n, n) for n in module.padding)), "bias": bias}
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return {"weight": ConvUse(a, g, *shape, conv_pads(module), mode), "bias": bias}


def spectral_conv_uses(module: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    a, g = wide(a), wide(g)
    weight = ConvUse(a, g, module.kernel_size, module.stride, module.dilation, 1, module.pads(a.shape[2:]))
    return {"weight": weight, "bias": DirectUse(g.flatten(2).sum(2))}


# --- bias -----------------------------------------------------------------------------------------------------------------


def bias_facts(module: BoundedBias, a: Tensor, z: Tensor) -> Facts:
    return {"positions": module.positions(z), "fan_in": 1, "fan_out": module.num_features}


def bias_uses(module: BoundedBias, a: Tensor, g: Tensor) -> dict[str, Use]:
    between = [axis for axis in range(1, g.dim()) if axis != example_axis(module.dim, g)]
    total = wide(g).sum(between) if between else wide(g)
    return {"bias": DirectUse(total / math.sqrt(module.positions(g)))}


# --- embedding ------------------------------------------------------------------------------------------------------------


def embedding_facts(module: nn.Embedding, a: Tensor, z: Tensor) -> Facts:
    return {"positions": z[0, ..., 0].numel(), "fan_in": module.num_embeddings, "fan_out": module.embedding_dim}


def embedding_uses(module: nn.Embedding, a: Tensor, g: Tensor) -> dict[str, Use]:
    batch = g.shape[0]
    ids, g = a.reshape(batch, -1).long(), wide(g).reshape(batch, -1, g.shape[-1])  # [B, T], [B, T, d]
    if module.padding_idx is not None:
        g = g.masked_fill((ids == module.padding_idx).unsqueeze(-1), 0.0)
    return {"weight": EmbeddingUse(ids, g, module.num_embeddings)}


def embedding_problem(module: nn.Embedding) -> str | None:
    if module.max_norm is not None:
        return "max_norm rewrites rows from the data without noise; remove it"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq divides by counts over the batch, which mixes examples; set it to False"
    return "sparse gradients cannot receive noise on every row; set sparse=False" if module.sparse else None


def bags(module: nn.EmbeddingBag, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """What a call looks up: ids ``[B, L]`` and coefficients ``[B, L]``, 0 where a bag is shorter or holds the padding index."""
    ids, offsets, scale = (kwargs.get(name, args[i] if i < len(args) else None) for i, name in enumerate(BAG_ARGUMENTS))
    if ids.dim() == 1:  # one list of ids, cut where the offsets say
        count = len(offsets) - bool(module.include_last_offset)
        place = torch.arange(len(ids), device=ids.device)
        bag = torch.searchsorted(offsets[:count].contiguous(), place, right=True) - 1
        within = place - offsets[bag]
        length = int(within.max()) + 1 if len(ids) else 0
        full = ids.new_zeros(count, length)
        full[bag, within] = ids
        used = torch.zeros(count, length, dtype=module.weight.dtype, device=ids.device)
        used[bag, within] = 1 if scale is None else scale.detach().to(used.dtype)
        ids = full
    else:
        used = torch.ones_like(ids, dtype=module.weight.dtype) if scale is None else scale.detach()
    return ids.long(), used if module.padding_idx is None else used.masked_fill(ids == module.padding_idx, 0.0)


BAG_ARGUMENTS = ("input", "offsets", "per_sample_weights")


def bag_facts(module: nn.EmbeddingBag, a: Tensor, z: Tensor) -> Facts:
    return {"positions": a.numel() // len(z), "fan_in": module.num_embeddings, "fan_out": module.embedding_dim}


def bag_uses(module: nn.EmbeddingBag, args: Any, kwargs: Any, g: Tensor) -> dict[str, Use]:
    g = wide(g)
    ids, used = bags(module, args, kwargs)
    used = wide(used)
    if module.mode == "max":  # each column comes from one id of the bag
        rows = wide(module.weight.detach())[ids].masked_fill((used == 0).unsqueeze(-1), float("-inf"))
        best = ids.gather(1, rows.argmax(1)) if ids.shape[1] else ids.new_zeros(g.shape)
        full = used.any(1, keepdim=True)
        out = g.new_zeros(len(g), module.num_embeddings, g.shape[1])
        return {"weight": DirectUse(out.scatter_add_(1, best.unsqueeze(1), torch.where(full, g, 0).unsqueeze(1)))}
    if module.mode == "mean":
        used = used / (used != 0).sum(1, keepdim=True).clamp(min=1)
    return {"weight": EmbeddingUse(ids, used.unsqueeze(-1) * g.unsqueeze(1), module.num_embeddings)}


# --- normalisation --------------------------------------------------------------------------------------------------------


Normalise = Callable[[Tensor], Tensor]  # input [b, ...] -> normalised input, a new array


def scale_and_offset(normalise: Normalise, a: Tensor, g: Tensor, total: Normalise) -> dict[str, Use]:
    """Scale and offset of a normalisation: its output is rebuilt, a few examples at a time, so that it never leaves the cache."""
    scales, offsets = [], []
    for some in turns(a):
        scales.append(total(normalise(a[some]).mul_(g[some])))
        offsets.append(total(g[some]))
    return {"weight": DirectUse(torch.cat(scales)), "bias": DirectUse(torch.cat(offsets))}


def trailing_uses(normalise: Normalise, a: Tensor, g: Tensor, shape: tuple[int, ...]) -> dict[str, Use]:
    """Scale and offset over the trailing axes ``shape``."""
    between = list(range(1, g.dim() - len(shape)))
    return scale_and_offset(normalise, a, g, lambda t: t.sum(between) if between else t)


def channel_uses(normalise: Normalise, a: Tensor, g: Tensor) -> dict[str, Use]:
    """Scale and offset per channel, axis 1."""
    return scale_and_offset(normalise, a, g, lambda t: t.flatten(2).sum(2))


def layer_norm_uses(module: nn.LayerNorm, a: Tensor, g: Tensor) -> dict[str, Use]:
    shape = tuple(module.normalized_shape)
    return trailing_uses(lambda x: F.layer_norm(x, shape, None, None, module.eps), wide(a), wide(g), shape)


def rms_norm_uses(module: nn.RMSNorm, a: Tensor, g: Tensor) -> dict[str, Use]:
    shape = tuple(module.normalized_shape)
    return trailing_uses(lambda x: F.rms_norm(x, shape, None, module.eps), wide(a), wide(g), shape)


def group_norm_uses(module: nn.GroupNorm, a: Tensor, g: Tensor) -> dict[str, Use]:
    return channel_uses(lambda x: F.group_norm(x, module.num_groups, None, None, module.eps), wide(a), wide(g))


def instance_norm_uses(module: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    return channel_uses(lambda x: F.instance_norm(x, eps=module.eps), wide(a), wide(g))


def norm_facts(module: Any, a: Tensor, z: Tensor) -> Facts:
    size = module.weight.numel()
    return {"positions": z[0].numel() // size, "fan_in": 1, "fan_out": size}


def norm_problem(module: Any) -> str | None:
    if getattr(module, "track_running_stats", False):
        return f"{type(module).__name__} with running statistics stores data without noise; set track_running_stats=False"
    return None


# --- the table ------------------------------------------------------------------------------------------------------------

_CONV = Rule(CONV, conv_facts, conv_uses, bias=channel_bias)
_SPECTRAL_CONV = Rule(CONV, conv_facts, spectral_conv_uses, bias=channel_bias)
RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: Rule(LINEAR, linear_facts, linear_uses, bias=last_axis_bias),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _CONV,
    nn.ConvTranspose2d: _CONV,
    nn.ConvTranspose3d: _CONV,
    SpectralConv1d: _SPECTRAL_CONV,
    SpectralConv2d: _SPECTRAL_CONV,
    BoundedBias: Rule(BIAS, bias_facts, bias_uses),
    nn.Embedding: Rule(EMBEDDING, embedding_facts, embedding_uses, embedding_problem),
    nn.EmbeddingBag: Rule(EMBEDDING, bag_facts, lambda module, a, g: {}, embedding_problem, bag_uses),
    nn.LayerNorm: Rule(NORM, norm_facts, layer_norm_uses, bias=trailing_bias),
    nn.RMSNorm: Rule(NORM, norm_facts, rms_norm_uses),
    nn.GroupNorm: Rule(NORM, norm_facts, group_norm_uses, bias=channel_bias),
    nn.InstanceNorm1d: Rule(NORM, norm_facts, instance_norm_uses, norm_problem, bias=channel_bias),
    nn.InstanceNorm2d: Rule(NORM, norm_facts, instance_norm_uses, norm_problem, bias=channel_bias),
    nn.InstanceNorm3d: Rule(NORM, norm_facts, instance_norm_uses, norm_problem, bias=channel_bias),
}
# Classes of libraries that are not imported here, by module and name.
NAMED_RULES: Mapping[tuple[str, str], Rule] = {
    ("transformers.pytorch_utils", "Conv1D"): Rule(LINEAR, transposed_linear_facts, transposed_linear_uses, bias=last_axis_bias),
}


def rule_for(module: nn.Module) -> Rule | None:
    """The row of a module's class; a subclass counts only if it inherits ``forward`` unchanged."""
    if is_parametrized(module):
        return None  # the weight is computed from other parameters
    named = NAMED_RULES.get((type(module).__module__, type(module).__name__))
    if named is not None:
        return None if module._forward_pre_hooks or module._forward_hooks else named
    for cls in type(module).__mro__:
        if cls in RULES:
            own = getattr(type(module), "forward", None) is getattr(cls, "forward", None)
            roles = {name for name, p in module.named_parameters(recurse=False) if p is not None}
            hooked = bool(module._forward_pre_hooks or module._forward_hooks)  # weight norm and the like recompute the weight
            return RULES[cls] if own and roles <= {"weight", "bias"} and not hooked else None
    return None


def mixes_examples(module: nn.Module) -> str | None:
    """A sentence if a module lets one example influence another, whether or not it is trainable; else None."""
    name = type(module).__name__
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return f"{name} computes statistics over the batch, so one example moves the others; replace it by GroupNorm"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return norm_problem(module)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return f"{name} has parameters without a shape; run one forward pass first"
    return None


def batch_axis(module: nn.Module, position: int) -> int:
    """The axis that holds the examples in the tensor at a position among a module's tensor inputs or outputs."""
    if isinstance(module, nn.RNNBase):  # the sequence, then states [layers, B, D]
        return 0 if module.batch_first and position == 0 else 1
    return 0


def generic_uses(
    module: nn.Module, names: list[str], args: Any, kwargs: Any, cotangents: list[Tensor | None], shared: int = 0
) -> dict[str, Use]:
    """The slow method: per-sample gradients of a whole module, by ``vmap``, or one example at a time where torch cannot batch it.

    Args:
        module: any module that treats examples independently and draws no random numbers.
        names: its trainable parameters, relative names.
        args, kwargs: what it was called with; tensors whose first axis is B are split into examples.
        cotangents: of its tensor outputs, in order; None where the loss does not depend on one.
        shared: bit i says that argument i is the same for all examples, whatever its shape.
    Returns:
        Relative name -> use, one row for each row of the cotangents.
    Raises:
        UnsupportedModelError: the module draws random numbers.
    """
    axes = [batch_axis(module, i) for i in range(len(cotangents))]
    batch = next(c.shape[axis] for c, axis in zip(cotangents, axes, strict=True) if c is not None)
    leaves, spec = tree_flatten((args, kwargs))
    leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
    places = iter(range(len(leaves)))
    inputs = [batch_axis(module, next(places)) if isinstance(x, Tensor) else None for x in leaves]
    split = [
        axis is not None and not shared >> i & 1 and x.dim() > axis and x.shape[axis] == batch
        for i, (x, axis) in enumerate(zip(leaves, inputs, strict=True))
    ]
    present = [i for i, c in enumerate(cotangents) if c is not None]
    params = dict(module.named_parameters())
    constant = {k: v.detach() for k, v in params.items() if k not in names} | dict(module.named_buffers())

    def outputs(weights: dict[str, Tensor], xs: list[Tensor]) -> list[Tensor]:
        it = iter(xs)
        full = [next(it).unsqueeze(axis or 0) if is_split else x for x, is_split, axis in zip(leaves, split, inputs, strict=True)]
        call_args, call_kwargs = tree_unflatten(full, spec)
        out = torch.func.functional_call(module, {**constant, **weights}, call_args, call_kwargs)
        tensors = [o for o in tree_flatten(out)[0] if isinstance(o, Tensor)]
        return [tensors[i] for i in present]

    def rows_of(gs: list[Tensor]) -> list[Tensor]:
        return [g.unsqueeze(axes[i]) for g, i in zip(gs, present, strict=True)]

    def one(xs: list[Tensor], gs: list[Tensor]) -> dict[str, Tensor]:
        vjp: Any = torch.func.vjp(lambda weights: outputs(weights, xs), {name: params[name].detach() for name in names})[1]
        return dict(vjp(rows_of(gs))[0])

    def one_plainly(xs: list[Tensor], gs: list[Tensor]) -> list[Tensor]:
        weights = {name: params[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            out = outputs(weights, xs)
        used = [(z, g.to(z.dtype)) for z, g in zip(out, rows_of(gs), strict=True) if z.requires_grad]
        found = torch.autograd.grad([z for z, _ in used], list(weights.values()), [g for _, g in used], allow_unused=True)
        return [torch.zeros_like(params[name]) if g is None else g for name, g in zip(names, found, strict=True)]

    xs = [x.movedim(axis, 0) for x, is_split, axis in zip(leaves, split, inputs, strict=True) if is_split]
    gs = [c.movedim(axis, 0) for c, axis in zip(cotangents, axes, strict=True) if c is not None]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # slow is what this method is declared to be
            gradients = torch.func.vmap(one, randomness="error")(xs, gs)
    except RuntimeError as error:
        if "random" in str(error):
            raise UnsupportedModelError(
                [
                    f"a {type(module).__name__} has no fast rule and draws random numbers inside, so its gradient cannot be rebuilt; "
                    "turn that off."
                ]
            ) from None
        # Recurrent kernels, data-dependent shapes: vmap cannot, a loop of plain autograd can.
        rows = [one_plainly([x[i] for x in xs], [g[i] for g in gs]) for i in range(batch)]
        gradients = {name: torch.stack(row).detach() for name, row in zip(names, zip(*rows, strict=True), strict=True)}
    return {name: DirectUse(wide(gradient)) for name, gradient in gradients.items()}
