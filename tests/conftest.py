"""Fixtures, and a guard that core and plugins are of one checkout."""

from __future__ import annotations

import inspect
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import finished_run
from hypothesis import settings
from torch import Tensor
from toys import Linear, ToyEquilibrium

import robustdeq
from robustdeq.equilibrium import FixedPoint, Implicit
from robustdeq.registry import plugin_class

# A distribution of its own, tested where it is installed: see test_third_party.py.
collect_ignore = ["acme_deq"]
# The same examples in every run, on machines of any speed.
settings.register_profile("robustdeq", deadline=None, derandomize=True)
settings.load_profile("robustdeq")


def pytest_sessionstart() -> None:
    """Refuse to test the core of one checkout with the plugins of another."""
    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
    core = Path(robustdeq.__file__).resolve().parent
    plugin = Path(inspect.getfile(plugin_class("defense", "deq"))).resolve().parent
    if plugin not in (core / "defenses", core.parent / "defenses"):
        pytest.exit(f"core is {core}, but plugins come from {plugin}; install this checkout again.")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same random numbers for a test, whichever tests its process ran before."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def toy() -> ToyEquilibrium:
    return ToyEquilibrium(gradient=Implicit(FixedPoint(tolerance=1e-13, max_steps=500)))


@pytest.fixture
def toy_images() -> Tensor:
    return torch.rand(8, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def linear() -> Linear:
    return Linear()


@pytest.fixture
def linear_data(linear: Linear) -> tuple[Tensor, Tensor]:
    """Images well inside the box, labelled by the model: clean accuracy 1."""
    x = 0.3 + 0.4 * torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return x, linear(x).argmax(1).detach()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished run with its bundle, to be read."""
    yield from finished_run(tmp_path_factory)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    shutil.copytree(finished, tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def bundle(run: Path) -> Path:
    """The bundle of that copy."""
    return run / "bundle"
