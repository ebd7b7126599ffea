"""Of damaged inputs of each kind none ends in a traceback, and none in another table.

200 of a kind, or 50 in the default run. They are honest ones with bytes flipped, cut, doubled or
replaced, and texts that are made up.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bundles import whys
from faulty import WHOLE
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from refusals import attempt

from robustdeq.conversion import convert
from robustdeq.datasets import load_slice
from robustdeq.evidence.bundle import MANIFEST, Bundle, read_bundle, sealed
from robustdeq.evidence.verify import verify_bundle
from robustdeq.records import Store
from robustdeq.reporting.images import read_images
from robustdeq.reporting.run import read_run
from robustdeq.suite import Suite, attacks_of, expand, find_suite, parse_suite
from robustdeq.tables import tabulate, to_csv
from robustdeq.threats import Norm, Threat
from robustdeq.weights import read_info, verify_sha256

fuzzed = settings(max_examples=200 if WHOLE else 50, suppress_health_check=[HealthCheck.too_slow])
SUITE = """
name = "small"
threats = ["Linf:8/255", "L2:0.5"]
battery = "standard"
chunk = 4
seed = 1
[curves]
epsilons = [0.0, 1.0]
[[datasets]]
name = "digits"
samples = 8
[[attacks]]
attack = "pgd"
parameters = { steps = 3, loss = "margin" }
gradients = ["honest"]
[[defenses]]
id = "Plain"
defense = "feedforward"
weights = "digits-feedforward-clean.safetensors"
sha256 = "%s"
[defenses.training]
recipe = "pgd_at"
parameters = { epochs = 2 }
""" % ("0" * 64)


@dataclass(frozen=True)
class Damage:
    """What is done to some bytes, wherever `at` (a share of their length) is."""

    kind: str
    at: float
    more: bytes
    mask: int

    def __call__(self, payload: bytes) -> bytes:
        place = int(self.at * len(payload))
        if self.kind == "cut":
            return payload[:place]
        if self.kind == "insert":
            return payload[:place] + self.more + payload[place:]
        if self.kind == "replace":
            return payload[:place] + self.more + payload[place + len(self.more) :]
        if self.kind == "double":
            return payload[: place + 1] + payload[place:]
        middle = bytes([payload[place] ^ self.mask]) if payload else b""
        return payload[:place] + middle + payload[place + 1 :]


DAMAGES = st.builds(
    Damage,
    st.sampled_from(["flip", "flip", "cut", "insert", "replace", "double"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=40)
    | st.sampled_from([b"[" * 2000, b"9" * 5000, b"\0", b"\xff" * 8, b"{", b'"', b"../", b"\x1b"]),
    st.integers(1, 255),
)


@pytest.fixture(scope="module")
def desk(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run, to be damaged and mended again."""
    folder = tmp_path_factory.mktemp("desk") / "small"
    shutil.copytree(finished, folder)
    return folder


def damaged(path: Path, damage: Damage, call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call makes of a damaged file, which is mended afterwards."""
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    try:
        return attempt(call)
    finally:
        path.write_bytes(whole)


def suite_of(text: str | bytes) -> Suite:
    suite = parse_suite(text, "s.toml", None)
    expand(suite)
    attacks_of(suite)
    return suite


@fuzzed
@given(DAMAGES)
def test_a_damaged_suite_is_refused_or_says_what_it_says(damage: Damage) -> None:
    suite, refusal = attempt(lambda: suite_of(damage(SUITE.encode())))
    assert (suite is None) == bool(refusal)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=True).replace("\\u", "\\u")
    if isinstance(value, bool):
        return str(value).lower()
    return '"none"' if value is None else repr(value)


KEYS = (
    "name", "threats", "battery", "chunk", "seed", "curves", "autoattack", "format",
    "description", "datasets", "attacks", "defenses", "folder",
)  # fmt: skip
INNER = ("id", "defense", "weights", "sha256", "parameters", "dataset", "threats", "training")


@fuzzed
@given(st.sampled_from(KEYS), st.sampled_from(["", *INNER]), VALUES)
def test_any_value_under_any_key_of_a_suite_is_refused_or_taken(
    key: str, inner: str, value: Any
) -> None:
    row = {"id": "A", "defense": "feedforward"}
    held: dict[str, Any] = {
        "name": "s",
        "threats": ["Linf:0.1"],
        "datasets": [{"name": "digits", "samples": 2}],
        "attacks": [{"attack": "pgd"}],
        "defenses": [row],
    }
    if inner:
        held["defenses"] = [{**row, inner: value}]
    else:
        held[key] = value
    text = "".join(f"{k} = {toml(v)}\n" for k, v in held.items())
    suite, refusal = attempt(lambda: suite_of(text))
    assert (suite is None) == bool(refusal)


@fuzzed
@given(st.text() | st.text("Linf2:/.0123456789eE+- \u0661_") | st.from_regex(r"(Linf|L2):[^\n]*"))
def test_any_threat_is_refused_or_its_own_text(text: str) -> None:
    threat, refusal = attempt(lambda: Threat.parse(text))
    if threat is None:
        assert "write a norm" in refusal or "radius" in refusal
        return
    assert threat.norm in Norm
    assert 0 <= threat.eps < float("inf")
    assert Threat.parse(str(threat)) == threat


@fuzzed
@given(DAMAGES)
def test_a_damaged_manifest_is_found(desk: Path, damage: Damage) -> None:
    path = desk / "bundle" / MANIFEST
    same = damage(path.read_bytes()) == path.read_bytes()
    bundle, refusal = damaged(path, damage, lambda: read_bundle(path.parent))
    assert (MANIFEST in refusal) != same
    assert (bundle is None) != same


@fuzzed
@given(st.data())
def test_a_forged_manifest_is_refused_or_read_whole(desk: Path, data: st.DataObject) -> None:
    """Any value anywhere, sealed again as a forger would."""
    path = desk / "bundle" / MANIFEST
    held = json.loads(path.read_text())
    held.pop("sha256")
    cases = [row["case"] for row in held["rows"]]
    place: Any = data.draw(st.sampled_from([held, *held["rows"], *cases]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(VALUES)
    text, _ = attempt(lambda: sealed(held))
    payload = (text or "").encode()
    bundle, refusal = damaged(path, Damage("cut", 0.0, b"", 1), lambda: read_forged(path, payload))
    assert (bundle is None) == bool(refusal)
    for row in bundle.rows if bundle is not None else ():
        assert row.title.isprintable()
        assert row.robust_acc is None or 0 <= row.robust_acc <= 1


def read_forged(path: Path, payload: bytes) -> Bundle:
    path.write_bytes(payload)
    return read_bundle(path.parent)


@fuzzed
@given(DAMAGES, st.integers(0, 1))
def test_damaged_examples_and_weights_of_a_bundle_are_found(
    desk: Path, damage: Damage, part: int
) -> None:
    """By their digests, before anything in them is looked at; so that no figure can be another."""
    bundle = read_bundle(desk / "bundle")
    row = bundle.find("Plain")
    assert row.examples is not None
    assert row.weights is not None
    place = (("examples", row.examples.name), ("weights", row.weights.name))[part]
    path = bundle.folder.joinpath(*place)
    read = (lambda: bundle.examples(row), lambda: bundle.weights(row))[part]
    same = damage(path.read_bytes()) == path.read_bytes()
    found, refusal = damaged(path, damage, read)
    assert (found is None) != same
    assert (path.name in refusal) != same


@settings(fuzzed, max_examples=12)
@given(DAMAGES, st.integers(0, 2))
def test_verify_never_confirms_another_figure(desk: Path, damage: Damage, part: int) -> None:
    bundle = read_bundle(desk / "bundle")
    row = bundle.find("Plain")
    assert row.examples is not None
    assert row.weights is not None
    places = ((MANIFEST,), ("examples", row.examples.name), ("weights", row.weights.name))
    path = bundle.folder.joinpath(*places[part])
    same = damage(path.read_bytes()) == path.read_bytes()
    report, _ = damaged(path, damage, lambda: verify_bundle(bundle.folder, rows="^Plain"))
    if report is None or not report.ok:
        assert not same
        return
    assert same, whys(report)
    assert [(r.clean_found, r.robust_found) for r in report.rows] == [
        (row.clean_acc, row.robust_acc)
    ]


@fuzzed
@given(DAMAGES)
def test_damaged_weights_are_found_and_never_a_traceback(
    desk: Path, tmp_path_factory: pytest.TempPathFactory, damage: Damage
) -> None:
    """With a digest every byte counts; without one the file is refused or is what it says."""
    row = read_bundle(desk / "bundle").find("Plain")
    assert row.weights is not None
    path = desk / "bundle" / "weights" / row.weights.name
    same = damage(path.read_bytes()) == path.read_bytes()
    _, refusal = damaged(path, damage, lambda: verify_sha256(path, row.weights.sha256))
    assert ("sha256" in refusal) != same
    damaged(path, damage, lambda: read_info(path))
    out = tmp_path_factory.getbasetemp() / "converted.safetensors"
    given = {"defense": "feedforward", "dataset": "digits"}
    parameters = {"width": 96, "inner": 96}
    if damage.at < 0.2:  # of the others most are in a tensor, and a model is built for each
        damaged(path, damage, lambda: convert(path, out, parameters=parameters, **given))


@fuzzed
@given(DAMAGES)
def test_a_damaged_checkpoint_of_another_program_is_refused(
    tmp_path_factory: pytest.TempPathFactory, damage: Damage
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path, out = folder / "damaged.pt", folder / "converted.safetensors"
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3), "b": torch.ones(2, 2)}, buffer)
    path.write_bytes(damage(buffer.getvalue()))
    _, refusal = attempt(
        lambda: convert(
            path, out, defense="feedforward", parameters={}, dataset="digits", allow_pickle=True
        )
    )
    assert "weights" in refusal


@pytest.fixture(scope="module")
def table(desk: Path) -> str:
    return to_csv(tabulate(read_run(desk).verdicts))


@fuzzed
@given(DAMAGES, st.integers(0, 20))
def test_a_damaged_record_is_refused_by_name(desk: Path, damage: Damage, number: int) -> None:
    """Header, body and footer of Parquet: it is as it was written, or it is refused."""
    paths = sorted((desk / "records").iterdir())
    path = paths[number % len(paths)]
    store = Store(path.parent)
    whole = store.read(path.stem)
    assert whole is not None
    found, refusal = damaged(path, damage, lambda: store.read(path.stem))
    if refusal:
        assert f"{path} is damaged" in refusal
    else:
        assert found.content_digest == whole.content_digest


@pytest.mark.faults
@settings(fuzzed, max_examples=25, phases=[Phase.generate])
@given(DAMAGES, st.integers(0, 20))
def test_a_damaged_record_gives_no_other_figure(
    desk: Path, table: str, damage: Damage, number: int
) -> None:
    paths = sorted((desk / "records").iterdir())
    path = paths[number % len(paths)]
    run, refusal = damaged(path, damage, lambda: read_run(desk))
    if refusal:
        assert f"{path} is damaged" in refusal
        return
    was = pd.read_csv(io.StringIO(table)).set_index("id")
    now = tabulate(run.verdicts).set_index("id")
    for name in now.index:
        if pd.notna(now["robust_acc"][name]):  # else it is n/a, and not ranked
            assert now["robust_acc"][name] == pytest.approx(was["robust_acc"][name])
            assert now["flags"][name] == was["flags"].fillna("")[name]


@fuzzed
@given(DAMAGES)
def test_damaged_images_of_a_run_are_refused_by_name(desk: Path, damage: Damage) -> None:
    images, refusal = damaged(desk / "images.parquet", damage, lambda: read_images(desk))
    assert not refusal or f"{desk / 'images.parquet'} is damaged" in refusal
    assert all(image.dtype == np.uint8 and image.ndim == 3 for image in (images or {}).values())


def data_set(folder: Path) -> Path:
    rows = []
    for label in range(6):
        stream = io.BytesIO()
        Image.fromarray(np.full((8, 8), 40 * label, np.uint8)).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue()}, "label": label})
    pd.DataFrame(rows).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


@fuzzed
@given(DAMAGES)
def test_a_damaged_data_set_is_refused_or_has_its_own_digest(
    tmp_path_factory: pytest.TempPathFactory, damage: Damage
) -> None:
    path = tmp_path_factory.getbasetemp() / "data.parquet"
    if not path.exists():
        data_set(path.parent)
    whole = load_slice(str(path), "test")
    data, _ = damaged(path, damage, lambda: load_slice(str(path), "test"))
    if data is None:
        return
    equal = np.array_equal(data.images, whole.images) and np.array_equal(data.labels, whole.labels)
    assert (data.digest == whole.digest) == (equal and data.spec == whole.spec)


def test_an_undamaged_suite_is_taken() -> None:
    assert suite_of(SUITE).name == "small"
    assert find_suite("digits").name == "digits"
