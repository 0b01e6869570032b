"""Recurrent layers: the cotangents of their gates, from which the uses of all their weights follow as those of linear layers do.

A recurrent layer is a linear map of ``[x_t, h_{t-1}]`` at each time, with elementwise functions after it. What those maps receive is
known once the layer has run again, all gates of one direction at once; their cotangents come from one loop backwards in time, in which
only ``dh`` and ``dc`` are carried. Per-sample gradients are then ``sum_t dz_t [x_t, h_{t-1}]^T``, with ghost norms and all, where
``vmap`` cannot enter the kernel and plain autograd runs once per example. The layers below get their cotangents from the same loop, so
that torch's own backward pass through the layer is not run at all (``Carried``): it was a fifth of an LSTM's step, a third of a GRU's.

Shapes: T times, B examples, D inputs, H units, P of the state that is fed back (H unless it is projected), k gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dptrain_torch.uses import DirectUse, Grams, LinearUse, Use, wide

LAYERS: tuple[type[nn.Module], ...] = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


class Pass(NamedTuple):
    """One direction of one layer, run again."""

    x: Tensor  # [T, B, D]
    states: list[Tensor]  # the states that each time began with [T, B, P]; of an LSTM its first cell state [B, H]
    weights: Mapping[str, Tensor]  # role -> value: weight_ih [kH, D], weight_hh [kH, P], bias_ih, bias_hh [kH], weight_hr [P, H]
    after: Tensor | None = None  # the state that each time ended with [T, B, P], where it is known

    @property
    def before(self) -> Tensor:
        """The state that each time began with, ``[T, B, P]``."""
        return self.states[0]


class Given(NamedTuple):
    """Cotangents of what a direction put out."""

    out: Tensor  # [T, B, P], the states
    state: Tensor | float  # [B, P], the last state
    memory: Tensor | float = 0.0  # [B, H], the last cell state


class Found(NamedTuple):
    """Cotangents of the linear maps and of the first states, and what a projection of the state met."""

    inputs: Tensor  # [T, B, kH], of W_ih x + b_ih
    states: Tensor  # [T, B, kH], of W_hh h + b_hh
    first: tuple[Any, ...]  # of the states before the first time, [B, P], and [B, H] of an LSTM's cell
    projection: tuple[Tensor, Tensor] | None = None  # its input [T, B, H] and cotangent [T, B, P]


# --- cells ------------------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weights: Mapping[str, Tensor], role: str) -> Tensor:
    """The map ``ih`` or ``hh`` at all times at once."""
    out, bias = x @ weights[f"weight_{role}"].t(), weights.get(f"bias_{role}")
    return out if bias is None else out.add_(bias)


def lstm(run: Pass, given: Given) -> Found:
    """``c' = f c + i g``, ``h' = o tanh(c')``, projected where there is ``weight_hr``."""
    gates = linear(run.x, run.weights, "ih").add_(linear(run.before, run.weights, "hh"))
    g = gates.unflatten(2, (4, -1))[:, :, 2].tanh()
    i, f, _, o = gates.sigmoid_().unflatten(2, (4, -1)).unbind(2)
    cells = torch.cat([run.states[1].unsqueeze(0), i * g])  # [1 + T, B, H]
    for t in range(len(f)):
        cells[t + 1].addcmul_(f[t], cells[t])
    after = cells[1:].tanh()
    slopes = [g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g)]  # of the cell state, in each gate but the last
    from_cell = torch.stack(slopes, 2)
    from_state, into_cell = after * o * (1 - o), o * (1 - after * after)
    project, back = run.weights.get("weight_hr"), run.weights["weight_hh"]
    dz = torch.empty_like(gates)
    split = dz.unflatten(2, (4, -1))
    dh, dc, states = given.state, given.memory, []
    for t in range(len(dz) - 1, -1, -1):
        dh = given.out[t] + dh
        states.append(dh)
        full = dh if project is None else dh @ project
        dc = torch.addcmul(dc, full, into_cell[t]) if isinstance(dc, Tensor) else full * into_cell[t]
        torch.mul(from_cell[t], dc.unsqueeze(1), out=split[t, :, :3])
        torch.mul(from_state[t], full, out=split[t, :, 3])
        dc, dh = dc * f[t], dz[t] @ back
    return Found(dz, dz, (dh, dc), None if project is None else (o * after, torch.stack(states[::-1])))


def gru(run: Pass, given: Given) -> Found:
    """``n = tanh(i_n + r h_n)``, ``h' = (1 - z) n + z h``."""
    hidden = linear(run.before, run.weights, "hh").unflatten(2, (3, -1))
    inputs = linear(run.x, run.weights, "ih").unflatten(2, (3, -1))
    r, z = (inputs[:, :, :2] + hidden[:, :, :2]).sigmoid_().unbind(2)
    n = (inputs[:, :, 2] + r * hidden[:, :, 2]).tanh_()
    new = (1 - z) * (1 - n * n)
    kept = new * r
    slopes = torch.stack([new * hidden[:, :, 2] * r * (1 - r), (run.before - n) * z * (1 - z), new], 2)  # of each gate in h'
    into = torch.stack([slopes[:, :, 0], slopes[:, :, 1], kept], 2)
    back = run.weights["weight_hh"]
    total, dh = torch.empty_like(z), given.state
    for t in range(len(z) - 1, -1, -1):
        dh = torch.add(given.out[t], dh, out=total[t])
        dh = torch.addmm(dh * z[t], (into[t] * dh.unsqueeze(1)).flatten(1), back)
    return Found((slopes * total.unsqueeze(2)).flatten(2), (into * total.unsqueeze(2)).flatten(2), (dh,))


def simple(act: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Callable[[Pass, Given], Found]:
    """``h' = act(z)``, from the slope of the activation where it gave h'.

    From h' itself, not from z computed again: of a ReLU, rounding could turn a slope of 1 into 0.
    """

    def cell(run: Pass, given: Given) -> Found:
        h = run.after
        if h is None:
            h = act(linear(run.x, run.weights, "ih").add_(linear(run.before, run.weights, "hh")))
        slopes = slope(h)
        dz, dh = torch.empty_like(slopes), given.state
        for t in range(len(dz) - 1, -1, -1):
            dh = torch.mul(given.out[t] + dh, slopes[t], out=dz[t]) @ run.weights["weight_hh"]
        return Found(dz, dz, (dh,))

    return cell


CELLS: Mapping[str, Callable[[Pass, Given], Found]] = {
    "lstm": lstm,
    "gru": gru,
    "rnn_tanh": simple(torch.tanh, lambda h: 1 - h.square()),
    "rnn_relu": simple(torch.relu, lambda h: (h > 0).to(h.dtype)),
}


def cell_of(module: nn.Module) -> str:
    """Name of the cell in ``CELLS``, and of the function of torch that runs it over a sequence."""
    if isinstance(module, nn.RNN | nn.RNNCell):
        return f"rnn_{module.nonlinearity}"
    return "lstm" if isinstance(module, nn.LSTM | nn.LSTMCell) else "gru"


# --- layers -----------------------------------------------------------------------------------------------------------------


def is_recurrent(module: nn.Module) -> bool:
    """Whether the uses of a module are found here: torch's own class, run as it stands, without dropout inside."""
    kind = next((cls for cls in LAYERS if isinstance(module, cls)), None)
    if kind is None or is_parametrized(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    inactive = not module.training or not float(getattr(module, "dropout", 0.0))
    return getattr(type(module), "forward", None) is getattr(kind, "forward", None) and inactive


def recurrent_facts(module: Any, x: Tensor) -> dict[str, Any] | None:
    """Facts for the planner: every direction of every layer is a linear map of ``[x, h]``; None for inputs that have no batch axis."""
    single = isinstance(module, nn.RNNCellBase)
    if x.dim() != (2 if single else 3):
        return None
    maps = [(w, getattr(module, name.replace("_ih", "_hh"))) for name, w in module.named_parameters() if name.startswith("weight_ih")]
    gates = sum(len(w) for w, _ in maps)
    size = sum(w.numel() + v.numel() for w, v in maps)
    positions = 1 if single else x.shape[1 if module.batch_first else 0]
    return {"positions": positions, "fan_in": size // gates, "fan_out": gates}


def weights_of(module: nn.Module, suffix: str) -> dict[str, Tensor]:
    """Role -> value of one direction of one layer."""
    found = {role: getattr(module, role + suffix, None) for role in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")}
    return {role: wide(value.detach()) for role, value in found.items() if isinstance(value, Tensor)}


Cotangents = Sequence[Tensor | None]
Back = Callable[[list[Tensor | None], Sequence[bool]], Sequence[Tensor | None]]  # cotangents, which inputs need one -> theirs
Uses = tuple[dict[str, Use], list[Tensor]]


def tensors_given(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
    """The input and the first states that a recurrent module was called with; None for inputs without a batch axis, or packed."""
    x = args[0] if args else kwargs.get("input")
    hx = args[1] if len(args) > 1 else kwargs.get("hx")
    if not isinstance(x, Tensor) or x.dim() != (2 if isinstance(module, nn.RNNCellBase) else 3):
        return None
    return [x, *(() if hx is None else hx if isinstance(hx, tuple | list) else (hx,))]


def recurrent_uses(
    module: Any, args: Sequence[Any], kwargs: Mapping[str, Any], cotangents: Cotangents, result: Tensor | None = None
) -> Uses | None:
    """The uses of every parameter of a recurrent module, and the cotangents of what it was called with.

    Args:
        module: one for which ``is_recurrent`` holds.
        args, kwargs: what it was called with.
        cotangents: of the tensors that it returned, in order; None where the loss does not depend on one.
        result: the first of those tensors; None where it is not known any more.
    Returns:
        Relative name -> use, and cotangents of the input and of the first states; None for inputs that have no batch axis, or are packed.
    """
    tensors = tensors_given(module, args, kwargs)
    if tensors is None:
        return None
    x, *hx = tensors
    single = isinstance(module, nn.RNNCellBase)
    given = [None if g is None else wide(g) for g in cotangents]
    x = wide(x.detach())
    if single:
        return cell_uses(module, x, states_of(module, x, hx, (len(x),)), given, None if result is None else wide(result))
    known = None if result is None else wide(result)
    if module.batch_first:
        x, known = x.transpose(0, 1), None if known is None else known.transpose(0, 1)
    count = module.num_layers * (2 if module.bidirectional else 1)
    return layers_uses(module, x, states_of(module, x, hx, (count, x.shape[1])), given, known)


def states_of(module: Any, x: Tensor, hx: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
    """The states that a module began with, zeros where none were given: h, and c of an LSTM."""
    if hx:
        return [wide(s.detach()) for s in hx]
    sizes = [getattr(module, "proj_size", 0) or module.hidden_size, module.hidden_size]
    return [x.new_zeros(*shape, size) for size in sizes[: 2 if cell_of(module) == "lstm" else 1]]


def cell_uses(module: Any, x: Tensor, states: list[Tensor], given: Cotangents, known: Tensor | None) -> Uses:
    """A cell is a sequence of one time."""
    before, after = [s if i else s.unsqueeze(0) for i, s in enumerate(states)], None if known is None else known.unsqueeze(0)
    run = Pass(x.unsqueeze(0), before, weights_of(module, ""), after)
    last = [0.0 if g is None else g for g in given]
    found = CELLS[cell_of(module)](run, Given(torch.zeros_like(run.before), *last))
    return named(run, found, ""), [found.inputs[0] @ run.weights["weight_ih"], *found.first]


def layers_uses(module: Any, x: Tensor, states: list[Tensor], given: Cotangents, known: Tensor | None) -> Uses:
    """Every layer forward once more, but for the last, whose states are known; then every layer backward."""
    name, sides = cell_of(module), 2 if module.bidirectional else 1
    runs: list[Pass] = []
    for layer in range(module.num_layers):
        outs = []
        for side in range(sides):
            own, weights = [s[layer * sides + side] for s in states], weights_of(module, suffix_of(layer, side))
            out = known.chunk(sides, 2)[side] if known is not None and layer == module.num_layers - 1 else None
            out = out.flip(0) if out is not None and side else out
            run, after = forward(name, x.flip(0) if side else x, own, weights, out)
            runs.append(run)
            outs.append(after.flip(0) if side else after)
        x = torch.cat(outs, 2) if sides > 1 else outs[0]
    top, *last = given
    d = torch.zeros_like(x) if top is None else top.transpose(0, 1) if module.batch_first else top
    uses: dict[str, Use] = {}
    first: dict[int, tuple[Tensor, ...]] = {}
    for layer in range(module.num_layers - 1, -1, -1):
        parts: list[Tensor] = []
        for side, part in enumerate(d.chunk(sides, 2)):
            index = layer * sides + side
            ends = [0.0 if g is None else g[index] for g in last]
            found = CELLS[name](runs[index], Given(part.flip(0) if side else part, *ends))
            uses |= named(runs[index], found, suffix_of(layer, side))
            first[index] = found.first
            dx = found.inputs @ runs[index].weights["weight_ih"]
            parts.append(dx.flip(0) if side else dx)
        d = sum(parts[1:], parts[0])
    states_given = [torch.stack(state) for state in zip(*(first[i] for i in range(len(runs))), strict=True)]
    return uses, [d.transpose(0, 1) if module.batch_first else d, *states_given]


class Carried(torch.autograd.Function):
    """What a recurrent module put out, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, values: Sequence[Tensor], back: Back, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The values as they are; ``back`` turns their cotangents into those of the inputs."""
        ctx.back = back
        ctx.set_materialize_grads(False)
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        return None, None, *ctx.back(list(cotangents), ctx.needs_input_grad[2:])


def suffix_of(layer: int, side: int) -> str:
    """What torch calls the parameters of one direction of one layer."""
    return f"_l{layer}" + ("_reverse" if side else "")


def forward(name: str, x: Tensor, states: list[Tensor], weights: dict[str, Tensor], out: Tensor | None) -> tuple[Pass, Tensor]:
    """One direction of one layer: what its maps received, and its states ``[T, B, P]``, by torch's own kernel where they are not known."""
    first = [s.unsqueeze(0) for s in states]
    settings = ("bias_ih" in weights, 1, 0.0, False, False, False)  # one layer, no dropout, one direction, time first
    if out is None:
        out = getattr(torch, name)(x, first if name == "lstm" else first[0], list(weights.values()), *settings)[0]
    return Pass(x, [torch.cat([first[0], out[:-1]]), *states[1:]], weights, out), out


def named(run: Pass, found: Found, suffix: str) -> dict[str, Use]:
    """Relative name -> use, for the parameters of one direction."""
    uses: dict[str, Use] = {}
    pair = Grams() if found.inputs is found.states else None
    for role, met, g in (("ih", run.x, found.inputs), ("hh", run.before, found.states)):
        uses[f"weight_{role}{suffix}"] = LinearUse(met.transpose(0, 1), g.transpose(0, 1), pair=pair)
        uses[f"bias_{role}{suffix}"] = DirectUse(g.sum(0))
    if found.projection is not None:
        met, g = found.projection
        uses[f"weight_hr{suffix}"] = LinearUse(met.transpose(0, 1), g.transpose(0, 1))
    return uses
