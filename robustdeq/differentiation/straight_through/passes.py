"""One watched forward pass, and what to leave out of it where it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustdeq.differentiation.module_gradient import Predict
from robustdeq.differentiation.straight_through.graph import splice
from robustdeq.differentiation.straight_through.mode import StraightMode
from robustdeq.differentiation.straight_through.patches import HONEST, TRACKER, patched
from robustdeq.differentiation.straight_through.sites import Site, definition_site
from robustdeq.differentiation.straight_through.state import nothing_kept, unhooked
from robustdeq.differentiation.straight_through.tracker import Plan, Tracker
from robustdeq.equilibrium import Backprop, SolveGradient
from robustdeq.equilibrium._trust import WATCH
from robustdeq.errors import sentence
from robustdeq.shapes import Images, Logits


@dataclass
class Carried:
    """A watched pass: logits with a graph that ends in `leaf`."""

    leaf: Images
    logits: Logits
    tracker: Tracker


class _Watch:
    """What the core's solves are told of the pass around them."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    @contextmanager
    def paused(self) -> Iterator[None]:
        token = TRACKER.set(None)
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            TRACKER.reset(token)

    @contextmanager
    def resumed(self, *given: Tensor) -> Iterator[None]:
        # The states that estimators differentiate at are leaves.
        self.tracker.roots |= {id(state): state for state in given if state.is_leaf}
        token = TRACKER.set(self.tracker)
        try:
            with torch._C._EnableTorchFunction():
                yield
        finally:
            TRACKER.reset(token)

    def estimator(self, gradient: Any) -> Any:
        """A model's own estimator may hide anything: the solver's steps stand for it."""
        if self.tracker.region is not None:
            region, self.tracker.region = self.tracker.region, None
            self.tracker.admits(region)
        foreign = [
            part for part in (gradient, getattr(gradient, "adjoint", None)) if _foreign(part)
        ]
        if not foreign:
            return gradient
        kind: Any = type(foreign[0])
        role, function = "Solver", getattr(kind, "method", None)
        if isinstance(foreign[0], SolveGradient):
            role, function = "SolveGradient", kind.carrier
        site = self._site(f"{role} {kind.__name__}", function)
        return Backprop() if self.tracker.admits(site) else gradient

    def carried(self, states: tuple[Tensor, ...], z: Tensor) -> tuple[Tensor, ...]:
        """The states' gradient is that of the answer which they lead to."""
        site = self.tracker.site("Solve.states")
        if not z.requires_grad or (site is not None and site in self.tracker.plan.excluded):
            return states

        def reported(gradient: Tensor) -> None:
            self.tracker.admits(site)

        out = []
        for state in states:
            out.append(state if state.requires_grad else splice(state, z))
            if out[-1] is not state and site is not None:
                out[-1].register_hook(reported)
        return tuple(out)

    def _site(self, operation: str, function: Any) -> Site | None:
        return definition_site(operation, function) if self.tracker.plan.logged else None


def _foreign(part: Any) -> bool:
    """Whether an estimator, or the solver of its adjoint, is not one of the core's."""
    core = SolveGradient.__module__.rpartition(".")[0] + "."
    return part is not None and not type(part).__module__.startswith(core)


@contextmanager
def _watching(tracker: Tracker) -> Iterator[None]:
    watch = WATCH.set(_Watch(tracker))
    token = TRACKER.set(tracker)
    try:
        with patched(), StraightMode(tracker):
            yield
    finally:
        TRACKER.reset(token)
        WATCH.reset(watch)


def _forward(predict: Predict, images: Images) -> Logits:
    """The frame above which all code is the model's or what it calls."""
    return predict(images)


def carried_pass(model: nn.Module, predict: Predict, x: Images, plan: Plan) -> Carried:
    """Run the model's own forward pass with the rules of `plan`."""
    leaf = x.detach().clone().requires_grad_()
    tracker = Tracker(plan, len(x), x.dtype, _forward.__code__, {id(leaf): leaf})
    hooks: list[Site] = []
    with ExitStack() as stack:
        stack.enter_context(nothing_kept(model))
        if "hooks" not in plan.dropped:
            stack.enter_context(unhooked(model, hooks, plan.excluded))
        stack.enter_context(torch.enable_grad())
        if plan.careful:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(torch.clone, _same))
        # Not a leaf: models write into their input.
        images = leaf.clone()
        if plan.watched:
            stack.enter_context(_watching(tracker))
        logits = _forward(predict, images)
    for site in hooks:
        tracker.admits(site)
    return Carried(leaf, logits, tracker)


def _same(tensor: Tensor) -> Tensor:
    return tensor


_SURROGATES = frozenset(("comparing", "choosing", "saturation"))
_FUNCTIONS = frozenset(("functions",))
LADDER: Sequence[Mapping[str, Any]] = (
    {},
    {"deployed_mode": True},
    {"dropped": _FUNCTIONS},
    {"dropped": _FUNCTIONS | _SURROGATES},
    {"dropped": _FUNCTIONS | _SURROGATES | {"arrays", "inner"}},
    {"dropped": frozenset(("hooks",)), "watched": False},
)
"""What is changed, step by step, in the plan of a pass that fails; the last one is honest."""


def followed(
    model: nn.Module,
    predict: Predict,
    x: Images,
    plan: Plan,
    restore: Callable[[], None],
    notes: list[str],
) -> Carried | None:
    """The fullest watched pass that the model survives; None where it survives none."""
    for changes in LADDER:
        restore()
        try:
            carried = carried_pass(model, predict, x, replace(plan, **changes))
        except Exception as error:
            notes.append(f"a watched pass fails ({_told(changes)}): {sentence(error)}")
            continue
        notes += carried.tracker.notes
        return carried
    return None


def _told(changes: Mapping[str, Any]) -> str:
    if "watched" in changes:
        return "unwatched"
    if "dropped" in changes:
        return "without " + ", ".join(sorted(changes["dropped"]))
    return "as if gradients were off" if changes else "with everything"


def honest_pass(predict: Predict, x: Images) -> Any:
    """What the judge would see."""
    token = HONEST.set(True)
    try:
        with patched(), torch.no_grad():
            return predict(x.detach().clone())
    finally:
        HONEST.reset(token)


def inner_gradients(predict: Predict, x: Images) -> tuple[tuple[Tensor | None, ...], ...]:
    """What inner gradients are in the honest pass, in their order."""
    recorder = _Recorder()
    with recorder:
        honest_pass(predict, x)
    return tuple(recorder.found)


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor | None, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.autograd.grad:
            self.found.append(tuple(g if g is None else g.detach().clone() for g in out))
        return out
