"""`--plugin`: plugins that a command line adds to a suite, as rows and as attacks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from robustdeq.errors import UsageError, unknown
from robustdeq.interfaces import Kind, kind_of, trained_form
from robustdeq.keys import file_sha256
from robustdeq.plugin_files import classes_in, located, public_name, reference
from robustdeq.registry import load, parameters_of, registered
from robustdeq.suite import AttackEntry, DefenseEntry, Suite
from robustdeq.weights import check_suffix, read_info

_ADDITION = re.compile(r"(?P<plugin>[^=]+)(=(?P<weights>.+))?")


@dataclass(frozen=True)
class Additions:
    """Rows and attacks to stand beside a suite's own."""

    defenses: tuple[DefenseEntry, ...] = ()
    attacks: tuple[AttackEntry, ...] = ()

    def rows_in(self, suite: Suite) -> Suite:
        """The suite with the rows behind its own.

        Raises:
            UsageError: if an ID stands twice.
        """
        ids = [entry.id for entry in suite.defenses]
        for entry in self.defenses:
            if entry.id in ids:
                raise UsageError(
                    f"--plugin gives the row {entry.id} twice, or suite {suite.name} has it; "
                    "write a suite that gives each row its own id."
                )
            ids.append(entry.id)
        known = {dataset.name for dataset in suite.datasets}
        rows = [e if e.dataset in known else replace(e, dataset="") for e in self.defenses]
        return replace(suite, defenses=(*suite.defenses, *rows))

    def attacks_in(self, suite: Suite) -> Suite:
        """The suite with the attacks behind its own."""
        return replace(suite, attacks=(*suite.attacks, *self.attacks))


def additions(texts: Sequence[str]) -> Additions:
    """The rows and attacks of `FILE.py`, `FILE.py:NAME` or a name, perhaps with `=WEIGHTS`.

    A defense's row bears the class's name. Its parameters are those that its weights were trained
    with; without weights it has its defaults and is evaluated as it is built.

    Raises:
        UsageError: if there is no such plugin, or weights are given for none or for several.
        CaseError: if the weights cannot be read.
    """
    defenses: list[DefenseEntry] = []
    attacks: list[AttackEntry] = []
    for text in texts:
        match = _ADDITION.fullmatch(text)
        if match is None:
            raise UsageError(
                f"--plugin is {text!r}; write FILE.py, FILE.py:NAME or a registered name, with "
                "=WEIGHTS.safetensors behind a defense that was trained."
            )
        rows, steps = _found(match["plugin"])
        defenses += _weighted(rows, match["weights"], text) if match["weights"] else rows
        attacks += steps
    return Additions(tuple(defenses), tuple(attacks))


def _found(plugin: str) -> tuple[list[DefenseEntry], list[AttackEntry]]:
    """What one reference names, by kind."""
    places = _in_file(plugin) if reference(plugin) else _in_registry(plugin)
    rows = [DefenseEntry(id=_id(p), defense=p) for kind, p in places if kind == "defense"]
    return rows, [AttackEntry(attack=p) for kind, p in places if kind == "attack"]


def _in_file(plugin: str) -> list[tuple[Kind, str]]:
    found = []
    for cls in classes_in(plugin):
        kind, named = kind_of(cls), reference(plugin)
        assert kind is not None
        assert named is not None
        found.append((kind, located(kind, f"{named.path}:{cls.__name__}")))
    return found


def _in_registry(name: str) -> list[tuple[Kind, str]]:
    kinds: tuple[Kind, ...] = get_args(Kind)
    found = [(kind, name) for kind in kinds if name in registered(kind)]
    if not found:
        raise unknown("plugin", name, {known for kind in kinds for known in registered(kind)})
    return found


def _id(place: str) -> str:
    return place.rpartition(":")[2] if reference(place) else place


def _deployed(defense: str, trained: dict[str, Any]) -> dict[str, Any]:
    """The parameters of training, but those in which the defense is trained as another one."""
    plugin = load("defense", defense, {})
    own, other = parameters_of(plugin), parameters_of(trained_form(plugin))
    return {name: v for name, v in trained.items() if own.get(name) == other.get(name)}


def _weighted(rows: list[DefenseEntry], weights: str, text: str) -> list[DefenseEntry]:
    """The one defense, with its weights and the parameters that these were trained with."""
    if len(rows) != 1:
        names = ", ".join(row.id for row in rows) or "none"
        raise UsageError(
            f"--plugin {text} gives weights to one defense, and its file has {names}; write "
            "FILE.py:NAME=WEIGHTS."
        )
    (row,), path = rows, Path(weights)
    check_suffix(path)
    if not path.is_file():
        raise UsageError(f"weights {path} do not exist; train them with 'robustdeq train'.")
    info = read_info(path)
    name = public_name("defense", row.defense)
    if info.defense != name:
        raise UsageError(f"weights {path} are of {info.defense}, not of {name}; name its own.")
    return [
        replace(
            row,
            parameters=_deployed(row.defense, info.parameters),
            weights=str(path.resolve()),
            sha256=file_sha256(path),
            dataset=info.dataset,
        )
    ]
