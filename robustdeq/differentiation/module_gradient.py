"""The second kind of gradient: a way of differentiating a whole module, whatever is inside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import nn

from robustdeq.shapes import Images, Logits

Predict = Callable[[Images], Logits]
"""The model's own forward pass, with its deployed solver where it has one."""


class ModuleGradient(ABC):
    """A frozen choice of how a gradient passes through a model's forward pass.

    Derived classes are frozen dataclasses whose `str` is the name that `parse_gradient` reads.

    Attributes:
        keeps_value: whether the logits are those of `predict`, bit for bit.
    """

    keeps_value: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, model: nn.Module, predict: Predict, x: Images) -> Logits:
        """Logits of `x` with this gradient's backward pass.

        Args:
            model: the module behind `predict`, for gradients that look for submodules.
            predict: images (batch, channels, height, width) to logits (batch, classes).
            x: may require gradients; without grad mode the logits alone are wanted.
        """
