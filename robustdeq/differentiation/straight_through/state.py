"""The state of a model and of the random generators, so that passes leave no trace."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustdeq.differentiation.straight_through.sites import Site, definition_site


@dataclass
class Randomness:
    """Where random generators stand: torch's, or all that a model may draw from."""

    states: list[tuple[Any, Any]]

    @classmethod
    def now(cls, model: nn.Module, device: torch.device, everything: bool) -> Randomness:
        """As it is; `everything` takes NumPy's, Python's and the model's own generators as well."""
        states: list[tuple[Any, Any]] = [(torch.set_rng_state, torch.get_rng_state())]
        if device.type == "cuda":
            state = torch.cuda.get_rng_state(device)
            states.append((lambda s: torch.cuda.set_rng_state(s, device), state))
        if everything:
            states.append((np.random.set_state, np.random.get_state()))
            states.append((random.setstate, random.getstate()))
            states += [(g.set_state, g.get_state()) for g in _generators(model)]
        return cls(states)

    def restore(self) -> None:
        """Back to where they stood."""
        for setter, state in self.states:
            setter(state)


def _generators(model: nn.Module) -> list[torch.Generator]:
    held = (value for module in model.modules() for value in vars(module).values())
    return [value for value in held if isinstance(value, torch.Generator)]


@dataclass
class Buffers:
    """Copies of a training model's buffers, which a forward pass may write into."""

    copies: list[tuple[Tensor, Tensor]]

    @classmethod
    def now(cls, model: nn.Module, wanted: bool) -> Buffers:
        """Those of a model in training mode, or of any if wanted."""
        wanted = wanted or model.training
        return cls([(b, b.detach().clone()) for b in model.buffers()] if wanted else [])

    @torch.no_grad()
    def restore(self) -> None:
        """As they were."""
        for buffer, copy in self.copies:
            buffer.copy_(copy)


_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@contextmanager
def unhooked(model: nn.Module, found: list[Site], kept: frozenset[Site]) -> Iterator[None]:
    """Within the block no module has backward hooks, but for those kept.

    Args:
        found: receives where the hooks left out are defined.
    """
    held = [
        (vars(module), name, vars(module)[name])
        for module in model.modules()
        for name in _HOOKS
        if vars(module).get(name)
    ]
    for attributes, name, hooks in held:
        sites = {key: definition_site("module backward hook", hooks[key]) for key in hooks}
        found += [site for site in sites.values() if site not in kept]
        attributes[name] = OrderedDict((k, hooks[k]) for k in hooks if sites[k] in kept)
    try:
        yield
    finally:
        for attributes, name, hooks in held:
            attributes[name] = hooks


@contextmanager
def nothing_kept(model: nn.Module) -> Iterator[None]:
    """After the block, what the model kept of it (caches, buffers) is cut off its graph."""
    before = {id(value) for _, _, value in _grown(model)}
    try:
        yield
    finally:
        for held, name, value in list(_grown(model)):
            if id(value) not in before:
                held[name] = value.detach()


def _grown(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Tensors with a graph that modules hold."""
    for module in model.modules():
        for held in (vars(module), module._buffers):
            for name, value in held.items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    yield held, name, value
