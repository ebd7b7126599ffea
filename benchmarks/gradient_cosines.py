"""How near each gradient estimator is to the derivative, on real models, written into docs/.

    robustdeq run digits --battery adaptive --out out
    python benchmarks/gradient_cosines.py out/digits

Every run measures it on its equilibrium rows: the median cosine, over clean images, between the
estimator's gradient of the deployed logits' losses and central finite differences of the deployed
predictor. The page says where its table goes: <!-- cosines --> ... <!-- end -->.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pandas as pd

from robustdeq.differentiation import BIAS
from robustdeq.records import Store

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gradient_cosines.csv"
PAGE = ROOT / "docs" / "gradients.md"
PLACE = re.compile(r"(<!-- cosines -->\n).*?(<!-- end -->)", re.DOTALL)
PREFIX = "finite_differences_"
HEAD = (
    "| Gradient | Rows | Lowest | Median | Highest | Where it is biased |\n"
    "|---|---|---|---|---|---|\n"
)


def measured(folder: Path) -> pd.DataFrame:
    """A line per row and estimator, from the check records of a run; the honest gradient's too."""
    store = Store(folder / "records")
    lines = []
    for row in json.loads((folder / "run.json").read_text(encoding="utf-8"))["rows"]:
        records = [store.summary(key) for keys in row["records"].values() for key in keys]
        for record in records:
            if record is None or record.meta.kind != "checks":
                continue
            for check in record.rows.to_dict("records"):
                gradient, cosine = gradient_of(check), check["value"]
                if gradient and cosine == cosine:
                    lines.append({"id": row["case"]["id"], "gradient": gradient, "cosine": cosine})
    frame = pd.DataFrame(lines)
    iterating = frame.loc[frame["gradient"] != "honest", "id"]
    return frame[frame["id"].isin(iterating)]


def gradient_of(check: dict[Hashable, Any]) -> str:
    """The gradient that a check is about; empty for other checks."""
    name = str(check["name"])
    if name == "finite_differences":
        return "honest"
    return str(check["detail"]) if check["status"] == "info" and name.startswith(PREFIX) else ""


def table(frame: pd.DataFrame) -> str:
    """The Markdown table, the nearest gradient first."""
    groups = frame.groupby("gradient")["cosine"].agg(["size", "min", "median", "max"])
    lines = []
    for name, row in groups.sort_values("median", ascending=False, kind="stable").iterrows():
        bias = BIAS[str(name).partition("(")[0]] or "Nowhere."
        figures = [f"{row[column]:.3f}" for column in ("min", "median", "max")]
        lines.append(
            "| " + " | ".join([f"`{name}`", str(int(row["size"])), *figures, bias]) + " |\n"
        )
    return HEAD + "".join(lines)


def filled(page: str, frame: pd.DataFrame) -> str:
    """The page with its table."""
    return PLACE.sub(lambda match: match[1] + table(frame) + match[2], page)


def main() -> None:
    if len(sys.argv) > 1:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        frame = measured(Path(sys.argv[1]))
        frame.to_csv(RESULTS, index=False, float_format="%.6g")
    PAGE.write_text(
        filled(PAGE.read_text(encoding="utf-8"), pd.read_csv(RESULTS)), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
