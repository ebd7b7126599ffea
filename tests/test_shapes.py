"""The shapes in signatures hold: what uses the core most is run again with every call checked.

In processes of their own, since checks at every call cost the attacks' tests three quarters of
their time.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CHECKED = (
    "robustdeq.equilibrium",
    "robustdeq.threats",
    "robustdeq.targets",
    "robustdeq.randomness",
    "robustdeq.evaluation.judge",
)
GROUPS = {
    "solves": ("test_equilibrium", "test_anderson", "test_memory_format"),
    "gradients": ("test_gradients", "test_gradient_edges", "test_module_gradients"),
    "states": ("test_joint", "test_lockstep", "test_carried_fab", "test_carried_square"),
    "judge": ("test_judge", "test_threats", "test_attack_views"),
}
WRONG = """
import torch
from robustdeq.threats import Threat


def test_a_wrong_shape_goes_unnoticed():
    Threat.parse("Linf:0.1").project(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 5, 4))
"""


def checked(*tests: Path) -> subprocess.CompletedProcess[str]:
    """A run of these tests in which the arguments and results of every call are checked."""
    packages = ",".join((*CHECKED, "beartype.beartype"))
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--confcutdir", str(TESTS), f"--jaxtyping-packages={packages}", *map(str, tests)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parent)


@pytest.mark.parametrize("group", GROUPS)
def test_arguments_and_results_have_the_shapes_of_their_signatures(group: str) -> None:
    done = checked(*(TESTS / f"{name}.py" for name in GROUPS[group]))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_a_wrong_shape_is_noticed(tmp_path: Path) -> None:
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text(WRONG)
    done = checked(wrong)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "TypeCheckError" in done.stdout
