"""The defense `robustbench` as far as it goes without RobustBench: refusals, and reading files."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from robustdeq.defenses import robustbench as plugin
from safetensors.torch import save_file
from torch import Tensor, nn

from robustdeq.datasets import spec_of
from robustdeq.errors import CaseError, UsageError
from robustdeq.registry import load

CARMON = {"model": "Carmon2019Unlabeled", "threat": "Linf"}


@pytest.mark.skipif(
    importlib.util.find_spec("robustbench") is not None, reason="RobustBench is installed"
)
def test_without_the_extra_the_refusal_names_the_remedy() -> None:
    defense = load("defense", "robustbench", CARMON)
    with pytest.raises(UsageError, match=r'pip install "robustdeq\[robustbench\]"'):
        defense.build(spec_of("cifar10"), torch.device("cpu"))


def test_loading_the_plugin_imports_nothing_of_it(tmp_path: Path) -> None:
    script = (
        "import sys; from robustdeq.registry import load; "
        f"load('defense', 'robustbench', {CARMON!r}); "
        "heavy = {'robustbench', 'timm', 'torchvision', 'gdown', 'autoattack', 'pkg_resources'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    # Elsewhere than in the checkout, whose own stale metadata would shadow the installed ones.
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"threat": "Linf"}, "model"),
        (CARMON | {"threat": "linf"}, "'Linf'"),
        (CARMON | {"dataset": "cifar"}, "'cifar10'"),
    ],
)
def test_wrong_parameters_are_refused_before_any_import(
    parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load("defense", "robustbench", parameters)


class Wrapped(nn.Module):
    """Like the zoo's classes: constants of normalization beside a network."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.register_buffer("mu", torch.tensor(0.5))
        self.add_module(prefix, nn.Linear(3, 2))


def example(prefix: str = "net") -> tuple[Wrapped, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    state = {"weight": torch.randn(2, 3, generator=generator), "bias": torch.zeros(2)}
    return Wrapped(prefix), {f"{prefix}.{k}": v for k, v in state.items()}


@pytest.mark.parametrize("prefix", ["net", "model"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {"last": {f"model.{k}": v for k, v in state.items()}, "best": {}},
        lambda state: {"state_dict": {f"module.model.{k}": v for k, v in state.items()}},
        lambda state: {k.removeprefix("model."): v for k, v in state.items()},
    ],
)
def test_checkpoints_are_read_as_the_zoos_authors_left_them(
    tmp_path: Path, wrap: Any, prefix: str
) -> None:
    model, state = example(prefix)
    torch.save(wrap(state), tmp_path / "w.pt")
    plugin._load(model, plugin._read(tmp_path / "w.pt"), "w.pt", "X")
    assert torch.equal(model.state_dict()[f"{prefix}.weight"], state[f"{prefix}.weight"])
    assert float(model.state_dict()["mu"]) == 0.5


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    _, state = example()
    save_file(state, tmp_path / "w.safetensors")
    read = plugin._read(tmp_path / "w.safetensors")
    assert all(torch.equal(read[name], value) for name, value in state.items())


class Trap:
    """Pickled code: reading it in earnest would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickled_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    _, state = example()
    torch.save(state | {"x": Trap(tmp_path / "sprung")}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CaseError, match="pickled objects, which are never loaded"):
            plugin._read(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_no_checkpoint_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="does not exist"):
        plugin._read(tmp_path / "none.pt")
    for name, content in (("a.pt", b"<html>"), ("b.pt", b""), ("c.safetensors", b"<html>")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CaseError, match="corrupt"):
            plugin._read(tmp_path / name)
    for number, content in enumerate(([1, 2], {"epoch": 3}, {"state_dict": {}})):
        torch.save(content, tmp_path / f"{number}.pt")
        with pytest.raises(CaseError, match="holds no state_dict"):
            plugin._read(tmp_path / f"{number}.pt")


def test_a_state_of_another_model_is_refused() -> None:
    model, state = example()
    weight = state["net.weight"]
    for wrong, message in (
        ({"net.weight": weight}, "lacks 1 of its tensors.*'net.bias'"),
        (state | {"further.weight": weight}, "holds 1 others.*'further.weight'"),
        (state | {"net.weight": weight.T}, "does not fit X"),
        (state | {"net.weight": weight / 0}, "not finite"),
    ):
        with pytest.raises(CaseError, match=message):
            plugin._load(model, wrong, "w.pt", "X")
    plugin._load(model, state | {"conv1.scores": weight}, "w.pt", "X")


def test_stand_ins_are_there_only_for_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    real = type(sys)("pkg_resources")
    monkeypatch.setitem(sys.modules, "pkg_resources", real)
    with plugin._stand_ins():
        assert sys.modules["pkg_resources"] is real
        assert importlib.import_module("autoattack").AutoAttack
        assert importlib.import_module("autoattack.state").EvaluationState
    assert sys.modules["pkg_resources"] is real
    assert importlib.util.find_spec("autoattack") or "autoattack" not in sys.modules
    assert plugin._resource_filename("pytest", "x/y") == str(Path(pytest.__file__).parent / "x/y")
