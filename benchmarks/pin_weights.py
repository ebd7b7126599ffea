"""Ship trained weights: copy a suite's files into the package and name their SHA-256 in it.

robustdeq train --suite digits --out weights
python benchmarks/pin_weights.py leaderboards/digits.toml weights
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from pathlib import Path

ZOO = Path(__file__).resolve().parent.parent / "robustdeq" / "zoo"
ENTRY = re.compile(r'weights = "(?P<name>[^"]+)"\nsha256 = "[0-9a-f]*"')


def main(suite: Path, folder: Path) -> None:
    def pinned(match: re.Match[str]) -> str:
        file = folder / match["name"]
        if not file.is_file():
            print(f"left as it is: {match['name']} is not in {folder}")
            return match[0]
        shutil.copyfile(file, ZOO / file.name)
        sha = hashlib.sha256(file.read_bytes()).hexdigest()
        return f'weights = "{match["name"]}"\nsha256 = "{sha}"'

    suite.write_text(ENTRY.sub(pinned, suite.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
