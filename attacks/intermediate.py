"""Attacks on the states along the dynamics of an equilibrium model, and on their ensemble."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from robustdeq.attacks._apgd import AutoPGD
from robustdeq.attacks._ascent import (
    Lanes,
    LogitLoss,
    Rule,
    States,
    Steepest,
    ascend,
    shrinking,
)
from robustdeq.attacks._ledger import Ledger
from robustdeq.attacks._losses import named_loss, replaced
from robustdeq.attacks._starts import random_starts

from robustdeq.equilibrium import EquilibriumClassifier, Problem, parameter_dtype
from robustdeq.equilibrium import Intermediate as FromState
from robustdeq.errors import CaseError, UsageError
from robustdeq.interfaces import Access, Budget, Candidates
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Output, Target
from robustdeq.threats import Threat

Grid = Literal["small", "white_box_protocol"]
Configuration = tuple[FromState, ...]
"""One gradient of a state; several for the mean of their logits."""

# States, and (steps, damping) of the gradient from each.
_GRIDS: dict[str, tuple[tuple[int, ...], tuple[tuple[int, float], ...]]] = {
    "small": ((1, 2, 4, 8), ((1, 1.0), (5, 0.5))),
    "white_box_protocol": (
        tuple(range(1, 9)),
        tuple((steps, damping) for damping in (0.5, 1.0) for steps in range(1, 10)),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Intermediate:
    """Ascent on logits that are read out from states before the last (Yang et al. 2022).

    "A Closer Look at the Adversarial Robustness of Deep Equilibrium Models": from the i-th state of
    the deployed solver, without a graph, K damped steps with one, z <- (1 - d) z + d f(z), and the
    readout; or the mean of those logits over all states. The embedding, the cell and the readout
    are the model's, its `predict` is passed by: what a purifier does to the input in between is not
    seen. Candidates are scored by the deployed predictor.

    Attributes:
        grid: `small`, states 1, 2, 4, 8 with (K, d) of (1, 1) and (5, 0.5); or
            `white_box_protocol`, the authors' 144: states 1 to 8, K from 1 to 9, d of 0.5 and 1.
            States that the deployed solver does not reach are left out.
        states: single states, each a run of its own.
        ensemble: the mean of the logits of all states as well, before the single ones.
        inner: the ascent; `pgd` shrinks its steps linearly.
        steps: gradient steps of a run.
        loss: of the logits.
        random_start: in the ball; else the input itself.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    iterating: ClassVar[bool] = True

    grid: Grid = "small"
    states: bool = True
    ensemble: bool = True
    inner: Literal["apgd", "pgd"] = "apgd"
    steps: int = 20
    loss: Literal["ce", "margin", "dlr"] = "ce"
    random_start: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or not (self.states or self.ensemble):
            raise UsageError(
                f"intermediate has steps={self.steps}, states={self.states}, ensemble="
                f"{self.ensemble}; give at least 1 step, and states or their ensemble."
            )

    def fits(self, target: Target) -> bool:
        """Whether the model iterates."""
        return target.iterates

    def left_out(self, classes: int) -> tuple[str, ...]:
        """See `robustdeq.interfaces.Attack`."""
        return replaced(self.loss, classes)

    def budget(self, classes: int) -> Budget:
        """See `robustdeq.interfaces.Attack`."""
        del classes
        states = max(_GRIDS[self.grid][0])
        gradients = sum(len(each) for each in self._configurations(states)) * self.steps
        return Budget(2 + 2 * gradients, gradients)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        """See `robustdeq.interfaces.Attack`.

        Raises:
            CaseError: for a model that does not iterate.
        """
        model = target.model
        if not isinstance(model, EquilibriumClassifier):
            raise CaseError(
                f"attack intermediate needs states, and {type(model).__name__} has none; "
                "leave it out."
            )
        ledger, loss = Ledger(target, x, y), named_loss(self.loss, target.classes)
        for configuration in self._configurations(model.solver.max_steps):
            samples = ledger.open()
            if not len(samples):
                break
            ledger.sign(_name(configuration))
            start = x[samples]
            if self.random_start:
                start = random_starts(threat, start, rng.take(samples.tolist()))
            lanes = Lanes(samples, torch.full_like(samples, -1), start)
            objective = LogitLoss(target, y, loss, view=StateLogits(model, configuration))
            ascend(objective, self._rule(x[samples], threat), self.steps, lanes, ledger)
        return ledger.candidates()

    def _configurations(self, reached: int) -> Iterator[Configuration]:
        """What is attacked, in order."""
        numbers, gradients = _GRIDS[self.grid]
        grid = [
            tuple(FromState(state, *gradient) for state in numbers if state <= reached)
            for gradient in gradients
        ]
        if self.ensemble:
            yield from grid
        if self.states:
            yield from ((single,) for together in zip(*grid, strict=True) for single in together)

    def _rule(self, x: Images, threat: Threat) -> Rule:
        if self.inner == "apgd":
            return AutoPGD(x, threat, self.steps)
        return Steepest(x, threat, shrinking(2.5 * threat.eps, self.steps))


class StateLogits:
    """The mean of the logits that are read out from some states of the deployed solve.

    Args:
        gradients: of those states; their damped steps are in the logits too.
    """

    def __init__(self, model: EquilibriumClassifier, gradients: Configuration) -> None:
        self.model, self.gradients = model, gradients
        self.solver = model.solver.with_steps(max(g.state for g in gradients))

    def __call__(self, x: Images, warm: States = ()) -> Output:
        """Logits (batch, classes) of `x`, from the cold start whatever `warm` is."""
        del warm
        injection = self.model.embed(x.to(parameter_dtype(self.model) or x.dtype))
        with torch.no_grad():
            start = self.model.start(injection)
            problem = Problem(self.model.cell, injection, start)
            solution = self.solver(problem, start, keep_states=True)
        states = [g.carrier(problem, solution, self.solver).z for g in self.gradients]
        return Output(torch.stack([self.model.readout(z) for z in states]).mean(0))


def _name(configuration: Configuration) -> str:
    """As in gradients' names."""
    if len(configuration) == 1:
        return str(configuration[0])
    first = configuration[0]
    return f"ensemble({first.steps},{first.damping:g})"
