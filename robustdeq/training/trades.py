"""TRADES (Zhang et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from robustdeq.interfaces import About
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training._carried import states_of
from robustdeq.training._fields import Maximized
from robustdeq.training._inner import Ascent, warmed


@dataclass(frozen=True, kw_only=True)
class TRADES(Maximized):
    """CE(clean) + beta * KL(clean || adversarial) (Zhang et al. 2019, equation 5, algorithm 1).

    The inner attack ascends the divergence.

    Attributes:
        beta: weight of the divergence, 1/lambda in the paper.
    """

    about: ClassVar[About] = About(
        "Theoretically Principled Trade-off between Robustness and Accuracy",
        "Hongyang Zhang, Yaodong Yu, Jiantao Jiao, Eric P. Xing, Laurent El Ghaoui, "
        "Michael I. Jordan",
        "ICML 2019",
        "https://arxiv.org/abs/1901.08573",
    )
    prefix: ClassVar[str] = "Zhang2019Theoretically"
    adversarial: ClassVar[bool] = True

    beta: float = 6.0

    def loss(
        self,
        target: Target,
        x: Images,
        y: Labels,
        threat: Threat,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        """See `robustdeq.interfaces.Recipe`.

        Raises:
            UsageError: for a model or a gradient that `inner` does not fit.
        """
        threat = warmed(threat, progress, self.warmup)
        with torch.no_grad():
            clean = target(x)
        reference = F.log_softmax(clean.logits, 1)
        warm = states_of(self.inner, target, clean)
        # The divergence has a zero gradient at the clean point itself, hence the small noise.
        noise = torch.randn(x.shape, generator=generator).to(x) * 1e-3
        found = Ascent.of(self)(
            target,
            x,
            threat,
            lambda logits: _divergence(reference, logits),
            threat.project(x, x + noise),
            warm,
        )
        logits = target(x, warm).logits
        adversarial = target(found.x, found.warm).logits
        divergence = _divergence(F.log_softmax(logits, 1), adversarial).mean()
        return F.cross_entropy(logits, y) + self.beta * divergence


def _divergence(log_reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || softmax(logits)) per sample."""
    kl = F.kl_div(F.log_softmax(logits, 1), log_reference, reduction="none", log_target=True)
    return kl.sum(1)
