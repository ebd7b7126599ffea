"""Adversarial examples as one small picture per row: clean, adversarial, perturbation magnified."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from robustdeq.records import Record
from robustdeq.reporting.images import Images
from robustdeq.reporting.run import RunReport
from robustdeq.verdict import Evidence, Verdict, records_of

MOST = 4
"""Examples of one row."""
_SHOWN = 72
"""Pixels on the page that one image takes."""


@dataclass(frozen=True)
class Example:
    """One broken sample: what it is, what it became, and by whom."""

    index: int
    label: int
    prediction: int
    broken_by: str
    distance: float


@dataclass(frozen=True, eq=False)
class Examples:
    """A picture with a column per example; `source` is a data address of a PNG."""

    held: list[Example]
    source: str
    width: int
    height: int
    magnified: float

    @property
    def alt(self) -> str:
        """What the picture shows, in words."""
        parts = [f"sample {e.index}, class {e.label} taken for {e.prediction}" for e in self.held]
        return (
            "Rows: clean, adversarial, perturbation magnified "
            f"{self.magnified:.3g} times. Columns: {'; '.join(parts)}."
        )


def examples_of(run: RunReport, number: int, images: Images, most_bytes: int) -> Examples | None:
    """The first broken samples of a row whose clean images are at hand.

    None where there are none, or where not even one fits into `most_bytes`.
    """
    found = _found(run, number, images) if len(run.verdicts[number].samples) else []
    for count in range(len(found), 0, -1):
        made = _picture(found[:count])
        if len(made.source) <= most_bytes:
            return made
    return None


Read = Callable[[str], Record | None]
_Found = tuple[Example, NDArray[np.float64], NDArray[np.float64]]


def _found(run: RunReport, number: int, images: Images) -> list[_Found]:
    """Examples with their clean and their adversarial image, channels last."""
    evidence, verdict = run.evidences[number], run.verdicts[number]
    read = cache(run.store.read)
    out: list[_Found] = []
    for index, label, name in _candidates(verdict, images):
        held = _row_of(read, evidence, label, index)
        clean = images[verdict.dataset, index]
        if held is None or len(held["adversarial"]) != 4 * clean.size:
            continue
        pixels = np.frombuffer(held["adversarial"], "<f4").reshape(clean.shape)
        told = Example(
            index, int(held["label"]), int(held["adversarial_prediction"]),
            name, float(held["distance"]),
        )  # fmt: skip
        out.append((told, _image(clean / 255.0), _image(pixels.astype(np.float64))))
        if len(out) == MOST:
            break
    return out


def _candidates(verdict: Verdict, images: Images) -> list[tuple[int, str, str]]:
    """Index, stage, and stage with component, of each broken sample with a clean image."""
    fallen = verdict.samples.dropna(subset=["broken_by"])
    pairs = zip(fallen["index"], fallen["broken_by"], strict=True)
    return [
        (int(index), str(name).partition("/")[0], str(name))
        for index, name in pairs
        if (verdict.dataset, int(index)) in images
    ]


def _row_of(read: Read, evidence: Evidence, label: str, index: int) -> pd.Series | None:
    """A sample's row in the record of a stage, with its pixels."""
    for summary in records_of(evidence, "attack"):
        if summary.meta.label == label and index in set(summary.rows["index"]):
            record = read(summary.meta.key)
            rows = None if record is None else record.rows.set_index("index", drop=False)
            if rows is not None and not pd.isna(rows["adversarial"][index]):
                return rows.loc[index]
    return None


def _image(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Channels last, three of them."""
    shown = np.moveaxis(pixels, 0, -1)[..., :3]
    return np.repeat(shown, 3, axis=-1) if shown.shape[-1] != 3 else shown


def _picture(found: list[_Found]) -> Examples:
    largest = max(float(np.abs(adversarial - clean).max()) for _, clean, adversarial in found)
    magnified = 0.5 / largest if largest > 0 else 1.0
    columns = [
        _stack([clean, adversarial, 0.5 + magnified * (adversarial - clean)])
        for _, clean, adversarial in found
    ]
    whole = np.concatenate([part for c in columns for part in (c, _gap(c, axis=1))][:-1], axis=1)
    bytes_ = _png(whole)
    scale = max(1, _SHOWN // found[0][1].shape[1])
    source = f"data:image/png;base64,{base64.b64encode(bytes_).decode()}"
    held = [told for told, _, _ in found]
    return Examples(held, source, whole.shape[1] * scale, whole.shape[0] * scale, magnified)


def _stack(images: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate(
        [part for image in images for part in (image, _gap(image, axis=0))][:-1], axis=0
    )


def _gap(image: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """A white line of one pixel."""
    shape = list(image.shape)
    shape[axis] = 1
    return np.ones(shape)


def _png(image: NDArray[np.float64]) -> bytes:
    buffer = io.BytesIO()
    levels = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
    Image.fromarray(levels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
