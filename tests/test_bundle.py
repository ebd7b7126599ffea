"""Bundles on disk: what is written, what is damaged, what is hostile."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import (
    SAMPLES,
    bundle_again,
    clean_images,
    held_examples,
    plain,
    replace_examples,
    rewrite,
    row_of,
    whys,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from robustdeq.errors import CaseError, UsageError
from robustdeq.evidence.bundle import MANIFEST, read_bundle, sealed
from robustdeq.evidence.bundling import Parts, write_bundle
from robustdeq.evidence.verify import verify_bundle
from robustdeq.keys import file_sha256
from robustdeq.reporting.run import read_index, read_run, write_index


def test_the_bundle_holds_the_examples_of_the_records(finished: Path) -> None:
    verdict = read_run(finished).verdicts[0]
    x, index = held_examples(finished / "bundle")
    fallen = verdict.samples[verdict.samples["broken_by"].notna()]
    assert index.tolist() == fallen["index"].tolist()
    assert 0 < len(index) < SAMPLES
    excess = np.abs(x.astype(np.float64) - clean_images()[index]).max(axis=(1, 2, 3))
    assert (excess <= 0.125 * (1 + 1e-6) + 1e-6).all()
    assert (excess > 0.05).all()
    assert x.min() >= 0
    assert x.max() <= 1
    row = row_of(finished / "bundle")
    assert row.distribution == "robustdeq"
    assert (row.clean_acc, row.robust_acc) == (verdict.clean_acc, verdict.robust_acc)
    assert row.weights is not None
    assert row.weights.sha256 == verdict.weights_sha256
    held = {file_sha256(p) for p in (finished / "bundle" / "weights").iterdir()}
    assert row.weights.sha256 in held
    assert len(held) == 2  # the third row has no file


def test_writing_again_changes_no_byte_and_prunes(run: Path, bundle: Path) -> None:
    files = [p for p in bundle.rglob("*") if p.is_file()]
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
    (bundle / "examples" / "of-an-earlier-run.safetensors").write_bytes(b"")
    bundle_again(run)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in bundle.rglob("*.*")} == before


def test_no_name_leaves_the_folder(bundle: Path) -> None:
    names = [row.examples.name for row in read_bundle(bundle).rows]
    assert all((bundle / "examples" / name).is_file() for name in names)
    assert sorted(p.name for p in bundle.iterdir()) == ["examples", MANIFEST, "weights"]


def test_rows_without_a_robust_accuracy_claim_nothing(run: Path, bundle: Path) -> None:
    data = read_index(run)
    failure = {"label": "pgd", "chunk": 0, "reason": "out of\x1b[2J memory"}
    data["rows"][0]["failures"] = [failure]
    write_index(run, data)
    bundle_again(run)
    row = row_of(bundle)
    assert (row.status, row.note, row.robust_acc) == ("failed", "pgd: out of [2J memory", None)
    assert len(list((bundle / "examples").iterdir())) == 2
    report = verify_bundle(bundle, rows="^(Plain|Equi)")
    assert report.ok
    assert [r.title[:5] for r in report.rows] == ["Equil"]
    assert "failed" in report.skipped[0]
    assert not plain(bundle).ok  # nothing was claimed, so nothing is confirmed


def test_records_that_are_gone_and_weights_that_changed_are_named(run: Path) -> None:
    data = read_index(run)
    verdicts, parts = (
        read_run(run).verdicts,
        Parts(shapes={"digits": (1, 8, 8)}, weights=(), distributions={}),
    )
    for path in (run / "records").iterdir():
        path.unlink()
    with pytest.raises(CaseError, match=r"records of Plain on digits under Linf:0\.125 are gone"):
        write_bundle(run, data, verdicts, parts)
    for path in (run / "bundle" / "weights").iterdir():
        path.unlink()
    with pytest.raises(CaseError, match="weights digits-feedforward-clean"):
        write_bundle(run, data, verdicts, parts)


def test_knows_no_torch() -> None:
    modules = "robustdeq.evidence.bundle, robustdeq.evidence.bundling"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def damage(folder: Path, file: int, change: Callable[[bytes], bytes]) -> str:
    """What is found after a change to one of the files of the row Plain; undone afterwards."""
    row = row_of(folder)
    path = (
        folder / MANIFEST,
        folder / "examples" / row.examples.name,
        folder / "weights" / row.weights.name,
    )[file]
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    try:
        found = whys(plain(folder))
    except UsageError as error:
        found = str(error)
    finally:
        path.write_bytes(whole)
    return found if path.name in found else f"{path.name} is not named!"


@pytest.fixture(scope="module")
def victim(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("victim") / "bundle"
    shutil.copytree(finished / "bundle", folder)
    return folder


@settings(max_examples=60)
@given(st.integers(0, 2), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_any_changed_byte_is_found_and_its_file_named(
    victim: Path, file: int, at: float, mask: int
) -> None:
    def flip(payload: bytes) -> bytes:
        place = int(at * len(payload))
        return payload[:place] + bytes([payload[place] ^ mask]) + payload[place + 1 :]

    assert not damage(victim, file, flip).endswith("!")


@settings(max_examples=15)
@given(st.integers(0, 2), st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_found_and_its_file_named(victim: Path, file: int, at: float) -> None:
    assert not damage(victim, file, lambda p: p[: int(at * len(p))]).endswith("!")


def test_without_damage_nothing_is_found(victim: Path) -> None:
    assert all(damage(victim, file, lambda p: p).endswith("is not named!") for file in range(3))


def hostile(folder: Path, text: str) -> str:
    """What reading a manifest of that text says."""
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UsageError) as caught:
        read_bundle(folder)
    return str(caught.value)


def test_manifests_that_are_none_are_refused_in_one_sentence(bundle: Path) -> None:
    whole = (bundle / MANIFEST).read_text()
    data = {k: v for k, v in json.loads(whole).items() if k != "sha256"}
    texts = {
        "": "not JSON",
        "[1]": "no manifest",
        "[" * 100_000: "nested deeper than 64",
        '{"a":' * 5_000 + "1" + "}" * 5_000: "nested deeper than 64",
        "[" * 100 + "]" * 100: "nested deeper than 64",
        "[]" * 1_000_001: "more than 1000000 lists",
        "9" * 5_000: "not JSON",
        "9" * 30: "more than 64 bits",
        '{"a": 1, "a": 2}': "the key 'a' twice",
        '{"a": NaN}': "NaN",
        '{"a": "\\ud800"}': "half of a surrogate",
        whole.replace(",", ", ", 1): "does not match its seal",
        sealed({**data, "format": 2}): "is of format 2, this version reads 1",
        sealed({**data, "extra": 1}): "'extra' is missing, unknown or malformed",
        sealed({**data, "rows": [data["rows"][0]] * 2}): "holds a row twice",
        sealed({**data, "rows": [1]}): "row 0 is no object",
    }
    for text, wanted in texts.items():
        message = hostile(bundle, text)
        assert re.search(wanted, message), (text[:40], message)
        assert MANIFEST in message
        assert "\n" not in message


@pytest.mark.parametrize(
    "change",
    [
        {"examples": {"name": "../../secret.safetensors", "sha256": "0" * 64}},
        {"examples": {"name": "/etc/passwd", "sha256": "0" * 64}},
        {"examples": None},
        {"weights": {"name": "a.safetensors", "sha256": "0" * 64}},  # not that of the case
        {"indices": [0] * SAMPLES},
        {"indices": list(range(SAMPLES - 1))},
        {"robust": [True] * SAMPLES},
        {"clean_correct": [1] * SAMPLES},
        {"clean_acc": None},
        {"robust_acc": 1.5},
        {"shape": [1, 8, -8]},
        {"flags": ["\x1b[2J"]},
        {"status": 1},
        {"unknown": 1},
    ],
)
def test_malformed_or_contradictory_rows_are_refused(change: dict[str, Any], bundle: Path) -> None:
    rewrite(bundle, lambda row: row.update(change))
    with pytest.raises(UsageError, match=r"manifest\.json, row 0.* get the bundle again"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "change", [{"n": 10**9}, {"n": True}, {"split": "../x"}, {"id": "a\nb"}, {"parameters": []}]
)
def test_malformed_cases_are_refused(change: dict[str, Any], bundle: Path) -> None:
    rewrite(bundle, lambda row: row["case"].update(change))
    with pytest.raises(UsageError, match=r"manifest\.json, row 0, case"):
        read_bundle(bundle)


def test_links_and_files_too_large_are_not_read(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle / "examples" / row_of(bundle).examples.name
    path.rename(tmp_path / "there")
    path.symlink_to(tmp_path / "there")
    assert "no plain file" in whys(plain(bundle))
    path.unlink()
    path.write_bytes(bytes(10**6))
    assert "is larger than" in whys(plain(bundle))
    monkeypatch.setattr("robustdeq.evidence.bundle.LARGEST_MANIFEST", 100)
    with pytest.raises(UsageError, match="larger than the 100 bytes"):
        read_bundle(bundle)


def renew(path: Path, row: dict[str, Any]) -> None:
    """The digest of a file of examples that was written anew."""
    row["examples"]["sha256"] = file_sha256(path)


def test_files_of_another_form_are_refused_whatever_their_digest(bundle: Path) -> None:
    x, index = held_examples(bundle)
    for parts in ({"x": x}, {"x": x.astype(np.float64), "index": index}):
        path = bundle / "examples" / row_of(bundle).examples.name
        save_file(parts, path)
        rewrite(bundle, partial(renew, path))
        assert "holds no" in whys(plain(bundle))
    replace_examples(bundle, x, np.zeros_like(index))
    assert f"{len(index)} inputs for 1 samples" in whys(plain(bundle))
