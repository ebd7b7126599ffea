"""Which arithmetic stands for float32: none where it is judged, less where a search asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from attacked import BALL, Centered, attacked, contested
from robustdeq.attacks.autoattack import AutoAttack
from torch import Tensor, nn

import robustdeq
from robustdeq.arithmetic import Precision, exact_float32, reduced
from robustdeq.errors import UsageError
from robustdeq.evaluation.integrity import intact
from robustdeq.evaluation.judge import Judge
from robustdeq.evaluation.provenance import machine
from robustdeq.interfaces import Access, Budget, Candidates, Scope
from robustdeq.randomness import SampleRandom
from robustdeq.targets import Target
from robustdeq.threats import Threat

CPU = torch.device("cpu")
NEWER = hasattr(torch.backends.cudnn, "conv")
newer = pytest.mark.skipif(not NEWER, reason="settings by operation came with torch 2.9")


def settings() -> list[object]:
    """All that torch says; in place of what it refuses to say the error."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    asked: list[Callable[[], object]] = [
        torch.get_float32_matmul_precision,
        lambda: cuda.matmul.allow_tf32,
        lambda: cudnn.allow_tf32,
        lambda: torch.is_autocast_enabled("cpu"),
    ]
    parts: list[Any] = [cudnn, mkldnn] if NEWER else []
    for part in parts:
        asked += [lambda part=part: part.conv.fp32_precision, lambda p=part: p.rnn.fp32_precision]
    said: list[object] = []
    for ask in asked:
        try:
            said.append(ask())
        except RuntimeError as error:
            said.append(type(error))
    return said


def is_exact() -> bool:
    quick = {"tf32", "bf16", True, "high", "medium", RuntimeError}
    return not quick & set(settings())


def by_matmul() -> None:
    torch.set_float32_matmul_precision("medium")


def by_flags() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def by_operation() -> None:
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "tf32", "ieee"
    mkldnn.conv.fp32_precision = "bf16"


@pytest.fixture
def default() -> Iterator[None]:
    """Settings as they were, through every interface there is."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    if NEWER:
        for part in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            part.fp32_precision = "tf32"
        mkldnn: Any = torch.backends.mkldnn
        mkldnn.conv.fp32_precision = "none"


@pytest.mark.parametrize(
    "change", [None, by_matmul, by_flags, pytest.param(by_operation, marks=newer)]
)
def test_whatever_is_set_float32_is_exact_inside_and_as_before_outside(
    default: None, change: Callable[[], None] | None
) -> None:
    if change is not None:
        change()
    before = settings()
    assert change is None or not is_exact()
    with exact_float32():
        assert is_exact()
        by_matmul()  # what runs inside may change it, and what is around is restored all the same
    assert settings() == before
    with torch.autocast("cpu"), pytest.raises(ValueError, match="as any"), exact_float32():
        raise ValueError("as any")
    assert settings() == before


def test_a_search_may_round_where_the_device_can() -> None:
    product = torch.eye(3)
    with reduced("bfloat16", CPU):
        assert (product @ product).dtype is torch.bfloat16
    with reduced("float32", CPU):
        assert (product @ product).dtype is torch.float32
    for precision, device in REFUSED:
        with pytest.raises(UsageError, match=f"precision '{precision}' needs .*{device}"):
            reduced(precision, torch.device(device)).__enter__()


REFUSED: list[tuple[Precision, str]] = [("tf32", "cpu"), ("bfloat16", "meta")]


class Noting(nn.Module):
    """Notes whether each pass was exact."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 4)
        self.exact: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.exact.append(is_exact())
        out: Tensor = self.linear(x.flatten(1))
        assert out.dtype is torch.float32 or not self.exact[-1]
        return out


@pytest.mark.parametrize("randomized", [False, True])
def test_the_judge_is_exact_whatever_is_around_it(default: None, randomized: bool) -> None:
    model, x = Noting(), torch.rand(3, 1, 3, 3)
    y = torch.zeros(3, dtype=torch.long)
    by_flags()
    with torch.autocast("cpu"):
        Judge(model, 4, scope="t", randomized=randomized)(x, y, range(3))
    assert model.exact
    assert all(model.exact)


class Loosening:
    """An attack that sets what it likes, and moves nothing."""

    needs: ClassVar[Access] = Access.LOGITS
    scope: ClassVar[Scope] = Scope.CHUNK

    def budget(self, classes: int) -> Budget:
        return Budget(1, 0)

    def run(
        self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        by_flags()
        by_matmul()
        torch.set_autocast_enabled("cpu", True)
        return Candidates(x, ("",) * len(x))


def test_an_attack_s_settings_do_not_reach_the_judge_nor_the_caller(default: None) -> None:
    model, x = Noting(), torch.rand(6, 1, 3, 3)
    with torch.no_grad():
        y = model.linear(x.flatten(1)).argmax(1)
    before = settings()
    with torch.autocast("cpu"):
        verdict = robustdeq.evaluate(model, x, y, threat="Linf:0.1", attacks=[Loosening()])
    assert verdict.clean_acc == verdict.robust_acc == 1.0
    assert all(model.exact)
    assert settings() == before
    with intact("it"):
        by_flags()
        torch.set_autocast_enabled("cpu", True)
    assert settings() == before


def test_a_run_says_what_it_was_computed_in(default: None) -> None:
    by_flags()
    said = machine(CPU)
    kept = [said[name] for name in ("tf32_matmul", "tf32_cudnn", "float32_matmul_precision")]
    assert kept == [False, False, "highest"]


class Watched(Centered):
    """Notes the arithmetic of evaluations with a gradient, and of cold solves."""

    def __init__(self) -> None:
        super().__init__()
        self.sloped: list[bool] = []
        self.cold: list[bool] = []

    def cell(self, z: Tensor, injection: Any, step: int) -> Tensor:
        if torch.is_grad_enabled():
            self.sloped.append(torch.is_autocast_enabled("cpu"))
        return super().cell(z, injection, step)

    def start(self, injection: Any) -> Tensor:
        self.cold.append(torch.is_autocast_enabled("cpu"))
        return super().start(injection)


def test_a_screen_in_bfloat16_breaks_what_one_in_float32_breaks() -> None:
    model = Watched()
    x, y = contested(model, 24)
    broken = []
    for precision in ("float32", "bfloat16"):
        model.sloped.clear()
        found = attacked(
            AutoAttack(engine="joint", precision=precision), Target(model, 4), x, y, BALL
        )
        assert any(model.sloped) == (precision == "bfloat16")
        assert not all(model.sloped)  # the second run
        broken.append(model(found).argmax(1) != y)
    assert torch.equal(*broken)
    assert 0 < int(broken[0].sum()) < 24
    assert model.cold
    assert not any(model.cold)
