"""Files that show damage: JSON and Parquet that hold a SHA-256 over all of their own bytes.

A seal shows damage; it does not show who wrote a file. What was written before there were seals is
read as it stands.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from robustdeq.bounded import LARGEST_TABLE, BoundError, parse_json, read_bytes
from robustdeq.errors import DamagedError, UsageError
from robustdeq.files import write_atomically
from robustdeq.keys import canonical, digest

DIFFERS = "its checksum differs"
_SEAL = "sha256"
_MARK = b"robustdeq_sealed"
_BLANK = b"0" * 64
# As Thrift writes a text of 64 bytes under that name, in the metadata at the end of the file. No
# JSON can hold these control characters, so that nobody's text passes for a seal.
_DIGEST = re.compile(rb"robustdeq_sha256\x18\x40([0-9a-f]{64})")


@dataclass(frozen=True, kw_only=True)
class Form:
    """A kind of sealed JSON file.

    Attributes:
        newest: the format number that is written; every one from 1 on is read.
        sealed: the first format that has a seal.
        remedy: what to do where a file is damaged, as the end of a sentence.
    """

    newest: int
    sealed: int
    remedy: str

    def write(self, path: Path, data: Mapping[str, Any]) -> None:
        """Write data in the newest format, sealed."""
        write_atomically(path, _text({**canonical(data), "format": self.newest}))

    def read(self, path: Path) -> dict[str, Any]:
        """The data of a file, with the format that it was written in.

        Raises:
            DamagedError: if any byte is not as it was written.
            UsageError: if the file cannot be read, or is of a newer format.
        """
        payload = contents(path)
        data = _parsed(payload, path, self.remedy)
        seal = data.pop(_SEAL, None)
        if seal is not None and payload != _text(data):
            raise DamagedError(path, DIFFERS, self.remedy)
        number = data.get("format")
        if not isinstance(number, int) or number < 1:
            raise DamagedError(path, "it names no format", self.remedy)
        if number > self.newest:
            raise newer(path, number, self.newest)
        if seal is None and number >= self.sealed:
            raise DamagedError(path, "its seal is gone", self.remedy)
        return data


def contents(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        FileNotFoundError: if there is none.
        UsageError: if it cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        return read_bytes(path, LARGEST_TABLE)
    except BoundError as cause:
        raise UsageError(f"{path} {cause}; repair that first.") from cause


def newer(path: Path, found: int, newest: int) -> UsageError:
    """The error for a file of a format that this version does not know yet."""
    return UsageError(
        f"{path} is of format {found}, newer than this version reads ({newest}); use a newer "
        "RobustDEQ, or another --out."
    )


def _text(data: Mapping[str, Any]) -> bytes:
    sealed = {**data, _SEAL: digest(data)}
    return (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode()


def _parsed(payload: bytes, path: Path, remedy: str) -> dict[str, Any]:
    try:
        data = parse_json(payload)
    except BoundError as cause:
        raise DamagedError(path, f"it {cause}", remedy) from cause
    if not isinstance(data, dict):
        raise DamagedError(path, "it is no JSON object", remedy)
    return data


def sealed_parquet(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file that holds the digest of all its other bytes."""
    metadata = {**(table.schema.metadata or {}), _MARK: b"1", b"robustdeq_sha256": _BLANK}
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(metadata),
        buffer,
        compression="zstd",
        write_page_checksum=True,
    )
    payload = buffer.getvalue()
    return _with_digest(payload, hashlib.sha256(payload).hexdigest().encode())


def parquet_seal(payload: bytes) -> bool | None:
    """Whether a Parquet file matches its seal; None where it was written without one."""
    held = _digests(payload)
    if not held:
        # The mark and the digest stand apart, so that one flipped byte cannot take both away.
        return False if _MARK in payload else None
    blank = _with_digest(payload, _BLANK)
    return hashlib.sha256(blank).hexdigest().encode() == held[-1][1]


def _digests(payload: bytes) -> list[re.Match[bytes]]:
    return list(_DIGEST.finditer(payload))


def _with_digest(payload: bytes, value: bytes) -> bytes:
    begin, end = _digests(payload)[-1].span(1)
    return payload[:begin] + value + payload[end:]
