"""Files that ask for more than they are: refused before memory or time is spent."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save
from terminal import command

from robustdeq import bounded
from robustdeq.bounded import (
    BoundError,
    check_safetensors,
    parse_json,
    parse_toml,
    read_bytes,
    read_parquet,
)
from robustdeq.datasets import load_slice
from robustdeq.errors import CaseError, UsageError
from robustdeq.evidence.bundle import read_examples
from robustdeq.tables import to_csv
from robustdeq.weights import WeightsInfo, load_weights, read_info, save_weights

INFO = WeightsInfo("deq", {"width": 3}, "digits", "clean", {}, "", 0, complete=True)


def parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * 5000 + "]" * 5000, "nested deeper than 64"),
        (".".join(["a"] * 500) + " = 1", "nested deeper than 64"),
        ("a = 1" + "0" * 30, "more than 64 bits"),
        ("a = 1" + "0" * 5000, "is not valid TOML"),
        ("a = nan", "NaN"),
        ("a = 1\na = 2", "is not valid TOML"),
        ("#" * (2**20 + 1), "larger than"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"a = '\x1b[2J'", "is not valid TOML"),
    ],
)
def test_toml(text: str | bytes, words: str) -> None:
    begun = time.monotonic()
    with pytest.raises(BoundError, match=words) as caught:
        parse_toml(text)
    assert str(caught.value).isprintable()
    assert time.monotonic() - begun < 5


def test_what_is_honest_is_read() -> None:
    assert parse_toml("a = 9223372036854775807\nb = inf") == {"a": 2**63 - 1, "b": float("inf")}
    text = '{"a": [1, 2.5, null, true, "\\u00e9\\ud83d\\ude00"], "b": Infinity}'
    assert parse_json(text) == json.loads(text)
    assert parse_json("[" * 60 + "]" * 60)
    assert read_parquet(parquet(pa.table({"a": range(1000)})), rows=300)["a"][-1].as_py() == 299
    assert read_parquet(parquet(pa.table({"a": [], "b": []})), ["b"]).num_rows == 0


@pytest.mark.parametrize(
    ("table", "options", "words"),
    [
        ({"a": np.zeros(10**7 + 1, bool)}, {}, "declares 10000001 rows"),
        ({f"c{k}": [1] for k in range(1001)}, {}, "has 1001 columns"),
        ({"a": [bytes(2**20)] * 9}, {"compression": "zstd", "use_dictionary": False}, "unpacked"),
        # One value of a megabyte, named in a few bits by each of its rows.
        ({"a": [bytes(2**20)] * 600}, {"compression": "zstd"}, "unpacks to more than"),
    ],
)
def test_parquet_bombs(table: Any, options: Any, words: str) -> None:
    payload = parquet(pa.table(table), **options)
    assert len(payload) < 2**19
    with pytest.raises(BoundError, match=words):
        read_parquet(payload, largest=2**23)


def test_an_image_that_declares_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6)))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    for image, words in ((bomb + chunk(b"IEND", b""), "pixels"), (eps, "cannot identify")):
        frame = pd.DataFrame({"image": [{"bytes": image}], "label": [0]})
        frame.to_parquet(tmp_path / "a.parquet")
        with pytest.raises(UsageError, match=rf"cannot be decoded .*{words}"):
            load_slice(str(tmp_path / "a.parquet"))


def test_labels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": [{"bytes": b""}], "label": ["cat"]})
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="labels of type"):
        load_slice(str(tmp_path / "a.parquet"))


def test_devices_pipes_and_large_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(BoundError, match="no plain file"):
            read_bytes(path)
    (tmp_path / "a").write_bytes(bytes(11))
    with pytest.raises(BoundError, match="larger than the 10 bytes"):
        read_bytes(tmp_path / "a", 10)


def tensors(header: Any, body: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(begin: int, end: int, shape: Any = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


LIBRARY = "is not safetensors|cannot be read"
BAD = {
    "a header of 2^60 bytes": (struct.pack("<Q", 2**60), "has a header of"),
    "a header beyond its end": (struct.pack("<Q", 1000) + b"{}", "should have 1000 bytes"),
    "no header": (b"\1", "is not safetensors"),
    "a list": (tensors([]), "no object"),
    "no JSON": (tensors(b"{"), "is not JSON"),
    "deep": (tensors(b'{"a":' * 500 + b"1" + b"}" * 500), "nested deeper"),
    "a tensor twice": (tensors(b'{"a": 1, "a": 2}'), "twice"),
    "outside": (tensors({"a": entry(0, 4), "b": entry(4, 12, (2,))}), "outside of the file"),
    "before": (tensors({"a": entry(-4, 0)}), "outside of the file"),
    "backwards": (tensors({"a": entry(8, 4)}), "outside of the file"),
    "no offsets": (tensors({"a": {"dtype": "F32", "shape": [1]}}), "malformed tensor"),
    "no tensor": (tensors({"a": 1}), "malformed tensor"),
    "metadata of numbers": (tensors({"__metadata__": {"robustdeq": 1}}, b""), "no texts"),
    "large metadata": (tensors({"__metadata__": {"a": "x" * 2**21}}, b""), "metadata of more"),
    "overlap": (tensors({"a": entry(0, 4), "b": entry(0, 4)}), ""),
    "a gap": (tensors({"a": entry(4, 8)}), ""),
    "a tail": (tensors({"a": entry(0, 4)}), ""),
    "a strange type": (tensors({"a": entry(0, 4, dtype="X9"), "b": entry(4, 8)}), ""),
    "a strange shape": (tensors({"a": entry(0, 8, (2**62, 4))}), ""),
    "a negative shape": (tensors({"a": entry(0, 8, (-2,))}), ""),
}


@pytest.mark.parametrize("what", BAD)
def test_malformed_safetensors_are_one_sentence_wherever_they_are_read(
    what: str, tmp_path: Path
) -> None:
    payload, words = BAD[what]
    path = tmp_path / "a.safetensors"
    path.write_bytes(payload)
    if words:
        with pytest.raises(BoundError, match=words):
            check_safetensors(payload)
        with pytest.raises(BoundError, match=words):
            check_safetensors(path)
    calls: list[Callable[[], object]] = [
        lambda: read_info(path),
        lambda: load_weights(torch.nn.Linear(1, 1), path),
        lambda: read_examples(payload, "examples", (1, 8, 8)),
    ]
    for call in calls:
        with pytest.raises(CaseError, match=words or LIBRARY) as caught:
            call()
        assert str(caught.value).isprintable()


def test_too_many_tensors_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MOST_TENSORS", 3)
    held = {str(k): np.zeros(1, np.float32) for k in range(4)}
    with pytest.raises(BoundError, match="more than 3 tensors"):
        check_safetensors(save(held))
    held.pop("0")
    check_safetensors(save(held))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 5000, "nested deeper"),
        ('{"format": 1}', "malformed metadata"),
        ("[]", "no RobustDEQ metadata"),
        (json.dumps({**INFO.as_data(), "parameters": "x"}), r"malformed metadata \(parameters"),
        (json.dumps({**INFO.as_data(), "seed": True}), r"malformed metadata \(seed"),
        (json.dumps({**INFO.as_data(), "seed": 10**40}), "more than 64 bits"),
        (json.dumps({**INFO.as_data(), "more": 1}), "malformed metadata"),
    ],
)
def test_metadata_of_weights_are_what_they_must_be(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"a": np.zeros(1)}, metadata={"robustdeq": text}))
    with pytest.raises(CaseError, match=words):
        read_info(path)
    save_weights(torch.nn.Linear(1, 1), INFO, path)
    assert read_info(path) == INFO


def test_no_cell_of_a_csv_is_a_formula() -> None:
    hostile = ["=cmd|'/C calc'!A0", "+1", "-1", "@x", " =1", "\t=1", "\r=1", "\x1b[2J", "plain"]
    frame = pd.DataFrame({"id": hostile, "n": range(-4, 5), "acc": [None, *[-0.5] * 8]})
    text = to_csv(frame)
    held = pd.read_csv(io.StringIO(text))
    assert held["n"].tolist() == list(range(-4, 5))
    assert held["acc"].tolist()[1:] == [-0.5] * 8
    assert [cell[0] for cell in held["id"]] == ["'"] * 7 + [" ", "p"]
    assert not [c for c in text if not c.isprintable() and c != "\n"]


def test_a_terminal_gets_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(["run", "\x1b[2J\x07\r.toml"], monkeypatch, capsys)
    assert code == 2
    assert not [c for c in out + err if not c.isprintable() and c != "\n"]
    code, out, err = command(["verify", "a\x1b]0;title\x07"], monkeypatch, capsys)
    assert not [c for c in out + err if not c.isprintable() and c != "\n"]
