"""Private training in a loop of the user's own: ``PrivacyEngine`` and its loader.

The user calls the model and gives per-example losses to ``optimizer.step``; everything from there on is the trainer's: the sum of bounded
gradients (``gradients.py``), the release (``dptrain.step.Update``), noise and accounting. There is no second implementation of any of it.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from accounting import NeighboringRelation, PrivacyLedger
from dptrain.budget import Budget, Schedule
from dptrain.config import Performance, Privacy
from dptrain.errors import ConfigError, RunError, UnsupportedModelError
from dptrain.inforce import PlanInForce
from dptrain.mechanism import release_event
from dptrain.migration import understood
from dptrain.plan import Plan
from dptrain.randomness import NOISE, NoiseKind, RandomKey
from dptrain.sampling import MOST, check_physical_batch_size
from dptrain.step import Release, Update
from dptrain.strategies import SensitivityStrategy
from dptrain_torch import checks, engine, gradients, graph
from dptrain_torch.backend import TorchBackend
from dptrain_torch.describe import SIZES, arguments_of, facts_of_calls
from dptrain_torch.describe import probe as probe_calls
from dptrain_torch.fitting.first_step import check_coupling, check_first_step
from dptrain_torch.fitting.loader import Ticket, private_loader
from dptrain_torch.fitting.optimizers import Inner, Late
from dptrain_torch.fitting.promise import Promise
from dptrain_torch.fitting.refusals import check_optimizer, refuse_wrappers
from dptrain_torch.fitting.watching import Recording, Watching
from dptrain_torch.hooks import FIRST_CALLS, find_units


class PrivacyEngine(Promise, Watching):
    """Makes an optimizer's steps private.

        engine = PrivacyEngine(model, sample_size=len(data), expected_batch_size=256, epochs=3, target_epsilon=3, max_grad_norm=0.1)
        engine.attach(optimizer)
        for x, y in engine.loader(data):
            optimizer.step(loss=F.cross_entropy(model(x), y, reduction="none"))

    Args:
        module: any module; the trainable parameters are those with ``requires_grad``.
        sample_size: N, number of training examples, a public constant.
        expected_batch_size: q N; ``batch_size`` is the same. Or ``sample_rate``: q.
        epochs: expected passes over the data; or ``steps``.
        target_epsilon: budget; or ``noise_multiplier``: sigma, standard deviation of the noise over the sensitivity of the joint release.
        target_delta: by default the smaller of 1e-5 and ``1 / (2 N)``.
        strategy: ``mixed_ghost`` (default), ``ghost``, ``per_sample``, ``clipless``, ``non_private``, or a strategy object.
        max_grad_norm: C, the L2 bound on one example's gradient.
        sampling: ``poisson`` with ``engine.loader``, or ``shuffle`` for a shuffled loader of your own, which claims no amplification.
        physical_batch_size: examples processed at once by ``engine.loader``; by default nearly every logical batch whole.
        accountant, relation, allocation, noise_weights, noise, unsafe_seed: as in ``dptrain.Privacy``.
        ledger: where releases are recorded: a ``PrivacyLedger``, the path of one, which is continued if it exists, or None for memory.
        probe: a small batch of inputs, on which the model is validated here and now; without it that happens at the first step.
        loss: for ``clipless``, a loss of ``dptrain_torch.get_loss``, or the Lipschitz constant of your own per-example loss.
        ghost_clipping, mixed, clip_function, accounting_mode: as in private_vision.
        settings: further fields of the strategy.
    Raises:
        ConfigError, UnsupportedModelError: anything wrong with the settings or the model.
        AccountingError: the budget cannot be reached.
    Guarantee: the weights at any time are post-processing of the releases in ``ledger``, from which alone epsilon is computed. With
        ``poisson`` batches come from ``engine.loader``; with ``shuffle`` either passes go through it too, or the guarantee rests on your
        loader giving each example at most once per pass, and on every pass being run to its end.
    Source: ``dptrain/step.py``.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        sample_size: int,
        expected_batch_size: float | None = None,
        batch_size: float | None = None,
        sample_rate: float | None = None,
        epochs: float | None = None,
        steps: int | None = None,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        target_delta: float | None = None,
        strategy: str | SensitivityStrategy | None = None,
        max_grad_norm: float | None = None,
        sampling: Literal["poisson", "shuffle"] = "poisson",
        physical_batch_size: int | None = None,
        accountant: Literal["prv", "rdp"] | None = None,
        relation: NeighboringRelation | str = NeighboringRelation.add_remove,
        allocation: str = "global",
        noise_weights: Mapping[str, float] | None = None,
        noise: NoiseKind = "fast",
        unsafe_seed: int | None = None,
        ledger: PrivacyLedger | str | Path | None = None,
        probe: Any = None,
        loss: Any = None,
        **settings: Any,
    ) -> None:
        if expected_batch_size is not None and batch_size is not None:
            raise ConfigError("batch_size and expected_batch_size are the same; give one.")
        old = understood(settings, strategy, max_grad_norm, accountant)
        self.strategy, self.loss_constant = old.strategy, loss
        batch = expected_batch_size if expected_batch_size is not None else batch_size
        schedule = Schedule.make(sample_size, batch, sample_rate, epochs, steps, sampling)
        self.physical_batch_size = check_physical_batch_size(physical_batch_size)
        budget: Budget | None = None
        if self.strategy.name != "non_private":
            delta = min(1e-5, 1 / (2 * sample_size)) if target_delta is None else target_delta
            privacy = Privacy.model_validate(
                {
                    "target_epsilon": as_float(target_epsilon), "noise_multiplier": as_float(noise_multiplier), "target_delta": delta,
                    "accountant": old.accountant, "relation": relation, "allocation": allocation,
                    "noise_weights": dict(noise_weights or {}), "noise": noise, "unsafe_seed": unsafe_seed,
                }
            )  # fmt: skip
            budget = Budget(privacy, schedule, ledger)
        Promise.__init__(self, schedule, budget)
        self.unsafe_seed = unsafe_seed
        refuse_wrappers(module)
        self.backend = TorchBackend(Performance(device="cpu"))  # only its functions on tensors, wherever those are
        Watching.__init__(self, module, find_units(module))
        if not self.units:
            raise UnsupportedModelError(["no parameter is trainable; unfreeze a layer."])
        self.optimizer: torch.optim.Optimizer | None = None
        self.plan: Plan | None = None
        self.last_stats: dict[str, float] = {}
        self.stepped = False
        self._update: Update | None = None
        self._in_force: PlanInForce | None = None
        self._certified: dict[str, np.ndarray] = {}
        self._names = {name: id(p) for name, p in gradients.trainable(module).items()}
        self._noise_key = RandomKey.make(NOISE, unsafe_seed)
        self.sampling_key: RandomKey | None = None
        self._pass = 0
        self.drawn = 0  # logical batches drawn by loaders
        self._ticket: Ticket | None = None
        self._served = False  # whether the ticket was used
        self._total: gradients.Grads | None = None
        self._count = 0
        self._position = 0  # examples since the start of a pass, with shuffle
        self._widest = 0
        if self.strategy.proves and probe is None:
            raise ConfigError("Strategy clipless proves its bounds from the model's graph: give probe, a small batch of inputs.")
        if probe is not None:
            self._validate(probe)

    def __repr__(self) -> str:
        return f"PrivacyEngine({type(self.module).__name__}, {self.strategy.name}: {self.statement()})"

    # --- attaching ---
    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimizer ``step(loss=...)`` and ``virtual_step(loss=...)``, and start watching the model.

        Args:
            optimizer: any torch optimizer that steps without a closure, over all trainable parameters of the model and no others.
        Raises:
            ConfigError: it is another kind, or holds other parameters.
        """
        if self.optimizer is not None or hasattr(optimizer, "privacy_engine"):
            raise ConfigError("An engine is attached already; detach it first.")
        check_optimizer(self.module, optimizer)
        original = optimizer.step

        def step(_self: Any, closure: Any = None, *, loss: Tensor | None = None) -> None:
            self._take_in(loss, closure, last=True)

        def virtual_step(_self: Any, *, loss: Tensor | None = None) -> None:
            self._take_in(loss, None, last=False)

        if hasattr(original, "_wrapped_by_lr_sched"):  # a scheduler counts the steps of the optimizer, and ours calls its own
            step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        shadow: Any = optimizer
        self._original = original if "step" in vars(optimizer) else None
        shadow.step, shadow.virtual_step = types.MethodType(step, optimizer), types.MethodType(virtual_step, optimizer)
        shadow.privacy_engine, shadow.get_privacy_spent = self, self.get_privacy_spent
        self.optimizer = optimizer
        self._inner = Inner(optimizer, original)
        self._handles = [self._watch()]

    def detach(self) -> None:
        """Leave model and optimizer as they were; a partial logical batch is discarded. The ledger stays."""
        self.discard()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.optimizer is not None:
            shadow: Any = self.optimizer
            for name in ("step", "virtual_step", "privacy_engine", "get_privacy_spent"):
                vars(shadow).pop(name, None)
            if self._original is not None:
                shadow.step = self._original
        self.optimizer = None

    # --- the loader ---
    def loader(self, data: Any, *, physical_batch_size: int | None = None, **options: Any) -> Any:
        """Batches to train on.

        With ``poisson``: each logical batch draws every example independently with probability q, split into physical batches of one
        fixed size, the last one padded; the engine gives padding weight 0, and noise is added once per logical batch. One pass of a ``for``
        loop is an expected pass over the data; it ends early when the planned steps are used up.

        With ``shuffle``: the passes of a ``DataLoader`` of your own, as they are.

        Args:
            data: a map-style data set, or a ``DataLoader`` over one, whose data set, collate function and workers are taken over.
            physical_batch_size: B; by default the engine's.
            options: of ``torch.utils.data.DataLoader``: ``num_workers``, ``collate_fn``, ``pin_memory`` and so on.
        Returns:
            An iterable; each pass draws anew.
        Raises:
            ConfigError: the data set has another size than ``sample_size``, no size, or a sampler of its own.
        """
        return private_loader(self, data, self.physical_batch_size if physical_batch_size is None else physical_batch_size, options)

    def arrive(self, ticket: Ticket) -> None:
        """A physical batch is about to be handed out."""
        self.check_origin(ticket.origin)
        self.check_served()
        self._ticket, self._served, self._recording = ticket, False, None

    def check_served(self) -> None:
        """Refuse to go on after a batch that was handed out and not stepped on.

        Raises:
            RunError: there is one; its logical batch is discarded.
        """
        if self._ticket is not None and not self._served:
            self.discard()
            raise RunError(
                "A batch of engine.loader was not passed to optimizer.step(loss=...); every batch must be, or the noise of its logical "
                "batch would be added to a part of it."
            )

    def new_pass(self, observed: bool = False) -> int:
        """A pass of a loader begins; a partial logical batch of an earlier one is discarded.

        Args:
            observed: whether it is a pass over shuffled data.
        Returns:
            Its number.
        """
        self.discard()
        self._position, self._pass = 0, self._pass + 1
        if observed and self.budget is not None:
            self.budget.new_pass(observed=True)
        return self._pass

    def end_pass(self, origin: int) -> None:
        """A pass over shuffled data has ended, or was left."""
        if origin == self._pass and self.budget is not None:
            self._position = 0
            self.budget.new_pass(observed=False)

    def check_origin(self, origin: int) -> None:
        """Refuse a batch of a pass after which another one was begun: their logical batches would be mixed.

        Raises:
            RunError: it is such a batch.
        """
        if origin != self._pass:
            self.discard()
            raise RunError("Another pass over engine.loader was begun before this one ended; use one at a time.")

    def discard(self) -> None:
        """Forget a partial logical batch; nothing of it was released (pitfalls.md G22)."""
        self._ticket, self._served, self._recording, self._total, self._count = None, False, None, None, 0

    # --- one step ---
    def _take_in(self, loss: Tensor | None, closure: Any, last: bool) -> None:
        """Take in a physical batch, and release if it is the last of its logical batch."""
        self.stepped = False
        if closure is not None:
            raise ConfigError(
                "optimizer.step takes no closure here: it would evaluate the loss again; give loss=..., one value per example."
            )
        recording, mask, last, count = self._admit(loss, last)
        assert loss is not None
        self._same_parameters()
        recording.keep(len(loss))
        grads = self._bounded_sum(recording, loss, mask)
        self._recording, self._served = None, True
        self._total = grads if self._total is None else self.backend.add(self._total, grads)
        self._count += count
        if last:
            self._release()

    def _admit(self, loss: Tensor | None, last: bool) -> tuple[Recording, Tensor, bool, int]:
        """Check a loss against the forward pass and the loader; returns recording, mask, whether the batch ends, its examples."""
        if not isinstance(loss, Tensor) or loss.dim() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UnsupportedModelError([f"optimizer.step needs loss=..., one value per example [B], not {shape}; use reduction='none'."])
        if len(loss) > MOST:  # of a loader of the user's own; the size is public
            raise ConfigError(
                f"A physical batch of {len(loss)} examples is longer than {MOST}, and its sum would round too much; give batches in parts "
                "(engine.loader does), or lower the batch size."
            )
        if not loss.requires_grad or self._recording is None:
            raise UnsupportedModelError(
                ["the loss depends on no trainable parameter, or the model was not called since the last step; call the model that the "
                 "engine was made for, with gradients enabled, and give its loss to optimizer.step."]
            )  # fmt: skip
        recording = self._recording
        if self.schedule.sampling == "shuffle":
            return recording, torch.ones(len(loss), dtype=torch.bool, device=loss.device), self._shuffled(len(loss), last), len(loss)
        if self._ticket is None or self._served:
            raise RunError(
                "This batch does not come from engine.loader(data), so nothing is known of how its examples were chosen; use that loader, "
                "or sampling='shuffle' for a shuffled loader of your own, which claims no amplification by sampling."
            )
        ticket = self._ticket
        if len(loss) != len(ticket.mask):
            raise UnsupportedModelError(
                [f"the loss has {len(loss)} values for a physical batch of {len(ticket.mask)}; give one value per example, padding too."]
            )
        return recording, torch.from_numpy(ticket.mask).to(loss.device), ticket.last, int(ticket.mask.sum())

    def _shuffled(self, size: int, last: bool) -> bool:
        """Count the examples of a pass, and refuse what could hold an example twice."""
        n, limit = self.schedule.num_examples, self.schedule.expected_batch_size
        self._widest = max(self._widest, size)
        whole = n // self._widest * self._widest  # where a loader with drop_last ends its pass
        if self._position >= whole and size != n - self._position:
            if self._total is not None:
                self.discard()
                raise RunError("A logical batch would span two passes over the data and could hold an example twice; step at a pass' end.")
            self._position = 0
        if self._count + size > limit + 1e-9:
            count = self._count + size
            self.discard()
            raise RunError(
                f"A logical batch has {count} examples, more than the expected_batch_size of {limit:g}; raise that, or step earlier."
            )
        self._position += size
        return last

    def _same_parameters(self) -> None:
        """Refuse parameters that were frozen or unfrozen since the plan was made (pitfalls.md G4)."""
        if {name: id(p) for name, p in gradients.trainable(self.module).items()} != self._names:
            self.discard()
            raise ConfigError("Parameters were frozen, unfrozen or replaced since; make a new engine that continues the ledger.")

    def _bounded_sum(self, recording: Recording, loss: Tensor, mask: Tensor) -> gradients.Grads:
        """The trainer's sum, from the user's own forward pass."""
        assert self.plan is not None and self._update is not None
        factor = self._update.factor
        scale = None if factor == 1.0 else torch.tensor(factor, dtype=loss.dtype, device=loss.device)
        if self.plan.loss_clip is not None:
            self._recertify()
            output = recording.output
            gradients.check_output(output, len(loss))
            if not self._checked:
                self._checked = check_coupling([output], loss, mask)
            return gradients.sum_below(self.module, output, output, loss, mask, self.plan, scale)
        if not self.plan.needs_norms:
            return gradients.loss_sum(self.module, loss, mask)
        norms: dict[str, Tensor] = {}
        first = not self._checked
        watched = recording.tap.calls[:FIRST_CALLS] if first else []
        edges = [get_gradient_edge(z) for call in watched for z in call.outputs if z.requires_grad]
        found = gradients.tapped_sum(
            self.module, recording.tap, loss, mask, self.plan, scale, norms_out=norms if first else None, retain_graph=first
        )
        assert found is not None
        if first:
            self._checked = check_first_step(self.module, self.plan, edges, recording.outputs, loss, mask, norms)
        return found

    def _release(self) -> None:
        """Record, add noise, apply: once per logical batch."""
        assert self._update is not None and self._total is not None
        total, count = self._total, self._count
        self._total, self._count = None, 0
        if self.budget is not None and self.budget.begin():
            self._update.record(self._index)
        own = set(self._names.values())
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            for p in group["params"]:
                if id(p) not in own:
                    p.grad = None  # a frozen parameter with an old gradient would move by it, without noise
        index, self._index = self._index, self._index + 1
        self.last_stats = self._update.finish(index, total, count)
        if self.strategy.proves and self._in_force is not None and self._in_force.info.graph is not None:
            self._certified = graph.weights(self.module, self._in_force.info.graph)
        self.stepped = True

    # --- plans ---
    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The plan, from small passes over what the model is called with for the first time."""
        attached = bool(self._handles)
        for handle in self._handles:  # these passes are not recorded, and a module with hooks of its own would be tapped as a whole
            handle.remove()
        try:
            with checks.kept_state(self.module):
                units, calls = probe_calls(self.module, args, kwargs)
            info = facts_of_calls(self.module, units, calls, SIZES[0])
            self._adopt(self.strategy.plan(info), info)
        finally:
            self._handles = [self._watch()] if attached else []

    def _adopt(self, plan: Plan, info: Any) -> None:
        release, self.plan = None, plan
        self.units = find_units(self.module, plan.layers)
        if self.budget is not None:
            mechanism, privacy = self.budget.mechanism, self.budget.privacy
            stds = mechanism.stds(plan, privacy.relation)
            event = release_event(plan, stds, self.schedule.sample_rate, privacy.relation, privacy.noise)
            release = Release(stds, event, self._noise_key, self.budget.ledger, noise=privacy.noise)
            expected = self.schedule.expected_batch_size
            in_force = PlanInForce(self.strategy, info, plan, mechanism, privacy.relation, expected)
            self._in_force = in_force if in_force.moves else None
        inner = self._inner if self.optimizer is not None else None
        self._update = Update(
            self.backend, self.module, inner or Late(self), plan, self.schedule.expected_batch_size, release, self._in_force
        )
        self._prepared = True

    def _validate(self, probe: Any) -> None:
        """Validate the model, and for a proof restore and certify its constraints, on a small batch of inputs."""
        if not self.strategy.proves:
            checks.validate(self.module, probe)
            self._prepare(*arguments_of(probe))
            return
        engine.project(self.module, probe)
        info = engine.facts(self.module, probe, self.loss_constant)
        if info.loss_lipschitz is None:
            raise ConfigError("Strategy clipless needs loss, a loss of dptrain_torch.get_loss or the Lipschitz constant of your own.")
        self._adopt(self.strategy.plan(info), info)
        assert info.graph is not None
        self._certified = graph.weights(self.module, info.graph)

    def _recertify(self) -> None:
        """Prove the bounds again if somebody else has written weights since the last step."""
        moving = self._in_force
        assert moving is not None and moving.info.graph is not None
        now = graph.weights(self.module, moving.info.graph)
        if not all(np.array_equal(value, self._certified[name]) for name, value in now.items()):
            moving.restore({"scale": np.asarray(moving.scale)}, now)
            self._certified = now

    # --- resuming ---
    def state_dict(self) -> dict[str, Any]:
        """Releases and steps, as plain data; the model's and the optimizer's states are their own. Keys are never part of it."""
        moving = {} if self._in_force is None else {k: np.asarray(v).tolist() for k, v in self._in_force.state().items()}
        return {"index": self._index, "drawn": self.drawn, "budget": self.budget.state() if self.budget else None, "in_force": moving}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``; what this engine has spent already stays spent.

        Args:
            state: from ``state_dict``.
        Raises:
            RunError: it is not such a state, or that of a non-private run.
        """
        if not isinstance(state, Mapping) or "budget" not in state or (state["budget"] is None) != (self.budget is None):
            raise RunError("This is not the state of such an engine; pass what state_dict() returned.")
        if self.budget is not None:
            self.budget.restore(state["budget"])
        self._index = max(self._index, int(state.get("index", 0)))
        self.drawn = max(self.drawn, int(state.get("drawn", 0)))
        self.discard()
        if self._in_force is not None and state.get("in_force"):
            weights = graph.weights(self.module, self._in_force.info.graph) if self._in_force.info.graph is not None else {}
            self._in_force.restore({k: np.asarray(v) for k, v in state["in_force"].items()}, weights)


def as_float(value: Any) -> Any:
    """A number as the float that strict settings want."""
    return float(value) if type(value) is int else value
