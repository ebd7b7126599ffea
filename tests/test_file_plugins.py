"""Plugins in files: in suites, on the command line, in training, in `evaluate`, in bundles."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from terminal import command

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.errors import CaseError, UsageError
from robustdeq.evaluation.provenance import source_digest
from robustdeq.evaluation.subject import Source, build_subject, chunk_of
from robustdeq.evidence.bundle import read_bundle, sealed
from robustdeq.evidence.rescoring import Setting
from robustdeq.evidence.verify import verify_bundle
from robustdeq.keys import file_sha256
from robustdeq.plugin_files import class_in, classes_in, located, public_name
from robustdeq.plugin_rows import additions
from robustdeq.registry import load, plugin_class, provider
from robustdeq.running.run import Options, run_suite
from robustdeq.suite import Suite, as_data, expand, find_suite
from robustdeq.training.run import jobs_of, run_job
from robustdeq.weights import WeightsInfo, read_info, save_weights

DEFENSE = """
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import torch
from torch import nn
from robustdeq.interfaces import About

class Net(nn.Module):
    def __init__(self, pixels, classes):
        super().__init__()
        self.last = nn.Linear(pixels, classes)
    def forward(self, x):
        return self.last(x.flatten(1))

@dataclass(frozen=True, kw_only=True)
class Mine:
    about: ClassVar[About] = About("A line")
    recipe: ClassVar[str] = "clean"
    log: str = ""

    def build(self, data, device):
        if self.log:
            with open(self.log, "a") as stream:
                stream.write(f"{os.getpid()}\\n")
        return Net(data.channels * data.height * data.width, data.classes).to(device)
"""
ATTACK = """
from dataclasses import dataclass
from typing import ClassVar
from robustdeq.interfaces import Access

@dataclass(frozen=True, kw_only=True)
class Noise:
    needs: ClassVar[Access] = Access.LABELS

    def run(self, target, x, y, threat, rng):
        return threat.project(x, x + threat.random_offset(rng.uniform(x), rng.fraction(x)))
"""
SUITE = """
name = "tiny"
threats = ["Linf:1/4"]
[[datasets]]
name = "digits"
samples = 4
[[attacks]]
attack = "attacks/noise.py"
[[attacks]]
attack = "pgd"
parameters = { steps = 2 }
[[defenses]]
id = "Guest"
defense = "mine.py"
"""


def suite_in(folder: Path, text: str = SUITE) -> Suite:
    (folder / "attacks").mkdir(parents=True)
    (folder / "mine.py").write_text(DEFENSE)
    (folder / "attacks" / "noise.py").write_text(ATTACK)
    (folder / "tiny.toml").write_text(text)
    return find_suite(str(folder / "tiny.toml"))


def records(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (out / "tiny" / "records").iterdir()}


def test_a_suite_runs_files_of_its_folder_in_workers_alone_and_names_no_place(
    tmp_path: Path,
) -> None:
    log, out = tmp_path / "built.log", tmp_path / "out"
    text = SUITE + f'parameters = {{ log = "{log}" }}\n'
    (verdict,) = run_suite(suite_in(tmp_path / "one", text), Options(out=out))
    assert verdict.status == "ok"
    assert verdict.defense == "file:Mine"
    data = json.loads((out / "tiny" / "run.json").read_text())
    (row,) = data["rows"]
    assert row["plugin"] == f"mine.py sha256 {file_sha256(tmp_path / 'one' / 'mine.py')}"
    assert row["about"] == {"title": "A line"}
    assert row["expected"] == {"0": ["file:Noise", "pgd"]}
    bundle = out / "tiny" / "bundle"
    assert read_bundle(bundle).rows[0].distribution == "mine.py"
    for file in (out / "tiny" / "run.json", bundle / "manifest.json", out / "tiny" / "table.csv"):
        assert str(tmp_path / "one") not in file.read_text()

    # Elsewhere, and under other names, the same content is the same work.
    held, builds = records(out), log.read_text().splitlines()
    (tmp_path / "two" / "attacks").mkdir(parents=True)
    shutil.copy(tmp_path / "one" / "mine.py", tmp_path / "two" / "renamed.py")
    shutil.copy(tmp_path / "one" / "attacks" / "noise.py", tmp_path / "two" / "attacks")
    moved = text.replace("mine.py", "renamed.py:Mine")
    (tmp_path / "two" / "tiny.toml").write_text(moved)
    run_suite(find_suite(str(tmp_path / "two" / "tiny.toml")), Options(out=out))
    assert records(out) == held
    # The second run's model was built as well, and never by this process: no stranger's code is.
    built = log.read_text().splitlines()
    assert len(built) > len(builds)
    assert str(os.getpid()) not in built

    # An edit of either file is other work.
    file = tmp_path / "two" / "attacks" / "noise.py"
    file.write_text(file.read_text() + "# edited\n")
    run_suite(find_suite(str(tmp_path / "two" / "tiny.toml")), Options(out=out))
    assert len(records(out)) == len(held) + 3  # the attack, and the two stages after it


def test_a_bundle_of_a_file_is_a_strangers(tmp_path: Path) -> None:
    suite = suite_in(tmp_path / "one")
    run_suite(suite, Options(out=tmp_path / "out"))
    bundle, mine = tmp_path / "out" / "tiny" / "bundle", suite.defenses[0].defense
    with pytest.raises(UsageError, match=r"'file:Mine' is in a file; name your copy of mine.py"):
        verify_bundle(bundle, setting=Setting(allow_plugins=True))
    with pytest.raises(UsageError, match=r"is code of mine.py; allow it with --trust-plugins"):
        verify_bundle(bundle, setting=Setting(files={"file:Mine": mine}))
    report = verify_bundle(bundle, setting=Setting(files={"file:Mine": mine}, allow_plugins=True))
    assert report.ok, report.failures
    assert report.rows[0].notes == ()
    other = tmp_path / "other.py"
    other.write_text(DEFENSE + "# not the same\n")
    setting = Setting(files={"file:Mine": str(other)}, allow_plugins=True)
    (row,) = verify_bundle(bundle, setting=setting).rows
    assert row.notes == ("the defense's source is not the one that the row was computed with",)


def test_neither_a_bundle_nor_weights_can_name_a_file_to_run(tmp_path: Path) -> None:
    suite = suite_in(tmp_path / "one")
    run_suite(suite, Options(out=tmp_path / "out"))
    evil = tmp_path / "evil.py"
    evil.write_text(DEFENSE + f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    manifest = tmp_path / "out" / "tiny" / "bundle" / "manifest.json"
    data = json.loads(manifest.read_text())
    data.pop("sha256")
    data["rows"][0]["case"]["defense"] = f"{evil}:Mine"
    manifest.write_text(sealed(data))
    with pytest.raises(UsageError, match="is not installed"):
        verify_bundle(manifest.parent, setting=Setting(allow_plugins=True))

    case = expand(suite)[0]
    data_ = load_slice("digits", "test", 4).identity()
    model = build_subject(case, data_, Source(()), torch.device("cpu"), None).model
    info = WeightsInfo(f"{evil}:Mine", {}, "digits", f"{evil}", {}, "", 0, True)
    save_weights(model, info, tmp_path / "w.safetensors")
    entry = replace(case.entry, weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(CaseError, match="say defense"):
        build_subject(replace(case, entry=entry), data_, Source(()), torch.device("cpu"), None)
    assert not (tmp_path / "ran").exists()


def test_one_loader_finds_a_file_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    place = located("defense", "mine.py")
    assert place == f"{tmp_path / 'mine.py'}:Mine"
    assert located("defense", "../mine.py", tmp_path / "attacks") == place
    assert located("defense", "deq") == "deq"
    assert public_name("defense", place) == "file:Mine"
    assert public_name("defense", "mine.py") == "file:Mine"
    classes = {plugin_class("defense", place), *classes_in("mine.py"), class_in("defense", place)}
    assert len(classes) == 1
    assert type(load("defense", "mine.py", {})) in classes
    assert provider("defense", place).distribution == "mine.py"
    with pytest.raises(UsageError, match="has no parameter 'lgo'; did you mean 'log'"):
        load("defense", "mine.py", {"lgo": ""})


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"mine.py"', '"nowhere.py"', "nowhere.py does not exist"),
        ('"mine.py"', '"mine.py:Mien"', "did you mean 'Mine'"),
        ('"mine.py"', '"attacks/noise.py"', "defines no defense"),
        ('"attacks/noise.py"', '"mine.py:Mine"', "defines no attack"),
        ('"mine.py"', '"both.py"', "several defenses; write one of: both.py:Mine, both.py:Other"),
        ('"mine.py"', '"broken.py"', "broken.py cannot be run: ZeroDivisionError"),
        ('"mine.py"', '"leaves.py"', "leaves.py cannot be run: SystemExit"),
        ('"mine.py"', '"shadow.py"', "another module of that name is loaded already"),
        ('"mine.py"', '"loose.py"', "is not a frozen dataclass"),
        (
            'defense = "mine.py"',
            'defense = "mine.py"\n[[defenses]]\nid = "Twin"\ndefense = "attacks/mine.py"',
            "two files define the defense Mine",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence(old: str, new: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    suite_in(folder)
    (folder / "both.py").write_text(DEFENSE + "class Other(Mine):\n    pass\n")
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "leaves.py").write_text("raise SystemExit(3)\n")
    (folder / "shadow.py").write_text("import colorsys\n" + DEFENSE)
    (folder / "loose.py").write_text(DEFENSE.replace("@dataclass(frozen=True, kw_only=True)", ""))
    (folder / "attacks" / "mine.py").write_text(DEFENSE + "# another\n")
    __import__("colorsys")
    (folder / "colorsys.py").write_text("")
    (folder / "tiny.toml").write_text(SUITE.replace(old, new))
    with pytest.raises(UsageError, match=words) as caught:
        find_suite(str(folder / "tiny.toml"))
    assert "\n" not in str(caught.value)


def test_sources_are_told_apart_by_content_and_neighbors(tmp_path: Path) -> None:
    def digest_of(folder: str, name: str = "mine.py", helper: str = "x = 1\n") -> str:
        place = tmp_path / folder
        place.mkdir()
        unique = f"helper_{folder}"  # modules of one name are loaded once in a process
        (place / f"{unique}.py").write_text(helper)
        (place / name).write_text(f"import {unique}\n" + DEFENSE)
        digest = source_digest(load("defense", f"{place / name}", {}))
        (place / f"{unique}.py").write_text(helper + "y = 2\n")
        (place / name).write_text(f"import {unique}\n" + DEFENSE + "# again\n")
        assert source_digest(load("defense", f"{place / name}", {})) != digest
        return digest

    assert len({digest_of("a"), digest_of("b")}) == 2
    plain = [tmp_path / "c.py", tmp_path / "d.py"]
    for file in plain:
        file.write_text(DEFENSE)
    first, second = (source_digest(load("defense", str(file), {})) for file in plain)
    assert first == second
    # An edit is seen at once, in the same second and of the same length.
    plain[0].write_text(DEFENSE.replace("A line", "A lone"))
    edited = load("defense", str(plain[0]), {})
    assert edited.about.title == "A lone"
    assert source_digest(edited) != first


def test_training_a_file_gives_weights_that_run_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    train = ["train", "mine.py", "--out", "w.safetensors", "--recipe-set", "epochs=2"]
    assert command([*train], monkeypatch, capsys)[0] == 0
    info, first = read_info(Path("w.safetensors")), file_sha256(Path("w.safetensors"))
    assert info.defense == "file:Mine"
    written = Path("w.safetensors").stat().st_mtime_ns
    assert command([*train], monkeypatch, capsys)[0] == 0
    assert Path("w.safetensors").stat().st_mtime_ns == written  # it was done already
    file = Path("mine.py")
    file.write_text(DEFENSE.replace("x.flatten(1)", "2 * x.flatten(1)"))
    assert command([*train], monkeypatch, capsys)[0] == 0
    assert file_sha256(Path("w.safetensors")) != first  # edited code is trained again

    run = ["run", "tiny.toml", "--only", "^Mine$", "--battery", "standard", "--samples", "3"]
    with_weights = ["--plugin", "mine.py=w.safetensors", "--plugin", "attacks/noise.py:Noise"]
    code, _, err = command([*run, *with_weights], monkeypatch, capsys)
    assert code == 0, err
    folder = tmp_path / "out" / "tiny"
    table = pd.read_csv(folder / "table.csv")
    assert list(table["id"]) == ["Mine"]
    assert list(table["weights_sha256"]) == [file_sha256(Path("w.safetensors"))]
    text = (folder / "run.json").read_text()
    assert json.loads(text)["rows"][0]["expected"] == {"0": ["autoattack", "file:Noise"]}
    assert str(tmp_path) not in text
    assert str(tmp_path) not in (folder / "bundle" / "manifest.json").read_text()
    arguments = ["verify", str(folder / "bundle"), "--plugin", "mine.py"]
    assert command([*arguments], monkeypatch, capsys)[0] == 2
    code, text, err = command([*arguments, "--trust-plugins"], monkeypatch, capsys)
    assert code == 0, text + err


def test_only_chooses_among_the_suites_rows_and_leaves_those_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = ["run", "digits", "--samples", "2", "--estimate", "--plugin", "mine.py"]
    chosen = ["--only", "^Standard_feedforward$"]
    code, out, err = command([*run, *chosen], monkeypatch, capsys)
    assert code == 0, err
    rows = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    # The first column is as wide as the terminal lets it be.
    assert [row.rstrip("…") for row in rows] == [rows[0].rstrip("…"), "Mine"]
    assert "Standard_feedforward".startswith(rows[0].rstrip("…"))
    code, _, err = command([*run, "--only", "nowhere"], monkeypatch, capsys)
    assert code == 2
    assert "is found in no row" in err


RECIPE = """
from dataclasses import dataclass
from robustdeq.training.clean import Clean

@dataclass(frozen=True, kw_only=True)
class Quick(Clean):
    epochs: int = 1
"""


def test_a_recipe_can_be_a_file_too(tmp_path: Path) -> None:
    row = 'weights = "w.safetensors"\ntraining = { recipe = "quick.py", seed = 3 }\n'
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "quick.py").write_text(RECIPE)
    suite = suite_in(folder, SUITE + row)
    (job,) = jobs_of(suite, folder)
    assert run_job(job, device=torch.device("cpu")).complete
    info = read_info(folder / "w.safetensors")
    assert (info.defense, info.recipe, info.seed) == ("file:Mine", "file:Quick", 3)
    assert str(folder) not in (folder / "w.safetensors").read_bytes().decode("latin-1")
    assert as_data(suite)["defenses"][0]["training"]["recipe"] == "file:Quick"
    case, data = expand(suite)[0], load_slice("digits", "test", 4).identity()
    subject = build_subject(case, data, Source((folder,)), torch.device("cpu"), None)
    assert subject.case["training_seed"] == 3


def test_weights_that_were_trained_in_another_form_are_deployed_in_their_own(
    tmp_path: Path,
) -> None:
    text = (
        DEFENSE
        + """
    purify: bool = True
    def trained_as(self):
        from dataclasses import replace
        return replace(self, purify=False)
"""
    )
    (tmp_path / "pure.py").write_text(text)
    info = WeightsInfo(
        "file:Mine", {"log": "a", "purify": False}, "digits", "clean", {}, "", 0, True
    )
    save_weights(torch.nn.Linear(1, 1), info, tmp_path / "w.safetensors")
    more = additions([f"{tmp_path / 'pure.py'}={tmp_path / 'w.safetensors'}"])
    assert more.defenses[0].parameters == {"log": "a"}
    assert more.defenses[0].dataset == "digits"


def test_a_plugin_without_weights_stands_as_it_is_built(tmp_path: Path) -> None:
    suite = suite_in(tmp_path)
    more = additions([str(tmp_path / "mine.py"), "pgd"])
    wide = more.attacks_in(more.rows_in(suite))
    assert [entry.id for entry in wide.defenses] == ["Guest", "Mine"]
    assert [entry.attack for entry in wide.attacks[2:]] == ["pgd"]
    assert wide.defenses[1].weights == ""
    assert as_data(wide)["defenses"][1]["defense"] == "file:Mine"
    with pytest.raises(UsageError, match="gives the row Mine twice"):
        more.rows_in(wide)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere.py", "does not exist"),
        ("mine.py=w.pt", "robustdeq convert"),
        ("mine.py=none.safetensors", "do not exist"),
        ("attacks/noise.py=w.safetensors", "its file has none"),
        ("both.py=w.safetensors", "its file has Mine, Other"),
        ("deqq", "did you mean 'deq'"),
        ("deq=w.safetensors", "weights w.safetensors are of file:Mine, not of deq"),
    ],
)
def test_wrong_additions_are_one_sentence(
    text: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    suite_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "both.py").write_text(
        DEFENSE + "@dataclass(frozen=True)\nclass Other(Mine):\n    pass\n"
    )
    info = WeightsInfo("file:Mine", {}, "digits", "clean", {}, "", 0, True)
    save_weights(torch.nn.Linear(1, 1), info, tmp_path / "w.safetensors")
    code, _, err = command(["run", "tiny.toml", "--plugin", text], monkeypatch, capsys)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_evaluate_takes_plugin_objects_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    defense, attack = load("defense", "mine.py", {}), load("attack", "attacks/noise.py", {})
    chunk = chunk_of(load_slice("digits", "test", 6), 0, torch.device("cpu"))
    settings: dict[str, Any] = {"threat": "Linf:0.2", "attacks": [attack, "attacks/noise.py"]}
    fresh = robustdeq.evaluate(defense, chunk.x, chunk.y, **settings)
    assert (fresh.id, fresh.status) == ("Mine", "ok")
    again = robustdeq.evaluate(defense, chunk.x, chunk.y, **settings)
    assert again.weights_sha256 == fresh.weights_sha256  # built under the seed
    train = ["train", "mine.py", "--out", "w.safetensors", "--recipe-set", "epochs=8"]
    assert command([*train], monkeypatch, capsys)[0] == 0
    trained = robustdeq.evaluate(
        defense, chunk.x[:2], chunk.y[:2], weights="w.safetensors", **settings
    )
    assert trained.clean_acc is not None
    assert trained.clean_acc >= 0.5
    other = load("defense", "mine.py", {"log": "x.log"})
    with pytest.raises(CaseError, match="but the plugin says"):
        robustdeq.evaluate(other, chunk.x, chunk.y, weights="w.safetensors", **settings)
    with pytest.raises(UsageError, match="load them into the module before"):
        robustdeq.evaluate(
            torch.nn.Flatten(), chunk.x, chunk.y, weights="w.safetensors", **settings
        )
    for thing in (type(defense), attack, "mine.py"):
        with pytest.raises(UsageError, match="or a plugin like"):
            robustdeq.evaluate(thing, chunk.x, chunk.y, **settings)
