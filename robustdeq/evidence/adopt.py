"""Adds to a finished run's table the rows of a stranger's bundle, as scored here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from robustdeq.errors import CaseError, UsageError
from robustdeq.evaluation.subject import chunk_count
from robustdeq.evidence.bundle import Bundle, BundleRow, read_bundle
from robustdeq.evidence.confined import Adopted, Limits, confined
from robustdeq.evidence.rescoring import Setting, is_built_in
from robustdeq.evidence.submissions import (
    Run,
    add,
    alone_in_run,
    check_name,
    publish,
    title_of,
)
from robustdeq.evidence.submitted import attack_record, checks_record, clean_record, label_of
from robustdeq.evidence.verify import RowCheck, claims
from robustdeq.files import make_folder, write_atomically
from robustdeq.records import Record, Store


def submit_bundle(
    folder: Path, path: Path, by: str, *, rows: str | None = None, setting: Setting | None = None
) -> list[str]:
    """Add a bundle's rows to a run's table, as far as scoring them again can tell; their titles.

    They were not attacked here: the flag `unattacked` says so.

    Args:
        path: the bundle's folder.
        rows: a regular expression; only rows in whose title it is found.

    Raises:
        CaseError: if a claim of the bundle does not hold.
        UsageError: if a row is there already, or see `verify_bundle`.
    """
    check_name(by)
    with alone_in_run(folder) as run:
        return _submit(run, path, by, rows, setting or Setting())


def _submit(run: Run, path: Path, by: str, rows: str | None, setting: Setting) -> list[str]:
    bundle = read_bundle(path)
    chosen = [r for r in claims(bundle, rows, setting) if not _there(run, bundle, r, by)]
    if not chosen:
        return []
    checks = [RowCheck(bundle, row, setting) for row in chosen]
    failures = [finding for check in checks for finding in check.report.failures]
    if failures:
        raise CaseError(
            f"{path} does not hold, in {len(failures)} claims, the first: {failures[0]}; nothing "
            "was changed."
        )
    weights = [_kept_weights(run.folder, bundle, row, setting) for row in chosen]
    pairs = zip(checks, weights, strict=True)
    add(run.folder, "rows", [_new_row(run, bundle, check, by, name) for check, name in pairs])
    publish(run)
    return [row.title for row in chosen]


def adopted(
    folder: Path, path: Path, by: str, *, rows: str | None, setting: Setting, limits: Limits
) -> list[str]:
    """As `submit_bundle`, in a process of its own where it runs code that is not built in."""
    if all(is_built_in(row, setting) for row in claims(read_bundle(path), rows, setting)):
        return submit_bundle(folder, path, by, rows=rows, setting=setting)
    places = {"folder": str(folder.resolve()), "path": str(path.resolve())}
    job = {**places, "by": by, "rows": rows, "setting": setting}
    return list(confined("adopt", job, Adopted, limits).titles)


def _there(run: Run, bundle: Bundle, row: BundleRow, by: str) -> bool:
    """Whether this very row of this bundle was added before.

    Raises:
        UsageError: if another row of that title is there.
    """
    for own in run.data["rows"]:
        if title_of(own["case"]) != row.title:
            continue
        source = own.get("submission")
        if source is not None and (source["bundle"], source["by"]) == (bundle.sha256, by):
            return True
        raise UsageError(
            f"{row.title} is there already, {_origin(own, run.data)}; the bundle's is "
            f"{_described(bundle.about, row.case)}; give one of them another ID, or submit its "
            "examples to the row (--row)."
        )
    return False


def _origin(own: dict[str, Any], data: dict[str, Any]) -> str:
    source = own.get("submission")
    if source is None:
        return _described({**data, "suite": data["suite"]["name"]}, own["case"])
    return f"submitted by {source['by']}, {_described(source, own['case'])}"


def _described(about: dict[str, Any], case: dict[str, Any]) -> str:
    weights = str(case.get("weights_sha256", ""))[:12]
    return f"of suite {about['suite']} by RobustDEQ {about['robustdeq']} with weights {weights}"


def _new_row(run: Run, bundle: Bundle, check: RowCheck, by: str, weights: str) -> dict[str, Any]:
    """A row of `run.json` whose records are the bundle's claims as scored here."""
    row, store, keys = check.row, Store(run.folder / "records"), {}
    for number in range(chunk_count(len(row.indices), row.case["chunk"])):
        records = _records(check, number, by)
        for record in records:
            store.write(record)
        keys[str(number)] = [record.meta.key for record in records]
    return {
        "case": row.case,
        "chunks": len(keys),
        "expected": {number: [label_of(by)] for number in keys},
        "records": keys,
        "failures": [],
        "submission": {
            "by": by,
            "bundle": bundle.sha256,
            "suite": bundle.about["suite"],
            "robustdeq": bundle.about["robustdeq"],
            "data": row.data,
            "shape": row.shape,
            "distribution": row.distribution,
            "weights": weights,
        },
    }


def _records(check: RowCheck, number: int, by: str) -> list[Record]:
    """Of one chunk: clean, the flags (once), and the examples that hold."""
    size, rebuilt = check.row.case["chunk"], check.rebuilt
    places = [place for place in sorted(check.fallen) if place // size == number]
    x = torch.stack([check.fallen[place] for place in places]) if places else rebuilt.x[:0]
    clean = clean_record(rebuilt, number)
    flags = [checks_record(rebuilt)] if number == 0 else []
    return [clean, *flags, attack_record(clean, rebuilt, x, places, by)]


def _kept_weights(folder: Path, bundle: Bundle, row: BundleRow, setting: Setting) -> str:
    """The name of a copy of a bundle's weights in the run's own folder; empty without a file.

    It bears its digest, so that no bundle can put its file in the place of another's.
    """
    path = bundle.weights(row, setting.weights)
    if path is None or row.weights is None:
        return ""
    name = f"{row.weights.sha256}.safetensors"
    make_folder(folder / "weights")
    write_atomically(folder / "weights" / name, path.read_bytes())
    return name
