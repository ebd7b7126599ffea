"""What is refused before anything is computed, whatever computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from faulty import suite
from terminal import command

from robustdeq.errors import UsageError
from robustdeq.running.cluster import Cluster
from robustdeq.running.run import Options, run_suite


@pytest.mark.parametrize("gpus", [0.0, -1.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_share_of_a_gpu_is_a_share_or_a_number(gpus: float) -> None:
    with pytest.raises(UsageError, match="--task-gpus"):
        Cluster(task_gpus=gpus)


@pytest.mark.parametrize("memory", [0.0, -1.0, float("nan"), float("inf")])
def test_memory_is_a_number_of_gib(memory: float) -> None:
    with pytest.raises(UsageError, match="--task-memory"):
        Cluster(task_memory=memory)


def test_shares_and_numbers_are_taken() -> None:
    assert Cluster(task_gpus=0.25).task_gpus == 0.25
    assert Cluster(task_gpus=2).task_gpus == 2


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_time_limit_is_above_zero(timeout: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--timeout"):
        run_suite(suite(), Options(out=tmp_path, timeout=timeout))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "ry"], "did you mean 'ray'"),
        (["--address", "auto"], "--address is for --engine ray"),
        (["--engine", "ray", "--address", "ray://there:10001"], "Ray client"),
        (["--engine", "ray", "--task-gpus", "-1"], "--task-gpus is -1"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    options: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    code, _, text = command(["run", "digits", "--out", tmp_path, *options], monkeypatch, capsys)
    assert code == 2
    assert words in " ".join(text.split())
    assert not list(tmp_path.iterdir())
