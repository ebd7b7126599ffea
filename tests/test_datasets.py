from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from robustdeq.datasets import DATA_VARIABLE, load_slice
from robustdeq.errors import UsageError


def png(pixels: np.ndarray) -> dict[str, object]:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def write_mnist(folder: Path, n: int = 5, size: int = 28, column: str = "image") -> np.ndarray:
    pixels = np.random.RandomState(0).randint(0, 256, (n, size, size), dtype=np.uint8)
    folder.mkdir(parents=True)
    frame = pd.DataFrame({column: [png(p) for p in pixels], "label": np.arange(n) % 10})
    frame.to_parquet(folder / "test-00000-of-00001.parquet")
    return pixels


def test_digits_splits_are_disjoint_and_fixed() -> None:
    train, test = load_slice("digits", "train"), load_slice("digits", "test")
    assert (len(train), len(test)) == (1297, 500)
    assert train.images.shape[1:] == (1, 8, 8)
    assert test.images.max() == 255
    assert np.bincount(test.labels, minlength=10).min() > 30
    # Of the data set's own order and our shuffle: changes here would orphan every shipped weight.
    assert load_slice("digits", "test", 100).digest.startswith(test.take(slice(100)).digest[:12])
    assert load_slice("digits", "test", 100).labels[:8].tolist() == test.labels[:8].tolist()


def test_parquet_in_the_hubs_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_mnist(tmp_path / "mnist" / "mnist")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    data = load_slice("mnist", "test", 3)
    assert np.array_equal(data.images[:, 0], pixels[:3])
    assert data.labels.tolist() == [0, 1, 2]
    assert data.digest != load_slice("mnist", "test", 4).digest


def test_a_path_is_a_data_set(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mine", size=12, column="img")
    data = load_slice(str(tmp_path / "mine"), "test", 2)
    assert (data.spec.name, data.spec.classes, data.spec.height) == ("mine", 5, 12)


@pytest.mark.parametrize(
    ("name", "samples", "message"),
    [
        ("minst", None, "did you mean 'mnist'"),
        ("digits", 0, "at least 1"),
        ("digits", 501, "holds 500"),
        ("cifar10-jpeg", None, "looked in"),
        ("./nothing", None, "no test"),
    ],
)
def test_bad_requests(
    name: str, samples: int | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match=message):
        load_slice(name, "test", samples)


def test_missing_data_says_where_it_looked_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(UsageError) as caught:
        load_slice("cifar10", "test")
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "Hugging Face Hub (uoft-cs/cifar10)" in text
    assert DATA_VARIABLE in text


def test_the_hubs_files_are_found_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = write_mnist(tmp_path / "cache")
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str, repo_type: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / "cache" / Path(file).name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    assert np.array_equal(load_slice("mnist", "test").images[:, 0], pixels)
    assert asked == [("ylecun/mnist", "mnist/test-00000-of-00001.parquet")]


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"not parquet")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        load_slice(str(bad))
    pd.DataFrame({"image": [{"bytes": b"x"}], "label": [0]}).to_parquet(bad)
    with pytest.raises(UsageError, match="cannot be decoded"):
        load_slice(str(bad))
    pd.DataFrame({"image": [png(np.zeros((4, 4), np.uint8))]}).to_parquet(bad)
    with pytest.raises(UsageError, match="no label column"):
        load_slice(str(bad))
    shapes = [png(np.zeros((s, s), np.uint8)) for s in (4, 5)]
    pd.DataFrame({"image": shapes, "label": [0, 1]}).to_parquet(bad)
    with pytest.raises(UsageError, match="several shapes"):
        load_slice(str(bad))


@pytest.mark.skipif(DATA_VARIABLE not in os.environ, reason=f"{DATA_VARIABLE} names no data")
@pytest.mark.parametrize(("name", "channels"), [("mnist", 1), ("cifar10-jpeg", 3)])
def test_real_data_where_there_are_some(name: str, channels: int) -> None:
    data = load_slice(name, "test", 20)
    assert data.images.shape[:2] == (20, channels)
