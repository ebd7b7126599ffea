"""A model of RobustBench's zoo as a row beside ours; needs the extra `robustdeq[robustbench]`.

RobustBench is imported when a model is built and not before: this file is loaded by everyone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from robustdeq.datasets import DataSpec
from robustdeq.errors import CaseError, UsageError, sentence, unknown
from robustdeq.interfaces import About

_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
# Constants of normalization that the zoo's classes hold, and that many of its checkpoints lack.
_CONSTANTS = {"mu", "sigma", "mean", "std"}
# What some of its checkpoints hold beyond their network; RobustBench leaves the same out.
_SURPLUS = ("model_preact_hl1.", ".scores")
# Where a checkpoint holds its state; "last" is what RobustBench takes of a "last" and a "best".
_NESTED = ("state_dict", "model", "last")


@dataclass(frozen=True, kw_only=True)
class RobustBenchModel:
    """A model of RobustBench's zoo, with the weights that its authors released.

    It is never trained here: `recipe` only fills the contract, and the weights ask for no gradient.

    Attributes:
        model: the name in the zoo, as in "Carmon2019Unlabeled".
        threat: the zoo's threat model that the name stands under; attacks use the row's own.
        dataset: the zoo's data set.
        file: a checkpoint to load in place of the download, relative to the working directory:
            .safetensors, or a file of torch.save that holds tensors alone.
        folder: where downloads are kept; RobustBench's own default.
    """

    about: ClassVar[About] = About(
        "RobustBench: a standardized adversarial robustness benchmark",
        "Francesco Croce, Maksym Andriushchenko, Vikash Sehwag, Edoardo Debenedetti, "
        "Nicolas Flammarion, Mung Chiang, Prateek Mittal, Matthias Hein",
        "NeurIPS 2021 Datasets and Benchmarks",
        "https://arxiv.org/abs/2010.09670",
    )
    recipe: ClassVar[str] = "pgd_at"

    model: str
    threat: Literal["Linf", "L2", "corruptions", "corruptions_3d"]
    dataset: Literal["cifar10", "cifar100", "imagenet"] = "cifar10"
    file: str = ""
    folder: str = "models"

    def build(self, data: DataSpec, device: torch.device) -> nn.Module:
        """See `robustdeq.interfaces.Defense`.

        Raises:
            UsageError: without RobustBench, for a name that it does not know, or for other data.
            CaseError: if the weights cannot be downloaded, read, or fitted to the model.
        """
        utils = _robustbench_utils()
        self._check_data(data)
        self._check_name(utils)
        model = self._from_file(utils) if self.file else self._downloaded(utils)
        # The weights are final; without this, FAB's backward passes fill their gradients.
        return model.requires_grad_(False).to(device).eval()

    def _check_data(self, data: DataSpec) -> None:
        found = (data.channels, data.height, data.width)
        # The zoo's ImageNet models differ in their crops, so there only the channels are known.
        shape = (3, 32, 32) if self.dataset != "imagenet" else (3, *found[1:])
        if data.classes != _CLASSES[self.dataset] or found != shape:
            raise UsageError(
                f"RobustBench's {self.model} is for {self.dataset} "
                f"({_CLASSES[self.dataset]} classes, {shape[0]} channels), but {data.name} has "
                f"{data.classes} classes and images of shape {found}; choose other data."
            )

    def _check_name(self, utils: Any) -> None:
        data, threat = self._place(utils)
        known = utils.all_models[data][threat]
        if self.model not in known and not utils.timm.is_model(self._timm_name()):
            raise unknown(f"{self.dataset} {threat.value} model of RobustBench", self.model, known)

    def _place(self, utils: Any) -> tuple[Any, Any]:
        """RobustBench's own names for data set and threat; both corruptions share their models."""
        threat = utils.ThreatModel(self.threat.removesuffix("_3d"))
        return utils.BenchmarkDataset(self.dataset), threat

    def _timm_name(self) -> str:
        """The name under which some of the zoo's models are registered with timm instead."""
        name = self.model.lower().replace("-", "_")
        return f"{name}_{self.dataset}_{self.threat.removesuffix('_3d').lower()}"

    def _downloaded(self, utils: Any) -> nn.Module:
        try:
            with _quietly():
                model: nn.Module = utils.load_model(
                    self.model, self.folder, self.dataset, self.threat
                )
        except Exception as cause:
            raise CaseError(
                f"RobustBench cannot load {self.model} into {self.folder} ({_short(cause)}); "
                "delete what is there of it, or get its checkpoint by hand and name it as 'file'."
            ) from cause
        return model

    def _from_file(self, utils: Any) -> nn.Module:
        state = _read(Path(self.file))
        model = self._architecture(utils)
        _load(model, state, self.file, self.model)
        return model

    def _architecture(self, utils: Any) -> nn.Module:
        data, threat = self._place(utils)
        name = self._timm_name()
        try:
            with _quietly():
                model: nn.Module = (
                    utils.timm.create_model(name, num_classes=_CLASSES[self.dataset])
                    if utils.timm.is_model(name)
                    else utils.all_models[data][threat][self.model]["model"]()
                )
        except Exception as cause:
            raise CaseError(f"RobustBench cannot build {self.model} ({_short(cause)}).") from cause
        return model


def _robustbench_utils() -> Any:
    """The module `robustbench.utils`.

    Raises:
        UsageError: if RobustBench is not installed, or cannot be imported.
    """
    remedy = 'pip install "robustdeq[robustbench]"'
    if importlib.util.find_spec("robustbench") is None:
        raise UsageError(f"defense 'robustbench' needs RobustBench; install it with {remedy}.")
    try:
        with _quietly(), _stand_ins():
            return importlib.import_module("robustbench.utils")
    except Exception as cause:
        raise UsageError(
            f"RobustBench cannot be imported ({_short(cause)}); install it again with {remedy}."
        ) from cause


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Its prints go to standard error, since standard output is a table's; its warnings nowhere."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Two modules that RobustBench 1.1.1 imports and its wheel no longer brings, for as long.

    It imports `autoattack`, but depends on `pyautoattack`, the same code under another name; and
    `pkg_resources`, which left setuptools with version 81. Modules that exist are used as they are.
    """
    given: dict[str, types.ModuleType] = {}
    if not _exists("autoattack"):
        given["autoattack"] = importlib.import_module("pyautoattack")
        given["autoattack.state"] = importlib.import_module("pyautoattack.state")
    if not _exists("pkg_resources"):
        given["pkg_resources"] = types.ModuleType("pkg_resources")
        vars(given["pkg_resources"])["resource_filename"] = _resource_filename
    sys.modules.update(given)
    try:
        yield
    finally:
        for name in given:
            sys.modules.pop(name, None)


def _exists(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _resource_filename(module: str, path: str) -> str:
    """`pkg_resources.resource_filename`, the one function that RobustBench calls."""
    return str(Path(str(importlib.import_module(module).__file__)).parent / path)


def _short(cause: BaseException) -> str:
    return sentence(cause)[:200]


def _read(path: Path) -> dict[str, Tensor]:
    """The state in a checkpoint, under the names that it has there.

    Raises:
        CaseError: if the file is missing, unreadable, or holds anything but tensors.
    """
    if not path.is_file():
        raise CaseError(f"checkpoint {path} does not exist; correct 'file', or leave it out.")
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    # Bytes that are no checkpoint make the readers fail in any way there is. What torch says of
    # them is left out: it advises to load the file unsafely.
    except Exception as cause:
        raise CaseError(
            f"checkpoint {path} cannot be read as tensors alone ({type(cause).__name__}): it is "
            "corrupt, or holds pickled objects, which are never loaded; get it again, or save its "
            "state_dict as .safetensors."
        ) from cause
    state = {k: v for k, v in _innermost(content).items() if isinstance(v, Tensor)}
    if not state:
        raise CaseError(f"checkpoint {path} holds no state_dict; save the model's state_dict.")
    return state


def _innermost(content: Any) -> Mapping[str, Any]:
    """The state within the wrappings in which the zoo's authors left it."""
    while isinstance(content, Mapping):
        inner = next((content[k] for k in _NESTED if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            return content
        content = inner
    return {}


def _load(model: nn.Module, state: Mapping[str, Tensor], file: str, name: str) -> None:
    """Load a state; every parameter must be there, and nothing that belongs to another model.

    Raises:
        CaseError: if names or shapes differ, or a value is not finite.
    """
    state = _renamed(state, set(model.state_dict()))
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as cause:
        raise CaseError(
            f"checkpoint {file} does not fit {name} ({_short(cause)}); name the one that belongs "
            "to it."
        ) from cause
    lacking = [key for key in missing if key.rpartition(".")[2] not in _CONSTANTS]
    foreign = [key for key in unexpected if not any(part in key for part in _SURPLUS)]
    if lacking or foreign:
        raise CaseError(
            f"checkpoint {file} does not fit {name}: it lacks {len(lacking)} of its tensors and "
            f"holds {len(foreign)} others, as {(lacking + foreign)[0]!r}; name the one that "
            "belongs to it."
        )
    if not all(bool(v.isfinite().all()) for v in state.values() if v.is_floating_point()):
        raise CaseError(f"checkpoint {file} holds values that are not finite; get it again.")


def _renamed(state: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """The state with the prefixes that wrappers leave in names taken off, or put on.

    "module." is DataParallel's. "model." is that of a wrapper at training time, but also that of
    the zoo's own normalizing wrapper: whichever way fits more names is the right one.
    """
    bare = {key.removeprefix("module."): value for key, value in state.items()}
    inner = {key.removeprefix("model.").removeprefix("module."): v for key, v in bare.items()}
    outer = {f"model.{key}": value for key, value in inner.items()}
    return max((bare, inner, outer), key=lambda names: len(wanted & names.keys()))
