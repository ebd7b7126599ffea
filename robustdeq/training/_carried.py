"""Where a step of the inner attack gets its gradient: a solve, a warm solve, carried states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustdeq.equilibrium import (
    EquilibriumClassifier,
    Honest,
    JointState,
    Lockstep,
    SolveGradient,
)
from robustdeq.errors import UsageError
from robustdeq.shapes import Images, Logits, PerSample
from robustdeq.targets import Output, Target
from robustdeq.training._fields import Inner

Loss = Callable[[Logits], PerSample]


class Gradients(ABC):
    """The gradients of one inner attack, in the order of its steps."""

    @abstractmethod
    def __call__(self, x: Images, loss: Loss) -> Images:
        """Of the losses in the input, of the shape of `x`."""

    @abstractmethod
    def onward(self) -> tuple[Tensor, ...]:
        """States from which a solve near the last input may start; none: the cold start."""


def gradients_of(inner: Inner, target: Target, warm: Sequence[Tensor] = ()) -> Gradients:
    """A fresh source of gradients for one batch.

    Args:
        warm: states to begin from, if there are any; "solve" begins cold all the same.

    Raises:
        UsageError: for a model, or a gradient, that has no states to carry.
    """
    if inner == "solve":
        return Cold(target)
    if not isinstance(target.model, EquilibriumClassifier):
        raise UsageError(
            f"inner={inner!r} carries states from step to step, and this "
            f"{type(target.model).__name__} has none; use inner='solve'."
        )
    if inner == "warm":
        return Warm(target, warm)
    return Joint(target, warm)


def states_of(inner: Inner, target: Target, output: Output) -> tuple[Tensor, ...]:
    """The states of a forward pass, where `inner` carries them and the view may start from them."""
    if inner == "solve" or not admits_warm(target):
        return ()
    return tuple(solve.z.detach() for solve in output.solves)


class Cold(Gradients):
    """Through the training view as it is, each step from the cold start."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __call__(self, x: Images, loss: Loss) -> Images:
        """See `Gradients`."""
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(self.target(x).logits).sum(), x)
        return gradient

    def onward(self) -> tuple[Tensor, ...]:
        """See `Gradients`; none."""
        return ()


class Warm(Gradients):
    """Through the training view, each solve from the state of the step before."""

    def __init__(self, target: Target, warm: Sequence[Tensor]) -> None:
        if not admits_warm(target):
            raise UsageError(
                f"inner='warm' starts solves from carried states, which gradient "
                f"{_estimator(target)} does not; use inner='joint' or 'solve'."
            )
        self.target, self.warm = target, tuple(warm)

    def __call__(self, x: Images, loss: Loss) -> Images:
        """See `Gradients`."""
        x = x.detach().requires_grad_()
        output = self.target(x, self.warm)
        (gradient,) = torch.autograd.grad(loss(output.logits).sum(), x)
        self.warm = tuple(solve.z.detach() for solve in output.solves)
        return gradient

    def onward(self) -> tuple[Tensor, ...]:
        """See `Gradients`."""
        return tuple(map(_full, self.warm))


class Joint(Gradients):
    """State and adjoint carried; the first state is that of the training view's solver."""

    def __init__(self, target: Target, warm: Sequence[Tensor]) -> None:
        dynamics = target.dynamics()
        if dynamics is None:
            raise UsageError(
                f"inner='joint' iterates one cell, and this {type(target.model).__name__} is not "
                "the fixed point of one; use inner='warm' or 'solve'."
            )
        self.target, self.lockstep = target, Lockstep(dynamics)
        self.state = JointState(warm[0], torch.zeros_like(warm[0])) if warm else None

    def __call__(self, x: Images, loss: Loss) -> Images:
        """See `Gradients`."""
        if self.state is None:
            # In full precision: a solve in a reduced one may never reach its tolerance.
            with torch.autocast(x.device.type, enabled=False):
                self.state = self.lockstep.settled(x, self.target.solver)
        look = self.lockstep.look(x, self.state, loss)
        self.state = look.state
        return look.gradient

    def onward(self) -> tuple[Tensor, ...]:
        """See `Gradients`."""
        if self.state is None or not admits_warm(self.target):
            return ()
        return (_full(self.state.z),)


def admits_warm(target: Target) -> bool:
    """Whether the view's solves may start from given states."""
    estimator = _estimator(target)
    return isinstance(estimator, SolveGradient) and not estimator.cold


def _estimator(target: Target) -> object:
    """What differentiates: the view's gradient, or behind `honest` the model's own."""
    if isinstance(target.gradient, Honest) and isinstance(target.model, EquilibriumClassifier):
        return target.model.gradient
    return target.gradient


def _full(z: Tensor) -> Tensor:
    """Out of a reduced precision, for the solve of the training loss."""
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
