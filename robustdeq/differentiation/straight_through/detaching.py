"""Whatever takes a tensor out of the graph, or switches the graph off."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from robustdeq.differentiation.straight_through.arrays import imported
from robustdeq.differentiation.straight_through.call import Call, Rule
from robustdeq.differentiation.straight_through.sites import Site, called_by_model, leaving_region
from robustdeq.differentiation.straight_through.tracker import Tracker


def _detached(tracker: Tracker, call: Call) -> Any:
    """A view in the graph: it shares memory, as the original does, and keeps the gradient."""
    x = call.args[0]
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return NotImplemented
    if x.is_leaf and x.requires_grad and id(x) not in tracker.roots:
        return NotImplemented
    name = call.name.base.removesuffix(".get")
    if x.requires_grad:
        return x.view_as(x) if tracker.intercepts(name, x) else NotImplemented
    return _alias(tracker, x, tracker.site(name))


def _alias(tracker: Tracker, x: Tensor, site: Site | None) -> Tensor:
    """A view of a constant, through which what depends on the input may be written into it."""
    if site is not None and site in tracker.plan.excluded:
        return x.detach()
    view = x.view_as(x)
    if site is not None:
        tracker.aliases[id(view)] = (view, site)
    return view


def _detached_in_place(tracker: Tracker, call: Call) -> Any:
    x = call.args[0]
    return x if x.requires_grad and tracker.intercepts("detach_", x) else NotImplemented


def _data_set(tracker: Tracker, call: Call) -> Any:
    """x.data = value, then the value's gradient."""
    x, value = call.args
    if not isinstance(value, Tensor) or not value.requires_grad:
        return NotImplemented
    if not tracker.intercepts("data", value):
        return NotImplemented
    call.func(x, value.detach().clone())
    x.copy_(value)
    return None


def _wanted(tracker: Tracker, call: Call) -> Any:
    """`requires_grad_`: never taken back, and what asks for it is an inner leaf."""
    x, wanted = call.args[0], call.argument(1, "requires_grad", True)
    if not wanted:
        taken = x.requires_grad and tracker.intercepts("requires_grad_", x)
        return x if taken else NotImplemented
    if not x.requires_grad:
        if not tracker.plan.double or type(x) is not Tensor:
            return NotImplemented
        # A leaf that is moved in place would lose what its moves depend on.
        x.copy_(x.detach().clone().requires_grad_())
    tracker.leaves[id(x)] = x
    return x


def _wanted_set(tracker: Tracker, call: Call) -> Any:
    out = _wanted(tracker, call)
    return None if isinstance(out, Tensor) else out


def _wanted_get(tracker: Tracker, call: Call) -> Any:
    """What the model is told, where it is to believe that gradients are off."""
    x = call.args[0]
    told = tracker.plan.deployed_mode and not tracker.user_grad and id(x) not in tracker.leaves
    if told and x.requires_grad and called_by_model(5):
        return not tracker.intercepts("requires_grad", x)
    return call.func(x)


def _is_leaf(tracker: Tracker, call: Call) -> Any:
    return id(call.args[0]) in tracker.leaves or call.func(*call.args)


def _grad_mode(tracker: Tracker, call: Call) -> Any:
    """Gradients stay on, whatever `no_grad` asks for."""
    wanted = bool(call.args[0])
    leaving = leaving_region(4)
    if leaving or wanted or not torch.is_grad_enabled():
        tracker.user_grad, tracker.region = wanted, None
        return call.func(wanted or leaving)
    return enter_region(tracker, "no_grad")


def enter_region(tracker: Tracker, operation: str) -> None:
    """A region without gradients is one interception, once something in it carries one."""
    tracker.user_grad = False
    site = tracker.site(operation)
    if site is not None and site in tracker.plan.excluded:
        with torch._C.DisableTorchFunction():
            torch._C._set_grad_enabled(False)
        return
    tracker.region = site


def _copied(tracker: Tracker, call: Call) -> Any:
    """`torch.tensor`, `as_tensor` and `new_tensor` of a tensor, an array or numbers."""
    position = 1 if call.name.base == "new_tensor" else 0
    data = call.argument(position, "data")
    if not isinstance(data, Tensor):
        return imported(tracker, call, data)
    if call.name.base in ("as_tensor", "asarray") or not tracker.carries(data):
        return NotImplemented
    carrier = tracker.carrier(data)
    if carrier is None or not tracker.intercepts(call.name.base, carrier):
        return NotImplemented
    like = call.args[0] if position else data
    dtype, device = call.kwargs.get("dtype") or like.dtype, call.kwargs.get("device") or like.device
    value = data.detach().clone().to(device, dtype)
    return tracker.give(value, carrier.to(value.device))


def _deep_copy(tracker: Tracker, call: Call) -> Any:
    x = call.args[0]
    return x.clone() if x.requires_grad and not x.is_leaf else NotImplemented


def _hook(tracker: Tracker, call: Call) -> Any:
    """A hook on a gradient is not installed."""
    x = call.args[0]
    if not x.requires_grad or not tracker.intercepts(call.name.base, x):
        return NotImplemented
    return RemovableHandle(OrderedDict())


DETACHING: dict[str, Rule] = {
    "detach": _detached,
    "detach_": _detached_in_place,
    "data.get": _detached,
    "data.set": _data_set,
    "requires_grad_": _wanted,
    "requires_grad.set": _wanted_set,
    "requires_grad.get": _wanted_get,
    "is_leaf.get": _is_leaf,
    "_set_grad_enabled": _grad_mode,
    **dict.fromkeys(("tensor", "as_tensor", "asarray", "new_tensor"), _copied),
    "__deepcopy__": _deep_copy,
    **dict.fromkeys(("register_hook", "register_post_accumulate_grad_hook"), _hook),
}
