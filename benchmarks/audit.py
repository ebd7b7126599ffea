"""Are any of the installed distributions known to be vulnerable? Asks pip-audit.

    python benchmarks/audit.py [--offline-ok]

Exit codes: 0 none is, 1 some are (each is named), 75 the service could not be asked, which says
nothing about them; with --offline-ok that is 0 too, and is printed all the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any, NamedTuple

UNREACHABLE = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""
COMMAND = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]


class Outcome(NamedTuple):
    """An exit code, and the lines to print."""

    code: int
    lines: list[str]


def main() -> None:
    """Audit this environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--offline-ok", action="store_true", help="exit 0 if it cannot be asked")
    parser.add_argument("--minutes", type=float, default=5.0)
    given = parser.parse_args()
    try:
        done = subprocess.run(
            COMMAND, capture_output=True, text=True, check=False, timeout=60 * given.minutes
        )
        outcome = read(done.stdout, done.stderr)
    except subprocess.TimeoutExpired:
        outcome = unreachable(f"no answer in {given.minutes:g} minutes")
    print("\n".join(outcome.lines))
    sys.exit(0 if given.offline_ok and outcome.code == UNREACHABLE else outcome.code)


def read(out: str, err: str) -> Outcome:
    """What pip-audit's output means: it has a report, or it could not make one."""
    try:
        held: list[dict[str, Any]] = json.loads(out)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (err.strip().splitlines() or ["no output"])[-1]
        if "No module named" in last:
            return Outcome(2, ["pip-audit is not installed; pip install pip-audit."])
        return unreachable(last)
    skipped = [entry for entry in held if "skip_reason" in entry]
    found = [(entry, bad) for entry in held for bad in entry.get("vulns", [])]
    if len(skipped) == len(held):
        return unreachable(f"it knows none of the {len(held)} distributions that are installed")
    names = ", ".join(entry["name"] for entry in skipped)
    lines = [f"not audited, since the service does not know them: {names}"] if skipped else []
    for entry, bad in found:
        fixed = ", ".join(bad.get("fix_versions", [])) or "no version yet"
        lines.append(f"vulnerable: {entry['name']} {entry['version']}: {bad['id']}, fixed: {fixed}")
    count = len(held) - len(skipped)
    lines.append(f"{count} distributions audited, {len(found)} known vulnerabilities")
    return Outcome(1 if found else 0, lines)


def unreachable(why: str) -> Outcome:
    """Nothing was audited."""
    return Outcome(UNREACHABLE, [f"could not reach the service, so nothing was audited: {why}"])


if __name__ == "__main__":
    main()
