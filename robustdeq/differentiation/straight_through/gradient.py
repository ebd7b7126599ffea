"""A backward pass that undoes masking by itself, knowing nothing of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from robustdeq.differentiation.module_gradient import ModuleGradient, Predict
from robustdeq.differentiation.straight_through.session import Session
from robustdeq.differentiation.straight_through.sites import Interception, Site
from robustdeq.differentiation.straight_through.state import Randomness
from robustdeq.differentiation.straight_through.tracker import Plan
from robustdeq.errors import UsageError
from robustdeq.shapes import Images, Logits, PerSample

__all__ = ["Interception", "Masking", "StraightThrough", "blame", "trace"]

Loss = Callable[[Logits], PerSample]
"""From logits (batch, classes) to the loss of each sample (batch,)."""
SITES = 32
"""Most interceptions that are switched off one by one."""


@dataclass(frozen=True, kw_only=True)
class StraightThrough(ModuleGradient):
    """The model's own forward pass, bit for bit, with a backward pass through all that masks it.

    Detached tensors and regions without gradients stay in the graph; rounding, integer casts and
    quantization get the identity (Bengio et al. 2013; BPDA of Athalye et al. 2018); comparisons a
    sigmoid, selections by index a softmax of what they select from; saturated functions are taken
    at a smaller argument; custom autograd functions are differentiated through their forward;
    backward hooks are left out; arrays keep their gradient on the way through NumPy. Bounds
    (clamp, hardtanh) are passed over for the samples that have no gradient otherwise. The core's
    own solves are trusted, the cells they call are not. Honest models get their honest gradient.

    The gradient is that of the input alone, and once differentiable. Bias: a sum of surrogates is
    no derivative, so it may point nowhere for a model that uses such operations in earnest.

    While a forward pass runs, parts of torch are patched for the whole process; in other threads
    the patches do what they replace. The model itself is changed meanwhile (its parameters ask for
    no gradient, its backward hooks are set aside), so that one model belongs to one thread.

    Attributes:
        double: differentiate through inner gradients (purifiers) too, with a soft sign, in place of
            the identity past them.
        bypass: take the gradient where inner optimization starts, not where it ends: that of the
            model behind a purifier. The identity is the exact gradient of a purifier by signs, and
            yet useless, since such a purifier jumps.
    """

    double: bool = False
    bypass: bool = False

    def __post_init__(self) -> None:
        if self.double and self.bypass:
            raise UsageError("straight_through is double or bypass, not both; run it twice.")

    def __str__(self) -> str:
        variant = "(double)" if self.double else "(bypass)" if self.bypass else ""
        return f"straight_through{variant}"

    def __call__(self, model: nn.Module, predict: Predict, x: Images) -> Logits:
        """See `ModuleGradient`."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return predict(x)
        session = Session(model, predict, x, Plan(double=self.double, bypass=self.bypass))
        return _bridged(x, session)


class _Bridge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, session: Session) -> Tensor:
        ctx.session = session
        value: Tensor = session.honest.clone()
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.session.gradient(gradient), None


def _bridged(x: Images, session: Session) -> Logits:
    if not session.connected or not session.honest.is_floating_point():
        return cast("Tensor", session.honest)
    return cast("Tensor", cast("Any", _Bridge).apply(x, session))


@dataclass(frozen=True)
class Masking:
    """How far a model's honest gradient is from the one without masking, and what is to blame.

    Attributes:
        cosine: of the two, per sample; 0 where one of them is missing, 1 where both are.
        interceptions: those that matter most first.
        effects: how far the gradient turns, 1 - cosine averaged over samples, when an interception
            alone is switched off; small for each of several that mask alike.
        notes: sentences on what could not be followed.
    """

    cosine: PerSample
    interceptions: tuple[Interception, ...]
    effects: tuple[float, ...]
    notes: tuple[str, ...] = ()


def trace(model: nn.Module, predict: Predict, x: Images) -> tuple[Interception, ...]:
    """Which calls of a forward pass, and of a backward pass of a margin, were intercepted.

    Args:
        model: the module behind `predict`.
        predict: images (batch, channels, height, width) to logits (batch, classes).
        x: images; only calls on what depends on them are listed.
    """
    session = Session(model, predict, x, Plan(logged=True))
    if isinstance(session.honest, Tensor) and session.honest.dim() == 2:
        _slope(session, _runner_up)
    return tuple(Interception(*site, count=count) for site, count in session.counts.items())


def blame(
    model: nn.Module, predict: Predict, x: Images, loss: Loss, *, double: bool = False
) -> Masking:
    """Compare the honest gradient of a loss with the straight-through one, and name the masks.

    Args:
        model: the module behind `predict`.
        predict: images (batch, channels, height, width) to logits (batch, classes).
        x: images.
        loss: logits to the loss of each sample.
        double: see `StraightThrough`.
    """
    start = Randomness.now(model, x.device, everything=True)

    def through(plan: Plan) -> tuple[Session, Images]:
        start.restore()
        session = Session(model, predict, x, plan)
        return session, _slope(session, loss)

    def effect(site: Site) -> float:
        _, without = through(replace(plan, excluded=frozenset({site})))
        return float((1 - _cosine(full, without)).mean())

    plan = Plan(double=double, logged=True)
    session, full = through(plan)
    start.restore()
    honest, notes = _honest(predict, x, loss)
    sites = list(session.counts.items())
    effects = {site: effect(site) for site, _ in sites[:SITES]}
    sites.sort(key=lambda item: -effects.get(item[0], 0.0))
    return Masking(
        _cosine(honest, full),
        tuple(Interception(*site, count=count) for site, count in sites),
        tuple(effects.get(site, 0.0) for site, _ in sites),
        (*notes, *session.notes),
    )


def _slope(session: Session, loss: Loss) -> Images:
    logits = session.honest.detach().requires_grad_()
    with torch.enable_grad():
        (direction,) = torch.autograd.grad(loss(logits).sum(), logits)
    if not session.connected:
        return torch.zeros_like(session.x)
    return session.gradient(direction)


def _honest(predict: Predict, x: Images, loss: Loss) -> tuple[Images, tuple[str, ...]]:
    leaf = x.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            (found,) = torch.autograd.grad(
                loss(predict(leaf)).sum(), leaf, allow_unused=True, materialize_grads=True
            )
    except RuntimeError as error:
        return torch.zeros_like(x), (f"there is no honest gradient: {error}",)
    return found, ()


def _cosine(one: Images, other: Images) -> PerSample:
    a, b = one.double().flatten(1), other.double().flatten(1)
    lengths = a.norm(dim=1), b.norm(dim=1)
    both_missing = (lengths[0] == 0) & (lengths[1] == 0)
    same = (a == b).all(1) | both_missing
    cosine = (a * b).sum(1) / (lengths[0] * lengths[1]).clamp_min(1e-300)
    return torch.where(same, torch.ones_like(cosine), torch.nan_to_num(cosine))


def _runner_up(logits: Logits) -> PerSample:
    top = logits.topk(2, 1).values
    return top[:, 1] - top[:, 0]
