"""Masks of all kinds are undone, at their value, and named with their line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted_masks import PLANTED, Masked, Smooth
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from toys import ToyEquilibrium

from robustdeq.differentiation.straight_through import StraightThrough, blame, trace
from robustdeq.equilibrium import FixedPoint, Implicit, Solve, SolveGradient
from robustdeq.errors import UsageError
from robustdeq.targets import Target

FILE = "tests/planted_masks.py"
HERE = "tests/test_straight_through.py"


@pytest.fixture
def images() -> Tensor:
    return torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(5))


def weighted(logits: Tensor) -> Tensor:
    return (logits * torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype)).sum(1)


def pulled(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    logits = target(leaf).logits
    (gradient,) = torch.autograd.grad(weighted(logits).sum(), leaf)
    return logits.detach(), gradient


def straight(model: nn.Module, x: Tensor, classes: int = 4, **options: bool) -> Tensor:
    return pulled(Target(model, classes, gradient=StraightThrough(**options)), x)[1]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(1), b.flatten(1)).mean())


# Masks.


@pytest.mark.parametrize("name", PLANTED)
def test_a_mask_is_undone_and_its_value_kept(name: str, images: Tensor) -> None:
    mask = PLANTED[name]
    model = Masked(mask.forward).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        honest = model(images)
    torch.manual_seed(3)
    logits, gradient = pulled(Target(model, 4, gradient=StraightThrough()), images)
    assert torch.equal(logits, honest)
    _, expected = pulled(Target(Smooth(), 4), images)
    assert cosine(gradient, expected) > mask.cosine


@pytest.mark.parametrize("name", PLANTED)
def test_a_mask_is_named_with_its_line(name: str, images: Tensor) -> None:
    mask = PLANTED[name]
    model = Masked(mask.forward).eval()
    found = {(i.operation, i.file, i.line) for i in trace(model, model, images)}
    assert (mask.operation, FILE, mask.line) in found


def test_rounding_gets_the_gradient_at_the_rounded_point(images: Tensor) -> None:
    grid = (images * 8).floor() / 8
    expected = pulled(Target(Smooth(), 4), grid)[1]
    for name in ("floored", "minus_the_rest"):
        model = Masked(PLANTED[name].forward)
        assert torch.allclose(straight(model, images), expected, atol=1e-6)


def test_counts_are_per_forward_pass(images: Tensor) -> None:
    def thrice(m: Smooth, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x.detach()
        return m.base(x)

    model = Masked(thrice)
    (found,) = trace(model, model, images)
    assert (found.operation, found.count) == ("detach", 3)


def test_functions_of_torch_show_the_line_of_the_module_where_no_other_code_is(
    images: Tensor,
) -> None:
    class Round(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.round()

    linear = nn.Linear(16, 4)
    # What is rounded to 0 is not clamped: all outputs are beyond the bounds.
    linear.weight.data = torch.arange(1.0, 5.0)[:, None].expand(4, 16)
    model = nn.Sequential(nn.Flatten(), linear, Round(), nn.Hardtanh(-1e-9, 1e-9))
    found = {i.operation: i.file for i in trace(model, model, images)}
    assert found == {"round": HERE, "hardtanh": "modules/activation.py"}


# Kinks are no masks, and bounds are masks only where nothing else is left.


def test_a_relu_out_of_comparisons_keeps_its_gradient(images: Tensor) -> None:
    shapes = [
        lambda h: h * (h > 0),
        lambda h: torch.where(h > 0, h, 0.1 * h),
        lambda h: h.masked_fill(h < 0, 0.0),
    ]
    for shape in shapes:
        model = Masked(lambda m, x, shape=shape: m.head(shape(m.hidden(x))))
        assert torch.equal(straight(model, images), pulled(Target(model, 4), images)[1])
        assert trace(model, model, images) == ()


def test_clamps_are_passed_over_only_for_samples_without_a_gradient(images: Tensor) -> None:
    steep = torch.ones(12, 1)
    steep[:5] = 1e6
    model = Masked(lambda m, x: (m.base(x) * steep).clamp(-50, 50))
    _, honest = pulled(Target(model, 4), images)
    found, base = straight(model, images), pulled(Target(Smooth(), 4), images)[1]
    assert (honest[:5] == 0).all()
    assert torch.equal(found[5:], honest[5:])
    assert cosine(found[:5], base[:5]) > 0.99


def test_saturated_samples_alone_are_rescaled(images: Tensor) -> None:
    steep = torch.ones(12, 1)
    steep[:5] = 1e6
    model = Masked(lambda m, x: torch.softmax(m.base(x) * steep, 1))
    _, honest = pulled(Target(model, 4), images)
    found, base = straight(model, images), pulled(Target(Smooth(), 4), images)[1]
    assert torch.equal(found[5:], honest[5:])
    assert cosine(found[:5], base[:5]) > 0.5


# Inner optimization.


def purifier(signs: bool) -> Any:
    def forward(m: Smooth, x: Tensor) -> Tensor:
        y = x.detach()
        for _ in range(2):
            y = y.detach().requires_grad_()
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(m.entropy(y), y)
            y = y - 0.05 * (slope.sign() if signs else slope)
        return m.base(y.detach())

    return forward


def test_an_inner_gradient_is_a_constant_by_default(images: Tensor) -> None:
    model = Masked(purifier(signs=True))
    y = images.clone()
    for _ in range(2):
        leaf = y.clone().requires_grad_()
        y = y - 0.05 * torch.autograd.grad(model.entropy(leaf), leaf)[0].sign()
    assert torch.allclose(straight(model, images), pulled(Target(Smooth(), 4), y)[1], atol=1e-7)


def test_an_inner_gradient_is_differentiated_on_demand(images: Tensor) -> None:
    model = Masked(purifier(signs=False))
    leaf = images.clone().requires_grad_()
    y = leaf
    for _ in range(2):
        y = y - 0.05 * torch.autograd.grad(model.entropy(y), y, create_graph=True)[0]
    (expected,) = torch.autograd.grad(weighted(model.base(y)).sum(), leaf)
    assert torch.allclose(straight(model, images, double=True), expected, atol=1e-6)
    assert not torch.allclose(straight(model, images), expected, atol=1e-4)


def test_inner_moves_are_bypassed_on_demand(images: Tensor) -> None:
    model = Masked(purifier(signs=True))
    expected = pulled(Target(Smooth(), 4), images)[1]
    assert torch.allclose(straight(model, images, bypass=True), expected, atol=1e-7)
    with pytest.raises(UsageError, match="not both"):
        StraightThrough(double=True, bypass=True)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_optimizers_move_a_leaf_that_keeps_its_source(optimizer: Any, images: Tensor) -> None:
    def forward(m: Smooth, x: Tensor) -> Tensor:
        y = x.detach().clone().requires_grad_(True)
        steps = optimizer([y], lr=0.02)
        for _ in range(3):
            with torch.enable_grad():
                steps.zero_grad()
                m.entropy(y).backward()
            steps.step()
        return m.base(y.detach())

    model = Masked(forward)
    parameters = [p.grad for p in model.parameters()]
    logits, gradient = pulled(Target(model, 4, gradient=StraightThrough()), images)
    assert torch.equal(logits, forward(model, images).detach())
    assert cosine(gradient, pulled(Target(Smooth(), 4), images)[1]) > 0.9
    assert parameters == [None, None]


def test_a_reconstruction_from_nothing_is_differentiated_through(images: Tensor) -> None:
    def forward(m: Smooth, x: Tensor) -> Tensor:
        code = torch.zeros_like(x).requires_grad_()
        for _ in range(20):
            with torch.enable_grad():
                distance = (torch.sigmoid(code) - x.detach()).square().sum()
                (slope,) = torch.autograd.grad(distance, code)
            code = (code - 10 * slope).detach().requires_grad_()
        return m.base(torch.sigmoid(code).detach())

    gradient = straight(Masked(forward), images)
    assert cosine(gradient, pulled(Target(Smooth(), 4), images)[1]) > 0.9


# Equilibrium models: the core is trusted, the model's own parts are not.


class RoundsInItsCell(ToyEquilibrium):
    def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
        return torch.tanh(((z * 64).round() / 64) @ self.w.T + injection)  # round


class DetachesInItsCell(ToyEquilibrium):
    def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
        return torch.tanh(z.detach() @ self.w.T + injection)  # detach


class DetachesItsImage(ToyEquilibrium):
    def embed(self, x: Tensor) -> Tensor:
        return super().embed(x.detach())  # detach


class RoundsItsLogits(ToyEquilibrium):
    def readout(self, z: Tensor) -> Tensor:
        return (super().readout(z) * 8).round() / 8  # round


class SolvesWithoutGradients(ToyEquilibrium):
    def predict(self, x: Tensor, solve: Any) -> Tensor:
        with torch.no_grad():  # no_grad
            z = solve(self.cell, self.embed(x)).z
        return self.readout(z)


class ReadsStates(ToyEquilibrium):
    def predict(self, x: Tensor, solve: Any) -> Tensor:
        states = solve(self.cell, self.embed(x), keep_states=True).states  # Solve.states
        return self.readout(states[-1])


class Nothing(SolveGradient):
    def carrier(self, problem: Any, solution: Solve, solver: Any) -> Solve:  # SolveGradient Nothing
        return solution


class Cancelling(FixedPoint):
    def method(self) -> Any:  # Solver Cancelling
        return super().method()

    def __call__(self, f: Any, start: Tensor, **options: Any) -> Solve:
        solve = super().__call__(f, start, **options)
        return solve._replace(z=torch.zeros_like(solve.z))


EQUILIBRIA = {
    "round": RoundsInItsCell(),
    "detach": DetachesInItsCell(),
    "detach ": DetachesItsImage(),
    "round ": RoundsItsLogits(),
    "no_grad": SolvesWithoutGradients(),
    "Solve.states": ReadsStates(),
    "SolveGradient Nothing": ToyEquilibrium(gradient=Nothing()),
    "Solver Cancelling": ToyEquilibrium(gradient=Implicit(Cancelling())),
}


@pytest.mark.parametrize("name", EQUILIBRIA)
def test_masks_of_equilibrium_models(name: str, toy_images: Tensor) -> None:
    model, operation = EQUILIBRIA[name], name.strip()
    target = Target(model, 4)
    with torch.no_grad():
        value = target(toy_images).logits
    logits, gradient = pulled(target.through(StraightThrough()), toy_images)
    assert torch.equal(logits, value)
    expected = pulled(Target(ToyEquilibrium(), 4), toy_images)[1]
    assert cosine(gradient, expected) > 0.999
    (found,) = blame(model, lambda x: target(x).logits, toy_images, weighted).interceptions
    text = Path(__file__).read_text().splitlines()[found.line - 1]
    assert (found.operation, found.file) == (operation, HERE)
    assert text.endswith(f"# {operation}")
