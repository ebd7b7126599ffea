"""Transfer: examples made on undefended models, or by other rows, tried on the defended one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from robustdeq.attacks._apgd import AutoPGD
from robustdeq.attacks._ascent import (
    Lanes,
    LogitLoss,
    Objective,
    Rule,
    Steepest,
    ascend,
    shrinking,
)
from robustdeq.attacks._ledger import Ledger
from robustdeq.attacks._losses import named_loss
from robustdeq.attacks._starts import random_starts, side_by_side
from torch import Tensor

from robustdeq.errors import UsageError
from robustdeq.interfaces import Access, Budget, Candidates
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Counts, Images, Labels
from robustdeq.targets import Pool, Target
from robustdeq.threats import Norm, Threat

SCALES = (1.0, 0.5, 2.0, 4.0)
"""Factors on the perturbation of an example that was made elsewhere, before projection."""


class Runs:
    """The runs of one attack on one batch; the ledger keeps what the deployed model likes least.

    Random starts belong to the sample, so that its examples do not depend on its companions.
    """

    def __init__(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> None:
        self.target, self.x, self.y, self.threat, self.rng = target, x, y, threat, rng
        self.ledger = Ledger(target, x, y)

    def loss(self, name: str, view: Target | None = None) -> Objective:
        """A loss by name, of the target's logits or of another view's."""
        loss = named_loss(name, self.target.classes)
        return LogitLoss(self.target, self.y, loss, view=view)

    def ascend(
        self,
        maker: str,
        objective: Objective,
        steps: int,
        goals: Tensor | None = None,
        *,
        rule: Callable[[Images, Threat, int], Rule] = AutoPGD,
        random: bool = True,
    ) -> None:
        """One run from random points, or from the inputs, for all samples that are still open.

        Args:
            goals: (batch, goals) classes to drive to, side by side; none for untargeted losses.
            rule: makes the steps, from the clean images, the threat and their number.
        """
        lanes = self._lanes(goals)
        if len(lanes.samples) and random:
            streams = self.rng.take(lanes.samples.tolist())
            lanes = lanes._replace(start=random_starts(self.threat, lanes.start, streams))
        self._run(maker, objective, rule(self._clean(lanes), self.threat, steps), steps, lanes)

    def polish(self, maker: str, objective: Objective, steps: int, among: Tensor) -> None:
        """Short steps on from the best candidates so far.

        Args:
            among: the samples, (batch,) bool, that it is done for.
        """
        lanes = self._lanes(None)
        lanes = lanes.take(among[lanes.samples].nonzero().squeeze(1))
        lanes = lanes._replace(start=self.ledger.x[lanes.samples])
        lengths = shrinking(self.threat.eps, steps)
        self._run(
            maker, objective, Steepest(self._clean(lanes), self.threat, lengths), steps, lanes
        )

    def _lanes(self, goals: Tensor | None) -> Lanes:
        goals = torch.full_like(self.y, -1)[:, None] if goals is None else goals
        samples, classes = side_by_side(goals, self.ledger.open())
        return Lanes(samples, classes, self.x[samples])

    def _clean(self, lanes: Lanes) -> Images:
        return self.x[lanes.samples]

    def _run(self, maker: str, objective: Objective, rule: Rule, steps: int, lanes: Lanes) -> None:
        if len(lanes.samples) and steps:
            self.ledger.sign(maker)
            ascend(objective, rule, steps, lanes, self.ledger)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Auto-PGD on what stands behind the defense, its iterates tried on the defended model.

    The models that the defended one itself offers as `undefended()`: a purifier's classifier, the
    DEQ before a stabilizing module. A defense can only be better than what it defends if these
    examples fail (the check that brought SODEF below its own backbone). Its own gradient then
    takes the best candidates further.

    Attributes:
        steps: of each run on an undefended model.
        restarts: of all runs, from random points.
        targets: likeliest wrong classes of the targeted margin, side by side.
        polish: steps through the defended model from the best candidate.
    """

    needs: ClassVar[Access] = Access.GRADIENTS

    steps: int = 100
    restarts: int = 1
    targets: int = 9
    polish: int = 20

    def __post_init__(self) -> None:
        at_least("transfer", 1, steps=self.steps, restarts=self.restarts, targets=self.targets)
        at_least("transfer", 0, polish=self.polish)

    def fits(self, target: Target) -> bool:
        """Whether anything stands behind a defense."""
        return bool(target.undefended())

    def budget(self, classes: int) -> Budget:
        """See `robustdeq.interfaces.Attack`; for one undefended model."""
        runs = self.restarts * (2 + min(self.targets, classes - 1))
        steps = self.steps * runs + self.polish
        # Twice every fifth step the deployed predictor looks at what was found.
        return Budget(int(1.4 * steps) + 2 * runs, steps)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        """See `robustdeq.interfaces.Attack`."""
        runs = Runs(target, x, y, threat, rng)
        goals = runs.ledger.likeliest(self.targets)
        for _ in range(self.restarts):
            for name, source in target.undefended().items():
                runs.ascend(f"transfer-{name}-ce", runs.loss("ce", source), self.steps)
                runs.ascend(f"transfer-{name}-margin", runs.loss("margin", source), self.steps)
                targeted = runs.loss("targeted_margin", source)
                runs.ascend(f"transfer-{name}-targeted", targeted, self.steps, goals)
        everything = torch.ones_like(y, dtype=torch.bool)
        runs.polish("polish", runs.loss("margin"), self.polish, everything)
        return runs.ledger.candidates()


@dataclass(frozen=True, kw_only=True)
class TransferRows:
    """What broke the other rows of the suite, tried on this one.

    Each example as it is, shrunk, stretched and pushed to the edge of the ball, and the mean
    direction of all rows; the best candidate is the start of a short ascent through the model.

    Attributes:
        polish: steps of that ascent.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    phase: ClassVar[int] = 2

    polish: int = 20

    def __post_init__(self) -> None:
        at_least("transfer_rows", 0, polish=self.polish)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        """See `robustdeq.interfaces.Attack`."""
        return relayed(Runs(target, x, y, threat, rng), target.pools, self.polish)


def relayed(runs: Runs, pools: Sequence[Pool], polish: int) -> Candidates:
    """The best that can be made of pools; samples without an example keep their clean input."""
    held = torch.zeros_like(runs.y, dtype=torch.bool)
    summed = torch.zeros_like(runs.x)
    for pool in pools:
        usable = pool.available & pool.x.flatten(1).isfinite().all(1)
        held |= usable
        delta = torch.where(usable.view(-1, 1, 1, 1), pool.x - runs.x, 0.0)
        summed += delta
        _offer(runs, f"transfer-{pool.name}", delta, usable)
    _offer(runs, "transfer-mean", summed, held)
    runs.polish("polish", runs.loss("margin"), polish, held)
    return runs.ledger.candidates()


def _offer(runs: Runs, maker: str, delta: Images, usable: Tensor) -> None:
    """Show the ledger what can be made of one perturbation of each sample."""
    runs.ledger.sign(maker)
    for candidate in _variants(runs.threat, runs.x, delta):
        samples: Counts = (usable & ~runs.ledger.settled).nonzero().squeeze(1)
        runs.ledger.offer(samples, candidate[samples])


def _variants(threat: Threat, x: Images, delta: Images) -> list[Images]:
    """The perturbation scaled, stretched to the edge of the ball, and all of it at the edge."""
    reach = threat.distance(x, x + delta).clamp_min(1e-12).to(delta)
    moves = [delta * scale for scale in SCALES]
    moves.append(delta * (threat.eps / reach).view(-1, 1, 1, 1))
    if threat.norm is Norm.LINF:
        moves.append(threat.eps * threat.steepest(delta))
    return [threat.project(x, x + move) for move in moves]


def at_least(attack: str, least: int, **values: int) -> None:
    """Refuse numbers that are too small.

    Raises:
        UsageError: naming the attack and the first such number.
    """
    for name, value in values.items():
        if value < least:
            raise UsageError(f"{attack} has {name}={value}; give at least {least}.")
