"""What an attack must keep to, against a small network and a small equilibrium model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robustdeq.contract.findings import Finding, Findings
from robustdeq.contract.form import form
from robustdeq.contract.practice import CPU, IMAGES, practice
from robustdeq.contract.surroundings import watched
from robustdeq.equilibrium import metered
from robustdeq.errors import RobustDEQError, sentence
from robustdeq.evaluation.judge import seeded
from robustdeq.interfaces import Access, Attack, Candidates, Scope, option
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat, Violation

THREATS = ("Linf:8/255", "L2:0.25", "Linf:0")
_REMEDIES = {
    "runs": "Define run(target, x, y, threat, rng); refuse what cannot be attacked by UsageError.",
    "admissible": "Return threat.project(x, candidate).",
    "arguments_untouched": "Work on copies of x and y, and leave the model as it is.",
    "deterministic": "Draw all random numbers from `rng`.",
    "companions": "Draw per sample from `rng`, and let no sample's step depend on another.",
    "access": "Say needs = Access.GRADIENTS, or ask for logits alone.",
    "quiet": "Return candidates, and do nothing else.",
}


@dataclass(frozen=True, eq=False)
class Ground:
    """A model to attack, with images that it classifies correctly."""

    attack: Attack
    model: nn.Module
    x: Images
    y: Labels

    def run(self, rows: list[int], threat: Threat, disturb: int = 1) -> Candidates:
        """Attack some rows, under another state of the global generators each time."""
        target = Target(self.model.eval(), 10)
        rng = SampleRandom(0, "contract", rows)
        with seeded(disturb, CPU):
            found = self.attack.run(target, self.x[rows].clone(), self.y[rows].clone(), threat, rng)
        return found if isinstance(found, Candidates) else Candidates(found, ("",) * len(rows))


def attack_findings(attack: Attack) -> list[Finding]:
    """All findings on an attack."""
    found = Findings(form(attack, "attack"))
    found.run("signature", _REMEDIES["runs"], lambda: _signature(attack))
    with watched() as traces:
        ground = _ground(found, attack)
        if ground is not None:
            for name, test in TESTS.items():
                found.run(name, _REMEDIES[name], partial(test, ground))
    found.note("quiet", "; ".join(dict.fromkeys(traces.acts)), _REMEDIES["quiet"])
    return found.items


def _signature(attack: Attack) -> str:
    if not isinstance(getattr(attack, "needs", None), Access):
        return "needs is no robustdeq.interfaces.Access"
    try:
        inspect.signature(attack.run).bind(None, None, None, None, None)
    except TypeError as cause:
        return f"run cannot be called with (target, x, y, threat, rng): {cause}"
    return ""


def _ground(found: Findings, attack: Attack) -> Ground | None:
    """The first of the two models that the attack does not refuse."""
    refusal = ""
    for iterates in (False, True):
        ground = Ground(attack, *practice(iterates=iterates))
        try:
            ground.run(list(range(IMAGES)), Threat.parse(THREATS[0]))
        except RobustDEQError as cause:
            refusal = sentence(cause)
            continue
        except Exception as cause:
            found.note("runs", sentence(cause), _REMEDIES["runs"])
            return None
        found.note("runs", "", _REMEDIES["runs"])
        return ground
    found.skip("runs", refusal)
    return None


def _admissible(ground: Ground) -> str:
    """Form, and the rules of three threats, one of them with a radius of 0."""
    for text in THREATS:
        threat = Threat.parse(text)
        try:
            x = ground.run(list(range(IMAGES)), threat).x
        except RobustDEQError:
            continue
        if not isinstance(x, Tensor) or x.shape != ground.x.shape:
            return f"under {text} it returns {getattr(x, 'shape', type(x).__name__)}"
        broken = [v for v in threat.violations(ground.x, x.detach()) if v is not Violation.NONE]
        if broken:
            return f"under {text}, {len(broken)} of {IMAGES} candidates are {broken[0]}"
    return ""


def _untouched(ground: Ground) -> str:
    """Arguments, weights, gradients of weights, modes."""
    x, y, rng = ground.x.clone(), ground.y.clone(), SampleRandom(0, "contract", range(IMAGES))
    before = {k: v.clone() for k, v in ground.model.state_dict().items()}
    with seeded(1, CPU):
        ground.attack.run(Target(ground.model, 10), x, y, Threat.parse(THREATS[0]), rng)
    if not torch.equal(x, ground.x) or not torch.equal(y, ground.y):
        return "it writes into x or y"
    if any(not torch.equal(v, before[k]) for k, v in ground.model.state_dict().items()):
        return "it changes the model's weights"
    return "it leaves the model in training mode" if ground.model.training else ""


def _deterministic(ground: Ground) -> str:
    runs = [ground.run(list(range(IMAGES)), Threat.parse(THREATS[0]), seed).x for seed in (1, 2)]
    apart = float((runs[0] - runs[1]).abs().max())
    return f"two runs with equal `rng` differ by {apart:.2g}" if apart > 0 else ""


def _companions(ground: Ground) -> str:
    """Half of the samples by themselves, where the attack says that it treats samples apart."""
    if Scope(option(ground.attack, "scope", Scope.SURVIVORS)) is Scope.CHUNK:
        return ""
    threat = Threat.parse(THREATS[0])
    whole = ground.run(list(range(IMAGES)), threat).x
    half = ground.run(list(range(0, IMAGES, 2)), threat).x
    apart = float((whole[::2] - half).abs().max())
    return f"candidates move by {apart:.2g} with the other samples" if apart > 1e-4 else ""


def _access(ground: Ground) -> str:
    if ground.attack.needs is Access.GRADIENTS:
        return ""
    with metered() as meter:
        ground.run(list(range(IMAGES)), Threat.parse(THREATS[0]))
    says = f"it says needs = {ground.attack.needs}"
    return f"{says}, and takes {meter.backward} gradients" if meter.backward else ""


TESTS: dict[str, Callable[[Ground], str]] = {
    "admissible": _admissible,
    "arguments_untouched": _untouched,
    "deterministic": _deterministic,
    "companions": _companions,
    "access": _access,
}
