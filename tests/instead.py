"""What tests run in place of the commands in documents that they cannot run as they stand."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from documents import ROOT, arguments

from robustdeq import cli, load_model
from robustdeq.contract.check import check_plugin
from robustdeq.evaluation.gate.rules import RULES
from robustdeq.weights import read_info

ROWS = {
    "Standard_feedforward": ("feedforward", "{ width = 96, inner = 96 }", "feedforward-clean"),
    "Standard_deq": ("deq", "{ width = 96, inner = 96, gain = 0.8 }", "deq-clean"),
    "Madry2018Towards_feedforward": (
        "feedforward",
        "{ width = 96, inner = 96 }",
        "feedforward-pgd_at",
    ),
}


def small(*rows: str) -> str:
    """Stands for the suite `digits`: some rows, four images, an attack that they survive."""
    head = """
name = "digits"
threats = ["Linf:3/16"]
datasets = [{ name = "digits", samples = 4 }]
attacks = [{ attack = "pgd", parameters = { steps = 1, step_size = 0.1, random_start = false } }]
"""
    for row in rows:
        defense, parameters, weights = ROWS[row]
        head += f'[[defenses]]\nid = "{row}"\ndefense = "{defense}"\nparameters = {parameters}\n'
        head += f'weights = "digits-{weights}.safetensors"\n'
    return head


Stand = Callable[[str, Path], None]
"""A function of the command and of the page's folder; it asserts."""


@dataclass(frozen=True)
class Instead:
    """What is run in place of a command, and why.

    Attributes:
        run: another command, or a function; empty where nothing but the words of the command can
            be tried.
        exits: the exit codes that are right.
    """

    why: str
    run: str | Stand = ""
    exits: tuple[int, ...] = (0,)


def robustdeq(command: str) -> int:
    """The exit code of the command line, in this process."""
    expanded = [word for given in arguments(command) for word in _matching(given)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["robustdeq", *expanded])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    return int(caught.value.code or 0)


def _matching(word: str) -> list[str]:
    """What a shell makes of a word: the paths that it matches, or itself."""
    return sorted(map(str, Path().glob(word))) if "/*/" in word else [word]


def shell(command: str, folder: Path, **variables: str) -> None:
    """A line of a shell in which `robustdeq` and `python` are those of this environment."""
    place = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": place, "PYTHONPATH": str(folder), **variables}
    subprocess.run(["bash", "-ec", command], check=True, cwd=folder, env=environment, timeout=300)


def installed(command: str, folder: Path) -> None:
    extras = re.search(r"(?:\.|robustdeq)\[([\w,]+)\]", command)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = set(extras[1].split(",")) if extras else set()
    assert wanted <= set(project["optional-dependencies"])


def entered(command: str, folder: Path) -> None:
    """What an editable install of the page's own distribution leaves on the path."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("".join(lines))


def checked(command: str, folder: Path) -> None:
    """The contract holds, and the gate has run; what it finds depends on the training."""
    _, reference = arguments(command)
    report = check_plugin(str(folder / reference), minutes=0.01)
    for plugin in report.plugins:
        assert {finding.name for finding in plugin.failed} <= set(RULES)
        assert plugin.context.startswith("trained by")


def scheduled(command: str, folder: Path) -> None:
    (job,) = [folder / name for name in arguments(command)]
    rows = (folder / "rows.txt").read_text().split()
    assert f"--array=1-{len(rows)}\n" in job.read_text()
    shutil.rmtree(folder / "out")
    pair = ("Standard_feedforward", "Madry2018Towards_feedforward")
    (folder / "small.toml").write_text(small(*pair))
    # The shell fills in the job's line; this process runs it, which saves starting another.
    script = 'robustdeq() { printf "%q " robustdeq "$@" > line; }\n' + job.read_text()
    for row in pair:
        shell(script, folder, SLURM_ARRAY_TASK_ID=str(1 + rows.index(row)))
        line = (folder / "line").read_text()
        assert robustdeq(line.replace("run digits", "run small.toml")) == 0
        assert (folder / "parts" / row / "digits" / "table.md").exists()


def gathered(command: str, folder: Path) -> None:
    """The rows of all parts stand in the table, and nothing was computed for it."""
    records, table = folder / "out/digits/records", folder / "out/digits/table.csv"
    held = sorted(path.name for path in records.iterdir())
    assert not table.exists()
    assert robustdeq("robustdeq run small.toml") == 0
    assert held == sorted(path.name for path in records.iterdir())
    assert len(pd.read_csv(table)["robust_acc"].dropna()) == 2


def converted(command: str, folder: Path) -> None:
    """The weights that a page's reader has of another program, and what is made of them."""
    source, out = (folder / name for name in arguments(command)[1:3])
    torch.save(load_model("Standard_feedforward").state_dict(), source)
    assert robustdeq(command) == 0
    assert read_info(out).defense == "feedforward"


def measured(command: str, folder: Path) -> None:
    script, run = arguments(command)
    frame = runpy.run_path(str(ROOT / script))["measured"](folder / run)
    assert set(frame["id"]) == {"Standard_deq"}


class UnderstoodError(Exception):
    """The arguments were right."""


def understood(command: str, folder: Path) -> None:
    """A script as far as where it has read its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def read(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> Any:
        raise UnderstoodError(parse(parser, *given, **named))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments(command))
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setattr(argparse.ArgumentParser, "parse_args", read)
        with pytest.raises(UnderstoodError):
            runpy.run_path(str(ROOT / arguments(command)[0]), run_name="__main__")


_PRESENT = Instead("the tests run in an environment that exists")
_RAY = "a cluster takes long to start: tests/faults/ has it"
_PACKAGE = Instead("the tests install nothing: the extras exist", installed)
_WORDS = "without data, a GPU or hours: the options are known, and so is what they name"
_MINUTES = "100 images of fourteen rows take minutes: two rows, four images"
_COST = "it takes hours, or minutes: what it costs is computed from the real models"
_IMAGES = "tests make images in place of the data: what it costs on them is computed"


def _briefly(arguments: str) -> Instead:
    command = f"robustdeq train {arguments} --minutes 0.001"
    return Instead("a training takes minutes: one step, which ends with exit code 1", command, (1,))


INSTEAD = {
    "python3 -m venv .venv": _PRESENT,
    ". .venv/bin/activate": _PRESENT,
    ".venv/bin/pytest -n auto --dist worksteal": Instead("this is what it runs"),
    ".venv/bin/pip install .": _PACKAGE,
    '.venv/bin/pip install ".[test]"': _PACKAGE,
    'pip install "robustdeq[robustbench]"': _PACKAGE,
    "pip install torchdeq": _PACKAGE,
    "pip install torchattacks foolbox": _PACKAGE,
    "pip install -e .": Instead("the tests install nothing: its entry points count", entered),
    ".venv/bin/robustdeq run digits": Instead(_MINUTES, "robustdeq run small.toml"),
    "robustdeq run digits": Instead(_MINUTES, "robustdeq run small.toml"),
    "robustdeq run digits --samples 20 --out out/quick": Instead(
        _MINUTES, "robustdeq run small.toml --only feedforward --samples 3 --out out/quick"
    ),
    "robustdeq run digits --only deq --samples 20": Instead(
        _MINUTES, "robustdeq run small.toml --only deq"
    ),
    "robustdeq run digits --battery adaptive --out out": Instead(
        _MINUTES, "robustdeq run small.toml --out out"
    ),
    "robustdeq run mine.toml": Instead(_COST, "robustdeq run mine.toml --estimate --samples 5"),
    "robustdeq run digits --recheck 7": Instead(_MINUTES, "robustdeq run small.toml --recheck 7"),
    "robustdeq run digits --estimate": Instead(
        _COST, "robustdeq run digits --estimate --only feedforward"
    ),
    "robustdeq run digits-ablations": Instead(_WORDS),
    "robustdeq run digits --battery adaptive": Instead(
        _COST, "robustdeq run digits --battery adaptive --estimate --only Standard_feedforward"
    ),
    "robustdeq run digits --autoattack joint": Instead(
        _COST, "robustdeq run digits --autoattack joint --estimate --only Standard_deq"
    ),
    'robustdeq run mnist --only "2021|2023"': Instead(
        _IMAGES, "robustdeq run mnist --only 2021 --estimate --samples 10"
    ),
    "robustdeq run mnist --autoattack joint": Instead(
        _IMAGES,
        "robustdeq run mnist --autoattack joint --estimate --only Standard_deq --samples 10",
    ),
    "robustdeq run mnist --weights weights": Instead(
        _IMAGES, "robustdeq run mnist --weights weights --estimate --only Standard_deq --samples 10"
    ),
    "robustdeq run cifar10-jpeg --weights weights": Instead(
        _IMAGES, "robustdeq run cifar10-jpeg --weights weights --estimate --samples 10"
    ),
    "robustdeq check my_defense.py": Instead("it trains for half a minute", checked),
    "robustdeq verify out/digits/bundle --reattack 20": Instead(
        "twenty samples under the adaptive battery take minutes; a survivor may fall: exit code 1",
        "robustdeq verify out/digits/bundle --reattack 1 --battery standard --rows feedforward",
        (0, 1),
    ),
    "robustdeq submit found.safetensors --run out/digits --row Madry2018Towards_deq"
    ' --by "Ada L."': Instead(
        "the small suite has another row",
        'robustdeq submit found.safetensors --run out/digits --row Standard_deq --by "Ada L."',
    ),
    "robustdeq train deq --dataset digits --threat Linf:3/16 --recipe pgd_at"
    " --out deq.safetensors": _briefly(
        "deq --threat Linf:3/16 --recipe pgd_at --out a.safetensors"
    ),
    "robustdeq train deq --threat Linf:3/16 --recipe-set inner=joint"
    " --out deq.safetensors": _briefly("deq --recipe-set inner=joint --out b.safetensors"),
    "robustdeq train lyadeq --dataset digits --minutes 1 --out lyadeq.safetensors": _briefly(
        "lyadeq --dataset digits --out c.safetensors"
    ),
    "robustdeq train my_defense.py --dataset digits --threat Linf:3/16 --minutes 5"
    " --out tanh.safetensors": _briefly("my_defense.py --threat Linf:3/16 --out tanh.safetensors"),
    "robustdeq run digits --plugin my_defense.py=tanh.safetensors": Instead(
        _COST,
        "robustdeq run digits --plugin my_defense.py=tanh.safetensors --estimate --only TanhDEQ",
    ),
    "robustdeq run digits --plugin my_attack.py": Instead(
        _COST, "robustdeq run digits --plugin my_attack.py --estimate --only feedforward"
    ),
    "robustdeq compare MyDeq Madry2018Towards_deq": Instead(
        "the small suite has another row", "robustdeq compare MyDeq Standard_deq"
    ),
    "robustdeq run digits --plugin my_deq.py --out out/mine": Instead(
        _MINUTES, "robustdeq run small.toml --plugin my_deq.py --out out/mine"
    ),
    "robustdeq compare lyadeq deq": Instead(
        "the small suite has other rows", "robustdeq compare Standard_feedforward Standard_deq"
    ),
    "robustdeq check my_deq.py": Instead("it trains for half a minute", checked),
    "robustdeq train my_deq.py --dataset digits --out my_deq.safetensors": Instead(
        "a training takes minutes: one pass over the images",
        "robustdeq train my_deq.py --recipe clean --recipe-set epochs=1 --out my_deq.safetensors",
    ),
    "robustdeq run digits --plugin my_deq.py=my_deq.safetensors": Instead(
        _MINUTES, "robustdeq run small.toml --plugin my_deq.py=my_deq.safetensors"
    ),
    "robustdeq train weight_tied --set width=96 --set inner=96 --set gain=0.8 --set steps=16"
    " --threat Linf:3/16 --out deeper.safetensors": _briefly(
        "weight_tied --set width=96 --set inner=96 --set gain=0.8 --set steps=16"
        " --threat Linf:3/16 --out deeper.safetensors"
    ),
    "robustdeq train --suite digits --out weights": _briefly(
        "--suite digits --only digits-deq-clean --out weights"
    ),
    "robustdeq train --suite mnist --only lyadeq --out weights --minutes 100": Instead(_WORDS),
    "robustdeq train --suite cifar10-jpeg --out weights --device cuda --minutes 25": Instead(
        _WORDS
    ),
    "robustdeq convert theirs.pt mine.safetensors --defense feedforward --set width=96"
    " --set inner=96 --allow-pickle": Instead("there is no such file before", converted),
    "robustdeq run digits --plugin feedforward=mine.safetensors": Instead(
        _MINUTES, "robustdeq run small.toml --plugin feedforward=mine.safetensors --out out/mine"
    ),
    "robustdeq run digits --timeout 600": Instead(
        _MINUTES, "robustdeq run small.toml --timeout 600"
    ),
    'pip install "robustdeq[ray]"': _PACKAGE,
    "robustdeq run digits --engine ray --out out/ray": Instead(_RAY),
    "SUITE=digits OUT=out sbatch --nodes=4 --cpus-per-task=16 docs/robustdeq.sbatch"
    " --battery adaptive": Instead(_RAY),
    "tox -e faults": Instead("it takes a quarter of an hour, and is of tests"),
    "sbatch rows.sbatch": Instead("no scheduler: two jobs of the array, one by one", scheduled),
    "python benchmarks/gradient_cosines.py out/digits": Instead("it writes a page", measured),
    "python benchmarks/peers.py digits out/digits": Instead("it takes hours", understood),
    "python benchmarks/side_by_side.py --data mnist --cell small --images 200 --seeds 5": Instead(
        "it takes hours", understood
    ),
    "python benchmarks/side_by_side.py --row Madry2018Towards_deq_gain2 --images 200": Instead(
        "it takes hours", understood
    ),
}
"""By command, as documents have it."""
ON_PAGE = {
    ("README.md", "robustdeq check my_deq.py"): Instead("it is checked on docs/plugins.md"),
    ("docs/array_of_jobs.md", "robustdeq run digits"): Instead(_MINUTES, gathered),
}
"""By page and command, where a page needs something else."""
