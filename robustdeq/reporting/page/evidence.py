"""What a row rests on: its attacks, its honesty checks, its cost and where all of it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from robustdeq.records import Record, Status, broken
from robustdeq.reporting.images import Images
from robustdeq.reporting.page.examples import Examples, examples_of
from robustdeq.reporting.page.sparkline import Sparkline, sparkline
from robustdeq.reporting.run import RunReport
from robustdeq.verdict import ENGINE_LEFT_OUT, Evidence, Verdict, joined, records_of

_ABOUT = ("title", "authors", "venue", "link", "claimed", "reproduced")


@dataclass(frozen=True)
class StageView:
    """One attack through one gradient.

    Attributes:
        engine: what ran AutoAttack, where that is not the reference library.
        attacked: samples that it was given and on which it answered by the rules.
        broke: those of them that the judge found broken.
        first: those that no attack before it had broken; `parts` names its components.
        refused: candidates that broke the rules of the threat or were not finite.
    """

    label: str
    engine: str
    gradient: str
    attacked: int
    broke: int
    first: int
    parts: tuple[tuple[str, int], ...]
    refused: int
    forward_nfe: int
    backward_nfe: int
    seconds: float


@dataclass(frozen=True, eq=False)
class EvidenceView:
    """All that opens with a row.

    Attributes:
        notes: what its stages note, each with the number of chunks.
    """

    stages: list[StageView]
    notes: list[tuple[str, int]]
    checks: list[dict[str, Any]]
    examples: Examples | None
    residuals: Sparkline | None
    about: dict[str, str]
    provenance: dict[str, str]


def evidence_view(run: RunReport, number: int, images: Images, most_bytes: int) -> EvidenceView:
    """The evidence of one row; its pictures take at most `most_bytes`."""
    evidence, verdict = run.evidences[number], run.verdicts[number]
    return EvidenceView(
        stages=stage_views(evidence, verdict),
        notes=_notes(evidence),
        checks=_checks(evidence),
        examples=examples_of(run, number, images, most_bytes),
        residuals=sparkline(joined(evidence, "traces"), _tolerance(evidence)),
        about={name: run.about(number).get(name, "") for name in _ABOUT},
        provenance=_provenance(run, number),
    )


def stage_views(evidence: Evidence, verdict: Verdict) -> list[StageView]:
    """The attacks in the order in which they ran."""
    held: dict[str, list[Record]] = {}
    for record in records_of(evidence, "attack"):
        held.setdefault(record.meta.label, []).append(record)
    return [_stage(label, records, verdict) for label, records in held.items()]


def _stage(label: str, records: Sequence[Record], verdict: Verdict) -> StageView:
    rows = pd.concat([record.rows for record in records], ignore_index=True)
    told = {name: n for name, n in verdict.broken_by.items() if name.partition("/")[0] == label}
    parts = tuple((name.partition("/")[2], n) for name, n in told.items() if "/" in name)
    counts = Counter(rows["status"])
    attacked = counts[Status.OK]
    idle = (Status.OK, Status.MISCLASSIFIED, Status.BROKEN_BEFORE, Status.UNTRIED)
    return StageView(
        label=label,
        engine=_engine(records),
        gradient=str(records[0].meta.stage.get("gradient", "honest")),
        attacked=attacked,
        broke=int(broken(rows).sum()),
        first=sum(told.values()),
        parts=parts,
        refused=sum(n for status, n in counts.items() if status not in idle),
        forward_nfe=sum(record.meta.forward_nfe for record in records),
        backward_nfe=sum(record.meta.backward_nfe for record in records),
        seconds=sum(record.meta.seconds for record in records),
    )


def _notes(evidence: Evidence) -> list[tuple[str, int]]:
    told = (f"{r.meta.label}: {note}" for r in evidence.records for note in r.meta.notes)
    return list(Counter(told).items())


def _engine(records: Sequence[Record]) -> str:
    """What ran AutoAttack, where that is not the reference library."""
    name = str(records[0].meta.stage.get("parameters", {}).get("engine", "reference"))
    fell_back = any(n.startswith(ENGINE_LEFT_OUT) for r in records for n in r.meta.notes)
    return "" if fell_back or name == "reference" else name


def _checks(evidence: Evidence) -> list[dict[str, Any]]:
    """The gate's measurements, failed ones first."""
    rows = joined(evidence, "checks")
    if not len(rows):
        return []
    order = {"failed": 0, "passed": 1, "info": 2, "skipped": 3}
    rows = rows.assign(place=rows["status"].map(order)).sort_values("place", kind="stable")
    return [
        {str(key): None if pd.isna(value) else value for key, value in row.items()}
        for row in rows.to_dict("records")
    ]


def _tolerance(evidence: Evidence) -> float | None:
    """The deployed solver's tolerance, where the parameters of the defense name it so."""
    held = evidence.case.get("parameters", {})
    value = held.get("tolerance") if isinstance(held, Mapping) else None
    return float(value) if isinstance(value, int | float) and 0 < value < 1 else None


def _provenance(run: RunReport, number: int) -> dict[str, str]:
    """Where the row's figures come from, in words and digests."""
    row, evidence = run.data["rows"][number], run.evidences[number]
    case = evidence.case
    told: dict[str, Any] = {
        "Provided by": row.get("plugin", ""),
        "Parameters": _pairs(case.get("parameters", {})),
        "Training": _training(run.entry(number), case),
        "Weights, SHA-256": case.get("weights_sha256", ""),
        "Source, SHA-256": case.get("source", ""),
        "Data": f"{case['dataset']}, {case.get('split', 'test')}, {case['n']} samples",
        "Data, SHA-256": case.get("digest", ""),
        "Seed, chunk": f"{case.get('seed', 'n/a')}, {case.get('chunk', 'n/a')}",
        "Computed with": "; ".join(_environments(evidence)),
    }
    return {name: str(text) for name, text in told.items() if text}


def _environments(evidence: Evidence) -> list[str]:
    return list(dict.fromkeys(_pairs(record.meta.environment) for record in evidence.records))


def _training(entry: Mapping[str, Any], case: Mapping[str, Any]) -> str:
    """What the suite says of how the row's weights were trained."""
    training = entry.get("training")
    if not training:
        return ""
    parameters = _pairs(training.get("parameters") or {})
    where = training.get("threat") or case["threat"]
    return f"{training.get('recipe')} under {where}; {parameters}".rstrip("; ")


def _pairs(values: Any) -> str:
    if not isinstance(values, Mapping):
        return str(values)
    return ", ".join(f"{key} = {value}" for key, value in values.items())
