"""The plugin contracts as tests, and `robustdeq check`: right plugins pass, defects are named."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from robustdeq.contract import assert_contract, contract_findings
from robustdeq.contract.check import CheckReport, check_plugin
from robustdeq.contract.source import plugin_classes
from robustdeq.contract.surroundings import watched
from robustdeq.errors import UsageError
from robustdeq.registry import load, registered

HEAD = """
from dataclasses import dataclass
from typing import ClassVar
import random, torch
from torch import nn
from robustdeq.interfaces import About, Access, Candidates, Scope
"""
DEFENSE = """
@dataclass(frozen=True, kw_only=True)
class Mine:
    about: ClassVar[About] = About("Two layers")
    recipe: ClassVar[str] = "clean"
    width: int = 32
    def build(self, data, device):
        pixels = data.channels * data.height * data.width
        return Net(pixels, self.width, data.classes).to(device)
"""
NET = """
class Net(nn.Module):
    def __init__(self, pixels, width, classes):
        super().__init__()
        self.first, self.last = nn.Linear(pixels, width), nn.Linear(width, classes)
    def forward(self, x):
        return self.last(torch.relu(self.first(x.flatten(1))))
"""
ATTACK = """
@dataclass(frozen=True, kw_only=True)
class Mine:
    needs: ClassVar[Access] = Access.GRADIENTS
    steps: int = 3
    def run(self, target, x, y, threat, rng):
        moved = threat.project(x, x + threat.random_offset(rng.uniform(x), rng.fraction(x)))
        for _ in range(self.steps):
            moved = moved.detach().requires_grad_()
            logits = target(moved).logits
            (slope,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), moved)
            step = 0.3 * threat.eps * threat.steepest(slope)
            moved = threat.project(x, moved.detach() - step)
        return moved
"""
FORWARD = "return self.last(torch.relu(self.first(x.flatten(1))))"
RUN = "moved = threat.project(x, x + threat.random_offset(rng.uniform(x), rng.fraction(x)))"
RETURN = "        return moved\n"


def checked(folder: Path, text: str, minutes: float = 0.5) -> CheckReport:
    file = folder / "mine.py"
    file.write_text(HEAD + text)
    return check_plugin(str(file), minutes=minutes)


def named(report: CheckReport) -> set[str]:
    return {finding.name for plugin in report.plugins for finding in plugin.failed}


def test_a_ten_line_defense_passes_with_a_line_per_test(tmp_path: Path) -> None:
    report = checked(tmp_path, NET + DEFENSE)
    assert report.ok, "\n".join(report.lines())
    lines = list(report.lines())
    assert lines[0] == "defense Mine"
    assert lines[-1] == "Mine passes."
    assert any(line.startswith("  passed  finite_differences: 1, at least 0.9") for line in lines)
    assert "trained by clean" in report.plugins[0].context
    assert not registered("defense").keys() & {"Mine", "mine"}


@pytest.mark.parametrize(
    ("old", "new", "flag"),
    [
        ("@dataclass(frozen=True, kw_only=True)", "@dataclass", "frozen_dataclass"),
        ("@dataclass(frozen=True, kw_only=True)", "", "frozen_dataclass"),
        ('    about: ClassVar[About] = About("Two layers")\n', "", "members"),
        ("width: int = 32", "width = 32", "annotated_fields"),
        ("width: int = 32", "width: int = 32\n    act: object = torch.relu", "json_parameters"),
        ("data.classes)", "7)", "logits_8x8"),
        (FORWARD, FORWARD + ".double()", "logits_8x8"),
        (FORWARD, FORWARD + ".tolist()", "logits_8x8"),
        (FORWARD, FORWARD + " / 0", "logits_8x8"),
        ("pixels = data.channels", "pixels = 1", "logits_32x32"),
        (FORWARD, FORWARD + " * (1 + torch.is_grad_enabled())", "modes_8x8"),
        (FORWARD, FORWARD + " * (1 + torch.is_inference_mode_enabled())", "modes_8x8"),
        ("(x.flatten(1))", "(x.detach().flatten(1))", "gradient_8x8"),
        ("x.flatten(1)", "x.clamp_(0.2, 0.8).flatten(1)", "input_untouched_8x8"),
        ("x.flatten(1)", "(x - x.mean(0)).flatten(1)", "batch_invariance_8x8"),
        ("super().__init__()", "super().__init__(); self.held = lambda x: x; self.own = "
         "__import__('threading').Lock()", "deepcopy_8x8"),
        ("super().__init__()", "super().__init__(); self.scale = 1 + random.random()",
         "weights_8x8"),
        ("super().__init__()", "super().__init__(); torch.manual_seed(0)", "quiet_build_8x8"),
        ("super().__init__()", "super().__init__(); print('hello')", "quiet_build_8x8"),
        ("return self.last", "print(1); return self.last", "quiet_forward_8x8"),
        ("return self.last", "torch.manual_seed(0); return self.last", "quiet_forward_8x8"),
        ("return self.last", "open('log.txt', 'w').close(); return self.last", "quiet_forward_8x8"),
        ("return self.last", "torch.set_grad_enabled(False); return self.last",
         "quiet_forward_8x8"),
        ("return self.last", "self.train(); return self.last", "quiet_forward_8x8"),
    ],
)  # fmt: skip
def test_defects_of_a_defense_are_named(
    old: str, new: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = NET + DEFENSE
    assert old in text
    text = text.replace(old, new)
    if "self.scale" in text:
        text = text.replace(FORWARD, FORWARD + " * self.scale")
    (cls,) = _classes(tmp_path, text)
    failing = {f.name for f in contract_findings(cls()) if f.outcome == "failed"}
    assert flag in failing


def _classes(folder: Path, text: str) -> list[type]:
    file = folder / "mine.py"
    file.write_text(HEAD + text)
    return plugin_classes(str(file))


def test_two_builds_that_differ_are_named(tmp_path: Path) -> None:
    text = NET.replace(
        "super().__init__()", "super().__init__(); g = torch.Generator(); g.seed()"
    ).replace("nn.Linear(width, classes)", "nn.Linear(width, classes)\n        "
              "self.last.bias.data = torch.rand(classes, generator=g)")  # fmt: skip
    (cls,) = _classes(tmp_path, text + DEFENSE)
    failing = {f.name for f in contract_findings(cls()) if f.outcome == "failed"}
    assert failing == {"reproducible_build_8x8", "reproducible_build_32x32"}


@pytest.mark.parametrize(
    ("forward", "flag"),
    [
        ("return self.logits((8 * x).round() / 8)", "zero_gradient"),
        ("return self.logits(x.detach()) + 0.01 * x.flatten(1)[:, :10]", "finite_differences"),
    ],
)
def test_defects_of_a_gradient_are_named_with_number_and_remedy(
    forward: str, flag: str, tmp_path: Path
) -> None:
    text = NET.replace("def forward(self, x)", "def logits(self, x)")
    text += f"    def forward(self, x):\n        {forward}\n"
    report = checked(tmp_path, text + DEFENSE, minutes=0.01)
    assert not report.ok
    assert flag in named(report)
    line = next(line for line in report.lines() if f"FAILED  {flag}:" in line)
    assert any(character.isdigit() for character in line)
    assert line.endswith(".")


def test_a_plugin_that_cannot_be_made_or_built_is_named(tmp_path: Path) -> None:
    required = DEFENSE.replace("width: int = 32", "width: int")
    assert named(checked(tmp_path, NET + required)) == {"parameters"}
    report = checked(tmp_path, NET + DEFENSE.replace("return Net", "return nothing"))
    assert named(report) == {"builds_8x8", "builds_32x32"}
    refuses = DEFENSE.replace(
        "        pixels =",
        "        if data.channels == 3:\n"
        "            raise __import__('robustdeq.errors').errors.UsageError('gray only.')\n"
        "        pixels =",
    )
    (plugin,) = checked(tmp_path, NET + refuses, minutes=0.01).plugins
    skipped = [f.name for f in plugin.findings if f.outcome == "skipped"]
    assert "builds_32x32" in skipped
    assert not [f for f in plugin.failed if f.name.endswith("32x32")]


def test_an_attack_of_few_lines_passes(tmp_path: Path) -> None:
    report = checked(tmp_path, ATTACK)
    assert report.ok, "\n".join(report.lines())
    assert report.plugins[0].kind == "attack"


@pytest.mark.parametrize(
    ("old", "new", "flag"),
    [
        ("Access.GRADIENTS", "Access.LABELS", "access"),
        ("ClassVar[Access] = Access.GRADIENTS", "ClassVar[str] = 'gradients'", "signature"),
        ("y, threat, rng)", "y, threat)", "signature"),
        (RETURN, "        return moved[:1]\n", "admissible"),
        (RETURN, "        return moved + 0.1\n", "admissible"),
        (RETURN, "        return moved * float('nan')\n", "admissible"),
        (RETURN, "        return moved.tolist()\n", "admissible"),
        (RETURN, "        return x.add_(0.0001).clamp_(0, 1)\n", "arguments_untouched"),
        (RETURN, "        next(target.model.parameters()).data.mul_(0.9)\n        return moved\n",
         "arguments_untouched"),
        (RETURN, "        target.model.train()\n        return moved\n", "arguments_untouched"),
        (RUN, "moved = threat.project(x, x + torch.rand_like(x) * threat.eps)", "deterministic"),
        (RETURN, "        return threat.project(x, moved - 0.01 * moved.mean(0))\n", "companions"),
        (RETURN, "        raise RuntimeError('out of ideas')\n", "runs"),
        (RETURN, "        print('done')\n        return moved\n", "quiet"),
    ],
)  # fmt: skip
def test_defects_of_an_attack_are_named(old: str, new: str, flag: str, tmp_path: Path) -> None:
    assert old in ATTACK
    (cls,) = _classes(tmp_path, ATTACK.replace(old, new))
    assert flag in {f.name for f in contract_findings(cls()) if f.outcome == "failed"}


def test_an_attack_on_whole_chunks_may_couple_its_samples(tmp_path: Path) -> None:
    coupled = ATTACK.replace(RETURN, "        return threat.project(x, moved - moved.mean(0))\n")
    whole = coupled.replace("    steps:", "    scope: ClassVar[Scope] = Scope.CHUNK\n    steps:")
    (cls,) = _classes(tmp_path, whole)
    assert_contract(cls())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("defense", "deq"),
        ("attack", "pgd"),
        ("recipe", "clean"),
        ("recipe", "joint"),
        ("recipe", "trades"),
    ],
)
def test_built_in_plugins_keep_their_contracts(kind: str, name: str) -> None:
    assert_contract(load(kind, name, {}))  # type: ignore[call-overload]


def test_a_recipe_that_forgets_its_generator_is_named(tmp_path: Path) -> None:
    recipe = """
from robustdeq.training.clean import Clean
@dataclass(frozen=True, kw_only=True)
class Noisy(Clean):
    def loss(self, target, x, y, threat, progress, generator):
        noisy = x + 0.1 * torch.randn_like(x)
        return nn.functional.cross_entropy(target(noisy).logits, y)
"""
    (cls,) = _classes(tmp_path, recipe)
    with pytest.raises(AssertionError, match=r"reproducible.*Draw all random numbers"):
        assert_contract(cls())
    (cls,) = _classes(tmp_path, recipe.replace("target(noisy).logits", "target(x).logits.detach()"))
    with pytest.raises(AssertionError, match="loss"):
        assert_contract(cls())


def test_references_are_found_as_modules_files_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "two_plugins.py"
    file.write_text(HEAD + NET + DEFENSE + ATTACK.replace("Mine", "Other"))
    monkeypatch.chdir(tmp_path)
    assert [c.__name__ for c in plugin_classes("two_plugins.py")] == ["Mine", "Other"]
    assert [c.__name__ for c in plugin_classes("two_plugins.py:Other")] == ["Other"]
    assert [c.__name__ for c in plugin_classes("two_plugins:Mine")] == ["Mine"]
    assert [c.__name__ for c in plugin_classes("federated")] == ["FederatedDEQ", "Federated"]
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("nowhere.py", "does not exist"),
        ("two_plugins.py:Mein", "did you mean 'Mine'"),
        ("two_plugins.py:Net", "no plugin"),
        ("empty.py", "defines no plugin"),
        ("broken.py", "ZeroDivisionError"),
        ("no_such_module:Mine", "cannot be imported"),
        ("pdg", "did you mean 'pgd'"),
    ],
)
def test_wrong_references_are_refused_in_one_sentence(
    reference: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_plugins.py").write_text(HEAD + NET + DEFENSE)
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        plugin_classes(reference)


def test_what_is_no_plugin_object_is_refused() -> None:
    for thing in (3, type(load("attack", "pgd", {}))):
        with pytest.raises(UsageError, match="no plugin object"):
            assert_contract(thing)


def test_surroundings_are_watched_and_restored(tmp_path: Path) -> None:
    import torch

    with watched() as outer, watched() as inner:
        print("hello")
        (tmp_path / "a.txt").write_text(textwrap.dedent("x"))
        (tmp_path / "a.txt").read_text()
        (tmp_path / "a.txt").unlink()
        subprocess.run([sys.executable, "-c", ""], check=True)
        torch.set_grad_enabled(False)
    assert torch.is_grad_enabled()
    words = " ".join(inner.acts)
    for part in ("prints 'hello'", "writes to", "removes", "runs", "torch.is_grad_enabled"):
        assert part in words
    assert inner.acts[-2:] != outer.acts
    count = len(inner.acts)
    (tmp_path / "b.txt").write_text("x")
    assert len(inner.acts) == count


ONE_SIZE = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from robustdeq.interfaces import About

class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(SIZE, 10)

    def forward(self, x):
        return self.head(x.flatten(1).detach())

@dataclass(frozen=True, kw_only=True)
class OneSize:
    about: ClassVar[About] = About("A model for one size of image alone")
    recipe: ClassVar[str] = "clean"

    def build(self, data, device):
        return Cut().to(device)
"""


def test_a_model_of_one_size_is_still_examined_for_honesty(tmp_path: Path) -> None:
    file = tmp_path / "one_size.py"
    file.write_text(ONE_SIZE.replace("SIZE, 10", "64, 10"))
    text = "\n".join(check_plugin(str(file), minutes=0.01).lines())
    assert re.search(r"FAILED +logits_32x32", text)
    assert re.search(r"FAILED +gradient_missing", text)
    file.write_text(ONE_SIZE.replace("SIZE, 10", "3 * 32 * 32, 10"))
    text = "\n".join(check_plugin(str(file), minutes=0.01).lines())
    assert re.search(r"FAILED +honesty_checks: .*digits", text)
