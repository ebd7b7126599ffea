"""Gradients at one evaluation of the cell and one product with its Jacobian, by carried states.

An attack moves its input a little at each step, so that state and adjoint of the step before are
nearly those of this one. A solve and an adjoint solve per step are replaced by one step of each
(Gurumurthy et al. 2021, "Joint Inference and Input Optimization in Equilibrium Networks"); where
the input rests, both converge to the solve's and the implicit gradient's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustdeq.arithmetic import Precision, reduced
from robustdeq.equilibrium.iteration import Solver
from robustdeq.equilibrium.joint import Dynamics, JointState
from robustdeq.equilibrium.model import parameter_dtype
from robustdeq.equilibrium.solution import Injection, finite, relative_residual
from robustdeq.shapes import Images, Logits, PerSample

Loss = Callable[[Logits], PerSample]


class Look(NamedTuple):
    """What one step of state and adjoint shows at an input.

    Attributes:
        state: to carry to the next look.
        logits: of the state after its step, (batch, classes).
        losses: of these logits, (batch,).
        gradient: of the losses in the input, (batch, channels, height, width).
        residual: relative, of the state before its step; infinite where that is no number.
        slope: length of the losses' slope in the state, (batch,); the adjoint is that of the loss
            divided by it.
    """

    state: JointState
    logits: Logits
    losses: PerSample
    gradient: Images
    residual: PerSample
    slope: PerSample


class Glance(NamedTuple):
    """The same without a gradient; the adjoint is left as it is."""

    state: JointState
    logits: Logits
    residual: PerSample


@dataclass(frozen=True)
class Lockstep:
    """The joint iteration of a model, for attacks that carry its states from step to step.

    The adjoint is that of a loss whose slope in the state has length 1: losses that rescale from
    step to step (DLR, cross-entropy of sure predictions) leave it valid.

    Attributes:
        dynamics: the model, and how far state and adjoint move at a step.
        updates: evaluations of the cell per look, and products with its Jacobian, which are all at
            the last state.
        precision: in which they are computed; states and losses stay in that of the model.
    """

    dynamics: Dynamics
    updates: int = 1
    precision: Precision = "float32"

    @torch.no_grad()
    def settled(self, x: Images, solver: Solver | None = None) -> JointState:
        """The state of a solver, by default the deployed one, from the cold start; adjoint 0."""
        model = self.dynamics.model
        solve = model.drive(solver=solver)
        z = solve(model.cell, model.embed(x.to(parameter_dtype(model) or x.dtype))).z.detach()
        return JointState(finite(z), torch.zeros_like(z))

    def look(self, x: Images, state: JointState, loss: Loss) -> Look:
        """One look at `x`.

        Args:
            loss: from logits to the loss of each sample.
        """
        with reduced(self.precision, x.device):
            return self._look(x, state, loss)

    def _look(self, x: Images, state: JointState, loss: Loss) -> Look:
        z = state.z
        if self.updates > 1:
            z = self.glance(x, state, self.updates - 1).state.z
        model = self.dynamics.model
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            z = z.detach().requires_grad_()
            image = model.cell(z, model.embed(x.to(z.dtype)), 0).to(z.dtype)
            read = image.detach().requires_grad_()
            logits = model.readout(read).to(z.dtype)
            losses = loss(logits)
            (slope,) = torch.autograd.grad(
                losses.sum(), read, allow_unused=True, materialize_grads=True
            )
            size = _lengths(slope)
            unit, adjoint = slope / size, state.adjoint
            for _ in range(self.updates - 1):
                (product,) = torch.autograd.grad(
                    image, z, unit + adjoint,
                    retain_graph=True, allow_unused=True, materialize_grads=True,
                )  # fmt: skip
                adjoint = self._next_adjoint(adjoint, product)
            product, gradient = torch.autograd.grad(
                image, (z, x), unit + adjoint, allow_unused=True, materialize_grads=True
            )
        following = JointState(
            finite(self._damped(z, image, self.dynamics.damping).detach()),
            self._next_adjoint(adjoint, product),
        )
        residual = relative_residual(image.detach(), z.detach())
        gradient = (gradient * size.view(-1, *[1] * (x.dim() - 1))).to(x)
        return Look(following, logits.detach(), losses.detach(), gradient, residual, size.flatten())

    @torch.no_grad()
    def glance(self, x: Images, state: JointState, updates: int = 1) -> Glance:
        """Some steps of the state alone."""
        return self.glance_into(self.injection(x, state), state, updates)

    @torch.no_grad()
    def injection(self, x: Images, state: JointState) -> Injection:
        """What the cell is given of an input, for several glances at it."""
        with reduced(self.precision, x.device):
            return self.dynamics.model.embed(x.to(state.z.dtype))

    @torch.no_grad()
    def glance_into(self, injection: Injection, state: JointState, updates: int = 1) -> Glance:
        """`glance` at an input that is embedded already."""
        with reduced(self.precision, state.z.device):
            return self._glance(injection, state, updates)

    def _glance(self, injection: Injection, state: JointState, updates: int) -> Glance:
        model = self.dynamics.model
        z, image = state.z, state.z
        for _ in range(updates):
            z = self._damped(z, image, self.dynamics.damping)
            image = model.cell(z, injection, 0).to(z.dtype)
        moved = finite(self._damped(z, image, self.dynamics.damping))
        residual = relative_residual(image, z)
        logits = model.readout(image).to(image.dtype)
        return Glance(JointState(moved, state.adjoint), logits, residual)

    def _next_adjoint(self, before: Tensor, product: Tensor) -> Tensor:
        return finite(self._damped(before, product, self.dynamics.adjoint_damping).detach())

    @staticmethod
    def _damped(before: Tensor, after: Tensor, damping: float) -> Tensor:
        return after if damping == 1.0 else before + damping * (after - before)


def _lengths(slope: Tensor) -> Tensor:
    """The length of each sample's slope; 1 where there is none, or no number."""
    length = slope.flatten(1).norm(dim=1)
    usable = (length > 0) & length.isfinite()
    length = torch.where(usable, length, torch.ones_like(length))
    return length.view(-1, *[1] * (slope.dim() - 1))
