"""Write THIRD_PARTY_LICENSES.md: what RobustDEQ depends on, and under which licenses.

    python benchmarks/licenses.py

From `pyproject.toml` and the metadata of what is installed; of an extra that is not installed here
the license stays that in the file. Fails where a license is known from neither.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "THIRD_PARTY_LICENSES.md"
HEAD = """# Third-party licenses

RobustDEQ is under Apache-2.0. It needs the distributions below, which pip installs; none of them is
copied here. Written by `python benchmarks/licenses.py` from their own metadata.

| distribution | versions | for | license |
|---|---|---|---|
"""
TAIL = """
Copied into this repository: DataTables 3.1.5 (`robustdeq/reporting/page/vendor`), MIT, with its
license beside it.
"""
_ROW = re.compile(r"^\| `([^`]+)` \|.*\| ([^|]+) \|$", re.MULTILINE)
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(.*)")


class Dependency(NamedTuple):
    """A distribution, the versions that will do, and the extra that wants it (empty: always)."""

    name: str
    versions: str
    extra: str


def main() -> None:
    """Write the file."""
    FILE.write_text(text(dependencies(), known(FILE.read_text() if FILE.exists() else "")))


def dependencies() -> list[Dependency]:
    """All that `pyproject.toml` names, but RobustDEQ itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    found = [_dependency(line, extra) for extra, lines in groups.items() for line in lines]
    return [one for one in found if one.name != project["name"]]


def known(held: str) -> dict[str, str]:
    """Licenses by distribution, as a written file has them."""
    return dict(_ROW.findall(held))


def text(wanted: list[Dependency], held: dict[str, str]) -> str:
    """The file."""
    rows = [
        f"| `{one.name}` | {one.versions or 'any'} | {one.extra or 'all'} | "
        f"{license_of(one.name) or held.get(one.name) or _missing(one.name)} |\n"
        for one in wanted
    ]
    return HEAD + "".join(rows) + TAIL


def license_of(name: str) -> str:
    """A license from a distribution's metadata; empty where it is not installed or has none."""
    try:
        told = metadata.metadata(name).json
    except metadata.PackageNotFoundError:
        return ""
    if told.get("license_expression"):
        return str(told["license_expression"])
    classified = [
        line.rpartition(" :: ")[2]
        for line in told.get("classifier", [])
        if line.startswith("License :: ") and line.count(" :: ") > 1
    ]
    short = str(told.get("license") or "").strip()
    plain = short if "\n" not in short and len(short) < 60 else ""
    return ", ".join(classified) or plain or _title(name)


def _title(name: str) -> str:
    """The first line of a distribution's license file, where that is short enough for a name."""
    files = [f for f in metadata.files(name) or [] if f.name.upper().startswith("LICEN")]
    lines = [line.strip() for f in files for line in f.read_text().splitlines() if line.strip()]
    return lines[0] if lines and len(lines[0]) < 60 and "|" not in lines[0] else ""


def _dependency(line: str, extra: str) -> Dependency:
    match = _REQUIREMENT.fullmatch(line.strip())
    assert match is not None, line
    return Dependency(match[1].lower(), match[2], extra)


def _missing(name: str) -> str:
    sys.exit(f"the license of {name} is not known; install it, or write it into {FILE.name}.")


if __name__ == "__main__":
    main()
