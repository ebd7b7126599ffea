"""What one watched forward pass remembers: carriers of discrete tensors, calls, inner leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from robustdeq.differentiation.straight_through.graph import splice
from robustdeq.differentiation.straight_through.sites import Site, calling_site

Build = Callable[..., "Tensor | None"]
Gap = Callable[..., Tensor]
Export = tuple[Tensor, Tensor, "Site | None"]
"""What left for NumPy or for numbers: its value, its carrier, and where, if that is to be told."""


@dataclass(frozen=True)
class Plan:
    """How a forward pass is to be watched.

    Attributes:
        double: differentiate through inner gradients.
        bypass: let inner gradients be 0, so that inner optimization stays where it starts.
        dropped: kinds of interception that are left out.
        excluded: sites that are left alone.
        watched: whether calls go through the rules at all.
        logged: whether sites are looked up at all; it costs.
        deployed_mode: tell the model that gradients are off, as the judge does.
        careful: keep copies of what the backward pass needs.
        rescue: let gradients through clamped samples too.
        replay: what inner gradients were in the honest pass, in order.
    """

    double: bool = False
    bypass: bool = False
    dropped: frozenset[str] = frozenset()
    excluded: frozenset[Site] = frozenset()
    watched: bool = True
    logged: bool = False
    deployed_mode: bool = False
    careful: bool = False
    rescue: bool = False
    replay: tuple[tuple[Tensor | None, ...], ...] = ()


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class Entry:
    """What carries the gradient of an integer or boolean tensor; built when it is first wanted.

    Args:
        tensor: held, so that its identity stays its own.
        sources: what the functions below are called with.
        build: a float tensor of its shape, of any value.
        choose: where the tensor is an index, weights (*shape, classes) of what it chooses.
        gap: where it is a comparison, the distance of its operands.
    """

    def __init__(
        self,
        tracker: Tracker,
        tensor: Tensor,
        site: Site | None,
        sources: tuple[Any, ...],
        build: Build,
        choose: Build | None = None,
        gap: Gap | None = None,
    ) -> None:
        self.tracker, self.tensor, self.site, self.sources = tracker, tensor, site, sources
        self.build, self.choose, self.gap = build, choose, gap
        self._number: Tensor | None = None
        self._known = self._counted = False

    def number(self) -> Tensor | None:
        """The tensor as floats, with a gradient; None where there is none."""
        if not self._known:
            self._known = True
            carrier = self._admitted(self.build(*self.sources))
            if carrier is not None:
                plain = self.tensor.dequantize() if self.tensor.is_quantized else self.tensor
                self._number = splice(plain.to(self.tracker.dtype), carrier)
        return self._number

    def weights(self, classes: int) -> Tensor | None:
        """Soft weights (*shape, classes) of what the tensor chooses, where it is an index."""
        if self.tensor.numel() * classes > _LARGEST:
            return None
        if self.choose is not None:
            weights = self._admitted(self.choose(*self.sources))
            return None if weights is None else _resized(weights, classes)
        number = self.number()
        if number is None:
            return None
        centers = torch.arange(classes, dtype=number.dtype, device=number.device)
        return torch.softmax(-0.5 * (number[..., None] - centers).square(), -1)

    def _admitted(self, carrier: Tensor | None) -> Tensor | None:
        if carrier is None or not carrier.requires_grad:
            return None
        if not self._counted and not self.tracker.admits(self.site, carrier):
            return None
        self._counted = True
        return carrier

    def moved(self, tensor: Tensor) -> Entry:
        """The same carrier for another tensor of the same value."""
        functions = (self.build, self.choose, self.gap)
        return Entry(self.tracker, tensor, self.site, self.sources, *functions)

    def outlive(self, written: Tensor) -> None:
        """Keep what a source was, before it is written into."""
        if not self._known and any(source is written for source in self.sources):
            kept = written.clone()
            self.sources = tuple(kept if s is written else s for s in self.sources)


_LARGEST = 2**25
"""Numbers in the soft weights of one index, above which it carries no gradient."""


def _resized(weights: Tensor, classes: int) -> Tensor:
    missing = classes - weights.shape[-1]
    if missing <= 0:
        return weights[..., :classes]
    return torch.nn.functional.pad(weights, (0, missing))


@dataclass
class Tracker:
    """The memory of one pass over `batch` samples; `dtype` is that of the images."""

    plan: Plan
    batch: int
    dtype: torch.dtype
    boundary: CodeType
    roots: dict[int, Tensor]
    table: dict[int, Entry] = field(default_factory=dict)
    counts: Counter[Site] = field(default_factory=Counter)
    exports: list[Export] = field(default_factory=list)
    remainders: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    aliases: dict[int, tuple[Tensor, Site]] = field(default_factory=dict)
    leaves: dict[int, Tensor] = field(default_factory=dict)
    leaf_gradients: dict[int, Tensor | None] = field(default_factory=dict)
    region: Site | None = None
    user_grad: bool = False
    related: set[Any] = field(default_factory=set)
    unrelated: set[Any] = field(default_factory=set)
    inner_calls: int = 0
    kinked: bool = False
    notes: list[str] = field(default_factory=list)

    def site(self, operation: str) -> Site | None:
        """Where the model makes the present call; None where nobody asks."""
        return calling_site(operation, self.boundary) if self.plan.logged else None

    def admits(self, site: Site | None, value: Any = None) -> bool:
        """Whether a call at this site, on `value`, is to be intercepted; counts it if so."""
        if site is None:
            return True
        if site in self.plan.excluded or (_differentiable(value) and not self._depends(value)):
            return False
        self.counts[site] += 1
        return True

    def intercepts(self, operation: str, value: Any) -> bool:
        """The same for the present call."""
        return not self.plan.logged or self.admits(self.site(operation), value)

    def _depends(self, value: Tensor) -> bool:
        """Whether a tensor depends on the images, and not on parameters alone."""
        if id(value) in self.roots:
            return True
        pending, seen = [value.grad_fn], set()
        while pending:
            node: Any = pending.pop()
            if node is None or node in seen or node in self.unrelated:
                continue
            if node in self.related or id(getattr(node, "variable", None)) in self.roots:
                self.related.add(value.grad_fn)
                return True
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
        self.unrelated |= seen
        return False

    def carries(self, value: Any) -> bool:
        """Whether a value is a tensor with a gradient of its own or by a carrier."""
        return isinstance(value, Tensor) and (value.requires_grad or id(value) in self.table)

    def carrier(self, value: Tensor) -> Tensor | None:
        """The float tensor that has the gradient of `value`."""
        if value.requires_grad:
            return value
        entry = self.table.get(id(value))
        return None if entry is None else entry.number()

    def entry(self, value: Any) -> Entry | None:
        """The carrier of a discrete tensor, not built yet."""
        return self.table.get(id(value)) if isinstance(value, Tensor) else None

    def entries(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Entry]:
        """All carriers of discrete tensors among the arguments."""
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if id(item) in self.table:
                    yield self.table[id(item)]

    def remember(
        self,
        tensor: Tensor,
        site: Site | None,
        sources: tuple[Any, ...],
        build: Build,
        choose: Build | None = None,
        gap: Gap | None = None,
    ) -> None:
        """Enter a discrete tensor; see `Entry`."""
        self.table[id(tensor)] = Entry(self, tensor, site, sources, build, choose, gap)

    def written(self, tensor: Any) -> None:
        """Take note that a tensor is about to be written into."""
        for entry in self.table.values():
            entry.outlive(tensor)

    def give(self, value: Tensor, carrier: Tensor) -> Tensor:
        """`value` with the gradient of `carrier`: spliced if it is of floats, else entered."""
        if value.is_floating_point():
            return splice(value, carrier)
        self.remember(value, None, (carrier,), lambda c: c.expand(value.shape))
        return value

    def attach(self, tensor: Tensor, carrier: Tensor) -> None:
        """The same for a tensor that keeps its identity: one that was written into."""
        if tensor.is_floating_point():
            tensor.copy_(splice(tensor.detach().clone(), carrier))
        else:
            self.give(tensor, carrier)

    def note(self, sentence: str) -> None:
        """Keep a sentence on what could not be followed, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)
