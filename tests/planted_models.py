"""Models with a planted defect each: the predictions of an honest model, without its gradient.

The honest model is a weight-tied one, taken apart so that no part of a defective model maps images
to logits by itself: what is wrong must be found through the model that is wrong.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from robustdeq.datasets import load_slice

STEPS = 5
"""Steps of the base's cell, from 0."""


class Layers(nn.Module):
    """The base in pieces: it has no forward pass of its own, so that no attack can call it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.stem, self.residual, self.head = base.stem, base.residual, base.head
        self.gain = base.gain

    def embed(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.stem(x))

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return F.relu(u + self.gain * self.residual(z))

    def state(self, u: Tensor) -> Tensor:
        z = torch.zeros_like(u)
        for _ in range(STEPS):
            z = self.cell(z, u)
        return z

    def read(self, z: Tensor) -> Tensor:
        return cast("Tensor", self.head(z))

    def logits(self, x: Tensor) -> Tensor:
        """The base's own, with their gradient."""
        return self.read(self.state(self.embed(x)))


class Planted(nn.Module):
    """A defective model; this one has no defect."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.layers = Layers(base)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.seen(x))

    def logits(self, x: Tensor) -> Tensor:
        return self.layers.logits(x)

    def seen(self, x: Tensor) -> Tensor:
        """The image that the classifier is given."""
        return x


# Gradients that are missing, or lead elsewhere


class RotatedGradient(Planted):
    """The gradient is that of the model on the rotated image."""

    def forward(self, x: Tensor) -> Tensor:
        other = self.logits(x.rot90(1, (2, 3)))
        return self.logits(x).detach() + other - other.detach()


class _Mirrored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].flip(3)


class WrongBackward(Planted):
    """A custom function whose backward pass mirrors the image."""

    def seen(self, x: Tensor) -> Tensor:
        return cast("Tensor", cast("Any", _Mirrored).apply(x))


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(gradients[0])


class EmptyBackward(Planted):
    """A custom function whose backward pass was never written."""

    def seen(self, x: Tensor) -> Tensor:
        return cast("Tensor", cast("Any", _Empty).apply(x))


class ZeroingHook(Planted):
    """A hook that was to clip the gradient removes it."""

    def seen(self, x: Tensor) -> Tensor:
        seen = x * 1.0
        if seen.requires_grad:
            seen.register_hook(lambda gradient: gradient.clamp(0.0, 0.0))
        return seen


def _flipped(module: nn.Module, inner: Any, outer: Any) -> tuple[Tensor]:
    return (-inner[0],)


class FlippingHook(Planted):
    """The gradient reversal of domain adaptation, left on."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.entry = nn.Identity()
        self.entry.register_full_backward_hook(_flipped)

    def seen(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.entry(x * 1.0))


class NonFiniteGradient(Planted):
    """A guard against pixels outside the box: their distance is 0, and its slope is 0/0."""

    def forward(self, x: Tensor) -> Tensor:
        outside = (x - x.clamp(0.0, 1.0)).flatten(1).square().sum(1, keepdim=True).sqrt()
        return self.logits(x) * torch.exp(-outside)


class InferenceMode(Planted):
    """The forward pass of a deployment: no graph at all."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.logits(x)


class GradModeDecoy(Planted):
    """Another answer while gradients are recorded."""

    def seen(self, x: Tensor) -> Tensor:
        return x.flip(3) if x.requires_grad else x


class DetachedLyapunov(Planted):
    """z' = z - grad V relu(grad V . z + alpha V) / |grad V|^2 with grad V and V detached.

    V = |z|^2/2, so that z' is -alpha/2 z, which the head undoes; but the gradient that is left is
    that of a reflection.
    """

    alpha = 0.9

    def forward(self, x: Tensor) -> Tensor:
        z = self.layers.state(self.layers.embed(x))
        slope, value = z.detach(), z.detach().square().sum(1) / 2
        excess = F.relu((slope * z).sum(1) + self.alpha * value)
        moved = z - slope * (excess / slope.square().sum(1))[:, None]
        return self.layers.read(-2 / self.alpha * moved)


# Steps, saturation and ripples


class QuantizedInput(Planted):
    """Pixels rounded to 9 values."""

    def seen(self, x: Tensor) -> Tensor:
        return (8 * x).round() / 8


class Thermometer(Planted):
    """Pixels compared with 8 thresholds; the code is summed."""

    def seen(self, x: Tensor) -> Tensor:
        thresholds = (torch.arange(8) + 0.5) / 8
        return (x[..., None] > thresholds).float().mean(-1)


class IntegerCast(Planted):
    """Stored as integers of 4 bits, as an image file would."""

    def seen(self, x: Tensor) -> Tensor:
        return (15 * x + 0.5).to(torch.uint8).float() / 15


class Codebook(Planted):
    """Patches of 2x2 pixels replaced by the nearest entry of a codebook: argmin and a look-up."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        digits = torch.from_numpy(load_slice("digits", "train", 400).images).float() / 255
        patches = F.unfold(digits, 2, stride=2).transpose(1, 2).reshape(-1, 4)
        order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
        self.register_buffer("entries", patches[order[:256]])

    def seen(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)
        entries = self.get_buffer("entries")
        nearest = torch.cdist(patches, entries[None]).argmin(2)
        return F.fold(entries[nearest].transpose(1, 2), (8, 8), 2, stride=2)


class BufferCopy(Planted):
    """Pixels written into a buffer of the module through `.data`."""

    def seen(self, x: Tensor) -> Tensor:
        buffer = torch.empty_like(x)
        buffer.data[:] = x.data
        return buffer


class NumpyJPEG(Planted):
    """Cosine coefficients of the 8x8 block rounded, in NumPy."""

    def seen(self, x: Tensor) -> Tensor:
        k = np.arange(8)
        basis = np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / 16) / 2
        basis[0] /= np.sqrt(2)
        coefficients = np.round(basis @ x.detach().numpy() @ basis.T / 0.15) * 0.15
        return torch.from_numpy(np.clip(basis.T @ coefficients @ basis, 0.0, 1.0)).to(x)


class NumpyMedian(Planted):
    """Pixels that stick out of their neighborhood are drawn to its median, in NumPy."""

    def seen(self, x: Tensor) -> Tensor:
        pixels = x.detach().numpy()
        padded = np.pad(pixels, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        median = np.median(windows, axis=(4, 5))
        outlier = np.abs(pixels - median) > 0.6
        return torch.from_numpy(np.where(outlier, (median + pixels) / 2, pixels)).to(x)


class RoundedLogits(Planted):
    """Logits published as whole numbers."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x).round()


class SaturatedLogits(Planted):
    """A temperature of 1e-4."""

    def logits(self, x: Tensor) -> Tensor:
        return 1e4 * super().logits(x)


class SoftmaxOutput(Planted):
    """Probabilities in the place of logits, saturated in float32."""

    def logits(self, x: Tensor) -> Tensor:
        return torch.softmax(100 * super().logits(x), 1)


class InputWarp(Planted):
    """A ripple too small to matter, whose slope changes sign every 1/127."""

    def seen(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.sin(400 * x)


class WinnerTakesAll(Planted):
    """Only the largest units pass at each step (k-WTA activation)."""

    kept = 40

    def forward(self, x: Tensor) -> Tensor:
        u = self.layers.embed(x)
        z = torch.zeros_like(u)
        for _ in range(STEPS):
            z = self.layers.cell(z, u)
            z = z * (z >= z.topk(self.kept, 1).values[:, -1:])
        return self.layers.read(z)


class EarlyExit(Planted):
    """Leaves at the first step that is sure; what left is stored without its graph."""

    threshold = 0.8

    def forward(self, x: Tensor) -> Tensor:
        return self.answers(x, detach=True)

    def answers(self, x: Tensor, detach: bool) -> Tensor:
        u = self.layers.embed(x)
        z, answer = torch.zeros_like(u), x.new_zeros(len(x), 10)
        left = torch.zeros(len(x), dtype=torch.bool)
        for _ in range(STEPS):
            z = self.layers.cell(z, u)
            out = self.layers.read(z)
            sure = ~left & (torch.softmax(out, 1).amax(1) > self.threshold)
            answer = torch.where(sure[:, None], out.detach() if detach else out, answer)
            left = left | sure
        return torch.where(left[:, None], answer, out)


class Purifier(Planted):
    """Entropy descent on a detached copy of the input before the answer."""

    moves, size = 3, 0.02

    def seen(self, x: Tensor) -> Tensor:
        moved = x.detach()
        for _ in range(self.moves):
            moved = (moved - self.size * self.slope(moved).sign()).clamp(0.0, 1.0).detach()
        return moved

    def slope(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return self.derivative(self.entropy(leaf), leaf)

    def entropy(self, x: Tensor) -> Tensor:
        log_p = torch.log_softmax(self.logits(x), 1)
        return -(log_p.exp() * log_p).sum()

    def derivative(self, entropy: Tensor, leaf: Tensor) -> Tensor:
        return torch.autograd.grad(entropy, leaf)[0]


class PurifierByBackward(Purifier):
    """The same with `.backward()`, which also writes into the parameters' gradients."""

    def derivative(self, entropy: Tensor, leaf: Tensor) -> Tensor:
        entropy.backward()
        return cast("Tensor", leaf.grad)


# Chance and memory


class InputNoise(Planted):
    """Noise on the input, in eval mode too."""

    def seen(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class Dither(Planted):
    """Pixels rounded to 9 values, up or down by chance."""

    def seen(self, x: Tensor) -> Tensor:
        return (8 * x + torch.rand_like(x)).floor() / 8


class KeptState(Planted):
    """Starts from the state that the last call ended with, for a few damped steps."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        u = self.layers.embed(x)
        fits = self.last is not None and self.last.shape == u.shape
        z = cast("Tensor", self.last) if fits else torch.zeros_like(u)
        for _ in range(2):
            z = (z + self.layers.cell(z, u)) / 2
        self.last = z.detach()
        return self.layers.read(z)
