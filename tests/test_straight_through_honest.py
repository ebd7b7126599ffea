"""The straight-through gradient beside honest models, in attacks, and what it leaves behind."""

from __future__ import annotations

import random
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from planted_masks import Masked, Smooth
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from toys import ToyEquilibrium

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.differentiation.straight_through import StraightThrough, blame, trace
from robustdeq.equilibrium import Anderson, FixedPoint, Implicit, Phantom, Unrolled, metered
from robustdeq.targets import Target


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0]
        weights = torch.softmax(self.q(rows) @ self.k(rows).transpose(1, 2) / 4, -1)
        h = F.gelu(weights @ self.v(rows))
        return self.head(F.scaled_dot_product_attention(h, h, h).mean(1))


class Careful(nn.Module):
    """Asserts, a look-up by constants, a checkpoint: nothing of it masks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.names, self.head = nn.Linear(64, 16), nn.Embedding(3, 4), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        assert bool((x >= 0).all())
        assert x.max().item() < 2
        h = checkpoint(lambda y: torch.tanh(self.first(y)), x.flatten(1), use_reentrant=False)
        names = self.names(torch.arange(1)).expand(len(x), 4)
        return self.head(torch.cat([h, names], 1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.GroupNorm(2, 8),
        nn.Dropout(0.3),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


HONEST = {
    "perceptron": perceptron,
    "convolutional": convolutional,
    "attention": Attention,
    "careful": Careful,
    **{
        name: (lambda name=name: robustdeq.load_model(name))
        for name in ("Madry2018Towards_deq", "Chu2023Learning", "Madry2018Towards_feedforward")
    },
}
SOLVED = FixedPoint(tolerance=1e-10, max_steps=200)
TOYS = [Implicit(SOLVED), Phantom(5, 0.5), Unrolled(20)]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    part = load_slice("digits", "test", 100)
    return torch.from_numpy(part.images).float() / 255, torch.from_numpy(part.labels)


def crossed(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1], reduction="none")


def pulled(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    logits = target(leaf).logits
    (gradient,) = torch.autograd.grad(crossed(logits).sum(), leaf)
    return logits.detach(), gradient


def check_untouched(model: nn.Module, x: Tensor, classes: int) -> None:
    target = Target(model, classes)
    logits, gradient = pulled(target, x)
    through, straight = pulled(target.through(StraightThrough()), x)
    assert torch.equal(logits, through)
    assert torch.equal(gradient, straight)

    def predict(x: Tensor) -> Tensor:
        return target(x).logits

    assert trace(model, predict, x) == ()
    masking = blame(model, predict, x, crossed)
    assert (masking.cosine == 1).all()
    assert (masking.interceptions, masking.effects, masking.notes) == ((), (), ())


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_keep_every_bit(name: str, digits: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    check_untouched(HONEST[name]().eval(), digits[0][:40], 10)


@pytest.mark.parametrize("gradient", TOYS, ids=str)
@pytest.mark.parametrize("solver", [SOLVED, Anderson(tolerance=1e-10)], ids=["picard", "anderson"])
def test_trusted_solves_keep_every_bit(gradient: Any, solver: Any, toy_images: Tensor) -> None:
    check_untouched(ToyEquilibrium(solver, gradient), toy_images, 4)


def test_a_start_that_depends_on_the_image_is_no_mask(toy_images: Tensor) -> None:
    class StartsNearTheEnd(ToyEquilibrium):
        def start(self, injection: Tensor) -> Tensor:
            return torch.tanh(injection)

    check_untouched(StartsNearTheEnd(FixedPoint(max_steps=5), Unrolled(5)), toy_images, 4)


def test_training_mode_draws_and_keeps_its_state_as_one_pass_would(
    digits: tuple[Tensor, Tensor],
) -> None:
    x = digits[0][:20]
    results = []
    for gradient in (None, StraightThrough()):
        torch.manual_seed(0)
        model = convolutional().train()
        torch.manual_seed(1)
        pair = pulled(Target(model, 10, gradient=gradient), x)
        results.append((*pair, torch.rand(3), *[b.clone() for b in model.buffers()]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# What is to blame.


@pytest.fixture
def images() -> Tensor:
    return torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(5))


def test_what_matters_is_named_before_what_does_not(images: Tensor) -> None:
    def forward(m: Smooth, x: Tensor) -> Tensor:
        centered = x - x.mean().detach() * 1e-6
        return m.head(m.hidden(centered).detach()) + 1e-3 * m.base(1 - x)

    model = Masked(forward)
    masking = blame(model, model, images, crossed)
    assert float(masking.cosine.max()) < 0
    assert [i.line - forward.__code__.co_firstlineno for i in masking.interceptions] == [2, 1]
    assert masking.effects[0] > 1
    assert masking.effects[1] < 1e-3


def test_two_masks_in_a_row_are_both_named(images: Tensor) -> None:
    model = Masked(lambda m, x: m.base((x.detach() * 8).round() / 8))
    masking = blame(model, model, images, crossed)
    assert {i.operation for i in masking.interceptions} == {"detach", "round"}
    assert masking.effects == (1.0, 1.0)
    assert (masking.cosine == 0).all()


def test_a_branch_on_the_grad_mode_is_followed_as_deployed(images: Tensor) -> None:
    def by_mode(m: Smooth, x: Tensor) -> Tensor:
        return m.base(1 - x) if torch.is_grad_enabled() else m.base(x)

    def by_flag(m: Smooth, x: Tensor) -> Tensor:
        return m.base(1 - x) if x.requires_grad else m.base(x)

    for forward, operation in ((by_mode, "is_grad_enabled"), (by_flag, "requires_grad")):
        model = Masked(forward)
        found = pulled(Target(model, 4, gradient=StraightThrough()), images)
        expected = pulled(Target(Smooth(), 4), images)
        assert torch.equal(found[0], expected[0])
        assert torch.allclose(found[1], expected[1], atol=1e-7)
        assert [i.operation for i in trace(model, model, images)] == [operation]


# Where it fails, and what it leaves behind.


def test_a_model_that_checks_for_graphs_is_told_that_there_is_none(images: Tensor) -> None:
    def forward(m: Smooth, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = m.hidden(x)
        assert not h.requires_grad
        return m.head(h)

    model = Masked(forward)
    found = pulled(Target(model, 4, gradient=StraightThrough()), images)[1]
    assert torch.allclose(found, pulled(Target(Smooth(), 4), images)[1], atol=1e-7)


def test_a_model_that_survives_no_watch_keeps_its_honest_gradient(images: Tensor) -> None:
    def forward(m: Smooth, x: Tensor) -> Tensor:
        if torch.overrides._get_current_function_mode() is not None:
            raise ValueError("watched")
        return m.base(x)

    model = Masked(forward)
    honest = pulled(Target(model, 4), images)[1]
    assert torch.equal(pulled(Target(model, 4, gradient=StraightThrough()), images)[1], honest)
    notes = blame(model, model, images, crossed).notes
    assert any("with everything" in note and "watched" in note for note in notes)


def test_parts_that_nothing_can_watch_are_reported(images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = nn.Sequential(nn.Flatten(), torch.jit.trace(nn.Linear(16, 4), torch.rand(2, 16)))
    assert blame(model, model, images, crossed).notes == (
        "1 is a script module, and runs unwatched.",
    )


def test_other_logits_than_the_honest_ones_are_reported(images: Tensor) -> None:
    class Counting(Smooth):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.base(x) * self.calls

    model = Counting()
    assert any("off by" in note for note in blame(model, model, images, crossed).notes)


def test_numbers_from_elsewhere_are_drawn_alike_in_both_passes(images: Tensor) -> None:
    class Scaled(Smooth):
        """Scales its image by what NumPy, Python and a generator of its own draw."""

        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)
            self.scales: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            drawn = np.random.rand() + random.random()
            self.scales.append(drawn + float(torch.rand((), generator=self.generator)))
            return self.base(x.detach() * self.scales[-1])

    model = Scaled()
    target = Target(model, 4, gradient=StraightThrough())
    for _ in range(2):
        logits, gradient = pulled(target, images)
        assert model.scales[-1] == model.scales[-2]
        point = images.clone().requires_grad_()
        expected = Smooth()(point * model.scales[-1])
        assert torch.allclose(logits, expected, atol=1e-6)
        (slope,) = torch.autograd.grad(crossed(expected).sum(), point)
        assert torch.allclose(gradient, slope, atol=1e-6)
    assert len(set(model.scales)) > 2


def test_the_deployed_logits_count_where_torch_computes_them_otherwise(images: Tensor) -> None:
    torch.manual_seed(0)
    fused = nn.Sequential(
        nn.Flatten(2),
        nn.Linear(16, 16),
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()
    with torch.no_grad():
        deployed = fused(images)
    logits, gradient = pulled(Target(fused, 4, gradient=StraightThrough()), images)
    assert torch.equal(logits, deployed)
    assert torch.allclose(gradient, pulled(Target(fused, 4), images)[1], atol=1e-7)


def test_nothing_of_torch_or_of_the_model_stays_changed(images: Tensor) -> None:
    before = (
        torch.is_grad_enabled, torch.from_numpy, torch.autograd.Function.apply,
        torch.inference_mode.__enter__, F.has_torch_function_unary,
    )  # fmt: skip

    def forward(m: Any, x: Tensor) -> Tensor:
        m.kept = x * 2
        m.cache = m.hidden(x).detach()
        return m.head(m.cache)

    model = Masked(forward)
    calls: list[int] = []
    model.register_full_backward_hook(lambda *_: calls.append(1))
    hooks = dict(model._backward_hooks)
    gradient = pulled(Target(model, 4, gradient=StraightThrough()), images)[1]
    with pytest.raises(ZeroDivisionError):
        Target(Masked(lambda m, x: 1 / 0), 4, gradient=StraightThrough())(gradient.requires_grad_())
    after = (
        torch.is_grad_enabled, torch.from_numpy, torch.autograd.Function.apply,
        torch.inference_mode.__enter__, F.has_torch_function_unary,
    )  # fmt: skip
    assert before == after
    assert calls == []
    assert model._backward_hooks == hooks
    assert not model.kept.requires_grad
    assert not model.cache.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    names = [i.operation for i in trace(model, model, images)]
    assert names == ["detach", "module backward hook"]


def test_other_threads_see_torch_as_it_is(images: Tensor) -> None:
    seen: list[bool] = []

    def look() -> None:
        with torch.inference_mode():
            seen.append(torch.is_inference_mode_enabled())
        with torch.no_grad():
            seen.append(not (torch.ones(1, requires_grad=True) * 2).requires_grad)
        seen.append(not torch.ones(1, requires_grad=True).detach().requires_grad)

    def forward(m: Smooth, x: Tensor) -> Tensor:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return m.base(x.detach())

    pulled(Target(Masked(forward), 4, gradient=StraightThrough()), images)
    assert seen == [True] * 6


def test_without_gradients_the_model_runs_once(toy_images: Tensor) -> None:
    model = ToyEquilibrium(SOLVED)
    target = Target(model, 4, gradient=StraightThrough())
    with torch.no_grad(), metered() as through:
        target(toy_images)
    with torch.no_grad(), metered() as plain:
        Target(model, 4)(toy_images)
    assert through == plain


def test_a_graph_serves_several_gradients(images: Tensor) -> None:
    target = Target(Masked(lambda m, x: m.base(x.round())), 4, gradient=StraightThrough())
    leaf = images.clone().requires_grad_()
    logits = target(leaf).logits
    rows = [torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=True)[0] for k in range(4)]
    (total,) = torch.autograd.grad(logits.sum(), leaf)
    assert torch.allclose(sum(rows), total, atol=1e-6)


def test_names() -> None:
    names = [str(StraightThrough(**{k: True})) for k in ("double", "bypass")]
    assert [str(StraightThrough()), *names] == [
        "straight_through",
        "straight_through(double)",
        "straight_through(bypass)",
    ]
    assert StraightThrough.keeps_value
