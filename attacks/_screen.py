"""AutoAttack standard at about one evaluation of the cell per step: screen, re-run, confirm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from robustdeq.attacks._apgd import AutoPGD
from robustdeq.attacks._ascent import Lanes, LogitLoss, Objective, ascend, most_rows
from robustdeq.attacks._carried import Carried
from robustdeq.attacks._carried_fab import CarriedFAB
from robustdeq.attacks._carried_square import CarriedSquare
from robustdeq.attacks._ledger import Ledger
from robustdeq.attacks._losses import cross_entropy, named_loss
from robustdeq.attacks._rivals import Rivals
from robustdeq.attacks._square import proposals
from robustdeq.attacks._starts import side_by_side
from torch import Tensor

from robustdeq.arithmetic import Precision
from robustdeq.equilibrium import (
    Dynamics,
    FixedPoint,
    Implicit,
    JointState,
    Lockstep,
    channels_last,
    compiled,
    parameter_dtype,
)
from robustdeq.interfaces import Candidates
from robustdeq.shapes import Counts, Images, Labels, Logits, PerSample
from robustdeq.targets import Target
from robustdeq.threats import Norm, Threat

SOLVED = FixedPoint(tolerance=1e-3, max_steps=100)
"""Of states, from those of the step before, and of adjoints in the second run: plain steps settle
here, and the tolerance is torchdeq's default for a forward solve."""
STEPS = 100
"""Of APGD in AutoAttack."""
QUERIES = 5000
"""Of Square in AutoAttack."""
_DRAWS = 2
"""Further starts of those that came nearest: which of them falls is chance under one seed."""
_RIVALS = 3
"""Goals of a sample in the second run: those that it came nearest to, and mostly the first."""
LOOKS = 40
"""By which state and adjoint must have settled at a clean input."""
SETTLED = 0.05
"""Relative change at which they have not."""
_NUMBERS = 2**17
"""In the states of one look, on a processor: more rows save no time, but take memory."""
_FEWEST = 32
_ACCELERATED = 1024
"""Rows of one look on an accelerator."""


def unreliable(lockstep: Lockstep, x: Images, y: Labels) -> str:
    """Why carried states cannot be trusted for this model; empty where they can.

    Plain steps of the cell, and of its adjoint, are repeated at the clean inputs from where the
    deployed solver ends: they must stay, and settle.
    """

    def loss(logits: Logits) -> PerSample:
        return cross_entropy(logits, y)

    state = lockstep.settled(x)
    for _ in range(LOOKS):
        look = lockstep.look(x, state, loss)
        before, state = state, look.state
    moved = (state.adjoint - before.adjoint).flatten(1).norm(dim=1)
    size = state.adjoint.flatten(1).norm(dim=1).clamp_min(1e-12)
    for name, worst in (("state", look.residual), ("adjoint", moved / size)):
        if not float(worst.max()) < SETTLED:  # also where it is no number
            return f"its {name} still moves by {float(worst.max()):.2g} after {LOOKS} plain steps"
    return ""


@torch.no_grad()
def looked_at_once(target: Target, dynamics: Dynamics, x: Images) -> int:
    """Rows of one look, where the target does not say: what is quick at no more memory than that.

    A processor is as quick with few rows, once each brings much of its own; an accelerator is not,
    and where these are too many for it, fewer are tried.
    """
    if target.batch_size is not None:
        return most_rows(target)
    if x.device.type != "cpu":
        return _ACCELERATED
    model = dynamics.model
    state = model.start(model.embed(x[:1].to(parameter_dtype(model) or x.dtype)))
    return max(_FEWEST, min(most_rows(target), _NUMBERS // state.numel()))


class Screen:
    """One chunk's way through the components.

    *Screen*: APGD-CE, APGD-T, FAB-T and Square, in the reference's order, with its budgets, losses
    and random starts, on gradients and logits at one evaluation of the cell, and one product with
    its Jacobian, per step. What claims to be fooled is put to the deployed predictor, cold;
    nothing else ends a sample's search. *Re-run*: the survivors nearest to the boundary face
    APGD-CE and APGD-T again, the latter towards the classes that led most in the screen, from the
    same starts, with states and adjoints solved to a tolerance at every step; a third of them, the
    nearest, from other starts too; then all of them Square again, of other random numbers.
    *Confirm*: the judge, as ever.

    Args:
        rerun: the share of the survivors that is run again.
        updates: evaluations and products per step of APGD and FAB; Square decides for itself.
        precision: of the screen's gradients. Square, whose estimates compare residuals down to
            1e-4, the second run and all that is counted are in float32.
        compile_: whether looks are at a compiled copy of the model.
    """

    def __init__(
        self,
        target: Target,
        dynamics: Dynamics,
        x: Images,
        y: Labels,
        threat: Threat,
        seed: int,
        *,
        rerun: float,
        updates: int = 1,
        precision: Precision = "float32",
        compile_: bool = False,
        queries: int = QUERIES,
    ) -> None:
        self.target, self.threat, self.seed = target, threat, seed
        self.rerun, self.queries = rerun, queries
        self.rows = looked_at_once(target, dynamics, x)
        self.x, self.y = x, y
        own = replace(dynamics, model=channels_last(dynamics.model, x))
        looked_at = replace(own, model=compiled(own, x)) if compile_ else own
        self.lockstep = Lockstep(looked_at, updates)
        self.quick = replace(self.lockstep, precision=precision)
        self.solved = target.through(Implicit(SOLVED), solver=SOLVED)
        self.ledger = Ledger(target, x, y)
        parts = zip(*map(Lockstep(own).settled, x.split(self.rows)), strict=True)
        self.settled = JointState(*map(torch.cat, parts))
        self.drawn: dict[str, Counts] = {}
        self.rivals = Rivals(y, target.classes)

    def run(self) -> Candidates:
        """All components, and the second run of those that came near."""
        ledger, classes = self.ledger, self.target.classes
        goals = ledger.likeliest(9)
        none = torch.full_like(self.y, -1)[:, None]
        self._apgd("apgd-ce", "ce", none)
        if classes > 3:
            self._apgd("apgd-t", "targeted_dlr", goals)
        self._fab(goals)
        self._square()
        near = self._near()
        again = [near] + [near[: -(-len(near) // 3)]] * _DRAWS
        self._apgd("apgd-ce", "ce", none, again=again)
        if classes > 3:
            self._apgd("apgd-t", "targeted_dlr", goals, again=again)
        # A random search fails by bad luck as well, and of these samples nothing is certain.
        self._square(among=near, draw=1)
        return ledger.candidates()

    def _apgd(self, name: str, loss: str, goals: Tensor, *, again: Sequence[Counts] = ()) -> None:
        """One component: screened, or on solved states.

        Args:
            again: for the second run, of each draw of starts the samples; all side by side.
        """
        open_ = self.ledger.open()
        # The second run replays the first one's starts, which were drawn for all open samples.
        drawn = self.drawn.setdefault(name, open_)
        # In the order of the samples, as the starts are drawn.
        chosen = [among[self.ledger.unsettled(among)].sort().values for among in again]
        runs = []
        for draw, rows in enumerate(chosen or [open_]):
            starts = self._starts(goals.shape[1], drawn, rows, draw)
            run = Lanes(*side_by_side(goals, rows), starts)
            runs.append(run.take(self._nearest(goals, rows)) if again else run)
        lanes = Lanes(*map(torch.cat, zip(*runs, strict=True)))
        if not len(lanes.samples):
            return
        self.ledger.sign(name)
        rule = AutoPGD(self.x[lanes.samples], self.threat, STEPS)
        ascend(self._objective(loss, solved=bool(again)), rule, STEPS, lanes, self.ledger)

    def _objective(self, loss: str, *, solved: bool) -> Objective:
        fun = named_loss(loss, self.target.classes)
        if solved:
            return LogitLoss(self.solved, self.y, fun, warm=True, rows=self.rows)
        return Carried(self.quick, self.y, fun, self.settled, rows=self.rows, rivals=self.rivals)

    def _nearest(self, goals: Tensor, rows: Counts) -> Tensor:
        """Of the lanes of some samples, goal by goal, those towards what came nearest."""
        if goals.shape[1] <= _RIVALS:
            return torch.arange(goals.shape[1] * len(rows), device=rows.device)
        return self.rivals.nearest(rows, goals[rows], _RIVALS).T.flatten().nonzero().squeeze(1)

    def _starts(self, goals: int, drawn: Counts, rows: Counts, draw: int) -> Images:
        """The reference's: one draw for all samples of `drawn`, for each goal in turn.

        Args:
            draw: 0 replays them, others are of other seeds.
        """
        chosen = torch.isin(drawn, rows)
        shape, clean = self.x[drawn].shape, self.x[rows]
        generator = torch.Generator().manual_seed(self.seed + draw)
        starts = []
        for _ in range(goals):
            if self.threat.norm is Norm.LINF:
                noise = 2 * torch.rand(shape, generator=generator) - 1
                size = noise.flatten(1).abs().amax(1)
            else:
                noise = torch.randn(shape, generator=generator)
                size = noise.flatten(1).norm(dim=1)
            unit = (noise / size.clamp_min(1e-12).view(-1, 1, 1, 1)).to(clean)[chosen]
            starts.append(self.threat.project(clean, clean + self.threat.eps * unit))
        return torch.cat(starts)

    def _fab(self, goals: Tensor) -> None:
        samples, classes = side_by_side(goals, self.ledger.open())
        if not len(samples):
            return
        self.ledger.sign("fab-t")
        for begin in range(0, len(samples), self.rows):
            part = samples[begin : begin + self.rows]
            left = self.ledger.unsettled(part)
            part, goal = part[left], classes[begin : begin + self.rows][left]
            settled, x = self.settled.take(part), self.x[part]
            CarriedFAB(self.quick, settled, self.ledger, part, goal, x, self.threat).run()

    def _square(self, *, among: Counts | None = None, draw: int = 0) -> None:
        """Of all open samples, or of those `among` some; `draw` 0 is of the reference's seed."""
        samples = self.ledger.open()
        if among is not None:
            samples = among[self.ledger.unsettled(among)].sort().values
        if not len(samples):
            return
        self.ledger.sign("square")
        settled = self.settled.take(samples)
        offered = proposals(self.x[samples], self.threat, self.queries, self.seed + draw)
        CarriedSquare(self.lockstep, settled, self.ledger, samples, offered, self.rows).run()

    def _near(self) -> Counts:
        """The survivors whose best candidates came nearest to the boundary, the nearest first."""
        open_ = self.ledger.open()
        count = -int(-self.rerun * len(open_) // 1)
        order = self.ledger.margin[open_].argsort(descending=True, stable=True)
        return open_[order[:count]]
