"""Whether a backward pass that undoes masking points elsewhere than the honest one."""

from __future__ import annotations

from torch import Tensor

from robustdeq.differentiation.straight_through import Masking, blame
from robustdeq.errors import sentence
from robustdeq.evaluation.gate.examined import SEED, Examined
from robustdeq.evaluation.gate.losses import margin
from robustdeq.evaluation.gate.rows import Row, measured, skipped
from robustdeq.evaluation.judge import seeded

SAMPLES = 16
"""Images whose two gradients are compared."""
NAMED = 4
"""Operations that a row names."""


def masking(exam: Examined) -> list[Row]:
    """Cosine of the honest gradient with the one through each operation as if it were smooth."""
    x, y = exam.x[:SAMPLES], exam.y[:SAMPLES]
    model = exam.target.model

    def predict(images: Tensor) -> Tensor:
        return exam.target(images).logits

    try:
        with seeded(SEED, x.device):
            found = blame(model, predict, x, lambda logits: margin(logits, y))
    except Exception as cause:  # of the tool, which must not become a flag of the model
        return [skipped("gradient_masked", f"the model could not be followed: {sentence(cause)}")]
    return [measured("gradient_masked", float(found.cosine.median()), len(x), _named(found))]


def _named(found: Masking) -> str:
    """The operations that turn the gradient most, each place once, and what was not followed."""
    places = dict.fromkeys(
        f"{call.operation} at {call.file}:{call.line}" for call in found.interceptions
    )
    return "; ".join([*list(places)[:NAMED], *found.notes[:1]])
