"""One call of torch's API as the mode sees it, and the names that rules go by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from robustdeq.differentiation.straight_through.tracker import Entry, Tracker

Rule = Callable[[Tracker, "Call"], Any]

_OPERATORS = {
    "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not",
    "lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift", "floordiv": "floor_divide",
    "mod": "remainder", "truediv": "div", "pow": "pow", "matmul": "matmul", "round": "round",
}  # fmt: skip
_ALIASES = {
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "subtract": "sub", "clip": "clamp", "fix": "trunc", "special_round": "round",
    "special_expit": "sigmoid", "expit": "sigmoid", "special_softmax": "softmax",
    "special_log_softmax": "log_softmax", "special_erf": "erf", "multiply": "mul",
}  # fmt: skip
_SWAPPED = frozenset(
    f"__r{name}__" for name in ("sub", "mod", "floordiv", "lshift", "rshift", "truediv", "pow")
)
_KEPT = frozenset(("requires_grad_", "detach_"))
_DUNDERS = frozenset(("__getitem__", "__setitem__", "__array__", "__array_wrap__", "__deepcopy__"))


@dataclass(frozen=True)
class Name:
    """What a function of torch's API is called, less the spelling.

    Attributes:
        base: "round" for `Tensor.round_` too; "data.get" for reading a property.
        in_place: whether it writes into its first argument.
        swapped: whether its two arguments stand the other way round.
    """

    base: str
    in_place: bool = False
    swapped: bool = False


@cache
def name_of(func: Any) -> Name:
    """The name of a function as a mode sees it."""
    text = str(getattr(func, "__name__", func))
    if text in ("__get__", "__set__"):
        return Name(f"{func.__self__.__name__}.{text.strip('_')}")
    if getattr(func, "__module__", None) == "torch.autograd":
        return Name(f"autograd.{text}")
    if text in _KEPT:
        return Name(text)
    if text in _DUNDERS:
        return Name(text, in_place=text == "__setitem__")
    if text.startswith("__") and text.endswith("__"):
        return _operator(text)
    in_place = text.endswith("_") and not text.endswith("__")
    base = text.removesuffix("_") if in_place else text
    return Name(_ALIASES.get(base, base), in_place)


def _operator(text: str) -> Name:
    core = text.strip("_")
    if core in _OPERATORS or core in ("eq", "ne", "gt", "ge", "lt", "le", "sub", "mul", "add"):
        return Name(_OPERATORS.get(core, core))
    if core[1:] in _OPERATORS or core[1:] in ("sub", "mul", "add"):
        base = _OPERATORS.get(core[1:], core[1:])
        return Name(base, in_place=core[0] == "i", swapped=text in _SWAPPED)
    return Name(text)


@dataclass(frozen=True)
class Call:
    """A function of torch's API with its arguments; tensors first, whatever they were named."""

    func: Any
    name: Name
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """Make the call as it stands."""
        return self.func(*self.args, **self.kwargs)

    def operands(self) -> tuple[Any, ...]:
        """The positional arguments in their mathematical order."""
        return self.args[1::-1] if self.name.swapped else self.args

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def softened(self, entries: list[Entry]) -> Call | None:
        """The same call on the carriers of its discrete tensors; None where there are none."""
        numbers = {id(e.tensor): e.number() for e in entries}
        if all(number is None for number in numbers.values()):
            return None

        def soft(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(soft(item) for item in value)
            number = numbers.get(id(value))
            return value if number is None else number

        args = tuple(soft(value) for value in self.args)
        if self.name.in_place:
            args = (args[0].clone(), *args[1:])
        return replace(self, args=args, kwargs={k: soft(v) for k, v in self.kwargs.items()})


def called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Call:
    """The call of `func`; an `input` or `self` given by name comes first."""
    kwargs = kwargs or {}
    for first in ("input", "self"):
        if not args and first in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop(first),)
    return Call(func, name_of(func), args, kwargs)


def quiet(call: Call) -> Any:
    """The call's value alone, without a graph."""
    with torch.no_grad():
        return call.run()


def constant(value: Any, like: Tensor) -> Tensor:
    """A tensor or number as a tensor of the type of `like`."""
    if isinstance(value, Tensor):
        return value.detach().to(like.dtype)
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)
