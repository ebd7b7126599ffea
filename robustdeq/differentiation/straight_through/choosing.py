"""Indices that depend on the data: argmax, sorting, and what is then looked up by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustdeq.differentiation.straight_through.call import Call, Rule, constant, quiet
from robustdeq.differentiation.straight_through.graph import join, row_scale, weighted
from robustdeq.differentiation.straight_through.tracker import Entry, Tracker


def _argument(tracker: Tracker, call: Call) -> Any:
    """`argmax` and the like: the index alone is returned."""
    x = call.args[0]
    if not tracker.carries(x):
        return NotImplemented
    out = call.run()
    if isinstance(out, Tensor):
        _remember(tracker, call, x, out, *_dimension(call))
    return out


def _extreme(tracker: Tracker, call: Call) -> Any:
    """`max`, `topk`, `sort` and the like: values, which autograd knows, with their indices."""
    x = call.args[0]
    if not tracker.carries(x):
        return NotImplemented
    out = call.run()
    if not isinstance(out, tuple) or not x.requires_grad or len(out) != 2:
        return NotImplemented
    base = call.name.base
    position = 2 if base in ("topk", "kthvalue") else 1
    dim = call.argument(position, "dim", -1)
    dim = dim if isinstance(dim, int) and not isinstance(dim, bool) else -1
    _remember(tracker, call, x, out[1], dim, out[1].dim() == x.dim())
    return out


def _dimension(call: Call) -> tuple[int | None, bool]:
    dim = call.argument(1, "dim", -1 if call.name.base == "argsort" else None)
    dim = -1 if isinstance(dim, bool) else dim
    return dim, call.name.base == "argsort" or bool(call.argument(2, "keepdim", False))


def _remember(
    tracker: Tracker, call: Call, x: Tensor, index: Tensor, dim: int | None, kept: bool
) -> None:
    def choose(source: Tensor) -> Tensor | None:
        carrier = tracker.carrier(source)
        return None if carrier is None else _soft_choice(carrier, index, dim, kept)

    def build(source: Tensor) -> Tensor | None:
        weights = choose(source)
        return None if weights is None else _expected(weights)

    tracker.remember(index, tracker.site(call.name.base), (x,), build, choose)


def _expected(weights: Tensor) -> Tensor:
    return weights @ torch.arange(weights.shape[-1], dtype=weights.dtype, device=weights.device)


def _soft_choice(x: Tensor, index: Tensor, dim: int | None, kept: bool) -> Tensor | None:
    """Weights (*index.shape, classes): softmax of minus the distance to the value chosen.

    For the largest this is a softmax of the values; for sorting it is SoftSort (Prillo and
    Eisenschlos 2020). As wide as the values of a row are apart.
    """
    if dim is None:
        x, dim = x.flatten(), -1
    lined = x.movedim(dim, -1)
    if index.numel() * lined.shape[-1] > 2**25:
        return None
    places = index.movedim(dim, -1) if kept and index.dim() else index[..., None]
    chosen = lined.gather(-1, places)[..., None]
    rows = lined.reshape(-1, lined.shape[-1])
    width = row_scale(rows - rows.mean(1, keepdim=True)).view(*lined.shape[:-1], 1, 1)
    weights = torch.softmax(-(chosen - lined[..., None, :]).abs() / width, -1)
    return weights.movedim(-2, dim - 1 if dim < 0 else dim) if kept else weights.squeeze(-2)


def _one_hot(tracker: Tracker, call: Call) -> Any:
    entry = tracker.entry(call.args[0])
    if entry is None:
        return NotImplemented
    out = call.run()

    def build() -> Tensor | None:
        return entry.weights(out.shape[-1])

    tracker.remember(out, None, (), build)
    return out


def _gathered(tracker: Tracker, call: Call) -> Any:
    """`gather`: the mean of what could have been gathered, by weight."""
    x, dim, index = call.args[0], call.argument(1, "dim"), call.argument(2, "index")
    entry = tracker.entry(index)
    if entry is None or not isinstance(dim, int):
        return NotImplemented
    out = call.run()
    weights = entry.weights(x.shape[dim])
    if weights is None or not out.is_floating_point():
        return NotImplemented
    weights = weights.movedim(dim, -2) if dim >= 0 else weights.movedim(dim - 1, -2)
    lined = x.detach().movedim(dim, -1)[..., None, :]
    inside = tuple(slice(0, size) for size in weights.shape[:-2])
    return join(out, (weights * lined[inside]).sum(-1).movedim(-1, dim))


def _looked_up(tracker: Tracker, call: Call) -> Any:
    """`embedding`, `index_select` along the first dimension, and x[index]."""
    base = call.name.base
    table, index = call.args[0], call.args[-1]
    if base == "embedding":
        index = call.argument(1, "indices")
    elif base == "index_select":
        index = call.argument(2, "index")
        if call.argument(1, "dim") != 0:
            return NotImplemented
    if isinstance(index, tuple):
        return _paired(tracker, call, table, index)
    entry = tracker.entry(index)
    if entry is None or not isinstance(table, Tensor) or index.dtype == torch.bool:
        return NotImplemented
    return _mixed(tracker, _value(call, table), entry, table)


def _value(call: Call, table: Tensor) -> Tensor:
    out: Tensor = call.run() if table.requires_grad else quiet(call)
    return out


def _mixed(tracker: Tracker, out: Tensor, entry: Entry, table: Tensor) -> Any:
    weights = entry.weights(table.shape[0])
    if weights is None:
        return out
    rows = table.detach().to(weights.dtype).flatten(1) if table.dim() > 1 else None
    soft = weights @ (table.detach().to(weights.dtype) if rows is None else rows)
    soft = soft.view(out.shape)
    return join(out, soft) if out.is_floating_point() else tracker.give(out, soft)


def _paired(tracker: Tracker, call: Call, x: Tensor, index: tuple[Any, ...]) -> Any:
    """x[rows, index] with one index that carries, after one that does not."""
    entry = tracker.entry(index[1]) if len(index) == 2 else None
    rows = index[0]
    if entry is None or not isinstance(rows, Tensor) or tracker.carries(rows):
        return NotImplemented
    if not x.is_floating_point() or entry.tensor.dtype == torch.bool:
        return NotImplemented
    out = call.run()
    weights = entry.weights(x.shape[1])
    if weights is None:
        return out
    options = x.detach()[rows]
    shape = (*weights.shape, *[1] * (options.dim() - weights.dim()))
    dimension = weights.dim() - 1
    return join(out, (weights.view(shape) * options).sum(dimension).view(out.shape))


def _scattered(tracker: Tracker, call: Call) -> Any:
    """One value scattered by an index that carries: its weights times the change."""
    target, dim, index = call.args[0], call.argument(1, "dim"), call.argument(2, "index")
    value = call.argument(3, "value", call.argument(3, "src"))
    entry = tracker.entry(index)
    single = not isinstance(value, Tensor) or value.numel() == 1
    if entry is None or not single or not isinstance(dim, int):
        return NotImplemented
    weights = entry.weights(target.shape[dim])
    if weights is None or not target.is_floating_point():
        return NotImplemented
    out = call.run()
    spread = weights.sum(dim if dim >= 0 else dim - 1).movedim(-1, dim)
    return join(out, weighted(spread, constant(value, target) - target.detach()))


def _placed(tracker: Tracker, call: Call) -> Any:
    """x[rows, index] = value, where the rows are all rows in their order."""
    if not tracker.table or len(call.args) != 3:
        return NotImplemented
    target, index, value = call.args
    pair = isinstance(index, tuple) and len(index) == 2
    entry = tracker.entry(index[1]) if pair else None
    if entry is None or target.dim() != 2 or (isinstance(value, Tensor) and value.numel() > 1):
        return NotImplemented
    weights = entry.weights(target.shape[1])
    rows = torch.arange(len(target), device=target.device)
    if weights is None or weights.shape != target.shape or not _equal(index[0], rows):
        return NotImplemented
    tracker.written(target)
    change = weighted(weights, constant(value, target) - target.detach())
    call.run()
    before = tracker.carrier(target)
    tracker.attach(target, change if before is None else before + change)
    return None


def _equal(index: Any, rows: Tensor) -> bool:
    return isinstance(index, Tensor) and index.shape == rows.shape and torch.equal(index, rows)


def _gotten(tracker: Tracker, call: Call) -> Any:
    return _looked_up(tracker, call) if tracker.table else NotImplemented


def _drawn_index(tracker: Tracker, call: Call) -> Any:
    """`multinomial`: the probabilities are the weights."""
    p = call.args[0]
    if not isinstance(p, Tensor) or not p.requires_grad:
        return NotImplemented
    out = call.run()

    def choose(p: Tensor) -> Tensor:
        normal = p / p.detach().sum(-1, keepdim=True)
        return normal[..., None, :].expand(*out.shape, p.shape[-1])

    def build(p: Tensor) -> Tensor:
        return _expected(choose(p))

    tracker.remember(out, tracker.site("multinomial"), (p,), build, choose)
    return out


CHOOSING: dict[str, Rule] = {
    **dict.fromkeys(("argmax", "argmin", "argsort"), _argument),
    **dict.fromkeys(("max", "min", "topk", "sort", "kthvalue", "median", "mode"), _extreme),
    **dict.fromkeys(("embedding", "index_select", "__getitem__"), _gotten),
    "one_hot": _one_hot,
    "gather": _gathered,
    "scatter": _scattered,
    "__setitem__": _placed,
    "multinomial": _drawn_index,
}
