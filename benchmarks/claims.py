"""Whether a defense's claim holds against its base: paired intervals, written into docs/.

    robustdeq run digits-claims --out out && robustdeq run mnist-claims --out out
    python benchmarks/claims.py out/digits-claims out/mnist-claims

Rows of several seeds are paired seed by seed and sample by sample, then pooled: the interval takes
the pairs of all seeds as independent, which is kind to small differences; the seeds stand beside.
A page says where its table goes: <!-- claims: NAME --> ... <!-- end -->.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from robustdeq.comparison import compare
from robustdeq.reporting.run import read_run
from robustdeq.statistics import paired
from robustdeq.verdict import Verdict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "claims.csv"
PLACE = re.compile(r"(<!-- claims: (?P<page>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = (
    "| Data | Defended | Base | Seeds | n | Defended, robust | Base, robust | "
    "Difference, 95 % interval | p | Per seed |\n|---|---|---|---|---|---|---|---|---|---|\n"
)


class Claim(NamedTuple):
    """A row that claims to be more robust than another, by the beginnings of their IDs."""

    page: str
    dataset: str
    defended: str
    base: str


_YANG = "Yang2023Improving"
CLAIMS = (
    Claim("neural_dynamics", "digits", f"{_YANG}_plain_pgd_at_entropy", f"{_YANG}_plain_pgd_at"),
    Claim("neural_dynamics", "digits", f"{_YANG}_random_states_pgd_at", f"{_YANG}_plain_pgd_at"),
    Claim(
        "neural_dynamics", "digits", f"{_YANG}_random_states_pgd_at_entropy",
        f"{_YANG}_plain_pgd_at",
    ),
    Claim(
        "neural_dynamics", "digits", f"{_YANG}_plain_pgd_at_entropy",
        f"{_YANG}_plain_pgd_at_random_sign",
    ),
    Claim("neural_dynamics", "mnist", f"{_YANG}_entropy", _YANG),
    Claim("neural_dynamics", "mnist", _YANG, "Madry2018Towards_deq"),
    Claim(
        "lyadeq", "digits", "Chu2023Learning_module_pgd_at", "Chu2023Learning_neither_pgd_at"
    ),
    Claim("lyadeq", "mnist", "Chu2023Learning", "Madry2018Towards_deq"),
)  # fmt: skip


def line(claim: Claim, verdicts: list[Verdict]) -> dict[str, Any] | None:
    """One claim's figures, or None where a run lacks its rows."""
    pairs = list(seeds(claim, [v for v in verdicts if v.dataset == claim.dataset]))
    if not pairs:
        return None
    found = [compare(a, b) for a, b in pairs]
    a = np.concatenate([held(c.a, c.b) for c in found])
    b = np.concatenate([held(c.b, c.a) for c in found])
    pooled = paired(a, b)
    return {
        "page": claim.page, "dataset": claim.dataset, "threat": pairs[0][0].threat,
        "defended": claim.defended, "base": claim.base, "seeds": len(pairs), "n": pooled.n,
        "defended_acc": float(a.mean()), "base_acc": float(b.mean()),
        "difference": pooled.difference, "low": pooled.low, "high": pooled.high,
        "p_value": pooled.p_value,
        "per_seed": " ".join(f"{100 * c.paired.difference:+.1f}" for c in found),
    }  # fmt: skip


def seeds(claim: Claim, verdicts: list[Verdict]) -> list[tuple[Verdict, Verdict]]:
    """The claim's two rows for each seed that has both."""
    by_id = {v.id: v for v in verdicts if v.robust_acc is not None}
    out = []
    for tail in ("", "_seed1", "_seed2"):
        a = by_id.get(claim.defended + tail)
        b = by_id.get(claim.base + tail)
        if a is not None and b is not None:
            out.append((a, b))
    return out


def held(verdict: Verdict, other: Verdict) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which samples the row is robust on, in the order that both share."""
    index = sorted(set(verdict.samples["index"]) & set(other.samples["index"]))
    robust = verdict.samples.set_index("index")["robust"]
    return np.asarray(robust.loc[index], dtype=bool)


def table(frame: pd.DataFrame, page: str) -> str:
    """The Markdown table of one page's claims."""
    lines = []
    for row in frame[frame["page"] == page].to_dict("records"):
        interval = (
            f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        )
        cells = [
            f"{row['dataset']}, {row['threat']}", f"`{row['defended']}`", f"`{row['base']}`",
            str(row["seeds"]), str(row["n"]), f"{100 * row['defended_acc']:.1f}",
            f"{100 * row['base_acc']:.1f}", interval, f"{row['p_value']:.2g}", str(row["per_seed"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |\n")
    return HEAD + "".join(lines)


def filled(page: str, frame: pd.DataFrame) -> str:
    """A page with its tables of claims."""
    return PLACE.sub(lambda match: match[1] + table(frame, match["page"]) + match[3], page)


def main() -> None:
    verdicts = [v for folder in sys.argv[1:] for v in read_run(Path(folder)).verdicts]
    if verdicts:
        lines = [found for claim in CLAIMS if (found := line(claim, verdicts))]
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(lines).to_csv(RESULTS, index=False, float_format="%.6g")
    frame = pd.read_csv(RESULTS)
    for path in sorted((ROOT / "docs").glob("*.md")):
        path.write_text(filled(path.read_text(encoding="utf-8"), frame), encoding="utf-8")


if __name__ == "__main__":
    main()
