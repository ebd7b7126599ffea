"""A chunk's stages as a graph: any order that the graph allows gives the same records."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ToyEquilibrium

from robustdeq.equilibrium import FixedPoint
from robustdeq.errors import CaseError
from robustdeq.evaluation.chain import Chain, Chunk, Event, Memory, Step, Subject
from robustdeq.evaluation.stages import attack_stage, unique
from robustdeq.interfaces import Access, Scope
from robustdeq.keys import digest
from robustdeq.running.graph import ChunkGraph
from robustdeq.running.task import Plan
from robustdeq.suite import Curves
from robustdeq.threats import Threat


@dataclass(frozen=True, kw_only=True)
class Push:
    """Moves every pixel by up to epsilon, as its own random numbers say."""

    needs: ClassVar[Access] = Access.LABELS
    share: float = 1.0

    def run(self, target: Any, x: Any, y: Any, threat: Any, rng: Any) -> Any:
        way = (2 * rng.uniform(x) - 1).sign()
        return (x + self.share * threat.eps * way).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Whole(Push):
    """The same, of whole chunks."""

    scope: ClassVar[Scope] = Scope.CHUNK


@dataclass(frozen=True, kw_only=True)
class Late(Push):
    """The same, in the second phase."""

    phase: ClassVar[int] = 2


@dataclass(frozen=True, kw_only=True)
class Fails(Push):
    def run(self, target: Any, x: Any, y: Any, threat: Any, rng: Any) -> Any:
        raise ValueError("no idea")


ATTACKS = [Push(share=0.3), Whole(), Fails(), Push(), Late(), Whole(share=0.5), Push(share=0.7)]
STAGES = unique([attack_stage(a, type(a).__name__.lower()) for a in ATTACKS])
CURVES = Curves(epsilons=(1.0,), steps=(1,))
X = torch.rand(12, 1, 3, 3, generator=torch.Generator().manual_seed(0))


def chain(shelf: Memory, number: int = 1) -> Chain:
    """A chunk's chain; the first chunk alone has checks and traces."""
    model = ToyEquilibrium(solver=FixedPoint(tolerance=1e-6, max_steps=50), classes=4)
    y = model(X).argmax(1)
    case = {"id": "toy"}
    subject = Subject(
        model, 4, Threat.parse("Linf:0.2"), case, digest(case), 0, torch.device("cpu")
    )
    return Chain(subject, Chunk(number, X, y, tuple(range(12))), STAGES, shelf, curves=CURVES)


def steps(number: int) -> tuple[Step, ...]:
    one = chain(Memory(), number)
    list(one.only("clean"))
    return one.steps()


@cache
def in_order() -> dict[str, str]:
    """Content digests by key, as the local engine computes them."""
    shelf = Memory()
    assert [e.label for e in chain(shelf).run(1) if e.kind == "failed"] == ["fails"]
    two = chain(shelf)
    two.abandoned = {"fails": "no idea"}
    list(two.run(2))
    return {k: r.content_digest for k, r in shelf.records.items()}


def test_what_a_stage_needs() -> None:
    told = {step.label: (step.phase, step.needs) for step in steps(0)}
    assert {step.label for step in steps(1)} == told.keys() - {"checks", "traces"}
    assert told == {
        "checks": (1, ()),
        "push": (1, ()),
        "whole": (1, ()),
        "fails": (1, ("push", "whole")),
        "push#2": (1, ("push", "whole", "fails")),
        "late": (2, ("push", "whole", "fails", "push#2")),
        "whole#2": (1, ()),
        "push#3": (1, ("push", "whole", "fails", "push#2", "whole#2")),
        "curves": (1, ()),
        "traces": (1, ("push", "whole", "fails", "push#2", "whole#2", "push#3")),
    }


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_order_that_the_graph_allows_gives_the_same_records(seed: int) -> None:
    rng, shelf = random.Random(seed), Memory()
    abandoned: dict[str, str] = {}
    list(chain(shelf).only("clean"))
    for phase in (1, 2):
        left = {step.label: set(step.needs) for step in steps(1) if step.phase == phase}
        while left:
            ready = [label for label, needs in left.items() if not needs & left.keys()]
            label = rng.choice(ready)
            del left[label]
            one = chain(shelf)
            one.abandoned = dict(abandoned)
            for event in one.only(label):
                if event.kind == "failed":
                    abandoned[label] = event.reason
    assert abandoned == {"fails": "ValueError: no idea"}
    assert {k: r.content_digest for k, r in shelf.records.items()} == in_order()


def test_a_stage_is_not_computed_on_less_than_it_needs() -> None:
    shelf = Memory()
    list(chain(shelf).only("clean"))
    with pytest.raises(CaseError, match="record of push is gone"):
        list(chain(shelf).only("push#2"))


def test_the_graph_follows_what_is_said() -> None:
    graph = ChunkGraph(_task(1))
    assert graph.ready() == ["clean"]
    graph.begin("clean")
    assert graph.ready() == []
    graph.take(Plan({}, "", "deterministic", (), steps(0), {}))
    graph.end("clean", fatal=False)
    assert graph.ready() == ["checks", "push", "whole", "whole#2", "curves"]
    for label in ("push", "whole"):
        graph.begin(label)
        graph.end(label, fatal=False)
    graph.begin("fails")
    graph.take(Event("failed", "fails", reason="no idea"))
    graph.end("fails", fatal=False)
    assert "push#2" in graph.ready()
    assert graph.task.abandoned == (("fails", "no idea"),)
    assert not graph.finished
    graph.end("checks", fatal=True)
    assert graph.finished


def _task(phase: int) -> Any:
    from robustdeq.running.task import Task

    nothing: Any = None
    return Task(0, 0, nothing, nothing, nothing, (), nothing, nothing, "cpu", None, phase=phase)
