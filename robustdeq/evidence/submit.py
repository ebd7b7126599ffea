"""Lowers a row of a finished run by the stronger examples that others send.

Nothing is believed: every example is scored by the row's own judge first, and only what breaks a
sample that survived all attacks becomes a record.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustdeq.bounded import BoundError, read_bytes
from robustdeq.errors import CaseError, RobustDEQError, UsageError, sentence
from robustdeq.evidence.bundle import BundleRow, Examples, read_examples
from robustdeq.evidence.confined import Limits, confined
from robustdeq.evidence.rescoring import (
    Rebuilt,
    Setting,
    Trial,
    check_trust,
    is_built_in,
    rebuild,
    trials,
)
from robustdeq.evidence.submissions import (
    Run,
    add,
    alone_in_run,
    check_name,
    open_run,
    publish,
    read_submissions,
    stale,
    title_of,
    write_submissions,
)
from robustdeq.evidence.submitted import attack_record
from robustdeq.evidence.verify import Finding
from robustdeq.keys import digest
from robustdeq.records import Record, Store
from robustdeq.shapes import Images


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What became of examples for one row.

    Attributes:
        fallen: indices of the samples that they broke and that had survived so far.
        refused: the examples that count for nothing, and why.
        before, after: the row's robust accuracy.
        repeated: the very same examples had been submitted before; nothing was changed.
    """

    title: str
    by: str
    fallen: tuple[int, ...]
    refused: tuple[Finding, ...] = ()
    before: float
    after: float
    repeated: bool = False


def submit_examples(
    folder: Path, row: str, file: Path, by: str, *, setting: Setting | None = None
) -> Submission:
    """Lower a row by examples that break samples which had survived all attacks.

    Args:
        folder: a run's folder, which holds `run.json`, `records/` and `bundle/`.
        row: the row's ID; its title ("ID on DATASET under THREAT") where several share the ID.
        file: safetensors with `x`, float32 (m, channels, height, width), and `index`, int64 (m,).
        by: who is to be credited.

    Raises:
        CaseError: if no example breaks a surviving sample, with the numbers; or the file, the
            weights or the data are not what they must be.
        UsageError: if the folder, the row, the name or the defense cannot be used.
    """
    check_name(by)
    with alone_in_run(folder) as run:
        told = run.bundle.find(row)
        _check_claim(told)
        examples = _read(file, told)
        submission = _repeated(run, told, examples, by)
        submission = submission or _submit(run, told, examples, by, setting or Setting())
    if not submission.fallen:
        raise CaseError(_refusal(file, submission))
    return submission


def submitted(
    folder: Path, row: str, file: Path, by: str, *, setting: Setting, limits: Limits
) -> Submission:
    """As `submit_examples`, in a process of its own where it runs code that is not built in."""
    told = open_run(folder).bundle.find(row)
    check_trust(told, setting)
    if is_built_in(told, setting):
        return submit_examples(folder, row, file, by, setting=setting)
    places = {"folder": str(folder.resolve()), "file": str(file.resolve())}
    job = {**places, "row": row, "by": by, "setting": setting}
    return confined("submit", job, Submission, limits)


def rescore_stale(folder: Path, *, setting: Setting | None = None) -> list[str]:
    """Score again what was submitted for rows that are another case by now; what became of it.

    For the end of a run: an edit of a defense's source must not undo what others found.
    """
    run, told = open_run(folder), []
    for entry in stale(folder, run.data):
        row = run.bundle.find(entry["title"])
        examples = _from_records(Store(folder / "records"), entry, row.shape)
        try:
            _check_claim(row)
            submission = _submit(run, row, examples, entry["by"], setting or Setting())
        except RobustDEQError as cause:
            told.append(f"examples by {entry['by']} are not counted: {sentence(cause)}")
            continue
        held = read_submissions(folder)
        held["examples"].remove(entry)
        write_submissions(folder, held)
        told.append(
            f"{row.title}: {len(submission.fallen)} of {len(examples[1])} examples by "
            f"{entry['by']} still break it"
        )
        run = open_run(folder)
    return told


def _read(file: Path, row: BundleRow) -> Examples:
    if not file.is_file():
        raise UsageError(f"{file} does not exist; name a safetensors file with x and index.")
    if file.suffix != ".safetensors":
        raise UsageError(
            f"{file} is not named *.safetensors; give x and index in such a file, never pickled, "
            "and unpack an archive yourself."
        )
    largest = 8 * (math.prod(row.shape) + 1) * row.case["n"] + 2**20
    try:
        payload = read_bytes(file, largest)
    except BoundError as cause:
        raise CaseError(
            f"{file} {cause}, as examples for {row.case['n']} samples; split it."
        ) from cause
    x, index = read_examples(payload, str(file), row.shape)
    strange = sorted(set(index.tolist()) - set(row.indices))
    if strange or not len(index):
        what = f"an example for sample {strange[0]}" if strange else "no examples"
        raise CaseError(f"{file} holds {what}; give examples for samples of {row.title}.")
    return x, index


def _digest_of(examples: Examples) -> str:
    x, index = examples
    return hashlib.sha256(index.tobytes() + x.tobytes()).hexdigest()


def _check_claim(row: BundleRow) -> None:
    if row.robust_acc is None:
        raise UsageError(f"{row.title} has no robust accuracy that examples could lower.")


def _repeated(run: Run, row: BundleRow, examples: Examples, by: str) -> Submission | None:
    """What the same examples did when the same person submitted them before."""
    _, verdict = run.find(row.case)
    for entry in read_submissions(run.folder)["examples"]:
        same = (entry["case_key"], entry["examples"], entry["by"])
        if same == (digest(row.case), _digest_of(examples), by):
            fallen, after = tuple(entry["fallen"]), float(verdict.robust_acc or 0.0)
            before = after + len(fallen) / verdict.n
            return Submission(
                title=row.title, by=by, fallen=fallen, before=before, after=after, repeated=True
            )
    return None


def _submit(run: Run, row: BundleRow, examples: Examples, by: str, setting: Setting) -> Submission:
    """Score examples; those that break surviving samples become records of the run."""
    own, verdict = run.find(row.case)
    rebuilt = rebuild(run.bundle, row, setting)
    places = [rebuilt.places[i] for i in examples[1].tolist()]
    x = torch.from_numpy(examples[0]).to(rebuilt.x)
    tried = trials(rebuilt, x, places, rebuilt.correct(rebuilt.clean(places), places))
    alive = set(verdict.samples.loc[verdict.samples["robust"], "index"])
    fallen = [k for k, t in enumerate(tried) if not t.why and row.indices[t.place] in alive]
    indices = tuple(row.indices[places[k]] for k in fallen)
    if fallen:
        records = _record(run, own, rebuilt, x[fallen], [places[k] for k in fallen], by)
        entry = {
            "title": row.title,
            "case_key": digest(row.case),
            "by": by,
            "examples": _digest_of(examples),
            "fallen": indices,
            "records": records,
        }
        add(run.folder, "examples", [entry])
        publish(run)
    before = float(verdict.robust_acc or 0.0)
    return Submission(
        title=row.title,
        by=by,
        fallen=indices,
        refused=tuple(_refused(row, tried, set(indices))),
        before=before,
        after=before - len(fallen) / verdict.n,
    )


def _record(
    run: Run, own: dict[str, Any], rebuilt: Rebuilt, x: Images, places: list[int], by: str
) -> dict[str, list[str]]:
    """Write the records of examples, one per chunk; their keys per chunk."""
    store, keys = Store(run.folder / "records"), {}
    size = rebuilt.row.case["chunk"]
    for number in sorted({place // size for place in places}):
        part = [k for k, place in enumerate(places) if place // size == number]
        clean = _clean_record(store, own, number)
        record = attack_record(clean, rebuilt, x[part], [places[k] for k in part], by)
        store.write(record)
        keys[str(number)] = [record.meta.key]
    return keys


def _clean_record(store: Store, own: dict[str, Any], number: int) -> Record:
    for key in own["records"].get(str(number), []):
        record = store.read(key)
        if record is not None and record.meta.kind == "clean":
            return record
    raise CaseError(f"{title_of(own['case'])} has lost a clean record; run the suite again.")


def _refused(row: BundleRow, tried: Sequence[Trial], fallen: set[int]) -> list[Finding]:
    return [
        Finding(row.title, row.indices[t.place], t.why or "its sample had fallen before")
        for t in tried
        if row.indices[t.place] not in fallen
    ]


def _refusal(file: Path, submission: Submission) -> str:
    counts = Counter(finding.why.partition(":")[0] for finding in submission.refused)
    numbers = "; ".join(f"{count}: {why}" for why, count in sorted(counts.items()))
    return (
        f"none of the {len(submission.refused)} examples of {file} breaks a sample of "
        f"{submission.title} that survives ({numbers}); nothing was changed."
    )


def _from_records(store: Store, entry: dict[str, Any], shape: tuple[int, ...]) -> Examples:
    """The examples of an earlier submission, from its records."""
    found: dict[int, NDArray[np.float32]] = {}
    for key in (key for keys in entry["records"].values() for key in keys):
        record = store.read(key)
        rows = record.rows.dropna(subset=["adversarial"]) if record is not None else None
        if rows is not None:
            images = [np.frombuffer(p, "<f4").reshape(shape) for p in rows["adversarial"]]
            found |= dict(zip((int(i) for i in rows["index"]), images, strict=True))
    x = np.stack(list(found.values())) if found else np.zeros((0, *shape), np.float32)
    return x.astype(np.float32), np.array(list(found), dtype=np.int64)
