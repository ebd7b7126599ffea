"""A small finished run with its bundle, and how a forger would change it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from shipped_rows import EQUILIBRIUM
from shipped_rows import PLAIN as PLAIN_ROW

from robustdeq.datasets import load_slice
from robustdeq.evidence.bundle import MANIFEST, BundleRow, read_bundle, sealed
from robustdeq.evidence.bundling import Parts, write_bundle
from robustdeq.evidence.rescoring import Setting
from robustdeq.evidence.verify import Report, verify_bundle
from robustdeq.keys import file_sha256
from robustdeq.reporting.run import read_index, read_run
from robustdeq.running.run import Options, run_suite
from robustdeq.suite import parse_suite

SAMPLES = 8
TRUST = Setting(allow_plugins=True)
PLAIN = "Plain on digits under Linf:0.125"
SUITE = """
name = "small"
threats = ["Linf:1/8"]
chunk = 4
[[datasets]]
name = "digits"
samples = 8
[[attacks]]
attack = "pgd"
parameters = { steps = 1 }
"""
NOISY = """
[[defenses]]
id = "Noisy/../row"
defense = "noisy"
"""
PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from robustdeq.datasets import load_slice
from robustdeq.interfaces import About


class Net(nn.Module):
    def __init__(self, noise):
        super().__init__()
        data, self.noise = load_slice("digits", "train"), noise
        x = torch.from_numpy(data.images).float().flatten(1) / 255
        means = torch.stack([x[torch.from_numpy(data.labels) == k].mean(0) for k in range(10)])
        self.weight = nn.Parameter(means)

    def forward(self, x):
        logits = x.flatten(1) @ self.weight.T - self.weight.square().sum(1) / 2
        return logits + self.noise * torch.randn_like(logits)


@dataclass(frozen=True, kw_only=True)
class Noisy:
    about: ClassVar[About] = About("Nearest mean with noise")
    recipe: ClassVar[str] = "clean"

    noise: float = 0.3

    def build(self, data, device):
        return Net(self.noise).to(device)
"""


def write_plugin(folder: Path) -> Path:
    """The randomized defense as a distribution of its own."""
    (folder / "noisy_plugin.py").write_text(PLUGIN)
    info = folder / "noisy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noisy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[robustdeq.defenses]\nnoisy = noisy_plugin:Noisy\n")
    return folder


def bundle_again(folder: Path) -> Path:
    zoo = Path(sys.modules["robustdeq"].__path__[0]) / "zoo"
    parts = Parts(
        shapes={"digits": (1, 8, 8)},
        weights=(zoo,),
        distributions={"feedforward": "robustdeq", "deq": "robustdeq", "noisy": "noisy"},
    )
    return write_bundle(folder, read_index(folder), read_run(folder).verdicts, parts)


_DONE: dict[str, Path] = {}


def finished_run(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished run of three rows, made once; tests take copies of it."""
    with pytest.MonkeyPatch.context() as patch:
        if "plugins" not in _DONE:
            _DONE["plugins"] = write_plugin(factory.mktemp("plugins"))
        patch.syspath_prepend(str(_DONE["plugins"]))
        patch.setenv("PYTHONPATH", str(_DONE["plugins"]))
        if "run" not in _DONE:
            out = factory.mktemp("out")
            rows = PLAIN_ROW + EQUILIBRIUM + NOISY
            run_suite(parse_suite(SUITE + rows, "small", None), Options(out=out, workers=1))
            bundle_again(out / "small")
            _DONE["run"] = out / "small"
        yield _DONE["run"]


def row_of(folder: Path, name: str = "Plain") -> BundleRow:
    return read_bundle(folder).find(name)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "Plain") -> None:
    """Change the claims of a row, and seal the manifest again as a forger would."""
    data = json.loads((folder / MANIFEST).read_text())
    change(next(row for row in data["rows"] if row["case"]["id"] == name))
    data.pop("sha256")
    (folder / MANIFEST).write_text(sealed(data))


def replace_examples(
    folder: Path, x: NDArray[np.float32], index: NDArray[np.int64] | None = None
) -> None:
    """Other examples for Plain, under a digest and a seal that fit."""
    path = folder / "examples" / row_of(folder).examples.name
    index = load_file(path)["index"] if index is None else index
    save_file({"x": x, "index": index}, path)
    rewrite(folder, lambda row: row["examples"].update(sha256=file_sha256(path)))


def held_examples(folder: Path, name: str = "Plain") -> tuple[NDArray[Any], NDArray[Any]]:
    return read_bundle(folder).examples(row_of(folder, name))


def clean_images() -> NDArray[np.float32]:
    return load_slice("digits", "test", SAMPLES).images.astype(np.float32) / np.float32(255)


def plain(folder: Path, **setting: Any) -> Report:
    return verify_bundle(folder, rows="^Plain", setting=Setting(**setting))


def whys(report: Report) -> str:
    return "; ".join(map(str, report.failures))
