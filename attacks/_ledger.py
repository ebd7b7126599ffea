"""What an attack has found so far: the best candidate of each sample, by the deployed predictor."""

from __future__ import annotations

import torch
from robustdeq.attacks._losses import margin
from torch import Tensor

from robustdeq.differentiation import ModuleGradient
from robustdeq.equilibrium import Honest
from robustdeq.interfaces import Candidates
from robustdeq.shapes import Counts, Images, Labels, Logits, Mask, PerSample
from robustdeq.targets import Target

ROWS = 256
"""Most rows in one pass, whatever is attacked side by side."""
EVERY = 5
"""Steps between two looks of the deployed predictor at what another view has found."""
_DRAWS = 9
"""Draws by which a candidate for a randomized model is scored."""
FRESH = 32
"""Draws by which one that is to be kept is scored anew: the best of many scores was lucky."""
SURE = 22
"""Of them, in how many it must be wrong to end a search; the judge asks for half of its own."""
_ROUNDING = 1e-5
"""Margins below this share of the largest logit may be rounding: they end no search."""


class Ledger:
    """The candidate of the largest margin of each sample, the clean input to begin with.

    The margin is that of the deployed predictor: cold start, deployed solver. Of a randomized one
    it is the median over draws, and what looks better than what is held counts by draws of its own:
    the margin that it has in all but a third of them.

    Args:
        confidence: the margin that a candidate must exceed for the search to end.
    """

    def __init__(self, target: Target, x: Images, y: Labels, confidence: float = 0.0) -> None:
        self.deployed = target.through(Honest())
        self.y, self.confidence = y, confidence
        self.clean = self._logits(x)
        self.randomized = _differ(self.clean, self._logits(x))
        self.x = x.clone()
        self.margin = self.clean.new_full((len(x),), -torch.inf)
        self.settled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._makers, self._made_by = [""], torch.zeros_like(y)
        everything = torch.arange(len(x), device=x.device)
        if self.randomized:
            self.offer(everything, x)
        else:
            self.enter(everything, x, self.clean)

    def open(self) -> Counts:
        """The samples whose search has not ended, in order."""
        return (~self.settled).nonzero().squeeze(1)

    def unsettled(self, samples: Counts) -> Counts:
        """The rows, in order, whose sample's search has not ended.

        Args:
            samples: the sample of each row.
        """
        return (~self.settled[samples]).nonzero().squeeze(1)

    def likeliest(self, count: int) -> Tensor:
        """(batch, count): the likeliest wrong classes of the clean inputs, the first one first."""
        others = self.clean.scatter(1, self.y[:, None], -torch.inf)
        return others.topk(min(count, others.shape[1] - 1), dim=1).indices

    def sign(self, maker: str) -> None:
        """What is kept from here on is this component's."""
        self._makers.append(maker)

    def candidates(self) -> Candidates:
        """What the attack returns, with the component that made each."""
        return Candidates(self.x, tuple(self._makers[k] for k in self._made_by.tolist()))

    def offer(self, samples: Counts, candidates: Images) -> PerSample:
        """Score candidates, cold, and keep what is better; a sample may have several.

        Returns: their margins.
        """
        if not len(samples):
            return self.margin[:0]
        if not self.randomized:
            margins, floors = self._scored(samples, self._logits(candidates))
            self._enter(samples, candidates, margins, floors)
            return margins
        margins, _ = self._over_draws(samples, candidates, _DRAWS, (_DRAWS + 1) // 2)
        rows = _winners(samples, margins.to(self.margin), self.margin)
        if len(rows):
            sure = self._over_draws(samples[rows], candidates[rows], FRESH, FRESH - SURE + 1)
            self._enter(samples[rows], candidates[rows], *sure)
        return margins

    def enter(self, samples: Counts, candidates: Images, logits: Logits) -> None:
        """The same with the deployed predictor's logits at hand."""
        self._enter(samples, candidates, *self._scored(samples, logits.detach()))

    def _over_draws(
        self, samples: Counts, candidates: Images, draws: int, rank: int
    ) -> tuple[PerSample, PerSample]:
        """The same of a randomized model: of so many draws the `rank`-th smallest of either."""
        scored = [self._scored(samples, self._logits(candidates)) for _ in range(draws)]
        margins, floors = (torch.stack(part) for part in zip(*scored, strict=True))
        return margins.kthvalue(rank, 0).values, floors.kthvalue(rank, 0).values

    def _scored(self, samples: Counts, logits: Logits) -> tuple[PerSample, PerSample]:
        """Margins, and below what they may be rounding."""
        return margins_of(logits, self.y[samples]), _ROUNDING * logits.abs().amax(1)

    def _enter(
        self, samples: Counts, candidates: Images, margins: PerSample, floors: PerSample
    ) -> None:
        margins = margins.to(self.margin)
        rows = _winners(samples, margins, self.margin)
        chosen = samples[rows]
        self.x[chosen] = candidates.detach()[rows].to(self.x)
        self.margin[chosen] = margins[rows]
        self._made_by[chosen] = len(self._makers) - 1
        done = margins[rows] > floors[rows].clamp_min(self.confidence)
        self.settled[chosen] = done | margins[rows].isinf()

    @torch.no_grad()
    def _logits(self, x: Images) -> Logits:
        return torch.cat([self.deployed(part).logits for part in x.split(ROWS)])


class Watch:
    """Shows the iterates of one run to the ledger.

    A view whose logits are the deployed ones costs nothing. Of another view the iterates that it
    thinks best are scored by the deployed predictor every few steps, and the current ones too, for
    it may be wrong; of a warm start, nearly exact, only those that it thinks are fooled.

    Args:
        samples: the sample of each row.
        like: images of each row.
        trusted: whether the view's logits are the deployed ones; see `shows_deployed`.
        warm: whether the view differs by a warm start only.
    """

    def __init__(
        self, ledger: Ledger, samples: Counts, like: Images, *, trusted: bool, warm: bool
    ) -> None:
        self.ledger, self.samples = ledger, samples
        self.trusted, self.claims_only = trusted and not warm, trusted and warm
        self.waiting = like.clone()
        self.margin = ledger.margin.new_full((len(like),), -torch.inf)

    @torch.no_grad()
    def see(self, step: int, last: bool, current: Images, logits: Logits) -> bool:
        """Look at the iterates of one step; whether any were scored."""
        if self.trusted:
            self.ledger.enter(self.samples, current, logits)
            return True
        margins = margins_of(logits, self.ledger.y[self.samples]).to(self.margin)
        better = margins > self.margin
        self.waiting = torch.where(better.view(-1, 1, 1, 1), current.detach(), self.waiting)
        self.margin = torch.where(better, margins, self.margin)
        due = last or step % EVERY == EVERY - 1
        if due:
            self._score(last, current, better)
        return due

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.samples, self.waiting = self.samples[rows], self.waiting[rows]
        self.margin = self.margin[rows]

    def _score(self, last: bool, current: Images, is_current: Mask) -> None:
        rows = self.margin > (0.0 if self.claims_only and not last else -torch.inf)
        self.ledger.offer(self.samples[rows], self.waiting[rows])
        self.margin[rows] = -torch.inf
        if not self.claims_only:
            other = ~is_current
            self.ledger.offer(self.samples[other], current[other])


def shows_deployed(target: Target) -> bool:
    """Whether a view's logits are those of the deployed predictor."""
    changes = isinstance(target.gradient, ModuleGradient) and not target.gradient.keeps_value
    return target.value == "deployed" and not changes


def margins_of(logits: Logits, y: Labels) -> PerSample:
    """Margins; infinite where a logit is not finite, which the judge never takes for correct."""
    logits = logits.detach()
    return torch.where(logits.isfinite().all(1), margin(logits, y), torch.inf)


def _winners(samples: Counts, margins: PerSample, held: PerSample) -> Tensor:
    """The rows to take: of each sample the first of the largest margin, if that is an advance."""
    rows = (margins > held[samples]).nonzero().squeeze(1)
    order = rows[margins[rows].argsort(descending=True, stable=True)]
    place = torch.arange(len(order), device=order.device)
    first = torch.full_like(held, len(order), dtype=torch.long)
    first = first.scatter_reduce(0, samples[order], place, "amin")
    return order[first[samples[order]] == place]


def _differ(one: Logits, other: Logits) -> bool:
    """Whether two passes over one input differ by more than rounding."""
    one, other = one.nan_to_num(), other.nan_to_num()
    return bool(((one - other).abs() > _ROUNDING * one.abs().amax(1, keepdim=True)).any())
