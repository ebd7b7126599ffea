"""The passes behind one straight-through gradient: an honest one, a watched one, spares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from robustdeq.differentiation.module_gradient import Predict
from robustdeq.differentiation.straight_through.passes import (
    Carried,
    followed,
    honest_pass,
    inner_gradients,
)
from robustdeq.differentiation.straight_through.patches import patched
from robustdeq.differentiation.straight_through.sites import Site
from robustdeq.differentiation.straight_through.state import Buffers, Randomness
from robustdeq.differentiation.straight_through.tracker import Plan
from robustdeq.shapes import Images, Logits, Mask

AGREEMENT = 1e-5
"""Largest difference of logits, relative to the largest logit, that rounding is blamed for."""
_DEAD = 1e-7
"""Largest entry of a gradient in the input over that in the logits at which it is none."""
_STARVED = 1 / 8
"""Share of pixels below which a gradient has lost its way."""

_DRAWS_ELSEWHERE: WeakSet[nn.Module] = WeakSet()
"""Models that may draw from other generators than torch's: looking at those takes long."""


class Session:
    """Passes over one batch, all with the same random numbers.

    Attributes:
        honest: what `predict` returns without gradients.
        notes: sentences on what could not be followed.
        counts: how often each site was intercepted.
    """

    def __init__(self, model: nn.Module, predict: Predict, x: Images, plan: Plan) -> None:
        self.model, self.predict, self.x, self.plan = model, predict, x.detach(), plan
        self.notes = _scripted(model) if plan.logged else []
        self.counts: Counter[Site] = Counter()
        self.honest: Any = None
        self.carried: Carried | None = None
        with patched():
            self._begin(everything=model in _DRAWS_ELSEWHERE)
            if isinstance(self.honest, Tensor):
                self.carried = self._agreeing()
                self.end.restore()
        if self.carried is not None:
            self.counts = self.carried.tracker.counts

    @property
    def connected(self) -> bool:
        """Whether there may be a gradient."""
        carried = self.carried
        if carried is None:
            return False
        tracker = carried.tracker
        return carried.logits.requires_grad or tracker.kinked or tracker.inner_calls > 0

    def gradient(self, direction: Logits) -> Images:
        """The gradient in the input of the logits along `direction`; once differentiable."""
        found = self._pulled(self.carried, direction)
        if found is None:
            found = self._pulled(self._spare(careful=True), direction)
        if found is None:
            self.notes.append("the watched pass has no backward pass.")
            found = torch.zeros_like(self.x)
        return self._rescued(found, direction)

    def _begin(self, everything: bool) -> None:
        """The honest pass, and where the random generators stand before and after it."""
        arguments = (self.model, self.x.device, everything)
        self.start = Randomness.now(*arguments)
        self.buffers = Buffers.now(self.model, everything)
        self.honest = honest_pass(self.predict, self.x)
        self.end = Randomness.now(*arguments)

    def _again(self) -> None:
        self.start.restore()
        self.buffers.restore()

    def _followed(self, plan: Plan) -> Carried | None:
        carried = followed(self.model, self.predict, self.x, plan, self._again, self.notes)
        if carried is not None and not isinstance(carried.logits, Tensor):
            return None
        return carried

    def _agreeing(self) -> Carried | None:
        """The watched pass; where its logits are not the honest ones, the best of other ways."""
        best = self._followed(self.plan)
        if self.plan.bypass and best is not None and best.tracker.inner_calls:
            if bool(best.logits.isfinite().all()):
                return best
            self.notes.append("inner gradients of 0 make the logits infinite; they stay.")
            self.plan = replace(self.plan, bypass=False)
            best = self._followed(self.plan)
        least = self._gap(best)
        if least <= AGREEMENT:
            return best
        for plan in self._other_ways(best):
            other = self._followed(plan)
            gap, least = self._gap(other), self._gap(best)
            if gap < least:
                best, least, self.plan = other, gap, plan
            if least <= AGREEMENT:
                return best
        self.notes.append(f"the watched pass's logits are off by {least:.2g} of the largest.")
        return best

    def _other_ways(self, first: Carried | None) -> Iterator[Plan]:
        """What may explain other logits: inner gradients, foreign generators, the grad mode."""
        if first is not None and first.tracker.inner_calls:
            self._again()
            yield replace(self.plan, replay=inner_gradients(self.predict, self.x))
        if self.model not in _DRAWS_ELSEWHERE:
            _DRAWS_ELSEWHERE.add(self.model)
            self._again()
            self._begin(everything=True)
            yield self.plan
        yield replace(self.plan, deployed_mode=True)

    def _gap(self, carried: Carried | None) -> float:
        if carried is None:
            return float("inf")
        if torch.equal(self.honest, carried.logits):
            return 0.0
        honest, other = self.honest.double(), carried.logits.detach().double()
        if honest.shape != other.shape:
            return float("inf")
        difference = torch.where(honest == other, torch.zeros_like(honest), honest - other)
        gap = float(difference.abs().max() / honest.abs().max().clamp_min(1e-30))
        return gap if gap == gap else float("inf")

    def _pulled(self, carried: Carried | None, direction: Logits) -> Images | None:
        if carried is None or not carried.logits.requires_grad:
            return None if carried is None else torch.zeros_like(self.x)
        try:
            (found,) = torch.autograd.grad(
                carried.logits,
                carried.leaf,
                direction.to(carried.logits.dtype),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        except RuntimeError as error:
            self.notes.append(f"the backward pass fails: {error}")
            return None
        return found

    def _spare(self, **changes: Any) -> Carried | None:
        """Another watched pass; the random generators are left where they stand."""
        with self._undisturbed(), torch.enable_grad():
            return self._followed(replace(self.plan, **changes))

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        state = Randomness.now(self.model, self.x.device, self.model in _DRAWS_ELSEWHERE)
        buffers = Buffers.now(self.model, False)
        try:
            yield
        finally:
            state.restore()
            buffers.restore()

    def _rescued(self, found: Images, direction: Logits) -> Images:
        """Samples without a gradient take that past clamps and through inner gradients."""
        tracker = None if self.carried is None else self.carried.tracker
        if tracker is None or not (tracker.kinked or tracker.inner_calls):
            return found
        lost = self._lost(found, direction)
        if not bool(lost.any()):
            return found
        double = not self.plan.bypass and tracker.inner_calls > 0
        spare = self._spare(rescue=True, double=self.plan.double or double)
        other = self._pulled(spare, direction)
        if spare is None or other is None:
            return found
        taken = lost & (_alive(other) > 2 * _alive(found))
        if bool(taken.any()):
            self.counts.update(
                {s: n for s, n in spare.tracker.counts.items() if s not in self.counts}
            )
        return torch.where(taken.view(-1, *[1] * (found.dim() - 1)), other, found)

    def _lost(self, found: Images, direction: Logits) -> Mask:
        """Samples whose gradient is none, or nearly so, though one was asked for."""
        asked = direction.detach().abs().flatten(1).amax(1)
        largest = found.abs().flatten(1).amax(1)
        none = largest <= _DEAD * asked
        return (asked > 0) & (none | (_alive(found) < _STARVED))


def _scripted(model: nn.Module) -> list[str]:
    """A sentence for each part of a model whose calls no function mode sees."""
    parts = model.named_modules()
    names = [name or "itself" for name, part in parts if isinstance(part, torch.jit.ScriptModule)]
    return [f"{name} is a script module, and runs unwatched." for name in names]


def _alive(gradient: Images) -> Tensor:
    """Share of entries that are not 0, per sample."""
    return (gradient.flatten(1) != 0).double().mean(1)
