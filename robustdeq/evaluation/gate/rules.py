"""What each check is held against, where that comes from, and what to do about a failure."""

from __future__ import annotations

from typing import NamedTuple

_CONTROLS = "honest controls (27 models x 3 seeds)"


class Rule(NamedTuple):
    """A threshold with its origin.

    Attributes:
        limit: the largest value that passes, or with `at_least` the smallest.
        reference: what is measured, and where the limit comes from.
        remedy: what the author of a model does about a failure.
    """

    limit: float
    reference: str
    remedy: str
    at_least: bool = False


RULES: dict[str, Rule] = {
    "randomized": Rule(
        0.0,
        f"1 if logits depend on the seed by more than 1e-5 of their size; {_CONTROLS}: 0",
        "Remove the randomness, or submit to the track of randomized models.",
    ),
    "input_overwritten": Rule(
        0.0,
        f"share of samples whose image differs after the model has seen it; {_CONTROLS}: 0",
        "Work on a copy of the input.",
    ),
    "probabilities": Rule(
        0.0,
        f"share of samples whose outputs are positive and sum to 1; {_CONTROLS}: 0",
        "Return logits: losses take their softmax.",
    ),
    "grad_mode_changes_logits": Rule(
        1e-5,
        "largest move of logits between no_grad and enable_grad, relative to their size; "
        f"{_CONTROLS}: largest 2.1e-7",
        "Compute the same whether or not gradients are recorded.",
    ),
    "inference_mode_changes_logits": Rule(
        1e-5,
        "largest move of logits between no_grad and inference_mode, relative to their size; "
        f"{_CONTROLS}: largest 0",
        "Where the forward pass needs gradients, leave torch.inference_mode and clone the input.",
    ),
    "gradient_missing": Rule(
        0.0,
        f"1 if autograd finds no way from the logits to the image; {_CONTROLS}: 0",
        "Keep the image in the graph: no detach, no_grad, NumPy or integers on the way.",
    ),
    "nonfinite_gradient": Rule(
        0.0,
        f"share of samples whose gradient of the margin is not finite; {_CONTROLS}: 0",
        "Find the square root, norm or division at 0.",
    ),
    "zero_gradient": Rule(
        0.05,
        f"share of samples whose gradient of the margin is exactly 0; {_CONTROLS}: largest 0",
        "Find the rounding, threshold, clamp or detach that stops it.",
    ),
    "saturated_logits": Rule(
        0.05,
        "share of samples with a margin's gradient and none of cross-entropy; "
        f"{_CONTROLS}: largest 0",
        "Scale the logits down: accuracy does not change.",
    ),
    "shattered_gradient": Rule(
        0.8,
        "median cosine of gradients at the image and a quarter of the radius away, at most 0.03 a "
        f"pixel; {_CONTROLS}: least 0.97",
        "Attack a smoothed gradient, such as smoothed(16,0.02), beside the honest one.",
        at_least=True,
    ),
    "finite_differences": Rule(
        0.9,
        "median cosine of the gradient with central differences along 64 random directions; "
        f"{_CONTROLS}: least 1.00",
        "Correct the backward pass: it is not the derivative of the forward pass.",
        at_least=True,
    ),
    "finite_differences_adversarial": Rule(
        0.9,
        f"the same at attacked points; {_CONTROLS}: least 1.00",
        "Correct the backward pass: it is not the derivative of the forward pass.",
        at_least=True,
    ),
    "gradient_masked": Rule(
        0.9,
        "median cosine of the honest gradient with the straight-through one; "
        f"{_CONTROLS}: least 1.00",
        "Let the gradient through the operations named, or have attacks use straight_through.",
        at_least=True,
    ),
    "batch_dependent": Rule(
        0.0,
        "share of samples that other companions move by over 1e-3 of the logits' size, or by over "
        f"1e-5 and to another class; {_CONTROLS}: 0",
        "Let each sample stop and be normalized by itself.",
    ),
    "discontinuous": Rule(
        0.02,
        "share of segments on which logits jump by over 1e-2 of their size; "
        f"{_CONTROLS}: largest 0",
        "Find the rounding, threshold, early exit or table; attack through straight_through.",
    ),
    "unconverged_clean": Rule(
        0.01,
        "share of clean samples with a residual above 1e-3 and ten tolerances; "
        f"{_CONTROLS}: largest 0",
        "Give the solver more steps, or say by tolerance 0 that the steps are the model.",
    ),
    "unconverged_adversarial": Rule(
        0.05,
        f"the same at attacked points; {_CONTROLS}: largest 0",
        "Give the solver more steps, or say by tolerance 0 that the steps are the model.",
    ),
    "adjoint_unconverged": Rule(
        0.05,
        "share of clean and attacked samples with an adjoint residual above 1e-2; "
        f"{_CONTROLS}: largest 0",
        "Give the adjoint solver more steps, or another method.",
    ),
    "doubled_steps": Rule(
        0.01,
        "share of samples that 80 steps break beyond 40, above one sample; "
        f"{_CONTROLS}: largest 0.01",
        "Look at why attacks do not converge; attack with more steps and restarts.",
    ),
    "unbounded_attack": Rule(
        0.1,
        f"accuracy under an attack in the whole box, against chance; {_CONTROLS}: largest 0",
        "Find what keeps the gradient from leading anywhere.",
    ),
    "random_noise": Rule(
        0.0,
        "share of samples broken by random points less that broken by gradients; "
        f"{_CONTROLS}: largest -0.28",
        "Find what keeps the gradient from leading anywhere.",
    ),
    "keeps_state": Rule(
        1e-5,
        "largest move of logits with the calls before, relative to their size; "
        f"{_CONTROLS}: largest 0",
        "Keep nothing between calls; start every solve cold.",
    ),
}
