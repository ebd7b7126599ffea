"""Image data sets in memory: uint8 images, integer labels, a digest of both. Knows no torch.

Digits come with scikit-learn. The others are Parquet files in the layout of the Hugging Face Hub,
looked for in the folder that ROBUSTDEQ_DATA names and then downloaded from the Hub. A path to a
Parquet file, or to a folder that holds some, is a data set too.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

from robustdeq.bounded import (
    IMAGE_FORMATS,
    LARGEST_TABLE,
    MOST_PIXELS,
    BoundError,
    parquet_columns,
    read_parquet,
)
from robustdeq.errors import RobustDEQError, UsageError, sentence, unknown
from robustdeq.plain_names import LONGEST_PATH, check_label

Split = Literal["train", "test"]
DATA_VARIABLE = "ROBUSTDEQ_DATA"


@dataclass(frozen=True)
class DataSpec:
    """What a model must know of its data: name, number of classes, and the shape of an image."""

    name: str
    classes: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class _Source:
    """A known data set: its shape, and where the Hub keeps it (none: local files only)."""

    spec: DataSpec
    repository: str | None
    folder: str = ""
    label: str = "label"


_SOURCES = {
    source.spec.name: source
    for source in (
        _Source(DataSpec("mnist", 10, 1, 28, 28), "ylecun/mnist", "mnist"),
        _Source(
            DataSpec("fashion_mnist", 10, 1, 28, 28),
            "zalando-datasets/fashion_mnist",
            "fashion_mnist",
        ),
        _Source(DataSpec("cifar10", 10, 3, 32, 32), "uoft-cs/cifar10", "plain_text"),
        # Re-encoded as JPEG: never to be compared with figures on CIFAR-10 itself.
        _Source(DataSpec("cifar10-jpeg", 10, 3, 32, 32), None),
        _Source(DataSpec("cifar100", 100, 3, 32, 32), "uoft-cs/cifar100", "cifar100", "fine_label"),
        _Source(DataSpec("svhn", 10, 3, 32, 32), "ufldl-stanford/svhn", "cropped_digits"),
    )
}
DIGITS = DataSpec("digits", 10, 1, 8, 8)
DIGITS_TRAIN = 1297


@dataclass(frozen=True)
class SliceIdentity:
    """What names a slice without holding it: goes into keys, and to workers."""

    spec: DataSpec
    split: Split
    n: int
    digest: str


@dataclass(frozen=True, eq=False)
class Slice:
    """Some samples of one split, in the data set's own order.

    Attributes:
        images: uint8, (n, channels, height, width).
        labels: int64, (n,).
        indices: int64, (n,): the samples' positions in the split.
    """

    spec: DataSpec
    split: Split
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over name, split, indices, labels and pixels."""
        sha = hashlib.sha256(f"{self.spec}|{self.split}|{self.images.shape}".encode())
        for part in (self.indices, self.labels, self.images):
            sha.update(np.ascontiguousarray(part).tobytes())
        return sha.hexdigest()

    def identity(self) -> SliceIdentity:
        """The slice's name, size and digest."""
        return SliceIdentity(self.spec, self.split, len(self), self.digest)

    def take(self, rows: slice | NDArray[np.int64]) -> Slice:
        """The same slice, some rows of it."""
        return replace(
            self, images=self.images[rows], labels=self.labels[rows], indices=self.indices[rows]
        )


def dataset_names() -> list[str]:
    """The names that `load_slice` knows."""
    return ["digits", *_SOURCES]


def spec_of(name: str) -> DataSpec:
    """The description of a data set; only one given by path has to be read for it.

    Raises:
        UsageError: for an unknown name, or a path that cannot be read.
    """
    check_dataset(name)
    if name == "digits":
        return DIGITS
    return _SOURCES[name].spec if name in _SOURCES else load_slice(name, "test", 1).spec


def check_dataset(name: str) -> None:
    """Refuse a name that is neither known nor an existing path.

    Raises:
        UsageError: with the nearest known name.
    """
    check_label(name, "the name of a data set", LONGEST_PATH)
    if name not in dataset_names() and not _is_path(name):
        raise unknown("data set", name, dataset_names())


def load_slice(name: str, split: Split = "test", samples: int | None = None) -> Slice:
    """The first `samples` samples of a split (all of them by default).

    Raises:
        UsageError: for an unknown name, a file that is missing or cannot be read, or more samples
            than there are.
    """
    check_dataset(name)
    if samples is not None and samples < 1:
        raise UsageError(f"{samples} samples of {name} were asked for; ask for at least 1.")
    whole = _digits(split) if name == "digits" else _from_parquet(name, split, samples)
    if samples is not None and samples > len(whole):
        raise UsageError(
            f"{samples} samples of {name} were asked for, but its {split} split holds "
            f"{len(whole)}; ask for at most that."
        )
    return whole if samples is None else whole.take(slice(samples))


def where_to_get(name: str) -> str:
    """One sentence for the user whose data set is missing."""
    source = _SOURCES.get(name)
    local = (
        f"put {name}/test.parquet and {name}/train.parquet into the folder {DATA_VARIABLE} names"
    )
    if source is None or source.repository is None:
        return local
    return f"{local}, or download it from the Hugging Face Hub ({source.repository})"


def _is_path(name: str) -> bool:
    return os.sep in name or name.endswith(".parquet") or name.startswith(".")


def _digits(split: Split) -> Slice:
    """UCI optical digits, 0..16 scaled to 0..255, in a fixed shuffled order.

    The file is ordered by writer; shuffled, both splits hold all writers.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    rows = order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]
    pixels = np.rint(bunch.images[rows] * (255.0 / 16.0)).astype(np.uint8)
    labels = bunch.target[rows].astype(np.int64)
    return Slice(DIGITS, split, pixels[:, None], labels, np.arange(len(rows), dtype=np.int64))


def _from_parquet(name: str, split: Split, samples: int | None) -> Slice:
    files = _parquet_files(name, split)
    source = _SOURCES.get(name)
    images, labels = _read(files, samples, source.label if source else None)
    if source is not None:
        spec = source.spec
        if images.shape[1:] != (spec.channels, spec.height, spec.width):
            raise UsageError(
                f"{files[0]} holds images of shape {images.shape[1:]}, but {name} has "
                f"{(spec.channels, spec.height, spec.width)}; replace the file."
            )
    else:
        spec = _described(name, files, images)
    if len(labels) and not 0 <= labels.min() <= labels.max() < spec.classes:
        raise UsageError(
            f"{files[0]} holds labels from {labels.min()} to {labels.max()}, but {name} has "
            f"{spec.classes} classes; replace the file."
        )
    return Slice(spec, split, images, labels, np.arange(len(labels), dtype=np.int64))


def _described(name: str, files: Sequence[Path], images: NDArray[np.uint8]) -> DataSpec:
    """The description of a data set given by path: classes are counted over the whole split."""
    column = _label_column(files, None)
    labels = np.concatenate([_labels(_table(f, [column]), column, f) for f in files])
    _, channels, height, width = images.shape
    return DataSpec(Path(name).stem, int(labels.max()) + 1, channels, height, width)


def _parquet_files(name: str, split: Split) -> list[Path]:
    if _is_path(name):
        return _in_path(Path(name), split)
    folder = os.environ.get(DATA_VARIABLE)
    if folder:
        files = sorted(Path(folder, name).glob(f"**/{split}*.parquet"))
        if files:
            return files
    return _downloaded(name, split, folder)


def _in_path(path: Path, split: Split) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.glob(f"**/{split}*.parquet"))
    if not files:
        raise UsageError(
            f"no {split}*.parquet is in {path}; name a Parquet file, or a folder that holds one."
        )
    return files


def _downloaded(name: str, split: Split, folder: str | None) -> list[Path]:
    """The file from the Hub's cache, fetched once; the Hub's client checks what it fetched."""
    source = _SOURCES[name]
    looked = f"{folder}/{name}" if folder else f"no folder ({DATA_VARIABLE} is not set)"
    missing = UsageError(
        f"data set {name} ({split}) was not found: looked in {looked}"
        + (" and on the Hugging Face Hub" if source.repository else "")
        + f"; {where_to_get(name)}."
    )
    if source.repository is None:
        raise missing
    from huggingface_hub import hf_hub_download

    try:
        return [
            Path(
                hf_hub_download(
                    source.repository,
                    f"{source.folder}/{split}-00000-of-00001.parquet",
                    repo_type="dataset",
                )
            )
        ]
    except RobustDEQError:
        raise
    except Exception as cause:  # the client raises many types for "not reachable"
        raise missing from cause


def _label_column(files: Sequence[Path], wanted: str | None) -> str:
    columns = _columns(files[0])
    for column in (wanted, "label", "fine_label", "labels"):
        if column in columns:
            return str(column)
    raise UsageError(f"{files[0]} has no label column, only {columns}; name one of them 'label'.")


def _read(
    files: Sequence[Path], samples: int | None, wanted: str | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    label, columns = _label_column(files, wanted), _columns(files[0])
    image = next((c for c in ("image", "img") if c in columns), None)
    if image is None:
        raise UsageError(f"{files[0]} has no column 'image' or 'img', only {columns}.")
    pixels: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int64]] = []
    for file in files:
        left = None if samples is None else samples - len(pixels)
        if left == 0:
            break
        table = _table(file, [image, label], left)
        labels.append(_labels(table, label, file))
        pixels += _decoded(table[image], file)
    if not pixels:
        raise UsageError(f"{files[0]} holds no samples; replace the file.")
    if len({p.shape for p in pixels}) > 1:
        raise UsageError(f"{files[0]} holds images of several shapes; resize them to one.")
    return np.stack(pixels), np.concatenate(labels)


def _table(file: Path, columns: list[str], rows: int | None = None) -> pa.Table:
    try:
        return read_parquet(file, columns, rows=rows)
    except BoundError as cause:
        raise UsageError(f"{file} {cause}; replace the file.") from cause


def _columns(file: Path) -> list[str]:
    try:
        return parquet_columns(file)
    except BoundError as cause:
        raise UsageError(f"{file} {cause}; replace the file.") from cause


def _labels(table: pa.Table, column: str, file: Path) -> NDArray[np.int64]:
    found = table[column].to_numpy()
    if found.dtype.kind not in "iu":
        raise UsageError(f"{file} has labels of type {table[column].type}; give whole numbers.")
    return found.astype(np.int64)  # type: ignore[no-any-return]


def _decoded(cells: pa.ChunkedArray, file: Path) -> list[NDArray[np.uint8]]:
    """The images of a column, which may not unpack to more than a table may."""
    found: list[NDArray[np.uint8]] = []
    size = 0
    for cell in cells:
        found.append(_decode(cell.as_py(), file))
        size += found[-1].nbytes
        if size > LARGEST_TABLE:
            raise UsageError(f"{file} holds images of more than {LARGEST_TABLE} bytes; split it.")
    return found


def _decode(cell: Any, file: Path) -> NDArray[np.uint8]:
    """One encoded image, as (channels, height, width)."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(cell["bytes"]), formats=IMAGE_FORMATS)
        if picture.width * picture.height > MOST_PIXELS:
            raise BoundError(f"it declares more than {MOST_PIXELS} pixels")
        pixels = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
    # Foreign bytes make the decoders fail in any way there is.
    except Exception as cause:
        raise UsageError(
            f"{file} holds an image that cannot be decoded ({sentence(cause)}); replace it."
        ) from cause
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
