"""Equilibrium model whose dynamics are regulated: entropy reduction of its input at inference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from robustdeq.defenses._cells import Stem
from robustdeq.defenses.deq import SOLVERS, ResidualEquilibrium, SolverName
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from robustdeq.datasets import DataSpec
from robustdeq.equilibrium import (
    Drive,
    EquilibriumClassifier,
    Injection,
    Phantom,
    SolveGradient,
    Solver,
)
from robustdeq.interfaces import About
from robustdeq.shapes import Images, Logits
from robustdeq.training.random_states import RandomStates

Regulation = Literal["none", "entropy", "random_sign"]
Output = Literal["final", "early", "ensemble"]


@dataclass(frozen=True, kw_only=True)
class NeuralDynamics:
    """A DEQ deployed with few solver steps, between which its own input is purified.

    Between rounds of solver steps the received image descends the entropy of the prediction,
    x' <- P(x' - size * sign grad H(softmax(readout(f(z, x'))))), the state held fixed, P the
    projection to a Linf ball around the received image and to [0, 1] (section 3.2 of the paper).
    The other half of the paper, random intermediate states in adversarial training (section 3.3),
    is the recipe `random_states`; inference is the same with it or without.

    The authors' code detaches x' and the states; here x' stays in the graph as the projections
    leave it, with the sign's derivative of 0, so that a plain attack already passes through the
    purifier as through an identity (BPDA).

    Attributes:
        width: channels of the state (units, for small images).
        inner: channels between A and B of the cell.
        halvings: strided convolutions of the stem.
        gain: Lipschitz bound of the cell, in (0, 1).
        solver: the deployed solver; the paper's is Broyden's method.
        tolerance: its relative residual.
        max_steps: its limit in all, shared out equally between the rounds of a purifier.
        regulation: `entropy`; `none`; or the control `random_sign`, which pays for the same
            gradients and then moves along fixed random signs.
        rounds: of solver steps; the input moves between them.
        input_steps: moves of the input between two rounds.
        input_size: length of such a move.
        input_radius: of the ball around the received image.
        output: `final`; `early`, the state after `early_steps`; or `ensemble`, the mean of the
            logits of all intermediate states. The last two take no regulation.
        early_steps: for `early`.
        unroll: damped steps of the gradient, and
        damping: their damping.
    """

    about: ClassVar[About] = replace(
        RandomStates.about,
        claimed="Reducing the input's entropy along the dynamics, and random intermediate states "
        "in adversarial training, make DEQs much more robust, beyond strong deep networks.",
        reproduced="Both regulations as in the released code, except that x' stays in the graph "
        "there where the code detaches it, so that attacks see the purifier. Cell, width and "
        "data are ours; no figure of the paper was at hand. Controls: random signs of equal "
        "cost, an ensemble of the intermediate states, an early state.",
    )
    recipe: ClassVar[str] = "random_states"

    width: int = 64
    inner: int = 64
    halvings: int = 2
    gain: float = 0.95
    solver: SolverName = "broyden"
    tolerance: float = 1e-3
    max_steps: int = 8
    regulation: Regulation = "none"
    rounds: int = 4
    input_steps: int = 10
    input_size: float = 2 / 255
    input_radius: float = 8 / 255
    output: Output = "final"
    early_steps: int = 4
    unroll: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        if self.regulation != "none" and self.output != "final":
            raise ValueError(f"output {self.output!r} takes no regulation")
        if self.rounds < 1 or self.max_steps % self.rounds:
            raise ValueError(f"{self.max_steps} steps are not shared out by {self.rounds} rounds")

    def trained_as(self) -> NeuralDynamics:
        """Purifier and outputs act at inference alone."""
        plain = NeuralDynamics()
        return replace(
            self,
            regulation="none",
            output="final",
            rounds=1,
            input_steps=plain.input_steps,
            input_size=plain.input_size,
            input_radius=plain.input_radius,
            early_steps=plain.early_steps,
        )

    def build(self, data: DataSpec, device: torch.device) -> nn.Module:
        """See `robustdeq.interfaces.Defense`."""
        solver = SOLVERS[self.solver](tolerance=self.tolerance, max_steps=self.max_steps)
        gradient = Phantom(self.unroll, self.damping)
        stem = Stem(data, self.width, self.halvings)
        arguments = (stem, self.inner, self.gain, data.classes, solver, gradient)
        model: nn.Module
        if self.regulation != "none":
            shape = (data.channels, data.height, data.width)
            model = PurifiedEquilibrium(*arguments, settings=self, shape=shape)
        elif self.output == "ensemble":
            model = StateEnsemble(*arguments)
        elif self.output == "early":
            early = solver.with_steps(self.early_steps)
            model = ResidualEquilibrium(stem, self.inner, self.gain, data.classes, early, gradient)
        else:
            model = ResidualEquilibrium(*arguments)
        return model.to(device)


class Plain(EquilibriumClassifier):
    """Cell and readout of a model, solved as deployed, and nothing around them; shares its weights.

    Args:
        model: whose own `predict` is left out.
    """

    def __init__(self, model: ResidualEquilibrium) -> None:
        super().__init__(model.solver, model.gradient)
        self.model = model

    def embed(self, x: Images) -> Tensor:
        """See `EquilibriumClassifier.embed`."""
        return self.model.embed(x)

    def cell(self, z: Tensor, injection: Injection, step: int) -> Tensor:
        """See `EquilibriumClassifier.cell`."""
        return self.model.cell(z, injection, step)

    def readout(self, z: Tensor) -> Logits:
        """See `EquilibriumClassifier.readout`."""
        return self.model.readout(z)


class StateEnsemble(ResidualEquilibrium):
    """The mean of the logits of all intermediate states of the deployed solve."""

    def undefended(self) -> dict[str, nn.Module]:
        """The last state alone; see `robustdeq.targets.Target.undefended`."""
        return {"final": Plain(self)}

    def predict(self, x: Images, solve: Drive) -> Logits:
        """Each state is differentiated by the estimator, from where it is."""
        injection = self.embed(x)
        states = solve(self.cell, injection, keep_states=True).states[1:]
        # A solve ends when its slowest sample does; a sample's mean must not depend on which.
        states += states[-1:] * (self.solver.max_steps - len(states))
        # One step at most: the state itself, or its image under plain iteration.
        logits = [self.readout(solve(self.cell, injection, start=s, steps=1).z) for s in states]
        return torch.stack(logits).mean(0)


class PurifiedEquilibrium(ResidualEquilibrium):
    """Rounds of solver steps, and moves of the input between them."""

    def __init__(
        self,
        stem: Stem,
        inner: int,
        gain: float,
        classes: int,
        solver: Solver,
        gradient: SolveGradient,
        *,
        settings: NeuralDynamics,
        shape: tuple[int, ...],
    ) -> None:
        super().__init__(stem, inner, gain, classes, solver, gradient)
        self.settings = settings
        generator = torch.Generator().manual_seed(0)
        count = (settings.rounds - 1) * settings.input_steps
        signs = torch.randn((count, *shape), generator=generator).sign()
        self.register_buffer("signs", signs, persistent=False)

    def undefended(self) -> dict[str, nn.Module]:
        """The classifier without its purifier; see `robustdeq.targets.Target.undefended`."""
        return {"base": Plain(self)}

    def predict(self, x: Images, solve: Drive) -> Logits:
        """See `NeuralDynamics`; the moves after the last round would change nothing."""
        # The forward itself needs gradients, which inference tensors never have; leaving that mode
        # alone would switch gradients on for the solves too.
        wanted = torch.is_grad_enabled()
        with torch.inference_mode(mode=False), torch.set_grad_enabled(wanted):
            return self._rounds(x.clone(), solve)

    def _rounds(self, received: Images, solve: Drive) -> Logits:
        settings = self.settings
        steps = settings.max_steps // settings.rounds
        x, z = received, None
        for number in range(settings.rounds):
            z = solve(self.cell, self.embed(x), start=z, steps=steps).z
            if number + 1 < settings.rounds:
                x = self._purified(x, received, z.detach(), number * settings.input_steps)
        assert z is not None
        return self.readout(z)

    def _purified(self, x: Images, received: Images, z: Tensor, first: int) -> Images:
        settings = self.settings
        low = (received - settings.input_radius).clamp_min(0.0)
        high = (received + settings.input_radius).clamp_max(1.0)
        for k in range(settings.input_steps):
            direction = self._entropy_slope(x, z).sign()
            if settings.regulation == "random_sign":
                direction = self.get_buffer("signs")[first + k].expand_as(x).to(x)
            x = torch.minimum(torch.maximum(x - settings.input_size * direction, low), high)
        return x

    def _entropy_slope(self, x: Images, z: Tensor) -> Tensor:
        """The gradient, in x alone, of the summed entropy of the predictions."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            log_p = F.log_softmax(self.readout(self.cell(z, self.embed(leaf), 0)), 1)
            entropy = -(log_p.exp() * log_p).sum()
            (slope,) = torch.autograd.grad(entropy, leaf)
        return slope
