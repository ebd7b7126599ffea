"""What a target computes before its logits: the input of its head, and the states it solves for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from robustdeq.equilibrium import EquilibriumClassifier
from robustdeq.errors import CaseError
from robustdeq.shapes import Images, Labels, Logits
from robustdeq.targets import Target


class Sight(NamedTuple):
    """Logits and features (batch, size) of one forward pass, with a graph."""

    logits: Logits
    features: Tensor


class Eye(Protocol):
    """Looks at a target's features.

    Attributes:
        name: of the features, for the components' names.
    """

    name: str

    def __call__(self, x: Images) -> Sight:
        """Logits and features of images."""
        ...

    def slopes(self, features: Tensor, classes: Labels, y: Labels) -> Tensor | None:
        """The features' direction (batch, size) from class `y` to `classes`; None if unknown."""
        ...


class HeadInput:
    """The input of a module inside the model, as it was last called in the forward pass."""

    name = "head"

    def __init__(self, target: Target, head: nn.Module) -> None:
        self.target, self.head = target, head

    def __call__(self, x: Images) -> Sight:
        """See `Eye`.

        Raises:
            CaseError: if the model does not call its head with one input per image.
        """
        caught: list[Any] = [None]

        def catch(_: nn.Module, inputs: Any) -> None:
            caught[0] = inputs[0] if inputs else None

        with _called([self.head], catch):
            logits = self.target(x).logits
        features = caught[0]
        if not isinstance(features, Tensor) or len(features) != len(x):
            raise CaseError(
                f"the head {type(self.head).__name__} is not given one input per image under the "
                f"gradient {self.target.gradient}; use 'honest'."
            )
        return Sight(logits, features.flatten(1))

    def slopes(self, features: Tensor, classes: Labels, y: Labels) -> Tensor | None:
        """The difference of two rows of a linear head's weight."""
        head = self.head
        if not isinstance(head, nn.Linear) or head.out_features != self.target.classes:
            return None
        weight = head.weight.detach()
        return weight[classes] - weight[y]


class LastState:
    """The state that the last solve ended in."""

    name = "state"

    def __init__(self, target: Target, model: EquilibriumClassifier) -> None:
        self.target, self.model = target, model

    def __call__(self, x: Images) -> Sight:
        """See `Eye`.

        Raises:
            CaseError: if the model does not solve for one state per image.
        """
        output = self.target(x)
        z = output.solves[-1].z if output.solves else None
        if z is None or len(z) != len(x):
            raise CaseError(
                f"{type(self.model).__name__} does not end in one state per image; attack its head."
            )
        self.shape = z.shape[1:]
        return Sight(output.logits, z.flatten(1))

    def slopes(self, features: Tensor, classes: Labels, y: Labels) -> Tensor | None:
        """The gradient of the readout's margin at the features."""
        with torch.enable_grad():
            z = features.detach().requires_grad_()
            logits = self.model.readout(z.view(-1, *self.shape))
            margins = logits.gather(1, classes[:, None]) - logits.gather(1, y[:, None])
            (slope,) = torch.autograd.grad(margins.sum(), z)
        return slope


def eyes(target: Target, x: Images) -> list[Eye]:
    """All that there is to look at; a state that goes into the head as it is counts once.

    What does not show one row of features per image, as the head of a model that looks at several
    crops of it, is left out.
    """
    offered: list[Eye] = []
    head = _head(target, x)
    if head is not None:
        offered.append(HeadInput(target, head))
    if isinstance(target.model, EquilibriumClassifier):
        offered.append(LastState(target, target.model))
    seen = [(eye, sight) for eye in offered if (sight := _sight(eye, x[:2])) is not None]
    same = len(seen) == 2 and torch.equal(seen[0][1], seen[1][1])
    return [eye for eye, _ in (seen[:1] if same else seen)]


@torch.no_grad()
def _sight(eye: Eye, x: Images) -> Tensor | None:
    try:
        return eye(x).features
    except CaseError:
        return None


@torch.no_grad()
def features_of(eye: Eye, x: Images, rows: int) -> Tensor:
    """Features (batch, size) of many images, so many at once."""
    return torch.cat([eye(part).features for part in x.split(rows)])


def has_features(target: Target) -> bool:
    """Whether there is anything to look at."""
    return target.iterates or bool(_candidates(target.model))


def _head(target: Target, x: Images) -> nn.Module | None:
    """The last linear layer with an output per class; else the last module with parameters."""
    called: list[nn.Module] = []

    def note(module: nn.Module, _: Any) -> None:
        called.append(module)

    with _called(_candidates(target.model), note), torch.no_grad():
        target(x[:1])
    for module in reversed(called):
        if isinstance(module, nn.Linear) and module.out_features == target.classes:
            return module
    return called[-1] if called else None


def _candidates(model: nn.Module) -> list[nn.Module]:
    """The modules inside a model that have parameters of their own."""
    return [
        module
        for module in model.modules()
        if module is not model and next(module.parameters(recurse=False), None) is not None
    ]


@contextmanager
def _called(modules: list[nn.Module], note: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Inside the block `note` is given each call of the modules, with its positional arguments."""
    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
