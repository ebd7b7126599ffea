"""`robustdeq new`, and an author's whole way: new, edit, check, train, run."""

from __future__ import annotations

import json
import keyword
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from terminal import command

from robustdeq.contract.check import check_plugin
from robustdeq.contract.templates import Template, class_name, template, write_template
from robustdeq.errors import UsageError
from robustdeq.interfaces import kind_of
from robustdeq.plugin_files import classes_in

TINY = """
name = "tiny"
threats = ["Linf:3/16"]
[[datasets]]
name = "digits"
samples = 6
[[attacks]]
attack = "pgd"
parameters = { steps = 3 }
[[defenses]]
id = "Plain"
defense = "feedforward"
parameters = { width = 96, inner = 96 }
weights = "digits-feedforward-clean.safetensors"
"""


@pytest.mark.parametrize("kind", ["defense", "attack"])
def test_a_new_plugin_is_short_and_passes_the_check_as_it_stands(kind: str, tmp_path: Path) -> None:
    path = write_template(kind, "my_plugin", tmp_path)
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    report = check_plugin(str(path), minutes=0.05)
    assert report.ok, "\n".join(report.lines())
    (plugin,) = report.plugins
    assert (plugin.kind, plugin.name) == (kind, "MyPlugin")
    skipped = [f.name for f in plugin.findings if f.outcome == "skipped"]
    assert not skipped


NAMES = st.one_of(
    st.text(max_size=12),
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True),
    st.sampled_from(["model", "about", "none", "true", "tensor", "access", "class", "match", "_",
                     "a__b", "NAME", "MY_NAME", "torch", "json", "deq", "pgd", "trades", "é", "ﬁ",
                     "a/b", "../a", "", "x" * 61, "data_spec", "nn", "a\n", "target", "my-deq"]),
)  # fmt: skip


@settings(max_examples=150)
@given(name=NAMES, kind=st.sampled_from(["defense", "attack"]))
def test_any_name_gives_a_plugin_or_one_sentence(name: str, kind: Template) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = write_template(kind, name, Path(folder))
        except UsageError as refusal:
            said = str(refusal)
        else:
            said = ""
        if said:
            assert "\n" not in said
            assert not list(Path(folder).iterdir())
            return
        assert list(Path(folder).iterdir()) == [path]
        assert path.name == f"{name}.py"
        assert name.isidentifier()
        assert not keyword.iskeyword(name)
        (cls,) = classes_in(str(path))
        assert kind_of(cls()) == kind
        assert cls.__name__ == class_name(kind, name)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("defense", "my-deq", "cannot be the name of a module"),
        ("defense", "2deq", "cannot be the name of a module"),
        ("attack", "class", "cannot be the name of a module"),
        ("attack", "_mine", "cannot be the name of a module"),
        ("defense", "deq", "a defense 'deq' is registered already"),
        ("defense", "pgd", "an attack 'pgd' is registered already"),
        ("attack", "trades", "a recipe 'trades' is registered already"),
        ("defense", "torch", "a module 'torch' is installed already"),
        ("recipe", "mine", "write defense or attack"),
    ],
)
def test_other_names_are_refused_in_one_sentence(
    kind: str,
    name: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = command(["new", kind, name, "--out", str(tmp_path)], monkeypatch, capsys)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("precious")
    (tmp_path / "led.py").symlink_to(tmp_path / "nowhere.py")
    for name in ("mine", "led"):
        code, _, err = command(["new", "attack", name, "--out", str(tmp_path)], monkeypatch, capsys)
        assert code == 2
        assert "is there already" in err
        assert err.count("\n") == 1
    assert (tmp_path / "mine.py").read_text() == "precious"
    assert not (tmp_path / "nowhere.py").exists()


def test_a_class_never_hides_what_its_file_needs() -> None:
    assert class_name("defense", "my_deq") == "MyDeq"
    assert class_name("defense", "model") == "ModelDefense"
    assert class_name("attack", "target") == "TargetAttack"
    assert class_name("attack", "none") == "NoneAttack"
    assert "robustdeq check MY_NAME.py" in template("defense", "MY_NAME")


def test_an_authors_whole_way_takes_five_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    code, text, _ = command(["new", "defense", "my_deq"], monkeypatch, capsys)
    assert code == 0
    told = [line.strip() for line in text.splitlines()[1:]]
    assert told == [
        "robustdeq check my_deq.py",
        "robustdeq train my_deq.py --dataset digits --out my_deq.safetensors",
        "robustdeq run digits --plugin my_deq.py=my_deq.safetensors",
    ]
    file = tmp_path / "my_deq.py"
    file.write_text(file.read_text().replace('"pgd_at"', '"clean"').replace("* 0.9", "* 0.8"))

    code, text, _ = command([*told[0].split()[1:], "--minutes", "0.05"], monkeypatch, capsys)
    assert code == 0, text
    assert text.endswith("MyDeq passes.\n")

    brief = ["--set", "width=48", "--recipe-set", "epochs=8"]
    code, text, _ = command([*told[1].split()[1:], *brief], monkeypatch, capsys)
    assert code == 0, text
    assert "(complete)" in text

    run = ["run", "tiny.toml", *told[2].split()[3:]]
    code, text, err = command([*run], monkeypatch, capsys)
    assert code == 0, err
    table = pd.read_csv(tmp_path / "out" / "tiny" / "table.csv").set_index("id")
    assert set(table.index) == {"Plain", "MyDeq"}
    assert table.loc["MyDeq", "status"] == "ok"
    assert table.loc["MyDeq", "clean_acc"] >= 0.5
    data = json.loads((tmp_path / "out" / "tiny" / "run.json").read_text())
    (row,) = (row for row in data["rows"] if row["case"]["id"] == "MyDeq")
    assert row["case"]["parameters"] == {"width": 48}
    assert row["about"]["title"] == "What it is, in a line"

    code, text, _ = command(["report", "out"], monkeypatch, capsys)
    assert code == 0
    assert "| MyDeq | file:MyDeq |" in text
