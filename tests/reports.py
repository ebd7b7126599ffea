"""Runs made by hand: folders that look as `run_suite` leaves them, without a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from robustdeq.datasets import load_slice
from robustdeq.records import (
    Record,
    RecordMeta,
    Status,
    Store,
    check_frame,
    sample_frame,
    trace_frame,
)
from robustdeq.reporting.images import write_images
from robustdeq.reporting.run import RunReport, read_run, write_index
from robustdeq.verdict import Failure

LABELS = ("autoattack", "pgd", "pgd[phantom(5,0.5)]", "square")
GRADIENTS = ("honest", "honest", "phantom(5,0.5)", "honest")


@dataclass
class Row:
    """One row of a run to be made.

    Attributes:
        broken: per attack of `LABELS`, how many samples it is the first to break.
        failures: stages that gave no record.
        notes: what every attack notes.
        attacked: how many of `LABELS` have a record at all; None: nothing was computed.
    """

    id: str
    defense: str = "deq"
    threat: str = "Linf:3/16"
    broken: tuple[int, ...] = (3, 1, 1, 0)
    about: dict[str, str] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    attacked: int | None = len(LABELS)
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def made_run(folder: Path, rows: list[Row], n: int = 10, name: str = "made") -> RunReport:
    """Write a run of these rows on the first `n` digits, and read it."""
    data = load_slice("digits", "test", n)
    store = Store(folder / "records")
    written = [_row(row, number, store, data) for number, row in enumerate(rows)]
    write_images(folder, {"digits": data})
    suite = {"name": name, "description": "made by hand", "defenses": []}
    write_index(folder, {"robustdeq": "0", "suite": suite, "seed": 0, "rows": written})
    return read_run(folder)


def repeated(run: RunReport, count: int) -> RunReport:
    """The rows of a run again and again, under other IDs."""
    numbers = [k % len(run.verdicts) for k in range(count)]
    verdicts = [replace(run.verdicts[n], id=f"Row{k}_of_many") for k, n in enumerate(numbers)]
    data = {**run.data, "rows": [run.data["rows"][n] for n in numbers]}
    evidences = tuple(run.evidences[n] for n in numbers)
    return RunReport(run.folder, data, evidences, tuple(verdicts))


def _row(row: Row, number: int, store: Store, data: Any) -> dict[str, Any]:
    n = len(data)
    case = {
        "id": row.id, "defense": row.defense, "dataset": "digits", "threat": row.threat, "n": n,
        "weights_sha256": "0" * 64, "seed": 0, "chunk": n, "digest": data.digest,
        "parameters": {"width": 8, "tolerance": 1e-4},
    }  # fmt: skip
    records = [_clean(data), *_attacks(row, data), _checks(row), _traces(n)]
    if row.attacked is None:
        return {**_listed(case, row), "expected": {}}
    kept = [r for r in records if r.meta.kind != "attack" or r.meta.label in LABELS[: row.attacked]]
    keys = []
    for record in kept:
        key = f"{number}-{record.meta.label}".replace("[", "-").replace("]", "")
        notes = row.notes if record.meta.kind == "attack" else ()
        meta = RecordMeta(**{**asdict(record.meta), "key": key, "case": case, "notes": notes})
        store.folder.mkdir(parents=True, exist_ok=True)
        store.write(Record(meta, record.rows))
        keys.append(key)
    return {**_listed(case, row), "records": {"0": keys}}


def _listed(case: dict[str, Any], row: Row) -> dict[str, Any]:
    return {
        "case": case,
        "about": row.about,
        "plugin": "robustdeq 0",
        "chunks": 1,
        "expected": {"0": list(LABELS)},
        "records": {},
        "failures": [asdict(failure) for failure in row.failures],
    }


def _meta(kind: str, label: str, **more: Any) -> RecordMeta:
    return RecordMeta(
        key="", kind=kind, case={}, case_key="c", label=label, chunk=0,  # type: ignore[arg-type]
        track="deterministic", environment={"device": "cpu"}, **{"stage": {}, **more},
    )  # fmt: skip


def _samples(data: Any, **columns: Any) -> Any:
    n = len(data)
    labels = data.labels.tolist()
    held = {
        "index": data.indices.tolist(), "label": labels, "clean_prediction": labels,
        "clean_correct": [True] * n, "clean_residual": [1e-5] * n, "clean_steps": [9] * n,
        **columns,
    }  # fmt: skip
    return sample_frame(held, n)


def _clean(data: Any) -> Record:
    return Record(
        _meta("clean", "clean", forward_nfe=90), _samples(data, status=["clean"] * len(data))
    )


def _attacks(row: Row, data: Any) -> list[Record]:
    made, done = [], 0
    for label, gradient, count in zip(LABELS, GRADIENTS, row.broken, strict=True):
        made.append(_attack(label, gradient, range(done, done + count), done, data))
        done += count
    return made


def _attack(label: str, gradient: str, fallen: range, done: int, data: Any) -> Record:
    n = len(data)
    whole = label == "autoattack"
    status = [Status.BROKEN_BEFORE if k < done and not whole else Status.OK for k in range(n)]
    shifted = np.clip(data.images / 255.0 + 3 / 16, 0, 1).astype("<f4")
    stage = {
        "attack": label.partition("[")[0], "gradient": gradient, "needs": "gradients",
        "parameters": {"version": "standard"} if whole else {},
    }  # fmt: skip
    columns = {
        "status": status,
        "adversarial_prediction": [(int(y) + 1) % 10 if k in fallen else int(y)
                                   for k, y in enumerate(data.labels)],
        "adversarial_correct": [k not in fallen for k in range(n)],
        "adversarial_residual": [2e-5] * n,
        "distance": [3 / 16] * n,
        "made_by": ["apgd-ce" if whole else ""] * n,
        "adversarial": [shifted[k].tobytes() if k in fallen else None for k in range(n)],
    }  # fmt: skip
    cost = {"forward_nfe": 1000, "backward_nfe": 400, "seconds": 1.5, "peak_memory_mib": 99.0}
    return Record(_meta("attack", label, stage=stage, **cost), _samples(data, **columns))


def _checks(row: Row) -> Record:
    held = row.checks or [
        {"name": f"check_{k}", "value": 0.5, "threshold": 1.0, "n": 10, "status": "passed"}
        for k in range(12)
    ]
    return Record(_meta("checks", "checks"), check_frame(held))


def _traces(n: int) -> Record:
    held = [
        {"point": point, "solve": 0, "step": step, "low": 0.5 * 10.0**-step,
         "median": 10.0**-step, "high": 2 * 10.0**-step, "n": n}
        for point in ("clean", "adversarial") for step in range(1, 6)
    ]  # fmt: skip
    return Record(_meta("traces", "traces"), trace_frame(held))
