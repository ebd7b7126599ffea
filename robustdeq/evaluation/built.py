"""What `robustdeq.evaluate` is given as its model: a module, or a plugin that builds one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from robustdeq.datasets import DataSpec, spec_of
from robustdeq.errors import CaseError, RobustDEQError, UsageError, sentence
from robustdeq.evaluation.judge import seeded
from robustdeq.interfaces import Defense, kind_of, trained_form
from robustdeq.keys import canonical
from robustdeq.randomness import derived_seed
from robustdeq.registry import parameters_of
from robustdeq.weights import check_matches, load_weights, read_info, verify_sha256


def as_module(
    model: nn.Module | Defense,
    x: Tensor,
    y: Tensor,
    weights: str | Path | None,
    seed: int,
    device: str | torch.device | None,
) -> nn.Module:
    """The module itself, or what a plugin builds for images like `x`, with its weights.

    Raises:
        UsageError: if it is neither, or weights are given for a module.
        CaseError: if the plugin cannot build, or the weights are of something else.
    """
    if isinstance(model, nn.Module):
        if weights is not None:
            raise UsageError("weights are for a defense plugin; load them into the module before.")
        return model
    if kind_of(model) != "defense" or isinstance(model, type):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise UsageError(f"model is {what}; give a torch.nn.Module, or a plugin like MyDEQ().")
    path = None if weights is None else Path(weights)
    return _built(model, _spec(x, y, path), path, seed, torch.device(device or "cpu"))


def _built(
    defense: Defense, data: DataSpec, path: Path | None, seed: int, device: torch.device
) -> nn.Module:
    try:
        with seeded(derived_seed(seed, "build"), device):
            model = defense.build(data, device)
    except RobustDEQError:
        raise
    except Exception as cause:
        name = type(defense).__name__
        raise CaseError(f"defense {name!r} cannot be built: {sentence(cause)}") from cause
    if path is not None:
        parameters = canonical(parameters_of(trained_form(defense)))
        check_matches(read_info(path), {"parameters": parameters}, path, by="the plugin")
        load_weights(model, path)
        model.requires_grad_(False)
    return model


def _spec(x: Tensor, y: Tensor, path: Path | None) -> DataSpec:
    """The shape of the images, with the classes of the weights' data set, or those in `y`."""
    channels, height, width = (int(size) for size in x.shape[1:])
    classes = max(int(y.max()) + 1, 2)
    if path is not None:
        verify_sha256(path, "")
        classes = spec_of(read_info(path).dataset).classes
    return DataSpec("tensors", classes, channels, height, width)
