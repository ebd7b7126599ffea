"""Names of strangers: whatever is taken as one stays in its folder, and on its line."""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from refusals import attempt

from robustdeq import registry
from robustdeq.contract.templates import DEFENSE
from robustdeq.errors import UsageError
from robustdeq.evidence.bundle import _file
from robustdeq.plain_names import LONGEST_FILE, check_file_name, is_plugin_name
from robustdeq.plugin_files import public_name, reference
from robustdeq.registry import registered
from robustdeq.suite import parse_suite, unpinned

HOSTILE = (
    "..", ".", "", "../up", "/abs", "a/../../b", "a\\b", "C:\\x", "C:x", "a\0b", "a\nb", "\x1b[2J",
    "CON", "nul.txt", "com1", "-rf", "~root", ".git", "a.", "a ", "\u202eabc", "e\u0301",
    "A" * 300, "\N{GRINNING FACE}" * 100, "\ud800",
)  # fmt: skip
NAMES = st.text() | st.text("./\\:~-ab\0\n\x1b A") | st.sampled_from(HOSTILE)
SUITE = """
threats = ["Linf:0.1"]
datasets = [{ name = "digits", samples = 2 }]
attacks = [{ attack = "pgd" }]
"""


def quoted(text: str) -> str:
    """A TOML string; half of a surrogate pair has none."""
    marks = "".join(
        f"\\U{ord(c):08X}" if not c.isalnum() or not c.isascii() else c
        for c in text.encode(errors="replace").decode()
    )
    return f'"{marks}"'


def suite(**given: str) -> Any:
    row = {"id": "A", "defense": "feedforward"} | {k: v for k, v in given.items() if k != "name"}
    table = ", ".join(f"{key} = {quoted(value)}" for key, value in row.items())
    text = f"name = {quoted(given.get('name', 's'))}\n{SUITE}defenses = [{{ {table} }}]\n"
    return parse_suite(text, "s.toml", None)


def test_hostile_names_are_no_files() -> None:
    for name in HOSTILE:
        with pytest.raises(UsageError, match="give letters") as caught:
            check_file_name(name, "name")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 250


@given(NAMES)
@example("digits-ablations.v2")
def test_a_suites_folder_is_directly_in_the_results_whatever_its_name(name: str) -> None:
    made, refusal = attempt(lambda: suite(name=name))
    if refusal:
        return
    held = made.name
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out) / held
        folder.mkdir()
        assert folder.resolve().parent == Path(out).resolve()
        assert [p.name for p in Path(out).iterdir()] == [held]
        # What write_atomically puts beside a file of that name is a name as well.
        (folder.parent / f".{held}.12345678").touch()
    assert len(held.encode()) <= LONGEST_FILE


@given(NAMES, st.sampled_from(["id", "weights", "sha256", "defense"]))
def test_texts_of_a_suite_are_lines_or_refused(text: str, part: str) -> None:
    made, refusal = attempt(lambda: suite(**{part: text}))
    if refusal:
        return
    (row,) = made.defenses
    assert row.id.isprintable()
    assert row.weights.isprintable()
    assert not row.weights or row.weights.endswith(".safetensors")
    assert row.sha256 == ""


def test_weights_without_a_digest_are_told() -> None:
    assert unpinned(suite(weights="w.safetensors")) == ["A"]
    assert unpinned(suite(weights="w.safetensors", sha256="0" * 64)) == []
    assert unpinned(suite()) == []
    with pytest.raises(UsageError, match="give the 64 hexadecimal digits"):
        suite(weights="w.safetensors", sha256="abc")


@given(NAMES | NAMES.map(lambda n: f"{n}.safetensors"))
@example("a.safetensors")
def test_files_of_a_bundle_are_directly_in_its_folders(name: str) -> None:
    if not _file({"name": name, "sha256": "0" * 64}):
        return
    assert Path("/b", name).resolve().parent == Path("/b")
    assert name.isascii()
    assert name.isprintable()
    assert len(name) < 150
    assert Path(name).suffix == ".safetensors"


def test_some_names_are_files_of_a_bundle() -> None:
    assert _file({"name": "Plain-on-digits-0a1b.safetensors", "sha256": "0" * 64})
    for name in ("con.safetensors", "a/b.safetensors", "..safetensors", "a.SAFETENSORS", 3, None):
        assert not _file({"name": name, "sha256": "0" * 64})


class Entry(metadata.EntryPoint):
    """An entry point of nobody."""


@given(NAMES)
@example("my_deq-2.1")
def test_names_of_entry_points_are_plain_or_refused(name: str) -> None:
    entry = Entry(name, "nowhere:X", "robustdeq.defenses")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "entry_points", lambda group: [entry])
        patch.setattr(registry, "_places", lambda: ((name,),))  # not what was found before
        held, refusal = attempt(lambda: registered("defense"))
    assert bool(refusal) != is_plugin_name(name)
    if held is None:
        return
    assert list(held) == [name]
    assert name.isascii()
    assert name.isprintable()
    assert reference(name) is None  # no file is meant
    assert not {"/", "\\", ":", "\0"} & set(name)


def test_a_class_cannot_bear_a_name_that_python_has_not(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(DEFENSE.replace("NAME", "X") + "\nX.__name__ = '../\\x1b[2J'\n")
    with pytest.raises(UsageError, match="a name that can be written in Python") as caught:
        public_name("defense", str(file))
    assert str(caught.value).isprintable()
