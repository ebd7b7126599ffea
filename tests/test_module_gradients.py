"""Gradients of whole modules: BPDA, differences without any gradient, means over noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_equilibrium import relative
from test_gradients import SIX, gradient_of, mixed_images, named, through
from torch import Tensor, nn
from toys import Linear, ToyEquilibrium

from robustdeq.differentiation import (
    BPDA,
    NES,
    Expectation,
    FiniteDifference,
    Gradient,
    Smoothed,
    parse_gradient,
)
from robustdeq.differentiation.noise import noise_of
from robustdeq.equilibrium import Anderson, Backprop, FixedPoint, Unrolled
from robustdeq.errors import UsageError
from robustdeq.shapes import Images
from robustdeq.targets import Target

MODULE_GRADIENTS = [NES(4), NES(9, 1e-3), FiniteDifference(), Smoothed(3, 0.05)]


def nothing(x: Tensor) -> Any:
    return None


# BPDA.


class Quantized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.round(7 * x) / 7


class Stretching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.round(7 * x).reshape(-1, 1, 1, 9) / 7


class Purified(nn.Module):
    """A purifier that offers no gradient before a smooth classifier."""

    def __init__(self, purifier: nn.Module, switched_off: bool = False) -> None:
        super().__init__()
        self.front = nn.ModuleDict({"purifier": purifier, "idle": Quantized()})
        self.classifier = ToyEquilibrium(FixedPoint(**SIX), Backprop())
        self.switched_off = switched_off

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.switched_off):
            x = self.front["purifier"](x)
        return self.classifier(x)


@pytest.mark.parametrize("switched_off", [False, True])
def test_bpda_passes_through_a_submodule_as_through_an_identity(
    switched_off: bool, toy_images: Tensor
) -> None:
    model = Purified(Quantized(), switched_off)
    assert float(gradient_of(model, toy_images).abs().max()) == 0.0
    gradient = BPDA("front.purifier")
    expected = gradient_of(model.classifier, torch.round(7 * toy_images) / 7)
    assert torch.equal(through(model, gradient, toy_images), expected)
    logits = Target(model, 4).through(gradient)(toy_images.requires_grad_()).logits
    assert torch.equal(logits, model(toy_images))
    assert not model.front["purifier"]._forward_hooks


def test_bpda_takes_the_backward_pass_of_a_surrogate(toy_images: Tensor) -> None:
    model = Purified(Quantized())
    gradient = parse_gradient("bpda(front.purifier,torch.nn.functional:tanh)")
    at = gradient_of(model.classifier, torch.round(7 * toy_images) / 7)
    expected = at * (1 - torch.tanh(toy_images) ** 2)
    assert relative(through(model, gradient, toy_images), expected) < 1e-14
    called = through(model, BPDA("front.purifier", torch.tanh), toy_images)
    assert relative(called, expected) < 1e-14


def test_bpda_says_what_is_wrong(toy_images: Tensor) -> None:
    model = Purified(Stretching())
    x = toy_images.clone().requires_grad_()
    for gradient, message in (
        (BPDA("front.purifyer"), "unknown submodule.*did you mean 'front.purifier'"),
        (BPDA("front.idle"), "never calls"),
        (BPDA("front.purifier"), r"\(8, 1, 1, 9\).*\(8, 1, 3, 3\)"),
        (BPDA("front.purifier", nothing), "must be a tensor"),
    ):
        with pytest.raises(UsageError, match=message):
            Target(model, 4).through(gradient)(x)
        assert not model.front["purifier"]._forward_hooks
    for path in ("torch", "torch:no_such", "no_such_module:f", "torch:pi", ":f"):
        with pytest.raises(UsageError, match="surrogate"):
            BPDA("front.purifier", path)


def test_bpda_reaches_into_the_cell_of_an_equilibrium_model(toy_images: Tensor) -> None:
    class Stepped(ToyEquilibrium):
        def __init__(self) -> None:
            super().__init__(FixedPoint(tolerance=0.0, max_steps=4), Unrolled(4))
            self.input = Quantized()

        def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
            return super().cell(z, self.input(injection), step)

    model = Stepped()
    assert float(gradient_of(model, toy_images).abs().max()) == 0.0
    found = through(model, BPDA("input"), toy_images)

    class Smooth(Stepped):
        def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
            rounded = torch.round(7 * injection) / 7
            return ToyEquilibrium.cell(self, z, injection + (rounded - injection).detach(), step)

    assert relative(found, gradient_of(Smooth(), toy_images)) < 1e-9


# Finite differences.


class NoGradient(nn.Module):
    """A model behind NumPy, which refuses inputs outside of [0, 1]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.detach().numpy()
        assert pixels.min() >= 0.0
        assert pixels.max() <= 1.0
        return self.inner(torch.from_numpy(pixels)).detach()


@pytest.mark.parametrize("gradient", [FiniteDifference(1e-4), NES(9, 1e-4), NES(50, 1e-4)])
def test_differences_in_all_pixels_are_the_gradient(gradient: Gradient) -> None:
    generator = torch.Generator().manual_seed(6)
    x = 0.1 + 0.8 * torch.rand(5, 1, 3, 3, dtype=torch.float64, generator=generator)
    model = ToyEquilibrium(Anderson(tolerance=1e-13))
    expected = model.dense_gradient(x)[1]
    assert relative(through(NoGradient(model), gradient, x), expected) < 1e-6


def test_differences_at_the_edge_of_the_box_stay_in_it() -> None:
    x = torch.randint(0, 2, (5, 1, 3, 3), generator=torch.Generator().manual_seed(7)).double()
    model = ToyEquilibrium(Anderson(tolerance=1e-13))
    expected = model.dense_gradient(x)[1]
    for gradient in (FiniteDifference(1e-5), NES(9, 1e-5)):
        assert relative(through(NoGradient(model), gradient, x), expected) < 1e-3
    # A linear model has the right slope along the displacements that were really made.
    few = through(NoGradient(Linear(pixels=9).double()), NES(4, 0.2), x)
    assert bool((few.flatten(1).norm(dim=1) > 0).all())


def test_nes_is_the_projection_of_the_gradient_on_its_directions() -> None:
    generator = torch.Generator().manual_seed(8)
    x = 0.3 + 0.4 * torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=generator)
    model = Linear().double()
    exact = gradient_of(model, x).flatten(1)
    found = through(NoGradient(model), NES(16, 0.01), x).flatten(1) * 16 / 64
    directions = noise_of(x, 16, "nes").flatten(2)
    along = torch.einsum("sbp,bp->sb", directions, found - exact)
    assert float(along.abs().max()) < 1e-9
    # A projection: orthogonal to its own error, hence shorter by the cosine.
    assert relative((found * exact).sum(1), found.square().sum(1)) < 1e-9
    cosine = torch.cosine_similarity(found, exact)
    assert 0.3 < float(cosine.mean()) < 0.7  # sqrt(16 / 64)


def test_nes_gives_the_gradient_of_any_loss_from_one_pass() -> None:
    model = Linear(pixels=9).double()
    x = mixed_images(4).requires_grad_()
    logits = Target(NoGradient(model), 4).through(NES(9))(x).logits
    for target in (logits[:, 0], logits.amax(1) - logits.amin(1), torch.softmax(logits, 1)[:, 2]):
        (found,) = torch.autograd.grad(target.sum(), x, retain_graph=True)
        again = model(x)
        matching = (again[:, 0], again.amax(1) - again.amin(1), torch.softmax(again, 1)[:, 2])
        expected = [torch.autograd.grad(m.sum(), x, retain_graph=True)[0] for m in matching]
        assert min(relative(found, e) for e in expected) < 1e-9


def test_nes_evaluates_two_points_a_direction_and_only_where_a_gradient_is_wanted() -> None:
    rows: list[int] = []

    class Watched(Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            rows.append(len(x))
            return super().forward(x)

    view = Target(Watched(pixels=9).double(), 4).through(NES(5))
    x = mixed_images(3)
    with torch.no_grad():
        plain = view(x).logits
    assert rows == [3]
    assert torch.equal(view(x.requires_grad_()).logits, plain)
    assert sum(rows) == 3 + 3 * (2 * 5 + 1)


@pytest.mark.parametrize("gradient", MODULE_GRADIENTS, ids=named(MODULE_GRADIENTS))
def test_module_gradients_repeat_and_do_not_depend_on_companions(gradient: Gradient) -> None:
    model, x = ToyEquilibrium(FixedPoint(tolerance=1e-12), rho=0.5), mixed_images(4)
    together = through(model, gradient, x)
    alone = torch.cat([through(model, gradient, x[k : k + 1]) for k in range(len(x))])
    assert torch.equal(together, through(model, gradient, x))
    assert relative(together, alone) < 1e-9
    logits = Target(model, 4).through(gradient)(x.clone().requires_grad_()).logits
    assert torch.equal(logits, model(x))


@pytest.mark.parametrize("gradient", MODULE_GRADIENTS, ids=named(MODULE_GRADIENTS))
def test_solves_are_those_of_the_input_itself(gradient: Gradient) -> None:
    model, x = ToyEquilibrium(Anderson(tolerance=1e-12)), mixed_images()
    (expected,) = Target(model, 4)(x).solves
    (found,) = Target(model, 4).through(gradient)(x.clone().requires_grad_()).solves
    assert torch.equal(found.z, expected.z)


def test_noise_is_decided_by_the_pixels_and_the_label() -> None:
    x = mixed_images(3)
    noise = noise_of(x, 500, "nes")
    assert torch.equal(noise[:, 1:2], noise_of(x[1:2], 500, "nes"))
    assert not torch.equal(noise, noise_of(x, 500, "smoothed"))
    assert not torch.equal(noise[:, 0], noise[:, 1])
    assert abs(float(noise.mean())) < 0.05
    assert float(noise.std()) == pytest.approx(1.0, abs=0.05)
    assert noise_of(x[:0], 2, "nes").shape == (2, 0, 1, 3, 3)


# Means.


class Noisy(nn.Module):
    """Logits W x under multiplicative noise of mean 1."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear(pixels=9).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * (1 + 0.5 * torch.randn_like(x)))


def test_eot_is_the_mean_of_independent_draws(toy_images: Tensor) -> None:
    model = Noisy()
    view = Target(model, 4).through(Expectation(6))
    torch.manual_seed(0)
    found = view(toy_images).logits
    torch.manual_seed(0)
    drawn = [model(toy_images) for _ in range(6)]
    torch.testing.assert_close(found, torch.stack(drawn).mean(0))
    assert not Expectation.keeps_value
    clean = gradient_of(model.linear, toy_images)
    few, many = (relative(through(model, Expectation(n), toy_images), clean) for n in (2, 200))
    assert many < 0.3 * few


class Wavy(nn.Module):
    """A linear model under waves far steeper than its slope, and a parabola."""

    def __init__(self, wave: float, bend: float) -> None:
        super().__init__()
        self.linear = Linear(pixels=9).double()
        self.wave, self.bend = wave, bend

    def forward(self, x: Images) -> Tensor:
        logits = self.linear(x)
        waves = self.linear(self.wave * torch.sin(500 * x) / 150)
        return logits + waves + self.bend * logits.square()


def test_smoothing_sees_through_waves() -> None:
    x = 0.3 + 0.4 * mixed_images(4)
    model = Wavy(1.0, 0.0)

    def cosine(gradient: Gradient) -> float:
        leaf = x.clone().requires_grad_()
        logit = Target(model, 4).through(gradient)(leaf).logits[:, 0]
        (slope,) = torch.autograd.grad(logit.sum(), leaf)
        clean = model.linear.weight[0].detach().expand(4, -1)
        return float(torch.cosine_similarity(slope.flatten(1), clean).min())

    assert cosine(parse_gradient("honest")) < 0.5
    assert cosine(Smoothed(300, 0.02)) > 0.95


def test_smoothing_in_pairs_is_exact_on_a_parabola() -> None:
    x = 0.3 + 0.4 * mixed_images()
    model = Wavy(0.0, 0.1)
    for draws, exact in ((2, True), (8, True), (3, False)):
        error = relative(through(model, Smoothed(draws, 0.01), x), gradient_of(model, x))
        assert (error < 1e-10) is exact


def test_smoothing_stays_in_the_box_and_passes_through_its_edge() -> None:
    x = torch.zeros(4, 1, 3, 3, dtype=torch.float64)

    class Boxed(Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert float(x.detach().min()) >= 0.0
            return super().forward(x)

    model = Boxed(pixels=9).double()
    assert relative(through(model, Smoothed(4, 0.1), x), gradient_of(model, x)) < 1e-12


@pytest.mark.parametrize("text", ["eot(2,straight_through)", "smoothed(2,0.01,straight_through)"])
def test_means_may_go_straight_through_what_masks(text: str) -> None:
    class Masked(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.round(7 * x) / 7)

    model, x = Masked(pixels=9), mixed_images().float()
    with torch.no_grad():
        weights = torch.softmax(model(x), 1) @ model.weight
    assert float(gradient_of(model, x).abs().max()) == 0.0
    found = through(model, parse_gradient(text), x).flatten(1)
    assert float(torch.cosine_similarity(found, weights).min()) > 0.99
