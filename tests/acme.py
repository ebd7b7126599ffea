"""Installs a small third-party distribution of plugins into a folder, as pip would leave it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

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
    (folder / "acme_plugins.py").write_text(PLUGINS)
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    sys.modules.pop("acme_plugins", None)
