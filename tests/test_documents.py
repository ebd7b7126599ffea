"""Documents that tell the truth: commands, snippets, names and links are tried."""

from __future__ import annotations

import io
import re
import runpy
import shutil
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import documents
import pandas as pd
import pytest
import torch
import typer
from documents import PAGES, ROOT, arguments, program
from instead import INSTEAD, ON_PAGE, Instead, robustdeq, shell, small
from PIL import Image
from safetensors.torch import save_file

from robustdeq import load_model
from robustdeq.cli.console import APP
from robustdeq.datasets import DATA_VARIABLE, load_slice
from robustdeq.evaluation.gate.rules import RULES
from robustdeq.randomness import SampleRandom
from robustdeq.registry import load, registered
from robustdeq.suite import adjusted, find_suite, parse_suite, pattern
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training.run import jobs_of

AS_IT_STANDS = ("cp", "mkdir", "python")
"""Programs that a shell runs; `robustdeq` is run in the test's own process."""
FOREIGN = {"--gres=gpu:1": "of Slurm"}
"""Options in the text that are no options of ours, and whose they are."""
COMMANDS = [(page, command) for page in PAGES for command in documents.commands(page)]


def instead(page: str, command: str) -> Instead | None:
    return ON_PAGE.get((page, command)) or INSTEAD.get(command)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small suite, what its run left, and examples that lower a row of it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.toml").write_text(small("Standard_feedforward", "Standard_deq"))
    assert robustdeq(f"robustdeq run {folder}/small.toml --out {folder}/out") == 0
    data = load_slice("digits", "test", 4)
    x, y = torch.from_numpy(data.images) / 255, torch.from_numpy(data.labels)
    threat, model = Threat.parse("Linf:3/16"), load_model("Standard_deq")
    pgd, rng = load("attack", "pgd", {}), SampleRandom(0, "pgd", range(4))
    found: torch.Tensor = pgd.run(Target(model, 10), x, y, threat, rng)
    index = (model(found).argmax(1) != y).nonzero().squeeze(1)
    save_file({"x": found[index], "index": index}, folder / "found.safetensors")
    return folder


@pytest.fixture
def desk(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page's reader sits: a folder with a finished run, and images for every suite."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name, size, mode in (("mnist", 28, "L"), ("cifar10-jpeg", 32, "RGB")):
        write_images(tmp_path / "data" / name, size, mode)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_images(folder: Path, size: int, mode: str) -> None:
    rows = []
    for label in range(10):
        stream = io.BytesIO()
        Image.new(mode, (size, size), label).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue()}, "label": label})
    folder.mkdir(parents=True)
    for split in ("test", "train"):
        pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize("page", [page for page in PAGES if documents.commands(page)])
def test_the_commands_run(page: str, desk: Path) -> None:
    for name, text in documents.files(page).items():
        (desk / name).write_text(text)
    for command in documents.commands(page):
        stand = instead(page, command) or Instead("it runs as it stands", command)
        if callable(stand.run):
            stand.run(command, desk)
        elif stand.run and program(stand.run) == "robustdeq":
            assert robustdeq(stand.run) in stand.exits, stand.run
        elif stand.run:
            assert program(stand.run) in AS_IT_STANDS, f"{page}: what is to be run for {command}?"
            shell(stand.run, desk)


@pytest.mark.parametrize("page", [page for page in PAGES if documents.script(page)])
def test_the_python_runs(page: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in documents.files(page).items():
        (desk / name).write_text(text)
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    (desk / "script.py").write_text(documents.script(page))
    runpy.run_path("script.py")


def test_what_is_run_instead_stands_for_a_command_in_a_document() -> None:
    assert {command for _, command in COMMANDS} >= set(INSTEAD)
    assert set(COMMANDS) >= set(ON_PAGE)
    assert all(stand.why for stand in (*INSTEAD.values(), *ON_PAGE.values()))


def parsed(command: str) -> tuple[str, dict[str, Any]]:
    """A `robustdeq` line through the real parser, which is not resilient: name and parameters."""
    group = typer.main.get_command(APP)
    context = group.make_context("robustdeq", arguments(command))
    name, chosen, rest = group.resolve_command(context, arguments(command))
    return str(name), chosen.make_context(name, list(rest), parent=context).params


OURS = [(page, command) for page, command in COMMANDS if program(command) == "robustdeq"]


@pytest.mark.parametrize(("page", "command"), OURS)
def test_options_exist_and_so_does_what_they_name(page: str, command: str) -> None:
    name, given = parsed(command)
    known = documents.files(page)
    if name == "run":
        suite = find_suite(given["suite"]) if given["suite"] not in known else None
        suite = suite or parse_suite(known[given["suite"]], page, None)
        keys = ("samples", "battery", "only", "threat", "curves", "autoattack")
        picked = dict(
            zip(("samples", "battery_name", *keys[2:]), map(given.get, keys), strict=True)
        )
        assert adjusted(suite, **picked).defenses
    elif name == "train" and given["suite"]:
        names = [job.out.name for job in jobs_of(find_suite(given["suite"]), Path())]
        assert any(pattern(given["only"] or "").search(name) for name in names)
    elif name == "train" and given["defense"] in registered("defense"):
        load("recipe", given["recipe"] or load("defense", given["defense"], {}).recipe, {})


@pytest.mark.parametrize("command", ["run digits --sample 5", "runs digits", "run --samples few"])
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises(Exception, match=r"No such|valid integer"):
        parsed(f"robustdeq {command}")


@pytest.mark.parametrize("page", PAGES)
def test_words_in_code_name_what_exists(page: str) -> None:
    group = typer.main.get_command(APP)
    options = {o for c in group.commands.values() for p in c.params for o in p.opts}
    for word in documents.words(page):
        if re.match(r"--[a-z]", word) and word not in FOREIGN:
            assert word.split()[0] in options, f"{page}: {word}"
        if re.match(r"robustdeq [a-z]", word):
            assert set(re.findall(r"--[a-z][a-z-]*", word)) <= options, f"{page}: {word}"
            assert word.split()[1] in group.commands, f"{page}: {word}"
        place = re.match(
            r"(?:python )?((?:benchmarks|tests|docs|leaderboards|robustdeq)/\S*)", word
        )
        assert place is None or (ROOT / place[1]).exists(), f"{page}: {word}"


@pytest.mark.parametrize("page", PAGES)
def test_toml_is_what_it_says(page: str) -> None:
    """Suites and parts of them, which are completed; or the settings of a distribution."""
    for block in documents.blocks(page):
        if block.language != "toml":
            continue
        if "project" in tomllib.loads(block.text):
            known = {f"robustdeq.{kind}" for kind in ("defenses", "attacks", "recipes")}
            assert set(tomllib.loads(block.text)["project"]["entry-points"]) <= known
            continue
        head = 'name = "part"\nthreats = ["Linf:8/255"]\nbattery = "standard"\n'
        head += 'datasets = [{ name = "cifar10" }]\n'
        whole = "name" in tomllib.loads(block.text)
        assert parse_suite(block.text if whole else head + block.text, page, None).defenses


def test_blocks_are_of_known_languages_and_files_have_one_text() -> None:
    blocks = [block for page in PAGES for block in documents.blocks(page)]
    assert {b.language for b in blocks} <= {"python", "sh", "toml", "formula"}
    assert all(count == 1 for count in Counter(b.title for b in blocks if b.title).values())


@pytest.mark.parametrize("page", [*PAGES, "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    for link in documents.links(page):
        place, _, anchor = link.partition("#")
        target = (ROOT / page).parent / place if place else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in documents.anchors(target), f"{page}: {link}"


def test_the_verdict_page_names_every_flag_of_the_gate() -> None:
    held = set(documents.words("docs/verdict.md"))
    assert set(RULES) - {"randomized"} <= held
