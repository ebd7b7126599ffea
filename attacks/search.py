"""Against steps and plateaus: ascents that trust no value, then a random search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from robustdeq.attacks._ascent import Point, Rule, States
from robustdeq.attacks._losses import is_targeted, margin
from robustdeq.attacks._starts import random_starts
from robustdeq.attacks.transfer import Runs, at_least
from torch import Tensor

from robustdeq.equilibrium import Honest
from robustdeq.interfaces import Access, Budget, Candidates
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Counts, Images, Labels, PerSample
from robustdeq.targets import Target
from robustdeq.threats import Norm, Threat

MOMENTUM = 0.75
"""Weight of the directions so far against a new one."""
SAME = 0.99
"""Cosine from which two gradients count as one."""
BLOCK = 8
"""Proposals whose random numbers are drawn at once."""
LARGEST_SHARE = 0.2
"""Of the pixels, drawn anew by one proposal."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Ascents whose steps do not depend on what the model says, then a search without gradients.

    Auto-PGD halves its steps where the loss stands still, and behind rounding, a look-up or a
    saturated output it nearly always does. Here the steps have lengths fixed in advance, along the
    mean of the normalized gradients so far (Dong et al. 2018, "Boosting Adversarial Attacks with
    Momentum"), of the margin, the cross-entropy and each likely class. From the best point some
    pixels are then drawn anew, again and again, and kept where the margin of the deployed
    predictor grows: that finds the right side of steps which a gradient only points at.

    Attributes:
        steps: of each ascent.
        restarts: of all ascents; the first starts at the input, the others at random.
        targets: likeliest wrong classes, side by side.
        queries: proposals of the random search.
        masked_only: leave models alone whose honest gradient is that of the target's view, at the
            input and at a random point: they have no steps, and plainer attacks reach them.
    """

    needs: ClassVar[Access] = Access.GRADIENTS

    steps: int = 20
    restarts: int = 3
    targets: int = 9
    queries: int = 2500
    masked_only: bool = False

    def __post_init__(self) -> None:
        at_least("search", 1, steps=self.steps, restarts=self.restarts, targets=self.targets)
        at_least("search", 0, queries=self.queries)

    def budget(self, classes: int) -> Budget:
        """See `robustdeq.interfaces.Attack`."""
        runs = self.restarts * (2 + min(self.targets, classes - 1))
        return Budget(6 + (self.steps + 1) * runs + self.queries, 4 + self.steps * runs)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        """See `robustdeq.interfaces.Attack`."""
        runs = Runs(target, x, y, threat, rng)
        if self.masked_only and not _masked(runs):
            return runs.ledger.candidates()
        for restart in range(self.restarts):
            for name in ("margin", "ce", "targeted_margin"):
                goals = runs.ledger.likeliest(self.targets) if is_targeted(name) else None
                loss = runs.loss(name)
                runs.ascend(name, loss, self.steps, goals, rule=Momentum, random=restart > 0)
        runs.ledger.sign("random search")
        self._draw(runs)
        return runs.ledger.candidates()

    def _draw(self, runs: Runs) -> None:
        """Pixels of the best points drawn anew; kept where the margin grows."""
        ledger, x = runs.ledger, runs.x
        for query in range(self.queries):
            samples = ledger.open()
            if not len(samples):
                return
            if query % BLOCK == 0:
                drawn, numbers = samples, _numbers(runs.rng, samples, x)
            own = numbers[torch.isin(drawn, samples)][:, query % BLOCK]
            ledger.offer(samples, _proposed(ledger.x[samples], x[samples], runs.threat, own))


class Momentum(Rule):
    """Steps of shrinking length along the mean of the normalized gradients so far."""

    def __init__(self, x: Images, threat: Threat, steps: int) -> None:
        super().__init__(x, threat)
        self.lengths = [threat.eps * max(0.5 * (1 - k / steps), 0.02) for k in range(steps)]
        self.direction = torch.zeros_like(x)

    def advance(self, step: int, point: Point) -> tuple[Images, States]:
        """See `Rule`."""
        size = point.gradient.abs().flatten(1).mean(1).clamp_min(1e-12)
        size = size.view(-1, *[1] * (point.x.dim() - 1))
        self.direction = MOMENTUM * self.direction + point.gradient / size
        moved = point.x + self.lengths[step] * self.threat.steepest(self.direction)
        return self.threat.project(self.x, moved), point.states

    def keep(self, rows: Counts) -> None:
        """See `Rule`."""
        super().keep(rows)
        self.direction = self.direction[rows]


def _numbers(rng: SampleRandom, samples: Counts, x: Images) -> Images:
    """(samples, BLOCK, 3, channels, height, width) uniform in [-1, 1], each sample's own."""
    like = x.new_zeros(()).expand(len(samples), BLOCK, 3, *x.shape[1:])
    return rng.take(samples.tolist()).uniform(like)


def _proposed(current: Images, x: Images, threat: Threat, numbers: Images) -> Images:
    """One proposal each: some pixels elsewhere in the ball.

    For Linf anywhere in their range, or by turns at its ends; for L2 moved by up to half the
    radius, the others shrinking as far as the ball asks for it.

    Args:
        numbers: (batch, 3, channels, height, width), uniform in [-1, 1].
    """
    shape = (-1, *[1] * (x.dim() - 1))
    scalars, mask, offset = numbers.unbind(1)
    share, turn = (scalars.flatten(1)[:, k].view(shape) for k in (0, -1))
    chosen = mask.abs() < LARGEST_SHARE * share.abs()
    if threat.norm is Norm.LINF:
        ends = torch.where(turn > 0, offset.sign(), offset)
        return threat.project(x, torch.where(chosen, x + threat.eps * ends, current))
    move = torch.where(chosen, offset, 0.0)
    size = move.flatten(1).norm(dim=1).clamp_min(1e-12).view(shape)
    return threat.project(x, current + 0.5 * threat.eps * turn.abs() * move / size)


def _masked(runs: Runs) -> bool:
    """Whether the view's gradient is another than the honest one anywhere that we look."""
    if isinstance(runs.target.gradient, Honest):
        return True
    elsewhere = random_starts(runs.threat, runs.x, runs.rng)
    cosines = (_cosine(runs.target, x, runs.y) for x in (runs.x, elsewhere))
    return any(bool((cosine < SAME).any()) for cosine in cosines)


def _cosine(target: Target, x: Images, y: Labels) -> PerSample:
    """Of the two gradients of the margin, per sample; 0 where one of them is missing."""
    one, other = (_slope(view, x, y) for view in (target.through(Honest()), target))
    both = one.norm(dim=1) * other.norm(dim=1)
    cosine = (one * other).sum(1) / both.clamp_min(1e-300)
    return torch.where((one == other).all(1), 1.0, cosine.nan_to_num())


def _slope(view: Target, x: Images, y: Labels) -> Tensor:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        losses = margin(view(leaf).logits, y)
        (found,) = torch.autograd.grad(
            losses.sum(), leaf, allow_unused=True, materialize_grads=True
        )
    return found.double().flatten(1)
