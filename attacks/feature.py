"""Attacks on what a model computes before its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from robustdeq.attacks._apgd import AutoPGD
from robustdeq.attacks._ascent import Lanes, Reading, States, ascend, most_rows
from robustdeq.attacks._features import Eye, eyes, features_of, has_features
from robustdeq.attacks._ledger import Ledger, shows_deployed
from robustdeq.attacks._starts import random_starts, side_by_side
from torch import Tensor

from robustdeq.equilibrium import Honest
from robustdeq.errors import CaseError, UsageError
from robustdeq.interfaces import Access, Budget, Candidates
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Counts, Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat

Goal = Literal["towards", "away", "pull"]
GUIDES = "train"
"""The pool whose images of other classes guide `pull`."""
FeatureLoss = Callable[[Tensor, Counts, Labels], Tensor]
"""From features (rows, size), the sample and the goal of each row to a loss (rows,)."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Ascent in feature space, past a head that hides the way (SODEF's authors attack so).

    Features are the input of the head (the last linear layer with an output per class, else the
    last module with parameters that is called) and, for models that iterate, the state of the last
    solve where it is another. Nothing of a sample's examples depends on its batch:

    - `towards`: along the direction that leads from its class to a likely wrong one, for a linear
      head the difference of two rows of its weight, for a state the readout's gradient at the
      clean one;
    - `away`: far from its clean features, in L2 and in L1;
    - `pull`: near, in L1, to the features of another class's image, where the target has a pool
      named "train" with an image for the sample that the model takes for another class.

    Attributes:
        goals: in this order, one run or several each.
        targets: likeliest wrong classes for `towards`, side by side.
        steps: gradient steps of a run, by Auto-PGD.
        restarts: of all runs, from random points.
    """

    needs: ClassVar[Access] = Access.GRADIENTS

    goals: tuple[Goal, ...] = ("towards", "away", "pull")
    targets: int = 3
    steps: int = 25
    restarts: int = 1

    def __post_init__(self) -> None:
        if min(self.steps, self.restarts, self.targets, len(self.goals)) < 1:
            raise UsageError(
                f"feature has steps={self.steps}, restarts={self.restarts}, targets="
                f"{self.targets}, goals={self.goals}; give at least 1 of each."
            )
        if not set(self.goals) <= {"towards", "away", "pull"}:
            raise UsageError(
                f"feature has goals={self.goals}; it knows 'towards', 'away' and 'pull'."
            )

    def fits(self, target: Target) -> bool:
        """Whether the model has states or modules with parameters inside."""
        return has_features(target)

    def budget(self, classes: int) -> Budget:
        """See `robustdeq.interfaces.Attack`."""
        runs = {"towards": min(self.targets, classes - 1), "away": 2, "pull": 0}
        count = 2 * self.restarts * sum(runs[goal] for goal in self.goals)
        return Budget(6 + count * (self.steps + 1), count * self.steps)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        """See `robustdeq.interfaces.Attack`.

        Raises:
            CaseError: for a model without a module that could have features.
        """
        if not has_features(target):
            raise CaseError(
                f"attack feature needs a module with parameters inside the model, and "
                f"{type(target.model).__name__} has none; leave it out."
            )
        ledger, found = Ledger(target, x, y), eyes(target, x)
        runs = [
            run
            for goal in self.goals
            for eye in found
            for run in self._runs(goal, eye, target, x, y, ledger)
        ]
        for run in runs * self.restarts:
            samples, goals = side_by_side(run.goals, ledger.open())
            samples, goals = samples[goals >= 0], goals[goals >= 0]
            if not len(samples):
                continue
            ledger.sign(run.name)
            start = random_starts(threat, x[samples], rng.take(samples.tolist()))
            objective = _FeatureObjective(target, run)
            rule = AutoPGD(x[samples], threat, self.steps)
            ascend(objective, rule, self.steps, Lanes(samples, goals, start), ledger)
        return ledger.candidates()

    def _runs(
        self, goal: Goal, eye: Eye, target: Target, x: Images, y: Labels, ledger: Ledger
    ) -> list[_Run]:
        rows = most_rows(target)
        if goal == "pull":
            return _pulled(eye, target, y, rows)
        clean = features_of(eye, x, rows)
        if goal == "away":
            return _away(eye, clean)
        return _towards(eye, clean, ledger.likeliest(self.targets), y)


class _Run(NamedTuple):
    """A loss of features, and the goals (batch, side by side) of each sample, -1 for none."""

    name: str
    eye: Eye
    loss: FeatureLoss
    goals: Tensor


def _towards(eye: Eye, clean: Tensor, classes: Tensor, y: Labels) -> list[_Run]:
    slopes = [eye.slopes(clean, column, y) for column in classes.T]
    known = [slope for slope in slopes if slope is not None]
    if not known:
        return []
    table = torch.stack(known, 1)

    def loss(features: Tensor, samples: Counts, goals: Labels) -> Tensor:
        return (features * table[samples, goals]).sum(1)

    ranks = torch.arange(classes.shape[1], device=y.device).expand_as(classes)
    return [_Run(f"towards,{eye.name}", eye, loss, ranks)]


def _away(eye: Eye, clean: Tensor) -> list[_Run]:
    goals = torch.zeros(len(clean), 1, dtype=torch.long, device=clean.device)
    return [
        _Run(f"away{order},{eye.name}", eye, _distance(clean, order, 1.0), goals)
        for order in (2, 1)
    ]


def _pulled(eye: Eye, target: Target, y: Labels, rows: int) -> list[_Run]:
    runs = []
    for pool in target.pools:
        if pool.name != GUIDES:
            continue
        with torch.no_grad():
            other = target.through(Honest())(pool.x).logits.argmax(1) != y
        goals = torch.where(pool.available & other, 0, -1)[:, None]
        loss = _distance(features_of(eye, pool.x, rows), 1, -1.0)
        runs.append(_Run(f"pull,{eye.name}", eye, loss, goals))
    return runs


def _distance(points: Tensor, order: int, sign: float) -> FeatureLoss:
    def loss(features: Tensor, samples: Counts, goals: Labels) -> Tensor:
        gap: Tensor = torch.linalg.vector_norm(features - points[samples], ord=order, dim=1)
        return sign * gap

    return loss


class _FeatureObjective:
    """See `Objective`."""

    warm = False

    def __init__(self, target: Target, run: _Run) -> None:
        self.run, self.rows, self.trusted = run, most_rows(target), shows_deployed(target)

    def __call__(self, x: Images, samples: Counts, goals: Labels, states: States) -> Reading:
        sight = self.run.eye(x)
        return Reading(self.run.loss(sight.features, samples, goals), sight.logits)
