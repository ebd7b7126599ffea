"""Models that hide the gradient of a smooth network, each by one operation, at a marked line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

LEVELS = torch.linspace(0, 1, 11)


class Smooth(nn.Module):
    """Two layers with tanh between them, on 1x4x4 images and 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(16, 16, generator=generator) / 2)
        self.second = nn.Parameter(torch.randn(4, 16, generator=generator) / 2)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh((x.flatten(1) - 0.5) @ self.first.T)

    def head(self, h: Tensor) -> Tensor:
        return h @ self.second.T

    def base(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))

    def entropy(self, x: Tensor) -> Tensor:
        log_p = F.log_softmax(self.base(x), 1)
        return -(log_p.exp() * log_p).sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


Forward = Callable[[Smooth, Tensor], Tensor]


class Masked(Smooth):
    def __init__(self, mask: Forward) -> None:
        super().__init__()
        self.mask = mask
        self.register_buffer("cache", torch.zeros(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.mask(self, x)


@dataclass(frozen=True)
class Planted:
    """A mask, what it is to be called, and the least cosine with the base's gradient."""

    forward: Forward
    operation: str
    cosine: float

    @property
    def line(self) -> int:
        """The line that is marked."""
        lines, first = inspect.getsourcelines(self.forward)
        return first + next(k for k, text in enumerate(lines) if "# mask" in text)


PLANTED: dict[str, Planted] = {}


def planted(operation: str, cosine: float = 0.9) -> Callable[[Forward], Forward]:
    def keep(forward: Forward) -> Forward:
        PLANTED[forward.__name__] = Planted(forward, operation, cosine)
        return forward

    return keep


# Out of the graph.


@planted("detach")
def detached(m: Smooth, x: Tensor) -> Tensor:
    return m.base(x.detach())  # mask


@planted("detach")
def detached_but_for_a_skip(m: Smooth, x: Tensor) -> Tensor:
    return m.base(x.detach()) + 0.01 * x.flatten(1)[:, :4].flip(1)  # mask


@planted("data")
def data(m: Smooth, x: Tensor) -> Tensor:
    return m.base(x.data)  # mask


@planted("detach_")
def detached_in_place(m: Smooth, x: Tensor) -> Tensor:
    return m.head(m.hidden(x).detach_())  # mask


@planted("no_grad")
def without_gradients(m: Smooth, x: Tensor) -> Tensor:
    with torch.no_grad():  # mask
        h = m.hidden(x)
    return m.head(h)


@planted("no_grad")
def switched_off(m: Smooth, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):  # mask
        h = m.hidden(x).mul_(8).round_().div_(8)
    return m.head(h)


@planted("inference_mode")
def inference(m: Smooth, x: Tensor) -> Tensor:
    @torch.inference_mode()
    def run() -> Tensor:
        return m.hidden(x)

    return m.head(run().clone())  # mask


@planted("requires_grad_")
def taken_back(m: Smooth, x: Tensor) -> Tensor:
    y = x.detach()
    return m.base(y.requires_grad_(False))  # mask


@planted("tensor")
def copied(m: Smooth, x: Tensor) -> Tensor:
    return m.base(torch.stack([torch.tensor(list(row)) for row in x.flatten(1)]))  # mask


@planted("data")
def written_into_a_buffer(m: Smooth, x: Tensor) -> Tensor:
    out = torch.empty(len(x), 16)
    out.data.copy_(m.hidden(x))  # mask
    return m.head(out)


@planted("no_grad")
def with_out(m: Smooth, x: Tensor) -> Tensor:
    with torch.no_grad():  # mask
        h = torch.tanh((x.flatten(1) - 0.5) @ m.first.T, out=m.cache)
    return m.head(h)


@planted("register_hook")
def hooked(m: Smooth, x: Tensor) -> Tensor:
    h = m.hidden(x)
    if h.requires_grad:
        h.register_hook(torch.zeros_like)  # mask
    return m.head(h)


@planted("saved_tensors_hooks")
def corrupted(m: Smooth, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(torch.zeros_like, lambda t: t):  # mask
        h = m.hidden(x)
    return m.head(h)


# Rounding and integers.


@planted("round")
def rounded(m: Smooth, x: Tensor) -> Tensor:
    return m.base((x * 8).round() / 8)  # mask


@planted("round")
def rounded_in_place(m: Smooth, x: Tensor) -> Tensor:
    return (m.base(x) * 4).round_() / 4  # mask


@planted("remainder")
def minus_the_rest(m: Smooth, x: Tensor) -> Tensor:
    return m.base(x - x % 0.125)  # mask


@planted("floor_divide")
def floored(m: Smooth, x: Tensor) -> Tensor:
    return m.base(x // 0.125 * 0.125)  # mask


@planted("to")
def bytes_and_back(m: Smooth, x: Tensor) -> Tensor:
    return m.base((x * 255).to(torch.uint8).float() / 255)  # mask


@planted("byte")
def bit_planes(m: Smooth, x: Tensor) -> Tensor:
    q = (x * 255).byte()  # mask
    return m.base(((q & 0xF0) >> 4 << 4) / 255)


@planted("view")
def mantissa(m: Smooth, x: Tensor) -> Tensor:
    return m.base((x.view(torch.int32) & -65536).view(torch.float32))  # mask


@planted("fake_quantize_per_tensor_affine")
def fake_quantized(m: Smooth, x: Tensor) -> Tensor:
    return m.base(torch.fake_quantize_per_tensor_affine(x, 1 / 15, 0, 0, 8))  # mask


@planted("long")
def looked_up(m: Smooth, x: Tensor) -> Tensor:
    return m.base(LEVELS[(x * 10).long()])  # mask


@planted("bucketize")
def bucketed(m: Smooth, x: Tensor) -> Tensor:
    return m.base(LEVELS[torch.bucketize(x, LEVELS) - 1])  # mask


@planted("sign", 0.5)
def signs(m: Smooth, x: Tensor) -> Tensor:
    return m.base((x - 0.5).sign())  # mask


@planted("bernoulli", 0.5)
def coins(m: Smooth, x: Tensor) -> Tensor:
    return m.base(torch.bernoulli(x))  # mask


# Comparisons and selections.


@planted("gt", 0.5)
def binary(m: Smooth, x: Tensor) -> Tensor:
    return m.base((x > 0.5).float())  # mask


@planted("gt", 0.5)
def binary_by_where(m: Smooth, x: Tensor) -> Tensor:
    return m.base(torch.where(x > 0.5, 1.0, 0.0))  # mask


@planted("gt", 0.5)
def binary_by_index(m: Smooth, x: Tensor) -> Tensor:
    y, k = x.clone(), x > 0.5  # mask
    y[k], y[~k] = 1.0, 0.0
    return m.base(y)


@planted("ge", 0.5)
def binary_by_fill(m: Smooth, x: Tensor) -> Tensor:
    return m.base(torch.zeros_like(x).masked_fill_(x >= 0.5, 1.0))  # mask


@planted("gt")
def thermometer(m: Smooth, x: Tensor) -> Tensor:
    return m.base((x[..., None] > LEVELS).float().mean(-1))  # mask


@planted("argmin")
def nearest_level(m: Smooth, x: Tensor) -> Tensor:
    return m.base(LEVELS[(x[..., None] - LEVELS).abs().argmin(-1)])  # mask


@planted("argmax", 0.5)
def label_alone(m: Smooth, x: Tensor) -> Tensor:
    return 5 * F.one_hot(m.base(x).argmax(1), 4).float()  # mask


@planted("topk", 0.5)
def label_scattered(m: Smooth, x: Tensor) -> Tensor:
    z = m.base(x)
    return torch.zeros_like(z).scatter_(1, z.topk(1, 1).indices, 5.0)  # mask


@planted("eq", 0.5)
def largest_alone(m: Smooth, x: Tensor) -> Tensor:
    z = m.base(x)
    return (z == z.amax(1, keepdim=True)).float()  # mask


# Functions, arrays, saturation.


class Coarse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(gradients[0])


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


@planted("autograd.Function Coarse")
def own_function(m: Smooth, x: Tensor) -> Tensor:
    return m.base(Coarse.apply(x))  # mask


@planted("autograd.Function Reversed")
def own_function_with_context_apart(m: Smooth, x: Tensor) -> Tensor:
    return m.base(Reversed.apply(x))  # mask


@planted("numpy")
def through_numpy(m: Smooth, x: Tensor) -> Tensor:
    array = (x.detach().numpy() * 255).astype(np.uint8)  # mask
    return m.base(torch.from_numpy(array).float() / 255)


@planted("tolist")
def through_lists(m: Smooth, x: Tensor) -> Tensor:
    return m.base(torch.tensor(x.tolist()))  # mask


@planted("__float__")
def through_numbers(m: Smooth, x: Tensor) -> Tensor:
    rows = [[float(v) for v in row] for row in x.flatten(1)]  # mask
    return m.base(torch.tensor(rows))


@planted("softmax", 0.5)
def saturated_softmax(m: Smooth, x: Tensor) -> Tensor:
    return torch.softmax(m.base(x) * 1e4, 1)  # mask


@planted("tanh", 0.5)
def saturated_tanh(m: Smooth, x: Tensor) -> Tensor:
    return torch.tanh(m.base(x) * 1e6)  # mask


@planted("clamp")
def cut_off(m: Smooth, x: Tensor) -> Tensor:
    return (m.base(x) * 1e6).clamp(-50, 50)  # mask
