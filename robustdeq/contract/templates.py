"""`robustdeq new`: a plugin to begin with, short enough to read and complete enough to pass."""

from __future__ import annotations

import ast
import importlib.util
import keyword
from pathlib import Path
from typing import Literal, get_args

from robustdeq.errors import UsageError
from robustdeq.files import make_folder
from robustdeq.interfaces import Kind
from robustdeq.registry import registered

Template = Literal["defense", "attack"]

DEFENSE = '''\
"""A defense: a small equilibrium model. Test it with: robustdeq check FILE.py"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustdeq.datasets import DataSpec
from robustdeq.equilibrium import Anderson, EquilibriumClassifier
from robustdeq.interfaces import About


class Model(EquilibriumClassifier):  # logits = readout(z) at the z where z = cell(z, embed(x))
    def __init__(self, data: DataSpec, width: int) -> None:
        super().__init__(Anderson(tolerance=1e-5, max_steps=100))  # how z is found
        self.first = nn.Linear(data.channels * data.height * data.width, width)
        self.inner = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, data.classes)

    def embed(self, x: Tensor) -> Tensor:  # x: (batch, channels, height, width) in [0, 1]
        return self.first(x.flatten(1) - 0.5)

    def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:  # z: (batch, width)
        weight = self.inner.weight  # scaled to a norm below 1, so that there is one z
        return torch.tanh(injection + z @ (0.9 * weight / (1 + weight.norm())).T)

    def readout(self, z: Tensor) -> Tensor:  # logits: (batch, classes)
        return self.last(z)


@dataclass(frozen=True, kw_only=True)
class NAME:
    about: ClassVar[About] = About(title="What it is, in a line", authors="Who it is by")
    recipe: ClassVar[str] = "pgd_at"  # how it is trained: robustdeq list recipes
    width: int = 64  # parameters have types and defaults; robustdeq train --set width=128

    def build(self, data: DataSpec, device: torch.device) -> nn.Module:
        return Model(data, self.width).to(device)
'''

ATTACK = '''\
"""An attack: steps along the gradient. Test it with: robustdeq check FILE.py"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robustdeq.interfaces import Access
from robustdeq.randomness import SampleRandom
from robustdeq.targets import Target
from robustdeq.threats import Threat


@dataclass(frozen=True, kw_only=True)
class NAME:
    """What it does, in a line."""

    needs: ClassVar[Access] = Access.GRADIENTS  # or LOGITS, or LABELS alone
    steps: int = 20  # parameters have types and defaults
    step_size: float = 0.25  # in radii of the ball

    def run(
        self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: SampleRandom
    ) -> Tensor:
        # All random numbers come from rng, which has a stream per image: results then depend
        # neither on the batch nor on what else runs.
        moved = threat.project(x, x + threat.random_offset(rng.uniform(x), rng.fraction(x)))
        for _ in range(self.steps):
            moved = moved.detach().requires_grad_()
            loss = cross_entropy(target(moved).logits, y, reduction="sum")  # a sum couples no two
            (slope,) = torch.autograd.grad(loss, moved)
            step = self.step_size * threat.eps * threat.steepest(slope)
            moved = threat.project(x, moved.detach() + step)  # into the ball and into [0, 1]
        return moved  # candidates: whether they count is for the judge to say
'''

_TEXTS: dict[Template, str] = {"defense": DEFENSE, "attack": ATTACK}


def write_template(kind: str, name: str, folder: Path) -> Path:
    """Write `<folder>/<name>.py`, a plugin that passes `robustdeq check` as it stands.

    Raises:
        UsageError: for another kind, a name that cannot be a module's or is taken, or a file that
            is there already.
    """
    if kind not in _TEXTS:
        raise UsageError(f"there is no template of kind {kind!r}; write defense or attack.")
    known: Template = "defense" if kind == "defense" else "attack"
    _check_name(name)
    path = folder / f"{name}.py"
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path} is there already, and stays; give another name or --out.")
    _check_free(name)
    make_folder(folder)
    with path.open("x", encoding="utf-8") as stream:
        stream.write(template(known, name))
    return path


def template(kind: Template, name: str) -> str:
    """The text of a new plugin's file."""
    text = _TEXTS[kind].replace("NAME", class_name(kind, name))
    return text.replace("FILE.py", f"{name}.py")


def class_name(kind: Template, name: str) -> str:
    """`my_deq` as `MyDeq`; with the kind behind it where the file has that name for something."""
    words = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    taken = {node.id for node in ast.walk(ast.parse(_TEXTS[kind])) if isinstance(node, ast.Name)}
    return words + kind.capitalize() if words in taken or keyword.iskeyword(words) else words


def _check_name(name: str) -> None:
    plain = name.isascii() and name.isidentifier() and not name.startswith("_")
    if not plain or keyword.iskeyword(name) or len(name) > 60:
        raise UsageError(
            f"{name!r} cannot be the name of a module; give a letter, then letters, digits and "
            "underscores, at most 60, and no word of Python's own."
        )


def _check_free(name: str) -> None:
    """Refuse the names of plugins, and of modules that the file would hide."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        if name in registered(kind):
            article = "an" if kind == "attack" else "a"
            raise UsageError(f"{article} {kind} {name!r} is registered already; name another.")
    if importlib.util.find_spec(name) is not None:
        raise UsageError(f"a module {name!r} is installed already; name another.")
