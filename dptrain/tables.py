"""Tables for people, made with rich."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dptrain.plan import Plan
    from dptrain.predict import Prediction
    from dptrain.profiling import Profile


def plan_table(plan: Plan, stds: Mapping[str, float] | None = None, attained: Mapping[str, tuple[float, float]] | None = None) -> Any:
    """The explanation of a plan as a rich table.

    Args:
        plan: the plan.
        stds: noise standard deviation per group, added as a column where known.
        attained: group -> largest gradient norm that an attack found, and the bound; added as columns where known.
    Returns:
        A ``rich.table.Table``.
    """
    from rich.table import Table

    clip = f", clipping {plan.clipping}" if plan.clipping else ""
    table = Table(title=f"plan: {plan.strategy}{clip}", title_justify="left")
    for name in ("layer", "kind", "calls"):
        table.add_column(name)
    for name in ("T", "D", "p", "parameters"):
        table.add_column(name, justify="right")
    for name in ("method", "group"):
        table.add_column(name)
    table.add_column("bound", justify="right")
    if stds is not None:
        table.add_column("noise std", justify="right")
    if attained is not None:
        for name in ("attained", "tightness"):
            table.add_column(name, justify="right")
    for layer in plan.layers:
        group = plan.group_of(layer.name)
        row = [layer.name, layer.kind, str(layer.calls)]
        row += [f"{n:,}" for n in (layer.positions, layer.fan_in, layer.fan_out, layer.num_params)]
        row += [plan.norms[layer.name], group.name, f"{group.norm_bound:.6g}"]
        row += [f"{stds[group.name]:.6g}"] if stds is not None else []
        if attained is not None:
            found, claimed = attained[group.name]
            row += [f"{found:.6g}", f"{found / claimed:.3f}"]
        table.add_row(*row)
    total = sum(layer.num_params for layer in plan.layers)
    table.caption = f"{len(plan.layers)} layers, {total:,} trainable parameters, {len(plan.groups)} group(s)"
    return table


def cost_table(found: Prediction) -> Any:
    """Predicted time and memory per layer and norm method as a rich table; the plan's methods have a star.

    Args:
        found: the prediction.
    Returns:
        A ``rich.table.Table``.
    """
    from rich.table import Table

    table = Table(title=f"predicted for a physical batch of {found.batch}: not a promise, see dptrain compare", title_justify="left")
    table.add_column("layer")
    ways = [way for way in ("ghost", "instantiate") if any(way in layer.seconds for layer in found.layers)]
    for name in ("plain ms", *(f"{way} ms" for way in ways), "plain MiB", *(f"{way} MiB" for way in ways)):
        table.add_column(name, justify="right")

    def cell(values: Mapping[Any, float], way: str, scale: float, chosen: str) -> str:
        return f"{values[way] * scale:,.2f}{'*' if way == chosen else ' '}" if way in values else ""

    for layer in found.layers:
        row = [layer.name, f"{layer.plain_seconds * 1e3:,.2f}", *(cell(layer.seconds, way, 1e3, layer.method) for way in ways)]
        row += [f"{layer.plain_bytes / 2**20:,.2f}", *(cell(layer.bytes, way, 2**-20, layer.method) for way in ways)]
        table.add_row(*row)
    step = f"a step {found.seconds * 1e3:,.0f} ms, {found.ratio:.2f} times a plain one; "
    table.caption = step + f"peak memory {found.bytes / 2**20:,.0f} MiB, {found.memory_ratio:.2f} times the plain one"
    return table


def profile_table(profile: Profile) -> Any:
    """Where a step went, as a rich table.

    Args:
        profile: what was measured.
    Returns:
        A ``rich.table.Table``.
    """
    from rich.table import Table

    found = profile.figures()
    spent = found["milliseconds"]
    total = sum(spent.values())
    table = Table(title="where a step goes (not private)", title_justify="left")
    table.add_column("phase")
    table.add_column("ms per step", justify="right")
    table.add_column("share", justify="right")
    for name, value in spent.items():
        table.add_row(name, f"{value:,.2f}", f"{value / total:.1%}")
    steps = f"mean of {found['steps']} steps, the first one left out" if found["steps"] else "too few steps: the first one is left out"
    table.caption = f"{total:,.2f} ms per step, {steps}"
    return table


def render(table: Any, width: int = 140) -> str:
    """A rich renderable as plain text.

    Args:
        table: the renderable.
        width: characters per line.
    Returns:
        The text, without colours.
    """
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=width, no_color=True, highlight=False).print(table)
    return buffer.getvalue().rstrip()
