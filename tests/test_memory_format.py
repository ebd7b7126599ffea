"""Copies of models whose convolutions keep channels last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from toys import ToyEquilibrium

from robustdeq.datasets import DataSpec
from robustdeq.equilibrium import EquilibriumClassifier, channels_last
from robustdeq.registry import load

COLORS = DataSpec("colors", 10, 3, 20, 20)


def convolutional() -> EquilibriumClassifier:
    torch.manual_seed(0)
    defense = load("defense", "deq", {"width": 8, "inner": 12})
    model = defense.build(COLORS, torch.device("cpu"))
    assert isinstance(model, EquilibriumClassifier)
    return model


def images() -> Tensor:
    return torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))


def test_the_copy_answers_alike_and_leaves_the_model_alone() -> None:
    model, x = convolutional(), images()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    twin = channels_last(model, x)
    assert twin is not model
    kernels = [part for part in twin.parameters() if part.dim() == 4]
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in kernels)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    assert all(part.is_contiguous() for part in model.parameters())


def test_a_model_without_convolutions_is_itself() -> None:
    model = ToyEquilibrium()
    assert channels_last(model, torch.rand(2, 1, 3, 3)) is model


class Uncopyable(EquilibriumClassifier):
    def __init__(self, inner: EquilibriumClassifier) -> None:
        super().__init__(inner.solver)
        self.inner = inner

    def embed(self, x: Tensor) -> Any:
        return self.inner.embed(x)

    def cell(self, z: Tensor, injection: Any, step: int) -> Tensor:
        return self.inner.cell(z, injection, step)

    def readout(self, z: Tensor) -> Tensor:
        return self.inner.readout(z)

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("there is only one of me")


class Changing(Uncopyable):
    """A copy of it is another model."""

    def __deepcopy__(self, memo: Any) -> Any:
        return Changing(convolutional_of_another_seed())


def convolutional_of_another_seed() -> EquilibriumClassifier:
    model = convolutional()
    with torch.no_grad():
        for part in model.parameters():
            part.add_(0.05)
    return model


def test_a_model_that_is_not_copied_well_is_itself() -> None:
    for kind in (Uncopyable, Changing):
        model = kind(convolutional())
        assert channels_last(model, images()) is model
