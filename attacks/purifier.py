"""Against defenses that move their own input before they answer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, ClassVar, cast

import torch
from robustdeq.attacks._ascent import LogitLoss, Reading, States, View, most_rows
from robustdeq.attacks._ledger import shows_deployed
from robustdeq.attacks._losses import GoalLoss, cross_entropy, margin
from robustdeq.attacks.transfer import Runs, at_least
from torch import nn
from torch.nn import functional as F  # noqa: N812

from robustdeq.equilibrium import EquilibriumClassifier
from robustdeq.errors import UsageError
from robustdeq.interfaces import Access, Budget, Candidates
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Counts, Images, Labels, Logits, PerSample
from robustdeq.targets import Target
from robustdeq.threats import Threat


@dataclass(frozen=True, kw_only=True)
class Purifier:
    """Examples that survive a purifier, made in front of it and behind it.

    Behind: on the models of the same weights without the purifier (`undefended()`), where
    gradients are good. In front: through the defended model as its view differentiates it, which
    for a purifier in the graph is BPDA, past the purifier as past the identity. Entropy descent
    makes a confident error more confident, hence losses that go on rising there:

    - `ce`, and `ce` plus and minus the entropy of the prediction along the way;
    - `margin`;
    - `confident`: the goal's logit minus the largest other, for the likeliest wrong classes;
    - `rounds` (in front only): the margins of the readouts of all solves of the pass, summed, so
      that a gradient lost in the last round is there in the earlier ones.

    Short steps through the model go on from the best candidate. Auto-PGD (Croce and Hein 2020)
    throughout; all iterates of some steps are tried on the deployed model.

    Attributes:
        steps: of each run.
        restarts: of all runs, from random points.
        targets: likeliest wrong classes of `confident`, side by side.
        entropy: weight of the entropy in the losses with it.
        polish: the short steps.
    """

    needs: ClassVar[Access] = Access.GRADIENTS

    steps: int = 60
    restarts: int = 2
    targets: int = 9
    entropy: float = 1.0
    polish: int = 20

    def __post_init__(self) -> None:
        at_least("purifier", 1, steps=self.steps, restarts=self.restarts, targets=self.targets)
        at_least("purifier", 0, polish=self.polish)
        if not self.entropy > 0:
            raise UsageError(f"purifier has entropy={self.entropy}; give a weight above 0.")

    def fits(self, target: Target) -> bool:
        """Whether a model offers what stands behind it, or optimizes within its forward pass."""
        return bool(target.undefended()) or optimizes_inside(target.model)

    def budget(self, classes: int) -> Budget:
        """See `robustdeq.interfaces.Attack`; for one undefended model."""
        lanes = min(self.targets, classes - 1)
        steps = self.restarts * self.steps * (2 * (4 + lanes) + 1) + self.polish
        return Budget(int(1.4 * steps), steps)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        """See `robustdeq.interfaces.Attack`."""
        runs = Runs(target, x, y, threat, rng)
        for _ in range(self.restarts):
            for name, source in target.undefended().items():
                self._ascend(runs, f"transfer-{name}-", source)
            self._ascend(runs, "", None)
            if isinstance(target.model, EquilibriumClassifier):
                runs.ascend("rounds", Rounds(target, y), self.steps)
        everything = torch.ones_like(y, dtype=torch.bool)
        runs.polish("polish", runs.loss("margin"), self.polish, everything)
        return runs.ledger.candidates()

    def _ascend(self, runs: Runs, prefix: str, view: View | None) -> None:
        """All losses through one view."""
        goals = runs.ledger.likeliest(self.targets)
        for name, loss in self._losses().items():
            objective = LogitLoss(runs.target, runs.y, loss, view=view)
            targeted = goals if name == "confident" else None
            runs.ascend(prefix + name, objective, self.steps, targeted)

    def _losses(self) -> dict[str, GoalLoss]:
        def mixed(weight: float) -> GoalLoss:
            return lambda logits, y, goals: cross_entropy(logits, y) + weight * entropy_of(logits)

        return {
            "ce": lambda logits, y, goals: cross_entropy(logits, y),
            "margin": lambda logits, y, goals: margin(logits, y),
            "confident": lambda logits, y, goals: -margin(logits, goals),
            "ce+entropy": mixed(self.entropy),
            "ce-entropy": mixed(-self.entropy),
        }


class Rounds:
    """The margin summed over the readouts of all solves of a pass; see `_ascent.Objective`."""

    warm = False

    def __init__(self, target: Target, y: Labels) -> None:
        self.target, self.y = target, y
        self.trusted, self.rows = shows_deployed(target), most_rows(target)

    def __call__(self, x: Images, samples: Counts, goals: Labels, states: States) -> Reading:
        """See `Objective`."""
        output, y = self.target(x), self.y[samples]
        model = cast("EquilibriumClassifier", self.target.model)
        read = [model.readout(s.z) for s in output.solves if len(s.z) == len(x)]
        losses = torch.stack([margin(logits, y) for logits in [output.logits, *read]])
        return Reading(losses.sum(0), output.logits)


def entropy_of(logits: Logits) -> PerSample:
    """Of the prediction, in nats."""
    log_p = F.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1)


_TRUSTED = ("torch", "robustdeq.equilibrium", "builtins")
"""Modules whose own gradients belong to training or to solves."""


def optimizes_inside(model: nn.Module) -> bool:
    """Whether the code of a model's own classes takes gradients: told from the names it uses."""
    seen: set[CodeType] = set()
    classes = {type(module) for module in model.modules()}
    return any(_takes_gradients(function, seen) for cls in classes for function in _methods(cls))


def _methods(cls: type[Any]) -> Iterator[FunctionType]:
    """The functions that a class and its bases define, without those of `_TRUSTED` modules."""
    for base in cls.__mro__:
        if not base.__module__.startswith(_TRUSTED):
            parts = [p for p in vars(base).values() if isinstance(p, FunctionType)]
            yield from (inspect.unwrap(part) for part in parts)


def _takes_gradients(function: FunctionType, seen: set[CodeType]) -> bool:
    """Whether a function, or one of its module that it calls, takes a gradient."""
    if function.__code__ in seen:
        return False
    seen.add(function.__code__)
    names = set(_names(function.__code__))
    if "backward" in names or {"autograd", "grad"} <= names:
        return True
    used = [function.__globals__.get(name) for name in names]
    if torch.autograd.grad in [part for part in used if callable(part)]:
        return True
    return any(
        _takes_gradients(part, seen)
        for part in used
        if isinstance(part, FunctionType) and not part.__module__.startswith(_TRUSTED)
    )


def _names(code: CodeType) -> Iterator[str]:
    """The names in a code object and in those nested in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
