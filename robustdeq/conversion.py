"""Weights that another program left as a pickle, made into safetensors with our metadata.

The one place where such a file is opened, and only where the user says so. It is read as tensors
alone: torch refuses all else in it, and there is no second way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from robustdeq.bounded import BoundError, check_safetensors
from robustdeq.datasets import spec_of
from robustdeq.errors import CaseError, RobustDEQError, UsageError, sentence
from robustdeq.files import make_folder
from robustdeq.interfaces import trained_form
from robustdeq.keys import canonical
from robustdeq.plugin_files import located, public_name
from robustdeq.registry import load, parameters_of
from robustdeq.weights import SUFFIX, WeightsInfo, load_state, save_weights

_WITHIN = ("state_dict", "model_state_dict", "model")
"""Where programs put a model's state in what they save, outermost first."""
_WRAPPER = "module."
"""What torch's DataParallel puts in front of every name."""


def convert(
    source: Path,
    out: Path,
    *,
    defense: str,
    parameters: Mapping[str, Any],
    dataset: str,
    allow_pickle: bool = False,
) -> str:
    """Write a file's tensors as safetensors, as the weights of a defense; returns the SHA-256.

    How they were trained is not known: their metadata name no recipe.

    Args:
        source: a state_dict as torch.save leaves it, or plain safetensors.
        defense: a registered name, FILE.py or FILE.py:NAME.
        parameters: those of the defense that the tensors belong to.
        dataset: what the model was trained on.
        allow_pickle: whether a file that is no safetensors may be opened.

    Raises:
        UsageError: if `source` is a pickle and that was not allowed, or a name is not known.
        CaseError: if the file cannot be read as tensors alone, or they do not fit the defense.
    """
    if out.suffix != SUFFIX:
        raise UsageError(f"weights are written as {SUFFIX}; {out} names another kind.")
    if not source.is_file():
        raise UsageError(f"weights {source} do not exist; name the file that is to be converted.")
    if source.suffix != SUFFIX and not allow_pickle:
        raise UsageError(
            f"{source} may be a pickle; if you know where it is from, say --allow-pickle: it is "
            "read as tensors alone."
        )
    place = located("defense", defense)
    plugin = trained_form(load("defense", place, parameters))
    state = _state(source)
    try:
        model = plugin.build(spec_of(dataset), torch.device("cpu"))
    except RobustDEQError:
        raise
    except Exception as cause:
        raise CaseError(f"defense {defense!r} cannot be built: {sentence(cause)}") from cause
    load_state(model, state, source)
    info = WeightsInfo(
        defense=public_name("defense", place),
        parameters=canonical(parameters_of(plugin)),
        dataset=dataset,
        recipe="",
        recipe_parameters={},
        threat="",
        seed=0,
        complete=True,
    )
    make_folder(out.parent)
    return save_weights(model, info, out)


def _state(source: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names in the model."""
    try:
        held = _safetensors(source) if source.suffix == SUFFIX else _tensors(source)
    except BoundError as cause:
        raise CaseError(f"weights {source} cannot be read: the file {cause}.") from cause
    # Foreign bytes make the readers fail in any way there is. What torch says of a pickle is left
    # out: it advises to load the file unsafely.
    except Exception as cause:
        raise CaseError(
            f"weights {source} cannot be read as tensors alone ({type(cause).__name__}): the file "
            "is damaged or holds other objects; save its state_dict and convert that."
        ) from cause
    state = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    if not state:
        raise CaseError(f"weights {source} hold no tensors by name; save a state_dict.")
    if all(name.startswith(_WRAPPER) for name in state):
        state = {name.removeprefix(_WRAPPER): value for name, value in state.items()}
    return state


def _safetensors(source: Path) -> Mapping[str, Any]:
    check_safetensors(source)
    return load_file(source)


def _tensors(source: Path) -> Mapping[str, Any]:
    held = torch.load(source, map_location="cpu", weights_only=True)
    for name in _WITHIN:
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
    return held if isinstance(held, Mapping) else {}
