"""`images.parquet` of a run: its first clean images, to show beside what broke them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from robustdeq.bounded import read_parquet
from robustdeq.datasets import Slice
from robustdeq.errors import DamagedError
from robustdeq.files import write_atomically
from robustdeq.sealed import DIFFERS, contents, parquet_seal, sealed_parquet

FILE = "images.parquet"
KEPT = 32
"""How many images of each data set a run keeps."""
_AGAIN = "give the same 'robustdeq run' command again, which writes it anew; or delete it."
_LARGEST = 256 * 2**20
"""Bytes of all images of a run."""
_SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("index", pa.int64()),
        ("shape", pa.list_(pa.int64())),
        ("pixels", pa.binary()),  # uint8, channels first
    ]
)

Images = dict[tuple[str, int], NDArray[np.uint8]]
"""By data set and index in its split: (channels, height, width)."""


def write_images(folder: Path, slices: Mapping[str, Slice]) -> None:
    """Write the images of some slices, by the names that cases have for their data sets."""
    rows = [
        {"dataset": name, "index": int(index), "shape": list(image.shape), "pixels": bytes(image)}
        for name, held in slices.items()
        for index, image in zip(held.indices, held.images, strict=True)
    ]
    write_atomically(folder / FILE, sealed_parquet(pa.Table.from_pylist(rows, schema=_SCHEMA)))


def read_images(folder: Path) -> Images:
    """The images of a run; none where the file is missing: they prove nothing.

    Raises:
        DamagedError: if any byte of it is not as it was written.
    """
    path = folder / FILE
    try:
        payload = contents(path)
    except FileNotFoundError:
        return {}
    if parquet_seal(payload) is False:
        raise DamagedError(path, DIFFERS, _AGAIN)
    try:
        rows = read_parquet(payload, _SCHEMA.names, largest=_LARGEST).to_pylist()
        return {
            (row["dataset"], row["index"]): np.frombuffer(row["pixels"], np.uint8).reshape(
                row["shape"]
            )
            for row in rows
            if len(row["shape"]) == 3
        }
    except (ValueError, TypeError, KeyError) as cause:
        raise DamagedError(path, "it cannot be read", _AGAIN) from cause
