from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from robustdeq.errors import CaseError
from robustdeq.keys import file_sha256
from robustdeq.weights import (
    WeightsInfo,
    check_matches,
    load_weights,
    read_info,
    save_weights,
    state_sha256,
    verify_sha256,
)

INFO = WeightsInfo("deq", {"width": 3}, "digits", "clean", {}, "", 0, complete=True)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model, path = nn.Linear(3, 2), tmp_path / "a.safetensors"
    assert save_weights(model, INFO, path) == file_sha256(path)
    other = nn.Linear(3, 2)
    load_weights(other, path)
    assert torch.equal(model.weight, other.weight)
    assert read_info(path) == INFO
    assert state_sha256(model) == state_sha256(other)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_every_flipped_byte_is_noticed_before_the_file_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    sha = save_weights(nn.Linear(3, 2), INFO, path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CaseError, match="sha256"):
            verify_sha256(path, sha)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"dataset": "mnist"}, "dataset = 'digits'"),
        ({"parameters": {"width": 4}}, "parameters"),
        ({"recipe": "trades"}, "recipe"),
    ],
)
def test_weights_of_something_else_are_refused(
    expected: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CaseError, match=message):
        check_matches(INFO, expected, tmp_path)


def test_what_is_younger_than_the_format_is_written_only_where_it_says_something() -> None:
    assert not {"validation", "augmentation"} & set(INFO.as_data())
    assert replace(INFO, validation=5).as_data()["validation"] == 5
    assert WeightsInfo(**INFO.as_data()) == INFO


def test_unreadable_foreign_and_misfit_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CaseError, match="do not exist"):
        verify_sha256(path, "")
    path.write_bytes(b"junk")
    with pytest.raises(CaseError, match="cannot be read"):
        read_info(path)
    save_weights(nn.Linear(3, 2), INFO, path)
    with pytest.raises(CaseError, match="do not fit"):
        load_weights(nn.Linear(3, 3), path)
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, torch.nan)
    save_weights(model, INFO, path)
    with pytest.raises(CaseError, match="not finite"):
        load_weights(model, path)
