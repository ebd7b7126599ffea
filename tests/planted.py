"""Planted defects: each with its model, what it hides, and an attack that knows what is hidden.

Attack and honesty gate are measured on them: an evaluation that knows nothing of the defect must
come as low as the oracle, and must flag the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import planted_equilibria as equilibria
import planted_models as models
import torch
from planted_oracle import Effort, Surrogate, robust_under
from torch import Tensor, nn

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.threats import Threat

BASE = "Standard_weight_tied"
THREAT = Threat.parse("Linf:0.14")
"""Leaves the base 22.5 % of 200 images, as AutoAttack finds within a sample."""
SAMPLES = 200


def inside(model: Any) -> Surrogate:
    """The layers behind the defect, with their own gradient."""
    logits: Surrogate = model.layers.logits
    return logits


def past(model: Any) -> Surrogate:
    """The layers on the image that they see, as if that were the image itself."""
    return lambda x: model.layers.logits(x + (model.seen(x) - x).detach())


def itself(model: Any) -> Surrogate:
    """The model as it is."""
    predict: Surrogate = model
    return predict


def afresh(model: Any) -> Surrogate:
    """The model as it is when it is first called."""
    pristine = copy.deepcopy(model)
    return lambda x: copy.deepcopy(pristine)(x)


def attached(model: Any) -> Surrogate:
    """The early exit with its graph kept."""
    return lambda x: model.answers(x, detach=False)


@dataclass(frozen=True)
class Defect:
    """One planted defect.

    Attributes:
        build: a defective model of the base.
        masks: what plain attacks miss, and which way around it there is.
        flags: names of checks, one of which at least must flag the model.
        surrogates: what the oracle differentiates, in this order.
        tracks: where a row of it may stand.
        hidden: whether AutoAttack alone is more than two points above the oracle.
    """

    build: Callable[[Any], nn.Module]
    masks: str
    flags: tuple[str, ...]
    surrogates: tuple[Callable[[Any], Surrogate], ...] = (inside,)
    effort: Effort = field(default_factory=Effort)
    tracks: tuple[str, ...] = ("deterministic", "no_gradient")
    hidden: bool = True

    @property
    def name(self) -> str:
        """As in "QuantizedInput"."""
        return self.build.__name__

    def model(self) -> nn.Module:
        """A fresh defective model, in eval mode."""
        return self.build(robustdeq.load_model(BASE)).eval()

    def oracle(self, x: Tensor, y: Tensor, effort: Effort | None = None) -> float:
        """Robust accuracy under the attack that knows the defect."""
        model = self.model()
        surrogates = tuple(make(model) for make in self.surrogates)
        robust = robust_under(model, surrogates, x, y, THREAT, effort or self.effort)
        return float(robust.double().mean())


@cache
def images(n: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """The first test images of digits, with their labels."""
    part = load_slice("digits", "test", n)
    return torch.from_numpy(part.images).float() / 255, torch.from_numpy(part.labels)


MISSING = ("gradient_missing", "zero_gradient", "gradient_masked")
WRONG = ("finite_differences", "finite_differences_adversarial", "gradient_masked")
STEPPED = (*MISSING, "finite_differences", "discontinuous")
CHANCE = Effort(steps=15, targets=3, draws=4)
SEARCHED = Effort(restarts=4, targets=5, queries=600)
LONGER = Effort(restarts=6, targets=4, queries=2500)

DEFECTS = (
    # Gradients that lead elsewhere
    Defect(
        equilibria.DetachedSolver,
        "the solve: the gradient is the skip's; grad mode kept on inside the model, or a gradient "
        "from outputs alone",
        WRONG,
    ),
    Defect(
        models.RotatedGradient,
        "everything: the gradient is a decoy's; detach() undone, both paths then add up",
        WRONG,
    ),
    Defect(
        models.WrongBackward,
        "everything: a custom backward mirrors it; backward taken from the outputs or identity",
        WRONG,
    ),
    Defect(models.FlippingHook, "the sign; hooks left out, or descent in place of ascent", WRONG),
    Defect(
        models.DetachedLyapunov,
        "the sign in all directions but one; detach() undone",
        WRONG,
    ),
    Defect(
        equilibria.OneAdjointStep,
        "most of the direction; implicit with more steps, or unrolled",
        ("adjoint_unconverged", *WRONG),
    ),
    Defect(
        models.GradModeDecoy,
        "everything: another model answers; a detached copy of the input differentiated by "
        "outputs alone, or requires_grad hidden from the model",
        ("grad_mode_changes_logits", *WRONG),
    ),
    # Gradients that are missing
    Defect(models.EmptyBackward, "everything; backward replaced by the identity", MISSING),
    Defect(models.BufferCopy, "everything; copies through .data as the identity", MISSING),
    Defect(models.ZeroingHook, "everything; hooks left out", MISSING),
    Defect(models.InferenceMode, "everything; inference mode kept off", MISSING),
    Defect(
        models.NonFiniteGradient,
        "everything: NaN in all pixels; 0/0 taken as 0 where it arises",
        ("nonfinite_gradient",),
    ),
    Defect(
        models.EarlyExit,
        "sure samples; detach() undone",
        STEPPED,
        (inside, attached),
    ),
    Defect(
        models.Purifier,
        "everything: the input is detached; detach() undone, or purification as the identity",
        STEPPED,
        (inside, past),
        Effort(targets=5),
    ),
    Defect(
        models.PurifierByBackward,
        "as Purifier; its backward() must also work under an attack",
        STEPPED,
        (inside, past),
        Effort(targets=5),
    ),
    # Steps, saturation and ripples
    Defect(
        models.QuantizedInput,
        "everything; round as the identity",
        STEPPED,
        (past, inside),
        SEARCHED,
    ),
    Defect(
        models.Thermometer,
        "everything; comparisons as slopes, or the identity around the encoder",
        STEPPED,
        (past, inside),
        SEARCHED,
    ),
    Defect(
        models.IntegerCast,
        "everything; the cast as the identity",
        STEPPED,
        (past, inside),
        SEARCHED,
    ),
    Defect(
        models.Codebook,
        "everything; the nearest entry as the patch itself",
        STEPPED,
        (past, inside),
        Effort(targets=3, queries=2500),
    ),
    Defect(
        models.NumpyJPEG,
        "everything: no tensors inside; outputs alone, or the identity around the excursion",
        STEPPED,
        (past, inside),
        LONGER,
    ),
    Defect(
        models.NumpyMedian,
        "everything: no tensors inside; outputs alone, or the identity around the excursion",
        STEPPED,
        (past, inside),
        LONGER,
    ),
    Defect(models.RoundedLogits, "everything; round as the identity", STEPPED, (inside,), SEARCHED),
    Defect(
        models.SaturatedLogits,
        "cross-entropy where it underflows; margin losses, or scaled logits",
        ("saturated_logits",),
        hidden=False,
    ),
    Defect(
        models.SoftmaxOutput,
        "all losses: differences of 0 and 1; logits before the softmax, or its slope in float64",
        ("probabilities", "saturated_logits", *MISSING),
    ),
    Defect(
        models.InputWarp,
        "the large scale; gradients of the smoothed model, then small honest steps",
        ("shattered_gradient",),
        (inside, past),
        SEARCHED,
    ),
    Defect(
        models.WinnerTakesAll,
        "what other units would do; gradients through the mask or its relaxation, many restarts",
        ("discontinuous", "shattered_gradient", *WRONG),
        (inside, itself),
        LONGER,
        hidden=False,
    ),
    # Chance, memory, company
    Defect(
        models.InputNoise,
        "little; means over draws",
        ("randomized",),
        (itself,),
        CHANCE,
        ("randomized",),
        hidden=False,
    ),
    Defect(
        models.Dither,
        "everything, and by chance; floor as the identity and means over draws",
        MISSING,
        (past,),
        CHANCE,
        ("randomized",),
    ),
    Defect(
        equilibria.RandomStart,
        "little; means over draws",
        ("randomized",),
        (itself,),
        CHANCE,
        ("randomized",),
        hidden=False,
    ),
    Defect(
        equilibria.RandomDepth,
        "little; means over draws",
        ("randomized",),
        (itself,),
        CHANCE,
        ("randomized",),
        hidden=False,
    ),
    Defect(
        models.KeptState,
        "what a fresh call would say; a copy of the model for each call",
        ("keeps_state",),
        (afresh,),
        Effort(fresh=True),
        hidden=False,
    ),
    Defect(
        equilibria.BatchStopping,
        "examples that only work in their company; judged as the judge batches them",
        ("batch_dependent",),
        (itself, inside),
        Effort(together=SAMPLES),
        hidden=False,
    ),
)
