"""Writes the bundle of a run: its claims, the examples that they rest on, its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from robustdeq.errors import CaseError
from robustdeq.evidence.bundle import FORMAT, MANIFEST, BundleRow, File, sealed
from robustdeq.files import make_folder, write_atomically
from robustdeq.keys import digest, file_sha256
from robustdeq.records import Record, Store, broken
from robustdeq.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run's records do not hold, for `write_bundle`.

    Attributes:
        shapes: channels, height and width per data set, by the name that cases have.
        weights: the folders where the suite's weights are looked for, in order.
        distributions: what provides each defense.
    """

    shapes: Mapping[str, tuple[int, ...]]
    weights: Sequence[Path]
    distributions: Mapping[str, str]


def write_bundle(
    folder: Path, run: Mapping[str, Any], verdicts: Sequence[Verdict], parts: Parts
) -> Path:
    """Write `<folder>/bundle/`; equal records give equal bytes, and equal files are left alone.

    Args:
        folder: a run's folder, which holds `records/`.
        run: the content of its `run.json`.
        verdicts: one per row of `run`, in that order.

    Raises:
        CaseError: if weights or records that a row was computed from are not there any more.
    """
    target = folder / "bundle"
    for part in (target, target / "examples", target / "weights"):
        if part.is_symlink():  # a stranger's run may lead elsewhere, and files are deleted here
            raise CaseError(f"{part} is a link, not a folder of this run; remove the link.")
        make_folder(part)
    writer = _Writer(Store(folder / "records"), target, run, parts)
    rows = [writer.row(row, v) for row, v in zip(run["rows"], verdicts, strict=True)]
    about = {
        "robustdeq": run["robustdeq"],
        "environment": run["environment"],
        "core": run["core"],
        "suite": run["suite"]["name"],
        "seed": run["seed"],
    }
    text = sealed({"format": FORMAT, **about, "rows": [asdict(row) for row in rows]})
    _write(target / MANIFEST, text.encode())
    _prune(target, rows)
    return target


def write_examples(path: Path, x: NDArray[np.float32], index: NDArray[np.int64]) -> str:
    """Write inputs and indices as safetensors, unless the file holds them; returns its SHA-256."""
    payload = save({"x": np.ascontiguousarray(x), "index": np.ascontiguousarray(index)})
    _write(path, payload)
    return hashlib.sha256(payload).hexdigest()


def first_examples(
    records: Iterable[Record], first: Mapping[int, str | None], shape: tuple[int, ...]
) -> dict[int, NDArray[np.float32]]:
    """By index, the inputs that first broke their samples.

    Args:
        records: those of the attacks, with pixels.
        first: per sample, which attack was the first, as in a verdict's `broken_by`.
        shape: channels, height and width of an image.
    """
    found: dict[int, NDArray[np.float32]] = {}
    for record in records:
        fallen = record.rows[broken(record.rows)]
        parts = fallen["made_by"].fillna("")
        for index, part, pixels in zip(fallen["index"], parts, fallen["adversarial"], strict=True):
            label = f"{record.meta.label}/{part}" if part else record.meta.label
            if first.get(int(index)) == label:
                found.setdefault(int(index), np.frombuffer(pixels, "<f4").reshape(shape))
    return found


def data_name(run: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The name that a suite, or a submission, has for the data set of a row of `run.json`."""
    if "submission" in row:
        return str(row["submission"]["data"])
    name = row["case"]["dataset"]
    known = [d["name"] for d in run["suite"]["datasets"]]
    return str(next(d for d in known if name in (d, Path(d).stem)))


class _Writer:
    def __init__(self, store: Store, target: Path, run: Mapping[str, Any], parts: Parts) -> None:
        self.store, self.target, self.run, self.parts = store, target, run, parts

    def row(self, row: Mapping[str, Any], verdict: Verdict) -> BundleRow:
        case = dict(row["case"])
        if verdict.status != "ok" or verdict.robust_acc is None:
            return BundleRow(case=case, status=verdict.status, note=_printable(verdict.note))
        samples, added = verdict.samples, row.get("submission", {})
        told = BundleRow(
            case=case,
            status="ok",
            data=data_name(self.run, row),
            distribution=added.get("distribution")
            or self.parts.distributions.get(case["defense"], ""),
            track=verdict.track,
            randomized=any(r.meta.track == "randomized" for r in self._records(row, "clean")),
            shape=tuple(added.get("shape") or self.parts.shapes[case["dataset"]]),
            indices=tuple(int(i) for i in samples["index"]),
            clean_acc=verdict.clean_acc,
            robust_acc=verdict.robust_acc,
            clean_correct=tuple(bool(c) for c in samples["clean"]),
            robust=tuple(bool(r) for r in samples["robust"]),
            broken_by=tuple(None if b is None else str(b) for b in samples["broken_by"]),
            flags=tuple(_printable(flag) for flag in verdict.flags),
            credit=_printable(verdict.credit),
            weights=self._weights(row),
        )
        return replace(told, examples=self._examples(row, told))

    def _examples(self, row: Mapping[str, Any], told: BundleRow) -> File:
        """The examples that first broke each sample, from the records of the attacks."""
        first = dict(zip(told.indices, told.broken_by, strict=True))
        found = first_examples(self._records(row, "attack"), first, told.shape)
        wanted = [told.indices[place] for place in told.broken]
        if set(wanted) != set(found):
            raise CaseError(f"records of {told.title} are gone; run the suite again.")
        x = np.stack([found[i] for i in wanted]) if wanted else np.zeros((0, *told.shape), "<f4")
        name = f"{_slug(told.title)}.safetensors"
        path = self.target / "examples" / name
        return File(name, write_examples(path, x, np.array(wanted, dtype=np.int64)))

    def _records(self, row: Mapping[str, Any], kind: str) -> list[Record]:
        keys = [key for _, held in sorted(row["records"].items()) for key in held]
        read = self.store.read if kind == "attack" else self.store.summary
        return [r for r in map(read, keys) if r is not None and r.meta.kind == kind]

    def _weights(self, row: Mapping[str, Any]) -> File | None:
        """A copy of the weights under their digest's name, made once."""
        case, entry = row["case"], row.get("submission") or self._entry(row)
        if not entry["weights"]:
            return None
        sha256 = case["weights_sha256"]
        own = self.target / "weights" / f"{sha256}.safetensors"
        # Weights that came with a submission are kept in the run's own folder.
        folders = (self.target.parent / "weights", *self.parts.weights)
        for path in (own, *(folder / entry["weights"] for folder in folders)):
            if path.is_file() and file_sha256(path) == sha256:
                if path != own:
                    write_atomically(own, path.read_bytes())
                return File(own.name, sha256)
        raise CaseError(
            f"weights {entry['weights']} of {case['id']} are gone, or changed since it was "
            "evaluated; run the suite again."
        )

    def _entry(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        name, data = row["case"]["id"], data_name(self.run, row)
        entries: list[dict[str, Any]] = self.run["suite"]["defenses"]
        return next(e for e in entries if e["id"] == name and e["dataset"] in ("", data))


def _slug(text: str) -> str:
    """A file name that shows the text and is unique to it."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:80]
    return f"{plain}-{digest(text)[:10]}"


def _printable(text: str) -> str:
    """Text without control characters, which could forge a terminal's lines."""
    return "".join(c if c.isprintable() else " " for c in text)


def _write(path: Path, payload: bytes) -> None:
    if not path.is_file() or path.read_bytes() != payload:
        write_atomically(path, payload)


def _prune(target: Path, rows: Sequence[BundleRow]) -> None:
    """Remove the files of earlier manifests."""
    listed = {"examples": [r.examples for r in rows], "weights": [r.weights for r in rows]}
    for part, held in listed.items():
        names = {file.name for file in held if file is not None}
        for path in (target / part).glob("*.safetensors"):
            if path.name not in names:
                path.unlink()
