"""Tensors whose value is one thing and whose gradient is another's."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class _Box(NamedTuple):
    """A value that autograd is not to see as an input: outputs that are inputs become views."""

    value: Tensor


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, box: _Box, carrier: Tensor) -> Tensor:
        return box.value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, box: _Box, one: Tensor, other: Tensor) -> Tensor:
        return box.value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, gradients[0], gradients[0]


def splice(value: Tensor, carrier: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of `carrier`; unlike the core's, not a view."""
    carrier = carrier.to(value.dtype).expand(value.shape)
    return cast("Tensor", cast("Any", _Splice).apply(_Box(_own(value)), carrier))


def join(value: Tensor, extra: Tensor) -> Tensor:
    """`value`, exactly, with its own gradient and that of `extra` on top."""
    extra = extra.to(value.dtype).expand(value.shape)
    return cast("Tensor", cast("Any", _Join).apply(_Box(value.detach().clone()), value, extra))


def weighted(carrier: Tensor, factor: Tensor) -> Tensor:
    """`factor * carrier` as far as the gradient goes; no gradient where the factor is infinite."""
    factor = factor.detach().to(carrier.dtype)
    return carrier * torch.nan_to_num(factor, nan=0.0, posinf=0.0, neginf=0.0)


def row_scale(x: Tensor) -> Tensor:
    """Mean absolute value of each row (first dimension), above 0, shaped to multiply `x`."""
    x = x.detach()
    magnitude = x.abs()
    if x.dim() > 1:
        magnitude = magnitude.flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1))
    tiny = torch.finfo(x.dtype).tiny
    return torch.nan_to_num(magnitude, nan=1.0, posinf=1.0).clamp_min(tiny**0.5)


def by_sample(flags: Tensor, batch: int) -> Tensor:
    """Whether all flags of a sample are set, shaped to select among them.

    The first dimension holds the samples, or equal groups for each (heads, draws); where it cannot,
    all flags belong together.
    """
    if flags.dim() == 0 or not batch or flags.shape[0] % batch:
        return flags.all().expand(flags.shape)
    whole = flags.reshape(batch, -1).all(1)
    groups = flags.shape[0] // batch
    return whole.repeat_interleave(groups).view(-1, *[1] * (flags.dim() - 1)).expand(flags.shape)


def _own(value: Tensor) -> Tensor:
    value = value.detach() if value.requires_grad else value
    return value.clone() if value._base is not None or value.is_inference() else value
