"""Beside RobustBench: an architecture of its zoo through our harness and through its own tools.

Runs in `tox -e robustbench` alone: the published wheel needs torchvision, an old setuptools, and a
module `autoattack` that its own dependency no longer provides.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings

import pyautoattack
import pytest
import torch

import robustdeq

pytestmark = [
    pytest.mark.robustbench,
    pytest.mark.skipif(
        importlib.util.find_spec("robustbench") is None,
        reason="RobustBench is not installed; run tox -e robustbench",
    ),
]


@pytest.fixture
def architecture() -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.modules.setdefault("autoattack", pyautoattack)
        from robustbench.model_zoo.architectures.wide_resnet import WideResNet
    torch.manual_seed(0)
    return WideResNet(depth=10, num_classes=10, widen_factor=1).eval()


def test_clean_and_autoattack_accuracy_are_robustbenchs(architecture: torch.nn.Module) -> None:
    from robustbench.utils import clean_accuracy

    x = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = architecture(x).argmax(1)
    y[::4] = (y[::4] + 1) % 10
    verdict = robustdeq.evaluate(architecture, x, y, threat="Linf:1/1000", seed=0)
    assert verdict.clean_acc == pytest.approx(clean_accuracy(architecture, x, y))
    reference = pyautoattack.AutoAttack(
        architecture, norm="Linf", eps=0.001, seed=0, version="standard", device="cpu"
    )
    x_adv, _ = reference.run_standard_evaluation(x, y, batch_size=12)
    assert verdict.autoattack_acc == pytest.approx(clean_accuracy(architecture, x_adv, y))
