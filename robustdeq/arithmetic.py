"""Which floating-point arithmetic may stand for float32: none when judging, quicker when searching.

A GPU multiplies in TF32 (10 bits of mantissa) where it is let, which torch does for convolutions
unless told otherwise; a processor in bfloat16. A solve to a relative tolerance of 1e-4 cannot end
in such arithmetic, and a judgment in it would be that of another model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from robustdeq.errors import UsageError

Precision = Literal["float32", "tf32", "bfloat16"]
"""Of a search: as it is, products of float32 in TF32 (on a GPU), or autocast to bfloat16."""

_OPERATIONS = ("conv", "rnn", "matmul")
_EXACT = ("ieee", "none")


class _Switch(NamedTuple):
    """A setting of torch, and its values: those that keep float32, the first to be set; TF32's."""

    get: Callable[[], Any]
    set: Callable[[Any], None]
    exact: tuple[Any, ...]
    tf32: Any

    def value(self) -> Any:
        """None where torch refuses to say, for it was set through both of its interfaces."""
        try:
            return self.get()
        except RuntimeError:
            return None


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 in float32 inside the block, whatever the caller has set; no autocast.

    What the block itself sets is undone. A model that reduces its own precision still does.
    """
    cpu, cuda = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))
    with _switched((*_settings(), *_parts()), exactly=True), cpu, cuda:
        yield


@contextmanager
def reduced(precision: Precision, device: torch.device) -> Iterator[None]:
    """Quicker arithmetic inside the block; with "float32" what is around stays in force.

    Raises:
        UsageError: where the device has no such arithmetic.
    """
    if precision == "float32":
        yield
    elif precision == "tf32":
        if device.type != "cuda":
            raise UsageError(f"precision 'tf32' needs a GPU, and this is {device}; use 'float32'.")
        with _switched(_settings(), exactly=False):
            yield
    else:
        if not torch.amp.is_autocast_available(device.type):
            raise UsageError(f"precision {precision!r} needs autocast, which {device} lacks.")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield


@contextmanager
def _switched(switches: tuple[_Switch, ...], *, exactly: bool) -> Iterator[None]:
    held = [switch.value() for switch in switches]
    try:
        for switch in switches:
            if switch.value() not in (switch.exact if exactly else (switch.tf32,)):
                switch.set(switch.exact[0] if exactly else switch.tf32)
        yield
    finally:
        for switch, before in zip(switches, held, strict=True):
            if before is not None and switch.value() != before:
                switch.set(before)


def _settings() -> tuple[_Switch, ...]:
    cudnn = torch.backends.cudnn
    matmul = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    convolution = partial(getattr, cudnn, "allow_tf32"), partial(setattr, cudnn, "allow_tf32")
    return _Switch(*matmul, ("highest",), "high"), _Switch(*convolution, (False,), True)


def _parts() -> tuple[_Switch, ...]:
    """Since torch 2.9 each kind of operation has a setting of its own, on processors as well.

    Set after the older ones and only where these do not suffice: torch refuses to read the older
    interface where the newer one contradicts it, and plugins and libraries read it.
    """
    cudnn, mkldnn, matmul = torch.backends.cudnn, torch.backends.mkldnn, torch.backends.cuda.matmul
    parts: list[Any] = [matmul, cudnn, mkldnn]
    parts += [getattr(part, name, None) for part in (cudnn, mkldnn) for name in _OPERATIONS]
    name = "fp32_precision"
    return tuple(
        _Switch(partial(getattr, part, name), partial(setattr, part, name), _EXACT, "tf32")
        for part in parts
        if hasattr(part, name)
    )
