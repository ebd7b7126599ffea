"""Third-party distributions: misbehaving plugins as pip would leave them, and a real one by pip.

The real one is `tests/acme_deq/`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "acme_deq"

PLUGINS = '''
from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from robustdeq.interfaces import About, Access, Scope


class Net(nn.Module):
    def __init__(self, data, trick):
        super().__init__()
        self.trick = trick
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(
            torch.randn(data.classes, data.channels * data.height * data.width, generator=generator)
        )

    def forward(self, x):
        if self.trick == "die":
            os._exit(7)
        if self.trick == "detach":
            x = x.detach()
        logits = (x.flatten(1) - 0.5) @ self.weight.T
        if self.trick == "nan":
            logits = logits * float("nan")
        if self.trick == "shape":
            logits = logits[:, :3]
        return logits


@dataclass(frozen=True, kw_only=True)
class Defense:
    about: ClassVar[About] = About("Acme")
    recipe: ClassVar[str] = "clean"

    trick: str = ""

    def build(self, data, device):
        if self.trick == "build":
            raise ValueError("no such cell")
        return Net(data, self.trick).to(device)


@dataclass(frozen=True, kw_only=True)
class Cheat:
    """Returns black images, far outside of any ball."""

    needs: ClassVar[Access] = Access.LABELS

    def run(self, target, x, y, threat, rng):
        return torch.zeros_like(x)


@dataclass(frozen=True, kw_only=True)
class Borrow:
    """What the first other row has found."""

    needs: ClassVar[Access] = Access.LOGITS
    phase: ClassVar[int] = 2

    def run(self, target, x, y, threat, rng):
        assert [pool.name for pool in target.pools] == sorted(p.name for p in target.pools)
        for pool in target.pools:
            x = torch.where(pool.available.view(-1, 1, 1, 1), pool.x, x)
        return x


@dataclass(frozen=True, kw_only=True)
class Never:
    needs: ClassVar[Access] = Access.LABELS

    def fits(self, target):
        return False

    def run(self, target, x, y, threat, rng):
        raise AssertionError


@dataclass(frozen=True, kw_only=True)
class Crash:
    needs: ClassVar[Access] = Access.LABELS
    scope: ClassVar[Scope] = Scope.CHUNK

    how: str = "raise"

    def run(self, target, x, y, threat, rng):
        if self.how == "die":
            os._exit(3)
        raise RuntimeError("out of ideas")
'''
ENTRY_POINTS = """[robustdeq.defenses]
acme = acme_plugins:Defense
broken = acme_missing_module:Defense
[robustdeq.attacks]
borrow = acme_plugins:Borrow
never = acme_plugins:Never
cheat = acme_plugins:Cheat
crash = acme_plugins:Crash
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "acme-defenses") -> None:
    """Put the distribution on sys.path, for this process and those it starts."""
    register(folder, name, ENTRY_POINTS, "acme_plugins", PLUGINS)
    use(folder, monkeypatch)
    sys.modules.pop("acme_plugins", None)


def install_wheel(folder: Path) -> None:
    """Build the wheel of `tests/acme_deq/` and install it into an empty folder, without a net."""
    source = folder.parent / "acme_source"
    shutil.copytree(SOURCE, source)
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        found = shutil.which("pip")
        if found is None:
            pytest.skip("pip is not here")
        pip = [found, "--python", sys.executable]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir"]
    command = [*pip, "install", *options, "--target", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def register(folder: Path, name: str, entry_points: str, module: str, text: str) -> None:
    """Leave a module and the metadata of its distribution in a folder."""
    (folder / f"{module}.py").write_text(text, encoding="utf-8")
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a folder on the import path, of this process and of those it starts."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
