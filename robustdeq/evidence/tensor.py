"""A row's adversarial inputs as one tensor: what RobustBench's form asks a submission for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustdeq.datasets import Slice, load_slice
from robustdeq.errors import CaseError, UsageError
from robustdeq.evidence.bundling import data_name, first_examples
from robustdeq.evidence.rescoring import Loader
from robustdeq.files import write_atomically
from robustdeq.reporting.run import RunReport
from robustdeq.shapes import Images


def adversarial_tensor(run: RunReport, row: int, data: Loader = load_slice) -> Images:
    """Float32 (n, channels, height, width) in [0, 1], in the order of the row's samples.

    Where a sample was broken it is the example that first broke it, else the clean image: the
    deployed model is right on as many of them as it is robust on.

    Raises:
        UsageError: if the row has no robust accuracy, or the data set is not here.
        CaseError: if the data set is another than the row's, or records are gone.
    """
    verdict, case = run.verdicts[row], run.evidences[row].case
    if verdict.robust_acc is None:
        raise UsageError(f"row {verdict.id} has no robust accuracy ({verdict.note}); run it again.")
    held = _data(run, row, data)
    found = _examples(run, row, held.images.shape[1:])
    places = {int(index): place for place, index in enumerate(held.indices)}
    x = held.images.astype(np.float32) / np.float32(255)
    named = zip(verdict.samples["index"], verdict.samples["broken_by"], strict=True)
    fallen = {int(index) for index, by in named if by is not None}
    if fallen != set(found):
        raise CaseError(f"records of {case['id']} are gone; run the suite again.")
    for index, pixels in found.items():
        x[places[index]] = pixels
    return torch.from_numpy(x)


def write_tensor(path: Path, x: Images) -> None:
    """Write a tensor that `torch.load(path, weights_only=True)` reads back."""
    buffer = io.BytesIO()
    torch.save(x.clone(), buffer)
    write_atomically(path, buffer.getvalue())


def _data(run: RunReport, row: int, data: Loader) -> Slice:
    case: dict[str, Any] = run.evidences[row].case
    held = data(data_name(run.origin(row).data, run.data["rows"][row]), case["split"], case["n"])
    if held.digest != case["digest"]:
        raise CaseError(
            f"the data set {case['dataset']} that is installed here (digest {held.digest[:12]}...) "
            f"is not the one of row {case['id']} ({case['digest'][:12]}...)."
        )
    return held


def _examples(run: RunReport, row: int, shape: tuple[int, ...]) -> dict[int, NDArray[np.float32]]:
    samples, store = run.verdicts[row].samples, run.store_of(row)
    first = {
        int(index): by for index, by in zip(samples["index"], samples["broken_by"], strict=True)
    }
    keys = [r.meta.key for r in run.evidences[row].records if r.meta.kind == "attack"]
    return first_examples((r for r in map(store.read, keys) if r is not None), first, shape)
