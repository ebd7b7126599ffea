"""`SHA256SUMS` of a run's folder: what a run has written beside its records. Knows no torch.

In the form of coreutils, so that `sha256sum -c SHA256SUMS` checks it too. Records are not listed:
each has a seal of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from robustdeq.files import write_atomically
from robustdeq.keys import file_sha256
from robustdeq.sealed import contents

FILE = "SHA256SUMS"
TABLES = ("run.json", "table.csv", "table.md", "curves.csv", "images.parquet", "bundle")
"""What a run writes anew while it goes on."""
PAGE = ("index.html", "figures")
ADDED = ("submissions.json", "weights")
"""What a submission leaves, which no run can make again."""
RECHECK = ("recheck.csv", "recheck.md")
_ALL = (*TABLES, *PAGE, *ADDED, *RECHECK)
_ANEW = "it is written anew"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\\\n]+)")


def write_sums(folder: Path, parts: Sequence[str]) -> None:
    """List these files and folders as they are now; the others stay listed as they were."""
    kept = {name: sha for name, sha in _listed(folder).items() if _part(name) not in parts}
    names = [name for part in parts for name in _names(folder, part)]
    # Lines that were lost with a damaged list, of files that no run writes.
    names += [n for part in (*ADDED, *RECHECK) for n in _names(folder, part) if n not in kept]
    _write(folder, kept | {name: file_sha256(folder / name) for name in names})


def begin(folder: Path) -> list[str]:
    """What is not as it was left, in words; what a run writes is then listed no more.

    For the beginning of a run: until its end nobody is told that its files are whole.
    """
    listed = _listed(folder)
    told = [_told(folder, name, sha) for name, sha in listed.items()]
    if len(_lines(folder)) != len(listed):
        told.append(f"{folder / FILE} is damaged (not all of its lines can be read); {_ANEW}")
    _write(folder, {n: sha for n, sha in listed.items() if _part(n) not in (*TABLES, *PAGE)})
    return [words for words in told if words]


def _told(folder: Path, name: str, sha256: str) -> str:
    path = folder / name
    state = "is gone" if not path.is_file() else "is damaged (its checksum differs)"
    if state != "is gone" and file_sha256(path) == sha256:
        return ""
    then = _ANEW
    if _part(name) in RECHECK:
        then = "run with --recheck again"
    elif _part(name) in ADDED:
        then = "no run can make it again: restore it from a copy"
    return f"{path} {state}; {then}"


def _listed(folder: Path) -> dict[str, str]:
    """SHA-256 by name, of the lines that can be read and name what is listed here."""
    found = [match for line in _lines(folder) if (match := _LINE.fullmatch(line))]
    return {m[2]: m[1] for m in found if _part(m[2]) in _ALL and ".." not in m[2].split("/")}


def _lines(folder: Path) -> list[str]:
    try:
        return contents(folder / FILE).decode(errors="replace").removesuffix("\n").split("\n")
    except FileNotFoundError:
        return []


def _write(folder: Path, sums: Mapping[str, str]) -> None:
    if sums:
        lines = [f"{sha}  {name}\n" for name, sha in sorted(sums.items())]
        write_atomically(folder / FILE, "".join(lines).encode())
    else:
        (folder / FILE).unlink(missing_ok=True)


def _part(name: str) -> str:
    return name.partition("/")[0]


def _names(folder: Path, part: str) -> list[str]:
    path = folder / part
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else ()
    found = [p for p in files if p.is_file() and not p.name.startswith(".")]
    return sorted(p.relative_to(folder).as_posix() for p in found)
