"""Lyapunov functions that are convex by construction, and the projection of a field onto them.

Manek and Kolter 2019, "Learning Stable Deep Dynamics Models": V is an input-convex network, moved
so that V(0) = 0, plus a strictly convex term. Gradients are written out instead of taken by
autograd: they stay exact and differentiable, also under `no_grad` and `inference_mode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

GUARD = 1e-12
"""Added to |grad V|^2, which is 0 at the minimum of V."""


def smooth_relu(x: Tensor, d: float) -> Tensor:
    """0 below 0, x^2/(2d) up to d, x - d/2 beyond: convex, monotone, with a continuous slope."""
    inside = x.clamp(0.0, d)
    return inside**2 / (2 * d) + (x - d).clamp_min(0.0)


def smooth_relu_slope(x: Tensor, d: float) -> Tensor:
    """The derivative of `smooth_relu`."""
    return (x / d).clamp(0.0, 1.0)


class ConvexNetwork(nn.Module):
    """An input-convex network g (Amos et al. 2017): softplus weights between its layers.

    z_1 = s(W_0 x + b_0), z_{i+1} = s(softplus(U_i) z_i / rows(U_i) + W_i x + b_i), the last layer
    without s; s is `smooth_relu`.

    Args:
        size: of the input.
        hidden: sizes between.
        d: width of the smooth kink.
    """

    def __init__(self, size: int, hidden: Sequence[int], d: float) -> None:
        super().__init__()
        self.d = d
        sizes = [*hidden, 1]
        self.inputs = nn.ModuleList([nn.Linear(size, width) for width in sizes])
        pairs = pairwise(sizes)
        self.between = nn.ParameterList([nn.Parameter(torch.empty(b, a)) for a, b in pairs])
        for weight in self.between:
            nn.init.kaiming_uniform_(weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """g(x), (batch,), of x (batch, size)."""
        return self._run(x)[0]

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """g(x), (batch,), and its gradient, (batch, size); both differentiable."""
        value, kinks = self._run(x)
        weights = [F.softplus(u) / u.shape[0] for u in self.between]
        layers = self._layers()
        flow = x.new_ones(len(x), 1)
        gradient = flow @ layers[-1].weight
        for weight, kink, layer in zip(
            reversed(weights), reversed(kinks), reversed(layers[:-1]), strict=True
        ):
            flow = (flow @ weight) * smooth_relu_slope(kink, self.d)
            gradient = gradient + flow @ layer.weight
        return value, gradient

    def _layers(self) -> list[nn.Linear]:
        return [layer for layer in self.inputs if isinstance(layer, nn.Linear)]

    def _run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """g(x), and what goes into each kink."""
        layers = self._layers()
        kinks = [layers[0](x)]
        for u, layer in zip(self.between, layers[1:], strict=True):
            z = smooth_relu(kinks[-1], self.d)
            kinks.append(F.linear(z, F.softplus(u) / u.shape[0]) + layer(x))
        return kinks[-1].squeeze(1), kinks[:-1]


class Lyapunov(nn.Module):
    """V(x) = s(g(x) - g(0)) + epsilon |x|^2: convex, V(0) = 0, positive elsewhere.

    g(0) is computed at every call: frozen at initialization, V(0) would leave 0 in training.
    """

    def __init__(self, size: int, hidden: Sequence[int], d: float, epsilon: float) -> None:
        super().__init__()
        self.network, self.d, self.epsilon = ConvexNetwork(size, hidden, d), d, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """V(x), (batch,), of x (batch, size)."""
        return self.value_and_gradient(x)[0]

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """V(x), (batch,), and its gradient, (batch, size); both differentiable, per sample."""
        g, slope = self.network.value_and_gradient(x)
        above = g - self.network(x.new_zeros(1, x.shape[1]))
        value = smooth_relu(above, self.d) + self.epsilon * x.square().sum(1)
        gradient = smooth_relu_slope(above, self.d)[:, None] * slope + 2 * self.epsilon * x
        return value, gradient


def stabilized(
    field: Tensor,
    value: Tensor,
    gradient: Tensor,
    alpha: float,
    gate: Callable[[Tensor], Tensor] = F.relu,
) -> Tensor:
    """The field nearest to `field` along grad V under which V decays at rate alpha.

    F = f - grad V relu(grad V . f + alpha V) / |grad V|^2, so that grad V . F <= -alpha V, with
    equality wherever `field` did not decay fast enough (Manek and Kolter 2019, equation 10). Per
    sample, and nothing is detached: a gradient that leaves out d(grad V) is another model's.

    Args:
        field: (batch, size).
        value: V, (batch,).
        gradient: grad V, (batch, size).
        alpha: rate, at least 0.
        gate: the relu.
    """
    excess = gate((gradient * field).sum(1) + alpha * value)
    return field - gradient * (excess / (gradient.square().sum(1) + GUARD))[:, None]


class Stabilizer(nn.Module):
    """`stabilized` as a named module, with its gate: attacks replace the backward pass of either.

    Its backward pass can be taken for the identity of the field, the gate's for a softplus's.

    Args:
        alpha: rate of decay, at least 0.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha, self.gate = alpha, nn.ReLU()

    def forward(self, field: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """The stabilized field (batch, size)."""
        return stabilized(field, value, gradient, self.alpha, self.gate)


class Pool(nn.Module):
    """Averages a state (channels, height, width) to `side` x `side`, flattened; flat states pass.

    Linear, so that V of the pooled state is convex in the state; `adjoint` is its transpose.
    """

    def __init__(self, shape: tuple[int, ...], side: int) -> None:
        super().__init__()
        self.shape = shape
        if len(shape) == 1:
            self.size = shape[0]
            return
        channels, height, width = shape
        self.sides = (min(side, height), min(side, width))
        self.size = channels * self.sides[0] * self.sides[1]
        for name, out, length in (
            ("rows", self.sides[0], height),
            ("columns", self.sides[1], width),
        ):
            self.register_buffer(name, _averages(out, length), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """(batch, size) of states (batch, *shape)."""
        if len(self.shape) == 1:
            return z
        rows, columns = self.get_buffer("rows"), self.get_buffer("columns")
        return torch.einsum("ih,bchw,jw->bcij", rows, z, columns).flatten(1)

    def adjoint(self, y: Tensor) -> Tensor:
        """The transpose of `forward`: (batch, *shape) of (batch, size)."""
        if len(self.shape) == 1:
            return y
        rows, columns = self.get_buffer("rows"), self.get_buffer("columns")
        y = y.view(len(y), self.shape[0], *self.sides)
        return torch.einsum("ih,bcij,jw->bchw", rows, y, columns)


def _averages(out: int, length: int) -> Tensor:
    """(out, length): each row averages one of `out` adjacent windows that cover `length`."""
    matrix = torch.zeros(out, length)
    for k in range(out):
        begin, end = k * length // out, -(-(k + 1) * length // out)
        matrix[k, begin:end] = 1.0 / (end - begin)
    return matrix
