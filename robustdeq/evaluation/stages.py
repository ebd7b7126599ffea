"""The stages of one chunk: clean, checks, the attacks in order, traces; each gives one record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from robustdeq.differentiation import parse_gradient
from robustdeq.equilibrium import SolveGradient
from robustdeq.errors import UsageError
from robustdeq.evaluation.provenance import source_digest
from robustdeq.interfaces import Attack, Scope, option
from robustdeq.keys import canonical
from robustdeq.plugin_files import public_name
from robustdeq.records import Kind
from robustdeq.registry import load, parameters_of
from robustdeq.suite import AttackEntry, Curves
from robustdeq.targets import Target


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of a chunk's evaluation.

    Attributes:
        label: its name in tables, as in "pgd[unrolled(30)]"; unique within a case.
        plugin: the attack; None for the other kinds.
        track: which models it is for: any, deterministic or randomized.
    """

    kind: Kind
    label: str
    plugin: Attack | None = None
    gradient: str = "honest"
    value: str = "deployed"
    track: str = "any"
    spec: dict[str, Any] = field(default_factory=dict)
    curves: Curves | None = None

    @property
    def scope(self) -> Scope:
        """Which samples it is given."""
        return Scope(option(self.plugin, "scope", Scope.SURVIVORS))

    @property
    def phase(self) -> int:
        """1: on its own; 2: after the first phase of all rows, whose examples it is given."""
        return int(option(self.plugin, "phase", 1))

    def fits(self, track: str, target: Target) -> bool:
        """Whether the stage applies to such a model."""
        of_solves = isinstance(parse_gradient(self.gradient), SolveGradient)
        if self.track not in ("any", track) or (of_solves and not target.iterates):
            return False
        wanted: Callable[[Target], bool] = option(self.plugin, "fits", lambda target: True)
        return wanted(target)


CLEAN = Stage("clean", "clean")
CHECKS = Stage("checks", "checks")
TRACES = Stage("traces", "traces")


def curves_stage(curves: Curves) -> Stage:
    """The stage that measures sanity curves."""
    return Stage("curves", "curves", spec=canonical(asdict(curves)), curves=curves)


def attack_stages(entries: tuple[AttackEntry, ...]) -> tuple[Stage, ...]:
    """The stages of a list of attacks: one per attack and gradient, in order."""
    stages: list[Stage] = []
    for entry in entries:
        plugin = load("attack", entry.attack, entry.parameters)
        name = public_name("attack", entry.attack)
        stages += [
            attack_stage(plugin, name, gradient, entry.value, entry.track)
            for gradient in entry.gradients
        ]
    return unique(stages)


def attack_stage(
    plugin: Attack,
    name: str,
    gradient: str = "honest",
    value: str = "deployed",
    track: str = "any",
) -> Stage:
    """The stage of one attack through one gradient.

    Raises:
        UsageError: if the object is no attack.
    """
    if not callable(getattr(plugin, "run", None)) or not hasattr(plugin, "needs"):
        raise UsageError(
            f"{name} is no attack: it lacks 'needs' or 'run(target, x, y, threat, rng)'."
        )
    spec = {
        "attack": name,
        "parameters": {key: _plain(value) for key, value in parameters_of(plugin).items()},
        "gradient": gradient,
        "value": value,
        "needs": str(plugin.needs),
        "source": source_digest(plugin),
    }
    label = name if gradient == "honest" else f"{name}[{gradient}]"
    return Stage("attack", label, plugin, gradient, value, track, spec)


def _plain(value: Any) -> Any:
    """A parameter as JSON data; an object that has no such form stands as its `repr`."""
    try:
        return canonical(value)
    except TypeError:
        return repr(value)


def unique(stages: list[Stage]) -> tuple[Stage, ...]:
    """The same stages, with a number behind labels that repeat."""
    seen: dict[str, int] = {}
    out = []
    for stage in stages:
        # Versions for different tracks never meet in one row, so they may share a label.
        name = f"{stage.label}|{stage.track}"
        seen[name] = seen.get(name, 0) + 1
        label = stage.label if seen[name] == 1 else f"{stage.label}#{seen[name]}"
        out.append(
            Stage(
                "attack", label, stage.plugin, stage.gradient, stage.value, stage.track, stage.spec
            )
        )
    return tuple(out)
