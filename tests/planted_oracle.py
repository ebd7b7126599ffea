"""An attack that is told where the gradient is: the yardstick for attacks that are not.

It ascends on a differentiable stand-in for the defective model, written by someone who knows the
defect, and keeps what the defective model itself gets wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from robustdeq.evaluation.judge import DRAWS, predictions
from robustdeq.threats import Threat

Surrogate = Callable[[Tensor], Tensor]
"""Images to logits, differentiable."""
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard an oracle tries.

    Attributes:
        steps: of each ascent.
        restarts: ascents of the untargeted losses from random points, after those from the input.
        targets: classes tried as targets per sample, the likeliest first.
        queries: of a random search from the best points, by the defective model's own margin.
        draws: calls that a gradient and a score are averaged over; the majority decides.
        together: rows that must share a batch at all times; 0 where rows are independent.
        fresh: whether every call is the first one of a copy of the model.
    """

    steps: int = 20
    restarts: int = 2
    targets: int = 9
    queries: int = 0
    draws: int = 1
    together: int = 0
    fresh: bool = False

    def longer(self, factor: int) -> Effort:
        """The same with so many times the steps, restarts and queries."""
        return replace(
            self,
            steps=self.steps * factor,
            restarts=self.restarts * factor,
            queries=self.queries * factor,
        )


def robust_under(
    model: nn.Module,
    surrogates: tuple[Surrogate, ...],
    x: Tensor,
    y: Tensor,
    threat: Threat,
    effort: Effort,
) -> Tensor:
    """Which samples the defective model gets right, clean and under the oracle's attack."""
    size = effort.together or len(x)
    parts = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for rows in torch.arange(len(x)).split(size):
            hunt = Hunt(model, x[rows], y[rows], threat, effort)
            for surrogate in surrogates:
                hunt.along(surrogate)
            hunt.search()
            parts.append(hunt.survivors())
    return torch.cat(parts)


class Hunt:
    """The best example so far of each sample, and whom it does not break yet."""

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, effort: Effort
    ) -> None:
        self.model, self.x, self.y, self.threat, self.effort = model, x, y, threat, effort
        self.clean = self.wrong_share(x, y, self.many) <= 0.5
        self.best = x.clone()
        self.score = torch.full((len(x),), -torch.inf)
        self.alive = self.clean.clone()

    @property
    def many(self) -> int:
        """Draws of a decision."""
        return DRAWS if self.effort.draws > 1 else 1

    @torch.no_grad()
    def wrong_share(self, x: Tensor, y: Tensor, draws: int) -> Tensor:
        """The share of draws in which the defective model is wrong; half counts as wrong."""
        asked = copy.deepcopy(self.model) if self.effort.fresh else self.model
        wrong = [predictions(asked(x)) != y for _ in range(draws)]
        share = torch.stack(wrong).float().mean(0)
        return share + (share == 0.5) * 1e-3

    def along(self, surrogate: Surrogate) -> None:
        """All losses and starts through one surrogate, each on the samples still alive."""
        for loss, start in self._plans(surrogate):
            rows = self.rows()
            if not int(self.alive.sum()):
                return
            self._ascend(surrogate, loss, start, rows)
            self._decide()

    @torch.no_grad()
    def search(self) -> None:
        """Some pixels of the best points drawn anew, and kept where the margin grows."""
        rows = self.alive.nonzero().squeeze(1)
        if not self.effort.queries or not len(rows):
            return
        x, y, current = self.x[rows], self.y[rows], self.best[rows]
        largest = margin(self.model(current), y)
        for query in range(self.effort.queries):
            chosen = torch.rand_like(x) < 0.2 * torch.rand(len(x), 1, 1, 1)
            offset = self.threat.eps * (2 * torch.rand_like(x) - 1)
            offset = self.threat.eps * offset.sign() if query % 2 else offset
            proposed = self.threat.project(x, torch.where(chosen, x + offset, current))
            margins = margin(self.model(proposed), y)
            better = margins > largest
            current[better], largest[better] = proposed[better], margins[better]
        self.best[rows] = current
        self.alive[rows[largest > 0]] = False

    def rows(self) -> Tensor:
        """The samples an ascent is given."""
        whole = bool(self.effort.together)
        return torch.arange(len(self.x)) if whole else self.alive.nonzero().squeeze(1)

    def survivors(self) -> Tensor:
        """Who is right on the clean input and on the best example."""
        return self.clean & (self.wrong_share(self.best, self.y, self.many) <= 0.5)

    def _plans(self, surrogate: Surrogate) -> Iterator[tuple[Loss, bool]]:
        """Losses, and whether the start is random."""
        yield margin, False
        yield cross_entropy, True
        with torch.no_grad():
            order = surrogate(self.x).scatter(1, self.y[:, None], -torch.inf).argsort(1).flip(1)
        for rank in range(self.effort.targets):
            self.target = order[:, rank]
            yield self._towards, rank % 2 == 1
        for _ in range(self.effort.restarts):
            yield margin, True

    def _towards(self, logits: Tensor, y: Tensor) -> Tensor:
        target = self.target[self._current]
        return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)

    def _ascend(self, surrogate: Surrogate, loss: Loss, random: bool, rows: Tensor) -> None:
        self._current = rows
        x, y, eps = self.x[rows], self.y[rows], self.threat.eps
        current = x.clone()
        if random:
            current = self.threat.project(x, x + eps * (2 * torch.rand_like(x) - 1))
        momentum = torch.zeros_like(x)
        for step in range(self.effort.steps):
            gradient, margins = self._slope(surrogate, loss, current, y)
            self._offer(rows, current, margins)
            momentum = 0.75 * momentum + gradient / gradient.abs().flatten(1).mean(1).clamp_min(
                1e-12
            ).view(-1, 1, 1, 1)
            size = eps * max(0.5 * (1 - step / self.effort.steps), 0.02)
            current = self.threat.project(x, current + size * momentum.sign())
        self._offer(rows, current, margins)

    def _slope(
        self, surrogate: Surrogate, loss: Loss, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradient and the margin, over the draws."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = torch.stack([surrogate(x) for _ in range(self.effort.draws)]).mean(0)
            (gradient,) = torch.autograd.grad(loss(logits, y).sum(), x)
        return gradient, margin(logits.detach(), y)

    def _offer(self, rows: Tensor, x: Tensor, margins: Tensor) -> None:
        """Keep what fools the defective model, or else what the surrogate likes best."""
        wrong = self.wrong_share(x.detach(), self.y[rows], self.effort.draws)
        score = 1e3 * wrong + torch.tanh(margins / 100)
        better = (score > self.score[rows]) & self.alive[rows]
        self.best[rows[better]] = x.detach()[better]
        self.score[rows[better]] = score[better]

    def _decide(self) -> None:
        if self.many == 1 and not self.effort.together:
            self.alive &= self.score < 500
            return
        fooled = self.wrong_share(self.best, self.y, self.many) > 0.5
        self.alive &= ~fooled
        self.score[self.alive] = -torch.inf


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best wrong logit minus the right one."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - own


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(logits)_y."""
    return F.cross_entropy(logits, y, reduction="none")
