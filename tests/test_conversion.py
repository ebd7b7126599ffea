"""Weights of other programs: a pickle is opened on request alone, and as tensors alone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from terminal import command

from robustdeq.conversion import convert
from robustdeq.datasets import spec_of
from robustdeq.errors import CaseError, UsageError
from robustdeq.evaluation.direct import evaluate
from robustdeq.plugin_rows import additions
from robustdeq.registry import load
from robustdeq.suite import parse_suite
from robustdeq.weights import read_info

PARAMETERS = {"width": 8, "inner": 8}
GIVEN: dict[str, Any] = {"defense": "feedforward", "parameters": PARAMETERS, "dataset": "digits"}
SUITE = """
name = "s"
threats = ["Linf:0.1"]
datasets = [{{ name = "digits", samples = 2 }}]
attacks = [{{ attack = "pgd", parameters = {{ steps = 1 }} }}]
defenses = [{{ id = "A", defense = "feedforward", weights = "{}" }}]
"""


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return load("defense", "feedforward", PARAMETERS).build(spec_of("digits"), torch.device("cpu"))


class Evil:
    """What a pickle runs as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
])  # fmt: skip
def test_a_state_dict_becomes_weights_that_a_run_takes(wrap: Any, tmp_path: Path) -> None:
    net, out = model(), tmp_path / "new" / "w.safetensors"
    torch.save(wrap(net.state_dict()), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="say --allow-pickle"):
        convert(tmp_path / "w.pt", out, **GIVEN)
    assert not out.exists()
    sha256 = convert(tmp_path / "w.pt", out, allow_pickle=True, **GIVEN)
    info = read_info(out)
    assert (info.defense, info.recipe, info.parameters["width"]) == ("feedforward", "", 8)
    (row,) = additions([f"feedforward={out}"]).defenses
    assert row.sha256 == sha256
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    plugin = load("defense", "feedforward", PARAMETERS)
    settings: dict[str, Any] = {"attacks": ["pgd"], "threat": "Linf:0.01", "name": "A"}
    # Four labels are four classes there; the weights' data set has ten.
    y[0] = 9
    found = evaluate(plugin, x, y, weights=out, **settings)
    assert found.clean_acc == evaluate(net, x, y, **settings).clean_acc


def test_safetensors_of_another_program_need_no_leave(tmp_path: Path) -> None:
    save_file(model().state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(CaseError, match="carry no RobustDEQ metadata"):
        read_info(tmp_path / "plain.safetensors")
    convert(tmp_path / "plain.safetensors", tmp_path / "w.safetensors", **GIVEN)
    assert read_info(tmp_path / "w.safetensors").dataset == "digits"


def test_what_a_pickle_would_run_is_not_run(tmp_path: Path) -> None:
    trap, out = tmp_path / "ran", tmp_path / "w.safetensors"
    for name, held in (("a.pt", {"x": Evil(trap)}), ("b.pt", Evil(trap))):
        torch.save(held, tmp_path / name)
        (tmp_path / f"plain-{name}").write_bytes(pickle.dumps(held))
        for file in (name, f"plain-{name}"):
            with pytest.raises(CaseError, match="as tensors alone") as caught:
                convert(tmp_path / file, out, allow_pickle=True, **GIVEN)
            assert "weights_only" not in str(caught.value)
    assert not trap.exists()
    assert not out.exists()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    torch.save(model().state_dict(), tmp_path / "w.pt")
    out = tmp_path / "w.safetensors"
    with pytest.raises(CaseError, match="do not fit"):
        convert(tmp_path / "w.pt", out, allow_pickle=True, **{**GIVEN, "parameters": {"width": 9}})
    with pytest.raises(UsageError, match="names another kind"):
        convert(tmp_path / "w.pt", tmp_path / "w.pt", allow_pickle=True, **GIVEN)
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(CaseError, match="no tensors by name"):
        convert(tmp_path / "w.pt", out, allow_pickle=True, **GIVEN)
    with pytest.raises(UsageError, match="do not exist"):
        convert(tmp_path / "none.pt", out, allow_pickle=True, **GIVEN)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.pkl", "w.ckpt", "w.bin", "w"])
def test_no_other_file_is_opened_where_weights_are_wanted(name: str, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    (tmp_path / name).write_bytes(pickle.dumps(Evil(trap)))
    words = "write their tensors to one with 'robustdeq convert'"
    with pytest.raises(UsageError, match=words):
        parse_suite(SUITE.format(name), "s", tmp_path)
    with pytest.raises(UsageError, match=words):
        additions([f"feedforward={tmp_path / name}"])
    with pytest.raises(UsageError, match=words):
        read_info(tmp_path / name)
    assert not trap.exists()


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(model().state_dict(), tmp_path / "w.pt")
    given = ["convert", tmp_path / "w.pt", tmp_path / "w.safetensors", "--defense", "feedforward"]
    given += ["--set", "width=8", "--set", "inner=8"]
    code, _, err = command(given, monkeypatch, capsys)
    assert (code, "--allow-pickle" in err) == (2, True)
    code, out, _ = command([*given, "--allow-pickle"], monkeypatch, capsys)
    assert (code, "sha256" in out) == (0, True)
