"""A surrogate distilled from a model's answers, attacked in its place: no gradient is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from robustdeq.attacks._apgd import AutoPGD
from robustdeq.attacks._ascent import Lanes, LogitLoss, ascend
from robustdeq.attacks._ledger import Ledger
from robustdeq.attacks._losses import TARGETED
from robustdeq.attacks._starts import side_by_side
from robustdeq.attacks.transfer import at_least
from torch import nn
from torch.nn import functional as F  # noqa: N812

from robustdeq.interfaces import Access, Budget, Candidates, Scope
from robustdeq.randomness import SampleRandom, derived_seed
from robustdeq.shapes import Counts, Images, Labels, Logits
from robustdeq.targets import Target
from robustdeq.threats import Threat

SMALL_IMAGE = 16
"""Images of fewer pixels a side get a fully connected surrogate."""
RATE = 2e-3
BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Attacks a small network that was taught to answer as the model does.

    For models of which nothing is known, not even a gradient: they are asked for their answers
    alone. A surrogate is fitted to those on the chunk's images, on random points of the balls
    around them, on mixtures of two images and on noise. Then, in rounds, Auto-PGD attacks the
    surrogate towards the likeliest wrong classes, the model is asked at the examples, and the
    surrogate learns from its answers (Papernot et al. 2017, "Practical Black-Box Attacks against
    Machine Learning", with ascents in the place of their Jacobian steps). Answers are standardized,
    so that scaled, saturated or rounded logits serve as well; where only labels tell anything, the
    labels are learned.

    The surrogate has one hidden width of 256; its random numbers are its own, under the suite's
    seed. It sees the whole chunk as one batch.

    Attributes:
        points: random points of each ball that the model is asked at.
        rounds: attacks on the surrogate.
        fit: Adam steps before each.
        steps: of Auto-PGD on the surrogate.
        targets: likeliest wrong classes, side by side: queries a round for a sample that is open.
    """

    needs: ClassVar[Access] = Access.LOGITS
    scope: ClassVar[Scope] = Scope.CHUNK

    points: int = 40
    rounds: int = 3
    fit: int = 300
    steps: int = 40
    targets: int = 9

    def __post_init__(self) -> None:
        at_least(
            "distill",
            1,
            points=self.points,
            rounds=self.rounds,
            fit=self.fit,
            steps=self.steps,
            targets=self.targets,
        )

    def budget(self, classes: int) -> Budget:
        """See `robustdeq.interfaces.Attack`: the clean input twice, a mixture and noise besides."""
        attacked = self.rounds * min(self.targets, classes - 1)
        return Budget(5 + self.points + attacked, 0)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        """See `robustdeq.interfaces.Attack`."""
        with _own_randomness(rng.seed, x.device), torch.enable_grad():
            pupil = _Pupil(target, x, y, threat, rng.seed)
            pupil.ask_around(self.points)
            for _ in range(self.rounds):
                if not len(pupil.ledger.open()):
                    break
                pupil.learn(self.fit)
                pupil.attack(self.steps, self.targets)
        return pupil.ledger.candidates()


class _Pupil:
    """One surrogate with all answers that it has been given."""

    def __init__(self, target: Target, x: Images, y: Labels, threat: Threat, seed: int) -> None:
        self.target, self.x, self.y, self.threat = target, x, y, threat
        self.generator = torch.Generator().manual_seed(derived_seed(seed, "distill"))
        self.ledger = Ledger(target, x, y)
        self.network = surrogate(x.shape[1:], target.classes).to(x.device)
        self.adam = torch.optim.Adam(self.network.parameters(), lr=RATE)
        self.inputs, self.answers = [x], [self.ledger.clean]

    def ask_around(self, points: int) -> None:
        """At random points of the balls, half of them at the edge, at mixtures and at noise."""
        samples = torch.arange(len(self.x), device=self.x.device)
        for k in range(points):
            offset = 2 * self._uniform() - 1
            if k % 2:
                offset = self.threat.eps * self.threat.steepest(offset)
            else:
                radial = torch.rand(len(self.x), generator=self.generator).to(self.x)
                offset = self.threat.random_offset(offset, radial)
            self._ask(self.threat.project(self.x, self.x + offset), samples)
        other = self.x[torch.randperm(len(self.x), generator=self.generator).to(samples)]
        share = torch.rand((len(self.x), 1, 1, 1), generator=self.generator).to(self.x)
        self._ask(share * self.x + (1 - share) * other, None)
        self._ask(self._uniform(), None)

    def learn(self, steps: int) -> None:
        """Fit the surrogate to all answers."""
        inputs, logits = torch.cat(self.inputs), torch.cat(self.answers)
        wanted, labels = standardized(logits), logits.argmax(1)
        by_value, by_label = (0.1, 1.0) if labels_alone(logits) else (1.0, 0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(self.adam, 1.0, 0.05, steps)
        size = (min(BATCH, len(inputs)),)
        for _ in range(steps):
            rows = torch.randint(len(inputs), size, generator=self.generator).to(labels)
            found = self.network(inputs[rows])
            loss = by_value * F.mse_loss(found, wanted[rows])
            loss = loss + by_label * F.cross_entropy(2 * found, labels[rows])
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
            schedule.step()
        for group in self.adam.param_groups:
            group["lr"] = RATE

    def attack(self, steps: int, targets: int) -> None:
        """Auto-PGD on the surrogate towards several goals each; the model is asked at the ends."""
        samples, goals = side_by_side(self.ledger.likeliest(targets), self.ledger.open())
        x, y = self.x[samples], self.y[samples]
        view = Target(self.network, self.target.classes, batch_size=self.target.batch_size)
        # Each goal for itself, and no end before the last step: nothing transfers like confidence.
        found = Ledger(view, x, y, confidence=torch.inf)
        loss = LogitLoss(view, y, TARGETED["targeted_margin"])
        lanes = Lanes(torch.arange(len(x), device=x.device), goals, self.ledger.x[samples])
        ascend(loss, AutoPGD(x, self.threat, steps), steps, lanes, found)
        self._ask(found.x, samples)

    def _ask(self, points: Images, samples: Counts | None) -> None:
        """The model's answers; points in the balls of `samples` are candidates as well."""
        with torch.no_grad():
            logits = self.target(points).logits
        self.inputs.append(points)
        self.answers.append(logits)
        if samples is None:
            return
        self.ledger.sign("surrogate")
        if self.ledger.randomized:
            self.ledger.offer(samples, points)
        else:
            self.ledger.enter(samples, points, logits)

    def _uniform(self) -> Images:
        return torch.rand(self.x.shape, generator=self.generator).to(self.x)


def surrogate(shape: torch.Size, classes: int) -> nn.Module:
    """An untrained network from images of a shape (channels, height, width) to logits."""
    channels, height, width = shape
    layers: list[nn.Module] = [_Centered()]
    if min(height, width) >= SMALL_IMAGE:
        for before, after, kernel in ((channels, 16, 5), (16, 32, 3)):
            layers += [nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2), nn.GELU()]
        channels, height, width = 32, (height + 3) // 4, (width + 3) // 4
    layers.append(nn.Flatten())
    for before, after in pairwise((channels * height * width, 256, 256)):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(256, classes))


class _Centered(nn.Module):
    def forward(self, x: Images) -> Images:
        """Pixels around 0."""
        return x - 0.5


def standardized(logits: Logits) -> Logits:
    """Answers of a size that can be learned; the order of the classes stays in each row.

    Probabilities become their logarithms. Then each row is centered, divided by the typical size,
    and large values are compressed (asinh): a few saturated rows do not drown the others.
    """
    logits = torch.nan_to_num(logits.float(), nan=0.0)
    if bool((logits >= 0).all()) and bool((logits.sum(1) - 1).abs().max() < 1e-3):
        logits = logits.clamp_min(1e-30).log()
    logits = logits - logits.mean(1, keepdim=True)
    size = logits.abs()
    typical = size[size > 0].median() if bool((size > 0).any()) else size.new_ones(())
    return torch.asinh(logits / typical)


def labels_alone(logits: Logits) -> bool:
    """Whether most answers tell two classes apart at most: one number for one, one for the rest."""
    distinct = (logits.sort(1).values.diff(dim=1) > 0).sum(1) + 1
    return int(distinct.median()) <= 2


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Initialization, and randomized models, draw under the seed; the caller's state is kept."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
