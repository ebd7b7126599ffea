"""The base class of classifiers that iterate to an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustdeq.equilibrium.counting import counted
from robustdeq.equilibrium.drive import Drive, Value
from robustdeq.equilibrium.gradients import Implicit, SolveGradient
from robustdeq.equilibrium.iteration import Solver
from robustdeq.equilibrium.solution import Injection
from robustdeq.shapes import Images, Logits


class EquilibriumClassifier(nn.Module, ABC):
    """A classifier readout(z*) with z* = cell(z*, embed(x)).

    Subclasses give `embed`, `cell` and `readout`. Nothing here depends on `self.training`:
    gradients exist in eval mode, and no state is kept between calls.

    Args:
        solver: the solver the model is *deployed* with; part of the defense.
        gradient: how autograd passes through it when the model is called as a module.

    Attributes:
        stationary: whether the cell is the same at every step; a subclass whose cell looks at
            `step` says that it is not.
    """

    stationary: ClassVar[bool] = True

    def __init__(self, solver: Solver, gradient: SolveGradient | None = None) -> None:
        super().__init__()
        self.solver = solver
        self.gradient: SolveGradient = Implicit() if gradient is None else gradient

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "cell" in cls.__dict__:
            # Wherever a subclass calls its cell from, the evaluation is counted.
            cls.cell = counted(cls.cell, argument=1)  # type: ignore[method-assign]

    @abstractmethod
    def embed(self, x: Images) -> Injection:
        """The injection of an image batch in [0, 1]: a tensor, or a tuple of them, batch first."""

    @abstractmethod
    def cell(self, z: Tensor, injection: Injection, step: int) -> Tensor:
        """One iteration: the next state, of the shape of `z`. `step` counts from 0."""

    @abstractmethod
    def readout(self, z: Tensor) -> Logits:
        """Logits (batch, classes) of a state."""

    def start(self, injection: Injection) -> Tensor:
        """The cold start; zeros of the injection's shape unless a subclass says otherwise."""
        first = injection if isinstance(injection, Tensor) else injection[0]
        return torch.zeros_like(first)

    def predict(self, x: Images, solve: Drive) -> Logits:
        """Logits of `x`, with `solve(cell, injection)` to find fixed points.

        A subclass may call `solve` several times, with other inputs or lengths, and read its
        states: purifiers, dynamics after a fixed point and random lengths fit here.
        """
        return self.readout(solve(self.cell, self.embed(x)).z)

    def forward(self, x: Images) -> Logits:
        """Logits of the deployed predictor: cold start, deployed solver."""
        return self.predict(x, self.drive())

    def drive(
        self,
        gradient: SolveGradient | None = None,
        value: Value = "deployed",
        solver: Solver | None = None,
    ) -> Drive:
        """A `solve` for one forward pass; by default the deployed one."""
        return Drive(solver or self.solver, gradient or self.gradient, self.start, value)


def parameter_dtype(model: nn.Module) -> torch.dtype | None:
    """The floating-point type of a model's parameters; None where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
