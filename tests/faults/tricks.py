"""An attack plugin that does what plugins should not; the tests' suites name it as a file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from robustdeq.interfaces import Access


@dataclass(frozen=True, kw_only=True)
class Trick:
    """Returns its inputs, after it has done something.

    Attributes:
        how: what.
        note: a file that some tricks write to.
        size: MiB that it prints, or rows that fit into its memory.
    """

    needs: ClassVar[Access] = Access.LABELS

    how: str = "nothing"
    note: str = ""
    size: int = 1

    def run(self, target: Any, x: Any, y: Any, threat: Any, rng: Any) -> Any:
        tricks: dict[str, Callable[[], Any]] = {
            "nothing": lambda: None,
            "exit": lambda: os._exit(3),
            "sys.exit": lambda: sys.exit("enough"),
            "abort": os.abort,
            "hang": lambda: time.sleep(3600),
            "spin": _spin,
            "fork": self._fork,
            "orphan": self._orphan,
            "flood": self._flood,
            "patch": _patch,
            "settings": _settings,
            "weights": lambda: _weights(target),
            "class": lambda: _class(target),
            "hook": lambda: _hook(target),
            "nan": lambda: None,
            "memory": lambda: self._memory(target, x),
            "count": self._count,
        }
        tricks[self.how]()
        return x * float("nan") if self.how == "nan" else x

    def _fork(self) -> None:
        """Both copies go on and return."""
        os.fork()

    def _orphan(self) -> None:
        """A process of its own that outlives it, and then a hang."""
        code = "import time; time.sleep(3600)"
        process = subprocess.Popen([sys.executable, "-c", code])
        Path(self.note).write_text(str(process.pid))
        time.sleep(3600)

    def _flood(self) -> None:
        block = b"x" * 2**20
        for _ in range(self.size):
            os.write(1, block)
            os.write(2, block)

    def _memory(self, target: Any, x: Any) -> None:
        """A device on which only so many rows fit."""

        def measure(module: Any, arguments: Any) -> None:
            if len(arguments[0]) > self.size:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        leaves = [module for module in target.model.modules() if not list(module.children())]
        handles = [module.register_forward_pre_hook(measure) for module in leaves]
        try:
            target(x)
        finally:
            for handle in handles:
                handle.remove()

    def _count(self) -> None:
        """A line for every time that it is run."""
        with Path(self.note).open("a") as stream:
            stream.write(f"{os.getpid()}\n")


def _spin() -> None:
    while True:
        pass


def _patch() -> None:
    torch.Tensor.argmax = lambda self, *a, **k: torch.zeros(len(self), dtype=torch.long)  # type: ignore


def _settings() -> None:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)


def _weights(target: Any) -> None:
    """Training on, as an attack that hardens the model would."""
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter.mul_(0.5)


def _class(target: Any) -> None:
    """Every model of the class says class 0."""
    kind = type(target.model)
    kind.__call__ = lambda self, x: torch.eye(10)[0].expand(len(x), 10)


def _hook(target: Any) -> None:
    """Left behind."""
    for module in target.model.children():
        module.register_forward_hook(lambda module, given, out: out * 0)
