"""What an attack sees of a model: logits, and views with other gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from robustdeq.differentiation import Gradient, ModuleGradient
from robustdeq.equilibrium import (
    Drive,
    Dynamics,
    EquilibriumClassifier,
    Honest,
    Solve,
    SolveGradient,
    Solver,
    Value,
    parameter_dtype,
)
from robustdeq.equilibrium.counting import count_unless_counted
from robustdeq.errors import CaseError, UsageError
from robustdeq.shapes import Images, Logits, Mask


class Output(NamedTuple):
    """Logits (batch, classes), and one `Solve` per solve (none for models without)."""

    logits: Logits
    solves: tuple[Solve, ...] = ()


class Pool(NamedTuple):
    """Examples that something else made for the same samples: material for transfer attacks.

    Attributes:
        name: who made them.
        x: (batch, channels, height, width), in the order of the batch.
        available: whether there is one for the sample; elsewhere `x` means nothing.
    """

    name: str
    x: Images
    available: Mask


class Target:
    """A model as an attack sees it, through one gradient estimator.

    Args:
        model: any module from images in [0, 1] to logits.
        classes: number of classes, at least 2.
        gradient: `Honest()` is what autograd gives through the model's own forward.
        value: "deployed" shows the deployed logits with the chosen backward pass; "surrogate"
            the estimator's own logits.
        solver: another solver than the deployed one (training with a loose one, say).
        batch_size: most rows in one forward pass; larger batches are split, with equal results.
        pools: examples of other rows and of files, for the batch that an attack is given.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        *,
        gradient: Gradient | None = None,
        value: Value = "deployed",
        solver: Solver | None = None,
        batch_size: int | None = None,
        pools: Sequence[Pool] = (),
    ) -> None:
        self.pools = tuple(pools)
        self.model, self.classes, self.value = model, classes, value
        self.gradient: Gradient = Honest() if gradient is None else gradient
        self.solver, self.batch_size = solver, batch_size
        # Attacks work in float32; a model of another precision gets its own.
        self._dtype = parameter_dtype(model)
        if isinstance(self.gradient, SolveGradient) and not self.iterates:
            raise UsageError(
                f"gradient {self.gradient} differentiates through a solve, and this "
                f"{type(model).__name__} has none; use 'honest'."
            )

    @property
    def iterates(self) -> bool:
        """Whether the model is an equilibrium model, whose solves can be differentiated."""
        return isinstance(self.model, EquilibriumClassifier)

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of valid pixels."""
        return (0.0, 1.0)

    def through(
        self, gradient: Gradient, value: Value = "deployed", solver: Solver | None = None
    ) -> Target:
        """Another view of the same model.

        Raises:
            UsageError: for an estimator of solves on a model that has none.
        """
        return Target(
            self.model,
            self.classes,
            gradient=gradient,
            value=value,
            solver=solver or self.solver,
            batch_size=self.batch_size,
            pools=self.pools,
        )

    def undefended(self) -> dict[str, Target]:
        """The models of the same weights that the defense stands in front of, by name.

        Those that the model itself offers through an optional method `undefended()`, which gives
        names and modules (a purifier's classifier, a head without its stabilizer).
        """
        offered = getattr(self.model, "undefended", None)
        modules: dict[str, nn.Module] = offered() if callable(offered) else {}
        return {
            name: Target(module, self.classes, batch_size=self.batch_size)
            for name, module in modules.items()
        }

    def dynamics(self, damping: float = 1.0, adjoint_damping: float = 1.0) -> Dynamics | None:
        """The joint iteration of state, adjoint and input; None where the model has none.

        It has one if it iterates the same cell at each step and is that and no more: a model with
        a `predict` of its own (several solves, a purifier) is not described by one fixed point.
        """
        model = self.model
        if not isinstance(model, EquilibriumClassifier) or not model.stationary:
            return None
        if type(model).predict is not EquilibriumClassifier.predict:
            return None
        return Dynamics(model, damping, adjoint_damping)

    def module(self) -> nn.Module:
        """A plain module for library attacks: logits with this view's gradient."""
        return TargetModule(self)

    def __call__(self, x: Images, warm: Sequence[Tensor] = ()) -> Output:
        """Logits and solves of a batch.

        Args:
            warm: states to start the solves from (an attack's own, from an earlier output).
        """
        if self.batch_size is None or len(x) <= self.batch_size:
            return self._run(x, warm)
        outputs = []
        for begin in range(0, len(x), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            outputs.append(self._run(x[part], [state[part] for state in warm]))
        return _joined(outputs)

    def _run(self, x: Images, warm: Sequence[Tensor]) -> Output:
        x = x if self._dtype is None else x.to(self._dtype)
        if warm and not self.iterates:
            raise UsageError("a warm start was given to a model without a solve.")
        solves: list[Solve] = []

        def predict(inputs: Images) -> Any:
            solves.clear()
            # Finite differences ask for several copies of the batch at once.
            copies = len(inputs) // max(len(x), 1)
            starts = [state.repeat(copies, *[1] * (state.dim() - 1)) for state in warm]
            return self._predict(inputs, starts, solves)

        if not isinstance(self.gradient, ModuleGradient):
            logits = predict(x)
        else:
            logits = self.gradient(self.model, predict, x)
        return Output(self._checked(logits, x), tuple(solves))

    def _predict(self, x: Images, warm: Sequence[Tensor], solves: list[Solve]) -> Any:
        """The model's own forward pass; `solves` receives what it solved."""
        if not isinstance(self.model, EquilibriumClassifier):
            return count_unless_counted(self.model, x)
        drive = self.drive(self.model, warm)
        logits = self.model.predict(x, drive)
        solves += drive.solves
        return logits

    def drive(self, model: EquilibriumClassifier, warm: Sequence[Tensor]) -> Drive:
        """The `solve` of one forward pass through this view."""
        own = not isinstance(self.gradient, SolveGradient)
        gradient = model.gradient if own else cast("SolveGradient", self.gradient)
        return Drive(self.solver or model.solver, gradient, model.start, self.value, warm)

    def _checked(self, logits: Any, x: Images) -> Logits:
        if not isinstance(logits, Tensor):
            raise CaseError(
                f"the model returns {type(logits).__name__}, not a tensor of logits; "
                "return logits of shape (batch, classes)."
            )
        expected = (len(x), self.classes)
        if tuple(logits.shape) != expected:
            raise CaseError(
                f"the model returns logits of shape {tuple(logits.shape)} for {len(x)} images of "
                f"{self.classes} classes; return shape {expected}."
            )
        if not logits.is_floating_point():
            raise CaseError(f"the model returns logits of type {logits.dtype}; return floats.")
        return self._attackable(logits, x)

    def _attackable(self, logits: Tensor, x: Images) -> Logits:
        """Logits in float32 or float64 that autograd can start from."""
        if logits.is_inference():
            logits = logits.clone()
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if torch.is_grad_enabled() and x.requires_grad and not logits.requires_grad:
            # So that attacks run, on a gradient of 0; the honesty checks name the model for it.
            return cast("Tensor", cast("Any", _NoGradient).apply(logits, x))
        return logits


class TargetModule(nn.Module):
    """A target as a plain module; its gradients do not depend on who calls it, or in which mode."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target
        self.model = target.model

    def forward(self, x: Images) -> Logits:
        """Logits (batch, classes)."""
        if torch.is_grad_enabled() and x.requires_grad:
            x = cast("Any", _FiniteGradient).apply(x)
        # Libraries keep their books in the type of the images.
        return self.target(x).logits.to(x.dtype)


class _FiniteGradient(torch.autograd.Function):
    """The identity; its gradient is 0 where it is not a number.

    One NaN in a gradient turns the whole example of a library attack into NaN, which ends the
    attack on that sample and can pass for robustness, or for success.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        finite: Tensor = torch.nan_to_num(gradients[0], nan=0.0, posinf=0.0, neginf=0.0)
        return finite.contiguous()  # AutoAttack takes views of it


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        return None, torch.zeros_like(x)


def _joined(outputs: Sequence[Output]) -> Output:
    logits = torch.cat([output.logits for output in outputs])
    solves = []
    for parts in zip(*[output.solves for output in outputs], strict=True):
        solves.append(
            Solve(
                torch.cat([s.z for s in parts]),
                torch.cat([s.residual for s in parts]),
                torch.cat([s.steps for s in parts]),
            )
        )
    return Output(logits, tuple(solves))
