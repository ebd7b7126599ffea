"""A model is as it was after an attack, whatever that has done to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustdeq.errors import CaseError
from robustdeq.evaluation.integrity import unchanged

X = torch.linspace(-1, 1, 24).reshape(4, 6)


class Net(nn.Module):
    """Everything that a model may hold: weights, statistics, a table and an own attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.scale, self.seen, self.table = 2.0, 0, {"bias": 1.0}
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        hidden = self.norm(self.first(x)).relu()
        out: Tensor = self.scale * self.second(hidden) + self.shift + self.table["bias"]
        return out


class Lazy(nn.Module):
    """Adds to itself in its first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.inner is None:
            self.inner = nn.Linear(6, 3)
        out: Tensor = self.inner(x)
        return out


def _fit(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()


def _load(model: Any) -> None:
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})


def _fail(model: Any) -> None:
    _load(model)
    model(X[:, :2])


def _half(model: Any) -> None:
    model.half()


def _swap(model: Any) -> None:
    model.second = nn.Linear(5, 3)


def _new_weight(model: Any) -> None:
    model.first.weight = nn.Parameter(torch.zeros(5, 6))


def _resize(model: Any) -> None:
    model.second.bias.data = torch.zeros(1)


def _drop(model: Any) -> None:
    del model.norm


def _forward(model: Any) -> None:
    model.forward = lambda x: torch.zeros(len(x), 3)


def _class(model: Any) -> None:
    type(model).forward = lambda self, x: torch.zeros(len(x), 3)


def _train(model: Any) -> None:
    model.train()
    model(X + 3)


def _buffer(model: Any) -> None:
    model.shift.zero_()


def _new_buffer(model: Any) -> None:
    model.shift = torch.zeros(3)


def _hook(model: Any) -> None:
    model.second.register_forward_hook(lambda module, given, out: out * 0)


def _attribute(model: Any) -> None:
    model.scale = 0.0


def _table(model: Any) -> None:
    model.table["bias"] = -5.0


def _added(model: Any) -> None:
    model.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_fit, "the weights first.weight"),
        (_load, "the weights first.weight"),
        (_half, "the weights first.weight"),
        (_swap, "model._modules"),
        (_new_weight, "first._parameters"),
        (_resize, "the weights second.bias"),
        (_drop, "model._modules"),
        (_forward, "model.forward"),
        (_class, "Net.forward"),
    ],
)
def test_another_model_is_put_back_and_said(change: Callable[[Any], None], words: str) -> None:
    model = Net().eval()
    before = model(X)
    message = f"^the attack has changed {words} of the model; change a copy of it"
    with pytest.raises(CaseError, match=message), unchanged(model, "the attack"):
        change(model)
    assert torch.equal(model.eval()(X), before)


@pytest.mark.parametrize(
    "change", [_train, _buffer, _new_buffer, _hook, _attribute, _table, _added]
)
def test_what_a_pass_may_leave_is_put_back_in_silence(change: Callable[[Any], None]) -> None:
    model = Net().eval()
    before, seen = model(X), model.seen
    with unchanged(model, "the attack"):
        change(model)
    assert model.seen == seen
    assert not hasattr(model, "extra")
    assert torch.equal(model.eval()(X), before)


def test_it_is_put_back_where_the_attack_raises() -> None:
    model = Net().eval()
    before = model(X)
    with pytest.raises(RuntimeError, match="shapes"), unchanged(model, "the attack"):
        _fail(model)
    assert torch.equal(model(X), before)


def test_a_model_that_adds_to_itself_is_not_to_blame() -> None:
    model = Lazy().eval()
    with unchanged(model, "the attack"):
        model(X)
    assert model.inner is None


def test_ties_between_weights_outlast_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(CaseError), unchanged(model, "the attack"), torch.no_grad():
        model[0].weight.zero_()
    assert model[1].weight is model[0].weight
    assert bool(model[0].weight.any())


def test_reading_a_model_leaves_it_alone() -> None:
    model = Net().eval()
    other = copy.deepcopy(model)
    with unchanged(model, "the attack"):
        model(X.requires_grad_()).sum().backward()
        copy.deepcopy(model).load_state_dict(other.state_dict())
    assert model.state_dict().keys() == other.state_dict().keys()
