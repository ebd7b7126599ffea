"""The reference AutoAttack (Croce and Hein 2020), component by component, and Square alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from robustdeq.attacks._ledger import FRESH, SURE
from robustdeq.attacks._screen import Screen, unreliable
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from robustdeq.arithmetic import Precision
from robustdeq.equilibrium import Lockstep
from robustdeq.errors import UsageError
from robustdeq.interfaces import Access, Budget, Candidates, Scope
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Counts, Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.verdict import ENGINE_LEFT_OUT

Version = Literal["standard", "plus", "rand"]
_COMPONENTS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
# DLR needs the third largest logit, its targeted form the fourth.
_FEWEST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
# Model calls per sample that stays robust, measured on AutoAttack standard with 10 classes.
_CALLS = {
    "apgd-ce": Budget(111, 101),
    "apgd-dlr": Budget(111, 101),
    "apgd-t": Budget(928, 909),
    "fab-t": Budget(1837, 900),
    "fab": Budget(2000, 1000),
    "square": Budget(5012, 0),
}

# Of them, what the joint engine spends on an equilibrium model; measured on the digits DEQ.
_JOINT_SHARE = 0.2
# Parameters that say nothing to the reference.
_JOINT_ALONE = ("rerun", "fallback", "updates", "precision", "compile")


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """AutoAttack through `pyautoattack`, or through the git package `autoattack`.

    The library's own components run with its own settings and the suite's seed on the whole chunk
    as one batch, each on the samples that those before it left robust: the same examples as its
    `run_standard_evaluation`. Driven one by one because that function would let NaN examples count
    as fooled, installs a process-wide tracer, and cannot name the component that broke a sample.

    With fewer than 10 classes the targeted components take all other classes as targets; those
    that need more classes than there are are left out, and the row says so.

    The engine `joint` runs the standard version on equilibrium models with states that are carried
    from step to step (see `_screen.Screen`): about one evaluation of the cell per step, the same
    attacks, budgets and losses. Where a model is not the fixed point of one cell, or plain steps
    do not settle, the reference runs, and the row says so.

    Attributes:
        version: "standard", "plus" or "rand" (for randomized models).
        engine: "reference" or "joint".
        rerun: the share of survivors, nearest to the boundary, that the joint engine runs again
            on solved states.
        fallback: whether the reference runs where the joint engine cannot; if not, models that it
            is not for are left alone.
        updates: evaluations of the cell, and products with its Jacobian, per step of the joint
            engine.
        precision: of the gradients of its screen: "float32", "tf32" (a GPU's) or "bfloat16".
        compile: whether its looks are at a copy of the model that torch.compile has made kernels
            of, which a GPU replays as CUDA graphs. On a processor it loses on small cells.
        draw: added to the suite's seed, for a second run with other random numbers.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    scope: ClassVar[Scope] = Scope.CHUNK

    version: Version = "standard"
    engine: Literal["reference", "joint"] = "reference"
    rerun: float = 0.15
    fallback: bool = True
    updates: int = 1
    precision: Precision = field(default="float32", metadata={"young": True})
    compile: bool = field(default=False, metadata={"young": True})
    draw: int = 0

    def __post_init__(self) -> None:
        if self.engine == "joint" and self.version != "standard":
            raise UsageError(
                f"autoattack has engine='joint', version={self.version!r}; the joint engine runs "
                "version 'standard'."
            )
        if self.engine == "reference":
            self._refuse_what_is_the_joint_engines()
        if self.updates < 1:
            raise UsageError(f"autoattack has updates={self.updates}; give at least 1.")
        if self.compile and self.updates > 1:
            raise UsageError(
                f"autoattack has compile=True, updates={self.updates}; compiled products with the "
                "cell's Jacobian are taken once a look: leave one of them out."
            )
        if not 0 <= self.rerun <= 1:
            raise UsageError(f"autoattack has rerun={self.rerun}; give a share from 0 to 1.")

    def _refuse_what_is_the_joint_engines(self) -> None:
        for name in _JOINT_ALONE:
            if getattr(self, name) != getattr(type(self), name):
                raise UsageError(
                    f"autoattack has engine='reference', {name}={getattr(self, name)}; leave "
                    f"{name} out, or give engine='joint'."
                )

    def fits(self, target: Target) -> bool:
        """Whether it attacks the target at all."""
        return self.fallback or target.dynamics() is not None

    def resolved(self, target: Target) -> AutoAttack:
        """The reference, where it takes the joint engine's place; see `interfaces.Attack`."""
        if self.engine == "joint" and self.fallback and target.dynamics() is None:
            defaults = {name: getattr(type(self), name) for name in _JOINT_ALONE}
            return replace(self, engine="reference", **defaults)
        return self

    def components(self, classes: int) -> tuple[str, ...]:
        """The components that run with so many classes, in order."""
        every = _COMPONENTS[self.version]
        return tuple(name for name in every if classes >= _FEWEST_CLASSES.get(name, 2))

    def left_out(self, classes: int) -> tuple[str, ...]:
        """See `robustdeq.interfaces.Attack`."""
        kept = self.components(classes)
        return tuple(
            f"{name} left out: it needs {_FEWEST_CLASSES[name]} classes"
            for name in _COMPONENTS[self.version]
            if name not in kept
        )

    def budget(self, classes: int) -> Budget:
        """See `robustdeq.interfaces.Attack`."""
        calls = [_CALLS[name] for name in self.components(classes)]
        draws = 20 if self.version == "rand" else 1
        restarts = 5 if self.version == "plus" else 1
        share = _JOINT_SHARE * self.updates if self.engine == "joint" else 1.0
        factor = draws * restarts * share
        return Budget(
            int(sum(c.forward for c in calls) * factor),
            int(sum(c.backward for c in calls) * factor),
        )

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        """See `robustdeq.interfaces.Attack`."""
        notes: tuple[str, ...] = ()
        if self.engine == "joint":
            dynamics = target.dynamics()
            reason = "it is not the fixed point of one cell"
            if dynamics is not None:
                reason = unreliable(Lockstep(dynamics), x, y)
            if dynamics is not None and not reason:
                seed = rng.seed + self.draw
                return Screen(
                    target, dynamics, x, y, threat, seed,
                    rerun=self.rerun, updates=self.updates, precision=self.precision,
                    compile_=self.compile,
                ).run()  # fmt: skip
            if not self.fallback:
                return Candidates(x, ("",) * len(x), (f"{ENGINE_LEFT_OUT}: {reason}",))
            notes = (f"{ENGINE_LEFT_OUT}, the reference ran: {reason}",)
        return self._reference(target, x, y, threat, rng.seed + self.draw)._replace(notes=notes)

    def _reference(
        self, target: Target, x: Images, y: Labels, threat: Threat, seed: int
    ) -> Candidates:
        module = target.module()
        library = _library(module, threat, seed, self.version, x.device)
        targets = min(9, target.classes - 1)
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = targets
        return _in_turn(library, module, self.components(target.classes), x, y, seed)


@dataclass(frozen=True, kw_only=True)
class Square:
    """Square Attack alone (Andriushchenko et al. 2020): a black-box control of the others.

    Attributes:
        queries: most queries of a restart.
        restarts: number of restarts.
    """

    needs: ClassVar[Access] = Access.LOGITS
    scope: ClassVar[Scope] = Scope.CHUNK

    queries: int = 5000
    restarts: int = 1

    def budget(self, classes: int) -> Budget:
        """See `robustdeq.interfaces.Attack`."""
        del classes
        return Budget((self.queries + 12) * self.restarts, 0)

    def run(
        self, target: Target, x: Images, y: Labels, threat: Threat, rng: SampleRandom
    ) -> Candidates:
        """See `robustdeq.interfaces.Attack`."""
        module = target.module()
        library = _library(module, threat, rng.seed, "standard", x.device)
        library.square.n_queries, library.square.n_restarts = self.queries, self.restarts
        return _in_turn(library, module, ("square",), x, y, rng.seed)


def _library(module: nn.Module, threat: Threat, seed: int, version: str, device: Any) -> Any:
    """An AutoAttack object of whichever package is installed; both name their parts alike."""
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    settings = {"norm": str(threat.norm), "eps": threat.eps, "seed": seed, "version": version}
    try:
        from pyautoattack import AutoAttack as Reference

        return Reference(module, device=str(device), **settings)
    except ImportError:
        pass
    try:
        from autoattack import AutoAttack as GitReference
    except ImportError as cause:
        raise UsageError(
            "AutoAttack is not installed; install it with 'pip install pyautoattack'."
        ) from cause
    return GitReference(module, device=str(device), verbose=False, **settings)


def _in_turn(
    library: Any, module: nn.Module, components: tuple[str, ...], x: Images, y: Labels, seed: int
) -> Candidates:
    """Run components one after another, each on what the earlier ones left."""
    best, made_by = x.clone(), [""] * len(x)
    # By one draw alone a candidate for a randomized model may be luck.
    draws, needed = (FRESH, SURE) if _randomized(module, x) else (1, 1)
    wrong = _times_wrong(module, x, y, draws)
    robust = wrong < needed
    for name in components:
        rows = robust.nonzero().squeeze(1)
        if not len(rows):
            break
        with _own_randomness(x.device):
            found = _component(library, name, seed)(x[rows].clone(), y[rows].clone()).detach()
        # A NaN image is classified as something else by most models; it is no example.
        finite = found.flatten(1).isfinite().all(1)
        times = _times_wrong(module, found, y[rows], draws)
        better = (times > wrong[rows]) & finite
        # Kept as the candidate unless a later component does better, so that the judge sees that
        # this one failed and never counts the sample as having withstood it.
        taken = better | (~finite & (2 * wrong[rows] <= draws))
        best[rows[taken]] = found[taken].to(best)
        wrong[rows[better]] = times[better]
        for row in rows[better & (2 * times > draws)].tolist():
            made_by[row] = name
        robust[rows[better & (times >= needed)]] = False
    return Candidates(best, tuple(made_by))


@torch.no_grad()
def _randomized(module: nn.Module, x: Images) -> bool:
    """Whether two passes differ by more than rounding."""
    one, other = module(x).nan_to_num(), module(x).nan_to_num()
    return bool((one - other).abs().max() > 1e-5 * one.abs().max())


@torch.no_grad()
def _times_wrong(module: nn.Module, x: Images, y: Labels, draws: int) -> Counts:
    """In how many of so many passes each input is taken for another class."""
    return torch.stack([module(x).argmax(1) != y for _ in range(draws)]).sum(0)


def _component(library: Any, name: str, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """One component's `perturb`, prepared as `run_standard_evaluation` prepares it."""
    if name in ("apgd-ce", "apgd-dlr"):
        library.apgd.loss, attack = name.removeprefix("apgd-"), library.apgd
    elif name == "apgd-t":
        attack = library.apgd_targeted
    elif name == "square":
        attack = library.square
    else:
        attack = library.fab
        attack.targeted = name == "fab-t"
        if attack.targeted:
            attack.n_restarts = 1
    attack.seed = seed
    perturb: Callable[[Tensor, Tensor], Tensor] = attack.perturb
    if name != "square" or attack.norm != "L2":
        return perturb
    return lambda x, y: perturb(x, y) if _factor(x) == 1 else _enlarged(attack, x, y, _factor(x))


def _factor(x: Images) -> int:
    """The least by which an image must be enlarged for Square under L2 to take it.

    It starts from a grid of windows, a fifth of the height high and wide, with a margin above and
    to the left. It fails where a window is of less than a pixel, and where one is cut by an edge.
    """
    height, width = x.shape[2:]
    return next(k for k in range(1, 6) if _holds_its_grid(k * height, k * width))


def _holds_its_grid(height: int, width: int) -> bool:
    side = height // 5
    margin = (height - 5 * side) // 2
    ends = [margin + side * (length // side) for length in (height, width)] if side else []
    # Empty windows beyond an edge do no harm where they are of a pixel.
    return bool(side) and (side == 1 or (ends[0] <= height and ends[1] <= width))


def _enlarged(square: Any, x: Images, y: Labels, k: int) -> Images:
    """Square under L2 on an enlarged image, its result averaged back.

    With k x k pixels for one, the ball of radius k epsilon averages into that of radius epsilon.
    """
    attack = copy.copy(square)
    attack.predict = lambda large: square.predict(F.avg_pool2d(large, k))
    attack.eps = k * square.eps
    found: Images = attack.perturb(x.repeat_interleave(k, 2).repeat_interleave(k, 3), y)
    return F.avg_pool2d(found, k)


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """The library reseeds the global generators; whoever called gets theirs back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
