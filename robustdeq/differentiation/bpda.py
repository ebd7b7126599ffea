"""Another backward pass for one submodule (BPDA): the adaptive attack that needs no new model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor, nn

from robustdeq.differentiation.module_gradient import ModuleGradient, Predict
from robustdeq.equilibrium import splice
from robustdeq.errors import UsageError, unknown
from robustdeq.shapes import Images, Logits

Surrogate = Callable[..., Tensor]


@dataclass(frozen=True)
class BPDA(ModuleGradient):
    """The backward pass of a submodule replaced by the identity, or by that of a surrogate.

    Backward pass differentiable approximation (Athalye, Carlini and Wagner 2018, "Obfuscated
    Gradients Give a False Sense of Security", section 4.1). The forward pass stays as it is, bit
    for bit. Biased as far as the submodule differs from what stands for it.

    Attributes:
        module: the submodule's dotted name in the model, as in `model.named_modules()`.
        surrogate: what stands for it: a function of the submodule's positional arguments, or where
            to import one from, `package.module:function`; without it the identity of the first.
    """

    module: str
    surrogate: Surrogate | str | None = None

    def __post_init__(self) -> None:
        if not self.module:
            raise UsageError("bpda names no submodule; write bpda(purifier), say.")
        if isinstance(self.surrogate, str):
            imported(self.surrogate)

    def __str__(self) -> str:
        if self.surrogate is None:
            return f"bpda({self.module})"
        path = self.surrogate
        if not isinstance(path, str):
            path = f"{path.__module__}:{getattr(path, '__qualname__', type(path).__qualname__)}"
        return f"bpda({self.module},{path})"

    def __call__(self, model: nn.Module, predict: Predict, x: Images) -> Logits:
        """See `ModuleGradient`.

        Raises:
            UsageError: for an unknown submodule, one that is not called, or shapes that differ.
        """
        if not torch.is_grad_enabled():
            return predict(x)
        calls: list[int] = []

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            calls.append(1)
            # Also where the model calls it without gradients, as purifiers like to be.
            with torch.enable_grad():
                return self._replaced(arguments, output)

        handle = self._found(model).register_forward_hook(hook)
        try:
            logits = predict(x)
        finally:
            handle.remove()
        if not calls:
            raise UsageError(f"{self}: the model never calls submodule {self.module!r}.")
        return logits

    def _found(self, model: nn.Module) -> nn.Module:
        modules: dict[str, nn.Module] = {n: part for n, part in model.named_modules() if n}
        if self.module not in modules:
            raise unknown("submodule", self.module, modules)
        return modules[self.module]

    def _replaced(self, arguments: tuple[Any, ...], output: Any) -> Tensor | None:
        """The same output with the other backward pass; None where nothing is to be passed."""
        if not isinstance(output, Tensor):
            raise UsageError(f"{self}: the submodule returns {type(output).__name__}, no tensor.")
        carrier = self._carrier(arguments)
        if not carrier.requires_grad:
            return None
        if carrier.shape != output.shape:
            remedy = "name a surrogate" if self.surrogate is None else "return the output's shape"
            raise UsageError(
                f"{self}: the submodule's output has shape {tuple(output.shape)}, what stands for "
                f"it {tuple(carrier.shape)}; {remedy}."
            )
        return splice(output, carrier.to(output.dtype))

    def _carrier(self, arguments: tuple[Any, ...]) -> Tensor:
        if self.surrogate is None:
            carrier = arguments[0] if arguments else None
        else:
            surrogate = self.surrogate
            function = imported(surrogate) if isinstance(surrogate, str) else surrogate
            carrier = function(*arguments)
        if not isinstance(carrier, Tensor):
            raise UsageError(
                f"{self}: {type(carrier).__name__} stands for the submodule's output; it must be "
                "a tensor (the first positional argument, without a surrogate)."
            )
        return carrier


@lru_cache
def imported(path: str) -> Callable[..., Any]:
    """The function at `package.module:function`.

    Raises:
        UsageError: if there is none.
    """
    module, colon, name = path.partition(":")
    try:
        if not colon:
            raise ImportError("there is no colon")
        function: Any = reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as cause:
        raise UsageError(
            f"surrogate {path!r} cannot be imported ({cause}); write package.module:function."
        ) from cause
    if not callable(function):
        raise UsageError(f"surrogate {path!r} is no function.")
    found: Callable[..., Any] = function
    return found
