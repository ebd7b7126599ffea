"""Records: what a run leaves behind, one Parquet file per stage of a chunk. Knows no torch.

Five kinds. `clean`: the deployed predictor on the clean inputs. `attack`: the same inputs after
one attack through one gradient. `checks`: measurements of the honesty checks. `curves`: sanity
curves. `traces`: the residual along the solver's steps. The first two hold a row per sample of
the chunk, the others a row per check, per point and per step; what holds for the whole file is
JSON in the Parquet metadata. Resume, tables and reports derive from these files alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from robustdeq.bounded import parquet_columns, read_parquet
from robustdeq.errors import DamagedError, UsageError
from robustdeq.files import write_atomically
from robustdeq.keys import canonical_json, digest
from robustdeq.sealed import DIFFERS, contents, newer, parquet_seal, sealed_parquet

FORMAT = 1
Kind = Literal["clean", "attack", "checks", "curves", "traces"]

SAMPLE_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("label", pa.int64()),
        ("clean_prediction", pa.int64()),  # -1: the logits are not finite
        ("clean_correct", pa.bool_()),
        ("clean_votes", pa.float64()),  # share of the judge's draws that are right
        ("clean_residual", pa.float64()),  # null: the model has no solve
        ("clean_steps", pa.int64()),
        ("status", pa.string()),  # see Status
        ("adversarial_prediction", pa.int64()),
        ("adversarial_correct", pa.bool_()),
        ("adversarial_votes", pa.float64()),
        ("adversarial_residual", pa.float64()),
        ("adversarial_steps", pa.int64()),
        ("adjoint_residual", pa.float64()),
        ("distance", pa.float64()),
        ("made_by", pa.string()),
        ("forward_nfe", pa.float64()),  # this sample's share of the stage
        ("backward_nfe", pa.float64()),
        ("seconds", pa.float64()),
        ("adversarial", pa.binary()),  # float32 pixels, only where the sample is broken
    ]
)
CHECK_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("n", pa.int64()),
        ("status", pa.string()),  # passed, failed, skipped, or info: measured, never a flag
        ("reference", pa.string()),  # what the value is compared with, where the threshold is from
        ("detail", pa.string()),  # what exactly was found, as an operation with file and line
    ]
)
CURVE_SCHEMA = pa.schema(
    [
        ("curve", pa.string()),  # epsilon, steps or unbounded
        ("at", pa.float64()),  # the radius, or the number of steps
        ("correct", pa.int64()),
        ("n", pa.int64()),
    ]
)
TRACE_SCHEMA = pa.schema(
    [
        ("point", pa.string()),  # clean or adversarial
        ("solve", pa.int64()),  # of the forward pass, from 0
        ("step", pa.int64()),  # evaluations of the cell, from 1
        ("low", pa.float64()),  # 10 % quantile of the relative residual over samples
        ("median", pa.float64()),
        ("high", pa.float64()),  # 90 % quantile
        ("n", pa.int64()),
    ]
)
_SCHEMAS = {"checks": CHECK_SCHEMA, "curves": CURVE_SCHEMA, "traces": TRACE_SCHEMA}
_TIMES = ["seconds"]


class Status:
    """The words of the column `status`."""

    OK = "ok"
    """Attacked; the candidate was admissible and was judged."""
    MISCLASSIFIED = "misclassified"
    """Wrong without an attack."""
    BROKEN_BEFORE = "broken_before"
    """Not attacked: an earlier attack had broken it."""
    CLEAN = "clean"
    """A row of a clean record."""
    UNTRIED = "untried"
    """Nobody has submitted an example for it."""
    # Violations of the threat stand under the names of `threats.Violation`.


@dataclass(frozen=True)
class RecordMeta:
    """What holds for a whole record.

    Attributes:
        key: content key of the stage; the file's name.
        kind: see the module's text.
        case: the case in full, as JSON data; `case_key` is its digest.
        stage: attack, its parameters, gradient and source digest; empty for other kinds.
        label: short name of the stage, as in "pgd[unrolled(30)]".
        chunk: number of the chunk, from 0.
        track: "deterministic" or "randomized", as measured on this chunk.
        notes: what the attack had to leave out.
        forward_nfe, backward_nfe, seconds, peak_memory_mib: cost of the stage in all.
        environment: device, dtype and versions it was computed with.
        consumed: content digests of the records that this one depends on.
    """

    key: str
    kind: Kind
    case: dict[str, Any]
    case_key: str
    stage: dict[str, Any]
    label: str
    chunk: int
    track: str
    notes: tuple[str, ...] = ()
    forward_nfe: int = 0
    backward_nfe: int = 0
    seconds: float = 0.0
    peak_memory_mib: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)
    consumed: tuple[str, ...] = ()
    format: int = FORMAT


@dataclass(frozen=True, eq=False)
class Record:
    """One record in memory."""

    meta: RecordMeta
    rows: pd.DataFrame

    @property
    def content_digest(self) -> str:
        """SHA-256 over everything but costs: equal for equal results, whenever computed."""
        sha = hashlib.sha256(self.meta.key.encode())
        for column in self.rows.columns.difference([*_TIMES, "forward_nfe", "backward_nfe"]):
            sha.update(column.encode())
            for value in self.rows[column]:
                sha.update(value if isinstance(value, bytes) else repr(_plain(value)).encode())
        return sha.hexdigest()


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value


def sample_frame(columns: Mapping[str, Any], n: int) -> pd.DataFrame:
    """A frame of `SAMPLE_SCHEMA` with `n` rows; columns that are not given are null."""
    full = {name: columns.get(name, [None] * n) for name in SAMPLE_SCHEMA.names}
    return _frame(full, SAMPLE_SCHEMA)


def check_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A frame of `CHECK_SCHEMA`."""
    columns = {n: [row.get(n, "") for row in rows] for n in CHECK_SCHEMA.names}
    return _frame(columns, CHECK_SCHEMA)


def curve_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A frame of `CURVE_SCHEMA`."""
    return _frame({n: [row[n] for row in rows] for n in CURVE_SCHEMA.names}, CURVE_SCHEMA)


def trace_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A frame of `TRACE_SCHEMA`."""
    return _frame({n: [row[n] for row in rows] for n in TRACE_SCHEMA.names}, TRACE_SCHEMA)


def _frame(columns: Mapping[str, Any], schema: pa.Schema) -> pd.DataFrame:
    arrays = [pa.array(_list(columns[f.name]), type=f.type, from_pandas=True) for f in schema]
    return _to_pandas(pa.Table.from_arrays(arrays, schema=schema))


def _list(values: Any) -> list[Any]:
    return list(values.tolist() if isinstance(values, np.ndarray) else values)


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    """Nullable types, so that a missing count is missing and not a float."""
    nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    frame: pd.DataFrame = table.to_pandas(types_mapper=nullable.get)
    return frame


def _matches_columns(held: Mapping[bytes, bytes], table: pa.Table) -> bool:
    """Whether a record from before there was a seal over all bytes matches its older one."""
    seal = json.loads(held[b"robustdeq_seal"])
    found = {"meta": digest(held[b"robustdeq"].decode())} | {
        name: hashlib.sha256(repr(table[name].to_pylist()).encode()).hexdigest()
        for name in table.schema.names
    }
    return all(seal.get(name) == value for name, value in found.items())


def broken(rows: pd.DataFrame) -> pd.Series:
    """Samples that an attack's record turned from right to wrong, by the judge's word."""
    return (
        (rows["status"] == Status.OK)
        & rows["clean_correct"].astype(bool)
        & ~rows["adversarial_correct"].fillna(True).astype(bool)
    )


class Store:
    """A folder of records, named by their keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the record of a key is."""
        return self.folder / f"{key}.parquet"

    def write(self, record: Record) -> None:
        """Store a record atomically.

        Raises:
            StorageError: if it cannot be written.
        """
        # Its parents are not made: where they are gone, a disk is, and not a folder.
        with suppress(OSError):
            self.folder.mkdir(exist_ok=True)
        schema = _SCHEMAS.get(record.meta.kind, SAMPLE_SCHEMA)
        table = pa.Table.from_pandas(record.rows, schema=schema, preserve_index=False)
        text = canonical_json(asdict(record.meta))
        table = table.replace_schema_metadata({b"robustdeq": text.encode()})
        write_atomically(self.path(record.meta.key), sealed_parquet(table))

    def summary(self, key: str) -> Record | None:
        """As `read`, without the adversarial pixels: enough for a verdict."""
        return self._read(key, pixels=False)

    def listed(self, key: str) -> Record:
        """As `summary`, of a record that a run has listed: that it is gone is an error.

        Raises:
            UsageError: if it is gone; see also `read`.
        """
        record = self.summary(key)
        if record is None:
            raise UsageError(f"record {self.path(key)}, which the run lists, is gone; {_AGAIN}")
        return record

    def read(self, key: str) -> Record | None:
        """The record of a key, or None where there is none.

        Raises:
            DamagedError: if any byte of it is not as it was written, or it is of another key.
            UsageError: if it cannot be read, or was written by a newer version of RobustDEQ.
        """
        return self._read(key, pixels=True)

    def _read(self, key: str, pixels: bool) -> Record | None:
        path = self.path(key)
        try:
            payload = contents(path)
        except FileNotFoundError:
            return None
        sound = parquet_seal(payload)
        try:
            # What does not match its seal is not even parsed.
            table = _table(payload, pixels) if sound is not False else pa.table({})
            held = table.schema.metadata or {}
            if not (sound or (sound is None and _matches_columns(held, table))):
                raise DamagedError(path, DIFFERS, _AGAIN)
            data = json.loads(held[b"robustdeq"])
        except _UNREADABLE as cause:
            raise DamagedError(path, "it cannot be read", _AGAIN) from cause
        if data.get("format", 0) > FORMAT:
            raise newer(path, data["format"], FORMAT)
        if data.get("format") != FORMAT or data.get("key") != key:
            raise DamagedError(path, "it is another record than its name says", _AGAIN)
        tuples = {name: tuple(data[name]) for name in ("notes", "consumed")}
        return Record(RecordMeta(**{**data, **tuples}), _to_pandas(table))


_AGAIN = "give the same 'robustdeq run' command again, which computes it anew."
_UNREADABLE = (OSError, pa.ArrowException, KeyError, ValueError, OverflowError, MemoryError)


def _table(payload: bytes, pixels: bool) -> pa.Table:
    names = [n for n in parquet_columns(payload) if pixels or n != "adversarial"]
    return read_parquet(payload, names)
