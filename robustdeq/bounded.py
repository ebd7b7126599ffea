"""Reading what strangers wrote: TOML, JSON, Parquet and safetensors within limits. Knows no torch.

A few bytes can ask for all memory or all time: a footer that promises 10^12 rows, lists within
lists, a number of a million digits. Every limit is far above what an honest file needs. What is
outside of it is a `BoundError`, whose text is to stand behind the name of the file.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from robustdeq.texts import one_line

LARGEST_TOML = 2**20
"""Bytes of a suite; 115 rows take 53,000. tomllib's time grows with the square of some inputs."""
LARGEST_JSON = 256 * 2**20
"""Bytes of a manifest or a `run.json`; 200 rows on 10,000 samples take about 60 MB."""
MOST_CONTAINERS = 10**6
"""Lists and objects in JSON: an empty one takes 2 bytes to write and 64 to hold."""
DEEPEST = 64
"""Levels of nesting; ours have 8. Python's own recursion ends at about 1,000."""
MOST_ROWS = 10**7
"""Rows of a Parquet file; a constant column of any length takes a few bytes."""
MOST_COLUMNS = 1000
LARGEST_TABLE = 8 * 2**30
"""Bytes of a Parquet file's chosen columns, unpacked; 50,000 photographs take about 6 GB."""
MOST_PIXELS = 2**24
"""Pixels of one image: 4096 x 4096."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""What is decoded; of the others some start programs (EPS: Ghostscript)."""
LARGEST_HEADER = 16 * 2**20
"""Bytes of a safetensors header: names, shapes, offsets and metadata; ours have a few thousand."""
MOST_TENSORS = 10**5
LARGEST_METADATA = 2**20
"""Bytes of the metadata in a safetensors header."""

_BATCH = 256
"""Rows that are unpacked before their size is looked at."""
_BEGINS = {"[": 1, "{": 1}
_THRIFT = 64 * 2**20


class BoundError(ValueError):
    """What was read is beyond a limit or malformed; a clause to stand behind the file's name."""


def read_bytes(path: Path, largest: int = LARGEST_JSON) -> bytes:
    """A plain file's bytes; a device or a pipe, which may never end, is none.

    Raises:
        BoundError: if it is missing, no plain file, too large, or cannot be read.
    """
    try:
        if not path.is_file():
            raise BoundError("is missing, or no plain file")
        # Python sets aside what a read may return, so that it is not asked for the limit itself.
        size = path.stat().st_size
        with path.open("rb") as stream:
            payload = stream.read(min(size, largest) + 1)
    except (OSError, ValueError) as cause:
        if isinstance(cause, BoundError):
            raise
        raise BoundError(f"cannot be read ({_why(cause)})") from cause
    if len(payload) > largest:
        raise BoundError(f"is larger than the {largest} bytes that it may have")
    return payload


def read_json(path: Path, largest: int = LARGEST_JSON) -> Any:
    """The data of a JSON file; see `parse_json`.

    Raises:
        BoundError: see `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, largest))


def parse_json(payload: bytes | str) -> Any:
    """JSON as data: UTF-8, each key once, at most `DEEPEST` levels, whole numbers of 64 bits.

    NaN is refused, since nothing equals it. Infinity, as Python writes it, may be a parameter.

    Raises:
        BoundError: if it is none, or beyond a limit.
    """
    text = _text(payload)
    if sum(text.count(begin) for begin in _BEGINS) > MOST_CONTAINERS:
        raise BoundError(f"holds more than {MOST_CONTAINERS} lists and objects")
    parse = partial(json.loads, object_pairs_hook=_once, parse_constant=_constant)
    return _tree(parse, text, "is not JSON")


def parse_toml(payload: bytes | str) -> dict[str, Any]:
    """TOML as data: UTF-8, at most `LARGEST_TOML` bytes and `DEEPEST` levels, numbers of 64 bits.

    Raises:
        BoundError: if it is none, or beyond a limit.
    """
    if len(payload) > LARGEST_TOML:
        raise BoundError(f"is larger than the {LARGEST_TOML} bytes that it may have")
    data: dict[str, Any] = _tree(tomllib.loads, _text(payload), "is not valid TOML")
    return data


def check_tree(data: Any) -> None:
    """Refuse data that are too deep, or hold what cannot be written again.

    Raises:
        BoundError: naming the first such thing.
    """
    level, depth = [data], 0
    while level:
        if depth > DEEPEST:
            raise BoundError(f"is nested deeper than {DEEPEST} levels")
        level, depth = [part for item in level for part in _parts(item)], depth + 1


def read_parquet(
    source: Path | bytes,
    columns: Sequence[str] | None = None,
    *,
    rows: int | None = None,
    largest: int = LARGEST_TABLE,
) -> pa.Table:
    """Columns of a Parquet file, or its first rows.

    What the footer declares is checked before anything is unpacked, and what is unpacked is counted
    as it comes, since a footer may lie.

    Args:
        source: a file, or the bytes of one.
        columns: their names; all by default.
        rows: how many to read; all by default.
        largest: bytes that the columns may take in memory.

    Raises:
        BoundError: if it is none, is damaged, lacks a column, or is beyond a limit.
    """
    try:
        with _parquet(source) as file:
            _check_footer(file.metadata, columns, largest)
            schema = file.schema_arrow
            lacking = [name for name in columns or () if name not in schema.names]
            if lacking:
                raise BoundError(f"has no column {lacking[0]!r}")
            batches = list(_batches(file.iter_batches(_BATCH, columns=columns), rows, largest))
            held = schema if columns is None else pa.schema([schema.field(c) for c in columns])
            table = pa.Table.from_batches(batches) if batches else held.empty_table()
            table = table.replace_schema_metadata(schema.metadata)
            return table if rows is None else table.slice(0, rows)
    except BoundError:
        raise
    # Foreign bytes make the reader fail in any way there is.
    except Exception as cause:
        raise BoundError(f"cannot be read as Parquet ({_why(cause)})") from cause


def parquet_columns(source: Path | bytes) -> list[str]:
    """The names of a Parquet file's columns.

    Raises:
        BoundError: see `read_parquet`.
    """
    try:
        with _parquet(source) as file:
            _check_footer(file.metadata, [], LARGEST_TABLE)
            return [str(name) for name in file.schema_arrow.names]
    except BoundError:
        raise
    except Exception as cause:
        raise BoundError(f"cannot be read as Parquet ({_why(cause)})") from cause


def check_safetensors(source: Path | bytes) -> None:
    """Refuse a safetensors file whose header asks for more than its file can hold.

    Overlaps, gaps and unknown types are left to the library, which refuses them.

    Raises:
        BoundError: naming the first thing that is wrong.
    """
    try:
        size, text = _header(source)
    except (OSError, struct.error) as cause:
        raise BoundError(f"is not safetensors ({_why(cause)})") from cause
    held = parse_json(text)
    if not isinstance(held, dict):
        raise BoundError("is not safetensors (its header is no object)")
    _check_metadata(held.pop("__metadata__", {}))
    if len(held) > MOST_TENSORS:
        raise BoundError(f"holds more than {MOST_TENSORS} tensors")
    for name, entry in held.items():
        begin, end = _offsets(name, entry)
        if not 0 <= begin <= end <= size:
            raise BoundError(f"has a tensor {one_line(name, 40)!r} outside of the file")


def _header(source: Path | bytes) -> tuple[int, bytes]:
    """Bytes behind the header, and the header."""
    if isinstance(source, Path):
        with source.open("rb") as stream:
            head = stream.read(8 + LARGEST_HEADER)
        whole = source.stat().st_size
    else:
        head, whole = source, len(source)
    (length,) = struct.unpack("<Q", head[:8])
    if length > LARGEST_HEADER:
        raise BoundError(
            f"is not safetensors, or has a header of {length} bytes, of {LARGEST_HEADER} at most"
        )
    if 8 + length > whole:
        raise BoundError(
            f"is not safetensors, or cut: its header should have {length} bytes, all has {whole}"
        )
    return whole - 8 - length, head[8 : 8 + length]


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    held = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(held, list) or len(held) != 2 or any(type(k) is not int for k in held):
        raise BoundError(f"has a malformed tensor {one_line(name, 40)!r}")
    return held[0], held[1]


def _check_metadata(held: Any) -> None:
    if not isinstance(held, dict) or not all(isinstance(text, str) for text in held.values()):
        raise BoundError("has metadata that are no texts by name")
    if sum(len(name) + len(text) for name, text in held.items()) > LARGEST_METADATA:
        raise BoundError(f"has metadata of more than {LARGEST_METADATA} bytes")


def _tree(parse: Callable[[str], Any], text: str, otherwise: str) -> Any:
    try:
        data = parse(text)
    except BoundError:
        raise
    except RecursionError as cause:
        raise BoundError(f"is nested deeper than {DEEPEST} levels") from cause
    except ValueError as cause:
        raise BoundError(f"{otherwise} ({_why(cause)})") from cause
    check_tree(data)
    return data


def _text(payload: bytes | str) -> str:
    try:
        return payload if isinstance(payload, str) else payload.decode()
    except UnicodeDecodeError as cause:
        raise BoundError(f"is not UTF-8 ({_why(cause)})") from cause


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held: dict[str, Any] = {}
    for key, value in pairs:
        if key in held:
            raise BoundError(f"has the key {one_line(key, 40)!r} twice")
        held[key] = value
    return held


def _constant(name: str) -> float:
    return _no_nan() if name == "NaN" else float(name)


def _no_nan() -> NoReturn:
    raise BoundError("holds NaN, which is no number")


def _parts(item: Any) -> Iterable[Any]:
    """What is within a container; scalars are checked on the way."""
    if isinstance(item, dict):
        return [*item, *item.values()]
    if isinstance(item, list):
        return item
    if isinstance(item, str):
        _check_text(item)
    elif isinstance(item, float) and math.isnan(item):
        _no_nan()
    elif isinstance(item, int) and not -(2**63) <= item < 2**64:
        raise BoundError("holds a whole number of more than 64 bits")
    return ()


def _check_text(text: str) -> None:
    """Half of a surrogate pair can be read from JSON and never be written."""
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise BoundError("holds half of a surrogate pair, which is no text")


def _parquet(source: Path | bytes) -> pq.ParquetFile:
    if isinstance(source, Path) and not source.is_file():
        raise BoundError("is missing, or no plain file")
    place = pa.BufferReader(source) if isinstance(source, bytes) else source
    return pq.ParquetFile(
        place, thrift_string_size_limit=_THRIFT, thrift_container_size_limit=MOST_CONTAINERS
    )


def _check_footer(footer: Any, columns: Sequence[str] | None, largest: int) -> None:
    groups = range(footer.num_row_groups)
    if footer.num_rows > MOST_ROWS or len(groups) > MOST_ROWS:
        raise BoundError(f"declares {footer.num_rows} rows, of {MOST_ROWS} at most")
    if footer.num_columns > MOST_COLUMNS:
        raise BoundError(f"has {footer.num_columns} columns, of {MOST_COLUMNS} at most")
    declared = 0
    for group in map(footer.row_group, groups):
        for column in map(group.column, range(group.num_columns)):
            if columns is None or column.path_in_schema.partition(".")[0] in columns:
                declared += max(0, column.total_uncompressed_size)
    if declared > largest:
        raise BoundError(f"declares {declared} bytes when unpacked, of {largest} at most")


def _batches(
    batches: Iterable[pa.RecordBatch], rows: int | None, largest: int
) -> Iterator[pa.RecordBatch]:
    held = count = 0
    for batch in batches:
        held, count = held + batch.nbytes, count + len(batch)
        if held > largest:
            raise BoundError(f"unpacks to more than {largest} bytes")
        yield batch
        if rows is not None and count >= rows:
            return


def _why(cause: BaseException) -> str:
    return one_line(cause, 120) or type(cause).__name__
