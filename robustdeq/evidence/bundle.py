"""Bundles: a run's claims with all that a stranger needs to check them. Knows no torch.

`<run>/bundle/` holds `manifest.json`, `examples/` (per row, the inputs that broke it) and
`weights/` (by digest, so that rows may share a file). Nothing but JSON and safetensors: reading a
bundle executes nothing of it. The manifest is sealed by its own digest, and seals the other files
by theirs. A seal shows damage; it does not show who wrote a bundle, so that no claim is believed
before it is scored again (`robustdeq.evidence.verify`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from robustdeq.bounded import BoundError, check_safetensors, parse_json, read_bytes
from robustdeq.errors import CaseError, UsageError
from robustdeq.keys import canonical_json, digest, file_sha256
from robustdeq.plain_names import is_file_name

FORMAT = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 256 * 2**20
LARGEST_WEIGHTS = 8 * 2**30
MOST_SAMPLES = 10**7
_HEADER = 2**16
"""Bytes that the names in a file of examples may take."""
_AGAIN = "get the bundle again, or have it written again with 'robustdeq run'."

Examples = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Inputs (m, channels, height, width) and the indices (m,) of their samples."""


@dataclass(frozen=True)
class File:
    """A file of a bundle: its name, without a folder, and the SHA-256 of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class BundleRow:
    """What a bundle claims of one row; a row whose status is not "ok" claims nothing.

    Attributes:
        case: the case in full, as the row's records have it: defense, parameters, data digest,
            threat, seed. Its digest seeds the judge's draws of a randomized model.
        data: the name of the data set in the suite, which is a path where it has no other.
        distribution: what provides the defense; "robustdeq" for those that are built in.
        randomized: whether the row was judged by several draws per sample.
        shape: channels, height and width of an image.
        indices: the samples' places in the split; the claims per sample are in this order.
        weights: None where the defense builds a finished model by itself.
        examples: an input per sample that is claimed broken.
    """

    case: dict[str, Any]
    status: str
    note: str = ""
    data: str = ""
    distribution: str = ""
    track: str = ""
    randomized: bool = False
    shape: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()
    clean_acc: float | None = None
    robust_acc: float | None = None
    clean_correct: tuple[bool, ...] = ()
    robust: tuple[bool, ...] = ()
    broken_by: tuple[str | None, ...] = ()
    flags: tuple[str, ...] = ()
    credit: str = ""
    weights: File | None = None
    examples: File | None = None

    @property
    def title(self) -> str:
        """The row's name, unique in a bundle."""
        return f"{self.case['id']} on {self.case['dataset']} under {self.case['threat']}"

    @property
    def broken(self) -> list[int]:
        """Places (in the row's order) of the samples that are claimed broken."""
        pairs = enumerate(zip(self.clean_correct, self.robust, strict=True))
        return [place for place, (clean, robust) in pairs if clean and not robust]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle as read; `about` says what made it: versions, environment, suite, seed."""

    folder: Path
    about: dict[str, Any]
    rows: tuple[BundleRow, ...]
    sha256: str

    def examples(self, row: BundleRow) -> Examples:
        """The inputs that are claimed to break a row.

        Raises:
            CaseError: if the file is missing, damaged, or not what the row says.
        """
        assert row.examples is not None
        path = self.folder / "examples" / row.examples.name
        pixels = math.prod(row.shape) * len(row.broken)
        payload = _held(path, row.examples.sha256, 4 * pixels + 8 * len(row.broken) + _HEADER)
        return read_examples(payload, str(path), row.shape)

    def weights(self, row: BundleRow, elsewhere: Path | None = None) -> Path | None:
        """The row's weights file, from the bundle or from the folder `elsewhere`.

        Raises:
            CaseError: if the file is missing or damaged.
        """
        if row.weights is None:
            return None
        path = self.folder / "weights" / row.weights.name
        if not path.exists() and elsewhere is not None:
            there = sorted(elsewhere.glob("*.safetensors"))
            path = next((p for p in there if file_sha256(p) == row.weights.sha256), path)
        _check_size(path, LARGEST_WEIGHTS)
        _check_sha256(path, file_sha256(path), row.weights.sha256)
        return path

    def find(self, name: str) -> BundleRow:
        """The row of that ID, or of that title where several rows share an ID.

        Raises:
            UsageError: if there is none, or more than one.
        """
        found = [r for r in self.rows if r.title == name]
        found = found or [r for r in self.rows if r.case["id"] == name]
        if len(found) == 1:
            return found[0]
        titles = "; ".join(row.title for row in found or self.rows)
        what = "is the ID of several rows" if found else "is no row"
        raise UsageError(f"{name!r} {what} of {self.folder}; write one of: {titles}.")


def read_bundle(folder: Path) -> Bundle:
    """The claims of a bundle, checked for their form and their seal.

    Raises:
        UsageError: if the folder holds no bundle, or one that is damaged, malformed or newer.
    """
    path = folder / MANIFEST
    if folder.is_file():
        raise UsageError(
            f"{folder} is a file, and a bundle is a folder; unpack an archive yourself, into an "
            "empty folder, and name the folder."
        )
    if not path.is_file():
        raise UsageError(f"{folder} holds no {MANIFEST}; name the folder 'bundle' of a run.")
    try:
        _check_size(path, LARGEST_MANIFEST)
        payload = read_bytes(path, LARGEST_MANIFEST)
        data = parse_json(payload)
    except CaseError as cause:
        raise UsageError(str(cause)) from None
    except BoundError as cause:
        raise UsageError(f"{path} {cause}; {_AGAIN}") from cause
    text = _text_of(data)
    _check_format(data, path)
    if payload != text.encode():
        raise UsageError(f"{path} does not match its seal: it is damaged; {_AGAIN}")
    return _parsed(data, path)


def read_examples(payload: bytes, name: str, shape: tuple[int, ...]) -> Examples:
    """Inputs and indices from the bytes of a safetensors file.

    Raises:
        CaseError: if it is none, or does not hold `x` (float32) and `index` (int64) for images of
            that shape, each sample once.
    """
    try:
        check_safetensors(payload)
        held = load(payload)
    except BoundError as cause:
        raise CaseError(f"{name} {cause}.") from cause
    # Bytes that are no safetensors make the reader fail in any way there is.
    except Exception as cause:
        raise CaseError(f"{name} is not safetensors ({type(cause).__name__}).") from cause
    x = _array(held, "x", np.dtype(np.float32), shape, name)
    index = _array(held, "index", np.dtype(np.int64), (), name)
    samples = len(set(index.tolist()))
    if not len(x) == len(index) == samples:
        raise CaseError(f"{name} holds {len(x)} inputs for {samples} samples; give each one.")
    return x, index


def _array(
    held: Mapping[str, Any], part: str, kind: Any, shape: tuple[int, ...], name: str
) -> NDArray[Any]:
    array = held.get(part)
    if array is None or array.dtype != kind or not array.ndim or array.shape[1:] != shape:
        sizes = ", ".join(["m", *map(str, shape)])
        raise CaseError(f"{name} holds no {part!r} of type {kind} and shape ({sizes}).")
    copy: NDArray[Any] = array.copy()  # the reader's own cannot be written to
    return copy


def sealed(data: Mapping[str, Any]) -> str:
    """The manifest's text: canonical, so that a changed byte is a changed digest."""
    return canonical_json({**data, "sha256": digest(data)}) + "\n"


def _text_of(data: Any) -> str:
    """What the file must hold, byte for byte."""
    return sealed({k: v for k, v in data.items() if k != "sha256"}) if _is(dict)(data) else ""


def _check_format(data: Any, path: Path) -> None:
    found = data.get("format") if isinstance(data, dict) else None
    if not _count(found):
        raise UsageError(f"{path} is no manifest of a bundle; {_AGAIN}")
    if found != FORMAT:
        raise UsageError(
            f"{path} is of format {found}, this version reads {FORMAT}; use the version of "
            "RobustDEQ that wrote it."
        )


def _parsed(data: dict[str, Any], path: Path) -> Bundle:
    _check_parts(
        data, {**_ABOUT, "format": _count, "rows": _is(list), "sha256": _sha256}, str(path)
    )
    rows = tuple(_row(row, f"{path}, row {number}") for number, row in enumerate(data["rows"]))
    if len({row.title for row in rows}) != len(rows):
        raise UsageError(f"{path} holds a row twice; {_AGAIN}")
    about = {key: data[key] for key in _ABOUT}
    return Bundle(folder=path.parent, about=about, rows=rows, sha256=data["sha256"])


def _row(data: Any, where: str) -> BundleRow:
    """A row whose every part has its type, and whose claims do not contradict one another."""
    _check_parts(data, _ROW, where)
    _check_parts(data["case"], _NAMED, f"{where}, case", closed=False)
    row = BundleRow(**{key: _frozen(value) for key, value in data.items()})
    if row.status != "ok":
        return row
    _check_parts(row.case, _CASE, f"{where}, case", closed=False)
    n, claims = row.case["n"], (row.indices, row.clean_correct, row.robust, row.broken_by)
    broken = set(row.broken) if all(len(part) == n for part in claims) else None
    named = {place for place, by in enumerate(row.broken_by) if by is not None}
    right = (
        broken == named
        and len(set(row.indices)) == n
        and all(c or not r for c, r in zip(row.clean_correct, row.robust, strict=True))
        and None not in (row.examples, row.clean_acc, row.robust_acc)
        and len(row.shape) == 3
        and (row.weights is None or row.weights.sha256 == row.case["weights_sha256"])
    )
    if not right:
        raise UsageError(f"{where} ({row.title}) contradicts itself in its claims; {_AGAIN}")
    return row


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return File(**value) if isinstance(value, dict) and set(value) == {"name", "sha256"} else value


def _check_parts(
    data: Any, parts: Mapping[str, Callable[[Any], bool]], where: str, closed: bool = True
) -> None:
    """Refuse what lacks a part, has one of another type, or (where closed) has any other.

    Raises:
        UsageError: naming the first of them.
    """
    if not isinstance(data, dict):
        raise UsageError(f"{where} is no object; {_AGAIN}")
    wrong = [name for name, good in parts.items() if name not in data or not good(data[name])]
    wrong += sorted(set(data) - set(parts)) if closed else []
    if wrong:
        raise UsageError(f"{where}: {_short(wrong[0])} is missing, unknown or malformed; {_AGAIN}")


def _short(text: str) -> str:
    return repr(text[:40])


def _text(value: Any) -> bool:
    return isinstance(value, str) and (value == "" or value.isprintable())


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _count(value: Any) -> bool:
    return _whole(value) and bool(value >= 0)


def _share(value: Any) -> bool:
    return value is None or (isinstance(value, float) and 0 <= value <= 1)


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _file(value: Any) -> bool:
    """A name that cannot lead out of its folder, and a digest."""
    if not isinstance(value, dict) or set(value) != {"name", "sha256"}:
        return False
    name = value["name"]
    good = isinstance(name, str) and re.fullmatch(
        r"[A-Za-z0-9][A-Za-z0-9-]{0,120}\.safetensors", name
    )
    return bool(good) and is_file_name(name) and _sha256(value["sha256"])


def _list(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(good, value))


def _or_none(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or good(value)


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


_ABOUT: dict[str, Callable[[Any], bool]] = {
    "robustdeq": _text,
    "environment": _is(dict),
    "core": _text,
    "suite": _text,
    "seed": _whole,
}
_NAMED = {"id": _text, "dataset": _text, "threat": _text}
_CASE: dict[str, Callable[[Any], bool]] = {
    "defense": _text,
    "parameters": _is(dict),
    "weights_sha256": _sha256,
    "split": lambda value: value in ("train", "test"),
    "digest": _sha256,
    "n": lambda value: _count(value) and 0 < value <= MOST_SAMPLES,
    "seed": _whole,
    "chunk": lambda value: _count(value) and value > 0,
}
_ROW: dict[str, Callable[[Any], bool]] = {
    "case": _is(dict),
    "status": _text,
    "note": _text,
    "data": _text,
    "distribution": _text,
    "track": _text,
    "randomized": _is(bool),
    "shape": _list(lambda value: _count(value) and 0 < value < 2**16),
    "indices": _list(_count),
    "clean_acc": _share,
    "robust_acc": _share,
    "clean_correct": _list(_is(bool)),
    "robust": _list(_is(bool)),
    "broken_by": _list(_or_none(_text)),
    "flags": _list(_text),
    "credit": _text,
    "weights": _or_none(_file),
    "examples": _or_none(_file),
}


def _check_size(path: Path, largest: int) -> None:
    """Refuse what is missing, no plain file, behind a link, or larger than it can honestly be."""
    if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
        raise CaseError(f"{path} is missing, or no plain file; {_AGAIN}")
    if path.stat().st_size > largest:
        raise CaseError(f"{path} is larger than the {largest} bytes that it may have; {_AGAIN}")


def _held(path: Path, sha256: str, largest: int) -> bytes:
    _check_size(path, largest)
    payload = read_bytes(path, largest)
    _check_sha256(path, hashlib.sha256(payload).hexdigest(), sha256)
    return payload


def _check_sha256(path: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise CaseError(
            f"{path} has sha256 {found[:12]}..., but the manifest says {wanted[:12]}...; {_AGAIN}"
        )
