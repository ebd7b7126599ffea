"""The equilibrium model of `deq`, trained by joint inference and input optimization."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from robustdeq.defenses.deq import DEQ

from robustdeq.interfaces import About
from robustdeq.training.joint import JointAdversarialTraining


@dataclass(frozen=True, kw_only=True)
class JointOptimization(DEQ):
    """`deq` with the recipe `joint`: the defense is its training, and its model is `deq`'s."""

    about: ClassVar[About] = replace(
        JointAdversarialTraining.about,
        claimed="Advancing state, adjoint and input together makes adversarial training of DEQs "
        "about 3 times faster than with PGD.",
        reproduced="The joint iteration with and without type-I Anderson mixing, against PGD "
        "training of equal work in evaluations and products; Linf beside the authors' L2. Cell, "
        "widths and data are ours; no figure of the paper was at hand.",
    )
    recipe: ClassVar[str] = "joint"
