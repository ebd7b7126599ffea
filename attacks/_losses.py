"""Losses that attacks ascend, one value per sample; each is larger the worse the prediction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from robustdeq.errors import CaseError
from robustdeq.shapes import Labels, Logits, PerSample

GoalLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From logits (batch, classes), labels and goal classes (batch,) to a loss (batch,)."""


def cross_entropy(logits: Logits, y: Labels) -> PerSample:
    """-log softmax(logits)_y."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Logits, y: Labels) -> PerSample:
    """max_{i != y} logits_i - logits_y: positive exactly where the prediction is wrong.

    Carlini and Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", f_6.
    """
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - own


def dlr(logits: Logits, y: Labels) -> PerSample:
    """The margin over the gap between the first and the third largest logit.

    Invariant to shifts and scales of the logits (Croce and Hein 2020, "Reliable evaluation...",
    equation 6). Needs three classes.
    """
    if logits.shape[1] < 3:
        raise CaseError("the DLR loss needs at least 3 classes; use the margin loss.")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2]).clamp_min(1e-12)


def targeted_cross_entropy(logits: Logits, y: Labels, goals: Labels) -> PerSample:
    """The log-probability of the goal: goes on rising where the goal already is the prediction."""
    del y
    return -F.cross_entropy(logits, goals, reduction="none")


def targeted_margin(logits: Logits, y: Labels, goals: Labels) -> PerSample:
    """logits_goal - logits_y (Gowal et al. 2019, "An Alternative Surrogate Loss...")."""
    return (logits.gather(1, goals[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def targeted_dlr(logits: Logits, y: Labels, goals: Labels) -> PerSample:
    """The targeted margin over the gap between the largest logit and the mean of third and fourth.

    Croce and Hein 2020, "Reliable evaluation...", equation 7. Needs four classes.
    """
    if logits.shape[1] < 4:
        raise CaseError("the targeted DLR loss needs at least 4 classes; use the targeted margin.")
    top = logits.topk(4, dim=1).values
    gap = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3])
    return targeted_margin(logits, y, goals) / gap.clamp_min(1e-12)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
}
TARGETED: dict[str, GoalLoss] = {
    "targeted_ce": targeted_cross_entropy,
    "targeted_margin": targeted_margin,
    "targeted_dlr": targeted_dlr,
}
# What a loss needs, and what stands for it where there are fewer classes.
_FEWEST = {"dlr": (3, "margin"), "targeted_dlr": (4, "targeted_margin")}


def is_targeted(name: str) -> bool:
    """Whether a loss has a goal class."""
    return name in TARGETED


def named_loss(name: str, classes: int) -> GoalLoss:
    """The loss of a name; with too few classes for it, the margin that it normalizes."""
    fewest, instead = _FEWEST.get(name, (0, name))
    name = name if classes >= fewest else instead
    if name in TARGETED:
        return TARGETED[name]
    plain = LOSSES[name]
    return lambda logits, y, goals: plain(logits, y)


def replaced(name: str, classes: int) -> tuple[str, ...]:
    """A sentence where `named_loss` gives another loss than the one that was asked for."""
    fewest, instead = _FEWEST.get(name, (0, name))
    if classes >= fewest:
        return ()
    return (f"{name} left out: it needs {fewest} classes; {instead} stands for it",)
