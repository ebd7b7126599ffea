"""Ascent of a loss in the threat's ball: rows side by side, each with its own steps and end.

An objective says what is ascended, a rule how, and the ledger keeps what the deployed predictor
thinks of the iterates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from robustdeq.attacks._ledger import ROWS, Ledger, Watch, shows_deployed
from robustdeq.attacks._losses import GoalLoss
from torch import Tensor

from robustdeq.equilibrium import EquilibriumClassifier, Unrolled, finite
from robustdeq.errors import UsageError
from robustdeq.shapes import Counts, Images, Labels, Logits, PerSample
from robustdeq.targets import Output, Target
from robustdeq.threats import Threat

States = tuple[Tensor, ...]
_COLD: States = ()
View = Callable[[Images, States], Output]
"""A target, or several as one."""


class Reading(NamedTuple):
    """What is ascended (rows,), the view's logits, and the states to start the next solves from.

    `gradient` is that of the losses, where the objective has it at hand; else autograd takes it.
    """

    losses: PerSample
    logits: Logits
    states: States = ()
    gradient: Images | None = None


class Objective(Protocol):
    """What is ascended.

    Attributes:
        trusted: whether its logits are those of the deployed predictor.
        warm: whether they come from a warm start.
        rows: most rows that it is given at once.
    """

    trusted: bool
    warm: bool
    rows: int

    def __call__(self, x: Images, samples: Counts, goals: Labels, states: States) -> Reading:
        """Losses at `x`, with a graph.

        Args:
            samples: which sample of the batch each row belongs to.
            goals: the class that each row is driven to, -1 where there is none.
            states: of an earlier reading of the same rows; empty for a cold start.
        """
        ...


class LogitLoss:
    """A loss of a view's logits.

    Args:
        warm: start solves from those of the step before, where that leads to the same state: not
            for fixed lengths, several solves or gradients that refuse.
        view: what shows the logits, if it is not the target itself.
        rows: of one backward pass, if not as many as the target allows.
    """

    def __init__(
        self,
        target: Target,
        y: Labels,
        loss: GoalLoss,
        *,
        warm: bool = False,
        view: View | None = None,
        rows: int | None = None,
    ) -> None:
        self.view: View = view or target
        self.y, self.loss = y, loss
        self.trusted = view is None and shows_deployed(target)
        self.warm = warm and view is None and _warmable(target)
        self.rows = rows or most_rows(target)

    def __call__(self, x: Images, samples: Counts, goals: Labels, states: States) -> Reading:
        """See `Objective`."""
        output = self._seen(x, states if self.warm else ())
        losses = self.loss(output.logits, self.y[samples], goals)
        states = tuple(finite(solve.z.detach()) for solve in output.solves) if self.warm else ()
        return Reading(losses, output.logits, states)

    def _seen(self, x: Images, states: States) -> Output:
        try:
            return self.view(x, states)
        except UsageError:
            if not states:
                raise
            self.warm = False
            return self.view(x, ())


def most_rows(target: Target) -> int:
    """Rows of one backward pass: goals side by side need no more memory than a chunk."""
    return min(ROWS, target.batch_size or ROWS)


def _warmable(target: Target) -> bool:
    """Whether a warm start only saves steps: one solve, to a tolerance, of one cell."""
    model = target.model
    if not isinstance(model, EquilibriumClassifier) or target.dynamics() is None:
        return False
    fixed = isinstance(target.gradient, Unrolled) or isinstance(model.gradient, Unrolled)
    return (target.solver or model.solver).tolerance > 0 and not fixed


class Lanes(NamedTuple):
    """The rows of a run: the sample of each, its goal (-1 for none), and where it starts."""

    samples: Counts
    goals: Labels
    start: Images

    def take(self, rows: Tensor) -> Lanes:
        """Some of them."""
        return Lanes(*[part[rows] for part in self])


class Point(NamedTuple):
    """Where the rows of a run are: losses there, their gradients, and the states of the solves."""

    x: Images
    losses: PerSample
    gradient: Images
    states: States = ()

    def take(self, rows: Tensor) -> Point:
        """Some of the rows."""
        states = tuple(state[rows] for state in self.states)
        return Point(self.x[rows], self.losses[rows], self.gradient[rows], states)

    def where(self, mask: Tensor, other: Point) -> Point:
        """These rows where the mask is set, the other's elsewhere."""
        # A gradient that turns out to refuse warm starts leaves the later point without states.
        pairs = zip(self.states, other.states, strict=False)
        return Point(
            _where(mask, self.x, other.x),
            _where(mask, self.losses, other.losses),
            _where(mask, self.gradient, other.gradient),
            tuple(_where(mask, a, b) for a, b in pairs),
        )


class Rule(ABC):
    """How one run ascends; has the memory of its rows.

    Args:
        x: clean images of the rows.
    """

    def __init__(self, x: Images, threat: Threat) -> None:
        self.x, self.threat = x, threat

    @abstractmethod
    def advance(self, step: int, point: Point) -> tuple[Images, States]:
        """Where to look next, and the states to start its solves from."""

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.x = self.x[rows]


class Steepest(Rule):
    """Steps of given lengths along the direction of steepest ascent."""

    def __init__(self, x: Images, threat: Threat, lengths: list[float]) -> None:
        super().__init__(x, threat)
        self.lengths = lengths

    def advance(self, step: int, point: Point) -> tuple[Images, States]:
        """See `Rule`."""
        moved = point.x + self.threat.steepest(point.gradient) * self.lengths[step]
        return self.threat.project(self.x, moved), point.states


def shrinking(reach: float, steps: int) -> list[float]:
    """Lengths that shrink linearly to a tenth and reach so far together."""
    shares = [1.0 - 0.9 * k / steps for k in range(steps)]
    return [reach * share / sum(shares) for share in shares]


def ascend(
    objective: Objective, rule: Rule, steps: int, lanes: Lanes, ledger: Ledger, *, stop: bool = True
) -> None:
    """`steps` of a rule on all rows; `ledger` keeps the candidates.

    Args:
        stop: leave samples that are settled alone.
    """
    trusted = objective.trusted and not ledger.randomized
    watch = Watch(ledger, lanes.samples, lanes.start, trusted=trusted, warm=objective.warm)
    current, states = lanes.start, _COLD
    for step in range(steps + 1):
        last = step == steps
        point, logits = _looked_at(objective, lanes, current, states, slope=not last)
        scored = watch.see(step, last, current, logits)
        if last:
            return
        # Counting rows makes an accelerator wait, and only a score can have settled any.
        if stop and not ledger.randomized and (scored or step == 0):
            open_rows = ledger.unsettled(lanes.samples)
            if not len(open_rows):
                return
            if len(open_rows) < len(current):
                lanes, point = lanes.take(open_rows), point.take(open_rows)
                rule.keep(open_rows)
                watch.keep(open_rows)
        current, states = rule.advance(step, point)


def _looked_at(
    objective: Objective, lanes: Lanes, x: Images, states: States, *, slope: bool
) -> tuple[Point, Logits]:
    """The objective at all rows, in parts, and with `slope` its gradient."""
    parts, logits = [], []
    for begin in range(0, len(x), objective.rows):
        rows = torch.arange(begin, min(begin + objective.rows, len(x)), device=x.device)
        own = tuple(state[rows] for state in states)
        point, seen = _part(objective, lanes.take(rows), x[rows], own, slope)
        parts.append(point)
        logits.append(seen)
    if len(parts) == 1:
        return parts[0], logits[0]
    joined = Point(
        torch.cat([part.x for part in parts]),
        torch.cat([part.losses for part in parts]),
        torch.cat([part.gradient for part in parts]),
        tuple(torch.cat(state) for state in zip(*[part.states for part in parts], strict=True)),
    )
    return joined, torch.cat(logits)


def _part(
    objective: Objective, lanes: Lanes, x: Images, states: States, slope: bool
) -> tuple[Point, Logits]:
    x = x.detach().requires_grad_(slope)
    with torch.set_grad_enabled(slope):
        reading = objective(x, lanes.samples, lanes.goals, states)
    gradient = torch.zeros_like(x)
    if reading.gradient is not None:
        gradient = _scaled(finite(reading.gradient))
    elif reading.losses.requires_grad:
        (gradient,) = torch.autograd.grad(
            reading.losses.sum(), x, allow_unused=True, materialize_grads=True
        )
        # One NaN would turn the whole example into NaN.
        gradient = _scaled(finite(gradient))
    losses = torch.nan_to_num(reading.losses.detach(), nan=-torch.inf)
    return Point(x.detach(), losses, gradient, reading.states), reading.logits.detach()


def _scaled(gradient: Images) -> Images:
    """Largest entry 1 in each row: norms of the tiny gradients of confident models underflow."""
    largest = gradient.flatten(1).abs().amax(1).view(-1, *[1] * (gradient.dim() - 1))
    return torch.where(largest > 0, gradient / largest, gradient)


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b)
