"""Weight-tied network, with a sparse mask of its own at each step if wanted (Song et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from robustdeq.defenses._cells import Stem
from robustdeq.defenses.deq import ResidualEquilibrium
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from robustdeq.datasets import DataSpec
from robustdeq.equilibrium import FixedPoint, Injection, Unrolled
from robustdeq.interfaces import About

Mask = Literal["none", "distinct", "identical", "disjoint"]


@dataclass(frozen=True, kw_only=True)
class WeightTied:
    """K steps of z <- relu(stem(x) + gain * B_k(relu(A_k(z)))) from 0; K is part of the model.

    A_k and B_k are one pair of weights under masks: step k uses m_k * A / sqrt(density). The text
    of the paper was not at hand: how its masks are drawn, their density and its guidelines are not
    known to us. Ours are random, fixed, one per layer and step, and made from a seed, so that no
    mask is stored. Unstructured masks save no dense arithmetic.

    Attributes:
        width: channels of the state (units, for small images).
        inner: channels between A and B.
        halvings: strided convolutions of the stem.
        gain: Lipschitz bound of the unmasked cell, in (0, 1).
        steps: K, at least 1.
        mask: `none` (dense tying); `distinct` (independent at each step); `identical` (one for all
            steps: sparse, but not distinct); `disjoint` (each weight belongs to one step: nothing
            is tied, whatever `density` says).
        density: share of weights that a mask keeps, in (0, 1].
        mask_seed: decides the masks.
    """

    about: ClassVar[About] = About(
        "Revisiting Implicit Models: Sparsity Trade-offs Capability in Weight-tied Model for "
        "Vision Tasks",
        "Haobo Song, Soumajit Majumder, Tao Lin",
        "arXiv 2023",
        "https://arxiv.org/abs/2307.08013",
        claimed="Plain weight-tied networks are more effective, stable and efficient than DEQ "
        "variants; distinct sparse masks per step raise their capacity.",
        reproduced="Dense tying, random distinct masks at several densities, one identical mask, "
        "disjoint masks, and a sweep of depth, width and density. The paper claims nothing on "
        "adversarial robustness; block, masks, data and adversarial training are ours.",
    )
    recipe: ClassVar[str] = "pgd_at"

    width: int = 64
    inner: int = 64
    halvings: int = 2
    gain: float = 0.95
    steps: int = 8
    mask: Mask = "none"
    density: float = 0.5
    mask_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or self.steps < 1:
            raise ValueError(
                f"density {self.density} is outside (0, 1], or {self.steps} steps are below 1"
            )

    def build(self, data: DataSpec, device: torch.device) -> nn.Module:
        """See `robustdeq.interfaces.Defense`."""
        # A tolerance of 0 never stops early: the length is the model's definition.
        solver = FixedPoint(tolerance=0.0, max_steps=self.steps)
        stem = Stem(data, self.width, self.halvings)
        gradient = Unrolled(self.steps)
        if self.mask == "none":
            arguments = (stem, self.inner, self.gain, data.classes, solver, gradient)
            return ResidualEquilibrium(*arguments).to(device)
        return MaskedEquilibrium(self, stem, data.classes, solver, gradient).to(device)


class MaskedEquilibrium(ResidualEquilibrium):
    """The shared cell with its weights masked anew at each step."""

    stationary: ClassVar[bool] = False

    def __init__(
        self,
        settings: WeightTied,
        stem: Stem,
        classes: int,
        solver: FixedPoint,
        gradient: Unrolled,
    ) -> None:
        super().__init__(stem, settings.inner, settings.gain, classes, solver, gradient)
        self.settings = settings
        for index, layer in enumerate((self.residual.first, self.residual.second)):
            masks = drawn_masks(settings, layer.weight.shape, index)
            density = float(masks.float().mean())
            # Scaled so that a masked layer passes on as much as the dense one, on average.
            self.register_buffer(f"mask{index}", masks / math.sqrt(density), persistent=False)

    def cell(self, z: Tensor, injection: Injection, step: int) -> Tensor:
        """One step; an estimator that goes beyond the last one stays with its mask."""
        assert isinstance(injection, Tensor)
        k = min(step, self.settings.steps - 1)
        hidden = F.relu(self._masked(self.residual.first, 0, k, z))
        return F.relu(injection + self.gain * self._masked(self.residual.second, 1, k, hidden))

    def _masked(self, layer: nn.Linear | nn.Conv2d, index: int, k: int, x: Tensor) -> Tensor:
        weight = layer.weight * self.get_buffer(f"mask{index}")[k]
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return F.conv2d(x, weight, layer.bias, padding=1)


def drawn_masks(settings: WeightTied, shape: torch.Size, layer: int) -> Tensor:
    """The masks of one layer, (steps, *shape) of 0 and 1; equal settings, equal masks."""
    generator = torch.Generator().manual_seed(settings.mask_seed * 1_000_003 + layer)
    steps = settings.steps
    if settings.mask == "disjoint":
        owner = torch.randint(steps, shape, generator=generator)
        return torch.stack([(owner == k).float() for k in range(steps)])
    count = 1 if settings.mask == "identical" else steps
    drawn = (torch.rand((count, *shape), generator=generator) < settings.density).float()
    return drawn.expand(steps, *shape).clone()


def used_share(settings: WeightTied, shape: torch.Size) -> float:
    """Share of a layer's weights that any step uses: 1 - (1 - density)^K for distinct masks."""
    return float((drawn_masks(settings, shape, 0).amax(0) > 0).float().mean())
