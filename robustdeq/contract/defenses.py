"""What a defense must keep to, on untrained models of two small data sets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from robustdeq.contract.findings import Finding, Findings
from robustdeq.contract.form import form
from robustdeq.contract.surroundings import watched
from robustdeq.datasets import DataSpec
from robustdeq.errors import UsageError, sentence
from robustdeq.evaluation.gate.examined import SAME, gap, seeded_logits
from robustdeq.evaluation.gate.losses import input_gradient, margin
from robustdeq.evaluation.gate.repetition import is_randomized
from robustdeq.evaluation.judge import seeded
from robustdeq.interfaces import Defense
from robustdeq.shapes import Images, Logits
from robustdeq.targets import Target

SPECS = (DataSpec("small_gray", 10, 1, 8, 8), DataSpec("color", 10, 3, 32, 32))
IMAGES = 5
CPU = torch.device("cpu")
COUPLED = 1e-3
"""Relative move of logits from which a batch is coupled, as in the honesty gate."""


@dataclass(frozen=True, eq=False)
class Built:
    """One model in eval mode, with images of its shape."""

    defense: Defense
    spec: DataSpec
    model: nn.Module
    x: Images

    @property
    def target(self) -> Target:
        """The model as an attack sees it."""
        return Target(self.model, self.spec.classes)

    def logits(self, x: Images | None = None) -> Logits:
        """Without gradients, under one seed."""
        return seeded_logits(self.target, self.x if x is None else x, 1)


def defense_findings(defense: Defense) -> list[Finding]:
    """All findings on a defense."""
    found = Findings(form(defense, "defense"))
    built = [model for spec in SPECS if (model := _built(found, defense, spec)) is not None]
    if not built and not any(item.outcome == "failed" for item in found.items):
        found.note("builds", "it refuses every data set", "Build for 8x8 gray or 32x32 color.")
    for item in built:
        _behavior(found, item)
    return found.items


def _built(found: Findings, defense: Defense, spec: DataSpec) -> Built | None:
    """The model, unless the plugin refuses such data or fails."""
    name = f"builds_{spec.height}x{spec.width}"
    remedy = "Read channels, height, width and classes off the `data` that build is given."
    try:
        with watched() as traces:
            model = build(defense, spec, 1)
            states = [_state_after_build(defense, spec, seed) for seed in (1, 2)]
    except UsageError as refusal:
        found.skip(name, sentence(refusal))
        return None
    except Exception as cause:
        found.note(name, sentence(cause), remedy)
        return None
    if not isinstance(model, nn.Module):
        found.note(name, f"build returns {type(model).__name__}, not a torch.nn.Module", remedy)
        return None
    found.note(name, "", remedy)
    acts = [act for act in traces.acts if act.startswith(("prints", "changes"))]
    if torch.equal(*states):
        acts.append("sets the seed of torch's generator, so that every training starts alike")
    found.note(
        f"quiet_build_{spec.height}x{spec.width}",
        "; ".join(acts),
        "Build without printing and without settings of the whole process.",
    )
    shape = (IMAGES, spec.channels, spec.height, spec.width)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return Built(defense, spec, model.eval(), x)


def build(defense: Defense, spec: DataSpec, seed: int) -> nn.Module:
    """A model from a seed, on the CPU."""
    with seeded(seed, CPU):
        return defense.build(spec, CPU)


def _state_after_build(defense: Defense, spec: DataSpec, seed: int) -> Tensor:
    """Where torch's generator stands after a build."""
    with seeded(seed, CPU):
        defense.build(spec, CPU)
        return torch.get_rng_state()


def _behavior(found: Findings, built: Built) -> None:
    size = f"{built.spec.height}x{built.spec.width}"
    for name, (remedy, test) in TESTS.items():
        with watched():  # its words on what else it does have a test of their own
            found.run(f"{name}_{size}", remedy, partial(test, built))


def _logits(built: Built) -> str:
    """Form, type and values of the model's own answer."""
    with seeded(1, CPU), torch.no_grad():
        for x in (built.x.clone(), built.x[:1].clone()):
            logits = built.model(x)
            if not isinstance(logits, Tensor):
                return f"the model returns {type(logits).__name__}"
            wanted = (len(x), built.spec.classes)
            if tuple(logits.shape) != wanted:
                return f"logits have shape {tuple(logits.shape)}, not {wanted}"
            if logits.dtype != torch.float32:
                return f"logits are {logits.dtype}, not float32"
            if not bool(logits.isfinite().all()):
                return "logits are not finite for images of random pixels"
    return ""


def _modes(built: Built) -> str:
    """With gradients, without and in inference mode."""
    judged = built.logits()
    for name, mode in (("enable_grad", torch.enable_grad), ("inference_mode", _inference)):
        with seeded(1, CPU), mode():
            other = built.model(built.x.clone()).detach().clone()
        apart = gap(judged, other)
        if apart > SAME:
            return f"logits under torch.{name} are {apart:.2g} away from those under no_grad"
    return ""


def _inference() -> torch.inference_mode:
    return torch.inference_mode()


def _gradient(built: Built) -> str:
    """In eval mode, from logits to image."""
    y = built.logits().argmax(1)
    with seeded(1, CPU):
        slope = input_gradient(built.target, built.x, y, margin)
    if not bool(slope.isfinite().all()):
        return "the gradient in the image is not finite"
    zero = int((slope.flatten(1) == 0).all(1).sum())
    return f"the gradient in the image is 0 for {zero} of {IMAGES} images" if zero else ""


def _untouched(built: Built) -> str:
    x = built.x.clone()
    with seeded(1, CPU), torch.no_grad():
        built.model(x)
    return "" if torch.equal(x, built.x) else "the model writes into its input"


def _alone(built: Built) -> str:
    """A sample by itself against the same sample in a batch."""
    if is_randomized(built.target, built.x):
        return ""
    together = built.logits()
    alone = torch.cat([built.logits(built.x[k : k + 1]) for k in range(IMAGES)])
    apart = gap(together, alone)
    return f"logits move by {apart:.2g} with the batch they are in" if apart > COUPLED else ""


def _copies(built: Built) -> str:
    twin = Target(copy.deepcopy(built.model), built.spec.classes)
    apart = gap(built.logits(), seeded_logits(twin, built.x, 1))
    return f"a deep copy's logits are {apart:.2g} away" if apart > SAME else ""


def _weights(built: Built) -> str:
    """Through the bytes of a weights file into a model from another seed."""
    state = {k: v.detach().contiguous() for k, v in built.model.state_dict().items()}
    other = build(built.defense, built.spec, 2).eval()
    other.load_state_dict(load(save(state)), strict=True)
    apart = gap(built.logits(), seeded_logits(Target(other, built.spec.classes), built.x, 1))
    return (
        f"weights that were saved and loaded give logits {apart:.2g} away" if apart > SAME else ""
    )


def _repeats(built: Built) -> str:
    first, second = (build(built.defense, built.spec, 3).state_dict() for _ in range(2))
    differing = [k for k, v in first.items() if not torch.equal(v, second[k])]
    return f"two builds from one seed differ in {', '.join(differing[:3])}" if differing else ""


def _quiet(built: Built) -> str:
    """What a forward pass does besides."""
    with watched() as traces:
        ends = []
        for seed in (1, 2):
            with seeded(seed, CPU):
                built.model(built.x.clone())
                ends.append(torch.get_rng_state())
    acts = list(dict.fromkeys(traces.acts))
    if torch.equal(*ends):
        acts.append("sets the seed of torch's generator")
    if any(module.training for module in built.model.modules()):
        acts.append("leaves eval mode")
    return "; ".join(acts)


TESTS: dict[str, tuple[str, Callable[[Built], str]]] = {
    "logits": ("Return finite float32 logits of shape (batch, classes).", _logits),
    "modes": ("Compute the same whether or not gradients are recorded.", _modes),
    "gradient": ("Keep the image in the graph, in eval mode too.", _gradient),
    "input_untouched": ("Work on a copy of the input.", _untouched),
    "batch_invariance": ("Let each sample stop and be normalized by itself.", _alone),
    "deepcopy": ("Hold tensors as parameters or buffers.", _copies),
    "weights": ("Hold all that is learned in the state dict, each tensor once.", _weights),
    "reproducible_build": ("Draw initial weights from torch's global generator.", _repeats),
    "quiet_forward": ("Return logits, and do nothing else.", _quiet),
}
