"""The stages of one chunk as a graph: what may be computed next, and what is over."""

from __future__ import annotations

from dataclasses import dataclass, field

from robustdeq.evaluation.chain import Event, Step
from robustdeq.evaluation.stages import CLEAN
from robustdeq.running.task import Plan, Task


@dataclass(eq=False)
class ChunkGraph:
    """A task's stages; in phase 1 only the clean one is known until it has been through.

    Attributes:
        steps: those of the task's phase, by label; empty until they are known.
        running, over: labels.
    """

    task: Task
    steps: dict[str, Step] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    over: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.task.phase == 1:
            self.steps = {CLEAN.label: Step(CLEAN.label, 1)}

    def plan(self, steps: tuple[Step, ...]) -> None:
        """Take in what a chunk goes through; steps of other phases are none of this task."""
        self.steps |= {step.label: step for step in steps if step.phase == self.task.phase}

    def ready(self) -> list[str]:
        """What may be computed now, in the order of the suite."""
        return [
            label
            for label, step in self.steps.items()
            if label not in self.running | self.over
            # What the phase does not hold was over before it began.
            and all(need in self.over or need not in self.steps for need in step.needs)
        ]

    def begin(self, label: str) -> None:
        """A stage is being computed."""
        self.running.add(label)

    def take(self, item: Event | Plan) -> None:
        """Learn from what a stage has said."""
        if isinstance(item, Plan):
            self.plan(item.steps)
        elif item.kind == "failed" and item.label:
            self.task = self.task.without(item.label, item.reason)

    def end(self, label: str, fatal: bool) -> None:
        """A stage is over, well or not; after a fatal failure there is nothing more to do."""
        self.running.discard(label)
        self.over |= set(self.steps) if fatal else {label}

    @property
    def finished(self) -> bool:
        """Whether all stages are over."""
        return not self.running and set(self.steps) <= self.over
