"""Optimization inside the forward pass: inner gradients, leaves and backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from robustdeq.differentiation.straight_through.call import Call, Rule
from robustdeq.differentiation.straight_through.graph import splice
from robustdeq.differentiation.straight_through.tracker import Tracker

_FURTHER = (
    "retain_graph", "create_graph", "only_inputs", "allow_unused", "is_grads_batched",
    "materialize_grads",
)  # fmt: skip


def _gradient(tracker: Tracker, call: Call) -> Any:
    """`autograd.grad`: a constant, hence the identity for what it moves (BPDA); or differentiated.

    The graph stays, for the outer pass goes through the same one.
    """
    outputs = _listed(call.argument(0, "outputs"))
    if not any(tracker.carries(output) for output in outputs):
        return NotImplemented
    tracker.inner_calls += 1
    kwargs = dict(zip(_FURTHER, call.args[3:], strict=False)) | call.kwargs
    kwargs["retain_graph"] = True
    if tracker.plan.double and tracker.intercepts("autograd.grad", outputs[0]):
        kwargs["create_graph"] = True
    own = call.func(*call.args[:3], **kwargs)
    return _replayed(tracker, own)


def _replayed(tracker: Tracker, own: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What the honest pass found, where that is known: the rules bend inner gradients as well."""
    if tracker.plan.bypass:
        return tuple(None if gradient is None else torch.zeros_like(gradient) for gradient in own)
    position = tracker.inner_calls - 1
    if position >= len(tracker.plan.replay):
        return tuple(own)
    found = tracker.plan.replay[position]
    if len(found) != len(own):
        return tuple(own)
    return tuple(_valued(value, mine) for value, mine in zip(found, own, strict=True))


def _valued(value: Tensor | None, own: Tensor | None) -> Tensor | None:
    if value is None or own is None or value.shape != own.shape:
        return own
    return splice(value.clone(), own) if own.requires_grad else value.clone()


def _backward(tracker: Tracker, call: Call) -> Any:
    """`backward`: into inner leaves and parameters, never beyond them into the caller's images."""
    losses = _listed(call.argument(0, "tensors"))
    weights = call.argument(1, "grad_tensors", call.kwargs.get("gradient"))
    if not any(tracker.carries(loss) for loss in losses):
        return NotImplemented
    tracker.inner_calls += 1
    inputs = call.kwargs.get("inputs")
    leaves = _leaves(tracker, losses) if inputs is None else _listed(inputs)
    if leaves:
        found = torch.autograd.grad(
            losses,
            leaves,
            None if weights is None else _listed(weights),
            retain_graph=True,
            create_graph=tracker.plan.double and tracker.intercepts("backward", losses[0]),
            allow_unused=True,
        )
        for leaf, gradient in zip(leaves, _replayed(tracker, found), strict=True):
            _accumulate(tracker, leaf, gradient)
    return None


def _leaves(tracker: Tracker, losses: list[Tensor]) -> list[Tensor]:
    """What the model made a leaf of, and the leaves of the graph but for the images."""
    found = {id(leaf): leaf for leaf in tracker.leaves.values()}
    pending, seen = [loss.grad_fn for loss in losses], set()
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in tracker.roots:
            found[id(variable)] = variable
        pending += [following for following, _ in node.next_functions]
    return list(found.values())


def _accumulate(tracker: Tracker, leaf: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if leaf.is_leaf and id(leaf) not in tracker.leaves:
        leaf.grad = gradient.detach() if leaf.grad is None else leaf.grad + gradient.detach()
        return
    before = tracker.leaf_gradients.get(id(leaf))
    tracker.leaf_gradients[id(leaf)] = gradient if before is None else before + gradient


def _listed(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _read(tracker: Tracker, call: Call) -> Any:
    x = call.args[0]
    if id(x) in tracker.leaves:
        return tracker.leaf_gradients.get(id(x))
    return None if x.requires_grad and not x.is_leaf else call.func(x)


def _write(tracker: Tracker, call: Call) -> Any:
    x, value = call.args
    if id(x) not in tracker.leaves:
        return NotImplemented
    tracker.leaf_gradients[id(x)] = value
    return None


def _retained(tracker: Tracker, call: Call) -> Any:
    x = call.args[0]
    if not x.requires_grad:
        return NotImplemented
    tracker.leaves[id(x)] = x
    return None


INNER: dict[str, Rule] = {
    "autograd.grad": _gradient,
    "autograd.backward": _backward,
    "backward": _backward,
    "retain_grad": _retained,
    "grad.get": _read,
    "grad.set": _write,
}
