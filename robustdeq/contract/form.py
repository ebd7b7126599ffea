"""What all plugins must be: frozen dataclasses whose fields are plain parameters."""

from __future__ import annotations

import dataclasses
import pickle
import typing
from typing import Any

from robustdeq.contract.findings import Finding, Findings
from robustdeq.interfaces import About, Kind
from robustdeq.keys import canonical, canonical_json
from robustdeq.registry import parameters_of
from robustdeq.texts import LONGEST

MEMBERS: dict[Kind, tuple[str, ...]] = {
    "defense": ("about", "recipe", "build"),
    "attack": ("needs", "run"),
    "recipe": ("about", "prefix", "adversarial", "loss"),
}

_OPTIONAL = ("scope", "phase", "suited", "gradient", "solver_steps")
"""Members that a plugin may have besides; they need no annotation."""


def form(plugin: Any, kind: Kind) -> list[Finding]:
    """The findings on a plugin object's class and parameters."""
    found, cls = Findings(), type(plugin)
    found.run(
        "frozen_dataclass",
        "Decorate the class with @dataclass(frozen=True, kw_only=True).",
        lambda: _frozen(cls),
    )
    found.run(
        "members",
        "Add what is missing; see robustdeq/interfaces.py.",
        lambda: _missing(cls, kind),
    )
    if "about" in MEMBERS[kind]:
        found.run(
            "about",
            'Say about = About(title="..."), each part one line of text.',
            lambda: _mute(getattr(cls, "about", None)),
        )
    found.run(
        "annotated_fields",
        "Annotate each parameter with int, float, str, bool, a Literal or a tuple of them.",
        lambda: _untyped(cls),
    )
    found.run(
        "json_parameters",
        "Keep parameters to numbers, texts, lists and dicts: they go into keys and suites.",
        lambda: _unwritable(plugin),
    )
    found.run(
        "picklable",
        "Define the class at the top of its module: workers are sent it by name.",
        lambda: "" if pickle.loads(pickle.dumps(plugin)) == plugin else "the copy differs",
    )
    return found.items


def _frozen(cls: type) -> str:
    if not dataclasses.is_dataclass(cls):
        return f"{cls.__name__} is no dataclass"
    parameters = cls.__dataclass_params__  # type: ignore[attr-defined]
    return "" if parameters.frozen else f"{cls.__name__} can be changed after it was made"


def _missing(cls: type, kind: Kind) -> str:
    lacking = [name for name in MEMBERS[kind] if not hasattr(cls, name)]
    return f"a {kind} lacks {', '.join(lacking)}" if lacking else ""


def _mute(about: Any) -> str:
    """What keeps `about` from being shown as it is."""
    if not isinstance(about, About):
        return f"about is {type(about).__name__}, not a robustdeq.interfaces.About"
    for field in dataclasses.fields(About):
        text = getattr(about, field.name)
        if not isinstance(text, str):
            return f"{field.name} is {type(text).__name__}, not text"
        if not text.isprintable() or len(text) > LONGEST:
            return f"{field.name} has control characters, or more than {LONGEST} characters"
    return "" if about.title.strip() else "title is empty"


def _untyped(cls: type) -> str:
    """Names that are assigned in the class, look like parameters, and are no fields."""
    hints = typing.get_type_hints(cls)
    known = {*_OPTIONAL, *(name for names in MEMBERS.values() for name in names)}
    loose = [
        name
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and name not in hints
        and name not in known
        and isinstance(value, bool | int | float | str | tuple | list | dict)
    ]
    return f"{', '.join(loose)} has no annotation and so is no parameter" if loose else ""


def _unwritable(plugin: Any) -> str:
    parameters = parameters_of(plugin)
    try:
        canonical_json(parameters)
    except TypeError as cause:
        return str(cause)
    again = type(plugin)(**parameters)
    same = canonical(parameters_of(again)) == canonical(parameters)
    return "" if same else "made again from its parameters it has others"
