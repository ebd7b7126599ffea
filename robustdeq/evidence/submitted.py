"""Records of what was not attacked here but scored again: submitted examples, whole bundle rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from robustdeq.evaluation.judge import Judgment
from robustdeq.evaluation.provenance import environment
from robustdeq.evidence.rescoring import Rebuilt
from robustdeq.keys import digest
from robustdeq.records import (
    CHECK_SCHEMA,
    FORMAT,
    Kind,
    Record,
    RecordMeta,
    Status,
    check_frame,
    sample_frame,
)
from robustdeq.shapes import Images

ATTACK = "submitted"
"""What stands as the attack in the stage of such a record, beside `by`."""
UNTRIED = "untried"
"""Status of a sample for which no example that breaks it was submitted."""
UNATTACKED = "unattacked"
"""The flag of a row that was scored again from a bundle, and not attacked here."""
_FLAG = re.compile(r"([a-z_]+)=([0-9.e+-]+)( |$)")


def label_of(by: str) -> str:
    """The label of a submission's records, as it stands in `broken_by`."""
    return f"{ATTACK}:{by}"


def attack_record(
    clean: Record, rebuilt: Rebuilt, x: Images, places: Sequence[int], by: str
) -> Record:
    """The record of examples that break samples of one chunk.

    Args:
        clean: the clean record of the chunk.
        x: the examples, each of which the row's judge has found to break its sample.
        places: where their samples stand in the row.
    """
    n, spots = len(clean.rows), {int(i): k for k, i in enumerate(clean.rows["index"])}
    rows = [spots[rebuilt.row.indices[place]] for place in places]
    right = clean.rows["clean_correct"].astype(bool)
    status = [UNTRIED if r else Status.MISCLASSIFIED for r in right]
    for row in rows:
        status[row] = Status.OK
    known = [c for c in clean.rows.columns if c in ("index", "label") or c.startswith("clean_")]
    columns: dict[str, Any] = {name: clean.rows[name].tolist() for name in known}
    columns |= {"status": status, "made_by": [""] * n}
    if rows:
        distance = rebuilt.threat.distance(rebuilt.clean(places), x).tolist()
        found = {"distance": distance, "adversarial": _pixels(x)}
        found |= _judged("adversarial", rebuilt.judged(x, places))
        columns |= {name: _scattered(values, rows, n) for name, values in found.items()}
    stage = {"attack": ATTACK, "by": by}
    content = [list(places), [digest(pixels.hex()) for pixels in _pixels(x)]]
    meta = _meta(rebuilt, "attack", label_of(by), clean.meta.chunk, stage, content, (clean,))
    return Record(meta, sample_frame(columns, n))


def clean_record(rebuilt: Rebuilt, number: int) -> Record:
    """The judge's word on the clean images of one chunk."""
    size = rebuilt.row.case["chunk"]
    places = range(len(rebuilt.row.indices))[number * size : (number + 1) * size]
    columns = {
        "index": [rebuilt.row.indices[place] for place in places],
        "label": rebuilt.y[list(places)].tolist(),
        "status": [Status.CLEAN] * len(places),
        **_judged("clean", rebuilt.judged(rebuilt.clean(places), places)),
    }
    meta = _meta(rebuilt, "clean", "clean", number, {}, [])
    return Record(meta, sample_frame(columns, len(places)))


def checks_record(rebuilt: Rebuilt) -> Record:
    """The flag that says what the row is, and those with a number that its bundle had."""
    claimed = [match for flag in rebuilt.row.flags if (match := _FLAG.match(flag))]
    values = {UNATTACKED: 1.0, **{match[1]: _number(match[2]) for match in claimed}}
    rows = [
        {"name": name, "value": value, "threshold": 0.0, "n": len(rebuilt.y), "status": "failed"}
        for name, value in values.items()
    ]
    full = [{name: row.get(name, "") for name in CHECK_SCHEMA.names} for row in rows]
    meta = _meta(rebuilt, "checks", "checks", 0, {}, list(values.items()))
    return Record(meta, check_frame(full))


def _meta(
    rebuilt: Rebuilt,
    kind: Kind,
    label: str,
    chunk: int,
    stage: dict[str, Any],
    content: list[Any],
    consumed: Sequence[Record] = (),
) -> RecordMeta:
    case_key = digest(rebuilt.row.case)
    made_with = environment(rebuilt.subject.device, torch.float32)
    digests = tuple(record.content_digest for record in consumed)
    return RecordMeta(
        key=digest([FORMAT, ATTACK, case_key, kind, stage, chunk, content, made_with, digests]),
        kind=kind,
        case=rebuilt.row.case,
        case_key=case_key,
        stage=stage,
        label=label,
        chunk=chunk,
        track="randomized" if rebuilt.row.randomized else "deterministic",
        environment=made_with,
        consumed=digests,
    )


def _judged(prefix: str, judgment: Judgment) -> dict[str, list[Any]]:
    """A judgment as columns of a record; what the model does not have is left out."""
    parts = judgment._asdict().items()
    return {f"{prefix}_{name}": part.tolist() for name, part in parts if part is not None}


def _pixels(x: Images) -> list[bytes]:
    return [image.numpy().astype("<f4").tobytes() for image in x.detach().float().cpu()]


def _scattered(values: Sequence[Any], rows: Sequence[int], n: int) -> list[Any]:
    out: list[Any] = [None] * n
    for row, value in zip(rows, values, strict=True):
        out[row] = value
    return out


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 1.0
