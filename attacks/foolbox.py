"""Any attack of the library Foolbox, by its name there."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from robustdeq.errors import CaseError, UsageError, sentence, unknown
from robustdeq.interfaces import Access, Candidates, Scope
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Norm, Threat

_P = {Norm.LINF: float("inf"), Norm.L2: 2.0}


@dataclass(frozen=True, kw_only=True)
class Foolbox:
    """An attack of Foolbox (Rauber et al. 2020) on the whole chunk, under the suite's seed.

    An attack in the threat's own norm is run at its radius, and what the library clipped to it is
    the candidate. One in another norm is run in the smallest ball of its norm that holds the
    threat's, and its points are projected. Attacks that minimize a distance are cut off at the
    radius in the same way. Whether the library calls a point a success is not asked.

    Attributes:
        attack: name of a class in `foolbox.attacks`, as in "LinfDeepFoolAttack".
        parameters: of that class; where it asks for a distance and none is given, the threat's.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    scope: ClassVar[Scope] = Scope.CHUNK

    attack: str = "LinfPGD"
    parameters: dict[str, Any] = field(default_factory=dict)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        """See `robustdeq.interfaces.Attack`.

        Raises:
            UsageError: without Foolbox, for an unknown attack or for parameters that it refuses.
            CaseError: if the attack itself fails on this model.
        """
        library = _library()
        attack = self._made(library, threat)
        module = target.module().eval()
        with _own_randomness(rng.seed, x.device), _parameter_gradients_kept(module):
            try:
                model = library.PyTorchModel(module, bounds=target.bounds, device=x.device)
                radius = _radius(_exponent(attack), threat, x[0].numel())
                found, clipped, _ = attack(model, x.clone(), y, epsilons=radius)
            # Assertions without a message among them: the library's way to refuse a model.
            except Exception as cause:
                raise CaseError(f"Foolbox's {self.attack} fails: {sentence(cause)}.") from cause
        own = _exponent(attack) == _P[threat.norm]
        points = (clipped if own else found).detach()
        return Candidates(threat.project(x, points), (self.attack,) * len(x))

    def _made(self, library: Any, threat: Threat) -> Any:
        """The library's attack object."""
        attacks = _attacks(library)
        if self.attack not in attacks:
            raise unknown("Foolbox attack", self.attack, attacks)
        cls = attacks[self.attack]
        parameters = dict(self.parameters)
        if "distance" in inspect.signature(cls).parameters:
            own = library.distances.linf if threat.norm is Norm.LINF else library.distances.l2
            parameters.setdefault("distance", own)
        try:
            return cls(**parameters)
        except ImportError as cause:
            raise UsageError(f"Foolbox's {self.attack} needs another package: {cause}.") from cause
        except (TypeError, ValueError) as cause:
            raise UsageError(
                f"Foolbox's {self.attack} refuses its parameters: {sentence(cause)}."
            ) from cause


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated names of SciPy's, in its release of 2024
            import foolbox
    except ImportError as cause:
        raise UsageError(
            f"Foolbox cannot be imported ({cause}); install it with 'pip install foolbox'."
        ) from cause
    return foolbox


def _attacks(library: Any) -> dict[str, type[Any]]:
    """The library's attacks by name, its abstract classes left out."""
    base = library.attacks.Attack
    return {
        name: part
        for name, part in vars(library.attacks).items()
        if isinstance(part, type) and issubclass(part, base) and not inspect.isabstract(part)
    }


def _exponent(attack: Any) -> float | None:
    """The p of the norm that an attack bounds; None where it bounds none."""
    p = getattr(getattr(attack, "distance", None), "p", None)
    return None if p is None else float(p)


def _radius(p: float | None, threat: Threat, pixels: int) -> float:
    """The radius of the smallest ball in the norm p around the threat's ball."""
    if p is None:
        return threat.eps
    if p == 0:
        return float(pixels)
    power = 1 / p - 1 / _P[threat.norm]
    return float(threat.eps * pixels ** max(power, 0.0))


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """The library draws from the global generators; whoever called gets theirs back."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _parameter_gradients_kept(module: nn.Module) -> Iterator[None]:
    """The library calls `backward`, which adds to the gradients of the parameters too."""
    held = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in held:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient
