from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from robustdeq.datasets import DataSpec, spec_of
from robustdeq.errors import UsageError
from robustdeq.registry import load

CPU = torch.device("cpu")
DIGITS = {"depth": 11, "base": 9, "groups": 2}
# At deq's number of parameters, within a tenth.
EQUALS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("digits", {"width": 64, "inner": 64}, DIGITS),
    ("digits", {"width": 96, "inner": 96}, {"depth": 11, "base": 12, "groups": 2}),
    ("mnist", {"width": 32, "inner": 48}, {"depth": 16, "base": 9}),
    ("cifar10-jpeg", {"width": 64, "inner": 64}, {"depth": 16, "base": 15}),
]


def built(dataset: str | DataSpec, parameters: dict[str, Any]) -> nn.Module:
    data = spec_of(dataset) if isinstance(dataset, str) else dataset
    torch.manual_seed(0)
    return load("defense", "wide_resnet", parameters).build(data, CPU)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("dataset", "deq", "wide"), EQUALS)
def test_it_can_be_had_at_deqs_number_of_parameters(
    dataset: str, deq: dict[str, Any], wide: dict[str, Any]
) -> None:
    data = spec_of(dataset)
    model = built(dataset, wide)
    assert size(model) == pytest.approx(size(load("defense", "deq", deq).build(data, CPU)), rel=0.1)
    x = torch.rand(3, data.channels, data.height, data.width)
    assert model(x).shape == (3, data.classes)


def test_an_image_is_predicted_alone_as_in_a_batch_and_in_training() -> None:
    """DESIGN's rule 2; batch norm, which the paper has, would break both."""
    model = built("digits", DIGITS).double()
    x = torch.rand(64, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        training = model.train()(x)
        together = model.eval()(x)
        alone = torch.cat([model(image[None]) for image in x])
    assert torch.equal(training, together)
    assert float((alone - together).abs().max()) < 1e-9


def test_gradients_reach_the_image_and_every_parameter() -> None:
    model = built("mnist", {"depth": 10, "base": 4, "widen": 2})
    x = torch.rand(2, 1, 28, 28, requires_grad=True)
    model(x).logsumexp(1).sum().backward()
    for gradient in (x.grad, *(p.grad for p in model.parameters())):
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any())


@pytest.mark.parametrize(("depth", "groups"), [(10, 3), (16, 3), (7, 2), (11, 2), (6, 1)])
def test_depth_counts_convolutions_as_the_paper_does(depth: int, groups: int) -> None:
    data = DataSpec("odd", 10, 3, 13, 9)  # halves to no whole number
    model = built(data, {"depth": depth, "groups": groups, "base": 4, "widen": 2})
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == depth
    assert model(torch.rand(2, 3, 13, 9)).shape == (2, 10)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"depth": 12}, "give 10, 16"),
        ({"depth": 4}, "give 10, 16"),
        ({"depth": 10, "groups": 2}, "give 7, 11"),
        ({"widen": 0}, "at least 1"),
        ({"base": 0}, "at least 1"),
        ({"groups": 0}, "at least 1"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load("defense", "wide_resnet", parameters)
