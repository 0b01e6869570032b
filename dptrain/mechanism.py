"""The Gaussian mechanism: from one noise multiplier and a plan's bounds to a standard deviation per group, and to the event.

All groups are released together, so the release is ONE Gaussian mechanism (math.md section 1): whitened by the standard
deviations ``s_k`` its L2 sensitivity is ``sqrt(sum_k (Delta_k / s_k)^2)``, and

    sigma = ( sum_k (Delta_k / s_k)^2 )^(-1/2)                                                                       (1)

is what users call ``noise_multiplier`` and all that the accountant sees. Treating the groups as separate events would
under-report (accounting.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from accounting import GaussianEvent, NeighboringRelation
from dptrain.errors import ConfigError
from dptrain.plan import Group, Plan
from dptrain.randomness import NoiseKind as NoiseKind
from dptrain.sampling import Sampler, event_of

Allocation = Literal["global", "per_group", "min_noise"]

# Norms and sums are computed in floating point, so an example may contribute slightly more than its bound. The event that
# is recorded claims a noise multiplier smaller by this relative margin, which pays for an excess of the bound up to it. The
# backends make sure that their rounding stays below: norms are accumulated in float32 or wider, and a ghost norm that cancels so
# strongly that this might fail is rounded up (see ``rules.py`` in either backend).
FLOAT_MARGIN = 1e-4

# Secure noise rounds the sums of group k to a lattice of spacing g_k = 2^-32 s_k, by which its sensitivity grows by up to 5/4 g_k sqrt(d_k)
# (equation (1) of lattice.py). Whitened as in (1) above, the joint sensitivity is then at most
#     sqrt( sum_k ( (1 + FLOAT_MARGIN) Delta_k / s_k + 5/4 2^-32 sqrt(d_k) )^2 )  <=  (1 + FLOAT_MARGIN) / sigma + 5/4 2^-32 sqrt(d)
# by the triangle inequality, d the number of parameters, whatever the groups. What is paid is the last term at its largest, 1.9e-5, so
# that an event depends on the noise alone and is known before the model is.
LATTICE_PARAMETERS = 2**32
LATTICE_MARGIN = 1.25 * 2.0**-32 * math.sqrt(LATTICE_PARAMETERS)
LATTICE_SHARE = 0.1  # the largest part of the whitened sensitivity that rounding may make up; beyond, secure noise is refused


def sensitivity(group: Group, relation: NeighboringRelation | str = NeighboringRelation.add_remove) -> float:
    """L2 sensitivity of a group's sum under a neighbouring relation.

    Args:
        group: the group, with its bound.
        relation: replacing an example moves the sum by up to twice the bound; adding, removing or zeroing one by the bound.
    Returns:
        Delta_k.
    Source: math.md section 6. This is the only place where a relation becomes a factor.
    """
    return group.norm_bound * (2.0 if NeighboringRelation(relation) is NeighboringRelation.replace_one else 1.0)


@dataclass(frozen=True)
class GaussianMechanism:
    """Shares the noise among the groups of a plan.

    Args:
        noise_multiplier: sigma, the standard deviation of the noise over the sensitivity of the joint release.
        allocation: ``global`` (one standard deviation for all), ``per_group`` (in proportion to each bound), or
            ``min_noise`` (least total noise energy).
        weights: group name, or a pattern of names, -> factor of its noise relative to the allocation (LipDP's ``nm_coef``). All
            standard deviations are then rescaled together, so that weights move noise between groups and never change sigma.
    """

    noise_multiplier: float
    allocation: Allocation = "global"
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sigma = self.noise_multiplier
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not (math.isfinite(sigma) and sigma > 0):
            raise ConfigError(f"noise_multiplier must be a finite number above 0, not {sigma!r}; to train without noise use non_private.")
        if self.allocation not in ("global", "per_group", "min_noise"):
            raise ConfigError(f"There is no noise allocation {self.allocation!r}; choose global, per_group or min_noise.")
        bad = {name: w for name, w in self.weights.items() if not (math.isfinite(w) and w > 0)}
        if bad:
            raise ConfigError(f"Noise weights must be finite and above 0, not {bad}; a group without noise would not be private.")

    def stds(self, plan: Plan, relation: NeighboringRelation | str = NeighboringRelation.add_remove) -> dict[str, float]:
        """Noise standard deviation of each group's sum.

        Args:
            plan: a plan whose groups all have finite bounds.
            relation: the neighbouring relation.
        Returns:
            Group name -> standard deviation, in the units of the gradient sum.
        Raises:
            ConfigError: a group has no finite bound, or a weight matches no group.
        Guarantee: equation (1) holds with equality for the returned values: the gradients' terms add up to ``(1 - share) / sigma^2``
            and the released count's is ``share / sigma^2``.
        Source: math.md section 1.
        """
        bad = [g.name for g in plan.groups if not (math.isfinite(g.norm_bound) and g.norm_bound > 0)]
        if bad:
            raise ConfigError(f"The groups {bad} of strategy {plan.strategy!r} have no finite bound, so no noise can make them private.")
        unused = [pattern for pattern in self.weights if not any(fnmatchcase(g.name, pattern) for g in plan.gradient_groups)]
        if unused:
            names = ", ".join(g.name for g in plan.gradient_groups)
            raise ConfigError(f"The noise weights {unused} match no group; the groups are {names}.")
        delta = {g.name: sensitivity(g, relation) for g in plan.groups}
        shares = {g.name: g.share for g in plan.groups if g.share is not None}
        sigma = float(self.noise_multiplier)
        found = {name: sigma * delta[name] / math.sqrt(share) for name, share in shares.items()}
        raw = {g.name: self._raw(g, delta[g.name]) for g in plan.gradient_groups}
        whitened = math.sqrt(math.fsum((delta[name] / value) ** 2 for name, value in raw.items()))
        scale = sigma / math.sqrt(1.0 - math.fsum(shares.values())) * whitened
        return {g.name: found[g.name] if g.name in found else raw[g.name] * scale for g in plan.groups}

    def _raw(self, group: Group, delta: float) -> float:
        """A group's standard deviation up to the common factor."""
        base = {"global": 1.0, "per_group": delta, "min_noise": math.sqrt(delta / math.sqrt(max(1, group.num_params)))}[self.allocation]
        return base * next((w for pattern, w in self.weights.items() if fnmatchcase(group.name, pattern)), 1.0)


def effective_noise_multiplier(
    plan: Plan, stds: Mapping[str, float], relation: NeighboringRelation | str = NeighboringRelation.add_remove
) -> float:
    """Equation (1): the noise multiplier of the joint release with given standard deviations.

    Args:
        plan: the plan with the groups' bounds.
        stds: group name -> standard deviation.
        relation: the neighbouring relation.
    Returns:
        sigma.
    """
    return 1.0 / math.sqrt(math.fsum((sensitivity(g, relation) / stds[g.name]) ** 2 for g in plan.groups))


def release_event(
    plan: Plan,
    stds: Mapping[str, float],
    sampling: Sampler | float,
    relation: NeighboringRelation | str = NeighboringRelation.add_remove,
    noise: NoiseKind = "fast",
) -> GaussianEvent:
    """The event of one release, from the very standard deviations that are used; planner and ledger both come here.

    Args:
        plan: the plan.
        stds: noise standard deviation per group.
        sampling: the sampler, from which alone follows what its batches are to an accountant; or the rate of Poisson samples.
        relation: the neighbouring relation.
        noise: how the noise is made.
    Returns:
        The event to record, its noise multiplier reduced by what rounding takes.
    Raises:
        ConfigError: secure noise for more parameters, or at a larger noise multiplier, than is paid for; an unknown sampler.
    Guarantee: upper bounds on epsilon computed from this event hold for the floating-point release.
    Source: math.md equation (1); for secure noise, equation (1) of ``lattice.py``.
    """
    size = sum(group.num_params for group in plan.groups)
    if noise == "secure" and size > LATTICE_PARAMETERS:
        raise ConfigError(
            f"The plan has {size:,} parameters, and secure noise pays for the rounding of {LATTICE_PARAMETERS:,}; freeze some of them, or "
            "set privacy.noise to fast."
        )
    return event_of(sampling, event_noise_multiplier(effective_noise_multiplier(plan, stds, relation), noise), relation)


def event_noise_multiplier(noise_multiplier: float, noise: NoiseKind = "fast") -> float:
    """What is claimed of a noise multiplier after paying for rounding.

    The result is rounded to 12 digits, downwards, so that equal settings make equal events on every machine and allocation.

    Args:
        noise_multiplier: sigma.
        noise: how the noise is made.
    Returns:
        ``1 / ((1 + FLOAT_MARGIN) / sigma)``, and with secure noise ``1 / ((1 + FLOAT_MARGIN) / sigma + LATTICE_MARGIN)``.
    Raises:
        ConfigError: sigma is so large that the rounding of secure noise would be a material part of it.
    Guarantee: at most the noise over the sensitivity of what is really released, for up to ``LATTICE_PARAMETERS`` parameters.
    """
    claimed = noise_multiplier / (1.0 + FLOAT_MARGIN)
    if noise == "secure":
        claimed /= 1.0 + _lattice_share(claimed)
    if claimed < 1e-200:  # the power below would overflow; no accountant speaks of so little noise
        return claimed
    scale = 10.0 ** (11 - math.floor(math.log10(claimed)))
    return math.floor(claimed * scale * (1.0 - 1e-13)) / scale


def _lattice_share(noise_multiplier: float) -> float:
    """The rounding of secure noise as a part of the sensitivity."""
    share = LATTICE_MARGIN * noise_multiplier
    if share > LATTICE_SHARE:
        raise ConfigError(
            f"At a noise multiplier of {noise_multiplier:g} the rounding of secure noise would take {share:.0%} of it; lower it to at most "
            f"{LATTICE_SHARE / LATTICE_MARGIN:.0f}, or set privacy.noise to fast."
        )
    return share


def noise_multiplier_for(claimed: float, noise: NoiseKind = "fast") -> float:
    """The inverse of ``event_noise_multiplier``, rounded up: noise that supports a claim.

    Args:
        claimed: noise multiplier that the accountant asked for.
        noise: how the noise is made.
    Returns:
        A noise multiplier whose event claims at least that much.
    Raises:
        ConfigError: the claim is so large that the rounding of secure noise would be a material part of it.
    """
    value = claimed * (1.0 + FLOAT_MARGIN)
    if noise == "secure":
        value /= 1.0 - _lattice_share(claimed)
    while event_noise_multiplier(value, noise) < claimed:
        value *= 1.0 + 1e-12
    return value
