"""Suites: TOML files that say what is evaluated, and the cases they expand to."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from robustdeq.bounded import LARGEST_TOML, BoundError, parse_toml, read_bytes
from robustdeq.datasets import check_dataset
from robustdeq.differentiation import expand_gradients, parse_gradient
from robustdeq.errors import UsageError, unknown
from robustdeq.interfaces import Kind
from robustdeq.plain_names import LONGEST_PATH, check_file_name, check_label
from robustdeq.plugin_files import PUBLIC, located, public_name
from robustdeq.registry import load, parameters_of
from robustdeq.threats import Threat
from robustdeq.weights import check_suffix

FORMAT = 1
Augmentation = Literal["none", "shift_flip"]
Track = Literal["any", "deterministic", "randomized"]
Engine = Literal["reference", "joint"]
BATTERIES = "batteries"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """A data set and how many of its first test samples are evaluated (0: all)."""

    name: str
    samples: int = 0


@dataclass(frozen=True, kw_only=True)
class AttackEntry:
    """An attack, its parameters, and the gradients it is run through, each on its own.

    `attack` is a registered name, `FILE.py` or `FILE.py:NAME`, from the suite's folder.
    `track` restricts it to deterministic or to randomized models. A gradient that differentiates
    through a solve is skipped, with a note, on models that have none.
    """

    attack: str
    parameters: dict[str, Any] = field(default_factory=dict)
    gradients: tuple[str, ...] = ("honest",)
    value: Literal["deployed", "surrogate"] = "deployed"
    track: Track = "any"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How weights came to be: enough for `robustdeq train` to make them again.

    Attributes:
        threat: that of the training; empty means the row's own.
        validation: training images held out to choose the weights by; 0 keeps the last ones.
        augmentation: of training images; `none`, or `shift_flip` as is usual on CIFAR.
    """

    recipe: str
    parameters: dict[str, Any] = field(default_factory=dict)
    threat: str = ""
    seed: int = 0
    validation: int = 0
    augmentation: Augmentation = "none"


@dataclass(frozen=True, kw_only=True)
class DefenseEntry:
    """A row: a defense with parameters and weights.

    Attributes:
        id: the row's ID, RobustBench style.
        defense: a registered name, `FILE.py` or `FILE.py:NAME`, from the suite's folder.
        weights: file name, looked for beside the suite, in `--weights` and in the package; empty
            where the plugin's `build` returns a finished model.
        sha256: of that file; empty only where there is no file.
        dataset: the data set it belongs to; empty where the suite has one only.
        threats: the threats it is evaluated under; empty means all of the suite.
        training: how the weights were trained, for the check of their metadata.
    """

    id: str
    defense: str
    parameters: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    sha256: str = ""
    dataset: str = ""
    threats: tuple[str, ...] = ()
    training: Training | None = None


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Sanity curves of each row, beside its verdict.

    Attributes:
        epsilons: accuracy at these multiples of the threat's radius.
        steps: accuracy at the radius itself after so many steps of PGD.
        unbounded: accuracy where the ball is the whole box.
    """

    epsilons: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    unbounded: bool = True

    def __post_init__(self) -> None:
        numbers = (*self.epsilons, *self.steps)
        if not all(isinstance(n, int | float) and 0 <= n <= 1000 for n in numbers) or not all(
            isinstance(n, int) and n >= 1 for n in self.steps
        ):
            raise UsageError(
                "curves have epsilons that are multiples of the radius in [0, 1000] and steps that "
                "are whole numbers in [1, 1000]; repair the suite's [curves]."
            )


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A parsed suite; `folder` is where its file stands.

    `autoattack` is the engine of the column AutoAttack: "reference", the library, or "joint", the
    same attacks with carried states on the models that allow it.
    """

    name: str
    datasets: tuple[DatasetEntry, ...]
    threats: tuple[str, ...]
    defenses: tuple[DefenseEntry, ...]
    attacks: tuple[AttackEntry, ...] = ()
    battery: str = ""
    autoattack: Engine = "reference"
    description: str = ""
    seed: int = 0
    chunk: int = 100
    curves: Curves | None = None
    format: int = FORMAT
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row's work: a defense on a slice of data under a threat."""

    entry: DefenseEntry
    dataset: DatasetEntry
    threat: Threat
    seed: int
    chunk: int


def suite_names() -> list[str]:
    """The suites that ship with the package."""
    folder = resources.files("robustdeq.leaderboards")
    names = [f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")]
    return sorted(name for name in names if name != BATTERIES)


def find_suite(name: str) -> Suite:
    """A suite by name, or by the path of its TOML file.

    Raises:
        UsageError: if there is none, or it is malformed.
    """
    path = Path(name)
    if name.endswith(".toml") or "/" in name:
        if not path.is_file():
            raise UsageError(
                f"suite file {name} does not exist; give a path, or one of {suite_names()}."
            )
        try:
            payload = read_bytes(path, LARGEST_TOML)
        except BoundError as cause:
            raise UsageError(f"suite file {name} {cause}; name another.") from cause
        return parse_suite(payload, name, path.resolve().parent)
    if name not in suite_names():
        raise unknown("suite", name, suite_names())
    text = (resources.files("robustdeq.leaderboards") / f"{name}.toml").read_text(encoding="utf-8")
    return parse_suite(text, name, None)


def battery(name: str) -> tuple[AttackEntry, ...]:
    """A named list of attacks.

    Raises:
        UsageError: for an unknown name.
    """
    file = resources.files("robustdeq.leaderboards") / f"{BATTERIES}.toml"
    lists = parse_toml(file.read_bytes())
    if name not in lists:
        raise unknown("battery", name, lists)
    entries: list[AttackEntry] = []
    for item in lists[name]:
        if set(item) == {"battery"}:  # all of another list
            entries += battery(item["battery"])
        else:
            entries.append(_entry(AttackEntry, item, f"battery {name}"))
    return tuple(entries)


def parse_suite(text: str | bytes, source: str, folder: Path | None) -> Suite:
    """A suite from TOML text, perhaps a stranger's; everything that it names is looked up.

    Raises:
        UsageError: naming the first thing that is wrong.
    """
    where = f"suite {source}"
    try:
        data = parse_toml(text)
    except BoundError as cause:
        raise UsageError(f"{where} {cause}; repair it.") from cause
    if data.get("format", FORMAT) != FORMAT:
        raise UsageError(f"{where} is of format {data['format']!r}, this version reads {FORMAT}.")
    for key, cls in (
        ("datasets", DatasetEntry),
        ("attacks", AttackEntry),
        ("defenses", DefenseEntry),
    ):
        items = data.get(key, [])
        if not isinstance(items, list):
            raise UsageError(f"{where}: {key} is no list of tables; write [[{key}]].")
        data[key] = [_entry(cls, item, f"{where}, {key}") for item in items]
    if "folder" in data:
        raise UsageError(f"{where}: unknown key 'folder'; a suite's folder is that of its file.")
    suite: Suite = _entry(Suite, {**data, "folder": folder}, where)
    _check_names(suite, where)
    suite = _placed(suite)
    check_suite(suite, where)
    return suite


def _check_names(suite: Suite, where: str) -> None:
    """Refuse names that could lead out of a folder, forge a line or have no digest."""
    check_file_name(suite.name, f"{where}: name")
    for dataset in suite.datasets:
        check_label(dataset.name, f"{where}: the name of a data set", LONGEST_PATH)
    for entry in suite.defenses:
        check_label(entry.id, f"{where}: a row's id")
        row = f"{where}: row {entry.id}"
        if entry.weights:
            check_label(entry.weights, f"{row}: weights", LONGEST_PATH)
            check_suffix(Path(entry.weights))
        if entry.sha256 and not re.fullmatch("[0-9a-f]{64}", entry.sha256):
            raise UsageError(
                f"{row}: sha256 is {entry.sha256!r}; give the 64 hexadecimal digits of the file."
            )


def unpinned(suite: Suite) -> list[str]:
    """The IDs of rows whose weights have no sha256 in the suite: any file of that name will do."""
    return [e.id for e in suite.defenses if e.weights and not e.sha256]


def _placed(suite: Suite) -> Suite:
    """The suite with whole paths in place of its references to files."""
    return replace(
        suite,
        attacks=tuple(
            replace(e, attack=located("attack", e.attack, suite.folder)) for e in suite.attacks
        ),
        defenses=tuple(_placed_row(e, suite.folder) for e in suite.defenses),
    )


def _placed_row(entry: DefenseEntry, folder: Path | None) -> DefenseEntry:
    training = entry.training
    if training is not None:
        training = replace(training, recipe=located("recipe", training.recipe, folder))
    defense = located("defense", entry.defense, folder)
    return replace(entry, defense=defense, training=training)


def adjusted(
    suite: Suite,
    samples: int | None,
    battery_name: str | None,
    only: str | None = None,
    threat: str | None = None,
    curves: bool = False,
    autoattack: str | None = None,
    added: Collection[str] = (),
) -> Suite:
    """The suite with the command line's samples, battery and choice of rows in place of its own.

    Args:
        autoattack: the engine of AutoAttack, in place of the suite's.
        only: a regular expression; rows in whose ID it is found stay.
        added: IDs of rows that stay whatever `only` says: they were asked for by name.
        threat: in place of the suite's threats; rows that have their own stay if it is among them.
        curves: sanity curves, also where the suite does not ask for them.

    Raises:
        UsageError: for a value that leaves nothing to do.
    """
    if samples is not None:
        if samples < 1:
            raise UsageError(f"--samples is {samples}; give at least 1.")
        suite = replace(suite, datasets=tuple(replace(d, samples=samples) for d in suite.datasets))
    if battery_name is not None:
        battery(battery_name)
        suite = replace(suite, battery=battery_name, attacks=())
    if autoattack is not None:
        suite = replace(suite, autoattack=_engine(autoattack, "--autoattack"))
    if curves and suite.curves is None:
        suite = replace(suite, curves=Curves())
    if threat is not None:
        suite = _under(suite, str(Threat.parse(threat)))
    if only is not None:
        found = {e.id for e in suite.defenses if pattern(only).search(e.id)}
        if not found:
            ids = ", ".join(e.id for e in suite.defenses[:5])
            raise UsageError(
                f"--only {only!r} is found in no row of suite {suite.name} ({ids}...)."
            )
        chosen = tuple(e for e in suite.defenses if e.id in found or e.id in added)
        suite = replace(suite, defenses=chosen)
    return suite


def _under(suite: Suite, threat: str) -> Suite:
    """The suite under one threat."""
    rows = [e for e in suite.defenses if threat in (_texts(e.threats) or (threat,))]
    if not rows:
        raise UsageError(f"suite {suite.name} has no row for threat {threat}.")
    # Weights keep the threat that they were trained for.
    own = _texts(suite.threats)
    kept = [replace(e, threats=(), training=_trained_for(e, own)) for e in rows]
    return replace(suite, threats=(threat,), defenses=tuple(kept))


def _trained_for(entry: DefenseEntry, threats: tuple[str, ...]) -> Training | None:
    """How a row was trained, with its threat spelled out where the suite left no doubt."""
    known = _texts(entry.threats) or threats
    if entry.training is None or entry.training.threat or len(known) != 1:
        return entry.training
    return replace(entry.training, threat=known[0])


def _texts(threats: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(Threat.parse(threat)) for threat in threats)


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression of the command line.

    Raises:
        UsageError: if it is none.
    """
    try:
        return re.compile(text)
    except re.error as cause:
        raise UsageError(f"--only {text!r} is no regular expression ({cause}).") from cause


def attacks_of(suite: Suite) -> tuple[AttackEntry, ...]:
    """All attacks of a suite, its battery's first, with their parameters resolved."""
    listed = (*(battery(suite.battery) if suite.battery else ()), *suite.attacks)
    return tuple(resolved(_driven(entry, suite.autoattack)) for entry in listed)


def _driven(entry: AttackEntry, engine: Engine) -> AttackEntry:
    """AutoAttack standard by the suite's engine, where the entry names none."""
    own = entry.parameters.get("version", "standard") != "standard" or "engine" in entry.parameters
    if entry.attack != "autoattack" or engine == "reference" or own:
        return entry
    return replace(entry, parameters={**entry.parameters, "engine": engine})


def _engine(name: str, where: str) -> Engine:
    for engine in get_args(Engine):
        if name == engine:
            return cast("Engine", engine)
    raise UsageError(f"{where} is {name!r}; give one of {', '.join(get_args(Engine))}.")


def resolved(entry: AttackEntry) -> AttackEntry:
    """The entry with the attack's defaults filled in: keys do not depend on what was left out.

    Raises:
        UsageError: for an unknown attack, parameter or gradient.
    """
    entry = replace(entry, attack=located("attack", entry.attack))
    plugin = load("attack", entry.attack, entry.parameters)
    gradients = tuple(str(parse_gradient(text)) for text in expand_gradients(entry.gradients))
    return replace(entry, parameters=parameters_of(plugin), gradients=gradients)


def expand(suite: Suite) -> list[Case]:
    """The cases of a suite, in the order of its file."""
    cases = []
    for dataset in suite.datasets:
        for entry in suite.defenses:
            if entry.dataset not in ("", dataset.name):
                continue
            for threat in entry.threats or suite.threats:
                cases.append(
                    Case(
                        entry=entry,
                        dataset=dataset,
                        threat=Threat.parse(threat),
                        seed=suite.seed,
                        chunk=suite.chunk,
                    )
                )
    return cases


def as_data(suite: Suite) -> dict[str, Any]:
    """The suite as JSON data, without the places of its files on this machine."""
    data = asdict(replace(suite, defenses=tuple(map(_public_row, suite.defenses))))
    data.pop("folder")
    for entry in data["attacks"]:
        entry["attack"] = public_name("attack", entry["attack"])
    return data


def _public_row(entry: DefenseEntry) -> DefenseEntry:
    training = entry.training
    if training is not None:
        training = replace(training, recipe=public_name("recipe", training.recipe))
    weights = Path(entry.weights).name if Path(entry.weights).is_absolute() else entry.weights
    defense = public_name("defense", entry.defense)
    return replace(entry, defense=defense, weights=weights, training=training)


def check_suite(suite: Suite, where: str) -> None:
    """Look up all that a suite names.

    Raises:
        UsageError: naming the first thing that is wrong.
    """
    for part in ("datasets", "threats", "defenses"):
        if not getattr(suite, part):
            raise UsageError(f"{where} lists no {part}; name at least one.")
    if suite.chunk < 1:
        raise UsageError(f"{where} has chunk = {suite.chunk}; give at least 1.")
    if not attacks_of(suite):
        raise UsageError(f"{where} lists no attacks; name a battery or [[attacks]].")
    for dataset in suite.datasets:
        check_dataset(dataset.name)
    for entry in suite.defenses:
        load("defense", entry.defense, entry.parameters)
        if entry.training is not None:
            load("recipe", entry.training.recipe, entry.training.parameters)
        if entry.dataset and entry.dataset not in [d.name for d in suite.datasets]:
            raise UsageError(
                f"{where}: row {entry.id} names data set {entry.dataset!r}, which the suite lacks."
            )
    _check_files(suite, where)
    rows = Counter((c.entry.id, c.dataset.name, str(c.threat)) for c in expand(suite))
    (row, count), *_ = rows.most_common(1)
    if count > 1:
        raise UsageError(f"{where} has {count} rows {row[0]} on {row[1]}; give each its own id.")


def _check_files(suite: Suite, where: str) -> None:
    """Refuse two files whose plugins would bear one name in the records."""
    used: dict[tuple[Kind, str], str] = {}
    names: list[tuple[Kind, str]] = [("defense", e.defense) for e in suite.defenses]
    names += [("attack", e.attack) for e in suite.attacks]
    for kind, name in names:
        public = public_name(kind, name)
        if used.setdefault((kind, public), name) != name:
            raise UsageError(
                f"{where}: two files define the {kind} {public.removeprefix(PUBLIC)}; rename one."
            )


def _entry(cls: type[T], item: Any, where: str) -> T:
    """A dataclass from a TOML table; unknown and missing keys are refused."""
    if not isinstance(item, Mapping):
        raise UsageError(f"{where}: {item!r} is no table.")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in item.items():
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}."
            raise UsageError(f"{where}: unknown key {key!r}; {hint}")
        values[key] = _value(key, value, str(known[key].type), where)
        choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
        if choices and value not in choices:
            raise UsageError(f"{where}: {key} is {value!r}; give {' or '.join(choices)}.")
    try:
        return cls(**values)
    except TypeError as cause:
        missing = str(cause).split("argument", 1)[-1].strip(" s:")
        raise UsageError(f"{where}: {missing} is missing.") from cause


_PLAIN: dict[str, type] = {"str": str, "int": int, "bool": bool}
_TABLES: dict[str, type] = {"training": Training, "curves": Curves}


def _value(key: str, value: Any, kind: str, where: str) -> Any:
    if key in _TABLES:
        return _entry(_TABLES[key], value, f"{where}, {key}")
    wanted = _PLAIN.get(kind)
    if wanted is not None and type(value) is not wanted:
        words = {"str": "text", "int": "a whole number", "bool": "true or false"}
        raise UsageError(f"{where}: {key} is {value!r}; give {words[kind]}.")
    if kind.startswith("tuple"):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise UsageError(f"{where}: {key} is {value!r}; give a list.")
        if kind.startswith("tuple[str") and not all(isinstance(item, str) for item in value):
            raise UsageError(f"{where}: {key} is {value!r}; give a list of texts.")
        return tuple(value)
    if kind.startswith("dict") and not isinstance(value, Mapping):
        raise UsageError(f"{where}: {key} is {value!r}; give a table.")
    return value
