"""Weights as safetensors, with metadata that says what they are; never pickles."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from robustdeq.bounded import BoundError, check_safetensors, parse_json
from robustdeq.errors import CaseError, UsageError, sentence
from robustdeq.files import write_atomically
from robustdeq.keys import canonical, canonical_json, file_sha256

FORMAT = 1
SUFFIX = ".safetensors"
_AGAIN = "fetch or train them again."
_TYPES = {"str": str, "int": int, "bool": bool, "dict": dict}


@dataclass(frozen=True)
class WeightsInfo:
    """What trained weights are: enough to build their model and to train them again.

    `threat` is empty for clean training; `complete` is false where a time budget ended it early;
    `validation` is the number of training images that were held out to choose the weights by;
    `augmentation` says what was done to the others.
    """

    defense: str
    parameters: dict[str, Any]
    dataset: str
    recipe: str
    recipe_parameters: dict[str, Any]
    threat: str
    seed: int
    complete: bool
    environment: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT
    validation: int = 0
    augmentation: str = "none"

    def as_data(self) -> dict[str, Any]:
        """As JSON data.

        What is younger than format 1 is left out at its default: old trainings give the same bytes.
        """
        data = asdict(self)
        for name, default in (("validation", 0), ("augmentation", "none")):
            if data[name] == default:
                del data[name]
        return data


def save_weights(model: nn.Module, info: WeightsInfo, path: Path) -> str:
    """Write a model's state atomically; returns the file's SHA-256."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    payload = save(state, metadata={"robustdeq": canonical_json(info.as_data())})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, payload)
    return file_sha256(path)


def read_info(path: Path) -> WeightsInfo:
    """The metadata of a weights file.

    Raises:
        CaseError: if the file is not safetensors with our metadata of a known format.
        UsageError: if it is named like another kind of file.
    """
    check_suffix(path)
    try:
        check_safetensors(path)
        with safe_open(path, framework="pt") as stream:
            text = (stream.metadata() or {}).get("robustdeq")
        data = parse_json(text) if text else None
    except BoundError as cause:
        raise CaseError(f"weights {path} cannot be read: the file {cause}; {_AGAIN}") from cause
    except (SafetensorError, OSError) as cause:
        raise CaseError(f"weights {path} cannot be read ({cause}); {_AGAIN}") from cause
    if not isinstance(data, dict):
        raise CaseError(
            f"weights {path} carry no RobustDEQ metadata; train them with 'robustdeq train'."
        )
    if data.get("format") != FORMAT:
        raise CaseError(
            f"weights {path} are of format {data.get('format')}, this version reads {FORMAT}; "
            "use the version of RobustDEQ that wrote them."
        )
    try:
        info = WeightsInfo(**data)
    except TypeError as cause:
        raise CaseError(f"weights {path} have malformed metadata ({cause}); {_AGAIN}") from cause
    for part in fields(WeightsInfo):
        if type(getattr(info, part.name)) is not _TYPES[str(part.type).partition("[")[0]]:
            raise CaseError(f"weights {path} have malformed metadata ({part.name}); {_AGAIN}")
    return info


def check_suffix(path: Path) -> None:
    """Refuse a file that is not named as safetensors: most others are pickles, which are code.

    Raises:
        UsageError: with the command that makes safetensors of it.
    """
    if path.suffix != SUFFIX:
        raise UsageError(
            f"weights {path} are not named *{SUFFIX}, and other files can run code when they are "
            "read; write their tensors to one with 'robustdeq convert'."
        )


def verify_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose bytes are not the expected ones.

    Raises:
        CaseError: if the file is missing, or its SHA-256 differs.
    """
    if not path.is_file():
        raise CaseError(f"weights {path} do not exist; train them with 'robustdeq train'.")
    found = file_sha256(path)
    if expected and found != expected:
        raise CaseError(
            f"weights {path} have sha256 {found[:12]}..., but the suite names {expected[:12]}...; "
            "fetch them again, or correct the suite."
        )


def check_matches(
    info: WeightsInfo, expected: dict[str, Any], path: Path, by: str = "the suite"
) -> None:
    """Refuse weights whose metadata differ from what is expected of them, by the suite mostly.

    A plugin's parameter that is younger than the file stands at its default there, which must mean
    what the plugin did before it had the parameter.

    Raises:
        CaseError: naming the first field that differs, and both values.
    """
    found = canonical(asdict(info))
    for name, wanted in canonical(expected).items():
        if found.get(name) != wanted:
            raise CaseError(
                f"weights {path} say {name} = {found.get(name)!r}, but {by} says {wanted!r}; "
                "name the weights that belong to this row."
            )


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state into a model, strictly.

    Raises:
        CaseError: if names or shapes differ, or a value is not finite.
    """
    try:
        check_safetensors(path)
        state: dict[str, Tensor] = load_file(path)
    # Bytes that are no safetensors make the reader fail in any way there is.
    except Exception as cause:
        raise CaseError(f"weights {path} cannot be read ({sentence(cause)}); {_AGAIN}") from cause
    load_state(model, state, path)


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """As `load_weights`, from tensors that were read from the file."""
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError) as cause:
        first = " ".join(str(cause).split())[:200]
        raise CaseError(
            f"weights {path} do not fit the model ({first}); train them again."
        ) from cause
    if not all(bool(v.float().isfinite().all()) for v in state.values() if v.is_floating_point()):
        raise CaseError(f"weights {path} hold values that are not finite; train them again.")


def state_sha256(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a state; for models without a file."""
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            sha.update(f"{name}|{plain.dtype}|{tuple(plain.shape)}".encode())
            sha.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
