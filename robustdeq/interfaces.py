"""The plugin contracts: what a defense, an attack and a recipe must offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from robustdeq.datasets import DataSpec
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.texts import one_line
from robustdeq.threats import Threat

Kind = Literal["defense", "attack", "recipe"]
_METHODS: dict[Kind, str] = {"defense": "build", "attack": "run", "recipe": "loss"}


@dataclass(frozen=True)
class About:
    """Where an idea comes from, what its authors claim for it, and what we found.

    Attributes:
        claimed: empty where the claim is not known to us; it is never written from memory.
        reproduced: what we could and could not reproduce, and what is ours in it.
    """

    title: str
    authors: str = ""
    venue: str = ""
    link: str = ""
    claimed: str = ""
    reproduced: str = ""


class Access(StrEnum):
    """What an attack needs of its target."""

    GRADIENTS = "gradients"
    LOGITS = "logits"
    LABELS = "labels"


class Scope(StrEnum):
    """Which samples of a chunk an attack is given."""

    CHUNK = "chunk"
    """All of them as one batch: library attacks, whose figure is to be comparable."""
    SURVIVORS = "survivors"
    """Those that are classified correctly and that no attack before it has broken."""


class Candidates(NamedTuple):
    """Candidates, with the name of the component that made each (empty where there is none).

    `notes` are sentences on what the attack left out of this model; they stand in the row.
    """

    x: Images
    made_by: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Budget(NamedTuple):
    """The most model calls that an attack spends on one sample that stays robust."""

    forward: int
    backward: int


@runtime_checkable
class Defense(Protocol):
    """A defense plugin: a frozen dataclass whose fields are its parameters.

    `recipe` names the training recipe that is used where none is given. It may also define `suited`
    (parameters that a recipe had better have for this model, if it knows them; the defaults of
    `robustdeq train`) and `trained_as()`: the defense, of the same weights, that stands for it in
    training (a purifier that acts at inference alone is trained without it).
    """

    about: ClassVar[About]
    recipe: ClassVar[str]

    def build(self, data: DataSpec, device: torch.device) -> nn.Module:
        """A model from (batch, channels, height, width) float32 in [0, 1] to logits."""
        ...


@runtime_checkable
class Attack(Protocol):
    """An attack plugin: a frozen dataclass whose fields are its parameters.

    It may also define `scope` (a `Scope`, by default the survivors), `left_out(classes)` (a tuple
    of sentences on what it cannot run with so few classes), `budget(classes)` (a `Budget`, for
    `--estimate`), `resolved(target)` (the attack whose budget counts there, where another one takes
    its place on some models), `fits(target)` (whether it applies to a model; it is left out of rows
    where it does not) and `phase` (2 for an attack that wants what all rows' own attacks have found
    in `target.pools`; by default 1).
    """

    needs: ClassVar[Access]

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Tensor | Candidates:
        """Candidates for `x`, of the same shape. Claims nothing: the judge decides."""
        ...


@runtime_checkable
class Recipe(Protocol):
    """A training recipe plugin: a frozen dataclass whose fields are its parameters.

    `prefix` begins the row IDs of models trained with it, as in `Madry2018Towards_deq`. It may also
    define `gradient` and `solver_steps` (the estimator that training differentiates through, and
    the step limit of the solver in training) and `trainer(task)` (a `robustdeq.training.task`
    trainer of its own in place of gradient descent, as federated averaging needs).
    """

    about: ClassVar[About]
    prefix: ClassVar[str]
    adversarial: ClassVar[bool]

    @property
    def epochs(self) -> int:
        """Passes over the training split."""
        ...

    @property
    def batch_size(self) -> int:
        """Images a step."""
        ...

    @property
    def learning_rate(self) -> float:
        """Peak of the schedule."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of AdamW."""
        ...

    def loss(
        self,
        target: Target,
        x: Images,
        y: Labels,
        threat: Threat,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        """The scalar loss of one batch; `progress` runs from 0 to 1 over the training."""
        ...


def kind_of(cls: Any) -> Kind | None:
    """What sort of plugin a class (or object) wants to be, by the method that only it has."""
    if not isinstance(cls, type):
        cls = type(cls)
    return next(
        (kind for kind, name in _METHODS.items() if callable(getattr(cls, name, None))), None
    )


def about_of(plugin: Any) -> dict[str, str]:
    """What a plugin says of itself, as far as it says it: title, authors, claimed, ...

    Each is one line of printable text, whatever the plugin holds there.
    """
    about = getattr(plugin, "about", None)
    told = {}
    for field in fields(About):
        text = one_line(getattr(about, field.name, ""))
        if text:
            told[field.name] = text
    return told


def option(plugin: Any, name: str, default: Any) -> Any:
    """An optional member of a plugin, or the default."""
    return getattr(plugin, name, default)


def trained_form(defense: Defense) -> Defense:
    """The defense that stands for another in training: itself, unless it says otherwise."""
    trained_as: Callable[[], Defense] = option(defense, "trained_as", lambda: defense)
    return trained_as()
