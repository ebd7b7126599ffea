"""Losses that attacks ascend, one value per sample; each is larger the worse the prediction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from robustdeq.errors import CaseError
from robustdeq.shapes import Labels, Logits, PerSample


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


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
}
