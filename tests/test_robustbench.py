"""Beside RobustBench: architectures of its zoo through our harness and through its own tools.

Runs in `tox -e robustbench` alone, for RobustBench needs torchvision, and that the registry's full
torch. What the defense does without RobustBench is in `test_robustbench_missing.py`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import robustdeq
from robustdeq.datasets import spec_of
from robustdeq.errors import CaseError, UsageError
from robustdeq.registry import load
from robustdeq.suite import AttackEntry

pytestmark = [
    pytest.mark.robustbench,
    pytest.mark.skipif(
        importlib.util.find_spec("robustbench") is None,
        reason="RobustBench is not installed; run tox -e robustbench",
    ),
]
CPU = torch.device("cpu")
# Under corruptions, so that it is small: 2 million parameters.
AUGMIX = {"model": "Hendrycks2020AugMix_WRN", "threat": "corruptions"}


def built(on: str = "cifar10", **parameters: Any) -> nn.Module:
    return load("defense", "robustbench", AUGMIX | parameters).build(spec_of(on), CPU)


@pytest.fixture
def utils() -> Any:
    """RobustBench's own tools, imported in the way of the defense: its wheel needs stand-ins."""
    from robustdeq.defenses.robustbench import _robustbench_utils

    return _robustbench_utils()


@pytest.fixture
def augmix(utils: Any) -> nn.Module:
    zoo = utils.all_models[utils.BenchmarkDataset.cifar_10][utils.ThreatModel.corruptions]
    torch.manual_seed(0)
    model: nn.Module = zoo["Hendrycks2020AugMix_WRN"]["model"]()
    return model.eval()


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def as_released(model: nn.Module, path: Path) -> None:
    """As the zoo's checkpoints are: of a DataParallel, wrapped, without the normalization."""
    state = {f"module.{k}": v for k, v in model.state_dict().items() if k not in ("mu", "sigma")}
    torch.save({"state_dict": state, "epoch": 99}, path)


def as_safetensors(model: nn.Module, path: Path) -> None:
    save_file(model.state_dict(), path)


@pytest.mark.parametrize(
    ("name", "write"), [("w.pt", as_released), ("w.safetensors", as_safetensors)]
)
def test_a_model_by_name_with_weights_from_a_file(
    tmp_path: Path, utils: Any, augmix: nn.Module, name: str, write: Callable[..., None]
) -> None:
    write(augmix, tmp_path / name)
    torch.manual_seed(1)
    model = built(file=str(tmp_path / name))
    x = images(8)
    with torch.no_grad():
        y = augmix(x).argmax(1)
        assert torch.equal(model(x), augmix(x))
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    y[::4] = (y[::4] + 1) % 10
    attack = AttackEntry(attack="pgd", parameters={"steps": 2})
    verdict = robustdeq.evaluate(model, x, y, threat="Linf:8/255", attacks=[attack])
    assert verdict.clean_acc == pytest.approx(utils.clean_accuracy(augmix, x, y)) == 0.75
    assert verdict.status == "ok"


def test_the_import_leaves_no_stand_in(utils: Any) -> None:
    import robustbench

    assert robustbench.benchmark
    for name in ("autoattack", "pkg_resources"):
        real = importlib.util.find_spec(name) if name not in sys.modules else True
        assert real or name not in sys.modules
    assert getattr(sys.modules.get("pkg_resources"), "__file__", "real")


def test_what_it_downloads_is_loaded_and_a_failure_is_one_sentence(
    tmp_path: Path, utils: Any, augmix: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def offline(**arguments: Any) -> None:
        raise ConnectionError("no route to drive.google.com")

    monkeypatch.setattr(utils.gdown, "download", offline)
    with pytest.raises(CaseError, match=r"AugMix_WRN .*no route.*'file'"):
        built(folder=str(tmp_path))

    def html(id: str, output: str) -> None:  # noqa: A002 - gdown's own name for it
        Path(output).write_text("<html>too many users</html>")

    monkeypatch.setattr(utils.gdown, "download", html)
    with pytest.raises(CaseError, match="delete what is there"):
        built(folder=str(tmp_path / "html"))

    def online(id: str, output: str) -> None:  # noqa: A002
        as_released(augmix, Path(output))

    monkeypatch.setattr(utils.gdown, "download", online)
    model = built(folder=str(tmp_path))
    assert torch.equal(model(images(2)), augmix(images(2)).detach())
    assert capsys.readouterr().out == ""  # standard output is a table's


def test_a_model_that_timm_registers_is_built_without_a_download(
    tmp_path: Path, utils: Any
) -> None:
    name = "debenedetti2022light_xcit_s12_cifar10_linf"
    torch.manual_seed(0)
    reference = utils.timm.create_model(name, num_classes=10).eval()
    as_safetensors(reference, tmp_path / "w.safetensors")
    zoo_name, file = "Debenedetti2022Light_XCiT-S12", str(tmp_path / "w.safetensors")
    model = built(model=zoo_name, threat="Linf", file=file)
    with torch.no_grad():
        assert torch.equal(model(images(1)), reference(images(1)))


@pytest.mark.parametrize(
    ("on", "parameters", "message"),
    [
        ("cifar10", {"model": "Hendrycks2020AugMix_WNR"}, "did you mean 'Hendrycks2020AugMix_WRN'"),
        ("cifar10", {"threat": "L2"}, "unknown cifar10 L2 model of RobustBench"),
        ("digits", {}, r"for cifar10 .*digits has 10 classes and images of shape \(1, 8, 8\)"),
        ("cifar100", {}, "cifar100 has 100 classes"),
        ("cifar10", {"dataset": "cifar100"}, "for cifar100"),
    ],
)
def test_names_and_data_that_do_not_fit_are_refused(
    on: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        built(on, **parameters)


def test_weights_of_another_model_are_refused(tmp_path: Path, augmix: nn.Module) -> None:
    as_released(augmix, tmp_path / "w.pt")
    with pytest.raises(CaseError, match="does not fit Carmon2019Unlabeled"):
        built(model="Carmon2019Unlabeled", threat="Linf", file=str(tmp_path / "w.pt"))


def test_clean_and_autoattack_accuracy_are_robustbenchs(utils: Any) -> None:
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet

    torch.manual_seed(0)
    architecture = WideResNet(depth=10, num_classes=10, widen_factor=1).eval()
    x = images(12)
    with torch.no_grad():
        y = architecture(x).argmax(1)
    y[::4] = (y[::4] + 1) % 10
    verdict = robustdeq.evaluate(architecture, x, y, threat="Linf:1/1000", seed=0)
    assert verdict.clean_acc == pytest.approx(utils.clean_accuracy(architecture, x, y))
    reference = pyautoattack.AutoAttack(
        architecture, norm="Linf", eps=0.001, seed=0, version="standard", device="cpu"
    )
    x_adv, _ = reference.run_standard_evaluation(x, y, batch_size=12)
    assert verdict.autoattack_acc == pytest.approx(utils.clean_accuracy(architecture, x_adv, y))
