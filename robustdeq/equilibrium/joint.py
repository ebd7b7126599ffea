"""Joint iteration of state, adjoint and input, in place of a solve and an adjoint solve per step.

Gurumurthy et al. 2021, "Joint Inference and Input Optimization in Equilibrium Networks": at a
maximum of l(readout(z)) subject to z = f(z, x) the adjoint obeys mu = J_z^T mu + dl/dz and the
gradient in the input is J_x^T mu. One evaluation of the cell and one vector-Jacobian product
advance all three; a fixed x leads to the implicit gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustdeq.equilibrium.model import EquilibriumClassifier
from robustdeq.equilibrium.solution import relative_residual
from robustdeq.errors import UsageError
from robustdeq.shapes import Images, Logits, Mask, PerSample, State
from robustdeq.threats import Threat

Loss = Callable[[Tensor], Tensor]
"""From logits (batch, classes) to the loss of each sample (batch,)."""


class JointState(NamedTuple):
    """The state z and the adjoint mu of each sample, both (batch, *state)."""

    z: State
    adjoint: State

    def take(self, rows: Tensor) -> JointState:
        """Some samples of it."""
        return JointState(self.z[rows], self.adjoint[rows])

    def where(self, mask: Mask, other: JointState) -> JointState:
        """These samples where the mask is set, the other's elsewhere."""
        return JointState(*[_where(mask, a, b) for a, b in zip(self, other, strict=True)])


class JointStep(NamedTuple):
    """The next state, with the logits and the input's gradient of the state before it."""

    state: JointState
    logits: Logits
    gradient: Images


@dataclass(frozen=True)
class Dynamics:
    """The joint iteration of one model.

    Attributes:
        damping: of the state; below 1 admits cells that are no contractions.
        adjoint_damping: of the adjoint. The authors take 0.8 and 0.6.
    """

    model: EquilibriumClassifier
    damping: float = 1.0
    adjoint_damping: float = 1.0

    @torch.no_grad()
    def start(self, x: Images) -> JointState:
        """The cold start, with an adjoint of 0."""
        z = self.model.start(self.model.embed(x))
        return JointState(z, torch.zeros_like(z))

    def step(self, x: Images, state: JointState, loss: Loss) -> JointStep:
        """One evaluation of the cell and one product with its Jacobian, all at the old state.

        Args:
            x: the input as it is now.
            loss: what the adjoint is of.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            z = state.z.detach().requires_grad_()
            image = self.model.cell(z, self.model.embed(x), 0)
            through_z, through_x = torch.autograd.grad(
                image, (z, x), state.adjoint, materialize_grads=True, allow_unused=True
            )
            logits = self.model.readout(z)
            (slope,) = torch.autograd.grad(loss(logits).sum(), z)
        following = JointState(
            state.z + self.damping * (image.detach() - state.z),
            state.adjoint + self.adjoint_damping * (through_z + slope - state.adjoint),
        )
        return JointStep(following, logits.detach(), through_x)


@dataclass(frozen=True, kw_only=True)
class JointAscent:
    """Steepest ascent on the input along the joint iteration.

    Attributes:
        steps: moves of the input, at least 1.
        step_size: of a move, relative to epsilon; a third of it in the last three eighths, as the
            authors do on MNIST. Joint steps must shrink with the distance of the cell's spectral
            radius from 1, or the state lags behind.
        updates: joint steps per move; 1 is the paper's, many approach PGD with warm solves.
        memory: iterates that Anderson mixing (type I) takes; 0 does without. Type II drifts to
            points that are no maxima.
    """

    steps: int = 40
    step_size: float = 0.1
    updates: int = 1
    memory: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.updates) < 1 or self.memory < 0 or self.step_size <= 0:
            raise UsageError(
                f"joint ascent has steps={self.steps}, updates={self.updates}, memory="
                f"{self.memory}, step_size={self.step_size}; give at least 1, 1, 0 and above 0."
            )

    def __call__(
        self, dynamics: Dynamics, x: Images, threat: Threat, loss: Loss, start: Images
    ) -> tuple[Images, JointState]:
        """Candidates in the ball around `x`, from `start`, and the joint state there.

        The state lags behind its input; solve afresh before believing the logits.
        """
        current, state = start.detach(), dynamics.start(start)
        mixture = _TypeOne(self.memory)
        best = _Choice()
        for k in range(self.steps):
            for _ in range(self.updates - 1):
                state = dynamics.step(current, state, loss).state
            following, logits, gradient = dynamics.step(current, state, loss)
            size = self.step_size * threat.eps * (1.0 if k < self.steps * 5 / 8 else 1 / 3)
            moved = threat.project(x, current + size * threat.steepest(gradient))
            if self.memory == 0:
                current, state = moved, following
                continue
            best.offer(k, (current, state), (moved, following), loss(logits))
            mixed, state = mixture((current, state), (moved, following))
            # A mixture is affine: it leaves the ball unless it is projected again.
            current = threat.project(x, mixed)
        return best.chosen((current, state))


_Point = tuple[Images, JointState]


class _TypeOne:
    """Anderson mixing over (state, input, adjoint) with Gram matrix X G^T (type I), per sample."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.points: list[Tensor] = []
        self.images: list[Tensor] = []

    def __call__(self, point: _Point, image: _Point) -> _Point:
        self.points = [*self.points, _flat(point)][-self.memory :]
        self.images = [*self.images, _flat(image)][-self.memory :]
        if len(self.points) < 2:
            return image
        points, images = torch.stack(self.points, 1), torch.stack(self.images, 1)
        weights = self._weights(points.double(), images.double()).to(images)
        return _shaped(torch.einsum("bm,bmd->bd", weights, images), image)

    def _weights(self, points: Tensor, images: Tensor) -> Tensor:
        """Sum 1, and the combined gap orthogonal to all differences of points."""
        gram = torch.bmm(points, (images - points).transpose(1, 2))
        count = gram.shape[1]
        system = gram.new_ones(len(gram), count + 1, count + 1)
        system[:, 0, 0] = 0.0
        scale = gram.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
        system[:, 1:, 1:] = gram / scale
        right = gram.new_zeros(len(gram), count + 1, 1)
        right[:, 0] = 1.0
        solution, info = torch.linalg.solve_ex(system, right)
        weights = solution[:, 1:, 0]
        usable = (info == 0) & weights.isfinite().all(1) & (weights.abs().sum(1) < 1e3)
        newest = torch.zeros_like(weights)
        newest[:, -1] = 1.0
        return _where(usable, weights, newest)


class _Choice:
    """Which of the accelerated iterates is returned, per sample; the authors' rule.

    Each of the first ten; then the one of lowest residual, or one of higher loss at a residual
    within 1.3 of the lowest.
    """

    def __init__(self) -> None:
        self.point: _Point | None = None

    def offer(self, k: int, point: _Point, image: _Point, losses: PerSample) -> None:
        residual = relative_residual(_flat(image), _flat(point))
        if self.point is None:
            self.point, self.residual, self.losses = point, residual, losses
            return
        nearer = residual < self.residual
        higher = (losses > self.losses) & (residual < 1.3 * self.residual)
        taken = torch.ones_like(nearer) if k < 10 else nearer | higher
        self.point = (
            _where(taken, point[0], self.point[0]),
            point[1].where(taken, self.point[1]),
        )
        self.losses = _where(taken, losses, self.losses)
        self.residual = _where(taken & nearer, residual, self.residual)

    def chosen(self, last: _Point) -> _Point:
        return last if self.point is None else self.point


def _flat(point: _Point) -> Tensor:
    x, state = point
    return torch.cat([state.z.flatten(1), x.flatten(1), state.adjoint.flatten(1)], 1)


def _shaped(flat: Tensor, like: _Point) -> _Point:
    x, state = like
    sizes = [state.z[0].numel(), x[0].numel(), state.adjoint[0].numel()]
    z, x_flat, adjoint = flat.split(sizes, 1)
    return x_flat.view_as(x), JointState(z.view_as(state.z), adjoint.view_as(state.adjoint))


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b)
