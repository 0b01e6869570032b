"""Replace the modules of a torch model that mix examples by modules that do not, and keep the weights that can be kept.

    BatchNorm, SyncBatchNorm           GroupNorm of the same channels, with its weight and bias
    BatchNorm, frozen                  ChannelAffine: the affine map that it computes from its running statistics, exactly
    timm's BatchNormAct2d              the same, then its own drop layer and activation
    InstanceNorm                       running statistics off
    Embedding                          max_norm, scale_grad_by_freq, sparse off
    spectral_norm                      the weight as it is normalised now, free from now on
    anything with inplace=True         inplace=False

Nothing else is touched. LSTM, GRU, RNN and MultiheadAttention are handled as they are and need no replacement, unlike in Opacus; GroupNorm,
LayerNorm and weight norm are exact too. What is still refused afterwards is in the report, with what to do.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from dptrain.errors import ConfigError, UnsupportedModelError
from dptrain.validation import Change, FixReport, norm_groups
from dptrain_torch.hooks import find_units

FUSED = ("BatchNormAct2d", "SyncBatchNormAct")  # timm's: normalisation, then ``drop``, then ``act``
Frozen = Literal["fold", "group_norm"]


class ChannelAffine(nn.Module):
    """``scale * x + offset`` per channel, axis 1, both constants: what a frozen BatchNorm computes.

    Args:
        scale, offset: ``[C]``.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """The map, for inputs ``[B, C, ...]``."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(self.offset.view(shape), x, self.scale.view(shape))

    def extra_repr(self) -> str:
        return str(len(self.scale))


@dataclass(frozen=True)
class Options:
    """What becomes of a BatchNorm; see ``fix``."""

    frozen_batchnorm: Frozen = "fold"
    num_groups: int | None = None
    replace_bn_with_in: bool = False

    def __post_init__(self) -> None:
        if self.frozen_batchnorm not in ("fold", "group_norm"):
            raise ConfigError(f"frozen_batchnorm={self.frozen_batchnorm!r} is not known; choose fold or group_norm.")
        if self.num_groups is not None and self.replace_bn_with_in:
            raise ConfigError("num_groups is for GroupNorm, and replace_bn_with_in asks for InstanceNorm; remove one of them.")


def fix(
    model: nn.Module,
    verbose: bool = True,
    frozen_batchnorm: Frozen = "fold",
    num_groups: int | None = None,
    replace_bn_with_in: bool = False,
) -> nn.Module:
    """Make a model trainable with differential privacy where a module can be replaced.

    Args:
        model: any module; left as it was. Make the optimizer from the model that is returned.
        verbose: print what was changed.
        frozen_batchnorm: what becomes of a BatchNorm none of whose parameters is trainable: ``fold`` keeps the function that it computes
            in evaluation mode, so that a pretrained backbone stays what it was; ``group_norm`` treats it like the others.
        num_groups: groups of each GroupNorm; by default those of ``dptrain.validation.norm_groups``.
        replace_bn_with_in: InstanceNorm in place of GroupNorm.
    Returns:
        A copy; devices, precisions, modes, ``requires_grad`` and shared modules are those of ``model``.
    Raises:
        ConfigError: the options contradict each other.
        UnsupportedModelError: the model cannot be copied, or a BatchNorm cannot be replaced as asked; lists every one.
    """
    found, report = fix_report(model, frozen_batchnorm, num_groups, replace_bn_with_in)
    if verbose:
        print(report)
    return found


def fix_report(
    model: nn.Module, frozen_batchnorm: Frozen = "fold", num_groups: int | None = None, replace_bn_with_in: bool = False
) -> tuple[nn.Module, FixReport]:
    """As ``fix``, and what was changed.

    Args:
        model, frozen_batchnorm, num_groups, replace_bn_with_in: as in ``fix``.
    Returns:
        The fixed copy, the report.
    Raises:
        ConfigError, UnsupportedModelError: as ``fix``.
    """
    options = Options(frozen_batchnorm, num_groups, replace_bn_with_in)
    parts = [(path or "model", m) for path, m in model.named_modules()]
    if problems := [f"layer {path!r}: {sentence}." for path, m in parts if (sentence := hopeless(m, options))]:
        raise UnsupportedModelError(problems)
    found = copied(model)
    changes: list[Change] = []
    new: dict[int, nn.Module] = {}
    for path, module in list(found.named_modules()):  # a module that is used twice comes once
        if is_target(module):
            new[id(module)] = replacement(module, path or "model", options, changes)
    found = new.get(id(found), found)
    for parent in list(found.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
    for path, module in list(found.named_modules()):
        changes += settings_off(module, path or "model")
    return found, FixReport(tuple(changes), refusals(found))


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model.

    Raises:
        UnsupportedModelError: it holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(model, computed(model))
    except Exception as error:  # a model can hold anything
        reason = str(error).strip().split("\n")[0]
        sentence = f"{type(model).__name__} cannot be copied ({reason}); fix it where it is made, before it is called or compiled."
        raise UnsupportedModelError([sentence]) from error


def computed(model: nn.Module) -> dict[int, Any]:
    """What ``deepcopy`` is told of tensors that modules hold and that have a history: hooks of weight norm keep one, and make it again."""
    held = [x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor) and not x.is_leaf]
    return {id(x): x.detach().clone() for x in held}


def refusals(model: nn.Module) -> tuple[str, ...]:
    """What is still refused, a sentence each."""
    moving = [name for name, m in model.named_modules() if isinstance(m, _SpectralNorm)]
    problems = [f"layer {name!r}: spectral_norm together with another parametrization; remove it by hand." for name in moving]
    try:
        find_units(model)
    except UnsupportedModelError as error:
        problems += error.problems
    return tuple(problems)


# --- normalisation over the batch -----------------------------------------------------------------------------------------


def is_target(module: nn.Module) -> bool:
    """Whether ``fix`` replaces a module: a BatchNorm whose forward pass is known."""
    if not isinstance(module, _BatchNorm) or isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return False
    plain = type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return (plain or is_fused(module)) and not (module._forward_hooks or module._forward_pre_hooks)


def is_fused(module: nn.Module) -> bool:
    """Whether a module is timm's normalisation and activation in one, which is known by name so that timm is not imported."""
    return type(module).__name__ in FUSED and type(module).__module__.startswith("timm.")


def is_frozen(module: Any) -> bool:
    """Whether a BatchNorm has statistics to be kept and nothing to be trained; without parameters, evaluation mode says so."""
    parameters = list(module.parameters(recurse=False))
    still = not any(p.requires_grad for p in parameters) if parameters else not module.training
    return still and module.running_mean is not None and module.running_var is not None


def folds(module: nn.Module, options: Options) -> bool:
    """Whether a BatchNorm becomes its affine map."""
    return options.frozen_batchnorm == "fold" and is_frozen(module)


def hopeless(module: Any, options: Options) -> str | None:
    """Why a module cannot be copied or replaced, or None."""
    if any(is_lazy(x) for x in held(module)):
        return f"{type(module).__name__} has parameters without a shape; run one forward pass first"
    if not is_target(module) or folds(module, options):
        return None
    if options.replace_bn_with_in and instance_class(module) is None:
        return f"there is no InstanceNorm for {type(module).__name__}; leave replace_bn_with_in out"
    if options.num_groups and module.num_features % options.num_groups:
        return f"its {module.num_features} channels do not go into {options.num_groups} groups; choose a divisor of all channels"
    return None


def held(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module itself."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def instance_class(module: nn.Module) -> type[_InstanceNorm] | None:
    """The InstanceNorm of a BatchNorm's rank, None where the rank is not known."""
    pairs = (nn.BatchNorm1d, nn.InstanceNorm1d), (nn.BatchNorm2d, nn.InstanceNorm2d), (nn.BatchNorm3d, nn.InstanceNorm3d)
    return next((new for old, new in pairs if isinstance(module, old)), None)


def replacement(module: nn.Module, path: str, options: Options, changes: list[Change]) -> nn.Module:
    """What replaces a BatchNorm."""
    assert isinstance(module, _BatchNorm)
    before, new = type(module).__name__, normalisation(module, options)
    after = type(new).__name__
    if isinstance(new, ChannelAffine):
        before, after = f"frozen {before}", "ChannelAffine of its running statistics"
    elif isinstance(module, nn.BatchNorm1d) and module.num_features == 1:
        after += " (of one channel: nothing is left of inputs [B, 1]; remove it there)"
    if is_fused(module):
        parts = {"norm": new, "drop": module.drop, "act": module.act}
        new = nn.Sequential()
        for name, part in parts.items():
            assert isinstance(part, nn.Module)
            new.add_module(name, part)
        after += " and its activation"
    changes.append(Change(path, before, after))
    new.training = module.training
    return new


def normalisation(module: _BatchNorm, options: Options) -> nn.Module:
    """ChannelAffine, or a normalisation of single examples with the very parameters of a BatchNorm, so that what is tied stays tied."""
    if folds(module, options):
        return folded(module)
    new: nn.GroupNorm | _InstanceNorm
    if options.replace_bn_with_in:
        cls: Any = instance_class(module)
        new = cls(module.num_features, module.eps)
    else:
        groups = options.num_groups or norm_groups(module.num_features, isinstance(module, nn.BatchNorm1d))
        new = nn.GroupNorm(groups, module.num_features, module.eps, affine=False)
    new.affine = module.affine
    new.weight, new.bias = module.weight, module.bias
    new.training = module.training
    return new


def folded(module: _BatchNorm) -> ChannelAffine:
    """The affine map that a BatchNorm computes in evaluation mode."""
    mean, variance = module.running_mean, module.running_var
    assert mean is not None and variance is not None
    scale = (variance.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    offset = -mean.double() * scale
    if module.bias is not None:
        offset = offset + module.bias.detach().double()
    dtype = mean.dtype if module.weight is None else module.weight.dtype
    new = ChannelAffine(scale.to(dtype), offset.to(dtype))
    new.training = module.training
    return new


# --- settings -------------------------------------------------------------------------------------------------------------


def settings_off(module: Any, path: str) -> Iterator[Change]:
    """Turn off, in place, what cannot be trained with."""
    name = type(module).__name__
    if getattr(module, "inplace", False) is True:
        module.inplace = False
        yield Change(path, f"{name}(inplace=True)", "inplace=False")
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        module.track_running_stats = False
        module.running_mean = module.running_var = module.num_batches_tracked = None
        yield Change(path, f"{name} with running statistics", "statistics of each example")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield from embedding_off(module, path)
    for role in spectral_norm_off(module):
        yield Change(path, f"spectral_norm of the {role}", "normalised once and free from now on")


@torch.no_grad()
def spectral_norm_off(module: nn.Module) -> list[str]:
    """Take spectral norm off a module: its power iteration moves at every call, so that no call can be repeated.

    Returns:
        The names of the weights that had it.
    """
    if not parametrize.is_parametrized(module):
        hooks = [h.name for h in module._forward_pre_hooks.values() if isinstance(h, SpectralNorm)]
        for role in hooks:
            nn.utils.remove_spectral_norm(module, role)
        return hooks
    chains: Any = module.parametrizations
    if not all(isinstance(step, _SpectralNorm) for chain in chains.values() for step in chain):
        return []
    training = module.training
    module.eval()  # a power iteration of its own would change the weights
    values = {role: getattr(module, role) for role in chains}
    module.train(training)
    # By hand, since torch's own function changes the class, which the model that was copied shares.
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for role, chain in chains.items():
        chain.original.copy_(values[role])
        module.register_parameter(role, chain.original)
    return list(values)


def embedding_off(module: nn.Embedding | nn.EmbeddingBag, path: str) -> Iterator[Change]:
    """The settings of an embedding that rewrite rows, count over the batch or skip rows."""
    name = type(module).__name__
    if module.max_norm is not None:
        shorten(module.weight, module.max_norm, module.norm_type)
        module.max_norm = None
        yield Change(path, f"{name}(max_norm)", "rows shortened once and free from now on")
    if module.scale_grad_by_freq:
        module.scale_grad_by_freq = False
        yield Change(path, f"{name}(scale_grad_by_freq=True)", "plain gradients")
    if module.sparse:
        module.sparse = False
        yield Change(path, f"{name}(sparse=True)", "dense gradients, since every row gets noise")


@torch.no_grad()
def shorten(weight: Tensor, max_norm: float, norm_type: float) -> None:
    """What the first lookup of a row with ``max_norm`` would do to it, for all rows."""
    norms = torch.linalg.vector_norm(weight, norm_type, dim=1, keepdim=True)
    weight.mul_(torch.where(norms > max_norm, max_norm / (norms + 1e-7), torch.ones_like(norms)))


# --- freezing -------------------------------------------------------------------------------------------------------------


def freeze_all_but(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Freeze a model but for some parameters; what is frozen costs no norms, no noise and no stored activations.

    Args:
        model: any module; only ``requires_grad`` is changed.
        patterns: of names in ``named_parameters``, as in file names: ``head.*``, ``*.bias``, ``blocks.11.*``.
    Returns:
        The names of the trainable parameters.
    Raises:
        ConfigError: a pattern fits no parameter; nothing is changed.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [name for name, _ in model.named_parameters()]
    idle = [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]
    if idle or not patterns:
        raise ConfigError(f"{', '.join(idle) or 'An empty list'} fits no parameter; names are like {', '.join(names[-3:])}.")
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return chosen
